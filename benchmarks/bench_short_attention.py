"""Attention of short sequences: the levels of a masked pyramid, dense and packed, at the presets' heads.

``pytest benchmarks/bench_short_attention.py --benchmark-only``. Bytes: the packed projection and the
incoming gradient read once, the result and the projection's gradient written once.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case, Inputs, size, tagged
from benchmarks.harness import parametrize, run
from phmdiff_fast.kernels.short_attention import short_attention

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _make(lengths: list[int], packed: bool, heads: int, dim: int, types: str) -> Callable[[torch.device], Inputs]:
    def make(device: torch.device) -> Inputs:
        g = torch.Generator(device).manual_seed(0)
        rows = (sum(lengths),) if packed else (len(lengths), lengths[0])
        qkv = torch.randn(*rows, 3 * heads * dim, generator=g, device=device, dtype=TYPES[types]).requires_grad_()
        cu = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        return {"qkv": qkv, "cu_tokens": cu if packed else None}

    return make


def _ours(heads: int, longest: int, impl: str):
    def function(inputs: Inputs) -> Tensor:
        cu = inputs["cu_tokens"]
        return short_attention(inputs["qkv"], heads, cu_tokens=cu, longest=None if cu is None else longest, impl=impl)

    return function


def _by_length(attention: Callable[[Tensor], Tensor], lengths: list[int]) -> Callable[[Inputs], Tensor]:
    """``attention`` of dense (B, N, 3 D); of a pack, a call for each run of equal lengths, which the host knows."""
    runs = [(n, len(list(same))) for n, same in groupby(lengths)]

    def function(inputs: Inputs) -> Tensor:
        qkv = inputs["qkv"]
        if inputs["cu_tokens"] is None:
            return attention(qkv)
        parts = qkv.split([n * count for n, count in runs])
        return torch.cat([
            attention(part.unflatten(0, (count, n))).flatten(0, 1) for part, (n, count) in zip(parts, runs, strict=True)
        ])  # fmt: skip

    return function


def _literal(heads: int):
    """timm's and DiT's Attention without their fused path."""

    def attention(x: Tensor) -> Tensor:
        batch, num, triple = x.shape
        dim = triple // (3 * heads)
        q, k, v = x.reshape(batch, num, 3, heads, dim).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q * dim**-0.5) @ k.transpose(-2, -1)
        return (weights.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, num, triple // 3)

    return attention


def _eager(heads: int):
    def attention(x: Tensor) -> Tensor:
        q, k, v = x.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    return attention


def _floor(inputs: Inputs) -> tuple[int, int]:
    qkv, cu = size(inputs["qkv"]), size(inputs["cu_tokens"])
    return qkv + qkv // 3 + cu, 2 * qkv + qkv // 3 + cu  # backward: qkv and dout read, dqkv written


def _case(name: str, lengths: list[int], heads: int, dim: int, types: str, tag: str, packed: bool = False) -> Case:
    rows = f"T {sum(lengths)} of {len(lengths)}" if packed else f"B {len(lengths)}, N {lengths[0]}"
    pairs = heads * dim * sum(n * n for n in lengths)
    ours = "extension" if tag == "cpu" else "triton"
    return Case(
        "short_attention",
        f"{name}: {rows}, {heads} x {dim}, {types}",
        _make(lengths, packed, heads, dim, types),
        {
            "literal": _by_length(_literal(heads), lengths),
            "eager": _by_length(_eager(heads), lengths),
            "reference": _ours(heads, max(lengths), "reference"),
            ours: _ours(heads, max(lengths), ours),
        },
        _floor,
        lambda _: (4 * pairs, 10 * pairs),
        tags=frozenset({tag}),
    )


def _levels(batch: int, *lengths: int) -> list[int]:
    """Level after level: a sequence a sample of each."""
    return [n for n in lengths for _ in range(batch)]


CASES: list[Case] = [
    # What an interpreter and a CPU can afford: levels of 64, 16 and 4 x 4 patches, kept in part.
    _case("s4", [64] * 2, 2, 64, "bf16", "small"),
    _case("s4", [16] * 9, 2, 64, "bf16", "small"),
    _case("xs packed", _levels(3, 64, 32, 12), 3, 64, "bf16", "small", packed=True),
    _case("XL", [128], 2, 72, "bf16", "small"),
    _case("s4", [48] * 2, 2, 64, "fp32", "small"),
    # The other launch shapes, for registers and spills.
    *(_case("launch", [n] * 4, 2, dim, "bf16", "compile") for n in (16, 32, 64, 128) for dim in (32, 128)),
    *(_case("launch", [n] * 4, 2, 64, "bf16", "compile") for n in (32, 128)),
    *(_case("launch", [n] * 4, 2, d, "fp32", "compile") for n, d in ((16, 128), (32, 128), (64, 32), (128, 32))),
    # At least 256 MiB moved: shares of the ceiling.
    _case("s4", [64] * 2048, 6, 64, "bf16", "large"),
    _case("s4", [16] * 8192, 6, 64, "bf16", "large"),
    _case("b4", [32] * 4096, 12, 64, "bf16", "large"),
    _case("XL", [64] * 1024, 16, 72, "bf16", "large"),
    _case("XL", [128] * 512, 16, 72, "bf16", "large"),
    _case("b4 packed", _levels(1024, 64, 32, 12), 12, 64, "bf16", "large", packed=True),
    # A step of masked training: microseconds.
    _case("s4 packed", _levels(32, 64, 32, 12), 6, 64, "bf16", "large", packed=True),
    _case("s4", [64] * 32, 6, 64, "bf16", "large"),
]
# Training on a CPU: levels of the small presets, all tokens and masked, and what a laptop tries first.
for _types in ("bf16", "fp32"):
    CASES += [
        _case("xs", [16] * 8, 3, 64, _types, "cpu"),
        _case("xs", [64] * 8, 3, 32, _types, "cpu"),
        _case("s4", [32] * 32, 6, 64, _types, "cpu"),
        _case("s4", [64] * 32, 6, 64, _types, "cpu"),
        _case("s4", [256] * 8, 6, 64, _types, "cpu"),
        _case("s4 packed", _levels(32, 64, 32, 12), 6, 64, _types, "cpu", packed=True),
    ]

CASES = tagged(
    CASES, "check", "s4: B 2048, N 64, 6 x 64, bf16", "s4: B 8192, N 16, 6 x 64, bf16",
    "b4 packed: T 110592 of 3072, 12 x 64, bf16",
)  # fmt: skip


@parametrize(CASES)
def test_short_attention(benchmark, device, case, variant, way):
    run(benchmark, device, case, variant, way)
