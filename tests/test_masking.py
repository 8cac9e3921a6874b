"""Mask ratios from complexity."""

from __future__ import annotations

import pytest
import torch

from phmdiff_fast.config import LevelSpec
from phmdiff_fast.masking import gradient_magnitude, level_complexity, mask_ratios, num_kept

LEVELS = [LevelSpec(mask_ratio=r) for r in (0.75, 0.5, 0.25)]


def test_ratios_by_hand():
    # mean c = 2: factors 1 - c / 2 = 0.5, 0, -0.5, times 0.2
    assert mask_ratios(LEVELS, [1.0, 2.0, 3.0], 0.2) == pytest.approx([0.85, 0.5, 0.15])


def test_ratios_are_clipped_and_zero_stays_zero():
    assert mask_ratios(LEVELS, [0.0, 1.0, 5.0], 2.0) == pytest.approx([0.9, 0.9, 0.1])
    assert mask_ratios([LevelSpec(mask_ratio=0.0)], [1.0], 0.2) == [0.0]
    assert mask_ratios(LEVELS, None, 0.2) == [0.75, 0.5, 0.25]


@pytest.mark.parametrize(("num", "ratio", "keep"), [(256, 0.75, 64), (16, 0.25, 12), (10, 0.99, 1), (7, 0.0, 7)])
def test_kept_patches(num, ratio, keep):
    assert num_kept(num, ratio) == keep


def test_gradient_magnitude_by_hand():
    x = torch.tensor([[0.0, 3.0], [4.0, 0.0]])[None, None]
    assert torch.equal(gradient_magnitude(x)[0, 0], torch.tensor([[5.0, 3.0], [4.0, 0.0]]))


def test_complexity_counts_the_foreground_only():
    image = torch.zeros(1, 1, 8, 8)
    image[..., 4:, :] = 2.0
    inside = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    inside[..., 3, :] = True  # the row whose forward difference is 2
    fine, coarse = level_complexity(image, inside, 2)
    assert fine == 2.0
    assert coarse == 2.0  # coarse rows 0,0,2,2: the step lies after row 1, which holds row 3
    assert level_complexity(image, ~inside, 1) == [0.0]
