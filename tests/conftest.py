"""Shared by all tests: no network, the order of the tests, and a world of tiny models with random weights."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest

# Before any library reads them: tests never look anything up, and never open a window.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on a busy machine, threads that spin while they wait take minutes
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two tests at a time keep two cores busier than the threads of one

TINY_CLASSES = ["red fox", "banana", "violin", "lion", "tulip", "bus"]
"""The labels of the two machines of `tiny_world`, in the order of their outputs."""

TINY_WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] a an the photo of in on at and red fox banana violin lion tulip bus "
    "forest field street beach snow lake night ##s , ."
).split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast things first: unit tests, then notebooks, then the browser; each in the order of the files."""
    items.sort(key=lambda item: 2 if item.get_closest_marker("browser") else bool(item.get_closest_marker("notebook")))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests go to whatever process is free; those of a file with the browser stay together, as they share a page."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if Path(file).stem in ("test_book", "test_browser", "test_static") else nodeid

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out like assets/pocket, with real library models of random weights, made in seconds.

    ldm/         Stable Diffusion layout; VAE f=4 with 4 channels, 64 px images; fp16 variant and fp32
    captioner/   BLIP for 64 px images, with its processor; fp16 variant and fp32
    machine_a/   timm ResNet for 64 px images, classes TINY_CLASSES
    machine_b/   timm ConvNeXt, the same classes

    The whole session shares it: copy it before changing anything in it.
    """
    return write_tiny_world(tmp_path_factory.mktemp("tiny_world"))


def write_tiny_world(folder: Path) -> Path:
    """What `tiny_world` is, also for scripts."""
    import torch

    from slimlib.utils import quiet_libraries

    quiet_libraries()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _save_ldm(folder / "ldm")
        _save_captioner(folder / "captioner")
        _save_machine(folder / "machine_a", "test_resnet")
        _save_machine(folder / "machine_b", "test_convnext")
    return folder


@pytest.fixture(scope="session")
def tiny_codec_world(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_world` with compressor/, and a caption prior in it: all that a codec needs. Shared as well."""
    from tiny_codec import make_world

    return make_world(tiny_world, tmp_path_factory.mktemp("tiny_codec") / "world")


def _save_ldm(folder: Path) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=3.0,  # brings the latent of these random weights to about unit variance
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    text_encoder = CLIPTextModel(CLIPTextConfig(**_text_model(16)))
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipeline = StableDiffusionPipeline(vae, text_encoder, _tokenizer(16), unet, scheduler, None, None, None, False)
    _save_twice(pipeline, folder)


def _save_captioner(folder: Path) -> None:
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    text = _text_model(24) | {"encoder_hidden_size": 32, "sep_token_id": TINY_WORDS.index("[SEP]")}
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    vision = {name: text[name] for name in names} | {"image_size": 64, "patch_size": 16}
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=32, image_text_hidden_size=32)
    _save_twice(BlipForConditionalGeneration(config).eval(), folder)
    image_processor = BlipImageProcessor(size={"height": 64, "width": 64})
    BlipProcessor(image_processor=image_processor, tokenizer=_tokenizer(24)).save_pretrained(folder)


def _save_machine(folder: Path, name: str) -> None:
    import timm
    from timm.models import save_for_hf

    model = timm.create_model(name, num_classes=len(TINY_CLASSES))
    preprocessing = {**model.pretrained_cfg, "input_size": (3, 64, 64), "crop_pct": 1.0}
    config = {"num_classes": len(TINY_CLASSES), "label_names": TINY_CLASSES, "pretrained_cfg": preprocessing}
    save_for_hf(model, folder, safe_serialization=True, model_config=config)


def _text_model(length: int) -> dict[str, Any]:
    """What both text models have in common."""
    tokens = {name: TINY_WORDS.index(f"[{word}]") for name, word in (("bos", "CLS"), ("eos", "SEP"), ("pad", "PAD"))}
    return {
        "vocab_size": len(TINY_WORDS),
        "hidden_size": 32,
        "projection_dim": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": length,
        **{f"{name}_token_id": index for name, index in tokens.items()},
    }


def _tokenizer(length: int) -> Any:
    """One word-level tokenizer class for both text models: CLIPTokenizer maps every word to [UNK]."""
    from transformers import BertTokenizer

    return BertTokenizer(vocab={word: i for i, word in enumerate(TINY_WORDS)}, model_max_length=length)


def _save_twice(model: Any, folder: Path) -> None:
    """The fp16 variant first, from a copy: saved last, it would leave "half" in the config of both."""
    import torch

    copy.deepcopy(model).to(torch.float16).save_pretrained(folder, variant="fp16")
    model.save_pretrained(folder)
