"""Train the latent compressor: `python -m slimlib.training --stage 1|2`.

Stage 1: rate against fidelity, weighted by the region of interest.

    L = R + lambda(q) * D + beta * BCE(roi_logits, m),    D = mean(W * (z - z_hat)^2),  W = w_bg + (1 - w_bg) m

Stage 2: from the weights of stage 1, with what the diffusion model and a machine make of the latent.

    L = R + lambda(q) * (D + a * |v - v_theta(z_t)|^2) + b * sqrt(lambda(q)) * T(x_hat) + beta * BCE(roi_logits, m)

z_t is z_hat with noise up to t = t0(q), the time that decoding starts from; one step of the frozen UNet gives
z_tilde, the frozen VAE decoder x_hat, and T is the cross-entropy of machine A (or its feature error). Gradients
pass through both networks into the compressor. Machine B is never trained against.

Both stages run the same loop (`fit`), for qualities q drawn anew for every item, with lambda log-spaced between
`lambda_min` (q = 0) and `lambda_max` (q = 1). R is in bits per pixel of the image. W is divided by its mean over the
image, so that lambda means the same for every image and for uniform weights (w_bg = 1).
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from slimlib.compressor import CompressorConfig, LatentCompressor
from slimlib.repro import (
    atomic_folder,
    autocast,
    begin,
    describe_device,
    load_state,
    move_average,
    pack_training,
    pick_device,
    save_state,
    training_parser,
    unpack_training,
    write_card,
)
from slimlib.roi import roi_weights

if TYPE_CHECKING:
    from slimlib.ldm import LatentDiffusion
    from slimlib.machines import Machine
    from slimlib.pool import ScenePool

KNOT_SPEED = 5  # the knots over quality learn this much faster than the weights
QUALITIES = (0.0, 0.25, 0.5, 0.75, 1.0)
NEWER = {"accumulate": 1, "ema": 0.0, "checkpointing": False}
"""Settings that older checkpoints do not name, and what they were trained with."""
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
"""Ways to share the work that are refused; see `_accelerator`."""
LORA_FILE = "pytorch_lora_weights.safetensors"

LossOf = Callable[[nn.Module], tuple[Tensor, dict[str, Tensor]]]
"""Draws a batch from PyTorch's generator, runs the network on it, returns the loss and its parts for the log."""


@dataclass
class Stage1Config:
    """Settings of stage 1. Unknown keys are refused.

    Attributes:
        steps, batch: optimiser steps; latents that go through the networks together.
        accumulate: batches whose gradients make one step, on each process. A step sees batch * accumulate * processes
            latents, and the same ones whichever way that product comes about.
        ema: decay of the moving average of the weights that becomes the result; 0 for the last weights themselves.
        lr, warmup: peak of the cosine rate (AdamW), steps until it.
        w_bg: weight of the error outside the region of interest; 1 is the uniform comparison.
        lambda_min, lambda_max: weight of the error at quality 0 and 1.
        beta: weight of the auxiliary head that learns to see the region of interest.
        clip: largest norm of the gradient.
        save_every, log_every: steps between checkpoints, between lines of the log.
        seed: every draw is a function of (seed, step, number of the batch in the step).
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
    accumulate: int = 1
    ema: float = 0.0

    @classmethod
    def from_dict(cls, values: dict) -> Stage1Config:
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"Unknown settings in {cls.__name__}: {unknown}.")
        return cls(**values)


@dataclass
class Stage2Config(Stage1Config):
    """Settings of stage 2: those of stage 1 with other defaults, and the weights of the new terms (our choice).

    Attributes:
        a: weight of the diffusion term, in units of the latent's mean squared error.
        b: weight of the task term, for a nat of cross-entropy or a relative feature error of 1. It goes with the root
            of lambda, so that the machine counts most where the latent cannot be faithful anyway. Where it can, a
            strong task term only finds what this one machine likes (our choice; measured on another machine).
        view: how far the machine's view of a picture is moved, turned over and scaled at random, as a share of its side
            (see `random_view`); 0 for the picture as it is.
        task: "ce" for machine A's cross-entropy against the true label, "features" for the error in its
            features (those Grad-CAM looks at) against those of the original picture.
        drop_caption: share of the items that are shown to the UNet without caption.
        lora: rank of the adapters on the UNet's attention that are trained along; 0 for none.
        checkpointing: keep little of UNet and VAE decoder for the way back, and compute it again: less memory.
    """

    steps: int = 1200
    batch: int = 8
    lr: float = 3e-4
    warmup: int = 30
    save_every: int = 50
    log_every: int = 10
    a: float = 0.02
    b: float = 0.15
    view: float = 0.12
    task: str = "ce"
    drop_caption: float = 0.1
    lora: int = 0
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.task not in ("ce", "features"):
            raise ValueError(f'task is {self.task!r}; expected "ce" or "features".')


# ------------------------------------------------------------------------------------------------ the loop


def fit(
    config: Stage1Config,
    modules: dict[str, nn.Module],
    groups: list[dict],
    loss_of: LossOf,
    out_folder: Path,
    settings: dict,
    accelerator: Accelerator,
    resume: bool,
    progress: bool,
    max_seconds: float | None,
) -> None:
    """The training loop of both stages: AdamW, cosine rate, checkpoints, a log; resumes exactly.

    Args:
        modules: what is trained and stored in the checkpoint; "compressor" is what `loss_of` is called with, "average",
            where there is one, the moving average of its weights.
        groups: parameter groups; "speed" multiplies a group's rate.
        settings: stored in the checkpoint, and compared when resuming.
    """
    start, first = time.monotonic(), 0
    checkpoint, main = out_folder / "checkpoint.safetensors", accelerator.is_main_process
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98))
    parameters = [p for group in groups for p in group["params"]]
    if resume and checkpoint.exists():
        first = _load_checkpoint(checkpoint, modules, optimizer, settings)
    log = _Log(out_folder / "log.csv", first) if main else None
    network, stepper = accelerator.prepare(modules["compressor"], optimizer)
    bar = tqdm(range(first, config.steps), initial=first, total=config.steps, disable=not (progress and main))
    for step in bar:
        rate = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["speed"]
        stepper.zero_grad(set_to_none=True)
        shown: dict[str, Tensor] = {}
        for turn in range(config.accumulate):
            number = accelerator.process_index * config.accumulate + turn
            torch.manual_seed(_step_seed(config.seed, step, number))
            last = turn + 1 == config.accumulate
            with nullcontext() if last else accelerator.no_sync(network):
                loss, parts = loss_of(network)
                accelerator.backward(loss / config.accumulate)
            for name, value in {"loss": loss, **parts}.items():
                shown[name] = shown.get(name, 0) + value.detach() / config.accumulate
        norm = accelerator.clip_grad_norm_(parameters, config.clip)
        if bool(norm.isfinite()):  # one bad batch must not end a long run
            stepper.step()
            if "average" in modules:
                move_average(modules["average"], modules["compressor"], config.ema)

        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            means = accelerator.reduce(shown, "mean")
            if log:
                log.write(done, {**means, "rate": rate})
            bar.set_postfix({name: f"{value.item():.4g}" for name, value in means.items()})
        out_of_time = max_seconds is not None and _any(accelerator, time.monotonic() - start > max_seconds)
        if main and (done % config.save_every == 0 or done == config.steps or out_of_time):
            tensors, meta = pack_training(modules, optimizer)
            save_state(checkpoint, tensors, {**meta, "step": done, "settings": settings})
        if out_of_time:
            break
    accelerator.wait_for_everyone()


def _with_average(config: Stage1Config, model: LatentCompressor) -> dict[str, nn.Module]:
    """What `fit` trains: the compressor, and where the config asks for one its moving average."""
    average = {"average": copy.deepcopy(model).requires_grad_(False)} if config.ema else {}
    return {"compressor": model, **average}


def learning_rate(step: int, config: Stage1Config) -> float:
    """Linear warm-up, then half a cosine down to a hundredth of the peak."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    part = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, part))))


def parameter_groups(model: LatentCompressor) -> list[dict]:
    """Weights, and the knots over quality (gains, priors): those move on a logarithmic scale, and far."""
    weights: list[nn.Parameter] = []
    knots: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            of_knots = name.startswith(("log_", "gate_depth")) or name.endswith(".values")
            (knots if of_knots else weights).append(parameter)
    return [
        {"params": weights, "speed": 1.0, "weight_decay": 1e-4},
        {"params": knots, "speed": KNOT_SPEED, "weight_decay": 0.0},
    ]


# ------------------------------------------------------------------------------------------------ stage 1


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
    model and optimiser, and each step draws its batch, qualities and noise from (seed, step, process) alone.

    Args:
        config: the settings.
        latents: (N, C, h, w) float16 or float32, an array or a memory map; scaled to about unit variance.
        masks: (N, 1, h, w) the region m on the latent grid, uint8 0..255 or floats 0..1.
        out_folder: gets checkpoint.safetensors, log.csv, and config.json + model.safetensors at the end.
        compressor: what to start from: a model, an architecture, or the default.
        resume: go on from the checkpoint in `out_folder` if there is one.
        max_seconds: stop (with a checkpoint) after this time; call again to go on.
        device: the best one at hand if None; several processes (`torchrun`) take one each.

    Raises:
        ValueError: latents and masks do not fit each other, or the checkpoint has other settings.
    """
    if len(latents) != len(masks) or latents.shape[2:] != masks.shape[2:] or masks.shape[1] != 1:
        raise ValueError(f"Latents {latents.shape} and masks {masks.shape} do not belong together.")
    accelerator, device = _accelerator(device)
    torch.manual_seed(config.seed)
    model = compressor if isinstance(compressor, LatentCompressor) else LatentCompressor(compressor)
    model = model.to(device).train()

    def loss_of(network: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        z, m, quality = draw_batch(latents, masks, config.batch, device)
        with autocast(device):
            out = network(z, quality)
        return stage1_loss(out, z, m, quality, config, model.config.factor)

    settings = {"stage1": asdict(config), "compressor": asdict(model.config)}
    groups = parameter_groups(model)
    limits = (resume, progress, max_seconds)
    modules = _with_average(config, model)
    fit(config, modules, groups, loss_of, Path(out_folder), settings, accelerator, *limits)
    return _finish(modules, Path(out_folder), accelerator)


def stage1_loss(
    out: dict, z: Tensor, m: Tensor, quality: Tensor, config: Stage1Config, factor: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of stage 1 for a batch, and its parts (averages over the batch).

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
    index, quality = _draw(len(latents), batch)
    return *_pick(latents, masks, index, device), quality.to(device)


def masks_to_float(masks: np.ndarray) -> Tensor:
    m = torch.tensor(np.asarray(masks))
    return m.float() / 255 if m.dtype == torch.uint8 else m.float()


# ------------------------------------------------------------------------------------------------ stage 2


def train_stage2(
    config: Stage2Config,
    latents: np.ndarray,
    pool: ScenePool,
    ldm: LatentDiffusion,
    machine: Machine,
    out_folder: str | Path,
    compressor: LatentCompressor,
    resume: bool = True,
    progress: bool = True,
    max_seconds: float | None = None,
    device: str | torch.device | None = None,
) -> LatentCompressor:
    """Train a compressor of stage 1 on through the frozen UNet, VAE decoder and machine.

    Checkpoints, resuming, log and result are those of `train_stage1`. With `config.lora` the UNet's adapters are
    trained along, stay in `ldm`, and are stored in `out_folder`/unet_lora; they start anew for every call that
    does not resume.

    Args:
        config: the settings.
        latents: (N, C, h, w) of the pool's scenes.
        pool: masks, labels and nouns (the captions) of the scenes, and their pictures for task "features".
        ldm: the diffusion model; it takes a layout and an attention that train faster, its results stay the same.
        machine: machine A.
        compressor: what to start from; trained in place.
        out_folder, resume, progress, max_seconds, device: as for `train_stage1`.

    Raises:
        ValueError: latents and pool do not fit each other, or the checkpoint has other settings.
    """
    if len(latents) != len(pool) or latents.shape[2:] != pool.masks.shape[1:]:
        raise ValueError(f"Latents {latents.shape} and masks {pool.masks.shape} do not belong together.")
    accelerator, device = _accelerator(device)
    out_folder, factor = Path(out_folder), compressor.config.factor
    model, ldm, machine = (
        compressor.to(device).train(),
        make_trainable(ldm.to(device), config.checkpointing),
        machine.to(device),
    )
    torch.manual_seed(config.seed)
    modules, groups = _with_average(config, model), parameter_groups(model)
    if config.lora:
        adapters = add_lora(ldm, config.lora)
        modules["lora"] = adapters
        groups.append({"params": list(adapters.parameters()), "speed": 1.0, "weight_decay": 0.0})
        ldm.unet = accelerator.prepare(ldm.unet)  # several processes share the adapters' gradients, too

    def loss_of(network: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        index, quality = _draw(len(latents), config.batch)
        z, m = _pick(latents, pool.masks[:, None], index, device)
        quality = quality.to(device)
        captions = ["" if torch.rand(()) < config.drop_caption else pool.nouns[i] for i in index]
        noise = torch.randn(z.shape).to(device)
        with autocast(device):
            out = network(z, quality)
        t = start_times(model.config, quality)
        z_tilde, x_hat = decode_once(ldm, out["z_hat"].float(), t, captions, noise)
        labels = torch.from_numpy(pool.labels[index]).to(device)
        x = pool.batch(np.asarray(index)).to(device) if config.task == "features" else None
        view, x = random_view(config.view, x_hat, x)
        task = task_loss(machine, view, labels, x)
        diffusion = diffusion_loss(ldm, out["z_hat"], z_tilde, t)
        return stage2_loss(out, z, m, quality, diffusion, task, config, factor)

    settings = {"stage2": asdict(config), "compressor": asdict(model.config)}
    limits = (resume, progress, max_seconds)
    fit(config, modules, groups, loss_of, out_folder, settings, accelerator, *limits)
    if config.lora:
        ldm.unet = accelerator.unwrap_model(ldm.unet)
        if accelerator.is_main_process:
            ldm.unet.save_lora_adapter(out_folder / "unet_lora", adapter_name="slim", weight_name=LORA_FILE)
    return _finish(modules, out_folder, accelerator)


def decode_once(
    ldm: LatentDiffusion, z_hat: Tensor, t: Tensor, captions: Sequence[str], noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Noise z_hat up to t, take it back in one step, decode: (z_tilde, x_hat), with gradients to z_hat.

    The decoder of the codec takes several steps; one has the same ends and a fraction of the cost, and its
    gradient does not have to pass through the UNet several times (our choice). Where t is 0 z_hat stays.

    Args:
        z_hat, noise: (B, C, h, w); t: (B,) times, captions: B.

    Returns:
        z_tilde (B, C, h, w); x_hat (B, 3, H, W) in [0, 1].
    """
    with torch.no_grad():
        text = ldm.text(captions)
    with autocast(z_hat.device, cpu=True):
        z_t = ldm.add_noise(z_hat, t, noise).to(memory_format=torch.channels_last)
        z_tilde = torch.where(t.view(-1, 1, 1, 1) > 0, ldm.predict_x0(z_t, t, text).float(), z_hat)
        x_hat = ldm.decode(z_tilde.to(memory_format=torch.channels_last))
    return z_tilde, x_hat.float()


def diffusion_loss(ldm: LatentDiffusion, z_hat: Tensor, z_tilde: Tensor, t: Tensor) -> Tensor:
    """|v - v_theta(z_t)|^2 of each item, written as |z_hat - z_tilde|^2 / (1 - abar_t): (B,).

    With z_t = s z_hat + r eps, and z_tilde and eps_theta what the UNet takes z_t apart into, s (z_hat - z_tilde) =
    r (eps_theta - eps), so that the errors in v, in eps and in the clean latent are multiples of one another. No
    gradient goes through z_tilde (our choice): the value is lowest for flat latents, which are the easiest to denoise,
    and a gradient through the UNet would be one of that value. What is left pulls z_hat towards what the UNet takes it
    for, as in score distillation (Poole et al., arXiv 2209.14988, eq. 3).
    """
    spread = (1 - ldm.alpha_bar(t)).clamp_min(1e-3)
    return ((z_hat - z_tilde.detach()).square() / spread).mean((1, 2, 3))


def random_view(most: float, x_hat: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Move, scale and mirror each picture at random, both of a pair alike.

    A gradient through one network finds patterns that work for this network and at this place only. What survives a
    shift and another size is more of what other machines see, too (Xie et al., arXiv 1803.06978, on attacks that
    transfer; our choice).

    Args:
        most: largest shift as a share of the side, and largest change of the size.
        x_hat, x: (B, 3, H, W).
    """
    if not most:
        return x_hat, x
    n = len(x_hat)
    size = 1 + most * (2 * torch.rand(n) - 1)
    mirror = torch.where(torch.rand(n) < 0.5, -1.0, 1.0)
    shift = 2 * most * (2 * torch.rand(n, 2) - 1)  # the coordinates of a grid run from -1 to 1
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = size * mirror, size, shift
    grid = F.affine_grid(theta.to(x_hat.device), list(x_hat.shape), align_corners=False)

    def seen(picture: Tensor) -> Tensor:
        return F.grid_sample(picture, grid, padding_mode="reflection", align_corners=False)

    return seen(x_hat), None if x is None else seen(x)


def task_loss(machine: Machine, x_hat: Tensor, labels: Tensor, x: Tensor | None = None) -> Tensor:
    """What machine A misses in x_hat, for each item: (B,).

    Args:
        x_hat: decoded pictures (B, 3, H, W) in [0, 1]; labels: (B,).
        x: the originals. Given, the loss is the squared error of the machine's features (`cam_layer`) relative to
            their energy (feature matching, as in TransTIC, arXiv 2306.05085, and Adapt-ICMH, arXiv 2407.09853),
            and no label is used; else the cross-entropy.
    """
    with autocast(x_hat.device, cpu=True):
        if x is None:
            return F.cross_entropy(machine(x_hat).float(), labels, reduction="none")
        with torch.no_grad():
            wanted = spatial_features(machine, x).float()
        found = spatial_features(machine, x_hat).float()
    energy = wanted.square().mean((1, 2, 3)).clamp_min(1e-6)
    return (found - wanted).square().mean((1, 2, 3)) / energy


def spatial_features(machine: Machine, x: Tensor) -> Tensor:
    """What leaves the machine's `cam_layer`: (B, channels, rows, columns)."""
    seen: dict[str, Tensor] = {}
    handle = machine.cam_layer.register_forward_hook(lambda _module, _inputs, output: seen.update(output=output))
    try:
        machine(x)
    finally:
        handle.remove()
    return seen["output"]


def stage2_loss(
    out: dict,
    z: Tensor,
    m: Tensor,
    quality: Tensor,
    diffusion: Tensor,
    task: Tensor,
    config: Stage2Config,
    factor: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of stage 1 and the two new terms, (B,) each, likewise divided by sqrt(lambda); and the parts."""
    loss, parts = stage1_loss(out, z, m, quality, config, factor)
    loss = loss + (rate_weight(quality, config).sqrt() * config.a * diffusion + config.b * task).mean()
    return loss, {**parts, "diffusion": diffusion.mean(), "task": task.mean()}


def start_times(config: CompressorConfig, quality: Tensor) -> Tensor:
    """t0 of the compressor's table for each quality: (B,), on the same device."""
    return torch.tensor([config.t0(q) for q in quality.tolist()], device=quality.device)


def make_trainable(ldm: LatentDiffusion, checkpointing: bool = False) -> LatentDiffusion:
    """Lay the frozen networks out for gradients to pass through them fast, or (checkpointing) with little memory.

    In place; their results stay the same.
    """
    from slimlib.ldm import lay_out_for_training

    lay_out_for_training(ldm.unet)
    ldm.vae.to(memory_format=torch.channels_last)
    for network in (ldm.unet, ldm.vae):
        (network.enable_gradient_checkpointing if checkpointing else network.disable_gradient_checkpointing)()
    return ldm


def add_lora(ldm: LatentDiffusion, rank: int) -> nn.ParameterDict:
    """Add adapters of a rank to the UNet's attention (LoRA, arXiv 2106.09685); what is to be trained."""
    from peft import LoraConfig

    if "slim" in getattr(ldm.unet, "peft_config", {}):
        ldm.unet.delete_adapters("slim")
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    ldm.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), adapter_name="slim")
    return trained_part(ldm.unet)


def trained_part(unet: nn.Module) -> nn.ParameterDict:
    """The parameters of a UNet that are trained, by their names: its adapters, where all else is frozen."""
    return nn.ParameterDict({n.replace(".", "/"): p for n, p in unet.named_parameters() if p.requires_grad})


# ------------------------------------------------------------------------------------------------ measuring


@torch.no_grad()
def evaluate_latents(
    compressor: LatentCompressor,
    z: np.ndarray | Tensor,
    m: np.ndarray | Tensor,
    qualities: Sequence[float] = QUALITIES,
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
    z = torch.tensor(np.asarray(z)) if isinstance(z, np.ndarray) else z
    m = masks_to_float(m) if isinstance(m, np.ndarray) else m.float()
    device, rows = compressor.device, []
    with _evaluating(compressor):
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
    return rows


@torch.no_grad()
def evaluate_pictures(
    compressor: LatentCompressor,
    ldm: LatentDiffusion,
    machines: dict[str, Machine],
    latents: np.ndarray,
    pool: ScenePool,
    qualities: Sequence[float] = QUALITIES,
    scenes: int | None = None,
    steps: int | None = None,
    batch: int = 16,
) -> list[dict[str, float]]:
    """What machines recognise in the decoded pictures, at estimated rates; the quick form of slimlib.evaluation.

    Pictures are made as the codec makes them: rounded latent, t0 of the compressor's table, several steps with
    the noun as the caption, VAE decoder. The caption's bits are not counted.

    Args:
        machines: name to machine.
        latents, pool: of the test scenes; the first `scenes` of them are used (None: all).
        steps: denoising steps; None: the compressor's default, 0: none.

    Returns:
        For each quality: quality; bpp; and for each machine, under its name, the top-1 accuracy in percent.
    """
    config, rows = compressor.config, []
    n = len(latents) if scenes is None else min(scenes, len(latents))
    steps = config.steps if steps is None else steps
    with _evaluating(compressor):
        for quality in qualities:
            bits, hits = 0.0, dict.fromkeys(machines, 0)
            for at in range(0, n, batch):
                rows_of = slice(at, min(at + batch, n))
                z = torch.tensor(np.asarray(latents[rows_of])).float().to(compressor.device)
                out = compressor(z, quality)
                bits += float(bits_per_pixel(out["likelihoods"], z.shape[-2:], config.factor).sum())
                seeds, captions = range(at, at + len(z)), pool.nouns[rows_of]
                z_tilde = ldm.enhance(out["z_hat"], captions, config.t0(quality), steps, list(seeds), config.guidance)
                x_hat = ldm.decode(z_tilde)
                for name, machine in machines.items():
                    guess = machine(x_hat).argmax(1).cpu().numpy()
                    hits[name] += int((guess == pool.labels[rows_of]).sum())
            accuracy = {name: 100 * count / n for name, count in hits.items()}
            rows.append({"quality": float(quality), "bpp": bits / n, **accuracy})
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


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


# ------------------------------------------------------------------------------------------------ helpers


def _accelerator(device: str | torch.device | None) -> tuple[Accelerator, torch.device]:
    """One process computes on the device asked for; of several, each on the one that accelerate gives it."""
    wanted = pick_device(device)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    accelerator = Accelerator(cpu=several and wanted.type == "cpu", device_placement=False)
    if accelerator.distributed_type in SHARDED:
        raise ValueError(
            f"accelerate is configured for {accelerator.distributed_type.value}, which cuts weights into shards: "
            "the checkpoint would hold one of them. Two million parameters need none: launch with plain DDP (MULTI_GPU)"
        )
    return accelerator, accelerator.device if several else wanted


def _any(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is up on any process: all of them must stop at the same step."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)


def _finish(modules: dict[str, nn.Module], out_folder: Path, accelerator: Accelerator) -> LatentCompressor:
    model = modules["compressor"]
    assert isinstance(model, LatentCompressor)
    if "average" in modules:
        model.load_state_dict(modules["average"].state_dict())
    model.eval()
    if accelerator.is_main_process:
        model.save_pretrained(out_folder)
    accelerator.wait_for_everyone()
    return model


def _draw(n: int, batch: int) -> tuple[list[int], Tensor]:
    index = torch.randint(n, (batch,)).tolist()
    # One quality from each of `batch` equal parts of [0, 1]: steadier gradients than independent draws.
    return index, (torch.randperm(batch) + torch.rand(batch)) / batch


def _pick(latents: np.ndarray, masks: np.ndarray, index: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    z = torch.from_numpy(np.stack([latents[i] for i in index])).float()
    return z.to(device), masks_to_float(np.stack([masks[i] for i in index])).to(device)


def _step_seed(seed: int, step: int, number: int = 0) -> int:
    return (seed * 1_000_003 + step + 1 + number * 1_000_000_007) % 2**63


def _load_checkpoint(
    path: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, settings: dict
) -> int:
    tensors, meta = load_state(path)
    saved = meta["settings"]
    differing = [
        f"{part}.{key}: {saved.get(part, {}).get(key)} there, {value} asked for"
        for part, values in settings.items()
        for key, value in values.items()
        if saved.get(part, {}).get(key, NEWER.get(key)) != value
    ]
    if differing:
        raise ValueError(f"{path} was trained with other settings ({'; '.join(differing)}). Use another folder.")
    unpack_training(tensors, meta, modules, optimizer)
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
        path.unlink(missing_ok=True)
        for row in kept:
            self._append(row)
            self.before = float(row["seconds"])

    def write(self, step: int, values: dict[str, Tensor | float]) -> None:
        row = {"step": str(step), "seconds": f"{self.before + time.monotonic() - self.start:.1f}"}
        self._append(row | {name: f"{float(value):.6g}" for name, value in values.items()})

    def _append(self, row: dict[str, str]) -> None:
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)


# ------------------------------------------------------------------------------------------------ command line


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, then publish a folder like assets/pocket/compressor with a model card."""
    from slimlib.pretrain import Run, cached_latents

    a = _parse(arguments)
    config = _config(a)
    if a.cache:
        return _train_on_cache(a, config)
    work, device = a.work / "training" / a.out.name, begin(a)
    run = Run(
        out=a.models,
        work=a.work,
        steps=None,
        batch=config.batch,
        seed=a.seed,
        resume=a.resume,
        warm=False,
        device=device,
        pool=a.pool,
        progress=not a.quiet,
    )
    pool, start = run.train_pool(), time.monotonic()
    latents = cached_latents(run, pool, "train")
    limits: dict[str, Any] = {"resume": a.resume, "progress": not a.quiet, "max_seconds": a.max_seconds}
    model = LatentCompressor.from_pretrained(a.start, device) if a.stage == 2 or a.warm else None
    if isinstance(config, Stage2Config):
        assert model is not None
        ldm, machine = _load_ldm(a.models, device), _load_machine(a.models, "machine_a", device)
        train_stage2(config, latents, pool, ldm, machine, work, model, device=a.device, **limits)
    else:
        model = train_stage1(config, latents, pool.masks[:, None], work, model, device=a.device, **limits)
        ldm = _load_ldm(a.models, device)
    if not Accelerator().is_main_process:
        return
    done = load_state(work / "checkpoint.safetensors")[1]["step"]
    if done < config.steps:
        print(f"stopped after {done} of {config.steps} steps; the same command with --resume goes on")
    else:
        _publish(a, config, model, ldm, run, len(pool), time.monotonic() - start)


def _train_on_cache(a: argparse.Namespace, config: Stage1Config) -> None:
    """Train at any scale on what `slimlib.preprocess` has cached; weights and caption prior go to --out."""
    from slimlib.ldm import LatentDiffusion
    from slimlib.machines import load_machine
    from slimlib.paper import COMPRESSOR
    from slimlib.preprocess import Cache
    from slimlib.scales import Scale

    start = time.monotonic()
    cache, scale, work, device = (
        Cache.open(a.cache),
        Scale.from_name(a.scale),
        a.work / "training" / a.out.name,
        begin(a),
    )
    limits: dict[str, Any] = {
        "resume": a.resume,
        "progress": not a.quiet,
        "max_seconds": a.max_seconds,
        "device": a.device,
    }
    if isinstance(config, Stage2Config):
        ldm = LatentDiffusion.from_pretrained(scale.ldm, scale.variant, device)
        if ldm.latent_channels != cache.latents.shape[1]:
            raise SystemExit(f"{a.cache} holds latents of {cache.latents.shape[1]} channels, not those of {scale.ldm}")
        machine, model = load_machine(scale.machine_a, device), LatentCompressor.from_pretrained(a.start, device)
        train_stage2(config, cache.latents, cache.pool, ldm, machine, work, model, **limits)
    else:
        first = LatentCompressor.from_pretrained(a.start, device) if a.warm else COMPRESSOR
        model = train_stage1(config, cache.latents, cache.pool.masks[:, None], work, first, **limits)
    done = load_state(work / "checkpoint.safetensors")[1]["step"]
    if Accelerator().is_main_process and done == config.steps:
        with atomic_folder(a.out) as folder:
            _save_weights(folder, model, work)
            cache.save_prior(folder)
            data = json.loads((a.cache / "about.json").read_text())
            pictures = f"{data['pictures']} pictures ({data['data']}), {data['protocol']} to {data['size']} px"
            facts = _facts(a, config, device, time.monotonic() - start, pictures)
            about = "Mean-scale hyperprior on the latent, one model for all rates; not measured here."
            write_card(folder, f"Compressor, stage {a.stage}", about, facts, {}, f"Latents of {data['models'][0]}.")


def _config(a: argparse.Namespace) -> Stage1Config:
    """The stage's defaults, what the start was trained with, and what the command line says, the last one first."""
    kind = Stage2Config if a.stage == 2 else Stage1Config
    known = {field.name for field in fields(kind)}
    values: dict[str, Any] = {}
    card = a.start / "card.json"
    if a.stage == 2 and card.exists():  # otherwise a quality would change its meaning, and its rate, in between
        training = json.loads(card.read_text())["training"]
        values |= {name: training[name] for name in ("w_bg", "lambda_min", "lambda_max") if name in training}
    given = {name: value for name, value in vars(a).items() if value is not None}
    foreign = [
        name for name in ("a", "b", "view", "task", "lora", "checkpointing") if name in given and name not in known
    ]
    if foreign:
        raise SystemExit(f"stage {a.stage} has no {', '.join('--' + name for name in foreign)}")
    return kind.from_dict(values | {name: value for name, value in given.items() if name in known})


def _load_ldm(models: Path, device: torch.device) -> LatentDiffusion:
    from slimlib.ldm import LatentDiffusion

    return LatentDiffusion.from_pretrained(models / "ldm", "fp16", device)


def _load_machine(models: Path, name: str, device: torch.device) -> Machine:
    from slimlib.machines import load_machine

    return load_machine(str(models / name), device)


def _publish(
    a: argparse.Namespace,
    config: Stage1Config,
    model: LatentCompressor,
    ldm: LatentDiffusion,
    run: Any,
    scenes: int,
    seconds: float,
) -> None:
    """Write weights, caption prior and card into --out, and measure both on the test scenes."""
    from slimlib.codec import CAPTION_PRIOR
    from slimlib.pretrain import SOURCE, cached_latents

    work = run.work / "training" / a.out.name
    with atomic_folder(a.out) as folder:
        _save_weights(folder, model, work)
        (folder / CAPTION_PRIOR).write_bytes((a.start / CAPTION_PRIOR).read_bytes())
    test = run.test_pool()
    latents = cached_latents(run, test, "test")
    machines = {name: _load_machine(a.models, name, run.device) for name in ("machine_a", "machine_b")}
    figures: dict[str, Any] = {"test scenes (latents)": len(test)}
    for row in evaluate_latents(model, latents, test.masks[:, None]):
        for key in ("bpp", "mse", "roi_mse", "background_mse", "roi_bits"):
            figures[f"{key} at quality {row['quality']:g}"] = round(row[key], 5)
    figures["test scenes (pictures)"] = min(a.test_scenes, len(test))
    for row in evaluate_pictures(model, ldm, machines, latents, test, scenes=a.test_scenes):
        for name in machines:
            figures[f"top-1 of {name} at quality {row['quality']:g} [%]"] = round(row[name], 2)
    first = "random weights" if a.stage == 1 and not a.warm else f"{a.start.parent.name}/{a.start.name}"
    data = f"{scenes} training scenes of PocketScenes at 128 px"
    facts = _facts(a, config, run.device, seconds, data, start=first)
    about = "Mean-scale hyperprior on the latent, one model for all rates, " + (
        "stage 1." if a.stage == 1 else "stage 2: trained on through the frozen UNet, VAE decoder and machine A."
    )
    write_card(a.out, f"Compressor, stage {a.stage}", about, facts, figures, SOURCE)
    print(json.dumps(figures, indent=1))


def _save_weights(folder: Path, model: LatentCompressor, work: Path) -> None:
    """The compressor, and the UNet's adapters where they were trained along."""
    model.save_pretrained(folder)
    if (work / "unet_lora").is_dir():
        shutil.copytree(work / "unet_lora", folder / "unet_lora")


def _facts(
    a: argparse.Namespace, config: Stage1Config, device: torch.device, seconds: float, data: str, **more: str
) -> dict[str, Any]:
    """What a card says of the training."""
    return {
        "command": "python -m slimlib.training " + shlex.join(a.words),
        **more,
        **{k: v for k, v in asdict(config).items() if k not in ("save_every", "log_every")},
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "device": describe_device(device),
        "seconds": round(seconds),
        "data": data,
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    from slimlib.scales import ASSETS

    pocket = ASSETS / "pocket"
    several = "Several processes: torchrun --standalone --nproc_per_node N -m slimlib.training ..."
    parser = training_parser("slimlib.training", __doc__, several)
    option = parser.add_argument
    option("--stage", type=int, choices=(1, 2), required=True, help="what to train")
    option("--out", type=Path, required=True, help="folder of the result, such as runs/compressor_stage2")
    option(
        "--start",
        type=Path,
        default=pocket / "compressor",
        help="compressor that stage 2 starts from; its caption prior goes along (default: %(default)s)",
    )
    option("--warm", action="store_true", help="stage 1 starts from --start, too, not from random weights")
    option("--cache", type=Path, help="train on what slimlib.preprocess left in this folder, not on scenes")
    option("--scale", default="paper", help="with --cache: the models, as paper or a folder (default: %(default)s)")
    option("--models", type=Path, default=pocket, help="folder of ldm/ and the machines (default: %(default)s)")
    option("--steps", type=int, help=f"optimiser steps (default: {Stage1Config.steps}, {Stage2Config.steps})")
    option("--batch", type=int, help=f"scenes a step (default: {Stage1Config.batch}, {Stage2Config.batch})")
    option("--lr", type=float, help=f"peak of the rate (default: {Stage1Config.lr:g}, {Stage2Config.lr:g})")
    option("--w-bg", type=float, help="weight of the background's error; 1: uniform (default: the start's, 0.05)")
    option("--lambda-min", type=float, help="weight of the error at quality 0 (default: the start's)")
    option("--lambda-max", type=float, help="weight of the error at quality 1 (default: the start's)")
    option("--a", type=float, help=f"stage 2: weight of the diffusion term (default: {Stage2Config.a})")
    option("--b", type=float, help=f"stage 2: weight of the task term (default: {Stage2Config.b})")
    option("--view", type=float, help=f"stage 2: how far the machine's view is moved (default: {Stage2Config.view})")
    option("--task", choices=("ce", "features"), help="stage 2: cross-entropy, or features of machine A (default: ce)")
    option("--lora", type=int, metavar="RANK", help="stage 2: train adapters on the UNet along (default: none)")
    option("--accumulate", type=int, help="batches whose gradients make one step, on each process (default: 1)")
    option("--ema", type=float, help="decay of the average of the weights, such as 0.999 (default: none)")
    option("--checkpointing", action="store_true", default=None, help="stage 2: less memory, more time")
    option("--max-seconds", type=float, help="stop after this time with a checkpoint; --resume goes on")
    option("--save-every", type=int, help="steps between checkpoints")
    option("--pool", type=int, default=16_368, help="number of composed training scenes (default: %(default)s)")
    option("--test-scenes", type=int, default=248, help="test pictures that are decoded for the card (%(default)s)")
    a = parser.parse_args(arguments)
    a.words = sys.argv[1:] if arguments is None else list(arguments)
    return a


if __name__ == "__main__":
    main()
