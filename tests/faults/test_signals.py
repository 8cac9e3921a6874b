"""Signals during a training, and two runs in one folder: rows C4, C5 and C11 of the fault matrix, on one device."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import TINY, cli

from phmdiff_fast import checkpoint, trainer
from phmdiff_fast.errors import PhmdiffError
from phmdiff_fast.files import LOCK, locked
from phmdiff_fast.signals import StopRequest, Terminated


def arguments(cohort, out, steps):
    return ["train", cohort, "--source", "t1", "--target", "t2", "--out", out, "--steps", steps, "--image-size", 24,
            "--quiet", *TINY]  # fmt: skip


def send(monkeypatch, at_step, *signals):
    """The signals arrive in the middle of a step: after its gradients, before its update."""
    real, left = trainer.learning_rate, list(signals)

    def rate(config, step, share):
        while step == at_step and left:
            os.kill(os.getpid(), left.pop(0))
        return real(config, step, share)

    monkeypatch.setattr(trainer, "learning_rate", rate)


def weights(run):
    return checkpoint.newest(run / "checkpoints").tensors("model")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["c4", "c5"])
def test_c4_c5_a_signal_ends_the_step_saves_and_the_run_goes_on_exactly(
    tiny_cohort, tmp_path, monkeypatch, capsys, number, code
):
    with monkeypatch.context() as patch:
        send(patch, 2, number)
        assert cli(*arguments(tiny_cohort, tmp_path / "stopped", 4)) == code
    assert [p.name for p in checkpoint.found(tmp_path / "stopped" / "checkpoints")] == ["step-00000003"]
    said = capsys.readouterr().err
    assert "stopped at step 3" in said
    assert "Traceback" not in said
    assert cli(*arguments(tiny_cohort, tmp_path / "stopped", 4)) == 0
    assert "going on from step 3" in capsys.readouterr().err
    assert cli(*arguments(tiny_cohort, tmp_path / "through", 4)) == 0
    stopped, through = weights(tmp_path / "stopped"), weights(tmp_path / "through")
    assert all(torch.equal(stopped[name], through[name]) for name in through)


def test_c5_a_second_interrupt_ends_at_once_and_leaves_the_older_checkpoint(tiny_cohort, tmp_path, monkeypatch):
    assert cli(*arguments(tiny_cohort, tmp_path / "r", 1)) == 0
    before = weights(tmp_path / "r")
    with monkeypatch.context() as patch:
        send(patch, 2, signal.SIGINT, signal.SIGINT)
        assert cli(*arguments(tiny_cohort, tmp_path / "r", 5)) == 130
    assert [p.name for p in (tmp_path / "r" / "checkpoints").iterdir()] == ["step-00000001"]
    assert all(torch.equal(before[name], value) for name, value in weights(tmp_path / "r").items())


def test_c5_a_second_interrupt_while_saving_leaves_nothing_half_written(tiny_cohort, tmp_path, monkeypatch):
    real = checkpoint.write_tensors

    def interrupted(path, *more):
        if path.name == "optimizer.safetensors":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)  # the training waits for the thread that writes
        return real(path, *more)

    with monkeypatch.context() as patch:
        send(patch, 1, signal.SIGINT)
        patch.setattr(checkpoint, "write_tensors", interrupted)
        assert cli(*arguments(tiny_cohort, tmp_path / "r", 5)) == 130
    assert list((tmp_path / "r" / "checkpoints").iterdir()) == []
    assert cli(*arguments(tiny_cohort, tmp_path / "r", 2)) == 0


def test_c4_sigterm_outside_a_training_unwinds(tmp_path):
    """As when a cohort is being read: what is half-written is removed, and the status is 143."""
    code = """
import os, signal, sys
from phmdiff_fast import cli
from phmdiff_fast.files import whole_file
def discover(path):
    with whole_file(sys.argv[1]) as file:
        file.write(b"half")
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
import phmdiff_fast.data
phmdiff_fast.data.discover = discover
cli.main(["check", "anywhere"])
"""
    ran = subprocess.run([sys.executable, "-c", code, tmp_path / "page"], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 143, ran.stderr
    assert list(tmp_path.iterdir()) == []
    assert ran.stderr == ""


def test_the_handlers_that_were_there_come_back_and_other_threads_have_none():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # a cluster may say it twice
        assert stop.asked == signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    with pytest.raises(Terminated) as ended:
        stop.end(stop.asked)
    assert ended.value.code == 143
    seen = []

    def elsewhere():
        with StopRequest() as stop:
            seen.append((stop.asked, signal.getsignal(signal.SIGINT)))
        stop.end(stop.asked)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [(None, before[0])]


def test_c11_a_second_run_in_one_folder_is_refused_with_pid_and_host(tiny_cohort, tmp_path, capsys):
    run = tmp_path / "r"
    run.mkdir()
    with locked(run):
        assert cli(*arguments(tiny_cohort, run, 1)) == 4
        said = capsys.readouterr().err
        assert "error[LOCKED]" in said
        assert f"pid {os.getpid()} on {platform.node()}" in said
        assert len(said.strip().splitlines()) == 1
        assert [p.name for p in run.iterdir()] == [LOCK]
    assert cli(*arguments(tiny_cohort, run, 1)) == 0  # and a lock that nobody holds is no lock


def test_c11_a_lock_dies_with_its_process(tmp_path):
    code = f"""
import os, sys
from phmdiff_fast.files import locked
with locked({str(tmp_path)!r}):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(PhmdiffError, match=f"pid {process.pid}"), locked(tmp_path):
            pass
        process.kill()
    with locked(tmp_path):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_c11_a_read_only_folder_is_said_at_the_start(tiny_cohort, tmp_path, capsys):
    run = tmp_path / "r"
    run.mkdir(mode=0o500)
    assert cli(*arguments(tiny_cohort, run, 1)) == 74
    assert "error[OUTPUT_WRITE]" in capsys.readouterr().err


def test_c2_what_a_killed_process_left_is_removed_at_the_next_start(tiny_cohort, tmp_path):
    assert cli(*arguments(tiny_cohort, tmp_path / "r", 1)) == 0
    checkpoints = tmp_path / "r" / "checkpoints"
    shutil.copytree(checkpoints / "step-00000001", checkpoints / ".tmp-step-00000002-12345")
    assert cli(*arguments(tiny_cohort, tmp_path / "r", 2)) == 0
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-00000001", "step-00000002"]


def test_c7_the_last_two_that_verify_are_never_removed(tmp_path):
    groups = {"model": {"w": torch.ones(3)}}
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, groups, {}, keep=3)
    for damaged in (2, 3):
        (tmp_path / f"step-{damaged:08d}" / "model.safetensors").write_bytes(b"damaged")
    checkpoint.save(tmp_path, 4, groups, {}, keep=1)
    assert checkpoint.found(tmp_path)[-1].name == "step-00000001"  # 4 and 1 verify
    checkpoint.save(tmp_path, 5, groups, {}, keep=1)
    assert [p.name for p in checkpoint.found(tmp_path)] == ["step-00000005", "step-00000004"]
