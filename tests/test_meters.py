"""Figures while a training runs: what they are of, what they leave out, and how they read."""

from __future__ import annotations

import json
import time

import pytest
import torch

from phmdiff_fast.flops import Peak
from phmdiff_fast.meters import Meter, line, memory_peak, waiting
from phmdiff_fast.stages import Clock, listening, stage

CPU = torch.device("cpu")


class Watch:
    """A clock that is told the time."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(meter: Meter, watch: Watch, steps: int, seconds: float, waited: float = 0.0) -> None:
    for _ in range(steps):
        watch.now += seconds
        meter.step(images=4, tokens=100, flops=2e12, waited=waited)


def test_a_record_is_of_the_steps_since_the_last():
    watch = Watch()
    meter = Meter(CPU, peak=Peak(8e12, "somewhere"), now=watch)
    run(meter, watch, 5, 2.0)
    first = meter.record()
    assert (first["images_per_s"], first["tokens_per_s"], first["tflop_per_s"]) == (2.0, 50.0, 1.0)
    assert first["share_of_peak"] == 0.125
    run(meter, watch, 2, 0.5, waited=0.1)
    second = meter.record()
    assert (second["images_per_s"], second["data_wait_share"]) == (8.0, 0.2)
    json.dumps(second)  # it goes into log.jsonl


def test_pauses_are_no_training():
    watch = Watch()
    meter = Meter(CPU, now=watch)
    run(meter, watch, 4, 1.0)
    with meter.paused("look"):
        watch.now += 50
    with meter.paused():
        watch.now += 10
    assert meter.record()["images_per_s"] == 4.0
    assert meter.summary()["paused_s"] == 60.0
    assert "60.0 s (look)" in meter.summary_text()


def test_a_pause_is_a_stage_that_the_table_leaves_out():
    clock, heard = Clock(CPU), []
    listener = type("Heard", (), {"begin": lambda self, name: heard.append(name), "end": lambda *_: None})()
    meter = Meter(CPU, clock=clock, warm_up=0)
    with listening(clock, listener):
        with stage("update"):
            pass
        meter.step(1, 1, 1.0)
        with meter.paused("checkpoint"), stage("encoder"):
            time.sleep(0.05)
    assert heard == ["update", "checkpoint", "encoder"]
    found = meter.record()
    assert list(found["stage_s"]) == ["update"]
    assert found["images_per_s"] > 20  # the pause would leave less


def test_the_summary_leaves_the_warm_up_out():
    watch = Watch()
    meter = Meter(CPU, warm_up=10, now=watch)
    run(meter, watch, 1, 30.0)  # compiling
    meter.record()
    run(meter, watch, 9, 1.0)
    meter.record()
    run(meter, watch, 20, 0.5)
    meter.record()
    found = meter.summary()
    assert (found["steps"], found["steps_left_out"], found["images"]) == (30, 10, 120)
    assert found["images_per_s"] == 8.0
    assert meter.summary_text().startswith("20 steps in 10.0 s, the first 10 not counted: 8 images/s")


def test_a_run_shorter_than_the_warm_up_has_a_summary():
    watch = Watch()
    meter = Meter(CPU, warm_up=10, now=watch)
    run(meter, watch, 3, 1.0)
    meter.record()
    assert meter.summary()["images_per_s"] == 4.0
    empty = Meter(CPU, now=watch)
    assert empty.summary()["images_per_s"] is None
    assert "0 steps" in empty.summary_text()


def test_images_are_of_all_processes_and_flops_of_one_device():
    watch = Watch()
    meter = Meter(CPU, peak=Peak(4e12, "somewhere"), world=8, now=watch)
    run(meter, watch, 2, 1.0)
    found = meter.record()
    assert (found["images_per_s"], found["tflop_per_s"], found["share_of_peak"]) == (32.0, 2.0, 0.5)


def test_stages_are_seconds_a_step():
    clock = Clock(CPU)
    meter = Meter(CPU, clock=clock, warm_up=0)
    with listening(clock):
        for _ in range(4):
            with stage("encoder"), stage("embed"):  # an inner stage is its outer one's
                torch.ones(64, 64) @ torch.ones(64, 64)
            with stage("data"):
                pass
            meter.step(1, 1, 1.0)
    found = meter.record()
    assert list(found["stage_s"]) == ["data", "encoder"]
    assert 0 < found["stage_s"]["encoder"] * 4 < 1
    table = meter.summary_text()
    assert all(word in table for word in ("ms a step", "encoder", "data", "no stage"))
    assert meter.record()["stage_s"] == {}  # nothing since


def test_the_line_reads_as_it_should():
    found = {"images_per_s": 2310.4, "tokens_per_s": 1.21e6, "tflop_per_s": 312.3, "share_of_peak": 0.394,
             "peak_bytes": int(18.2 * 2**30), "data_wait_share": 0.0041, "stage_s": {}}  # fmt: skip
    assert line(120, found, 0.01234) == (
        "step 120, 2,310 images/s, 1.2 M tokens/s, 312 TFLOP/s (39 % of peak), 18.2 GiB, data 0.4 %, loss 0.0123"
    )
    unknown = dict.fromkeys(found) | {"images_per_s": 3.14159, "tokens_per_s": 80.0, "tflop_per_s": 0.0213}
    assert line(1, unknown) == "step 1, 3.14 images/s, 80 tokens/s, 21.3 GFLOP/s"


@pytest.mark.parametrize(("share", "above"), [(0.0, False), (0.02, False), (0.07, True)])
def test_waiting_names_the_goal_and_a_cure_above_it(share, above):
    said = waiting(share, gpu=True)
    assert "2 %" in said
    assert ("--workers 2 or --data-device cuda" in said) == above
    assert "cuda" not in waiting(share)


def test_memory_of_the_process_is_bytes():
    held = torch.ones(1 << 20)
    assert held.nbytes < memory_peak(CPU) < 1 << 40


@pytest.mark.gpu
def test_a_gpu_is_read_without_a_wait_inside_the_step():
    cuda = torch.device("cuda")
    clock = Clock(cuda)
    meter = Meter(cuda, clock=clock, warm_up=0)
    with listening(clock):
        for _ in range(3):
            with stage("data"):
                x = torch.ones(256, 256, device=cuda)
            with stage("encoder"):
                torch.cuda._sleep(10_000_000)
                x @ x
            meter.step(1, 1, 1.0)
        float(x.sum())
    found = meter.record()
    assert found["stage_s"]["encoder"] > 1e-3
    assert clock.read()["encoder"].host_s < clock.read()["encoder"].device_s
    assert found["peak_bytes"] >= x.nbytes
