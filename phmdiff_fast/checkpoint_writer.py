"""Checkpoints written beside a training: the state is copied, a thread writes the copy."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint
from .errors import PhmdiffError

NICE = 10  # a tenth of a processor that others want too


class Writer:
    """Writes checkpoints of one run (``checkpoint.save``) while the training goes on.

    folder, keep, rank, world, token, timeout : as ``checkpoint.save``
    written : told the step of every checkpoint that is whole and synced, from the thread

    The copies are kept from one checkpoint to the next (pinned, for a GPU's tensors), so a run holds its state
    once more in main memory; the training waits for the copying, and for the writing before if that still goes on.
    """

    def __init__(
        self, folder: Path, *, keep: int, rank: int = 0, world: int = 1, token: str = "", timeout: float = 300.0,
        written: Callable[[int], None] | None = None,
    ):  # fmt: skip
        self._how = dict(keep=keep, rank=rank, world=world, token=token, timeout=timeout, read_back=set())
        self._folder, self._rank, self._world, self._written = folder, rank, world, written
        self._copies: dict[tuple[str, str], Tensor] = {}
        self._done = threading.Event()  # a thread's join() that Ctrl-C breaks off takes it for ended
        self._done.set()
        self._problem: BaseException | None = None
        self._cancelled = threading.Event()

    def save(self, step: int, groups: checkpoint.Groups, facts: dict[str, Any]) -> None:
        """Copy the state and begin to write it. Raises what the writing before raised."""
        self.wait()
        mine = checkpoint.share(groups, self._rank, self._world)
        copied = {group: {name: self._copy(group, name, value) for name, value in tensors.items()}
                  for group, tensors in mine.items()}  # fmt: skip
        ready = None
        if any(value.is_cuda for tensors in mine.values() for value in tensors.values()):
            ready = torch.cuda.Event()
            ready.record()  # the copies are queued on the training's own stream, before the next step's changes

        def write() -> None:
            if sys.platform == "linux":  # where a thread has a priority of its own: the training's threads come first
                with contextlib.suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
            try:
                if ready is not None:
                    ready.synchronize()
                checkpoint.save(self._folder, step, copied, facts, cancelled=self._cancelled.is_set, **self._how)
                if self._written is not None:
                    self._written(step)
            except checkpoint.Cancelled:
                pass
            except BaseException as problem:  # told by the next call from the training
                self._problem = problem
            finally:
                self._done.set()

        self._done.clear()
        # A daemon: a process that is told to end at once does not wait for it; then nothing has got its name.
        threading.Thread(target=write, name="checkpoint", daemon=True).start()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind, problem, trace) -> None:
        """What is being written is finished, unless the training is to end at once."""
        if problem is None or isinstance(problem, PhmdiffError):
            try:
                self.wait()
            except PhmdiffError:
                if problem is None:
                    raise
        else:
            self.abandon()

    def _copy(self, group: str, name: str, value: Tensor) -> Tensor:
        held = self._copies.get((group, name))
        if held is None or held.shape != value.shape or held.dtype != value.dtype:
            held = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self._copies[group, name] = held
        return held.copy_(value.detach(), non_blocking=value.is_cuda)

    @property
    def problem(self) -> PhmdiffError | None:
        """Why a checkpoint could not be written, or None."""
        if self._problem is None or isinstance(self._problem, PhmdiffError):
            return self._problem
        raise self._problem

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being written."""
        return self._done.is_set()

    def wait(self) -> None:
        """Wait until nothing is being written. Raises what the writing raised."""
        self._done.wait()
        if (problem := self.problem) is not None:
            raise problem

    def abandon(self) -> None:
        """Call off what is being written; nothing half-written is left."""
        self._cancelled.set()
        self._done.wait()
