"""Stand-ins for the models of the paper scale: the published folders, files and tensor names, with random numbers.

  python assets/paper/stand_in.py runs/stand-in         full size, 7 GB on disk; loads by the same path
  python assets/paper/stand_in.py runs/tiny --tiny      the same classes and files in a few megabytes

What can be proven without the real weights is proven with these: that the folders and the names of files and tensors
are understood, and what everything takes (trial.py). What they cannot show is any figure of quality.
"""

from __future__ import annotations

import argparse
import itertools
import json
import string
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from tokenizers.pre_tokenizers import ByteLevel
from transformers import BertTokenizer, BlipImageProcessor, BlipProcessor

from slimlib.__main__ import in_one_line
from slimlib.caption import CAPTION_PRIOR, CaptionPrior
from slimlib.data.train import write_card
from slimlib.measure.costs import build, published
from slimlib.scales import Scale
from slimlib.training import Stage1Config
from slimlib.utils import quiet_libraries, write_file

LETTERS = string.ascii_lowercase


def write(
    folder: str | Path,
    tiny: bool = False,
    family: str = "sd21",
    prediction: str = "epsilon",
    variant: str | None = None,
    shard: str | None = None,
    old_names: bool = True,
    seed: int = 0,
) -> Scale:
    """Write ldm/, captioner/, clipseg/, machine_a/, machine_b/ and compressor/; returns a scale that names them.

    Args:
        folder: where to.
        tiny: a few megabytes instead of gigabytes.
        family: "sd21" or "sd15": UNet and text encoder.
        prediction: what the scheduler says the UNet predicts: "epsilon" or "v_prediction".
        variant: "fp16" stores the diffusion model in half precision under that variant's file names.
        shard: largest file, such as "1GB": larger networks come in several, with an index, and with new names.
        old_names: name tensors as the published files do, which are older than the libraries.
        seed: of the weights.
    """
    quiet_libraries()
    folder, changes = Path(folder), published("tiny") if tiny else {}

    def config(part: str) -> dict[str, Any]:
        return _merged(published(part), changes.get(part, {}))

    def save(network: Any, place: str, **options: Any) -> None:
        network.save_pretrained(folder / place, **options)
        if old_names and not shard:
            _rename(folder / place)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for place, part in (("vae", "vae"), ("unet", f"unet_{family}"), ("text_encoder", f"text_encoder_{family}")):
            network = build(config(part)).to(torch.float16 if variant == "fp16" else torch.float32)
            save(network, f"ldm/{place}", variant=variant, max_shard_size=shard or "50GB")
        save(build(config("captioner")), "captioner")
        for part in ("clipseg", "compressor"):
            build(config(part)).save_pretrained(folder / part)
        for part in ("machine_a", "machine_b"):
            facts = {"num_classes": 1000, "pretrained_cfg": config(part)["pretrained_cfg"]}
            save_for_hf(build(config(part)), folder / part, safe_serialization=True, model_config=facts)
    _json(folder / "ldm/model_index.json", published("model_index"))
    _json(folder / "ldm/scheduler/scheduler_config.json", published("scheduler") | {"prediction_type": prediction})
    _clip_words(folder / "ldm/tokenizer", padding="!" if family == "sd21" else "<|endoftext|>")
    _clip_words(folder / "clipseg", padding="<|endoftext|>")
    _json(folder / "clipseg/preprocessor_config.json", config("clipseg_preprocessor"))
    _blip_words(folder / "captioner", config("captioner"))
    CaptionPrior.fit(["a dog", "a cat on a sofa", "a man riding a horse"]).save(folder / "compressor" / CAPTION_PRIOR)
    about = "Random weights: a stand-in for what stage 1 leaves."
    write_card(folder / "compressor", "Compressor, untrained", about, asdict(Stage1Config(steps=0)), {}, "None.")
    return replace(Scale.from_name(folder), size=256)


def _rename(folder: Path) -> None:
    """Name the tensors of a part as the published files do: as the libraries did years ago."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    if folder.name == "vae":
        for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            tensors = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in tensors.items()}
    elif folder.name == "text_encoder":
        tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}
        places = len(tensors["text_model.embeddings.position_embedding.weight"])
        tensors["text_model.embeddings.position_ids"] = torch.arange(places)[None]
    elif folder.name == "captioner":  # its words' table twice
        embeddings, head = "text_decoder.bert.embeddings.", "text_decoder.cls.predictions."
        tensors[f"{head}decoder.weight"] = tensors[f"{embeddings}word_embeddings.weight"].clone()
        tensors[f"{head}decoder.bias"] = tensors[f"{head}bias"].clone()
        places = len(tensors[f"{embeddings}position_embeddings.weight"])
        tensors[f"{embeddings}position_ids"] = torch.arange(places)[None]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def _merged(base: dict, changes: dict) -> dict:
    return base | {k: _merged(base.get(k, {}), v) if isinstance(v, dict) else v for k, v in changes.items()}


def _json(path: Path, values: dict) -> None:
    write_file(path, (json.dumps(values, indent=2) + "\n").encode())


def _clip_words(folder: Path, padding: str) -> None:
    """CLIP's tokenizer with its letters, places and size; only two letters merge, the rest is unused."""
    letters = sorted(ByteLevel.alphabet())
    merges = [f"{a} {b}{end}" for a, b, end in itertools.product(LETTERS, LETTERS, ("", "</w>"))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    unused = [f"unused{i}</w>" for i in range(published("text_encoder_sd21")["vocab_size"] - 2 - len(words))]
    words += [*unused, "<|startoftext|>", "<|endoftext|>"]
    _json(folder / "vocab.json", {word: i for i, word in enumerate(words)})
    write_file(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]).encode())
    special = {"bos_token": words[-2], "eos_token": words[-1], "unk_token": words[-1], "pad_token": padding}
    _json(folder / "special_tokens_map.json", special)
    kind = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    _json(folder / "tokenizer_config.json", special | kind)


def _blip_words(folder: Path, config: dict[str, Any]) -> None:
    size, side = config["text_config"]["vocab_size"], config["vision_config"]["image_size"]
    words = ["word" + "".join(four) for four in itertools.islice(itertools.product(LETTERS, repeat=4), size)]
    words[0], words[100:104], words[-2:] = "[PAD]", ["[UNK]", "[CLS]", "[SEP]", "[MASK]"], ["[DEC]", "[ENC]"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = BertTokenizer(vocab=vocabulary, model_max_length=512, bos_token="[DEC]")
    pixels = BlipImageProcessor(size={"height": side, "width": side})
    BlipProcessor(image_processor=pixels, tokenizer=tokenizer).save_pretrained(folder)


def main() -> int:
    """Write what the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a few megabytes")
    parser.add_argument("--family", choices=("sd21", "sd15"), default="sd21")
    parser.add_argument("--prediction", choices=("epsilon", "v_prediction"), default="epsilon")
    print(write(**vars(parser.parse_args())))
    return 0


if __name__ == "__main__":
    sys.exit(in_one_line("stand_in.py", main))
