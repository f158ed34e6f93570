"""Train a compressor on what `slim preprocess` has cached, at any scale.

Stage 1 starts from random weights, or from --start. Stage 2 starts from --start, the result of stage 1, and takes over
its w_bg, lambda_min and lambda_max where nothing else is said: otherwise a quality would change its meaning, and its
rate, in between. Checkpoint and log lie beside the result, in OUT.training. Without the "--" that stands below in
torchrun's command it would take --start for an option of its own, and refuse it.

Examples:
  slim train --cache runs/train --out runs/compressor
  slim train --cache runs/train --out runs/compressor_uniform --w-bg 1
  slim train --stage 2 --cache runs/train --start runs/compressor --out runs/compressor_stage2
  slim train --stage 2 --cache runs/train --start runs/compressor --out runs/compressor_stage2 --resume
  slim train ... --walks 0 999 4 1      (as a distilled model such as SD-Turbo wants it, at every quality)
  torchrun --nproc_per_node 8 -m -- slimlib train --scale paper --cache runs/paper/train --out runs/paper/compressor
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
from diffusers import AutoencoderKL

from slimlib.caption import CAPTION_PRIOR, CaptionPrior
from slimlib.compressor import CompressorConfig, LatentCompressor
from slimlib.data.cache import Cache
from slimlib.ldm import LatentDiffusion
from slimlib.machines import load_machine
from slimlib.scales import Scale, load_pretrained, reading
from slimlib.training import Stage1Config, Stage2Config, train_stage1, train_stage2
from slimlib.utils import describe_device, digest, option, pick_device, quiet_libraries, rank_and_world, write_file


@dataclass
class Job:
    """What is trained on what; `Options` adds the settings of both stages."""

    cache: Path = option(MISSING, "folder that `slim preprocess` has filled")
    out: Path = option(MISSING, "folder of the result: weights, caption prior and card")
    stage: Literal[1, 2] = option(1, "what to train")
    start: Path | None = option(None, "compressor to start from; its caption prior goes along")
    scale: str = option("paper", "as the cache was made with: paper, pocket, a folder, or such as paper,ldm=owner/name")
    walks: list[float] = option([], "how to decode: from which quality on, t0, steps K, guidance; four for each range")
    resume: bool = option(False, "go on from the checkpoint")
    bf16: bool = option(False, "keep the frozen networks of stage 2 in bfloat16: half their memory, and no casts")
    max_seconds: float | None = option(None, "stop after this time with a checkpoint", 0)
    device: str | None = option(None, "cpu, cuda, ... (default: the best at hand)")
    quiet: bool = option(False, "no progress bar")


def unset_options(kind: type, default: Callable[[Field], str]) -> list[tuple]:
    """Fields for `make_dataclass`: a dataclass's own, None where nobody says them; `default` says what holds then."""
    kinds, options = get_type_hints(kind), []
    for f in fields(kind):
        switch = {"nargs": "?", "const": True} if kinds[f.name] is bool else {}
        metadata = {**f.metadata, "help": f"{f.metadata['help']} ({default(f)})", **switch}
        options.append((f.name, kinds[f.name] | None, field(default=None, metadata=metadata)))
    return options


def _default(f: Field) -> str:
    """What the stages take for a setting that is not given."""
    first = getattr(Stage1Config, f.name, "none")
    return f"default: {first}" if first == f.default else f"stage 1: {first}, stage 2: {f.default}"


Options: Any = make_dataclass("Options", unset_options(Stage2Config, _default), bases=(Job,))


def command(options: Job) -> int:
    """`slim train`; returns the exit status. Of several processes the main one writes."""
    work, begin = place_for(options.out, options.start), time.monotonic()
    if (work / "checkpoint.pt").exists() and not options.resume:
        raise ValueError(f"{work} holds a checkpoint: go on from it with --resume, or name another folder in --out")
    quiet_libraries()
    config, cache, device = _configure(options), Cache.open(options.cache), pick_device(options.device)
    model = _train(options, config, cache, work, device)
    if rank_and_world()[0]:
        return 0
    done = torch.load(work / "checkpoint.pt", weights_only=True, mmap=True)["step"]
    if done < config.steps:
        print(f"stopped after {done} of {config.steps} steps; the same command with --resume goes on")
        return 0
    with write_folder(options.out) as folder:
        model.save_pretrained(folder)
        prior = CaptionPrior.load(options.start / CAPTION_PRIOR) if options.start else CaptionPrior.fit(cache.captions)
        prior.save(folder / CAPTION_PRIOR)
        facts: dict[str, Any] = {"command": f"slim {shlex.join(sys.argv[1:])}"}
        facts |= {"start": str(options.start or "random weights"), **asdict(config)}
        facts |= {"processes": rank_and_world()[1], "device": describe_device(device)}
        facts |= {"seconds": round(time.monotonic() - begin), "data": json.dumps(cache.about)}
        about = "Mean-scale hyperprior on the latent, one model for all rates; not measured here."
        source = f"Latents of the diffusion model of the scale {options.scale}."
        write_card(folder, f"Compressor, stage {options.stage}", about, facts, {}, source)
    return 0


def _configure(options: Job) -> Stage1Config:
    """The stage's defaults; over them what the start of stage 2 was trained with; over that what was asked for."""
    kind, values = (Stage2Config if options.stage == 2 else Stage1Config), {}
    if options.stage == 2 and options.start and (card := options.start / "card.json").exists():
        with reading(card, "a card (delete it, and say --w-bg, --lambda-min and --lambda-max as they were)"):
            known = json.loads(card.read_text())["training"].items()
            values = {name: value for name, value in known if name in ("w_bg", "lambda_min", "lambda_max")}
    given = {f.name: getattr(options, f.name) for f in fields(Stage2Config)}
    values |= {name: value for name, value in given.items() if value is not None}
    if foreign := values.keys() - {f.name for f in fields(kind)}:
        raise ValueError(f"stage 1 has no {', '.join(f'--{name}' for name in sorted(foreign))}")
    return kind(**values)


def _train(options: Job, config: Stage1Config, cache: Cache, work: Path, device: torch.device) -> LatentCompressor:
    limits: dict[str, Any] = {"progress": not options.quiet, "max_seconds": options.max_seconds, "device": device}
    limits["settings"] = {name: cache.about.get(name) for name in ("data", "protocol", "roi", "vae")}
    if cache.latents is None:
        raise ValueError(f"{options.cache} holds no latents; fill another cache with them")
    shape = {"latent_channels": cache.latents.shape[1], "factor": cache.about["factor"]}
    rows = [options.walks[i : i + 4] for i in range(0, len(options.walks), 4)]
    walks: dict[str, Any] = {"walks": rows} if rows else {}
    model = LatentCompressor.from_pretrained(options.start, device) if options.start else None
    if model and (model.config.latent_channels, model.config.factor) != tuple(shape.values()):
        raise ValueError(f"{options.start} works on other latents than those in {options.cache}: {shape}")
    if model and options.start:
        CaptionPrior.load(options.start / CAPTION_PRIOR)  # the result needs it: refused now, not after all steps
        model.config = replace(model.config, **walks)
    if not isinstance(config, Stage2Config):
        start = model or CompressorConfig(**shape, **walks)
        return train_stage1(config, cache.latents, cache.masks, work, start, **limits)
    if model is None:
        raise ValueError("stage 2 needs --start, the compressor that stage 1 has left")
    scale = Scale.from_name(options.scale)
    vae = load_pretrained(AutoencoderKL, scale.ldm, "vae", variant=scale.variant, dtype=torch.float32)
    found = digest(vae).hex()[:8]
    if cache.about.get("vae", found) != found:
        raise ValueError(f"{options.cache} was made with another VAE than that of {scale.ldm}; which --scale was it?")
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    ldm = LatentDiffusion.from_pretrained(scale.ldm, scale.variant, device, dtype)
    teachers = [load_machine(name, device) for name in scale.teachers]
    if config.task == "ce" and (top := cache.labels.max()) >= (known := min(len(one.classes) for one in teachers)):
        raise ValueError(f"{options.cache} has labels up to {top}, and a teacher of {scale.name} knows {known} classes")
    arrays = cache.latents, cache.masks, cache.labels, cache.captions
    return train_stage2(config, *arrays, ldm, teachers, work, model, cache.images, **limits)


def place_for(out: Path, start: Path | None) -> Path:
    """OUT.training, for checkpoint and log, after `restore`; ValueError if `out` holds anything but a result."""
    for folder in filter(None, (start, out)):
        restore(folder)
    if out.is_file() or (any(out.glob("*")) and not (out / "card.json").exists()):
        raise ValueError(f"{out} is, or holds, no earlier result of training; name another folder in --out")
    return out.with_name(f"{out.name}.training")


@contextlib.contextmanager
def write_folder(path: str | Path) -> Iterator[Path]:
    """Yield a fresh folder that replaces `path`, with all that it held, when the block ends well; deleted otherwise.

    Of a symbolic link the target is replaced; a file or a device is left alone (NotADirectoryError). Should the process
    be killed between the two renames, `restore` finds what was there.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "this is no folder; name another one", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(None, f".{path.name[:99]}.", path.parent, ignore_cleanup_errors=True) as temporary:
        fresh, old = Path(temporary) / "new", Path(temporary) / "old"
        fresh.mkdir()
        yield fresh
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, old)
        try:
            os.replace(fresh, path)
        except BaseException:  # what was there comes back
            if old.exists():
                os.replace(old, path)
            raise


def restore(path: str | Path) -> None:
    """Bring back a folder that `write_folder` had moved away when its process was killed."""
    path = Path(os.path.realpath(path))
    for old in path.parent.glob(f".{glob.escape(path.name[:99])}.*/old"):
        if not path.exists():
            os.replace(old, path)


def write_card(folder: str | Path, title: str, about: str, training: dict, figures: dict, source: str) -> None:
    """Write a model card beside the weights: `README.md` for people, and `card.json`, the same, for programs.

    It says what the model is for (`about`), how it was made (`training`: command, seed, steps, device, seconds, data),
    what was measured on it (`figures`), and licences and origins of data and of starting weights (`source`).
    """
    made, measured = ("".join(f"| {k} | {v} |\n" for k, v in rows.items()) for rows in (training, figures))
    table = "| | |\n|---|---|\n"
    text = f"# {title}\n\n{about}\n\n## How it was made\n\n{table}{made}\n## What was measured\n\n{table}{measured}\n"
    write_file(Path(folder) / "README.md", f"{text}## Sources and licences\n\n{source}\n".encode())
    card = {"title": title, "about": about, "training": training, "figures": figures, "source": source}
    write_file(Path(folder) / "card.json", (json.dumps(card, indent=1) + "\n").encode())
