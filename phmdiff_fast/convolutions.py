"""The convolutions around the transformer: a stem over the noise-free sources, a head over the tokens' image.

Both are optional. Shapes: B batch, C target channels, Cs source channels, M_n stem maps of level n, H x W image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _laid_out(x: Tensor) -> Tensor:
    """x (B, C, H, W) in the memory format its convolutions are fastest in.

    Channels last, but for 16-bit on a CPU: there the backward of a channels-last GroupNorm takes PyTorch many times
    as long as that of a plain one, and more than the convolutions gain.
    """
    narrow = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return x.contiguous(memory_format=torch.contiguous_format if narrow else torch.channels_last)


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)


class ResidualConv(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))): the second convolution starts at zero."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8 if width % 8 == 0 else 1, width), _conv(width, width)
        self.norm2, self.conv2 = nn.GroupNorm(8 if width % 8 == 0 else 1, width), _conv(width, width)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(x1)))


class Stem(nn.Module):
    """Convolutions over the sources: one map a level, (B, M_n, H / 2^n, W / 2^n), M_n = width 2^min(n, 2).

    Down through the resolutions, then back up: each map takes the coarser one's context in (1x1
    convolution, nearest neighbour), unless ``back`` is False. It never sees noise, so sampling computes it once
    a slice, not once a step.
    """

    def __init__(self, channels: int, width: int, levels: int, back: bool = True):
        super().__init__()
        self.widths = [width * 2 ** min(n, 2) for n in range(levels)]
        pairs = list(zip(self.widths, self.widths[1:], strict=False))  # (finer, coarser)
        self.first = _conv(channels, width)
        self.down = nn.ModuleList(_conv(fine, coarse, stride=2) for fine, coarse in pairs)
        self.blocks = nn.ModuleList(ResidualConv(w) for w in self.widths)
        self.up = nn.ModuleList(nn.Conv2d(coarse, fine, 1) for fine, coarse in pairs if back)

    def forward(self, sources: Tensor) -> list[Tensor]:
        x = self.blocks[0](self.first(_laid_out(sources)))
        maps = [x]
        for down, block in zip(self.down, self.blocks[1:], strict=True):
            x = block(down(x))
            maps.append(x)
        for n in reversed(range(len(self.up))):
            maps[n] = maps[n] + F.interpolate(self.up[n](maps[n + 1]), size=maps[n].shape[2:])
        return maps


class Head(nn.Module):
    """Convolutions from unpatchified tokens and noise-free skips to the image."""

    def __init__(self, inputs: int, width: int, channels: int):
        super().__init__()
        self.first = nn.Conv2d(inputs, width, 1)
        self.block = ResidualConv(width)
        self.last = _conv(width, channels)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, *maps: Tensor) -> Tensor:
        x = _laid_out(torch.cat(maps, 1))
        return self.last(F.silu(self.block(self.first(x))))


class PyramidHead(nn.Module):
    """A level's stage of one U-Net-like way up: its tokens, the stem's map, and what the coarser level's head made.

    width : channels here; below : of the coarser level's features, 0 at the coarsest level; inputs : of tokens, map,
    sources and coarse_up together. The last convolution starts at zero. Ours: the paper names no head.
    """

    def __init__(self, inputs: int, below: int, width: int, channels: int):
        super().__init__()
        self.first = nn.Conv2d(inputs, width, 1)
        self.from_below = nn.Conv2d(below, width, 1) if below else None
        self.block = ResidualConv(width)
        self.last = _conv(width, channels)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, below: Tensor | None, *maps: Tensor) -> tuple[Tensor, Tensor]:
        """below (B, ., H / 2, W / 2) or None, maps (B, ., H, W) -> image (B, C, H, W), features (B, width, H, W)."""
        x = self.first(_laid_out(torch.cat([part.to(maps[0].dtype) for part in maps], 1)))
        if self.from_below is not None:  # the product before the enlargement: a quarter of the pixels
            x = x + F.interpolate(self.from_below(below), size=x.shape[2:])
        x = self.block(x)
        return self.last(F.silu(x)), x
