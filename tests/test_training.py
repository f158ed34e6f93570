"""Both stages learn, resume exactly, and refuse settings that do not fit; gradients go where they should."""

from __future__ import annotations

import copy
import csv
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from slimlib import pretrain
from slimlib.caption import CaptionPrior
from slimlib.codec import CAPTION_PRIOR
from slimlib.compressor import CompressorConfig, LatentCompressor
from slimlib.ldm import LatentDiffusion
from slimlib.machines import load_machine
from slimlib.pool import ScenePool
from slimlib.repro import load_state
from slimlib.training import (
    LORA_FILE,
    Stage1Config,
    Stage2Config,
    decode_once,
    diffusion_loss,
    error_weights,
    evaluate_latents,
    evaluate_pictures,
    learning_rate,
    main,
    random_view,
    rate_weight,
    spatial_features,
    start_times,
    task_loss,
    train_stage1,
    train_stage2,
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
    return train_stage1(config, latents, masks, folder, compressor=TINY, progress=False, device="cpu", **options)


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
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "parts/model.safetensors").read_bytes()
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


# ---- stage 2 ------------------------------------------------------------------------------------------


TWO = Stage2Config(steps=4, batch=2, warmup=2, save_every=2, log_every=1, lambda_max=1.0)
NOUNS = ("a red fox", "a banana", "a violin", "a lion", "a tulip", "a bus")


@pytest.fixture(scope="module")
def world(tiny_world: Path) -> SimpleNamespace:
    """The tiny diffusion model and machine, eight scenes of noise for them, and their latents."""
    ldm = LatentDiffusion.from_pretrained(tiny_world / "ldm", device="cpu")
    rng = np.random.default_rng(0)
    labels = np.arange(8) % 6
    pool = ScenePool(
        images=rng.integers(0, 256, (8, 3, 64, 64), dtype=np.uint8),
        masks=rng.integers(0, 256, (8, 16, 16), dtype=np.uint8),
        labels=labels,
        nouns=[NOUNS[i] for i in labels],
        places=["in a forest"] * 8,
    )
    latents = ldm.encode(pool.batch(np.arange(8))).numpy()
    return SimpleNamespace(ldm=ldm, machine=load_machine(str(tiny_world / "machine_a"), "cpu"), pool=pool, z=latents)


def train_two(config: Stage2Config, world: SimpleNamespace, folder: Path, **options) -> LatentCompressor:
    torch.manual_seed(7)
    start = LatentCompressor(TINY)
    options = {"progress": False, "device": "cpu"} | options
    return train_stage2(config, world.z, world.pool, world.ldm, world.machine, folder, start, **options)


def columns(folder: Path) -> dict[str, list[float]]:
    with (folder / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def test_stage2_learns_and_leaves_the_frozen_networks_alone(world: SimpleNamespace, tmp_path: Path) -> None:
    frozen = [world.ldm.unet, world.ldm.vae, world.ldm.text_encoder, world.machine]
    before = [p.clone() for module in frozen for p in module.parameters()]
    train_two(replace(TWO, steps=24, lr=5e-3, task="features"), world, tmp_path)
    log = columns(tmp_path)
    assert {"bpp", "weighted_mse", "diffusion", "task"} <= log.keys() and len(log["step"]) == 24
    assert np.mean(log["loss"][-6:]) < np.mean(log["loss"][:6])
    after = [p for module in frozen for p in module.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in after)
    LatentCompressor.from_pretrained(tmp_path, device="cpu")


@pytest.mark.parametrize("lora", [0, 2])
def test_stage2_resumes_exactly(world: SimpleNamespace, tmp_path: Path, lora: int) -> None:
    config = replace(TWO, lora=lora)
    world = copy.copy(world)
    world.ldm = copy.deepcopy(world.ldm)  # the adapters stay in it
    train_two(config, world, tmp_path / "whole")
    train_two(config, world, tmp_path / "parts", max_seconds=0.0)
    assert load_state(tmp_path / "parts/checkpoint.safetensors")[1]["step"] == 1
    train_two(config, world, tmp_path / "parts")
    whole, _ = load_state(tmp_path / "whole/checkpoint.safetensors")
    parts, _ = load_state(tmp_path / "parts/checkpoint.safetensors")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)
    assert any(key.startswith("model/lora/") for key in whole) == bool(lora)
    adapters = [(tmp_path / run / "unet_lora" / LORA_FILE) for run in ("whole", "parts")]
    assert all(path.exists() == bool(lora) for path in adapters)
    if lora:
        one, other = (load_file(path) for path in adapters)
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
        fresh = copy.deepcopy(world.ldm.unet)
        fresh.delete_adapters("slim")
        fresh.load_lora_adapter(str(tmp_path / "whole/unet_lora"), prefix=None, weight_name=LORA_FILE)
        text, z = world.ldm.text(["a red fox"]), torch.from_numpy(world.z[:1])
        with torch.no_grad():
            ours, again = (unet(z, 50, text).sample for unet in (world.ldm.unet, fresh))
        assert torch.allclose(ours, again, atol=1e-5), "the library reads what it wrote"


def test_the_task_reaches_the_compressor_through_both_networks(world: SimpleNamespace) -> None:
    """The gradient of the cross-entropy at z_hat is what finite differences say."""
    torch.manual_seed(0)
    z_hat = torch.from_numpy(world.z[:2]).clone().requires_grad_()
    noise, t, labels = torch.randn_like(z_hat), torch.tensor([100, 20]), torch.tensor([0, 1])

    def loss(z: torch.Tensor) -> torch.Tensor:
        _, x_hat = decode_once(world.ldm, z, t, ["a red fox", ""], noise)
        return task_loss(world.machine, x_hat, labels).sum()

    with torch.autocast("cpu", enabled=False), patch("slimlib.training.autocast", lambda *_, **__: nullcontext()):
        (gradient,) = torch.autograd.grad(loss(z_hat), z_hat)
        direction = gradient / gradient.norm()
        with torch.no_grad():
            difference = (loss(z_hat + 0.01 * direction) - loss(z_hat - 0.01 * direction)) / 0.02
    assert gradient.norm() > 0
    assert difference.item() == pytest.approx(gradient.norm().item(), rel=0.05)


def test_decoding_once_is_one_step_of_the_codec(world: SimpleNamespace) -> None:
    z_hat, captions = torch.from_numpy(world.z[:2]), ["a red fox", "a banana"]
    with torch.no_grad(), patch("slimlib.training.autocast", lambda *_, **__: nullcontext()):
        noise = world.ldm.noise(z_hat.shape, 5)
        z_tilde, x_hat = decode_once(world.ldm, z_hat, torch.tensor([60, 0]), captions, noise)
        enhanced = world.ldm.enhance(z_hat, captions, 60, 1, 5)
        assert torch.equal(z_tilde[1], z_hat[1]), "at t0 = 0 the UNet is left out"
        # the codec's last step ends a little short of "no noise left"
        assert torch.allclose(z_tilde[0], enhanced[0], atol=0.15)
        assert torch.allclose(x_hat, world.ldm.decode(z_tilde), atol=1e-5)
    config = replace(TINY, t0_table=[[0.0, 100], [1.0, 0]])
    assert start_times(config, torch.tensor([0.0, 0.5, 1.0])).tolist() == [100, 50, 0]


def test_the_diffusion_term_is_the_error_in_v(world: SimpleNamespace) -> None:
    torch.manual_seed(0)
    ldm, t = world.ldm, torch.tensor([5, 60, 300])
    z_hat = torch.from_numpy(world.z[:3]).clone().requires_grad_()
    noise, text = torch.randn_like(z_hat), ldm.text(["a red fox"] * 3)
    z_tilde, found = ldm.predict(ldm.add_noise(z_hat, t, noise), t, text)
    abar = ldm.alpha_bar(t)
    v, v_found = (abar.sqrt() * e - (1 - abar).sqrt() * z for z, e in ((z_hat, noise), (z_tilde, found)))
    term = diffusion_loss(ldm, z_hat, z_tilde, t)
    assert torch.allclose(term, (v - v_found).square().mean((1, 2, 3)), rtol=1e-3)
    snr = (abar / (1 - abar)).flatten()
    eps_error = (noise - found).square().mean((1, 2, 3))
    assert torch.allclose(eps_error, snr / (1 + snr) * term, rtol=1e-3), "and that in eps, but for a factor"
    (gradient,) = torch.autograd.grad(term.sum(), z_hat)
    pull = 2 * (z_hat - z_tilde) / (1 - abar) / z_hat[0].numel()
    assert torch.allclose(gradient, pull, atol=1e-6), "towards z_tilde, and nothing through the UNet"


def test_feature_matching_asks_for_no_label(world: SimpleNamespace) -> None:
    x = world.pool.batch(np.arange(3))
    labels = torch.tensor([0, 1, 2])
    same = task_loss(world.machine, x, labels, x)
    other = task_loss(world.machine, x.flip(0), labels, x)
    assert same.shape == (3,) and same.max() < 1e-6 < other[0]
    assert torch.equal(other, task_loss(world.machine, x.flip(0), labels.flip(0), x))
    features = spatial_features(world.machine, x)
    assert features.ndim == 4 and not world.machine.cam_layer._forward_hooks


def test_views_are_of_both_pictures_alike() -> None:
    x = torch.rand(6, 3, 24, 24, requires_grad=True)
    assert random_view(0, x) == (x, None)
    torch.manual_seed(0)
    one, other = random_view(0.1, x, x.detach())
    assert torch.equal(one, other) and one.shape == x.shape
    assert (one - x).abs().amax((1, 2, 3)).min() > 0.1, "each is another view"
    assert one.min() >= 0 and one.max() <= 1
    flat = random_view(0.1, torch.full((2, 3, 8, 8), 0.3))[0]
    assert torch.allclose(flat, torch.full_like(flat, 0.3)), "nothing comes in from outside"
    (gradient,) = torch.autograd.grad(one.sum(), x)
    assert gradient.abs().sum() > 0


def test_stage2_checks_what_it_is_given(world: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="features"):
        Stage2Config(task="segmentation")
    with pytest.raises(ValueError, match="belong together"):
        options = {"progress": False, "device": "cpu"}
        short, start = world.z[:4], LatentCompressor(TINY)
        train_stage2(TWO, short, world.pool, world.ldm, world.machine, tmp_path, start, **options)
    train_two(replace(TWO, steps=1), world, tmp_path)
    with pytest.raises(ValueError, match=r"stage2\.b"):
        train_two(replace(TWO, steps=1, b=1.0), world, tmp_path)
    with pytest.raises(ValueError, match=r"stage1\.steps"):
        train(CONFIG, tmp_path)  # another stage's checkpoint


def test_pictures_are_made_as_the_codec_makes_them(world: SimpleNamespace) -> None:
    torch.manual_seed(0)
    model, machines = LatentCompressor(TINY).eval(), {"a": world.machine}
    rows = evaluate_pictures(model, world.ldm, machines, world.z, world.pool, (0.0, 1.0), scenes=5, batch=2)
    assert [row["quality"] for row in rows] == [0, 1] and 0 < rows[0]["bpp"] < rows[1]["bpp"]
    with torch.no_grad():
        z_hat = model(torch.from_numpy(world.z[:5]), 1.0)["z_hat"]
        z = world.ldm.enhance(z_hat, world.pool.nouns[:5], TINY.t0(1.0), TINY.steps, list(range(5)))
        hits = world.machine(world.ldm.decode(z)).argmax(1).numpy() == world.pool.labels[:5]
    assert rows[1]["a"] == pytest.approx(100 * hits.mean())


# ---- several processes, and the command line -------------------------------------------------------------


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    """Each process draws its own batch; gradients are averaged, so that both end with the same weights."""
    latents, masks = synthetic(16)
    np.savez(tmp_path / "data.npz", latents=latents, masks=masks)
    script = tmp_path / "two.py"
    script.write_text(
        "import os, sys, numpy as np, torch\n"
        "from pathlib import Path\n"
        "from slimlib.compressor import CompressorConfig\n"
        "from slimlib.training import Stage1Config, train_stage1\n"
        "folder = Path(sys.argv[1])\n"
        "data = np.load(folder / 'data.npz')\n"
        f"tiny = CompressorConfig(**{asdict(TINY)!r})\n"
        f"config = Stage1Config(**{asdict(replace(CONFIG, steps=3, batch=2))!r})\n"
        "options = dict(compressor=tiny, progress=False, device='cpu')\n"
        "model = train_stage1(config, data['latents'], data['masks'], folder / 'out', **options)\n"
        "total = sum(p.double().abs().sum().item() for p in model.encoder.parameters())\n"
        "(folder / f\"rank{os.environ['RANK']}\").write_text(repr(total))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    sums = [float((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-3)  # only the first one was rounded to what is stored
    train(replace(CONFIG, steps=3, batch=2), tmp_path / "alone")
    both, _ = load_state(tmp_path / "out/checkpoint.safetensors")
    alone, _ = load_state(tmp_path / "alone/checkpoint.safetensors")
    assert both.keys() == alone.keys() and any(not torch.equal(both[k], alone[k]) for k in both)


@pytest.fixture
def models(tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny world with a compressor and its card, and a test split of six scenes."""
    folder = tmp_path / "models"
    shutil.copytree(tiny_world, folder)
    LatentCompressor(TINY).save_pretrained(folder / "compressor")
    CaptionPrior.fit(["a red fox", "a banana"]).save(folder / "compressor" / CAPTION_PRIOR)
    card = {"training": {"w_bg": 0.3, "lambda_min": 0.02, "lambda_max": 2.0}}
    (folder / "compressor" / "card.json").write_text(json.dumps(card))

    def few(run: pretrain.Run) -> ScenePool:
        return ScenePool.load(run.work / "cache", "test", 6, progress=False)

    monkeypatch.setattr(pretrain.Run, "test_pool", few)
    return folder


def test_command_line_trains_both_stages(models: Path, tmp_path: Path) -> None:
    common = ["--models", str(models), "--start", str(models / "compressor"), "--work", str(tmp_path / "work")]
    common += ["--device", "cpu", "--pool", "8", "--batch", "2", "--steps", "2", "--test-scenes", "3", "--quiet"]
    one, two = tmp_path / "one", tmp_path / "two"
    main(["--stage", "1", "--warm", "--out", str(one), "--w-bg", "0.5", *common])
    main(["--stage", "2", "--task", "features", "--lora", "1", "--out", str(two), "--max-seconds", "0", *common])
    assert not two.exists(), "nothing is published before the last step"
    main(["--stage", "2", "--task", "features", "--lora", "1", "--out", str(two), "--resume", *common])
    for folder in (one, two):
        assert LatentCompressor.from_pretrained(folder, device="cpu").config == TINY
        prior = (folder / CAPTION_PRIOR).read_bytes()
        assert prior == (models / "compressor" / CAPTION_PRIOR).read_bytes()
        assert (folder / "README.md").exists()
    card = json.loads((two / "card.json").read_text())
    assert card["training"]["command"].startswith("python -m slimlib.training ")
    assert card["training"]["steps"] == 2 and card["training"]["task"] == "features"
    assert card["training"]["w_bg"] == 0.3 and card["training"]["lambda_max"] == 2.0, "as its start was trained"
    assert card["figures"]["test scenes (pictures)"] == 3
    assert 0 <= card["figures"]["top-1 of machine_b at quality 0.5 [%]"] <= 100
    assert (two / "unet_lora" / LORA_FILE).exists() and not (one / "unet_lora").exists()
    assert json.loads((one / "card.json").read_text())["training"]["w_bg"] == 0.5


def test_command_line_refuses_what_a_stage_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--task"):
        main(["--stage", "1", "--out", str(tmp_path / "x"), "--task", "ce", "--work", str(tmp_path)])
    assert not list(tmp_path.iterdir())
