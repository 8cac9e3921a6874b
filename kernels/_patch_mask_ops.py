"""Registration of the patch_mask operations with torch: what torch.compile and autograd know of them.

Every operation is opaque to the compiler, which learns shapes from its fake and gradients from its
formula. ``rng`` travels as two integers and two optional device scalars, so that neither a new seed
nor a new step compiles anything again. The backward operations have no formula of their own: asked
for a second derivative they raise. Arguments are checked in patch_mask.py, not here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _whole(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _rows_whole(t: Tensor | None) -> Tensor | None:
    """The tensor itself where its rows are runs of memory, else a contiguous copy."""
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


@torch.library.custom_op("phmdiff_fast::draw_mask", mutates_args=())
def draw_mask(
    sample_ids: Tensor, num_patches: int, num_keep: int, seed: int, step: int, seed_ptr: Tensor | None,
    step_ptr: Tensor | None, stream: int, drop_first: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from ._patch_mask_triton import draw_mask

    return draw_mask(sample_ids, num_patches, num_keep, seed, step, seed_ptr, step_ptr, stream, drop_first)


@draw_mask.register_fake
def _(sample_ids, num_patches, num_keep, seed, step, seed_ptr, step_ptr, stream, drop_first):
    return tuple(sample_ids.new_empty((sample_ids.shape[0], n), dtype=torch.int32) for n in (num_keep, num_patches))


@torch.library.custom_op("phmdiff_fast::restore_tokens", mutates_args=())
def restore_tokens(x: Tensor, fill: Tensor, inverse: Tensor, pos: Tensor | None) -> Tensor:
    from ._patch_mask_triton import restore_tokens

    return restore_tokens(*(_rows_whole(t) for t in (x, fill, inverse, pos)))


@restore_tokens.register_fake
def _(x, fill, inverse, pos):
    return x.new_empty((*inverse.shape, x.shape[2]))


@torch.library.custom_op("phmdiff_fast::restore_tokens_backward", mutates_args=())
def restore_tokens_backward(
    grad: Tensor, inverse: Tensor, keep: int, fill_rows: bool, x_dtype: torch.dtype, fill_dtype: torch.dtype,
    need_x: bool, need_fill: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from ._patch_mask_triton import restore_tokens_backward

    grads = restore_tokens_backward(_rows_whole(grad), _rows_whole(inverse), keep, fill_rows, x_dtype, fill_dtype,
                                    need_x, need_fill)  # fmt: skip
    return tuple(grad.new_empty(0) if g is None else g for g in grads)


@restore_tokens_backward.register_fake
def _(grad, inverse, keep, fill_rows, x_dtype, fill_dtype, need_x, need_fill):
    batch, num, width = grad.shape
    fill = (batch, num - keep, width) if fill_rows else (width,)
    return (grad.new_empty((batch, keep, width), dtype=x_dtype) if need_x else grad.new_empty(0),
            grad.new_empty(fill, dtype=fill_dtype) if need_fill else grad.new_empty(0))  # fmt: skip


def _restore_context(ctx, inputs, output):
    x, fill, inverse, pos = inputs
    ctx.save_for_backward(inverse)
    ctx.keep, ctx.fill_rows, ctx.kinds = x.shape[1], fill.dim() == 3, (x.dtype, fill.dtype)
    ctx.pos_dtype = None if pos is None else pos.dtype


def _restore_gradients(ctx, grad):
    need_x, need_fill, _, need_pos = ctx.needs_input_grad
    dx = dfill = dpos = None
    if need_x or need_fill:
        dx, dfill = restore_tokens_backward(grad, *ctx.saved_tensors, ctx.keep, ctx.fill_rows, *ctx.kinds,
                                             need_x, need_fill)  # fmt: skip
    if need_pos:
        dpos = grad.sum(0, dtype=torch.float32).to(ctx.pos_dtype)
    return dx if need_x else None, dfill if need_fill else None, None, dpos


restore_tokens.register_autograd(_restore_gradients, setup_context=_restore_context)


@torch.library.custom_op("phmdiff_fast::embed_visible", mutates_args=())
def embed_visible(
    y: Tensor, sources: Tensor, coarse: Tensor | None, abar: Tensor, keep_ids: Tensor | None, weight: Tensor,
    bias: Tensor | None, pos: Tensor | None, eps: Tensor | None, state_scale: Tensor | None,
    sample_ids: Tensor | None, seed_ptr: Tensor | None, step_ptr: Tensor | None, seed: int, step: int, stream: int,
    draw: bool,
) -> Tensor:  # fmt: skip
    from ._embed_triton import embed

    return embed(y, sources, coarse, _whole(abar), _whole(keep_ids), _rows_whole(weight), _whole(bias),
                 _rows_whole(pos), eps, _whole(state_scale), sample_ids, seed_ptr, step_ptr, seed, step, stream,
                 draw)  # fmt: skip


@embed_visible.register_fake
def _(y, sources, coarse, abar, keep_ids, weight, *rest):
    kept = _num_patches(y, sources, coarse, weight) if keep_ids is None else keep_ids.shape[1]
    return weight.new_empty((y.shape[0], kept, weight.shape[0]))


def _num_patches(y, sources, coarse, weight):
    channels = y.shape[1] * (1 if coarse is None else 2) + sources.shape[1]
    return y.shape[2] * y.shape[3] * channels // weight.shape[1]


@torch.library.custom_op("phmdiff_fast::embed_visible_backward", mutates_args=())
def embed_visible_backward(
    grad: Tensor, y: Tensor, sources: Tensor, coarse: Tensor | None, abar: Tensor, keep_ids: Tensor | None,
    weight: Tensor, eps: Tensor | None, state_scale: Tensor | None, sample_ids: Tensor | None,
    seed_ptr: Tensor | None, step_ptr: Tensor | None, seed: int, step: int, stream: int, draw: bool,
    need_sources: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from ._embed_triton import embed_backward

    grads = embed_backward(_rows_whole(grad), y, sources, coarse, _whole(abar), _whole(keep_ids), _rows_whole(weight),
                           eps, _whole(state_scale), sample_ids, seed_ptr, step_ptr, seed, step, stream, draw,
                           need_sources, need_weight, need_bias)  # fmt: skip
    return tuple(grad.new_empty(0) if g is None else g for g in grads)


@embed_visible_backward.register_fake
def _(grad, y, sources, coarse, abar, keep_ids, weight, eps, state_scale, sample_ids, seed_ptr, step_ptr,
      seed, step, stream, draw, need_sources, need_weight, need_bias):  # fmt: skip
    return (
        sources.new_empty(sources.shape) if need_sources else grad.new_empty(0),
        weight.new_empty(weight.shape) if need_weight else grad.new_empty(0),
        weight.new_empty(weight.shape[:1]) if need_bias else grad.new_empty(0),
    )


_EMBED = ("y", "sources", "coarse", "abar", "keep_ids", "weight", "bias", "pos", "eps", "state_scale", "sample_ids",
          "seed_ptr", "step_ptr")  # fmt: skip
_TRAINED = ("sources", "weight", "bias")


def _embed_context(ctx, inputs, output):
    saved = dict(zip(_EMBED, inputs, strict=False))
    saved.pop("bias"), saved.pop("pos")
    ctx.names, ctx.scalars = list(saved), inputs[len(_EMBED) :]
    ctx.save_for_backward(*saved.values())


def _embed_gradients(ctx, grad):
    need = dict(zip(_EMBED, ctx.needs_input_grad, strict=False))
    without = [name for name in _EMBED if need[name] and name not in _TRAINED]
    if without:  # patch_mask.py sends such calls to the reference; a direct call of the op ends here
        raise RuntimeError(f"embed_visible: no gradient for {without[0]} in the fused form; use impl='reference'")
    grads = embed_visible_backward(grad, *ctx.saved_tensors, *ctx.scalars, *(need[n] for n in _TRAINED))
    found = {name: g for name, g in zip(_TRAINED, grads, strict=True) if need[name]}
    return tuple(found.get(name) for name in _EMBED) + (None,) * len(ctx.scalars)


embed_visible.register_autograd(_embed_gradients, setup_context=_embed_context)
