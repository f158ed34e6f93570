"""The integer network is exact, and the range coder loses nothing and survives everything."""

from __future__ import annotations

import copy
import time

import numpy as np
import pytest
import torch
from compressai.entropy_models import GaussianConditional

from slimlib.entropy import (
    QUALITY_KNOTS,
    TOTAL,
    WEIGHT_MAX,
    FrequencyTable,
    IntegerNet,
    RangeDecoder,
    RangeEncoder,
    clamp_ste,
    gaussian_table,
    quantize_pmf,
)
from slimlib.stream import StreamError

SCALES = np.exp(np.linspace(np.log(0.11), np.log(24), 64))


@pytest.fixture(scope="module")
def table() -> FrequencyTable:
    return FrequencyTable(gaussian_table(SCALES, 63))


def make_net(seed: int = 0) -> IntegerNet:
    torch.manual_seed(seed)
    gains = torch.linspace(0.5, 8, QUALITY_KNOTS)[:, None].repeat(1, 12)
    net = IntegerNet(4, 12, 16, 64, gains, 30 + 0 * gains, 0.5 + torch.rand(QUALITY_KNOTS, 4))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("weight"):
                parameter.mul_(4)
            if "bias" in name:
                parameter.normal_(std=0.3)
    return net


# ---------------------------------------------------------------- integer network


def test_integers_do_not_depend_on_batch_or_threads() -> None:
    net = make_net()
    h_hat = torch.randint(-99, 100, (64, 4, 6, 5))
    threads = torch.get_num_threads()
    try:
        for quality in (0, 77, 255):
            torch.set_num_threads(2)
            two_threads = net.exact(h_hat, quality)
            torch.set_num_threads(1)
            together = net.exact(h_hat, quality)
            one_by_one = [net.exact(h_hat[i : i + 1], quality) for i in range(64)]
            for a, b, c in zip(together, two_threads, zip(*one_by_one, strict=True), strict=True):
                assert torch.equal(a, b) and torch.equal(a, torch.cat(c))
                assert a.unique().numel() > 10  # not trivially equal
            assert together[0].min() >= 0 and together[0].max() <= 63
    finally:
        torch.set_num_threads(threads)


def test_network_equals_integer_arithmetic() -> None:
    """The same sums in int64, which cannot round."""
    net = make_net(1)
    h_hat = torch.randint(-300, 300, (2, 4, 3, 3))
    layer = net.first
    weight, bias = (t.long() for t in layer.integers())
    a = h_hat * 64
    padded = torch.nn.functional.pad(a, (1, 1, 1, 1))
    total = torch.stack(
        [
            sum(
                (padded[:, :, i : i + 3, j : j + 3] * weight[o, :, i, j, None, None]).sum(1)
                for i in range(3)
                for j in range(3)
            )
            + bias[o]
            for o in range(len(bias))
        ],
        1,
    )
    expected = (total >> 10).clamp(-(2**14), 2**14)
    with torch.no_grad():
        assert torch.equal(layer(a.double()).long(), expected)


def test_exact_with_the_largest_weights() -> None:
    net = make_net()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("weight"):
                parameter.copy_(parameter.sign() * 100)  # clamped to the largest integers
    assert int(net.integer_state()["up.weight"].abs().max()) == WEIGHT_MAX
    net.check()
    h_hat = torch.randint(-(2**15), 2**15, (8, 4, 4, 4))
    for a, b in zip(net.exact(h_hat, 130), net.exact(h_hat.flip(0), 130), strict=True):
        assert torch.equal(a, b.flip(0))


def test_check_refuses_weights_that_are_not_finite() -> None:
    net = make_net()
    with torch.no_grad():
        net.last.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="2\\*\\*53"):
        net.check()


def test_training_path_agrees_with_the_exact_one() -> None:
    net = make_net()
    h_hat = torch.randint(-80, 80, (4, 4, 4, 4))
    trained = net(h_hat.float(), torch.full((4,), 100))
    for a, b in zip(trained, net.exact(h_hat, 100), strict=True):
        assert (a == b).float().mean() > 0.98  # float32 sums may round at the edge of a floor
        assert (a - b).abs().max() <= 2
    for a, b in zip(net.prior(torch.tensor([100]), torch.float32), net.exact_prior(100), strict=True):
        assert torch.equal(a.long(), b)


def test_every_parameter_of_the_network_learns() -> None:
    net = make_net()
    quality = torch.tensor([0, 100, 200, 255])
    outputs = *net(torch.randint(-80, 80, (4, 4, 4, 4)).float(), quality), *net.prior(quality, torch.float32)
    sum((t + 1).square().sum() for t in outputs).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_clamp_lets_gradients_back_in() -> None:
    x = torch.tensor([-2.0, -2.0, 0.5, 3.0, 3.0], requires_grad=True)
    clamp_ste(x, 0, 1).backward(torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0]))
    assert x.grad is not None and x.grad.tolist() == [0, -1, 1, 1, 0]


def test_integer_state_round_trip() -> None:
    net, other = make_net(1), make_net(2)
    state = net.integer_state()
    assert all(not t.is_floating_point() for t in state.values())
    other.load_integer_state(state)
    again = other.integer_state()
    assert all(torch.equal(state[k], again[k]) for k in state)
    h_hat = torch.randint(-80, 80, (2, 4, 4, 4))
    for a, b in zip(net.exact(h_hat, 42), other.exact(h_hat, 42), strict=True):
        assert torch.equal(a, b)
    broken = copy.copy(state)
    broken.pop("up.bias")
    with pytest.raises(RuntimeError, match=r"up\.bias"):
        other.load_integer_state(broken)


# ---------------------------------------------------------------- tables


def test_tables_add_up_and_match_the_distribution() -> None:
    frequencies = gaussian_table(SCALES, 63)
    assert frequencies.min() >= 1 and (frequencies.sum(1) == TOTAL).all()
    wide = frequencies[40] / TOTAL
    x = (np.arange(127) + 1) // 2
    assert abs((wide[:-1] * x**2).sum() ** 0.5 - (SCALES[40] ** 2 + 1 / 12) ** 0.5) < 0.01
    gaussian = GaussianConditional(None)
    values = torch.tensor([0.0, 1, -1, 2, -2])
    likelihood = gaussian(values, torch.full((5,), SCALES[30]), training=False)[1]
    np.testing.assert_allclose(frequencies[30, :5] / TOTAL, likelihood, rtol=1e-4)


def test_quantize_pmf_of_counts_is_integer_arithmetic() -> None:
    counts = np.array([5, 0, 3, 10**9])
    table = quantize_pmf(counts)
    assert table.sum() == TOTAL and table.min() >= 1
    expected = [c * (TOTAL - 4) // int(counts.sum()) + 1 for c in counts.tolist()]
    assert table.tolist()[:3] == expected[:3]


@pytest.mark.parametrize("bad", [[], [0, 0], [1, -1]])
def test_quantize_pmf_refuses(bad: list[int]) -> None:
    with pytest.raises(ValueError, match="table"):
        quantize_pmf(np.array(bad, dtype=np.int64))


def test_frequency_table_refuses_wrong_sums() -> None:
    with pytest.raises(ValueError, match=r"2\*\*24"):
        FrequencyTable(np.full((2, 6), 5))


# ---------------------------------------------------------------- range coder


def test_round_trip_of_everything_in_one_stream(table: FrequencyTable) -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 64, 3072)
    symbols = np.round(rng.normal(0, SCALES[rows])).astype(np.int64)
    symbols[[5, 100, 2000]] = [64, -64, 2**15]  # escapes
    encoder = RangeEncoder()
    encoder.encode_categorical(3, [5, 1, 0, 2])
    encoder.encode_categorical(0, [7])
    encoder.encode_bits(0b1011001, 7)
    bits = encoder.encode_table(symbols, rows, table)
    encoder.encode_categorical(1, [1] * 300)
    data = encoder.get_bytes()
    assert bits.shape == (3072,) and bits.min() > 0
    assert encoder.bits / 8 <= len(data) <= encoder.bits / 8 + 2
    decoder = RangeDecoder(data)
    assert decoder.decode_categorical([5, 1, 0, 2]) == 3
    assert decoder.decode_categorical([7]) == 0
    assert decoder.decode_bits(7) == 0b1011001
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


def test_certain_symbols_cost_no_bytes(table: FrequencyTable) -> None:
    encoder = RangeEncoder()
    encoder.encode_table(np.zeros(3000), np.zeros(3000, int), table)
    assert encoder.get_bytes() == b""
    assert not RangeDecoder(b"").decode_table(np.zeros(3000, int), table).any()


def test_escape_that_is_too_large_is_refused(table: FrequencyTable) -> None:
    with pytest.raises(ValueError, match="beyond"):
        RangeEncoder().encode_table(np.array([2**21]), np.array([0]), table)
    with pytest.raises(ValueError, match="outside"):
        RangeEncoder().encode_categorical(4, [1, 1, 1])


def test_random_bytes_end_quickly(table: FrequencyTable) -> None:
    rng = np.random.default_rng(2)
    rows = rng.integers(0, 64, 2000)
    start = time.monotonic()
    for _ in range(60):
        decoder = RangeDecoder(rng.bytes(int(rng.integers(0, 300))))
        try:
            symbols = decoder.decode_table(rows, table)
            assert symbols.shape == (2000,)
            for _ in range(100):
                assert 0 <= decoder.decode_categorical([3, 1, 4]) < 3
        except StreamError:
            pass
    with pytest.raises(StreamError):
        RangeDecoder(b"\xff" * 400).decode_table(rows, table)
    assert time.monotonic() - start < 20


def test_bytes_are_the_same_everywhere() -> None:
    """A fixed message has fixed bytes: a change here breaks every stream that exists."""
    counts = [[1 + 1000 // (1 + i * row) for i in range(20)] for row in range(4)]
    encoder = RangeEncoder()
    encoder.encode_categorical(2, [3, 1, 4])
    encoder.encode_table(
        np.array([0, 1, -3, 70, -9]),
        np.array([3, 2, 1, 0, 1]),
        FrequencyTable(quantize_pmf(np.array(counts))),
    )
    assert encoder.get_bytes().hex() == "9f19f076"
