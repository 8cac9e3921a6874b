"""Tables of time per stage and per operation, from a trace that torch.profiler wrote (Chrome's format).

A kernel belongs to the innermost stage in which it was launched, by whichever thread (the backward of a GPU runs in
one of autograd's own, while "backward" waits for it).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from .stages import PREFIX, in_order

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # a trace's categories of what a GPU does
LAUNCHES = ("cuda_runtime", "cuda_driver")
SHOWN = 30  # operations in a table
REST = "no stage"
OWN = "profile"  # a stage around ``Profile.at`` itself


# --- the tables, from a trace -------------------------------------------------------------------------


@dataclass
class Row:
    """One stage; milliseconds and calls a step. Own time is without the stages inside."""

    stage: str
    calls: float = 0.0
    host_ms: float = 0.0
    host_own_ms: float = 0.0
    device_ms: float = 0.0
    device_own_ms: float = 0.0


@dataclass
class Table:
    """Time per stage of the recorded steps. device_busy: share of the time in which the GPU did anything, None
    without a GPU; background: stages of other threads, which no step waits for."""

    steps: int
    step_ms: float
    device_busy: float | None
    rows: list[Row]
    background: list[Row]

    def share(self, row: Row) -> float:
        """The stage's own share of a step: of the device where there is one, else of the host."""
        own = row.host_own_ms if self.device_busy is None else row.device_own_ms
        return own / self.step_ms if self.step_ms else 0.0

    def text(self) -> str:
        """For people, a stage a line."""
        gpu = self.device_busy is not None
        busy = f"; the GPU is busy {self.device_busy * 100:.0f} % of the time" if gpu else ""
        head = f"{'stage':<14}{'calls':>7}{'host ms':>11}{'own':>10}"
        head += f"{'device ms':>11}{'own':>10}" if gpu else ""
        lines = [
            f"{self.steps} step{'s' * (self.steps > 1)} of {self.step_ms:.2f} ms{busy}. Per step:",
            "",
            f"{head}{'share':>9}",
        ]
        for row in [*self.rows, *self.background]:
            line = f"{row.stage:<14}{row.calls:>7.4g}{row.host_ms:>11.3f}{row.host_own_ms:>10.3f}"
            line += f"{row.device_ms:>11.3f}{row.device_own_ms:>10.3f}" if gpu else ""
            inside = all(row is not other for other in self.background)
            lines.append(line + (f"{self.share(row) * 100:>7.1f} %" if inside else "   beside the steps"))
        what = "device" if gpu else "host"
        lines += ["", f"own: without the stages inside; share: own {what} time of the step's"]
        if gpu and not any(row.device_ms for row in self.rows):
            lines.append("No kernel was recorded: CUPTI, which records them, may not be permitted here.")
        return "\n".join(lines) + "\n"


@dataclass
class _Span:
    """An interval of one thread, microseconds; ``above``: the one it lies in."""

    name: str
    start: float
    end: float
    thread: tuple
    above: _Span | None = None
    inside: float = 0.0  # of the spans right inside

    def chain(self):
        span = self
        while span is not None:
            yield span
            span = span.above


@dataclass
class _Thread:
    """Nested spans of one thread by their starts."""

    spans: list[_Span] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)

    def at(self, moment: float) -> _Span | None:
        """The innermost span around a moment."""
        i = bisect_right(self.starts, moment) - 1
        return next((s for s in self.spans[i].chain() if s.end > moment), None) if i >= 0 else None


def _nested(spans: list[_Span]) -> dict[tuple, _Thread]:
    """The spans by thread, each told what it lies in."""
    threads: dict[tuple, _Thread] = defaultdict(_Thread)
    for span in sorted(spans, key=lambda s: (s.start, -s.end)):
        thread = threads[span.thread]
        span.above = thread.at(span.start)
        if span.above is not None:
            span.above.inside += span.end - span.start
        thread.spans.append(span)
        thread.starts.append(span.start)
    return threads


def _backward(main: _Thread, moment: float) -> _Span | None:
    """The "backward" in which the main thread waits at a moment."""
    span = main.at(moment)
    return next((s for s in span.chain() if s.name == "backward"), None) if span else None


def _span(event: dict, name: str) -> _Span:
    return _Span(name, event["ts"], event["ts"] + event["dur"], (event["pid"], event["tid"]))


def _steps(events: list[dict]) -> tuple[list[_Span], float, float]:
    """(the recorded steps, begin of the first, end of the last)."""
    steps = [_span(e, e["name"]) for e in events if e["name"].startswith("ProfilerStep#")
             and e.get("cat") == "user_annotation"]  # fmt: skip
    return steps, min((s.start for s in steps), default=0.0), max((s.end for s in steps), default=0.0)


def stage_table(trace: dict) -> Table:
    """Time per stage of a trace of torch.profiler (the loaded JSON). Raises ValueError if it holds no step."""
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X"]
    steps, begin, end = _steps(events)
    if not steps:
        raise ValueError("the trace holds no ProfilerStep")
    main = steps[0].thread
    spans = [_span(e, e["name"][len(PREFIX) :]) for e in events if e["name"].startswith(PREFIX)
             and e.get("cat") == "user_annotation" and begin <= e["ts"] < end]  # fmt: skip
    spans = [span for span in spans if span.name != OWN]  # begins and ends across the ends of steps
    for span in spans:
        span.end = min(span.end, end)
    threads = _nested(spans)

    def around(moment: float, thread: tuple) -> _Span | None:
        """The stage in which a thread is; autograd's threads are in the "backward" that waits for them."""
        own = threads[thread].at(moment)
        return own if own or thread == main or thread in aside else _backward(threads[main], moment)

    aside = set()  # threads whose stages no step waits for
    for thread in [thread for thread in threads if thread != main]:
        outermost = [span for span in threads[thread].spans if span.above is None]
        above = [_backward(threads[main], span.start) for span in outermost]
        if not all(b and span.end <= b.end for span, b in zip(outermost, above, strict=True)):
            aside.add(thread)
            continue
        for span, backward in zip(outermost, above, strict=True):
            span.above = backward
            backward.inside += span.end - span.start

    rows: dict[str, Row] = {}
    behind: dict[str, Row] = {}
    ms = 1e-3 / len(steps)
    top = 0.0
    for span in spans:
        *_, root = span.chain()
        table = rows if root.thread == main else behind
        row, lasted = table.setdefault(span.name, Row(span.name)), span.end - span.start
        row.calls += 1 / len(steps)
        row.host_own_ms += max(0.0, lasted - span.inside) * ms
        if all(s.name != span.name for s in span.chain() if s is not span):
            row.host_ms += lasted * ms
        top += lasted * (span.above is None and span.thread == main)
    launches = {e["args"]["correlation"]: e for e in events
                if e.get("cat") in LAUNCHES and "correlation" in e.get("args", {})}  # fmt: skip
    rest = Row(REST, 1.0, *[max(0.0, end - begin - top) * ms] * 2)
    on_device = [e for e in events if e.get("cat") in ON_DEVICE]
    for event in on_device:
        launch = launches.get(event.get("args", {}).get("correlation"))
        if launch is None or not begin <= launch["ts"] < end:
            continue
        span = around(launch["ts"], (launch["pid"], launch["tid"]))
        if span is None:
            rest.device_ms += event["dur"] * ms
            rest.device_own_ms += event["dur"] * ms
            continue
        *_, root = span.chain()
        table = rows if root.thread == main else behind
        table[span.name].device_own_ms += event["dur"] * ms
        for name in {s.name for s in span.chain()}:
            table[name].device_ms += event["dur"] * ms
    gpu = bool(on_device) or any(e.get("cat") in LAUNCHES for e in events)
    busy = _covered([(e["ts"], e["ts"] + e["dur"]) for e in on_device], begin, end) / (end - begin) if gpu else None
    return Table(len(steps), (end - begin) * ms, busy, [*(row for _, row in in_order(rows)), rest],
                 [row for _, row in in_order(behind)])  # fmt: skip


def _covered(intervals: list[tuple[float, float]], begin: float, end: float) -> float:
    """Length of the union of intervals within [begin, end]."""
    total, reached = 0.0, begin
    for start, stop in sorted(intervals):
        total += max(0.0, min(stop, end) - max(start, reached))
        reached = max(reached, min(stop, end))
    return total


def operation_table(trace: dict) -> str:
    """The operations of the host by their own time, and the device's kernels by their time, a step."""
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X"]
    steps, begin, end = _steps(events)
    inside = [e for e in events if begin <= e["ts"] < end]
    lasted, calls = Counter(), Counter()
    for thread in _nested([_span(e, e["name"]) for e in inside if e.get("cat") == "cpu_op"]).values():
        for span in thread.spans:
            lasted[span.name] += max(0.0, span.end - span.start - span.inside)
            calls[span.name] += 1
    text = _top("operations of the host, own time", lasted, calls, len(steps))
    lasted, calls = Counter(), Counter()
    for event in (e for e in inside if e.get("cat") in ON_DEVICE):
        lasted[event["name"]] += event["dur"]
        calls[event["name"]] += 1
    return text + ("\n" + _top("kernels and copies of the device", lasted, calls, len(steps)) if lasted else "")


def _top(what: str, lasted: Counter, calls: Counter, steps: int) -> str:
    whole = sum(lasted.values()) or 1.0
    lines = [f"{what}, {min(SHOWN, len(lasted))} of {len(lasted)}", f"{'ms a step':>11}{'share':>9}{'calls':>9}  name"]
    for name, us in lasted.most_common(SHOWN):
        short = name if len(name) <= 100 else f"{name[:97]}..."
        lines.append(f"{us * 1e-3 / steps:>11.3f}{us / whole * 100:>7.1f} %{calls[name] / steps:>9.4g}  {short}")
    return "\n".join(lines) + "\n"
