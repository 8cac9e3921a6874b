"""Which method is best on people it has never seen: every row trained for the same wall-clock, one table.

    python -m benchmarks.quality --task t1-t2 --minutes 10 --rows ours,unet_l1,dit --out results.jsonl
    python -m benchmarks.quality --out results.jsonl --table      # what is there, nothing is trained
    python -m benchmarks.quality --on val --minutes 3 --rows mine --extra 'mine={"train": {"lr": 1e-3}}' --out x.jsonl

Each row is trained on the same slices with the same batch size, precision and augmentation, alone on the
machine, and scored on people of the fixed split (--people fixed), of a split file (--people split.json), on each
person in turn, the others in training (--people leave-one-out), or on everybody in so many parts, each by a
training on the other parts (--people 3-fold). A training is one line of JSON in --out, written when it is done; the
same command goes on with what is missing, so the queue can be stopped (Ctrl-C) at any time.

Rows are in ``quality_rows``, other methods in ``rivals``; the table is made by ``quality_table``.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import commit
from benchmarks.quality_rows import FIXED, ROWS, TASKS, Row, Task
from benchmarks.quality_table import tables
from benchmarks.rivals import RIVALS, rival_predict, train_rival
from phmdiff_fast import checkpoint, metrics
from phmdiff_fast.baselines import LookupTable
from phmdiff_fast.cache import SliceCache
from phmdiff_fast.config import Config, build_config, parse_set
from phmdiff_fast.data import Cohort, discover
from phmdiff_fast.device import kept_memory, pick_device, pick_precision
from phmdiff_fast.errors import PhmdiffError
from phmdiff_fast.evaluate import Case, load_case
from phmdiff_fast.flops import step_flops
from phmdiff_fast.generate import Run, load, predict
from phmdiff_fast.held_out import rows_of
from phmdiff_fast.progress import say, share_bar
from phmdiff_fast.sampling import with_detail
from phmdiff_fast.splits import make_fold, read_split
from phmdiff_fast.train import train

PROTOCOLS = ("phmdiff-slice", "brain", "brain-3d")
FOLDS = re.compile(r"([2-9]|[1-9][0-9])-fold")
ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "data" / "brain"


@dataclass(frozen=True)
class Split:
    """Who is in which part; ``name`` tells one leave-one-out fold from another."""

    name: str
    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """One training: a row, a task, a split, a seed, a budget in minutes."""

    row: str
    task: str
    split: Split
    seed: int
    minutes: float
    image_size: int = 64
    looks: int = 0
    common: str = ""  # the settings given for all rows, as --set has them

    @property
    def key(self) -> tuple:
        return self.row, self.task, self.split.name, self.seed, self.minutes, self.image_size, self.looks, self.common


def splits(cohort: Cohort, task: Task, people: str, part: str) -> Iterator[Split]:
    """The fixed split, that of a file, or folds over the people with the contrasts asked for.

    In a fold nobody is held back for validation: whatever is chosen was chosen before, on the fixed split. people,
    part : as --people and --on. Raises PhmdiffError as ``splits.read_split`` and ``splits.make_fold`` do.
    """
    has = [s for s, files in cohort.files.items() if {*task.sources, task.target} <= set(files)]
    real = [s for s in has if task.plumbing or not s.startswith("tpl-")]
    if Path(people).suffix in (".json", ".csv"):
        parts = {name: [s for s in chosen if s in has] for name, chosen in read_split(people, cohort.files).items()}
        yield Split(f"{Path(people).name}/{part}", *(tuple(parts[name]) for name in ("train", "val", part)))
        return
    if found := FOLDS.fullmatch(people):
        for fold in range(count := int(found[1])):
            parts = make_fold(real, fold, count)
            yield Split(f"{fold + 1} of {count}", (*parts["train"], *parts["val"]), (), tuple(parts["test"]))
        return
    if people == "fixed" and not task.plumbing:
        val, test = ([s for s in FIXED[name] if s in real] for name in ("val", "test"))
        others = tuple(s for s in real if s not in FIXED["val"] and s not in FIXED["test"])
        scored = {"test": test, "val": val}[part]
        yield Split(f"fixed/{part}", others, tuple(val), tuple(scored))
        return
    for person in real:
        yield Split(f"without {person}", tuple(s for s in real if s != person), (), (person,))


class Bench:
    """Trains and scores jobs; slices and people of a task and split are read once."""

    def __init__(
        self, rows: dict[str, Row], data: Path, device: str, folder: Path, image_size: int, settings: dict, looks: int,
        progress: bool,
    ):  # fmt: skip
        self.rows, self.data, self.folder, self.looks, self.progress = rows, data, folder, looks, progress
        self.settings = {**settings, "data": {**settings.get("data", {}), "image_size": image_size}}
        self.cohort = discover(data)
        self.device = pick_device(device)
        self._read: dict = {}

    def config(self, job: Job, over: dict) -> Config:
        task = TASKS[job.task]
        budget = {"minutes": job.minutes, "seed": job.seed, "checkpoint_every": 1e6}
        if self.looks:
            budget |= {"checkpoint_every": 60 * job.minutes / self.looks, "keep": self.looks + 1}
        base = {"data": {"sources": list(task.sources), "target": task.target, "skip_incomplete": True}}
        return build_config("xs", base, self.settings, over, {"train": budget})

    def people(self, job: Job, config: Config) -> tuple[list[Case], list[Case], SliceCache, np.ndarray]:
        """Test and validation people, the slice cache, and its training rows."""
        key = (job.task, job.split.name, config.data.model_dump_json())
        if key not in self._read:
            self._read.clear()
            dtype = pick_precision(config.train.precision, self.device)
            reader = Run(Path(), config, None, {}, None, self.device, dtype)  # how scans are read: no model yet
            parts = (job.split.test, job.split.val)
            test, val = ([load_case(reader, self.cohort, s) for s in part] for part in parts)
            where = self.folder / f"cache-{job.split.name.replace('/', '-')}"
            cache, _ = SliceCache.ensure(where, self.cohort, [*job.split.train, *job.split.val], config.data)
            self._read[key] = (test, val, cache, rows_of(cache, list(job.split.train)))
        return self._read[key]

    def run(self, job: Job) -> Iterator[dict]:
        """Train a row and score it: a result for each way to sample from it."""
        row = self.rows[job.row]
        config = self.config(job, row.settings)
        test, val, cache, rows = self.people(job, config)
        facts = {
            "row": job.row, "task": job.task, "split": job.split.name, "seed": job.seed, "minutes": job.minutes,
            "train": list(job.split.train), "image_size": config.data.image_size, "settings": row.settings,
            "looks": job.looks, "common": job.common,
            **self.machine(config),
        }  # fmt: skip
        made = self._model(row, job, config) if row.ours else self._rival(job, config, val, cache, rows)
        for how, function, more in made:
            # The validation person's figures too: a choice between rows is made by those.
            yield {**facts, **more, "sampling": how, "people": scored(test, function),
                   "validation": scored(val, function)}  # fmt: skip

    def machine(self, config: Config) -> dict:
        on_gpu = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.device) if on_gpu else f"CPU {platform.machine()}",
            "threads": torch.get_num_threads(), "dtype": str(pick_precision(config.train.precision, self.device))[6:],
            "torch": torch.__version__, "commit": commit(), "date": datetime.date.today().isoformat(),
        }  # fmt: skip

    def _model(self, row: Row, job: Job, config: Config) -> Iterator[tuple[str, Callable, dict]]:
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            split = Path(folder) / "split.json"
            parts = {"train": job.split.train, "val": job.split.val, "test": job.split.test}
            split.write_text(json.dumps(parts))
            run = load(train(self.data, Path(folder) / "run", config, split_file=split, progress=self.progress),
                       device=self.device.type)  # fmt: skip
            best = best_checkpoint(run) if self.looks and job.split.val else run.found
            run.model.load_state_dict(best.tensors("ema"))
            run.model.usable = best.manifest["members"]  # an earlier checkpoint's later members are not trained yet
            share = config.train.finetune_share
            flops = [step_flops(config.model, config.data.source_channels, config.data.image_size,
                                config.train.batch_size, masked, run.model.ratios).training
                     for masked in (True, False)]  # fmt: skip
            facts = {"steps": run.found.step, "best_step": best.step, "seconds": run.found.manifest["seconds"],
                     "parameters": sum(p.numel() for p in run.model.parameters()),
                     "flops_step": (1 - share) * flops[0] + share * flops[1]}  # fmt: skip

            def ours(case: Case, settings) -> np.ndarray:
                return predict(run, case.sources, settings, foreground=case.touched).mean

            for how in row.sampling:
                settings = config.sample.model_copy(update=sampling(how))
                yield how, partial(ours, settings=settings), facts

    def _rival(self, job: Job, config: Config, val, cache, rows) -> Iterator[tuple[str, Callable, dict]]:
        if job.row == "lookup":
            table = LookupTable.fit(cache, rows)
            yield (
                "-",
                lambda case: table.predict(case.sources),
                {"steps": 0, "seconds": 0.0, "parameters": table.tables.size, "flops_step": 0},
            )
            return
        dtype = pick_precision(config.train.precision, self.device)
        torch.manual_seed(config.train.seed)
        rival = RIVALS[job.row](config.data.source_channels).to(self.device)

        def look(rival) -> float:
            made = [rival_predict(rival, case.sources, self.device, dtype) for case in val]
            pairs = zip(made, val, strict=True)
            return float(np.mean([metrics.phmdiff_slice(x, c.target, c.foreground)["psnr"] for x, c in pairs]))

        with share_bar(f"training {self.rows[job.row].title}", self.progress) as meter, kept_memory(self.device):
            trained = train_rival(rival, cache, rows, config.train, job.minutes * 60, self.device, dtype,
                                  data=config.data, look=look if self.looks and val else None,
                                  looks=max(1, self.looks), progress=meter.at)  # fmt: skip
        if trained.best_state is not None:
            rival.load_state_dict(trained.best_state)
        facts = {"steps": trained.steps, "best_step": trained.best_step or trained.steps, "seconds": trained.seconds,
                 "parameters": rival.parameter_count(), "flops_step": trained.flops_step}  # fmt: skip

        def translated(case: Case, how: dict) -> np.ndarray:
            sources = case.sources
            made = rival_predict(rival, sources, self.device, dtype)
            if how["views"] == 2:
                made = (made + rival_predict(rival, sources[:, :, ::-1], self.device, dtype)[:, ::-1]) / 2
            return with_detail(torch.from_numpy(made)[:, None], how["detail"])[:, 0].numpy()

        for how in self.rows[job.row].sampling:
            yield how, partial(translated, how=sampling(how)), facts


def sampling(how: str) -> dict:
    """ "4 x 2, detail 1.1" -> 4 steps, the mean over 2 views, detail times 1.1; 1 step, 1 view, detail as it is."""
    found = re.fullmatch(r"(\d+)(?: x (\d))?(?:, detail ([\d.]+))?", how)
    return {"steps": int(found[1]), "views": int(found[2] or 1), "detail": float(found[3] or 1)}


def best_checkpoint(run: Run) -> checkpoint.Checkpoint:
    """Of the checkpoints kept, that with the best figure on the validation person."""
    whole = [checkpoint.verify(folder) for folder in checkpoint.found(run.folder / "checkpoints")]
    return max(whole, key=lambda one: one.manifest["val_psnr"])


def scored(cases: list[Case], function: Callable[[Case], np.ndarray]) -> dict:
    """{person: {protocol: {metric: figure}}}, and {"sharpness": figure} beside the protocols."""
    out = {}
    for case in cases:
        made = function(case)
        out[case.subject] = {name: metrics.PROTOCOLS[name](made, case.target, case.foreground) for name in PROTOCOLS}
        out[case.subject]["detail"] = {"sharpness": metrics.sharpness(made, case.target, case.foreground)}
    return out


def read_results(path: Path) -> list[dict]:
    """The lines of --out; a last line that was cut off by a crash is left out."""
    results = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            results.append(json.loads(line))
    return results


def append(path: Path, results: list[dict]) -> None:
    """All ways to sample from one training, or none; behind a line that was cut off a new one begins."""
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            file.write(b"" if file.read() == b"\n" else b"\n")
        file.write("".join(json.dumps(result) + "\n" for result in results).encode())


def key_of(result: dict) -> tuple:
    first = tuple(result[name] for name in ("row", "task", "split", "seed", "minutes", "image_size"))
    return *first, result.get("looks", 0), result.get("common", "")


def jobs(cohort: Cohort, args) -> list[Job]:
    """All trainings asked for; the rows of one split follow one another, so that slices are read once."""
    return [
        Job(row, name, split, seed, args.minutes, args.image_size, args.looks, " ".join(args.settings))
        for name in args.task.split(",")
        for split in splits(cohort, TASKS[name], args.people, args.on)
        for seed in range(args.seeds)
        for row in args.rows.split(",")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("PHMDIFF_REAL_DATA", REAL)))
    parser.add_argument("--task", default="t1-t2", help=f"comma-separated, of: {', '.join(TASKS)}")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"comma-separated, of: {', '.join(ROWS)}")
    parser.add_argument("--extra", action="append", default=[], metavar="NAME=JSON", help="a row of your own: settings "
                        "over preset xs, to be named in --rows too")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=10.0, help="wall-clock of each training")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--people", default="fixed", help="fixed, leave-one-out, K-fold (e.g. 3-fold), or a split "
                        "file (.json or .csv as of phmdiff-fast train)")  # fmt: skip
    parser.add_argument("--on", choices=("test", "val"), default="test", help="whom a split scores")
    parser.add_argument("--looks", type=int, default=0, help="keep the best of so many checkpoints, by the "
                        "validation person, instead of the last")  # fmt: skip
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE",
                        help="a setting for all rows, e.g. data.context_slices=1")  # fmt: skip
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; a training already in it is not repeated")
    parser.add_argument("--resume", action="store_true", help="go on with an --out that exists (else it is refused)")
    parser.add_argument("--table", action="store_true", help="print the tables of --out and train nothing")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args()
    rows = ROWS | {name: Row(name, json.loads(text)) for name, _, text in (item.partition("=") for item in args.extra)}
    for given, known in ((args.rows, rows), (args.task, TASKS)):
        if unknown := [name for name in given.split(",") if name not in known]:
            parser.error(f"unknown {', '.join(unknown)}; known: {', '.join(known)}")
    is_file = Path(args.people).suffix in (".json", ".csv") and Path(args.people).is_file()
    if not (args.people in ("fixed", "leave-one-out") or FOLDS.fullmatch(args.people) or is_file):
        parser.error(f"--people {args.people}: fixed, leave-one-out, 2-fold to 99-fold, or a split file")
    if args.table:
        print(tables(read_results(args.out)))
        return
    if args.out.exists() and not args.resume:
        parser.error(f"{args.out} exists: give --resume to go on with it, or another --out")
    if not args.data.is_dir():
        parser.error(f"{args.data} holds no cohort: give --data, or set PHMDIFF_REAL_DATA")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(rows, args.data, args.device, Path(folder), args.image_size, parse_set(args.settings), args.looks,
                      not args.quiet)  # fmt: skip
        try:
            todo = jobs(bench.cohort, args)
        except PhmdiffError as problem:  # a split file or a number of folds that does not fit the cohort
            parser.error(str(problem))
        if not todo or not all(job.split.train and job.split.test for job in todo):
            parser.error(f"{args.data} lacks the people of the split: give --people leave-one-out, with at least two "
                         "people who have the contrasts")  # fmt: skip
        done = {key_of(result) for result in read_results(args.out)}
        for number, job in enumerate(todo, 1):
            if job.key in done:
                continue
            say(f"{number} of {len(todo)}: {rows[job.row].title}, {job.task}, {job.split.name}, seed {job.seed}")
            results = list(bench.run(job))
            append(args.out, results)
    print(tables(read_results(args.out)))


if __name__ == "__main__":
    main()
