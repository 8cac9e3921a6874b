"""How a kernel is launched, and the one place its outputs and workspaces are allocated.

Every launch of the project goes through ``launch`` and every buffer through ``empty``, so that tools
can watch: benchmarks/compile_report.py writes launches down and compiles them for other devices,
benchmarks/traffic.py counts the bytes each one touches, tests put margins around buffers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from . import _impl

_observer: Callable | None = None
DEFAULT_PROCESSORS = 132  # launch shapes off a GPU are those of an H100 or H200


def empty(shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous buffer: an output or a workspace."""
    return torch.empty(shape, dtype=dtype, device=device)


@lru_cache
def processors(device: torch.device) -> int:
    """How many multiprocessors the device has."""
    return (
        torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else DEFAULT_PROCESSORS
    )


def launch(kernel, grid: tuple[int, ...], *args, **meta) -> None:
    """Run ``kernel`` over ``grid`` on the device of its first tensor; an empty grid launches nothing.

    args : positional kernel arguments; meta : constexpr arguments by name, num_warps, num_stages
    """
    if 0 in grid:
        return
    if _observer is not None:
        _observer(kernel, grid, args, meta)
        return
    device = next(a.device for a in args if isinstance(a, Tensor))
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        kernel[grid](*args, **meta)


@contextlib.contextmanager
def observe(observer: Callable, *, dry: bool = False) -> Iterator[None]:
    """Hand every launch to ``observer(kernel, grid, args, meta)`` instead of running it.

    dry : tensors of any device are taken, because nothing will read them
    """
    global _observer
    before, _observer = (_observer, _impl.recording), observer
    _impl.recording = _impl.recording or dry
    try:
        yield
    finally:
        _observer, _impl.recording = before
