"""Forged streams: a valid check sum and fingerprint, and nonsense in every field and in the payload.

    python tests/fuzz_streams.py 20000 [SEED]

Each is refused by a StreamError or decoded, within `SECONDS` of processor time, `MEGABYTES` of memory and `stream`'s
bound of pixels; anything else stops the run and shows the stream in hexadecimal.
"""

from __future__ import annotations

import binascii
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from tiny_codec import CAPTIONS, make_world, picture  # noqa: E402

from slimlib.codec import SlimCodec  # noqa: E402
from slimlib.stream import FREE_PIXELS, PIXELS_PER_BYTE, StreamError, padded, unpack  # noqa: E402
from slimlib.utils import quiet_libraries  # noqa: E402

MEGABYTES = 1000  # that decoding them may add to the process, on Linux
SECONDS = 5.0  # for a stream of at most some 10,000 pixels, 100 steps and 300 bytes
SIDES = [0, 1, 2, 31, 32, 33, 63, 64, 65, 96, 97, 128, 1000, 1 << 13, (1 << 16) + 1, 1 << 20, 1 << 26, (1 << 26) + 1]
NUMBERS = [0, 1, 2, 4, 99, 100, 101, 500, 999, 1000, 0xFFFF, 0x10000, 0xFFFFFFFF, 1 << 32, (1 << 35) - 1]


def varint(value: int, rng: random.Random) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    if rng.random() < 0.03:  # longer than need be, or without an end
        out[-1] |= 128
        out += bytes([128] * rng.randrange(4)) + bytes(rng.randrange(2))
    return bytes(out)


def forge(rng: random.Random, fingerprint: int, sound: list[bytes]) -> bytes:
    """A stream with a valid check sum, made of header fields and a payload that are sound, odd or random."""
    flags = rng.randrange(16)
    odd = rng.random() < 0.5
    sides = [rng.choice(SIDES if odd else SIDES[1:10]) for _ in range(2)]
    t0, steps, seed = (rng.choice(NUMBERS) for _ in range(3)) if odd else (rng.randrange(1000), rng.randrange(4), 7)
    fields = [sides * bool(flags & 2), [t0, steps] * bool(flags & 4), [seed] * bool(flags & 8)]
    payload = bytearray(rng.choice(sound))
    kind = rng.randrange(6)
    if kind == 0:
        payload = bytearray(rng.randbytes(rng.randrange(300)))
    elif kind == 1:
        payload = bytearray([rng.choice([0, 1, 127, 128, 254, 255])] * rng.randrange(300))
    elif kind == 2:
        del payload[rng.randrange(len(payload)) :]
    for _ in range(rng.randrange(4) if payload else 0):
        payload[rng.randrange(len(payload))] = rng.randrange(256)
    body = fingerprint.to_bytes(2, "big") + bytes([rng.randrange(256)])
    body += b"".join(varint(value, rng) for values in fields for value in values) + payload
    if rng.random() < 0.02:
        body = body[: rng.randrange(len(body))]
    start = bytes([0x53, 0x10 | flags])
    return start + binascii.crc_hqx(start + body, 0xFFFF).to_bytes(2, "big") + body


def fuzz(codec: SlimCodec, count: int, seed: int = 0) -> Counter[str]:
    """Forge `count` streams, and say what became of them; AssertionError if one broke a bound."""
    rng, found = random.Random(seed), Counter[str]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes
    codec.max_pixels = 96 * 96
    words = [None, *CAPTIONS, "京都 zeppelin"]
    pictures = [picture(64, 64, i) for i in range(4)]
    sound = [unpack(codec.compress(one, q, w))[1] for one in pictures for w in words[::3] for q in (0.0, 0.5, 1.0)]
    for i in range(count):
        stream, start = forge(rng, codec.fingerprint, sound), time.process_time()
        try:
            report = codec.inspect(stream)
            pixels = padded(report.width, report.height, 32)
            assert 0 < pixels <= min(codec.max_pixels, FREE_PIXELS + PIXELS_PER_BYTE * len(stream))
            assert abs(sum(report.bits.values()) - 8 * len(stream)) < 1e-3
            outcome = "read"
            if i % 8 == 0:
                assert codec.decompress(stream).size == (report.width, report.height)
                outcome = "decoded to a picture"
        except StreamError as error:
            outcome = "refused: " + " ".join(word for word in str(error).split() if word.isalpha())[:60]
        except BaseException:
            print(stream.hex(), file=sys.stderr)
            raise
        seconds = time.process_time() - start
        assert seconds < SECONDS, f"{seconds:.1f} s for {stream.hex()}"
        found[outcome] += 1
        found["slowest, ms"] = max(found["slowest, ms"], round(1000 * seconds))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    assert grown < MEGABYTES, f"{grown:.0f} MB more than before at the peak"
    found["memory at the peak, MB more than before"] = round(grown)
    return found


def main() -> None:
    import conftest

    quiet_libraries()
    count, seed = (*map(int, sys.argv[1:3]), 0)[:2] if len(sys.argv) > 1 else (2000, 0)
    with tempfile.TemporaryDirectory() as folder:
        conftest._save_ldm(Path(folder) / "tiny" / "ldm")
        codec = SlimCodec.from_pretrained(make_world(Path(folder) / "tiny", Path(folder) / "world"), "cpu")
        start = time.perf_counter()
        for outcome, times in fuzz(codec, count, seed).most_common():
            print(f"{times:8} {outcome}")
        print(f"{count} streams, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
