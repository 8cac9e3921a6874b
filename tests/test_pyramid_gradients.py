"""Gradients of the pyramid in the extension: second ones, subsets, and who gets none."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from pyramid_tools import (
    F32,
    F64,
    LINEAR,
    OPS,
    calls,
    image,
    images_for,
    poisoned,
    run,
    vector,
)

from phmdiff_fast.kernels import _extension
from phmdiff_fast.kernels._impl import BackendError
from phmdiff_fast.pyramid import build_pyramid, level_error, merge_state, upsample_add

pytestmark = pytest.mark.skipif(bool(_extension.problem()), reason=_extension.problem() or "the extension is there")


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
