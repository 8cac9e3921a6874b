"""Batches of a training, in order of its steps: read here, ahead by worker processes, or all beforehand to a GPU.

What a step sees is a function of the step alone (``rows_at``), so any number of workers gives the same batches
and nothing of this has to be kept in a checkpoint.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .cache import SliceCache
from .errors import DATA, MEMORY, PhmdiffError
from .guards import is_out_of_memory
from .progress import bar

NAMES = ("sources", "target", "foreground")


class _Steps(Sampler):
    def __init__(self, first: int):
        self.first = first

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.first)


class _Batches(Dataset):
    """Step -> its batch, or what is wrong with it: an exception would come out of a worker with a traceback."""

    def __init__(self, cache: SliceCache, rows_at: Callable[[int], np.ndarray]):
        self.cache, self.rows_at = cache, rows_at

    def __getitem__(self, step: int) -> dict:
        try:
            return self.cache.batch(self.rows_at(step), fine=True)
        except PhmdiffError as problem:
            facts = dict(code=problem.code, what=problem.what, cure=problem.cure, file=problem.file,
                         exit_code=problem.exit_code)  # fmt: skip
        except Exception as problem:
            what = f"cannot be read ({type(problem).__name__}: {problem})"
            facts = dict(code="LOADER", what=what, cure="look at these slices", exit_code=DATA, file=None)
        return {"problem": facts, "pid": os.getpid()}


def _in_worker(number: int) -> None:
    # Ctrl-C and a cluster's SIGTERM reach every process; only the training decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


class Loader:
    """``with Loader(...) as loader: sources, target, foreground = loader.batch(step)``, steps ascending.

    cache, rows_at : ``rows_at(step)`` (B,) int64 are the rows of ``cache`` that a step sees
    first : the first step asked for
    workers : processes that read ahead; 0 reads when asked
    timeout : seconds until a worker that gives nothing counts as hung

    Raises PhmdiffError (exit 3): what ``SliceCache.batch`` raises, with the rows; LOADER_WORKER naming a worker
    that was killed or hangs, its pid and the rows that were waited for.
    """

    def __init__(self, cache: SliceCache, rows_at, *, first: int, workers: int = 0, timeout: float = 60.0):
        self._data, self._workers, self._timeout = _Batches(cache, rows_at), workers, timeout
        self._next, self._iterator, self._processes = first, None, []

    def __enter__(self) -> Loader:
        self._begin(self._next)
        return self

    def _begin(self, step: int) -> None:
        self._end()
        self._next = step
        if not self._workers:
            return
        before = set(multiprocessing.active_children())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This DataLoader will create")  # more than processors: as asked
            loader = DataLoader(
                self._data, batch_size=None, sampler=_Steps(step), num_workers=self._workers, timeout=self._timeout,
                worker_init_fn=_in_worker, multiprocessing_context="fork",  # spawn would send the cache through a pipe
                generator=torch.Generator().manual_seed(0),  # else it draws from the global one
            )  # fmt: skip
            self._iterator = iter(loader)
        self._processes = sorted(set(multiprocessing.active_children()) - before, key=lambda p: p.pid)

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(sources (B, Cs, F, F), target (B, 1, F, F), foreground (B, 1, F, F) bool) of a step, as in the cache."""
        if step != self._next:
            self._begin(step)  # after a step back
        if self._iterator is None:
            batch = self._data[step]
        else:
            asked = time.monotonic()
            try:
                batch = next(self._iterator)
            except RuntimeError as problem:
                raise self._lost(problem, time.monotonic() - asked) from None
        if "problem" in batch:
            facts, pid = batch["problem"], int(batch["pid"])
            who = f"; worker with pid {pid}" if self._workers else ""
            facts["what"] += f" (slices {self._rows()}{who})"
            raise PhmdiffError(facts.pop("code"), facts.pop("what"), facts.pop("cure"), **facts)
        self._next += 1
        return tuple(torch.as_tensor(batch[name]) for name in NAMES)

    def _rows(self) -> list[int]:
        return self._data.rows_at(self._next).tolist()

    def _lost(self, problem: RuntimeError, waited: float) -> PhmdiffError:
        """What torch says of a worker, as an error with an address."""
        gone = re.search(r"pid\(?s?\)? (\d+(?:, \d+)*)", str(problem))
        if gone:
            what = f"the loader's worker with pid {gone[1]} was killed"
        else:
            pids = ", ".join(str(process.pid) for process in self._processes)
            what = f"a loader's worker (one of pids {pids}) has given nothing for {waited:.0f} s"
        return PhmdiffError("LOADER_WORKER", f"{what}, while slices {self._rows()} were waited for",
                            "the same command goes on from the last checkpoint; --workers 0 reads without workers",
                            exit_code=DATA)  # fmt: skip

    def _end(self) -> None:
        # Killed: they hold nothing, ignore SIGTERM, and one that hangs would be waited for. Torch's handler of
        # SIGCHLD would take that for a failure.
        in_main = threading.current_thread() is threading.main_thread()
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if in_main and self._processes else None
        try:
            for process in self._processes:
                process.kill()
            for process in self._processes:
                process.join()
            self._iterator, self._processes = None, []
        finally:
            if handler is not None:
                signal.signal(signal.SIGCHLD, handler)

    def __exit__(self, kind, problem, trace) -> None:
        self._end()
        if isinstance(problem, RuntimeError) and "DataLoader worker" in str(problem):  # torch tells it from a signal
            raise self._lost(problem, 0.0) from None


RESIDENT_ROWS = 256  # read at a time


class Resident:
    """All training slices in the memory of a device (``train.data_device``); batches are picked there.

    cache, rows : (n,) int64 of it that are trained on; rows_at : as of ``Loader``, None where ``pick`` alone is asked
    Takes n (Cs + 1) F F floats and n F F bytes. Raises OUT_OF_MEMORY (exit 6) where they do not fit.
    """

    def __init__(self, cache: SliceCache, rows: np.ndarray, rows_at, device: torch.device, *, progress: bool = False):
        self._cache, self._rows, self._rows_at, self._device, self._progress = cache, rows, rows_at, device, progress
        self._place = {int(row): n for n, row in enumerate(rows)}
        self._parts: list[torch.Tensor] = []

    def __enter__(self) -> Resident:
        n = len(self._rows)
        with bar(n, f"slices to {self._device.type}", self._progress) as meter:
            for at in range(0, n, RESIDENT_ROWS):
                batch = self._cache.batch(self._rows[at : at + RESIDENT_ROWS], fine=True)
                parts = [torch.as_tensor(batch[name]) for name in NAMES]
                try:
                    self._parts = self._parts or [p.new_empty(n, *p.shape[1:], device=self._device) for p in parts]
                except Exception as problem:
                    if not is_out_of_memory(problem):
                        raise
                    size = sum(p[0].numel() * p.element_size() for p in parts) * n / 2**30
                    what = f"{n} training slices take {size:.1f} GiB, more than is free on {self._device}"
                    raise PhmdiffError("OUT_OF_MEMORY", what, "use --data-device cpu", exit_code=MEMORY) from None
                for whole, part in zip(self._parts, parts, strict=True):
                    whole[at : at + len(part)] = part
                meter.update(len(parts[0]))
        return self

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As ``Loader.batch``, on the device."""
        return self.pick(self._rows_at(step))

    def pick(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What ``batch`` gives of these rows (B,)."""
        places = torch.tensor([self._place[int(row)] for row in rows])
        if self._device.type == "cuda":
            places = places.pin_memory().to(self._device, non_blocking=True)
        return tuple(part.index_select(0, places) for part in self._parts)

    def __exit__(self, *_) -> None:
        self._parts = []
