"""Every call that changes the disk failing once each: rows C1, C2 and C3 of the fault matrix. See ``injection.py``."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from injection import Server, Unavailable, library
from injection_scenarios import PLANTED, SCENARIOS

from phmdiff_fast.files import is_unfinished, remove_unfinished, whole_file, write_json

KILLS = ("KILL", "HALF_KILL")
# What each costs in `make test`: every so many-th pair of a call and a fault. The script runs them all.
STRIDE = {"checkpoint_beside": 5, "checkpoint_by_two": 6, "volume_gz": 2, "volume": 2, "lock": 2, "cache": 3, "run": 2,
          "picture": 4}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    memory = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path_factory.getbasetemp()
    folder = memory / f"phmdiff-injection-{os.getpid()}"
    folder.mkdir()
    try:
        with Server(folder) as server:
            server.count("json")
            yield server
    except Unavailable as why:
        pytest.skip(str(why))
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def results(server):
    """Scenario -> what came of its injections, run when first asked for."""
    known = {}

    def of(name):
        if name not in known:
            known[name] = list(server.inject_all(name, stride=STRIDE.get(name, 1)))
        return known[name]

    return of


def wrong(results) -> list[str]:
    return [f"{r.what} at {r.call}: {'; '.join(r.wrong)}" for r in results if r.wrong]


@pytest.mark.parametrize("name", SCENARIOS)
def test_c1_a_call_that_fails_leaves_the_old_or_the_new_and_is_said(results, name):
    failed = [result for result in results(name) if result.what not in KILLS]
    assert len(failed) >= 2
    assert wrong(failed) == []


@pytest.mark.parametrize("name", SCENARIOS)
def test_c2_a_kill_at_any_call_leaves_the_old_or_the_new(results, name):
    killed = [result for result in results(name) if result.what in KILLS]
    assert killed
    assert all(result.ended == "killed" for result in killed)
    assert wrong(killed) == []


def test_c1_a_full_disk_is_told_with_free_and_needed(results):
    full = [result for result in results("checkpoint") if result.what == "FULL"]
    assert len(full) >= 8
    for result in full:
        assert re.search(r"error\[CHECKPOINT_WRITE\].*; \d+ bytes free, 240804 needed", result.line), result.line
    full = [result for result in results("json") if result.what == "FULL"]
    assert full
    assert all(re.search(r"error\[OUTPUT_WRITE\].*; \d+ bytes free\)", result.line) for result in full)


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_written_carelessly_is_found_out(server, name):
    found = wrong(server.inject_all(name))
    sought = {"in_place": ["KILL at", "JSONDecodeError"], "sync_not_looked_at": ["a failed fsync", "left run.json.new"]}
    assert all(any(text in line for line in found) for text in sought[name]), found


def test_c2_what_a_kill_left_can_be_told_from_all_else(tmp_path):
    kept = [".lock", "run.json", ".hidden.tmp", "a.0123abcd.tmp", ".run.json.0123abcd.tmp.gz"]
    for name in (*kept, ".run.json.0123abcd.tmp", ".a.nii.gz.ffffffff.tmp"):
        (tmp_path / name).touch()
    with whole_file(tmp_path / "now"):
        assert sum(map(is_unfinished, tmp_path.iterdir())) == 3
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "now"])


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc what a descriptor is")
def test_c3_a_file_system_that_syncs_no_folders_is_no_error(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(tmp_path / "a.json", 1)
    assert (tmp_path / "a.json").read_text() == "1\n"


def order(server, name) -> list[tuple[str, ...]]:
    """The calls as (kind, path, path), without which of its forms it was."""
    return [(re.sub("(at|at2)$", "", call.name), *call.paths) for call in server.count(name)]


def test_c3_a_checkpoint_gets_its_name_once_all_is_synced(server):
    calls = [call for call in order(server, "checkpoint") if "step-00000001" not in call[1]]  # that is pruned
    made, *calls = calls
    assert made[0] == "mkdir"
    temporary, folder = made[1], "checkpoints"
    files = list(dict.fromkeys(call[1] for call in calls if call[0] == "open"))
    assert {Path(path).name for path in files} >= {"model.safetensors", "ema.safetensors", "manifest.json"}
    at = 0
    for path in files:  # open, write ..., fsync
        own = [call[0] for call in calls[at:] if call[1] == path]
        assert own == ["open", *["write"] * (len(own) - 2), "fsync"], path
        assert len(own) > 2
        at += len(own)
    assert calls[at : at + 3] == [
        ("fsync", temporary), ("rename", temporary, "checkpoints/step-00000003"), ("fsync", folder),
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "final"), [("json", "run.json"), ("volume_gz", "a.nii.gz"), ("page", "page.html")])
def test_c3_a_file_gets_its_name_once_it_is_synced_and_then_its_folder_is(server, name, final):
    calls = order(server, name)
    temporary = calls[0][1]
    writes = [("write", temporary)] * (len(calls) - 4)
    assert writes
    assert calls == [("open", temporary), *writes, ("fsync", temporary), ("rename", temporary, final), ("fsync", ".")]


def test_c1_a_disk_that_is_really_full(tmp_path):
    """A file system of 400 KiB in a namespace of its own, which is gone with its process."""
    code = """
import sys
from pathlib import Path
import torch
from phmdiff_fast import checkpoint
from phmdiff_fast.errors import PhmdiffError
folder = Path(sys.argv[1])
for step, size in ((1, 10_000), (2, 10_000), (3, 100_000)):
    try:
        checkpoint.save(folder, step, {"model": {"w": torch.full((size,), float(step))}}, {}, keep=2)
    except PhmdiffError as problem:
        print(problem.exit_code, problem.line())
print([path.name for path in sorted(folder.iterdir())], checkpoint.newest(folder).tensors("model")["w"][0].item())
"""
    mount = 'mount -t tmpfs -o size=400k none "$1" && exec "$2" -c "$3" "$1"'
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here to mount a small disk in")
    command = ["unshare", "-rm", "sh", "-c", mount, "sh", str(tmp_path), sys.executable, code]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    if "mount" in ran.stderr:
        pytest.skip(f"a small disk cannot be mounted: {ran.stderr.strip()}")
    error, left = ran.stdout.splitlines()
    assert re.match(r"74 error\[CHECKPOINT_WRITE\].*No space left on device; \d+ bytes free, 400000 needed", error)
    assert left == "['step-00000001', 'step-00000002'] 2.0"


def test_a_program_can_be_disturbed_from_its_environment(tmp_path):
    """As a whole training can: LD_PRELOAD and INJECT_*."""
    try:
        injector = library()
    except Unavailable as why:
        pytest.skip(str(why))
    folder, log = tmp_path / "out", tmp_path / "log"
    folder.mkdir()
    code = "import sys; from phmdiff_fast.files import write_json; write_json(sys.argv[1] + '/run.json', [1])"

    def run(**inject):
        settings = {f"INJECT_{name}": str(value) for name, value in inject.items()}
        return subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=60,
                              env={**os.environ, "LD_PRELOAD": str(injector), "INJECT_PREFIX": str(folder),
                                   "INJECT_LOG": str(log), **settings})  # fmt: skip

    assert run().returncode == 0
    assert [line.split("\t")[:2] for line in log.read_text().splitlines()][-1] == ["5", "fsync"]
    assert run(AT=2, WHAT="HALF_KILL").returncode == -signal.SIGKILL
    assert "OUTPUT_WRITE" in run(AT=2, WHAT="ENOSPC", STICKY=1).stderr
    assert run(AT=1, WHAT="NONSENSE").returncode == 70
