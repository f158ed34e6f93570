"""The machines: classifiers that look at decoded pictures. They are frozen and never trained on compressed ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .repro import pick_device
from .scales import hub_error

CAM_GRID = 6
"""Cells a side that Grad-CAM needs. The last layer has 7 at 224 px, but 3 at 96 px: on scenes of the pocket machines a
map from there overlaps the object no better than a spot in the middle, one from a layer before much better."""


class Machine(nn.Module):
    """A frozen timm classifier that takes pictures in [0, 1] and does its own resizing and normalisation.

    Attributes:
        net: the timm model.
        classes: the class names in the order of the logits.
        cam_layer: the layer that Grad-CAM looks at: deep, yet with a grid of some resolution.
    """

    def __init__(self, net: nn.Module, classes: list[str]) -> None:
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        self.classes = classes
        config = net.pretrained_cfg
        self.size: int = config["input_size"][-1]
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1))
        self.cam_layer = _cam_layer(net, self.size)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of pictures (B, 3, H, W) in [0, 1]; differentiable with respect to x."""
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        return self.net((x - self.mean) / self.std)

    @torch.no_grad()
    def top5(self, image: Image.Image | Tensor) -> list[tuple[str, float]]:
        """The five likeliest classes of one picture with their probabilities, best first."""
        x = to_tensor(image) if isinstance(image, Image.Image) else image
        probabilities = self(x.to(self.mean.device)).softmax(-1)[0]
        values, indices = probabilities.topk(5)
        return [(self.classes[i], float(v)) for v, i in zip(values, indices.tolist(), strict=True)]


def load_machine(name: str, device: str | torch.device | None = None) -> Machine:
    """Load a classifier: a local folder written by timm, or a timm model name (with weights from the hub).

    A name may be pinned: "resnet50.tv_in1k@revision".

    Raises:
        OSError: the hub does not give it; says why and what to do.
        ValueError: the folder or model does not exist, or its weights do not fit.
    """
    folder = Path(name)
    pinned = "@" in name and not name.startswith("hf-hub:")
    try:
        if folder.is_dir():
            net = timm.create_model(f"local-dir:{folder}", pretrained=True)
        else:
            net = timm.create_model(f"hf-hub:timm/{name}" if pinned else name, pretrained=True)
    except Exception as error:
        if isinstance(error, OSError) and not folder.is_dir():  # a misspelt name does not come that far
            raise hub_error(f"timm/{name}", error) from error
        raise ValueError(
            f"cannot load the machine {name!r}: {error}. Expected a folder written by timm (config.json and "
            "model.safetensors) or the name of a timm model whose weights can be downloaded."
        ) from error
    classes = net.pretrained_cfg.get("label_names") or imagenet_classes(net)
    return Machine(net, list(classes)).to(pick_device(device))


def imagenet_classes(net: nn.Module) -> list[str]:
    """Class names of a network trained on ImageNet-1k, from timm's own table."""
    from timm.data import ImageNetInfo

    if net.num_classes != 1000:
        raise ValueError(f"{net.num_classes} classes without names: expected label_names in the model's config")
    info = ImageNetInfo("imagenet-1k")
    return [info.index_to_description(i).split(",")[0] for i in range(1000)]


def to_tensor(images: Image.Image | list[Image.Image]) -> Tensor:
    """RGB pictures of one size as a float tensor (B, 3, H, W) in [0, 1]."""
    images = images if isinstance(images, list) else [images]
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def to_images(x: Tensor) -> list[Image.Image]:
    """The reverse of `to_tensor`: (B, 3, H, W) in [0, 1], clipped, to RGB pictures."""
    pixels = (x.detach().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]


def _cam_layer(net: nn.Module, size: int) -> nn.Module:
    """The deepest stage whose grid has at least `CAM_GRID` cells a side for pictures of `size` pixels, or the first."""
    stages = list(net.feature_info)
    fine = [stage for stage in stages if size // stage["reduction"] >= CAM_GRID]
    layer = net.get_submodule((fine or stages)[-1 if fine else 0]["module"])
    return layer[-1] if isinstance(layer, nn.Sequential) else layer
