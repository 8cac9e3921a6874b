"""The methods the quality table compares ours with, each trained for the same wall-clock on the same batches.

    unet_l1     the U-Net of phmdiff_fast.baselines, L1 (Ronneberger 2015)
    pix2pix     that U-Net against a conditional PatchGAN (Isola 2017)
    latent      diffusion in the latent space of a small autoencoder trained here (Rombach 2022, CoLa-Diff 2023)
    transunet   convolutions, a transformer at an eighth of the resolution, convolutions (Chen 2021)
    mae         a masked autoencoder that predicts the other contrast's patches (He 2022)

Sizes are for minutes of training at 64 x 64; nothing is pretrained. Where a method here is not the published one,
its class says so. Transformers take our own attention and GELU, the fastest there are for the device, so that no
rival is behind for want of a kernel.

Shapes: B batch, Cs source channels, H x W image, N tokens, K visible, D width, Dd decoder width, p patch side,
(h, w) a latent's or a token grid's sides. Images are in [-1, 1].
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from phmdiff_fast import attention, blocks
from phmdiff_fast.augment import manner
from phmdiff_fast.baselines import DoubleConv, UNet, training_batch
from phmdiff_fast.blocks import Attention, Block, FinalNorm, Mlp, run_blocks
from phmdiff_fast.cache import SliceCache
from phmdiff_fast.config import DataConfig, TrainConfig
from phmdiff_fast.convolutions import ResidualConv
from phmdiff_fast.device import autocast, kept_memory
from phmdiff_fast.diffusion import Schedule, noised
from phmdiff_fast.ema import EMA
from phmdiff_fast.model import TimestepEmbedder, sincos_positions
from phmdiff_fast.pyramid import per_sample
from phmdiff_fast.sampling import ddim

WARMUP = 50  # steps, as train_unet's


# --- shared -------------------------------------------------------------------------------------------


class Rival(nn.Module):
    """A method: how it takes a step of training, and how it translates.

    ``name``  : its key in ``RIVALS``
    ``turns`` : shares of the budget from which on a step is another kind of step
    """

    name = ""
    turns: tuple[float, ...] = ()

    def begin(self, config: TrainConfig) -> None:
        """Make the optimizers; called once, on the device that is trained on."""
        raise NotImplementedError

    def step(self, sources: Tensor, target: Tensor, share: float, step: int) -> None:
        """One optimizer step on sources (B, Cs, H, W) and target (B, 1, H, W), augmented; ``step`` counts from 0.

        share : of the budget that is used, in [0, 1). The caller enters autocast; losses are float32.
        """
        raise NotImplementedError

    def translate(self, sources: Tensor) -> Tensor:
        """(B, Cs, H, W), any sides -> (B, 1, H, W) float32. The same every time, whatever else is in the batch."""
        raise NotImplementedError

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


# --- U-Net, and the same with an adversary ------------------------------------------------------------


class UNetL1(Regressor):
    """The package's own baseline: the training of ``phmdiff_fast.baselines.train_unet``, step for step."""

    name = "unet_l1"
    betas, clips = (0.9, 0.999), False

    def __init__(self, channels: int):
        super().__init__(UNet(channels))


class Discriminator(nn.Module):
    """A conditional PatchGAN (Isola 2017, appendix 6.1.2): 4 x 4 convolutions of widths 64, 128, 256, then 1.

    One block less than published, so a patch of 34 pixels is judged instead of 70: images here have 64 a side.
    Each channel is normalised over its image, which is what the published batch norm does at their batch size of 1.
    """

    def __init__(self, channels: int):
        super().__init__()
        layers = [nn.Conv2d(channels, 64, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for inputs, outputs, stride in ((64, 128, 2), (128, 256, 1)):
            layers += [nn.Conv2d(inputs, outputs, 4, stride=stride, padding=1, bias=False),
                       nn.GroupNorm(outputs, outputs), nn.LeakyReLU(0.2)]  # fmt: skip
        self.layers = nn.Sequential(*layers, nn.Conv2d(256, 1, 4, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, sources: Tensor, image: Tensor) -> Tensor:
        """(B, Cs, H, W), (B, 1, H, W) -> logits of patches (B, 1, h, w) float32, high where taken for real."""
        return self.layers(laid_out(torch.cat([sources, image], 1))).float()


class Pix2Pix(Rival):
    """pix2pix (Isola 2017): cross entropy of a PatchGAN + 100 L1, a step of either network in turn.

    The generator is the same U-Net as ``unet_l1``'s, so that the adversary is the only difference. Theirs has
    noise from dropout, ours none: one image is asked for. Ours too: the generator's 1e-3 (published 2e-4, for days
    of training) with the U-Net's weight decay, and the cosine for both networks.
    """

    name = "pix2pix"
    lr, discriminator_lr, betas, l1_weight = 1e-3, 2e-4, (0.5, 0.999), 100.0

    def __init__(self, channels: int):
        super().__init__()
        self.generator = UNet(channels)
        self.discriminator = Discriminator(channels + 1)

    def begin(self, config: TrainConfig) -> None:
        self.optimizer = adamw(self.generator, self.lr, self.betas, config.weight_decay)
        self.judging = adamw(self.discriminator, self.discriminator_lr, self.betas, 0.0)  # so it is Adam

    def discriminator_loss(self, sources: Tensor, target: Tensor, made: Tensor) -> Tensor:
        """Cross entropy of telling target from made, halved as published."""
        images = torch.cat([target, made.detach()])  # one pass: nothing in it mixes images
        real, fake = self.discriminator(sources.repeat(2, 1, 1, 1), images).chunk(2)
        return 0.5 * (_taken_for(real, 1.0) + _taken_for(fake, 0.0))

    def generator_loss(self, sources: Tensor, target: Tensor, made: Tensor) -> Tensor:
        """Cross entropy of made being taken for real + 100 L1; no gradient for the discriminator."""
        self.discriminator.requires_grad_(False)
        logits = self.discriminator(sources, made)
        self.discriminator.requires_grad_(True)
        return _taken_for(logits, 1.0) + self.l1_weight * (made - target).abs().mean()

    def step(self, sources: Tensor, target: Tensor, share: float, step: int) -> None:
        made = self.generator(sources)
        loss = self.discriminator_loss(sources, target, made)
        update(self.judging, loss, rate(self.discriminator_lr, step, share))
        update(self.optimizer, self.generator_loss(sources, target, made), rate(self.lr, step, share))

    @torch.no_grad()
    def translate(self, sources: Tensor) -> Tensor:
        return self.generator(sources)

    def parameter_count(self) -> int:
        return count(self.generator)


def _taken_for(logits: Tensor, label: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


# --- latent diffusion ---------------------------------------------------------------------------------

LATENTS, FACTOR = 4, 4  # channels of a latent, pixels of a side to one of its


class Autoencoder(nn.Module):
    """Single-channel images to Gaussians over latents of a quarter of each side, and back (Kingma & Welling 2014).

    Its first and last halving is by pixel (un)shuffle: at full resolution its convolutions would cost more than the
    rest together. No attention and no adversary, for which there is no time.
    """

    def __init__(self, width: int = 64):
        super().__init__()
        conv = lambda a, b, **more: nn.Conv2d(a, b, 3, padding=1, **more)  # noqa: E731
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2), conv(4, width), ResidualConv(width),
            conv(width, 2 * width, stride=2), ResidualConv(2 * width),
            nn.GroupNorm(8, 2 * width), nn.SiLU(), conv(2 * width, 2 * LATENTS),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            conv(LATENTS, 2 * width), ResidualConv(2 * width), nn.Conv2d(2 * width, width, 1),
            nn.Upsample(scale_factor=2), ResidualConv(width),
            nn.GroupNorm(8, width), nn.SiLU(), conv(width, 4), nn.PixelShuffle(2),
        )  # fmt: skip

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1, H, W), sides multiples of 4 -> mean and logarithm of variance, (B, 4, H / 4, W / 4) float32."""
        mean, log_variance = self.encoder(laid_out(images)).float().chunk(2, 1)
        return mean, log_variance.clamp(-30, 20)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 4, h, w) -> (B, 1, 4 h, 4 w) float32."""
        return self.decoder(laid_out(latents)).float()


class LatentDiT(nn.Module):
    """A DiT (Peebles & Xie 2023) on our blocks, of preset xs' width and depth, over patches of p x p latents."""

    def __init__(self, inputs: int, outputs: int, width: int = 192, depth: int = 6, heads: int = 3, patch: int = 2):
        super().__init__()
        self.patch, self.width = patch, width
        self.t_embedder = TimestepEmbedder(width)
        self.embed = nn.Linear(inputs * patch**2, width)
        self.blocks = nn.ModuleList(Block(width, heads, 4.0, width) for _ in range(depth))
        self.norm = FinalNorm(width, width)
        self.last = nn.Linear(width, outputs * patch**2)
        xavier(self)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (*(m.adaLN_modulation[1] for m in (*self.blocks, self.norm)), self.last):
            nn.init.zeros_(layer.weight)  # adaLN-Zero

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x (B, inputs, h, w), sides multiples of p; t (B,) int64 -> (B, outputs, h, w) float32."""
        x = F.pixel_unshuffle(x, self.patch)
        rows, cols = x.shape[2:]
        x = self.embed(x.flatten(2).transpose(1, 2)).float()  # (B, N, D)
        c = F.silu(self.t_embedder(t))  # (B, D)
        vectors = [layer.adaLN_modulation[1](c) for layer in (*self.blocks, self.norm)]
        x = run_blocks(x + positions(rows, cols, self.width, x.device), self.blocks, vectors)
        for block in self.blocks:
            block.let_go()
        x = self.last(x).float().transpose(1, 2).unflatten(2, (rows, cols))  # (B, outputs p p, rows, cols)
        return F.pixel_shuffle(x, self.patch)


class LatentDiffusion(Rival):
    """Latent diffusion (Rombach 2022) for several contrasts, like CoLa-Diff (Jiang 2023) without its brain masks.

    The first third of the time trains one autoencoder on all contrasts, each an image of its own: L1 + a slight
    KL. Then it is frozen, its latents are brought to mean 0 and deviation 1 a channel by the first batch's target
    (Rombach's first batch gives one factor for all channels), and a DiT learns the target's latents beside the
    sources'. Theirs is a U-Net that predicts noise in 1000 steps and does not learn in minutes. Ours, and generous:
    x0, the state times sqrt(abar), 80 % of the timesteps at T - 1, an average of weights, as our own model has
    them; then one step suffices. ``sampling_steps`` : of DDIM, in ``translate``.
    """

    name = "latent"
    turns = (1 / 3,)
    lr, betas = 1e-3, (0.9, 0.99)
    denoiser_lr = 2e-3  # preset xs', whose blocks these are
    kl_weight, last_share, decay = 1e-4, 0.8, 0.99

    def __init__(self, channels: int):
        super().__init__()
        self.vae = Autoencoder()
        self.denoiser = LatentDiT(LATENTS * (1 + channels), LATENTS)
        self.average = copy.deepcopy(self.denoiser).requires_grad_(False)  # of the denoiser's weights
        self.schedule = Schedule()
        self.register_buffer("shift", torch.zeros(1, LATENTS, 1, 1))
        self.register_buffer("deviation", torch.ones(1, LATENTS, 1, 1))
        self.sampling_steps = 1

    def begin(self, config: TrainConfig) -> None:
        self.clip, self.switched = config.grad_clip, None  # switched: the step at which the autoencoder was frozen
        self.vae.requires_grad_(True)
        self.vae_optimizer = adamw(self.vae, self.lr, self.betas, config.weight_decay)
        self.optimizer = adamw(self.denoiser, self.denoiser_lr, self.betas, config.weight_decay)
        self.ema = EMA(self.denoiser, self.decay)
        self.ema.shadow = list(self.average.parameters())

    def step(self, sources: Tensor, target: Tensor, share: float, step: int) -> None:
        turn = self.turns[0]
        sources, target = (padded(images, 2 * FACTOR) for images in (sources, target))
        if share < turn:
            loss = self.reconstruction_loss(sources, target)
            update(self.vae_optimizer, loss, rate(self.lr, step, share / turn), self.clip)
            return
        if self.switched is None:
            self.freeze(target)
            self.switched = step
        loss, after = self.denoising_loss(sources, target), step - self.switched
        update(self.optimizer, loss, rate(self.denoiser_lr, after, (share - turn) / (1 - turn)), self.clip)
        self.ema.update(after)

    def reconstruction_loss(self, sources: Tensor, target: Tensor) -> Tensor:
        """L1 + KL a latent, on the targets and, of each sample, one source: with many, all would cost steps."""
        chosen = torch.randint(sources.shape[1], (len(sources),), device=sources.device)
        picked = sources.gather(1, chosen.view(-1, 1, 1, 1).expand(-1, 1, *sources.shape[2:]))
        images = torch.cat([target, picked])
        mean, log_variance = self.vae.encode(images)
        latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return (self.vae.decode(latents) - images).abs().mean() + self.kl_weight * kl

    @torch.no_grad()
    def freeze(self, target: Tensor) -> None:
        """The autoencoder stays as it is, and ``latents`` of this target (B, 1, H, W) get mean 0 and deviation 1."""
        self.vae.requires_grad_(False)
        mean, _ = self.vae.encode(target)
        deviation, shift = torch.std_mean(mean, dim=(0, 2, 3), keepdim=True)
        self.shift.copy_(shift)
        self.deviation.copy_(deviation.clamp_min(1e-4))  # a channel the KL has closed

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """(B, C, H, W), sides multiples of 8, each channel by itself -> (B, 4 C, H / 4, W / 4), scaled."""
        mean, _ = self.vae.encode(images.flatten(0, 1)[:, None])
        return ((mean - self.shift) / self.deviation).unflatten(0, images.shape[:2]).flatten(1, 2)

    def x0(self, net: LatentDiT, y: Tensor, given: Tensor, t: Tensor) -> Tensor:
        """The estimate in y_t (B, 4, h, w) with the sources' latents given (B, 4 Cs, h, w); t (B,) int64."""
        state = per_sample(self.schedule(t).sqrt()) * y
        return net(torch.cat([state, given], 1), t)

    def denoising_loss(self, sources: Tensor, target: Tensor) -> Tensor:
        """Mean square of x0's error, in latents."""
        z, given = self.latents(target), self.latents(sources)
        last = torch.rand(len(z), device=z.device) < self.last_share
        t = torch.randint(self.schedule.timesteps, (len(z),), device=z.device)
        t = torch.where(last, self.schedule.timesteps - 1, t)
        y = noised(z, torch.randn_like(z), self.schedule(t))
        return F.mse_loss(self.x0(self.denoiser, y, given, t), z)

    @torch.no_grad()
    def translate(self, sources: Tensor) -> Tensor:
        height, width = sources.shape[2:]
        given = self.latents(padded(sources, 2 * FACTOR))
        # One noise for all slices, drawn anew at every call.
        noise = torch.randn(1, LATENTS, *given.shape[2:], generator=torch.Generator().manual_seed(0))
        noise = noise.to(sources.device).expand(len(sources), -1, -1, -1)

        def denoise(states: list[Tensor], t: int) -> tuple[list[Tensor], None]:
            told = torch.full((len(sources),), t, device=sources.device)
            return [self.x0(self.average, states[0], given, told)], None

        z = ddim(denoise, [noise], self.schedule.abar, self.sampling_steps)[0]
        return self.vae.decode(z * self.deviation + self.shift)[..., :height, :width]

    def parameter_count(self) -> int:
        return count(self.vae) + count(self.average)


# --- transformers that regress ------------------------------------------------------------------------


class HybridNet(nn.Module):
    """Convolutions of widths w, 2w, 4w down to a quarter of each side, a transformer at an eighth, and back up.

    Skips join equal sizes, as in a U-Net. Sides: any.
    """

    def __init__(self, channels: int, width: int = 32, token_width: int = 192, depth: int = 6, heads: int = 3):
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.token_width = token_width
        self.down = nn.ModuleList(DoubleConv(a, b) for a, b in zip([channels, *widths], widths, strict=False))
        self.embed = nn.Linear(widths[-1], token_width)
        self.blocks = nn.ModuleList(VitBlock(token_width, heads) for _ in range(depth))
        self.norm, self.leave = nn.LayerNorm(token_width), nn.Linear(token_width, widths[-1])
        below = [widths[-1], *widths[:0:-1]]
        self.up = nn.ModuleList(DoubleConv(a + b, b) for a, b in zip(below, widths[::-1], strict=True))
        self.last = nn.Conv2d(width, 1, 1)
        xavier(self)

    def forward(self, sources: Tensor) -> Tensor:
        """(B, Cs, H, W) -> (B, 1, H, W) float32."""
        x, skips = laid_out(sources), []
        for block in self.down:
            skips.append(block(x))
            x = F.max_pool2d(skips[-1], 2, ceil_mode=True)
        x = self._mixed(x)  # (B, 4w, H / 8, W / 8)
        for block, skip in zip(self.up, skips[::-1], strict=True):
            x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
            x = block(torch.cat([x, skip], 1))
        return self.last(x).float()

    def _mixed(self, x: Tensor) -> Tensor:
        """(B, 4w, h, w) -> the same through the transformer, every place a token."""
        rows, cols = x.shape[2:]
        tokens = self.embed(x.flatten(2).transpose(1, 2)).float()  # (B, N, D)
        tokens = tokens + positions(rows, cols, self.token_width, x.device)
        for block in self.blocks:
            tokens = block(tokens)
        return laid_out(self.leave(self.norm(tokens)).transpose(1, 2).unflatten(2, (rows, cols)))


class TransUNet(Regressor):
    """TransUNet (Chen 2021) for regression, L1: three levels of convolutions and a ViT of width 192.

    Published for segmentation, with a pretrained ResNet-50 and ViT-B/16 at a sixteenth of 224 pixels; here an eighth
    of 64 gives 8 x 8 tokens, and nothing is pretrained.
    """

    name = "transunet"

    def __init__(self, channels: int):
        super().__init__(HybridNet(channels))


class MaskedAutoencoder(nn.Module):
    """A ViT over the visible patches of the sources; a narrow one over all places predicts the target's patches."""

    def __init__(self, channels: int, patch: int = 8, width: int = 192, depth: int = 6, decoder_width: int = 96,
                 decoder_depth: int = 2, heads: int = 3):  # fmt: skip
        super().__init__()
        self.patch, self.width, self.decoder_width = patch, width, decoder_width
        self.embed = nn.Linear(channels * patch**2, width)
        self.blocks = nn.ModuleList(VitBlock(width, heads) for _ in range(depth))
        self.norm, self.to_decoder = nn.LayerNorm(width), nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(decoder_width))
        self.decoder_blocks = nn.ModuleList(VitBlock(decoder_width, heads) for _ in range(decoder_depth))
        self.decoder_norm, self.last = nn.LayerNorm(decoder_width), nn.Linear(decoder_width, patch**2)
        xavier(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches."""
        return -(-images.shape[2] // self.patch), -(-images.shape[3] // self.patch)

    def encode(self, sources: Tensor, keep: Tensor | None) -> Tensor:
        """sources (B, Cs, H, W), keep (B, K) int64 visible patches or None for all -> (B, K, D)."""
        rows, cols = self.grid(sources)
        x = F.pixel_unshuffle(padded(sources, self.patch), self.patch).flatten(2).transpose(1, 2)  # (B, N, Cs p p)
        pos = positions(rows, cols, self.width, x.device)
        if keep is not None:
            x, pos = x.gather(1, keep[..., None].expand(-1, -1, x.shape[2])), pos[keep]
        x = self.embed(x).float() + pos
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def decode(self, x: Tensor, keep: Tensor | None, rows: int, cols: int) -> Tensor:
        """x (B, K, D) -> image (B, 1, rows p, cols p) float32."""
        x = self.to_decoder(x).float()  # (B, K, Dd)
        if keep is not None:
            fill = self.mask_token.expand(len(x), rows * cols, -1)
            x = fill.scatter(1, keep[..., None].expand_as(x), x)  # (B, N, Dd)
        x = x + positions(rows, cols, self.decoder_width, x.device)
        for block in self.decoder_blocks:
            x = block(x)
        x = self.last(self.decoder_norm(x)).float()  # (B, N, p p)
        return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (rows, cols)), self.patch)

    def forward(self, sources: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, Cs, H, W) -> (B, 1, H, W) float32; sides: any."""
        made = self.decode(self.encode(sources, keep), keep, *self.grid(sources))
        return made[..., : sources.shape[2], : sources.shape[3]]


class MaskedRegression(Regressor):
    """A masked autoencoder (He 2022) whose decoder predicts the target instead of the masked input, L2.

    Three quarters of the patches are masked until 60 % of the time are used; the rest, and every translation, sees all.
    The error counts at every patch: unlike an autoencoder's, a visible one is no answer. No patch is normalised: its
    mean and deviation would be missing at test.
    """

    name = "mae"
    turns = (0.6,)
    visible = 0.25

    def __init__(self, channels: int):
        super().__init__(MaskedAutoencoder(channels))

    def draw(self, sources: Tensor, share: float) -> Tensor | None:
        """Visible patches (B, K) int64 of a training step, None for all."""
        if share >= self.turns[0]:
            return None
        rows, cols = self.net.grid(sources)
        keys = torch.rand(len(sources), rows * cols, device=sources.device)
        return keys.argsort(1)[:, : max(1, round(self.visible * rows * cols))]

    def loss(self, sources: Tensor, target: Tensor, share: float) -> Tensor:
        return F.mse_loss(self.net(sources, self.draw(sources, share)), target)


RIVALS: dict[str, Callable[[int], Rival]] = {
    rival.name: rival for rival in (UNetL1, Pix2Pix, LatentDiffusion, TransUNet, MaskedRegression)
}


# --- training and use ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """What a training came to.

    best, best_step, best_state : the highest finite figure a look gave, after how many steps, and the state dict
    then, on the CPU; None without one. flops_step : FLOP of products and convolutions, mean over the steps taken.
    """

    steps: int
    seconds: float
    best: float | None
    best_step: int | None
    best_state: dict[str, Tensor] | None
    flops_step: float


class Clock:
    """Seconds since it was made, without those it was paused for."""

    def __init__(self, device: torch.device):
        self.device, self.away, self.begun = device, 0.0, time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self.begun - self.away

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._wait()  # what is queued belongs to the training
        before = time.monotonic()
        try:
            yield
        finally:
            self._wait()
            self.away += time.monotonic() - before

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def step_flops(rival: Rival, config: TrainConfig, channels: int, size: int, device: torch.device) -> list[int]:
    """FLOP of a training step an image (S, S), before the first and after each of the rival's ``turns``.

    Counted by torch as it runs a copy: forward and backward of products and convolutions, a multiply-add is 2. The
    gradient by the image, which nobody takes, is not in it.
    """
    image = torch.rand(1, channels + 1, size, size, device=device) * 2 - 1
    found = []
    for share in (0.0, *rival.turns):
        trial = copy.deepcopy(rival)
        trial.begin(config)
        trial.step(image[:, 1:], image[:, :1], share, 0)  # the first one at a turn does more
        # It cannot look into our operations: plain blocks, and attention as products.
        plain = mock.patch.object(blocks, "serves", return_value=False)
        with plain, attention.use("products"), FlopCounterMode(display=False) as counter:
            trial.step(image[:, 1:], image[:, :1], share, 1)
        found.append(counter.get_total_flops())
    return found


def train_rival(
    rival: Rival, cache: SliceCache, rows: np.ndarray, config: TrainConfig, seconds: float, device: torch.device,
    dtype: torch.dtype, *, data: DataConfig, steps: int | None = None, look: Callable[[Rival], float] | None = None,
    looks: int = 10, progress: Callable[[float], None] | None = None,
) -> Trained:  # fmt: skip
    """Train for ``seconds`` of wall-clock, or for exactly ``steps`` steps, on the batches of ``train_unet``.

    rows : training rows of the cache; data : what its channels are; dtype : of the products (``autocast``)
    look : a figure of the rival as it is, higher is better, asked for ``looks`` times evenly over the budget, the
           last time at the end; its time does not count. The rival itself keeps its last weights.
    ``progress(share)`` is called after each step. The weights are the caller's: seed before making the rival.
    """
    if steps is None and not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    if (steps is not None and steps < 1) or looks < 1:
        raise ValueError(f"steps {steps} and looks {looks} must be positive")
    rival.to(device).train()
    kinds = step_flops(rival, config, data.source_channels, data.image_size, device)
    taken = [0] * len(kinds)  # steps of each kind
    best = best_step = best_state = None

    def take_look() -> None:
        nonlocal best, best_step, best_state
        with clock.paused():
            found = float(look(rival.eval()))
            rival.train()
            if math.isfinite(found) and (best is None or found > best):
                best, best_step = found, step
                best_state = {name: value.detach().cpu().clone() for name, value in rival.state_dict().items()}

    how, step, share, due = manner(data), 0, 0.0, 1
    torch.manual_seed(config.seed)
    rival.begin(config)
    with kept_memory(device):  # as our own trainer: without it a CPU's convolutions take twice as long
        clock = Clock(device)
        while share < 1:
            sources, target = training_batch(cache, rows, config, step, device, how)
            with autocast(device, dtype):
                rival.step(sources, target, share, step)
            taken[sum(share >= turn for turn in rival.turns)] += 1
            step += 1
            share = clock.seconds() / seconds if steps is None else step / steps
            if progress is not None:
                progress(min(1.0, share))
            if look is not None and due / looks <= share < 1:
                take_look()
                while due / looks <= share:  # a long step may have passed several
                    due += 1
        with clock.paused():
            used = clock.seconds()
        if look is not None:
            take_look()
    rival.eval()
    flops = config.batch_size * sum(n * kind for n, kind in zip(taken, kinds, strict=True)) / step
    return Trained(step, used, best, best_step, best_state, flops)


def rival_predict(rival: Rival, sources: np.ndarray, device, dtype, batch_size: int = 32) -> np.ndarray:
    """sources (Z, Cs, S, S) in [-1, 1] -> (Z, S, S) float32, clamped to [-1, 1]."""
    made = []
    for start in range(0, len(sources), batch_size):
        part = torch.from_numpy(np.ascontiguousarray(sources[start : start + batch_size])).to(device)
        with autocast(device, dtype):
            made.append(rival.translate(part)[:, 0].float().clamp(-1, 1).cpu().numpy())
    return np.concatenate(made)
