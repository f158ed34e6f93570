"""Walks end where the decoder ends; a student starts as its teacher, learns, survives its file, knows its teacher."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_codec import make_world

from slimlib import distill
from slimlib.compressor import LatentCompressor
from slimlib.distill import DistillConfig, Walks
from slimlib.ldm import CLEAN, LatentDiffusion
from slimlib.scenes import PocketScenes
from slimlib.training import LORA_FILE

CONFIG = DistillConfig(steps=4, batch=2, walks=4, teacher_steps=3, t_low=20, t_high=300, rank=2)


@pytest.fixture(scope="module")
def world(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tiny_world, tmp_path_factory.mktemp("distill") / "world")


@pytest.fixture(scope="module")
def ldm(world: Path) -> LatentDiffusion:
    return LatentDiffusion.from_pretrained(world / "ldm", "fp16", "cpu")


@pytest.fixture(scope="module")
def walks(world: Path, ldm: LatentDiffusion) -> Walks:
    scenes = [PocketScenes("train", 64)[i] for i in range(4)]
    compressor = LatentCompressor.from_pretrained(world / "compressor", "cpu")
    made = distill.make_walks(ldm, compressor, scenes, CONFIG, progress=False)
    again = distill.make_walks(ldm, compressor, scenes[2:], CONFIG, first=2, progress=False)
    assert torch.equal(again.times, made.times[2:]) and again.captions == made.captions[2:]
    torch.testing.assert_close(again.points, made.points[2:], atol=1e-2, rtol=1e-2)  # whatever part is made alone
    return made


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_walk_ends_where_the_decoder_ends(ldm: LatentDiffusion, guidance: float) -> None:
    z_hat, words, t0 = torch.randn(2, 4, 16, 16), ["a red fox", ""], torch.tensor([120, 40])
    noise = ldm.noise(z_hat.shape, [5, 6])
    points, times = distill.walk(ldm, ldm.add_noise(z_hat, t0, noise), t0, words, 4, guidance)
    assert points.shape == (2, 5, 4, 16, 16)
    assert times[:, 0].tolist() == t0.tolist() and times[:, -1].tolist() == [CLEAN] * 2
    for i in range(2):
        alone = ldm.enhance(z_hat[i : i + 1], words[i : i + 1], int(t0[i]), 4, [5 + i], guidance)
        torch.testing.assert_close(points[i : i + 1, -1], alone, atol=1e-4, rtol=1e-4)


def test_walks_hold_what_they_say(walks: Walks) -> None:
    assert len(walks) == 4 and walks.points.shape == (4, 4, 4, 16, 16) and walks.points.dtype == torch.float16
    assert (walks.times.diff(dim=1) < 0).all() and (walks.times[:, -1] == CLEAN).all()
    assert ((walks.times[:, 0] >= CONFIG.t_low) & (walks.times[:, 0] <= CONFIG.t_high)).all()


def test_a_new_student_says_what_its_teacher_says(ldm: LatentDiffusion) -> None:
    student = distill.student_of(ldm, rank=2)
    z_hat, words = torch.randn(2, 4, 16, 16), ["a lion", ""]
    with torch.no_grad():
        said = student.enhance(z_hat, words, 200, 1, [1, 2])
    torch.testing.assert_close(said, ldm.enhance(z_hat, words, 200, 1, [1, 2]), atol=1e-4, rtol=1e-4)
    adapter = distill.adapter_of(student)
    assert adapter and all("lora_" in name for name in adapter)
    assert any("conv1" in name for name in adapter) and any("to_q" in name for name in adapter)
    assert student.vae is ldm.vae and not any(p.requires_grad for p in ldm.unet.parameters())


def test_the_loss_is_that_of_the_end(ldm: LatentDiffusion) -> None:
    z_t, t, text = torch.randn(2, 4, 16, 16), torch.tensor([300, 50]), ldm.text(["a bus", "a tulip"])
    end = ldm.ddim_step(z_t, t, CLEAN, text)
    assert distill.distillation_loss(ldm, z_t, t, text, end) == pytest.approx(0, abs=1e-6)
    off = end + (1 - ldm.alpha_bar(t)).sqrt()
    assert distill.distillation_loss(ldm, z_t, t, text, off) == pytest.approx(1, rel=1e-3)


def test_training_learns_and_goes_on_where_it_was(ldm: LatentDiffusion, walks: Walks, tmp_path: Path) -> None:
    config = replace(CONFIG, steps=20, batch=4, lr=1e-2)
    student = distill.student_of(ldm, config.rank)
    _, losses = distill.train(student, walks, config, tmp_path, progress=False)
    assert len(losses) == 20 and sum(losses[-6:]) < 0.9 * sum(losses[:6])
    again = distill.student_of(ldm, config.rank)
    _, none = distill.train(again, walks, config, tmp_path, progress=False)
    assert none == []
    for ours, theirs in zip(distill.adapter_of(student).values(), distill.adapter_of(again).values(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_student_survives_its_file_and_knows_its_teacher(ldm: LatentDiffusion, tmp_path: Path) -> None:
    student = distill.student_of(ldm, rank=2)
    with torch.no_grad():
        for matrix in distill.adapter_of(student).values():
            matrix.add_(0.02 * torch.randn(matrix.shape))
    distill.save_student(student, ldm, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / LORA_FILE)
    with safe_open(tmp_path / "a" / LORA_FILE, "pt") as file:
        metadata = file.metadata()
    assert all(tensor.dtype == torch.float16 for tensor in tensors.values())

    loaded = distill.load_student(ldm, tmp_path / "a")
    assert [n for n, _ in loaded.unet.named_parameters()] == [n for n, _ in ldm.unet.named_parameters()]
    assert not any(p.requires_grad for p in loaded.unet.parameters())
    z_hat, words = torch.randn(1, 4, 16, 16), ["a violin"]
    with torch.no_grad():
        ours, theirs = (model.enhance(z_hat, words, 300, 1) for model in (student, loaded))
    torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=1e-2)
    assert not torch.allclose(theirs, ldm.enhance(z_hat, words, 300, 1), atol=1e-2)
    assert distill.unet_print(loaded) != distill.unet_print(ldm)

    with pytest.raises(ValueError, match="other weights"):
        distill.load_student(loaded, tmp_path / "a")
    save_file(dict(list(tensors.items())[1:]), tmp_path / "a" / LORA_FILE, metadata)
    with pytest.raises(ValueError, match="missing or surplus"):
        distill.load_student(ldm, tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="slimlib.distill"):
        distill.load_student(ldm, tmp_path / "nowhere")


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="more steps than levels"):
        DistillConfig(teacher_steps=30, t_low=20)


def test_the_command_publishes_and_resumes(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"--out {tmp_path / 'out'} --models {world} --work {tmp_path / 'work'} --walks 3 --steps 2 --batch 2"
    words += " --teacher-steps 3 --rank 2 --t-high 60 --test-scenes 2 --device cpu --quiet --resume"
    distill.main(words.split())
    first = load_file(tmp_path / "out" / LORA_FILE)
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["training"]["walks"] == 3 and card["training"]["command"].startswith("python -m slimlib.distill")
    assert any("one-step student" in name for name in card["figures"])
    assert "distance from the teacher" in capsys.readouterr().out
    stored = sorted((tmp_path / "work").rglob("*.safetensors"))
    written = [path.stat().st_mtime_ns for path in stored if path.parent.name in ("walks", "pretrain")]
    distill.main(words.split())
    assert [path.stat().st_mtime_ns for path in stored if path.parent.name in ("walks", "pretrain")] == written
    second = load_file(tmp_path / "out" / LORA_FILE)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_what_ships() -> None:
    """The adapter belongs to the UNet that ships, is small, and is nearer to the teacher than it began."""
    from slimlib.scales import ASSETS

    if not (distill.FOLDER / LORA_FILE).is_file():
        pytest.skip("no adapter ships yet")
    assert (distill.FOLDER / LORA_FILE).stat().st_size < 1_000_000
    distill.load_student(LatentDiffusion.from_pretrained(ASSETS / "pocket" / "ldm", "fp16", "cpu"))
    figures = json.loads((distill.FOLDER / "card.json").read_text())["figures"]
    far = {name: value for name, value in figures.items() if "distance" in name and "t0 = 300" in name}
    trained = next(value for name, value in far.items() if "one-step student" in name)
    untrained = next(value for name, value in far.items() if "untrained student" in name)
    assert trained < untrained
