"""Stage 1 learns, resumes exactly, and refuses settings that do not fit."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from slimlib.compressor import CompressorConfig, LatentCompressor
from slimlib.repro import load_state
from slimlib.training import (
    Stage1Config,
    error_weights,
    evaluate_latents,
    learning_rate,
    rate_weight,
    train_stage1,
)

TINY = CompressorConfig(stem=16, width=32, depth=1, heads=2, y_channels=12, h_channels=4, net_width=16)
CONFIG = Stage1Config(steps=10, batch=4, warmup=2, save_every=5, log_every=1)


def synthetic(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Smooth latents with a textured disc each: (N, 4, 32, 32) float16 and (N, 1, 32, 32) uint8."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:32, :32] / 32
    latents, masks = [], []
    for _ in range(count):
        slope = rng.normal(size=(4, 2, 1, 1))
        z = slope[:, 0] * (rows - 0.5) + slope[:, 1] * (columns - 0.5) + 0.5 * rng.normal(size=(4, 1, 1))
        centre, radius = rng.uniform(0.25, 0.75, 2), rng.uniform(0.15, 0.25)
        disc = np.hypot(rows - centre[0], columns - centre[1]) < radius
        waves = np.sin(2 * np.pi * (rng.uniform(2, 4) * rows + rng.uniform(2, 4) * columns))
        latents.append(np.where(disc, rng.normal(size=(4, 1, 1)) * waves + 0.5, z))
        masks.append(disc[None])
    return np.stack(latents).astype(np.float16), (np.stack(masks) * 255).astype(np.uint8)


def train(config: Stage1Config, folder: Path, **options) -> LatentCompressor:
    latents, masks = synthetic(16)
    return train_stage1(
        config, latents, masks, folder, compressor=TINY, progress=False, device="cpu", **options
    )


def test_loss_falls(tmp_path: Path) -> None:
    train(replace(CONFIG, steps=60, lr=3e-3, batch=8), tmp_path)
    with (tmp_path / "log.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 60
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    LatentCompressor.from_pretrained(tmp_path, device="cpu")


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    train(CONFIG, tmp_path / "whole")
    train(CONFIG, tmp_path / "parts", max_seconds=0.0)  # stops after one step
    assert load_state(tmp_path / "parts/checkpoint.safetensors")[1]["step"] == 1
    torch.manual_seed(123)  # what happens in between does not matter
    train(CONFIG, tmp_path / "parts")
    whole, _ = load_state(tmp_path / "whole/checkpoint.safetensors")
    parts, meta = load_state(tmp_path / "parts/checkpoint.safetensors")
    assert meta["step"] == 10
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (
        tmp_path / "parts/model.safetensors"
    ).read_bytes()
    with (tmp_path / "parts/log.csv").open(newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(1, 11))


def test_resuming_with_other_settings_is_refused(tmp_path: Path) -> None:
    train(replace(CONFIG, steps=2), tmp_path)
    with pytest.raises(ValueError, match=r"stage1\.w_bg"):
        train(replace(CONFIG, steps=2, w_bg=1.0), tmp_path)
    train(replace(CONFIG, steps=2, w_bg=1.0), tmp_path, resume=False)


def test_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="checkpoint"):
        train(CONFIG, tmp_path)


def test_settings_and_shapes_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lamda"):
        Stage1Config.from_dict({"lamda": 1})
    assert Stage1Config.from_dict({"steps": 3}).steps == 3
    latents, masks = synthetic(4)
    with pytest.raises(ValueError, match="belong together"):
        train_stage1(CONFIG, latents, masks[:3], tmp_path, progress=False)


def test_weights_have_mean_one() -> None:
    m = torch.rand(3, 1, 8, 8)
    m[2] = 0
    for w_bg in (0.05, 1.0):
        weights = error_weights(m, w_bg)
        assert torch.allclose(weights.mean((1, 2, 3)), torch.ones(3))
    assert torch.equal(error_weights(m, 1.0), torch.ones_like(m))
    one = error_weights((m[:1] > 0.5).float(), 0.05)
    assert one.max() / one.min() == pytest.approx(20, rel=1e-4)


def test_schedules() -> None:
    lam = rate_weight(torch.tensor([0.0, 0.5, 1.0]), CONFIG)
    assert lam.tolist() == pytest.approx(
        [CONFIG.lambda_min, (CONFIG.lambda_min * CONFIG.lambda_max) ** 0.5, CONFIG.lambda_max]
    )
    rates = [learning_rate(step, CONFIG) for step in range(CONFIG.steps)]
    assert max(rates) == CONFIG.lr and rates[0] < rates[1] and rates[-1] < 0.1 * CONFIG.lr


def test_evaluation_reports_region_and_background() -> None:
    torch.manual_seed(0)
    latents, masks = synthetic(6)
    model = LatentCompressor(TINY).train()
    rows = evaluate_latents(model, latents, masks, (0.0, 1.0), batch=4)
    assert model.training
    assert [row["quality"] for row in rows] == [0, 1]
    assert rows[0]["bpp"] < rows[1]["bpp"]
    for row in rows:
        area = row["roi_area"]
        assert area == pytest.approx(float(masks.mean() / 255), rel=1e-4)
        mixed = area * row["roi_mse"] + (1 - area) * row["background_mse"]
        assert row["mse"] == pytest.approx(mixed, rel=1e-4)
        assert 0 < row["roi_bits"] < 1 and 0 <= row["roi_iou"] <= 1
