"""The byte counts themselves: kernels whose traffic is known, and one real case of each operation."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import traffic  # noqa: E402
from benchmarks.case import Case  # noqa: E402
from benchmarks.harness import load_cases  # noqa: E402
from phmdiff_fast.kernels import _impl, _launch  # noqa: E402

if not _impl.HAS_TRITON or not _impl.INTERPRET:
    pytest.skip("bytes are counted in Triton's interpreter", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402


@triton.jit
def _copy(x, y, n, stride, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i * stride, mask=i < n), mask=i < n)


@triton.jit
def _copy_and_one_more(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n) + tl.load(x), mask=i < n)


@triton.jit
def _count(x, counter, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(counter, tl.sum(tl.load(x + i, mask=i < n, other=0), 0))


def copy(x, stride=1, block=64):
    y = _launch.empty((x.numel() // stride,), x.dtype, x.device)
    _launch.launch(_copy, (triton.cdiv(y.numel(), block),), x, y, y.numel(), stride, BLOCK=block)
    return y


@torch.library.custom_op("phmdiff_fast::traffic_test", mutates_args=())
def _within(x: torch.Tensor) -> torch.Tensor:
    return copy((x + 1).view(-1, 2).flatten())


@_within.register_fake
def _(x):
    return torch.empty_like(x)


def case(function, floor, *, n=1000, dtype=torch.float32, op="adaln_modulate", trains=False, x=None):
    def make(device):
        made = torch.arange(n, device=device).to(dtype) if x is None else x
        return {"x": made.requires_grad_(trains)}

    return Case(op, "toy", make, {"triton": lambda inputs: function(inputs["x"])}, lambda inputs: (floor, floor),
                tags=frozenset({"small"}))  # fmt: skip


def forward(*args, **kwargs):
    return traffic.measure(case(*args, **kwargs))["forward"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.bool], ids=str)
def test_a_copy_moves_its_floor(dtype):
    moved = forward(copy, 2000 * torch.empty((), dtype=dtype).element_size(), dtype=dtype)
    assert (moved.ratio, moved.reread, moved.between) == (1.0, 1.0, 0)
    assert [(launch.name, launch.loaded, launch.stored) for launch in moved.launches] == [
        ("_copy", moved.floor // 2, moved.floor // 2)
    ]


def test_masked_off_elements_do_not_count():
    assert forward(lambda x: copy(x, block=1024), 8000).total == 8000


def test_a_workspace_counts_twice():
    moved = forward(lambda x: copy(copy(x)), 8000)
    assert (moved.ratio, len(moved.launches)) == (2.0, 2)


def test_bytes_read_again_within_a_launch_are_cached_and_shown():
    def run(x):
        y = _launch.empty(x.shape, x.dtype, x.device)
        _launch.launch(_copy_and_one_more, (16,), x, y, x.numel(), BLOCK=64)
        return y

    moved = forward(run, 8000)
    assert moved.ratio == 1.0
    assert moved.reread == pytest.approx((1000 + 16) / 1000)


def test_sectors_are_counted_whole():
    moved = forward(lambda x: copy(x, stride=8), 2 * 4 * 125)
    assert moved.ratio == 1.0
    assert moved.sectors == pytest.approx((1000 * 4 + 512) / 1000)  # every sector of x, 500 bytes of y in sectors


def test_a_sector_lies_in_memory_not_in_the_buffer():
    shifted = torch.arange(1001, dtype=torch.float32)[1:9]
    assert forward(copy, 64, x=shifted).sectors == (64 + 32) / 64


def test_an_atomic_reads_and_writes():
    def run(x):
        y = torch.zeros(1)
        _launch.launch(_count, (1,), x, y, x.numel(), BLOCK=1024)
        return y

    launch = forward(run, 4000).launches[0]
    assert (launch.loaded, launch.stored) == (4004, 4)


def test_torch_operators_count_also_inside_a_custom_op():
    moved = forward(_within, 8000)
    assert moved.torch_ops == [("add", 8000)]  # the views and the allocation are free
    assert moved.ratio == 2.0


def test_a_hidden_copy_shows_and_a_fill_only_writes():
    def run(x):
        x = x.view(10, 100).T.contiguous().flatten()
        x.new_zeros(50)
        return copy(x)

    assert forward(run, 8000).torch_ops == [("clone", 8000), ("new_zeros", 200)]


def test_an_expanded_tensor_holds_its_values_once():
    moved = forward(lambda x: copy(x[:1].expand(1000) + 0), 8000)
    assert moved.torch_ops == [("add", 4 + 4000)]


def test_backward_is_counted_apart():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return copy(x)

        @staticmethod
        def backward(ctx, g):
            return copy(copy(g))

    moved = traffic.measure(case(Twice.apply, 8000, trains=True))
    assert {way: m.ratio for way, m in moved.items()} == {"forward": 1.0, "backward": 2.0}


def test_a_touch_outside_every_tensor_is_an_error():
    def run(x):
        y = torch.empty(4)
        _launch.launch(_copy, (1,), x, y, 64, 1, BLOCK=64)
        return y

    with pytest.raises(Exception, match="lies in no tensor"):
        forward(run, 8000)


def test_an_excess_misses_the_limit_and_other_operations_have_none():
    toy = case(lambda x: copy(copy(x)), 8000)
    (line,) = traffic.misses(toy, "forward", traffic.measure(toy)["forward"])
    assert "2.000 of the floor, limit 1.05" in line
    assert "_copy 4000 + 4000" in line
    free = case(lambda x: copy(copy(x)), 8000, op="mmd2")
    assert traffic.misses(free, "forward", traffic.measure(free)["forward"]) == []
    idle = case(lambda x: x.view(-1), 8000)
    assert "no kernel" in traffic.misses(idle, "forward", traffic.measure(idle)["forward"])[0]


def images(shape=(2, 1, 8, 8)):
    """Inputs of an embed_visible that keeps the first patch of side 4 of every image."""
    return {"y": torch.zeros(shape), "sources": torch.zeros(shape), "eps": None, "coarse": None,
            "weight": torch.zeros(3, 32), "keep_ids": torch.zeros(2, 1, dtype=torch.int32)}  # fmt: skip


def embedding(reads):
    return Case("embed_visible", "toy", lambda device: images(), {"triton": lambda i: reads(i["y"])},
                lambda inputs: (1 << 20, 0), tags=frozenset({"small"}))  # fmt: skip


@pytest.mark.parametrize(
    ("reads", "said"),
    [
        (lambda y: copy(y[0, 0, 0, :4]), None),
        (lambda y: copy(y[0, 0, 0, :5]), "_copy: 1 values of dropped patches of y read"),
        (lambda y: copy(y[0, 0, 0, :4]) + y.sum(), "torch.sum reads y"),
    ],
    ids=["kept only", "one too many", "by torch"],
)
def test_a_dropped_patch_that_is_touched_is_a_miss(reads, said):
    toy = embedding(reads)
    wrong = traffic.misses(toy, "forward", traffic.measure(toy)["forward"])
    assert [line.partition(": ")[2] for line in wrong] == ([said] if said else [])


def test_the_command_prints_a_table_and_fails_on_a_miss(monkeypatch, capsys):
    toys = [case(copy, 8000), case(lambda x: copy(copy(x)), 8000)]
    monkeypatch.setattr(traffic, "load_cases", lambda op, files: toys[:1])
    assert traffic.main(["--jobs", "1"]) == 0
    monkeypatch.setattr(traffic, "load_cases", lambda op, files: toys)
    assert traffic.main(["--jobs", "1"]) == 1
    said = capsys.readouterr().out
    assert "re-read" in said
    assert "MISS adaln_modulate [toy] forward" in said


def real() -> list[Case]:
    """The first case of every operation."""
    files = [p for p in (ROOT / "benchmarks").glob("bench_*.py") if "CASES" in p.read_text()]
    cases = load_cases(files=files) if files else []
    counted = [c for c in cases if "small" in c.tags and "triton" in c.variants]
    return list({c.op: c for c in reversed(counted)}.values())


@pytest.mark.parametrize("each", real(), ids=lambda each: each.op)
def test_operations_stay_within_their_limits(each):
    for way, moved in traffic.measure(each).items():
        assert moved.launches
        assert traffic.misses(each, way, moved) == []
