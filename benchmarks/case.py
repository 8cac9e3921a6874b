"""One shape of one operation, for every tool that runs it: benchmarks, byte counts, compile reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

Inputs = dict[str, torch.Tensor | None]


@dataclass(frozen=True)
class Case:
    """An operation at one shape.

    op : its public name; shape : what a table prints ("s4: B 8, N 256, D 384, bf16")
    make : device -> the inputs by name, random but the same at every call; those that train require grad
    variants : name -> function of the inputs returning a tensor or a tuple of tensors:
        "literal" (the form a peer uses), "eager" (tuned eager PyTorch), "triton" (ours, forced).
        torch.compile of "eager" is added by the benchmark
    floor : inputs -> (bytes forward, bytes backward), each input read once and each output written
        once, nothing in between; backward 0 where there is none
    tags : "small" (a CPU and the interpreter can afford it), "cpu" (CPU only), "large" (GPU only),
        "check" (one of the few that `make gpu-check` times), "compile" (for the compile report alone)
    flops : inputs -> floating point operations forward and backward, where arithmetic is the ceiling
    """

    op: str
    shape: str
    make: Callable[[torch.device], Inputs]
    variants: dict[str, Callable[[Inputs], torch.Tensor | tuple[torch.Tensor, ...]]]
    floor: Callable[[Inputs], tuple[int, int]]
    flops: Callable[[Inputs], tuple[int, int]] | None = None
    tags: frozenset[str] = field(default_factory=frozenset)

    def __str__(self) -> str:
        return f"{self.op} [{self.shape}]"


def tagged(cases: list[Case], tag: str, *shapes: str) -> list[Case]:
    """The cases, ``tag`` added to those of these shapes. Raises ValueError for a shape that none has."""
    unknown = set(shapes) - {case.shape for case in cases}
    if unknown:
        raise ValueError(f"no case of shape {unknown}")
    return [replace(case, tags=case.tags | {tag}) if case.shape in shapes else case for case in cases]


def size(*tensors: torch.Tensor | None) -> int:
    """Bytes of the tensors' elements; None is nothing."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
