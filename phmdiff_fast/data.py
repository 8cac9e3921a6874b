"""The scans of a cohort -> Subject, and who has all that is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .config import DataConfig
from .errors import DataErrors, PhmdiffError
from .grid import HU_CONTRASTS, foreground_mask
from .layouts import CONTRASTS, LABELS, Cohort, discover, refuse_unknown
from .mha import read_scan
from .nifti import Grid, Volume
from .splits import make_fold, make_split, read_split

TOLERANCE_MM = 1e-3

__all__ = [
    "CONTRASTS", "Cohort", "Progress", "Subject", "discover", "load_subject", "make_fold", "make_split",
    "read_split", "select_subjects", "subject_of",
]  # fmt: skip

Progress = Callable[[int, int, str], None]  # (subjects done, subjects in all, the one just done)
Seen = tuple[int, int]  # a file's size in bytes and its time in ns, by which a later change is noticed


@dataclass
class Subject:
    """One person's scans on one grid.

    images : contrast -> (X, Y, Z) float32 in RAS, raw intensities
    affine : (4, 4) voxel -> mm, RAS
    grid : the file's own grid of the contrast the foreground comes from
    foreground : (X, Y, Z) bool
    seg : (X, Y, Z) int16 labels, or None
    masked : whether a mask file gave the foreground
    """

    id: str
    images: dict[str, np.ndarray]
    affine: np.ndarray
    grid: Grid
    foreground: np.ndarray
    seg: np.ndarray | None = None
    masked: bool = False


def load_subject(
    cohort: Cohort,
    subject_id: str,
    contrasts: Iterable[str],
    *,
    foreground_from: str,
    with_seg: bool = True,
    nan: str = "raise",
    allow_constant: bool = False,
    max_gib: float = 2.0,
) -> Subject:
    """Read the ``contrasts`` of one subject, and its mask and seg where it has them.

    nan, allow_constant, max_gib : as of ``nifti.read_volume``; labels may be constant in any case

    The foreground is the mask's, else that of ``images[foreground_from]`` (body in a CT or CBCT). At
    test time only sources exist: name the first source in training too, so that both see the same.

    Raises PhmdiffError (exit 3) with subject, contrast and file: MISSING_CONTRAST, GRID_MISMATCH
    (shape or affine differ by more than 1e-3 mm at a corner; nothing is resampled silently), or a
    code of ``mha.read_scan``; ValueError if ``foreground_from`` is not among ``contrasts``.
    """
    contrasts = list(dict.fromkeys(contrasts))
    if foreground_from not in contrasts:
        raise ValueError(f"foreground_from={foreground_from!r} is not among {contrasts}")
    known(cohort, [subject_id])
    files = cohort.files[subject_id]
    if gap := missing(cohort, subject_id, contrasts):
        raise gap

    def read(contrast: str) -> Volume:
        try:
            volume = read_scan(files[contrast], nan=nan, allow_constant=allow_constant or contrast in LABELS,
                               max_gib=max_gib)  # fmt: skip
        except PhmdiffError as problem:
            raise problem.located(subject=subject_id, contrast=contrast) from None
        return volume

    wanted = [*contrasts, *(name for name in ("mask", "seg") if name in files and (name == "mask" or with_seg))]
    return subject_of(subject_id, {name: read(name) for name in wanted}, foreground_from=foreground_from)


def subject_of(subject_id: str, volumes: dict[str, Volume], *, foreground_from: str) -> Subject:
    """One person's volumes (contrasts, and ``mask`` and ``seg`` where there are any) as a Subject.

    Raises PhmdiffError GRID_MISMATCH, NO_FOREGROUND (an empty mask) with subject, contrast and file.
    """
    first, mask, seg = volumes[foreground_from], volumes.get("mask"), volumes.get("seg")
    for name, volume in volumes.items():
        check_grid(first, volume, subject_id, foreground_from, name)
    try:
        foreground = foreground_mask(first.voxels, mask and mask.voxels, hu=foreground_from in HU_CONTRASTS)
    except PhmdiffError as problem:
        raise problem.located(subject=subject_id, contrast="mask", file=mask and mask.path) from None
    images = {name: volume.voxels for name, volume in volumes.items() if name not in LABELS}
    labels = None if seg is None else np.rint(seg.voxels.clip(-32768, 32767)).astype(np.int16)
    return Subject(subject_id, images, first.affine, first.grid, foreground, labels, mask is not None)


def missing(cohort: Cohort, subject: str, contrasts: Iterable[str]) -> PhmdiffError | None:
    """The error MISSING_CONTRAST that names all of ``contrasts`` the subject has no file of, or None."""
    files = cohort.files[subject]
    absent = [contrast for contrast in contrasts if contrast not in files]
    if not absent:
        return None
    return PhmdiffError("MISSING_CONTRAST", f"has no {', '.join(absent)}; it has {', '.join(files)}",
                        "add the scan or leave this subject out", subject=subject)  # fmt: skip


def check_grid(first: Volume, other: Volume, subject: str, first_name: str, name: str) -> None:
    """Raise GRID_MISMATCH unless both volumes lie on one grid in RAS; the files' own voxel order may differ."""
    shapes = first.voxels.shape, other.voxels.shape
    if shapes[0] != shapes[1]:
        what = f"has the shape {shapes[1]}, {first_name} has {shapes[0]} (RAS)"
    else:
        corners = np.array([(*corner, 1) for corner in np.ndindex(2, 2, 2)]) * [*np.subtract(shapes[0], 1), 1]
        gap = np.linalg.norm(corners @ (first.affine - other.affine).T, axis=1).max()
        if gap <= TOLERANCE_MM:
            return
        a, b = (f"voxels {spacing(v.affine)} mm, origin {rounded(v.affine[:3, 3])} mm" for v in (first, other))
        what = f"lies up to {gap:.4g} mm off {first_name}: {b}, but {first_name} has {a}"
    raise PhmdiffError("GRID_MISMATCH", what, "resample one onto the grid of the other",
                       subject=subject, contrast=name, file=other.path)  # fmt: skip


def seen_now(path: Path) -> Seen | None:
    """A file's size and time as they are now; None where there is none."""
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return facts.st_size, facts.st_mtime_ns


def spacing(affine: np.ndarray) -> tuple[float, ...]:
    """Voxel sizes of an affine (4, 4), mm, to four decimals."""
    return rounded(np.linalg.norm(affine[:3, :3], axis=0))


def rounded(values) -> tuple[float, ...]:
    return tuple(round(float(value), 4) for value in values)


def select_subjects(cohort: Cohort, data_config: DataConfig, ids: Iterable[str] | None = None) -> list[str]:
    """Those of ``ids`` (default: all) that have every source and the target, sorted.

    Raises DataErrors with every gap (MISSING_CONTRAST, exit 3) unless ``data_config.skip_incomplete``,
    and then if nobody is left; SUBJECT_UNKNOWN (exit 2) for ids the cohort does not have.
    """
    ids = sorted(set(cohort.files if ids is None else known(cohort, ids)))
    wanted = [*data_config.sources, data_config.target]
    gaps = {subject: gap for subject in ids if (gap := missing(cohort, subject, wanted))}
    if gaps and (not data_config.skip_incomplete or len(gaps) == len(ids)):
        raise DataErrors(list(gaps.values()))
    return [subject for subject in ids if subject not in gaps]


def known(cohort: Cohort, ids: Iterable[str]) -> list[str]:
    """``ids`` as a list. Raises SUBJECT_UNKNOWN (exit 2) for any that the cohort does not have."""
    ids = list(ids)
    refuse_unknown(ids, cohort.files, cohort.root)
    return ids
