"""The .slim container: a few bytes of header, then one range-coded payload that runs to the end of the file.

Specification, version 1. All integers are unsigned and big-endian; a *varint* is base 128, low seven bits
first, the top bit of a byte says that another byte follows. Fields stand in this order:

    magic        1 byte    0x53, the letter S
    version      4 bits    upper half of the second byte: 1
    flags        4 bits    lower half of the second byte:
                           bit 0  a caption stands in the payload
                           bit 1  the field `size` is present; otherwise the image is 128 x 128 pixels
                           bit 2  the fields `t0` and `steps` are present; otherwise the compressor's own
                                  table gives them for this quality
                           bit 3  the field `seed` is present; otherwise it is 0
    crc          2 bytes   CRC-16/CCITT (polynomial 0x1021, initial value 0xFFFF) of the whole file with
                           these two bytes left out
    weights      2 bytes   16-bit fingerprint of the weights that wrote the stream
    quality      1 byte    quality * 255, rounded
    size         2 varints true width, then true height, in pixels         (flag bit 1)
    t0, steps    2 varints noise level 0..65535, denoising steps 0..65535  (flag bit 2)
    seed         varint    seed of the noise, 0..2**32 - 1                 (flag bit 3)
    payload      the rest  range-coded caption tokens, hyper-latent and latent, one after the other, without
                           lengths; a decoder that reads past its end reads zeros

Seven bytes come before the payload at the default size, t0, steps and seed.

Bounds. What is computed counts, not what is claimed: sides are taken rounded up to multiples of `UNIT`, to which the
largest codec pads them. A payload of n bytes may stand for FREE_PIXELS + PIXELS_PER_BYTE * n pixels, never more than
LARGEST_IMAGE nor than the decoder's user admits (2**20 by default), and ask for 100 denoising steps, or it is refused
before anything is decoded. (`pack` appends zero bytes to that of a huge flat image; a range decoder reads zeros there
anyway.) At 2**20 pixels the pocket models take up to 2.5 GB, 90 s and 55 s a step on one processor core, whatever the
payload says, and about 1 ms a byte of it; attention makes time grow with the square of the pixels beyond.
"""

from __future__ import annotations

import binascii
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAGIC = 0x53
VERSION = 1
LARGEST_IMAGE = 1 << 26  # pixels: 8192 x 8192
UNIT = 64  # pixels
FREE_PIXELS = 1 << 20
PIXELS_PER_BYTE = 1 << 14
FIXED_BYTES = 7
CAPTION = 1  # the flag of bit 0
OPTIONAL = {2: ("width", "height"), 4: ("t0", "steps"), 8: ("seed",)}  # the other flags and their fields, in order
LARGEST = {"fingerprint": 0xFFFF, "quality": 255, "t0": 0xFFFF, "steps": 0xFFFF, "seed": 0xFFFFFFFF}
LARGEST |= {"width": LARGEST_IMAGE, "height": LARGEST_IMAGE}


class StreamError(ValueError):
    """The bytes are not a .slim stream that can be decoded here; the message says why."""


@dataclass(frozen=True)
class StreamHeader:
    """What a decoder must know besides the payload."""

    fingerprint: int  # 16 bits over the weights that wrote the stream
    quality: int  # quality byte, 0..255
    width: int = 128  # true size of the image in pixels (what is coded may be padded)
    height: int = 128
    caption: bool = False  # whether the payload begins with one
    t0: int | None = None  # noise level, and
    steps: int | None = None  # number of denoising steps; both None means the compressor's table
    seed: int = 0  # of the noise


def pack(header: StreamHeader, payload: bytes) -> bytes:
    """Join header and payload into one .slim stream; a field out of its range raises ValueError."""
    for name, largest in LARGEST.items():
        value = getattr(header, name)
        if value != getattr(StreamHeader, name, "") and not (hasattr(value, "__index__") and 0 <= value <= largest):
            raise ValueError(f"{name} is {value!r}; a .slim stream holds a whole number from 0 to {largest}.")
    if not 0 < (pixels := padded(header.width, header.height)) <= LARGEST_IMAGE:
        raise ValueError(f"The image is coded as {pixels} pixels; a .slim stream holds 1 to {LARGEST_IMAGE}.")
    if (header.t0 is None) != (header.steps is None):
        raise ValueError("t0 and steps belong together: give both, or neither to use the compressor's table.")

    flags, fields = CAPTION * bool(header.caption), header.fingerprint.to_bytes(2, "big") + bytes([header.quality])
    for flag, names in OPTIONAL.items():
        values = [getattr(header, name) for name in names]
        if values != [getattr(StreamHeader, name) for name in names]:
            flags |= flag
            fields += b"".join(map(_varint, values))
    needed = -(-(pixels - FREE_PIXELS) // PIXELS_PER_BYTE)
    payload = payload + bytes(max(0, needed - len(payload)))
    start = bytes([MAGIC, VERSION << 4 | flags])
    return start + _crc(start + fields + payload) + fields + payload


def padded(width: int, height: int, unit: int = UNIT) -> int:
    """Pixels that are computed for an image: both sides are rounded up to multiples of `unit`."""
    return -(-width // unit) * -(-height // unit) * unit**2


def as_bytes(data: Any) -> bytes:
    """Anything bytes-like as bytes; StreamError names what else it is."""
    if isinstance(data, (str, Path)):
        raise StreamError(f"{str(data)!r} is a path or text; give the bytes of a stream, Path(...).read_bytes().")
    try:
        return memoryview(data).tobytes()
    except TypeError as error:
        raise StreamError(f"A stream is bytes, not {type(data).__name__}.") from error


def unpack(
    data: bytes, fingerprint: int | None = None, max_pixels: int = LARGEST_IMAGE, unit: int = UNIT
) -> tuple[StreamHeader, bytes]:
    """Split a .slim stream into header and payload, after checking everything that can be checked.

    Args:
        data: the whole stream.
        fingerprint: the fingerprint of the weights at hand; None skips the comparison (to look at a header).
        max_pixels: refuse images that take more, their sides rounded up to multiples of `unit`.

    Raises:
        StreamError: empty, cut, altered, foreign, of another version or other weights, or of an absurd size.
    """
    if not (data := as_bytes(data)):
        raise StreamError("The stream is empty.")
    if data[0] != MAGIC:
        raise StreamError("This is not a .slim stream: it does not begin with the letter S.")
    if len(data) < FIXED_BYTES:
        raise StreamError(f"The stream is cut: {len(data)} bytes, and a header alone takes {FIXED_BYTES}.")
    version, flags = data[1] >> 4, data[1] & 15
    if version != VERSION:
        raise StreamError(f"The stream is of version {version}; this program reads version {VERSION}.")
    if _crc(data[:2] + data[4:]) != data[2:4]:  # before any field is believed
        raise StreamError("The stream is damaged: its check sum does not match (cut, altered, or not a .slim file).")

    written_by = int.from_bytes(data[4:6], "big")
    if fingerprint is not None and written_by != fingerprint:
        raise StreamError(
            f"The stream was written with other weights (fingerprint {written_by:04x}, "
            f"here {fingerprint:04x}). Load the compressor that wrote it."
        )
    at, values = FIXED_BYTES, {}
    for flag, names in OPTIONAL.items():
        for name in names if flags & flag else ():
            values[name], at = _read_varint(data, at, LARGEST[name])
    header, payload = StreamHeader(written_by, data[6], caption=bool(flags & CAPTION), **values), data[at:]
    size = f"The stream claims an image of {header.width} x {header.height} pixels"
    if not 0 < padded(header.width, header.height) <= FREE_PIXELS + PIXELS_PER_BYTE * len(payload):
        raise StreamError(f"{size}, too many (or none) for {len(payload)} bytes of payload.")
    if (pixels := padded(header.width, header.height, unit)) > max_pixels:
        advice = "raise max_pixels (at the shell: --max-pixels) if you trust it"
        raise StreamError(f"{size}, decoded as {pixels}; {max_pixels} is the most that is admitted here: {advice}.")
    return header, payload


def _crc(data: bytes) -> bytes:
    return binascii.crc_hqx(data, 0xFFFF).to_bytes(2, "big")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out) + bytes([value])


def _read_varint(data: bytes, at: int, largest: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 35, 7):
        if at >= len(data):
            raise StreamError("The stream is cut inside its header.")
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            break
    if data[at - 1] > 127 or value > largest:
        raise StreamError(f"A header field holds {value} or more; {largest} is the most it may hold.")
    return value, at
