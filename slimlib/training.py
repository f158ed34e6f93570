"""Train the latent compressor in two stages, by one loop.

Stage 1: rate against fidelity, weighted by the region of interest.

    L = R + lambda(q) * D + beta * BCE(roi_logits, m),    D = mean(W * (z - z_hat)^2),  W = w_bg + (1 - w_bg) m

Stage 2: from the weights of stage 1, with what the diffusion model and a machine make of the latent.

    L = R + lambda(q) * (D + a * |v - v_theta(z_t)|^2) + b * sqrt(lambda(q)) * T(x_hat) + beta * BCE(roi_logits, m)

z_t is z_hat with noise up to t = t0(q), the time that decoding starts from; one step of the frozen UNet gives
z_tilde, the frozen VAE decoder x_hat, and T is the cross-entropy of the teachers (or the error in their features), a
mean over them: a pattern that pleases one network only does not pay. Gradients pass through both networks into the
compressor. The judges are never trained against.

Both stages run the same loop (`fit`), for qualities q drawn anew for every item, with lambda log-spaced between
`lambda_min` (q = 0) and `lambda_max` (q = 1). R is in bits per pixel of the image. W is divided by its mean over the
image, so that lambda means the same for every image and for uniform weights (w_bg = 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimlib.compressor import CompressorConfig, LatentCompressor
from slimlib.ldm import LatentDiffusion, lay_out_for_training
from slimlib.loop import FitConfig, Losses, fit
from slimlib.machines import Machine
from slimlib.roi import roi_weights
from slimlib.utils import Device, autocast, option, pick_device, rank_and_world

KNOT_SPEED = 5  # the knots over quality learn this much faster than the weights


@dataclass
class Stage1Config(FitConfig):
    """Settings of stage 1: those of the loop, and the weights of the loss."""

    w_bg: float = option(0.05, "weight of the error outside the region of interest; 1 is the uniform comparison", 0)
    lambda_min: float = option(0.015, "weight of the error at quality 0", 1e-9)
    lambda_max: float = option(4.5, "weight of the error at quality 1", 1e-9)
    beta: float = option(0.1, "weight of the auxiliary head that learns to see the region of interest", 0)

    def __post_init__(self) -> None:
        if self.lambda_min > self.lambda_max:
            raise ValueError(f"lambda_min, {self.lambda_min:g}, is above lambda_max, {self.lambda_max:g}: swap them")


@dataclass
class Stage2Config(Stage1Config):
    """Settings of stage 2: those of stage 1 with other defaults, and the weights of the new terms (our choice)."""

    steps: int = option(1200, "optimiser steps", 1)
    batch: int = option(8, "items that go through the networks together", 1, 10**6)
    lr: float = option(3e-4, "peak of the cosine rate (AdamW)", 1e-12, 100)
    warmup: int = option(30, "steps until the peak", 0)
    save_every: int = option(50, "steps between checkpoints", 1)
    log_every: int = option(10, "steps between lines of the log", 1)
    a: float = option(0.02, "weight of the diffusion term, in units of the latent's mean squared error", 0)
    # It goes with the root of lambda, so that the machine counts most where the latent cannot be faithful anyway. Where
    # it can, a strong task term only finds what this one machine likes (our choice; measured on another machine).
    b: float = option(0.15, "weight of the task term, for a nat of cross-entropy or a relative feature error of 1", 0)
    view: float = option(0.12, "largest random shift and scaling of the machine's view: share of the side", 0, 0.99)
    task: str = option("ce", "ce: the teachers' cross-entropy; features: the error in their features; no label is used")
    drop_caption: float = option(0.1, "share of the items that are shown to the UNet without caption", 0, 1)
    checkpointing: bool = option(False, "compute parts of UNet and VAE decoder twice: less memory, more time")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task not in ("ce", "features"):
            raise ValueError(f'task is {self.task!r}; expected "ce" or "features".')


def train_stage1(
    config: Stage1Config,
    latents: np.ndarray,
    masks: np.ndarray,
    out: str | Path,
    compressor: LatentCompressor | CompressorConfig | None = None,
    device: Device = None,
    **limits: Any,
) -> LatentCompressor:
    """Train a compressor on cached latents.

    Args:
        latents: (N, C, h, w) float16 or float32, an array or a memory map; scaled to about unit variance.
        masks: (N, h, w) the region m on the latent grid, uint8 0..255 or floats 0..1.
        out: gets the checkpoint, the log, and at the end config.json and model.safetensors.
        compressor: what to start from: a model (trained in place), an architecture, or the default.
        device, limits: as for `fit` (resume, progress, max_seconds, settings: what else a checkpoint belongs to).

    Raises:
        ValueError: latents and masks do not fit each other, or the checkpoint has other settings.
    """
    _must_fit(latents, masks)
    device = pick_device(device)
    torch.manual_seed(config.seed)
    model = compressor if isinstance(compressor, LatentCompressor) else LatentCompressor(compressor)
    model = model.to(device)

    def loss_of(networks: dict[str, nn.Module]) -> Losses:
        _, z, m, quality = draw_batch(latents, masks, config.batch, device)
        with autocast(device):
            out = networks["compressor"](z, quality)
        return stage1_loss(out, z, m, quality, config, model.config.factor)

    groups = parameter_groups(model, config.weight_decay)
    settings = {"compressor": asdict(model.config), **limits.pop("settings", {})}
    fit(config, {"compressor": model}, loss_of, out, groups=groups, settings=settings, device=device, **limits)
    if rank_and_world()[0] == 0:
        model.save_pretrained(out)
    return model


def stage1_loss(out: dict, z: Tensor, m: Tensor, quality: Tensor, config: Stage1Config, factor: int) -> Losses:
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


def draw_batch(latents: np.ndarray, masks: np.ndarray, batch: int, device: torch.device) -> tuple[Tensor, ...]:
    """A random batch (with replacement): indices, z (B, C, h, w), m (B, 1, h, w), qualities (B,) spread over [0, 1]."""
    index = torch.randint(len(latents), (batch,))
    # One quality from each of `batch` equal parts of [0, 1]: steadier gradients than independent draws.
    quality = (torch.randperm(batch) + torch.rand(batch)) / batch
    return index, pick(latents, index, device), pick(masks[:, None], index, device), quality.to(device)


def pick(array: np.ndarray, index: Tensor, device: torch.device) -> Tensor:
    """Rows of an array or memory map as floats on the device; bytes (masks, pictures) become 0 to 1."""
    rows = torch.from_numpy(np.stack([array[i] for i in index.tolist()]))
    return (rows.float() / 255 if rows.dtype == torch.uint8 else rows.float()).to(device)


def parameter_groups(model: LatentCompressor, weight_decay: float = 1e-4) -> list[dict]:
    """Weights, and the knots over quality (gains, priors): those move on a logarithmic scale, and far."""
    parts: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts[name.startswith(("log_", "gate_depth")) or name.endswith(".values")].append(parameter)
    return [
        {"params": parts[False], "speed": 1.0, "weight_decay": weight_decay},
        {"params": parts[True], "speed": KNOT_SPEED, "weight_decay": 0.0},
    ]


def train_stage2(
    config: Stage2Config,
    latents: np.ndarray,
    masks: np.ndarray,
    labels: np.ndarray,
    captions: Sequence[str],
    ldm: LatentDiffusion,
    teachers: Sequence[Machine],
    out: str | Path,
    compressor: LatentCompressor,
    images: np.ndarray | None = None,
    device: Device = None,
    **limits: Any,
) -> LatentCompressor:
    """Train a compressor of stage 1 on through the frozen UNet, VAE decoder and teachers.

    Whatever parameters of `ldm.unet` ask for a gradient (adapters, which somebody has put there) are trained along.

    Args:
        latents, masks, out, device, limits: as for `train_stage1`.
        labels, captions: (N,) class and words of each picture; label -1 where it shows no known object.
        ldm: the diffusion model; it takes a layout and an attention that train faster, its results stay the same.
        teachers: classifiers, such as machine A.
        compressor: what to start from; trained in place.
        images: (N, 3, H, W) uint8, the pictures; needed for task "features".

    Raises:
        ValueError: the arrays do not fit each other, there are no pictures for task "features", or the checkpoint has
            other settings.
    """
    _must_fit(latents, masks, labels, captions)
    if config.task == "features" and (images is None or len(images) != len(latents)):
        raise ValueError('task "features" compares pictures, and there are none for these latents; take task "ce"')
    device, unet = pick_device(device), ldm.unet
    model, ldm, teachers = compressor.to(device), ldm.to(device), [machine.to(device) for machine in teachers]
    lay_out_for_training(unet, ldm.vae, checkpointing=config.checkpointing)
    modules: dict[str, nn.Module] = {"compressor": model}
    groups = parameter_groups(model, config.weight_decay)
    if adapters := [p for p in unet.parameters() if p.requires_grad]:
        modules["unet"] = unet
        groups.append({"params": adapters, "speed": 1.0, "weight_decay": 0.0})

    def loss_of(networks: dict[str, nn.Module]) -> Losses:
        ldm.unet = networks.get("unet", unet)  # several processes share the adapters' gradients, too
        index, z, m, quality = draw_batch(latents, masks, config.batch, device)
        words = ["" if torch.rand(()) < config.drop_caption else captions[i] for i in index.tolist()]
        noise = torch.randn(z.shape).to(device)
        with autocast(device):
            out = networks["compressor"](z, quality)
        t = start_times(model.config, quality)
        z_tilde, x_hat = decode_once(ldm, out["z_hat"].float(), t, words, noise)
        originals = [pick(images, index, device)] if config.task == "features" else []  # type: ignore[arg-type]
        view, *x = random_view(config.view, x_hat, *originals)
        task = task_loss(teachers, view, torch.as_tensor(labels[index.numpy()], device=device), *x)
        diffusion = diffusion_loss(ldm, out["z_hat"], z_tilde, t)
        loss, parts = stage1_loss(out, z, m, quality, config, model.config.factor)
        # The new terms are divided by sqrt(lambda), too.
        loss = loss + (rate_weight(quality, config).sqrt() * config.a * diffusion + config.b * task).mean()
        return loss, {**parts, "diffusion": diffusion.mean(), "task": task.mean()}

    settings = {"compressor": asdict(model.config), **limits.pop("settings", {})}
    fit(config, modules, loss_of, out, groups=groups, settings=settings, device=device, **limits)
    ldm.unet = unet
    if rank_and_world()[0] == 0:
        model.save_pretrained(out)
    return model


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
        z_tilde = torch.where(t.view(-1, 1, 1, 1) > 0, ldm.predict(z_t, t, text)[0].float(), z_hat)
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


def random_view(most: float, *pictures: Tensor) -> Sequence[Tensor]:
    """Move, scale and mirror each picture of a batch at random; of several batches (B, 3, H, W) the pairs alike.

    A gradient through one network finds patterns that work for this network and at this place only. What survives a
    shift and another size is more of what other machines see, too (Xie et al., arXiv 1803.06978, on attacks that
    transfer; our choice).

    Args:
        most: largest shift as a share of the side, and largest change of the size; 0: the pictures as they are.
    """
    if not most:
        return pictures
    n = len(pictures[0])
    size = 1 + most * (2 * torch.rand(n) - 1)
    mirror = torch.where(torch.rand(n) < 0.5, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, :, 2] = 2 * most * (2 * torch.rand(n, 2) - 1)  # the shift: coordinates of a grid run from -1 to 1
    theta[:, 0, 0], theta[:, 1, 1] = size * mirror, size
    grid = F.affine_grid(theta.to(pictures[0].device), list(pictures[0].shape), align_corners=False)
    return [F.grid_sample(x, grid, padding_mode="reflection", align_corners=False) for x in pictures]


def task_loss(teachers: Sequence[Machine], x_hat: Tensor, labels: Tensor, x: Tensor | None = None) -> Tensor:
    """What the teachers miss in x_hat, for each item, a mean over them: (B,).

    Args:
        x_hat: decoded pictures (B, 3, H, W) in [0, 1].
        labels: (B,); the loss is 0 where it is -1.
        x: the originals. Given, the loss is the squared error of each machine's features (`cam_layer`) relative to
            their energy (feature matching, as in TransTIC, arXiv 2306.05085, and Adapt-ICMH, arXiv 2407.09853),
            and no label is used; else the cross-entropy.
    """
    losses = []
    with autocast(x_hat.device, cpu=True):
        for machine in teachers:
            if x is None:
                losses.append(F.cross_entropy(machine(x_hat).float(), labels, reduction="none", ignore_index=-1))
                continue
            seen: list[Tensor] = []  # (B, channels, rows, columns), of x and of x_hat
            handle = machine.cam_layer.register_forward_hook(lambda _m, _x, out, seen=seen: seen.append(out.float()))
            with torch.no_grad():
                machine(x)
            machine(x_hat)
            handle.remove()
            wanted, found = seen
            energy = wanted.square().mean((1, 2, 3)).clamp_min(1e-6)
            losses.append((found - wanted).square().mean((1, 2, 3)) / energy)
    return torch.stack(losses).mean(0)


def start_times(config: CompressorConfig, quality: Tensor) -> Tensor:
    """The time that decoding starts from at each quality, 0 where it takes no steps: (B,), on the same device."""
    walks = [config.walk(q) for q in quality.tolist()]
    return torch.tensor([walk.t0 if walk.steps else 0 for walk in walks], device=quality.device)


def _must_fit(latents: np.ndarray, masks: np.ndarray, *others: Any) -> None:
    shapes = [latents.shape, masks.shape, *((len(other),) for other in others)]
    if len({shape[0] for shape in shapes}) > 1 or latents.shape[2:] != masks.shape[1:]:
        raise ValueError(f"Latents, masks and what else was given do not belong together: {shapes}.")
