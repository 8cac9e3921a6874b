"""Augmentation: what moves together, what is left alone, and batch independence."""

from __future__ import annotations

import torch

from phmdiff_fast.augment import augment
from phmdiff_fast.config import TrainConfig


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
