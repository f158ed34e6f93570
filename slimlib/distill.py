"""Teach the UNet to enhance in one step: `python -m slimlib.distill --threads 1 --resume`.

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

import argparse
import copy
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from slimlib.compressor import LatentCompressor
from slimlib.ldm import CLEAN, LatentDiffusion, lay_out_for_training, weights_digest
from slimlib.machines import to_tensor
from slimlib.repro import (
    atomic_folder,
    autocast,
    begin,
    load_state,
    save_state,
    training_parser,
    write_card,
)
from slimlib.scales import ASSETS, Scale
from slimlib.scenes import PocketScenes, Scene
from slimlib.training import LORA_FILE, trained_part

FOLDER = ASSETS / "pocket" / "one_step"
"""Where the trained adapter lies."""
ADAPTER = "one_step"
ADAPTED = ["to_q", "to_k", "to_v", "to_out.0", "time_emb_proj", "conv1", "conv2", "conv_in", "conv_out"]
"""Layers that get an adapter: attention, and the convolutions, which alone work at the latent's full resolution."""


@dataclass(frozen=True)
class DistillConfig:
    """Settings of a distillation.

    Attributes:
        steps, batch: optimiser steps, points of walks in each.
        lr: peak of the cosine rate (AdamW).
        rank: of the adapters.
        walks: scenes, and walks of the teacher, one for each.
        teacher_steps: DDIM steps K of a walk.
        t_low, t_high: range of the times that walks start from, drawn evenly.
        drop_caption: share of the walks without caption.
        seed: of every draw.
    """

    steps: int = 800
    batch: int = 8
    lr: float = 2e-3
    rank: int = 4
    walks: int = 352
    teacher_steps: int = 20
    t_low: int = 20
    t_high: int = 700
    drop_caption: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.teacher_steps <= self.t_low <= self.t_high:
            raise ValueError(
                f"walks of {self.teacher_steps} steps from t = {self.t_low} to {self.t_high}: expected "
                "teacher_steps <= t_low <= t_high, for a walk cannot have more steps than levels"
            )


@dataclass(frozen=True)
class Walks:
    """Walks of the teacher.

    Attributes:
        points: (N, K + 1, C, h, w) float16, from z_t0 to the clean latent, on the CPU.
        times: (N, K + 1) the time of each point, the last one `slimlib.ldm.CLEAN`.
        captions: N captions.
    """

    points: Tensor
    times: Tensor
    captions: list[str]

    def __len__(self) -> int:
        return len(self.captions)


# ------------------------------------------------------------------------------------------------ teacher


@torch.no_grad()
def walk(
    ldm: LatentDiffusion, z_t0: Tensor, t0: Tensor, captions: Sequence[str], steps: int, guidance: float = 1.0
) -> tuple[Tensor, Tensor]:
    """All points of the walks from z_t0 (B, C, h, w) at times t0 (B,): (B, K + 1, C, h, w), and times (B, K + 1).

    The last point is what `LatentDiffusion.enhance` returns for the same start.
    """
    times = torch.tensor([ldm.times(int(t), steps) for t in t0], device=ldm.device)  # (B, K + 1)
    text, points = ldm.text(captions), [z_t0.to(ldm.device, ldm.dtype)]
    for t, t_next in zip(times.T[:-1], times.T[1:], strict=True):
        points.append(ldm.ddim_step(points[-1], t, t_next, text, guidance))
    return torch.stack(points, 1), times


@torch.no_grad()
def make_walks(
    ldm: LatentDiffusion,
    compressor: LatentCompressor,
    scenes: Sequence[Scene],
    config: DistillConfig,
    first: int = 0,
    progress: bool = True,
) -> Walks:
    """One walk of the teacher for each scene, from a quality, a time and a noise of its own.

    Args:
        compressor: makes the latents; its config says whether the teacher is guided.
        scenes: pictures and captions.
        first: number of the first scene; the draws for a scene depend on (seed, number) alone.
    """
    points, times, words = [], [], []
    for at in tqdm(range(0, len(scenes), config.batch), desc="walks", disable=not progress):
        group = scenes[at : at + config.batch]
        draws = [np.random.default_rng((config.seed, first + at + i)) for i in range(len(group))]
        quality = torch.tensor([rng.random() for rng in draws], device=ldm.device).float()
        t0 = torch.tensor([int(rng.integers(config.t_low, config.t_high + 1)) for rng in draws], device=ldm.device)
        captions = [
            "" if rng.random() < config.drop_caption else scene.noun for rng, scene in zip(draws, group, strict=True)
        ]
        z_hat = compressor(ldm.encode(to_tensor([scene.image for scene in group])).float(), quality)["z_hat"]
        noise = ldm.noise(z_hat.shape, [int(rng.integers(2**31)) for rng in draws])
        z_t0 = ldm.add_noise(z_hat, t0, noise)
        z, t = walk(ldm, z_t0, t0, captions, config.teacher_steps, compressor.config.guidance)
        points.append(z.to("cpu", torch.float16))
        times.append(t.cpu())
        words += captions
    return Walks(torch.cat(points), torch.cat(times), words)


# ------------------------------------------------------------------------------------------------ student


def student_of(ldm: LatentDiffusion, rank: int) -> LatentDiffusion:
    """A copy with trainable adapters on its UNet, laid out for training; VAE and text encoder are shared.

    The adapters start as nothing: the new student says what its teacher says in one step without guidance.
    """
    from peft import LoraConfig

    student = _with_unet(ldm, copy.deepcopy(ldm.unet))
    student.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=ADAPTED), adapter_name=ADAPTER)
    lay_out_for_training(student.unet)
    return student


def adapter_of(student: LatentDiffusion) -> nn.ParameterDict:
    """What is trained: the adapters' matrices by their names."""
    return trained_part(student.unet)


def distillation_loss(student: LatentDiffusion, z_t: Tensor, t: Tensor, text: Tensor, z_end: Tensor) -> Tensor:
    """Squared distance of the student's one step from the end of the walk, in units of v; a mean over everything.

    Args:
        z_t: points (B, C, h, w) of walks at times t (B,); text: embeddings; z_end: where the walks end.
    """
    error = student.ddim_step(z_t, t, CLEAN, text) - z_end
    return (error.square() / (1 - student.alpha_bar(t))).mean()


def draw_points(
    walks: Walks, batch: int, rng: np.random.Generator, device: torch.device
) -> tuple[Tensor, Tensor, list[str], Tensor]:
    """Random points of random walks: (z_t, t, captions, z_end). Early points are likelier: late ones are easy."""
    index = rng.integers(len(walks), size=batch)
    place = (rng.random(batch) ** 2 * (walks.points.shape[1] - 1)).astype(np.int64)
    z_t, z_end = (walks.points[index, at].float().to(device) for at in (place, -1))
    return z_t, walks.times[index, place].to(device), [walks.captions[i] for i in index], z_end


def train(
    student: LatentDiffusion,
    walks: Walks,
    config: DistillConfig,
    work: str | Path,
    resume: bool = True,
    progress: bool = True,
) -> tuple[dict[str, Any], list[float]]:
    """Train the adapters of a student in place; a stopped training goes on from the checkpoint in `work`.

    Returns:
        Facts for a model card, and the loss of each step taken by this call.
    """
    from slimlib.pretrain import Recipe, Run, fit

    losses: list[float] = []

    def loss_of(rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        z_t, t, captions, z_end = draw_points(walks, config.batch, rng, student.device)
        with torch.no_grad():
            text = student.text(captions)
        with autocast(student.device, cpu=True):
            loss = distillation_loss(student, z_t.to(memory_format=torch.channels_last), t, text, z_end)
        losses.append(loss.item())
        return loss, {"loss": losses[-1]}

    run = Run(
        out=Path(work),
        work=Path(work),
        steps=config.steps,
        batch=config.batch,
        seed=config.seed,
        resume=resume,
        warm=False,
        device=student.device,
        pool=len(walks),
        progress=progress,
    )
    recipe = Recipe(ADAPTER, steps=config.steps, lr=config.lr, warmup=10)
    _, facts = fit(run, recipe, {"adapter": adapter_of(student)}, loss_of)
    return facts, losses


def merge(student: LatentDiffusion) -> LatentDiffusion:
    """Add the adapters to the weights they adapt and drop them, in place: an ordinary UNet, as fast as the teacher."""
    student.unet.fuse_lora(adapter_names=[ADAPTER])
    student.unet.unload_lora()
    student.unet.requires_grad_(False)
    return student


# ------------------------------------------------------------------------------------------------ files


def save_student(student: LatentDiffusion, teacher: LatentDiffusion, folder: str | Path) -> None:
    """Store the adapters of a student that is not merged yet, in half precision, as diffusers and peft read them."""
    student.unet.to(memory_format=torch.contiguous_format)  # safetensors wants it
    with atomic_folder(folder) as new:
        student.unet.save_lora_adapter(new, adapter_name=ADAPTER, weight_name=LORA_FILE)
        with safe_open(new / LORA_FILE, "pt") as file:
            metadata = {**file.metadata(), "teacher": unet_print(teacher)}
            tensors = {name: file.get_tensor(name).half().contiguous() for name in file.keys()}  # noqa: SIM118
        save_file(tensors, new / LORA_FILE, metadata)


def load_student(ldm: LatentDiffusion, folder: str | Path = FOLDER) -> LatentDiffusion:
    """A copy of the diffusion model whose UNet has the stored adapters merged in, for steps=1, guidance=1.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: it was distilled from other weights, or does not fit the UNet.
    """
    from peft import get_peft_model_state_dict

    path = Path(folder) / LORA_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: train it with python -m slimlib.distill")
    with safe_open(path, "pt") as file:
        teacher, names = (file.metadata() or {}).get("teacher"), set(file.keys())
    if teacher != unet_print(ldm):
        raise ValueError(
            f"{path} was distilled from other weights than this UNet's: an adapter is good for its own teacher only. "
            "Train it again with python -m slimlib.distill"
        )
    student = _with_unet(ldm, copy.deepcopy(ldm.unet))
    student.unet.load_lora_adapter(Path(folder), prefix=None, weight_name=LORA_FILE, adapter_name=ADAPTER)
    expected = set(get_peft_model_state_dict(student.unet, adapter_name=ADAPTER))
    if names != expected:
        raise ValueError(f"{path}: {len(names ^ expected)} adapters are missing or surplus; is it complete?")
    return merge(student)


def unet_print(ldm: LatentDiffusion) -> str:
    """A hash of the UNet's and the text encoder's weights: of the first values of every tensor."""
    return weights_digest(ldm.unet, ldm.text_encoder).hex()[:16]


def _with_unet(ldm: LatentDiffusion, unet: nn.Module) -> LatentDiffusion:
    return LatentDiffusion(ldm.vae, unet, ldm.text_encoder, ldm.tokenizer, ldm.scheduler, ldm.device)


# ------------------------------------------------------------------------------------------------ measuring


@torch.no_grad()
def distances(
    ldm: LatentDiffusion,
    student: LatentDiffusion,
    z_hat: Tensor,
    captions: Sequence[str],
    t0: int,
    steps: Sequence[int],
    guidance: float = 1.0,
    batch: int = 8,
) -> dict[str, float]:
    """How far (rms of the latent) each number of plain steps, and the student, end from the teacher's last one.

    Args:
        z_hat: (N, C, h, w); captions: N; steps: numbers of DDIM steps, the last one the teacher's.
        guidance: of the plain steps.

    Returns:
        {"K = 1": ..., "untrained student": ..., "one-step student": ...}, without the teacher, at distance 0.
    """
    ends: dict[str, list[Tensor]] = {}
    for at in range(0, len(z_hat), batch):
        part, words = z_hat[at : at + batch], captions[at : at + batch]
        seeds = list(range(at, at + len(part)))
        for k in steps:
            ends.setdefault(f"K = {k}", []).append(ldm.enhance(part, words, t0, k, seeds, guidance))
        ends.setdefault("untrained student", []).append(ldm.enhance(part, words, t0, 1, seeds))
        ends.setdefault("one-step student", []).append(student.enhance(part, words, t0, 1, seeds))
    teacher = torch.cat(ends.pop(f"K = {steps[-1]}"))
    return {name: float((torch.cat(parts) - teacher).square().mean().sqrt()) for name, parts in ends.items()}


# ------------------------------------------------------------------------------------------------ command line


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the walks, train, measure, and publish a folder like assets/pocket/one_step."""
    a = _parse(arguments)
    given = {k: v for k, v in vars(a).items() if k in DistillConfig.__dataclass_fields__ and v is not None}
    config = DistillConfig(**given)
    device = begin(a)
    ldm = LatentDiffusion.from_pretrained(a.models / "ldm", "fp16", device)
    compressor = LatentCompressor.from_pretrained(Scale.from_name(a.models).compressor, device)
    # Everything that the work depends on names its folder: nothing of other weights or settings is ever resumed.
    facts = {**asdict(config), "unet": unet_print(ldm), "compressor": compressor.fingerprint()}
    work = a.work / "distill" / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    walks, seconds = _stored_walks(ldm, compressor, config, work / "walks", a.resume, not a.quiet)
    student = student_of(ldm, config.rank)
    trained, losses = train(student, walks, config, work, a.resume, not a.quiet)
    save_student(student, ldm, work / "adapter")
    figures = _measure(ldm, load_student(ldm, work / "adapter"), compressor, config, a.test_scenes)
    with atomic_folder(a.out) as folder:
        (folder / LORA_FILE).write_bytes((work / "adapter" / LORA_FILE).read_bytes())
    _publish(a, config, {**trained, "guidance": compressor.config.guidance}, seconds, figures)


def _stored_walks(
    ldm: LatentDiffusion, compressor: LatentCompressor, config: DistillConfig, work: Path, resume: bool, progress: bool
) -> tuple[Walks, float]:
    """The walks in parts of 32, each stored as soon as it is made; and the seconds they took."""
    scenes, size = PocketScenes("train", 128, config.seed), 32
    parts, seconds = [], 0.0
    for first in tqdm(range(0, config.walks, size), desc="walks of the teacher", disable=not progress):
        path = work / f"{first}.safetensors"
        if not (resume and path.exists()):
            start = time.monotonic()
            group = [scenes[i] for i in range(first, min(first + size, config.walks))]
            made = make_walks(ldm, compressor, group, config, first, progress=False)
            meta = {"captions": made.captions, "seconds": time.monotonic() - start}
            save_state(path, {"points": made.points, "times": made.times}, meta)
        tensors, meta = load_state(path)
        parts.append(Walks(tensors["points"], tensors["times"], meta["captions"]))
        seconds += meta["seconds"]
    points, times = torch.cat([p.points for p in parts]), torch.cat([p.times for p in parts])
    return Walks(points, times, [caption for p in parts for caption in p.captions]), seconds


@torch.no_grad()
def _measure(
    ldm: LatentDiffusion, student: LatentDiffusion, compressor: LatentCompressor, config: DistillConfig, count: int
) -> dict[str, Any]:
    """Distances from the teacher on test scenes, at a low and at a high noise level."""
    scenes = [PocketScenes("test", 128)[i] for i in range(count)]
    z = torch.cat([ldm.encode(to_tensor(scene.image)) for scene in scenes])
    figures: dict[str, Any] = {"test scenes": count}
    steps = sorted({k for k in (1, 2, 4) if k < config.teacher_steps} | {config.teacher_steps})
    z_hat, words, guidance = compressor(z.float(), 0.4)["z_hat"], [s.noun for s in scenes], compressor.config.guidance
    error = float((z_hat - z).square().mean().sqrt())
    figures["error of the decompressed latent at quality 0.4 (rms)"] = round(error, 4)
    for t0 in (60, 300):
        for name, distance in distances(ldm, student, z_hat, words, t0, steps, guidance).items():
            figures[f"distance from the teacher of {name} from t0 = {t0} (rms)"] = round(distance, 4)
    return figures


def _publish(a: argparse.Namespace, config: DistillConfig, trained: dict, seconds: float, figures: dict) -> None:
    from slimlib.pretrain import SOURCE

    facts = {
        "command": ("python -m slimlib.distill " + shlex.join(a.words)).strip(),
        **asdict(config),
        "guidance of the teacher": trained["guidance"],
        "device": trained["device"],
        "seconds": round(trained["seconds"] + seconds),
        "seconds for the walks": round(seconds),
        "data": f"{config.walks} training scenes of PocketScenes at 128 px, one walk each",
    }
    about = (
        f"LoRA adapters of rank {config.rank} on the pocket UNet, trained to name in one evaluation where the UNet's "
        f"own {config.teacher_steps} DDIM steps end. Load with slimlib.distill.load_student, or with diffusers' "
        "load_lora_adapter(folder, prefix=None)."
    )
    write_card(a.out, "One-step enhancer", about, facts, figures, SOURCE)
    print(json.dumps(figures, indent=1))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    default = DistillConfig()
    parser = training_parser("slimlib.distill", __doc__)
    option = parser.add_argument
    option("--out", type=Path, default=FOLDER, help="folder of the result (default: %(default)s)")
    option("--models", type=Path, default=ASSETS / "pocket", help="folder like assets/pocket (default: %(default)s)")
    option("--steps", type=int, help=f"optimiser steps (default: {default.steps})")
    option("--batch", type=int, help=f"points of walks a step (default: {default.batch})")
    option("--lr", type=float, help=f"peak of the rate (default: {default.lr:g})")
    option("--rank", type=int, help=f"rank of the adapters (default: {default.rank})")
    option("--walks", type=int, help=f"walks of the teacher (default: {default.walks})")
    option("--teacher-steps", type=int, help=f"DDIM steps of a walk (default: {default.teacher_steps})")
    option("--t-high", type=int, help=f"highest time that a walk starts from (default: {default.t_high})")
    option("--test-scenes", type=int, default=31, help="test scenes measured for the card (default: %(default)s)")
    a = parser.parse_args(arguments)
    a.words = sys.argv[1:] if arguments is None else list(arguments)
    return a


if __name__ == "__main__":
    main()
