"""Simulated patients: physics, anatomy, files, and that value lookup does not solve them."""

import sys
from itertools import pairwise

import nibabel as nib
import numpy as np
import pytest

from phmdiff_fast import metrics, simulate
from phmdiff_fast.errors import PhmdiffError
from phmdiff_fast.nifti import read_volume

CONTRASTS = ("t1", "t2", "flair", "seg")


@pytest.fixture(scope="module")
def atlas():
    pytest.importorskip("nilearn")
    return simulate.load_atlas(4.0)


@pytest.fixture(scope="module")
def patients(atlas):
    return {i: simulate.simulate_patient(atlas, 0, i) for i in range(1, 13)}


@pytest.fixture
def quick(monkeypatch, atlas):
    monkeypatch.setattr(simulate, "load_atlas", lambda resolution: atlas)


def test_signal_equations_by_hand():
    # Spin echo: 0.8 (1 - e^-1) e^-0.5; inversion recovery: |1 - 2 e^-0.5 + e^-2| for T1 = 1000.
    assert simulate._signal(0.8, 1000.0, 80.0, (1000.0, 40.0)) == pytest.approx(0.8 * 0.6321206 * 0.6065307, rel=1e-6)
    got = simulate._signal(1.0, 1000.0, 1e12, (2000.0, 0.0, 500.0))
    assert got == pytest.approx(abs(1 - 2 * 0.6065307 + 0.1353353), rel=1e-5)
    # The magnitude: before its null, the longitudinal magnetisation is negative.
    assert simulate._signal(1.0, 1000.0, 1e12, (1e9, 0.0, 100.0)) == pytest.approx(2 * 0.9048374 - 1, rel=1e-6)


def test_flair_nulls_fluid_and_shows_lesions():
    flair = {name: simulate._signal(*constants, simulate.FLAIR) for name, constants in simulate.TISSUES.items()}
    lesion = simulate._signal(*simulate.LESION, simulate.FLAIR)
    assert flair["csf"] < 0.2 * flair["wm"]
    assert lesion > 1.3 * max(flair.values())


def test_contrasts_are_those_of_a_brain(atlas, patients):
    share = {k: atlas.maps[k] for k in simulate.TISSUES}
    index = np.round(np.linalg.inv(atlas.affine)[:3, :3] @ atlas.points.reshape(3, -1)
                     + np.linalg.inv(atlas.affine)[:3, 3:]).astype(int)  # fmt: skip
    inside = (index >= 0).all(0) & (index < np.array(atlas.maps["gm"].shape)[:, None]).all(0)
    index = np.where(inside, index, 0)
    pure = {k: ((share[k][tuple(index)] > 0.9) & inside).reshape(atlas.grid.shape) for k in share}
    for number, patient in patients.items():
        healthy = (patient["seg"] == 0) & (patient["t1"] > 0)
        middle = {
            (c, k): np.median(patient[c][pure[k] & healthy]) for c in ("t1", "t2", "flair") for k in simulate.TISSUES
        }
        assert middle["t1", "wm"] > middle["t1", "gm"] > middle["t1", "csf"], number
        assert middle["t2", "csf"] > middle["t2", "gm"] > middle["t2", "wm"], number
        assert middle["flair", "gm"] > middle["flair", "wm"] > middle["flair", "csf"], number
        if patient["seg"].sum() > 10:
            lesion = patient["seg"] > 0
            assert np.median(patient["flair"][lesion]) > 1.2 * middle["flair", "wm"], number
            assert np.median(patient["t1"][lesion]) < middle["t1", "wm"], number


def test_volumes_are_stripped_whole_and_alike_in_shape(atlas, patients):
    for patient in patients.values():
        brain = patient["t1"] > 0
        assert 0.1 < brain.mean() < 0.4
        for contrast in CONTRASTS:
            voxels = patient[contrast]
            assert voxels.shape == atlas.grid.shape
            assert voxels.dtype == np.float32
            assert np.isfinite(voxels).all()
            assert (voxels == np.round(voxels)).all()
            assert (voxels[~brain] == 0).all()
            if contrast != "seg":
                assert (voxels[brain] > 0).all()
        assert set(np.unique(patient["seg"])) <= {0, 1}


def test_about_half_have_a_lesion_and_no_two_are_alike(patients):
    sick = sum(patient["seg"].any() for patient in patients.values())
    assert 3 <= sick <= 9
    tops = [np.percentile(patient["t1"], 99) for patient in patients.values()]
    assert max(tops) > 2 * min(tops)  # gains
    brains = [patient["t1"] > 0 for patient in patients.values()]
    overlap = [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in pairwise(brains)]
    assert min(overlap) > 0.7
    assert max(overlap) < 0.99


def test_smooth_field_is_smooth_and_of_unit_size(atlas):
    coarse = simulate._smooth(np.random.default_rng(0), atlas, 38.0)
    fine = simulate._smooth(np.random.default_rng(0), atlas, 8.0)
    assert coarse.shape == fine.shape == atlas.grid.shape
    assert 0.5 < coarse.std() < 1.6
    assert 0.8 < fine.std() < 1.2
    for axis in range(3):  # every axis has its own knots, and none is left flat
        steps = [np.abs(np.diff(field, axis=axis)).mean() for field in (coarse, fine)]
        assert 0 < 2 * steps[0] < steps[1]


def test_warp_stays_near_and_moves_everybody_differently(atlas):
    linear_off = []
    for seed in range(4):
        mm = simulate._warped(atlas, np.random.default_rng(seed))
        assert mm.shape == (3, *atlas.grid.shape)
        inside = np.linalg.norm(atlas.points, axis=0) < 70  # mm
        moved = np.linalg.norm(mm - atlas.points, axis=0)[inside]
        assert 1 < moved.mean() < 20
        linear_off.append(mm)
        # No folding: the map keeps its orientation everywhere in the brain.
        jacobian = np.stack([np.stack(np.gradient(mm[a], 4.0)) for a in range(3)])
        assert (np.linalg.det(np.moveaxis(jacobian, (0, 1), (-2, -1)))[inside] > 0).mean() > 0.999
    assert np.abs(linear_off[0] - linear_off[1]).max() > 3


def lookup_psnr(train, test):
    """Mean slice PSNR of the best table from T1 values to T2 values, on the last patients."""

    def scaled(patient, contrast):
        brain = patient["t1"] > 0
        low, high = np.percentile(patient[contrast][brain], [0.5, 99.5])
        image = np.where(brain, np.clip((patient[contrast] - low) / (high - low) * 2 - 1, -1, 1), -1)
        return np.moveaxis(image, 2, 0)

    def place(image):
        return np.clip(((image + 1) * 64).astype(int), 0, 127)

    places = np.concatenate([place(scaled(p, "t1")).ravel() for p in train])
    values = np.concatenate([scaled(p, "t2").ravel() for p in train])
    table = np.bincount(places, values, 128) / np.maximum(np.bincount(places, minlength=128), 1)
    scores = [metrics.phmdiff_slice(table[place(scaled(p, "t1"))], scaled(p, "t2"), np.moveaxis(p["t1"] > 0, 2, 0))
              for p in test]  # fmt: skip
    return np.mean([score["psnr"] for score in scores])


def test_a_table_of_values_learns_much_but_not_all(patients):
    train, test = [patients[i] for i in range(1, 10)], [patients[i] for i in range(10, 13)]
    assert 20 < lookup_psnr(train, test) < 27.5  # 29 without shading


def test_cohort_on_disk(tmp_path, quick, patients, atlas):
    heard = []
    names = simulate.simulate_cohort(
        tmp_path / "c", num_subjects=2, resolution=4, progress=lambda done, total: heard.append((done, total))
    )
    assert names == ["sim-001", "sim-002"]
    assert heard == [(1, 2), (2, 2)]
    files = sorted(str(path.relative_to(tmp_path / "c")) for path in (tmp_path / "c").rglob("*.nii.gz"))
    assert files == sorted(f"{name}/{name}_{contrast}.nii.gz" for name in names for contrast in CONTRASTS)
    for i, name in enumerate(names, start=1):
        for contrast in CONTRASTS:
            path = tmp_path / "c" / name / f"{name}_{contrast}.nii.gz"
            volume = read_volume(path, allow_constant=contrast == "seg")
            # Patient i is the same in a cohort of 2 as in one of 12.
            np.testing.assert_array_equal(volume.voxels, patients[i][contrast])
            np.testing.assert_array_equal(volume.affine, atlas.grid.affine)
            assert bytes(nib.load(path).header["descrip"]).rstrip(b"\0") == b"SIMULATED phmdiff-fast"


def test_another_seed_is_another_patient(atlas, patients):
    assert not np.array_equal(simulate.simulate_patient(atlas, 1, 1)["t1"], patients[1]["t1"])


def test_filled_folder_is_left_alone(tmp_path, quick):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(PhmdiffError) as caught:
        simulate.simulate_cohort(tmp_path, num_subjects=1)
    assert (caught.value.code, caught.value.exit_code) == ("OUTPUT_EXISTS", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(PhmdiffError) as caught:
        simulate.simulate_cohort(tmp_path / "mine.txt", num_subjects=1)
    assert caught.value.exit_code == 74


@pytest.mark.parametrize("wrong", [{"num_subjects": 0}, {"seed": -1}, {"resolution": 0.5}, {"resolution": 9.0}])
def test_values_that_make_no_cohort(tmp_path, wrong):
    with pytest.raises(PhmdiffError) as caught:
        simulate.simulate_cohort(tmp_path / "c", **wrong)
    assert (caught.value.code, caught.value.exit_code) == ("SIMULATE_VALUE", 2)
    assert not (tmp_path / "c").exists()


def test_without_nilearn_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nilearn.datasets", None)
    with pytest.raises(PhmdiffError, match=r"phmdiff-fast\[demo\]") as caught:
        simulate.simulate_cohort(tmp_path / "c", num_subjects=1)
    assert (caught.value.code, caught.value.exit_code) == ("NEED_EXTRA", 8)
    assert not (tmp_path / "c").exists()
