"""What keeps a training from going wrong unnoticed: a loss that jumps, numbers that are none, memory that is short."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable

import torch

from .errors import MEMORY, PhmdiffError

WINDOW, LEAST = 200, 50  # losses that a new one is compared with; none before there are LEAST
FACTOR = 10.0  # times the median absolute deviation
ROLLBACKS = 3  # in one run: after that the data are at fault, not the moment


class Spikes:
    """Losses of the last WINDOW steps, and whether a new one is far above them.

    A loss is a spike if it exceeds their median by more than FACTOR times their median absolute deviation (MAD, at
    least a hundredth of the median, so that a loss that hardly moves does not count). Spikes do not enter the
    window. A change of stage empties it.
    """

    def __init__(self):
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.stage: str | None = None
        self.left_out: set[int] = set()  # steps whose update is left out after a step back
        self.rollbacks = 0

    def sees(self, loss: float, stage: str) -> str | None:
        """Take a step's loss in; the words for what is wrong with it, or None."""
        if stage != self.stage:
            self.losses.clear()
            self.stage = stage
        if len(self.losses) >= LEAST:
            middle = statistics.median(self.losses)
            spread = statistics.median(abs(value - middle) for value in self.losses)
            if loss > middle + FACTOR * max(spread, abs(middle) / 100):
                return (
                    f"the loss is {loss:.4g}; the last {len(self.losses)} had the median {middle:.4g}, MAD {spread:.2g}"
                )
        self.losses.append(loss)
        return None

    def state(self) -> dict:
        """What a checkpoint keeps (JSON)."""
        return {"losses": list(self.losses), "stage": self.stage, "left_out": sorted(self.left_out),
                "rollbacks": self.rollbacks}  # fmt: skip

    def load(self, state: dict) -> None:
        self.losses = deque(state.get("losses", []), maxlen=WINDOW)
        self.stage, self.left_out = state.get("stage"), set(state.get("left_out", []))
        self.rollbacks = state.get("rollbacks", 0)


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether a device, or the main memory that torch takes, is full."""
    if isinstance(problem, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(problem, RuntimeError) and "not enough memory" in str(problem)


def out_of_memory(micro_batch: int, when: str) -> PhmdiffError:
    """The error of a training that does not fit, with what to try next."""
    cure = f"--set train.micro_batch={micro_batch // 2}" if micro_batch > 1 else "lower data.image_size or the model"
    return PhmdiffError("OUT_OF_MEMORY", f"{when} with {micro_batch} image(s) at a time", f"try {cure}",
                        exit_code=MEMORY)  # fmt: skip


def fitting(attempt: Callable[[int], None], batch: int) -> int:
    """The largest of batch, batch / 2, batch / 4 ... (rounded up) with which ``attempt(images)`` does not run out of
    memory. Raises OUT_OF_MEMORY (exit 6) if not even one image fits."""
    micro = batch
    while True:
        try:
            attempt(micro)
            return micro
        except Exception as problem:
            if not is_out_of_memory(problem):
                raise
        # Out of the except block, so that the traceback no longer holds the tensors that filled the memory.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if micro == 1:
            raise out_of_memory(1, "memory is too small for a step")
        micro = -(-micro // 2)
