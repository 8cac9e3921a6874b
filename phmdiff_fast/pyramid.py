"""The pyramid: an image to its levels and back up (PHMDiff Eq. 1 and Eq. 6), and the 3D Haar transform.

Level 0 is full resolution. Down: the mean of 2x2 blocks, edge blocks over what exists. Up: bilinear,
scale exactly 2, align_corners False, cropped. Odd sides are legal: 15 -> 8 -> 15. Shapes: B batch,
C channels, H x W image, (h, w) = (ceil(H/2), ceil(W/2)).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels._impl import choose


def per_sample(v: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return v[:, None, None, None]


def downsample(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, h, w), means of 2x2 blocks (alpha = 0.5 of Eq. 1)."""
    return F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)


def upsample(coarse: Tensor, height: int, width: int) -> Tensor:
    """(B, C, h, w) -> (B, C, H, W), bilinear at scale exactly 2, cropped."""
    return F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)[..., :height, :width]


def _check_half(op: str, coarse: Tensor, x: Tensor) -> None:
    half = (*x.shape[:2], -(-x.shape[2] // 2), -(-x.shape[3] // 2))
    if tuple(coarse.shape) != half:
        raise ValueError(f"{op}: coarse must be {half} beside {tuple(x.shape)}, got {tuple(coarse.shape)}")


def build_pyramid(x: Tensor, levels: int, *, impl: str | None = None) -> list[Tensor]:
    """x (B, C, H, W) -> [x, x_1, ...], ``levels`` entries (Eq. 1). Raises ValueError for levels < 1."""
    choose("build_pyramid", impl)
    if levels < 1 or x.dim() != 4:
        raise ValueError(f"build_pyramid: need (B, C, H, W) and levels >= 1, got {tuple(x.shape)} and {levels}")
    out = [x]
    for _ in range(levels - 1):
        out.append(downsample(out[-1]))
    return out


def merge_state(y: Tensor, eps: Tensor, coarse: Tensor | None, abar: Tensor, *, impl: str | None = None) -> Tensor:
    """The merged state sqrt(abar) y + sqrt(1 - abar) eps + (1 - sqrt(abar)) up(coarse) (Eq. 6).

    y, eps (B, C, H, W); coarse (B, C, h, w) or None for 0 (the coarsest level); abar (B,) float32.
    Returns (B, C, H, W). Raises ValueError for shapes that do not fit.
    """
    choose("merge_state", impl)
    if eps.shape != y.shape or abar.shape != y.shape[:1]:
        raise ValueError(
            f"merge_state: y {tuple(y.shape)}, eps {tuple(eps.shape)}, abar {tuple(abar.shape)} do not fit"
        )
    state = per_sample(abar.sqrt()) * y + per_sample((1 - abar).sqrt()) * eps
    if coarse is None:
        return state
    _check_half("merge_state", coarse, y)
    return state + per_sample(1 - abar.sqrt()) * upsample(coarse, *y.shape[2:])


def upsample_add(coarse: Tensor, x: Tensor, weight: Tensor, *, impl: str | None = None) -> Tensor:
    """x + weight up(coarse): a sampler's y_t merged with the coarser level's estimate.

    coarse (B, C, h, w); x (B, C, H, W); weight (B,), 1 - sqrt(abar) for Eq. 6. Raises ValueError.
    """
    choose("upsample_add", impl)
    _check_half("upsample_add", coarse, x)
    return x + per_sample(weight) * upsample(coarse, *x.shape[2:])


def haar3d(x: Tensor, *, impl: str | None = None) -> Tensor:
    """Orthonormal 3D Haar transform: (B, C, X, Y, Z) -> (B, 8, C, x, y, z), sides halved, odd ones padded by 0.

    Band 4 i + 2 j + k is the difference along the axes whose bit is set; band 0 is the low one.
    """
    choose("haar3d", impl)
    if x.dim() != 5:
        raise ValueError(f"haar3d: need (B, C, X, Y, Z), got {tuple(x.shape)}")
    x = F.pad(x, [side for n in reversed(x.shape[2:]) for side in (0, n % 2)])
    bands = x[:, None]
    for axis in (3, 4, 5):
        even, odd = bands.unfold(axis, 2, 2).unbind(-1)
        bands = torch.stack([even + odd, even - odd], dim=2).flatten(1, 2) * 0.5**0.5
    return bands


def inverse_haar3d(bands: Tensor, *, shape: tuple[int, int, int] | None = None, impl: str | None = None) -> Tensor:
    """(B, 8, C, x, y, z) -> (B, C, X, Y, Z); ``shape`` crops the padding of odd sides off again."""
    choose("inverse_haar3d", impl)
    if bands.dim() != 6 or bands.shape[1] != 8:
        raise ValueError(f"inverse_haar3d: need (B, 8, C, x, y, z), got {tuple(bands.shape)}")
    x = bands
    for axis in (5, 4, 3):
        low, high = x.unflatten(1, (-1, 2)).unbind(2)
        x = torch.stack([low + high, low - high], dim=axis + 1).flatten(axis, axis + 1) * 0.5**0.5
    x = x[:, 0]
    return x if shape is None else x[..., : shape[0], : shape[1], : shape[2]]
