"""The codec from a shell.

python -m slimlib compress photo.png photo.slim --quality 0.5
python -m slimlib inspect photo.slim
python -m slimlib decompress photo.slim photo-back.png
python -m slimlib doctor --scale paper
"""

from __future__ import annotations

import argparse
import io
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

# torch and the models' libraries take seconds to import: not for --help, and not for a mistyped command.
if TYPE_CHECKING:
    from slimlib.codec import SlimCodec

EXAMPLES = """\
examples:
  python -m slimlib compress photo.jpg photo.slim
  python -m slimlib compress photo.jpg photo.slim --quality 0.8 --caption "a red fox"
  python -m slimlib inspect photo.slim
  python -m slimlib decompress photo.slim photo.png
  python -m slimlib decompress photo.slim plain.png --steps 0     (before the diffusion model)
  python -m slimlib doctor --scale paper

exit status: 0 done, 1 failed (the reason is on stderr), 2 wrong usage
"""


class Failure(Exception):
    """Something that the user can understand and mend; its text is all that gets printed."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["doctor"]:  # has options of its own, and imports everything
        from slimlib.doctor import main as doctor

        return doctor(words[1:])
    options = _parser().parse_args(words)
    try:
        return options.run(options)
    except Failure as failure:
        reason = str(failure)
    except (
        ValueError,
        OSError,
    ) as error:  # StreamError, damaged pictures, missing or misfit models, full disks
        reason = str(error)
    except KeyboardInterrupt:
        print("slimlib: interrupted; nothing was written", file=sys.stderr)
        return 130
    print(f"slimlib: {reason}", file=sys.stderr)
    return 1


def compress(options: argparse.Namespace) -> int:
    if not options.picture.is_file():
        raise Failure(f"there is no file {options.picture}")
    _check_output(options.stream, options.force, options.picture)
    codec = _load(options.scale)
    caption = None if options.caption == "none" else options.caption
    stream, milliseconds = _timed(
        lambda: codec.compress(
            options.picture, options.quality, caption, steps=options.steps, seed=options.seed, t0=options.t0
        )
    )
    report = codec.inspect(stream)
    _write(options.stream, stream)
    words = f'caption "{report.caption}"' if report.caption else "no caption"
    print(
        f"{options.stream}: {report.size} bytes, {report.bpp:.4f} bpp at {report.width} x {report.height}, "
        f"{words}, {milliseconds:.0f} ms"
    )
    return 0


def decompress(options: argparse.Namespace) -> int:
    from PIL import Image

    data = _read(options.stream)
    kind = Image.registered_extensions().get(options.picture.suffix.lower())
    if kind is None or kind not in Image.SAVE:
        raise Failure(f"cannot write a picture as {options.picture.name!r}: end its name in .png, .webp or .jpg")
    _check_output(options.picture, options.force, options.stream)
    codec = _load(options.scale)
    picture, milliseconds = _timed(lambda: codec.decompress(data, steps=options.steps))
    file = io.BytesIO()
    picture.save(file, format=kind)
    _write(options.picture, file.getvalue())
    print(f"{options.picture}: {picture.width} x {picture.height} pixels, {milliseconds:.0f} ms")
    return 0


def inspect(options: argparse.Namespace) -> int:
    data = _read(options.stream)
    print(_load(options.scale).inspect(data))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m slimlib",
        description="SLIM: an image codec for machines that decodes with a latent diffusion model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="compress | decompress | inspect | doctor")

    one = commands.add_parser("compress", help="picture to .slim", description="Compress a picture to a .slim file.")
    one.add_argument("picture", type=Path, help="anything Pillow opens")
    one.add_argument("stream", type=Path, help="the .slim file to write")
    one.add_argument("--quality", type=_quality, default=0.5, help="0, smallest, to 1, best (default: %(default)s)")
    one.add_argument(
        "--caption",
        default="auto",
        help="words to send along; 'auto' looks at the picture, 'none' sends none (default: %(default)s)",
    )
    one.add_argument("--steps", type=_count, help="denoising steps for the decoder (default: the compressor's)")
    one.add_argument("--t0", type=_count, help="noise level for the decoder (default: the compressor's table)")
    one.add_argument("--seed", type=_count, default=0, help="seed of the decoder's noise (default: %(default)s)")
    one.set_defaults(run=compress)

    two = commands.add_parser("decompress", help=".slim to picture", description="Decompress a .slim file.")
    two.add_argument("stream", type=Path, help="a .slim file")
    two.add_argument("picture", type=Path, help="the picture to write; its ending says how: .png, .webp, .jpg")
    two.add_argument("--steps", type=_count, help="denoising steps (default: as the stream says; 0: none)")
    two.set_defaults(run=decompress)

    three = commands.add_parser("inspect", help="who spent what", description="Show what a .slim file holds.")
    three.add_argument("stream", type=Path, help="a .slim file")
    three.set_defaults(run=inspect)

    commands.add_parser("doctor", help="is everything there, and what it should be?", add_help=False)

    for command in (one, two, three):
        command.add_argument(
            "--scale", default="pocket", help="pocket, paper, or a folder of models (default: %(default)s)"
        )
    for command in (one, two):
        command.add_argument("--force", action="store_true", help="overwrite the output if it is there")
    return parser


def _quality(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 1")
    return value


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number, 0 or more")
    return int(text)


def _load(scale: str) -> SlimCodec:
    print(f"loading the models ({scale}) ...", file=sys.stderr)
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*")  # CompressAI's import
    from slimlib.codec import SlimCodec

    return SlimCodec.from_pretrained(scale)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise Failure(f"there is no file {path}") from None
    except IsADirectoryError:
        raise Failure(f"{path} is a folder, not a .slim file") from None


def _check_output(path: Path, force: bool, source: Path) -> None:
    """Say no before the work is done rather than after."""
    if path.is_dir():
        raise Failure(f"{path} is a folder; name a file in it")
    if not path.absolute().parent.is_dir():
        raise Failure(f"there is no folder {path.absolute().parent}; make it first")
    if path.exists():
        if path.samefile(source):
            raise Failure(f"{path} is the input; name another output")
        if not force:
            raise Failure(f"{path} is already there; add --force to overwrite it")


def _write(path: Path, data: bytes) -> None:
    from slimlib.repro import atomic_write

    atomic_write(path, data)


def _timed(work: Callable) -> tuple:
    """What a function returns, and how many milliseconds it took."""
    start = time.perf_counter()
    result = work()
    return result, 1000 * (time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(main())
