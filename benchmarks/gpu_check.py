"""What a GPU has to show, in the minutes it is lent: ``python -m benchmarks.gpu_check --minutes 8 [--json FILE]``.

The tests marked ``gpu`` come first, a process a file and several at a time, since most of what they take is
compilation. Each is told as it ends, with the first line of what is wrong, so that a run that is cut short says what
it has seen. A kernel that reads where it must not takes its process with it: what is left of that file goes on in
a new one. Beside them the benchmarks' variants are compiled, into caches. Then, alone on the GPU, the cases tagged
"check" are timed by ``benchmarks.compare``, as many as there is time for, and what is known is written after each;
last a training and a sampling step, if there is time for them.

Exit 1 if a test fails, was not run, or a variant computes something else than eager float64.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOST = 9  # exit code of tests/conftest.py: the process can use the GPU no more
TESTS_SHARE = 0.5  # of the minutes at most; sanitizers and a thousand runs of each kernel are among them
COMPARED_SHARE = 0.7  # of what is left
OPS = ("short_attention", "patch_mask", "adaln", "pyramid", "mmd", "haar")  # bench_<op>.py, in order of interest


@dataclass
class Seen:
    """Outcomes of a part's tests: name -> passed, skipped or failed; and of the failed ones why."""

    part: tuple[str, str]  # file, and which of its tests, as pytest -k takes it
    outcomes: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    ended: bool = False

    def read(self, log: Path) -> None:
        for line in log.read_text().splitlines() if log.exists() else ():
            try:
                one = json.loads(line)
            except ValueError:  # its process was killed as it wrote
                continue
            name = one["test"]
            if self.outcomes.get(name) != "failed":  # set-up, call and tear-down each report
                self.outcomes[name] = one["outcome"]
            if one["outcome"] == "failed":
                self.reasons.setdefault(name, one["why"])


def parts_of_tests() -> list[tuple[str, str]]:
    """Files with tests for a GPU; what runs under compute-sanitizer takes as long as all the rest, so it goes apart."""
    texts = {f"tests/{path.name}": path.read_text() for path in sorted((ROOT / "tests").glob("test_*.py"))}
    marked = [file for file, text in texts.items() if "mark.gpu" in text]
    watched = [(file, "sanitizer") for file in marked if "compute_sanitizer" in texts[file]]
    return [*watched, *((file, "not sanitizer") for file in marked)]


def run_tests(part: tuple[str, str], until: float, folder: Path, command: list[str] | None = None) -> Seen:
    """A part's GPU tests, in new processes as long as one is lost to an error of the device.

    until : of time.monotonic(); command : instead of pytest, given the same arguments
    """
    (file, which), seen = part, Seen(part)
    log, said = (folder / f"{Path(file).stem} {which}.{kind}" for kind in ("jsonl", "txt"))
    while (left := until - time.monotonic()) > 1:
        done = [part for name in seen.outcomes for part in ("--deselect", name)]
        pytest = command or [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"]
        call = [*pytest, file, "-k", which, *done]
        known = len(seen.outcomes)
        code = run(call, left, said, PHMDIFF_TEST_LOG=str(log))
        seen.read(log)
        if code != LOST or len(seen.outcomes) == known:
            seen.ended = code in (0, 1, 5)  # 5: all were deselected
            break
    failed = [name for name, outcome in seen.outcomes.items() if outcome == "failed"]
    counts = {kind: list(seen.outcomes.values()).count(kind) for kind in ("passed", "skipped", "failed")}
    told = ", ".join(f"{number} {kind}" for kind, number in counts.items() if number) or "no test"
    print(f"{file}, {which}: {told}{'' if seen.ended else '; NOT TO ITS END'}", flush=True)
    for name in failed:
        print(f"  FAILED {name}: {seen.reasons[name][:300]}", flush=True)
    if not seen.ended:
        print(*(f"  | {line[:200]}" for line in _last_lines(said, 3)), sep="\n", flush=True)
    return seen


def run(command: list[str], seconds: float, output: Path, **environment: str) -> int | None:
    """Its exit code; None if time ran out. What it started ends with it: on the GPU it would disturb what follows."""
    with open(output, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, stdout=file,
                                   stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def _last_lines(path: Path, number: int) -> list[str]:
    return path.read_text(errors="replace").splitlines()[-number:] if path.exists() else []


def compare(*more: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.compare", "--device", "cuda", "--tag", "check", *more]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it, %(default)s")
    parser.add_argument("--jobs", type=int, default=min(8, max(2, (os.cpu_count() or 2) // 2)), help="test processes")
    parser.add_argument("--only", choices=("tests", "times"))
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "gpu-compare.json")
    args = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    begun, wrong = time.monotonic(), False
    until = begun + 60 * args.minutes
    tests, times = args.only != "times", args.only != "tests"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tests_until = begun + 60 * args.minutes * (TESTS_SHARE if times else 1)

        def warm() -> None:  # one after the other: together they would take the tests' memory
            for op in OPS if times else ():
                if (left := tests_until - time.monotonic()) > 1:
                    run(compare("--op", op, "--seconds", "0.005"), left, folder / f"{op}.txt")

        with ThreadPoolExecutor(args.jobs + 1) as pool:
            warmed = pool.submit(warm)
            seen = list(pool.map(lambda part: run_tests(part, tests_until, folder), parts_of_tests() if tests else ()))
            warmed.result()
        wrong |= any(not one.ended or "failed" in one.outcomes.values() for one in seen)
        if times:
            print(f"{time.monotonic() - begun:.0f} s; now the times, alone on the GPU", flush=True)
            left = COMPARED_SHARE * (until - time.monotonic())
            timed = compare(
                "--op", ",".join(OPS), "--seconds", "0.1", "--limit", f"{left:.0f}", "--json", str(args.json)
            )
            wrong |= subprocess.run(timed, cwd=ROOT, check=False).returncode != 0
            steps = [sys.executable, "-m", "pytest", "benchmarks/bench_sampling.py", "benchmarks/bench_train.py",
                     "--benchmark-only", f"--benchmark-json={args.json.with_name('gpu-steps.json')}"]  # fmt: skip
            ended = run(steps, max(1.0, until - time.monotonic()), folder / "steps.txt")
            print("a training and a sampling step: " + ("no time was left" if ended is None else f"exit code {ended}"))
            print(*_last_lines(folder / "steps.txt", 25), sep="\n")
            wrong |= ended not in (0, None)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
