"""Compiled kernels are kept in folders that nobody else can write to: what lies there is run. Imports no torch."""

from __future__ import annotations

import atexit
import getpass
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path

from .errors import BACKEND, PhmdiffError

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def private_kernel_caches() -> list[str]:
    """Move the caches of Triton and of torch.compile to a private folder where others could put code into them.

    To be called before either is used: it sets TRITON_CACHE_DIR and TORCHINDUCTOR_CACHE_DIR, to folders in
    ``~/.cache/phmdiff_fast/kernels`` (XDG_CACHE_HOME is respected), and leaves a cache alone that only this user can
    change. Returns lines to say. Raises PhmdiffError KERNEL_CACHE (exit 8) if that folder is not private either.
    """
    if os.name == "nt":  # no modes to look at; the folders lie in the user's profile
        return []
    lines = []
    for name, variable, folder in (
        ("triton", "TRITON_CACHE_DIR", _triton_folder()),
        ("inductor", "TORCHINDUCTOR_CACHE_DIR", _inductor_folder()),
    ):
        why = "anybody could make it first" if folder is None else _exposed(folder)
        if why:
            private = _private_folder(name)
            os.environ[variable] = str(private)
            if folder is not None:  # else it is torch's default in /tmp, which is never used
                lines.append(f"kernel cache {str(folder)!r}: {why}; compiled kernels are kept in {str(private)!r}")
    return lines


def _triton_folder() -> Path:
    given = os.environ.get("TRITON_CACHE_DIR")
    return Path(given) if given else Path(os.environ.get("TRITON_HOME") or Path.home()) / ".triton" / "cache"


def _inductor_folder() -> Path | None:
    """Where torch.compile keeps its code; None for its default in a folder in which anybody can make one."""
    if given := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return Path(given)
    temporary = Path(tempfile.gettempdir())
    if temporary.stat().st_mode & OTHERS_WRITE:
        return None
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in many containers
        user = f"uid_{os.getuid()}"
    return temporary / ("torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user))  # as torch names it


def _exposed(folder: Path) -> str | None:
    """How somebody else could put files at ``folder``, or None."""
    folder = Path(os.path.abspath(folder))
    try:
        if folder.exists():
            facts = folder.stat()
            if not stat.S_ISDIR(facts.st_mode):
                return "it is no folder"
            if facts.st_uid != os.geteuid():
                return f"it belongs to user {facts.st_uid}"
            if facts.st_mode & OTHERS_WRITE:
                return f"others may write to it (mode {facts.st_mode & 0o7777:o})"
        # By the name and, where there are links on the way, in truth.
        for path in dict.fromkeys((folder, folder.resolve())):
            if why := _replaceable(path):
                return why
    except (OSError, RuntimeError) as problem:  # RuntimeError: a loop of links, before Python 3.13
        return f"it cannot be looked at ({getattr(problem, 'strerror', None) or problem})"
    return None


def _replaceable(path: Path) -> str | None:
    """How somebody else could put another folder in the place of ``path`` or of one above it, or None."""
    # Root is trusted; in a user namespace it may go by another number, that of the owner of "/".
    trusted = {0, os.geteuid(), os.stat("/").st_uid}
    below = path
    for above in path.parents:
        if above.exists():
            facts = above.stat()
            if facts.st_uid not in trusted:
                return f"{str(above)!r} belongs to user {facts.st_uid}"
            # Writing by a group is let pass here: many systems give every user a group of their own. In a sticky
            # folder such as /tmp others cannot rename what is ours, but they can make what is not there yet.
            if facts.st_mode & stat.S_IWOTH:
                settled = facts.st_mode & stat.S_ISVTX and os.path.lexists(below) and below.lstat().st_uid in trusted
                if not settled:
                    return f"others may write to {str(above)!r}"
        below = above
    return None


def _private_folder(name: str) -> Path:
    """``~/.cache/phmdiff_fast/kernels/<name>``, made if need be. Raises KERNEL_CACHE unless it is private."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(base) if os.path.isabs(base) else Path.home() / ".cache"  # the standard says: ignore a relative one
    kernels = base / "phmdiff_fast" / "kernels"
    folder = kernels / name
    try:
        base.mkdir(parents=True, exist_ok=True, mode=0o700)
        kernels.parent.mkdir(exist_ok=True, mode=0o755)
        for path in (kernels, folder):
            path.mkdir(exist_ok=True, mode=0o700)
    except FileExistsError:
        raise _not_private(folder, "something else has its name") from None
    except OSError:
        # A home that may not be written to: a folder for this run alone, which mkdtemp makes with mode 0700.
        folder = Path(tempfile.mkdtemp(prefix=f"phmdiff_fast_{name}_"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder
    for path in (kernels, folder):
        facts = path.lstat()
        if stat.S_ISLNK(facts.st_mode):
            raise _not_private(path, "it is a link")
        if why := _exposed(path):
            raise _not_private(path, why)
        if facts.st_mode & 0o777 != 0o700:
            raise _not_private(path, f"it has mode {facts.st_mode & 0o777:o}, not 700")
    return folder


def _not_private(path: Path, why: str) -> PhmdiffError:
    return PhmdiffError("KERNEL_CACHE", f"compiled kernels cannot be kept where only you can write: {why}",
                        "remove it, or set TRITON_CACHE_DIR and TORCHINDUCTOR_CACHE_DIR to folders of your own that "
                        "have mode 0700", exit_code=BACKEND, file=path)  # fmt: skip
