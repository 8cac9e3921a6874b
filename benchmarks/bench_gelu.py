"""GELU, tanh form, of an MLP's hidden layer on a CPU.

``pytest benchmarks/bench_gelu.py --benchmark-only``. Bytes: x read and y written; x and dy read and dx written. On a
GPU it is PyTorch's own, so there is nothing to compare.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case, Inputs, size
from benchmarks.harness import parametrize, run
from phmdiff_fast.kernels.gelu import gelu

KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _literal(inputs: Inputs) -> Tensor:
    """The equation, operation by operation."""
    x = inputs["x"]
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _eager(inputs: Inputs) -> Tensor:
    return F.gelu(inputs["x"], approximate="tanh")


def _extension(inputs: Inputs) -> Tensor:
    return gelu(inputs["x"], impl="extension")


def _case(shape: tuple[int, int, int], kind: str) -> Case:
    def make(device: torch.device) -> Inputs:
        g = torch.Generator(device).manual_seed(0)
        return {"x": torch.randn(shape, generator=g, device=device).to(KINDS[kind]).requires_grad_()}

    def moved(inputs: Inputs) -> tuple[int, int]:
        return 2 * size(inputs["x"]), 3 * size(inputs["x"])

    variants = {"literal": _literal, "eager": _eager, "extension": _extension}
    return Case("gelu", f"B {shape[0]}, N {shape[1]}, D {shape[2]}, {kind}", make, variants, moved,
                tags=frozenset({"cpu"}))  # fmt: skip


SHAPES = ((32, 256, 768), (32, 64, 768), (32, 64, 1536), (2, 16, 384))
CASES = [_case(shape, kind) for shape in SHAPES for kind in KINDS]


@parametrize(CASES)
def test_gelu(benchmark, device, case, variant, way):
    run(benchmark, device, case, variant, way)
