"""A profile of a few steps of a training: a trace, tables of time per stage and per operation, a picture.

FOLDER/ trace.json.gz   every operation and kernel, for Perfetto or chrome://tracing
        stages.txt  stages.json  stages.png   time per stage (``stages.py``)
        operations.txt   the operations and kernels that take longest

The tables are made from the trace (``trace_tables``).
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from .curves import BLUE, FAINT, INK, ORANGE
from .files import whole_file, write_json, writing
from .progress import say
from .stages import ProfilerRanges, listening, nvtx_if_asked, nvtx_ranges
from .trace_tables import Table, operation_table, stage_table


def stage_picture(path: str | Path, table: Table) -> Path:
    """A bar a stage, host and device own milliseconds a step, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    gpu = table.device_busy is not None
    bars = [("host", [r.host_own_ms for r in table.rows], BLUE)]
    bars += [("device", [r.device_own_ms for r in table.rows], ORANGE)] if gpu else []
    figure = Figure(figsize=(6.4, 1.1 + 0.3 * len(table.rows) * (1 + 0.3 * gpu)), layout="constrained")
    canvas, axes, high = FigureCanvasAgg(figure), figure.add_subplot(), 0.8 / len(bars)
    widest = max(max(values) for _, values, _ in bars) or 1.0
    for i, (name, values, colour) in enumerate(bars):
        places = [n + (i - (len(bars) - 1) / 2) * high for n in range(len(values))]
        axes.barh(places, values, height=high * 0.92, color=colour, label=name)
        for place, value in zip(places, values, strict=True):
            axes.text(value + 0.008 * widest, place, f"{value:.3g}", va="center", size=7.5, color=INK)
    axes.set_yticks(range(len(table.rows)), [row.stage for row in table.rows])
    axes.invert_yaxis()
    axes.set_xlim(0, widest * 1.12)
    axes.set_xlabel(f"milliseconds a step, without the stages inside (step: {table.step_ms:.3g} ms)", size=9, color=INK)
    axes.tick_params(labelsize=8.5, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.grid(True, axis="x", color="#e4e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
    if gpu:
        axes.legend(frameon=False, fontsize=8.5)
    png = io.BytesIO()
    canvas.print_png(png)
    with whole_file(path) as file:
        file.write(png.getvalue())
    return Path(path)


def write_tables(folder: str | Path, trace: dict) -> Table:
    """stages.txt, stages.json, stages.png and operations.txt of a trace."""
    folder, table = Path(folder), stage_table(trace)
    for name, text in (("stages.txt", table.text()), ("operations.txt", operation_table(trace))):
        with whole_file(folder / name) as file:
            file.write(text.encode())
    shares = [{**asdict(row), "share": table.share(row)} for row in table.rows]
    write_json(folder / "stages.json", {**asdict(table), "rows": shares})
    stage_picture(folder / "stages.png", table)
    return table


# --- recording ----------------------------------------------------------------------------------------


class Profile:
    """Records ``steps`` steps from ``first_step`` on and writes what this module is about into ``folder``.

        with Profile(run / "profile", first_step=20, device=device) as profile:
            for step in ...:
                profile.at(step)
                ...

    The step before is the profiler's own warm-up. Recording makes steps slower, on the host most of all:
    shares are to be trusted more than milliseconds. Nothing is written if the block ends by an exception.
    Raises PhmdiffError OUTPUT_WRITE (exit 74) if the folder cannot be written.
    """

    def __init__(self, folder: str | Path, first_step: int, *, steps: int = 5, device: torch.device):
        self.folder, self.first_step, self.steps, self.device = Path(folder), first_step, steps, device
        self.table: Table | None = None  # once it is written
        self._profiler = None
        self._begun = 0  # steps begun since the profiler was started, its warm-up included
        self._listening = contextlib.ExitStack()

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, kind, *_) -> None:
        if self._profiler is not None:
            self._finish(write=kind is None)
        elif self.table is None and kind is None:
            say(f"no profile: the training ended before step {self.first_step}, where it would have begun")

    def at(self, step: int) -> None:
        """Before every step, with its number."""
        if self.table is not None or (self._profiler is None and step < self.first_step - 1):
            return
        if self._profiler is None:
            self._start()
        else:
            self._wait()
            self._profiler.step()
        self._begun += 1
        if self._begun > 1 + self.steps:
            self._finish(write=True)

    def _wait(self) -> None:
        # Only around what is recorded, so that its time holds all of its kernels and none from before.
        if self.device.type == "cuda" and self._begun in (1, 1 + self.steps):
            torch.cuda.synchronize(self.device)

    def _start(self) -> None:
        from torch.profiler import ProfilerActivity, profile, schedule

        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # below it says on stderr when it starts and stops
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
        self._profiler = profile(
            activities=activities, schedule=schedule(wait=0, warmup=1, active=self.steps, repeat=1)
        )
        self._listening.enter_context(listening(ProfilerRanges(), None if nvtx_if_asked() else nvtx_ranges()))
        self._profiler.start()

    def _finish(self, write: bool) -> None:
        profiler, self._profiler = self._profiler, None
        self._listening.close()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        profiler.stop()
        if not write:
            return
        if self._begun < 2:
            return say("no profile: the training ended during its warm-up step")
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory() as scratch:
                profiler.export_chrome_trace(str(Path(scratch) / "trace.json"))
                raw = (Path(scratch) / "trace.json").read_bytes()
        with whole_file(self.folder / "trace.json.gz") as file:
            file.write(gzip.compress(raw, 6, mtime=0))
        self.table = write_tables(self.folder, json.loads(raw))
        say(f"profile in {self.folder} (trace.json.gz opens in ui.perfetto.dev); {self.table.text()}")
