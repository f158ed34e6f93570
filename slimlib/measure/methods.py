"""What is evaluated: SLIM and its ablations, the learned baseline, classic codecs, and what none of them can beat."""

from __future__ import annotations

import copy
import functools
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert

from slimlib.caption import CAPTION_PRIOR, CaptionPrior
from slimlib.codec import Decoded, SlimCodec
from slimlib.compressor import LatentCompressor, quality_byte
from slimlib.data.imagenet import AsPublished
from slimlib.data.scenes import Scene
from slimlib.entropy import RangeEncoder
from slimlib.images import to_images, to_tensor
from slimlib.ldm import last
from slimlib.machines import Machine, load_machine
from slimlib.measure.baselines import PixelCodec, decode_classic, downscale, encode_classic, payload_bytes
from slimlib.roi import object_box, roi_crop
from slimlib.scales import Scale
from slimlib.stream import FIXED_BYTES, unpack

MACHINES = ("a", "a2", "b", "c", "d")  # their names in the tables; a scale may lack some
SPENT = ["size", "payload", "caption", "hyper", "latent", "roi_bits", "encode_ms", "decode_ms"]
QUALITIES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
SLIM_FOLDERS = {
    "SLIM": "compressor_stage2",
    "SLIM, stage 1": "compressor",
    "SLIM, uniform weights": "compressor_uniform",
    "SLIM, feature matching": "compressor_features",
    "SLIM, joint": "compressor_joint",
}
"""Methods of the family, and their folders beside the scale's compressor; compressor_X, another, is "SLIM, X"."""
MAIN = ("SLIM", "SLIM, stage 1", "SLIM, uniform weights")
PIXEL_FOLDERS = {"hyperprior": "baseline_mse", "hyperprior, machine loss": "baseline_task"}
CLASSIC_NAMES = {"jpeg": "JPEG", "webp": "WebP", "avif": "AVIF", "jpegxl": "JPEG XL", "jpeg2000": "JPEG 2000"}
SHRUNK = {"": 1.0, "1/2": 0.5, "1/4": 0.25}
"""Variants of a classic codec: the picture is made smaller first, and larger after decoding (bicubic both ways)."""


class Variant(NamedTuple):
    """What an ablation changes: the caption ("auto", "none", "wrong", "oracle"), steps K, noise level t0, noise."""

    caption: str = "auto"
    steps: int | None = None
    t0: int | None = None
    latent: bool = True
    seed: int = 0


VARIANTS = {
    "": Variant(),
    "no caption": Variant(caption="none"),
    "wrong caption": Variant(caption="wrong"),
    "oracle crop": Variant(caption="oracle"),
    "no diffusion": Variant(steps=0),
    **{f"K = {steps}": Variant(steps=steps) for steps in (1, 2, 20)},
    **{f"t0 = {t0}": Variant(t0=t0) for t0 in (20, 50, 100, 200)},
    **{f"seed = {seed}": Variant(seed=seed) for seed in (1, 2)},
    "caption only": Variant(latent=False),
}
"""The ablations of SLIM. K, t0 and the decoder's seed are taken as if the file said so: it stays the same."""


class Batch:
    """Some scenes, also as tensors."""

    def __init__(self, scenes: Sequence[Scene], indices: Sequence[int]) -> None:
        self.indices, self.every, self.scenes = indices, scenes, [scenes[i] for i in indices]
        self.images = [scene.image for scene in self.scenes]
        self.x = to_tensor(self.images)  # (B, 3, H, W)
        self.labels = torch.tensor([scene.label for scene in self.scenes])
        self.mattes = torch.from_numpy(np.stack([scene.matte for scene in self.scenes]))[:, None]  # (B, 1, H, W)


@functools.lru_cache(maxsize=64)  # a batch goes through all variants, one after the other
def captions_of(batch: Batch, codec: SlimCodec, kind: str, quality: float) -> list[str]:
    """Captions by kind: "auto" (the codec's own), "oracle" (crop of the exact matte), "none"; or "wrong".

    That is of the next scene in the batch with another label, or beyond it; or none where all scenes have the same.
    """
    count = len(batch.images)
    if kind == "none":
        return [""] * count
    if kind == "wrong":
        right, label = captions_of(batch, codec, "auto", quality) * 2, batch.labels.tolist() * 2
        if len({*label}) == 1:  # such as of one scene
            beyond = (k % len(batch.every) for k in range(batch.indices[-1] + 1, batch.indices[0] + len(batch.every)))
            other = next(([k] for k in beyond if batch.every[k].label != label[0]), None)
            return captions_of(Batch(batch.every, other), codec, "auto", quality) * count if other else [""] * count
        return [next((right[j] for j in range(i, i + count) if label[j] != label[i]), "") for i in range(count)]
    if kind == "auto":
        return [file.report.caption or "" for file in files_of(batch, codec, kind, quality)]
    return codec.captioner.caption([roi_crop(image, m) for image, m in zip(batch.images, batch.mattes, strict=True)])


@functools.lru_cache(maxsize=64)
def files_of(batch: Batch, codec: SlimCodec, kind: str, quality: float) -> list[Decoded]:
    """The codec's own files, read again: what is decoded is what the bytes say."""
    count, at = len(batch.images), quality if kind == "wrong" else 0.0  # other words depend on no quality
    words = ["auto"] * count if kind == "auto" else captions_of(batch, codec, kind, at)
    pairs = zip(batch.images, words, strict=True)
    return [codec.read(codec.compress(image, quality, caption)) for image, caption in pairs]


@dataclass
class Method:
    """A codec in the evaluation."""

    name: str
    key: str  # stands for weights and pictures: results of one key are of one experiment
    settings: list[tuple[str, float]]  # variants and qualities
    # From a variant and a quality: the decoded pictures (B, 3, H, W) in [0, 1], and those columns of SPENT that are
    # known, a row for each scene.
    run: Callable[[Batch, str, float], tuple[Tensor, pd.DataFrame]]
    codec: SlimCodec | None = None


def slim(
    name: str,
    codec: SlimCodec,
    qualities: Sequence[float] = QUALITIES,
    variants: Sequence[str] = ("",),
    key: str = "",
    timed: int = 8,  # scenes that also go through the codec one at a time, for the clock
) -> Method:
    """SLIM: the codec's own files, and its decoder on batches, which changes pixels by rounding at most."""

    def run(batch: Batch, variant: str, quality: float) -> tuple[Tensor, pd.DataFrame]:
        change = VARIANTS[variant]
        if not change.latent:
            return _caption_only(codec, captions_of(batch, codec, change.caption, quality), batch)
        files = files_of(batch, codec, change.caption, quality)
        z_hat, reports = torch.cat([file.z_hat for file in files]), [file.report for file in files]
        t0 = reports[0].t0 if change.t0 is None else change.t0
        steps = reports[0].steps if change.steps is None else change.steps
        guidance, seeds = codec.compressor.config.walk(quality).guidance, [change.seed] * len(files)
        walk = codec.ldm.enhance(z_hat, [r.caption or "" for r in reports], t0, steps, seeds, guidance)
        spent = pd.DataFrame([report.bits for report in reports]) / 8
        spent["size"] = [report.size for report in reports]
        spent["payload"] = spent["size"] - spent["header"]
        spent["roi_bits"] = [_inside(r.bit_map, scene, codec) for r, scene in zip(reports, batch.scenes, strict=True)]
        alone = copy.copy(codec)
        alone.exact = True
        for i in range(0 if variant else min(len(files), timed - batch.indices[0])):  # the first scenes of all
            stream, spent.loc[i, "encode_ms"] = clocked(alone.compress, batch.images[i], quality)
            _, spent.loc[i, "decode_ms"] = clocked(alone.decompress, stream)
        x_hat = codec.ldm.decode(last(walk, z_hat))[..., : batch.x.shape[2], : batch.x.shape[3]]  # as large as it was
        return to_tensor(to_images(x_hat)), spent

    settings = [(variant, q) for variant in variants for q in (qualities if VARIANTS[variant].latent else (0.0,))]
    return Method(name, key, settings, run, codec)


def pixels(name: str, codec: PixelCodec, qualities: Sequence[float] = QUALITIES, key: str = "") -> Method:
    """The learned baseline: a hyperprior on pixels."""

    def run(batch: Batch, variant: str, quality: float) -> tuple[Tensor, pd.DataFrame]:
        pictures, spent = [], []
        for scene in batch.scenes:
            (data, bits), encode_ms = clocked(codec.encode, scene.image, quality)
            picture, decode_ms = clocked(codec.decompress, data)
            hyper, latent = (float(bits[part].sum()) / 8 for part in "hy")
            inside = _inside(bits["y"].sum(0).numpy(), scene, codec)
            spent.append((len(data), len(unpack(data)[1]), 0, hyper, latent, inside, encode_ms, decode_ms))
            pictures.append(picture)
        return to_tensor(pictures), pd.DataFrame(spent, columns=SPENT)

    return Method(name, key, [("", quality) for quality in qualities], run)


def classic(codec: str, qualities: Sequence[int] = (1, 20, 40, 60, 80), key: str = "", timed: int = 8) -> Method:
    """A classic codec, at full size and with downscaling first, on all processor cores but for the scenes timed."""

    def run(batch: Batch, variant: str, quality: float) -> tuple[Tensor, pd.DataFrame]:
        def encode(image: Image.Image) -> bytes:
            return encode_classic(downscale(image, SHRUNK[variant]), codec, int(quality))

        def both(image: Image.Image) -> tuple[Image.Image, int, int, float, float]:
            data, encode_ms = clocked(encode, image)
            picture, decode_ms = clocked(decode_classic, data, image.size)
            return picture, len(data), payload_bytes(data, codec), encode_ms, decode_ms

        alone = max(0, timed - batch.indices[0])
        with ThreadPoolExecutor() as pool:  # Pillow's codecs let go of Python's lock; times would be of busy cores
            found = [*map(both, batch.images[:alone]), *pool.map(both, batch.images[alone:])]
        spent = pd.DataFrame([row[1:] for row in found], columns=[*SPENT[:2], *SPENT[6:]])
        spent.loc[alone:, SPENT[6:]] = np.nan
        return to_tensor([row[0] for row in found]), spent

    return Method(CLASSIC_NAMES[codec], key, [(variant, q) for variant in SHRUNK for q in qualities], run)


def ceiling(codec: SlimCodec, key: str = "") -> Method:
    """What no codec here can beat: the pictures themselves, and what the VAE alone makes of them."""

    def run(batch: Batch, variant: str, quality: float) -> tuple[Tensor, pd.DataFrame]:
        x = to_tensor(to_images(codec.ldm.decode(codec.ldm.encode(batch.x).float()))) if variant else batch.x
        return x, pd.DataFrame()

    return Method("uncompressed", key, [("", 0.0), ("VAE", 0.0)], run)


def words(name: str, codec: SlimCodec, machine: Machine, key: str = "") -> Method:
    """What says the class and shows nothing: machine A's answer as an index ("label only"), or the codec's caption at
    quality 0, of which one reads the class ("caption read"). No curve may be read without them.

    A caption that names no class is read as the class that it is nearest to, by the cosine of mean embeddings of the
    diffusion model's text encoder. The column "answer" holds the class, or -1 for no caption: all machines are told it.
    """

    @functools.cache
    def embedded(*texts: str) -> Tensor:
        parts = [codec.ldm.text(texts[i : i + 64]).float().mean(1) for i in range(0, len(texts), 64)]
        return F.normalize(torch.cat(parts), dim=1)

    def read(text: str) -> int:
        named = [i for i, said in enumerate(machine.classes) if f" {said} " in f" {text} "]
        if named or not text:
            return (named or [-1])[0]
        return int((embedded(text) @ embedded(*machine.classes).T).argmax())

    def run(batch: Batch, variant: str, quality: float) -> tuple[Tensor, pd.DataFrame]:
        if name == "label only":
            answers = machine(batch.x.to(machine.mean.device)).argmax(1).tolist()
            spent = pd.DataFrame({"payload": [-(-(len(machine.classes) - 1).bit_length() // 8)] * len(answers)})
            return batch.x, spent.assign(size=FIXED_BYTES + spent.payload, answer=answers)
        captions = captions_of(batch, codec, "auto", 0.0)
        return batch.x, _files_of(codec, captions).assign(answer=[read(text) for text in captions])

    return Method(name, key, [("", 0.0)], run)


def open_machines(scale: Scale, device: str | torch.device | None = None, published: bool = False) -> dict[str, Any]:
    """The machines of a scale by their names, such as "a" and "b"; `published`: they look as their makers did."""
    names = {name: getattr(scale, f"machine_{name}") for name in MACHINES}
    machines: dict[str, Any] = {name: load_machine(place, device) for name, place in names.items() if place}
    first, *others = (one.classes for name, one in machines.items() if name != "d")  # which says where, not what
    if any(classes != first and sorted(classes) == sorted(first) or len(classes) != len(first) for classes in others):
        raise ValueError(f"the machines of {scale.name!r} do not count the same classes in one order: {names}")
    return {name: AsPublished(one) for name, one in machines.items()} if published else machines


def find(machine: Machine, x: Tensor) -> Tensor:
    """Where the object is in pictures x (B, 3, H, W), says judge D: left, top, right, bottom in [0, 1], (B, 4).

    Each cell of its last grid proposes a box (centre relative to its own, and size) and says how sure it is; the answer
    is their mean, weighted by the softmax of that. A pooled vector would hardly tell where things are.
    """
    features = machine.net.forward_features(machine.prepare(x)).permute(0, 2, 3, 1)  # (B, h, w, C)
    proposed = machine.net.get_classifier()(features).float()  # (B, h, w, 5)
    rows, columns = ((torch.arange(n, device=x.device) + 0.5) / n for n in proposed.shape[1:3])
    centres = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1) + proposed[..., :2]
    boxes = torch.cat([centres, proposed[..., 2:4].sigmoid()], -1).flatten(1, 2)
    sure = proposed[..., 4:].flatten(1, 2).softmax(1)
    return box_convert((boxes * sure).sum(1), "cxcywh", "xyxy")


def open_codec(
    scale: Scale | Path, name: str, like: SlimCodec | None = None, device: Any = None, dtype: Any = torch.float32
) -> SlimCodec:
    """The codec of `SLIM_FOLDERS`[name] at a scale, or in a folder like assets/pocket; `like` lends its other parts."""
    scale = scale if isinstance(scale, Scale) else Scale.from_name(scale)
    folder = Path(scale.compressor).parent / SLIM_FOLDERS.get(name, f"compressor_{name.removeprefix('SLIM, ')}")
    if like is None or (folder / "unet_lora").is_dir():
        return SlimCodec.from_pretrained(replace(scale, compressor=str(folder)), device, exact=False, dtype=dtype)
    own, prior = LatentCompressor.from_pretrained(folder, like.ldm.device), CaptionPrior.load(folder / CAPTION_PRIOR)
    return SlimCodec(like.ldm, own, prior, like.captioner, exact=False)


def _caption_only(codec: SlimCodec, captions: list[str], batch: Batch) -> tuple[Tensor, pd.DataFrame]:
    """What the stock pipeline draws for captions at its own size, made as small as the scenes; files of captions."""
    ldm, side, top = codec.ldm, codec.ldm.unet.config.sample_size, codec.ldm.scheduler.config.num_train_timesteps - 1
    z, seeds = torch.zeros(len(captions), ldm.latent_channels, side, side), [1 + i for i in batch.indices]
    walk = ldm.enhance(z, [f"a photo of {text}" if text else "" for text in captions], top, 20, seeds, 4.0)
    drawn = [image.resize(batch.images[0].size) for image in to_images(ldm.decode(last(walk, z)))]  # bicubic
    return to_tensor(drawn), _files_of(codec, captions)


def _files_of(codec: SlimCodec, captions: list[str]) -> pd.DataFrame:
    """What files would take that hold a header and a caption."""
    spent = []
    for caption in captions:
        coder = RangeEncoder()
        if caption and codec.prior:
            codec.prior.encode(coder, caption)
        payload = len(coder.get_bytes())
        spent.append((FIXED_BYTES + payload, payload, coder.bits / 8, 0, 0))
    return pd.DataFrame(spent, columns=SPENT[:5])


def clocked(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What a function returns, and the milliseconds that it took."""
    start = time.perf_counter()
    result = function(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, 1000 * (time.perf_counter() - start)


@torch.no_grad()
def measure_times(codec: SlimCodec, scenes: Sequence[Scene], quality: float = 0.5, repeats: int = 3) -> pd.DataFrame:
    """Encoding and decoding against the bare forward passes of the networks that they need, on one thread.

    Each is timed on every scene, `repeats` times over, in turns. Other programs can only lengthen a time, so the
    shortest of a scene counts; what is reported is the mean over the scenes.

    Returns:
        what, value, unit: "encode" and "decode", their parts, the sum of these, how many times that the whole takes;
        and the peak memory of the process.
    """
    codec, threads, taken = copy.copy(codec), torch.get_num_threads(), []
    codec.exact, ldm, model = True, codec.ldm, codec.compressor
    byte = torch.tensor([quality_byte(quality)], device=ldm.device)
    t0, steps, guidance = model.config.walk(quality)

    def clock(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        result, milliseconds = clocked(function, *arguments)
        taken.append((what, milliseconds))
        return result

    def walk(z: Tensor, text: Tensor) -> None:
        for t in ldm.times(t0, steps)[:-1]:
            ldm.predict(z, t, text, guidance)

    torch.set_num_threads(1)
    codec.decompress(codec.compress(scenes[0].image, quality))  # loads what is loaded on first use
    for scene in list(scenes) * repeats:
        x = to_tensor(scene.image).to(ldm.device)
        stream = clock("encode", codec.compress, scene.image, quality)
        clock("decode", codec.decompress, stream)
        z = clock("encode: VAE encoder", ldm.encode, x).float()
        region = clock("encode: compressor's map of the region", codec.region, scene.image, z, quality)
        captions = clock("encode: captioner", codec.captioner.caption, [scene.image.crop(object_box(region))])
        coded = clock("encode: compressor's encoder", model.code, z, byte)
        clock("decode: compressor's integer network", model.net.exact, int(byte), torch.zeros_like(coded["h_symbols"]))
        decoder = (coded["y_hat"], coded["index"], coded["fineness"], byte)
        z_hat = clock("decode: compressor's decoder", model.synthesise, *decoder)
        text = clock("decode: text encoder", ldm.text, captions)
        clock(f"decode: UNet, {steps} steps", walk, z_hat, text)
        clock("decode: VAE decoder", ldm.decode, z_hat)
    torch.set_num_threads(threads)
    groups = pd.DataFrame(taken, columns=["what", "ms"]).groupby("what", sort=False)["ms"]
    means = groups.agg(lambda ms: ms.to_numpy().reshape(repeats, -1).min(0).mean())
    lines = [(what, value, "ms") for what, value in means.items()]
    for side in ("encode", "decode"):
        bare = means[means.index.str.startswith(f"{side}: ")].sum()
        lines += [(f"{side}: all of these", bare, "ms"), (f"{side}: against these", means[side] / bare, "times")]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return pd.DataFrame([*lines, ("peak memory of the process", peak, "MB")], columns=["what", "value", "unit"])


def _inside(bit_map: np.ndarray, scene: Scene, codec: SlimCodec | PixelCodec) -> float:
    """Share of the bits of a map (rows, columns) inside the region, by area of each cell; edges are padded as coded."""
    over = np.multiply(bit_map.shape, codec.compressor.config.factor * 2**codec.compressor.config.stages)
    matte = np.pad(scene.matte, [(0, n) for n in over - scene.matte.shape], "edge")
    return float((bit_map * replace(scene, matte=matte).mask(*bit_map.shape)).sum()) / max(float(bit_map.sum()), 1e-9)
