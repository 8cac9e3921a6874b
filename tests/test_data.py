"""Loading a subject; who has every contrast."""

import nibabel as nib
import numpy as np
import pytest
from small_scans import AFFINE, SHAPE, body, refused, save, scan

from phmdiff_fast.check import check_cohort
from phmdiff_fast.config import DataConfig
from phmdiff_fast.data import discover, load_subject, select_subjects
from phmdiff_fast.errors import DataErrors


def test_load_subject(folder):
    save(folder / "anna" / "anna_seg.nii.gz", np.full(SHAPE, 4, np.uint8))
    subject = load_subject(discover(folder), "anna", ["t1", "t2"], foreground_from="t1")
    assert list(subject.images) == ["t1", "t2"]
    assert np.array_equal(subject.images["t2"], scan(1))
    assert subject.images["t2"].dtype == np.float32
    assert np.array_equal(subject.affine, AFFINE)
    assert np.array_equal(subject.foreground, scan(0) > 0)
    assert subject.seg.dtype == np.int16
    assert (subject.seg == 4).all()
    assert load_subject(discover(folder), "anna", ["t1"], foreground_from="t1", with_seg=False).seg is None
    assert load_subject(discover(folder), "bela", ["t1"], foreground_from="t1").seg is None


def test_the_mask_gives_the_foreground(folder):
    mask = np.zeros(SHAPE, np.uint8)
    mask[2:4] = 1
    save(folder / "anna" / "anna_mask.nii.gz", mask)
    subject = load_subject(discover(folder), "anna", ["t1", "t2"], foreground_from="t1")
    assert np.array_equal(subject.foreground, mask > 0)
    assert subject.masked
    assert not load_subject(discover(folder), "bela", ["t1"], foreground_from="t1").masked
    save(folder / "anna" / "anna_mask.nii.gz", 0 * mask)
    problem = refused(load_subject, discover(folder), "anna", ["t1"], foreground_from="t1")
    assert (problem.code, problem.contrast) == ("NO_FOREGROUND", "mask")
    assert problem.file.endswith("anna_mask.nii.gz")


def test_the_foreground_comes_from_the_named_contrast(folder):
    other = scan(5)[:, ::-1]
    save(folder / "anna" / "anna_t2.nii.gz", other)
    cohort = discover(folder)
    assert np.array_equal(load_subject(cohort, "anna", ["t1", "t2"], foreground_from="t2").foreground, other > 0)
    with pytest.raises(ValueError, match="not among"):
        load_subject(cohort, "anna", ["t1"], foreground_from="t2")


def test_another_orientation_of_the_same_grid_is_fine(folder):
    flipped = nib.as_closest_canonical(nib.load(folder / "anna" / "anna_t2.nii.gz")).as_reoriented(
        np.array([[2, -1], [0, 1], [1, -1]])
    )
    assert flipped.shape != SHAPE
    nib.save(flipped, folder / "anna" / "anna_t2.nii.gz")
    subject = load_subject(discover(folder), "anna", ["t1", "t2"], foreground_from="t1")
    assert np.array_equal(subject.images["t2"], scan(1))


@pytest.mark.parametrize(
    ("shape", "change", "told"),
    [
        ((6, 7, 6), np.eye(4), ["(6, 7, 6)", "(6, 7, 5)"]),
        (SHAPE, np.diag([1.001, 1, 1, 1]), ["1.5015", "1.5"]),
        (SHAPE, nib.affines.from_matvec(np.eye(3), [0, 0.0015, 0]), ["0.00225 mm off t1", "origin"]),
        (SHAPE, nib.affines.from_matvec(nib.eulerangles.euler2mat(0.01)), ["off t1"]),
    ],
)
def test_grid_mismatch_tells_both(folder, shape, change, told):
    save(folder / "anna" / "anna_t2.nii.gz", scan(1, shape), AFFINE @ change)
    problem = refused(load_subject, discover(folder), "anna", ["t1", "t2"], foreground_from="t1")
    assert (problem.code, problem.exit_code, problem.subject, problem.contrast) == ("GRID_MISMATCH", 3, "anna", "t2")
    assert problem.file.endswith("anna_t2.nii.gz")
    assert all(text in problem.what for text in told), problem.what


def test_a_gap_below_a_thousandth_of_a_millimetre_is_none(folder):
    save(folder / "anna" / "anna_t2.nii.gz", scan(1), AFFINE + np.diag([0, 0, 1e-4, 0]))
    assert load_subject(discover(folder), "anna", ["t1", "t2"], foreground_from="t1").id == "anna"


def test_a_missing_contrast_names_those_there_are(folder):
    problem = refused(load_subject, discover(folder), "anna", ["t1", "flair", "pd"], foreground_from="t1")
    assert (problem.code, problem.subject) == ("MISSING_CONTRAST", "anna")
    assert "has no flair, pd; it has t1, t2" in problem.what


def test_an_error_is_located(folder):
    path = folder / "bela" / "bela_t2.nii.gz"
    path.write_bytes(path.read_bytes()[:-60])
    problem = refused(load_subject, discover(folder), "bela", ["t1", "t2"], foreground_from="t1")
    assert (problem.code, problem.subject, problem.contrast, problem.file) == ("NII_TRUNC", "bela", "t2", str(path))


def test_an_unknown_subject(folder):
    problem = refused(load_subject, discover(folder), "ana", ["t1"], foreground_from="t1")
    assert (problem.code, problem.exit_code) == ("SUBJECT_UNKNOWN", 2)
    assert "'anna'" in problem.cure


def test_constant_and_non_finite_scans_only_on_request(folder):
    save(folder / "anna" / "anna_t1.nii.gz", np.full(SHAPE, 7, np.int16))
    cohort = discover(folder)
    assert refused(load_subject, cohort, "anna", ["t1"], foreground_from="t1").code == "NII_CONSTANT"
    assert not load_subject(cohort, "anna", ["t1"], foreground_from="t1", allow_constant=True).foreground.any()
    voxels = scan(0).astype(np.float32)
    voxels[0, 6, 0] = np.nan
    save(folder / "anna" / "anna_t1.nii.gz", voxels)
    assert refused(load_subject, cohort, "anna", ["t1"], foreground_from="t1").code == "NII_NONFINITE"
    assert load_subject(cohort, "anna", ["t1"], foreground_from="t1", nan="zero").images["t1"][0, 6, 0] == 0


def test_the_cap_holds_for_every_scan(folder):
    cohort, cap = discover(folder), 4 * np.prod(SHAPE) / 2**30
    assert load_subject(cohort, "anna", ["t1", "t2"], foreground_from="t1", max_gib=cap).id == "anna"
    problem = refused(load_subject, cohort, "anna", ["t1", "t2"], foreground_from="t1", max_gib=cap * 0.99)
    assert (problem.code, problem.subject) == ("NII_TOO_BIG", "anna")


def save_mha(path, voxels):
    """(X, Y, Z) int16 as .mha on the grid of AFFINE: 1.5 x 1.5 x 2 mm, in R-A-S."""
    sizes = " ".join(map(str, voxels.shape))
    header = (
        f"NDims = 3\nBinaryData = True\nTransformMatrix = -1 0 0 0 -1 0 0 0 1\nElementSpacing = 1.5 1.5 2\n"
        f"DimSize = {sizes}\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.encode() + voxels.astype("<i2").tobytes(order="F"))
    return path


def test_mha_and_nifti_lie_on_one_grid(tmp_path):
    save_mha(tmp_path / "1BA001" / "mr.mha", scan(0))
    save(tmp_path / "1BA001" / "ct.nii.gz", scan(1))
    save_mha(tmp_path / "1BA001" / "mask.mha", scan(2) > 0)
    subject = load_subject(discover(tmp_path), "1BA001", ["mr", "ct"], foreground_from="mr")
    assert np.array_equal(subject.images["mr"], scan(0))
    assert np.array_equal(subject.images["ct"], scan(1))
    assert np.array_equal(subject.affine, AFFINE)
    assert np.array_equal(subject.foreground, scan(2) > 0)
    assert subject.masked
    report = check_cohort(discover(tmp_path))
    assert report.problems == []
    assert [(row["contrast"], row["orientation"], row["shape"]) for row in report.rows] == [
        ("mask", "RAS", SHAPE), ("ct", "RAS", SHAPE), ("mr", "RAS", SHAPE),
    ]  # fmt: skip


@pytest.mark.parametrize("contrast", ["ct", "cbct"])
def test_the_foreground_of_a_ct_is_the_body(tmp_path, contrast):
    save(tmp_path / "p" / f"{contrast}.nii.gz", body())
    save(tmp_path / "p" / "mr.nii.gz", scan(1, body().shape))
    expected = np.zeros(body().shape, bool)
    expected[3:13, 5:13] = True
    subject = load_subject(discover(tmp_path), "p", ["mr", contrast], foreground_from=contrast)
    assert np.array_equal(subject.foreground, expected)
    assert not subject.masked
    rows = {row["contrast"]: row["foreground"] for row in check_cohort(discover(tmp_path)).rows}
    assert rows[contrast] == expected.mean()


def test_select_subjects(folder):
    save(folder / "dora" / "dora_t1.nii.gz", scan(60))
    save(folder / "emil" / "emil_flair.nii.gz", scan(61))
    cohort, config = discover(folder), DataConfig()
    problem = refused(select_subjects, cohort, config)
    assert isinstance(problem, DataErrors)
    assert problem.exit_code == 3
    assert [(one.code, one.subject) for one in problem.problems] == [
        ("MISSING_CONTRAST", "dora"), ("MISSING_CONTRAST", "emil"),
    ]  # fmt: skip
    assert "has no t1, t2; it has flair" in problem.problems[1].what
    assert select_subjects(cohort, config, ["carl", "anna"]) == ["anna", "carl"]
    skip = DataConfig(skip_incomplete=True)
    assert select_subjects(cohort, skip) == ["anna", "bela", "carl"]
    assert isinstance(refused(select_subjects, cohort, skip, ["dora", "emil"]), DataErrors)
    assert refused(select_subjects, cohort, config, ["zoe"]).code == "SUBJECT_UNKNOWN"
