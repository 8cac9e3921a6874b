"""Multi-scale maximum mean discrepancy between two sets of vectors (PHMDiff Eq. 6, Gretton 2012).

    K(a, b) = mean over j = -2..2 of exp(-|a - b|^2 / (2^j m)),  m = pooled mean squared distance
    MMD^2   = mean K(x, x') - 2 mean K(x, y) + mean K(y, y')

m is detached and has a closed form: over all pairs of the pooled set, mean |a - b|^2 =
2 (mean |a|^2 - |mean a|^2). The five exponentials are one at the widest bandwidth, squared again
and again; bandwidths of one's own (any number, any ratio) cost an exponential each. With c the
weight of a pair (1/n^2, -1/(n m), 1/m^2; unbiased n (n - 1) and m (m - 1)), the gradient is

    d MMD^2 / d x_i = sum over b of both sets of 4 c K'(|x_i - b|^2) (x_i - b)

Shapes: x (n, d), y (m, d), scalar out. Bytes: (n + m) d read and d (n + m) gradients written are the
floor; unfused, some twenty (n + m)^2 matrices go by. No path here makes a matrix of that size:

- ``mmd2_reference``, the definition, does: it is for tests and for a gradient by the bandwidths.
- the blocks (CPU, float64, impl="reference") walk half of the (n + m)^2 pairs in cached tiles.
- the Triton tiles (_mmd_triton.py) do so on a GPU. They keep a centred copy of the rows in the type
  of the rows; 16-bit copies are exact or rounded once, and slopes are rounded to 16 bits too.

Backward keeps the centred rows, their norms and one number, O((n + m) d), and recomputes the tiles;
it walks only the pairs that a needed gradient sees. Computed in float32, or float64 for float64 rows.
Limits: no second derivative (RuntimeError); a 16-bit row's squared norm must stay below 3e38.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._impl import choose

SCALES = (-2, -1, 0, 1, 2)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BLOCK_ROWS = 256  # a float32 tile of 256 x 256 and its copy fit the cache of one core
GPU_BLOCK_ROWS = 2048  # float64 on a GPU: fewer and larger launches
TILE_ROWS, TILE_WIDTH = 64, 16  # the centred copy of the Triton path is padded to multiples of these


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def pooled_bandwidth(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared distance over all pairs of the pooled rows, detached, at least the smallest normal."""
    pooled = torch.cat([x, y]).detach()
    spread = pooled.square().sum(1).mean() - pooled.mean(0).square().sum()
    return (2 * spread).clamp_min(torch.finfo(pooled.dtype).tiny)


def _kernel(a: Tensor, b: Tensor, bandwidths: Tensor) -> Tensor:
    squared = (a.square().sum(1)[:, None] + b.square().sum(1)[None] - 2 * a @ b.T).clamp_min(0)
    return torch.stack([torch.exp(-squared / w) for w in bandwidths.unbind()]).mean(0)


def mmd2_reference(x, y, bandwidths=None, *, estimator="biased"):
    """The definition, with all its matrices; differentiable by the bandwidths too, and twice."""
    with torch.autocast(x.device.type, enabled=False):
        x, y = x.to(_wide(x)), y.to(_wide(x))
        centre = torch.cat([x, y]).detach().mean(0)  # small norms: less cancellation in |a|^2 + |b|^2 - 2ab
        x, y = x - centre, y - centre
        if bandwidths is None:
            bandwidths = [2.0**j * pooled_bandwidth(x, y) for j in SCALES]
            bandwidths = torch.stack(bandwidths)
        bandwidths = _vector(bandwidths, x)
        xx, yy, xy = _kernel(x, x, bandwidths), _kernel(y, y, bandwidths), _kernel(x, y, bandwidths)
        if estimator == "biased":
            return xx.mean() + yy.mean() - 2 * xy.mean()
        n, m = len(x), len(y)
        inner_x = (xx.sum() - xx.diagonal().sum()) / (n * (n - 1))
        inner_y = (yy.sum() - yy.diagonal().sum()) / (m * (m - 1))
        return inner_x + inner_y - 2 * xy.mean()


def _vector(bandwidths, x: Tensor) -> Tensor:
    """Bandwidths as a (k,) tensor beside x; floats become fills, which a CUDA graph can record."""
    if isinstance(bandwidths, Tensor):
        return bandwidths.to(_wide(x)).flatten()
    return torch.stack([torch.full((), float(w), dtype=_wide(x), device=x.device) for w in bandwidths])


def pair_weights(n: int, m: int, unbiased: bool) -> tuple[float, float, float]:
    """What the kernel of two different rows, in this order, counts: both of x, one of each, both of y."""
    if unbiased:
        return 1 / (n * (n - 1)), -1 / (n * m), 1 / (m * (m - 1))
    return 1 / n**2, -1 / (n * m), 1 / m**2


def _blocks(n: int, m: int, device: torch.device) -> list[tuple[int, int, int]]:
    """(first row, past the last, set) of blocks of the pooled rows, none with rows of both sets."""
    size = BLOCK_ROWS if device.type == "cpu" else GPU_BLOCK_ROWS
    spans = [(i, min(i + size, n), 0) for i in range(0, n, size)]
    return spans + [(n + i, n + min(i + size, m), 1) for i in range(0, m, size)]


class _Tiles:
    """-rate |a - b|^2, at most 0, of any two blocks, as one matrix product of d + 2 columns."""

    def __init__(self, z: Tensor, norms: Tensor, rate: Tensor):
        one = torch.ones_like(norms)
        self.left = torch.cat([2 * rate * z, (-rate * norms)[:, None], -rate * one[:, None]], 1)  # (n + m, d + 2)
        self.right = torch.cat([z, one[:, None], norms[:, None]], 1)  # (n + m, d + 2)

    def exponent(self, rows: tuple[int, int, int], cols: tuple[int, int, int], out: Tensor) -> Tensor:
        tile = _view(out, rows, cols)
        torch.mm(self.left[rows[0] : rows[1]], self.right[cols[0] : cols[1]].T, out=tile)
        return tile.clamp_max_(0)


def _view(out: Tensor, rows, cols) -> Tensor:
    high, wide = rows[1] - rows[0], cols[1] - cols[0]
    return out[: high * wide].view(high, wide)


def _buffers(z: Tensor, blocks: list, number: int) -> Tensor:
    side = max(b[1] - b[0] for b in blocks)
    return z.new_empty(number, side * side)


def _blocks_forward(x: Tensor, y: Tensor, rates: Tensor | None, unbiased: bool):
    n, m = len(x), len(y)
    z = torch.cat([x.to(_wide(x)), y.to(_wide(x))])
    z -= z.mean(0)
    norms = z.square().sum(1)
    rate = 0.25 / pooled_bandwidth(z[:n], z[n:])[None]
    ladder = rates is None
    tiles = _Tiles(z, norms, rate if ladder else torch.ones_like(rate))
    weights, blocks = pair_weights(n, m, unbiased), _blocks(n, m, x.device)
    buffers = _buffers(z, blocks, 2)
    value = z.new_zeros((), dtype=torch.float64)
    for i, rows in enumerate(blocks):
        for cols in blocks[i:]:
            exponent, part = tiles.exponent(rows, cols, buffers[0]), None
            for k in range(len(SCALES) if ladder else len(rates)):
                if not ladder:
                    kernel = torch.mul(exponent, rates[k], out=_view(buffers[1], rows, cols)).exp_()
                else:
                    kernel = exponent.square_() if k else exponent.exp_()
                if rows is cols and (k == 0 or not ladder):
                    kernel.fill_diagonal_(0)  # it is added exactly at the end
                part = kernel.sum() if part is None else part + kernel.sum()
            twice = 1 if rows is cols else 2
            value.add_(part, alpha=twice * weights[rows[2] + cols[2]] / (k + 1))
    if not unbiased:
        value += 1 / n + 1 / m
    return value.to(z.dtype), z, norms, rate


def _blocks_backward(grad, z, norms, rates, n: int, m: int, ladder: bool, unbiased: bool, needed: tuple[bool, bool]):
    tiles = _Tiles(z, norms, rates if ladder else torch.ones_like(rates[:1]))
    weights, blocks = pair_weights(n, m, unbiased), _blocks(n, m, z.device)
    buffers = _buffers(z, blocks, 2)
    ones = torch.cat([z, torch.ones_like(norms)[:, None]], 1)  # (n + m, d + 1)
    pulled = torch.zeros_like(ones)  # sums of slope b, and of the slopes
    for i, rows in enumerate(blocks):
        for cols in blocks[i:]:
            if not (needed[rows[2]] or needed[cols[2]]):
                continue
            exponent, slope = tiles.exponent(rows, cols, buffers[0]), _view(buffers[1], rows, cols)
            if ladder:
                power = exponent.exp_()
                torch.mul(power, 2.0 ** -SCALES[-1], out=slope)
                for j in SCALES[-2::-1]:
                    slope.add_(power.square_(), alpha=2.0**-j)
            else:
                slope.zero_()
                for rate in rates.unbind():
                    slope.addcmul_((exponent * rate).exp_(), rate)
            weight = weights[rows[2] + cols[2]]
            if needed[rows[2]]:
                pulled[rows[0] : rows[1]].addmm_(slope, ones[cols[0] : cols[1]], alpha=weight)
            if needed[cols[2]] and rows is not cols:
                pulled[cols[0] : cols[1]].addmm_(slope.T, ones[rows[0] : rows[1]], alpha=weight)
    scale = -4 * grad * (4 * rates[0] / len(SCALES) if ladder else 1 / len(rates))
    sides = (slice(0, n), slice(n, n + m))
    return tuple(
        (pulled[s, -1:] * z[s] - pulled[s, :-1]) * scale if need else z.new_empty(0, z.shape[1])
        for s, need in zip(sides, needed, strict=True)
    )


@torch.library.custom_op(
    "phmdiff_fast::mmd2",
    mutates_args=(),
    schema="(Tensor x, Tensor y, Tensor? rates, bool unbiased, bool tiles) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _mmd2(x, y, rates, unbiased, tiles):
    """(value (), centred rows, their squared norms, automatic rate (1,)); rates (k,) are 1 / bandwidth."""
    if not tiles:
        with torch.autocast(x.device.type, enabled=False):
            return _blocks_forward(x, y, rates, unbiased)
    from . import _mmd_triton

    weights = pair_weights(len(x), len(y), unbiased)
    return _mmd_triton.forward(x, y, rates, weights, unbiased, *_padded(x, y))


def _padded(x: Tensor, y: Tensor) -> tuple[int, int]:
    """Shape of the centred copy of the Triton path: blocks of rows of one set, rows of aligned length."""
    rows = sum((s.shape[0] + TILE_ROWS - 1) // TILE_ROWS for s in (x, y)) * TILE_ROWS
    return rows, (x.shape[1] + TILE_WIDTH - 1) // TILE_WIDTH * TILE_WIDTH


@_mmd2.register_fake
def _(x, y, rates, unbiased, tiles):
    rows, width = _padded(x, y) if tiles else (x.shape[0] + y.shape[0], x.shape[1])
    kind = x.dtype if tiles else _wide(x)
    return (x.new_empty((), dtype=_wide(x)), x.new_empty((rows, width), dtype=kind),
            x.new_empty(rows, dtype=_wide(x)), x.new_empty(1, dtype=_wide(x)))  # fmt: skip


@torch.library.custom_op(
    "phmdiff_fast::mmd2_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor z, Tensor norms, Tensor rates, SymInt n, SymInt m, SymInt d, bool ladder, "
    "bool unbiased, bool tiles, bool need_x, bool need_y) -> (Tensor, Tensor)",
)
def _mmd2_backward(grad, z, norms, rates, n, m, d, ladder, unbiased, tiles, need_x, need_y):
    """Gradients (n, d) and (m, d) in the type of z; (0, d) where not needed."""
    if not tiles:
        with torch.autocast(z.device.type, enabled=False):
            return _blocks_backward(grad, z, norms, rates, n, m, ladder, unbiased, (need_x, need_y))
    from . import _mmd_triton

    weights = pair_weights(n, m, unbiased)
    return tuple(
        _mmd_triton.backward(grad, z, norms, rates, weights, n, m, d, ladder=ladder, of_y=of_y)
        if need
        else z.new_empty(0, d)
        for of_y, need in ((False, need_x), (True, need_y))
    )


@_mmd2_backward.register_fake
def _(grad, z, norms, rates, n, m, d, ladder, unbiased, tiles, need_x, need_y):
    return z.new_empty(n if need_x else 0, d), z.new_empty(m if need_y else 0, d)


def _keep(ctx, inputs, output):
    # z is left differentiable, though only backward reads it: a second derivative then meets the
    # backward operation, which has no formula and raises. Cut off here, it would silently be zero.
    x, y, rates, ctx.unbiased, ctx.tiles = inputs
    _, z, norms, rate = output
    ctx.set_materialize_grads(False)
    ctx.ladder, ctx.sizes, ctx.dtype = rates is None, (x.shape[0], y.shape[0], x.shape[1]), x.dtype
    ctx.save_for_backward(z, norms, rate if rates is None else rates)


def _gradients(ctx, grad, *_):
    if grad is None:
        return (None,) * 5
    needed = ctx.needs_input_grad[:2]
    found = _mmd2_backward(grad, *ctx.saved_tensors, *ctx.sizes, ctx.ladder, ctx.unbiased, ctx.tiles, *needed)
    return *(g.to(ctx.dtype) if need else None for g, need in zip(found, needed, strict=True)), None, None, None


_mmd2.register_autograd(_gradients, setup_context=_keep)


def mmd2(x: Tensor, y: Tensor, bandwidths=None, *, estimator: str = "biased", impl: str | None = None) -> Tensor:
    """Squared maximum mean discrepancy of the rows of x (n, d) and y (m, d).

    bandwidths : the denominators of the exponentials, positive (floats or (k,) tensor), else 2^j m, j = -2..2
    estimator : "biased" (never negative) or "unbiased" (diagonals left out; n, m >= 2)

    Returns a scalar in float32 (float64 for float64 rows). Raises ValueError for shapes, an empty set,
    bandwidths that are none or not positive (tensors are not looked into) or an unknown estimator, and
    TypeError for rows that are not floating point or not of one type. A gradient by ``bandwidths`` is
    computed by the definition, with all its matrices.
    """
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"mmd2: need x (n, d) and y (m, d), got {tuple(x.shape)} and {tuple(y.shape)}")
    least = {"biased": 1, "unbiased": 2}.get(estimator)
    if least is None:
        raise ValueError(f"mmd2: estimator={estimator!r}; use 'biased' or 'unbiased'")
    if min(x.shape[0], y.shape[0]) < least:
        raise ValueError(f"mmd2: the {estimator} estimator needs {least} rows or more a side, got {len(x)}, {len(y)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"mmd2: x must be floating point, got {x.dtype}")
    if y.dtype != x.dtype:
        raise TypeError(f"mmd2: y must be {x.dtype} like x, got {y.dtype}")
    given = bandwidths if isinstance(bandwidths, Tensor) else None
    _check(bandwidths)
    trains = given is not None and given.requires_grad and torch.is_grad_enabled()
    refused = "bandwidths needs a gradient, which only the definition has" if trains else ""
    impl = choose("mmd2", impl, {"x": x, "y": y, "bandwidths": given}, refused)
    if trains:
        return mmd2_reference(x, y, bandwidths, estimator=estimator)
    rates = None if bandwidths is None else _vector(bandwidths, x).reciprocal()
    value, *_ = _mmd2(x, y, rates, estimator == "unbiased", impl == "triton")
    return value


def _check(bandwidths) -> None:
    if isinstance(bandwidths, Tensor):
        if not bandwidths.is_floating_point():
            raise TypeError(f"mmd2: bandwidths must be floating point, got {bandwidths.dtype}")
        if not bandwidths.numel():
            raise ValueError("mmd2: bandwidths must hold one number or more, got none")
    elif bandwidths is not None and not (len(bandwidths) and all(w > 0 for w in bandwidths)):
        raise ValueError(f"mmd2: bandwidths must be one positive number or more, got {list(bandwidths)}")
