"""The machines: classifiers that look at decoded pictures. They are frozen and never trained on compressed ones."""

from __future__ import annotations

import functools
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor, nn

from slimlib.images import check_finite, to_tensor
from slimlib.scales import hub_error, unloadable
from slimlib.utils import Device, pick_device

CAM_GRID = 6
"""Cells a side that Grad-CAM needs. The last layer has 7 at 224 px, but 3 at 96 px: on scenes of the pocket machines a
map from there overlaps the object no better than a spot in the middle, one from a layer before much better."""

imagenet_info = functools.cache(lambda: ImageNetInfo("imagenet-1k"))  # takes 60 ms: for those who need it, once


def imagenet_classes() -> list[str]:
    """English names in label order, the first of the synonyms; two of them occur twice ("crane", "maillot")."""
    return [text.split(",")[0] for text in imagenet_info().label_descriptions()]


class Machine(nn.Module):
    """A frozen timm classifier that takes pictures in [0, 1] and does its own resizing and normalisation."""

    def __init__(self, net: nn.Module, classes: list[str]) -> None:
        super().__init__()
        config = net.pretrained_cfg
        self.net = net.eval().requires_grad_(False)
        self.classes = classes  # names in the order of the logits
        self.size: int = config["input_size"][-1]
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(config[name]).view(1, 3, 1, 1))
        # Grad-CAM looks at the deepest stage whose grid is fine enough, or at the first.
        stages = list(net.feature_info)
        fine = [stage for stage in stages if self.size // stage["reduction"] >= CAM_GRID]
        layer = net.get_submodule((fine or stages)[-1 if fine else 0]["module"])
        self.cam_layer = layer[-1] if isinstance(layer, nn.Sequential) else layer

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of pictures (B, 3, H, W) in [0, 1]; differentiable with respect to x."""
        return self.net(self.prepare(x))

    def prepare(self, x: Tensor) -> Tensor:
        """Pictures in [0, 1] at the network's size, with its mean and deviation."""
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        return (x - self.mean) / self.std

    @torch.no_grad()
    def top5(self, image: Image.Image | Tensor) -> list[tuple[str, float]]:
        """The five likeliest classes of one picture with their probabilities, best first."""
        x = to_tensor(image) if isinstance(image, Image.Image) else image
        values, indices = self(x.to(self.mean.device)).softmax(-1)[0].topk(5)
        return [(self.classes[i], v) for v, i in zip(values.tolist(), indices.tolist(), strict=True)]


def load_machine(name: str, device: Device = None) -> Machine:
    """Load a classifier: a folder written by timm, or a model of timm by its name, "@revision" behind it if pinned.

    Without `label_names` in its config it knows ImageNet's classes.

    Raises:
        OSError: the hub does not give it; says why and what to do.
        ValueError: the folder or model does not exist, or its weights do not fit.
    """
    local, pinned = Path(name).is_dir(), "@" in name and not name.startswith("hf-hub:")
    try:
        place = f"local-dir:{name}" if local else f"hf-hub:timm/{name}" if pinned else name
        net = timm.create_model(place, pretrained=True)
        for weights in net.state_dict().values():
            check_finite(weights, "the machine")
    except Exception as error:
        if isinstance(error, OSError) and not local:  # a misspelt name does not come that far
            raise hub_error(f"timm/{name}", error) from error
        if local and (Path(name) / "config.json").exists():
            raise unloadable(Path(name), error, "a machine") from error
        raise ValueError(
            f"cannot load the machine {name!r}: {' '.join(str(error).split())[:300]}. Expected a folder written by "
            "timm (config.json and model.safetensors) or the name of a timm model whose weights can be downloaded."
        ) from error
    classes = net.pretrained_cfg.get("label_names") or imagenet_classes()
    if len(classes) != net.num_classes:
        raise ValueError(f"{name}: {net.num_classes} classes without names: expected label_names in its config")
    return Machine(net, list(classes)).to(pick_device(device))
