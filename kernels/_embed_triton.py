"""Triton kernels of ``embed_visible``: patches gathered, merged and multiplied without leaving the chip.

A tile of kept patches is formed in registers (gather, Philox noise, bilinear coarse image, Eq. 6) and
goes straight into the matrix product. Columns of a patch come in three parts, as in ``weight``:
state (C p p), sources (Cs p p), coarse_up (C p p), each padded to a power of two for the product only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch, _tl
from ._patch_mask_triton import sum_rows

dot, narrow, philox, normal_pair = _tl.dot, _tl.narrow, _tl.philox, _tl.normal_pair


@triton.jit
def _rows_of(keep_ids, r, R, K, COLS):
    """Rows r of (B K, ...): inside or not, sample, patch number, patch row and column."""
    inside = r < R
    b = tl.where(inside, r // K, 0).to(tl.int64)
    n = tl.where(inside, r % K, 0)
    if keep_ids is not None:
        n = tl.load(keep_ids + b * K + n, mask=inside, other=0).to(tl.int32)
    return inside, b, n, n // COLS, n % COLS


@triton.jit
def _columns(start, SIZE: tl.constexpr, P: tl.constexpr):
    """Columns start .. start + SIZE of a part: channel, pixel row and pixel column in the patch."""
    j = start + tl.arange(0, SIZE)
    return j, j // (P * P), (j // P) % P, j % P


@triton.jit
def _pixels(image, b, pr, pc, channel, i, q, s, inside, P: tl.constexpr):
    """Pixels of patches (rows) at columns, (rows, columns) float32; s = strides of (B, C, H, W)."""
    rows = b * s[0] + (pr * P).to(tl.int64) * s[2] + (pc * P).to(tl.int64) * s[3]
    columns = channel.to(tl.int64) * s[1] + i.to(tl.int64) * s[2] + q.to(tl.int64) * s[3]
    return tl.load(image + rows[:, None] + columns[None], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _upsampled(coarse, b, pr, pc, channel, i, q, s, inside, HC, WC, P: tl.constexpr):
    """The coarse image at pixels of the fine one: bilinear, scale 2, align_corners False, edges held."""
    h = (pr * P)[:, None] + i[None]
    w = (pc * P)[:, None] + q[None]
    # Pixel 2m takes 1/4 of m - 1 and 3/4 of m; pixel 2m + 1 takes 3/4 of m and 1/4 of m + 1.
    h0, w0 = (h - 1) >> 1, (w - 1) >> 1
    fh = tl.where((h & 1) == 0, 0.75, 0.25)
    fw = tl.where((w & 1) == 0, 0.75, 0.25)
    top, bottom = tl.maximum(h0, 0).to(tl.int64) * s[2], tl.minimum(h0 + 1, HC - 1).to(tl.int64) * s[2]
    left, right = tl.maximum(w0, 0).to(tl.int64) * s[3], tl.minimum(w0 + 1, WC - 1).to(tl.int64) * s[3]
    base = coarse + (b * s[0])[:, None] + (channel.to(tl.int64) * s[1])[None]
    a = tl.load(base + top + left, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(base + top + right, mask=inside, other=0.0).to(tl.float32)
    upper = a + fw * (c - a)
    a = tl.load(base + bottom + left, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(base + bottom + right, mask=inside, other=0.0).to(tl.float32)
    lower = a + fw * (c - a)
    return upper + fh * (lower - upper)


@triton.jit
def _drawn(b, pr, pc, start, sample_ids, stride_id, seed, step, stream, row_inside, H, W,
           SIZE: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """Philox normals of the patches' pixels, (rows, SIZE), by their place in a sample's (C, H, W)."""
    sample = tl.load(sample_ids + b * stride_id, mask=row_inside, other=0)[:, None]
    corner = (pr * P * W + pc * P)[:, None]
    if P % 4 == 0:  # four neighbours share a call: it gives four words
        j = start + 4 * tl.arange(0, SIZE // 4)
        place = (j // (P * P) * H + (j // P) % P) * W + j % P
        place = corner + place[None]
        w0, w1, w2, w3 = philox(place >> 2, sample, stream, seed, step)
        n0, n1 = normal_pair(w0, w1)
        n2, n3 = normal_pair(w2, w3)
        return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (b.shape[0], SIZE))
    j = start + tl.arange(0, SIZE)
    place = (j // (P * P) * H + (j // P) % P) * W + j % P
    place = corner + place[None]
    w0, w1, w2, w3 = philox(place >> 2, sample, stream, seed, step)
    later = (place & 2) != 0
    even, odd = normal_pair(tl.where(later, w2, w0), tl.where(later, w3, w1))
    return tl.where((place & 1) == 0, even, odd)


@triton.jit
def _state(
    y, eps, coarse, abar, state_scale, sample_ids, seed_ptr, step_ptr, seed, step, stream,
    b, pr, pc, row_inside, start, sy, se, sc, stride_id, H, W, HC, WC,
    C: tl.constexpr, P: tl.constexpr, SIZE: tl.constexpr, DRAW: tl.constexpr,
):  # fmt: skip
    """(scaled state of Eq. 6, coarse_up) at columns start .. start + SIZE of kept patches, float32."""
    j, channel, i, q = _columns(start, SIZE, P)
    inside = row_inside[:, None] & (j < C * P * P)[None]
    a = tl.load(abar + b, mask=row_inside, other=1.0)
    root = tl.sqrt_rn(a)
    state = root[:, None] * _pixels(y, b, pr, pc, channel, i, q, sy, inside, P)
    if DRAW:
        if seed_ptr is not None:
            seed = tl.load(seed_ptr)
        if step_ptr is not None:
            step = tl.load(step_ptr)
        noise = _drawn(b, pr, pc, start, sample_ids, stride_id, seed, step, stream, row_inside, H, W, SIZE, P)
        state += tl.sqrt_rn(1.0 - a)[:, None] * tl.where(inside, noise, 0.0)
    elif eps is not None:
        state += tl.sqrt_rn(1.0 - a)[:, None] * _pixels(eps, b, pr, pc, channel, i, q, se, inside, P)
    up = tl.zeros_like(state)
    if coarse is not None:
        up = _upsampled(coarse, b, pr, pc, channel, i, q, sc, inside, HC, WC, P)
        state += (1.0 - root)[:, None] * up
    if state_scale is not None:
        state *= tl.load(state_scale + b, mask=row_inside, other=0.0)[:, None]
    return state, up


@triton.jit
def _weights(weight, d, D, offset, start, SIZE: tl.constexpr, LIMIT, stride):
    """weight[d, offset + start ...] as (SIZE, d), zero past the part's LIMIT columns."""
    j = start + tl.arange(0, SIZE)
    at = weight + d.to(tl.int64)[None] * stride + (offset + j)[:, None]
    return tl.load(at, mask=(d < D)[None] & (j < LIMIT)[:, None], other=0.0)


@triton.jit(do_not_specialize=["seed", "step", "stream", "R", "K"])
def _embed_forward(
    y, sources, coarse, eps,  # (B, C, H, W), (B, Cs, H, W), (B, C, HC, WC) or None, (B, C, H, W) or None
    abar, state_scale,  # (B,) float32; state_scale may be None
    sample_ids, seed_ptr, step_ptr, seed, step, stream,
    keep_ids,  # (B, K) int32 or None for every patch
    weight, bias, pos,  # (D, P), (D,) or None, (N, D) or None
    out,  # (B, K, D)
    R, K, D, H, W, HC, WC, y_b, y_c, y_h, y_w, s_b, s_c, s_h, s_w, c_b, c_c, c_h, c_w, e_b, e_c, e_h, e_w,
    stride_id, stride_weight, stride_pos,
    C: tl.constexpr, CS: tl.constexpr, P: tl.constexpr, COLS: tl.constexpr, DRAW: tl.constexpr,
    STATE: tl.constexpr, STATE_PARTS: tl.constexpr, CLEAN: tl.constexpr, CLEAN_PARTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of kept patches times blocks of D. A part of one piece is formed once, before the loop over D."""
    PP: tl.constexpr = P * P
    sy, ss, sc, se = (y_b, y_c, y_h, y_w), (s_b, s_c, s_h, s_w), (c_b, c_c, c_h, c_w), (e_b, e_c, e_h, e_w)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside, b, n, pr, pc = _rows_of(keep_ids, r, R, K, COLS)
    kind = weight.dtype.element_ty
    if STATE_PARTS == 1:
        state, up = _state(y, eps, coarse, abar, state_scale, sample_ids, seed_ptr, step_ptr, seed, step, stream,
                           b, pr, pc, inside, 0, sy, se, sc, stride_id, H, W, HC, WC, C, P, STATE, DRAW)  # fmt: skip
        state, up = narrow(state, kind), narrow(up, kind)
    if CLEAN_PARTS == 1:
        j, channel, i, q = _columns(0, CLEAN, P)
        clean = _pixels(sources, b, pr, pc, channel, i, q, ss, inside[:, None] & (j < CS * PP)[None], P)
        clean = narrow(clean, kind)
    for block in range(tl.program_id(1), tl.cdiv(D, BLOCK), tl.num_programs(1)):
        d = block * BLOCK + tl.arange(0, BLOCK)
        acc = tl.zeros((ROWS, BLOCK), tl.float32)
        for part in tl.static_range(STATE_PARTS):
            if STATE_PARTS > 1:
                wide, wide_up = _state(y, eps, coarse, abar, state_scale, sample_ids, seed_ptr, step_ptr, seed, step,
                                       stream, b, pr, pc, inside, part * STATE, sy, se, sc, stride_id, H, W, HC, WC,
                                       C, P, STATE, DRAW)  # fmt: skip
                state, up = narrow(wide, kind), narrow(wide_up, kind)
            acc = dot(state, _weights(weight, d, D, 0, part * STATE, STATE, C * PP, stride_weight), acc)
            if coarse is not None:
                acc = dot(up, _weights(weight, d, D, (C + CS) * PP, part * STATE, STATE, C * PP, stride_weight), acc)
        if CLEAN_PARTS == 1:
            acc = dot(clean, _weights(weight, d, D, C * PP, 0, CLEAN, CS * PP, stride_weight), acc)
        else:
            for part in range(CLEAN_PARTS):
                j, channel, i, q = _columns(part * CLEAN, CLEAN, P)
                some = _pixels(sources, b, pr, pc, channel, i, q, ss, inside[:, None] & (j < CS * PP)[None], P)
                w = _weights(weight, d, D, C * PP, part * CLEAN, CLEAN, CS * PP, stride_weight)
                acc = dot(narrow(some, kind), w, acc)
        if bias is not None:
            acc += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None]
        both = inside[:, None] & (d < D)[None]
        if pos is not None:
            at = pos + n.to(tl.int64)[:, None] * stride_pos + d[None]
            acc += tl.load(at, mask=both, other=0.0).to(tl.float32)
        to = out + r.to(tl.int64)[:, None] * D + d[None]
        tl.store(to, narrow(acc, out.dtype.element_ty), mask=both)


@triton.jit
def _kahan(acc, term, lost):
    """(acc + term, what rounding lost): the error of a float32 sum does not grow with its length."""
    term -= lost
    total = acc + term
    return total, (total - acc) - term


@triton.jit
def _add_product(a, b, acc, lost, KAHAN: tl.constexpr):
    """(acc + a @ b, what rounding lost)."""
    if KAHAN:
        acc, lost = _kahan(acc, dot(a, b, tl.zeros_like(acc)), lost)
    else:
        acc = dot(a, b, acc)
    return acc, lost


@triton.jit(do_not_specialize=["seed", "step", "stream", "R", "K"])
def _embed_weights(
    y, sources, coarse, eps, abar, state_scale, sample_ids, seed_ptr, step_ptr, seed, step, stream, keep_ids,
    grad,  # (B, K, D)
    dweight, dbias,  # (splits, D, P), (splits, D) or None
    R, K, D, H, W, HC, WC, y_b, y_c, y_h, y_w, s_b, s_c, s_h, s_w, c_b, c_c, c_h, c_w, e_b, e_c, e_h, e_w,
    stride_id, stride_gb, stride_gk,
    C: tl.constexpr, CS: tl.constexpr, P: tl.constexpr, COLS: tl.constexpr, DRAW: tl.constexpr,
    STATE: tl.constexpr, STATE_PARTS: tl.constexpr, CLEAN: tl.constexpr, CLEAN_PARTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """gradT @ patches, the patches formed again: one block of D, one piece of each part, a share of the rows."""
    PP: tl.constexpr = P * P
    WIDTH: tl.constexpr = (C + CS) * PP if coarse is None else (2 * C + CS) * PP
    sy, ss, sc, se = (y_b, y_c, y_h, y_w), (s_b, s_c, s_h, s_w), (c_b, c_c, c_h, c_w), (e_b, e_c, e_h, e_w)
    part, split = tl.program_id(1), tl.program_id(2)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    kind = grad.dtype.element_ty
    KAHAN: tl.constexpr = kind == tl.float32
    of_state, lost_state = tl.zeros((BLOCK, STATE), tl.float32), tl.zeros((BLOCK, STATE), tl.float32)
    of_up, lost_up = tl.zeros((BLOCK, STATE), tl.float32), tl.zeros((BLOCK, STATE), tl.float32)
    of_clean, lost_clean = tl.zeros((BLOCK, CLEAN), tl.float32), tl.zeros((BLOCK, CLEAN), tl.float32)
    of_bias, lost_bias = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    share = tl.cdiv(tl.cdiv(R, ROWS), tl.num_programs(2))
    for tile in range(split * share, tl.minimum((split + 1) * share, tl.cdiv(R, ROWS))):
        r = tile * ROWS + tl.arange(0, ROWS)
        inside, b, _, pr, pc = _rows_of(keep_ids, r, R, K, COLS)
        at = grad + (b * stride_gb)[:, None] + (r % K).to(tl.int64)[:, None] * stride_gk + d[None]
        rows = tl.load(at, mask=inside[:, None] & (d < D)[None], other=0.0)  # (rows, d)
        if dbias is not None:
            of_bias, lost_bias = _kahan(of_bias, tl.sum(rows.to(tl.float32), 0), lost_bias)
        if part < STATE_PARTS:
            state, up = _state(y, eps, coarse, abar, state_scale, sample_ids, seed_ptr, step_ptr, seed, step, stream,
                               b, pr, pc, inside, part * STATE, sy, se, sc, stride_id, H, W, HC, WC,
                               C, P, STATE, DRAW)  # fmt: skip
            of_state, lost_state = _add_product(tl.trans(rows), narrow(state, kind), of_state, lost_state, KAHAN)
            if coarse is not None:
                of_up, lost_up = _add_product(tl.trans(rows), narrow(up, kind), of_up, lost_up, KAHAN)
        if part < CLEAN_PARTS:
            j, channel, i, q = _columns(part * CLEAN, CLEAN, P)
            clean = _pixels(sources, b, pr, pc, channel, i, q, ss, inside[:, None] & (j < CS * PP)[None], P)
            of_clean, lost_clean = _add_product(tl.trans(rows), narrow(clean, kind), of_clean, lost_clean, KAHAN)
    to = dweight + (split.to(tl.int64) * D + d)[:, None] * WIDTH
    j = part * STATE + tl.arange(0, STATE)
    inside = (d < D)[:, None] & (j < C * PP)[None]
    tl.store(to + j[None], narrow(of_state, dweight.dtype.element_ty), mask=inside)
    if coarse is not None:
        tl.store(to + ((C + CS) * PP + j)[None], narrow(of_up, dweight.dtype.element_ty), mask=inside)
    j = part * CLEAN + tl.arange(0, CLEAN)
    inside = (d < D)[:, None] & (j < CS * PP)[None]
    tl.store(to + (C * PP + j)[None], narrow(of_clean, dweight.dtype.element_ty), mask=inside)
    if dbias is not None:
        if part == 0:
            tl.store(dbias + split.to(tl.int64) * D + d, narrow(of_bias, dbias.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["R", "K"])
def _embed_sources(
    grad,  # (B, K, D)
    keep_ids,  # (B, K) int32 or None
    weight,  # (D, P)
    dsources,  # (B, Cs, H, W)
    R, K, D, H, W, N, stride_gb, stride_gk, stride_weight, tiles,
    C: tl.constexpr, CS: tl.constexpr, P: tl.constexpr, COLS: tl.constexpr, CLEAN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    """The first ``tiles`` programs write the kept patches of dsources, grad @ weight; the rest zero the dropped."""
    PP: tl.constexpr = P * P
    j, channel, i, q = _columns(tl.program_id(1) * CLEAN, CLEAN, P)
    columns = (channel.to(tl.int64) * H + i) * W + q
    if tl.program_id(0) < tiles:
        r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        inside, b, n, pr, pc = _rows_of(keep_ids, r, R, K, COLS)
        acc = tl.zeros((ROWS, CLEAN), tl.float32)
        for start in range(0, D, BLOCK):
            d = start + tl.arange(0, BLOCK)
            at = grad + (b * stride_gb)[:, None] + (r % K).to(tl.int64)[:, None] * stride_gk + d[None]
            rows = tl.load(at, mask=inside[:, None] & (d < D)[None], other=0.0)
            w = _weights(weight, d, D, C * PP, tl.program_id(1) * CLEAN, CLEAN, CS * PP, stride_weight)
            if weight.dtype.element_ty == tl.float32:  # one long chain of sums is less exact than cuBLAS is
                acc += dot(rows, tl.trans(w), tl.zeros_like(acc))
            else:
                acc = dot(rows, tl.trans(w), acc)
    else:
        blocks = tl.cdiv(N, ROWS)
        at = tl.program_id(0) - tiles
        n = (at % blocks) * ROWS + tl.arange(0, ROWS)
        sample = (at // blocks).to(tl.int64)
        dropped = n < N
        for start in range(0, K, IDS):
            k = start + tl.arange(0, IDS)
            kept = tl.load(keep_ids + sample * K + k, mask=k < K, other=-1)
            dropped &= tl.sum((n[:, None] == kept[None]).to(tl.int32), 1) == 0
        inside, b, pr, pc = dropped, sample + n * 0, n // COLS, n % COLS
        acc = tl.zeros((ROWS, CLEAN), tl.float32)
    patch = b * CS * H * W + (pr * P).to(tl.int64) * W + pc * P
    tl.store(dsources + patch[:, None] + columns[None], narrow(acc, dsources.dtype.element_ty),
             mask=inside[:, None] & (j < CS * PP)[None])  # fmt: skip


# (rows, columns of D, columns of a piece at most, warps, stages) by kernel and operand width in bytes.
# Bytes bound the forward: small tiles, so that 16 to 32 warps fit a multiprocessor of sm_90. No spills on
# sm_80 to sm_100 (python -m benchmarks.compile_report).
LAUNCH = {
    ("forward", 2): (32, 64, 64, 4, 3), ("forward", 4): (32, 64, 32, 4, 2),
    ("weights", 2): (64, 64, 64, 4, 2), ("weights", 4): (32, 64, 32, 4, 2),
    ("sources", 2): (64, 64, 64, 4, 2), ("sources", 4): (32, 64, 32, 4, 2),
}  # fmt: skip


def _pieces(columns: int, most: int) -> tuple[int, int]:
    """(padded columns of a piece, number of pieces) of a part of a patch."""
    piece = min(most, max(16, triton.next_power_of_2(max(1, columns))))
    return piece, -(-columns // piece)


class Shape:
    """Sizes, strides and the choice of pieces that the three kernels share."""

    def __init__(self, kernel, y, sources, coarse, keep_ids, weight, eps, sample_ids, draw):
        self.batch, self.channels, self.height, self.width = y.shape
        merged = self.channels + sources.shape[1] + (0 if coarse is None else self.channels)
        self.patch = round((weight.shape[1] // merged) ** 0.5)
        cols = self.width // self.patch
        self.num = (self.height // self.patch) * cols
        self.keep = self.num if keep_ids is None else keep_ids.shape[1]
        self.rows, self.dim = self.batch * self.keep, weight.shape[0]
        squared = self.patch**2
        self.tile, block, piece, warps, stages = LAUNCH[kernel, weight.dtype.itemsize]
        self.block = min(block, max(64, self.dim & -self.dim))  # a power of two that divides D where one can
        self.launch = dict(num_warps=warps, num_stages=stages)
        self.state = _pieces(self.channels * squared, piece)
        self.clean = _pieces(sources.shape[1] * squared, piece)
        coarse_size = (1, 1) if coarse is None else coarse.shape[2:]
        none = (0, 0, 0, 0)
        self.integers = (
            self.rows, self.keep, self.dim, self.height, self.width, *coarse_size,
            *y.stride(), *sources.stride(), *(none if coarse is None else coarse.stride()),
            *(none if eps is None else eps.stride()), 0 if sample_ids is None else sample_ids.stride(0),
        )  # fmt: skip
        self.constants = dict(C=self.channels, CS=sources.shape[1], P=self.patch, COLS=cols)
        self.pieces = dict(DRAW=draw, STATE=self.state[0], STATE_PARTS=self.state[1],
                           CLEAN=self.clean[0], CLEAN_PARTS=self.clean[1])  # fmt: skip


def embed(y, sources, coarse, abar, keep_ids, weight, bias, pos, eps, state_scale,
          sample_ids, seed_ptr, step_ptr, seed, step, stream, draw) -> Tensor:  # fmt: skip
    shape = Shape("forward", y, sources, coarse, keep_ids, weight, eps, sample_ids, draw)
    out = _launch.empty((shape.batch, shape.keep, shape.dim), weight.dtype, y.device)
    if out.numel() == 0:
        return out
    tiles, blocks = triton.cdiv(shape.rows, shape.tile), triton.cdiv(shape.dim, shape.block)
    # Splitting D forms the same patches again, so only as far as it takes to fill the device four times.
    splits = min(blocks, max(1, 4 * _launch.processors(y.device) // tiles))
    _launch.launch(
        _embed_forward, (tiles, splits), y, sources, coarse, eps, abar, state_scale, sample_ids, seed_ptr, step_ptr,
        seed, step, stream, keep_ids, weight, bias, pos, out, *shape.integers, weight.stride(0),
        0 if pos is None else pos.stride(0), **shape.constants, **shape.pieces, ROWS=shape.tile, BLOCK=shape.block,
        **shape.launch,
    )  # fmt: skip
    return out


def embed_backward(
    grad, y, sources, coarse, abar, keep_ids, weight, eps, state_scale,
    sample_ids, seed_ptr, step_ptr, seed, step, stream, draw, need_sources, need_weight, need_bias,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of (sources, weight, bias); None for those not needed."""
    about = (y, sources, coarse, keep_ids, weight, eps, sample_ids, draw)
    dsources = dweight = dbias = None
    if need_weight or need_bias:
        dweight, dbias = _weight_gradients(
            Shape("weights", *about), grad, y, sources, coarse, abar, keep_ids, weight, eps, state_scale,
            sample_ids, seed_ptr, step_ptr, seed, step, stream, need_bias,
        )  # fmt: skip
    if need_sources:
        shape = Shape("sources", *about)
        dsources = _launch.empty(sources.shape, sources.dtype, y.device)
        tiles = triton.cdiv(shape.rows, shape.tile)
        # Whatever K is, other programs look for dropped patches, unless every patch is there by definition.
        empty = 0 if keep_ids is None else shape.batch * triton.cdiv(shape.num, shape.tile)
        _launch.launch(
            _embed_sources, (tiles + empty, max(1, shape.clean[1]) if dsources.numel() else 0), grad, keep_ids, weight,
            dsources, shape.rows, shape.keep, shape.dim, shape.height, shape.width, shape.num,
            grad.stride(0), grad.stride(1), weight.stride(0), tiles,
            **shape.constants, CLEAN=shape.clean[0], ROWS=shape.tile, BLOCK=shape.block, IDS=64,
            **shape.launch,
        )  # fmt: skip
    return dsources, dweight if need_weight else None, dbias


def _weight_gradients(shape, grad, y, sources, coarse, abar, keep_ids, weight, eps, state_scale,
                      sample_ids, seed_ptr, step_ptr, seed, step, stream, need_bias):  # fmt: skip
    device, values = y.device, weight.shape[1]
    if shape.rows == 0 or weight.numel() == 0:
        return weight.new_zeros(weight.shape), weight.new_zeros(shape.dim) if need_bias else None
    parts = max(shape.state[1], shape.clean[1])
    blocks = triton.cdiv(shape.dim, shape.block)
    # Partial sums are written and read once more: as many shares of the rows as keep them below 4 %
    # of the gradient's own bytes, and no more than fill the device.
    budget = grad.numel() * grad.element_size() // (25 * 8 * shape.dim * (values + 1))
    splits = max(1, min(triton.cdiv(2 * _launch.processors(device), blocks * parts), budget,
                        triton.cdiv(shape.rows, 4 * shape.tile)))  # fmt: skip
    kind = weight.dtype if splits == 1 else torch.float32
    dweight = _launch.empty((splits, shape.dim, values), kind, device)
    dbias = _launch.empty((splits, shape.dim), kind, device) if need_bias else None
    _launch.launch(
        _embed_weights, (blocks, parts, splits), y, sources, coarse, eps, abar, state_scale, sample_ids, seed_ptr,
        step_ptr, seed, step, stream, keep_ids, grad, dweight, dbias, *shape.integers, grad.stride(0), grad.stride(1),
        **shape.constants, **shape.pieces, ROWS=shape.tile, BLOCK=shape.block,
        **shape.launch,
    )  # fmt: skip
    if splits == 1:
        return dweight[0], None if dbias is None else dbias[0]
    return sum_rows(dweight, weight.dtype), None if dbias is None else sum_rows(dbias, weight.dtype)
