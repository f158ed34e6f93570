"""Look at every training picture once: latent, region of interest and caption, cached on disk for both stages.

    python -m slimlib.preprocess --data /data/imagenet --out runs/paper/train                     its training set
    python -m slimlib.preprocess --data '/data/shards/imagenet1k-train-*.tar' --out runs/paper/train
    python -m slimlib.preprocess ... --shard 3/8                   the fourth of eight processes, on any machine
    torchrun --nproc_per_node 8 -m slimlib.preprocess ...          eight processes here, one shard each

Pictures are worked on in blocks. A block's numbers go into the common arrays, and then its captions into a file that
also says that the block is done: a killed run loses one block for each process, and the same command goes on.
Processes share nothing but the folder. `Cache.open` gives what `train_stage1` and `train_stage2` take.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from .caption import Captioner, CaptionPrior
from .codec import CAPTION_PRIOR
from .imagenet import Pictures, chosen_scale, class_names, data_options, prepare, scale_options
from .ldm import LatentDiffusion
from .machines import load_machine, to_tensor
from .pool import ScenePool
from .repro import atomic_write, pick_device, quiet_libraries
from .roi import ClipSeg, gradcam, latent_mask, roi_crop
from .scales import Scale

CLIPSEG = "CIDAS/clipseg-rd64-refined"
BLOCK = 64
"""Pictures that are finished together."""


@dataclass(frozen=True)
class Cache:
    """What training needs to know about pictures.

    Attributes:
        latents: (N, C, h, w) float16, scaled; a memory map.
        pool: masks, labels and captions (as nouns); it holds no pictures, so that stage 2 cannot match features.
    """

    latents: np.ndarray
    pool: ScenePool

    @classmethod
    def open(cls, folder: str | Path) -> Cache:
        """Open a finished cache.

        Raises:
            FileNotFoundError: there is none, or blocks are missing; says how many.
        """
        folder = Path(folder)
        if not (folder / "about.json").exists():
            raise FileNotFoundError(f"{folder} holds no cache; make one with python -m slimlib.preprocess")
        n = json.loads((folder / "about.json").read_text())["pictures"]
        files = [_block(folder, number) for number in range(-(-n // BLOCK))]
        missing = sum(not path.exists() for path in files)
        if missing:
            raise FileNotFoundError(
                f"{folder}: {missing} of {len(files)} blocks are missing; slimlib.preprocess goes on where it was"
            )
        captions = [caption for path in files for caption in json.loads(path.read_text())]
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("latents", "masks", "labels")}
        nothing = np.empty((n, 3, 0, 0), np.uint8)
        pool = ScenePool(nothing, arrays["masks"], np.asarray(arrays["labels"]), captions, [""] * n)
        return cls(arrays["latents"], pool)

    def save_prior(self, folder: str | Path, tokenizer: object = None) -> CaptionPrior:
        """Count the captions' words and write the prior where a compressor's folder has it."""
        prior = CaptionPrior.fit(self.pool.nouns, tokenizer)
        prior.save(Path(folder) / CAPTION_PRIOR)
        return prior


def preprocess(
    scale: Scale,
    pictures: Pictures,
    protocol: str,
    out: str | Path,
    shard: tuple[int, int] = (0, 1),
    roi: str = "gradcam",
    clipseg: str = CLIPSEG,
    batch: int = 16,
    device: str | None = None,
    progress: bool = True,
) -> None:
    """Fill one shard's blocks of a cache, those that are not there yet.

    Args:
        shard: (which, of how many): block b belongs to shard b % how many.
        roi: "gradcam", of machine A for the true class; "clipseg", for the class's name in words.
        batch: pictures that go through the networks together.

    Raises:
        ValueError: the cache in `out` was begun with other data, models or settings.
    """
    if roi not in ("gradcam", "clipseg"):
        raise ValueError(f"unknown region of interest {roi!r}: expected gradcam or clipseg")
    which, of = shard
    if not 0 <= which < of:
        raise ValueError(f"shard {which} of {of}: expected 0 to {of - 1}")
    where, out, n = pick_device(device), Path(out), len(pictures)
    ldm = LatentDiffusion.from_pretrained(scale.ldm, scale.variant, where)
    side = scale.size // ldm.factor
    about = {
        "pictures": n,
        "data": pictures.fingerprint(),
        "protocol": protocol,
        "size": scale.size,
        "roi": roi if roi == "gradcam" else clipseg,
        "models": [scale.ldm, scale.machine_a, scale.captioner],
    }
    _begin(out, about, (n, ldm.latent_channels, side, side))
    todo = [b for b in range(which, -(-n // BLOCK), of) if not _block(out, b).exists()]
    if not todo:
        return
    machine, captioner = load_machine(scale.machine_a, where), Captioner.from_pretrained(scale.captioner, device=where)
    segment = ClipSeg(clipseg, where) if roi == "clipseg" else None
    arrays = {name: np.load(out / f"{name}.npy", mmap_mode="r+") for name in ("latents", "masks", "labels")}
    for block in tqdm(todo, unit="block", disable=not progress):
        captions: list[str] = []
        rows = range(block * BLOCK, min((block + 1) * BLOCK, n))
        for at in range(rows.start, rows.stop, batch):
            of_batch = slice(at, min(at + batch, rows.stop))
            pairs = [pictures[i] for i in range(of_batch.start, of_batch.stop)]
            images = [prepare(image, protocol, scale.size) for image, _ in pairs]
            x, labels = to_tensor(images).to(where), torch.tensor([label for _, label in pairs])
            texts = [f"a photo of a {class_names()[label]}" for label in labels.tolist()]
            m = segment(x, texts) if segment else gradcam(machine, x, labels.to(where))
            crops = [roi_crop(image, cam) for image, cam in zip(images, gradcam(machine, x), strict=True)]
            captions += captioner.caption(crops)  # crops as the encoder will cut them: it knows no label
            with torch.no_grad():
                arrays["latents"][of_batch] = ldm.encode(x).float().cpu().numpy()
            arrays["masks"][of_batch] = (latent_mask(m, side, side)[:, 0] * 255).round().byte().cpu().numpy()
            arrays["labels"][of_batch] = labels.numpy()
        for array in arrays.values():
            array.flush()
        atomic_write(_block(out, block), json.dumps(captions).encode())


def _block(folder: Path, number: int) -> Path:
    return folder / "blocks" / f"{number:06d}.json"


def _begin(out: Path, about: dict, shape: tuple[int, ...]) -> None:
    """Make the empty arrays and say what they are for, or check that they are for this. Several may come at once."""
    out.mkdir(parents=True, exist_ok=True)
    kinds = {
        "latents": (np.float16, shape),
        "masks": (np.uint8, (shape[0], *shape[2:])),
        "labels": (np.int64, shape[:1]),
    }
    for name, (kind, size) in kinds.items():
        if not (out / f"{name}.npy").exists():
            mine = out / f".{name}.{os.getpid()}"
            np.lib.format.open_memmap(mine, "w+", kind, size).flush()
            with contextlib.suppress(FileExistsError):  # unlike a rename, a link never replaces what another has begun
                os.link(mine, out / f"{name}.npy")
            mine.unlink()
    path = out / "about.json"
    if not path.exists():
        atomic_write(path, (json.dumps(about, indent=1) + "\n").encode())
    saved = json.loads(path.read_text())
    differing = [
        f"{key}: {saved.get(key)} there, {value} asked for" for key, value in about.items() if saved.get(key) != value
    ]
    if differing:
        raise ValueError(f"{out} was begun with other settings ({'; '.join(differing)}). Use another folder.")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m slimlib.preprocess", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data_options(parser, "train")
    scale_options(parser)
    option = parser.add_argument
    option("--out", type=Path, required=True, help="folder of the cache")
    option(
        "--shard", default=f"{os.environ.get('RANK', 0)}/{os.environ.get('WORLD_SIZE', 1)}", help="which/of how many"
    )
    option("--roi", choices=("gradcam", "clipseg"), default="gradcam", help="(default: %(default)s)")
    option("--clipseg", default=CLIPSEG, help="the model for --roi clipseg (default: %(default)s)")
    option("--batch", type=int, default=16, help="pictures at a time (default: %(default)s)")
    option("--quiet", action="store_true", help="no progress bar")
    a = parser.parse_args(arguments)
    quiet_libraries()
    which, of = map(int, a.shard.split("/"))
    device = a.device
    if device is None and torch.cuda.is_available():
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
    pictures = Pictures.open(a.data, a.split, a.out / "pictures", a.n, a.seed)
    more = (a.roi, a.clipseg, a.batch, device, not a.quiet)
    preprocess(chosen_scale(a), pictures, a.protocol, a.out, (which, of), *more)
    blocks, done = -(-len(pictures) // BLOCK), len(list((a.out / "blocks").glob("*.json")))
    print(f"{a.out}: {done} of {blocks} blocks of {len(pictures)} pictures are done")


if __name__ == "__main__":
    main()
