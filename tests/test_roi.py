"""The region of interest: maps, boxes, crops, masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from slimlib.machines import load_machine
from slimlib.roi import gradcam, latent_mask, object_box, roi_box, roi_crop, roi_weights


class Spotter(nn.Module):
    """A machine one can reason about: class 0 is redness, class 1 is blueness, each summed over the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.cam_layer = nn.Conv2d(3, 2, 4, stride=4, bias=False).requires_grad_(False)
        self.cam_layer.weight[:] = 0
        self.cam_layer.weight[0, 0] = self.cam_layer.weight[1, 2] = 1 / 16

    def forward(self, x: Tensor) -> Tensor:
        return self.cam_layer(x).relu().mean((2, 3))


def test_gradcam_finds_what_speaks_for_the_class() -> None:
    spotter: Any = Spotter()
    x = torch.zeros(2, 3, 32, 32)
    x[:, 0, 4:16, 0:12] = 1  # a red square at the upper left,
    x[:, 2, 24:32, 24:32] = 1  # and a smaller blue one at the lower right
    red, blue = gradcam(spotter, x, torch.tensor([0, 0])), gradcam(spotter, x, 1)
    assert red.shape == (2, 1, 32, 32)
    assert red[:, :, 6:14, 2:10].min() > 0.8 and red[:, :, 24:, 24:].max() < 0.05
    assert blue[:, :, 26:30, 26:30].min() > 0.8 and blue[:, :, :16, :16].max() < 0.05
    assert torch.equal(gradcam(spotter, x, torch.tensor([0, 1])), torch.stack([red[0], blue[1]]))
    assert torch.equal(gradcam(spotter, x), red)  # asked for no class it takes its own guess: there is more red,
    assert torch.equal(gradcam(spotter, x.flip(1)), red) and torch.equal(
        gradcam(spotter, x.flip(1), 0), blue
    )  # or blue
    cam = gradcam(spotter, torch.zeros(1, 3, 32, 32), 0)  # nothing to see
    assert cam.abs().max() == 0 and roi_box(cam) == (0, 0, 32, 32)
    assert roi_crop(Image.new("RGB", (50, 40)), cam).size == (50, 40)


@pytest.mark.parametrize("name", ["machine_a", "machine_b"])
def test_gradcam_on_real_architectures(tiny_world: Path, name: str) -> None:
    machine = load_machine(str(tiny_world / name), "cpu")
    x = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # it sees to its gradients itself
        cam = gradcam(machine, x)
    assert cam.shape == (2, 1, 48, 64) and cam.min() >= 0 and not cam.requires_grad
    assert all(peak == 0 or 0.5 < peak <= 1 for peak in cam.amax((1, 2, 3)).tolist())
    assert all(weight.grad is None for weight in machine.parameters())
    first = machine.net.get_submodule(machine.net.feature_info[0]["module"])
    assert not torch.equal(gradcam(machine, x, layer=first), cam)


def test_box_and_crop() -> None:
    cam = torch.zeros(1, 1, 32, 32)
    cam[..., 8:16, 4:24] = 1
    assert roi_box(cam, share=1.0) == (4, 8, 24, 16)
    assert roi_box(cam[0], share=0.5) == (9, 10, 19, 14)
    image = Image.linear_gradient("L").resize((64, 96))
    assert roi_crop(image, cam).tobytes() == image.crop((8, 24, 48, 48)).tobytes()
    cam[..., 30, 30] = 0.5  # a stray spot of less than 4% does not widen the box
    assert roi_box(cam)[:2] == (4, 8) and roi_box(cam)[2] <= 24 and roi_box(cam)[3] <= 16
    assert roi_box(torch.ones(20, 30), share=1.0) == (0, 0, 30, 20)
    spot = torch.zeros(32, 32)
    spot[31, 31] = 1  # a single pixel at the edge
    assert roi_box(spot) == (31, 31, 32, 32)
    assert roi_crop(image, spot).tobytes() == image.crop((62, 93, 64, 96)).tobytes()
    assert roi_crop(Image.new("RGB", (1, 1)), spot).size == (1, 1)
    assert roi_crop(Image.new("RGB", (5, 3)), spot.roll((-21, -21), (0, 1))).size == (1, 1)


def test_the_object_is_the_largest_part_of_a_map() -> None:
    region = torch.full((1, 64, 48), 0.1)
    region[0, 10:50, 5:35], region[0, 55:62, 40:47] = 0.9, 1.0  # another thing that stands out
    alone = region.clone()
    alone[0, 55:62, 40:47] = 0.1
    left, top, right, bottom = box = object_box(region)
    assert box == object_box(alone) and 0 <= left < 5 < 35 < right < 40 and top < 10 < 50 < bottom
    assert object_box(torch.full((1, 64, 48), 0.1)) == (0, 0, 48, 64), "all of it where nothing stands out"


def test_masks_and_weights() -> None:
    m = torch.zeros(1, 1, 128, 64)
    m[..., :64, :30] = 1
    pooled = latent_mask(m, 32, 16)
    assert pooled.shape == (1, 1, 32, 16)
    assert pooled[0, 0, [0, 0, 31], [0, 7, 15]].tolist() == [1, 0.5, 0]  # the share of a cell that is inside
    torch.testing.assert_close(pooled.mean(), m.mean())
    for w_bg in (0.3, 1.0):
        weights = roi_weights(pooled, w_bg)[0, 0, [0, 0, 31], [0, 7, 15]]
        torch.testing.assert_close(weights, torch.tensor([1, (1 + w_bg) / 2, w_bg]))
    assert roi_weights(pooled).min() == pytest.approx(0.1)
