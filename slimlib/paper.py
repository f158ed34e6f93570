"""The networks of the paper scale: their published configurations, and stand-ins with random weights.

    python -m slimlib.paper stand-in runs/stand-in              full size, 7 GB on disk; loads by the same path
    python -m slimlib.paper stand-in runs/tiny --tiny           the same classes and files in a few megabytes
    python -m slimlib.paper check                               one compress, decompress and training step at 256 px

What can be proven without the real weights is proven with these: that the folders and the names of files and tensors
are understood, what everything costs (`slimlib.costs`), and that it fits into memory. What they cannot show is any
figure of quality. The configurations say what the models' own config.json say; `PUBLISHED` holds the numbers of
parameters of the published files.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import timm
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import nn
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPTextConfig,
    CLIPTextModel,
)

from .caption import CaptionPrior
from .codec import CAPTION_PRIOR, SlimCodec
from .compressor import CompressorConfig, LatentCompressor
from .machines import to_tensor
from .pool import ScenePool
from .repro import atomic_write, quiet_libraries, write_card
from .roi import gradcam, latent_mask
from .scales import Scale
from .scenes import PocketScenes
from .training import Stage1Config, Stage2Config, train_stage2

COMPRESSOR = CompressorConfig(latent_channels=4, factor=8, guidance=3.0)
"""The pocket's architecture for Stable Diffusion's latents. The t0 table is the pocket's: tune it on real weights."""

_CROSS = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
_CROSS_UP = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
_UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": _CROSS,
    "up_block_types": _CROSS_UP,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}
_TEXT = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 1,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "sample_size": 512,
        "scaling_factor": 0.18215,
    },
    "unet sd21": {
        **_UNET,
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    "unet sd15": {**_UNET, "attention_head_dim": 8, "cross_attention_dim": 768},
    "text_encoder sd21": {  # OpenCLIP ViT-H without its last layer
        **_TEXT,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 512,
    },
    "text_encoder sd15": {  # CLIP ViT-L/14
        **_TEXT,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
        "projection_dim": 768,
    },
    "captioner": {
        "text_config": {
            "vocab_size": 30524,
            "hidden_size": 768,
            "encoder_hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 512,
            "bos_token_id": 30522,
            "eos_token_id": 2,
            "sep_token_id": 102,
            "pad_token_id": 0,
        },
        "vision_config": {"hidden_size": 768, "intermediate_size": 3072, "image_size": 384, "patch_size": 16},
    },
    "clipseg": {"reduce_dim": 64, "use_complex_transposed_convolution": True, "vision_config": {"patch_size": 16}},
    "machine_a": {"model_name": "resnet50.tv_in1k"},
    "machine_b": {"model_name": "convnext_tiny.fb_in1k"},
}
"""What the published models' config.json say, as far as it differs from the libraries' defaults or matters."""

PUBLISHED = {
    "vae": 83_653_863,
    "unet sd21": 865_910_724,
    "unet sd15": 859_520_964,
    "text_encoder sd21": 340_387_840,
    "text_encoder sd15": 123_060_480,
    "captioner": 223_971_644,  # the file of 989,820,849 bytes holds the words' table twice
    "machine_a": 25_557_032,
    "machine_b": 28_589_128,
}
"""Parameters of the published models; a test holds what `build` makes against them."""

_TINY_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY: dict[str, dict[str, Any]] = {
    "vae": {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4},
    "unet sd21": {
        "block_out_channels": [16, 16, 32, 32],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": [2, 2, 4, 4],
        "cross_attention_dim": 32,
    },
    "unet sd15": {
        "block_out_channels": [16, 16, 32, 32],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "cross_attention_dim": 32,
    },
    "text_encoder sd21": {**_TINY_TEXT, "projection_dim": 16},
    "text_encoder sd15": {**_TINY_TEXT, "projection_dim": 32},
    "captioner": {
        "text_config": {**_TINY_TEXT, "encoder_hidden_size": 32, "projection_dim": 32},
        "vision_config": {**_TINY_TEXT, "image_size": 32},
    },
    "clipseg": {
        "reduce_dim": 8,
        "extract_layers": [0, 1],
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 16,
        "projection_dim": 16,
        "text_config": {**_TINY_TEXT, **_TEXT},
        "vision_config": {**_TINY_TEXT, "image_size": 32},
    },
    "machine_a": {"model_name": "test_resnet"},
    "machine_b": {"model_name": "test_convnext"},
}
"""What a tiny stand-in changes; classes, files and vocabularies stay."""

SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
"""scheduler_config.json of Stable Diffusion 2.1-base."""

ON_DISK = 7.0
"""GB that a stand-in of the full size takes on disk."""

_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def build(part: str, tiny: bool = False) -> nn.Module:
    """A network of `CONFIGS` ("vae", "unet sd21", ...) with random weights; on `torch.device("meta")` without any."""
    config = _merged(CONFIGS[part], TINY[part]) if tiny else CONFIGS[part]
    kind = part.split()[0]
    if kind == "vae":
        return AutoencoderKL(**config)
    if kind == "unet":
        return UNet2DConditionModel(**config)
    if kind == "text_encoder":
        return CLIPTextModel(CLIPTextConfig(**config))
    if kind == "captioner":
        return BlipForConditionalGeneration(BlipConfig(**config))
    if kind == "clipseg":
        return CLIPSegForImageSegmentation(CLIPSegConfig(**config))
    return timm.create_model(config["model_name"], pretrained=False, num_classes=1000)


def save_stand_in(
    folder: str | Path,
    tiny: bool = False,
    family: str = "sd21",
    prediction: str = "epsilon",
    variant: str | None = None,
    shard: str | None = None,
    published_names: bool = True,
    safety_checker: bool = False,
    seed: int = 0,
) -> Scale:
    """Write ldm/, captioner/, clipseg/, machine_a/, machine_b/ and compressor/ with random weights.

    Args:
        folder: where to.
        tiny: a few megabytes instead of gigabytes.
        family: "sd21" or "sd15": UNet and text encoder.
        prediction: what the scheduler says the UNet predicts: "epsilon" or "v_prediction".
        variant: "fp16" stores the diffusion model in half precision under that variant's file names.
        shard: largest file, such as "1GB": larger networks come in several, with an index.
        published_names: name tensors as the published files do, which are older than the libraries.
        safety_checker: add the (empty) entry of Stable Diffusion 1.5's safety checker to model_index.json.
        seed: of the weights.

    Returns:
        A scale that names these folders.
    """
    quiet_libraries()
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part in ("vae", "unet", "text_encoder"):
            network = build(part if part == "vae" else f"{part} {family}", tiny)
            network = network.half() if variant == "fp16" else network
            network.save_pretrained(
                folder / "ldm" / part, variant=variant, **({"max_shard_size": shard} if shard else {})
            )
            if published_names and not shard:
                _rename(folder / "ldm" / part, part)
            del network
        _save_words(folder / "ldm" / "tokenizer", family)
        index: dict[str, Any] = {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.10.0",
            "feature_extractor": [None, None],
            "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"] if safety_checker else [None, None],
            "scheduler": ["diffusers", SCHEDULER["_class_name"]],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        _write_json(folder / "ldm" / "model_index.json", index)
        scheduler = SCHEDULER | {"prediction_type": prediction}
        _write_json(folder / "ldm" / "scheduler" / "scheduler_config.json", scheduler)
        _save_captioner(folder / "captioner", tiny, published_names)
        build("clipseg", tiny).save_pretrained(folder / "clipseg")
        _save_words(folder / "clipseg", "sd15")
        clipseg = {"image_processor_type": "ViTImageProcessor", "processor_class": "CLIPSegProcessor", **_PIXELS}
        _write_json(folder / "clipseg" / "preprocessor_config.json", clipseg | {"size": 64 if tiny else 352})
        for machine in ("machine_a", "machine_b"):
            _save_machine(folder / machine, machine, tiny)
        LatentCompressor(tiny_compressor() if tiny else COMPRESSOR).save_pretrained(folder / "compressor")
    prior = CaptionPrior.fit(["a dog", "a cat on a sofa", "a man riding a horse"])
    prior.save(folder / "compressor" / CAPTION_PRIOR)
    about = "Random weights: a stand-in for what stage 1 leaves."
    write_card(folder / "compressor", "Compressor, untrained", about, asdict(Stage1Config(steps=0)), {}, "None.")
    return Scale.from_name(folder).with_(size=256)


def check(folder: str | Path, memory: float = 12.0, size: int = 256, progress: Callable[[str], None] = print) -> float:
    """One compress, decompress and step of stage 2 with the models in a folder: the codec's own functions, on the CPU.

    Args:
        folder: what `save_stand_in` wrote.
        memory: most that the process may take, in GB (10^9 bytes).
        size: side of the picture in pixels.
        progress: gets a line for each part.

    Returns:
        Peak memory of the process in GB.

    Raises:
        MemoryError: less than `memory` is free, so that nothing was begun; or it took more.
    """
    free = free_memory() / 1e9
    if free < memory:
        raise MemoryError(f"{free:.1f} GB are free, up to {memory:g} GB may be needed: end something else first")
    scale, image = Scale.from_name(folder), PocketScenes("test", size)[0].image
    clock = _Clock(progress)
    codec = SlimCodec.from_pretrained(scale, "cpu", exact=False)
    clock("load the codec")
    stream = codec.compress(image, quality=0.5)
    clock(f"compress: {len(stream)} bytes, caption and all")
    picture = codec.decompress(stream)
    assert picture.size == image.size and codec.inspect(stream).size == len(stream)
    clock(f"decompress in {codec.inspect(stream).steps} steps")
    x = to_tensor(image)
    latents = codec.ldm.encode(x).numpy()
    grid = latents.shape[-1]
    m = latent_mask(gradcam(codec.machine, x), grid, grid)[0]
    pool = ScenePool(
        (x.numpy() * 255).astype(np.uint8), (m.numpy() * 255).astype(np.uint8), np.array([0]), ["a dog"], [""]
    )
    codec._captioner = None  # as in training, where captions come from a cache
    config = Stage2Config(steps=1, batch=1, warmup=1)
    before = [p.detach().clone() for p in codec.compressor.parameters()]
    with tempfile.TemporaryDirectory() as out:
        parts = (codec.ldm, codec.machine, out, codec.compressor)
        train_stage2(config, latents, pool, *parts, progress=False, device="cpu")
    after = codec.compressor.parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)), "the step changed nothing"
    peak = clock("one step of stage 2, batch 1")
    if peak > memory:
        raise MemoryError(f"the peak was {peak:.2f} GB; {memory:g} GB are allowed")
    progress(f"the peak was {peak:.2f} GB ({peak * 1e9 / 2**30:.2f} GiB); {memory:g} GB are allowed")
    return peak


def free_memory() -> int:
    """Bytes that this process can still take: of the machine, or of the container (cgroup) that it runs in."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))


class _Clock:
    """Says how long each part took, and how much memory the process has taken at the most so far."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.start = say, time.perf_counter()

    def __call__(self, what: str) -> float:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
        self.say(f"{what:<44} {time.perf_counter() - self.start:6.1f} s, peak {peak:5.2f} GB")
        self.start = time.perf_counter()
        return peak


_PIXELS = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
}


def _merged(base: dict, changes: dict) -> dict:
    nested = {k: _merged(base.get(k, {}), v) for k, v in changes.items() if isinstance(v, dict)}
    return {**base, **changes, **nested}


def tiny_compressor() -> CompressorConfig:
    """A compressor for the tiny stand-ins."""
    sizes = {"stem": 16, "width": 16, "depth": 1, "heads": 2, "y_channels": 8, "h_channels": 4, "net_width": 8}
    return CompressorConfig(factor=8, guidance=1.5, **sizes)  # type: ignore[arg-type]


def _rename(folder: Path, part: str) -> None:
    """Name the tensors of a file as the published ones do: as the libraries did years ago."""
    (path,) = folder.glob("*.safetensors")  # one file: the published ones are not sharded
    tensors = load_file(path)
    if part == "vae":
        for new, old in _OLD_ATTENTION.items():
            tensors = {k.replace(f".attentions.0.{new}.", f".attentions.0.{old}."): v for k, v in tensors.items()}
    elif part == "text_encoder":
        tensors = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in tensors.items()}
        length = tensors["text_model.embeddings.position_embedding.weight"].shape[0]
        tensors["text_model.embeddings.position_ids"] = torch.arange(length)[None]
    elif part == "captioner":
        words = tensors["text_decoder.bert.embeddings.word_embeddings.weight"]
        tensors["text_decoder.cls.predictions.decoder.weight"] = words.clone()
        tensors["text_decoder.cls.predictions.decoder.bias"] = tensors["text_decoder.cls.predictions.bias"].clone()
        places = tensors["text_decoder.bert.embeddings.position_embeddings.weight"].shape[0]
        tensors["text_decoder.bert.embeddings.position_ids"] = torch.arange(places)[None]
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})


def _save_words(folder: Path, family: str) -> None:
    """A CLIP tokenizer of the real size and layout (vocab.json, merges.txt), with made-up merges."""
    letters = _byte_letters()
    vocabulary = letters + [f"{letter}</w>" for letter in letters]
    lower = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pairs = ((x, y) for x, y in itertools.product(lower, [*lower, *(f"{c}</w>" for c in lower)]))
    triples = ((x + y, z) for x, y, z in itertools.product(lower, lower, [*lower, *(f"{c}</w>" for c in lower)]))
    quads = ((x + y + z, w) for x, y, z, w in itertools.product("aeiou", lower, lower, lower))
    wanted = _TEXT["vocab_size"] - 2 - len(vocabulary)
    merges = list(itertools.islice(itertools.chain(pairs, triples, quads), wanted))
    words = vocabulary + [x + y for x, y in merges] + ["<|startoftext|>", "<|endoftext|>"]
    assert len(words) == len(set(words)) == _TEXT["vocab_size"]
    _write_json(folder / "vocab.json", {word: i for i, word in enumerate(words)})
    lines = ["#version: 0.2", *(f"{x} {y}" for x, y in merges)]
    atomic_write(folder / "merges.txt", ("\n".join(lines) + "\n").encode())
    padding = "!" if family == "sd21" else "<|endoftext|>"
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    _write_json(folder / "special_tokens_map.json", special | {"pad_token": padding})
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    _write_json(folder / "tokenizer_config.json", special | config | {"pad_token": padding})


def _byte_letters() -> list[str]:
    """GPT-2's printable stand-ins for the 256 byte values, "!" first, as in CLIP's vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [chr(256 + i) for i in range(256 - len(printable))]
    return [chr(b) for b in printable] + others


def _save_captioner(folder: Path, tiny: bool, published_names: bool) -> None:
    build("captioner", tiny).save_pretrained(folder)
    if published_names:
        _rename(folder, "captioner")
    size = CONFIGS["captioner"]["text_config"]["vocab_size"]
    special = {
        0: "[PAD]",
        100: "[UNK]",
        101: "[CLS]",
        102: "[SEP]",
        103: "[MASK]",
        size - 2: "[DEC]",
        size - 1: "[ENC]",
    }
    words = [special.get(i) or "word" + "".join(chr(97 + i // 26**k % 26) for k in range(4)) for i in range(size)]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=512, bos_token="[DEC]")
    side = _merged(CONFIGS["captioner"], TINY["captioner"] if tiny else {})["vision_config"]["image_size"]
    pixels = BlipImageProcessor(size={"height": side, "width": side})
    BlipProcessor(image_processor=pixels, tokenizer=tokenizer).save_pretrained(folder)


def _save_machine(folder: Path, part: str, tiny: bool) -> None:
    network = build(part, tiny)
    published = timm.get_pretrained_cfg(CONFIGS[part]["model_name"]).to_dict()  # type: ignore[union-attr]
    keep = ("interpolation", "crop_pct", "crop_mode", "mean", "std")
    cfg = {**network.pretrained_cfg, **{k: published[k] for k in keep}, "num_classes": 1000}
    cfg["input_size"] = (3, 64, 64) if tiny else published["input_size"]
    save_for_hf(network, folder, safe_serialization=True, model_config={"num_classes": 1000, "pretrained_cfg": cfg})


def _write_json(path: Path, values: dict) -> None:
    atomic_write(path, (json.dumps(values, indent=2) + "\n").encode())


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m slimlib.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, dest="command")
    one = commands.add_parser("stand-in", help="write models with random weights")
    one.add_argument("folder", type=Path)
    one.add_argument("--tiny", action="store_true", help="a few megabytes")
    one.add_argument("--family", choices=("sd21", "sd15"), default="sd21")
    one.add_argument("--prediction", choices=("epsilon", "v_prediction"), default="epsilon")
    two = commands.add_parser("check", help="compress, decompress, train a step at full size, within a memory limit")
    two.add_argument("--folder", type=Path, help="a stand-in (default: a new one, removed afterwards)")
    two.add_argument("--memory", type=float, default=12.0, help="GB that it may take (default: %(default)s)")
    two.add_argument("--size", type=int, default=256, help="side of the picture (default: %(default)s)")
    a = parser.parse_args(arguments)
    if a.command == "stand-in":
        print(save_stand_in(a.folder, a.tiny, a.family, a.prediction))
        return 0
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = a.folder or Path(temporary)
            if not (folder / "compressor").is_dir():
                write_apart(folder)
            check(folder, a.memory, a.size, lambda line: print(line, flush=True))
    except (MemoryError, OSError) as error:
        print(f"slimlib.paper: {error}", file=sys.stderr)
        return 1
    return 0


def write_apart(folder: Path) -> None:
    """Write a stand-in of the full size in a process of its own, so that its memory does not count."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free / 1e9
    if free < ON_DISK:
        raise OSError(f"{free:.1f} GB are free in {place}, {ON_DISK:g} GB are written: set TMPDIR, or give --folder")
    print(f"writing {ON_DISK:g} GB of random weights into {folder}", flush=True)
    start = time.perf_counter()
    command = [sys.executable, "-m", "slimlib.paper", "stand-in", str(folder)]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise OSError(f"the weights could not be written into {folder}")
    print(f"{'write them':<44} {time.perf_counter() - start:6.1f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
