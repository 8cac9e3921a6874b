"""A training step, ours and the peers', on identical shapes: the variants that are compared, and a quick look at them.

``python -m benchmarks.train_compare`` times them side by side and says what came of the goals; here pytest-benchmark
times one after the other, preset xs with one level. The peers' networks are in ``peers.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import harness, peers
from phmdiff_fast.config import PRESETS, Config, LevelSpec, ModelConfig, TrainConfig, build_config
from phmdiff_fast.device import autocast, pick_precision
from phmdiff_fast.distributed import Alone
from phmdiff_fast.ema import EMA
from phmdiff_fast.guards import fitting
from phmdiff_fast.parallel import Single
from phmdiff_fast.phmdiff import PHMDiff
from phmdiff_fast.step import GRAPH_IMAGES, Step

# Depth, width, heads of Peebles & Xie at patch 2, on 32 x 32 x 4 latents; MaskDiT's decoder.
DIT = {"S/2": (12, 384, 6), "B/2": (12, 768, 12), "XL/2": (28, 1152, 16)}
LEVELS = {"one": [0.75], "pyramid": [0.75, 0.5, 0.25]}  # mask ratios, fine to coarse


@dataclass(frozen=True)
class Shape:
    """What every variant computes on: (B, C, side, side) targets and (B, Cs, side, side) sources."""

    name: str  # of a preset, or of DIT
    levels: str  # of LEVELS
    batch: int

    @property
    def channels(self) -> int:
        """C = Cs: latents of both, or one contrast each."""
        return 4 if self.name in DIT else 1

    @property
    def side(self) -> int:
        return 32 if self.name in DIT else 64

    @property
    def model(self) -> ModelConfig:
        """Sizes and levels; convolutions off."""
        levels = [LevelSpec(mask_ratio=ratio) for ratio in LEVELS[self.levels]]
        if self.name in DIT:
            depth, width, heads = DIT[self.name]
            return ModelConfig(depth=depth, width=width, heads=heads, decoder_depth=8, decoder_width=512,
                               decoder_heads=16, patch=2, levels=levels, stem=False, head=False)  # fmt: skip
        return build_config(self.name).model.model_copy(update={"levels": levels, "stem": False, "head": False})

    @property
    def train(self) -> TrainConfig:
        """The optimizer's settings, and nothing but the denoising loss."""
        return TrainConfig(lr=1e-4, batch_size=self.batch, mmd_weight=0.0, flip=False, gamma=0.0, scale=0.0)

    def batch_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The target and the sources every variant is given."""
        drawn = torch.Generator().manual_seed(0)
        shape = (self.batch, self.channels, self.side, self.side)
        return tuple((torch.rand(shape, generator=drawn) * 2 - 1).to(device) for _ in range(2))

    def __str__(self) -> str:
        return f"{self.name}, {'one level' if self.levels == 'one' else 'three levels'}, batch {self.batch}"


class Timed:
    """A training step that can be called again and again: forward, backward, clip, AdamW, average.

    Calling it gives the loss, detached. micro : images at a time; count : steps made
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    micro: int
    count = 0

    def fit(self) -> None:
        """The first step, with fewer images at a time where the batch does not fit in memory."""

        def attempt(images: int) -> None:
            self.micro = images
            self.optimizer.zero_grad(set_to_none=True)
            self()

        self.micro = fitting(attempt, self.micro)

    def held_bytes(self) -> int:
        """Of weights, optimizer state and average."""
        state = [t for values in self.optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
        held = [*self.model.parameters(), *self.model.buffers(), *state, *self.ema.shadow]
        return sum(t.numel() * t.element_size() for t in held)


class PeerStep(Timed):
    """The peers' step around ``loss``: (target, sources) -> scalar."""

    def __init__(self, model: nn.Module, loss: Callable, shape: Shape, device: torch.device, dtype, ema=EMA):
        self.model, self.loss, self.device, self.dtype = model, loss, device, dtype
        self.target, self.sources = shape.batch_on(device)
        train = shape.train
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=train.lr, betas=train.betas,
                                           weight_decay=train.weight_decay, fused=True)  # fmt: skip
        self.clip, self.ema = train.grad_clip, ema(model, train.ema)
        self.micro = shape.batch

    def __call__(self) -> Tensor:
        batch, total = len(self.target), 0.0
        for at in range(0, batch, self.micro):
            target, sources = (part[at : at + self.micro] for part in (self.target, self.sources))
            with autocast(self.device, self.dtype):
                loss = self.loss(target, sources) * (len(target) / batch)
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.ema.update(self.count)
        self.optimizer.zero_grad(set_to_none=True)  # now, so that an idle variant leaves the memory to the others
        self.count += 1
        return total


class OurStep(Timed):
    """Ours, as ``phmdiff-fast train`` runs it: ``phmdiff_fast.step.Step``, from a batch on the device.

    By its "auto" settings, on a GPU blocks are compiled and up to 64 images make the whole step one CUDA graph.
    """

    def __init__(self, model: nn.Module, config: Config, shape: Shape, device: torch.device, dtype, masked: bool):
        self.work = Step(Single(model, Alone()), config, device, dtype)
        self.model, self.optimizer, self.ema = model, self.work.optimizer, self.work.ema
        finer = config.data.oversample  # the augmentation averages down what the cache has finer
        target, sources = (F.interpolate(images, scale_factor=finer) for images in shape.batch_on(device))
        self.batch = [sources, target, torch.ones_like(target[:, :1], dtype=torch.bool)]
        self.rows = np.arange(shape.batch)[None]  # (1, B): one process
        self.lr, self.masked, self.micro = config.train.lr, masked, shape.batch

    def __call__(self) -> Tensor:
        inputs = self.work.inputs(self.batch, self.rows, self.count)
        terms, _ = self.work.whole(inputs, self.masked, self.micro, self.lr, self.count)
        if not self.work.replays:  # a recorded step's gradients are its own
            self.optimizer.zero_grad(set_to_none=True)
        self.count += 1
        return terms.total.detach()


# --- variants -------------------------------------------------------------------------------------------


def products_are_faster(device: torch.device, dtype: torch.dtype) -> bool:
    """Where two plain products beat scaled_dot_product_attention: bf16 on a CPU (docs/LOG.md)."""
    return device.type == "cpu" and dtype == torch.bfloat16


def _peer(kind: type[peers.DiT], *, published: bool = False, compiled: bool = False, mode: str | None = None):
    """``published``: attention as two products, average in a loop, whatever would be faster here."""

    def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> PeerStep:
        fused = not (published or products_are_faster(device, dtype))
        model = kind(shape.model, shape.channels, shape.channels, shape.side, fused=fused).to(device)
        loss = torch.compile(model.loss, dynamic=False, mode=mode) if compiled else model.loss
        return PeerStep(model, loss, shape, device, dtype, peers.LoopEMA if published else EMA)

    return build


def _dit_on_ours(shape: Shape, device: torch.device, dtype: torch.dtype) -> OurStep:
    model = peers.DiTOnOurBlocks(shape.model, shape.channels, shape.channels, shape.side).to(device)
    return OurStep(model, Config(model=shape.model, train=shape.train), shape, device, dtype, False)


def _ours(*, masked: bool = True, whole: bool = False):
    """``whole``: the preset with its convolutions, its MMD and its augmentation."""

    def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> OurStep:
        config = Config(model=shape.model, train=shape.train)
        if whole:
            levels = [level.model_dump() for level in shape.model.levels]
            config = build_config(shape.name, {"model": {"levels": levels}, "train": {"batch_size": shape.batch}})
        model = PHMDiff(config.model, shape.channels, shape.channels).to(device)
        return OurStep(model, config, shape, device, dtype, masked)

    return build


VARIANTS: dict[str, tuple[str, Callable[[Shape, torch.device, torch.dtype], Timed]]] = {
    "dit": ("DiT, eager", _peer(peers.DiT)),
    "dit_modern": ("DiT, compiled", _peer(peers.DiT, compiled=True)),
    "dit_blocks": ("DiT on our blocks", _dit_on_ours),
    "maskdit": ("MaskDiT as published", _peer(peers.MaskDiT, published=True)),
    "maskdit_eager": ("MaskDiT, tuned, eager", _peer(peers.MaskDiT)),
    "maskdit_modern": ("MaskDiT modern", _peer(peers.MaskDiT, compiled=True)),
    "maskdit_graphs": ("MaskDiT modern, graphs", _peer(peers.MaskDiT, compiled=True, mode="reduce-overhead")),
    "ours": ("ours", _ours()),
    "ours_unmasked": ("ours, unmasked", _ours(masked=False)),
    "preset": ("whole preset", _ours(whole=True)),
    "preset_unmasked": ("whole preset, unmasked", _ours(masked=False, whole=True)),
}
DITS = ("dit", "dit_modern", "dit_blocks")
COMPILED = ("dit_modern", "maskdit_modern", "maskdit_graphs")
MASKDITS = ("maskdit", "maskdit_eager", "maskdit_modern", "maskdit_graphs")
# What ``peers.flops`` calls each; the whole presets have convolutions, which it does not count.
FORMS = {"ours": "ours", "ours_unmasked": "unmasked"} | dict.fromkeys(DITS, "dit") | dict.fromkeys(MASKDITS, "maskdit")


def variants_for(shape: Shape, device: torch.device, compiled: bool) -> list[str]:
    """Names of those that make sense there; ``compiled``: the compiled peers too."""
    left_out = set() if compiled else set(COMPILED)
    if device.type != "cuda" or shape.batch > GRAPH_IMAGES:
        left_out.add("maskdit_graphs")
    if shape.name not in PRESETS:
        left_out |= {"preset", "preset_unmasked"}
    return [name for name in VARIANTS if name not in left_out]


@pytest.mark.benchmark(group="training step, xs, 64 x 64, one level")
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in COMPILED or harness.CUDA])
def test_step(benchmark, device, variant):
    from conftest import timed

    shape = Shape("xs", "one", 8)
    if variant not in variants_for(shape, device, compiled=device.type == "cuda"):
        pytest.skip("compiling a peer takes minutes on a CPU: python -m benchmarks.train_compare --compile")
    torch.manual_seed(0)
    step = VARIANTS[variant][1](shape, device, pick_precision("auto", device))
    assert torch.isfinite(step())
    timed(benchmark, device, step)
    benchmark.extra_info["images_per_s"] = shape.batch / benchmark.stats.stats.median
