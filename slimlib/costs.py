"""What the paper scale costs: parameters, operations and memory, counted on the real architectures; and time.

    python -m slimlib.costs                              one A100 in bf16 at 30% of its peak, unless told otherwise
    python -m slimlib.costs --size 512 --tflops 19.5 --share 0.6 --gpus 4 --steps 20             float32, four of them
    python -m slimlib.costs --measure                    time and memory on the GPU at hand, with random weights
    python -m slimlib.costs --measure paper --compile    the same with the real ones, and with torch.compile

The networks are built from their published configurations on PyTorch's meta device, where tensors have shapes but no
numbers, and PyTorch's own counter sums the operations of matrix products, convolutions and attention (a multiplication
and an addition are two). So parameters, operations and bytes kept for a backward pass are counted, and nothing is
downloaded. Whatever is in hours or money is an extrapolation: operations divided by a rate that is assumed. With
--measure everything is run, and the last column says which rate was reached: what --tflops times --share should be.
"""

from __future__ import annotations

import argparse
import functools
import math
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from . import training
from .caption import Captioner, CaptionPrior
from .codec import CAPTION_PRIOR, SlimCodec
from .compressor import LatentCompressor
from .evaluation import save_rows
from .ldm import LatentDiffusion
from .machines import Machine, load_machine, to_tensor
from .paper import COMPRESSOR, PUBLISHED, build, save_stand_in, write_apart
from .repro import autocast, describe_device, pick_device, quiet_libraries
from .roi import gradcam, latent_mask, roi_crop
from .scales import Scale
from .scenes import PocketScenes

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
        kept: bytes that the backward pass needs from the forward pass, beside the weights, in float32; matrices of the
            attention among them, which fused kernels do not keep.
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
    side = size // 8
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
        pixels, ids = torch.zeros(1, 3, 384, 384), torch.full((1, CAPTION_TOKENS), 5)
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
    decode = _decoding(plan)
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


def _decoding(plan: Plan) -> float:
    """Operations of decoding one picture."""
    unet, words, decoder = (count(w, plan.size, plan.family) for w in ("UNet", "text encoder", "VAE decoder"))
    return (1 + plan.guided) * (plan.steps * unet.forward + words.forward) + decoder.forward


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


def growth_table(
    plan: Plan,
    rate: float,
    sizes: Sequence[int] = (256, 512),
    steps: Sequence[int] = (1, 4, 20),
    gpus: Sequence[int] = (1, 8, 64),
) -> str:
    """Markdown: what a decoded picture and the whole plan cost at other sizes, steps K, and numbers of GPUs (starred).

    Pictures count in proportion, training and test ones alike. Over GPUs the time is divided: the best case. Pictures
    and qualities are independent of each other, and a step of training shares only the compressor's gradients.
    """
    names = ("size [px]", "K", "decoding a picture [TFLOP]", "UNet's share", *(f"hours on {n} GPU*" for n in gpus))
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for size in sizes:
        for k in steps:
            one = replace(plan, size=size, steps=k)
            hours = sum(job.hours(rate) for job in jobs(one))
            unet, decode = (1 + one.guided) * k * count("UNet", size, plan.family).forward, _decoding(one)
            cells = [f"{size}", f"{k}", f"{decode / 1e12:.2f}", f"{unet / decode:.0%}"]
            lines.append(f"| {' | '.join(cells + [f'{hours / n:,.2f}' for n in gpus])} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------- measured


@dataclass(frozen=True)
class Measured:
    """What one job took on this machine.

    Attributes:
        what: "preprocessing", "encode", "decode, K = 4", "stage 1" or "stage 2".
        size: side of the pictures; batch: of them that go through together.
        precision: of the diffusion model: fp32, bf16, with "compiled" where it was; "as trained" is fp32 with
            autocast to bf16 where slimlib.training does that.
        ms: median milliseconds for a picture; NaN where memory did not suffice.
        memory: GB that were held at the most: of the GPU; without one, of the process up to then.
        tflops: 10^12 counted operations a second; NaN for networks that are not of the published size.
    """

    what: str
    size: int
    batch: int
    precision: str
    ms: float
    memory: float
    tflops: float


def measure(
    scale: Scale,
    sizes: Sequence[int] = (256, 512),
    batch: int = 4,
    compiled: bool = False,
    steps: Sequence[int] = (1, 4, 20),
    repeats: int = 3,
    device: str | None = None,
) -> Iterator[Measured]:
    """Run every job of the reproduction `repeats` times after a first one that does not count.

    Args:
        scale: the models; random weights take as long as trained ones.
        sizes: sides of the pictures, 512 at the most.
        batch: pictures at a time in preprocessing and training; the codec takes one.
        compiled: measure bf16 once more with UNet and VAE through torch.compile.
        steps: denoising steps K that decoding is measured with.
        device: the best one at hand if None.
    """
    where = pick_device(device)
    captioner, machine = Captioner.from_pretrained(scale.captioner, device=where), load_machine(scale.machine_a, where)
    prior = CaptionPrior.load(Path(scale.compressor) / CAPTION_PRIOR)
    for precision in ("fp32", "bf16", *(["bf16 compiled"] if compiled else [])):
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        ldm = LatentDiffusion.from_pretrained(scale.ldm, scale.variant, where, dtype)
        if precision.endswith("compiled"):
            for network in (ldm.unet, ldm.vae.encoder, ldm.vae.decoder):
                network.compile()
        compressor = LatentCompressor.from_pretrained(scale.compressor, where)
        codec = SlimCodec(ldm, compressor, prior, captioner, machine, exact=False)
        for size in sizes:
            images = [PocketScenes("test", size)[i].image for i in range(batch)]
            for what, times, run in _runs(codec, images, steps, train=precision == "fp32"):
                seconds, memory = _clock(where, run, repeats)
                rate = _counted(what, size, ldm) * times / seconds / 1e12
                named = "as trained" if what.startswith("stage") else precision
                yield Measured(what, size, times, named, 1000 * seconds / times, memory, rate)


def _runs(
    codec: SlimCodec, images: list[Image.Image], steps: Sequence[int], train: bool
) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """Name, pictures and work of each job."""
    ldm, model, machine = codec.ldm, codec.compressor, codec.machine
    x = to_tensor(images).to(ldm.device)
    labels = torch.zeros(len(x), dtype=torch.long, device=ldm.device)
    with torch.no_grad():
        z = ldm.encode(x).float()

    def look() -> None:
        gradcam(machine, x, labels)
        crops = [roi_crop(image, cam) for image, cam in zip(images, gradcam(machine, x), strict=True)]
        codec.captioner.caption(crops)
        with torch.no_grad():
            ldm.encode(x)

    yield "preprocessing", len(x), look
    stream = codec.compress(images[0], 0.5)
    yield "encode", 1, lambda: codec.compress(images[0], 0.5)
    for k in steps:
        yield f"decode, K = {k}", 1, functools.partial(codec.decompress, stream, k)
    if train:
        m = latent_mask(gradcam(machine, x, labels), *z.shape[2:])
        yield "stage 1", len(x), lambda: _step(model, z, m)
        training.make_trainable(ldm)
        yield "stage 2", len(x), lambda: _step(model, z, m, ldm, machine, labels)
        model.eval()


def _step(
    model: LatentCompressor,
    z: Tensor,
    m: Tensor,
    ldm: LatentDiffusion | None = None,
    machine: Machine | None = None,
    labels: Tensor | None = None,
) -> None:
    """Forward and backward of a step of stage 1, or with a diffusion model of stage 2, as slimlib.training has them."""
    quality, factor = torch.linspace(0, 1, len(z), device=z.device), model.config.factor
    with autocast(z.device):
        out = model.train()(z, quality)
    if ldm is None or machine is None or labels is None:
        loss, _ = training.stage1_loss(out, z, m, quality, training.Stage1Config(), factor)
    else:
        t = training.start_times(model.config, quality)
        captions = ["a dog"] * len(z)
        z_tilde, x_hat = training.decode_once(ldm, out["z_hat"].float(), t, captions, torch.randn_like(z))
        task = training.task_loss(machine, x_hat, labels)
        diffusion = training.diffusion_loss(ldm, out["z_hat"], z_tilde, t)
        loss, _ = training.stage2_loss(out, z, m, quality, diffusion, task, training.Stage2Config(), factor)
    loss.backward()
    model.zero_grad(set_to_none=True)


def _clock(where: torch.device, run: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median seconds, and GB held at the most; NaN seconds where memory did not suffice."""
    gpu, taken = where.type == "cuda", []
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(where)
    try:
        for _ in range(1 + repeats):
            start = time.perf_counter()
            run()
            if gpu:
                torch.cuda.synchronize(where)
            taken.append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        return math.nan, torch.cuda.max_memory_allocated(where) / 1e9
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return float(np.median(taken[1:])), (torch.cuda.max_memory_allocated(where) if gpu else process) / 1e9


def _counted(what: str, size: int, ldm: LatentDiffusion) -> float:
    """Operations of a job for one picture; NaN where the UNet is not a published one."""
    parameters = sum(p.numel() for p in ldm.unet.parameters())
    family = next((f for f in ("sd21", "sd15") if PUBLISHED[f"unet {f}"] == parameters), None)
    if family is None:
        return math.nan
    plan = Plan(size, family, qualities=1)
    if what.startswith("decode"):
        return _decoding(replace(plan, steps=int(what.split()[-1])))
    return {job.what: job.operations for job in jobs(plan)}["encoding" if what == "encode" else what]


def measured_table(rows: Sequence[Measured]) -> str:
    """Markdown."""
    names = ("what", "size [px]", "batch", "precision", "ms a picture", "pictures a second", "memory [GB]", "TFLOP/s")
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for r in rows:
        rate = "" if math.isnan(r.tflops) else f"{r.tflops:.1f}"
        time_ = "does not fit | " if math.isnan(r.ms) else f"{r.ms:,.1f} | {1000 / r.ms:,.2f}"
        lines.append(f"| {r.what} | {r.size} | {r.batch} | {r.precision} | {time_} | {r.memory:.2f} | {rate} |")
    return "\n".join(lines)


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
    option("--measure", nargs="?", const="", metavar="SCALE", help="run everything here; without SCALE random weights")
    option("--tiny", action="store_true", help="with --measure: small networks, to see that it runs")
    option("--sizes", type=int, nargs="+", default=[256, 512], help="with --measure: of pictures (default: 256 512)")
    option("--batch", type=int, default=4, help="with --measure: pictures at a time (default: %(default)s)")
    option("--compile", action="store_true", help="with --measure: torch.compile, too")
    option("--device", help="with --measure: cpu, cuda, ... (default: the best at hand)")
    option("--out", type=Path, help="with --measure: a CSV file")
    a = parser.parse_args(arguments)
    if a.measure is not None:
        return _measure_all(a)
    plan = Plan(a.size, a.family, steps=a.steps, test_images=a.images)
    print(f"Counted, for one picture of {a.size} px:\n\n{parts_table(a.size, a.family)}\n")
    print(f"{plan}; {a.tflops:g} TFLOP/s at {a.share:.0%}, assumed (*: extrapolated):\n")
    rate = a.tflops * 1e12 * a.share
    print(jobs_table(plan, rate, a.gpus, a.price))
    print(f"\nThe same plan with other sizes, steps and GPUs:\n\n{growth_table(plan, rate)}")


def _measure_all(a: argparse.Namespace) -> None:
    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        if a.measure:
            scale = Scale.from_name(a.measure)
        elif a.tiny:
            scale = save_stand_in(temporary, tiny=True)
        else:
            write_apart(Path(temporary))
            scale = Scale.from_name(temporary)
        rows = []
        for row in measure(scale, a.sizes, a.batch, a.compile, device=a.device):
            rows.append(row)
            print(f"{row.what}, {row.size} px, {row.precision}: {row.ms:.1f} ms a picture", file=sys.stderr, flush=True)
    where = pick_device(a.device)
    print(f"Measured on {describe_device(where)} with torch {torch.__version__}:\n\n{measured_table(rows)}")
    if a.out:
        save_rows(rows, a.out)


if __name__ == "__main__":
    main()
