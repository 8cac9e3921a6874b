"""Named stages of a step, for whoever listens: nsys, torch.profiler, a clock. Without a listener they cost nothing.

    with stage("encoder"):
        ...

Names in use, in the order of a step: ``STAGES``; others may be given. Inside code that torch.compile traces a
stage is nothing at all, so it never breaks a graph and is not seen by listeners: wrap the compiled call.
A replayed CUDA graph runs no Python, so only what is around the replay is seen ("replay"). The backward of a
stage cannot be wrapped: "backward" is one.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.compiler import is_dynamo_compiling

STAGES = ("data", "augment", "teacher", "levels", "stem", "modulations", "embed", "encoder", "decoder", "head", "loss",
          "mmd", "backward", "all-reduce", "update", "ema", "replay", "look", "checkpoint")  # fmt: skip
PREFIX = "stage: "  # of a stage's range in a torch.profiler trace
DOMAIN = "phmdiff-fast"  # of NVTX ranges made by the package nvtx
MOST_UNREAD = 4096  # pairs of CUDA events of a clock that nobody reads


class Listener(Protocol):
    """Who is told of stages; what ``begin`` returns is handed to the ``end`` of the same stage."""

    def begin(self, name: str) -> Any: ...

    def end(self, name: str, token: Any) -> None: ...


_listeners: tuple[Listener, ...] = ()
_NOTHING = contextlib.nullcontext()


class _Stage:
    __slots__ = ("_listeners", "_name", "_tokens")

    def __init__(self, name: str, listeners: tuple[Listener, ...]):
        self._name, self._listeners = name, listeners

    def __enter__(self) -> None:
        self._tokens = [listener.begin(self._name) for listener in self._listeners]

    def __exit__(self, *_) -> None:
        for listener, token in zip(reversed(self._listeners), reversed(self._tokens), strict=True):
            listener.end(self._name, token)


def stage(name: str):
    """A context around one stage of a step, from any thread; may be nested."""
    if is_dynamo_compiling():  # first, so that a graph is not guarded by who listens
        return contextlib.nullcontext()
    return _Stage(name, _listeners) if _listeners else _NOTHING


@contextlib.contextmanager
def listening(*listeners: Listener | None) -> Iterator[None]:
    """While entered, these are told of every stage that begins; None stands for no listener."""
    global _listeners
    new = tuple(listener for listener in listeners if listener is not None)
    _listeners = _listeners + new
    try:
        yield
    finally:
        left = list(_listeners)
        for listener in new:
            left.remove(listener)
        _listeners = tuple(left)


# --- ranges for other tools -------------------------------------------------------------------------


class _NvtxPackage:
    def __init__(self, nvtx):
        self._nvtx = nvtx

    def begin(self, name: str) -> None:
        self._nvtx.push_range(message=name, domain=DOMAIN)

    def end(self, name: str, token) -> None:
        self._nvtx.pop_range(domain=DOMAIN)


class _NvtxOfTorch:
    def begin(self, name: str) -> None:
        torch.cuda.nvtx.range_push(name)

    def end(self, name: str, token) -> None:
        torch.cuda.nvtx.range_pop()


def nvtx_ranges() -> Listener | None:
    """Stages as NVTX ranges, by the package ``nvtx``, else by a CUDA build of torch; None where neither works."""
    try:
        import nvtx

        listener = _NvtxPackage(nvtx)
        listener.end("", listener.begin("phmdiff-fast"))  # a broken installation shows here, not in a step
        return listener
    except Exception:  # of whatever kind: ranges are no reason to stop a training
        return _NvtxOfTorch() if torch.cuda.is_available() else None


def nvtx_if_asked() -> Listener | None:
    """``nvtx_ranges()`` where the environment says PHMDIFF_NVTX=1, else None."""
    return nvtx_ranges() if os.environ.get("PHMDIFF_NVTX", "0") not in ("", "0") else None


class ProfilerRanges:
    """Stages as ``record_function`` ranges named ``PREFIX`` + stage, which torch.profiler records."""

    def begin(self, name: str) -> torch.autograd.profiler.record_function:
        # Closed in ``end``: the two calls are one with-block of the caller.
        record = torch.autograd.profiler.record_function(PREFIX + name)
        record.__enter__()
        return record

    def end(self, name: str, token: torch.autograd.profiler.record_function) -> None:
        token.__exit__(None, None, None)


# --- a clock ----------------------------------------------------------------------------------------


@dataclass
class Spent:
    """Time in a stage so far. device_s: on the stream, from the stage's first to its last command, so that
    the GPU's waiting in between counts; None on a CPU."""

    calls: int = 0
    host_s: float = 0.0
    device_s: float | None = None

    @property
    def seconds(self) -> float:
        """The device's time where there is one, else the host's."""
        return self.host_s if self.device_s is None else self.device_s


class Clock:
    """Adds up the time of every outermost stage of the thread that made it; stages inside a stage are its own.

    On a GPU pairs of CUDA events are recorded on the current stream and read only by ``read``, which waits
    for the last of them: nothing is waited for inside a step. Stages of other threads (a checkpoint being
    written, the recomputed forward inside a backward) are not counted: no step waits for the first, and the
    second is part of "backward".
    """

    def __init__(self, device: torch.device):
        self._device = device if device.type == "cuda" else None
        self._thread = threading.get_ident()
        self._depth = 0
        self._spent: dict[str, Spent] = {}
        self._unread: list[tuple[str, Any, Any]] = []
        self._free: list[Any] = []  # events to use again

    def begin(self, name: str):
        if threading.get_ident() != self._thread:
            return None
        self._depth += 1
        return (self._mark(), time.perf_counter()) if self._depth == 1 else ()

    def end(self, name: str, token) -> None:
        if token is None:
            return
        self._depth -= 1
        if not token:
            return
        event, begun = token
        spent = self._spent.setdefault(name, Spent(device_s=None if self._device is None else 0.0))
        spent.calls += 1
        spent.host_s += time.perf_counter() - begun
        if event is not None and (last := self._mark()) is not None:
            self._unread.append((name, event, last))
            if len(self._unread) > MOST_UNREAD:
                self._take(done_only=True)

    def _mark(self):
        # In a CUDA graph that is being captured an event is an edge of the graph and has no time.
        if self._device is None or torch.cuda.is_current_stream_capturing():
            return None
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _take(self, done_only: bool) -> None:
        taken = 0
        for name, first, last in self._unread:
            if done_only and not last.query():
                break
            self._spent[name].device_s += first.elapsed_time(last) * 1e-3
            self._free += [first, last]
            taken += 1
        del self._unread[:taken]

    def read(self) -> dict[str, Spent]:
        """Time in each stage since the clock was made, in the order of ``STAGES``; on a GPU waits for it."""
        if self._unread:
            self._unread[-1][2].synchronize()
            self._take(done_only=False)
        return {name: Spent(s.calls, s.host_s, s.device_s) for name, s in in_order(self._spent)}


def in_order(by_stage: dict[str, Any]) -> list[tuple[str, Any]]:
    """The items of a table by stage, in the order of ``STAGES``, other names after them."""
    rank = {name: i for i, name in enumerate(STAGES)}
    return sorted(by_stage.items(), key=lambda item: rank.get(item[0], len(rank)))
