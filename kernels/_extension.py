"""The C++/CUDA extension (csrc/): whether it can be used here, why not, and who uses it when.

It is one library, phmdiff_fast/_C.so, brought in on first use; it registers its operations in
``torch.ops.phmdiff_fast``. ``PHMDIFF_EXTENSION=0`` leaves it out, a path in it names another build.
setup.py uses this file too (for the fingerprint), so it imports torch only inside functions.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import warnings
from importlib.util import find_spec
from pathlib import Path

REBUILD = "rebuild it with `pip install --no-build-isolation -e .`"


def fingerprint(csrc: Path, cuda: bool) -> str:
    """Of the sources in this folder, csrc/cuda/ only where that is built: so that a checkout can tell an
    extension built from others."""
    digest = hashlib.sha256()
    kinds = (".cpp", ".h", ".cu", ".cuh") if cuda else (".cpp", ".h")
    paths = (p for p in csrc.rglob("*") if p.suffix in kinds and (cuda or p.parent.name != "cuda"))
    for path in sorted(paths):
        digest.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


_status: tuple[str, dict[str, str]] | None = None


def status() -> tuple[str, dict[str, str]]:
    """("", facts) where the extension is loaded, else (why it is not, {}); facts: "cpu" (instruction set),
    "cuda" (architectures, or "none"), "sources" (fingerprint)."""
    global _status
    if _status is None:  # kept in a plain variable, which torch.compile reads without walking through the loading
        _status = _load()
    return _status


def _load() -> tuple[str, dict[str, str]]:
    asked = os.environ.get("PHMDIFF_EXTENSION", "1")
    if asked == "0":
        return "PHMDIFF_EXTENSION=0 leaves the extension out", {}
    spec = find_spec("phmdiff_fast._C")
    file = asked if os.sep in asked else spec and spec.origin
    if not file:
        return "the extension is not built (install again, torch being there, with a C++ compiler)", {}
    import torch

    try:
        library = ctypes.CDLL(file)
        library.phmdiff_fast_extension.restype = ctypes.c_char_p
        facts = dict(word.split("=", 1) for word in library.phmdiff_fast_extension().decode().split(" "))
        csrc = Path(__file__).resolve().parent.parent / "csrc"
        if csrc.is_dir() and facts["sources"] != fingerprint(csrc, facts["cuda"] != "none"):
            return f"the extension was built from other sources than those in csrc/: {REBUILD}", {}
        torch.ops.load_library(file)
    except (OSError, RuntimeError, AttributeError) as problem:
        return f"the extension cannot be loaded ({str(problem).splitlines()[0]}): {REBUILD}", {}
    return "", facts


def problem() -> str:
    """Why the extension cannot be used at all; "" if it can."""
    return status()[0]


def problem_on(device) -> str:
    """Why the extension cannot be used on tensors of this device; "" if it can."""
    why, facts = status()
    if why:
        return why
    kind = "cpu" if device is None else device.type
    if kind == "cpu":
        return ""
    if kind != "cuda":
        return f"the extension runs on CPU and CUDA tensors, not on {kind}"
    return (
        "the extension was built without CUDA kernels (no nvcc or a CPU-only torch)" if facts["cuda"] == "none" else ""
    )


def choose(op: str, impl: str | None, tensors: dict, refused: str = "") -> bool:
    """Whether ``op`` runs in the extension on ``tensors`` (by argument name; None where not given).

    refused : why it does not do these arguments, from the caller; empty if it does

    ``impl=None`` takes the extension wherever it can run, and warns once where it cannot. Raises ValueError
    for an unknown name or tensors on different devices, BackendError for a forced implementation that cannot run.
    """
    from ._impl import BackendError, common_device, forward_mode, known

    known(op, impl)
    device = common_device(op, tensors)
    if impl == "reference":
        return False
    if impl == "triton":
        raise BackendError(f"{op}: impl='triton' cannot run here: this operation has none")
    why = problem_on(device) or refused or _wrong_type(tensors) or forward_mode()
    if why and impl == "extension":
        raise BackendError(f"{op}: impl='extension' cannot run here: {why}")
    if why and device is not None and device.type in ("cpu", "cuda"):
        warn_once(op, why)
    return not why


def _wrong_type(tensors: dict) -> str:
    import torch

    known = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)
    wrong = [name for name, t in tensors.items() if t is not None and t.dtype not in known]
    return f"{wrong[0]} is {str(tensors[wrong[0]].dtype)[6:]}" if wrong else ""


_warned: set[str] = set()


def warn_once(op: str, why: str) -> None:
    import torch

    if why in _warned or torch.compiler.is_compiling():
        return
    _warned.add(why)
    warnings.warn(f"phmdiff_fast: {op} runs the slower reference path: {why}", stacklevel=4)
