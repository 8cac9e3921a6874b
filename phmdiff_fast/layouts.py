"""Where scans lie: a folder or a CSV list -> Cohort, subject -> contrast -> path. No scan is opened here.

Layouts: BraTS 2021 ``<id>/<id>_t1.nii.gz``, BraTS 2023/24 ``<id>/<id>-t1n.nii.gz``, the folder of one
subject, or a CSV list ``subject,contrast,path``.
"""

from __future__ import annotations

import csv
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path

from .errors import DataErrors, PhmdiffError

LABELS = ("seg", "mask")  # not images: may be constant, are no source and no target
CONTRASTS = ("t1", "t1ce", "t2", "flair", "pd", "ct", *LABELS)
BRATS2023 = {"t1n": "t1", "t1c": "t1ce", "t2w": "t2", "t2f": "flair", "seg": "seg"}
SUFFIXES = {"_": ("brats2021", {word: word for word in CONTRASTS}), "-": ("brats2023", BRATS2023)}
FILE_NAME = re.compile(r"(?P<id>.+)(?P<separator>[_-])(?P<word>[a-z0-9]+)\.nii(\.gz)?", re.DOTALL)
SUBJECT_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
CSV_COLUMNS = ("subject", "contrast", "path")
MAX_TEXT = 64 << 20  # bytes of a CSV list or split file
UNDERSTOOD = (
    "give a folder with <id>/<id>_t1.nii.gz (BraTS 2021) or <id>/<id>-t1n.nii.gz (BraTS 2023), "
    "the folder of one subject, or a .csv list with the columns subject,contrast,path"
)


@dataclass(frozen=True)
class Cohort:
    """``files``: subject -> contrast -> path, both sorted; ``layout``: brats2021, brats2023 or csv."""

    root: Path
    layout: str
    files: dict[str, dict[str, Path]]


def discover(path: str | Path) -> Cohort:
    """Find the scans below ``path``; nothing is opened but a CSV list.

    Raises PhmdiffError (exit 3): DATA_EMPTY where no layout fits, DUPLICATE for two files of one
    subject and contrast, BAD_ID for a subject name outside ``[A-Za-z0-9._-]{1,128}``, UNREADABLE;
    for a list also CSV_FORMAT and PATH_OUTSIDE (every bad row, as DataErrors).
    """
    path = Path(path)
    if path.suffix.lower() == ".csv" and not path.is_dir():
        return _discover_csv(path)
    if not path.is_dir():
        what = "is neither a folder nor a .csv list" if path.exists() else "does not exist"
        raise PhmdiffError("DATA_EMPTY", what, UNDERSTOOD, file=path)
    found: dict[str, dict[str, Path]] = {}
    layouts = set()
    folders = [(path, None)] + [(entry, entry.name) for entry in _listing(path) if entry.is_dir()]
    for folder, expected_id in folders:
        for entry in _listing(folder):
            match = FILE_NAME.fullmatch(entry.name)
            if match is None or (expected_id is not None and match["id"] != expected_id):
                continue
            layout, words = SUFFIXES[match["separator"]]
            if match["word"] in words:
                _add(found, match["id"], words[match["word"]], entry, entry)
                layouts.add(layout)
    if not found:
        raise PhmdiffError("DATA_EMPTY", "holds no scan in a layout that is understood", UNDERSTOOD, file=path)
    return Cohort(path, "+".join(sorted(layouts)), _sorted(found))


def _listing(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as problem:
        raise PhmdiffError("UNREADABLE", f"cannot be listed ({problem.strerror})", "check the permissions",
                           file=folder) from None  # fmt: skip


def _add(found: dict, subject: str, contrast: str, path: Path, told_by: Path) -> None:
    if not SUBJECT_ID.fullmatch(subject) or subject in (".", ".."):
        raise PhmdiffError("BAD_ID", f"the subject name {subject!r} is not allowed",
                           "use 1 to 128 of the characters A-Z a-z 0-9 . _ -", file=told_by)  # fmt: skip
    contrasts = found.setdefault(subject, {})
    if contrast in contrasts:
        raise PhmdiffError("DUPLICATE", f"is a second file of this contrast beside {contrasts[contrast].name!r}",
                           "keep one of them", subject=subject, contrast=contrast, file=told_by)  # fmt: skip
    contrasts[contrast] = path


def _sorted(found: dict[str, dict[str, Path]]) -> dict[str, dict[str, Path]]:
    return {subject: dict(sorted(found[subject].items())) for subject in sorted(found)}


def _discover_csv(path: Path) -> Cohort:
    text = read_text(path, "UNREADABLE", "CSV_FORMAT")
    root = Path(os.path.realpath(path.parent))
    found: dict[str, dict[str, Path]] = {}
    problems: list[PhmdiffError] = []
    try:
        table = csv.DictReader(io.StringIO(text), strict=True)
        columns = table.fieldnames or []
        if not set(CSV_COLUMNS) <= set(columns):
            raise PhmdiffError("CSV_FORMAT", f"the first line {columns!r} lacks a column",
                               "begin it with " + ",".join(CSV_COLUMNS), file=path)  # fmt: skip
        for row in table:
            try:
                _add_row(found, row, root, path)
            except PhmdiffError as problem:
                problems.append(problem)
    except csv.Error as problem:
        raise PhmdiffError("CSV_FORMAT", f"is no CSV ({problem})", "correct that line", file=path) from None
    if problems:
        raise DataErrors(problems)
    if not found:
        raise PhmdiffError("DATA_EMPTY", "lists no scan", UNDERSTOOD, file=path)
    return Cohort(root, "csv", _sorted(found))


def _add_row(found: dict, row: dict, root: Path, told_by: Path) -> None:
    subject, contrast, name = ((row[column] or "").strip() for column in CSV_COLUMNS)
    if contrast not in CONTRASTS:
        raise PhmdiffError("CSV_FORMAT", f"unknown contrast {contrast!r}", "known: " + ", ".join(CONTRASTS),
                           file=told_by)  # fmt: skip
    outside = PhmdiffError("PATH_OUTSIDE", f"the path {name!r} does not lie inside the list's folder",
                           "write it relative to the list and below it",
                           subject=subject if SUBJECT_ID.fullmatch(subject) else None, contrast=contrast,
                           file=told_by)  # fmt: skip
    if not name or "\0" in name or os.path.isabs(name):
        raise outside
    target = Path(os.path.realpath(root / name))  # follows links, so a link out of the folder is seen
    if not target.is_relative_to(root):
        raise outside
    _add(found, subject, contrast, target, told_by)


def read_text(path: Path, unreadable: str, malformed: str, **how) -> str:
    """A regular UTF-8 file of at most 64 MiB; PhmdiffError with the code ``unreadable`` or ``malformed``."""
    try:
        if not path.is_file():
            raise PhmdiffError(unreadable, "does not exist or is no regular file", "check the path", file=path, **how)
        with open(path, "rb") as file:
            raw = file.read(MAX_TEXT + 1)
    except OSError as problem:
        raise PhmdiffError(unreadable, f"cannot be read ({problem.strerror})", "check the permissions",
                           file=path, **how) from None  # fmt: skip
    if len(raw) > MAX_TEXT:
        raise PhmdiffError(malformed, f"is larger than {MAX_TEXT} bytes", "check the path", file=path, **how)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise PhmdiffError(malformed, f"is no UTF-8 text ({problem.reason} at byte {problem.start})",
                           "save it as UTF-8", file=path, **how) from None  # fmt: skip
