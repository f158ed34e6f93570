"""The classic codecs, and the learned codec on pixels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import train
from PIL import Image
from tiny_codec import picture

from slimlib.compressor import CompressorConfig, LatentCompressor
from slimlib.measure.baselines import (
    CODECS,
    CONTRAST,
    PixelCodec,
    best_within,
    decode_classic,
    downscale,
    encode_classic,
    from_patches,
    payload_bytes,
    to_patches,
)
from slimlib.stream import StreamError


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
        decoded = decode_classic(data, image.size)
        assert Image.open(io.BytesIO(data)).size == image.size
        sizes.append(len(data))
        errors.append(np.abs(np.asarray(decoded, int) - np.asarray(image, int)).mean())
        assert encode_classic(image, codec, quality) == data
    assert sizes == sorted(sizes) and errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("codec", CODECS)
def test_only_pixels_are_encoded(image: Image.Image, codec: str) -> None:
    """Pillow writes what a picture carries along: a colour profile, Exif data, a comment."""
    exif, laden = Image.Exif(), image.copy()
    exif[0x010E] = "described at length " * 50
    laden.info |= {"icc_profile": bytes(3000), "exif": exif.tobytes(), "comment": b"a comment", "dpi": (300, 300)}
    assert encode_classic(laden, codec, 50) == encode_classic(image, codec, 50)
    assert best_within(laden, codec, 400)[0] == best_within(image, codec, 400)[0]
    assert laden.info["comment"] == b"a comment"


@pytest.mark.parametrize("codec", CODECS)
def test_best_within_a_budget(image: Image.Image, codec: str) -> None:
    """No file of the picture's own size that fits has less error; where nothing fits, none is smaller."""
    every = [encode_classic(image, codec, quality) for quality in range(0, 101, 10)]
    for target in (1, len(every[3]), len(every[8]), 10**6):
        data, decoded = best_within(image, codec, target)
        assert decoded.size == image.size and decoded.mode == "RGB"
        assert len(data) <= target or (target == 1 and len(data) <= min(map(len, every)))
        error = np.square(np.subtract(decoded, image, dtype=float)).mean()
        for other in (file for file in every if len(file) <= target):
            assert error <= np.square(np.subtract(decode_classic(other, image.size), image, dtype=float)).mean() * 1.05


@pytest.mark.parametrize("codec", ["jpeg", "webp"])
def test_downscaling_reaches_smaller_budgets(image: Image.Image, codec: str) -> None:
    target = round(0.85 * len(encode_classic(image, codec, 0)))
    data, decoded = best_within(image, codec, target)
    assert len(data) <= target
    assert decoded.size == image.size != Image.open(io.BytesIO(data)).size


def test_half_the_size_and_back(image: Image.Image) -> None:
    small = downscale(image, 0.5)
    assert small.size == (48, 32) and downscale(image, 1) is image
    back = decode_classic(encode_classic(small, "webp", 90), image.size)
    assert back.size == image.size
    assert np.abs(np.asarray(back, int) - np.asarray(image, int)).mean() < 12


@pytest.mark.parametrize(
    ("codec", "least", "most"),
    [("webp", 20, 20), ("jpegxl", 2, 2), ("avif", 250, 300), ("jpeg2000", 120, 160), ("jpeg", 270, 400)],
)
def test_payload_is_all_but_the_headers(image: Image.Image, codec: str, least: int, most: int) -> None:
    """Headers hardly grow with the quality, or with the picture."""
    for shown in (image, image.resize((200, 300))):
        for quality in (1, 50, 99):
            data = encode_classic(shown, codec, quality)
            assert least <= len(data) - payload_bytes(data, codec) <= most


def test_wrong_arguments(image: Image.Image) -> None:
    for codec, quality in (("gif", 50), ("webp", -1), ("webp", 101)):
        with pytest.raises(ValueError, match=f"codec '{codec}', quality {quality}: expected one of jpeg, .* 0 to 100"):
            encode_classic(image, codec, quality)


# ---- the learned baseline


@pytest.fixture(scope="module")
def untrained() -> PixelCodec:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        codec = train.new_pixel_codec()
    codec.compressor.eval().update()
    return codec


def test_patches_come_back_and_keep_errors() -> None:
    x = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    z = to_patches(x)
    assert z.shape == (2, 48, 8, 16)
    assert torch.allclose(from_patches(z), x, atol=1e-6)
    other = (x + 0.1 * torch.rand_like(x)).clamp(0, 1)
    error = (to_patches(other) - z).square().mean()
    assert torch.allclose(error, CONTRAST**2 * (other - x).square().mean(), rtol=1e-4)


def test_it_starts_as_a_transform_that_keeps_the_picture(untrained: PixelCodec) -> None:
    basis = untrained.compressor.encoder.direct.weight[:, :, 0, 0].double()
    assert torch.allclose(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64), atol=1e-6)
    assert torch.equal(untrained.compressor.decoder.direct.weight[:, :, 0, 0].double().T, basis)


@pytest.mark.parametrize("size", [(128, 128), (70, 33)])
def test_real_bytes(untrained: PixelCodec, size: tuple[int, int], tmp_path: Path) -> None:
    image, sizes, errors = picture(*size), [], []
    for quality in (0.0, 0.5, 1.0):
        data, bits = untrained.encode(image, quality)
        assert data == untrained.compress(image, quality)
        decoded = untrained.decompress(data)
        assert decoded.size == image.size
        header = 7 if size == (128, 128) else 9
        assert abs(len(data) - header - float(bits["y"].sum() + bits["h"].sum()) / 8) < 3 + 0.01 * len(data)
        sizes.append(len(data))
        errors.append(np.square(np.asarray(decoded, float) - np.asarray(image, float)).mean())
    assert sizes == sorted(sizes) and errors == sorted(errors, reverse=True)
    for damaged in (data[:-1], b"S" + data):
        with pytest.raises(StreamError):
            untrained.decompress(damaged)


def test_weights_come_back_strictly(untrained: PixelCodec, tmp_path: Path) -> None:
    untrained.compressor.save_pretrained(tmp_path)
    again = PixelCodec.from_pretrained(tmp_path)
    image = picture(64, 64)
    assert again.compress(image, 0.5) == PixelCodec.from_pretrained(tmp_path).compress(image, 0.5)
    with pytest.raises(ValueError, match="latent_channels=48"):
        PixelCodec(LatentCompressor(CompressorConfig()))
    with pytest.raises(FileNotFoundError):
        PixelCodec.from_pretrained(tmp_path / "nothing")
