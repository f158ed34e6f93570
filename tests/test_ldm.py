"""The latent diffusion model: loading, the latent, and the sampler against diffusers' own."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from slimlib.ldm import CLEAN, LatentDiffusion, last, lay_out_for_training

CAPTIONS = ["a red fox", "", "a bus in a forest"]


@pytest.fixture(scope="module")
def ldm(tiny_world: Path) -> LatentDiffusion:
    return LatentDiffusion.from_pretrained(tiny_world / "ldm", variant="fp16", device="cpu")


def latent(batch: int = 1) -> Tensor:
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def other(ldm: LatentDiffusion, **scheduler: Any) -> LatentDiffusion:
    """The same networks under a scheduler that says something else."""
    changed = DDIMScheduler.from_config({**ldm.scheduler.config, **scheduler})
    return LatentDiffusion(ldm.vae, ldm.unet, ldm.text_encoder, ldm.tokenizer, changed, "cpu")


def close(one: Any, two: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one, two, atol=tolerance, rtol=tolerance)


def test_loading(ldm: LatentDiffusion, tiny_world: Path) -> None:
    assert (ldm.factor, ldm.latent_channels) == (4, 4)
    for model in (ldm.vae, ldm.unet, ldm.text_encoder):
        assert not model.training and not any(weight.requires_grad for weight in model.parameters())
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}, "whatever the files hold"
    half = LatentDiffusion.from_pretrained(tiny_world / "ldm", device="cpu", dtype=torch.bfloat16)
    full, halved = (last(model.enhance(latent(), ["a bus"], 20, 2), latent()) for model in (ldm, half))
    close(full, halved, 0.05)
    assert halved.dtype == torch.float32 and not torch.equal(full, halved)
    z0, eps = half.predict(latent(), 20, half.text(["a bus"]))
    close(half.add_noise(z0, 20, eps), latent())  # only the networks compute in half precision, not the sums


def test_schedulers(ldm: LatentDiffusion, tiny_world: Path, tmp_path: Path) -> None:
    for change in ({"prediction_type": "sample"}, {"clip_sample": True}, {"thresholding": True}):
        with pytest.raises(ValueError, match="scheduler"):
            other(ldm, **change)
    shutil.copytree(tiny_world / "ldm", tmp_path / "ldm")
    file = tmp_path / "ldm/scheduler/scheduler_config.json"
    config = json.loads(file.read_text())
    config.pop("clip_sample")  # SD-Turbo's says nothing of clipping; DDIM's default would be to clip
    for name in ("PNDMScheduler", "EulerDiscreteScheduler"):
        file.write_text(json.dumps(config | {"_class_name": name}))
        found = LatentDiffusion.from_pretrained(tmp_path / "ldm", variant="fp16", device="cpu")
        assert not found.scheduler.config.clip_sample


def test_every_part_is_there_and_counts(ldm: LatentDiffusion, tiny_world: Path, tmp_path: Path) -> None:
    """That weights fit is checked where all are loaded, in `load_pretrained`."""
    before = ldm.fingerprint()
    for part in ("vae", "unet", "text_encoder"):
        weight = next(getattr(ldm, part).parameters()).data
        weight += 1
        assert ldm.fingerprint() != before
        weight -= 1
        shutil.copytree(tiny_world / "ldm", folder := tmp_path / part)
        shutil.rmtree(folder / part)
        with pytest.raises(FileNotFoundError, match=part):
            LatentDiffusion.from_pretrained(folder)


@pytest.mark.parametrize("shift", [None, 0.25])
def test_encode_and_decode(ldm: LatentDiffusion, shift: float | None) -> None:
    vae, scale = copy.deepcopy(ldm.vae), ldm.vae.config.scaling_factor
    vae.register_to_config(shift_factor=shift)
    ldm = LatentDiffusion(vae, ldm.unet, ldm.text_encoder, ldm.tokenizer, ldm.scheduler, "cpu")
    x = torch.rand(2, 3, 32, 64)
    z = ldm.encode(x)
    assert torch.equal(z, (vae.encode(2 * x - 1).latent_dist.mean - (shift or 0)) * scale) and z.shape == (2, 4, 8, 16)
    expected = vae.decode(4 * z / scale + (shift or 0)).sample / 2 + 0.5
    assert expected.min() < 0 and expected.max() > 1, "pixels beyond black and white are clipped"
    close(ldm.decode(4 * z), expected.clamp(0, 1))
    with pytest.raises(ValueError, match="multiples of 4"):
        ldm.encode(torch.rand(1, 3, 30, 32))


def test_words_and_noise(ldm: LatentDiffusion) -> None:
    text = ldm.text(["a red fox", "", "a lion " * 40])
    ids = ldm.tokenizer("a red fox", padding="max_length", max_length=16, return_tensors="pt").input_ids
    assert torch.equal(text[:1], ldm.text_encoder(ids).last_hidden_state)
    assert text.shape == (3, 16, 32) and not torch.equal(text[0], text[1])
    shape, state = (2, 4, 8, 8), torch.random.get_rng_state()
    one, again, another, both = (ldm.noise(shape, seed) for seed in (7, 7, 8, [7, 8]))
    assert torch.equal(one, again) and not torch.equal(one, another)
    assert torch.equal(both[1:], ldm.noise((1, 4, 8, 8), 8)), "an item does not depend on its batch"
    assert torch.equal(state, torch.random.get_rng_state()), "nor the program on this noise"
    with pytest.raises(ValueError, match="3 seeds for a batch of 2"):
        ldm.noise(shape, [1, 2, 3])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("clean_is_one", [True, False])
@pytest.mark.parametrize(("strides", "steps"), [(20, 8), (10, 1), (8, 3)])
def test_sampler_is_that_of_diffusers(
    ldm: LatentDiffusion, prediction: str, clean_is_one: bool, strides: int, steps: int
) -> None:
    """diffusers walks from the last time down in `strides` strides; we start `steps` strides above the end.

    `strides` divides 1000: otherwise diffusers visits rounded times, yet steps from each by a whole 1000 // strides.
    """
    ldm = other(ldm, prediction_type=prediction, set_alpha_to_one=clean_is_one)
    theirs = DDIMScheduler.from_config(ldm.scheduler.config, timestep_spacing="trailing")
    theirs.set_timesteps(strides)
    times, z_hat, text = theirs.timesteps[-steps:].tolist(), latent(3), ldm.text(CAPTIONS)
    walk = list(ldm.enhance(z_hat, CAPTIONS, times[0], steps, seed=5))
    assert ldm.times(times[0], steps) == [*times, CLEAN] and len(walk) == steps
    z = theirs.add_noise(z_hat, ldm.noise(z_hat.shape, 5), torch.tensor([times[0]]))
    for t, ours in zip(times, walk, strict=True):
        z = theirs.step(ldm.unet(z, t, encoder_hidden_states=text).sample, t, z).prev_sample
        close(ours, z)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_guidance_points_away_from_no_words(ldm: LatentDiffusion, prediction: str) -> None:
    ldm, z, t = other(ldm, prediction_type=prediction), latent(2), torch.tensor([500, 200])
    text, nothing, passes, embedded, embed = ldm.text(["a lion", "a bus"]), ldm.text(["", ""]), [], [], ldm.text
    ldm.text = lambda captions: embedded.append(captions) or embed(captions)
    handle = ldm.unet.register_forward_hook(lambda _module, inputs, _output: passes.append(len(inputs[0])))
    plain, without = ldm.predict(z, t, text, guidance=1.0), ldm.predict(z, t, nothing)
    apart, together = (ldm.predict(z, t, text, 3.0, batched) for batched in (False, True))
    handle.remove()
    assert passes == [2, 2, 2, 2, 4] and embedded == [[""]], "one pass of twice the batch; no words are embedded once"
    for one, more, ours, fast in zip(without, plain, apart, together, strict=True):
        close(ours, one + 3 * (more - one), 1e-4)
        close(fast, ours)


def test_a_batch_is_its_items(ldm: LatentDiffusion) -> None:
    """Each item has its own t0, seed and caption; steps and guidance are those of the call."""
    usual = {"captions": CAPTIONS, "t0": [600, 300, 50], "steps": 3, "seed": [3, 1, 2], "guidance": 2.0}
    z_hat = latent(3)

    def walk(z: Tensor, **changed: Any) -> Tensor:
        return last(ldm.enhance(z, **{**usual, **changed}), z)

    together = walk(z_hat)
    close(walk(z_hat, batched=True), together, 1e-4)
    for i in range(3):
        item = {name: [values[i]] for name, values in usual.items() if isinstance(values, list)}
        close(walk(z_hat[i : i + 1], **item), together[i : i + 1])
    other_words = {"captions": ["a lion", *CAPTIONS[1:]]}
    for changed in (other_words, {"t0": [500, 300, 50]}, {"steps": 2}, {"seed": [0, 1, 2]}, {"guidance": 1.0}):
        assert (walk(z_hat, **changed)[0] - together[0]).abs().max() > 1e-4
    with pytest.raises(ValueError, match="3 captions for a batch of 2"):
        walk(z_hat[:2])


def test_times_and_no_enhancement(ldm: LatentDiffusion) -> None:
    assert ldm.times(999, 4) == [999, 749, 499, 249, CLEAN]
    assert ldm.times(500, 1) == [500, CLEAN] and ldm.times(2, 50) == [2, 1, 0, CLEAN]
    for t0, steps in ((1000, 4), (-1, 4), (10, -1)):
        with pytest.raises(ValueError, match="expected"):
            ldm.times(t0, steps)
    z_hat = latent().requires_grad_()
    for t0, steps in ((0, 4), (500, 0), (0, 0)):
        assert last(ldm.enhance(z_hat, ["a lion"], t0, steps), z_hat) is z_hat
    walk = ldm.enhance(z_hat, ["a lion"], 400, 2)
    assert not next(walk).requires_grad and torch.is_grad_enabled(), "a walk leaves gradients as they are"


def test_the_layout_that_trains_faster_changes_no_result(ldm: LatentDiffusion) -> None:
    lay_out_for_training(unet := copy.deepcopy(ldm.unet), vae := copy.deepcopy(ldm.vae))
    laid_out = LatentDiffusion(vae, unet, ldm.text_encoder, ldm.tokenizer, ldm.scheduler, "cpu")
    z_t, t, text = latent(2).requires_grad_(), torch.tensor([100, 300]), ldm.text(["a lion", "a bus"])
    (z0, eps), (expected, _) = (one.predict(z_t, t, text) for one in (laid_out, ldm))
    close(z0, expected, 1e-4)
    close(ldm.add_noise(z0, t, eps), z_t, 1e-4)
    gradients = [torch.autograd.grad(one.decode(z).mean(), z_t)[0] for one, z in ((laid_out, z0), (ldm, expected))]
    close(*gradients, 1e-4)
    assert gradients[0].abs().flatten(1).sum(1).min() > 0, "they pass through UNet and decoder"
