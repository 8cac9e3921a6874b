"""Faults put into a process of ``zygote`` before its command runs. Arguments are text."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import torch

from phmdiff_fast import cache, checkpoint, checkpoint_writer, held_out, phmdiff, run_folder, train, trainer
from phmdiff_fast import step as step_room


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(wanted: int, act):
    """Call ``act`` in the middle of a step: after its gradients, before its update."""
    real = step_room.Step.update

    def update(self, terms, lr, step):
        if step == wanted:
            act()
        return real(self, terms, lr, step)

    step_room.Step.update = update


MOMENTS = ("before_update", "copying", "half_a_shard", "before_manifest", "before_rename", "before_said", "pruning",
           "looking", "half_a_line")  # fmt: skip


def kill_at(moment: str, step: str) -> None:
    """End with SIGKILL at a moment of step or checkpoint ``step``."""
    step = int(step)
    if moment == "before_update":
        at_step(step, die)
    elif moment == "copying":
        real_save, real_copy, left = checkpoint_writer.Writer.save, checkpoint_writer.Writer._copy, [None]

        def save(self, at, *more):
            left[0] = 5 if at >= step else None
            real_save(self, at, *more)

        def copy(self, *more):
            if left[0] is not None:
                left[0] -= 1
                if left[0] == 0:
                    die()
            return real_copy(self, *more)

        checkpoint_writer.Writer.save, checkpoint_writer.Writer._copy = save, copy
    elif moment == "half_a_shard":
        real = checkpoint.write_tensors

        def write(path, *more):
            digest = real(path, *more)
            if f"step-{step:08d}" in str(path) and path.name.startswith("ema"):
                os.truncate(path, path.stat().st_size // 2)
                die()
            return digest

        checkpoint.write_tensors = write
    elif moment == "before_manifest":
        real = checkpoint._write_synced
        checkpoint._write_synced = lambda path, text: die() if f"step-{step:08d}" in str(path) else real(path, text)
    elif moment == "before_rename":
        real = checkpoint._sync  # of the temporary folder
        checkpoint._sync = lambda path: die() if f"step-{step:08d}" in path.name else real(path)
    elif moment == "before_said":
        real = run_folder.Log.written
        run_folder.Log.written = lambda self, at: die() if at >= step else real(self, at)
    elif moment == "pruning":
        real = checkpoint.shutil.rmtree

        def remove(path, **more):
            if "going" in str(path) and (Path(path).parent / f"step-{step:08d}").exists():
                os.unlink(Path(path) / "manifest.json")
                die()
            real(path, **more)

        checkpoint.shutil.rmtree = remove
    elif moment == "looking":
        held_out.HeldOut.look = lambda *_: die()
    elif moment == "half_a_line":
        real = run_folder.Log.write

        def half(self, record):
            if record["step"] >= step:
                self._file.write('{"step": 4, "lo')
                self._file.flush()
                die()
            real(self, record)

        run_folder.Log.write = half
    else:
        raise ValueError(moment)


def plain() -> None:
    """No pictures and no validation: they are most of a short training."""
    held_out.HeldOut.look = lambda *_: 20.0
    train.pictures.curves = lambda *_, **__: None


def trace(path: str) -> None:
    """Write down the number of steps made, after each."""
    real = step_room.Step.update

    def update(self, terms, lr, step):
        made = real(self, terms, lr, step)
        with open(path, "a") as file:
            file.write(f"{step + 1}\n")
        return made

    step_room.Step.update = update


def slow_start(seconds: str) -> None:
    """Reading the cohort takes so long, and so do the pictures."""
    real = trainer.open_cache

    def slowly(*given):
        time.sleep(float(seconds))
        return real(*given)

    trainer.open_cache = slowly
    held_out.HeldOut._draw = lambda *_: time.sleep(float(seconds))


def slow(seconds: str) -> None:
    """Every step takes at least so long."""
    real = step_room.Step.update

    def update(*given):
        time.sleep(float(seconds))
        return real(*given)

    step_room.Step.update = update


def signal_at(step: str, *numbers: str) -> None:
    at_step(int(step), lambda: [os.kill(os.getpid(), int(number)) for number in numbers])


def die_at(step: str) -> None:
    at_step(int(step), die)


def hang_at(step: str) -> None:
    at_step(int(step), lambda: time.sleep(3600))


def stop_at(step: str) -> None:
    """As a machine that stands still: not even its threads run."""
    at_step(int(step), lambda: os.kill(os.getpid(), signal.SIGSTOP))


def poison(row: str) -> None:
    """NaN in one slice of the cache, once the training has been set up."""
    real, bad, resume = cache.SliceCache.batch, int(row), trainer.Trainer.resume

    def batch(self, rows, *, fine=False):
        made = real(self, rows, fine=fine)
        made["target"][np.asarray(rows) == bad] = np.nan
        return made

    def then(self, which):
        resume(self, which)
        cache.SliceCache.batch = batch

    trainer.Trainer.resume = then


def no_space(step: str) -> None:
    """The disk is full when this checkpoint is written."""
    real = checkpoint.write_tensors

    def write(path, *more):
        if f"step-{int(step):08d}" in str(path):
            raise OSError(28, "No space left on device")
        return real(path, *more)

    checkpoint.write_tensors = write


def jump(*steps: str) -> None:
    """The loss of these steps is a thousand times too large."""
    real, wanted = phmdiff.PHMDiff.loss, {int(step) for step in steps}

    def loss(self, target, sources, ids, rng, *more, **others):
        terms = real(self, target, sources, ids, rng, *more, **others)
        if rng[1] in wanted:
            terms.total = terms.total * 1000
        return terms

    phmdiff.PHMDiff.loss = phmdiff.PHMDiff.forward = loss


def small_memory(images: str, from_step: str = "0") -> None:
    """A device that holds no more than so many images at a time."""
    real = phmdiff.PHMDiff.loss

    def loss(self, target, sources, ids, rng, *more, **others):
        if len(target) > int(images) and rng[1] >= int(from_step):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return real(self, target, sources, ids, rng, *more, **others)

    phmdiff.PHMDiff.loss = phmdiff.PHMDiff.forward = loss
    train.searches_memory = lambda device: True


def worker(what: str, step: str) -> None:
    """A loader's worker that is killed, hangs or raises when it reads the batch of ``step``."""
    from phmdiff_fast import loader

    real, parent = loader._Batches.__getitem__, os.getpid()

    def get(self, at):
        if at == int(step) and os.getpid() != parent:
            if what == "kill":
                die()
            elif what == "hang":
                time.sleep(3600)
            self.rows_at = lambda at: 1 / 0
        return real(self, at)

    loader._Batches.__getitem__ = get


def forget(state: str) -> None:
    """Resume without one part of the state; every one must show in the result."""
    real = trainer.Trainer.load

    def load(self, latest):
        fresh = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        real(self, latest)
        if state == "model":
            self.model.load_state_dict(fresh)
        elif state == "ema":
            for shadow, weight in zip(self.ema.shadow, self.model.parameters(), strict=True):
                shadow.copy_(weight.detach())
        elif state in ("exp_avg", "exp_avg_sq", "step"):
            for values in self.optimizer.state.values():
                values[state].zero_()
        elif state == "position":
            self.everybody_at = lambda step, rows=self.everybody_at, back=self.step: rows(step - back)
        elif state == "rng":
            real_loss, back = self.work.loss, self.step
            self.work.loss = lambda *given, **more: real_loss(*given[:4], given[4] - back, *given[5:], **more)
        elif state == "schedule":
            rate, back = trainer.learning_rate, self.step
            trainer.learning_rate = lambda config, step, share: rate(config, step - back, share)
        elif state == "spikes":
            self.spikes = type(self.spikes)()
        else:
            raise ValueError(state)

    trainer.Trainer.load = load
