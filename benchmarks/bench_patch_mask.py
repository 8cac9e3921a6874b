"""Masked patches: draw, embed what stays, restore; against the peers' argsort, full embedding and gather."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.case import Case, size, tagged
from benchmarks.harness import parametrize, run
from phmdiff_fast.kernels import _philox
from phmdiff_fast.kernels.patch_mask import draw_mask, embed_visible, restore_tokens

RNG = (7, 11)
WIDTHS = {"s4": 384, "b4": 768, "l4": 1024, "XL": 1152}
KINDS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def _randn(generator, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=generator, device=generator.device).to(dtype)


def _ids(batch, device):
    return torch.arange(batch, dtype=torch.int64, device=device)


# ---- draw_mask: which patches stay --------------------------------------------------------------


def _draw_inputs(device, *, B, N, K):
    ids = _ids(B, device)
    # The peers' keys are given to them for nothing; ours are part of the operation.
    return {"ids": ids, "keys": _philox.integers(ids, N, rng=RNG, stream=0), "like": torch.empty(N, K, device="meta")}


def _draw_literal(x):
    """MAE's random_masking: two argsorts of all keys and a gathered mask."""
    K = x["like"].shape[1]
    order = torch.argsort(x["keys"], dim=1)
    restore = torch.argsort(order, dim=1)
    mask = torch.ones(x["keys"].shape, device=order.device)
    mask[:, :K] = 0
    torch.gather(mask, 1, restore)
    return order[:, :K].sort(1).values.int()  # the peers leave them shuffled; a comparison cannot


def _draw_ours(x, impl):
    N, K = x["like"].shape
    return draw_mask(x["ids"], N, K, rng=RNG, impl=impl)[0]


def _draw_floor(x):
    (N, K), B = x["like"].shape, len(x["ids"])
    return size(x["ids"]) + 4 * B * (N + K), 0


# ---- embed_visible ------------------------------------------------------------------------------


def _embed_inputs(device, *, B, side, p, Cs, D, keep, kind, drawn=False, train_sources=False):
    g = torch.Generator(device).manual_seed(3)
    N, narrow = (side // p) ** 2, KINDS[kind]
    ids = _ids(B, device)
    out = {
        "y": _randn(g, B, 1, side, side), "sources": _randn(g, B, Cs, side, side),
        "coarse": _randn(g, B, 1, side // 2, side // 2), "abar": torch.rand(B, generator=g, device=device),
        "keep_ids": draw_mask(ids, N, round(keep * N), rng=RNG, impl="reference")[0],
        "weight": _randn(g, D, (Cs + 2) * p * p, dtype=narrow) / math.sqrt(p * p * (Cs + 2)),
        "bias": _randn(g, D, dtype=narrow), "pos": _randn(g, N, D),
        "eps": None if drawn else _randn(g, B, 1, side, side), "ids": ids,
    }  # fmt: skip
    for name in ("weight", "bias", *(["sources"] if train_sources else [])):
        out[name].requires_grad_()
    return out


def _embed_literal(x):
    """Merge the whole image, embed every patch by a strided convolution, gather with an int64 index."""
    weight, y = x["weight"], x["y"]
    eps = x["eps"]
    if eps is None:
        eps = _philox.normals(x["ids"], y[0].numel(), rng=RNG, stream=1).view_as(y)
    abar = x["abar"].to(y.dtype).view(-1, 1, 1, 1)
    up = F.interpolate(x["coarse"], scale_factor=2, mode="bilinear", align_corners=False)
    state = abar.sqrt() * y + (1 - abar).sqrt() * eps + (1 - abar.sqrt()) * up
    image = torch.cat([state, x["sources"], up], 1).to(weight.dtype)
    p = math.isqrt(weight.shape[1] // image.shape[1])
    tokens = F.conv2d(image, weight.view(-1, image.shape[1], p, p), x["bias"], stride=p).flatten(2).transpose(1, 2)
    tokens = tokens + x["pos"].to(tokens.dtype)
    index = x["keep_ids"].long().unsqueeze(-1).repeat(1, 1, tokens.shape[2])
    return torch.gather(tokens, 1, index)


def _embed_ours(x, impl):
    noise = {"eps": x["eps"]} if x["eps"] is not None else dict(rng=RNG, sample_ids=x["ids"], stream=1)
    return embed_visible(x["y"], x["sources"], x["coarse"], x["abar"], x["keep_ids"], x["weight"], x["bias"], x["pos"],
                         **noise, impl=impl)  # fmt: skip


def _halo(kept, side, p):
    """Coarse pixels that bilinear upsampling reads for the kept patches, of a sample's (rows, cols) bool grid."""
    pixels = kept.repeat_interleave(p, 1).repeat_interleave(p, 2).nonzero()
    b, h, w = pixels.unbind(1)
    read = torch.zeros(len(kept), side // 2, side // 2, dtype=torch.bool, device=kept.device)
    last = side // 2 - 1
    for dh in (0, 1):
        for dw in (0, 1):
            read[b, ((h - 1 >> 1) + dh).clamp(0, last), ((w - 1 >> 1) + dw).clamp(0, last)] = True
    return int(read.sum())


def _embed_floor(x):
    y, ids, weight = x["y"], x["keep_ids"], x["weight"]
    (B, K), side, (D, P) = ids.shape, y.shape[2], weight.shape
    channels = 2 + x["sources"].shape[1]
    p = math.isqrt(P // channels)
    N = (side // p) ** 2
    kept = torch.zeros(B, N, dtype=torch.bool, device=y.device).scatter(1, ids.long(), True)
    images = 1 + x["sources"].shape[1] + (x["eps"] is not None)
    patches = B * K * p * p * images * 4 + 4 * _halo(kept.view(B, side // p, side // p), side, p)
    drawn = size(x["ids"]) if x["eps"] is None else 0
    around = size(x["abar"], ids) + drawn
    tokens = B * K * D * weight.element_size()
    forward = patches + around + size(weight, x["bias"]) + int(kept.any(0).sum()) * D * 4 + tokens
    backward = tokens + patches + around + size(weight, x["bias"])  # gradients written
    if x["sources"].requires_grad:
        backward += size(weight[:, p * p : -p * p]) + size(x["sources"])
    return forward, backward


# ---- draw and embed together --------------------------------------------------------------------


def _both_literal(x):
    order = torch.argsort(x["keys"], dim=1)
    restore = torch.argsort(order, dim=1)
    keep_ids = order[:, : x["keep_ids"].shape[1]].sort(1).values  # the peers leave them shuffled
    return _embed_literal({**x, "keep_ids": keep_ids}), restore


def _both_ours(x, impl):
    keep_ids, inverse = draw_mask(x["ids"], x["pos"].shape[0], x["keep_ids"].shape[1], rng=RNG, impl=impl)
    return _embed_ours({**x, "keep_ids": keep_ids}, impl), inverse


def _tokens_of(run_both, x):
    return run_both(x)[0]


def _both_inputs(device, **sizes):
    x = _embed_inputs(device, **sizes)
    x["keys"] = _philox.integers(x["ids"], x["pos"].shape[0], rng=RNG, stream=0)
    for name in ("weight", "bias"):
        x[name] = x[name].detach()
    return x


# ---- restore_tokens -----------------------------------------------------------------------------


def _restore_inputs(device, *, B, N, D, keep, kind, fill_rows):
    g = torch.Generator(device).manual_seed(5)
    K = round(keep * N)
    inverse = draw_mask(_ids(B, device), N, K, rng=RNG, impl="reference")[1]
    hidden = inverse < 0
    return {
        "x": _randn(g, B, K, D, dtype=KINDS[kind]).requires_grad_(),
        "fill": _randn(g, *((B, N - K, D) if fill_rows else (D,)), dtype=KINDS[kind]).requires_grad_(),
        "inverse": inverse, "pos": _randn(g, N, D),
        "restore": torch.where(hidden, K - 1 + hidden.cumsum(1), inverse),  # the peers' ids_restore, int64
    }  # fmt: skip


def _restore_literal(x):
    """MAE's decoder input: mask tokens repeated, concatenated, gathered with an int64 index."""
    tokens, fill = x["x"], x["fill"]
    B, K, D = tokens.shape
    if fill.dim() == 1:
        fill = fill.view(1, 1, D).repeat(B, x["inverse"].shape[1] - K, 1)
    whole = torch.cat([tokens, fill], 1)
    return torch.gather(whole, 1, x["restore"].unsqueeze(-1).repeat(1, 1, D)) + x["pos"].to(tokens.dtype)


def _restore_ours(x, impl):
    return restore_tokens(x["x"], x["fill"], x["inverse"], x["pos"], impl=impl)


def _restore_floor(x):
    out = x["inverse"].numel() * x["x"].shape[2] * x["x"].element_size()
    inputs = size(x["x"], x["fill"])
    return inputs + size(x["inverse"], x["pos"]) + out, out + size(x["inverse"]) + inputs


# ---- the table ----------------------------------------------------------------------------------


def _case(op, shape, make, literal, ours, floor, *tags):
    variants = {"literal": literal, "eager": partial(ours, impl="reference"), "triton": partial(ours, impl="triton")}
    return Case(op, shape, make, variants, floor, tags=frozenset(tags))


def _embed_case(tag, preset, *, B, side, p=4, Cs=1, keep=0.25, kind="bf16", drawn=False, train_sources=False):
    shape = (f"{preset}: B {B}, {side}x{side}, p {p}, Cs {Cs}, D {WIDTHS[preset]}, keep {keep:.0%}, {kind}"
             + ", noise drawn" * drawn + ", sources train" * train_sources)  # fmt: skip
    make = partial(_embed_inputs, B=B, side=side, p=p, Cs=Cs, D=WIDTHS[preset], keep=keep, kind=kind, drawn=drawn,
                   train_sources=train_sources)  # fmt: skip
    return _case("embed_visible", shape, make, _embed_literal, _embed_ours, _embed_floor, tag)


def _restore_case(tag, D, *, B, N, keep=0.25, kind="bf16", fill_rows=True):
    shape = f"B {B}, N {N}, D {D}, keep {keep:.0%}, {kind}, fill by {'row' if fill_rows else 'token'}"
    make = partial(_restore_inputs, B=B, N=N, D=D, keep=keep, kind=kind, fill_rows=fill_rows)
    return _case("restore_tokens", shape, make, _restore_literal, _restore_ours, _restore_floor, tag)


def _draw_case(tag, *, B, N):
    make = partial(_draw_inputs, B=B, N=N, K=N // 4)
    return _case("draw_mask", f"B {B}, N {N}, keep 25%", make, _draw_literal, _draw_ours, _draw_floor, tag)


def _both_case(tag, preset, *, B, side, p=4):
    sizes = dict(B=B, side=side, p=p, Cs=1, D=WIDTHS[preset], keep=0.25, kind="fp32")
    shape = f"{preset}: B {B}, {side}x{side}, p {p}, D {WIDTHS[preset]}, keep 25%, fp32"
    return _case("draw_mask + embed_visible", shape, partial(_both_inputs, **sizes), partial(_tokens_of, _both_literal),
                 lambda x, impl: _both_ours(x, impl)[0], lambda x: (_embed_floor(x)[0], 0), tag)  # fmt: skip


CASES = [
    _draw_case("small", B=8, N=256),
    _draw_case("small", B=4, N=4096),
    _draw_case("large", B=256, N=256),
    _draw_case("large", B=64, N=4096),
    *(_embed_case("small", preset, B=8, side=64) for preset in WIDTHS),
    _embed_case("small", "s4", B=8, side=64, kind="fp32"),
    _embed_case("small", "s4", B=8, side=64, drawn=True),
    _embed_case("small", "s4", B=4, side=64, Cs=33, train_sources=True),
    _embed_case("small", "l4", B=4, side=64, Cs=33, train_sources=True),
    # 256 MiB moved and more, 131,072 kept tokens and more.
    _embed_case("large", "s4", B=1024, side=128),
    _embed_case("large", "l4", B=512, side=128),
    _embed_case("large", "s4", B=1152, side=128, drawn=True),
    _embed_case("large", "l4", B=256, side=128, Cs=33, train_sources=True),
    _embed_case("large", "b4", B=32, side=64),  # latency of one training batch
    *(_restore_case("small", D, B=4, N=256) for D in (192, 384, 512, 1152)),
    _restore_case("small", 512, B=4, N=256, fill_rows=False),
    _restore_case("small", 512, B=4, N=256, kind="fp32"),
    _restore_case("large", 512, B=256, N=1024),
    _restore_case("large", 512, B=256, N=1024, fill_rows=False),
    _restore_case("large", 192, B=32, N=256),
    _both_case("cpu", "s4", B=32, side=64),
    _both_case("cpu", "s4", B=32, side=192),
    _both_case("large", "s4", B=256, side=128),
]

CASES = tagged(
    CASES, "check", "B 64, N 4096, keep 25%", "s4: B 1024, 128x128, p 4, Cs 1, D 384, keep 25%, bf16",
    "l4: B 512, 128x128, p 4, Cs 1, D 1024, keep 25%, bf16",
    "s4: B 1152, 128x128, p 4, Cs 1, D 384, keep 25%, bf16, noise drawn",
    "l4: B 256, 128x128, p 4, Cs 33, D 1024, keep 25%, bf16, sources train",
    "B 256, N 1024, D 512, keep 25%, bf16, fill by row", "B 256, N 1024, D 512, keep 25%, bf16, fill by token",
)  # fmt: skip


@parametrize(CASES)
def test_patch_mask(benchmark, device, case, variant, way):
    run(benchmark, device, case, variant, way)
