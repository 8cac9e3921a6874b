"""All variants of a case side by side: ``python -m benchmarks.compare [--op adaln] [--device cuda] [--json FILE]``.

pytest-benchmark times one variant after the other, so a clock that drifts (heat, a neighbour) lands
on one of them. Here every round times every variant once, in turning order, and medians are
compared. On a GPU both the call from Python and the replayed CUDA graph are timed; ratios, GB/s and
the share of the ceiling are the graph's. Peak is the memory a call takes on top of its inputs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.case import Case


def measure(case: Case, way: str, device: torch.device, *, budget: float = 1.0, only: list[str] | None = None) -> dict:
    """A record of one case and direction: variant -> seconds and what they mean.

    budget : seconds a variant. A variant that is wrong or does not fit in memory has an "error" instead.
    """
    inputs = case.make(device)
    flush = harness.flushes(case, inputs, way, device)
    ready, out = {}, {}
    for variant in harness.variants_of(case, device.type):
        if only and variant not in only:
            continue
        try:
            function = harness.function_of(case, variant)
            harness.check(case, variant, inputs, function)
            if device.type == "cuda":
                harness.forget()  # before memory is read
            call = harness.prepare(case, variant, way, inputs, function)
            rounds, calls = harness.plan(call, device, flush=flush, budget=budget)
            out[variant] = {"peak_bytes": harness.peak_bytes(call, device)}
            ready[variant] = [(call, calls)]
        except torch.OutOfMemoryError:
            out[variant] = {"error": "does not fit in memory"}
            harness.forget()
            continue
        except (harness.WrongResult, torch._dynamo.exc.TorchDynamoException) as problem:
            out[variant] = {"error": str(problem)}  # of a peer that torch cannot compile too
            continue
        if device.type == "cuda":
            try:
                replay = harness.graphed(case, variant, way, inputs, function)
                ready[variant].append((replay, 1 if flush else 20))
            except RuntimeError as problem:  # torch.OutOfMemoryError is one
                torch.cuda.synchronize()
                out[variant]["graph_problem"] = str(problem).splitlines()[0][:200]
        out[variant]["rounds"] = rounds
    times = _interleaved(ready, device, flush, max((out[v]["rounds"] for v in ready), default=0), budget)
    for variant, (called, *replayed) in times.items():
        out[variant] |= {"call_s": called, "graph_s": replayed[0] if replayed else None}
        out[variant] |= harness.figures(case, way, inputs, replayed[0] if replayed else called, device)
    return {"op": case.op, "shape": case.shape, "way": way, "flushed": flush, "variants": out, **harness.origin(device)}


def _interleaved(ready: dict, device: torch.device, flush: bool, rounds: int, budget: float) -> dict[str, list[float]]:
    """variant -> medians (call, graph if there is one). A variant far slower than the rest sits rounds out."""
    found: dict[str, list[list[float]]] = {name: [[] for _ in calls] for name, calls in ready.items()}
    names = list(ready)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if turn >= 5 and sum(map(sum, found[name])) * ready[name][0][1] > budget:
                continue
            for times, (call, calls) in zip(found[name], ready[name], strict=True):
                times.append(harness.seconds(call, device, flush=flush, calls=calls))
    return {name: [statistics.median(times) for times in kinds] for name, kinds in found.items()}


def best(figures: dict) -> float | None:
    """Seconds the table compares: the graph's on a GPU, else the call's."""
    return figures.get("graph_s") or figures.get("call_s")


HEADS = ("operation", "shape", "way", "variant", "call us", "graph us", "x eager", "x compile", "x ours", "GB/s",
         "TFLOP/s", "share", "peak MiB")  # fmt: skip
OURS = ("triton", "extension", "reference")  # the first of them that was timed


def table(records: list[dict]) -> list[tuple]:
    """A row a variant. x eager: how many times faster than eager this variant is; x ours: than ours."""
    rows = []
    for record in records:
        timed = {name: best(f) for name, f in record["variants"].items()}
        ours = next((timed[name] for name in OURS if timed.get(name)), None)
        before = record["op"], record["shape"], record["way"]
        for name, f in record["variants"].items():
            if "error" in f:
                rows.append((*before, name, f["error"][:60], *[""] * (len(HEADS) - 5)))
            else:
                others = (timed.get("eager"), timed.get("compile"), ours)
                rows.append((
                    *before, name, f"{f['call_s'] * 1e6:.1f}", f"{f['graph_s'] * 1e6:.1f}" if f["graph_s"] else "-",
                    *(f"{other / timed[name]:.2f}" if other else "-" for other in others), f"{f['gb_per_s']:.1f}",
                    f"{f['tflop_per_s']:.2f}" if "tflop_per_s" in f else "-",
                    f"{f['share']:.0%}{'*' if f['cached'] else ''}",
                    f"{f['peak_bytes'] / 2**20:.1f}" if f["peak_bytes"] is not None else "-",
                ))  # fmt: skip
            before = "", "", ""
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", help="operations, or those of bench_<op>.py, comma-separated, in this order")
    parser.add_argument("--shape", help="only cases whose shape contains this text")
    parser.add_argument("--tag", help="only cases with this tag, e.g. check")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if harness.CUDA else "cpu")
    parser.add_argument("--threads", type=int, help="of a CPU, all by default")
    parser.add_argument("--variants", help="comma-separated; all by default")
    parser.add_argument("--way", choices=harness.WAYS, help="both by default")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing a variant, %(default)s")
    parser.add_argument("--limit", type=float, help="seconds from which on no further case is begun; all by default")
    parser.add_argument("--bench", action="append", default=[], metavar="FILE", help="a file with CASES of your own")
    parser.add_argument("--json", type=Path, help="write the figures there, e.g. benchmarks/results/h200.json")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not harness.CUDA:
        parser.error("torch sees no GPU here")
    from tqdm import tqdm

    from benchmarks.traffic import print_table

    device = torch.device(args.device)
    if device.type == "cpu":
        harness.keep_freed_memory()
        torch.set_num_threads(args.threads or torch.get_num_threads())
    try:
        ops = args.op.split(",") if args.op else [None]
        cases = [c for op in ops for c in harness.load_cases(op, args.bench) if harness.belongs(c, args.device)]
    except ValueError as problem:
        parser.error(str(problem))
    cases = [c for c in cases if (args.shape or "") in c.shape and (args.tag is None or args.tag in c.tags)]
    only = args.variants.split(",") if args.variants else None
    todo = [(c, way) for c in cases for way in harness.ways_of(c) if args.way in (None, way)]
    records, begun = [], time.monotonic()
    for case, way in tqdm(todo, desc="comparing", leave=False, disable=None):
        if args.limit is not None and time.monotonic() - begun > args.limit:
            print(f"time is up: {len(todo) - len(records)} of {len(todo)} not timed, from {case} {way} on")
            break
        records.append(measure(case, way, device, budget=args.seconds, only=only))
        if args.json:  # after each case: a run that is cut short keeps what it has
            args.json.write_text(json.dumps({"compare": records}, indent=1))
    print(f"{harness.device_name(device)}; ceiling {harness.ceiling(device)[2]}; commit {harness.commit()}")
    print_table(HEADS, table(records))
    print("* less than 256 MiB moved: caches take part and the share may exceed 100 %")
    wrong = [f["error"] for r in records for f in r["variants"].values() if "wrong" in f.get("error", "")]
    for line in wrong:
        print(f"WRONG {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
