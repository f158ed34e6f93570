"""What SLIM is compared with: the classic codecs, and a learned codec that works on pixels.

Classic codecs come as fair as we can make them: at any quality, or the best file within a budget. At 128 px
headers weigh: a JPEG spends some 290 bytes on them, more than half of its smallest file. So results are shown
twice, for whole files and for `payload_bytes`, which is generous: a decoder needs the headers too.

The learned baseline is a hyperprior on pixels (`PixelCodec`): SLIM's own compressor, fed with pixels in place of
latents, without VAE, UNet, captions or region of interest. assets/pocket/train.py trains it.
"""

from __future__ import annotations

import functools
import io
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from slimlib.compressor import LatentCompressor, quality_byte
from slimlib.entropy import RangeDecoder, RangeEncoder
from slimlib.images import to_images, to_tensor
from slimlib.stream import StreamHeader, pack, unpack

CODECS = ("jpeg", "webp", "avif", "jpegxl", "jpeg2000")
SCALES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)  # sizes that `best_within` tries, as a share of the picture's sides


def encode_classic(image: Image.Image, codec: str, quality: int) -> bytes:
    """A whole file of an RGB picture's bare pixels, encoded as well as Pillow knows how; ValueError if it cannot be.

    Args:
        codec: one of `CODECS`.
        quality: 0 to 100, as the codec understands it; for JPEG 2000 it sets the PSNR aimed at, 15 to 50 dB.
    """
    if codec not in CODECS or not 0 <= quality <= 100:
        raise ValueError(f"codec {codec!r}, quality {quality}: expected one of {', '.join(CODECS)}, and 0 to 100")
    decibels = {"quality_mode": "dB", "quality_layers": [15 + 0.35 * quality]}
    options: dict = {
        "jpeg": {"format": "JPEG", "quality": max(1, quality), "optimize": True},
        "webp": {"format": "WEBP", "quality": quality, "method": 6},
        "avif": {"format": "AVIF", "quality": quality, "speed": 4, "max_threads": 1},
        # Bare codestreams, without boxes. The highest quality of JPEG XL is a lossless mode that this encoder refuses.
        "jpegxl": {"format": "JXL", "quality": min(99, quality), "effort": 9, "num_threads": 1},
        "jpeg2000": {"format": "JPEG2000", "no_jp2": True, "irreversible": True, **decibels},
    }
    file = io.BytesIO()
    bare = Image.fromarray(np.asarray(image))  # Pillow would write a profile or Exif data along: thousands of bytes
    bare.save(file, **options[codec])
    return file.getvalue()


def decode_classic(data: bytes, size: tuple[int, int]) -> Image.Image:
    """What a file shows, enlarged (bicubic) to (width, height) where it was encoded smaller."""
    decoded = Image.open(io.BytesIO(data)).convert("RGB")
    return decoded if decoded.size == size else decoded.resize(size, Image.Resampling.BICUBIC)


def downscale(image: Image.Image, scale: float) -> Image.Image:
    """The picture at `scale` times its sides (bicubic), at least one pixel; itself if the scale is 1."""
    if scale == 1:
        return image
    sides = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(sides, Image.Resampling.BICUBIC)


def largest_within(encode: Callable[[int], bytes], top: int, size: int) -> bytes:
    """The file of the highest setting, 0 to `top`, that has at most `size` bytes; that of 0 if none has.

    Bisection: it takes for granted that files grow with the setting.
    """
    encode = functools.cache(encode)
    return encode(bisect_right(range(1, top + 1), size, key=lambda setting: len(encode(setting))))


def best_within(image: Image.Image, codec: str, size: int) -> tuple[bytes, Image.Image]:
    """Of all sizes that a classic codec may shrink a picture to, the file of at most `size` bytes with the least error.

    Headers count. Returns it with what it shows, at the original size; the smallest file where none is small enough.
    """

    def cost(file: tuple[bytes, Image.Image]) -> tuple[int, float]:
        error = np.asarray(file[1], np.float64) - np.asarray(image, np.float64)
        return max(0, len(file[0]) - size), float((error**2).mean())

    encoders = (functools.partial(encode_classic, downscale(image, scale), codec) for scale in SCALES)
    files = (largest_within(encode, 100, size) for encode in encoders)
    return min(((data, decode_classic(data, image.size)) for data in files), key=cost)


def payload_bytes(data: bytes, codec: str) -> int:
    """Bytes of a file from `encode_classic` that hold the picture itself: no headers, no tables, no container.

    JPEG: the scan. WebP: the VP8 chunk. AVIF: the `mdat` box. JPEG 2000: what follows the headers of its one tile-part.
    JPEG XL: all but the two bytes of its signature; what else it says ahead of the picture takes a few bits.
    """
    end = len(data) - 2  # JPEG and JPEG 2000 close with a mark
    if codec == "jpeg":  # the header of the scan tells its own length, but for the mark FF DA ahead of it
        start = data.rindex(b"\xff\xda") + 2
        return end - start - int.from_bytes(data[start : start + 2], "big")
    if codec == "webp":  # a chunk: its name, its size, its data
        start = data.index(b"VP8 ") + 4
        return int.from_bytes(data[start : start + 4], "little")
    if codec == "avif":  # a box: its size, which counts itself and the name, its name, its data
        start = data.index(b"mdat")
        return int.from_bytes(data[start - 4 : start], "big") - 8
    if codec == "jpeg2000":  # the tile-part's headers run from SOT (FF 90) up to SOD (FF 93)
        return end - data.index(b"\xff\x93", data.index(b"\xff\x90")) - 2
    return end


CONTRAST = 4.0  # pixels in [0, 1] are spread by this to about unit variance, which a latent has
PATCH = 4  # pixels along one side of a patch: 4 x 4 of three colours are 48 channels on the grid of SLIM's latent
COLOUR = torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / torch.tensor([[3.0], [2.0], [6.0]]).sqrt()
"""Orthonormal rows: brightness and two differences. It keeps squared errors as they are, and parts the colours."""


class PixelCodec:
    """A mean-scale hyperprior on pixels (Minnen et al., arXiv 1809.02736), one model for all rates.

    Transforms, gains, integer entropy model, range coder and header of the file are SLIM's own: a
    `LatentCompressor` on patches of pixels in place of a latent. It differs in what it lacks: no pretrained network
    stands around it, and the head that would learn the region of interest is switched off.
    """

    def __init__(self, compressor: LatentCompressor) -> None:
        """Raises ValueError if the compressor is not made for patches of pixels."""
        config = compressor.config
        if (config.latent_channels, config.factor) != (3 * PATCH**2, PATCH):
            wanted = f"a pixel codec needs a compressor with latent_channels={3 * PATCH**2} and factor={PATCH}"
            raise ValueError(f"{wanted}; this one has {config.latent_channels} and {config.factor}")
        self.compressor, self._unit = compressor, config.multiple * PATCH  # sides that the networks see, in pixels

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device | None = None) -> PixelCodec:
        """Load config.json and model.safetensors, strictly (see `LatentCompressor.from_pretrained` for the errors)."""
        return cls(LatentCompressor.from_pretrained(folder, device))

    def compress(self, image: Image.Image, quality: float) -> bytes:
        """An RGB picture as a file with the header of a .slim stream, 7 bytes at 128 px; the quality is 0 to 1."""
        return self.encode(image, quality)[0]

    def encode(self, image: Image.Image, quality: float) -> tuple[bytes, dict[str, Tensor]]:
        """What `compress` does, and what each symbol costs in bits: "y" (128, h, w) and "h" (8, h/2, w/2)."""
        x, coder = to_tensor(image), RangeEncoder()
        x = F.pad(x, (0, -image.width % self._unit, 0, -image.height % self._unit), mode="replicate")
        bits = self.compressor.compress(to_patches(x), quality, coder)
        header = StreamHeader(self._fingerprint, quality_byte(quality), *image.size)
        return pack(header, coder.get_bytes()), bits

    def decompress(self, data: bytes) -> Image.Image:
        """The picture that `compress` stored; StreamError if the bytes are damaged, or of other weights."""
        header, payload = unpack(data, self._fingerprint)
        rows, columns = (-(-side // self._unit) * self._unit // PATCH for side in (header.height, header.width))
        z_hat = self.compressor.decompress(RangeDecoder(payload), (rows, columns), header.quality / 255)
        return to_images(from_patches(z_hat))[0].crop((0, 0, header.width, header.height))

    @functools.cached_property
    def _fingerprint(self) -> int:
        return self.compressor.fingerprint()


def to_patches(x: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] to patches (B, 48, H/4, W/4) of brightness and two colour differences.

    Squared errors grow by CONTRAST squared, and are otherwise those of the pixels.
    """
    return F.pixel_unshuffle(CONTRAST * torch.einsum("dc,bchw->bdhw", COLOUR.to(x.device), x - 0.5), PATCH)


def from_patches(z: Tensor) -> Tensor:
    """Inverse of `to_patches`, clipped to [0, 1]; differentiable."""
    planes = F.pixel_shuffle(z, PATCH)
    return (torch.einsum("dc,bdhw->bchw", COLOUR.to(z.device), planes) / CONTRAST + 0.5).clamp(0, 1)
