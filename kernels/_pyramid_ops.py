"""What torch.compile and autograd know of the extension's operations (csrc/bind.cpp): shapes from a fake,
gradients from a formula. All are linear, so every backward is one of these operations too and has a backward
of its own: second derivatives are exact. Arguments are checked in pyramid.py and haar.py, not here.
"""

from __future__ import annotations

import math

import torch

from ._extension import problem

ops = torch.ops.phmdiff_fast


def half(n: int) -> int:
    return (n + 1) // 2


def side_below(side: int, alpha: float) -> int:
    """The side of the next coarser level."""
    return half(side) if alpha == 0.5 else max(1, math.ceil(alpha * side - 1e-9))


def _register(name: str, fake, backward=None, setup=None) -> None:
    torch.library.register_fake(f"phmdiff_fast::{name}", fake)
    if backward is not None:
        torch.library.register_autograd(f"phmdiff_fast::{name}", backward, setup_context=setup)


# --- build_pyramid -----------------------------------------------------------------------------


def _pyramid_fake(x, levels, alpha):
    height, width, out = x.shape[2], x.shape[3], []
    for _ in range(levels):
        height, width = side_below(height, alpha), side_below(width, alpha)
        out.append(x.new_empty(x.shape[0], x.shape[1], height, width))
    return out


def _pyramid_setup(ctx, inputs, output):
    x, _, ctx.alpha = inputs
    ctx.height, ctx.width = x.shape[2:]


def _pyramid_backward(ctx, grads):
    return ops.build_pyramid_backward(grads, ctx.height, ctx.width, ctx.alpha), None, None


def _pyramid_backward_fake(grads, height, width, alpha):
    return grads[0].new_empty(grads[0].shape[0], grads[0].shape[1], height, width)


def _pyramid_backward_setup(ctx, inputs, output):
    ctx.levels, ctx.alpha = len(inputs[0]), inputs[3]


def _pyramid_backward_backward(ctx, grad):
    return ops.build_pyramid(grad, ctx.levels, ctx.alpha), None, None, None


# --- merging -----------------------------------------------------------------------------------


def _merge_fake(y, eps, coarse, abar, *draw):
    return y.new_empty(y.shape)


def _merge_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[3])


def _merge_backward(ctx, grad):
    needs = list(ctx.needs_input_grad[:3])
    given = iter(ops.merge_backward(grad, ctx.saved_tensors[0], None, *needs) if any(needs) else ())
    return (*[next(given) if need else None for need in needs], *[None] * 7)


def _add_fake(coarse, x, weight, height, width):
    return coarse.new_empty(coarse.shape[0], coarse.shape[1], height, width)


def _add_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[2])


def _add_backward(ctx, grad):
    coarse, x = ctx.needs_input_grad[:2]
    down = ops.merge_backward(grad, None, ctx.saved_tensors[0], False, False, True)[0] if coarse else None
    return down, grad if x else None, None, None, None


def _adjoint_fake(grad, abar, weight, y, eps, coarse):
    small = (grad.shape[0], grad.shape[1], half(grad.shape[2]), half(grad.shape[3]))
    shapes = [(grad.shape, y), (grad.shape, eps), (small, coarse)]
    return [grad.new_empty(shape) for shape, asked in shapes if asked]


def _adjoint_setup(ctx, inputs, output):
    grad, abar, weight, *ctx.asked = inputs
    ctx.save_for_backward(abar, weight)
    ctx.like = grad.shape


def _adjoint_backward(ctx, grads):
    """The adjoint of the adjoint: what the forward makes of these, each in its image's place."""
    abar, weight = ctx.saved_tensors
    given = iter(grads)
    y, eps, coarse = (next(given) if asked else None for asked in ctx.asked)
    y = grads[0].new_zeros(ctx.like) if y is None else y
    if abar is None:  # y and eps have factor 1
        y = y if eps is None else y + eps
        return (y if coarse is None else ops.upsample_add(coarse, y, weight, *ctx.like[2:])), *[None] * 5
    return ops.merge_state(y, eps, coarse, abar, None, 0, 0, None, None, 0), *[None] * 5


def _error_fake(x, coarse):
    return x.new_empty(x.shape)


# --- Haar --------------------------------------------------------------------------------------


def _haar_fake(x):
    return x.new_empty(x.shape[0], 8, x.shape[1], *(half(n) for n in x.shape[2:]))


def _haar_setup(ctx, inputs, output):
    ctx.sides = inputs[0].shape[2:]


def _haar_backward(ctx, grad):
    return ops.inverse_haar3d(grad, *ctx.sides)


def _inverse_fake(bands, x, y, z):
    return bands.new_empty(bands.shape[0], bands.shape[2], x, y, z)


def _inverse_setup(ctx, inputs, output):
    pass


def _inverse_backward(ctx, grad):
    return ops.haar3d(grad), None, None, None


def _pyramid_vmap(info, in_dims, x, levels, alpha):
    """The mapped dimension goes into the batch; PyTorch's own fall-back knows no lists."""
    x = x.movedim(in_dims[0], 0)
    levels = ops.build_pyramid(x.flatten(0, 1), levels, alpha)
    return [level.unflatten(0, x.shape[:2]) for level in levels], [0] * len(levels)


def _pyramid_backward_vmap(info, in_dims, grads, height, width, alpha):
    dims = in_dims[0]
    grads = [
        g.movedim(d, 0) if d is not None else g.expand(info.batch_size, *g.shape)
        for g, d in zip(grads, dims, strict=True)
    ]
    size = grads[0].shape[:2]
    return ops.build_pyramid_backward([g.flatten(0, 1) for g in grads], height, width, alpha).unflatten(0, size), 0


if not problem():
    _register("build_pyramid", _pyramid_fake, _pyramid_backward, _pyramid_setup)
    _register("build_pyramid_backward", _pyramid_backward_fake, _pyramid_backward_backward, _pyramid_backward_setup)
    torch.library.register_vmap("phmdiff_fast::build_pyramid", _pyramid_vmap)
    torch.library.register_vmap("phmdiff_fast::build_pyramid_backward", _pyramid_backward_vmap)
    _register("merge_state", _merge_fake, _merge_backward, _merge_setup)
    _register("upsample_add", _add_fake, _add_backward, _add_setup)
    _register("merge_backward", _adjoint_fake, _adjoint_backward, _adjoint_setup)
    _register("level_error", _error_fake)
    _register("haar3d", _haar_fake, _haar_backward, _haar_setup)
    _register("inverse_haar3d", _inverse_fake, _inverse_backward, _inverse_setup)
