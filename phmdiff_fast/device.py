"""Which device and precision a run uses, and why."""

from __future__ import annotations

import contextlib
import ctypes
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


_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # of glibc's mallopt
_MAPPINGS, _TRIM = 65536, 128 << 10  # its defaults


def keep_freed_memory(keep: bool = True) -> bool:
    """Have glibc keep what is freed for the next step, or give it back as it does by itself.

    Tensors of more than 128 KiB are otherwise mapped and given back one by one, and each page is cleared again at its
    first use: a tenth of a step of preset s4 on a CPU. False where there is no glibc.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt, trim = libc.mallopt, libc.malloc_trim
    except (AttributeError, OSError):
        return False
    done = mallopt(_MMAP_MAX, 0 if keep else _MAPPINGS) and mallopt(_TRIM_THRESHOLD, 2**31 - 1 if keep else _TRIM)
    if not keep:
        trim(0)
    return bool(done)


_keeping = 0  # how many contexts below are entered


@contextlib.contextmanager
def kept_memory(device: torch.device):
    """``keep_freed_memory`` while entered, on a CPU; one inside another ends with the outer one."""
    global _keeping
    kept = device.type == "cpu" and (_keeping > 0 or keep_freed_memory())
    _keeping += kept
    try:
        yield
    finally:
        _keeping -= kept
        if kept and not _keeping:
            keep_freed_memory(False)


def autocast(device: torch.device, dtype: torch.dtype):
    """The context for a forward pass; float32 needs none."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)
