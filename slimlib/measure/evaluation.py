"""Measure codecs on any sequence of scenes: whole files, several machines, region of interest and background apart.

Rates are lengths of files that were written and read again. Results are kept scene by scene under --work as they come,
a file for each method and block of scenes, so that a killed run goes on where it was, and that any number of processes
share the work: each takes its own blocks, and the last to finish writes the tables. What depends on other weights or
pictures has a folder of its own.

Examples:
  slim evaluate --scenes 65 --only SLIM WebP
  slim evaluate --scale paper --data /data/imagenet --scenes 1000 --variants all --out runs/imagenet/results/crop-256
  torchrun --nproc_per_node 8 -m -- slimlib evaluate --scale paper --data /data/imagenet --scenes 50000 --bf16
  slim evaluate --scale paper ... --only JPEG WebP AVIF "JPEG XL" "JPEG 2000" &      (they need processor cores, the
      others a GPU: both at once, into one --work; the same command without --only joins them)
  slim evaluate --reproduce     (all that assets/results holds; hours on one core)
"""

from __future__ import annotations

import datetime
import functools
import gzip
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, Subset
from torchvision.ops import box_iou
from tqdm.auto import tqdm

from slimlib.compressor import LatentCompressor
from slimlib.data.imagenet import AsPublished, ImageNetScenes, open_scenes
from slimlib.data.scenes import CLASSES, PocketScenes, Scene
from slimlib.ldm import LatentDiffusion, last
from slimlib.measure import methods
from slimlib.measure.baselines import PixelCodec
from slimlib.measure.methods import QUALITIES, VARIANTS, Method, find
from slimlib.measure.metrics import clusters_of, compare, interval
from slimlib.scales import ASSETS, Scale, reading
from slimlib.utils import describe_device, evaluating, option, pick_device, quiet_libraries, rank_and_world, write_file

RESULTS = ASSETS / "results"  # where the shipped tables lie
BATCH = 50  # scenes that go through the networks together, and whose results share a file
SETTING = ["method", "variant", "quality"]  # tells the points of the curves apart; a method as it is has the variant ""
AS_IT_IS = "as it is"  # variant in the table: the method itself, on the scenes of its ablations, which are fewer
BEST_CLASSIC = "best classic, payload"
WORDS = ("label only", "caption read")
FINDER = "d"  # the machine that says where the object is, not what it is


@dataclass
class Options:
    """What is measured on what."""

    scale: str = option("pocket", "pocket, paper, or a folder of models; or such as paper,size=512")
    data: str = option("", "ImageNet: its folder, shards '...{split}...tar', or hub:owner/name (default: PocketScenes)")
    split: Literal["test", "tune"] = option("test", "tune: the scenes by which settings are chosen, never the test's")
    protocol: Literal["crop", "squash", "full"] = option("crop", "how ImageNet's pictures become squares, and are seen")
    seed: int = option(0, "of the draw of ImageNet's pictures", 0)
    scenes: int | None = option(None, "scenes for the curves (default: 65; to reproduce, 1300)", 1)
    variants: list[str] = option([], "ablations: all, or such as 'no diffusion' (default: none; to reproduce, all)")
    ablation_scenes: int | None = option(None, "scenes for the ablations (default: --scenes; to reproduce, 390)", 1)
    qualities: list[float] = option(list(QUALITIES), "of the learned codecs", 0, 1)
    only: list[str] = option([], "these methods alone, such as SLIM hyperprior JPEG")
    reproduce: bool = option(False, "everything, into the shipped tables")
    work: Path = option(Path("runs/evaluation"), "folder of the results by scene, for each device and torch")
    out: Path | None = option(None, "folder that gets the tables (default: they are only shown)")
    batch: int = option(BATCH, "scenes that go through the networks together", 1, 10**6)
    bf16: bool = option(False, "compute the diffusion model in bfloat16")
    device: str | None = option(None, "cpu, cuda, ... (default: the best at hand)")
    quiet: bool = option(False, "no progress bar")

    def counts(self) -> tuple[int, int]:
        """Scenes for the curves, and for the ablations."""
        count = self.scenes or (1300 if self.reproduce else 65)
        return count, self.ablation_scenes or (390 if self.reproduce else count if self.variants else 0)


def command(options: Options) -> int:
    """`slim evaluate`; returns the exit status."""
    out = options.out or (RESULTS if options.reproduce and not options.only else None)  # shipped whole or not at all
    for folder in filter(None, (options.work, out)):
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise ValueError(f"{place} is no folder that may be written in: name another one in --out or --work")
    quiet_libraries()
    scale, device = Scale.from_name(options.scale), pick_device(options.device)
    machines = methods.open_machines(scale, device)
    if options.data not in ("", "pocket") and machines["a"].classes == CLASSES:
        raise ValueError(
            f"the machines of scale {scale.name!r} know PocketScenes, not {options.data}: say --scale paper"
        )
    draw = (max(options.counts()), options.data, options.protocol, options.seed)
    scenes, lost = open_scenes(scale, options.split, *draw, machines["a"]), 0
    if isinstance(scenes, ImageNetScenes):
        machines = {name: AsPublished(one, options.protocol == "full") for name, one in machines.items()}
        scenes.pictures, lost = scenes.pictures.readable(options.work)
        if lost:
            print(f"{lost} pictures cannot be read, and are left out: {options.work}/unreadable-*.txt says why")
    elif options.split == "test":
        scenes = with_unseen(scenes)  # type: ignore[arg-type]
    wanted = all_jobs(options, scale, scenes, machines["a"])
    jobs = [(method, min(n, len(scenes)) if lost else n) for method, n in wanted]
    show = not options.quiet and rank_and_world()[0] == 0
    store = options.work / f"{device.type}-torch-{torch.__version__.partition('+')[0]}"  # others round otherwise
    results = evaluate(scenes, jobs, machines, store, show, options.batch)
    if len(results) < sum(n * len(method.settings) for method, n in jobs):
        print("other processes are still at work: the last one writes the tables, or the same command given again does")
        return 0
    table = summarise(results, scale.size**2)
    seen = table.filter(regex="^(top1|found)_[a-z0-9]+(_unseen)?$")
    shown = [*SETTING, "scenes", "bpp", *seen, "roi_psnr", "background_psnr"]
    print(table[shown].to_string(index=False, float_format="%.4g"))
    if out:
        names = repr(scale).replace(f"{ASSETS.parent}/", "")
        about = {"command": f"slim {shlex.join(sys.argv[1:])}", "scale": names, "bf16": options.bf16}
        about |= {"device": describe_device(device), "unreadable": lost}
        save_tables(out, results, jobs, scenes, about)
    return 0


def with_unseen(scenes: PocketScenes) -> Sequence[Scene]:
    """Test scenes, and after each ten of them three of objects that no training has seen: both come early."""
    unseen = PocketScenes("unseen", scenes.size)
    turns = min(len(scenes) // 10, len(unseen) // 3)
    first, then = np.arange(10 * turns).reshape(turns, 10), len(scenes) + np.arange(3 * turns).reshape(turns, 3)
    return Subset(ConcatDataset([scenes, unseen]), np.hstack([first, then]).ravel().tolist())  # type: ignore


def all_jobs(options: Options, scale: Scale, scenes: Sequence[Scene], machine: Any) -> list[tuple[Method, int]]:
    """Every method, baseline and ablation that is asked for and whose weights are there, with its number of scenes.

    The variants are those of the first of MAIN that is there; methods that are none of MAIN count as ablations.
    ValueError where there is no method or variant of a name that was given.
    """
    folders, home = methods.SLIM_FOLDERS | methods.PIXEL_FOLDERS, Path(scale.compressor).parent
    others = sorted({path.name for path in home.glob("compressor_*") if not path.suffix} - {*folders.values()})
    folders |= {f"SLIM, {name.removeprefix('compressor_')}": name for name in others}  # such as other seeds of training
    there = {name: home / sub for name, sub in folders.items() if (home / sub / "config.json").exists()}
    names = ["uncompressed", *WORDS, *there, *methods.CLASSIC_NAMES.values()]
    if strange := {*options.only} - {*names} | {*options.variants} - {*VARIANTS, "all"}:
        known = f"{', '.join(names)}; and of variants: all, {', '.join(filter(None, VARIANTS))}"
        raise ValueError(f"there is no {', '.join(sorted(strange))}; of methods there are: {known}")
    asked, only, qualities = options.variants or ["all"], options.only or names, [*dict.fromkeys(options.qualities)]
    variants = [name for name in VARIANTS if name and (name in asked or "all" in asked)]
    dtype, seen = torch.bfloat16 if options.bf16 else torch.float32, options.split * (options.split != "test")
    seen += str(scale.size) * (scale.size != 128)  # PocketScenes exist at every size
    if isinstance(scenes, ImageNetScenes):  # results of other pictures go elsewhere, as do those of other weights
        seen += f"{scenes.pictures.fingerprint()} {scenes.protocol} {scenes.size}"
    data = seen + "bf16" * options.bf16
    count, few = options.counts()
    eyes = list(filter(None, (getattr(scale, f"machine_{name}") for name in methods.MACHINES)))
    first, jobs, learned = None, [], {*only} - {*methods.CLASSIC_NAMES.values()}
    for name, folder in there.items() if learned else ():
        if name in methods.PIXEL_FOLDERS and name in only:
            baseline, key = PixelCodec.from_pretrained(folder, options.device), weights_key(*eyes, folder, data=data)
            jobs.append((methods.pixels(name, baseline, qualities, key), count))
        elif name not in methods.PIXEL_FOLDERS and (name in only or first is None):
            codec = methods.open_codec(scale, name, first, pick_device(options.device), dtype)
            if data and first is None:
                data += codec.ldm.fingerprint().hex()  # what stands under a name of the hub may change
            parts = [scale.ldm, scale.captioner, *eyes]
            key = weights_key(*parts, folder, data=data)
            if first is None:
                first = codec
                jobs.append((methods.ceiling(codec, weights_key(*parts, data=data)), count))
                jobs += [(methods.words(told, codec, machine, key), count) for told in WORDS]
                jobs.append((methods.slim(name, codec, qualities, variants, key), few))
            jobs.append((methods.slim(name, codec, qualities, key=key), count if name in methods.MAIN else few))
    jobs += [(methods.classic(codec, key=weights_key(*eyes, data=seen)), count) for codec in methods.CLASSIC_NAMES]
    jobs = [(method, n) for method, n in jobs if n and method.settings and method.name in only]
    if not jobs:
        raise ValueError(f"{', '.join(only)}: measured with the ablations only; say --variants or --ablation-scenes")
    return jobs


def weights_key(*places: str | Path, data: str = "") -> str:
    """Eight hex digits over the weights and configs in some folders, the names of what is no folder, and the data."""
    hashed = hashlib.sha256(data.encode())
    for place in places:
        files = sorted(path for path in Path(place).rglob("*") if path.suffix in (".safetensors", ".json"))
        for path in files:
            if path.name != "card.json" and not any(part[0] == "." for part in path.relative_to(place).parts):
                hashed.update(path.relative_to(place).as_posix().encode() + path.read_bytes())
        hashed.update(b"" if files else str(place).encode())
    return hashed.hexdigest()[:8]


@torch.no_grad()
def evaluate(
    scenes: Sequence[Scene],
    jobs: Sequence[tuple[Method, int]],
    machines: Mapping[str, Any],
    store: str | Path | None = None,
    progress: bool = True,
    batch: int = BATCH,
) -> pd.DataFrame:
    """Run methods over scenes, and let machines look at what comes out.

    Args:
        scenes: square scenes of one size.
        jobs: methods, each with the number of scenes, from the first on, that it is measured on (ValueError if there
            are fewer).
        machines: by the names that they have in the columns; each takes (B, 3, H, W) in [0, 1] and has a `mean`.
        store: folder that keeps results as they come, and gives those of earlier runs. Several processes share it:
            block b is the work of process b % world, and each returns what all have stored so far.
        batch: scenes that go through the networks together: a block.

    Returns:
        A row for each method, variant, quality and scene (its index), with label, cutout (the object that it shows, or
        a word of its own) and seen (whether training knew that); size, payload: bytes of the file, and without its
        headers; caption, hyper, latent: bytes of its parts, by what their symbols cost; roi_bits: share of the latent's
        bits inside the region of interest, by area of each cell; encode_ms, decode_ms: time of one picture alone;
        top1_NAME: whether the machine sees the right class; roi_error, background_error: mean squared error of pixels
        in [0, 1], weighted by the matte and its rest. NaN is what a method has not, and times that were not taken.
    """

    @functools.cache
    def fetch(name: str, key: str, block: int) -> tuple[Path, dict[tuple[str, float], pd.DataFrame]]:
        """The file of a block, and what is known of it: results by variant and quality."""
        folder = f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{key or 'any'}"
        path = Path(store or "") / folder / f"{block * batch:06d}+{batch}.csv"
        with reading(path, "results (delete it, and they are measured again)"):
            tables = [read_table(path)] if store and path.exists() else []
            return path, {setting: of for table in tables for setting, of in table.groupby(SETTING[1:], sort=False)}

    if (most := max(count for _, count in jobs)) > len(scenes):
        raise ValueError(f"{most} scenes were asked for, and there are {len(scenes)}")
    blocks, (rank, world) = range(-(-most // batch)), rank_and_world() if store else (0, 1)
    mine = [(block, *job) for block in blocks[rank::world] for job in jobs if block * batch < job[1]]
    bar = tqdm(total=sum(len(m.settings) for _, m, _ in mine), disable=not progress, unit="setting", mininterval=5)
    shared, seen_by = None, {"label", "seen", *map(_column, machines)}
    for block, method, count in mine:
        indices = list(range(block * batch, min((block + 1) * batch, count)))
        path, done = fetch(method.name, method.key, block)
        bar.set_description(f"{method.name}, scenes {indices[0]} to {indices[-1]}")
        for variant, quality in method.settings:
            rows = done.get((variant, quality), pd.DataFrame({"scene": []}))
            if not ({*indices} <= {*rows.scene} and seen_by <= {*rows.dropna(axis=1)}):
                if shared is None or shared.indices != indices:
                    shared = methods.Batch(scenes, indices)
                setting = dict(zip(SETTING, (method.name, variant, float(quality)), strict=True))
                done[variant, quality] = _look(setting, shared, *method.run(shared, variant, quality), machines)
                if store:
                    write_file(path, pd.concat(done.values()).to_csv(index=False).encode())
            bar.update()
    bar.close()
    wanted = [(method, setting, count) for method, count in jobs for setting in method.settings]
    found = [(fetch(m.name, m.key, block)[1].get(setting), n) for m, setting, n in wanted for block in blocks]
    parts = [rows[rows.scene < n] for rows, n in found if rows is not None]  # none yet, where others are at work
    return pd.concat(parts or [pd.DataFrame()], ignore_index=True)


def _look(
    setting: dict[str, Any], batch: methods.Batch, x_hat: Tensor, spent: pd.DataFrame, machines: Mapping[str, Any]
) -> pd.DataFrame:
    """By scene: what was spent, what the machines see, and how far the pictures are from the originals."""
    rows = pd.DataFrame({**setting, "scene": batch.indices, "label": batch.labels.numpy()})
    rows["cutout"] = [one.cutout or f"picture {i}" for i, one in zip(batch.indices, batch.scenes, strict=True)]
    rows["seen"] = [scene.seen for scene in batch.scenes]
    rows = rows.join(spent.reindex(columns=methods.SPENT).astype(float))
    for name, machine in machines.items():
        x = x_hat.to(machine.mean.device)
        if "answer" in spent:  # the file says the class, and shows nothing
            rows[_column(name)] = (spent.answer == rows.label) & (name != FINDER)
        elif name == FINDER:
            boxes = torch.from_numpy(np.stack([scene.box for scene in batch.scenes]))
            rows[_column(name)] = (box_iou(find(machine, x).cpu(), boxes).diagonal() > 0.5).numpy()
        else:
            rows[_column(name)] = (machine(x).argmax(1).cpu() == batch.labels).numpy()
    if "answer" in spent:
        return rows.assign(roi_error=np.nan, background_error=np.nan)
    error = (x_hat.cpu() - batch.x).square().mean(1, keepdim=True).double()
    for part, weight in (("roi", batch.mattes.double()), ("background", 1 - batch.mattes.double())):
        rows[f"{part}_error"] = ((error * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3)).clamp_min(1)).numpy()
    return rows


def _column(name: str) -> str:
    """Where the hits of a machine stand."""
    return f"found_{name}" if name == FINDER else f"top1_{name}"


def read_table(path: str | Path) -> pd.DataFrame:
    """A table that was written here. (`pandas.read_csv` does as well, but makes NaN of a variant that is "".)"""
    texts = dict.fromkeys(("variant", "refused", "cutout"), str)
    return pd.read_csv(path, float_precision="round_trip", converters=texts)


def save_tables(
    out: Path, results: pd.DataFrame, jobs: Sequence[tuple[Method, int]], scenes: Sequence[Scene], about: dict
) -> None:
    """Write scenes.csv.gz, evaluation.csv, comparisons.csv, times.csv; and what they are of into evaluation.json."""
    tables = {"scenes.csv.gz": results, "evaluation.csv": summarise(results, scenes[0].image.width ** 2)}
    tables["comparisons.csv"] = told = all_comparisons(results)
    shown = ["anchor", "test", "machine", "bd_rate", "bd_rate_low", "bd_rate_high", "lost_draws", "won", "lost", "p"]
    print(told[shown].to_string(index=False, float_format="%.3g") if len(told) else "no curves to compare")
    if codec := next((method.codec for method, _ in jobs if method.codec), None):
        tables["times.csv"] = methods.measure_times(codec, [scenes[i] for i in range(min(5, len(scenes)))])
    for name, table in tables.items():
        text = table.to_csv(index=False, float_format="%.6g").encode()
        write_file(out / name, gzip.compress(text, mtime=0) if name.endswith(".gz") else text)
    packages = ("torch", "diffusers", "transformers", "compressai", "constriction", "pillow", "bjontegaard", "numpy")
    about["date"] = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    about |= {"python": platform.python_version(), "machine": platform.machine()}
    about["packages"] = {name: importlib.metadata.version(name) for name in packages}
    about["weights"] = {method.name: method.key for method, _ in jobs}
    if isinstance(scenes, ImageNetScenes):
        about |= {"protocol": scenes.protocol, "size": scenes.size, "pictures": scenes.pictures.fingerprint()}
    write_file(out / "evaluation.json", (json.dumps(about, indent=1) + "\n").encode())


def summarise(results: pd.DataFrame, pixels: int = 128**2) -> pd.DataFrame:
    """A row for each setting: means, 95% intervals and medians over its scenes, which have so many pixels each.

    A method with ablations also gets the rows that these are to be compared with, on the same scenes (AS_IT_IS).

    Returns:
        method, variant, quality, scenes (their number); bpp, bits per pixel of the whole file, and payload_bpp without
        headers; header_bytes, caption_bytes, hyper_bytes, latent_bytes; roi_bits, share of all latents' bits inside;
        for each machine top1_NAME in percent with its interval (_low, _high), and the same over the scenes of objects
        that no training has seen (_unseen), which count in no other column; roi_psnr, background_psnr in dB; encode_ms,
        decode_ms.
    """
    parts = [results]
    for _, of in results.groupby("method", sort=False):
        ablations = of[of.variant.isin(VARIANTS) & (of.variant != "")].groupby(["variant", "quality"])["scene"]
        if len(ablations):
            shared = of.scene.isin(set.intersection(*ablations.agg(set)))
            parts.append(of[(of.variant == "") & shared].assign(variant=AS_IT_IS))
    every = pd.concat(parts, ignore_index=True)
    clusters, results = clusters_of(every), _known(every)
    groups = results.assign(roi=results.roi_bits * results.latent).groupby(SETTING, sort=False)
    mean, total = groups.mean(numeric_only=True), groups.sum(numeric_only=True)
    table = pd.DataFrame({"scenes": groups.size(), "bpp": 8 * mean["size"] / pixels})
    table["payload_bpp"], table["header_bytes"] = 8 * mean.payload / pixels, mean["size"] - mean.payload
    table = table.join(mean[["caption", "hyper", "latent"]].add_suffix("_bytes"))
    table["roi_bits"] = total.roi / total.latent
    for name in results.filter(regex="^(top1|found)_"):
        for column, rows in {name: results, f"{name}_unseen": every[~every.seen]}.items():
            hits = rows.groupby(SETTING, sort=False)[name]
            table[column] = 100 * hits.mean()
            ends = {setting: interval(found, clusters[found.index]) for setting, found in hits}
            bounds = np.array([ends.get(setting, (np.nan, np.nan)) for setting in table.index])
            table[[f"{column}_low", f"{column}_high"]] = bounds
    for part in ("roi", "background"):
        table[f"{part}_psnr"] = -10 * np.log10(mean[f"{part}_error"].clip(lower=1e-10))
    return table.join(groups[["encode_ms", "decode_ms"]].median()).reset_index()


def judged(table: pd.DataFrame) -> pd.Series:
    """Top-1 of the judges, a mean over those that there are: machines B and C, which nobody listened to in training."""
    return table.filter(regex="^top1_[bc]$").mean(axis=1)


def _known(results: pd.DataFrame) -> pd.DataFrame:
    """Without the scenes of objects that training has not seen; all of them where nobody has seen any."""
    return results[results.seen] if results.seen.any() else results


def all_comparisons(results: pd.DataFrame) -> pd.DataFrame:
    """The deltas that the goals speak of, for each machine, and each ablation against the method as it is.

    A row has anchor, test, machine, and what `metrics.compare` says: what `test` saves against `anchor`.
    """
    results = _known(results)
    curves = {name: of[of.variant == ""] for name, of in results.groupby("method", sort=False)}
    main = next((name for name in methods.MAIN if name in curves), "")
    # A classic codec may downscale: its frontier is over all its variants.
    classic = results[results.method.isin(methods.CLASSIC_NAMES.values())]
    curves |= dict(list(classic.groupby("method", sort=False))) | {BEST_CLASSIC: classic.assign(size=classic.payload)}
    pairs = [(name, main) for name in curves if name not in (main, "uncompressed", *WORDS)]
    pairs += [(methods.MAIN[2], methods.MAIN[1]), ("hyperprior", "hyperprior, machine loss")]  # steps of training
    for variant, of in results[results.method == main].groupby("variant", sort=False):
        if variant and of.quality.nunique() > 2:
            curves[f"{main} ({variant})"] = of
            pairs.append((main, f"{main} ({variant})"))
    pairs += [(name, f"{main} (no caption)") for name in ("hyperprior", BEST_CLASSIC)]  # what the picture alone does
    return pd.DataFrame(
        {"anchor": anchor, "test": test, "machine": name.removeprefix("top1_")}
        | compare(curves[anchor], curves[test], name.removeprefix("top1_"))
        for name in reversed([*results.filter(like="top1_")])
        for anchor, test in pairs
        if len(curves.get(anchor, ())) and len(curves.get(test, ()))
    )


@torch.no_grad()
def evaluate_latents(
    compressor: LatentCompressor,
    z: np.ndarray | Tensor,
    m: np.ndarray | Tensor,
    qualities: Sequence[float] = QUALITIES,
    batch: int = 64,
    pictures: tuple[LatentDiffusion, Mapping[str, Any], Sequence[str], np.ndarray] | None = None,
) -> list[dict[str, float]]:
    """A quick look at a compressor, on latents: real rounding, estimated rates.

    Args:
        z, m: latents (N, C, h, w) and masks (N, 1, h, w); masks of bytes count in 255ths.
        pictures: to see what machines recognise: diffusion model, machines by name, N captions, labels (N,). Pictures
            are made as the codec makes them, with captions whose bits are not counted.

    Returns:
        For each quality: quality; bpp, an estimate without the header; roi_mse, background_mse of the latent, averaged
        with weights m and 1 - m; roi_bits, the share of the latent's bits spent inside the region; roi_area, its share
        of the area; roi_iou, agreement of the predicted map with m, both cut at one half; under each machine's name its
        top-1 accuracy in percent.
    """
    z, m = (torch.as_tensor(np.array(array)).to(compressor.device) for array in (z, m))
    z, m, config, rows = z.float(), m.float() / (255 if m.dtype == torch.uint8 else 1), compressor.config, []
    for quality in map(float, qualities):
        with evaluating(compressor):
            outs = [compressor(part, quality) for part in z.split(batch)]
        z_hat, logits = (torch.cat([out[name] for out in outs]) for name in ("z_hat", "roi_logits"))
        y, h = (torch.cat([-out["likelihoods"][name].log2().sum(1, keepdim=True) for out in outs]) for name in "yh")
        error, inside, true = (z - z_hat).square().mean(1, keepdim=True), F.avg_pool2d(m, 2**config.stages), m > 0.5
        found = {
            "quality": quality,
            "bpp": (y.sum() + h.sum()) / (m.numel() * config.factor**2),
            "roi_mse": (error * m).sum() / m.sum().clamp_min(1e-9),
            "background_mse": (error * (1 - m)).sum() / (1 - m).sum().clamp_min(1e-9),
            "roi_bits": (y * inside).sum() / y.sum(),
            "roi_area": m.mean(),
            "roi_iou": ((logits > 0) & true).sum() / ((logits > 0) | true).sum().clamp_min(1),
        }
        if pictures:
            ldm, machines, captions, labels = pictures
            x_hat, (t0, steps, guidance) = [], config.walk(quality)
            for part in torch.arange(len(z)).split(batch):
                walk = ldm.enhance(z_hat[part], [captions[i] for i in part], t0, steps, part.tolist(), guidance)
                x_hat.append(ldm.decode(last(walk, z_hat[part])))
            for name, machine in machines.items():
                guesses = torch.cat([machine(x).argmax(1).cpu() for x in x_hat])
                found[name] = 100 * (guesses == torch.tensor(np.asarray(labels))).double().mean()
        rows.append({name: float(value) for name, value in found.items()})
    return rows
