"""Measure codecs on any sequence of scenes: whole files, several machines, region of interest and background apart.

Rates are lengths of files that were written and read again. Results are kept scene by scene under --work as they come,
a file for each method and block of scenes, so that a killed run goes on where it was, and that any number of processes
share the work: each takes its own blocks, and the last to finish writes the tables. What depends on other weights or
pictures has a folder of its own.

Examples:
  slim evaluate --scenes 60 --only SLIM WebP
  slim evaluate --scale paper --data /data/imagenet --scenes 1000 --variants all --out runs/imagenet/results/crop-256
  torchrun --nproc_per_node 8 -m slimlib evaluate --scale paper --data /data/imagenet --scenes 50000 --bf16
  slim evaluate --reproduce     (all that assets/results holds; hours on one core)
"""

from __future__ import annotations

import datetime
import gzip
import hashlib
import importlib.metadata
import json
import platform
import re
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from slimlib import utils
from slimlib.compressor import LatentCompressor
from slimlib.data.imagenet import ImageNetScenes, open_scenes
from slimlib.data.scenes import Scene
from slimlib.ldm import LatentDiffusion, last
from slimlib.measure import methods
from slimlib.measure.baselines import PixelCodec
from slimlib.measure.methods import QUALITIES, VARIANTS, Method
from slimlib.measure.metrics import compare, interval
from slimlib.scales import ASSETS, Scale
from slimlib.utils import option, write_file

RESULTS = ASSETS / "results"
"""Where the shipped tables lie."""
BATCH = 50
"""Scenes that go through the networks together, and whose results share a file."""
SETTING = ["method", "variant", "quality"]
"""Columns that tell the points of the curves apart; a method as it is has the variant ""."""
AS_IT_IS = "as it is"
"""Variant in the table: the method itself, on the scenes of its ablations, which are fewer."""
BEST_CLASSIC = "best classic, payload"


@dataclass
class Options:
    """What is measured on what."""

    scale: str = option("pocket", "pocket, paper, or a folder of models")
    data: str = option("", "ImageNet: its folder, shards '...{split}...tar', or hub:owner/name (default: PocketScenes)")
    protocol: Literal["crop", "squash"] = option("crop", "how ImageNet's pictures become squares")
    seed: int = option(0, "of the draw of ImageNet's pictures")
    scenes: int | None = option(None, "scenes for the curves (default: 60; to reproduce, 1000)")
    variants: list[str] = option([], "ablations: all, or such as 'no diffusion' (default: none; to reproduce, all)")
    ablation_scenes: int | None = option(None, "scenes for the ablations (default: --scenes; to reproduce, 300)")
    qualities: list[float] = option(list(QUALITIES), "of the learned codecs")
    only: list[str] = option([], "these methods alone, such as SLIM hyperprior JPEG")
    reproduce: bool = option(False, "everything, into the shipped tables")
    work: Path = option(Path("runs/evaluation"), "folder of the results by scene")
    out: Path | None = option(None, "folder that gets the tables (default: they are only shown)")
    batch: int = option(BATCH, "scenes that go through the networks together")
    bf16: bool = option(False, "compute the diffusion model in bfloat16")
    device: str | None = option(None, "cpu, cuda, ... (default: the best at hand)")
    threads: int | None = option(None, "CPU threads (default: PyTorch's choice)")
    quiet: bool = option(False, "no progress bar")

    def counts(self) -> tuple[int, int]:
        """Scenes for the curves, and for the ablations."""
        count = self.scenes or (1000 if self.reproduce else 60)
        return count, self.ablation_scenes or (300 if self.reproduce else count if self.variants else 0)


def command(options: Options) -> int:
    """`slim evaluate`; returns the exit status."""
    if options.threads:
        torch.set_num_threads(options.threads)
    utils.quiet_libraries()
    scale, device = Scale.from_name(options.scale), utils.pick_device(options.device)
    machines = methods.open_machines(scale, device, published=options.data not in ("", "pocket"))
    looks = getattr(machines["a"], "machine", machines["a"])
    draw = (max(options.counts()), options.data, options.protocol, options.seed, looks)
    scenes = open_scenes(scale, "test", *draw)
    jobs = all_jobs(options, scale, scenes)
    rank, world = utils.rank_and_world()
    show = not options.quiet and rank == 0
    results = evaluate(scenes, jobs, machines, options.work, show, options.batch, rank, world)
    if len(results) < sum(n * len(method.settings) for method, n in jobs):
        print("other processes are still at work: the last one writes the tables, or the same command given again does")
        return 0
    table = summarise(results, scale.size**2)
    shown = ["top1_b_low", "top1_b_high", "roi_psnr", "background_psnr"]
    print(table[[*SETTING, "scenes", "bpp", "top1_a", "top1_b", *shown]].to_string(index=False, float_format="%.4g"))
    out = options.out or (RESULTS if options.reproduce and not options.only else None)  # shipped whole or not at all
    if out:
        names = repr(scale).replace(f"{ASSETS.parent}/", "")
        about = {"command": f"slim {shlex.join(sys.argv[1:])}", "scale": names, "bf16": options.bf16}
        save_tables(out, results, jobs, scenes, about | {"device": utils.describe_device(device)})
    return 0


def all_jobs(options: Options, scale: Scale, scenes: Sequence[Scene]) -> list[tuple[Method, int]]:
    """Every method, baseline and ablation that is asked for and whose weights are there, with its number of scenes.

    The variants are those of the first of MAIN that is there; methods that are none of MAIN count as ablations.

    Raises:
        ValueError: there is no method or variant of a name that was given.
    """
    folders, home = methods.SLIM_FOLDERS | methods.PIXEL_FOLDERS, Path(scale.compressor).parent
    there = {name: home / sub for name, sub in folders.items() if (home / sub / "config.json").exists()}
    names = ["uncompressed", *there, *methods.CLASSIC_NAMES.values()]
    strange = {*options.only} - {*names} | {*options.variants} - {*VARIANTS, "all"}
    if strange:
        known = f"{', '.join(names)}; and of variants: all, {', '.join(filter(None, VARIANTS))}"
        raise ValueError(f"there is no {', '.join(sorted(strange))}; of methods there are: {known}")
    asked, only = options.variants or ["all"], options.only or names
    variants = [name for name in VARIANTS if name and (name in asked or "all" in asked)]
    dtype, data = torch.bfloat16 if options.bf16 else torch.float32, "bf16" * options.bf16
    if isinstance(scenes, ImageNetScenes):  # results of other pictures go elsewhere, as do those of other weights
        data += f"{scenes.pictures.fingerprint()} {scenes.protocol} {scenes.size}"
    count, few = options.counts()
    eyes, first, jobs = [scale.machine_a, scale.machine_b], None, []
    for name, folder in there.items():
        if name in methods.PIXEL_FOLDERS and name in only:
            baseline, key = PixelCodec.from_pretrained(folder), weights_key(*eyes, folder, data=data)
            jobs.append((methods.pixels(name, baseline, options.qualities, key), count))
        elif name in methods.SLIM_FOLDERS and (name in only or first is None):
            codec = methods.open_codec(scale, name, first, utils.pick_device(options.device), dtype)
            if data and first is None:
                data += codec.ldm.fingerprint().hex()  # what stands under a name of the hub may change
            parts = [scale.ldm, scale.captioner, *eyes]
            key = weights_key(*parts, folder, data=data)
            if first is None:
                first = codec
                jobs.append((methods.ceiling(codec, weights_key(*parts, data=data)), count))
                jobs.append((methods.slim(name, codec, options.qualities, variants, key), few))
            jobs.append((methods.slim(name, codec, options.qualities, key=key), count if name in methods.MAIN else few))
    jobs += [(methods.classic(codec, key=weights_key(*eyes, data=data)), count) for codec in methods.CLASSIC_NAMES]
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
            if path.name != "card.json":
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
    rank: int = 0,
    world: int = 1,
) -> pd.DataFrame:
    """Run methods over scenes, and let machines look at what comes out.

    Args:
        scenes: square scenes of one size.
        jobs: methods, each with the number of scenes, from the first on, that it is measured on.
        machines: by the names that they have in the columns; each takes (B, 3, H, W) in [0, 1] and has a `mean`.
        store: folder that keeps results as they come, and gives those of earlier runs; None for neither.
        batch: scenes that go through the networks together: a block.
        rank, world: block b is the work of process b % world, which returns what all have stored so far.

    Returns:
        A row for each method, variant, quality and scene (its index), with label and seen (whether training knew the
        cut-out); size, payload: bytes of the file, and without its headers; caption, hyper, latent: bytes of its parts,
        by what their symbols cost; roi_bits: share of the latent's bits inside the region of interest, by area of each
        cell; encode_ms, decode_ms: time of one picture alone; top1_NAME: whether the machine sees the right class;
        roi_error, background_error: mean squared error of pixels in [0, 1], weighted by the matte and its rest. NaN is
        what a method has not, and times that were not taken.

    Raises:
        ValueError: a method asks for more scenes than there are.
    """
    known: dict[Path, dict[tuple[str, float], pd.DataFrame]] = {}  # results by variant and quality, for each file

    def place(method: Method, block: int) -> Path:
        name = re.sub(r"[^a-z0-9]+", "-", method.name.lower())
        return Path(store or "") / f"{name}-{method.key or 'any'}" / f"{block * batch:06d}+{batch}.csv"

    def fetch(path: Path) -> dict[tuple[str, float], pd.DataFrame]:
        if path not in known:
            tables = [read_table(path)] if store and path.exists() else []
            known[path] = {s: of for table in tables for s, of in table.groupby(SETTING[1:], sort=False)}
        return known[path]

    most = max(count for _, count in jobs)
    if most > len(scenes):
        raise ValueError(f"{most} scenes were asked for, and there are {len(scenes)}")
    blocks = range(-(-most // batch))
    mine = [(block, *job) for block in blocks[rank::world] for job in jobs if block * batch < job[1]]
    bar = tqdm(total=sum(len(m.settings) for _, m, _ in mine), disable=not progress, unit="setting", mininterval=5)
    shared, seen_by = None, {f"top1_{name}" for name in machines}
    for block, method, count in mine:
        indices = list(range(block * batch, min((block + 1) * batch, count)))
        path, done = place(method, block), fetch(place(method, block))
        bar.set_description(f"{method.name}, scenes {indices[0]} to {indices[-1]}")
        for variant, quality in method.settings:
            rows = done.get((variant, quality), pd.DataFrame({"scene": []}))
            if not ({*indices} <= {*rows.scene} and seen_by <= {*rows}):
                if shared is None or shared.indices != indices:
                    shared = methods.Batch(scenes, indices)
                rows = _look(shared, *method.run(shared, variant, quality), machines)
                for at, name in enumerate((method.name, variant, float(quality))):
                    rows.insert(at, SETTING[at], name)
                done[variant, quality] = rows
                if store:
                    write_file(path, pd.concat(done.values()).to_csv(index=False).encode())
            bar.update()
    bar.close()
    wanted = [(method, setting, count) for method, count in jobs for setting in method.settings]
    found = [(fetch(place(m, block)).get(setting), count) for m, setting, count in wanted for block in blocks]
    return pd.concat([rows[rows.scene < count] for rows, count in found if rows is not None], ignore_index=True)


def _look(batch: methods.Batch, x_hat: Tensor, spent: pd.DataFrame, machines: Mapping[str, Any]) -> pd.DataFrame:
    """By scene: what was spent, what the machines see, and how far the pictures are from the originals."""
    rows = pd.DataFrame({"scene": batch.indices, "label": batch.labels.numpy(), "seen": [s.seen for s in batch.scenes]})
    rows = rows.join(spent.reindex(columns=methods.SPENT).astype(float))
    for name, machine in machines.items():
        rows[f"top1_{name}"] = (machine(x_hat.to(machine.mean.device)).argmax(1).cpu() == batch.labels).numpy()
    error = (x_hat.cpu() - batch.x).square().mean(1, keepdim=True).double()
    for part, weight in (("roi", batch.mattes.double()), ("background", 1 - batch.mattes.double())):
        rows[f"{part}_error"] = ((error * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3)).clamp_min(1)).numpy()
    return rows


# ------------------------------------------------------------------------------------------------ tables


def read_table(path: str | Path) -> pd.DataFrame:
    """A table that was written here. (`pandas.read_csv` does as well, but makes NaN of a variant that is "".)"""
    return pd.read_csv(path, float_precision="round_trip", converters=dict.fromkeys(("variant", "refused"), str))


def save_tables(
    out: Path, results: pd.DataFrame, jobs: Sequence[tuple[Method, int]], scenes: Sequence[Scene], about: dict
) -> None:
    """Write scenes.csv.gz, evaluation.csv, comparisons.csv and times.csv; and what a reader has to know of them.

    That is evaluation.json: `about`, and date, versions, weights and pictures.
    """
    tables = {"scenes.csv.gz": results, "evaluation.csv": summarise(results, scenes[0].image.width ** 2)}
    tables["comparisons.csv"] = all_comparisons(results)
    codec = next((method.codec for method, _ in jobs if method.codec), None)
    if codec:
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
    """A row for each setting: means, 95% intervals and medians over its scenes.

    A method with ablations also gets the rows that these are to be compared with, on the same scenes (AS_IT_IS).

    Args:
        results: from `evaluate`.
        pixels: in a scene.

    Returns:
        method, variant, quality, scenes (their number); bpp, bits per pixel of the whole file, and payload_bpp without
        headers; header_bytes, caption_bytes, hyper_bytes, latent_bytes; roi_bits, share of all latents' bits inside;
        for each machine top1_NAME in percent with its interval (_low, _high), and for all but "a", which training
        listens to, the same over cut-outs that training has seen and over those it has not (_seen, _unseen); roi_psnr,
        background_psnr in dB; encode_ms, decode_ms.
    """
    parts = [results]
    for _, of in results.groupby("method", sort=False):
        ablations = of[of.variant.isin(VARIANTS) & (of.variant != "")].groupby(["variant", "quality"])["scene"]
        if len(ablations):
            shared = of.scene.isin(set.intersection(*ablations.agg(set)))
            parts.append(of[(of.variant == "") & shared].assign(variant=AS_IT_IS))
    results = pd.concat(parts, ignore_index=True)
    results["header"], results["roi"] = results["size"] - results["payload"], results["roi_bits"] * results["latent"]
    groups = results.groupby(SETTING, sort=False)
    mean, total = groups.mean(numeric_only=True), groups.sum(numeric_only=True)
    table = pd.DataFrame({"scenes": groups.size(), "bpp": 8 * mean["size"] / pixels})
    table["payload_bpp"] = 8 * mean["payload"] / pixels
    for part in ("header", "caption", "hyper", "latent"):
        table[f"{part}_bytes"] = mean[part]
    table["roi_bits"] = total["roi"] / total["latent"]
    for name in _machines(results):
        rows_of = {name: results}
        if name != "top1_a":
            rows_of |= {f"{name}_seen": results[results.seen], f"{name}_unseen": results[~results.seen]}
        for column, rows in rows_of.items():
            hits = rows.groupby(SETTING, sort=False)[name]
            table[column] = 100 * hits.mean()
            table[f"{column}_low"] = hits.agg(lambda found: interval(found)[0])
            table[f"{column}_high"] = hits.agg(lambda found: interval(found)[1])
    for part in ("roi", "background"):
        table[f"{part}_psnr"] = -10 * np.log10(mean[f"{part}_error"].clip(lower=1e-10))
    return table.join(groups[["encode_ms", "decode_ms"]].median()).reset_index()


def _machines(results: pd.DataFrame) -> list[str]:
    return [column for column in results if column.startswith("top1_")]


def all_comparisons(results: pd.DataFrame) -> pd.DataFrame:
    """The deltas that the goals speak of, for each machine, and each ablation against the method as it is.

    Returns:
        anchor, test, machine, and what `metrics.compare` says: what `test` saves against `anchor`.
    """
    curves = {name: of[of.variant == ""] for name, of in results.groupby("method", sort=False)}
    main = next((name for name in methods.MAIN if name in curves), "")
    # A classic codec may downscale: its frontier is over all its variants.
    classic = results[results.method.isin(methods.CLASSIC_NAMES.values())]
    curves |= dict(list(classic.groupby("method", sort=False))) | {BEST_CLASSIC: classic}
    pairs = [(name, main) for name in curves if name not in (main, "uncompressed")]
    pairs += [(methods.MAIN[2], methods.MAIN[1]), ("hyperprior", "hyperprior, machine loss")]  # steps of training
    for variant, of in results[results.method == main].groupby("variant", sort=False):
        if variant and of.quality.nunique() > 2:
            curves[f"{main} ({variant})"] = of
            pairs.append((main, f"{main} ({variant})"))
    return pd.DataFrame(
        {"anchor": anchor, "test": test, "machine": name.removeprefix("top1_")}
        | compare(curves[anchor], curves[test], name.removeprefix("top1_"), (anchor == BEST_CLASSIC, False))
        for name in reversed(_machines(results))
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
        For each quality: quality; bpp (estimate, without the header) and its hyper-latent's part h_bpp;
        mse, roi_mse, background_mse of the latent, averaged with weights 1, m, 1 - m;
        roi_bits, the share of the latent's bits spent inside the region; roi_area, its share of the area;
        roi_iou, agreement of the predicted map with m, both cut at one half; under each machine's name its top-1
        accuracy in percent.
    """
    z, m = (torch.as_tensor(np.array(array)) for array in (z, m))
    m, config, rows = m.float() / (255 if m.dtype == torch.uint8 else 1), compressor.config, []
    ldm, machines, captions, labels = pictures or (None, {}, (), np.empty(0))
    for quality in qualities:
        sums: Counter[str] = Counter()
        for at in range(0, len(z), batch):
            part = slice(at, at + batch)
            x, mask = z[part].float().to(compressor.device), m[part].to(compressor.device)
            with utils.evaluating(compressor):
                out = compressor(x, quality)
            error = (x - out["z_hat"]).square().mean(1, keepdim=True)
            bits = -out["likelihoods"]["y"].log2().sum(1, keepdim=True)  # (B, 1, h/4, w/4)
            seen, true = out["roi_logits"] > 0, mask > 0.5
            found = {"h_bits": -out["likelihoods"]["h"].log2(), "bits": bits, "error": error, "roi": mask}
            found |= {"inside": bits * F.avg_pool2d(mask, 2**config.stages), "roi_error": error * mask}
            found |= {"both": seen & true, "either": seen | true}
            if ldm:
                steps = (config.t0(quality), config.steps, range(at, at + len(x)), config.guidance)
                x_hat = ldm.decode(last(ldm.enhance(out["z_hat"], captions[part], *steps), out["z_hat"]))
                right = torch.as_tensor(labels[part], device=x_hat.device)
                found |= {name: machine(x_hat).argmax(1) == right for name, machine in machines.items()}
            sums.update({name: float(value.sum()) for name, value in found.items()})
        cells, pixels = m.numel(), m.numel() * config.factor**2
        rows.append(
            {
                "quality": float(quality),
                "bpp": (sums["bits"] + sums["h_bits"]) / pixels,
                "h_bpp": sums["h_bits"] / pixels,
                "mse": sums["error"] / cells,
                "roi_mse": sums["roi_error"] / max(sums["roi"], 1e-9),
                "background_mse": (sums["error"] - sums["roi_error"]) / max(cells - sums["roi"], 1e-9),
                "roi_bits": sums["inside"] / max(sums["bits"], 1e-9),
                "roi_area": sums["roi"] / cells,
                "roi_iou": sums["both"] / max(sums["either"], 1e-9),
                **{name: 100 * sums[name] / len(z) for name in machines},
            }
        )
    return rows
