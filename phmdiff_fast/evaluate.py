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
from .generate import Run, Slices, foreground_slices, in_plane, predict, scaled_slices, source_slices
from .progress import say
from .run_folder import read_split

METHODS = ("ours", "lookup", "unet_l1")


@dataclass
class Case:
    """One person on the network's grid: sources (Z, Cs, S, S), target (Z, S, S), foreground (Z, S, S) bool, and
    ``touched``, the pixels that any part of the foreground lies in."""

    subject: str
    sources: np.ndarray
    target: np.ndarray
    foreground: np.ndarray
    touched: np.ndarray


@dataclass
class Evaluation:
    """``rows`` for the table; ``values[method][protocol][subject][metric]``; ``made[method][subject]`` (Z, S, S);
    ``ours[subject]``, the model's mean and, of several samples, deviation.

    With several processes process 0 has them; in the others they are empty.
    """

    rows: list[dict]
    values: dict
    made: dict
    cases: list[Case]
    unet_steps: int | None
    ours: dict[str, Slices]


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
    return Case(subject_id, source_slices(run, subject, plane), target, foreground_slices(subject.foreground, plane),
                foreground_slices(subject.foreground, plane, any_part=True))  # fmt: skip


def people(run: Run, cohort: Cohort, part: str) -> list[str]:
    """The run's own test (or val) people that are in this cohort, all contrasts there."""
    split = read_split(run.folder)
    chosen = [s for s in split[part] if s in cohort.files]
    if not chosen:
        raise PhmdiffError("NO_TEST", f"holds none of the run's {len(split[part])} {part} people",
                           "give the cohort it was trained on, or train with --split", exit_code=DATA,
                           file=cohort.root)  # fmt: skip
    return select_subjects(cohort, run.config.data, chosen)


def predictors(run: Run, cohort: Cohort, baselines: bool, progress) -> tuple[dict, int | None]:
    """method -> function (sources (Z, Cs, S, S)) -> (Z, S, S) of the baselines; and the U-Net's steps."""
    out: dict[str, Callable] = {}
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
        functions, unet_steps = predictors(run, cohort, baselines and ranks.first, progress)
    engine = run.engine(settings)
    ours = {
        case.subject: predict(run, case.sources, settings, foreground=case.touched, ranks=ranks, engine=engine)
        for case in cases  # all processes at once
    }
    evaluation = Evaluation([], {}, {}, cases, None, {})
    if ranks.first:
        with ranks.busy():
            functions = {"ours": lambda subject: ours[subject].mean, **functions}
            rows, values, made = _scored(run, cases, functions, protocols, keep_images)
            evaluation = Evaluation(rows, values, made, cases, unet_steps, ours)
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


@dataclass
class Calibration:
    """How the error follows the deviation that was predicted, over the foreground pixels of all people.

    deviation, error, pixels : a bin each, equally many pixels in each: root mean square of the predicted
    deviation and of the error, in normalised units (of a range of 2). ratio : root mean square error over that of
    the deviations; 1 is calibrated, more is too sure. rank_correlation : Spearman's, of |error| and deviation, pixel
    by pixel.
    """

    deviation: list[float]
    error: list[float]
    pixels: list[int]
    ratio: float
    rank_correlation: float

    def line(self) -> str:
        return (f"predicted deviation: error / deviation {self.ratio:.2f} (1 is calibrated, more is too sure), "
                f"rank correlation {self.rank_correlation:.2f}, {sum(self.pixels):,} foreground pixels")  # fmt: skip


def calibration_of(evaluation: Evaluation, bins: int = 15) -> Calibration:
    """Of an evaluation with several samples. Raises ValueError for one without."""
    from scipy.stats import spearmanr

    spread, wrong = [], []
    for case in evaluation.cases:
        ours = evaluation.ours[case.subject]
        if ours.deviation is None:
            raise ValueError("one sample has no deviation")
        spread.append(ours.deviation[case.foreground])
        wrong.append(np.abs(ours.mean - case.target)[case.foreground])
    spread, wrong = (np.concatenate(parts).astype(np.float64) for parts in (spread, wrong))
    parts = [part for part in np.array_split(np.argsort(spread, kind="stable"), bins) if len(part)]
    return Calibration(
        [float(np.sqrt(np.mean(spread[part] ** 2))) for part in parts],
        [float(np.sqrt(np.mean(wrong[part] ** 2))) for part in parts],
        [len(part) for part in parts],
        float(np.sqrt(np.mean(wrong**2) / max(np.mean(spread**2), 1e-24))),
        float(spearmanr(spread, wrong).statistic),
    )


def write_table(path, evaluation: Evaluation, *, overwrite: bool = False, more: dict | None = None) -> None:
    """The JSON of ``evaluate --json``: {"rows": [...], "subjects": {...}}, and ``more``. Raises OUTPUT_EXISTS (2)."""
    path = Path(path)
    refuse_existing(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, _strict({"rows": evaluation.rows, "subjects": evaluation.values, **(more or {})}))


def _strict(value):
    """JSON has no infinity (the PSNR of a perfect image) and no NaN: both become null."""
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_strict(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
