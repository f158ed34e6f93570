"""The region of interest: maps, boxes, crops, masks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from slimlib.machines import load_machine
from slimlib.roi import gradcam, latent_mask, roi_box, roi_crop, roi_weights


class Spotter(nn.Module):
    """A machine one can reason about: class 0 is redness, class 1 is blueness, each summed over the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.cam_layer = nn.Conv2d(3, 2, 4, stride=4, bias=False)
        weight = torch.zeros(2, 3, 4, 4)
        weight[0, 0] = weight[1, 2] = 1 / 16
        self.cam_layer.weight.data = weight
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.cam_layer(x).relu().mean((2, 3))


def two_spots() -> Tensor:
    """Two pictures of 32 px: a red square at the upper left, and a smaller blue one at the lower right."""
    x = torch.zeros(2, 3, 32, 32)
    x[:, 0, 4:16, 0:12] = 1
    x[:, 2, 24:32, 24:32] = 1
    return x


def test_gradcam_finds_what_speaks_for_the_class() -> None:
    red = gradcam(Spotter(), two_spots(), 0)  # type: ignore[arg-type]
    assert red.shape == (2, 1, 32, 32)
    assert red[:, :, 6:14, 2:10].min() > 0.8
    assert red[:, :, 24:, 24:].max() < 0.05
    blue = gradcam(Spotter(), two_spots(), torch.tensor([1, 1]))  # type: ignore[arg-type]
    assert blue[:, :, 26:30, 26:30].min() > 0.8
    assert blue[:, :, :16, :16].max() < 0.05
    mixed = gradcam(Spotter(), two_spots(), torch.tensor([0, 1]))  # type: ignore[arg-type]
    assert torch.equal(mixed, torch.stack([red[0], blue[1]]))
    assert torch.equal(gradcam(Spotter(), two_spots()), red)  # type: ignore[arg-type]  # there is more red
    assert torch.equal(gradcam(Spotter(), two_spots()[:1]), red[:1])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["machine_a", "machine_b"])
def test_gradcam_on_real_architectures(tiny_world: Path, name: str) -> None:
    machine = load_machine(str(tiny_world / name), "cpu")
    x = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # it sees to its gradients itself
        cam = gradcam(machine, x)
    assert cam.shape == (2, 1, 48, 64)
    assert cam.min() >= 0
    assert all(peak == 0 or 0.5 < peak <= 1 for peak in cam.amax((1, 2, 3)).tolist())
    assert not cam.requires_grad
    assert all(weight.grad is None for weight in machine.parameters())


def test_nothing_to_see() -> None:
    cam = gradcam(Spotter(), torch.zeros(1, 3, 32, 32), 0)  # type: ignore[arg-type]
    assert cam.abs().max() == 0
    assert roi_box(cam) == (0, 0, 32, 32)
    assert roi_crop(Image.new("RGB", (50, 40)), cam).size == (50, 40)


def test_box_and_crop() -> None:
    cam = torch.zeros(1, 1, 32, 32)
    cam[..., 8:16, 4:24] = 1
    assert roi_box(cam, share=1.0) == (4, 8, 24, 16)
    assert roi_box(cam[0], share=0.5) == (9, 10, 19, 14)
    cam[..., 30, 30] = 0.5  # a stray spot of less than 4% does not widen the box
    left, top, right, bottom = roi_box(cam)
    assert (left, top) == (4, 8)
    assert right <= 24
    assert bottom <= 16
    assert roi_box(torch.ones(20, 30), share=1.0) == (0, 0, 30, 20)
    image = Image.linear_gradient("L").resize((64, 96))
    cam[..., 30, 30] = 0
    cam[..., 8:16, 4:24] = 1
    width, height = roi_crop(image, cam).size
    assert 36 <= width <= 40
    assert 20 <= height <= 24
    assert roi_crop(image, cam, margin=5).size == (64, 96)


def test_crops_of_single_pixels() -> None:
    spot = torch.zeros(32, 32)
    spot[31, 31] = 1
    assert roi_box(spot) == (31, 31, 32, 32)
    assert roi_crop(Image.new("RGB", (1, 1)), spot).size == (1, 1)
    image = Image.linear_gradient("L").resize((64, 64))
    assert roi_crop(image, spot).tobytes() == image.crop((62, 62, 64, 64)).tobytes()
    assert min(roi_crop(Image.new("RGB", (5, 3)), spot).size) == 1


def test_masks_and_weights() -> None:
    m = torch.zeros(1, 1, 128, 128)
    m[..., :64, :62] = 1
    pooled = latent_mask(m, 32, 32)
    assert pooled.shape == (1, 1, 32, 32)
    assert pooled[0, 0, 0, 0] == 1
    assert pooled[0, 0, 0, 15] == 0.5
    assert pooled[0, 0, 31, 31] == 0
    torch.testing.assert_close(pooled.mean(), m.mean())
    weights = roi_weights(pooled, w_bg=0.1)
    assert weights.min() == pytest.approx(0.1)
    assert weights.max() == pytest.approx(1)
    assert torch.equal(roi_weights(pooled, w_bg=1.0), torch.ones_like(pooled))
