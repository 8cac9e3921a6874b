"""A convolutional denoiser in the transformer's place: the row "without transformer" of the paper's Table II.

A small U-Net, the same for all levels, told timestep and level by a scale and a shift behind each norm. A mask hides
patches from it as zeros: a convolution cannot leave them out. The paper does not say what took the transformer's
place; this is ours. It stands where ``MaskedDiT`` stands and answers to the same calls.

Shapes: B batch, C target channels, Cs source channels, D width of the condition, H x W image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .model import LevelInput, TimestepEmbedder
from .pyramid import merge_state, per_sample, upsample_add


class TimedConv(nn.Module):
    """x + conv(silu(modulated norm(conv(silu(norm(x)))))), the modulation from the condition."""

    def __init__(self, inputs: int, width: int, cond_width: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(1, inputs), nn.Conv2d(inputs, width, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1)
        self.to_modulation = nn.Linear(cond_width, 2 * width)
        self.skip = nn.Conv2d(inputs, width, 1) if inputs != width else nn.Identity()
        for layer in (self.conv2, self.to_modulation):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        scale, shift = self.to_modulation(cond).chunk(2, 1)  # (B, width) each
        inner = self.norm2(self.conv1(F.silu(self.norm1(x))))
        inner = torch.addcmul(shift[:, :, None, None], inner, 1 + scale[:, :, None, None])
        return self.skip(x) + self.conv2(F.silu(inner))


class ConvDenoiser(nn.Module):
    """The U-Net of all levels; arguments as of ``MaskedDiT``, widths from ``config.head_width``."""

    def __init__(self, config: ModelConfig, source_channels: int, target_channels: int = 1):
        super().__init__()
        self.config, self.source_channels, self.target_channels = config, source_channels, target_channels
        levels, D, w = len(config.levels), config.width, config.head_width
        self.blocks, self.decoder_blocks, self.recompute = nn.ModuleList(), nn.ModuleList(), False  # nothing to compile
        self.t_embedder = TimestepEmbedder(D)
        self.level_embed = nn.Embedding(levels, D)
        widths = [w, 2 * w, 4 * w]
        self.first = nn.Conv2d(2 * target_channels + source_channels, w, 3, padding=1)
        pairs = list(zip([w, *widths], widths, strict=False))
        self.down = nn.ModuleList(TimedConv(a, b, D) for a, b in pairs)
        self.middle = TimedConv(widths[-1], widths[-1], D)
        self.up = nn.ModuleList(
            TimedConv(below + here, here, D) for below, here in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.output_channels = target_channels * (2 if config.learn_variance else 1)
        self.last = nn.Conv2d(w, self.output_channels, 3, padding=1)
        for layer in (self.last,):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def modulations(self, t: Tensor, coarse_t: Tensor | None = None) -> list[list[Tensor]]:
        """A list a level, of one condition (B, D); t (B,) or (L, B)."""
        levels = self.level_embed.num_embeddings
        return [[part] for part in self.packed_modulations(t)[0].split(t.shape[-1])][:levels]

    def packed_modulations(self, t: Tensor, coarse_t: Tensor | None = None) -> list[Tensor]:
        """The conditions of all levels, (L B, D), level-major, in a list of one."""
        cond = self.t_embedder(t.flatten()).unflatten(0, t.shape) + self.level_embed.weight[:, None]  # (L, B, D)
        return [F.silu(cond).flatten(0, 1)]

    def source_maps(self, sources: Tensor) -> None:
        """There is no stem."""
        return None

    def forward_levels(self, inputs: list[LevelInput], vectors: list[Tensor]) -> list[Tensor]:
        """Predict some levels, (B, C, H, W) each; ``vectors``: their conditions, (S, D) in a list of one."""
        conds = vectors[0].split(len(inputs[0].y))
        return [self._image(at, cond) for at, cond in zip(inputs, conds, strict=True)]

    def _image(self, at: LevelInput, cond: Tensor) -> Tensor:
        state = self._state(at)
        up = torch.zeros_like(at.y) if at.coarse_up is None else at.coarse_up
        x = torch.cat([state, at.sources, up], 1)
        if at.mask is not None:
            p = self.config.patch
            kept = (at.mask[1] >= 0).view(-1, 1, x.shape[2] // p, x.shape[3] // p)
            x = x * kept.repeat_interleave(p, 2).repeat_interleave(p, 3)
        x = self.first(x)
        skips = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else F.avg_pool2d(x, 2, ceil_mode=True), cond)
            skips.append(x)
        x = self.middle(x, cond)
        for block, skip in zip(self.up, skips[-2::-1], strict=True):
            x = block(torch.cat([F.interpolate(x, size=skip.shape[2:]), skip], 1), cond)
        out = self.last(F.silu(x)).float()
        return out + at.coarse_up if self.config.residual and at.coarse_up is not None else out

    def _state(self, at: LevelInput) -> Tensor:
        """Eq. 6, as ``embed_visible`` makes it: times sqrt(abar) where the state is scaled."""
        root = at.abar.sqrt()
        if at.eps is not None:
            state = merge_state(at.y, at.eps, at.coarse, at.abar)
        else:  # a sampler's y_t / sqrt(abar)
            state = per_sample(root) * at.y
            state = state if at.coarse is None else upsample_add(at.coarse, state, 1 - root)
        scaled = self.config.scale_state and self.config.prediction != "eps"
        return per_sample(root) * state if scaled else state

    def let_go(self) -> None:
        """Nothing is shared by the levels of a forward pass."""

    def unused(self, masked_levels: set[int]) -> list[nn.Parameter]:
        """Every parameter has a gradient in every step."""
        return []
