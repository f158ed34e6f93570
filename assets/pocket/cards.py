"""What the cards of the pocket models say of them: figures on test scenes, which no training sees."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from torchvision.ops import box_iou

from slimlib.caption import Captioner
from slimlib.compressor import LatentCompressor
from slimlib.data.cache import Cache
from slimlib.data.scenes import CLASSES, CUTOUTS, PocketScenes
from slimlib.images import to_images
from slimlib.ldm import LatentDiffusion
from slimlib.machines import Machine
from slimlib.measure import methods
from slimlib.measure.baselines import PixelCodec
from slimlib.measure.evaluation import evaluate, evaluate_latents, summarise
from slimlib.roi import object_box, roi_crop
from slimlib.utils import autocast

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


def measure_machine(machine: Machine, **splits: Cache) -> dict[str, float]:
    """Top-1 on uncompressed scenes of each split."""
    figures: dict[str, float] = {}
    for name, cache in splits.items():
        top1 = each_scene(cache, lambda x, labels: {"hit": hits(machine, x, labels)}).hit.mean()
        figures |= {f"{name} scenes": len(cache), f"top-1 on {name} scenes [%]": float(top1)}
    return figures


def measure_finder(machine: Machine, **splits: Cache) -> dict[str, float]:
    """Share of uncompressed scenes of each split where the box found has an IoU above one half with the object's."""
    figures: dict[str, float] = {}
    for name, cache in splits.items():
        boxes = iter(torch.from_numpy(np.array(cache.boxes)))

        def right(x: Tensor, labels: Tensor, boxes: Iterator[Tensor] = boxes) -> dict[str, Tensor]:
            found, true = (
                methods.find(machine, x.to(machine.mean.device)).cpu(),
                torch.stack([next(boxes) for _ in labels]),
            )
            return {"hit": 100.0 * (box_iou(found, true).diagonal() > 0.5)}

        figures |= {
            f"{name} scenes": len(cache),
            f"found in {name} scenes [%]": float(each_scene(cache, right).hit.mean()),
        }
    return figures


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


def probe_ldm(
    ldm: LatentDiffusion, machines: dict[str, Machine], cache: Cache, unet: nn.Module, text_encoder: nn.Module
) -> dict[str, float]:
    """Error in v on 248 validation latents at fixed times and noises, and what machines recognise in 124 drawings."""
    ldm, rng, errors = copy.copy(ldm), np.random.default_rng(0), []
    ldm.unet, ldm.text_encoder = unet, text_encoder
    for at in range(0, min(248, len(cache)), 62):
        z = torch.tensor(cache.latents[at : at + 62]).float().to(ldm.device)
        t = torch.from_numpy(rng.integers(1, 1_000, len(z))).to(ldm.device)
        noise = torch.from_numpy(rng.standard_normal(z.shape, dtype=np.float32)).to(ldm.device)
        words = [f"{cache.captions[i]} {cache.places[i]}" for i in range(at, at + len(z))]
        with autocast(ldm.device, cpu=True):
            z0, eps = ldm.predict(ldm.add_noise(z, t, noise), t, ldm.text(words))
        abar = ldm.alpha_bar(t)
        error = abar.sqrt() * (eps - noise) - (1 - abar).sqrt() * (z0 - z)
        errors.append(error.square().mean((1, 2, 3)))
    drawn = measure_ldm(ldm, machines, len(CLASSES))
    return {"error in v": float(torch.cat(errors).mean()), **{k: v for k, v in drawn.items() if "%" in k}}


@torch.no_grad()
def measure_ldm(
    ldm: LatentDiffusion, machines: dict[str, Machine], count: int, steps: int = 20, guidance: float = 4.0
) -> dict[str, Any]:
    """How often machines recognise what the stock pipeline draws from "a photo of <noun>": known cut-outs, in turns."""
    parts = {"vae": ldm.vae, "unet": ldm.unet, "text_encoder": ldm.text_encoder, "tokenizer": ldm.tokenizer}
    more = dict.fromkeys(("safety_checker", "feature_extractor"))
    pipeline = StableDiffusionPipeline(**parts, scheduler=ldm.scheduler, **more, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    known, tables = sorted((c for c in CUTOUTS if not c.held_out), key=lambda c: (c.file[-6], c.label)), []
    wanted = (known * 2)[:count]
    for at in range(0, len(wanted), 31):
        some, noise = wanted[at : at + 31], torch.Generator().manual_seed(at)
        words, labels = [f"a photo of {c.noun}" for c in some], torch.tensor([c.label for c in some])
        with autocast(ldm.device, cpu=True):
            drawn = pipeline(words, None, None, steps, guidance_scale=guidance, generator=noise, output_type="pt")
        tables.append(pd.DataFrame({name: hits(one, drawn.images.float(), labels) for name, one in machines.items()}))
    shares = {f"drawings recognised by {name} [%]": share for name, share in pd.concat(tables).mean().items()}
    return {"pictures drawn": len(wanted), "steps": steps, "guidance": guidance, **shares}


@torch.no_grad()
def own_maps(compressor: LatentCompressor, cache: Cache, factor: int = 4) -> Iterator[Tensor]:
    """The compressor's own map of the region in each scene (1, H, W), each at a quality drawn at random."""
    quality = torch.from_numpy(np.random.default_rng(0).random(len(cache), dtype=np.float32)).to(compressor.device)
    for at in range(0, len(cache), 62):
        z = torch.tensor(cache.latents[at : at + 62]).float().to(compressor.device)
        maps = compressor.encoder(z, quality[at : at + 62])[2].sigmoid()
        yield from F.interpolate(maps, scale_factor=factor, mode="bilinear").cpu()


def look(captioner: Captioner, cache: Cache, compressor: LatentCompressor | None = None) -> pd.DataFrame:
    """For each scene: hit, 100 where the caption of its crop names the class; chance, the caption's probability.

    The crops are the codec's own; without a compressor the exact ones.
    """
    boxes = (object_box(one) for one in own_maps(compressor, cache)) if compressor else None
    mattes = (torch.from_numpy(np.array(mask)).float() for mask in cache.masks)

    def figures(x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        crops = [one.crop(next(boxes)) if boxes else roi_crop(one, next(mattes)) for one in to_images(x)]
        texts, chances = zip(*captioner.describe(crops), strict=True)
        named = [i >= 0 and f" {CLASSES[i]} " in f" {text} " for text, i in zip(texts, labels.tolist(), strict=True)]
        return {"hit": 100.0 * torch.tensor(named), "chance": torch.tensor(chances)}

    return each_scene(cache, figures)


def measure_captioner(captioner: Captioner, compressor: LatentCompressor, **splits: Cache) -> dict[str, Any]:
    """Share of scenes whose caption names the class: from the codec's own crops, and from exact ones."""
    figures: dict[str, Any] = {}
    for split, cache in splits.items():
        for kind, by in (("own", compressor), ("exact", None)):
            hit = look(captioner, cache, by).hit.mean()
            figures[f"names the class from the {kind} crop, {len(cache)} {split} scenes [%]"] = float(hit)
    return figures


def choose_floor(captioner: Captioner, compressor: LatentCompressor, *caches: Cache) -> tuple[float, dict[str, float]]:
    """The probability below which a caption is not to be sent, and what it does.

    Each right caption that is sent counts for it, each wrong one against it: on validation scenes, and on photographs
    that show no known object, where every caption is wrong.
    """
    every = pd.concat([look(captioner, cache, compressor) for cache in caches])
    every = every.sort_values("chance", ascending=False)
    floor = float(every.chance.iloc[np.where(every.hit > 0, 1, -1).cumsum().argmax()])
    sent = 100 * every.chance.ge(floor).groupby(every.hit > 0).mean()
    names = {True: "right captions that are sent [%]", False: "wrong captions that are sent [%]"}
    return floor, {names[right]: float(share) for right, share in sent.items()}  # type: ignore[index]


def probe_compressor(
    compressor: LatentCompressor, cache: Cache, ldm: LatentDiffusion | None, machines: dict[str, Machine]
) -> dict[str, float]:
    """Rate and error on 248 validation latents; and, with a diffusion model, what machines recognise."""
    z, m, figures = cache.latents[:248], cache.masks[:248, None], {}
    pictures = ldm and (ldm, machines, cache.captions[:248], cache.labels[:248])
    for row in evaluate_latents(compressor, z, m, (0.0, 0.2, 0.4, 0.7, 1.0), pictures=pictures):
        for name in ("bpp", "roi_mse", "background_mse", "roi_iou", *(machines if ldm else ())):
            figures[f"{name} at {row['quality']:g}"] = row[name]
    return figures


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
    looking, count = {name.removeprefix("machine_"): one for name, one in machines.items()}, min(count, CODED)
    table = summarise(evaluate(PocketScenes("test"), [(method, count)], looking, progress=False))
    figures, columns = {}, ("bpp", "roi_bits", "roi_psnr", "background_psnr", *(f"top1_{name}" for name in looking))
    for row in table.to_dict("records"):
        figures |= {f"{column} at quality {row['quality']:g}": row[column] for column in columns}
    return {"test scenes": count, **figures}
