"""Augmentation: what moves together, what is left alone, sizes as asked for, and batch independence."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage, stats
from scipy.interpolate import BSpline

from phmdiff_fast import augment as module
from phmdiff_fast.augment import add_noise, augment, bias_field, manner, resample, sampling_grid, smooth_field
from phmdiff_fast.config import DataConfig, TrainConfig
from phmdiff_fast.kernels import _philox

OFF = {"flip": False, "gamma": 0, "scale": 0}
MOVED = {"rotate": 10, "zoom": 0.1, "shift": 0.05, "elastic": 0.02}
ALL = {**MOVED, "bias": 0.3, "noise": 0.05}


def some(b, c, h, w, seed=0):
    """Images (b, c, h, w) in [-1, 1], a third of it exact background."""
    image = torch.rand(b, c, h, w, generator=torch.Generator().manual_seed(seed)) * 3 - 1.5
    return image.clamp(-1, 1)


def batch(n=64):
    g = torch.Generator().manual_seed(0)
    return torch.rand(n, 2, 6, 4, generator=g) * 2 - 1, torch.rand(n, 1, 6, 4, generator=g) * 2 - 1


def test_off_means_untouched():
    s, t = batch()
    out = augment(s, t, torch.arange(64), (0, 0), TrainConfig(flip=False, gamma=0, scale=0))
    assert torch.equal(out[0], s)
    assert torch.equal(out[1], t)


def test_flips_are_left_right_and_common_to_source_and_target():
    s, t = batch()
    a, b = augment(s, t, torch.arange(64), (0, 0), TrainConfig(gamma=0, scale=0))
    flipped = 0
    for i in range(64):
        same, turned = torch.equal(a[i], s[i]), torch.equal(a[i], s[i].flip(1))
        assert same != turned
        assert torch.equal(b[i], t[i].flip(1) if turned else t[i])
        flipped += turned
    assert 16 < flipped < 48


def test_gamma_and_scale_change_sources_only_each_on_its_own():
    s, t = batch()
    config = TrainConfig(flip=False, gamma=0.5, scale=0.2)
    a, b = augment(s, t, torch.arange(64), (0, 0), config)
    assert torch.equal(b, t)
    assert float(a.min()) >= -1
    assert float(a.max()) <= 1
    unit, made = (s + 1) / 2, (a + 1) / 2
    inside = (made < 0.999) & (unit > 0.01)
    for i in range(4):
        fits = []
        for c in range(2):
            x, y = unit[i, c][inside[i, c]].log(), made[i, c][inside[i, c]].log()  # y = log scale + gamma x
            gamma = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
            scale = (y.mean() - gamma * x.mean()).exp()
            assert float((y - scale.log() - gamma * x).abs().max()) < 1e-3
            assert 0.6 < float(gamma) < 1.65
            assert 0.79 < float(scale) < 1.21
            fits.append(float(gamma))
        assert abs(fits[0] - fits[1]) > 1e-4


def test_a_sample_is_augmented_the_same_in_any_batch():
    s, t = batch()
    config, ids = TrainConfig(), torch.arange(100, 164)
    whole = augment(s, t, ids, (3, 9), config)
    some = augment(s[10:13], t[10:13], ids[10:13], (3, 9), config)
    for a, b in zip(some, whole, strict=True):
        assert torch.equal(a, b[10:13])
    assert not torch.equal(augment(s, t, ids, (3, 10), config)[0], whole[0])


def test_foreground_is_flipped_too_and_no_mirror_means_no_flip():
    s, t = batch()
    fg = t > 0
    _, b, moved = augment(s, t, torch.arange(64), (0, 0), TrainConfig(gamma=0, scale=0), foreground=fg)
    assert moved.dtype == torch.bool
    assert torch.equal(moved, b > 0)
    assert not torch.equal(moved, fg)
    kept = augment(s, t, torch.arange(64), (0, 0), TrainConfig(gamma=0, scale=0), foreground=fg, mirror=False)
    assert all(torch.equal(x, y) for x, y in zip(kept, (s, t, fg), strict=True))


def test_streams_drawn_together_are_those_drawn_alone():
    ids = torch.tensor([3, 2**40 + 1, 77])
    for draw in (_philox.uniforms, _philox.normals):
        together = module._several(draw, ids, 7, (5, 2**31), module.FLIP, module.LEVEL)
        assert list(together) == list(range(module.FLIP, module.LEVEL + 1))
        for stream, drawn in together.items():
            assert torch.equal(drawn, draw(ids, 7, rng=(5, 2**31), stream=stream))


# --- geometry


def turned(image, degrees, **more):
    """image (1, C, H, W) through sampling_grid and grid_sample; shift in pixels along H and W."""
    h, w = image.shape[2:]
    dh, dw = more.get("shift", (0, 0))
    grid = sampling_grid(
        h, w, torch.tensor([math.radians(degrees)]), torch.tensor([more.get("zoom", 1.0)]),
        torch.tensor([[dh / h, dw / w]]), more.get("bend"),
    )  # fmt: skip
    return resample(grid, image, image[:, :1], image[:, :1] > 0)


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_quarter_turns_are_rot90(k):
    x = some(1, 2, 8, 8)
    a, b, fg = turned(x, 90 * k)
    torch.testing.assert_close(a, torch.rot90(x, k, (2, 3)), rtol=0, atol=5e-6)
    torch.testing.assert_close(b, a[:, :1], rtol=0, atol=0)
    assert torch.equal(fg, torch.rot90(x[:, :1] > 0, k, (2, 3)))


@pytest.mark.parametrize(("dh", "dw"), [(2, 0), (0, -3), (-1, 4)])
def test_a_shift_by_whole_pixels_is_a_roll_and_brings_background_in(dh, dw):
    x = some(1, 1, 9, 12)
    a, _, fg = turned(x, 0, shift=(dh, dw))
    h, w = torch.arange(9)[:, None] - dh, torch.arange(12) - dw
    inside = ((h >= 0) & (h < 9) & (w >= 0) & (w < 12))[None, None]
    rolled = torch.where(inside, x.roll((dh, dw), (2, 3)), torch.tensor(-1.0))
    torch.testing.assert_close(a, rolled, rtol=0, atol=1e-5)
    assert torch.equal(fg, rolled > 0)


def test_the_grid_is_that_of_scipy_in_pixels(monkeypatch):
    """Turn, zoom, shift and warp at once, of an image with unequal sides, interpolated by scipy."""
    monkeypatch.setattr(module, "INTERPOLATION", "bilinear")  # scipy's cubic is a spline
    h, w, theta, zoom, shift = 10, 16, math.radians(25), 1.3, np.array([1.4, -2.3])
    x = some(1, 1, h, w)
    bend = torch.randn(1, 2, h, w, generator=torch.Generator().manual_seed(1)) * 0.03
    a, _, _ = turned(x, 25, zoom=zoom, shift=shift.tolist(), bend=bend)
    centre = (np.array([h, w]) - 1) / 2
    turn = np.array([[np.cos(theta), np.sin(theta)], [-np.sin(theta), np.cos(theta)]])  # of (row, column)
    rows, columns = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    at = np.stack([rows, columns], -1) - centre - shift
    at = at @ turn.T / zoom + centre + np.stack([bend[0, 1] * h, bend[0, 0] * w], -1)
    expected = ndimage.map_coordinates(x[0, 0].numpy() + 1, np.moveaxis(at, -1, 0), order=1, mode="grid-constant") - 1
    np.testing.assert_allclose(a[0, 0].numpy(), expected, rtol=0, atol=2e-5)


def test_no_warp_is_no_change():
    x = some(1, 2, 8, 8)
    a, _, _ = turned(x, 0, bend=smooth_field(torch.zeros(1, 2, 5, 5), 8, 8))
    torch.testing.assert_close(a, x, rtol=0, atol=1e-6)


def test_smooth_field_is_a_cubic_b_spline_with_one_variance():
    nodes = torch.randn(2, 3, 5, 5)
    made = smooth_field(nodes, 6, 9)

    def basis(size):
        at = (np.arange(size) + 0.5) / size * 4
        b = np.stack([BSpline.basis_element(np.arange(-2, 3) + k, extrapolate=False)(at) for k in range(5)], 1)
        b = np.nan_to_num(b)
        return b / np.sqrt((b**2).sum(1, keepdims=True))

    expected = np.einsum("hi,bkij,wj->bkhw", basis(6), nodes.numpy().astype(np.float64), basis(9))
    np.testing.assert_allclose(made.numpy(), expected, rtol=0, atol=5e-6)


def test_the_warp_has_the_deviation_asked_for_at_every_pixel(monkeypatch):
    """Read off images that are ramps, which bilinear interpolation leaves exact inside."""
    monkeypatch.setattr(module, "INTERPOLATION", "bilinear")
    n, asked = 2048, 0.02
    ramp = ((2 * torch.arange(10) + 1) / 10 - 1) / 2  # half a side is worth 1/2: a side is worth 1
    rows, columns = ramp[:, None].expand(10, 10), ramp[None].expand(10, 10)
    s = torch.stack([rows, columns])[None].expand(n, -1, -1, -1)
    config = TrainConfig(**OFF, elastic=asked)
    a, b = augment(s, s[:, :1], torch.arange(n), (0, 0), config)
    moved = (a - s)[:, :, 2:-2, 2:-2]  # (n, 2, 6, 6) sides
    assert float((moved.std(0) / asked - 1).abs().max()) < 0.08
    assert float(moved.mean(0).abs().max()) < 0.1 * asked
    assert float((moved[..., 1:] - moved[..., :-1]).std()) < 0.6 * asked  # 0.4 of a node's spacing apart
    assert abs(float(np.corrcoef(moved[:, 0, 0, 0], moved[:, 1, 0, 0])[0, 1])) < 0.08  # each axis on its own
    torch.testing.assert_close(b, a[:, :1], rtol=0, atol=0)


@pytest.mark.parametrize(("setting", "value"), [("rotate", 20.0), ("zoom", 0.2), ("shift", 0.1)])
def test_affine_draws_are_uniform_and_as_wide_as_asked(monkeypatch, setting, value):
    seen = []
    monkeypatch.setattr(module, "sampling_grid", lambda *a: seen.append(a) or sampling_grid(*a))
    x = some(512, 1, 8, 8)
    augment(x, x, torch.arange(512), (0, 0), TrainConfig(**OFF, **{setting: value}))
    _, _, angle, zoom, shift, bend = seen[0]
    drawn = {"rotate": torch.rad2deg(angle)[:, None], "zoom": zoom.log()[:, None], "shift": shift}
    assert bend is None
    for name, u in drawn.items():
        if name != setting:
            assert float(u.abs().max()) == 0
    for u in drawn[setting].T:
        assert stats.kstest(u.numpy() / value, "uniform", (-1, 2)).pvalue > 1e-3
    augment(x, x, torch.arange(512), (0, 0), TrainConfig(**OFF, rotate=20, zoom=0.2, shift=0.1))
    _, _, angle, zoom, shift, _ = seen[1]
    together = torch.corrcoef(torch.stack([angle, zoom.log(), *shift.T]))
    assert float((together - torch.eye(4)).abs().max()) < 0.2  # four draws, not one


@pytest.mark.parametrize("on", [*({k: v} for k, v in MOVED.items()), MOVED, {**MOVED, "flip": True}])
def test_geometry_is_one_for_source_target_and_foreground(on):
    x = some(6, 1, 16, 16)
    config = TrainConfig(**{**OFF, **on})
    a, b, fg = augment(torch.cat([x, x], 1), x, torch.arange(6), (0, 3), config, foreground=x > 2)
    assert torch.equal(a, torch.cat([b, b], 1))
    assert not fg.any()
    # The foreground is the rounded image of a mask moved like any image.
    mask = F.interpolate(some(6, 1, 4, 4), scale_factor=4) > 0
    image = mask.float() * 2 - 1
    _, b, fg = augment(image, image, torch.arange(6), (0, 3), config, foreground=mask)
    clear = b.abs() > 1e-5
    assert torch.equal(fg[clear], (b > 0)[clear])
    assert not torch.equal(fg, mask)


def test_finer_images_are_averaged_down_before_their_values_change():
    """Without geometry they give what their means give, also where a mean is clipped."""
    s, t = 1.2 * some(4, 2, 24, 24), 1.2 * some(4, 1, 24, 24, seed=1)
    s, t = (F.interpolate(image[..., ::3, ::3], scale_factor=3) + 0.1 * image for image in (s, t))
    inside = F.interpolate(some(4, 1, 8, 8), scale_factor=3) > 0
    config = TrainConfig(**{**OFF, "flip": True, "jitter": 2, "gamma": 0.4, "scale": 0.2, "bias": 0.3, "noise": 0.05})
    made = augment(s, t, torch.arange(4), (0, 3), config, foreground=inside, finer=3)
    means = [F.avg_pool2d(image, 3).clamp(-1, 1) for image in (s, t)]
    expected = augment(*means, torch.arange(4), (0, 3), config, foreground=inside[..., ::3, ::3])
    assert float((means[1].abs() == 1).float().mean()) > 0.01
    for a, b in zip(made, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_moving_finer_images_keeps_their_fine_structure():
    """Detail of 64 x 64 noise, averaged down from 128 x 128: moved before, or after that."""
    fine = some(16, 1, 128, 128)
    config = TrainConfig(**OFF, rotate=2.0, zoom=0.03, elastic=0.01, shift=0.005)
    plain = F.avg_pool2d(fine, 2)

    def detail(image):
        return float((image - F.avg_pool2d(image, 3, 1, 1))[..., 8:-8, 8:-8].square().mean())

    before, _ = augment(fine, fine, torch.arange(16), (0, 0), config, finer=2)
    after, _ = augment(plain, plain, torch.arange(16), (0, 0), config)
    assert before.shape == plain.shape
    assert detail(before) > 0.85 * detail(plain)
    assert detail(after) < 0.75 * detail(plain)
    # And it is the same movement: smooth images come out alike.
    smooth = F.interpolate(some(16, 1, 4, 4), size=128, mode="bicubic")
    before, _ = augment(smooth, smooth, torch.arange(16), (0, 0), config, finer=2)
    after, _ = augment(F.avg_pool2d(smooth, 2), smooth[..., ::2, ::2], torch.arange(16), (0, 0), config)
    assert float((before - after)[..., 8:-8, 8:-8].abs().max()) < 0.02


# --- what another scanner does to the sources


def test_bias_multiplies_sources_and_leaves_background_and_target():
    s, t = some(4, 2, 12, 12), some(4, 1, 12, 12, seed=1)
    s = torch.where(s > -1, s.clamp(-0.9, 0.2), s)  # of which 1.3 times is below 1
    a, b = augment(s, t, torch.arange(4), (0, 0), TrainConfig(**OFF, bias=0.25))
    assert torch.equal(b, t)
    assert torch.equal(a == -1, s == -1)
    ids = torch.arange(4)
    nodes = _philox.normals(ids, 32, rng=(0, 0), stream=module.BIAS).view(4, 2, 4, 4)
    field = smooth_field(nodes, 12, 12)
    field = torch.exp(0.25 * field / field.flatten(2).abs().max(2).values[:, :, None, None])
    torch.testing.assert_close((a + 1) / 2, (s + 1) / 2 * field, rtol=1e-5, atol=1e-6)
    assert torch.allclose(bias_field(nodes, 12, 12, 0.25).log().abs().amax((2, 3)), torch.tensor(0.25))


@pytest.mark.parametrize("signal", [0.02, 0.1, 0.5])
def test_noise_is_rician_on_mr_and_gaussian_on_hu(signal):
    sigma = 0.04
    s = torch.full((4, 2, 64, 64), 2 * signal - 1)
    s[:, :, :8] = -1
    made = add_noise(s, torch.full((4, 2, 1, 1), sigma), torch.arange(4), (0, 0), (False, True))
    assert torch.equal(made[:, :, :8], s[:, :, :8])
    unit = ((made + 1) / 2)[:, :, 8:].double().numpy()
    rice = stats.rice(signal / sigma, scale=sigma)
    assert stats.kstest(unit[:, 0].ravel(), rice.cdf).pvalue > 1e-3
    hu = unit[:, 1].ravel()
    drawn = _philox.normals(torch.arange(4), 2 * 2 * 64 * 64, rng=(0, 0), stream=module.NOISE).view(4, 2, 2, 64, 64)
    expected = (signal + sigma * drawn[:, 0, 1, 8:]).clamp(0, 1).ravel()
    np.testing.assert_allclose(hu, expected.numpy(), rtol=0, atol=1e-6)
    cut = stats.norm.cdf(-signal / sigma)
    assert abs((hu == 0).mean() - cut) < 4 * math.sqrt(cut * (1 - cut) / hu.size) + 1e-9
    above = hu[hu > 0]
    assert stats.kstest(above, stats.truncnorm(-signal / sigma, np.inf, signal, sigma).cdf).pvalue > 1e-3
    if signal == 0.5:
        assert abs(unit[:, 0].std() / sigma - 1) < 0.02
        assert abs(hu.std() / sigma - 1) < 0.02


def test_noise_levels_are_uniform_and_each_slice_has_its_own_noise():
    s, t = torch.zeros(128, 6, 16, 16), torch.zeros(128, 1, 16, 16)
    a, b = augment(s, t, torch.arange(128), (0, 0), TrainConfig(**OFF, noise=0.1), group=3)
    assert torch.equal(b, t)
    level = (a / 2).flatten(2).std(2)  # (128, 6); 256 pixels: known to 4 %
    one, other = level[:, :3], level[:, 3:]
    assert float((one / one.mean(1, keepdim=True) - 1).abs().max()) < 0.25
    assert float(np.corrcoef(one.mean(1), other.mean(1))[0, 1]) < 0.3
    assert stats.kstest(torch.cat([one, other]).mean(1).numpy() / 0.1, "uniform").pvalue > 1e-3
    noise = a[64:65].flatten(2)[0]
    assert float((torch.corrcoef(noise) - torch.eye(6)).abs().max()) < 0.3


def test_one_source_has_one_tone_over_its_slices():
    s = some(8, 1, 8, 8).expand(-1, 6, -1, -1)
    config = TrainConfig(flip=False, bias=0.3)
    a, _ = augment(s, s[:, :1], torch.arange(8), (0, 0), config, group=3)
    for source in (a[:, :3], a[:, 3:]):
        assert torch.equal(source, source[:, :1].expand(-1, 3, -1, -1))
    assert not torch.equal(a[:, 0], a[:, 3])
    alone, _ = augment(s[:, ::3], s[:, :1], torch.arange(8), (0, 0), config)
    assert torch.equal(alone, a[:, ::3])  # context slices do not change what a source gets


def test_hu_keep_their_values():
    s, t = some(8, 4, 8, 8), some(8, 1, 8, 8)
    config, ids = TrainConfig(flip=False, bias=0.3), torch.arange(8)
    a, _ = augment(s, t, ids, (0, 0), config, group=2, physical=(True, True, False, False))
    plain, _ = augment(s, t, ids, (0, 0), config, group=2)
    assert torch.equal(a[:, :2], s[:, :2])
    assert torch.equal(a[:, 2:], plain[:, 2:])
    assert not torch.equal(plain[:, :2], s[:, :2])
    assert torch.equal(augment(s, t, ids, (0, 0), config, physical=(True,) * 4)[0], s)
    moved = augment(s, t, ids, (0, 0), TrainConfig(**{**OFF, **MOVED}), physical=(True,) * 4)[0]
    assert torch.equal(moved, augment(s, t, ids, (0, 0), TrainConfig(**{**OFF, **MOVED}))[0])
    assert not torch.equal(augment(s, t, ids, (0, 0), TrainConfig(**OFF, noise=0.1), physical=(True,) * 4)[0], s)


# --- all of it


def test_all_of_it_is_a_function_of_seed_sample_and_step():
    s, t, ids = some(9, 2, 16, 16), some(9, 1, 16, 16, seed=1), torch.arange(9) + 2**33
    config = TrainConfig(**ALL)

    def run(part=slice(None), rng=(3, 9)):
        return augment(s[part], t[part], ids[part], rng, config, foreground=t[part] > 0, physical=(True, False))

    whole = run()
    for image in whole[:2]:
        assert image.dtype == torch.float32
        assert float(image.abs().max()) <= 1
    for part in (slice(0, 1), slice(2, 7), slice(8, None)):
        for a, b in zip(run(part), whole, strict=True):
            assert torch.equal(a, b[part])
    for a, b in zip(run(rng=(torch.tensor(3), torch.tensor(9))), whole, strict=True):
        assert torch.equal(a, b)
    for rng in ((3, 10), (4, 9)):
        for a, b in zip(run(rng=rng)[:2], whole[:2], strict=True):
            assert not any(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_nothing_is_read_back_from_the_device():
    """Meta tensors have no values: .item(), nonzero and the like raise."""
    s, t = torch.empty(4, 2, 16, 16, device="meta"), torch.empty(4, 1, 16, 16, device="meta")
    ids = torch.empty(4, dtype=torch.int64, device="meta")
    out = augment(s, t, ids, (0, 5), TrainConfig(**ALL), foreground=t > 0, group=1, physical=(True, False))
    assert [tuple(x.shape) for x in out] == [(4, 2, 16, 16), (4, 1, 16, 16), (4, 1, 16, 16)]
    assert out[2].dtype == torch.bool


@pytest.mark.gpu
def test_a_gpu_makes_the_same_and_is_not_waited_for():
    s, t, ids = some(4, 2, 16, 16), some(4, 1, 16, 16, seed=1), torch.arange(4)
    config, more = TrainConfig(**ALL), {"physical": (True, False)}
    expected = augment(s, t, ids, (3, 9), config, foreground=t > 0, **more)
    on = [x.cuda() for x in (s, t, ids, t > 0)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = augment(*on[:3], (3, 9), config, foreground=on[3], **more)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(out[:2], expected[:2], strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=1e-4)
    assert float((out[2].cpu() != expected[2]).float().mean()) < 0.01


@pytest.mark.parametrize("more", [{"group": 2}, {"physical": (True,)}])
def test_channels_that_do_not_fit_are_refused(more):
    s, t = some(2, 3, 8, 8), some(2, 1, 8, 8)
    with pytest.raises(ValueError, match="3 source channels"):
        augment(s, t, torch.arange(2), (0, 0), TrainConfig(), **more)


def test_the_manner_follows_from_the_data():
    data = DataConfig(sources=["t1", "ct"], target="t2", context_slices=1, axis="sagittal")
    assert manner(data) == {"group": 3, "physical": (False,) * 3 + (True,) * 3, "mirror": False, "finer": 1}
    plain = DataConfig(oversample=3)
    assert manner(plain) == {"group": 1, "physical": (False,), "mirror": True, "finer": 3}


def test_jitter_moves_whole_pixels_and_everything_alike():
    images = some(6, 1, 8, 9) + 0.01 * torch.arange(72.0).view(1, 1, 8, 9)
    foreground = images > 0
    config = TrainConfig(**OFF, jitter=3)
    a, b, c = augment(images, images, torch.arange(6), (0, 4), config, foreground=foreground)
    assert torch.equal(a, b)
    offsets = set()
    for before, after, inside, was in zip(images[:, 0], a[:, 0], c[:, 0], foreground[:, 0], strict=True):
        fits = []
        for dy, dx in itertools.product(range(-3, 4), repeat=2):
            moved = torch.full_like(before, -1.0)
            to = slice(max(dy, 0), 8 + min(dy, 0)), slice(max(dx, 0), 9 + min(dx, 0))
            source = slice(max(-dy, 0), 8 + min(-dy, 0)), slice(max(-dx, 0), 9 + min(-dx, 0))
            moved[to] = before[source]
            if torch.equal(moved, after):
                fits.append((dy, dx))
                expected = torch.zeros_like(was)
                expected[to] = was[source]
                assert torch.equal(inside, expected)
        assert len(fits) == 1  # exactly one of the 49 moves, and nothing was interpolated
        offsets |= set(fits)
    assert len(offsets) > 3


def test_jitter_reaches_every_offset_alike():
    ids = torch.arange(4000)
    one = torch.zeros(4000, 1, 7, 7)
    one[:, :, 3, 3] = 1
    moved, _ = augment(one, one, ids, (1, 0), TrainConfig(**OFF, jitter=1))
    counts = moved[:, 0].sum(0)[2:5, 2:5] + 0  # -1 comes in at the edges, never in the middle
    assert counts.sum() == 4000
    assert stats.chisquare(counts.flatten().numpy()).pvalue > 1e-3


def test_tone_is_a_rising_curve_of_each_source_that_keeps_black_and_white():
    v = torch.linspace(0, 1, 61).expand(5, 2, 1, 61)
    a, b = augment(2 * v - 1, 2 * v[:, :1] - 1, torch.arange(5), (0, 0), TrainConfig(**OFF, tone=0.7))
    assert torch.equal(b, 2 * v[:, :1] - 1)
    curves = (a[:, :, 0] + 1) / 2  # (5, 2, 61)
    torch.testing.assert_close(curves[..., [0, -1]], v[:, :, 0, [0, -1]], rtol=0, atol=1e-6)
    assert (curves.diff(dim=-1) > 0).all()
    assert (curves.diff(n=2, dim=-1).abs() > 1e-4).sum() == 5 * 2 * 5  # straight but at five inner knots
    assert len(torch.unique(curves.flatten(0, 1), dim=0)) == 10  # a curve of its own for each


def test_tone_by_hand_and_shared_by_neighbouring_slices():
    slopes = torch.tensor([[[3.0, 1.0]]])  # half of the way up by 3/4
    v = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).view(1, 1, 1, 5)
    expected = torch.tensor([0.0, 0.375, 0.75, 0.875, 1.0])
    torch.testing.assert_close(module.through_curves(v, slopes).flatten(), expected)
    image = some(3, 1, 6, 6).expand(3, 4, 6, 6).contiguous()
    a, _ = augment(image, image[:, :1], torch.arange(3), (0, 0), TrainConfig(**OFF, tone=0.5), group=2)
    assert torch.equal(a[:, 0], a[:, 1])
    assert not torch.equal(a[:, 1], a[:, 2])
    physical, _ = augment(
        image, image[:, :1], torch.arange(3), (0, 0), TrainConfig(**OFF, tone=0.5), physical=(True,) * 4
    )
    assert torch.equal(physical, image)
