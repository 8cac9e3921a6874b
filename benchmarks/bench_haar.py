"""The 3D Haar transform and its inverse, against eight strided convolutions and against slices in PyTorch.

``pytest benchmarks/bench_haar.py --benchmark-only``. Bytes: the volume and the bands, each once.
"""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case, Inputs, size, tagged
from benchmarks.harness import parametrize, run
from phmdiff_fast.haar import haar3d, inverse_haar3d

KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _filters(like: Tensor) -> Tensor:
    """(8, 1, 2, 2, 2): the sign of block element (i, j, k) in each band, times 8^-1/2."""
    signs = [
        [(-1) ** (i * (band >> 2 & 1) + j * (band >> 1 & 1) + k * (band & 1)) for i, j, k in product((0, 1), repeat=3)]
        for band in range(8)
    ]
    return torch.tensor(signs, dtype=like.dtype, device=like.device).view(8, 1, 2, 2, 2) * 8**-0.5


def _convolved(x: Inputs) -> Tensor:
    volume = x["x"]
    bands = F.conv3d(volume.flatten(0, 1)[:, None], x["filters"], stride=2)  # (B C, 8, x, y, z)
    return bands.unflatten(0, volume.shape[:2]).transpose(1, 2)


def _deconvolved(x: Inputs) -> Tensor:
    bands = x["bands"]
    volume = F.conv_transpose3d(bands.transpose(1, 2).flatten(0, 1), x["filters"], stride=2)
    return volume.view(bands.shape[0], bands.shape[2], *volume.shape[2:])


def _sliced(x: Inputs) -> Tensor:
    """The eight corners of every block, twelve sums and differences, one stack."""
    v = x["x"]
    corners = [v[:, :, i::2, j::2, k::2] for i, j, k in product((0, 1), repeat=3)]
    for axis in (4, 2, 1):
        for n in range(8):
            if not n & axis:
                even, odd = corners[n], corners[n | axis]
                corners[n], corners[n | axis] = even + odd, even - odd
    return torch.stack(corners, 1) * 8**-0.5


def _joined(x: Inputs) -> Tensor:
    bands = list((x["bands"] * 8**-0.5).unbind(1))
    for axis in (4, 2, 1):
        for n in range(8):
            if not n & axis:
                even, odd = bands[n], bands[n | axis]
                bands[n], bands[n | axis] = even + odd, even - odd
    half = bands[0].shape  # (B, C, x, y, z)
    volume = torch.stack(bands, -1).view(*half, 2, 2, 2).permute(0, 1, 2, 5, 3, 6, 4, 7)
    return volume.reshape(*half[:2], *(2 * n for n in half[2:]))


def _cases(shape: tuple[int, ...], kind: str, tag: str) -> list[Case]:
    dtype, name = KINDS[kind], f"{'x'.join(map(str, shape))}, {kind}"
    half = (shape[0], 8, shape[1], *(n // 2 for n in shape[2:]))

    def make(name: str, sides: tuple[int, ...]):
        def made(device: torch.device) -> Inputs:
            g = torch.Generator(device).manual_seed(0)
            x = torch.randn(sides, generator=g, device=device).to(dtype).requires_grad_()
            return {name: x, "filters": _filters(x)}

        return made

    def moved(x: Inputs) -> tuple[int, int]:
        return (2 * size(x["x"] if "x" in x else x["bands"]),) * 2

    ours = {"extension": lambda x: haar3d(x["x"], impl="extension")}
    back = {"extension": lambda x: inverse_haar3d(x["bands"], impl="extension")}
    return [
        Case("haar3d", name, make("x", shape), {"literal": _convolved, "eager": _sliced, **ours}, moved,
             tags=frozenset({tag})),
        Case("inverse_haar3d", name, make("bands", half), {"literal": _deconvolved, "eager": _joined, **back}, moved,
             tags=frozenset({tag})),
    ]  # fmt: skip


CASES = [
    *_cases((1, 1, 224, 224, 160), "fp32", "cpu"),
    *_cases((1, 1, 224, 224, 160), "bf16", "cpu"),
    *_cases((8, 4, 224, 224, 160), "bf16", "large"),
    *_cases((1, 1, 224, 224, 160), "fp32", "large"),
]
CASES = tagged(CASES, "check", "8x4x224x224x160, bf16")


@parametrize(CASES)
def test_haar(benchmark, device, case, variant, way):
    run(benchmark, device, case, variant, way)
