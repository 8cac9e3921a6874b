"""Progress bars and lines for people, both on stderr."""

from __future__ import annotations

import sys

COUNT = "{desc}: {n_fmt}/{total_fmt} |{bar:30}| {elapsed}<{remaining}{postfix}"
SHARE = "{desc}: {percentage:3.0f}% |{bar:30}| {elapsed}<{remaining}{postfix}"


def say(line: str) -> None:
    """One line on stderr."""
    print(f"phmdiff-fast: {line}", file=sys.stderr, flush=True)


def bar(total: int, label: str, enabled: bool):
    """A bar that counts to ``total``; none where stderr is no terminal or ``enabled`` is false."""
    return _bar(total, label, enabled, COUNT)


class _Share:
    """A bar that is told how much is done, in [0, 1]."""

    def __init__(self, label: str, enabled: bool):
        self._meter = _bar(1.0, label, enabled, SHARE)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def at(self, share: float) -> None:
        self._meter.update(min(1.0, share) - self._meter.n)

    def note(self, text: str) -> None:
        self._meter.set_postfix_str(text)

    def close(self) -> None:
        self._meter.close()


def share_bar(label: str, enabled: bool) -> _Share:
    """A bar for work whose length is time: ``at(share)``, ``note(text)``, ``close()``; a context manager."""
    return _Share(label, enabled)


def _bar(total, label, enabled, form):
    from tqdm import tqdm

    # disable=None: no bar where stderr is no terminal, so that logs stay readable.
    disable = None if enabled else True
    return tqdm(total=total, desc=label, disable=disable, leave=False, bar_format=form, dynamic_ncols=True)
