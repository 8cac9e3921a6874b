"""What each component of the method is worth: the paper's Table II by one command. Read it downward.

Every row is a training of its own with the same budget, people and seed, in a run folder of its own, so a table
that was interrupted goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .config import Config, build_config
from .data import discover
from .errors import USAGE, PhmdiffError
from .evaluate import evaluate
from .files import whole_file, write_json
from .generate import load
from .progress import say
from .report import format_table, markdown_table
from .run_folder import read_facts, read_split
from .train import train

MMD_WEIGHT = 0.05  # of the full model, where the settings leave the cross-granularity loss out
PROTOCOLS = ("phmdiff-slice", "brain")
TITLES = {
    "full": "full method",
    "no-pyramid": "without pyramid",
    "no-masking": "without masking",
    "no-diffusion": "without diffusion (one regression step)",
    "no-transformer": "without transformer (convolutions)",
    "no-cgr": "without cross-granularity loss",
}


def _full(tables: dict) -> None:
    tables["train"]["mmd_weight"] = tables["train"]["mmd_weight"] or MMD_WEIGHT


def _no_pyramid(tables: dict) -> None:
    tables["model"]["levels"] = tables["model"]["levels"][:1]


def _no_masking(tables: dict) -> None:
    for level in tables["model"]["levels"]:
        level["mask_ratio"] = 0.0


def _no_diffusion(tables: dict) -> None:
    # At t = T - 1 the state, scaled by sqrt(abar) = 0.006, holds no image: what is left is a regression.
    tables["model"] |= {"prediction": "x0", "scale_state": True, "learn_variance": False}
    tables["train"]["last_t_share"] = 1.0
    tables["sample"] |= {"steps": 1, "sampler": "ddim"}


def _no_transformer(tables: dict) -> None:
    tables["model"] |= {"denoiser": "convolutions", "decoder_input": "noisy", "reading": "maskdit",
                        "coarse": "predicted"}  # fmt: skip


def _no_cgr(tables: dict) -> None:
    tables["train"]["mmd_weight"] = 0.0


CHANGES: dict[str, Callable[[dict], None]] = {
    "full": lambda tables: None, "no-pyramid": _no_pyramid, "no-masking": _no_masking, "no-diffusion": _no_diffusion,
    "no-transformer": _no_transformer, "no-cgr": _no_cgr,
}  # fmt: skip


def settings_of(row: str, config: Config) -> Config:
    """The settings of a row: those given with all five components on, and the row's one taken away.

    Raises PhmdiffError (exit 2) for an unknown row, and where the settings given do without a component already.
    """
    if row not in CHANGES:
        raise PhmdiffError("ABLATE_ROW", f"unknown row {row!r}", f"known: {', '.join(CHANGES)}", exit_code=USAGE)
    model, lacking = config.model, None
    if len(model.levels) < 2:
        lacking = "one level only"
    elif not any(level.mask_ratio for level in model.levels) or config.train.finetune_share == 1:
        lacking = "no masking"
    elif config.train.last_t_share == 1:
        lacking = "no timestep but the last"
    elif model.denoiser != "transformer":
        lacking = "no transformer"
    if lacking:
        raise PhmdiffError("ABLATE_SETTINGS", f"the settings have {lacking}: nothing is left to take away",
                           "give settings with all components", exit_code=USAGE)  # fmt: skip
    tables = config.model_dump(exclude_none=True, mode="json")
    _full(tables)
    CHANGES[row](tables)
    return build_config("xs", tables)


def ablate(
    data_path, out, config: Config, *, rows=tuple(CHANGES), split_file=None, fold: tuple[int, int] | None = None,
    part: str = "test", progress: bool = True,
) -> list[dict]:  # fmt: skip
    """Train and score every row; returns the table's rows as ``evaluate --json`` has them.

    data_path, config, split_file, fold : as of ``train``; out : folder of one run folder a row, table.json and
    table.md; rows : names of ``CHANGES``; part : whom to score, "test" or "val" of the split, which is that of the
    first row for all of them, as is the number of members.
    Raises PhmdiffError as ``train`` and ``evaluate`` do, and (exit 2) for an unknown row.
    """
    out = Path(out)
    configs = {row: settings_of(row, config) for row in rows}  # all of them before the first training
    cohort, table, subjects = discover(data_path), [], {}
    for number, (row, settings) in enumerate(configs.items(), 1):
        say(f"{number}/{len(configs)} {TITLES[row]}")
        if number > 1:  # a row whose steps are cheaper has no more members for it: one component is taken away, no two
            settings = _with_members(settings, read_facts(out / rows[0], configs[rows[0]])["members"])
        train(data_path, out / row, settings, split_file=split_file, fold=fold, progress=progress)
        if split_file is None and fold is None:  # drawn for the first row, the same for all
            split_file = out / row / "split.json"
        run = load(out / row)
        scores = evaluate(run, data_path, settings.sample, protocols=PROTOCOLS, part=part)
        table += [{**figures, "method": row} for figures in scores.rows]
        subjects[row] = {"steps": run.found.step, "seconds": run.found.manifest["seconds"],
                         "scores": scores.values["ours"]}  # fmt: skip
    named = [{**figures, "method": TITLES[figures["method"]]} for figures in table]
    about = _about(config, read_split(out / rows[0])[part], cohort, part, subjects)
    write_json(out / "table.json", {"rows": table, "runs": subjects})
    with whole_file(out / "table.md") as file:
        file.write(f"{markdown_table(named)}\n\n{about}\n".encode())
    say(f"{format_table(named)}\n\n{about}\ntables: {out / 'table.md'}, {out / 'table.json'}")
    return table


def _with_members(config: Config, members: int) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update={"members": members})})


def _about(config: Config, people: list[str], cohort, part: str, runs: dict) -> str:
    """What the table is of, in one paragraph."""
    steps = ", ".join(f"{TITLES[row]} {facts['steps']}" for row, facts in runs.items())
    seconds = max(facts["seconds"] for facts in runs.values())
    return (
        f"{'+'.join(config.data.sources)} -> {config.data.target}, {config.data.image_size} x "
        f"{config.data.image_size}, {part} people {', '.join(s for s in people if s in cohort.files)}; "
        f"{seconds:.0f} s of training a row, seed {config.train.seed}. Training steps: {steps}."
    )
