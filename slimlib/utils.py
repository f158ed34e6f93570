"""Small things that several modules need: options, devices, digests, whole files."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

Device: TypeAlias = "str | torch.device | None"
"""A device, its name, or None for the best one at hand."""


class Within(tuple):
    """The lowest number and the highest, as choices of an option: NaN is none of them."""

    def __contains__(self, number: Any) -> bool:
        return self[0] <= number <= self[1]

    def __iter__(self) -> Iterator[str]:  # what argparse says that one may choose from
        yield f"{self[0]:g} to {self[1]:g}"


def option(default: Any, help: str, *within: float) -> Any:
    """A dataclass field with the help, and the bounds (`Within`), of an option of `transformers.HfArgumentParser`."""
    kept = {"default_factory": default.copy} if isinstance(default, (list, dict)) else {"default": default}
    choices = {"choices": Within((*within, 2**31)[:2]), "metavar": "N"} if within else {}
    return field(**kept, metadata={"help": help, **choices})


def rank_and_world() -> tuple[int, int]:
    """Which of how many processes this is, as torchrun and `accelerate launch` say: (0, 1) where nobody does."""
    rank, world = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)  # "" is not set
    if not 0 <= rank < world:  # it would have no work, and others would lack what is its
        raise ValueError(f"RANK is {rank} and WORLD_SIZE {world} in the environment: ranks count from 0")
    return rank, world


def pick_device(device: Device = None) -> torch.device:
    """The device asked for, or the best one at hand: CUDA, Apple's MPS, the CPU; of several processes each its own."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    found = torch.device(device or best)
    if found.type == "cuda" and (found.index is None or os.environ.get("LOCAL_RANK")):
        found = torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0) % max(1, torch.cuda.device_count()))
        if torch.cuda.is_available():
            torch.cuda.set_device(found)  # what forgets its device would take memory of the first one
    return found


def describe_device(device: torch.device) -> str:
    """The device in words, for model cards."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()}, {torch.get_num_threads()} threads, {platform.machine()}"


def autocast(device: torch.device, cpu: bool = False) -> torch.autocast:
    """bf16 where it pays: on CUDA; and, when `cpu` is set, on CPUs that have bf16 instructions.

    Convolutional networks in channels_last run about 1.5 times as fast in bf16 on such a CPU; small ones do not.
    """
    on_cpu = cpu and device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda" or on_cpu)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode for a while."""
    before = module.training
    try:
        module.eval()
        yield
    finally:
        module.train(before)


def digest(*modules: nn.Module) -> bytes:
    """A hash over weights: names, shapes and the first 8 values of every tensor, so that gigabytes take no time."""
    hashed = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            head = tensor[(0,) * max(0, tensor.ndim - 1)].reshape(-1)[:8]
            hashed.update(f"{name}{tuple(tensor.shape)}".encode())
            hashed.update(head.detach().to("cpu", torch.float16).numpy().astype("<f2").tobytes())
    return hashed.digest()


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield the path of a fresh file that takes the place of `path` when the block ends well, and is deleted otherwise.

    It lies beside `path`, begins with a dot, and is renamed when it is on the disk, which needs no hard links. Of a
    symbolic link the target is written; permissions stay.

    Raises:
        OSError: a full disk, or a folder that may not be written in; `path` is named, and as it was.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.writing")
    try:
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        with contextlib.suppress(OSError):  # there is no file yet, or the disk knows no permissions
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and error.filename in (None, str(temporary)):  # nobody knows that name
            error.filename, error.filename2 = str(path), None
        raise
    except RuntimeError as error:  # what `torch.save` makes of the same
        raise OSError(f"{path} cannot be written: is its disk full? ({error})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def in_place(path: str | Path) -> bool:
    """Whether bytes go on behind what is there, and nothing is overwritten: stdout, a pipe, a device."""
    opened = str(path).startswith(("/dev/std", "/dev/fd/", "/proc/self/fd/"))
    return opened or (Path(path).exists() and not Path(path).is_file())


def write_file(path: str | Path, data: bytes) -> None:
    """Write a file wholly or not at all, by `whole_file`; what is a device or a pipe gets the bytes as they come."""
    if in_place(path):
        with open(path, "ab") as file:  # /dev/stdout may be a file: nothing that it holds is lost
            file.write(data)
        return
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


def quiet_libraries() -> None:
    """Silence the progress bars and the chatter of the libraries; errors stay loud."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()
