"""What the rivals share: how a method takes a step and translates, and the parts they are made of."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phmdiff_fast.blocks import Attention, Mlp
from phmdiff_fast.config import TrainConfig
from phmdiff_fast.model import sincos_positions

WARMUP = 50  # steps, as train_unet's


class Rival(nn.Module, ABC):
    """A method: how it takes a step of training, and how it translates.

    ``name``  : its key in ``RIVALS``
    ``turns`` : shares of the budget from which on a step is another kind of step
    ``plans`` : whether it asks, before it is trained, how far the budget goes (``plan``)
    """

    name = ""
    turns: tuple[float, ...] = ()
    plans = False

    def plan(self, passes: float) -> None:
        """Before ``begin``: how many passes over the training slices the budget has room for."""

    @abstractmethod
    def begin(self, config: TrainConfig) -> None:
        """Make the optimizers; called once, on the device that is trained on."""

    @abstractmethod
    def step(self, sources: Tensor, target: Tensor, share: float, step: int) -> None:
        """One optimizer step on sources (B, Cs, H, W) and target (B, 1, H, W), augmented; ``step`` counts from 0.

        share : of the budget that is used, in [0, 1). The caller enters autocast; losses are float32.
        """

    def end(self) -> None:
        """After the last step."""

    @abstractmethod
    def translate(self, sources: Tensor) -> Tensor:
        """(B, Cs, H, W), any sides -> (B, 1, H, W) float32. The same every time, whatever else is in the batch."""

    def parameter_count(self) -> int:
        """Of what is needed to translate."""
        return count(self)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def rate(peak: float, step: int, share: float) -> float:
    """Learning rate: a linear warm-up in steps, a cosine to 0 over the budget."""
    return peak * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * share))


def adamw(module: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(module.parameters(), lr=lr, betas=betas, weight_decay=weight_decay, fused=True)


def update(optimizer: torch.optim.Optimizer, loss: Tensor, lr: float, clip: float | None = None) -> None:
    """zero_grad, backward, gradients clipped to a norm of ``clip`` (None: as they are), a step at ``lr``."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(loss.device.type, enabled=False):  # each backward has the type its forward had
        loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    torch.clear_autocast_cache()  # it holds 16-bit copies of the weights before this step until autocast ends


def laid_out(x: Tensor) -> Tensor:
    """x (B, C, H, W) as its convolutions like it: a CPU's 16-bit GroupNorm is slow with the channels last."""
    return x.contiguous(memory_format=torch.channels_last if x.device.type == "cuda" else torch.contiguous_format)


def padded(x: Tensor, multiple: int) -> Tensor:
    """x (B, C, H, W) with its last row and column repeated until both sides are multiples."""
    below, right = -x.shape[2] % multiple, -x.shape[3] % multiple
    return F.pad(x, (0, right, 0, below), mode="replicate") if below or right else x


@lru_cache(maxsize=16)
def positions(rows: int, cols: int, width: int, device: torch.device) -> Tensor:
    """``sincos_positions`` (rows * cols, width), kept."""
    return sincos_positions(rows, cols, width, device)


def xavier(module: nn.Module) -> None:
    """Xavier for every linear layer, as in ViT and DiT."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)


class VitBlock(nn.Module):
    """A pre-norm transformer block (Dosovitskiy 2021). Under autocast the sum x stays float32."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))  # (B, N, D)
        return x + self.mlp(self.norm2(x))


class Regressor(Rival):
    """A network from sources to the target in one pass, ``net``, and a loss."""

    lr, betas, clips = 1e-3, (0.9, 0.99), True

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def begin(self, config: TrainConfig) -> None:
        self.optimizer = adamw(self.net, self.lr, self.betas, config.weight_decay)
        self.clip = config.grad_clip if self.clips else None

    def loss(self, sources: Tensor, target: Tensor, share: float) -> Tensor:
        return (self.net(sources) - target).abs().mean()

    def step(self, sources: Tensor, target: Tensor, share: float, step: int) -> None:
        update(self.optimizer, self.loss(sources, target, share), rate(self.lr, step, share), self.clip)

    @torch.no_grad()
    def translate(self, sources: Tensor) -> Tensor:
        return self.net(sources)
