"""The latent compressor: real bytes agree with the estimate, integers come back, files are strict."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slimlib.compressor import CompressorConfig, LatentCompressor, quality_byte
from slimlib.entropy import FrequencyTable, RangeDecoder, RangeEncoder
from slimlib.stream import StreamError

TINY = CompressorConfig(stem=16, width=32, depth=1, heads=2, y_channels=12, h_channels=4, net_width=16)


@pytest.fixture(scope="module")
def compressor() -> LatentCompressor:
    return make(0)


def make(seed: int) -> LatentCompressor:
    torch.manual_seed(seed)
    model = LatentCompressor(TINY)
    with torch.no_grad():  # spread what an untrained model would leave near zero
        model.encoder.h[2].weight.mul_(20)
        model.net.last.weight.mul_(4)
        model.net.index_offset.values.add_(1)  # no symbol is a surprise
        model.log_gain.add_(1)
    model.update()
    return model.eval()


def latent(rows: int, columns: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 4, rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (16, 40), (48, 8)])
@pytest.mark.parametrize("quality", [0.0, 0.3, 1.0])
def test_round_trip_and_coded_length(compressor: LatentCompressor, size: tuple[int, int], quality: float) -> None:
    z = latent(*size)
    encoder = RangeEncoder()
    encoder.encode_categorical(1, [1, 1])  # something before it
    bits = compressor.compress(z, quality, encoder)
    encoder.encode_categorical(2, [1, 1, 1, 1])  # and after it
    data = encoder.get_bytes()

    with torch.no_grad():
        out = compressor(z, quality)
    assert out["h_symbols"].abs().max() > 0 and out["y_symbols"].abs().max() > 0
    estimate = sum(float(-p.log2().sum()) for p in out["likelihoods"].values())
    assert abs(8 * len(data) - estimate - 3) <= 0.02 * estimate + 24
    assert float(bits["y"].sum() + bits["h"].sum()) == pytest.approx(estimate, rel=0.01, abs=2)
    assert bits["y"].shape == (12, size[0] // 4, size[1] // 4)

    decoder = RangeDecoder(data)
    assert decoder.decode_categorical([1, 1]) == 1
    z_hat = compressor.decompress(decoder, size, quality)
    assert decoder.decode_categorical([1, 1, 1, 1]) == 2
    assert torch.allclose(z_hat, out["z_hat"], atol=1e-4)  # the integers are equal, so this is close


def test_batches_and_single_items_have_equal_integers(compressor: LatentCompressor) -> None:
    z, quality = latent(16, 16, batch=6), torch.linspace(0, 1, 6)
    with torch.no_grad():
        out = compressor(z, quality)
    for i in range(6):
        with torch.no_grad():
            alone = compressor(z[i : i + 1], quality[i])
        for name in ("h_symbols", "y_symbols"):
            assert torch.equal(alone[name], out[name][i : i + 1])


def test_decoder_sees_the_encoders_integers(compressor: LatentCompressor) -> None:
    z, byte, coder = latent(16, 16), quality_byte(0.6), RangeEncoder()
    compressor.compress(z, 0.6, coder)
    with torch.no_grad():
        out = compressor(z, 0.6)
    decoder, table = RangeDecoder(coder.get_bytes()), FrequencyTable(compressor.table.numpy())
    index, mean = compressor.net.exact_prior(byte)
    h = torch.from_numpy(decoder.decode_table(index.expand(1, 4, 2, 2).numpy(), table)).reshape(1, 4, 2, 2)
    assert torch.equal(h, out["h_symbols"].long())
    index, _, _ = compressor.net.exact(16 * h + mean, byte)
    y = decoder.decode_table(index.numpy(), table)
    assert np.array_equal(y, out["y_symbols"].flatten().numpy())


def test_wild_latents_still_round_trip(compressor: LatentCompressor) -> None:
    """Far outside the training data symbols are escaped or clipped, never wrong."""
    z = latent(8, 8) * 1e4
    coder = RangeEncoder()
    compressor.compress(z, 1.0, coder)
    z_hat = compressor.decompress(RangeDecoder(coder.get_bytes()), (8, 8), 1.0)
    with torch.no_grad():
        assert torch.allclose(z_hat, compressor(z, 1.0)["z_hat"], rtol=1e-3, atol=1e-2)


def test_other_process_other_threads_same_latent(compressor: LatentCompressor, tmp_path: Path) -> None:
    compressor.save_pretrained(tmp_path)
    coder = RangeEncoder()
    compressor.compress(latent(32, 32), 0.7, coder)
    (tmp_path / "data").write_bytes(coder.get_bytes())
    z_hat = compressor.decompress(RangeDecoder(coder.get_bytes()), (32, 32), 0.7)
    code = (
        "import sys, torch; torch.set_num_threads(2)\n"
        "from slimlib.compressor import LatentCompressor\n"
        "from slimlib.entropy import RangeDecoder\n"
        "from safetensors.torch import save_file\n"
        "model = LatentCompressor.from_pretrained(sys.argv[1], device='cpu')\n"
        "data = open(sys.argv[1] + '/data', 'rb').read()\n"
        "z_hat = model.decompress(RangeDecoder(data), (32, 32), 0.7)\n"
        "save_file({'z_hat': z_hat}, sys.argv[1] + '/out.safetensors')\n"
    )
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "PASSIVE",  # on a busy machine, threads that spin while they wait take minutes
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=300, env=environment)
    assert torch.allclose(load_file(tmp_path / "out.safetensors")["z_hat"], z_hat, atol=1e-4)


def test_damaged_bytes_never_crash(compressor: LatentCompressor) -> None:
    coder = RangeEncoder()
    compressor.compress(latent(16, 16), 0.5, coder)
    data, rng = coder.get_bytes(), np.random.default_rng(0)
    for _ in range(40):
        broken = bytearray(data[: int(rng.integers(0, len(data)))])
        for at in rng.integers(0, max(1, len(broken)), 3):
            if broken:
                broken[at] ^= int(rng.integers(1, 256))
        try:
            z_hat = compressor.decompress(RangeDecoder(bytes(broken)), (16, 16), 0.5)
            assert z_hat.shape == (1, 4, 16, 16)
        except StreamError:
            pass


def test_refusals(compressor: LatentCompressor) -> None:
    coder = RangeEncoder()
    for z, quality, reason in [
        (latent(8, 12), 0.5, "multiples of 8"),
        (latent(8, 8, batch=2), 0.5, "one finite"),
        (latent(8, 8) * float("nan"), 0.5, "one finite"),
        (latent(8, 8), 1.5, "Quality"),
        (latent(8, 8), float("nan"), "Quality"),
    ]:
        with pytest.raises(ValueError, match=reason):
            compressor.compress(z, quality, coder)
    with pytest.raises(ValueError, match="no multiple"):
        compressor.decompress(RangeDecoder(b""), (8, 9), 0.5)
    with pytest.raises(RuntimeError, match="update"):
        LatentCompressor(TINY).compress(latent(8, 8), 0.5, coder)
    with pytest.raises(ValueError):
        quality_byte(-0.1)


def test_large_grids_pool_their_attention(compressor: LatentCompressor) -> None:
    coder = RangeEncoder()
    compressor.compress(latent(160, 136), 0.2, coder)
    assert compressor.decompress(RangeDecoder(coder.get_bytes()), (160, 136), 0.2).shape == (1, 4, 160, 136)


# ---------------------------------------------------------------- files


def test_save_and_load_are_exact(tmp_path: Path) -> None:
    model = make(1)
    model.save_pretrained(tmp_path)
    other = LatentCompressor.from_pretrained(tmp_path, device="cpu")
    assert other.fingerprint() == model.fingerprint()
    coders = RangeEncoder(), RangeEncoder()
    for m, coder in zip((model, other), coders, strict=True):
        m.compress(latent(16, 16), 0.4, coder)
    assert coders[0].get_bytes() == coders[1].get_bytes()
    other.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_fingerprint_sees_what_decoding_depends_on() -> None:
    reference = make(1).fingerprint()
    assert make(1).fingerprint() == reference != make(2).fingerprint()
    for change in (
        lambda m: m.decoder.enter.bias.data.add_(0.1),
        lambda m: m.net.up.weight.data[0].add_(2**-9),
        lambda m: m.table[9, :2].add_(torch.tensor([1, -1], dtype=torch.int32)),
        lambda m: m.log_inverse_gain.data.add_(0.1),
        lambda m: setattr(m.config, "steps", 7),
    ):
        model = make(1)
        model.config = CompressorConfig(**vars(model.config))
        change(model)
        assert model.fingerprint() != reference
    model = make(1)
    model.encoder.y.bias.data.add_(1)
    assert model.fingerprint() == reference  # a better encoder writes streams for the same decoder


def test_config_refuses_unknown_keys(tmp_path: Path) -> None:
    model = make(1)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "widht": 3}))
    with pytest.raises(ValueError, match="widht"):
        LatentCompressor.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="t0_table"):
        CompressorConfig(t0_table=[])


def test_loading_is_strict(tmp_path: Path) -> None:
    make(1).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)

    def refuses(changed: dict[str, torch.Tensor], reason: str) -> None:
        save_file(changed, path)
        with pytest.raises(ValueError, match=reason):
            LatentCompressor.from_pretrained(tmp_path)

    refuses({k: v for k, v in tensors.items() if k != "net.up.weight"}, r"missing \['net.up.weight'\]")
    refuses({**tensors, "extra": torch.zeros(1)}, "extra")
    refuses({**tensors, "table": tensors["table"][:-1]}, "table")
    refuses({**tensors, "log_gain": tensors["log_gain"].float()}, "log_gain")
    with pytest.raises(FileNotFoundError, match="holds no compressor"):
        LatentCompressor.from_pretrained(tmp_path / "nowhere")


def test_t0_follows_its_table() -> None:
    config = CompressorConfig(t0_table=[[1.0, 100], [0.0, 500]])
    assert [config.t0(q) for q in (0, 0.5, 1)] == [500, 300, 100]


def test_three_stages() -> None:
    torch.manual_seed(0)
    config = CompressorConfig(**{**vars(TINY), "stages": 3, "latent_channels": 16, "factor": 8, "y_channels": 8})
    model = LatentCompressor(config).eval()
    model.update()
    assert config.multiple == 16
    z, coder = torch.randn(1, 16, 32, 16), RangeEncoder()
    model.compress(z, 0.5, coder)
    assert model.decompress(RangeDecoder(coder.get_bytes()), (32, 16), 0.5).shape == z.shape
