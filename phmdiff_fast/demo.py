"""The demo: the main job on simulated patients, from nothing to one HTML page. Read it downward."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from . import __version__, pictures
from .check import check_cohort
from .check_page import write_check_page
from .config import build_config
from .data import discover
from .errors import USAGE, DataErrors, PhmdiffError
from .evaluate import Evaluation, evaluate, write_table
from .generate import load, sample
from .progress import bar, say, share_bar
from .report import format_table, write_demo_page
from .run_folder import read_log
from .simulate import simulate_cohort
from .train import train

MARK = ".phmdiff-fast-demo"  # in a folder a demo made: only such a folder is ever replaced
SHORT_NAMES = {"lookup": "lookup table", "unet_l1": "U-Net L1"}


def fresh_folder(out: Path, overwrite: bool) -> None:
    """Make ``out``; an older demo in it is removed with ``overwrite``. Raises OUTPUT_EXISTS (exit 2)."""
    if out.exists() and not out.is_dir():
        raise PhmdiffError("OUTPUT_EXISTS", "is a file", "choose another --out", exit_code=USAGE, file=out)
    if out.exists() and any(out.iterdir()):
        if not (overwrite and (out / MARK).exists()):
            cure = "choose another --out" + (", or give --overwrite" if (out / MARK).exists() else "")
            raise PhmdiffError("OUTPUT_EXISTS", "exists and is not empty", cure, exit_code=USAGE, file=out)
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()


def best_slices(foreground: np.ndarray, count: int) -> list[int]:
    """Slice numbers evenly spaced over the middle of the foreground (Z, S, S)."""
    used = np.flatnonzero(foreground.any((1, 2)))
    low, high = np.quantile(used, [0.35, 0.75])
    return sorted({int(z) for z in np.linspace(low, high, count).round()})


def draw_cases(result: Evaluation, folder: Path) -> list[tuple[str, Path]]:
    """One strip for each test person: source, all methods, truth, errors. Returns (caption, path) pairs."""
    strips = []
    for case in result.cases:
        rows = [
            {
                "label": f"slice {z}",
                "source": list(case.sources[z]),
                "synthesized": result.made["ours"][case.subject][z],
                "truth": case.target[z],
                "others": {SHORT_NAMES[m]: result.made[m][case.subject][z] for m in result.made if m != "ours"},
                "source_names": ["source T1"],
            }
            for z in best_slices(case.foreground, 2)
        ]
        path = folder / f"{case.subject}.png"
        pictures.strip(path, rows, title=f"{case.subject}, not seen in training")
        strips.append(
            (
                f"{case.subject}: the T1 it starts from, T2 by each method (ours in bold), the true T2, and the errors",
                path,
            )
        )
    return strips


def run_demo(
    out, *, minutes: float = 3.5, num_subjects: int = 12, image_size: int = 64, seed: int = 0,
    overwrite: bool = False, progress: bool = True,
) -> Path:  # fmt: skip
    """Simulate patients, check, train T1 -> T2, sample, evaluate with baselines; returns the page's path.

    Everything lies under ``out``: cohort/ (BraTS layout), check.html, run/, synthesized/, table.json,
    index.html.
    Raises PhmdiffError; NEED_EXTRA (exit 8) where nilearn is missing.
    """
    out = Path(out)
    fresh_folder(out, overwrite)

    say("1/5 simulating patients from real anatomy (MNI152)")
    with bar(num_subjects, "simulating", progress) as meter:
        simulate_cohort(out / "cohort", num_subjects=num_subjects, seed=seed, progress=lambda *_: meter.update())

    say("2/5 checking the cohort")
    cohort = discover(out / "cohort")
    report = check_cohort(cohort, contrasts=["t1", "t2"], views=True)
    write_check_page(out / "check.html", cohort_root=cohort.root, layout=cohort.layout, report=report)
    if report.problems:
        raise DataErrors(report.problems)

    say(f"3/5 training T1 -> T2, preset xs, {minutes:g} minutes")
    settings = {"data": {"sources": ["t1"], "target": "t2", "image_size": image_size},
                "train": {"minutes": minutes, "seed": seed}}  # fmt: skip
    config = build_config("xs", settings)
    train(out / "cohort", out / "run", config, progress=progress)
    run = load(out / "run")

    say("4/5 synthesizing the test people")
    split = json.loads((out / "run" / "split.json").read_text())
    sample(run, [out / "cohort" / s for s in split["test"]], out / "synthesized", config.sample)

    say(f"5/5 scoring, beside a lookup table and a U-Net trained for the same {minutes:g} minutes")
    with share_bar("training the U-Net baseline", progress) as meter:
        result = evaluate(run, out / "cohort", config.sample, baselines=True, keep_images=True,
                          progress=meter.at)  # fmt: skip
    write_table(out / "table.json", result)
    print(format_table(result.rows), flush=True)

    (out / "pictures").mkdir()
    strips = draw_cases(result, out / "pictures")
    by_level = out / "run" / "pictures" / f"levels-{run.found.step:08d}.png"
    strips.append(("Two slices of a validation person at every level of the pyramid, coarse to fine", by_level))
    curves = out / "pictures" / "curves.png"
    pictures.curves(curves, read_log(out / "run" / "log.jsonl"))
    seconds = run.found.manifest["seconds"]
    facts = [
        ("Task", "T1 → T2, axial slices"),
        ("Patients", f"{num_subjects} simulated: {len(split['train'])} train, {len(split['val'])} validation, "
                     f"{len(split['test'])} test"),
        ("Image size", f"{image_size} × {image_size}, scored at that size"),
        ("Model", f"PHMDiff, preset xs, {sum(p.numel() for p in run.model.parameters()) / 1e6:.1f} M parameters"),
        ("Training", f"{seconds:.0f} s, {run.found.step} steps on {run.device.type} ({str(run.dtype)[6:]})"),
        ("U-Net baseline", f"{seconds:.0f} s, {result.unet_steps} steps, same data, split and augmentation"),
        ("Sampling", f"{config.sample.steps} step, seed {config.sample.seed}"),
        ("Version", f"phmdiff-fast {__version__}"),
    ]  # fmt: skip
    notes = [
        "These patients are simulated: real anatomy (the MNI152 average brain), randomly deformed, with computed "
        "MR signals. They are no measure of how the method does on real patients.",
        "For research only, never for diagnosis.",
    ]
    page = out / "index.html"
    write_demo_page(page, title="PHMDiff demo: a T2 synthesized from a T1", facts=facts, table_rows=result.rows,
                    strips=strips, curves_png=curves, notes=notes)  # fmt: skip
    return page
