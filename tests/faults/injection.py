"""Every call that changes the disk, failing once each: what is readable afterwards? Rows C1 to C3 of the fault matrix.

    python tests/faults/injection.py [--stride N] [scenario ...]

runs each scenario once for every one of its calls and every fault, and prints a table (``none``: what is there
says that it is no use; ``litter``: something temporary is left, as after a kill). ``SCENARIOS`` holds them; a new
one is a Scenario of three functions. The calls are caught by ``inject.c``.

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
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

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


class Scenario(NamedTuple):
    """prepare(folder) makes the old state; act(folder) is disturbed; verify(folder) raises AssertionError, or
    returns "old", "new", or "none" where what is there says of itself that it cannot be used. ``again(folder)``
    is what a user does after a crash, by default ``act``."""

    prepare: Callable[[Path], None]
    act: Callable[[Path], object]
    verify: Callable[[Path], str]
    again: Callable[[Path], object] | None = None


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


# ---- the scenarios ----


def _groups(step: int) -> dict:
    import torch

    weights = torch.arange(20_000, dtype=torch.float32).reshape(100, 200) + step
    return {"model": {"w": weights, "b": weights[0] * 2}, "ema": {"w": weights / 2},
            "optimizer": {"exp_avg/w": weights * 3, "step/w": torch.tensor(float(step))}}  # fmt: skip


def _save(folder: Path, step: int) -> None:
    from phmdiff_fast import checkpoint

    checkpoint.save(folder / "checkpoints", step, _groups(step), {"seconds": 1.5}, keep=2)


def _two_checkpoints(folder: Path) -> None:
    (folder / "checkpoints").mkdir()
    for step in (1, 2):
        _save(folder, step)


def _save_again(folder: Path) -> None:
    from phmdiff_fast import checkpoint

    checkpoint.remove_leftovers(folder / "checkpoints")
    _save(folder, 3)


def _newest_is_whole(folder: Path) -> str:
    import torch

    from phmdiff_fast import checkpoint
    from phmdiff_fast.errors import PhmdiffError

    def verifies(path):
        try:
            return bool(checkpoint.verify(path))
        except PhmdiffError:
            return False

    assert sum(map(verifies, checkpoint.found(folder / "checkpoints"))) >= 2, "fewer than two checkpoints verify"
    newest = checkpoint.newest(folder / "checkpoints")
    assert newest.step in (2, 3), f"the newest is of step {newest.step}, that of step 2 was acknowledged"
    for group, tensors in _groups(newest.step).items():
        read = newest.tensors(group)
        assert read.keys() == tensors.keys(), group
        assert all(torch.equal(read[name], value) for name, value in tensors.items()), group
    return "old" if newest.step == 2 else "new"


def _save_beside(folder: Path) -> None:
    from phmdiff_fast.checkpoint_writer import Writer

    writer = Writer(folder / "checkpoints", keep=2)
    writer.save(3, _groups(3), {"seconds": 1.5})
    writer.wait()


def _save_by_two(folder: Path) -> None:
    """Two processes' shares, one after the other here; where the second fails the first waits in vain."""
    from phmdiff_fast import checkpoint
    from phmdiff_fast.errors import PhmdiffError

    groups, failed = _groups(3), None
    for rank, timeout in ((1, 0), (0, 0.05)):
        try:
            checkpoint.save(folder / "checkpoints", 3, checkpoint.share(groups, rank, 2), {}, keep=2, rank=rank,
                            world=2, token="run", timeout=timeout)  # fmt: skip
        except PhmdiffError as problem:
            failed = failed or problem
    if failed:
        raise failed


def _voxels(which: str):
    import numpy as np

    return np.random.default_rng(len(which)).normal(100, 10, (24, 20, 9)).astype(np.float32) + (which == "new")


def _write_volume(name: str, which: str):
    def write(folder: Path) -> None:
        import numpy as np

        from phmdiff_fast import nifti

        grid = nifti.Grid((24, 20, 9), np.diag([1.5, 1.5, 2.0, 1.0]))
        nifti.write_volume(folder / name, _voxels(which), grid, overwrite=True)

    return write


def _volume_is_whole(name: str):
    def verify(folder: Path) -> str:
        import numpy as np

        from phmdiff_fast import nifti

        read = nifti.read_volume(folder / name).voxels
        return next(which for which in ("old", "new") if np.array_equal(read, _voxels(which)))

    return verify


def _json(which: str) -> dict:
    return {"which": which, "values": [len(which) + n / 7 for n in range(2000)]}


def _write_json(which: str):
    def write(folder: Path) -> None:
        from phmdiff_fast.files import write_json

        write_json(folder / "run.json", _json(which))

    return write


def _json_is_whole(folder: Path) -> str:
    read = json.loads((folder / "run.json").read_text())
    assert read == _json(read["which"])
    return read["which"]


def _write_locked(folder: Path) -> None:
    from phmdiff_fast.files import locked

    with locked(folder):
        _write_json("new")(folder)


def _cohort(folder: Path):
    from phmdiff_fast.data import discover

    return discover(folder / "data")


# The same shapes both times, so that sizes cannot tell an old file from a new one.
CONTRASTS = {"old": (["t1"], "t2"), "new": (["t2"], "t1")}


def _cache_config(which: str):
    from phmdiff_fast.config import DataConfig

    sources, target = CONTRASTS[which]
    return DataConfig(sources=sources, target=target, image_size=8)


def _build_cache(which: str):
    def build(folder: Path) -> None:
        from phmdiff_fast.cache import SliceCache

        SliceCache.build(folder / "cache", _cohort(folder), ["anna", "bela"], _cache_config(which))

    return build


def _scans(folder: Path) -> None:
    import nibabel
    import numpy as np

    for seed, (person, contrast) in enumerate((p, c) for p in ("anna", "bela") for c in ("t1", "t2")):
        voxels = np.zeros((13, 16, 9), np.int16)
        voxels[2:11, 3:14, 2:8] = np.random.default_rng(seed).integers(1, 1000, (9, 11, 6))
        path = folder / "data" / person / f"{person}_{contrast}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([1, 1, 2, 1.0])), path)


def _cohort_and_cache(folder: Path) -> None:
    _scans(folder)
    _build_cache("old")(folder)
    for which in CONTRASTS:  # what verify compares with
        _slices(folder, which)


@lru_cache
def _built(data: Path, which: str) -> dict:
    from phmdiff_fast.cache import SliceCache
    from phmdiff_fast.data import discover

    with tempfile.TemporaryDirectory() as elsewhere:
        cache = SliceCache.build(Path(elsewhere) / "c", discover(data), ["anna", "bela"], _cache_config(which))
        return cache.batch(range(len(cache)))


def _slices(folder: Path, which: str) -> dict:
    # The template's scans, which stay where they are and are those of every run.
    return _built(folder.with_name(folder.name.removesuffix("-before") + "-before") / "data", which)


def _cache_is_whole_or_stale(folder: Path) -> str:
    import numpy as np

    from phmdiff_fast.cache import SliceCache
    from phmdiff_fast.errors import PhmdiffError

    opened = []
    for which in CONTRASTS:
        try:
            cache = SliceCache.open(folder / "cache", _cohort(folder), ["anna", "bela"], _cache_config(which))
        except PhmdiffError as problem:
            if problem.code != "CACHE_STALE":
                raise
            continue
        read, built = cache.batch(range(len(cache))), _slices(folder, which)
        assert all(np.array_equal(read[name], built[name]) for name in built), f"garbage for the {which} settings"
        opened.append(which)
    assert len(opened) < 2
    return opened[0] if opened else "none"


def _scans_and_split(folder: Path) -> None:
    _scans(folder)
    (folder / "split.json").write_text(json.dumps({"train": ["anna"], "val": [], "test": ["bela"]}))
    (folder / "run").mkdir()


def _run_config():
    from phmdiff_fast.config import Config

    return Config(data=_cache_config("old"))


def _begin_run(folder: Path) -> None:
    from phmdiff_fast import run_folder
    from phmdiff_fast.files import locked, remove_unfinished

    run = folder / "run"
    split, _ = run_folder.start_folder(run, _run_config(), _cohort(folder), folder / "split.json", None)
    with locked(run):
        remove_unfinished(run)
        run_folder.begin(run, _run_config(), split, {"subjects": 2})


def _run_begun_or_not(folder: Path) -> str:
    from phmdiff_fast.config import Config, load_toml

    run = folder / "run"
    if not (run / "run.json").exists():
        return "old"
    assert json.loads((run / "run.json").read_text()) == {"subjects": 2}
    assert json.loads((run / "split.json").read_text()) == json.loads((folder / "split.json").read_text())
    assert Config.model_validate(load_toml(run / "config.toml")) == _run_config()
    return "new"


def _records(*steps: int) -> list[dict]:
    return [{"step": step, "loss": step / 7} for step in steps]


def _old_log(folder: Path) -> None:
    lines = [json.dumps(record) for record in _records(1, 2, 3)]
    (folder / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "lo')  # as a crash leaves it


def _go_on_with_log(folder: Path) -> None:
    from phmdiff_fast.run_folder import Log

    with Log(folder / "log.jsonl", 2) as log:
        for record in _records(3, 4):
            log.write(record)


def _log_is_whole(folder: Path) -> str:
    from phmdiff_fast.run_folder import read_log

    read = read_log(folder / "log.jsonl")
    assert read[:2] == _records(1, 2), "records of a checkpoint's steps are lost"
    assert read[2:] == _records(3, 4)[: len(read) - 2]
    return "new" if len(read) == 4 else "old"


def _write_page(path: Path, which: str) -> None:
    from phmdiff_fast.report import write_demo_page

    rows = [{"method": method, "protocol": which, "metric": "psnr", "mean": 20.0 + n, "std": 1.0, "n": 4}
            for n, method in enumerate(("ours", "lookup"))]  # fmt: skip
    write_demo_page(path, title=which, facts=[("steps", "10")], table_rows=rows, strips=[], notes=["synthetic"],
                    overwrite=True)  # fmt: skip


def _draw_strip(path: Path, which: str) -> None:
    from phmdiff_fast.pictures import strip

    old = _voxels(which)[:, :, 0] / 150 - 1
    strip(path, [{"label": which, "source": old, "synthesized": old / 2, "truth": old / 3}])


@lru_cache
def _drawn(write, which: str) -> bytes:
    with tempfile.TemporaryDirectory() as elsewhere:
        write(Path(elsewhere) / "file", which)
        return (Path(elsewhere) / "file").read_bytes()


def _one_file(name: str, write) -> Scenario:
    """A file whose bytes are those of a writing undisturbed."""

    def verify(folder: Path) -> str:
        read = (folder / name).read_bytes()
        return next(which for which in ("old", "new") if read == _drawn(write, which))

    return Scenario(lambda folder: write(folder / name, "old"), lambda folder: write(folder / name, "new"), verify)


SCENARIOS = {
    "checkpoint": Scenario(_two_checkpoints, lambda folder: _save(folder, 3), _newest_is_whole, _save_again),
    "checkpoint_beside": Scenario(_two_checkpoints, _save_beside, _newest_is_whole, _save_again),
    "checkpoint_by_two": Scenario(_two_checkpoints, _save_by_two, _newest_is_whole, _save_again),
    "volume_gz": Scenario(
        _write_volume("a.nii.gz", "old"), _write_volume("a.nii.gz", "new"), _volume_is_whole("a.nii.gz")
    ),
    "volume": Scenario(_write_volume("a.nii", "old"), _write_volume("a.nii", "new"), _volume_is_whole("a.nii")),
    "json": Scenario(_write_json("old"), _write_json("new"), _json_is_whole),
    "lock": Scenario(_write_json("old"), _write_locked, _json_is_whole),
    "cache": Scenario(_cohort_and_cache, _build_cache("new"), _cache_is_whole_or_stale),
    "run": Scenario(_scans_and_split, _begin_run, _run_begun_or_not),
    "log": Scenario(_old_log, _go_on_with_log, _log_is_whole),
    "page": _one_file("page.html", _write_page),
    "picture": _one_file("strip.png", _draw_strip),
}


def _write_in_place(folder: Path) -> None:
    (folder / "run.json").write_text(json.dumps(_json("new")))


def _write_without_looking(folder: Path) -> None:
    new = folder / "run.json.new"
    with open(new, "w") as file:
        file.write(json.dumps(_json("new")))
        file.flush()
        with suppress(OSError):
            os.fsync(file.fileno())
    new.rename(folder / "run.json")


# What must be found wanting, or nothing is proved by the others.
PLANTED = {
    "in_place": Scenario(_write_json("old"), _write_in_place, _json_is_whole),
    "sync_not_looked_at": Scenario(_write_json("old"), _write_without_looking, _json_is_whole),
}


# ---- the table ----


def main(arguments: list[str]) -> int:
    """Print the table; the number of injections after which something was wrong, at most 1."""
    stride = int(arguments.pop(arguments.index("--stride") + 1)) if "--stride" in arguments else 1
    names = [a for a in arguments if a != "--stride"] or list(SCENARIOS)
    failures = 0
    print("scenario            calls  faults  readable  old   new   none  litter  failures  ms each")
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # no power fails here, and its fsync is quick
    with tempfile.TemporaryDirectory(dir=memory) as folder, Server(Path(folder)) as server:
        for name in names:
            calls = server.count(name)
            results = list(server.inject_all(name, stride=stride))
            wrong = [result for result in results if result.wrong]
            failures += len(wrong)
            states = [sum(result.state == state for result in results) for state in ("old", "new", "none")]
            littered = sum(bool(result.litter) for result in results)
            each = 1e3 * sum(result.seconds for result in results) / max(1, len(results))
            print(f"{name:18} {len(calls):6} {len(results):7} {sum(states):9}  {states[0]:<5} {states[1]:<5} "
                  f"{states[2]:<5} {littered:<7} {len(wrong):<9} {each:.0f}", flush=True)  # fmt: skip
            for result in wrong:
                number, call, paths = result.call
                print(f"    {result.what} at call {number}, {call} {' '.join(paths)}: {'; '.join(result.wrong)}")
    return int(failures > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        _serve(*sys.argv[2:])
    else:
        sys.exit(main(sys.argv[1:]))
