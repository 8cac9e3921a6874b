"""Synthesis with a trained run: volumes in, NIfTI and a JSON sidecar out. Read it downward."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from . import __version__, checkpoint
from .config import Config, SampleConfig, load_toml
from .data import Cohort, Subject, discover, load_subject
from .device import autocast, pick_device, pick_precision
from .errors import CHECKPOINT, USAGE, DataErrors, PhmdiffError
from .files import refuse_existing, write_json
from .grid import InPlane, fit_scaling
from .layouts import FILE_NAME, SUFFIXES
from .nifti import write_volume
from .phmdiff import PHMDiff
from .progress import say

RESEARCH_ONLY = "synthetic image, for research only, never for diagnosis"


@dataclass
class Run:
    """A trained run: its settings, averaged weights and the facts noted in training."""

    folder: Path
    config: Config
    model: PHMDiff
    facts: dict
    found: checkpoint.Checkpoint
    device: torch.device
    dtype: torch.dtype

    @property
    def sources(self) -> list[str]:
        return self.config.data.sources

    @property
    def target(self) -> str:
        return self.config.data.target


def load(folder, *, device: str = "auto", warn=None) -> Run:
    """Open a run folder with its newest valid checkpoint.

    Raises PhmdiffError: NO_RUN (exit 2) if the folder holds no run, NO_CHECKPOINT (exit 4) if it
    holds no valid checkpoint. ``warn(line)`` hears of damaged checkpoints that are passed over.
    """
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise PhmdiffError("NO_RUN", "holds no run", "give the folder that train wrote (--out)",
                           exit_code=USAGE, file=folder)  # fmt: skip
    config = Config.model_validate(load_toml(folder / "config.toml"))
    facts = json.loads((folder / "run.json").read_text())
    found = checkpoint.newest(folder / "checkpoints", warn=warn)
    if found is None:
        raise PhmdiffError("NO_CHECKPOINT", "holds no valid checkpoint", "train it first",
                           exit_code=CHECKPOINT, file=folder)  # fmt: skip
    where = pick_device(device)
    model = PHMDiff(config.model, len(config.data.sources), 1, facts["complexity"])
    model.load_state_dict(found.tensors("ema"), strict=True)
    return Run(
        folder, config, model.to(where).eval(), facts, found, where, pick_precision(config.train.precision, where)
    )


def scaled_slices(volume: np.ndarray, foreground: np.ndarray, plane: InPlane) -> np.ndarray:
    """A volume (X, Y, Z) on the network's grid, scaled by its own percentiles: (Z, S, S) in [-1, 1]."""
    scaling = fit_scaling(volume, foreground)
    return scaling.forward(plane.to_grid(volume, float(volume.min())))


def foreground_slices(foreground: np.ndarray, plane: InPlane) -> np.ndarray:
    """The foreground (X, Y, Z) on the network's grid: (Z, S, S) bool, where half of a pixel is inside."""
    return plane.to_grid(foreground.astype(np.float32), 0.0) >= 0.5


def in_plane(run: Run, subject: Subject) -> InPlane:
    return InPlane(subject.foreground.shape[:2], run.config.data.image_size, run.config.data.crop)


def predict(run: Run, sources: np.ndarray, settings: SampleConfig, *, first: int = 0, progress=None) -> np.ndarray:
    """Synthesize slices. sources (Z, Cs, S, S) in [-1, 1] -> (Z, S, S) float32 in [-1, 1].

    ``first`` is the number of the first slice in its volume; slice z takes noise number z, so the
    same seed gives the same volume whatever the batch.
    """
    if settings.steps > run.model.schedule.timesteps:
        what = f"{settings.steps} steps are more than the run's {run.model.schedule.timesteps} timesteps"
        raise PhmdiffError("STEPS", what, "lower --steps", exit_code=USAGE)
    made = []
    for start in range(0, len(sources), settings.batch_size):
        part = torch.from_numpy(np.ascontiguousarray(sources[start : start + settings.batch_size])).to(run.device)
        ids = torch.arange(first + start, first + start + len(part), device=run.device)
        with autocast(run.device, run.dtype):
            image = run.model.translate(part, ids, steps=settings.steps, seed=settings.seed)[0]
        made.append(image[:, 0].float().cpu().numpy())
        if progress is not None:
            progress(len(part))
    return np.concatenate(made)


def synthesize(run: Run, subject: Subject, settings: SampleConfig, *, progress=None) -> np.ndarray:
    """The missing contrast of a subject on its own RAS grid, (X, Y, Z) float32, arbitrary units.

    The background is 0; inside, the normalised value in [0, 1] times the training set's median 99.5
    percentile. Slices without foreground are not computed.
    """
    plane = in_plane(run, subject)
    sources = np.stack([scaled_slices(subject.images[c], subject.foreground, plane) for c in run.sources], 1)
    used = np.flatnonzero(subject.foreground.any((0, 1)))
    slices = np.full((len(sources), *sources.shape[2:]), -1, np.float32)
    if len(used):
        low, high = used[0], used[-1] + 1
        slices[low:high] = predict(run, sources[low:high], settings, first=int(low), progress=progress)
    volume = plane.from_grid(slices, -1.0)
    unit = np.where(subject.foreground, (volume + 1) / 2, 0)
    return (unit.clip(0, 1) * run.facts["median_p995"]).astype(np.float32)


def subject_and_contrast(path: Path) -> tuple[str, str | None]:
    """``p1_t1.nii.gz`` -> ("p1", "t1"); a name that tells no contrast -> (its stem, None)."""
    match = FILE_NAME.fullmatch(path.name)
    contrast = SUFFIXES[match["separator"]][1].get(match["word"]) if match else None
    return (match["id"] if contrast else path.name.removesuffix(".gz").removesuffix(".nii")), contrast


def _inputs(run: Run, inputs: list[Path]) -> Cohort:
    """Files, subject folders and cohorts given on the command line, as one cohort."""
    files: dict[str, dict[str, Path]] = {}
    for path in inputs:
        if path.is_dir() or path.suffix.lower() == ".csv":
            new = discover(path).files
        else:
            if len(run.sources) > 1:
                raise PhmdiffError("NEED_FOLDER", f"is one file; this run needs {', '.join(run.sources)}",
                                   "give the subject's folder", exit_code=USAGE, file=path)  # fmt: skip
            name, contrast = subject_and_contrast(path)
            if contrast not in (None, run.sources[0]):
                raise PhmdiffError("WRONG_CONTRAST", f"is a {contrast} by its name; this run needs {run.sources[0]}",
                                   "give that scan, or rename the file", exit_code=USAGE, file=path)  # fmt: skip
            new = {name: {run.sources[0]: path}}
        for subject, contrasts in new.items():
            if subject in files:
                raise PhmdiffError("DUPLICATE", "is given twice", "give every subject once",
                                   subject=subject, file=path, exit_code=USAGE)  # fmt: skip
            files[subject] = contrasts
    return Cohort(Path(os.path.commonpath([p.absolute() for p in inputs])), "inputs", files)


def sample(run: Run, inputs, out, settings: SampleConfig, *, overwrite: bool = False, progress=None) -> list[Path]:
    """Write ``<subject>_<target>_syn.nii.gz`` and a JSON sidecar for every subject of ``inputs``.

    The volume lies on the input's own grid, with its affine. Missing contrasts and existing outputs
    are refused before anything is written. ``progress(subject, done, total)`` is called after each
    subject. Returns the volumes' paths. Raises PhmdiffError (2 usage and existing output, 3 data,
    74 disk).
    """
    out = Path(out)
    cohort = _inputs(run, [Path(p) for p in inputs])
    gaps = [
        PhmdiffError("MISSING_CONTRAST", f"has no {c} (it has {', '.join(sorted(has)) or 'nothing'})",
                     "add the file, or leave this subject out", subject=subject, contrast=c)
        for subject, has in cohort.files.items()
        for c in run.sources
        if c not in has
    ]  # fmt: skip
    if gaps:
        raise DataErrors(gaps)
    names = {subject: out / f"{subject}_{run.target}_syn.nii.gz" for subject in cohort.files}
    for path in names.values():
        refuse_existing(path, overwrite)
    digest = run.found.manifest["files"]["ema.safetensors"]
    for done, (subject_id, path) in enumerate(names.items(), 1):
        subject = load_subject(cohort, subject_id, run.sources, foreground_from=run.sources[0], with_seg=False,
                               allow_constant=True)  # fmt: skip
        empty = [c for c in run.sources if subject.images[c].min() == subject.images[c].max()]
        if empty:
            say(f"{subject_id}/{empty[0]} holds one value only: the synthesized volume is 0 everywhere")
            volume = np.zeros(subject.foreground.shape, np.float32)
        else:
            volume = synthesize(run, subject, settings)
        out.mkdir(parents=True, exist_ok=True)
        write_volume(path, volume, subject.grid, overwrite=overwrite)
        sidecar = {
            "subject": subject_id, "target": run.target, "sources": run.sources, "units": "arbitrary",
            "note": RESEARCH_ONLY, "checkpoint_sha256": digest, "checkpoint_step": run.found.step,
            "seed": settings.seed, "steps": settings.steps, "sampler": settings.sampler,
            "image_size": run.config.data.image_size, "phmdiff_fast": __version__,
        }  # fmt: skip
        write_json(path.with_name(path.name.replace(".nii.gz", ".json")), sidecar)
        if progress is not None:
            progress(subject_id, done, len(names))
    return list(names.values())
