"""Try everything on the machine at hand, with random weights or real ones: does it fit, and how long does it take?

  python assets/paper/trial.py check                   full size: a compress, decompress and training step in 12 GB
  python assets/paper/trial.py measure                 time and memory of each job, at 256 and 512 px, in fp32 and bf16
  python assets/paper/trial.py measure paper --compile the same with the real models, and with torch.compile
  python assets/paper/trial.py measure runs/stand-in   the same with what stand_in.py has written
  python assets/paper/trial.py cpu                     core seconds of what no GPU does: CPU_SECONDS of `slim costs`

Operations a second (the last column) are what `slim costs` assumes: its --tflops times --share.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from stand_in import write
from transformers import BlipImageProcessor

from slimlib.__main__ import in_one_line
from slimlib.codec import SlimCodec
from slimlib.data.cache import Cache, fill
from slimlib.data.imagenet import WNIDS, ImageNetScenes, Pictures
from slimlib.data.scenes import PocketScenes
from slimlib.entropy import RangeDecoder, RangeEncoder
from slimlib.images import to_images, to_tensor
from slimlib.ldm import LatentDiffusion
from slimlib.machines import Machine, load_machine
from slimlib.measure.costs import Plan, as_text, build, published
from slimlib.measure.costs import operations as counted_operations
from slimlib.measure.doctor import free_memory
from slimlib.measure.evaluation import evaluate
from slimlib.measure.methods import CLASSIC_NAMES, QUALITIES, Method, classic, clocked
from slimlib.roi import gradcam, latent_mask
from slimlib.scales import Scale
from slimlib.training import Stage1Config, Stage2Config, train_stage1, train_stage2
from slimlib.utils import Within, describe_device, pick_device, quiet_libraries, write_file

ON_DISK = 7.0
"""GB that a stand-in of the full size takes on disk."""
TRAINED = 200, 20
"""Steps of both stages that are timed: so many that the checkpoint behind them does not matter."""


def check(scale: Scale, memory: float = 12.0, size: int = 256) -> float:
    """One compress, decompress and step of stage 2 on the CPU, by the codec's own functions.

    Args:
        memory: most that the process may take, in GB (10^9 bytes).
        size: side of the picture in pixels.

    Returns:
        Peak memory of the process in GB.

    Raises:
        MemoryError: less than `memory` is free, so that nothing was begun; or it took more.
    """
    if free_memory() < memory:
        raise MemoryError(
            f"{free_memory():.1f} GB are free, up to {memory:g} GB may be needed: end something else first"
        )
    start = time.perf_counter()

    def clock(what: str) -> float:
        nonlocal start
        peak = peak_memory()
        print(f"{what:<44} {time.perf_counter() - start:6.1f} s, peak {peak:5.2f} GB", flush=True)
        start = time.perf_counter()
        return peak

    image = PocketScenes("test", size)[0].image
    codec = SlimCodec.from_pretrained(scale, "cpu", exact=False)
    clock("load the codec")
    stream = codec.compress(image)
    clock(f"compress: {len(stream)} bytes, caption and all")
    assert codec.decompress(stream).size == image.size and codec.inspect(stream).size == len(stream)
    clock(f"decompress in {codec.inspect(stream).steps} steps")
    ldm, machine, compressor, x = codec.ldm, load_machine(scale.machine_a, "cpu"), codec.compressor, to_tensor(image)
    del codec  # with the captioner: in training captions come from a cache
    z = ldm.encode(x)
    m = latent_mask(gradcam(machine, x), *z.shape[2:])[:, 0]
    config, before = Stage2Config(steps=1, batch=1, warmup=1), [p.detach().clone() for p in compressor.parameters()]
    with tempfile.TemporaryDirectory() as out:
        data = z.numpy(), m.numpy(), np.zeros(1, np.int64), ["a dog"]
        after = train_stage2(config, *data, ldm, [machine], out, compressor, progress=False, device="cpu").parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)), "the step changed nothing"
    peak = clock("one step of stage 2, batch 1")
    if peak > memory:
        raise MemoryError(f"the peak was {peak:.2f} GB; {memory:g} GB are allowed")
    print(f"the peak was {peak:.2f} GB ({peak * 1e9 / 2**30:.2f} GiB); {memory:g} GB are allowed")
    return peak


def measure(
    scale: Scale,
    sizes: Sequence[int] = (256, 512),
    batch: int = 4,
    compiled: bool = False,
    steps: Sequence[int] = (1, 4, 20),
    repeats: int = 3,
    device: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Run every job of the reproduction `repeats` times after a first one that does not count.

    Args:
        scale: the models; random weights take as long as trained ones.
        sizes: sides of the pictures, 512 at the most.
        batch: pictures at a time in preprocessing and training; the codec takes one.
        compiled: measure bf16 once more with UNet and VAE through torch.compile.
        steps: denoising steps K that decoding is measured with.

    Yields:
        Rows of a table. The precision is the diffusion model's ("as trained": float32, with autocast to bf16 on a GPU).
        Milliseconds are the median, NaN where memory did not suffice. Memory is the most that was held: of the GPU, or
        without one of the process up to then. Operations are counted, NaN for networks of other than published sizes.
    """
    where = pick_device(device)
    for precision, size in itertools.product(["fp32", "bf16"] + ["bf16 compiled"] * compiled, sizes):
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        codec = SlimCodec.from_pretrained(scale, where, exact=False, dtype=dtype)
        if precision == "bf16 compiled":
            for network in (codec.ldm.unet, codec.ldm.vae.encoder, codec.ldm.vae.decoder):
                network.compile()
        scenes, counted = [PocketScenes("test", size)[i] for i in range(batch)], operations(codec, size, steps)
        with tempfile.TemporaryDirectory() as folder:
            machine, train = load_machine(scale.machine_a, where), precision == "fp32"
            for what, together, times, run in _runs(codec, machine, scenes, steps, Path(folder), train):
                seconds, memory = _clock(where, run, repeats)
                yield {
                    "what": what,
                    "size [px]": size,
                    "batch": together,
                    "precision": "as trained" if what.startswith("stage") else precision,
                    "ms a picture": 1000 * seconds / times,
                    "pictures a second": times / seconds,
                    "memory [GB]": memory,
                    "TFLOP/s": counted.get(what, math.nan) * times / seconds / 1e12,
                }


def measure_cpu(count: int = 8) -> dict[str, float]:
    """Seconds of one core for each entry of `costs.CPU_SECONDS`, at 256 px: a job's own code, networks left out.

    Pictures are scenes of 500 x 375 px with noise, so that their files have the 110 kB of ImageNet's average. Training
    steps are those of a tiny stand-in on one picture: Python's part, and nearly nothing of the networks'.
    """
    torch.set_num_threads(1)
    found, rng = {}, np.random.default_rng(0)

    def clock(what: str, times: int, run: Callable[[], Any]) -> None:
        start = time.process_time()
        run()
        found[what] = (time.process_time() - start) / times

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for i in range(count):
            pixels = np.asarray(PocketScenes("test", 512)[i].image.crop((6, 68, 506, 443)), float)
            path = folder / "val" / WNIDS[0] / f"{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            noisy = (pixels + rng.normal(0, 7, pixels.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(path, quality=95)
        scenes = ImageNetScenes(Pictures.from_folder(folder / "val"), "crop", 256)
        clock("open", count, lambda: fill(scenes, folder / "opened", about={}, progress=False))
        crops = [scene.image.crop((30, 30, 220, 220)) for scene in map(scenes.__getitem__, range(count))]
        processor = BlipImageProcessor(size={"height": 384, "width": 384})
        clock("caption", count, lambda: processor(images=crops, return_tensors="pt"))
        model = build(published("compressor")).eval()
        model.update()  # type: ignore[operator]

        def code() -> None:
            for quality in QUALITIES:
                model.compress(torch.randn(1, 4, 32, 32), quality, coder := RangeEncoder())  # type: ignore[operator]
                model.decompress(RangeDecoder(coder.get_bytes()), (32, 32), quality)  # type: ignore[operator]

        clock("code", len(QUALITIES), code)
        settings = [("", float(q)) for q in range(20)]
        copied = Method("copy", "", settings, lambda batch, *_: (to_tensor(to_images(batch.x)), pd.DataFrame()))
        jobs = [(copied, count)]
        clock("judge", count * len(settings), lambda: evaluate(scenes, jobs, {}, folder / "results", False, count))
        files = [(classic(codec), count) for codec in CLASSIC_NAMES]
        clock("classic", count, lambda: evaluate(scenes, files, {}, None, False, count))
        scale = write(folder / "tiny", tiny=True)
        ldm, machine = LatentDiffusion.from_pretrained(scale.ldm, device="cpu"), load_machine(scale.machine_a, "cpu")
        data = np.zeros((1, 4, 8, 8), np.float16), np.full((1, 8, 8), 255, np.uint8)
        one, two, start = (
            Stage1Config(steps=50, batch=1),
            Stage2Config(steps=10, batch=1),
            build(published("compressor")),
        )
        more: dict[str, Any] = {"compressor": start, "device": "cpu", "progress": False}
        clock("stage 1", one.steps, lambda: train_stage1(one, *data, folder / "one", **more))
        labelled = *data, np.zeros(1, np.int64), ["a dog"], ldm, [machine]
        clock("stage 2", two.steps, lambda: train_stage2(two, *labelled, folder / "two", **more))
    return found


def operations(codec: SlimCodec, size: int, steps: Sequence[int]) -> dict[str, float]:
    """Operations of each job for one picture; none where the UNet is not a published one."""
    parameters, known = sum(p.numel() for p in codec.ldm.unet.parameters()), published("parameters")
    for family in ("sd21", "sd15"):
        if known[f"unet_{family}"] == parameters:
            plan = Plan(size, family, qualities=1)
            decode = {f"decode, K = {k}": counted_operations(replace(plan, steps=k)).bf16["decoding"] for k in steps}
            jobs = counted_operations(plan).sum(axis=1)
            return {**jobs, "encode": jobs["files"], **decode}
    return {}


def _runs(
    codec: SlimCodec, machine: Machine, scenes: list, steps: Sequence[int], folder: Path, train: bool
) -> Iterator[tuple]:
    """Name of each job, pictures that go through together and in all, and the work."""
    batch, ldm, image = len(scenes), codec.ldm, scenes[0].image
    models: dict[str, Any] = {"ldm": ldm, "machine": machine, "captioner": codec.captioner}

    def look() -> None:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        fill(scenes, folder / "cache", about={}, batch=batch, progress=False, **models)

    yield "preprocessing", batch, batch, look
    stream = codec.compress(image)
    yield "encode", 1, 1, lambda: codec.compress(image)
    for k in steps:
        yield f"decode, K = {k}", 1, 1, functools.partial(codec.decompress, stream, k)
    if train:
        cache, end = Cache.open(folder / "cache"), (folder / "out", codec.compressor)
        one, two = (kind(steps=n, batch=batch) for kind, n in zip((Stage1Config, Stage2Config), TRAINED, strict=True))
        data, more = (cache.latents, cache.masks), (cache.labels, cache.captions, ldm, [machine])
        limits: dict[str, Any] = {"device": ldm.device, "resume": False, "progress": False}
        yield "stage 1", batch, batch * one.steps, lambda: train_stage1(one, *data, *end, **limits)
        yield "stage 2", batch, batch * two.steps, lambda: train_stage2(two, *data, *more, *end, **limits)


def _clock(where: torch.device, run: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median seconds, NaN where memory did not suffice; and most GB held."""
    gpu = where.type == "cuda"
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(where)
    try:
        seconds = float(np.median([clocked(run)[1] for _ in range(1 + repeats)][1:])) / 1000
    except torch.OutOfMemoryError:
        seconds = math.nan
    return seconds, torch.cuda.max_memory_allocated(where) / 1e9 if gpu else peak_memory()


def peak_memory() -> float:
    """GB that this process has taken at the most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e9 / 1024)


def write_apart(folder: Path) -> None:
    """Write a stand-in of the full size in a process of its own, so that its memory does not count."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free, start = shutil.disk_usage(place).free / 1e9, time.perf_counter()
    if free < ON_DISK:
        raise OSError(f"{free:.1f} GB are free in {place}, {ON_DISK:g} GB are written: set TMPDIR, or name a folder")
    print(f"writing {ON_DISK:g} GB of random weights into {folder}", flush=True)
    command = [sys.executable, Path(__file__).with_name("stand_in.py"), str(folder)]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise OSError(f"the weights could not be written into {folder}")
    print(f"{'write them':<44} {time.perf_counter() - start:6.1f} s", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    one = commands.add_parser("check", help="compress, decompress, train a step, within a memory limit")
    one.add_argument("scale", nargs="?", help="a folder of models (default: a stand-in, removed afterwards)")
    one.add_argument("--memory", type=float, default=12.0, help="GB that it may take (default: %(default)s)")
    one.add_argument("--size", type=int, default=256, help="side of the picture (default: %(default)s)")
    two = commands.add_parser("measure", help="time and memory of each job")
    two.add_argument("scale", nargs="?", help="paper, or a folder of models (default: a stand-in, removed afterwards)")
    two.add_argument("--tiny", action="store_true", help="without a scale: small networks, to see that it runs")
    two.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="of pictures (default: 256 512)")
    two.add_argument(
        "--batch",
        type=int,
        default=4,
        choices=Within((1, 10**6)),
        metavar="N",
        help="pictures at a time (default: %(default)s)",
    )
    two.add_argument("--compile", action="store_true", help="torch.compile, too")
    two.add_argument("--device", help="cpu, cuda, ... (default: the best at hand)")
    two.add_argument("--out", type=Path, help="a CSV file")
    commands.add_parser("cpu", help="core seconds of the work that no GPU does")
    a = parser.parse_args(arguments)
    quiet_libraries()
    if a.command == "cpu":
        print(as_text(pd.Series(measure_cpu(), name="core seconds").to_frame()))
        return 0
    try:
        with tempfile.TemporaryDirectory() as temporary:
            if a.scale is None and a.command == "measure" and a.tiny:
                write(temporary, tiny=True)
            elif a.scale is None:
                write_apart(Path(temporary))
            scale = Scale.from_name(a.scale or temporary)
            if a.command == "check":
                check(scale, a.memory, a.size)
                return 0
            rows = []
            for row in measure(scale, a.sizes, a.batch, a.compile, device=a.device):
                rows.append(row)
                print(*row.values(), sep=", ", file=sys.stderr, flush=True)
    except (MemoryError, OSError, ValueError) as error:
        print(f"trial.py: {error}", file=sys.stderr)
        return 1
    where, table = describe_device(pick_device(a.device)), pd.DataFrame(rows)
    print(f"Measured on {where} with torch {torch.__version__}:\n\n{as_text(table)}")
    if a.out:
        write_file(a.out, table.to_csv(index=False, float_format="%.6g").encode())
    return 0


if __name__ == "__main__":
    sys.exit(in_one_line("trial.py", main))
