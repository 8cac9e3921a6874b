"""Named, versioned score protocols over volumes; a figure without its protocol is worthless.

Every protocol takes ``(prediction, reference, foreground)``, three (Z, H, W) arrays. The images are
normalised already: the reference is scaled by its own 0.5-99.5 percentile inside the foreground to
[-1, 1] and clipped, the prediction is as the model gives it. All arithmetic is float64, the data
range is 2. PSNR is in dB (``inf`` for a perfect prediction: kept, not hidden), SSIM in percent,
MAE in normalised units (of a range of 2).

PHMDiff (arXiv 2507.16579) leaves the definition of its scores unstated: these definitions are ours.
"""

from __future__ import annotations

import numpy as np

from .errors import DATA, PhmdiffError

DATA_RANGE = 2.0  # images span [-1, 1]
SSIM_SIGMA = 1.5
SSIM_SIDE = 11  # the window that scikit-image makes of sigma 1.5 truncated at 3.5 sigma
METRICS = ("psnr", "ssim", "mae")


def phmdiff_slice_values(prediction, reference, foreground) -> dict[str, np.ndarray]:
    """The scores of every slice that has foreground, over the whole slice, background included.

    prediction, reference : (Z, H, W) real; foreground : (Z, H, W) bool
    Returns ``{"slice": (S,) int64, "psnr": (S,) dB, "ssim": (S,) %, "mae": (S,)}``, S <= Z slices.

    SSIM: Wang et al. 2004 with a Gaussian 11x11 window, sigma 1.5, population covariance, mean
    over the positions where the window lies inside the slice (scikit-image's own mean).
    Raises PhmdiffError (exit 3): METRIC_SHAPE, METRIC_EMPTY, METRIC_NONFINITE.
    """
    prediction, reference, foreground = _checked(prediction, reference, foreground)
    slices = np.flatnonzero(foreground.any(axis=(1, 2)))  # (S,)
    difference = prediction[slices] - reference[slices]  # (S, H, W)
    return {
        "slice": slices,
        "psnr": _psnr((difference**2).mean(axis=(1, 2))),
        "ssim": np.array([100 * _ssim(prediction[z], reference[z])[0] for z in slices]),
        "mae": np.abs(difference).mean(axis=(1, 2)),
    }


def phmdiff_slice(prediction, reference, foreground) -> dict[str, float]:
    """Protocol ``phmdiff-slice``, version 1: the mean of ``phmdiff_slice_values`` over slices.

    Arguments and errors as there. Returns ``{"psnr": dB, "ssim": %, "mae": normalised units}``.
    """
    values = phmdiff_slice_values(prediction, reference, foreground)
    return {name: float(values[name].mean()) for name in METRICS}


def brain(prediction, reference, foreground) -> dict[str, float]:
    """Protocol ``brain``, version 1: foreground voxels only, so empty background cannot flatter.

    PSNR from the MSE over all foreground voxels of the volume; SSIM the mean over the same voxels
    of the 2D SSIM maps (window as in ``phmdiff_slice_values``, edges mirrored); MAE over them.
    Arguments, errors and units as ``phmdiff_slice``.
    """
    prediction, reference, foreground = _checked(prediction, reference, foreground)
    difference = (prediction - reference)[foreground]  # (V,)
    slices = np.flatnonzero(foreground.any(axis=(1, 2)))
    ssim = np.concatenate([_ssim(prediction[z], reference[z])[1][foreground[z]] for z in slices])  # (V,)
    return {
        "psnr": float(_psnr((difference**2).mean())),
        "ssim": float(100 * ssim.mean()),
        "mae": float(np.abs(difference).mean()),
    }


def brain_3d(prediction, reference, foreground) -> dict[str, float]:
    """Protocol ``brain-3d``, version 1 (ours): as ``brain``, with the SSIM of volumes, so that flicker between
    slices, which no figure of single slices sees, costs something.

    SSIM: a Gaussian window of 11x11x11, sigma 1.5 voxels of the network's grid, edges mirrored (so a volume may have
    fewer slices), mean over the foreground voxels. Arguments, errors and units as ``phmdiff_slice``.
    """
    prediction, reference, foreground = _checked(prediction, reference, foreground)
    difference = (prediction - reference)[foreground]  # (V,)
    return {
        "psnr": float(_psnr((difference**2).mean())),
        "ssim": float(100 * _ssim_3d(prediction, reference)[foreground].mean()),
        "mae": float(np.abs(difference).mean()),
    }


PROTOCOLS = {"phmdiff-slice": phmdiff_slice, "brain": brain, "brain-3d": brain_3d}
VERSIONS = {"phmdiff-slice": 1, "brain": 1, "brain-3d": 1}  # raised whenever a definition changes a figure


def sharpness(prediction, reference, foreground) -> float:
    """Gradient energy of the prediction over the reference's, inside the foreground; 1: as sharp as the truth.

    Sums of squared differences between neighbours along H and W, both of them foreground. Below 1 is blur; noise
    raises it too, so read it beside PSNR and SSIM, never alone. Arguments and errors as ``phmdiff_slice``.
    Ours; a constant reference gives NaN.
    """
    prediction, reference, foreground = _checked(prediction, reference, foreground)

    def energy(image: np.ndarray) -> float:
        total = 0.0
        for axis in (1, 2):
            edge = np.diff(image, axis=axis)
            both = np.take(foreground, range(1, image.shape[axis]), axis) & np.take(
                foreground, range(image.shape[axis] - 1), axis
            )
            total += float((edge[both] ** 2).sum())
        return total

    there = energy(reference)
    return energy(prediction) / there if there > 0 else float("nan")


def summarise(per_subject: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and sample standard deviation (ddof 1) over subjects, the unit of every comparison.

    per_subject : ``{subject: {metric: value}}``, the same metrics for every subject
    Returns ``{metric: {"mean", "std", "n"}}``; std is 0.0 for n = 1. One perfect subject makes a
    mean of ``inf``, and its std is NaN: there is no spread around infinity.

    Raises PhmdiffError METRIC_EMPTY (exit 3) without a subject, ValueError if subjects differ in
    their metrics.
    """
    if not per_subject:
        raise PhmdiffError("METRIC_EMPTY", "there is no subject to score", "give at least one pair", exit_code=DATA)
    first, *others = per_subject.values()
    if any(other.keys() != first.keys() for other in others):
        raise ValueError("subjects have different metrics")
    out = {}
    for metric in first:
        values = np.array([scores[metric] for scores in per_subject.values()], dtype=np.float64)
        with np.errstate(invalid="ignore"):  # inf - inf
            std = float(values.std(ddof=1)) if values.size > 1 else 0.0
        out[metric] = {"mean": float(values.mean()), "std": std, "n": int(values.size)}
    return out


def _checked(prediction, reference, foreground) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    prediction = np.asarray(prediction, dtype=np.float64)
    reference = np.asarray(reference, dtype=np.float64)
    foreground = np.asarray(foreground, dtype=bool)
    shape = reference.shape
    if len(shape) != 3 or prediction.shape != shape or foreground.shape != shape:
        raise PhmdiffError(
            "METRIC_SHAPE",
            f"prediction {prediction.shape}, reference {shape} and foreground {foreground.shape} are no three "
            "volumes (Z, H, W) of one shape",
            "compare images on the same grid", exit_code=DATA,
        )  # fmt: skip
    if min(shape[1:]) < SSIM_SIDE:
        raise PhmdiffError("METRIC_SHAPE", f"slices of {shape[1]}x{shape[2]} are smaller than the SSIM window",
                           f"give slices of at least {SSIM_SIDE}x{SSIM_SIDE}", exit_code=DATA)  # fmt: skip
    if not foreground.any():
        raise PhmdiffError("METRIC_EMPTY", "the foreground mask is empty", "check the mask", exit_code=DATA)
    for name, image in (("prediction", prediction), ("reference", reference)):
        bad = image.size - np.count_nonzero(np.isfinite(image))
        if bad:
            raise PhmdiffError("METRIC_NONFINITE", f"the {name} has {bad} NaN or Inf voxels",
                               "such an image has no score", exit_code=DATA)  # fmt: skip
    return prediction, reference, foreground


def _psnr(mse):
    with np.errstate(divide="ignore"):  # a perfect prediction is inf
        return 10 * np.log10(DATA_RANGE**2 / np.asarray(mse))


def _ssim(prediction: np.ndarray, reference: np.ndarray) -> tuple[float, np.ndarray]:
    """(H, W) twice -> mean without the 5-voxel border, map (H, W)."""
    from skimage.metrics import structural_similarity

    return structural_similarity(
        prediction, reference, data_range=DATA_RANGE, full=True,
        gaussian_weights=True, sigma=SSIM_SIGMA, use_sample_covariance=False,
    )  # fmt: skip


def _ssim_3d(prediction: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(Z, H, W) twice -> map (Z, H, W). scikit-image's, which asks for at least 11 slices."""
    from scipy.ndimage import gaussian_filter

    def mean(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, SSIM_SIGMA, truncate=3.5)

    a, b = mean(prediction), mean(reference)
    both = mean(prediction**2) - a * a + mean(reference**2) - b * b
    c1, c2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2
    light = (2 * a * b + c1) / (a * a + b * b + c1)
    return light * (2 * (mean(prediction * reference) - a * b) + c2) / (both + c2)
