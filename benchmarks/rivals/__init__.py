"""The methods the quality table compares ours with, each trained for the same wall-clock on the same batches.

    unet_l1     the U-Net of phmdiff_fast.baselines, L1 (Ronneberger 2015)                     unet.py
    unet_mean   several of them, one after the other within the same time, their mean          unet.py
    pix2pix     that U-Net against a conditional PatchGAN (Isola 2017)                         unet.py
    latent      diffusion in the latent space of an autoencoder trained here (Rombach 2022)    latent.py
    transunet   convolutions, a transformer at an eighth of the resolution, convolutions       vit.py
    mae         a masked autoencoder that predicts the other contrast's patches (He 2022)      vit.py

Sizes are for minutes of training at 64 x 64; nothing is pretrained. Where a method here is not the published one,
its class says so. Transformers take our own attention and GELU, the fastest there are for the device, so that no
rival is behind for want of a kernel. ``base.py`` has what they share, ``training.py`` how they are trained.

Shapes: B batch, Cs source channels, H x W image, N tokens, K visible, D width, Dd decoder width, p patch side,
(h, w) a latent's or a token grid's sides. Images are in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.rivals.base import Rival
from benchmarks.rivals.latent import LatentDiffusion
from benchmarks.rivals.training import rival_predict, train_rival
from benchmarks.rivals.unet import Pix2Pix, UNetL1, UNetMean
from benchmarks.rivals.vit import MaskedRegression, TransUNet

__all__ = ["RIVALS", "rival_predict", "train_rival"]

RIVALS: dict[str, Callable[[int], Rival]] = {
    rival.name: rival for rival in (UNetL1, UNetMean, Pix2Pix, LatentDiffusion, TransUNet, MaskedRegression)
}
