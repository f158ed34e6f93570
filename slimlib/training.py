"""Training of the latent compressor, stage 1: rate against fidelity, weighted by the region of interest.

    L = R + lambda(q) * mean(W * (z - z_hat)^2) + beta * BCE(roi_logits, m),    W = w_bg + (1 - w_bg) m

for qualities q drawn anew for every item, lambda log-spaced between `lambda_min` (q = 0) and `lambda_max`
(q = 1). R is in bits per pixel of the image. W is divided by its mean over the image, so that lambda means
the same for every image and for uniform weights (w_bg = 1).
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from slimlib.compressor import CompressorConfig, LatentCompressor
from slimlib.repro import autocast, load_state, pack_training, pick_device, save_state, unpack_training
from slimlib.roi import roi_weights

KNOT_SPEED = 5  # the knots over quality learn this much faster than the weights
LOG_COLUMNS = ("step", "seconds", "loss", "bpp", "weighted_mse", "roi_bce", "rate")


@dataclass
class Stage1Config:
    """Settings of stage 1. Unknown keys are refused.

    Attributes:
        steps, batch: optimiser steps, latents in each.
        lr, warmup: peak of the cosine rate (AdamW), steps until it.
        w_bg: weight of the error outside the region of interest; 1 is the uniform comparison.
        lambda_min, lambda_max: weight of the error at quality 0 and 1.
        beta: weight of the auxiliary head that learns to see the region of interest.
        clip: largest norm of the gradient.
        save_every, log_every: steps between checkpoints, between lines of the log.
        seed: every draw is a function of (seed, step).
    """

    steps: int = 8000
    batch: int = 32
    lr: float = 1e-3
    warmup: int = 200
    w_bg: float = 0.05
    lambda_min: float = 0.015
    lambda_max: float = 4.5
    beta: float = 0.1
    clip: float = 1.0
    save_every: int = 500
    log_every: int = 20
    seed: int = 0

    @classmethod
    def from_dict(cls, values: dict) -> Stage1Config:
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"Unknown settings of stage 1: {unknown}.")
        return cls(**values)


def train_stage1(
    config: Stage1Config,
    latents: np.ndarray,
    masks: np.ndarray,
    out_folder: str | Path,
    compressor: LatentCompressor | CompressorConfig | None = None,
    resume: bool = True,
    progress: bool = True,
    max_seconds: float | None = None,
    device: str | torch.device | None = None,
) -> LatentCompressor:
    """Train a compressor on cached latents; the result is also in `out_folder` (with checkpoint and log).

    Interrupted at any step and started again it ends with the same weights as in one go: the checkpoint holds
    model and optimiser, and each step draws its batch, qualities and noise from (seed, step) alone.

    Args:
        config: the settings.
        latents: (N, C, h, w) float16 or float32, an array or a memory map; scaled to about unit variance.
        masks: (N, 1, h, w) the region m on the latent grid, uint8 0..255 or floats 0..1.
        out_folder: gets checkpoint.safetensors, log.csv, and config.json + model.safetensors at the end.
        compressor: what to start from: a model, an architecture, or the default.
        resume: go on from the checkpoint in `out_folder` if there is one.
        max_seconds: stop (with a checkpoint) after this time; call again to go on.

    Raises:
        ValueError: latents and masks do not fit each other, or the checkpoint has other settings.
    """
    if len(latents) != len(masks) or latents.shape[2:] != masks.shape[2:] or masks.shape[1] != 1:
        raise ValueError(f"Latents {latents.shape} and masks {masks.shape} do not belong together.")
    out_folder, start, first = Path(out_folder), time.monotonic(), 0
    device = pick_device(device)
    torch.manual_seed(config.seed)
    model = compressor if isinstance(compressor, LatentCompressor) else LatentCompressor(compressor)
    model = model.to(device).train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameter_groups(model, config), betas=(0.9, 0.98))
    checkpoint = out_folder / "checkpoint.safetensors"
    settings = {"stage1": asdict(config), "compressor": asdict(model.config)}
    if resume and checkpoint.exists():
        first = _load_checkpoint(checkpoint, model, optimizer, settings)
    log = _Log(out_folder / "log.csv", first)

    bar = tqdm(
        range(first, config.steps), initial=first, total=config.steps, disable=not progress, desc="stage 1"
    )
    for step in bar:
        torch.manual_seed(_step_seed(config.seed, step))
        z, m, quality = draw_batch(latents, masks, config.batch, device)
        rate = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = rate * (KNOT_SPEED if group["weight_decay"] == 0 else 1)
        with autocast(device):
            out = model(z, quality)
        loss, parts = stage1_loss(out, z, m, quality, config, model.config.factor)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        if bool(norm.isfinite()):  # one bad batch must not end a long run
            optimizer.step()

        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            log.write(done, {"loss": loss, **parts, "rate": rate})
            bar.set_postfix(loss=f"{loss.item():.4f}", bpp=f"{parts['bpp'].item():.4f}")
        out_of_time = max_seconds is not None and time.monotonic() - start > max_seconds
        if done % config.save_every == 0 or done == config.steps or out_of_time:
            tensors, meta = pack_training({"compressor": model}, optimizer)
            save_state(checkpoint, tensors, {**meta, "step": done, "settings": settings})
        if out_of_time:
            break
    model.eval().save_pretrained(out_folder)
    return model


def parameter_groups(model: LatentCompressor, config: Stage1Config) -> list[dict]:
    """Weights, and the knots over quality (gains, priors): those move on a logarithmic scale, and far."""
    weights: list[torch.nn.Parameter] = []
    knots: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        of_knots = name.startswith(("log_", "gate_depth")) or name.endswith(".values")
        (knots if of_knots else weights).append(parameter)
    return [
        {"params": weights, "lr": config.lr, "weight_decay": 1e-4},
        {"params": knots, "lr": config.lr * KNOT_SPEED, "weight_decay": 0.0},
    ]


def stage1_loss(
    out: dict, z: Tensor, m: Tensor, quality: Tensor, config: Stage1Config, factor: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the module's docstring for a batch, and its parts (averages over the batch).

    Each item's R + lambda D is divided by sqrt(lambda): over two decades of lambda, the high qualities would
    otherwise drown the low ones. For a fixed quality that is a constant and moves no optimum.

    Args:
        out: what `LatentCompressor.forward` returned.
        z, m, quality: (B, C, h, w), (B, 1, h, w), (B,).
        factor: pixels per latent cell along one side.
    """
    bpp = bits_per_pixel(out["likelihoods"], z.shape[-2:], factor)
    weights = error_weights(m, config.w_bg)
    distortion = (weights * (z - out["z_hat"]).square()).mean((1, 2, 3))
    lam = rate_weight(quality, config)
    roi_bce = F.binary_cross_entropy_with_logits(out["roi_logits"], m)
    loss = ((bpp + lam * distortion) / lam.sqrt()).mean() + config.beta * roi_bce
    return loss, {"bpp": bpp.mean(), "weighted_mse": distortion.mean(), "roi_bce": roi_bce}


def error_weights(m: Tensor, w_bg: float) -> Tensor:
    """`roi_weights` divided by their mean over each image: (B, 1, h, w)."""
    weights = roi_weights(m, w_bg)
    return weights / weights.mean((1, 2, 3), keepdim=True).clamp_min(1e-6)


def rate_weight(quality: Tensor, config: Stage1Config) -> Tensor:
    """lambda(q): log-spaced between lambda_min and lambda_max."""
    low, high = math.log(config.lambda_min), math.log(config.lambda_max)
    return torch.exp(low + (high - low) * quality)


def bits_per_pixel(likelihoods: dict[str, Tensor], grid: Sequence[int], factor: int) -> Tensor:
    """Estimated bits per pixel of each item: (B,)."""
    bits = sum(-p.float().log2().sum((1, 2, 3)) for p in likelihoods.values())
    return bits / (grid[0] * grid[1] * factor**2)


def draw_batch(
    latents: np.ndarray, masks: np.ndarray, batch: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """A random batch (with replacement) of latents, masks in [0, 1], and qualities spread over [0, 1]."""
    index = torch.randint(len(latents), (batch,)).tolist()
    # One quality from each of `batch` equal parts of [0, 1]: steadier gradients than independent draws.
    quality = (torch.randperm(batch) + torch.rand(batch)) / batch
    z = torch.from_numpy(np.stack([latents[i] for i in index])).float()
    return z.to(device), masks_to_float(np.stack([masks[i] for i in index])).to(device), quality.to(device)


def masks_to_float(masks: np.ndarray) -> Tensor:
    m = torch.from_numpy(np.ascontiguousarray(masks))
    return m.float() / 255 if m.dtype == torch.uint8 else m.float()


def learning_rate(step: int, config: Stage1Config) -> float:
    """Linear warm-up, then half a cosine down to a hundredth of the peak."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    part = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, part))))


@torch.no_grad()
def evaluate_latents(
    compressor: LatentCompressor,
    z: np.ndarray | Tensor,
    m: np.ndarray | Tensor,
    qualities: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    batch: int = 64,
) -> list[dict[str, float]]:
    """Measure a compressor on latents, in evaluation mode: real rounding, estimated rates.

    Args:
        z: (N, C, h, w) latents; m: (N, 1, h, w) masks, as for `train_stage1`.

    Returns:
        For each quality: quality; bpp (estimate, without the header) and its hyper-latent's part h_bpp;
        mse, roi_mse, background_mse of the latent, averaged with weights 1, m, 1 - m;
        roi_bits, the share of the latent's bits spent inside the region; roi_area, its share of the area;
        roi_iou, agreement of the predicted map with m, both cut at one half.
    """
    z = torch.from_numpy(np.ascontiguousarray(z)) if isinstance(z, np.ndarray) else z
    m = masks_to_float(m) if isinstance(m, np.ndarray) else m.float()
    was_training, device, rows = compressor.training, compressor.device, []
    compressor.eval()
    for quality in qualities:
        sums: dict[str, float] = {}
        for at in range(0, len(z), batch):
            x, mask = z[at : at + batch].float().to(device), m[at : at + batch].to(device)
            for name, value in _sums(compressor(x, quality), x, mask, compressor.config).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        pixels, cells = sums["cells"] * compressor.config.factor**2, sums["cells"]
        rows.append(
            {
                "quality": float(quality),
                "bpp": (sums["bits"] + sums["h_bits"]) / pixels,
                "h_bpp": sums["h_bits"] / pixels,
                "mse": sums["error"] / cells,
                "roi_mse": sums["roi_error"] / max(sums["roi"], 1e-9),
                "background_mse": (sums["error"] - sums["roi_error"]) / max(cells - sums["roi"], 1e-9),
                "roi_bits": sums["roi_bits"] / max(sums["bits"], 1e-9),
                "roi_area": sums["roi"] / cells,
                "roi_iou": sums["both"] / max(sums["either"], 1e-9),
            }
        )
    compressor.train(was_training)
    return rows


def _sums(out: dict, z: Tensor, m: Tensor, config: CompressorConfig) -> dict[str, Tensor]:
    error = (z - out["z_hat"]).square().mean(1, keepdim=True)
    bits = -out["likelihoods"]["y"].log2().sum(1, keepdim=True)  # (B, 1, h/4, w/4)
    coarse = F.avg_pool2d(m, 2**config.stages)
    seen, true = out["roi_logits"] > 0, m > 0.5
    return {
        "cells": torch.tensor(m.numel()),
        "bits": bits.sum(),
        "h_bits": -out["likelihoods"]["h"].log2().sum(),
        "roi_bits": (bits * coarse).sum(),
        "error": error.sum(),
        "roi_error": (error * m).sum(),
        "roi": m.sum(),
        "both": (seen & true).sum(),
        "either": (seen | true).sum(),
    }


def _step_seed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step + 1) % 2**63


def _load_checkpoint(
    path: Path, model: LatentCompressor, optimizer: torch.optim.Optimizer, settings: dict
) -> int:
    tensors, meta = load_state(path)
    saved = meta["settings"]
    differing = [
        f"{part}.{key}: {saved[part].get(key)} there, {value} asked for"
        for part, values in settings.items()
        for key, value in values.items()
        if saved[part].get(key) != value
    ]
    if differing:
        raise ValueError(
            f"{path} was trained with other settings ({'; '.join(differing)}). Use another folder."
        )
    unpack_training(tensors, meta, {"compressor": model}, optimizer)
    return int(meta["step"])


class _Log:
    """CSV log; lines beyond the step that training resumes from are dropped."""

    def __init__(self, path: Path, first: int) -> None:
        self.path, self.start, self.before = path, time.monotonic(), 0.0
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if first and path.exists():
            with path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) <= first]
            self.before = float(kept[-1]["seconds"]) if kept else 0.0
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, LOG_COLUMNS)
            writer.writeheader()
            writer.writerows(kept)

    def write(self, step: int, values: dict[str, Tensor | float]) -> None:
        row = {"step": step, "seconds": f"{self.before + time.monotonic() - self.start:.1f}"}
        row |= {name: f"{float(torch.as_tensor(value).detach()):.6g}" for name, value in values.items()}
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, LOG_COLUMNS).writerow(row)
