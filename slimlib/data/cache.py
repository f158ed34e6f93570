"""Look at every training picture once: latent, region of interest and words, kept on disk for both stages.

Scenes are worked on in blocks, and a block is one file, written wholly or not at all. Several processes, on one machine
or on many with a common folder, make every so many-th block each. Whatever kills one of them costs the block at hand:
the same command goes on with what is missing. The last one joins the blocks, one file an array.

Examples:
  slim preprocess --data /data/imagenet --out runs/paper/train
  slim preprocess --data '/data/shards/imagenet1k-train-*.tar' --out runs/paper/train
  slim preprocess --data pocket --scale pocket --n 16368 --out runs/pocket/train
  torchrun --nproc_per_node 8 -m -- slimlib preprocess ...        eight processes here, a GPU each
  RANK=3 WORLD_SIZE=8 slim preprocess ...                         the fourth of eight, on any machine
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoProcessor, CLIPSegForImageSegmentation

from slimlib.caption import Captioner
from slimlib.compressor import CompressorConfig
from slimlib.data.imagenet import ImageNetScenes, Pictures, Unreadable
from slimlib.data.scenes import CLASSES, PocketScenes, Scene
from slimlib.images import check_finite, to_images, to_tensor
from slimlib.ldm import LatentDiffusion
from slimlib.machines import Machine, load_machine
from slimlib.roi import gradcam, latent_mask, roi_crop
from slimlib.scales import Scale, load_plain, load_pretrained, reading
from slimlib.utils import Device, digest, option, pick_device, quiet_libraries, rank_and_world, write_file


class ClipSeg:
    """What in a picture fits a text: CLIPSeg (arXiv 2112.10003), frozen. Needs no classifier, but words."""

    def __init__(self, name: str | Path, device: Device = None) -> None:
        """Load from a folder or a hub, such as "CIDAS/clipseg-rd64-refined", by `scales.load_pretrained`."""
        self.device = pick_device(device)
        self.processor = load_plain(AutoProcessor, name)
        model = load_pretrained(CLIPSegForImageSegmentation, name, dtype=torch.float32)
        self.model = model.eval().requires_grad_(False).to(self.device)

    @torch.no_grad()
    def __call__(self, x: Tensor, texts: Sequence[str]) -> Tensor:
        """Maps (B, 1, H, W) in [0, 1] of pictures (B, 3, H, W) in [0, 1], one text each."""
        inputs = self.processor(text=list(texts), images=to_images(x), padding=True, return_tensors="pt")
        grid = inputs["pixel_values"].shape[-2:]  # the answer has the size looked at, and no batch where that is one
        logits = self.model(**inputs.to(self.device)).logits.reshape(len(x), 1, *grid)
        return F.interpolate(logits.sigmoid(), x.shape[2:], mode="bilinear", antialias=True)


@dataclass(frozen=True)
class Cache:
    """What training needs to know about N scenes; the arrays are memory maps."""

    latents: np.ndarray | None  # (N, C, h, w) float16, scaled
    masks: np.ndarray  # (N, h, w) uint8, the share of each latent cell inside the region of interest; 255 is all of it
    labels: np.ndarray  # (N,) int64; -1 where there is no object
    boxes: np.ndarray  # (N, 4) float32, where the object is (`Scene.box`)
    captions: list[str]  # the region in words: what the captioner said, or the scene's noun
    places: list[str]  # the background in words, "" where nobody knows it
    images: np.ndarray | None  # (N, 3, S, S) uint8
    about: dict[str, Any]  # what it was made of

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray | Sequence[int]) -> torch.Tensor:
        """Pictures (B, 3, S, S) in [0, 1], in the order of the indices; ascending ones read faster."""
        return torch.from_numpy(self.images[indices]).float() / 255  # type: ignore[index]

    @classmethod
    def open(cls, folder: str | Path) -> Cache:
        """Open what `fill` has finished; FileNotFoundError says how many blocks are missing, or that there are none."""
        folder = Path(folder)
        if not (folder / "about.json").exists():
            raise FileNotFoundError(f"{folder} holds no cache; make one with `slim preprocess`")
        with reading(folder / "about.json", "a cache's settings (delete it, and give the command that made it again)"):
            about, whole = {**json.loads((folder / "about.json").read_text())}, folder / "whole"
        if not whole.is_dir():
            missing = len(_missing(folder, about))
            raise FileNotFoundError(f"{folder}: {missing} blocks are missing; the command that began it will go on")
        with reading(whole, "a cache's arrays (delete this folder, and the command that made it joins them anew)"):
            words = json.loads((whole / "words.json").read_text())
            files = {name: whole / f"{name}.npy" for name in ("latents", "masks", "labels", "boxes", "images")}
            arrays = {name: np.load(path, mmap_mode="r") for name, path in files.items() if path.exists()}
            return cls(**{"latents": None, "images": None, **arrays, **words, "about": about})


def fill(
    scenes: Sequence[Scene],
    out: str | Path,
    *,
    about: dict[str, Any],
    ldm: LatentDiffusion | None = None,
    machine: Machine | None = None,
    captioner: Captioner | None = None,
    clipseg: ClipSeg | None = None,
    keep_images: bool = False,
    block: int = 256,
    batch: int = 16,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    progress: bool = True,
) -> int:
    """Make those blocks of a cache that are this process's and are not there yet; returns how many are missing then.

    The region of interest is what `clipseg` finds for the noun; without it Grad-CAM of `machine` for the true class;
    without both the scene's own matte. A scene that is `Unreadable` is left out; once all is done, unreadable.txt lists
    why, and about.json counts them.

    Args:
        scenes: any sequence of them, square and of one size.
        about: which data, protocol and models these are, for the reader and for the check below.
        ldm: makes the latents; None: there will be none, and masks have the pocket VAE's cells of 4 pixels.
        captioner: reads the crop that the encoder would cut: it knows no label, so that Grad-CAM of `machine` is for
            the machine's own first guess. None: the scene's noun is the caption.
        block, batch: scenes that are finished, and that go through the networks, together.
        rank, world: block b belongs to process b % world.
        workers: processes that compose or open the scenes; 0: this one does.

    ValueError says which data, models or settings the cache in `out` was begun with, or which block is damaged.
    """
    out, factor = Path(out), ldm.factor if ldm else 4
    roi = "clipseg" if clipseg else "gradcam" if machine else "matte"
    about = {"pictures": len(scenes), **about, "roi": roi, "factor": factor, "latents": ldm is not None}
    about |= {"images": keep_images, "block": block}
    _begin(out, about)
    # A generator of its own: a DataLoader draws a seed even where nothing is shuffled.
    how: Any = {"collate_fn": list, "num_workers": workers, "generator": torch.Generator()}

    @torch.no_grad()
    def look(some: list[Scene]) -> dict[str, np.ndarray]:
        x, labels = to_tensor([scene.image for scene in some]), torch.tensor([scene.label for scene in some])
        captions, grid = [scene.noun for scene in some], (x.shape[2] // factor, x.shape[3] // factor)
        if clipseg:
            texts = [f"a photo of a {noun.removeprefix('an ').removeprefix('a ')}" for noun in captions]
            masks = latent_mask(clipseg(x, texts), *grid)[:, 0]
        elif machine:
            masks = latent_mask(gradcam(machine, x.to(machine.mean.device), labels), *grid)[:, 0]
        else:
            masks = torch.from_numpy(np.stack([scene.mask(*grid) for scene in some]))
        if captioner:
            maps = gradcam(machine, x.to(machine.mean.device))  # type: ignore
            captions = captioner.caption([roi_crop(one.image, cam) for one, cam in zip(some, maps, strict=True)])
        found = {"masks": (masks * 255).round().byte().cpu().numpy(), "labels": labels.numpy()}
        found |= {"captions": np.array(captions, object), "places": np.array([scene.place for scene in some], object)}
        found["boxes"] = np.stack([scene.box for scene in some])
        if ldm:
            check_finite(z := ldm.encode(x).to("cpu", torch.float16), "the latent")
            found["latents"] = z.numpy()
        if keep_images:
            found["images"] = (x * 255).round().byte().numpy()
        return found

    todo = [(number, path) for number, path in _missing(out, about).items() if number % world == rank]
    for number, path in tqdm(todo, unit="block", disable=not progress):
        own = range(number * block, min((number + 1) * block, len(scenes)))
        lost, parts = [], []
        for some in DataLoader(_Readable(scenes), batch, sampler=own, **how):
            lost += [one for one in some if isinstance(one, str)]
            if readable := [one for one in some if not isinstance(one, str)]:
                parts.append(look(readable))
        found = {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}
        words = {name: list(found.pop(name, ())) for name in ("captions", "places")} | {"unreadable": lost}
        found["words"] = np.frombuffer(json.dumps(words).encode(), np.uint8)
        write_file(path, save({name: np.ascontiguousarray(array) for name, array in found.items()}))
    missing = len(_missing(out, about))
    if not missing and not (out / "whole").is_dir():
        _join(out, about)
    return missing


def _begin(out: Path, about: dict[str, Any]) -> None:
    """Say what the cache is of, or check that it is of this. Several processes may come at once."""
    path = out / "about.json"
    if not path.exists():
        write_file(path, (json.dumps(about, indent=1) + "\n").encode())
    with reading(path, "a cache's settings (delete it)"):
        there = {**json.loads(path.read_text())}
    if keys := [key for key in {**there, **about} if there.get(key) != about.get(key) and key != "unreadable"]:
        differing = "; ".join(f"{key}: {there.get(key)} there, {about.get(key)} asked for" for key in keys)
        raise ValueError(f"{out} was begun with other settings ({differing}). Use another folder.")


def _missing(folder: Path, about: dict[str, Any]) -> dict[int, Path]:
    """Blocks that are still to be made: none once they are joined."""
    if (folder / "whole").is_dir():
        return {}
    return {b: path for b, path in enumerate(_blocks(folder, about)) if not path.exists()}


def _blocks(folder: Path, about: dict[str, Any]) -> list[Path]:
    return [folder / "blocks" / f"{b:06d}.safetensors" for b in range(-(-about["pictures"] // about["block"]))]


def _join(folder: Path, about: dict[str, Any]) -> None:
    """All blocks as one file an array, in a folder that has another name until it is whole."""
    words: dict[str, list[str]] = {"captions": [], "places": [], "unreadable": []}
    for path in (paths := _blocks(folder, about)):
        try:
            with safe_open(path, "numpy") as found:
                some = json.loads(found.get_tensor("words").tobytes())
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, and have it made again") from error
        for name in some:
            words[name] += some[name]
    lost = words.pop("unreadable")
    if not words["captions"]:
        raise ValueError(f"none of the {len(lost)} pictures can be read: {lost[0]}")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".whole.") as temporary:
        fresh = Path(temporary) / "whole"
        fresh.mkdir()
        for path in paths:
            found = load_file(path)
            del found["words"]
            for name, array in found.items():
                with (fresh / f"{name}.npy").open("ab") as file:
                    if not file.tell():
                        layout = np.lib.format.header_data_from_array_1_0(array)
                        layout["shape"] = (len(words["captions"]), *array.shape[1:])
                        np.lib.format.write_array_header_1_0(file, layout)
                    file.write(array.tobytes())
        (fresh / "words.json").write_text(json.dumps(words))
        if lost:
            write_file(folder / "unreadable.txt", "".join(f"{line}\n" for line in lost).encode())
        write_file(folder / "about.json", (json.dumps(about | {"unreadable": len(lost)}, indent=1) + "\n").encode())
        try:
            fresh.rename(folder / "whole")
        except OSError:
            if not (folder / "whole").is_dir():  # else another process was first
                raise


class _Readable:
    """Scenes; where one cannot be read, the reason."""

    def __init__(self, scenes: Sequence[Scene]) -> None:
        self.scenes = scenes

    def __getitem__(self, index: int) -> Scene | str:
        try:
            return self.scenes[index]
        except Unreadable as error:
            return str(error)


@dataclass
class Options:
    """What `slim preprocess` can be told."""

    data: str = option(MISSING, "ImageNet's folder or a split's, shards (...*.tar), hub:owner/name; or pocket")
    out: Path = option(MISSING, "folder of the cache")
    split: Literal["train", "tune", "validation"] = option("train", "of the data; tune: training pictures to choose by")
    n: int | None = option(None, "pictures, drawn by --seed; of PocketScenes the first (default: all)", 1)
    seed: int = option(0, "of the draw, or of PocketScenes", 0)
    protocol: Literal["crop", "squash", "full"] = option("crop", "how squares are made of ImageNet's pictures")
    scale: str = option("paper", "paper, pocket, or a folder of models; or such as paper,size=512,ldm=owner/name")
    roi: Literal["gradcam", "clipseg"] = option("gradcam", "region of interest; PocketScenes have their exact matte")
    clipseg: str = option("CIDAS/clipseg-rd64-refined", "the model for --roi clipseg")
    batch: int = option(16, "pictures at a time", 1, 10**6)
    keep_images: bool = option(False, "keep the pictures, too: `slim train --task features` compares them")
    workers: int = option(0, "processes that open pictures or compose scenes, beside this one", 0, 1024)
    device: str | None = option(None, "cpu, cuda, ... (default: the best at hand)")
    quiet: bool = option(False, "no progress bar")


def command(options: Options) -> int:
    """Fill a cache, or this process's share of it."""
    quiet_libraries()
    scale, device = Scale.from_name(options.scale), pick_device(options.device)
    about: dict[str, Any] = {"size": scale.size, "models": [scale.ldm]}
    given: dict[str, Any] = {"ldm": LatentDiffusion.from_pretrained(scale.ldm, scale.variant, device)}
    about["vae"] = digest(given["ldm"].vae).hex()[:8]
    if scale.size % (unit := CompressorConfig().multiple * given["ldm"].factor):  # training would refuse the latents
        raise ValueError(f"--scale {scale.name},size={scale.size}: expected a multiple of {unit} pixels to train on")
    if options.data == "pocket":
        split = "train" if options.split == "train" else "val"
        scenes: Any = PocketScenes(split, scale.size, options.seed, options.n)
        about["data"] = scenes.fingerprint()
    else:
        given["machine"] = load_machine(scale.machine_a, device)
        if given["machine"].classes == CLASSES:  # before a hub's pictures are fetched
            raise ValueError(f"the machines of scale {scale.name!r} know PocketScenes, not {options.data}")
        pictures = Pictures.open(options.data, options.split, options.out / "pictures", options.n, options.seed)
        scenes = ImageNetScenes(pictures, options.protocol, scale.size)
        about |= {"data": pictures.fingerprint(), "protocol": options.protocol}
        about["models"] += [scale.machine_a, scale.captioner]
        given["captioner"] = Captioner.from_pretrained(scale.captioner, device=device)
        if options.roi == "clipseg":
            about["models"].append(options.clipseg)
            given["clipseg"] = ClipSeg(options.clipseg, device)
    given |= {"keep_images": options.keep_images, "workers": options.workers, "progress": not options.quiet}
    given["rank"], given["world"] = rank_and_world()
    missing = fill(scenes, options.out, about=about, batch=options.batch, **given)
    print(f"{options.out}: {len(scenes)} pictures, " + (f"{missing} blocks are missing" if missing else "all done"))
    if not missing and (lost := Cache.open(options.out).about.get("unreadable")):
        print(f"{lost} of them cannot be read, and are left out: {options.out / 'unreadable.txt'} says why")
    return 0
