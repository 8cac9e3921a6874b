"""How every rival is trained, for the same wall-clock on the same batches, and how it is asked."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.rivals.base import Rival
from phmdiff_fast import attention, blocks
from phmdiff_fast.augment import manner
from phmdiff_fast.baselines import training_batch
from phmdiff_fast.cache import SliceCache
from phmdiff_fast.config import DataConfig, TrainConfig
from phmdiff_fast.device import autocast, kept_memory
from phmdiff_fast.loader import Resident


@dataclass(frozen=True)
class Trained:
    """What a training came to.

    best, best_step, best_state : the highest finite figure a look gave, after how many steps, and the state dict
    then, on the CPU; None without one. flops_step : FLOP of products and convolutions, mean over the steps taken.
    """

    steps: int
    seconds: float
    best: float | None
    best_step: int | None
    best_state: dict[str, Tensor] | None
    flops_step: float


class Clock:
    """Seconds since it was made, without those it was paused for."""

    def __init__(self, device: torch.device):
        self.device, self.away, self.begun = device, 0.0, time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self.begun - self.away

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._wait()  # what is queued belongs to the training
        before = time.monotonic()
        try:
            yield
        finally:
            self._wait()
            self.away += time.monotonic() - before

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def step_flops(rival: Rival, config: TrainConfig, channels: int, size: int, device: torch.device) -> list[int]:
    """FLOP of a training step an image (S, S), before the first and after each of the rival's ``turns``.

    Counted by torch as it runs a copy: forward and backward of products and convolutions, a multiply-add is 2. The
    gradient by the image, which nobody takes, is not in it.
    """
    image = torch.rand(1, channels + 1, size, size, device=device) * 2 - 1
    found = []
    for share in (0.0, *rival.turns):
        trial = copy.deepcopy(rival)
        trial.begin(config)
        trial.step(image[:, 1:], image[:, :1], share, 0)  # the first one at a turn does more
        # It cannot look into our operations: plain blocks, and attention as products.
        plain = mock.patch.object(blocks, "serves", return_value=False)
        with plain, attention.use("products"), FlopCounterMode(display=False) as counter:
            trial.step(image[:, 1:], image[:, :1], share, 1)
        found.append(counter.get_total_flops())
    return found


TRIAL_UNTIMED, TRIAL_TIMED = 4, 7  # steps


def _seconds_a_step(rival: Rival, batch_at: Callable[[int], tuple], config: TrainConfig, device, dtype) -> float:
    """Median of some steps of a copy that is thrown away."""
    trial, took = copy.deepcopy(rival), []
    trial.begin(config)
    for step in range(TRIAL_UNTIMED + TRIAL_TIMED):
        clock = Clock(device)
        with autocast(device, dtype):
            trial.step(*batch_at(step), 0.0, step)
        with clock.paused():
            took.append(clock.seconds())
    return float(np.median(took[TRIAL_UNTIMED:]))


@contextmanager
def _batches(cache, rows, config: TrainConfig, device, how: dict) -> Iterator[Callable[[int], tuple[Tensor, Tensor]]]:
    """step -> sources and target of it, augmented; the slices lie where our own trainer keeps them."""
    with Resident(cache, rows, None, device) if config.data_device == "cuda" else nullcontext() as resident:
        yield lambda step: training_batch(cache, rows, config, step, device, how, resident)


def train_rival(
    rival: Rival, cache: SliceCache, rows: np.ndarray, config: TrainConfig, seconds: float, device: torch.device,
    dtype: torch.dtype, *, data: DataConfig, steps: int | None = None, look: Callable[[Rival], float] | None = None,
    looks: int = 10, progress: Callable[[float], None] | None = None,
) -> Trained:  # fmt: skip
    """Train for ``seconds`` of wall-clock, or for exactly ``steps`` steps, on the batches of ``train_unet``.

    rows : training rows of the cache; data : what its channels are; dtype : of the products (``autocast``)
    look : a figure of the rival as it is, higher is better, asked for ``looks`` times evenly over the budget, the
           last time at the end; its time does not count. The rival itself keeps its last weights.
    ``progress(share)`` is called after each step. The weights are the caller's: seed before making the rival.
    """
    if steps is None and not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    if (steps is not None and steps < 1) or looks < 1:
        raise ValueError(f"steps {steps} and looks {looks} must be positive")
    rival.to(device).train()
    with _batches(cache, rows, config, device, manner(data)) as batch_at:
        if rival.plans:
            with kept_memory(device):
                count = steps or seconds / _seconds_a_step(rival, batch_at, config, device, dtype)
            rival.plan(count * config.batch_size / len(rows))
        kinds = step_flops(rival, config, data.source_channels, data.image_size, device)
        taken = [0] * len(kinds)  # steps of each kind
        best = best_step = best_state = None

        def take_look() -> None:
            nonlocal best, best_step, best_state
            with clock.paused():
                found = float(look(rival.eval()))
                rival.train()
                if math.isfinite(found) and (best is None or found > best):
                    best, best_step = found, step
                    best_state = {name: value.detach().cpu().clone() for name, value in rival.state_dict().items()}

        step, share, due = 0, 0.0, 1
        torch.manual_seed(config.seed)
        rival.begin(config)
        with kept_memory(device):  # as our own trainer: without it a CPU's convolutions take twice as long
            clock = Clock(device)
            while share < 1:
                with autocast(device, dtype):
                    rival.step(*batch_at(step), share, step)
                taken[sum(share >= turn for turn in rival.turns)] += 1
                step += 1
                share = clock.seconds() / seconds if steps is None else step / steps
                if progress is not None:
                    progress(min(1.0, share))
                if look is not None and due / looks <= share < 1:
                    take_look()
                    while due / looks <= share:  # a long step may have passed several
                        due += 1
            with clock.paused():
                used = clock.seconds()
            rival.end()
            if look is not None:
                take_look()
        rival.eval()
        flops = config.batch_size * sum(n * kind for n, kind in zip(taken, kinds, strict=True)) / step
        return Trained(step, used, best, best_step, best_state, flops)


def rival_predict(rival: Rival, sources: np.ndarray, device, dtype, batch_size: int = 32) -> np.ndarray:
    """sources (Z, Cs, S, S) in [-1, 1] -> (Z, S, S) float32, clamped to [-1, 1]."""
    made = []
    for start in range(0, len(sources), batch_size):
        part = torch.from_numpy(np.ascontiguousarray(sources[start : start + batch_size])).to(device)
        with autocast(device, dtype):
            made.append(rival.translate(part)[:, 0].float().clamp(-1, 1).cpu().numpy())
    return np.concatenate(made)
