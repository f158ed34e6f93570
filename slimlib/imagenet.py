"""ImageNet: pictures and labels from a folder, from shards or from the hub; and the evaluation of the paper on them.

    python -m slimlib.imagenet --data /data/imagenet --n 1000
    python -m slimlib.imagenet --data '/data/shards/imagenet1k-validation-*.tar' --protocol squash --size 256
    python -m slimlib.imagenet --data hub:ILSVRC/imagenet-1k --split validation --n 500 --variants all

Three sources, one class: `Pictures` is a sequence of (picture, label), in an order that depends on nothing but the
data. Labels count as timm's and everybody's networks do: classes sorted by their WordNet ids, n01440764 (tench) first.
The order of ILSVRC's own development kit is another one; labels from there are never taken.

The literature prepares pictures in two ways, here `PROTOCOLS`; results carry the name of theirs. "crop": the shorter
side to `size`, the central square is compressed. "squash": both sides to `size`, whatever the shape. After decoding
both do what the classifier's makers did: resize to input / crop_pct (224 / 0.875 = 256), take the centre.

50,000 pictures, times qualities, ablations and denoising steps, take long. `subset` draws n of them by a seed, so that
the first 500 of 1000 are those of n = 500: a subset grows and keeps what was measured. Intervals say how much it tells.
"""

from __future__ import annotations

import argparse
import functools
import glob
import hashlib
import io
import json
import math
import re
import shlex
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor, nn

from .baselines import CODECS
from .codec import SlimCodec
from .evaluation import (
    BATCH,
    QUALITIES,
    TIMED,
    VARIANTS,
    Batch,
    Ceiling,
    Classic,
    Method,
    SceneResult,
    Setting,
    Slim,
    Store,
    about_run,
    all_comparisons,
    as_text,
    evaluate,
    load_rows,
    measure_times,
    save_rows,
    table,
    weights_key,
)
from .machines import Machine, load_machine, to_tensor
from .pictures import as_rgb
from .repro import atomic_write, quiet_libraries
from .roi import gradcam
from .scales import Scale, hub_error, split_revision
from .scenes import CLASSES, PocketScenes, Scene

PROTOCOLS = ("crop", "squash")
LARGEST = 1 << 27
"""Pixels of the largest picture that is read before it is made small; ImageNet holds some of 20 million."""
TOTAL = {"validation": 50_000, "train": 1_281_167}
"""Pictures of ImageNet-1k's splits, for data sets that do not say how many they hold."""
BLOCK = 256
"""Pictures whose results share a file."""
KEPT = Path("runs/imagenet/pictures")
"""Where pictures that were streamed from the hub are kept."""
ENDINGS = (".jpeg", ".jpg", ".png", ".webp")
WNID = re.compile(r"n\d{8}")


@functools.cache
def wnids() -> tuple[str, ...]:
    """WordNet ids of the 1,000 classes in label order: sorted."""
    return tuple(ImageNetInfo("imagenet-1k").label_names())


@functools.cache
def class_names() -> tuple[str, ...]:
    """English names in label order, the first of the synonyms; two of them occur twice ("crane", "maillot")."""
    info = ImageNetInfo("imagenet-1k")
    return tuple(info.index_to_description(i).split(",")[0] for i in range(info.num_classes()))


@functools.cache
def _label_of() -> dict[str, int]:
    return {wnid: label for label, wnid in enumerate(wnids())}


# ---------------------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True)
class Sample:
    """Where one picture lies: a file, or `size` bytes from `offset` on in a shard."""

    key: str
    label: int
    path: Path
    offset: int = 0
    size: int | None = None


class Pictures(Sequence):
    """Pictures with labels in timm's class order, opened when they are asked for."""

    def __init__(self, samples: Sequence[Sample], origin: str | None = None) -> None:
        """Args: where the pictures lie; `origin` says how they were drawn, and from how many (None: all, in order)."""
        if not samples:
            raise ValueError("there are no pictures")
        self.samples = list(samples)
        self.origin = _origin(len(self.samples), None, 0) if origin is None else origin

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:  # type: ignore[override]
        """Picture `index` as upright RGB, and its label.

        Raises:
            ValueError: the file is damaged; says which.
        """
        sample = self.samples[index]
        with sample.path.open("rb") as file:
            file.seek(sample.offset)
            data = file.read(-1 if sample.size is None else sample.size)
        try:
            return as_rgb(Image.open(io.BytesIO(data)), LARGEST), sample.label
        except (OSError, ValueError) as error:
            raise ValueError(f"{sample.key} in {sample.path} cannot be read: {error}") from error

    def fingerprint(self) -> str:
        """Eight hex digits for the data and the draw: the same for a subset and a larger one that begins with it."""
        first = self.samples[0]
        return hashlib.sha256(f"{self.origin} {first.key} {first.label}".encode()).hexdigest()[:8]

    @classmethod
    def from_folder(cls, folder: str | Path) -> Pictures:
        """ImageNet's own layout: one folder a class, named by its WordNet id, pictures in it.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: it is laid out otherwise; says how.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}")
        groups = sorted(path for path in folder.iterdir() if path.is_dir())
        if not groups and any(path.suffix.lower() in ENDINGS for path in folder.iterdir()):
            raise ValueError(
                f"{folder} holds pictures without class folders, as the validation archive does. Sort them into "
                "folders named by WordNet id (n01440764/...), as PyTorch's ImageNet example describes; the development "
                "kit's ground truth counts classes in another order and is not read here"
            )
        strangers = [path.name for path in groups if path.name not in _label_of()]
        if strangers or not groups:
            raise ValueError(
                f"{folder} is not laid out like ImageNet: expected folders named by WordNet id such as n01440764, "
                f"found {', '.join(strangers[:3]) or 'nothing'}. Name the split's own folder (.../val)"
            )
        return cls(
            [
                Sample(f"{group.name}/{path.name}", _label_of()[group.name], path)
                for group in groups
                for path in sorted(group.iterdir())
                if path.suffix.lower() in ENDINGS
            ]
        )

    @classmethod
    def from_shards(cls, pattern: str | Path) -> Pictures:
        """WebDataset shards: tar files in which a picture (key.jpg) and its label (key.cls) share a key.

        They are read in place through an index of offsets, so that any picture can be had without the ones before.

        Args:
            pattern: of local files, such as "/data/imagenet1k-validation-*.tar".

        Raises:
            FileNotFoundError: no file fits the pattern.
            ValueError: a picture has no label, or one that the WordNet id in its key contradicts.
        """
        paths = sorted(glob.glob(str(pattern)))
        if not paths:
            raise FileNotFoundError(f"no shard fits {pattern}")
        samples = []
        for path in map(Path, paths):
            pictures, labels = {}, {}
            with tarfile.open(path) as shard:
                for member in shard:
                    key, _, ending = member.name.rpartition("/")[2].partition(".")
                    key = f"{member.name.rpartition('/')[0]}/{key}".lstrip("/")
                    if f".{ending.lower()}" in ENDINGS:
                        pictures[key] = member.offset_data, member.size
                    elif ending == "cls":
                        labels[key] = int(shard.extractfile(member).read())  # type: ignore[union-attr]
            for key, (offset, size) in pictures.items():
                if key not in labels or not 0 <= labels[key] < len(wnids()):
                    raise ValueError(f"{path}: {key} has no label {key}.cls from 0 to {len(wnids()) - 1}")
                _same(key, labels[key], path)
                samples.append(Sample(key, labels[key], path, offset, size))
        return cls(samples)

    @classmethod
    def from_hub(cls, name: str, split: str, folder: str | Path, n: int | None = None, seed: int = 0) -> Pictures:
        """A subset of a Hugging Face data set, streamed: the n pictures of `subset` are kept in `folder`, no others.

        Streaming passes over the data once, in order, up to the last picture that is wanted; what a run that was killed
        has kept is not fetched again. The result is in the order of `subset`.

        Args:
            name: such as "ILSVRC/imagenet-1k" or "timm/imagenet-1k-wds", "@revision" behind it; or a local folder that
                `datasets` can read.
            split: "validation" or "train".
            folder: gets a folder for this data set and split, with the pictures as they were stored, undecoded.
            n: how many; None for all.

        Raises:
            ImportError: the package `datasets` is missing.
            OSError: the hub does not give it; says why and what to do.
            ValueError: its classes are not ImageNet's.
        """
        try:
            import datasets
        except ImportError as error:
            raise ImportError("streaming from the hub needs `pip install 'slimlib[imagenet]'`") from error
        head, revision = split_revision(name)
        try:
            stream = datasets.load_dataset(head, split=split, streaming=True, revision=revision)
            first = next(iter(stream.take(1)))
        except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
            raise hub_error(name, error) from error
        picture, label = _columns(list(first), name)
        order = _label_order(stream.features, label, name)
        known = stream.info.splits and stream.info.splits.get(split)
        total = known.num_examples if known and known.num_examples else TOTAL[split]
        wanted = subset(total, n, seed)
        folder = Path(folder) / re.sub(r"\W+", "-", f"{name} {split}").strip("-").lower()
        found: dict[int, Sample] = {}
        for path in folder.glob("*-*.*"):
            position, of_class = map(int, path.stem.split("-"))
            found[position] = Sample(path.stem, of_class, path)
        missing = sorted(set(wanted) - set(found))
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            raw, left = stream.cast_column(picture, datasets.Image(decode=False)), set(missing)
            for index, row in enumerate(raw.skip(missing[0]), missing[0]):
                if index in left:
                    data, of_class = row[picture]["bytes"], order[int(row[label])]
                    if data is None:
                        data = Path(row[picture]["path"]).read_bytes()
                    path = folder / f"{index:08d}-{of_class}.img"
                    atomic_write(path, data)
                    found[index] = Sample(path.stem, of_class, path)
                    left.remove(index)
                    if not left:
                        break
            if left:
                raise ValueError(f"{name} has fewer pictures than the {total} that were expected")
        return cls([found[index] for index in wanted], _origin(total, n, seed))

    @classmethod
    def open(cls, data: str, split: str, folder: str | Path, n: int | None = None, seed: int = 0) -> Pictures:
        """Any of the three by one word; n pictures of it, drawn by a seed.

        Args:
            data: a split's folder of class folders, or the folder with train/ and val/ in it; a pattern of shards
                (ends in .tar), where "{split}" stands for the split; or "hub:owner/name".
            split: "validation" or "train".
            folder, n, seed: see `from_hub`.
        """
        if data.startswith("hub:"):
            return cls.from_hub(data.removeprefix("hub:"), split, folder, n, seed)
        inside = Path(data) / ("val" if split == "validation" else split)
        place = str(inside) if inside.is_dir() else data.replace("{split}", split)
        whole = cls.from_shards(place) if place.endswith(".tar") else cls.from_folder(place)
        return cls([whole.samples[i] for i in subset(len(whole), n, seed)], _origin(len(whole), n, seed))


def subset(total: int, n: int | None, seed: int = 0) -> list[int]:
    """n of `total` indices in random order, none twice; a larger n begins with a smaller one's. None: all in order."""
    if n is None:
        return list(range(total))
    if not 0 < n <= total:
        raise ValueError(f"{n} pictures of {total}: expected 1 to {total}")
    return np.random.default_rng(seed).permutation(total)[:n].tolist()


def _origin(total: int, n: int | None, seed: int) -> str:
    return f"{total} in order" if n is None else f"{total} drawn by {seed}"


def _same(key: str, label: int, path: Path) -> None:
    said = WNID.findall(key)
    if said and said[-1] in _label_of() and _label_of()[said[-1]] != label:
        raise ValueError(
            f"{path}: {key} is labelled {label}, but {said[-1]} is class {_label_of()[said[-1]]} in timm's order; "
            "these shards count classes otherwise (as the development kit does?) and every accuracy would be wrong"
        )


def _columns(names: list[str], data: str) -> tuple[str, str]:
    picture = next((name for name in ("image", "jpg", "jpeg", "png", "webp") if name in names), None)
    label = next((name for name in ("label", "cls") if name in names), None)
    if picture is None or label is None:
        raise ValueError(f"{data} has the columns {', '.join(names)}; expected image and label, or jpg and cls")
    return picture, label


def _label_order(features: object, label: str, data: str) -> list[int]:
    """timm's label for each of the data set's: by WordNet ids, by names, or as they are where it gives none."""
    names = getattr((features or {}).get(label), "names", None)  # type: ignore[attr-defined]
    if names is None:
        return list(range(len(wnids())))
    if all(name in _label_of() for name in names):
        return [_label_of()[name] for name in names]
    same = sum(a.split(",")[0].lower() == b.lower() for a, b in zip(names, class_names(), strict=False))
    if len(names) != len(wnids()) or same < 900:  # a few names were put right over the years
        raise ValueError(f"{data}: {len(names)} classes, {names[0]!r} first, are not ImageNet's 1,000 in their order")
    return list(range(len(names)))


# --------------------------------------------------------------------------------------------------------- protocols


def prepare(image: Image.Image, protocol: str, size: int) -> Image.Image:
    """What is compressed: a square of `size` pixels; see the module."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}: expected one of {', '.join(PROTOCOLS)}")
    box = None
    if protocol == "crop":
        edge = min(image.size)
        left, top = (image.width - edge) / 2, (image.height - edge) / 2
        box = (left, top, left + edge, top + edge)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


class AsPublished(nn.Module):
    """A machine that looks at square pictures as its makers did: resized to input / crop_pct, then the centre."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        config = machine.net.pretrained_cfg
        self.machine, self.mean, self.classes = machine, machine.mean, machine.classes
        self.whole, self.mode = math.floor(machine.size / config["crop_pct"]), config.get("interpolation", "bilinear")

    def forward(self, x: Tensor) -> Tensor:
        """Logits of square pictures (B, 3, S, S) in [0, 1]."""
        if x.shape[-1] != self.whole:
            mode = self.mode if self.mode in ("bilinear", "bicubic") else "bilinear"
            x = F.interpolate(x, (self.whole, self.whole), mode=mode, antialias=True).clamp(0, 1)
        edge = round((self.whole - self.machine.size) / 2)  # to the even one of two, as torchvision's CenterCrop
        return self.machine(x[..., edge : edge + self.machine.size, edge : edge + self.machine.size])

    top5 = Machine.top5


# ------------------------------------------------------------------------------------------------------------ scenes


class ImageNetScenes(Sequence):
    """Squares of ImageNet as scenes, so that what works on `PocketScenes` works on them.

    Nobody knows ImageNet's exact mattes and words: Grad-CAM of a machine for the true class stands for the matte, the
    name of the class for the noun.
    """

    def __init__(self, pictures: Pictures, protocol: str, size: int, machine: Machine) -> None:
        self.pictures, self.protocol, self.size, self.machine = pictures, protocol, size, machine

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Scene:  # type: ignore[override]
        picture, label = self.pictures[index]
        image = prepare(picture, self.protocol, self.size)
        matte = gradcam(self.machine, to_tensor(image).to(self.machine.mean.device), label)[0, 0].cpu().numpy()
        return _scene(image, matte, label)


def _scene(image: Image.Image, matte: np.ndarray, label: int) -> Scene:
    return Scene(image, matte, label, class_names()[label], "", False)


def scenes(
    scale: Scale, split: str, n: int, data: str = "", protocol: str = "crop", machine: Machine | None = None
) -> Sequence[Scene]:
    """Scenes of a split, at least n of them: of `PocketScenes`, or of ImageNet where `data` names it.

    Args:
        scale: says their size, and machine A, which shows where to look.
        split: "train" or "test", which is ImageNet's validation set.
        n: pictures of ImageNet, drawn by seed 0; those of a smaller n come first.
        data: as for `Pictures.open`: ImageNet's folder with train/ and val/ in it, a pattern of shards with "{split}"
            in it, or "hub:owner/name".
        machine: machine A, where it is loaded already.

    Raises:
        ValueError: no data, and the scale's machines know other classes than PocketScenes shows.
    """
    if not data:
        config = Path(scale.machine_a) / "config.json"
        if not config.exists() or json.loads(config.read_text()).get("label_names") != list(CLASSES):
            raise ValueError(
                f"the machines of scale {scale.name!r} know other classes than those of PocketScenes: name ImageNet in "
                "`data`: its folder (with train/ and val/), shards ('...-{split}-*.tar'), or 'hub:owner/name'"
            )
        return PocketScenes(split, scale.size)  # type: ignore[return-value]
    pictures = Pictures.open(data, "train" if split == "train" else "validation", KEPT, n)
    return ImageNetScenes(pictures, protocol, scale.size, machine or load_machine(scale.machine_a))


# -------------------------------------------------------------------------------------------------------- evaluation


class ImageNetBatch(Batch):
    """Some pictures of a subset, as the evaluation's methods want them; see `ImageNetScenes`."""

    def __init__(self, indices: Sequence[int], pictures: Pictures, protocol: str, size: int, machine: Machine) -> None:
        self.indices = list(indices)
        pairs = [pictures[i] for i in self.indices]
        self.images = [prepare(image, protocol, size) for image, _ in pairs]
        self.x, self.labels = to_tensor(self.images), torch.tensor([label for _, label in pairs])
        self.mattes = gradcam(machine, self.x.to(machine.mean.device), self.labels).cpu()
        self.scenes = [
            _scene(image, matte[0].numpy(), label)
            for image, matte, (_, label) in zip(self.images, self.mattes, pairs, strict=True)
        ]
        self._latents, self._captions = {}, {}


class BlockStore(Store):
    """A store for many pictures: one file for every `BLOCK` of them, so that a batch does not rewrite all before it."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self._written: dict[Path, int] = {}

    def read(self, method: Method, setting: Setting) -> dict[int, SceneResult]:
        found: dict[int, SceneResult] = {}
        for path in self.path(method, setting).with_suffix("").glob("*.csv"):
            rows = load_rows(path, SceneResult)
            self._written[path] = len(rows)
            found.update((row.scene, row) for row in rows)
        return found

    def write(self, method: Method, setting: Setting, results: Mapping[int, SceneResult]) -> None:
        blocks: dict[int, list[SceneResult]] = {}
        for index in sorted(results):
            blocks.setdefault(index // BLOCK, []).append(results[index])
        for number, rows in blocks.items():
            path = self.path(method, setting).with_suffix("") / f"{number:05d}.csv"
            if self._written.get(path) != len(rows):
                save_rows(rows, path)
                self._written[path] = len(rows)


@dataclass(frozen=True)
class Bench:
    """What an evaluation works with, at any scale.

    Attributes:
        codec: for batches.
        machines: A and B, as `evaluate` takes them.
        scenes: the test scenes.
        make_batch: of indices into them.
        key: stands for weights and pictures: results of one key are of one experiment.
        batch_size: pictures that go through the networks together.
    """

    codec: SlimCodec
    machines: tuple[Any, Any]
    scenes: Sequence[Scene]
    make_batch: Callable[[Sequence[int]], Batch]
    key: str
    batch_size: int

    @classmethod
    def open(cls, scale: Scale, n: int, data: str = "", protocol: str = "crop") -> Bench:
        """For n scenes: those of `scenes`, with the same meaning of `data`."""
        codec = SlimCodec.from_pretrained(scale, exact=False)
        test = scenes(scale, "test", n, data, protocol, codec.machine)
        if isinstance(test, ImageNetScenes):
            return cls.of_pictures(codec, scale, test.pictures, protocol)
        folders = scale.ldm, scale.captioner, scale.machine_a, scale.machine_b, scale.compressor
        machines = codec.machine, load_machine(scale.machine_b)
        return cls(codec, machines, test, Batch, weights_key(*map(Path, folders)), BATCH)

    @classmethod
    def of_pictures(cls, codec: SlimCodec, scale: Scale, pictures: Pictures, protocol: str) -> Bench:
        """For pictures of ImageNet, at which the machines look as their makers did."""
        machines = codec.machine, load_machine(scale.machine_b, codec.ldm.device)
        about = f"{codec.fingerprint} {scale} {codec.ldm.dtype} {pictures.fingerprint()} {protocol}"
        make = functools.partial(
            ImageNetBatch, pictures=pictures, protocol=protocol, size=scale.size, machine=codec.machine
        )
        return cls(
            codec,
            (AsPublished(machines[0]), AsPublished(machines[1])),
            ImageNetScenes(pictures, protocol, scale.size, codec.machine),
            make,
            hashlib.sha256(about.encode()).hexdigest()[:8],
            4,
        )


def evaluate_imagenet(
    scale: Scale,
    pictures: Pictures,
    protocol: str,
    work: str | Path,
    out: str | Path,
    variants: Sequence[str] = ("",),
    qualities: Sequence[float] = QUALITIES,
    classic: Sequence[str] = CODECS,
    batch: int = 4,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
    command: str = "",
) -> str:
    """Measure SLIM, its ceiling and the classic codecs; results by picture go to `work` as they come.

    A killed run loses at most the batch at hand: the same call goes on. Tables go to `out`/<protocol>-<size>, in the
    form of assets/results, so that notebook 07 can draw them.

    Returns:
        The table as text.
    """
    codec = SlimCodec.from_pretrained(scale, device, exact=False, dtype=dtype)
    bench = Bench.of_pictures(codec, scale, pictures, protocol)
    key = bench.key
    # One picture alone writes the bytes it writes in a batch where sums are taken in one order: not on a GPU.
    timed = TIMED if codec.ldm.device.type == "cpu" and dtype == torch.float32 else 0
    jobs: list[tuple[Method, int]] = [
        (Ceiling(codec, key), len(pictures)),
        (Slim("SLIM", codec, qualities, variants, key, timed), len(pictures)),
        *((Classic(name, key=key), len(pictures)) for name in classic),
    ]
    results = evaluate(
        jobs, bench.machines, BlockStore(work), progress=progress, make_batch=bench.make_batch, batch_size=batch
    )
    rows = table(results, pixels=scale.size**2)
    folder = Path(out) / f"{protocol}-{scale.size}"
    save_rows(rows, folder / "evaluation.csv")
    comparisons = all_comparisons(results)
    if comparisons:
        save_rows(comparisons, folder / "comparisons.csv")
    times, about = folder / "times.csv", folder / "evaluation.json"
    known = times.exists() and about.exists() and json.loads(about.read_text())["weights"].get("SLIM") == key
    if not known:
        save_rows(measure_times(codec, [bench.scenes[i] for i in range(min(3, len(pictures)))]), times)
    facts = about_run(command, results, {method.name: method.key for method, _ in jobs})
    facts |= {"protocol": protocol, "size": scale.size, "pictures": pictures.fingerprint(), "scale": repr(scale)}
    atomic_write(about, (json.dumps(facts, indent=1) + "\n").encode())
    return f"protocol {protocol}, {scale.size} px, {len(pictures)} pictures\n{as_text(rows)}"


def scale_options(parser: argparse.ArgumentParser) -> None:
    """Options that name the models; `chosen_scale` reads them."""
    option = parser.add_argument
    option("--scale", default="paper", help="paper, pocket, or a folder of models (default: %(default)s)")
    option("--ldm", help='another diffusion model: "stable-diffusion-v1-5/stable-diffusion-v1-5", a folder, ...')
    option("--compressor", help="folder of the compressor")
    option("--variant", help="file variant of the diffusion model's weights, such as fp16")
    option("--size", type=int, help="side of the squares that are compressed, in pixels (default: the scale's)")
    option("--device", help="cpu, cuda, ... (default: the best at hand)")


def chosen_scale(a: argparse.Namespace) -> Scale:
    """The scale that the command line asks for."""
    names = {name: getattr(a, name) for name in ("ldm", "compressor", "variant", "size") if getattr(a, name)}
    return replace(Scale.from_name(a.scale), **names)


def data_options(parser: argparse.ArgumentParser, split: str = "validation") -> None:
    """Options that name the data."""
    option = parser.add_argument
    option("--data", required=True, help="ImageNet's folder or a split's, shards (...*.tar), or hub:owner/name")
    option("--split", default=split, choices=("validation", "train"), help="(default: %(default)s)")
    option("--n", type=int, help="pictures, drawn by --seed (default: all)")
    option("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    option("--protocol", choices=PROTOCOLS, default="crop", help="how squares are made (default: %(default)s)")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m slimlib.imagenet", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data_options(parser)
    scale_options(parser)
    option = parser.add_argument
    names = ", ".join(filter(None, VARIANTS))
    option(
        "--variants", nargs="+", default=[], choices=[*VARIANTS, "all"], metavar="NAME", help=f"ablations: all, {names}"
    )
    option("--qualities", nargs="+", type=float, default=list(QUALITIES), help="(default: 0 to 1 by 0.2)")
    option("--classic", nargs="*", default=list(CODECS), choices=CODECS, help="(default: all)")
    option("--batch", type=int, default=4, help="pictures at a time (default: %(default)s)")
    option("--bf16", action="store_true", help="compute the diffusion model in bfloat16")
    option("--work", type=Path, default=Path("runs/imagenet"), help="results by picture (default: %(default)s)")
    option("--out", type=Path, default=Path("runs/imagenet/results"), help="tables (default: %(default)s)")
    option("--quiet", action="store_true", help="no progress bar")
    a = parser.parse_args(arguments)
    quiet_libraries()
    words = sys.argv[1:] if arguments is None else arguments
    pictures = Pictures.open(a.data, a.split, KEPT, a.n, a.seed)
    print(
        evaluate_imagenet(
            chosen_scale(a),
            pictures,
            a.protocol,
            a.work,
            a.out,
            list(VARIANTS) if "all" in a.variants else ["", *a.variants],
            a.qualities,
            a.classic,
            a.batch,
            a.device,
            torch.bfloat16 if a.bf16 else torch.float32,
            progress=not a.quiet,
            command="python -m slimlib.imagenet " + shlex.join(words),
        )
    )


if __name__ == "__main__":
    main()
