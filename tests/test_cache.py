"""The cache of both stages: what it holds, and that nothing of it is lost or mixed up by kills, processes and restarts.

As a script it is one of the processes of the test with the kill: its models and its folder are the arguments.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from slimlib.caption import Captioner
from slimlib.data import cache as module
from slimlib.data.cache import Cache, Options, command, fill
from slimlib.data.imagenet import Pictures, Unreadable, prepare
from slimlib.data.scenes import PocketScenes, Scene
from slimlib.images import to_tensor
from slimlib.ldm import LatentDiffusion
from slimlib.machines import load_machine
from slimlib.roi import gradcam, latent_mask, roi_crop
from slimlib.utils import rank_and_world

N = 22


class Scenes(list):
    """A few scenes whose labels the machines of `tiny_world` know; to be looked at slowly."""

    def __init__(self, pause: float = 0.0) -> None:
        source = PocketScenes("test", 64)
        super().__init__(replace(source[i], label=i % 6) for i in range(N))
        self.pause = pause

    def __getitem__(self, index: int) -> Scene:  # type: ignore[override]
        time.sleep(self.pause)
        return super().__getitem__(index)


class Crops:
    """A captioner whose words tell one crop from another, as those of random weights do not."""

    def caption(self, crops: list[Image.Image]) -> list[str]:
        return [hashlib.sha256(crop.tobytes()).hexdigest() for crop in crops]


def same_value(x: torch.Tensor, texts: list[str]) -> torch.Tensor:
    """In place of CLIPSeg: maps that hold the lengths of the texts."""
    return torch.stack([torch.full((1, *x.shape[2:]), len(text) / 255) for text in texts])


def fill_from(models: Path, out: Path, pause: float = 0.0, **more: Any) -> int:
    """All that a cache can hold, by tiny models, in six blocks."""
    settings: dict[str, Any] = {
        "about": {"data": "22 scenes"},
        "ldm": LatentDiffusion.from_pretrained(models / "ldm", device="cpu"),
        "machine": load_machine(str(models / "machine_a"), "cpu"),
        "captioner": Crops(),
        "keep_images": True,
        "block": 4,
        "batch": 3,
        "progress": False,
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the other processes: several threads round otherwise
    try:
        return fill(Scenes(pause), out, **settings | more)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    assert fill_from(tiny_world, out) == 0
    return out


def same(one: Cache, other: Cache) -> bool:
    arrays = ("latents", "masks", "labels", "boxes", "images")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays) and (
        (one.captions, one.places, one.about) == (other.captions, other.places, other.about)
    )


def test_it_holds_what_the_models_say(tiny_world: Path, whole: Path) -> None:
    found, scenes = Cache.open(whole), Scenes()
    assert len(found) == N and found.labels.dtype == np.int64 and found.labels.tolist() == [s.label for s in scenes]
    assert found.images.shape == (N, 3, 64, 64) and found.images.dtype == np.uint8
    assert found.latents.shape == (N, 4, 16, 16) and found.latents.dtype == np.float16
    assert found.masks.shape == (N, 16, 16) and found.masks.dtype == np.uint8
    assert found.places == [scene.place for scene in scenes] and found.about["data"] == "22 scenes"
    assert np.array_equal(found.boxes, [scene.box for scene in scenes]) and found.boxes.dtype == np.float32
    some, machine = [21, 4, 9], load_machine(str(tiny_world / "machine_a"), "cpu")
    x = to_tensor([scenes[i].image for i in some])
    assert torch.equal(found.batch(some), x), "in the order asked for"
    with torch.no_grad():
        z = LatentDiffusion.from_pretrained(tiny_world / "ldm", device="cpu").encode(x)
    np.testing.assert_allclose(found.latents[some], z.numpy(), atol=0.01)
    of_class = latent_mask(gradcam(machine, x, torch.tensor([scenes[i].label for i in some])), 16, 16)[:, 0]
    guess = latent_mask(gradcam(machine, x), 16, 16)[:, 0]
    np.testing.assert_allclose(found.masks[some] / 255, of_class.numpy(), atol=0.01)
    assert (of_class - guess).abs().max() > 0.1, "the true class's map is not that of the machine's guess"
    crops = [roi_crop(scenes[i].image, cam) for i, cam in zip(some, gradcam(machine, x), strict=True)]
    assert [found.captions[i] for i in some] == Crops().caption(crops), (
        "the encoder knows no label: the crop is that of the guess"
    )


def test_mattes_and_nouns_need_no_model(tmp_path: Path) -> None:
    scenes, before = Scenes(), torch.get_rng_state()
    fill(scenes, tmp_path / "a", about={}, block=8, progress=False)
    fill(scenes, tmp_path / "b", about={}, block=8, workers=2, progress=False)
    assert torch.equal(before, torch.get_rng_state()), "no draw of a training depends on what was cached before it"
    alone, helped = Cache.open(tmp_path / "a"), Cache.open(tmp_path / "b")
    assert alone.latents is None and alone.images is None and alone.captions == [scene.noun for scene in scenes]
    assert np.array_equal(alone.masks, np.stack([(255 * s.mask(16, 16)).round().astype(np.uint8) for s in scenes]))
    assert np.array_equal(alone.masks, helped.masks) and alone.captions == helped.captions
    fill(PocketScenes("plain", 64, n=3), tmp_path / "c", about={}, progress=False)
    plain = Cache.open(tmp_path / "c")
    assert plain.labels.tolist() == [-1] * 3 and plain.captions == [""] * 3 and all(plain.places)
    assert not plain.masks.any() and not plain.boxes.any()


class Damaged(Scenes):
    """All of the first block of four, and another one."""

    def __getitem__(self, index: int) -> Scene:  # type: ignore[override]
        if index in (0, 1, 2, 3, 9):
            raise Unreadable(f"picture {index} is\ncut")
        return super().__getitem__(index)


class FirstBlock(Damaged):
    def __len__(self) -> int:
        return 4


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_read_is_left_out_listed_and_counted(tmp_path: Path, workers: int) -> None:
    assert fill(Damaged(), tmp_path, about={}, block=4, batch=3, workers=workers, keep_images=True, progress=False) == 0
    found, scenes = Cache.open(tmp_path), [scene for i, scene in enumerate(Scenes()) if i not in (0, 1, 2, 3, 9)]
    assert len(found) == 17 and found.about["pictures"] == N and found.about["unreadable"] == 5
    assert found.labels.tolist() == [scene.label for scene in scenes]
    assert found.captions == [scene.noun for scene in scenes] and len(found.places) == 17
    assert torch.equal(found.batch(range(17)), to_tensor([scene.image for scene in scenes]))
    listed = (tmp_path / "unreadable.txt").read_text()
    assert listed == "".join(f"picture {i} is cut\n" for i in (0, 1, 2, 3, 9))
    assert fill(Damaged(), tmp_path, about={}, block=4, keep_images=True, progress=False) == 0, "it is the same cache"
    with pytest.raises(ValueError, match=r"none of the 4 pictures can be read: picture 0 is cut"):
        fill(FirstBlock(), tmp_path / "none", about={}, progress=False)


def test_two_that_make_one_cache_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other begins later and is done sooner. What systems put beside the files is none of them."""
    write, others, settings = module.write_file, [], {"about": {}, "block": 8, "progress": False}

    def slow(path: Path, data: bytes) -> None:
        if path.name == "000001.safetensors" and not others:
            others.append(-1)  # begun
            others.append(fill(Scenes(), tmp_path / "both", **settings))  # type: ignore[arg-type]
        write(path, data)

    fill(Scenes(), tmp_path / "one", **settings)  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_file", slow)
        assert fill(Scenes(), tmp_path / "both", **settings) == 0 and others == [-1, 0]  # type: ignore[arg-type]
    shutil.rmtree(tmp_path / "both/whole")
    for name in ("blocks/._000001.safetensors", "blocks/.0123.writing", "blocks/000001 (copy).safetensors"):
        (tmp_path / "both" / name).write_bytes(b"-")
    assert fill(Scenes(), tmp_path / "both", **settings) == 0  # type: ignore[arg-type]
    (tmp_path / "both/whole/._labels.npy").write_bytes(b"-")
    assert same(Cache.open(tmp_path / "both"), Cache.open(tmp_path / "one"))
    shutil.rmtree(tmp_path / "one/whole")
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        fill(Scenes(), tmp_path / "one", **settings)  # type: ignore[arg-type]


def test_clipseg_is_asked_for_the_noun(tmp_path: Path) -> None:
    scenes = [replace(Scenes()[0], noun=noun) for noun in ("an owl", "a tabby", "toilet tissue")]
    fill(scenes, tmp_path, about={}, clipseg=same_value, progress=False)  # type: ignore[arg-type]
    lengths = [len(f"a photo of a {noun}") for noun in ("owl", "tabby", "toilet tissue")]
    assert Cache.open(tmp_path).masks[:, 0, 0].tolist() == lengths


def test_two_processes_and_a_kill(tiny_world: Path, whole: Path, tmp_path: Path) -> None:
    """Of two processes one is killed in the middle; both begin again, and the result is that of one process."""

    def start(rank: int, pause: float) -> subprocess.Popen:
        environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, __file__, str(tiny_world), str(tmp_path), str(pause)], env=environment)

    first, second = start(0, 0.0), start(1, 0.2)  # a block of the second takes almost a second
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("blocks/00000[135]*")) and second.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    second.send_signal(signal.SIGKILL)
    assert second.wait() == -signal.SIGKILL and first.wait() == 0
    done = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("blocks/*.safetensors")}
    assert {f"00000{b}.safetensors" for b in (0, 2, 4)} < set(done) and len(done) < 6
    with pytest.raises(FileNotFoundError, match=f"{6 - len(done)} blocks are missing"):
        Cache.open(tmp_path)
    assert fill_from(tiny_world, tmp_path, rank=0, world=2) == 6 - len(done), "its own are there"
    assert fill_from(tiny_world, tmp_path, rank=1, world=2) == 0
    assert same(Cache.open(tmp_path), Cache.open(whole))
    assert done.items() <= {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("blocks/*.safetensors")}.items()


def test_other_settings_are_refused(tiny_world: Path, whole: Path) -> None:
    said = (
        r"data: 22 scenes there, 23 asked for; roi: gradcam there, matte asked for; latents: True.*; models: None there"
    )
    with pytest.raises(ValueError, match=said):
        fill_from(tiny_world, whole, about={"data": "23", "models": "x"}, machine=None, captioner=None, ldm=None)


def test_it_is_joined_once_and_needs_its_blocks_no_more(tiny_world: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "whole").iterdir()}
    shutil.rmtree(tmp_path / "blocks")
    assert fill_from(tiny_world, tmp_path) == 0 and same(Cache.open(tmp_path), Cache.open(whole))
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "whole").iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["about.json", "whole"], "nothing is left behind"


def test_what_is_no_cache_is_named(tiny_world: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="slim preprocess"):
        Cache.open(tmp_path)
    shutil.copytree(whole, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache/whole")
    with pytest.raises(FileNotFoundError, match="the command that began it will go on"):
        Cache.open(tmp_path / "cache")
    block = tmp_path / "cache/blocks/000002.safetensors"
    block.write_bytes(block.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"000002\.safetensors is damaged"):
        fill_from(tiny_world, tmp_path / "cache")


@pytest.mark.parametrize(
    ("file", "data", "said"),
    [
        ("about.json", b'{"pictures": 4, "blo', r"about\.json \(of a cache's settings \(delete it"),
        ("about.json", b"[]", r"about\.json does not hold a cache's settings"),
        ("whole/words.json", b"", r"words\.json \(of a cache's arrays \(delete this folder"),
        ("whole/masks.npy", b"\x93NUMPY", r"whole does not hold a cache's arrays \(delete this folder"),
        ("whole/labels.npy", b"", r"whole does not hold a cache's arrays"),
        ("whole/boxes.npy", None, r"whole does not hold a cache's arrays .*'boxes'"),
    ],
)
def test_damaged_files_are_named(
    tiny_world: Path, whole: Path, tmp_path: Path, file: str, data: bytes | None, said: str
) -> None:
    """And what the message says helps."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).unlink() if data is None else (tmp_path / file).write_bytes(data)
    with pytest.raises(ValueError, match=said):
        Cache.open(tmp_path)
    if file == "about.json":
        with pytest.raises(ValueError, match=said):
            fill_from(tiny_world, tmp_path)
        (tmp_path / file).unlink()
    else:
        shutil.rmtree(tmp_path / "whole")
    assert fill_from(tiny_world, tmp_path) == 0
    assert same(replace(Cache.open(tmp_path), about={}), replace(Cache.open(whole), about={}))


@pytest.mark.parametrize("size", [48, 70, 72])
def test_sizes_that_could_not_be_trained_on_are_refused(tiny_codec_world: Path, tmp_path: Path, size: int) -> None:
    """Before all pictures are looked at: the compressor halves the latent three times."""
    options = Options(data="pocket", n=3, out=tmp_path, scale=f"{tiny_codec_world},size={size}", device="cpu")
    with pytest.raises(ValueError, match=f"size={size}: expected a multiple of 32 pixels to train on"):
        command(options)
    assert not [*tmp_path.iterdir()]


def test_latents_that_are_not_finite_are_refused(tiny_world: Path, tmp_path: Path) -> None:
    """Training would leave out each batch with one of them."""
    ldm = LatentDiffusion.from_pretrained(tiny_world / "ldm", device="cpu")
    ldm.vae.config.scaling_factor = 1e6  # beyond the range of half precision
    with pytest.raises(ValueError, match="the latent holds numbers that are not finite"):
        fill_from(tiny_world, tmp_path, ldm=ldm)
    assert not [*(tmp_path / "blocks").glob("*")]


def test_the_command(tiny_codec_world: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    from paper_world import make_imagenet  # not at the top: the script of the test with the kill does without

    common = {"scale": f"{tiny_codec_world},size=64", "device": "cpu", "quiet": True}
    pocket = Options(data="pocket", split="validation", n=3, out=tmp_path / "pocket", **common)
    assert command(pocket) == 0 and "3 pictures, all done" in capsys.readouterr().out
    found, scenes = Cache.open(tmp_path / "pocket"), PocketScenes("val", 64)
    assert found.captions == [scenes[i].noun for i in range(3)] and found.about["roi"] == "matte"
    assert found.latents.shape == (3, 4, 16, 16) and found.images is None

    make_imagenet(tmp_path / "data/train", 5, labels=(0, 1, 2))  # the tiny machines have logits for these
    options = Options(data=str(tmp_path / "data"), out=tmp_path / "imagenet", n=4, **common)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command(options) == 0 and "1 blocks are missing" in capsys.readouterr().out, "block 0 is the other's"
    monkeypatch.setenv("RANK", "0")
    assert command(options) == 0
    found, pictures = Cache.open(tmp_path / "imagenet"), Pictures.open(options.data, "train", "", 4)
    assert found.labels.tolist() == [label for _, label in pictures] and found.about["protocol"] == "crop"
    image, machine = prepare(pictures[3][0], "crop", 64), load_machine(str(tiny_codec_world / "machine_a"), "cpu")
    m = latent_mask(gradcam(machine, to_tensor(image), pictures[3][1]), 16, 16)
    np.testing.assert_allclose(found.masks[3] / 255, m[0, 0].numpy(), atol=0.01)
    captioner = Captioner.from_pretrained(tiny_codec_world / "captioner", device="cpu")
    assert found.captions[3] == captioner.caption([roi_crop(image, gradcam(machine, to_tensor(image)))])[0]
    assert [Path(name).name for name in found.about["models"]] == ["ldm", "machine_a", "captioner"]
    with pytest.raises(ValueError, match="protocol: crop there, squash asked for"):
        command(replace(options, protocol="squash"))
    monkeypatch.setattr(module, "ClipSeg", lambda name, device: same_value if name == "some/clipseg" else None)
    command(replace(options, roi="clipseg", clipseg="some/clipseg", out=tmp_path / "clipseg"))
    found = Cache.open(tmp_path / "clipseg")
    assert found.masks.std((1, 2)).max() == 0 and found.about["models"][3] == "some/clipseg"


if __name__ == "__main__":
    rank, world = rank_and_world()
    fill_from(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), rank=rank, world=world)
