"""The golden record: what the package produces, as hashes and figures in tests/golden.json.

It is written once, before the package is redesigned, and compared after every step of the redesign: whatever moves or
is renamed, streams, pixels, trained weights and the evaluation's table have to stay equal to the last bit.

    python tests/golden.py --write                     run everything and write tests/golden.json
    python tests/golden.py                             run everything and compare; exit status 1 on a difference
    python tests/golden.py --quick                     fewer scenes and qualities, no training in two processes
    python tests/golden.py --only codec training       some of the sections (with --write: the others stay as they are)

Hashes of floating-point work hold for one kind of processor and one set of libraries. Both stand in the record, and a
warning says where they differ: then write the record anew from the commit that it names, and compare with that one.
What this file knows of slimlib stands in its imports and in the section "the adapter", but for the codecs' public verbs
and the names of a training's settings. Where a name moves, only these have to follow.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # these have to be set before torch is imported
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from safetensors.numpy import load_file

from slimlib.codec import SlimCodec
from slimlib.compressor import CompressorConfig, LatentCompressor
from slimlib.data.scenes import PocketScenes, Scene
from slimlib.ldm import LatentDiffusion
from slimlib.machines import Machine, load_machine
from slimlib.measure import methods
from slimlib.measure.baselines import PixelCodec, encode_classic, payload_bytes
from slimlib.measure.evaluation import evaluate, summarise
from slimlib.scales import Scale
from slimlib.training import Stage1Config, Stage2Config, train_stage1, train_stage2

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "assets/pocket"))
import train as pocket  # noqa: E402 (a script beside the models)

RECORD, POCKET = HERE / "golden.json", HERE.parent / "assets" / "pocket"
SCENES, QUALITIES = 64, (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
FEW, FEW_QUALITIES = 8, (0.2, 0.8)  # what --quick takes

# ---- the adapter: all that is known of slimlib -----------------------------------------------------------------------


def scenes(split: str, size: int, count: int) -> list[Scene]:
    return list(PocketScenes(split, size, n=count))


def open_codec(weights: str | None = None, exact: bool = True) -> SlimCodec:
    """The pocket codec as it is shipped, or with the compressor of another folder in assets/pocket."""
    scale = Scale.from_name("pocket")
    scale = replace(scale, compressor=str(POCKET / weights)) if weights else scale
    return SlimCodec.from_pretrained(scale, device="cpu", exact=exact)


def machine(name: str) -> Machine:
    return load_machine(str(POCKET / name), "cpu")


def train(stage: int, settings: dict, out: Path, one_step: bool = False) -> None:
    """Train a tiny compressor from random weights, or go on where the last call for this folder stopped."""
    config = CompressorConfig(stem=16, width=32, depth=1, heads=2, y_channels=12, h_channels=4, net_width=16)
    options: dict[str, Any] = {"progress": False, "device": "cpu", "max_seconds": 0.0 if one_step else None}
    z, masks, images, labels = tiny_world()
    if stage == 1:
        one = Stage1Config(**{"steps": 20, "batch": 4, "warmup": 2, **settings})
        train_stage1(one, z, masks, out, config, **options)
    else:
        captions = [f"a {'red fox' if i % 2 else 'banana'}" for i in labels]
        ldm, rank = LatentDiffusion.from_pretrained(POCKET / "ldm", "fp16", "cpu"), settings.pop("lora", 0)
        if rank:
            pocket.add_lora(ldm, pocket.LoraConfig(lora=rank))
        two = Stage2Config(**{"steps": 3, "batch": 2, "warmup": 1, "lambda_max": 1.0, **settings})
        torch.manual_seed(7)
        data = z, masks, labels, captions, ldm, machine("machine_a")
        train_stage2(two, *data, out, LatentCompressor(config), images, **options)
        if rank:
            ldm.unet.save_lora_adapter(out / "unet_lora", adapter_name="slim")


def evaluation_rows(count: int) -> list[dict]:
    """The evaluation's table of some methods over the first test scenes, without its times."""
    slim, first = open_codec(exact=False), open_codec("compressor", exact=False)
    variants = ("", "no caption", "no diffusion", "oracle crop", "caption only")
    jobs = [methods.ceiling(slim), methods.slim("SLIM", slim, FEW_QUALITIES, variants, timed=0)]
    jobs.append(methods.slim("SLIM, stage 1", first, FEW_QUALITIES, timed=0))
    for name, weights in (("hyperprior", "baseline_mse"), ("hyperprior, machine loss", "baseline_task")):
        jobs.append(methods.pixels(name, PixelCodec.from_pretrained(POCKET / weights, "cpu"), FEW_QUALITIES))
    jobs.append(methods.classic("webp", (20, 60)))
    machines = {"a": machine("machine_a"), "b": machine("machine_b")}
    results = evaluate(PocketScenes("test"), [(method, count) for method in jobs], machines, progress=False)
    table = summarise(results)  # intervals are the tests' business (test_metrics.py)
    rows = table.drop(columns=["encode_ms", "decode_ms", *table.filter(regex="_(low|high)$")]).to_dict("records")
    # In the record a classic codec's quality is a whole number.
    return [row | {"quality": int(row["quality"]) if row["quality"] > 1 else row["quality"]} for row in rows]


# ---- the sections ----------------------------------------------------------------------------------------------------


def record_scenes(quick: bool) -> dict:
    record = {}
    for split, size in [(split, size) for split in ("train", "val", "test") for size in (128, 64)]:
        say(f"scenes: {split}, {size} px")
        some, name = scenes(split, size, 16), f"{split}, {size} px"
        record[f"{name}, images"] = sha(scene.image.tobytes() for scene in some)
        record[f"{name}, mattes"] = sha(scene.matte.astype("<f4").tobytes() for scene in some)
        record[f"{name}, words"] = sha(f"{s.label} {s.noun} {s.place} {s.seen}\n".encode() for s in some)
    return record


def record_codec(quick: bool) -> dict:
    record: dict[str, Any] = {}

    def put(name: str, items: list[bytes], quality: float) -> None:
        counts = {FEW, len(items)} if quality in FEW_QUALITIES else {len(items)}
        record.update({f"{name}, {count} scenes": sha(items[:count]) for count in sorted(counts)})

    images = [scene.image for scene in scenes("test", 128, FEW if quick else SCENES)]
    shipped = open_codec()
    say("codec: captions")
    auto = [shipped.compress(image, FEW_QUALITIES[0]) for image in images]
    captions = [shipped.inspect(stream).caption for stream in auto]
    record |= {f"captions, {count} scenes": captions[:count] for count in (FEW, len(images))}
    typed = [shipped.compress(image, FEW_QUALITIES[0], text) for image, text in zip(images, captions, strict=True)]
    assert typed == auto, "a caption given as text makes another stream than the same one found by the codec"
    for weights in ("compressor", "compressor_uniform", "compressor_stage2"):
        codec = open_codec(weights)
        for quality in FEW_QUALITIES if quick else QUALITIES:
            say(f"codec: {weights}, quality {quality:g}")
            for kind, given in (("auto", captions), ("none", [None] * len(images))):
                name = f"{weights}, quality {quality:g}, caption {kind}"
                streams = [codec.compress(image, quality, text) for image, text in zip(images, given, strict=True)]
                put(f"{name}, streams", streams, quality)
                latents = [codec.read(stream).z_hat.numpy().astype("<f4").tobytes() for stream in streams]
                put(f"{name}, latents", latents, quality)
                if weights == "compressor_stage2" and kind == "auto":  # these weights are shipped
                    pixels = [shipped.decompress(stream).tobytes() for stream in streams[:FEW]]
                    record[f"as shipped, quality {quality:g}, caption {kind}, pixels"] = sha(pixels)
    odd = shipped.compress(images[0].resize((70, 33)), 0.5, "A red fox, typed", steps=2, seed=5, t0=80)
    record["70 x 33 px, typed caption, own steps, seed, t0: stream"] = sha([odd])
    record["70 x 33 px, typed caption, own steps, seed, t0: pixels"] = sha([shipped.decompress(odd).tobytes()])
    return record


def record_baselines(quick: bool) -> dict:
    record: dict[str, Any] = {}
    images = [scene.image for scene in scenes("test", 128, 4)]
    say("baselines")
    for weights in ("baseline_mse", "baseline_task"):
        codec = PixelCodec.from_pretrained(POCKET / weights, "cpu")
        for quality in FEW_QUALITIES:
            files = [codec.compress(image, quality) for image in images]
            record[f"{weights}, quality {quality:g}, files"] = sha(files)
            record[f"{weights}, quality {quality:g}, pixels"] = sha(codec.decompress(data).tobytes() for data in files)
    for name in ("jpeg", "webp", "avif", "jpegxl", "jpeg2000"):
        for quality in (20, 60):
            files = [encode_classic(image, name, quality) for image in images]
            found = [sha(files), *(payload_bytes(file, name) for file in files)]
            record[f"{name}, quality {quality}, files and payloads"] = found
    return record


def record_training(quick: bool) -> dict:
    extras: list[dict] = [{}, {"accumulate": 2}, {"ema": 0.9}, {"lora": 2}, {"checkpointing": True}]
    runs = [(1, more) for more in extras[:3]] + [(2, {"task": "ce", **more}) for more in extras]
    runs.append((2, {"task": "features"}))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for stage, settings in runs:
            name = ", ".join([f"stage {stage}", *(f"{key} {value}" for key, value in settings.items())])
            say(f"training: {name}")
            train(stage, dict(settings), folder / name)
            for half in (True,) * (10 if stage == 1 else 1) + (False,):  # stopped after each of the first steps
                torch.manual_seed(123)  # what happens in between must not matter
                train(stage, dict(settings), folder / f"{name}, stopped", one_step=half)
        if not quick:
            say("training: two processes")
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
            subprocess.run([*launch, "--worker", temporary], check=True, timeout=900)
        record = {}
        for path in sorted(folder.rglob("*.safetensors")):  # a safetensors file is a state dictionary
            if path.name != "checkpoint.safetensors":
                weights = sorted(load_file(path).items())
                digest = sha(key.encode() + value.astype("<f4").tobytes() for key, value in weights)
                record[str(path.relative_to(folder).with_suffix(""))] = digest
        return record


def record_evaluation(quick: bool) -> dict:
    """Figures of six digits as text (so that nan equals nan) rather than a hash, so that a difference can be read."""
    say("evaluation")
    record = {}
    for row in evaluation_rows(20):
        name = " | ".join(str(row.pop(column)) for column in ("method", "variant", "quality"))
        record[name] = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in sorted(row.items())}
    return record


RECORDERS = (record_scenes, record_codec, record_baselines, record_training, record_evaluation)
SECTIONS = {function.__name__.removeprefix("record_"): function for function in RECORDERS}

# ---- helpers, writing and comparing ----------------------------------------------------------------------------------


def tiny_world() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Eight items of random numbers: latents (textured inside the mask), masks, pictures of 64 px, labels."""
    rng = np.random.default_rng(0)
    m = np.kron(rng.random((8, 4, 4)) < 0.3, np.ones((4, 4)))
    z = np.kron(rng.normal(size=(8, 4, 4, 4)), np.ones((4, 4))) + m[:, None] * rng.normal(size=(8, 4, 16, 16))
    images = rng.integers(0, 256, (8, 3, 64, 64), dtype=np.uint8)
    return z.astype(np.float16), (255 * m).astype(np.uint8), images, np.arange(8)


def sha(items: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(items)).hexdigest()


def say(what: str) -> None:
    print(time.strftime("%H:%M:%S"), what, file=sys.stderr, flush=True)


def about() -> dict:
    """What the results depend on: the commit, the processor, the libraries."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout.strip()
    info = Path("/proc/cpuinfo")
    names = (re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []) or [platform.machine()]
    kernels = f"{torch.backends.cpu.get_cpu_capability()}, bf16 {torch.cpu._is_avx512_bf16_supported()}"
    packages = ("torch", "numpy", "pillow", "pillow-jxl-plugin", "diffusers", "transformers", "timm", "accelerate")
    versions = {package: importlib.metadata.version(package) for package in packages}
    return {"commit": head, "processor": names[0], "kernels": kernels, **versions}


def differences(known: dict, found: dict, whole: bool) -> list[str]:
    """A line for each key that differs, with the values; None stands for what is not there."""
    lines = []
    for key in {**known, **found} if whole else found:
        old, new = known.get(key), found.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += [f"{key}: {c} {old.get(c)} -> {new.get(c)}" for c in {**old, **new} if old.get(c) != new.get(c)]
        elif old != new:
            lines.append(f"{key}: {old} -> {new}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the record, do not compare")
    parser.add_argument("--quick", action="store_true", help="compare a part of it")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="these sections")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.write and a.quick:
        parser.error("a record is written whole: --quick is for comparing")
    torch.set_num_threads(1)
    if a.worker:  # one of two processes
        train(1, {}, a.worker / "stage 1, two processes")
        for task in ("ce", "features"):
            train(2, {"task": task}, a.worker / f"stage 2, task {task}, two processes")
        return 0
    record, here, status = json.loads(RECORD.read_text()) if RECORD.exists() else {}, about(), 0
    for key, value in here.items():
        if key != "commit" and value != record.get("about", {}).get(key, value):
            say(f"warning: the record was made with {key} {record['about'][key]}, this is {value}")
    for name in a.only:
        found = SECTIONS[name](a.quick)
        lines = [] if a.write else differences(record.get(name, {}), found, not a.quick)
        if a.write:
            record |= {"about": here, name: found}
            RECORD.write_text(json.dumps(record, indent=0, ensure_ascii=False) + "\n")
        verdict = "written" if a.write else f"{len(lines)} differences" if lines else "equal"
        print("\n    ".join([f"{name}: {verdict} ({len(found)} entries)", *lines]), flush=True)
        status |= bool(lines)
    return status


if __name__ == "__main__":
    sys.exit(main())
