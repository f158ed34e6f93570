"""Walks end where the decoder ends; a student starts as its teacher, learns, survives its file, knows its teacher."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import one_step
import pandas as pd
import pytest
import torch
from one_step import LORA_FILE, OneStepConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from slimlib.compressor import LatentCompressor
from slimlib.data.scenes import PocketScenes
from slimlib.images import to_tensor
from slimlib.ldm import CLEAN, LatentDiffusion, last
from slimlib.scales import ASSETS

CONFIG = OneStepConfig(steps=4, batch=2, teacher_steps=3, t_low=20, t_high=300, rank=2, log_every=1)


@pytest.fixture(scope="module")
def world(tiny_codec_world: Path) -> SimpleNamespace:
    """The tiny diffusion model and compressor, latents of ten scenes, and a walk from each."""
    ldm = LatentDiffusion.from_pretrained(tiny_codec_world / "ldm", "fp16", "cpu")
    compressor = LatentCompressor.from_pretrained(tiny_codec_world / "compressor", "cpu")
    with torch.no_grad():
        latents = ldm.encode(to_tensor([PocketScenes("train", 64)[i].image for i in range(10)]))
    walks = one_step.make_walks(ldm, compressor, latents, ["a red fox"] * len(latents), CONFIG)
    return SimpleNamespace(ldm=ldm, compressor=compressor, latents=latents, walks=walks)


@pytest.fixture
def ldm(world: SimpleNamespace) -> LatentDiffusion:
    return world.ldm


def test_a_walk_ends_where_the_guided_decoder_ends(world: SimpleNamespace) -> None:
    ldm, walks, guidance = world.ldm, world.walks, world.compressor.config.walk(0.0).guidance
    assert walks.points.shape == (10, 4, 4, 16, 16) and walks.points.dtype == torch.float16
    assert (walks.times.diff(dim=1) < 0).all() and (walks.times[:, -1] == CLEAN).all()
    assert ((walks.times[:, 0] >= CONFIG.t_low) & (walks.times[:, 0] <= CONFIG.t_high)).all()
    assert guidance > 1
    for i in (0, 9):
        z, text = walks.points[i : i + 1, 0].float(), ldm.text(walks.captions[i : i + 1])
        for k in range(3):
            with torch.no_grad():
                z = ldm.ddim_step(z, int(walks.times[i, k]), int(walks.times[i, k + 1]), text, guidance)
            torch.testing.assert_close(walks.points[i : i + 1, k + 1].float(), z, atol=2e-2, rtol=2e-2)


def test_walks_start_at_noisy_decompressed_latents(world: SimpleNamespace) -> None:
    """Of all qualities, some without caption; and the same every time."""
    latents, calm = world.latents, replace(CONFIG, t_low=3, t_high=3, drop_caption=0.5)
    given = world.ldm, world.compressor, latents, [f"a bus {i}" for i in range(10)], calm
    made, again = one_step.make_walks(*given), one_step.make_walks(*given)
    assert 0 < sum(words == "" for words in made.captions) < 10
    assert all(words in ("", f"a bus {i}") for i, words in enumerate(made.captions))
    with torch.no_grad():
        ends = [world.compressor(latents, quality)["z_hat"] for quality in (0.0, 1.0)]
    start, low, high = made.points[:, 0].float(), *ends
    near = [float((start - z).square().mean()) for z in (low, high, latents)]
    assert max(near[:2]) < float(latents.square().mean()) and min(near[:2]) < near[2]
    assert torch.equal(again.points, made.points) and again.captions == made.captions


def test_a_new_student_says_what_its_teacher_says(ldm: LatentDiffusion) -> None:
    student = one_step.student_of(ldm, rank=2)
    z_hat, words = torch.randn(2, 4, 16, 16), ["a lion", ""]
    said, meant = (last(model.enhance(z_hat, words, 200, 1, [1, 2]), z_hat) for model in (student, ldm))
    torch.testing.assert_close(said, meant, atol=1e-4, rtol=1e-4)
    trained = [name for name, p in student.unet.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert any("conv1" in name for name in trained) and any("to_q" in name for name in trained)
    assert student.vae is ldm.vae and not any(p.requires_grad for p in ldm.unet.parameters())


def test_the_loss_is_that_of_the_end(ldm: LatentDiffusion) -> None:
    z_t, t, text = torch.randn(2, 4, 16, 16), torch.tensor([300, 50]), ldm.text(["a bus", "a tulip"])
    end = ldm.ddim_step(z_t, t, CLEAN, text)
    assert one_step.distillation_loss(ldm, z_t, t, text, end) == pytest.approx(0, abs=1e-6)
    off = end + (1 - ldm.alpha_bar(t)).sqrt()
    assert one_step.distillation_loss(ldm, z_t, t, text, off) == pytest.approx(1, rel=1e-3)


def test_training_learns_and_goes_on_where_it_was(world: SimpleNamespace, tmp_path: Path) -> None:
    config = replace(CONFIG, steps=20, batch=4, lr=1e-2)
    students = [one_step.student_of(world.ldm, config.rank) for _ in range(2)]
    one_step.train(students[0], world.walks, config, tmp_path, progress=False)
    losses = pd.read_csv(tmp_path / "log.csv").loss
    assert len(losses) == 20 and losses[-6:].mean() < 0.9 * losses[:6].mean()
    one_step.train(students[1], world.walks, config, tmp_path, progress=False)  # finds nothing left to do
    for ours, theirs in zip(*(student.unet.parameters() for student in students), strict=True):
        assert torch.equal(ours, theirs)


def test_early_points_are_likelier(world: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no end of a walk is one: it is what the others are to reach."""
    student, walks, seen = one_step.student_of(world.ldm, 2), world.walks, []

    def loss(_: LatentDiffusion, z_t: torch.Tensor, t: torch.Tensor, *_rest: torch.Tensor) -> torch.Tensor:
        seen.extend(t.tolist())
        return sum(p.sum() for p in student.unet.parameters() if p.requires_grad) * z_t.mean()

    monkeypatch.setattr(one_step, "distillation_loss", loss)
    one_step.train(student, walks, replace(CONFIG, steps=40, batch=8), tmp_path, progress=False)
    starts = set(walks.times[:, 0].tolist())
    assert 0.48 < sum(t in starts for t in seen) / len(seen) < 0.68 and CLEAN not in seen


def test_a_student_survives_its_file_and_knows_its_teacher(ldm: LatentDiffusion, tmp_path: Path) -> None:
    student = one_step.student_of(ldm, rank=2)
    with torch.no_grad():
        for p in student.unet.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn(p.shape))
    one_step.save_student(student, ldm, tmp_path)
    tensors = load_file(tmp_path / LORA_FILE)
    with safe_open(tmp_path / LORA_FILE, "pt") as file:
        metadata = file.metadata()
    assert all(tensor.dtype == torch.float16 for tensor in tensors.values())

    merged = one_step.load_student(ldm, tmp_path)
    assert [n for n, _ in merged.unet.named_parameters()] == [n for n, _ in ldm.unet.named_parameters()]
    assert not any(p.requires_grad for p in merged.unet.parameters())
    z_hat, words = torch.randn(1, 4, 16, 16), ["a violin"]
    ours, theirs, plain = (last(m.enhance(z_hat, words, 300, 1), z_hat) for m in (student, merged, ldm))
    torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=1e-2)
    assert not torch.allclose(theirs, plain, atol=1e-2)
    far = one_step.distances(ldm, merged, z_hat.expand(2, -1, -1, -1), words * 2, 3, 1.0)
    assert [name.partition(" of ")[2].partition(" from")[0] for name in far][:4] == [
        *("K = 1", "K = 2", "untrained student", "one-step student")
    ]
    assert far["distance from the teacher of K = 1 from t0 = 300 (rms)"] == pytest.approx(
        far["distance from the teacher of untrained student from t0 = 300 (rms)"], rel=1e-4
    ), "without guidance"

    with pytest.raises(ValueError, match="other weights"):
        one_step.load_student(merged, tmp_path)
    save_file(dict(list(tensors.items())[1:]), tmp_path / LORA_FILE, metadata)
    with pytest.raises(ValueError, match="missing or surplus"):
        one_step.load_student(ldm, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"train.py one_step"):
        one_step.load_student(ldm, tmp_path / "nowhere")


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="more steps than levels"):
        OneStepConfig(teacher_steps=30, t_low=20)


def test_what_ships() -> None:
    """The adapter belongs to the UNet that ships, is small, and is nearer to the teacher than it began."""
    assert (one_step.FOLDER / LORA_FILE).stat().st_size < 1_000_000
    one_step.load_student(LatentDiffusion.from_pretrained(ASSETS / "pocket" / "ldm", "fp16", "cpu"))
    figures = json.loads((one_step.FOLDER / "card.json").read_text())["figures"]
    far = {name: value for name, value in figures.items() if "distance" in name and "t0 = 300" in name}
    trained = next(value for name, value in far.items() if "one-step student" in name)
    untrained = next(value for name, value in far.items() if "untrained student" in name)
    assert trained < untrained
