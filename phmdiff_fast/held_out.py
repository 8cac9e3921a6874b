"""Slices nobody trains on: their figure and their pictures while a training goes on; rows and batches of a cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from . import pictures
from .baselines import LookupTable
from .cache import SliceCache
from .config import Config
from .device import autocast
from .distributed import Alone
from .phmdiff import PHMDiff
from .pyramid import build_pyramid

STRIP_SLICES, LEVEL_SLICES = 4, 2  # in the pictures
VALIDATION_SLICES = 64  # at most, evenly spaced, for the validation figure of a checkpoint
TABLE_SLICES = 512  # of the training people, evenly spaced, for the lookup table beside the figure
LOOK_BATCH = 16  # slices at a time, dealt to the processes in turn
VALIDATION_STEPS = 8  # at most, of the sampling steps asked for: a figure in between, not the evaluation


def rows_of(cache: SliceCache, subjects: list[str]) -> np.ndarray:
    """Row numbers (n,) int64 of some subjects' slices."""
    parts = [np.asarray(cache.rows_of(subject), dtype=np.int64) for subject in subjects]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def subject_of(cache: SliceCache, row: int) -> str:
    """Whose slice a row is."""
    return next(subject for subject in cache.subjects if row in cache.rows_of(subject))


def spaced(rows: np.ndarray, count: int) -> np.ndarray:
    """At most ``count`` of ``rows``, evenly spaced from end to end."""
    if len(rows) <= count:
        return rows
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]


def as_tensors(cache: SliceCache, rows: np.ndarray, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sources (B, Cs, S, S), target (B, 1, S, S), foreground (B, 1, S, S) bool) of cache rows; images in [-1, 1]."""
    batch = cache.batch(rows)
    return tuple(torch.from_numpy(batch[name]).to(device) for name in ("sources", "target", "foreground"))


def slice_psnr(made: torch.Tensor, target: torch.Tensor) -> float:
    """Mean over slices (B, 1, S, S) in [-1, 1] of each one's PSNR, dB, data range 2."""
    mse = (made - target).square().flatten(1).mean(1).clamp_min(1e-12)
    return float((10 * torch.log10(4 / mse)).mean())


@dataclass
class HeldOut:
    """Fixed slices nobody trains on, their figure and their pictures.

    ``reference``: what a table of values (source -> target) reaches on them, dB: the least to beat; with several
    processes process 0's alone, NaN in the others.
    """

    sources: torch.Tensor
    target: torch.Tensor
    rows: np.ndarray
    who: str
    config: Config
    reference: float

    def look(self, model: PHMDiff, device, dtype, folder: Path, step: int, ranks: Alone | None = None) -> float:
        """Mean slice PSNR (dB, data range 2) of synthesis in a few steps; draws ``step-N.png`` and ``levels-N.png``.

        With several processes each calls this, takes its turn at the slices, and gets the figure; process 0 draws.
        """
        ranks = ranks or Alone()
        levels = self._made(model, device, dtype, ranks)
        psnr = slice_psnr(levels[0], self.target.cpu())
        if ranks.first:
            with ranks.busy():
                self._draw(levels, folder, step)
        return psnr

    def _made(self, model: PHMDiff, device, dtype, ranks: Alone) -> list[torch.Tensor]:
        """The levels of every slice, fine to coarse, float32 on the CPU."""
        sample = self.config.sample.model_copy(update={"steps": min(self.config.sample.steps, VALIDATION_STEPS)})
        ids = torch.from_numpy(self.rows).to(device)
        sources, ids = self.sources.split(LOOK_BATCH), ids.split(LOOK_BATCH)

        def work(i: int) -> list[torch.Tensor]:
            with autocast(device, dtype):
                return [level.float().cpu() for level in model.translate(sources[i], ids[i], sample)]

        return ranks.deal([len(part) for part in ids], work)

    def _draw(self, levels: list[torch.Tensor], folder: Path, step: int) -> None:
        made = levels[0]
        shown = spaced(np.arange(len(made)), STRIP_SLICES + 2)[1:-1]  # the outermost slices show little
        shown = shown if len(shown) else np.arange(len(made))
        truths = build_pyramid(self.target.cpu(), len(levels))
        each = 2 * self.config.data.context_slices + 1
        middle = range(each // 2, self.sources.shape[1], each)  # of neighbouring slices the one itself

        def image(batch: torch.Tensor, i: int, channel: int = 0) -> np.ndarray:
            return batch[i, channel].cpu().numpy()

        strip_rows = [
            {
                "label": f"{self.who} {self.rows[i]}",
                "source": [image(self.sources, i, channel) for channel in middle],
                "source_names": [f"source {name}" for name in self.config.data.sources],
                "synthesized": image(made, i),
                "truth": image(self.target, i),
            }
            for i in shown
        ]
        axis = self.config.data.axis
        pictures.strip(folder / f"step-{step:08d}.png", strip_rows, title=f"step {step}", axis=axis)
        level_rows = [
            {"label": row["label"], "estimates": [image(x, i) for x in levels], "truths": [image(x, i) for x in truths]}
            for row, i in zip(strip_rows[:LEVEL_SLICES], shown, strict=False)
        ]
        pictures.levels(folder / f"levels-{step:08d}.png", level_rows, title=f"step {step}, coarse to fine")


def held_out(
    cache: SliceCache, split: dict[str, list[str]], config: Config, device, ranks: Alone | None = None
) -> HeldOut:
    """Slices of the validation people, else (too few people for any) of the training people."""
    name = "val" if split["val"] else "train"
    rows = spaced(rows_of(cache, split[name]), VALIDATION_SLICES)
    sources, target, _ = as_tensors(cache, rows, device)
    reference = math.nan
    if ranks is None or ranks.first:
        table = LookupTable.fit(cache, spaced(rows_of(cache, split["train"]), TABLE_SLICES))
        looked = torch.from_numpy(table.predict(sources.cpu().numpy())[:, None]).to(device)
        reference = slice_psnr(looked, target)
    who = "held-out slice" if name == "val" else "training slice"
    return HeldOut(sources, target, rows, who, config, reference)
