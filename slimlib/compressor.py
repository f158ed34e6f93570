"""The latent compressor: a mean-scale hyperprior on the latent of a diffusion model, one model for all rates.

    z --g_a--> y --gate, gain, fineness--> round --> coded --> inverse gain, fineness --g_s--> z_hat
         |                                   ^                       |
         +--> roi_logits --> gate            | scale, mean, fineness |
         +--> h --round--> h_hat --> IntegerNet ---------------------+

After Minnen et al., "Joint autoregressive and hierarchical priors" (arXiv 1809.02736), without the
autoregressive part; the gains after Cui et al., "Asymmetric gained deep image compression" (arXiv
2003.02012). The encoder finds the region of interest by itself: attention over the whole latent grid, a head
that learns to predict the region's map m while training, a gate that turns the latent down where that map is
low, and a quantiser whose fineness varies over the image, carried by the hyper-latent. No mask is needed to
compress. Encoder and decoder start as a block DCT of the latent; what they learn is added to that.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from compressai.entropy_models import GaussianConditional
from compressai.ops import quantize_ste
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from slimlib import entropy
from slimlib.entropy import FrequencyTable, IntegerNet, RangeDecoder, RangeEncoder, clamp_ste, gaussian_table
from slimlib.images import check_finite
from slimlib.scales import reading
from slimlib.stream import StreamError
from slimlib.transforms import Decoder, Encoder
from slimlib.utils import Device, evaluating, pick_device, write_file

SYMBOL_MAX = 2**15  # larger symbols are clipped by the encoder, and are an error for the decoder


class Walk(NamedTuple):
    """What the diffusion model does with a decompressed latent."""

    t0: int  # noise level that it starts from
    steps: int  # denoising steps K; 0: nothing is done
    guidance: float  # 1: none


@dataclass
class CompressorConfig:
    """Architecture, rate range and the diffusion's defaults.

    Every field is part of the streams' fingerprint: a new name or field makes all streams unreadable.
    """

    latent_channels: int = 4  # C of z
    factor: int = 4  # pixels per latent cell along one side (only to count bits per pixel)
    stages: int = 2  # halvings from z to y; the grid of y is 2**stages times coarser than z's
    stem: int = 64  # channels at the fine grids
    width: int = 128  # channels at the grid of y
    depth: int = 3  # attention blocks there
    heads: int = 4  # of the attention
    y_channels: int = 64  # M, of the latent y
    h_channels: int = 8  # N, of the hyper-latent h, at half of y's resolution
    net_width: int = 64  # channels of the integer network
    scale_min: float = 0.11  # CompressAI-style table of standard deviations, log-spaced
    scale_max: float = 24.0
    scale_levels: int = 64
    symbol_bound: int = 63  # symbols beyond it are escaped
    gain_min: float = 0.2  # where the gains start before training, at quality 0
    gain_max: float = 3.0  # and at quality 1
    # How decoding goes on: rows of [quality, noise level t0, denoising steps K, guidance], each from its quality on
    walks: list[list[float]] = field(
        default_factory=lambda: [[0.0, 500, 4, 3], [0.2, 400, 4, 3], [0.4, 150, 4, 3], [0.6, 50, 4, 3], [0.8, 25, 4, 3]]
    )

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}.")
        walks = np.array([*zip_longest(*self.walks)], float).T  # NaN where a row is too short
        sound = walks.shape == (len(walks), 4) and ((walks >= 0) & (walks <= [1, 999, 100, 1000])).all()
        if not sound or walks[:1, 0].any() or (np.diff([-1, *walks[:, 0]]) <= 0).any() or (walks[:, 1:3] % 1).any():
            raise ValueError(f"walks must be rows [q, t0 < 1000, K <= 100, guidance], rising from q = 0: {self.walks}.")

    @property
    def log_step(self) -> float:
        """Distance of two neighbours in the table of scales, as a logarithm."""
        return float(np.log(self.scale_max / self.scale_min) / (self.scale_levels - 1))

    @property
    def multiple(self) -> int:
        """Height and width of z must be multiples of this (8 with two stages)."""
        return 2 ** (self.stages + 1)

    def walk(self, quality: float) -> Walk:
        """How decoding goes on at a quality in [0, 1]."""
        _, t0, steps, guidance = next(row for row in reversed(self.walks) if row[0] <= quality + 0.002)  # as its byte
        return Walk(int(t0), int(steps), guidance)


class LatentCompressor(nn.Module):
    """See the module's docstring. `forward` trains and measures; `compress`, `decompress` make real bytes."""

    def __init__(self, config: CompressorConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or CompressorConfig()

        def knots(low: float, high: float, channels: int) -> Tensor:  # (6, channels), log-spaced over quality
            return torch.linspace(np.log(low), np.log(high), entropy.QUALITY_KNOTS)[:, None].repeat(1, channels)

        log_gain = knots(config.gain_min, config.gain_max, config.y_channels)
        hyper_gain = knots(0.5, 2.0, config.h_channels)
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.log_gain, self.log_inverse_gain = nn.Parameter(log_gain.clone()), nn.Parameter(-log_gain)
        self.log_hyper_gain = nn.Parameter(hyper_gain.clone())
        self.gate_depth = nn.Parameter(torch.full((entropy.QUALITY_KNOTS, config.y_channels), -1.0))
        index_start = (log_gain - np.log(config.scale_min)) / config.log_step
        prior_start = float(-np.log(config.scale_min)) / config.log_step
        starts = log_gain.exp(), index_start, hyper_gain.exp(), prior_start
        self.net = IntegerNet(config.net_width, config.scale_levels, *starts)
        rarest = 2.0**-entropy.FREQUENCY_BITS  # probability in the table of frequencies
        self.gaussian = GaussianConditional(None, scale_bound=config.scale_min, likelihood_bound=rarest)
        self.register_buffer("table", torch.zeros(config.scale_levels, 2 * config.symbol_bound + 2, dtype=torch.int32))

    @property
    def device(self) -> torch.device:
        return self.log_gain.device

    def forward(self, z: Tensor, quality: Tensor | float) -> dict[str, Any]:
        """Run the whole way without coding.

        In training mode rates see uniform noise and the decoder sees rounded values with straight-through
        gradients (Minnen and Singh, arXiv 2007.08739); in evaluation mode all is as with the real coder.

        Args:
            z: (B, C, h, w) scaled latent; h and w multiples of `config.multiple`.
            quality: (B,) in [0, 1] (or one number), rounded to whole bytes.

        Returns:
            z_hat (B, C, h, w), likelihoods {"y": (B, M, h/4, w/4), "h": (B, N, h/8, w/8)}, and what `code` returns.
        """
        quality = torch.as_tensor(quality, dtype=torch.float32, device=self.device)
        byte = (quality * 255).round().long().expand(z.shape[0])
        coded = self.code(z, byte)
        z_hat = self.synthesise(coded["y_hat"], coded["index"], coded["fineness"], byte)
        return {"z_hat": z_hat, "likelihoods": {name: coded[f"{name}_likelihood"] for name in "yh"}, **coded}

    def code(self, z: Tensor, byte: Tensor) -> dict[str, Tensor]:
        """All of `forward` but the decoder: what is coded for z (B, C, h, w) at the quality bytes (B,).

        Returns:
            symbols, decoded values and likelihoods of y and h (y_symbols, y_hat, y_likelihood, h_...); roi_logits
            (B, 1, h, w); and what the integer network says: index and h_index of the scales, fineness of the quantiser.

        Raises:
            ValueError: z has other channels, or sides that do not fit.
        """
        multiple, channels = self.config.multiple, self.config.latent_channels
        if z.ndim != 4 or z.shape[1] != channels or z.shape[2] % multiple or z.shape[3] % multiple:
            raise ValueError(f"Expected (B, {channels}, h, w) with h, w multiples of {multiple}; got {tuple(z.shape)}.")
        y, h, roi_logits = (x.float() for x in self.encoder(z, byte.float() / 255))
        # Detached: the head answers for the region alone; the loss decides how far to turn down.
        inside = F.avg_pool2d(torch.sigmoid(roi_logits.detach()), 2**self.config.stages)
        gate = torch.exp(-F.softplus(_interpolate(self.gate_depth, byte)) * (1 - inside))
        y = y * gate * torch.exp(_interpolate(self.log_gain, byte))
        h = h * torch.exp(_interpolate(self.log_hyper_gain, byte))
        coded = {"roi_logits": roi_logits}
        with torch.autocast(z.device.type, enabled=False):  # integers do not survive bfloat16
            coded["h_index"], h_mean = self._predict(byte)
            coded |= self._quantise("h", h, coded["h_index"], h_mean)
            coded["index"], mean, coded["fineness"] = self._predict(byte, coded["h_hat"] * entropy.MEAN_STEPS)
            scaled = y * torch.exp2(coded["fineness"] / entropy.FINENESS_STEPS)
            return coded | self._quantise("y", scaled, coded["index"], mean)

    def region(self, z: Tensor, quality: float) -> Tensor:
        """Where the encoder sees the object in z (B, C, h, w): (B, 1, h, w) in [0, 1]."""
        with torch.no_grad():
            at = torch.full((len(z),), quality, device=self.device)
            return self.encoder(z.to(self.device), at)[2].float().sigmoid()

    def synthesise(self, y_hat: Tensor, index: Tensor, fineness: Tensor, byte: Tensor) -> Tensor:
        """z_hat from the decoded values and their scale indices, which tell where detail was spent."""
        y_hat = y_hat * torch.exp(_interpolate(self.log_inverse_gain, byte))
        y_hat = y_hat * torch.exp2(-fineness / entropy.FINENESS_STEPS)
        return self.decoder(y_hat, index / self.config.scale_levels - 0.5, byte.float() / 255)

    def _quantise(self, name: str, x: Tensor, index: Tensor, mean16: Tensor) -> dict[str, Tensor]:
        """Symbols, decoded values, likelihoods; noise for the likelihoods while training."""
        mean = mean16 / entropy.MEAN_STEPS
        symbols = clamp_ste(quantize_ste(x - mean), -SYMBOL_MAX, SYMBOL_MAX)
        x_hat = symbols + mean
        scales = self.config.scale_min * torch.exp(index * self.config.log_step)
        _, likelihood = self.gaussian(x if self.training else x_hat, scales.expand_as(x), mean)
        return {f"{name}_symbols": symbols, f"{name}_hat": x_hat, f"{name}_likelihood": likelihood}

    def _predict(self, byte: Tensor, *h_hat: Tensor) -> list[Tensor]:
        """What the integer network says: with gradients while training, otherwise exactly, item by item."""
        if self.training:
            return list(self.net(*h_hat, byte) if h_hat else self.net.prior(byte))
        rows = [self.net.exact(int(byte[i]), *(x[i : i + 1] for x in h_hat)) for i in range(len(byte))]
        return [torch.cat(parts).to(byte.device, torch.float32) for parts in zip(*rows, strict=True)]

    @torch.no_grad()
    def compress(self, z: Tensor, quality: float, coder: RangeEncoder) -> dict[str, Tensor]:
        """Append hyper-latent and latent of one item, z (1, C, h, w), to a coder, behind what it holds (a caption).

        Returns:
            What each symbol costs in bits: "y" (M, h/4, w/4) and "h" (N, h/8, w/8); for maps and tables.

        Raises:
            ValueError: more than one item, a size that does not fit, or a latent that is not finite.
        """
        if len(z) != 1:
            raise ValueError(f"compress takes one latent at a time; got {tuple(z.shape)}.")
        check_finite(z, "the latent")
        table, bits = self._frequencies(), {}
        with evaluating(self):
            coded = self.code(z.to(self.device), torch.tensor([quality_byte(quality)], device=self.device))
        for name, rows in (("h", coded["h_index"]), ("y", coded["index"])):
            symbols = coded[f"{name}_symbols"].cpu().long()
            cost = coder.encode_table(symbols.numpy(), rows.cpu().long().expand_as(symbols).numpy(), table)
            bits[name] = torch.from_numpy(cost).reshape(symbols.shape[1:])
        return bits

    @torch.no_grad()
    def decompress(self, coder: RangeDecoder, shape: tuple[int, int], quality: float) -> Tensor:
        """z_hat (1, C, h, w), of a shape (h, w), from a coder that stands where `compress` began to append.

        Raises:
            StreamError: the bytes are damaged.
            ValueError: what comes out is not finite.
        """
        table, byte = self._frequencies(), quality_byte(quality)
        h_index, h_mean = self.net.exact(byte)
        h_rows = h_index.expand(1, -1, *(side // self.config.multiple for side in shape))
        h_hat = _decode(coder, h_rows, table) * entropy.MEAN_STEPS + h_mean
        index, mean, fineness = self.net.exact(byte, h_hat)
        y_hat = _decode(coder, index, table) + mean / entropy.MEAN_STEPS
        y_hat, scale, fine = (t.to(self.device, torch.float32) for t in (y_hat, index, fineness))
        z_hat = self.synthesise(y_hat, scale, fine, torch.tensor([byte], device=self.device))
        check_finite(z_hat, "the decompressed latent")
        return z_hat

    def update(self) -> None:
        """Compute the integer table of frequencies: once, when training ends."""
        scales = self.config.scale_min * np.exp(self.config.log_step * np.arange(self.config.scale_levels))
        self.table.copy_(torch.from_numpy(gaussian_table(scales, self.config.symbol_bound)))

    def _frequencies(self) -> FrequencyTable:
        if not self.table.any():
            raise RuntimeError("The table of frequencies is missing: call update() after training.")
        return FrequencyTable(self.table.cpu().numpy())

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, each atomically.

        The weights in memory take the stored values (fp16), so that what is measured is what is shipped. ValueError if
        they are not finite.
        """
        if not all(bool(tensor.isfinite().all()) for tensor in self.state_dict().values()):
            raise ValueError("The compressor's weights are not finite: its training has failed.")
        if not self.table.any():  # once computed it stays as it is: another machine may round differently
            self.update()
        self._restore(stored := self._stored())
        write_file(Path(folder) / "model.safetensors", save(stored, metadata={"format": "pt"}))
        write_file(Path(folder) / "config.json", (json.dumps(asdict(self.config), indent=1) + "\n").encode())

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: Device = None) -> LatentCompressor:
        """Read what `save_pretrained` wrote, strictly.

        Raises:
            FileNotFoundError: no such files.
            ValueError: a damaged file; unknown or missing config keys; missing, surplus, misshapen or infinite tensors.
        """
        config, weights = Path(folder) / "config.json", Path(folder) / "model.safetensors"
        for path in (config, weights):
            if not path.is_file():
                raise FileNotFoundError(f"{folder} holds no compressor: {path.name} is missing.")
        with reading(folder, "a compressor"):
            values = json.loads(config.read_text(encoding="utf-8"))
            model = cls(CompressorConfig(**values))
            if missing := asdict(model.config).keys() - values.keys():
                raise ValueError(f"{config} lacks {', '.join(sorted(missing))}")
            model._restore(load_file(weights))
            model._frequencies()  # is sound
        return model.eval().to(pick_device(device))

    def fingerprint(self) -> int:
        """16 bits over the config and every stored tensor but the encoder's: all that decoding depends on."""
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        for name, tensor in sorted(self._stored().items()):
            if not name.startswith(("encoder.", "log_gain", "log_hyper_gain", "gate_depth")):
                array = tensor.numpy()
                digest.update(f"{name} {array.dtype} {array.shape}".encode())
                digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
        return int.from_bytes(digest.digest()[:2], "big")

    def _stored(self) -> dict[str, Tensor]:
        """Tensors as they stand in the file: integers for the integer network, floats in fp16."""
        stored = {f"net.{name}": tensor for name, tensor in self.net.integer_state().items()}
        for name, tensor in self.state_dict().items():
            if not name.startswith(("net.", "gaussian.")):  # CompressAI's buffers follow from the config
                stored[name] = (tensor.half() if tensor.is_floating_point() else tensor).cpu().contiguous()
        return stored

    def _restore(self, stored: dict[str, Tensor]) -> None:
        """Inverse of `_stored`, strict and exact: a float32 holds all of these integers / 2**bits."""
        wanted, given = (
            {name: f"{tuple(t.shape)} {t.dtype}" for name, t in tensors.items()} for tensors in (self._stored(), stored)
        )
        if odd := sorted(name for name in wanted | given if wanted.get(name) != given.get(name)):
            said = (f"{n}: {given.get(n, 'missing')}, expected {wanted.get(n, 'nothing')}" for n in odd[:3])
            raise ValueError(f"{len(odd)} weights do not fit this compressor ({'; '.join(said)}).")
        if odd := [name for name, tensor in stored.items() if not bool(tensor.isfinite().all())]:
            raise ValueError(f"{len(odd)} weights are not finite (such as {odd[0]}).")
        own = self.state_dict()
        for name, tensor in stored.items():
            if name.startswith("net."):
                tensor = tensor / 2.0 ** self.get_submodule(name.rpartition(".")[0]).bits
            own[name].copy_(tensor)


def quality_byte(quality: float) -> int:
    """What stands in a stream for a quality in [0, 1]."""
    if quality is None or isinstance(quality, str) or not 0 <= quality <= 1:
        raise ValueError(f"Quality must be a number in [0, 1], not {quality!r}.")
    return round(float(quality) * 255)


def _decode(coder: RangeDecoder, rows: Tensor, table: FrequencyTable) -> Tensor:
    """As many symbols as there are rows, in their shape."""
    symbols = torch.from_numpy(coder.decode_table(rows.numpy(), table)).reshape(rows.shape)
    if int(symbols.abs().max()) > SYMBOL_MAX:
        raise StreamError("The payload is damaged: it holds a value that no encoder writes.")
    return symbols


def _interpolate(knots: Tensor, byte: Tensor) -> Tensor:
    """(6, channels) knots, (B,) quality bytes -> (B, channels, 1, 1), linear between the knots."""
    at = byte.float() * ((entropy.QUALITY_KNOTS - 1) / 255)
    left = at.long().clamp(max=entropy.QUALITY_KNOTS - 2)
    return torch.lerp(knots[left], knots[left + 1], (at - left)[:, None])[:, :, None, None]
