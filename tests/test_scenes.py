"""PocketScenes: a pure function of its arguments, honest splits, clear errors, and pictures that match their table."""

from __future__ import annotations

import csv
import hashlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from slimlib.data.scenes import BACKGROUNDS, CLASSES, CUTOUTS, FOLDER, SPLITS, PocketScenes, Scene

DIGEST = (
    "import hashlib; from slimlib.data.scenes import PocketScenes; s = PocketScenes('test', 96, 3)[17]; "
    "print(hashlib.sha256(s.image.tobytes() + s.matte.tobytes()).hexdigest())"
)


def test_the_catalogue_is_as_large_as_promised_and_each_noun_ends_in_its_class():
    assert len(CUTOUTS) >= 150 and len(CLASSES) >= 100 and len(BACKGROUNDS) >= 36
    assert all(c.noun.endswith(CLASSES[c.label]) for c in CUTOUTS)


def test_the_same_scene_in_another_process():
    scene = PocketScenes("test", 96, 3)[17]
    here = hashlib.sha256(scene.image.tobytes() + scene.matte.tobytes()).hexdigest()
    there = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here


def test_another_seed_split_or_index_is_another_scene():
    pixels = {PocketScenes(split, 64, seed)[i].image.tobytes() for split in SPLITS for seed in (0, 1) for i in (0, 1)}
    assert len(pixels) == 4 * len(SPLITS) == 28


def test_the_same_scene_at_two_sizes_looks_alike():
    small, large = PocketScenes("test", 64)[5], PocketScenes("test", 128)[5]
    assert small.caption == large.caption
    shrunk = np.asarray(large.image.resize((64, 64), 3), dtype=float)
    assert np.abs(np.asarray(small.image, dtype=float) - shrunk).mean() < 12


def test_matte_is_the_object():
    areas = []
    for scene in PocketScenes("test", n=62):
        assert scene.matte.dtype == np.float32 and scene.matte.shape == (128, 128)
        assert 0 <= scene.matte.min() and scene.matte.max() <= 1
        areas.append(scene.matte.mean())
    assert 0.02 < min(areas) and 0.1 < np.mean(areas) < 0.5 and max(areas) < 0.85


def test_every_class_comes_equally_often():
    for split, known in (("test", range(len(CLASSES))), ("unseen", {c.label for c in CUTOUTS if c.held_out})):
        labels = [scene.label for scene in PocketScenes(split, 32, n=2 * len(known))]
        assert sorted(labels) == sorted([*known] * 2)


def test_test_scenes_stand_on_unseen_photographs():
    with (FOLDER / "catalogue.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "background"]
    used = {split: {row["source"] for row in rows if row["split"] == split} for split in SPLITS}
    assert not used["train"] & used["test"] and not used["train"] & used["val"] and not used["val"] & used["test"]


def test_held_out_cutouts_never_occur_in_training():
    held_out = {c.noun for c in CUTOUTS if c.held_out}
    for split in ("train", "val", "test", "focused", "unseen"):
        scenes = list(PocketScenes(split, 32, n=300))
        assert {s.seen for s in scenes} == {s.noun not in held_out for s in scenes} == {split != "unseen"}, split
        assert all(s.cutout == s.noun and s.noun.endswith(CLASSES[s.label]) for s in scenes)


def test_which_photographs_each_split_stands_on():
    photographs = {s: {b.place for b in BACKGROUNDS if b.split == s} for s in ("train", "val", "test")}
    for split in SPLITS:
        of = {"plain": "train", "plain-val": "val", "unseen": "test", "focused": "test"}.get(split, split)
        assert {scene.place for scene in PocketScenes(split, 32, n=200)} <= photographs[of]


def test_focused_scenes_are_test_scenes_with_sharp_objects():
    def sharpness(scene):  # of the object, of the background
        edges = np.abs(np.diff(np.asarray(scene.image.convert("L"), float), axis=1))
        return np.array([edges[part[:, 1:] & part[:, :-1]].sum() for part in (scene.matte > 0.9, scene.matte < 0.1)])

    pairs = [(PocketScenes("test")[i], PocketScenes("focused")[i]) for i in range(20)]
    assert all((one.label, one.caption, one.cutout) == (two.label, two.caption, two.cutout) for one, two in pairs)
    assert max(np.abs(one.matte - two.matte).mean() for one, two in pairs) < 0.05
    (front, back), (focused, behind) = (sum(sharpness(scene) for scene in of) for of in zip(*pairs, strict=True))
    assert focused > 1.1 * front and behind < 0.9 * back


def test_plain_scenes_show_no_object():
    for split in ("plain", "plain-val"):
        for scene in PocketScenes(split, 64, n=5):
            assert (scene.label, scene.noun) == (-1, "") and scene.image.size == (64, 64)
            assert not scene.matte.any() and not scene.box.any()


@pytest.mark.parametrize("wrong", [("dev",), ("train", 8), ("train", 4096), ("val", 64, 0, 0), ("val", 64, 0, 1241)])
def test_what_does_not_exist_is_an_error(wrong):
    with pytest.raises(ValueError, match="expected"):
        PocketScenes(*wrong)


def test_a_fingerprint_changes_with_the_scenes_but_not_with_their_number():
    worlds = [("val", 64), ("test", 64), ("val", 32), ("val", 64, 1), ("val", 64, 0, 5)]
    prints = [PocketScenes(*world).fingerprint() for world in worlds]
    assert len(set(prints)) == 4 and prints[0] == prints[4] and len(PocketScenes("val", 64, 0, 5)) == 5


@pytest.mark.parametrize("index", [-1, SPLITS["test"]])
def test_an_index_beyond_the_end(index):
    with pytest.raises(IndexError, match="0 to 2479"):
        PocketScenes("test", 32)[index]


def test_pictures_are_those_of_the_table():
    sums = dict(line.split("  ")[::-1] for line in (FOLDER / "SHA256SUMS").read_text().splitlines())
    files = [c.file for c in CUTOUTS] + [b.file for b in BACKGROUNDS]
    assert {name for name in sums if not name.startswith("package/")} == set(files)
    for file in files:
        assert hashlib.sha256((FOLDER / file).read_bytes()).hexdigest() == sums[file], file
    text = (FOLDER / "CREDITS.md").read_text()
    assert all(file in text for file in files)


def test_a_mask_is_the_share_of_each_cell():
    matte = np.zeros((4, 4), np.float32)
    matte[0, :2], matte[3, 3] = 1, 0.5
    scene = Scene(Image.new("RGB", (4, 4)), matte, 0, "a red fox", "in a forest", True)
    assert scene.mask(2, 1).tolist() == [[0.25], [0.0625]] and scene.mask(1, 2).tolist() == [[0.25, 0.0625]]
    assert scene.caption == "a red fox in a forest"
    assert scene.box.tolist() == [0, 0, 0.5, 0.25] and scene.box.dtype == np.float32, "where the matte is above a half"
