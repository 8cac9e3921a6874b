"""Where scans are found: BraTS, SynthRAD and CSV layouts, and what is refused."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phmdiff_fast import layouts
from phmdiff_fast.errors import DataErrors, PhmdiffError
from phmdiff_fast.layouts import CONTRASTS, discover, refuse_unknown, subject_and_contrast


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.fixture
def folder(tmp_path):
    """Three subjects with t1 and t2."""
    for subject in ("anna", "bela", "carl"):
        touch(*(tmp_path / subject / f"{subject}_{contrast}.nii.gz" for contrast in ("t1", "t2")))
    return tmp_path


def refused(call, *args, **how):
    with pytest.raises(PhmdiffError) as caught:
        call(*args, **how)
    return caught.value


def names(cohort):
    return {subject: {c: path.name for c, path in files.items()} for subject, files in cohort.files.items()}


# ---------------------------------------------------------------- BraTS


def test_brats_2021(tmp_path):
    for subject in ("BraTS2021_00002", "BraTS2021_00000"):
        touch(*(tmp_path / subject / f"{subject}_{word}.nii.gz" for word in CONTRASTS))
    (tmp_path / "BraTS2021_00000" / "notes.txt").touch()
    (tmp_path / "BraTS2021_00000" / "someone-else_t1.nii.gz").touch()
    (tmp_path / "BraTS2021_00000" / "BraTS2021_00000_adc.nii.gz").touch()
    cohort = discover(tmp_path)
    assert cohort.layout == "brats2021"
    assert list(cohort.files) == ["BraTS2021_00000", "BraTS2021_00002"]
    assert list(cohort.files["BraTS2021_00000"]) == [
        "cbct", "ct", "flair", "mask", "mr", "pd", "seg", "t1", "t1ce", "t2",
    ]  # fmt: skip


def test_brats_2023(tmp_path):
    subject = "BraTS-GLI-00000-000"
    touch(*(tmp_path / subject / f"{subject}-{word}.nii.gz" for word in ("t1n", "t1c", "t2w", "t2f", "seg", "mask")))
    cohort = discover(tmp_path)
    assert cohort.layout == "brats2023"
    assert names(cohort) == {subject: {
        "flair": f"{subject}-t2f.nii.gz", "seg": f"{subject}-seg.nii.gz", "t1": f"{subject}-t1n.nii.gz",
        "t1ce": f"{subject}-t1c.nii.gz", "t2": f"{subject}-t2w.nii.gz", "mask": f"{subject}-mask.nii.gz",
    }}  # fmt: skip


def test_plain_nii_counts_too(tmp_path):
    touch(tmp_path / "a" / "a_t1.nii")
    assert names(discover(tmp_path)) == {"a": {"t1": "a_t1.nii"}}


def test_the_folder_of_one_subject(folder):
    assert discover(folder / "anna").files == {"anna": discover(folder).files["anna"]}


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("x")])
def test_nothing_to_find_tells_the_layouts(tmp_path, make):
    make(tmp_path / "data")
    problem = refused(discover, tmp_path / "data")
    assert (problem.code, problem.exit_code) == ("DATA_EMPTY", 3)
    for word in ("<id>_t1.nii.gz", "<id>-t1n.nii.gz", "<id>/mr.nii.gz", "subject,contrast,path"):
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


# ---------------------------------------------------------------- SynthRAD


@pytest.mark.parametrize("above", ["", "brain", "Task1/pelvis", "Task1", "synthRAD2025_Task1_Train/Task1/HN"])
@pytest.mark.parametrize("ending", ["nii.gz", "nii", "mha"])
def test_synthrad(tmp_path, above, ending):
    root = tmp_path / above
    for subject in ("1BA005", "1BA001"):
        touch(*(root / subject / f"{word}.{ending}" for word in ("mr", "ct", "mask")))
    touch(root / "1BA001" / f"ct_deformed.{ending}", root / "1BA001" / "mr.json", root / "1BA001" / "MR.mha")
    touch(root / "overview" / f"ct.{ending}", tmp_path / "overview" / "1BA001_train.png", tmp_path / "info.xlsx")
    cohort = discover(tmp_path)
    assert cohort.layout == "synthrad"
    assert cohort.root == tmp_path
    assert names(cohort) == {
        subject: {word: f"{word}.{ending}" for word in ("ct", "mask", "mr")} for subject in ("1BA001", "1BA005")
    }
    assert cohort.files["1BA001"]["mr"] == root / "1BA001" / f"mr.{ending}"


def test_synthrad_of_several_tasks_and_regions(tmp_path):
    touch(*(tmp_path / "Task1" / "brain" / "1BA001" / f"{word}.mha" for word in ("mr", "ct")))
    touch(*(tmp_path / "Task2" / "pelvis" / "2PA001" / f"{word}.mha" for word in ("cbct", "ct")))
    assert {s: list(files) for s, files in discover(tmp_path).files.items()} == {
        "1BA001": ["ct", "mr"], "2PA001": ["cbct", "ct"],
    }  # fmt: skip


def test_the_folder_of_one_synthrad_subject(tmp_path, monkeypatch):
    touch(tmp_path / "1BA001" / "mr.mha", tmp_path / "1BA001" / "ct.mha")
    assert names(discover(tmp_path / "1BA001")) == {"1BA001": {"ct": "ct.mha", "mr": "mr.mha"}}
    monkeypatch.chdir(tmp_path / "1BA001")
    assert list(discover(Path()).files) == ["1BA001"]


def test_five_folders_down_is_too_deep(tmp_path):
    touch(tmp_path / "a" / "b" / "c" / "d" / "e" / "mr.mha")
    assert refused(discover, tmp_path).code == "DATA_EMPTY"
    assert list(discover(tmp_path / "a").files) == ["e"]


def test_a_subject_in_two_folders_names_both(tmp_path):
    one, two = (tmp_path / task / "brain" / "1BA001" for task in ("Task1", "Task2"))
    touch(one / "mr.mha", two / "cbct.mha")  # not even one contrast in common
    problem = refused(discover, tmp_path)
    assert (problem.code, problem.subject, problem.file) == ("DUPLICATE", "1BA001", str(two))
    assert repr(str(one)) in problem.what


def test_one_synthrad_contrast_in_two_files(tmp_path):
    touch(tmp_path / "1BA001" / "ct.nii.gz", tmp_path / "1BA001" / "ct.mha")
    problem = refused(discover, tmp_path)
    assert (problem.code, problem.subject, problem.contrast) == ("DUPLICATE", "1BA001", "ct")


def test_a_mask_alone_is_no_subject(folder):
    touch(folder / "anna" / "brainmask" / "mask.nii.gz", folder / "bela" / "brainmask" / "mask.nii.gz")
    assert list(discover(folder).files) == ["anna", "bela", "carl"]


def test_a_synthrad_name_is_checked(tmp_path):
    touch(tmp_path / "my data" / "ct.mha")
    problem = refused(discover, tmp_path)
    assert (problem.code, "'my data'" in problem.what) == ("BAD_ID", True)


def test_a_linked_subject_counts_but_a_linked_tree_only_inside(tmp_path):
    touch(tmp_path / "out" / "1BA002" / "mr.mha", tmp_path / "in" / "store" / "x" / "y" / "z" / "1BA001" / "mr.mha")
    (tmp_path / "in" / "brain").symlink_to("store/x/y/z")
    assert names(discover(tmp_path / "in")) == {"1BA001": {"mr": "mr.mha"}}
    (tmp_path / "in" / "tree").symlink_to(tmp_path / "out")  # not walked
    assert list(discover(tmp_path / "in").files) == ["1BA001"]
    (tmp_path / "in" / "1BA002").symlink_to(tmp_path / "out" / "1BA002")
    assert list(discover(tmp_path / "in").files) == ["1BA001", "1BA002"]


def test_links_in_a_circle_end(folder):
    (folder / "loop").symlink_to(folder)
    (folder / "self").symlink_to("self")
    assert list(discover(folder).files) == ["anna", "bela", "carl"]


def test_the_walk_is_bounded(folder, monkeypatch):
    monkeypatch.setattr(layouts, "MAX_FOLDERS", 4)
    assert len(discover(folder).files) == 3
    (folder / "dora").mkdir()
    assert "more than 4 folders" in refused(discover, folder).what


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("x/p1_t1.nii.gz", ("p1", "t1")),
        ("x/p1_cbct.nii", ("p1", "cbct")),
        ("x/p1-t1n.nii.gz", ("p1", "t1")),
        ("x/1BA001/mr.mha", ("1BA001", "mr")),
        ("x/1BA001/ct.nii.gz", ("1BA001", "ct")),
        ("x/p1_adc.nii.gz", ("p1_adc", None)),
        ("x/scan.mha", ("scan", None)),
    ],
)
def test_what_a_name_tells(path, expected):
    assert subject_and_contrast(Path(path)) == expected


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


def test_the_gold_atlas_as_a_csv_list(tmp_path):
    touch(tmp_path / "1_01_P" / "t2.mha", tmp_path / "1_01_P" / "ct.mha")
    cohort = discover(write_csv(tmp_path, "1_01_P,t2,1_01_P/t2.mha", "1_01_P,ct,1_01_P/ct.mha"))
    assert names(cohort) == {"1_01_P": {"ct": "ct.mha", "t2": "t2.mha"}}


def test_every_contrast_may_stand_in_a_csv(folder):
    cohort = discover(write_csv(folder, *(f"p,{c},{c}.mha" for c in CONTRASTS)))
    assert list(cohort.files["p"]) == sorted(CONTRASTS)


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


def test_a_folder_below_one_that_may_not_be_entered(tmp_path, monkeypatch):
    def closed(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", closed)
    with pytest.raises(PhmdiffError) as caught:
        discover(tmp_path)
    assert (caught.value.code, caught.value.exit_code) == ("UNREADABLE", 3)


def test_a_list_that_is_wrong_throughout_is_not_read_to_its_end(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("subject,contrast,path\n" + "p,x,y\n" * 5000)
    with pytest.raises(DataErrors) as caught:
        discover(path)
    assert len(caught.value.problems) == 1000


def test_long_unknown_names_are_cut():
    with pytest.raises(PhmdiffError) as caught:
        refuse_unknown(["x" * 10**7], ["anna"], "split.json")
    assert len(caught.value.line()) < 400
