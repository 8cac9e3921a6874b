"""The losses: noise or x0 (PHMDiff Eq. 5), and the cross-granularity MMD between levels' noise (Eq. 6)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .diffusion import Reverse, Schedule, eps_from_x0, log_variance
from .kernels import _philox
from .kernels.mmd import mmd2
from .kernels.patch_mask import patch_rows
from .pyramid import per_sample

SSIM_SIDE, SSIM_SIGMA, DATA_RANGE = 11, 1.5, 2.0  # as in metrics.py: what is trained is what is scored
IMPLIED_NOISE_FLOOR = 0.01  # below this 1 - abar the noise implied by an x0 estimate blows up


def elementwise(prediction: Tensor, truth: Tensor, kind: str) -> Tensor:
    """|d|^2 ("l2") or |d| ("l1"), same shape as the inputs."""
    difference = prediction - truth
    return difference.square() if kind == "l2" else difference.abs()


def _window(side: int, device: torch.device) -> Tensor:
    """(side - 10, side): a product with it is a Gaussian mean over 11 of ``side`` values, where all 11 exist."""
    place = torch.arange(side, device=device)
    reach = place - place[: side - SSIM_SIDE + 1, None]  # made there, nothing is copied over
    weight = torch.exp(-0.5 * ((reach - SSIM_SIDE // 2) / SSIM_SIGMA) ** 2)
    weight = torch.where((reach >= 0) & (reach < SSIM_SIDE), weight, 0.0)
    return weight / weight.sum(1, keepdim=True)


def similarity(x: Tensor, y: Tensor) -> Tensor:
    """Mean SSIM of each image, (B,), in [-1, 1] (Wang et al. 2004): the figure of ``metrics``, with a gradient.

    x, y (B, C, H, W) in [-1, 1], H and W at least 11; Gaussian window 11 x 11, sigma 1.5, population covariance,
    positions whose window lies inside. The window is two products with banded matrices, in float32 also under
    autocast: a variance is a small difference of large numbers.
    """
    down, across = (_window(side, x.device) for side in x.shape[2:])
    with torch.autocast(x.device.type, enabled=False):
        x, y = x.float(), y.float()
        moments = torch.stack([x, y, x * x, y * y, x * y])  # (5, B, C, H, W)
        mean_x, mean_y, xx, yy, xy = (down @ moments @ across.T).unbind()
        c1, c2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2
        light = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
        covariance, both = xy - mean_x * mean_y, xx - mean_x.square() + yy - mean_y.square()
        return (light * (2 * covariance + c2) / (both + c2)).flatten(1).mean(1)


def visible_pixels(inverse: Tensor, patch: int, height: int, width: int) -> Tensor:
    """(B, N) inverse of ``draw_mask`` -> (B, 1, H, W) bool, True where the patch was kept."""
    grid = (inverse >= 0).view(-1, 1, height // patch, width // patch)
    return grid.repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def background_patches(foreground: Tensor, patch: int) -> Tensor:
    """(B, 1, H, W) bool -> (B, N) bool, True where a patch holds no foreground pixel."""
    batch, _, height, width = foreground.shape
    tiles = foreground.view(batch, height // patch, patch, width // patch, patch)
    return ~tiles.any(4).any(2).flatten(1)


def variational_bound(
    fraction: Tensor, x0: Tensor, y: Tensor, y_t: Tensor, t: Tensor, schedule: Schedule
) -> Tensor:  # fmt: skip
    """L_t of the variational bound, bits a pixel, (B,): trains the variance of Eq. 4 and nothing else.

    KL(q(y_{t-1} | y_t, y) || p(y_{t-1} | y_t)) for t > 0; at t = 0 the negative log density of y under p
    (ours: images here are continuous, so nothing is discretised). x0 is detached inside (Nichol &
    Dhariwal 2021, section 3.1). fraction, x0, y, y_t (B, C, H, W); t (B,) int64.
    """

    first = per_sample(t == 0)
    abar_t = per_sample(schedule.abar[t])
    abar_s = torch.where(first, 1.0, per_sample(schedule.abar[(t - 1).clamp_min(0)]))
    log_beta, log_posterior = per_sample(schedule.log_beta[t]), per_sample(schedule.log_posterior[t])
    on_x0 = abar_s.sqrt() * log_beta.exp() / (1 - abar_t)  # beta from its own table: 1 - abar_t / abar_s cancels
    log_q = torch.where(first, 0.0, log_posterior)
    log_p = log_variance(fraction, Reverse(on_x0, 0.0, log_beta, log_posterior))
    apart = (on_x0 * (x0.detach() - y)).square()  # the y_t parts of both means are the same
    divergence = 0.5 * (log_p - log_q + (log_q - log_p).exp() + apart * (-log_p).exp() - 1)
    density = 0.5 * (math.log(2 * math.pi) + log_p + apart * (-log_p).exp())
    return torch.where(first, density, divergence).flatten(1).mean(1) / math.log(2)


def implied_noise(y_t: Tensor, x0: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """The noise an x0 estimate implies; samples with 1 - abar < 0.01 get ``eps`` itself.

    Such rows then lie in both sets of the MMD and carry no gradient, and the shapes stay static.
    """
    high = per_sample(1 - abar >= IMPLIED_NOISE_FLOOR)
    safe = abar.clamp_max(1 - IMPLIED_NOISE_FLOOR)
    return torch.where(high, eps_from_x0(y_t, x0, safe), eps)


class _Total(torch.autograd.Function):
    """The sum over all processes, from which each computes the same loss.

    Its gradient by this process' summand is the sum's own; it is handed on ``world`` times because gradients are
    averaged over the processes afterwards, and the others' are those of their own summands.
    """

    @staticmethod
    def forward(ctx, x: Tensor, total: Callable[[Tensor], None], world: int) -> Tensor:
        ctx.world = world
        x = x.clone()
        total(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.world, None, None


@dataclass(frozen=True)
class Gather:
    """The patch vectors of all processes' images as one set, as one process with all images has them.

    sample_ids : (W, B) int64, the images of every process; rank : whose row is this process' own
    total : adds a tensor up over the processes, in place (``Together.total``)
    """

    sample_ids: Tensor
    rank: int
    total: Callable[[Tensor], None]

    @property
    def world(self) -> int:
        return len(self.sample_ids)

    def rows(self, own: Tensor, chosen: Tensor | None) -> Tensor:
        """own (n, d): rows of this process. Rows ``chosen`` (k,) of all W n, process by process, in that order:
        (k, d); None: all (W n, d). Every process puts in its own, and zeros elsewhere; nothing is waited for."""
        chosen = torch.arange(self.world * len(own), device=own.device) if chosen is None else chosen
        at = chosen - self.rank * len(own)
        is_own = (at >= 0) & (at < len(own))
        placed = torch.where(is_own[:, None], own[at.clamp(0, len(own) - 1)], 0.0)
        return _Total.apply(placed, self.total, self.world)


def cross_granularity(
    eps: Tensor, eps_hat: Tensor, patch: int, rows: int, sample_ids: Tensor, level: int, rng,
    kernel: str = "multiscale", gather: Gather | None = None,
) -> Tensor:  # fmt: skip
    """L_n = MMD^2 between noise drawn and noise predicted at level n (Eq. 6), a scalar.

    eps, eps_hat (B, C, H, W). The samples are patch vectors of d = C p p values, at most ``rows`` of
    them, those with the smallest Philox keys. kernel "paper": exp(-|a - b|^2 / d^2) alone.
    gather : of several processes, each with its own B images, which all compute the loss of all W B images;
    its gradient is meant to be averaged over the processes.
    """
    drawn, predicted = (patch_rows(x, patch, None).flatten(2).flatten(0, 1) for x in (eps, eps_hat))  # (B N, C p p)
    ids = sample_ids if gather is None else gather.sample_ids.flatten()
    per_sample_rows = len(drawn) // len(eps)
    chosen = None
    if per_sample_rows * len(ids) > rows:
        keys = _philox.integers(ids, per_sample_rows, rng=rng, stream=_philox.MMD_ROWS + level)
        chosen = keys.flatten().topk(rows, largest=False, sorted=False).indices
    if gather is not None:
        drawn, predicted = gather.rows(torch.cat([drawn, predicted], 1), chosen).chunk(2, 1)
    elif chosen is not None:
        drawn, predicted = drawn[chosen], predicted[chosen]
    return mmd2(predicted, drawn, [float(drawn.shape[1] ** 2)] if kernel == "paper" else None)
