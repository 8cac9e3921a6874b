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
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Block, FinalNorm, run_blocks
from .config import ModelConfig
from .convolutions import Head, PyramidHead, Stem
from .kernels.patch_mask import embed_visible, restore_tokens, unpatchify
from .packing import Packing, packing_of
from .stages import stage


def sincos_positions(rows: int, cols: int, width: int, device=None) -> Tensor:
    """Fixed 2D sin-cos positions (rows * cols, width); half the width for each axis (MAE, He 2022)."""
    quarter = width // 4
    count = lambda n: torch.arange(n, dtype=torch.float64, device=device)  # noqa: E731
    omega = 10000.0 ** -(count(quarter) / quarter)
    row, col = count(rows)[:, None] * omega, count(cols)[:, None] * omega
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
        angle = torch.cat([angle.cos(), angle.sin()], -1).to(self.mlp[0].weight.dtype)
        return self.mlp(angle)  # (B, D)


@dataclass
class LevelInput:
    """What the network reads at one level; shapes as in ``MaskedDiT.forward``."""

    level: int
    y: Tensor
    sources: Tensor
    coarse: Tensor | None
    abar: Tensor
    stem_map: Tensor | None = None
    coarse_up: Tensor | None = None
    eps: Tensor | None = None
    mask: tuple[Tensor, Tensor] | None = None
    stem_to_tokens: bool = True
    below: Tensor | None = None  # features of the coarser level's head, for a pyramid head
    features: Tensor | None = None  # of this level's own, once it has run
    kept: Tensor | None = None  # (B, K) int32: the patches that are computed at all, in synthesis; None: all
    empty: Tensor | None = None  # (1, N, P): the tokens in front of the head that stand in the others' place
    record: bool = False  # whether to hand on this level's own, once it has run:
    tokens: Tensor | None = None  # (B, N, P)

    def __post_init__(self):
        # What the patches show of the noise-free side.
        self.channels = self.sources
        if self.stem_map is not None and self.stem_to_tokens:
            self.channels = torch.cat([self.sources, self.stem_map.to(self.sources.dtype)], 1)


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
        self.goes_up = config.head and config.head_kind == "pyramid"
        back = not self.goes_up  # a pyramid head brings the context back up itself
        self.stem = Stem(source_channels, config.stem_width, levels, back) if config.stem else None
        maps = self.stem.widths if self.stem else [0] * levels
        # Channels of a patch at each level: state, sources, stem maps, coarse_up (none at the coarsest).
        coarse = [target_channels * (n < levels - 1) for n in range(levels)]
        shown = maps if config.stem_to_tokens else [0] * levels
        clean = [p * p * (source_channels + shown[n]) for n in range(levels)]
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
        skips = [source_channels + maps[n] + coarse[n] for n in range(levels)]
        if self.goes_up:
            widths = [*(config.head_width * 2 ** min(n, 2) for n in range(levels)), 0]
            self.heads = nn.ModuleList(
                PyramidHead(outputs + skips[n], widths[n + 1], widths[n], self.output_channels) for n in range(levels)
            )
        elif config.head:
            self.heads = nn.ModuleList(Head(outputs + s, config.head_width, self.output_channels) for s in skips)
        self.recompute = False  # activation checkpointing
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
            self._positions[key] = sincos_positions(rows, cols, width, device)
        return self._positions[key]

    def modulations(self, t: Tensor, coarse_t: Tensor | None = None) -> list[list[Tensor]]:
        """The adaLN vectors of all levels, one matrix product a layer.

        t : (B,) int64, shared by all levels, or (L, B); coarse_t : (B,) int64, how noisy the coarse
        images are (``coarse="teacher"`` only; None is 0). Returns for each level a list over encoder
        blocks and norm, decoder blocks and norm: (B, 6 D) or (B, 2 D) each.
        """
        levels = self.level_embed.num_embeddings
        # Split, not indexed: backward then joins the levels' gradients once instead of adding up mostly zeros.
        split = [v.split(v.shape[0] // levels) for v in self.packed_modulations(t, coarse_t)]
        return [[v[level] for v in split] for level in range(levels)]

    def packed_modulations(self, t: Tensor, coarse_t: Tensor | None = None) -> list[Tensor]:
        """``modulations`` of all levels in one (L B, 6 D) or (L B, 2 D) a layer, level-major."""
        cond = self.t_embedder(t.flatten()).unflatten(0, t.shape) + self.level_embed.weight[:, None]  # (L, B, D)
        if self.config.coarse == "teacher":
            told = self.coarse_t_embedder(t.new_zeros(1) if coarse_t is None else coarse_t)
            cond = torch.cat([cond[:-1] + told, cond[-1:]])  # the coarsest level has nothing coarser
        cond = F.silu(cond.flatten(0, 1))  # (L B, D): the same in front of every layer
        layers = [*self.blocks, self.encoder_norm, *self.decoder_blocks, self.decoder_norm]
        return [layer.adaLN_modulation[1](cond) for layer in layers]

    def source_maps(self, sources: Tensor) -> list[Tensor] | None:
        """Stem maps of full-resolution sources (B, Cs, H, W), one a level; None without a stem."""
        return self.stem(sources) if self.stem else None

    def forward(
        self, y: Tensor, sources: Tensor, coarse: Tensor | None, t: Tensor | None, abar: Tensor, level: int,
        *, vectors: list[Tensor] | None = None,
        stem_map: Tensor | None = None, coarse_up: Tensor | None = None, below: Tensor | None = None,
        eps: Tensor | None = None, mask: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Predict one level from its merged state.

        y, eps (B, C, H, W): target and noise, which ``embed_visible`` merges (Eq. 6); a sampler gives
        y_t / sqrt(abar) as y and no eps. sources (B, Cs, H, W) at this level; coarse (B, C, h, w) or
        None at the coarsest level, coarse_up (B, C, H, W) the same upsampled (used by the head and by ``residual``).
        t (B,) int64 (not read where ``vectors``, that is ``modulations(t)[level]``, are given); abar (B,)
        float32. below : features of the coarser level's head (``LevelInput.features``), for a pyramid head.
        mask: (keep_ids (B, K), inverse (B, N)) or None for all.
        Returns (B, C, H, W), float32 also under autocast.
        """
        vectors = self.modulations(t)[level] if vectors is None else vectors
        return self.forward_levels([LevelInput(level, y, sources, coarse, abar, stem_map, coarse_up, eps, mask,
                                               self.config.stem_to_tokens, below)],
                                   vectors)[0]  # fmt: skip

    def forward_levels(self, inputs: list[LevelInput], vectors: list[Tensor]) -> list[Tensor]:
        """Predict some levels in one pass: their tokens lie in one buffer, and every layer runs once over all.

        vectors : a layer's (S, 6 D) or (S, 2 D) with the levels' rows in the order of ``inputs``; for all levels,
        fine to coarse, that is ``packed_modulations(t)``. Returns (B, C, H, W) a level as ``forward``.
        """
        depth = self.config.depth
        with stage("embed"):
            tokens = [self._encoder_tokens(at) for at in inputs]  # (B, K_l, D) each
        with stage("encoder"):
            x, packing = _packed(tokens)
            x = run_blocks(x, self.blocks, vectors[: depth + 1], packing, self.recompute)  # (T, D)
            x = self.to_decoder(x)  # (T, Dd)
        with stage("embed"):
            parts = [x] if packing is None else packing.views(x)
            tokens = [self._decoder_tokens(at, part) for at, part in zip(inputs, parts, strict=True)]  # (B, N_l, Dd)
        with stage("decoder"):
            x, packing = _packed(tokens)
            x = run_blocks(x, self.decoder_blocks, vectors[depth + 1 :], packing, self.recompute)
        with stage("head"):
            parts = [x] if packing is None else packing.views(x)
            images, below = [], None
            for at, part in reversed(list(zip(inputs, parts, strict=True))):  # coarse to fine
                at.below = at.below if below is None else below
                images.insert(0, self._image(at, part))
                below = at.features
            return images

    def _embed(self, at: LevelInput, ids, layer: nn.Linear, pos, clean: bool = False) -> Tensor:
        """Tokens of patches; ``clean``: of the sources alone, no state and nothing coarse."""
        state = (at.y[:, :0], at.channels, None) if clean else (at.y, at.channels, at.coarse)
        scaled = self.config.scale_state and self.config.prediction != "eps"
        return embed_visible(*state, at.abar, ids, layer.weight, layer.bias, pos, eps=None if clean else at.eps,
                             state_scale=at.abar.sqrt() if scaled else None)  # fmt: skip

    def _grid(self, at: LevelInput) -> tuple[int, int]:
        return at.y.shape[2] // self.config.patch, at.y.shape[3] // self.config.patch

    def _encoder_tokens(self, at: LevelInput) -> Tensor:
        """(B, K, D): of the kept patches, of all without a mask."""
        pos = self.positions(*self._grid(at), self.config.width, at.y.device)
        keep_ids = at.kept if at.mask is None else at.mask[0]
        clean = self.config.reading == "diffmae"
        return _wide(self._embed(at, keep_ids, self.x_embedder[at.level], pos, clean=clean))

    def _decoder_tokens(self, at: LevelInput, x: Tensor) -> Tensor:
        """x (B, K, Dd) back among the masked patches' own tokens: (B, N, Dd)."""
        diffmae = self.config.reading == "diffmae"
        pos = self.positions(*self._grid(at), self.config.decoder_width, at.y.device)
        if at.mask is None:
            x = x + (pos if at.kept is None else pos[at.kept.long()])
        else:
            keep_ids, inverse = at.mask
            if self.config.decoder_input == "noisy" and not diffmae:
                dropped = dropped_ids(inverse, keep_ids.shape[1])
                fill = self._embed(at, dropped, self.decoder_embedder[at.level], None)
            else:
                fill = self.mask_token
            x = restore_tokens(x, fill, inverse, pos)
        if diffmae:  # every target patch is denoised, beside what the encoder made of the source there
            x = x + self._embed(at, at.kept, self.decoder_embedder[at.level], None)
        return _wide(x)

    def _image(self, at: LevelInput, x: Tensor) -> Tensor:
        """Tokens (B, N, Dd) -> image (B, C, H, W), through the head where there is one."""
        x = self.final_layer[at.level](x)  # (B, N, P), or (B, K, P)
        at.tokens = x if at.record else None
        if at.kept is not None:
            everywhere = at.empty.to(x.dtype).expand(len(x), -1, -1)
            x = everywhere.scatter(1, at.kept.long()[..., None].expand_as(x), x)
        x = unpatchify(x, self.config.patch, *at.y.shape[2:])  # (B, outputs, H, W)
        if self.config.head:
            skips = [at.sources, *(part for part in (at.stem_map, at.coarse_up) if part is not None)]
            if self.goes_up:
                x, at.features = self.heads[at.level](at.below, x, *skips)
            else:
                x = self.heads[at.level](x, *skips)
        x = _wide(x)
        return x + at.coarse_up if self.config.residual and at.coarse_up is not None else x

    def let_go(self) -> None:
        """At the end of a forward pass: what its levels shared."""
        for block in [*self.blocks, *self.decoder_blocks]:
            block.let_go()

    def unused(self, masked_levels: set[int]) -> list[nn.Parameter]:
        """Parameters no gradient reaches in a step that masks these levels: what fills gaps where there are none."""
        idle: list[nn.Parameter] = []
        if hasattr(self, "mask_token") and not masked_levels:
            idle.append(self.mask_token)
        if hasattr(self, "decoder_embedder") and self.config.reading != "diffmae":
            for level, layer in enumerate(self.decoder_embedder):
                idle += [] if level in masked_levels else layer.parameters()
        return idle


def _packed(tokens: list[Tensor]) -> tuple[Tensor, Packing | None]:
    """Levels' tokens (B, N_l, D) as one buffer (T, D); a single level stays dense, (B, N, D)."""
    if len(tokens) == 1:
        return tokens[0], None
    packing = packing_of(tokens[0].shape[0], tuple(part.shape[1] for part in tokens))
    return packing.pack(tokens), packing


def dropped_ids(inverse: Tensor, num_keep: int) -> Tensor:
    """The complement of the kept ids, (B, N - K) int32 ascending, from ``inverse`` (B, N)."""
    kept = (inverse >= 0).to(torch.uint8)
    return kept.argsort(dim=1, stable=True)[:, : inverse.shape[1] - num_keep].to(torch.int32)  # no sync, unlike nonzero
