"""What is installed, which backend each operation uses, and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil

from . import __version__, attention
from .device import has_native_bf16, pick_device, pick_precision
from .kernels import _extension, _impl

PACKAGES = ("torch", "triton", "xformers", "numpy", "nibabel", "scipy", "scikit-image", "safetensors",
            "matplotlib", "nilearn", "nvtx", "pytest-benchmark")  # fmt: skip
KERNELS = ("draw_mask", "embed_visible", "restore_tokens", "adaln_modulate", "gated_residual_adaln", "mmd2")
ON_A_CPU = ("adaln_modulate", "gated_residual_adaln")  # what the extension computes there
PYRAMID = ("build_pyramid", "merge_state", "upsample_add", "level_error", "haar3d", "normals")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def report() -> list[str]:
    """Lines for people: versions, device, precision, backend of each operation with its reason."""
    import torch

    device = pick_device("auto")
    dtype = pick_precision("auto", device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    lines = [
        f"phmdiff-fast {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    ]
    lines += [f"  {package:<17}{_version(package)}" for package in PACKAGES]
    lines.append(f"  {'nvcc':<17}{shutil.which('nvcc') or 'not found'}")
    native = "native" if has_native_bf16(device) else "not native, so float32 is faster"
    lines.append(f"device: {name}; precision auto -> {str(dtype)[6:]} (bf16 is {native})")
    why, facts = _extension.status()
    built = "on the CPU {cpu}; CUDA kernels {cuda}".format(**facts) if facts else f"not in use: {why}"
    lines.append(f"extension: {built}")
    lines.append("operations:")
    backend, why = _impl.default(device)
    lines += [f"  {op:<22}{backend}{': ' * bool(why)}{why}" for op in KERNELS]
    why = _extension.problem_on(device)
    if device.type == "cpu" and not why:
        served = {"embed_visible": "extension for Eq. 6, else reference"} | dict.fromkeys(ON_A_CPU, "extension")
        for n, line in enumerate(lines):
            if (op := line.strip().split(" ")[0]) in served and line.startswith("  "):
                lines[n] = f"  {op:<22}{served[op]}"
    lines.append(f"  {'gelu':<22}{'extension' if device.type == 'cpu' and not why else 'torch'}")
    lines += [f"  {op:<22}{'reference: ' + why if why else 'extension'}" for op in PYRAMID]
    chosen = attention.choose(device, dtype, attention.TYPICAL_HEAD, attention.TYPICAL_LENGTHS)
    lines.append(f"  {'attention':<22}{chosen.name}: {chosen.why}")
    lines += [f"    {name:<20}{'no: ' * (can != 'yes')}{can}" for name, can in attention.table(device, dtype)]
    return lines
