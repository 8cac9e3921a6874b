"""What torch.compile and autograd know of the extension's short attention (csrc/attention.cpp): shapes from a fake,
the gradient by the backward operation, which has none itself. Arguments are checked in short_attention.py, not here.
"""

from __future__ import annotations

import torch

from ._extension import problem

ops = torch.ops.phmdiff_fast


def _forward_fake(qkv, heads, cu_tokens, longest):
    return qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3))


def _backward_fake(dout, qkv, heads, cu_tokens, longest):
    return qkv.new_empty(qkv.shape)


def _setup(ctx, inputs, output):
    qkv, ctx.heads, cu_tokens, ctx.longest = inputs
    ctx.save_for_backward(qkv, cu_tokens)
    ctx.set_materialize_grads(False)


def _gradient(ctx, dout):
    if dout is None:
        return None, None, None, None
    qkv, cu_tokens = ctx.saved_tensors
    return ops.short_attention_backward_cpu(dout, qkv, ctx.heads, cu_tokens, ctx.longest), None, None, None


def _no_second(ctx, *grads):
    raise RuntimeError("short attention of the extension has no second derivative; impl='reference' has")


def _nothing_kept(ctx, inputs, output):
    pass


if not problem():
    for _name, _fake, _backward, _keep in (
        ("short_attention_cpu", _forward_fake, _gradient, _setup),
        ("short_attention_backward_cpu", _backward_fake, _no_second, _nothing_kept),
    ):
        torch.library.register_fake(f"phmdiff_fast::{_name}", _fake)
        torch.library.register_autograd(f"phmdiff_fast::{_name}", _backward, setup_context=_keep)
