"""Reading the next and writing the last while this one is computed: one thread each, and never more than one ahead."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

_ARENA_MAX = -8  # of glibc's mallopt


def one_arena() -> bool:
    """Have all threads allocate from one heap, so that what one frees the next one takes; False without glibc.

    Otherwise each thread that reads or writes a volume keeps a heap as large as its largest one. To be called before
    torch is imported: glibc decides at the second thread.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(_ARENA_MAX, 1))
    except (AttributeError, OSError):
        return False


def read_ahead(items: Iterable, read: Callable[[Any], Any]) -> Iterator[tuple[Any, Callable[[], Any]]]:
    """(item, fetch) of each: ``fetch()`` gives ``read(item)``, or raises what it raised.

    The next item is read while the one handed out is worked on; memory holds two at most.
    """
    items = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="read") as pool:

        def ask() -> tuple[Any, Future] | None:
            for item in items:
                return item, pool.submit(read, item)
            return None

        ahead = ask()
        while ahead is not None:
            (item, future), ahead = ahead, None

            def fetch(future: Future = future):
                nonlocal ahead
                made = future.result()
                ahead = ask()  # not before: there would be three
                return made

            yield item, fetch
            del future, fetch


class Behind:
    """Calls made one after the other in a thread: ``behind(write, path, voxels)`` comes back at once.

    A call waits for the one before and raises what that raised; so does the end of the context, which always waits:
    what was begun is written whole.
    """

    def __init__(self):
        self._pool, self._last = ThreadPoolExecutor(1, thread_name_prefix="write"), None

    def __call__(self, function: Callable, *arguments, **named) -> None:
        self.wait()
        self._last = self._pool.submit(function, *arguments, **named)

    def wait(self) -> None:
        """Until nothing is left to do; raises what the last call raised."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind, problem, trace) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown(wait=True)
