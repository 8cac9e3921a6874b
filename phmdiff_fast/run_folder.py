"""A run's folder: who is in it, how it was begun, its log and what each process says of itself.

RUN/ config.toml  run.json (version, subjects, scalings, mask ratios)  split.json
     cache/  log.jsonl  checkpoints/step-N/  status.json (of process r of several: status-r.json)
     pictures/step-N.png  pictures/levels-N.png  pictures/curves.png
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import stat
import threading
import time
from pathlib import Path

from . import data
from .cache import SliceCache
from .check import check_cohort
from .config import MOST_MEMBERS, Config, differing, read_config
from .errors import CHECKPOINT, USAGE, DataErrors, PhmdiffError
from .files import LOCK, is_unfinished, whole_file, write_json, writing
from .progress import bar, say

MOST_BYTES = 4 << 20  # of split.json and run.json; ours have kilobytes


def status_name(rank: int) -> str:
    return "status.json" if rank == 0 else f"status-{rank}.json"


def prepare_split(cohort: data.Cohort, config: Config, split_file, fold) -> dict[str, list[str]]:
    """The split to train by: a file's, fold (i, k) counted from 1, or drawn; everybody has every contrast asked for."""
    if split_file is None:
        subjects = data.select_subjects(cohort, config.data)
        if fold is None:
            return data.make_split(subjects, config.train.seed)
        return data.make_fold(subjects, fold[0] - 1, fold[1], config.train.seed)
    split = data.read_split(split_file, list(cohort.files))
    chosen = data.select_subjects(cohort, config.data, [s for part in split.values() for s in part])
    return {name: [s for s in part if s in chosen] for name, part in split.items()}


def start_folder(out: Path, config: Config, cohort: data.Cohort, split_file, fold) -> tuple[dict, bool]:
    """(split, resumed): of a new run folder, or what an existing one was begun with."""
    if (out / "run.json").exists():
        begun = read_config(out / "config.toml")
        gaps = differing(begun.fixed(), config.fixed())
        if gaps:
            raise PhmdiffError("RUN_DIFFERS", f"was begun with other settings: {'; '.join(gaps)}",
                               "give the same settings to go on, or another --out", exit_code=USAGE,
                               file=out)  # fmt: skip
        split = read_split(out)
        asked = split_file is not None or fold is not None
        if asked and prepare_split(cohort, config, split_file, fold) != split:
            cure = "give the same --split or --fold, or another --out"
            raise PhmdiffError("RUN_DIFFERS", "was begun with another split", cure, exit_code=USAGE, file=out)
        return split, True
    # What a start that was cut short leaves is no obstacle.
    begun_only = {LOCK, "cache", "checkpoints", "config.toml", "split.json", status_name(0)}
    ours = lambda path: path.name in begun_only or is_unfinished(path)  # noqa: E731
    if out.exists() and not (out.is_dir() and all(map(ours, out.iterdir()))):
        raise PhmdiffError("OUTPUT_EXISTS", "exists and is no run folder", "choose another --out",
                           exit_code=USAGE, file=out)  # fmt: skip
    return prepare_split(cohort, config, split_file, fold), False


def _read_json(path: Path) -> dict:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("no regular file")
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES >> 20} MiB")
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise ValueError("not a table")
        return value
    except (OSError, ValueError, RecursionError) as problem:
        raise _broken(path, problem) from None


def _broken(path: Path, problem) -> PhmdiffError:
    return PhmdiffError("RUN_BROKEN", f"is not readable ({ascii(str(problem))[1:-1][:200]})",
                        "take it from a copy of the run, or train again", exit_code=CHECKPOINT, file=path)  # fmt: skip


def read_split(out: Path) -> dict[str, list[str]]:
    """Who is in training, validation and test of a run. Raises RUN_BROKEN (exit 4)."""
    split = _read_json(out / "split.json")
    parts = [split.get(name) for name in ("train", "val", "test")]
    if len(split) != 3 or not all(isinstance(part, list) and all(isinstance(s, str) for s in part) for part in parts):
        raise _broken(out / "split.json", "it is no split")
    return split


def read_facts(out: Path, config: Config) -> dict:
    """What was measured when a run was begun (run.json). Raises RUN_BROKEN (exit 4)."""
    facts = _read_json(out / "run.json")
    complexity, scale, units = facts.get("complexity"), facts.get("median_p995"), facts.get("units", "arbitrary")

    def is_number(value) -> bool:
        return type(value) in (int, float) and abs(value) < 1e18  # NaN fails the comparison

    if not (isinstance(complexity, list) and len(complexity) == len(config.model.levels)
            and all(map(is_number, complexity)) and is_number(scale) and units in ("HU", "arbitrary")):  # fmt: skip
        raise _broken(out / "run.json", "complexity, median_p995 or units are missing or of another kind")
    facts.setdefault("members", config.model.members or 1)  # of a run begun before there were several
    if type(facts["members"]) is not int or not 1 <= facts["members"] <= MOST_MEMBERS:
        raise _broken(out / "run.json", f"members is no number from 1 to {MOST_MEMBERS}")
    return facts


def begin(out: Path, config: Config, split: dict, facts: dict) -> None:
    """Write what the run is begun with; ``run.json`` last: with it the folder is a run."""
    with whole_file(out / "config.toml") as file:
        file.write(config.to_toml().encode())
    write_json(out / "split.json", split)
    write_json(out / "run.json", facts)
    with writing(out / "pictures"):  # after run.json: a start that was cut short is known by what lies there
        (out / "pictures").mkdir(exist_ok=True)


def refuse_bad_cohort(cohort: data.Cohort, config: Config, subjects: list[str], progress: bool) -> dict:
    """Read everything that will be trained on; raise DataErrors naming all that is wrong; what each file was."""
    with bar(len(subjects), "checking", progress) as meter:
        report = check_cohort(
            cohort, contrasts=[*config.data.sources, config.data.target], subjects=subjects,
            nan=config.data.nan, max_gib=config.data.max_volume_gib, progress=lambda *_: meter.update(),
        )  # fmt: skip
    if report.problems:
        raise DataErrors(report.problems)
    return report.seen


def open_cache(
    out: Path, cohort: data.Cohort, config: Config, split: dict[str, list[str]], progress: bool
) -> SliceCache:
    """The slice cache of a run's train and val people, rebuilt (and said so) when a file or setting changed.

    Before it is built everybody is checked, the test people too: bad data shows before the training.
    """
    subjects = [*split["train"], *split["val"]]
    try:
        return SliceCache.open(out / "cache", cohort, subjects, config.data)
    except PhmdiffError as stale:
        if (out / "cache" / "index.json").exists():
            say(f"slice cache is built again: {stale.what}")
    seen = refuse_bad_cohort(cohort, config, [*subjects, *split["test"]], progress)
    with bar(len(subjects), "preparing", progress) as meter:
        return SliceCache.build(
            out / "cache", cohort, subjects, config.data, seen=seen, progress=lambda *_: meter.update()
        )


def read_log(path: Path) -> list[dict]:
    """The records of a log.jsonl; a last line cut off by a crash is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class Log:
    """``log.jsonl``, a record a line. What lies after ``step``, the one a run goes on from, is taken out first:
    it is of steps that were lost, and a line may be cut off."""

    def __init__(self, path: Path, step: int):
        self.path, self._lock, self._file = path, threading.Lock(), None
        self.go_back(step)

    def go_back(self, step: int) -> None:
        """Take out what lies after ``step``."""
        with self._lock:
            if self._file is not None:
                self._file.close()
            kept = [record for record in read_log(self.path) if record["step"] <= step]
            with whole_file(self.path) as file:
                file.write("".join(json.dumps(record) + "\n" for record in kept).encode())
            with writing(self.path):
                self._file = open(self.path, "a", buffering=1)  # noqa: SIM115 (closed by the with)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_) -> None:
        with self._lock, contextlib.suppress(OSError):  # nothing is left to write but what was refused, and told
            self._file.close()

    def write(self, record: dict) -> None:
        """From any thread."""
        with self._lock:
            if not self._file.closed:
                with writing(self.path):
                    self._file.write(json.dumps(record) + "\n")

    def written(self, step: int) -> None:
        """A checkpoint is whole and on the disk: from here on no crash loses it."""
        self.write({"step": step, "checkpoint": f"step-{step:08d}"})


class Status:
    """What a process says of itself in ``status.json``: state, step, exit code, error; whole at any moment.

    torchrun itself ends with 1 whatever happened; this tells each process' own code.
    """

    def __init__(self, out: Path, rank: int, world: int):
        self._path = out / status_name(rank)
        self._facts = {"rank": rank, "world": world, "pid": os.getpid(), "host": platform.node(), "step": None}

    def say(self, state: str, *, step: int | None = None, exit_code: int | None = None, error: str | None = None):
        """``state``: starting, training, finished, stopped or failed."""
        if step is not None:
            self._facts["step"] = step
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        write_json(self._path, {"state": state, "exit_code": exit_code, "error": error, "time": when, **self._facts})

    def failed(self, problem: BaseException) -> None:
        """The process ends with ``problem``; a disk that is full may keep this from being written."""
        code = {KeyboardInterrupt: 130}.get(type(problem), getattr(problem, "exit_code", getattr(problem, "code", 1)))
        line = problem.line() if isinstance(problem, PhmdiffError) else type(problem).__name__
        self.ended(line, int(code or 0))

    def ended(self, line: str, exit_code: int) -> None:
        with contextlib.suppress(PhmdiffError):
            self.say("stopped" if exit_code in (130, 143) else "failed", exit_code=exit_code, error=line)
