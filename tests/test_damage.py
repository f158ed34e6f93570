"""Weights and configurations that are cut, pointers, full of holes or of another model: one line names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slimlib.caption import CAPTION_PRIOR, Captioner, CaptionPrior
from slimlib.compressor import LatentCompressor
from slimlib.ldm import LatentDiffusion, last
from slimlib.machines import load_machine

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
LOADERS: dict[str, Callable[[Path], Any]] = {
    "compressor": lambda folder: LatentCompressor.from_pretrained(folder, "cpu"),
    "prior": lambda folder: CaptionPrior.load(folder / CAPTION_PRIOR),
    "ldm": lambda folder: LatentDiffusion.from_pretrained(folder, device="cpu"),
    "captioner": lambda folder: Captioner.from_pretrained(folder, "cpu"),
    "machine_a": lambda folder: load_machine(str(folder), "cpu"),
}
FILES = {
    "compressor": ["config.json", "model.safetensors"],
    "prior": [CAPTION_PRIOR],
    "ldm": [
        *(
            f"{part}/{name}"
            for part in ("vae", "unet")
            for name in ("config.json", "diffusion_pytorch_model.safetensors")
        ),
        *("text_encoder/config.json", "text_encoder/model.safetensors"),
        *("scheduler/scheduler_config.json", "tokenizer/tokenizer.json"),
    ],
    "captioner": ["config.json", "model.safetensors"],
    "machine_a": ["config.json", "model.safetensors"],
}


def fails(part: str, folder: Path, *said: str) -> None:
    with pytest.raises(ValueError) as caught:
        LOADERS[part](folder)
    line = str(caught.value)
    assert all(word in line for word in said) and "\n" not in line and len(line) < 800, line


def hole(data: bytes) -> bytes:
    return data[: len(data) // 3] + data[len(data) // 3 + 9 :] if data[:1] == b"{" else data[:8] + bytes(40) + data[48:]


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut": (lambda data: data[: len(data) // 2], "cut or damaged"),
    "pointer": (lambda data: POINTER, "git lfs pull"),
    "empty": (lambda data: b"", "cut or damaged"),
    "hole": (hole, ""),
    "bare": (lambda data: b"{}", ""),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize(("part", "file"), [(part, file) for part, files in FILES.items() for file in files])
def test_damaged_files(tiny_codec_world: Path, tmp_path: Path, part: str, file: str, kind: str) -> None:
    source = tiny_codec_world / {"prior": "compressor"}.get(part, part)
    shutil.copytree(source, folder := tmp_path / "models", ignore=shutil.ignore_patterns("*fp16*"))
    change, said = DAMAGE[kind]
    (folder / file).write_bytes(change((folder / file).read_bytes()))
    fails(part, folder, str(folder / file) if said else str((folder / file).parent), said)


@pytest.mark.parametrize("part", ["compressor", "machine_a", "captioner"])
def test_weights_of_another_model(tiny_codec_world: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(tiny_codec_world / part, folder := tmp_path / "models")
    foreign = tiny_codec_world / "ldm/unet/diffusion_pytorch_model.safetensors"
    shutil.copy(foreign, folder / "model.safetensors")
    fails(part, folder, str(folder))


def spoil(path: Path) -> None:
    """Put a NaN into a file of weights."""
    tensors = load_file(path)
    name = next(name for name, tensor in sorted(tensors.items()) if tensor.is_floating_point())
    tensors[name].view(-1)[-1] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["captioner", "machine_a"])
def test_weights_that_are_not_finite(tiny_codec_world: Path, tmp_path: Path, part: str) -> None:
    """A machine would name the first class for every picture, a captioner say one word."""
    shutil.copytree(tiny_codec_world / part, folder := tmp_path / "models", ignore=shutil.ignore_patterns("*fp16*"))
    spoil(folder / "model.safetensors")
    fails(part, folder, str(folder), "not finite")


@pytest.mark.parametrize("part", ["vae", "unet"])
def test_a_diffusion_model_that_is_not_finite_shows_no_picture(
    tiny_codec_world: Path, tmp_path: Path, part: str
) -> None:
    """Its weights are gigabytes that are read as they are needed, so it is what they make that is looked at."""
    shutil.copytree(tiny_codec_world / "ldm", folder := tmp_path / "ldm", ignore=shutil.ignore_patterns("*fp16*"))
    spoil(folder / part / "diffusion_pytorch_model.safetensors")
    ldm = LatentDiffusion.from_pretrained(folder, device="cpu")
    with torch.no_grad(), pytest.raises(ValueError, match="not finite"):
        ldm.decode(last(ldm.enhance(z := torch.zeros(1, ldm.latent_channels, 8, 8), ["a dog"], 300, 2), z))


def test_a_compressor_that_is_not_whole(tiny_codec_world: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_codec_world / "compressor", folder := tmp_path / "models")
    config, weights = folder / "config.json", folder / "model.safetensors"
    whole, tensors = json.loads(config.read_text()), load_file(weights)
    less = {name: value for name, value in whole.items() if name != "walks"}
    tables = [[[0.0, "x", 4, 3]], [[0.0, float("nan"), 4, 3]], [[0.0, 500, 4]], 7]
    odd = [{"width": "16"}, *({"walks": table} for table in tables), {"heads": 0}, {"stem": -1}]
    for values in (less, [], 7, None, whole | {"surplus": 1}, *(whole | change for change in odd)):
        config.write_text(json.dumps(values))
        fails("compressor", folder, str(folder))
    config.write_text(json.dumps(whole))
    for name, value in {"decoder.enter.bias": float("nan"), "log_gain": float("inf"), "table": 0}.items():
        save_file(tensors | {name: torch.full_like(tensors[name], value)}, weights)
        fails("compressor", folder, str(folder), "finite" if name != "table" else "")
