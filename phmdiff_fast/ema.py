"""Exponential moving average of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EMA:
    """shadow <- d shadow + (1 - d) weights with d = min(decay, (1 + step) / (10 + step)).

    The warm-up lets the average forget the random start within a short training.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.names = [name for name, _ in model.named_parameters()]
        self._weights = [p for _, p in model.named_parameters()]
        self.shadow = [p.detach().clone() for p in self._weights]
        self._part: nn.Module | None = None
        self.follow(model)

    def follow(self, part: nn.Module) -> None:
        """From now on the average takes in the weights of this part of the model alone; the others stay as they are."""
        if part is self._part:
            return
        self._part, chosen = part, {id(p) for p in part.parameters()}
        self._followed = [n for n, weight in enumerate(self._weights) if id(weight) in chosen]

    def share(self, step: int) -> float:
        """1 - d of optimizer step ``step``, counted from 0."""
        return 1 - min(self.decay, (1 + step) / (10 + step))

    def update(self, step: int) -> None:
        """Take the model's weights after optimizer step ``step`` (counted from 0) in."""
        self.take(self.share(step))

    @torch.no_grad()
    def take(self, share: float | Tensor) -> None:
        """shadow += share (weights - shadow); a share on the device can be part of a CUDA graph."""
        shadow, weights = ([of[n] for n in self._followed] for of in (self.shadow, self._weights))
        if not isinstance(share, Tensor):
            torch._foreach_lerp_(shadow, weights, share)
            return
        apart = torch._foreach_sub(weights, shadow)
        torch._foreach_mul_(apart, share)
        torch._foreach_add_(shadow, apart)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.shadow, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in zip(self.names, self.shadow, strict=True):
            value.copy_(state[name])

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights with the average (call again to undo)."""
        for weight, shadow in zip(self._weights, self.shadow, strict=True):
            held = weight.detach().clone()
            weight.copy_(shadow)
            shadow.copy_(held)
