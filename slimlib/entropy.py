"""Exact entropy coding: an integer network gives the probabilities, one range coder turns symbols into bytes.

Encoder and decoder must agree on every probability to the last bit, on any machine. Three rules make it so:

1. What goes from the decoded hyper-latent to the parameters of the latent (`IntegerNet`) has integer weights
   and integer activations, carried in float64. Every partial sum is an integer below 2**53, which float64
   holds exactly (a layer adds 9 * channels numbers below 2**27, and a bias below 2**26), so the order of
   summation (threads, batch size, BLAS, device) changes nothing.
2. Probabilities are tables of integers, computed once when training ends and stored with the weights
   (`gaussian_table`); decoding evaluates no exponential and no error function.
3. The range coder (constriction) gets frequencies that add up to exactly 2**24, so its own arithmetic does
   not round either (see `_float_rows`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import constriction
import numpy as np
import torch
from compressai.ops import quantize_ste
from compressai.ops.bound_ops import LowerBoundFunction
from scipy.special import ndtr
from torch import Tensor, nn
from torch.nn import functional as F

from slimlib.stream import StreamError

FREQUENCY_BITS = 24  # precision of constriction's models
TOTAL = 1 << FREQUENCY_BITS
ESCAPE_BITS = 20  # how far beyond its table a symbol may be: below 2**20
ACTIVATION_BITS = 6  # fractional bits of an activation: the integer a stands for a / 64
ACTIVATION_MAX = 2**14  # activations are clamped to +-2**14, or 256 in real units
WEIGHT_BITS = 10  # fractional bits of a weight
LARGEST = {"weight": 2**13 - 1, "bias": 2**20, "values": 2**20}  # weights fit int16, +-8 in real units
MEAN_STEPS = 16  # means are multiples of 1/16
FINENESS_STEPS = 8  # the fineness of the quantiser comes in eighths of an octave,
FINENESS_MAX = 32  # four octaves up or down
QUALITY_KNOTS = 6  # at the quality bytes 0, 51, ..., 255
KNOT_DISTANCE = 255 // (QUALITY_KNOTS - 1)


class RangeEncoder:
    """One stream for everything. `bits` counts the ideal cost of what was encoded so far."""

    def __init__(self) -> None:
        self._coder = constriction.stream.queue.RangeEncoder()
        self.bits = 0.0

    def encode_table(self, symbols: np.ndarray, rows: np.ndarray, table: FrequencyTable) -> np.ndarray:
        """Append integers `symbols` (n,), each with its row of the table; return the ideal bits (n,) of each.

        Symbols outside -bound..bound follow as Exp-Golomb numbers, after all the others. A magnitude of bound + 2**20
        or more raises ValueError.
        """
        symbols, rows = np.asarray(symbols).ravel(), np.asarray(rows).ravel()
        outside = np.abs(symbols) > table.bound
        coded = np.where(outside, 2 * table.bound + 1, 2 * np.abs(symbols) - (symbols > 0)).astype(np.int32)
        self._coder.encode(coded, _FAMILY, table.rows[rows])
        bits = table.bits[rows, coded]
        self.bits += float(bits.sum())
        for i in np.flatnonzero(outside):
            bits[i] += self._escape(abs(int(symbols[i])) - table.bound, symbols[i] < 0)
        return bits

    def encode_categorical(self, symbol: int, pmf_int: Sequence[int] | np.ndarray) -> None:
        """Append one symbol 0..n-1 with integer frequencies of any sum; zeros stay encodable at 24 bits."""
        table = quantize_pmf(np.asarray(pmf_int, dtype=np.int64))
        if len(table) > 1:  # a sole possibility costs nothing
            self._coder.encode(np.array([symbol], np.int32), _FAMILY, _float_rows(table[None]))
            self.bits += FREQUENCY_BITS - float(np.log2(table[symbol]))

    def _escape(self, excess: int, negative: bool) -> int:
        """Exp-Golomb code of excess >= 1 and a sign, bit by bit; returns the number of bits."""
        digits = f"{excess:b}"
        if len(digits) > ESCAPE_BITS:
            raise ValueError(f"A symbol is {excess} beyond its table; the stream holds up to 2**{ESCAPE_BITS}.")
        code = "1" * (len(digits) - 1) + "0" + digits[1:] + str(int(negative))
        for bit in code:
            self.encode_categorical(int(bit), _BIT)
        return len(code)

    def get_bytes(self) -> bytes:
        """The shortest byte string that decodes to what was encoded, given zeros after its end.

        Any number in [low, low + range) will do. constriction seals with whole 32-bit words; here the number
        with the most trailing zeros is taken and its zero bytes are left out. That saves about 3 bytes.
        """
        words = self._coder.get_compressed()
        position, (lower, width) = self._coder.pos()
        total = position + 2  # in words: those written, and 64 bits of state
        sealed = int.from_bytes(words.astype(">u4").tobytes(), "big") << 32 * (total - len(words))
        # `lower` lacks the carry into words already written; the sealed number, inside the interval, has it.
        low = sealed - ((sealed - lower) & (2**64 - 1))
        high = low + width - 1
        if low == 0:
            return b""
        zeros = ((low - 1) ^ high).bit_length() - 1  # below the first bit where low - 1 and high differ
        return (high >> zeros << zeros).to_bytes(4 * total, "big").rstrip(b"\0")


class RangeDecoder:
    """Mirror of `RangeEncoder`. Damaged bytes give wrong symbols or `StreamError`, no hang, no crash.

    `bits` counts as the encoder's does; `spent` holds what each symbol of a table cost, an array (n,) a call.
    """

    def __init__(self, data: bytes) -> None:
        words = np.frombuffer(data + bytes(-len(data) % 4), dtype=">u4").astype(np.uint32)
        self._coder = constriction.stream.queue.RangeDecoder(words)
        self.bits, self.spent = 0.0, list[np.ndarray]()

    def decode_table(self, rows: np.ndarray, table: FrequencyTable) -> np.ndarray:
        """Take as many integers as there are `rows` (n,); returns int64 (n,)."""
        rows = np.asarray(rows).ravel()
        coded = self._decode(table.rows[rows])
        bits = table.bits[rows, coded]
        self.bits += float(bits.sum())
        symbols = _zigzag(table.bound + 1)[coded]
        for i in np.flatnonzero(coded == 2 * table.bound + 1):
            before = self.bits
            symbols[i] = self._escape(table.bound)
            bits[i] += self.bits - before
        self.spent.append(bits)
        return symbols

    def decode_categorical(self, pmf_int: Sequence[int] | np.ndarray) -> int:
        """Take one symbol 0..n-1."""
        table = quantize_pmf(np.asarray(pmf_int, dtype=np.int64))
        if len(table) == 1:
            return 0
        symbol = int(self._decode(_float_rows(table[None]))[0])
        self.bits += FREQUENCY_BITS - float(np.log2(table[symbol]))
        return symbol

    def _escape(self, bound: int) -> int:
        """A number beyond -bound..bound."""
        length, excess = 1, 1
        while self.decode_categorical(_BIT):
            length += 1
            if length > ESCAPE_BITS:
                raise StreamError("The payload is damaged: an escaped number is too long.")
        for _ in range(length - 1):
            excess = excess << 1 | self.decode_categorical(_BIT)
        return -(bound + excess) if self.decode_categorical(_BIT) else bound + excess

    def _decode(self, rows: np.ndarray) -> np.ndarray:
        try:
            return self._coder.decode(_FAMILY, rows)
        except AssertionError as error:  # what constriction raises when no symbol fits
            raise StreamError("The payload is damaged: it cannot come from the encoder.") from error


class FrequencyTable:
    """Integer frequencies ready for the coder: each row a distribution over 0, 1, -1, .. -bound and an escape."""

    def __init__(self, frequencies: np.ndarray | Tensor) -> None:
        table = np.asarray(frequencies, dtype=np.int64)
        if table.ndim != 2 or table.shape[1] < 4 or table.shape[1] % 2:
            raise ValueError(f"A frequency table has an even number of columns, four or more; got {table.shape}.")
        if table.min() < 1 or (table.sum(1) != TOTAL).any():
            raise ValueError("The entries of a frequency table are at least 1, and each row adds up to 2**24.")
        self.bound = (table.shape[1] - 2) // 2
        self.rows = _float_rows(table)
        self.bits = FREQUENCY_BITS - np.log2(table)


def gaussian_table(scales: Sequence[float], bound: int) -> np.ndarray:
    """Frequencies (levels, 2 * bound + 2) of round(N(0, scale)) at 0, 1, -1, .. -bound, and of the escape."""
    sigma = np.asarray(scales, dtype=np.float64)[:, None]
    x = np.abs(_zigzag(bound))
    pmf = ndtr((0.5 - x) / sigma) - ndtr((-0.5 - x) / sigma)
    tail = 2 * ndtr(-(bound + 0.5) / sigma)
    return quantize_pmf(np.concatenate([pmf, tail], 1))


def quantize_pmf(pmf: np.ndarray) -> np.ndarray:
    """Probabilities or counts (..., n) -> integer frequencies >= 1 that add up to exactly 2**24.

    Integers in give integers by integer arithmetic alone, so a table of counts means the same everywhere.
    """
    pmf = np.asarray(pmf)
    pmf = pmf.astype(np.int64 if np.issubdtype(pmf.dtype, np.integer) else np.float64)
    n, total = pmf.shape[-1], pmf.sum(-1, keepdims=True)
    if n > 2**20 or (pmf < 0).any() or not ((total > 0) & (total < 2**38)).all():
        raise ValueError(f"A table needs 1 to 2**20 entries, none negative, of a sum in 1..2**38; got {pmf.shape}.")
    if pmf.dtype == np.int64:
        table = 1 + pmf * (TOTAL - n) // total
    else:
        table = 1 + np.floor(pmf / total * (TOTAL - n)).astype(np.int64)
    likeliest = table.argmax(-1)[..., None]  # it gets the little that is lost to rounding
    rest = TOTAL - table.sum(-1, keepdims=True)
    np.put_along_axis(table, likeliest, np.take_along_axis(table, likeliest, -1) + rest, -1)
    return table.astype(np.int32)


def _zigzag(bound: int) -> np.ndarray:
    """0, 1, -1, 2, -2, ..: zero comes first, so zeros at the end of a stream take no bytes at all."""
    index = np.arange(2 * bound + 1)
    return np.where(index % 2 == 1, (index + 1) // 2, -(index // 2))


def _float_rows(table: np.ndarray) -> np.ndarray:
    """Frequencies -> the float32 numbers that make constriction use exactly these frequencies.

    For n weights of sum s it computes floor(cumulative * (2**24 - n) / s) + index. Handing it frequency - 1
    makes s = 2**24 - n: the factor is exactly 1, the sums are integers below 2**24, and nothing rounds.
    """
    return (table - 1).astype(np.float32)


_FAMILY = constriction.stream.model.Categorical(perfect=False)
_BIT = quantize_pmf(np.array([1, 1]))


class IntegerNet(nn.Module):
    """From the decoded hyper-latent to what the latent needs: scale indices, means, fineness of the quantiser.

    Stands where the hyper-decoder h_s of Minnen et al. (arXiv 1809.02736) stands; integers as in Balle et al.,
    "Integer networks for data compression with latent-variable models" (ICLR 2019). Its parameters are real numbers
    while training; what is computed with, and stored, is their rounding.

    Args:
        width, levels: channels inside; number of scales in the table.
        gains: (6, outputs) gain of the latent at the quality knots: starting point for the means.
        index_start: (6, outputs) scale index of the latent at the knots before training.
        hyper_gains: (6, inputs) gain of the hyper-latent at the knots; its inverse is the starting point.
        prior_start: scale index of the hyper-latent before training.
    """

    def __init__(
        self, width: int, levels: int, gains: Tensor, index_start: Tensor, hyper_gains: Tensor, prior_start: float
    ) -> None:
        super().__init__()
        inputs, self.outputs, self.levels = hyper_gains.shape[1], gains.shape[1], levels
        self.input_gain = IntegerKnots(1 / hyper_gains, bits=8)
        self.first = IntegerConv2d(inputs, width)
        self.first_bias = IntegerKnots(torch.zeros(QUALITY_KNOTS, width), bits=ACTIVATION_BITS)
        self.up = IntegerConv2d(width, 4 * width)
        self.last = IntegerConv2d(width, 2 * self.outputs + 1)
        # One real unit is 8 steps of the table, here and at the network's output.
        self.index_offset = IntegerKnots(index_start / 8, bits=ACTIVATION_BITS)
        self.mean_gain = IntegerKnots(gains, bits=8)
        self.prior_index = IntegerKnots(torch.full((QUALITY_KNOTS, inputs), prior_start / 8), bits=3)
        self.prior_mean = IntegerKnots(torch.zeros(QUALITY_KNOTS, inputs), bits=4)

    def prior(self, quality: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Scale index and mean in sixteenths of the hyper-latent itself: (B, inputs, 1, 1) integers.

        They depend on the quality, so that an unused hyper-latent costs nothing at the lowest rates.
        """
        index = clamp_ste(self.prior_index(quality, dtype), 0, self.levels - 1)
        return index, self.prior_mean(quality, dtype)

    def forward(self, h_hat: Tensor, quality: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Integers in, integers out; exact in float64 on a CPU, nearly so in float32 (training).

        Args:
            h_hat: (B, inputs, h, w) decoded hyper-latent in sixteenths, integers.
            quality: (B,) long, quality bytes.

        Returns:
            scale index 0..levels-1 and mean in sixteenths, each (B, outputs, 2h, 2w), and fineness in eighths
            of an octave (B, 1, 2h, 2w); in the dtype of `h_hat`.
        """
        dtype = h_hat.dtype
        a = clamp_ste(h_hat, -ACTIVATION_MAX, ACTIVATION_MAX) * self.input_gain(quality, dtype)
        a = clamp_ste(floor_ste(a * 2.0 ** (ACTIVATION_BITS - 8 - 4)), -ACTIVATION_MAX, ACTIVATION_MAX)
        a = F.relu(self.first(a) + self.first_bias(quality, dtype)).clamp(max=ACTIVATION_MAX)
        a = F.relu(F.pixel_shuffle(self.up(a), 2))
        index, mean, fineness = self.last(a).tensor_split([self.outputs, 2 * self.outputs], dim=1)
        fineness = clamp_ste(floor_ste(fineness / 2 ** (ACTIVATION_BITS - 3)), -FINENESS_MAX, FINENESS_MAX)
        mean = floor_ste(mean * self.mean_gain(quality, dtype) * (MEAN_STEPS * 2.0 ** -(ACTIVATION_BITS + 8)))
        # A finer quantiser makes wider symbols: with the usual table an eighth of an octave is about a step.
        index = floor_ste((index + self.index_offset(quality, dtype)) / 8) + fineness
        return clamp_ste(index, 0, self.levels - 1), clamp_ste(mean, -(2**19), 2**19), fineness

    @torch.no_grad()
    def exact(self, quality: int, h_hat: Tensor | None = None) -> tuple[Tensor, ...]:
        """`forward` of (B, inputs, h, w), or `prior` without one, of one quality byte: exact, as long, on the CPU."""
        net = self if self.first.weight.device.type == "cpu" else copy.deepcopy(self).cpu()
        byte = torch.full((1 if h_hat is None else len(h_hat),), quality)
        found = net.prior(byte, torch.float64) if h_hat is None else net(h_hat.to("cpu", torch.float64), byte)
        return tuple(t.long() for t in found)

    @torch.no_grad()
    def integer_state(self) -> dict[str, Tensor]:
        """Everything the network computes with, as integer tensors under the names of the parameters."""
        parts = {name: _integers(layer) for name, layer in self.named_children()}
        state = {f"{name}.{key}": values.cpu() for name, part in parts.items() for key, values in part.items()}
        return {key: values.to(torch.int16 if key.endswith("weight") else torch.int32) for key, values in state.items()}


class IntegerConv2d(nn.Conv2d):
    """3x3 convolution of integers: weights in units of 2**-10, activations in and out in units of 2**-6."""

    bits = WEIGHT_BITS

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        nn.init.zeros_(self.bias)

    def forward(self, a: Tensor) -> Tensor:
        """(B, inputs, h, w) integers -> (B, outputs, h, w) integers, in the dtype of `a`."""
        weight, bias = (t.to(a.dtype) for t in _integers(self).values())
        bias = bias * 2**ACTIVATION_BITS  # in the unit of the sums, 2**-16
        if a.dtype != torch.float64:
            total = F.conv2d(a, weight, bias, padding=1)  # while training: fast, exact but for the longest sums
        else:  # a plain matrix product; no convolution algorithm that would transform the numbers
            columns = F.unfold(a, 3, padding=1)
            total = (weight.flatten(1) @ columns + bias[:, None]).unflatten(2, a.shape[-2:])
        return clamp_ste(floor_ste(total * 2.0**-WEIGHT_BITS), -ACTIVATION_MAX, ACTIVATION_MAX)


class IntegerKnots(nn.Module):
    """A number a channel that depends on the quality byte: integer knots, exact linear interpolation."""

    def __init__(self, start: Tensor, bits: int) -> None:
        """start: (6, channels) real values at the knots; bits: fractional bits kept."""
        super().__init__()
        self.values = nn.Parameter(start.clone())
        self.bits = bits

    def forward(self, quality: Tensor, dtype: torch.dtype) -> Tensor:
        """quality: (B,) long, 0..255 -> (B, channels, 1, 1) integers in units of 2**-bits."""
        knots = _integers(self)["values"].to(dtype)
        left, part = quality // KNOT_DISTANCE, quality % KNOT_DISTANCE
        right = (left + 1).clamp(max=QUALITY_KNOTS - 1)
        part = part.to(dtype)[:, None]
        # Numerators stay below 2**26, and a quotient that is no integer is 1/51 or more away from one:
        # the floor of the rounded quotient is the floor of the true one.
        mixed = knots[left] * (KNOT_DISTANCE - part) + knots[right] * part
        return floor_ste(mixed / KNOT_DISTANCE)[:, :, None, None]


def floor_ste(x: Tensor) -> Tensor:
    """Floor with the gradient of the identity, as `quantize_ste` rounds; the sum is the floor to the last bit."""
    return (x.floor() - x).detach() + x


def clamp_ste(x: Tensor, low: float, high: float) -> Tensor:
    """Clamp that lets gradients through which lead back into the range: nothing gets stuck outside."""
    x = LowerBoundFunction.apply(x, x.new_tensor(low))
    return -LowerBoundFunction.apply(-x, x.new_tensor(-high))


def _integers(layer: nn.Module) -> dict[str, Tensor]:
    """What a layer computes with, and what is stored: its parameters as integers in units of 2**-bits, by name."""
    rounded = {name: quantize_ste(values * 2**layer.bits) for name, values in layer.named_parameters()}
    return {name: clamp_ste(values, -LARGEST[name], LARGEST[name]) for name, values in rounded.items()}
