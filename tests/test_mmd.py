"""MMD^2: double loops as oracle, closed-form bandwidth, gradients, what it can tell apart."""

from __future__ import annotations

import math

import pytest
import torch

from phmdiff_fast.kernels.mmd import mmd2, pooled_bandwidth


def by_loops(x, y, bandwidths=None, unbiased=False):
    if bandwidths is None:
        pooled = [*x, *y]
        m = sum(float(((a - b) ** 2).sum()) for a in pooled for b in pooled) / len(pooled) ** 2
        bandwidths = [2**j * m for j in (-2, -1, 0, 1, 2)]

    def mean_kernel(a, b, skip):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (skip and i == j)]
        return sum(
            math.exp(-float(((a[i] - b[j]) ** 2).sum()) / w) / len(bandwidths) for i, j in pairs for w in bandwidths
        ) / len(pairs)

    return mean_kernel(x, x, unbiased) + mean_kernel(y, y, unbiased) - 2 * mean_kernel(x, y, False)


@pytest.fixture
def sets():
    g = torch.Generator().manual_seed(5)
    return (torch.randn(7, 3, generator=g, dtype=torch.float64) + 4,
            torch.randn(9, 3, generator=g, dtype=torch.float64) * 1.5 + 4)  # fmt: skip


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("bandwidths", [None, [0.7], [0.5, 3.0, 11.0]])
def test_against_double_loops(sets, estimator, bandwidths):
    expected = by_loops(*sets, bandwidths, estimator == "unbiased")
    assert float(mmd2(*sets, bandwidths, estimator=estimator)) == pytest.approx(expected, abs=1e-12)


def test_bandwidth_in_closed_form_is_the_mean_squared_distance(sets):
    pooled = torch.cat(sets)
    assert float(pooled_bandwidth(*sets)) == pytest.approx(
        float(torch.cdist(pooled, pooled).square().mean()), rel=1e-12
    )


def test_gradients_with_the_bandwidth_held_fixed(sets):
    x, y = (s.clone().requires_grad_() for s in sets)
    m = float(pooled_bandwidth(x, y))
    fixed = [2.0**j * m for j in (-2, -1, 0, 1, 2)]
    assert torch.autograd.gradcheck(lambda a, b: mmd2(a, b, fixed), (x, y))
    automatic = torch.autograd.grad(mmd2(x, y), (x, y))
    held = torch.autograd.grad(mmd2(x, y, fixed), (x, y))
    for a, b in zip(automatic, held, strict=True):
        torch.testing.assert_close(a, b)  # the automatic bandwidth is detached


def test_a_set_against_itself_is_zero_and_a_shift_is_seen(sets):
    x, _ = sets
    assert float(mmd2(x, x)) == pytest.approx(0, abs=1e-12)
    assert float(mmd2(x, x + 1)) > 0.05
    assert torch.isfinite(mmd2(torch.ones(4, 2), torch.ones(5, 2)))  # no spread at all


def test_far_from_the_origin_nothing_cancels():
    x, y = torch.randn(50, 4), torch.randn(60, 4)
    near, far = mmd2(x.double(), y.double()), mmd2(x + 1000, y + 1000)
    assert float(far) == pytest.approx(float(near), abs=2e-4)


def test_16_bit_rows_are_computed_in_float32(sets):
    x, y = (s.bfloat16() for s in sets)
    with torch.autocast("cpu", torch.bfloat16):
        got = mmd2(x, y)
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(float(mmd2(x.double(), y.double())), abs=1e-6)


def test_wrong_arguments_are_named(sets):
    with pytest.raises(ValueError, match="estimator"):
        mmd2(*sets, estimator="best")
    with pytest.raises(ValueError, match="rows or more"):
        mmd2(sets[0][:1], sets[1], estimator="unbiased")
    with pytest.raises(ValueError, match=r"\(n, d\)"):
        mmd2(sets[0], sets[1][:, :2])
