"""adaLN-Zero (Peebles & Xie 2023): modulated LayerNorm, alone and behind a gated residual.

    adaln_modulate:        y  = LN(x) (1 + scale) + shift
    gated_residual_adaln:  x' = x + gate h;   y = LN(x') (1 + scale) + shift

LN has no affine part of its own, eps 1e-6, statistics in float32. Shapes: x, h (B, N, D) with one
row of shift, scale, gate (B, D) a sample; or packed (T, D) with ``cu_tokens`` (S + 1,) int32, whose
rows cu[s] .. cu[s+1] take row s of the (S, D) vectors.

Types: all alike, or a float32 residual x with 16-bit h, shift, scale, gate, which gives x' float32
and y 16-bit. Other mixes raise TypeError; autocast changes nothing. Statistics, gates and sums are
float32 in the kernels, float64 runs the reference.

Bytes a token (16-bit; with a float32 residual), apart from the per-sample vectors:

                                    fused = floor      eager PyTorch (cast, norm, modulate, each by itself)
    adaln_modulate        forward   4 D   ( 6 D)       22 D and more
                          backward  6 D   (10 D)
    gated_residual_adaln  forward   8 D   (12 D)       36 D and more
                          backward  12 D  (18 D)

Backward adds float32 sums for shift, scale and gate, 8 D bytes each per 64 or more rows (4 % at
most), and none for samples of fewer than 128 rows. It keeps x (x' of the gated form), scale, gate
where h needs a gradient and h where gate does, and recomputes the statistics. Sums are added in an
order that depends on a sample's own rows alone: the same bits at every run and batch split.

On a CPU the C++ extension does the same (csrc/adaln.cpp; _adaln_ops.py registers it) for float32, bfloat16 and
their mix: one pass over the rows each way, sums in one order at any number of threads. float64 and float16 run the
reference there.

Limits: D in registers, so D up to 4096 is what it is made for (larger ones run and spill); no
double backward (RuntimeError) but in the reference; an input whose last stride is not 1 is copied.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _adaln_ops, _extension
from ._impl import BackendError, choose, common_device, forward_mode

EPS = 1e-6
F32, BF16 = torch.float32, torch.bfloat16
EXTENSION_TYPES = ((F32, F32), (F32, BF16), (BF16, BF16))  # of x and of the rest


def _rows(v: Tensor, cu_tokens: Tensor | None, x: Tensor) -> Tensor:
    """Per-sample vectors to where they broadcast over x: (B, 1, D), or (T, D) for packed rows."""
    if cu_tokens is None:
        return v[:, None]
    # Told the size, it need not read the lengths to know how large its result is.
    return v.repeat_interleave((cu_tokens[1:] - cu_tokens[:-1]).long(), dim=0, output_size=x.shape[0])


def _statistics_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def adaln_modulate_reference(x, shift, scale, *, cu_tokens=None):
    wide = _statistics_type(x)
    with torch.autocast(x.device.type, enabled=False):
        normed = F.layer_norm(x.to(wide), x.shape[-1:], eps=EPS)
        # Widened before they are repeated: the sums of their gradients are then wide too.
        y = torch.addcmul(_rows(shift.to(wide), cu_tokens, x), normed, 1 + _rows(scale.to(wide), cu_tokens, x))
        return y.to(shift.dtype)


def gated_residual_adaln_reference(x, h, gate, shift, scale, *, cu_tokens=None):
    wide = _statistics_type(x)
    with torch.autocast(x.device.type, enabled=False):
        x = torch.addcmul(x.to(wide), _rows(gate.to(wide), cu_tokens, x), h.to(wide)).to(x.dtype)
    return x, adaln_modulate_reference(x, shift, scale, cu_tokens=cu_tokens)


@torch.library.custom_op("phmdiff_fast::adaln_modulate", mutates_args=())
def _modulate(x: Tensor, shift: Tensor, scale: Tensor, cu_tokens: Tensor | None) -> Tensor:
    from . import _adaln_triton

    return _adaln_triton.forward(x, None, None, shift, scale, cu_tokens, EPS)[1]


@torch.library.custom_op("phmdiff_fast::gated_residual_adaln", mutates_args=())
def _gated(
    x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, cu_tokens: Tensor | None
) -> tuple[Tensor, Tensor]:
    from . import _adaln_triton

    return _adaln_triton.forward(x, h, gate, shift, scale, cu_tokens, EPS)


@torch.library.custom_op("phmdiff_fast::adaln_backward", mutates_args=())
def _backward(
    dy: Tensor | None, dnew: Tensor | None, x: Tensor, h: Tensor | None, gate: Tensor | None, scale: Tensor,
    cu_tokens: Tensor | None, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients of (x, h, gate, shift, scale), those that ``needs`` asks for; x is what was normalised."""
    from . import _adaln_triton

    grads = _adaln_triton.backward(dy, dnew, x, h, gate, scale, cu_tokens, EPS, needs)
    return [g for g in grads if g is not None]


@_modulate.register_fake
def _(x, shift, scale, cu_tokens):
    return x.new_empty(x.shape, dtype=shift.dtype)


@_gated.register_fake
def _(x, h, gate, shift, scale, cu_tokens):
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=shift.dtype)


@_backward.register_fake
def _(dy, dnew, x, h, gate, scale, cu_tokens, needs):
    vector = (x.shape[0] if cu_tokens is None else cu_tokens.shape[0] - 1, x.shape[-1])
    shapes = [(x.shape, x.dtype), (x.shape, scale.dtype), *[(vector, scale.dtype)] * 3]
    return [x.new_empty(shape, dtype=dtype) for (shape, dtype), need in zip(shapes, needs, strict=True) if need]


def _gradients(dy, dnew, x, h, gate, scale, cu_tokens, needs) -> list[Tensor | None]:
    """Gradients of (x, h, gate, shift, scale); None where not needed or where nothing comes from behind."""
    if dy is None:
        needs = [*needs[:3], False, False]
    if (dy is None and dnew is None) or not any(needs):
        return [None] * 5
    given = iter(torch.ops.phmdiff_fast.adaln_backward(dy, dnew, x, h, gate, scale, cu_tokens, needs))
    return [next(given) if need else None for need in needs]


def _modulate_setup(ctx, inputs, output):
    x, _, scale, cu_tokens = inputs
    ctx.save_for_backward(x, scale, cu_tokens)
    ctx.set_materialize_grads(False)


def _modulate_backward(ctx, dy):
    x, scale, cu_tokens = ctx.saved_tensors
    x_needs, *rest = ctx.needs_input_grad[:3]
    dx, _, _, dshift, dscale = _gradients(dy, None, x, None, None, scale, cu_tokens, [x_needs, False, False, *rest])
    return dx, dshift, dscale, None


def _gated_setup(ctx, inputs, output):
    _, h, gate, _, scale, cu_tokens = inputs
    h_needs, gate_needs = ctx.needs_input_grad[1:3]
    ctx.save_for_backward(output[0], h if gate_needs else None, gate if h_needs else None, scale, cu_tokens)
    ctx.set_materialize_grads(False)


def _gated_backward(ctx, dnew, dy):
    new, h, gate, scale, cu_tokens = ctx.saved_tensors
    return *_gradients(dy, dnew, new, h, gate, scale, cu_tokens, list(ctx.needs_input_grad[:5])), None


_modulate.register_autograd(_modulate_backward, setup_context=_modulate_setup)
_gated.register_autograd(_gated_backward, setup_context=_gated_setup)


def _check(op: str, x: Tensor, tokens: dict[str, Tensor], vectors: dict[str, Tensor], cu_tokens: Tensor | None):
    if x.dim() != (3 if cu_tokens is None else 2):
        raise ValueError(f"{op}: x must be (B, N, D), or (T, D) with cu_tokens; got {tuple(x.shape)}")
    if cu_tokens is not None:
        if cu_tokens.dim() != 1 or cu_tokens.shape[0] < 1 or (cu_tokens.shape[0] == 1 and x.shape[0]):
            got = f"{tuple(cu_tokens.shape)} for {len(x)} rows"
            raise ValueError(f"{op}: cu_tokens must be (S + 1,), from 0 to the number of rows of x; got {got}")
        if cu_tokens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: cu_tokens is {cu_tokens.dtype}; use int32")
    rows = (x.shape[0] if cu_tokens is None else cu_tokens.shape[0] - 1, x.shape[-1])
    narrow = next(iter(vectors.values())).dtype
    for name, value in {**tokens, **vectors}.items():
        expected = x.shape if name in tokens else rows
        if tuple(value.shape) != tuple(expected):
            raise ValueError(f"{op}: {name} must be {tuple(expected)}, got {tuple(value.shape)}")
        mixed = x.dtype == torch.float32 and narrow in (torch.float16, torch.bfloat16)
        if value.dtype != narrow or not (narrow == x.dtype or mixed):
            raise TypeError(f"{op}: {name} is {value.dtype} beside x {x.dtype}; use one type, or x float32 with 16-bit")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{op}: x is {x.dtype}; use a floating type")


def _chosen(op: str, impl: str | None, tensors: dict[str, Tensor | None]) -> str:
    """The extension where it runs (forced, or left open for CPU tensors), else what ``choose`` says."""
    if impl == "extension":
        common_device(op, tensors)
        if why := _why_not_extension(tensors):
            raise BackendError(f"{op}: impl='extension' cannot run here: {why}")
        return impl
    chosen = choose(op, impl, tensors)
    if chosen == "reference" and impl is None and tensors["x"].device.type == "cpu":
        if missing := _extension.problem():
            _extension.warn_once(op, missing)
        elif not _why_not_extension(tensors):
            return "extension"
    return chosen


def _why_not_extension(tensors: dict[str, Tensor | None]) -> str:
    """Why the extension does not take these; empty if it does."""
    x, scale = tensors["x"], tensors["scale"]
    if x.device.type != "cpu":
        return f"adaLN of the extension runs on CPU tensors, not on {x.device.type}"
    if (x.dtype, scale.dtype) not in EXTENSION_TYPES:
        return f"x is {str(x.dtype)[6:]} beside {str(scale.dtype)[6:]}, which only the reference computes on a CPU"
    return _extension.problem() or forward_mode()


def adaln_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, *, cu_tokens: Tensor | None = None, impl: str | None = None
) -> Tensor:
    """y = LN(x) (1 + scale) + shift.

    x (B, N, D) with shift, scale (B, D); or x (T, D) with shift, scale (S, D) and cu_tokens (S + 1,)
    int32, ascending from 0 to T. Returns y of x's shape in shift's dtype. Raises ValueError (shapes,
    devices), TypeError (dtypes), BackendError (impl cannot run here).
    Source: adaLN-Zero, Peebles & Xie 2023, section 3.2.
    """
    _check("adaln_modulate", x, {}, {"shift": shift, "scale": scale}, cu_tokens)
    given = {"x": x, "shift": shift, "scale": scale, "cu_tokens": cu_tokens}
    chosen = _chosen("adaln_modulate", impl, given)
    if chosen == "extension":
        return _adaln_ops.ops.adaln_modulate_cpu(x, shift, scale, cu_tokens, EPS)
    if chosen == "triton":
        return torch.ops.phmdiff_fast.adaln_modulate(x, shift, scale, cu_tokens)
    return adaln_modulate_reference(x, shift, scale, cu_tokens=cu_tokens)


def gated_residual_adaln(
    x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor,
    *, cu_tokens: Tensor | None = None, impl: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x' = x + gate h and y = LN(x') (1 + scale) + shift, in one call.

    x, h (B, N, D) with gate, shift, scale (B, D); or packed (T, D) with (S, D) and cu_tokens
    (S + 1,) int32, ascending from 0 to T. Returns (x' in x's dtype, y in shift's dtype), y from x'
    as rounded to x's dtype. Raises ValueError (shapes, devices), TypeError (dtypes), BackendError
    (impl cannot run here). Source: adaLN-Zero, Peebles & Xie 2023, section 3.2.
    """
    _check("gated_residual_adaln", x, {"h": h}, {"gate": gate, "shift": shift, "scale": scale}, cu_tokens)
    given = {"x": x, "h": h, "gate": gate, "shift": shift, "scale": scale, "cu_tokens": cu_tokens}
    chosen = _chosen("gated_residual_adaln", impl, given)
    if chosen == "extension":
        return _adaln_ops.ops.gated_residual_adaln_cpu(x, h, gate, shift, scale, cu_tokens, EPS)
    if chosen == "triton":
        return torch.ops.phmdiff_fast.gated_residual_adaln(x, h, gate, shift, scale, cu_tokens)
    return gated_residual_adaln_reference(x, h, gate, shift, scale, cu_tokens=cu_tokens)
