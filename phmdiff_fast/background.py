"""Which patches of a volume's slices hold nothing, so that synthesis leaves them out, and batches of alike slices.

Every slice keeps a number of patches that its own foreground alone decides, rounded up to a sixteenth of all, so that
slices of one batch make a dense tensor and no image depends on its neighbours in the batch. What rounding leaves room
for is filled with the background nearest to the foreground. Numpy and scipy alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .grid import neighbours

PARTS = 16  # shares of patches kept are whole sixteenths
SMALL = 256  # levels of fewer patches are computed whole: smaller batches cost more there than is saved (docs/LOG.md)


@dataclass(frozen=True)
class Batch:
    """Slices that are synthesized together.

    rows : (B,) int64, their numbers in the volume; kept : for each view (as seen, mirrored along H) and level the
    patches that are computed, (B, K) int32 ascending, or None for all; ``kept`` None: all of all
    """

    rows: np.ndarray
    kept: list[list[np.ndarray | None]] | None = None


def plain_batches(count: int, size: int) -> list[Batch]:
    """``count`` slices in order, at most ``size`` at a time, every patch of them."""
    return [Batch(np.arange(start, min(start + size, count))) for start in range(0, count, size)]


def batches(
    foreground: np.ndarray, size: int, *, patch: int, levels: int, views: int = 1, context: int = 0, small: int = SMALL
) -> list[Batch]:
    """Batches of at most ``size`` slices that keep equally many patches each; every slice is in one of them.

    foreground : (Z, H, W) bool, as large as the sources; patch, levels : of the model; views : 2 for the mirrored one
    too; context : neighbouring slices shown on each side, whose foreground counts as well; small : levels of fewer
    patches are computed whole
    """
    inside = foreground[neighbours(len(foreground), context)].any(1)
    seen = [_patches(inside[:, ::-1] if view else inside, patch, levels) for view in range(views)]
    large = [n for n, grid in enumerate(seen[0]) if grid[0].size >= small]
    if not large:
        return plain_batches(len(foreground), size)
    shares = np.max([view[n].mean((1, 2)) for view in seen for n in large], axis=0)
    parts = np.ceil(shares * PARTS).clip(1).astype(np.int64)
    out = []
    for part in np.unique(parts):
        alike = np.flatnonzero(parts == part)
        for rows in np.split(alike, range(size, len(alike), size)):
            kept = [
                [_nearest(grid[rows], part) if n in large else None for n, grid in enumerate(view)] for view in seen
            ]
            out.append(Batch(rows, kept if part < PARTS else None))
    return out


def _patches(inside: np.ndarray, patch: int, levels: int) -> list[np.ndarray]:
    """(Z, H, W) bool, padded as the model pads -> a level: (Z, rows, columns) bool, patches that hold foreground."""
    count, height, width = inside.shape
    side = patch * 2 ** (levels - 1)
    inside = np.pad(inside, ((0, 0), (0, -height % side), (0, -width % side)))
    grids = []
    for n in range(levels):
        cell = patch << n
        grids.append(inside.reshape(count, inside.shape[1] // cell, cell, inside.shape[2] // cell, cell).any((2, 4)))
    return grids


def _nearest(grid: np.ndarray, part: int) -> np.ndarray:
    """(B, rows, columns) bool -> (B, K) int32: the foreground and what lies nearest to it, ``part`` sixteenths of all.

    Nearest in whole patches, along rows, columns and diagonals; of patches at the same distance the first ones.
    """
    from scipy import ndimage

    keep = -(-part * grid[0].size // PARTS)
    kept = np.empty((len(grid), keep), np.int32)
    for row, plane in zip(kept, grid, strict=True):
        far = ndimage.distance_transform_cdt(~plane, "chessboard") if plane.any() else np.zeros(plane.shape, int)
        row[:] = np.sort(np.argsort(far.ravel(), kind="stable")[:keep])
    return kept
