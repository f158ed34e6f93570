"""The latent compressor: every part of the network counts, bytes agree with the estimate, files are strict."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.interpolate import interp1d
from tiny_codec import TINY
from torch import Tensor
from torch.nn import functional as F

from slimlib.compressor import CompressorConfig, LatentCompressor, quality_byte
from slimlib.entropy import FrequencyTable, RangeDecoder, RangeEncoder
from slimlib.stream import StreamError


def make(seed: int = 0) -> LatentCompressor:
    """As after some training: nothing is at its starting point, so that every part has something to say."""
    torch.manual_seed(seed)
    model = LatentCompressor(TINY)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gain") or "modulate" in name or name == "gate_depth":
                parameter.add_(0.3 * torch.randn_like(parameter))
        model.log_gain.add_(1)
        model.encoder.h[2].weight.mul_(20)
        model.encoder.roi[0].weight.mul_(5)
        model.net.last.weight.mul_(6)
        model.net.last.bias[-1] += 0.5
        model.net.index_offset.values.add_(1)  # no symbol is a surprise
        model.net.prior_mean.values.add_(torch.randn_like(model.net.prior_mean.values))
    model.update()
    return model.eval()


@pytest.fixture(scope="module")
def model() -> LatentCompressor:
    return make()


def latent(rows: int, columns: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 4, rows, columns, generator=torch.Generator().manual_seed(0))


def coded(model: LatentCompressor, z: Tensor, quality: float) -> bytes:
    coder = RangeEncoder()
    model.compress(z, quality, coder)
    return coder.get_bytes()


def at(knots: Tensor, byte: int) -> Tensor:
    """What stands at a quality byte: (channels, 1, 1)."""
    return torch.from_numpy(interp1d(range(0, 256, 51), knots.detach().numpy(), axis=0)(byte))[:, None, None]


@torch.no_grad()
def test_the_forward_pass_is_the_figure(model: LatentCompressor) -> None:
    """Gate, gains, hyper-latent, fineness, scales, quality: written out, item by item; each of them matters."""
    z, qualities, kinds = latent(16, 24, 2), torch.tensor([0.1, 0.73]), []
    handle = model.net.first.register_forward_hook(lambda _module, inputs, _out: kinds.append(inputs[0].dtype))
    out = model(z, qualities)
    torch.manual_seed(3)
    trained = model.train()(z, qualities)
    model.eval(), torch.manual_seed(3), handle.remove()
    assert kinds == [torch.float64, torch.float64, torch.float32], "exact, item by item, but while it trains"
    noise = [torch.empty_like(out[name]).uniform_(-0.5, 0.5) for name in ("h_symbols", "y_symbols")][1]
    for i, byte in enumerate((round(255 * 0.1), round(255 * 0.73))):
        share = torch.tensor([byte / 255])
        y, h, logits = model.encoder(z[i : i + 1], share)
        inside = F.avg_pool2d(logits.sigmoid(), 4)
        gate = torch.exp(-F.softplus(at(model.gate_depth, byte)) * (1 - inside))
        index, mean = model.net.exact(byte)
        h_mean = mean / 16
        h_symbols = (h * at(model.log_hyper_gain, byte).exp() - h_mean).round()
        assert torch.equal(out["h_symbols"][i], h_symbols[0].float())
        index, mean, fineness = model.net.exact(byte, (16 * (h_symbols + h_mean)).long())
        step, mean = 2 ** (-fineness / 8), mean / 16
        x = y * gate * at(model.log_gain, byte).exp() / step - mean
        y_symbols = x.round()
        assert torch.equal(out["y_symbols"][i], y_symbols[0].float())
        y_hat = (y_symbols + mean) * at(model.log_inverse_gain, byte).exp() * step
        z_hat = model.decoder(y_hat.float(), index / 64 - 0.5, share)
        torch.testing.assert_close(out["z_hat"][i], z_hat[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out["roi_logits"][i], logits[0])
        # the likelihood is that of an interval under its own Gaussian: about the symbol, or when training anywhere
        normal = torch.distributions.Normal(0, 0.11 * np.exp(index * np.log(24 / 0.11) / 63))
        for likelihood, middle in ((out, y_symbols), (trained, x + noise[i])):
            expected = normal.cdf(middle + 0.5) - normal.cdf(middle - 0.5)
            torch.testing.assert_close(likelihood["likelihoods"]["y"][i], expected[0].float(), atol=1e-4, rtol=1e-3)
        found = (h_symbols, h_mean, y_symbols, mean, fineness, index, gate, logits)
        assert all(len(values.unique()) > 2 for values in found), "nothing is constant, and so nothing goes unseen"


@torch.no_grad()
@pytest.mark.parametrize(("rows", "columns"), [(4, 16), (34, 40)])
def test_all_inputs_are_felt_from_end_to_end(model: LatentCompressor, rows: int, columns: int) -> None:
    """Attention reaches over the whole grid, also where it is pooled; quality and scales reach the transforms."""
    z, quality = latent(4 * rows, 4 * columns), torch.tensor([0.2])
    y, scale = F.pixel_unshuffle(z, 4).split(8, dim=1)[:2]
    for transform, inputs in ((model.encoder, [z, quality]), (model.decoder, [y, scale, quality])):
        for i, values in enumerate(inputs):
            changed = values.clone()
            changed[..., : -(-values.shape[-1] // 4)] += 0.7  # the first quarter of the columns; all of a quality
            outputs = (transform(*inputs), transform(*inputs[:i], changed, *inputs[i + 1 :]))
            for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in outputs), strict=True):
                assert not torch.equal(one[..., -1, -1], other[..., -1, -1])


def test_attention_has_a_bound(model: LatentCompressor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, attention = set(), F.scaled_dot_product_attention
    spy = lambda q, k, v: seen.add((q.shape[1], q.shape[2], k.shape[2])) or attention(q, k, v)  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    z = latent(160, 136)
    assert model.decompress(RangeDecoder(coded(model, z, 0.2)), (160, 136), 0.2).shape == z.shape
    assert seen == {(TINY.heads, 40 * 34, 32 * 32)}, "every cell asks; it is answered by 32 x 32 at the most"


def test_transforms_start_as_a_block_dct() -> None:
    """With all coefficients the direct paths are a transform and its inverse; with few they keep the lowest."""
    z = latent(16, 16)
    whole, few = LatentCompressor(replace(TINY, y_channels=64)), LatentCompressor(replace(TINY, y_channels=4))
    y = whole.encoder.direct(F.pixel_unshuffle(z, 4))
    torch.testing.assert_close(F.pixel_shuffle(whole.decoder.direct(y), 4), z, atol=1e-5, rtol=1e-5)
    means = few.encoder.direct(F.pixel_unshuffle(z, 4)) / 4
    torch.testing.assert_close(means, F.avg_pool2d(z, 4), atol=1e-5, rtol=1e-5)
    for transform, inputs in ((few.encoder, (z,)), (few.decoder, (y[:, :4], y[:, :4]))):
        with torch.no_grad():  # what is learned is added to them
            before = transform(*inputs, torch.ones(1))
            transform.direct.weight.zero_()
            after = transform(*inputs, torch.ones(1))
        one, other = (x if isinstance(x, Tensor) else x[0] for x in (before, after))
        assert 1e-3 < other.abs().mean() < one.abs().mean(), "little at first"


def test_training_sees_noise_and_passes_gradients() -> None:
    model = make().train()
    z = latent(16, 16, 2).requires_grad_()
    one, other = model(z, 0.5), model(z, 0.5)
    assert torch.equal(one["z_hat"], other["z_hat"]), "the decoder sees rounded values,"
    for name in "yh":
        assert not torch.equal(one["likelihoods"][name], other["likelihoods"][name]), "rates uniform noise"
    (straight,) = torch.autograd.grad(one["z_hat"].sum(), z, retain_graph=True)
    assert bool((straight != 0).all()), "a gradient goes straight through the rounding"
    with torch.no_grad():
        torch.testing.assert_close(make()(z, 0.5)["z_hat"], one["z_hat"], atol=1e-3, rtol=1e-3)
    bits = sum(-p.log2().sum() for p in one["likelihoods"].values())
    (one["z_hat"].square().sum() + bits).backward(retain_graph=True)
    silent = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert silent == {"encoder.roi.0.weight", "encoder.roi.0.bias"}, "the head answers for the region alone"
    modulated = [p.grad for name, p in model.named_parameters() if name.endswith("modulate.bias")]
    assert len(modulated) == 2 and all(bool((grad != 0).all()) for grad in modulated), "the quality, four times a block"
    model.zero_grad()
    one["roi_logits"].sum().backward()
    assert model.encoder.roi[0].weight.grad.abs().sum() > 0 and model.encoder.down[0].weight.grad.abs().sum() > 0
    maps = model.region(z, 0.5)  # where the encoder sees the object; a training goes on
    torch.testing.assert_close(maps, make().encoder(z, torch.full((2,), 0.5))[2].sigmoid())
    assert model.training and not maps.requires_grad and maps.shape == (2, 1, 16, 16)
    with torch.no_grad():  # a gate that is shut turns down what is outside
        before, model.encoder.roi[0].bias[:] = model(z, 0.4)["y_symbols"].abs().mean(), -100
        model.gate_depth.fill_(5)
        assert model(z, 0.4)["y_symbols"].abs().mean() < before / 2


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (16, 40)])
@pytest.mark.parametrize(("quality", "wild"), [(0, 1), (0.3, 1), (1, 1), (1, 1e4)])
def test_round_trip_and_coded_length(model: LatentCompressor, size: tuple, quality: float, wild: float) -> None:
    """Far outside the training data symbols are escaped or clipped, never wrong."""
    z, encoder = latent(*size) * wild, RangeEncoder()
    encoder.encode_categorical(1, [1, 1])  # something before it
    bits = model.compress(z, quality, encoder)
    encoder.encode_categorical(2, [1, 1, 1, 1])  # and after it
    data = encoder.get_bytes()
    with torch.no_grad():
        out = model(z, quality)
    estimate = {name: float(-p.log2().sum()) for name, p in out["likelihoods"].items()}
    if wild == 1:
        assert abs(8 * len(data) - sum(estimate.values()) - 3) <= 0.02 * sum(estimate.values()) + 24
        assert {name: float(cost.sum()) for name, cost in bits.items()} == pytest.approx(estimate, rel=0.01, abs=2)
    assert bits["y"].shape == (8, size[0] // 4, size[1] // 4) and bits["h"].shape == (4, size[0] // 8, size[1] // 8)
    decoder = RangeDecoder(data)
    assert decoder.decode_categorical([1, 1]) == 1
    z_hat = model.decompress(decoder, size, quality)
    assert decoder.decode_categorical([1, 1, 1, 1]) == 2
    torch.testing.assert_close(z_hat, out["z_hat"], atol=1e-4 * wild, rtol=1e-4)  # the integers are equal


def test_damaged_bytes_never_crash(model: LatentCompressor) -> None:
    data, rng = coded(model, latent(16, 16), 0.5), np.random.default_rng(0)
    for _ in range(40):
        broken = bytearray(data[: int(rng.integers(1, len(data)))])
        for position in rng.integers(0, len(broken), 3):
            broken[position] ^= int(rng.integers(1, 256))
        with contextlib.suppress(StreamError):
            assert model.decompress(RangeDecoder(bytes(broken)), (16, 16), 0.5).shape == (1, 4, 16, 16)
    huge, table = RangeEncoder(), FrequencyTable(model.table.numpy())
    huge.encode_table(np.full(4, 2**15 + 1), np.zeros(4, int), table)
    with pytest.raises(StreamError, match="no encoder"):
        model.decompress(RangeDecoder(huge.get_bytes()), (8, 8), 0.5)


def test_refusals(model: LatentCompressor) -> None:
    for z, quality, reason in [
        (latent(8, 12), 0.5, "multiples of 8"),
        (latent(8, 8)[:, :3], 0.5, r"\(B, 4, h, w\)"),
        (latent(8, 8, batch=2), 0.5, "one latent"),
        (latent(8, 8) * float("nan"), 0.5, "not finite.*float32"),
        (latent(8, 8), 1.5, "Quality"),
        (latent(8, 8), float("nan"), "Quality"),
    ]:
        with pytest.raises(ValueError, match=reason):
            coded(model, z, quality)
    with pytest.raises(RuntimeError, match="update"):
        coded(LatentCompressor(TINY), latent(8, 8), 0.5)
    assert [quality_byte(q) for q in (0, 0.499, 1)] == [0, 127, 255]


def test_config() -> None:
    walks = [[0.0, 500, 4, 3.0], [0.2, 300, 1, 2.0], [0.8, 0, 0, 1.0]]
    found = [CompressorConfig(walks=walks).walk(q) for q in (0, 0.19, 51 / 255, 0.7, 0.8, 1)]
    assert found == [tuple(walks[i][1:]) for i in (0, 0, 1, 1, 2, 2)], "a row holds from its quality on"
    tables = [], [[0.0, 500, 4]], [[0.1, 500, 4, 3]], [*walks, walks[1]], [walks[0]] * 2, [[0.0, float("nan"), 4, 3]]
    for wrong in (*({"walks": table} for table in tables), {"width": 30, "heads": 4}):
        with pytest.raises(ValueError, match="walks must be rows|heads"):
            CompressorConfig(**wrong)
    config = replace(TINY, stages=3, latent_channels=16, factor=8)
    model, z = LatentCompressor(config).eval(), torch.randn(1, 16, 32, 16)
    model.update()
    assert config.multiple == 16
    assert model.decompress(RangeDecoder(coded(model, z, 0.5)), (32, 16), 0.5).shape == z.shape


def test_save_and_load_are_exact(tmp_path: Path) -> None:
    model = make(1).train()
    model.table[3, :2] += torch.tensor([1, -1], dtype=torch.int32)  # as another machine rounds: it stays as it is
    table = model.table.clone()
    model.save_pretrained(tmp_path)
    other = LatentCompressor.from_pretrained(tmp_path, device="cpu")
    assert other.fingerprint() == model.fingerprint() and not other.training
    kept = [{k: v for k, v in m.state_dict().items() if not k.startswith("gaussian")} for m in (model, other)]
    assert all(map(torch.equal, kept[0].values(), kept[1].values())), "the model in memory is the stored one"
    assert torch.equal(other.table, table) and coded(model, latent(16, 16), 0.4) == coded(other, latent(16, 16), 0.4)
    assert model.training, "and goes on training"
    other.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    stored = load_file(tmp_path / "model.safetensors")
    assert {str(t.dtype) for n, t in stored.items() if n.startswith("net.")} == {"torch.int16", "torch.int32"}
    assert {t.dtype for n, t in stored.items() if not n.startswith(("net.", "table"))} == {torch.float16}
    other.net.last.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        other.save_pretrained(tmp_path)


def test_fingerprint_sees_what_decoding_depends_on() -> None:
    reference = make(1).fingerprint()
    assert make(1).fingerprint() == reference != make(2).fingerprint()
    for part in ("decoder.enter.bias", "net.up.weight", "table", "log_inverse_gain", "config"):
        model = make(1)
        if part == "config":
            model.config = replace(model.config, walks=[[0.0, 500, 7, 3]])
        else:
            model.state_dict()[part].flatten()[:1].add_(1)
        assert model.fingerprint() != reference, part
    model = make(1)
    for part in (model.encoder.y.bias, model.log_gain, model.log_hyper_gain, model.gate_depth):
        part.data.add_(1)
    assert model.fingerprint() == reference, "a better encoder writes streams for the same decoder"


def test_loading_is_strict(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors = load_file(path)
    for changed, reason in (
        ({k: v for k, v in tensors.items() if k != "net.up.weight"}, "net.up.weight: missing"),
        ({**tensors, "extra": torch.zeros(1)}, "extra"),
        ({**tensors, "table": tensors["table"][:-1]}, "table"),
        ({**tensors, "log_gain": tensors["log_gain"].float()}, "log_gain"),
    ):
        save_file(changed, path)
        with pytest.raises(ValueError, match=reason):
            LatentCompressor.from_pretrained(tmp_path)
    save_file(tensors, path)
    config.write_text(json.dumps({**asdict(TINY), "widht": 3}))
    with pytest.raises(ValueError, match="widht"):
        LatentCompressor.from_pretrained(tmp_path)
    config.unlink()
    with pytest.raises(FileNotFoundError, match="holds no compressor"):
        LatentCompressor.from_pretrained(tmp_path)


def test_a_quality_and_its_byte_walk_alike() -> None:
    config = CompressorConfig(walks=[[i / 20, 50 * i, 1, 1.0] for i in range(20)])
    for i in range(20):
        assert config.walk(i / 20).t0 == config.walk(quality_byte(i / 20) / 255).t0 == 50 * i
