"""The self-check that comes first at the paper scale: is everything there, and is it what it should be?

    python -m slimlib doctor --scale paper
    python -m slimlib doctor --scale paper --data /data/imagenet/val          judges the classifiers on ImageNet, too

Every entry is one check: "ok", "note" (worth knowing), "FAIL" with what to do, or "skip" where what it needs is not
there. The bounds are wide: they tell real weights, loaded rightly, from random ones, a wrong scaling factor, a wrong
prediction type or a wrong order of classes.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import os
import shutil
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .caption import Captioner
from .codec import SlimCodec
from .compressor import LatentCompressor
from .imagenet import AsPublished, Pictures, chosen_scale, prepare, scale_options
from .ldm import LatentDiffusion
from .machines import load_machine, to_tensor
from .paper import COMPRESSOR, free_memory
from .repro import describe_device, pick_device, quiet_libraries
from .scales import Scale, hub_error, split_revision
from .scenes import CLASSES, PocketScenes

HANDFUL = 16
"""Pictures that are looked at."""
PSNR = 20.0, 45.0
"""dB of a VAE round trip. Stable Diffusion's at 256 px: about 23 to 26 (the sd-vae-ft-mse card); more at 512 px."""
SPREAD = 0.5, 2.0
"""Standard deviation of the scaled latent: about 1, for that is what the scaling factor is for."""
LEFT = 0.85
"""Error of the clean latent that the UNet names at t = 500, as a share of what the best linear guess leaves: a trained
one is well below; random weights and a wrong prediction type are far above 1."""
NO_COMPRESSOR = " at random: the folder is not there yet; preprocess, then train stage 1 (notebook 12)"
WIDTH = 118
"""Characters of a line."""
STEPS = (1, 4, 20)
"""Denoising steps that decoding is timed with."""
ACCURACY = 50.0
"""Least top-1 accuracy on the handful, in percent; 76 and 82 are published for all of ImageNet's validation set."""


@dataclass(frozen=True)
class Check:
    """What one check found: `status` is "ok", "note", "FAIL", or "skip" for one that could not be made."""

    name: str
    status: str
    said: str

    def __str__(self) -> str:
        head = f"{self.status:<4}  {self.name:<17}  "
        return textwrap.fill(self.said, WIDTH, initial_indent=head, subsequent_indent=" " * len(head))


class Failed(Exception):
    """A check that did not pass; its text says what was found and what to do."""


def examine(scale: Scale, data: str | None = None, device: str | None = None) -> Iterator[Check]:
    """Run all checks, one after the other.

    Args:
        scale: what to look at.
        data: ImageNet pictures, as `Pictures.open` takes them; without, scenes of the pocket data set are looked at.
        device: the best one at hand if None.
    """
    where, found = pick_device(device), {}

    def check(name: str, work: Callable[[], Any]) -> Iterator[Check]:
        try:
            result = work()
        except Failed as failure:
            yield Check(name, "FAIL", str(failure))
        except Exception as error:  # whatever a library makes of a broken installation is a finding, not a crash
            kind = "" if isinstance(error, (OSError, ValueError, ImportError)) else f"{type(error).__name__}: "
            yield Check(name, "FAIL", kind + " ".join(str(error).split()))
        else:
            result = result if isinstance(result, tuple) else ("ok", result)
            if isinstance(result[1], str):
                yield Check(name, *result)
            else:
                found[name] = result[1]
                yield Check(name, result[0], _describe(result[1]) + (NO_COMPRESSOR if result[0] == "note" else ""))

    def check_with(name: str, needs: tuple[str, ...], work: Callable[..., Any]) -> Iterator[Check]:
        missing = [need for need in needs if need not in found]
        if missing:
            yield Check(name, "skip", f"needs the check {' and '.join(repr(m) for m in missing)} to pass")
        else:
            yield from check(name, lambda: work(*(found[need] for need in needs)))

    yield from check("versions", _versions)
    yield from check("device", lambda: _device(where))
    yield from check("memory", lambda: _memory(scale, where))
    yield from check("disk", lambda: _disk(scale))
    yield from check("hub", lambda: _hub(scale))
    yield from check("diffusion model", lambda: LatentDiffusion.from_pretrained(scale.ldm, scale.variant, where))
    yield from check("captioner", lambda: Captioner.from_pretrained(scale.captioner, device=where))
    for side in ("a", "b"):
        yield from check(
            f"machine {side.upper()}", functools.partial(load_machine, getattr(scale, f"machine_{side}"), where)
        )
    yield from check("compressor", lambda: _compressor(scale, where))
    yield from check("pictures", lambda: _pictures(scale, data, found.get("machine A")))
    for name, work in (("VAE round trip", _round_trip), ("latent", _latent), ("UNet", _unet)):
        yield from check_with(name, ("diffusion model", "pictures"), work)
    for name in ("machine A", "machine B"):
        judge = functools.partial(_accuracy, imagenet=data is not None)
        yield from check_with(f"top-1, {name}", (name, "pictures"), judge)
    yield from check_with("caption", ("captioner", "pictures"), _caption)
    yield from check_with("stream", ("diffusion model", "compressor", "pictures"), _stream)


def _describe(model: Any) -> str:
    if isinstance(model, list):
        return f"{len(model)} to look at"
    if isinstance(model, LatentDiffusion):
        config = model.scheduler.config
        return (
            f"factor {model.factor}, {model.latent_channels} channels, scaling {model.vae.config.scaling_factor:g}, "
            f"predicts {config.prediction_type}, fingerprint {model.fingerprint().hex()[:8]}"
        )
    network = getattr(model, "model", model)
    return f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f} million parameters"


def _versions() -> str:
    from transformers.utils.versions import require_version

    wrong = []
    for line in importlib.metadata.requires("slimlib") or []:
        if "extra ==" not in line:
            try:
                require_version(line.split(";")[0].strip())
            except (ImportError, importlib.metadata.PackageNotFoundError) as error:
                wrong.append(" ".join(str(error).split()))
    if wrong:
        raise Failed("; ".join(wrong) + ". Run make install, or pip install -e . in the clone")
    names = ("torch", "diffusers", "transformers", "timm", "compressai", "accelerate", "numpy")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def _device(where: torch.device) -> tuple[str, str]:
    if where.type != "cuda":
        return "note", f"{describe_device(where)}: enough to look around; training and evaluation want a GPU"
    count, half = torch.cuda.device_count(), torch.cuda.is_bf16_supported()
    return ("ok" if half else "note"), f"{count} x {describe_device(where)}, {'with' if half else 'without'} bf16"


def _memory(scale: Scale, where: torch.device) -> str:
    need = 12.0 if scale.name == "paper" else 2.0  # what `slimlib.paper check` allows; the pocket's is measured
    have = (torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else free_memory()) / 1e9
    if have < need:
        raise Failed(
            f"{have:.1f} GB free on {where.type}, {need:g} wanted: end what else runs, or take a smaller --size"
        )
    return f"{have:.1f} GB free on {where.type}, {need:g} wanted"


def _disk(scale: Scale) -> str:
    remote = bool(_remote(scale))
    cache = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    place = next(path for path in (cache, *cache.parents) if path.exists()) if remote else Path.cwd()
    free, need = shutil.disk_usage(place).free / 1e9, 12.0 if remote else 1.0
    if free < need:
        raise Failed(f"{free:.1f} GB free at {place}, {need:g} wanted for the models: set HF_HOME to a larger disk")
    return f"{free:.0f} GB free {'for the cache of the hub' if remote else 'in this folder'}, {need:g} wanted"


def _remote(scale: Scale) -> list[str]:
    """Ids of the hub among a scale's names."""
    machines = [name if Path(name).is_dir() else f"timm/{name}" for name in (scale.machine_a, scale.machine_b)]
    return [name for name in (scale.ldm, scale.captioner, *machines) if not Path(name).is_dir()]


def _hub(scale: Scale) -> str | tuple[str, str]:
    """Ask for each model without downloading it: is it there, may we have it, and which version is it?"""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    said = []
    for name in _remote(scale):
        head, revision = split_revision(name)
        try:
            commit = HfApi().model_info(head, revision=revision, timeout=10).sha or "?"
        except HfHubHTTPError as error:  # it has answered: no
            raise Failed(str(hub_error(name, error))) from error
        except Exception as error:  # no network, a proxy, offline mode: each has an error of its own
            return "note", (
                f"not reached ({type(error).__name__}): only what is in the cache can be loaded. See HF_HUB_OFFLINE, "
                "HF_ENDPOINT, and the proxy"
            )
        said.append(f"{head}@{commit[:12]}" + ("" if revision else " (not pinned)"))
    return ", ".join(said) or "not needed: all models are folders"


def _compressor(scale: Scale, where: torch.device) -> tuple[str, LatentCompressor]:
    if Path(scale.compressor).is_dir():
        return "ok", LatentCompressor.from_pretrained(scale.compressor, where)
    # Not a failure: it is what stage 1 is to make. Random weights do for the stream.
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        LatentCompressor(COMPRESSOR).save_pretrained(folder)
        return "note", LatentCompressor.from_pretrained(folder, where)


def _pictures(scale: Scale, data: str | None, machine: Any) -> list[tuple[Image.Image, int | None]]:
    """A handful of squares, and the label of each as the machines count (None: they do not know the class)."""
    if data:
        with tempfile.TemporaryDirectory() as folder:
            pictures = Pictures.open(data, "validation", folder, HANDFUL)
            return [(prepare(image, "crop", scale.size), label) for image, label in pictures]
    known = {name: label for label, name in enumerate(machine.classes)} if machine else {}
    test = PocketScenes("test", scale.size)
    scenes = [test[i] for i in range(4 * HANDFUL)]
    scenes.sort(key=lambda scene: CLASSES[scene.label] not in known)  # those that the machines know first
    return [(scene.image, known.get(CLASSES[scene.label])) for scene in scenes[:HANDFUL]]


@torch.no_grad()
def _round_trip(ldm: LatentDiffusion, pictures: list) -> str:
    error = 0.0
    for image, _ in pictures:
        x = to_tensor(image).to(ldm.device)
        error += float((ldm.decode(ldm.encode(x)).float() - x).square().mean()) / len(pictures)
    psnr = -10 * torch.tensor(max(error, 1e-10)).log10().item()
    if not PSNR[0] <= psnr <= PSNR[1]:
        raise Failed(f"{psnr:.1f} dB; {PSNR[0]:g} to {PSNR[1]:g} expected: these are not a trained VAE's weights")
    side = pictures[0][0].width
    return f"{psnr:.1f} dB over {len(pictures)} pictures of {side} px; {PSNR[0]:g} to {PSNR[1]:g} expected"


@torch.no_grad()
def _latent(ldm: LatentDiffusion, pictures: list) -> str:
    spread = float(torch.cat([ldm.encode(to_tensor(image)).float() for image, _ in pictures[:4]]).std())
    if not SPREAD[0] <= spread <= SPREAD[1]:
        raise Failed(
            f"standard deviation {spread:.2f}; {SPREAD[0]:g} to {SPREAD[1]:g} expected: is scaling_factor in "
            f"vae/config.json ({ldm.vae.config.scaling_factor:g}) this VAE's? Rates depend on it"
        )
    return f"standard deviation {spread:.2f}; {SPREAD[0]:g} to {SPREAD[1]:g} expected"


@torch.no_grad()
def _unet(ldm: LatentDiffusion, pictures: list) -> str:
    z = torch.cat([ldm.encode(to_tensor(image)).float() for image, _ in pictures[:4]])
    eps = ldm.noise(z.shape, 0).float()
    t = ldm.scheduler.config.num_train_timesteps // 2
    guess, _ = ldm.predict(ldm.add_noise(z, t, eps), t, ldm.text([""] * len(z)))
    signal, spread = float(ldm.alpha_bar(t)), float(z.var())
    linear = spread * (1 - signal) / (signal * spread + 1 - signal)  # of a Wiener filter that knows nothing of pictures
    share = float((guess.float() - z).square().mean()) / linear
    if not share <= LEFT:
        kind = ldm.scheduler.config.prediction_type
        raise Failed(
            f"at t = {t} it leaves {share:.2f} times the error of a linear guess; at most {LEFT:g} expected: random "
            f"weights, or not trained for the prediction_type of scheduler_config.json, {kind}"
        )
    return f"at t = {t} it leaves {share:.2f} times the error of a linear guess; at most {LEFT:g} expected"


@torch.no_grad()
def _accuracy(machine: Any, pictures: list, imagenet: bool) -> str | tuple[str, str]:
    known = [(image, label) for image, label in pictures if label is not None]
    if not known:
        return "note", "it knows none of the classes here: give --data"
    looking = AsPublished(machine)
    right = sum(int(looking(to_tensor(i).to(machine.mean.device)).argmax()) == label for i, label in known)
    said, least = f"{right} of {len(known)} right", ACCURACY if imagenet else ACCURACY / 2
    if 100 * right / len(known) < least:
        raise Failed(f"{said}; {least:g}% expected: are these its weights, and is this the order of its classes?")
    return f"{said}; at least {least:g}% expected"


def _caption(captioner: Captioner, pictures: list) -> str:
    return f'"{captioner.caption([pictures[0][0]])[0]}" of the first picture; read it'


@torch.no_grad()
def _stream(ldm: LatentDiffusion, compressor: LatentCompressor, pictures: list) -> str:
    codec, image = SlimCodec(ldm, compressor), pictures[0][0]
    stream = codec.compress(image, 0.5, caption=None)
    sent = compressor(ldm.encode(to_tensor(image)).float(), 0.5)["z_hat"]
    read = codec.read([stream])[0].z_hat
    apart = float((sent - read).square().mean() / sent.square().mean().clamp_min(1e-12))
    if not apart < 1e-3:  # a symbol may be rounded otherwise when the picture is encoded again; the rest is exact
        raise Failed(f"the decoder reads another latent than was sent: {apart:.0%} of its energy is error")
    if codec.decompress(stream, 1).tobytes() != codec.decompress(stream, 1).tobytes():
        raise Failed("two decodings of one stream differ on this device")
    took = []
    for steps in STEPS:
        start = time.perf_counter()
        codec.decompress(stream, steps)
        took.append(f"{1000 * (time.perf_counter() - start):.0f} ms at K = {steps}")
    return f"{len(stream)} bytes, read as they were sent, decoded twice alike; {', '.join(took)}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    scale_options(parser)
    parser.add_argument(
        "--data", help="ImageNet: folder of class folders, pattern of shards (...*.tar), hub:owner/name"
    )


def run(options: argparse.Namespace) -> int:
    """Print all checks; 0 if none failed, else 1."""
    quiet_libraries()
    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks.*")  # what timm asks of the hub's client
    try:
        scale = chosen_scale(options)
    except ValueError as error:
        print(f"slimlib: {error}", file=sys.stderr)
        return 1
    count = dict.fromkeys(("ok", "note", "FAIL", "skip"), 0)
    for check in examine(scale, options.data, options.device):
        print(check, flush=True)
        count[check.status] += 1
    skipped = f", {count['skip']} could not be made" if count["skip"] else ""
    print(f"\n{count['FAIL']} checks failed{skipped}" if count["FAIL"] else "\nall is well")
    return 1 if count["FAIL"] else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m slimlib doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
