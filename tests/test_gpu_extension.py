"""What only a GPU can show of the extension's CUDA kernels: the CPU's bits, streams, graphs, races, memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from phmdiff_fast import haar3d, inverse_haar3d
from phmdiff_fast.kernels import _extension, _philox
from phmdiff_fast.pyramid import build_pyramid, level_error, merge_state, upsample, upsample_add

ROOT = Path(__file__).resolve().parent.parent
KINDS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [(2, 3, 64, 64), (2, 1, 15, 13), (1, 2, 240, 97), (3, 1, 1, 7)]
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _built():
    """A GPU without the kernels for it is a failure here, not a skip: they are what is to be tested."""
    assert not _extension.problem_on(torch.device("cuda")), _extension.problem_on(torch.device("cuda"))


def image(*shape, kind, seed=0):
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(kind)


def operations(shape, kind):
    """{name: (function of tensors, tensors)}; the images come first and train."""
    B, C, H, W = shape
    half = (B, C, -(-H // 2), -(-W // 2))
    y, eps, coarse = image(*shape, kind=kind), image(*shape, kind=kind, seed=1), image(*half, kind=kind, seed=2)
    abar = torch.rand(B, generator=torch.Generator().manual_seed(3)) * 0.9
    ids = torch.tensor([5, -1, 2**40, 7])[:B]
    volume = image(B, C, min(H, 24), min(W, 17), 19, kind=kind, seed=4)
    bands = image(B, 8, C, 5, 6, 7, kind=kind, seed=5)

    def drawn(y, coarse, abar, ids):
        return merge_state(y, None, coarse, abar, rng=(3, 4), sample_ids=ids, stream=2, impl="extension")

    return {
        "pyramid": (lambda y: build_pyramid(y, 5, impl="extension")[1:], [y]),
        "antialiased": (lambda y: build_pyramid(y, 3, alpha=0.6, impl="extension")[1:], [y]),
        "merge": (lambda *a: merge_state(*a, impl="extension"), [y, eps, coarse, abar]),
        "merge without coarse": (lambda y, e, a: merge_state(y, e, None, a, impl="extension"), [y, eps, abar]),
        "drawn": (drawn, [y, coarse, abar, ids]),
        "upsample": (lambda c: upsample(c, H, W, impl="extension"), [coarse]),
        "upsample_add": (lambda c, y, w: upsample_add(c, y, w, impl="extension"), [coarse, y, abar]),
        "haar": (lambda v: haar3d(v, impl="extension"), [volume]),
        "inverse haar": (lambda b: inverse_haar3d(b, shape=(9, 12, 13), impl="extension"), [bands]),
    }


NAMES = list(operations(SIZES[0], torch.float32))


def everything(name, shape, kind, device):
    """Results and gradients, on the CPU again."""
    function, tensors = operations(shape, kind)[name]
    there = [t.to(device).requires_grad_(t.dim() > 1) for t in tensors]
    result = function(*there)
    outputs = [result] if isinstance(result, torch.Tensor) else list(result)
    incoming = [image(*t.shape, kind=kind, seed=9 + n).to(device) for n, t in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, [t for t in there if t.requires_grad], incoming)
    return [t.detach().cpu() for t in (*outputs, *gradients)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_as_on_the_cpu(name, shape, kind):
    """The arithmetic is written once and contracted nowhere, so nothing may differ."""
    for number, (there, here) in enumerate(
        zip(everything(name, shape, kind, "cuda"), everything(name, shape, kind, "cpu"), strict=True)
    ):
        assert torch.equal(there, here), f"result {number}: {(there != here).sum()} of {here.numel()} differ"


def test_level_error_and_random_numbers_too():
    x, coarse = image(2, 1, 15, 14, kind=torch.float32), image(2, 1, 8, 7, kind=torch.float32)
    assert torch.equal(level_error(x.cuda(), coarse.cuda(), impl="extension").cpu(), level_error(x, coarse))
    ids = torch.tensor([3, -7, 2**50])
    for draw in (_philox.integers, _philox.normals):
        assert torch.equal(
            draw(ids.cuda(), 100_003, rng=(1, 2), stream=3).cpu(), draw(ids, 100_003, rng=(1, 2), stream=3)
        )


@pytest.mark.parametrize("name", NAMES)
def test_k11_two_hundred_runs_give_the_same_bits(name):
    first = everything(name, (2, 3, 128, 96), torch.bfloat16, "cuda")
    for _ in range(200):
        again = everything(name, (2, 3, 128, 96), torch.bfloat16, "cuda")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_k9_captured_in_a_graph_on_its_own_stream(name):
    function, tensors = operations((2, 3, 64, 64), torch.float32)[name]
    there = [t.cuda() for t in tensors]
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        function(*there)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=side):
        result = function(*there)
    there[0].copy_(there[0] * 2)  # what a replay reads is what lies there then
    graph.replay()
    expected = function(*there)
    for got, want in zip(*([r] if isinstance(r, torch.Tensor) else r for r in (result, expected)), strict=True):
        assert torch.equal(got, want)


def test_k9_a_replayed_graph_draws_anew_for_every_step():
    ids, step = torch.arange(2, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    y, abar, graph = torch.zeros(2, 1, 8, 8, device="cuda"), torch.zeros(2, device="cuda"), torch.cuda.CUDAGraph()
    merge_state(y, None, None, abar, rng=(1, step), sample_ids=ids, impl="extension")
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = merge_state(y, None, None, abar, rng=(1, step), sample_ids=ids, impl="extension")
    for number in (1, 2):
        step.fill_(number)
        graph.replay()
        expected = _philox.normals(ids.cpu(), 64, rng=(1, number), stream=_philox.EPS).view(2, 1, 8, 8)
        assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("name", NAMES)
def test_k9_nothing_synchronizes(name):
    function, tensors = operations((2, 3, 64, 64), torch.float32)[name]
    there = [t.cuda() for t in tensors]
    function(*there)
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(*there)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_k5_beyond_two_to_the_31_elements():
    """bf16, 4.3 GB an image: the last rows are those of the last image alone."""
    shape = (33, 64, 1024, 1024)
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB")
    x = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    x[-1, -1] = image(1024, 1024, kind=torch.bfloat16).cuda()
    level = build_pyramid(x, 2, impl="extension")[1]
    assert torch.equal(level[-1:, -1:], build_pyramid(x[-1:, -1:], 2, impl="extension")[1])
    assert not level[:-1].any()
    up = upsample_add(level, x, torch.ones(33, device="cuda"), impl="extension")
    assert torch.equal(
        up[-1, -1], (upsample_add(level[-1:], x[-1:], torch.ones(1, device="cuda"), impl="extension"))[0, -1]
    )


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_k11_compute_sanitizer_finds_nothing(tool):
    sanitizer = shutil.which("compute-sanitizer") or next(
        (str(p) for p in Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None
    )
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": os.pathsep.join(
        [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])}  # fmt: skip
    # "phmdiff" is in every kernel's mangled name, and in no other's.
    command = [sanitizer, "--tool", tool, "--error-exitcode", "99", "--kernel-regex", "kns=phmdiff", sys.executable,
               __file__]  # fmt: skip
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


if __name__ == "__main__":  # what compute-sanitizer watches
    for kind in (torch.float32, torch.bfloat16):
        for size in SIZES:
            for operation in NAMES:
                everything(operation, size, kind, "cuda")
    torch.cuda.synchronize()
