"""The pyramid in the C++ extension against its definition in float64: values, rounding, NaN and infinity."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pyramid_tools import (
    ALL,
    ALPHAS,
    BF16,
    F16,
    F32,
    F64,
    SIZES,
    TYPES,
    calls,
    check_empty,
    compare,
    half,
    image,
    images_for,
    run,
    same,
)

from phmdiff_fast.kernels import _extension
from phmdiff_fast.pyramid import build_pyramid, level_error, merge_state, upsample, upsample_add

pytestmark = pytest.mark.skipif(bool(_extension.problem()), reason=_extension.problem() or "the extension is there")


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
