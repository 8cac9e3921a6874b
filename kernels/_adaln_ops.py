"""What torch.compile and autograd know of the extension's adaLN (csrc/adaln.cpp): shapes from a fake, gradients by
the backward operation, which has none itself. Arguments are checked in adaln.py, not here.
"""

from __future__ import annotations

import torch

from ._extension import problem

ops = torch.ops.phmdiff_fast


def _modulate_fake(x, shift, scale, cu_tokens, eps):
    return x.new_empty(x.shape, dtype=scale.dtype)


def _modulate_setup(ctx, inputs, output):
    x, _, scale, cu_tokens, ctx.eps = inputs
    ctx.save_for_backward(x, scale, cu_tokens)


def _modulate_backward(ctx, dy):
    x, scale, cu_tokens = ctx.saved_tensors
    needs = ctx.needs_input_grad[0], False, False, *ctx.needs_input_grad[1:3]
    dx, _, _, dshift, dscale = _gradients(dy, None, x, None, None, scale, cu_tokens, ctx.eps, needs)
    return dx, dshift, dscale, None, None


def _gated_fake(x, h, gate, shift, scale, cu_tokens, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=scale.dtype)


def _gated_setup(ctx, inputs, output):
    _, h, gate, _, scale, cu_tokens, ctx.eps = inputs
    h_needs, gate_needs = ctx.needs_input_grad[1:3]
    ctx.save_for_backward(output[0], h if gate_needs else None, gate if h_needs else None, scale, cu_tokens)
    ctx.set_materialize_grads(False)


def _gated_backward(ctx, dnew, dy):
    new, h, gate, scale, cu_tokens = ctx.saved_tensors
    needs = ctx.needs_input_grad[:5]
    return *_gradients(dy, dnew, new, h, gate, scale, cu_tokens, ctx.eps, needs), None, None


def _gradients(dy, dnew, x, h, gate, scale, cu_tokens, eps, needs):
    """Gradients of (x, h, gate, shift, scale); None where not needed or where nothing comes from behind."""
    if dy is None:
        needs = *needs[:3], False, False
    if (dy is None and dnew is None) or not any(needs):
        return [None] * 5
    given = iter(ops.adaln_backward_cpu(dy, dnew, x, h, gate, scale, cu_tokens, eps, *needs))
    return [next(given) if need else None for need in needs]


def _backward_fake(dy, dnew, x, h, gate, scale, cu_tokens, eps, *needs):
    vector = (x.shape[0] if cu_tokens is None else cu_tokens.shape[0] - 1, x.shape[-1])
    shapes = [(x.shape, x.dtype), (x.shape, scale.dtype), *[(vector, scale.dtype)] * 3]
    return [x.new_empty(shape, dtype=dtype) for (shape, dtype), need in zip(shapes, needs, strict=True) if need]


def _no_second(ctx, *grads):
    raise RuntimeError("adaLN of the extension has no second derivative; impl='reference' has")


def _nothing_kept(ctx, inputs, output):
    pass


if not problem():
    for _name, _fake, _backward, _setup in (
        ("adaln_modulate_cpu", _modulate_fake, _modulate_backward, _modulate_setup),
        ("gated_residual_adaln_cpu", _gated_fake, _gated_backward, _gated_setup),
        ("adaln_backward_cpu", _backward_fake, _no_second, _nothing_kept),
    ):
        torch.library.register_fake(f"phmdiff_fast::{_name}", _fake)
        torch.library.register_autograd(f"phmdiff_fast::{_name}", _backward, setup_context=_setup)
