"""The pyramid and the merged state against values worked out by hand, in the reference and in the extension."""

from __future__ import annotations

import pytest
import torch

from phmdiff_fast.kernels import _extension
from phmdiff_fast.pyramid import build_pyramid, level_error, merge_state, upsample, upsample_add

BUILT = not _extension.problem()
pytestmark = pytest.mark.parametrize(
    "impl",
    ["reference",
     pytest.param("extension", marks=pytest.mark.skipif(not BUILT, reason=_extension.problem() or "it is there"))],
)  # fmt: skip


def test_levels_are_block_means_and_edges_mean_over_what_exists(impl):
    x = torch.tensor([[1.0, 3, 5], [7, 9, 11], [2, 4, 6]])[None, None]
    levels = build_pyramid(x, 3, impl=impl)
    assert levels[0] is x
    assert torch.equal(levels[1][0, 0], torch.tensor([[5.0, 8], [3, 6]]))
    assert torch.equal(levels[2][0, 0], torch.tensor([[5.5]]))


def test_a_level_s_gradient_is_shared_by_the_pixels_of_its_block(impl):
    x = torch.zeros(1, 1, 3, 3, requires_grad=True)
    level = build_pyramid(x, 2, impl=impl)[1]
    got = torch.autograd.grad(level, x, torch.tensor([[4.0, 8], [12, 5]])[None, None])[0]
    assert torch.equal(got[0, 0], torch.tensor([[1.0, 1, 4], [1, 1, 4], [6, 6, 5]]))


def test_one_level_is_the_image_itself(impl):
    x = torch.zeros(1, 1, 3, 3)
    levels = build_pyramid(x, 1, impl=impl)
    assert len(levels) == 1
    assert levels[0] is x


def test_odd_sides(impl):
    shapes = [tuple(level.shape[2:]) for level in build_pyramid(torch.zeros(1, 1, 15, 240), 4, impl=impl)]
    assert shapes == [(15, 240), (8, 120), (4, 60), (2, 30)]


@pytest.mark.parametrize(("alpha", "sides"), [(0.28, (7, 28)), (0.55, (14, 55)), (0.07, (2, 7)), (0.3, (8, 30))])
def test_sides_for_other_alphas_are_rounded_up_but_for_rounding_errors(impl, alpha, sides):
    # In float64 0.28 * 25, 0.55 * 100 and 0.07 * 100 are a little more than 7, 55 and 7.
    assert build_pyramid(torch.zeros(1, 1, 25, 100), 2, alpha=alpha, impl=impl)[1].shape[2:] == sides


def test_bilinear_up_by_hand(impl):
    up = upsample(torch.tensor([[0.0, 4.0]])[None, None], 2, 4, impl=impl)
    assert torch.equal(up[0, 0], torch.tensor([[0.0, 1, 3, 4], [0, 1, 3, 4]]))  # weights 3/4 and 1/4, edges held
    assert upsample(torch.zeros(1, 1, 8, 8), 15, 15, impl=impl).shape[2:] == (15, 15)


def test_the_gradient_of_up_by_hand(impl):
    coarse = torch.zeros(1, 1, 1, 2, requires_grad=True)
    grad = torch.tensor([[[[1.0, 10, 100]]]])  # up is [a, 3/4 a + 1/4 b, 1/4 a + 3/4 b]
    got = torch.autograd.grad(upsample(coarse, 1, 3, impl=impl), coarse, grad)[0]
    assert torch.equal(got[0, 0], torch.tensor([[1 + 7.5 + 25, 2.5 + 75]]))


def test_merged_state_by_hand(impl):
    y, eps = torch.full((2, 1, 2, 2), 2.0), torch.full((2, 1, 2, 2), 3.0)
    coarse = torch.tensor([[[[10.0]]], [[[20.0]]]])
    state = merge_state(y, eps, coarse, torch.tensor([0.64, 0.36]), impl=impl)
    # 0.8 * 2 + 0.6 * 3 + 0.2 * 10 = 5.4 and 0.6 * 2 + 0.8 * 3 + 0.4 * 20 = 11.6
    torch.testing.assert_close(state[:, 0, 0, 0], torch.tensor([5.4, 11.6]))
    bare = merge_state(y, eps, None, torch.tensor([0.64, 0.36]), impl=impl)  # 0 at the coarsest level
    torch.testing.assert_close(bare[:, 0, 0, 0], torch.tensor([3.4, 3.6]))


def test_sampler_merge_gives_the_same_state(impl):
    g = torch.Generator().manual_seed(0)
    y, eps = torch.randn(2, 1, 6, 5, generator=g), torch.randn(2, 1, 6, 5, generator=g)
    coarse, abar = torch.randn(2, 1, 3, 3, generator=g), torch.tensor([0.5, 0.1])
    y_t = merge_state(y, eps, None, abar, impl=impl)
    merged = upsample_add(coarse, y_t, 1 - abar.sqrt(), impl=impl)
    torch.testing.assert_close(merged, merge_state(y, eps, coarse, abar, impl=impl))


def test_the_error_between_levels_by_hand(impl):
    x, coarse = torch.tensor([[[[1.0, 5], [-3, 2]]]]), torch.tensor([[[[2.0]]]])
    assert torch.equal(level_error(x, coarse, impl=impl)[0, 0], torch.tensor([[1.0, 3], [5, 0]]))


def test_wrong_shapes_are_named(impl):
    y = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="coarse"):
        merge_state(y, y, torch.zeros(1, 1, 3, 2), torch.ones(1), impl=impl)
    with pytest.raises(ValueError, match="levels"):
        build_pyramid(y, 0, impl=impl)
    with pytest.raises(ValueError, match="eps"):
        merge_state(y, y[..., :3], None, torch.ones(1), impl=impl)
