"""Atomic files, and training states that survive a crash without pickle."""

from __future__ import annotations

import pytest
import torch

from slimlib import repro


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "result.bin"
    repro.atomic_write(path, b"old")

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(repro.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        repro.atomic_write(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["result.bin"]


def test_a_failed_folder_leaves_the_old_folder(tmp_path):
    path = tmp_path / "model"
    with repro.atomic_folder(path) as folder:
        (folder / "weights").write_text("old")
    with pytest.raises(RuntimeError), repro.atomic_folder(path) as folder:
        (folder / "weights").write_text("new")
        raise RuntimeError("killed")
    assert (path / "weights").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["model"]


def _run(steps: int, net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(steps):
        loss = net(torch.randn(4, 3)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _fresh() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    return net, torch.optim.AdamW(net.parameters(), 0.1)


def test_a_resumed_training_equals_one_in_one_go(tmp_path):
    straight, optimizer = _fresh()
    _run(6, straight, optimizer)

    net, optimizer = _fresh()
    _run(3, net, optimizer)
    tensors, training = repro.pack_training({"net": net}, optimizer)
    repro.save_state(tmp_path / "state.safetensors", tensors, {"training": training})

    net, optimizer = _fresh()
    torch.manual_seed(99)
    tensors, meta = repro.load_state(tmp_path / "state.safetensors")
    repro.unpack_training(tensors, meta["training"], {"net": net}, optimizer)
    _run(3, net, optimizer)
    assert torch.equal(net.weight, straight.weight) and torch.equal(net.bias, straight.bias)


def test_a_damaged_state_is_named(tmp_path):
    path = tmp_path / "state.safetensors"
    path.write_bytes(b"\x10" * 64)
    with pytest.raises(ValueError, match="is not a state written by slimlib"):
        repro.load_state(path)


def test_a_state_of_another_model_is_refused(tmp_path):
    net, optimizer = _fresh()
    _run(1, net, optimizer)
    tensors, training = repro.pack_training({"net": net}, optimizer)
    other = torch.nn.Linear(5, 2)
    with pytest.raises(RuntimeError, match="size mismatch"):
        repro.unpack_training(tensors, training, {"net": other}, torch.optim.AdamW(other.parameters()))
