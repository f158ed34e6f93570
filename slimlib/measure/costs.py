"""What the paper scale costs: parameters, operations and memory, counted on the real architectures.

The networks are built from their published configurations (assets/paper) on PyTorch's meta device, where tensors have
shapes but no numbers, and PyTorch's own counter sums the operations of matrix products, convolutions and attention (a
multiplication and an addition are two). So parameters, operations and bytes kept for a backward pass are counted, and
nothing is downloaded. Whatever is in hours or dollars is extrapolated: operations divided by a rate that is assumed.
`python assets/paper/trial.py` measures that rate, with random weights or real ones.

Examples:
  slim costs                                               one A100 in bf16 at 30% of its peak
  slim costs --size 512 --steps 20 --gpus 4
  slim costs --tflops 19.5 --share 0.6                     the same in float32
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import diffusers
import pandas as pd
import timm
import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from slimlib.compressor import CompressorConfig, LatentCompressor
from slimlib.scales import ASSETS
from slimlib.utils import option

TRAIN_IMAGES, VAL_IMAGES = 1_281_167, 50_000
CAPTION_TOKENS = 12  # start and end counted: one pass of the captioner's decoder each, without what it has cached
PARTS = {"VAE encoder": "vae", "VAE decoder": "vae", "UNet": "unet_{family}", "text encoder": "text_encoder_{family}"}
PARTS |= {"captioner": "captioner", "machine A": "machine_a", "machine B": "machine_b", "compressor": "compressor"}
"""The networks, and their configurations in assets/paper."""


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
    return LatentCompressor(CompressorConfig.from_dict(config))


@dataclass(frozen=True)
class PartCost:
    """What one network takes for one picture."""

    parameters: int
    forward: int  # operations
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
    parameters = sum(p.numel() for p in network.parameters())
    return PartCost(parameters, forward.get_total_flops(), backward.get_total_flops(), held)


def _inputs(part: str, size: int, config: dict[str, Any]) -> tuple:
    """What a network is called with. A gradient is asked for the picture or latent in it, where one passes there."""
    sides = (4, size // 8), (3, size), (3, 224)
    z, x, view = (torch.zeros(1, channels, side, side, requires_grad=True) for channels, side in sides)
    words, caption = (torch.zeros(1, tokens, dtype=torch.long) for tokens in (77, CAPTION_TOKENS))
    inputs: dict[str, tuple] = {
        "VAE encoder": (x,),
        "VAE decoder": (z,),
        "UNet": (z, torch.zeros(1), torch.zeros(1, 77, config.get("cross_attention_dim", 0))),
        "text encoder": (words,),
        "captioner": (torch.zeros(1, 3, 384, 384), caption),
        "compressor": (z, 0.5),
    }
    return inputs.get(part, (view,))


@dataclass(frozen=True)
class Plan:
    """How much is done. None of it is the paper's, which states none: ours, to be changed."""

    size: int = option(256, "side of the pictures in pixels")
    family: Literal["sd21", "sd15"] = option("sd21", "Stable Diffusion 2.1 or 1.5")
    steps: int = option(4, "denoising steps K of a decoder")
    guided: bool = option(True, "guidance, which doubles the work of the UNet")
    images: int = option(VAL_IMAGES, "test pictures")
    qualities: int = option(6, "qualities that each test picture is coded at")
    train_images: int = option(TRAIN_IMAGES, "training pictures that are preprocessed")
    stage1_steps: int = option(100_000, "steps of stage 1")
    stage1_batch: int = option(64, "pictures of a step of stage 1")
    stage2_steps: int = option(20_000, "steps of stage 2")
    stage2_batch: int = option(16, "pictures of a step of stage 2")

    def __post_init__(self) -> None:
        if self.size < 64 or self.size % 64:
            raise ValueError(f"argument --size: {self.size} is not a multiple of 64 pixels")


def jobs(plan: Plan) -> pd.DataFrame:
    """Preprocessing, both stages, and the evaluation of one method without ablations.

    Returns:
        A row for each job, with `times`: how often it is done; `operations` of doing it once; `weights` and
        `activations`: bytes in float32 that it needs at once, for a batch of one on one GPU.
    """
    parts = [count(part, plan.size, plan.family) for part in PARTS]
    encoder, decoder, unet, words, captioner, a, b, compressor = parts
    passed = [unet, decoder, a]  # by the gradient of stage 2, which ends in the compressor
    look = encoder.forward + 2 * (a.forward + a.backward) + captioner.forward
    train = compressor.forward + compressor.backward
    through = train + words.forward + sum(part.forward + part.backward for part in passed)
    judge = decoding(plan) + a.forward + b.forward

    def weights(*some: PartCost) -> int:
        return 4 * sum(part.parameters for part in some)

    every, learning = weights(*parts), 4 * weights(compressor)  # with its gradient and the two moments of AdamW
    kept = sum(part.kept for part in (*passed, compressor))
    rows = {
        "preprocessing": (plan.train_images, look, weights(encoder, a, captioner), a.kept),
        "stage 1": (plan.stage1_steps * plan.stage1_batch, train, learning, compressor.kept),
        "stage 2": (plan.stage2_steps * plan.stage2_batch, through, weights(encoder, words, *passed) + learning, kept),
        "encoding": (plan.images, look + plan.qualities * compressor.forward, every, a.kept),
        "decoding and judging": (plan.images * plan.qualities, judge, every, 0),
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=["times", "operations", "weights", "activations"])


def decoding(plan: Plan) -> int:
    """Operations of decoding one picture."""
    parts = (count(part, plan.size, plan.family) for part in ("UNet", "text encoder", "VAE decoder"))
    unet, words, decoder = (part.forward for part in parts)
    return (1 + plan.guided) * (plan.steps * unet + words) + decoder


def parts_table(size: int = 256, family: str = "sd21") -> pd.DataFrame:
    """Parameters and operations of each network; NaN where no gradient is asked for."""
    table = pd.DataFrame([count(part, size, family) for part in PARTS], index=list(PARTS)) / [1e6, 1e9, 1e9, 1e6]
    table.columns = ["parameters [M]", "forward [GFLOP]", "backward [GFLOP]", "kept for it [MB]"]
    return table[table > 0]


def jobs_table(plan: Plan, rate: float, gpus: int = 1, price: float = 2.5) -> pd.DataFrame:
    """`jobs` in handy units, with extrapolated hours and dollars (*), and their sums.

    One GPU is assumed to reach `rate` operations a second, and costs `price` dollars an hour. Over several the
    wall-clock time is divided: the best case.
    """
    table = jobs(plan) / [1, 1e12, 1e9, 1e9]
    table.columns = ["times", "each [TFLOP]", "weights [GB]", "activations [GB]"]
    table["GPU hours*"] = table["times"] * table["each [TFLOP]"] * 1e12 / rate / 3600
    table[f"hours on {gpus} GPU*"] = table["GPU hours*"] / gpus
    table["dollars*"] = table["GPU hours*"] * price
    table.loc["all"] = table.iloc[:, 4:].sum()
    return table


def growth_table(plan: Plan, rate: float, sizes: Sequence = (256, 512), gpus: Sequence = (1, 8, 64)) -> pd.DataFrame:
    """What a decoded picture and the whole plan cost at other sizes, steps K, and numbers of GPUs (*: extrapolated).

    Pictures count in proportion, training and test ones alike. Over GPUs the time is divided: the best case. Pictures
    and qualities are independent of each other, and a step of training shares only the compressor's gradients.
    """
    rows = []
    for one in (replace(plan, size=size, steps=k) for size in sizes for k in (1, 4, 20)):
        share = (1 + one.guided) * one.steps * count("UNet", one.size, one.family).forward / decoding(one)
        hours = jobs_table(one, rate)["GPU hours*"]["all"]
        row = {"size [px]": one.size, "K": one.steps, "decoding a picture [TFLOP]": decoding(one) / 1e12}
        rows.append(row | {"UNet's share [%]": 100 * share} | {f"hours on {n} GPU*": hours / n for n in gpus})
    return pd.DataFrame(rows)


def digits(x: float) -> str:
    """Four digits of a number; all of a large one."""
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"


def as_text(table: pd.DataFrame) -> str:
    """A table for a terminal, "-" where there is no number."""
    return table.to_string(float_format=digits, na_rep="-")


@dataclass(frozen=True)
class Options(Plan):
    """What the paper scale costs."""

    tflops: float = option(312.0, "peak of the GPU in TFLOP/s (312: an A100 in bf16)")
    share: float = option(0.3, "share of the peak that is assumed")
    gpus: int = option(1, "GPUs that share the work")
    price: float = option(2.5, "dollars for an hour of one GPU")


def command(options: Options) -> int:
    """Print the tables."""
    rate = options.tflops * 1e12 * options.share
    print(f"Counted, for one picture of {options.size} px:\n\n{as_text(parts_table(options.size, options.family))}\n")
    print(f"{options.tflops:g} TFLOP/s at {options.share:.0%}, assumed (*: extrapolated), for {options}:\n")
    print(as_text(jobs_table(options, rate, options.gpus, options.price)))
    print(f"\nThe same plan with other sizes, steps and GPUs:\n\n{as_text(growth_table(options, rate))}")
    return 0
