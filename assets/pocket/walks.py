"""Choose how a compressor's latents are enhanced: noise level t0, steps K and guidance for each quality.

    python assets/pocket/walks.py compressor compressor_stage2

Every candidate decodes validation scenes, and the teachers say what they recognise; judges and test scenes have no
part in it. Of the candidates that come within TOLERANCE points of the best, the one that takes the fewest evaluations
of the UNet goes into the compressor's config.json, as `walks`. All figures stay in walks.csv beside it. Most of an hour
on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import cards
import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from train import TEACHERS, pocket_cache

from slimlib.__main__ import in_one_line
from slimlib.caption import Captioner
from slimlib.compressor import LatentCompressor
from slimlib.data.cache import Cache
from slimlib.images import to_images
from slimlib.ldm import LatentDiffusion, last
from slimlib.machines import Machine, load_machine
from slimlib.roi import object_box
from slimlib.utils import autocast, write_file

HERE = Path(__file__).resolve().parent
QUALITIES = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8)
LEVELS = (100, 200, 300, 450, 600)
WALKS = ((1, 1.0), (2, 2.0), (4, 3.0))
"""Steps K and guidance. An evaluation of the UNet is counted for each step, and another one where it is guided."""
TOLERANCE = 1.0
"""Points of top-1 that a cheaper walk may lose against the best."""


@torch.no_grad()
def measure(
    compressor: LatentCompressor, ldm: LatentDiffusion, captioner: Captioner, teachers: dict[str, Machine], cache: Cache
) -> pd.DataFrame:
    """A row for each quality and candidate: t0, K, guidance, evaluations of the UNet, top-1 of the teachers in %."""
    maps = cards.own_maps(compressor, cache)
    pictures = to_images(cache.batch(np.arange(len(cache))))
    words = captioner.caption([picture.crop(object_box(m)) for picture, m in zip(pictures, maps, strict=True)])
    candidates = [(0, 0, 1.0)] + [(t0, *walk) for t0 in LEVELS for walk in WALKS]
    labels, rows = torch.from_numpy(np.array(cache.labels)), []
    for quality, (t0, steps, guidance) in tqdm([(q, one) for q in QUALITIES for one in candidates], unit="walk"):
        hits = []
        for at in range(0, len(cache), 62):
            z = torch.tensor(cache.latents[at : at + 62]).float().to(ldm.device)
            z_hat, seeds = compressor(z, quality)["z_hat"], range(at, at + len(z))
            with autocast(ldm.device, cpu=True):
                walk = ldm.enhance(z_hat, words[at : at + 62], t0, steps, seeds, guidance, batched=True)
                x_hat = ldm.decode(last(walk, z_hat)).float()
            hits.append(torch.stack([cards.hits(one, x_hat, labels[at : at + 62]) for one in teachers.values()]))
        top1 = dict(zip(teachers, torch.cat(hits, 1).mean(1).tolist(), strict=True))
        row = {"quality": quality, "t0": t0, "steps": steps, "guidance": guidance}
        rows.append(
            row | {"evaluations": steps * (1 if guidance == 1 else 2), **top1, "top1": np.mean([*top1.values()])}
        )
    return pd.DataFrame(rows)


def choose(table: pd.DataFrame) -> list[list[float]]:
    """For each quality the cheapest walk within TOLERANCE of the best; of equally cheap ones the best."""
    walks: list[list[float]] = []
    for quality, of in table.groupby("quality"):
        good = of[of.top1 >= of.top1.max() - TOLERANCE].sort_values(["evaluations", "top1"], ascending=[True, False])
        best = good.iloc[0]
        walks.append([float(quality), int(best.t0), int(best.steps), float(best.guidance)])
    return walks


def main() -> int:
    """Choose, and write what was chosen; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compressors", nargs="+", help="folders under --out")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the models")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="caches")
    parser.add_argument("--scenes", type=int, default=248, help="validation scenes (default: %(default)s)")
    options = parser.parse_args()
    ldm = LatentDiffusion.from_pretrained(options.out / "ldm", "fp16")
    cache = pocket_cache(options.work / "cache", "val", options.scenes, ldm=ldm)
    captioner = Captioner.from_pretrained(options.out / "captioner", ldm.device)
    teachers = {name: load_machine(str(options.out / name), ldm.device) for name in TEACHERS}
    for name in options.compressors:
        folder = options.out / name
        table = measure(LatentCompressor.from_pretrained(folder, ldm.device), ldm, captioner, teachers, cache)
        config = json.loads((folder / "config.json").read_text()) | {"walks": choose(table)}
        write_file(folder / "walks.csv", table.to_csv(index=False, float_format="%.5g").encode())
        write_file(folder / "config.json", (json.dumps(config, indent=1) + "\n").encode())
        print(name, config["walks"])
    return 0


if __name__ == "__main__":
    sys.exit(in_one_line("walks.py", main))
