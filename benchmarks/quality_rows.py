"""What the quality table is made of: the rows, the tasks, and the fixed split of people."""

from __future__ import annotations

from dataclasses import dataclass, field

# Choices are made on the validation person alone; "others" with the contrasts asked for are trained on.
FIXED = {"val": ("mslub-long-12",), "test": ("mslub-cs-26", "mslub-long-04", "tcga-fg-6692")}


@dataclass(frozen=True)
class Task:
    """Sources and target; ``plumbing``: templates only, whose figures say nothing about people."""

    sources: tuple[str, ...]
    target: str
    plumbing: bool = False


TASKS = {
    "t1-t2": Task(("t1",), "t2"),
    "flair-t1": Task(("flair",), "t1"),
    "t1-t1ce": Task(("t1",), "t1ce"),
    "t1+flair-t2": Task(("t1", "flair"), "t2"),
    "mr-ct": Task(("t1",), "ct", plumbing=True),
}


@dataclass(frozen=True)
class Row:
    """A line of the table.

    settings : over preset xs; of a rival only ``data`` and ``train`` count. ours : trained by our own trainer.
    sampling : the ways to sample: steps, "x" views, "detail" gain; of a rival steps are 1
    """

    title: str
    settings: dict = field(default_factory=dict)
    ours: bool = True
    sampling: tuple[str, ...] = ("1", "1 x 2")


AS_PRESET = "1, detail 1.15"  # how preset xs samples; a test holds them equal
_PLAIN = {"levels": [{"mask_ratio": 0.0}], "stem": False, "head": False, "residual": False, "patch": 4, "members": 1}
_EPS, _ALL_T = {"prediction": "eps", "scale_state": False}, {"last_t_share": 0.0}
_NO_EXTRAS = {"mmd_weight": 0.0, "ssim_weight": 0.0}
ROWS: dict[str, Row] = {
    "lookup": Row("value lookup table", ours=False, sampling=("-",)),
    "unet_l1": Row("U-Net, L1 loss", ours=False, sampling=("1", "1 x 2", AS_PRESET)),
    "unet_mean": Row("U-Nets, L1 loss, their mean", ours=False),
    "pix2pix": Row("pix2pix", ours=False),
    "transunet": Row("TransUNet style, L1 loss", ours=False),
    "mae": Row("MAE-style regression", ours=False),
    "latent": Row("latent diffusion, own small VAE", ours=False),
    # Our own blocks and trainer without pyramid, mask, head: x0 and our timesteps, which is generous.
    "dit": Row("DiT, x0", {"model": _PLAIN, "train": _NO_EXTRAS}),
    "dit_eps": Row("DiT, eps, 25 steps", {"model": _PLAIN | _EPS, "train": _NO_EXTRAS | _ALL_T}, sampling=("25",)),
    "diffmae": Row("PHMDiff, DiffMAE reading", {"model": {"reading": "diffmae"}}),
    "ours": Row("PHMDiff (ours)", sampling=(AS_PRESET, "1", "1 x 2", "1 x 2, detail 1.15", "4")),
}
