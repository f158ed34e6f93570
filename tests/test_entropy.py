"""The integer network is exact, and the range coder loses nothing and survives everything."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from compressai.entropy_models import GaussianConditional

from slimlib.entropy import (
    LARGEST,
    TOTAL,
    FrequencyTable,
    IntegerNet,
    RangeDecoder,
    RangeEncoder,
    clamp_ste,
    floor_ste,
    gaussian_table,
    quantize_pmf,
)
from slimlib.stream import StreamError

SCALES = np.exp(np.linspace(np.log(0.11), np.log(24), 64))


@pytest.fixture(scope="module")
def table() -> FrequencyTable:
    return FrequencyTable(gaussian_table(SCALES, 63))


def make_net(seed: int = 0, spread: float = 4) -> IntegerNet:
    """A network in which every parameter matters; a large `spread` brings all weights to their limits."""
    torch.manual_seed(seed)
    gains = torch.linspace(0.5, 8, 6)[:, None].repeat(1, 12)
    net = IntegerNet(16, 64, gains, 30 + torch.randn(6, 12), 0.5 + torch.rand(6, 4), 26.0)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("weight"):
                parameter.mul_(spread)
            if "bias" in name or "prior" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return net


def by_integers(net: IntegerNet, quality: int, h_hat: np.ndarray) -> tuple[np.ndarray, ...]:
    """Scale index, mean and fineness, then the prior's index and mean, in int64, which cannot round."""
    state = {name: values.numpy().astype(np.int64) for name, values in net.integer_state().items()}
    left, part = divmod(quality, 51)

    def knots(name: str) -> np.ndarray:
        values = state[f"{name}.values"]
        return ((values[left] * (51 - part) + values[min(left + 1, 5)] * part) // 51)[None, :, None, None]

    def conv(name: str, a: np.ndarray) -> np.ndarray:
        seen = np.lib.stride_tricks.sliding_window_view(np.pad(a, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), (2, 3))
        total = np.einsum("bchwij,ocij->bohw", seen, state[f"{name}.weight"])
        return (total + (state[f"{name}.bias"] << 6)[:, None, None] >> 10).clip(-(2**14), 2**14)

    a = (h_hat.clip(-(2**14), 2**14) * knots("input_gain") >> 6).clip(-(2**14), 2**14)  # from 2**-12 to 2**-6
    a = (conv("first", a) + knots("first_bias")).clip(0, 2**14)
    a = conv("up", a).clip(0)
    b, c, h, w = a.shape
    a = a.reshape(b, c // 4, 2, 2, h, w).transpose(0, 1, 4, 2, 5, 3).reshape(b, c // 4, 2 * h, 2 * w)
    index, mean, fineness = np.split(conv("last", a), [12, 24], axis=1)
    fineness = (fineness >> 3).clip(-32, 32)
    index = ((index + knots("index_offset") >> 3) + fineness).clip(0, 63)
    mean = (mean * knots("mean_gain") * 16 >> 14).clip(-(2**19), 2**19)
    return index, mean, fineness, knots("prior_index").clip(0, 63), knots("prior_mean")


@pytest.mark.parametrize(("spread", "reach"), [(4, 300), (1e4, 2**15)])
def test_network_equals_integer_arithmetic(spread: float, reach: int) -> None:
    """In all its parts, at any quality, up to the largest weights: so threads, batches and devices cannot matter."""
    net, h_hat = make_net(1, spread), torch.randint(-reach, reach, (16, 4, 6, 5))
    assert (int(net.integer_state()["up.weight"].abs().max()) == LARGEST["weight"]) == (spread > 4)
    for quality in (0, 77, 255):
        expected = by_integers(net, quality, h_hat.numpy())
        assert spread > 4 or all(len(np.unique(values)) > 10 for values in expected[:3])  # not trivially equal
        for found, values in zip((*net.exact(quality, h_hat), *net.exact(quality)), expected, strict=True):
            assert np.array_equal(found, values)
        for alone, values in zip(net.exact(quality, h_hat[3:4]), expected, strict=False):
            assert np.array_equal(alone, values[3:4])


def test_training_agrees_with_the_exact_network_and_reaches_every_parameter() -> None:
    net, h_hat, byte = make_net(), torch.randint(-80, 80, (4, 4, 4, 4)), torch.full((4,), 100)
    for a, b in zip(net(h_hat.float(), byte), net.exact(100, h_hat), strict=True):
        assert (a == b).float().mean() > 0.98 and (a - b).abs().max() <= 2  # float32 sums may round before a floor
    for a, b in zip(net.prior(byte[:1]), net.exact(100), strict=True):
        assert torch.equal(a.long(), b)
    quality = torch.tensor([0, 100, 200, 255])
    sum((t + 1).square().sum() for t in (*net(h_hat.float(), quality), *net.prior(quality))).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_straight_through() -> None:
    x = torch.tensor([-2.0, -2.0, 0.5, 3.0, 3.0], requires_grad=True)
    clamp_ste(x, 0, 1).backward(torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0]))
    assert x.grad is not None and x.grad.tolist() == [0, -1, 1, 1, 0]  # what leads back in gets through
    x = torch.cat([torch.randn(9999) * 10.0**k for k in range(-9, 9)] + [torch.tensor([-1e-30, 0.0, -1.0])])
    for values in (x, x.double() / 3):  # to the last bit, which the decoder relies on
        values.requires_grad_()
        floor = floor_ste(values)
        floor.sum().backward()
        assert torch.equal(floor, values.floor()) and values.grad is not None and bool((values.grad == 1).all())


def test_tables_add_up_and_match_the_distribution() -> None:
    frequencies = gaussian_table(SCALES, 63)
    assert frequencies.min() >= 1 and (frequencies.sum(1) == TOTAL).all()
    wide = frequencies[40] / TOTAL
    x = (np.arange(127) + 1) // 2
    assert abs((wide[:-1] * x**2).sum() ** 0.5 - (SCALES[40] ** 2 + 1 / 12) ** 0.5) < 0.01
    values, scales = torch.tensor([0.0, 1, -1, 2, -2]), torch.full((5,), SCALES[30])
    likelihood = GaussianConditional(None)(values, scales, training=False)[1]
    np.testing.assert_allclose(frequencies[30, :5] / TOTAL, likelihood, rtol=1e-4)
    assert gaussian_table([1.0], 1)[0, 3] / TOTAL == pytest.approx(2 * 0.0668072, rel=1e-4)  # the escape: beyond 1.5
    counts = np.array([5, 0, 3, 10**9])  # which become frequencies by integer arithmetic
    table = quantize_pmf(counts)
    assert table.sum() == TOTAL
    assert table.tolist()[:3] == [c * (TOTAL - 4) // int(counts.sum()) + 1 for c in counts.tolist()][:3]


def test_what_no_table_holds_is_refused(table: FrequencyTable) -> None:
    for counts in ([], [0, 0], [1, -1], [2**37, 2**37]):
        with pytest.raises(ValueError, match="table"):
            quantize_pmf(np.array(counts, int))
    for rows in ([[5] * 6] * 2, [[TOTAL // 3] * 3], [[0, TOTAL - 2, 1, 1]]):
        with pytest.raises(ValueError, match="frequency table"):
            FrequencyTable(np.array(rows))
    with pytest.raises(ValueError, match="beyond"):
        RangeEncoder().encode_table(np.array([63 + 2**20]), np.array([0]), table)
    with pytest.raises(KeyError):
        RangeEncoder().encode_categorical(4, [1, 1, 1])


def test_round_trip_of_everything_in_one_stream(table: FrequencyTable) -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 64, 3072)
    symbols = np.round(rng.normal(0, SCALES[rows])).astype(np.int64)
    symbols[[5, 100, 2000, 2001]] = [64, -64, 2**15, -(63 + 2**20 - 1)]  # escapes, to the largest
    encoder = RangeEncoder()
    encoder.encode_categorical(3, [5, 1, 0, 2])
    encoder.encode_categorical(0, [7])
    bits = encoder.encode_table(symbols, rows, table)
    encoder.encode_categorical(1, [1] * 300)
    data = encoder.get_bytes()
    assert encoder.bits / 8 <= len(data) <= encoder.bits / 8 + 2
    assert encoder.bits == pytest.approx(bits.sum() + 2 + np.log2(300), abs=1e-3)
    place = np.where(np.abs(symbols) > 63, 127, 2 * np.abs(symbols) - (symbols > 0))
    escapes = [2 * max(0, abs(int(symbol)) - 63).bit_length() for symbol in symbols]
    np.testing.assert_allclose(bits, 24 - np.log2(gaussian_table(SCALES, 63)[rows, place]) + escapes)
    decoder = RangeDecoder(data)
    assert (decoder.decode_categorical([5, 1, 0, 2]), decoder.decode_categorical([7])) == (3, 0)
    assert np.array_equal(decoder.decode_table(rows, table), symbols)
    assert decoder.decode_categorical([1] * 300) == 1
    assert decoder.bits == pytest.approx(encoder.bits)


def test_short_messages_cost_their_ideal_and_at_most_a_byte_more(table: FrequencyTable) -> None:
    rng = np.random.default_rng(1)
    for length in [0, 1, 2, 3, 5, 8, 13, 40] * 20:
        rows = rng.integers(0, 40, length)
        symbols = np.round(rng.normal(0, SCALES[rows])).astype(np.int64)
        encoder = RangeEncoder()
        encoder.encode_table(symbols, rows, table)
        data = encoder.get_bytes()
        # To name a point in an interval of width 2**-bits takes fewer than bits + 2 bits; then whole bytes.
        assert len(data) <= np.ceil((encoder.bits + 1.01) / 8)
        assert np.array_equal(RangeDecoder(data).decode_table(rows, table), symbols)
    encoder = RangeEncoder()
    encoder.encode_table(np.zeros(3000), np.zeros(3000, int), table)
    assert encoder.get_bytes() == b"", "what is nearly certain costs nothing"
    assert not RangeDecoder(b"").decode_table(np.zeros(3000, int), table).any()


def test_random_bytes_end(table: FrequencyTable) -> None:
    rng = np.random.default_rng(2)
    rows = rng.integers(0, 64, 2000)
    for _ in range(60):
        decoder = RangeDecoder(rng.bytes(int(rng.integers(0, 300))))
        with contextlib.suppress(StreamError):
            assert decoder.decode_table(rows, table).shape == (2000,)
            assert all(0 <= decoder.decode_categorical([3, 1, 4]) < 3 for _ in range(100))
    for data, reason in ((b"\xff" * 400, "encoder"), (b"\xff\xff\xfe" * 20, "too long")):
        with pytest.raises(StreamError, match=reason):
            RangeDecoder(data).decode_table(np.array([0]), FrequencyTable(np.array([[1, 1, 1, TOTAL - 3]])))


def test_bytes_are_the_same_everywhere() -> None:
    """A fixed message has fixed bytes: a change here breaks every stream that exists."""
    counts = [[1 + 1000 // (1 + i * row) for i in range(20)] for row in range(4)]
    encoder = RangeEncoder()
    encoder.encode_categorical(2, [3, 1, 4])
    frequencies = FrequencyTable(quantize_pmf(np.array(counts)))
    encoder.encode_table(np.array([0, 1, -3, 70, -9]), np.array([3, 2, 1, 0, 1]), frequencies)
    assert encoder.get_bytes().hex() == "9f19f076"
    encoder = RangeEncoder()
    encoder.encode_categorical(128, [1] * 256)
    assert encoder.get_bytes() == b"\x80"
