"""The shipped models: loaded offline by the stock libraries, each with a card that meets its floor."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torchvision.ops import box_iou

from slimlib.data.scenes import CLASSES, CUTOUTS, PocketScenes
from slimlib.images import to_tensor
from slimlib.machines import load_machine
from slimlib.measure.methods import find
from slimlib.scales import ASSETS, Scale

POCKET = ASSETS / "pocket"
SCALE = Scale.from_name("pocket")
CARDS = sorted(str(path.parent.relative_to(POCKET)) for path in POCKET.rglob("card.json"))
"""That none is missing, test_pocket_training.py holds: each recipe has its folder."""


@pytest.fixture(scope="module")
def scenes():
    return list(PocketScenes("test", n=62))


def card(name: str) -> dict:
    return json.loads((POCKET / name / "card.json").read_text())


def figure(name: str, *words: str) -> float:
    """The one figure of a card that is called by all these words."""
    (value,) = [v for what, v in card(name)["figures"].items() if all(word in what for word in words)]
    return value


@pytest.mark.parametrize("name", CARDS)
def test_each_card_tells_how_it_was_made(name):
    facts = card(name)
    assert {"command", "steps", "seed", "device", "seconds", "data"} <= set(facts["training"])
    told = " ".join(f"{number} {what}" for what, number in facts["figures"].items())
    counts = [int(number) for number in re.findall(r"(\d+) (?:test scenes|validation scenes|pictures drawn)", told)]
    assert counts and max(counts) >= (31 if name == "one_step" else 248), "it has distances in place of accuracies"
    text = (POCKET / name / "README.md").read_text()
    assert facts["title"] in text and "licence" in text.lower()


def test_the_floors_are_met():
    vae = card("ldm/vae")["figures"]
    assert vae["PSNR of reconstructions [dB]"] >= 26
    assert vae["top-1 of machine_b on originals"] - vae["top-1 of machine_b on reconstructions"] <= 10
    for name, floor in {"machine_a": 85, "machine_a2": 75, "machine_b": 95, "machine_c": 85}.items():
        assert card(name)["figures"]["top-1 on test scenes [%]"] >= floor, name
    assert card("machine_d")["figures"]["found in test scenes [%]"] >= 80
    assert card("ldm")["figures"]["drawings recognised by machine_b [%]"] >= 60
    assert figure("captioner", "own crop", "test scenes") >= 85


def test_only_safetensors_and_not_too_many():
    files = [p for p in POCKET.glob("*/**/*") if p.is_file() and "__pycache__" not in p.parts]
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".md", ".txt", ".csv"}
    assert sum(p.stat().st_size for p in files) < 90e6


@torch.no_grad()
@pytest.mark.parametrize("name", ["machine_a", "machine_a2", "machine_b", "machine_c"])
def test_timm_classifies(name, scenes):
    net = timm.create_model(f"local-dir:{POCKET / name}", pretrained=True).eval()
    assert list(net.pretrained_cfg["label_names"]) == CLASSES
    x = to_tensor([scene.image for scene in scenes])
    mine = load_machine(str(POCKET / name), "cpu")
    hits = (mine(x).argmax(-1) == torch.tensor([scene.label for scene in scenes])).float().mean().item()
    # 62 scenes of a machine that knows p of them: four standard deviations below the card
    p = card(name)["figures"]["top-1 on test scenes [%]"] / 100
    assert hits >= p - 4 * np.sqrt(p * (1 - p) / len(scenes)) - 0.01


@torch.no_grad()
def test_the_finder_finds(scenes):
    """As often as its card says, within four standard deviations; the box is where the object is, not anywhere."""
    boxes = torch.from_numpy(np.stack([scene.box for scene in scenes]))
    found = find(load_machine(str(POCKET / "machine_d"), "cpu"), to_tensor([scene.image for scene in scenes]))
    hits, p = box_iou(found, boxes).diagonal() > 0.5, card("machine_d")["figures"]["found in test scenes [%]"] / 100
    assert hits.float().mean() >= p - 4 * np.sqrt(p * (1 - p) / len(scenes))
    assert (box_iou(found, boxes.roll(1, 0)).diagonal() > 0.5).float().mean() < hits.float().mean() - 0.2


@torch.no_grad()
def test_the_stock_pipeline_draws_a_picture():
    from diffusers import StableDiffusionPipeline

    stored = {"variant": "fp16", "dtype": torch.float32, "local_files_only": True}
    pipeline = StableDiffusionPipeline.from_pretrained(SCALE.ldm, safety_checker=None, **stored)
    pipeline.set_progress_bar_config(disable=True)
    wanted = [c for c in CUTOUTS if not c.held_out][::14]
    drawing = {"num_inference_steps": 12, "guidance_scale": 4.0, "generator": torch.Generator().manual_seed(0)}
    images = pipeline([f"a photo of {c.noun}" for c in wanted], output_type="pt", **drawing).images
    assert images.shape == (len(wanted), 3, 128, 128)
    assert images.isfinite().all() and images.std(dim=(1, 2, 3)).min() > 0.02  # pictures, not one flat colour
    assert len({round(float(image.mean()), 4) for image in images}) == len(wanted)  # and the words matter


@torch.no_grad()
def test_stock_blip_captions_a_crop(scenes):
    from transformers import AutoProcessor, BlipForConditionalGeneration

    model = BlipForConditionalGeneration.from_pretrained(SCALE.captioner, local_files_only=True).float().eval()
    processor = AutoProcessor.from_pretrained(SCALE.captioner, local_files_only=True)
    right = 0
    for scene in scenes[:40]:
        rows, columns = np.nonzero(scene.matte > 0.5)
        crop = scene.image.crop((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
        tokens = model.generate(**processor(images=crop, return_tensors="pt"), max_new_tokens=12)
        right += CLASSES[scene.label] in processor.decode(tokens[0], skip_special_tokens=True)
    p = figure("captioner", "exact crop", "test scenes") / 100
    assert right / 40 >= p - 4 * np.sqrt(p * (1 - p) / 40)  # four standard deviations below its card


@torch.no_grad()
def test_the_vae_keeps_the_picture(scenes):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(Path(SCALE.ldm) / "vae", variant="fp16", dtype=torch.float32)
    x = to_tensor([scene.image for scene in scenes[:8]])
    z = vae.encode(2 * x - 1).latent_dist.mode()
    y = vae.decode(z).sample.clamp(-1, 1) / 2 + 0.5
    assert -10 * (x - y).square().mean((1, 2, 3)).log10().mean() > 25
    assert 0.7 < float(z.std()) * vae.config.scaling_factor < 1.4
