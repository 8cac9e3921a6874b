"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .errors import CHECKPOINT, IO, USAGE, PhmdiffError

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not noticed there
    fcntl = None


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write to; it takes the name ``path`` only once all is written and synced.

    Raises PhmdiffError OUTPUT_WRITE (exit 74) if the disk refuses; nothing half-written stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as problem:
        raise PhmdiffError("OUTPUT_WRITE", f"cannot be written ({problem.strerror})",
                           "check that the folder exists, may be written to and has room",
                           exit_code=IO, file=path) from None  # fmt: skip
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """``value`` as indented JSON. Raises OUTPUT_WRITE as ``whole_file``."""
    with whole_file(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def refuse_existing(path: str | Path, overwrite: bool) -> None:
    """Raise PhmdiffError OUTPUT_EXISTS (exit 2) if ``path`` is there and may not be replaced."""
    if os.path.lexists(path) and not overwrite:
        raise PhmdiffError("OUTPUT_EXISTS", "exists already", "choose another name, or give --overwrite",
                           exit_code=USAGE, file=path)  # fmt: skip


LOCK = ".lock"


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """``folder/.lock`` held by this process alone, until the end of the block or of the process, however it ends.

    Raises PhmdiffError LOCKED (exit 4) naming who holds it, OUTPUT_WRITE (exit 74) in a read-only folder.
    """
    path = Path(folder) / LOCK
    try:
        file = open(path, "a+")  # noqa: SIM115 (closed below; "w" would empty it before the lock is ours)
    except OSError as problem:
        raise PhmdiffError("OUTPUT_WRITE", f"cannot be written ({problem.strerror})", "choose another --out",
                           exit_code=IO, file=path) from None  # fmt: skip
    with file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                holder = file.read(200).strip() or "another process"
                raise PhmdiffError("LOCKED", f"is in use by {holder!r}", "wait for it, or choose another --out",
                                   exit_code=CHECKPOINT, file=folder) from None  # fmt: skip
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield
