"""Samplers: one function each, over a denoiser of all levels in lockstep, or of one level of a cascade.

A denoiser is ``denoise(states, t) -> (x0, fraction)``: lists over levels (fine to coarse) of
(B, C, H_n, W_n), t an int timestep that these levels share; ``fraction`` is None unless the variance is
learned. As s_t - (1 - sqrt(abar)) up(Yhat) = y_t, every ordinary sampler runs on y_t; the denoiser adds
the coarse part itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from .diffusion import log_variance, reverse

Denoiser = Callable[[list[Tensor], int], tuple[list[Tensor], list[Tensor] | None]]


def with_detail(image: Tensor, gain: float) -> Tensor:
    """image (B, C, H, W) in [-1, 1], with what a binomial mean over 3 x 3 takes from it times ``gain``; clamped.

    An x0 estimate is a mean over images that could be, and a mean of several estimates more so: it has less detail
    than any of them. A gain adds nothing that is not there; it shifts the balance between error and blur. Ours.
    """
    if gain == 1:
        return image
    blurred = F.pad(image, (1, 1, 1, 1), mode="replicate")
    for axis in (2, 3):
        size = blurred.shape[axis] - 2
        before, here, after = (blurred.narrow(axis, i, size) for i in range(3))
        blurred = 0.25 * (before + after) + 0.5 * here
    return (gain * image + (1 - gain) * blurred).clamp(-1, 1)


def trailing_timesteps(total: int, steps: int) -> list[int]:
    """``steps`` timesteps from ``total`` - 1 down, evenly spaced, the last gap ending before 0."""
    if not 1 <= steps <= total:
        raise ValueError(f"need 1 <= steps <= {total}, got {steps}")
    return [round(total - i * total / steps) - 1 for i in range(steps)]


def one_step(denoise: Denoiser, noise: list[Tensor], abar: Tensor) -> list[Tensor]:
    """The x0 estimate at t = T - 1: ``ddim`` with one step. abar (T,) float32."""
    return ddim(denoise, noise, abar, 1)


def ddim(denoise: Denoiser, noise: list[Tensor], abar: Tensor, steps: int, *, progress=None) -> list[Tensor]:
    """Deterministic DDIM (Song et al. 2021, Eq. 12, eta = 0).

    noise : a list over levels of (B, C, H_n, W_n) standard normals, y_T; abar : (T,) float32
    Returns x0 a level. ``progress(i)`` is called after each step.
    """
    timesteps = trailing_timesteps(len(abar), steps)
    states = noise
    x0 = noise
    for i, t in enumerate(timesteps):
        x0, _ = denoise(states, t)
        if i + 1 < steps:
            now, then = float(abar[t]), float(abar[timesteps[i + 1]])
            ratio = ((1 - then) / (1 - now)) ** 0.5
            # y' = sqrt(a') x0 + sqrt(1 - a') eps with eps = (y - sqrt(a) x0) / sqrt(1 - a)
            states = [ratio * y + (then**0.5 - ratio * now**0.5) * x for y, x in zip(states, x0, strict=True)]
        if progress is not None:
            progress(i)
    return x0


def ddpm(
    denoise: Denoiser, noise: list[Tensor], abar: Tensor, steps: int, *, draw, progress=None
) -> list[Tensor]:  # fmt: skip
    """Ancestral sampling (Ho et al. 2020, Algorithm 2), strided; PHMDiff Eq. 4.

    The variance of a step is beta tilde, or lies between beta tilde and beta as the denoiser's fraction
    says. ``draw(i)`` gives the noise of step i >= 1, a list like ``noise``; the last step adds none.
    Otherwise as ``ddim``.
    """
    timesteps = trailing_timesteps(len(abar), steps)
    states = noise
    x0 = noise
    for i, t in enumerate(timesteps):
        x0, fraction = denoise(states, t)
        if i + 1 < steps:
            step = reverse(float(abar[t]), float(abar[timesteps[i + 1]]))
            if fraction is None:
                deviations = [math.exp(0.5 * step.log_posterior)] * len(states)
            else:
                deviations = [(0.5 * log_variance(f, step)).exp() for f in fraction]
            states = [
                step.on_x0 * x + step.on_y * y + deviation * eps
                for x, y, deviation, eps in zip(x0, states, deviations, draw(i + 1), strict=True)
            ]
        if progress is not None:
            progress(i)
    return x0
