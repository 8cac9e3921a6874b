"""Training, from a cohort on disk to a run folder (``run_folder`` says what is in it). Read it downward."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import __version__, attention, data, pictures
from .checkpoint_writer import Writer
from .config import Config
from .device import deterministic, kept_memory, pick_device, pick_precision
from .distributed import Alone, Together, is_several, refuse_share
from .errors import BACKEND, NONFINITE, USAGE, PhmdiffError
from .files import LOCK, locked
from .flops import best_peak
from .guards import is_out_of_memory, out_of_memory
from .held_out import held_out
from .loader import Loader, Resident
from .meters import Meter, line
from .profiling import Profile
from .progress import say, share_bar
from .run_folder import Log, Status, read_log, start_folder, status_name
from .signals import StopRequest
from .stages import Clock, listening, nvtx_if_asked, stage
from .trainer import Trainer

LOG_EVERY = 10
PROFILE_AFTER = 12  # steps: libraries have loaded, blocks are compiled, caches are filled
PEAK_AFTER = 20  # seconds of training from which a CPU's peak is worth its measuring


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
    progress: bool = True, profile: bool = False, teacher=None,
) -> Path:  # fmt: skip
    """Train a run, or go on with one from its newest checkpoint; returns the run folder.

    data_path : cohort folder or CSV list; out : run folder; config : all settings, with
    ``train.minutes`` or ``train.steps`` set; split_file or fold (i, k): who is in training, validation and
    test, else drawn from the seed; resume : the checkpoint to go on from (step, name or path), else the newest that
    is whole; profile : record a few steps (``profiling.py``) into out/profile; teacher : a ``distill.Teacher``, whose
    images are the targets and whose weights the first. Under torchrun every process calls this
    and takes its share of each batch.

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
    if tc.parallel == "fsdp" and config.model.members > 1:
        raise PhmdiffError("USAGE", "--parallel fsdp shares out one network, and the settings have several members",
                           "take --parallel ddp, or model.members=1", exit_code=USAGE)  # fmt: skip
    device = pick_device(tc.device)
    if tc.data_device == "cuda" and device.type != "cuda":
        raise PhmdiffError("NO_GPU", "--data-device cuda keeps the slices on a GPU, and the training runs on the CPU",
                           "leave it out", exit_code=BACKEND)  # fmt: skip
    _refuse_attention(config, device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(deterministic(tc.deterministic))
        stack.enter_context(kept_memory(device))
        stack.enter_context(attention.use(tc.attention))
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
        if profile:  # a replayed graph has no stages
            config = config.model_copy(update={"train": tc.model_copy(update={"cuda_graph": "off"})})
        trainer = Trainer(out, config, ranks, device, teacher)
        try:
            split = trainer.set_up(data_path, cohort, split, resumed, progress)
            trainer.resume(resume)
            _run(trainer, split, progress, profile)
        except BaseException as problem:
            trainer.status.failed(problem)
            if made_here and not (out / "run.json").exists():
                _remove_start(out)
            raise
        return out


def _refuse_attention(config: Config, device: torch.device) -> None:
    """Raise ATTENTION (exit 8) if the backend asked for cannot serve some layer, before anything is written."""
    model, dtype = config.model, pick_precision(config.train.precision, device)
    side = -(-config.data.image_size // (model.patch << (len(model.levels) - 1))) << (len(model.levels) - 1)
    lengths = tuple((side >> n) ** 2 for n in range(len(model.levels)))  # of the unmasked stage: the longest
    for width, heads in ((model.width, model.heads), (model.decoder_width, model.decoder_heads)):
        attention.choose(device, dtype, width // heads, lengths, config.train.attention)


def _remove_start(out: Path) -> None:
    """A run that never began leaves no folder that was not there before; a slice cache that is whole is kept."""
    for name in (status_name(0), LOCK, "config.toml", "split.json"):
        (out / name).unlink(missing_ok=True)
    for folder in (out / "cache", out):
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()


def _run(trainer: Trainer, split: dict, progress: bool, profiled: bool) -> None:
    """Train until the budget is used up or somebody asks to stop."""
    config, tc, ranks, out = trainer.config, trainer.config.train, trainer.ranks, trainer.out
    budget = Budget(tc.steps, tc.minutes * 60 if tc.minutes else None)
    if budget.share(trainer.step, trainer.before) >= 1:
        if ranks.first:
            say(f"{out} already has its {trainer.step} steps; give a larger budget to train on")
        return trainer.status.say("finished", step=trainer.step, exit_code=0)
    with ranks.busy():
        watched = held_out(trainer.cache, split, config, trainer.device, ranks)
    begun = time.monotonic()
    first_step, elapsed, last_saved = trainer.step, trainer.before, trainer.before
    pending: list[tuple[int, str, Tensor]] = []  # (step, stage, loss and whether not finite) not looked at yet
    clock = Clock(trainer.device)
    work = {masked: trainer.flops(masked) for masked in (True, False)}

    def look() -> None:
        """Losses are read here: on a GPU that waits for it, so not at every step."""
        for (step, part, _), (loss, bad) in zip(pending, _numbers(pending), strict=True):
            if bad:
                trainer.refuse_nonfinite(step, part.startswith("masked"))
            if tc.on_spike == "warn" and (why := trainer.spikes.sees(loss, part)) and ranks.first:
                say(f"{why}, at step {step} (--on-spike skip, rollback or stop would do more than say so)")
        pending.clear()

    def write_checkpoint(psnr: float | None = None) -> None:
        look()
        if trainer.step == trainer.written:
            return
        trainer.written = trainer.step
        trainer.status.say("training", step=trainer.step)
        facts = {"seconds": elapsed, "version": __version__, "val_psnr": psnr, "config": config.fixed(),
                 "members": trainer.model.usable, "spikes": trainer.spikes.state()}  # fmt: skip
        with figures.paused("checkpoint"):
            writer.save(trainer.step, trainer.together.full(trainer.groups()), facts)

    def save() -> None:
        """Validation figure and pictures of the averaged weights, and a checkpoint."""
        with figures.paused("look"):
            trainer.ema.swap()
            where = out / "pictures"
            psnr = watched.look(trainer.model.eval(), trainer.device, trainer.dtype, where, trainer.step, ranks)
            trainer.ema.swap()
            trainer.model.train()
        if ranks.first:
            log.write({"step": trainer.step, "seconds": round(elapsed, 3), "val_psnr": psnr})
            say(f"step {trainer.step}, {elapsed:.0f} s: {watched.who}s {psnr:.2f} dB (lookup table "
                f"{watched.reference:.2f}); picture {where / f'step-{trainer.step:08d}.png'}")  # fmt: skip
        write_checkpoint(psnr)
        if ranks.first:
            with ranks.busy(), figures.paused("look"):
                pictures.curves(out / "pictures" / "curves.png", read_log(out / "log.jsonl"),
                                reference={"lookup table": watched.reference})  # fmt: skip

    with contextlib.ExitStack() as stack:
        log = stack.enter_context(Log(out / "log.jsonl", trainer.step)) if ranks.first else None
        shown = stack.enter_context(share_bar("training", progress and ranks.first))
        stack.enter_context(listening(clock, nvtx_if_asked()))
        stop = stack.enter_context(StopRequest(quiet=not ranks.first))
        if tc.data_device == "cpu":
            how = dict(first=trainer.step, workers=tc.workers, timeout=tc.worker_timeout)
            loader = stack.enter_context(Loader(trainer.cache, trainer.rows_at, **how))
        else:
            with ranks.busy():
                slices = (trainer.cache, trainer.train_rows, trainer.rows_at, trainer.device)
                loader = stack.enter_context(Resident(*slices, progress=progress and ranks.first))
        writer = stack.enter_context(
            Writer(out / "checkpoints", keep=tc.keep, rank=ranks.rank, world=ranks.world, token=ranks.token,
                   timeout=tc.peer_timeout, written=log and log.written)
        )  # fmt: skip
        trainer.status.say("training", step=trainer.step)
        if searches_memory(trainer.device) and tc.micro_batch is None and (ranks.world == 1 or tc.parallel == "ddp"):
            trainer.find_micro_batch(loader)
        if ranks.first and progress:
            say(trainer.how())
        recorder = None
        if profiled and ranks.first:
            first = trainer.step + PROFILE_AFTER
            recorder = stack.enter_context(Profile(out / "profile", first, device=trainer.device))
        figures = Meter(trainer.device, clock=clock, world=ranks.world)
        told = False  # in the log, what it runs on
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
            own = trainer.turn(share)  # of the member's part of the budget; all of it, with one member
            if asked or share >= 1:
                break

            # --- the step
            if recorder is not None:
                with ranks.busy(), figures.paused("profile"):
                    recorder.at(trainer.step)
            masked = own < 1 - tc.finetune_share
            part, lr, why, bad = "masked" if masked else "unmasked", trainer.rate(own), None, None
            if len(trainer.model.nets) > 1:
                part = f"{part} {trainer.model.active + 1}"
            asked_for_data = time.monotonic()
            with stage("data"):
                inputs = trainer.inputs(loader.batch(trainer.step), trainer.step)
            waited = time.monotonic() - asked_for_data
            left_out = trainer.step in trainer.spikes.left_out
            try:
                if tc.on_spike == "warn" and not left_out:
                    terms, bad = trainer.work.whole(inputs, masked, trainer.micro, lr, trainer.step)
                else:
                    terms = trainer.work.gradients(inputs, masked, trainer.micro)
            except Exception as problem:
                if is_out_of_memory(problem):
                    raise out_of_memory(trainer.micro, f"memory ran out at step {trainer.step}") from None
                raise

            # --- its update, unless the loss jumps and that is not to be taken
            if bad is None:
                if tc.on_spike != "warn" and math.isfinite(loss := float(terms.total)):
                    why = trainer.spikes.sees(loss, part)
                if why and tc.on_spike == "stop":
                    rows = trainer.rows_at(trainer.step).tolist()
                    raise PhmdiffError("LOSS_SPIKE", f"{why} at step {trainer.step}, slices {rows}",
                                       "look at these slices, or lower train.lr", exit_code=NONFINITE)  # fmt: skip
                if why and tc.on_spike == "rollback" and not left_out:
                    writer.wait()
                    trainer.go_back(log, why)
                    continue
                if why or left_out:
                    if ranks.first:
                        say(f"{why or 'a step gone back from'}: step {trainer.step} is left out")
                else:
                    bad = trainer.work.update(terms, lr, trainer.step)
            if bad is not None:
                pending.append((trainer.step, part, torch.stack([terms.total.float(), bad])))
            trainer.step += 1
            figures.step(len(inputs[0]), work[masked].tokens, work[masked].training, waited)
            logs = trainer.step % LOG_EVERY == 0 or trainer.step == 1
            if logs or trainer.device.type == "cpu":
                with stage("read loss"):
                    look()

            # --- what people see, and checkpoints
            if logs and ranks.first:
                if figures.peak is None and (trainer.device.type == "cuda" or elapsed > PEAK_AFTER):
                    with figures.paused("profile"):
                        figures.peak = best_peak(trainer.device, trainer.dtype)
                record = {"step": trainer.step, "seconds": round(elapsed, 3), "loss": float(terms.total),
                          "denoise": terms.denoise.tolist(), "mmd": terms.mmd.tolist(),
                          **({"vlb": terms.vlb.tolist()} if config.model.learn_variance else {}),
                          "lr": lr, "stage": part, **figures.record()}  # fmt: skip
                if not told:
                    record["runs_on"] = trainer.how()
                    told = True
                log.write(record)
                shown.note(line(trainer.step, record, record["loss"]))
            shown.at(share)
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
    if ranks.first and progress and trainer.step > first_step:
        say(figures.summary_text())
    if ranks.first:
        where = f"{trainer.device.type}, {str(trainer.dtype)[6:]}"
        say(f"{trainer.step} steps in {elapsed:.0f} s on {where}; run folder {out}")


def _numbers(pending: list) -> list[list[float]]:
    return torch.stack([pair for _, _, pair in pending]).tolist() if pending else []


def searches_memory(device: torch.device) -> bool:
    """Only a GPU says that its memory is full; main memory is promised first, and the process killed later."""
    return device.type == "cuda"
