"""Samplers: one function each, over a denoiser that serves all levels of the pyramid in lockstep.

A denoiser is ``denoise(states, t) -> x0``: lists over levels (fine to coarse) of (B, C, H_n, W_n), t
an int timestep that all levels share. As s_t - (1 - sqrt(abar)) up(Yhat) = y_t, every ordinary
sampler runs on y_t; the denoiser adds the coarse part itself.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Denoiser = Callable[[list[Tensor], int], list[Tensor]]


def trailing_timesteps(total: int, steps: int) -> list[int]:
    """``steps`` timesteps from ``total`` - 1 down, evenly spaced, the last gap ending before 0."""
    if not 1 <= steps <= total:
        raise ValueError(f"need 1 <= steps <= {total}, got {steps}")
    return [round(total - i * total / steps) - 1 for i in range(steps)]


def one_step(denoise: Denoiser, noise: list[Tensor], abar: Tensor) -> list[Tensor]:
    """The x0 estimate at t = T - 1: ``ddim`` with one step. abar (T,) float32."""
    return ddim(denoise, noise, abar, 1)


def ddim(denoise: Denoiser, noise: list[Tensor], abar: Tensor, steps: int, *, progress=None) -> list[Tensor]:
    """Deterministic DDIM (Song et al. 2021, Eq. 12, eta = 0) over all levels.

    noise : a list over levels of (B, C, H_n, W_n) standard normals, y_T; abar : (T,) float32
    Returns x0 a level. ``progress(i)`` is called after each step.
    """
    timesteps = trailing_timesteps(len(abar), steps)
    states = noise
    x0 = noise
    for i, t in enumerate(timesteps):
        x0 = denoise(states, t)
        if i + 1 < steps:
            now, then = float(abar[t]), float(abar[timesteps[i + 1]])
            ratio = ((1 - then) / (1 - now)) ** 0.5
            # y' = sqrt(a') x0 + sqrt(1 - a') eps with eps = (y - sqrt(a) x0) / sqrt(1 - a)
            states = [ratio * y + (then**0.5 - ratio * now**0.5) * x for y, x in zip(states, x0, strict=True)]
        if progress is not None:
            progress(i)
    return x0
