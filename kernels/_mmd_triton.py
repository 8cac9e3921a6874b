"""Triton kernels of kernels/mmd.py. Shapes: N rows of x, M of y, d columns; nothing here is (N, M).

The rows of both sets are centred once into ``z`` (rows x + rows y, width): each set padded to whole
blocks of ROWS rows and d to a multiple of 16, with zeros. The squared norm of a padded row is
infinite, so its kernel value is 0 and no tile needs a mask. ``norms`` are those of the rounded rows,
so that |a|^2 + |b|^2 - 2 a.b is a true squared distance (of rows that 16 bits can hold).

Tiles are walked around a circle: block i meets blocks i, i + 1, ... halfway round, so every pair of
blocks is met once and every program has the same work. Sums stay in registers; each program writes
one number, and the numbers are added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch, _tl

ROWS = 64  # kernels/mmd.py pads to this: TILE_ROWS
SUM_PROGRAMS = 128  # partial column sums a row of blocks leaves; every centring program adds them up again
LOG2_E = tl.constexpr(1.4426950408889634)
TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32


@triton.jit
def _load_rows(x, y, rows, cols, n, m, d, x_row, x_col, y_row, y_col):
    """Rows of the pooled set (N + M, d) in float32, 0 outside it."""
    inside, rows, cols = (cols < d)[None, :], rows.to(tl.int64)[:, None], cols.to(tl.int64)[None, :]
    from_x = tl.load(x + rows * x_row + cols * x_col, mask=(rows < n) & inside, other=0.0)
    from_y = tl.load(y + (rows - n) * y_row + cols * y_col, mask=(rows >= n) & (rows < n + m) & inside, other=0.0)
    return from_x.to(tl.float32) + from_y.to(tl.float32)


@triton.jit
def _column_sums_kernel(
    x,  # (N, d)
    y,  # (M, d)
    sums,  # (2, P, width) float32: of the distances to the first row, and of their squares
    n, m, d, width, x_row, x_col, y_row, y_col, programs, per_program,
    BLOCK: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    cols = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    # Distances to one row of the set: squares of the rows themselves would cancel far from the origin.
    first = tl.load(x + cols.to(tl.int64) * x_col, mask=cols < d, other=0.0).to(tl.float32)
    total, squares = tl.zeros((PIECE,), tl.float32), tl.zeros((PIECE,), tl.float32)
    for start in range(0, per_program, BLOCK):
        rows = program * per_program + start + tl.arange(0, BLOCK)
        values = _load_rows(x, y, rows, cols, n, m, d, x_row, x_col, y_row, y_col)
        values = tl.where((rows < n + m)[:, None], values - first[None, :], 0.0)
        total += tl.sum(values, 0)
        squares += tl.sum(values * values, 0)
    tl.store(sums + program * width + cols, total, mask=cols < width)
    tl.store(sums + (programs + program) * width + cols, squares, mask=cols < width)


@triton.jit
def _centre(x, sums, cols, d, width, x_col, programs, count, STAY: tl.constexpr, PROGRAMS: tl.constexpr):
    """(centre, mean) of some columns: the mean in steps of the power of two below the deviation.

    Any centre will do, as distances do not depend on it. Of a round one most 16-bit rows keep every
    bit, and of 0, taken up to STAY steps, all do.
    """
    first = tl.load(x + cols.to(tl.int64) * x_col, mask=cols < d, other=0.0).to(tl.float32)
    total, squares = tl.zeros(cols.shape, tl.float32), tl.zeros(cols.shape, tl.float32)
    for start in range(0, programs, PROGRAMS):
        rows = start + tl.arange(0, PROGRAMS)
        inside = (rows < programs)[:, None] & (cols < width)[None, :]
        at = sums + rows[:, None] * width + cols[None, :]
        total += tl.sum(tl.load(at, mask=inside, other=0.0), 0)
        squares += tl.sum(tl.load(at + programs * width, mask=inside, other=0.0), 0)
    shift = total / count
    mean = first + shift
    variance = squares / count - shift * shift
    step = tl.exp2(tl.floor(0.5 * tl.log2(tl.where(variance > TINY, variance, 1.0))))
    centre = tl.where(tl.abs(mean) <= STAY * step, 0.0, step * tl.floor(mean / step + 0.5))
    return tl.where(variance > TINY, centre, mean), mean


@triton.jit
def _centre_kernel(
    x,  # (N, d)
    y,  # (M, d)
    sums,  # (2, P, width) float32
    z,  # (rows, width)
    norms,  # (rows,) float32
    energy,  # (rows / BLOCK + 1,) float32: sums of the norms, then the squared norm of the mean of z
    n, m, d, width, x_row, x_col, y_row, y_col, programs,
    BLOCK: tl.constexpr, PIECE: tl.constexpr, STAY: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    x_blocks = tl.cdiv(n, BLOCK)
    local = tl.arange(0, BLOCK)
    of_y = block >= x_blocks
    rows = tl.where(of_y, n + (block - x_blocks) * BLOCK, block * BLOCK) + local  # of the pooled set
    valid = rows < tl.where(of_y, n + m, n)
    to = (block.to(tl.int64) * BLOCK + local) * width
    norm, offset = tl.zeros((BLOCK,), tl.float32), 0.0
    for start in range(0, width, PIECE):
        cols = start + tl.arange(0, PIECE)
        centre, mean = _centre(x, sums, cols, d, width, x_col, programs, 1.0 * (n + m), STAY, PROGRAMS)
        values = _load_rows(x, y, rows, cols, n, m, d, x_row, x_col, y_row, y_col) - centre[None, :]
        values = tl.where(valid[:, None] & (cols < d)[None, :], values, 0.0)
        values = _tl.narrow(values, z.dtype.element_ty)
        tl.store(z + to[:, None] + cols[None, :], values, mask=(cols < width)[None, :])
        rounded = values.to(tl.float32)
        norm += tl.sum(rounded * rounded, 1)
        apart = tl.where(cols < d, mean - centre, 0.0)
        offset += tl.sum(apart * apart, 0)
    tl.store(norms + block.to(tl.int64) * BLOCK + local, tl.where(valid, norm, float("inf")))
    tl.store(energy + block, tl.sum(norm, 0))
    if block == 0:
        tl.store(energy + tl.num_programs(0), offset)


@triton.jit
def _widest_rate(energy, blocks, count):
    """1 / (4 m) with m = 2 (mean |z|^2 - |mean z|^2), the mean squared distance over all pairs."""
    total = tl.zeros((1024,), tl.float32)
    for start in range(0, blocks, 1024):
        at = start + tl.arange(0, 1024)
        total += tl.load(energy + at, mask=at < blocks, other=0.0)
    spread = 2.0 * (tl.sum(total, 0) / count - tl.load(energy + blocks))
    rate = 0.25 / tl.where(spread < TINY, TINY, spread)
    return tl.where(rate < TINY, TINY, rate)  # never 0: a padded row is infinitely far, and 0 inf is NaN


@triton.jit
def _rate(rates, k):
    rate = tl.load(rates + k)
    return tl.where(rate < TINY, TINY, rate)


@triton.jit
def _rows(z, block, BLOCK: tl.constexpr, start, width, PIECE: tl.constexpr):
    """z[block, start : start + PIECE], (BLOCK, PIECE), 0 past the width."""
    rows = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    cols = start + tl.arange(0, PIECE)
    return tl.load(z + rows[:, None] * width + cols[None, :], mask=(cols < width)[None, :], other=0.0)


@triton.jit
def _exponent(
    z, norms, mine, my_norms, other, i, j, scale, width,
    BLOCK: tl.constexpr, PIECE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """-scale |a - b|^2, (BLOCK, BLOCK), at most 0. my_norms (BLOCK,) and the result are scaled.

    WHOLE : one piece holds all columns, and mine and other are the rows of blocks i and j already
    """
    product = tl.zeros((BLOCK, BLOCK), tl.float32)
    if WHOLE:
        product = _tl.dot(mine, tl.trans(other), product)
    else:
        for start in range(0, width, PIECE):
            a = _rows(z, i, BLOCK, start, width, PIECE)
            b = _rows(z, j, BLOCK, start, width, PIECE)
            product = _tl.dot(a, tl.trans(b), product)
    your_norms = scale * tl.load(norms + tl.cast(j, tl.int64) * BLOCK + tl.arange(0, BLOCK))
    return tl.minimum(2.0 * scale * product - (my_norms[:, None] + your_norms[None, :]), 0.0)


@triton.jit
def _kernel_sum(exponent, rates, count, LADDER: tl.constexpr):
    """Sum of the kernels over the bandwidths; the ladder's from its widest by squaring."""
    if LADDER:
        one = tl.exp2(exponent)
        two = one * one
        four = two * two
        eight = four * four
        return one + two + (four + eight) + eight * eight
    else:
        total = tl.zeros(exponent.shape, tl.float32)
        for k in range(count):
            total += tl.exp2(exponent * _rate(rates, k))
        return total


@triton.jit
def _kernel_slope(exponent, rates, count, largest, LADDER: tl.constexpr):
    """Sum of rate * kernel over the bandwidths, over the largest rate (the ladder: over 1 / m)."""
    if LADDER:
        one = tl.exp2(exponent)
        two = one * one
        four = two * two
        eight = four * four
        return 0.25 * one + 0.5 * two + four + 2.0 * eight + 4.0 * (eight * eight)
    else:
        total = tl.zeros(exponent.shape, tl.float32)
        for k in range(count):
            rate = _rate(rates, k)
            total += (rate / largest) * tl.exp2(exponent * rate)
        return total


@triton.jit
def _tile_sums_kernel(
    z,  # (rows, width)
    norms,  # (rows,) float32
    energy,  # (blocks + 1,) float32
    rates,  # (count,) float32, not read by the ladder
    partials,  # (blocks, CHUNKS) float32
    n, m, width, count, within_x, across, within_y, chunks,
    BLOCK: tl.constexpr, PIECE: tl.constexpr, WHOLE: tl.constexpr, LADDER: tl.constexpr,
):  # fmt: skip
    """within_x, across, within_y : the weight of an ordered pair of either kind."""
    i, chunk = tl.program_id(0), tl.program_id(1)
    x_blocks = tl.cdiv(n, BLOCK)
    blocks = x_blocks + tl.cdiv(m, BLOCK)
    half = blocks // 2
    steps = (blocks + 1) // 2 + tl.where((blocks % 2 == 0) & (i < half), 1, 0)  # opposite blocks meet once
    begin, end = steps * chunk // chunks, steps * (chunk + 1) // chunks
    scale = tl.full((), LOG2_E, tl.float32)
    if LADDER:
        scale *= _widest_rate(energy, blocks, 1.0 * (n + m))
    mine = _rows(z, i, BLOCK, 0, width, PIECE)
    my_norms = scale * tl.load(norms + i.to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    if chunk == 0:  # a block with itself: both orders are there, and the diagonal is left to the end
        exponent = _exponent(z, norms, mine, my_norms, mine, i, i, scale, width, BLOCK, PIECE, WHOLE)
        value = _kernel_sum(exponent, rates, count, LADDER)
        place = tl.arange(0, BLOCK)
        total = tl.where(i < x_blocks, within_x, within_y) * tl.where(place[:, None] == place[None, :], 0.0, value)
    for step in range(tl.maximum(begin, 1), end):
        j = (i + step) % blocks
        other = mine
        if WHOLE:
            other = _rows(z, j, BLOCK, 0, width, PIECE)
        exponent = _exponent(z, norms, mine, my_norms, other, i, j, scale, width, BLOCK, PIECE, WHOLE)
        within = tl.where(i < x_blocks, within_x, within_y)
        weight = 2.0 * tl.where((i < x_blocks) == (j < x_blocks), within, across)
        total += weight * _kernel_sum(exponent, rates, count, LADDER)
    tl.store(partials + i * chunks + chunk, tl.sum(tl.sum(total, 1), 0))


@triton.jit
def _finish_kernel(
    partials,  # (number,) float32
    energy,  # (blocks + 1,) float32
    value,  # () float32
    rate,  # (1,) float32: 1 / (4 m), kept for backward; 0 without a ladder
    number, n, m,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, LADDER: tl.constexpr, UNBIASED: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, number, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(partials + at, mask=at < number, other=0.0).to(tl.float64)
    result = tl.sum(total, 0)
    if not UNBIASED:  # the diagonals are ones
        one = tl.full((), 1.0, tl.float64)
        result += one / n + one / m
    tl.store(value, result.to(tl.float32))
    widest = 0.0
    if LADDER:
        widest = _widest_rate(energy, tl.cdiv(n, ROWS) + tl.cdiv(m, ROWS), 1.0 * (n + m))
    tl.store(rate, widest)


@triton.jit
def _slopes_kernel(
    z,  # (rows, width)
    norms,  # (rows,) float32
    rates,  # (count,) float32; the ladder: (1,), 1 / (4 m)
    partials,  # (chunks, side rows, width) float32
    n, m, width, count, side_rows, first_block, ratio, chunks,
    BLOCK: tl.constexpr, PIECE: tl.constexpr, OUT: tl.constexpr,
    WHOLE: tl.constexpr, SPLIT: tl.constexpr, LADDER: tl.constexpr,
):  # fmt: skip
    """Sum over the other rows b of slope(a, b) (a - b), for the rows a of one set.

    ratio : weight of a row of x over that of a row of y
    """
    block, chunk, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i = block + first_block
    x_blocks = tl.cdiv(n, BLOCK)
    blocks = x_blocks + tl.cdiv(m, BLOCK)
    begin, end = (blocks * chunk) // chunks, (blocks * (chunk + 1)) // chunks
    scale, largest = tl.full((), LOG2_E, tl.float32), tl.full((), TINY, tl.float32)
    if LADDER:
        scale *= tl.load(rates)
    else:
        for k in range(count):
            largest = tl.maximum(largest, _rate(rates, k))
    mine = _rows(z, i, BLOCK, 0, width, PIECE)
    my_norms = scale * tl.load(norms + i.to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    place = tl.arange(0, BLOCK)
    pulled, weights = tl.zeros((BLOCK, OUT), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for of_y in range(2):
        start = tl.where(of_y == 0, begin, tl.maximum(begin, x_blocks))
        stop = tl.where(of_y == 0, tl.minimum(end, x_blocks), end)
        for j in range(start, stop):
            other = _rows(z, j, BLOCK, piece * OUT, width, OUT)
            exponent = _exponent(z, norms, mine, my_norms, other, i, j, scale, width, BLOCK, PIECE, WHOLE)
            slope = _kernel_slope(exponent, rates, count, largest, LADDER)
            if j == i:  # a row does not pull itself: far apart rows would drown in the rounding of that
                slope = tl.where(place[:, None] == place[None, :], 0.0, slope)
            weights += tl.sum(slope, 1)
            high = _tl.narrow(slope, z.dtype.element_ty)
            pulled = _tl.dot(high, other, pulled)
            if SPLIT:  # the gradient is a small difference: one 16-bit rounding of each slope would show
                low = _tl.narrow(slope - high.to(tl.float32), z.dtype.element_ty)
                pulled = _tl.dot(low, other, pulled)
        factor = tl.where(of_y == 0, ratio, 1.0)  # here, not on the slopes: in 16 bits these keep their range
        pulled *= factor
        weights *= factor
    own = _rows(z, i, BLOCK, piece * OUT, width, OUT).to(tl.float32)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    cols = piece * OUT + tl.arange(0, OUT)
    at = (chunk.to(tl.int64) * side_rows + rows.to(tl.int64))[:, None] * width + cols[None, :]
    inside = (rows < side_rows)[:, None] & (cols < width)[None, :]
    tl.store(partials + at, weights[:, None] * own - pulled, mask=inside)


@triton.jit
def _gradient_kernel(
    grad,  # () float32
    partials,  # (chunks, side rows, width) float32
    rates,  # (count,) float32
    out,  # (side rows, d)
    width, d, count, side_rows, chunks, factor,
    BLOCK: tl.constexpr, PIECE: tl.constexpr, LADDER: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    inside = (rows < side_rows)[:, None] & (cols < d)[None, :]
    total = tl.zeros((BLOCK, PIECE), tl.float32)
    for chunk in range(chunks):
        at = (tl.cast(chunk, tl.int64) * side_rows + rows)[:, None] * width + cols[None, :]
        total += tl.load(partials + at, mask=inside, other=0.0)
    largest = tl.full((), TINY, tl.float32)
    if LADDER:
        largest = 4.0 * tl.load(rates)
    else:
        for k in range(count):
            largest = tl.maximum(largest, _rate(rates, k))
    total = total * (factor * largest) * tl.load(grad).to(tl.float32)
    tl.store(out + rows[:, None] * d + cols[None, :], _tl.narrow(total, out.dtype.element_ty), mask=inside)


def _piece(width: int, limit: int) -> int:
    return min(max(triton.next_power_of_2(width), 16), limit)


def _chunks(blocks: int, steps: int, device, waves: int) -> int:
    """Into how many programs a row of tiles is split, to fill the device ``waves`` times over."""
    return max(1, min(steps, -(-waves * _launch.processors(device) // blocks)))


def _shape(z: Tensor) -> tuple[int, bool, int]:
    """(columns of a piece, whether it holds all, warps) of the tiles: by type, then by width.

    float32 multiplies without tensor cores: short pieces, as all of one is in registers, and more threads.
    """
    width = z.shape[1]
    if z.element_size() == 4:
        return _piece(width, 32), width <= 16, 8
    return (_piece(width, 128), True, 4) if width <= 128 else (64, False, 4)


def forward(x: Tensor, y: Tensor, rates: Tensor | None, weights: tuple, unbiased: bool, rows: int, width: int):
    """(value (), z (rows, width), norms (rows,), rate (1,)).

    rates : (k,) float32, 1 / bandwidth; None is the ladder. weights : of an ordered pair of different
    rows, both of x, one of each, both of y
    """
    (n, d), m, device = x.shape, len(y), x.device
    value, z = _launch.empty((), torch.float32, device), _launch.empty((rows, width), x.dtype, device)
    norms, rate = _launch.empty((rows,), torch.float32, device), _launch.empty((1,), torch.float32, device)
    blocks, ladder = rows // ROWS, rates is None
    if not d:
        return value.zero_(), z, norms, rate  # all rows are alike
    sets = (n, m, d, width, *x.stride(), *y.stride())
    piece = _piece(width, 64)
    programs = max(1, min(-(-(n + m) // ROWS), max(8, SUM_PROGRAMS * 64 // width)))
    per_program = -(-(n + m) // (programs * 32)) * 32
    programs = -(-(n + m) // per_program)
    sums = _launch.empty((2, programs, width), torch.float32, device)
    _launch.launch(
        _column_sums_kernel, (programs, -(-width // piece)), x, y, sums, *sets, programs, per_program,
        BLOCK=32, PIECE=piece, num_warps=4,
    )  # fmt: skip
    energy = _launch.empty((blocks + 1,), torch.float32, device)
    _launch.launch(
        _centre_kernel, (blocks,), x, y, sums, z, norms, energy, *sets, programs,
        BLOCK=ROWS, PIECE=piece, STAY=0.0 if x.element_size() == 4 else 2.0, PROGRAMS=16, num_warps=4, maxnreg=168,
    )  # fmt: skip
    count = 5 if ladder else len(rates)
    chunks = _chunks(blocks, blocks // 2 + 1, device, 4)
    partials = _launch.empty((blocks * chunks,), torch.float32, device)
    long, whole, warps = _shape(z)
    within_x, across, within_y = (w / count for w in weights)
    _launch.launch(
        _tile_sums_kernel, (blocks, chunks), z, norms, energy, energy if ladder else rates, partials,
        n, m, width, count, within_x, across, within_y, chunks,
        BLOCK=ROWS, PIECE=long, WHOLE=whole, LADDER=ladder, num_warps=warps,
    )  # fmt: skip
    _launch.launch(
        _finish_kernel, (1,), partials, energy, value, rate, len(partials), n, m,
        ROWS=ROWS, BLOCK=1024, LADDER=ladder, UNBIASED=unbiased, num_warps=4,
    )  # fmt: skip
    return value, z, norms, rate


def backward(
    grad: Tensor, z: Tensor, norms: Tensor, rates: Tensor, weights: tuple, n: int, m: int, d: int, *, ladder: bool,
    of_y: bool,
) -> Tensor:  # fmt: skip
    """The gradient (n, d) by the rows of x, or (m, d) by those of y, in the type of z."""
    device, width = z.device, z.shape[1]
    side, count = (m if of_y else n), (5 if ladder else len(rates))
    out = _launch.empty((side, d), z.dtype, device)
    if not d:
        return out
    within_x, across, within_y = weights
    to_x, to_y = (across, within_y) if of_y else (within_x, across)
    (long, whole, warps), half = _shape(z), z.element_size() == 2
    wide = long if whole else 128 if half else _piece(width, 64)  # columns of the gradient a program
    blocks, pieces = -(-side // ROWS), -(-width // wide)
    # Left to itself ptxas would rather spill a few bytes than keep one block less on a multiprocessor.
    room = dict(maxnreg=248) if half and whole else {}
    chunks = _chunks(blocks * pieces, min(len(z) // ROWS, 16), device, 2)
    partials = _launch.empty((chunks, side, width), torch.float32, device)
    _launch.launch(
        _slopes_kernel, (blocks, chunks, pieces), z, norms, rates, partials, n, m, width, count, side,
        -(-n // ROWS) if of_y else 0, to_x / to_y, chunks, BLOCK=ROWS, PIECE=long, OUT=wide,
        WHOLE=whole, SPLIT=half, LADDER=ladder, num_warps=warps if whole else 8, **room,
    )  # fmt: skip
    piece = _piece(width, 64)
    _launch.launch(
        _gradient_kernel, (-(-side // 32), -(-width // piece)), grad, partials, rates, out, width, d, count, side,
        chunks, -4 * to_y / count, BLOCK=32, PIECE=piece, LADDER=ladder, num_warps=4,
    )  # fmt: skip
    return out
