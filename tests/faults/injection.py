"""Every call that changes the disk, failing once each: what is readable afterwards? Rows C1 to C3 of the fault matrix.

    python tests/faults/injection.py [--stride N] [scenario ...]

runs each scenario once for every one of its calls and every fault, and prints a table (``none``: what is there
says that it is no use; ``litter``: something temporary is left, as after a kill). ``injection_scenarios.SCENARIOS``
holds them; a new one is a Scenario of three functions. The calls are caught by ``inject.c``.

One process imports everything and forks a child an injection, so that an injection costs little more than what it
disturbs. Linux with a C compiler; elsewhere ``library`` raises Unavailable.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from injection_scenarios import PLANTED, SCENARIOS

SOURCE = Path(__file__).with_name("inject.c")
WRITES = {"write", "pwrite", "writev", "pwritev", "sendfile"}
REMOVALS = {"unlink", "unlinkat", "rmdir"}
ROOM = WRITES | {"open", "openat", "creat", "mkdir", "mkdirat", "ftruncate", "fallocate", "link", "linkat", "symlink",
                 "symlinkat"}  # fmt: skip
# Whose failure nobody may pass over: what was to be written may not be there.
GRAVE = WRITES | {"open", "openat", "creat", "ftruncate", "fallocate", "fsync", "fdatasync"}
FAULTS = ("KILL", "HALF_KILL", "ENOSPC", "FULL", "EIO")  # FULL: ENOSPC from then on, as a full disk does
SECONDS = 60  # the longest an act may take


class Unavailable(Exception):
    """Why nothing can be injected on this machine."""


class Call(NamedTuple):
    """A call that changes the scenario's folder: ``paths`` are relative to it, two of a rename."""

    number: int
    name: str
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """What came of one injection: how the act ended (killed, returned, error), its error line, the state found
    afterwards, files that should not be there, what is wrong (empty: nothing), and seconds."""

    call: Call
    what: str
    ended: str
    line: str
    state: str
    litter: list[str]
    wrong: list[str]
    seconds: float


def library() -> Path:
    """The compiled injector, kept by the hash of its source. Raises Unavailable."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise Unavailable(f"the fault injector is for Linux on x86-64 and aarch64, not {sys.platform}")
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise Unavailable("no C compiler for the fault injector (cc)")
    digest = hashlib.sha256(SOURCE.read_bytes() + platform.machine().encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phmdiff_fast" / "inject"
    path = folder / f"inject-{digest}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        made = folder / f"{path.name}.{os.getpid()}"
        ran = subprocess.run([*compiler.split(), "-shared", "-fPIC", "-O1", str(SOURCE), "-o", str(made)],
                             capture_output=True, text=True)  # fmt: skip
        if ran.returncode:
            raise Unavailable(f"the fault injector does not compile: {ran.stderr.strip()[:500]}")
        made.rename(path)
    return path


def faults_for(call: Call) -> list[str]:
    """The faults this call can have."""
    fits = {"HALF_KILL": call.name in WRITES, "ENOSPC": call.name not in REMOVALS, "FULL": call.name in ROOM}
    return [what for what in FAULTS if fits.get(what, True)]


class Server:
    """A process with everything imported, which forks a child an injection. A context manager.

    folder : where the scenarios play; it is emptied. Raises Unavailable.
    """

    def __init__(self, folder: Path):
        command = [sys.executable, __file__, "--serve", str(library()), str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                         env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception) -> None:
        self._process.stdin.close()
        self._process.wait(SECONDS)
        self._process.stdout.close()

    def _ask(self, **request):
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the server ended with status {self._process.wait()}")
        answer = json.loads(answer)
        if "unavailable" in answer:
            raise Unavailable(answer["unavailable"])
        return answer

    def count(self, scenario: str) -> list[Call]:
        """The calls of the scenario when nothing fails."""
        return [_call(*call) for call in self._ask(scenario=scenario)["calls"]]

    def inject(self, scenario: str, at: int, what: str) -> Result:
        """Run the scenario with a fault at its call number ``at``."""
        answer = self._ask(scenario=scenario, at=at, what=what)
        return Result(**{**answer, "call": _call(*answer["call"])})

    def inject_all(self, scenario: str, *, stride: int = 1, offset: int = 0) -> Iterator[Result]:
        """Every fault of every call, or of every ``stride``-th pair of both."""
        pairs = [(call.number, what) for call in self.count(scenario) for what in faults_for(call)]
        for at, what in pairs[offset::stride]:
            yield self.inject(scenario, at, what)


def _call(number, name, paths) -> Call:
    return Call(int(number), name, tuple(paths))


# ---- the server's side ----


class _Play:
    """A scenario on the stage: its old state as a template, its calls, the files before and after."""

    def __init__(self, name: str, root: Path, injector: ctypes.CDLL):
        self.scenario, self.injector = {**SCENARIOS, **PLANTED}[name], injector
        self.template, self.folder = root / f"{name}-before", root / name
        self.log, self.outcome = root / f"{name}.log", root / f"{name}.json"
        self.template.mkdir()
        self.scenario.prepare(self.template)
        self.reset()
        self.scenario.act(self.folder)  # what is imported or drawn for the first time, before any fork
        self.reset()
        gc.collect()
        gc.freeze()
        ended = self.forked(self.scenario.act, 0, "KILL")
        assert ended["ended"] == "returned", ended
        assert self.scenario.verify(self.folder) == "new"
        lines = [line.split("\t") for line in self.log.read_text().splitlines()]
        self.calls = [_call(number, name, (os.path.relpath(p, self.folder) for p in paths))
                      for number, name, *paths in lines]  # fmt: skip
        self.expected = _names(self.template) | _names(self.folder)

    def reset(self) -> None:
        if self.folder.exists():
            shutil.rmtree(self.folder)
        shutil.copytree(self.template, self.folder, symlinks=True)

    def forked(self, act, at: int, what: str, *, armed: bool = True) -> dict:
        """Act in a child; how that ended."""
        for path in (self.log, self.outcome):
            path.unlink(missing_ok=True)
        child = os.fork()
        if not child:
            try:
                signal.alarm(SECONDS)
                ended = _act(act, self.folder, self.injector if armed else None, self.log if not at else None, at, what)
                self.outcome.write_text(json.dumps(ended))
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            return {"ended": "killed" if number == signal.SIGKILL else f"signal {number}", "line": ""}
        return json.loads(self.outcome.read_text())

    def inject(self, at: int, what: str) -> dict:
        start, call = time.perf_counter(), self.calls[at - 1]
        self.reset()
        ended = self.forked(self.scenario.act, at, what)
        wrong = list(_misbehaved(ended, call, what))
        state = self._state("afterwards", wrong)
        if ended["ended"] == "returned" and state not in ("new", "?"):
            wrong.append(f"it returned, and what is there is {state}")
        litter = sorted(_names(self.folder) - self.expected)
        if litter and ended["ended"] != "killed" and call.name not in REMOVALS:
            wrong.append(f"left {', '.join(litter)}")
        again = self.forked(self.scenario.again or self.scenario.act, 0, "KILL", armed=False)
        if again["ended"] != "returned":
            wrong.append(f"the next run: {again['ended']} {again['line']}")
        elif self._state("after the next run", wrong) not in ("new", "?"):
            wrong.append("the next run changed nothing")
        return {"call": call, "what": what, **ended, "state": state, "litter": litter, "wrong": wrong,
                "seconds": time.perf_counter() - start}  # fmt: skip

    def _state(self, when: str, wrong: list[str]) -> str:
        try:
            return self.scenario.verify(self.folder)
        except Exception as problem:
            wrong.append(f"{when}: {type(problem).__name__}: {problem}")
            return "?"


def _act(act, folder: Path, injector, log: Path | None, at: int, what: str) -> dict:
    from phmdiff_fast.errors import PhmdiffError

    if injector is not None:
        full = what == "FULL"
        fault = b"ENOSPC" if full else what.encode()
        refused = injector.inject_arm(os.fsencode(folder), os.fsencode(log) if log else None, at, fault, int(full))
        if refused:
            return {"ended": "unavailable", "line": f"seccomp: {os.strerror(refused)}"}
    try:
        act(folder)
    except PhmdiffError as problem:
        return {"ended": "error" if problem.exit_code == 74 else f"exit code {problem.exit_code}",
                "line": problem.line()}  # fmt: skip
    except BaseException as problem:
        return {"ended": type(problem).__name__, "line": repr(problem)}
    return {"ended": "returned", "line": ""}


def _misbehaved(ended: dict, call: Call, what: str) -> Iterator[str]:
    """What is wrong with how it ended, whatever is on the disk."""
    how, line = ended["ended"], ended["line"]
    if what.endswith("KILL"):
        if how != "killed":
            yield f"was to be killed: {how} {line}"
    elif how == "returned":
        if call.name in GRAVE:
            yield f"a failed {call.name} was passed over"
    elif how != "error":
        yield f"no error with exit code 74: {how} {line}"
    else:
        if "\n" in line:
            yield "more than a line"
        if what != "EIO" and "bytes free" not in line:
            yield f"does not say how much is free: {line}"


def _names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def _serve(path: str, root: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an act prints is no answer
    root = Path(root).resolve()
    injector = ctypes.CDLL(path)
    injector.inject_arm.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_long, ctypes.c_char_p, ctypes.c_int]
    plays: dict[str, _Play] = {}
    for line in sys.stdin:
        request = json.loads(line)
        name = request["scenario"]
        if name not in plays:
            plays[name] = _Play(name, root, injector)
        answer = plays[name].inject(request["at"], request["what"]) if "at" in request else {"calls": plays[name].calls}
        print(json.dumps(answer), file=answers, flush=True)


# ---- the table ----


def torture(stride: int = 1, names: Iterable[str] = tuple(SCENARIOS)) -> list[dict]:
    """A row a scenario, of every fault of every call or of every ``stride``-th pair: scenario, calls, faults (how
    many were injected), readable (after how many what is there could be told: old, new or none), litter, failures
    (after how many something was wrong), wrong (what, a line each) and ms (each). Raises Unavailable."""
    return list(rows(names, stride))


def rows(names: Iterable[str], stride: int) -> Iterator[dict]:
    """The rows of ``torture``, one by one."""
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # no power fails here, and its fsync is quick
    with tempfile.TemporaryDirectory(dir=memory) as folder, Server(Path(folder)) as server:
        for name in names:
            calls = server.count(name)
            results = list(server.inject_all(name, stride=stride))
            wrong = [f"{result.what} at call {result.call.number}, {result.call.name} {' '.join(result.call.paths)}: "
                     f"{'; '.join(result.wrong)}" for result in results if result.wrong]  # fmt: skip
            states = {state: sum(result.state == state for result in results) for state in ("old", "new", "none")}
            yield {"scenario": name, "calls": len(calls), "faults": len(results), "readable": sum(states.values()),
                   **states, "litter": sum(bool(result.litter) for result in results), "failures": len(wrong),
                   "wrong": wrong, "ms": 1e3 * sum(r.seconds for r in results) / max(1, len(results))}  # fmt: skip


def main(arguments: list[str]) -> int:
    """Print the table; 1 if something was wrong after any injection."""
    stride = int(arguments.pop(arguments.index("--stride") + 1)) if "--stride" in arguments else 1
    names = [a for a in arguments if a != "--stride"] or list(SCENARIOS)
    failures = 0
    print("scenario            calls  faults  readable  old   new   none  litter  failures  ms each")
    for row in rows(names, stride):
        failures += row["failures"]
        print("{scenario:18} {calls:6} {faults:7} {readable:9}  {old:<5} {new:<5} {none:<5} {litter:<7} {failures:<9} "
              "{ms:.0f}".format(**row), flush=True)  # fmt: skip
        for line in row["wrong"]:
            print(f"    {line}")
    return int(failures > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        _serve(*sys.argv[2:])
    else:
        sys.exit(main(sys.argv[1:]))
