"""Which implementation of an operation runs: ``impl=None | "reference" | "triton" | "extension"``.

``None`` takes Triton for tensors on a GPU and the reference everywhere else. A forced
implementation that cannot run raises BackendError; it is never silently replaced. With
``TRITON_INTERPRET=1`` a forced "triton" runs on CPU tensors too, in Triton's interpreter.
"""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec

import torch
from torch import Tensor

NAMES = ("reference", "triton", "extension")
# Both are read once: the kernels are built for one mode when they are first imported, and constants
# leave torch.compile nothing to guard on.
HAS_TRITON = find_spec("triton") is not None
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
# True while launches are only written down (``_launch.observe``); then any device will do.
recording = False


class BackendError(RuntimeError):
    """A forced implementation cannot run here."""


def default(device: torch.device) -> tuple[str, str]:
    """(what ``impl=None`` runs on tensors of this device, why), for people."""
    if device.type != "cuda":
        return "reference", "Triton kernels need a GPU"
    return ("triton", "") if HAS_TRITON else ("reference", "Triton is not installed (pip install triton)")


def choose(op: str, impl: str | None, tensors: dict[str, Tensor | None] | None = None, refused: str = "") -> str:
    """The implementation of ``op`` to use on ``tensors`` (by argument name; None where not given).

    refused : why Triton does not do these arguments, from the caller; empty if it does

    Raises ValueError for an unknown name or tensors on different devices, and BackendError for a
    forced implementation that cannot run.
    """
    known(op, impl)
    given = {name: t for name, t in (tensors or {}).items() if t is not None}
    device = common_device(op, given)
    if impl == "reference":
        return impl
    if impl == "extension":
        raise BackendError(f"{op}: impl='extension' cannot run here: this operation has none")
    why = refused or _why_not_triton(device, given) or forward_mode()
    if impl == "triton":
        if why:
            raise BackendError(f"{op}: impl='triton' cannot run here: {why}")
        return impl
    if device is None or device.type != "cuda":
        return "reference"
    if why:
        if not torch.compiler.is_compiling():  # Python's own filter shows it once a place
            warnings.warn(f"phmdiff_fast: {op} runs the slower eager path: {why}", stacklevel=3)
        return "reference"
    return "triton"


def known(op: str, impl: str | None) -> None:
    if impl is not None and impl not in NAMES:
        raise ValueError(f"{op}: impl={impl!r} is unknown; use None or one of {NAMES}")


def common_device(op: str, tensors: dict[str, Tensor | None]) -> torch.device | None:
    """The one device of all tensors that are given; raises ValueError where they lie on several."""
    first = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, expected {device} like {first}")
    return None if first is None else device


def forward_mode() -> str:
    """Why no custom operation runs now: PyTorch would drop its forward-mode derivative without a word."""
    inside = torch.autograd.forward_ad._current_level >= 0
    return "forward-mode derivatives, which only the reference has" if inside else ""


def _why_not_triton(device: torch.device | None, tensors: dict[str, Tensor]) -> str:
    if not HAS_TRITON:
        return "Triton is not installed"
    if (device is None or device.type != "cuda") and not (INTERPRET or recording):
        return f"the tensors are on {device}; Triton needs a GPU, or TRITON_INTERPRET=1 for its interpreter"
    wide = [name for name, tensor in tensors.items() if tensor.dtype == torch.float64]
    return f"{wide[0]} is float64, which only the reference computes" if wide else ""
