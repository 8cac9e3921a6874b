"""Scans of a few hundred voxels for the tests of the data rooms."""

import nibabel as nib
import numpy as np
import pytest

from phmdiff_fast.errors import PhmdiffError

SHAPE = (6, 7, 5)
AFFINE = np.diag([1.5, 1.5, 2.0, 1.0])


def scan(seed, shape=SHAPE):
    """Half background, exactly 0; positive inside."""
    voxels = np.random.default_rng(seed).integers(1, 1000, shape).astype(np.int16)
    voxels[:, : shape[1] // 2] = 0
    return voxels


def save(path, voxels, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return path


def body(seed=0):
    """A CT in HU, int16: a body with a lung of air in it, in air, on a thin table."""
    voxels = np.full((16, 16, 6), -1000, np.int16)
    voxels[3:13, 5:13] = np.random.default_rng(seed).integers(-50, 80, (10, 8, 6))
    voxels[6:9, 7:10] = -800
    voxels[1:15, 1] = 300
    return voxels


def refused(call, *args, **how):
    with pytest.raises(PhmdiffError) as caught:
        call(*args, **how)
    return caught.value
