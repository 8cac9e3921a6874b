"""The pyramid in the C++ extension against its definition in float64: values, gradients, layouts, sizes, bits.

Everything here runs on CPU tensors. Memory that the extension is given starts as NaN (``poisoned``).
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import math
import os
import subprocess
import sys
import warnings
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_tools import in_margins, no_worse_than_eager
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from phmdiff_fast.haar import haar3d, inverse_haar3d
from phmdiff_fast.kernels import _extension, _philox, _pyramid_ops
from phmdiff_fast.kernels._impl import BackendError
from phmdiff_fast.pyramid import build_pyramid, level_error, merge_state, upsample, upsample_add

pytestmark = pytest.mark.skipif(bool(_extension.problem()), reason=_extension.problem() or "the extension is there")

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
TYPES = [F32, BF16, F16]
ALPHAS = [0.5, 0.3, 0.6, 0.75, 0.9]
SIZES = [(2, 3, 33, 40), (2, 2, 15, 17), (3, 1, 1, 9), (1, 2, 14, 1), (1, 1, 2, 3), (1, 4, 64, 70)]
OPS = torch.ops.phmdiff_fast
RNG = (2**40 + 7, 11)


LIBC = ctypes.CDLL(None)
LIBC.malloc.restype, LIBC.malloc.argtypes, LIBC.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]


def dirty_heap():
    """Leave free memory behind that is all bits set, NaN in every type: work space is likely cut from it."""
    blocks = [LIBC.malloc(2**16) for _ in range(16)]
    end = LIBC.malloc(64)  # so that what is freed does not go back to the system
    for block in blocks:
        ctypes.memset(block, 0xFF, 2**16)
        LIBC.free(block)
    LIBC.free(end)


@contextlib.contextmanager
def poisoned():
    """Memory from at::empty starts as NaN, in C++ too: an element left unwritten shows."""
    dirty_heap()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def half(n):
    return -(-n // 2)


def image(shape, dtype=F32, seed=0, margins=True):
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return in_margins(made) if margins else made


def vector(n, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) * 0.9 + 0.05


def levels_of(x, levels, alpha, impl):
    """build_pyramid; eager PyTorch's antialiasing on a CPU wants help.

    It has no 16-bit form, so that is float32 here, each level rounded; and of an image of one column
    PyTorch 2.13 makes a constant, so that is turned to be one row.
    """
    if impl != "reference" or alpha == 0.5:
        return build_pyramid(x, levels, alpha=alpha, impl=impl)
    if x.shape[3] == 1:
        return [level.mT for level in levels_of(x.mT, levels, alpha, impl)]
    out = [x]
    for _ in range(levels - 1):
        wide = out[-1].to(torch.promote_types(x.dtype, F32))
        out.append(build_pyramid(wide, 2, alpha=alpha, impl=impl)[1].to(x.dtype))
    return out


# Every operation as name -> (images by name -> results, what images it takes); `size` is (B, C, H, W).
def calls(size, alpha=0.5, levels=4):
    height, width = size[2:]
    abar = vector(size[0])
    ids = torch.arange(size[0]) * 2**33 - 5
    draw = dict(rng=RNG, sample_ids=ids, stream=2)

    def wide(v, x):  # the vectors are never rounded; beside float64 images they are float64
        return v.to(torch.promote_types(x.dtype, F32))

    return {
        "build_pyramid": (lambda impl, x: levels_of(x, levels, alpha, impl)[1:], ("x",)),
        "merge_state": (lambda impl, y, eps, coarse: merge_state(y, eps, coarse, wide(abar, y), impl=impl),
                        ("y", "eps", "coarse")),
        "merge_state, coarsest": (lambda impl, y, eps: merge_state(y, eps, None, wide(abar, y), impl=impl),
                                  ("y", "eps")),
        "merge_state, drawn": (lambda impl, y, coarse: merge_state(y, None, coarse, wide(abar, y), impl=impl, **draw),
                               ("y", "coarse")),
        "merge_state, drawn, coarsest": (lambda impl, y: merge_state(y, None, None, wide(abar, y), impl=impl, **draw),
                                         ("y",)),
        "upsample": (lambda impl, coarse: upsample(coarse, height, width, impl=impl), ("coarse",)),
        "upsample_add": (lambda impl, coarse, x: upsample_add(coarse, x, wide(abar, x), impl=impl), ("coarse", "x")),
        "level_error": (lambda impl, x, coarse: level_error(x, coarse, impl=impl), ("x", "coarse")),
    }  # fmt: skip


LINEAR = [name for name in calls(SIZES[0]) if name != "level_error"]
ALL = list(calls(SIZES[0]))


def images_for(names, size, dtype=F32, margins=True):
    coarse = (*size[:2], half(size[2]), half(size[3]))
    return {
        n: image(coarse if n == "coarse" else size, dtype, seed=["x", "y", "eps", "coarse"].index(n), margins=margins)
        for n in names
    }


def run(call, images, impl, needs=None, seed=9):
    """(results, gradients by name) of sum(w result); needs: what requires grad, all by default."""
    needs = tuple(images) if needs is None else needs
    leaves = {n: v.detach().requires_grad_(n in needs) for n, v in images.items()}
    with poisoned() if impl == "extension" else contextlib.nullcontext():
        out = call(impl, **leaves)
        out = list(out) if isinstance(out, (list, tuple)) else [out]
        wanted = [v for v in leaves.values() if v.requires_grad]
        if not wanted:
            return out, {}
        weights = [image(o.shape, F32, seed + i, margins=False).to(o.dtype) for i, o in enumerate(out)]
        got = iter(torch.autograd.grad(out, wanted, weights))
    return [o.detach() for o in out], {n: next(got) for n, v in leaves.items() if v.requires_grad}


def same(a, b):
    """Bit for bit, (results, gradients) of ``run``."""
    assert len(a[0]) == len(b[0])
    assert a[1].keys() == b[1].keys()
    assert all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))
    assert all(torch.equal(x, b[1][n]) for n, x in a[1].items())


def compare(name, size, dtype, *, alpha=0.5, levels=4, small=True):
    call, takes = calls(size, alpha, levels)[name]
    images, needs = images_for(takes, size, dtype), () if name == "level_error" else None
    before = {n: v.clone() for n, v in images.items()}
    got, eager = (run(call, images, impl, needs) for impl in ("extension", "reference"))
    exact = run(call, {n: v.double() for n, v in images.items()}, "reference", needs)
    for i, (a, b, c) in enumerate(zip(got[0], eager[0], exact[0], strict=True)):
        assert a.is_contiguous()
        no_worse_than_eager(a, b, c, small=small, name=f"{name} {i}")
        assert not any(a.untyped_storage().data_ptr() == v.untyped_storage().data_ptr() for v in images.values())
    for n, a in got[1].items():
        no_worse_than_eager(a, eager[1][n], exact[1][n], small=small, name=f"{name}: gradient of {n}")
    assert all(torch.equal(v, before[n]) for n, v in images.items()), "an input was changed"


def check_empty(name, size, alpha, levels):
    """Shapes as of one sample and one channel, but with no elements; eager PyTorch refuses some of these."""
    needs = () if name == "level_error" else None
    got, one = (
        run(call, images_for(takes, s), "extension", needs)
        for s in (size, (1, 1, *size[2:]))
        for call, takes in [calls(s, alpha, levels)[name]]
    )
    assert [o.shape for o in got[0]] == [(*size[:2], *o.shape[2:]) for o in one[0]]
    assert {n: g.shape for n, g in got[1].items()} == {n: (*size[:2], *g.shape[2:]) for n, g in one[1].items()}


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES, ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("name", ALL)
def test_results_and_gradients(name, dtype):
    for size in SIZES:
        compare(name, size, dtype)
    compare(name, (2, 3, 120, 96), dtype, small=False)


@pytest.mark.parametrize("dtype", TYPES, ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("alpha", ALPHAS[1:])
def test_antialiased_levels_and_their_gradients(alpha, dtype):
    for size in SIZES:
        compare("build_pyramid", size, dtype, alpha=alpha)
    compare("build_pyramid", (2, 3, 120, 96), dtype, alpha=alpha, levels=3, small=False)


@pytest.mark.parametrize("name", ALL)
def test_float64_is_computed_in_float64(name):
    for size in SIZES:
        call, takes = calls(size)[name]
        images, needs = images_for(takes, size, F64), () if name == "level_error" else None
        got, exact = (run(call, images, impl, needs) for impl in ("extension", "reference"))
        tolerance = dict(rtol=0, atol=1e-12 if "drawn" not in name else 2e-6)  # normals are float32
        for a, b in zip([*got[0], *got[1].values()], [*exact[0], *exact[1].values()], strict=True):
            torch.testing.assert_close(a, b, **tolerance)


@given(
    batch=st.integers(0, 3), channels=st.integers(0, 3), height=st.integers(1, 97), width=st.integers(1, 97),
    levels=st.integers(2, 7), alpha=st.sampled_from(ALPHAS), dtype=st.sampled_from([F32, BF16, F16]),
)  # fmt: skip
@settings(max_examples=40, derandomize=True, deadline=None)
def test_any_size(batch, channels, height, width, levels, alpha, dtype):
    size = (batch, channels, height, width)
    for name in ALL:
        if batch * channels:
            compare(name, size, dtype, alpha=alpha, levels=levels)
        else:
            check_empty(name, size, alpha, levels)


def test_levels_against_pooling_and_antialiased_interpolation():
    x = image((2, 3, 240, 60))
    pooled, smaller = x, x
    for n in range(1, 8):
        pooled = F.avg_pool2d(pooled, 2, ceil_mode=True, count_include_pad=False)
        torch.testing.assert_close(build_pyramid(x, 8, impl="extension")[n], pooled, atol=1e-6, rtol=1e-6)
    assert [tuple(level.shape[2:]) for level in build_pyramid(x, 8, impl="extension")] == [
        (240, 60), (120, 30), (60, 15), (30, 8), (15, 4), (8, 2), (4, 1), (2, 1)]  # fmt: skip
    for n in range(1, 5):
        sides = [max(1, math.ceil(0.6 * s - 1e-9)) for s in smaller.shape[2:]]
        smaller = F.interpolate(smaller, size=sides, mode="bilinear", antialias=True, align_corners=False)
        torch.testing.assert_close(build_pyramid(x, 5, alpha=0.6, impl="extension")[n], smaller, atol=2e-6, rtol=2e-6)


def test_up_against_interpolation_by_two_and_back_to_an_odd_side():
    x = image((1, 2, 15, 15))
    coarse = build_pyramid(x, 2, impl="extension")[1]
    assert coarse.shape[2:] == (8, 8)
    up = upsample(coarse, 15, 15, impl="extension")
    expected = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)[..., :15, :15]
    torch.testing.assert_close(up, expected, atol=1e-6, rtol=0)
    # The error map is what merging with weight -1 leaves, without its sign.
    error = level_error(x, coarse, impl="extension")
    assert torch.equal(error, upsample_add(coarse, x, torch.tensor([-1.0]), impl="extension").abs())


def test_most_levels_go_on_below_one_pixel():
    x = image((2, 1, 3, 5), BF16)
    levels = build_pyramid(x, 25, impl="extension")
    assert len(levels) == 25
    for a, b in zip(levels, build_pyramid(x.double(), 25, impl="reference"), strict=True):
        torch.testing.assert_close(a.double(), b, atol=0.01, rtol=0)
    for refused in (0, 26):
        with pytest.raises(ValueError, match="levels must be 1 to 25"):
            build_pyramid(x, refused, impl="extension")


def test_sixteen_bit_levels_are_rounded_once():
    x = image((2, 3, 64, 64), BF16)
    exact = build_pyramid(x.double(), 6, impl="reference")
    for level, expected in zip(build_pyramid(x, 6, impl="extension"), exact, strict=True):
        assert torch.equal(level, expected.float().to(BF16))  # the means fit float32 but for a tie's last bit


def test_abar_is_not_rounded_to_the_images_type():
    y, eps = torch.zeros(1, 1, 4, 4, dtype=BF16), torch.ones(1, 1, 4, 4, dtype=BF16)
    abar = torch.tensor([0.9999])  # 1 in bfloat16
    assert float(merge_state(y, eps, None, abar, impl="extension")[0, 0, 0, 0]) == pytest.approx(0.01, rel=0.01)
    with torch.autocast("cpu", BF16):
        assert merge_state(y, eps, None, abar, impl="extension").dtype == BF16
        assert float(merge_state(y, eps, None, abar, impl="extension")[0, 0, 0, 0]) == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize("name", ALL)
def test_autocast_changes_nothing(name):
    call, takes = calls((2, 3, 9, 10))[name]
    images = images_for(takes, (2, 3, 9, 10))
    plain = run(call, images, "extension", None if name != "level_error" else ())
    with torch.autocast("cpu", BF16):
        same(plain, run(call, images, "extension", None if name != "level_error" else ()))


# --- bits --------------------------------------------------------------------------------------


def all_bits(dtype):
    """Every value of a 16-bit type."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


def equal_or_nan(a, b):
    assert torch.equal(a.isnan(), b.isnan())
    assert torch.equal(a.nan_to_num(7.0, math.inf, -math.inf), b.nan_to_num(7.0, math.inf, -math.inf))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=lambda t: str(t)[6:])
def test_every_16_bit_value_comes_through_unchanged(dtype):
    values = all_bits(dtype)
    for width in (1, 5, 8, 27):  # scalars, a tail, one vector, vectors and a tail
        x = torch.cat([values, values[: -len(values) % width]]).view(1, 1, -1, width)
        out = merge_state(x, torch.zeros_like(x), None, torch.ones(1), impl="extension")
        equal_or_nan(out, x)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=lambda t: str(t)[6:])
def test_rounding_is_to_nearest_even_wherever_in_a_row(dtype):
    finite = all_bits(dtype)
    finite = finite[finite.isfinite()].float().sort().values
    ties = (finite[1:].double() + finite[:-1].double()).div(2).float()  # exact in float32
    bits = torch.randint(-(2**31), 2**31, (20000,), generator=torch.Generator().manual_seed(0))
    nans = torch.tensor([0x7FFFFFFF, 0x7FFF8000, 0x7FC00000, -1, -(2**15)])  # rounded like numbers, some would be 0
    edges = [65504, 65519.99, 65520, 65536, 66000, 70000, 131072, 1e38, 3.4e38, math.inf, 2.0**-24, 2.0**-25, 2.0**-126]
    floats = torch.cat([ties, torch.nextafter(ties, ties + 1e30), torch.nextafter(ties, ties - 1e30),
                        torch.cat([bits, nans]).to(torch.int32).view(F32), torch.tensor(edges)])  # fmt: skip
    coarse, x = torch.ones(len(floats), 1, 1, 1, dtype=dtype), torch.zeros(len(floats), 1, 1, 1, dtype=dtype)
    out = upsample_add(coarse, x, floats, impl="extension").flatten()
    equal_or_nan(out, floats.to(dtype))
    for width in range(2, 41):
        few = floats[width::997]
        x = torch.zeros(len(few), 1, 1, width, dtype=dtype)
        coarse = torch.ones(len(few), 1, 1, half(width), dtype=dtype)
        out = upsample_add(coarse, x, few, impl="extension")[:, 0, 0]
        equal_or_nan(out, few.to(dtype)[:, None].expand(-1, width))


@pytest.mark.parametrize("dtype", TYPES, ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("name", ["build_pyramid", "upsample", "merge_state", "upsample_add"])
def test_a_nan_reaches_the_pixels_made_of_it_and_no_other(name, dtype):
    check_spread(name, dtype, 0.5)


@pytest.mark.parametrize("alpha", ALPHAS[1:])
def test_a_nan_reaches_the_antialiased_pixels_made_of_it_and_no_other(alpha):
    check_spread("build_pyramid", F32, alpha)


def check_spread(name, dtype, alpha):
    size = (1, 1, 9, 14)
    call, takes = calls(size, alpha, levels=2)[name]
    varied = "coarse" if "coarse" in takes else takes[0]
    zero = {n: torch.zeros_like(v) for n, v in images_for(takes, size, dtype, margins=False).items()}
    for i, j in product(range(0, zero[varied].shape[2], 2), range(zero[varied].shape[3])):
        made_of, spread = [], []
        for value in (1.0, math.nan):
            images = {n: v.clone() for n, v in zero.items()}
            images[varied][0, 0, i, j] = value
            out = call("extension", **images)
            out = out[0] if isinstance(out, list) else out
            (made_of if value == 1 else spread).append(out != 0 if value == 1 else out.isnan())
        if "drawn" not in name:
            assert torch.equal(made_of[0], spread[0]), (i, j)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_infinity_stays_infinity_forward_and_backward(alpha):
    """No weight is negative, so a sum of zeros and +inf is never NaN."""
    for side in (8, 13):
        for i in range(side):
            x = torch.zeros(1, 1, side, side, requires_grad=True)
            spot = torch.zeros(1, 1, side, side)
            spot[0, 0, i, i] = math.inf
            for level in build_pyramid(spot, 3, alpha=alpha, impl="extension"):
                assert not level.isnan().any(), i
            below = build_pyramid(x, 2, alpha=alpha, impl="extension")[1]
            grad = torch.zeros_like(below)
            if i < grad.shape[2]:
                grad[0, 0, i, i] = math.inf
                assert not torch.autograd.grad(below, x, grad)[0].isnan().any(), i


def test_infinity_stays_infinity_in_the_backward_of_up():
    for side in (8, 13):
        for i in range(side):
            coarse = torch.zeros(1, 1, half(side), half(side), requires_grad=True)
            grad = torch.zeros(1, 1, side, side)
            grad[0, 0, i, i] = math.inf
            got = torch.autograd.grad(upsample(coarse, side, side, impl="extension"), coarse, grad)[0]
            assert got.isinf().any()
            assert not got.isnan().any(), i


def test_overflow_and_subnormals_round_as_eager_does():
    for dtype in (BF16, F16):
        top, least = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        y = torch.full((2, 1, 3, 10), top, dtype=dtype)
        out = upsample_add(y[..., :2, :5], y, torch.tensor([1.0, -1.0]), impl="extension")
        assert (out[0] == math.inf).all()
        assert (out[1] == 0).all()
        tiny = torch.zeros(1, 1, 2, 20, dtype=dtype)
        tiny[..., 0, :] = least
        tiny[..., 1, ::4] = least  # means of 2, 3 and 4 quarters: half to even 0, then up
        got = build_pyramid(tiny, 2, impl="extension")[1]
        exact = build_pyramid(tiny.double(), 2, impl="reference")[1]
        assert torch.equal(got, exact.to(dtype))
        assert got.any()


# --- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("size", [(2, 1, 4, 4), (1, 2, 3, 5), (2, 1, 1, 2)], ids=str)
def test_gradients_and_second_derivatives_in_float64(name, size):
    for alpha in (0.5, 0.6) if name == "build_pyramid" else (0.5,):
        call, takes = calls(size, alpha, levels=3)[name]
        images = [v.requires_grad_() for v in images_for(takes, size, F64, margins=False).values()]
        assert torch.autograd.gradcheck(lambda *v, call=call: call("extension", *v), images)
        assert torch.autograd.gradgradcheck(lambda *v, call=call: call("extension", *v), images)


@pytest.mark.parametrize("name", LINEAR)
def test_a_square_s_second_derivative_is_exact(name):
    """The operations are linear, so of sum(f(x)^2) / 2 it is f's adjoint after f: not zero."""
    call, takes = calls((2, 2, 7, 10))[name]
    images = {n: v.requires_grad_() for n, v in images_for(takes, (2, 2, 7, 10), F64, margins=False).items()}
    found = {}
    for impl in ("extension", "reference"):
        out = call(impl, **images)
        loss = sum(o.square().sum() / 2 for o in (out if isinstance(out, list) else [out]))
        first = torch.autograd.grad(loss, list(images.values()), create_graph=True)
        found[impl] = torch.autograd.grad(sum(g.square().sum() for g in first), list(images.values()))
    for a, b in zip(found["extension"], found["reference"], strict=True):
        assert a.any()
        torch.testing.assert_close(a, b, rtol=1e-5 if "drawn" in name else 1e-10, atol=1e-5 if "drawn" in name else 0)


@pytest.mark.parametrize("name", LINEAR)
def test_only_gradients_asked_for_are_there(name):
    size = (2, 2, 9, 8)
    call, takes = calls(size)[name]
    images = images_for(takes, size)
    whole = run(call, images, "extension")[1]
    for wanted in product((False, True), repeat=len(takes)):
        needs = [n for n, want in zip(takes, wanted, strict=True) if want]
        leaves = {n: v.detach().requires_grad_(n in needs) for n, v in images.items()}
        out = call("extension", **leaves)
        out = out if isinstance(out, list) else [out]
        assert all(o.requires_grad == bool(needs) for o in out)
        if needs:
            torch.autograd.backward(out, [image(o.shape, F32, 9 + i, margins=False) for i, o in enumerate(out)])
        for n, leaf in leaves.items():
            if n in needs:
                assert torch.equal(leaf.grad, whole[n]), n
            else:
                assert leaf.grad is None, n


@pytest.mark.parametrize("wanted", list(product((False, True), repeat=3)), ids=str)
def test_the_backward_operation_computes_only_what_is_asked_for(wanted):
    grad, abar = image((2, 2, 9, 8)), vector(2)
    with poisoned():
        got = iter(OPS.merge_backward(grad, abar, None, *wanted))
        whole = OPS.merge_backward(grad, abar, None, True, True, True)
    for want, expected in zip(wanted, whole, strict=True):
        if want:
            assert torch.equal(next(got), expected)
    assert next(got, None) is None
    if any(wanted):
        small = image((2, 1, 3, 4), F64, margins=False).requires_grad_()
        assert torch.autograd.gradcheck(lambda g: OPS.merge_backward(g, abar.double(), None, *wanted), [small])


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("alpha", [0.5, 0.75])
def test_a_loss_on_one_level_alone(level, alpha):
    x = image((2, 2, 13, 10)).requires_grad_()
    found = [
        torch.autograd.grad(build_pyramid(x, 4, alpha=alpha, impl=i)[level].sum(), x)[0]
        for i in ("extension", "reference")
    ]
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-6)


def test_a_gradient_for_abar_weight_or_the_error_runs_the_reference(monkeypatch):
    monkeypatch.setattr(_extension, "_warned", set())
    y, coarse, v = image((2, 1, 4, 4)), image((2, 1, 2, 2)), vector(2).requires_grad_()
    wanting = y.clone().requires_grad_()
    for call, reason in (
        (lambda impl: merge_state(y, y, coarse, v, impl=impl), "abar needs a gradient"),
        (lambda impl: upsample_add(coarse, y, v, impl=impl), "weight needs a gradient"),
        (lambda impl: level_error(wanting, coarse, impl=impl), "x needs a gradient"),
        (lambda impl: level_error(y, wanting[..., ::2, ::2], impl=impl), "coarse needs a gradient"),
    ):
        with pytest.raises(BackendError, match=reason):
            call("extension")
        with pytest.warns(UserWarning, match=reason) as told:
            out = [call(None) for _ in range(2)]
        assert len(told) == 1
        out[0].sum().backward()
        assert torch.equal(out[0], call("reference"))
    assert v.grad.any()
    assert wanting.grad.any()


# --- layouts -----------------------------------------------------------------------------------


def expanded(v, dim):
    return v.narrow(dim, 0, 1).expand(v.shape)


def wrapped(v, *slices, pad):
    """The same values as a part of a larger image that is NaN elsewhere."""
    whole = torch.full([s + p for s, p in zip(v.shape, pad, strict=True)], math.nan, dtype=v.dtype)
    part = whole[slices]
    part.copy_(v)
    return part


LAYOUTS = {
    "transposed": lambda v: v.mT.contiguous().mT,
    "channels last": lambda v: v.to(memory_format=torch.channels_last),
    "batch and channel swapped": lambda v: v.transpose(0, 1).contiguous().transpose(0, 1),
    "some rows": lambda v: wrapped(v, ..., slice(2, -1), slice(None), pad=(0, 0, 3, 0)),
    "some columns": lambda v: wrapped(v, ..., slice(3, -2), pad=(0, 0, 0, 5)),
    "every second column": lambda v: torch.stack([v, torch.full_like(v, math.nan)], -1).flatten(3)[..., ::2],
    "every second row": lambda v: torch.stack([v, torch.full_like(v, math.nan)], 3).flatten(2, 3)[:, :, ::2],
    "at an odd offset": lambda v: torch.cat([v.new_full((3,), math.nan), v.flatten()])[3:].view(v.shape),
    "expanded batch": lambda v: expanded(v, 0),
    "expanded channel": lambda v: expanded(v, 1),
    "expanded row": lambda v: expanded(v, 2),
    "expanded column": lambda v: expanded(v, 3),
}


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_the_same_bits_as_dense_memory(layout, dtype):
    size = (3, 2, 11, 18)
    for name, alpha in [(n, 0.5) for n in ALL] + [("build_pyramid", 0.6)]:
        call, takes = calls(size, alpha)[name]
        needs = () if name == "level_error" else None
        laid = {n: LAYOUTS[layout](v) for n, v in images_for(takes, size, dtype, margins=False).items()}
        dense = {n: v.clone(memory_format=torch.contiguous_format) for n, v in laid.items()}
        assert not any(v.isnan().any() for v in dense.values())
        assert layout == "at an odd offset" or not any(v.is_contiguous() for v in laid.values())
        same(run(call, laid, "extension", needs), run(call, dense, "extension", needs))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_s_layout_changes_no_bit(layout):
    size = (3, 2, 11, 18)
    for name, alpha in [(n, 0.5) for n in LINEAR] + [("build_pyramid", 0.6)]:
        call, takes = calls(size, alpha, levels=2)[name]
        leaves = [v.requires_grad_() for v in images_for(takes, size).values()]
        out = call("extension", *leaves)
        out = out[0] if isinstance(out, list) else out
        grad = LAYOUTS[layout](image(out.shape, margins=False))
        dense = grad.clone(memory_format=torch.contiguous_format)
        a, b = (torch.autograd.grad(out, leaves, g, retain_graph=True) for g in (grad, dense))
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_vectors_may_have_any_layout_and_width():
    y, coarse = image((3, 1, 4, 6)), image((3, 1, 2, 3))
    v, ids = vector(3), torch.tensor([5, -1, 2**40])
    strided = torch.stack([v, v + 1], 1)[:, 0]
    many = torch.stack([ids, ids + 1], 1)[:, 0]
    draw = dict(rng=RNG, impl="extension")
    plain = merge_state(y, None, coarse, v, sample_ids=ids, **draw)
    for other in (strided, v.double()):
        assert torch.equal(merge_state(y, None, coarse, other, sample_ids=many, **draw), plain)
    one = v[:1].expand(3)
    expected = upsample_add(coarse, y, one.contiguous(), impl="extension")
    assert torch.equal(upsample_add(coarse, y, one, impl="extension"), expected)


def test_offsets_beyond_two_to_the_31():
    """Memory is reserved, not touched, but for the few pixels of an image spread over it."""
    far = 2**31 + 64
    whole = torch.empty(far + 4096, dtype=BF16)
    for strides in ((far, 64, 8, 1), (64, far, 8, 1)):
        x = whole.as_strided((2, 2, 6, 8), strides)
        x.copy_(image(x.shape, BF16, margins=False))
        small = whole.as_strided((2, 2, 3, 4), tuple(s + 512 if s == far else s for s in strides), 2048)
        small.copy_(image(small.shape, BF16, seed=1, margins=False))
        a, b = build_pyramid(x, 3, impl="extension"), build_pyramid(x.contiguous(), 3, impl="extension")
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
        merged = merge_state(x, x, small, vector(2), impl="extension")
        assert torch.equal(merged, merge_state(x.clone(), x.clone(), small.clone(), vector(2), impl="extension"))
    tall = whole.as_strided((1, 1, 2, 8), (0, 0, far, 1))
    tall.copy_(image(tall.shape, BF16, margins=False))
    for left, right in ((tall, tall.clone()),):
        assert torch.equal(build_pyramid(left, 2, impl="extension")[1], build_pyramid(right, 2, impl="extension")[1])
        assert torch.equal(upsample(left, 4, 15, impl="extension"), upsample(right, 4, 15, impl="extension"))
        for p, q in zip(
            *(OPS.merge_backward(g, vector(1), None, True, True, True) for g in (left, right)), strict=True
        ):
            assert torch.equal(p, q)


# --- the same bits, whoever computes them --------------------------------------------------------

# Large enough that work is split (in_parallel gives a thread at least 32768 elements), small, and narrow.
BITS = [(2, 3, 130, 257), (1, 1, 1, 37), (3, 5, 7, 3), (1, 2, 9, 64)]


def digests():
    """One hash per operation and type, of results and gradients: what must not depend on threads or processor."""
    found = {}
    for dtype in (F32, BF16, F16, F64):
        for name, alpha in [(n, 0.5) for n in ALL] + [("build_pyramid", a) for a in (0.02, 0.3, 0.6, 0.9)]:
            digest = hashlib.sha256()
            for size in BITS:
                call, takes = calls(size, alpha)[name]
                got = run(call, images_for(takes, size, dtype), "extension", () if name == "level_error" else None)
                for t in (*got[0], *got[1].values()):
                    digest.update(t.contiguous().view(torch.uint8).numpy().tobytes())
            found[f"{name} {alpha} {dtype}"] = digest.hexdigest()[:16]
        for shape in ((1, 2, 40, 33, 50), (2, 1, 3, 4, 5)):
            x = image(shape, dtype)
            bands = haar3d(x, impl="extension")
            back = inverse_haar3d(bands, shape=shape[2:], impl="extension")
            for what, t in (("haar3d", bands), ("inverse_haar3d", back)):
                found[f"{what} {shape} {dtype}"] = hashlib.sha256(t.view(torch.uint8).numpy().tobytes()).hexdigest()[
                    :16
                ]
    ids = torch.tensor([3, -8, 2**35])
    for draw in (_philox.normals, _philox.integers):
        t = draw(ids, 40_007, rng=RNG, stream=3)
        found[draw.__name__] = hashlib.sha256(t.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
    return found


@pytest.fixture(scope="module")
def these_digests():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield digests()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("threads", [2, 5])
def test_the_number_of_threads_changes_no_bit(threads, these_digests):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert digests() == these_digests
    finally:
        torch.set_num_threads(before)


# Fresh memory holds another byte in each, so that work space read before it is written shows too.
@pytest.mark.parametrize(("isa", "byte"), [("generic", 128), ("avx2", 64), ("avx512", 200)])
def test_the_instruction_set_changes_no_bit(isa, byte, these_digests):
    code = (
        "import torch, json, test_pyramid_extension as t; torch.set_num_threads(1);"
        "print(json.dumps([t._extension.status()[1]['cpu'], t.digests()]))"
    )
    here = Path(__file__).resolve().parent
    env = {**os.environ, "PHMDIFF_ISA": isa, "MALLOC_PERTURB_": str(byte), "MALLOC_MMAP_THRESHOLD_": str(2**30),
           "PYTHONPATH": os.pathsep.join([str(here), *sys.path])}  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True, cwd=here
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    ran_on, found = json.loads(ran.stdout.strip().splitlines()[-1])
    if ran_on != isa:
        pytest.skip(f"this processor or build has no {isa}")
    assert found == these_digests


@pytest.mark.parametrize("dtype", [F32, BF16], ids=lambda t: str(t)[6:])
def test_outputs_written_past_the_caches_have_the_same_bits(dtype):
    """From 32 MiB on; a sample alone is smaller. Odd widths, so rows begin anywhere in a line."""
    size = (3, 1, 1201, 2401) if dtype == F32 else (3, 2, 1201, 2401)
    abar, ids = vector(3), torch.tensor([5, 1, 9])
    leaf = image(size, dtype, margins=False).requires_grad_()
    small = image((*size[:2], half(size[2]), half(size[3])), dtype, seed=1, margins=False).requires_grad_()
    assert leaf.numel() * leaf.element_size() >= 2**25 > leaf[0].numel() * leaf.element_size()

    def outcome(rows):
        y, coarse = leaf[rows], small[rows]
        drawn = merge_state(y, None, coarse, abar[rows], rng=RNG, sample_ids=ids[rows], impl="extension")
        levels = build_pyramid(y, 3, impl="extension")[1:]
        fine = build_pyramid(y, 2, alpha=0.9, impl="extension")[1:]
        bands = haar3d(y.unflatten(3, (7, -1)), impl="extension")
        back = inverse_haar3d(bands, shape=(1201, 7, 343), impl="extension")
        out = [drawn, *levels, *fine, bands, back]
        with poisoned():
            grads = torch.autograd.grad(out, [y, coarse], [o.detach() for o in out])
        return [o.detach() for o in (*out, *grads)]

    whole = outcome([0, 1, 2])
    for n in range(3):
        assert all(torch.equal(a[n : n + 1], b) for a, b in zip(whole, outcome([n]), strict=True))


@pytest.mark.parametrize("name", ALL)
def test_no_bit_depends_on_a_sample_s_neighbours(name):
    """Split or reordered batches; the drawn noise goes by sample id."""
    size, order = (4, 2, 13, 18), [2, 0, 3, 1]
    abar, ids, needs = vector(4), torch.tensor([7, -3, 2**34, 0]), () if name == "level_error" else None

    def call(rows):
        def of(impl, **v):
            draw = dict(rng=RNG, sample_ids=ids[rows], stream=2, impl=impl)
            if name == "build_pyramid":
                return build_pyramid(v["x"], 4, impl=impl)[1:]
            if name == "upsample":
                return upsample(v["coarse"], *size[2:], impl=impl)
            if name == "upsample_add":
                return upsample_add(v["coarse"], v["x"], abar[rows], impl=impl)
            if name == "level_error":
                return level_error(v["x"], v["coarse"], impl=impl)
            if "drawn" in name:
                return merge_state(v["y"], None, v.get("coarse"), abar[rows], **draw)
            return merge_state(v["y"], v["eps"], v.get("coarse"), abar[rows], impl=impl)

        return of

    images = images_for(calls(size)[name][1], size, margins=False)
    whole_images = {n: v.clone().requires_grad_(needs is None) for n, v in images.items()}

    def outcome(rows):
        leaves = [v[rows] for v in whole_images.values()]
        out = call(rows)("extension", **dict(zip(whole_images, leaves, strict=True)))
        out = out if isinstance(out, list) else [out]
        grads = [] if needs == () else torch.autograd.grad(out, leaves, [o.detach() for o in out])
        return [*(o.detach() for o in out), *grads]

    whole = outcome([0, 1, 2, 3])
    assert all(torch.equal(a[order], b) for a, b in zip(whole, outcome(order), strict=True))
    parts = [outcome([n]) for n in range(4)]
    assert all(torch.equal(a, torch.cat(p)) for a, p in zip(whole, zip(*parts, strict=True), strict=True))


@pytest.mark.parametrize(("height", "width"), [(5, 7), (1, 1), (3, 514), (8, 259), (2, 4)])
def test_noise_drawn_while_merging_is_that_of_normals(height, width):
    ids, y = torch.tensor([9, -(2**40)]), torch.zeros(2, 3, height, width)
    drawn = merge_state(y, None, None, torch.zeros(2), rng=RNG, sample_ids=ids, stream=4, impl="extension")
    assert torch.equal(drawn.flatten(1), _philox.normals(ids, 3 * height * width, rng=RNG, stream=4))
    held = tuple(torch.tensor(part) for part in RNG)
    again = merge_state(y, None, None, torch.zeros(2), rng=held, sample_ids=ids, stream=4, impl="extension")
    assert torch.equal(drawn, again)
    given_ = merge_state(y, drawn, None, torch.zeros(2), impl="extension")
    assert torch.equal(drawn, given_)


# --- how it is called ----------------------------------------------------------------------------


def op_arguments():
    x, eps = image((2, 3, 13, 9)).requires_grad_(), image((2, 3, 13, 9), seed=1).requires_grad_()
    coarse, v, ids = image((2, 3, 7, 5), seed=2).requires_grad_(), vector(2), torch.tensor([1, -5])
    held = torch.tensor(5), torch.tensor(7)
    levels = [image((2, 3, 7, 5)).requires_grad_(), image((2, 3, 4, 3)).requires_grad_()]
    return [
        ("build_pyramid", (x, 3, 0.5)),
        ("build_pyramid", (x, 2, 0.6)),
        ("build_pyramid_backward", (levels, 13, 9, 0.5)),
        ("merge_state", (x, eps, coarse, v, None, 0, 0, None, None, 0)),
        ("merge_state", (x, None, coarse, v, ids, 5, 7, None, None, 1)),
        ("merge_state", (x, None, None, v, ids, 0, 0, *held, 1)),
        ("upsample_add", (coarse, x, v, 13, 9)),
        ("upsample_add", (coarse, None, None, 13, 9)),
        ("level_error", (x.detach(), coarse.detach())),
        ("merge_backward", (x, v, None, True, True, True)),
        ("merge_backward", (x, v, None, False, True, False)),
        ("merge_backward", (x, None, v, False, False, True)),
        ("haar3d", (image((2, 3, 5, 4, 3)).requires_grad_(),)),
        ("inverse_haar3d", (image((2, 8, 3, 3, 2, 2)).requires_grad_(), 5, 4, 3)),
        ("philox_normals", (ids, 17, 5, 7, None, None, 1)),
        ("philox_integers", (ids, 17, 0, 0, *held, 1)),
    ]


@pytest.mark.parametrize("number", range(len(op_arguments()) if not _extension.problem() else 0))
def test_registered_operations_pass_opcheck(number):
    name, arguments = op_arguments()[number]
    opcheck(getattr(OPS, name).default, arguments)


def test_every_operation_of_the_library_is_checked_above():
    text = (Path(_pyramid_ops.__file__).resolve().parent.parent / "csrc" / "bind.cpp").read_text()
    defined = {line.split('m.def("')[1].split("(")[0] for line in text.splitlines() if "m.def(" in line}
    assert {name for name, _ in op_arguments()} == defined


def everything(y, coarse, ids, abar, seed, step):
    levels = build_pyramid(y, 3, impl="extension")
    fine = build_pyramid(y, 3, alpha=0.75, impl="extension")
    up = upsample(coarse, *y.shape[2:], impl="extension")
    state = merge_state(y, None, coarse, abar, rng=(seed, step), sample_ids=ids, impl="extension")
    state = state + upsample_add(coarse, y, abar, impl="extension") * level_error(
        y.detach(), coarse.detach(), impl="extension"
    )
    bands = haar3d(y[..., None, :], impl="extension")
    back = inverse_haar3d(2 * bands, shape=(y.shape[2], 1, y.shape[3]), impl="extension")[..., 0, :]
    return (state + up + back * y).sum() + sum(level.sum() for level in levels + fine)


def test_compiled_in_one_graph_for_any_size_seed_and_step():
    torch._dynamo.reset()
    counter, traced = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(everything, fullgraph=True, dynamic=True, backend=counter)

    def outcomes(f, size, seed, step):
        y = image(size, margins=False).requires_grad_()
        coarse = image((*size[:2], half(size[2]), half(size[3])), seed=1, margins=False).requires_grad_()
        out = f(y, coarse, torch.arange(size[0]), vector(size[0]), seed, step)
        return [out.detach(), *torch.autograd.grad(out, [y, coarse])]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, (size, seed, step) in enumerate(
            [((2, 3, 13, 10), 5, 9), ((2, 3, 13, 10), 6, 9), ((2, 3, 13, 10), 2**62, 10), ((3, 2, 31, 24), 7, 3)]
        ):
            for a, b in zip(outcomes(compiled, size, seed, step), outcomes(everything, size, seed, step), strict=True):
                torch.testing.assert_close(a, b)
            # The first call may trace twice: alpha's default is tried as a variable first.
            traced.append(counter.frame_count)
            assert traced[-1] == traced[0], number
    torch._dynamo.reset()


def test_fake_tensors_have_the_shapes_of_real_ones():
    for name, alpha in [(n, 0.5) for n in ALL] + [("build_pyramid", 0.3)]:
        call, takes = calls((2, 3, 11, 15), alpha)[name]
        real = call("extension", **images_for(takes, (2, 3, 11, 15), BF16))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = call(
                "extension", **{n: mode.from_tensor(v) for n, v in images_for(takes, (2, 3, 11, 15), BF16).items()}
            )
        for a, b in zip(*(o if isinstance(o, list) else [o] for o in (real, fake)), strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ALL)
def test_vmap_gives_what_a_loop_gives(name):
    size = (2, 3, 9, 8)
    call, takes = calls(size)[name]
    sets = [images_for(takes, size), {n: v + 1 for n, v in images_for(takes, size).items()}]
    stacked = [torch.stack([s[n] for s in sets]) for n in takes]
    got = torch.vmap(lambda *v: call("extension", *v))(*stacked)
    loop = [call("extension", **{n: s[n] for n in takes}) for s in sets]
    for level, expected in enumerate(zip(*(o if isinstance(o, list) else [o] for o in loop), strict=True)):
        assert torch.equal(got[level] if isinstance(loop[0], list) else got, torch.stack(expected))


def test_forward_mode_gives_no_silent_zero():
    import torch.autograd.forward_ad as forward

    for name in LINEAR:
        call, takes = calls((1, 1, 4, 6))[name]
        images = images_for(takes, (1, 1, 4, 6))
        with forward.dual_level():
            try:
                out = call("extension", **{n: forward.make_dual(v, torch.ones_like(v)) for n, v in images.items()})
            except (RuntimeError, NotImplementedError):
                continue
            out = out[0] if isinstance(out, list) else out
            assert forward.unpack_dual(out).tangent is not None, name


def test_the_extension_is_what_runs_unless_told_otherwise(monkeypatch):
    seen = []

    class Watched:
        def __getattr__(self, op):
            seen.append(op)
            return getattr(OPS, op)

    monkeypatch.setattr(_pyramid_ops, "ops", Watched())
    y, coarse, v = image((2, 1, 6, 6)), image((2, 1, 3, 3)), vector(2)
    for impl, expected in ((None, ["build_pyramid", "merge_state", "upsample_add", "upsample_add", "level_error"]),
                           ("reference", [])):  # fmt: skip
        seen.clear()
        build_pyramid(y, 2, impl=impl)
        merge_state(y, y, coarse, v, impl=impl)
        upsample(coarse, 6, 6, impl=impl)
        upsample_add(coarse, y, v, impl=impl)
        level_error(y, coarse, impl=impl)
        assert seen == expected


# --- wrong arguments ---------------------------------------------------------------------------

Y, C = torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 2, 2)
V, IDS = torch.ones(2), torch.zeros(2, dtype=torch.int64)
META = torch.zeros(2, 1, 4, 4, device="meta")


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda i: build_pyramid(Y[0], 2, impl=i), ValueError, "x must be"),
        (lambda i: build_pyramid(Y.long(), 2, impl=i), TypeError, "x must be floating"),
        (lambda i: build_pyramid(Y, 2, alpha=1.0, impl=i), ValueError, "alpha"),
        (lambda i: build_pyramid(Y, 2, alpha=0.0, impl=i), ValueError, "alpha"),
        (lambda i: build_pyramid(Y[..., :0], 2, impl=i), ValueError, "x has no pixels"),
        (lambda i: upsample(C, 5, 4, impl=i), ValueError, "coarse"),
        (lambda i: upsample(C, 4, 5, impl=i), ValueError, "coarse"),
        (lambda i: upsample(C[0], 4, 4, impl=i), ValueError, "coarse"),
        (lambda i: merge_state(Y, Y[..., :3], C, V, impl=i), ValueError, "eps"),
        (lambda i: merge_state(Y, Y[:1], C, V, impl=i), ValueError, "eps"),
        (lambda i: merge_state(Y, Y.double(), C, V, impl=i), TypeError, "eps is float64"),
        (lambda i: merge_state(Y, Y, C.half(), V, impl=i), TypeError, "coarse is float16"),
        (lambda i: merge_state(Y, Y, C[..., :1], V, impl=i), ValueError, "coarse"),
        (lambda i: merge_state(Y, Y, C[:1], V, impl=i), ValueError, "coarse"),
        (lambda i: merge_state(Y, Y, C, V[:1], impl=i), ValueError, "abar"),
        (lambda i: merge_state(Y, Y, C, V[:, None], impl=i), ValueError, "abar"),
        (lambda i: merge_state(Y, None, C, V, impl=i), ValueError, "eps"),
        (lambda i: merge_state(Y, Y, C, V, rng=(1, 2), sample_ids=IDS, impl=i), ValueError, "eps"),
        (lambda i: merge_state(Y, None, C, V, rng=(1, 2), impl=i), ValueError, "sample_ids"),
        (lambda i: merge_state(Y, None, C, V, rng=(1, 2), sample_ids=IDS[:1], impl=i), ValueError, "sample_ids"),
        (lambda i: upsample_add(C, Y[..., :3, :2], V, impl=i), ValueError, "coarse"),
        (lambda i: upsample_add(C, Y.bfloat16(), V, impl=i), TypeError, "coarse is float32"),
        (lambda i: upsample_add(C, Y, V[:1], impl=i), ValueError, "weight"),
        (lambda i: level_error(Y, C[..., :1], impl=i), ValueError, "coarse"),
        (lambda i: level_error(Y, C.double(), impl=i), TypeError, "coarse is float64"),
        (lambda i: upsample_add(C, META, V, impl=i), ValueError, "coarse is on cpu"),
        (lambda i: merge_state(Y, META, None, V, impl=i), ValueError, "eps is on meta"),
        (lambda i: merge_state(Y, Y, None, V.to("meta"), impl=i), ValueError, "abar is on meta"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("impl", [None, "extension", "reference"])
def test_wrong_arguments_are_named(call, kind, message, impl):
    with pytest.raises(kind, match=message):
        call(impl)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OPS.build_pyramid(Y[0], 1, 0.5), "B, C, H, W"),
        (lambda: OPS.build_pyramid(Y, 0, 0.5), "levels"),
        (lambda: OPS.build_pyramid(Y, 25, 0.5), "levels"),
        (lambda: OPS.build_pyramid(Y, 1, math.nan), "alpha"),
        (lambda: OPS.build_pyramid(Y, 1, 1.5), "alpha"),
        (lambda: OPS.build_pyramid(Y[:, :, :0], 1, 0.5), "no pixels"),
        (lambda: OPS.build_pyramid(Y.int(), 1, 0.5), "element type"),
        (lambda: OPS.build_pyramid_backward([], 4, 4, 0.5), "no tensor arguments"),
        (lambda: OPS.build_pyramid_backward([C, C], 4, 4, 0.5), "gradient 1"),
        (lambda: OPS.build_pyramid_backward([C, C[..., :1, :1].double()], 4, 4, 0.5), "element type"),
        (lambda: OPS.build_pyramid_backward([C[0]], 4, 4, 0.5), "B, C, H, W"),
        (lambda: OPS.merge_state(Y, Y[..., :3], None, V, None, 0, 0, None, None, 0), "eps"),
        (lambda: OPS.merge_state(Y, Y.half(), None, V, None, 0, 0, None, None, 0), "eps"),
        (lambda: OPS.merge_state(Y, Y, None, V, IDS, 0, 0, None, None, 0), "eps"),
        (lambda: OPS.merge_state(Y, None, None, V, IDS[:1], 0, 0, None, None, 0), "sample_ids"),
        (lambda: OPS.merge_state(Y, None, None, V, V, 0, 0, None, None, 0), "sample_ids"),
        (lambda: OPS.merge_state(Y, None, None, V, IDS, 0, 0, V[0], None, 0), "seed"),
        (lambda: OPS.merge_state(Y, None, None, V, IDS, 0, 0, None, IDS, 0), "seed and step"),
        (lambda: OPS.merge_state(Y, None, C[..., :1], V, None, 0, 0, None, None, 0), "coarse"),
        (lambda: OPS.merge_state(Y, None, C.double(), V, None, 0, 0, None, None, 0), "coarse"),
        (lambda: OPS.merge_state(Y, None, None, V[:1], None, 0, 0, None, None, 0), "abar"),
        (lambda: OPS.merge_state(Y, None, None, V.double(), None, 0, 0, None, None, 0), "abar"),
        (lambda: OPS.merge_state(Y, None, None, V[:1].expand(2), None, 0, 0, None, None, 0), "abar"),
        (lambda: OPS.upsample_add(C, Y[..., :3, :], None, 4, 4), "x must be"),
        (lambda: OPS.upsample_add(C, None, None, 6, 4), "coarse"),
        (lambda: OPS.upsample_add(C[0], None, None, 4, 4), "B, C, H, W"),
        (lambda: OPS.upsample_add(C, Y, V[:1], 4, 4), "weight"),
        (lambda: OPS.level_error(Y, C[:1]), "coarse"),
        (lambda: OPS.merge_backward(Y[0], V, None, True, True, True), "B, C, H, W"),
        (lambda: OPS.merge_backward(Y, V[:1], None, True, True, True), "abar"),
        (lambda: OPS.merge_backward(Y, None, V[:1], True, True, True), "weight"),
        (lambda: OPS.philox_normals(IDS, -1, 0, 0, None, None, 0), "numbers"),
        (lambda: OPS.philox_integers(IDS, 2**32 + 1, 0, 0, None, None, 0), "numbers"),
        (lambda: OPS.philox_normals(IDS, 2**34 + 1, 0, 0, None, None, 0), "numbers"),
        (lambda: OPS.philox_normals(IDS.int(), 1, 0, 0, None, None, 0), "sample_ids"),
        (lambda: OPS.philox_normals(IDS[:1].expand(2), 1, 0, 0, None, None, 0), "sample_ids"),
    ],
)  # fmt: skip
def test_operations_called_with_wrong_arguments_say_so(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


def test_sample_ids_that_are_no_integers_are_named():
    with pytest.raises(TypeError, match="sample_ids"):
        merge_state(Y, None, None, V, rng=(1, 2), sample_ids=V, impl="extension")


def test_images_of_another_rank_are_refused_by_the_operations():
    for bad in (Y[0], Y[0, 0], Y[None]):
        for call in (lambda bad=bad: OPS.merge_state(bad, None, None, V, None, 0, 0, None, None, 0),
                     lambda bad=bad: OPS.level_error(bad, C),
                     lambda bad=bad: OPS.upsample_add(C, bad, None, 4, 4)):  # fmt: skip
            with pytest.raises(RuntimeError):
                call()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [(0, 3, 6, 5), (3, 0, 6, 5), (0, 0, 1, 1)], ids=str)
def test_empty_batches_give_empty_results_and_gradients(name, size):
    for alpha in (0.5, 0.75):
        check_empty(name, size, alpha, levels=4)


def test_no_rows_or_columns_merge_to_nothing():
    for size in ((2, 1, 0, 4), (2, 1, 4, 0)):
        y, coarse = torch.zeros(size), torch.zeros(2, 1, half(size[2]), half(size[3]))
        assert merge_state(y, y, coarse, V, impl="extension").shape == size
        assert [g.shape for g in OPS.merge_backward(y, V, None, True, False, True)] == [y.shape, coarse.shape]
