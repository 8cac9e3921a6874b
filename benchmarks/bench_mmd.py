"""Multi-scale MMD: against the form peers use, and against a tuned one that still makes its matrices.

Its ceiling is arithmetic: (n + m)^2 / 2 pairs, each a product of d and about fifteen operations and one
exponential; the bytes of the floor are nothing beside it. x trains and y does not, as in the loss.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.case import Case, size, tagged
from benchmarks.harness import parametrize, run
from phmdiff_fast.kernels.mmd import mmd2

KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}
PER_PAIR = 15  # operations on one kernel value beside its product: exponent, four squarings, sum


def _make(device, *, N, d, kind, trains):
    generator = torch.Generator(device).manual_seed(N + d)
    x, y = (torch.randn(N, d, generator=generator, device=device) for _ in range(2))
    return {"x": (1.2 * x + 0.1).to(KINDS[kind]).requires_grad_(trains), "y": y.to(KINDS[kind])}


def _literal(i):
    """All differences (n + m, n + m, d), then an exponential per bandwidth: the MK-MMD code that peers copy."""
    x, y = i["x"], i["y"]
    total = torch.cat([x, y])
    rows, cols = total.unsqueeze(0).expand(len(total), -1, -1), total.unsqueeze(1).expand(-1, len(total), -1)
    squared = ((rows - cols) ** 2).sum(2)
    bandwidth = squared.detach().mean() / 4
    kernels = sum(torch.exp(-squared / (bandwidth * 2**j)) for j in range(5)) / 5
    n = len(x)
    return kernels[:n, :n].mean() + kernels[n:, n:].mean() - kernels[:n, n:].mean() - kernels[n:, :n].mean()


def _eager(i):
    """Squared distances by a matrix product, one exponential, three blocks and not four; matrices all the same."""
    wide = torch.float64 if i["x"].dtype == torch.float64 else torch.float32
    x, y = i["x"].to(wide), i["y"].to(wide)
    centre = torch.cat([x.detach(), y]).mean(0)
    x, y = x - centre, y - centre
    energy = torch.cat([x.detach(), y]).square().sum(1).mean()
    scale = -1 / (8 * energy)

    def kernel(a, b):
        norms = a.square().sum(1)[:, None] + b.square().sum(1)[None]
        power = torch.exp(scale * torch.addmm(norms, a, b.T, alpha=-2).clamp_min(0))
        total = power
        for _ in range(4):
            power = power.square()
            total = total + power
        return total.mean() / 5

    return kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)


def _ours(i, impl):
    return mmd2(i["x"], i["y"], impl=impl)


def _floor(i):
    x, y = i["x"], i["y"]
    return size(x, y) + 4, size(x, y) + 4 + size(x)


def _flops(i):
    (n, d), m = i["x"].shape, len(i["y"])
    # Backward: x meets all rows, each pair two products.
    return (n + m) ** 2 // 2 * (2 * d + PER_PAIR), n * (n + m) * (4 * d + PER_PAIR)


def _case(N, d, kind, tags, without=(), trains=True):
    variants = {
        "literal": _literal,
        "eager": _eager,
        "reference": partial(_ours, impl="reference"),
        "triton": partial(_ours, impl="triton"),
    }
    return Case(
        op="mmd2",
        shape=f"N {N}, d {d}, {kind}" + ("" if trains else ", no gradient"),
        make=partial(_make, N=N, d=d, kind=kind, trains=trains),
        variants={name: f for name, f in variants.items() if name not in without},
        floor=_floor,
        flops=_flops,
        tags=frozenset(tags),
    )


CASES = [
    _case(256, 16, "fp32", {"small"}),
    _case(512, 48, "fp32", {"small"}),
    _case(1024, 64, "fp32", {"small"}),
    _case(2048, 16, "fp32", {"cpu"}),
    # The literal form takes 4 GiB a tensor here: two of them forward, and backward needs more than most have.
    _case(4096, 16, "fp32", {"cpu"}, trains=False),
    _case(4096, 16, "fp32", {"cpu"}, without=("literal",)),
    _case(1024, 16, "fp32", {"large"}),
    _case(4096, 16, "fp32", {"large"}),
    _case(4096, 48, "fp32", {"large"}),
    _case(4096, 64, "fp32", {"large"}),
    _case(4096, 64, "bf16", {"large"}),
    # The literal form would take 64 GiB a tensor from here on.
    _case(16384, 16, "fp32", {"large"}, without=("literal",)),
    _case(16384, 64, "fp32", {"large"}, without=("literal",)),
    _case(16384, 64, "bf16", {"large"}, without=("literal",)),
]

CASES = tagged(CASES, "check", "N 4096, d 64, fp32", "N 4096, d 64, bf16", "N 16384, d 16, fp32")


@parametrize(CASES)
def test_mmd(benchmark, device, case, variant, way):
    run(benchmark, device, case, variant, way)
