"""Measure a codec on test scenes: whole files, both machines, RoI and background apart.

    python -m slimlib.evaluation --scenes 620 --out runs/evaluation.csv

Rates are file lengths. Every accuracy comes with a 95% interval (bootstrap over pictures).
"""

from __future__ import annotations

import argparse
import csv
import io
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from .codec import SlimCodec
from .machines import Machine, load_machine, to_tensor
from .repro import atomic_write, quiet_libraries
from .scales import Scale
from .scenes import PocketScenes, Scene

QUALITIES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Row:
    """One method at one setting, over all scenes.

    Attributes:
        method, quality: what was measured.
        scenes: number of pictures.
        bpp: mean file length in bits per pixel; caption_bytes, hyper_bytes, latent_bytes its parts.
        roi_bits: share of the latent's bits spent inside the RoI (by area of each cell).
        top1_a, top1_b: accuracy of both machines in percent; top1_b_low, top1_b_high the 95% interval of B's.
        top1_b_before: accuracy of B on the decoded picture without the UNet's enhancement.
        roi_psnr, background_psnr: dB over the pixels inside and outside the RoI, from the mean squared error.
        compress_ms, decompress_ms: median wall-clock time for one picture.
    """

    method: str
    quality: float
    scenes: int
    bpp: float
    caption_bytes: float
    hyper_bytes: float
    latent_bytes: float
    roi_bits: float
    top1_a: float
    top1_b: float
    top1_b_low: float
    top1_b_high: float
    top1_b_before: float
    roi_psnr: float
    background_psnr: float
    compress_ms: float
    decompress_ms: float


def evaluate(
    codec: SlimCodec,
    scenes: Sequence[Scene],
    machine_a: Machine,
    machine_b: Machine,
    qualities: Iterable[float] = QUALITIES,
    method: str = "SLIM, stage 1",
    caption: str | None = "auto",
    progress: bool = True,
) -> list[Row]:
    """Compress and decompress every scene at every quality and look at the result with both machines."""
    rows = []
    for quality in qualities:
        bits: dict[str, list[float]] = {"all": [], "caption": [], "hyper": [], "latent": [], "roi": []}
        hits: dict[str, list[bool]] = {"a": [], "b": [], "before": []}
        errors = np.zeros(2)  # squared error inside, outside
        areas = np.zeros(2)
        seconds: list[tuple[float, float]] = []
        for scene in tqdm(scenes, desc=f"{method}, quality {quality:g}", disable=not progress):
            start = time.perf_counter()
            stream = codec.compress(scene.image, quality, caption=caption)
            middle = time.perf_counter()
            decoded = codec.decompress(stream)
            seconds.append((middle - start, time.perf_counter() - middle))
            before = codec.decompress(stream, steps=0)
            report = codec.inspect(stream)
            bits["all"].append(report.bpp)
            for part in ("caption", "hyper", "latent"):
                bits[part].append(report.bits[part] / 8)
            bits["roi"].append(float((report.bit_map * scene.mask(*report.bit_map.shape)).sum()))
            hits["a"].append(_hit(machine_a, decoded, scene))
            hits["b"].append(_hit(machine_b, decoded, scene))
            hits["before"].append(_hit(machine_b, before, scene))
            squared = ((np.asarray(decoded, float) - np.asarray(scene.image, float)) / 255) ** 2
            weights = np.stack([scene.matte, 1 - scene.matte])
            errors += (weights * squared.mean(2)).sum((1, 2))
            areas += weights.sum((1, 2))
        low, high = interval(hits["b"])
        psnr = -10 * np.log10(errors / areas)
        times = 1000 * np.median(seconds, axis=0)
        rows.append(
            Row(
                method=method,
                quality=quality,
                scenes=len(scenes),
                bpp=float(np.mean(bits["all"])),
                caption_bytes=float(np.mean(bits["caption"])),
                hyper_bytes=float(np.mean(bits["hyper"])),
                latent_bytes=float(np.mean(bits["latent"])),
                roi_bits=float(np.sum(bits["roi"]) / (8 * max(np.sum(bits["latent"]), 1e-9))),
                top1_a=100 * float(np.mean(hits["a"])),
                top1_b=100 * float(np.mean(hits["b"])),
                top1_b_low=low,
                top1_b_high=high,
                top1_b_before=100 * float(np.mean(hits["before"])),
                roi_psnr=float(psnr[0]),
                background_psnr=float(psnr[1]),
                compress_ms=float(times[0]),
                decompress_ms=float(times[1]),
            )
        )
    return rows


def interval(hits: Sequence[bool], draws: int = 2_000, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of an accuracy, in percent: resample pictures with replacement (Efron, 1979)."""
    values = np.asarray(hits, float)
    picks = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[picks].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return 100 * float(low), 100 * float(high)


def save_rows(rows: Sequence[Row], path: str | Path) -> None:
    """Write a tidy CSV table, one row a method and quality, atomically."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(asdict(rows[0])), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(row).items()})
    atomic_write(path, file.getvalue().encode())


def as_text(rows: Sequence[Row]) -> str:
    """The table for reading, with the columns that matter most."""
    lines = ["quality     bpp   A [%]   B [%]  interval         before UNet  RoI dB  bg dB  RoI bits  enc ms  dec ms"]
    for r in rows:
        span = f"[{r.top1_b_low:5.1f}, {r.top1_b_high:5.1f}]"
        lines.append(
            f"{r.quality:7.2f} {r.bpp:7.4f} {r.top1_a:7.1f} {r.top1_b:7.1f}  {span}"
            f" {r.top1_b_before:12.1f} {r.roi_psnr:7.2f} {r.background_psnr:6.2f} {r.roi_bits:9.1%}"
            f" {r.compress_ms:7.0f} {r.decompress_ms:7.0f}"
        )
    return "\n".join(lines)


def _hit(machine: Machine, image: Image.Image, scene: Scene) -> bool:
    with torch.no_grad():
        return int(machine(to_tensor(image)).argmax(-1)) == scene.label


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m slimlib.evaluation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", default="pocket", help="a scale's name or folder (default: %(default)s)")
    parser.add_argument("--compressor", help="another compressor's folder")
    parser.add_argument("--method", default="SLIM, stage 1", help="name in the table (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=620, help="number of test scenes (default: %(default)s)")
    parser.add_argument("--qualities", type=float, nargs="+", default=QUALITIES)
    parser.add_argument("--no-caption", action="store_true", help="compress without captions")
    parser.add_argument("--out", type=Path, help="write the table here as CSV")
    a = parser.parse_args(arguments)
    quiet_libraries()
    scale = Scale.from_name(a.scale)
    if a.compressor:
        scale = scale.with_(compressor=a.compressor)
    codec = SlimCodec.from_pretrained(scale)
    machines = load_machine(scale.machine_a), load_machine(scale.machine_b)
    test = PocketScenes("test", scale.size)
    scenes = [test[i] for i in range(a.scenes)]
    caption = None if a.no_caption else "auto"
    rows = evaluate(codec, scenes, *machines, a.qualities, a.method, caption)
    print(as_text(rows))
    if a.out:
        save_rows(rows, a.out)


if __name__ == "__main__":
    main()
