"""What the cards of the pocket models say of them: figures on test scenes, which no training sees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from slimlib.caption import Captioner
from slimlib.data.cache import Cache
from slimlib.data.scenes import CLASSES, CUTOUTS, PocketScenes
from slimlib.images import to_images
from slimlib.machines import Machine
from slimlib.measure import methods
from slimlib.measure.baselines import PixelCodec
from slimlib.measure.evaluation import evaluate, summarise
from slimlib.roi import gradcam, roi_crop

QUALITIES = (0.0, 0.25, 0.5, 0.75, 1.0)
CODED = 372
"""At which qualities, and by how many scenes at the most, codecs are measured: every class three times."""


@torch.no_grad()
def each_scene(cache: Cache, figures: Callable[[Tensor, Tensor], dict[str, Tensor]], size: int = 31) -> pd.DataFrame:
    """What `figures` says of pictures x (B, 3, H, W) with labels (B,): a column each (B,), a row for each scene."""
    parts = []
    for at in range(0, len(cache), size):
        indices = np.arange(at, min(at + size, len(cache)))
        said = figures(cache.batch(indices), torch.from_numpy(cache.labels[indices]))
        parts.append(pd.DataFrame({name: values.float().cpu().numpy() for name, values in said.items()}))
    return pd.concat(parts, ignore_index=True)


def hits(machine: Machine, x: Tensor, labels: Tensor) -> Tensor:
    """100 where a machine names the class of a picture, else 0: (B,)."""
    return 100.0 * (machine(x.to(machine.mean.device)).argmax(1).cpu() == labels)


def measure_machine(machine: Machine, cache: Cache) -> dict[str, float]:
    """Top-1 on uncompressed scenes, seen and unseen cut-outs apart."""
    top1 = each_scene(cache, lambda x, labels: {"hit": hits(machine, x, labels)}).hit
    unseen = {(c.label, c.noun) for c in CUTOUTS if c.held_out}
    which = ["unseen" if one in unseen else "seen" for one in zip(cache.labels.tolist(), cache.captions, strict=True)]
    figures = {"test scenes": len(cache), "top-1": float(top1.mean())}
    return figures | {
        f"top-1, {kind} cut-outs ({len(of)} scenes)": float(of.mean()) for kind, of in top1.groupby(which)
    }


def measure_vae(vae: nn.Module, machines: dict[str, Machine], cache: Cache) -> dict[str, float]:
    """PSNR of the reconstructions of scenes, and what the machines recognise in scenes and reconstructions."""

    def figures(x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = x.to(vae.device)
        y = vae.decode(vae.encode(2 * x - 1).latent_dist.mode()).sample.clamp(-1, 1) / 2 + 0.5
        said = {"PSNR of reconstructions [dB]": -10 * (x - y).square().mean((1, 2, 3)).log10()}
        for name, machine in machines.items():
            said[f"top-1 of {name} on originals"] = hits(machine, x, labels)
            said[f"top-1 of {name} on reconstructions"] = hits(machine, y, labels)
        return said

    return {"test scenes": len(cache), **each_scene(cache, figures).mean().to_dict()}


@torch.no_grad()
def measure_ldm(
    folder: Path, machines: dict[str, Machine], count: int, device: torch.device, steps: int = 20, guidance: float = 4.0
) -> dict[str, Any]:
    """How often the machines recognise what the stock pipeline draws from "a photo of <noun>", two of each cut-out."""
    settings: dict[str, Any] = {"variant": "fp16", "dtype": torch.float32, "local_files_only": True}
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, **settings).to(device)
    pipeline.set_progress_bar_config(disable=True)
    wanted, parts = [c for c in CUTOUTS for _ in range(2)][:count], []
    for at in range(0, len(wanted), 32):
        some, noise = wanted[at : at + 32], torch.Generator().manual_seed(at)
        words, labels = [f"a photo of {c.noun}" for c in some], torch.tensor([c.label for c in some])
        images = pipeline(words, None, None, steps, guidance_scale=guidance, generator=noise, output_type="pt").images
        parts.append(pd.DataFrame({name: hits(one, images.float(), labels) for name, one in machines.items()}))
    known = {f"recognised by {name} [%]": share for name, share in pd.concat(parts).mean().items()}
    return {"pictures drawn": len(wanted), "steps": steps, "guidance": guidance, **known}


def measure_captioner(captioner: Captioner, machine: Machine, cache: Cache) -> dict[str, Any]:
    """Share of scenes whose caption names the class: from Grad-CAM crops, as the codec has them, and exact ones."""
    masks = iter(torch.from_numpy(np.array(cache.masks)).float())

    def figures(x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        said, cams = {}, gradcam(machine, x.to(machine.mean.device))
        for name, maps in (("Grad-CAM", cams), ("exact", [next(masks) for _ in labels])):
            texts = captioner.caption([roi_crop(image, m) for image, m in zip(to_images(x), maps, strict=True)])
            right = [f" {CLASSES[label]} " in f" {text} " for text, label in zip(texts, labels, strict=True)]
            said[f"names the class from the {name} crop [%]"] = 100.0 * torch.tensor(right)
        return said

    return {"test scenes": len(cache), **each_scene(cache, figures).mean().to_dict()}


def measure_slim(folder: Path, machines: dict[str, Machine], count: int) -> dict[str, Any]:
    """The codec with the compressor in a folder beside the other models, as `measure_codec` has it."""
    name = next(name for name, own in methods.SLIM_FOLDERS.items() if own == folder.name)
    codec = methods.open_codec(folder.parent, name, device=machines["machine_a"].mean.device)
    return measure_codec(methods.slim(name, codec, QUALITIES, timed=0), machines, count)


def measure_pixels(codec: PixelCodec, machines: dict[str, Machine], count: int) -> dict[str, Any]:
    """The codec on pixels, likewise."""
    codec.compressor.eval()
    return measure_codec(methods.pixels("pixels", codec, QUALITIES), machines, count)


def measure_codec(method: methods.Method, machines: dict[str, Machine], count: int) -> dict[str, Any]:
    """Rates, errors and what the machines see, by files of the first scenes that were written and read again."""
    looking, count = {"a": machines["machine_a"], "b": machines["machine_b"]}, min(count, CODED)
    table = summarise(evaluate(PocketScenes("test"), [(method, count)], looking, progress=False))
    figures, columns = {}, ("bpp", "roi_bits", "roi_psnr", "background_psnr", "top1_a", "top1_b")
    for row in table.to_dict("records"):
        figures |= {f"{column} at quality {row['quality']:g}": row[column] for column in columns}
    return {"test scenes": count, **figures}
