"""Signals: a training asked to stop ends at the end of a step, with a checkpoint; all else ends at once, tidily.

Ctrl-C (SIGINT) ends with status 130, SIGTERM, which clusters send before they take a machine away, with 143.
"""

from __future__ import annotations

import signal
import threading

from .progress import say


class Terminated(SystemExit):
    """SIGTERM came. A SystemExit of 143, so that what is open is closed on the way out."""

    def __init__(self):
        super().__init__(128 + signal.SIGTERM)


def _terminate(number, frame):
    raise Terminated


def end_tidily_on_sigterm() -> None:
    """Let SIGTERM unwind like Ctrl-C, so that half-written files are removed. For a program's start."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)


class StopRequest:
    """While entered, SIGINT and SIGTERM only ask to stop; a second SIGINT ends at once.

    with StopRequest() as stop:
        while not stop.asked: ...a step...
        save()
    stop.end(stop.asked)  # raises what the signal stands for, if one came

    quiet : say nothing of it (one of several processes does)
    Outside the main thread, where Python hands no signals, it is never asked.
    """

    def __init__(self, *, quiet: bool = False):
        self.asked: int | None = None
        self._quiet = quiet
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _ask(self, number, frame) -> None:
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # twice: not even a checkpoint is waited for; the last one is whole
        if self.asked is None:
            self.asked = number
            again = "; again: stop at once" if number == signal.SIGINT else ""
            if not self._quiet:
                say(f"stopping at the end of this step, with a checkpoint{again}")

    @staticmethod
    def end(asked: int | None) -> None:
        """KeyboardInterrupt after SIGINT, Terminated after SIGTERM; nothing if no signal came (0 or None)."""
        if asked == signal.SIGINT:
            raise KeyboardInterrupt
        if asked:
            raise Terminated
