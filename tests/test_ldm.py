"""The latent diffusion model: loading, the latent, and the sampler against diffusers' own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file

from slimlib.ldm import CLEAN, LatentDiffusion


@pytest.fixture(scope="module")
def ldm(tiny_world: Path) -> LatentDiffusion:
    return LatentDiffusion.from_pretrained(tiny_world / "ldm", variant="fp16", device="cpu")


def changed_copy(tiny_world: Path, tmp_path: Path, **scheduler: object) -> Path:
    """A copy of the model whose scheduler says something else."""
    folder = tmp_path / "ldm"
    shutil.copytree(tiny_world / "ldm", folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | scheduler))
    return folder


def test_loading(ldm: LatentDiffusion) -> None:
    assert (ldm.factor, ldm.latent_channels) == (4, 4)
    for model in (ldm.vae, ldm.unet, ldm.text_encoder):
        assert not model.training
        assert not any(weight.requires_grad for weight in model.parameters())
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_encode_and_decode(ldm: LatentDiffusion) -> None:
    x = torch.rand(2, 3, 32, 64)
    z = ldm.encode(x)
    assert z.shape == (2, 4, 8, 16)
    expected = ldm.vae.encode(2 * x - 1).latent_dist.mean * ldm.vae.config.scaling_factor
    torch.testing.assert_close(z, expected)
    decoded = ldm.decode(z)
    assert decoded.shape == x.shape
    assert decoded.min() >= 0
    assert decoded.max() <= 1
    expected = ldm.vae.decode(z / ldm.vae.config.scaling_factor).sample / 2 + 0.5
    torch.testing.assert_close(decoded, expected.clamp(0, 1))


def test_sides_must_fit(ldm: LatentDiffusion) -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        ldm.encode(torch.rand(1, 3, 30, 32))


def test_noise_depends_on_the_seed_alone(ldm: LatentDiffusion) -> None:
    shape = (2, 4, 8, 8)
    assert torch.equal(ldm.noise(shape, 7), ldm.noise(shape, 7))
    assert not torch.equal(ldm.noise(shape, 7), ldm.noise(shape, 8))
    single = ldm.noise((1, 4, 8, 8), 8)
    assert torch.equal(ldm.noise(shape, [7, 8])[1:], single)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    ldm.noise(shape, 7)
    assert torch.equal(before, torch.random.get_rng_state())
    with pytest.raises(ValueError, match="3 seeds for a batch of 2"):
        ldm.noise(shape, [1, 2, 3])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("clean_is_one", [True, False])
@pytest.mark.parametrize(("strides", "steps"), [(20, 20), (20, 10), (10, 1), (8, 3)])
def test_sampler_is_that_of_diffusers(
    tiny_world: Path, tmp_path: Path, prediction: str, clean_is_one: bool, strides: int, steps: int
) -> None:
    """diffusers walks from the last time down in `strides` strides; we start `steps` strides above the end.

    `strides` divides 1000: otherwise diffusers visits rounded times, yet steps from each by a whole 1000 // strides.
    """
    folder = changed_copy(tiny_world, tmp_path, prediction_type=prediction, set_alpha_to_one=clean_is_one)
    ldm = LatentDiffusion.from_pretrained(folder, variant="fp16", device="cpu")
    theirs = DDIMScheduler.from_config(ldm.scheduler.config, timestep_spacing="trailing")
    theirs.set_timesteps(strides)
    walk = theirs.timesteps[-steps:]
    t0 = int(walk[0])
    assert ldm.times(t0, steps)[:-1] == walk.tolist()

    z_hat = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    captions = ["a red fox", ""]
    text = ldm.text(captions)
    with torch.no_grad():
        z = theirs.add_noise(z_hat, ldm.noise(z_hat.shape, 5), torch.tensor([t0]))
        for t in walk:
            output = ldm.unet(z, t, encoder_hidden_states=text).sample
            z = theirs.step(output, int(t), z).prev_sample
    torch.testing.assert_close(ldm.enhance(z_hat, captions, t0, steps, seed=5), z)


def test_guidance(ldm: LatentDiffusion) -> None:
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text, nothing = ldm.text(["a lion"]), ldm.text([""])
    with torch.no_grad():
        plain = ldm.predict(z, 500, text)[1]
        without = ldm.predict(z, 500, nothing)[1]
        torch.testing.assert_close(
            ldm.predict(z, 500, text, guidance=3.0)[1], without + 3 * (plain - without), atol=1e-5, rtol=1e-4
        )
        assert torch.equal(ldm.predict(z, 500, text, guidance=1.0)[1], plain)


@pytest.mark.parametrize(("t0", "steps"), [(0, 4), (500, 0), (0, 0)])
def test_no_enhancement_changes_nothing(ldm: LatentDiffusion, t0: int, steps: int) -> None:
    z_hat = torch.randn(1, 4, 8, 8)
    assert ldm.enhance(z_hat, ["a lion"], t0, steps) is z_hat


def test_times(ldm: LatentDiffusion) -> None:
    assert ldm.times(999, 4) == [999, 749, 499, 249, CLEAN]
    assert ldm.times(500, 1) == [500, CLEAN]
    assert ldm.times(2, 50) == [2, 1, 0, CLEAN]
    for t0, steps in ((1000, 4), (-1, 4), (10, -1)):
        with pytest.raises(ValueError, match="expected"):
            ldm.times(t0, steps)


def test_one_step_with_the_true_noise_gives_the_latent_back(ldm: LatentDiffusion) -> None:
    z, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    t = torch.tensor([10, 400, 900])
    z_t = ldm.add_noise(z, t, noise)
    torch.testing.assert_close(ldm.add_noise(z[1:2], 400, noise[1:2]), z_t[1:2])
    abar = ldm.alpha_bar(t)
    torch.testing.assert_close((z_t - (1 - abar).sqrt() * noise) / abar.sqrt(), z, atol=1e-4, rtol=1e-4)


def test_gradients_pass_through_unet_and_decoder(ldm: LatentDiffusion) -> None:
    z_hat = torch.randn(2, 4, 8, 8, requires_grad=True)
    t = torch.tensor([100, 300])
    z_t = ldm.add_noise(z_hat, t, ldm.noise(z_hat.shape, 0))
    ldm.decode(ldm.predict_x0(z_t, t, ldm.text(["a lion", "a bus"]))).mean().backward()
    assert z_hat.grad is not None
    assert z_hat.grad.abs().flatten(1).sum(1).min() > 0


def test_number_of_captions(ldm: LatentDiffusion) -> None:
    with pytest.raises(ValueError, match="1 captions for a batch of 2"):
        ldm.enhance(torch.randn(2, 4, 8, 8), ["a lion"], 500, 2)
    assert ldm.text(["a lion " * 40]).shape == ldm.text([""]).shape


def test_missing_parts_and_folders(tiny_world: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        LatentDiffusion.from_pretrained(tmp_path / "none")
    shutil.copytree(tiny_world / "ldm", tmp_path / "ldm")
    shutil.rmtree(tmp_path / "ldm" / "unet")
    with pytest.raises(FileNotFoundError, match="unet"):
        LatentDiffusion.from_pretrained(tmp_path / "ldm")


@pytest.mark.parametrize("part", ["vae", "unet", "text_encoder"])
def test_weights_must_fit_exactly(tiny_world: Path, tmp_path: Path, part: str) -> None:
    """The libraries would only warn, and leave what is missing random."""
    shutil.copytree(tiny_world / "ldm", tmp_path / "ldm")
    file = next((tmp_path / "ldm" / part).glob("*.fp16.safetensors"))
    tensors = load_file(file)
    removed = sorted(tensors)[0]
    save_file({name: t for name, t in tensors.items() if name != removed}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing"):
        LatentDiffusion.from_pretrained(tmp_path / "ldm", variant="fp16", device="cpu")
    save_file(tensors | {"stray": torch.zeros(1)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="stray"):
        LatentDiffusion.from_pretrained(tmp_path / "ldm", variant="fp16", device="cpu")


@pytest.mark.parametrize("change", [{"prediction_type": "sample"}, {"clip_sample": True}])
def test_schedulers_that_the_sampler_does_not_know(tiny_world: Path, tmp_path: Path, change: dict) -> None:
    folder = changed_copy(tiny_world, tmp_path, **change)
    with pytest.raises(ValueError, match="scheduler"):
        LatentDiffusion.from_pretrained(folder, variant="fp16", device="cpu")
