"""What the tests of faults and ``torture.py`` do alike: short trainings, ended somewhere and gone on with."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
import time
from pathlib import Path

from conftest import TINY
from hooks import MOMENTS
from zygote import Child, Zygote, wait_for

from phmdiff_fast import checkpoint

STEPS, EVERY = 12, 2  # steps of a short training; steps between its checkpoints
MASKED_UNTIL = 6  # of them in the masked stage


def command(cohort, out, *more, steps: int = STEPS, workers: int = 0, ema: float = 0.99, precision: str = "fp32"):
    """The command line of a short training."""
    settings = dict(checkpoint_steps=EVERY, finetune_share=0.5, ema=ema, workers=workers, mmd_weight=0.0,
                    peer_timeout=30, precision=precision)  # fmt: skip
    return ["train", cohort, "--source", "t1", "--target", "t2", "--out", out, "--steps", steps, "--image-size", 24,
            "--quiet", *TINY, *(part for item in settings.items() for part in ("--set", "train.{}={}".format(*item))),
            *more]  # fmt: skip


def run_all(zygote: Zygote, arguments, world: int, hook: str = "plain", *, only: str = "", rank=None) -> list[Child]:
    """Run a command in ``world`` processes to its end; ``only`` is a further hook of one, the last if not ``rank``."""
    hooks = dict.fromkeys(range(world), hook)
    if only:
        hooks[world - 1 if rank is None else rank] += ";" + only
    if world == 1:
        started = [zygote.start(arguments, hook=hooks[0])]
    else:
        started = zygote.start_ranks(arguments, world, hooks=hooks)
    for child in started:
        child.wait()
    return started


def newest(run: Path) -> checkpoint.Checkpoint | None:
    return checkpoint.newest(Path(run) / "checkpoints")


def bits(run: Path) -> dict:
    """The hashes of every file of the newest checkpoint, and its step."""
    found = newest(run)
    return {"step": found.step, **found.manifest["files"]}


def said_written(run: Path) -> int:
    """The newest checkpoint the run has told to be written; a last line that is cut off tells nothing."""
    steps = [0]
    for line in (Path(run) / "log.jsonl").read_text().splitlines() if (Path(run) / "log.jsonl").exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        steps += [record["step"]] if "checkpoint" in record else []
    return max(steps)


# --- resume, bit for bit

WAYS = [
    dict(zip(("workers", "ema", "precision", "world", "stage"), way, strict=True))
    for way in itertools.product((0, 2), (0.99, 0.0), ("fp32", "bf16"), (1, 2), ("masked", "unmasked"))
]


class Resumes:
    """Cells (way, moment): a training that is killed at a moment and gone on with ends as one that was not."""

    def __init__(self, zygote: Zygote, cohort, folder: Path):
        self.zygote, self.cohort, self.folder = zygote, cohort, Path(folder)
        self._references: dict[tuple, dict] = {}

    def _command(self, out, way):
        return command(self.cohort, out, **{key: way[key] for key in ("workers", "ema", "precision")})

    def reference(self, way: dict) -> dict:
        key = (way["ema"], way["precision"], way["world"])  # not workers: they must not matter
        if key not in self._references:
            out = self.folder / f"through-{len(self._references)}"
            run_all(self.zygote, self._command(out, {**way, "workers": 0}), way["world"])
            self._references[key] = bits(out)
        return self._references[key]

    def cell(self, way: dict, moment: str) -> str | None:
        """What is wrong with this cell, or None."""
        out = self.folder / "cell"
        shutil.rmtree(out, ignore_errors=True)
        at = 4 if way["stage"] == "masked" else 8
        arguments = self._command(out, way)
        # Some moments are of process 0 alone: it looks, writes the manifest and the log, and removes.
        of_first = moment in ("before_manifest", "before_rename", "before_said", "pruning", "half_a_line", "looking")
        ended = run_all(self.zygote, arguments, way["world"], "plain" if moment != "looking" else "",
                        only=f"kill_at:{moment},{at}", rank=0 if of_first else None)  # fmt: skip
        if -signal.SIGKILL not in [child.status for child in ended]:
            return f"was not killed: {[child.status for child in ended]} {ended[0].err}"
        told = said_written(out)
        found = newest(out)
        if (found.step if found else 0) < told:
            return f"step {found and found.step} is behind {told}, which was told to be written"
        again = run_all(self.zygote, arguments, way["world"])
        if any(child.status for child in again):
            return f"does not go on: {[child.status for child in again]} {again[0].err}"
        if bits(out) != self.reference(way):
            return "ends with other bits"
        left = [path.name for path in (out / "checkpoints").iterdir() if not path.name.startswith("step-")]
        return f"left {left}" if left else None


def cells(count: int | None = None) -> list[tuple[dict, str]]:
    """All (way, moment), or ``count`` of them with every way and every moment about equally often."""
    if count is None:
        return list(itertools.product(WAYS, MOMENTS))
    mixed = random.Random(1).sample(WAYS, len(WAYS))  # in order the first would be all without workers
    ways, moments = itertools.cycle(mixed), itertools.cycle(MOMENTS)
    return [(next(ways), next(moments)) for _ in range(count)]


# --- killed and signalled at random times


def kills(zygote: Zygote, cohort, folder: Path, count: int, seed: int = 0) -> dict:
    """One training, killed ``count`` times at random; figures: lost, behind, restarts, and whether it ends the same."""
    draw, out = random.Random(seed), Path(folder) / "killed"
    arguments = command(cohort, out, steps=1_000_000)
    figures = {"kills": 0, "lost": 0, "steps behind": 0, "did not go on": 0, "furthest": 0}
    while figures["kills"] < count:
        before = newest(out)
        child = zygote.start(arguments, hook="plain")
        if draw.random() < 0.8:  # most while it trains and writes, some while it starts
            step = before.step if before else 0
            wait_for(lambda child=child, step=step: said_written(out) > step or child.poll() is not None)
            time.sleep(draw.random() * 0.12)
        else:
            time.sleep(draw.random() * 0.3)
        child.kill()
        if child.wait() != -signal.SIGKILL:
            figures["did not go on"] += 1
            break
        figures["kills"] += 1
        found, told = newest(out), said_written(out)
        step = found.step if found else 0
        figures["lost"] += step < (before.step if before else 0)
        figures["steps behind"] += max(0, told - step)
        figures["furthest"] = step
    # The last state must be that of a training nobody killed.
    through = Path(folder) / "not-killed"
    last = newest(out)
    if last is None:
        return {**figures, "same bits": False}
    zygote.run(command(cohort, through, steps=1_000_000), hook=f"plain;signal_at:{last.step - 1},{int(signal.SIGTERM)}",
               timeout=600)  # fmt: skip
    return {**figures, "same bits": bits(through) == bits(out)}


def sigterms(zygote: Zygote, cohort, folder: Path, count: int, seed: int = 0) -> dict:
    """One training, sent SIGTERM ``count`` times; figures: saves, and the most steps lost."""
    draw, out = random.Random(seed), Path(folder) / "terminated"
    trace = Path(folder) / "trace"
    arguments = [*command(cohort, out, steps=1_000_000), "--set", "train.checkpoint_steps=1000000"]
    figures = {"signals": 0, "saves": 0, "most steps lost": 0, "other exit codes": 0}
    for _ in range(count):
        trace.unlink(missing_ok=True)
        child = zygote.start(arguments, hook=f"plain;trace:{trace}")
        wait_for(lambda child=child: trace.exists() or child.poll() is not None)
        time.sleep(draw.random() * 0.1)
        child.kill(signal.SIGTERM)
        figures["other exit codes"] += child.wait() != 143
        figures["signals"] += 1
        made, found = int(trace.read_text().split()[-1]), newest(out)
        figures["saves"] += found is not None and found.step >= made - 1
        figures["most steps lost"] = max(figures["most steps lost"], made - (found.step if found else 0))
    return figures
