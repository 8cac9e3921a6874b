"""The slice cache on disk, subject by subject, and the stateless order in which its rows are visited.

A folder of four files: ``slices.bin`` float32 (m, contrasts, F, F), raw intensities on the network grid, F = S times
``data.oversample``; ``foreground.bin`` uint8 (n, F, F); ``context.bin`` int32 (n, 2k+1), where in slices.bin a row's
slice and its k neighbours on each side lie; ``index.json``, written last: without it there is no cache. The m
slices are the n rows and those neighbours of theirs that are no rows.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import numpy as np

from .config import DataConfig
from .data import Cohort, Progress, Seen, load_subject, seen_now
from .errors import IO, PhmdiffError
from .files import sha256_of, sync_folder
from .grid import HU_CONTRASTS, InPlane, Scaling, fill_for, neighbours, scaling_for

VERSION = 2
SLICES, FOREGROUND, CONTEXT, INDEX = "slices.bin", "foreground.bin", "context.bin", "index.json"
WITHOUT_EFFECT = {"skip_incomplete", "max_volume_gib"}  # settings the cache does not depend on


class SliceCache:
    """Slices of some subjects along the settings' axis, read from disk as they are asked for.

    ``contrasts``: the sources and then the target; ``subjects``: ids in the order of their rows;
    ``image_size``: S; ``finer``: F / S; ``len(cache)``: number of slices. Processes forked from this one may read
    from it too.
    Raises PhmdiffError CACHE_CHANGED (exit 3) if its files are not those of the index.
    """

    def __init__(self, folder: Path, index: dict):
        size, names = index["settings"]["image_size"], index["contrasts"]
        self.folder, self.contrasts, self.image_size = Path(folder), list(names), size
        self.finer = index["settings"]["oversample"]
        self.subjects = [entry["id"] for entry in index["subjects"]]
        self._rows = {entry["id"]: range(*entry["rows"]) for entry in index["subjects"]}
        self._scaling = {
            entry["id"]: {name: Scaling(*entry["scaling"][name]) for name in names} for entry in index["subjects"]
        }
        shapes = _shapes(index)
        count = shapes[FOREGROUND][0]
        self._count = count
        self._slices = _File(self.folder / SLICES, math.prod(shapes[SLICES]) * 4)
        self._foreground = _File(self.folder / FOREGROUND, math.prod(shapes[FOREGROUND]))
        context = np.empty(shapes[CONTEXT], "<i4")
        _File(self.folder / CONTEXT, context.nbytes).read_rows(np.zeros((1, 1), np.int64), context)
        self._context = context.astype(np.int64)
        self._lo, self._gain = (np.empty((count, len(names), 1, 1), np.float32) for _ in range(2))
        for subject, rows in self._rows.items():
            scalings = self._scaling[subject].values()
            self._lo[rows.start : rows.stop, :, 0, 0] = [scaling.lo for scaling in scalings]
            self._gain[rows.start : rows.stop, :, 0, 0] = [scaling.gain for scaling in scalings]

    def __len__(self) -> int:
        return self._count

    def rows_of(self, subject: str) -> np.ndarray:
        """The rows of one subject, int64, from its lowest kept slice upwards. Raises KeyError if it is not here."""
        return np.arange(self._rows[subject].start, self._rows[subject].stop, dtype=np.int64)

    def scaling(self, subject: str, contrast: str) -> Scaling:
        """The subject's own scaling of a contrast. Raises KeyError if either is not here."""
        return self._scaling[subject][contrast]

    @staticmethod
    def units(contrast: str) -> str:
        """The unit of a contrast's intensities: "HU" for CT and CBCT, else "arbitrary"."""
        return "HU" if contrast in HU_CONTRASTS else "arbitrary"

    def median_p995(self, contrast: str) -> float:
        """Median over the subjects of the scaling's upper end: the 99.5 percentile, or the window's end in HU."""
        return float(np.median([self._scaling[subject][contrast].hi for subject in self.subjects]))

    def batch(self, rows: np.ndarray, *, fine: bool = False) -> dict[str, np.ndarray]:
        """Rows (B,) int64 -> ``sources`` (B, Cs*(2k+1), S, S), ordered as by ``stack_context``, and ``target``
        (B, 1, S, S), both float32, scaled by each scan's own scaling and clipped to [-1, 1], and
        ``foreground`` (B, 1, S, S) bool.

        fine : as ``augment`` takes them, (B, ..., F, F); where that is finer than S, nothing is clipped, as their means
        are what is.

        Raises PhmdiffError CACHE_CHANGED (exit 3) once a file of the cache is cut, deleted or replaced.
        """
        rows = np.asarray(rows, np.int64)
        at, middle, size = self._context[rows], self._context.shape[1] // 2, self.image_size * self.finer
        foreground = np.empty((len(rows), 1, size, size), "u1")
        images = np.empty((*at.shape, len(self.contrasts), size, size), "<f4")
        self._foreground.read_rows((rows % self._count)[:, None], foreground)
        self._slices.read_rows(at, images)  # at: (B, 2k+1)
        if self.finer > 1 and not fine:
            images, foreground = _means(images, self.finer), _means(foreground, self.finer) >= 0.5
            size = self.image_size
        lo, gain, clip = self._lo[rows], self._gain[rows], self.finer == 1 or not fine
        sources = _scaled(images[:, :, :-1].swapaxes(1, 2), lo[:, :-1, None], gain[:, :-1, None], clip)
        target = _scaled(images[:, middle, -1:], lo[:, -1:], gain[:, -1:], clip)
        channels = sources.shape[1] * sources.shape[2]
        return {
            "sources": sources.reshape(len(rows), channels, size, size),
            "target": target,
            "foreground": foreground > 0,
        }

    @classmethod
    def build(
        cls, folder: str | Path, cohort: Cohort, subjects: Iterable[str], data_config: DataConfig, *,
        seen: dict[Path, Seen] | None = None, progress: Progress | None = None,
    ) -> SliceCache:  # fmt: skip
        """Read the subjects one after the other and write the cache, replacing one that is there.

        seen : the ``CheckReport.seen`` of a check; a file that has changed since is refused
        Raises PhmdiffError: what ``load_subject`` and ``fit_scaling`` raise (exit 3), FILE_CHANGED (exit 3),
        NO_SLICES if no slice has ``min_foreground`` (exit 3), CACHE_WRITE (exit 74). Then nothing
        half-written stays.
        """
        folder, subjects = Path(folder), list(subjects)
        contrasts = [*data_config.sources, data_config.target]
        index = {"version": VERSION, "settings": _settings(data_config), "contrasts": contrasts, "subjects": []}
        rows = stored = 0
        with _new_files(folder) as (slices, foreground, context, index_file):
            for done, subject in enumerate(subjects, 1):
                entry, images, inside, near = _prepare(cohort, subject, contrasts, data_config, seen or {})
                slices.write(images.tobytes())
                foreground.write(inside.tobytes())
                context.write((stored + near).astype("<i4").tobytes())
                entry["rows"] = [rows, rows + len(inside)]
                rows, stored = rows + len(inside), stored + len(images)
                index["subjects"].append(entry)
                if progress:
                    progress(done, len(subjects), subject)
            if not rows:
                raise PhmdiffError(
                    "NO_SLICES",
                    f"no slice of {len(subjects)} subjects has a foreground share of {data_config.min_foreground:g}",
                    "lower data.min_foreground", file=cohort.root,
                )  # fmt: skip
            index["stored"] = stored
            index_file.write(json.dumps(index, indent=1).encode())
        return cls(folder, index)

    @classmethod
    def open(cls, folder: str | Path, cohort: Cohort, subjects: Iterable[str], data_config: DataConfig) -> SliceCache:
        """Open the cache if it is that of these subjects, settings and source files.

        Raises PhmdiffError CACHE_STALE (exit 3) saying what differs: a source file counts as changed when
        its size, or its time and its content (SHA-256), differ.
        """
        folder = Path(folder)
        index, reason = _read_index(folder)
        reason = reason or _stale(index, folder, cohort, list(subjects), data_config)
        if reason:
            raise PhmdiffError("CACHE_STALE", reason, "build the cache anew", file=folder)
        return cls(folder, index)

    @classmethod
    def ensure(
        cls, folder: str | Path, cohort: Cohort, subjects: Iterable[str], data_config: DataConfig, *,
        progress: Progress | None = None,
    ) -> tuple[SliceCache, str | None]:  # fmt: skip
        """``open`` where that works (then None), else ``build`` (then why). Raises what ``build`` raises."""
        subjects = list(subjects)
        try:
            return cls.open(folder, cohort, subjects, data_config), None
        except PhmdiffError as problem:
            if problem.code != "CACHE_STALE":
                raise
            return cls.build(folder, cohort, subjects, data_config, progress=progress), problem.what


class _File:
    """A file of a cache, open for reading until this object goes; ``size`` is what it must hold, bytes.

    It is read by position, so that processes that share it do not disturb each other, and not memory-mapped:
    a mapped file that somebody cuts ends the whole process (SIGBUS).
    """

    def __init__(self, path: Path, size: int):
        self.path, self.size, self._handle = path, size, -1
        try:
            self._handle = os.open(path, os.O_RDONLY)
        except OSError as problem:
            raise self._changed(f"cannot be read ({problem.strerror})") from None
        self.check()

    def __del__(self):
        if self._handle >= 0:
            os.close(self._handle)

    def check(self) -> None:
        """Raise CACHE_CHANGED if the file was cut, deleted or replaced since it was opened."""
        facts = os.fstat(self._handle)
        if facts.st_nlink == 0:
            raise self._changed("was deleted or replaced while it is in use")
        if facts.st_size != self.size:
            raise self._changed(f"has {facts.st_size} of its {self.size} bytes")

    def read_rows(self, rows: np.ndarray, into: np.ndarray) -> None:
        """Rows (B, n) of the file into ``into`` (B, n, ...), as long as a row; one call for those side by side."""
        self.check()
        row_bytes = into.nbytes // max(rows.size, 1)
        view, done = memoryview(into).cast("B") if rows.size else b"", 0
        for near in rows.tolist():
            first = 0
            for j, row in enumerate(near, 1):
                if j < len(near) and near[j] == row + 1:
                    continue
                end = done + (j - first) * row_bytes
                try:
                    had = os.preadv(self._handle, [view[done:end]], near[first] * row_bytes)
                except OSError as problem:
                    raise self._changed(f"cannot be read ({problem.strerror})") from None
                if had != end - done:
                    raise self._changed(f"gave {had} of {end - done} bytes at {near[first] * row_bytes}")
                first, done = j, end

    def _changed(self, what: str) -> PhmdiffError:
        return PhmdiffError("CACHE_CHANGED", f"belongs to the slice cache and {what}",
                            "start again: the cache is then built anew", file=self.path)  # fmt: skip


def _prepare(
    cohort: Cohort, subject_id: str, contrasts: list[str], data_config: DataConfig, seen: dict[Path, Seen]
):  # fmt: skip
    """The index entry of a subject, its stored slices (m, contrasts, S, S) float32, the kept ones' foreground
    (n, S, S) uint8, and where among the stored a kept one and its neighbours are (n, 2k+1)."""
    files = cohort.files[subject_id]
    used = [*contrasts, "mask"] if "mask" in files else contrasts
    first = data_config.sources[0]
    facts = {name: _file_facts(files[name], subject_id, name) for name in used if name in files}
    subject = load_subject(cohort, subject_id, contrasts, foreground_from=first, with_seg=False,
                           nan=data_config.nan, max_gib=data_config.max_volume_gib)  # fmt: skip
    for name, fact in facts.items():
        before = fact["size"], fact["mtime_ns"]
        if not seen.get(files[name], before) == before == seen_now(files[name]):
            raise PhmdiffError("FILE_CHANGED", "has changed since it was checked", "start again once it is whole",
                               subject=subject_id, contrast=name, file=files[name])  # fmt: skip
    plane, finer = InPlane.of(subject.foreground.shape, data_config), data_config.oversample
    inside = plane.to_grid(subject.foreground, 0) >= 0.5
    kept = np.flatnonzero(inside.mean(axis=(1, 2)) >= data_config.min_foreground)
    inside = plane.to_grid(subject.foreground, 0, finer) >= 0.5 if finer > 1 else inside
    around = neighbours(len(inside), data_config.context_slices)[kept]
    stored, near = np.unique(around, return_inverse=True)
    images = np.empty((len(stored), len(contrasts), *inside.shape[1:]), "<f4")
    scaling = {}
    for channel, name in enumerate(contrasts):
        image = subject.images[name]
        try:
            fitted = scaling_for(name, image, subject.foreground, data_config.hu_window)
        except PhmdiffError as problem:
            raise problem.located(subject=subject_id, contrast=name, file=files[name]) from None
        scaling[name] = [fitted.lo, fitted.hi]
        # The whole volume, as at synthesis: the same product gives the same bits.
        images[:, channel] = plane.to_grid(image, fill_for(name, image, data_config.hu_window), finer)[stored]
    entry = {"id": subject_id, "scaling": scaling, "files": facts}
    return entry, images, inside[kept].astype(np.uint8), near.reshape(around.shape)


def _means(images: np.ndarray, finer: int) -> np.ndarray:
    """(..., S finer, S finer) -> means over blocks (..., S, S) float32."""
    blocks = images.reshape(*images.shape[:-2], images.shape[-2] // finer, finer, -1, finer)
    return blocks.mean((-3, -1), dtype=np.float32)


def _scaled(images: np.ndarray, lo: np.ndarray, gain: np.ndarray, clip: bool) -> np.ndarray:
    """Intensities -> [-1, 1], contiguous; as ``Scaling.forward``."""
    out = np.subtract(images, lo, out=np.empty(images.shape, np.float32))
    out *= gain
    out -= np.float32(1)
    return np.clip(out, -1, 1, out=out) if clip else out


def _shapes(index: dict) -> dict[str, tuple[int, ...]]:
    """What the files of a cache hold: file name -> shape."""
    size, rows = index["settings"]["image_size"] * index["settings"]["oversample"], index["subjects"][-1]["rows"][1]
    return {
        SLICES: (index["stored"], len(index["contrasts"]), size, size),
        FOREGROUND: (rows, size, size),
        CONTEXT: (rows, 2 * index["settings"]["context_slices"] + 1),
    }


@contextmanager
def _new_files(folder: Path):
    """Four files that replace those of the cache when the block ends well, and vanish when it does not."""
    temporary = {folder / f"{name}.tmp": folder / name for name in (SLICES, FOREGROUND, CONTEXT, INDEX)}
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            files = [stack.enter_context(open(path, "wb")) for path in temporary]
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        # From here until the last rename there is no index, so no cache that could be taken for whole.
        (folder / INDEX).unlink(missing_ok=True)
        sync_folder(folder)
        for path, final in temporary.items():
            os.replace(path, final)
        sync_folder(folder)
    except OSError as problem:
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        raise PhmdiffError("CACHE_WRITE", f"the slice cache cannot be written ({problem.strerror}; {free} bytes free)",
                           "make room or choose another folder", exit_code=IO, file=folder) from None  # fmt: skip
    finally:
        if folder.is_dir():
            with suppress(OSError):  # a disk that refuses this as well must not hide what went wrong first
                for path in temporary:
                    path.unlink(missing_ok=True)
                if made and not any(folder.iterdir()):
                    folder.rmdir()


def _settings(data_config: DataConfig) -> dict:
    uses_window = {*data_config.sources, data_config.target} & set(HU_CONTRASTS)
    without = WITHOUT_EFFECT if uses_window else {*WITHOUT_EFFECT, "hu_window"}
    return data_config.model_dump(mode="json", exclude=without)


def _file_facts(path: Path, subject: str, contrast: str) -> dict:
    try:
        facts = os.stat(path)
        return {"path": str(path), "size": facts.st_size, "mtime_ns": facts.st_mtime_ns, "sha256": sha256_of(path)}
    except OSError as problem:
        raise PhmdiffError("UNREADABLE", f"cannot be read ({problem.strerror})", "check path and permissions",
                           subject=subject, contrast=contrast, file=path) from None  # fmt: skip


def _read_index(folder: Path) -> tuple[dict, str | None]:
    """The index and None, or an empty one and why there is none."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, "there is no cache yet"
    except (OSError, ValueError) as problem:
        return {}, f"its index cannot be read ({problem})"
    if not isinstance(index, dict) or index.get("version") != VERSION:
        return {}, "it has another version"
    return index, None


def _stale(index: dict, folder: Path, cohort: Cohort, subjects: list[str], data_config: DataConfig) -> str | None:
    """What makes the cache another one than is asked for, or None."""
    old, new = index["settings"], _settings(data_config)
    changed = [
        f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)
    ]
    if changed:
        return "settings changed: " + ", ".join(changed)
    if [entry["id"] for entry in index["subjects"]] != subjects:
        return "other subjects"
    for entry in index["subjects"]:
        files = cohort.files.get(entry["id"], {})
        if ("mask" in files) != ("mask" in entry["files"]):
            return f"{entry['id']}: a mask came or went"
        for name, facts in entry["files"].items():
            if name not in files or _file_changed(files[name], facts):
                return f"{entry['id']}/{name}: the source file changed"
    for name, shape in _shapes(index).items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != math.prod(shape) * (1 if name == FOREGROUND else 4):
            return f"{name} is missing or has another size"
    return None


def _file_changed(path: Path, facts: dict) -> bool:
    try:
        now = os.stat(path)
        if now.st_size != facts["size"]:
            return True
        return now.st_mtime_ns != facts["mtime_ns"] and sha256_of(path) != facts["sha256"]
    except OSError:
        return True  # reading it says why


def batch_rows(num_rows: int, batch_size: int, *, seed: int, step: int) -> np.ndarray:
    """The rows (B,) int64 of a step: a pure function of its arguments, so a resumed run sees the same batches.

    Every epoch is a permutation of all rows, drawn from Philox with the key (seed, epoch); batches
    run on over the ends of epochs. Raises ValueError unless num_rows and batch_size are positive.
    """
    if num_rows < 1 or batch_size < 1:
        raise ValueError(f"num_rows {num_rows} and batch_size {batch_size} must be positive")
    at = step * batch_size + np.arange(batch_size, dtype=np.int64)
    epochs = at // num_rows
    rows = np.empty(batch_size, np.int64)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        here = epochs == epoch
        rows[here] = _permutation(num_rows, seed, epoch)[at[here] % num_rows]
    return rows


@lru_cache(maxsize=2)
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_rows)
