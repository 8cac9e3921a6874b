"""Scores against figures computed by hand, against scikit-image, and against other definitions."""

import math

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from phmdiff_fast import metrics
from phmdiff_fast.errors import PhmdiffError

ORACLE = dict(data_range=2.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)


@pytest.fixture
def images():
    """(prediction, reference, foreground), (4, 24, 20): a soft blob in -1; slice 3 is background."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:24j, -1:1:20j]
    foreground = np.stack([x**2 + y**2 < r for r in (0.7, 0.5, 0.3, 0.0)])
    reference = np.where(foreground, 0.6 * np.sin(4 * x + 3 * y) + 0.1, -1.0)
    prediction = reference + 0.1 * rng.standard_normal(reference.shape) * foreground + 0.02
    return prediction, reference, foreground


def one_slice(value, side=12):
    return np.full((1, side, side), float(value))


def test_slice_figures_by_hand():
    # A constant error of 0.2: MSE 0.04, PSNR 10 log10(4 / 0.04) = 20 dB. Constant images have no
    # variance, so SSIM is its luminance term (2 ab + C1) / (a^2 + b^2 + C1), C1 = (0.01 * 2)^2.
    got = metrics.phmdiff_slice(one_slice(0.5), one_slice(0.3), one_slice(1))
    assert got["psnr"] == pytest.approx(20.0, abs=1e-9)
    assert got["mae"] == pytest.approx(0.2, abs=1e-12)
    assert got["ssim"] == pytest.approx(100 * (2 * 0.5 * 0.3 + 4e-4) / (0.5**2 + 0.3**2 + 4e-4), abs=1e-9)


def test_brain_figures_by_hand():
    # Four foreground voxels, one of them wrong by 0.8: MSE 0.16, PSNR 10 log10(25), MAE 0.2.
    reference, foreground = one_slice(0.0, 16), np.zeros((1, 16, 16), bool)
    foreground[0, 4:6, 4:6] = True
    prediction = reference.copy()
    prediction[0, 4, 4] = 0.8
    prediction[0, 12, 12] = 1.0  # background: no score sees it but through an SSIM window
    got = metrics.brain(prediction, reference, foreground)
    assert got["psnr"] == pytest.approx(10 * math.log10(25), abs=1e-9)
    assert got["mae"] == pytest.approx(0.2, abs=1e-12)


def test_slice_protocol_is_scikit_image_over_slices_with_foreground(images):
    prediction, reference, _ = images
    values = metrics.phmdiff_slice_values(*images)
    assert values["slice"].tolist() == [0, 1, 2]
    psnr = [peak_signal_noise_ratio(reference[z], prediction[z], data_range=2) for z in range(3)]
    ssim = [100 * structural_similarity(reference[z], prediction[z], **ORACLE) for z in range(3)]
    np.testing.assert_allclose(values["psnr"], psnr, rtol=1e-12)
    np.testing.assert_allclose(values["ssim"], ssim, rtol=1e-10)
    got = metrics.phmdiff_slice(*images)
    assert got == {name: pytest.approx(values[name].mean()) for name in ("psnr", "ssim", "mae")}


def test_brain_protocol_is_scikit_image_inside_the_mask(images):
    prediction, reference, foreground = images
    maps = [structural_similarity(reference[z], prediction[z], full=True, **ORACLE)[1] for z in range(4)]
    got = metrics.brain(*images)
    assert got["ssim"] == pytest.approx(100 * np.stack(maps)[foreground].mean(), rel=1e-10)
    inside = peak_signal_noise_ratio(reference[foreground], prediction[foreground], data_range=2)
    assert got["psnr"] == pytest.approx(inside, rel=1e-12)


def test_another_definition_gives_another_figure(images):
    prediction, reference, _ = images
    ours = metrics.phmdiff_slice(*images)
    inside = metrics.brain(*images)
    pooled = peak_signal_noise_ratio(reference, prediction, data_range=2)  # one MSE over the volume
    uniform = np.mean([100 * structural_similarity(reference[z], prediction[z], data_range=2) for z in range(3)])
    assert ours["psnr"] - inside["psnr"] > 1.0  # the easy background flatters
    assert ours["mae"] < inside["mae"]
    assert abs(ours["psnr"] - pooled) > 0.5
    assert abs(ours["ssim"] - uniform) > 0.1


def test_perfect_prediction_stays_infinite(images):
    _, reference, foreground = images
    for protocol in metrics.PROTOCOLS.values():
        assert protocol(reference, reference, foreground) == {"psnr": math.inf, "ssim": pytest.approx(100), "mae": 0.0}


def test_arithmetic_is_float64(images):
    single = [image.astype(np.float32) for image in images[:2]]
    double = [image.astype(np.float64) for image in single]
    for protocol in metrics.PROTOCOLS.values():
        assert protocol(*single, images[2]) == protocol(*double, images[2])


def _broken(images, what):
    prediction, reference, foreground = (image.copy() for image in images)
    if what == "nan":
        prediction[0, 0, 0] = np.nan
    if what == "inf in reference":
        reference[1, 0, 0] = np.inf
    if what == "empty":
        foreground[:] = False
    if what == "transposed":
        prediction = prediction.transpose(0, 2, 1)
    if what == "mask":
        foreground = foreground[:3]
    if what == "one slice":
        prediction, reference, foreground = prediction[0], reference[0], foreground[0]
    if what == "small":
        prediction, reference, foreground = (image[:, :10] for image in (prediction, reference, foreground))
    return prediction, reference, foreground


@pytest.mark.parametrize("protocol", metrics.PROTOCOLS)
@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("nan", "METRIC_NONFINITE"),
        ("inf in reference", "METRIC_NONFINITE"),
        ("empty", "METRIC_EMPTY"),
        ("transposed", "METRIC_SHAPE"),
        ("mask", "METRIC_SHAPE"),
        ("one slice", "METRIC_SHAPE"),
        ("small", "METRIC_SHAPE"),
    ],
)
def test_what_has_no_score_is_refused(images, protocol, what, code):
    with pytest.raises(PhmdiffError) as caught:
        metrics.PROTOCOLS[protocol](*_broken(images, what))
    assert (caught.value.code, caught.value.exit_code) == (code, 3)


def test_summary_over_subjects():
    scores = {"a": {"psnr": 20.0}, "b": {"psnr": 24.0}, "c": {"psnr": 28.0}}
    assert metrics.summarise(scores) == {"psnr": {"mean": 24.0, "std": 4.0, "n": 3}}  # ddof 1
    assert metrics.summarise({"a": {"psnr": 20.0}}) == {"psnr": {"mean": 20.0, "std": 0.0, "n": 1}}


def test_summary_keeps_infinity_and_refuses_nothing_or_unlike():
    got = metrics.summarise({"a": {"psnr": math.inf}, "b": {"psnr": 30.0}})["psnr"]
    assert got["mean"] == math.inf
    assert math.isnan(got["std"])
    with pytest.raises(PhmdiffError, match="METRIC_EMPTY"):
        metrics.summarise({})
    with pytest.raises(ValueError, match="different metrics"):
        metrics.summarise({"a": {"psnr": 1.0}, "b": {"ssim": 1.0}})


def test_every_protocol_has_a_version():
    assert metrics.PROTOCOLS.keys() == metrics.VERSIONS.keys()


def volumes():
    """(prediction, reference, foreground), (14, 16, 15)."""
    rng = np.random.default_rng(1)
    z, y, x = np.mgrid[-1:1:14j, -1:1:16j, -1:1:15j]
    foreground = x**2 + y**2 + z**2 < 0.8
    reference = np.where(foreground, 0.5 * np.sin(3 * x + 2 * y - 4 * z), -1.0)
    return reference + 0.1 * rng.standard_normal(reference.shape), reference, foreground


def test_brain_3d_is_scikit_image_in_three_dimensions_over_the_foreground():
    prediction, reference, foreground = volumes()
    _, map_3d = structural_similarity(reference, prediction, full=True, **ORACLE)
    got = metrics.brain_3d(prediction, reference, foreground)
    assert got["ssim"] == pytest.approx(100 * map_3d[foreground].mean(), abs=1e-9)
    plane = metrics.brain(prediction, reference, foreground)
    assert (got["psnr"], got["mae"]) == (plane["psnr"], plane["mae"])


def test_only_the_volume_s_ssim_sees_flicker_between_slices():
    texture = np.random.default_rng(2).standard_normal((14, 16, 15))
    reference, everywhere = 0.7 + 0.03 * texture, np.ones(texture.shape, bool)  # bright: an offset alone costs little
    steady, flicker = (reference + 0.05 * sign[:, None, None] for sign in (np.ones(14), (-1.0) ** np.arange(14)))
    flat = [metrics.brain(image, reference, everywhere)["ssim"] for image in (steady, flicker)]
    solid = [metrics.brain_3d(image, reference, everywhere)["ssim"] for image in (steady, flicker)]
    assert abs(flat[0] - flat[1]) < 1
    assert solid[0] - solid[1] > 10


def test_sharpness_by_hand_and_what_blur_noise_and_background_do():
    reference = np.zeros((1, 12, 12))
    reference[0, :, 6:] = 1.0  # one edge: 12 differences of 1 along W, none along H
    everywhere = np.ones(reference.shape, bool)
    assert metrics.sharpness(reference, reference, everywhere) == 1.0
    assert metrics.sharpness(0.5 * reference, reference, everywhere) == pytest.approx(0.25)
    ramp = reference.copy()
    ramp[0, :, 6] = 0.5  # the same edge over two pixels: 12 (0.25 + 0.25)
    assert metrics.sharpness(ramp, reference, everywhere) == pytest.approx(0.5)
    noisy = reference + 0.3 * np.random.default_rng(0).standard_normal(reference.shape)
    assert metrics.sharpness(noisy, reference, everywhere) > 1.5
    left = everywhere.copy()
    left[:, :, 6:] = False  # the edge itself is not inside
    assert math.isnan(metrics.sharpness(reference, reference, left))
