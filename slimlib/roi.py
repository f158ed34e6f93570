"""The region of interest: where a classifier looks, as a map, a box, a crop and a weight.

Compressing needs none of this: the compressor has learned what to keep. The map weighs the loss in
    training, and the encoder cuts the crop that is captioned.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from PIL import Image
from torch import Tensor, nn

from slimlib.machines import Machine

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom just outside, as Pillow has it."""


def gradcam(machine: Machine, x: Tensor, label: int | Tensor | None = None, layer: nn.Module | None = None) -> Tensor:
    """Grad-CAM (arXiv 1610.02391): what in the picture speaks for a class.

    Args:
        machine: a frozen classifier.
        x: pictures (B, 3, H, W) in [0, 1].
        label: class asked about, one or (B,); None asks for the machine's own first guess.
        layer: where in the machine to look; None takes its `cam_layer`.

    Returns:
        Maps (B, 1, H, W) in [0, 1], each with maximum 1, or all 0 where nothing speaks for the class.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()  # the machine is frozen, so the gradient has to start at the picture
        if label is None:
            with torch.no_grad():
                label = machine(x).argmax(1)
        target = label if isinstance(label, int) else torch.as_tensor(label, device=x.device)
        cam = LayerGradCam(machine, layer or machine.cam_layer).attribute(x, target=target, relu_attributions=True)
    cam = F.interpolate(cam.detach(), x.shape[2:], mode="bilinear", align_corners=False)  # (B, 1, H, W)
    peak = cam.amax(dim=(2, 3), keepdim=True)
    return torch.where(peak > 0, cam / peak.clamp_min(torch.finfo(cam.dtype).tiny), 0).clamp(0, 1)


def roi_box(cam: Tensor, threshold: float = 0.3) -> Box:
    """The box around everything above `threshold` of a map (H, W), (1, H, W) or (1, 1, H, W).

    A map that is empty, or everywhere the same, singles nothing out: the box is then the whole picture.
    """
    cam = cam.reshape(cam.shape[-2:])
    height, width = cam.shape
    hot = cam > threshold * cam.max()
    if not hot.any():
        return 0, 0, width, height
    rows, columns = hot.any(1).nonzero(), hot.any(0).nonzero()
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def roi_crop(image: Image.Image, cam: Tensor, margin: float = 0.1) -> Image.Image:
    """Cut the RoI out of a picture, with `margin` of its size more on each side, as square as the picture
    allows.

    Square, because the captioner squeezes whatever it gets into a square. `cam` need not have the picture's
    size.
    """
    height, width = cam.shape[-2:]
    left, top, right, bottom = roi_box(cam)
    horizontal, vertical = image.width / width, image.height / height
    side = max((right - left) * horizontal, (bottom - top) * vertical) * (1 + 2 * margin)
    left, right = _span((left + right) / 2 * horizontal, side, image.width)
    top, bottom = _span((top + bottom) / 2 * vertical, side, image.height)
    return image.crop((left, top, right, bottom))


def latent_mask(m: Tensor, h: int, w: int) -> Tensor:
    """Pool a map (B, 1, H, W) to the latent grid (B, 1, h, w): the share of each cell inside the RoI."""
    return F.adaptive_avg_pool2d(m, (h, w))


def roi_weights(m: Tensor, w_bg: float = 0.1) -> Tensor:
    """Weights of the distortion: 1 inside the RoI, `w_bg` in the background (our choice)."""
    return w_bg + (1 - w_bg) * m


def _span(centre: float, length: float, limit: int) -> tuple[int, int]:
    """An interval of about `length` around `centre`, at least one pixel, moved and cut to fit [0, limit]."""
    size = min(max(round(length), 1), limit)
    start = min(max(round(centre - size / 2), 0), limit - size)
    return start, start + size
