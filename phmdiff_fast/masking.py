"""How many patches of a level stay, from its complexity (PHMDiff III.B.1); which ones: ``draw_mask``."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import LevelSpec
from .pyramid import build_pyramid, downsample

LOWEST, HIGHEST = 0.1, 0.9


def gradient_magnitude(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 1, H, W): forward differences, mean over channels, 0 past the last row and column."""
    dx = torch.zeros_like(x)
    dy = torch.zeros_like(x)
    dx[..., :-1, :] = x[..., 1:, :] - x[..., :-1, :]
    dy[..., :-1] = x[..., 1:] - x[..., :-1]
    return (dx.square() + dy.square()).sqrt().mean(1, keepdim=True)


def level_complexity(images: Tensor, foreground: Tensor, levels: int) -> list[float]:
    """Mean gradient magnitude of each level inside the foreground (ours: the paper names no measure).

    images (B, C, H, W); foreground (B, 1, H, W) bool. Returns ``levels`` floats, fine to coarse.
    """
    inside = foreground.to(images.dtype)
    out = []
    for image in build_pyramid(images, levels):
        weight = inside.sum().clamp_min(1e-12)
        out.append(float((gradient_magnitude(image) * inside).sum() / weight))
        inside = downsample(inside)
    return out


def mask_ratios(levels: list[LevelSpec], complexity: list[float] | None, gain: float) -> list[float]:
    """r_n = clip(r0_n + gain (1 - c_n / mean c), 0.1, 0.9); a ratio of 0 stays 0 (no masking).

    Without a measured complexity (None, or all zero) r_n = r0_n.
    """
    ratios = [spec.mask_ratio for spec in levels]
    if complexity is None or sum(complexity) <= 0:
        return ratios
    mean = sum(complexity) / len(complexity)
    return [
        0.0 if r == 0 else min(HIGHEST, max(LOWEST, r + gain * (1 - c / mean)))
        for r, c in zip(ratios, complexity, strict=True)
    ]


def num_kept(num_patches: int, ratio: float) -> int:
    """K = N - floor(r N): at least 1 for r < 1."""
    return num_patches - int(ratio * num_patches)
