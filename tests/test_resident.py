"""All training slices on one device: the batches of the loader, without reading."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from phmdiff_fast import loader as loader_room
from phmdiff_fast.augment import manner
from phmdiff_fast.baselines import training_batch
from phmdiff_fast.cache import SliceCache
from phmdiff_fast.config import build_config
from phmdiff_fast.data import discover
from phmdiff_fast.errors import MEMORY, PhmdiffError
from phmdiff_fast.loader import Loader, Resident

CPU = torch.device("cpu")
ROWS = np.array([40, 7, 300, 8, 9])  # of people anywhere in a cache


class Numbers:
    """A cache whose slices are their numbers; counts what is read."""

    def __init__(self):
        self.read = 0

    def batch(self, rows, *, fine=False):
        self.read += len(rows)
        images = np.broadcast_to(np.asarray(rows, np.float32)[:, None, None, None], (len(rows), 2, 3, 3)).copy()
        return {"sources": images, "target": -images[:, :1], "foreground": images[:, :1] > 8}


def rows_at(step):
    return ROWS[[step % 5, (3 * step + 1) % 5]]


def test_its_batches_are_those_of_the_loader(monkeypatch):
    monkeypatch.setattr(loader_room, "RESIDENT_ROWS", 2)  # the last piece is shorter
    cache = Numbers()
    with Resident(cache, ROWS, rows_at, CPU) as resident, Loader(Numbers(), rows_at, first=0) as loader:
        assert cache.read == len(ROWS)
        for step in range(7):
            for here, there in zip(resident.batch(step), loader.batch(step), strict=True):
                assert here.dtype == there.dtype
                assert torch.equal(here, there)
        assert cache.read == len(ROWS)  # nothing is read again


def test_a_rival_s_batch_is_the_same_from_there(tmp_path, tiny_cohort):
    config = build_config("xs", {"data": {"image_size": 32}, "train": {"batch_size": 3}})
    cache, _ = SliceCache.ensure(tmp_path, discover(tiny_cohort), ["p0", "p2"], config.data)
    rows = cache.rows_of("p2")
    given = (cache, rows, config.train, 5, CPU, manner(config.data))
    with Resident(cache, rows, None, CPU) as resident:
        for here, there in zip(training_batch(*given, resident), training_batch(*given), strict=True):
            assert torch.equal(here, there)


def test_what_does_not_fit_is_one_error_that_says_how_much(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.Tensor, "new_empty", full)
    with pytest.raises(PhmdiffError) as problem, Resident(Numbers(), ROWS, rows_at, CPU):
        pass
    assert problem.value.exit_code == MEMORY
    assert "5 training slices take 0.0 GiB" in str(problem.value)
    assert "--data-device cpu" in str(problem.value)
