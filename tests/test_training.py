"""Both stages: every term of the losses counts, items stay together, gradients go where they should."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_codec import CAPTIONS, TINY
from torch import Tensor
from torch.nn import functional as F

from slimlib import training
from slimlib.compressor import LatentCompressor
from slimlib.ldm import LatentDiffusion
from slimlib.machines import load_machine
from slimlib.training import Stage1Config, Stage2Config

QUIET: dict[str, Any] = {"progress": False, "device": "cpu"}
ONE = Stage1Config(steps=2, batch=4, warmup=2, log_every=1)
TWO = Stage2Config(steps=3, batch=2, warmup=2, log_every=1, lambda_max=1.0)


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).random(shape)


def test_losses_are_what_the_formulas_say() -> None:
    """Written out in NumPy, for values at which each weight, term and division shows."""
    one = {"w_bg": 0.3, "lambda_min": 0.02, "lambda_max": 5.0, "beta": 0.7}
    (z, z_hat), (m, logits) = numbers(0, 2, 2, 4, 16, 16), numbers(1, 2, 2, 1, 16, 16)
    p = {"y": numbers(4, 2, 8, 4, 4), "h": numbers(5, 2, 4, 2, 2)}
    quality = np.array([0.2, 0.9])
    lam = 0.02 * (5.0 / 0.02) ** quality
    bpp = np.stack([-sum(np.log2(p[name][i]).sum() for name in "yh") / (16 * 16 * 4**2) for i in range(2)])
    weights = 0.3 + 0.7 * m
    weights = weights / weights.mean((1, 2, 3), keepdims=True)
    distortion = (weights * (z - z_hat) ** 2).mean((1, 2, 3))
    bce = (np.log1p(np.exp(logits)) - m * logits).mean()
    expected = ((bpp + lam * distortion) / np.sqrt(lam)).mean() + 0.7 * bce

    out: dict[str, Any] = {"z_hat": torch.from_numpy(z_hat), "roi_logits": torch.from_numpy(logits)}
    out["likelihoods"] = {name: torch.from_numpy(values) for name, values in p.items()}
    tensors = [torch.from_numpy(values) for values in (z, m, quality)]
    parts = {"bpp": bpp.mean(), "weighted_mse": distortion.mean(), "roi_bce": bce}
    loss, found = training.stage1_loss(out, *tensors, Stage1Config(**one), 4)
    assert {"loss": loss, **found} == pytest.approx({"loss": expected, **parts}, rel=1e-5)
    empty = training.error_weights(torch.zeros(1, 1, 4, 4), 0.0)
    assert bool(empty.isfinite().all()), "a picture without a region, and no weight outside"


def test_knots_learn_faster_and_do_not_decay() -> None:
    model = LatentCompressor(TINY)
    weights, knots = training.parameter_groups(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names.pop(parameter) for parameter in knots["params"]}
    assert {"log_gain", "log_inverse_gain", "log_hyper_gain", "gate_depth", "net.mean_gain.values"} <= found
    assert len(found) == 10 and (knots["speed"], knots["weight_decay"]) == (training.KNOT_SPEED, 0)
    assert set(names) == set(weights["params"]) and (weights["speed"], weights["weight_decay"]) == (1, 1e-4)


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray]:
    """Smooth latents with a textured disc each: (16, 4, 32, 32) float16 and (16, 32, 32) uint8."""
    rng, (rows, columns) = np.random.default_rng(0), np.mgrid[:32, :32] / 32
    latents, masks = [], []
    for _ in range(16):
        slope, (y, x) = rng.normal(size=(3, 4, 1, 1)), rng.uniform(0.25, 0.75, 2)
        masks.append(np.hypot(rows - y, columns - x) < rng.uniform(0.15, 0.25))
        waves = np.sin(2 * np.pi * (rng.uniform(2, 4) * rows + rng.uniform(2, 4) * columns))
        smooth = slope[0] * (rows - 0.5) + slope[1] * (columns - 0.5)
        latents.append(np.where(masks[-1], slope[2] * waves + 0.5, smooth + 0.5 * rng.normal(size=smooth.shape)))
    return np.stack(latents).astype(np.float16), 255 * np.stack(masks).astype(np.uint8)


def test_stage1_keeps_the_region(data: tuple, tmp_path: Path) -> None:
    """It learns, learns to see the region, and spends there what the background's weight leaves."""
    z, m = torch.from_numpy(data[0]).float(), torch.from_numpy(data[1])[:, None] > 0
    ratios = {}
    for w_bg in (0.02, 1.0):
        folder = tmp_path / str(w_bg)
        model = training.train_stage1(replace(ONE, steps=40, batch=8, lr=5e-3, w_bg=w_bg), *data, folder, TINY, **QUIET)
        log = pd.read_csv(folder / "log.csv")
        for name in ("loss", "roi_bce"):
            assert log[name][-10:].mean() < 0.8 * log[name][:10].mean(), name
        assert LatentCompressor.from_pretrained(folder, device="cpu").fingerprint() == model.fingerprint()
        with torch.no_grad():
            error = (model(z, 0.3)["z_hat"] - z).square().mean(1, keepdim=True)
        ratios[w_bg] = float(error[m].mean() / error[~m].mean())
    assert ratios[0.02] < 0.6 * ratios[1.0]


def test_stage1_starts_from_what_it_is_given_and_refuses_the_rest(data: tuple, tmp_path: Path) -> None:
    start, (z, m) = LatentCompressor(TINY), data
    before = start.encoder.y.weight.detach().clone()
    model = training.train_stage1(replace(ONE, lr=1e-4), z, m, tmp_path, start, **QUIET)
    assert model is start and 0 < (model.encoder.y.weight - before).abs().max() < 1e-3
    for config, masks, start, reason in (
        (ONE, m[:3], TINY, "belong together"),
        (ONE, m[:, :8], TINY, "belong together"),
        (replace(ONE, w_bg=1.0), m, TINY, "w_bg: 0.05 there, 1.0 asked for"),
        (ONE, m, replace(TINY, depth=2), "compressor"),
    ):
        with pytest.raises(ValueError, match=reason):
            training.train_stage1(config, z, masks, tmp_path, start, **QUIET)


@pytest.fixture(scope="module")
def world(tiny_world: Path) -> SimpleNamespace:
    """The tiny diffusion model, two teachers, eight pictures of noise for them, and their latents."""
    ldm = LatentDiffusion.from_pretrained(tiny_world / "ldm", device="cpu")
    images, masks = (255 * numbers(0, 8, 3, 64, 64)).astype(np.uint8), (255 * numbers(1, 8, 16, 16)).astype(np.uint8)
    labels = np.arange(8) % 6
    z = ldm.encode(torch.from_numpy(images) / 255).numpy()
    items = {"latents": z, "masks": masks, "labels": labels, "captions": [CAPTIONS[i] for i in labels]}
    teachers = [load_machine(str(tiny_world / f"machine_{name}"), "cpu") for name in "ab"]
    return SimpleNamespace(ldm=ldm, teachers=teachers, images=images, z=torch.from_numpy(z), items=items)


@pytest.fixture
def exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """No bfloat16 on processors that have it."""
    monkeypatch.setattr(training, "autocast", lambda *_, **__: nullcontext())


def train(config: Stage2Config, world: SimpleNamespace, folder: Path, **more: Any) -> LatentCompressor:
    torch.manual_seed(7)
    rest = {"ldm": world.ldm, "teachers": world.teachers, "images": world.images, "compressor": LatentCompressor(TINY)}
    return training.train_stage2(config, out=folder, **{**world.items, **rest, **QUIET, **more})


@pytest.mark.parametrize(("task", "drop", "view"), [("ce", 1.0, 0.0), ("ce", 0.0, 0.1), ("features", 0.5, 0.1)])
def test_stage2_hands_on_what_belongs_together(
    world: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, drop: float, view: float
) -> None:
    """Latent, map, words, label and picture of each item, through every part of the loss."""
    calls: dict[str, list] = {}

    def watch(name: str) -> None:
        real = getattr(training, name)
        monkeypatch.setattr(training, name, lambda *args: calls.setdefault(name, [*args, real(*args)])[-1])

    for name in ("decode_once", "random_view", "task_loss", "diffusion_loss", "stage1_loss"):
        watch(name)
    config = replace(TWO, steps=1, batch=32, task=task, drop_caption=drop, view=view, a=0.3, b=0.4)
    model = train(config, world, tmp_path)
    out, z, m, quality, used, factor, (first, _) = calls["stage1_loss"]
    index = [int((world.z - item).abs().sum((1, 2, 3)).argmin()) for item in z]
    assert torch.equal(z, world.z[index]) and used == config and factor == TINY.factor and len(set(index)) > 5
    assert sorted((32 * quality).long().tolist()) == list(range(32)), "one quality from each part of [0, 1]"
    np.testing.assert_allclose(m[:, 0].numpy(), world.items["masks"][index] / 255, rtol=1e-6)
    ldm, z_hat, t, words, noise, (z_tilde, x_hat) = calls["decode_once"]
    assert ldm is world.ldm and torch.equal(z_hat, out["z_hat"]) and noise.std() == pytest.approx(1, abs=0.1)
    assert torch.equal(t, training.start_times(TINY, quality))
    told = [word == world.items["captions"][i] for word, i in zip(words, index, strict=True)]
    assert set(words) - {""} <= set(CAPTIONS) and all(t or not w for t, w in zip(told, words, strict=True))
    assert 1 - sum(told) / 32 == pytest.approx(drop, abs=0.3 if 0 < drop < 1 else 0)
    most, original, *pictures, (seen, *targets) = calls["random_view"]
    assert most == view and original is x_hat and torch.equal(seen, x_hat) == (not view)
    teachers, shown, labels, *wanted, task_term = calls["task_loss"]
    assert teachers == world.teachers and shown is seen and labels.tolist() == list(world.items["labels"][index])
    assert len(pictures) == len(wanted) == (task == "features")
    assert not wanted or wanted[0] is targets[0]
    originals = torch.from_numpy(world.images[index]).float() / 255
    assert all(torch.equal(picture, originals) for picture in pictures)
    *given, diffusion = calls["diffusion_loss"]
    assert given[0] is world.ldm and all(map(torch.equal, given[1:], (out["z_hat"], z_tilde, t)))
    lam = config.lambda_min * (config.lambda_max / config.lambda_min) ** quality
    loss = first + (0.3 * lam.sqrt() * diffusion).mean() + (0.4 * task_term).mean()
    log = pd.read_csv(tmp_path / "log.csv").iloc[0]
    parts = {"loss": loss, "diffusion": diffusion.mean(), "task": task_term.mean()}
    assert {name: log[name] for name in parts} == pytest.approx({n: p.item() for n, p in parts.items()}, rel=1e-5)
    assert LatentCompressor.from_pretrained(tmp_path, device="cpu").fingerprint() == model.fingerprint()


def test_stage2_learns_and_leaves_the_frozen_networks_alone(world: SimpleNamespace, tmp_path: Path) -> None:
    frozen = [world.ldm.unet, world.ldm.vae, world.ldm.text_encoder, *world.teachers]
    before = [p.clone() for module in frozen for p in module.state_dict().values()]
    train(replace(TWO, steps=14, batch=4, lr=1e-2, task="features"), world, tmp_path)
    log = pd.read_csv(tmp_path / "log.csv")
    assert log["loss"][-5:].mean() < log["loss"][:5].mean()
    assert {"bpp", "weighted_mse", "roi_bce", "diffusion", "task"} <= set(log.columns)
    after = [p for module in frozen for p in module.state_dict().values()]
    assert all(map(torch.equal, before, after)) and all(p.grad is None for m in frozen for p in m.parameters())


@pytest.mark.parametrize("adapters", [False, True])
def test_stage2_resumes_exactly_and_trains_adapters_along(
    world: SimpleNamespace, tmp_path: Path, adapters: bool
) -> None:
    found: dict[str, dict[str, Tensor]] = {}
    for name, seconds in (("whole", None), ("parts", 0.0), ("parts", None)):
        ldm = copy.deepcopy(world.ldm)
        torch.manual_seed(0)
        if adapters:
            ldm.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"]))
        train(replace(TWO, lr=1e-2), world, tmp_path / name, ldm=ldm, max_seconds=seconds)
        trained = {key: p for key, p in ldm.unet.named_parameters() if p.requires_grad}
        found[name] = load_file(tmp_path / name / "model.safetensors") | trained
    whole, parts = found.values()
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in parts)
    assert bool(trained) == adapters and all(bool(p.any()) for p in trained.values()), "B starts at 0"


def test_checkpointing_changes_no_gradient(world: SimpleNamespace, tmp_path: Path) -> None:
    for checkpointing in (True, False):
        train(replace(TWO, steps=2, checkpointing=checkpointing), world, tmp_path / str(checkpointing))
        assert world.ldm.unet.is_gradient_checkpointing == checkpointing
    logs = [pd.read_csv(tmp_path / name / "log.csv").drop(columns="seconds") for name in ("True", "False")]
    pd.testing.assert_frame_equal(*logs, rtol=1e-4)


def test_stage2_checks_what_it_is_given(world: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="segmentation"):
        Stage2Config(task="segmentation")
    for change in ({"latents": world.items["latents"][:4]}, {"labels": [1]}, {"captions": ["a bus"]}):
        with pytest.raises(ValueError, match="belong together"):
            train(TWO, world, tmp_path, **change)
    for images in (None, world.images[:3]):
        with pytest.raises(ValueError, match="there are none"):
            train(replace(TWO, task="features"), world, tmp_path, images=images)
    train(replace(TWO, steps=1), world, tmp_path)
    with pytest.raises(ValueError, match=r"b: 0.15 there, 1.0 asked for"):
        train(replace(TWO, steps=1, b=1.0), world, tmp_path)


def test_the_task_reaches_the_compressor_through_both_networks(world: SimpleNamespace, exactly: None) -> None:
    """The gradient of the cross-entropy at z_hat is what finite differences say."""
    torch.manual_seed(0)
    z_hat = world.z[:2].clone().requires_grad_()
    noise, t, labels = torch.randn_like(z_hat), torch.tensor([100, 20]), torch.tensor([0, 1])

    def loss(z: Tensor) -> Tensor:
        _, x_hat = training.decode_once(world.ldm, z, t, ["a red fox", ""], noise)
        return training.task_loss(world.teachers, x_hat, labels).sum()

    (gradient,) = torch.autograd.grad(loss(z_hat), z_hat)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        difference = (loss(z_hat + 0.01 * direction) - loss(z_hat - 0.01 * direction)) / 0.02
    assert gradient.norm() > 0 and difference.item() == pytest.approx(gradient.norm().item(), rel=0.05)


@torch.no_grad()
def test_decoding_once_is_one_step_of_the_codec(world: SimpleNamespace, exactly: None) -> None:
    ldm, z_hat, captions, t = world.ldm, world.z[:2], ["a red fox", "a banana"], torch.tensor([60, 0])
    noise = ldm.noise(z_hat.shape, 5)
    z_tilde, x_hat = training.decode_once(ldm, z_hat, t, captions, noise)
    torch.testing.assert_close(z_tilde[:1], ldm.predict(ldm.add_noise(z_hat, t, noise), t, ldm.text(captions))[0][:1])
    assert torch.equal(z_tilde[1], z_hat[1]), "at t0 = 0 the UNet is left out"
    torch.testing.assert_close(x_hat, ldm.decode(z_tilde))
    # the codec's last step ends a little short of "no noise left"
    torch.testing.assert_close(z_tilde[0], next(ldm.enhance(z_hat, captions, 60, 1, 5))[0], atol=0.15, rtol=0)
    config = replace(TINY, walks=[[0.0, 100, 4, 3], [0.4, 50, 1, 1], [0.9, 20, 0, 1]])  # the last takes no step
    assert training.start_times(config, torch.tensor([0.0, 0.5, 1.0])).tolist() == [100, 50, 0]


def test_the_diffusion_term_is_the_error_in_v(world: SimpleNamespace) -> None:
    torch.manual_seed(0)
    ldm, t, z_hat = world.ldm, torch.tensor([5, 60, 300]), world.z[:3].clone().requires_grad_()
    noise, text = torch.randn_like(z_hat), ldm.text(["a red fox"] * 3)
    z_tilde, found = ldm.predict(ldm.add_noise(z_hat, t, noise), t, text)
    abar = ldm.alpha_bar(t)
    v, v_found = (abar.sqrt() * e - (1 - abar).sqrt() * z for z, e in ((z_hat, noise), (z_tilde, found)))
    term = training.diffusion_loss(ldm, z_hat, z_tilde, t)
    torch.testing.assert_close(term, (v - v_found).square().mean((1, 2, 3)), rtol=1e-3, atol=0)
    (gradient,) = torch.autograd.grad(term.sum(), z_hat)
    pull = 2 * (z_hat - z_tilde) / (1 - abar) / z_hat[0].numel()
    torch.testing.assert_close(gradient, pull.detach(), atol=1e-6, rtol=1e-5)  # to z_tilde; nothing through the UNet


def test_the_task_is_what_the_teachers_miss(world: SimpleNamespace, exactly: None) -> None:
    teachers, labels, errors = world.teachers, torch.tensor([0, 1, 2]), []
    x = torch.from_numpy(world.images[:3]).float() / 255
    logits = [machine.net((x - machine.mean) / machine.std) for machine in teachers]
    expected = torch.stack([F.cross_entropy(one, labels, reduction="none") for one in logits]).mean(0)
    torch.testing.assert_close(training.task_loss(teachers, x, labels), expected)
    plain = training.task_loss(teachers, x, torch.tensor([0, -1, 2]))
    torch.testing.assert_close(plain, expected * torch.tensor([1, 0, 1])), "a picture without a known object"
    assert training.task_loss(teachers, x, labels, x).abs().max() == 0
    for machine in teachers:
        seen: list[Tensor] = []
        handle = machine.cam_layer.register_forward_hook(lambda _module, _inputs, output, to=seen: to.append(output))
        machine(x), machine(x.flip(0)), handle.remove()
        wanted, found = seen
        errors.append((found - wanted).square().sum((1, 2, 3)) / wanted.square().sum((1, 2, 3)))
        assert wanted.ndim == 4 and not machine.cam_layer._forward_hooks
    other = training.task_loss(teachers, x.flip(0), labels, x)
    torch.testing.assert_close(other, torch.stack(errors).mean(0))
    assert torch.equal(other, training.task_loss(teachers, x.flip(0), labels.flip(0), x)), "no label is used"


def test_views_are_moved_scaled_and_mirrored() -> None:
    """On a picture of its own coordinates a view tells what was done to it."""
    centres = (torch.arange(24) + 0.5) / 12 - 1
    x = torch.stack([*torch.meshgrid(centres, centres, indexing="xy"), torch.ones(24, 24)]).expand(64, -1, -1, -1)
    assert training.random_view(0, x) == (x,)
    torch.manual_seed(0)
    view, other = training.random_view(0.2, x.clone().requires_grad_(), x)
    assert torch.equal(view, other) and view.requires_grad, "both of a pair alike"
    middle = other[:, :2, 11:13, 11:13]
    shift = middle.mean((2, 3)) / 2  # as a share of the side
    assert 0.15 < shift.abs().max() <= 0.2 and shift.mean(0).abs().max() < 0.05
    across, down = (middle[:, 0, 0, 1] - middle[:, 0, 0, 0]) * 12, (middle[:, 1, 1, 0] - middle[:, 1, 0, 0]) * 12
    torch.testing.assert_close(across.abs(), down)
    assert 0.8 <= down.min() < 0.85 and 1.15 < down.max() <= 1.2 and 20 < (across < 0).sum() < 44
    torch.testing.assert_close(other[:, 2], x[:, 2])  # nothing comes in from outside
