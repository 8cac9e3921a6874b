"""Distillation: one network that gives in few steps what a run's members, views and steps give together.

The student is the run's own network, begun from its first member's weights and trained as always, but unmasked, at the
timesteps of its few steps alone, and with the teacher's image of the augmented sources as target (knowledge
distillation, Hinton et al. 2015; at 1 step of a single-step teacher with several members, of an ensemble). A teacher's
image has no noise of its own, and there is one for every augmentation. Ours: the paper samples in many steps.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .config import Config, build_config
from .distributed import is_several
from .engine import Engine
from .errors import USAGE, PhmdiffError
from .generate import Run, load
from .progress import say
from .train import train


class Teacher:
    """A run as it teaches: its images at its own settings, and what names it."""

    def __init__(self, run: Run):
        # Fine structure is raised when the student synthesizes, as the run says; not twice.
        settings = run.config.sample.model_copy(update={"detail": 1.0, "samples": 1, "cuda_graph": "off"})
        self.run, self.engine = run, Engine(run.model.requires_grad_(False), settings)
        self.digest = run.found.digest("ema")

    def __call__(self, sources: Tensor, sample_ids: Tensor) -> Tensor:
        """sources (B, Cs, H, W) in [-1, 1] -> (B, 1, H, W), the mean over members and views."""
        return self.engine(sources, sample_ids).levels[0]

    def weights(self) -> dict[str, Tensor]:
        """Of its first member's network, where the student begins."""
        return {name: value.cpu() for name, value in self.run.model.net.state_dict().items()}


def student_config(config: Config, steps: int, *overlays: dict) -> Config:
    """Settings of a student of ``steps`` sampling steps, of the teacher's ``config``. Raises PhmdiffError (exit 2)."""
    if steps > config.model.timesteps:
        raise PhmdiffError("STEPS", f"{steps} steps are more than the run's {config.model.timesteps} timesteps",
                           "lower --steps", exit_code=USAGE)  # fmt: skip
    if config.model.prediction == "eps":
        raise PhmdiffError("FEW_STEPS", "the run predicts noise, which at its first timestep says nothing of the image",
                           "distill a run that predicts x0 or v", exit_code=USAGE)  # fmt: skip
    begun = config.model_dump(exclude_none=True, mode="json")
    for key in ("minutes", "steps"):
        begun["train"].pop(key, None)
    own = {
        "model": {"members": 1},
        "train": {"only_steps": steps, "finetune_share": 1.0, "lr": config.train.lr / 2},
        "sample": {"steps": steps, "sampler": "ddim", "views": 1, "samples": 1},
    }
    return build_config("xs", begun, own, *overlays)


def distill(
    teacher, data_path, out, *, steps: int, minutes: float | None = None, train_steps: int | None = None,
    settings: dict | None = None, device: str = "auto", progress: bool = True,
) -> Path:  # fmt: skip
    """Train a student of a run, or go on with one; returns its run folder, which ``sample`` and ``evaluate`` take.

    teacher : the run's folder; data_path : the cohort it was trained on; out : the student's folder; steps : its
    sampling steps; minutes or train_steps : its budget; settings : tables laid over the student's own

    Raises PhmdiffError as ``generate.load`` and ``train.train``.
    """
    if is_several():
        raise PhmdiffError("USAGE", "distill runs as one process", "start it without torchrun", exit_code=USAGE)
    if minutes is None and train_steps is None:
        raise PhmdiffError("NO_BUDGET", "neither --minutes nor --train-steps is given", "give one", exit_code=USAGE)
    run = load(teacher, device=device)
    budget = {"minutes": minutes, "steps": train_steps, "device": device if device != "auto" else None}
    given = {"train": {key: value for key, value in budget.items() if value is not None}}
    config = student_config(run.config, steps, given, settings or {})
    images = run.model.usable * run.config.sample.views * run.config.sample.steps
    if progress:
        say(f"teacher: {run.model.usable} member(s) x {run.config.sample.views} view(s) x {run.config.sample.steps} "
            f"step(s); the student makes {steps} evaluation(s) where it makes {images}")  # fmt: skip
    with torch.no_grad():
        taught = Teacher(run)
    return train(data_path, out, config, split_file=Path(teacher) / "split.json", progress=progress, teacher=taught)
