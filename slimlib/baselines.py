"""The classic codecs, as fair as we can make them: at any quality, or the file nearest to a budget.

At 128 px headers weigh: a JPEG spends some 290 bytes on them, more than half of its smallest file. So results
are shown twice, for whole files and for `payload_bytes`, which is generous: a decoder needs the headers too.
"""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image, features

CODECS = ("jpeg", "webp", "avif", "jpeg2000")
SCALES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)
"""Sizes that `nearest_size` tries when it may downscale."""


def encode_classic(image: Image.Image, codec: str, quality: int) -> bytes:
    """A whole file, encoded as well as Pillow knows how.

    Args:
        image: RGB.
        codec: one of `CODECS`.
        quality: 0 to 100, as the codec understands it; for JPEG 2000 it sets the PSNR aimed at, 15 to 50 dB.

    Raises:
        ValueError: no such codec or quality, or this Pillow was built without it.
    """
    _check(codec)
    if not 0 <= quality <= 100:
        raise ValueError(f"quality is {quality}; expected 0 to 100")
    file = io.BytesIO()
    if codec == "jpeg":
        image.save(file, "JPEG", quality=max(1, quality), optimize=True)
    elif codec == "webp":
        image.save(file, "WEBP", quality=quality, method=6)
    elif codec == "avif":
        image.save(file, "AVIF", quality=quality, speed=4, max_threads=1)
    else:  # a bare codestream, without the boxes of a .jp2 file
        layers = [15 + 0.35 * quality]
        image.save(file, "JPEG2000", no_jp2=True, irreversible=True, quality_mode="dB", quality_layers=layers)
    return file.getvalue()


def nearest_size(
    image: Image.Image, codec: str, target_bytes: int, downscale: bool = False
) -> tuple[bytes, Image.Image]:
    """The file whose size comes nearest to a budget, and what it decodes to, at the original size.

    Args:
        image: RGB.
        codec: one of `CODECS`.
        target_bytes: the budget, headers and all. The codec may be unable to go so low: see what comes back.
        downscale: may encode a smaller picture and enlarge it after decoding (bicubic both ways; the size to
            enlarge to is not counted). Of the sizes that come within 10% of the budget, the one with the
            least squared error; if none does, the nearest.

    Raises:
        ValueError: as for `encode_classic`, or a budget below one byte.
    """
    if target_bytes < 1:
        raise ValueError(f"the budget is {target_bytes} bytes; expected at least 1")
    candidates = [_nearest_quality(image, codec, target_bytes, s) for s in (SCALES if downscale else (1.0,))]
    fitting = [c for c in candidates if abs(len(c[0]) - target_bytes) <= 0.1 * target_bytes]
    if not fitting:
        return min(candidates, key=lambda c: abs(len(c[0]) - target_bytes))
    original = np.asarray(image, np.float64)
    return min(fitting, key=lambda c: float(((np.asarray(c[1], np.float64) - original) ** 2).mean()))


def payload_bytes(data: bytes, codec: str) -> int:
    """Bytes of a file that hold the picture itself: no headers, no tables, no container.

    JPEG: the entropy-coded scans. WebP: the VP8 chunk. AVIF: the `mdat` box. JPEG 2000: the tile-parts' data.

    Raises:
        ValueError: the bytes are no file of that codec.
    """
    _check(codec)
    try:
        return {"jpeg": _jpeg, "webp": _webp, "avif": _avif, "jpeg2000": _jpeg2000}[codec](data)
    except (IndexError, _NotOne) as error:
        raise ValueError(f"these bytes are no {codec} file, or it is cut") from error


class _NotOne(Exception):
    """The bytes are not what they should be."""


def _check(codec: str) -> None:
    if codec not in CODECS:
        raise ValueError(f"unknown codec {codec!r}: expected one of {', '.join(CODECS)}")
    name = {"jpeg": "jpg", "jpeg2000": "jpg_2000"}.get(codec, codec)
    if not features.check(name):
        raise ValueError(f"this Pillow was built without {codec}; install the wheel from PyPI")


def _nearest_quality(image: Image.Image, codec: str, target: int, scale: float) -> tuple[bytes, Image.Image]:
    """Bisection over the quality, then the nearest of the neighbours (sizes are not quite monotone)."""
    small = image
    if scale != 1:
        sides = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        small = image.resize(sides, Image.Resampling.BICUBIC)
    encode = functools.cache(lambda quality: encode_classic(small, codec, quality))
    low, high = 0, 100
    while low < high:
        middle = (low + high) // 2
        if len(encode(middle)) < target:
            low = middle + 1
        else:
            high = middle
    best = min((encode(q) for q in range(max(0, low - 2), min(100, low + 1) + 1)), key=lambda d: abs(len(d) - target))
    decoded = Image.open(io.BytesIO(best)).convert("RGB")
    return best, decoded if decoded.size == image.size else decoded.resize(image.size, Image.Resampling.BICUBIC)


def _jpeg(data: bytes) -> int:
    """Walk the marker segments; count from the end of each scan header to the next true marker."""
    at, total = 2, 0
    if data[:2] != b"\xff\xd8":
        raise _NotOne
    while data[at + 1] != 0xD9:  # until the end of the image
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at] != 0xFF or length < 2:
            raise _NotOne
        at += 2 + length
        if marker == 0xDA:  # start of scan: data follow; FF 00 is a stuffed byte, FF D0 to D7 restart marks
            start = at
            while data[at] != 0xFF or data[at + 1] == 0 or 0xD0 <= data[at + 1] <= 0xD7:
                at += 1
            total += at - start
    return total


def _webp(data: bytes) -> int:
    """RIFF chunks: a name, a little-endian size, the data, padded to an even number of bytes."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        raise _NotOne
    at = 12
    while data[at : at + 4] not in (b"VP8 ", b"VP8L"):
        at += 8 + int.from_bytes(data[at + 4 : at + 8], "little") + 1 & ~1
        if at >= len(data):
            raise _NotOne
    return _whole(data, at + 8, int.from_bytes(data[at + 4 : at + 8], "little"))


def _avif(data: bytes) -> int:
    """ISO boxes: a big-endian size that counts itself, a name, the data."""
    if data[4:8] != b"ftyp":
        raise _NotOne
    at = 0
    while data[at + 4 : at + 8] != b"mdat":
        at += max(8, int.from_bytes(data[at : at + 4], "big"))
        if at >= len(data):
            raise _NotOne
    return _whole(data, at + 8, int.from_bytes(data[at : at + 4], "big") - 8)


def _whole(data: bytes, start: int, size: int) -> int:
    """`size`, if there are so many bytes."""
    if start + size > len(data):
        raise _NotOne
    return size


def _jpeg2000(data: bytes) -> int:
    """Tile-parts: from SOT (FF 90, with the tile-part's length) the headers run up to SOD (FF 93)."""
    at, total = data.find(b"\xff\x90"), 0
    if data[:4] != b"\xff\x4f\xff\x51" or at < 0:
        raise _NotOne
    while data[at : at + 2] == b"\xff\x90":
        length = int.from_bytes(data[at + 6 : at + 10], "big")
        start = data.find(b"\xff\x93", at) + 2
        if start == 1 or at + length > len(data):
            raise _NotOne
        total += at + length - start
        at += max(length, 1)
    return total
