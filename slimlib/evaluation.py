"""Measure codecs on test scenes: whole files, two machines, region of interest and background apart.

    python -m slimlib.evaluation --reproduce             everything that assets/results holds (hours on one core)
    python -m slimlib.evaluation --scenes 60 --only SLIM --out runs/look      a quick look at one method

Rates are file lengths. Every accuracy comes with a 95% interval (bootstrap over scenes). Each method's results are kept
scene by scene under --work as they come, so that a killed run goes on where it was, and several processes with
different --only can share the work. Retrained weights get a folder of their own: old results are never mixed in.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import hashlib
import importlib.metadata
import io
import json
import math
import platform
import re
import resource
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .baselines import CODECS, PixelCodec, decode_classic, downscale, encode_classic, payload_bytes
from .codec import CAPTION_PRIOR, SlimCodec
from .compressor import LatentCompressor, quality_byte
from .deltas import Delta, NoOverlap, bd_accuracy, bd_rate
from .entropy import RangeEncoder
from .machines import Machine, load_machine, to_images, to_tensor
from .repro import atomic_write, autocast, quiet_libraries
from .roi import gradcam, roi_crop
from .scales import ASSETS, Scale
from .scenes import PocketScenes, Scene
from .stream import StreamHeader, pack
from .training import LORA_FILE

RESULTS = ASSETS / "results"
"""Where the shipped tables lie."""
QUALITIES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
BATCH = 50
"""Scenes that go through the networks together, and after which the results are stored."""
TIMED = 8
"""Scenes that also go through the codec one at a time: for the clock, and to hold the fast way to the real one."""


# ------------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Setting:
    """One line of the table: a method, a variant of it ("" for the method as it is), a quality as the method has it."""

    method: str
    variant: str = ""
    quality: float = 0.0

    def __str__(self) -> str:
        return " ".join(filter(None, (self.method, self.variant and f"({self.variant})", f"at {self.quality:g}")))


@dataclass(frozen=True)
class SceneResult:
    """What one scene gave at one setting.

    Attributes:
        scene, label, seen: index in the test split, class, and whether training has seen this cut-out.
        size, payload: bytes of the file, and of the file without its headers.
        caption, hyper, latent: bytes of the parts, estimated by what their symbols cost.
        roi_bits: share of the latent's bits that lie inside the region of interest (by area of each cell).
        top1_a, top1_b: whether the machines see the right class in the decoded picture.
        roi_error, background_error: mean squared error, pixels in [0, 1], weighted with the matte and its rest.
        encode_ms, decode_ms: wall-clock time of one picture alone; NaN where it was not taken.
    """

    scene: int
    label: int
    seen: bool
    size: float
    payload: float
    caption: float
    hyper: float
    latent: float
    roi_bits: float
    top1_a: bool
    top1_b: bool
    roi_error: float
    background_error: float
    encode_ms: float
    decode_ms: float


@dataclass(frozen=True)
class Row:
    """One setting, over all its scenes.

    Attributes:
        method, variant, quality: what was measured.
        scenes: number of pictures.
        bpp, payload_bpp: mean length of the file in bits per pixel; the same without headers.
        header_bytes, caption_bytes, hyper_bytes, latent_bytes: the parts of a learned codec's file, on average.
        roi_bits: share of the latent's bits spent inside the region of interest.
        top1_a, top1_b: accuracy of the machines in percent, each with its 95% interval (_low, _high).
        top1_b_seen, top1_b_unseen: machine B on cut-outs that were, and were not, in the training scenes.
        roi_psnr, background_psnr: dB over the pixels inside and outside the region of interest.
        encode_ms, decode_ms: median time for one picture alone.
    """

    method: str
    variant: str
    quality: float
    scenes: int
    bpp: float
    payload_bpp: float
    header_bytes: float
    caption_bytes: float
    hyper_bytes: float
    latent_bytes: float
    roi_bits: float
    top1_a: float
    top1_a_low: float
    top1_a_high: float
    top1_b: float
    top1_b_low: float
    top1_b_high: float
    top1_b_seen: float
    top1_b_seen_low: float
    top1_b_seen_high: float
    top1_b_unseen: float
    top1_b_unseen_low: float
    top1_b_unseen_high: float
    roi_psnr: float
    background_psnr: float
    encode_ms: float
    decode_ms: float


def summarise(setting: Setting, results: Sequence[SceneResult], pixels: int = 128**2) -> Row:
    """Means, intervals and medians over the scenes of one setting."""
    column = {f.name: np.array([getattr(r, f.name) for r in results], float) for f in fields(SceneResult)}
    seen = column["seen"] > 0
    values: dict[str, Any] = {**asdict(setting), "scenes": len(results)}
    values["bpp"] = 8 * _mean(column["size"]) / pixels
    values["payload_bpp"] = 8 * _mean(column["payload"]) / pixels
    values["header_bytes"] = _mean(column["size"] - column["payload"])
    for part in ("caption", "hyper", "latent"):
        values[f"{part}_bytes"] = _mean(column[part])
    bits = np.nan_to_num(column["latent"])
    values["roi_bits"] = (
        float((np.nan_to_num(column["roi_bits"]) * bits).sum() / bits.sum()) if bits.sum() else math.nan
    )
    groups = {
        "top1_a": column["top1_a"],
        "top1_b": column["top1_b"],
        "top1_b_seen": column["top1_b"][seen],
        "top1_b_unseen": column["top1_b"][~seen],
    }
    for name, hits in groups.items():
        values[name] = 100 * _mean(hits)
        values[f"{name}_low"], values[f"{name}_high"] = interval(hits)
    for part in ("roi", "background"):
        values[f"{part}_psnr"] = -10 * math.log10(max(_mean(column[f"{part}_error"]), 1e-10))
    for name in ("encode_ms", "decode_ms"):
        taken = column[name][~np.isnan(column[name])]
        values[name] = float(np.median(taken)) if len(taken) else math.nan
    return Row(**values)


AS_IT_IS = "as it is"
"""Variant in the table: the method itself, on the scenes of its ablations, which are fewer."""


def table(results: Mapping[Setting, Sequence[SceneResult]], pixels: int = 128**2) -> list[Row]:
    """One row a setting; and for a method with ablations the rows that these are to be compared with (AS_IT_IS)."""
    rows = [summarise(setting, of, pixels) for setting, of in results.items()]
    for name in dict.fromkeys(setting.method for setting in results):
        counts = [len(of) for s, of in results.items() if s.method == name and s.variant and s.variant in VARIANTS]
        for setting, of in results.items():
            if counts and setting.method == name and not setting.variant:
                rows.append(summarise(replace(setting, variant=AS_IT_IS), of[: min(counts)], pixels))
    return rows


def interval(hits: Sequence[bool] | np.ndarray, draws: int = 2_000, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of an accuracy, in percent: resample scenes with replacement (Efron, 1979)."""
    values = np.asarray(hits, float)
    if not len(values):
        return math.nan, math.nan
    # How many of n hits a resample holds is binomial: the bootstrap of a proportion needs no resampling.
    counts = np.random.default_rng(0).binomial(len(values), values.mean(), draws)
    low, high = np.quantile(counts / len(values), [(1 - level) / 2, (1 + level) / 2])
    return 100 * float(low), 100 * float(high)


def save_rows(rows: Sequence[Any], path: str | Path) -> None:
    """Write dataclasses of one kind as a CSV table, atomically; NaN becomes an empty cell."""
    file = io.StringIO()
    writer = csv.DictWriter(file, [f.name for f in fields(rows[0])], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(value) for name, value in asdict(row).items()})
    atomic_write(path, file.getvalue().encode())


def load_rows(path: str | Path, kind: type = Row) -> list[Any]:
    """Read what `save_rows` wrote.

    Raises:
        ValueError: the table has other columns than `kind` has attributes.
    """
    with Path(path).open(newline="") as file:
        lines = list(csv.DictReader(file))
    types = {f.name: f.type for f in fields(kind)}
    if lines and list(lines[0]) != list(types):
        raise ValueError(f"{path} is no table of {kind.__name__}: its columns are {', '.join(lines[0])}")
    return [kind(**{name: _value(text, str(types[name])) for name, text in line.items()}) for line in lines]


def as_text(rows: Sequence[Row]) -> str:
    """The table for reading, with the columns that matter most."""
    lines = ["method                     variant        quality     bpp  A [%]  B [%]  interval        RoI dB  bg dB"]
    for r in rows:
        span = f"[{r.top1_b_low:5.1f}, {r.top1_b_high:5.1f}]"
        lines.append(
            f"{r.method:<26} {r.variant:<14} {r.quality:7.4g} {r.bpp:7.4f} {r.top1_a:6.1f} {r.top1_b:6.1f}"
            f"  {span} {r.roi_psnr:7.2f} {r.background_psnr:6.2f}"
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------- scenes, methods


class Batch:
    """Some test scenes, and what all methods share about them, each computed when it is first asked for."""

    def __init__(self, indices: Sequence[int], size: int = 128) -> None:
        test = PocketScenes("test", size)
        self.indices = list(indices)
        self.scenes: list[Scene] = [test[i] for i in self.indices]
        self.images = [scene.image for scene in self.scenes]
        self.x = to_tensor(self.images)
        self.labels = torch.tensor([scene.label for scene in self.scenes])
        self.mattes = torch.from_numpy(np.stack([scene.matte for scene in self.scenes]))[:, None]
        self._latents: dict[int, Tensor] = {}
        self._captions: dict[tuple[int, str], list[str]] = {}

    def latents(self, codec: SlimCodec) -> Tensor:
        """z (B, C, h, w) of this codec's VAE; the same object may serve several codecs."""
        key = id(codec.ldm.vae)
        if key not in self._latents:
            self._latents[key] = codec.ldm.encode(self.x).float()
        return self._latents[key]

    def captions(self, codec: SlimCodec, kind: str) -> list[str]:
        """Captions of a kind: "auto" (Grad-CAM crop), "oracle" (crop of the exact matte), "wrong", "none"."""
        if kind == "none":
            return [""] * len(self.images)
        if kind == "wrong":  # the next scene's: neighbours are of different classes
            right = self.captions(codec, "auto")
            return right[1:] + right[:1]
        key = (id(codec.captioner), kind)
        if key not in self._captions:
            maps = self.mattes if kind == "oracle" else gradcam(codec.machine, self.x.to(codec.ldm.device)).cpu()
            crops = [roi_crop(image, one) for image, one in zip(self.images, maps, strict=True)]
            self._captions[key] = codec.captioner.caption(crops)
        return self._captions[key]


@dataclass(frozen=True)
class Cost:
    """What one scene took: bytes of the file and of its parts, and times where they were taken."""

    size: float
    payload: float
    caption: float = math.nan
    hyper: float = math.nan
    latent: float = math.nan
    roi_bits: float = math.nan
    encode_ms: float = math.nan
    decode_ms: float = math.nan


class Method(Protocol):
    """A codec in the evaluation; `key` stands for the weights that its results depend on."""

    name: str
    key: str

    def settings(self) -> list[Setting]: ...

    def run(self, batch: Batch, wanted: Sequence[Setting]) -> Iterator[tuple[Setting, Tensor, list[Cost]]]:
        """Decoded pictures (B, 3, H, W) in [0, 1] and costs of a batch, for each wanted setting."""
        ...


@dataclass(frozen=True)
class Variant:
    """What an ablation changes: the caption ("auto", "none", "wrong", "oracle"), the steps K, the noise level t0."""

    caption: str = "auto"
    steps: int | None = None
    t0: int | None = None
    latent: bool = True


VARIANTS = {
    "": Variant(),
    "no caption": Variant(caption="none"),
    "wrong caption": Variant(caption="wrong"),
    "oracle crop": Variant(caption="oracle"),
    "no diffusion": Variant(steps=0),
    "K = 1": Variant(steps=1),
    "K = 2": Variant(steps=2),
    "K = 20": Variant(steps=20),
    "t0 = 20": Variant(t0=20),
    "t0 = 50": Variant(t0=50),
    "t0 = 100": Variant(t0=100),
    "t0 = 200": Variant(t0=200),
    "caption only": Variant(latent=False, steps=20),
}
"""The ablations of SLIM. K and t0 are taken as if the compressor's config said so: the files stay the same."""


class Slim:
    """SLIM in the evaluation: the codec's own bytes, and its decoder on batches, in bfloat16 where that is fast.

    Bytes depend on neither. Pixels do, a little: in bfloat16 by a quarter of a level on average, at half the time.
    """

    def __init__(
        self,
        name: str,
        codec: SlimCodec,
        qualities: Sequence[float] = QUALITIES,
        variants: Iterable[str] = ("",),
        key: str = "",
        timed: int = TIMED,
    ) -> None:
        """Args: the name in the table; the codec; `variants` of VARIANTS; see Method.key; see TIMED."""
        self.name, self.codec, self.qualities, self.key, self.timed = name, codec, tuple(qualities), key, timed
        self.variants = {variant: VARIANTS[variant] for variant in variants}

    def settings(self) -> list[Setting]:
        return [
            Setting(self.name, name, quality)
            for name, variant in self.variants.items()
            for quality in (self.qualities if variant.latent else (0.0,))
        ]

    def run(self, batch: Batch, wanted: Sequence[Setting]) -> Iterator[tuple[Setting, Tensor, list[Cost]]]:
        coded = functools.cache(functools.partial(self._code, batch))
        for setting in sorted(wanted, key=lambda s: s.quality):
            variant = self.variants[setting.variant]
            captions = batch.captions(self.codec, variant.caption)
            if variant.latent:
                z_hat, costs = coded(setting.quality, variant.caption)
            else:
                costs = [self._caption_alone(caption) for caption in captions]
            with autocast(self.codec.ldm.device, cpu=True):
                if variant.latent:
                    z_tilde = self._enhance(z_hat, captions, setting.quality, variant)
                else:
                    z_tilde = self._draw(captions, batch.x.shape[-1])
                x_hat = _as_pixels(self.codec.ldm.decode(z_tilde))
            if setting.variant == "":
                costs = self._timed(batch, setting.quality, costs)
            yield setting, x_hat, costs

    def _code(self, batch: Batch, quality: float, kind: str) -> tuple[Tensor, list[Cost]]:
        """Write real streams and read them again: what is decoded is what the bytes say."""
        codec, streams = self.codec, []
        for z, caption in zip(batch.latents(codec).split(1), batch.captions(codec, kind), strict=True):
            coder = RangeEncoder()
            if caption and codec.prior is not None:
                codec.prior.encode(coder, caption)
            codec.compressor.compress(z, quality, coder)
            size = batch.images[0].size
            header = StreamHeader(codec.fingerprint, quality_byte(quality), *size, caption=bool(caption))
            streams.append(pack(header, coder.get_bytes()))
        z_hat, costs = [], []
        for scene, decoded in zip(batch.scenes, codec.read(streams), strict=True):
            report = decoded.report
            inside = float((report.bit_map * scene.mask(*report.bit_map.shape)).sum())
            parts = {part: report.bits[part] / 8 for part in ("caption", "hyper", "latent")}
            share = inside / max(report.bits["latent"], 1e-9)
            costs.append(Cost(report.size, report.size - report.bits["header"] / 8, **parts, roi_bits=share))
            z_hat.append(decoded.z_hat)
        return torch.cat(z_hat), costs

    def _enhance(self, z_hat: Tensor, captions: list[str], quality: float, variant: Variant) -> Tensor:
        config = self.codec.compressor.config
        t0 = config.t0(quality_byte(quality) / 255) if variant.t0 is None else variant.t0
        steps = config.steps if variant.steps is None else variant.steps
        return self.codec.ldm.enhance(z_hat, captions, t0, steps, [0] * len(z_hat), config.guidance)

    def _draw(self, captions: list[str], size: int, guidance: float = 4.0) -> Tensor:
        """Latents from the caption alone: from pure noise, as the stock pipeline draws (another seed each)."""
        ldm = self.codec.ldm
        last = ldm.scheduler.config.num_train_timesteps - 1
        side = size // ldm.factor
        nothing = torch.zeros(len(captions), ldm.latent_channels, side, side)
        seeds = list(range(1, 1 + len(captions)))
        prompts = [f"a photo of {caption}" if caption else "" for caption in captions]
        return ldm.enhance(nothing, prompts, last, VARIANTS["caption only"].steps or 20, seeds, guidance)

    def _caption_alone(self, caption: str) -> Cost:
        coder = RangeEncoder()
        if caption and self.codec.prior is not None:
            self.codec.prior.encode(coder, caption)
        payload = coder.get_bytes()
        header = StreamHeader(self.codec.fingerprint, 0, caption=bool(caption))
        return Cost(len(pack(header, payload)), len(payload), coder.bits / 8, 0.0, 0.0)

    def _timed(self, batch: Batch, quality: float, costs: list[Cost]) -> list[Cost]:
        """The first scenes again, one at a time through the codec's front door, with a clock."""
        exact, self.codec.exact = self.codec.exact, True
        out = list(costs)
        for i, index in enumerate(batch.indices):
            if index >= self.timed:
                break
            start = time.perf_counter()
            stream = self.codec.compress(batch.images[i], quality)
            middle = time.perf_counter()
            self.codec.decompress(stream)
            times = {"encode_ms": 1000 * (middle - start), "decode_ms": 1000 * (time.perf_counter() - middle)}
            if abs(len(stream) - costs[i].size) > 4 + 0.03 * costs[i].size:
                raise AssertionError(
                    f"scene {index}: the codec writes {len(stream)} bytes, the evaluation counted {costs[i].size:g}"
                )
            out[i] = Cost(**{**asdict(costs[i]), **times})
        self.codec.exact = exact
        return out


class Pixels:
    """The learned baseline: a hyperprior on pixels."""

    def __init__(self, name: str, codec: PixelCodec, qualities: Sequence[float] = QUALITIES, key: str = "") -> None:
        self.name, self.codec, self.qualities, self.key = name, codec, tuple(qualities), key

    def settings(self) -> list[Setting]:
        return [Setting(self.name, "", quality) for quality in self.qualities]

    def run(self, batch: Batch, wanted: Sequence[Setting]) -> Iterator[tuple[Setting, Tensor, list[Cost]]]:
        for setting in wanted:
            costs, pictures = [], []
            for scene in batch.scenes:
                start = time.perf_counter()
                data, bits = self.codec.encode(scene.image, setting.quality)
                middle = time.perf_counter()
                pictures.append(self.codec.decompress(data))
                end = time.perf_counter()
                bit_map = bits["y"].sum(0).numpy()
                hyper, latent = float(bits["h"].sum()) / 8, float(bit_map.sum()) / 8
                inside = float((bit_map * scene.mask(*bit_map.shape)).sum()) / max(8 * latent, 1e-9)
                times = 1000 * (middle - start), 1000 * (end - middle)
                costs.append(Cost(len(data), len(data) - 7, 0.0, hyper, latent, inside, *times))
            yield setting, to_tensor(pictures), costs


CLASSIC_NAMES = {"jpeg": "JPEG", "webp": "WebP", "avif": "AVIF", "jpegxl": "JPEG XL", "jpeg2000": "JPEG 2000"}
CLASSIC_QUALITIES = (1, 20, 40, 60, 80)
CLASSIC_SCALES = {"": 1.0, "1/2": 0.5, "1/4": 0.25}


class Classic:
    """A classic codec, at full size and with downscaling first (bicubic both ways); variants "", "1/2", "1/4"."""

    def __init__(self, codec: str, qualities: Sequence[int] = CLASSIC_QUALITIES, key: str = "") -> None:
        self.codec, self.name, self.qualities, self.key = codec, CLASSIC_NAMES[codec], tuple(qualities), key

    def settings(self) -> list[Setting]:
        return [Setting(self.name, variant, quality) for variant in CLASSIC_SCALES for quality in self.qualities]

    def run(self, batch: Batch, wanted: Sequence[Setting]) -> Iterator[tuple[Setting, Tensor, list[Cost]]]:
        for setting in wanted:
            costs, pictures = [], []
            for image in batch.images:
                start = time.perf_counter()
                data = encode_classic(
                    downscale(image, CLASSIC_SCALES[setting.variant]), self.codec, int(setting.quality)
                )
                middle = time.perf_counter()
                pictures.append(decode_classic(data, image.size))
                times = 1000 * (middle - start), 1000 * (time.perf_counter() - middle)
                encode_ms, decode_ms = times
                payload = payload_bytes(data, self.codec)
                costs.append(Cost(len(data), payload, encode_ms=encode_ms, decode_ms=decode_ms))
            yield setting, to_tensor(pictures), costs


class Ceiling:
    """What no codec here can beat: the pictures themselves, and what the VAE alone makes of them."""

    def __init__(self, codec: SlimCodec, key: str = "") -> None:
        self.name, self.codec, self.key = "uncompressed", codec, key

    def settings(self) -> list[Setting]:
        return [Setting(self.name), Setting(self.name, "VAE")]

    def run(self, batch: Batch, wanted: Sequence[Setting]) -> Iterator[tuple[Setting, Tensor, list[Cost]]]:
        nothing = [Cost(math.nan, math.nan) for _ in batch.scenes]
        for setting in wanted:
            vae = setting.variant == "VAE"
            yield setting, _as_pixels(self.codec.ldm.decode(batch.latents(self.codec))) if vae else batch.x, nothing


# ------------------------------------------------------------------------------------------------------- the run


class Store:
    """Results by setting, one CSV file each, in a folder named after the method and its weights."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, method: Method, setting: Setting) -> Path:
        name = f"{_slug(setting.variant or 'as it is')}-{setting.quality:g}.csv"
        return self.folder / f"{_slug(method.name)}-{method.key or 'any'}" / name

    def read(self, method: Method, setting: Setting) -> dict[int, SceneResult]:
        """What is there, by scene."""
        path = self.path(method, setting)
        return {r.scene: r for r in load_rows(path, SceneResult)} if path.exists() else {}

    def write(self, method: Method, setting: Setting, results: Mapping[int, SceneResult]) -> None:
        save_rows([results[i] for i in sorted(results)], self.path(method, setting))


@torch.no_grad()
def evaluate(
    jobs: Sequence[tuple[Method, int]],
    machines: tuple[Machine, Machine],
    store: Store | None = None,
    progress: bool = True,
    make_batch: Callable[[list[int]], Batch] = Batch,
    batch_size: int | None = None,
) -> dict[Setting, list[SceneResult]]:
    """Run methods over the first scenes of the test split, or of another data set.

    Args:
        jobs: methods, each with its number of scenes.
        machines: A and B.
        store: keeps results as they come and knows those of earlier runs; None for neither.
        make_batch: makes a batch of scenes from their indices; of the test split at 128 px if not given.
        batch_size: scenes that go through the networks together, and are then stored; BATCH if not given.

    Returns:
        For each setting the results in the order of the scenes.
    """
    known = {(m.name, s): (store.read(m, s) if store else {}) for m, _ in jobs for s in m.settings()}
    most = max(count for _, count in jobs)
    bar = tqdm(total=sum(n * len(m.settings()) for m, n in jobs), unit="picture", disable=not progress, mininterval=5)
    together = batch_size or BATCH
    for first in range(0, most, together):
        batch: Batch | None = None
        for method, count in jobs:
            indices = list(range(first, min(first + together, count)))
            wanted = [s for s in method.settings() if any(i not in known[method.name, s] for i in indices)]
            bar.update(len(indices) * (len(method.settings()) - len(wanted)))
            if not indices or not wanted:
                continue
            bar.set_description(method.name)
            if batch is None or batch.indices != indices:
                batch = make_batch(indices)
            for setting, x_hat, costs in method.run(batch, wanted):
                for result in _look(batch, x_hat, costs, machines):
                    known[method.name, setting][result.scene] = result
                if store:
                    store.write(method, setting, known[method.name, setting])
                bar.update(len(indices))
    bar.close()
    return {s: [known[m.name, s][i] for i in range(n)] for m, n in jobs for s in m.settings()}


def _look(batch: Batch, x_hat: Tensor, costs: list[Cost], machines: tuple[Machine, Machine]) -> Iterator[SceneResult]:
    """What both machines see in decoded pictures, and how far these are from the originals."""
    right_a, right_b = (
        (machine(x_hat.to(machine.mean.device)).argmax(1).cpu() == batch.labels).tolist() for machine in machines
    )
    error = (x_hat.cpu() - batch.x).square().mean(1, keepdim=True).double()
    inside, outside = batch.mattes.double(), 1 - batch.mattes.double()
    roi = (error * inside).sum((1, 2, 3)) / inside.sum((1, 2, 3)).clamp_min(1)
    rest = (error * outside).sum((1, 2, 3)) / outside.sum((1, 2, 3)).clamp_min(1)
    for i, (index, scene, cost) in enumerate(zip(batch.indices, batch.scenes, costs, strict=True)):
        yield SceneResult(
            index,
            scene.label,
            scene.seen,
            top1_a=right_a[i],
            top1_b=right_b[i],
            roi_error=float(roi[i]),
            background_error=float(rest[i]),
            **asdict(cost),
        )


# ------------------------------------------------------------------------------------------------- comparisons


@dataclass(frozen=True)
class Comparison:
    """Two methods: what `test` saves against `anchor`, with 95% intervals from a paired bootstrap over scenes.

    Attributes:
        anchor, test: names; a classic codec may be "best classic, payload": the frontier over all of them.
        machine: "a" or "b".
        scenes: number of pictures that both have.
        bd_rate, bd_rate_low, bd_rate_high: percent; NaN where refused.
        from_accuracy, to_accuracy, overlap: range the rate was compared over, its share of the whole.
        bd_accuracy, bd_accuracy_low, bd_accuracy_high: points; NaN where refused.
        refused: why a delta is missing, or "".
    """

    anchor: str
    test: str
    machine: str
    scenes: int
    bd_rate: float
    bd_rate_low: float
    bd_rate_high: float
    from_accuracy: float
    to_accuracy: float
    overlap: float
    bd_accuracy: float
    bd_accuracy_low: float
    bd_accuracy_high: float
    refused: str


def compare(
    names: tuple[str, str],
    anchor: Sequence[Sequence[SceneResult]],
    test: Sequence[Sequence[SceneResult]],
    machine: str = "b",
    payload: tuple[bool, bool] = (False, False),
    draws: int = 200,
) -> Comparison:
    """Both deltas between two sets of settings, and how sure they are.

    Args:
        names: of anchor and test, for the table.
        anchor, test: for each setting the results in the order of the scenes; the scenes that both have count.
        machine: "a" or "b".
        payload: whether to count a side without its headers.
        draws: resamples; those in which the curves do not overlap enough are left out.
    """
    scenes = min(len(results) for results in (*anchor, *test))
    sides = []
    for results, bare in zip((anchor, test), payload, strict=True):
        rates = np.array([[r.payload if bare else r.size for r in of[:scenes]] for of in results], float)
        hits = np.array([[getattr(r, f"top1_{machine}") for r in of[:scenes]] for of in results], float)
        sides.append((rates, hits))
    rng, refused = np.random.default_rng(0), ""
    values: dict[str, Any] = {}
    picks = [np.arange(scenes), *(rng.integers(scenes, size=scenes) for _ in range(draws))]
    for name, function in (("bd_rate", bd_rate), ("bd_accuracy", bd_accuracy)):
        deltas: list[Delta] = []
        for pick in picks:
            try:
                one, other = ((r[:, pick].mean(1), 100 * h[:, pick].mean(1)) for r, h in sides)
                deltas.append(function(one, other))
            except NoOverlap as error:
                if pick is picks[0]:
                    refused = str(error)
                    break
        drawn = np.array([d.value for d in deltas[1:]] or [math.nan])
        low, high = np.quantile(drawn, [0.025, 0.975])
        values |= {name: deltas[0].value if deltas else math.nan, f"{name}_low": low, f"{name}_high": high}
        if name == "bd_rate":
            first = deltas[0] if deltas else Delta(math.nan, math.nan, math.nan, math.nan)
            values |= {"from_accuracy": first.low, "to_accuracy": first.high, "overlap": first.overlap}
    return Comparison(*names, machine, scenes, **values, refused=refused)


# --------------------------------------------------------------------------------------------------- time, memory


@dataclass(frozen=True)
class Timing:
    """Milliseconds for one picture on one thread, or another figure in its unit."""

    what: str
    value: float
    unit: str = "ms"


@torch.no_grad()
def measure_times(codec: SlimCodec, scenes: Sequence[Scene], quality: float = 0.5, repeats: int = 3) -> list[Timing]:
    """Encoding and decoding against the bare forward passes of the networks that they need, in one run.

    Everything is timed on every scene, `repeats` times over, in turns. Other programs can only lengthen a time, so the
    shortest of a scene's counts; what is reported is the mean over the scenes.
    """
    ldm, model, config = codec.ldm, codec.compressor, codec.compressor.config
    before, codec.exact = (codec.exact, torch.get_num_threads()), True
    torch.set_num_threads(1)
    seconds: dict[tuple[str, str], list[float]] = {}

    def clock(side: str, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        start = time.perf_counter()
        result = function(*arguments)
        if ldm.device.type == "cuda":
            torch.cuda.synchronize(ldm.device)
        seconds.setdefault((side, what), []).append(time.perf_counter() - start)
        return result

    def walk(z: Tensor, text: Tensor) -> None:
        for t in ldm.times(config.t0(quality), config.steps)[:-1]:
            ldm.predict(z, t, text, config.guidance)

    byte = torch.tensor([quality_byte(quality)], device=ldm.device)
    codec.decompress(codec.compress(scenes[0].image, quality))  # loads what is loaded on first use
    for scene in list(scenes) * repeats:
        x = to_tensor(scene.image).to(ldm.device)
        stream = clock("encode", "", codec.compress, scene.image, quality)
        clock("decode", "", codec.decompress, stream)
        z = clock("encode", "VAE encoder", ldm.encode, x).float()
        cam = clock("encode", "machine A, forward and back (Grad-CAM)", gradcam, codec.machine, x)
        captions = clock("encode", "captioner", codec.captioner.caption, [roi_crop(scene.image, cam)])
        coded = clock("encode", "compressor's encoder", model._code, z, byte)
        h_hat = torch.zeros_like(coded["h_symbols"])
        clock("decode", "compressor's integer network", model.net.exact, h_hat, int(byte))
        decoder = (coded["y_hat"], coded["index"], coded["fineness"], byte)
        z_hat = clock("decode", "compressor's decoder", model._synthesise, *decoder)
        text = clock("decode", "text encoder", ldm.text, captions)
        clock("decode", f"UNet, {config.steps} steps", walk, z_hat, text)
        clock("decode", "VAE decoder", ldm.decode, z_hat)
    codec.exact, threads = before
    torch.set_num_threads(threads)
    # (repeats, scenes) of each
    means = {key: 1000 * float(np.min(np.reshape(t, (repeats, -1)), 0).mean()) for key, t in seconds.items()}
    timings = []
    for side in ("encode", "decode"):
        parts = {what: value for (of, what), value in means.items() if of == side and what}
        whole, bare = means[side, ""], sum(parts.values())
        timings += [Timing(side, whole), *(Timing(f"{side}: {what}", value) for what, value in parts.items())]
        timings += [Timing(f"{side}: all of these", bare), Timing(f"{side}: against these", whole / bare, "times")]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return [*timings, Timing("peak memory of the process", peak, "MB")]


# -------------------------------------------------------------------------------------------------- the whole run

SLIM_FOLDERS = {
    "SLIM": "compressor_stage2",
    "SLIM, stage 1": "compressor",
    "SLIM, uniform weights": "compressor_uniform",
    "SLIM, feature matching": "compressor_features",
    "SLIM, LoRA": "compressor_lora",
}
"""Methods of the family and their folders beside `ldm`; those that are there take part."""
PIXEL_FOLDERS = {"hyperprior": "baseline_mse", "hyperprior, machine loss": "baseline_task"}
MAIN = ("SLIM", "SLIM, stage 1", "SLIM, uniform weights")
CLASSIC = "best classic, payload"


def open_codec(folder: Path, name: str, like: SlimCodec | None = None) -> SlimCodec:
    """The codec of `SLIM_FOLDERS`[name] in a folder laid out like assets/pocket, sharing the parts of another codec."""
    compressor = folder / SLIM_FOLDERS[name]
    scale = Scale.from_name(folder).with_(compressor=str(compressor))
    lora = compressor / "unet_lora"
    if like is None or lora.is_dir():
        codec = SlimCodec.from_pretrained(scale, exact=False)
        if lora.is_dir():
            codec.ldm.unet.load_lora_adapter(lora, prefix=None, weight_name=LORA_FILE)
        return codec
    own = LatentCompressor.from_pretrained(compressor, like.ldm.device)
    from .caption import CaptionPrior

    prior = CaptionPrior.load(compressor / CAPTION_PRIOR)
    return SlimCodec(like.ldm, own, prior, like.captioner, like.machine, exact=False)


def all_jobs(folder: Path, scenes: int, ablation_scenes: int) -> list[tuple[Method, int]]:
    """Every method, baseline and ablation whose weights are there.

    The main curves, baselines and ceilings on `scenes`; ablations of the first of MAIN that is there, and variants that
    need weights of their own, on `ablation_scenes`.
    """
    parts = [folder / part for part in ("ldm", "captioner", "machine_a", "machine_b")]
    jobs: list[tuple[Method, int]] = []
    shared: SlimCodec | None = None
    for name, sub in SLIM_FOLDERS.items():
        if not (folder / sub / "config.json").exists():
            continue
        codec = open_codec(folder, name, shared)
        key = weights_key(*parts, folder / sub)
        if shared is None:
            shared = codec
            jobs.append((Ceiling(codec, weights_key(*parts)), scenes))
            ablations = [variant for variant in VARIANTS if variant]
            jobs.append((Slim(name, codec, QUALITIES, ablations, key), ablation_scenes))
        jobs.append((Slim(name, codec, key=key), scenes if name in MAIN else ablation_scenes))
    for name, sub in PIXEL_FOLDERS.items():
        if (folder / sub / "config.json").exists():
            key = weights_key(*parts[2:], folder / sub)
            jobs.append((Pixels(name, PixelCodec.from_pretrained(folder / sub), key=key), scenes))
    jobs += [(Classic(codec, key=weights_key(*parts[2:])), scenes) for codec in CODECS]
    return [(method, count) for method, count in jobs if count]


def all_comparisons(results: Mapping[Setting, list[SceneResult]]) -> list[Comparison]:
    """The deltas that the goals speak of, for both machines, and each ablation against the method as it is."""

    def of(name: str, variant: str = "") -> list[list[SceneResult]]:
        return [r for s, r in results.items() if s.method == name and s.variant == variant]

    main = next((name for name in MAIN if of(name)), None)
    if main is None:
        return []
    scaled = set(CLASSIC_NAMES.values())  # a classic codec may downscale: its frontier is over all its variants
    classic = [r for s, r in results.items() if s.method in scaled]
    rows: list[Comparison] = []
    for machine in ("b", "a"):
        for name in dict.fromkeys((*SLIM_FOLDERS, *PIXEL_FOLDERS, *CLASSIC_NAMES.values())):
            if name != main and of(name):
                anchor = [r for s, r in results.items() if s.method == name and (not s.variant or name in scaled)]
                rows.append(compare((name, main), anchor, of(main), machine))
        if classic:
            rows.append(compare((CLASSIC, main), classic, of(main), machine, (True, False)))
        for anchor_name, test_name in (MAIN[:0:-1], tuple(PIXEL_FOLDERS)):  # each step of training alone
            if of(anchor_name) and of(test_name):
                rows.append(compare((anchor_name, test_name), of(anchor_name), of(test_name), machine))
        for variant in VARIANTS:
            if variant and len(of(main, variant)) > 2:
                rows.append(compare((main, f"{main} ({variant})"), of(main), of(main, variant), machine))
    return rows


def weights_key(*folders: Path) -> str:
    """Eight hex digits over the weights and configs in some folders."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".safetensors", ".json") and path.name != "card.json":
                digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def about_run(command: str, results: Mapping[Setting, list[SceneResult]], keys: Mapping[str, str]) -> dict:
    """What a reader has to know about a table: command, date, versions, weights."""
    packages = ("torch", "diffusers", "transformers", "compressai", "constriction", "pillow", "bjontegaard", "numpy")
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "scenes": {str(s): len(r) for s, r in results.items()},
        "weights": dict(keys),
    }


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


def _value(text: str, kind: str) -> Any:
    if kind == "str":
        return text
    if kind == "float":
        return float(text) if text else math.nan
    return bool(int(text)) if kind == "bool" else int(text)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _as_pixels(x: Tensor) -> Tensor:
    """Rounded to whole levels, as pictures are."""
    return to_tensor(to_images(x.float()))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m slimlib.evaluation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--reproduce", action="store_true", help="everything, on as many scenes as the shipped table, into it")
    option("--models", type=Path, default=ASSETS / "pocket", help="folder of the models (default: %(default)s)")
    option("--scenes", type=int, help="test scenes for the main curves (default: 60, to reproduce 1000)")
    option("--ablation-scenes", type=int, help="test scenes for the ablations (default: none, to reproduce 300)")
    option("--only", nargs="+", metavar="METHOD", help="these methods alone, such as SLIM hyperprior JPEG")
    option("--work", type=Path, default=Path("runs/evaluation"), help="results by scene (default: %(default)s)")
    option("--out", type=Path, help="folder that gets evaluation.csv, comparisons.csv, times.csv, evaluation.json")
    option("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    option("--quiet", action="store_true", help="no progress bar")
    a = parser.parse_args(arguments)
    if a.threads:
        torch.set_num_threads(a.threads)
    scenes, ablations = (1000, 300) if a.reproduce else (60, 0)
    scenes = scenes if a.scenes is None else a.scenes
    ablations = ablations if a.ablation_scenes is None else a.ablation_scenes
    if a.reproduce and a.out is None:
        a.out = RESULTS
    quiet_libraries()
    jobs = all_jobs(a.models, scenes, ablations)
    names = sorted({method.name for method, _ in jobs})
    if a.only and set(a.only) - set(names):
        raise SystemExit(f"no method {', '.join(sorted(set(a.only) - set(names)))}; there are: {', '.join(names)}")
    jobs = [(method, count) for method, count in jobs if not a.only or method.name in a.only]
    machines = load_machine(str(a.models / "machine_a")), load_machine(str(a.models / "machine_b"))
    results = evaluate(jobs, machines, Store(a.work), progress=not a.quiet)
    rows = table(results)
    print(as_text(rows))
    if not a.out or (a.reproduce and a.only):  # the shipped table is whole or is not written
        return
    save_rows(rows, a.out / "evaluation.csv")
    comparisons = all_comparisons(results)
    if comparisons:
        save_rows(comparisons, a.out / "comparisons.csv")
    slim = [method for method, _ in jobs if isinstance(method, Slim)]
    if slim:
        test = PocketScenes("test")
        save_rows(measure_times(slim[0].codec, [test[i] for i in range(5)]), a.out / "times.csv")
    command = "python -m slimlib.evaluation " + shlex.join(sys.argv[1:])
    about = about_run(command, results, {method.name: method.key for method, _ in jobs})
    atomic_write(a.out / "evaluation.json", (json.dumps(about, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
