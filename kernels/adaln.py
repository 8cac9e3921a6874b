"""adaLN-Zero (Peebles & Xie 2023): modulated LayerNorm, alone and behind a gated residual.

    adaln_modulate:        y  = LN(x) (1 + scale) + shift
    gated_residual_adaln:  x' = x + gate h;   y = LN(x') (1 + scale) + shift

LN has no affine part of its own, eps 1e-6, statistics in float32. Shapes: x, h (B, N, D) with one
row of shift, scale, gate (B, D) a sample; or packed (T, D) with ``cu_tokens`` (S + 1,) int32, whose
rows cu[s] .. cu[s+1] take row s of the (S, D) vectors.

Types: all alike, or a float32 residual x with 16-bit h, shift, scale, gate, which gives x' float32
and y 16-bit. Other mixes raise TypeError. Bytes: the floor is one read of x (and h) and one write
of y (and x'). Backward keeps x and recomputes the statistics.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._impl import choose

EPS = 1e-6


def _rows(v: Tensor, cu_tokens: Tensor | None) -> Tensor:
    """Per-sample vectors to where they broadcast over x: (B, 1, D), or (T, D) for packed rows."""
    if cu_tokens is None:
        return v[:, None]
    return v.repeat_interleave((cu_tokens[1:] - cu_tokens[:-1]).long(), dim=0)


def _statistics_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def adaln_modulate_reference(x, shift, scale, *, cu_tokens=None):
    wide = _statistics_type(x)
    with torch.autocast(x.device.type, enabled=False):
        normed = F.layer_norm(x.to(wide), x.shape[-1:], eps=EPS)
        y = torch.addcmul(_rows(shift, cu_tokens).to(wide), normed, 1 + _rows(scale, cu_tokens).to(wide))
        return y.to(shift.dtype)


def gated_residual_adaln_reference(x, h, gate, shift, scale, *, cu_tokens=None):
    wide = _statistics_type(x)
    with torch.autocast(x.device.type, enabled=False):
        x = torch.addcmul(x.to(wide), _rows(gate, cu_tokens).to(wide), h.to(wide)).to(x.dtype)
    return x, adaln_modulate_reference(x, shift, scale, cu_tokens=cu_tokens)


def _check(op: str, x: Tensor, tokens: dict[str, Tensor], vectors: dict[str, Tensor], cu_tokens: Tensor | None):
    if x.dim() != (3 if cu_tokens is None else 2):
        raise ValueError(f"{op}: x must be (B, N, D), or (T, D) with cu_tokens; got {tuple(x.shape)}")
    rows = (x.shape[0] if cu_tokens is None else len(cu_tokens) - 1, x.shape[-1])
    narrow = next(iter(vectors.values())).dtype
    for name, value in {**tokens, **vectors}.items():
        expected = x.shape if name in tokens else rows
        if tuple(value.shape) != tuple(expected):
            raise ValueError(f"{op}: {name} must be {tuple(expected)}, got {tuple(value.shape)}")
        mixed = x.dtype == torch.float32 and narrow in (torch.float16, torch.bfloat16)
        if value.dtype != narrow or not (narrow == x.dtype or mixed):
            raise TypeError(f"{op}: {name} is {value.dtype} beside x {x.dtype}; use one type, or x float32 with 16-bit")


def adaln_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, *, cu_tokens: Tensor | None = None, impl: str | None = None
) -> Tensor:
    """y = LN(x) (1 + scale) + shift.

    x (B, N, D) with shift, scale (B, D); or x (T, D) with shift, scale (S, D) and cu_tokens (S + 1,)
    int32. Returns y of x's shape in shift's dtype. Raises ValueError (shapes), TypeError (dtypes).
    Source: adaLN-Zero, Peebles & Xie 2023, section 3.2.
    """
    choose("adaln_modulate", impl)
    _check("adaln_modulate", x, {}, {"shift": shift, "scale": scale}, cu_tokens)
    return adaln_modulate_reference(x, shift, scale, cu_tokens=cu_tokens)


def gated_residual_adaln(
    x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor,
    *, cu_tokens: Tensor | None = None, impl: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x' = x + gate h and y = LN(x') (1 + scale) + shift, in one call.

    x, h (B, N, D) with gate, shift, scale (B, D); or packed (T, D) with (S, D) and cu_tokens
    (S + 1,) int32. Returns (x' in x's dtype, y in shift's dtype). Raises ValueError, TypeError.
    Source: adaLN-Zero, Peebles & Xie 2023, section 3.2.
    """
    choose("gated_residual_adaln", impl)
    _check("gated_residual_adaln", x, {"h": h}, {"gate": gate, "shift": shift, "scale": scale}, cu_tokens)
    return gated_residual_adaln_reference(x, h, gate, shift, scale, cu_tokens=cu_tokens)
