"""What the codec's tests need beyond `tiny_world`: a compressor with random weights, and a caption prior."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from slimlib.caption import CaptionPrior
from slimlib.codec import CAPTION_PRIOR
from slimlib.compressor import CompressorConfig, LatentCompressor

CAPTIONS = ["a red fox", "a banana", "a violin", "a lion", "a tulip", "a bus"]


def make_world(source: Path, folder: Path, seed: int = 0) -> Path:
    """Copy `tiny_world` and add a compressor."""
    shutil.copytree(source, folder)
    config = CompressorConfig(
        stem=16,
        width=16,
        depth=1,
        heads=2,
        y_channels=8,
        h_channels=4,
        net_width=8,
        gain_min=0.5,
        gain_max=8.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LatentCompressor(config).save_pretrained(folder / "compressor")
    CaptionPrior.fit(CAPTIONS * 10).save(folder / "compressor" / CAPTION_PRIOR)
    return folder


def picture(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    """A smooth coloured picture with a bright square."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
    image = small.resize((width, height), Image.Resampling.BICUBIC)
    image.paste((255, 240, 60), (width // 4, height // 4, width // 2 + 1, height // 2 + 1))
    return image
