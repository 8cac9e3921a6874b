"""Schedule, forward process, DDIM against the posterior of a Gaussian."""

from __future__ import annotations

import pytest
import torch

from phmdiff_fast.diffusion import Schedule, eps_from_x0, noised, x0_from_eps
from phmdiff_fast.sampling import ddim, one_step, trailing_timesteps


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
        return [mean + gain * (y - a**0.5 * mean) for y in states]

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


def test_one_step_is_the_estimate_at_the_last_timestep():
    abar = Schedule().abar
    noise = [torch.randn(1, 1, 8, 8)]
    denoise = gaussian_denoiser(abar, 0.3, 0.5)
    assert torch.equal(one_step(denoise, noise, abar)[0], denoise(noise, 999)[0])
