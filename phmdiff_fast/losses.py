"""The losses: noise or x0 (PHMDiff Eq. 5), and the cross-granularity MMD between levels' noise (Eq. 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from .diffusion import eps_from_x0
from .kernels import _philox
from .kernels.mmd import mmd2
from .kernels.patch_mask import patch_rows
from .pyramid import per_sample

IMPLIED_NOISE_FLOOR = 0.01  # below this 1 - abar the noise implied by an x0 estimate blows up


def elementwise(prediction: Tensor, truth: Tensor, kind: str) -> Tensor:
    """|d|^2 ("l2") or |d| ("l1"), same shape as the inputs."""
    difference = prediction - truth
    return difference.square() if kind == "l2" else difference.abs()


def visible_pixels(inverse: Tensor, patch: int, height: int, width: int) -> Tensor:
    """(B, N) inverse of ``draw_mask`` -> (B, 1, H, W) bool, True where the patch was kept."""
    grid = (inverse >= 0).view(-1, 1, height // patch, width // patch)
    return grid.repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def implied_noise(y_t: Tensor, x0: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """The noise an x0 estimate implies; samples with 1 - abar < 0.01 get ``eps`` itself.

    Such rows then lie in both sets of the MMD and carry no gradient, and the shapes stay static.
    """
    high = per_sample(1 - abar >= IMPLIED_NOISE_FLOOR)
    safe = abar.clamp_max(1 - IMPLIED_NOISE_FLOOR)
    return torch.where(high, eps_from_x0(y_t, x0, safe), eps)


def cross_granularity(
    eps: Tensor, eps_hat: Tensor, patch: int, rows: int, sample_ids: Tensor, level: int, rng
) -> Tensor:
    """L_n = MMD^2 between noise drawn and noise predicted at level n (Eq. 6), a scalar.

    eps, eps_hat (B, C, H, W). The samples are patch vectors (C p p), at most ``rows`` of them, those
    with the smallest Philox keys.
    """
    drawn, predicted = (patch_rows(x, patch, None).flatten(2).flatten(0, 1) for x in (eps, eps_hat))  # (B N, C p p)
    if len(drawn) > rows:
        per_sample_rows = len(drawn) // len(eps)
        keys = _philox.integers(sample_ids, per_sample_rows, rng=rng, stream=_philox.MMD_ROWS + level)
        chosen = keys.flatten().topk(rows, largest=False, sorted=False).indices
        drawn, predicted = drawn[chosen], predicted[chosen]
    return mmd2(predicted, drawn)
