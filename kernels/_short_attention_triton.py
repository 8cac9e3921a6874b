"""Triton kernels of kernels/short_attention.py: one forward, one backward, nothing kept between them.

A program takes one head of GROUP whole sequences. Each sequence has a tile of its own, ROWS rows
from its first token on, and the tiles of a group are multiplied as a batch: (GROUP, ROWS, d), one
warp a tile. So no score is computed between two sequences, a NaN stays in its own, and the bits of
a result depend on its sequence and ROWS alone. A long tile (GROUP 1) goes to all warps, QUERIES query
rows at a time; keys and values are read once, so every row of scores is there whole: one softmax
without running maxima, and a backward that needs no sums of another program.

Shapes: S sequences, N tokens of a sequence (T of all together), H heads of d values, D = H d.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._tl import dot, narrow

LOG2_E = tl.constexpr(1.4426950408889634)
# Row counts change with the mask ratio and the level; none of these is worth a compilation.
_dynamic = triton.jit(do_not_specialize=["tokens", "sequences", "longest"])


@triton.jit
def _begin(cu, at, tokens, live):
    """cu_tokens[at], kept inside the buffer whatever it holds."""
    return tl.minimum(tl.maximum(tl.load(cu + at, mask=live, other=0).to(tl.int32), 0), tokens)


@triton.jit
def _sequences(group, cu, tokens, sequences, GROUP: tl.constexpr):
    """What a program works on: (sequence, its first row, number of rows), scalars or (GROUP, 1).

    Rows count from the sequence's start (dense) or over all sequences (packed).
    """
    at = group * GROUP
    if GROUP > 1:
        at = tl.expand_dims(at + tl.arange(0, GROUP), 1)
    live = at < sequences
    if cu is None:
        begin = at * 0
        length = tl.where(live, tokens, 0)
    else:
        begin = _begin(cu, at, tokens, live)
        length = tl.maximum(_begin(cu, at + 1, tokens, live) - begin, 0)
    return at.to(tl.int64), begin, length


@triton.jit
def _lines(first, COUNT: tl.constexpr, GROUP: tl.constexpr):
    """Row numbers within a sequence: (COUNT,) or (1, COUNT)."""
    lines = first + tl.arange(0, COUNT)
    return tl.expand_dims(lines, 0) if GROUP > 1 else lines


@triton.jit
def _offsets(sequence, begin, lines, sequence_stride, row_stride, cols):
    """Offsets (GROUP, rows, cols) or (rows, cols). Packed, the stride by sequence is 0."""
    at = sequence * sequence_stride + (begin + lines).to(tl.int64) * row_stride
    return tl.expand_dims(at, -1) + cols


@triton.jit
def _load(ptr, offsets, live, cols, HEAD_DIM: tl.constexpr):
    return tl.load(ptr + offsets, mask=tl.expand_dims(live, -1) & (cols < HEAD_DIM), other=0.0)


@triton.jit
def _store(ptr, offsets, value, live, cols, HEAD_DIM: tl.constexpr):
    tl.store(ptr + offsets, narrow(value, ptr.dtype.element_ty), mask=tl.expand_dims(live, -1) & (cols < HEAD_DIM))


@triton.jit
def _spoil(ptr, sequence, begin, length, longest, strides, cols, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr,
           GROUP: tl.constexpr):  # fmt: skip
    """NaN for a sequence with more tokens than was promised, instead of attention to some of them."""
    wrong = tl.where(length > longest, length, 0)
    for first in range(0, tl.max(wrong) if GROUP > 1 else wrong, ROWS):
        lines = _lines(first, ROWS, GROUP)
        at = _offsets(sequence, begin, lines, strides[0], strides[1], cols)
        _store(ptr, at, tl.full(at.shape, float("nan"), tl.float32), lines < wrong, cols, HEAD_DIM)


@triton.jit
def _zeros(GROUP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    if GROUP > 1:
        return tl.zeros((GROUP, ROWS, COLS), tl.float32)
    else:
        return tl.zeros((ROWS, COLS), tl.float32)


@triton.jit
def _weights(q, k, keys, key_lines, scale, GROUP: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr):
    """exp(score - the row's largest) and its sum over the keys; 0 where ``keys`` is false."""
    scores = dot(q, tl.trans(k), _zeros(GROUP, QUERIES, ROWS)) * (scale * LOG2_E)
    # A sequence without a key keeps its first, of zeros: nothing of it is written, but no row is all infinite.
    scores = tl.where(tl.expand_dims(keys | (key_lines == 0), -2), scores, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, -1, keep_dims=True))
    return weights, tl.sum(weights, -1, keep_dims=True)


@triton.jit
def _slopes(
    q, k, v, do, rows, keys, key_lines, scale, GROUP: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr
):  # fmt: skip
    """The softmax weights and the gradient of the scores (before scaling), in the type of q."""
    weights, total = _weights(q, k, keys, key_lines, scale, GROUP, ROWS, QUERIES)
    # Rows and keys of the padding count for nothing, even where they met an infinity (0 inf is NaN).
    real = tl.expand_dims(rows, -1) & tl.expand_dims(keys, -2)
    weights = tl.where(real, weights / total, 0.0)
    dweights = dot(do, tl.trans(v), _zeros(GROUP, QUERIES, ROWS))
    mean = tl.sum(weights * dweights, -1, keep_dims=True)
    dscores = tl.where(real, weights * (dweights - mean), 0.0)
    return narrow(weights, q.dtype), narrow(dscores, q.dtype)


@_dynamic
def short_attention_forward(
    qkv,  # (S, N, 3 D) or (T, 3 D), packed as (3, heads, d)
    cu,  # (S + 1,) int32 or None
    out,  # (S, N, D) or (T, D), contiguous
    sequence_stride, row_stride, out_sequence_stride, tokens, sequences, longest, heads, scale,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head, width = program % heads, heads * HEAD_DIM  # neighbours read neighbouring heads of the same rows
    sequence, begin, length = _sequences(program // heads, cu, tokens, sequences, GROUP)
    used = tl.where(length > longest, 0, length)
    cols, column = tl.arange(0, DIM), head * HEAD_DIM
    key_lines = _lines(0, ROWS, GROUP)
    keys = key_lines < used
    key_at = _offsets(sequence, begin, key_lines, sequence_stride, row_stride, cols)
    k = _load(qkv + width + column, key_at, keys, cols, HEAD_DIM)
    v = _load(qkv + 2 * width + column, key_at, keys, cols, HEAD_DIM)
    for first in range(0, ROWS if QUERIES == ROWS else used, QUERIES):
        lines = _lines(first, QUERIES, GROUP)
        rows = lines < used
        at = _offsets(sequence, begin, lines, sequence_stride, row_stride, cols)
        q = _load(qkv + column, at, rows, cols, HEAD_DIM)
        weights, total = _weights(q, k, keys, key_lines, scale, GROUP, ROWS, QUERIES)
        result = dot(narrow(weights, v.dtype), v, _zeros(GROUP, QUERIES, DIM)) / total
        out_at = _offsets(sequence, begin, lines, out_sequence_stride, width, cols)
        _store(out + column, out_at, result, rows, cols, HEAD_DIM)
    _spoil(out + column, sequence, begin, length, longest, (out_sequence_stride, width), cols, HEAD_DIM, ROWS, GROUP)


@_dynamic
def short_attention_backward(
    dout,  # (S, N, D) or (T, D)
    qkv,  # (S, N, 3 D) or (T, 3 D)
    cu,  # (S + 1,) int32 or None
    dqkv,  # (S, N, 3 D) or (T, 3 D), contiguous
    dout_sequence_stride, dout_row_stride, sequence_stride, row_stride, dqkv_sequence_stride,
    tokens, sequences, longest, heads, scale,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head, width = program % heads, heads * HEAD_DIM
    sequence, begin, length = _sequences(program // heads, cu, tokens, sequences, GROUP)
    used = tl.where(length > longest, 0, length)
    cols, column = tl.arange(0, DIM), head * HEAD_DIM
    key_lines = _lines(0, ROWS, GROUP)
    keys = key_lines < used
    key_at = _offsets(sequence, begin, key_lines, sequence_stride, row_stride, cols)
    k = _load(qkv + width + column, key_at, keys, cols, HEAD_DIM)
    v = _load(qkv + 2 * width + column, key_at, keys, cols, HEAD_DIM)
    to_key = _offsets(sequence, begin, key_lines, dqkv_sequence_stride, 3 * width, cols)
    dq_ptr, dk_ptr, dv_ptr = dqkv + column, dqkv + width + column, dqkv + 2 * width + column
    if QUERIES < ROWS:
        dk, dv = _zeros(GROUP, ROWS, DIM), _zeros(GROUP, ROWS, DIM)
        for first in range(0, used, QUERIES):
            lines = _lines(first, QUERIES, GROUP)
            rows = lines < used
            at = _offsets(sequence, begin, lines, sequence_stride, row_stride, cols)
            q = _load(qkv + column, at, rows, cols, HEAD_DIM)
            do_at = _offsets(sequence, begin, lines, dout_sequence_stride, dout_row_stride, cols)
            do = _load(dout + column, do_at, rows, cols, HEAD_DIM)
            weights, dscores = _slopes(q, k, v, do, rows, keys, key_lines, scale, GROUP, ROWS, QUERIES)
            dv = dot(tl.trans(weights), do, dv)
            dk = dot(tl.trans(dscores), q, dk)
            dq = dot(dscores, k, _zeros(GROUP, QUERIES, DIM)) * scale
            to = _offsets(sequence, begin, lines, dqkv_sequence_stride, 3 * width, cols)
            _store(dq_ptr, to, dq, rows, cols, HEAD_DIM)
        _store(dk_ptr, to_key, dk * scale, keys, cols, HEAD_DIM)
        _store(dv_ptr, to_key, dv, keys, cols, HEAD_DIM)
    else:  # each gradient leaves its registers before the next one is begun
        q = _load(qkv + column, key_at, keys, cols, HEAD_DIM)
        do_at = _offsets(sequence, begin, key_lines, dout_sequence_stride, dout_row_stride, cols)
        do = _load(dout + column, do_at, keys, cols, HEAD_DIM)
        weights, dscores = _slopes(q, k, v, do, keys, keys, key_lines, scale, GROUP, ROWS, QUERIES)
        dv = dot(tl.trans(weights), do, _zeros(GROUP, ROWS, DIM))
        _store(dv_ptr, to_key, dv, keys, cols, HEAD_DIM)
        dk = dot(tl.trans(dscores), q, _zeros(GROUP, ROWS, DIM)) * scale
        _store(dk_ptr, to_key, dk, keys, cols, HEAD_DIM)
        dq = dot(dscores, k, _zeros(GROUP, ROWS, DIM)) * scale
        _store(dq_ptr, to_key, dq, keys, cols, HEAD_DIM)
    for part in tl.static_range(3):
        _spoil(dqkv + part * width + column, sequence, begin, length, longest, (dqkv_sequence_stride, 3 * width), cols,
               HEAD_DIM, ROWS, GROUP)  # fmt: skip


# float32 multiplies outside the tensor cores, where a thread holds whole rows of both factors: few query
# rows at a time. (rows of a tile, padded d at most): (query rows, warps), the first that is wide enough.
FLOAT32 = {
    (16, 128): (16, 4),
    (32, 64): (16, 4),
    (32, 128): (16, 8),
    (64, 32): (16, 4),
    (64, 64): (32, 8),
    (128, 32): (16, 16),
}


def shape(longest: int, head_dim: int, dtype: torch.dtype, backward: bool) -> dict[str, int]:
    """Launch shape: rows of a tile, query rows at a time, tiles of a program, warps.

    The largest for which benchmarks/compile_report.py finds no spill on sm_80, sm_90 and sm_100. It
    depends on nothing of a batch but ``longest``, so neither do the bits of a result.
    """
    rows = max(16, triton.next_power_of_2(longest))  # 16: the least that a tensor core multiplies
    dim = max(32, triton.next_power_of_2(head_dim))  # of 16 columns the compiler makes more registers, not fewer
    if dtype == torch.float32:
        group, (queries, warps) = 1, next(v for (r, d), v in FLOAT32.items() if r == rows and d >= dim)
    elif rows <= 32 and rows * dim <= 2048:  # the sums of a tile fit into a warp's registers
        group, queries = (4 if dim <= 64 else 2), rows
        warps = group
    elif rows <= 64:
        group, queries, warps = 1, rows, rows // 16
    elif backward:  # the sums of dk and dv stay in registers while the queries pass
        group, queries, warps = 1, 16, 8
    else:
        group, queries, warps = 1, 64, 4
    return dict(HEAD_DIM=head_dim, DIM=dim, ROWS=rows, QUERIES=queries, GROUP=group, num_warps=warps, num_stages=1)


def _rows_contiguous(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _strides(t: Tensor) -> tuple[int, int]:
    """Strides of (sequence, row); packed rows count over all sequences."""
    return (0, t.stride(0)) if t.dim() == 2 else t.stride()[:2]


def _counts(qkv: Tensor, cu: Tensor | None) -> tuple[int, int]:
    """(tokens of a sequence or of all, sequences)"""
    return (qkv.shape[1], qkv.shape[0]) if cu is None else (qkv.shape[0], cu.shape[0] - 1)


def forward(qkv: Tensor, heads: int, cu: Tensor | None, longest: int) -> Tensor:
    width = qkv.shape[-1] // 3
    out = _launch.empty((*qkv.shape[:-1], width), qkv.dtype, qkv.device)
    if not out.numel():
        return out
    qkv, (tokens, sequences) = _rows_contiguous(qkv), _counts(qkv, cu)
    blocks = shape(longest, width // heads, qkv.dtype, backward=False)
    _launch.launch(
        short_attention_forward, (triton.cdiv(sequences, blocks["GROUP"]) * heads,), qkv, cu, out, *_strides(qkv),
        _strides(out)[0], tokens, sequences, longest, heads, (width // heads) ** -0.5, **blocks,
    )  # fmt: skip
    return out


def backward(dout: Tensor, qkv: Tensor, heads: int, cu: Tensor | None, longest: int) -> Tensor:
    """The gradient of qkv."""
    width = qkv.shape[-1] // 3
    dqkv = _launch.empty(qkv.shape, qkv.dtype, qkv.device)
    if not dqkv.numel():
        return dqkv
    dout, qkv, (tokens, sequences) = _rows_contiguous(dout), _rows_contiguous(qkv), _counts(qkv, cu)
    blocks = shape(longest, width // heads, qkv.dtype, backward=True)
    _launch.launch(
        short_attention_backward, (triton.cdiv(sequences, blocks["GROUP"]) * heads,), dout, qkv, cu, dqkv,
        *_strides(dout), *_strides(qkv), _strides(dqkv)[0], tokens, sequences, longest, heads,
        (width // heads) ** -0.5, **blocks,
    )  # fmt: skip
    return dqkv
