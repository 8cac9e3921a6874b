"""The check of a cohort: problems, notes, leaks, views."""

import os
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from small_scans import AFFINE, SHAPE, body, refused, save, scan

from phmdiff_fast.check import check_cohort
from phmdiff_fast.data import discover, load_subject

REPO = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("PHMDIFF_REAL_DATA", REPO / "../shared/data/brain"))
real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real scans at {REAL} (set PHMDIFF_REAL_DATA)")

# ---------------------------------------------------------------- a whole cohort


def test_a_sound_cohort(folder):
    calls = []
    report = check_cohort(discover(folder), progress=lambda *call: calls.append(call))
    assert report.problems == []
    assert report.notes == []
    assert calls == [(1, 3, "anna"), (2, 3, "bela"), (3, 3, "carl")]
    assert len(report.rows) == 6
    voxels = scan(1)
    assert report.rows[1] == {
        "subject": "anna", "contrast": "t2", "shape": SHAPE, "spacing": (1.5, 1.5, 2.0), "orientation": "RAS",
        "min": 0.0, "max": float(voxels.max()), "foreground": (voxels > 0).mean(),
    }  # fmt: skip


def test_all_problems_are_told_and_none_stops_the_others(folder):
    nan = scan(0).astype(np.float32)
    nan[1, 5, 1] = np.nan
    save(folder / "anna" / "anna_t1.nii.gz", nan)
    path = folder / "anna" / "anna_t2.nii.gz"
    path.write_bytes(path.read_bytes()[:-60])
    save(folder / "bela" / "bela_t1.nii.gz", np.full(SHAPE, 5, np.int16))
    save(folder / "carl" / "carl_t2.nii.gz", scan(21), AFFINE + np.diag([0.1, 0, 0, 0]))
    (folder / "dora").mkdir()
    (folder / "dora" / "dora_t1.nii.gz").symlink_to("nowhere")
    save(folder / "emil" / "emil_t1.nii.gz", scan(40))
    report = check_cohort(discover(folder), contrasts=["t1", "t2"])
    assert [(one.subject, one.contrast, one.code) for one in report.problems] == [
        ("anna", "t1", "NII_NONFINITE"),
        ("anna", "t2", "NII_TRUNC"),
        ("bela", "t1", "NII_CONSTANT"),
        ("carl", "t2", "GRID_MISMATCH"),
        ("dora", None, "MISSING_CONTRAST"),
        ("dora", "t1", "UNREADABLE"),
        ("emil", None, "MISSING_CONTRAST"),
    ]
    assert all(one.file for one in report.problems if one.contrast)
    assert [(row["subject"], row["contrast"]) for row in report.rows] == [
        ("bela", "t2"), ("carl", "t1"), ("emil", "t1"),
    ]  # fmt: skip


def test_nan_and_cap_are_settings(folder):
    voxels = scan(0).astype(np.float32)
    voxels[1, 5, 1] = voxels[2, 6, 2] = np.inf
    path = save(folder / "anna" / "anna_t1.nii.gz", voxels)
    cohort = discover(folder)
    assert [one.code for one in check_cohort(cohort).problems] == ["NII_NONFINITE"]
    report = check_cohort(cohort, nan="zero")
    assert report.problems == []
    assert report.notes == ["anna/t1: 2 NaN or Inf voxels are taken as 0"]
    assert [one.code for one in check_cohort(cohort, max_gib=1e-9).problems] == ["NII_TOO_BIG"] * 6
    assert len(report.seen) == 6
    assert report.seen[path] == (path.stat().st_size, path.stat().st_mtime_ns)


def test_a_contrast_that_some_have_is_a_note_or_a_problem(folder):
    save(folder / "bela" / "bela_flair.nii.gz", scan(50))
    cohort = discover(folder)
    report = check_cohort(cohort)
    assert report.problems == []
    assert report.notes == ["2 of 3 subjects have no flair: anna, carl"]
    report = check_cohort(cohort, contrasts=["t1", "flair"])
    assert [one.subject for one in report.problems] == ["anna", "carl"]
    assert report.notes == []
    assert {row["contrast"] for row in report.rows} == {"t1", "flair"}  # t2 is not asked for, so not read
    assert check_cohort(cohort, contrasts=["t1", "flair"], subjects=["bela"]).problems == []
    assert refused(check_cohort, cohort, subjects=["bella"]).code == "SUBJECT_UNKNOWN"


def test_the_same_person_twice_is_a_leak(folder):
    # Another file (type, compression, voxel order), the same voxels.
    same = nib.as_closest_canonical(nib.load(folder / "anna" / "anna_t1.nii.gz")).as_reoriented(
        np.array([[1, 1], [0, -1], [2, 1]])
    )
    same.set_data_dtype(np.float32)
    nib.save(same, folder / "carl" / "carl_t1.nii.gz")
    for subject in ("anna", "bela"):  # two people without a lesion have the same labels, which says nothing
        save(folder / subject / f"{subject}_seg.nii.gz", np.zeros(SHAPE, np.uint8))
    report = check_cohort(discover(folder), contrasts=["t1", "t2"])
    codes = [(one.code, one.subject, one.contrast) for one in report.problems]
    assert codes == [("LEAK", "carl", "t1")]
    assert "anna/t1 (correlation 1.0000)" in report.problems[0].what
    assert report.problems[0].file.endswith("carl_t1.nii.gz")


def rescaled(voxels):
    return (voxels * 7.5 + 100).astype(np.float32), AFFINE, "t1"


def in_bytes(voxels):
    return np.rint(voxels / 4).astype(np.uint8), AFFINE, "t1"


def another_contrast(voxels):
    return voxels, AFFINE, "flair"


def a_mirrored_header(voxels):
    return voxels, AFFINE @ np.diag([-1, 1, 1, 1]), "t1"


def mirrored_voxels(voxels):
    return voxels[:, ::-1, ::-1], AFFINE, "t1"


def another_place(voxels):
    return voxels, nib.affines.from_matvec(AFFINE[:3, :3], [100, -50, 3]), "t2"


def padded(voxels):
    return np.pad(voxels, ((2, 0), (1, 4), (0, 3))), AFFINE, "t1"


def all_of_it(voxels):
    return np.rint(voxels[::-1] / 4 + 3).astype(np.uint8), AFFINE @ np.diag([1, -1, 1, 1]), "pd"


@pytest.mark.parametrize(
    "change",
    [rescaled, in_bytes, another_contrast, a_mirrored_header, mirrored_voxels, another_place, padded, all_of_it],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_changed_copy_is_a_leak_too(folder, change, seed):
    voxels = scan(100 + seed, (12, 14, 10))
    save(folder / "dora" / "dora_t1.nii.gz", voxels)
    copy, affine, contrast = change(voxels)
    save(folder / "emil" / f"emil_{contrast}.nii.gz", copy, affine)
    report = check_cohort(discover(folder))
    assert [(one.code, one.subject, one.contrast) for one in report.problems] == [("LEAK", "emil", contrast)]
    assert "the same scan as dora/t1" in report.problems[0].what
    assert check_cohort(discover(folder), subjects=["anna", "bela", "carl", "emil"]).problems == []


def test_contrasts_of_one_person_may_be_alike(folder):
    save(folder / "anna" / "anna_t2.nii.gz", scan(0) * 2)
    assert check_cohort(discover(folder)).problems == []


@pytest.mark.parametrize(
    ("contrast", "change", "noted"),
    [
        ("ct", lambda v: v, False),
        ("ct", lambda v: v + 1000, True),  # air at 0
        ("cbct", lambda v: v + 1024, True),
        ("ct", lambda v: (v + 1000) / 1500, True),  # normalised
        ("ct", lambda v: v / 1000, True),
        ("ct", lambda v: 0.01 * v - 1000, True),  # -1010 .. -997
        ("mr", lambda v: v + 1024, False),
    ],
)
def test_a_ct_that_does_not_look_like_hu_is_a_note(tmp_path, contrast, change, noted):
    save(tmp_path / "p" / f"{contrast}.nii.gz", change(body().astype(np.float32)))
    save(tmp_path / "p" / "ct.nii" if contrast != "ct" else tmp_path / "p" / "mr.nii", body(1))
    report = check_cohort(discover(tmp_path))
    assert report.problems == []
    assert [f"p/{contrast} runs from" in note and "HU" in note for note in report.notes] == [True] * noted


# ---------------------------------------------------------------- views


def test_views_show_one_upright_slice(folder):
    seg = np.zeros(SHAPE, np.uint8)
    seg[0, 6, 3], seg[5, 6, 3] = 4, 1
    t1 = scan(0)
    t1[:, :, [0, 1, 2, 4]] = np.where(np.arange(7)[:, None] < 5, 0, t1[:, :, [0, 1, 2, 4]])
    save(folder / "anna" / "anna_t1.nii.gz", t1)
    save(folder / "anna" / "anna_seg.nii.gz", seg)
    report = check_cohort(discover(folder), views=True)
    assert list(report.views) == ["anna", "bela", "carl"]
    assert list(report.views["anna"]) == ["seg", "t1", "t2"]
    for view in report.views["anna"].values():
        assert (view.image.shape, view.image.dtype, view.inside.dtype) == ((7, 6), np.uint8, bool)
        assert np.array_equal(view.inside, np.rot90(t1[:, :, 3] > 0))
    # Slice 3 has the most foreground; up is the front (the last row of y), left is the left (the first of x).
    labels = report.views["anna"]["seg"].image
    assert labels[0, 0] == 255
    assert labels[0, 5] == 64
    assert (labels > 0).sum() == 2
    for contrast, voxels in (("t1", t1), ("t2", scan(1))):
        low, high = np.percentile(voxels[voxels > 0], [0.5, 99.5])
        expected = np.rint(255 * np.clip((np.rot90(voxels[:, :, 3]) - low) / (high - low), 0, 1))
        assert np.abs(report.views["anna"][contrast].image - expected).max() <= 1
    assert check_cohort(discover(folder)).views == {}


def test_views_are_small(tmp_path):
    save(tmp_path / "p" / "p_t1.nii.gz", scan(0, (100, 280, 3)))
    view = check_cohort(discover(tmp_path), views=True).views["p"]["t1"]
    assert view.image.shape == view.inside.shape == (112, 40)
    assert view.image.base is None or view.image.base.size == view.image.size  # no volume hangs on it


def test_views_of_ct_and_mask(tmp_path):
    mask = np.zeros(body().shape, np.uint8)
    mask[4:8, 4:12, 2:4] = 1
    mask[4, 4, 3] = 0
    for name, voxels in (("ct", body()), ("mr", scan(1, body().shape)), ("mask", mask)):
        save(tmp_path / "p" / f"{name}.nii.gz", voxels)
    views = check_cohort(discover(tmp_path), views=True).views["p"]
    assert list(views) == ["ct", "mask", "mr"]
    assert np.array_equal(views["mask"].image, np.rot90(255 * mask[:, :, 2]))
    assert all(np.array_equal(view.inside, np.rot90(mask[:, :, 2] > 0)) for view in views.values())
    expected = np.rint(255 * np.clip((np.rot90(body()[:, :, 2]) + 1000) / 2000, 0, 1))
    assert np.abs(views["ct"].image - expected).max() <= 1


def test_a_pair_that_does_not_fit_is_seen(folder):
    """bela's t2 lies 3 mm (2 voxels) to the right and a slice (2 mm) up; the outline shows where the t1 is."""
    t1 = np.zeros((12, 14, 8), np.int16)
    t1[3:9, 4:11, 2:7] = scan(7, (6, 7, 5)) + 1
    t1[2, 5, 5] = 5  # so that slice 5 has the most
    save(folder / "bela" / "bela_t1.nii.gz", t1)
    save(folder / "bela" / "bela_t2.nii.gz", t1, nib.affines.from_matvec(AFFINE[:3, :3], [3, 0, 2]))
    report = check_cohort(discover(folder), views=True)
    assert [(one.code, one.subject) for one in report.problems] == [("GRID_MISMATCH", "bela")]
    one, two = report.views["bela"]["t1"], report.views["bela"]["t2"]
    assert np.array_equal(one.inside, np.rot90(t1[:, :, 5] > 0))
    moved = np.roll(t1[:, :, 5] > 0, -2, axis=0)
    assert np.array_equal(two.inside, np.rot90(moved))
    low, high = np.percentile(t1[t1 > 0], [0.5, 99.5])
    expected = np.rint(255 * np.clip((np.rot90(t1[:, :, 4]) - low) / (high - low), 0, 1))
    assert np.abs(two.image - expected).max() <= 1


def test_an_outline_is_of_one_slice_of_the_first_scan(folder):
    """Between thick slices the nearest one is shown, with the outline of the very slice the first scan shows."""
    t1 = np.zeros((12, 14, 8), np.int16)
    t1[3:9, 4:11, 2:7] = scan(7, (6, 7, 5)) + 1
    t1[2, 5, 5] = 5
    save(folder / "bela" / "bela_t1.nii.gz", t1)
    thick = save(folder / "bela" / "bela_t2.nii.gz", scan(8, (12, 14, 4)), np.diag([1.5, 1.5, 4, 1]))
    views = check_cohort(discover(folder), views=True).views["bela"]
    assert np.array_equal(views["t2"].inside, views["t1"].inside)
    t2 = nib.load(thick).get_fdata()
    low, high = np.percentile(t2[t2 > 0], [0.5, 99.5])
    shown = t2[:, :, 2]  # at 8 mm; slice 5 of the t1 lies at 10, between 8 and 12
    expected = np.rint(255 * np.clip((np.rot90(shown) - low) / (high - low), 0, 1))
    assert np.abs(views["t2"].image - expected).max() <= 1


def test_a_mask_on_another_grid_hides_no_view(folder):
    save(folder / "anna" / "anna_mask.nii.gz", np.ones((4, 4, 4), np.uint8))
    (folder / "bela" / "bela_t1.nii.gz").write_bytes(b"")
    report = check_cohort(discover(folder), views=True)
    assert [(one.subject, one.contrast, one.code) for one in report.problems] == [
        ("anna", "t1", "GRID_MISMATCH"), ("anna", "t2", "GRID_MISMATCH"), ("bela", "t1", "NII_EMPTY"),
    ]  # fmt: skip
    assert {subject: list(views) for subject, views in report.views.items()} == {
        "anna": ["mask", "t1", "t2"], "bela": ["t2"], "carl": ["t1", "t2"],
    }  # fmt: skip
    assert report.views["anna"]["mask"].image.shape == (4, 4)
    assert np.array_equal(report.views["anna"]["t2"].inside, report.views["anna"]["t1"].inside)


def test_views_keep_no_volumes(folder):
    for number, subject in enumerate(("anna", "bela", "carl")):
        for contrast in ("t1", "t2"):
            voxels = scan(10 * number + (contrast == "t2"), (64, 64, 64))
            save(folder / subject / f"{subject}_{contrast}.nii.gz", voxels)
    tracemalloc.start()
    try:
        report = check_cohort(discover(folder), views=True)
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(report.views) == 3
    assert kept < 64**3  # bytes; one volume has four times as many


def test_the_check_uses_the_mask(folder):
    mask = np.zeros(SHAPE, np.uint8)
    mask[0, 0, 0] = 1
    save(folder / "anna" / "anna_mask.nii.gz", mask)
    report = check_cohort(discover(folder), subjects=["anna"])
    assert [row["foreground"] for row in report.rows] == [1 / mask.size] * 3
    save(folder / "anna" / "anna_mask.nii.gz", 0 * mask)
    report = check_cohort(discover(folder), subjects=["anna"])
    assert [(one.code, one.contrast) for one in report.problems] == [("NO_FOREGROUND", "mask")]


# ---------------------------------------------------------------- real scans


@real_data
def test_the_real_people_are_sound():
    cohort = discover(REAL)
    people = [subject for subject in cohort.files if not subject.startswith("tpl-")]
    report = check_cohort(cohort, subjects=people)
    assert report.problems == []
    assert len(people) == 11
    assert len(report.rows) == 36
    assert {row["orientation"] for row in report.rows} == {"LPS"}
    assert {row["shape"] for row in report.rows} == {(112, 128, 112)}
    assert all(0.15 < row["foreground"] < 0.5 for row in report.rows)


@real_data
def test_a_head_that_is_not_skull_stripped_gets_otsus_foreground():
    cohort = discover(REAL)
    subject = load_subject(cohort, "tpl-mni2009casym", ["t1"], foreground_from="t1")
    assert (subject.images["t1"] == subject.images["t1"].min()).mean() < 0.2
    assert 0.2 < subject.foreground.mean() < 0.7
    middle = tuple(size // 2 for size in subject.foreground.shape)
    assert subject.foreground[middle]
    assert not subject.foreground[0, 0, 0]
