"""The pyramid and the merged state against values worked out by hand; the Haar transform's inverse."""

from __future__ import annotations

import pytest
import torch

from phmdiff_fast.haar import haar3d, inverse_haar3d
from phmdiff_fast.pyramid import build_pyramid, merge_state, upsample, upsample_add


def test_levels_are_block_means_and_edges_mean_over_what_exists():
    x = torch.tensor([[1.0, 3, 5], [7, 9, 11], [2, 4, 6]])[None, None]
    levels = build_pyramid(x, 3)
    assert levels[0] is x
    assert torch.equal(levels[1][0, 0], torch.tensor([[5.0, 8], [3, 6]]))
    assert torch.equal(levels[2][0, 0], torch.tensor([[5.5]]))


def test_odd_sides():
    shapes = [tuple(level.shape[2:]) for level in build_pyramid(torch.zeros(1, 1, 15, 240), 4)]
    assert shapes == [(15, 240), (8, 120), (4, 60), (2, 30)]


def test_bilinear_up_by_hand():
    up = upsample(torch.tensor([[0.0, 4.0]])[None, None], 2, 4)
    assert torch.equal(up[0, 0], torch.tensor([[0.0, 1, 3, 4], [0, 1, 3, 4]]))  # weights 3/4 and 1/4, edges held
    assert upsample(torch.zeros(1, 1, 8, 8), 15, 15).shape[2:] == (15, 15)


def test_merged_state_by_hand():
    y, eps = torch.full((2, 1, 2, 2), 2.0), torch.full((2, 1, 2, 2), 3.0)
    coarse = torch.tensor([[[[10.0]]], [[[20.0]]]])
    state = merge_state(y, eps, coarse, torch.tensor([0.64, 0.36]))
    # 0.8 * 2 + 0.6 * 3 + 0.2 * 10 = 5.4 and 0.6 * 2 + 0.8 * 3 + 0.4 * 20 = 11.6
    torch.testing.assert_close(state[:, 0, 0, 0], torch.tensor([5.4, 11.6]))
    bare = merge_state(y, eps, None, torch.tensor([0.64, 0.36]))  # 0 at the coarsest level
    torch.testing.assert_close(bare[:, 0, 0, 0], torch.tensor([3.4, 3.6]))


def test_sampler_merge_gives_the_same_state():
    g = torch.Generator().manual_seed(0)
    y, eps = torch.randn(2, 1, 6, 5, generator=g), torch.randn(2, 1, 6, 5, generator=g)
    coarse, abar = torch.randn(2, 1, 3, 3, generator=g), torch.tensor([0.5, 0.1])
    y_t = merge_state(y, eps, None, abar)
    torch.testing.assert_close(upsample_add(coarse, y_t, 1 - abar.sqrt()), merge_state(y, eps, coarse, abar))


@pytest.mark.parametrize("shape", [(4, 4, 4), (5, 6, 7), (1, 2, 3)])
def test_haar_is_orthonormal_and_its_inverse_exact(shape):
    x = torch.randn(2, 3, *shape, dtype=torch.float64)
    bands = haar3d(x)
    assert bands.shape == (2, 8, 3, *(-(-n // 2) for n in shape))
    assert float(bands.square().sum()) == pytest.approx(float(x.square().sum()))
    torch.testing.assert_close(inverse_haar3d(bands, shape=shape), x)


def test_haar_bands_by_hand():
    x = torch.arange(8.0).view(1, 1, 2, 2, 2)  # value 4 i + 2 j + k
    bands = haar3d(x)[0, :, 0, 0, 0, 0]
    # sums over / differences along the axes of the set bits, times 8^-1/2
    expected = torch.tensor([28.0, -4, -8, 0, -16, 0, 0, 0]) / 8**0.5
    torch.testing.assert_close(bands, expected, atol=1e-6, rtol=0)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="coarse"):
        merge_state(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 3, 2), torch.ones(1))
    with pytest.raises(ValueError, match="levels"):
        build_pyramid(torch.zeros(1, 1, 4, 4), 0)
    with pytest.raises(ValueError, match="eps"):
        merge_state(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 3), None, torch.ones(1))
    with pytest.raises(ValueError, match="8"):
        inverse_haar3d(torch.zeros(1, 7, 1, 2, 2, 2))
