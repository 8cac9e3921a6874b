"""Triton kernels of adaLN: one forward and one backward serve both operations (see adaln.py).

A row of D values is held in registers as a head of HEAD values, the largest power of two in D, and
a tail of the rest padded to TAIL, so that 384 = 256 + 128, 768 = 512 + 256 and 1152 = 1024 + 128
waste nothing. A program works inside one sample, keeps that sample's vectors in registers and
steps through one part of its rows. A sample of n rows has max(1, n // chunk) parts of (nearly)
equal length, dense or packed: that depends on nothing outside the sample, so neither do the
bits of the sums. A step takes ROWS rows, each cut into pieces of TILE columns: values (pieces, rows,
columns of a piece), so that a row lies in one warp or few and its sums need no barrier or few. That
takes warps along the rows; before Triton 3.7 they go along the first axis instead, and with pieces
there every sum crosses the warps (six times slower on an H200): values are then (rows, pieces, columns).

Shapes: B samples (S packed), N rows a sample (T packed, all samples together), D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._tl import narrow

BACKWARD_CHUNK = 64  # rows: each moves 6 D bytes or more, each sum of a part 8 D: a surplus of 4 % at most
SEARCH = (128, 1024)  # samples of a pack looked at together: where there are no more than that, where there are
FORWARD_STEPS = 4  # a forward part is at most this many steps: its vectors are read once for all of them
_PIECE, _ROW = (0, 1) if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else (1, 0)  # axes
PIECE_AXIS, ROW_AXIS = tl.constexpr(_PIECE), tl.constexpr(_ROW)
# Row lengths count up to 2^31 and change with the mask ratio; none of these is worth a compilation.
_dynamic = triton.jit(do_not_specialize=["tokens", "samples", "chunk"])


@triton.jit
def _begin(cu, at, tokens, mask=None):
    """cu_tokens[at], kept inside the buffer whatever it holds."""
    at = tl.load(cu + at, mask=mask, other=None if mask is None else 0)
    return tl.minimum(tl.maximum(at.to(tl.int32), 0), tokens)


@triton.jit
def _lengths(cu, at, tokens, samples):
    """Rows of samples ``at`` (0 beyond the last), int32."""
    live = at < samples
    return tl.maximum(_begin(cu, at + 1, tokens, live) - _begin(cu, at, tokens, live), 0)


@triton.jit
def _part(program, cu, tokens, samples, chunk, SEARCH: tl.constexpr):
    """What ``program`` works on: (sample, its first row, number of rows, parts the sample has).

    Rows count from the sample's start (dense) or over all samples (packed). Packed, the sample is
    found by adding up the parts of those before it, SEARCH at a time; programs that are left over
    get sample == samples.
    """
    if cu is None:
        parts = tl.maximum(tokens // chunk, 1)
        sample = program // parts
        begin = 0
        length = tokens
        number = program % parts
    else:
        sample = program * 0
        before = program * 0  # parts of the samples before ours
        total = program * 0
        for first in tl.range(0, samples, SEARCH):
            at = first + tl.arange(0, SEARCH)
            counts = tl.where(at < samples, tl.maximum(_lengths(cu, at, tokens, samples) // chunk, 1), 0)
            ends = total + tl.cumsum(counts, 0)
            passed = (at < samples) & (ends <= program)
            sample += tl.sum(passed.to(tl.int32), 0)
            before = tl.maximum(before, tl.max(tl.where(passed, ends, 0), 0))
            total += tl.sum(counts, 0)
        own = tl.minimum(sample, samples - 1)
        begin = _begin(cu, own, tokens)
        length = tl.maximum(_begin(cu, own + 1, tokens) - begin, 0)
        parts = tl.maximum(length // chunk, 1)
        number = program - before
    rows = (length + parts - 1) // parts
    start = tl.minimum(number * rows, length)
    return sample.to(tl.int64), begin + start, tl.minimum(rows, length - start), parts


@triton.jit
def _row_wise(v):
    """(rows,) to where it broadcasts over values."""
    return v[None, :, None] if ROW_AXIS == 1 else v[:, None, None]


@triton.jit
def _piece_wise(v):
    """(pieces, columns of a piece) to where it broadcasts over values."""
    return v[:, None, :] if PIECE_AXIS == 0 else v[None, :, :]


@triton.jit
def _nothing(cols, ROWS: tl.constexpr):
    """Zeros for sums of ROWS rows of these columns."""
    NUMBER: tl.constexpr = cols.shape[PIECE_AXIS]
    return tl.zeros((NUMBER, ROWS, cols.shape[2]) if PIECE_AXIS == 0 else (ROWS, NUMBER, cols.shape[2]), tl.float32)


@triton.jit
def _vector(ptr, sample, stride, cols, D: tl.constexpr):
    """Part of a sample's vector, at ``cols``, in float32."""
    return tl.load(ptr + sample * stride + cols, mask=cols < D, other=0).to(tl.float32)


@triton.jit
def _seek(ptr, sample, row, sample_stride, row_stride):
    """Pointer to the first of a program's rows. Packed, the stride by sample is 0."""
    return ptr + (sample * sample_stride + row.to(tl.int64) * row_stride)


@triton.jit
def _offsets(rows, stride, cols, LANE: tl.constexpr):
    """Offsets of values, LANE neighbours to a thread: left to itself the compiler gives 16 bytes, which
    are 4 float32 but 8 bfloat16, and carries mixed types from thread to thread through shared memory."""
    NEIGHBOURS: tl.constexpr = LANE if cols.shape[2] > LANE else cols.shape[2]
    return tl.max_contiguous(rows * stride + cols, [1, 1, NEIGHBOURS])


@triton.jit
def _tokens(ptr, rows, stride, cols, live, LANE: tl.constexpr):
    """Values in float32; 0 where not live."""
    return tl.load(ptr + _offsets(rows, stride, cols, LANE), mask=live, other=0).to(tl.float32)


@triton.jit
def _put(ptr, rows, stride, cols, value, live, LANE: tl.constexpr):
    tl.store(ptr + _offsets(rows, stride, cols, LANE), narrow(value, ptr.dtype.element_ty), mask=live)


@triton.jit
def _across(head, tail, TAIL: tl.constexpr):
    """Sums over the columns of head and tail, where they broadcast over values."""
    sums = tl.sum(head, PIECE_AXIS)  # pieces lie in one thread: only what is left goes from lane to lane
    if TAIL == 0:
        sums = tl.sum(sums, 1)
    elif tail.shape[2] == head.shape[2]:
        sums = tl.sum(sums + tl.sum(tail, PIECE_AXIS), 1)
    else:
        sums = tl.sum(sums, 1) + tl.sum(tl.sum(tail, PIECE_AXIS), 1)
    return _row_wise(sums)


@triton.jit
def _columns(FIRST: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Columns FIRST .. FIRST + SIZE in pieces of at most TILE, where they broadcast over values; at least one."""
    WHOLE: tl.constexpr = SIZE if SIZE > 0 else 1
    WIDE: tl.constexpr = WHOLE if WHOLE < TILE else TILE
    return _piece_wise(FIRST + tl.arange(0, WHOLE // WIDE)[:, None] * WIDE + tl.arange(0, WIDE)[None, :])


@triton.jit
def _residual(value, h, gate, new, h_row, new_row, rows, cols, live, LANE: tl.constexpr):
    """x' = x + gate h, written, and as rounded to its type."""
    value = narrow(value + gate * _tokens(h, rows, h_row, cols, live, LANE), new.dtype.element_ty)
    tl.store(new + _offsets(rows, new_row, cols, LANE), value, mask=live)
    return value.to(tl.float32)


@_dynamic
def adaln_forward(
    x, h,  # (B, N, D) or (T, D); h None without a gated residual
    gate, shift, scale,  # (B, D)
    cu,  # (S + 1,) int32, or None
    new, y,  # contiguous, like x
    x_sample, x_row, h_sample, h_row, gate_row, shift_row, scale_row,  # strides, in elements
    tokens, samples, chunk, eps,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    LANE: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    sample, start, count, _ = _part(tl.program_id(0), cu, tokens, samples, chunk, SEARCH)
    if sample >= samples:
        return
    out_sample = 0 if cu is not None else tokens.to(tl.int64) * D
    x, y = _seek(x, sample, start, x_sample, x_row), _seek(y, sample, start, out_sample, D)
    h = h if h is None else _seek(h, sample, start, h_sample, h_row)
    new = new if new is None else _seek(new, sample, start, out_sample, D)
    head, tail = _columns(0, HEAD, TILE), _columns(HEAD, TAIL, TILE)
    gate_head, gate_tail = 0.0, 0.0
    shift_head = _vector(shift, sample, shift_row, head, D)
    scale_head = _vector(scale, sample, scale_row, head, D) + 1
    if h is not None:
        gate_head = _vector(gate, sample, gate_row, head, D)
    if TAIL > 0:
        shift_tail = _vector(shift, sample, shift_row, tail, D)
        scale_tail = _vector(scale, sample, scale_row, tail, D) + 1
        if h is not None:
            gate_tail = _vector(gate, sample, gate_row, tail, D)

    for first in tl.range(0, count, ROWS):
        rows = _row_wise((first + tl.arange(0, ROWS)).to(tl.int64))
        live = rows < count
        value_head, value_tail = _tokens(x, rows, x_row, head, live, LANE), 0.0
        live_tail = live & (tail < D)
        if TAIL > 0:
            value_tail = _tokens(x, rows, x_row, tail, live_tail, LANE)
        if h is not None:
            value_head = _residual(value_head, h, gate_head, new, h_row, D, rows, head, live, LANE)
            if TAIL > 0:
                value_tail = _residual(value_tail, h, gate_tail, new, h_row, D, rows, tail, live_tail, LANE)
        mean = _across(value_head, value_tail, TAIL) / D
        value_head -= mean
        if TAIL > 0:
            value_tail = tl.where(tail < D, value_tail - mean, 0.0)
        rstd = tl.rsqrt(_across(value_head * value_head, value_tail * value_tail, TAIL) / D + eps)
        _put(y, rows, D, head, shift_head + value_head * rstd * scale_head, live, LANE)
        if TAIL > 0:
            _put(y, rows, D, tail, shift_tail + value_tail * rstd * scale_tail, live_tail, LANE)


@triton.jit
def _total(out, partial, slot, whole, at, head, tail, sums_head, sums_tail, D: tl.constexpr, TAIL: tl.constexpr):
    """Sums over a part's rows: the gradient itself (row ``at``) if the part is the whole sample, else a partial."""
    sums_head = _piece_wise(tl.sum(sums_head, ROW_AXIS))
    if whole:
        tl.store(out + at * D + head, narrow(sums_head, out.dtype.element_ty))
    elif partial is not None:
        tl.store(partial + slot * D + head, sums_head)
    if TAIL > 0:
        sums_tail = _piece_wise(tl.sum(sums_tail, ROW_AXIS))
        if whole:
            tl.store(out + at * D + tail, narrow(sums_tail, out.dtype.element_ty), mask=tail < D)
        elif partial is not None:
            tl.store(partial + slot * D + tail, sums_tail, mask=tail < D)


@_dynamic
def adaln_backward(
    dy, dnew,  # like x; either may be None
    x, h,  # what was normalised (x, or x' of the gated form), and h where gate needs a gradient
    gate, scale,  # (B, D); gate where h needs a gradient
    cu,  # (S + 1,) int32, or None
    dx, dh,  # contiguous, like x; None where not needed
    dshift, dscale, dgate,  # contiguous (B, D); None where not needed
    partial,  # float32 (programs, sums needed, D); None if every sample has one part
    dy_sample, dy_row, dnew_sample, dnew_row, x_sample, x_row, h_sample, h_row, gate_row, scale_row,
    tokens, samples, chunk, eps,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    LANE: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sample, start, count, parts = _part(program, cu, tokens, samples, chunk, SEARCH)
    if sample >= samples:
        return
    NORM: tl.constexpr = dy is not None  # without a gradient of y the norm is not there
    FLOW: tl.constexpr = dx is not None or dh is not None or dgate is not None
    out_sample = 0 if cu is not None else tokens.to(tl.int64) * D
    x = _seek(x, sample, start, x_sample, x_row)
    h = h if h is None else _seek(h, sample, start, h_sample, h_row)
    dy = dy if dy is None else _seek(dy, sample, start, dy_sample, dy_row)
    dnew = dnew if dnew is None else _seek(dnew, sample, start, dnew_sample, dnew_row)
    dx = dx if dx is None else _seek(dx, sample, start, out_sample, D)
    dh = dh if dh is None else _seek(dh, sample, start, out_sample, D)
    head, tail = _columns(0, HEAD, TILE), _columns(HEAD, TAIL, TILE)
    scale_head, scale_tail, gate_head, gate_tail = 0.0, 0.0, 0.0, 0.0
    if NORM and FLOW:
        scale_head = _vector(scale, sample, scale_row, head, D) + 1
        if TAIL > 0:
            scale_tail = _vector(scale, sample, scale_row, tail, D) + 1
    if dh is not None:
        gate_head = _vector(gate, sample, gate_row, head, D)
        if TAIL > 0:
            gate_tail = _vector(gate, sample, gate_row, tail, D)
    # Sums stay apart by row of a step until the end: those that are not needed vanish in compilation.
    shift_sum_head, shift_sum_tail = _nothing(head, ROWS), _nothing(tail, ROWS)
    scale_sum_head, scale_sum_tail = shift_sum_head, shift_sum_tail
    gate_sum_head, gate_sum_tail = shift_sum_head, shift_sum_tail

    for first in tl.range(0, count, ROWS):
        rows = _row_wise((first + tl.arange(0, ROWS)).to(tl.int64))
        live = rows < count
        live_tail = live & (tail < D)
        # All is loaded before anything is stored: a load does not overtake a store.
        grad_head, grad_tail, value_tail, into_head, into_tail, h_tail = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        if NORM:
            grad_head = _tokens(dy, rows, dy_row, head, live, LANE)
            if TAIL > 0:
                grad_tail = _tokens(dy, rows, dy_row, tail, live_tail, LANE)
        if NORM and (FLOW or dscale is not None):
            value_head = _tokens(x, rows, x_row, head, live, LANE)
            if TAIL > 0:
                value_tail = _tokens(x, rows, x_row, tail, live_tail, LANE)
        if FLOW and dnew is not None:
            into_head = _tokens(dnew, rows, dnew_row, head, live, LANE)
            if TAIL > 0:
                into_tail = _tokens(dnew, rows, dnew_row, tail, live_tail, LANE)
        if dgate is not None:
            h_head = _tokens(h, rows, h_row, head, live, LANE)
            if TAIL > 0:
                h_tail = _tokens(h, rows, h_row, tail, live_tail, LANE)

        if dshift is not None:
            shift_sum_head += grad_head
            if TAIL > 0:
                shift_sum_tail += grad_tail
        if NORM and (FLOW or dscale is not None):
            mean = _across(value_head, value_tail, TAIL) / D
            centred_head, centred_tail = value_head - mean, 0.0
            if TAIL > 0:
                centred_tail = tl.where(tail < D, value_tail - mean, 0.0)
            rstd = tl.rsqrt(_across(centred_head * centred_head, centred_tail * centred_tail, TAIL) / D + eps)
            if dscale is not None:
                scale_sum_head += grad_head * (centred_head * rstd)
                if TAIL > 0:
                    scale_sum_tail += grad_tail * (centred_tail * rstd)
            if FLOW:
                # dx = (g - mean(g) - xhat mean(g xhat)) / sigma with g = dy (1 + scale), xhat = centred / sigma;
                # the sums do not wait for sigma.
                grad_head, grad_tail = grad_head * scale_head, grad_tail * scale_tail
                plain = _across(grad_head, grad_tail, TAIL) / D
                along = _across(grad_head * centred_head, grad_tail * centred_tail, TAIL) / D * (rstd * rstd)
                grad_head = rstd * (grad_head - plain - centred_head * along)
                if TAIL > 0:
                    grad_tail = rstd * (grad_tail - plain - centred_tail * along)
        if FLOW:
            grad_head, grad_tail = grad_head + into_head, grad_tail + into_tail
            if dx is not None:
                _put(dx, rows, D, head, grad_head, live, LANE)
                if TAIL > 0:
                    _put(dx, rows, D, tail, grad_tail, live_tail, LANE)
            if dh is not None:
                _put(dh, rows, D, head, grad_head * gate_head, live, LANE)
                if TAIL > 0:
                    _put(dh, rows, D, tail, grad_tail * gate_tail, live_tail, LANE)
            if dgate is not None:
                gate_sum_head += grad_head * h_head
                if TAIL > 0:
                    gate_sum_tail += grad_tail * h_tail

    SCALE: tl.constexpr = 1 if dshift is not None else 0  # slots of a program's partials
    GATE: tl.constexpr = SCALE + (1 if dscale is not None else 0)
    slot = program.to(tl.int64) * (GATE + (1 if dgate is not None else 0))
    whole = parts == 1
    if dshift is not None:
        _total(dshift, partial, slot, whole, sample, head, tail, shift_sum_head, shift_sum_tail, D, TAIL)
    if dscale is not None:
        _total(dscale, partial, slot + SCALE, whole, sample, head, tail, scale_sum_head, scale_sum_tail, D, TAIL)
    if dgate is not None:
        _total(dgate, partial, slot + GATE, whole, sample, head, tail, gate_sum_head, gate_sum_tail, D, TAIL)


@triton.jit
def _add(out, partial, first, parts, number, at, cols, D: tl.constexpr, ROWS: tl.constexpr):
    """Row ``at`` of out: the sum of a sample's partials, ``number`` slots apart, in the order of its rows."""
    inside = cols < D
    sums = tl.zeros((ROWS, cols.shape[0]), tl.float32)
    for part in tl.range(0, parts, ROWS):
        parts_here = part + tl.arange(0, ROWS)
        slots = first + parts_here.to(tl.int64) * number
        live = (parts_here < parts)[:, None] & inside[None, :]
        sums += tl.load(partial + slots[:, None] * D + cols[None, :], mask=live, other=0)
    tl.store(out + at * D + cols, narrow(tl.sum(sums, 0), out.dtype.element_ty), mask=inside)


@_dynamic
def adaln_add_parts(
    partial,  # float32 (programs, sums needed, D)
    cu, dshift, dscale, dgate,  # as in adaln_backward
    tokens, samples, chunk,
    D: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    if cu is None:
        parts = tl.maximum(tokens // chunk, 1)
        before = sample.to(tl.int64) * parts
    else:
        parts = tl.maximum(tl.sum(_lengths(cu, sample + tl.arange(0, 1), tokens, samples), 0) // chunk, 1)
        before = tl.zeros((), tl.int64)
        for first in tl.range(0, sample, SEARCH):
            at = first + tl.arange(0, SEARCH)
            counts = tl.where(at < sample, tl.maximum(_lengths(cu, at, tokens, samples) // chunk, 1), 0)
            before += tl.sum(counts, 0)
    if parts == 1:  # written already
        return
    SCALE: tl.constexpr = 1 if dshift is not None else 0
    GATE: tl.constexpr = SCALE + (1 if dscale is not None else 0)
    NUMBER: tl.constexpr = GATE + (1 if dgate is not None else 0)
    sample, first = sample.to(tl.int64), before * NUMBER
    if dshift is not None:
        _add(dshift, partial, first, parts, NUMBER, sample, cols, D, ROWS)
    if dscale is not None:
        _add(dscale, partial, first + SCALE, parts, NUMBER, sample, cols, D, ROWS)
    if dgate is not None:
        _add(dgate, partial, first + GATE, parts, NUMBER, sample, cols, D, ROWS)


def _blocks(width: int, lane: int, most: int, fill: int) -> dict[str, int]:
    """How a step is cut, for 4 warps (more where D is very large).

    lane : values of a tensor that a thread takes at once; most : a row lies in one warp, so that
    its sums need no barrier, unless that gives a thread more values of it than this; fill : rows
    are added until a thread has about so many. None of it depends on how many rows there are, so a
    row is always added up in the same order.
    """
    head = 1 << (width.bit_length() - 1)
    tail = triton.next_power_of_2(width - head) if width > head else 0
    across = triton.next_power_of_2(triton.cdiv(head + tail, 32 * most))  # warps that share a row
    warps = max(4, min(across, 16))
    rows = max(32 * fill * across // (head + tail), 32 * lane // (head + tail), 1)  # of one group of those
    rows = min(1 << (rows.bit_length() - 1), 8) * max(warps // across, 1)
    tile = min(head, 32 * lane * across)
    return dict(D=width, HEAD=head, TAIL=tail, TILE=tile, ROWS=rows, LANE=lane, num_warps=warps)


def _rows_contiguous(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _strides(t: Tensor | None) -> tuple[int, int]:
    """Strides of (sample, row); packed rows count over all samples."""
    return (0, 0) if t is None else (0, t.stride(0)) if t.dim() == 2 else t.stride()[:2]


def _row(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def _grid(x: Tensor, cu: Tensor | None, chunk: int) -> tuple[int, int, int, int]:
    """Programs (packed: at most so many, as sum of max(1, n // chunk) over samples), rows, samples, search width."""
    if cu is None:
        samples, tokens = x.shape[:2]
        return samples * max(tokens // chunk, 1), tokens, samples, 1
    tokens, samples = x.shape[0], cu.shape[0] - 1
    return tokens // chunk + samples, tokens, samples, SEARCH[samples > SEARCH[0]]


def forward(
    x: Tensor, h: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, cu: Tensor | None, eps: float
) -> tuple[Tensor | None, Tensor]:
    """(x' or None, y); h and gate None for the norm alone."""
    new = None if h is None else _launch.empty(x.shape, x.dtype, x.device)
    y = _launch.empty(x.shape, shift.dtype, x.device)
    if not x.numel():
        return new, y
    x, h, gate, shift, scale, cu = map(_rows_contiguous, (x, h, gate, shift, scale, cu))
    blocks = _blocks(x.shape[-1], 16 // x.element_size(), most=36, fill=24)
    # Parts as long as still leaves every processor several programs; they do not touch the result.
    steps = x.numel() // x.shape[-1] // (blocks["ROWS"] * 8 * _launch.processors(x.device))
    chunk = blocks["ROWS"] * min(max(steps, 1), FORWARD_STEPS)
    programs, tokens, samples, search = _grid(x, cu, chunk)
    _launch.launch(
        adaln_forward, (programs,), x, h, gate, shift, scale, cu, new, y, *_strides(x), *_strides(h),
        _row(gate), _row(shift), _row(scale), tokens, samples, chunk, eps, SEARCH=search, **blocks,
    )  # fmt: skip
    return new, y


def backward(
    dy: Tensor | None, dnew: Tensor | None, x: Tensor, h: Tensor | None, gate: Tensor | None, scale: Tensor,
    cu: Tensor | None, eps: float, needs: list[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of x, h, gate, shift, scale, None where not needed.

    x : what was normalised (x' of the gated form); h where gate needs a gradient, gate where h does.
    Without dy, shift and scale must need none.
    """
    batch = (x.shape[0] if cu is None else cu.shape[0] - 1, x.shape[-1])
    shapes = [(x.shape, x.dtype), (x.shape, scale.dtype), *[(batch, scale.dtype)] * 3]
    grads = [_launch.empty(*s, x.device) if need else None for s, need in zip(shapes, needs, strict=True)]
    if not x.numel():  # no row adds anything to the vectors
        return [g if g is None else g.zero_() for g in grads]
    dy, dnew, x, h, gate, scale, cu = map(_rows_contiguous, (dy, dnew, x, h, gate, scale, cu))
    dx, dh, *vectors = grads
    dgate, dshift, dscale = vectors
    number = sum(v is not None for v in vectors)
    # Sums and loads of all inputs share the registers: with a gate, 24 values a thread of each spill.
    most = 18 if dgate is not None else 24
    blocks = _blocks(x.shape[-1], 16 // x.element_size(), most=most, fill=12)
    programs, tokens, samples, search = _grid(x, cu, BACKWARD_CHUNK)
    split = number > 0 and tokens >= 2 * BACKWARD_CHUNK  # some sample may have several parts
    partial = _launch.empty((programs, number, x.shape[-1]), torch.float32, x.device) if split else None
    _launch.launch(
        adaln_backward, (programs,), dy, dnew, x, h if dgate is not None else None, gate, scale, cu, dx, dh,
        dshift, dscale, dgate, partial, *_strides(dy), *_strides(dnew), *_strides(x), *_strides(h), _row(gate),
        _row(scale), tokens, samples, BACKWARD_CHUNK, eps, SEARCH=search, **blocks,
    )  # fmt: skip
    if split:
        cols = min(128, triton.next_power_of_2(x.shape[-1]))
        _launch.launch(
            adaln_add_parts, (samples, triton.cdiv(x.shape[-1], cols)), partial, cu, dshift, dscale, dgate, tokens,
            samples, BACKWARD_CHUNK, D=x.shape[-1], COLS=cols, ROWS=16, SEARCH=search, num_warps=4,
        )  # fmt: skip
    return grads
