"""Training, from a cohort on disk to a run folder. Read it downward.

RUN/ config.toml  run.json (version, subjects, scalings, mask ratios)  split.json
     cache/  log.jsonl  checkpoints/step-N/
     pictures/step-N.png  pictures/levels-N.png  pictures/curves.png
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from . import __version__, checkpoint, data, pictures
from .augment import augment, manner
from .cache import SliceCache, batch_rows
from .check import check_cohort
from .config import Config, load_toml
from .device import autocast, pick_device, pick_precision
from .ema import EMA
from .errors import NONFINITE, USAGE, DataErrors, PhmdiffError
from .files import LOCK, locked, write_json
from .held_out import as_tensors, held_out, rows_of, spaced
from .masking import level_complexity
from .phmdiff import PHMDiff
from .progress import bar, say, share_bar
from .signals import StopRequest

LOG_EVERY = 10


@dataclass
class Budget:
    """How far a training is, in [0, 1]: by steps, or by seconds of wall-clock."""

    steps: int | None
    seconds: float | None

    def share(self, step: int, seconds: float) -> float:
        parts = [step / self.steps] if self.steps else []
        parts += [seconds / self.seconds] if self.seconds else []
        return max(parts)


def learning_rate(config, step: int, share: float) -> float:
    """Linear warm-up over ``warmup_steps``, then a cosine over the budget down to min_lr_ratio."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    return config.lr * warm * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


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


def refuse_bad_cohort(cohort: data.Cohort, config: Config, subjects: list[str], progress: bool) -> None:
    """Read everything that will be trained on; raise DataErrors naming all that is wrong."""
    with bar(len(subjects), "checking", progress) as meter:
        report = check_cohort(
            cohort, contrasts=[*config.data.sources, config.data.target], subjects=subjects,
            progress=lambda *_: meter.update(),
        )  # fmt: skip
    if report.problems:
        raise DataErrors(report.problems)


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
    refuse_bad_cohort(cohort, config, [*subjects, *split["test"]], progress)
    with bar(len(subjects), "preparing", progress) as meter:
        return SliceCache.build(out / "cache", cohort, subjects, config.data, progress=lambda *_: meter.update())


def measure_complexity(cache: SliceCache, rows: np.ndarray, levels: int) -> list[float]:
    """c_n of III.B.1 over the training foreground (targets of at most 256 slices)."""
    batch = cache.batch(spaced(rows, 256))
    return level_complexity(torch.from_numpy(batch["target"]), torch.from_numpy(batch["foreground"]), levels)


def read_log(path: Path) -> list[dict]:
    """The records of a log.jsonl; a last line cut off by a crash is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def start_folder(out: Path, config: Config, cohort: data.Cohort, split_file, fold) -> tuple[Config, dict, bool]:
    """(config, split, resumed): a new run folder, or what an existing one was begun with."""
    if (out / "run.json").exists():
        begun = Config.model_validate(load_toml(out / "config.toml"))
        differing = [
            f"{table}.{key}"
            for table in ("data", "model", "train")
            for key, value in getattr(config, table).model_dump().items()
            if value != getattr(begun, table).model_dump()[key] and key not in ("minutes", "steps", "device", "keep")
        ]
        if differing:
            what = f"was begun with another {', '.join(differing)}"
            raise PhmdiffError("RUN_DIFFERS", what, "give the same settings to go on, or another --out",
                               exit_code=USAGE, file=out)  # fmt: skip
        split = json.loads((out / "split.json").read_text())
        asked = split_file is not None or fold is not None
        if asked and prepare_split(cohort, config, split_file, fold) != split:
            cure = "give the same --split or --fold, or another --out"
            raise PhmdiffError("RUN_DIFFERS", "was begun with another split", cure, exit_code=USAGE, file=out)
        return config, split, True
    if out.exists() and (not out.is_dir() or any(path.name != LOCK for path in out.iterdir())):
        raise PhmdiffError("OUTPUT_EXISTS", "exists and is no run folder", "choose another --out",
                           exit_code=USAGE, file=out)  # fmt: skip
    return config, prepare_split(cohort, config, split_file, fold), False


def train(
    data_path, out, config: Config, *, split_file=None, fold: tuple[int, int] | None = None, progress: bool = True
) -> Path:
    """Train a run, or go on with one from its newest checkpoint; returns the run folder.

    data_path : cohort folder or CSV list; out : run folder; config : all settings, with
    ``train.minutes`` or ``train.steps`` set; split_file or fold (i, k): who is in training, validation and
    test, else drawn from the seed. Raises PhmdiffError (2 settings, 3 data, 4 checkpoint,
    5 non-finite loss, 74 disk). Ctrl-C (KeyboardInterrupt) and SIGTERM (SystemExit 143) stop it at the end of a
    step, with a checkpoint; a second Ctrl-C at once.
    """
    # --- settings, data, split
    out, tc = Path(out), config.train
    if tc.minutes is None and tc.steps is None:
        raise PhmdiffError("NO_BUDGET", "neither --minutes nor --steps is given", "give one", exit_code=USAGE)
    device = pick_device(tc.device)
    dtype = pick_precision(tc.precision, device)
    cohort = data.discover(data_path)
    config, split, resumed = start_folder(out, config, cohort, split_file, fold)
    made_here = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        try:
            return _train(data_path, out, cohort, config, split, resumed, device, dtype, progress)
        except BaseException:
            if made_here and not (out / "run.json").exists():  # nothing half-written: it never held a run
                (out / LOCK).unlink(missing_ok=True)
                for leftover in (out / "cache", out):
                    if leftover.is_dir() and not any(leftover.iterdir()):
                        leftover.rmdir()
            raise


def _train(data_path, out: Path, cohort, config: Config, split, resumed: bool, device, dtype, progress: bool) -> Path:
    """``train`` in a folder that is ours."""
    tc = config.train
    checkpoint.remove_leftovers(out / "checkpoints")
    cache = open_cache(out, cohort, config, split, progress)
    train_rows = rows_of(cache, split["train"])
    if len(train_rows) < tc.batch_size:
        raise PhmdiffError("TOO_FEW_SLICES", f"{len(train_rows)} training slices for a batch of {tc.batch_size}",
                           "lower train.batch_size or add subjects", file=str(data_path))  # fmt: skip

    # --- model, optimizer, average
    torch.manual_seed(tc.seed)  # initial weights; all later randomness is counter-based
    if resumed:
        facts = json.loads((out / "run.json").read_text())
    else:
        facts = {
            "version": __version__,
            "sources": config.data.sources,
            "target": config.data.target,
            "units": cache.units(config.data.target),
            "complexity": measure_complexity(cache, train_rows, len(config.model.levels)),
            "median_p995": cache.median_p995(config.data.target),
            "slices": len(train_rows),
        }
    model = PHMDiff(config.model, config.data.source_channels, 1, facts["complexity"]).to(device)
    facts["mask_ratios"] = model.ratios
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=tc.lr, betas=tc.betas, weight_decay=tc.weight_decay, fused=True
    )
    ema = EMA(model, tc.ema)
    watched = held_out(cache, split, config, device)
    how = manner(config.data)

    # --- state: newest checkpoint, or step 0
    step, before = 0, 0.0
    latest = checkpoint.newest(out / "checkpoints", warn=lambda line: say(f"{line} An older one is used."))
    if latest is not None:
        model.load_state_dict(latest.tensors("model", device))
        ema.load_state_dict(latest.tensors("ema", device))
        checkpoint.load_optimizer(optimizer, model, latest.tensors("optimizer", device))
        step, before = latest.step, float(latest.manifest["seconds"])
        say(f"going on from step {step} of {out}")
    (out / "config.toml").write_text(config.to_toml())
    write_json(out / "split.json", split)
    write_json(out / "run.json", facts)
    (out / "pictures").mkdir(exist_ok=True)

    budget = Budget(tc.steps, tc.minutes * 60 if tc.minutes else None)
    if budget.share(step, before) >= 1:
        say(f"{out} already has its {step} steps; give a larger budget to train on")
        return out

    # --- the loop
    begun = last_saved = time.monotonic()
    first_step = step

    def seconds() -> float:
        return before + time.monotonic() - begun

    def write_checkpoint(psnr: float | None) -> None:
        groups = {"model": model.state_dict(), "ema": ema.state_dict(),
                  "optimizer": checkpoint.optimizer_tensors(optimizer, model)}  # fmt: skip
        checkpoint.save(out / "checkpoints", step, groups,
                        {"seconds": seconds(), "version": __version__, "val_psnr": psnr}, keep=tc.keep)  # fmt: skip

    def save() -> None:
        """Validation figure and pictures of the averaged weights, and a checkpoint."""
        ema.swap()
        psnr = watched.look(model.eval(), device, dtype, out / "pictures", step)
        ema.swap()
        model.train()
        log.write(json.dumps({"step": step, "seconds": round(seconds(), 3), "val_psnr": psnr}) + "\n")
        picture = out / "pictures" / f"step-{step:08d}.png"
        say(f"step {step}, {seconds():.0f} s: {watched.who}s {psnr:.2f} dB "
            f"(lookup table {watched.reference:.2f}); picture {picture}")  # fmt: skip
        write_checkpoint(psnr)
        pictures.curves(out / "pictures" / "curves.png", read_log(out / "log.jsonl"),
                        reference={"lookup table": watched.reference})  # fmt: skip

    log = open(out / "log.jsonl", "a", buffering=1)  # noqa: SIM115 (closed by the with)
    with log, share_bar("training", progress) as meter, StopRequest() as stop:
        while (share := budget.share(step, seconds())) < 1 and not stop.asked:
            masked = share < 1 - tc.finetune_share
            rng = (tc.seed, step)
            rows = train_rows[batch_rows(len(train_rows), tc.batch_size, seed=tc.seed, step=step)]
            sample_ids = torch.from_numpy(rows).to(device)
            sources, target, inside = as_tensors(cache, rows, device)
            sources, target, inside = augment(sources, target, sample_ids, rng, tc, foreground=inside, **how)

            with autocast(device, dtype):
                terms = model.loss(target, sources, sample_ids, rng, tc, masked=masked, foreground=inside)
            optimizer.zero_grad(set_to_none=True)
            terms.total.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), tc.grad_clip)
            # On a GPU reading the norm waits for the step, so it is read only when a line is logged.
            reads = device.type == "cpu" or step % LOG_EVERY == 0
            if reads and not math.isfinite(float(norm)):
                raise PhmdiffError("NONFINITE", f"gradient is not finite at step {step}, slices {rows.tolist()}",
                                   "lower train.lr, or look at these slices", exit_code=NONFINITE)  # fmt: skip
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(tc, step, share)
            optimizer.step()
            ema.update(step)
            step += 1

            if step % LOG_EVERY == 0 or step == 1:
                rate = (step - first_step) * tc.batch_size / (time.monotonic() - begun)
                record = {"step": step, "seconds": round(seconds(), 3), "loss": float(terms.total.detach()),
                          "denoise": terms.denoise.tolist(), "mmd": terms.mmd.tolist(),
                          **({"vlb": terms.vlb.tolist()} if config.model.learn_variance else {}),
                          "lr": optimizer.param_groups[0]["lr"], "images_per_s": round(rate, 2),
                          "stage": "masked" if masked else "unmasked"}  # fmt: skip
                log.write(json.dumps(record) + "\n")
                meter.note(f"step {step}, {rate:.0f} images/s, loss {record['loss']:.4f}")
            meter.at(budget.share(step, seconds()))
            if time.monotonic() - last_saved > tc.checkpoint_every:
                save()
                last_saved = time.monotonic()
        if stop.asked:  # somebody waits, perhaps with seconds to give: the weights, and no pictures
            write_checkpoint(None)
            say(f"stopped at step {step}; the same command goes on from there")
        else:
            save()
    stop.end()
    say(f"{step} steps in {seconds():.0f} s on {device.type}, {str(dtype)[6:]}; run folder {out}")
    return out
