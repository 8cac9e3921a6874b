"""The loader's workers: row R4 of the fault matrix."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
import torch
from cells import bits, command, newest

from phmdiff_fast.files import locked
from phmdiff_fast.loader import Loader


class Numbers:
    """A cache whose slices are their numbers."""

    def batch(self, rows, *, fine=False):
        images = np.broadcast_to(np.asarray(rows, np.float32)[:, None, None, None], (len(rows), 1, 2, 2)).copy()
        return {"sources": images, "target": -images, "foreground": images > 0}


def rows_at(step):
    return np.array([step, 10 * step])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_any_number_of_workers_gives_the_steps_in_order_and_back(workers):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    with Loader(Numbers(), rows_at, first=4, workers=workers, timeout=20) as loader:
        for step in (4, 5, 6, 7, 8, 5, 6, 20):
            sources, target, inside = loader.batch(step)
            assert sources[:, 0, 0, 0].tolist() == [step, 10 * step]
            assert torch.equal(target, -sources)
            assert inside.dtype == torch.bool
    assert torch.equal(torch.get_rng_state(), before)  # iter(DataLoader) would draw from it


def test_no_worker_outlives_the_loader():
    with Loader(Numbers(), rows_at, first=0, workers=2, timeout=20) as loader:
        loader.batch(0)
        processes = loader._processes
        assert len(processes) == 2
    assert not any(process.is_alive() for process in processes)


@pytest.mark.parametrize(("what", "words"), [("kill", "was killed"), ("hang", "has given nothing"),
                                             ("raise", "division by zero")])  # fmt: skip
def test_r4_a_worker_that_is_lost_is_named_with_its_slices(zygote, tiny_cohort, tmp_path, what, words):
    arguments = [*command(tiny_cohort, tmp_path / "run", workers=2), "--set", "train.worker_timeout=3"]
    begun = time.monotonic()
    ended = zygote.run(arguments, hook=f"plain;worker:{what},5")
    assert ended.status == 3, ended.err
    assert time.monotonic() - begun < 30
    line = ended.err.strip()
    assert "\n" not in line
    assert words in line
    assert re.search(r"pids? \d+", line)
    assert re.search(r"slices \[\d+(, \d+){3}\]", line)
    found = newest(tmp_path / "run")
    assert found is None or found.step <= 5  # workers are some steps ahead
    assert zygote.run(command(tiny_cohort, tmp_path / "run"), hook="plain").status == 0  # with no workers at all
    zygote.run(command(tiny_cohort, tmp_path / "through"), hook="plain")
    assert bits(tmp_path / "run") == bits(tmp_path / "through")


def test_c11_workers_do_not_keep_the_lock_of_a_training_that_was_killed(zygote, tiny_cohort, tmp_path):
    """They live on for some seconds, until they notice; the next start comes at once."""
    from zygote import wait_for

    run = tmp_path / "run"
    child = zygote.start(command(tiny_cohort, run, steps=1_000_000, workers=2), hook="plain")
    wait_for(lambda: newest(run) is not None)
    child.kill()
    child.wait()
    with locked(run):
        pass


def test_c4_a_signal_to_the_whole_group_reaches_workers_too(zygote, tiny_cohort, tmp_path):
    """As clusters and Ctrl-C send it; the workers leave it to the training."""
    import os
    import signal

    from zygote import wait_for

    child = zygote.start(command(tiny_cohort, tmp_path / "run", steps=1_000_000, workers=2), hook="plain")
    wait_for(lambda: (tmp_path / "run" / "log.jsonl").exists() and newest(tmp_path / "run") is not None)
    os.killpg(child.pid, signal.SIGTERM)
    assert child.wait() == 143, child.err
    assert "Traceback" not in child.err
    assert "stopped at step" in child.err
