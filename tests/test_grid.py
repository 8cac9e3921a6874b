"""Foreground, scaling and in-plane geometry against values worked out by hand and against scipy, skimage, torch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phmdiff_fast.config import DataConfig
from phmdiff_fast.errors import PhmdiffError
from phmdiff_fast.grid import (
    SLICE_AXIS,
    InPlane,
    Scaling,
    area_matrix,
    bilinear_matrix,
    fill_for,
    fit_scaling,
    foreground_mask,
    neighbours,
    otsu_threshold,
    scaling_for,
    stack_context,
    thumbnail,
)


def ball(shape, radius, centre=None):
    at = np.indices(shape).astype(float)
    centre = np.array(shape) / 2 if centre is None else np.array(centre)
    return ((at - centre[:, None, None, None]) ** 2).sum(0) < radius**2


# ---------------------------------------------------------------- foreground


def test_a_given_mask_wins():
    mask = np.zeros((3, 4, 5), np.float32)
    mask[1, 2, 3] = 2
    assert np.array_equal(foreground_mask(np.ones((3, 4, 5), np.float32), mask), mask > 0)


def test_a_mask_that_says_nothing_or_does_not_fit():
    with pytest.raises(PhmdiffError) as caught:
        foreground_mask(np.ones((3, 4, 5)), np.zeros((3, 4, 5)))
    assert (caught.value.code, caught.value.exit_code) == ("NO_FOREGROUND", 3)
    with pytest.raises(ValueError, match="differ"):
        foreground_mask(np.ones((3, 4, 5)), np.ones((3, 4, 6)))


@pytest.mark.parametrize("minimum", [0.0, -7.0, 3.0])
def test_skull_stripped_scans_are_above_their_minimum(minimum):
    voxels = np.full((5, 5, 4), minimum, np.float32)
    voxels.flat[20:] += np.arange(80) + 1  # exactly 20 % are background
    assert np.array_equal(foreground_mask(voxels), voxels > minimum)


def test_just_below_20_percent_background_is_otsus_case():
    voxels = np.full((5, 5, 4), 0.0, np.float32)
    voxels.flat[19:] = np.linspace(1, 100, 81)
    assert foreground_mask(voxels).sum() < 60


def test_otsu_takes_the_largest_component_and_fills_it():
    head, hole, speck = ball((24, 24, 24), 9), ball((24, 24, 24), 3), ball((24, 24, 24), 2, (2, 2, 2))
    rng = np.random.default_rng(0)
    voxels = rng.normal(10, 3, head.shape) + 100 * (head & ~hole) + 100 * speck
    assert np.array_equal(foreground_mask(voxels.astype(np.float32)), head)


def test_holes_are_those_of_scipy():
    from scipy import ndimage

    from phmdiff_fast.grid import _fill_holes

    mask = np.random.default_rng(1).random((15, 16, 17)) < 0.8
    expected = ndimage.binary_fill_holes(mask)
    assert expected.sum() > mask.sum()
    assert np.array_equal(_fill_holes(mask), expected)


def test_otsu_is_that_of_skimage():
    from skimage.filters import threshold_otsu

    rng = np.random.default_rng(2)
    voxels = np.concatenate([rng.normal(0, 1, 3000), rng.normal(9, 2, 1000)])
    half_bin = np.ptp(voxels) / 256 / 2  # skimage names the bin's centre, we its upper edge
    assert otsu_threshold(voxels) == pytest.approx(threshold_otsu(voxels) + half_bin, rel=1e-9)
    assert otsu_threshold(np.array([0.0, 0, 0, 1, 1])) == pytest.approx(1 / 256)


def test_a_constant_volume_has_no_foreground():
    assert not foreground_mask(np.full((3, 3, 3), 4.0)).any()


def chest():
    """HU: a body with two lungs, cut off below and open to the air through a windpipe above; a table under it."""
    body = np.zeros((30, 30, 12), bool)
    body[5:25, 8:26] = True
    voxels = np.where(body, 40.0, -1000.0).astype(np.float32)
    voxels[8:12, 12:22, :8] = voxels[16:20, 12:22, :8] = -850
    voxels[12:16, 16:18, 7] = voxels[14, 16, 8:] = -1000
    table = np.zeros_like(body)
    table[2:28, 3:5] = True
    return np.where(table, 120, voxels).astype(np.float32), body


def test_the_body_of_a_ct():
    voxels, body = chest()
    assert np.array_equal(foreground_mask(voxels, hu=True), body)
    assert not np.array_equal(foreground_mask(voxels), body)
    noisy = voxels + np.random.default_rng(0).normal(0, 30, voxels.shape)
    assert np.array_equal(foreground_mask(noisy, hu=True), body)
    mask = np.zeros(voxels.shape)
    mask[3, 3, 3] = 1
    assert np.array_equal(foreground_mask(voxels, mask, hu=True), mask > 0)


def test_minus_500_is_the_bound_and_air_alone_is_no_body():
    voxels = np.full((4, 4, 4), -1000.0)
    voxels[1:3, 1:3, 1:3] = -500
    assert not foreground_mask(voxels, hu=True).any()
    voxels[1, 1, 1] = -499
    assert foreground_mask(voxels, hu=True).sum() == 1
    assert not foreground_mask(np.full((4, 4, 4), 7.0), hu=True).any()  # constant


# ---------------------------------------------------------------- scaling


@pytest.mark.parametrize("contrast", ["ct", "cbct"])
def test_hu_are_scaled_by_a_fixed_window(contrast):
    voxels, body = chest()
    scaling = scaling_for(contrast, voxels, body, (-1024, 3000))
    assert scaling == Scaling(-1024.0, 3000.0)
    scaled = scaling.forward(np.array([-1024.0, 988, 3000, 4000, -3024]))
    np.testing.assert_allclose(scaled, [-1, 0, 1, 1, -1], atol=1e-6)
    assert fill_for(contrast, voxels, (-1024, 3000)) == -1024
    assert scaling_for(contrast, voxels, np.zeros_like(body), (-1, 1)) == Scaling(-1.0, 1.0)


@pytest.mark.parametrize("contrast", ["t1", "mr", "pd"])
def test_what_has_no_unit_is_scaled_by_its_own_percentiles(contrast):
    voxels = np.random.default_rng(0).normal(500, 100, (9, 9, 9)).astype(np.float32)
    inside = ball((9, 9, 9), 4)
    assert scaling_for(contrast, voxels, inside, (-1024, 3000)) == fit_scaling(voxels, inside)
    assert fill_for(contrast, voxels, (-1024, 3000)) == voxels.min()
    with pytest.raises(PhmdiffError, match="foreground is empty"):
        scaling_for(contrast, voxels, np.zeros_like(inside), (-1024, 3000))


def test_scaling_is_the_percentiles_inside_the_foreground():
    voxels = np.full((1, 1, 1201), -1000, np.float32)
    voxels[..., :1001] = np.arange(1001)
    scaling = fit_scaling(voxels, voxels > -1)
    assert scaling == Scaling(5.0, 995.0)
    assert scaling.forward(np.array([5.0, 500, 995, 2000, -100])).tolist() == [-1, 0, 1, 1, -1]
    assert scaling.forward(np.array([1490.0]), clip=False) == pytest.approx([2.0])
    assert scaling.forward(voxels).dtype == np.float32


@settings(max_examples=50, deadline=None)
@given(lo=st.floats(-2000, 2000), width=st.floats(1, 1e4), seed=st.integers(0, 99))
def test_scaling_inverts(lo, width, seed):
    scaling = Scaling(lo, lo + width)
    x = np.random.default_rng(seed).uniform(lo - width, lo + 2 * width, 50).astype(np.float32)
    back = scaling.inverse(scaling.forward(x, clip=False))
    np.testing.assert_allclose(back, x, atol=4 * np.finfo(np.float32).eps * (abs(lo) + 2 * width))


def test_nothing_to_scale():
    with pytest.raises(PhmdiffError) as caught:
        fit_scaling(np.full((3, 3, 3), 2.0, np.float32), np.ones((3, 3, 3), bool))
    assert caught.value.code == "NII_CONSTANT"
    with pytest.raises(PhmdiffError) as caught:
        fit_scaling(np.zeros((3, 3, 3), np.float32), np.zeros((3, 3, 3), bool))
    assert caught.value.code == "NO_FOREGROUND"


# ---------------------------------------------------------------- in-plane geometry


def test_area_weights_by_hand():
    third = 1 / 3
    expected = [[2 * third, third, 0], [0, third, 2 * third]]  # 3 -> 2: each output covers 1.5 inputs
    np.testing.assert_allclose(area_matrix(3, 2), expected, rtol=1e-7)
    np.testing.assert_allclose(area_matrix(6, 3), np.kron(np.eye(3), [[0.5, 0.5]]), rtol=1e-7)
    expected = [[0.6, 0.4, 0, 0, 0], [0, 0.2, 0.6, 0.2, 0], [0, 0, 0, 0.4, 0.6]]  # 5 -> 3
    np.testing.assert_allclose(area_matrix(5, 3), expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [(13, 16, 4), (9, 7, 4), (40, 33, 4), (16, 16, 4)])
def test_blocks_of_a_finer_grid_have_the_plain_one_s_means(shape):
    """Also where the scan is coarser than the finer grid, and where it is padded to the plain one."""
    plane = InPlane.of(shape, DataConfig(image_size=8))
    volume = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    fine = plane.to_grid(volume, -1.0, 3)
    assert fine.shape == (4, 24, 24)
    np.testing.assert_allclose(fine.reshape(4, 8, 3, 8, 3).mean((2, 4)), plane.to_grid(volume, -1.0), atol=1e-5)


def test_bilinear_weights_by_hand():
    expected = [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]
    np.testing.assert_allclose(bilinear_matrix(2, 4), expected, rtol=1e-7)
    np.testing.assert_allclose(bilinear_matrix(1, 3), [[1], [1], [1]])


@settings(max_examples=40, deadline=None)
@given(out=st.integers(1, 40), more=st.integers(0, 60))
def test_weights_sum_up(out, more):
    area, bilinear = area_matrix(out + more, out), bilinear_matrix(out, out + more)
    np.testing.assert_allclose(area.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(area.sum(0), out / (out + more), rtol=1e-5)  # the mean is kept
    np.testing.assert_allclose(bilinear.sum(1), 1, rtol=1e-5)
    assert (area >= 0).all()
    assert (bilinear >= 0).all()


def test_bilinear_is_torchs():
    import torch

    slices = np.random.default_rng(0).normal(size=(2, 7, 7)).astype(np.float32)
    plane = InPlane((17, 13), 7)
    expected = torch.nn.functional.interpolate(torch.from_numpy(slices)[None], size=(17, 17), mode="bilinear")[
        0
    ].numpy()
    got = plane.from_grid(slices, 0.0)
    np.testing.assert_allclose(got, expected[:, :, 2:15].transpose(1, 2, 0), atol=1e-5)


def test_integer_ratio_is_block_means_with_padding():
    volume = np.random.default_rng(0).normal(size=(6, 8, 3)).astype(np.float32)
    padded = np.pad(volume, ((1, 1), (0, 0), (0, 0)), constant_values=-4)
    expected = padded.reshape(4, 2, 4, 2, 3).mean((1, 3)).transpose(2, 0, 1)
    np.testing.assert_allclose(InPlane((6, 8), 4).to_grid(volume, -4.0), expected, atol=1e-6)


def test_non_integer_ratio_by_hand():
    volume = np.arange(9, dtype=np.float32).reshape(3, 3, 1)
    got = InPlane((3, 3), 2).to_grid(volume, 0.0)
    # corner = (0 + 1/2 * 1 + 1/2 * 3 + 1/4 * 4) / 2.25
    np.testing.assert_allclose(got[0], [[4 / 3, 8 / 3], [16 / 3, 20 / 3]], rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(x=st.integers(1, 23), y=st.integers(1, 23), size=st.integers(1, 23))
def test_the_mean_over_the_square_is_kept(x, y, size):
    volume = np.random.default_rng(x).uniform(0, 1, (x, y, 2)).astype(np.float32)
    plane = InPlane((x, y), size)
    got = plane.to_grid(volume, 0.0)
    assert got.shape == (2, size, size)
    assert got.dtype == np.float32
    total = volume.sum((0, 1)) / plane.canvas**2
    np.testing.assert_allclose(got.mean((1, 2)), total, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(x=st.integers(1, 23), y=st.integers(1, 23), more=st.integers(0, 9))
def test_without_resampling_the_way_back_is_exact(x, y, more):
    volume = np.random.default_rng(y).normal(size=(x, y, 3)).astype(np.float32)
    plane = InPlane((x, y), max(x, y) + more)  # a smaller scan is padded, never upsampled
    slices = plane.to_grid(volume, -9.0)
    assert (slices == -9).sum() == slices.size - volume.size
    assert np.array_equal(plane.from_grid(slices, 0.0), volume)


def test_crop_is_about_the_centre_and_comes_back_in_place():
    volume = np.arange(7 * 9, dtype=np.float32).reshape(7, 9, 1)
    plane = InPlane((7, 9), 4, crop=4)
    slices = plane.to_grid(volume, 0.0)
    assert np.array_equal(slices[0], volume[1:5, 2:6, 0])
    back = plane.from_grid(slices, -1.0)
    assert np.array_equal(back[1:5, 2:6], volume[1:5, 2:6])
    assert (back == -1).sum() == volume.size - 16


def test_crop_wider_than_the_scan_pads_and_odd_sides_stay_centred():
    plane = InPlane((3, 4), 7, crop=7)
    slices = plane.to_grid(np.ones((3, 4, 1), np.float32), 0.0)
    assert slices[0].sum(1).tolist() == [0, 0, 4, 4, 4, 0, 0]
    assert slices[0].sum(0).tolist() == [0, 3, 3, 3, 3, 0, 0]


def test_a_smooth_image_survives_down_and_up():
    x, y = np.meshgrid(np.linspace(0, np.pi, 64), np.linspace(0, np.pi, 60), indexing="ij")
    volume = (np.sin(x) * np.sin(y))[..., None].astype(np.float32)
    plane = InPlane((64, 60), 48)
    error = plane.from_grid(plane.to_grid(volume, 0.0), 0.0) - volume
    assert np.abs(error).max() < 0.02  # a shift by half a voxel would cost 0.025 and more


def test_no_slices_are_no_slices():
    assert InPlane((4, 6), 4).to_grid(np.zeros((4, 6, 0)), 0.0).shape == (0, 4, 4)
    assert InPlane((4, 6), 4).from_grid(np.zeros((0, 4, 4)), 0.0).shape == (4, 6, 0)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="expected"):
        InPlane((4, 5), 4).to_grid(np.zeros((5, 4, 1)), 0.0)
    with pytest.raises(ValueError, match="expected"):
        InPlane((4, 5), 4).from_grid(np.zeros((1, 5, 5)), 0.0)


# ---------------------------------------------------------------- the axis


def test_the_axis_names_are_those_of_ras():
    volume = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    for name, side, expected in (
        ("axial", 3, volume[:, :, 1]),
        ("coronal", 4, volume[:, 1, :]),
        ("sagittal", 4, volume[1, :, :]),
    ):
        plane = InPlane.of(volume.shape, DataConfig(image_size=8, axis=name))
        assert plane.axis == SLICE_AXIS[name]
        assert plane.shape == expected.shape
        slices = plane.to_grid(volume, -1.0)
        row, column = ((8 - n) // 2 for n in expected.shape)
        assert np.array_equal(slices[1, row : row + expected.shape[0], column : column + expected.shape[1]], expected)
        assert (slices[1] == -1).sum() == 64 - expected.size
        assert max(expected.shape) == side


def test_in_plane_of_the_settings():
    assert InPlane.of((10, 12, 14), DataConfig(image_size=8)) == InPlane((10, 12), 8)
    assert InPlane.of((10, 12, 14), DataConfig(image_size=8, crop=9, axis="coronal")) == InPlane((10, 14), 8, 9, 1)
    assert InPlane.of((10, 12, 14), DataConfig(image_size=8, axis="sagittal")) == InPlane((12, 14), 8, None, 0)


@settings(max_examples=60, deadline=None)
@given(shape=st.tuples(*[st.integers(1, 14)] * 3), axis=st.sampled_from(sorted(SLICE_AXIS)), crop=st.booleans())
def test_every_axis_is_the_axial_one_of_the_turned_volume(shape, axis, crop):
    volume = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    config = DataConfig(image_size=9, axis=axis, crop=10 if crop else None)
    plane = InPlane.of(shape, config)
    turned = np.moveaxis(volume, SLICE_AXIS[axis], 2)
    axial = InPlane.of(turned.shape, config.model_copy(update={"axis": "axial"}))
    slices = plane.to_grid(volume, -3.0)
    assert slices.shape == (shape[SLICE_AXIS[axis]], 9, 9)
    assert np.array_equal(slices, axial.to_grid(turned, -3.0))
    back = plane.from_grid(slices, -5.0)
    assert back.flags.c_contiguous
    assert np.array_equal(np.moveaxis(back, SLICE_AXIS[axis], 2), axial.from_grid(slices, -5.0))


@pytest.mark.parametrize("axis", SLICE_AXIS)
def test_the_way_back_is_exact_along_every_axis(axis):
    volume = np.random.default_rng(0).normal(size=(7, 8, 9)).astype(np.float32)
    plane = InPlane.of(volume.shape, DataConfig(image_size=11, axis=axis))
    assert np.array_equal(plane.from_grid(plane.to_grid(volume, 0.0), 7.0), volume)
    with pytest.raises(ValueError, match="expected"):
        plane.to_grid(np.zeros((8, 9, 7)), 0.0)


# ---------------------------------------------------------------- neighbouring slices


def test_context_by_hand():
    slices = np.array([[1, 10], [2, 20], [3, 30]], np.float32)[..., None, None]  # (Z, Cs, 1, 1)
    assert stack_context(slices, 1)[..., 0, 0].tolist() == [
        [1, 1, 2, 10, 10, 20], [1, 2, 3, 10, 20, 30], [2, 3, 3, 20, 30, 30],
    ]  # fmt: skip
    assert stack_context(slices, 3)[0, :7, 0, 0].tolist() == [1, 1, 1, 1, 2, 3, 3]
    assert np.array_equal(stack_context(slices, 0), slices)
    assert neighbours(3, 1).tolist() == [[0, 0, 1], [0, 1, 2], [1, 2, 2]]


@settings(max_examples=40, deadline=None)
@given(count=st.integers(0, 6), sources=st.integers(1, 3), k=st.integers(0, 8))
def test_context_is_the_neighbours(count, sources, k):
    slices = np.random.default_rng(0).normal(size=(count, sources, 2, 3)).astype(np.float32)
    stacked = stack_context(slices, k)
    assert stacked.shape == (count, sources * (2 * k + 1), 2, 3)
    assert stacked.flags.c_contiguous
    for z in range(count):
        for source in range(sources):
            for offset in range(-k, k + 1):
                channel = source * (2 * k + 1) + k + offset
                assert np.array_equal(stacked[z, channel], slices[min(max(z + offset, 0), count - 1), source])


# ---------------------------------------------------------------- thumbnails


def test_a_thumbnail_averages_and_never_enlarges():
    plane = np.random.default_rng(0).random((12, 8))
    np.testing.assert_allclose(thumbnail(plane, 6), plane.reshape(6, 2, 4, 2).mean((1, 3)), rtol=1e-5)
    np.testing.assert_allclose(thumbnail(plane, 12), plane, rtol=1e-6)
    np.testing.assert_allclose(thumbnail(plane, 100), plane, rtol=1e-6)
    assert thumbnail(np.ones((300, 1)), 112).shape == (112, 1)


def test_a_thumbnail_has_square_pixels():
    plane = np.arange(8.0).reshape(4, 2)
    assert np.array_equal(thumbnail(plane, 50, (1.0, 2.0)), plane.repeat(2, 1))  # 4 mm x 4 mm
    assert thumbnail(np.ones((100, 30)), 50, (0.5, 5.0)).shape == (17, 50)  # 50 mm x 150 mm
