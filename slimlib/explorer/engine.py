"""What the explorer knows and draws, in plain Python: settings, pictures to look at, answers that come in stages.

An answer is a generator: the picture before the UNet comes first, then a sign of life after each denoising step, then
the finished picture. Whoever asks may stop listening at any of these points; that is how a page drops stale answers.
"""

from __future__ import annotations

import atexit
import functools
import io
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from slimlib import plots
from slimlib.baselines import CODECS, SCALES, PixelCodec, decode_classic, downscale, encode_classic
from slimlib.codec import Decoded, SlimCodec, StreamReport
from slimlib.evaluation import CLASSIC_NAMES, PIXEL_FOLDERS, RESULTS, SLIM_FOLDERS, Row, load_rows, open_codec
from slimlib.ldm import LatentDiffusion
from slimlib.machines import Machine, load_machine, to_images, to_tensor
from slimlib.pictures import as_rgb
from slimlib.roi import Box, gradcam, roi_box
from slimlib.scales import ASSETS, Scale
from slimlib.scenes import CLASSES, PocketScenes
from slimlib.stream import unpack

WEIGHTS = {"stage 2": "SLIM", "stage 1": "SLIM, stage 1", "uniform": "SLIM, uniform weights"}
"""Weights to choose from, the best first, by their method's name in the evaluation."""
RIVALS = ("jpeg", "webp", "avif")
"""Classic codecs shown beside SLIM at the same number of bytes."""
LONG_SIDE = 256
"""Longest side, in pixels, at which a photograph is explored; the models know scenes of 128 px."""
MAX_UPLOAD = 100_000_000
"""Most pixels of a photograph that is opened at all."""
CURVES_SIZE = 372, 236
"""Of the picture of the rate-accuracy curves, in pixels of the page."""
MAX_STEPS = 20
MAX_SEED = 2**32 - 1

Guesses = list[tuple[str, float]]
"""The five likeliest classes with their probabilities."""


@dataclass(frozen=True)
class Settings:
    """All that a person can choose; what `SlimCodec.compress` takes, and which scene and weights.

    Attributes:
        scene: index in the test split.
        quality: 0 (smallest file) to 1.
        steps, t0: of the enhancement; None leaves them to the compressor's config.
        weights: a key of WEIGHTS.
        caption: "auto", None for none, or any words.
        seed: of the decoder's noise.
    """

    scene: int = 43
    quality: float = 0.2
    steps: int | None = None
    t0: int | None = None
    weights: str = "stage 1"
    caption: str | None = "auto"
    seed: int = 0

    def query(self) -> str:
        """As the query of a link, such as "scene=43&quality=0.2&..."; a caption of "" stands for none."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["caption"] = self.caption or ""
        return urlencode({name: value for name, value in values.items() if value is not None})

    @staticmethod
    def named(query: str) -> dict[str, Any]:
        """The reverse of `query`: those fields that a link names, for `dataclasses.replace`.

        Raises:
            ValueError: an unknown name, or a value that is no number where one belongs or is out of range.
        """
        limits = {"scene": (0, math.inf), "quality": (0, 1), "t0": (0, 999)}
        limits |= {"steps": (0, MAX_STEPS), "seed": (0, MAX_SEED)}
        values: dict[str, Any] = {}
        for name, text in parse_qsl(query, keep_blank_values=True):
            if name == "weights":
                values[name] = text
            elif name == "caption":
                values[name] = text or None
            elif name in limits:
                try:
                    values[name] = float(text) if name == "quality" else int(text)
                except ValueError:
                    raise ValueError(f"the link says {name}={text!r}, which is no number") from None
                low, high = limits[name]
                if not low <= values[name] <= high:
                    raise ValueError(f"the link says {name}={text}; expected {low} to {high}")
            else:
                raise ValueError(f"the link names {name!r}; known are {', '.join(limits)}, weights, caption")
        return values


@dataclass(frozen=True, eq=False)
class Source:
    """A picture to explore, and what is known about it before any bit is spent.

    Attributes:
        name: of the scene, or of the photograph's file.
        image: RGB.
        box: what the captioner sees: the box of machine A's Grad-CAM map.
        matte: (H, W) in [0, 1] where the object's exact outline is known, else None.
        truth: the right class if it is known, else None.
        caption: the captioner's words.
        guesses: what the machines ("A", "B") see in the picture itself.
        note: what was done to a photograph on its way in.
    """

    name: str
    image: Image.Image
    box: Box
    matte: np.ndarray | None
    truth: str | None
    caption: str
    guesses: dict[str, Guesses]
    note: str = ""


@dataclass(frozen=True, eq=False)
class View:
    """One stage of an answer.

    Attributes:
        source, settings: what was compressed, and how; None for a stream that was opened: it holds no original.
        weights: a key of WEIGHTS.
        stream, report: the file and what `SlimCodec.inspect` says about it.
        pictures: "original", "bits", "before", "after", "error", as far as they are there.
        guesses: of the machines, by picture ("before", "after").
        step: denoising steps done; `report.steps` of them and "after" in `pictures`: all is there.
    """

    source: Source | None
    settings: Settings | None
    weights: str
    stream: bytes
    report: StreamReport
    pictures: dict[str, Image.Image]
    guesses: dict[str, dict[str, Guesses]]
    step: int = 0

    @property
    def done(self) -> bool:
        return "after" in self.pictures


@dataclass(frozen=True, eq=False)
class Budgeted:
    """What one codec makes of a number of bytes.

    Attributes:
        name: the method's, as in the evaluation.
        size: bytes of its best file within the budget; of its smallest one where none fits.
        fits: whether one does.
        image, guesses: what is decoded, and what the machines see in it.
    """

    name: str
    size: int
    fits: bool
    image: Image.Image
    guesses: dict[str, Guesses]


class Explorer:
    """Models and pictures behind the page. One thread at a time may ask for answers; `rivals` may run beside."""

    def __init__(self, folder: str | Path = ASSETS / "pocket") -> None:
        """Load what every answer needs; the other weights follow when they are chosen.

        Args:
            folder: laid out like assets/pocket.

        Raises:
            ValueError, FileNotFoundError: the folder holds no models.
        """
        self.folder = Path(folder)
        scale = Scale.from_name(self.folder)
        self.weights = [name for name in WEIGHTS if (self._home(name) / "config.json").is_file()]
        """Those of WEIGHTS that are there."""
        self._codecs: dict[str, SlimCodec] = {}
        self._sources: dict[int, Source] = {}
        self.scenes = PocketScenes("test", scale.size)
        first = self.codec(self.weights[0])
        self.machines: dict[str, Machine] = {"A": first.machine, "B": load_machine(scale.machine_b, first.ldm.device)}
        self.pixel_codecs = {
            name: PixelCodec.from_pretrained(self.folder / sub, "cpu")
            for name, sub in PIXEL_FOLDERS.items()
            if (self.folder / sub / "config.json").is_file()
        }

    # ---- what can be looked at

    def scene(self, index: int) -> Source:
        """A test scene. Raises IndexError if there is none of that number."""
        if index not in self._sources:
            scene = self.scenes[index]
            name = f"{index}: {scene.noun}"
            self._sources[index] = self._source(name, scene.image, scene.matte, CLASSES[scene.label])
        return self._sources[index]

    def photo(self, data: bytes, name: str) -> Source:
        """A photograph from the bytes of its file. Raises ValueError, in words to show, if it is none."""
        image, note = _open_photo(io.BytesIO(data), name)
        return replace(self._source(name, image), note=note)

    def codec(self, weights: str) -> SlimCodec:
        """The codec of some weights, exact, as `SlimCodec.from_pretrained` would make it; all share one LDM."""
        if weights not in self._codecs:
            like = next(iter(self._codecs.values()), None)
            codec = open_codec(self.folder, WEIGHTS[weights], like)
            codec.exact = True
            if like is None or codec.ldm is not like.ldm:
                _remember_latents(codec.ldm)
                for part in (codec.ldm.vae.decoder, codec.ldm.unet):  # faster; the encoder stays exact
                    part.to(memory_format=torch.channels_last)
            self._codecs[weights] = codec
        return self._codecs[weights]

    # ---- answers

    def compress(self, settings: Settings, photo: Source | None = None) -> bytes:
        """The file: to the byte what `code` makes."""
        source = photo or self.scene(settings.scene)
        caption = source.caption if settings.caption == "auto" else settings.caption
        codec = self.codec(settings.weights)
        return codec.compress(source.image, settings.quality, caption, settings.steps, settings.seed, settings.t0)

    def look(self, settings: Settings, photo: Source | None = None) -> Iterator[View]:
        """Compress and decode, in stages: bytes and the picture before the UNet, each step, the finished picture.

        Args:
            settings: what is chosen.
            photo: explored in place of the scene, if given.

        Raises:
            ValueError: the codec refuses a setting, such as a caption that is too long.
        """
        source = photo or self.scene(settings.scene)
        yield from self._decode(self.compress(settings, photo), settings.weights, source, settings)

    def open_stream(self, stream: bytes) -> Iterator[View]:
        """The same stages for a .slim file from elsewhere, of any weights that are here.

        Raises:
            StreamError: the file is damaged, or of other weights.
        """
        wanted = unpack(stream)[0].fingerprint
        weights = next((w for w in self.weights if self.codec(w).fingerprint == wanted), self.weights[0])
        yield from self._decode(stream, weights)

    def rivals(self, source: Source, size: int) -> Iterator[Budgeted]:
        """What each of RIVALS makes of at most `size` bytes."""
        for codec in RIVALS:
            yield self._budgeted(CLASSIC_NAMES[codec], *_classic_within(source, codec, size), size)

    def budget(self, settings: Settings, size: int, photo: Source | None = None) -> Iterator[Budgeted]:
        """What every codec makes of at most `size` bytes: SLIM by its quality, the classic ones by size and quality."""
        source = photo or self.scene(settings.scene)

        def slim(step: int) -> bytes:
            return self.compress(replace(settings, quality=step / 255), photo)

        data = largest_within(slim, 255, size)
        view = list(self._decode(data, settings.weights, source))[-1]
        name = WEIGHTS[settings.weights]
        yield Budgeted(name, len(data), len(data) <= size, view.pictures["after"], view.guesses["after"])
        for name, pixel in self.pixel_codecs.items():
            data = largest_within(functools.partial(_in_bytes, pixel, source.image), 255, size)
            yield self._budgeted(name, data, pixel.decompress(data), size)
        for codec in CODECS:
            yield self._budgeted(CLASSIC_NAMES[codec], *_classic_within(source, codec, size), size)

    def guess(self, image: Image.Image) -> dict[str, Guesses]:
        """What both machines see."""
        return {name: machine.top5(image) for name, machine in self.machines.items()}

    def code(self, settings: Settings, photo: Source | None = None) -> str:
        """Lines of Python that make the very same file, without the explorer."""
        lines = ["from slimlib import SlimCodec", "from slimlib.scales import ASSETS, Scale"]
        standard = self.folder == ASSETS / "pocket"
        scale = 'Scale.from_name("pocket")' if standard else f"Scale.from_name({str(self.folder)!r})"
        home = SLIM_FOLDERS[WEIGHTS[settings.weights]]
        path = f'str(ASSETS / "pocket/{home}")' if standard else repr(str(self.folder / home))
        if photo is None:
            lines += ["from slimlib.scenes import PocketScenes"]
            image = f'PocketScenes("test", {self.scenes.size})[{settings.scene}].image'
        else:
            lines += ["from slimlib.explorer import open_photo"]
            image = f"open_photo({photo.name!r})"
        chosen = {"quality": settings.quality, "caption": settings.caption, "steps": settings.steps}
        chosen |= {"seed": settings.seed, "t0": settings.t0}
        arguments = ", ".join([image, *(f"{name}={value!r}" for name, value in chosen.items())])
        lines += [f"codec = SlimCodec.from_pretrained({scale}.with_(compressor={path}))"]
        return "\n".join([*lines, f"stream = codec.compress({arguments})"])

    # ---- helpers

    def _home(self, weights: str) -> Path:
        return self.folder / SLIM_FOLDERS[WEIGHTS[weights]]

    def _source(
        self, name: str, image: Image.Image, matte: np.ndarray | None = None, truth: str | None = None
    ) -> Source:
        codec = self.codec(self.weights[0])
        words = codec.inspect(codec.compress(image, 0.0, "auto")).caption or ""
        box = roi_box(gradcam(codec.machine, to_tensor(image).to(codec.ldm.device)))
        return Source(name, image, box, matte, truth, words, self.guess(image))

    @torch.inference_mode()
    def _decode(
        self, stream: bytes, weights: str, source: Source | None = None, settings: Settings | None = None
    ) -> Iterator[View]:
        codec = self.codec(weights)
        item = codec.read([stream])[0]
        before = self._picture(codec, item.z_hat, item.report)
        cell = codec.ldm.factor * 2**codec.compressor.config.stages
        seen = source.image if source else before
        pictures = {"bits": bits_picture(seen, item.report.bit_map, cell), "before": before}
        if source:
            pictures["original"] = roi_picture(source)
        view = View(source, settings, weights, stream, item.report, pictures, {"before": self.guess(before)})
        yield view
        z = item.z_hat
        for step, latent in enumerate(walk(codec, item), 1):
            z = latent
            yield replace(view, step=step)
        repaired = z is not item.z_hat
        after = self._picture(codec, z, item.report) if repaired else before
        pictures = pictures | {"after": after}
        if source:
            pictures["error"] = error_picture(source.image, after)
        guesses = view.guesses | {"after": self.guess(after) if repaired else view.guesses["before"]}
        yield replace(view, pictures=pictures, guesses=guesses, step=item.report.steps)

    def _picture(self, codec: SlimCodec, z: Tensor, report: StreamReport) -> Image.Image:
        return to_images(codec.ldm.decode(z).float())[0].crop((0, 0, report.width, report.height))

    def _budgeted(self, name: str, data: bytes, image: Image.Image, size: int) -> Budgeted:
        return Budgeted(name, len(data), len(data) <= size, image, self.guess(image))


def _remember_latents(ldm: LatentDiffusion) -> None:
    """Let a VAE's encoder keep its last results: under a slider the picture stays the same."""
    encode = ldm.encode

    @functools.lru_cache(maxsize=8)
    def encode_pixels(shape: tuple[int, ...], pixels: bytes) -> Tensor:
        return encode(torch.frombuffer(bytearray(pixels), dtype=torch.float32).view(shape))

    ldm.encode = lambda x: encode_pixels(tuple(x.shape), x.numpy().tobytes())  # type: ignore[method-assign]


def walk(codec: SlimCodec, item: Decoded) -> Iterator[Tensor]:
    """`LatentDiffusion.enhance`, one denoising step at a time: yields the latent after each.

    With guidance the UNet sees the latent twice, with the caption and without: here as one batch of two, which is
    a quarter cheaper than twice one.
    """
    ldm, report, guidance = codec.ldm, item.report, codec.compressor.config.guidance
    times = ldm.times(report.t0, report.steps)
    if not times or report.t0 == 0:
        return
    words = [report.caption or ""] + ([""] if guidance != 1 else [])
    text = ldm.text(words)
    z = item.z_hat.to(ldm.device, ldm.dtype)
    z = ldm.add_noise(z, report.t0, ldm.noise(z.shape, report.seed))
    for t, t_next in pairwise(times):
        z0, eps = (x[-1:] + guidance * (x[:1] - x[-1:]) for x in ldm.predict(z.repeat(len(words), 1, 1, 1), t, text))
        z = ldm.add_noise(z0, t_next, eps)
        yield z


def largest_within(encode: Callable[[int], bytes], top: int, size: int) -> bytes:
    """The file of the highest setting, 0 to `top`, that has at most `size` bytes; that of 0 if none has.

    Bisection: it takes for granted that files grow with the setting.
    """
    best, low, high = encode(0), 1, top
    while low <= high and len(best) <= size:
        middle = (low + high) // 2
        data = encode(middle)
        if len(data) <= size:
            best, low = data, middle + 1
        else:
            high = middle - 1
    return best


def open_photo(file: str | Path) -> Image.Image:
    """A photograph as the explorer takes it: upright RGB, scaled down to at most LONG_SIDE pixels along its sides.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no picture, a damaged one, or more than MAX_UPLOAD pixels.
    """
    with open(file, "rb") as stream:
        return _open_photo(stream, Path(file).name)[0]


def _open_photo(file: Any, name: str) -> tuple[Image.Image, str]:
    """The picture, and in words what was done to it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_UPLOAD is stricter than the error
            image: Image.Image = Image.open(file)
    except Image.DecompressionBombError:
        raise ValueError(f"{name} has more pixels than can be opened; {MAX_UPLOAD // 10**6} million are") from None
    except Exception:  # a damaged header may raise anything in Pillow's plugins
        raise ValueError(f"{name} is not a picture that can be opened here, or it is damaged.") from None
    width, height = image.size
    if width * height > MAX_UPLOAD:
        millions = f"{width * height / 1e6:.0f} million pixels; {MAX_UPLOAD // 10**6} million are the most"
        raise ValueError(f"{name} has {millions}: make it smaller first.")
    side = (LONG_SIDE, LONG_SIDE)
    try:
        if image.mode in ("L", "RGB", "CMYK") and "transparency" not in image.info:
            image.thumbnail(side, Image.Resampling.LANCZOS)  # a large JPEG is decoded at a fraction of its size
        image = as_rgb(image, MAX_UPLOAD)
        image.thumbnail(side, Image.Resampling.LANCZOS)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
    scaled = max(width, height) > LONG_SIDE
    note = f"{width} x {height} pixels" + (f", explored at {image.width} x {image.height}" if scaled else "")
    return image, note


def _in_bytes(codec: PixelCodec, image: Image.Image, step: int) -> bytes:
    """A file at a quality in steps of 1/255."""
    return codec.compress(image, step / 255)


@functools.lru_cache(maxsize=256)
def _classic_within(source: Source, codec: str, size: int) -> tuple[bytes, Image.Image]:
    """Of all sizes that a classic codec may shrink the picture to, the file within the budget with the least error."""
    files = []
    for scale in SCALES:
        small = downscale(source.image, scale)
        data = largest_within(functools.partial(encode_classic, small, codec), 100, size)
        files.append((data, decode_classic(data, source.image.size)))
    fitting = [file for file in files if len(file[0]) <= size]
    if not fitting:
        return min(files, key=lambda file: len(file[0]))
    original = np.asarray(source.image, np.float64)
    return min(fitting, key=lambda file: float(((np.asarray(file[1], np.float64) - original) ** 2).mean()))


# ----------------------------------------------------------------------------------------------------- pictures


@functools.lru_cache(maxsize=8)
def roi_picture(source: Source) -> Image.Image:
    """The original, twice as large, with the object's outline (white in black) and the captioner's box (orange)."""
    width, height = source.image.size
    large = source.image.resize((2 * width, 2 * height), Image.Resampling.BICUBIC)
    if source.matte is not None:
        mask = Image.fromarray((source.matte > 0.5).astype(np.uint8) * 255).resize(
            large.size, Image.Resampling.BILINEAR
        )
        mask = mask.point(lambda level: 255 * (level > 127))
        outer, wide = mask.filter(ImageFilter.MaxFilter(3)), mask.filter(ImageFilter.MaxFilter(7))
        large.paste("black", (0, 0), wide)
        large.paste("white", (0, 0), outer)
        inside = source.image.resize(large.size, Image.Resampling.BICUBIC)
        large.paste(inside, (0, 0), mask)
        large.paste(inside, (0, 0), wide.point(lambda level: 255 - level))
    left, top, right, bottom = (2 * side for side in source.box)
    ImageDraw.Draw(large).rectangle((left, top, right - 1, bottom - 1), outline="#e69f00", width=3)
    return large


def bits_picture(image: Image.Image, bit_map: np.ndarray, cell: int) -> Image.Image:
    """Where the latent's bits went, over the picture in grey: from black (none) to yellow (most of this file).

    Args:
        image: RGB.
        bit_map: bits of each cell, (rows, columns).
        cell: pixels along a cell's side; cells may reach over the picture's right and lower edge.
    """
    grey = np.asarray(image.convert("L"), np.float64)[..., None] / 255
    share = bit_map / max(float(bit_map.max()), 1e-9)
    heat = Image.fromarray((255 * matplotlib.colormaps["inferno"](share)[..., :3]).astype(np.uint8))
    rows, columns = bit_map.shape
    heat = heat.resize((columns * cell, rows * cell), Image.Resampling.NEAREST).crop((0, 0, *image.size))
    return Image.fromarray((255 * (0.45 * grey + 0.55 * np.asarray(heat) / 255)).astype(np.uint8))


def error_picture(original: Image.Image, decoded: Image.Image, full: float = 0.25) -> Image.Image:
    """Absolute error, mean of the three colours: black is none, white is `full` of the range or more."""
    difference = np.abs(np.asarray(original, np.float64) - np.asarray(decoded, np.float64)).mean(2) / 255
    return Image.fromarray((255 * (difference / full).clip(0, 1)).round().astype(np.uint8)).convert("RGB")


class Curves:
    """The rate-accuracy curves of notebook 07 as one picture, and where on it a file lies."""

    SHOWN = (*WEIGHTS.values(), "hyperprior", "JPEG", "WebP", "AVIF")

    def __init__(self, rows: Sequence[Row], size: tuple[int, int] = CURVES_SIZE) -> None:
        """Draw all curves of SHOWN that are among the rows, for machine B.

        Args:
            rows: from `evaluation.load_rows`.
            size: of the picture on the page, in pixels; it is drawn twice as fine.
        """
        by_method = {name: [r for r in rows if r.method == name and not r.variant] for name in self.SHOWN}
        self._points = {
            name: (np.log([r.bpp for r in of]), [r.top1_b for r in of])
            for name, rows_of in by_method.items()
            if len(of := sorted(rows_of, key=lambda r: r.bpp)) > 1
        }
        if not self._points:
            raise ValueError("the table holds no curve to show")
        import matplotlib.style

        with matplotlib.style.context(ASSETS / "slim.mplstyle"), matplotlib.rc_context({"font.size": 8}):
            figure = Figure(figsize=(size[0] / 100, size[1] / 100), dpi=200)
            FigureCanvasAgg(figure)
            ax = figure.add_subplot()
            for name, (log_bpp, accuracy) in self._points.items():
                plots.rate_curve(ax, np.exp(log_bpp).tolist(), [value / 100 for value in accuracy], name)
            plots.log_rate(ax)
            ax.set_ylabel("Top-1 of machine B [%]")
            ax.set_title("")
            ax.set_ylim(0, 100)
            for axis in (ax.xaxis, ax.yaxis):
                axis.label.set_fontsize(8)
            ax.tick_params(labelsize=8)
            ax.legend(fontsize=7, loc="upper left", labelspacing=0.25, handlelength=1.6, borderaxespad=0.2)
            file = io.BytesIO()
            figure.savefig(file, dpi=200)
        self.png = file.getvalue()
        self._axes = ax

    def place(self, method: str, bpp: float) -> tuple[float, float, float] | None:
        """Where a file of a method lies: (share of the width from the left, of the height from the top, accuracy).

        The height is the curve's at this rate: one scene has no accuracy. Beyond the curve's ends, its ends. None
        if the method has no curve.
        """
        if method not in self._points:
            return None
        accuracy = float(np.interp(math.log(bpp), *self._points[method]))
        low, high = self._axes.get_xlim()
        point = self._axes.transData.transform((min(max(bpp, low), high), accuracy))
        across, up = self._axes.figure.transFigure.inverted().transform(point)
        return float(across), float(1 - up), accuracy


def shipped_curves() -> Curves | None:
    """The curves of assets/results, or None where there are none yet."""
    path = RESULTS / "evaluation.csv"
    return Curves(load_rows(path)) if path.is_file() else None


# ------------------------------------------------------------------------------------------- the newest job only


class Newest:
    """Runs jobs in one thread of its own, always the newest; an older one is dropped at its next result.

    A job is a function that returns an iterator. Its first result is delivered even if a newer job waits (something
    moves while a slider is dragged), the others only as long as it is the newest. Results arrive in the order of the
    jobs, so an old one never replaces a new one.
    """

    def __init__(self, deliver: Callable[[int, Any], None]) -> None:
        """Args: `deliver` gets a job's number and a result, or the exception that ended it, in the worker's thread."""
        self._deliver = deliver
        self._news = threading.Condition()
        self._number = self._finished = 0
        self._job: Callable[[], Iterator[Any]] | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread that is still inside a library would abort the dying process

    def submit(self, job: Callable[[], Iterator[Any]]) -> int:
        """Put a job in the place of whatever waits; returns its number at once."""
        with self._news:
            self._number += 1
            self._job = job
            self._news.notify_all()
            return self._number

    def wait(self, timeout: float | None = None) -> bool:
        """Until nothing runs or waits; False if that takes longer."""
        with self._news:
            return self._news.wait_for(lambda: self._finished == self._number, timeout)

    def close(self) -> None:
        """Drop everything and end the thread."""
        with self._news:
            self._number, self._job, self._closed = self._number + 1, None, True
            self._news.notify_all()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._closed:
            with self._news:
                self._news.wait_for(lambda: self._job is not None or self._closed)
                number, job, self._job = self._number, self._job, None
            try:
                for i, result in enumerate(job() if job else ()):
                    if i and self._number != number:
                        break
                    self._deliver(number, result)
                    if self._number != number:
                        break
            except Exception as error:  # a page must tell what went wrong, and go on
                self._deliver(number, error)
            with self._news:
                self._finished = number
                self._news.notify_all()
