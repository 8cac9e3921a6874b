"""Training, from a cohort on disk to a run folder (``run_folder`` says what is in it). Read it downward."""

from __future__ import annotations

import contextlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import __version__, checkpoint, data, pictures
from .augment import augment, manner
from .cache import SliceCache, batch_rows
from .checkpoint_writer import Writer
from .config import Config
from .device import autocast, deterministic, pick_device, pick_precision
from .distributed import Alone, Together, is_several, refuse_share
from .ema import EMA
from .errors import CHECKPOINT, DATA, NONFINITE, USAGE, PhmdiffError
from .files import locked, remove_unfinished, write_json
from .guards import ROLLBACKS, Spikes, fitting, is_out_of_memory, out_of_memory
from .held_out import held_out, rows_of, spaced, subject_of
from .loader import NAMES, Loader
from .masking import level_complexity
from .phmdiff import LossTerms, PHMDiff
from .progress import say, share_bar
from .run_folder import Log, Status, begin, open_cache, prepare_split, read_log, start_folder
from .signals import StopRequest

__all__ = ["learning_rate", "prepare_split", "read_log", "train"]
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


def measure_complexity(cache: SliceCache, rows: np.ndarray, levels: int) -> list[float]:
    """c_n of III.B.1 over the training foreground (targets of at most 256 slices)."""
    batch = cache.batch(spaced(rows, 256))
    return level_complexity(torch.from_numpy(batch["target"]), torch.from_numpy(batch["foreground"]), levels)


def train(
    data_path, out, config: Config, *, split_file=None, fold: tuple[int, int] | None = None, resume=None,
    progress: bool = True,
) -> Path:  # fmt: skip
    """Train a run, or go on with one from its newest checkpoint; returns the run folder.

    data_path : cohort folder or CSV list; out : run folder; config : all settings, with
    ``train.minutes`` or ``train.steps`` set; split_file or fold (i, k): who is in training, validation and
    test, else drawn from the seed; resume : the checkpoint to go on from (step, name or path), else the newest that
    is whole. Under torchrun every process calls this and takes its share of each batch.

    Raises PhmdiffError (2 settings, 3 data, 4 checkpoint, 5 non-finite loss or a jump of it, 6 memory, 7 a process
    of several is lost, 74 disk). Ctrl-C (KeyboardInterrupt) and SIGTERM (SystemExit 143) stop it at the end of a
    step, with a checkpoint; a second Ctrl-C at once.
    """
    out, tc = Path(out), config.train
    if tc.minutes is None and tc.steps is None:
        raise PhmdiffError("NO_BUDGET", "neither --minutes nor --steps is given", "give one", exit_code=USAGE)
    if tc.deterministic and tc.minutes is not None:
        raise PhmdiffError("USAGE", "--deterministic does not go with --minutes, whose schedule follows the clock",
                           "give --steps", exit_code=USAGE)  # fmt: skip
    device = pick_device(tc.device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(deterministic(tc.deterministic))
        ranks: Alone = Alone()
        if is_several():
            ended = lambda line, code: Status(out, ranks.rank, ranks.world).ended(line, code)  # noqa: E731
            ranks = stack.enter_context(Together(device, timeout=tc.peer_timeout, ending=lambda *how: ended(*how)))
        refuse_share(tc.batch_size, ranks.world)
        made_here = ranks.first and not out.exists()
        cohort = data.discover(data_path)
        split, resumed = start_folder(out, config, cohort, split_file, fold) if ranks.first else ({}, False)
        if ranks.first:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(out))
        training = _Training(out, config, ranks, device)
        try:
            split = training.set_up(data_path, cohort, split, resumed, progress)
            training.resume(resume)
            training.run(split, progress)
        except BaseException as problem:
            training.status.failed(problem)
            if made_here and not (out / "run.json").exists():
                _remove_start(out)
            raise
        return out


def _remove_start(out: Path) -> None:
    """A run that never began leaves no folder that was not there before, or only what is not ours."""
    for path in (out / "status.json", out / ".lock", out / "config.toml", out / "split.json"):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        out.rmdir()


class _Training:
    """The state of a training, and its steps."""

    def __init__(self, out: Path, config: Config, ranks: Alone, device: torch.device):
        self.out, self.config, self.ranks, self.device = out, config, ranks, device
        self.dtype = pick_precision(config.train.precision, device)
        self.status = Status(out, ranks.rank, ranks.world)
        self.step, self.before = 0, 0.0  # steps made; seconds trained before this start
        self.written = -1  # the step of the last checkpoint
        self.spikes = Spikes()
        self.micro = config.train.micro_batch or config.train.batch_size // ranks.world

    # --- set-up

    def set_up(self, data_path, cohort, split, resumed: bool, progress: bool) -> dict:
        """Cache, facts, model, optimizer and average; the folder is a run afterwards."""
        config, tc, out = self.config, self.config.train, self.out
        if self.ranks.first:
            self.status.say("starting")
            remove_unfinished(out)
            checkpoint.remove_leftovers(out / "checkpoints")
            cache = open_cache(out, cohort, config, split, progress)
            rows = rows_of(cache, split["train"])
            if len(rows) < tc.batch_size:
                what = f"{len(rows)} training slices for a batch of {tc.batch_size}"
                raise PhmdiffError("TOO_FEW_SLICES", what, "lower train.batch_size or add subjects", exit_code=DATA,
                                   file=str(data_path))  # fmt: skip
            facts = json.loads((out / "run.json").read_text()) if resumed else self._facts(cache, rows)
            begin(out, config, split, facts)
        self.ranks.max(0.0)  # the others wait until that is there
        if not self.ranks.first:
            split, facts = (json.loads((out / name).read_text()) for name in ("split.json", "run.json"))
            cache = SliceCache.open(out / "cache", cohort, [*split["train"], *split["val"]], config.data)
            self.status.say("starting")
        torch.manual_seed(tc.seed)  # initial weights; all later randomness is counter-based
        complexity = facts["complexity"]
        self.model = PHMDiff(config.model, config.data.source_channels, 1, complexity).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=tc.lr, betas=tc.betas, weight_decay=tc.weight_decay, fused=True
        )
        self.ema = EMA(self.model, tc.ema)
        self.how = manner(config.data)
        self.cache, self.train_rows = cache, rows_of(cache, split["train"])
        return split

    def _facts(self, cache: SliceCache, rows: np.ndarray) -> dict:
        config = self.config
        complexity = measure_complexity(cache, rows, len(config.model.levels))
        ratios = PHMDiff(config.model, config.data.source_channels, 1, complexity).ratios
        return {
            "version": __version__,
            "sources": config.data.sources,
            "target": config.data.target,
            "units": cache.units(config.data.target),
            "complexity": complexity,
            "median_p995": cache.median_p995(config.data.target),
            "slices": len(rows),
            "mask_ratios": ratios,
        }

    def resume(self, which) -> None:
        """Take the state of the checkpoint asked for, else of the newest that is whole; none: step 0."""
        latest = self.newest(which)
        if latest is None:
            return
        self.load(latest)
        self.before = float(latest.manifest["seconds"])
        if self.ranks.first:
            folder = self.out / "checkpoints"
            for moved in checkpoint.set_aside(folder, latest.step) if which is not None else ():
                say(f"a later checkpoint is set aside as {moved}")
            say(f"going on from step {self.step} of {self.out}")

    def newest(self, which=None) -> checkpoint.Checkpoint | None:
        """The checkpoint asked for, else the newest that is whole; the first process looks, all are told."""
        text = ""
        if self.ranks.first:
            folder = self.out / "checkpoints"
            if which is not None:
                latest = checkpoint.named(folder, which)
            else:
                latest = checkpoint.newest(folder, warn=lambda line: say(f"{line} An older one is used."))
            if latest is None and checkpoint.found(folder):
                raise PhmdiffError("NO_CHECKPOINT", "holds no checkpoint that is whole",
                                   "remove its checkpoints to begin again, or choose another --out",
                                   exit_code=CHECKPOINT, file=self.out)  # fmt: skip
            if latest is not None:
                latest.refuse_other(self.config, self.model.state_dict())
                text = json.dumps([str(latest.folder), latest.step, latest.manifest])
        text = self.ranks.tell(text)
        if not text:
            return None
        path, step, manifest = json.loads(text)
        return checkpoint.Checkpoint(Path(path), step, manifest)

    # --- state

    def groups(self) -> checkpoint.Groups:
        return {"model": self.model.state_dict(), "ema": self.ema.state_dict(),
                "optimizer": checkpoint.optimizer_tensors(self.optimizer, self.model)}  # fmt: skip

    def load(self, latest: checkpoint.Checkpoint) -> None:
        self.model.load_state_dict(latest.tensors("model", self.device))
        self.ema.load_state_dict(latest.tensors("ema", self.device))
        checkpoint.load_optimizer(self.optimizer, self.model, latest.tensors("optimizer", self.device))
        self.spikes.load(latest.manifest.get("spikes", {}))
        self.step = self.written = latest.step

    # --- a step

    def rows_at(self, step: int) -> np.ndarray:
        """This process' rows (B / world,) int64 of the batch of a step."""
        tc = self.config.train
        rows = batch_rows(len(self.train_rows), tc.batch_size, seed=tc.seed, step=step)
        return self.train_rows[np.split(rows, self.ranks.world)[self.ranks.rank]]

    def loss(self, batch, rows: np.ndarray, step: int, masked: bool) -> LossTerms:
        tc, rng = self.config.train, (self.config.train.seed, step)
        sample_ids = torch.from_numpy(rows).to(self.device)
        sources, target, inside = (part.to(self.device) for part in batch)
        sources, target, inside = augment(sources, target, sample_ids, rng, tc, foreground=inside, **self.how)
        with autocast(self.device, self.dtype):
            return self.model.loss(target, sources, sample_ids, rng, tc, masked=masked, foreground=inside)

    def gradients(self, batch, rows: np.ndarray, step: int, masked: bool) -> LossTerms:
        """Gradients of this process' share of a step, ``micro`` images at a time."""
        self.optimizer.zero_grad(set_to_none=True)
        parts = []
        for at in range(0, len(rows), self.micro):
            here = slice(at, at + self.micro)
            weight = len(rows[here]) / len(rows)
            terms = self.loss([part[here] for part in batch], rows[here], step, masked)
            (terms.total if weight == 1 else terms.total * weight).backward()
            parts.append([value.detach() * weight for value in (terms.total, terms.denoise, terms.mmd, terms.vlb)])
        return LossTerms(*(sum(values[1:], values[0]) for values in zip(*parts, strict=True)))

    def find_micro_batch(self, loader: Loader) -> None:
        """Fewer images at a time where a step of the unmasked stage, the largest, does not fit into the memory."""
        rows, batch = self.rows_at(self.step), loader.batch(self.step)

        def attempt(images: int) -> None:
            self.micro = images
            self.gradients(batch, rows, self.step, masked=False)

        fits = fitting(attempt, self.micro)
        self.micro = -int(self.ranks.max(-fits)[0])  # the smallest of all processes
        self.optimizer.zero_grad(set_to_none=True)
        if self.ranks.first and self.micro < len(rows):
            say(f"{self.micro} of {len(rows)} images at a time fit into memory")

    def update(self, terms: LossTerms, share: float) -> Tensor:
        """Clip and step, unless a gradient is not finite; 1 where it was not, else 0."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.grad_clip)
        bad = (~(torch.isfinite(norm) & torch.isfinite(terms.total))).float()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.train, self.step, share)
        # The fused step leaves everything as it is where this is 1: no wait for the GPU is needed to be sure of it.
        self.optimizer.found_inf = bad
        self.optimizer.step()
        self.ema.update(self.step)
        return bad

    def refuse_nonfinite(self, step: int, masked: bool) -> None:
        """Find the slices whose loss is not finite, write down all that repeats the step, and raise NONFINITE."""
        tc, ranks = self.config.train, self.ranks
        everybody = self.train_rows[batch_rows(len(self.train_rows), tc.batch_size, seed=tc.seed, step=step)]
        mine = self.rows_at(step)
        wrong = np.zeros(len(everybody))
        for i in range(len(mine)):
            batch = [torch.from_numpy(self.cache.batch(mine[i : i + 1])[name]) for name in NAMES]
            with torch.no_grad():
                finite = math.isfinite(float(self.loss(batch, mine[i : i + 1], step, masked).total))
            wrong[ranks.rank * len(mine) + i] = not finite
        found = [int(row) for row, bad in zip(everybody, ranks.max(*wrong), strict=True) if bad]
        file = self.out / f"nonfinite-{step:08d}.json"
        if ranks.first:
            facts = {"step": step, "rng": {"seed": tc.seed, "step": step}, "masked": masked, "processes": ranks.world,
                     "slices": [{"slice": int(row), "subject": subject_of(self.cache, row)} for row in everybody],
                     "loss_not_finite": found}  # fmt: skip
            write_json(file, facts)
        who = ", ".join(f"{row} of {subject_of(self.cache, row)!r}" for row in (found or everybody.tolist())[:8])
        what = f"loss or gradient is not finite at step {step}, slices {who}; the weights are those before it"
        raise PhmdiffError("NONFINITE", what, "look at these slices, or lower train.lr", exit_code=NONFINITE, file=file)

    def go_back(self, log: Log | None, why: str) -> None:
        """To the last checkpoint; the step that made it necessary is left out when it comes again."""
        spikes = self.spikes
        left_out, rollbacks = {*spikes.left_out, self.step}, spikes.rollbacks + 1
        if rollbacks > ROLLBACKS:
            raise PhmdiffError("LOSS_SPIKE", f"{why} at step {self.step}, after {ROLLBACKS} steps back",
                               "lower train.lr, or look at the data", exit_code=NONFINITE)  # fmt: skip
        latest = self.newest()
        if latest is None:
            spikes.left_out = left_out  # nothing to go back to: the step alone is left out
            return
        self.load(latest)
        spikes.left_out, spikes.rollbacks = left_out, rollbacks
        if log is not None:
            log.go_back(self.step)
            say(f"{why}: back to step {self.step}")

    # --- the loop

    def run(self, split: dict, progress: bool) -> None:
        """Train until the budget is used up or somebody asks to stop."""
        config, tc, ranks, out = self.config, self.config.train, self.ranks, self.out
        budget = Budget(tc.steps, tc.minutes * 60 if tc.minutes else None)
        if budget.share(self.step, self.before) >= 1:
            if ranks.first:
                say(f"{out} already has its {self.step} steps; give a larger budget to train on")
            return self.status.say("finished", step=self.step, exit_code=0)
        watched = held_out(self.cache, split, config, self.device) if ranks.first else None
        begun = time.monotonic()
        first_step, elapsed, last_saved = self.step, self.before, self.before
        pending: list[tuple[int, str, Tensor]] = []  # (step, stage, loss and whether not finite) not looked at yet

        def look() -> None:
            """Losses are read here: on a GPU that waits for it, so not at every step."""
            for (step, stage, _), (loss, bad) in zip(pending, _numbers(pending), strict=True):
                if bad:
                    self.refuse_nonfinite(step, stage == "masked")
                if tc.on_spike == "warn" and (why := self.spikes.sees(loss, stage)) and ranks.first:
                    say(f"{why}, at step {step} (--on-spike skip, rollback or stop would do more than say so)")
            pending.clear()

        def write_checkpoint(psnr: float | None = None) -> None:
            look()
            if self.step == self.written:
                return
            self.written = self.step
            self.status.say("training", step=self.step)
            facts = {"seconds": elapsed, "version": __version__, "val_psnr": psnr, "config": config.fixed(),
                     "spikes": self.spikes.state()}  # fmt: skip
            writer.save(self.step, self.groups(), facts)

        def save() -> None:
            """Validation figure and pictures of the averaged weights, and a checkpoint."""
            psnr = None
            if ranks.first:
                self.ema.swap()
                psnr = watched.look(self.model.eval(), self.device, self.dtype, out / "pictures", self.step)
                self.ema.swap()
                self.model.train()
                log.write({"step": self.step, "seconds": round(elapsed, 3), "val_psnr": psnr})
                say(f"step {self.step}, {elapsed:.0f} s: {watched.who}s {psnr:.2f} dB (lookup table "
                    f"{watched.reference:.2f}); picture {out / 'pictures' / f'step-{self.step:08d}.png'}")  # fmt: skip
            write_checkpoint(psnr)
            if ranks.first:
                pictures.curves(out / "pictures" / "curves.png", read_log(out / "log.jsonl"),
                                reference={"lookup table": watched.reference})  # fmt: skip

        with contextlib.ExitStack() as stack:
            log = stack.enter_context(Log(out / "log.jsonl", self.step)) if ranks.first else None
            meter = stack.enter_context(share_bar("training", progress and ranks.first))
            stop = stack.enter_context(StopRequest(quiet=not ranks.first))
            loader = stack.enter_context(
                Loader(self.cache, self.rows_at, first=self.step, workers=tc.workers, timeout=tc.worker_timeout)
            )
            writer = stack.enter_context(
                Writer(out / "checkpoints", keep=tc.keep, rank=ranks.rank, world=ranks.world, token=ranks.token,
                       timeout=tc.peer_timeout, written=log and log.written)
            )  # fmt: skip
            self.status.say("training", step=self.step)
            if searches_memory(self.device) and tc.micro_batch is None:
                self.find_micro_batch(loader)
            while True:
                # --- what all processes agree on before a step
                now = self.before + time.monotonic() - begun
                failed = writer.problem.exit_code if writer.problem else 0
                asked, elapsed, failed = ranks.max(stop.asked or 0, now if ranks.first else 0.0, failed)
                if failed:
                    if writer.problem:
                        raise writer.problem
                    writer.abandon()  # what waits for the other's share
                    raise PhmdiffError("PEER_FAILED", "another process cannot write its share of a checkpoint",
                                       "see its line", exit_code=int(failed))  # fmt: skip
                share = budget.share(self.step, elapsed)
                if asked or share >= 1:
                    break

                # --- gradients
                masked = share < 1 - tc.finetune_share
                stage = "masked" if masked else "unmasked"
                rows = self.rows_at(self.step)
                try:
                    terms = self.gradients(loader.batch(self.step), rows, self.step, masked)
                except Exception as problem:
                    if is_out_of_memory(problem):
                        raise out_of_memory(self.micro, f"memory ran out at step {self.step}") from None
                    raise
                ranks.average([p.grad for p in self.model.parameters() if p.grad is not None] + [terms.total])

                # --- update, unless the loss jumps and that is not to be taken
                why = None
                if tc.on_spike != "warn" and math.isfinite(loss := float(terms.total)):
                    why = self.spikes.sees(loss, stage)
                if why and tc.on_spike == "stop":
                    raise PhmdiffError("LOSS_SPIKE", f"{why} at step {self.step}, slices {rows.tolist()}",
                                       "look at these slices, or lower train.lr", exit_code=NONFINITE)  # fmt: skip
                if why and tc.on_spike == "rollback" and self.step not in self.spikes.left_out:
                    writer.wait()
                    self.go_back(log, why)
                    continue
                if why or self.step in self.spikes.left_out:
                    if ranks.first:
                        say(f"{why or 'a step gone back from'}: step {self.step} is left out")
                else:
                    bad = self.update(terms, share)
                    pending.append((self.step, stage, torch.stack([terms.total.float(), bad])))
                self.step += 1
                logs = self.step % LOG_EVERY == 0 or self.step == 1
                if logs or self.device.type == "cpu":
                    look()

                # --- what people see, and checkpoints
                if logs and ranks.first:
                    rate = (self.step - first_step) * tc.batch_size / (time.monotonic() - begun)
                    record = {"step": self.step, "seconds": round(elapsed, 3), "loss": float(terms.total),
                              "denoise": terms.denoise.tolist(), "mmd": terms.mmd.tolist(),
                              **({"vlb": terms.vlb.tolist()} if config.model.learn_variance else {}),
                              "lr": self.optimizer.param_groups[0]["lr"], "images_per_s": round(rate, 2),
                              "stage": stage}  # fmt: skip
                    log.write(record)
                    meter.note(f"step {self.step}, {rate:.0f} images/s, loss {record['loss']:.4f}")
                meter.at(share)
                if elapsed - last_saved > tc.checkpoint_every:
                    save()
                    last_saved = elapsed
                elif tc.checkpoint_steps and self.step % tc.checkpoint_steps == 0 and self.step != tc.steps:
                    write_checkpoint()
            if asked:  # somebody waits, perhaps with seconds to give: the weights, and no pictures
                write_checkpoint()
            else:
                save()
            writer.wait()
            ranks.max(0.0)  # nobody leaves before all is written
        self.status.say("stopped" if asked else "finished", step=self.step, exit_code=128 + int(asked) if asked else 0)
        if asked and ranks.first:
            say(f"stopped at step {self.step}; the same command goes on from there")
        stop.end(int(asked))
        if ranks.first:
            say(f"{self.step} steps in {elapsed:.0f} s on {self.device.type}, {str(self.dtype)[6:]}; run folder {out}")


def _numbers(pending: list) -> list[list[float]]:
    return torch.stack([pair for _, _, pair in pending]).tolist() if pending else []


def searches_memory(device: torch.device) -> bool:
    """Only a GPU says that its memory is full; main memory is promised first, and the process killed later."""
    return device.type == "cuda"
