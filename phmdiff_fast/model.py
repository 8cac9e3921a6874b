"""MaskedDiT: a diffusion transformer whose encoder sees only the patches that are kept.

Encoder: DiT blocks (adaLN-Zero, Peebles & Xie 2023) on visible tokens. Decoder: a few narrow DiT
blocks on all tokens. A stem of convolutions reads the noise-free sources, a head of convolutions
writes the image; both are optional. One set of blocks serves every level of the pyramid; each level
has its own patch embedding and output projection.

Shapes: B batch, C target channels, Cs source channels, N tokens of a level, K kept, D width,
Dd decoder width, p patch side, M stem maps.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attend
from .config import ModelConfig
from .kernels.adaln import adaln_modulate, gated_residual_adaln
from .kernels.patch_mask import embed_visible, restore_tokens, unpatchify


def sincos_positions(rows: int, cols: int, width: int) -> Tensor:
    """Fixed 2D sin-cos positions (rows * cols, width); half the width for each axis (MAE, He 2022)."""
    quarter = width // 4
    omega = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    row = torch.arange(rows, dtype=torch.float64)[:, None] * omega
    col = torch.arange(cols, dtype=torch.float64)[:, None] * omega
    row = torch.cat([row.sin(), row.cos()], 1)[:, None].expand(rows, cols, -1)
    col = torch.cat([col.sin(), col.cos()], 1)[None].expand(rows, cols, -1)
    return torch.cat([row, col], 2).reshape(rows * cols, width).float()


def _wide(x: Tensor) -> Tensor:
    """16-bit to float32: the residual stream and the output keep full precision under autocast."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class TimestepEmbedder(nn.Module):
    """Sinusoids of t, then a two-layer MLP."""

    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequencies // 2
        omega = torch.exp(-math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
        angle = t[:, None].float() * omega  # (B, half)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], -1))  # (B, D)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attend(self.qkv(x), self.heads))  # (B, N, D)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """The learned parts of a DiT block; ``run_blocks`` chains them so that each residual is fused."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, cond_width: int):
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond_width, 6 * width))


class FinalNorm(nn.Module):
    """The modulation behind the last block: shift and scale (B, D) each."""

    def __init__(self, width: int, cond_width: int):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond_width, 2 * width))


def run_blocks(x: Tensor, blocks: nn.ModuleList, vectors: list[Tensor]) -> Tensor:
    """x (B, N, D) through all blocks and the final modulated norm.

    vectors : a block's (B, 6 D) each, then the final norm's (B, 2 D), as the modulations give them
    A block is x += gate attn(LN(x)), x += gate mlp(LN(x)). Every sum is fused with the norm that
    reads it, over the border of a block too, so x is written and read once a sum.
    """
    parts = [v.chunk(6, dim=1) for v in vectors[:-1]] + [vectors[-1].chunk(2, dim=1)]
    # Outside autocast all is one type; inside, x stays float32 and the branches are 16-bit.
    normed = adaln_modulate(x, *parts[0][:2])
    for block, (_, _, gate1, shift2, scale2, gate2), (shift, scale, *_) in zip(
        blocks, parts[:-1], parts[1:], strict=True
    ):
        x, normed = gated_residual_adaln(x, block.attn(normed), gate1, shift2, scale2)
        x, normed = gated_residual_adaln(x, block.mlp(normed), gate2, shift, scale)
    return normed  # (B, N, D)


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)


class ResidualConv(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))): the second convolution starts at zero."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8 if width % 8 == 0 else 1, width), _conv(width, width)
        self.norm2, self.conv2 = nn.GroupNorm(8 if width % 8 == 0 else 1, width), _conv(width, width)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(x1)))


class Stem(nn.Module):
    """Convolutions over the sources: one map a level, (B, M_n, H / 2^n, W / 2^n), M_n = width 2^min(n, 2).

    Down through the resolutions, then back up: each map takes the coarser one's context in (1x1
    convolution, nearest neighbour). It never sees noise, so sampling computes it once a slice, not
    once a step.
    """

    def __init__(self, channels: int, width: int, levels: int):
        super().__init__()
        self.widths = [width * 2 ** min(n, 2) for n in range(levels)]
        pairs = list(zip(self.widths, self.widths[1:], strict=False))  # (finer, coarser)
        self.first = _conv(channels, width)
        self.down = nn.ModuleList(_conv(fine, coarse, stride=2) for fine, coarse in pairs)
        self.blocks = nn.ModuleList(ResidualConv(w) for w in self.widths)
        self.up = nn.ModuleList(nn.Conv2d(coarse, fine, 1) for fine, coarse in pairs)

    def forward(self, sources: Tensor) -> list[Tensor]:
        x = self.blocks[0](self.first(sources.contiguous(memory_format=torch.channels_last)))
        maps = [x]
        for down, block in zip(self.down, self.blocks[1:], strict=True):
            x = block(down(x))
            maps.append(x)
        for n in reversed(range(len(self.up))):
            maps[n] = maps[n] + F.interpolate(self.up[n](maps[n + 1]), size=maps[n].shape[2:])
        return maps


class Head(nn.Module):
    """Convolutions from unpatchified tokens and noise-free skips to the image."""

    def __init__(self, inputs: int, width: int, channels: int):
        super().__init__()
        self.first = nn.Conv2d(inputs, width, 1)
        self.block = ResidualConv(width)
        self.last = _conv(width, channels)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, *maps: Tensor) -> Tensor:
        x = torch.cat(maps, 1).contiguous(memory_format=torch.channels_last)
        return self.last(F.silu(self.block(self.first(x))))


class MaskedDiT(nn.Module):
    """The transformer of PHMDiff for all levels of the pyramid.

    Parameters
    ----------
    config : ModelConfig
    source_channels, target_channels : Cs and C

    ``forward`` predicts one level (B, C, H, W); H and W are multiples of the patch side. With
    ``learn_variance`` it gives (B, 2 C, H, W): the prediction, then the variance's fraction (Eq. 4).
    """

    def __init__(self, config: ModelConfig, source_channels: int, target_channels: int = 1):
        super().__init__()
        self.config, self.source_channels, self.target_channels = config, source_channels, target_channels
        levels, p, D, Dd = len(config.levels), config.patch, config.width, config.decoder_width
        self.stem = Stem(source_channels, config.stem_width, levels) if config.stem else None
        maps = self.stem.widths if self.stem else [0] * levels
        # Channels of a patch at each level: state, sources, stem maps, coarse_up (none at the coarsest).
        coarse = [target_channels * (n < levels - 1) for n in range(levels)]
        clean = [p * p * (source_channels + maps[n]) for n in range(levels)]
        values = [c + p * p * (target_channels + coarse[n]) for n, c in enumerate(clean)]
        diffmae = config.reading == "diffmae"

        self.t_embedder = TimestepEmbedder(D)
        self.level_embed = nn.Embedding(levels, D)
        if config.coarse == "teacher":
            self.coarse_t_embedder = TimestepEmbedder(D)
        self.x_embedder = nn.ModuleList(nn.Linear(v, D) for v in (clean if diffmae else values))
        self.blocks = nn.ModuleList(Block(D, config.heads, config.mlp_ratio, D) for _ in range(config.depth))
        self.encoder_norm = FinalNorm(D, D)
        self.to_decoder = nn.Linear(D, Dd)
        if config.decoder_input == "noisy":
            self.decoder_embedder = nn.ModuleList(nn.Linear(v, Dd) for v in values)
        if config.decoder_input == "token" or diffmae:
            self.mask_token = nn.Parameter(torch.zeros(Dd))
        self.decoder_blocks = nn.ModuleList(
            Block(Dd, config.decoder_heads, config.mlp_ratio, D) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = FinalNorm(Dd, D)
        self.output_channels = target_channels * (2 if config.learn_variance else 1)
        outputs = config.head_width if config.head else self.output_channels
        self.final_layer = nn.ModuleList(nn.Linear(Dd, p * p * outputs) for _ in range(levels))
        if config.head:
            skips = [source_channels + maps[n] + coarse[n] for n in range(levels)]
            self.heads = nn.ModuleList(Head(outputs + s, config.head_width, self.output_channels) for s in skips)
        self._positions: dict = {}
        self._initialise()

    def _initialise(self) -> None:
        """Xavier for the linear layers, zero for every modulation (adaLN-Zero) and, without a head, the output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.level_embed.weight, std=0.02)
        for embedder in (m for m in self.modules() if isinstance(m, TimestepEmbedder)):
            for part in (embedder.mlp[0], embedder.mlp[2]):
                nn.init.normal_(part.weight, std=0.02)
        if hasattr(self, "mask_token"):
            nn.init.normal_(self.mask_token, std=0.02)
        modulated = [*self.blocks, *self.decoder_blocks, self.encoder_norm, self.decoder_norm]
        zeroed = [m.adaLN_modulation[-1] for m in modulated] + ([] if self.config.head else list(self.final_layer))
        for layer in zeroed:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def positions(self, rows: int, cols: int, width: int, device) -> Tensor:
        """Cached ``sincos_positions`` on ``device``."""
        key = (rows, cols, width, str(device))
        if key not in self._positions:
            self._positions[key] = sincos_positions(rows, cols, width).to(device)
        return self._positions[key]

    def modulations(self, t: Tensor, coarse_t: Tensor | None = None) -> list[list[Tensor]]:
        """The adaLN vectors of all levels, one matrix product a layer.

        t : (B,) int64, shared by all levels, or (L, B); coarse_t : (B,) int64, how noisy the coarse
        images are (``coarse="teacher"`` only; None is 0). Returns for each level a list over encoder
        blocks and norm, decoder blocks and norm: (B, 6 D) or (B, 2 D) each.
        """
        levels = self.level_embed.num_embeddings
        cond = self.t_embedder(t.flatten()).unflatten(0, t.shape) + self.level_embed.weight[:, None]  # (L, B, D)
        if self.config.coarse == "teacher":
            told = self.coarse_t_embedder(t.new_zeros(1) if coarse_t is None else coarse_t)
            cond = torch.cat([cond[:-1] + told, cond[-1:]])  # the coarsest level has nothing coarser
        layers = [*self.blocks, self.encoder_norm, *self.decoder_blocks, self.decoder_norm]
        vectors = [layer.adaLN_modulation(cond.flatten(0, 1)).unflatten(0, (levels, -1)) for layer in layers]
        return [[v[level] for v in vectors] for level in range(levels)]

    def source_maps(self, sources: Tensor) -> list[Tensor] | None:
        """Stem maps of full-resolution sources (B, Cs, H, W), one a level; None without a stem."""
        return self.stem(sources) if self.stem else None

    def forward(
        self, y: Tensor, sources: Tensor, coarse: Tensor | None, t: Tensor | None, abar: Tensor, level: int,
        *, vectors: list[Tensor] | None = None,
        stem_map: Tensor | None = None, coarse_up: Tensor | None = None,
        eps: Tensor | None = None, mask: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Predict one level from its merged state.

        y, eps (B, C, H, W): target and noise, which ``embed_visible`` merges (Eq. 6); a sampler gives
        y_t / sqrt(abar) as y and no eps. sources (B, Cs, H, W) at this level; coarse (B, C, h, w) or
        None at the coarsest level, coarse_up (B, C, H, W) the same upsampled (used by the head).
        t (B,) int64 (not read where ``vectors``, that is ``modulations(t)[level]``, are given); abar (B,)
        float32.
        mask: (keep_ids (B, K), inverse (B, N)) or None for all.
        Returns (B, C, H, W), float32 also under autocast.
        """
        config, p = self.config, self.config.patch
        height, width = y.shape[2:]
        grid = (height // p, width // p)
        vectors = self.modulations(t)[level] if vectors is None else vectors
        encoder, decoder = vectors[: config.depth + 1], vectors[config.depth + 1 :]
        inputs = sources if stem_map is None else torch.cat([sources, stem_map.to(sources.dtype)], 1)
        state_scale = abar.sqrt() if config.scale_state and config.prediction != "eps" else None
        diffmae = config.reading == "diffmae"

        def embed(ids, layer, pos, clean=False):
            """Tokens of patches; ``clean``: of the sources alone, no state and nothing coarse."""
            state = (y[:, :0], inputs, None) if clean else (y, inputs, coarse)
            return embed_visible(*state, abar, ids, layer.weight, layer.bias, pos,
                                 eps=None if clean else eps, state_scale=state_scale)  # fmt: skip

        keep_ids, inverse = (None, None) if mask is None else mask
        pos = self.positions(*grid, config.width, y.device)
        x = _wide(embed(keep_ids, self.x_embedder[level], pos, clean=diffmae))  # (B, K, D)
        x = run_blocks(x, self.blocks, encoder)  # (B, K, D)
        x = self.to_decoder(x)  # (B, K, Dd)

        pos = self.positions(*grid, config.decoder_width, y.device)
        if mask is None:
            x = x + pos
        else:
            if config.decoder_input == "noisy" and not diffmae:
                fill = embed(dropped_ids(inverse, keep_ids.shape[1]), self.decoder_embedder[level], None)
            else:
                fill = self.mask_token
            x = restore_tokens(x, fill, inverse, pos)  # (B, N, Dd)
        if diffmae:  # every target patch is denoised, beside what the encoder made of the source there
            x = x + embed(None, self.decoder_embedder[level], None)
        x = run_blocks(_wide(x), self.decoder_blocks, decoder)  # (B, N, Dd)
        x = unpatchify(self.final_layer[level](x), p, height, width)  # (B, outputs, H, W)
        if config.head:
            skips = [sources] + [m for m in (stem_map, coarse_up) if m is not None]
            x = self.heads[level](x, *skips)
        return _wide(x)


def dropped_ids(inverse: Tensor, num_keep: int) -> Tensor:
    """The complement of the kept ids, (B, N - K) int32 ascending, from ``inverse`` (B, N)."""
    kept = (inverse >= 0).to(torch.uint8)
    return kept.argsort(dim=1, stable=True)[:, : inverse.shape[1] - num_keep].to(torch.int32)  # no sync, unlike nonzero
