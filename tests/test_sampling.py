"""Samplers against exact solutions (a Gaussian's) and against diffusers' schedulers, step for step."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phmdiff_fast.cli import cli
from phmdiff_fast.config import SampleConfig
from phmdiff_fast.diffusion import Schedule
from phmdiff_fast.sampling import SAMPLERS, evaluations, points, trailing_timesteps

DETERMINISTIC = [name for name in SAMPLERS if name != "ddpm"]
ORDERS = {"ddim": 1, "dpm++": 2, "unipc": 2, "heun": 2}
MEAN, STD = 0.3, 0.5


@pytest.fixture(scope="module")
def abar() -> list[float]:
    return Schedule().abar.double().tolist()


def gaussian(abar, mean=MEAN, std=STD):
    """E[x0 | y] of data N(mean, std^2)."""

    def denoise(states, t):
        a = abar[t]
        gain = a**0.5 * std**2 / (a * std**2 + 1 - a)
        return [mean + gain * (y - a**0.5 * mean) for y in states], None

    return denoise


def mixture(abar):
    """E[x0 | y] of two equal Gaussians N(-0.6, 0.2^2) and N(0.5, 0.3^2): not linear in y."""

    def denoise(states, t):
        a, made = abar[t], []
        for y in states:
            weights, means = [], []
            for mean, std in ((-0.6, 0.2), (0.5, 0.3)):
                spread = a * std**2 + 1 - a
                weights.append(torch.exp(-((y - a**0.5 * mean) ** 2) / (2 * spread)) / spread**0.5)
                means.append(mean + a**0.5 * std**2 / spread * (y - a**0.5 * mean))
            made.append(sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights))
        return made, None

    return denoise


def noise(seed=0, levels=2):
    drawn = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 1, 16 >> n, 16 >> n, generator=drawn, dtype=torch.float64) for n in range(levels)]


def exact(abar, y):
    """The flow's end from y at T - 1 for ``gaussian``, whose ODE keeps (y - alpha m) / sqrt(alpha^2 s^2 + sigma^2);
    then the estimate at t = 0, the last timestep of all: what every sampler ends with."""
    last, first = abar[-1], abar[0]

    def spread(a):
        return (a * STD**2 + 1 - a) ** 0.5

    at_zero = first**0.5 * MEAN + (y - last**0.5 * MEAN) * spread(first) / spread(last)
    return MEAN + first**0.5 * STD**2 / spread(first) ** 2 * (at_zero - first**0.5 * MEAN)


def every(abar, number):
    """``number`` timesteps from T - 1 to 0, evenly spaced in lambda as far as whole timesteps allow."""
    lam = [0.5 * math.log(a / (1 - a)) for a in abar]
    wanted = [lam[-1] + (lam[0] - lam[-1]) * i / (number - 1) for i in range(number)]
    times = sorted({min(range(len(lam)), key=lambda t: abs(lam[t] - w)) for w in wanted}, reverse=True)
    return times


def test_settings_and_command_line_know_every_sampler():
    assert get_args(SampleConfig.model_fields["sampler"].annotation) == tuple(SAMPLERS)
    assert [o.type.choices for o in cli.commands["sample"].params if o.name == "sampler"] == [tuple(SAMPLERS)]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_error_falls_with_the_order(name, abar):
    y = noise()
    errors = []
    for number in (20, 40, 80):
        made = SAMPLERS[name](gaussian(abar), y, abar, every(abar, number))
        errors.append(max(float((m - exact(abar, start)).abs().max()) for m, start in zip(made, y, strict=True)))
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) > ORDERS[name] - 0.35, errors
    assert errors[-1] < {1: 0.06, 2: 5e-3}[ORDERS[name]]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_mixture_is_carried_to_the_same_end(name, abar):
    """Many steps of each against very many of DDIM."""
    y = noise(1)
    limit = SAMPLERS["ddim"](mixture(abar), y, abar, 1000)
    made = SAMPLERS[name](mixture(abar), y, abar, 250)
    for a, b in zip(made, limit, strict=True):
        assert float((a - b).abs().mean()) < 5e-3


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_is_the_estimate_at_the_last_timestep(name, abar):
    y = noise()
    how = {"draw": lambda i: y} if name == "ddpm" else {}
    made = SAMPLERS[name](mixture(abar), y, abar, 1, **how)
    assert all(torch.equal(a, b) for a, b in zip(made, mixture(abar)(y, 999)[0], strict=True))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_network_is_asked_as_often_as_is_said(name, steps, abar):
    asked, told = [], []

    def denoise(states, t):
        asked.append(t)
        return gaussian(abar)(states, t)

    how = {"draw": lambda i: noise(i)} if name == "ddpm" else {}
    SAMPLERS[name](denoise, noise(), abar, steps, progress=told.append, **how)
    assert len(asked) == evaluations(name, steps)
    assert told == list(range(steps))
    assert sorted(set(asked), reverse=True) == trailing_timesteps(1000, steps)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_tensor_a_list_and_the_timesteps_themselves_are_alike(name):
    tensor, y = Schedule().abar, noise()
    how = {"draw": lambda i: noise(i)} if name == "ddpm" else {}
    first = SAMPLERS[name](gaussian(tensor.tolist()), y, tensor, 4, **how)
    second = SAMPLERS[name](gaussian(tensor.tolist()), y, tensor.tolist(), [999, 749, 499, 249], **how)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("steps", [[], [5, 5], [3, 7], [1000], [4, -1], 0, 1001])
def test_timesteps_that_do_not_fall_are_refused(steps, abar):
    with pytest.raises(ValueError, match="steps"):
        points(abar, steps)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(DETERMINISTIC), st.integers(1, 6), st.integers(0, 5))
def test_an_image_does_not_depend_on_its_batch(name, steps, seed):
    table = Schedule().abar.tolist()
    whole = noise(seed)
    made = SAMPLERS[name](mixture(table), whole, table, steps)
    alone = SAMPLERS[name](mixture(table), [level[1:] for level in whole], table, steps)
    assert all(torch.equal(a[1:], b) for a, b in zip(made, alone, strict=True))


# --- diffusers, step for step ---------------------------------------------------------------------


def oracle(name):
    diffusers = pytest.importorskip("diffusers")
    common = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
                  prediction_type="sample", timestep_spacing="trailing")  # fmt: skip
    if name == "ddim":
        return diffusers.DDIMScheduler(**common, clip_sample=False, set_alpha_to_one=True)
    if name == "dpm++":
        return diffusers.DPMSolverMultistepScheduler(**common, final_sigmas_type="zero")
    if name == "unipc":
        return diffusers.UniPCMultistepScheduler(**common, final_sigmas_type="zero")
    return diffusers.HeunDiscreteScheduler(**common)


@pytest.mark.parametrize("steps", [2, 3, 5, 16])
@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_diffusers_take_the_same_steps(name, steps):
    if name == "ddim" and 1000 % steps:
        steps = {3: 4, 16: 20}[steps]  # diffusers' gap is T // steps, ours T / steps: the same where that is whole
    table = Schedule().abar.double().tolist()
    scheduler, y = oracle(name), noise(2, levels=1)
    scheduler.set_timesteps(steps)
    denoise = mixture(table)
    state = y[0].clone()
    if name == "heun":  # it works on y / alpha
        state = state / table[-1] ** 0.5
    for t in scheduler.timesteps:
        given_ = scheduler.scale_model_input(state, t)
        estimate = denoise([given_], int(t))[0][0]
        state = scheduler.step(estimate, t, state).prev_sample
    made = SAMPLERS[name](denoise, y, table, steps)[0]
    torch.testing.assert_close(made, state.double(), rtol=1e-4, atol=1e-4)
