"""Pictures in: whatever Pillow opens becomes upright 8-bit RGB, or is refused with a reason."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import re
import warnings
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias
from zlib import crc32

import numpy as np
import pillow_jxl  # noqa: F401 (teaches Pillow JPEG XL)
import torch
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin, UnidentifiedImageError, _imaging
from torch import Tensor

from slimlib.stream import padded

with contextlib.suppress(ImportError):  # optional: HEIC, what many telephones write
    import pillow_heif

    pillow_heif.register_heif_opener()

TiffImagePlugin.logger.disabled = True  # of damage it says something on stderr, as libtiff does: it is raised as well
with contextlib.suppress(AttributeError, OSError):
    ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)

MAX_PIXELS = 1 << 20
"""Largest picture by default, 1024 x 1024: it takes a processor core a minute and 2 GB, and larger ones far more."""

Picture: TypeAlias = "Image.Image | str | Path | bytes | bytearray | memoryview | BinaryIO"
"""A picture in memory, the path of one, or a file's bytes, which may come from a pipe."""

TURNS = dict(zip(range(2, 9), [Image.Transpose(turn) for turn in (0, 3, 1, 5, 4, 6, 2)], strict=True))
METADATA = (b"ICC_PROFILE\0", b"ICCP", b"http://ns.adobe.com/", b"XMP ", b"Photoshop 3.0\0", b"MPF\0", b"JFIF\0")
"""Names under which JPEG, WebP and AVIF keep what makes no pixels, but for EXIF."""
EXIF = (b"Exif", b"EXIF", b"\x69\x87\4\0", b"\x87\x69\0\4", b"\x25\x88\4\0", b"\x88\x25\0\4")
"""Names of EXIF: there, and as tags of TIFF in both orders of bytes."""
LARGEST_FILE = 1 << 28  # bytes in which damaged metadata are looked for
JXL_SIZE = re.compile(rb"(?s)(?:\A|jxlc|jxlp.{4})\xff\x0a(.{,9})")  # behind it a JPEG XL file, or a box, says its size
HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # brands behind "ftyp"


class _Refused(ValueError):
    """A picture that can be read, and is refused for a reason that its reader gives in full."""


def as_rgb(
    image: Picture, max_pixels: int = MAX_PIXELS, name: str = "", longest: int = 0, unit: int = 1
) -> Image.Image:
    """Whatever Pillow opens, as an upright 8-bit RGB picture. The one rule: **the first frame, on white**.

    Of an animation or a file of many pages the first is taken (of an opened one the frame at hand). Transparency of
    every kind (alpha, a transparent colour or grey, a palette's) is laid on white. 16-bit greys are scaled to 8 bits;
    of 16-bit colours Pillow keeps the upper 8. The orientation that EXIF, XMP or the format itself gives is applied
    once. CMYK and other models are converted by Pillow's formulas; colour profiles are not applied. Damaged metadata
    (EXIF, XMP, profiles, texts) is passed over.

    Args:
        max_pixels: refuse larger pictures before they are decoded; their sides count rounded up to multiples of `unit`.
        name: what to call it in messages; a file's own name otherwise.
        longest: where given, scale down to at most so many pixels a side.

    Raises:
        OSError: the path cannot be opened, such as FileNotFoundError.
        ValueError: no picture, a damaged one, more than `max_pixels`, or a mode without a known range.
    """
    if isinstance(image, (str, os.PathLike)):
        with open(image, "rb") as file:
            return as_rgb(file, max_pixels, name, longest, unit)
    with contextlib.suppress(TypeError):  # what is bytes-like is a file's bytes, unless it is a picture's own rows
        image = io.BytesIO(view.tobytes()) if (view := memoryview(image)).ndim == 1 else image  # type: ignore[arg-type]
    if not isinstance(image, Image.Image) and (not hasattr(image, "read") or isinstance(image, io.TextIOBase)):
        raise TypeError(f"expected a Pillow image, a path, or bytes or a file of them, not {type(image).__name__}")
    name = name or str(getattr(image, "filename", "") or getattr(image, "name", "") or "the picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, and of sizes: max_pixels is far stricter
            read: Any = _upright if isinstance(image, Image.Image) else _from_file
            return read(image, max_pixels, name, longest, unit)
    except (_Refused, MemoryError):  # the latter is the machine's fault, not the picture's
        raise
    except Exception as error:  # a decoder may raise anything
        why = " ".join(str(error).split()) or type(error).__name__
        why = "it is not a picture" if isinstance(error, UnidentifiedImageError) else why
        raise ValueError(
            f"{name} cannot be opened: {why} (if a viewer shows it, save it anew from there as PNG or JPEG)"
        ) from error


def _from_file(file: Any, *how: Any) -> Image.Image:
    """`_upright` of a file; where that fails, of what is left of it without its metadata."""
    if not getattr(file, "seekable", bool)():  # a pipe, or what can do no more: a read may give less than is asked for
        file = io.BytesIO(b"".join(iter(lambda: file.read(1 << 16), b"")))
    start = file.read(12)
    if start.startswith(b"\xff\x0a") or start[4:7] == b"JXL":
        for size in JXL_SIZE.findall(start + file.read(LARGEST_FILE)):
            _admit(*_jxl_size(size), *how)  # here, for its plugin decodes all pixels to tell how many there are
    file.seek(0)
    try:
        return _upright(Image.open(file), *how)
    except (_Refused, MemoryError):
        raise
    except Exception as error:
        file.seek(0)
        data = file.read(LARGEST_FILE)
        if data[4:8] == b"ftyp" and data[8:12] in HEIC and "HEIF" not in Image.OPEN:
            raise ValueError("HEIC needs a plugin, `pip install pillow-heif`") from error
        for names in (METADATA, METADATA + EXIF):
            with contextlib.suppress(Exception):
                left = Image.open(io.BytesIO(_without(data, names)))
                if names != METADATA and left.format in ("JPEG", "WEBP"):
                    left.getexif()[ExifTags.Base.Orientation] = _orientation(data)
                return _upright(left, *how)
        raise


def _jxl_size(start: bytes) -> tuple[int, int]:
    """Width and height as a JPEG XL codestream begins with them (ISO/IEC 18181-1, SizeHeader)."""
    bits = iter(f"{int.from_bytes(start, 'little'):072b}"[::-1])

    def take(count: int) -> int:
        return int("".join(islice(bits, count))[::-1], 2)

    eighths = take(1)
    sides = (8 * take(5) + 8 if eighths else take((9, 13, 18, 30)[take(2)]) + 1 for _ in range(2))
    height, ratio = next(sides), take(3)
    up, down = ((1, 1), (6, 5), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio - 1]
    return (height * up // down if ratio else next(sides)), height


def _without(data: bytes, names: tuple[bytes, ...]) -> bytes:
    """A file whose metadata of these names no decoder knows; of a PNG all that makes no pixels is left out."""
    if data.startswith(b"\x89PNG"):
        kept, at = bytearray(data[:8]), 8
        while at < len(data):
            chunk = data[at : at + 12 + int.from_bytes(data[at : at + 4], "big")]
            sound = chunk[4:8] == b"eXIf" and crc32(chunk[4:-4]).to_bytes(4, "big") == chunk[-4:]
            if sound or chunk[4:8] in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
                kept += chunk
            at += len(chunk)
        return bytes(kept)
    for name in names:
        data = data.replace(name, bytes([name[0] ^ 1]) + name[1:])
    return data


def _orientation(data: bytes) -> int:
    """What a file's EXIF says of it, as far as it can be read; 1 for upright."""
    exif = Image.Exif()
    with contextlib.suppress(Exception):
        start = re.search(rb"(?si)Exif.{,8}?(II\*\0|MM\0\*)", data)
        exif.load(data[start.start(1) :] if start else b"")
    return exif.get(ExifTags.Base.Orientation, 1)


def _admit(width: int, height: int, max_pixels: int, name: str, longest: int, unit: int) -> None:
    if not 0 < (pixels := padded(width, height, unit)) <= max_pixels:
        raise _Refused(
            f"{name} has {width} x {height} pixels{f', coded as {pixels}' * (unit > 1)}, none or more than "
            f"the limit of {max_pixels}: make it smaller first, or raise max_pixels (at the shell: --max-pixels)"
        )


def _upright(image: Image.Image, max_pixels: int, name: str, longest: int, unit: int) -> Image.Image:
    """An opened picture as RGB on white, turned as its orientation says."""
    _admit(*image.size, max_pixels, name, longest, unit)
    if longest:
        image.draft(None, (longest, longest))  # a large JPEG is decoded at a fraction of its size
    tile: Any = image.tile[0] if isinstance(image, ImageFile.ImageFile) and image.tile else None
    depth = getattr(tile, "args", None)
    depth = depth[0] if isinstance(depth, tuple) and depth else depth
    image.load()
    orientation = 1
    # JPEG XL turns its pixels itself, and may say so in EXIF once more; a JPEG inside of it is left as it was.
    if image.format != "JXL" or getattr(image, "jpeg", False):
        with contextlib.suppress(Exception):
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    rgb = _on_white(image, depth)
    if tile and image.format == "GIF" and not image.tell():  # the first frame may cover a part of the picture
        covered, rgb = rgb.crop(tile.extents), Image.new("RGB", rgb.size, "white")
        rgb.paste(covered, tile.extents)
    if orientation in TURNS:
        rgb = rgb.transpose(TURNS[orientation])
    if longest:
        rgb.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return rgb


def _on_white(image: Image.Image, depth: Any) -> Image.Image:
    """A loaded picture of any mode as RGB; `depth` is how its decoder read the samples, such as "L;2"."""
    key = image.info.get("transparency")  # of a PNG in the file's own samples, which Pillow has scaled
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed white; convert them to 8 or 16 bits first")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        values = values * 65535 // 4095 if depth == "I;12" else values
        if image.mode != "I" and getattr(image, "tag_v2", {}).get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
            values = 65535 - values  # zero is white, which Pillow heeds up to 8 bits
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit pixels beyond 0 to 65535 have no agreed white; convert them to 16 bits first")
        grey = np.where(values == (-1 if key is None else key), 255, (values + 128) // 257)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if depth in ("L;2", "L;4") and isinstance(key, int):
        image.info["transparency"] = key * {"L;2": 85, "L;4": 17}[depth]
    elif depth == "RGB;16B" and isinstance(key, tuple):
        image.info["transparency"] = tuple(sample >> 8 for sample in key)
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")  # Pillow knows no shorter way
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def to_tensor(images: Image.Image | list[Image.Image]) -> Tensor:
    """RGB pictures of one size as a float tensor (B, 3, H, W) in [0, 1]."""
    images = images if isinstance(images, list) else [images]
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def to_images(x: Tensor) -> list[Image.Image]:
    """The reverse of `to_tensor`: (B, 3, H, W) in [0, 1], clipped, to RGB pictures; ValueError if not finite."""
    check_finite(x, "the picture")
    pixels = (x.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]


def check_finite(x: Tensor, what: str) -> None:
    """ValueError with advice if numbers have left the range of their precision."""
    if not bool(x.isfinite().all()):
        raise ValueError(
            f"{what} holds numbers that are not finite: the weights are damaged, or half precision is too narrow for "
            "them; load the codec with dtype=torch.float32 (or torch.bfloat16), and download damaged weights again"
        )
