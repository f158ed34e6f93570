"""The container: what goes in comes out, and nothing else gets in."""

from __future__ import annotations

import binascii
import random
from array import array
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slimlib.stream import FREE_PIXELS, StreamError, StreamHeader, pack, padded, unpack

HEADERS = [
    StreamHeader(0xBEEF, 0),
    StreamHeader(0, 255, caption=True),
    StreamHeader(1, 128, 127, 129),
    StreamHeader(1, 128, 1, 1, t0=0, steps=0),
    StreamHeader(0xFFFF, 7, 5000, 300, True, 999, 20, 2**32 - 1),
    StreamHeader(3, 3, seed=1),
]


@pytest.mark.parametrize("header", HEADERS)
def test_round_trip_and_damage(header: StreamHeader) -> None:
    for payload in (b"", b"\0", b"abc" * 50):
        back, rest = unpack(pack(header, payload), header.fingerprint)
        assert back == header
        assert rest.startswith(payload) and not any(rest[len(payload) :])
    data = pack(header, bytes(range(1, 40)))
    broken = [data[:i] + bytes([data[i] ^ flip]) + data[i + 1 :] for i in range(len(data)) for flip in (1, 0x80, 0xFF)]
    for other in [*broken, *(data[:length] for length in range(len(data))), data + b"x"]:
        with pytest.raises(StreamError):
            unpack(other)


def test_bytes_are_those_of_the_specification() -> None:
    """Magic, version and flags, check sum, weights, quality; width, height, t0, steps and seed where they are there."""
    assert pack(HEADERS[1], b"\x01").hex(" ", 1) == "53 11 0d b1 00 00 ff 01"
    full = "53 1f 01 57 ff ff 07 88 27 ac 02 e7 07 14 ff ff ff ff 0f 78" + " 00" * 34  # zeros that afford the size
    assert pack(HEADERS[4], b"x").hex(" ", 1) == full


def forged(flags: int, fields: str) -> bytes:
    """A stream with a sound check sum, of flags and hexadecimal fields that `pack` does not write."""
    body = bytes([0x53, 16 | flags, 0, 1, 2]) + bytes.fromhex(fields)
    return body[:2] + binascii.crc_hqx(body, 0xFFFF).to_bytes(2, "big") + body[2:]


def test_reasons_are_given() -> None:
    data = pack(HEADERS[0], b"payload")
    for bad, reason in {
        b"": "empty",
        b"\x89PNG\r\n\x1a\n and more": "not a .slim",
        data[:5]: "cut",
        data[:1] + bytes([data[1] ^ 0x30]) + data[2:]: "version 2",
        data[:-1] + b"?": "damaged",
        forged(2, "0001"): "0 x 1",
        forged(2, "c03ec03e" + "78"): "8000 x 8000",  # a header of 12 bytes cannot ask for a gigapixel
        forged(2, "80804001"): "1048576 x 1 ",  # what is computed counts: its sides are padded to 64
        forged(2, "01808040" + "78"): "1 x 1048576 ",
        forged(4, "ffff0401"): "65535 is the most",
        forged(8, "ffffffff1f"): "most it may hold",
        forged(8, "ff" * 6): "most it may hold",
        forged(2, "01"): "cut inside",
    }.items():
        with pytest.raises(StreamError, match=reason):
            unpack(bad)
    with pytest.raises(StreamError, match="other weights"):
        unpack(data, fingerprint=0xBEEE)
    huge = pack(StreamHeader(1, 2, 8000, 8000), b"x")
    assert unpack(huge)[0].width == 8000 and len(huge) < 5000  # zeros were appended to afford it
    with pytest.raises(StreamError, match="most that is admitted.*--max-pixels"):
        unpack(pack(StreamHeader(1, 2, 1000, 1000), b""), max_pixels=FREE_PIXELS // 2)


def test_random_bytes_are_refused() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        with pytest.raises(StreamError):
            unpack(rng.choice([b"", b"S", b"S\x1f"]) + rng.randbytes(rng.randrange(40)))


def test_pack_refuses_what_does_not_fit() -> None:
    wrong = {"fingerprint": 1 << 16, "quality": 256, "width": 0, "height": -5, "t0": 5, "steps": 5, "seed": -1}
    pairs = {"t0": 70_000, "steps": 1}, {"t0": 1, "steps": 70_000}, {"width": 100_000, "height": 100_000}
    for fields in [*({name: value} for name, value in wrong.items()), *pairs]:
        with pytest.raises(ValueError, match="pixels|holds|belong together"):
            pack(replace(HEADERS[0], **fields), b"")


def test_what_is_bytes_and_what_is_not() -> None:
    data = pack(HEADERS[2], b"payload")
    for same in (bytearray(data), memoryview(data), np.frombuffer(data, np.uint8), array("B", data)):
        assert unpack(same) == unpack(data)
    for wrong, reason in (
        ("a.slim", "is a path"),
        (Path("a.slim"), "is a path"),
        (7, "not int"),
        (None, "not NoneType"),
    ):
        with pytest.raises(StreamError, match=reason):
            unpack(wrong)


def test_padded_sides_count_both_ways() -> None:
    """At most 2**26 pixels, and as many as the payload affords, sides rounded up to multiples of 64."""
    assert [padded(1, 1), padded(64, 65), padded(1000, 1000, 32)] == [64 * 64, 64 * 128, 1024 * 1024]
    for width, height in ((1 << 21, 1), (1, 1 << 26), (8192, 8193)):
        with pytest.raises(ValueError, match="coded as"):
            pack(replace(HEADERS[0], width=width, height=height), b"x")
    thin = pack(replace(HEADERS[0], width=1 << 20, height=1), b"x")
    assert len(unpack(thin)[1]) == (64 * 2**20 - FREE_PIXELS) >> 14
    with pytest.raises(StreamError, match="1048576 x 1 pixels, decoded as 33554432"):
        unpack(thin, max_pixels=FREE_PIXELS, unit=32)
