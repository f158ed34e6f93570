"""SLIM, an image codec for machines that decodes with a latent diffusion model.

`python -m slimlib` does the same as `slim`, and `slim COMMAND --help` shows a command's options.

Examples:
  slim compress photo.jpg photo.slim
  slim compress photo.jpg photo.slim --quality 0.8 --caption "a red fox"
  slim inspect photo.slim
  slim decompress photo.slim photo.png
  slim decompress photo.slim plain.png --steps 0     (without the diffusion model)

exit status: 0 done, 1 failed (the reason is on stderr), 2 wrong usage
"""

from __future__ import annotations

import argparse
import copy
import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import slimlib  # and nothing that imports torch, which takes seconds: not for --help, and not for a mistyped command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Wrong usage leaves by SystemExit with status 2."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    overview = argparse.ArgumentParser("slim", "slim COMMAND ...", __doc__, formatter_class=_Help)
    overview.epilog = "commands:\n" + "\n".join(f"  slim {name:15}{what}" for name, (_, what) in COMMANDS.items())
    overview.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    name = overview.parse_args(words[:1]).command
    return in_one_line(f"slim {name}", lambda: _run(name, words[1:]))


def in_one_line(name: str, run: Callable[[], int]) -> int:
    """The exit status of a command, for scripts, too; what goes wrong is one line on stderr that begins with `name`."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold what no encoding has
    try:
        status = run()
        print(end="", flush=True)  # a full disk, or a reader that has gone, is an error as well
        return status
    except KeyboardInterrupt:
        reason, status = "interrupted", 130
    except Exception as error:
        if "SLIM_TRACEBACK" in os.environ:
            raise
        reason, status = " ".join(str(error).split()) or type(error).__name__, 1
        if not isinstance(error, (ValueError, OSError, FloatingPointError, ModuleNotFoundError)):  # not foreseen
            reason = f"{type(error).__name__}: {reason} (SLIM_TRACEBACK=1 in the environment shows where)"
    print(f"{name}: {reason}", file=sys.stderr)
    try:
        print(end="", flush=True)
    except OSError:
        sys.stdout = None  # type: ignore[assignment]  # or Python would say it once more
    return status


def _run(name: str, words: list[str]) -> int:
    """Read the words behind a command's name into its dataclass of options, and call it."""
    from transformers import HfArgumentParser

    where = COMMANDS[name][0]
    if isinstance(where, str):
        module = import_module(where)
        kind, command, *files = module.Options, module.command
        about = examples = module.__doc__ or ""
    else:
        kind, command, *files = where
        about, examples = kind.__doc__ or "", __doc__
    usage = " ".join([f"slim {name}", *files, "[options]"])
    parser = HfArgumentParser(kind, prog=f"slim {name}", usage=usage, formatter_class=_Help)
    parser.description = about.partition("Examples:")[0]
    parser.epilog = "examples:" + examples.partition("Examples:")[2]
    for file in files:
        parser.add_argument(file, type=Path, help=FILES[file])
    given = vars(parser.parse_args(words))
    if device := given.get("device"):
        check_device(device)
    paths = [given.pop(file) for file in files]
    return command(kind(**given), *paths)


def check_device(name: str) -> None:
    """ValueError, with those that are here, for a device that is not."""
    import torch

    kinds = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    here = [f"{kind}:{i}" for kind, count in kinds.items() for i in range(count)]
    if not {name, f"{name}:0"} & {*here}:
        raise ValueError(f"there is no device {name!r} here: expected one of {', '.join(here)} (a kind alone does)")


class _Help(argparse.RawDescriptionHelpFormatter):
    """One spelling of each option, its default where that says something, and switches as what they switch."""

    def add_argument(self, action: argparse.Action) -> None:
        if action.default is True:  # --no-... follows, and is what one may want to say
            return
        action = copy.copy(action)
        action.option_strings = action.option_strings[-1:]
        if action.const is not None:
            action.nargs, action.help = 0, action.help if action.const else f"not: {action.help}"
        elif action.default not in (None, "", [], argparse.SUPPRESS):
            action.help = f"{action.help} (default: %(default)s)"
        super().add_argument(action)


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})  # slimlib.utils.option, without that module's torch


@dataclass
class Models:
    scale: str = _option("pocket", "pocket, paper, or a folder of models")
    max_pixels: int = _option(1 << 20, "largest picture, sides padded, that is coded or decoded; time grows with it")


@dataclass
class Inspect(Models):
    """Show what a .slim file holds, and how many bytes each part takes."""

    judge: str = _option("", "the photograph it was made from: say what an ImageNet network sees before and after")


@dataclass
class Decompress(Models):
    """Decompress a .slim file to a picture."""

    steps: int | None = _option(None, "the decoder's denoising steps, 0 for none (default: as the encoder chose)")
    force: bool = _option(False, "overwrite the output if it is there")


@dataclass
class Compress(Decompress):
    """Compress a picture to a .slim file."""

    quality: float = _option(0.5, "0, smallest, to 1, best")
    caption: str = _option("auto", "words to send along; 'auto' looks at the picture, 'none' sends none")
    t0: int | None = _option(None, "the decoder's noise level (default: the compressor's table)")
    seed: int = _option(0, "seed of the decoder's noise")


def compress(options: Compress, picture: Path, stream: Path) -> int:
    file, codec = _read(picture, stream, options.force), _load(options)
    start, caption = time.perf_counter(), None if options.caption == "none" else options.caption
    data = codec.compress(file, options.quality, caption, steps=options.steps, seed=options.seed, t0=options.t0)
    return _write(stream, data, time.perf_counter() - start, codec.inspect(data))


def decompress(options: Decompress, stream: Path, picture: Path) -> int:
    from slimlib.stream import unpack

    _as_file(picture)  # what cannot hold the picture, by its kind or by its size, is refused before any work is done
    data = _read(stream, picture, options.force).getvalue()
    header = unpack(data, max_pixels=options.max_pixels, unit=1)[0]
    _as_file(picture, size=(header.width, header.height))
    codec, start = _load(options), time.perf_counter()
    image = codec.decompress(data, steps=options.steps)
    seconds = time.perf_counter() - start
    return _write(picture, _as_file(picture, image), seconds, f"{image.width} x {image.height} pixels")


def _as_file(path: Path, image: Any = None, size: tuple[int, int] = (128, 128)) -> bytes:
    """A picture, or a black one, as a file of the kind that a path ends in; ValueError if that cannot hold it."""
    from PIL import Image

    import slimlib.images  # noqa: F401 (teaches Pillow what plugins know, such as JPEG XL)

    image, file = image or Image.new("RGB", size), io.BytesIO()
    file.name = path.name
    try:
        image.save(file)
        if path.suffix.lower() != ".pdf" and (found := Image.open(file).size) != image.size:  # icons have their own
            raise ValueError(f"it would have {found[0]} x {found[1]} pixels")
    except Exception as error:
        raise ValueError(f"cannot write the picture as {path.name!r} ({error}): end its name in .png") from error
    return file.getvalue()


def inspect(options: Inspect, stream: Path) -> int:
    data, codec = _read(stream).getvalue(), _load(options)
    print(codec.inspect(data))
    if options.judge:
        from slimlib.data.imagenet import photo_machine
        from slimlib.images import as_rgb

        machine, before = photo_machine(), as_rgb(options.judge, 1 << 27, longest=512)
        for what, picture in {"the photograph": before, "what is decoded": codec.decompress(data)}.items():
            print(f"{what}: " + ", ".join(f"{name} {share:.0%}" for name, share in machine.top5(picture)[:3]))
    return 0


def _read(source: Path, output: Path | None = None, force: bool = False) -> io.BytesIO:
    """The input, read once as a pipe must be; what is wrong with files is said before models load."""
    from slimlib.utils import in_place

    with source.open("rb") as file:
        data = io.BytesIO(file.read(1 << 29))  # a device such as /dev/zero has no end
    data.name = str(source)
    if output and output.exists():
        if output.is_dir() or output.samefile(source):
            raise ValueError(f"{output} is a folder, or the input; name another output")
        if not force and not in_place(output):
            raise ValueError(f"{output} is already there; add --force to overwrite it")
    return data


def _load(options: Models) -> Any:
    print(f"loading the models ({options.scale}) ...", file=sys.stderr)
    codec = slimlib.SlimCodec.from_pretrained(options.scale)
    codec.max_pixels = options.max_pixels
    return codec


def _write(output: Path, data: bytes, seconds: float, said: Any) -> int:
    """Write a result and say so; on stderr where that could come between the bytes of a result on stdout."""
    from slimlib.utils import in_place, write_file

    write_file(output, data)
    print(f"{output}, {1000 * seconds:.0f} ms: {said}", file=sys.stderr if in_place(output) else sys.stdout)
    return 0


FILES = {"picture": "anything that Pillow opens, or writes by its ending, such as .png", "stream": "a .slim file"}
COMMANDS: dict[str, tuple[Any, str]] = {
    "compress": ((Compress, compress, "picture", "stream"), "picture to .slim"),
    "decompress": ((Decompress, decompress, "stream", "picture"), ".slim to picture"),
    "inspect": ((Inspect, inspect, "stream"), "what a .slim file holds, and how many bytes each part takes"),
    "train": ("slimlib.data.train", "train a compressor, stage 1 or 2"),
    "evaluate": ("slimlib.measure.evaluation", "measure the codec and what it is compared with"),
    "preprocess": ("slimlib.data.cache", "cache latents, masks and captions for training"),
    "explore": ("slimlib.explorer.serve", "the bit-rate explorer, as a page on this machine"),
    "costs": ("slimlib.measure.costs", "what the experiment costs, counted"),
    "doctor": ("slimlib.measure.doctor", "is everything there, and what it should be?"),
}
"""A module has `Options`, a dataclass whose fields carry their help, `command(options)`, and examples in its text."""

if __name__ == "__main__":
    sys.exit(main())
