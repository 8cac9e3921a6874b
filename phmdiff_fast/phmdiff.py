"""PHMDiff: the method. Levels, merged state (Eq. 6), coarse to fine; ties the network to the diffusion.

Training walks down the pyramid once to make the levels and once up, coarse to fine: each level's
one-step x0 estimate, detached and clamped, is merged into the next finer level's state. Sampling
walks the same way up at every timestep (lockstep: all levels share t).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import losses
from .config import ModelConfig, TrainConfig
from .diffusion import Schedule, noised, x0_from_eps
from .kernels import _philox
from .kernels.patch_mask import draw_mask
from .masking import mask_ratios, num_kept
from .model import MaskedDiT
from .pyramid import build_pyramid, per_sample, upsample
from .sampling import ddim


@dataclass
class LossTerms:
    """What a training step returns: ``total`` carries the gradient, the rest is for the log."""

    total: Tensor
    denoise: Tensor  # (L,) per level, fine to coarse, detached
    mmd: Tensor  # (L,)


class PHMDiff(nn.Module):
    """The Pyramid Hierarchical Masked Diffusion Model (arXiv 2507.16579).

    Parameters
    ----------
    config : ModelConfig
    source_channels, target_channels : Cs and C
    complexity : mean gradient magnitude of each level, for the mask ratios; None: the ratios as given
    """

    def __init__(self, config: ModelConfig, source_channels: int, target_channels: int = 1, complexity=None):
        super().__init__()
        self.config = config
        self.schedule = Schedule(config.timesteps, config.beta_start, config.beta_end)
        self.net = MaskedDiT(config, source_channels, target_channels)
        self.ratios = mask_ratios(config.levels, complexity, config.complexity_gain)
        self.num_levels = len(config.levels)

    @property
    def multiple(self) -> int:
        """Sides are padded to a multiple of this: patch x 2^(levels - 1)."""
        return self.config.patch * 2 ** (self.num_levels - 1)

    def pad(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> sides up to ``multiple``, filled with -1, the background of a scaled image."""
        down, right = (-x.shape[2] % self.multiple, -x.shape[3] % self.multiple)
        return F.pad(x, (0, right, 0, down), value=-1.0) if down or right else x

    def _mask(self, level: int, num_patches: int, sample_ids: Tensor, rng):
        keep = num_kept(num_patches, self.ratios[level])
        if keep == num_patches:
            return None
        return draw_mask(sample_ids, num_patches, keep, rng=rng, stream=_philox.mask_stream(level))

    def _predict(self, level, y, sources, coarse, t, abar, maps, vectors, *, eps=None, mask=None) -> Tensor:
        coarse_up = None if coarse is None else upsample(coarse, *y.shape[2:])
        stem_map = None if maps is None else maps[level]
        return self.net(y, sources, coarse, t, abar, level, vectors=vectors[level],
                        stem_map=stem_map, coarse_up=coarse_up, eps=eps, mask=mask)  # fmt: skip

    def loss(
        self, target: Tensor, sources: Tensor, sample_ids: Tensor, rng, train: TrainConfig, *, masked: bool
    ) -> LossTerms:
        """Loss of one batch; all randomness is a function of (seed, sample, step).

        target (B, C, H, W) and sources (B, Cs, H, W) in [-1, 1]; sample_ids (B,) int64; rng (seed, step).
        masked: pre-training with masks, else the unmasked fine-tuning of III.B.3.
        """
        targets = build_pyramid(self.pad(target), self.num_levels)
        source_levels = build_pyramid(self.pad(sources), self.num_levels)
        maps = self.net.source_maps(source_levels[0])
        t = self.schedule.draw(sample_ids, rng, train.last_t_share)
        abar = self.schedule(t)
        vectors = self.net.modulations(t)
        weights = [spec.weight for spec in self.config.levels]
        denoise, mmd = [], []
        coarse = None  # 0 at the coarsest level: ours, the paper does not say
        for level in reversed(range(self.num_levels)):
            y = targets[level]
            eps = _philox.normals(sample_ids, y[0].numel(), rng=rng, stream=_philox.EPS + level).view_as(y)
            num_patches = y.shape[2] * y.shape[3] // self.config.patch**2
            mask = self._mask(level, num_patches, sample_ids, rng) if masked else None
            out = self._predict(level, y, source_levels[level], coarse, t, abar, maps, vectors, eps=eps, mask=mask)
            term, x0, eps_hat = self._level_loss(out, y, eps, abar, mask, train)
            denoise.append(term)
            mmd.append(
                losses.cross_granularity(eps, eps_hat, self.config.patch, train.mmd_rows, sample_ids, level, rng)
                if train.mmd_weight > 0
                else term.new_zeros(())
            )
            coarse = x0.detach().clamp(-1, 1)
        denoise, mmd = torch.stack(denoise[::-1]), torch.stack(mmd[::-1])
        share = denoise.new_tensor(weights) / sum(weights)
        total = (share * denoise).sum() + train.mmd_weight * mmd.sum()
        return LossTerms(total, denoise.detach(), mmd.detach())

    def _level_loss(self, out: Tensor, y: Tensor, eps: Tensor, abar: Tensor, mask, train: TrainConfig):
        """(scalar loss, x0 estimate, predicted noise) of one level from the network's output (B, C, H, W)."""
        y_t = noised(y, eps, abar)
        if self.config.prediction == "x0":
            x0, eps_hat = out, losses.implied_noise(y_t, out, eps, abar)
            term = losses.elementwise(out, y, train.loss)
        else:
            x0, eps_hat = x0_from_eps(y_t, out, abar), out
            term = losses.elementwise(out, eps, train.loss)
        if mask is None or self.config.decoder_input == "noisy":
            return term.mean(), x0, eps_hat
        # decoder_input="token": noise at an unseen place cannot be predicted, so masked tokens stand for x0.
        visible = losses.visible_pixels(mask[1], self.config.patch, *y.shape[2:])
        hidden = losses.elementwise(out, y, train.loss)
        term = torch.where(visible, term, train.token_x0_weight * hidden)
        return term.mean(), torch.where(visible, x0, out), torch.where(visible, eps_hat, eps)

    @torch.no_grad()
    def denoise(self, states: list[Tensor], t: int, source_levels: list[Tensor], maps) -> list[Tensor]:
        """x0 estimates of all levels, coarse to fine, from y_t a level; lists are fine to coarse."""
        batch = states[0].shape[0]
        steps = torch.full((batch,), t, dtype=torch.int64, device=states[0].device)
        abar = self.schedule(steps)
        vectors = self.net.modulations(steps)
        out: list[Tensor] = [states[0]] * self.num_levels
        coarse = None
        for level in reversed(range(self.num_levels)):
            y_t = states[level]
            clean = y_t / per_sample(abar.sqrt())  # embed_visible multiplies by sqrt(abar) again
            x0 = self._predict(level, clean, source_levels[level], coarse, steps, abar, maps, vectors)
            if self.config.prediction == "eps":
                x0 = x0_from_eps(y_t, x0, abar)
            out[level] = coarse = x0.clamp(-1, 1)
        return out

    @torch.no_grad()
    def translate(
        self, sources: Tensor, sample_ids: Tensor, *, steps: int = 1, seed: int = 0, progress=None
    ) -> list[Tensor]:
        """Synthesize the target of sources (B, Cs, H, W) in [-1, 1].

        sample_ids (B,) int64 name the slices, so the same seed gives the same noise whatever the batch.
        Returns the levels, fine to coarse: [0] is (B, C, H, W) in [-1, 1].
        """
        height, width = sources.shape[2:]
        source_levels = build_pyramid(self.pad(sources), self.num_levels)
        maps = self.net.source_maps(source_levels[0])
        shape = (len(sources), self.net.target_channels)
        noise = []
        for level, source in enumerate(source_levels):
            values = self.net.target_channels * source.shape[2] * source.shape[3]
            drawn = _philox.normals(sample_ids, values, rng=(seed, 0), stream=_philox.EPS + level)
            noise.append(drawn.view(*shape, *source.shape[2:]))
        levels = ddim(lambda y, t: self.denoise(y, t, source_levels, maps), noise, self.schedule.abar, steps,
                      progress=progress)  # fmt: skip
        cropped = []
        for image in levels:
            cropped.append(image[..., :height, :width])
            height, width = -(-height // 2), -(-width // 2)
        return cropped
