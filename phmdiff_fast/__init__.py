"""phmdiff_fast: missing medical scans synthesized from the ones that exist, fast.

Pyramid Hierarchical Masked Diffusion Model (arXiv 2507.16579). Research use only, never a diagnosis.
Public names are loaded on first use, so that importing the package costs no torch.
"""

from __future__ import annotations

import importlib
from pathlib import Path

__version__ = "0.1.0"

# In a checkout the kernels lie in a top-level folder without an __init__.py (with one it would
# shadow another well-known package of that name); installed, they lie inside the package.
_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "csrc").is_dir() and str(_ROOT) not in __path__:
    __path__.append(str(_ROOT))

_PUBLIC = {
    "MaskedDiT": "model",
    "PHMDiff": "phmdiff",
    "Config": "config",
    "ModelConfig": "config",
    "LevelSpec": "config",
    "build_config": "config",
    "PhmdiffError": "errors",
    "build_pyramid": "pyramid",
    "merge_state": "pyramid",
    "upsample_add": "pyramid",
    "level_error": "pyramid",
    "haar3d": "haar",
    "inverse_haar3d": "haar",
    "draw_mask": "kernels.patch_mask",
    "embed_visible": "kernels.patch_mask",
    "restore_tokens": "kernels.patch_mask",
    "adaln_modulate": "kernels.adaln",
    "gated_residual_adaln": "kernels.adaln",
    "mmd2": "kernels.mmd",
    "load": "generate",
}

__all__ = ["__version__", "has_extension", *_PUBLIC]


def has_extension() -> bool:
    """Whether the C++/CUDA extension is built and can be used (``phmdiff-fast doctor`` says why not)."""
    return not importlib.import_module(f"{__name__}.kernels._extension").problem()


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
