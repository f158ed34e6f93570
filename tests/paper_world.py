"""A tiny stand-in of the paper scale, written once for all tests, and pictures in ImageNet's layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import stand_in
from PIL import Image

from slimlib.data.imagenet import WNIDS
from slimlib.scales import Scale


def open_world(factory: pytest.TempPathFactory) -> Scale:
    """Stand-ins of everything, for 64 px; its tensors have the names of the published files. Copy before changing."""
    folder = factory.getbasetemp() / "stand-in"
    if not folder.exists():
        stand_in.write(folder, tiny=True)
    return replace(Scale.from_name(folder), size=64)


def make_imagenet(root: Path, count: int, labels: tuple[int, ...] = (999, 1, 500)) -> Path:
    """Noisy pictures of many shapes, of some classes in turn."""
    rng = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        path = root / WNIDS[labels[i % len(labels)]] / f"ILSVRC2012_val_{i:08d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        small.resize((70 + i % 5, 90 - i % 7)).save(path, quality=90)
    return root
