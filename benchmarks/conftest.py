"""Every result carries the device, the date and the commit it was measured on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # `from benchmarks.case import Case` under plain `pytest benchmarks/`
    sys.path.insert(0, str(ROOT))

from benchmarks import harness  # noqa: E402

DEVICES = ["cpu", *harness.CUDA]


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["gpu"] = torch.cuda.get_device_name() if harness.CUDA else None
    machine_info["commit"] = harness.commit()


def pytest_terminal_summary(terminalreporter, config):
    """GB/s and the share of the ceiling, which pytest-benchmark's own table has no columns for."""
    session = getattr(config, "_benchmarksession", None)
    rows = [b for b in getattr(session, "benchmarks", []) if "share" in b.extra_info and not b.has_error]
    if not rows:
        return
    terminalreporter.section("of the ceiling")
    for source in sorted({b.extra_info["ceiling"] for b in rows}):
        terminalreporter.write_line(source)
    form = "{:<60} {:<10} {:>11} {:>11} {:>9} {:>9} {:>8}"
    terminalreporter.write_line(form.format("case", "variant", "call us", "graph us", "GB/s", "TFLOP/s", "share"))
    before = None
    for b in rows:
        info = b.extra_info
        case = "" if b.group == before else b.group
        before = b.group
        graph = info.get("graph_s")
        terminalreporter.write_line(
            form.format(
                case[:60], info["variant"], f"{b.stats.median * 1e6:.1f}", f"{graph * 1e6:.1f}" if graph else "-",
                f"{info['gb_per_s']:.1f}", f"{info['tflop_per_s']:.2f}" if "tflop_per_s" in info else "-",
                f"{info['share']:.0%}{'*' if info['cached'] else ' '}",
            )
        )  # fmt: skip
    terminalreporter.write_line("* less than 256 MiB moved: caches take part and the share may exceed 100 %")


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    return torch.device(request.param)


def timed(benchmark, device: torch.device, run, *, rounds: int = 10) -> None:
    """Time ``run()`` to its end on the device, after a warm-up."""

    def whole():
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(whole, warmup_rounds=3, rounds=rounds)
