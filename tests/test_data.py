"""Layouts, loading a subject, the check of a cohort, and splits."""

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phmdiff_fast.config import DataConfig
from phmdiff_fast.data import (
    check_cohort,
    discover,
    load_subject,
    make_split,
    read_split,
    select_subjects,
)
from phmdiff_fast.errors import DataErrors, PhmdiffError

REPO = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("PHMDIFF_REAL_DATA", REPO / "../shared/data/brain"))
real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real scans at {REAL} (set PHMDIFF_REAL_DATA)")

SHAPE = (6, 7, 5)
AFFINE = np.diag([1.5, 1.5, 2.0, 1.0])


def scan(seed, shape=SHAPE):
    """Half background, exactly 0; positive inside."""
    voxels = np.random.default_rng(seed).integers(1, 1000, shape).astype(np.int16)
    voxels[:, : shape[1] // 2] = 0
    return voxels


def save(path, voxels, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Three subjects with t1 and t2."""
    for number, subject in enumerate(("anna", "bela", "carl")):
        for contrast in ("t1", "t2"):
            save(tmp_path / subject / f"{subject}_{contrast}.nii.gz", scan(10 * number + (contrast == "t2")))
    return tmp_path


def refused(call, *args, **how):
    with pytest.raises(PhmdiffError) as caught:
        call(*args, **how)
    return caught.value


# ---------------------------------------------------------------- layouts


def names(cohort):
    return {subject: {c: path.name for c, path in files.items()} for subject, files in cohort.files.items()}


def test_brats_2021(tmp_path):
    for subject in ("BraTS2021_00002", "BraTS2021_00000"):
        for word in ("t1", "t1ce", "t2", "flair", "seg", "pd", "ct", "mask"):
            (tmp_path / subject).mkdir(exist_ok=True)
            (tmp_path / subject / f"{subject}_{word}.nii.gz").touch()
    (tmp_path / "BraTS2021_00000" / "notes.txt").touch()
    (tmp_path / "BraTS2021_00000" / "someone-else_t1.nii.gz").touch()
    (tmp_path / "BraTS2021_00000" / "BraTS2021_00000_adc.nii.gz").touch()
    cohort = discover(tmp_path)
    assert cohort.layout == "brats2021"
    assert list(cohort.files) == ["BraTS2021_00000", "BraTS2021_00002"]
    assert list(cohort.files["BraTS2021_00000"]) == ["ct", "flair", "mask", "pd", "seg", "t1", "t1ce", "t2"]


def test_brats_2023(tmp_path):
    subject = "BraTS-GLI-00000-000"
    for word in ("t1n", "t1c", "t2w", "t2f", "seg"):
        save(tmp_path / subject / f"{subject}-{word}.nii.gz", scan(0))
    cohort = discover(tmp_path)
    assert cohort.layout == "brats2023"
    assert names(cohort) == {subject: {
        "flair": f"{subject}-t2f.nii.gz", "seg": f"{subject}-seg.nii.gz", "t1": f"{subject}-t1n.nii.gz",
        "t1ce": f"{subject}-t1c.nii.gz", "t2": f"{subject}-t2w.nii.gz",
    }}  # fmt: skip


def test_plain_nii_counts_too(tmp_path):
    save(tmp_path / "a" / "a_t1.nii", scan(0))
    assert names(discover(tmp_path)) == {"a": {"t1": "a_t1.nii"}}


def test_the_folder_of_one_subject(folder):
    assert discover(folder / "anna").files == {"anna": discover(folder).files["anna"]}


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("x")])
def test_nothing_to_find_tells_the_layouts(tmp_path, make):
    make(tmp_path / "data")
    problem = refused(discover, tmp_path / "data")
    assert (problem.code, problem.exit_code) == ("DATA_EMPTY", 3)
    for word in ("<id>_t1.nii.gz", "<id>-t1n.nii.gz", "subject,contrast,path"):
        assert word in problem.line()


def test_two_files_of_one_contrast(folder):
    (folder / "anna" / "anna-t1n.nii.gz").touch()
    problem = refused(discover, folder)
    assert (problem.code, problem.subject, problem.contrast) == ("DUPLICATE", "anna", "t1")


@pytest.mark.parametrize("name", ["a b", "ä", "a\nb", "x" * 129])
def test_a_subject_name_is_checked(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / f"{name}_t1.nii.gz").touch()
    problem = refused(discover, tmp_path)
    assert problem.code == "BAD_ID"
    assert repr(name) in problem.what


# ---------------------------------------------------------------- CSV lists


def write_csv(folder, *rows, header="subject,contrast,path"):
    (folder / "list.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return folder / "list.csv"


def test_csv_list(folder):
    rows = [f"p{n},{c},{s}/{s}_{c}.nii.gz" for n, s in enumerate(("bela", "anna")) for c in ("t2", "t1")]
    cohort = discover(write_csv(folder, *rows))
    assert cohort.layout == "csv"
    assert names(cohort) == {
        "p0": {"t1": "bela_t1.nii.gz", "t2": "bela_t2.nii.gz"},
        "p1": {"t1": "anna_t1.nii.gz", "t2": "anna_t2.nii.gz"},
    }
    assert load_subject(cohort, "p1", ["t1"], foreground_from="t1").images["t1"].shape == SHAPE


def test_csv_columns_may_come_in_any_order_with_more_beside(folder):
    path = write_csv(folder, "anna/anna_t1.nii.gz,63,t1,p", header="\ufeffpath,age,contrast,subject")
    assert list(discover(path).files["p"]) == ["t1"]


@pytest.mark.parametrize(
    "path", ["../x_t1.nii.gz", "a/../../x_t1.nii.gz", "/etc/passwd", "", "link/x_t1.nii.gz", "link", "a\0b"]
)
def test_csv_paths_stay_inside(tmp_path, path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "outside")
    problem = refused(discover, write_csv(tmp_path / "in", f"p,t1,{path}"))
    # csv of Python 3.10 refuses a NUL by itself
    assert problem.code == "PATH_OUTSIDE" or ("\0" in path and problem.code == "CSV_FORMAT")
    assert problem.exit_code == 3


def test_csv_paths_are_relative(folder):
    problem = refused(discover, write_csv(folder, f"anna,t1,{folder}/anna/anna_t1.nii.gz"))
    assert (problem.code, problem.subject, problem.contrast) == ("PATH_OUTSIDE", "anna", "t1")


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="./ab\\~", max_size=12))
def test_csv_paths_never_leave_the_folder(tmp_path_factory, path):
    root = tmp_path_factory.getbasetemp() / "property"
    root.mkdir(exist_ok=True)
    try:
        cohort = discover(write_csv(root, f'p,t1,"{path}"'))
        outcome = cohort.files["p"]["t1"].is_relative_to(root.resolve())
    except PhmdiffError as problem:
        outcome = problem.code
    assert outcome in (True, "PATH_OUTSIDE")


def test_a_link_that_stays_inside_is_followed(folder):
    (folder / "link.nii.gz").symlink_to("anna/anna_t1.nii.gz")
    cohort = discover(write_csv(folder, "p,t1,link.nii.gz"))
    assert cohort.files["p"]["t1"] == (folder / "anna" / "anna_t1.nii.gz").resolve()


def test_every_bad_row_of_a_csv_is_told(folder):
    problem = refused(discover, write_csv(
        folder, "p,t1,a.nii", "p,t9,b.nii", "..,t1,c.nii", "p,t1,d.nii", "p q,t1,e.nii", "p,t2,../f.nii", "p",
    ))  # fmt: skip
    assert isinstance(problem, DataErrors)
    assert [one.code for one in problem.problems] == [
        "CSV_FORMAT", "BAD_ID", "DUPLICATE", "BAD_ID", "PATH_OUTSIDE", "CSV_FORMAT",
    ]  # fmt: skip
    assert all(one.file == str(folder / "list.csv") for one in problem.problems)


@pytest.mark.parametrize(
    ("code", "content"),
    [
        ("CSV_FORMAT", b""),
        ("CSV_FORMAT", b"subject,path\nanna,x\n"),
        ("CSV_FORMAT", b"subject,contrast,path\n\xff\xfe,t1,x\n"),
        ("CSV_FORMAT", b'subject,contrast,path\n"anna,t1,x\n'),
        ("DATA_EMPTY", b"subject,contrast,path\n"),
    ],
)
def test_a_csv_that_is_none(tmp_path, code, content):
    (tmp_path / "list.csv").write_bytes(content)
    assert refused(discover, tmp_path / "list.csv").code == code


def test_a_csv_that_is_missing(tmp_path):
    assert refused(discover, tmp_path / "list.csv").code == "UNREADABLE"


# ---------------------------------------------------------------- one subject


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
    assert "anna/t1" in report.problems[0].what


def test_the_check_uses_the_mask(folder):
    mask = np.zeros(SHAPE, np.uint8)
    mask[0, 0, 0] = 1
    save(folder / "anna" / "anna_mask.nii.gz", mask)
    report = check_cohort(discover(folder), subjects=["anna"])
    assert [row["foreground"] for row in report.rows] == [1 / mask.size] * 3
    save(folder / "anna" / "anna_mask.nii.gz", 0 * mask)
    report = check_cohort(discover(folder), subjects=["anna"])
    assert [(one.code, one.contrast) for one in report.problems] == [("NO_FOREGROUND", "mask")]


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


# ---------------------------------------------------------------- splits


@settings(max_examples=60, deadline=None)
@given(count=st.integers(3, 200), seed=st.integers(0, 2**32 - 1))
def test_make_split_covers_every_subject_once(count, seed):
    ids = [f"s{n}" for n in range(count)]
    split = make_split(ids, seed)
    assert sorted(split["train"] + split["val"] + split["test"]) == sorted(ids)
    assert all(split.values())
    assert split == make_split(ids[::-1], seed)
    if count >= 10:
        assert abs(len(split["train"]) / count - 0.7) < 0.06
        assert abs(len(split["test"]) / count - 0.2) < 0.06


def test_make_split_depends_on_the_seed():
    ids = [f"s{n}" for n in range(30)]
    assert len({tuple(make_split(ids, seed)["test"]) for seed in range(10)}) == 10


def test_make_split_of_few():
    split = make_split(["a", "b"])
    assert (len(split["train"]), split["val"], len(split["test"])) == (1, [], 1)
    for few in ([], ["a"]):
        problem = refused(make_split, few)
        assert (problem.code, problem.exit_code) == ("TOO_FEW", 3)
    assert refused(make_split, ["a", "b", "a"]).code == "LEAK"


def test_read_split(tmp_path):
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"train": ["b", "a"], "test": ["c"]}))
    assert read_split(path, ["a", "b", "c", "d"]) == {"train": ["a", "b"], "val": [], "test": ["c"]}


@pytest.mark.parametrize(
    ("code", "exit_code", "content"),
    [
        ("SPLIT_FILE", 2, "{"),
        ("SPLIT_FILE", 2, "[" * 200_000),
        ("SPLIT_FILE", 2, "[]"),
        ("SPLIT_FILE", 2, "{}"),
        ("SPLIT_FILE", 2, '{"train": []}'),
        ("SPLIT_FILE", 2, '{"train": "a"}'),
        ("SPLIT_FILE", 2, '{"train": [1]}'),
        ("SPLIT_FILE", 2, '{"train": ["a"], "tset": ["b"]}'),
        ("SUBJECT_UNKNOWN", 2, '{"train": ["a", "anne"]}'),
        ("LEAK", 3, '{"train": ["a", "b"], "test": ["b"]}'),
        ("LEAK", 3, '{"train": ["a", "a"]}'),
    ],
)
def test_a_split_that_is_refused(tmp_path, code, exit_code, content):
    path = tmp_path / "split.json"
    path.write_text(content)
    problem = refused(read_split, path, ["a", "b", "anna"])
    assert (problem.code, problem.exit_code, problem.file) == (code, exit_code, str(path))
    if code == "SUBJECT_UNKNOWN":
        assert "'anne'" in problem.what
        assert "'anna'" in problem.cure
    assert refused(read_split, tmp_path / "none.json", ["a"]).code == "SPLIT_FILE"


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
