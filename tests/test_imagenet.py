"""ImageNet: three sources, the order of the classes, what is refused, squares, and scenes."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from slimlib.data import imagenet
from slimlib.data.imagenet import (
    CLASS_NAMES,
    TUNE,
    WNIDS,
    AsPublished,
    ImageNetScenes,
    Pictures,
    open_scenes,
    prepare,
    subset,
)
from slimlib.data.scenes import PocketScenes
from slimlib.images import to_tensor
from slimlib.machines import Machine, load_machine
from slimlib.roi import gradcam
from slimlib.scales import Scale

LABELS = (5, 1, 3)
"""Of the pictures, in turn: of the first six classes, which the tiny machines have logits for."""


def picture(i: int, width: int = 96, height: int = 72) -> Image.Image:
    """Smooth noise with a bar on its left edge that tells its number apart."""
    rng = np.random.default_rng(i)
    image = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((width, height))
    image.paste((10 * i, 255 - 10 * i, 0), (0, 0, 12, height))
    return image


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures in ImageNet's layout; one is a grey JPEG, one a PNG, one CMYK, as some of ImageNet's are."""
    root = tmp_path_factory.mktemp("imagenet") / "val"
    for i in range(12):
        path = root / WNIDS[LABELS[i % 3]] / f"ILSVRC2012_val_{i:08d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        image, kind = picture(i, 90 + i, 80 - i), "PNG" if i == 4 else "JPEG"
        image.convert({7: "L", 8: "CMYK"}.get(i, "RGB")).save(path, kind)
    for stranger in (".DS_Store", "._x.JPEG", f"{WNIDS[1]}/._y.JPEG", f"{WNIDS[1]}/README.txt"):
        (root / stranger).write_text("no picture")
    for stranger in ("lost+found", "@eaDir", ".git"):
        (root / stranger).mkdir()
    return root


def write_shard(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as shard:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def shards(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same pictures in two shards, as timm/imagenet-1k-wds lays them out."""
    root, samples = tmp_path_factory.mktemp("shards"), Pictures.from_folder(folder).samples
    for number, part in enumerate((samples[:7], samples[7:])):
        files = {}
        for sample in part:
            key = sample.key.replace("/", "_").removesuffix(".JPEG")
            about = json.dumps({"label": sample.label}).encode()
            files |= {f"{key}.cls": str(sample.label).encode(), f"{key}.jpg": sample.path.read_bytes()}
            files |= {f"{key}.json": about, f"._{key}.jpg": b"what a Mac adds"}
        write_shard(root / f"imagenet1k-validation-{number:02d}.tar", files)
    return str(root / "imagenet1k-validation-*.tar")


def contents(pictures: Pictures) -> list[tuple[int, bytes]]:
    return [(label, image.tobytes()) for image, label in pictures]


# ---- sources ----------------------------------------------------------------------------------------------------


def test_order_of_the_classes() -> None:
    assert len(WNIDS) == 1000 and WNIDS == sorted(WNIDS)
    assert (WNIDS[0], CLASS_NAMES[0]) == ("n01440764", "tench") and CLASS_NAMES[999] == "toilet tissue"
    assert CLASS_NAMES[207] == "golden retriever" and CLASS_NAMES[281] == "tabby"


def test_folder(folder: Path) -> None:
    pictures = Pictures.from_folder(folder)
    assert [label for _, label in pictures] == [1] * 4 + [3] * 4 + [5] * 4, "sorted by WordNet id"
    assert all(image.mode == "RGB" for image, _ in pictures)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["train/n01440764/a.JPEG"], "found train. Name the split's own folder"),
        (["val_1.JPEG"], "found none.*without class folders.*development kit"),
        (["n01440764/notes.txt"], "there are no pictures: expected files that end in .jpeg"),
    ],
)
def test_folders_that_are_laid_out_otherwise(files: list[str], said: str, tmp_path: Path) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(ValueError, match=said):
        Pictures.from_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="none"):
        Pictures.from_folder(tmp_path / "none")


def test_a_picture_in_the_folder_of_another_class_is_refused(tmp_path: Path) -> None:
    """As in shards: the WordNet id in its name says what it shows."""
    for name in ("n01440764/n01440764_18.JPEG", "n01443537/n01440764_19.JPEG"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"-")
    with pytest.raises(ValueError, match="n01443537/n01440764_19.JPEG is labelled 1, but n01440764 is class 0"):
        Pictures.from_folder(tmp_path)


STRANGE = ["._a.JPEG", ".a.JPEG.Xq1z", "@eaDir/a.JPEG", ".ipynb_checkpoints/a.JPEG", "__MACOSX/a.JPEG", "Thumbs.db"]
STRANGE += [
    ".DS_Store",
    "lost+found/a.JPEG",
    "#recycle/a.png",
    "$RECYCLE.BIN/a.png",
    ".0123456789.writing",
    "notes.txt",
]
OWN = ["_DSC 01.JPEG", "(1).jpg", "-x.Jpg", "Ümläut.jpeg", "#1.png", "[0].webp", "a.b.c.JPEG", "deeper/x.JPEG", "x.bmp"]
OWN += ["x.jxl", "x.HEIC"]


@pytest.mark.parametrize("group", ["n01440764", "n01440764_tench", "n01440764 tench, Tinca tinca"])
def test_what_counts_as_a_picture(group: str, tmp_path: Path) -> None:
    """What systems leave behind does not, nor our own temporary files; all that people name does."""
    for name in [f"{group}/{name}" for name in STRANGE + OWN] + STRANGE:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(1).save(tmp_path / name, "BMP" if name.endswith("bmp") else "JPEG")
    found = Pictures.from_folder(tmp_path)
    assert sorted(sample.key for sample in found.samples) == sorted(f"{group}/{name}" for name in OWN)
    assert {label for _, label in found} == {0}


def test_no_class_is_lost_behind_a_link(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders on other disks count, at any depth; one that is away, or closed, is named."""
    (tmp_path / "val").mkdir()
    for group in sorted(folder.glob("n*")):
        (tmp_path / "val" / group.name).symlink_to(group)
    (tmp_path / "val" / WNIDS[7]).mkdir()
    (tmp_path / "val" / WNIDS[7] / "more").symlink_to(folder / WNIDS[5])
    (tmp_path / "val" / WNIDS[7] / "up").symlink_to("..")  # what is there counts once
    (tmp_path / "val" / "latest").symlink_to("nowhere")
    assert [label for _, label in Pictures.from_folder(tmp_path / "val")] == [1] * 4 + [3] * 4 + [5] * 4 + [7] * 4
    for place in (WNIDS[2], f"{WNIDS[1]}/part"):
        (tmp_path / "val" / place).symlink_to("/mnt/away")
        with pytest.raises(FileNotFoundError, match=place):
            Pictures.from_folder(tmp_path / "val")
        (tmp_path / "val" / place).unlink()
    listing = Path.iterdir
    closed = lambda p: listing(p) if p.name != WNIDS[3] else (_ for _ in ()).throw(PermissionError(13, "no", str(p)))  # noqa: E731
    calls: list[Path] = []
    monkeypatch.setattr(Path, "iterdir", lambda path: calls.append(path) or listing(path))
    Pictures.from_folder(tmp_path / "val")
    assert len(calls) == len(set(calls)) == 1 + 4 + 1, "each folder is listed once: on a network's disk it takes long"
    monkeypatch.setattr(Path, "iterdir", closed)
    with pytest.raises(PermissionError, match=WNIDS[3]):
        Pictures.from_folder(tmp_path / "val")


def test_names_of_any_bytes(tmp_path: Path) -> None:
    """Latin-1, as older systems wrote it: names, a damaged one in the list, a folder of shards."""
    place = os.path.join(os.fsencode(tmp_path), b"sch\xf6n", WNIDS[3].encode())
    os.makedirs(place)
    for name in (b"1\xe4.JPEG", b"2\xe4.JPEG"):
        Path(os.fsdecode(os.path.join(place, name))).write_bytes(b"no picture")
    pictures = Pictures.from_folder(Path(os.fsdecode(place)).parent)
    with pytest.raises(ValueError, match="not all damaged"):
        pictures.readable(tmp_path / "work")
    picture(1).save(pictures.samples[0].path, "PNG")
    found, lost = pictures.readable(tmp_path / "again")
    assert lost == 1 and len(found) == 1 and len(found.fingerprint()) == 8
    assert r"2\udce4.JPEG" in next((tmp_path / "again").iterdir()).read_text()
    write_shard(Path(os.fsdecode(place)) / "a.tar", {"0.jpg": b"-", "0.cls": b"1"})
    assert len(Pictures.open(f"{os.fsdecode(place)}/*.tar", "validation", tmp_path / "kept")) == 1


def test_other_pictures_of_the_same_names(folder: Path, tmp_path: Path) -> None:
    """Made smaller, or noisier, as ImageNet-C is: no cache, result or list of damaged ones is taken for theirs."""
    shutil.copytree(folder, tmp_path / "val")
    one, other = Pictures.from_folder(folder), Pictures.from_folder(tmp_path / "val")
    assert one.fingerprint() == other.fingerprint() and other.readable(tmp_path)[1] == 0
    for sample in other.samples:
        picture(1, 20, 20).save(sample.path, "JPEG")
    assert one.fingerprint() != other.fingerprint()
    one.readable(tmp_path)
    assert len(list(tmp_path.glob("unreadable-*"))) == 2


def test_unreadable_pictures_are_left_out_by_a_list(folder: Path, tmp_path: Path) -> None:
    """Found once and written down; the rest keeps its order. What is no fault of the picture is not left out."""
    root = tmp_path / "val"
    shutil.copytree(folder, root)
    whole = Pictures.from_folder(root)
    bad = [2, 7, 11]
    whole.samples[2].path.write_bytes(b"")
    whole.samples[7].path.write_bytes(whole.samples[7].path.read_bytes()[:700])
    whole.samples[11].path.unlink()
    whole.samples[11].path.symlink_to("nowhere")
    found, lost = Pictures.from_folder(root).readable(tmp_path / "work")
    kept = [contents(Pictures.from_folder(folder))[i] for i in range(12) if i not in bad]
    assert lost == 3 and contents(found) == kept and found.fingerprint() != whole.fingerprint()
    (path,) = (tmp_path / "work").iterdir()
    lines = path.read_text().splitlines()
    assert [int(line.split()[0]) for line in lines] == bad
    assert all(whole.samples[i].path.name in line for i, line in zip(bad, lines, strict=True))
    for i in (0, *bad):
        whole.samples[i].path.unlink()
    assert Pictures(whole.samples).readable(tmp_path / "work")[1] == 3, "nothing is looked at twice"
    with pytest.raises(OSError, match="Too many"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(OSError(24, "Too many open files")))
        whole.reason(1)


@pytest.mark.parametrize("data", [b"\xff\xd8\xff and then nothing", b""])
def test_a_damaged_picture_is_named(data: bytes, tmp_path: Path) -> None:
    (tmp_path / WNIDS[3]).mkdir()
    (tmp_path / WNIDS[3] / "x.JPEG").write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.JPEG.*cannot be read"):
        Pictures.from_folder(tmp_path)[0]


def test_shards_hold_the_same(folder: Path, shards: str) -> None:
    assert contents(Pictures.from_folder(folder)) == contents(Pictures.from_shards(shards))
    with pytest.raises(FileNotFoundError, match="no shard"):
        Pictures.from_shards("/nowhere/*.tar")


def test_a_shard_is_indexed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "a.tar", {"0.jpg": b"-", "0.cls": b"1", "1.jpg": b"--", "1.cls": b"2"})
    write_shard(tmp_path / "b.tar", {"2.jpg": b"-", "2.cls": b"3"})
    first = Pictures.open(str(tmp_path / "*.tar"), "validation", tmp_path / "kept").samples
    opened, index = [], imagenet._index
    monkeypatch.setattr(imagenet, "_index", lambda path: opened.append(path.name) or index(path))
    assert Pictures.open(str(tmp_path / "*.tar"), "validation", tmp_path / "kept").samples == first and not opened
    write_shard(tmp_path / "b.tar", {"2.jpg": b"-", "2.cls": b"4", "3.jpg": b"-", "3.cls": b"4"})
    new = Pictures.open(str(tmp_path / "*.tar"), "validation", tmp_path / "kept").samples
    assert opened == ["b.tar"] and [sample.label for sample in new] == [1, 2, 4, 4]


@pytest.mark.parametrize(
    ("pattern", "there"),
    [
        ("a-{000..002}.tar", ["a-000.tar", "a-001.tar", "a-002.tar"]),
        ("{a,b c}-{8..10}.tar", ["a-8.tar", "a-9.tar", "a-10.tar", "b c-8.tar", "b c-9.tar", "b c-10.tar"]),
        ("a-{00..01}-*.tar", ["a-00-x.tar", "a-00-y.tar", "a-01-z.tar"]),
        ("[1] {0..1} ü.tar", ["[1] {0..1} ü.tar"]),
        ("*.tar", ["a.tar", "_b.tar", "ü c.tar"]),
        ("a.TAR", ["a.TAR"]),
    ],
)
def test_names_and_patterns_of_shards(pattern: str, there: list[str], tmp_path: Path) -> None:
    root = tmp_path / "data [x]" / "validation"
    root.mkdir(parents=True)
    for i, name in enumerate(there):
        strange = {f"{folder}/{i}.jpg": b"what systems add" for folder in ("@eaDir", "__MACOSX", ".x")}
        write_shard(root / name, {f"{i}.jpg": b"-", f"{i}.cls": b"1", **strange})
    for name in ("._a.tar", "._a-000.tar", ".a-00-x.tar"):
        (root / name).write_bytes(b"what a Mac adds")
    found = Pictures.from_shards(root / pattern)
    assert sorted(sample.path.name for sample in found.samples) == sorted(there)
    if "{" in pattern and len(there) > 1:
        found.samples[-1].path.unlink()
        wanted = found.samples[-1].path.name
        with pytest.raises(FileNotFoundError) if "*" not in pattern else pytest.raises(FileNotFoundError, match="a-01"):
            Pictures.open(str(root / pattern), "validation", "")
        assert wanted in there


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda d: d.rstrip(b"\0") + b"\0" * (-len(d.rstrip(b"\0")) % 512),
            "is cut",
        ),  # behind its last member, exactly
        (lambda d: d[:2048], "is cut"),
        (lambda d: d + d, "goes on as another archive"),
        (lambda d: gzip.compress(d), "damaged, or no shard"),
        (lambda d: b"", "damaged, or no shard"),
        (lambda d: bytes(10240), "no pictures"),
    ],
)
def test_no_picture_is_lost_in_silence(damage: Any, said: str, tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", {"0.jpg": b"-", "0.cls": b"1", "1.jpg": b"-", "1.cls": b"1"})
    (tmp_path / "a.tar").write_bytes(damage((tmp_path / "a.tar").read_bytes()))
    with pytest.raises(ValueError, match=rf"a\.tar .*{said}"):
        Pictures.open(str(tmp_path / "a.tar"), "validation", "")


@pytest.mark.parametrize("data", [b"", b'[["0", 1, 512', b"{}]", b"7"])
def test_a_damaged_index_or_list_is_named(data: bytes, folder: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", {"0.jpg": b"-", "0.cls": b"1"})
    Pictures.from_shards(tmp_path / "a.tar", tmp_path / "kept")
    (index,) = (tmp_path / "kept").glob("index-*.json")
    index.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{index.name} .*a shard's index \(delete it\)"):
        Pictures.from_shards(tmp_path / "a.tar", tmp_path / "kept")
    index.unlink()
    assert len(Pictures.from_shards(tmp_path / "a.tar", tmp_path / "kept")) == 1
    pictures = Pictures.from_folder(folder)
    pictures.readable(tmp_path / "work")
    (listed,) = (tmp_path / "work").iterdir()
    listed.write_bytes(data + b"\nx")
    with pytest.raises(ValueError, match=rf"{listed.name} does not hold a list of damaged pictures \(delete it"):
        pictures.readable(tmp_path / "work")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_in_a_shard_are_refused(kind: bytes, tmp_path: Path) -> None:
    """A picture and its label that are both links would be missed by nobody."""
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for name in ("0.jpg", "0.cls", "1.jpg", "1.cls"):
            member = tarfile.TarInfo(name)
            member.size, member.type = (1, tarfile.REGTYPE) if name[0] == "0" else (0, kind)
            member.linkname = f"0{name[1:]}" * (name[0] == "1")
            shard.addfile(member, io.BytesIO(b"1"))
    with pytest.raises(ValueError, match=r"1\.jpg twice, or as a link"):
        Pictures.from_shards(tmp_path / "a.tar")


def test_a_key_that_comes_twice_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for name in ("0.jpg", "0.cls", "0.jpg"):
            member = tarfile.TarInfo(name)
            member.size = 1
            shard.addfile(member, io.BytesIO(b"1"))
    with pytest.raises(ValueError, match=r"0\.jpg twice"):
        Pictures.from_shards(tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"0.jpg": b"-", "0.cls": b"1", "1.raw": b"-", "1.cls": b"1"}, r"1 labels without a picture, such as 1\.cls"),
        ({"0.json": b"-"}, "holds no pictures"),
        ({"0.jpg": b"-", "0.cls": b"-1"}, "-1 hides the labels of a test split"),
        ({"n01440764_18.jpg": b"-", "n01440764_18.cls": b"448"}, "labelled 448, but n01440764 is class 0"),
        ({"a/1.jpg": b"-", "b/1.cls": b"7"}, "a/1 has no label from 0 to 999"),
        ({"1.jpg": b"-", "1.cls": b"1000"}, "1 has no label from 0 to 999"),
        ({"1.jpg": b"-", "1.cls": b"-1"}, "1 has no label from 0 to 999"),
        ({"1.jpg": b"-", "1.cls": b"tench"}, r"a\.tar is damaged, or no shard.*tench"),
    ],
)
def test_shards_with_other_labels_are_refused(files: dict[str, bytes], said: str, tmp_path: Path) -> None:
    """The first as the development kit counts."""
    write_shard(tmp_path / "a.tar", files)
    with pytest.raises(ValueError, match=said):
        Pictures.from_shards(tmp_path / "*.tar")


@pytest.mark.parametrize("at", [0, 1024, 3000])
def test_damaged_shards_are_named(at: int, tmp_path: Path) -> None:
    """A header in the beginning or the middle that is none, and a file that was cut; tarfile would end silently."""
    files = {f"{i}.{ending}": data for i in range(2) for ending, data in (("jpg", b"-" * 500), ("cls", b"1"))}
    write_shard(tmp_path / "a.tar", files)
    data = bytearray((tmp_path / "a.tar").read_bytes())
    (tmp_path / "a.tar").write_bytes(data[:at] if at == 3000 else data[:at] + b"x" * 512 + data[at + 512 :])
    with pytest.raises(ValueError, match=r"a\.tar is damaged"):
        Pictures.from_shards(tmp_path / "*.tar")


@pytest.mark.parametrize("kind", ["imagefolder", "shards"])
def test_streaming(folder: Path, shards: str, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """datasets reads local folders as it reads the hub's; a subset is fetched once, and by a second call not at all."""
    datasets = pytest.importorskip("datasets")
    here, data = Pictures.from_folder(folder), tmp_path / "data" / "validation"
    files = [s.path for s in here.samples] if kind == "imagefolder" else sorted(Path(shards).parent.glob("*.tar"))
    for path in files:
        target = data / (f"{path.parent.name}/{path.name}" if kind == "imagefolder" else path.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    monkeypatch.setattr(imagenet, "TOTAL", {"validation": 12})
    name = str(tmp_path / "data")
    whole = Pictures.from_hub(name, "validation", tmp_path / "kept")
    assert sorted(contents(whole)) == sorted(contents(here))
    Pictures.from_hub(f"{tmp_path}//data", "validation", tmp_path / "kept")
    assert len([*(tmp_path / "kept").iterdir()]) == 2, "what has another name may be another data set"
    some = Pictures.from_hub(name, "validation", tmp_path / "some", 5, seed=3)
    assert contents(some) == [contents(whole)[i] for i in subset(12, 5, 3)]
    assert some.fingerprint() != whole.fingerprint()
    more = Pictures.from_hub(name, "validation", tmp_path / "some", 7, seed=3)
    assert contents(more)[:5] == contents(some) and more.fingerprint() == some.fingerprint()
    monkeypatch.setattr(datasets.IterableDataset, "skip", None)
    assert contents(Pictures.open(f"hub:{name}", "validation", tmp_path / "some", 5, 3)) == contents(some)
    monkeypatch.undo()
    monkeypatch.setattr(imagenet, "TOTAL", {"validation": 12})
    for name_of, number in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name_of, number)  # another process waits, until the first one has fetched
    fetch = lambda seconds: shutil.copytree(tmp_path / "some", tmp_path / "shared")  # noqa: E731
    monkeypatch.setattr(imagenet.time, "sleep", fetch)
    assert contents(Pictures.from_hub(name, "validation", tmp_path / "shared", 7, seed=3)) == contents(more)
    slept: list[float] = []

    def wait(seconds: float) -> None:  # the first process fetches one, and is gone
        slept.append(seconds)
        if len(slept) == 30:
            file = next((tmp_path / "some").glob("*/*.img"))
            (tmp_path / "gone" / file.parent.name).mkdir(parents=True)
            shutil.copy(file, tmp_path / "gone" / file.parent.name)

    monkeypatch.setattr(imagenet.time, "sleep", wait)
    with pytest.raises(TimeoutError, match="nothing new in .*gone.* for ten minutes"):
        Pictures.from_hub(name, "validation", tmp_path / "gone", 7, seed=3)
    assert sum(slept) == 300 + 600
    monkeypatch.undo()
    monkeypatch.setattr(imagenet, "TOTAL", {"validation": 13})
    with pytest.raises(ValueError, match="fewer pictures than the 13"):
        Pictures.from_hub(name, "validation", tmp_path / "kept")


def test_streaming_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"slimlib\[imagenet\]"):
        Pictures.from_hub("ILSVRC/imagenet-1k", "validation", tmp_path, 3)


def test_streaming_refuses_what_has_no_label(tmp_path: Path) -> None:
    """A test split's label is -1, which Python would take for the last class."""
    pytest.importorskip("datasets")
    write_shard(tmp_path / "validation-0.tar", {"0.jpg": b"-", "0.cls": b"-1"})
    with pytest.raises(ValueError, match="no label from 0 to 999"):
        Pictures.from_hub(str(tmp_path), "validation", tmp_path / "kept")


def test_label_orders_of_data_sets() -> None:
    assert imagenet._label_order(["n01443537", "n01440764"], "x") == {0: 1, 1: 0}
    as_published = [f"{name}, and a synonym" for name in CLASS_NAMES]
    assert imagenet._label_order(as_published, "x") == imagenet._label_order(None, "x") == {i: i for i in range(1000)}
    for other in (as_published[::-1], ["cat", "dog"]):
        with pytest.raises(ValueError, match="1,000"):
            imagenet._label_order(other, "x")


# ---- subsets, squares, machines -----------------------------------------------------------------------------------


def test_subsets_grow_and_do_not_repeat(folder: Path) -> None:
    assert subset(50_000, 1000, 1)[:500] == subset(50_000, 500, 1) != subset(50_000, 500, 2)
    assert len(set(subset(50, 50))) == 50 and subset(50, None) == list(range(50))
    for n in (0, 51):
        with pytest.raises(ValueError, match=f"{n} pictures of 50"):
            subset(50, n)
    prints = {n: Pictures.open(str(folder), "validation", "", n).fingerprint() for n in (4, 8, None)}
    assert prints[4] == prints[8] != prints[None]
    assert prints[4] != Pictures.open(str(folder), "validation", "", 4, seed=1).fingerprint()


def test_as_many_pictures_of_each_class() -> None:
    labels = np.repeat(range(10), [5, 15] * 5).tolist()
    drawn = [np.array(subset(100, n, 3, labels=labels)) for n in (30, 50, 100)]
    assert all((drawn[2][: len(some)] == some).all() for some in drawn) and sorted(drawn[2]) == list(range(100))
    assert np.bincount(np.array(labels)[drawn[0]]).tolist() == [3] * 10
    assert np.bincount(np.array(labels)[drawn[1]]).tolist() == [5] * 10
    assert drawn[0].tolist() != subset(100, 30, 4, labels=labels)


def test_training_pictures_to_choose_by_are_never_trained_on() -> None:
    for total, held in ((50, 5), (300_000, TUNE)):
        train, tune = subset(total, None, split="train"), subset(total, None, split="tune")
        assert len(tune) == held and sorted(train + tune) == list(range(total))
        assert train == sorted(train) and {*subset(total, held, 7, "tune")} == {*tune} and tune != list(range(held))
        assert not {*subset(total, 20, 3, "train")} & {*tune}
        assert subset(total, 20, 3, "train")[:9] == subset(total, 9, 3, "train")
    with pytest.raises(ValueError, match="1 to 5"):
        subset(50, 6, split="tune")
    with pytest.raises(ValueError, match="0 pictures of 0 in tune, of 9"):
        subset(9, None, split="tune")


def test_protocols() -> None:
    image = Image.new("RGB", (300, 200), "black")
    image.paste("white", (50, 0, 250, 200))  # the central square
    crop, squash, full = (np.asarray(prepare(image, protocol, 256)) for protocol in imagenet.PROTOCOLS)
    assert (full == crop).all()
    assert crop.shape == squash.shape == (256, 256, 3)
    assert crop[:, 2:-2].min() == 255, "nothing but the centre; its edge is resampled with what is beyond"
    assert squash[0, 0, 0] == 0 and squash[128, 128, 0] == 255 and abs(int((squash[128, :, 0] > 127).sum()) - 171) <= 1
    with pytest.raises(ValueError, match="unknown protocol"):
        prepare(image, "stretch", 256)


@pytest.fixture
def machine(tiny_world: Path) -> Machine:
    return load_machine(str(tiny_world / "machine_a"), "cpu")


@pytest.mark.parametrize(("crop_pct", "interpolation"), [(0.875, "bilinear"), (0.95, "bicubic")])
def test_machines_look_as_their_makers_did(machine: Machine, crop_pct: float, interpolation: str) -> None:
    """Against timm's own transform, which works on bytes: 73 or 67 px, then the centre."""
    machine.net.pretrained_cfg |= {"crop_pct": crop_pct, "interpolation": interpolation}
    image, seen = picture(3, 96, 96), []
    machine.register_forward_hook(lambda _module, inputs, _logits: seen.append(inputs[0]))
    theirs = timm.data.create_transform(**timm.data.resolve_data_config(machine.net.pretrained_cfg))
    expected, x = machine.net(theirs(image)[None]), to_tensor(image)
    found, plain = AsPublished(machine)(x), machine(x)
    assert (expected - found).abs().max() < 0.2 * (expected - plain).abs().max()
    AsPublished(machine)((torch.rand(1, 3, 100, 100) > 0.5).float())
    assert seen[-1].shape[-1] == 64 and 0 <= seen[-1].min() and seen[-1].max() <= 1, "as bytes, it does not overshoot"
    full = AsPublished(machine, full=True)
    assert torch.equal(full(x), machine.net((x - machine.mean) / machine.std)) and len(full.top5(x)) == 5


# ---- scenes ---------------------------------------------------------------------------------------------------------


def test_pictures_as_scenes(tiny_world: Path, folder: Path, shards: str, tmp_path: Path, machine: Machine) -> None:
    world = Scale("tiny", 64, "", "", str(tiny_world / "machine_a"), "", "")
    (tmp_path / "val").symlink_to(folder)
    found = open_scenes(world, "test", 4, str(tmp_path))
    assert len(found) == 4
    for i, (image, label) in enumerate(Pictures.open(str(folder), "validation", "", 4)):
        scene, square = found[i], prepare(image, "crop", 64)
        assert (scene.label, scene.noun, scene.place) == (label, CLASS_NAMES[label], "")
        assert scene.image.tobytes() == square.tobytes()
        np.testing.assert_array_equal(scene.matte, gradcam(machine, to_tensor(square), label)[0, 0])
    assert (ImageNetScenes(found.pictures, "crop", 64)[0].matte == 1).all(), "nobody has looked"  # type: ignore[attr-defined]
    squashed = open_scenes(world, "test", 4, str(tmp_path), "squash", seed=1, machine=machine)
    pictures = Pictures.open(str(folder), "validation", "", 4, seed=1)
    assert squashed[0].image.tobytes() == prepare(pictures[0][0], "squash", 64).tobytes()
    with pytest.raises(ValueError, match="Name the split's own folder"):
        open_scenes(world, "train", 4, str(tmp_path))
    pattern = shards.replace("validation", "{split}")
    assert len(open_scenes(world, "test", None, pattern)) == 12
    with pytest.raises(FileNotFoundError, match="train"):
        open_scenes(world, "train", 4, pattern)


def test_scenes_of_the_pocket_world() -> None:
    pocket = replace(Scale.from_name("pocket"), size=64)
    for word in ("", "pocket"):
        scenes = open_scenes(pocket, "test", 4, word)
        assert isinstance(scenes, PocketScenes) and (scenes.split, scenes.size) == ("test", 64)
    assert open_scenes(pocket, "tune", 4).split == "val"  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="name ImageNet in `data`"):
        open_scenes(replace(pocket, machine_a="resnet50.tv_in1k"), "test", 4)
