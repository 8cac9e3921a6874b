"""Where scans lie: a folder or a CSV list -> Cohort, subject -> contrast -> path. No scan is opened here.

- BraTS 2021 ``<id>/<id>_t1.nii.gz`` and BraTS 2023/24 ``<id>/<id>-t1n.nii.gz``, or the folder of one subject;
- SynthRAD 2023 and 2025 ``<id>/mr.nii.gz``, ``cbct``, ``ct``, ``mask`` (.nii.gz, .nii or .mha; at least one
  that is no mask), with folders as ``Task1/<region>/`` above the subjects' or none, whatever their names;
- a CSV list with the columns ``subject,contrast,path``, for all else. The Gold Atlas pelvis, say, converted
  to .mha (or .nii.gz), with the list beside the folders::

      subject,contrast,path
      1_01_P,t2,1_01_P/t2.mha
      1_01_P,ct,1_01_P/ct.mha

A mask or segmentation counts in all of them.
"""

from __future__ import annotations

import csv
import difflib
import io
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import USAGE, DataErrors, PhmdiffError

LABELS = ("seg", "mask")  # not images: may be constant, are no source and no target
CONTRASTS = ("t1", "t1ce", "t2", "flair", "pd", "mr", "ct", "cbct", *LABELS)
BRATS2023 = {"t1n": "t1", "t1c": "t1ce", "t2w": "t2", "t2f": "flair", "seg": "seg", "mask": "mask"}
SUFFIXES = {"_": ("brats2021", {word: word for word in CONTRASTS}), "-": ("brats2023", BRATS2023)}
FILE_NAME = re.compile(r"(?P<id>.+)(?P<separator>[_-])(?P<word>[a-z0-9]+)\.nii(\.gz)?", re.DOTALL)
SYNTHRAD = re.compile(r"(?P<word>mr|cbct|ct|mask)\.(nii\.gz|nii|mha)")
NOT_DESCENDED = ("overview",)  # SynthRAD's pictures of all subjects
MAX_DEPTH = 4  # folders below the one given, as <archive>/Task1/<region>/<id>
MAX_FOLDERS = 100_000
SUBJECT_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
CSV_COLUMNS = ("subject", "contrast", "path")
MAX_TEXT = 64 << 20  # bytes of a CSV list or split file
MOST_PROBLEMS = 1000  # of a list, told at once
UNDERSTOOD = (
    "give a folder with <id>/<id>_t1.nii.gz (BraTS 2021), <id>/<id>-t1n.nii.gz (BraTS 2023) or "
    "<id>/mr.nii.gz, ct.nii.gz (SynthRAD; .mha too), the folder of one subject, or a .csv list with the "
    "columns subject,contrast,path"
)


@dataclass(frozen=True)
class Cohort:
    """``files``: subject -> contrast -> path, both sorted; ``layout``: brats2021, brats2023, synthrad or csv."""

    root: Path
    layout: str
    files: dict[str, dict[str, Path]]


def discover(path: str | Path) -> Cohort:
    """Find the scans below ``path``; nothing is opened but a CSV list.

    Raises PhmdiffError (exit 3): DATA_EMPTY where no layout fits, DUPLICATE for two files of one
    subject and contrast or one SynthRAD subject in two folders, BAD_ID for a subject name outside
    ``[A-Za-z0-9._-]{1,128}``, UNREADABLE; for a list also CSV_FORMAT and PATH_OUTSIDE (every bad row,
    as DataErrors).
    """
    path = Path(path)
    is_folder = _is_folder(path)
    if path.suffix.lower() == ".csv" and not is_folder:
        return _discover_csv(path)
    if not is_folder:
        what = "is neither a folder nor a .csv list" if path.exists() else "does not exist"
        raise PhmdiffError("DATA_EMPTY", what, UNDERSTOOD, file=path)
    found: dict[str, dict[str, Path]] = {}
    layouts, homes = set(), {}
    for folder, depth, names in _walk(path):
        for name in names:
            match = FILE_NAME.fullmatch(name) if depth <= 1 else None
            if match and (depth == 0 or match["id"] == folder.name):
                layout, words = SUFFIXES[match["separator"]]
                if match["word"] in words:
                    _add(found, match["id"], words[match["word"]], folder / name, folder / name)
                    layouts.add(layout)
        # A mask alone is any other tool's file.
        scans = [(name, match["word"]) for name in names if (match := SYNTHRAD.fullmatch(name))]
        if all(word in LABELS for _, word in scans):
            continue
        subject = _folder_name(folder)
        if subject in homes:
            raise PhmdiffError("DUPLICATE", f"is a second folder of this subject beside {str(homes[subject])!r}",
                               "rename one of them, or give a .csv list", subject=subject, file=folder)  # fmt: skip
        for name, word in scans:
            _add(found, subject, word, folder / name, folder / name)
        homes[subject] = folder
        layouts.add("synthrad")
    if not found:
        raise PhmdiffError("DATA_EMPTY", "holds no scan in a layout that is understood", UNDERSTOOD, file=path)
    return Cohort(path, "+".join(sorted(layouts)), _sorted(found))


def subject_and_contrast(path: Path) -> tuple[str, str | None]:
    """``p1_t1.nii.gz`` -> ("p1", "t1"); ``p1/mr.mha`` -> ("p1", "mr"); no contrast in the name -> (its stem, None)."""
    if match := SYNTHRAD.fullmatch(path.name):
        return _folder_name(path.parent), match["word"]
    match = FILE_NAME.fullmatch(path.name)
    contrast = SUFFIXES[match["separator"]][1].get(match["word"]) if match else None
    if contrast:
        return match["id"], contrast
    return re.sub(r"\.(nii\.gz|nii|mha)$", "", path.name), None


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as problem:  # below a folder that may not be entered
        raise PhmdiffError("UNREADABLE", f"cannot be read ({problem.strerror})", "check the permissions",
                           file=path) from None  # fmt: skip


def _folder_name(folder: Path) -> str:
    return folder.name or Path(os.path.abspath(folder)).name  # "." has no name of its own


def _walk(root: Path) -> Iterator[tuple[Path, int, list[str]]]:
    """(folder, depth below the root, names in it that are no folders), parents first, sorted by name.

    Ends at MAX_DEPTH and at MAX_FOLDERS. A linked folder is looked into, as people link subjects from other
    disks; its folders are too only if it lies inside the root, so that a link to ``/`` ends there.
    """
    inside = os.path.realpath(root)
    level, count = [(root, True)], 0
    for depth in range(MAX_DEPTH + 1):
        below = []
        for folder, descend in level:
            count += 1
            if count > MAX_FOLDERS:
                raise PhmdiffError("DATA_EMPTY", f"has more than {MAX_FOLDERS} folders below it",
                                   "give the folder of the scans themselves", file=root)  # fmt: skip
            folders, names = _listing(folder)
            yield folder, depth, names
            for name, is_link in folders if descend else ():
                if name not in NOT_DESCENDED:
                    outside = is_link and not Path(os.path.realpath(folder / name)).is_relative_to(inside)
                    below.append((folder / name, not outside))
        level = below


def _listing(folder: Path) -> tuple[list[tuple[str, bool]], list[str]]:
    """Sorted: (name, whether it is a link) of the folders in a folder; the names of all else."""
    folders, names = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if os.path.isdir(entry):  # False for a link that leads nowhere or round in a circle
                    folders.append((entry.name, entry.is_symlink()))
                else:
                    names.append(entry.name)
    except OSError as problem:
        raise PhmdiffError("UNREADABLE", f"cannot be listed ({problem.strerror})", "check the permissions",
                           file=folder) from None  # fmt: skip
    return folders, names


def _add(found: dict, subject: str, contrast: str, path: Path, told_by: Path) -> None:
    if not SUBJECT_ID.fullmatch(subject) or subject in (".", ".."):
        raise PhmdiffError("BAD_ID", f"the subject name {subject[:140]!r} is not allowed",
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
                if len(problems) == MOST_PROBLEMS:
                    break
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


def refuse_unknown(ids: Iterable[str], known: Iterable[str], file) -> None:
    """Raise SUBJECT_UNKNOWN (exit 2), with the nearest known name, unless all ``ids`` are ``known``."""
    known = set(known)
    unknown = [subject for subject in ids if subject not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0][:128], sorted(known), n=1)  # it is slow for long texts
        cure = f"did you mean {close[0]!r}?" if close else (
            f"there are {len(known)}: {', '.join(sorted(known)[:8])}" + (" ..." if len(known) > 8 else ""))  # fmt: skip
        named = ", ".join(repr(name[:128]) for name in unknown[:20])
        raise PhmdiffError("SUBJECT_UNKNOWN", f"unknown subjects: {named}", cure, exit_code=USAGE, file=file)
