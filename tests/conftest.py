"""Shared by all tests: one thread of randomness, real scans where present, tiny cohorts."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from small_scans import save, scan

if not torch.cuda.is_available():  # before any kernel is imported: without a GPU they run in the interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

from phmdiff_fast.cli import main

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("PHMDIFF_REAL_DATA", ROOT.parent / "shared" / "data" / "brain"))

TINY = [f"model.{k}={v}" for k, v in dict(depth=1, width=32, heads=2, decoder_depth=1, decoder_width=16,
                                          decoder_heads=2, stem="true", stem_width=8, head_width=8,
                                          patch=4).items()]  # fmt: skip
TINY = [
    part
    for item in [*TINY, "train.batch_size=4", "train.mmd_weight=0.05", "train.precision=fp32"]
    for part in ("--set", item)
]


def cli(*arguments) -> int:
    """Run a command in this process; its exit code."""
    with pytest.raises(SystemExit) as leaving:
        main([str(a) for a in arguments])
    return int(leaving.value.code or 0)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


LOST = 9  # exit code: an error of the GPU, after which the process can use it no more
STICKY = ("illegal memory access", "unspecified launch failure", "device-side assert", "misaligned address")


def pytest_runtest_logreport(report):
    """A line of JSON a test in the file PHMDIFF_TEST_LOG names, as it ends (benchmarks/gpu_check.py reads it)."""
    if not (log := os.environ.get("PHMDIFF_TEST_LOG")):
        return
    if report.when == "call" or report.outcome != "passed":
        crash = getattr(report.longrepr, "reprcrash", None)
        why = " ".join((crash.message if crash else report.longreprtext).split())
        with open(log, "a") as file:
            file.write(json.dumps({"test": report.nodeid, "outcome": report.outcome, "why": why[:2000]}) + "\n")
        if report.failed and any(error in why for error in STICKY):
            pytest.exit("the GPU is lost to this process", returncode=LOST)


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter():
    """Triton's interpreter patches triton.language at every call of a device function; once a launch will do."""
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        yield
        return
    from kernel_tools import patched_once
    from triton.runtime.interpreter import GridExecutor

    original = GridExecutor.__call__

    def call(self, *args, **kwargs):
        with patched_once():
            return original(self, *args, **kwargs)

    GridExecutor.__call__ = call
    yield
    GridExecutor.__call__ = original


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real scans, or a skip that says where it was looked for."""
    if not REAL.is_dir():
        pytest.skip(f"no real scans at {REAL} (set PHMDIFF_REAL_DATA)")
    return REAL


def write_scan(path: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), path)


def phantom(seed: int, shape=(20, 24, 9)) -> dict[str, np.ndarray]:
    """A head of shells: int16 t1 and t2 whose values are related but not by a line; 0 outside."""
    rng = np.random.default_rng(seed)
    axes = [np.linspace(-1, 1, n) for n in shape]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    radius = np.sqrt(x**2 / 0.8 + y**2 / 0.9 + z**2 / 1.4) * (1 + 0.05 * np.sin(3 * x + seed))
    t1 = np.select([radius < 0.35, radius < 0.7, radius < 0.95], [900, 600, 250], 0).astype(float)
    t2 = np.select([radius < 0.35, radius < 0.7, radius < 0.95], [300, 500, 1100], 0).astype(float)
    noise = rng.normal(0, 12, (2, *shape))
    inside = t1 > 0
    return {
        name: np.where(inside, np.maximum(image + n, 1), 0).astype(np.int16)
        for name, image, n in (("t1", t1, noise[0]), ("t2", t2, noise[1]))
    }


def phantom_ct(seed: int, shape=(20, 24, 9)) -> np.ndarray:
    """The same head as ``phantom(seed)`` in HU, int16: brain, water, a skull; air outside."""
    t1 = phantom(seed, shape)["t1"]
    noise = np.random.default_rng(seed + 1000).normal(0, 10, shape)
    ct = np.select([t1 > 750, t1 > 400, t1 > 0], [35.0, 10.0, 900.0], -1000.0)
    return np.where(t1 > 0, ct + noise, ct).astype(np.int16)


@pytest.fixture
def folder(tmp_path):
    """Three subjects with t1 and t2."""
    for number, subject in enumerate(("anna", "bela", "carl")):
        for contrast in ("t1", "t2"):
            save(tmp_path / subject / f"{subject}_{contrast}.nii.gz", scan(10 * number + (contrast == "t2")))
    return tmp_path


def write_tiny_cohort(root: Path) -> Path:
    """Four people in BraTS 2021 layout, 20 x 24 x 9 voxels, stored L-P-S."""
    affine = np.array([[-1.5, 0, 0, 12], [0, -1.5, 0, 9], [0, 0, 2.0, -4], [0, 0, 0, 1]])
    for i in range(4):
        for contrast, voxels in phantom(i).items():
            write_scan(root / f"p{i}" / f"p{i}_{contrast}.nii.gz", voxels, affine)
    return root


@pytest.fixture(scope="session")
def tiny_cohort(tmp_path_factory) -> Path:
    return write_tiny_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="session")
def zygote():
    """A server of quick processes (tests/faults)."""
    from zygote import Zygote

    with Zygote() as server:
        yield server
