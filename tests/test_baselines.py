"""The classic codecs."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from tiny_codec import picture

from slimlib.baselines import CODECS, encode_classic, nearest_size, payload_bytes


@pytest.fixture(scope="module")
def image() -> Image.Image:
    """Smooth colours, an edge, a little noise: 96 x 64."""
    rng = np.random.default_rng(0)
    pixels = np.asarray(picture(96, 64), np.int16) + rng.integers(-12, 13, (64, 96, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("codec", CODECS)
def test_encoding(image: Image.Image, codec: str) -> None:
    sizes, errors = [], []
    for quality in (0, 50, 95):
        data = encode_classic(image, codec, quality)
        decoded = Image.open(io.BytesIO(data)).convert("RGB")
        assert decoded.size == image.size
        sizes.append(len(data))
        errors.append(np.abs(np.asarray(decoded, int) - np.asarray(image, int)).mean())
        assert encode_classic(image, codec, quality) == data
        assert 0 < payload_bytes(data, codec) < len(data)
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("codec", CODECS)
def test_nearest_size(image: Image.Image, codec: str) -> None:
    every = [len(encode_classic(image, codec, q)) for q in range(0, 101, 10)]
    for target in (1, every[3], every[8], 10**6):
        data, decoded = nearest_size(image, codec, target)
        assert decoded.size == image.size
        assert decoded.mode == "RGB"
        nearest = min(every, key=lambda size: abs(size - target))
        assert abs(len(data) - target) <= abs(nearest - target) * 1.02 + 8


@pytest.mark.parametrize("codec", ["jpeg", "webp"])
def test_downscaling_reaches_smaller_budgets(image: Image.Image, codec: str) -> None:
    floor = len(encode_classic(image, codec, 0))
    target = round(0.85 * floor)
    data, decoded = nearest_size(image, codec, target, downscale=True)
    assert abs(len(data) - target) < abs(floor - target)
    assert decoded.size == image.size
    assert Image.open(io.BytesIO(data)).size != image.size


@pytest.mark.parametrize("codec", CODECS)
def test_payload_of_what_is_no_file(image: Image.Image, codec: str) -> None:
    whole = encode_classic(image, codec, 50)
    for data in (b"", b"abc", b"\xff\xd8" + b"x" * 40, whole[: len(whole) // 2]):
        with pytest.raises(ValueError, match=codec):
            payload_bytes(data, codec)


def test_payload_of_a_progressive_jpeg(image: Image.Image) -> None:
    """Several scans: all of them count."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=50, progressive=True)
    plain = payload_bytes(encode_classic(image, "jpeg", 50), "jpeg")
    assert payload_bytes(file.getvalue(), "jpeg") == pytest.approx(plain, rel=0.25)


def test_wrong_arguments(image: Image.Image) -> None:
    with pytest.raises(ValueError, match="unknown codec"):
        encode_classic(image, "gif", 50)
    with pytest.raises(ValueError, match="unknown codec"):
        payload_bytes(b"", "gif")
    for quality in (-1, 101):
        with pytest.raises(ValueError, match="quality"):
            encode_classic(image, "webp", quality)
    with pytest.raises(ValueError, match="budget"):
        nearest_size(image, "webp", 0)
