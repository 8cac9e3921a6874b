"""Triton kernels of ``draw_mask`` and ``restore_tokens``; those of ``embed_visible`` are in _embed_triton.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch, _tl

narrow, philox = _tl.narrow, _tl.philox
MAX_PATCHES = 16384  # of a sample, whose keys lie in the registers of one program


@triton.jit(do_not_specialize=["seed", "step", "stream", "N", "K"])
def _draw_mask(
    sample_ids,  # (B,) int64
    drop_first,  # (B, N) bool or None
    seed_ptr, step_ptr,  # int64 scalars on the device, or None: then the integers
    seed, step, stream,
    keep_ids,  # (B, K) int32
    inverse,  # (B, N) int32
    N, K, stride_id, stride_drop, stride_drop_n,
    LOG_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One sample: keys, the K-th smallest of them bit by bit, then ranks by a running count.

    A selection, not a sort: 33 + log2 N counts of a block already in registers, where a bitonic sort
    of 4096 takes 78 rounds of exchanges (and a minute of compiling). The order wanted is that of the
    ids, which the running count gives for nothing.
    """
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    if step_ptr is not None:
        step = tl.load(step_ptr)
    word, _, _, _ = philox(n, tl.load(sample_ids + b * stride_id), stream, seed, step)
    packed = (word.to(tl.int64) << 24) | n  # unique, so no tie has an order to define
    inside = n < N
    if drop_first is not None:
        first = tl.load(drop_first + b * stride_drop + n.to(tl.int64) * stride_drop_n, mask=inside, other=0)
        packed |= (first != 0).to(tl.int64) << 60  # a class above the key
    packed = tl.where(inside, packed, 1 << 62)
    smallest = tl.full((), 0, tl.int64)  # the largest value with fewer than K keys below it
    for i in range(33 + LOG_N):
        bit = tl.where(i == 0, 60, tl.where(i <= 32, 56 - i, 32 + LOG_N - i))
        higher = smallest | (tl.full((), 1, tl.int64) << bit)
        below = tl.sum((packed < higher).to(tl.int32))
        smallest = tl.where(below < K, higher, smallest)
    kept = inside & (packed <= smallest)
    rank = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(inverse + b * N + n, tl.where(kept, rank, -1), mask=inside)
    tl.store(keep_ids + b * K + rank, n, mask=kept)


def draw_mask(sample_ids, num_patches, num_keep, seed, step, seed_ptr, step_ptr, stream, drop_first):
    batch, device = sample_ids.shape[0], sample_ids.device
    keep_ids = _launch.empty((batch, num_keep), torch.int32, device)
    inverse = _launch.empty((batch, num_patches), torch.int32, device)
    if num_keep == 0 or num_patches == 0:
        return keep_ids, inverse.fill_(-1)
    block = max(16, triton.next_power_of_2(num_patches))
    drop_strides = (0, 0) if drop_first is None else drop_first.stride()
    _launch.launch(
        _draw_mask, (batch,), sample_ids, drop_first, seed_ptr, step_ptr, seed, step, stream, keep_ids, inverse,
        num_patches, num_keep, sample_ids.stride(0), *drop_strides,
        LOG_N=block.bit_length() - 1, BLOCK=block, num_warps=min(16, max(1, block // 256)),
    )  # fmt: skip
    return keep_ids, inverse


@triton.jit
def _restore_rows(inverse, b, n, row_inside, num_before, N, K, stride_inv, NUM: tl.constexpr, RANKED: tl.constexpr):
    """Of rows n of sample b: kept or not, rank among the kept, rank among the hidden (where RANKED)."""
    place = tl.load(inverse + b * stride_inv + n, mask=row_inside, other=0)
    kept = place >= 0
    hidden_rank = place * 0
    if RANKED:
        before = 0
        for start in range(0, num_before, NUM):  # hidden rows of the sample in front of this block
            m = start + tl.arange(0, NUM)
            other = tl.load(inverse + b * stride_inv + m, mask=m < num_before, other=0)
            before += tl.sum((other < 0).to(tl.int32))
        hidden = (row_inside & (place < 0)).to(tl.int32)
        hidden_rank = before + tl.cumsum(hidden, 0) - 1
    return kept, place, hidden_rank


@triton.jit(do_not_specialize=["N", "K"])
def _restore_forward(
    x,  # (B, K, D)
    fill,  # (D,), or (B, N - K, D) where FILL_ROWS
    inverse,  # (B, N) int32
    pos,  # (N, D) or None
    out,  # (B, N, D)
    N, K, D, stride_xb, stride_xk, stride_fb, stride_fk, stride_inv, stride_pos,
    FILL_ROWS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, NUM: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * ROWS
    n = start + tl.arange(0, ROWS)
    row_inside = n < N
    kept, place, hidden = _restore_rows(inverse, b, n, row_inside, start, N, K, stride_inv, NUM, FILL_ROWS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d_inside = (d < D)[None]
    from_x = x + b * stride_xb + place.to(tl.int64) * stride_xk
    value = tl.load(from_x[:, None] + d[None], mask=(row_inside & kept)[:, None] & d_inside, other=0.0).to(tl.float32)
    if FILL_ROWS:
        from_fill = fill + b * stride_fb + hidden.to(tl.int64) * stride_fk
        gap = tl.load(from_fill[:, None] + d[None], mask=(row_inside & ~kept)[:, None] & d_inside, other=0.0)
        value += gap.to(tl.float32)  # one of the two is 0
    else:
        gap = tl.load(fill + d, mask=d < D, other=0.0).to(tl.float32)
        value = tl.where(kept[:, None], value, gap[None])
    if pos is not None:
        from_pos = pos + n.to(tl.int64) * stride_pos
        value += tl.load(from_pos[:, None] + d[None], mask=row_inside[:, None] & d_inside, other=0.0).to(tl.float32)
    to = out + (b * N + n).to(tl.int64) * D
    tl.store(to[:, None] + d[None], narrow(value, out.dtype.element_ty), mask=row_inside[:, None] & d_inside)


@triton.jit(do_not_specialize=["B", "N", "K"])
def _restore_backward(
    grad,  # (B, N, D)
    inverse,  # (B, N) int32
    dx,  # (B, K, D) or None
    dfill,  # (B, N - K, D) where FILL_ROWS; else (programs, D) float32, a program's sum; or None
    B, N, K, D, stride_gb, stride_gn, stride_inv,
    FILL_ROWS: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, NUM: tl.constexpr,
):  # fmt: skip
    """Every row of ``grad`` is read once and has one place to go, so no gradient is added to or cleared."""
    blocks = tl.cdiv(N, ROWS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d_inside = (d < D)[None]
    total = tl.zeros((BLOCK,), tl.float32)
    for tile in range(tl.program_id(0) * TILES, (tl.program_id(0) + 1) * TILES):
        b = (tile // blocks).to(tl.int64)
        start = (tile % blocks) * ROWS
        n = start + tl.arange(0, ROWS)
        row_inside = (n < N) & (b < B)
        safe = tl.minimum(b, B - 1)
        kept, place, hidden = _restore_rows(
            inverse, safe, n, row_inside, start, N, K, stride_inv, NUM, FILL_ROWS and dfill is not None
        )
        wanted = row_inside
        if dx is None:
            wanted &= ~kept
        if dfill is None:
            wanted &= kept
        source = grad + safe * stride_gb + n.to(tl.int64) * stride_gn
        row = tl.load(source[:, None] + d[None], mask=wanted[:, None] & d_inside, other=0.0)
        if dx is not None:
            to = dx + (safe * K + place).to(tl.int64) * D
            tl.store(to[:, None] + d[None], row, mask=(row_inside & kept)[:, None] & d_inside)
        if dfill is not None:
            gap = (row_inside & ~kept)[:, None]
            if FILL_ROWS:
                to = dfill + (safe * (N - K) + hidden).to(tl.int64) * D
                tl.store(to[:, None] + d[None], row.to(dfill.dtype.element_ty), mask=gap & d_inside)
            else:
                total += tl.sum(tl.where(gap, row.to(tl.float32), 0.0), 0)
    if dfill is not None:
        if not FILL_ROWS:
            tl.store(dfill + tl.program_id(0).to(tl.int64) * D + d, total, mask=d < D)


@triton.jit(do_not_specialize=["P"])
def _sum_rows(
    parts,  # (P, size) float32
    out,  # (size,)
    P, size,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial sums added in their fixed order: the same bits every time."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, P, ROWS):
        p = start + tl.arange(0, ROWS)
        block = tl.load(parts + p.to(tl.int64)[:, None] * size + i[None], mask=(p < P)[:, None] & (i < size)[None],
                        other=0.0)  # fmt: skip
        total += tl.sum(block, 0)
    tl.store(out + i, narrow(total, out.dtype.element_ty), mask=i < size)


def sum_rows(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """(P, ...) float32 partial sums -> their sum (...) in ``dtype``."""
    out = _launch.empty(parts.shape[1:], dtype, parts.device)
    size = out.numel()
    block = 64 if size < 64 * 1024 else 256
    _launch.launch(_sum_rows, (triton.cdiv(size, block),), parts, out, len(parts), size, ROWS=16, BLOCK=block,
                   num_warps=4)  # fmt: skip
    return out


def _tile(num: int, width: int) -> tuple[int, int]:
    """(rows, columns) of a tile: about 4096 elements, columns that divide the width where they can."""
    block = min(512, max(64, width & -width))
    rows = min(max(1, 4096 // block), triton.next_power_of_2(max(1, num)))
    return rows, block


def restore_tokens(x: Tensor, fill: Tensor, inverse: Tensor, pos: Tensor | None) -> Tensor:
    (batch, keep, width), num = x.shape, inverse.shape[1]
    out = _launch.empty((batch, num, width), x.dtype, x.device)
    if out.numel() == 0:
        return out
    rows, block = _tile(num, width)
    fill_strides = fill.stride()[:2] if fill.dim() == 3 else (0, 0)
    _launch.launch(
        _restore_forward, (batch * triton.cdiv(num, rows), triton.cdiv(width, block)), x, fill, inverse, pos, out,
        num, keep, width, x.stride(0), x.stride(1), *fill_strides, inverse.stride(0),
        0 if pos is None else pos.stride(0),
        FILL_ROWS=fill.dim() == 3, ROWS=rows, BLOCK=block, NUM=1024, num_warps=4,
    )  # fmt: skip
    return out


def restore_tokens_backward(
    grad: Tensor, inverse: Tensor, keep: int, fill_rows: bool, x_dtype, fill_dtype, need_x: bool, need_fill: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of (x, fill); None for those not needed."""
    (batch, num, width), device = grad.shape, grad.device
    fill_shape = (batch, num - keep, width) if fill_rows else (width,)
    dx = _launch.empty((batch, keep, width), x_dtype, device) if need_x else None
    if grad.numel() == 0:
        return dx, grad.new_zeros(fill_shape, dtype=fill_dtype) if need_fill else None
    rows, block = _tile(num, width)
    tiles = batch * triton.cdiv(num, rows)
    # A token's gradient sums over rows: 256 of them a program keep the partial sums below 2 % of the bytes.
    per_program = max(1, 256 // min(rows, num)) if need_fill and not fill_rows else 1
    programs = triton.cdiv(tiles, per_program)
    dfill = None
    if need_fill:
        shape, kind = (fill_shape, fill_dtype) if fill_rows else ((programs, width), torch.float32)
        dfill = _launch.empty(shape, kind, device)
    _launch.launch(
        _restore_backward, (programs, triton.cdiv(width, block)), grad, inverse, dx, dfill, batch, num, keep, width,
        grad.stride(0), grad.stride(1), inverse.stride(0),
        FILL_ROWS=fill_rows, TILES=per_program, ROWS=rows, BLOCK=block, NUM=1024, num_warps=4,
    )  # fmt: skip
    if need_fill and not fill_rows:
        dfill = sum_rows(dfill, fill_dtype)
    return dx, dfill
