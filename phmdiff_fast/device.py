"""Which device and precision a run uses, and why."""

from __future__ import annotations

import contextlib
import os

import torch

from .errors import BACKEND, PhmdiffError


def pick_device(name: str) -> torch.device:
    """ "auto" | "cpu" | "cuda" -> a device. Raises PhmdiffError (exit 8) for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise PhmdiffError("NO_GPU", "train.device is 'cuda' but torch sees no GPU",
                           "use auto or cpu, or install a CUDA build of torch", exit_code=BACKEND)  # fmt: skip
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def has_native_bf16(device: torch.device) -> bool:
    """Whether bf16 products run on units of their own there (emulated, they are slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and _avx512_bf16()


def _avx512_bf16() -> bool:
    # oneDNN says yes on any AVX512 processor and emulates; only these two flags mean native units.
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            flags = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """ "auto" | "fp32" | "bf16" -> the type of the matrix products."""
    if name == "auto":
        name = "bf16" if has_native_bf16(device) else "fp32"
    return torch.bfloat16 if name == "bf16" else torch.float32


@contextlib.contextmanager
def deterministic(wanted: bool):
    """While entered and ``wanted``, only operations that give the same bits every time on the same machine."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at cuBLAS' first use
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def autocast(device: torch.device, dtype: torch.dtype):
    """The context for a forward pass; float32 needs none."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)
