"""The check of a whole cohort: every file read, every problem told at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from nibabel.orientations import aff2axcodes

from .data import Progress, Seen, check_grid, known, missing, seen_now, spacing
from .errors import PhmdiffError
from .grid import BODY_HU, HU_CONTRASTS, foreground_mask
from .layouts import CONTRASTS, LABELS, Cohort
from .mha import read_scan
from .nifti import Volume
from .splits import fingerprint, same_scans
from .views import Shown, View


@dataclass
class CheckReport:
    """``rows``: one dict a readable file; ``problems``: everything that must be mended; ``notes``: what to know;
    ``views``: subject -> contrast -> View, where views were asked for; ``seen``: each file's size and time before
    it was read, for ``SliceCache.build``."""

    rows: list[dict]
    problems: list[PhmdiffError]
    notes: list[str]
    views: dict[str, dict[str, View]] = field(default_factory=dict)
    seen: dict[Path, Seen | None] = field(default_factory=dict)

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


def check_cohort(
    cohort: Cohort,
    *,
    contrasts: Iterable[str] | None = None,
    subjects: Iterable[str] | None = None,
    nan: str = "raise",
    max_gib: float = 2.0,
    views: bool = False,
    progress: Progress | None = None,
) -> CheckReport:
    """Read every file (of ``contrasts`` and the labels, where given) and tell all problems at once.

    rows : subject, contrast, shape (file's own order), spacing (mm), orientation (axis codes),
        min, max, foreground (share of the voxels)
    nan, max_gib : as of ``nifti.read_volume``; voxels that were set to 0 are a note
    views : also make a View of every scan that can be read, one slice for all of a subject: that with
        the most foreground in its first contrast. Only these small pictures are kept.
    Without ``contrasts``, one that only some subjects have is a note; so is a CT that looks as if its
    values were not HU. The same scan under two subjects is the problem LEAK, also where it is mirrored,
    rescaled or called another contrast: one of them could end up in training and the other in the test.
    Raises PhmdiffError SUBJECT_UNKNOWN (exit 2) for ``subjects`` the cohort does not have.
    """
    ids = sorted(cohort.files if subjects is None else known(cohort, subjects))
    contrasts = None if contrasts is None else list(contrasts)
    report = CheckReport([], [], [])
    prints: list[tuple[str, str, np.ndarray]] = []
    for done, subject in enumerate(ids, 1):
        files = cohort.files[subject]
        if contrasts is not None:
            if gap := missing(cohort, subject, contrasts):
                report.problems.append(gap)
            files = {name: path for name, path in files.items() if name in contrasts or name in LABELS}
        prints += _check_subject(subject, files, report, views, {"nan": nan, "max_gib": max_gib})
        if progress:
            progress(done, len(ids), subject)
    report.problems.extend(_leaks(prints, cohort))
    if contrasts is None:
        for contrast in CONTRASTS:
            lacking = [subject for subject in ids if contrast not in cohort.files[subject]]
            if 0 < len(lacking) < len(ids):
                report.notes.append(f"{len(lacking)} of {len(ids)} subjects have no {contrast}: {', '.join(lacking)}")
    return report


def _check_subject(subject: str, files: dict[str, Path], report: CheckReport, views: bool, how: dict) -> list[tuple]:
    """Add a subject's rows, problems, notes and views; (subject, contrast, fingerprint) of its images."""
    first: tuple[str, Volume] | None = None
    mask: Volume | None = None
    shown: Shown | None = None
    rows, prints, made = [], [], {}
    # The mask comes first, as it gives the foreground; the other labels last, as an image chooses the slice.
    for contrast in sorted(files, key=lambda name: (name != "mask", name in LABELS)):
        volume = None
        report.seen[files[contrast]] = seen_now(files[contrast])
        try:
            volume = read_scan(files[contrast], allow_constant=contrast in LABELS, **how)
            if first is None:
                first = contrast, volume
            check_grid(first[1], volume, subject, first[0], contrast)
            given = volume if contrast == "mask" else mask
            foreground = foreground_mask(volume.voxels, given and given.voxels, hu=contrast in HU_CONTRASTS)
        except PhmdiffError as problem:
            report.problems.append(problem.located(subject=subject, contrast=contrast, file=files[contrast]))
            if views and volume is not None:  # a pair that does not fit is what the views are for
                if shown is None and contrast not in LABELS:
                    shown = Shown(volume, foreground_mask(volume.voxels, hu=contrast in HU_CONTRASTS))
                if shown is not None:
                    made[contrast] = shown.view(contrast, volume)
            continue
        if contrast == "mask":
            mask = volume
        elif contrast not in LABELS:
            prints.append((subject, contrast, fingerprint(volume.voxels)))
            if views and shown is None:
                shown = Shown(volume, foreground)
        if views and shown is not None:
            made[contrast] = shown.view(contrast, volume)
        row = {
            "subject": subject, "contrast": contrast, "shape": volume.grid.shape,
            "spacing": spacing(volume.grid.affine), "orientation": "".join(aff2axcodes(volume.grid.affine)),
            "min": float(volume.voxels.min()), "max": float(volume.voxels.max()),
            "foreground": float(foreground.mean()),
        }  # fmt: skip
        rows.append(row)
        if volume.zeroed:
            report.notes.append(f"{subject}/{contrast}: {volume.zeroed} NaN or Inf voxels are taken as 0")
        if contrast in HU_CONTRASTS and (row["min"] > BODY_HU or row["max"] - row["min"] < 50):
            report.notes.append(f"{subject}/{contrast} runs from {row['min']:g} to {row['max']:g}, which does not look "
                                "like HU (air is -1000), but is scaled and outlined as HU")  # fmt: skip
    if shown is not None and mask is not None:
        made["mask"] = shown.view("mask", mask)
    if made:
        report.views[subject] = dict(sorted(made.items()))
    report.rows.extend(sorted(rows, key=lambda row: (row["contrast"] != "mask", row["contrast"])))
    return prints


def _leaks(prints: list[tuple[str, str, np.ndarray]], cohort: Cohort) -> list[PhmdiffError]:
    """One problem for each scan that another subject has too, naming the first of them."""
    found = {}
    for i, j, correlation in same_scans([one[2] for one in prints], [one[0] for one in prints]):
        (subject, contrast, _), (other, other_contrast, _) = prints[j], prints[i]
        what = f"looks like the same scan as {other}/{other_contrast} (correlation {correlation:.4f})"
        found.setdefault(j, PhmdiffError("LEAK", what, "keep one of the two subjects", subject=subject,
                                         contrast=contrast, file=cohort.files[subject][contrast]))  # fmt: skip
    return [found[j] for j in sorted(found)]
