"""What happens to the voxels between a scan and the network: foreground, scaling, in-plane geometry.

Numpy alone (scipy for the components); every step here is the network's view of a scan and its way back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .config import DataConfig
from .errors import PhmdiffError

LOW, HIGH = 0.5, 99.5  # percentiles inside the foreground that become -1 and 1
HU_CONTRASTS = ("ct", "cbct")  # values with a physical unit: scaled by a fixed window
BODY_HU = -500.0  # what is above is body, what is below is air (or lung)
SLICE_AXIS = {"axial": 2, "coronal": 1, "sagittal": 0}  # DataConfig.axis -> RAS axis the slices follow each other on


def foreground_mask(voxels: np.ndarray, mask: np.ndarray | None = None, *, hu: bool = False) -> np.ndarray:
    """The foreground (X, Y, Z) bool of a volume (X, Y, Z) in RAS, by the first rule that applies.

    1. ``mask`` > 0 where one is given; 2. with ``hu``: above -500 HU, largest component (the table falls
    away), holes of every axial slice filled (lungs, sinuses); 3. above the minimum, where at least 20 %
    of the voxels equal the minimum (skull-stripped scans); 4. above Otsu's threshold, largest component,
    holes filled. A constant volume has no foreground, nor a CT of air. Raises PhmdiffError
    NO_FOREGROUND for an empty ``mask`` and ValueError for one of another shape.
    """
    if mask is not None:
        if mask.shape != voxels.shape:
            raise ValueError(f"mask {mask.shape} and voxels {voxels.shape} differ")
        given = mask > 0
        if not given.any():
            raise PhmdiffError("NO_FOREGROUND", "the mask has no voxel above 0", "correct or remove the mask")
        return given
    if hu:
        body = voxels > BODY_HU
        if not body.any() or voxels.min() == voxels.max():
            return np.zeros(voxels.shape, bool)
        # Slice by slice: lungs that the scan cuts off, or that the airways open to the outside, are holes there.
        return _fill_holes(_largest_component(body), axial=True)
    above = voxels > voxels.min()
    if above.mean() <= 0.8:
        return above
    return _fill_holes(_largest_component(voxels > otsu_threshold(voxels)))


def otsu_threshold(voxels: np.ndarray, bins: int = 256) -> float:
    """The value that best parts the histogram in two (largest variance between the classes; Otsu 1979)."""
    counts, edges = np.histogram(voxels, bins=bins)
    centres = (edges[:-1] + edges[1:]) / 2
    below, total = np.cumsum(counts), counts.sum()
    mass = np.cumsum(counts * centres)
    below, mass_below = below[:-1], mass[:-1]  # a cut after bin k; both sides hold the end bins, so are not empty
    mean_gap = mass_below / below - (mass[-1] - mass_below) / (total - below)
    return float(edges[1 + np.argmax(below * (total - below) * mean_gap**2)])


def _largest_component(mask: np.ndarray) -> np.ndarray:
    from scipy import ndimage

    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return labels == np.argmax(sizes)


def _fill_holes(mask: np.ndarray, axial: bool = False) -> np.ndarray:
    """Holes are background that does not reach the border, of the volume or (``axial``) of its slice [:, :, z].

    One labelling, where scipy's own loop takes seconds.
    """
    from scipy import ndimage

    touching = ndimage.generate_binary_structure(3, 1)
    if axial:
        touching[:, :, [0, 2]] = False
    labels, count = ndimage.label(~mask, touching)
    outside = np.zeros(count + 1, bool)
    for axis in range(2 if axial else 3):
        outside[labels.take([0, -1], axis=axis).ravel()] = True
    return mask | ~outside[labels]


@dataclass(frozen=True)
class Scaling:
    """Intensity ``lo`` .. ``hi`` (the scan's own units) <-> -1 .. 1."""

    lo: float
    hi: float

    @property
    def gain(self) -> np.float32:
        return np.float32(2.0 / (self.hi - self.lo))

    def forward(self, x: np.ndarray, clip: bool = True) -> np.ndarray:
        """Intensities of any shape -> float32; with ``clip`` inside [-1, 1]."""
        scaled = (np.asarray(x, np.float32) - np.float32(self.lo)) * self.gain - np.float32(1)
        return np.clip(scaled, -1, 1) if clip else scaled

    def inverse(self, v: np.ndarray) -> np.ndarray:
        """Values where -1 is ``lo`` and 1 is ``hi`` -> intensities, float32."""
        return (np.asarray(v, np.float32) + np.float32(1)) / self.gain + np.float32(self.lo)


def fit_scaling(voxels: np.ndarray, foreground: np.ndarray) -> Scaling:
    """The 0.5 and 99.5 percentile of ``voxels`` (X, Y, Z) inside ``foreground`` (X, Y, Z) bool.

    Raises PhmdiffError NO_FOREGROUND where the foreground is empty and NII_CONSTANT where the two
    percentiles are equal.
    """
    inside = voxels[foreground]
    if inside.size == 0:
        raise PhmdiffError("NO_FOREGROUND", "the foreground is empty", "leave this scan out or give a mask")
    lo, hi = np.percentile(inside, [LOW, HIGH]).astype(np.float32)
    if not hi - lo > 1e-30:  # below, the gain is no float32 number
        raise PhmdiffError("NII_CONSTANT", f"has the value {lo:g} nearly everywhere in the foreground",
                           "leave this scan out")  # fmt: skip
    return Scaling(float(lo), float(hi))


def scaling_for(contrast: str, voxels: np.ndarray, foreground: np.ndarray, hu_window: tuple[float, float]) -> Scaling:
    """``hu_window`` (lo, hi in HU) for CT and CBCT, else what ``fit_scaling`` gives or raises."""
    return Scaling(*map(float, hu_window)) if contrast in HU_CONTRASTS else fit_scaling(voxels, foreground)


def fill_for(contrast: str, voxels: np.ndarray, hu_window: tuple[float, float]) -> float:
    """The value outside the scan: the window's low end for CT and CBCT, else the scan's minimum."""
    return float(hu_window[0]) if contrast in HU_CONTRASTS else float(voxels.min())


def neighbours(count: int, k: int) -> np.ndarray:
    """(count, 2k+1) int64: the slices z-k .. z+k of each slice z; beyond an end of the volume its last slice again."""
    return np.clip(np.arange(count)[:, None] + np.arange(-k, k + 1), 0, max(count - 1, 0))


def stack_context(slices: np.ndarray, k: int) -> np.ndarray:
    """(Z, Cs, S, S) -> (Z, Cs*(2k+1), S, S): every slice with its k neighbours on each side.

    Source-major: the first source's slices z-k .. z+k, then the second source's.
    """
    count, sources, *sides = slices.shape
    stacked = slices[neighbours(count, k)].swapaxes(1, 2)  # (Z, Cs, 2k+1, S, S)
    return np.ascontiguousarray(stacked).reshape(count, sources * (2 * k + 1), *sides)


def thumbnail(plane: np.ndarray, side: int, spacing: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
    """(H, W) -> float32 with square pixels, averaged by area until the longer side is at most ``side``.

    spacing : mm (or any unit) between rows and between columns. A small plane keeps its finer axis as it
    is; only the coarser one gets more pixels than it had.
    """
    length = [n * step / min(spacing) for n, step in zip(plane.shape, spacing, strict=True)]  # in the finer step
    shrink = min(1.0, side / max(length))
    rows, columns = (area_matrix(n, max(1, round(m * shrink))) for n, m in zip(plane.shape, length, strict=True))
    return rows @ plane.astype(np.float32) @ columns.T


@dataclass(frozen=True)
class InPlane:
    """Slices of a volume along the RAS ``axis`` <-> square network images (image_size, image_size).

    ``shape`` is the two in-plane sizes in voxels: rows along the first axis that is left, columns along
    the second (axis 2: X, Y; 1: X, Z; 0: Y, Z).

    A square canvas is cut or padded about the centre, ``crop`` (or the longer in-plane side) voxels
    wide but at least ``image_size``: small scans are padded, never upsampled. Then the canvas is
    averaged down to ``image_size`` by area.
    """

    shape: tuple[int, int]
    image_size: int
    crop: int | None = None
    axis: int = 2

    @classmethod
    def of(cls, volume_shape: tuple[int, int, int], data_config: DataConfig) -> InPlane:
        """The geometry that the settings ask for on a volume of this shape (X, Y, Z)."""
        axis = SLICE_AXIS[data_config.axis]
        shape = tuple(int(size) for at, size in enumerate(volume_shape) if at != axis)
        return cls(shape, data_config.image_size, data_config.crop, axis)

    @property
    def canvas(self) -> int:
        """Side of the square in voxels."""
        return max(self.crop or max(self.shape), self.image_size)

    def to_grid(self, volume: np.ndarray, fill: float, finer: int = 1) -> np.ndarray:
        """(X, Y, Z) -> (n, S, S) float32, n slices; ``fill`` is the value where the canvas leaves the scan.

        finer : as many times finer, (n, S finer, S finer); the mean of each finer x finer block is what 1 gives
        """
        planes = np.moveaxis(volume, self.axis, 0)
        self._check(planes.shape[1:], self.shape)
        slices = np.full((len(planes), self.canvas, self.canvas), fill, np.float32)
        (row_out, row_in), (column_out, column_in) = (self._overlap(n) for n in self.shape)
        slices[:, row_out, column_out] = planes[:, row_in, column_in]
        if self.canvas == self.image_size * finer:
            return slices
        return _resample(slices, area_matrix(self.canvas, self.image_size * finer))

    def from_grid(self, slices: np.ndarray, fill: float) -> np.ndarray:
        """(n, S, S) -> (X, Y, Z) float32; ``fill`` is the value of voxels outside the canvas.

        Bilinear (align_corners False) where ``to_grid`` averaged, voxel for voxel where it did not.
        """
        self._check(slices.shape[1:], (self.image_size, self.image_size))
        slices = np.asarray(slices, np.float32)
        if self.canvas != self.image_size:
            slices = _resample(slices, bilinear_matrix(self.image_size, self.canvas))
        shape = list(self.shape)
        shape.insert(self.axis, len(slices))
        volume = np.full(shape, fill, np.float32)
        (row_out, row_in), (column_out, column_in) = (self._overlap(n) for n in self.shape)
        np.moveaxis(volume, self.axis, 0)[:, row_in, column_in] = slices[:, row_out, column_out]
        return volume

    def _overlap(self, size: int) -> tuple[slice, slice]:
        """Where an axis of ``size`` voxels and the canvas overlap: (on the canvas, on the axis)."""
        both = min(size, self.canvas)
        on_canvas, on_axis = (self.canvas - both) // 2, (size - both) // 2
        return slice(on_canvas, on_canvas + both), slice(on_axis, on_axis + both)

    @staticmethod
    def _check(got, expected) -> None:
        if tuple(got) != tuple(expected):
            raise ValueError(f"in-plane shape {tuple(got)}, expected {tuple(expected)}")


def _resample(slices: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(Z, n, n) and (m, n) -> (Z, m, m), along both axes.

    One product an axis: a product a slice waits on threads (measured 112 ms at worst, not 16, on two busy cores).
    """
    for _ in range(2):
        along_last = slices.reshape(-1, slices.shape[2]) @ weights.T
        slices = along_last.reshape(*slices.shape[:2], len(weights)).transpose(0, 2, 1)
    return np.ascontiguousarray(slices)


@lru_cache(maxsize=16)
def area_matrix(size: int, out: int) -> np.ndarray:
    """(out, size) float32: each output is the mean over its share [i size/out, (i+1) size/out) of the input.

    The overlaps are whole numbers over ``size``, so exact for every ratio; columns sum to out/size,
    which keeps the mean.
    """
    i, j = np.arange(out)[:, None], np.arange(size)[None]
    overlap = np.minimum((i + 1) * size, (j + 1) * out) - np.maximum(i * size, j * out)
    return _frozen(np.maximum(overlap, 0) / size)


@lru_cache(maxsize=16)
def bilinear_matrix(size: int, out: int) -> np.ndarray:
    """(out, size) float32: linear interpolation at pixel centres (align_corners False), edges repeated."""
    at = np.clip((np.arange(out) + 0.5) * size / out - 0.5, 0, size - 1)
    left = np.minimum(at.astype(int), max(size - 2, 0))
    weights = np.zeros((out, size))
    np.add.at(weights, (np.arange(out), left), 1 - (at - left))
    np.add.at(weights, (np.arange(out), np.minimum(left + 1, size - 1)), at - left)
    return _frozen(weights)


def _frozen(weights: np.ndarray) -> np.ndarray:
    weights = weights.astype(np.float32)
    weights.setflags(write=False)  # cached: shared by all callers
    return weights
