"""adaLN alone and behind a gated residual: dense and packed, at the presets' widths.

``pytest benchmarks/bench_adaln.py --benchmark-only``. The vectors are views of one (B, 6 D) product, as
the model hands them over. Bytes: each input and incoming gradient read once, each result written once.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case, Inputs, size, tagged
from benchmarks.harness import parametrize, run
from phmdiff_fast.kernels.adaln import adaln_modulate, gated_residual_adaln

NAMES = {"adaln_modulate": ("x", "shift", "scale"), "gated_residual_adaln": ("x", "h", "gate", "shift", "scale")}
TYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16, x fp32": (torch.float32, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
}


def _make(op: str, lengths: list[int], packed: bool, width: int, types: str) -> Callable[[torch.device], Inputs]:
    wide, narrow = TYPES[types]

    def make(device: torch.device) -> Inputs:
        g = torch.Generator(device).manual_seed(0)
        shape = (sum(lengths), width) if packed else (len(lengths), lengths[0], width)
        made = {
            "x": torch.randn(shape, generator=g, device=device, dtype=wide),
            "h": torch.randn(shape, generator=g, device=device, dtype=narrow),
        }
        vectors = torch.randn(len(lengths), 6 * width, generator=g, device=device, dtype=narrow).chunk(6, dim=1)
        made |= dict(zip(("shift", "scale", "gate"), vectors[:3], strict=True))
        inputs: Inputs = {name: made[name].requires_grad_() for name in NAMES[op]}
        cu = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        return inputs | {"cu_tokens": cu if packed else None}

    return make


def _ours(op: str, impl: str):
    function = {"adaln_modulate": adaln_modulate, "gated_residual_adaln": gated_residual_adaln}[op]
    return lambda inputs: function(**inputs, impl=impl)


def _literal(inputs: Inputs) -> Tensor | tuple[Tensor, Tensor]:
    """DiT's ``x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)``, ended by the cast of the layer that reads it."""
    x, cu = inputs["x"], inputs["cu_tokens"]

    def rows(v: Tensor) -> Tensor:
        return v.unsqueeze(1) if cu is None else v.repeat_interleave((cu[1:] - cu[:-1]).long(), dim=0)

    if "h" in inputs:
        x = x + rows(inputs["gate"]) * inputs["h"]
    y = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + rows(inputs["scale"])) + rows(inputs["shift"])
    y = y.to(inputs["shift"].dtype)
    return (x, y) if "h" in inputs else y


def _floor(inputs: Inputs) -> tuple[int, int]:
    x, shift, cu = inputs["x"], inputs["shift"], size(inputs["cu_tokens"])
    y = x.numel() * shift.element_size()
    if "h" in inputs:
        # forward reads x, h, three vectors, writes x', y; backward reads dx', dy, x', h, gate, scale, writes dx, dh
        return 2 * size(x) + 2 * y + 3 * size(shift) + cu, 3 * size(x) + 3 * y + 5 * size(shift) + cu
    return size(x) + y + 2 * size(shift) + cu, 2 * size(x) + y + 3 * size(shift) + cu


def _case(op: str, name: str, lengths: list[int], width: int, types: str, tag: str, packed: bool = False) -> Case:
    ours = "extension" if tag == "cpu" else "triton"
    rows = f"T {sum(lengths)} of {len(lengths)}" if packed else f"B {len(lengths)}, N {lengths[0]}"
    return Case(
        op,
        f"{name}: {rows}, D {width}, {types}",
        _make(op, lengths, packed, width, types),
        {"literal": _literal, "eager": _ours(op, "reference"), ours: _ours(op, ours)},
        _floor,
        tags=frozenset({tag}),
    )


def _ragged(samples: int, most: int) -> list[int]:
    """Lengths between a quarter and all of ``most``, the same at every call."""
    return [most // 4 + (i * 37) % (3 * most // 4 + 1) for i in range(samples)]


CASES: list[Case] = []
for _op in NAMES:
    for _types in ("bf16", "bf16, x fp32"):
        # What an interpreter and a CPU can afford; 64 tokens are 256 masked at 75 %.
        CASES += [
            _case(_op, "s4", [64] * 4, 384, _types, "small"),
            _case(_op, "s4", [256] * 2, 384, _types, "small"),
            _case(_op, "b4", [128] * 2, 768, _types, "small"),
            _case(_op, "l4", [64] * 2, 1024, _types, "small"),
            _case(_op, "XL", [192], 1152, _types, "small"),
            _case(_op, "s4 packed", [64, 0, 191, 128, 1], 384, _types, "small", packed=True),
        ]
        # At least 256 MiB moved: shares of the ceiling.
        CASES += [
            _case(_op, "s4", [256] * 1024, 384, _types, "large"),
            _case(_op, "b4", [256] * 512, 768, _types, "large"),
            _case(_op, "l4", [256] * 256, 1024, _types, "large"),
            _case(_op, "XL", [256] * 256, 1152, _types, "large"),
            _case(_op, "b4 masked", [64] * 2048, 768, _types, "large"),
            _case(_op, "b4 packed", _ragged(1024, 256), 768, _types, "large", packed=True),
        ]
        # A step of masked training: microseconds.
        CASES += [
            _case(_op, "s4 masked", [64] * 32, 384, _types, "large"),
            _case(_op, "b4 masked", [64] * 32, 768, _types, "large"),
            _case(_op, "XL", [256] * 32, 1152, _types, "large"),
        ]
    CASES.append(_case(_op, "s4", [64] * 4, 384, "fp32", "small"))
    # Training on a CPU: 32 slices of the small presets, all tokens and masked at 75 %.
    for _types in TYPES:
        CASES += [
            _case(_op, "xs", [256] * 32, 192, _types, "cpu"),
            _case(_op, "xs masked", [64] * 32, 192, _types, "cpu"),
            _case(_op, "s4 packed", _ragged(32, 256), 384, _types, "cpu", packed=True),
        ]

CASES = tagged(
    CASES, "check", "b4: B 512, N 256, D 768, bf16, x fp32", "XL: B 256, N 256, D 1152, bf16",
    "b4 masked: B 32, N 64, D 768, bf16, x fp32", "b4 packed: T 163776 of 1024, D 768, bf16, x fp32",
)  # fmt: skip


@parametrize(CASES)
def test_adaln(benchmark, device, case, variant, way):
    run(benchmark, device, case, variant, way)
