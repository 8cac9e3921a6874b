"""Tables of the quality bench: mean and deviation over people, and what sets ours apart, person by person.

A figure is first averaged over the seeds of a person, since people, not trainings, are what a claim is about.
"""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
from scipy import stats

from benchmarks.quality_rows import AS_PRESET, ROWS, TASKS

# (protocol, metric) -> head, decimals
COLUMNS = {
    ("phmdiff-slice", "psnr"): ("slice PSNR dB", 2), ("phmdiff-slice", "ssim"): ("slice SSIM %", 2),
    ("brain", "psnr"): ("brain PSNR dB", 2), ("brain", "ssim"): ("brain SSIM %", 2),
    ("brain-3d", "ssim"): ("brain 3D SSIM %", 2), ("detail", "sharpness"): ("sharpness", 2),
}  # fmt: skip
COMPARED = [("phmdiff-slice", "psnr"), ("phmdiff-slice", "ssim"), ("brain", "psnr"), ("brain", "ssim"),
            ("detail", "sharpness")]  # fmt: skip
CAPTION = """\
Mean ± standard deviation over people (of each person, over the seeds). Protocols `phmdiff-slice`, `brain`, `brain-3d`
(phmdiff_fast/metrics.py); sharpness: gradient energy over the truth's, 1 is as sharp as the truth. "1 x 2": one
sampling step, the mean over the image and its mirror image; "detail 1.15": fine structure times that. Every row
had the same wall-clock, slices, batch size, precision and augmentation, alone on the machine. Of the paper's Table I,
pGAN, MM-GAN and Uni-GAN are not redone; CoLa-Diff stands as "latent diffusion" of our own small make, MAE and
TransUNet as rows of their kind. The paper's figures are on BraTS 2021 by a metric it does not define, and cannot be
compared with these."""
PLUMBING = "Templates only: this shows that MR -> CT runs from end to end and says nothing about people."


def by_person(results: list[dict]) -> dict[tuple, dict[str, dict]]:
    """(row, sampling) -> person -> {(protocol, metric): mean over the seeds}."""
    gathered: dict = defaultdict(lambda: defaultdict(list))
    for result in results:
        for person, protocols in result["people"].items():
            flat = {(p, m): v for p, metrics in protocols.items() for m, v in metrics.items()}
            gathered[result["row"], result["sampling"]][person].append(flat)

    def mean(figures: list[dict]) -> dict:
        return {column: float(np.mean([f[column] for f in figures])) for column in figures[0]}

    return {key: {who: mean(figures) for who, figures in people.items()} for key, people in gathered.items()}


def spread(values: list[float], decimals: int) -> str:
    """ "25.50 ± 2.65", without a deviation for one person."""
    text = f"{np.mean(values):.{decimals}f}"
    return text if len(values) < 2 else f"{text} ± {np.std(values, ddof=1):.{decimals}f}"


def table(results: list[dict]) -> str:
    """Markdown: a line a row and way to sample, in the order of ``ROWS``; best means in bold."""
    figures = by_person(results)
    order = list(ROWS)
    keys = sorted(figures, key=lambda key: order.index(key[0]) if key[0] in order else len(order))
    means = {key: {c: np.mean([f[c] for f in figures[key].values()]) for c in COLUMNS} for key in keys}
    best = {c: max(means[key][c] for key in keys) if c[1] != "sharpness" else None for c in COLUMNS}
    heads = ["row", "steps to sample", *(head for head, _ in COLUMNS.values()), "n", "training steps", "steps/s",
             "parameters", "GFLOP a step"]  # fmt: skip
    lines = [heads, ["---", "---", *["---:"] * (len(heads) - 2)]]
    for key in keys:
        cells = []
        for column, (_, decimals) in COLUMNS.items():
            text = spread([f[column] for f in figures[key].values()], decimals)
            top = best[column]
            is_best = top is not None and round(means[key][column], decimals) == round(top, decimals)
            cells.append(f"**{text}**" if is_best else text)
        runs = [r for r in results if (r["row"], r["sampling"]) == key]
        steps, seconds, flops = (float(np.mean([r[name] for r in runs])) for name in ("steps", "seconds", "flops_step"))
        rate = f"{steps / seconds:.1f}" if seconds else "-"
        size = runs[0]["parameters"]
        title = ROWS[key[0]].title if key[0] in ROWS else key[0]
        size = f"{size / 1e6:.1f} M" if size >= 1e5 else str(size)
        work = f"{flops / 1e9:.0f}" if flops else "-"
        lines.append([title, key[1], *cells, str(len(figures[key])), f"{steps:.0f}", rate, size, work])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def difference(ours: dict[str, dict], other: dict[str, dict], column: tuple[str, str]) -> tuple[float, float, int, int]:
    """(mean, half of its 95 % interval by Student's t, people for whom ours is ahead, people) of ours - other."""
    people = sorted(set(ours) & set(other))
    apart = np.array([ours[person][column] - other[person][column] for person in people])
    count = len(apart)
    half = math.nan if count < 2 else float(stats.t.ppf(0.975, count - 1) * apart.std(ddof=1) / math.sqrt(count))
    return float(apart.mean()), half, int((apart > 0).sum()), count


def comparison(results: list[dict]) -> str:
    """Markdown: ours as the preset samples minus each row as it is, paired by person; empty without ours."""
    figures = by_person(results)
    ours = next((key for key in (("ours", AS_PRESET), ("ours", "1")) if key in figures), None)
    if ours is None:
        return ""
    names = [" ".join(column) for column in COMPARED]
    lines = [["ours minus", *names], ["---", *["---:"] * len(names)]]
    for key, people in figures.items():
        if key[0] == ours[0] or key[1] not in ("1", "-", "25"):
            continue
        cells = []
        for column in COMPARED:
            mean, half, wins, count = difference(figures[ours], people, column)
            cells.append(f"{mean:+.2f} ± {half:.2f} ({wins}/{count})" if count > 1 else f"{mean:+.2f}")
        lines.append([ROWS[key[0]].title if key[0] in ROWS else key[0], *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _kind(split: str) -> str:
    """What a table says of the split: its folds stand in one."""
    if split.startswith("without "):
        return "leave one person out"
    _, fold, count = split.partition(" of ")
    return f"{count} folds of people" if fold else split


def tables(results: list[dict]) -> str:
    """All tables of a file of results: one a task, split kind and budget."""
    kinds: dict[tuple, list[dict]] = defaultdict(list)
    for result in results:
        kind = _kind(result["split"])
        apart = (result.get("looks", 0), result.get("common", ""))
        kinds[result["task"], kind, result["minutes"], result["image_size"], result["device"], apart].append(result)
    parts = []
    for (task, kind, minutes, size, device, (looks, common)), some in kinds.items():
        first = some[0]
        seeds = len({result["seed"] for result in some})
        head = f"### {task}, {kind}, {size} x {size}, {minutes:g} minutes, {seeds} seed{'s' * (seeds > 1)}"
        about = (device, f"{first['threads']} threads", first["dtype"], f"torch {first['torch']}", first["date"])
        more = [f"best of {looks} checkpoints by the validation person"] * (looks > 0) + [common] * bool(common)
        parts.append(f"{head}\n\n{', '.join((*about, *more))}, commit {first['commit']}")
        parts.append(table(some))
        if paired := comparison(some):
            parts.append("Ours (one step, the preset's detail) minus the others (one step), person by person: mean ± "
                         f"half of the 95 % interval (people for whom ours is ahead).\n\n{paired}")  # fmt: skip
        if TASKS[task].plumbing:
            parts.append(PLUMBING)
    return "\n\n".join([*parts, CAPTION])
