"""What every benchmark shares: the cells of a table, the check before the clock, the clocks.

    CASES = [Case(...), ...]
    @parametrize(CASES)
    def test_op(benchmark, device, case, variant, way):
        run(benchmark, device, case, variant, way)

A cell is timed only after its result and gradients have been held against the "eager" variant in
float64. "forward" is timed as in training: with a graph recorded where inputs require grad. "backward" is
the backward alone: ``torch.autograd.grad`` over a graph that was recorded beforehand and is kept
(retain_graph, so torch.compile may not reuse the buffers it saved). On a GPU each call is timed by
CUDA events, launched from Python and again as a replayed CUDA graph, with the L2 flushed before
every call where a case is large. On a CPU freed memory is kept by the process, for every variant.
Medians throughout.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.case import Case, Inputs
from phmdiff_fast.device import keep_freed_memory

ROOT = Path(__file__).resolve().parent.parent
WAYS = ("forward", "backward")
CUDA = ["cuda"] if torch.cuda.is_available() else []
# Allowed error (RMS over RMS of the exact values) by the coarsest type that takes part.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-3, torch.float64: 1e-9}
# Bytes a second of a copy (read and written both counted) and bf16 products a second, both measured.
CEILINGS = {"H200": (4.3e12, 790e12)}
LARGE = 64 << 20  # bytes; below it a GPU's L2 keeps what one call touched for the next
FLUSH = 256 << 20  # bytes rewritten to empty the L2


class WrongResult(AssertionError):
    """A variant that does not compute what eager float64 computes has no speed."""


# --- which cells there are ---------------------------------------------------------------------


def load_cases(op: str | None = None, files: Iterable[str | Path] = ()) -> list[Case]:
    """CASES of every benchmarks/bench_*.py that has them, or of ``files``.

    op : only cases of this operation, or of the file bench_<op>.py. Raises ValueError if none is left.
    """
    paths = [Path(f).resolve() for f in files] or sorted((ROOT / "benchmarks").glob("bench_*.py"))
    found = []
    for path in paths:
        if "CASES" not in path.read_text():
            continue
        if path.parent == ROOT / "benchmarks":
            name = f"benchmarks.{path.stem}"
        else:  # a file of the caller's own; its folder on the path, so that worker processes find it too
            name = path.stem
            if str(path.parent) not in sys.path:
                sys.path.insert(0, str(path.parent))
        cases = importlib.import_module(name).CASES
        found += [case for case in cases if op in (None, case.op, path.stem.removeprefix("bench_"))]
    if not found:
        raise ValueError(f"no case of {op!r} in {', '.join(p.name for p in paths)}")
    return found


def smallest(cases: Iterable[Case]) -> list[Case]:
    """The case of fewest bytes of each operation: for a quick look at all of them."""
    best: dict[str, tuple[int, Case]] = {}
    for case in cases:
        moved = sum(case.floor(case.make(torch.device("cpu"))))
        if case.op not in best or moved < best[case.op][0]:
            best[case.op] = moved, case
    return [case for _, case in best.values()]


def _has_backward(case: Case) -> bool:
    """Whether an input trains, found without allocating it where fake tensors suffice."""
    from torch._subclasses import FakeTensorMode

    try:
        with FakeTensorMode():
            inputs = case.make(torch.device("cpu"))
        return any(t is not None and t.requires_grad for t in inputs.values())
    except Exception:  # inputs that are made from values: assume so, and let the run say no
        return True


def ways_of(case: Case) -> tuple[str, ...]:
    return WAYS if _has_backward(case) else WAYS[:1]


def variants_of(case: Case, device: str) -> list[str]:
    away = "triton" if device == "cpu" else "reference"  # the CPU path has no business on a GPU
    names = [name for name in case.variants if name != away]
    if "eager" in names:
        names.insert(names.index("eager") + 1, "compile")
    return names


def belongs(case: Case, device: str) -> bool:
    return bool(case.tags & ({"small", "cpu"} if device == "cpu" else {"small", "large"}))


def cells(cases: Iterable[Case]) -> list[tuple[str, Case, str, str]]:
    """(device, case, variant, way), those of one case next to each other."""
    devices = ["cpu", *CUDA]
    here = [case for case in cases if any(belongs(case, device) for device in devices)]
    ways = [(case, ways_of(case)) for case in here]
    return [
        (device, case, variant, way)
        for device in devices
        for case, both in ways
        if belongs(case, device)
        for way in both
        for variant in variants_of(case, device)
    ]


def parametrize(cases: Iterable[Case]):
    """The mark that runs a test over ``cells(cases)``."""
    import pytest

    rows = [
        pytest.param(torch.device(device), case, variant, way, id=f"{device}-{case.op}-{case.shape}-{variant}-{way}")
        for device, case, variant, way in cells(cases)
    ]
    return pytest.mark.parametrize(("device", "case", "variant", "way"), rows)


# --- what is timed -------------------------------------------------------------------------------


def function_of(case: Case, variant: str) -> Callable[[Inputs], Tensor | tuple[Tensor, ...]]:
    if variant != "compile":
        return case.variants[variant]
    import torch._functorch.config as functorch

    torch._dynamo.reset()  # cases may share code, and after eight shapes of it dynamo quietly runs eager
    functorch.donated_buffer = False  # the graph is kept and walked again
    return torch.compile(case.variants["eager"], dynamic=False)


def outputs_of(result) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def trained(inputs: Inputs) -> dict[str, Tensor]:
    return {name: t for name, t in inputs.items() if t is not None and t.requires_grad}


def cotangents(outputs: list[Tensor]) -> list[Tensor]:
    """Incoming gradients: the same at every call and exact in every type."""
    out = []
    for number, t in enumerate(outputs):
        drawn = torch.Generator(t.device).manual_seed(number)
        values = torch.randn(t.shape, generator=drawn, device=t.device, dtype=torch.float32)
        out.append(values.bfloat16().to(t.dtype))
    return out


def prepare(case: Case, variant: str, way: str, inputs: Inputs, function=None) -> Callable[[], object]:
    """The call to time."""
    function = function or function_of(case, variant)
    if way == "forward":
        return lambda: function(inputs)
    outputs = [t for t in outputs_of(function(inputs)) if t.requires_grad]
    wrt, incoming = list(trained(inputs).values()), cotangents(outputs)
    return lambda: torch.autograd.grad(outputs, wrt, incoming, retain_graph=True, allow_unused=True)


def evaluate(function, inputs: Inputs) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    outputs = outputs_of(function(inputs))
    values = {f"output {n}": t.detach() for n, t in enumerate(outputs)}
    wrt, moving = trained(inputs), [t for t in outputs if t.requires_grad]
    if wrt and moving:
        grads = torch.autograd.grad(moving, list(wrt.values()), cotangents(moving), allow_unused=True)
        values |= {f"gradient of {name}": g for name, g in zip(wrt, grads, strict=True) if g is not None}
    return values


# --- the check before the clock ------------------------------------------------------------------


def widened(inputs: Inputs) -> Inputs:
    """The same values with every floating point type float64."""
    return {
        name: t if t is None or not t.is_floating_point() else t.detach().double().requires_grad_(t.requires_grad)
        for name, t in inputs.items()
    }


_exact: tuple = (None, None)  # of the latest case only: in float64 a large one takes gigabytes


def exact_values(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Outputs and gradients in float64, by "eager" or, where that does not fit in memory, "reference"."""
    global _exact
    key = (case, next(t.device for t in inputs.values() if t is not None))
    if _exact[0] == key:
        return _exact[1]
    forget()
    *first, last = [name for name in ("eager", "reference", "literal") if name in case.variants]
    for name in first:
        with contextlib.suppress(torch.OutOfMemoryError):
            _exact = (key, evaluate(case.variants[name], widened(inputs)))
            return _exact[1]
    _exact = (key, evaluate(case.variants[last], widened(inputs)))
    return _exact[1]


def forget() -> None:
    """Drop the kept float64 values and what else is unused, so that memory readings mean something."""
    global _exact
    _exact = (None, None)
    if CUDA:
        gc.collect()
        torch.cuda.empty_cache()


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def check(case: Case, variant: str, inputs: Inputs, function=None) -> None:
    """Raises WrongResult where an output or a gradient is off.

    The RMS of the error is at most TOLERANCE of the exact RMS, and no element is off by more than
    ten times that share of the largest, or else both are at most twice those of eager in this type.
    """
    exact = exact_values(case, inputs)
    got = evaluate(function or function_of(case, variant), inputs)
    what = f"{case}: {variant}"
    if set(got) != set(exact):
        raise WrongResult(f"{what} gives {sorted(got)}, eager gives {sorted(exact)}")
    floats = [t.dtype for t in [*inputs.values(), *got.values()] if t is not None and t.is_floating_point()]
    share = max((TOLERANCE[d] for d in floats if d in TOLERANCE), default=0.0)
    eager = None
    for name, value in got.items():
        want = exact[name]
        if value.shape != want.shape:
            raise WrongResult(f"{what}: {name} has shape {tuple(value.shape)}, expected {tuple(want.shape)}")
        if not value.is_floating_point():
            if not torch.equal(value, want):
                raise WrongResult(f"{what}: {name} differs in {int((value != want).sum())} of {value.numel()} places")
            continue
        if not value.numel():
            continue
        off = value.double() - want
        found = _rms(off), float(off.abs().max())
        allowed = share * _rms(want), 10 * share * float(want.abs().max())
        if found[0] <= allowed[0] and found[1] <= allowed[1]:  # False for NaN
            continue
        if variant != "eager":
            eager = eager or evaluate(case.variants["eager"], inputs)
            of_eager = eager[name].double() - want
            if found[0] <= 2 * _rms(of_eager) and found[1] <= 2 * float(of_eager.abs().max()):
                continue
        raise WrongResult(
            f"{what} is wrong, so it has no speed: {name} is off by RMS {found[0]:.3g} (allowed {allowed[0]:.3g}), "
            f"at most {found[1]:.3g} (allowed {allowed[1]:.3g})"
        )


# --- clocks ----------------------------------------------------------------------------------------


@lru_cache
def _flush_buffer() -> Tensor:
    return torch.empty(FLUSH // 4, dtype=torch.int32, device="cuda")


def flushes(case: Case, inputs: Inputs, way: str, device: torch.device) -> bool:
    """Whether the L2 is emptied before each call: for a large case that moves more than the L2 holds."""
    return device.type == "cuda" and "large" in case.tags and case.floor(inputs)[WAYS.index(way)] >= LARGE


def seconds(call: Callable[[], object], device: torch.device, *, flush: bool = False, calls: int = 1) -> float:
    """Time of one call, as the mean of ``calls`` in a row."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls
    if flush:
        _flush_buffer().zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / calls


def plan(call: Callable[[], object], device: torch.device, *, flush: bool, budget: float = 0.5) -> tuple[int, int]:
    """(rounds, calls a round) that take about ``budget`` seconds; also the warm-up."""
    for _ in range(3 if device.type == "cuda" else 1):
        once = seconds(call, device)
    calls = 1 if flush else max(1, min(100, int(2e-4 / max(once, 1e-7))))
    return max(5, min(50, int(budget / max(once * calls, 1e-6)))), calls


def graphed(case: Case, variant: str, way: str, inputs: Inputs, function=None) -> Callable[[], object]:
    """The call captured as a CUDA graph. Autograd runs a backward on the stream of its forward, and ends it on the
    stream its leaves were made on, so all are made anew on the stream that is captured.

    Raises RuntimeError for a call that cannot be captured; one that waits for the device is not even tried.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        own = {name: t if t is None else t.detach().requires_grad_(t.requires_grad) for name, t in inputs.items()}
        call = prepare(case, variant, way, own, function)
        for _ in range(3):
            call()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=side):
            kept = call()
    except RuntimeError:
        _end_capture(graph)
        raise
    kept = call, kept  # the call too: a backward reads what its forward, outside of the graph, has saved
    return lambda: (graph.replay(), kept)[0]


def _end_capture(graph: torch.cuda.CUDAGraph) -> None:
    """After a capture that failed: torch (2.11) would leave the allocator and the random generator in it, and every
    later benchmark of the process would run out of memory."""
    device = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(device, graph.pool())
        torch._C._cuda_releasePool(device, graph.pool())
    with contextlib.suppress(RuntimeError, AttributeError):
        torch.cuda.default_generators[device].graphsafe_set_state(torch.Generator(f"cuda:{device}"))


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Device memory a call takes on top of what lay there before (its results included)."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


@lru_cache
def ceiling(device: torch.device) -> tuple[float, float, str]:
    """(bytes a second, operations a second, where they come from) of the device."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((value for key, value in CEILINGS.items() if key in name), None)
        if known:
            return *known, f"{name}: 4.3 TB/s copy, 790 TFLOP/s bf16"
        size, side, dtype = 1 << 30, 8192, torch.bfloat16
    else:
        name, size, side, dtype = device_name(device), 256 << 20, 1024, torch.float32
    a = torch.rand(size // 4, dtype=torch.float32, device=device)  # a GPU is faster on equal bits than on real data
    b = torch.empty_like(a)
    m = torch.randn(side, side, dtype=torch.float32, device=device).to(dtype)
    copy, product = (
        min(seconds(call, device) for _ in range(5)) for call in (lambda: b.copy_(a), lambda: torch.mm(m, m))
    )
    rates = 2 * size / copy, 2 * side**3 / product
    return *rates, f"{name}: {rates[0] / 1e9:.3g} GB/s copy, {rates[1] / 1e12:.3g} TFLOP/s, both measured now"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' * (threads > 1)}"


@lru_cache
def commit() -> str:
    """Short name of the commit, with a + if the tree differs from it; PHMDIFF_COMMIT says it of a copy without .git."""
    if told := os.environ.get("PHMDIFF_COMMIT"):
        return told
    found = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def origin(device: torch.device) -> dict:
    """Where and when a figure was measured."""
    today = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    return {"device": device_name(device), "date": today, "commit": commit(), "torch": torch.__version__}


def figures(case: Case, way: str, inputs: Inputs, taken: float, device: torch.device) -> dict:
    """What ``taken`` seconds mean: GB/s of the floor's bytes, TFLOP/s, share of the ceiling.

    The share is that of whichever ceiling binds. With fewer than 256 MiB moved, caches may serve
    part of it and the share may exceed 1: ``cached`` says so.
    """
    bandwidth, products, source = ceiling(device)
    floor = case.floor(inputs)[WAYS.index(way)]
    flops = case.flops(inputs)[WAYS.index(way)] if case.flops else 0
    least = max(floor / bandwidth, flops / products)
    return {
        "floor_bytes": floor,
        "gb_per_s": floor / taken / 1e9,
        **({"tflop_per_s": flops / taken / 1e12} if flops else {}),
        "share": least / taken,
        "cached": floor < FLUSH,
        "ceiling": source,
    }


def run(benchmark, device: torch.device, case: Case, variant: str, way: str) -> None:
    """One cell under pytest-benchmark: check, then time. Fails without a figure if the result is wrong."""
    import pytest

    if device.type == "cpu":
        keep_freed_memory()
    benchmark.group = f"{case.op} [{case.shape}] {way} on {device.type}"
    torch.manual_seed(0)
    try:
        inputs = case.make(device)
        if way == "backward" and not trained(inputs):
            pytest.skip("nothing here trains")
        function = function_of(case, variant)
        check(case, variant, inputs, function)
        if device.type == "cuda":
            forget()
        call = prepare(case, variant, way, inputs, function)
        flush = flushes(case, inputs, way, device)
        rounds, calls = plan(call, device, flush=flush)
    except torch.OutOfMemoryError:
        pytest.skip(f"{variant} does not fit in the memory of {device}")
    clock = [0.0]  # the benchmark reads this one: on a GPU it advances by what the events say

    def timed():
        clock[0] += seconds(call, device, flush=flush, calls=calls)

    benchmark._timer = lambda: clock[0]
    benchmark.pedantic(timed, rounds=rounds, warmup_rounds=1)
    taken = benchmark.stats.stats.median
    info = {"op": case.op, "shape": case.shape, "way": way, "variant": variant, "flushed": flush, **origin(device)}
    if device.type == "cuda":
        info["peak_bytes"] = peak_bytes(call, device)
        info |= _graph_figures(case, variant, way, inputs, function, device, flush, rounds)
    info |= figures(case, way, inputs, info.get("graph_s") or taken, device)
    benchmark.extra_info.update(info)


def _graph_figures(case, variant, way, inputs, function, device, flush, rounds) -> dict:
    try:
        replay = graphed(case, variant, way, inputs, function)
        replay()
        times = [seconds(replay, device, flush=flush, calls=1 if flush else 20) for _ in range(rounds)]
        return {"graph_s": statistics.median(times)}
    except RuntimeError as problem:  # a variant that cannot be captured still has its eager time
        torch.cuda.synchronize()
        return {"graph_s": None, "graph_problem": str(problem).splitlines()[0][:200]}
