"""A torture of the reader: thousands of broken scans, read in a child process that may die, hang or eat memory.

    python tests/faults/reader_torture.py --count 10000

Prints the figures as JSON and ends with 1 if a promise of the reader is broken. Imports no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import json
import os
import re
import resource
import selectors
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import mutations
import numpy as np

from phmdiff_fast.errors import PhmdiffError
from phmdiff_fast.mha import read_scan, read_scan_grid
from phmdiff_fast.nifti import to_image

CODES = {"NOT_A_FILE", "UNREADABLE", "NII_EMPTY", "NII_FORMAT", "NII_HEADER", "NII_4D", "NII_DTYPE", "NII_AFFINE",
         "NII_TOO_BIG", "NII_TRUNC", "NII_CRC", "NII_NONFINITE", "NII_CONSTANT"}  # fmt: skip
LINE = re.compile(r"error\[[A-Z0-9_]+\] [\x20-\x7e]{1,480}")
SLOW = 1.0  # seconds a file
DEAD = 20.0  # seconds after which a silent child counts as hung
ROOM = 1 << 30  # bytes of address space that the child may take beyond what it has when it starts
CAP = 16 << 20  # bytes as float32: the largest volume that is read of a bomb
MEMORY = 200  # MiB, the child's largest resident size


# ---------------------------------------------------------------- the child


def look(path: str, cap: int | None) -> dict:
    """Read one file; what came of it, and which promise it broke, if one."""
    how = {} if cap is None else {"max_gib": cap / 2**30}
    start = time.perf_counter()
    try:
        volume = read_scan(path, **how)
    except PhmdiffError as problem:
        told = {"outcome": problem.code, "seconds": time.perf_counter() - start}
        line = problem.line().replace(path, "FILE")
        right = problem.exit_code == 3 and problem.code in CODES and LINE.fullmatch(line)
        return told if right else {**told, "broken": f"exit {problem.exit_code}, {line!a}"[:400]}
    except BaseException as problem:  # a crash, whatever it is; warnings are errors here
        return {"outcome": "crash", "seconds": 0.0, "broken": f"{type(problem).__name__}: {problem!a}"[:400]}
    told = {"outcome": "accepted", "seconds": time.perf_counter() - start}
    try:
        voxels, grid = volume.voxels, volume.grid
        right = {
            "float32": voxels.dtype == np.float32, "finite": bool(np.isfinite(voxels).all()),
            "shape": grid.shape == read_scan_grid(path).shape and sorted(voxels.shape) == sorted(grid.shape),
            "cap": voxels.nbytes <= (2 << 30 if cap is None else cap), "affine": bool(np.isfinite(volume.affine).all()),
            "goes back": to_image(voxels, grid).shape == grid.shape,
        }  # fmt: skip
        wrong = [name for name, good in right.items() if not good]
        if wrong:
            told["broken"] = "accepted, but not " + ", ".join(wrong)
        told["digest"] = hashlib.sha256(
            voxels.tobytes() + repr(grid.shape).encode() + grid.affine.tobytes()
        ).hexdigest()
    except Exception as problem:
        told["broken"] = f"accepted, then {type(problem).__name__}: {problem!a}"[:400]
    return told


def peak_mib() -> float:
    """Largest resident size of this process so far; ru_maxrss would count that of the one it was forked from too."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def child() -> None:
    """Answer lines ``{"path", "cap"}`` on stdin with lines on stdout, until there are no more."""
    warnings.simplefilter("error")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for line in sys.stdin:
        told = look(**json.loads(line))
        told["mib"] = peak_mib()
        print(json.dumps(told), flush=True)
    if "torch" in sys.modules:
        raise SystemExit("the reader imported torch")


# ---------------------------------------------------------------- the parent


class Child:
    """The process that reads; started again where it died."""

    def __init__(self):
        self.process = None

    def ask(self, path: Path, cap: int | None) -> dict:
        """What came of a file: ``look``'s answer, or outcome "crash" or "hang"."""
        if self.process is None:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            self.process = subprocess.Popen([sys.executable, __file__, "--child"], text=True, env=environment,
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
            self.ready = selectors.DefaultSelector()
            self.ready.register(self.process.stdout, selectors.EVENT_READ)
        try:
            self.process.stdin.write(json.dumps({"path": str(path), "cap": cap}) + "\n")
            self.process.stdin.flush()
            if not self.ready.select(DEAD):
                self.end(kill=True)
                return {"outcome": "hang", "seconds": DEAD, "broken": f"silent for {DEAD} s"}
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            status = self.end(kill=True)
            return {"outcome": "crash", "seconds": 0.0, "broken": f"the process died with {status}"}
        return json.loads(answer)

    def end(self, kill: bool = False) -> int:
        if self.process is None:
            return 0
        if kill:
            self.process.kill()
        with contextlib.suppress(BrokenPipeError):  # what it was asked last is still in the pipe
            self.process.stdin.close()
        self.process.stdout.close()
        self.ready.close()
        status, self.process = self.process.wait(60), None
        return status


class Figures:
    """Counts over some files."""

    def __init__(self):
        self.outcomes, self.broken, self.files, self.slow, self.slowest, self.mib = Counter(), [], 0, 0, (0.0, ""), 0.0

    def add(self, told: dict, name: str) -> None:
        self.files += 1
        self.outcomes[told["outcome"]] += 1
        self.slow += told["seconds"] > SLOW
        self.slowest = max(self.slowest, (told["seconds"], name))
        self.mib = max(self.mib, told.get("mib", 0.0))
        if "broken" in told:
            self.broken.append(f"{name}: {told['broken']}")

    def told(self) -> dict:
        refused = {code: count for code, count in sorted(self.outcomes.items()) if code in CODES}
        return {
            "files": self.files, "crashes": self.outcomes["crash"],
            "hangs": self.slow, "accepted": self.outcomes["accepted"],
            "refused": sum(refused.values()), "codes": refused, "slowest_s": round(self.slowest[0], 4),
            "slowest_file": self.slowest[1], "peak_mib": round(self.mib, 1), "broken": self.broken[:20],
            "broken_count": len(self.broken),
        }  # fmt: skip


def mutated(count: int, seed: int, folder: Path, reader: Child) -> dict:
    """``count`` broken files, each drawn from (seed, its number)."""
    figures, kinds = Figures(), Counter()
    for number in range(count):
        draw = mutations.Draw(seed, number)
        kinds[draw.kind] += 1
        path = folder / f"file{draw.suffix}"
        path.write_bytes(draw.content)
        figures.add(reader.ask(path, None), f"seed {seed} file {number} ({draw.kind}{draw.suffix})")
        path.unlink()
    return figures.told() | {"kinds": dict(sorted(kinds.items()))}


def bombs(count: int, seed: int, folder: Path, reader: Child) -> dict:
    """Packed zeros of up to 90 MB, read with a bound of 16 MiB."""
    figures = Figures()
    for number in range(count):
        draw = mutations.Draw(seed, number)
        raw = mutations.BASES[number % 7].raw
        path = folder / "bomb.nii.gz"
        path.write_bytes(mutations.bomb(draw, raw))
        figures.add(reader.ask(path, CAP), f"seed {seed} bomb {number}")
        path.unlink()
    return figures.told()


def flips(count: int, seed: int, folder: Path, reader: Child, *, packed: bool) -> dict:
    """Single bit flips. Packed: every one must be refused or change neither a voxel nor the grid."""
    rng = np.random.default_rng([seed, packed])
    plain = [base for base in mutations.BASES if base.suffix == ".nii"]
    sound = [gzip.compress(base.raw, 6, mtime=0) if packed else base.raw for base in plain]
    if packed:
        sound.append(mutations.members(mutations.Draw(seed, 0), plain[0].raw))
    path = folder / ("flip.nii.gz" if packed else "flip.nii")
    digests = []
    for content in sound:
        path.write_bytes(content)
        digests.append(reader.ask(path, None)["digest"])
    figures, unchanged, missed = Figures(), 0, []
    for number in range(count):
        which = int(rng.integers(len(sound)))
        bit = int(rng.integers(8 * len(sound[which])))
        content = bytearray(sound[which])
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        told = reader.ask(path, None)
        figures.add(told, f"seed {seed} flip {number} (base {which} bit {bit})")
        if told["outcome"] == "accepted":
            if told.get("digest") == digests[which]:
                unchanged += 1
            else:
                missed.append([which, bit])
    path.unlink()
    return figures.told() | {"unchanged": unchanged, "changed_unnoticed": len(missed), "missed": missed[:10]}


def run(count: int, seed: int = 0, flip_count: int | None = None, bomb_count: int | None = None) -> dict:
    """The figures of all parts, and ``failures``: what was promised and is not so. Takes about 2 s a thousand files."""
    flip_count = count if flip_count is None else flip_count
    start, reader = time.perf_counter(), Child()
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            told = {
                "mutated": mutated(count, seed, folder, reader),
                "bombs": bombs(count // 100 if bomb_count is None else bomb_count, seed, folder, reader),
                "packed_flips": flips(flip_count, seed, folder, reader, packed=True),
                "plain_flips": flips(flip_count // 4, seed, folder, reader, packed=False),
            }
    finally:
        status = reader.end()
    failures = [] if status == 0 else [f"the child ended with {status}"]
    for part, figures in told.items():
        failures += [f"{part}: {line}" for line in figures["broken"]]
        if figures["hangs"]:
            failures.append(f"{part}: {figures['slowest_file']} took {figures['slowest_s']} s")
        if figures["peak_mib"] >= MEMORY:
            failures.append(f"{part}: {figures['peak_mib']} MiB at most, {MEMORY} allowed")
    if told["packed_flips"]["changed_unnoticed"]:
        failures.append(f"packed_flips: not noticed {told['packed_flips']['missed']}")
    return told | {"seed": seed, "seconds": round(time.perf_counter() - start, 1), "failures": failures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="broken files; as many flips in packed files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return child()
    told = run(given.count, given.seed)
    print(json.dumps(told, indent=1))
    sys.exit(bool(told["failures"]))


if __name__ == "__main__":
    main()
