"""The pyramid: levels from one read, the merged state of Eq. 6, upsampling; forward and backward.

``pytest benchmarks/bench_pyramid.py --benchmark-only``. "literal" is what other code does (a chain of
pooling, the formula written out), "eager" the best we could write in PyTorch, "extension" is ours. At alpha
0.5 the literal form is pooling; at 0.6 the antialiased interpolation that peers use at every alpha. Bytes:
each input and incoming gradient read once, each result written once.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Case, Inputs, size, tagged
from benchmarks.harness import parametrize, run
from phmdiff_fast.kernels import _philox
from phmdiff_fast.pyramid import (
    build_pyramid,
    build_pyramid_reference,
    downsample,
    merge_state,
    merge_state_reference,
    per_sample,
    upsample_add,
    upsample_reference,
)

LEVELS = 3
RNG = (7, 11)
KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _images(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, *names: str) -> Inputs:
    """Random images that train; "coarse" is half as large; abar is (B,) float32."""
    g = torch.Generator(device).manual_seed(0)
    half = (*shape[:2], -(-shape[2] // 2), -(-shape[3] // 2))
    made: Inputs = {
        name: torch.randn(half if name == "coarse" else shape, generator=g, device=device).to(dtype).requires_grad_()
        for name in names
    }
    return made | {"abar": torch.rand(shape[0], generator=g, device=device) * 0.9 + 0.05}


# ---- build_pyramid ------------------------------------------------------------------------------


def _pyramid_literal(x: Inputs, alpha: float) -> tuple[Tensor, ...]:
    """Level after level: pooling at 0.5, the antialiased interpolation elsewhere."""
    levels = [x["x"]]
    for _ in range(LEVELS - 1):
        levels.append(downsample(levels[-1], alpha))
    return tuple(levels[1:])


def _pyramid_eager(x: Inputs, alpha: float) -> tuple[Tensor, ...]:
    """Rows added to rows, then columns to columns: far quicker than pooling on a CPU, where sides are even."""
    if alpha != 0.5 or any(n % 2 ** (LEVELS - 1) for n in x["x"].shape[2:]):
        return tuple(build_pyramid_reference(x["x"], LEVELS, alpha)[1:])
    levels = [x["x"]]
    for _ in range(LEVELS - 1):
        pairs = levels[-1][:, :, 0::2] + levels[-1][:, :, 1::2]
        levels.append((pairs[..., 0::2] + pairs[..., 1::2]) * 0.25)
    return tuple(levels[1:])


def _pyramid_ours(x: Inputs, alpha: float) -> tuple[Tensor, ...]:
    return tuple(build_pyramid(x["x"], LEVELS, alpha=alpha, impl="extension")[1:])


def _pyramid_floor(x: Inputs, alpha: float) -> tuple[int, int]:
    levels = build_pyramid_reference(x["x"].to("meta"), LEVELS, alpha)
    moved = sum(size(level) for level in levels)
    return moved, moved


def _pyramid_case(shape: tuple[int, ...], kind: str, tag: str, alpha: float = 0.5) -> Case:
    return Case(
        "build_pyramid",
        f"{'x'.join(map(str, shape))}, alpha {alpha}, {kind}",
        lambda device: {"x": _images(device, shape, KINDS[kind], "x")["x"]},
        {
            "literal": partial(_pyramid_literal, alpha=alpha),
            "eager": partial(_pyramid_eager, alpha=alpha),
            "extension": partial(_pyramid_ours, alpha=alpha),
        },
        partial(_pyramid_floor, alpha=alpha),
        tags=frozenset({tag}),
    )


# ---- merging --------------------------------------------------------------------------------------


def _merge_eager(x: Inputs) -> Tensor:
    """Two fused multiply-additions and one multiplication, besides the interpolation."""
    signal = x["abar"].sqrt().to(x["y"].dtype)
    noise = (1 - x["abar"]).sqrt().to(x["y"].dtype)
    state = torch.addcmul(per_sample(signal) * x["y"], per_sample(noise), x["eps"])
    up = upsample_reference(x["coarse"], *x["y"].shape[2:])
    return torch.addcmul(state, per_sample((1 - x["abar"].sqrt()).to(state.dtype)), up)


def _merge_case(shape: tuple[int, ...], kind: str, tag: str) -> Case:
    names = ("y", "eps", "coarse")
    return Case(
        "merge_state",
        f"{'x'.join(map(str, shape))}, {kind}",
        lambda device: _images(device, shape, KINDS[kind], *names),
        {
            "literal": lambda x: merge_state_reference(*(x[n] for n in (*names, "abar"))),
            "eager": _merge_eager,
            "extension": lambda x: merge_state(*(x[n] for n in (*names, "abar")), impl="extension"),
        },
        # forward reads y, eps, coarse and writes the state; backward reads its gradient and writes theirs
        lambda x: 2 * (3 * size(x["y"]) + size(x["coarse"]) + size(x["abar"]),),
        tags=frozenset({tag}),
    )


def _drawn_case(shape: tuple[int, ...], kind: str, tag: str) -> Case:
    """Noise drawn on the way; PyTorch must draw it first (by Philox too, so that the results are equal)."""

    def make(device: torch.device) -> Inputs:
        images = _images(device, shape, KINDS[kind], "y", "coarse")
        return images | {"ids": torch.arange(shape[0], device=device)}

    def eager(x: Inputs) -> Tensor:
        eps = _philox.normals_reference(x["ids"], x["y"][0].numel(), rng=RNG, stream=1).view_as(x["y"])
        return _merge_eager({**x, "eps": eps.to(x["y"].dtype)})

    def ours(x: Inputs) -> Tensor:
        return merge_state(x["y"], None, x["coarse"], x["abar"], rng=RNG, sample_ids=x["ids"], impl="extension")

    return Case(
        "merge_state, eps drawn",
        f"{'x'.join(map(str, shape))}, {kind}",
        make,
        {"eager": eager, "extension": ours},
        lambda x: 2 * (2 * size(x["y"]) + size(x["coarse"]) + size(x["abar"]),),
        tags=frozenset({tag}),
    )


def _add_case(shape: tuple[int, ...], kind: str, tag: str) -> Case:
    def literal(x: Inputs) -> Tensor:
        up = upsample_reference(x["coarse"], *x["x"].shape[2:])
        return (x["x"] + per_sample(x["abar"]) * up).to(x["x"].dtype)

    def eager(x: Inputs) -> Tensor:
        up = upsample_reference(x["coarse"], *x["x"].shape[2:])
        return torch.addcmul(x["x"], per_sample(x["abar"].to(up.dtype)), up)

    return Case(
        "upsample_add",
        f"{'x'.join(map(str, shape))}, {kind}",
        lambda device: _images(device, shape, KINDS[kind], "x", "coarse"),
        {
            "literal": literal,
            "eager": eager,
            "extension": lambda x: upsample_add(x["coarse"], x["x"], x["abar"], impl="extension"),
        },
        # backward hands x its gradient on as it came: it reads it, and writes the coarse one
        lambda x: (2 * size(x["x"]) + size(x["coarse"], x["abar"]), size(x["x"], x["coarse"], x["abar"])),
        tags=frozenset({tag}),
    )


WIDE, BATCH, BIG = (4, 64, 256, 256), (16, 4, 240, 240), (64, 64, 256, 256)
CASES = [
    *(_pyramid_case(shape, kind, "cpu") for shape in (WIDE, BATCH) for kind in KINDS),
    _pyramid_case(WIDE, "fp32", "cpu", alpha=0.6),
    _pyramid_case(BATCH, "fp32", "cpu", alpha=0.6),
    *(_merge_case(shape, kind, "cpu") for shape in (WIDE, BATCH) for kind in KINDS),
    _drawn_case(BATCH, "fp32", "cpu"),
    _add_case(WIDE, "fp32", "cpu"),
    _add_case(BATCH, "fp32", "cpu"),
    # At least 256 MiB moved: shares of a GPU's ceiling. 32 x 1 x 240 x 240 is a training step's: microseconds.
    *(_pyramid_case(BIG, kind, "large") for kind in KINDS),
    _pyramid_case(BIG, "bf16", "large", alpha=0.6),
    _pyramid_case((32, 1, 240, 240), "fp32", "large"),
    *(_merge_case(BIG, kind, "large") for kind in KINDS),
    _merge_case((32, 1, 240, 240), "fp32", "large"),
    _drawn_case(BIG, "bf16", "large"),
    _add_case(BIG, "bf16", "large"),
]
CASES = tagged(
    CASES, "check", *(case.shape for case in CASES if "64x64x256x256" in case.shape and "bf16" in case.shape)
)


@parametrize(CASES)
def test_pyramid(benchmark, device, case, variant, way):
    run(benchmark, device, case, variant, way)
