"""The self-check that comes first at the paper scale: is everything there, and is it what it should be?

Every line is one check: "ok", "note" (worth knowing), "FAIL" with what to do, or "skip" where what it needs is not
there. The bounds are wide: they tell real weights, loaded rightly, from random ones, a wrong scaling factor, a wrong
prediction type or a wrong order of classes.

Examples:
  slim doctor
  slim doctor --data /data/imagenet/val        judges the classifiers on ImageNet, too
  slim doctor --scale pocket
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HOME
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils.versions import require_version

from slimlib.caption import Captioner
from slimlib.codec import SlimCodec
from slimlib.compressor import LatentCompressor
from slimlib.data.imagenet import AsPublished, Pictures, prepare, subset
from slimlib.data.scenes import CLASSES, PocketScenes
from slimlib.images import to_tensor
from slimlib.ldm import LatentDiffusion
from slimlib.machines import load_machine
from slimlib.measure.costs import Plan, build, memory, published
from slimlib.measure.methods import clocked
from slimlib.scales import Scale, hub_error, split_revision
from slimlib.utils import describe_device, option, pick_device, quiet_libraries, rank_and_world, write_file


@dataclass(frozen=True)
class Check:
    """What one check found: `status` is "ok", "note", "FAIL", or "skip" for one that could not be made."""

    name: str
    status: str
    said: str

    def __str__(self) -> str:
        return f"{self.status:<4}  {self.name:<17}  {self.said}"


class Note(str):
    """A finding that is neither right nor wrong."""


def examine(
    scale: Scale, data: str = "", device: str | None = None, handful: int = 16, steps: Sequence[int] = (1, 4, 20)
) -> Iterator[Check]:
    """Run all checks, one after the other.

    At most `handful` pictures are looked at: of ImageNet, where `data` says as `Pictures.open` takes it, or scenes of
    the pocket data set. Decoding is timed with each of `steps`.
    """
    where, found = pick_device(device), dict[str, Any]()
    accuracy = partial(_accuracy, least=50 if data else 25)  # percent; 76 and 82 are published for all of ImageNet
    checks: dict[str, tuple] = {  # each with the checks whose result it needs
        "versions": (_versions,),
        "device": (partial(_device, where),),
        "memory": (partial(_memory, scale, where),),
        "disk": (partial(_disk, scale),),
        "hub": (partial(_hub, scale),),
        "diffusion model": (partial(LatentDiffusion.from_pretrained, scale.ldm, scale.variant, where),),
        "captioner": (partial(Captioner.from_pretrained, scale.captioner, device=where),),
        "machine A": (partial(load_machine, scale.machine_a, where),),
        "machine B": (partial(load_machine, scale.machine_b, where),),
        "compressor": (partial(_compressor, scale, where),),
        "pictures": (lambda: _pictures(scale, data, found.get("machine A"), handful),),
        "VAE round trip": (_round_trip, "diffusion model", "pictures"),
        "latent": (_latent, "diffusion model", "pictures"),
        "UNet": (_unet, "diffusion model", "pictures"),
        "top-1, machine A": (accuracy, "machine A", "pictures"),
        "top-1, machine B": (accuracy, "machine B", "pictures"),
        "caption": (_caption, "captioner", "pictures"),
        "stream": (partial(_stream, steps=steps), "diffusion model", "compressor", "pictures"),
    }
    for name, (work, *needs) in checks.items():
        if missing := " and ".join(repr(need) for need in needs if need not in found):
            yield Check(name, "skip", f"needs the check {missing} to pass")
            continue
        try:
            with torch.no_grad():
                found[name] = result = work(*(found[need] for need in needs))
            yield Check(name, "note" if isinstance(result, Note) else "ok", _describe(result))
        except Exception as error:  # whatever a library makes of a broken installation is a finding, not a crash
            kind = "" if isinstance(error, (OSError, ValueError, ImportError)) else f"{type(error).__name__}: "
            yield Check(name, "FAIL", kind + " ".join(str(error).split()))


def _describe(found: Any) -> str:
    if isinstance(found, (str, list)):
        return found if isinstance(found, str) else f"{len(found)} to look at"
    if isinstance(found, LatentDiffusion):
        shape = f"factor {found.factor}, {found.latent_channels} channels, scaling {found.vae.config.scaling_factor:g}"
        kind, spacing = found.scheduler.config.prediction_type, found.scheduler.config.timestep_spacing
        return f"{shape}, predicts {kind}, {spacing} times, fingerprint {found.fingerprint().hex()[:8]}"
    return f"{sum(p.numel() for p in getattr(found, 'model', found).parameters()) / 1e6:.1f} million parameters"


def _expect(good: bool, said: str, otherwise: str) -> str:
    if not good:
        raise ValueError(f"{said}: {otherwise}")
    return said


def _versions() -> str:
    for line in importlib.metadata.requires("slimlib") or []:
        if "extra ==" not in line:
            require_version(line.split(";")[0].strip(), "Run make install, or pip install -e . in the clone.")
    names = ("torch", "diffusers", "transformers", "timm", "compressai", "accelerate", "numpy")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def _device(where: torch.device) -> str:
    if where.type != "cuda":
        return Note(f"{describe_device(where)}: enough to look around; training and evaluation want a GPU")
    said = f"{torch.cuda.device_count()} x {describe_device(where)}, process {rank_and_world()[0]} on {where}"
    return f"{said}, with bf16" if torch.cuda.is_bf16_supported() else Note(f"{said}, without bf16")


def free_memory() -> float:
    """GB that this process can still take: of the machine, or of the container or the job (cgroups) that it runs in."""
    free, group = [psutil.virtual_memory().available], Path("/sys/fs/cgroup")
    with suppress(OSError, LookupError):
        group /= re.findall("(?m)^0::/(.*)", Path("/proc/self/cgroup").read_text())[0]
    for place in (group, *group.parents):
        with suppress(OSError, ValueError, LookupError):  # no such files, or "max", which is no limit
            limit, used = (int((place / f"memory.{name}").read_text()) for name in ("max", "current"))
            free.append(limit - used)
            free[-1] += int((place / "memory.stat").read_text().split("inactive_file ")[1].split()[0])  # gives way
    return min(free) / 1e9


def _memory(scale: Scale, where: torch.device) -> str:
    have = torch.cuda.mem_get_info(where)[0] / 1e9 if where.type == "cuda" else free_memory()
    need = 12.0 if scale.name == "paper" else 2.0  # what assets/paper/trial.py allows; the pocket's is measured
    said = f"{have:.1f} GB free on {where.type}, {need:g} wanted"
    said = _expect(have >= need, said, "end what else runs, or take smaller pictures: --scale paper,size=256")
    if scale.name != "paper":
        return said
    jobs = memory(Plan(size=scale.size)) @ [1, 8] / 1e9  # as counted, for eight pictures at a time
    return f"{said} to look; {', '.join(f'{job} {need:.0f}' for job, need in jobs.items())}"


def _disk(scale: Scale) -> str:
    remote = bool(_remote(scale))
    place = next(path for path in (Path(HF_HOME), *Path(HF_HOME).parents) if path.exists()) if remote else Path.cwd()
    free, need = shutil.disk_usage(place).free / 1e9, 12.0 if remote else 1.0
    said = f"{free:.1f} GB free at {place}, {need:g} wanted"
    said = _expect(free >= need, said, "set HF_HOME to a larger disk for the models")
    with tempfile.TemporaryDirectory(dir=".") as folder:  # where runs/ is written
        _, milliseconds = clocked(write_file, Path(folder, "zeros"), bytes(1 << 26))
    return f"{said}; 64 MiB written here in {milliseconds:.0f} ms"


def _remote(scale: Scale) -> list[str]:
    """Ids of the hub among a scale's names."""
    machines = [name if Path(name).is_dir() else f"timm/{name}" for name in (scale.machine_a, scale.machine_b)]
    return [name for name in (scale.ldm, scale.captioner, *machines) if not Path(name).is_dir()]


def _hub(scale: Scale) -> str:
    """Ask for each model without downloading it: is it there, may we have it, and which version is it?"""
    said = []
    for name in _remote(scale):
        head, revision = split_revision(name)
        try:
            model = HfApi().model_info(head, revision=revision, timeout=10)
        except HfHubHTTPError as error:  # it has answered: no
            raise hub_error(name, error) from error
        except Exception as error:  # no network, a proxy, offline mode: each has an error of its own
            look = "see HF_HUB_OFFLINE, HF_ENDPOINT, and the proxy"
            return Note(f"not reached ({type(error).__name__}): only what is in the cache can be loaded; {look}")
        safe = any(file.rfilename.endswith(".safetensors") for file in model.siblings or [])
        _expect(safe, name, "no safetensors in this revision; name one that has them, as owner/name@revision")
        said.append(f"{head}@{(model.sha or '?')[:12]}" + ("" if revision else " (not pinned)"))
    return ", ".join(said) or "not needed: all models are folders"


def _compressor(scale: Scale, where: torch.device) -> Any:
    if Path(scale.compressor).is_dir():
        return LatentCompressor.from_pretrained(scale.compressor, where)
    return Note(f"{scale.compressor} is not there yet: preprocess, then train stage 1 (notebook 12)")


def _pictures(scale: Scale, data: str, machine: Any, handful: int) -> list[tuple]:
    """A few squares, and the label of each as the machines count (None: they do not know the class)."""
    if data:
        with tempfile.TemporaryDirectory() as folder:
            whole = Pictures.open(data, "validation", folder, handful if data.startswith("hub:") else None)
            chosen = [whole[i] for i in subset(len(whole), min(handful, len(whole)))]
        return [(prepare(image, "crop", scale.size), label) for image, label in chosen]
    known = {name: label for label, name in enumerate(machine.classes)} if machine else {}
    test = PocketScenes("test", scale.size)
    pairs = [(scene.image, known.get(CLASSES[scene.label])) for scene in (test[i] for i in range(4 * handful))]
    return sorted(pairs, key=lambda pair: pair[1] is None)[:handful]  # known ones first


def _round_trip(ldm: LatentDiffusion, pictures: list) -> str:
    xs = [to_tensor(image).to(ldm.device) for image, _ in pictures]
    error = torch.stack([(ldm.decode(ldm.encode(x)).float() - x).square().mean() for x in xs]).mean()
    psnr = -10 * float(error.clamp_min(1e-10).log10())
    # Stable Diffusion's at 256 px: about 23 to 26 dB (the sd-vae-ft-mse card); more at 512 px.
    said = f"{psnr:.1f} dB over {len(xs)} pictures of {xs[0].shape[-1]} px; 20 to 45 expected"
    return _expect(20 <= psnr <= 45, said, "these are not a trained VAE's weights")


def _encode(ldm: LatentDiffusion, pictures: list) -> torch.Tensor:
    return torch.cat([ldm.encode(to_tensor(image)).float() for image, _ in pictures[:4]])


def _latent(ldm: LatentDiffusion, pictures: list) -> str:
    spread, factor = float(_encode(ldm, pictures).std()), ldm.vae.config.scaling_factor
    said = f"standard deviation {spread:.2f}; 0.5 to 2 expected"  # about 1: that is what the scaling factor is for
    otherwise = f"is scaling_factor in vae/config.json ({factor:g}) this VAE's? Rates depend on it"
    return _expect(0.5 <= spread <= 2, said, otherwise)


def _unet(ldm: LatentDiffusion, pictures: list) -> str:
    """The error of the clean latent that the UNet names half-way, as a share of what the best linear guess leaves."""
    z, t = _encode(ldm, pictures), ldm.scheduler.config.num_train_timesteps // 2
    guess, _ = ldm.predict(ldm.add_noise(z, t, ldm.noise(z.shape, 0).float()), t, ldm.text([""] * len(z)))
    signal, spread, kind = float(ldm.alpha_bar(t)), float(z.var()), ldm.scheduler.config.prediction_type
    linear = spread * (1 - signal) / (signal * spread + 1 - signal)  # of a Wiener filter that knows nothing of pictures
    share = float((guess.float() - z).square().mean()) / linear
    # A trained one is well below; random weights and a wrong prediction type are far above 1.
    said = f"at t = {t} it leaves {share:.2f} times the error of a linear guess; at most 0.85 expected"
    otherwise = f"random weights, or not trained for the prediction_type of scheduler_config.json, {kind}"
    return _expect(share <= 0.85, said, otherwise)


def _accuracy(machine: Any, pictures: list, least: float) -> str:
    looking, known = AsPublished(machine), [(image, label) for image, label in pictures if label is not None]
    if not known:
        return Note("its classes are not those of these pictures: give --data")
    right = sum(int(looking(to_tensor(image).to(machine.mean.device)).argmax()) == label for image, label in known)
    said = f"{right} of {len(known)} right; at least {least}% expected"
    otherwise = "are these its weights, and is this the order of its classes?"
    return _expect(100 * right >= least * len(known), said, otherwise)


def _caption(captioner: Captioner, pictures: list) -> str:
    return f'"{captioner.caption([pictures[0][0]])[0]}" of the first picture; read it'


def _stream(ldm: LatentDiffusion, compressor: Any, pictures: list, steps: Sequence[int]) -> str:
    if isinstance(compressor, Note):  # it is what stage 1 is to make; random weights do for the stream
        compressor = build(published("compressor")).eval().to(ldm.device)
        compressor.update()
    codec, image = SlimCodec(ldm, compressor), pictures[0][0]
    stream = codec.compress(image, 0.5, caption=None)
    sent, read = compressor(ldm.encode(to_tensor(image)).float(), 0.5)["z_hat"], codec.read(stream).z_hat
    apart = float((sent - read).square().mean() / sent.square().mean().clamp_min(1e-12))
    # A symbol may be rounded otherwise when the picture is encoded again; the rest is exact.
    _expect(apart < 1e-3, "the decoder reads another latent than was sent", f"{apart:.0%} of its energy is error")
    alike = codec.decompress(stream, 1).tobytes() == codec.decompress(stream, 1).tobytes()
    _expect(alike, "two decodings of one stream differ", "this device does not repeat itself")
    took = ", ".join(f"{clocked(codec.decompress, stream, k)[1]:.0f} ms at K = {k}" for k in steps)
    return f"{len(stream)} bytes, read as they were sent, decoded twice alike; {took}"


@dataclass
class Options:
    """What `slim doctor` looks at."""

    scale: str = option("paper", "paper, pocket, or a folder of models; or such as paper,size=512,ldm=owner/name")
    data: str = option("", "ImageNet: a folder of class folders, shards (...*.tar), or hub:owner/name")
    device: str | None = option(None, "cpu, cuda, ... (default: the best at hand)")


def command(options: Options) -> int:
    """Print all checks; 0 if none failed, else 1."""
    quiet_libraries()
    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks.*")  # what timm asks of the hub's client
    statuses = []
    for check in examine(Scale.from_name(options.scale), options.data, options.device):
        print(check, flush=True)
        statuses.append(check.status)
    failed, skipped = statuses.count("FAIL"), statuses.count("skip")
    could_not = f", {skipped} could not be made" if skipped else ""
    print(f"\n{failed} checks failed{could_not}" if failed else "\nall is well")
    return int(failed > 0)
