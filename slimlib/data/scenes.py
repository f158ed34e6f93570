"""PocketScenes: photographic cut-outs with exact mattes, composed on photographs. Labels, RoI and captions are exact.

A scene is a pure function of (split, size, seed, index). Training scenes are endless for practical purposes; test
scenes show the cut-outs of training on photographs that training never sees. One cut-out of each class that has two or
more is held out: the split "unseen" shows these alone. The pictures and their licences are listed in assets/scenes/.
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
SPLITS = {"train": 1_000_000, "val": 1_240, "test": 2_480, "unseen": 390, "focused": 2_480}
SPLITS |= {"plain": 100_000, "plain-val": 1_240}
"""Number of scenes in each split. They stand on three sets of photographs, those of "train", "val" and "test".

"unseen" shows the held-out cut-outs on test photographs. "focused" are the test scenes once more, each object sharp
before a blurred background. "plain" and "plain-val" are sharp photographs without an object, of training and of "val".
"""
BLUR_BACK, BLUR_FRONT = 0.008, 0.012
"""Largest blur of background and object, as a share of the side. Half of the backgrounds stay sharp."""


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

    @property
    def box(self) -> np.ndarray:
        """The object's box, (4,) float32: left, top, right, bottom in [0, 1] of where the matte is above one half."""
        inside = self.matte > 0.5
        ends = [np.flatnonzero(inside.any(axis)) for axis in (0, 1)]
        low, high = ([way[at] + (at < 0) if len(way) else 0 for way in ends] for at in (0, -1))
        return np.array([*low, *high], np.float32) / len(inside)

    def mask(self, rows: int, columns: int) -> np.ndarray:
        """The matte on a coarser grid, (rows, columns) float32: the share of each cell that the object covers."""
        height, width = self.matte.shape
        return self.matte.reshape(rows, height // rows, columns, width // columns).mean((1, 3))


with (FOLDER / "catalogue.csv").open(newline="") as _file:
    _ROWS = list(csv.DictReader(_file))
CLASSES = sorted({row["class"] for row in _ROWS if row["kind"] == "cutout"})  # names in label order
CUTOUTS = [
    Cutout(row["file"], CLASSES.index(row["class"]), row["noun"], row["group"], row["held_out"] == "1")
    for row in _ROWS
    if row["kind"] == "cutout"
]
BACKGROUNDS = [Background(row["file"], row["place"], row["split"]) for row in _ROWS if row["kind"] == "background"]


class PocketScenes:
    """A split of the data set as a sequence of `Scene`; ValueError where there is no such split, size or number.

    Args:
        split: one of SPLITS.
        size: side of the pictures in pixels, 32 to 512.
        seed: another seed is another data set of the same kind.
        n: how many scenes, the first ones; None for all of the split.
    """

    def __init__(self, split: str, size: int = 128, seed: int = 0, n: int | None = None) -> None:
        if split not in SPLITS:
            raise ValueError(f"split {split!r} does not exist: expected one of {', '.join(SPLITS)}")
        if size not in range(32, 513):
            raise ValueError(f"size {size!r} is not possible: expected a whole number from 32 to 512")
        self.split, self.size, self.seed, self.n = split, size, seed, SPLITS[split] if n is None else n
        if not 0 < self.n <= SPLITS[split]:
            raise ValueError(f"{n} scenes of PocketScenes: expected 1 to {SPLITS[split]} of {split}")
        allowed = [c for c in CUTOUTS if c.held_out == (split == "unseen")]
        by_label = [[c for c in allowed if c.label == label] for label in range(len(CLASSES))]
        self._choices = [cutouts for cutouts in by_label if cutouts]
        place = {"plain": "train", "plain-val": "val", "unseen": "test", "focused": "test"}.get(split, split)
        self._backgrounds = [b for b in BACKGROUNDS if b.split == place]

    def __len__(self) -> int:
        return self.n

    def fingerprint(self) -> str:
        """Eight hex digits that change with what the scenes are composed of."""
        made_of = f"{self.split} {self.size} {self.seed}".encode() + (FOLDER / "SHA256SUMS").read_bytes()
        return hashlib.sha256(made_of + self[0].image.tobytes()).hexdigest()[:8]

    def __getitem__(self, index: int) -> Scene:
        if not 0 <= index < len(self):
            raise IndexError(f"scene {index} does not exist: the {self.split} split holds 0 to {len(self) - 1}")
        # "focused" draws as "test" does, so that each of its scenes has a twin there.
        split_id = list(SPLITS).index("test" if self.split == "focused" else self.split)
        # Each run of as many scenes as there are classes shows every class once, in an order of its own.
        turn, place_in_turn = divmod(index, len(self._choices))
        order = np.random.default_rng((self.seed, split_id, turn)).permutation(len(self._choices))
        rng = np.random.default_rng((self.seed, split_id, turn, place_in_turn))
        choices = self._choices[order[place_in_turn]]
        cutout = choices[rng.integers(len(choices))]
        background = self._backgrounds[rng.integers(len(self._backgrounds))]
        if self.split.startswith("plain"):
            # A sharp square out of the photograph at a random scale, without an object.
            flip, crop, across, down = rng.random() < 0.5, rng.uniform(0.25, 1.0), rng.random(), rng.random()
            image = _relight(_square(background, self.size, flip, crop, across, down), *_light(rng))
            empty = np.zeros((self.size, self.size), np.float32)
            return Scene(image, empty, -1, "", background.place, True, background.file)
        image, matte = compose(cutout, background, self.size, rng, self.split == "focused")
        return Scene(image, matte, cutout.label, cutout.noun, background.place, not cutout.held_out, cutout.noun)


def compose(
    cutout: Cutout, background: Background, size: int, rng: np.random.Generator, focused: bool = False
) -> tuple[Image.Image, np.ndarray]:
    """Place a cut-out on a crop of a background with random shape, place, sharpness, light and colour.

    Object and background are blurred independently of each other, so that sharpness does not tell which is which; if
    `focused` the background alone, as by a lens with the object in focus.

    Returns:
        The RGB picture (size x size) and the matte, (size, size) float32 in [0, 1].
    """
    # All random numbers are drawn first, so that the same scene exists at every size.
    flip_back, flip_front = rng.random(2) < 0.5
    crop, across, down = rng.uniform(0.55, 1.0), rng.random(), rng.random()
    blur_back, blur_front = rng.random(2)
    side, angle = rng.uniform(0.55, 0.9), np.deg2rad(rng.uniform(-15, 15))
    shear, tilt = rng.uniform(-0.15, 0.15, 2), rng.uniform(-0.15, 0.15, 2)
    x, y = rng.random(2)
    light, front_light = _light(rng), rng.uniform(0.85, 1.15)
    blur_front = 0.0 if focused else BLUR_FRONT * blur_front
    blur_back = BLUR_BACK * (blur_back if focused else max(0.0, blur_back - 0.5))

    canvas = _square(background, size, flip_back, crop, across, down)
    canvas = canvas.filter(ImageFilter.GaussianBlur(float(blur_back * size)))

    # Premultiplied alpha while resampling: no dark or light seam around the object.
    stamp = _open(cutout.file)
    if flip_front:
        stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # A projective map of the plane on which the stamp lies, the longer of its sides from -1 to 1.
    half = np.array(stamp.size) / max(stamp.size)
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, sin], [-sin, cos]]) @ np.array([[1, shear[0]], [shear[1], 1]])
    warp = np.block([[turn, np.zeros((2, 1))], [tilt, 1]])
    corners = warp @ np.array([[-half[0], half[0], half[0], -half[0]], [-half[1], -half[1], half[1], half[1]], [1] * 4])
    low, high = (corners[:2] / corners[2]).min(1), (corners[:2] / corners[2]).max(1)
    scale = min(side / 2, 0.999 / (high - low).max()) * size  # pixels of the picture for a unit of the plane
    stamp = stamp.resize([max(1, round(2 * h * scale)) for h in half], Image.Resampling.BICUBIC)
    corner = np.array([x, y]) * (size - (high - low) * scale)  # of the object's box in the picture
    to_plane = np.block([[np.eye(2) / scale, (low - corner / scale)[:, None]], [0, 0, 1]])
    shift = np.array([[1, 0, 2], [0, 1, 2], [0, 0, 1]])  # two empty pixels around, so that no edge is cut off
    from_plane = np.diag([stamp.width / 2, stamp.height / 2, 1]) @ [[1 / half[0], 0, 1], [0, 1 / half[1], 1], [0, 0, 1]]
    back = shift @ from_plane @ np.linalg.inv(warp) @ to_plane  # from the picture's pixels to the stamp's
    padded = Image.new("RGBa", (stamp.width + 4, stamp.height + 4))
    padded.paste(stamp, (2, 2))
    numbers, kind = (back / back[2, 2]).ravel()[:8].tolist(), Image.Transform.PERSPECTIVE
    layer = padded.transform((size, size), kind, numbers, Image.Resampling.BICUBIC)
    layer = layer.filter(ImageFilter.GaussianBlur(float(blur_front * size)))

    front = np.asarray(layer, dtype=np.float32) / 255
    matte = front[..., 3]
    colour = np.minimum(front[..., :3], matte[..., None])  # bicubic weights overshoot: no colour where no object is
    pixels = colour * front_light + np.asarray(canvas, dtype=np.float32) / 255 * (1 - matte[..., None])
    image = Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))
    return _relight(image, *light), np.ascontiguousarray(matte)


def _light(rng: np.random.Generator) -> tuple[float, float, float]:
    """Factors of brightness, contrast and saturation."""
    return rng.uniform(0.8, 1.2), rng.uniform(0.85, 1.15), rng.uniform(0.8, 1.2)


def _relight(image: Image.Image, light: float, contrast: float, saturation: float) -> Image.Image:
    image = ImageEnhance.Brightness(image).enhance(light)
    image = ImageEnhance.Contrast(image).enhance(contrast)
    return ImageEnhance.Color(image).enhance(saturation)


def _square(background: Background, size: int, flip: bool, crop: float, across: float, down: float) -> Image.Image:
    """A square of `crop` times the shorter side, at a place given in [0, 1], scaled to size x size."""
    photo = _open(background.file)
    edge = round(crop * min(photo.size))
    left, top = round(across * (photo.width - edge)), round(down * (photo.height - edge))
    box = (left, top, left + edge, top + edge)
    canvas = photo.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3)
    return canvas.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else canvas


@functools.cache
def _open(file: str) -> Image.Image:
    """A picture of the catalogue: cut-outs with premultiplied alpha ("RGBa"), backgrounds as RGB."""
    image = Image.open(FOLDER / file)
    return image.convert("RGBA").convert("RGBa") if file.startswith("cutouts") else image.convert("RGB")
