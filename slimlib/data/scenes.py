"""PocketScenes: photographic cut-outs with exact mattes, composed on photographs. Labels, RoI and captions are exact.

A scene is a pure function of (split, size, seed, index). Training scenes are endless for practical purposes; test
scenes stand on photographs that training never sees, and use the held-out cut-out of each class that has three or
more ("unseen" instances). The pictures and their licences are listed in assets/scenes/.
"""

from __future__ import annotations

import csv
import functools
import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from slimlib.scales import ASSETS

FOLDER = ASSETS / "scenes"
SPLITS = {"train": 1_000_000, "val": 1_240, "test": 2_480}
"""Number of scenes in each split."""


class Cutout(NamedTuple):
    """One row of the catalogue: a photographed object with its matte."""

    file: str
    label: int
    noun: str
    group: str
    held_out: bool


class Background(NamedTuple):
    """One row of the catalogue: a photograph and the words for the place it shows."""

    file: str
    place: str
    split: str


@dataclass(frozen=True)
class Scene:
    """A picture and everything that is known about it. Any sequence of scenes can be cached and evaluated."""

    image: Image.Image  # RGB, size x size
    matte: np.ndarray  # (size, size) float32 in [0, 1], the share of each pixel that the object covers: the RoI
    label: int  # index into CLASSES, or ImageNet's class
    noun: str  # the RoI in words, "a red fox"
    place: str  # the background in words, "in a forest"
    seen: bool  # False when this cut-out never occurs in training
    cutout: str = ""  # the noun of the cut-out that others show, too, so that they are not independent; "": nobody does

    @property
    def caption(self) -> str:
        """The whole picture in words: "a red fox in a forest"."""
        return f"{self.noun} {self.place}"

    def mask(self, rows: int, columns: int) -> np.ndarray:
        """The matte on a coarser grid, (rows, columns) float32: the share of each cell that the object covers."""
        height, width = self.matte.shape
        return self.matte.reshape(rows, height // rows, columns, width // columns).mean((1, 3))


with (FOLDER / "catalogue.csv").open(newline="") as _file:
    _ROWS = list(csv.DictReader(_file))
CLASSES = sorted({row["class"] for row in _ROWS if row["kind"] == "cutout"})
"""Names of the classes in label order."""
CUTOUTS = [
    Cutout(row["file"], CLASSES.index(row["class"]), row["noun"], row["group"], row["held_out"] == "1")
    for row in _ROWS
    if row["kind"] == "cutout"
]
BACKGROUNDS = [Background(row["file"], row["place"], row["split"]) for row in _ROWS if row["kind"] == "background"]


class PocketScenes:
    """A split of the data set as a sequence of `Scene`.

    Args:
        split: "train", "val" (training's cut-outs, other photographs) or "test" (all cut-outs, yet other photographs).
        size: side of the pictures in pixels, 32 to 512.
        seed: another seed is another data set of the same kind.
        n: how many scenes, the first ones; None for all of the split.

    Raises:
        ValueError: no such split, size or number.
    """

    def __init__(self, split: str, size: int = 128, seed: int = 0, n: int | None = None) -> None:
        if split not in SPLITS:
            raise ValueError(f"split {split!r} does not exist: expected one of {', '.join(SPLITS)}")
        if size not in range(32, 513):
            raise ValueError(f"size {size!r} is not possible: expected a whole number from 32 to 512")
        self.split, self.size, self.seed, self.n = split, size, seed, SPLITS[split] if n is None else n
        if not 0 < self.n <= SPLITS[split]:
            raise ValueError(f"{n} scenes of PocketScenes: expected 1 to {SPLITS[split]} of {split}")
        allowed = [c for c in CUTOUTS if split == "test" or not c.held_out]
        self._by_label = [[c for c in allowed if c.label == label] for label in range(len(CLASSES))]
        self._backgrounds = [b for b in BACKGROUNDS if b.split == split]

    def __len__(self) -> int:
        return self.n

    def fingerprint(self) -> str:
        """Eight hex digits that change with what the scenes are composed of."""
        made_of = f"{self.split} {self.size} {self.seed}".encode() + (FOLDER / "SHA256SUMS").read_bytes()
        return hashlib.sha256(made_of + self[0].image.tobytes()).hexdigest()[:8]

    def __getitem__(self, index: int) -> Scene:
        if not 0 <= index < len(self):
            raise IndexError(f"scene {index} does not exist: the {self.split} split holds 0 to {len(self) - 1}")
        # Each run of len(CLASSES) consecutive scenes shows every class once, in an order of its own.
        turn, place_in_turn = divmod(index, len(CLASSES))
        split_id = list(SPLITS).index(self.split)
        order = np.random.default_rng((self.seed, split_id, turn)).permutation(len(CLASSES))
        label = int(order[place_in_turn])
        rng = np.random.default_rng((self.seed, split_id, turn, place_in_turn))
        choices = self._by_label[label]
        cutout = choices[rng.integers(len(choices))]
        background = self._backgrounds[rng.integers(len(self._backgrounds))]
        image, matte = compose(cutout, background, self.size, rng)
        return Scene(image, matte, label, cutout.noun, background.place, not cutout.held_out, cutout.noun)


def compose(
    cutout: Cutout, background: Background, size: int, rng: np.random.Generator
) -> tuple[Image.Image, np.ndarray]:
    """Place a cut-out on a crop of a background with random scale, place, flip, turn, light and colour.

    Returns:
        The RGB picture (size x size) and the matte, (size, size) float32 in [0, 1].
    """
    # All random numbers are drawn first, so that the same scene exists at every size.
    flip_back, flip_front = rng.random(2) < 0.5
    crop, across, down = rng.uniform(0.55, 1.0), rng.random(), rng.random()
    blur = rng.uniform(0.0, 0.008)
    side, angle = rng.uniform(0.55, 0.9), rng.uniform(-15, 15)
    x, y = rng.random(2)
    light, contrast, colour = rng.uniform(0.8, 1.2), rng.uniform(0.85, 1.15), rng.uniform(0.8, 1.2)
    front_light = rng.uniform(0.85, 1.15)

    photo = _open(background.file)
    edge = round(crop * min(photo.size))
    left, top = round(across * (photo.width - edge)), round(down * (photo.height - edge))
    box = (left, top, left + edge, top + edge)
    canvas = photo.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3)
    if flip_back:
        canvas = canvas.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    canvas = canvas.filter(ImageFilter.GaussianBlur(blur * size))

    # Premultiplied alpha while resampling: no dark or light seam around the object.
    stamp = _open(cutout.file)
    if flip_front:
        stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = side * size / max(stamp.size)
    stamp = stamp.resize(
        (max(1, round(stamp.width * scale)), max(1, round(stamp.height * scale))), Image.Resampling.BICUBIC
    ).rotate(angle, Image.Resampling.BICUBIC, expand=True)
    stamp.thumbnail((size, size), Image.Resampling.BICUBIC)
    layer = Image.new("RGBa", (size, size))
    layer.paste(stamp, (round(x * (size - stamp.width)), round(y * (size - stamp.height))))

    front = np.asarray(layer, dtype=np.float32) / 255
    matte = front[..., 3]
    back = np.asarray(canvas, dtype=np.float32) / 255
    pixels = front[..., :3] * front_light + back * (1 - matte[..., None])
    image = Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))
    image = ImageEnhance.Brightness(image).enhance(light)
    image = ImageEnhance.Contrast(image).enhance(contrast)
    image = ImageEnhance.Color(image).enhance(colour)
    return image, np.ascontiguousarray(matte)


@functools.cache
def _open(file: str) -> Image.Image:
    """A picture of the catalogue: cut-outs with premultiplied alpha ("RGBa"), backgrounds as RGB."""
    image = Image.open(FOLDER / file)
    return image.convert("RGBA").convert("RGBa") if file.startswith("cutouts") else image.convert("RGB")
