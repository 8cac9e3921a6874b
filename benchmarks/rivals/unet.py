"""The package's own U-Net with an L1 loss (Ronneberger 2015), several of them, and one against an adversary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.rivals.base import Regressor, Rival, adamw, count, laid_out, rate, update
from phmdiff_fast.baselines import UNet
from phmdiff_fast.config import TrainConfig
from phmdiff_fast.trainer import members_for


class UNetL1(Regressor):
    """The package's own baseline: the training of ``phmdiff_fast.baselines.train_unet``, step for step."""

    name = "unet_l1"
    betas, clips = (0.9, 0.999), False

    def __init__(self, channels: int):
        super().__init__(UNet(channels))


class UNetMean(Rival):
    """U-Nets like ``unet_l1``, each trained for an equal part of the time; the mean of their images.

    To the U-Net what ``members`` are to our own model, as many by the same rule: averaging alone is nobody's lead.
    """

    name = "unet_mean"
    plans = True

    def __init__(self, channels: int):
        super().__init__()
        self.channels, self.active, self.before = channels, 0, 0
        self.nets = nn.ModuleList([UNetL1(channels)])
        self.register_buffer("usable", torch.ones((), dtype=torch.int64))  # of the nets: those that are trained

    def plan(self, passes: float) -> None:
        device = self.usable.device
        self.nets.extend(UNetL1(self.channels).to(device) for _ in range(members_for(passes) - len(self.nets)))

    def begin(self, config: TrainConfig) -> None:
        self.active = self.before = 0
        for net in self.nets:
            net.begin(config)

    def step(self, sources: Tensor, target: Tensor, share: float, step: int) -> None:
        count = len(self.nets)
        active = min(int(share * count), count - 1)
        if active != self.active:
            self.active, self.before = active, step
            self.usable.fill_(active)
        self.nets[active].step(sources, target, share * count - active, step - self.before)

    def end(self) -> None:
        self.usable.fill_(len(self.nets))

    @torch.no_grad()
    def translate(self, sources: Tensor) -> Tensor:
        return torch.stack([net.translate(sources) for net in self.nets[: int(self.usable)]]).mean(0)


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
