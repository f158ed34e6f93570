"""ImageNet: pictures with labels from a folder, from shards or from a hub of data sets; as squares, and as scenes.

Labels count as timm's and everybody's networks do: classes sorted by their WordNet ids, n01440764 (tench) first. The
order of ILSVRC's own development kit is another one; labels from there are never taken.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from torch import Tensor, nn

from slimlib.data.scenes import CLASSES, PocketScenes, Scene
from slimlib.images import as_rgb, to_tensor
from slimlib.machines import Machine, load_machine
from slimlib.roi import gradcam
from slimlib.scales import Scale, hub_error, split_revision
from slimlib.utils import write_file

WNIDS = ImageNetInfo("imagenet-1k").label_names()
"""WordNet ids of the 1,000 classes in label order: sorted."""
CLASS_NAMES = [text.split(",")[0] for text in ImageNetInfo("imagenet-1k").label_descriptions()]
"""English names in label order, the first of the synonyms; two of them occur twice ("crane", "maillot")."""
LABEL_OF = {wnid: label for label, wnid in enumerate(WNIDS)}
PROTOCOLS: dict[str, Callable[..., Image.Image]] = {"crop": ImageOps.fit, "squash": Image.Image.resize}
"""How the literature makes squares: the centre of the picture, or all of it whatever its shape. Results name theirs."""
LARGEST = 1 << 27
"""Pixels of the largest picture that is read before it is made small; ImageNet holds some of 20 million."""
TOTAL = {"validation": 50_000, "train": 1_281_167}
"""Pictures of ImageNet-1k's splits, for data sets that do not say how many they hold."""
ENDINGS = (".jpeg", ".jpg", ".png", ".webp")


class Sample(NamedTuple):
    """Where one picture lies: a file, or `size` bytes from `offset` on in a shard."""

    key: str
    label: int
    path: Path
    offset: int = 0
    size: int = -1  # all of the file


class Pictures(Sequence):
    """Pictures with labels in timm's class order, opened when asked for; their order depends on the data alone."""

    def __init__(self, samples: Sequence[Sample], origin: str | None = None) -> None:
        """`origin` says how the samples were drawn, and from how many (None: they are all, in order)."""
        if not samples:
            raise ValueError(f"there are no pictures: expected files that end in {', '.join(ENDINGS)}")
        self.samples, self.origin = list(samples), origin or f"{len(samples)} in order"

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:  # type: ignore[override]
        """Picture `index` as upright RGB, and its label; ValueError says which file is damaged."""
        key, label, path, offset, size = self.samples[index]
        with path.open("rb") as file:
            file.seek(offset)
            data = io.BytesIO(file.read(size))
        try:
            return as_rgb(Image.open(data), LARGEST), label
        except Exception as error:  # Pillow raises many kinds
            raise ValueError(f"{key} in {path} cannot be read: {error}") from error

    def fingerprint(self) -> str:
        """Eight hex digits for the data and the draw: the same for a subset and a larger one that begins with it."""
        first = self.samples[0]
        return hashlib.sha256(f"{self.origin} {first.key} {first.label}".encode()).hexdigest()[:8]

    @classmethod
    def from_folder(cls, folder: str | Path) -> Pictures:
        """ImageNet's own layout: one folder a class, named by its WordNet id, with pictures. Hidden files do not count.

        Raises:
            ValueError: it is laid out otherwise; says how.
        """
        groups = [path for path in _visible(folder) if path.is_dir()]
        strangers = [path.name for path in groups if path.name not in LABEL_OF]
        if strangers or not groups:
            raise ValueError(
                f"{folder} is not laid out like ImageNet: expected folders named like n01440764, found "
                f"{', '.join(strangers[:3]) or 'none'}. Name the split's own folder (.../val). Sort pictures without "
                "class folders, as the validation archive has them, into such folders first, as PyTorch's ImageNet "
                "example describes: the development kit's ground truth counts classes in another order"
            )
        pictures = [path for group in groups for path in _visible(group) if path.suffix.lower() in ENDINGS]
        return cls([Sample(f"{p.parent.name}/{p.name}", LABEL_OF[p.parent.name], p) for p in pictures])

    @classmethod
    def from_shards(cls, pattern: str | Path) -> Pictures:
        """WebDataset shards: local tar files in which a picture (key.jpg) and its label (key.cls) share a key.

        They are read in place through an index of offsets, so that any picture can be had without the ones before.

        Raises:
            FileNotFoundError: no file fits the pattern.
            ValueError: a shard is damaged; a picture has no label, or one that the WordNet id in its key contradicts.
        """
        samples = []
        for path in map(Path, sorted(glob.glob(str(pattern)))):
            pictures, labels = {}, {}
            try:
                with tarfile.open(path, "r:") as shard:
                    for member in shard:
                        ending = member.name.rpartition("/")[2].partition(".")[2]
                        key = member.name.removesuffix(f".{ending}")
                        if f".{ending.lower()}" in ENDINGS:
                            pictures[key] = member.offset_data, member.size
                        elif ending == "cls":
                            labels[key] = int(shard.extractfile(member).read())  # type: ignore[union-attr]
                with path.open("rb") as file:
                    file.seek(shard.offset)
                    if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a damaged header for the end
                        raise ValueError(f"the header at byte {shard.offset} is none")
            except (tarfile.TarError, ValueError) as error:
                raise ValueError(f"{path} is damaged, or no shard: {error}") from error
            samples += [Sample(key, _checked(key, labels.get(key), path), path, *at) for key, at in pictures.items()]
        if not samples:
            raise FileNotFoundError(f"no shard with pictures fits {pattern}")
        return cls(samples)

    @classmethod
    def from_hub(cls, name: str, split: str, folder: str | Path, n: int | None = None, seed: int = 0) -> Pictures:
        """A Hugging Face data set, streamed once, up to the last of the n pictures of `subset`, or of all.

        They are kept, undecoded, in a folder of `folder` for this data set and split, and not fetched again.

        Args:
            name: "ILSVRC/imagenet-1k", "timm/imagenet-1k-wds@revision", or a local folder that `datasets` can read.

        Raises:
            OSError: the hub does not give it; says why and what to do.
            ValueError: its classes are not ImageNet's, or it is laid out otherwise.
        """
        try:
            import datasets
        except ImportError as error:
            raise ImportError("streaming from the hub needs `pip install 'slimlib[imagenet]'`") from error
        head, revision = split_revision(name)
        try:
            rows = datasets.load_dataset(head, split=split, streaming=True, revision=revision).decode(False)
        except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
            raise hub_error(name, error) from error
        columns = rows.features or {}
        picture = next((word for word in ("image", "jpg", "jpeg", "png", "webp") if word in columns), None)
        label = next((word for word in ("label", "cls") if word in columns), None)
        if not picture or not label:
            raise ValueError(f"{name} has the columns {', '.join(columns)}; expected image and label, or jpg and cls")
        order = _label_order(getattr(columns[label], "names", None), name)
        total = getattr((rows.info.splits or {}).get(split), "num_examples", None) or TOTAL[split]
        wanted = subset(total, n, seed)
        folder = Path(folder) / re.sub(r"\W+", "-", f"{name} {split}").strip("-").lower()
        kept = {int(path.stem[:8]): path for path in folder.glob("*.img")}
        missing = sorted(set(wanted) - set(kept))
        stream = enumerate(rows.skip(missing[0]), missing[0]) if missing else iter(())
        for index in missing:
            row = next((row for at, row in stream if at == index), None)
            if row is None:
                raise ValueError(f"{name} has fewer pictures than the {total} that were expected")
            of_class = _checked(str(row.get("__key__")), order.get(int(row[label])), f"{name}, picture {index}")
            kept[index] = folder / f"{index:08d}-{of_class}.img"
            write_file(kept[index], row[picture]["bytes"] or Path(row[picture]["path"]).read_bytes())
        samples = [Sample(kept[i].stem, int(kept[i].stem[9:]), kept[i]) for i in wanted]
        return cls(samples, f"{total} drawn by {seed}" if n else None)

    @classmethod
    def open(cls, data: str, split: str, folder: str | Path, n: int | None = None, seed: int = 0) -> Pictures:
        """Any of the three by one word, all pictures or the n of `subset`.

        Args:
            data: a split's folder of class folders, or the folder with train/ and val/ in it; a pattern of shards
                (ends in .tar), where "{split}" stands for the split; or "hub:owner/name".
            split: "validation" or "train".
            folder: where pictures of the hub are kept.
        """
        if data.startswith("hub:"):
            return cls.from_hub(data.removeprefix("hub:"), split, folder, n, seed)
        inside = Path(data) / ("val" if split == "validation" else split)
        place = str(inside) if inside.is_dir() else data.replace("{split}", split)
        whole = (cls.from_shards(place) if place.endswith(".tar") else cls.from_folder(place)).samples
        drawn = [whole[i] for i in subset(len(whole), n, seed)]
        return cls(drawn, f"{len(whole)} drawn by {seed}" if n else None)


def subset(total: int, n: int | None, seed: int = 0) -> list[int]:
    """n of `total` indices in random order, of which a smaller n's come first; None: all of them, in order."""
    if n is None:
        return list(range(total))
    if not 0 < n <= total:
        raise ValueError(f"{n} pictures of {total}: expected 1 to {total}")
    return np.random.default_rng(seed).permutation(total)[:n].tolist()


def _visible(folder: str | Path) -> list[Path]:
    """What a folder holds, sorted, without what systems leave there: ".DS_Store", "._x.jpg", "@eaDir", "lost+found"."""
    return sorted(p for p in Path(folder).iterdir() if p.name[0].isalnum() and p.name != "lost+found")


def _checked(key: str, label: int | None, where: str | Path) -> int:
    """A label that exists, and that the WordNet id in the key, where there is one, does not contradict."""
    if label is None or not 0 <= label < len(WNIDS):
        raise ValueError(f"{where}: {key} has no label from 0 to {len(WNIDS) - 1}")
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

    The pictures are 224 / 0.875 = 256 pixels wide then, for both machines of the paper's scale.
    """

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        transform = create_transform(**resolve_data_config(machine.net.pretrained_cfg))
        self.resize, self.crop = transform.transforms[:2]  # the rest is the machine's own
        self.machine, self.mean, self.classes = machine, machine.mean, machine.classes

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of square pictures (B, 3, S, S) in [0, 1]; differentiable."""
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
            x = to_tensor(image).to(self.machine.mean.device)
            matte = gradcam(self.machine, x, label)[0, 0].cpu().numpy()
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
        split: "train" or "test", which is ImageNet's validation set.
        n, seed: of ImageNet's pictures, for `subset`.
        data: as for `Pictures.open`; "" or "pocket" for PocketScenes.

    Raises:
        ValueError: no data, and the scale's machines know other classes than PocketScenes shows.
    """
    if data not in ("", "pocket"):
        part = "train" if split == "train" else "validation"
        pictures = Pictures.open(data, part, "runs/imagenet/pictures", n, seed)
        return ImageNetScenes(pictures, protocol, scale.size, machine or load_machine(scale.machine_a))
    config = Path(scale.machine_a) / "config.json"
    if not config.exists() or json.loads(config.read_text()).get("label_names") != CLASSES:
        raise ValueError(
            f"the machines of scale {scale.name!r} know other classes than those of PocketScenes: name ImageNet in "
            "`data`: its folder (with train/ and val/), shards ('...-{split}-*.tar'), or 'hub:owner/name'"
        )
    return PocketScenes(split, scale.size)  # type: ignore[return-value]
