"""``make torture``: the faults of docs/FAULTS.md, thousands of times, and a table of what came of it.

    python tests/faults/torture.py [--only NAME ...] [--share 0.1] [--json FILE]

Ends with 1 if a row misses its goal. ``--share`` does that part of every row. Minutes to an hour on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from cells import Resumes, cells, command, kills, newest, sigterms  # noqa: E402
from zygote import Zygote, wait_for  # noqa: E402

from phmdiff_fast.distributed import SILENT  # noqa: E402


@dataclass
class Row:
    """A line of the table: what was done, what came of it, what was wanted, and whether it is so."""

    name: str
    done: str
    figure: str
    goal: str
    good: bool


@dataclass
class Place:
    zygote: Zygote
    cohort: Path
    folder: Path
    share: float

    def count(self, whole: int) -> int:
        return max(1, round(whole * self.share))


def kill(at: Place) -> list[Row]:
    made = kills(at.zygote, at.cohort, at.folder, at.count(200))
    good = made["lost"] == made["steps behind"] == made["did not go on"] == 0 and made["same bits"]
    figure = (f"{made['lost']} lost, {made['steps behind']} steps behind, step {made['furthest']}, "
              f"{'the' if made['same bits'] else 'OTHER'} bits of a run nobody killed")  # fmt: skip
    return [Row("kill -9 at random", f"{made['kills']} kills", figure, "0 lost, 0 behind", good)]


def sigterm(at: Place) -> list[Row]:
    made = sigterms(at.zygote, at.cohort, at.folder, at.count(100))
    good = made["saves"] == made["signals"] and made["most steps lost"] <= 1 and not made["other exit codes"]
    figure = f"{made['saves']} saves, at most {made['most steps lost']} steps lost"
    return [Row("SIGTERM at random", f"{made['signals']} signals", figure, "all save, <= 1 step lost", good)]


def resume(at: Place) -> list[Row]:
    todo = cells() if at.share == 1 else cells(at.count(288))
    resumes = Resumes(at.zygote, at.cohort, at.folder)
    wrong = [f"{way} {moment}: {why}" for way, moment in todo if (why := resumes.cell(way, moment))]
    for line in wrong:
        print("  " + line, file=sys.stderr)
    figure = f"{len(todo) - len(wrong)} end with the same bits"
    return [Row("resume, bit for bit", f"{len(todo)} cells", figure, "all", not wrong)]


def peers(at: Place) -> list[Row]:
    rows, timeout = [], 4
    for what, hook, limit in (("killed", "die_at:5", 10), ("hung", "hang_at:5", timeout + 5)):
        worst, named, codes = 0.0, 0, set()
        count = at.count(10)
        for number in range(count):
            out = at.folder / f"{what}-{number}"
            arguments = [*command(at.cohort, out), "--set", f"train.peer_timeout={timeout}"]
            first, second = at.zygote.start_ranks(arguments, 2, hooks={0: "plain", 1: f"plain;{hook}"})
            if what == "killed":
                wait_for(lambda second=second: second.poll() is not None)
            else:
                wait_for(lambda out=out: newest(out) is not None and newest(out).step >= 2)
            begun = time.monotonic()
            codes.add(first.wait())
            worst = max(worst, time.monotonic() - begun)
            if what == "hung":
                codes.add(second.wait(SILENT + 5))
            named += f"process 1 (pid {second.pid}" in first.err
        good = worst <= limit and named == count and codes == {7}
        rows.append(Row(f"rank {what}", f"{count} times", f"all end within {worst:.1f} s, {named} named",
                        f"<= {limit} s, all named", good))  # fmt: skip
    return rows


def calls(at: Place) -> list[Row]:
    import injection

    rows = injection.torture(stride=max(1, round(1 / at.share)))
    faults, readable = (sum(row[key] for row in rows) for key in ("faults", "readable"))
    failures = sum(row["failures"] for row in rows)
    done = f"{sum(row['calls'] for row in rows)} calls, {faults} faults"
    good = readable == faults and not failures
    return [Row("write, sync, rename x fault", done, f"{readable} readable afterwards", "all", good)]


def reader(at: Place) -> list[Row]:
    import reader_torture

    made = reader_torture.run(at.count(10_000))
    for line in made["failures"]:
        print("  " + line, file=sys.stderr)
    files, flipped = made["mutated"], made["packed_flips"]
    most = max(made[part]["peak_mib"] for part in ("mutated", "bombs", "packed_flips", "plain_flips"))
    figure = (f"{files['crashes']} crashes, {files['hangs']} hangs, {files['broken_count']} other lines, "
              f"{most:.0f} MiB, {1e3 * files['slowest_s']:.0f} ms")  # fmt: skip
    sound = not made["failures"]
    found = f"{flipped['refused']} found, {flipped['unchanged']} change nothing, {flipped['changed_unnoticed']} missed"
    return [
        Row("mutated NIfTI and .mha", f"{files['files']} files", figure, "0, 0, 0, < 200 MiB, < 1 s", sound),
        Row("bit flips in .nii.gz", f"{flipped['files']} flips", found, "0 missed", sound),
    ]


def flips(at: Place) -> list[Row]:
    import flips as of_checkpoints

    made = of_checkpoints.run(at.count(10_000), 0)
    figure = f"{made['found']} found, {made['unchanged']} change nothing, {len(made['wrong'])} missed"
    return [Row("bit flips in checkpoints", f"{made['flips']} flips", figure, "0 missed", not made["wrong"])]


def hostile(at: Place) -> list[Row]:
    import pytest

    class Count:
        passed = failed = 0

        def pytest_runtest_logreport(self, report):
            self.passed += report.when == "call" and report.passed
            self.failed += report.failed

    import hostile_data
    import hostile_use

    kinds = len(hostile_use.KINDS) + len(hostile_data.KINDS)
    count = Count()
    files = [str(HERE / name) for name in ("test_hostile_checkpoints.py", "test_reader.py")]
    with open(at.folder / "pytest.txt", "w") as said, contextlib.redirect_stdout(said):
        pytest.main(["-q", "-p", "no:cacheprovider", "-k", "hostile or kind or c9 or c10", *files], plugins=[count])
    figure = f"{count.passed} tests passed, {count.failed} failed"
    good = kinds >= 30 and not count.failed
    return [Row("hostile files", f"{kinds} kinds", figure, ">= 30 kinds, none executed", good)]


def stall(at: Place) -> list[Row]:
    import subprocess

    made = at.folder / "stall.json"
    threads = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
    subprocess.run([sys.executable, "-m", "benchmarks.checkpoint_stall", "--preset", "s4", "--json", str(made)],
                   check=True, cwd=HERE.parents[1], env=threads, stdout=subprocess.DEVNULL)  # fmt: skip
    figures = json.loads(made.read_text())
    figure = f"waits {100 * figures['copy_share']:.1f} % of a step, +{100 * figures['beside_share']:.1f} % beside"
    done = f"{figures['repeats']} of {figures['checkpoint_mib']:.0f} MiB"
    return [Row("cost of a checkpoint, s4", done, figure, "waits <= 10 %", figures["copy_share"] <= 0.1)]


PARTS: dict[str, Callable[[Place], list[Row]]] = {
    part.__name__: part for part in (kill, calls, reader, flips, hostile, resume, peers, sigterm, stall)
}


def table(rows: list[Row]) -> str:
    lines = [("", "done", "figure", "goal", "")]
    lines += [(row.name, row.done, row.figure, row.goal, "ok" if row.good else "MISSED") for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    aligned = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(line.rstrip() for line in aligned)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    from conftest import write_tiny_cohort

    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, Zygote() as zygote:
        cohort = write_tiny_cohort(Path(folder) / "cohort")
        for name in given.only:
            place = Place(zygote, cohort, Path(folder) / name, given.share)
            place.folder.mkdir()
            begun = time.monotonic()
            rows += PARTS[name](place)
            print(f"{name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    print(table(rows))
    if given.json:
        given.json.write_text(json.dumps([row.__dict__ for row in rows], indent=1) + "\n")
    sys.exit(not all(row.good for row in rows))


if __name__ == "__main__":
    main()
