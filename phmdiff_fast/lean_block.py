"""A transformer block as one node of autograd, for a CPU: fewer launches, and half of what backward usually keeps.

On a CPU a small product takes no longer than autograd's own work around it, and the intermediate results of all
blocks are most of a step's memory. Here the whole block is one ``autograd.Function``: backward is written out, and
what an elementwise operation gives again (sums, norms, GELU), or attention from its projection, is computed again.
A token keeps, in numbers of 16 bits (D wide, MLP 4 D): the sum it came with 2 D, qkv 3 D, attention 1 D, the branches
2 D, the MLP's first product 4 D: 12 D; PyTorch's own autograd keeps 21 D and the N x N probabilities.

Limits: no second derivative, no functorch transforms; where the extension does not compute adaLN the plain block runs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .attention import attend, attend_backward, attend_packed
from .kernels import _extension
from .kernels.adaln import EPS, EXTENSION_TYPES
from .packing import Packing

ops = torch.ops.phmdiff_fast


def serves(x: Tensor, normed: Tensor) -> bool:
    """Whether a block on these tokens is to be run by ``lean_block``."""
    return (
        x.device.type == "cpu"
        and (x.dtype, normed.dtype) in EXTENSION_TYPES
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
        and not _extension.problem()
    )


class Narrow:
    """A layer's weight and bias in the type of the products, cast once for all the levels of a step.

    ``let_go`` at the end of a forward pass: then only the graph holds them, until its backward.
    """

    def __init__(self, layer: nn.Linear):
        self._layer, self._made, self._key = layer, None, None

    def __call__(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        parts = self._layer.weight, self._layer.bias
        if parts[0].dtype == dtype:
            return parts
        key = dtype, *((id(part), part._version) for part in parts)
        if key != self._key:
            self._made, self._key = tuple(part.to(dtype) for part in parts), key
        return self._made

    def let_go(self) -> None:
        self._made = self._key = None


def lean_block(
    x: Tensor, normed: Tensor, first: tuple[Tensor, Tensor], gate1: Tensor, shift2: Tensor, scale2: Tensor,
    gate2: Tensor, shift: Tensor, scale: Tensor, layers: list[Narrow], heads: int, packing: Packing | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``Block.forward``, see there. first : the shift and scale that made ``normed`` from x; layers : qkv, proj, fc1
    and fc2."""
    weights = [part for layer in layers for part in layer(normed.dtype)]
    return _Block.apply(x, normed, gate1, shift2, scale2, gate2, shift, scale, *weights, *first, heads, packing)


class _Block(torch.autograd.Function):
    """Names of gradients: d and what it is of."""

    @staticmethod
    def forward(ctx, x, normed, gate1, shift2, scale2, gate2, shift, scale, wq, bq, wp, bp, w1, b1, w2, b2,
                shift1, scale1, heads, packing):  # fmt: skip
        cu = None if packing is None else packing.cu_tokens(x.device)
        with torch._C._AutoDispatchBelowAutograd():
            qkv = _linear(normed, wq, bq)
            mixed = attend(qkv, heads) if packing is None else attend_packed(qkv, heads, packing)
            h1 = _linear(mixed, wp, bp)
            x1, normed2 = ops.gated_residual_adaln_cpu(x, h1, gate1, shift2, scale2, cu, EPS)
            wide = _linear(normed2, w1, b1)
            h2 = _linear(ops.gelu(wide), w2, b2)
            x2, after = ops.gated_residual_adaln_cpu(x1, h2, gate2, shift, scale, cu, EPS)
        ctx.save_for_backward(x, x2, qkv, mixed, h1, wide, h2, gate1, shift2, scale2, gate2, scale,
                              wq, wp, w1, w2, shift1, scale1)  # fmt: skip
        ctx.heads, ctx.packing, ctx.cu = heads, packing, cu
        ctx.set_materialize_grads(False)
        return x2, after

    @staticmethod
    @once_differentiable
    def backward(ctx, dx2, dafter):
        (x, x2, qkv, mixed, h1, wide, h2, gate1, shift2, scale2, gate2, scale,
         wq, wp, w1, w2, shift1, scale1) = ctx.saved_tensors  # fmt: skip
        if dx2 is None and dafter is None:
            return (None,) * 20
        cu, after = ctx.cu, dafter is not None
        with torch._C._AutoDispatchBelowAutograd():
            dx1, dh2, dgate2, *last = ops.adaln_backward_cpu(
                dafter, dx2, x2, h2, gate2, scale, cu, EPS, True, True, True, after, after
            )
            dshift, dscale = last or (None, None)
            dw2, db2 = _of_weight(dh2, ops.gelu(wide))
            dwide = ops.gelu_backward(_into(dh2, w2), wide)
            x1, normed2 = ops.gated_residual_adaln_cpu(x, h1, gate1, shift2, scale2, cu, EPS)
            dw1, db1 = _of_weight(dwide, normed2)
            dx, dh1, dgate1, dshift2, dscale2 = ops.adaln_backward_cpu(
                _into(dwide, w1), dx1, x1, h1, gate1, scale2, cu, EPS, *[True] * 5
            )
            dwp, dbp = _of_weight(dh1, mixed)
            dmixed = _into(dh1, wp)
        dqkv = attend_backward(qkv, dmixed, ctx.heads, ctx.packing)
        with torch._C._AutoDispatchBelowAutograd():
            dwq, dbq = _of_weight(dqkv, ops.adaln_modulate_cpu(x, shift1, scale1, cu, EPS))
            dnormed = _into(dqkv, wq)
        return (dx, dnormed, dgate1, dshift2, dscale2, dgate2, dshift, dscale, dwq, dbq, dwp, dbp, dw1, db1, dw2, db2,
                None, None, None, None)  # fmt: skip


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    flat = torch.addmm(bias, x.flatten(0, -2), weight.t())
    return flat.view(*x.shape[:-1], -1)


def _into(dy: Tensor, weight: Tensor) -> Tensor:
    """A product's gradient by its input."""
    return torch.mm(dy.flatten(0, -2), weight).view(*dy.shape[:-1], -1)


def _of_weight(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """And by its weight and bias."""
    dy = dy.flatten(0, -2)
    return torch.mm(dy.t(), x.flatten(0, -2)), dy.sum(0)
