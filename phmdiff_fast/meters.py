"""Figures of a training while it runs: images, tokens and FLOP a second, memory, waiting for data, time per stage.

The meter is told of every step what it was (host numbers, no tensor); the window since the last record makes
a record of the log and a line for the bar, and the whole run, its first steps left out, a summary. On a GPU ask
for a record only where the loss has just been read, so that the steps counted are done.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from .flops import Peak
from .stages import Clock, Spent, stage

WARM_UP = 10  # steps left out of the summary: libraries load, code compiles, caches fill
WAIT_GOAL = 0.02  # of the time of a step, waiting for data


@dataclass
class _Totals:
    """What was done until a moment; of two of them the difference counts."""

    steps: int = 0
    images: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0
    waited: float = 0.0  # host seconds
    paused: float = 0.0
    moment: float = 0.0
    stages: dict[str, Spent] | None = None


@dataclass
class Window:
    """The steps between two moments. seconds and stages: without pauses."""

    steps: int
    images: float
    tokens: float
    flops: float
    seconds: float
    waited: float
    stages: dict[str, Spent]


class Meter:
    """Counts steps and says how fast they are.

    device : whose memory is looked at; peak : of the device, for the share (``flops.best_peak``), or None;
    clock : a ``stages.Clock`` that listens, for the time per stage, or None; world : processes that train
    together, each with the same share of a batch: images and tokens are of all, FLOP/s of one device.
    """

    def __init__(
        self, device: torch.device, *, peak: Peak | None = None, clock: Clock | None = None, world: int = 1,
        warm_up: int = WARM_UP, now: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        self.device, self.peak, self.clock, self.world = device, peak, clock, world
        self._warm_up, self._now = warm_up, now
        self._total = _Totals()
        self._pauses: dict[str, None] = {}  # names of them, in order
        self._begun = self._last = self._base = self._mark()

    def step(self, images: int, tokens: int, flops: float, waited: float = 0.0) -> None:
        """One step of this process is launched: its images, tokens and FLOP (``flops.step_flops(...).training``),
        and the seconds the host waited for its data."""
        total = self._total
        total.steps += 1
        total.images += images
        total.tokens += tokens
        total.flops += flops
        total.waited += waited

    @contextlib.contextmanager
    def paused(self, name: str | None = None) -> Iterator[None]:
        """Around what is no training (validation, pictures, a checkpoint, a profile): rates do not count its time.
        With a name it is a stage too, which the table of stages leaves out. Between steps, outside other stages."""
        if name is not None:
            self._pauses[name] = None
        begun = self._now()
        try:
            with contextlib.nullcontext() if name is None else stage(name):
                yield
        finally:
            self._total.paused += self._now() - begun

    def _mark(self) -> _Totals:
        stages = self.clock.read() if self.clock else {}
        return replace(self._total, moment=self._now(), stages=stages)

    def _between(self, first: _Totals, last: _Totals) -> Window:
        paused = last.paused - first.paused
        stages = {}
        for name, spent in last.stages.items():
            before = first.stages.get(name, Spent(device_s=None if spent.device_s is None else 0.0))
            device_s = None if spent.device_s is None else spent.device_s - before.device_s
            if name not in self._pauses and (calls := spent.calls - before.calls):
                stages[name] = Spent(calls, spent.host_s - before.host_s, device_s)
        # The host may run ahead of a GPU: then only what the GPU stood still for is lost.
        data = stages.get("data")
        exposed = data is not None and data.device_s is not None
        return Window(
            last.steps - first.steps, last.images - first.images, last.tokens - first.tokens,
            last.flops - first.flops, max(0.0, last.moment - first.moment - paused),
            data.device_s if exposed else last.waited - first.waited, stages,
        )  # fmt: skip

    def record(self) -> dict:
        """Figures since the last call, for the log: see ``figures``."""
        mark = self._mark()
        window, self._last = self._between(self._last, mark), mark
        if mark.steps <= self._warm_up:
            self._base = mark
        return self.figures(window)

    def window(self) -> Window:
        """From the end of the warm-up until now; from the beginning where nothing came after it."""
        mark = self._mark()
        return self._between(self._base if mark.steps > self._base.steps else self._begun, mark)

    def figures(self, window: Window) -> dict:
        """images_per_s and tokens_per_s of all processes; tflop_per_s of one device and its share_of_peak;
        peak_bytes of memory since the process began; data_wait_share, of the time of the steps; stage_s,
        seconds a step of each stage. None where it is not known."""

        def rate(amount: float) -> float | None:
            return amount / window.seconds if window.seconds > 0 else None

        flop_per_s = rate(window.flops)
        known = self.peak is not None and self.peak.flop_per_s and flop_per_s is not None
        return {
            "images_per_s": _rounded(rate(window.images * self.world)),
            "tokens_per_s": _rounded(rate(window.tokens * self.world)),
            "tflop_per_s": _rounded(None if flop_per_s is None else flop_per_s * 1e-12),
            "share_of_peak": _rounded(flop_per_s / self.peak.flop_per_s) if known else None,
            "peak_bytes": memory_peak(self.device),
            "data_wait_share": _rounded(rate(window.waited)),
            "stage_s": {name: _rounded(s.seconds / max(1, window.steps)) for name, s in window.stages.items()},
        }

    def summary(self) -> dict:
        """``figures`` of the whole run without its warm-up, with what was counted."""
        window, total = self.window(), self._total
        return {
            "steps": total.steps,
            "steps_left_out": total.steps - window.steps,
            "images": int(total.images * self.world),
            "tokens": int(total.tokens * self.world),
            "pflop": _rounded(total.flops * self.world * 1e-15),
            "paused_s": _rounded(total.paused),
            "peak_of": self.peak.source if self.peak else None,
            **self.figures(window),
        }

    def summary_text(self) -> str:
        """The summary for people: rates, memory, waiting for data with its goal, and a table of stages."""
        window, found = self.window(), self.summary()
        left_out = f", the first {found['steps_left_out']} not counted" if found["steps_left_out"] else ""
        lines = [f"{window.steps:,} steps in {window.seconds:.1f} s{left_out}: " + ", ".join(rates(found))]
        if found["share_of_peak"] is not None:
            lines.append(f"peak: {self.peak.source}")
        gpu = self.device.type == "cuda"
        if found["peak_bytes"] is not None:
            of = "allocated on the GPU" if gpu else "of the process"
            lines.append(f"memory: at most {human_bytes(found['peak_bytes'])} {of}")
        if found["data_wait_share"] is not None:
            lines.append(waiting(found["data_wait_share"], gpu))
        if found["paused_s"]:
            names = f" ({', '.join(self._pauses)})" if self._pauses else ""
            lines.append(f"beside the steps, not counted: {found['paused_s']:.1f} s{names}")
        if window.stages:
            lines += ["", *stage_table(window)]
        return "\n".join(lines)


def rates(found: dict) -> list[str]:
    """["2,310 images/s", "1.2 M tokens/s", "312 TFLOP/s (39 % of peak)"] of ``figures``."""
    parts = []
    if found["images_per_s"] is not None:
        parts += [f"{_number(found['images_per_s'])} images/s", f"{_number(found['tokens_per_s'])} tokens/s"]
    if found["tflop_per_s"]:
        share = found["share_of_peak"]
        parts.append(_flops(found["tflop_per_s"]) + ("" if share is None else f" ({_percent(share)} of peak)"))
    return parts


def line(step: int, found: dict, loss: float | None = None) -> str:
    """One line for the bar: "step 120, 2,310 images/s, ..., 18.2 GiB, data 0.4 %, loss 0.0123"."""
    parts = [f"step {step}", *rates(found)]
    if found["peak_bytes"] is not None:
        parts.append(human_bytes(found["peak_bytes"]))
    if found["data_wait_share"] is not None:
        parts.append(f"data {_percent(found['data_wait_share'])}")
    if loss is not None:
        parts.append(f"loss {loss:.4f}")
    return ", ".join(parts)


def waiting(share: float, gpu: bool = False) -> str:
    """How much of the steps' time went into waiting for data, and what to do where it is above the goal."""
    said = f"waiting for data: {_percent(share)} of the time (goal: at most {WAIT_GOAL * 100:.0f} %)"
    if share <= WAIT_GOAL:
        return said
    return f"{said}: try --workers 2" + (" or --data-device cuda" if gpu else "")


def stage_table(window: Window) -> list[str]:
    """Lines: ms a step and share of the time, a stage each, and what no stage names."""
    on_device = any(spent.device_s is not None for spent in window.stages.values())
    whole = window.seconds
    shown = [(name, spent.seconds, spent.host_s) for name, spent in window.stages.items()]
    shown.append(("no stage", max(0.0, whole - sum(s for _, s, _ in shown)), None))
    lines = [f"{'stage':<12}{'ms a step':>12}{'share':>9}" + (f"{'host ms':>12}" if on_device else "")]
    for name, seconds, host in shown:
        share = seconds / whole if whole else 0.0
        host_ms = f"{host * 1e3 / max(1, window.steps):>12.2f}" if on_device and host is not None else ""
        lines.append(f"{name:<12}{seconds * 1e3 / max(1, window.steps):>12.2f}{share * 100:>7.1f} %{host_ms}")
    return lines


def memory_peak(device: torch.device) -> int | None:
    """Bytes at most so far: allocated by torch on a GPU, else resident of this process; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    import sys

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # kilobytes elsewhere


def human_bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _rounded(value: float | None) -> float | None:
    """Five significant digits: a log is read by people too."""
    return None if value is None else float(f"{value:.5g}")


def _number(value: float) -> str:
    """2,310; 1.2 M; 7.31."""
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.1f} {unit}" if value < 100 * size else f"{value / size:,.0f} {unit}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _flops(tera: float) -> str:
    if tera >= 1:
        return f"{tera:.0f} TFLOP/s" if tera >= 100 else f"{tera:.3g} TFLOP/s"
    return f"{tera * 1e3:.3g} GFLOP/s"


def _percent(share: float) -> str:
    return f"{share * 100:.0f} %" if share >= 0.1 else f"{share * 100:.1f} %"
