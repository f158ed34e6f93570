"""What becomes of picture files: the first frame, upright, on white; or one ValueError that names the file."""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import random
import struct
import threading
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, TiffImagePlugin

from slimlib.images import JXL_SIZE, _jxl_size, as_rgb
from slimlib.utils import write_file

WHITE = (255, 255, 255)
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)  # all different, so turns can be told
RGB = Image.fromarray(PIXELS)
GREY = PIXELS[..., 0].copy()
LARGE = RGB.resize((48, 32), Image.Resampling.BICUBIC)  # for lossy formats


def grey(values: Any) -> np.ndarray:
    return np.repeat(np.asarray(values)[..., None], 3, -1)


def saved(image: Image.Image, kind: str, **settings: Any) -> bytes:
    image.save(file := io.BytesIO(), kind, **settings)
    return file.getvalue()


def chunk(name: bytes, data: bytes, check: int = 0) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data) ^ check)


def png(samples: np.ndarray, depth: int, colour: int, *extra: bytes, last: bytes = b"") -> bytes:
    """A PNG of rows of samples (rows, columns * channels), as no library writes it; chunks before and behind pixels."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    rows = samples.astype(">u2").tobytes() if depth == 16 else samples.astype(np.uint8).tobytes()
    if depth < 8:
        bits = np.unpackbits(samples.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
        rows = np.packbits(bits.reshape(len(samples), -1), axis=-1).tobytes()
    size = len(rows) // len(samples)
    lines = b"".join(b"\0" + rows[i : i + size] for i in range(0, len(rows), size))
    head = struct.pack(">IIBBBBB", samples.shape[1] // channels, len(samples), depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", head), *extra, chunk(b"IDAT", zlib.compress(lines)), last, chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def colour_png(*extra: bytes, last: bytes = b"") -> bytes:
    return png(PIXELS.reshape(4, -1), 8, 2, *extra, last=last)


def segment(kind: int, data: bytes, image: bytes = saved(LARGE, "JPEG")) -> bytes:
    """A JPEG with one application segment more, right at its start."""
    return image[:2] + struct.pack(">BBH", 0xFF, kind, len(data) + 2) + data + image[2:]


def turned(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def odd_exif(orientation: int = 6) -> bytes:
    """EXIF that turns the picture, and whose resolution is one byte in place of a fraction."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0) + struct.pack("<HHIB3x", 0x011A, 1, 1, 72)
    unit = struct.pack("<HHIHH", 0x0128, 3, 1, 2, 0)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 3) + entries + unit + bytes(4)


def riff(image: bytes, name: bytes, data: bytes, flag: int) -> bytes:
    """A lossless WebP with a chunk of metadata."""
    size = b"".join(struct.pack("<I", side - 1)[:3] for side in LARGE.size)
    body = b"WEBPVP8X" + struct.pack("<IB3x", 10, flag) + size + image[12:]
    body += name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def grey_tiff(samples: np.ndarray, bits: int, black: int) -> bytes:
    """A TIFF of grey samples as Pillow writes none: of 12 bits, or (black=0) one where zero is white."""
    data = samples.astype("<u2").tobytes()
    if bits == 12:
        data = bytes.fromhex("".join(f"{int(value):03x}" for value in samples.ravel()))
    values = {256: len(samples[0]), 257: len(samples), 258: bits, 259: 1, 262: black, 273: 110, 277: 1, 279: len(data)}
    entries = b"".join(struct.pack("<HHIHxx", tag, 3, 1, value) for tag, value in values.items())
    return b"II*\0" + struct.pack("<IH", 8, len(values)) + entries + bytes(4) + data


TURNED = {
    i: np.asarray(RGB.transpose(turn))
    for i, turn in zip(range(2, 9), [Image.Transpose(t) for t in (0, 3, 1, 5, 4, 6, 2)], strict=True)
} | {1: PIXELS}
LARGE_TURNED = np.asarray(LARGE.transpose(Image.Transpose.ROTATE_270))


def formats() -> Iterator[tuple[str, bytes, Any]]:
    """Without loss, to the pixel."""
    for kind in ("PNG", "BMP", "TIFF", "PPM", "TGA", "ICO", "QOI", "SGI", "PCX", "DIB"):
        image = RGB if kind != "ICO" else RGB.resize((16, 16), Image.Resampling.NEAREST)
        yield kind, saved(image, kind, **({"sizes": [(16, 16)]} if kind == "ICO" else {})), np.asarray(image)
    for compression in ("tiff_lzw", "tiff_deflate", "packbits"):
        yield compression, saved(RGB, "TIFF", compression=compression), PIXELS
    for kind, settings in {"WEBP": {"lossless": True}, "JXL": {"lossless": True}, "JPEG2000": {}}.items():
        yield kind, saved(LARGE, kind, **settings), np.asarray(LARGE)
    for kind in ("JPEG", "AVIF"):
        yield kind, saved(LARGE, kind, quality=100), np.asarray(LARGE)
    yield "progressive", saved(LARGE, "JPEG", quality=100, progressive=True), np.asarray(LARGE)


def modes() -> Iterator[tuple[str, bytes, Any]]:
    for depth in (1, 2, 4):
        samples = GREY >> 8 - depth
        yield f"grey of {depth} bits", png(samples, depth, 0), grey(samples * (255 // (2**depth - 1)))
    yield "grey of 8 bits", png(GREY, 8, 0), grey(GREY)
    sixteen = GREY.astype(int) * 257 + 100
    yield "grey of 16 bits", png(sixteen, 16, 0), grey(GREY)
    for order in "<>":
        image = Image.fromarray(sixteen.astype(f"{order}u2"))
        yield f"TIFF {order}", saved(image, "TIFF"), grey(GREY)
    yield "colour of 16 bits", png(PIXELS.reshape(4, -1).astype(int) * 256 + 77, 16, 2), PIXELS
    for bits, white in ((12, 1), (16, 0)):  # of 12 bits, and of 16 with white as zero
        yield (
            f"TIFF of {bits} bits",
            grey_tiff(sixteen >> 16 - bits if white else 65535 - sixteen, bits, white),
            grey(GREY),
        )
    yield "I", saved(Image.fromarray(sixteen.astype(np.int32)), "TIFF"), grey(GREY)
    yield "too much", saved(Image.fromarray(np.full((4, 6), 70000, np.int32)), "TIFF"), "0 to 65535"
    yield "floats", saved(Image.fromarray(np.zeros((4, 6), np.float32)), "TIFF"), "floating-point"
    yield "CMYK", saved(RGB.convert("CMYK"), "TIFF"), PIXELS
    yield "CMYK.jpg", saved(LARGE.convert("CMYK"), "JPEG", quality=100), np.asarray(LARGE)
    yield "grey.jpg", saved(LARGE.convert("L"), "JPEG", quality=100), grey(np.asarray(LARGE.convert("L")))
    palette = RGB.quantize(24, dither=Image.Dither.NONE)
    for kind in ("PNG", "GIF", "BMP", "TIFF"):
        yield f"palette {kind}", saved(palette, kind), np.asarray(palette.convert("RGB"))


def transparency() -> Iterator[tuple[str, bytes, Any]]:
    """Every way in which a format says that a pixel is not there, or half."""
    hole = np.zeros((4, 6), bool)
    hole[1, 2] = True

    def holed(pixels: np.ndarray) -> np.ndarray:
        return np.where(hole[..., None], 255, pixels)

    for depth in (1, 2, 4, 8, 16):
        top = 2**depth - 1
        samples = np.where(hole, 0, top)
        samples[0] = 0 if depth == 1 else min(top - 1, 77 * 257)
        samples[3, 3] = 0 if depth == 1 else 1
        scaled = np.round(samples * 255 / top)
        scaled[samples == samples[1, 2]] = 255
        yield (
            f"tRNS grey {depth}",
            png(samples, depth, 0, chunk(b"tRNS", struct.pack(">H", samples[1, 2]))),
            grey(scaled),
        )
    one = PIXELS[1, 2]
    yield "tRNS colour", colour_png(chunk(b"tRNS", struct.pack(">3H", *one))), holed(PIXELS)
    wide = PIXELS.reshape(4, -1).astype(int) * 256 + 9
    key = chunk(b"tRNS", struct.pack(">3H", *(one.astype(int) * 256 + 9)))
    yield "tRNS colour of 16 bits", png(wide, 16, 2, key), holed(PIXELS)
    index, table = np.arange(24).reshape(4, 6), chunk(b"PLTE", PIXELS.tobytes())
    alone = bytes([255] * 8 + [0])
    yield "tRNS palette", png(index, 8, 3, table, chunk(b"tRNS", alone)), holed(PIXELS)
    half = bytes([255] * 8 + [128])
    mixed = PIXELS.astype(float)
    mixed[1, 2] = mixed[1, 2] * 128 / 255 + 127
    yield "tRNS palette, half", png(index, 8, 3, table, chunk(b"tRNS", half)), mixed
    alpha = np.where(hole, 0, 255).astype(np.uint8)
    for depth in (8, 16):
        scale = 257 if depth == 16 else 1
        pairs = np.stack([GREY, alpha], -1).reshape(4, -1).astype(int) * scale
        yield f"grey and alpha {depth}", png(pairs, depth, 4), holed(grey(GREY))
        fours = np.concatenate([PIXELS, alpha[..., None]], -1).reshape(4, -1).astype(int) * scale
        yield f"colour and alpha {depth}", png(fours, depth, 6), holed(PIXELS)
    rgba = Image.fromarray(np.concatenate([PIXELS, alpha[..., None]], -1))
    for kind in ("TIFF", "TGA", "BMP"):
        yield f"RGBA {kind}", saved(rgba, kind), PIXELS if kind == "BMP" else holed(PIXELS)
    yield "RGBA WEBP", saved(rgba, "WEBP", lossless=True), holed(PIXELS)
    yield "RGBA JXL", saved(rgba, "JXL", lossless=True), holed(PIXELS)
    yield "LA TIFF", saved(rgba.convert("LA"), "TIFF"), holed(grey(np.asarray(RGB.convert("L"))))
    palette = Image.fromarray(index.astype(np.uint8))
    palette.putpalette(PIXELS.tobytes())
    yield "GIF", saved(palette, "GIF", transparency=8), holed(PIXELS)
    yield "all of it", saved(Image.new("RGBA", (6, 4)), "PNG"), np.full((4, 6, 3), 255)


def frames() -> Iterator[tuple[str, bytes, Any]]:
    more = {"save_all": True, "append_images": [Image.new("RGB", RGB.size, "red")]}
    yield "pages", saved(RGB, "TIFF", **more), PIXELS
    yield "APNG", saved(RGB, "PNG", **more), PIXELS
    yield "animated WEBP", saved(RGB, "WEBP", lossless=True, **more), PIXELS
    green = Image.new("RGB", (16, 16), (0, 255, 0))
    more = {"save_all": True, "append_images": [Image.new("RGB", (16, 16), "red")]}
    for kind in ("GIF", "AVIF", "MPO"):
        yield f"animated {kind}", saved(green, kind, **more), np.asarray(green)
    part, shown = bytearray(saved(green, "GIF")), np.full((20, 24, 3), 255)
    part[6:10], at = bytes([24, 0, 20, 0]), part.index(b",")  # a larger canvas, and where the frame lies on it
    part[at + 1 : at + 5], shown[3:19, 2:18] = bytes([2, 0, 3, 0]), (0, 255, 0)
    yield "GIF of a part", bytes(part), shown


def orientations() -> Iterator[tuple[str, bytes, Any]]:
    for value in range(1, 9):
        for kind, settings in {
            "PNG": {},
            "WEBP": {"lossless": True},
            "TIFF": {},
            "TIFF deflate": {"compression": "tiff_deflate"},
        }.items():
            yield f"{kind} {value}", saved(RGB, kind.split()[0], exif=turned(value), **settings), TURNED[value]
    large = {value: np.asarray(as_rgb(saved(LARGE, "PNG", exif=turned(value)))) for value in (3, 6, 8)}
    for value, expected in large.items():
        yield f"JPEG {value}", saved(LARGE, "JPEG", quality=100, exif=turned(value)), expected
        yield f"AVIF {value}", saved(LARGE, "AVIF", quality=100, exif=turned(value)), expected
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    yield "XMP 6", colour_png(chunk(b"iTXt", xmp)), TURNED[6]
    yield "nonsense", saved(RGB, "PNG", exif=turned(77)), PIXELS
    # JPEG XL's decoder turns by itself, so EXIF must not do it again
    yield "JXL", saved(RGB, "JXL", lossless=True, exif=turned(6).tobytes()), PIXELS


def metadata() -> Iterator[tuple[str, bytes, Any]]:
    """Damage in what makes no pixels: the picture is there, and upright where that can be known."""
    large, noise = np.asarray(LARGE), random.Random(0).randbytes(80)
    yield "EXIF with a byte", segment(0xE1, odd_exif()), LARGE_TURNED
    yield "EXIF noise", segment(0xE1, b"Exif\0\0" + noise), large
    yield "EXIF cut", segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\0" + noise[:9]), large
    yield "EXIF empty", segment(0xE1, b"Exif\0\0"), large
    yield "XMP noise", segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + noise), large
    yield "ICC cut", segment(0xE2, b"ICC_PROFILE\0\x05\x09" + noise), large
    yield "MPF noise", segment(0xE2, b"MPF\0" + noise), large
    yield "Photoshop", segment(0xED, b"Photoshop 3.0\0008BIM\x03\xed" + noise), large
    yield "JFIF", segment(0xE0, b"JFIF\0"), large
    yield "comment", segment(0xFE, noise), large
    for name, data in {
        "text": noise,
        "tEXt": b"no zero",
        "zTXt": b"key\0\0" + noise,
        "iTXt": b"key\0\1\0en\0\0" + noise,
        "zTXt bomb": b"key\0\0" + zlib.compress(bytes(1 << 27)),
        "iCCP": b"icc\0\0" + noise,
        "eXIf": noise,
        "pHYs": b"\0",
        "gAMA": b"",
        "cHRM": b"\0",
        "sRGB": b"",
        "tIME": b"\0",
        "acTL": b"\0",
    }.items():
        kind = {"text": b"teXt"}.get(name, name[:4].encode())
        yield f"PNG {name}", colour_png(chunk(kind, data)), PIXELS
        yield f"PNG {name}, check sum", colour_png(chunk(kind, data, check=1)), PIXELS
        if kind not in (b"acTL",):
            yield f"PNG {name}, last", colour_png(last=chunk(kind, data, check=1)), PIXELS
    sound = chunk(b"eXIf", turned(6).tobytes()[6:])
    yield "PNG turned all the same", colour_png(sound, chunk(b"tEXt", b"x\0y", check=1)), TURNED[6]
    webp = saved(LARGE, "WEBP", lossless=True, exact=True)
    for name, flag in {b"EXIF": 8, b"XMP ": 4, b"ICCP": 32}.items():
        yield f"WEBP {name!r}", riff(webp, name, noise, flag), large
    yield "WEBP with a byte", riff(webp, b"EXIF", odd_exif(), 8), LARGE_TURNED
    for exif in (b"Exif\0\0II*\0" + noise, noise):
        (camera := turned(6))[0x010F] = "a camera"
        avif = saved(LARGE, "AVIF", quality=100, exif=camera)
        at = avif.index(b"II*\0") if b"II*\0" in avif else avif.index(b"MM\0*")
        yield f"AVIF {exif[:2]!r}", avif[:at] + exif[:12] + avif[at + 12 :], LARGE_TURNED
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[0x8768], tags.tagtype[0x8768] = 7, 4
    tiff = saved(RGB, "TIFF", tiffinfo=tags).replace(b"\x68\x87\4\0", b"\x69\x87\4\0")  # where EXIF should be
    at = tiff.index(b"\x69\x87\4\0")
    for where in (b"\xff\xff\xff\x7f", b"\3\0\0\0", b"\0\0\0\0"):
        yield f"TIFF EXIF at {where!r}", tiff[: at + 8] + where + tiff[at + 12 :], PIXELS


def damage() -> Iterator[tuple[str, bytes, Any]]:
    for kind in ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "JXL", "JPEG2000", "PPM", "TGA"):
        data = saved(LARGE, kind)
        yield f"cut {kind}", data[: len(data) * 2 // 3], "cannot be opened"
    yield "empty", b"", "not a picture"
    yield "text", b"not a picture at all", "not a picture"
    yield "zeros", bytes(1000), "cannot be opened"
    yield "PNG without pixels", b"\x89PNG\r\n\x1a\n" + chunk(b"IEND", b""), "cannot be opened"
    yield "pixels of PNG", colour_png().replace(b"IDAT", b"IDAU"), "cannot be opened"
    missing = "cannot be opened" if "HEIF" in Image.OPEN else "pip install pillow-heif"
    for brand in (b"heic", b"mif1", b"heix"):
        yield f"HEIC {brand!r}", b"\0\0\0\x18ftyp" + brand + bytes(4) + b"mif1heic" + bytes(99), missing
    yield "too large", saved(Image.new("1", (2000, 2000)), "PNG"), "2000 x 2000 pixels.*--max-pixels"
    for box in (False, True):  # its plugin decodes as it opens, for half a minute
        large = saved(Image.new("L", (3000, 2000)), "JXL", effort=1, use_container=box)
        yield f"JXL, too large {box}", large, "3000 x 2000 pixels.*--max-pixels"
    yield "claims much", colour_png().replace(b"\0\0\0\x06\0\0\0\x04", b"\0\1\0\0\0\1\0\0"), "cannot be opened|pixels"


TABLE = [
    pytest.param(data, expected, id=f"{kind.__name__}: {name}")
    for kind in (formats, modes, transparency, frames, orientations, metadata, damage)
    for name, data, expected in kind()
]


@pytest.mark.parametrize(("data", "expected"), TABLE)
def test_table(data: bytes, expected: Any, tmp_path: Path) -> None:
    path = tmp_path / "ein Bild über alles.pic"
    path.write_bytes(data)
    if isinstance(expected, str):
        for source, name in ((path, path.name), (data, "the picture"), (memoryview(data), "the picture")):
            with pytest.raises(ValueError, match=f"(?s){name}.*({expected})"):
                as_rgb(source)
        return
    found = as_rgb(path)
    assert found.mode == "RGB" and found.size == expected.shape[1::-1]
    lossy = data[:3] == b"\xff\xd8\xff" or data[8:12] in (b"avif", b"avis")
    assert np.abs(np.asarray(found, int) - expected).max() <= (24 if lossy else 1)
    assert found.tobytes() == as_rgb(bytearray(data)).tobytes() == as_rgb(io.BytesIO(data)).tobytes()
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False and TiffImagePlugin.READ_LIBTIFF is False


def test_what_comes_of_each_file_can_be_read() -> None:
    """runs/pictures.md: a table of all files above for people, in the words that they would get."""

    def outcome(data: bytes) -> str:
        try:
            return "{} x {} pixels".format(*as_rgb(data).size)
        except ValueError as error:
            return " ".join(str(error).replace("|", "/").split())

    lines = [f"| {one.id} | {len(one.values[0])} | {outcome(one.values[0])} |" for one in TABLE]
    heading = "| file | bytes | what came out |\n|---|---|---|\n"
    write_file(Path(__file__).parent.parent / "runs/pictures.md", (heading + "\n".join(lines) + "\n").encode())
    assert len(lines) >= 60 and sum(" pixels |" in line for line in lines) >= 60


def test_names_and_pipes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nicht da.png"):
        as_rgb(tmp_path / "nicht da.png")
    with pytest.raises(IsADirectoryError, match="folder ü"):
        (tmp_path / "folder ü").mkdir()
        as_rgb(str(tmp_path / "folder ü"))
    with pytest.raises(TypeError, match="ndarray"):
        as_rgb(PIXELS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="TextIO"), open(__file__) as text:
        as_rgb(text)  # type: ignore[arg-type]
    os.mkfifo(pipe := tmp_path / "pipe")
    writer = threading.Thread(target=pipe.write_bytes, args=(segment(0xE1, odd_exif()),))
    writer.start()
    assert as_rgb(pipe).size == LARGE.size[::-1]
    writer.join()


def test_what_is_bytes_like_or_a_path_or_can_only_be_read(tmp_path: Path) -> None:
    """Also where a read of a pipe gives less than is asked for, as an unbuffered one's does."""
    (tmp_path / "Bild").write_bytes(data := colour_png())
    twice = memoryview(bytes(byte for byte in data for _ in range(2)))
    for same in (array("B", data), np.frombuffer(data, np.uint8), twice[::2], *os.scandir(tmp_path)):
        assert np.array_equal(as_rgb(same), PIXELS)
    with (tmp_path / "Bild").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert np.array_equal(as_rgb(mapped), PIXELS)
        assert np.array_equal(as_rgb(SimpleNamespace(read=lambda n: file.read(min(n, 7)))), PIXELS)  # type: ignore[arg-type]


def test_the_size_of_a_jpeg_xl_is_read_from_its_first_bytes() -> None:
    for size in ((8, 8), (16, 24), (257, 256), (6, 4), (1, 1), (320, 180), (500, 400), (600, 500), (9000, 3), (40, 32)):
        (start,) = JXL_SIZE.findall(saved(Image.new("L", size), "JXL", effort=1))
        assert _jxl_size(start) == size


@pytest.mark.parametrize("mode", ["PA", "La", "RGBa", "LA", "P"])
def test_transparency_in_memory(mode: str) -> None:
    image = Image.fromarray(np.concatenate([PIXELS, np.zeros((4, 6, 1), np.uint8)], -1))
    image = {"PA": image.convert("P"), "P": image.quantize(8), "La": image.convert("LA")}.get(mode, image).convert(mode)
    if mode == "PA":
        image.putalpha(0)
    assert np.asarray(as_rgb(image)).min() == 255


def test_large_pictures_are_refused_before_they_are_decoded_or_scaled_down() -> None:
    data = saved(RGB.resize((1200, 900)), "JPEG", exif=turned(6))
    assert as_rgb(data, 1200 * 900, longest=300).size == (225, 300)
    with pytest.raises(ValueError, match=r"photo.jpg has 1200 x 900 pixels.*--max-pixels"):
        as_rgb(data, 1200 * 900 - 1, "photo.jpg", longest=300)


def test_altered_files_are_pictures_or_one_kind_of_error() -> None:
    rng, sound = random.Random(0), [p.values[0] for p in TABLE if not isinstance(p.values[1], str)]
    for _ in range(600):
        data = bytearray(rng.choice(sound))
        for _ in range(rng.choice([1, 1, 4])):
            data[rng.randrange(min(len(data), rng.choice([200, 10**6])))] = rng.randrange(256)
        try:
            assert as_rgb(data, name="altered").mode == "RGB"
        except ValueError as error:
            assert str(error).startswith("altered ")


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "jpeg", "packbits", "group4"])
def test_a_damaged_tiff_says_nothing_by_itself(compression: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither libtiff nor Pillow's log: what is wrong is in the error alone, which is one line at the shell."""
    data, rng = (
        saved(LARGE.convert("1" if compression == "group4" else "RGB"), "TIFF", compression=compression),
        random.Random(0),
    )
    for i in range(60):
        altered = bytearray(data)
        for _ in range(6):
            altered[rng.randrange(8, len(data))] = rng.randrange(256)
        with contextlib.suppress(ValueError):
            as_rgb(altered[: len(data) - i % 3])
    assert capfd.readouterr() == ("", "")


def test_a_machine_without_memory_is_not_a_damaged_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It says so as it is: a picture that is left out by a list would be left out for ever."""

    def load(self: Any) -> None:
        raise MemoryError("no room")

    path = tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(path)
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(MemoryError, match="no room"):
        as_rgb(path)
