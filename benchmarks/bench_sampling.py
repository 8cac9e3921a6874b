"""Synthesis of a volume of 112 slices of 64 x 64 with preset xs, untrained, by variant and number of steps.

Quality beside speed, on a trained run: ``python -m benchmarks.sampling_table``, which also holds the variants.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import timed

from benchmarks.sampling_table import VARIANTS
from phmdiff_fast.background import batches, plain_batches
from phmdiff_fast.config import SampleConfig, build_config
from phmdiff_fast.device import autocast, pick_precision
from phmdiff_fast.engine import kept_on
from phmdiff_fast.phmdiff import PHMDiff

SLICES, SIDE = 112, 64


def head() -> tuple[torch.Tensor, np.ndarray]:
    """(sources (Z, 1, S, S), foreground (Z, S, S)): an ellipsoid as large as a brain in its scan."""
    z, y, x = np.mgrid[-1 : 1 : SLICES * 1j, -1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    inside = (z / 0.85) ** 2 + (y / 0.8) ** 2 + (x / 0.65) ** 2 < 1
    return torch.from_numpy(np.where(inside, np.cos(5 * y + 3 * x), -1).astype(np.float32))[:, None], inside


@pytest.mark.benchmark(group="synthesis of 112 slices, xs, 64 x 64")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("steps", [1, 4])
def test_volume(benchmark, device, steps, variant):
    torch.manual_seed(0)
    config = build_config("xs").model
    model = PHMDiff(config, 1).to(device).eval()
    kind, over = VARIANTS[variant]
    settings = SampleConfig(steps=steps).model_copy(update=over)
    engine, (sources, inside) = kind(model, settings), head()
    parts = plain_batches(SLICES, settings.batch_size)
    if engine.skips:
        parts = batches(inside, settings.batch_size, patch=config.patch, levels=len(config.levels))
    sources = sources.to(device)

    def run():
        made = torch.empty(SLICES, 1, SIDE, SIDE)
        for part in parts:
            kept, rows = kept_on(device, part.kept), torch.from_numpy(part.rows)
            with autocast(device, pick_precision("auto", device)):
                made[rows] = engine(sources[rows.to(device)], rows.to(device), kept).levels[0].float().cpu()
        return made

    assert torch.isfinite(run()).all()
    timed(benchmark, device, run, rounds=3)
    benchmark.extra_info["slices_per_s"] = SLICES / benchmark.stats.stats.median
