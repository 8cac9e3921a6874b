"""What only a GPU can show of the kernels: races, graphs, syncs, sanitizers, memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_tools import no_worse_than_eager

from phmdiff_fast.kernels.adaln import adaln_modulate, gated_residual_adaln
from phmdiff_fast.kernels.mmd import mmd2
from phmdiff_fast.kernels.patch_mask import draw_mask, embed_visible, restore_tokens

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(B=3, side=32, D=192, Cs=3)
LEVEL = dict(B=32, side=64, D=384, Cs=33)


def randn(*shape, dtype=torch.float32, grad=False, seed=0):
    g = torch.Generator("cuda").manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=g, device="cuda").to(dtype).requires_grad_(grad)


def tensors(dtype, *, B, side, D, Cs, p=4, keep=0.25):
    """Inputs of all operations by name, at the shapes of one level of a preset."""
    N = (side // p) ** 2
    ids, step = torch.arange(B, device="cuda"), torch.tensor(5, device="cuda")
    keep_ids, inverse = draw_mask(ids, N, round(keep * N), rng=(1, step), impl="reference")
    gate, shift, scale = (v.detach().requires_grad_() for v in randn(B, 3 * D, dtype=dtype).chunk(3, 1))
    return dict(
        ids=ids, step=step, keep_ids=keep_ids, inverse=inverse, gate=gate, shift=shift, scale=scale,
        y=randn(B, 1, side, side), coarse=randn(B, 1, side // 2, side // 2), abar=torch.rand(B, device="cuda"),
        sources=randn(B, Cs, side, side, grad=True, seed=1), weight=randn(D, (Cs + 2) * p * p, dtype=dtype, grad=True),
        bias=randn(D, dtype=dtype, grad=True), pos=randn(N, D), fill=randn(D, dtype=dtype, grad=True),
        tokens=randn(B, keep_ids.shape[1], D, dtype=dtype, grad=True), x=randn(B, N, D, grad=True),
        h=randn(B, N, D, dtype=dtype, grad=True, seed=2), a=randn(1000, 16, grad=True), b=randn(900, 16, seed=3),
    )  # fmt: skip


# name: the call, and what it is differentiated by
OPERATIONS = {
    "draw_mask": (lambda t, impl: draw_mask(t["ids"], t["inverse"].shape[1], t["keep_ids"].shape[1],
                                            rng=(1, t["step"]), impl=impl), ()),
    "embed_visible": (lambda t, impl: embed_visible(t["y"], t["sources"], t["coarse"], t["abar"], t["keep_ids"],
                                                    t["weight"], t["bias"], t["pos"], rng=(1, t["step"]),
                                                    sample_ids=t["ids"], stream=1, impl=impl),
                      ("sources", "weight", "bias")),
    "restore_tokens": (lambda t, impl: restore_tokens(t["tokens"], t["fill"], t["inverse"], t["pos"], impl=impl),
                       ("tokens", "fill")),
    "adaln_modulate": (lambda t, impl: adaln_modulate(t["x"], t["shift"], t["scale"], impl=impl),
                       ("x", "shift", "scale")),
    "gated_residual_adaln": (lambda t, impl: gated_residual_adaln(t["x"], t["h"], t["gate"], t["shift"], t["scale"],
                                                                  impl=impl), ("x", "h", "gate", "shift", "scale")),
    "mmd2": (lambda t, impl: mmd2(t["a"], t["b"], impl=impl), ("a",)),
}  # fmt: skip
NAMES = tuple(OPERATIONS)


def incoming(outs, like=None):
    """Gradients to begin a backward with; ``like``: tensors whose types they are rounded to."""
    return [randn(*o.shape, dtype=(o if like is None else like[i]).dtype, seed=9).to(o.dtype)
            for i, o in enumerate(outs)]  # fmt: skip


def everything(name, t, impl, like=None, grads=None):
    """Outputs, then gradients of what trains; grads : as of ``incoming``, drawn here unless given."""
    run, leaves = OPERATIONS[name]
    out = run(t, impl)
    outs = out if isinstance(out, tuple) else (out,)
    if not leaves:
        return outs
    grads = incoming(outs, like) if grads is None else grads
    return (*outs, *torch.autograd.grad(outs, [t[leaf] for leaf in leaves], grads))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [SMALL, LEVEL], ids=["small", "level"])
@pytest.mark.parametrize("name", NAMES)
def test_no_worse_than_eager_against_float64(name, shape, dtype):
    t = tensors(dtype, **shape)
    wide = {n: v.detach().double().requires_grad_(v.requires_grad) if v.is_floating_point() else v
            for n, v in t.items()}  # fmt: skip
    got, eager = everything(name, t, "triton"), everything(name, t, "reference")
    if name == "draw_mask":
        assert all(torch.equal(a, b) for a, b in zip(got, eager, strict=True))
        return
    exact = everything(name, wide, "reference", like=got)
    for i, (a, b, c) in enumerate(zip(got, eager, exact, strict=True)):
        if not a.dim():  # a difference of means near 1: to be measured against them, not against itself
            assert abs(float(a) - float(c)) < 5e-7
            continue
        no_worse_than_eager(a, b, c, small=a.numel() < 1000, name=f"{name} output {i}")


@pytest.mark.parametrize("name", NAMES)
def test_k11_a_thousand_runs_give_the_same_bits(name):
    t = tensors(torch.bfloat16, **LEVEL)
    first = everything(name, t, "triton")
    for _ in range(1000):
        for a, b in zip(first, everything(name, t, "triton"), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_k9_captured_in_a_graph(name):
    """Captured once and replayed: the same numbers as eager calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # all of it: a backward ends on the stream its leaves were made on
        t = tensors(torch.bfloat16, **LEVEL)
        results = everything(name, t, "triton")
        # Drawn beforehand: a generator that the graph does not know cannot be used inside it.
        grads = incoming(results[: len(results) - len(OPERATIONS[name][1])])
        expected = [r.clone() for r in everything(name, t, "triton", grads=grads)]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = everything(name, t, "triton", grads=grads)
    for t in captured:
        t.fill_(7)
    graph.replay()
    for a, b in zip(expected, captured, strict=True):
        assert torch.equal(a, b)


def test_k9_a_replayed_graph_draws_anew_for_every_step():
    ids, step = torch.arange(8, device="cuda"), torch.tensor(0, device="cuda")
    draw_mask(ids, 256, 64, rng=(3, step), impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        keep_ids, _ = draw_mask(ids, 256, 64, rng=(3, step), impl="triton")
    for number in (1, 2, 2**33):
        step.fill_(number)
        graph.replay()
        assert torch.equal(keep_ids, draw_mask(ids, 256, 64, rng=(3, number), impl="reference")[0])


@pytest.mark.parametrize("name", NAMES)
def test_k9_nothing_synchronizes(name):
    t = tensors(torch.bfloat16, **SMALL)
    everything(name, t, "triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything(name, t, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_step_compiles_again():
    ids = torch.arange(4, device="cuda")
    from phmdiff_fast.kernels import _patch_mask_triton

    draw_mask(ids, 64, 16, rng=(0, 2), impl="triton")
    kernel = _patch_mask_triton._draw_mask
    caches = getattr(kernel, "device_caches", None) or kernel.cache
    count = lambda: sum(len(c[0] if isinstance(c, tuple) else c) for c in caches.values())  # noqa: E731
    before = count()
    for step in (0, 1, 3, 16, 17, 64, 1000):
        draw_mask(ids, 64, 16, rng=(step, step), impl="triton")
    assert count() == before


def test_memory_of_mmd_is_linear():
    x, y = randn(4096, 64, grad=True), randn(4096, 64, seed=1)
    mmd2(x, y, impl="triton").backward()
    peak = {}
    for name in ("triton", "naive"):
        x.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        if name == "triton":
            mmd2(x, y, impl="triton").backward()
        else:
            both = torch.cat([x, y])
            squared = torch.cdist(both, both).square()
            kernel = sum(torch.exp(-squared / (2.0**j * squared.mean().detach())) for j in range(-2, 3))
            (kernel[:4096, :4096].mean() + kernel[4096:, 4096:].mean() - 2 * kernel[:4096, 4096:].mean()).backward()
        peak[name] = torch.cuda.max_memory_allocated() - before - x.numel() * 4
    assert peak["triton"] <= 0.02 * peak["naive"], peak


def test_mmd_of_65536_rows():
    x, y = randn(65536, 16, grad=True), randn(65536, 16, seed=1) + 0.5
    value = mmd2(x, y, impl="triton")
    value.backward()
    some = mmd2(x[:4096].detach().double(), y[:4096].double(), impl="reference")
    assert abs(float(value) - float(some)) < 0.05 * float(some)
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_k11_compute_sanitizer_finds_nothing(tool):
    sanitizer = shutil.which("compute-sanitizer") or next(
        (str(p) for p in Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None
    )
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": os.pathsep.join(
        [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])}  # fmt: skip
    command = [sanitizer, "--tool", tool, "--error-exitcode", "99", "--kernel-regex",
               "kns=_embed", "--kernel-regex", "kns=_restore", "--kernel-regex", "kns=_draw", "--kernel-regex",
               "kns=adaln", "--kernel-regex", "kns=mmd", sys.executable, __file__]  # fmt: skip
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


if __name__ == "__main__":  # what compute-sanitizer watches
    for kind in (torch.bfloat16, torch.float32):
        for operation in NAMES:
            everything(operation, tensors(kind, **SMALL), "triton")
    torch.cuda.synchronize()
