"""Shared by all tests: one thread of randomness, real scans where present, tiny cohorts."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("PHMDIFF_REAL_DATA", ROOT.parent / "shared" / "data" / "brain"))


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


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


@pytest.fixture(scope="session")
def tiny_cohort(tmp_path_factory) -> Path:
    """Four people in BraTS 2021 layout, 20 x 24 x 9 voxels, stored L-P-S."""
    root = tmp_path_factory.mktemp("cohort")
    affine = np.array([[-1.5, 0, 0, 12], [0, -1.5, 0, 9], [0, 0, 2.0, -4], [0, 0, 0, 1]])
    for i in range(4):
        for contrast, voxels in phantom(i).items():
            write_scan(root / f"p{i}" / f"p{i}_{contrast}.nii.gz", voxels, affine)
    return root
