"""The quality table's rivals: each learns, is what it says it is, and gets its whole share of the time."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.rivals import RIVALS, base, rival_predict, train_rival, training
from benchmarks.rivals.base import Rival, count
from phmdiff_fast import baselines
from phmdiff_fast.baselines import UNet, train_unet
from phmdiff_fast.config import DataConfig, TrainConfig
from phmdiff_fast.device import autocast
from phmdiff_fast.trainer import PASSES

CPU, F32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
SIZE, TRAINED_ON = 16, np.arange(40)
DATA = DataConfig(image_size=SIZE)
PLAIN = TrainConfig(batch_size=8, flip=False, gamma=0, scale=0)


class Fields:
    """A cache of made-up smooth slices; the target is the source blurred and turned over, so no constant will do."""

    def __init__(self, count: int = 60):
        nodes = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
        sources = F.interpolate(nodes, size=SIZE, mode="bicubic").clamp(-1, 1)
        target = -0.9 * F.avg_pool2d(sources, 5, stride=1, padding=2, count_include_pad=False)
        self.sources, self.target = sources.numpy(), target.numpy()

    def batch(self, rows, *, fine=False):
        return {"sources": self.sources[rows], "target": self.target[rows]}


def images(batch: int = 4, channels: int = 2, size: tuple[int, int] = (SIZE, SIZE)) -> tuple[torch.Tensor, ...]:
    """Sources (B, Cs, H, W) and target (B, 1, H, W) of noise."""
    drawn = torch.rand(batch, channels + 1, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return drawn[:, 1:], drawn[:, :1]


def randomised(rival: Rival) -> Rival:
    """Weights without zeros: a fresh DiT is shut (adaLN-Zero) and would hide every fault."""
    drawn = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in rival.parameters():
            p.add_(torch.randn(p.shape, generator=drawn) * 0.05)
    return rival


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def moved(module: nn.Module, before: dict[str, torch.Tensor]) -> list[bool]:
    return [not torch.equal(p, before[name]) for name, p in module.named_parameters()]


# --- every rival --------------------------------------------------------------------------------------

# Steps, and the error that may be left of the best constant's, on slices that were not trained on.
ENOUGH = {
    "unet_l1": (60, 0.3),
    "unet_mean": (60, 0.3),
    "pix2pix": (60, 0.3),
    "transunet": (60, 0.3),
    "mae": (150, 0.5),
    "latent": (240, 0.4),
}


@pytest.mark.parametrize("name", RIVALS)
def test_it_learns_what_holds_for_other_slices(name):
    fields, (steps, share) = Fields(), ENOUGH[name]
    torch.manual_seed(0)
    rival = RIVALS[name](1)
    trained = train_rival(rival, fields, TRAINED_ON, PLAIN, 0, CPU, F32, data=DATA, steps=steps)
    assert trained.steps == steps
    target = fields.target[40:, 0]
    made = rival_predict(rival, fields.sources[40:], CPU, F32, batch_size=7)
    assert made.shape == target.shape
    assert made.dtype == np.float32
    left = np.abs(made - target).mean() / np.abs(target - np.median(target)).mean()
    assert left < share


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", RIVALS)
def test_any_size_the_same_every_time_whatever_lies_beside_it(name, dtype):
    rival = randomised(RIVALS[name](2)).eval()
    sources, _ = images(3, size=(19, 30))
    with autocast(CPU, dtype):
        made = rival.translate(sources)
        torch.rand(5)  # the generator everything else draws from moves on
        again, alone, other = rival.translate(sources), rival.translate(sources[1:2]), rival.translate(-sources)
    assert made.shape == (3, 1, 19, 30)
    assert made.dtype == F32
    assert made.isfinite().all()
    assert torch.equal(made, again)
    spread = made.std()
    assert (made[1:2] - alone).abs().max() < (1e-3 if dtype == F32 else 0.2) * spread
    assert (made - other).abs().mean() > 0.01 * spread  # and it does look at the sources


@pytest.mark.parametrize("name", RIVALS)
def test_every_weight_is_trained_by_some_step_in_bf16(name):
    rival = RIVALS[name](2)
    rival.begin(TrainConfig(weight_decay=0.0))
    before = weights(rival)
    for step, share in enumerate([0.0] * 4 + [0.7] * 4):
        with autocast(CPU, BF16):
            rival.step(*images(), share, step)
    assert all(moved(rival, before))
    assert all(p.isfinite().all() for p in rival.parameters())


def test_an_update_is_seen_within_the_same_autocast():
    """A generator's loss asks the discriminator as it is after its step."""
    layer, x = nn.Linear(4, 4), torch.ones(2, 4)
    optimizer = base.adamw(layer, 0.1, (0.9, 0.99), 0.0)
    with torch.autocast("cpu", BF16):
        before = layer(x)
        base.update(optimizer, before.float().sum(), 0.1)
        after = layer(x)
    torch.testing.assert_close(before - after, torch.full((2, 4), 0.5, dtype=BF16), atol=0.05, rtol=0)


def test_what_counts_is_what_translates():
    generator = count(UNet(2))
    assert RIVALS["unet_l1"](2).parameter_count() == RIVALS["pix2pix"](2).parameter_count() == generator
    latent = RIVALS["latent"](2)
    assert latent.parameter_count() == count(latent.vae) + count(latent.denoiser)


def test_a_state_dict_brings_the_translation_along():
    """Of the one that has more to it than its trained weights: an average, and the latents' scale."""
    fields, rival = Fields(), RIVALS["latent"](1)
    train_rival(rival, fields, TRAINED_ON, PLAIN, 0, CPU, F32, data=DATA, steps=9)
    other = RIVALS["latent"](1)
    other.load_state_dict(rival.state_dict())
    made, expected = (rival_predict(x, fields.sources[:3], CPU, F32) for x in (other, rival))
    np.testing.assert_array_equal(made, expected)


# --- each by itself -----------------------------------------------------------------------------------


def test_unet_l1_is_the_packages_own_training():
    """The same weights, with augmentation, as train_unet where its clock gives as many steps."""
    fields, steps = Fields(), 6
    config = TrainConfig(batch_size=4, seed=3)
    clock = SimpleNamespace(monotonic=mock.Mock(side_effect=itertools.chain([0], itertools.count())))
    with mock.patch.object(baselines, "time", clock):
        expected, taken = train_unet(fields, TRAINED_ON, config, steps, CPU, F32, data=DATA)
    assert taken == steps
    torch.manual_seed(3)
    rival = RIVALS["unet_l1"](1)
    train_rival(rival, fields, TRAINED_ON, config, 0, CPU, F32, data=DATA, steps=steps)
    torch.testing.assert_close(rival.net.state_dict(), expected.state_dict())


def test_unets_that_are_averaged_have_their_parts_of_the_budget_one_after_the_other():
    rival, (sources, target) = RIVALS["unet_mean"](2), images()
    rival.plan(2.2 * PASSES)
    first, second = rival.nets
    assert not torch.equal(first.translate(sources), second.translate(sources))
    rival.begin(PLAIN)
    heard, usable = [], []
    for net in rival.nets:
        net.step = lambda sources, target, share, step, net=net: heard.append((net is second, share, step))
    for step in range(10):
        rival.step(sources, target, step / 10, step)
        usable.append(int(rival.usable))
    torch.testing.assert_close(rival.translate(sources), first.translate(sources))  # the second is not ready yet
    rival.end()
    assert [who for who, *_ in heard] == [False] * 5 + [True] * 5
    assert [at for *_, at in heard] == [*range(5)] * 2  # each with a warm-up of its own
    np.testing.assert_allclose([share for _, share, _ in heard], [0, 0.2, 0.4, 0.6, 0.8] * 2, atol=1e-9)
    assert usable == [1] * 10
    torch.testing.assert_close(rival.translate(sources), (first.translate(sources) + second.translate(sources)) / 2)


@pytest.mark.parametrize(("passes", "wanted"), [(0.1, 1), (1.4, 1), (1.6, 2), (3, 3), (1e6, 8)])
def test_how_many_unets_a_budget_has_room_for(passes, wanted):
    rival = RIVALS["unet_mean"](1)
    rival.plan(passes * PASSES)
    assert len(rival.nets) == wanted


def test_a_rival_that_plans_is_told_the_passes_before_it_is_trained():
    told = []

    class Planning(Counter):
        plans = True

        def plan(self, passes):
            told.append(passes)

    train(Planning(), steps=10)
    assert told == [10 * PLAIN.batch_size / len(TRAINED_ON)]
    now = [0.0]
    with mock.patch.object(training, "time", SimpleNamespace(monotonic=lambda: now[0])):
        trained = train(Planning(tick=lambda: now.__setitem__(0, now[0] + 2.0)), 20.0)
    assert told[1] == 10 * PLAIN.batch_size / len(TRAINED_ON)
    assert trained.steps == 10  # the trial's seconds are not the training's


def test_pix2pix_losses_reach_one_network_each():
    rival = RIVALS["pix2pix"](2)
    sources, target = images()

    def reached(module):
        return [p.grad is not None and bool(p.grad.any()) for p in module.parameters()]

    rival.discriminator_loss(sources, target, rival.generator(sources)).backward()
    assert all(reached(rival.discriminator))
    assert not any(reached(rival.generator))
    rival.zero_grad()
    made = rival.generator(sources)
    rival.generator_loss(sources, target, made).backward()
    assert all(reached(rival.generator))
    assert not any(reached(rival.discriminator))
    assert all(p.requires_grad for p in rival.discriminator.parameters())


def test_pix2pix_adversary_pulls_and_sees_the_sources():
    rival = RIVALS["pix2pix"](2)
    sources, target = images()
    made = target.clone().requires_grad_()  # no L1 is left: what pulls is the discriminator
    rival.generator_loss(sources, target, made + 0).backward()
    assert made.grad.abs().max() > 0
    assert not torch.equal(rival.discriminator(sources, target), rival.discriminator(-sources, target))


def test_pix2pix_discriminator_learns_to_tell():
    rival = RIVALS["pix2pix"](1)
    rival.begin(PLAIN)
    batch = Fields().batch(np.arange(8))
    sources, target = (torch.from_numpy(batch[name]) for name in ("sources", "target"))
    made = torch.zeros_like(target)
    first = rival.discriminator_loss(sources, target, made).item()
    for _ in range(15):
        base.update(rival.judging, rival.discriminator_loss(sources, target, made), 2e-4)
    assert rival.discriminator_loss(sources, target, made).item() < 0.7 * first
    assert first == pytest.approx(math.log(2), rel=0.2)


def test_latent_autoencoder_is_frozen_after_a_third_and_scaled():
    fields, rival = Fields(), RIVALS["latent"](1)
    rival.begin(PLAIN)
    batch = fields.batch(np.arange(8))
    sources, target = (torch.from_numpy(batch[name]) for name in ("sources", "target"))
    vae, denoiser = weights(rival.vae), weights(rival.denoiser)
    for step in range(3):
        rival.step(sources, target, 0.2, step)
    assert all(moved(rival.vae, vae))
    assert not any(moved(rival.denoiser, denoiser))
    vae = weights(rival.vae)
    for step in range(3, 6):
        rival.step(sources, target, 0.34 + 0.01 * step, step)
    assert not any(moved(rival.vae, vae))
    assert any(moved(rival.denoiser, denoiser))
    z = rival.latents(target)
    assert z.shape == (8, 4, 4, 4)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)


def test_latent_scale_is_measured_once_and_undone_after_sampling():
    rival = RIVALS["latent"](1)
    rival.begin(PLAIN)
    sources, target = images(channels=1)
    rival.step(sources, target, 0.5, 0)
    shift = rival.shift.clone()
    rival.step(sources, 0.1 * target, 0.6, 1)
    assert torch.equal(rival.shift, shift)
    with mock.patch.object(rival, "x0", return_value=rival.latents(target)):  # a perfect denoiser
        made = rival.translate(sources)
    torch.testing.assert_close(made, rival.vae.decode(rival.vae.encode(target)[0]), atol=1e-5, rtol=1e-5)


def test_latent_samples_its_average_from_the_last_timestep_on():
    rival = randomised(RIVALS["latent"](1))
    sources, _ = images(2, 1)
    told = []
    original = rival.x0

    def listening(net, y, given, t):
        told.append((net is rival.average, t.tolist()))
        return original(net, y, given, t)

    with mock.patch.object(rival, "x0", listening):
        one = rival.translate(sources)
        rival.sampling_steps = 4
        four = rival.translate(sources)
    assert told == [(True, [t, t]) for t in (999, 999, 749, 499, 249)]
    assert not torch.allclose(one, four)


def test_latent_timesteps_are_mostly_the_last():
    rival = RIVALS["latent"](1)
    sources, target = images(400, 1, (8, 8))
    with mock.patch.object(rival, "x0", side_effect=lambda net, y, given, t: y) as x0:
        rival.denoising_loss(sources, target)
    t = x0.call_args.args[3]
    assert 0.7 < (t == 999).float().mean() < 0.9
    assert 300 < t[t < 999].float().mean() < 700
    assert x0.call_args.args[0] is rival.denoiser


def test_mae_encoder_knows_nothing_of_masked_patches():
    net = randomised(RIVALS["mae"](2)).net
    sources, _ = images(size=(32, 32))  # 4 x 4 patches
    keep = torch.rand(4, 16).argsort(1)[:, :4]
    hidden = torch.ones(4, 16).scatter(1, keep, 0.0).view(4, 1, 4, 4)
    hidden = F.interpolate(hidden, scale_factor=8) > 0
    x = net.encode(sources, keep)
    assert x.shape == (4, 4, 192)
    assert torch.equal(x, net.encode(torch.where(hidden, 5.0, sources), keep))
    assert not torch.allclose(x, net.encode(torch.where(hidden, sources, -sources), keep))


def test_mae_puts_visible_tokens_where_they_came_from():
    """With all patches kept, in any order, the image is that of no mask."""
    net = randomised(RIVALS["mae"](2)).net
    sources, _ = images(size=(24, 32))
    keep = torch.rand(4, 12).argsort(1)
    torch.testing.assert_close(net(sources, keep), net(sources), atol=1e-4, rtol=1e-4)


def test_mae_is_masked_in_training_for_its_first_60_percent():
    rival = RIVALS["mae"](1)
    rival.begin(PLAIN)
    sources, target = images(2, 1, (32, 32))
    kept = []
    with mock.patch.object(rival.net, "encode", side_effect=rival.net.encode) as encode:
        for step, share in enumerate([0.0, 0.59, 0.6, 0.99]):
            rival.step(sources, target, share, step)
        rival.translate(sources)
    kept = [call.args[1] for call in encode.call_args_list]
    assert [None if keep is None else keep.shape for keep in kept] == [(2, 4), (2, 4), None, None, None]
    assert not torch.equal(kept[0], kept[1])
    assert all(len(set(row)) == 4 for row in kept[0].tolist())


# --- training -----------------------------------------------------------------------------------------


class Counter(Rival):
    """Counts its steps in its only weight; ``tick`` is called in each."""

    def __init__(self, tick=lambda: None):
        super().__init__()
        self.weight, self.tick = nn.Parameter(torch.zeros(())), tick

    def begin(self, config):
        self.heard = []

    def step(self, sources, target, share, step):
        assert self.training
        self.heard.append((step, share))
        with torch.no_grad():
            self.weight += 1
        self.tick()

    def translate(self, sources):
        return self.weight + 0 * sources[:, :1]


def train(rival, seconds=0.0, **more):
    return train_rival(rival, Fields(), TRAINED_ON, PLAIN, seconds, CPU, F32, data=DATA, **more)


def test_steps_are_exact_and_shares_rise_evenly():
    rival, heard = Counter(), []
    trained = train(rival, steps=8, progress=heard.append)
    assert rival.heard == [(n, n / 8) for n in range(8)]
    assert heard == [n / 8 for n in range(1, 9)]
    assert (trained.steps, trained.best, trained.best_step, trained.best_state) == (8, None, None, None)
    assert not rival.training


def test_the_best_look_is_kept():
    rival, seen = Counter(), []
    figures = iter([1.0, 5.0, math.nan, 5.0, 2.0])

    def look(looked_at):
        assert not looked_at.training
        seen.append(int(looked_at.weight))
        return next(figures)

    trained = train(rival, steps=10, look=look, looks=5)
    assert seen == [2, 4, 6, 8, 10]
    assert (trained.best, trained.best_step) == (5.0, 4)
    assert trained.best_state["weight"] == 4
    assert rival.weight == 10


def test_looks_do_not_cost_time():
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])

    def spend(seconds):
        now[0] += seconds
        return 1.0

    seen = []
    rival = Counter(tick=lambda: spend(1.0))
    with mock.patch.object(training, "time", clock):
        trained = train(rival, 10.0, look=lambda r: seen.append(int(r.weight)) or spend(100.0), looks=5)
    assert rival.heard == [(n, n / 10) for n in range(10)]
    assert seen == [2, 4, 6, 8, 10]
    assert (trained.steps, trained.seconds) == (10, 10.0)


def test_a_long_step_ends_the_training_and_is_looked_at_once():
    now, seen = [0.0], []
    rival = Counter(tick=lambda: now.__setitem__(0, now[0] + 7.0))
    with mock.patch.object(training, "time", SimpleNamespace(monotonic=lambda: now[0])):
        trained = train(rival, 10.0, look=lambda r: seen.append(int(r.weight)) or 0.0, looks=10)
    assert (trained.steps, trained.seconds, seen) == (2, 14.0, [1, 2])


def test_no_time_is_an_error():
    for seconds, more in ((0.0, {}), (math.nan, {}), (1.0, {"steps": 0}), (1.0, {"steps": 3, "looks": 0})):
        with pytest.raises(ValueError):
            train(Counter(), seconds, **more)


def test_flops_are_those_of_three_forward_passes_but_the_images_gradient():
    rival = RIVALS["unet_l1"](1)
    with FlopCounterMode(display=False) as counter:
        rival.net(torch.zeros(1, 1, SIZE, SIZE))
    first = 2 * 9 * 1 * 32 * SIZE**2
    assert train(rival, steps=1).flops_step == 8 * (3 * counter.get_total_flops() - first)


def test_flops_of_both_kinds_of_steps_are_weighed_by_their_number():
    rival = RIVALS["mae"](1)
    masked, whole = training.step_flops(rival, PLAIN, 1, SIZE, CPU)
    assert masked < 0.6 * whole
    assert train(rival, steps=5).flops_step == pytest.approx(8 * (3 * masked + 2 * whole) / 5)
