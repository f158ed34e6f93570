"""The machines: what they see, what they answer, where Grad-CAM looks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timm.data import create_transform, resolve_model_data_config

from slimlib.images import to_images, to_tensor
from slimlib.machines import Machine, load_machine
from slimlib.measure.methods import find


def test_a_machine_sees_what_timm_shows_it(tiny_world: Path) -> None:
    machine = load_machine(str(tiny_world / "machine_b"), "cpu")
    machine.net.pretrained_cfg.update(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    machine = Machine(machine.net, machine.classes)
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    image = to_images(x)[0]
    assert (to_tensor([image, image]) - x).abs().max() <= 0.5 / 255 + 1e-6
    theirs = create_transform(**resolve_model_data_config(machine.net))(image)[None]
    torch.testing.assert_close(machine(to_tensor(image)), machine.net(theirs), atol=1e-5, rtol=1e-4)
    large = torch.nn.functional.interpolate(x, (128, 96), mode="nearest")
    small = torch.nn.functional.interpolate(large, (64, 64), mode="bilinear", antialias=True)
    torch.testing.assert_close(machine(large), machine(small))
    shares = machine(to_tensor(image)).softmax(-1)[0]
    best = [machine.classes[i] for i in shares.argsort(descending=True)[:5]]
    assert [name for name, _ in machine.top5(image)] == best
    assert machine.top5(to_tensor(image))[0][1] == pytest.approx(float(shares.max()))


def test_where_gradcam_looks(tiny_world: Path) -> None:
    """The deepest stage with at least six cells a side; the first, if none has so many."""
    machine = load_machine(str(tiny_world / "machine_a"), "cpu")
    for size, cells in {8: 4, 64: 8, 128: 8, 512: 16}.items():
        machine.net.pretrained_cfg["input_size"] = (3, size, size)
        seen = []
        handle = Machine(machine.net, []).cam_layer.register_forward_hook(lambda _, __, out, at=seen: at.append(out))
        machine.net(torch.rand(1, 3, size, size))
        handle.remove()
        assert seen[0].shape[-1] == cells


def test_a_box_is_a_mean_of_what_cells_propose(tiny_world: Path) -> None:
    machine, proposed = load_machine(str(tiny_world / "machine_b"), "cpu"), torch.zeros(2, 5, 2, 4)
    machine.net.get_classifier = torch.nn.Identity
    machine.net.forward_features = lambda x: proposed[: len(x)]
    proposed[1, :, 1, 3] = torch.tensor([0.1, -0.2, -100, 100, 100])  # a cell that is sure: of a line
    found = find(machine, torch.rand(2, 3, 64, 64))
    torch.testing.assert_close(found, torch.tensor([[0.25, 0.25, 0.75, 0.75], [0.975, 0.05, 0.975, 1.05]]))


def test_what_is_no_machine(tmp_path: Path) -> None:
    for name in (str(tmp_path), "no_such_network"):
        with pytest.raises(ValueError, match="Expected a folder written by timm"):
            load_machine(name)
