"""Multi-scale maximum mean discrepancy between two sets of vectors (PHMDiff Eq. 6, Gretton 2012).

    K(a, b) = mean over j = -2..2 of exp(-|a - b|^2 / (2^j m)),  m = pooled mean squared distance
    MMD^2   = mean K(x, x') - 2 mean K(x, y) + mean K(y, y')

m is detached and has a closed form: over all pairs of the pooled set, mean |a - b|^2 =
2 (mean |a|^2 - |mean a|^2). The five exponentials are one at the widest bandwidth, squared again
and again. Shapes: x (n, d), y (m, d), scalar out. The reference keeps the three kernel matrices
for backward, O((n + m)^2). Computed in float32, or float64 for float64 inputs; never in 16 bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._impl import choose

SCALES = (-2, -1, 0, 1, 2)


def pooled_bandwidth(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared distance over all pairs of the pooled rows, detached, at least the smallest normal."""
    pooled = torch.cat([x, y]).detach()
    spread = pooled.square().sum(1).mean() - pooled.mean(0).square().sum()
    return (2 * spread).clamp_min(torch.finfo(pooled.dtype).tiny)


def _kernel(a: Tensor, b: Tensor, bandwidths: Tensor | None, pooled: Tensor | None) -> Tensor:
    squared = (a.square().sum(1)[:, None] + b.square().sum(1)[None] - 2 * a @ b.T).clamp_min(0)
    if bandwidths is not None:
        return torch.exp(-squared[None] / bandwidths[:, None, None]).mean(0)
    power = torch.exp(-squared / (2.0 ** SCALES[-1] * pooled))
    total = power
    for _ in SCALES[1:]:
        power = power.square()
        total = total + power
    return total / len(SCALES)


def mmd2_reference(x, y, bandwidths=None, *, estimator="biased"):
    with torch.autocast(x.device.type, enabled=False):
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        x, y = x.to(wide), y.to(wide)
        centre = torch.cat([x, y]).detach().mean(0)  # small norms: less cancellation in |a|^2 + |b|^2 - 2ab
        x, y = x - centre, y - centre
        pooled = pooled_bandwidth(x, y) if bandwidths is None else None
        if bandwidths is not None:
            bandwidths = torch.as_tensor(bandwidths, dtype=wide, device=x.device).flatten()
        xx, yy = _kernel(x, x, bandwidths, pooled), _kernel(y, y, bandwidths, pooled)
        xy = _kernel(x, y, bandwidths, pooled)
        if estimator == "biased":
            return xx.mean() + yy.mean() - 2 * xy.mean()
        n, m = len(x), len(y)
        inner_x = (xx.sum() - xx.diagonal().sum()) / (n * (n - 1))
        inner_y = (yy.sum() - yy.diagonal().sum()) / (m * (m - 1))
        return inner_x + inner_y - 2 * xy.mean()


def mmd2(x: Tensor, y: Tensor, bandwidths=None, *, estimator: str = "biased", impl: str | None = None) -> Tensor:
    """Squared maximum mean discrepancy of the rows of x (n, d) and y (m, d).

    bandwidths : the denominators of the exponentials (floats or (k,) tensor), else 2^j m, j = -2..2
    estimator : "biased" (never negative) or "unbiased" (diagonals left out; n, m >= 2)

    Returns a scalar in float32 (float64 for float64 rows). Raises ValueError for shapes, an empty
    set or an unknown estimator.
    """
    choose("mmd2", impl)
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"mmd2: need x (n, d) and y (m, d), got {tuple(x.shape)} and {tuple(y.shape)}")
    least = {"biased": 1, "unbiased": 2}.get(estimator)
    if least is None:
        raise ValueError(f"mmd2: estimator={estimator!r}; use 'biased' or 'unbiased'")
    if min(len(x), len(y)) < least:
        raise ValueError(f"mmd2: the {estimator} estimator needs {least} rows or more a side, got {len(x)}, {len(y)}")
    return mmd2_reference(x, y, bandwidths, estimator=estimator)
