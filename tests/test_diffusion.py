"""Schedule, forward process, DDIM against the posterior of a Gaussian."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from phmdiff_fast.diffusion import (
    Schedule,
    eps_from_x0,
    log_variance,
    noised,
    reverse,
    snr_weight,
    to_x0,
    truth,
    velocity,
    x0_from_eps,
)
from phmdiff_fast.sampling import ddim, ddpm, one_step, trailing_timesteps, with_detail


def test_linear_schedule_of_the_paper():
    abar = Schedule().abar
    assert len(abar) == 1000
    assert float(abar[0]) == pytest.approx(1 - 1e-4, abs=1e-7)
    product = 1.0
    for s in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * s / 999)
    assert float(abar[999]) == pytest.approx(product, rel=1e-5)


def test_abar_survives_a_model_in_bf16():
    schedule = Schedule()
    assert schedule.abar.dtype == torch.float32
    assert 0.9998 < float(schedule(torch.tensor([0]))) < 1


def test_timesteps_are_uniform_with_a_share_at_the_end():
    schedule, samples = Schedule(), torch.arange(20000)
    t = schedule.draw(samples, (0, 0))
    assert int(t.min()) >= 0
    assert int(t.max()) <= 999
    assert abs(float(t.double().mean()) - 499.5) < 4 * 288.7 / 20000**0.5
    ends = schedule.draw(samples, (0, 0), 0.5) == 999
    assert abs(float(ends.double().mean()) - 0.5005) < 0.015
    assert (schedule.draw(samples, (0, 0), 1.0) == 999).all()
    assert torch.equal(schedule.draw(samples[100:110], (0, 0)), t[100:110])


def test_eps_and_x0_are_two_views_of_one_state():
    y, eps, abar = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.tensor([0.99, 0.5, 0.01])
    y_t = noised(y, eps, abar)
    torch.testing.assert_close(x0_from_eps(y_t, eps, abar), y, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(eps_from_x0(y_t, y, abar), eps, atol=1e-4, rtol=1e-4)


def test_trailing_timesteps():
    assert trailing_timesteps(1000, 1) == [999]
    assert trailing_timesteps(1000, 4) == [999, 749, 499, 249]
    assert trailing_timesteps(10, 10) == list(range(9, -1, -1))
    with pytest.raises(ValueError, match="steps"):
        trailing_timesteps(10, 11)


def gaussian_denoiser(abar, mean, std):
    """The exact posterior mean E[x0 | y_t] of data N(mean, std^2)."""

    def denoise(states, t):
        a = float(abar[t])
        gain = a**0.5 * std**2 / (a * std**2 + 1 - a)
        return [mean + gain * (y - a**0.5 * mean) for y in states], None

    return denoise


def test_ddim_carries_noise_to_the_data_distribution():
    """With the exact denoiser the ODE maps y_T to mean + std y_T (abar_T is nearly 0)."""
    abar = Schedule().abar
    noise = [torch.randn(1, 1, 32, 32).double(), torch.randn(1, 1, 16, 16).double()]
    made = ddim(gaussian_denoiser(abar, 0.3, 0.5), noise, abar, 500)
    for level, y in zip(made, noise, strict=True):
        torch.testing.assert_close(level, 0.3 + 0.5 * y, atol=0.02, rtol=0.02)
    errors = [
        float((ddim(gaussian_denoiser(abar, 0.3, 0.5), noise, abar, n)[0] - (0.3 + 0.5 * noise[0])).abs().max())
        for n in (5, 50, 500)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_detail_is_what_a_binomial_mean_takes_away():
    """Against scipy's correlation with (1 2 1) / 4 along both sides, edges repeated; smooth images stay as they are."""
    image = torch.rand(2, 1, 9, 12, generator=torch.Generator().manual_seed(0)) * 0.8 - 0.4
    kernel = np.outer([1, 2, 1], [1, 2, 1]) / 16
    blurred = torch.from_numpy(np.stack([ndimage.correlate(x, kernel, mode="nearest") for x in image[:, 0].numpy()]))
    made = with_detail(image, 1.4)
    torch.testing.assert_close(made, image + 0.4 * (image - blurred[:, None]))
    torch.testing.assert_close(with_detail(image, 0.5), (image + blurred[:, None]) / 2)
    assert torch.equal(with_detail(image, 1.0), image)
    torch.testing.assert_close(with_detail(torch.full((1, 1, 5, 5), 0.3), 2.0), torch.full((1, 1, 5, 5), 0.3))
    edge = torch.full((1, 1, 8, 8), -1.0)
    edge[..., 4:] = 1.0
    assert with_detail(edge, 1.9).abs().max() == 1  # nothing beyond the range


def test_one_step_is_the_estimate_at_the_last_timestep():
    abar = Schedule().abar
    noise = [torch.randn(1, 1, 8, 8)]
    denoise = gaussian_denoiser(abar, 0.3, 0.5)
    assert torch.equal(one_step(denoise, noise, abar)[0], denoise(noise, 999)[0][0])


def test_cosine_schedule():
    """abar(t) = f(t) / f(0), f = cos^2((t / T + 0.008) / 1.008 pi / 2), betas at most 0.999 (Eq. 17)."""
    abar = Schedule(kind="cosine").abar.double()

    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 1, 499, 998):
        assert float(abar[t]) == pytest.approx(f(t + 1) / f(0), rel=1e-5)
    assert float(abar[999] / abar[998]) == pytest.approx(0.001, rel=1e-3)


def test_velocity_is_the_derivative_along_the_angle():
    """With y_t = cos(a) y + sin(a) eps, v = d y_t / d a (Salimans & Ho 2022)."""
    y, eps = torch.randn(1, 1, 4, 4).double(), torch.randn(1, 1, 4, 4).double()
    angle, step = 0.7, 1e-6

    def state(a):
        return noised(y, eps, torch.tensor([math.cos(a) ** 2], dtype=torch.float64))

    slope = (state(angle + step) - state(angle - step)) / (2 * step)
    torch.testing.assert_close(velocity(y, eps, torch.tensor([math.cos(angle) ** 2]).double()), slope)


@pytest.mark.parametrize("kind", ["x0", "v", "eps"])
def test_every_prediction_leads_back_to_x0(kind):
    y, eps, abar = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.tensor([0.99, 0.5, 0.01])
    back = to_x0(kind, truth(kind, y, eps, abar), noised(y, eps, abar), abar)
    torch.testing.assert_close(back, y, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["x0", "v", "eps"])
def test_min_snr_weighs_every_prediction_by_the_same_error_in_x0(kind):
    """weight x |out - truth|^2 = min(SNR, gamma) |x0 - y|^2, whatever is predicted (Hang et al. 2023)."""
    abar = torch.tensor([0.99, 0.9, 0.5, 0.01], dtype=torch.float64)
    y, eps = (torch.randn(4, 1, 4, 4).double() for _ in range(2))
    out = truth(kind, y, eps, abar) + 0.1 * torch.randn(4, 1, 4, 4).double()
    x0 = to_x0(kind, out, noised(y, eps, abar), abar)
    weighted = snr_weight(kind, abar, 5.0) * (out - truth(kind, y, eps, abar)).square().mean((1, 2, 3))
    expected = torch.tensor([5.0, 5.0, 1.0, 0.01 / 0.99]).double() * (x0 - y).square().mean((1, 2, 3))
    torch.testing.assert_close(weighted, expected)


@pytest.mark.parametrize(("t", "s"), [(500, 499), (999, 749), (3, 0)])
def test_reverse_step_is_bayes(t, s):
    """q(y_s | y_t, x0) by conditioning the joint Gaussian of (y_s, y_t) given x0."""
    abar = Schedule().abar.double()
    a_t, a_s = float(abar[t]), float(abar[s])
    ratio = a_t / a_s
    variance_s, variance_t = 1 - a_s, 1 - a_t
    covariance = ratio**0.5 * variance_s
    x0, y_t = 0.3, -0.8
    mean = a_s**0.5 * x0 + covariance / variance_t * (y_t - a_t**0.5 * x0)
    variance = variance_s - covariance**2 / variance_t
    step = reverse(a_t, a_s)
    assert step.on_x0 * x0 + step.on_y * y_t == pytest.approx(mean, rel=1e-9)
    assert math.exp(step.log_posterior) == pytest.approx(variance, rel=1e-9)
    assert math.exp(step.log_beta) == pytest.approx(1 - ratio, rel=1e-9)
    schedule = Schedule()
    if t - s == 1:
        assert float(schedule.log_beta[t]) == pytest.approx(step.log_beta, abs=1e-4)
        assert float(schedule.log_posterior[t]) == pytest.approx(step.log_posterior, abs=1e-4)


def test_learned_variance_lies_between_its_bounds():
    """Eq. 15 of Nichol & Dhariwal: -1 is beta tilde, 1 is beta, the middle their geometric mean."""
    step = reverse(0.2, 0.4)
    low, middle, high = (math.exp(float(log_variance(torch.tensor(f), step))) for f in (-1.0, 0.0, 1.0))
    assert high == pytest.approx(0.5)
    assert low == pytest.approx(0.5 * 0.6 / 0.8)
    assert middle == pytest.approx((low * high) ** 0.5)


def test_ddpm_draws_from_the_data_distribution():
    abar = Schedule().abar
    generator = torch.Generator().manual_seed(3)

    def draw(_):
        return [torch.randn(1, 1, 128, 128, generator=generator).double()]

    made = ddpm(gaussian_denoiser(abar, 0.3, 0.5), draw(0), abar, 250, draw=draw)[0]
    assert float(made.mean()) == pytest.approx(0.3, abs=0.02)
    # The last step writes the posterior mean, without its noise: a little less spread than the data.
    assert float(made.std()) == pytest.approx(0.5, abs=0.03)


def test_ddpm_uses_the_learned_variance():
    """One strided step from t = 999 to 499: its spread is that of the fraction."""
    abar = Schedule().abar
    noise = torch.randn(1, 1, 256, 256, generator=torch.Generator().manual_seed(1))
    seen = []

    def denoise(fraction):
        def call(states, t):
            seen.append(states[0])
            return [torch.zeros_like(states[0])], None if fraction is None else [torch.full_like(states[0], fraction)]

        return call

    step = reverse(float(abar[999]), float(abar[499]))
    for fraction, log_var in ((None, step.log_posterior), (-1.0, step.log_posterior), (1.0, step.log_beta)):
        seen.clear()
        ddpm(denoise(fraction), [torch.zeros(1, 1, 256, 256)], abar, 2, draw=lambda i: [noise])
        assert float(seen[1].std()) == pytest.approx(math.exp(log_var / 2), rel=0.02)
