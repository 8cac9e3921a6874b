"""Synthesis of 32 slices of 64 x 64 with preset xs, by number of steps."""

from __future__ import annotations

import pytest
import torch
from conftest import timed

from phmdiff_fast.config import build_config
from phmdiff_fast.device import autocast, pick_precision
from phmdiff_fast.phmdiff import PHMDiff


@pytest.mark.benchmark(group="synthesis of 32 slices, xs, 64 x 64")
@pytest.mark.parametrize("steps", [1, 5])
def test_translate(benchmark, device, steps):
    torch.manual_seed(0)
    model = PHMDiff(build_config("xs").model, 1).to(device).eval()
    sources, ids = torch.rand(32, 1, 64, 64, device=device) * 2 - 1, torch.arange(32, device=device)

    def run():
        with autocast(device, pick_precision("auto", device)):
            return model.translate(sources, ids, steps=steps)[0]

    assert torch.isfinite(run()).all()
    timed(benchmark, device, run, rounds=5)
    benchmark.extra_info["slices_per_s"] = 32 / benchmark.stats.stats.median
