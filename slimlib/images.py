"""Pictures in: whatever Pillow opens becomes upright 8-bit RGB, or is refused with a reason."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

MAX_PIXELS = 1 << 20
"""Largest picture by default, 1024 x 1024: it takes a processor core a minute and 2 GB, and larger ones far more."""

Picture = Image.Image | str | Path
"""A picture in memory, or the path of one."""


def as_rgb(image: Picture, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Whatever Pillow opens, as an upright 8-bit RGB picture.

    EXIF rotation is applied. Transparency is laid on white. 16-bit greys are scaled to 8 bits. Of an
    animation the frame at hand is taken: the first, unless the caller went on. CMYK and other models are
    converted by Pillow's formulas; colour profiles are not applied.

    Raises:
        FileNotFoundError: a path that is not there.
        ValueError: no picture, a damaged one, more than `max_pixels`, or a mode without a known range.
    """
    try:
        if isinstance(image, (str, Path)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels is far stricter
                image = Image.open(image)
        if not isinstance(image, Image.Image):
            raise TypeError(f"expected a Pillow image or the path of one, not {type(image).__name__}")
        if not 0 < image.width * image.height <= max_pixels:
            raise ValueError(
                f"the picture has {image.width} x {image.height} pixels, none or more than the limit of {max_pixels}: "
                "make it smaller first, or raise max_pixels"
            )
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("floating-point pixels have no agreed white; convert them to 8 or 16 bits first")
        if image.mode == "I" or image.mode.startswith("I;16"):
            values = np.asarray(image).astype(np.int64)
            if values.min() < 0 or values.max() > 65535:
                raise ValueError("32-bit pixels beyond 0 to 65535 have no agreed white; convert them to 16 bits first")
            return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
        if image.has_transparency_data:
            image = image.convert("LA") if image.mode == "La" else image  # Pillow knows no shorter way
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return image.convert("RGB")
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"the picture cannot be read: {error}") from error


def to_tensor(images: Image.Image | list[Image.Image]) -> Tensor:
    """RGB pictures of one size as a float tensor (B, 3, H, W) in [0, 1]."""
    images = images if isinstance(images, list) else [images]
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def to_images(x: Tensor) -> list[Image.Image]:
    """The reverse of `to_tensor`: (B, 3, H, W) in [0, 1], clipped, to RGB pictures."""
    pixels = (x.detach().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]
