"""One training step of preset xs at 64 x 64: masked against unmasked, float32 against bf16."""

from __future__ import annotations

import pytest
import torch
from conftest import timed

from phmdiff_fast.config import build_config
from phmdiff_fast.device import autocast
from phmdiff_fast.phmdiff import PHMDiff


@pytest.mark.benchmark(group="training step, xs, 64 x 64")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "unmasked"])
def test_step(benchmark, device, masked, dtype):
    config = build_config("xs")
    torch.manual_seed(0)
    model = PHMDiff(config.model, 1).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = config.train.batch_size
    target = torch.rand(batch, 1, 64, 64, device=device) * 2 - 1
    ids = torch.arange(batch, device=device)

    def step():
        with autocast(device, dtype):
            terms = model.loss(target, -target, ids, (0, 1), config.train, masked=masked)
        optimizer.zero_grad(set_to_none=True)
        terms.total.backward()
        optimizer.step()
        return terms

    assert torch.isfinite(step().total)
    timed(benchmark, device, step)
    benchmark.extra_info["images_per_s"] = batch / benchmark.stats.stats.median
