"""The UNet learns to enhance in one step; `python assets/pocket/train.py one_step` trains what lies in one_step/.

The teacher is the frozen diffusion model, which walks from z_t0 to a clean latent in many DDIM steps. Such a walk is
deterministic, and all of its points have the same end. The student is the same UNet with low-rank adapters (LoRA,
arXiv 2106.09685), and is trained to name that end from any point, in one evaluation:

    L = |z_student(z_t, t, caption) - z_end|^2 / (1 - abar_t)

with z_student where one DDIM step from t to the end lands; this is nearly the squared error in v. Regression on the
ends of whole walks is the distillation of Luhman and Luhman (arXiv 2101.02388); taking every point of a walk for one
example borrows the property on which consistency models rest (arXiv 2303.01469). The walks start where a decoder
starts: at decompressed latents with noise on them. If the codec's config asks for guidance, the teacher is guided, and
the student learns the guided end without guidance of its own (as in arXiv 2210.03142): one evaluation, not two a step.
All of this is our choice; the paper only names faster diffusion as a way on.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE as LORA_FILE
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from slimlib.compressor import LatentCompressor
from slimlib.ldm import CLEAN, LatentDiffusion, last, lay_out_for_training
from slimlib.loop import FitConfig, Losses, fit
from slimlib.utils import autocast, digest, option

FOLDER = Path(__file__).resolve().parent / "one_step"
"""Where the trained adapters lie."""
ADAPTER = "one_step"
ADAPTED = ["to_q", "to_k", "to_v", "to_out.0", "time_emb_proj", "conv1", "conv2", "conv_in", "conv_out"]
"""Layers that get an adapter: attention, and the convolutions, which alone work at the latent's full resolution."""


@dataclass
class OneStepConfig(FitConfig):
    """Settings of the distillation: those of the loop with other defaults, and of the walks."""

    steps: int = option(4_000, "optimiser steps")
    batch: int = option(32, "points of walks in each")
    lr: float = option(2e-3, "peak of the cosine rate")
    warmup: int = option(50, "steps until the peak")
    weight_decay: float = option(0.0, "AdamW's decay of the adapters")
    rank: int = option(4, "of the adapters")
    walks: int = option(4_096, "scenes, and walks of the teacher, one for each")
    teacher_steps: int = option(20, "DDIM steps K of a walk")
    t_low: int = option(20, "lowest time that walks start from, drawn evenly")
    t_high: int = option(700, "highest time that walks start from")
    drop_caption: float = option(0.1, "share of the walks without caption")

    def __post_init__(self) -> None:
        if not self.teacher_steps <= self.t_low <= self.t_high:
            raise ValueError(
                f"walks of {self.teacher_steps} steps from t = {self.t_low} to {self.t_high}: expected "
                "teacher_steps <= t_low <= t_high, for a walk cannot have more steps than levels"
            )


@dataclass(frozen=True)
class Walks:
    """Walks of the teacher, on the CPU."""

    points: Tensor  # (N, K + 1, C, h, w) float16, from z_t0 to the clean latent
    times: Tensor  # (N, K + 1) the time of each point, the last one CLEAN
    captions: list[str]


@torch.no_grad()
def make_walks(
    ldm: LatentDiffusion, compressor: LatentCompressor, z: Tensor, captions: Sequence[str], config: OneStepConfig
) -> Walks:
    """One walk of the teacher for each latent of z (N, C, h, w), from a quality, a time and a noise of its own.

    The compressor's config says whether the teacher is guided.
    """
    rng, n, points = np.random.default_rng(config.seed), len(z), []
    quality, t0 = torch.from_numpy(rng.random(n)).float(), rng.integers(config.t_low, config.t_high + 1, n).tolist()
    told = ["" if u < config.drop_caption else words for u, words in zip(rng.random(n), captions, strict=True)]
    for at in range(0, n, 64):
        some = slice(at, at + 64)
        z_hat = compressor(z[some].float().to(ldm.device), quality[some].to(ldm.device))["z_hat"]
        seeds, times = list(range(at, at + len(z_hat))), torch.tensor(t0[some])
        start = ldm.add_noise(z_hat, times, ldm.noise(z_hat.shape, seeds))
        walk = ldm.enhance(
            z_hat, told[some], t0[some], config.teacher_steps, seeds, compressor.config.walk(0.0).guidance
        )
        points.append(torch.stack([start, *walk], 1).to("cpu", torch.float16))
    return Walks(torch.cat(points), torch.tensor([ldm.times(t, config.teacher_steps) for t in t0]), told)


def student_of(ldm: LatentDiffusion, rank: int) -> LatentDiffusion:
    """A copy with trainable adapters on its UNet, laid out for training; VAE and text encoder are shared.

    The adapters start as nothing: the new student says what its teacher says in one step without guidance.
    """
    student = copy.copy(ldm)
    student.unet = copy.deepcopy(ldm.unet)
    student.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=ADAPTED), adapter_name=ADAPTER)
    lay_out_for_training(student.unet)
    return student


def distillation_loss(student: LatentDiffusion, z_t: Tensor, t: Tensor, text: Tensor, z_end: Tensor) -> Tensor:
    """Squared distance of the student's one step from the end of the walk, in units of v; a mean over everything.

    Args:
        z_t: points (B, C, h, w) of walks at times t (B,); text: embeddings; z_end: where the walks end.
    """
    error = student.ddim_step(z_t, t, CLEAN, text) - z_end
    return (error.square() / (1 - student.alpha_bar(t))).mean()


def train(student: LatentDiffusion, walks: Walks, config: FitConfig, folder: str | Path, **more: Any) -> None:
    """Train the adapters of a student in place; `folder` gets checkpoint and log, and `slimlib.loop.fit` the rest."""

    def loss_of(_: dict[str, nn.Module]) -> Losses:
        index = torch.randint(len(walks.captions), (config.batch,))
        # Early points of a walk are likelier: late ones are easy.
        place = (torch.rand(config.batch) ** 2 * (walks.points.shape[1] - 1)).long()
        z_t, z_end = (walks.points[index, at].float().to(student.device) for at in (place, -1))
        z_t, t = z_t.to(memory_format=torch.channels_last), walks.times[index, place].to(student.device)
        with torch.no_grad():
            text = student.text([walks.captions[i] for i in index])
        with autocast(student.device, cpu=True):
            return distillation_loss(student, z_t, t, text, z_end), {}

    fit(config, {"unet": student.unet}, loss_of, folder, **more)


def save_student(student: LatentDiffusion, teacher: LatentDiffusion, folder: str | Path) -> None:
    """Store the adapters of a student in half precision, as diffusers and peft read them, and whose student it is."""
    path = Path(folder) / LORA_FILE
    student.unet.to(memory_format=torch.contiguous_format)  # safetensors wants it
    student.unet.save_lora_adapter(folder, adapter_name=ADAPTER, weight_name=LORA_FILE)
    with safe_open(path, "pt") as file:
        metadata = {**file.metadata(), "teacher": unet_print(teacher)}
        tensors = {name: file.get_tensor(name).half().contiguous() for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata)


def load_student(ldm: LatentDiffusion, folder: str | Path = FOLDER) -> LatentDiffusion:
    """A copy of the diffusion model whose UNet has the stored adapters merged in, for steps=1, guidance=1.

    It is an ordinary UNet, as large and as fast as the teacher's.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: it was distilled from other weights, or does not fit the UNet.
    """
    path, student = Path(folder) / LORA_FILE, copy.copy(ldm)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: make it with python assets/pocket/train.py one_step")
    with safe_open(path, "pt") as file:
        teacher, names = (file.metadata() or {}).get("teacher"), set(file.keys())
    if teacher != unet_print(ldm):
        raise ValueError(f"{path} was distilled from other weights than this UNet's, and is good for those only")
    student.unet = copy.deepcopy(ldm.unet)
    student.unet.load_lora_adapter(Path(folder), prefix=None, weight_name=LORA_FILE, adapter_name=ADAPTER)
    if names != set(get_peft_model_state_dict(student.unet, adapter_name=ADAPTER)):
        raise ValueError(f"{path}: adapters are missing or surplus; is it complete?")
    student.unet.fuse_lora(adapter_names=[ADAPTER])
    student.unet.unload_lora()
    student.unet.requires_grad_(False)
    return student


def unet_print(ldm: LatentDiffusion) -> str:
    """A hash of the UNet's and the text encoder's weights."""
    return digest(ldm.unet, ldm.text_encoder).hex()[:16]


@torch.no_grad()
def distances(
    ldm: LatentDiffusion, student: LatentDiffusion, z_hat: Tensor, captions: Sequence[str], steps: int, guidance: float
) -> dict[str, float]:
    """How far (rms of the latent) few plain steps, and one of the student, end from the teacher's own last step.

    Measured from a low and from a high noise level on z_hat (N, C, h, w).
    """
    figures, seeds = {}, list(range(len(z_hat)))
    ways = {f"K = {k}": (ldm, k, guidance) for k in (*(k for k in (1, 2, 4) if k < steps), steps)}
    ways |= {"untrained student": (ldm, 1, 1.0), "one-step student": (student, 1, 1.0)}
    for t0 in (60, 300):
        ends = {n: last(m.enhance(z_hat, captions, t0, k, seeds, g), z_hat) for n, (m, k, g) in ways.items()}
        teacher = ends.pop(f"K = {steps}")
        for name, end in ends.items():
            distance = float((end - teacher).square().mean().sqrt())
            figures[f"distance from the teacher of {name} from t0 = {t0} (rms)"] = distance
    return figures
