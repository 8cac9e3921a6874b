"""Who is in which part: splits by subject, never by slice, and the search for one scan under two names."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from .errors import USAGE, PhmdiffError
from .layouts import read_text, refuse_unknown

PARTS = ("train", "val", "test")
SHAPE = 'write it as {"train": ["id", ...], "val": [...], "test": [...]} or a .csv with the columns subject,part'

CELLS = 16  # of a fingerprint, on each axis
REACH = 2.25  # standard deviations on each side of the centre: a solid ball ends at sqrt(5)
BACKGROUND = 0.2
FLIPS = [axes for count in range(4) for axes in combinations(range(3), count)]  # a header may mirror any axes
ROWS = 512  # fingerprints compared at once with all others
# Correlation of two fingerprints from which on they are one scan. Measured on 11 people and 4 averages: two
# people at most 0.972, two averages (of partly the same people) 0.997; copies in 64 grey levels, or with noise
# of 1 % of their standard deviation, at least 0.9996.
SAME_SCAN = 0.9995


# ---------------------------------------------------------------- splits


def make_split(ids: Iterable[str], seed: int = 0) -> dict[str, list[str]]:
    """About 70 / 10 / 20 % of the subjects as ``{"train", "val", "test"}``, each sorted.

    A pure function of the ids and the seed: subjects are ordered by a hash of both. With 3 or more
    none of the lists is empty; with 2 val is. Raises PhmdiffError (exit 3): TOO_FEW below 2
    subjects, LEAK for an id given twice.
    """
    order = _hashed(_once(ids), str(seed))
    test = max(1, round(0.2 * len(order)))
    val = max(1, round(0.1 * len(order))) if len(order) > 2 else 0
    return _parts(order[test + val :], order[test : test + val], order[:test])


def make_fold(ids: Iterable[str], fold: int, folds: int, seed: int = 0) -> dict[str, list[str]]:
    """Fold ``fold`` (0 .. folds - 1) of a cross-validation as ``{"train", "val", "test"}``, each sorted.

    Over all folds every subject is in the test exactly once, and the tests' sizes differ by at most
    one. val is about 10 % of the rest, at least one where the rest has 3. A pure function of the ids
    and the numbers. Raises PhmdiffError: FOLDS (exit 2) for folds < 2 or a fold outside; TOO_FEW
    (exit 3) for more folds than subjects; LEAK (exit 3) for an id given twice.
    """
    if folds < 2:
        raise PhmdiffError("FOLDS", f"{folds} folds are no cross-validation", "give at least 2", exit_code=USAGE)
    if not 0 <= fold < folds:
        raise PhmdiffError("FOLDS", f"there is no fold {fold} of {folds}", f"give one from 0 to {folds - 1}",
                           exit_code=USAGE)  # fmt: skip
    order = _hashed(_once(ids), str(seed))
    if folds > len(order):
        raise PhmdiffError("TOO_FEW", f"{len(order)} subjects cannot be split into {folds} folds",
                           "give more subjects or fewer folds")  # fmt: skip
    test = order[fold::folds]
    rest = _hashed(set(order) - set(test), f"{seed}/{fold}")  # an order of its own: other people watch each fold
    val = max(1, round(0.1 * len(rest))) if len(rest) > 2 else 0
    return _parts(rest[val:], rest[:val], test)


def _once(ids: Iterable[str]) -> list[str]:
    ids = list(ids)
    if len(set(ids)) < len(ids):
        raise PhmdiffError("LEAK", "a subject is named twice", "name each subject once")
    if len(ids) < 2:
        raise PhmdiffError("TOO_FEW", f"{len(ids)} subjects cannot be split into training and test",
                           "give at least 2 subjects")  # fmt: skip
    return ids


def _hashed(ids: Iterable[str], salt: str) -> list[str]:
    return sorted(ids, key=lambda subject: hashlib.sha256(f"{salt}:{subject}".encode()).digest())


def _parts(*lists: list[str]) -> dict[str, list[str]]:
    return {part: sorted(one) for part, one in zip(PARTS, lists, strict=True)}


def read_split(path: str | Path, ids: Iterable[str]) -> dict[str, list[str]]:
    """A split from a file; val and test may be left out, each list comes back sorted.

    JSON ``{"train": [ids], "val": [ids], "test": [ids]}``, or a .csv with the columns subject and
    part (train, val or test; more columns are ignored). Raises PhmdiffError: SPLIT_FILE (exit 2) for
    anything else or an empty train; SUBJECT_UNKNOWN (exit 2) for subjects that are not among
    ``ids``; LEAK (exit 3) for a subject in two lists.
    """
    path = Path(path)
    text = read_text(path, "SPLIT_FILE", "SPLIT_FILE", exit_code=USAGE)
    found = (_csv_parts if path.suffix.lower() == ".csv" else _json_parts)(text, path)
    if not found.get("train"):
        raise PhmdiffError("SPLIT_FILE", "has nobody in train", SHAPE, exit_code=USAGE, file=path)
    split = _parts(*(found.get(part, []) for part in PARTS))
    every = [subject for part in PARTS for subject in split[part]]
    refuse_unknown(every, ids, path)
    seen: set[str] = set()
    twice = sorted({subject for subject in every if subject in seen or seen.add(subject)})
    if twice:
        raise PhmdiffError("LEAK", f"named more than once: {', '.join(twice)}", "put each subject into one list",
                           file=path)  # fmt: skip
    return split


def _json_parts(text: str, path: Path) -> dict[str, list[str]]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise PhmdiffError("SPLIT_FILE", f"is no JSON ({problem})", SHAPE, exit_code=USAGE, file=path) from None
    right = (
        isinstance(found, dict)
        and set(found) <= set(PARTS)
        and all(isinstance(part, list) and all(isinstance(one, str) for one in part) for part in found.values())
    )
    if not right:
        raise PhmdiffError("SPLIT_FILE", "is no split", SHAPE, exit_code=USAGE, file=path)
    return found


def _csv_parts(text: str, path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    try:
        table = csv.DictReader(io.StringIO(text), strict=True)
        columns = table.fieldnames or []
        if not {"subject", "part"} <= set(columns):
            raise PhmdiffError("SPLIT_FILE", f"the first line {columns!r} lacks a column",
                               "begin it with subject,part", exit_code=USAGE, file=path)  # fmt: skip
        for row in table:
            subject, part = ((row[column] or "").strip() for column in ("subject", "part"))
            if part not in PARTS:
                raise PhmdiffError("SPLIT_FILE", f"line {table.line_num} has the part {part!r}",
                                   "write train, val or test", exit_code=USAGE, file=path)  # fmt: skip
            found.setdefault(part, []).append(subject)
    except csv.Error as problem:
        raise PhmdiffError("SPLIT_FILE", f"is no CSV ({problem})", "correct that line",
                           exit_code=USAGE, file=path) from None  # fmt: skip
    return found


# ---------------------------------------------------------------- one scan under two names


def fingerprint(voxels: np.ndarray) -> np.ndarray:
    """A scan (X, Y, Z) in RAS as (4096,) float32 of mean 0 and norm 1; zeros for a constant scan.

    Means over 16^3 cells of a box about the centre of what is brighter than the background, 2.25 of
    its standard deviations to each side. Nothing here jumps, so a copy with a*x + b (a > 0), rounded
    to another type, or cut or padded where it equals its minimum, has the same fingerprint to within
    the rounding; a mirrored copy has the mirrored one.
    """
    bright = np.subtract(voxels, voxels.min(), dtype=np.float32)
    mean = bright.mean(dtype=np.float64)
    if not mean > 0:
        return np.zeros(CELLS**3, np.float32)
    # A share of the mean weighted by brightness: unlike the plain mean it does not fall with more background.
    background = BACKGROUND * np.square(bright).mean(dtype=np.float64) / mean
    np.maximum(bright - np.float32(background), 0, out=bright)
    cells = [_cells(bright.sum(axis=tuple({0, 1, 2} - {axis}), dtype=np.float64)) for axis in range(3)]
    for axis, weights in enumerate(cells):
        bright = np.moveaxis(np.tensordot(weights, bright, (1, axis)), 0, axis)
    flat = bright.ravel().astype(np.float64)
    flat -= flat.mean()
    norm = np.linalg.norm(flat)
    return (flat / norm if norm > 0 else flat).astype(np.float32)


def _cells(mass: np.ndarray) -> np.ndarray:
    """(CELLS, n): the share of each cell that each voxel of an axis takes; ``mass`` (n,) is what lies at each."""
    at = np.arange(len(mass))
    centre = (at * mass).sum() / mass.sum()
    spread = np.sqrt(((at - centre) ** 2 * mass).sum() / mass.sum() + 1 / 12)  # a voxel has a width too
    edges = centre + REACH * spread * np.linspace(-1, 1, CELLS + 1)
    overlap = np.minimum(edges[1:, None], at + 0.5) - np.maximum(edges[:-1, None], at - 0.5)
    return (np.maximum(overlap, 0) / (edges[1] - edges[0])).astype(np.float32)


def same_scans(prints: Sequence[np.ndarray], owners: Sequence[str]) -> list[tuple[int, int, float]]:
    """(i, j, correlation) for i < j: pairs of fingerprints that are one scan, mirrored or not, of two owners.

    ``prints``: n arrays (4096,); ``owners``: who each belongs to. O(n^2), but in 64 numbers each, a
    bound that lets every pair sought pass; the 4096 are compared only where it does.
    """
    known = [i for i, one in enumerate(prints) if one.any()]
    if not known:
        return []
    names = np.unique([owners[i] for i in known], return_inverse=True)[1]
    cubes = np.stack([prints[i] for i in known]).reshape(-1, CELLS, CELLS, CELLS)
    coarse = cubes.reshape(-1, *(4, CELLS // 4) * 3).mean((2, 4, 6)) * np.float32((CELLS / 4) ** 1.5)
    # Means over blocks, orthonormal: two points lie no further apart there than in full. Two more
    # columns make the product -1/2 of the squared distance.
    half = np.square(coarse).reshape(len(coarse), -1).sum(1, keepdims=True) / 2
    left = np.hstack([coarse.reshape(len(coarse), -1), -half, np.ones_like(half)])
    best: dict[tuple[int, int], float] = {}
    for flip in FLIPS:
        mirrored = np.flip(coarse, tuple(axis + 1 for axis in flip)).reshape(len(coarse), -1)
        right = np.hstack([mirrored, np.ones_like(half), -half])
        for start in range(0, len(known), ROWS):
            near = left[start : start + ROWS] @ right[start:].T >= SAME_SCAN - 1 - 1e-5
            for i, j in start + np.argwhere(near):
                if i >= j or names[i] == names[j]:
                    continue
                correlation = float(np.vdot(cubes[i], np.flip(cubes[j], flip)))
                if correlation >= SAME_SCAN:
                    pair = known[i], known[j]
                    best[pair] = max(best.get(pair, 0.0), min(correlation, 1.0))
    return [(i, j, correlation) for (i, j), correlation in sorted(best.items())]
