"""Small pictures of a cohort's scans: one slice a subject, the same place in every contrast."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .grid import HIGH, HU_CONTRASTS, LOW, foreground_mask, thumbnail
from .layouts import LABELS
from .nifti import Volume

SIDE = 112  # pixels of a view, at most
HU = (-1000.0, 1000.0)  # black and white of a CT's view


@dataclass(eq=False)
class View:
    """One axial slice as an upright picture: front of the head up, the patient's left at the left.

    image : (H, W) uint8, at most 112 pixels a side
    inside : (H, W) bool, the foreground of the subject's first contrast at the same place in mm
    """

    image: np.ndarray
    inside: np.ndarray


class Shown:
    """The slice of a subject that its views show: of its first image, where the foreground is largest."""

    def __init__(self, first: Volume, foreground: np.ndarray):
        self.first, self.foreground = first, foreground
        self.z = int(np.argmax(foreground.sum((0, 1))))

    def view(self, contrast: str, volume: Volume) -> View:
        """The slice of ``volume``, on any grid, that lies nearest in mm, and the first image's foreground there."""
        from_first = np.linalg.inv(volume.affine) @ self.first.affine
        middle = [(self.first.voxels.shape[0] - 1) / 2, (self.first.voxels.shape[1] - 1) / 2, self.z, 1]
        z = int(np.clip(np.rint((from_first @ middle)[2]), 0, volume.voxels.shape[2] - 1))
        x, y = np.indices(volume.voxels.shape[:2])
        there = np.linalg.inv(from_first) @ np.stack([x, y, np.full_like(x, z), np.ones_like(x)]).reshape(4, -1)
        at = np.rint(there[:3]).astype(int)
        # The slice itself may lie half a voxel off, so that it is the first image's slice that is asked.
        at[2] = self.z
        known = ((at >= 0) & (at < np.array(self.foreground.shape)[:, None])).all(0)
        inside = np.zeros(x.size, np.float32)
        inside[known] = self.foreground[tuple(at[:, known])]
        across = tuple(np.linalg.norm(volume.affine[:3, :2], axis=0))
        plane = _grey(contrast, volume.voxels, volume.voxels[:, :, z])
        return View(
            image=np.rot90(np.rint(255 * thumbnail(plane, SIDE, across))).astype(np.uint8),
            inside=np.rot90(thumbnail(inside.reshape(x.shape), SIDE, across) >= 0.5),
        )


def _grey(contrast: str, voxels: np.ndarray, plane: np.ndarray) -> np.ndarray:
    """A slice as 0 .. 1: labels over their maximum, CT through a window, else by percentiles of the foreground."""
    if contrast in LABELS:
        low, high = 0.0, float(voxels.max())
    elif contrast in HU_CONTRASTS:
        low, high = HU
    else:
        own = voxels[foreground_mask(voxels)]
        low, high = np.percentile(own, [LOW, HIGH]) if own.size else (0.0, 0.0)
    return np.clip((plane - low) / (high - low), 0, 1) if high > low else np.zeros(plane.shape)
