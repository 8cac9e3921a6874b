"""Peak memory of ``sample`` on one volume and on many: ``python -m benchmarks.sample_memory RUN SUBJECT [--many 100]``.

SUBJECT is a folder of one person; the many are links to it. Each count is a process of its own, whose largest resident
size the system tells when it ends.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path


def peak_mib(run: Path, subject: Path, count: int) -> float:
    """MiB of a process that synthesizes ``count`` volumes; raises SystemExit if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        cohort, out = Path(folder) / "cohort", Path(folder) / "out"
        for n in range(count):
            own = cohort / f"p{n:04d}"
            own.mkdir(parents=True)
            for file in subject.iterdir():
                (own / file.name.replace(subject.name, own.name)).symlink_to(file.resolve())
        arguments = ["-m", "phmdiff_fast", "sample", str(run), str(cohort), "--out", str(out), "--quiet"]
        pid = os.posix_spawn(sys.executable, [sys.executable, *arguments], os.environ,
                             file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)])  # fmt: skip
        _, status, used = os.wait4(pid, 0)
        if status or len(list(out.glob("*_syn.nii.gz"))) != count:
            raise SystemExit(f"sample failed on {count} volumes")
        return used.ru_maxrss / 1024


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sample_memory", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("subject", type=Path)
    parser.add_argument("--many", type=int, default=100)
    given = parser.parse_args(arguments)
    one, many = (peak_mib(given.run, given.subject, count) for count in (1, given.many))
    print(f"1 volume: {one:.0f} MiB, {given.many} volumes: {many:.0f} MiB, {many / one - 1:+.1%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
