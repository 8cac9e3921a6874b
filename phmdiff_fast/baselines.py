"""What a method has to beat: a value lookup table, and a small U-Net with an L1 loss.

Both see the same training slices as the model; the U-Net also the same augmentation, batch size,
precision and wall-clock.
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .augment import augment, manner
from .cache import SliceCache, batch_rows
from .config import DataConfig, TrainConfig
from .device import autocast, kept_memory
from .loader import Resident

BINS = 128


class LookupTable:
    """Source value -> mean target value over the training pixels, linear between bin centres.

    With several sources each has a table of its own, and the tables' outputs are averaged.
    """

    def __init__(self, tables: np.ndarray):
        self.tables = tables  # (Cs, BINS)

    @classmethod
    def fit(cls, cache: SliceCache, rows: np.ndarray, *, batch_size: int = 64) -> LookupTable:
        """Fit on cache rows (n,) int64, a batch at a time."""
        total = count = None
        for start in range(0, len(rows), batch_size):
            batch = cache.batch(rows[start : start + batch_size])
            target = batch["target"].ravel()
            sources = batch["sources"].transpose(1, 0, 2, 3).reshape(batch["sources"].shape[1], -1)
            bins = np.clip(((sources + 1) * (BINS / 2)).astype(np.int64), 0, BINS - 1)
            sums = np.stack([np.bincount(b, weights=target, minlength=BINS) for b in bins])
            counts = np.stack([np.bincount(b, minlength=BINS) for b in bins])
            total, count = (sums, counts) if total is None else (total + sums, count + counts)
        tables = []
        for sums, counts in zip(total, count, strict=True):
            seen = counts > 0
            tables.append(np.interp(np.arange(BINS), np.flatnonzero(seen), sums[seen] / counts[seen]))
        return cls(np.stack(tables))

    def predict(self, sources: np.ndarray) -> np.ndarray:
        """sources (Z, Cs, S, S) in [-1, 1] -> (Z, S, S) float32."""
        centres = (np.arange(BINS) + 0.5) * (2 / BINS) - 1
        looked = [np.interp(sources[:, i], centres, table) for i, table in enumerate(self.tables)]
        return np.mean(looked, 0).astype(np.float32)


class DoubleConv(nn.Sequential):
    def __init__(self, inputs: int, outputs: int):
        layers = []
        for a, b in ((inputs, outputs), (outputs, outputs)):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(8, b), nn.SiLU()]
        super().__init__(*layers)


class UNet(nn.Module):
    """A small U-Net (Ronneberger 2015): three halvings, widths w, 2w, 4w, 4w. Sides: any."""

    def __init__(self, channels: int, width: int = 32):
        super().__init__()
        widths = [width, 2 * width, 4 * width, 4 * width]
        self.down = nn.ModuleList(DoubleConv(a, b) for a, b in zip([channels, *widths], widths, strict=False))
        self.up = nn.ModuleList(
            DoubleConv(below + here, here) for below, here in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.last = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, Cs, H, W) -> (B, 1, H, W)."""
        x = x.contiguous(memory_format=torch.channels_last)
        skips = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else F.max_pool2d(x, 2, ceil_mode=True))
            skips.append(x)
        for block, skip in zip(self.up, skips[-2::-1], strict=True):
            x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
            x = block(torch.cat([x, skip], 1))
        return self.last(x).float()


def training_batch(
    cache: SliceCache, rows: np.ndarray, config: TrainConfig, step: int, device: torch.device, how: dict,
    resident: Resident | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """sources (B, Cs, S, S) and target (B, 1, S, S) of a step, augmented: what our own model sees at that step.

    rows : training rows of the cache; how : ``augment.manner`` of its channels; resident : the slices, if they lie in
    the device's memory
    """
    chosen = rows[batch_rows(len(rows), config.batch_size, seed=config.seed, step=step)]
    if resident is not None:
        sources, target, _ = resident.pick(chosen)
    else:
        batch = cache.batch(chosen, fine=True)
        sources, target = (torch.from_numpy(batch[name]).to(device) for name in ("sources", "target"))
    return augment(sources, target, torch.from_numpy(chosen).to(device), (config.seed, step), config, **how)


def train_unet(
    cache: SliceCache, rows: np.ndarray, config: TrainConfig, seconds: float, device: torch.device, dtype: torch.dtype,
    *, data: DataConfig, progress=None,
) -> tuple[UNet, int]:  # fmt: skip
    """Train a U-Net with an L1 loss for ``seconds`` of wall-clock; returns (model, steps).

    AdamW 1e-3, cosine over the time, batch and augmentation of ``config``. rows: training rows of
    the cache; data: what its channels are. ``progress(share)`` is called after each step.
    """
    torch.manual_seed(config.seed)
    model, how = UNet(data.source_channels).to(device), manner(data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=config.weight_decay, fused=True)
    with kept_memory(device):  # without it a step on a CPU takes twice as long: not what a rival should be held to
        begun, step = time.monotonic(), 0
        while (share := (time.monotonic() - begun) / seconds) < 1:
            sources, target = training_batch(cache, rows, config, step, device, how)
            with autocast(device, dtype):
                loss = (model(sources) - target).abs().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * share))
            optimizer.step()
            step += 1
            if progress is not None:
                progress(min(1.0, share))
    return model.eval(), step


@torch.no_grad()
def unet_predict(model: UNet, sources: np.ndarray, device, dtype, *, batch_size: int = 32) -> np.ndarray:
    """sources (Z, Cs, S, S) in [-1, 1] -> (Z, S, S) float32, clamped to [-1, 1]."""
    made = []
    for start in range(0, len(sources), batch_size):
        part = torch.from_numpy(np.ascontiguousarray(sources[start : start + batch_size])).to(device)
        with autocast(device, dtype):
            made.append(model(part)[:, 0].clamp(-1, 1).cpu().numpy())
    return np.concatenate(made)
