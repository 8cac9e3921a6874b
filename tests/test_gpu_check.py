"""The check of a GPU: what it makes of tests that end, fail, lose the device or take too long. No GPU needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest

from benchmarks import gpu_check

ROOT = Path(__file__).resolve().parent.parent
# Like pytest on a file of four tests, of which the second takes the GPU with it, if it is run.
FAKE = """
import json, os, sys, time
done = [sys.argv[n + 1] for n, word in enumerate(sys.argv) if word == "--deselect"]
outcomes = {"a": "passed", "b": "failed", "c": "skipped", "d": "passed"}
for name, outcome in outcomes.items():
    if name not in done:
        if name == os.environ.get("SLOW"):
            time.sleep(60)
        line = {"test": name, "outcome": outcome, "why": "CUDA error: an illegal memory access"}
        with open(os.environ["PHMDIFF_TEST_LOG"], "a") as log:
            log.write(json.dumps(line) + "\\n")
        if outcome == "failed":
            sys.exit(%d)
sys.exit(0)
"""


@pytest.fixture
def fake(tmp_path):
    (tmp_path / "fake.py").write_text(FAKE % gpu_check.LOST)
    return [sys.executable, str(tmp_path / "fake.py")]


def test_what_is_left_goes_on_in_a_new_process(fake, tmp_path, capsys):
    seen = gpu_check.run_tests(("tests/test_x.py", "sanitizer"), time.monotonic() + 60, tmp_path, fake)
    assert seen.outcomes == {"a": "passed", "b": "failed", "c": "skipped", "d": "passed"}
    assert seen.ended
    told = capsys.readouterr().out
    assert "tests/test_x.py, sanitizer: 2 passed, 1 skipped, 1 failed\n" in told
    assert "FAILED b: CUDA error: an illegal memory access" in told


def test_what_it_has_seen_is_told_when_time_runs_out(fake, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SLOW", "d")
    seen = gpu_check.run_tests(("tests/test_x.py", "all"), time.monotonic() + 6, tmp_path, fake)
    assert seen.outcomes == {"a": "passed", "b": "failed", "c": "skipped"}
    assert not seen.ended
    assert "NOT TO ITS END" in capsys.readouterr().out


def test_a_run_that_tells_nothing_is_not_begun_for_ever(tmp_path):
    command = [sys.executable, "-c", f"raise SystemExit({gpu_check.LOST})"]
    assert not gpu_check.run_tests(("tests/test_x.py", "all"), time.monotonic() + 60, tmp_path, command).ended


STARTS_ANOTHER = """
import subprocess, sys
subprocess.run([sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"])
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_what_a_command_started_ends_with_it(tmp_path):
    """A test under compute-sanitizer is a grandchild, and would go on beside what is timed."""
    said = tmp_path / "said.txt"
    assert gpu_check.run([sys.executable, "-c", STARTS_ANOTHER], 4, said) is None
    stat = Path(f"/proc/{int(said.read_text())}/stat")
    until = time.monotonic() + 10  # whoever inherits it has to take note first
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX":
        assert time.monotonic() < until, "still running"
        time.sleep(0.05)


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"test": "a", "outcome": "passed", "why": ""}\n{"test": "b", "outc')
    seen = gpu_check.Seen(("tests/test_x.py", "all"))
    seen.read(log)
    assert seen.outcomes == {"a": "passed"}


@pytest.mark.skipif(conftest.torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit) as leaving:
        gpu_check.main([])
    assert leaving.value.code == 2
    assert "torch sees no GPU here" in capsys.readouterr().err


def test_every_file_with_a_gpu_mark_is_a_part():
    parts = gpu_check.parts_of_tests()
    files = {file for file, which in parts if which == "not sanitizer"}
    assert {"tests/test_gpu.py", "tests/test_gpu_kernels.py", "tests/test_step.py"} <= files
    watched = {file for file, which in parts if which == "sanitizer"}
    assert watched == {"tests/test_gpu_kernels.py", "tests/test_gpu_extension.py"}


def test_tests_are_told_as_they_end(tmp_path):
    log = tmp_path / "log.jsonl"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/test_gpu_kernels.py",
        "tests/test_imports.py",
        "-p",
        "no:cacheprovider",
    ]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PHMDIFF_TEST_LOG": str(log)}, capture_output=True, check=True)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    outcomes = {line["test"].partition("::")[0]: line["outcome"] for line in lines}
    assert outcomes["tests/test_imports.py"] == "passed"
    if conftest.torch.cuda.is_available():
        return
    assert outcomes["tests/test_gpu_kernels.py"] == "skipped"
    assert any("needs a GPU" in line["why"] for line in lines)


@pytest.mark.parametrize(
    ("why", "lost"), [("CUDA error: an illegal memory access was met", True), ("assert 1 == 2", False)]
)
def test_an_error_that_stays_ends_the_process(why, lost, tmp_path, monkeypatch):
    monkeypatch.setenv("PHMDIFF_TEST_LOG", str(tmp_path / "log.jsonl"))
    report = SimpleNamespace(when="call", outcome="failed", failed=True, nodeid="x", longreprtext=why,
                             longrepr=SimpleNamespace(reprcrash=SimpleNamespace(message=why)))  # fmt: skip
    if lost:
        with pytest.raises(pytest.exit.Exception) as leaving:
            conftest.pytest_runtest_logreport(report)
        assert leaving.value.returncode == gpu_check.LOST
    else:
        conftest.pytest_runtest_logreport(report)
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"test": "x", "outcome": "failed", "why": why}
