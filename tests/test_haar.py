"""The 3D Haar transform: orthonormal, exactly invertible, and what PyWavelets computes."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_tools import in_margins, no_worse_than_eager

from phmdiff_fast import haar as module
from phmdiff_fast.haar import haar3d, inverse_haar3d
from phmdiff_fast.kernels import _extension

BUILT = not _extension.problem()
needs_extension = pytest.mark.skipif(not BUILT, reason=_extension.problem() or "the extension is there")
IMPLS = ["reference", pytest.param("extension", marks=needs_extension)]
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SHAPES = [(4, 4, 4), (5, 6, 7), (1, 2, 3), (2, 3, 1), (1, 1, 1), (6, 5, 33), (3, 4, 40)]


def volume(shape, dtype=F32, seed=0):
    return in_margins(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_orthonormal_and_its_inverse_exact(shape, impl):
    for dtype, tolerance in ((F64, 1e-14), (F32, 1e-6)):
        x = volume((2, 3, *shape), dtype)
        bands = haar3d(x, impl=impl)
        assert bands.shape == (2, 8, 3, *(-(-n // 2) for n in shape))
        assert float(bands.double().square().sum()) == pytest.approx(float(x.double().square().sum()), rel=1e-6)
        torch.testing.assert_close(inverse_haar3d(bands, shape=shape, impl=impl), x, atol=4 * tolerance, rtol=tolerance)


@pytest.mark.parametrize("impl", IMPLS)
def test_two_volumes_keep_their_inner_product(impl):
    a, b = volume((1, 2, 5, 4, 3), F64), volume((1, 2, 5, 4, 3), F64, seed=1)
    inner = (haar3d(a, impl=impl) * haar3d(b, impl=impl)).sum()
    assert float(inner) == pytest.approx(float((a * b).sum()))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("axes", list(product((0, 1), repeat=3)), ids=str)
def test_a_band_is_the_difference_along_the_axes_of_its_bits(axes, impl):
    """A wave that changes its sign along these axes, and nothing else, is in that band alone."""
    signs = [torch.tensor([1.0, -1.0 if change else 1.0]).repeat(2) for change in axes]
    x = (signs[0][:, None, None] * signs[1][:, None] * signs[2]).expand(1, 2, 4, 4, 4)
    bands = haar3d(x, impl=impl)
    number = 4 * axes[0] + 2 * axes[1] + axes[2]
    torch.testing.assert_close(bands[:, number], torch.full((1, 2, 2, 2, 2), 8**0.5))
    assert not bands[:, [n for n in range(8) if n != number]].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_bands_by_hand(impl):
    x = torch.arange(8.0).view(1, 1, 2, 2, 2)  # value 4 i + 2 j + k
    bands = haar3d(x, impl=impl)[0, :, 0, 0, 0, 0]
    # sums over / differences along the axes of the set bits, times 8^-1/2
    expected = torch.tensor([28.0, -4, -8, 0, -16, 0, 0, 0]) / 8**0.5
    torch.testing.assert_close(bands, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_odd_sides_are_padded_with_zero(impl):
    x = volume((1, 1, 3, 5, 7))
    padded = torch.zeros(1, 1, 4, 6, 8)
    padded[..., :3, :5, :7] = x
    assert torch.equal(haar3d(x, impl=impl), haar3d(padded, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_pywavelets_agrees(impl):
    pywt = pytest.importorskip("pywt")
    x = volume((2, 1, 6, 4, 10), F64)
    bands = haar3d(x, impl=impl)
    expected = pywt.dwtn(x[:, 0].numpy(), "haar", axes=(1, 2, 3))
    for number, axes in enumerate(product("ad", repeat=3)):
        torch.testing.assert_close(bands[:, number, 0], torch.from_numpy(expected["".join(axes)]))


def errors(shape, dtype):
    """Both directions and their gradients against float64, no worse than eager PyTorch in that type."""
    sides = shape[2:]
    small = tuple(-(-n // 2) for n in sides)
    # The sums are of 8 values, so eager's luck is small in number: few elements are allowed one rounding.
    for call, given_, like in (
        (haar3d, volume(shape, dtype), (shape[0], 8, shape[1], *small)),
        (
            lambda v, impl: inverse_haar3d(v, shape=sides, impl=impl),
            volume((shape[0], 8, shape[1], *small), dtype),
            shape,
        ),
    ):
        weight = torch.randn(like, generator=torch.Generator().manual_seed(3)).to(dtype)

        def both(x, impl, call=call, weight=weight):
            x = x.detach().requires_grad_()
            out = call(x, impl=impl)
            return out.detach(), torch.autograd.grad(out, x, weight.to(x.dtype))[0]

        results = both(given_, "extension"), both(given_, "reference"), both(given_.double(), "reference")
        for got, eager, exact in zip(*results, strict=True):
            assert got.is_contiguous()
            no_worse_than_eager(got, eager, exact, small=True, name=str(shape))
        before = given_.clone()
        call(given_, impl="extension")
        assert torch.equal(given_, before)


@needs_extension
@given(
    sizes=st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 97)),
    dtype=st.sampled_from([F32, BF16, F16]),
)
@settings(max_examples=40, derandomize=True, deadline=None)
def test_any_size(sizes, dtype):
    errors(sizes, dtype)


@needs_extension
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=lambda t: str(t)[6:])
def test_values_and_gradients(dtype):
    errors((1, 3, 24, 18, 65), dtype)


@needs_extension
@pytest.mark.parametrize("shape", [(1, 2, 2, 3, 4), (2, 1, 1, 2, 5), (1, 1, 2, 4, 2)], ids=str)
def test_gradients_and_second_derivatives_in_float64(shape):
    x = volume(shape, F64).requires_grad_()
    bands = haar3d(x, impl="extension").detach().requires_grad_()

    def forward(v):
        return haar3d(v, impl="extension")

    def inverse(v):
        return inverse_haar3d(v, shape=shape[2:], impl="extension")

    for call, leaf in ((forward, x), (inverse, bands)):
        assert torch.autograd.gradcheck(call, [leaf])
        assert torch.autograd.gradgradcheck(call, [leaf])
        # Orthonormal, so the gradient of sum(f(x)^2) / 2 is x; and the gradient of that with ones is one.
        if call is forward or all(n % 2 == 0 for n in shape[2:]):
            first = torch.autograd.grad(call(leaf).square().sum() / 2, leaf, create_graph=True)[0]
            second = torch.autograd.grad(first, leaf, torch.ones_like(first))[0]
            torch.testing.assert_close(first.detach(), leaf.detach())
            torch.testing.assert_close(second, torch.ones_like(second))


@needs_extension
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=lambda t: str(t)[6:])
def test_a_layout_gives_the_same_bits_as_dense_memory(dtype):
    x = volume((2, 3, 5, 6, 8), dtype)
    bands = volume((2, 8, 3, 3, 3, 4), dtype, seed=1)
    for lay in (lambda v: v.mT.contiguous().mT, lambda v: v.movedim(1, -1).contiguous().movedim(-1, 1),
                lambda v: v[:1].expand(v.shape), lambda v: v[..., :1].expand(v.shape),
                lambda v: torch.stack([v, v * math.nan], -1).flatten(-2)[..., ::2],
                lambda v: torch.cat([v.new_full((5,), math.nan), v.flatten()])[5:].view(v.shape)):  # fmt: skip
        for call, given_ in ((haar3d, x), (inverse_haar3d, bands)):
            laid = lay(given_)
            assert torch.equal(call(laid, impl="extension"), call(laid.clone(memory_format=torch.contiguous_format)))


@needs_extension
def test_no_bit_depends_on_the_batch():
    x = volume((3, 2, 5, 4, 9), BF16)
    whole = haar3d(x, impl="extension")
    assert torch.equal(whole, torch.cat([haar3d(v[None], impl="extension") for v in x]))
    assert torch.equal(whole[[2, 0, 1]], haar3d(x[[2, 0, 1]], impl="extension"))
    back = inverse_haar3d(whole, shape=(5, 4, 9), impl="extension")
    assert torch.equal(back, torch.cat([inverse_haar3d(v[None], shape=(5, 4, 9), impl="extension") for v in whole]))


@needs_extension
def test_autocast_changes_nothing():
    x = volume((1, 2, 4, 5, 6))
    bands = haar3d(x, impl="extension")
    back = inverse_haar3d(bands, shape=(4, 5, 6), impl="extension")
    with torch.autocast("cpu", BF16):
        assert torch.equal(haar3d(x, impl="extension"), bands)
        assert torch.equal(inverse_haar3d(bands, shape=(4, 5, 6), impl="extension"), back)


@needs_extension
@pytest.mark.parametrize("dtype", [BF16, F16], ids=lambda t: str(t)[6:])
def test_every_16_bit_value_comes_back_but_for_one_rounding_a_direction(dtype):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    finite = values[values.isfinite() & (values.abs() < torch.finfo(dtype).max / 16)]
    x = finite[: len(finite) // 8 * 8].view(1, 1, -1, 2, 4)
    exact = inverse_haar3d(haar3d(x.double(), impl="reference").to(dtype).double(), impl="reference").to(dtype)
    back = inverse_haar3d(haar3d(x, impl="extension"), impl="extension")
    largest = exact.double().abs().amax((3, 4), keepdim=True)
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((back.double() - exact.double()).abs() <= largest * torch.finfo(dtype).eps + tiny).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_block(value, impl):
    x = torch.zeros(1, 1, 6, 6, 6)
    x[0, 0, 2, 3, 4] = value
    bands = haar3d(x, impl=impl)
    expected = torch.zeros(1, 8, 1, 3, 3, 3, dtype=torch.bool)
    expected[:, :, :, 1, 1, 2] = True
    assert torch.equal(~bands.isfinite(), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_wrong_arguments_are_named(impl):
    for bad in (torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, 2, 2)):
        with pytest.raises(ValueError, match="haar3d: need"):
            haar3d(bad, impl=impl)
    for bad in (torch.zeros(1, 7, 1, 2, 2, 2), torch.zeros(1, 8, 2, 2, 2)):
        with pytest.raises(ValueError, match="inverse_haar3d: need"):
            inverse_haar3d(bad, impl=impl)
    for sides in ((5, 4, 4), (4, 2, 4), (4, 4), (4, 4, 5)):
        with pytest.raises(ValueError, match="does not fit"):
            inverse_haar3d(torch.zeros(1, 8, 1, 2, 2, 2), shape=sides, impl=impl)


@needs_extension
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ops: ops.haar3d(torch.zeros(2, 2)), "B, C, X, Y, Z"),
        (lambda ops: ops.haar3d(torch.zeros(1, 1, 2, 2, 2, dtype=torch.complex64)), "element type"),
        (lambda ops: ops.inverse_haar3d(torch.zeros(1, 4, 1, 2, 2, 2), 4, 4, 4), "B, 8, C"),
        (lambda ops: ops.inverse_haar3d(torch.zeros(1, 8, 1, 2, 2, 2), 4, 6, 4), "half of 4 x 6 x 4"),
        (lambda ops: ops.inverse_haar3d(torch.zeros(1, 8, 1, 2, 2, 2), 4, 4, 2), "half of"),
        (lambda ops: ops.inverse_haar3d(torch.zeros(1, 8, 1, 2, 2, 2), 1, 4, 4), "half of"),
    ],
)  # fmt: skip
def test_operations_called_with_wrong_arguments_say_so(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(torch.ops.phmdiff_fast)


@needs_extension
def test_the_extension_is_what_runs_unless_told_otherwise(monkeypatch):
    def never(*args):
        raise AssertionError("the reference ran")

    x = volume((1, 1, 4, 4, 4))
    bands = haar3d(x, impl="reference")
    monkeypatch.setattr(module, "haar3d_reference", never)
    monkeypatch.setattr(module, "inverse_haar3d_reference", never)
    torch.testing.assert_close(haar3d(x), bands)
    torch.testing.assert_close(inverse_haar3d(bands), x)
    with pytest.raises(AssertionError, match="the reference ran"):
        haar3d(x, impl="reference")
    with pytest.raises(AssertionError, match="the reference ran"):
        inverse_haar3d(bands, impl="reference")
