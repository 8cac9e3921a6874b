"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .errors import CHECKPOINT, IO, USAGE, PhmdiffError

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not noticed there
    fcntl = None


_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write to; it takes the name ``path`` only once all is written and synced.

    Raises PhmdiffError OUTPUT_WRITE (exit 74) if the disk refuses; nothing half-written stays, and what
    was at ``path`` before is still there. The one exception: if the disk takes the new name but cannot
    make it last, that is an error too, with the new file in place.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with writing(path):
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):  # a disk that refuses this as well must not hide what went wrong first
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


@contextmanager
def writing(
    path: str | Path, cure: str = "check that the folder exists, may be written to and has room"
) -> Iterator[None]:
    """An OSError inside becomes PhmdiffError OUTPUT_WRITE (exit 74) of ``path``, with what is free on a full disk."""
    try:
        yield
    except OSError as problem:
        said = problem.strerror or str(problem)
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            with suppress(OSError):
                said += f"; {shutil.disk_usage(Path(path).parent).free} bytes free"
        raise PhmdiffError("OUTPUT_WRITE", f"cannot be written ({said})", cure, exit_code=IO, file=path) from None


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` outlast a power cut. Raises OSError."""
    if os.name == "nt":  # where a folder cannot be opened
        return
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # it may be written to but not read
        return
    try:
        os.fsync(handle)
    except OSError as problem:
        if problem.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that know no such thing
            raise
    finally:
        os.close(handle)


def is_unfinished(path: Path) -> bool:
    """Whether this is what ``whole_file`` is writing, or was when its process was killed."""
    return _UNFINISHED.fullmatch(path.name) is not None


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left half-written in ``folder``. Only for who holds its lock."""
    for path in filter(is_unfinished, folder.iterdir()):
        with suppress(OSError):
            path.unlink()


def write_json(path: str | Path, value: Any) -> None:
    """``value`` as indented JSON. Raises OUTPUT_WRITE as ``whole_file``."""
    with whole_file(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises OSError."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            total.update(chunk)
    return total.hexdigest()


def refuse_existing(path: str | Path, overwrite: bool) -> None:
    """Raise PhmdiffError OUTPUT_EXISTS (exit 2) if ``path`` is there and may not be replaced."""
    if os.path.lexists(path) and not overwrite:
        raise PhmdiffError("OUTPUT_EXISTS", "exists already", "choose another name, or give --overwrite",
                           exit_code=USAGE, file=path)  # fmt: skip


LOCK = ".lock"


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """``folder/.lock`` held by this process alone, until the end of the block or of the process, however it ends.

    Raises PhmdiffError LOCKED (exit 4) naming who holds it, OUTPUT_WRITE (exit 74) in a read-only folder or
    on a full disk.
    """
    path, cure = Path(folder) / LOCK, "choose another --out"
    with writing(path, cure):
        # Not "w", which would empty it before the lock is ours; unbuffered, so that closing writes nothing.
        file = open(path, "a+b", buffering=0)  # noqa: SIM115 (closed below)
    with file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                holder = file.read(200).decode(errors="replace").strip() or "another process"
                raise PhmdiffError("LOCKED", f"is in use by {holder!r}", "wait for it, or choose another --out",
                                   exit_code=CHECKPOINT, file=folder) from None  # fmt: skip
        with writing(path, cure):
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {platform.node()}\n".encode())
        _HELD.add(file)
        try:
            yield
        finally:
            _HELD.discard(file)


def _let_go() -> None:
    """In a forked process: a lock that it shared, as a loader's worker would, would outlive its holder."""
    for file in _HELD:
        file.close()
    _HELD.clear()


_HELD: set = set()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
