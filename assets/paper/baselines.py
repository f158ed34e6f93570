"""Train the learned baseline at the paper's scale: a hyperprior on pixels, by the loop and the loss of assets/pocket.

    slim preprocess --data /data/imagenet --out runs/paper/train --keep-images
    python assets/paper/baselines.py --cache runs/paper/train --out runs/paper/baseline_mse
    python assets/paper/baselines.py --cache runs/paper/train --out runs/paper/baseline_task \\
        --start runs/paper/baseline_mse

With --start it is tuned on for the answers of the scale's teachers. `slim evaluate` measures both where they lie beside
the scale's compressor under these names. Several processes may share the work (torchrun --nproc_per_node 8 --
assets/paper/baselines.py ...: without the "--" it would take --start for its own); a stopped run goes on.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path

import torch
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "pocket"))
from train import LAMBDAS, new_pixel_codec, pixel_loss

from slimlib.__main__ import in_one_line
from slimlib.data.cache import Cache
from slimlib.data.train import place_for, write_card, write_folder
from slimlib.loop import fit
from slimlib.machines import load_machine
from slimlib.measure.baselines import PixelCodec
from slimlib.scales import Scale
from slimlib.training import Stage1Config, Stage2Config, parameter_groups
from slimlib.utils import describe_device, option, pick_device, rank_and_world


@dataclass
class Options:
    """What is trained on what."""

    cache: Path = option(MISSING, "folder that `slim preprocess --keep-images` has filled")
    out: Path = option(MISSING, "folder of the result; checkpoint and log lie beside it, in OUT.training")
    start: Path | None = option(None, "one trained for squared error: it is tuned for the teachers' answers")
    scale: str = option("paper", "whose teachers; as for `slim train`")
    steps: int | None = option(None, "optimiser steps (default: 8000, and 3000 to tune)", 1)
    batch: int = option(32, "pictures that go through the networks together", 1, 10**6)
    max_seconds: float | None = option(None, "stop after this time with a checkpoint", 0)
    device: str | None = option(None, "cpu, cuda, ... (default: the best at hand)")
    quiet: bool = option(False, "no progress bar")


def main(arguments: list[str] | None = None) -> int:
    """Train, or go on; returns the exit status."""
    parser = HfArgumentParser(Options, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    (options,) = parser.parse_args_into_dataclasses(arguments)
    work = place_for(options.out, options.start)
    cache, device = Cache.open(options.cache), pick_device(options.device)
    if cache.images is None:
        raise ValueError(f"{options.cache} holds no pictures: make another cache with `slim preprocess --keep-images`")
    common = {"batch": options.batch, "w_bg": 1.0, "beta": 0.0, **LAMBDAS}
    if options.start:
        config: Stage1Config = Stage2Config(steps=options.steps or 3000, a=0.0, drop_caption=0.0, **common)
        teachers = [load_machine(name, device) for name in Scale.from_name(options.scale).teachers]
        if (top := cache.labels.max()) >= (known := min(len(one.classes) for one in teachers)):
            raise ValueError(f"{options.cache} has labels up to {top}, and a teacher knows {known} classes")
        codec = PixelCodec.from_pretrained(options.start)
    else:
        config, teachers, codec = Stage1Config(steps=options.steps or 8000, **common), [], new_pixel_codec()
    torch.manual_seed(config.seed)
    model = codec.compressor.to(device)
    limits = {"progress": not options.quiet, "max_seconds": options.max_seconds, "device": device}
    limits["settings"] = {name: cache.about.get(name) for name in ("data", "protocol")}  # what the checkpoint is of
    loss_of = pixel_loss(model, cache, teachers, config, device)
    fit(config, {"model": model}, loss_of, work, groups=parameter_groups(model), **limits)
    done = torch.load(work / "checkpoint.pt", weights_only=True, mmap=True)["step"]
    if rank_and_world()[0] == 0 and done == config.steps:
        with write_folder(options.out) as folder:
            model.to(memory_format=torch.contiguous_format).save_pretrained(folder)
            facts = {"command": f"python assets/paper/baselines.py {shlex.join(sys.argv[1:])}", **asdict(config)}
            facts |= {"start": str(options.start or "each cell's DCT"), "device": describe_device(device)}
            about = "Mean-scale hyperprior on pixels, one model for all rates: the learned baseline; not measured here."
            write_card(folder, "Baseline on pixels", about, facts, {}, f"Pictures of {options.cache}.")
    print(f"{done} of {config.steps} steps are done" + ("" if done == config.steps else ": the same command goes on"))
    return 0


if __name__ == "__main__":
    sys.exit(in_one_line("baselines.py", main))
