"""Noise schedules, forward process, what a network may predict, and the reverse step (PHMDiff Eq. 2-4).

Symbols: abar = cumulative alpha; y clean, y_t noised; per-sample quantities are (B,), images (B, C, H, W).
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .kernels import _philox
from .pyramid import merge_state, per_sample

COSINE_OFFSET, MAX_BETA = 0.008, 0.999  # Nichol & Dhariwal 2021, section 3.2


def linear_betas(timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """(T,) float64, evenly spaced (Ho et al. 2020)."""
    return torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64)


def cosine_betas(timesteps: int) -> Tensor:
    """(T,) float64 with abar(t) = f(t) / f(0), f = cos^2((t/T + s) / (1 + s) pi/2) (Nichol & Dhariwal Eq. 17)."""
    t = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    f = torch.cos((t + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2).square()
    return (1 - f[1:] / f[:-1]).clamp_max(MAX_BETA)


def trailing_timesteps(total: int, steps: int) -> list[int]:
    """``steps`` timesteps from ``total`` - 1 down, evenly spaced, the last gap ending before 0."""
    if not 1 <= steps <= total:
        raise ValueError(f"need 1 <= steps <= {total}, got {steps}")
    return [round(total - i * (total / steps)) - 1 for i in range(steps)]


class Schedule(nn.Module):
    """Betas and their cumulative products.

    ``abar`` (T,) float32: abar[t] = prod over s <= t of (1 - beta_s), computed in float64; ``log_beta`` and
    ``log_posterior`` (T,) float32: logarithms of beta_t and of the posterior variance beta tilde_t, whose
    zero at t = 0 is replaced by its value at t = 1. Buffers that are never cast: in bf16 an abar of
    0.9999 is 1.
    """

    def __init__(
        self, timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, kind: str = "linear"
    ):  # fmt: skip
        super().__init__()
        betas = cosine_betas(timesteps) if kind == "cosine" else linear_betas(timesteps, beta_start, beta_end)
        abar = torch.cumprod(1 - betas, 0)
        posterior = betas[1:] * (1 - abar[:-1]) / (1 - abar[1:])
        self.timesteps = timesteps
        tables = {"abar": abar, "log_beta": betas.log(), "log_posterior": torch.cat([posterior[:1], posterior]).log()}
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)

    @cached_property
    def table(self) -> list[float]:
        """``abar`` for samplers, which need its values: a GPU is waited for once."""
        return self.abar.tolist()

    def forward(self, t: Tensor) -> Tensor:
        """int64 timesteps of any shape -> float32 abar of that shape."""
        return self.abar[t]

    def draw(
        self, sample_ids: Tensor, rng, last_share: float = 0.0, *, level: int = 0, only: int | None = None
    ) -> Tensor:  # fmt: skip
        """Timesteps (B,) int64 in [0, T), a pure function of (seed, sample, step).

        Uniform; a share ``last_share`` of them is T - 1 instead, where 1-step sampling looks (ours).
        level: another one gives an independent draw (a t per level); lockstep uses 0 for all.
        only: so many trailing timesteps alone, equally often, where a sampler of as many steps looks.
        """
        words = _philox.integers(sample_ids, 2 * level + 2, rng=rng, stream=_philox.TIMESTEP)
        if only is not None:
            number = (words[:, 2 * level] * only) >> 32
            return torch.round(self.timesteps - number.double() * (self.timesteps / only)).long() - 1
        last = words[:, 2 * level + 1] < int(last_share * 2**32)
        return torch.where(last, self.timesteps - 1, (words[:, 2 * level] * self.timesteps) >> 32)


def noised(y: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """y_t = sqrt(abar) y + sqrt(1 - abar) eps (Eq. 2-3). y, eps (B, C, H, W); abar (B,)."""
    return merge_state(y, eps, None, abar)


def x0_from_eps(y_t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """x0 = (y_t - sqrt(1 - abar) eps) / sqrt(abar)."""
    return (y_t - per_sample((1 - abar).sqrt()) * eps) / per_sample(abar.sqrt())


def eps_from_x0(y_t: Tensor, x0: Tensor, abar: Tensor) -> Tensor:
    """eps = (y_t - sqrt(abar) x0) / sqrt(1 - abar)."""
    return (y_t - per_sample(abar.sqrt()) * x0) / per_sample((1 - abar).sqrt())


def velocity(y: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """v = sqrt(abar) eps - sqrt(1 - abar) y (Salimans & Ho 2022)."""
    return per_sample(abar.sqrt()) * eps - per_sample((1 - abar).sqrt()) * y


def x0_from_v(y_t: Tensor, v: Tensor, abar: Tensor) -> Tensor:
    """x0 = sqrt(abar) y_t - sqrt(1 - abar) v."""
    return per_sample(abar.sqrt()) * y_t - per_sample((1 - abar).sqrt()) * v


def to_x0(kind: str, out: Tensor, y_t: Tensor, abar: Tensor) -> Tensor:
    """The x0 estimate in a prediction of kind "x0", "v" or "eps"."""
    if kind == "x0":
        return out
    return (x0_from_v if kind == "v" else x0_from_eps)(y_t, out, abar)


def truth(kind: str, y: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """What a prediction of that kind should be."""
    return {"x0": y, "eps": eps}[kind] if kind != "v" else velocity(y, eps, abar)


def snr_weight(kind: str, abar: Tensor, gamma: float) -> Tensor:
    """Min-SNR weights (B,) (Hang et al. 2023): min(SNR, gamma) on x0, over SNR on eps, over SNR + 1 on v.

    SNR = abar / (1 - abar). All three weigh the same error in x0 alike.
    """
    snr = abar / (1 - abar)
    clipped = snr.clamp_max(gamma)
    return {"x0": clipped, "eps": clipped / snr, "v": clipped / (snr + 1)}[kind]


class Reverse(NamedTuple):
    """q(y_s | y_t, x0) for s < t (Eq. 4): mean = on_x0 x0 + on_y y_t, log variances of both extremes.

    Tensors of one shape, or floats. ``log_beta``: of beta, the upper bound of the reverse variance,
    ``log_posterior``: of beta tilde, the lower one (Ho et al. 2020; Nichol & Dhariwal 2021 Eq. 14).
    """

    on_x0: Tensor | float
    on_y: Tensor | float
    log_beta: Tensor | float
    log_posterior: Tensor | float


def reverse(abar_t: float, abar_s: float) -> Reverse:
    """The reverse step from t to any earlier s, 0 < abar_t < abar_s < 1; neighbours or strided."""
    beta = 1 - abar_t / abar_s
    posterior = beta * (1 - abar_s) / (1 - abar_t)
    return Reverse(
        abar_s**0.5 * beta / (1 - abar_t),
        (1 - beta) ** 0.5 * (1 - abar_s) / (1 - abar_t),
        math.log(beta),
        math.log(posterior),
    )


def log_variance(fraction: Tensor, step: Reverse) -> Tensor:
    """exp(v log beta + (1 - v) log beta tilde), its logarithm (Nichol & Dhariwal 2021 Eq. 15).

    fraction (B, C, H, W): the network's output in which -1 is beta tilde and 1 is beta.
    """
    v = (fraction + 1) / 2
    return v * step.log_beta + (1 - v) * step.log_posterior
