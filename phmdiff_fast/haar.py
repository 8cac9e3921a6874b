"""The orthonormal 3D Haar transform, which wavelet diffusion works in.

Bytes: the volume read once, the bands written once, which is the floor; the form of strided
convolutions moves eight times as much. Shapes: B batch, C channels, X x Y x Z volume, (x, y, z) its half,
rounded up. Each direction is the other's backward (odd sides: padding's backward is the crop).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import _pyramid_ops
from .kernels._extension import choose


def haar3d_reference(x: Tensor) -> Tensor:
    x = F.pad(x, [side for n in reversed(x.shape[2:]) for side in (0, n % 2)])
    bands = x[:, None]
    for axis in (3, 4, 5):
        even, odd = bands.unfold(axis, 2, 2).unbind(-1)
        bands = torch.stack([even + odd, even - odd], dim=2).flatten(1, 2) * 0.5**0.5
    return bands


def inverse_haar3d_reference(bands: Tensor, shape: tuple[int, int, int]) -> Tensor:
    x = bands
    for axis in (5, 4, 3):
        low, high = x.unflatten(1, (-1, 2)).unbind(2)
        x = torch.stack([low + high, low - high], dim=axis + 1).flatten(axis, axis + 1) * 0.5**0.5
    return x[:, 0, ..., : shape[0], : shape[1], : shape[2]]


def haar3d(x: Tensor, *, impl: str | None = None) -> Tensor:
    """Orthonormal 3D Haar transform.

    x : (B, C, X, Y, Z) floating; odd sides are padded with 0

    Returns (B, 8, C, x, y, z): band 4 i + 2 j + k is the difference along the axes whose bit is set, band 0
    the low one. Raises ValueError for another number of dimensions.
    """
    if x.dim() != 5:
        raise ValueError(f"haar3d: need (B, C, X, Y, Z), got {tuple(x.shape)}")
    return _pyramid_ops.ops.haar3d(x) if choose("haar3d", impl, {"x": x}) else haar3d_reference(x)


def inverse_haar3d(bands: Tensor, *, shape: tuple[int, int, int] | None = None, impl: str | None = None) -> Tensor:
    """The inverse of ``haar3d``.

    bands : (B, 8, C, x, y, z)
    shape : (X, Y, Z) of the volume, which crops the padding of odd sides off again; None is twice the bands'

    Returns (B, C, X, Y, Z). Raises ValueError for shapes that do not fit.
    """
    if bands.dim() != 6 or bands.shape[1] != 8:
        raise ValueError(f"inverse_haar3d: need (B, 8, C, x, y, z), got {tuple(bands.shape)}")
    half = tuple(bands.shape[3:])
    sides = tuple(2 * n for n in half) if shape is None else tuple(shape)
    if len(sides) != 3 or tuple(_pyramid_ops.half(n) for n in sides) != half:
        raise ValueError(f"inverse_haar3d: shape {sides} does not fit bands of {half}")
    if choose("inverse_haar3d", impl, {"bands": bands}):
        return _pyramid_ops.ops.inverse_haar3d(bands, *sides)
    return inverse_haar3d_reference(bands, sides)
