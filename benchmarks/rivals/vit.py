"""Transformers that regress: TransUNet style (Chen 2021), and a masked autoencoder (He 2022)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.rivals.base import Regressor, VitBlock, laid_out, padded, positions, xavier
from phmdiff_fast.baselines import DoubleConv


class HybridNet(nn.Module):
    """Convolutions of widths w, 2w, 4w down to a quarter of each side, a transformer at an eighth, and back up.

    Skips join equal sizes, as in a U-Net. Sides: any.
    """

    def __init__(self, channels: int, width: int = 32, token_width: int = 192, depth: int = 6, heads: int = 3):
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.token_width = token_width
        self.down = nn.ModuleList(DoubleConv(a, b) for a, b in zip([channels, *widths], widths, strict=False))
        self.embed = nn.Linear(widths[-1], token_width)
        self.blocks = nn.ModuleList(VitBlock(token_width, heads) for _ in range(depth))
        self.norm, self.leave = nn.LayerNorm(token_width), nn.Linear(token_width, widths[-1])
        below = [widths[-1], *widths[:0:-1]]
        self.up = nn.ModuleList(DoubleConv(a + b, b) for a, b in zip(below, widths[::-1], strict=True))
        self.last = nn.Conv2d(width, 1, 1)
        xavier(self)

    def forward(self, sources: Tensor) -> Tensor:
        """(B, Cs, H, W) -> (B, 1, H, W) float32."""
        x, skips = laid_out(sources), []
        for block in self.down:
            skips.append(block(x))
            x = F.max_pool2d(skips[-1], 2, ceil_mode=True)
        x = self._mixed(x)  # (B, 4w, H / 8, W / 8)
        for block, skip in zip(self.up, skips[::-1], strict=True):
            x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
            x = block(torch.cat([x, skip], 1))
        return self.last(x).float()

    def _mixed(self, x: Tensor) -> Tensor:
        """(B, 4w, h, w) -> the same through the transformer, every place a token."""
        rows, cols = x.shape[2:]
        tokens = self.embed(x.flatten(2).transpose(1, 2)).float()  # (B, N, D)
        tokens = tokens + positions(rows, cols, self.token_width, x.device)
        for block in self.blocks:
            tokens = block(tokens)
        return laid_out(self.leave(self.norm(tokens)).transpose(1, 2).unflatten(2, (rows, cols)))


class TransUNet(Regressor):
    """TransUNet (Chen 2021) for regression, L1: three levels of convolutions and a ViT of width 192.

    Published for segmentation, with a pretrained ResNet-50 and ViT-B/16 at a sixteenth of 224 pixels; here an eighth
    of 64 gives 8 x 8 tokens, and nothing is pretrained.
    """

    name = "transunet"

    def __init__(self, channels: int):
        super().__init__(HybridNet(channels))


class MaskedAutoencoder(nn.Module):
    """A ViT over the visible patches of the sources; a narrow one over all places predicts the target's patches."""

    def __init__(self, channels: int, patch: int = 8, width: int = 192, depth: int = 6, decoder_width: int = 96,
                 decoder_depth: int = 2, heads: int = 3):  # fmt: skip
        super().__init__()
        self.patch, self.width, self.decoder_width = patch, width, decoder_width
        self.embed = nn.Linear(channels * patch**2, width)
        self.blocks = nn.ModuleList(VitBlock(width, heads) for _ in range(depth))
        self.norm, self.to_decoder = nn.LayerNorm(width), nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(decoder_width))
        self.decoder_blocks = nn.ModuleList(VitBlock(decoder_width, heads) for _ in range(decoder_depth))
        self.decoder_norm, self.last = nn.LayerNorm(decoder_width), nn.Linear(decoder_width, patch**2)
        xavier(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches."""
        return -(-images.shape[2] // self.patch), -(-images.shape[3] // self.patch)

    def encode(self, sources: Tensor, keep: Tensor | None) -> Tensor:
        """sources (B, Cs, H, W), keep (B, K) int64 visible patches or None for all -> (B, K, D)."""
        rows, cols = self.grid(sources)
        x = F.pixel_unshuffle(padded(sources, self.patch), self.patch).flatten(2).transpose(1, 2)  # (B, N, Cs p p)
        pos = positions(rows, cols, self.width, x.device)
        if keep is not None:
            x, pos = x.gather(1, keep[..., None].expand(-1, -1, x.shape[2])), pos[keep]
        x = self.embed(x).float() + pos
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def decode(self, x: Tensor, keep: Tensor | None, rows: int, cols: int) -> Tensor:
        """x (B, K, D) -> image (B, 1, rows p, cols p) float32."""
        x = self.to_decoder(x).float()  # (B, K, Dd)
        if keep is not None:
            fill = self.mask_token.expand(len(x), rows * cols, -1)
            x = fill.scatter(1, keep[..., None].expand_as(x), x)  # (B, N, Dd)
        x = x + positions(rows, cols, self.decoder_width, x.device)
        for block in self.decoder_blocks:
            x = block(x)
        x = self.last(self.decoder_norm(x)).float()  # (B, N, p p)
        return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (rows, cols)), self.patch)

    def forward(self, sources: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, Cs, H, W) -> (B, 1, H, W) float32; sides: any."""
        made = self.decode(self.encode(sources, keep), keep, *self.grid(sources))
        return made[..., : sources.shape[2], : sources.shape[3]]


class MaskedRegression(Regressor):
    """A masked autoencoder (He 2022) whose decoder predicts the target instead of the masked input, L2.

    Three quarters of the patches are masked until 60 % of the time are used; the rest, and every translation, sees all.
    The error counts at every patch: unlike an autoencoder's, a visible one is no answer. No patch is normalised: its
    mean and deviation would be missing at test.
    """

    name = "mae"
    turns = (0.6,)
    visible = 0.25

    def __init__(self, channels: int):
        super().__init__(MaskedAutoencoder(channels))

    def draw(self, sources: Tensor, share: float) -> Tensor | None:
        """Visible patches (B, K) int64 of a training step, None for all."""
        if share >= self.turns[0]:
            return None
        rows, cols = self.net.grid(sources)
        keys = torch.rand(len(sources), rows * cols, device=sources.device)
        return keys.argsort(1)[:, : max(1, round(self.visible * rows * cols))]

    def loss(self, sources: Tensor, target: Tensor, share: float) -> Tensor:
        return F.mse_loss(self.net(sources, self.draw(sources, share)), target)
