"""Samplers: one function each, over a denoiser of all levels in lockstep, or of one level of a cascade.

A denoiser is ``denoise(states, t) -> (x0, fraction)``: lists over levels (fine to coarse) of
(B, C, H_n, W_n), t an int timestep that these levels share; ``fraction`` is None unless the variance is
learned. As s_t - (1 - sqrt(abar)) up(Yhat) = y_t, every ordinary sampler runs on y_t; the denoiser adds
the coarse part itself.

All take (denoise, noise, abar, steps, *, progress=None) and return x0 a level:

    noise : a list over levels of (B, C, H_n, W_n) standard normals, y at the first timestep
    abar  : (T,) cumulative alphas, a tensor or (no GPU is waited for) a list of floats
    steps : how many timesteps, evenly spaced (``trailing_timesteps``), or the timesteps, falling
    progress : ``progress(i)`` is called after each step

Symbols: y = alpha x0 + sigma eps with alpha = sqrt(abar), sigma = sqrt(1 - abar); lambda = log(alpha / sigma). The
last step of each goes to sigma = 0 and is the estimate itself. All but ``ddpm`` are deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .diffusion import log_variance, reverse, trailing_timesteps

Denoiser = Callable[[list[Tensor], int], tuple[list[Tensor], list[Tensor] | None]]


class Point(NamedTuple):
    """Where on the way a sampler is."""

    t: int
    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """lambda, half the logarithm of the signal-to-noise ratio."""
        return math.log(self.alpha / self.sigma)


def points(abar: Tensor | Sequence[float], steps: int | Sequence[int]) -> list[Point]:
    """Raises ValueError if the timesteps are not falling inside [0, T), or more than T."""
    table = abar.tolist() if isinstance(abar, Tensor) else abar
    times = trailing_timesteps(len(table), steps) if isinstance(steps, int) else list(steps)
    falling = all(a > b for a, b in pairwise(times))
    if not (times and falling and times[-1] >= 0 and times[0] < len(table)):
        raise ValueError(f"timesteps must fall, inside [0, {len(table)}); got {times}")
    return [Point(t, table[t] ** 0.5, (1 - table[t]) ** 0.5) for t in times]


def blend(*weighted: tuple[float, list[Tensor]]) -> list[Tensor]:
    """sum of weight x image, level by level."""
    weights = [weight for weight, _ in weighted]
    made = []
    for images in zip(*(levels for _, levels in weighted), strict=True):
        total = weights[0] * images[0]
        for weight, image in zip(weights[1:], images[1:], strict=True):
            total = total.add(image, alpha=weight)
        made.append(total)
    return made


def _first_order(now: Point, then: Point, states: list[Tensor], x0: list[Tensor]) -> list[Tensor]:
    """y' = alpha' x0 + sigma' eps with eps = (y - alpha x0) / sigma."""
    ratio = then.sigma / now.sigma
    return blend((ratio, states), (then.alpha - ratio * now.alpha, x0))


def one_step(denoise: Denoiser, noise: list[Tensor], abar: Tensor | Sequence[float]) -> list[Tensor]:
    """The x0 estimate at t = T - 1: any of them with one step."""
    return ddim(denoise, noise, abar, 1)


def ddim(denoise: Denoiser, noise, abar, steps, *, progress=None) -> list[Tensor]:
    """Deterministic DDIM (Song et al. 2021, Eq. 12, eta = 0): first order."""
    way, states = points(abar, steps), noise
    for i, now in enumerate(way):
        x0, _ = denoise(states, now.t)
        if i + 1 < len(way):
            states = _first_order(now, way[i + 1], states, x0)
        if progress is not None:
            progress(i)
    return x0


def dpm_solver(denoise: Denoiser, noise, abar, steps, *, progress=None) -> list[Tensor]:
    """DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++", Algorithm 2): second order from the estimate before."""
    way, states = points(abar, steps), noise
    before: tuple[Point, list[Tensor]] | None = None
    for i, now in enumerate(way):
        x0, _ = denoise(states, now.t)
        if i + 1 < len(way):
            then, ahead = way[i + 1], x0
            if before is not None:
                earlier, x0_earlier = before
                # The line through both estimates, over lambda, half-way to the next point.
                lean = 0.5 * (then.log_snr - now.log_snr) / (now.log_snr - earlier.log_snr)
                ahead = blend((1 + lean, x0), (-lean, x0_earlier))
            states, before = _first_order(now, then, states, ahead), (now, x0)
        if progress is not None:
            progress(i)
    return x0


def unipc(denoise: Denoiser, noise, abar, steps, *, progress=None) -> list[Tensor]:
    """UniPC-2 with B(h) = e^h - 1, on x0 (Zhao et al. 2023, Algorithms 1 and 2): second order, and a corrector.

    The estimate at a point also corrects the step that led there, for nothing; the next step starts from
    the corrected state.
    """
    way, states = points(abar, steps), noise
    old: list[tuple[Point, list[Tensor], list[Tensor]]] = []  # (point, state, x0), newest last
    for i, now in enumerate(way):
        x0, _ = denoise(states, now.t)
        if old:
            states = _unipc_corrected(old, now, x0)
        if i + 1 < len(way):
            then = way[i + 1]
            old = [*old[-1:], (now, states, x0)]
            states = _first_order(now, then, states, x0)
            if len(old) > 1:
                h = then.log_snr - now.log_snr
                slope = h / (old[0][0].log_snr - now.log_snr)  # of the difference of both estimates
                b = then.alpha * -math.expm1(-h)
                states = blend((1, states), (0.5 * b * slope, old[0][2]), (-0.5 * b * slope, x0))
        if progress is not None:
            progress(i)
    return x0


def _unipc_corrected(old: list, now: Point, x0: list[Tensor]) -> list[Tensor]:
    """The state at ``now``, stepped to from the newest of ``old``, given the estimate there (UniC, Eq. 5)."""
    start, states, x0_start = old[-1]
    h = now.log_snr - start.log_snr
    b = now.alpha * -math.expm1(-h)
    made = _first_order(start, now, states, x0_start)
    phi = -math.expm1(-h)
    first = (1 - phi / h) / phi  # sum over the nodes of a_m, then of a_m r_m (Theorem 3.1 in x0)
    if len(old) == 1:
        return blend((1, made), (0.5 * b, x0), (-0.5 * b, x0_start))
    second = 2 * (0.5 - (1 - phi / h) / h) / phi
    r = (old[0][0].log_snr - start.log_snr) / h
    of_old = (first - second) / (1 - r)
    of_new = first - of_old
    return blend((1, made), (b * of_new, x0), (b * of_old / r, old[0][2]), (-b * (of_new + of_old / r), x0_start))


def heun(denoise: Denoiser, noise, abar, steps, *, progress=None) -> list[Tensor]:
    """Heun's method on z = y / alpha over s = sigma / alpha (Karras et al. 2022, Algorithm 1 without churn).

    Second order by a second evaluation a step, but for the last: 2 n - 1 for n steps.
    """
    way, states = points(abar, steps), noise
    for i, now in enumerate(way):
        x0, _ = denoise(states, now.t)
        if i + 1 < len(way):
            then = way[i + 1]
            guess, _ = denoise(_first_order(now, then, states, x0), then.t)
            # z' = z + (s' - s) (d + d') / 2 with d = (z - x0) / s, d' = (z1 - x0') / s', z1 = x0 + s' d
            s, after = now.sigma / now.alpha, then.sigma / then.alpha
            half = 0.5 * (after - s)
            on_z = 1 + half * (1 / s + 1 / s)
            on_x0 = half * (-1 / s + 1 / after - 1 / s)
            states = blend((then.alpha * on_z / now.alpha, states), (then.alpha * on_x0, x0),
                           (-then.alpha * half / after, guess))  # fmt: skip
        if progress is not None:
            progress(i)
    return x0


def ddpm(denoise: Denoiser, noise, abar, steps, *, draw, progress=None) -> list[Tensor]:
    """Ancestral sampling (Ho et al. 2020, Algorithm 2), strided; PHMDiff Eq. 4.

    The variance of a step is beta tilde, or lies between beta tilde and beta as the denoiser's fraction
    says. ``draw(i)`` gives the noise of step i >= 1, a list like ``noise``; the last step adds none.
    """
    way, states = points(abar, steps), noise
    for i, now in enumerate(way):
        x0, fraction = denoise(states, now.t)
        if i + 1 < len(way):
            step = reverse(now.alpha**2, way[i + 1].alpha ** 2)
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


SAMPLERS: dict[str, Callable] = {"ddim": ddim, "dpm++": dpm_solver, "unipc": unipc, "heun": heun, "ddpm": ddpm}


def evaluations(sampler: str, steps: int) -> int:
    """How often the network is asked."""
    return 2 * steps - 1 if sampler == "heun" else steps


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
