"""What tests need beyond `tiny_world`: a compressor with random weights, a caption prior, pictures."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from slimlib.caption import CAPTION_PRIOR, CaptionPrior
from slimlib.compressor import CompressorConfig, LatentCompressor

CAPTIONS = ["a red fox", "a banana", "a violin", "a lion", "a tulip", "a bus"]
TINY = CompressorConfig(stem=16, width=16, depth=1, heads=2, y_channels=8, h_channels=4, net_width=8)


def make_world(source: Path, folder: Path, seed: int = 0) -> Path:
    """Copy `tiny_world` and add a compressor."""
    shutil.copytree(source, folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LatentCompressor(replace(TINY, gain_min=0.5, gain_max=8.0)).save_pretrained(folder / "compressor")
    CaptionPrior.fit(CAPTIONS * 10).save(folder / "compressor" / CAPTION_PRIOR)
    return folder


def picture(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    """A smooth coloured picture with a bright square."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
    image = small.resize((width, height), Image.Resampling.BICUBIC)
    image.paste((255, 240, 60), (width // 4, height // 4, width // 2 + 1, height // 2 + 1))
    return image
