"""What SLIM is compared with: the classic codecs, and a learned codec that works on pixels.

Classic codecs come as fair as we can make them: at any quality, or the file nearest to a budget. At 128 px
headers weigh: a JPEG spends some 290 bytes on them, more than half of its smallest file. So results are shown
twice, for whole files and for `payload_bytes`, which is generous: a decoder needs the headers too.

The learned baseline is a hyperprior on pixels (`PixelCodec`): SLIM's own compressor, fed with pixels in place of
latents, without VAE, UNet, captions or region of interest. Train it with

    python -m slimlib.baselines mse      rate and squared error
    python -m slimlib.baselines task     the former, tuned on for a machine: squared error and cross-entropy of A
"""

from __future__ import annotations

import functools
import io
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pillow_jxl  # noqa: F401 (teaches Pillow JPEG XL)
import torch
import torch.nn.functional as F
from PIL import Image, features
from torch import Tensor

from . import repro
from .compressor import CompressorConfig, LatentCompressor, quality_byte
from .entropy import RangeDecoder, RangeEncoder
from .machines import load_machine, to_images, to_tensor
from .scales import ASSETS
from .stream import StreamHeader, pack, unpack

if TYPE_CHECKING:
    from .pool import ScenePool
    from .pretrain import Recipe, Run
    from .training import Stage1Config

CODECS = ("jpeg", "webp", "avif", "jpegxl", "jpeg2000")
SCALES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)
"""Sizes that `nearest_size` tries when it may downscale."""


def encode_classic(image: Image.Image, codec: str, quality: int) -> bytes:
    """A whole file, encoded as well as Pillow knows how.

    Args:
        image: RGB.
        codec: one of `CODECS`.
        quality: 0 to 100, as the codec understands it; for JPEG 2000 it sets the PSNR aimed at, 15 to 50 dB.

    Raises:
        ValueError: no such codec or quality, or this Pillow was built without it.
    """
    _check(codec)
    if not 0 <= quality <= 100:
        raise ValueError(f"quality is {quality}; expected 0 to 100")
    file = io.BytesIO()
    if codec == "jpeg":
        image.save(file, "JPEG", quality=max(1, quality), optimize=True)
    elif codec == "webp":
        image.save(file, "WEBP", quality=quality, method=6)
    elif codec == "avif":
        image.save(file, "AVIF", quality=quality, speed=4, max_threads=1)
    elif codec == "jpegxl":  # a bare codestream; its highest quality is a lossless mode that this encoder refuses
        image.save(file, "JXL", quality=min(99, quality), effort=9, num_threads=1)
    else:  # a bare codestream, without the boxes of a .jp2 file
        layers = [15 + 0.35 * quality]
        image.save(file, "JPEG2000", no_jp2=True, irreversible=True, quality_mode="dB", quality_layers=layers)
    return file.getvalue()


def nearest_size(
    image: Image.Image, codec: str, target_bytes: int, downscale: bool = False
) -> tuple[bytes, Image.Image]:
    """The file whose size comes nearest to a budget, and what it decodes to, at the original size.

    Args:
        image: RGB.
        codec: one of `CODECS`.
        target_bytes: the budget, headers and all. The codec may be unable to go so low: see what comes back.
        downscale: may encode a smaller picture and enlarge it after decoding (bicubic both ways; the size to
            enlarge to is not counted). Of the sizes that come within 10% of the budget, the one with the
            least squared error; if none does, the nearest.

    Raises:
        ValueError: as for `encode_classic`, or a budget below one byte.
    """
    if target_bytes < 1:
        raise ValueError(f"the budget is {target_bytes} bytes; expected at least 1")
    candidates = [_nearest_quality(image, codec, target_bytes, s) for s in (SCALES if downscale else (1.0,))]
    fitting = [c for c in candidates if abs(len(c[0]) - target_bytes) <= 0.1 * target_bytes]
    if not fitting:
        return min(candidates, key=lambda c: abs(len(c[0]) - target_bytes))
    original = np.asarray(image, np.float64)
    return min(fitting, key=lambda c: float(((np.asarray(c[1], np.float64) - original) ** 2).mean()))


def decode_classic(data: bytes, size: tuple[int, int]) -> Image.Image:
    """What a file shows, enlarged (bicubic) to (width, height) where it was encoded smaller."""
    decoded = Image.open(io.BytesIO(data)).convert("RGB")
    return decoded if decoded.size == size else decoded.resize(size, Image.Resampling.BICUBIC)


def downscale(image: Image.Image, scale: float) -> Image.Image:
    """The picture at `scale` times its sides (bicubic), at least one pixel; itself if the scale is 1."""
    if scale == 1:
        return image
    sides = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(sides, Image.Resampling.BICUBIC)


def payload_bytes(data: bytes, codec: str) -> int:
    """Bytes of a file that hold the picture itself: no headers, no tables, no container.

    JPEG: the entropy-coded scans. WebP: the VP8 chunk. AVIF: the `mdat` box. JPEG 2000: the tile-parts' data.
    JPEG XL: all but the two bytes of its signature; what else it says ahead of the picture takes a few bits.

    Raises:
        ValueError: the bytes are no file of that codec.
    """
    _check(codec)
    try:
        return {"jpeg": _jpeg, "webp": _webp, "avif": _avif, "jpegxl": _jpegxl, "jpeg2000": _jpeg2000}[codec](data)
    except (IndexError, _NotOne) as error:
        raise ValueError(f"these bytes are no {codec} file, or it is cut") from error


class _NotOne(Exception):
    """The bytes are not what they should be."""


def _check(codec: str) -> None:
    if codec not in CODECS:
        raise ValueError(f"unknown codec {codec!r}: expected one of {', '.join(CODECS)}")
    name = {"jpeg": "jpg", "jpeg2000": "jpg_2000"}.get(codec, codec)
    if codec != "jpegxl" and not features.check(name):
        raise ValueError(f"this Pillow was built without {codec}; install the wheel from PyPI")


def _nearest_quality(image: Image.Image, codec: str, target: int, scale: float) -> tuple[bytes, Image.Image]:
    """Bisection over the quality, then the nearest of the neighbours (sizes are not quite monotone)."""
    small = downscale(image, scale)
    encode = functools.cache(lambda quality: encode_classic(small, codec, quality))
    low, high = 0, 100
    while low < high:
        middle = (low + high) // 2
        if len(encode(middle)) < target:
            low = middle + 1
        else:
            high = middle
    best = min((encode(q) for q in range(max(0, low - 2), min(100, low + 1) + 1)), key=lambda d: abs(len(d) - target))
    return best, decode_classic(best, image.size)


def _jpeg(data: bytes) -> int:
    """Walk the marker segments; count from the end of each scan header to the next true marker."""
    at, total = 2, 0
    if data[:2] != b"\xff\xd8":
        raise _NotOne
    while data[at + 1] != 0xD9:  # until the end of the image
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at] != 0xFF or length < 2:
            raise _NotOne
        at += 2 + length
        if marker == 0xDA:  # start of scan: data follow; FF 00 is a stuffed byte, FF D0 to D7 restart marks
            start = at
            while data[at] != 0xFF or data[at + 1] == 0 or 0xD0 <= data[at + 1] <= 0xD7:
                at += 1
            total += at - start
    return total


def _webp(data: bytes) -> int:
    """RIFF chunks: a name, a little-endian size, the data, padded to an even number of bytes."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        raise _NotOne
    at = 12
    while data[at : at + 4] not in (b"VP8 ", b"VP8L"):
        at += 8 + int.from_bytes(data[at + 4 : at + 8], "little") + 1 & ~1
        if at >= len(data):
            raise _NotOne
    return _whole(data, at + 8, int.from_bytes(data[at + 4 : at + 8], "little"))


def _avif(data: bytes) -> int:
    """ISO boxes: a big-endian size that counts itself, a name, the data."""
    if data[4:8] != b"ftyp":
        raise _NotOne
    at = 0
    while data[at + 4 : at + 8] != b"mdat":
        at += max(8, int.from_bytes(data[at : at + 4], "big"))
        if at >= len(data):
            raise _NotOne
    return _whole(data, at + 8, int.from_bytes(data[at : at + 4], "big") - 8)


def _whole(data: bytes, start: int, size: int) -> int:
    """`size`, if there are so many bytes."""
    if start + size > len(data):
        raise _NotOne
    return size


def _jpegxl(data: bytes) -> int:
    """The stream does not say how long it is: only decoding shows that nothing is missing."""
    try:
        Image.open(io.BytesIO(data), formats=["JXL"]).load()
    except Exception as error:  # the plugin's errors are of many kinds
        raise _NotOne from error
    return len(data) - 2


def _jpeg2000(data: bytes) -> int:
    """Tile-parts: from SOT (FF 90, with the tile-part's length) the headers run up to SOD (FF 93)."""
    at, total = data.find(b"\xff\x90"), 0
    if data[:4] != b"\xff\x4f\xff\x51" or at < 0:
        raise _NotOne
    while data[at : at + 2] == b"\xff\x90":
        length = int.from_bytes(data[at + 6 : at + 10], "big")
        start = data.find(b"\xff\x93", at) + 2
        if start == 1 or at + length > len(data):
            raise _NotOne
        total += at + length - start
        at += max(length, 1)
    return total


# ----------------------------------------------------------------------------------------- the learned baseline

CONTRAST = 4.0
"""Pixels in [0, 1] are spread by this, so that what the transform sees has about unit variance, as a latent has."""
PATCH = 4
"""Pixels along one side of a patch: 4 x 4 pixels of three colours stand as 48 channels on the grid of SLIM's latent."""
CELL = 16
"""Pixels along one side of a cell of y, as in SLIM's compressor."""
COLOUR = torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / torch.tensor([[3.0], [2.0], [6.0]]).sqrt()
"""Orthonormal rows: brightness and two differences. It keeps squared errors as they are, and parts the colours."""
PIXEL_CONFIG = CompressorConfig(
    latent_channels=3 * PATCH**2,
    factor=PATCH,
    stem=64,
    y_channels=128,
    gain_min=0.03,
    gain_max=1.0,
    t0_table=[[0.0, 0]],  # there is no diffusion behind it
    steps=0,
)
KEPT = 88, 20, 20
"""How many coefficients of a cell's DCT the transform starts with: of brightness and of the two differences."""
LAMBDA = 0.02, 12.0
"""Weight of the squared error (of CONTRAST times the pixels) at quality 0 and 1."""


class PixelCodec:
    """A mean-scale hyperprior on pixels (Minnen et al., arXiv 1809.02736), one model for all rates.

    Transforms, gains, integer entropy model, range coder and header of the file are SLIM's own: a
    `LatentCompressor` on patches of pixels in place of a latent. It differs in what it lacks: no pretrained network
    stands around it, and the head that would learn the region of interest is switched off.
    """

    def __init__(self, compressor: LatentCompressor) -> None:
        """Raises ValueError if the compressor is not made for patches of pixels."""
        config = compressor.config
        if (config.latent_channels, config.factor) != (3 * PATCH**2, PATCH):
            raise ValueError(
                f"a pixel codec needs a compressor with latent_channels={3 * PATCH**2} and factor={PATCH}; "
                f"this one has {config.latent_channels} and {config.factor}"
            )
        self.compressor = compressor

    @classmethod
    def new(cls) -> PixelCodec:
        """Before training: the DCT of each cell, and a constant where the predicted region of interest would be."""
        compressor = LatentCompressor(PIXEL_CONFIG)
        basis = _cell_basis()
        compressor.encoder.direct.weight.data = basis[..., None, None].clone()
        compressor.decoder.direct.weight.data = basis.T[..., None, None].contiguous()
        for parameter in compressor.encoder.roi.parameters():
            torch.nn.init.zeros_(parameter).requires_grad_(False)
        return cls(compressor)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device | None = None) -> PixelCodec:
        """Load what `save_pretrained` wrote, strictly (see `LatentCompressor.from_pretrained` for the errors)."""
        return cls(LatentCompressor.from_pretrained(folder, device))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors (fp16)."""
        self.compressor.save_pretrained(folder)

    def compress(self, image: Image.Image, quality: float) -> bytes:
        """A file with the same header as a .slim stream: 7 bytes at 128 px.

        Args:
            image: RGB; its sides are filled up to multiples of 32 by repeating the last row and column.
            quality: 0 to 1.
        """
        return self.encode(image, quality)[0]

    def encode(self, image: Image.Image, quality: float) -> tuple[bytes, dict[str, Tensor]]:
        """What `compress` does, and what each symbol costs in bits: "y" (128, h, w) and "h" (8, h/2, w/2)."""
        coder = RangeEncoder()
        bits = self.compressor.compress(to_patches(self._pad(to_tensor(image))), quality, coder)
        header = StreamHeader(self._fingerprint, quality_byte(quality), *image.size)
        return pack(header, coder.get_bytes()), bits

    def decompress(self, data: bytes) -> Image.Image:
        """The picture that `compress` stored.

        Raises:
            StreamError: the bytes are damaged, or of other weights.
        """
        header, payload = unpack(data, self._fingerprint)
        grid = [-(-side // self._unit) * self._unit // PATCH for side in (header.height, header.width)]
        z_hat = self.compressor.decompress(RangeDecoder(payload), (grid[0], grid[1]), header.quality / 255)
        return to_images(from_patches(z_hat))[0].crop((0, 0, header.width, header.height))

    @functools.cached_property
    def _fingerprint(self) -> int:
        return self.compressor.fingerprint()

    @property
    def _unit(self) -> int:
        return self.compressor.config.multiple * PATCH

    def _pad(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        return F.pad(x, (0, -width % self._unit, 0, -height % self._unit), mode="replicate")


def to_patches(x: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] to patches (B, 48, H/4, W/4) of brightness and two colour differences.

    Squared errors grow by CONTRAST squared, and are otherwise those of the pixels.
    """
    return F.pixel_unshuffle(CONTRAST * torch.einsum("dc,bchw->bdhw", COLOUR.to(x.device), x - 0.5), PATCH)


def from_patches(z: Tensor) -> Tensor:
    """Inverse of `to_patches`, clipped to [0, 1]; differentiable."""
    planes = F.pixel_shuffle(z, PATCH)
    return (torch.einsum("dc,bdhw->bchw", COLOUR.to(z.device), planes) / CONTRAST + 0.5).clamp(0, 1)


def _cell_basis() -> Tensor:
    """The lowest of a cell's orthonormal DCT coefficients as rows over its patches: (128, 768)."""
    n = torch.arange(CELL, dtype=torch.float64)
    basis = torch.cos(torch.pi * (2 * n + 1) * n[:, None] / (2 * CELL)) * (2 / CELL) ** 0.5
    basis[0] /= 2**0.5
    waves = torch.einsum("ui,vj->uvij", basis, basis).flatten(0, 1)  # (256, 16, 16)
    waves = waves[(n[:, None] ** 2 + n**2).flatten().argsort(stable=True)]
    planes = torch.cat([_as_plane(waves[:kept], colour) for colour, kept in enumerate(KEPT)])
    return F.pixel_unshuffle(F.pixel_unshuffle(planes, PATCH), CELL // PATCH).flatten(1).float()


def _as_plane(waves: Tensor, colour: int) -> Tensor:
    planes = torch.zeros(len(waves), 3, CELL, CELL, dtype=waves.dtype)
    planes[:, colour] = waves
    return planes


def train_mse(run: Run) -> None:
    """R + lambda D over all rates at once: scenes, batch, steps, rate and warm-up are those of SLIM's stage 1."""
    from .training import Stage1Config

    _train(run, "baseline_mse", PixelCodec.new(), _recipe("baseline_mse", Stage1Config), 0.0)


def train_task(run: Run, ce: float) -> None:
    """R + lambda D + ce sqrt(lambda) T, from where `train_mse` ended: the strongest published kind.

    T is the cross-entropy of machine A on a random view of the decoded picture. All is as in SLIM's stage 2.
    """
    from .training import Stage2Config

    codec = PixelCodec.from_pretrained(run.out / "baseline_mse", run.device)
    codec.compressor.encoder.roi.requires_grad_(False)
    _train(run, "baseline_task", codec, _recipe("baseline_task", Stage2Config), ce)


def _recipe(name: str, stage: type[Stage1Config]) -> Recipe:
    from .pretrain import Recipe

    return Recipe(name, stage.steps, stage.lr, stage.warmup, betas=(0.9, 0.98), weight_decay=1e-4)


def _train(run: Run, name: str, codec: PixelCodec, recipe: Recipe, ce: float) -> None:
    from .pretrain import SOURCE, fit
    from .training import Stage2Config, bits_per_pixel, random_view

    pool = run.train_pool()
    machine = load_machine(str(run.out / "machine_a"), run.device)
    model = codec.compressor.to(run.device, memory_format=torch.channels_last)

    def loss_of(rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        indices = np.sort(rng.integers(len(pool), size=run.batch))
        x = pool.batch(indices).to(run.device)
        # One quality from each of `batch` equal parts of [0, 1]: steadier gradients than independent draws.
        part = (rng.permutation(run.batch) + rng.random(run.batch)) / run.batch
        quality = torch.from_numpy(part).float().to(run.device)
        lam = LAMBDA[0] * (LAMBDA[1] / LAMBDA[0]) ** quality
        z = to_patches(x)
        with repro.autocast(run.device, cpu=True):
            out = model(z.to(memory_format=torch.channels_last), quality)
        bpp = bits_per_pixel(out["likelihoods"], z.shape[-2:], PATCH)
        error = (z - out["z_hat"]).square().mean((1, 2, 3))
        shown = {"bpp": bpp.mean().item(), "mse": error.mean().item()}
        if ce:
            view, _ = random_view(Stage2Config.view, from_patches(out["z_hat"]).float())
            with repro.autocast(run.device, cpu=True):
                logits = machine(view).float()
            labels = torch.from_numpy(pool.labels[indices]).to(run.device)
            crossed = F.cross_entropy(logits, labels, reduction="none")
            shown |= {"ce": crossed.mean().item(), "top1": (logits.argmax(1) == labels).float().mean().item()}
        loss = ((bpp + lam * error) / lam.sqrt()).mean()  # as in stage 1: no rate drowns another
        if ce:
            loss = loss + ce * crossed.mean()
        return loss, {"loss": loss.item(), **shown}

    modules, facts = fit(run, recipe, {"model": model}, loss_of, _groups(model))
    facts |= {
        "command": "python -m slimlib.baselines " + shlex.join(sys.argv[1:]),
        "loss": "R + lambda D" + (f" + {ce:g} sqrt(lambda) cross-entropy of machine A on random views" if ce else ""),
        "lambda": f"{LAMBDA[0]:g} to {LAMBDA[1]:g}, log-spaced over quality; all of them in every batch",
        "compared with SLIM": "scenes, batch, optimiser and rates of its "
        + ("stage 2, with the gradient of the same machine A" if ce else "stage 1"),
    }
    codec = PixelCodec(modules["model"].to(memory_format=torch.contiguous_format))
    with repro.atomic_folder(run.out / name) as folder:
        codec.save_pretrained(folder)
    figures = measure_pixels(codec, run.test_pool(), machine)
    about = "A mean-scale hyperprior on pixels, one model for all rates: the learned baseline, " + (
        "tuned on for machine A." if ce else "trained for squared error."
    )
    repro.write_card(run.out / name, f"Pocket {name.replace('_', ', ')}", about, facts, figures, SOURCE)
    print(name, figures)


def _groups(model: LatentCompressor) -> list[dict]:
    """The groups of stage 1, with the factor under the name that `pretrain.fit` knows; the decay is the recipe's."""
    from .training import parameter_groups

    return [{"params": g["params"], "scale": g["speed"]} for g in parameter_groups(model)]


@torch.no_grad()
def measure_pixels(
    codec: PixelCodec, pool: ScenePool, machine: torch.nn.Module, qualities: Sequence[float] = (0, 0.25, 0.5, 0.75, 1)
) -> dict:
    """Estimated rate, PSNR and accuracy of one machine over a pool, for the card."""
    from .training import bits_per_pixel

    figures: dict = {"test scenes": len(pool)}
    model = codec.compressor.eval()
    for quality in qualities:
        bits, error, hits = 0.0, 0.0, 0
        for first in range(0, len(pool), 62):
            indices = np.arange(first, min(first + 62, len(pool)))
            x = pool.batch(indices).to(model.device)
            z = to_patches(x)
            out = model(z, quality)
            x_hat = from_patches(out["z_hat"])
            bits += float(bits_per_pixel(out["likelihoods"], z.shape[-2:], PATCH).sum())
            error += float((x - x_hat).square().mean((1, 2, 3)).sum())
            hits += int((machine(x_hat).argmax(1).cpu() == torch.from_numpy(pool.labels[indices])).sum())
        figures[f"bpp at quality {quality:g}"] = round(bits / len(pool), 5)
        figures[f"PSNR at quality {quality:g} [dB]"] = round(-10 * math.log10(error / len(pool)), 2)
        figures[f"top-1 of machine A at quality {quality:g} [%]"] = round(100 * hits / len(pool), 2)
    return figures


def main(arguments: list[str] | None = None) -> None:
    from .pretrain import Run
    from .training import Stage1Config, Stage2Config

    parser = repro.training_parser("slimlib.baselines", __doc__)
    parser.add_argument("task", choices=["mse", "task"], help="what to train")
    parser.add_argument("--out", type=Path, default=ASSETS / "pocket", help="folder of the models")
    parser.add_argument("--steps", type=int, help="optimiser steps (default: as many as SLIM's stage)")
    parser.add_argument("--batch", type=int, help="scenes a step (default: as many as SLIM's stage)")
    parser.add_argument("--pool", type=int, default=16_368, help="training scenes (default: %(default)s)")
    parser.add_argument("--ce", type=float, default=Stage2Config.b, help="weight of the cross-entropy (%(default)s)")
    a = parser.parse_args(arguments)
    device = repro.begin(a)
    batch = a.batch or (Stage1Config if a.task == "mse" else Stage2Config).batch
    run = Run(a.out, a.work, a.steps, batch, a.seed, a.resume, False, device, a.pool, not a.quiet)
    if a.task == "mse":
        train_mse(run)
    else:
        train_task(run, a.ce)


if __name__ == "__main__":
    main()
