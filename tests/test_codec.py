"""The codec end to end, on tiny models with random weights."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fuzz_streams import fuzz
from peft import LoraConfig
from PIL import Image
from tiny_codec import CAPTIONS, picture

from slimlib.caption import CaptionPrior
from slimlib.codec import SlimCodec
from slimlib.compressor import LatentCompressor
from slimlib.data.scenes import PocketScenes
from slimlib.entropy import RangeEncoder
from slimlib.images import as_rgb, to_images, to_tensor
from slimlib.ldm import LatentDiffusion
from slimlib.roi import object_box
from slimlib.scales import Scale
from slimlib.stream import StreamError, pack, unpack


@pytest.fixture(scope="module")
def codec(tiny_codec_world: Path) -> SlimCodec:
    return SlimCodec.from_pretrained(tiny_codec_world, device="cpu")


def other(codec: SlimCodec, **changed: Any) -> SlimCodec:
    """A codec of the same parts but for some."""
    return SlimCodec(**{"ldm": codec.ldm, "compressor": codec.compressor, "prior": codec.prior, **changed})


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (33, 31), (64, 65), (200, 40), (128, 128)])
@torch.no_grad()
def test_what_comes_back_is_what_the_models_say(codec: SlimCodec, size: tuple[int, int]) -> None:
    """At the true size: the edge repeated up to what the networks can halve, cut off again at the end."""
    stream = codec.compress(picture(*size), 0.2, "a red fox", t0=500, steps=2, seed=7)
    decoded = codec.read(stream)
    torch.set_num_threads(1)
    x = np.pad(np.asarray(picture(*size)), [*((0, -side % 32) for side in size[::-1]), (0, 0)], mode="edge")
    z, quality = codec.ldm.encode(to_tensor(Image.fromarray(x))), decoded.report.quality
    torch.testing.assert_close(decoded.z_hat, codec.compressor(z, quality)["z_hat"])
    walk, one = (list(codec.ldm.enhance(decoded.z_hat, ["a red fox"], 500, k, [7], guidance=3.0)) for k in (2, 1))
    assert all(map(torch.equal, codec.enhance(decoded), walk)) and quality == pytest.approx(0.2, abs=1 / 510)
    for latent, steps in ((walk[-1], None), (one[-1], 1), (decoded.z_hat, 0)):
        (expected,), back = to_images(codec.ldm.decode(latent)), codec.decompress(stream, steps)
        assert back.size == size and back.tobytes() == expected.crop((0, 0, *size)).tobytes()
    parts = codec.compressor.compress(z, quality, RangeEncoder())  # the report counts what the encoder spent
    np.testing.assert_allclose(decoded.report.bit_map, parts["y"].sum(0).numpy())
    assert decoded.report.bits["hyper"] == pytest.approx(float(parts["h"].sum()))


SCRIPT = """
import hashlib, sys, torch
from pathlib import Path
from slimlib.codec import SlimCodec
torch.set_num_threads(2)
codec, stream = SlimCodec.from_pretrained(sys.argv[1], device="cpu"), Path(sys.argv[2]).read_bytes()
pixels = codec.decompress(stream)
print(hashlib.sha256(pixels.tobytes()).hexdigest(), codec.compress(pixels, 0.3, seed=5).hex())
assert torch.get_num_threads() == 2
"""


def test_another_process_with_other_threads_decodes_the_same_pixels(
    codec: SlimCodec, tiny_codec_world: Path, tmp_path: Path
) -> None:
    stream = codec.compress(picture(90, 130), 0.6, seed=11)
    (tmp_path / "stream").write_bytes(stream)
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", SCRIPT, str(tiny_codec_world), str(tmp_path / "stream")]
    there = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=True).stdout
    pixels = codec.decompress(stream)
    assert there.split() == [hashlib.sha256(pixels.tobytes()).hexdigest(), codec.compress(pixels, 0.3, seed=5).hex()]


def test_without_exactness_a_pixel_may_differ_by_one(codec: SlimCodec) -> None:
    passes: list[tuple[int, int]] = []
    watch = lambda _module, inputs, _output: passes.append((len(inputs[0]), torch.get_num_threads()))  # noqa: E731
    handle = codec.ldm.unet.register_forward_hook(watch)
    stream = codec.compress(picture(), 0.2, "a bus", t0=100, steps=1)
    torch.set_num_threads(2)
    fast, exact = (np.asarray(one.decompress(stream), int) for one in (other(codec, exact=False), codec))
    handle.remove(), torch.set_num_threads(1)
    assert passes == [(2, 2), (1, 1), (1, 1)], "guidance in one pass on all threads; in two on one"
    assert np.abs(fast - exact).max() <= 1


def test_report_adds_up_and_defaults_cost_no_bytes(codec: SlimCodec) -> None:
    image, config, prior = picture(70, 50), codec.compressor.config, codec.prior
    stream = codec.compress(image, 0.8, caption="a lion", steps=2, seed=9, t0=300)
    report = codec.inspect(stream)
    assert list(report.bits) == ["header", "caption", "hyper", "latent", "rounding"] and prior is not None
    assert sum(report.bits.values()) == pytest.approx(8 * len(stream)) and abs(report.bits["rounding"]) < 24
    assert report.bits["caption"] == pytest.approx(prior.bits("a lion"), abs=0.1)
    assert report.bit_map.sum() == pytest.approx(report.bits["latent"]) and report.bit_map.shape == (4, 6)
    assert (report.caption, report.steps, report.seed, report.t0) == ("a lion", 2, 9, 300)
    assert (report.width, report.height, report.bpp) == (70, 50, 8 * len(stream) / (70 * 50))
    said = ("a lion", "70 x 50", "t0 = 300 in 2 steps, seed 9", "latent", f"{len(stream)} bytes", f"{report.bpp:.4f}")
    assert all(words in str(report) for words in said)
    assert "no enhancement" in str(codec.inspect(codec.compress(image, caption=None, steps=0)))
    plain = codec.compress(picture(128, 128), 0.5, caption=None)
    report = codec.inspect(plain)
    assert report.bits["header"] <= 64 and (report.t0, report.steps) == config.walk(report.quality)[:2]
    assert codec.compress(picture(128, 128), 0.5, None, steps=report.steps, t0=report.t0, seed=0) == plain
    for asked in ({"steps": report.steps + 1}, {"t0": 7}, {"seed": 1}):
        stream = codec.compress(picture(128, 128), 0.5, None, **asked)
        assert len(stream) > len(plain) and vars(codec.inspect(stream)).items() >= asked.items()


def test_captions(codec: SlimCodec) -> None:
    none = codec.compress(picture(), caption=None)
    assert codec.inspect(none).caption is None and codec.compress(picture(), caption="") == none
    typed = codec.compress(picture(), caption="A red  FOX")
    assert codec.inspect(typed).caption == "a red fox" and len(typed) - len(none) <= 2
    strange = "ein grüner Zeppelin über 京都"
    assert codec.inspect(codec.compress(picture(), caption=strange)).caption == strange.lower()
    # "auto": the captioner sees the region of interest
    seen: list[Image.Image] = []
    captioner: Any = SimpleNamespace(describe=lambda images: seen.extend(images) or [("a tulip", 0.4)], floor=0.4)
    image = picture(90, 60)
    listening = other(codec, captioner=captioner)
    assert listening.compress(image, 0.2) == codec.compress(image, 0.2, caption="a tulip")
    z = codec.encode(image)  # of the picture, filled up; the region is where the compressor sees the object in it
    where, words = codec.look(image, z, 51 / 255)
    crop = image.crop(object_box(where))
    assert z.shape == (1, 4, 16, 24) and where.shape == (1, 60, 90) and words == codec.captioner.caption([crop])[0]
    corner = codec.compressor.region(z, 51 / 255)[0, :, 0, 0]
    torch.testing.assert_close(where[:, 0, 0], corner), torch.testing.assert_close(where[:, 1, 1], corner)
    assert seen[0].tobytes() == crop.tobytes()
    spot = torch.zeros(1, 60, 90)
    spot[:, 10:30, 20:60] = 1
    listening.region = lambda *_: spot
    crop = image.crop(object_box(listening.look(image, z, 0.2)[0]))
    assert seen[-1].tobytes() == crop.tobytes() and crop.width < 60 and crop.height < 40, "not all of the picture"
    del listening.region
    captioner.floor = 0.41  # it is not sure enough
    assert listening.compress(image, 0.2) == codec.compress(image, 0.2, caption=None)
    assert codec.compress(image, 0.2, caption="auto") == codec.compress(image, 0.2, caption=words)


@pytest.mark.parametrize(
    "wrong",
    [{"quality": q} for q in (-0.1, 1.1, float("nan"))]
    + [{"caption": c} for c in ("bell \a", "x" * 201)]
    + [{"steps": -1}, {"steps": 101}, {"t0": 1000}, {"t0": -1}, {"seed": -1}, {"seed": 2**32}],
)
def test_arguments_out_of_range(codec: SlimCodec, wrong: dict) -> None:
    with pytest.raises(ValueError):
        codec.compress(picture(), **{"caption": None} | wrong)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [({"quality": q}, "a number in .0, 1., not") for q in (None, "0.5", "high", 50)]
    + [({name: value}, "whole number") for name in ("steps", "t0", "seed") for value in (3.0, 2.5, "3", [3], np.nan)]
    + [({"seed": None}, "whole number")],
)
def test_arguments_of_another_kind(codec: SlimCodec, wrong: dict, expected: str) -> None:
    """The error names the argument, its value, and what was expected."""
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=expected) as error:
        codec.compress(picture(), **{"caption": None} | wrong)
    assert f"{name} " in str(error.value).lower() and repr(value) in str(error.value)
    if name == "steps":
        with pytest.raises(ValueError, match=expected):
            codec.decompress(codec.compress(picture(), caption=None), **wrong)


def test_numbers_of_numpy_are_numbers(codec: SlimCodec) -> None:
    """The narrow ones, too, whose sums would overflow."""
    plain = codec.compress(picture(), 0.5, None, t0=200, steps=3, seed=7)
    odd = codec.compress(picture(), np.float64(0.5), None, t0=np.uint8(200), steps=np.int8(3), seed=np.uint16(7))
    assert odd == plain == codec.compress(picture(), torch.tensor(0.5), None, t0=200, steps=torch.tensor(3), seed=7)
    for steps in (np.uint8(3), np.int16(3), torch.tensor(3)):
        assert codec.decompress(plain, steps).tobytes() == codec.decompress(plain, 3).tobytes()
        assert codec.ldm.times(np.uint8(255), steps) == codec.ldm.times(255, 3)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "PA", "CMYK", "YCbCr", "HSV", "RGBa", "La"])
def test_modes(codec: SlimCodec, mode: str, tmp_path: Path) -> None:
    image = original = picture(40, 24)
    for step in {"PA": ["P"], "RGBa": ["RGBA"], "La": ["L", "LA"], "LA": ["L"]}.get(mode, []) + [mode]:
        image = image.convert(step)
    rgb = as_rgb(image)
    error = np.abs(np.asarray(rgb.convert("L"), int) - np.asarray(original.convert("L"), int)).mean()
    assert rgb.mode == "RGB" and rgb.size == (40, 24) and (error < 12 or mode == "1")
    rgb.save(tmp_path / "picture.png")
    assert codec.compress(image, caption=None) == codec.compress(tmp_path / "picture.png", caption=None)


def test_damaged_streams(codec: SlimCodec) -> None:
    stream = codec.compress(picture(50, 60), 0.4, caption="a red fox", steps=2, seed=3)
    bad = [b"", b"not a stream at all", stream + b"\0", b"\x89PNG\r\n\x1a\n" + stream]
    for i, value in enumerate(stream):
        bad += [stream[:i], stream[:i] + bytes([value ^ 1 << i % 8]) + stream[i + 1 :]]
    for data in bad:
        with pytest.raises(StreamError):
            codec.decompress(data)


def test_forged_streams_never_crash(codec: SlimCodec) -> None:
    """Right check sum, nonsense inside: an error or a picture, but nothing worse."""
    header, payload = unpack(codec.compress(picture(50, 60), caption="a red fox", t0=500, steps=1))
    rng = np.random.default_rng(0)
    for _ in range(30):
        noise = rng.bytes(int(rng.integers(0, 2 * len(payload))))
        with contextlib.suppress(StreamError):
            assert codec.decompress(pack(header, noise)).size == (50, 60)
    for forged, reason in (
        ({"t0": 1000}, "t0"),
        ({"steps": 101}, "steps"),
        ({"width": 8000, "height": 8000}, "pixels"),
    ):
        with pytest.raises(StreamError, match=reason):
            codec.decompress(pack(replace(header, **forged), payload))
    small = other(codec)
    small.max_pixels = 64 * 64
    for size, reason in (((65, 64), "--max-pixels"), ((4096, 1), "coded as 131072,.*--max-pixels")):
        with pytest.raises(ValueError, match=reason):
            small.compress(picture(*size))
        with pytest.raises(StreamError, match=f"{size[0]} x {size[1]} .*--max-pixels"):
            small.inspect(codec.compress(picture(*size), caption=None))


def test_forged_streams_in_bounds(codec: SlimCodec) -> None:
    """Refused or decoded, in bounded time; `python tests/fuzz_streams.py N` for more of them."""
    found = fuzz(other(codec), 2000)
    assert found["read"] > 400 and found["decoded to a picture"] > 40 and len(found) > 6, found


@pytest.mark.parametrize("place", ["encoder", "compressor", "unet", "decoder"])
def test_numbers_that_are_not_finite(codec: SlimCodec, place: str) -> None:
    """As half precision makes them: an error with advice wherever they arise, never a black picture."""
    image, stream = picture(), codec.compress(picture(), caption=None, t0=100, steps=1)
    vae, unet = codec.ldm.vae, codec.ldm.unet
    weights = {"encoder": vae.encoder.conv_in, "unet": unet.conv_out, "decoder": vae.decoder.conv_out}
    bias = weights[place].bias if place in weights else codec.compressor.decoder.enter.bias
    kept = bias.detach().clone()
    bias.data[0] = float("nan" if place == "unet" else "inf")
    try:
        for verb in (codec.decompress, codec.inspect):
            if place == "compressor" or (place != "encoder" and verb == codec.decompress):
                with pytest.raises(ValueError, match="not finite.*dtype=torch.float32"):
                    verb(stream)
        if place == "encoder":
            with pytest.raises(ValueError, match="not finite.*dtype=torch.float32"):
                codec.compress(image, caption=None)
    finally:
        bias.data.copy_(kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fingerprint_is_of_what_is_stored(codec: SlimCodec, tiny_codec_world: Path, dtype: torch.dtype) -> None:
    half = SlimCodec.from_pretrained(tiny_codec_world, "cpu", dtype=dtype)
    assert half.fingerprint == codec.fingerprint and half.ldm.dtype == next(half.ldm.vae.parameters()).dtype == dtype
    stream = codec.compress(picture(), caption=None)
    assert half.inspect(stream).size == len(stream)


def test_adapters_count_in_the_fingerprint_as_they_are_stored(
    codec: SlimCodec, tiny_codec_world: Path, tmp_path: Path
) -> None:
    """They are loaded; streams of a codec without them are refused; in whatever precision it is the same codec."""
    world = Path(shutil.copytree(tiny_codec_world, tmp_path / "world"))
    unet = LatentDiffusion.from_pretrained(world / "ldm", device="cpu").unet
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False))
    home = Path(Scale.from_name(world).compressor)
    unet.save_lora_adapter(home / "unet_lora")
    adapted, half = (SlimCodec.from_pretrained(world, "cpu", dtype=one) for one in (torch.float32, torch.bfloat16))
    assert any("lora" in name for name, _ in adapted.ldm.unet.named_parameters())
    assert adapted.fingerprint == half.fingerprint != codec.fingerprint
    stream = adapted.compress(picture(), caption=None, t0=300, steps=1)
    assert (
        adapted.decompress(stream).tobytes()
        != codec.decompress(codec.compress(picture(), caption=None, t0=300, steps=1)).tobytes()
    )
    with pytest.raises(StreamError, match="weights"):
        codec.decompress(stream)


def test_several_threads_may_use_codecs_at_once(codec: SlimCodec) -> None:
    """Each gets what it would get alone, and the number of torch's threads is left as it was."""
    two = other(codec, captioner=codec.captioner)
    jobs = [(codec if i % 2 else two, picture(64, 64, i), i / 6) for i in range(6)]
    inside, seen = set[int](), set[tuple[int, int]]()

    def enter(*_: Any) -> None:
        inside.add(threading.get_ident())
        time.sleep(0.01)
        seen.add((len(inside), torch.get_num_threads()))

    def work(job: tuple[SlimCodec, Image.Image, float]) -> tuple[bytes, bytes]:
        stream = job[0].compress(job[1], job[2], t0=100, steps=1)
        return stream, job[0].decompress(stream).tobytes()

    alone = [work(job) for job in jobs]
    nets = codec.captioner.model, codec.ldm.unet, codec.ldm.vae.encoder, codec.ldm.vae.decoder
    handles = [net.register_forward_pre_hook(enter) for net in nets]
    handles += [net.register_forward_hook(lambda *_: inside.discard(threading.get_ident())) for net in nets]
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(work, jobs * 2)) == alone * 2
        assert seen == {(1, 1)} and torch.get_num_threads() == 2, "one at a time, on one thread each"
    finally:
        torch.set_num_threads(1)
        for handle in handles:
            handle.remove()


def test_bytes_and_pipes(codec: SlimCodec, tmp_path: Path) -> None:
    picture().save(path := tmp_path / "Bild über alles.png")
    stream = codec.compress(path, caption=None)
    for same in (path.read_bytes(), bytearray(path.read_bytes()), io.BytesIO(path.read_bytes()), str(path)):
        assert codec.compress(same, caption=None) == stream
    for same in (bytearray(stream), memoryview(stream), np.frombuffer(stream, np.uint8)):
        assert codec.inspect(same) == codec.inspect(stream)
        assert codec.decompress(same, steps=0).tobytes() == codec.decompress(stream, steps=0).tobytes()
    for verb in (codec.decompress, codec.inspect):
        with pytest.raises(StreamError, match="is a path"):
            verb(str(path))


def test_other_weights_are_noticed(codec: SlimCodec, tiny_codec_world: Path) -> None:
    compressor = LatentCompressor.from_pretrained(tiny_codec_world / "compressor", "cpu")
    compressor.decoder.enter.bias.data += 0.1
    changes = ({}, {"prior": None}, {"prior": CaptionPrior.fit(CAPTIONS)}, {"compressor": compressor})
    found = [other(codec, **changed).fingerprint for changed in changes]
    weight = codec.ldm.unet.conv_in.weight.data
    weight += 1
    found.append(other(codec).fingerprint)
    weight -= 1
    assert len(set(found)) == 5 and found[0] == codec.fingerprint
    with pytest.raises(StreamError, match="weights"):
        other(codec, compressor=compressor).decompress(codec.compress(picture(), caption=None))


def test_only_what_is_needed_is_loaded(codec: SlimCodec, tiny_codec_world: Path, tmp_path: Path) -> None:
    scale = replace(Scale.from_name(tiny_codec_world), captioner="/nowhere/captioner", machine_a="/nowhere")
    lean, bare = SlimCodec.from_pretrained(scale, "cpu"), SlimCodec(codec.ldm, codec.compressor)
    cases = (lean, "a lion", "auto", "nowhere"), (bare, None, "auto", "no captioner"), (bare, "", "a lion", "prior")
    for one, works, fails, reason in cases:
        assert one.decompress(one.compress(picture(), caption=works)).size == (64, 64)
        with pytest.raises((ValueError, FileNotFoundError), match=reason):
            one.compress(picture(), caption=fails)
    with pytest.raises(ValueError, match="stride 8"):
        other(codec, compressor=LatentCompressor(replace(codec.compressor.config, factor=8)))
    with pytest.raises(ValueError, match="pockett"):
        SlimCodec.from_pretrained("pockett")
    (tmp_path / "compressor").mkdir()
    with pytest.raises(FileNotFoundError):
        SlimCodec.from_pretrained(tmp_path)


def test_pocket_qualities() -> None:
    pocket = SlimCodec.from_pretrained("pocket", device="cpu")

    def psnr(stream: bytes, image: Image.Image) -> float:
        error = np.asarray(pocket.decompress(stream), float) - np.asarray(image, float)
        return -10 * float(np.log10(((error / 255) ** 2).mean()))

    image = PocketScenes("test")[2].image
    streams = [pocket.compress(image, quality) for quality in (0, 0.5, 1)]
    fidelity = [psnr(stream, image) for stream in streams]
    assert fidelity[-1] > 20 and fidelity[-1] > fidelity[0] + 3
    assert sorted(streams, key=len) == streams and 8 * len(streams[0]) / 128**2 < 0.05
    reports = [pocket.inspect(stream) for stream in streams]
    assert all(report.bits["header"] <= 64 and abs(report.bits["rounding"]) < 16 for report in reports)
    image = PocketScenes("test", size=200)[3].image.crop((0, 10, 190, 143))
    assert psnr(pocket.compress(image, 1.0), image) > 20
