"""ImageNet: three sources, the order of the classes, two protocols, and an evaluation that survives kill -9."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from slimlib import imagenet, paper
from slimlib.codec import SlimCodec
from slimlib.imagenet import AsPublished, Pictures, class_names, prepare, subset, wnids
from slimlib.machines import load_machine, to_tensor
from slimlib.scales import Scale
from slimlib.scenes import PocketScenes

LABELS = (999, 1, 500)


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
        path = root / wnids()[LABELS[i % 3]] / f"ILSVRC2012_val_{i:08d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        image, kind = picture(i, 90 + i, 80 - i), "PNG" if i == 4 else "JPEG"
        (image.convert({7: "L", 8: "CMYK"}.get(i, "RGB"))).save(path, kind)
    (root / wnids()[1] / "README.txt").write_text("no picture")
    return root


@pytest.fixture(scope="module")
def shards(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same pictures in two shards, as timm/imagenet-1k-wds lays them out."""
    root = tmp_path_factory.mktemp("shards")
    samples = Pictures.from_folder(folder).samples
    for number, part in enumerate((samples[:7], samples[7:])):
        with tarfile.open(root / f"imagenet1k-validation-{number:02d}.tar", "w") as shard:
            for sample in part:
                fields = {
                    "cls": str(sample.label).encode(),
                    "jpg": sample.path.read_bytes(),
                    "json": json.dumps({"label": sample.label}).encode(),
                }
                for ending, data in fields.items():
                    member = tarfile.TarInfo(f"{sample.key.replace('/', '_').removesuffix('.JPEG')}.{ending}")
                    member.size = len(data)
                    shard.addfile(member, io.BytesIO(data))
    return str(root / "imagenet1k-validation-*.tar")


# ---- sources ----------------------------------------------------------------------------------------------------


def test_order_of_the_classes() -> None:
    assert len(wnids()) == 1000 and list(wnids()) == sorted(wnids())
    assert (wnids()[0], class_names()[0]) == ("n01440764", "tench") and class_names()[999] == "toilet tissue"
    assert class_names()[207] == "golden retriever" and class_names()[281] == "tabby"


def test_folder(folder: Path) -> None:
    pictures = Pictures.from_folder(folder)
    assert len(pictures) == 12
    assert [label for _, label in pictures] == [1] * 4 + [500] * 4 + [999] * 4, "sorted by WordNet id"
    assert all(image.mode == "RGB" for image, _ in pictures)


def test_folders_that_are_laid_out_otherwise(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        Pictures.from_folder(tmp_path / "none")
    with pytest.raises(ValueError, match="Name the split's own folder"):
        Pictures.from_folder(folder.parent)
    with pytest.raises(ValueError, match="nothing"):
        Pictures.from_folder(tmp_path)
    (tmp_path / "ILSVRC2012_val_00000001.JPEG").write_bytes(b"")
    with pytest.raises(ValueError, match="development kit"):
        Pictures.from_folder(tmp_path)
    (tmp_path / "bad").mkdir()
    broken = tmp_path / "bad" / wnids()[3] / "x.JPEG"
    broken.parent.mkdir()
    broken.write_bytes(b"\xff\xd8\xff and then nothing")
    with pytest.raises(ValueError, match=r"x\.JPEG.*cannot be read"):
        Pictures.from_folder(tmp_path / "bad")[0]


def same(one: Pictures, other: Pictures) -> bool:
    """The same pictures and labels, in whatever order."""

    def content(pictures: Pictures) -> list:
        return sorted((label, image.size, image.tobytes()) for image, label in pictures)

    return content(one) == content(other)


def test_shards_hold_the_same(folder: Path, shards: str) -> None:
    one, other = Pictures.from_folder(folder), Pictures.from_shards(shards)
    assert [(i.tobytes(), label) for i, label in one] == [(i.tobytes(), label) for i, label in other]
    with pytest.raises(FileNotFoundError, match="no shard"):
        Pictures.from_shards("/nowhere/*.tar")


def test_shards_with_labels_of_another_order_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for name, data in (("n01440764_18.jpg", b"-"), ("n01440764_18.cls", b"448")):  # the development kit's idea
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
    with pytest.raises(ValueError, match="n01440764 is class 0"):
        Pictures.from_shards(tmp_path / "*.tar")


def test_webdataset_reads_the_same_from_the_shards(shards: str) -> None:
    webdataset = pytest.importorskip("webdataset")
    theirs = webdataset.WebDataset(sorted(map(str, Path(shards).parent.glob("*.tar"))), shardshuffle=False).decode(
        "pil"
    )
    ours = Pictures.from_shards(shards)
    for sample, (image, label) in zip(theirs, ours, strict=True):
        assert sample["cls"] == label and sample["jpg"].convert("RGB").tobytes() == image.tobytes()


@pytest.mark.parametrize("kind", ["imagefolder", "shards"])
def test_streaming(folder: Path, shards: str, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """datasets reads local folders as it reads the hub's; a subset is fetched once, and by a second call not at all."""
    datasets = pytest.importorskip("datasets")
    data = tmp_path / "data" / "validation"
    if kind == "imagefolder":
        for sample in Pictures.from_folder(folder).samples:
            (data / sample.path.parent.name).mkdir(parents=True, exist_ok=True)
            (data / sample.path.parent.name / sample.path.name).write_bytes(sample.path.read_bytes())
    else:
        data.mkdir(parents=True)
        for path in sorted(Path(shards).parent.glob("*.tar")):
            (data / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(imagenet, "TOTAL", {"validation": 12})
    name = str(tmp_path / "data")
    whole = Pictures.from_hub(name, "validation", tmp_path / "kept")
    assert same(whole, Pictures.from_folder(folder))
    some = Pictures.from_hub(name, "validation", tmp_path / "some", 5, seed=3)
    assert [s.key for s in some.samples] == [whole.samples[i].key for i in subset(12, 5, 3)]
    monkeypatch.setattr(datasets.IterableDataset, "skip", None)
    again = Pictures.from_hub(name, "validation", tmp_path / "some", 5, seed=3)
    assert [s.key for s in again.samples] == [s.key for s in some.samples]


def test_streaming_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"slimlib\[imagenet\]"):
        Pictures.from_hub("ILSVRC/imagenet-1k", "validation", tmp_path, 3)


def test_label_orders_of_data_sets() -> None:
    def features(names: list[str]) -> dict:
        return {"label": type("ClassLabel", (), {"names": names})()}

    assert imagenet._label_order(features(["n01443537", "n01440764"]), "label", "x") == [1, 0]
    as_published = [f"{name}, and a synonym" for name in class_names()]
    assert imagenet._label_order(features(as_published), "label", "x") == list(range(1000))
    with pytest.raises(ValueError, match="1,000"):
        imagenet._label_order(features(as_published[::-1]), "label", "x")
    with pytest.raises(ValueError, match="1,000"):
        imagenet._label_order(features(["cat", "dog"]), "label", "x")
    assert imagenet._label_order(None, "cls", "x")[7] == 7


# ---- subsets and protocols ----------------------------------------------------------------------------------------


def test_subsets_grow_and_do_not_repeat(folder: Path) -> None:
    assert subset(50_000, 1000, 1)[:500] == subset(50_000, 500, 1)
    assert len(set(subset(50, 50))) == 50 and subset(50, None) == list(range(50))
    assert subset(50_000, 500, 1) != subset(50_000, 500, 2)
    with pytest.raises(ValueError, match="51 pictures of 50"):
        subset(50, 51)
    prints = {n: Pictures.open(str(folder), "validation", "", n).fingerprint() for n in (4, 8)}
    assert prints[4] == prints[8] != Pictures.open(str(folder), "validation", "", 4, seed=1).fingerprint()


def test_protocols() -> None:
    image = Image.new("RGB", (300, 200), "black")
    image.paste("white", (50, 0, 250, 200))  # the central square
    crop, squash = (np.asarray(prepare(image, protocol, 256)) for protocol in imagenet.PROTOCOLS)
    assert crop.shape == squash.shape == (256, 256, 3)
    assert crop[:, 2:-2].min() == 255, "nothing but the centre; its edge is resampled with what is beyond"
    assert squash[0, 0, 0] == 0 and squash[128, 128, 0] == 255 and abs(int((squash[128, :, 0] > 127).sum()) - 171) <= 1
    with pytest.raises(ValueError, match="unknown protocol"):
        prepare(image, "stretch", 256)


def test_machines_look_as_their_makers_did(world: Scale) -> None:
    """Against timm's own transform: 256 crop, then the centre."""
    machine = load_machine(world.machine_a, "cpu")
    looking = AsPublished(machine)
    assert (looking.whole, machine.size) == (round(64 / 0.875), 64)
    image = picture(3, 96, 96)
    theirs = timm.data.create_transform(**timm.data.resolve_data_config(machine.net.pretrained_cfg))(image)
    with torch.no_grad():
        expected, found = machine.net(theirs[None]), looking(to_tensor(image))
    assert (expected - found).abs().max() < 0.05 * expected.std() + 0.02
    at_once = prepare(image, "crop", looking.whole)
    with torch.no_grad():
        centre = to_tensor(at_once)[..., 4 : 4 + 64, 4 : 4 + 64]
        torch.testing.assert_close(looking(to_tensor(at_once)), machine(centre))


def test_crops_as_timm_makes_them(world: Scale) -> None:
    """resnet50.a1_in1k's crop_pct of 0.95 makes neither size nor margin a whole number: 224 / 0.95 = 235.8."""
    from torchvision.transforms import CenterCrop, Resize

    machine = load_machine(world.machine_a, "cpu")
    for size, crop_pct in ((224, 0.95), (64, 0.95), (64, 0.9), (64, 1.0)):
        machine.size, machine.net.pretrained_cfg["crop_pct"] = size, crop_pct
        looking = AsPublished(machine)
        config = {**machine.net.pretrained_cfg, "input_size": (3, size, size)}
        resize, crop = timm.data.create_transform(**timm.data.resolve_data_config(config)).transforms[:2]
        assert isinstance(resize, Resize) and isinstance(crop, CenterCrop) and looking.whole == resize.size
        x = torch.arange(looking.whole**2 * 3.0).reshape(1, 3, looking.whole, looking.whole) / 3e5
        machine.forward = lambda pictures: pictures
        assert torch.equal(looking(x), crop(x))


# ---- scenes ---------------------------------------------------------------------------------------------------------


def test_pictures_as_scenes(world: Scale, folder: Path, shards: str, tmp_path: Path) -> None:
    (tmp_path / "val").symlink_to(folder)
    found = imagenet.scenes(world, "test", 4, str(tmp_path))
    assert len(found) == 4
    names = class_names()
    for i, (image, label) in enumerate(Pictures.open(str(folder), "validation", "", 4)):
        scene = found[i]
        assert (scene.label, scene.noun) == (label, names[label]) and scene.image.size == (64, 64)
        assert scene.image.tobytes() == prepare(image, "crop", 64).tobytes()
        assert scene.matte.shape == (64, 64) and 0 <= scene.matte.min() and scene.matte.max() <= 1
        assert scene.mask(8, 8).shape == (8, 8)
    with pytest.raises(ValueError, match="Name the split's own folder"):
        imagenet.scenes(world, "train", 4, str(tmp_path))
    pattern = shards.replace("validation", "{split}")
    assert {s.label for s in imagenet.scenes(world, "test", 4, pattern)} <= set(LABELS)
    with pytest.raises(FileNotFoundError, match="train"):
        imagenet.scenes(world, "train", 4, pattern)
    with pytest.raises(ValueError, match="name ImageNet in `data`"):
        imagenet.scenes(world, "test", 4)
    pocket = imagenet.scenes(Scale.from_name("pocket"), "test", 4)
    assert isinstance(pocket, PocketScenes) and pocket.size == 128


def test_the_bench_is_that_of_the_tables(world: Scale, folder: Path, tmp_path: Path) -> None:
    """What notebook 07 measures again is the same experiment: one key, one order of pictures."""
    (tmp_path / "val").symlink_to(folder)
    bench = imagenet.Bench.open(world, 4, str(tmp_path))
    codec = SlimCodec.from_pretrained(world, exact=False)
    table = imagenet.Bench.of_pictures(codec, world, Pictures.open(str(folder), "validation", "", 8), "crop")
    assert bench.key == table.key
    assert [s.label for s in bench.scenes] == [s.label for s in table.scenes][:4]
    assert bench.make_batch([2]).images[0].tobytes() == bench.scenes[2].image.tobytes()
    assert bench.machines[1].top5(bench.scenes[0].image)[0][0] in bench.machines[1].classes


# ---- evaluation ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Scale:
    return paper.save_stand_in(tmp_path_factory.mktemp("world"), tiny=True, variant="fp16").with_(size=64)


def command(world: Scale, data: str, *more: str) -> list[str]:
    models = str(Path(world.ldm).parent)
    common = ["--data", data, "--scale", models, "--size", "64", "--device", "cpu", "--quiet", "--batch", "2"]
    few = ["--qualities", "0", "0.6", "--classic", "webp", "--variants", "no diffusion"]
    return [sys.executable, "-m", "slimlib.imagenet", *common, *few, *more]


def rows(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if not k.endswith("_ms")} for row in csv.DictReader(file)]


def test_evaluation_survives_kill_9(world: Scale, folder: Path, shards: str, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    where = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    running = subprocess.Popen(command(world, str(folder), "--n", "6", *where), env=environment)
    deadline = time.monotonic() + 240
    done: list[Path] = []
    while not done and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
        done = list((tmp_path / "work").rglob("slim-*/**/*.csv"))
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL and done, "killed in the middle, with something measured"
    assert not (tmp_path / "out").exists()
    kept = {path: set(path.read_text().splitlines()) for path in (tmp_path / "work").rglob("*.csv")}

    def go_on(*words: str) -> str:
        imagenet.main(command(world, *words)[3:])
        return ""

    go_on(str(folder), "--n", "6", *where)
    for path, lines in kept.items():  # with their times, which would differ if anything had been measured again
        assert lines <= set(path.read_text().splitlines())
    whole = ["--work", str(tmp_path / "whole"), "--out", str(tmp_path / "whole-out")]
    go_on(shards, "--n", "6", *whole)
    one, other = (rows(path / "crop-64/evaluation.csv") for path in (tmp_path / "out", tmp_path / "whole-out"))
    assert one == other, "what was interrupted, read from a folder, equals what was not, read from shards"
    assert {(row["method"], row["variant"]) for row in one} >= {("SLIM", ""), ("SLIM", "no diffusion"), ("WebP", "")}
    facts = json.loads((tmp_path / "out/crop-64/evaluation.json").read_text())
    assert (tmp_path / "out/crop-64/times.csv").exists(), "notebook 07 reads all four files"
    assert facts["protocol"] == "crop" and facts["size"] == 64 and "n_" not in facts["pictures"]
    for row in one:
        assert int(row["scenes"]) == 6 and float(row["top1_b_low"]) <= float(row["top1_b"]) <= float(row["top1_b_high"])

    before = {path.parent for path in (tmp_path / "work").rglob("*.csv")}
    go_on(str(folder), "--n", "8", *where)
    after = {path.parent for path in (tmp_path / "work").rglob("*.csv")}
    assert before == after, "a larger subset goes on where the smaller one ended"
    assert int(rows(tmp_path / "out/crop-64/evaluation.csv")[0]["scenes"]) == 8
