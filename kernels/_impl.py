"""Which implementation of an operation runs: ``impl=None | "reference" | "triton" | "extension"``."""

from __future__ import annotations

NAMES = ("reference", "triton", "extension")


class BackendError(RuntimeError):
    """A forced implementation cannot run here."""


def choose(op: str, impl: str | None, available: tuple[str, ...] = ("reference",)) -> str:
    """The implementation of ``op`` to use: the last of ``available``, or the one forced.

    Raises ValueError for an unknown name and BackendError for one that ``op`` has not got; a
    forced implementation is never silently replaced.
    """
    if impl is None:
        return available[-1]
    if impl not in NAMES:
        raise ValueError(f"{op}: impl={impl!r} is unknown; use None or one of {NAMES}")
    if impl not in available:
        raise BackendError(f"{op}: impl={impl!r} cannot run here; available: {', '.join(available)}")
    return impl
