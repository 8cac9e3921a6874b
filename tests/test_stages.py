"""Stages: nothing without listeners or under compilation, told in order to those who listen, and their clock."""

from __future__ import annotations

import sys
import threading
import time
import timeit
import types

import pytest
import torch

from phmdiff_fast import stages
from phmdiff_fast.stages import Clock, ProfilerRanges, in_order, listening, nvtx_if_asked, nvtx_ranges, stage

CPU = torch.device("cpu")


class Heard:
    """A listener that writes down what it is told."""

    def __init__(self):
        self.said = []

    def begin(self, name):
        self.said.append(f"+{name}")
        return name.upper()

    def end(self, name, token):
        self.said.append(f"-{name}")
        assert token == name.upper()


def test_without_a_listener_a_stage_costs_nothing():
    assert stage("encoder") is stage("decoder")  # one object for all

    def staged():
        with stage("encoder"):
            pass

    assert min(timeit.repeat(staged, number=2000, repeat=5)) / 2000 < 2e-6


def test_listeners_hear_stages_in_order_and_only_while_they_listen():
    first, second = Heard(), Heard()
    with stage("before"):
        pass
    with listening(first, None, second), stage("data"), pytest.raises(KeyError), stage("augment"):
        raise KeyError
    with stage("after"):
        pass
    assert first.said == second.said == ["+data", "+augment", "-augment", "-data"]


def test_a_stage_ends_for_those_it_began_for():
    """Who begins or stops to listen inside a stage hears no half of it."""
    heard, late = Heard(), Heard()
    with listening(heard):
        outer = stage("data")
        outer.__enter__()
        with listening(late):
            outer.__exit__(None, None, None)
    assert heard.said == ["+data", "-data"]
    assert late.said == []


@pytest.mark.parametrize("listens", [False, True])
def test_torch_compile_sees_no_stage(listens):
    heard = Heard()

    def staged(x):
        with stage("encoder"):
            y = x.sin()
            with stage("embed"):
                y = y + 1
        return (y * x).sum()

    torch._dynamo.reset()
    compiled = torch.compile(staged, fullgraph=True, backend="aot_eager")
    x = torch.ones(3, requires_grad=True)
    with listening(heard if listens else None):
        compiled(x).backward()
        torch.testing.assert_close(compiled(x), staged(x.detach()))
    assert heard.said == (["+encoder", "+embed", "-embed", "-encoder"] if listens else [])  # of the eager call alone
    # Who listens is nothing a graph is guarded by: no second compilation.
    with torch._dynamo.config.patch(error_on_recompile=True), listening(None if listens else Heard()):
        compiled(x)


def test_fake_tensors_are_no_matter():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), listening(ProfilerRanges(), Clock(CPU)), stage("encoder"):
        assert torch.ones(3, 4).sum(0).shape == (4,)


def test_the_clock_adds_up_outermost_stages():
    clock = Clock(CPU)
    with listening(clock):
        for _ in range(3):
            with stage("update"), stage("ema"):
                time.sleep(0.002)
            with stage("data"):
                pass
    found = clock.read()
    assert list(found) == ["data", "update"]  # in the order of a step
    assert (found["update"].calls, found["update"].device_s) == (3, None)
    assert found["update"].host_s >= 0.006
    assert found["data"].seconds < found["update"].seconds
    found["update"].calls = 0
    assert clock.read()["update"].calls == 3  # what was read is the reader's own


def test_the_clock_is_of_its_own_thread():
    clock = Clock(CPU)

    def hear(call):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    def elsewhere():
        with stage("checkpoint"):
            pass

    with listening(clock), stage("backward"):
        hear(elsewhere)
    with listening(clock):
        hear(elsewhere)
    assert list(clock.read()) == ["backward"]


def test_nvtx_is_switched_on_by_the_environment(monkeypatch):
    monkeypatch.delenv("PHMDIFF_NVTX", raising=False)
    assert nvtx_if_asked() is None
    made = object()
    monkeypatch.setattr(stages, "nvtx_ranges", lambda: made)
    monkeypatch.setenv("PHMDIFF_NVTX", "0")
    assert nvtx_if_asked() is None
    monkeypatch.setenv("PHMDIFF_NVTX", "1")
    assert nvtx_if_asked() is made


def test_nvtx_that_is_missing_or_broken_is_left_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)  # import nvtx then fails
    assert (nvtx_ranges() is None) == (not torch.cuda.is_available())
    monkeypatch.setitem(sys.modules, "nvtx", types.ModuleType("nvtx"))  # imports, and has nothing in it
    assert (nvtx_ranges() is None) == (not torch.cuda.is_available())


def test_nvtx_of_the_package():
    pytest.importorskip("nvtx")
    listener = nvtx_ranges()
    assert type(listener).__name__ == "_NvtxPackage"
    with listening(listener), stage("encoder"), stage("embed"):
        pass


def test_the_order_is_that_of_a_step():
    assert [name for name, _ in in_order({"own": 1, "update": 2, "data": 3})] == ["data", "update", "own"]


@pytest.mark.gpu
def test_a_graph_is_captured_with_stages_in_it():
    cuda = torch.device("cuda")
    clock, x = Clock(cuda), torch.ones(8, device=cuda)
    graph = torch.cuda.CUDAGraph()
    with listening(clock, nvtx_ranges()):
        with torch.cuda.graph(graph), stage("encoder"):
            y = x + 1
        with stage("update"):
            graph.replay()
    assert y.tolist() == [2.0] * 8
    assert clock.read()["encoder"].device_s == 0.0
    assert clock.read()["update"].device_s > 0
