"""Simulated patients from real anatomy, to try everything without anyone's data.

The anatomy is the MNI152 average of 152 people that nilearn carries in its package (no network):
T1 template, grey and white matter maps, brain mask. Every patient is that anatomy warped at random,
with own tissue constants, sequence timings, coil shading, noise, gain and, in about half of them, a
lesion. The signal equations are the textbook's for spin echo and inversion recovery; relaxation
times are measured ones at 3 T. Nothing here is a person: no figure on these images says how a
method does on patients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import BACKEND, IO, USAGE, PhmdiffError
from .nifti import Grid, write_volume

DESCRIP = "SIMULATED phmdiff-fast"
CONTRASTS = ("t1", "t2", "flair")

# (proton density, T1 ms, T2 ms) at 3 T. White and grey matter: Wansapura et al., JMRI 9:531 (1999)
# for T1 (832, 1331) and T2 (about 80 and 110 ms); other groups measure longer T1 (Stanisz et al.,
# MRM 54:507 (2005): 1084 and 1820). CSF: near free water, Lin et al., MRM 45:159 (2001) for T1.
# Densities: water content, after Whittall et al., MRM 37:34 (1997). The lesion is ours: like
# oedema, between grey matter and CSF.
TISSUES = {"gm": (0.81, 1331.0, 110.0), "wm": (0.70, 832.0, 80.0), "csf": (1.00, 4000.0, 1800.0)}
LESION = (0.88, 1700.0, 190.0)
# Each constant times U(1 - , 1 + ) per patient: the first factor for all tissues together, the second
# for each alone; together 5 %. Were all of it separate, grey would meet white matter on some T1w.
SPREAD_SHARED, SPREAD_OWN = 0.035, 0.015

# TR, TE (and TI, which nulls CSF) in ms; each times U(1 - , 1 + ) per patient.
SPIN_ECHO = {"t1": (350.0, 9.0), "t2": (4500.0, 95.0)}
FLAIR = (9000.0, 120.0, 2400.0)
TIMING_SPREAD = 0.03

WARP_MM, WARP_FINE_MM = 6.0, 1.8  # the largest displacement of the coarse and of the fine field
BIAS = {"t1": 0.42, "t2": 0.12, "flair": 0.14}  # the shading spans at most exp(-, +)
NOISE = {"t1": 0.018, "t2": 0.014, "flair": 0.022}  # Rician sigma, as a share of the 99th percentile

# Nuclei rich in iron, whose T2 is short in every adult (Hallgren and Sourander, J. Neurochem. 3:41,
# 1958): MNI centre at the right (mm), radii (mm), relative shortening of T2; mirrored at the left.
IRON = (
    ((20, -4, -1), (6, 9, 6), 0.22),  # globus pallidus
    ((26, 2, 2), (6, 12, 8), 0.10),  # putamen
    ((5, -20, -9), (4, 4, 5), 0.25),  # red nucleus
    ((10, -17, -12), (4, 6, 4), 0.24),  # substantia nigra
    ((16, -57, -34), (8, 7, 6), 0.18),  # dentate nucleus
)


def simulate_cohort(
    folder: str | Path,
    *,
    num_subjects: int = 12,
    seed: int = 0,
    resolution: float = 2.0,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Write a cohort of simulated patients in the BraTS 2021 layout; returns their names.

    ``<folder>/sim-001/sim-001_t1.nii.gz``, ``_t2``, ``_flair`` (arbitrary units, whole numbers, 0
    outside the brain) and ``_seg`` (1 in the lesion, 0 elsewhere), RAS, isotropic.

    num_subjects : at least 1; patient i depends on (seed, i, resolution) alone
    resolution : voxel size in mm, 1 to 8
    progress : called as ``progress(done, total)`` after each patient

    Raises PhmdiffError: NEED_EXTRA (exit 8) without nilearn, OUTPUT_EXISTS (exit 2) if the folder
    has anything in it, SIMULATE_VALUE (exit 2), OUTPUT_WRITE (exit 74).
    """
    if num_subjects < 1 or seed < 0 or not 1 <= resolution <= 8:
        raise PhmdiffError("SIMULATE_VALUE", f"cannot simulate {num_subjects} subjects at {resolution} mm, seed {seed}",
                           "give at least 1 subject, 1 to 8 mm and a seed of 0 or more", exit_code=USAGE)  # fmt: skip
    folder = Path(folder)
    names = [f"sim-{i:03d}" for i in range(1, num_subjects + 1)]
    try:
        if folder.exists() and any(folder.iterdir()):
            raise PhmdiffError("OUTPUT_EXISTS", "the folder is not empty", "choose another one",
                               exit_code=USAGE, file=folder)  # fmt: skip
        atlas = load_atlas(float(resolution))
        for i, name in enumerate(names, start=1):
            (folder / name).mkdir(parents=True)
            for contrast, voxels in simulate_patient(atlas, seed, i).items():
                write_volume(folder / name / f"{name}_{contrast}.nii.gz", voxels, atlas.grid, descrip=DESCRIP)
            if progress is not None:
                progress(i, num_subjects)
    except OSError as problem:
        raise PhmdiffError("OUTPUT_WRITE", f"cannot be written ({problem.strerror})",
                           "check that the folder may be written to and has room", exit_code=IO,
                           file=folder) from None  # fmt: skip
    return names


@dataclass(frozen=True, eq=False)
class Atlas:
    """The anatomy at 1 mm and the grid that patients are made on.

    maps : {"gm", "wm", "csf", "brain", "texture"}, each (I, J, K) float32 on ``affine`` (voxel -> MNI mm)
    grid : of the patients; points : (3, X, Y, Z) float32, its voxels in MNI mm
    """

    maps: dict[str, np.ndarray]
    affine: np.ndarray
    grid: Grid
    points: np.ndarray


def load_atlas(resolution: float) -> Atlas:
    """The MNI152 maps that nilearn carries, ready for patients at ``resolution`` mm.

    CSF is brain minus grey and white matter. The texture is what the real T1 template shows beyond
    its mixture of three tissues, as a share of the white-grey difference.
    Raises PhmdiffError NEED_EXTRA (exit 8) without nilearn.
    """
    try:
        from nilearn.datasets import (
            load_mni152_brain_mask,
            load_mni152_gm_template,
            load_mni152_template,
            load_mni152_wm_template,
        )
    except ImportError:
        raise PhmdiffError("NEED_EXTRA", "simulating patients needs anatomy, and nilearn is not installed",
                           "pip install 'phmdiff-fast[demo]'", exit_code=BACKEND) from None  # fmt: skip
    from scipy.ndimage import gaussian_filter

    image = load_mni152_template(resolution=1)
    mask = load_mni152_brain_mask(resolution=1).get_fdata(dtype=np.float32)
    # The box around the brain, wide enough for the blurs below; outside it everything is 0.
    box = tuple(slice(max(int(index.min()) - 8, 0), int(index.max()) + 9) for index in np.nonzero(mask))
    brain, t1, gm, wm = mask[box], *(
        each.get_fdata(dtype=np.float32)[box]
        for each in (image, load_mni152_gm_template(resolution=1), load_mni152_wm_template(resolution=1))
    )  # fmt: skip
    gm, wm = gm * brain, wm * brain
    csf = np.clip(brain - gm - wm, 0, 1)

    inside = brain > 0
    mixture = np.stack([gm[inside], wm[inside], csf[inside]], axis=1)  # (V, 3)
    level = np.linalg.solve(mixture.T @ mixture, mixture.T @ t1[inside])  # T1w of pure gm, wm, csf: least squares
    texture = np.zeros_like(t1)
    texture[inside] = (t1[inside] - mixture @ level) / (level[1] - level[0])

    brain = gaussian_filter(brain, 1.5)  # the mask is ragged
    maps = {"gm": gm, "wm": wm, "csf": csf, "brain": brain, "texture": np.clip(texture, -1, 1)}
    # A coarser grid must not see detail that it cannot hold.
    blur = 0.35 * max(resolution - 1, 0)
    if blur:
        maps = {name: gaussian_filter(voxels, blur) for name, voxels in maps.items()}

    first = image.affine[:3, 3]
    shape = tuple(int(np.ceil(side / resolution)) for side in image.shape)
    affine = np.diag([resolution, resolution, resolution, 1.0])
    affine[:3, 3] = first
    index = np.indices(shape, dtype=np.float32)  # (3, X, Y, Z)
    points = index * np.float32(resolution) + first.astype(np.float32)[:, None, None, None]
    boxed = image.affine.copy()
    boxed[:3, 3] += image.affine[:3, :3] @ [side.start for side in box]
    return Atlas(maps, boxed, Grid(shape, affine), points)


def simulate_patient(atlas: Atlas, seed: int, number: int) -> dict[str, np.ndarray]:
    """Patient ``number`` (from 1) of a cohort: {"t1", "t2", "flair", "seg"}, each (X, Y, Z) float32 in RAS.

    The result depends on (seed, number) and the grid alone.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, number]))
    mm = _warped(atlas, rng)  # (3, X, Y, Z)
    tissue, texture, brain = _anatomy(atlas, mm, rng)
    density, t1, t2 = _relaxation(atlas, tissue, texture, mm, rng)
    lesion = _lesion(atlas, tissue, brain, rng)

    def spread(share):
        return rng.uniform(1 - share, 1 + share)

    constants = [value * spread(SPREAD_SHARED) for value in LESION]
    signals = {}
    for contrast in CONTRASTS:
        timing = [ms * spread(TIMING_SPREAD) for ms in (FLAIR if contrast == "flair" else SPIN_ECHO[contrast])]
        healthy = sum(tissue[k] * _signal(density[k], t1[k], t2[k], timing) for k in tissue)
        # The rim is a mixture: the more lesion, the more of its signal.
        signals[contrast] = (1 - lesion) * healthy + lesion * _signal(*constants, timing)

    out = {name: _scanned(signal, name, brain, atlas, rng) for name, signal in signals.items()}
    out["seg"] = (lesion > 0.5).astype(np.float32) * brain
    return out


def _signal(density, t1, t2, timing):
    """Spin echo (TR, TE) or magnitude inversion recovery (TR, TE, TI), ms; arrays or numbers."""
    tr, te, *ti = timing
    recovered = 1 - np.exp(-tr / t1)
    if ti:
        recovered = np.abs(1 - 2 * np.exp(-ti[0] / t1) + np.exp(-tr / t1))
    return density * recovered * np.exp(-te / t2)


def _smooth(rng: np.random.Generator, atlas: Atlas, spacing: float) -> np.ndarray:
    """(X, Y, Z) float32: cubic B-spline through random numbers ``spacing`` mm apart, about unit deviation."""
    step = spacing / atlas.grid.affine[0, 0]
    bases = [_spline_basis(side, step) for side in atlas.grid.shape]  # (side, knots)
    field = rng.standard_normal([basis.shape[1] for basis in bases]).astype(np.float32)
    for basis in bases:  # one axis at a time; each pass moves the next one to the front
        field = np.tensordot(field, basis, axes=(0, 1))
    return field / np.float32(np.sqrt(np.prod([(basis**2).sum(1).mean() for basis in bases])))


def _spline_basis(side: int, step: float) -> np.ndarray:
    """(side, knots) float32: the weight of every knot at every voxel."""
    knots = int(np.ceil((side - 1) / step)) + 3
    distance = np.abs(np.arange(side)[:, None] / step - (np.arange(knots)[None] - 1))
    near, far = 2 / 3 - distance**2 + distance**3 / 2, (2 - distance) ** 3 / 6
    return np.where(distance < 1, near, np.where(distance < 2, far, 0)).astype(np.float32)


def _warped(atlas: Atlas, rng: np.random.Generator) -> np.ndarray:
    """(3, X, Y, Z): where in the atlas, MNI mm, each voxel of this patient comes from."""
    angle = rng.normal(0, np.deg2rad(3), 3)
    turn = np.array([[0, -angle[2], angle[1]], [angle[2], 0, -angle[0]], [-angle[1], angle[0], 0]])
    scale = np.diag(rng.normal(1.0, 0.03, 3))
    linear = (scale @ (np.eye(3) + turn + turn @ turn / 2)).astype(np.float32)
    centre = np.array([0, -18, 8], dtype=np.float32)[:, None, None, None]
    mm = np.tensordot(linear, atlas.points - centre, axes=(1, 0)) + centre
    mm += rng.normal(0, 2.0, 3).astype(np.float32)[:, None, None, None]
    for axis in range(3):
        for spacing, top in ((38.0, WARP_MM), (14.0, WARP_FINE_MM)):
            field = _smooth(rng, atlas, spacing)
            mm[axis] += field * (rng.uniform(0.6, 1.0) * top / np.abs(field).max())
    return mm


def _anatomy(atlas: Atlas, mm: np.ndarray, rng) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Tissue shares {name: (X, Y, Z)} summing to 1 in the brain, T1 texture, brain (bool)."""
    from scipy.ndimage import map_coordinates

    inverse = np.linalg.inv(atlas.affine).astype(np.float32)
    index = np.tensordot(inverse[:3, :3], mm, axes=(1, 0)) + inverse[:3, 3][:, None, None, None]
    here = {name: map_coordinates(voxels, index, order=1) for name, voxels in atlas.maps.items()}
    brain = here["brain"] > rng.uniform(0.5, 0.75)  # skull stripping is tighter or wider
    # The maps average 152 people; a power above 1 takes their blur back. The weights give each
    # patient a thicker or thinner cortex and wider or narrower fluid spaces; fluid weighs more, as
    # an average over people fills everyone's sulci with the others' cortex.
    weight = {"gm": rng.uniform(0.85, 1.15), "wm": 1.0, "csf": rng.uniform(1.5, 4.0)}
    tissue = {name: weight[name] * here[name] ** 1.8 + 1e-6 for name in TISSUES}
    total = sum(tissue.values())
    return {name: share / total for name, share in tissue.items()}, here["texture"], brain


def _relaxation(atlas: Atlas, tissue, texture, mm, rng):
    """{tissue: density}, {tissue: T1 (X, Y, Z) ms}, {tissue: T2 (X, Y, Z) ms} of this patient."""
    shared = rng.uniform(1 - SPREAD_SHARED, 1 + SPREAD_SHARED, 3)  # of density, T1, T2
    own = {name: constants * shared * rng.uniform(1 - SPREAD_OWN, 1 + SPREAD_OWN, 3)
           for name, constants in TISSUES.items()}  # fmt: skip
    # Brighter on T1w than its tissue's mean means more myelin or iron: T1 and T2 both shorter.
    t1_factor = np.exp(-0.22 * texture + 0.025 * _smooth(rng, atlas, 11.0) + 0.02 * _smooth(rng, atlas, 5.0))
    t2_factor = np.exp(-0.15 * texture + 0.03 * _smooth(rng, atlas, 14.0) + 0.02 * _smooth(rng, atlas, 5.0))
    t2_factor *= 1 - rng.uniform(0.8, 1.2) * _iron(mm)
    solid = {"gm": 1.0, "wm": 1.0, "csf": 0.0}  # fluid has no texture
    density = {name: own[name][0] for name in tissue}
    t1 = {name: own[name][1] * t1_factor ** solid[name] for name in tissue}
    t2 = {name: own[name][2] * t2_factor ** solid[name] for name in tissue}
    return density, t1, t2


def _iron(mm: np.ndarray) -> np.ndarray:
    """(X, Y, Z): relative shortening of T2 by iron at MNI positions (3, X, Y, Z)."""
    out = np.zeros(mm.shape[1:], dtype=np.float32)
    for centre, radii, share in IRON:
        for side in (1, -1):
            where = (side * centre[0], centre[1], centre[2])
            square = sum(((mm[a] - where[a]) / radii[a]) ** 2 for a in range(3))
            np.maximum(out, share * np.exp(-(square**2) / 2), out=out)
    return out


def _lesion(atlas: Atlas, tissue, brain: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(X, Y, Z) in [0, 1]: share of lesion; zero in about half of the patients."""
    out = np.zeros(brain.shape, dtype=np.float32)
    if rng.random() < 0.5:
        return out
    deep = np.argwhere(brain & (tissue["wm"] > 0.9))
    rough = _smooth(rng, atlas, 16.0) + 0.5 * _smooth(rng, atlas, 7.0)
    radii = [rng.uniform(7, 15), *rng.uniform(3, 6, rng.integers(0, 5))]  # mm; one large, some small
    for radius in radii:
        centre = atlas.points[(slice(None), *deep[rng.integers(len(deep))])]
        stretch = rng.uniform(0.75, 1.3, 3).astype(np.float32)
        away = (atlas.points - centre[:, None, None, None]) / stretch[:, None, None, None]
        distance = np.sqrt((away**2).sum(0)) * np.exp(0.3 * rough)
        rim = 0.1 * radius + 0.6
        np.maximum(out, 1 / (1 + np.exp(np.clip((distance - radius) / rim, -30, 30))), out=out)
    # It grows in white matter, less into cortex, and not into fluid.
    return out * np.clip(tissue["wm"] + 0.6 * tissue["gm"], 0, 1) * brain


def _scanned(
    signal: np.ndarray, contrast: str, brain: np.ndarray, atlas: Atlas, rng: np.random.Generator
) -> np.ndarray:
    """Shading, Rician noise, skull stripping, gain: (X, Y, Z) float32 whole numbers, 0 outside the brain."""
    shade = _smooth(rng, atlas, 75.0)
    shade -= shade[brain].mean()
    shade *= rng.uniform(0.5, 1.0) * BIAS[contrast] / np.abs(shade[brain]).max()
    signal = (signal * np.exp(shade)).astype(np.float32)
    top = np.percentile(signal[brain], 99)
    sigma = NOISE[contrast] * rng.uniform(0.8, 1.2) * top
    real, imaginary = sigma * rng.standard_normal((2, *signal.shape), dtype=np.float32)
    magnitude = np.hypot(signal + real, imaginary)
    gain = np.exp(rng.uniform(np.log(400), np.log(4000))) / top
    # At least 1 in the brain, so that 0 means outside.
    return np.where(brain, np.maximum(np.round(gain * magnitude), 1), 0).astype(np.float32)
