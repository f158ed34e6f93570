"""The compressor's two transforms: the encoder g_a, which also sees the region of interest, and the decoder g_s.

Both start as a block DCT of the latent; what attention and convolutions learn is added to that. Their `config` is a
`compressor.CompressorConfig`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from compressai.layers import ResidualBlock
from torch import Tensor, nn
from torch.nn import functional as F

ATTENDED = 32  # attention sees at most 32 x 32 (pooled) cells, so that its cost grows linearly with the image


class Encoder(nn.Module):
    """g_a with its heads: latent y, hyper-latent h, and the map of the region of interest."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        widths = [*[config.stem] * (config.stages - 1), config.width]  # from the finest grid to that of y
        down: list[nn.Module] = [nn.Conv2d(config.latent_channels, widths[0], 5, stride=2, padding=2)]
        for channels, out in pairwise(widths):
            down += [ResidualBlock(channels, channels), nn.Conv2d(channels, out, 3, stride=2, padding=1)]
        self.down = nn.Sequential(*down)
        self.embed = QualityEmbedding()
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.block = 2**config.stages
        self.direct = nn.Conv2d(config.latent_channels * self.block**2, config.y_channels, 1, bias=False)
        self.direct.weight.data = _block_dct(config.latent_channels, self.block, config.y_channels)[..., None, None]
        self.y = nn.Conv2d(config.width, config.y_channels, 1)
        self.y.weight.data *= 0.1
        self.h = nn.Sequential(
            nn.Conv2d(config.width, config.width // 2, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(config.width // 2, config.h_channels, 1),
        )
        self.roi = nn.Sequential(nn.Conv2d(config.width, self.block**2, 1), nn.PixelShuffle(self.block))

    def forward(self, z: Tensor, quality: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        embedding = self.embed(quality)
        x = self.down(z)
        for block in self.blocks:
            x = block(x, embedding)
        y = self.direct(F.pixel_unshuffle(z, self.block)) + self.y(x)
        return y, self.h(x), self.roi(x)


class Decoder(nn.Module):
    """g_s: back to the diffusion model's latent."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.enter = nn.Conv2d(2 * config.y_channels, config.width, 1)
        self.embed = QualityEmbedding()
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(max(1, config.depth - 1)))
        widths, up = [config.width, *(max(config.stem >> stage, 16) for stage in range(config.stages))], []
        for channels, out in pairwise(widths):
            up += [nn.Conv2d(channels, 4 * out, 3, padding=1), nn.PixelShuffle(2), ResidualBlock(out, out)]
        self.up = nn.Sequential(*up, nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1))
        self.up[-1].weight.data *= 0.1
        self.block = 2**config.stages
        self.direct = nn.Conv2d(config.y_channels, config.latent_channels * self.block**2, 1, bias=False)
        dct = _block_dct(config.latent_channels, self.block, config.y_channels)
        self.direct.weight.data = dct.T.contiguous()[..., None, None]

    def forward(self, y_hat: Tensor, scale: Tensor, quality: Tensor) -> Tensor:
        embedding = self.embed(quality)
        x = self.enter(torch.cat([y_hat, scale], 1))
        for block in self.blocks:
            x = block(x, embedding)
        return (F.pixel_shuffle(self.direct(y_hat), self.block) + self.up(x)).float()


class Block(nn.Module):
    """Transformer block on a grid: attention over all cells, then an MLP, both modulated by the quality."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.place = nn.Conv2d(width, width, 3, padding=1, groups=width)  # positions, and neighbours
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.q, self.kv, self.out = (nn.Linear(width, outputs) for outputs in (width, 2 * width, width))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.modulate = nn.Linear(16, 4 * width)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B, width, h, w), embedding (B, 16) of the quality."""
        x = x + self.place(x)
        rows, columns = x.shape[-2:]
        scale1, shift1, scale2, shift2 = self.modulate(embedding)[:, None].chunk(4, dim=2)
        tokens = x.flatten(2).transpose(1, 2)  # (B, h * w, width)
        normed = self.norm1(tokens) * (1 + scale1) + shift1
        seen = normed
        if max(rows, columns) > ATTENDED:
            grid = normed.transpose(1, 2).unflatten(2, (rows, columns))
            seen = F.adaptive_avg_pool2d(grid, (min(rows, ATTENDED), min(columns, ATTENDED))).flatten(2).transpose(1, 2)
        q, k, v = (
            t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (self.q(normed), *self.kv(seen).chunk(2, 2))
        )
        tokens = tokens + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        tokens = tokens + self.mlp(self.norm2(tokens) * (1 + scale2) + shift2)
        return tokens.transpose(1, 2).unflatten(2, (rows, columns))


class QualityEmbedding(nn.Module):
    """(B,) quality in [0, 1] -> (B, 16) features."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, quality: Tensor) -> Tensor:
        return self.net(4 * quality[:, None] - 2)


def _block_dct(channels: int, block: int, keep: int) -> Tensor:
    """Orthonormal DCT of block x block cells in each channel: (keep, channels * block**2), lowest first.

    Columns in the order of `F.pixel_unshuffle`. Rows beyond channels * block**2 are 0.
    """
    n = torch.arange(block, dtype=torch.float64)
    basis = torch.cos(torch.pi * (2 * n + 1) * n[:, None] / (2 * block)) * (2 / block) ** 0.5
    basis[0] /= 2**0.5
    rows = torch.einsum("ui,vj,cd->uvcdij", basis, basis, torch.eye(channels, dtype=torch.float64))
    frequency = (n[:, None] ** 2 + n**2)[:, :, None].expand(block, block, channels).flatten()
    rows = rows.reshape(len(frequency), -1)[frequency.argsort(stable=True)]
    return F.pad(rows, (0, 0, 0, max(0, keep - len(rows))))[:keep].float()
