"""The peers' forms of a training step, at our shapes: what the training benchmark compares with.

DiT (Peebles & Xie 2023) and MaskDiT (Zheng et al. 2023, models/maskdit.py) written again from their
sources, with one network for all levels of a pyramid, walked one after the other as ours is: a patch
embedding and an output layer a level, shared blocks, the coarser level's x0 estimate merged into the state
(PHMDiff Eq. 6) and shown as a channel. So shapes, channels, masks and loss (mean square of x0) are ours.
What a peer has and this comparison lacks: labels, their dropout and the preconditioning around the network
(none costs a product), and MaskDiT's second loss on masked patches. Noise, timesteps and masks come
from torch's own generator, as theirs do.

``flops`` counts products and attention of a training step in closed form, for the peers and for ours.

Shapes: B batch, C target channels, Cs source channels, N tokens of a level, K kept, D width, Dd decoder width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phmdiff_fast.blocks import Block, FinalNorm, run_blocks
from phmdiff_fast.config import ModelConfig
from phmdiff_fast.diffusion import Schedule
from phmdiff_fast.kernels.patch_mask import embed_visible, unpatchify
from phmdiff_fast.masking import num_kept
from phmdiff_fast.model import TimestepEmbedder, sincos_positions
from phmdiff_fast.phmdiff import LossTerms
from phmdiff_fast.pyramid import build_pyramid


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, D) with shift, scale (B, D), as both peers write it."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class PeerAttention(nn.Module):
    """timm's Attention: two products around a softmax, or (``fused``) scaled_dot_product_attention."""

    def __init__(self, width: int, heads: int, fused: bool):
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, num, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, num, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(batch, num, width))  # (B, N, D)


class PeerMlp(nn.Module):
    """Linear, PyTorch's own GELU (tanh form), Linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class PeerBlock(nn.Module):
    """The DiT block of both peers, each operation by itself."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, cond_width: int, fused: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = PeerAttention(width, heads, fused)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = PeerMlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond_width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class PeerNorm(nn.Module):
    """LayerNorm and modulation in front of an output layer."""

    def __init__(self, width: int, cond_width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond_width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return modulate(self.norm(x), *self.adaLN_modulation(c).chunk(2, dim=1))


@dataclass
class Draws:
    """What chance decides in a step: t (B,) int64; eps (B, C, H, W) and mask keys (B, N) a level, fine to coarse."""

    t: Tensor
    eps: list[Tensor]
    keys: list[Tensor]


def masked_ids(keys: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """MaskDiT's get_mask: (B, N) random keys -> kept ids (B, K), in shuffled order, and ids_restore (B, N)."""
    order = torch.argsort(keys, dim=1)
    return order[:, :keep], torch.argsort(order, dim=1)


class DiT(nn.Module):
    """DiT on the levels of a pyramid: encoder blocks on all tokens, no decoder.

    Parameters
    ----------
    config : ModelConfig, of which sizes, levels, patch and schedule are read; stem and head stay off
    source_channels, target_channels : Cs and C; side : of the finest level, a multiple of patch 2^(levels - 1)
    fused : attention by scaled_dot_product_attention
    """

    def __init__(self, config: ModelConfig, source_channels: int, target_channels: int, side: int, *, fused: bool):
        super().__init__()
        self.config, self.channels, self.fused = config, target_channels, fused
        levels, p, D = len(config.levels), config.patch, config.width
        self.grids = [side // 2**n // p for n in range(levels)]
        coarse = [target_channels * (n < levels - 1) for n in range(levels)]
        self.schedule = Schedule(config.timesteps, config.beta_start, config.beta_end, config.schedule)
        self.t_embedder = TimestepEmbedder(D)
        self.level_embed = nn.Embedding(levels, D)
        self.x_embedder = nn.ModuleList(
            nn.Conv2d(source_channels + target_channels + extra, D, p, stride=p) for extra in coarse
        )
        self.blocks = nn.ModuleList(PeerBlock(D, config.heads, config.mlp_ratio, D, fused) for _ in range(config.depth))
        self.encoder_norm = PeerNorm(D, D)
        self._add_output(levels, D)
        for n, grid in enumerate(self.grids):
            self.register_buffer(f"pos{n}", sincos_positions(grid, grid, D), persistent=False)

    def _add_output(self, levels: int, width: int) -> None:
        p = self.config.patch
        self.final_layer = nn.ModuleList(nn.Linear(width, p * p * self.channels) for _ in range(levels))

    def draw(self, like: Tensor) -> Draws:
        """A step's timesteps, noise and mask keys for a batch (B, C, H, W)."""
        batch, p = len(like), self.config.patch
        t = torch.randint(self.schedule.timesteps, (batch,), device=like.device)
        eps = [torch.randn(batch, self.channels, g * p, g * p, device=like.device) for g in self.grids]
        return Draws(t, eps, [torch.rand(batch, g * g, device=like.device) for g in self.grids])

    def loss(self, target: Tensor, sources: Tensor) -> Tensor:
        """Mean over levels of the mean square x0 error of target (B, C, H, W) from sources (B, Cs, H, W)."""
        return self.loss_of(target, sources, self.draw(target))

    def loss_of(self, target: Tensor, sources: Tensor, draws: Draws) -> Tensor:
        targets, clean = self.levels_of(target), self.levels_of(sources)
        abar = self.schedule(draws.t).view(-1, 1, 1, 1)
        conditions = self.conditions(draws.t)
        total, coarse = 0.0, None
        for n in reversed(range(len(self.grids))):
            out = self.predict(n, targets[n], clean[n], coarse, abar, conditions[n], draws).float()
            total = total + F.mse_loss(out, targets[n])
            coarse = out.detach().clamp(-1, 1)
        return total / len(self.grids)

    def levels_of(self, x: Tensor) -> list[Tensor]:
        out = [x]
        for _ in self.grids[1:]:
            out.append(F.avg_pool2d(out[-1], 2, ceil_mode=True, count_include_pad=False))
        return out

    def conditions(self, t: Tensor) -> list:
        """What the blocks of each level are told: (B, D), the embedding once a level as the peers do."""
        return [self.t_embedder(t) + self.level_embed.weight[n] for n in range(len(self.grids))]

    def predict(self, n: int, y: Tensor, sources: Tensor, coarse, abar: Tensor, c, draws: Draws) -> Tensor:
        """x0 of level n, (B, C, H, W)."""
        x = self.tokens(n, y, sources, coarse, abar, draws.eps[n])  # (B, N, D)
        for block in self.blocks:
            x = block(x, c)
        return self.image(self.final_layer[n](self.encoder_norm(x, c)))

    def tokens(self, n: int, y: Tensor, sources: Tensor, coarse, abar: Tensor, eps: Tensor) -> Tensor:
        """Every patch embedded, by a strided convolution over the merged state and the channels beside it."""
        state = abar.sqrt() * y + (1 - abar).sqrt() * eps
        beside = [sources]
        if coarse is not None:
            up = F.interpolate(coarse, size=y.shape[2:], mode="bilinear", align_corners=False)
            state = state + (1 - abar.sqrt()) * up
            beside.append(up)
        if self.config.scale_state and self.config.prediction != "eps":
            state = abar.sqrt() * state
        x = self.x_embedder[n](torch.cat([state, *beside], 1))
        return x.flatten(2).transpose(1, 2) + getattr(self, f"pos{n}")

    def image(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C p p) in the order (channel, row, column) to (B, C, H, W)."""
        p, grid = self.config.patch, int(x.shape[1] ** 0.5)
        x = x.reshape(len(x), grid, grid, self.channels, p, p)
        return torch.einsum("nhwcpq->nchpwq", x).reshape(len(x), self.channels, grid * p, grid * p)


class MaskDiT(DiT):
    """MaskDiT: all patches embedded, the kept ones gathered after an argsort; a decoder on all tokens in which
    masked places hold a learned token. ``fused=False`` and no torch.compile: as published."""

    def _add_output(self, levels: int, width: int) -> None:
        config, narrow = self.config, self.config.decoder_width
        super()._add_output(levels, narrow)
        self.to_decoder = nn.Linear(width, narrow)
        self.mask_token = nn.Parameter(torch.randn(1, 1, narrow) * 0.02)
        self.decoder_blocks = nn.ModuleList(
            PeerBlock(narrow, config.decoder_heads, config.mlp_ratio, width, self.fused)
            for _ in range(config.decoder_depth)
        )
        self.decoder_norm = PeerNorm(narrow, width)
        for n, grid in enumerate(self.grids):
            self.register_buffer(f"decoder_pos{n}", sincos_positions(grid, grid, narrow), persistent=False)

    def predict(self, n: int, y: Tensor, sources: Tensor, coarse, abar: Tensor, c, draws: Draws) -> Tensor:
        x = self.tokens(n, y, sources, coarse, abar, draws.eps[n])  # (B, N, D)
        kept, restore = masked_ids(draws.keys[n], num_kept(x.shape[1], self.config.levels[n].mask_ratio))
        x = torch.gather(x, 1, kept.unsqueeze(-1).repeat(1, 1, x.shape[2]))  # (B, K, D)
        for block in self.blocks:
            x = block(x, c)
        x = self.to_decoder(self.encoder_norm(x, c))  # (B, K, Dd)
        fill = self.mask_token.repeat(len(x), restore.shape[1] - x.shape[1], 1)
        x = torch.cat([x, fill], 1)
        x = torch.gather(x, 1, restore.unsqueeze(-1).repeat(1, 1, x.shape[2]))  # (B, N, Dd)
        x = x + getattr(self, f"decoder_pos{n}")
        for block in self.decoder_blocks:
            x = block(x, c)
        return self.image(self.final_layer[n](self.decoder_norm(x, c)))


class DiTOnOurBlocks(DiT):
    """The unmasked DiT with everything that makes ours fast but the mask: the honest measure of masking alone."""

    def __init__(self, config: ModelConfig, source_channels: int, target_channels: int, side: int):
        super().__init__(config, source_channels, target_channels, side, fused=True)
        D = config.width
        self.x_embedder = nn.ModuleList(nn.Linear(conv.weight[0].numel(), D) for conv in self.x_embedder)
        self.blocks = nn.ModuleList(Block(D, config.heads, config.mlp_ratio, D) for _ in range(config.depth))
        self.encoder_norm = FinalNorm(D, D)

    decoder_blocks = ()

    active = 0

    @property
    def nets(self) -> list[DiTOnOurBlocks]:
        """Where ``phmdiff_fast.step`` finds the blocks to compile, and the average what to follow."""
        return [self]

    def forward(self, target: Tensor, sources: Tensor, *others, **more) -> LossTerms:
        """Called as ``PHMDiff.loss`` by ``phmdiff_fast.step``: compilation and CUDA graphs as ours."""
        total = self.loss(target, sources)
        nothing = torch.zeros_like(total.detach())
        return LossTerms(total, total.detach(), nothing, nothing)

    def load_peer(self, peer: DiT) -> None:
        """Take the weights of a ``DiT`` of the same sizes."""
        state = peer.state_dict()
        convolved = [name for name in state if name.startswith("x_embedder") and name.endswith("weight")]
        self.load_state_dict(state | {name: state[name].flatten(1) for name in convolved})

    def levels_of(self, x: Tensor) -> list[Tensor]:
        return build_pyramid(x, len(self.grids))

    def conditions(self, t: Tensor) -> list[list[Tensor]]:
        """The vectors of every block, (B, 6 D) each and (B, 2 D), by one product a layer for all levels."""
        levels = len(self.grids)
        c = F.silu((self.t_embedder(t) + self.level_embed.weight[:, None]).flatten(0, 1))  # (L B, D)
        vectors = [layer.adaLN_modulation[1](c).split(len(t)) for layer in (*self.blocks, self.encoder_norm)]
        return [[v[n] for v in vectors] for n in range(levels)]

    def predict(self, n: int, y: Tensor, sources: Tensor, coarse, abar: Tensor, c, draws: Draws) -> Tensor:
        layer, abar = self.x_embedder[n], abar.flatten()
        scaled = self.config.scale_state and self.config.prediction != "eps"
        x = embed_visible(y, sources, coarse, abar, None, layer.weight, layer.bias, getattr(self, f"pos{n}"),
                          eps=draws.eps[n], state_scale=abar.sqrt() if scaled else None)  # fmt: skip
        x = run_blocks(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x, self.blocks, c)
        return unpatchify(self.final_layer[n](x), self.config.patch, *y.shape[2:])


class LoopEMA:
    """MaskDiT's update_ema: one parameter after the other."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self._weights = dict(model.named_parameters())
        self._shadow = {name: p.detach().clone() for name, p in self._weights.items()}

    @property
    def shadow(self) -> list[Tensor]:
        return list(self._shadow.values())

    @torch.no_grad()
    def update(self, step: int) -> None:
        for name, weight in self._weights.items():
            self._shadow[name].mul_(self.decay).add_(weight.data, alpha=1 - self.decay)


# --- arithmetic --------------------------------------------------------------------------------------


def _blocks(tokens: int, width: int, depth: int, mlp_ratio: float, cond: int) -> int:
    """Forward operations of some blocks and the norm behind them, an image."""
    hidden = int(width * mlp_ratio)
    products = 2 * tokens * width * (4 * width + 2 * hidden)  # qkv, proj; both layers of the MLP
    scores = 4 * tokens * tokens * width  # q k, and their softmax times v
    return depth * (products + scores + 12 * cond * width) + 4 * cond * width  # the modulations: 6 and 2 vectors


def flops(form: str, config: ModelConfig, source_channels: int, target_channels: int, side: int) -> int:
    """Operations of products and attention in forward and backward of one image (a multiply-add is two).

    form : "dit" | "maskdit" | "ours" (masked) | "unmasked" (ours without a mask). Backward is twice forward, and
    once where the input needs no gradient (patches, sinusoids). Stem, head and MMD are not counted; ours
    with ``prediction="x0"``, reading "maskdit" and lockstep.
    """
    p, D, Dd, last = config.patch, config.width, config.decoder_width, len(config.levels) - 1
    once = 2 * 2 * 256 * D  # the sinusoids' layer, forward and the weight's gradient
    total = (once + 3 * 2 * D * D) * (last + 1 if form in ("dit", "maskdit") else 1)
    for n, level in enumerate(config.levels):
        tokens = (side // 2**n // p) ** 2
        keep = num_kept(tokens, level.mask_ratio) if form in ("maskdit", "ours") else tokens
        values = p * p * (source_channels + target_channels * (2 if n < last else 1))
        embedded = tokens * D
        if form in ("ours", "unmasked"):
            masked = (tokens - keep) * Dd if config.decoder_input == "noisy" else 0
            embedded = keep * D + masked
        total += 2 * 2 * values * embedded
        forward = _blocks(keep, D, config.depth, config.mlp_ratio, D)
        width = D
        if form != "dit":
            forward += 2 * keep * D * Dd + _blocks(tokens, Dd, config.decoder_depth, config.mlp_ratio, D)
            width = Dd
        forward += 2 * tokens * width * p * p * target_channels
        total += 3 * forward
    return total
