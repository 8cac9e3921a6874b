"""The scans of a cohort -> Subject; the check of all of them; splits by subject."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nibabel.orientations import aff2axcodes

from .config import DataConfig
from .errors import USAGE, DataErrors, PhmdiffError
from .grid import foreground_mask
from .layouts import CONTRASTS, LABELS, Cohort, discover, read_text
from .nifti import Grid, Volume, read_volume

TOLERANCE_MM = 1e-3

__all__ = [
    "CONTRASTS", "CheckReport", "Cohort", "Progress", "Subject", "check_cohort", "discover",
    "load_subject", "make_split", "read_split", "select_subjects",
]  # fmt: skip

Progress = Callable[[int, int, str], None]  # (subjects done, subjects in all, the one just done)


@dataclass
class Subject:
    """One person's scans on one grid.

    images : contrast -> (X, Y, Z) float32 in RAS, raw intensities
    affine : (4, 4) voxel -> mm, RAS
    grid : the file's own grid of the contrast the foreground comes from
    foreground : (X, Y, Z) bool
    seg : (X, Y, Z) int16 labels, or None
    """

    id: str
    images: dict[str, np.ndarray]
    affine: np.ndarray
    grid: Grid
    foreground: np.ndarray
    seg: np.ndarray | None = None


@dataclass
class CheckReport:
    """``rows``: one dict a readable file; ``problems``: everything that must be mended; ``notes``: what to know."""

    rows: list[dict]
    problems: list[PhmdiffError]
    notes: list[str]

    def table(self) -> str:
        """The rows as aligned text, a line a file."""
        heads = ("subject", "contrast", "shape", "spacing mm", "axes", "min", "max", "foreground")
        lines = [heads]
        for row in self.rows:
            shape, spacing = ("x".join(f"{v:g}" for v in row[key]) for key in ("shape", "spacing"))
            values = (f"{row['min']:g}", f"{row['max']:g}", f"{100 * row['foreground']:.0f} %")
            lines.append((row["subject"], row["contrast"], shape, spacing, row["orientation"], *values))
        widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
        return "\n".join("  ".join(v.ljust(w) for v, w in zip(line, widths, strict=True)).rstrip() for line in lines)


# ---------------------------------------------------------------- one subject


def load_subject(
    cohort: Cohort,
    subject_id: str,
    contrasts: Iterable[str],
    *,
    foreground_from: str,
    with_seg: bool = True,
    nan: str = "raise",
    allow_constant: bool = False,
) -> Subject:
    """Read the ``contrasts`` of one subject, and its mask and seg where it has them.

    The foreground is the mask's, else that of ``images[foreground_from]``. At test time only
    sources exist: name the first source in training too, so that both see the same foreground.

    Raises PhmdiffError (exit 3) with subject, contrast and file: MISSING_CONTRAST, GRID_MISMATCH
    (shape or affine differ by more than 1e-3 mm at a corner; nothing is resampled silently), or a
    code of ``nifti.read_volume``; ValueError if ``foreground_from`` is not among ``contrasts``.
    """
    contrasts = list(dict.fromkeys(contrasts))
    if foreground_from not in contrasts:
        raise ValueError(f"foreground_from={foreground_from!r} is not among {contrasts}")
    _known(cohort, [subject_id])
    files = cohort.files[subject_id]
    if gap := _gap(cohort, subject_id, contrasts):
        raise gap

    def read(contrast: str) -> Volume:
        try:
            volume = read_volume(files[contrast], nan=nan, allow_constant=allow_constant or contrast in LABELS)
        except PhmdiffError as problem:
            raise problem.located(subject=subject_id, contrast=contrast) from None
        if contrast != foreground_from:
            _check_grid(first, volume, subject_id, foreground_from, contrast)
        return volume

    first = read(foreground_from)
    images = {contrast: (first if contrast == foreground_from else read(contrast)).voxels for contrast in contrasts}
    mask = read("mask").voxels if "mask" in files else None
    try:
        foreground = foreground_mask(first.voxels, mask)
    except PhmdiffError as problem:
        raise problem.located(subject=subject_id, contrast="mask", file=files["mask"]) from None
    seg = np.rint(read("seg").voxels).astype(np.int16) if with_seg and "seg" in files else None
    return Subject(subject_id, images, first.affine, first.grid, foreground, seg)


def _gap(cohort: Cohort, subject: str, contrasts: Iterable[str]) -> PhmdiffError | None:
    files = cohort.files[subject]
    missing = [contrast for contrast in contrasts if contrast not in files]
    if not missing:
        return None
    return PhmdiffError("MISSING_CONTRAST", f"has no {', '.join(missing)}; it has {', '.join(files)}",
                        "add the scan or leave this subject out", subject=subject)  # fmt: skip


def _check_grid(first: Volume, other: Volume, subject: str, first_name: str, name: str) -> None:
    """Raise GRID_MISMATCH unless both volumes lie on one grid in RAS; the files' own voxel order may differ."""
    shapes = first.voxels.shape, other.voxels.shape
    if shapes[0] != shapes[1]:
        what = f"has the shape {shapes[1]}, {first_name} has {shapes[0]} (RAS)"
    else:
        corners = np.array([(*corner, 1) for corner in np.ndindex(2, 2, 2)]) * [*np.subtract(shapes[0], 1), 1]
        gap = np.linalg.norm(corners @ (first.affine - other.affine).T, axis=1).max()
        if gap <= TOLERANCE_MM:
            return
        a, b = (f"voxels {_spacing(v.affine)} mm, origin {_round(v.affine[:3, 3])} mm" for v in (first, other))
        what = f"lies up to {gap:.4g} mm off {first_name}: {b}, but {first_name} has {a}"
    raise PhmdiffError("GRID_MISMATCH", what, "resample one onto the grid of the other",
                       subject=subject, contrast=name, file=other.path)  # fmt: skip


def _spacing(affine: np.ndarray) -> tuple[float, ...]:
    return _round(np.linalg.norm(affine[:3, :3], axis=0))


def _round(values) -> tuple[float, ...]:
    return tuple(round(float(value), 4) for value in values)


# ---------------------------------------------------------------- a whole cohort


def check_cohort(
    cohort: Cohort,
    *,
    contrasts: Iterable[str] | None = None,
    subjects: Iterable[str] | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Read every file (of ``contrasts`` and the labels, where given) and tell all problems at once.

    rows : subject, contrast, shape (file's own order), spacing (mm), orientation (axis codes),
        min, max, foreground (share of the voxels)
    Without ``contrasts``, one that only some subjects have is a note. The same voxels under two
    subjects are the problem LEAK: one of them could end up in training and the other in the test.
    Raises PhmdiffError SUBJECT_UNKNOWN (exit 2) for ``subjects`` the cohort does not have.
    """
    ids = sorted(cohort.files if subjects is None else _known(cohort, subjects))
    contrasts = None if contrasts is None else list(contrasts)
    report = CheckReport([], [], [])
    owners: dict[bytes, tuple[str, str]] = {}
    for done, subject in enumerate(ids, 1):
        files = cohort.files[subject]
        if contrasts is not None:
            if gap := _gap(cohort, subject, contrasts):
                report.problems.append(gap)
            files = {name: path for name, path in files.items() if name in contrasts or name in LABELS}
        _check_subject(subject, files, report, owners)
        if progress:
            progress(done, len(ids), subject)
    if contrasts is None:
        for contrast in CONTRASTS:
            lacking = [subject for subject in ids if contrast not in cohort.files[subject]]
            if 0 < len(lacking) < len(ids):
                report.notes.append(f"{len(lacking)} of {len(ids)} subjects have no {contrast}: {', '.join(lacking)}")
    return report


def _check_subject(subject: str, files: dict[str, Path], report: CheckReport, owners: dict) -> None:
    first: tuple[str, Volume] | None = None
    mask = None
    for contrast in sorted(files, key=lambda name: name != "mask"):  # the mask comes first, as it gives the foreground
        try:
            volume = read_volume(files[contrast], allow_constant=contrast in LABELS)
            if first is None:
                first = contrast, volume
            _check_grid(first[1], volume, subject, first[0], contrast)
            foreground = foreground_mask(volume.voxels, volume.voxels if contrast == "mask" else mask)
        except PhmdiffError as problem:
            report.problems.append(problem.located(subject=subject, contrast=contrast, file=files[contrast]))
            continue
        if contrast == "mask":
            mask = volume.voxels
        elif contrast not in LABELS and (leak := _leak(volume, subject, contrast, owners)):
            report.problems.append(leak)
        report.rows.append({
            "subject": subject, "contrast": contrast, "shape": volume.grid.shape,
            "spacing": _spacing(volume.grid.affine), "orientation": "".join(aff2axcodes(volume.grid.affine)),
            "min": float(volume.voxels.min()), "max": float(volume.voxels.max()),
            "foreground": float(foreground.mean()),
        })  # fmt: skip


def _leak(volume: Volume, subject: str, contrast: str, owners: dict) -> PhmdiffError | None:
    digest = hashlib.sha256(repr(volume.voxels.shape).encode() + volume.voxels.tobytes()).digest()
    other = owners.setdefault(digest, (subject, contrast))
    if other[0] == subject:
        return None
    return PhmdiffError("LEAK", f"has the same voxels as {other[0]}/{other[1]}", "keep one of the two subjects",
                        subject=subject, contrast=contrast, file=volume.path)  # fmt: skip


def select_subjects(cohort: Cohort, data_config: DataConfig, ids: Iterable[str] | None = None) -> list[str]:
    """Those of ``ids`` (default: all) that have every source and the target, sorted.

    Raises DataErrors with every gap (MISSING_CONTRAST, exit 3) unless ``data_config.skip_incomplete``,
    and then if nobody is left; SUBJECT_UNKNOWN (exit 2) for ids the cohort does not have.
    """
    ids = sorted(set(cohort.files if ids is None else _known(cohort, ids)))
    wanted = [*data_config.sources, data_config.target]
    gaps = {subject: gap for subject in ids if (gap := _gap(cohort, subject, wanted))}
    if gaps and (not data_config.skip_incomplete or len(gaps) == len(ids)):
        raise DataErrors(list(gaps.values()))
    return [subject for subject in ids if subject not in gaps]


def _known(cohort: Cohort, ids: Iterable[str]) -> list[str]:
    ids = list(ids)
    _refuse_unknown(ids, cohort.files, cohort.root)
    return ids


def _refuse_unknown(ids: Iterable[str], known: Iterable[str], file) -> None:
    known = sorted(known)
    unknown = [subject for subject in ids if subject not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        cure = f"did you mean {close[0]!r}?" if close else f"there are {len(known)}: {', '.join(known[:8])}" + (
            " ..." if len(known) > 8 else "")  # fmt: skip
        raise PhmdiffError("SUBJECT_UNKNOWN", f"unknown subjects: {', '.join(map(repr, unknown[:20]))}", cure,
                           exit_code=USAGE, file=file)  # fmt: skip


# ---------------------------------------------------------------- splits


def make_split(ids: Iterable[str], seed: int = 0) -> dict[str, list[str]]:
    """About 70 / 10 / 20 % of the subjects as ``{"train", "val", "test"}``, each sorted.

    A pure function of the ids and the seed: subjects are ordered by a hash of both. With 3 or more
    none of the lists is empty; with 2 val is. Raises PhmdiffError (exit 3): TOO_FEW below 2
    subjects, LEAK for an id given twice.
    """
    ids = list(ids)
    if len(set(ids)) < len(ids):
        raise PhmdiffError("LEAK", "a subject is named twice", "name each subject once")
    if len(ids) < 2:
        raise PhmdiffError("TOO_FEW", f"{len(ids)} subjects cannot be split into training and test",
                           "give at least 2 subjects")  # fmt: skip
    order = sorted(ids, key=lambda subject: hashlib.sha256(f"{seed}:{subject}".encode()).digest())
    test = max(1, round(0.2 * len(ids)))
    val = max(1, round(0.1 * len(ids))) if len(ids) > 2 else 0
    return {"train": sorted(order[test + val :]), "val": sorted(order[test : test + val]), "test": sorted(order[:test])}


def read_split(path: str | Path, ids: Iterable[str]) -> dict[str, list[str]]:
    """A split from a JSON file ``{"train": [ids], "val": [ids], "test": [ids]}``; val and test may be left out.

    Raises PhmdiffError: SPLIT_FILE (exit 2) for anything else or an empty train; SUBJECT_UNKNOWN
    (exit 2) for subjects that are not among ``ids``; LEAK (exit 3) for a subject in two lists.
    """
    path = Path(path)
    shape = 'write it as {"train": ["id", ...], "val": [...], "test": [...]}, train not empty'
    text = read_text(path, "SPLIT_FILE", "SPLIT_FILE", exit_code=USAGE)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise PhmdiffError("SPLIT_FILE", f"is no JSON ({problem})", shape, exit_code=USAGE, file=path) from None
    parts = ("train", "val", "test")
    right = (
        isinstance(found, dict)
        and set(found) <= set(parts)
        and all(isinstance(part, list) and all(isinstance(one, str) for one in part) for part in found.values())
        and found.get("train")
    )
    if not right:
        raise PhmdiffError("SPLIT_FILE", "is no split", shape, exit_code=USAGE, file=path)
    split = {part: sorted(found.get(part, [])) for part in parts}
    every = [subject for part in parts for subject in split[part]]
    _refuse_unknown(every, ids, path)
    twice = sorted({subject for subject in every if every.count(subject) > 1})
    if twice:
        raise PhmdiffError("LEAK", f"named more than once: {', '.join(twice)}", "put each subject into one list",
                           file=path)  # fmt: skip
    return split
