"""Augmentation of a batch, a pure function of (seed, sample, step).

Left-right flips of everything; random gamma and brightness of each source (never of the target):
what another scanner does to the source, the prototypes say, is worth 1.3 dB there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import TrainConfig
from .kernels import _philox
from .pyramid import per_sample

FLIP, GAMMA, SCALE = (_philox.AUGMENT + n for n in range(3))


def augment(sources: Tensor, target: Tensor, sample_ids: Tensor, rng, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """sources (B, Cs, H, W) and target (B, C, H, W) in [-1, 1] -> the same, augmented.

    H is the left-right axis (RAS x). A source v in [0, 1] becomes scale v^gamma, clipped, with
    gamma = exp(U(-g, g)) and scale = U(1 - s, 1 + s), drawn for each sample and source.
    """

    def uniform(num: int, stream: int) -> Tensor:
        return _philox.uniforms(sample_ids, num, rng=rng, stream=stream)  # (B, num)

    if config.flip:
        flip = per_sample(uniform(1, FLIP)[:, 0] < 0.5)
        sources = torch.where(flip, sources.flip(2), sources)
        target = torch.where(flip, target.flip(2), target)
    if config.gamma or config.scale:
        channels = sources.shape[1]
        gamma = torch.exp((2 * uniform(channels, GAMMA) - 1) * config.gamma)[:, :, None, None]
        scale = (1 + (2 * uniform(channels, SCALE) - 1) * config.scale)[:, :, None, None]
        unit = ((sources + 1) / 2).clamp(0, 1)
        sources = (scale * unit**gamma * 2 - 1).clamp(-1, 1)
    return sources, target
