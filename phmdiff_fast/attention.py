"""One call for attention, whatever backend serves it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DENSE_TOKENS = 1024  # up to here the N x N scores of a CPU batch stay in cache-sized pieces


def attend(qkv: Tensor, heads: int) -> Tensor:
    """Self-attention over one dense set of tokens.

    qkv (B, N, 3 D), packed as (3, heads, D / heads) -> (B, N, D). On a GPU PyTorch's scaled
    dot-product attention chooses flash, memory-efficient or plain on its own.
    """
    batch, num, triple = qkv.shape
    q, k, v = qkv.view(batch, num, 3, heads, triple // (3 * heads)).permute(2, 0, 3, 1, 4)  # (B, heads, N, d)
    if qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16 and num <= DENSE_TOKENS:
        # PyTorch's CPU flash kernel takes 2 to 4 times as long here, forward and backward: with
        # few tokens two plain products reach the processor's bf16 units and it does not.
        out = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(batch, num, triple // 3)


def backend_name(device: str, dtype: torch.dtype) -> str:
    """What ``attend`` runs on there, for ``doctor`` and the run log."""
    if device == "cuda":
        return "torch SDPA (flash, efficient or math)"
    return "dense products" if dtype == torch.bfloat16 else "torch SDPA (CPU flash)"
