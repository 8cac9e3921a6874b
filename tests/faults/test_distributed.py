"""Several processes: rows C4, R1 and R5 of the fault matrix, with 2 gloo processes on the CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from cells import command, newest, run_all, said_written
from zygote import free_port, wait_for

from phmdiff_fast.distributed import SILENT

TIMEOUT = 4  # seconds the others wait for one that hangs, here


def statuses(run) -> list[dict]:
    return [json.loads((run / name).read_text()) for name in ("status.json", "status-1.json")]


def torchrun(arguments, *more, env=None, world=2):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}", f"--master-port={free_port()}",
         *more, "-m", "phmdiff_fast", *map(str, arguments)],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )  # fmt: skip


def test_c4_sigterm_to_torchrun_saves_at_the_same_step_on_every_rank(tiny_cohort, tmp_path):
    run = tmp_path / "run"
    job = torchrun(command(tiny_cohort, run, steps=1_000_000))
    wait_for(lambda: (run / "log.jsonl").exists() and "checkpoint" in (run / "log.jsonl").read_text(), 120)
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=60)
    first, second = statuses(run)
    assert (first["exit_code"], second["exit_code"]) == (143, 143), err
    assert first["step"] == second["step"] == newest(run).step
    assert newest(run).manifest["world"] == 2
    assert err.count("stopped at step") == 1


@pytest.mark.parametrize(("who", "number", "code"), [(0, signal.SIGTERM, 143), (1, signal.SIGTERM, 143),
                                                     (1, signal.SIGINT, 130)])  # fmt: skip
def test_c4_c5_a_signal_to_one_rank_stops_both_at_one_step(zygote, tiny_cohort, tmp_path, who, number, code):
    ended = run_all(zygote, command(tiny_cohort, tmp_path / "run"), 2, only=f"signal_at:3,{int(number)}", rank=who)
    assert [child.status for child in ended] == [code, code], ended[0].err
    assert newest(tmp_path / "run").step == 4  # step 3 was made whole
    assert [status["step"] for status in statuses(tmp_path / "run")] == [4, 4]
    assert [status["state"] for status in statuses(tmp_path / "run")] == ["stopped", "stopped"]
    assert run_all(zygote, command(tiny_cohort, tmp_path / "run"), 2)[0].status == 0
    run_all(zygote, command(tiny_cohort, tmp_path / "through"), 2)
    assert newest(tmp_path / "run").manifest["files"] == newest(tmp_path / "through").manifest["files"]


@pytest.mark.parametrize("who", [0, 1])
def test_r5_a_killed_rank_is_named_and_the_others_end_with_7(zygote, tiny_cohort, tmp_path, who):
    """Process 0 also keeps the store through which they hear of each other."""
    run = tmp_path / "run"
    ended = zygote.start_ranks(command(tiny_cohort, run), 2, hooks={who: "plain;die_at:5", 1 - who: "plain"})
    killed, other = ended[who], ended[1 - who]
    wait_for(lambda: killed.poll() is not None)
    begun = time.monotonic()
    assert other.wait(30) == 7
    assert time.monotonic() - begun < 10
    assert "error[PEER_LOST]" in other.err
    assert f"process {who}" in other.err
    if who == 1:
        assert f"pid {killed.pid}" in other.err
    assert "Traceback" not in other.err
    mine = statuses(run)[1 - who]
    assert (mine["exit_code"], mine["state"]) == (7, "failed")
    assert "PEER_LOST" in mine["error"]
    assert newest(run).step in (2, 4)  # that of step 4 may have been on its way
    assert newest(run).step >= said_written(run)
    assert [child.status for child in run_all(zygote, command(tiny_cohort, run), 2)] == [0, 0]


@pytest.mark.parametrize("hook", ["hang_at:5", "stop_at:5"], ids=["hangs", "stands still"])
def test_r5_a_hung_rank_is_named_and_all_end(zygote, tiny_cohort, tmp_path, hook):
    arguments = [*command(tiny_cohort, tmp_path / "run"), "--set", f"train.peer_timeout={TIMEOUT}"]
    first, second = zygote.start_ranks(arguments, 2, hooks={0: "plain", 1: f"plain;{hook}"})
    wait_for(lambda: newest(tmp_path / "run") is not None and newest(tmp_path / "run").step >= 2)
    begun = time.monotonic()
    assert first.wait(60) == 7
    assert time.monotonic() - begun < TIMEOUT + 5
    assert f"process 1 (pid {second.pid}" in first.err
    assert "hangs" in first.err
    if "hang" in hook:
        assert second.wait(SILENT + 5) == 7  # its watching thread hears of it
    second.kill()


def test_r5_a_rank_that_is_busy_does_not_hang(zygote, tiny_cohort, tmp_path):
    """Reading a cohort and drawing pictures may take longer than a hung process is waited for."""
    arguments = [*command(tiny_cohort, tmp_path / "run", steps=2), "--set", "train.peer_timeout=2"]
    ended = zygote.start_ranks(arguments, 2, hooks={0: "slow_start:4", 1: "slow_start:0"})
    assert [child.wait() for child in ended] == [0, 0], ended[1].err


def test_an_error_that_all_would_make_is_said_once(zygote, tiny_cohort, tmp_path):
    ended = run_all(zygote, command(tmp_path / "nothing", tmp_path / "run"), 2)
    assert [child.status for child in ended] == [3, 3]
    assert "".join(child.err for child in ended).count("error[") == 1


def test_r5_an_error_of_one_rank_is_said_once_and_gives_all_its_exit_code(zygote, tiny_cohort, tmp_path):
    arguments = [*command(tiny_cohort, tmp_path / "run"), "--set", "train.workers=1"]
    ended = run_all(zygote, arguments, 2, only="worker:raise,3")
    assert [child.status for child in ended] == [3, 3]
    told = "".join(child.err for child in ended)
    assert told.count("error[") == 1
    assert statuses(tmp_path / "run")[0]["exit_code"] == 3


def test_r1_a_poisoned_sample_stops_all_ranks_at_the_same_step(zygote, tiny_cohort, tmp_path):
    ended = run_all(zygote, command(tiny_cohort, tmp_path / "run"), 2, hook="plain;poison:3")
    assert [child.status for child in ended] == [5, 5]
    dumps = list((tmp_path / "run").glob("nonfinite-*.json"))
    assert len(dumps) == 1
    dump = json.loads(dumps[0].read_text())
    assert dump["loss_not_finite"] == [3]
    assert dump["processes"] == 2
    assert {status["exit_code"] for status in statuses(tmp_path / "run")} == {5}


def test_c11_an_elastic_restart_goes_on(tiny_cohort, tmp_path):
    """torchrun starts all again after one was lost; the lock of the dead is no lock, the newest checkpoint is found."""
    run, marker = tmp_path / "run", tmp_path / "died"
    (tmp_path / "sitecustomize.py").write_text(
        "import os, pathlib, signal\n"
        f"marker = pathlib.Path({str(marker)!r})\n"
        "if os.environ.get('RANK') == '1' and not marker.exists():\n"
        "    from phmdiff_fast import trainer\n"
        "    real = trainer.learning_rate\n"
        "    def rate(config, step, share):\n"
        "        if step == 5:\n"
        "            marker.touch()\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return real(config, step, share)\n"
        "    trainer.learning_rate = rate\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    job = torchrun(command(tiny_cohort, run), "--max-restarts=1", env={"PYTHONPATH": path})
    _, err = job.communicate(timeout=120)
    assert job.returncode == 0, err
    assert marker.exists()
    assert "going on from step 4" in err
    assert newest(run).step == 12
