"""Every result carries the device, the date and the commit it was measured on."""

from __future__ import annotations

import subprocess

import pytest
import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    machine_info["commit"] = commit.stdout.strip() or "unknown"


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
