"""Reproducibility and safety: seeds, devices, atomic files, resumable state, model cards, shared options.

Nothing here is pickled. A training state is a safetensors file whose metadata holds JSON, written beside its
final name and moved into place, so that a killed run or a full disk leaves the previous state intact.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, or the best one at hand: CUDA, then Apple's MPS, then the CPU."""
    if device is not None:
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


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


def atomic_write(path: str | Path, data: bytes) -> None:
    """Write a file completely or not at all: a temporary file beside it, flushed, then renamed over it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes it private; a result is not
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a fresh folder that replaces `path` when the block ends well, and is deleted when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
            os.replace(path, old / "old")
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def save_state(path: str | Path, tensors: dict[str, torch.Tensor], meta: dict) -> None:
    """Store named tensors and a JSON-able `meta` in one safetensors file, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        flat = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(flat, temporary, metadata={"meta": json.dumps(meta)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_state(path: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Read what `save_state` stored.

    Raises:
        ValueError: the file is damaged, or was not written by `save_state`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            meta = json.loads((file.metadata() or {})["meta"])
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} is not a state written by slimlib ({error}). Delete it, or start without --resume."
        ) from error
    return tensors, meta


def pack_training(
    modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict]:
    """Flatten models, optimizer moments and the random state into tensors and JSON for `save_state`."""
    tensors = {f"model/{name}/{key}": value for name, m in modules.items() for key, value in m.state_dict().items()}
    scalars: dict[str, dict] = {}
    state = optimizer.state_dict()
    for index, moments in state["state"].items():
        for key, value in moments.items():
            if torch.is_tensor(value):
                tensors[f"optimizer/{index}/{key}"] = value
            else:
                scalars.setdefault(str(index), {})[key] = value
    tensors["random/torch"] = torch.get_rng_state()
    groups = [{k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]]
    return tensors, {"optimizer": scalars, "groups": groups}


def unpack_training(
    tensors: dict[str, torch.Tensor],
    meta: dict,
    modules: dict[str, torch.nn.Module],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Put back what `pack_training` took; strict about names and shapes."""
    for name, module in modules.items():
        prefix = f"model/{name}/"
        module.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
    state = optimizer.state_dict()
    moments: dict[int, dict] = {int(i): dict(values) for i, values in meta["optimizer"].items()}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, index, name = key.split("/")
            moments.setdefault(int(index), {})[name] = value
    state["state"] = moments
    for group, saved in zip(state["param_groups"], meta["groups"], strict=True):
        group.update(saved)
    optimizer.load_state_dict(state)
    torch.set_rng_state(tensors["random/torch"])


@torch.no_grad()
def move_average(average: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    """Move a moving average towards the model: its weights a little, its constants all the way."""
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)
    for mean, value in zip(average.buffers(), model.buffers(), strict=True):
        mean.copy_(value)


def write_card(folder: str | Path, title: str, about: str, training: dict, figures: dict, source: str) -> None:
    """Write the model card `README.md` (for people) and `card.json` (the same, for tests) beside the weights.

    Args:
        folder: the folder of the weights.
        title: the name of the model.
        about: what it is and what it is for, one paragraph.
        training: how it was made: command, seed, steps, device, seconds, data.
        figures: what was measured on it, with the number of test scenes.
        source: licences and origins of data and of starting weights.
    """

    def table(rows: dict) -> str:
        return "| | |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in rows.items())

    text = (
        f"# {title}\n\n{about}\n\n## How it was made\n\n{table(training)}\n\n"
        f"## What was measured\n\n{table(figures)}\n\n## Sources and licences\n\n{source}\n"
    )
    atomic_write(Path(folder) / "README.md", text.encode())
    card = {"title": title, "about": about, "training": training, "figures": figures, "source": source}
    atomic_write(Path(folder) / "card.json", (json.dumps(card, indent=1) + "\n").encode())


def training_parser(module: str, about: str | None, epilog: str | None = None) -> argparse.ArgumentParser:
    """The parser of a training command, `python -m module`, with the options that all of them have; then `begin`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=about,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("--work", type=Path, default=Path("runs"), help="checkpoints, logs and caches (default: %(default)s)")
    option("--resume", action="store_true", help="go on from the last checkpoint of the same settings")
    option("--seed", type=int, default=0, help="of every draw (default: %(default)s)")
    option("--device", help="cpu, cuda, ... (default: the best at hand)")
    option("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    option("--quiet", action="store_true", help="no progress bars")
    return parser


def begin(options: argparse.Namespace) -> torch.device:
    """Set threads and seed as the options of `training_parser` say; returns the device."""
    if options.threads:
        torch.set_num_threads(options.threads)
    quiet_libraries()
    seed_everything(options.seed)
    return pick_device(options.device)


def quiet_libraries() -> None:
    """Silence the progress bars and the chatter of the libraries; errors stay loud."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()
