"""Uses every hostile checkpoint and run folder as a training, or ``sample``, ``evaluate`` and ``train``, would.

    python tests/faults/hostile_use.py [--json] [--first] [part of a name ...]

Each in a process of its own that may die, hang or eat memory; prints a line a kind and ends with 1 if a promise is
broken. Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hostile_checkpoints  # noqa: F401 (it fills KINDS)
import hostile_runs  # noqa: F401
from hostile_kinds import KINDS, RAN, Kind

SECONDS = 2.0  # a kind
DEAD = 4.0  # seconds after which a silent process counts as hung
MEMORY = 200  # MiB more than before


# ---------------------------------------------------------------- how they are used


class User:
    """A training with a small model."""

    def __init__(self, out: Path):
        import torch

        from phmdiff_fast.config import Config
        from phmdiff_fast.distributed import Alone
        from phmdiff_fast.ema import EMA
        from phmdiff_fast.parallel import Single
        from phmdiff_fast.trainer import Trainer

        torch.manual_seed(0)
        self.training = training = Trainer(out, Config(), Alone(), torch.device("cpu"))
        training.model = torch.nn.Linear(400, 300)
        training.together = Single(training.model, training.ranks)
        training.optimizer = torch.optim.AdamW(training.model.parameters(), fused=True)
        training.ema = EMA(training.model, 0.9)

    def step(self) -> None:
        for parameter in self.training.model.parameters():
            parameter.grad = parameter.detach() * 0.5
        self.training.optimizer.step()

    def state(self) -> dict[str, dict]:
        return self.training.groups()

    def prepare(self) -> None:
        from phmdiff_fast import checkpoint

        self.step()
        facts = {"seconds": 1.5, "version": "1", "val_psnr": None, "config": self.training.config.fixed(),
                 "spikes": self.training.spikes.state()}  # fmt: skip
        self.training.ema.update(0)
        checkpoint.save(self.training.out / "checkpoints", 1, self.state(), facts, keep=2)


def _use_checkpoint(folder: Path, given: Path) -> dict:
    """Look for the newest, and resume from what is given; what came of it."""
    import torch

    from phmdiff_fast import checkpoint
    from phmdiff_fast.errors import PhmdiffError

    lines: list[str] = []
    sound = User(folder)
    sound.step()
    sound.training.ema.update(0)
    told: dict = {"ended": "loaded", "lines": lines, "code": "", "exit_code": 0}
    try:
        checkpoint.newest(folder / "checkpoints", warn=lines.append)
        user = User(folder)
        user.training.resume(given)
    except PhmdiffError as problem:
        lines.append(problem.line())
        return {**told, "ended": "error", "code": problem.code, "exit_code": problem.exit_code}
    for group, tensors in sound.state().items():
        read = user.state()[group]
        same = read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in tensors)
        if not same:
            return {**told, "ended": f"loaded, with another {group}"}
    user.step()
    return told


def _use_run(command: list) -> dict:
    """Run a command line; what came of it."""
    from phmdiff_fast.cli import main

    said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (the process ends)
    os.dup2(said.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        main([str(part) for part in command])
    except SystemExit as leaving:
        code = leaving.code
    except BaseException as problem:
        return {"ended": f"{type(problem).__name__}: {problem}"[:300], "lines": [], "code": "", "exit_code": 1}
    sys.stderr.flush()
    said.seek(0)
    lines = said.read().splitlines()
    found = re.findall(r"error\[(\w+)\]", lines[-1] if lines else "")
    return {"ended": "error" if code else "loaded", "lines": lines, "code": found[0] if found else "",
            "exit_code": code}  # fmt: skip


def _in_child(act: Callable[[], dict]) -> dict:
    """Act in a forked process; what came of it, seconds, and MiB taken beyond what it had."""
    read, write = os.pipe()
    start = time.perf_counter()
    child = os.fork()
    if not child:
        try:
            os.close(read)
            signal.setitimer(signal.ITIMER_REAL, DEAD)
            Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
            before = _resident("VmRSS")
            try:
                told = act()
            except BaseException as problem:
                told = {"ended": f"{type(problem).__name__}: {problem}"[:300], "lines": [], "code": "", "exit_code": 1}
            told["mib"], told["lines"] = _resident("VmHWM") - before, [line[:3000] for line in told["lines"][:9]]
            os.write(write, json.dumps(told).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    seconds = time.perf_counter() - start
    if os.WIFSIGNALED(status) or not said:
        number = os.WTERMSIG(status)
        ended = "hangs" if number == signal.SIGALRM else f"dies of {signal.Signals(number).name}" if number else "ends"
        return {"ended": ended, "lines": [], "code": "", "exit_code": -number, "mib": 0.0, "seconds": seconds}
    return {**json.loads(said), "seconds": seconds}


def _resident(what: str) -> float:
    return int(re.search(rf"{what}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def _wrong(kind: Kind, told: dict, folder: Path) -> Iterator[str]:
    """The promises that are broken."""
    if told["ended"] == "loaded":
        if kind.codes:
            yield "it was taken"
    elif told["ended"] != "error":
        yield told["ended"]
    elif told["exit_code"] not in kind.exits or (kind.codes and told["code"] not in kind.codes):
        yield f"exit code {told['exit_code']}, {told['code'] or 'no code'}"
    if kind.of_run and told["ended"] == "error":
        errors = sum("error[" in line for line in told["lines"])
        if errors != 1 and told["exit_code"] != 3:  # those are told together
            yield f"{errors} lines of errors"
    for line in told["lines"]:
        if not line.isprintable() or len(line) > 2000:
            yield f"no line to print: {line[:100]!a}"
    if told["seconds"] > SECONDS:
        yield f"takes {told['seconds']:.1f} s"
    if told["mib"] > MEMORY:
        yield f"takes {told['mib']:.0f} MiB"
    if (folder / RAN).exists():
        yield "it ran"


def look(kind: Kind, template: Path, folder: Path, *, every: bool = True) -> Iterator[dict]:
    """What came of a kind: an answer for every way it is used, or for the first, with ``wrong``, a list."""
    shutil.copytree(template, folder, symlinks=True)
    try:
        given = kind.make(folder)
        ways = given if kind.of_run else [given]
        for one in ways if every else ways[:1]:
            act = (lambda one=one: _use_run(one)) if kind.of_run else (lambda one=one: _use_checkpoint(folder, one))
            answer = _in_child(act)
            how = one[0] if kind.of_run else "resume"
            yield {"kind": kind.name, "how": how, **answer, "wrong": list(_wrong(kind, answer, folder))}
    finally:
        shutil.rmtree(folder)


def prepare_run(folder: Path) -> None:
    """A sound run, of four people."""
    import numpy as np
    from conftest import TINY, phantom, write_scan

    from phmdiff_fast.cli import main

    affine = np.diag([1.5, 1.5, 2.0, 1.0])
    for number in range(4):
        for contrast, voxels in phantom(number).items():
            write_scan(folder / "data" / f"p{number}" / f"p{number}_{contrast}.nii.gz", voxels, affine)
    command = ["train", folder / "data", "--out", folder / "run", "--source", "t1", "--target", "t2", "--steps", 2,
               "--image-size", 24, "--quiet", *TINY, "--set", "train.mmd_weight=0.0"]  # fmt: skip
    try:
        main([str(part) for part in command])
    except SystemExit as leaving:
        if leaving.code:
            raise RuntimeError(f"the training ended with {leaving.code}") from None


def run(kinds: list[Kind], *, every: bool = True) -> Iterator[dict]:
    """The answers of ``look`` for these kinds."""
    import phmdiff_fast.evaluate
    import phmdiff_fast.train  # noqa: F401 (once, before any fork)

    with tempfile.TemporaryDirectory() as root:
        templates = {of_run: Path(root) / f"template-{of_run:d}" for of_run in {kind.of_run for kind in kinds}}
        for of_run, template in templates.items():
            template.mkdir()
            error = os.dup(2)  # what the training says is no answer
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            prepare_run(template) if of_run else User(template).prepare()
            os.dup2(error, 2)
        for kind in kinds:
            yield from look(kind, templates[kind.of_run], Path(root) / "spoilt", every=every)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="*", help="part of the name of a kind")
    parser.add_argument("--json", action="store_true", help="a line of JSON an answer")
    parser.add_argument("--first", action="store_true", help="of a run folder: only the first command that reads it")
    given = parser.parse_args()
    kinds = [kind for kind in KINDS if not given.name or any(name in kind.name for name in given.name)]
    failures = 0
    for told in run(kinds, every=not given.first):
        failures += bool(told["wrong"])
        if given.json:
            print(json.dumps(told), flush=True)
        else:
            print(f"{told['kind'][:60]:60} {told['how']:9} {told['ended'][:20]:20} {told['exit_code']:3} "
                  f"{told['code']:18} {told['seconds']:5.2f} s {told['mib']:4.0f} MiB  {'; '.join(told['wrong'])!a}",
                  flush=True)  # fmt: skip
    return int(failures > 0)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
