"""MMD^2: double loops as oracle, closed-form bandwidth, gradients, what it can tell apart, the blocked CPU path."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phmdiff_fast.kernels import mmd as room
from phmdiff_fast.kernels._impl import BackendError
from phmdiff_fast.kernels.mmd import mmd2, mmd2_reference, pooled_bandwidth


class Exact(NamedTuple):
    """MMD^2 and its gradients in float64, and how far rounding in the type of the rows may be from them."""

    value: float
    gradients: tuple[torch.Tensor, torch.Tensor]
    value_slack: float
    slacks: tuple[torch.Tensor, torch.Tensor]


def oracle(x, y, bandwidths=None, unbiased=False) -> Exact:
    """From the formula of the gradient, not by autograd."""
    unit, single = torch.finfo(x.dtype).eps, min(torch.finfo(x.dtype).eps, 2.0**-23)
    n, m = len(x), len(y)
    z = torch.cat([x, y]).detach().double()
    z = z - z.mean(0)
    squared = (z[:, None] - z[None]).square().sum(2)
    if bandwidths is None:
        bandwidths = [2.0**j * float(squared.mean()) for j in range(-2, 3)]
    kernels = [torch.exp(-squared / w) for w in bandwidths]
    kernel = sum(kernels) / len(kernels)
    slope = sum(k / w for k, w in zip(kernels, bandwidths, strict=True)) / len(kernels)
    side = (torch.arange(n + m, device=z.device) >= n).long()
    within_x, within_y = (n * (n - 1), m * (m - 1)) if unbiased else (n * n, m * m)
    weights = z.new_tensor([[1 / within_x, -1 / (n * m)], [-1 / (n * m), 1 / within_y]])
    weights = weights[side][:, side].fill_diagonal_(0)
    value = float((weights * kernel).sum()) + (0 if unbiased else 1 / n + 1 / m)
    pull = -4 * weights * slope
    gradient = pull.sum(1, keepdim=True) * z - pull @ z
    norms = z.square().sum(1)
    both = norms[:, None] + norms[None]
    value_slack = float((weights.abs() * (32 * single * kernel + 4 * unit * slope * both)).sum()) + single
    lost = 64 * single + 4 * unit * both / min(bandwidths)
    slack = (pull.abs() * lost * (norms.sqrt()[:, None] + norms.sqrt()[None])).sum(1, keepdim=True)
    slack = unit * gradient.abs() + slack
    return Exact(value, tuple(gradient.split([n, m])), value_slack, tuple(slack.split([n, m])))


def within(got, expected, slack) -> None:
    error = (torch.as_tensor(got).detach().double() - expected).abs()
    assert (error <= slack).all(), f"off by {float((error / slack).max())} times what rounding explains"


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
    for estimator in ("biased", "unbiased"):
        assert torch.autograd.gradcheck(lambda a, b: mmd2(a, b, fixed, estimator=estimator), (x, y))  # noqa: B023
        assert torch.autograd.gradcheck(lambda a, b: mmd2_reference(a, b, fixed, estimator=estimator), (x, y))  # noqa: B023
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


def test_the_double_loops_and_the_formula_of_the_gradient_agree(sets):
    x, y = (s.clone().requires_grad_() for s in sets)
    for bandwidths in (None, [0.5, 3.0]):
        for estimator in ("biased", "unbiased"):
            exact = oracle(x, y, bandwidths, estimator == "unbiased")
            assert exact.value == pytest.approx(by_loops(*sets, bandwidths, estimator == "unbiased"), abs=1e-12)
            by_autograd = torch.autograd.grad(mmd2_reference(x, y, bandwidths, estimator=estimator), (x, y))
            torch.testing.assert_close(by_autograd, exact.gradients)


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
    with pytest.raises(ValueError, match="bandwidths"):
        mmd2(*sets, [])
    with pytest.raises(ValueError, match="bandwidths"):
        mmd2(*sets, [1.0, 0.0])
    with pytest.raises(ValueError, match="bandwidths"):
        mmd2(*sets, torch.ones(0))
    with pytest.raises(TypeError, match="bandwidths"):
        mmd2(*sets, torch.ones(1, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"y must be torch\.float64"):
        mmd2(sets[0], sets[1].float())
    with pytest.raises(TypeError, match="x must be floating point"):
        mmd2(sets[0].long(), sets[1].long())
    with pytest.raises(BackendError):
        mmd2(*sets, impl="extension")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_blocks_of_any_size_are_the_definition(data):
    n, m, d = (data.draw(st.integers(1, 40), name) for name in "nmd")
    dtype = data.draw(st.sampled_from([torch.float64, torch.float64, torch.float32, torch.bfloat16]))
    bandwidths = data.draw(st.sampled_from([None, [2.0 * d], [0.5 * d, 30.0]]))
    estimator = data.draw(st.sampled_from(["biased", "unbiased"] if min(n, m) > 1 else ["biased"]))
    needed = data.draw(st.tuples(st.booleans(), st.booleans()))
    size, stride = data.draw(st.sampled_from([1, 7, 8, 16, 256])), data.draw(st.sampled_from([1, 2]))
    if stride == 2 and data.draw(st.booleans()):
        n, m = 2, 1 + (estimator == "unbiased")
    g = torch.Generator().manual_seed(n * m)
    x, y = ((torch.randn(s * stride, d, generator=g) + 0.5).to(dtype)[::stride] for s in (n, m))
    x, y = (t.requires_grad_(need) for t, need in zip((x, y), needed, strict=True))
    given_bandwidths = torch.tensor(bandwidths) if bandwidths and stride == 2 else bandwidths
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "BLOCK_ROWS", size)
        value = mmd2(x, y, given_bandwidths, estimator=estimator)
        wanted = [t for t in (x, y) if t.requires_grad]
        grads = torch.autograd.grad(value, wanted, value.new_tensor(3.0)) if wanted else ()
    exact = oracle(x, y, bandwidths, estimator == "unbiased")
    assert value.dtype == (dtype if dtype == torch.float64 else torch.float32)
    within(value, exact.value, exact.value_slack)
    pairs = [p for p, need in zip(zip(exact.gradients, exact.slacks, strict=True), needed, strict=True) if need]
    for got, (gradient, slack) in zip(grads, pairs, strict=True):
        assert got.dtype == dtype
        within(got, 3 * gradient, 3 * slack)


def test_k2_single_rows_and_no_columns():
    x, y = torch.zeros(1, 2, requires_grad=True), torch.ones(1, 2, requires_grad=True)
    value = mmd2(x, y)
    gx, gy = torch.autograd.grad(value, (x, y))
    assert float(value.detach()) == pytest.approx(oracle(x, y).value, abs=1e-6)
    torch.testing.assert_close(gx, -gy)
    empty = torch.zeros(3, 0, requires_grad=True)
    value = mmd2(empty, torch.zeros(2, 0))
    assert float(value.detach()) == pytest.approx(0, abs=1e-6)
    assert torch.autograd.grad(value, empty)[0].shape == (3, 0)


@pytest.mark.parametrize("needed", [(False, False), (True, False), (False, True), (True, True)])
def test_k6_tiles_that_no_needed_gradient_sees_are_not_computed(monkeypatch, needed):
    monkeypatch.setattr(room, "BLOCK_ROWS", 8)
    x, y = (torch.randn(n, 3).requires_grad_(need) for n, need in zip((20, 15), needed, strict=True))
    value = mmd2(x, y)
    assert value.requires_grad == any(needed)
    if not any(needed):
        return
    seen, original = [], room._Tiles.exponent
    monkeypatch.setattr(
        room._Tiles, "exponent", lambda self, a, b, out: (seen.append((a[2], b[2])), original(self, a, b, out))[1]
    )
    value.backward()
    expected = {(0, 0): 6 * needed[0], (0, 1): 6, (1, 1): 3 * needed[1]}
    assert {pair: seen.count(pair) for pair in expected} == expected
    assert [t.grad is not None for t in (x, y)] == list(needed)


def test_k7_a_second_derivative_raises_but_the_definition_has_one(sets):
    x, y = (s.clone().requires_grad_() for s in sets)
    value = mmd2(x, y)
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        (value + first.square().sum()).backward()  # where a missing second derivative would go unseen
    assert torch.autograd.gradgradcheck(lambda a, b: mmd2_reference(a, b, [3.0]), (x, y))


def test_a_gradient_by_the_bandwidths_comes_from_the_definition(sets):
    bandwidths = torch.tensor([1.0, 4.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: mmd2(*sets, w), (bandwidths,))
    with torch.no_grad():
        assert float(mmd2(*sets, bandwidths)) == pytest.approx(float(mmd2(*sets, [1.0, 4.0])), abs=1e-12)


def test_k8_one_graph_opcheck_and_autocast(monkeypatch, sets):
    x, y = (s.float().requires_grad_() for s in sets)
    expected = torch.autograd.grad(mmd2(x, y), (x, y))
    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(lambda a, b: mmd2(a * 1, b), fullgraph=True, backend="aot_eager", dynamic=dynamic)
        assert torch.equal(compiled(x, y), mmd2(x, y))
        found = torch.autograd.grad(compiled(x, y), (x, y))
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(mmd2(x, y), (x, y))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    for rates in (None, torch.tensor([0.5, 2.0])):
        torch.library.opcheck(torch.ops.phmdiff_fast.mmd2, (x, y, rates, True, False))
        _, z, norms, rate = (t.detach() for t in torch.ops.phmdiff_fast.mmd2(x, y, rates, True, False))
        kept = rate if rates is None else rates
        arguments = (x.new_ones(()), z, norms, kept, 7, 9, 3, rates is None, True, False, False, True)
        torch.library.opcheck(torch.ops.phmdiff_fast.mmd2_backward, arguments)


def test_k8_vmap_is_right_or_raises(sets):
    x = torch.randn(3, 7, 3, dtype=torch.float64)
    try:
        got = torch.vmap(lambda a: mmd2(a, sets[1]))(x)
    except RuntimeError:
        return
    torch.testing.assert_close(got, torch.stack([mmd2(a, sets[1]) for a in x]))


def test_k10_devices_that_differ_are_named(sets):
    with pytest.raises(ValueError, match="y is on meta, expected cpu like x"):
        mmd2(sets[0], sets[1].to("meta"))


def test_no_matrix_of_all_pairs_is_made(monkeypatch):
    """The largest buffer is a tile; rows double, memory of rows doubles."""
    sizes = []
    for n in (600, 1200):
        x, y = torch.randn(n, 4, requires_grad=True), torch.randn(n, 4)
        with torch.profiler.profile(profile_memory=True) as profile:
            mmd2(x, y).backward()
        sizes.append(max(e.self_cpu_memory_usage for e in profile.events()))
    assert max(sizes) <= 2 * room.BLOCK_ROWS**2 * 4
