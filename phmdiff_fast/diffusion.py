"""Noise schedule, forward process and the ways between eps and x0 (PHMDiff Eq. 2 and 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .kernels import _philox
from .pyramid import per_sample


class Schedule(nn.Module):
    """Linear betas and their cumulative products.

    ``abar`` (T,) float32: abar[t] = prod over s <= t of (1 - beta_s), computed in float64. A buffer
    that is never cast: in bf16 an abar of 0.9999 is 1.
    """

    def __init__(self, timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02):
        super().__init__()
        betas = torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64)
        self.timesteps = timesteps
        self.register_buffer("abar", torch.cumprod(1 - betas, 0).float(), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) int64 timesteps -> (B,) float32 abar."""
        return self.abar[t]

    def draw(self, sample_ids: Tensor, rng, last_share: float = 0.0) -> Tensor:
        """Timesteps (B,) int64 in [0, T), a pure function of (seed, sample, step).

        Uniform; a share ``last_share`` of them is T - 1 instead, where 1-step sampling looks (ours).
        """
        words = _philox.integers(sample_ids, 2, rng=rng, stream=_philox.TIMESTEP)
        last = words[:, 1] < int(last_share * 2**32)
        return torch.where(last, self.timesteps - 1, (words[:, 0] * self.timesteps) >> 32)


def noised(y: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """y_t = sqrt(abar) y + sqrt(1 - abar) eps (Eq. 2-3). y, eps (B, C, H, W); abar (B,)."""
    return per_sample(abar.sqrt()) * y + per_sample((1 - abar).sqrt()) * eps


def x0_from_eps(y_t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """x0 = (y_t - sqrt(1 - abar) eps) / sqrt(abar)."""
    return (y_t - per_sample((1 - abar).sqrt()) * eps) / per_sample(abar.sqrt())


def eps_from_x0(y_t: Tensor, x0: Tensor, abar: Tensor) -> Tensor:
    """eps = (y_t - sqrt(abar) x0) / sqrt(1 - abar)."""
    return (y_t - per_sample(abar.sqrt()) * x0) / per_sample((1 - abar).sqrt())
