"""Do the kernel tests notice a fault? ``python tests/mutants.py [--op adaln] [--jobs 2]``.

tests/planted/<op>.py lists FAULTS: (file, old text that occurs exactly once, new text, what it is), and
may name TESTS (beginnings of test files, the operation's name unless given), MODULE (what those tests
import) and ARGUMENTS (of pytest). Each fault is applied to a copy of the project, on which tests/test_<op>*.py
must then fail. Exit 1 if fewer than 95 % are noticed, or with all operations fewer than 40 were planted. A
change that does not compile, or a copy that fails unchanged, proves nothing and is refused.

Of csrc/ the objects that a fault is in are compiled again (generic instruction set, -O1) and linked to the
others; then the source is put back, so that the package takes the library for one of these sources.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARE, LEAST = 0.95, 40
COMMANDS = "compiled.txt"  # in the copy that all others are made from: the compiler's command lines
COPIED = ("kernels", "phmdiff_fast", "csrc", "tests", "benchmarks", "setup.py", "pyproject.toml", "README.md",
          "LICENSE", "MANIFEST.in")  # fmt: skip
# Hypothesis would spend minutes in the interpreter on making a failing example small; nobody reads it here.
PLUGIN = """from hypothesis import Phase, settings

settings.register_profile("mutants", phases=(Phase.explicit, Phase.generate), database=None)
settings.load_profile("mutants")
"""


class Refused(Exception):
    """A planted fault or a copy that would prove nothing."""


@dataclass(frozen=True)
class Fault:
    op: str
    file: str
    old: str
    new: str
    what: str

    def apply(self, root: Path) -> None:
        """Change the copy. Raises Refused where the text is not there once, or the result does not compile."""
        path = root / self.file
        if not path.is_file():
            raise Refused(f"{self}: no such file")
        text = path.read_text()
        if text.count(self.old) != 1:
            raise Refused(f"{self}: the old text occurs {text.count(self.old)} times")
        changed = text.replace(self.old, self.new)
        if changed == text:
            raise Refused(f"{self}: nothing changes")
        if path.suffix == ".py":
            try:
                compile(changed, self.file, "exec")
            except SyntaxError as problem:
                raise Refused(f"{self}: the new text does not compile: {problem}") from None
        path.write_text(changed)

    def __str__(self) -> str:
        return f"{self.op}: {self.what} ({self.file})"


def faults(root: Path = ROOT, op: str | None = None) -> list[Fault]:
    paths = sorted((root / "tests" / "planted").glob("*.py"))
    return [Fault(p.stem, *row) for p in paths if op in (None, p.stem) for row in runpy.run_path(str(p))["FAULTS"]]


def named(op: str, what: str, default, root: Path = ROOT):
    """TESTS, MODULE or ARGUMENTS of tests/planted/<op>.py."""
    path = root / "tests" / "planted" / f"{op}.py"
    return runpy.run_path(str(path)).get(what, default) if path.is_file() else default


def files_of(op: str, file: str = "", root: Path = ROOT) -> list[str]:
    """Test files of an operation, those first that are the likelier to notice a fault in ``file``."""
    tests = named(op, "TESTS", (op,), root)
    patterns = [f"{test}*.py" if "/" in test else f"test_{test}*.py" for test in tests]
    found = {str(p.relative_to(root)) for pattern in patterns for p in (root / "tests").glob(pattern)}
    if not found:
        raise Refused(f"{op}: there is no tests/test_{op}*.py")
    stem, kernel = Path(file).stem, Path(file).stem.startswith("_")
    return sorted(found, key=lambda name: (stem.strip("_") not in name, ("_triton" in name) != kernel, name))


def copied(folder: str | Path, root: Path = ROOT) -> Path:
    """A copy of the project in ``folder``."""
    target = Path(folder) / "copy"
    target.mkdir()
    for name in COPIED:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        elif source.exists():
            shutil.copy2(source, target / name)
    (target / "no_shrinking.py").write_text(PLUGIN)
    return target


def build(base: Path) -> None:
    """Build csrc/ in the copy that all others are made from, and keep the compiler's command lines."""
    tool, log = base / "compiler", base / COMMANDS
    real = shutil.which("c++") or shutil.which("g++")
    if not real:
        raise Refused("csrc: there is no C++ compiler")
    said = 'line=$(printf "%q " "$@"); echo "$line" >> ' + shlex.quote(str(log))  # one write: several run at once
    tool.write_text(f'#!/bin/bash\n{said}\nexec {shlex.quote(real)} "$@"\n')
    tool.chmod(0o755)
    env = {**environment(base), "CXX": str(tool), "CXXFLAGS": "-O1", "PHMDIFF_ISAS": "generic", "PHMDIFF_CUDA": "0",
           "PHMDIFF_EXTENSION": "1"}  # fmt: skip
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"]
    ran = subprocess.run(command, cwd=base, env=env, capture_output=True, text=True)
    if ran.returncode:
        raise Refused(f"csrc: cannot be built: {ran.stderr[-600:]}")


def includes(source: Path, seen: set[Path] | None = None) -> set[Path]:
    """The file and all of csrc/ that it includes."""
    seen = set() if seen is None else seen
    source = source.resolve()
    if source not in seen and source.is_file():
        seen.add(source)
        for name in re.findall(r'^#include "(.+)"', source.read_text(), re.MULTILINE):
            includes(source.parent / name, seen)
    return seen


def rebuild(fault: Fault, copy: Path, base: Path) -> None:
    """The library of a copy with a fault in csrc/. Raises Refused where it does not compile."""
    changed, made = (copy / fault.file).resolve(), {}
    lines = [shlex.split(line) for line in (base / COMMANDS).read_text().splitlines()]
    for command in [line for line in lines if "-c" in line]:
        source = copy / Path(command[command.index("-c") + 1]).relative_to(base.resolve())
        if changed in includes(source):
            out = command[command.index("-o") + 1]
            made[out] = str(copy / Path(out).name)
            command = [*command[: command.index("-c")], "-c", str(source), "-o", made[out]]
            ran = subprocess.run(["c++", *command], capture_output=True, text=True)
            if ran.returncode:
                raise Refused(f"{fault}: the new text does not compile: {ran.stderr[-600:]}")
    if not made:
        raise Refused(f"{fault}: no object is made of this file")
    link = next(line for line in lines if "-shared" in line)
    link = [made.get(word, word) for word in link]
    link[link.index("-o") + 1] = str(copy / "phmdiff_fast" / "_C.so")
    subprocess.run(["c++", *link], check=True, capture_output=True)
    shutil.copy2(base / fault.file, copy / fault.file)


def environment(copy: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}


def runs_the_copy(copy: Path, op: str) -> None:
    """Raises Refused where an installed package would be tested in place of the copy."""
    code = f"import {named(op, 'MODULE', f'phmdiff_fast.kernels.{op}', copy)} as m; print(m.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=copy, env=environment(copy), capture_output=True, text=True
    )
    if found.returncode or copy.resolve() not in Path(found.stdout.strip()).resolve().parents:
        raise Refused(f"{op}: the copy is not what runs: {found.stdout.strip() or found.stderr.strip()[-300:]}")


def run_tests(copy: Path, tests: list[str], limit: float) -> tuple[int, str]:
    """(pytest's exit status, or -1 beyond ``limit`` seconds; the end of what it said)."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-o", "addopts=", "--tb=line", "-p", "no:cacheprovider",
               "-p", "no_shrinking", *tests]  # fmt: skip
    process = subprocess.Popen(command, cwd=copy, env=environment(copy), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, start_new_session=True)  # fmt: skip
    try:
        said, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        return -1, said[-600:]
    return process.returncode, said[-600:]


def built(fault: Fault) -> bool:
    """Whether the fault is in what the library is made of; the CUDA sources' tests compile those themselves."""
    return fault.file.startswith("csrc/") and not fault.file.startswith("csrc/cuda/")


def noticed(fault: Fault, limit: float, root: Path = ROOT) -> bool:
    """Whether the tests fail on the faulty copy; a crash or a hang is a failure."""
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(folder, root)
        fault.apply(copy)
        if built(fault):
            rebuild(fault, copy, root)
        arguments = [*files_of(fault.op, fault.file, root), *named(fault.op, "ARGUMENTS", (), root)]
        status, said = run_tests(copy, arguments, limit)
    if status in (3, 4, 5):  # pytest's own error, a wrong command line, no tests
        raise Refused(f"{fault}: pytest did not run: {said}")
    return status != 0


def sound(op: str, limit: float, root: Path = ROOT) -> float:
    """Seconds the tests of an operation take on the unchanged copy. Raises Refused if they fail."""
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(folder, root)
        runs_the_copy(copy, op)
        start = time.perf_counter()
        status, said = run_tests(copy, [*files_of(op, root=root), *named(op, "ARGUMENTS", (), root)], limit)
    if status:
        raise Refused(f"{op}: the tests fail on the unchanged copy (status {status}): {said}")
    return time.perf_counter() - start


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", help="one of tests/planted/*.py")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=600, help="seconds; longer is a hang, %(default)s")
    args = parser.parse_args(argv)
    from tqdm import tqdm

    survivors: list[Fault] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            base = copied(folder, root)  # what is tested stays the same while the tree is worked on
            planted = faults(base, args.op)
            if not planted:
                parser.error(f"no faults are planted for {args.op or 'any operation'}")
            for fault in planted:  # each fits before the first test runs
                with tempfile.TemporaryDirectory() as trial:
                    fault.apply(copied(trial, base))
            ops = sorted({f.op for f in planted})
            if any(built(f) for f in planted):
                build(base)
            with ThreadPoolExecutor(args.jobs) as pool:
                for op, took in zip(ops, pool.map(lambda op: sound(op, args.limit, base), ops), strict=True):
                    print(f"{op}: unchanged, the tests pass in {took:.0f} s", flush=True)
                waiting = {pool.submit(noticed, f, args.limit, base): f for f in planted}
                try:
                    for done in tqdm(as_completed(waiting), total=len(planted), desc="faults", disable=None):
                        if not done.result():
                            survivors.append(waiting[done])
                            tqdm.write(f"SURVIVES {waiting[done]}")
                except Refused:
                    pool.shutdown(cancel_futures=True)
                    raise
    except Refused as problem:
        print(f"REFUSED {problem}")
        return 1
    for op in ops:
        of_op = [f for f in planted if f.op == op]
        print(f"{op}: {sum(f not in survivors for f in of_op)} of {len(of_op)} noticed")
    killed = len(planted) - len(survivors)
    for fault in survivors:
        print(f"\nSURVIVES {fault}\n  - {fault.old!r}\n  + {fault.new!r}")
    print(f"{killed} of {len(planted)} planted faults noticed ({killed / len(planted):.0%})")
    if args.op is None and len(planted) < LEAST:
        print(f"too few: at least {LEAST} are wanted")
        return 1
    return 0 if killed >= SHARE * len(planted) else 1


if __name__ == "__main__":
    sys.exit(main())
