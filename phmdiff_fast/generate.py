"""Synthesis with a trained run: volumes in, NIfTI and a JSON sidecar out. Read it downward."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from . import __version__, checkpoint
from .background import batches, plain_batches
from .config import Config, SampleConfig, build_config, read_config
from .data import Cohort, Subject, discover, load_subject, subject_of
from .device import pick_device, pick_precision
from .distributed import Alone
from .engine import Engine, kept_on
from .errors import CHECKPOINT, USAGE, DataErrors, PhmdiffError
from .files import refuse_existing, write_json
from .grid import SLICE_AXIS, InPlane, Scaling, fill_for, scaling_for, stack_context
from .layouts import subject_and_contrast
from .mha import read_scan
from .nifti import image_volume, to_image, write_volume
from .phmdiff import PHMDiff
from .progress import say
from .run_folder import read_facts
from .streaming import Behind, read_ahead


@dataclass
class Slices:
    """mean, deviation : (Z, S, S) float32, normalised; deviation None of one sample."""

    mean: np.ndarray
    deviation: np.ndarray | None = None


@dataclass
class Volumes:
    """mean, deviation : (X, Y, Z) float32 in the run's units, as ``Slices``."""

    mean: np.ndarray
    deviation: np.ndarray | None = None


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

    @property
    def units(self) -> str:
        """ "HU" or "arbitrary", of a synthesized volume."""
        return self.facts.get("units", "arbitrary")

    def sample_settings(self, **over) -> SampleConfig:
        """The run's own sampling settings, with those given (not None) laid over. Raises PhmdiffError (exit 2)."""
        given = {key: value for key, value in over.items() if value is not None}
        return build_config("xs", {"data": {"axis": self.config.data.axis},
                                   "sample": {**self.config.sample.model_dump(), **given}}).sample  # fmt: skip

    def engine(self, settings: SampleConfig) -> Engine:
        """What synthesizes with these settings, to be kept from volume to volume."""
        return Engine(self.model, settings, self.dtype)

    def reading(self, nan: str | None = None, max_gib: float | None = None) -> dict:
        """How scans are read (``nan`` and ``max_gib`` of ``nifti.read_volume``): as given, else as in training."""
        data = self.config.data
        return {"nan": nan or data.nan, "max_gib": data.max_volume_gib if max_gib is None else max_gib}

    def translate(self, images: dict, *, nan: str | None = None, max_gib: float | None = None, progress=None,
                  **settings):  # fmt: skip
        """Synthesize the target of one subject: ``run.translate({"t1": "p1_t1.nii.gz"})``.

        images : contrast -> path of a scan, or a nibabel image; every source of the run, and ``"mask"`` if
            there is one
        nan : "raise" refuses NaN and Inf voxels, "zero" sets them to 0; max_gib : the largest scan that is
            read, counted as float32; both as in training where they are not given
        settings : ``steps``, ``sampler``, ``seed``, ``batch_size`` and the like (``SampleConfig``), laid over the
            run's own
        Returns a nibabel Nifti1Image, float32, on the grid and affine of the first source: HU for CT, else
        arbitrary units. ``progress(slices)`` is called after each batch. Raises PhmdiffError (2 a contrast
        that is not a source or a bad setting, 3 data).
        """
        return self._translated(images, nan, max_gib, progress, settings)[0]

    def uncertainty(self, images: dict, *, samples: int, nan: str | None = None, max_gib: float | None = None,
                    progress=None, **settings):  # fmt: skip
        """``translate`` with so many ``samples`` (2 or more), and how far they lie apart.

        Returns two nibabel images: the mean over samples, members and views, and their standard deviation, in the
        same units. Otherwise as ``translate``.
        """
        if samples < 2:
            raise PhmdiffError("SAMPLES", "one sample has no deviation", "give samples=2 or more", exit_code=USAGE)
        return self._translated(images, nan, max_gib, progress, {**settings, "samples": samples})

    def _translated(self, images: dict, nan, max_gib, progress, settings: dict):
        asked = self.sample_settings(**settings)
        subject = _subject_of(self, images, self.reading(nan, max_gib))
        made = synthesize(self, subject, asked, progress=progress)
        spread = None if made.deviation is None else to_image(made.deviation, subject.grid)
        return to_image(made.mean, subject.grid), spread


def load(folder, *, device: str = "auto", warn=None) -> Run:
    """Open a run folder with its newest valid checkpoint.

    Raises PhmdiffError: NO_RUN (exit 2) if the folder holds no run, NO_CHECKPOINT (exit 4) if it holds no valid
    checkpoint, RUN_BROKEN, CHECKPOINT_DIFFERS (exit 4) if what it was begun with is damaged or another.
    ``warn(line)`` hears of damaged checkpoints that are passed over.
    """
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise PhmdiffError("NO_RUN", "holds no run", "give the folder that train wrote (--out)",
                           exit_code=USAGE, file=folder)  # fmt: skip
    config = read_config(folder / "config.toml")
    facts = read_facts(folder, config)
    found = checkpoint.newest(folder / "checkpoints", warn=warn)
    if found is None:
        raise PhmdiffError("NO_CHECKPOINT", "holds no valid checkpoint", "train it first",
                           exit_code=CHECKPOINT, file=folder)  # fmt: skip
    where = pick_device(device)
    model = PHMDiff(config.model, config.data.source_channels, 1, facts["complexity"], members=facts["members"])
    found.refuse_other(config, model.state_dict())
    model.load_state_dict(found.tensors("ema"), strict=True)
    model.usable = min(found.manifest.get("members", 1), len(model.nets))  # those trained when it was written
    return Run(
        folder, config, model.to(where).eval(), facts, found, where, pick_precision(config.train.precision, where)
    )


def scaled_slices(run: Run, subject: Subject, contrast: str, plane: InPlane) -> np.ndarray:
    """A contrast on the network's grid, (Z, S, S) in [-1, 1]: by its own percentiles, CT by the HU window."""
    volume, window = subject.images[contrast], run.config.data.hu_window
    scaling = scaling_for(contrast, volume, subject.foreground, window)
    return scaling.forward(plane.to_grid(volume, fill_for(contrast, volume, window)))


def source_slices(run: Run, subject: Subject, plane: InPlane) -> np.ndarray:
    """The network's view of all sources: (Z, Cs, S, S) in [-1, 1], neighbouring slices as channels."""
    sources = np.stack([scaled_slices(run, subject, c, plane) for c in run.sources], 1)
    return stack_context(sources, run.config.data.context_slices)


def foreground_slices(foreground: np.ndarray, plane: InPlane, any_part: bool = False) -> np.ndarray:
    """The foreground (X, Y, Z) on the network's grid: (Z, S, S) bool, where half of a pixel is inside, or any part."""
    share = plane.to_grid(foreground.astype(np.float32), 0.0)
    return share > 0 if any_part else share >= 0.5


def in_plane(run: Run, subject: Subject) -> InPlane:
    return InPlane.of(subject.foreground.shape, run.config.data)


def predict(
    run: Run, sources: np.ndarray, settings: SampleConfig, *, foreground: np.ndarray | None = None, first: int = 0,
    progress=None, ranks: Alone | None = None, engine: Engine | None = None,
) -> Slices:  # fmt: skip
    """Synthesize slices. sources (Z, Cs, S, S) in [-1, 1] -> (Z, S, S) float32 in [-1, 1].

    ``foreground`` (Z, S, S) bool lets patches without any be left out (``settings.skip_background``).
    ``first`` is the number of the first slice in its volume; slice z takes noise number z, so the
    same seed gives the same volume whatever the batch. Several processes (``ranks``) each call this with the same,
    take the batches of one process in turn, and all get the same bits as one. ``progress(slices)`` hears of this
    process' own batches. ``engine``: one of these settings, kept from volume to volume.
    """
    ranks = ranks or Alone()
    with ranks.told_once():
        if settings.steps > run.model.schedule.timesteps:
            what = f"{settings.steps} steps are more than the run's {run.model.schedule.timesteps} timesteps"
            raise PhmdiffError("STEPS", what, "lower --steps", exit_code=USAGE)
    engine = engine or run.engine(settings)
    parts = plain_batches(len(sources), settings.batch_size)
    if foreground is not None and engine.skips:
        model = run.config.model
        parts = batches(foreground, settings.batch_size, patch=model.patch, levels=len(model.levels),
                        views=settings.views, context=run.config.data.context_slices)  # fmt: skip

    def on_device(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(run.device)

    def work(i: int) -> list[torch.Tensor]:
        part = parts[i]
        kept = kept_on(run.device, part.kept)
        made = engine(on_device(sources[part.rows]), on_device(first + part.rows), kept)
        images = [made.levels[0]] if made.deviation is None else [made.levels[0], made.deviation]
        if progress is not None:
            progress(len(part.rows))
        return [image[:, 0].float().cpu() for image in images]

    made = ranks.deal([len(part.rows) for part in parts], work)
    order = torch.from_numpy(np.argsort(np.concatenate([part.rows for part in parts])))
    mean, *deviation = (images[order].numpy() for images in made)
    return Slices(mean, *deviation)


def synthesize(
    run: Run, subject: Subject, settings: SampleConfig, *, progress=None, ranks: Alone | None = None,
    engine: Engine | None = None,
) -> Volumes:  # fmt: skip
    """The missing contrast of a subject on its own RAS grid, (X, Y, Z) float32.

    MR: arbitrary units, the normalised value in [0, 1] times the training set's median 99.5 percentile;
    0 outside the foreground. CT: HU; the window's low end where no slice was computed and, if the
    subject has a mask, outside it. Slices without foreground are not computed. ``ranks``, ``engine`` as of ``predict``.
    """
    plane = in_plane(run, subject)
    sources = source_slices(run, subject, plane)
    inside = foreground_slices(subject.foreground, plane, any_part=True)
    across = tuple(axis for axis in range(3) if axis != SLICE_AXIS[run.config.data.axis])
    used = np.flatnonzero(subject.foreground.any(across))
    slices = np.full((len(sources), *sources.shape[2:]), -1, np.float32)
    spread = np.zeros_like(slices)
    if len(used):
        low, high = used[0], used[-1] + 1
        made = predict(run, sources[low:high], settings, foreground=inside[low:high], first=int(low),
                       progress=progress, ranks=ranks, engine=engine)  # fmt: skip
        slices[low:high] = made.mean
        if made.deviation is not None:
            spread[low:high] = made.deviation
    volume = in_own_units(run, plane.from_grid(slices, -1.0), subject)
    if settings.samples == 1:
        return Volumes(volume)
    return Volumes(volume, _spread_in_own_units(run, plane.from_grid(spread, 0.0), subject))


def in_own_units(run: Run, volume: np.ndarray, subject: Subject) -> np.ndarray:
    """A normalised volume (X, Y, Z) in [-1, 1] as HU, or as arbitrary units inside the foreground."""
    if run.units == "HU":
        window = Scaling(*run.config.data.hu_window)
        hu = window.inverse(volume.clip(-1, 1))
        return np.where(subject.foreground, hu, np.float32(window.lo)) if subject.masked else hu
    unit = np.where(subject.foreground, (volume + 1) / 2, 0)
    return (unit.clip(0, 1) * run.facts["median_p995"]).astype(np.float32)


def _spread_in_own_units(run: Run, deviation: np.ndarray, subject: Subject) -> np.ndarray:
    """A deviation (X, Y, Z) of normalised values in the units of ``in_own_units``; 0 outside the foreground."""
    low, high = run.config.data.hu_window if run.units == "HU" else (0, run.facts["median_p995"])
    inside = subject.foreground if run.units != "HU" or subject.masked else True
    return np.where(inside, deviation * np.float32((high - low) / 2), 0).astype(np.float32)


def _subject_of(run: Run, images: dict, how: dict) -> Subject:
    unknown = [name for name in images if name not in (*run.sources, "mask")]
    missing = [name for name in run.sources if name not in images]
    if unknown or missing:
        what = f"got {', '.join(map(repr, images)) or 'nothing'}; this run needs {', '.join(map(repr, run.sources))}"
        raise PhmdiffError("WRONG_CONTRAST", what, "give each source once", exit_code=USAGE)
    volumes = {
        name: image_volume(image, name, allow_constant=name == "mask", **how)
        if hasattr(image, "dataobj")
        else read_scan(image, allow_constant=name == "mask", **how)
        for name, image in images.items()
    }
    return subject_of(Path(volumes[run.sources[0]].path).name, volumes, foreground_from=run.sources[0])


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


def sample(
    run: Run, inputs, out, settings: SampleConfig, *, nan: str | None = None, max_gib: float | None = None,
    overwrite: bool = False, progress=None, ranks: Alone | None = None,
    also: list[tuple[Run, SampleConfig]] | None = None,
) -> list[Path]:  # fmt: skip
    """Write ``<subject>_<target>_syn.nii.gz`` and a JSON sidecar for every subject of ``inputs``.

    The volume lies on the input's own grid, with its affine. With 2 ``settings.samples`` or more,
    ``<subject>_<target>_syn_std.nii.gz`` holds the deviation over samples, members and views. Missing
    contrasts and existing outputs are refused before anything is written. ``nan`` and ``max_gib`` as of
    ``Run.translate``. ``progress(subject, done, total)`` is called after each batch of slices; done counts subjects,
    the one in work by its share. The next subject is read and the last one written meanwhile; more are never held.
    Several processes (``ranks``) each call this and share the slices of every volume; process 0 writes. ``also`` :
    further runs, such as those of the other two axes, each with its settings, whose volumes are averaged with this
    one's. Returns the volumes' paths. Raises PhmdiffError (2 usage and existing output, 3 data, 74 disk).
    """
    out, ranks, also = Path(out), ranks or Alone(), also or []
    with ranks.told_once():
        for other, _ in also:
            _refuse_other_task(run, other)
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
            if settings.samples > 1:
                refuse_existing(_beside(path, "_std.nii.gz"), overwrite)

    def read(subject_id: str) -> Subject:
        return load_subject(cohort, subject_id, run.sources, foreground_from=run.sources[0], with_seg=False,
                            allow_constant=True, **run.reading(nan, max_gib))  # fmt: skip

    digest = run.found.digest("ema")
    teams = [(one, how, one.engine(how)) for one, how in [(run, settings), *also]]
    with Behind() as behind:
        for done, (subject_id, fetch) in enumerate(read_ahead(names, read)):
            with ranks.told_once():
                behind.wait()
                subject = fetch()
            told = _Told(progress, subject_id, done, len(names), ranks)
            made = _of_one_value(run, subject, settings, say_so=ranks.first)
            if made is None:
                each = [
                    synthesize(one, subject, how, ranks=ranks, engine=engine,
                               progress=partial(told.slices, of=len(teams) * _depth(one, subject)))
                    for one, how, engine in teams
                ]  # fmt: skip
                made = _averaged(each, [one for one, *_ in teams])
                del each
            if ranks.first:
                more = {"averaged_with": [one.found.digest("ema") for one, _ in also]} if also else {}
                behind(
                    _write, run, names[subject_id], subject_id, made, subject.grid, settings, digest, overwrite, more
                )
            told.end()
            del subject, made
        with ranks.busy():
            behind.wait()
    return list(names.values())


class _Told:
    """Counts the slices of a subject for ``progress(subject, done, total)``."""

    def __init__(self, progress, subject: str, done: int, total: int, ranks: Alone):
        self.progress, self.subject, self.done, self.total, self.world = progress, subject, done, total, ranks.world
        self.seen = 0

    def slices(self, count: int, of: int) -> None:
        self.seen += count * self.world  # the other processes are about as far
        if self.progress is not None:
            self.progress(self.subject, self.done + min(1.0, self.seen / of), self.total)

    def end(self) -> None:
        if self.progress is not None:
            self.progress(self.subject, self.done + 1, self.total)


def _refuse_other_task(run: Run, other: Run) -> None:
    """Raise OTHER_TASK (exit 2) unless both make the same of the same."""
    tasks = [f"{'+'.join(one.sources)} -> {one.target} in {one.units}" for one in (run, other)]
    if tasks[0] != tasks[1]:
        raise PhmdiffError("OTHER_TASK", f"makes {tasks[1]}, and {run.folder} makes {tasks[0]}",
                           "average runs of one task", exit_code=USAGE, file=other.folder)  # fmt: skip


def _averaged(made: list[Volumes], runs: list[Run]) -> Volumes:
    """The mean of several runs' volumes in the first one's units, and the deviation of all their images."""
    if len(made) == 1:
        return made[0]
    first = runs[0]
    scales = [1.0 if first.units == "HU" else first.facts["median_p995"] / one.facts["median_p995"] for one in runs]
    means = np.stack([np.float32(scale) * one.mean for scale, one in zip(scales, made, strict=True)])
    if any(one.deviation is None for one in made):
        return Volumes(means.mean(0))
    inside = np.mean([(scale * one.deviation) ** 2 for scale, one in zip(scales, made, strict=True)], axis=0)
    return Volumes(means.mean(0), np.sqrt(inside + means.var(0)).astype(np.float32))


def _depth(run: Run, subject: Subject) -> int:
    """Slices of a subject along the run's axis."""
    return subject.foreground.shape[SLICE_AXIS[run.config.data.axis]]


def _of_one_value(run: Run, subject: Subject, settings: SampleConfig, say_so: bool) -> Volumes | None:
    """What is written where a source holds one value only, of which nothing can be made; None where none does."""
    empty = [c for c in run.sources if subject.images[c].min() == subject.images[c].max()]
    if not empty:
        return None
    air = run.config.data.hu_window[0] if run.units == "HU" else 0.0
    if say_so:
        say(f"{subject.id}/{empty[0]} holds one value only: the synthesized volume is {air:g} everywhere")
    volume = np.full(subject.foreground.shape, air, np.float32)
    return Volumes(volume, np.zeros_like(volume) if settings.samples > 1 else None)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name.removesuffix(".nii.gz") + ending)


def _write(run: Run, path: Path, subject_id: str, made: Volumes, grid, settings: SampleConfig, digest: str, overwrite,
           more: dict) -> None:  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_volume(path, made.mean, grid, overwrite=overwrite)
    if settings.samples > 1:
        write_volume(_beside(path, "_std.nii.gz"), made.deviation, grid, descrip="SYNTHETIC phmdiff-fast std",
                     overwrite=overwrite)  # fmt: skip
    sidecar = {
        "subject": subject_id, "target": run.target, "sources": run.sources, "units": run.units,
        "note": RESEARCH_ONLY, "checkpoint_sha256": digest, "checkpoint_step": run.found.step,
        "seed": settings.seed, "steps": settings.steps, "sampler": settings.sampler, "views": settings.views,
        "samples": settings.samples, "detail": settings.detail, "skip_background": settings.skip_background,
        "members": run.model.usable,
        "image_size": run.config.data.image_size, "phmdiff_fast": __version__, **more,
    }  # fmt: skip
    write_json(_beside(path, ".json"), sidecar)
