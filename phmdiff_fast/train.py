"""Training, from a cohort on disk to a run folder (``run_folder`` says what is in it). Read it downward."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import __version__, data, pictures
from .checkpoint_writer import Writer
from .config import Config
from .device import deterministic, pick_device
from .distributed import Alone, Together, is_several, refuse_share
from .errors import NONFINITE, USAGE, PhmdiffError
from .files import LOCK, locked
from .guards import is_out_of_memory, out_of_memory
from .held_out import held_out
from .loader import Loader
from .progress import say, share_bar
from .run_folder import Log, Status, read_log, start_folder, status_name
from .signals import StopRequest
from .trainer import Trainer

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
        made_here = ranks.first and not out.exists()
        cohort, split, resumed = None, {}, False
        if ranks.first:  # the others do what there is to do after it, so that an error is told once
            refuse_share(tc.batch_size, ranks.world)
            cohort = data.discover(data_path)
            split, resumed = start_folder(out, config, cohort, split_file, fold)
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(out))
        trainer = Trainer(out, config, ranks, device)
        try:
            split = trainer.set_up(data_path, cohort, split, resumed, progress)
            trainer.resume(resume)
            _run(trainer, split, progress)
        except BaseException as problem:
            trainer.status.failed(problem)
            if made_here and not (out / "run.json").exists():
                _remove_start(out)
            raise
        return out


def _remove_start(out: Path) -> None:
    """A run that never began leaves no folder that was not there before; a slice cache that is whole is kept."""
    for name in (status_name(0), LOCK, "config.toml", "split.json"):
        (out / name).unlink(missing_ok=True)
    for folder in (out / "cache", out):
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()


def _run(trainer: Trainer, split: dict, progress: bool) -> None:
    """Train until the budget is used up or somebody asks to stop."""
    config, tc, ranks, out = trainer.config, trainer.config.train, trainer.ranks, trainer.out
    budget = Budget(tc.steps, tc.minutes * 60 if tc.minutes else None)
    if budget.share(trainer.step, trainer.before) >= 1:
        if ranks.first:
            say(f"{out} already has its {trainer.step} steps; give a larger budget to train on")
        return trainer.status.say("finished", step=trainer.step, exit_code=0)
    with ranks.busy():
        watched = held_out(trainer.cache, split, config, trainer.device) if ranks.first else None
    begun = time.monotonic()
    first_step, elapsed, last_saved = trainer.step, trainer.before, trainer.before
    pending: list[tuple[int, str, Tensor]] = []  # (step, stage, loss and whether not finite) not looked at yet

    def look() -> None:
        """Losses are read here: on a GPU that waits for it, so not at every step."""
        for (step, stage, _), (loss, bad) in zip(pending, _numbers(pending), strict=True):
            if bad:
                trainer.refuse_nonfinite(step, stage == "masked")
            if tc.on_spike == "warn" and (why := trainer.spikes.sees(loss, stage)) and ranks.first:
                say(f"{why}, at step {step} (--on-spike skip, rollback or stop would do more than say so)")
        pending.clear()

    def write_checkpoint(psnr: float | None = None) -> None:
        look()
        if trainer.step == trainer.written:
            return
        trainer.written = trainer.step
        trainer.status.say("training", step=trainer.step)
        facts = {"seconds": elapsed, "version": __version__, "val_psnr": psnr, "config": config.fixed(),
                 "spikes": trainer.spikes.state()}  # fmt: skip
        writer.save(trainer.step, trainer.groups(), facts)

    def save() -> None:
        """Validation figure and pictures of the averaged weights, and a checkpoint."""
        psnr = None
        if ranks.first:
            with ranks.busy():
                trainer.ema.swap()
                psnr = watched.look(trainer.model.eval(), trainer.device, trainer.dtype, out / "pictures", trainer.step)
                trainer.ema.swap()
            trainer.model.train()
            log.write({"step": trainer.step, "seconds": round(elapsed, 3), "val_psnr": psnr})
            say(f"step {trainer.step}, {elapsed:.0f} s: {watched.who}s {psnr:.2f} dB (lookup table "
                f"{watched.reference:.2f}); picture {out / 'pictures' / f'step-{trainer.step:08d}.png'}")  # fmt: skip
        write_checkpoint(psnr)
        if ranks.first:
            with ranks.busy():
                pictures.curves(out / "pictures" / "curves.png", read_log(out / "log.jsonl"),
                                reference={"lookup table": watched.reference})  # fmt: skip

    with contextlib.ExitStack() as stack:
        log = stack.enter_context(Log(out / "log.jsonl", trainer.step)) if ranks.first else None
        meter = stack.enter_context(share_bar("training", progress and ranks.first))
        stop = stack.enter_context(StopRequest(quiet=not ranks.first))
        loader = stack.enter_context(
            Loader(trainer.cache, trainer.rows_at, first=trainer.step, workers=tc.workers, timeout=tc.worker_timeout)
        )
        writer = stack.enter_context(
            Writer(out / "checkpoints", keep=tc.keep, rank=ranks.rank, world=ranks.world, token=ranks.token,
                   timeout=tc.peer_timeout, written=log and log.written)
        )  # fmt: skip
        trainer.status.say("training", step=trainer.step)
        if searches_memory(trainer.device) and tc.micro_batch is None:
            trainer.find_micro_batch(loader)
        while True:
            # --- what all processes agree on before a step
            now = trainer.before + time.monotonic() - begun
            failed = writer.problem.exit_code if writer.problem else 0
            asked, elapsed, failed = ranks.max(stop.asked or 0, now if ranks.first else 0.0, failed)
            if failed:
                if writer.problem:
                    raise writer.problem
                writer.abandon()  # what waits for the other's share
                raise PhmdiffError("PEER_FAILED", "another process cannot write its share of a checkpoint",
                                   "see its line", exit_code=int(failed))  # fmt: skip
            share = budget.share(trainer.step, elapsed)
            if asked or share >= 1:
                break

            # --- gradients
            masked = share < 1 - tc.finetune_share
            stage = "masked" if masked else "unmasked"
            rows = trainer.rows_at(trainer.step)
            try:
                terms = trainer.gradients(loader.batch(trainer.step), rows, trainer.step, masked)
            except Exception as problem:
                if is_out_of_memory(problem):
                    raise out_of_memory(trainer.micro, f"memory ran out at step {trainer.step}") from None
                raise
            ranks.average([p.grad for p in trainer.model.parameters() if p.grad is not None] + [terms.total])

            # --- update, unless the loss jumps and that is not to be taken
            why = None
            if tc.on_spike != "warn" and math.isfinite(loss := float(terms.total)):
                why = trainer.spikes.sees(loss, stage)
            if why and tc.on_spike == "stop":
                raise PhmdiffError("LOSS_SPIKE", f"{why} at step {trainer.step}, slices {rows.tolist()}",
                                   "look at these slices, or lower train.lr", exit_code=NONFINITE)  # fmt: skip
            if why and tc.on_spike == "rollback" and trainer.step not in trainer.spikes.left_out:
                writer.wait()
                trainer.go_back(log, why)
                continue
            if why or trainer.step in trainer.spikes.left_out:
                if ranks.first:
                    say(f"{why or 'a step gone back from'}: step {trainer.step} is left out")
            else:
                bad = trainer.update(terms, share)
                pending.append((trainer.step, stage, torch.stack([terms.total.float(), bad])))
            trainer.step += 1
            logs = trainer.step % LOG_EVERY == 0 or trainer.step == 1
            if logs or trainer.device.type == "cpu":
                look()

            # --- what people see, and checkpoints
            if logs and ranks.first:
                rate = (trainer.step - first_step) * tc.batch_size / (time.monotonic() - begun)
                record = {"step": trainer.step, "seconds": round(elapsed, 3), "loss": float(terms.total),
                          "denoise": terms.denoise.tolist(), "mmd": terms.mmd.tolist(),
                          **({"vlb": terms.vlb.tolist()} if config.model.learn_variance else {}),
                          "lr": trainer.optimizer.param_groups[0]["lr"], "images_per_s": round(rate, 2),
                          "stage": stage}  # fmt: skip
                log.write(record)
                meter.note(f"step {trainer.step}, {rate:.0f} images/s, loss {record['loss']:.4f}")
            meter.at(share)
            if elapsed - last_saved > tc.checkpoint_every:
                save()
                last_saved = elapsed
            elif tc.checkpoint_steps and trainer.step % tc.checkpoint_steps == 0 and trainer.step != tc.steps:
                write_checkpoint()
        if asked:  # somebody waits, perhaps with seconds to give: the weights, and no pictures
            write_checkpoint()
        else:
            save()
        writer.wait()
        ranks.max(0.0)  # nobody leaves before all is written
        ranks.part()
    trainer.status.say(
        "stopped" if asked else "finished", step=trainer.step, exit_code=128 + int(asked) if asked else 0
    )
    if asked and ranks.first:
        say(f"stopped at step {trainer.step}; the same command goes on from there")
    stop.end(int(asked))
    if ranks.first:
        where = f"{trainer.device.type}, {str(trainer.dtype)[6:]}"
        say(f"{trainer.step} steps in {elapsed:.0f} s on {where}; run folder {out}")


def _numbers(pending: list) -> list[list[float]]:
    return torch.stack([pair for _, _, pair in pending]).tolist() if pending else []


def searches_memory(device: torch.device) -> bool:
    """Only a GPU says that its memory is full; main memory is promised first, and the process killed later."""
    return device.type == "cuda"
