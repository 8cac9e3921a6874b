"""Reading ahead and writing behind: order, errors where they belong, and never more than one ahead."""

from __future__ import annotations

import platform
import subprocess
import sys
import threading
import time

import pytest

from phmdiff_fast.streaming import Behind, read_ahead


def test_everything_comes_in_order_and_in_another_thread():
    threads = set()

    def read(item):
        threads.add(threading.current_thread())
        return item * 10

    assert [(item, fetch()) for item, fetch in read_ahead(range(5), read)] == [(i, 10 * i) for i in range(5)]
    assert threading.current_thread() not in threads


def test_one_is_read_ahead_and_no_more():
    read, entered = [], threading.Event()

    def note(item):
        read.append(item)
        entered.set()
        return item

    for item, fetch in read_ahead(range(6), note):
        assert max(read, default=0) <= item  # the next is not begun before this one is fetched
        entered.clear()
        fetch()
        if item < 5:
            assert entered.wait(5)  # and then it is, while this one is worked on
            assert read[-1] == item + 1


def test_an_error_of_reading_comes_where_it_is_fetched():
    seen = []

    def read(item):
        if item == 2:
            raise ValueError("broken")
        return item

    def work():
        for _, fetch in read_ahead(range(5), read):
            seen.append(fetch())

    with pytest.raises(ValueError, match="broken"):
        work()
    assert seen == [0, 1]


def test_writing_happens_meanwhile_and_is_done_at_the_end():
    done = []

    def write(item):
        time.sleep(0.05)
        done.append(item)

    with Behind() as behind:
        behind(write, 1)
        assert done == []
        behind(write, item=2)
        assert done == [1]
    assert done == [1, 2]


@pytest.mark.parametrize("where", ["call", "end"])
def test_an_error_of_writing_is_raised_by_the_next_call_or_the_end(where):
    def fail():
        raise OSError("full")

    def run():
        with Behind() as behind:
            behind(fail)
            if where == "call":
                behind(print)

    with pytest.raises(OSError, match="full"):
        run()


def test_what_was_begun_is_written_whole_when_the_work_itself_fails():
    done = []

    def write():
        time.sleep(0.05)
        done.append(1)

    def work():
        with Behind() as behind:
            behind(write)
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert done == [1]


def test_a_process_of_its_own_takes_one_heap():
    program = "from phmdiff_fast.streaming import one_arena; print(one_arena())"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    assert told == ("True" if platform.libc_ver()[0] == "glibc" else told)
