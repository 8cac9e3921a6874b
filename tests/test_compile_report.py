"""Ahead-of-time compiles: kernels whose resources are known, and one case of every real operation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import compile_report  # noqa: E402
from phmdiff_fast.kernels import _impl  # noqa: E402

pytestmark = pytest.mark.skipif(not _impl.HAS_TRITON, reason="needs Triton")

TOYS = """
import torch, triton, triton.language as tl
from benchmarks.case import Case
from phmdiff_fast.kernels import _launch


@triton.jit(do_not_specialize=["seed"])
def _lean(x, y, n, seed, one, nothing, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n) + one, mask=i < n)


@triton.jit
def _spilling(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i).to(tl.float32)
    v -= tl.sum(v, 0) / n
    tl.store(y + i, v * tl.rsqrt(tl.sum(v * v, 0)))


@triton.jit
def _product(x, y, SIDE: tl.constexpr):
    i = tl.arange(0, SIDE)
    at = i[:, None] * SIDE + i[None]
    tl.store(y + at, tl.dot(tl.load(x + at), tl.load(x + at).trans()))


class Lean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = _launch.empty(x.shape, x.dtype, x.device)
        _launch.launch(_lean, (1,), x, y, x.numel(), 5, 1, None, BLOCK=1024, num_warps=2)
        return y

    @staticmethod
    def backward(ctx, g):
        y = _launch.empty(g.shape, g.dtype, g.device)
        _launch.launch(_lean, (1,), g[1:], y, g.numel() - 1, 5, 1, None, BLOCK=1024, num_warps=2)
        return y


def spilling(x):
    _launch.launch(_spilling, (1,), x, torch.empty_like(x), x.numel(), BLOCK=8192, num_warps=1)
    return x


def product(x):
    _launch.launch(_product, (1,), x, torch.empty(x.shape), SIDE=128, num_warps=4)
    return x


def case(op, run, shape, dtype, trains=False):
    def make(device):
        return {"x": torch.zeros(shape, dtype=dtype, device=device, requires_grad=trains)}

    return Case(op, "toy", make, {"triton": lambda i: run(i["x"])}, lambda i: (1, 1), tags=frozenset({"compile"}))


CASES = [
    case("lean", Lean.apply, (4096,), torch.float32, True),
    case("spilling", spilling, (8192,), torch.float32),
    case("product", product, (128, 128), torch.bfloat16),
]
"""


TWICE = """
import sys
from benchmarks.compile_report import main
folder = sys.argv[1]
common = ["--jobs", "1", "--bench", folder + "/bench_toys_to_compile.py", "--cache", folder + "/cache"]
first = main([*common, "--json", folder + "/rows.json"])
import triton
triton.compile = None  # what follows has to come from the cache
print("again")
print("status", first, main([*common, "--op", "lean"]))
"""


def run(*arguments, **settings) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """(folder, what was said of the toys, what was said of one of them a second time)"""
    folder = tmp_path_factory.mktemp("toys")
    (folder / "bench_toys_to_compile.py").write_text(TOYS)
    done = run("-c", TWICE, folder, TRITON_CACHE_DIR=str(folder / "triton"), TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout + done.stderr
    first, _, second = done.stdout.partition("again\n")
    return folder, first, second


@pytest.fixture(scope="module")
def rows(toys) -> dict[str, list[dict]]:
    folder, *_ = toys
    found: dict[str, list[dict]] = {}
    for row in json.loads((folder / "rows.json").read_text()):
        found.setdefault(row["kernel"], []).append(row)
    return found


def test_every_architecture_and_signature_is_a_row(rows):
    assert [(r["arch"], r["widest"]) for r in rows["_lean"]] == [(80, 128), (80, 32), (90, 128), (90, 32), (100, 128),
                                                                 (100, 32)]  # fmt: skip
    assert all(0 < r["registers"] <= 255 and r["warps"] == 2 and not r["spill_bytes"] for r in rows["_lean"])


def test_a_spill_is_reported_and_fails(toys, rows):
    _, said, status = toys
    assert "status 1" in status
    assert all(r["spill_bytes"] > 0 for r in rows["_spilling"])
    assert [line for line in said.splitlines() if line.startswith("MISS")] == [
        f"MISS _spilling for sm_{r['arch']} (spilling [toy]): spills {r['spill_bytes']} bytes a thread"
        for r in rows["_spilling"]
    ]


def test_tensor_cores_and_shared_memory_are_named(rows):
    assert [(r["arch"], r["tensor_cores"]) for r in rows["_product"]] == [(80, "mma"), (90, "wgmma"), (100, "tcgen05")]
    assert all(r["shared"] >= 128 * 128 * 2 for r in rows["_product"])


def test_a_second_run_compiles_nothing(toys):
    _, _, said = toys
    assert "6 compiled, 0 wrong" in said
    assert said.splitlines()[-1] == "status 1 0"


@pytest.mark.parametrize(
    ("ptx", "expected"),
    [
        ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [ %rd1 + 0 ];", (128, 0.0, "none")),
        ("ld.global.L1::evict_last.v2.b32 {%r1}, [%rd1];\nld.global.b16 {%rs1}, [%rd2];", (64, 0.5, "none")),
        ("ld.global.L2::cache_hint.v8.b32 {%r1}, [%rd1], %rd9;", (256, 0.0, "none")),
        ("@%p1 ld.global.u8 %rs1, [%rd1];", (8, 1.0, "none")),
        ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r3;", (128, 0.0, "none")),
        ("ld.shared.v4.b32 {%r1}, [%r2];\nst.global.v4.b32 [%rd1], {%r1};", (0, 0.0, "none")),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", (0, 0.0, "mma")),
        ("wgmma.mma_async.sync.aligned.m64n128k16", (0, 0.0, "wgmma")),
        ("tcgen05.mma.cta_group::1.kind::f16", (0, 0.0, "tcgen05")),
    ],
)
def test_instructions_are_read_from_ptx(ptx, expected):
    assert compile_report.instructions(ptx) == expected


def test_too_much_shared_memory_is_wrong():
    row = compile_report.Row("k", 80, 4, 32, 0, 164 << 10, 128, 0.0, "none")
    assert "shared memory" in row.wrong
    row.arch = 90
    assert row.wrong == ""


def test_one_case_of_every_operation_compiles_without_a_spill():
    """TRITON_INTERPRET is set here, as in every test; the command has to take it away."""
    done = run("-m", "benchmarks.compile_report", "--smallest", "--arch", "90", "--jobs", "1", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("_draw_mask", "_embed_forward", "_restore_forward", "adaln_backward", "mmd2 "):
        assert name in done.stdout


def test_a_row_of_adaln_lies_in_a_warp(tmp_path):
    """With warps along a row's pieces, as Triton 3.6 laid them, its forward has 27 barriers and is 6 times slower."""
    case = ("--op", "adaln_modulate", "--shape", "b4: B 2, N 128, D 768, bf16, x fp32", "--arch", "90")
    done = run("-m", "benchmarks.compile_report", *case, "--json", tmp_path / "rows.json", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["kernel"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert 0 < rows["adaln_forward"]["barriers"] < 10
