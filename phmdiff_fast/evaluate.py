"""How good a run is on people it has not seen, beside its baselines. Read it downward."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import metrics
from .baselines import LookupTable, train_unet, unet_predict
from .cache import SliceCache
from .config import SampleConfig
from .data import Cohort, discover, load_subject, select_subjects
from .distributed import Alone
from .errors import DATA, USAGE, DataErrors, PhmdiffError
from .files import refuse_existing, write_json
from .generate import Run, foreground_slices, in_plane, predict, scaled_slices, source_slices
from .progress import say
from .run_folder import read_split

METHODS = ("ours", "lookup", "unet_l1")


@dataclass
class Case:
    """One person on the network's grid: sources (Z, Cs, S, S), target (Z, S, S), foreground (Z, S, S) bool."""

    subject: str
    sources: np.ndarray
    target: np.ndarray
    foreground: np.ndarray


@dataclass
class Evaluation:
    """``rows`` for the table; ``values[method][protocol][subject][metric]``; ``made[method][subject]`` (Z, S, S).

    With several processes process 0 has them; in the others they are empty.
    """

    rows: list[dict]
    values: dict
    made: dict
    cases: list[Case]
    unet_steps: int | None


def load_case(
    run: Run, cohort: Cohort, subject_id: str, *, nan: str | None = None, max_gib: float | None = None
) -> Case:  # fmt: skip
    """Read one person; every contrast scaled as in training: MR by its own percentiles, CT by the HU window.

    ``nan`` and ``max_gib`` as of ``Run.translate``.
    """
    contrasts = [*run.sources, run.target]
    subject = load_subject(cohort, subject_id, contrasts, foreground_from=run.sources[0], with_seg=False,
                           **run.reading(nan, max_gib))  # fmt: skip
    plane = in_plane(run, subject)
    target = scaled_slices(run, subject, run.target, plane)
    return Case(subject_id, source_slices(run, subject, plane), target, foreground_slices(subject.foreground, plane))


def people(run: Run, cohort: Cohort, part: str) -> list[str]:
    """The run's own test (or val) people that are in this cohort, all contrasts there."""
    split = read_split(run.folder)
    chosen = [s for s in split[part] if s in cohort.files]
    if not chosen:
        raise PhmdiffError("NO_TEST", f"holds none of the run's {len(split[part])} {part} people",
                           "give the cohort it was trained on, or train with --split", exit_code=DATA,
                           file=cohort.root)  # fmt: skip
    return select_subjects(cohort, run.config.data, chosen)


def predictors(
    run: Run, cohort: Cohort, settings: SampleConfig, baselines: bool, progress, ranks: Alone | None = None
) -> tuple[dict, int | None]:
    """method -> function (sources (Z, Cs, S, S)) -> (Z, S, S); and the U-Net's steps."""
    out: dict[str, Callable] = {"ours": lambda sources: predict(run, sources, settings, ranks=ranks)}
    if not baselines:
        return out, None
    split = read_split(run.folder)
    used = [*split["train"], *split["val"]]
    select_subjects(cohort, run.config.data, used)
    cache, changed = SliceCache.ensure(run.folder / "cache", cohort, used, run.config.data)
    if changed:
        say(f"slice cache is built again: {changed}")
    rows = np.concatenate([cache.rows_of(s) for s in split["train"]])
    table = LookupTable.fit(cache, rows)
    seconds = float(run.found.manifest["seconds"])
    unet, steps = train_unet(cache, rows, run.config.train, seconds, run.device, run.dtype,
                             data=run.config.data, progress=progress)  # fmt: skip
    out["lookup"] = table.predict
    out["unet_l1"] = lambda sources: unet_predict(unet, sources, run.device, run.dtype)
    return out, steps


def in_units(run: Run, scores: dict[str, float]) -> dict[str, float]:
    """A CT's mean absolute error in HU (``mae_hu``) instead of normalised units (``mae``)."""
    if run.units != "HU":
        return scores
    low, high = run.config.data.hu_window
    return {("mae_hu" if k == "mae" else k): v * (high - low) / 2 if k == "mae" else v for k, v in scores.items()}


def evaluate(
    run: Run, data_path, settings: SampleConfig, *, protocols: tuple[str, ...] = ("phmdiff-slice", "brain"),
    part: str = "test", nan: str | None = None, max_gib: float | None = None, baselines: bool = False, progress=None,
    keep_images: bool = False, ranks: Alone | None = None,
) -> Evaluation:  # fmt: skip
    """Score a run on its test people, at the run's image size.

    baselines : also fit a lookup table and train a U-Net with L1 for the wall-clock the model had
    nan, max_gib : how the scans of these people are read, as of ``Run.translate``
    part : which list of the run's split; progress(share) hears of the U-Net's training
    ranks : several processes, which each call this and share the slices of every person; process 0 alone trains the
        baselines, scores, and has the result
    Raises PhmdiffError (2 unknown protocol, 3 data). A person that fails stops the evaluation:
    nobody is averaged away.
    """
    ranks = ranks or Alone()
    with ranks.told_once():
        for name in protocols:
            if name not in metrics.PROTOCOLS:
                raise PhmdiffError("PROTOCOL", f"unknown protocol {name!r}", f"known: {', '.join(metrics.PROTOCOLS)}",
                                   exit_code=USAGE)  # fmt: skip
        cohort = discover(data_path)
        subjects = people(run, cohort, part)
        problems, cases = [], []
        for subject in subjects:
            try:
                cases.append(load_case(run, cohort, subject, nan=nan, max_gib=max_gib))
            except PhmdiffError as problem:
                problems.append(problem)
        if problems:
            raise DataErrors(problems)
    with ranks.busy():
        functions, unet_steps = predictors(run, cohort, settings, baselines and ranks.first, progress, ranks)
    ours = {case.subject: functions["ours"](case.sources) for case in cases}  # all processes at once
    evaluation = Evaluation([], {}, {}, cases, None)
    if ranks.first:
        with ranks.busy():
            rows, values, made = _scored(run, cases, {**functions, "ours": ours.get}, protocols, keep_images)
            evaluation = Evaluation(rows, values, made, cases, unet_steps)
    ranks.max(0.0)  # the others wait for it
    return evaluation


def _scored(run: Run, cases: list[Case], functions: dict, protocols: tuple[str, ...], keep_images: bool) -> tuple:
    """``rows``, ``values`` and ``made`` of an Evaluation; "ours" is made already and found by the person's name."""
    values: dict = {m: {p: {} for p in protocols} for m in functions}
    made: dict = {m: {} for m in functions}
    for case in cases:
        for method, function in functions.items():
            image = function(case.subject if method == "ours" else case.sources)
            if keep_images:
                made[method][case.subject] = image
            for name in protocols:
                scores = metrics.PROTOCOLS[name](image, case.target, case.foreground)
                values[method][name][case.subject] = in_units(run, scores)
    rows = [
        {"method": method, "protocol": protocol, "metric": metric, **figures}
        for method in functions
        for protocol in protocols
        for metric, figures in metrics.summarise(values[method][protocol]).items()
    ]
    return rows, values, made


def write_table(path, evaluation: Evaluation, *, overwrite: bool = False) -> None:
    """The JSON of ``evaluate --json``: {"rows": [...], "subjects": {...}}. Raises OUTPUT_EXISTS (exit 2)."""
    path = Path(path)
    refuse_existing(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, _strict({"rows": evaluation.rows, "subjects": evaluation.values}))


def _strict(value):
    """JSON has no infinity (the PSNR of a perfect image) and no NaN: both become null."""
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_strict(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
