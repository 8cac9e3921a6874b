"""PHMDiff: the method. Levels, merged state (Eq. 6), coarse to fine; ties the network to the diffusion.

Training walks down the pyramid once to make the levels and once up, coarse to fine: each level's
one-step x0 estimate, detached and clamped, is merged into the next finer level's state (or, as a
teacher's, the true coarser image with noise on it). Sampling walks the same way up: at every timestep
(lockstep: all levels share t), or with each level sampled to its end before the next (cascade).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import losses
from .config import ModelConfig, SampleConfig, TrainConfig
from .conv_denoiser import ConvDenoiser
from .diffusion import Schedule, noised, snr_weight, to_x0, truth
from .engine import Engine
from .kernels import _philox
from .kernels.patch_mask import draw_mask
from .masking import mask_ratios, num_kept
from .model import LevelInput, MaskedDiT
from .pyramid import build_pyramid, per_sample, upsample
from .stages import stage


@dataclass
class LossTerms:
    """What a training step returns: ``total`` carries the gradient, the rest is for the log."""

    total: Tensor
    denoise: Tensor  # (L,) per level, fine to coarse, detached
    mmd: Tensor  # (L,)
    vlb: Tensor  # (L,) bits a pixel and step, 0 unless the variance is learned


@dataclass
class _Levels:
    """A training step's levels, fine to coarse: one entry of each list a level."""

    targets: list[Tensor]  # (B, C, H_n, W_n)
    sources: list[Tensor]  # (B, Cs, H_n, W_n)
    t: list[Tensor]  # (B,) int64
    abar: list[Tensor]  # (B,)
    masks: list[tuple[Tensor, Tensor] | None]
    eps: list[Tensor]
    shared_t: Tensor  # (B,) or (L, B)
    coarse_t: Tensor | None  # (B,): the levels do not wait for each other's estimates
    told: list[Tensor | None]  # with coarse_t: the noised truth that a level reads as its coarse image


class PHMDiff(nn.Module):
    """The Pyramid Hierarchical Masked Diffusion Model (arXiv 2507.16579).

    Parameters
    ----------
    config : ModelConfig
    source_channels, target_channels : Cs and C
    complexity : mean gradient magnitude of each level, for the mask ratios; None: the ratios as given
    members : how many networks; None: those of the settings, 1 where they leave it open
    """

    def __init__(
        self, config: ModelConfig, source_channels: int, target_channels: int = 1, complexity=None, *,
        members: int | None = None,
    ):  # fmt: skip
        super().__init__()
        self.config = config
        self.schedule = Schedule(config.timesteps, config.beta_start, config.beta_end, config.schedule)
        network = ConvDenoiser if config.denoiser == "convolutions" else MaskedDiT
        count = members or config.members or 1
        nets = [network(config, source_channels, target_channels) for _ in range(count)]
        self.net, self.others = nets[0], nn.ModuleList(nets[1:])
        self.active = 0  # the member that ``loss`` trains
        self.usable = count  # how many of them ``translate`` averages
        self.ratios = mask_ratios(config.levels, complexity, config.complexity_gain)
        self.num_levels = len(config.levels)
        weights = [spec.weight for spec in config.levels]
        self.shares = [weight / sum(weights) for weight in weights]  # of each level in the loss

    @property
    def nets(self) -> list[nn.Module]:
        """The members' networks, in the order in which they are trained."""
        return [self.net, *self.others]

    @property
    def multiple(self) -> int:
        """Sides are padded to a multiple of this: patch x 2^(levels - 1)."""
        return self.config.patch * 2 ** (self.num_levels - 1)

    def pad(self, x: Tensor, value: float = -1.0) -> Tensor:
        """(B, C, H, W) -> sides up to ``multiple``, filled with -1, the background of a scaled image."""
        down, right = (-x.shape[2] % self.multiple, -x.shape[3] % self.multiple)
        return F.pad(x, (0, right, 0, down), value=value) if down or right else x

    def _mask(self, level: int, num_patches: int, sample_ids: Tensor, rng, foreground: Tensor | None):
        keep = num_kept(num_patches, self.ratios[level])
        if keep == num_patches:
            return None
        drop_first = None if foreground is None else losses.background_patches(foreground, self.config.patch)
        return draw_mask(sample_ids, num_patches, keep, rng=rng, stream=_philox.mask_stream(level),
                         drop_first=drop_first)  # fmt: skip

    def _foreground_levels(self, foreground: Tensor | None) -> list[Tensor | None]:
        """Bool images (B, 1, H_n, W_n) a level, True where any pixel below is; None where none is used."""
        if foreground is None or not self.config.drop_background:
            return [None] * self.num_levels
        levels = build_pyramid(self.pad(foreground.float(), 0.0), self.num_levels)
        return [level > 0 for level in levels]

    def at_level(self, level, y, sources, coarse, abar, maps, *, eps=None, mask=None, below=None) -> LevelInput:
        """What the network reads at one level."""
        config = self.config
        needs_up = coarse is not None and (config.head or config.residual or config.denoiser == "convolutions")
        return LevelInput(level, y, sources, coarse, abar, None if maps is None else maps[level],
                          upsample(coarse, *y.shape[2:]) if needs_up else None, eps, mask, config.stem_to_tokens,
                          below)  # fmt: skip

    def split(self, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """(prediction, variance fraction or None), (B, C, H, W) each, of the network's output."""
        return out.chunk(2, 1) if self.config.learn_variance else (out, None)

    def normals(self, sample_ids: Tensor, like: Tensor, rng, stream: int) -> Tensor:
        return _philox.normals(sample_ids, like[0].numel(), rng=rng, stream=stream).view_as(like)

    def loss(
        self, target: Tensor, sources: Tensor, sample_ids: Tensor, rng, train: TrainConfig, *, masked: bool,
        foreground: Tensor | None = None, gather: losses.Gather | None = None,
    ) -> LossTerms:  # fmt: skip
        """Loss of one batch; all randomness is a function of (seed, sample, step).

        target (B, C, H, W) and sources (B, Cs, H, W) in [-1, 1]; sample_ids (B,) int64; rng (seed, step).
        masked: pre-training with masks, else the unmasked fine-tuning of III.B.3. foreground
        (B, 1, H, W) bool: with ``drop_background``, patches without any are masked first. gather: of a batch shared by
        several processes, so that the MMD is of all its images (``parallel``).
        """
        config = self.config
        with stage("levels"):
            at = self._levels_of(target, sources, sample_ids, rng, train, masked, foreground)
        net = self.nets[self.active]
        outs = self._all_at_once(net, at) if at.coarse_t is not None else self._one_by_one(net, at)
        net.let_go()
        terms = []
        for level, out in enumerate(outs):
            with stage("loss"):
                out, fraction = self.split(out)
                y, eps, abar, mask = at.targets[level], at.eps[level], at.abar[level], at.masks[level]
                y_t = noised(y, eps, abar)
                denoise, x0, eps_hat = self._level_loss(out, y, y_t, eps, abar, mask, train)
                if train.ssim_weight and min(y.shape[2:]) >= losses.SSIM_SIDE:
                    denoise = denoise + train.ssim_weight * (1 - losses.similarity(x0, y)).mean()
                mmd = vlb = denoise.new_zeros(())
            if train.mmd_weight > 0:
                with stage("mmd"):
                    mmd = losses.cross_granularity(eps, eps_hat, config.patch, train.mmd_rows, sample_ids, level, rng,
                                                   train.mmd_kernel, gather)  # fmt: skip
            if fraction is not None:
                vlb = losses.variational_bound(fraction, x0, y, y_t, at.t[level], self.schedule).mean()
            terms.append((denoise, mmd, vlb))
        denoise, mmd, vlb = (torch.stack(term) for term in zip(*terms, strict=True))  # (L,) each
        total = sum(part * term for part, term in zip(self.shares, denoise, strict=True))
        total = total + train.mmd_weight * mmd.sum()
        if config.learn_variance:  # L_hybrid of Nichol & Dhariwal: the bound sums over all T steps
            bound = sum(part * term for part, term in zip(self.shares, vlb, strict=True))
            total = total + train.vlb_weight * self.schedule.timesteps * bound
        return LossTerms(total, denoise.detach(), mmd.detach(), vlb.detach())

    forward = loss  # what DistributedDataParallel and FSDP2 wrap

    def unused(self, masked: bool, height: int, width: int) -> list[nn.Parameter]:
        """Parameters that no gradient reaches in a training step of this stage on (height, width) images."""
        sides = [-(-side // self.multiple) * self.multiple // self.config.patch for side in (height, width)]
        numbers = [(sides[0] >> n) * (sides[1] >> n) for n in range(self.num_levels)]
        kept = [num_kept(number, ratio) for number, ratio in zip(numbers, self.ratios, strict=True)]
        nets = self.nets
        idle = nets[self.active].unused({n for n in range(self.num_levels) if masked and kept[n] < numbers[n]})
        return idle + [p for n, net in enumerate(nets) if n != self.active for p in net.parameters()]

    def _levels_of(self, target, sources, sample_ids, rng, train, masked: bool, foreground) -> _Levels:
        """All that a training step knows of its levels before the network runs."""
        targets = build_pyramid(self.pad(target), self.num_levels)
        source_levels = build_pyramid(self.pad(sources), self.num_levels)
        inside = self._foreground_levels(foreground)
        t = self._timesteps(sample_ids, rng, train)  # (B,) or (L, B)
        abar = self.schedule(t)
        levels = range(self.num_levels)
        masks = [None] * self.num_levels
        if masked:
            numbers = [y.shape[2] * y.shape[3] // self.config.patch**2 for y in targets]
            masks = [self._mask(n, numbers[n], sample_ids, rng, inside[n]) for n in levels]
        eps = [self.normals(sample_ids, targets[n], rng, _philox.EPS + n) for n in levels]
        coarse_t = self._coarse_timesteps(sample_ids, rng)
        told: list[Tensor | None] = [None] * self.num_levels
        if coarse_t is not None:
            told[:-1] = [self.noised_coarse(targets[n + 1], sample_ids, rng, n + 1, coarse_t) for n in levels[:-1]]
        return _Levels(
            targets, source_levels, list(t) if t.dim() == 2 else [t] * self.num_levels,
            list(abar) if t.dim() == 2 else [abar] * self.num_levels, masks, eps, t, coarse_t, told,
        )  # fmt: skip

    def _all_at_once(self, net: nn.Module, at: _Levels) -> list[Tensor]:
        """Outputs a level where the truth stands for the coarser estimate: one pass over all levels."""
        with stage("stem"):
            maps = net.source_maps(at.sources[0])
        with stage("modulations"):
            vectors = net.packed_modulations(at.shared_t, at.coarse_t)
        inputs = [
            self.at_level(n, y, at.sources[n], at.told[n], at.abar[n], maps, eps=at.eps[n], mask=at.masks[n])
            for n, y in enumerate(at.targets)
        ]
        return net.forward_levels(inputs, vectors)

    def _one_by_one(self, net: nn.Module, at: _Levels) -> list[Tensor]:
        """Outputs a level, coarse to fine, each reading the coarser one's x0 estimate, detached and clamped."""
        with stage("stem"):
            maps = net.source_maps(at.sources[0])
        with stage("modulations"):
            vectors = net.modulations(at.shared_t)
        outs: list[Tensor] = [None] * self.num_levels
        coarse = below = None  # 0 at the coarsest level: ours, the paper does not say
        for n in reversed(range(self.num_levels)):
            given = self.at_level(n, at.targets[n], at.sources[n], coarse, at.abar[n], maps, eps=at.eps[n],
                                  mask=at.masks[n], below=below)  # fmt: skip
            outs[n] = net.forward_levels([given], vectors[n])[0]
            below = given.features
            if n:
                with torch.no_grad():
                    coarse = self._coarse_estimate(outs[n], at, n)
        return outs

    def _coarse_estimate(self, out: Tensor, at: _Levels, level: int) -> Tensor:
        out = self.split(out)[0]
        kind, y, eps, abar = self.config.prediction, at.targets[level], at.eps[level], at.abar[level]
        mask = at.masks[level]
        x0 = out if kind == "x0" else to_x0(kind, out, noised(y, eps, abar), abar)
        if mask is not None and self.config.decoder_input == "token":  # masked tokens stand for x0
            x0 = torch.where(losses.visible_pixels(mask[1], self.config.patch, *y.shape[2:]), x0, out)
        return x0.clamp(-1, 1)

    def _timesteps(self, sample_ids: Tensor, rng, train: TrainConfig) -> Tensor:
        """(B,) for lockstep; (L, B), drawn independently, for cascade."""
        if self.config.coupling == "lockstep":
            return self.schedule.draw(sample_ids, rng, train.last_t_share, only=train.only_steps)
        draws = [self.schedule.draw(sample_ids, rng, train.last_t_share, level=n, only=train.only_steps)
                 for n in range(self.num_levels)]  # fmt: skip
        return torch.stack(draws)

    def _coarse_timesteps(self, sample_ids: Tensor, rng) -> Tensor | None:
        """How noisy a teacher's coarse images are: (B,) int64 in [0, coarse_noise); None without a teacher."""
        if self.config.coarse != "teacher":
            return None
        words = _philox.integers(sample_ids, 1, rng=rng, stream=_philox.COARSE)[:, 0]
        return (words * self.config.coarse_noise) >> 32

    def noised_coarse(self, coarse: Tensor, sample_ids: Tensor, rng, level: int, coarse_t: Tensor) -> Tensor:
        """Conditioning augmentation (Ho et al. 2022): the coarse image as noisy as its own estimate is wrong."""
        eps = self.normals(sample_ids, coarse, rng, _philox.COARSE + level)
        return noised(coarse, eps, self.schedule(coarse_t))

    def _level_loss(self, out: Tensor, y: Tensor, y_t: Tensor, eps: Tensor, abar: Tensor, mask, train: TrainConfig):
        """(scalar loss, x0 estimate, predicted noise) of one level from the network's output (B, C, H, W)."""
        kind = self.config.prediction
        x0 = to_x0(kind, out, y_t, abar)
        eps_hat = out if kind == "eps" else losses.implied_noise(y_t, x0, eps, abar)
        term = losses.elementwise(out, truth(kind, y, eps, abar), train.loss)
        if train.min_snr:
            term = per_sample(snr_weight(kind, abar, train.min_snr)) * term
        if mask is None or self.config.decoder_input == "noisy":
            return term.mean(), x0, eps_hat
        # decoder_input="token": noise at an unseen place cannot be predicted, so masked tokens stand for x0.
        visible = losses.visible_pixels(mask[1], self.config.patch, *y.shape[2:])
        hidden = losses.elementwise(out, y, train.loss)
        term = torch.where(visible, term, train.token_x0_weight * hidden)
        return term.mean(), torch.where(visible, x0, out), torch.where(visible, eps_hat, eps)

    @torch.no_grad()
    def translate(
        self, sources: Tensor, sample_ids: Tensor, settings: SampleConfig | None = None, *,
        steps: int | None = None, seed: int | None = None, progress=None,
    ) -> list[Tensor]:  # fmt: skip
        """Synthesize the target of sources (B, Cs, H, W) in [-1, 1].

        sample_ids (B,) int64 name the slices, so the same seed gives the same noise whatever the batch.
        settings: steps, sampler, seed; ``steps`` and ``seed`` override them (default: 1 step, seed 0).
        Returns the levels, fine to coarse: [0] is (B, C, H, W) in [-1, 1]. Each is the mean over the members that are
        trained (``usable``), over ``settings.samples`` and, with ``settings.views`` 2, over the sources and their
        mirror image along H (left and right of an axial slice). [0] has ``settings.detail`` (``with_detail``).
        ``progress(i)`` is called after each sampling step of each member, view and sample.

        One batch; for many, an ``engine.Engine`` keeps what they share.
        """
        over = {key: value for key, value in (("steps", steps), ("seed", seed)) if value is not None}
        settings = (settings or SampleConfig()).model_copy(update=over)
        return Engine(self, settings)(sources, sample_ids, progress=progress).levels
