"""A pool of composed scenes on disk, so that training does not compose the same pictures again and again."""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from .repro import atomic_folder
from .scenes import PocketScenes


@dataclass(frozen=True)
class ScenePool:
    """Scenes 0..n-1 of a split, memory-mapped.

    Attributes:
        images: (n, 3, size, size) uint8.
        masks: (n, grid, grid) uint8, the matte averaged over the cells of the latent grid, 255 = all object.
        labels: (n,) int64.
        nouns, places: the words of each scene.
    """

    images: np.ndarray
    masks: np.ndarray
    labels: np.ndarray
    nouns: list[str]
    places: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray) -> torch.Tensor:
        """Pictures (B, 3, size, size) as float in [0, 1], in the order of the indices; ascending ones read faster."""
        return torch.from_numpy(self.images[indices]).float() / 255

    @staticmethod
    def load(
        folder: str | Path, split: str, n: int, size: int = 128, grid: int = 32, progress: bool = True
    ) -> ScenePool:
        """Open the pool in `folder`, composing it first (about 5 ms a scene and core) where it is not there yet."""
        path = Path(folder) / f"{split}-{size}-{n}"
        if not (path / "words.json").exists():
            _compose(path, split, n, size, grid, progress)
        words = json.loads((path / "words.json").read_text())
        arrays = {name: np.load(path / f"{name}.npy", mmap_mode="r") for name in ("images", "masks", "labels")}
        return ScenePool(**arrays, **words)


def _compose(path: Path, split: str, n: int, size: int, grid: int, progress: bool) -> None:
    with atomic_folder(path) as folder:
        images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (n, 3, size, size))
        masks = np.lib.format.open_memmap(folder / "masks.npy", "w+", np.uint8, (n, grid, grid))
        labels, nouns, places = np.zeros(n, np.int64), [], []
        with ProcessPoolExecutor(os.cpu_count()) as workers:
            scenes = workers.map(partial(_one, split, size, grid), range(n), chunksize=32)
            for i, scene in enumerate(tqdm(scenes, total=n, desc=f"composing {split}", disable=not progress)):
                images[i], masks[i], labels[i] = scene[:3]
                nouns.append(scene[3])
                places.append(scene[4])
        images.flush()
        masks.flush()
        np.save(folder / "labels.npy", labels)
        (folder / "words.json").write_text(json.dumps({"nouns": nouns, "places": places}))


def _one(split: str, size: int, grid: int, index: int) -> tuple:
    scene = PocketScenes(split, size)[index]
    pixels = np.asarray(scene.image).transpose(2, 0, 1)
    return pixels, (scene.mask(grid, grid) * 255).round().astype(np.uint8), scene.label, scene.noun, scene.place
