"""SLIM as a codec: a picture to bytes and back, one object, three verbs.

codec = SlimCodec.from_pretrained("pocket")
stream = codec.compress(image, quality=0.5)
picture = codec.decompress(stream)
print(codec.inspect(stream))
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from slimlib.caption import Captioner, CaptionPrior, normalise
from slimlib.compressor import LatentCompressor, quality_byte
from slimlib.entropy import FrequencyTable, RangeDecoder, RangeEncoder
from slimlib.ldm import LatentDiffusion
from slimlib.machines import Machine, load_machine, to_images, to_tensor
from slimlib.pictures import MAX_PIXELS, Picture, as_rgb
from slimlib.repro import pick_device
from slimlib.roi import gradcam, roi_crop
from slimlib.scales import Scale
from slimlib.stream import StreamError, StreamHeader, pack, unpack

CAPTION_PRIOR = "caption_prior.json"
"""Name of the caption prior's file in the compressor's folder."""
MAX_STEPS = 100
"""Most denoising steps that a stream may ask for: a few bytes must not keep a decoder busy for hours."""
BATCH = 16
"""Pictures that go through the networks together when batching is allowed."""

T = TypeVar("T")


@dataclass(frozen=True)
class StreamReport:
    """Who spent what in a stream.

    Attributes:
        size: bytes in all.
        width, height: of the picture, in pixels.
        quality: in [0, 1], as stored (1/255 steps).
        caption: the words it carries; None if it carries none.
        t0, steps, seed: what the decoder will do, whether stored or the compressor's default.
        bits: bits of each part: header, caption, hyper, latent, and `rounding`, what the range coder
            adds or saves by ending on a whole byte. They add up to 8 * size.
        bit_map: bits spent on each cell of the compressor's latent grid, (rows, columns).
    """

    size: int
    width: int
    height: int
    quality: float
    caption: str | None
    t0: int
    steps: int
    seed: int
    bits: dict[str, float]
    bit_map: np.ndarray = field(repr=False, compare=False)

    @property
    def bpp(self) -> float:
        """Bits per pixel of the true picture, everything counted."""
        return 8 * self.size / (self.width * self.height)

    def __str__(self) -> str:
        lines = [
            f"{self.size} bytes, {self.bpp:.4f} bpp, {self.width} x {self.height} pixels",
            f"quality {self.quality:.3f}, caption " + (f'"{self.caption}"' if self.caption else "none"),
            f"enhancement from t0 = {self.t0} in {self.steps} steps, seed {self.seed}"
            if self.t0 and self.steps
            else "no enhancement",
        ]
        for part, bits in self.bits.items():
            share = bits / (8 * self.size)
            bar = "#" * round(30 * max(0.0, share))
            size = round(bits / 8, 1) + 0.0  # no "-0.0"
            lines.append(f"  {part:<8} {size:8.1f} bytes {round(share, 3) + 0.0:6.1%} {bar}".rstrip())
        return "\n".join(lines)


@dataclass(frozen=True)
class Decoded:
    """What a stream holds before any diffusion: the decompressed latent z_hat (1, C, h, w), and the rest."""

    z_hat: Tensor
    report: StreamReport


class SlimCodec:
    """The whole codec. Every method takes one item or a list of them, and returns likewise.

    Encoder and decoder agree exactly on the symbols, on any machine. Pixels are floating-point work: with
    `exact` (the default) one picture at a time goes through one thread, so that the same stream gives the
    same pixels, and the same picture the same stream, however many threads or pictures there are. Without it
    batches and all cores are used: faster, and a pixel value may differ by one now and then.
    """

    def __init__(
        self,
        ldm: LatentDiffusion,
        compressor: LatentCompressor,
        prior: CaptionPrior | None = None,
        captioner: Captioner | None = None,
        machine: Machine | None = None,
        exact: bool = True,
        max_pixels: int = MAX_PIXELS,
    ):
        """Put a codec together from loaded parts; `from_pretrained` is the usual way.

        Args:
            ldm, compressor: made for each other; checked as far as their shapes go.
            prior: needed for any caption.
            captioner, machine: needed for caption="auto" only: one speaks, the other says where to look.
            exact: see above.
            max_pixels: refuse larger pictures.
        """
        config = compressor.config
        if config.latent_channels != ldm.latent_channels or config.factor != ldm.factor:
            raise ValueError(
                f"the compressor is made for latents of {config.latent_channels} channels and stride "
                f"{config.factor}; this model has {ldm.latent_channels} and {ldm.factor}"
            )
        self.ldm, self.compressor, self.prior = ldm, compressor, prior
        self.exact, self.max_pixels = exact, max_pixels
        self._captioner, self._machine = captioner, machine
        self._scale: Scale | None = None

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path | Scale = "pocket",
        device: str | torch.device | None = None,
        exact: bool = True,
        max_pixels: int = MAX_PIXELS,
        dtype: torch.dtype = torch.float32,
    ) -> SlimCodec:
        """Load a codec; captioner and machine follow when they are first needed.

        Args:
            name: "pocket", "paper", a folder laid out like assets/pocket, or a `Scale`.
            device: the best one at hand if None.
            exact, max_pixels: see the class.
            dtype: precision in which the diffusion model computes.

        Raises:
            ValueError: no such scale, or weights that do not fit.
            FileNotFoundError: a part is missing.
        """
        scale = name if isinstance(name, Scale) else Scale.from_name(name)
        device = pick_device(device)
        compressor = LatentCompressor.from_pretrained(scale.compressor, device)
        prior = CaptionPrior.load(Path(scale.compressor) / CAPTION_PRIOR)
        ldm = LatentDiffusion.from_pretrained(scale.ldm, scale.variant, device, dtype)
        codec = cls(ldm, compressor, prior, exact=exact, max_pixels=max_pixels)
        codec._scale = scale
        return codec

    @property
    def captioner(self) -> Captioner:
        """The captioner, loaded on first use."""
        if self._captioner is None:
            scale = self._needs_scale("captioner")
            self._captioner = Captioner.from_pretrained(scale.captioner, device=self.ldm.device)
        return self._captioner

    @property
    def machine(self) -> Machine:
        """Machine A, which shows where to look; loaded on first use."""
        if self._machine is None:
            self._machine = load_machine(self._needs_scale("machine").machine_a, self.ldm.device)
        return self._machine

    @functools.cached_property
    def fingerprint(self) -> int:
        """16 bits over everything that decoding needs: compressor, caption prior, diffusion model.

        Taken once, for it costs a tenth of encoding: a codec's weights are frozen. After changing them in place
        (more training, LoRA), put a new SlimCodec together from the same parts.
        """
        digest = hashlib.sha256(self.compressor.fingerprint().to_bytes(2, "big"))
        digest.update(self.ldm.fingerprint() + (self.prior.fingerprint() if self.prior else b""))
        return int.from_bytes(digest.digest()[:2], "big")

    # ---- the three verbs

    @overload
    def compress(self, image: Picture, *args: Any, **settings: Any) -> bytes: ...

    @overload
    def compress(self, image: Sequence[Picture], *args: Any, **settings: Any) -> list[bytes]: ...

    def compress(
        self,
        image: Picture | Sequence[Picture],
        quality: float | Sequence[float] = 0.5,
        caption: str | None | Sequence[str | None] = "auto",
        steps: int | None = None,
        seed: int | Sequence[int] = 0,
        t0: int | None = None,
    ) -> bytes | list[bytes]:
        """Picture to .slim bytes.

        Args:
            image: a picture or a file's path, or a list; `pictures.as_rgb` says what becomes of other modes.
            quality: 0 (smallest) to 1 (best); a list gives one for each picture, as for caption and seed.
            caption: "auto" lets the captioner look at the region of interest; any other text is sent as typed
                (lower-cased, up to 200 characters); None or "" sends none.
            steps: denoising steps that the decoder is to take; 0 for no enhancement. None: the compressor's
                default, which costs no bytes.
            seed: of the decoder's noise, 0 to 2**32 - 1; 0 costs no bytes.
            t0: noise level that the decoder starts from. None: the compressor's table for this quality.

        Raises:
            ValueError: the picture is damaged, too large or of no known kind; an argument is out of range.
        """
        if isinstance(image, (Image.Image, str, Path)):
            return self._compress([image], quality, caption, steps, seed, t0)[0]
        return self._compress(image, quality, caption, steps, seed, t0)

    @overload
    def decompress(self, stream: bytes, steps: int | None = ...) -> Image.Image: ...

    @overload
    def decompress(self, stream: Sequence[bytes], steps: int | None = ...) -> list[Image.Image]: ...

    def decompress(self, stream: bytes | Sequence[bytes], steps: int | None = None) -> Image.Image | list[Image.Image]:
        """.slim bytes to a picture of the true size.

        Args:
            stream: what `compress` returned, or a list of them.
            steps: denoising steps; None takes those the stream asks for, 0 shows the picture before the UNet.

        Raises:
            StreamError: the stream is damaged, or of another program, version or set of weights.
        """
        if isinstance(stream, bytes):
            return self._decompress([stream], steps)[0]
        return self._decompress(stream, steps)

    @overload
    def inspect(self, stream: bytes) -> StreamReport: ...

    @overload
    def inspect(self, stream: Sequence[bytes]) -> list[StreamReport]: ...

    def inspect(self, stream: bytes | Sequence[bytes]) -> StreamReport | list[StreamReport]:
        """Who spent what in a stream (or in each of a list); print it to read it."""
        if isinstance(stream, bytes):
            return self.read([stream])[0].report
        return [decoded.report for decoded in self.read(stream)]

    def read(self, streams: Sequence[bytes]) -> list[Decoded]:
        """Undo the entropy coding and the compressor only: the latents as they enter the diffusion."""
        fingerprint = self.fingerprint
        with _threads(self.exact), torch.no_grad():
            return [self._read_one(stream, fingerprint) for stream in streams]

    # ---- helpers

    def _compress(
        self,
        images: Sequence[Picture],
        quality: float | Sequence[float],
        caption: str | None | Sequence[str | None],
        steps: int | None,
        seed: int | Sequence[int],
        t0: int | None,
    ) -> list[bytes]:
        count = len(images)
        bytes_of_quality = [quality_byte(q) for q in _each(quality, count, "quality")]
        seeds = _each(seed, count, "seed")
        pictures = [as_rgb(one, self.max_pixels) for one in images]
        fingerprint = self.fingerprint
        streams = [b""] * count
        with _threads(self.exact), torch.no_grad():
            captions = self._captions(pictures, _each(caption, count, "caption"))
            for group in self._batches([self._padded(p.height, p.width) for p in pictures]):
                x = torch.cat([self._pad(to_tensor(pictures[i])) for i in group])
                for i, z in zip(group, self.ldm.encode(x).split(1), strict=True):
                    q = bytes_of_quality[i] / 255
                    coder = RangeEncoder()
                    if captions[i]:
                        self._needs_prior().encode(coder, captions[i])
                    self.compressor.compress(z.float(), q, coder)
                    header = StreamHeader(
                        fingerprint,
                        bytes_of_quality[i],
                        *pictures[i].size,
                        caption=bool(captions[i]),
                        seed=seeds[i],
                        **self._diffusion_fields(q, t0, steps),
                    )
                    streams[i] = pack(header, coder.get_bytes())
        return streams

    def _decompress(self, streams: Sequence[bytes], steps: int | None) -> list[Image.Image]:
        images: dict[int, Image.Image] = {}
        with _threads(self.exact), torch.no_grad():
            decoded = self.read(streams)
            wanted = [item.report.steps if steps is None else steps for item in decoded]
            keys = [(item.z_hat.shape, item.report.t0, k) for item, k in zip(decoded, wanted, strict=True)]
            for group in self._batches(keys):
                reports = [decoded[i].report for i in group]
                z_tilde = self.ldm.enhance(
                    torch.cat([decoded[i].z_hat for i in group]),
                    [report.caption or "" for report in reports],
                    reports[0].t0,
                    wanted[group[0]],
                    [report.seed for report in reports],
                    self.compressor.config.guidance,
                )
                pictures = to_images(self.ldm.decode(z_tilde).float())
                for i, picture, report in zip(group, pictures, reports, strict=True):
                    images[i] = picture.crop((0, 0, report.width, report.height))
        return [images[i] for i in range(len(streams))]

    def _read_one(self, stream: bytes, fingerprint: int) -> Decoded:
        header, payload = unpack(stream, fingerprint, self.max_pixels)
        quality = header.quality / 255
        last = self.ldm.scheduler.config.num_train_timesteps - 1
        if header.t0 is not None and header.t0 > last:
            raise StreamError(f"The stream asks for t0 = {header.t0}; this diffusion model ends at {last}.")
        if header.steps is not None and header.steps > MAX_STEPS:
            raise StreamError(f"The stream asks for {header.steps} denoising steps; {MAX_STEPS} is the limit.")
        coder = _Meter(payload)
        caption = self._needs_prior().decode(coder) if header.caption else ""
        caption_bits = coder.bits
        height, width = self._padded(header.height, header.width)
        shape = height // self.ldm.factor, width // self.ldm.factor
        z_hat = self.compressor.decompress(coder, shape, quality).clone()  # out of inference mode
        h_bits, y_bits = coder.spent
        bits = {
            "header": 8.0 * (len(stream) - len(payload)),
            "caption": caption_bits,
            "hyper": float(h_bits.sum()),
            "latent": float(y_bits.sum()),
        }
        bits["rounding"] = 8.0 * len(stream) - sum(bits.values())
        stride = 2**self.compressor.config.stages
        t0 = self.compressor.config.t0(quality) if header.t0 is None else header.t0
        steps = self.compressor.config.steps if header.steps is None else header.steps
        report = StreamReport(
            len(stream),
            header.width,
            header.height,
            quality,
            caption or None,
            t0,
            steps,
            header.seed,
            bits,
            y_bits.reshape(-1, shape[0] // stride, shape[1] // stride).sum(0),
        )
        return Decoded(z_hat, report)

    def _captions(self, pictures: Sequence[Image.Image], wanted: Sequence[str | None]) -> list[str]:
        captions = ["" if text in (None, "auto") else normalise(text) for text in wanted]
        auto = [i for i, text in enumerate(wanted) if text == "auto"]
        for group in self._batches([pictures[i].size for i in auto]):
            ask = [auto[i] for i in group]
            cams = gradcam(self.machine, to_tensor([pictures[i] for i in ask]).to(self.ldm.device))
            crops = [roi_crop(pictures[i], cam) for i, cam in zip(ask, cams, strict=True)]
            for i, text in zip(ask, self.captioner.caption(crops), strict=True):
                captions[i] = text
        return captions

    def _diffusion_fields(self, quality: float, t0: int | None, steps: int | None) -> dict[str, int]:
        """What the header has to say about the enhancement: nothing if it is what the table says anyway."""
        config = self.compressor.config
        usual = {"t0": config.t0(quality), "steps": config.steps}
        asked = {
            "t0": usual["t0"] if t0 is None else t0,
            "steps": usual["steps"] if steps is None else steps,
        }
        self.ldm.times(**asked)  # raises on what the diffusion model cannot do
        if asked["steps"] > MAX_STEPS:
            raise ValueError(f"steps is {asked['steps']}; a stream may ask for {MAX_STEPS} at the most")
        return {} if asked == usual else asked

    def _padded(self, height: int, width: int) -> tuple[int, int]:
        """Sides rounded up to what VAE, compressor and UNet can halve."""
        unit = self.ldm.factor * self.compressor.config.multiple
        return -(-height // unit) * unit, -(-width // unit) * unit

    def _pad(self, x: Tensor) -> Tensor:
        """Repeat the last row and column: it costs fewer bits than black would, and bleeds no colour in."""
        height, width = self._padded(*x.shape[-2:])
        return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]), mode="replicate")

    def _batches(self, keys: Sequence[object]) -> Iterator[list[int]]:
        """Indices of items that may share a batch (equal keys); single ones if the codec is to be exact."""
        groups: dict[object, list[int]] = {}
        for i, key in enumerate(keys):
            groups.setdefault(key, []).append(i)
        size = 1 if self.exact else BATCH
        for members in groups.values():
            yield from (members[i : i + size] for i in range(0, len(members), size))

    def _needs_prior(self) -> CaptionPrior:
        if self.prior is None:
            raise ValueError("this codec has no caption prior: give it one, or compress with caption=None")
        return self.prior

    def _needs_scale(self, what: str) -> Scale:
        if self._scale is None:
            raise ValueError(f'this codec has no {what}: give it one, type a caption, or use caption=None, not "auto"')
        return self._scale


class _Meter(RangeDecoder):
    """A range decoder that notes what each symbol cost: first the hyper-latent's, then the latent's."""

    def __init__(self, data: bytes):
        super().__init__(data)
        self.spent: list[np.ndarray] = []

    def decode_table(self, rows: np.ndarray, table: FrequencyTable) -> np.ndarray:
        symbols = super().decode_table(rows, table)
        self.spent.append(RangeEncoder().encode_table(symbols, rows, table))  # coding again tells the price
        return symbols


@contextlib.contextmanager
def _threads(one: bool) -> Iterator[None]:
    """Hold torch to one thread: the order in which floating-point sums are taken depends on their number."""
    before = torch.get_num_threads()
    if one:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _each(value: T | Sequence[T], count: int, name: str) -> list[T]:
    """One value for each picture, from a list or from a single one."""
    if not isinstance(value, (list, tuple)):
        return [value] * count  # type: ignore[list-item]
    if len(value) != count:
        raise ValueError(f"{name}: {len(value)} values for {count} pictures")
    return list(value)
