"""What the paper scale costs: operations and memory, counted on the real architectures, and the CPU's time, measured.

The networks are built from their published configurations (assets/paper) on PyTorch's meta device, where tensors have
shapes but no numbers, and PyTorch's own counter sums the operations of matrix products, convolutions and attention (a
multiplication and an addition are two). `work` lists the passes that each job makes. Hours and dollars are extrapolated
intervals, from a low and a high share of the GPU's peak that are assumed: at best GPU and CPU work at the same time, at
worst one after the other. `python assets/paper/trial.py measure` and `cpu` measure instead, on the machine at hand.

Examples:
  slim costs                                               the plan "honest" on one A100 and 16 cores
  slim costs --plan look --gpus 4 --cores 64
  slim costs --plan all --size 512 --steps 20 --tflops 989 495 67
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import Field, dataclass, make_dataclass
from typing import Any, Literal, NamedTuple

import diffusers
import pandas as pd
import timm
import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from slimlib.compressor import CompressorConfig, LatentCompressor
from slimlib.data.imagenet import TOTAL
from slimlib.data.train import unset_options
from slimlib.measure.methods import CLASSIC_NAMES, SHRUNK, VARIANTS
from slimlib.scales import ASSETS
from slimlib.utils import option

TRAIN_IMAGES, VAL_IMAGES = TOTAL["train"], TOTAL["validation"]
CAPTION_TOKENS = 20  # the most that the captioner says
CLASSIC_FILES = 5 * len(CLASSIC_NAMES) * len(SHRUNK)  # of a picture: each codec at five qualities and three sizes
PARTS = {"VAE encoder": "vae", "VAE decoder": "vae", "UNet": "unet_{family}", "text encoder": "text_encoder_{family}"}
PARTS |= {"captioner": "captioner", "machine A": "machine_a", "machine B": "machine_b", "compressor": "compressor"}
"""The networks, those of the diffusion model first, and their configurations in assets/paper."""
THROUGH = ("compressor", "UNet", "VAE decoder", "machine A")  # what the gradient of stage 2 passes
SEEN, LED = {"machine A": 1, "machine B": 1}, {"text encoder": 1, "VAE decoder": 1}


def published(part: str) -> dict[str, Any]:
    """A configuration of assets/paper, such as "vae", "unet_sd21" or "compressor"."""
    return json.loads((ASSETS / "paper" / f"{part}.json").read_text())


def build(config: dict[str, Any]) -> nn.Module:
    """A network of a configuration with random weights; on `torch.device("meta")` without any."""
    if "_class_name" in config:
        return getattr(diffusers, config["_class_name"]).from_config(config)
    if "architectures" in config:
        kind = getattr(transformers, config["architectures"][0])
        return kind(kind.config_class.from_dict(config))
    if "architecture" in config:
        return timm.create_model(config["architecture"], num_classes=config["num_classes"])
    return LatentCompressor(CompressorConfig(**config))


CPU_SECONDS, PLANS = published("cpu_seconds"), published("plans")
"""Seconds of one core at 256 px, by `trial.py cpu`; and what the plans change in `Plan`'s defaults."""


@dataclass(frozen=True)
class PartCost:
    """What one network takes for one picture."""

    parameters: int
    forward: int  # operations
    products: int  # those of them that are matrix products and attention; all others are convolutions
    backward: int  # those of the gradient: to a frozen network's input, to the compressor's weights; 0: none is asked
    kept: int  # bytes that the gradient needs of the forward pass, in float32, with the matrices of the attention


@functools.cache
def count(part: str, size: int = 256, family: str = "sd21") -> PartCost:
    """Count one of `PARTS` for a picture of `size` pixels a side; family "sd21" or "sd15"."""
    config, kept = published(PARTS[part].format(family=family)), {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor  # the tensor too, or another storage might take its place
        return tensor

    trained = part == "compressor"  # it is small, and looks at numbers
    with torch.device("cpu" if trained else "meta"):
        network = build(config).train(trained).requires_grad_(trained)
        if part.startswith("VAE"):
            network = network.encoder if part == "VAE encoder" else network.decoder
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, FlopCounterMode(display=False) as forward:
            out = network(*_inputs(part, size, config))
            if trained:
                out = [out["z_hat"].sum() + sum(share.log2().sum() for share in out["likelihoods"].values())]
        for weight in (*network.parameters(), *network.buffers()):
            kept.pop(weight.untyped_storage()._cdata, None)
        held = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        with FlopCounterMode(display=False) as backward:
            if (first := out if isinstance(out, Tensor) else out[0]).requires_grad:
                first.sum().backward()
    parameters, operations = sum(p.numel() for p in network.parameters()), forward.get_total_flops()
    products = operations - forward.get_flop_counts()["Global"].get(torch.ops.aten.convolution, 0)
    return PartCost(parameters, operations, products, backward.get_total_flops(), held)


def _inputs(part: str, size: int, config: dict[str, Any]) -> tuple:
    """What a network is called with. A gradient is asked for the picture or latent in it, where one passes there."""
    sides = (4, size // 8), (3, size), (3, 224)
    z, x, view = (torch.zeros(1, channels, side, side, requires_grad=True) for channels, side in sides)
    words, caption = (torch.zeros(1, tokens, dtype=torch.long) for tokens in (77, CAPTION_TOKENS))
    return {
        "VAE encoder": (x,),
        "VAE decoder": (z,),
        "UNet": (z, torch.zeros(1), torch.zeros(1, 77, config.get("cross_attention_dim", 0))),
        "text encoder": (words,),
        "captioner": (torch.zeros(1, 3, 384, 384), caption),
        "compressor": (z, 0.5),
    }.get(part, (view,))


@dataclass(frozen=True)
class Plan:
    """How much is done, and by what. None of it is the paper's, which states none: ours, to be changed."""

    size: int = option(256, "side of the pictures in pixels")
    family: Literal["sd21", "sd15"] = option("sd21", "Stable Diffusion 2.1 or 1.5")
    steps: int = option(4, "denoising steps K of a decoder, of two passes each: with the caption and without", 0, 1000)
    images: int = option(5_000, "test pictures", 0)
    ablation_images: int = option(1_000, "test pictures of the ablations: all variants of one compressor", 0)
    qualities: int = option(6, "qualities that each test picture is coded at", 1, 256)
    train_images: int = option(200_000, "training pictures that are preprocessed", 0)
    compressors: int = option(2, "compressors of stage 1: weighted by region, and uniformly", 0)
    seeds: int = option(3, "compressors of stage 2, one a seed", 0)
    stage1_steps: int = option(100_000, "steps of stage 1", 0)
    stage1_batch: int = option(64, "pictures of a step of stage 1", 1)
    stage2_steps: int = option(20_000, "steps of stage 2", 0)
    stage2_batch: int = option(16, "pictures of a step of stage 2", 1)
    tflops: list[float] = option([312.0, 156.0, 19.5], "peaks of a GPU (A100) in TFLOP/s: bf16, TF32, float32", 1e-9)
    share: list[float] = option([0.2, 0.45], "shares of the peaks that are assumed, low and high", 1e-9, 1)
    gpus: int = option(1, "GPUs that share the work", 1)
    cores: int = option(16, "processor cores", 1)
    price: float = option(2.5, "dollars for an hour of one GPU and its cores", 0)

    def __post_init__(self) -> None:
        if not 64 <= self.size <= 2048 or self.size % 64:
            raise ValueError(f"argument --size: {self.size} is not a multiple of 64 pixels, from 64 to 2048")
        if len(self.tflops) != 3:
            raise ValueError(f"argument --tflops: expected three peaks, of bf16, TF32 and float32, not {self.tflops}")


class Work(NamedTuple):
    """What a job does to each of so many pictures."""

    times: int
    cpu: Mapping[str, float]  # how often which of CPU_SECONDS
    full: Mapping[str, float] = {}  # passes in float32, in which PyTorch does convolutions, not products, in TF32
    half: Mapping[str, float] = {}  # passes in bf16
    learnt: tuple[str, ...] = ()  # passed forward and back, in bf16 by autocast


def work(p: Plan) -> dict[str, Work]:
    """The jobs, as the code does them; `slim evaluate` with --bf16, of every compressor.

    Grad-CAM is one pass for the true class (the mask, or the matte of a test picture) and two for the machine's own
    guess (the crop, in preprocessing); its gradient ends in the last layer. `compress` runs the VAE's encoder, the
    compressor's encoder twice (its map cuts the crop) and the captioner for each file. `ablations` leave out the files
    that the method has. Not counted: the uncompressed pictures, and the VAE's of them.
    """
    tested, q = p.compressors + p.seeds, p.qualities
    changes = [(v, q if v.latent else 1) for name, v in VARIANTS.items() if name]
    walks = [(n, (p.steps if v.steps is None else v.steps) if v.latent else 20) for v, n in changes]
    shown, led, walked = sum(n for n, _ in walks), sum(n for n, k in walks if k), sum(n * k for n, k in walks)
    files = q * len({v.caption for v, _ in changes} - {"auto"})
    one, two = p.compressors * p.stage1_steps, p.seeds * p.stage2_steps
    look, coded = {"machine A": 3, "captioner": 1}, {"machine A": 1, "captioner": q, "compressor": 3 * q}
    seen = {"machine A": shown, "machine B": shown, "captioner": 1, "compressor": 2 * files}
    own = {"VAE encoder": files, "UNet": 2 * walked, "text encoder": led, "VAE decoder": shown}
    jobs = {
        "preprocessing": Work(p.train_images, {"open": 1, "caption": 1}, {"VAE encoder": 1, **look}),
        "stage 1": Work(one * p.stage1_batch, {"stage 1": 1 / p.stage1_batch}, learnt=THROUGH[:1]),
        "stage 2": Work(two * p.stage2_batch, {"stage 2": 1 / p.stage2_batch}, {"text encoder": 1}, {}, THROUGH),
        "files": Work(p.images * tested, {"caption": q, "code": q}, coded, {"VAE encoder": q}),
        "decoding": Work(p.images * tested * q, {"judge": 1}, SEEN, {**LED, "UNet": 2 * p.steps}),
        "ablations": Work(p.ablation_images, {"caption": 1, "code": files, "judge": shown}, seen, own),
        "classic codecs": Work(p.images, {"open": 1, "classic": 1}, dict.fromkeys(SEEN, CLASSIC_FILES)),
    }
    return {name: job for name, job in jobs.items() if job.times}


def operations(plan: Plan) -> pd.DataFrame:
    """Operations of each job for one picture: in bf16, TF32 and float32."""
    c, rows = {part: count(part, plan.size, plan.family) for part in PARTS}, {}
    for name, job in work(plan).items():
        half = sum(n * c[part].forward for part, n in job.half.items())
        half += sum(c[part].forward + c[part].backward for part in job.learnt)
        products = sum(n * c[part].products for part, n in job.full.items())
        rows[name] = half, sum(n * c[part].forward for part, n in job.full.items()) - products, products
    return pd.DataFrame.from_dict(rows, orient="index", columns=["bf16", "TF32", "float32"])


def memory(plan: Plan) -> pd.DataFrame:
    """Bytes that a GPU holds in each job: weights with autocast's copies; activations, in bf16, for each picture."""
    c, rows = {part: count(part, plan.size, plan.family) for part in PARTS}, {}
    n = {part: cost.parameters for part, cost in c.items()}
    diffusion, others = sum([*n.values()][:4]), 4 * sum([*n.values()][4:])
    trained = 20 * n["compressor"]  # with the gradient, two moments of AdamW, and the average
    fixed = {"preprocessing": 4 * (diffusion + n["captioner"] + n["machine A"]), "stage 1": trained}
    fixed["stage 2"] = 4 * (diffusion + n["machine A"]) + trained + 2 * sum(n[part] for part in THROUGH[1:])
    for name, job in work(plan).items():
        rows[name] = fixed.get(name, 2 * diffusion + others), sum(c[part].kept for part in job.learnt) // 2
    return pd.DataFrame.from_dict(rows, orient="index", columns=["weights", "a picture"])


def parts_table(size: int = 256, family: str = "sd21") -> pd.DataFrame:
    """Parameters and operations of each network; NaN where no gradient is asked for."""
    table = pd.DataFrame([count(part, size, family) for part in PARTS], index=list(PARTS)) / [1e6, *3 * [1e9], 1e6]
    table.columns = ["parameters [M]", "forward [GFLOP]", "products [GFLOP]", "backward [GFLOP]", "kept for it [MB]"]
    return table[table > 0]


def jobs_table(plan: Plan) -> pd.DataFrame:
    """All of it in handy units, and what is extrapolated (*): the best case and the worst, and what bounds a job."""
    done, once = work(plan), operations(plan)
    times = pd.Series({name: job.times for name, job in done.items()})
    table = pd.DataFrame({"times": times, "each [TFLOP]": once.sum(axis=1) / 1e12})
    table[["weights [GB]", "a picture [GB]"]] = memory(plan) / 1e9
    peak = times * (once / plan.tflops).sum(axis=1) / 1e12 / 3600
    table["GPU hours*"], table["to"] = peak / max(plan.share), peak / min(plan.share)
    grows = dict.fromkeys(("code", "judge", "classic"), (plan.size / 256) ** 2)
    core = {name: sum(n * CPU_SECONDS[a] * grows.get(a, 1) for a, n in job.cpu.items()) for name, job in done.items()}
    table["core hours*"] = times * pd.Series(core) / 3600
    cpu = table["core hours*"] / [1 if name.startswith("stage") else plan.cores for name in done]  # step after step
    low, high = table["GPU hours*"] / plan.gpus, table["to"] / plan.gpus
    table["bound by"] = ["GPU" if c < low[job] else "CPU" if c > high[job] else "either" for job, c in cpu.items()]
    table["hours*"], table["to "] = low.clip(lower=cpu), high + cpu
    table["dollars*"], table["to  "] = (plan.gpus * plan.price * table[end] for end in ("hours*", "to "))
    table.loc["all"] = table.iloc[:, 4:].sum(numeric_only=True)
    return table


def as_text(table: pd.DataFrame) -> str:
    """A table for a terminal: four digits of a number, all of a large one, "-" where there is none."""
    return table.to_string(float_format=lambda x: f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}", na_rep="-")


def _default(f: Field) -> str:
    """What the plans take for a value that is not given."""
    usual = getattr(Plan(), f.name)
    told = {name: values.get(f.name, usual) for name, values in PLANS.items()}
    differ = any(value != usual for value in told.values())
    return ", ".join(f"{name}: {value}" for name, value in told.items()) if differ else f"default: {usual}"


NAMED = "plan", Literal["look", "honest", "all"], option("honest", "values of what is not given")
Options: Any = make_dataclass("Options", [NAMED, *unset_options(Plan, _default)])


def command(options: Any) -> int:
    """Print the tables."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    plan = Plan(**{**PLANS[given.pop("plan")], **given})
    print(f"Counted, for one picture of {plan.size} px:\n\n{as_text(parts_table(plan.size, plan.family))}\n")
    print(f"Extrapolated where starred (*), for {plan}:\n\n{as_text(jobs_table(plan))}")
    return 0
