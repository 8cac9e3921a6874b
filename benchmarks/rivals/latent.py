"""Diffusion in the latent space of a small autoencoder trained here (Rombach 2022, CoLa-Diff 2023)."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.rivals.base import Rival, adamw, count, laid_out, padded, positions, rate, update, xavier
from phmdiff_fast.blocks import Block, FinalNorm, run_blocks
from phmdiff_fast.config import TrainConfig
from phmdiff_fast.convolutions import ResidualConv
from phmdiff_fast.diffusion import Schedule, noised
from phmdiff_fast.ema import EMA
from phmdiff_fast.model import TimestepEmbedder
from phmdiff_fast.pyramid import per_sample
from phmdiff_fast.sampling import ddim

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
