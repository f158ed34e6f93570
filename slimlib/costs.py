"""What the paper scale costs: parameters, operations and memory, counted on the real architectures; and time.

    python -m slimlib.costs                              one A100 in bf16 at 30% of its peak, unless told otherwise
    python -m slimlib.costs --size 512 --tflops 19.5 --share 0.6 --gpus 4 --steps 20             float32, four of them

The networks are built from their published configurations on PyTorch's meta device, where tensors have shapes but no
numbers, and PyTorch's own counter sums the operations of matrix products, convolutions and attention (a multiplication
and an addition are two). So parameters, operations and bytes kept for a backward pass are counted, and nothing is
downloaded. Whatever is in hours or money is an extrapolation: operations divided by a rate that is assumed.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .compressor import LatentCompressor
from .paper import COMPRESSOR, CONFIGS, build

TRAIN_IMAGES, VAL_IMAGES = 1_281_167, 50_000
CAPTION_TOKENS = 12
"""Tokens of a caption, start and end counted: one pass of the captioner's decoder each, without what it has cached."""
PARTS = ("VAE encoder", "VAE decoder", "UNet", "text encoder", "captioner", "machine A", "machine B", "compressor")


@dataclass(frozen=True)
class Cost:
    """One network, once, on one picture.

    Attributes:
        what: one of `PARTS`.
        parameters: their number.
        forward: operations.
        backward: operations of the gradient: to the input of a frozen network, to all weights of the compressor.
        kept: bytes that the backward pass needs from the forward pass, beside the weights, in float32.
    """

    what: str
    parameters: int
    forward: float
    backward: float
    kept: int


@functools.cache
def count(what: str, size: int = 256, family: str = "sd21") -> Cost:
    """Count one of `PARTS` for a picture of `size` pixels a side; family "sd21" or "sd15"."""
    if what == "compressor":  # small, and it looks at numbers: counted for real
        torch.manual_seed(0)
        network: nn.Module = LatentCompressor(COMPRESSOR).train()
        return _measure(what, network, lambda z: _compress(network, z), torch.randn(1, 4, size // 8, size // 8))
    with torch.device("meta"):
        network, run, shape = _frozen(what, size, family)
        network.eval().requires_grad_(False)
        return _measure(what, network, run, torch.zeros(shape) if shape else None)


def _frozen(what: str, size: int, family: str) -> tuple[nn.Module, Callable[..., Any], tuple[int, ...]]:
    """A network, how to run it, and the shape of the input that a gradient may go to (none: nobody asks for one)."""
    side, tokens = size // 8, CONFIGS["captioner"]["text_config"]["vocab_size"]
    if what == "UNet":
        unet = build(f"unet {family}")
        text, t = torch.zeros(1, 77, unet.config.cross_attention_dim), torch.zeros(1, dtype=torch.long)
        return unet, lambda z: unet(z, t, encoder_hidden_states=text).sample, (1, 4, side, side)
    if what.startswith("VAE"):
        vae = build("vae")
        encodes = what == "VAE encoder"
        half = vae.encoder if encodes else vae.decoder
        return half, half, (1, 3, size, size) if encodes else (1, 4, side, side)
    if what.startswith("machine"):
        machine = build("machine_" + what[-1].lower())
        return machine, machine, (1, 3, 224, 224)
    if what == "text encoder":
        words = build(f"text_encoder {family}")
        return words, lambda: words(torch.zeros(1, 77, dtype=torch.long))[0], ()
    if what == "captioner":
        blip = build("captioner")
        pixels, ids = torch.zeros(1, 3, 384, 384), torch.full((1, CAPTION_TOKENS), min(5, tokens))
        return blip, lambda: blip(pixel_values=pixels, input_ids=ids).logits, ()
    raise ValueError(f"no part {what!r}: expected one of {', '.join(PARTS)}")


def _compress(model: nn.Module, z: Tensor) -> Tensor:
    out = model(z, 0.5)
    return out["z_hat"].sum() + sum(likelihood.log2().sum() for likelihood in out["likelihoods"].values())


def _measure(what: str, network: nn.Module, run: Callable[..., Any], x: Tensor | None) -> Cost:
    parameters = sum(p.numel() for p in network.parameters())
    if x is None:
        with torch.no_grad():
            return Cost(what, parameters, _operations(run)[0], 0.0, 0)
    x.requires_grad_()
    own = {tensor.untyped_storage()._cdata for tensor in (*network.parameters(), *network.buffers())}
    kept: dict[int, tuple[int, Tensor]] = {}  # the tensors too: a storage that goes makes room for another of its name

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward, output = _operations(lambda: run(x))
    size = sum(bytes_ for storage, (bytes_, _) in kept.items() if storage not in own)
    kept.clear()
    backward, _ = _operations(lambda: output.sum().backward())
    return Cost(what, parameters, forward, backward, size)


def _operations(run: Callable[[], Any]) -> tuple[float, Any]:
    with FlopCounterMode(display=False) as counter:
        result = run()
    return float(counter.get_total_flops()), result


# ------------------------------------------------------------------------------------------------------ what is done


@dataclass(frozen=True)
class Plan:
    """How much is done. None of it is the paper's, which states none: ours, to be changed.

    Attributes:
        size: side of the pictures; family: "sd21" or "sd15".
        images: training pictures that are cached; passes of stage 1 over them.
        stage1_steps, stage1_batch, stage2_steps, stage2_batch: of training.
        test_images, qualities, steps, guided: of the evaluation; guidance doubles the UNet's work.
    """

    size: int = 256
    family: str = "sd21"
    images: int = TRAIN_IMAGES
    stage1_steps: int = 100_000
    stage1_batch: int = 64
    stage2_steps: int = 20_000
    stage2_batch: int = 16
    test_images: int = VAL_IMAGES
    qualities: int = 6
    steps: int = 4
    guided: bool = True


@dataclass(frozen=True)
class Job:
    """One part of the reproduction.

    Attributes:
        what: its name.
        times: how often it is done.
        operations: of doing it once.
        weights, activations: bytes in float32 that it needs at once, for a batch of one on one GPU.
    """

    what: str
    times: int
    operations: float
    weights: int
    activations: int

    def hours(self, rate: float) -> float:
        """Extrapolated hours of one GPU at `rate` operations a second."""
        return self.times * self.operations / rate / 3600


def jobs(plan: Plan) -> list[Job]:
    """Preprocessing, both stages, and the evaluation of one method without ablations."""

    parts = [count(what, plan.size, plan.family) for what in PARTS]
    encoder, decoder, unet, words, captioner, a, b, compressor = parts
    both = [unet, decoder, a]
    look = encoder.forward + 2 * (a.forward + a.backward) + captioner.forward
    train = compressor.forward + compressor.backward
    through = train + words.forward + sum(cost.forward + cost.backward for cost in both)
    decode = (1 + plan.guided) * (plan.steps * unet.forward + words.forward) + decoder.forward
    judge = a.forward + b.forward

    def weights(*costs: Cost) -> int:
        return 4 * sum(cost.parameters for cost in costs)

    every = weights(*parts)
    return [
        Job("preprocessing", plan.images, look, weights(encoder, a, captioner), a.kept),
        Job("stage 1", plan.stage1_steps * plan.stage1_batch, train, 4 * weights(compressor), compressor.kept),
        Job(
            "stage 2",
            plan.stage2_steps * plan.stage2_batch,
            through,
            weights(unet, encoder, decoder, words, a) + 4 * weights(compressor),
            sum(cost.kept for cost in (*both, compressor)),
        ),
        Job("encoding", plan.test_images, look + plan.qualities * compressor.forward, every, a.kept),
        Job("decoding and judging", plan.test_images * plan.qualities, decode + judge, every, 0),
    ]


def parts_table(size: int = 256, family: str = "sd21") -> str:
    """Markdown: parameters and operations of each network."""
    head = "| network | parameters [M] | forward [GFLOP] | backward [GFLOP] | kept for it [MB] |\n|---|---|---|---|---|"
    lines = []
    for what in PARTS:
        c = count(what, size, family)
        back = f"{c.backward / 1e9:,.1f} | {c.kept / 1e6:,.0f}" if c.backward else "none | none"
        lines.append(f"| {what} | {c.parameters / 1e6:,.1f} | {c.forward / 1e9:,.1f} | {back} |")
    return "\n".join([head, *lines])


def jobs_table(plan: Plan, rate: float, gpus: int = 1, price: float = 2.5) -> str:
    """Markdown: what is done, memory in float32 for a batch of one, and, starred, extrapolated hours and dollars.

    Args:
        rate: operations a second that one GPU is assumed to reach.
        gpus: the wall-clock time is divided by them: the best case.
        price: dollars for an hour of one GPU.
    """
    wide = f"hours on {gpus} GPU*"
    names = ("job", "times", "each [TFLOP]", "weights [GB]", "activations [GB]", "GPU hours*", wide, "dollars*")
    head = f"| {' | '.join(names)} |\n|{'---|' * len(names)}"
    total, lines = 0.0, []
    for job in jobs(plan):
        hours = job.hours(rate)
        total += hours
        memory = f"{job.weights / 1e9:.1f} | {job.activations / 1e9:.2f}"
        end = f"{hours:,.2f} | {hours / gpus:,.2f} | {hours * price:,.0f}"
        lines.append(f"| {job.what} | {job.times:,} | {job.operations / 1e12:.3g} | {memory} | {end} |")
    lines.append(f"| all | | | | | {total:,.2f} | {total / gpus:,.2f} | {total * price:,.0f} |")
    return "\n".join([head, *lines])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m slimlib.costs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--size", type=int, default=256, help="side of the pictures in pixels (default: %(default)s)")
    option("--family", choices=("sd21", "sd15"), default="sd21", help="(default: %(default)s)")
    option("--steps", type=int, default=4, help="denoising steps of a decoder (default: %(default)s)")
    option("--images", type=int, default=VAL_IMAGES, help="test pictures (default: %(default)s)")
    option(
        "--tflops", type=float, default=312.0, help="peak of the GPU in TFLOP/s (default: %(default)s, A100 in bf16)"
    )
    option("--share", type=float, default=0.3, help="share of the peak that is assumed (default: %(default)s)")
    option("--gpus", type=int, default=1, help="(default: %(default)s)")
    option("--price", type=float, default=2.5, help="dollars for a GPU hour (default: %(default)s)")
    a = parser.parse_args(arguments)
    plan = Plan(a.size, a.family, steps=a.steps, test_images=a.images)
    print(f"Counted, for one picture of {a.size} px:\n\n{parts_table(a.size, a.family)}\n")
    print(f"{plan}; {a.tflops:g} TFLOP/s at {a.share:.0%}, assumed (*: extrapolated):\n")
    print(jobs_table(plan, a.tflops * 1e12 * a.share, a.gpus, a.price))


if __name__ == "__main__":
    main()
