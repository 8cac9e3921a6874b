"""Self-attention of many short sequences, straight from the packed projection.

    out_i = sum_j softmax_j(q_i . k_j / sqrt(d)) v_j        i, j tokens of one sequence, up to 128

qkv (B, N, 3 D) packed as (3, heads, d), D = heads d; or packed sequences (T, 3 D) with ``cu_tokens``
(S + 1,) int32, where sequence s is the rows cu[s] .. cu[s + 1]. q, k and v are read where the
projection left them and the result is written as the next projection reads it: no permute, no copy.

Bytes a token (16-bit):   fused = floor    F.scaled_dot_product_attention on views, its flash kernel
    forward               8 D              8 D
    backward              14 D             32 D and more: out is read as well, out and dout twice, and
                                           dq, dk, dv are gathered into one tensor

Backward keeps qkv and nothing else. The scores of a sequence fit on the chip, so recomputing them
whole costs no byte, and neither the output nor its log-sum-exp saves any.

Types: float32, bfloat16, float16, the result in qkv's; products of 16-bit values are summed in
float32, softmax is float32, and the weights are rounded to the input's type before they meet v.
float32 multiplies in full precision, float64 runs the reference. Autocast changes nothing.

Each sequence lies in a tile of its own (``_short_attention_triton.py``), 16, 32, 64 or 128 rows as
``longest`` asks for, several tiles to a program where they are small. So a NaN stays in its sequence,
and the same sequence gives the same bits in any batch, dense or packed, for the same rows of a tile.
One tile for several sequences behind a block-diagonal mask would give up both (0 NaN is NaN, and sums
would start where a sequence happens to lie). The price: a sequence of 12 tokens beside one of 64 takes
a program of 64 rows, not a byte more, but four warps to wait for little. Where the lengths of a pack
differ much and lie together (level after level), a call for each level should be the faster way.

On a CPU the C++ extension does the same in one call each way (csrc/attention.cpp; _short_attention_ops.py registers
it), for float32 and bfloat16, d up to 128 and up to MOST_TOKENS_CPU tokens: a head of a sequence at a time, in scratch
memory that fits the caches. bfloat16 is multiplied in pairs, by the processor's own instruction where it has one, and
summed in float32; weights and their gradients are rounded to it before they meet v, k and q. The same bits for any
number of threads, any batch or packing, any instruction set. float64 and float16 run the reference there.

Limits on a GPU: d 16 to 128 and up to 128 tokens a sequence; float32, which has no tensor cores, up to
128 tokens where d <= 32, 64 where d <= 64, else 32. A sequence with more tokens than ``longest``
promises gives NaN, everywhere. No double backward (RuntimeError) but in the reference; a qkv whose last
stride is not 1 is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _extension, _impl, _short_attention_ops
from ._impl import BackendError, choose, common_device, forward_mode

MOST_TOKENS, MOST_DIM, LEAST_DIM = 128, 128, 16
MOST_TOKENS_CPU = 256  # of the extension: as far as it was measured to be the fastest there
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def _padded(qkv: Tensor, cu_tokens: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Packed rows (T, W) as (S, longest, W), 0 behind a sequence's end, and which rows are real (S, longest)."""
    at = torch.arange(longest, device=qkv.device)
    begin, end = cu_tokens[:-1, None].long(), cu_tokens[1:, None].long()
    live = begin + at < end
    rows = qkv[torch.where(live, begin + at, 0)]
    return torch.where(live[..., None], rows, 0), live


def _unpadded(rows: Tensor, cu_tokens: Tensor, tokens: int) -> Tensor:
    """(S, longest, W) back to (T, W); NaN for sequences of more than ``longest`` tokens."""
    at = torch.arange(tokens, device=rows.device)
    cu = cu_tokens.long()
    sequence = torch.searchsorted(cu, at, right=True) - 1
    number = at - cu[sequence]
    too_long = (cu[1:] - cu[:-1] > rows.shape[1])[sequence]
    return rows[sequence, torch.where(too_long, 0, number)].masked_fill(too_long[:, None], float("nan"))


def short_attention_reference(qkv, heads, *, cu_tokens=None, longest=None):
    wide = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    if cu_tokens is not None and not (qkv.shape[0] and longest):
        return qkv[:, : qkv.shape[1] // 3] * 0
    with torch.autocast(qkv.device.type, enabled=False):
        rows, live = (qkv, None) if cu_tokens is None else _padded(qkv, cu_tokens, longest)
        batch, num, triple = rows.shape
        q, k, v = rows.to(wide).reshape(batch, num, 3, heads, triple // (3 * heads)).permute(2, 0, 3, 1, 4)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, heads, N, N)
        if live is not None:  # a sequence of no tokens keeps its first key, of zeros, that no softmax is 0 / 0
            away = ~live & (torch.arange(num, device=qkv.device) > 0)
            scores = scores.masked_fill(away[:, None, None], float("-inf"))
        out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, num, triple // 3).to(qkv.dtype)
        return out if cu_tokens is None else _unpadded(out, cu_tokens, qkv.shape[0])


@torch.library.custom_op("phmdiff_fast::short_attention", mutates_args=())
def _attention(qkv: Tensor, heads: int, cu_tokens: Tensor | None, longest: int) -> Tensor:
    from . import _short_attention_triton

    return _short_attention_triton.forward(qkv, heads, cu_tokens, longest)


@torch.library.custom_op("phmdiff_fast::short_attention_backward", mutates_args=())
def _backward(dout: Tensor, qkv: Tensor, heads: int, cu_tokens: Tensor | None, longest: int) -> Tensor:
    """The gradient of qkv."""
    from . import _short_attention_triton

    return _short_attention_triton.backward(dout, qkv, heads, cu_tokens, longest)


@_attention.register_fake
def _(qkv, heads, cu_tokens, longest):
    return qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3))


@_backward.register_fake
def _(dout, qkv, heads, cu_tokens, longest):
    return qkv.new_empty(qkv.shape)


def _setup(ctx, inputs, output):
    qkv, ctx.heads, cu_tokens, ctx.longest = inputs
    ctx.save_for_backward(qkv, cu_tokens)
    ctx.set_materialize_grads(False)


def _gradient(ctx, dout):
    if dout is None:
        return None, None, None, None
    qkv, cu_tokens = ctx.saved_tensors
    dqkv = torch.ops.phmdiff_fast.short_attention_backward(dout, qkv, ctx.heads, cu_tokens, ctx.longest)
    return dqkv, None, None, None


_attention.register_autograd(_gradient, setup_context=_setup)


def _check(qkv: Tensor, heads: int, cu_tokens: Tensor | None, longest: int | None) -> None:
    op = "short_attention"
    if qkv.dim() != (3 if cu_tokens is None else 2):
        raise ValueError(f"{op}: qkv must be (B, N, 3 D), or (T, 3 D) with cu_tokens; got {tuple(qkv.shape)}")
    if not qkv.dtype.is_floating_point:
        raise TypeError(f"{op}: qkv is {qkv.dtype}; use a floating type")
    if heads < 1 or not qkv.shape[-1] or qkv.shape[-1] % (3 * heads):
        raise ValueError(f"{op}: qkv must be packed as (3, heads, d); {qkv.shape[-1]} is no multiple of 3 x {heads}")
    if cu_tokens is None:
        if longest is not None and longest != qkv.shape[1]:
            raise ValueError(f"{op}: longest is {longest}, but without cu_tokens all sequences have {qkv.shape[1]}")
        return
    if longest is None or longest < 0:
        raise ValueError(f"{op}: longest must be the most tokens a sequence of cu_tokens has, got {longest}")
    if cu_tokens.dim() != 1 or cu_tokens.shape[0] < 1 or (qkv.shape[0] and not (cu_tokens.shape[0] > 1 and longest)):
        got = f"{tuple(cu_tokens.shape)} and longest {longest} for {qkv.shape[0]} rows"
        raise ValueError(f"{op}: cu_tokens must be (S + 1,), from 0 to the number of rows of qkv; got {got}")
    if cu_tokens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: cu_tokens is {cu_tokens.dtype}; use int32")


def _outside(dtype: torch.dtype, head_dim: int, longest: int) -> str:
    """Which limit of the kernels is passed; empty if none."""
    if dtype not in TYPES:
        return f"qkv is {dtype}, and the kernels compute float32, bfloat16 and float16"
    if not LEAST_DIM <= head_dim <= MOST_DIM:
        return f"heads have {head_dim} values, and the kernels take {LEAST_DIM} to {MOST_DIM}"
    most = MOST_TOKENS
    if dtype == torch.float32:
        most = 128 if head_dim <= 32 else 64 if head_dim <= 64 else 32
    if longest > most:
        return f"sequences have up to {longest} tokens, and the kernels take {most} of {dtype} and {head_dim} values"
    return ""


def why_not_short(device: torch.device | str, dtype: torch.dtype, head_dim: int, longest: int) -> str:
    """Why the Triton kernel cannot serve tensors of this kind; empty if it can.

    device of qkv (a CPU only in Triton's interpreter); head_dim d; longest: most tokens of a sequence.
    """
    if not _impl.HAS_TRITON:
        return "Triton is not installed"
    if torch.device(device).type != "cuda" and not (_impl.INTERPRET or _impl.recording):
        return f"the tensors are on {device}; Triton needs a GPU, or TRITON_INTERPRET=1 for its interpreter"
    return _outside(dtype, head_dim, longest)


def why_not_extension(device: torch.device | str, dtype: torch.dtype, head_dim: int, longest: int) -> str:
    """Why the C++ extension cannot serve tensors of this kind; empty if it can.

    device of qkv; head_dim d; longest: most tokens of a sequence.
    """
    kind = torch.device(device).type
    if kind != "cpu":
        return f"short attention of the extension runs on CPU tensors, not on {kind}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"qkv is {str(dtype)[6:]}, which only the reference computes on a CPU"
    if head_dim > MOST_DIM:
        return f"heads have {head_dim} values, and the extension takes up to {MOST_DIM}"
    if longest > MOST_TOKENS_CPU:
        return f"sequences have up to {longest} tokens, and the extension takes {MOST_TOKENS_CPU}"
    return _extension.problem()


def _chosen(qkv: Tensor, head_dim: int, cu_tokens: Tensor | None, longest: int, impl: str | None) -> str:
    """The extension where it runs (forced, or left open for CPU tensors), else what ``choose`` says."""
    op, tensors = "short_attention", {"qkv": qkv, "cu_tokens": cu_tokens}
    if impl == "extension":
        common_device(op, tensors)
        if why := why_not_extension(qkv.device, qkv.dtype, head_dim, longest) or forward_mode():
            raise BackendError(f"{op}: impl='extension' cannot run here: {why}")
        return impl
    chosen = choose(op, impl, tensors, _outside(qkv.dtype, head_dim, longest))
    if chosen == "reference" and impl is None and qkv.device.type == "cpu":
        if missing := _extension.problem():
            _extension.warn_once(op, missing)
        elif not (why_not_extension(qkv.device, qkv.dtype, head_dim, longest) or forward_mode()):
            return "extension"
    return chosen


def short_attention(
    qkv: Tensor, heads: int, *, cu_tokens: Tensor | None = None, longest: int | None = None, impl: str | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v within each sequence.

    qkv (B, N, 3 D) packed as (3, heads, d) -> (B, N, D); or (T, 3 D) with cu_tokens (S + 1,) int32,
    ascending from 0 to T, and longest, the most tokens a sequence has (known to the caller, so that
    nothing is read back from the device) -> (T, D); in qkv's dtype. Raises ValueError (shapes,
    devices), TypeError (dtypes), BackendError (impl cannot run here). Source: Vaswani et al. 2017, Eq. 1.
    """
    _check(qkv, heads, cu_tokens, longest)
    most = qkv.shape[1] if cu_tokens is None else longest
    chosen = _chosen(qkv, qkv.shape[-1] // (3 * heads), cu_tokens, most, impl)
    if chosen == "extension":
        return _short_attention_ops.ops.short_attention_cpu(qkv, heads, cu_tokens, most)
    if chosen == "triton":
        return torch.ops.phmdiff_fast.short_attention(qkv, heads, cu_tokens, most)
    return short_attention_reference(qkv, heads, cu_tokens=cu_tokens, longest=most)
