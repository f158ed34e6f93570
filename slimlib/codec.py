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
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from PIL import Image
from torch import Tensor

from slimlib.caption import CAPTION_PRIOR, Captioner, CaptionPrior, normalise
from slimlib.compressor import LatentCompressor, quality_byte
from slimlib.entropy import RangeDecoder, RangeEncoder
from slimlib.images import MAX_PIXELS, Picture, as_rgb, to_images, to_tensor
from slimlib.ldm import LatentDiffusion, last
from slimlib.roi import object_box
from slimlib.scales import Scale
from slimlib.stream import LARGEST_IMAGE, StreamError, StreamHeader, as_bytes, pack, unpack
from slimlib.utils import Device, pick_device

MAX_STEPS = 100
"""Most denoising steps that a stream may ask for: a few bytes must not keep a decoder busy for hours."""


@dataclass(frozen=True)
class StreamReport:
    """What a stream holds, and what its parts cost. Print it to read it."""

    size: int  # bytes in all
    width: int  # of the picture, in pixels
    height: int
    quality: float  # in [0, 1], as stored (steps of 1/255)
    caption: str | None
    t0: int  # what the decoder will do, whether stored or the compressor's default: noise level,
    steps: int  # denoising steps,
    seed: int  # seed of the noise
    # Bits of header, caption, hyper-latent ("hyper"), latent, and "rounding", what the range coder adds or saves by
    # ending on a whole byte: 8 * size in all.
    bits: dict[str, float]
    bit_map: np.ndarray = field(repr=False, compare=False)  # bits of each cell of y's grid, (rows, columns)

    @property
    def bpp(self) -> float:
        """Bits per pixel of the true picture, everything counted."""
        return 8 * self.size / (self.width * self.height)

    def __str__(self) -> str:
        repaired = f"enhancement from t0 = {self.t0} in {self.steps} steps, seed {self.seed}"
        lines = [
            f"{self.size} bytes, {self.bpp:.4f} bpp, {self.width} x {self.height} pixels",
            f"quality {self.quality:.3f}, caption " + (f'"{self.caption}"' if self.caption else "none"),
            repaired if self.t0 and self.steps else "no enhancement",
        ]
        for part, bits in self.bits.items():
            size, share = round(bits / 8, 1) + 0.0, round(bits / (8 * self.size), 3) + 0.0  # no "-0.0"
            lines.append(f"  {part:<8} {size:8.1f} bytes {share:6.1%} {'#' * round(30 * share)}".rstrip())
        return "\n".join(lines)


@dataclass(frozen=True)
class Decoded:
    """What a stream holds before any diffusion: the decompressed latent z_hat (1, C, h, w), and the rest."""

    z_hat: Tensor
    report: StreamReport


class SlimCodec:
    """The whole codec.

    Encoder and decoder agree exactly on the symbols, on any machine. Pixels are floating-point work: with
    `exact` (the default) they go through one thread, so that the same stream gives the same pixels, and the same
    picture the same stream, however many threads there are. Without it all threads are used, and guidance is one
    pass: faster, and a pixel value may differ by one now and then. Several threads may use codecs at once: the verbs,
    `read` and `look` wait for each other, of all codecs of the process.
    """

    def __init__(
        self,
        ldm: LatentDiffusion,
        compressor: LatentCompressor,
        prior: CaptionPrior | None = None,
        captioner: Captioner | None = None,
        exact: bool = True,
    ):
        """Put a codec together from loaded parts; `from_pretrained` is the usual way.

        A prior is needed for any caption, a captioner for caption="auto" only. ValueError if diffusion model and
        compressor are not made for each other, as their shapes tell.
        """
        config = compressor.config
        if config.latent_channels != ldm.latent_channels or config.factor != ldm.factor:
            raise ValueError(
                f"the compressor is made for latents of {config.latent_channels} channels and stride "
                f"{config.factor}; this model has {ldm.latent_channels} and {ldm.factor}"
            )
        self.ldm, self.compressor, self.prior = ldm, compressor, prior
        self.exact, self.max_pixels = exact, MAX_PIXELS  # larger pictures are refused
        self._captioner_name = ""
        if captioner is not None:
            self.captioner = captioner

    @classmethod
    def from_pretrained(
        cls, name: str | Path | Scale = "pocket", device: Device = None, exact: bool = True, dtype: Any = torch.float32
    ) -> SlimCodec:
        """Load a codec, with adapters of the UNet beside the compressor; the captioner follows when it is needed.

        Args:
            name: "pocket", "paper", a folder laid out like assets/pocket, or a `Scale`.
            dtype: precision in which the diffusion model computes, such as torch.bfloat16.

        Raises:
            ValueError: no such scale, or weights that do not fit.
            FileNotFoundError: a part is missing.
        """
        scale, device = name if isinstance(name, Scale) else Scale.from_name(name), pick_device(device)
        compressor = LatentCompressor.from_pretrained(scale.compressor, device)
        prior = CaptionPrior.load(Path(scale.compressor) / CAPTION_PRIOR)
        ldm = LatentDiffusion.from_pretrained(scale.ldm, scale.variant, device, dtype)
        if (adapters := Path(scale.compressor) / "unet_lora").is_dir():
            ldm.stored = hashlib.sha256(ldm.fingerprint() + (adapters / LORA_WEIGHT_NAME_SAFE).read_bytes()).digest()
            ldm.unet.load_lora_adapter(adapters, prefix=None, weight_name=LORA_WEIGHT_NAME_SAFE)
        codec = cls(ldm, compressor, prior, exact=exact)
        codec._captioner_name = scale.captioner
        return codec

    @functools.cached_property
    def captioner(self) -> Captioner:
        """The captioner, loaded on first use."""
        if not self._captioner_name:
            raise ValueError("this codec has no captioner: give it one, or type a caption, or use caption=None")
        return Captioner.from_pretrained(self._captioner_name, device=self.ldm.device)

    @functools.cached_property
    def fingerprint(self) -> int:
        """16 bits over everything that decoding needs: compressor, caption prior, diffusion model.

        Taken once: a codec's weights are frozen. After changing them in place put a new SlimCodec together.
        """
        parts = self.compressor.fingerprint().to_bytes(2, "big") + self.ldm.fingerprint()
        hashed = hashlib.sha256(parts + (self.prior.fingerprint() if self.prior else b""))
        return int.from_bytes(hashed.digest()[:2], "big")

    def compress(
        self,
        image: Picture,
        quality: float = 0.5,
        caption: str | None = "auto",
        steps: int | None = None,
        seed: int = 0,
        t0: int | None = None,
    ) -> bytes:
        """Picture to .slim bytes.

        Args:
            image: a picture, a file's path or its bytes; `images.as_rgb` says what becomes of other modes.
            quality: 0 (smallest) to 1 (best).
            caption: "auto" lets the captioner look at the region of interest; any other text is sent as typed
                (lower-cased, up to 200 characters); None or "" sends none.
            steps: denoising steps that the decoder is to take; 0 for no enhancement. None: the compressor's
                default, which costs no bytes.
            seed: of the decoder's noise, 0 to 2**32 - 1; 0 costs no bytes.
            t0: noise level that the decoder starts from. None: the compressor's table for this quality.

        Raises:
            ValueError: the picture is damaged, too large or of no known kind; an argument is out of range.
        """
        with _LOCK:  # warnings' filters, too, belong to the process
            picture = as_rgb(image, min(self.max_pixels, LARGEST_IMAGE), unit=self._unit)
        byte, coder = quality_byte(quality), RangeEncoder()
        walk = self.compressor.config.walk(byte / 255)
        t0, steps = walk.t0 if t0 is None else t0, walk.steps if steps is None else steps
        self.ldm.times(t0, steps)  # raises on what the diffusion model cannot do
        if steps > MAX_STEPS:
            raise ValueError(f"steps is {steps}; a stream may ask for {MAX_STEPS} at the most")
        with _threads(self.exact), torch.no_grad():
            z = self.encode(picture)
            words = self.look(picture, z, byte / 255)[1] if caption == "auto" else normalise(caption or "")
            if words:
                self._prior().encode(coder, words)
            self.compressor.compress(z, byte / 255, coder)
        asked = {} if (t0, steps) == walk[:2] else {"t0": t0, "steps": steps}  # the usual goes without saying
        header = StreamHeader(self.fingerprint, byte, *picture.size, caption=bool(words), seed=seed, **asked)
        return pack(header, coder.get_bytes())

    def decompress(self, stream: bytes, steps: int | None = None) -> Image.Image:
        """.slim bytes to a picture of the true size.

        Args:
            stream: what `compress` returned, or anything bytes-like that holds it.
            steps: denoising steps; None takes those the stream asks for, 0 shows the picture before the UNet.

        Raises:
            StreamError: the stream is damaged, or of another program, version or set of weights.
        """
        decoded = self.read(stream)
        with _threads(self.exact), torch.no_grad():
            x_hat = self.ldm.decode(last(self.enhance(decoded, steps), decoded.z_hat)).float()
        return to_images(x_hat)[0].crop((0, 0, decoded.report.width, decoded.report.height))

    def inspect(self, stream: bytes) -> StreamReport:
        """What a stream holds, and what its parts cost; raises as `decompress` does."""
        return self.read(stream).report

    def encode(self, picture: Image.Image) -> Tensor:
        """The scaled latent (1, C, h, w) of an RGB picture, its sides filled up to what the networks can halve."""
        x = to_tensor(picture)
        height, width = self._padded(*x.shape[-2:])
        # Repeating the last row and column costs fewer bits than black would, and bleeds no colour in.
        x = F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]), mode="replicate")
        with _threads(self.exact), torch.no_grad():
            return self.ldm.encode(x).float()

    def region(self, picture: Image.Image, z: Tensor, quality: float) -> Tensor:
        """Where the compressor sees the object in a picture with latent z, (1, H, W) in [0, 1]."""
        with _threads(self.exact), torch.no_grad():
            cells = F.interpolate(self.compressor.region(z, quality), scale_factor=self.ldm.factor, mode="bilinear")
            return cells[0, :, : picture.height, : picture.width]

    def look(self, picture: Image.Image, z: Tensor, quality: float) -> tuple[Tensor, str]:
        """`region`, and words for it; none where the captioner is not sure enough: a wrong word does more harm."""
        region = self.region(picture, z, quality)
        with _threads(self.exact), torch.no_grad():
            text, chance = self.captioner.describe([picture.crop(object_box(region))])[0]
        return region, text if chance >= self.captioner.floor else ""

    def read(self, stream: bytes) -> Decoded:
        """Undo the entropy coding and the compressor only: the latent as it enters the diffusion."""
        header, payload = unpack(stream := as_bytes(stream), self.fingerprint, self.max_pixels, self._unit)
        config, coder, quality = self.compressor.config, RangeDecoder(payload), header.quality / 255
        asked: Any = header.t0, header.steps  # both or neither
        t0, steps = config.walk(quality)[:2] if header.t0 is None else asked
        if t0 > (latest := self.ldm.scheduler.config.num_train_timesteps - 1):
            raise StreamError(f"The stream asks for t0 = {t0}; this diffusion model ends at {latest}.")
        if steps > MAX_STEPS:
            raise StreamError(f"The stream asks for {steps} denoising steps; {MAX_STEPS} is the limit.")
        caption = self._prior().decode(coder) if header.caption else ""
        bits = {"header": 8.0 * (len(stream) - len(payload)), "caption": coder.bits}
        rows, columns = (side // self.ldm.factor for side in self._padded(header.height, header.width))
        with _threads(self.exact), torch.no_grad():
            z_hat = self.compressor.decompress(coder, (rows, columns), quality).clone()  # out of inference mode
        h_bits, y_bits = coder.spent  # in the order of the stream
        bits |= {"hyper": float(h_bits.sum()), "latent": float(y_bits.sum())}
        bits["rounding"] = 8.0 * len(stream) - sum(bits.values())
        bit_map = y_bits.reshape(-1, rows >> config.stages, columns >> config.stages).sum(0)
        shown = len(stream), header.width, header.height, quality, caption or None, t0, steps, header.seed
        return Decoded(z_hat, StreamReport(*shown, bits, bit_map))

    def enhance(self, decoded: Decoded, steps: int | None = None, batched: bool = False) -> Iterator[Tensor]:
        """The latent after each denoising step that the stream asks for, or of `steps`; batched, as if not `exact`."""
        report = decoded.report
        guidance, batched = self.compressor.config.walk(report.quality).guidance, batched or not self.exact
        words, steps = [report.caption or ""], report.steps if steps is None else steps
        return self.ldm.enhance(decoded.z_hat, words, report.t0, steps, [report.seed], guidance, batched)

    @property
    def _unit(self) -> int:
        """Pixels to whose multiples the sides are padded: what VAE, compressor and UNet can halve."""
        return self.ldm.factor * self.compressor.config.multiple

    def _padded(self, *sides: int) -> list[int]:
        return [-(-side // self._unit) * self._unit for side in sides]

    def _prior(self) -> CaptionPrior:
        if self.prior is None:
            raise ValueError("this codec has no caption prior: give it one, or compress with caption=None")
        return self.prior


_LOCK = threading.RLock()  # the number of torch's threads, hooks and tokenizers belong to the process


@contextlib.contextmanager
def _threads(one: bool) -> Iterator[None]:
    """Hold torch to one thread: the order in which floating-point sums are taken depends on their number."""
    with _LOCK:
        before = torch.get_num_threads()
        torch.set_num_threads(1 if one else before)
        try:
            yield
        finally:
            torch.set_num_threads(before)
