"""The codec end to end, on tiny models with random weights."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_codec import make_world, picture

from slimlib.codec import SlimCodec
from slimlib.machines import to_tensor
from slimlib.pictures import as_rgb
from slimlib.scales import ASSETS, Scale
from slimlib.scenes import PocketScenes
from slimlib.stream import StreamError, pack, unpack

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def world(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tiny_world, tmp_path_factory.mktemp("codec") / "world")


@pytest.fixture(scope="module")
def codec(world: Path) -> SlimCodec:
    return SlimCodec.from_pretrained(world, device="cpu")


# ---- round trips


@pytest.mark.parametrize("quality", [0, 0.25, 0.5, 0.75, 1])
def test_round_trip_at_every_quality(codec: SlimCodec, quality: float) -> None:
    stream = codec.compress(picture(), quality)
    report = codec.inspect(stream)
    assert codec.decompress(stream).size == (64, 64)
    assert report.size == len(stream)
    assert report.quality == pytest.approx(quality, abs=1 / 510)
    assert report.t0 == codec.compressor.config.t0(report.quality)


def test_more_quality_takes_more_bytes(codec: SlimCodec) -> None:
    sizes = [len(codec.compress(picture(), q, caption=None)) for q in (0, 0.5, 1)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2]


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (33, 31), (64, 65), (200, 40), (128, 128)])
def test_true_size_comes_back(codec: SlimCodec, size: tuple[int, int]) -> None:
    stream = codec.compress(picture(*size))
    assert codec.decompress(stream).size == size
    assert (codec.inspect(stream).width, codec.inspect(stream).height) == size


def test_symbols_decode_to_what_was_encoded(codec: SlimCodec) -> None:
    """What the decoder gets is what the model, run without coding, says it should be."""
    image = picture(64, 64)
    stream = codec.compress(image, 0.5, caption=None)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    torch.set_num_threads(1)
    with torch.no_grad():
        expected = codec.compressor(codec.ldm.encode(x), codec.inspect(stream).quality)["z_hat"]
    torch.testing.assert_close(codec.read([stream])[0].z_hat, expected)


def test_lists_give_what_single_pictures_give(codec: SlimCodec) -> None:
    images = [picture(64, 64, 1), picture(40, 70, 2), picture(64, 64, 3)]
    streams = codec.compress(images, [0.1, 0.5, 0.9], caption=["auto", None, "a lion"], seed=[1, 2, 3])
    single = [
        codec.compress(images[0], 0.1, seed=1),
        codec.compress(images[1], 0.5, caption=None, seed=2),
        codec.compress(images[2], 0.9, caption="a lion", seed=3),
    ]
    assert streams == single
    together = codec.decompress(streams)
    for one, many in zip(map(codec.decompress, single), together, strict=True):
        assert one.tobytes() == many.tobytes()
    assert [report.seed for report in codec.inspect(streams)] == [1, 2, 3]
    assert codec.compress([]) == []
    assert codec.decompress([]) == []


def test_batches_differ_by_one_level_at_most(codec: SlimCodec, world: Path) -> None:
    fast = SlimCodec.from_pretrained(world, device="cpu", exact=False)
    images = [picture(64, 64, seed) for seed in range(3)]
    streams = codec.compress(images, caption=None)
    for a, b in zip(fast.decompress(streams), codec.decompress(streams), strict=True):
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1
    assert all(codec.decompress(stream).size == (64, 64) for stream in fast.compress(images))


def test_wrong_number_of_values_in_a_list(codec: SlimCodec) -> None:
    with pytest.raises(ValueError, match="2 values for 1 pictures"):
        codec.compress([picture()], quality=[0.1, 0.2])


def test_another_process_with_other_threads_decodes_the_same_pixels(codec: SlimCodec, world: Path) -> None:
    script = (
        "import hashlib, sys, torch\n"
        "from slimlib.codec import SlimCodec\n"
        "from pathlib import Path\n"
        "torch.set_num_threads(int(sys.argv[3]))\n"
        "codec = SlimCodec.from_pretrained(sys.argv[1], device='cpu')\n"
        "stream = Path(sys.argv[2]).read_bytes()\n"
        "print(hashlib.sha256(codec.decompress(stream).tobytes()).hexdigest())\n"
        "print(codec.compress(codec.decompress(stream), 0.3, seed=5).hex())\n"
        "assert torch.get_num_threads() == int(sys.argv[3])\n"
    )
    stream = codec.compress(picture(90, 130), 0.6, seed=11)
    file = world / "stream.slim"
    file.write_bytes(stream)
    results = {
        subprocess.run(
            [sys.executable, "-c", script, str(world), str(file), str(threads)],
            cwd=REPO,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=900,  # starting a process takes long on a busy machine
            check=True,
        ).stdout
        for threads in (2, 3)
    }
    pixels = codec.decompress(stream)
    again = codec.compress(pixels, 0.3, seed=5)
    assert results == {f"{hashlib.sha256(pixels.tobytes()).hexdigest()}\n{again.hex()}\n"}


# ---- what a stream carries


def test_defaults_cost_no_bytes(codec: SlimCodec) -> None:
    image = picture(128, 128)
    plain = codec.compress(image, 0.5, caption=None)
    config = codec.compressor.config
    quality = codec.inspect(plain).quality
    assert codec.compress(image, 0.5, caption=None, steps=config.steps, t0=config.t0(quality), seed=0) == plain
    assert len(codec.compress(image, 0.5, caption=None, steps=config.steps + 1)) > len(plain)
    assert codec.inspect(plain).bits["header"] <= 64


def test_report_adds_up(codec: SlimCodec) -> None:
    stream = codec.compress(picture(70, 50), 0.8, caption="a lion", steps=2, seed=9, t0=300)
    report = codec.inspect(stream)
    assert sum(report.bits.values()) == pytest.approx(8 * len(stream))
    assert set(report.bits) == {"header", "caption", "hyper", "latent", "rounding"}
    assert abs(report.bits["rounding"]) < 24
    assert report.bit_map.sum() == pytest.approx(report.bits["latent"])
    assert report.bit_map.shape == (64 // 16, 96 // 16)
    assert (report.caption, report.steps, report.seed, report.t0) == ("a lion", 2, 9, 300)
    assert report.bpp == 8 * len(stream) / (70 * 50)
    text = str(report)
    for word in ("a lion", "70 x 50", "t0 = 300", "2 steps", "seed 9", "latent", f"{len(stream)} bytes"):
        assert word in text


def test_bits_of_the_report_are_those_the_encoder_counted(codec: SlimCodec) -> None:
    from slimlib.entropy import RangeEncoder

    stream = codec.compress(picture(), 1.0, caption=None)
    torch.set_num_threads(1)
    x = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        parts = codec.compressor.compress(codec.ldm.encode(x), 1.0, RangeEncoder())
    report = codec.inspect(stream)
    assert report.bits["latent"] == pytest.approx(float(parts["y"].sum()))
    assert report.bits["hyper"] == pytest.approx(float(parts["h"].sum()))
    np.testing.assert_allclose(report.bit_map, parts["y"].sum(0).numpy())


def test_captions(codec: SlimCodec) -> None:
    none = codec.compress(picture(), caption=None)
    assert codec.inspect(none).caption is None
    assert codec.compress(picture(), caption="") == none
    typed = codec.compress(picture(), caption="A red  FOX")
    assert codec.inspect(typed).caption == "a red fox"
    assert len(typed) - len(none) <= 2
    strange = "ein grüner Zeppelin über 京都"
    assert codec.inspect(codec.compress(picture(), caption=strange)).caption == strange.lower()
    with pytest.raises(ValueError, match="201 characters"):
        codec.compress(picture(), caption="x" * 201)
    auto = codec.inspect(codec.compress(picture())).caption
    assert auto is None or auto == auto.lower()


def test_settings_of_the_diffusion_matter(codec: SlimCodec) -> None:
    stream = codec.compress(picture(), 0.2, caption="a red fox", t0=600, steps=3)
    before = codec.decompress(stream, steps=0)
    assert codec.decompress(stream).tobytes() != before.tobytes()
    assert codec.decompress(stream).tobytes() == codec.decompress(stream, steps=3).tobytes()
    assert codec.decompress(stream).tobytes() != codec.decompress(stream, steps=1).tobytes()
    other = codec.compress(picture(), 0.2, caption="a red fox", t0=600, steps=3, seed=1)
    assert codec.decompress(other).tobytes() != codec.decompress(stream).tobytes()
    off = codec.compress(picture(), 0.2, caption="a red fox", steps=0)
    assert codec.decompress(off).tobytes() == before.tobytes()
    assert "no enhancement" in str(codec.inspect(off))


@pytest.mark.parametrize(
    "arguments",
    [
        {"quality": -0.1},
        {"quality": 1.1},
        {"quality": float("nan")},
        {"steps": -1},
        {"steps": 101},
        {"t0": 1000},
        {"t0": -1},
        {"seed": -1},
        {"seed": 2**32},
        {"caption": "bell \a"},
    ],
)
def test_arguments_out_of_range(codec: SlimCodec, arguments: dict) -> None:
    with pytest.raises(ValueError):
        codec.compress(picture(), **arguments)


# ---- pictures of every kind


def encoded(image: Image.Image, kind: str, **settings: object) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return Image.open(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "HSV", "RGBa", "La"])
def test_modes(codec: SlimCodec, mode: str) -> None:
    stages = {"PA": "P", "RGBa": "RGBA", "La": "LA", "LA": "L"}
    image = picture(40, 24)
    if mode in stages:
        image = image.convert(stages[mode])
    stream = codec.compress(image.convert(mode), caption=None)
    assert codec.decompress(stream).mode == "RGB"
    assert codec.decompress(stream).size == (40, 24)


def test_transparency_lies_on_white() -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((1, 1), (200, 0, 0, 255))
    image.putpixel((2, 2), (0, 0, 0, 128))
    rgb = as_rgb(image)
    assert rgb.getpixel((0, 0)) == (255, 255, 255)
    assert rgb.getpixel((1, 1)) == (200, 0, 0)
    assert rgb.getpixel((2, 2)) == pytest.approx((127, 127, 127), abs=1)
    palette = encoded(image.convert("P"), "PNG", transparency=image.convert("P").getpixel((0, 0)))
    assert as_rgb(palette).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_keep_their_brightness() -> None:
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)[None].repeat(2, 0)
    image = encoded(Image.fromarray(ramp), "PNG")
    assert image.mode.startswith("I")
    np.testing.assert_array_equal(np.asarray(as_rgb(image))[0, :, 0], np.arange(256))
    np.testing.assert_array_equal(np.asarray(as_rgb(Image.fromarray(ramp.astype(np.int32))))[0, :, 0], np.arange(256))


def test_values_without_a_known_white_are_refused() -> None:
    with pytest.raises(ValueError, match="floating-point"):
        as_rgb(Image.fromarray(np.zeros((4, 4), np.float32)))
    with pytest.raises(ValueError, match="65535"):
        as_rgb(Image.fromarray(np.full((4, 4), 70000, np.int32)))


def test_exif_rotation() -> None:
    image = Image.new("RGB", (8, 4), "blue")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    assert as_rgb(encoded(image, "JPEG", exif=exif)).size == (4, 8)


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    image = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert as_rgb(image).getpixel((3, 3)) == (255, 0, 0)


def test_pictures_that_cannot_be_read(tmp_path: Path) -> None:
    whole = io.BytesIO()
    picture(80, 80).save(whole, "PNG")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:-300])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("cut", "text", "empty"):
        with pytest.raises(ValueError, match="picture"):
            as_rgb(tmp_path / f"{name}.png")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        as_rgb(tmp_path / "none.png")
    with pytest.raises(ValueError, match="limit"):
        as_rgb(Image.new("1", (2000, 2000)))
    with pytest.raises(TypeError, match="ndarray"):
        as_rgb(np.zeros((4, 4, 3), np.uint8))  # type: ignore[arg-type]


def test_size_limit_holds_for_streams_too(codec: SlimCodec, world: Path) -> None:
    small = SlimCodec.from_pretrained(world, device="cpu", max_pixels=64 * 64)
    with pytest.raises(ValueError, match="limit"):
        small.compress(picture(65, 64))
    with pytest.raises(StreamError, match="65 x 64"):
        small.decompress(codec.compress(picture(65, 64)))


# ---- damage


def test_damaged_streams(codec: SlimCodec) -> None:
    stream = codec.compress(picture(50, 60), 0.4, caption="a red fox", steps=2, seed=3)
    bad = [b"", b"S", b"not a stream at all", stream + b"\0", b"\x89PNG\r\n\x1a\n" + stream]
    bad += [stream[:length] for length in range(len(stream))]
    for position in range(len(stream)):
        altered = bytearray(stream)
        altered[position] ^= 1 << position % 8
        bad.append(bytes(altered))
    for data in bad:
        with pytest.raises(StreamError):
            codec.decompress(data)


def test_forged_payloads_never_crash(codec: SlimCodec) -> None:
    """Right check sum, nonsense inside: an error or a picture, but nothing worse."""
    header, payload = unpack(codec.compress(picture(50, 60), caption="a red fox", steps=1))
    rng = np.random.default_rng(0)
    for _ in range(30):
        noise = rng.bytes(int(rng.integers(0, 2 * len(payload))))
        with contextlib.suppress(StreamError):
            assert codec.decompress(pack(header, noise)).size == (50, 60)


def test_forged_header(codec: SlimCodec) -> None:
    from dataclasses import replace

    header, payload = unpack(codec.compress(picture(), t0=500, steps=1))
    with pytest.raises(StreamError, match="t0"):
        codec.decompress(pack(replace(header, t0=5000), payload))
    with pytest.raises(StreamError, match="steps"):
        codec.decompress(pack(replace(header, steps=101), payload))
    with pytest.raises(StreamError, match="pixels"):
        codec.decompress(pack(replace(header, width=8000, height=8000), payload))


def test_other_weights_are_noticed(codec: SlimCodec, tiny_world: Path, tmp_path: Path) -> None:
    other = SlimCodec.from_pretrained(make_world(tiny_world, tmp_path / "other", seed=1), device="cpu")
    with pytest.raises(StreamError, match="weights"):
        other.decompress(codec.compress(picture()))
    assert other.fingerprint != codec.fingerprint

    def fingerprint() -> int:
        return SlimCodec(codec.ldm, codec.compressor, codec.prior).fingerprint

    weight = codec.ldm.unet.conv_in.weight
    kept = weight.detach().clone()
    weight.data += 1
    assert fingerprint() != codec.fingerprint
    weight.data.copy_(kept)
    assert fingerprint() == codec.fingerprint


# ---- loading


def test_only_what_is_needed_is_loaded(world: Path) -> None:
    scale = Scale.from_name(world)
    lean = SlimCodec.from_pretrained(scale.with_(captioner="/nowhere/captioner", machine_a="/nowhere/machine"), "cpu")
    stream = lean.compress(picture(), caption="a lion")
    assert lean.decompress(stream).size == (64, 64)
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        lean.compress(picture())


def test_parts_can_be_put_together(codec: SlimCodec) -> None:
    bare = SlimCodec(codec.ldm, codec.compressor)
    assert bare.decompress(bare.compress(picture(), caption=None)).size == (64, 64)
    with pytest.raises(ValueError, match="prior"):
        bare.compress(picture(), caption="a lion")
    with pytest.raises(ValueError, match="captioner|machine"):
        bare.compress(picture())


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pockett"):
        SlimCodec.from_pretrained("pockett")
    (tmp_path / "compressor").mkdir()
    with pytest.raises(FileNotFoundError):
        SlimCodec.from_pretrained(tmp_path)


# ---- the shipped weights


@pytest.fixture(scope="module")
def pocket() -> SlimCodec:
    if not all((ASSETS / "pocket" / part).is_dir() for part in ("ldm", "captioner", "machine_a", "compressor")):
        pytest.skip("assets/pocket is not complete")
    return SlimCodec.from_pretrained("pocket", device="cpu")


def psnr(a: Image.Image, b: Image.Image) -> float:
    return -10 * float(np.log10((((np.asarray(a, float) - np.asarray(b, float)) / 255) ** 2).mean()))


def test_pocket_qualities(pocket: SlimCodec) -> None:
    scene = PocketScenes("test")[2]
    streams = [pocket.compress(scene.image, quality) for quality in (0, 0.25, 0.5, 0.75, 1)]
    sizes = [len(stream) for stream in streams]
    assert sizes == sorted(sizes)
    assert 8 * sizes[0] / 128**2 < 0.05
    fidelity = [psnr(pocket.decompress(stream), scene.image) for stream in streams]
    assert fidelity[-1] > 20
    assert fidelity[-1] > fidelity[0] + 3
    for report in pocket.inspect(streams):
        assert report.bits["header"] <= 64
        assert abs(report.bits["rounding"]) < 16


@torch.no_grad()
def test_pocket_files_are_as_long_as_the_model_says(pocket: SlimCodec) -> None:
    for index, quality in ((5, 0.3), (6, 1.0)):
        image = PocketScenes("test")[index].image
        stream = pocket.compress(image, quality, caption=None)
        out = pocket.compressor(pocket.ldm.encode(to_tensor(image)), pocket.inspect(stream).quality)
        estimate = -sum(float(likelihood.double().log2().sum()) for likelihood in out["likelihoods"].values()) / 8
        payload = len(stream) - pocket.inspect(stream).bits["header"] / 8
        assert abs(payload - estimate) <= 0.02 * estimate + 3


def test_pocket_pixels_do_not_depend_on_threads(pocket: SlimCodec) -> None:
    before = torch.get_num_threads()
    results = set()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            stream = pocket.compress(PocketScenes("test")[7].image, 0.4)
            results.add((stream, pocket.decompress(stream).tobytes()))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(results) == 1


def test_pocket_takes_other_sizes(pocket: SlimCodec) -> None:
    image = PocketScenes("test", size=200)[3].image.crop((0, 10, 190, 143))
    decoded = pocket.decompress(pocket.compress(image, 1.0))
    assert decoded.size == (190, 133)
    assert psnr(decoded, image) > 20
