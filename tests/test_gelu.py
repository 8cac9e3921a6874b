"""GELU in its tanh form: the equation, its error, what is not finite, how it is called."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from kernel_tools import in_margins, no_worse_than_eager

from phmdiff_fast.kernels import _extension
from phmdiff_fast.kernels import gelu as module
from phmdiff_fast.kernels._impl import BackendError
from phmdiff_fast.kernels.gelu import gelu

needs_extension = pytest.mark.skipif(
    bool(_extension.problem()), reason=_extension.problem() or "the extension is there"
)
IMPLS = ["reference", pytest.param("extension", marks=needs_extension)]
OPS = torch.ops.phmdiff_fast
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
each_type = pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])


def exact(x):
    """y and dy/dx in float64, by the logistic function: 1 + tanh would cancel there too."""
    x = x.double()
    z = math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)
    s, rest = torch.sigmoid(z), torch.sigmoid(-z)
    return x * s, s + x * s * rest * math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * x**2)


def both(x, impl, grad=None):
    x = x.detach().requires_grad_()
    y = gelu(x, impl=impl)
    return y.detach(), torch.autograd.grad(y, x, torch.ones_like(y) if grad is None else grad)[0]


@pytest.mark.parametrize("impl", IMPLS)
def test_it_is_its_equation(impl):
    x = torch.linspace(-6, 6, 1001)
    by_hand = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    torch.testing.assert_close(gelu(x, impl=impl), by_hand, atol=5e-7, rtol=0)
    y, slope = both(x, impl)
    for a, b in zip((y, slope), exact(x), strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-6, rtol=0)


def test_the_reference_s_gradient_is_of_any_order():
    x = torch.linspace(-3, 3, 13, dtype=F64).requires_grad_()
    assert torch.autograd.gradcheck(gelu, x)
    assert torch.autograd.gradgradcheck(gelu, x)


@needs_extension
def test_error_in_float32():
    """Of y: 2e-7 |x| and, as it does not cancel, 1e-5 |y| (1e-37 where that is all there is); of the slope 3e-7."""
    for low, high in ((-11, -8), (-8, -5), (-5, -3), (-3, -1), (-1, 0), (0, 1), (1, 3), (3, 11)):
        x = torch.linspace(low, high, 100_001)
        (y, slope), (true, true_slope) = both(x, "extension"), exact(x)
        assert ((y - true).abs() <= 2e-7 * x.abs() + 1e-37).all()
        assert ((y - true).abs() <= 1e-5 * true.abs() + 1e-37).all()
        assert ((slope - true_slope).abs() <= 3e-7).all()
        if high <= -3:
            assert ((slope - true_slope).abs() <= 1e-5 * true_slope.abs() + 5e-36).all()
        eager = F.gelu(x, approximate="tanh")
        assert (y - true).abs().max() <= 1.6 * (eager - true).abs().max() + 1e-37


@needs_extension
@each_type
def test_no_worse_than_eager(dtype):
    g = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 4.0):
        x = in_margins((torch.randn(257, 91, generator=g) * scale).to(dtype))
        grad = in_margins(torch.randn(x.shape, generator=g).to(dtype))
        true, slope = exact(x)
        for got, eager, right in zip(both(x, "extension", grad), both(x, "reference", grad),
                                     (true, slope * grad.double()), strict=True):  # fmt: skip
            no_worse_than_eager(got, eager, right)


@needs_extension
def test_every_bfloat16_value():
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(BF16)
    x = x[x.isfinite()]
    # The float32 result, rounded; and within a unit in the last place of what is right.
    (y, slope), (wide, wide_slope) = both(x, "extension"), both(x.float(), "extension")
    assert torch.equal(y, wide.to(BF16))
    assert torch.equal(slope, wide_slope.to(BF16))
    true, true_slope = exact(x)
    inside = x.double().abs() < 1e18  # whose cube is a number in float64, and product with 0
    for got, right in ((y, true), (slope, true_slope)):
        error = (got.double() - right).abs()[inside]
        assert (error <= right.abs()[inside] * 2**-8 + 5e-36).all()
    assert torch.equal(y[x > 20], x[x > 20])
    assert not y[x < -20].any()
    assert (slope[x > 20] == 1).all()
    assert not slope[x < -20].any()


@needs_extension
@each_type
def test_what_is_not_finite_or_huge_goes_to_its_limit(dtype):
    top = torch.finfo(dtype).max
    x = torch.tensor([math.inf, -math.inf, top, -top, 1e20, -1e20, 0.0, -0.0], dtype=dtype)
    y, slope = both(x, "extension")
    assert torch.equal(y, torch.tensor([math.inf, 0, top, 0, 1e20, 0, 0, 0], dtype=dtype))
    assert torch.equal(y.signbit(), torch.tensor([False, True] * 4))
    assert torch.equal(slope, torch.tensor([1, 0, 1, 0, 1, 0, 0.5, 0.5], dtype=dtype))
    for width in (1, 15, 16, 40, 67):
        for at in range(width):
            row = torch.zeros(width, dtype=dtype)
            row[at] = math.nan
            for got in both(row, "extension"):
                assert got.isnan().sum() == 1
                assert got[at].isnan()
            # A NaN from behind too.
            assert both(torch.ones(width, dtype=dtype), "extension", row)[1].isnan().sum() == 1


@needs_extension
@each_type
def test_no_bit_depends_on_place_or_layout(dtype):
    x = torch.linspace(-9, 9, 4 * 5 * 37).to(dtype).view(4, 5, 37)
    whole = both(x, "extension", x)
    for lay in (lambda v: v.mT.contiguous().mT, lambda v: torch.stack([v, v * math.nan], -1)[..., 0],
                lambda v: torch.cat([v.new_full((3,), math.nan), v.flatten()])[3:].view(v.shape)):  # fmt: skip
        for a, b in zip(both(lay(x), "extension", lay(x)), whole, strict=True):
            assert a.is_contiguous()
            assert torch.equal(a, b)
    one = [torch.stack(t) for t in zip(*(both(v, "extension", v) for v in x.flatten()), strict=True)]
    assert all(torch.equal(a, b.flatten()) for a, b in zip(one, whole, strict=True))
    wide = both(x[:1].expand(x.shape), "extension", x[:1].expand(x.shape))
    assert all(torch.equal(a[2], b[0]) for a, b in zip(wide, whole, strict=True))


@needs_extension
def test_any_shape_and_none():
    for shape in ((), (0,), (3, 0, 2), (1, 1, 1, 2, 3)):
        y, slope = both(torch.ones(shape), "extension")
        assert y.shape == slope.shape == shape
        assert ((y - 0.8411920).abs() < 1e-6).all()


@needs_extension
@each_type
def test_registered_operations_pass_opcheck(dtype):
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.library.opcheck(OPS.gelu.default, (x.clone().requires_grad_(),))
    torch.library.opcheck(OPS.gelu_backward.default, (x, x))


@needs_extension
def test_compiled_in_one_graph_for_any_size():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter, linear = CompileCounterWithBackend("aot_eager"), torch.nn.Linear(8, 8)

    def outcome(f, rows):
        x = torch.linspace(-2, 2, rows * 8).view(rows, 8).requires_grad_()
        with torch.autocast("cpu", BF16):
            y = f(x)
        return y, torch.autograd.grad(y.float().square().sum(), x)[0]

    def block(x):
        return gelu(linear(x))

    compiled, traced = torch.compile(block, fullgraph=True, dynamic=True, backend=counter), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for rows in (4, 7, 40):
            got, plain = outcome(compiled, rows), outcome(block, rows)
            assert got[0].dtype == BF16
            assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))
            traced.append(counter.frame_count)
    assert traced == traced[:1] * 3
    torch._dynamo.reset()


@needs_extension
def test_a_second_derivative_raises_and_forward_mode_takes_the_reference():
    x = torch.ones(3, requires_grad=True)
    first = torch.autograd.grad(gelu(x, impl="extension").sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(first.sum(), x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones(3))
        tangent = torch.autograd.forward_ad.unpack_dual(gelu(dual)).tangent
        torch.testing.assert_close(tangent.double(), exact(x.detach())[1])
        with pytest.raises(BackendError, match="forward-mode"):
            gelu(dual, impl="extension")


@needs_extension
def test_what_runs(monkeypatch):
    def never(x):
        raise AssertionError("the reference ran")

    monkeypatch.setattr(module, "gelu_reference", never)
    for dtype in (F32, BF16):
        x = torch.ones(3, dtype=dtype)
        with torch.autocast("cpu", BF16):
            assert torch.equal(gelu(x), gelu(x, impl="extension"))
            assert gelu(x).dtype == dtype
        with pytest.raises(AssertionError, match="the reference ran"):
            gelu(x, impl="reference")
    for x in (torch.ones(3, dtype=F64), torch.ones(3, dtype=F16), torch.ones(3, device="meta")):
        with pytest.raises(AssertionError, match="the reference ran"):
            gelu(x)
        with pytest.raises(BackendError, match=r"cannot run here: .*(float64|float16|meta)"):
            gelu(x, impl="extension")


def test_names_and_forced_implementations():
    with pytest.raises(ValueError, match="impl='fast' is unknown"):
        gelu(torch.ones(1), impl="fast")
    with pytest.raises(BackendError, match="gelu: impl='triton' cannot run here"):
        gelu(torch.ones(1), impl="triton")


def test_without_the_extension_the_reference_runs_and_says_so_once(monkeypatch):
    monkeypatch.setattr(_extension, "status", lambda: ("there is none", {}))
    monkeypatch.setattr(_extension, "_warned", set())
    x = torch.linspace(-2, 2, 9)
    with pytest.warns(UserWarning, match="gelu runs the slower reference path: there is none") as told:
        results = [gelu(x), gelu(x)]
    assert len(told) == 1
    assert all(torch.equal(y, gelu(x, impl="reference")) for y in results)
    with pytest.raises(BackendError, match="there is none"):
        gelu(x, impl="extension")


@needs_extension
def test_operations_called_with_wrong_arguments_say_so():
    x = torch.ones(2, 3)
    for call, message in ((lambda: OPS.gelu(x.double()), "float32 or bfloat16"),
                          (lambda: OPS.gelu_backward(x.bfloat16(), x), "another element type"),
                          (lambda: OPS.gelu_backward(x[:1], x), "shape of x")):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            call()
