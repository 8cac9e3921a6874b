"""DiT blocks (adaLN-Zero, Peebles & Xie 2023), dense or packed, chained so that every sum is fused with a norm.

Shapes: B batch, N tokens, D width; packed: T tokens of S sequences (``packing``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import attend, attend_packed
from .kernels.adaln import adaln_modulate, gated_residual_adaln
from .kernels.gelu import gelu
from .lean_block import Narrow, lean_block, serves
from .packing import Packing


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        qkv = self.qkv(x)  # (B, N, 3 D), or (T, 3 D) packed
        return self.proj(attend(qkv, self.heads) if packing is None else attend_packed(qkv, self.heads, packing))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))


class Block(nn.Module):
    """A DiT block between two norms, so that each sum is fused with the norm that reads it.

    x += gate attn(LN(x)); x += gate mlp(LN(x)). It is handed LN(x) modulated for its attention, and hands on what
    the next block's attention reads: over the border of a block, too, x is written and read once a sum.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, cond_width: int):
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond_width, 6 * width))
        self._layers = [Narrow(layer) for layer in (self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2)]

    def forward(
        self,
        x: Tensor,
        normed: Tensor,
        vectors: tuple[Tensor, ...],
        behind: tuple[Tensor, Tensor],
        packing: Packing | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x, normed (B, N, D), or packed (T, D): the sum so far, and what the attention reads of it.

        vectors : shift, scale, gate of the attention's branch (``normed`` is made with the first two), then of the
        MLP's, (B, D) each or (S, D) packed; behind : shift and scale of the norm behind. Returns both for the next.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors
        shift, scale = behind
        if serves(x, normed):
            return lean_block(x, normed, (shift1, scale1), gate1, shift2, scale2, gate2, shift, scale, self._layers,
                              self.attn.heads, packing)  # fmt: skip
        cu = None if packing is None else packing.cu_tokens(x.device)
        x, normed = gated_residual_adaln(x, self.attn(normed, packing), gate1, shift2, scale2, cu_tokens=cu)
        return gated_residual_adaln(x, self.mlp(normed), gate2, shift, scale, cu_tokens=cu)

    def let_go(self) -> None:
        """At the end of a forward pass: copies of the weights for it."""
        for layer in self._layers:
            layer.let_go()


class FinalNorm(nn.Module):
    """The modulation behind the last block: shift and scale (B, D) each."""

    def __init__(self, width: int, cond_width: int):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond_width, 2 * width))


def run_blocks(
    x: Tensor, blocks: nn.ModuleList, vectors: list[Tensor], packing: Packing | None = None, recompute: bool = False
) -> Tensor:
    """x (B, N, D), or (T, D) packed, through all blocks and the final modulated norm.

    vectors : a block's (S, 6 D) each, then the final norm's (S, 2 D), a row a sequence (S = B where nothing is packed)
    recompute : backward runs each block's forward again instead of keeping what is inside it
    """
    parts = [v.chunk(6, dim=1) for v in vectors[:-1]] + [vectors[-1].chunk(2, dim=1)]
    # Outside autocast all is one type; inside, x stays float32 and the branches are 16-bit.
    normed = adaln_modulate(x, *parts[0][:2], cu_tokens=None if packing is None else packing.cu_tokens(x.device))
    for block, here, behind in zip(blocks, parts[:-1], parts[1:], strict=True):
        given = (x, normed, here, behind[:2], packing)
        if recompute and torch.is_grad_enabled():
            x, normed = checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False)
        else:
            x, normed = block(*given)
    return normed
