"""The container: what goes in comes out, and nothing else gets in."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from slimlib.stream import DEFAULT_SIZE, FREE_PIXELS, StreamError, StreamHeader, pack, unpack

HEADERS = [
    StreamHeader(0xBEEF, 0),
    StreamHeader(0, 255, caption=True),
    StreamHeader(1, 128, 127, 129),
    StreamHeader(1, 128, 1, 1, t0=0, steps=0),
    StreamHeader(0xFFFF, 7, 5000, 300, True, 999, 20, 2**32 - 1),
    StreamHeader(3, 3, seed=1),
]


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("payload", [b"", b"\0", b"abc" * 50])
def test_round_trip(header: StreamHeader, payload: bytes) -> None:
    data = pack(header, payload)
    back, rest = unpack(data, header.fingerprint)
    assert back == header
    assert rest.startswith(payload) and not any(rest[len(payload) :])


def test_overhead_is_at_most_eight_bytes() -> None:
    assert len(pack(StreamHeader(1, 2, caption=True), b"")) == 7
    assert DEFAULT_SIZE == (128, 128)


@pytest.mark.parametrize("header", HEADERS)
def test_every_damaged_byte_and_every_cut_is_noticed(header: StreamHeader) -> None:
    data = pack(header, bytes(range(1, 40)))
    for i in range(len(data)):
        for flip in (1, 0x80, 0xFF):
            broken = bytearray(data)
            broken[i] ^= flip
            with pytest.raises(StreamError):
                unpack(bytes(broken))
    for length in range(len(data)):
        with pytest.raises(StreamError):
            unpack(data[:length])
    with pytest.raises(StreamError):
        unpack(data + b"x")


def test_reasons_are_given() -> None:
    data = pack(HEADERS[0], b"payload")
    for bad, reason in [
        (b"", "empty"),
        (b"\x89PNG\r\n\x1a\n and more", "not a .slim"),
        (data[:5], "cut"),
        (data[:1] + bytes([data[1] ^ 0x30]) + data[2:], "version 2"),
        (data[:-1] + b"?", "damaged"),
    ]:
        with pytest.raises(StreamError, match=reason):
            unpack(bad)
    with pytest.raises(StreamError, match="other weights"):
        unpack(data, fingerprint=0xBEEE)
    assert unpack(data)[0].fingerprint == 0xBEEF


def test_claims_are_bounded() -> None:
    """A sound check sum does not make a claim true: a header of 12 bytes cannot ask for a gigapixel."""
    import slimlib.stream as stream

    huge = pack(StreamHeader(1, 2, 8000, 8000), b"x")
    assert unpack(huge)[0].width == 8000 and len(huge) < 5000  # zeros were appended to afford it
    body = huge[:2] + huge[4:12]  # without those zeros
    forged = body[:2] + stream._crc(body) + body[2:]
    tracemalloc.start()
    with pytest.raises(StreamError, match="8000 x 8000"):
        unpack(forged)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
    with pytest.raises(StreamError, match="at the most"):
        unpack(pack(StreamHeader(1, 2, 1000, 1000), b""), max_pixels=FREE_PIXELS // 2)


def test_random_bytes_are_refused() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        data = rng.choice([b"", b"S", b"S\x1f"]) + rng.randbytes(rng.randrange(40))
        with pytest.raises(StreamError):
            unpack(data)


@pytest.mark.parametrize(
    "header",
    [
        StreamHeader(1 << 16, 0),
        StreamHeader(0, 256),
        StreamHeader(0, 0, 0, 5),
        StreamHeader(0, 0, 100_000, 100_000),
        StreamHeader(0, 0, t0=5),
        StreamHeader(0, 0, t0=70_000, steps=1),
        StreamHeader(0, 0, seed=-1),
    ],
)
def test_pack_refuses_what_does_not_fit(header: StreamHeader) -> None:
    with pytest.raises(ValueError):
        pack(header, b"")
