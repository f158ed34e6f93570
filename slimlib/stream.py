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

Seven bytes come before the payload at the default size, t0, steps and seed. No field says how much memory to
take: the image may have `FREE_PIXELS` plus `PIXELS_PER_BYTE` pixels a payload byte and never more than
`MAX_PIXELS`, or the stream is refused. (`pack` appends zero bytes to the payload of a huge flat image; a
range decoder reads zeros there anyway.)
"""

from __future__ import annotations

import binascii
from dataclasses import dataclass

MAGIC = 0x53
VERSION = 1
DEFAULT_SIZE = (128, 128)
MAX_PIXELS = 1 << 26  # 8192 x 8192
FREE_PIXELS = 1 << 20
PIXELS_PER_BYTE = 1 << 14
FIXED_BYTES = 7
CAPTION, SIZE, DIFFUSION, SEED = 1, 2, 4, 8


class StreamError(ValueError):
    """The bytes are not a .slim stream that can be decoded here; the message says why."""


@dataclass(frozen=True)
class StreamHeader:
    """What a decoder must know besides the payload.

    Attributes:
        fingerprint: 16 bits over the weights that wrote the stream.
        quality: quality byte, 0..255.
        width, height: true size of the image in pixels (what is coded may be padded).
        caption: whether the payload begins with a caption.
        t0, steps: noise level and number of denoising steps; both None means the compressor's table.
        seed: seed of the noise.
    """

    fingerprint: int
    quality: int
    width: int = DEFAULT_SIZE[0]
    height: int = DEFAULT_SIZE[1]
    caption: bool = False
    t0: int | None = None
    steps: int | None = None
    seed: int = 0


def pack(header: StreamHeader, payload: bytes) -> bytes:
    """Join header and payload into one .slim stream.

    Raises:
        ValueError: a header field is out of its range.
    """
    _check("fingerprint", header.fingerprint, 0, 0xFFFF)
    _check("quality", header.quality, 0, 255)
    _check("width", header.width, 1, MAX_PIXELS)
    _check("height", header.height, 1, MAX_PIXELS)
    _check("width * height", header.width * header.height, 1, MAX_PIXELS)
    _check("seed", header.seed, 0, 0xFFFFFFFF)
    if (header.t0 is None) != (header.steps is None):
        raise ValueError("t0 and steps belong together: give both, or neither to use the compressor's table.")

    flags = CAPTION * bool(header.caption)
    fields = header.fingerprint.to_bytes(2, "big") + bytes([header.quality])
    if (header.width, header.height) != DEFAULT_SIZE:
        flags |= SIZE
        fields += _varint(header.width) + _varint(header.height)
    if header.t0 is not None and header.steps is not None:
        _check("t0", header.t0, 0, 0xFFFF)
        _check("steps", header.steps, 0, 0xFFFF)
        flags |= DIFFUSION
        fields += _varint(header.t0) + _varint(header.steps)
    if header.seed:
        flags |= SEED
        fields += _varint(header.seed)

    needed = -(-(header.width * header.height - FREE_PIXELS) // PIXELS_PER_BYTE)
    payload = payload + bytes(max(0, needed - len(payload)))
    start = bytes([MAGIC, VERSION << 4 | flags])
    return start + _crc(start + fields + payload) + fields + payload


def unpack(data: bytes, fingerprint: int | None = None, max_pixels: int = MAX_PIXELS) -> tuple[StreamHeader, bytes]:
    """Split a .slim stream into header and payload, after checking everything that can be checked.

    Args:
        data: the whole stream.
        fingerprint: the fingerprint of the weights at hand; None skips the comparison (to look at a header).
        max_pixels: refuse larger images.

    Raises:
        StreamError: empty, cut, altered, foreign, of another version or other weights, or of an absurd size.
    """
    data = bytes(data)
    if not data:
        raise StreamError("The stream is empty.")
    if data[0] != MAGIC:
        raise StreamError("This is not a .slim stream: it does not begin with the letter S.")
    if len(data) < FIXED_BYTES:
        raise StreamError(f"The stream is cut: {len(data)} bytes, and a header alone takes {FIXED_BYTES}.")
    version, flags = data[1] >> 4, data[1] & 15
    if version != VERSION:
        raise StreamError(f"The stream is of version {version}; this program reads version {VERSION}.")
    # The sum comes before any field is believed.
    if _crc(data[:2] + data[4:]) != data[2:4]:
        raise StreamError("The stream is damaged: its check sum does not match (cut, altered, or not a .slim file).")

    written_by = int.from_bytes(data[4:6], "big")
    if fingerprint is not None and written_by != fingerprint:
        raise StreamError(
            f"The stream was written with other weights (fingerprint {written_by:04x}, "
            f"here {fingerprint:04x}). Load the compressor that wrote it."
        )
    at = FIXED_BYTES
    (width, height), t0, steps, seed = DEFAULT_SIZE, None, None, 0
    if flags & SIZE:
        width, at = _read_varint(data, at, 0xFFFFFFF)
        height, at = _read_varint(data, at, 0xFFFFFFF)
    if flags & DIFFUSION:
        t0, at = _read_varint(data, at, 0xFFFF)
        steps, at = _read_varint(data, at, 0xFFFF)
    if flags & SEED:
        seed, at = _read_varint(data, at, 0xFFFFFFFF)
    payload = data[at:]
    limit = min(max_pixels, FREE_PIXELS + PIXELS_PER_BYTE * len(payload))
    if not (width and height and width * height <= limit):
        raise StreamError(
            f"The stream claims an image of {width} x {height} pixels; "
            f"{len(payload)} bytes of payload may claim {limit} pixels at the most."
        )
    header = StreamHeader(written_by, data[6], width, height, bool(flags & CAPTION), t0, steps, seed)
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
            if value > largest:
                raise StreamError(f"A header field holds {value}; {largest} is the most it may hold.")
            return value, at
    raise StreamError("A header field is longer than any number it may hold.")


def _check(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; a .slim stream holds {low} to {high}.")
