"""The state of a training and one step of it; ``train`` is the loop around it."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import torch

from . import __version__, checkpoint, data
from .attention import describe
from .cache import SliceCache, batch_rows
from .config import Config
from .device import pick_precision
from .distributed import Alone
from .errors import CHECKPOINT, DATA, NONFINITE, PhmdiffError
from .files import remove_unfinished, write_json
from .flops import Flops, step_flops
from .guards import ROLLBACKS, Spikes, fitting
from .held_out import rows_of, spaced, subject_of
from .loader import NAMES, Loader
from .masking import level_complexity, num_kept
from .parallel import wrap
from .phmdiff import PHMDiff
from .progress import say
from .run_folder import Log, Status, begin, open_cache, read_facts, read_split
from .step import Step

PASSES = 90  # over the training slices, after which a member learns its people by heart (docs/LOG.md)
MOST_AUTOMATIC = 8
UNTIMED, TIMED = 4, 5  # steps, of each stage
LATER_WARMUP = 0.01  # of a member's own part of the budget, where it is not the first: nobody keeps its first step


def learning_rate(config, step: int, share: float) -> float:
    """Linear warm-up over ``warmup_steps``, then a cosine over the budget down to min_lr_ratio."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    return config.lr * warm * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def members_for(passes: float) -> int:
    """Members for a budget of so many passes over the training slices (docs/LOG.md, "better than a U-Net")."""
    return max(1, min(round(passes / PASSES), MOST_AUTOMATIC))


def measure_complexity(cache: SliceCache, rows: np.ndarray, levels: int) -> list[float]:
    """c_n of III.B.1 over the training foreground (targets of at most 256 slices)."""
    batch = cache.batch(spaced(rows, 256))
    return level_complexity(torch.from_numpy(batch["target"]), torch.from_numpy(batch["foreground"]), levels)


def batch_of(cache: SliceCache, rows: np.ndarray) -> list[torch.Tensor]:
    """What ``Step.inputs`` takes of cache rows (B,) int64, in its order."""
    batch = cache.batch(rows, fine=True)
    return [torch.from_numpy(batch[name]) for name in NAMES]


class Trainer:
    """The state of a training, and its steps."""

    def __init__(self, out: Path, config: Config, ranks: Alone, device: torch.device, teacher=None):
        self.teacher = teacher  # ``distill.Teacher``, or None
        self.out, self.config, self.ranks, self.device = out, config, ranks, device
        self.dtype = pick_precision(config.train.precision, device)
        self.status = Status(out, ranks.rank, ranks.world)
        self.step, self.before = 0, 0.0  # steps made; seconds trained before this start
        self.written = -1  # the step of the last checkpoint
        self.spikes = Spikes()
        self.micro = config.train.micro_batch or config.train.batch_size // ranks.world
        self.work: Step | None = None

    # --- set-up

    def set_up(self, data_path, cohort, split, resumed: bool, progress: bool) -> dict:
        """Cache, facts, model, optimizer and average; the folder is a run afterwards."""
        config, tc, out = self.config, self.config.train, self.out
        if self.ranks.first:
            self.status.say("starting")
            with self.ranks.busy():
                cache, facts = self._begin(data_path, cohort, split, resumed, progress)
        self.ranks.max(0.0)  # the others wait until that is there
        if not self.ranks.first:
            self.status.say("starting")
            cohort, split, facts = data.discover(data_path), read_split(out), read_facts(out, config)
            cache = SliceCache.open(out / "cache", cohort, [*split["train"], *split["val"]], config.data)
        torch.manual_seed(tc.seed)  # initial weights; all later randomness is counter-based
        complexity = facts["complexity"]
        model = PHMDiff(config.model, config.data.source_channels, 1, complexity, members=facts["members"])
        if self.teacher is not None:
            model.net.load_state_dict(self.teacher.weights())
        self.together = wrap(model, self.ranks, tc.parallel, self.device, self.dtype)
        self.work = Step(self.together, config, self.device, self.dtype, self.teacher)
        self.model = self.work.model
        self.optimizer, self.ema = self.work.optimizer, self.work.ema
        self.cache, self.train_rows = cache, rows_of(cache, split["train"])
        return split

    def _begin(self, data_path, cohort, split, resumed: bool, progress: bool) -> tuple[SliceCache, dict]:
        """What is done once, by the first process: clear up, read and check the cohort, write what a run has."""
        config, out, batch = self.config, self.out, self.config.train.batch_size
        remove_unfinished(out)
        checkpoint.remove_leftovers(out / "checkpoints")
        cache = open_cache(out, cohort, config, split, progress)
        rows = rows_of(cache, split["train"])
        if len(rows) < batch:
            raise PhmdiffError("TOO_FEW_SLICES", f"{len(rows)} training slices for a batch of {batch}",
                               "lower train.batch_size or add subjects", exit_code=DATA,
                               file=str(data_path))  # fmt: skip
        facts = read_facts(out, config) if resumed else self._facts(cache, rows)
        self._refuse_other_teacher(facts)
        begin(out, config, split, facts)
        return cache, facts

    def _refuse_other_teacher(self, facts: dict) -> None:
        before, now = facts.get("teacher"), self.teacher and self.teacher.digest
        if before == now:
            return
        what = "was distilled from another run, or from this one at another step"
        if now is None:
            what = "was distilled from a run"
        elif before is None:
            what = "was begun without a teacher"
        raise PhmdiffError("TEACHER_DIFFERS", what, "go on as it was begun, or choose another --out",
                           exit_code=CHECKPOINT, file=self.out)  # fmt: skip

    def _facts(self, cache: SliceCache, rows: np.ndarray) -> dict:
        config = self.config
        complexity = measure_complexity(cache, rows, len(config.model.levels))
        ratios = PHMDiff(config.model, config.data.source_channels, 1, complexity).ratios
        return {
            "version": __version__,
            "members": config.model.members or self._members(cache, rows, complexity),
            "sources": config.data.sources,
            "target": config.data.target,
            "units": cache.units(config.data.target),
            "complexity": complexity,
            "median_p995": cache.median_p995(config.data.target),
            "slices": len(rows),
            "mask_ratios": ratios,
            **({"teacher": self.teacher.digest} if self.teacher else {}),
        }

    def _members(self, cache: SliceCache, rows: np.ndarray, complexity: list[float]) -> int:
        """How many members the budget has room for; with minutes some steps are taken to see how long one is."""
        tc = self.config.train
        if tc.parallel == "fsdp":  # for networks that do not fit: one is enough
            return 1
        steps = tc.steps or math.inf
        if tc.minutes is not None:
            steps = min(steps, 60 * tc.minutes / self._seconds_a_step(cache, rows, complexity))
        passes = steps * tc.batch_size / len(rows)
        members = members_for(passes)
        if members > 1:
            say(f"{members} members, one after the other: the budget is about {passes:.0f} passes over {len(rows)} "
                "slices (model.members sets their number)")  # fmt: skip
        return members

    def _seconds_a_step(self, cache: SliceCache, rows: np.ndarray, complexity: list[float]) -> float:
        """Of this process' share of a batch, masked and unmasked in their shares, by a model that is thrown away."""
        tc, count = self.config.train, self.config.train.batch_size // self.ranks.world
        model = PHMDiff(self.config.model, self.config.data.source_channels, 1, complexity, members=1)
        work = Step(wrap(model, Alone(), "ddp", self.device, self.dtype), self.config, self.device, self.dtype)
        ids = rows[np.arange(count) % len(rows)]
        batch = batch_of(cache, ids)
        took = {}
        for masked in (True, False):
            each = []
            for step in range(UNTIMED + TIMED):
                begun = time.perf_counter()
                work.whole(work.inputs(batch, ids[None], step), masked, self.micro, 0.0, step)
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                each.append(time.perf_counter() - begun)
            took[masked] = float(np.median(each[UNTIMED:]))
        return (1 - tc.finetune_share) * took[True] + tc.finetune_share * took[False]

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
            with self.ranks.busy():
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
        # Where the weights are shared out, no device need hold them whole.
        where = "cpu" if self.together.shared else self.device
        model, ema, optimizer = (self.together.shard(latest.tensors(n, where)) for n in ("model", "ema", "optimizer"))
        self.model.load_state_dict(model)
        self.ema.load_state_dict(ema)
        checkpoint.load_optimizer(self.optimizer, self.model, optimizer)
        if self.work is not None:
            self.work.forget()
        self.spikes.load(latest.manifest.get("spikes", {}))
        self.step = self.written = latest.step

    # --- a step

    def everybody_at(self, step: int) -> np.ndarray:
        """Rows (W, B / W) int64 of the batch of a step, a row of it a process."""
        tc = self.config.train
        rows = batch_rows(len(self.train_rows), tc.batch_size, seed=tc.seed, step=step)
        return self.train_rows[rows].reshape(self.ranks.world, -1)

    def rows_at(self, step: int) -> np.ndarray:
        """This process' rows (B / W,) int64 of the batch of a step."""
        return self.everybody_at(step)[self.ranks.rank]

    def inputs(self, batch, step: int) -> list:
        """What ``Step`` is given of a batch."""
        return self.work.inputs(batch, self.everybody_at(step), step)

    def turn(self, share: float) -> float:
        """Whose turn it is, ``share`` of the whole budget used; the share of that member's own part."""
        members = len(self.model.nets)
        active = min(int(share * members), members - 1)
        self.model.active = active
        self.ema.follow(self.model.nets[active])
        self.model.usable = members if share >= 1 else max(1, active)
        return share * members - active

    def rate(self, share: float) -> float:
        """The learning rate of this step, ``share`` of the member's part of the budget used."""
        rate = learning_rate(self.config.train, self.step, share)
        return rate * min(1.0, share / LATER_WARMUP) if self.model.active else rate

    def flops(self, masked: bool) -> Flops:
        """Of this process' share of a step."""
        images = self.config.train.batch_size // self.ranks.world
        data = self.config.data
        return step_flops(self.config.model, data.source_channels, data.image_size, images, masked, self.model.ratios)

    def how(self) -> str:
        """The line of a start that says what the steps run on."""
        config, tc, model = self.config.model, self.config.train, self.model
        side = -(-self.config.data.image_size // model.multiple) * model.multiple // config.patch
        tokens = [(side >> n) ** 2 for n in range(model.num_levels)]
        kept = tuple(num_kept(number, ratio) for number, ratio in zip(tokens, model.ratios, strict=True))
        lengths = kept if config.coarse == "teacher" else kept[:1]
        attention = describe(self.device, self.dtype, config.width // config.heads, lengths, tc.attention)
        parts = [attention]
        parts += ["blocks compiled"] if self.work.compiled else []
        parts += ["steps replayed as CUDA graphs"] if self.work.replays else []
        parts += [f"{self.ranks.world} processes ({tc.parallel})"] if self.ranks.world > 1 else []
        return "; ".join(parts)

    def find_micro_batch(self, loader: Loader) -> None:
        """Fewer images at a time where a step of the unmasked stage, the largest, does not fit into the memory."""
        inputs = self.inputs(loader.batch(self.step), self.step)

        def attempt(images: int) -> None:
            self.micro = images
            self.work.gradients(inputs, masked=False, micro=images, alone=True)

        fits = fitting(attempt, self.micro)
        self.micro = -int(self.ranks.max(-fits)[0])  # the smallest of all processes
        self.optimizer.zero_grad(set_to_none=True)
        if self.ranks.first and self.micro < len(inputs[0]):
            say(f"{self.micro} of {len(inputs[0])} images at a time fit into memory")

    def refuse_nonfinite(self, step: int, masked: bool) -> None:
        """Find the slices whose loss is not finite, write down all that repeats the step, and raise NONFINITE."""
        tc, ranks = self.config.train, self.ranks
        shares = self.everybody_at(step)
        everybody, mine = shares.ravel(), shares[ranks.rank]
        wrong = np.zeros(len(everybody))
        for i in range(len(mine)):
            batch = batch_of(self.cache, mine[i : i + 1])
            with torch.no_grad():
                inputs = self.work.inputs(batch, shares[:, i : i + 1], step)
                finite = math.isfinite(float(self.work.loss(*inputs, masked, alone=True).total))
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
