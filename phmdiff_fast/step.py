"""One step of a training, from a batch to new weights. Nothing in it is read back from the device or waited for.

On a GPU everything that changes from step to step (learning rate, step number, share of the average) is a tensor
there, so that a whole step can be recorded once as a CUDA graph and replayed as a single launch.
"""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from torch import Tensor

from .augment import augment, manner
from .config import Config
from .device import autocast
from .ema import EMA
from .parallel import Single
from .phmdiff import LossTerms, PHMDiff
from .stages import stage

EAGER_STEPS = 3  # of each stage before it is recorded: compilation, autotuning, first allocations
GRAPH_IMAGES = 64  # up to here launches weigh against arithmetic; above, a graph's memory is not worth it
COMPILED_SHAPES = 64  # widths, levels and stages that the compiled block meets; dynamo stops at 8 by default


def compile_blocks(model: PHMDiff, how: str, backend="inductor") -> None:
    """torch.compile of the one thing that runs often: a transformer block ("blocks" or "max-autotune").

    All blocks of a width share their compiled code, so it is made once a width, level and stage. A block that
    cannot be one graph raises: a break would run slower without a word.
    """
    for limit in ("recompile_limit", "cache_size_limit"):  # named so from 2.6 on, and before
        if hasattr(torch._dynamo.config, limit):
            setattr(torch._dynamo.config, limit, max(COMPILED_SHAPES, getattr(torch._dynamo.config, limit)))
    mode = "max-autotune-no-cudagraphs" if how == "max-autotune" else None
    for block in [block for net in model.nets for block in (*net.blocks, *net.decoder_blocks)]:
        block.compile(dynamic=False, fullgraph=True, backend=backend, **({"mode": mode} if mode else {}))


def wants(choice: str, automatic: bool) -> bool:
    """What "auto" stands for: ``automatic``; "off" is False, anything else True."""
    return automatic if choice == "auto" else choice != "off"


class Step:
    """Model, optimizer and average of a training, and what a step does to them.

    together : the model, of one process or of several (``parallel.wrap``); config : all settings; dtype : of the
    products; teacher : (sources, sample ids) -> the target instead of the true one, or None

    ``gradients`` and ``update`` are the two halves of a step; ``whole`` is both, replayed where that pays.
    """

    def __init__(self, together: Single, config: Config, device: torch.device, dtype: torch.dtype, teacher=None):
        self.teacher = teacher
        tc, model = config.train, together.model
        self.together, self.model, self.config, self.device, self.dtype = together, model, config, device, dtype
        self.rank, alone = together.ranks.rank, together.ranks.world == 1
        self.on_gpu = device.type == "cuda"
        self.lr = torch.zeros((), device=device) if self.on_gpu else tc.lr
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=tc.lr, betas=tc.betas, weight_decay=tc.weight_decay, fused=True,
            capturable=self.on_gpu,
        )  # fmt: skip
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.ema = EMA(model, tc.ema)
        self.how = manner(config.data)
        for net in model.nets:
            net.recompute = tc.recompute
        self.compiled = wants(tc.torch_compile, self.on_gpu and not together.shared)
        if self.compiled:
            compile_blocks(model, tc.torch_compile)
        small = tc.batch_size <= GRAPH_IMAGES
        # A jump of the loss that is to be left out has to be read before the update.
        self.replays = self.on_gpu and alone and tc.on_spike == "warn" and wants(tc.cuda_graph, small)
        self._recorded: dict[tuple, _Recorded] = {}
        self._made: dict[tuple, int] = {}  # steps of each kind so far

    # --- what a step is given

    def inputs(self, batch, everybody: np.ndarray, step: int) -> list:
        """sources, target, foreground, sample ids and the number of the step, on the device.

        everybody : (W, B) int64, the sample ids of all W processes, a row each
        """
        tensors = [*batch, torch.from_numpy(np.ascontiguousarray(everybody))]
        if not self.on_gpu:
            return [*tensors, step]
        tensors = [t if t.is_cuda or t.is_pinned() else t.pin_memory() for t in tensors]
        moved = [t.to(self.device, non_blocking=True) for t in tensors]
        return [*moved, torch.full((), step, dtype=torch.int64, device=self.device)]

    # --- the two halves

    def loss(self, sources: Tensor, target: Tensor, inside: Tensor, everybody: Tensor, step, masked, *, alone=False):
        """LossTerms of a batch as the cache gives it: augmentation, then the model; alone: of this process' only."""
        tc, rng, sample_ids = self.config.train, (self.config.train.seed, step), everybody[self.rank]
        with stage("augment"):
            sources, target, inside = augment(sources, target, sample_ids, rng, tc, foreground=inside, **self.how)
        gather = None if alone else self.together.gather(everybody)
        with autocast(self.device, self.dtype):
            if self.teacher is not None:
                with stage("teacher"):
                    target = self.teacher(sources, sample_ids)
            return self.together.module(target, sources, sample_ids, rng, tc, masked=masked, foreground=inside,
                                        gather=gather)  # fmt: skip

    def gradients(self, inputs: list, masked: bool, micro: int, *, alone: bool = False) -> LossTerms:
        """Gradients of a batch, ``micro`` images at a time, and loss terms; both averaged over the processes.

        alone : nobody else is asked, for a trial that may fail here and not there
        """
        *images, everybody, step = inputs
        count = len(images[0])
        self.together.stage(masked, *(side // self.config.data.oversample for side in images[0].shape[2:]))
        self.optimizer.zero_grad(set_to_none=True)
        parts = []
        for at in range(0, count, micro):
            here = [part[at : at + micro] for part in images]
            weight = len(here[0]) / count
            with self.together.accumulate(last=at + micro >= count and not alone):
                terms = self.loss(*here, everybody[:, at : at + micro], step, masked, alone=alone)
                with stage("backward"):
                    (terms.total if weight == 1 else terms.total * weight).backward()
            parts.append([value.detach() * weight for value in (terms.total, terms.denoise, terms.mmd, terms.vlb)])
        terms = LossTerms(*(sum(values[1:], values[0]) for values in zip(*parts, strict=True)))
        return terms if alone else self.together.mean(terms)

    def update(self, terms: LossTerms, lr: float, step: int) -> Tensor:
        """Clip and step, unless a gradient is not finite; 1 where it was not, else 0."""
        self.set_rate(lr)
        share = self.ema.share(step)
        # As recorded: the same bits whether a step is replayed or, after a restart, is not yet.
        return self._update(terms, torch.full((), share, device=self.device) if self.on_gpu else share)

    def set_rate(self, lr: float) -> None:
        if self.on_gpu:
            self.lr.fill_(lr)
        else:
            self.lr = lr
            for group in self.optimizer.param_groups:
                group["lr"] = lr

    def _update(self, terms: LossTerms, share: float | Tensor) -> Tensor:
        with stage("update"):
            norm = self.together.clip(self.config.train.grad_clip)
            bad = (~(torch.isfinite(norm) & torch.isfinite(terms.total))).float()
            # The fused step leaves everything as it is where this is 1: no wait for the GPU is needed to be sure of it.
            self.optimizer.found_inf = bad
            self.optimizer.step()
        with stage("ema"):
            self.ema.take(share)
        return bad

    # --- both at once

    def whole(self, inputs: list[Tensor], masked: bool, micro: int, lr: float, step: int) -> tuple[LossTerms, Tensor]:
        """A step from its inputs to new weights; (loss terms, whether it was not finite and left out)."""
        kind = (masked, micro, self.model.active, *(tuple(part.shape) for part in inputs[:-1]))
        made = self._made[kind] = self._made.get(kind, 0) + 1
        if not self.replays or made <= EAGER_STEPS:
            with self._aside() if self.replays else contextlib.nullcontext():
                terms = self.gradients(inputs, masked, micro)
                return terms, self.update(terms, lr, step)
        if kind not in self._recorded:
            self._recorded[kind] = _Recorded(self, inputs, masked, micro)
        with stage("replay"):
            self.set_rate(lr)
            return self._recorded[kind].replay(inputs, self.ema.share(step))

    @contextlib.contextmanager
    def _aside(self):
        """A stream of its own: what is allocated and tuned on the way is then ready to be recorded."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            yield
        torch.cuda.current_stream().wait_stream(side)

    def forget(self) -> None:
        """Recorded steps point at the optimizer's tensors; after a checkpoint is loaded those are others."""
        self._recorded.clear()
        self._made.clear()


class _Recorded:
    """A whole step as a CUDA graph: its inputs are copied into its own, its outputs are read from its own."""

    def __init__(self, step: Step, inputs: list[Tensor], masked: bool, micro: int):
        self.inputs = [part.clone() for part in inputs]
        self.share = torch.zeros((), device=step.device)
        self.graph = torch.cuda.CUDAGraph()
        step.optimizer.zero_grad(set_to_none=True)  # gradients are the graph's own
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph):
            self.terms = step.gradients(self.inputs, masked, micro)
            self.bad = step._update(self.terms, self.share)

    def replay(self, inputs: list[Tensor], share: float) -> tuple[LossTerms, Tensor]:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self.share.fill_(share)
        self.graph.replay()
        terms = (self.terms.total, self.terms.denoise, self.terms.mmd, self.terms.vlb)
        return LossTerms(*(value.clone() for value in terms)), self.bad.clone()
