"""The variational bound, background patches, the paper's kernel."""

from __future__ import annotations

import math

import pytest
import torch
from skimage.metrics import structural_similarity
from torch.distributions import Normal, kl_divergence

from phmdiff_fast import losses
from phmdiff_fast.diffusion import Schedule, noised, reverse


def bound_inputs(t):
    schedule = Schedule()
    t = torch.tensor(t)
    y, eps, wrong, fraction = (torch.randn(len(t), 1, 4, 4) for _ in range(4))
    return schedule, t, y, noised(y, eps, schedule(t)), y + 0.1 * wrong, 0.3 * fraction


def test_variational_bound_is_the_kl_between_the_two_reverse_steps():
    schedule, t, y, y_t, x0, fraction = bound_inputs([1, 37, 500, 999])
    ours = losses.variational_bound(fraction, x0, y, y_t, t, schedule)
    abar = schedule.abar.double()
    for i, now in enumerate(t.tolist()):
        step = reverse(float(abar[now]), float(abar[now - 1]))
        true_mean = step.on_x0 * y[i] + step.on_y * y_t[i]
        model_mean = step.on_x0 * x0[i] + step.on_y * y_t[i]
        share = (fraction[i] + 1) / 2
        model_std = torch.exp(0.5 * (share * step.log_beta + (1 - share) * step.log_posterior))
        q = Normal(true_mean, torch.full_like(true_mean, math.exp(step.log_posterior / 2)))
        expected = kl_divergence(q, Normal(model_mean, model_std)).mean() / math.log(2)
        torch.testing.assert_close(ours[i], expected.float(), rtol=5e-3, atol=1e-5)


def test_variational_bound_at_the_first_step_is_a_log_density():
    schedule, t, y, y_t, x0, fraction = bound_inputs([0])
    ours = losses.variational_bound(fraction, x0, y, y_t, t, schedule)
    share = (fraction + 1) / 2
    std = torch.exp(0.5 * (share * schedule.log_beta[0] + (1 - share) * schedule.log_posterior[0]))
    torch.testing.assert_close(ours[0], -Normal(x0, std).log_prob(y).mean() / math.log(2), rtol=5e-3, atol=1e-4)


def test_variational_bound_trains_the_variance_alone_and_vanishes_at_the_truth():
    schedule, t, y, y_t, x0, fraction = bound_inputs([0, 400])
    x0.requires_grad_()
    fraction.requires_grad_()
    losses.variational_bound(fraction, x0, y, y_t, t, schedule).sum().backward()
    assert x0.grad is None
    assert (fraction.grad != 0).all()
    exact = losses.variational_bound(-torch.ones_like(y), y, y, y_t, torch.tensor([2, 400]), schedule)
    torch.testing.assert_close(exact, torch.zeros(2), atol=1e-5, rtol=0)


def test_background_patches_hold_no_foreground_pixel():
    foreground = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    foreground[0, 0, 3, 4] = True  # last row of the first row of patches, first column of the second
    foreground[1, 0, 4:, :4] = True
    assert losses.background_patches(foreground, 4).tolist() == [[True, False, True, True], [True, True, False, True]]


def test_the_papers_kernel():
    """exp(-|a - b|^2 / d^2) alone, d values a vector."""
    eps, eps_hat = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    x, y = (e.unfold(2, 4, 4).unfold(3, 4, 4).reshape(8, 16).double() for e in (eps_hat, eps))

    def kernel(a, b):
        return torch.exp(-torch.cdist(a, b).square() / 16**2).mean()

    ours = losses.cross_granularity(eps, eps_hat, 4, 100, torch.arange(2), 0, (0, 0), "paper")
    expected = kernel(x, x) - 2 * kernel(x, y) + kernel(y, y)
    torch.testing.assert_close(ours.double(), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("size", [(11, 11), (24, 17)])
def test_similarity_is_scikit_image_s_and_has_a_gradient(size):
    torch.manual_seed(0)
    y = torch.rand(3, 1, *size) * 2 - 1
    x = (y + 0.3 * torch.randn_like(y)).requires_grad_()
    found = losses.similarity(x, y)
    how = dict(data_range=2.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    for i in range(3):
        a, b = x[i, 0].detach().double().numpy(), y[i, 0].double().numpy()
        assert abs(float(found[i].detach()) - structural_similarity(a, b, **how)) < 2e-5
    found.sum().backward()
    with torch.no_grad():
        assert (losses.similarity(x + 0.01 * x.grad / x.grad.abs().max(), y) > found).all()


def test_similarity_keeps_float32_under_autocast_and_is_1_for_the_same_image():
    y = 0.9 + 0.002 * torch.randn(2, 1, 16, 16)  # bright and nearly flat: in bf16 its variance is rounding
    x = y + 0.001 * torch.randn_like(y)
    exact = losses.similarity(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(losses.similarity(x, y), exact)
    torch.testing.assert_close(losses.similarity(y, y), torch.ones(2))
