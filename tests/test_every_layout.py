"""Every layout and data option through the command line: check, train (2 steps), sample, evaluate."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from conftest import TINY, cli, phantom, phantom_ct, write_scan

AFFINE = np.array([[-1.5, 0, 0, 12], [0, -1.5, 0, 9], [0, 0, 2.0, -4], [0, 0, 0, 1]])  # stored L-P-S
PEOPLE = ("1BA001", "1BA005", "1BB012")


def write_mha(path, voxels, affine):
    """The same scan as MetaImage, written by SimpleITK."""
    sitk = pytest.importorskip("SimpleITK")
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.transpose(2, 1, 0)))
    flip = np.diag([-1, -1, 1, 1]) @ affine  # RAS mm -> LPS mm
    spacing = np.linalg.norm(flip[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(flip[:3, 3].tolist())
    image.SetDirection((flip[:3, :3] / spacing).flatten().tolist())
    sitk.WriteImage(image, str(path), useCompression=True)


def person(i: int) -> dict[str, np.ndarray]:
    scans = phantom(i)
    ct = phantom_ct(i)
    return {"t1": scans["t1"], "mr": scans["t1"], "t2": scans["t2"], "ct": ct, "cbct": (ct * 0.9).astype(np.int16),
            "mask": (ct > -500).astype(np.uint8), "seg": (scans["t1"] > 800).astype(np.uint8)}  # fmt: skip


def synthrad_2023(root):
    for i, name in enumerate(PEOPLE):
        for contrast in ("mr", "ct", "mask"):
            write_scan(root / "Task1" / "brain" / name / f"{contrast}.nii.gz", person(i)[contrast], AFFINE)
    (root / "Task1" / "brain" / "overview").mkdir()
    return root, "mr", "ct", root / "Task1" / "brain" / PEOPLE[2]


def synthrad_2025(root):
    for i, name in enumerate(PEOPLE):
        for contrast in ("cbct", "ct", "mask"):
            write_mha(root / "Task2" / "HN" / name / f"{contrast}.mha", person(i)[contrast], AFFINE)
    return root / "Task2", "cbct", "ct", root / "Task2" / "HN" / PEOPLE[2] / "cbct.mha"


def gold_atlas(root):
    """The Gold Atlas pelvis as the CSV list of the README."""
    lines = ["subject,contrast,path"]
    for i, name in enumerate(PEOPLE):
        write_mha(root / name / "T2.mha", person(i)["t2"], AFFINE)
        write_mha(root / name / "CT.mha", person(i)["ct"], AFFINE)
        lines += [f"{name},t2,{name}/T2.mha", f"{name},ct,{name}/CT.mha"]
    (root / "gold_atlas.csv").write_text("\n".join(lines))
    return root / "gold_atlas.csv", "t2", "ct", root / PEOPLE[2] / "T2.mha"


def brats(root, separator, words):
    for i, name in enumerate(PEOPLE):
        for contrast, word in words.items():
            write_scan(root / name / f"{name}{separator}{word}.nii.gz", person(i)[contrast], AFFINE)
    return root, "t1", "t2", root / PEOPLE[2] / f"{PEOPLE[2]}{separator}{words['t1']}.nii.gz"


LAYOUTS = {
    "synthrad 2023": (synthrad_2023, "synthrad"),
    "synthrad 2025": (synthrad_2025, "synthrad"),
    "gold atlas": (gold_atlas, "csv"),
    "brats 2021": (lambda root: brats(root, "_", {"t1": "t1", "t2": "t2", "seg": "seg", "mask": "mask"}), "brats2021"),
    "brats 2023": (lambda root: brats(root, "-", {"t1": "t1n", "t2": "t2w", "seg": "seg"}), "brats2023"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_from_check_to_evaluation(name, tmp_path, capsys):
    make, layout = LAYOUTS[name]
    data, source, target, one = make(tmp_path / "data")
    page = tmp_path / "check.html"
    assert cli("check", data, "--source", source, "--target", target, "--html", page, "--quiet") == 0
    assert f"3 people in {layout} layout" in capsys.readouterr().out
    assert page.read_text().count("<img") >= 6
    run, out, table = tmp_path / "run", tmp_path / "out", tmp_path / "table.json"
    assert cli("train", data, "--source", source, "--target", target, "--out", run, "--steps", 2, "--image-size", 24,
               "--fold", "3/3", "--quiet", *TINY) == 0  # fmt: skip
    tested = json.loads((run / "split.json").read_text())["test"]
    assert len(tested) == 1
    capsys.readouterr()
    assert cli("sample", run, one, "--out", out, "--quiet") == 0
    written = capsys.readouterr().out.strip()
    made = nib.load(written)
    assert made.shape == (20, 24, 9)
    np.testing.assert_allclose(made.affine, AFFINE, atol=1e-5)
    sidecar = json.loads(next(out.glob("*.json")).read_text())
    values = np.asarray(made.dataobj)
    assert sidecar["units"] == ("HU" if target == "ct" else "arbitrary")
    assert target != "ct" or (values.min() >= -1024 and values.max() <= 3000)
    if name == "synthrad 2023":  # the subject's folder has a mask: air outside
        outside = person(2)["mask"] == 0
        assert (values[outside] == -1024).all()
        assert (values[~outside] > -1024).any()
    assert cli("evaluate", run, data, "--json", table, "--quiet") == 0
    assert f"people: {tested[0]}" in capsys.readouterr().out
    rows = json.loads(table.read_text())["rows"]
    errors = {row["metric"]: row["mean"] for row in rows if row["protocol"] == "brain"}
    assert set(errors) == {"psnr", "ssim", "mae_hu" if target == "ct" else "mae"}
    assert target != "ct" or 50 < errors["mae_hu"] < 3000  # in HU, not of a range of 2


def test_several_sources_neighbours_and_another_axis(tmp_path, capsys):
    for i, name in enumerate(PEOPLE):
        for contrast in ("t1", "t2", "ct"):
            write_scan(tmp_path / "data" / name / f"{name}_{contrast}.nii.gz", person(i)[contrast], AFFINE)
    for axis in ("coronal", "sagittal"):
        run, out = tmp_path / axis, tmp_path / f"out-{axis}"
        assert cli("train", tmp_path / "data", "--source", "t1,ct", "--target", "t2", "--axis", axis, "--out", run,
                   "--context-slices", 1, "--hu-window", -1000, 1000, "--steps", 2, "--image-size", 24, "--quiet",
                   "--set", "train.rotate=10", "--set", "train.bias=0.2", "--set", "train.noise=0.02",
                   "--set", "train.elastic=0.02", *TINY) == 0  # fmt: skip
        assert cli("sample", run, tmp_path / "data" / PEOPLE[0], "--out", out, "--quiet") == 0
        made = nib.load(out / f"{PEOPLE[0]}_t2_syn.nii.gz")
        assert made.shape == (20, 24, 9)
        assert np.array_equal(made.affine, AFFINE)
        assert cli("evaluate", run, tmp_path / "data", "--baselines", "--quiet") == 0
    capsys.readouterr()
    assert cli("sample", run, tmp_path / "data" / PEOPLE[0] / f"{PEOPLE[0]}_t1.nii.gz", "--out", out) == 2
    assert "this run needs t1, ct" in capsys.readouterr().err


def test_folds_test_everybody_once_and_copies_are_refused(tmp_path, capsys):
    for i, name in enumerate(PEOPLE):
        for contrast in ("t1", "t2"):
            write_scan(tmp_path / name / f"{name}_{contrast}.nii.gz", person(i)[contrast], AFFINE)
    train = ["train", tmp_path, "--source", "t1", "--target", "t2", "--steps", 1, "--image-size", 24, "--quiet", *TINY]
    tested = []
    for fold in ("1/3", "2/3", "3/3"):
        run = tmp_path.parent / f"run{fold[0]}"
        assert cli(*train, "--out", run, "--fold", fold) == 0
        tested += json.loads((run / "split.json").read_text())["test"]
    assert sorted(tested) == sorted(PEOPLE)
    for bad, says in (("0/3", "1/3 to 3/3"), ("4/3", "1/3 to 3/3"), ("one", "I/K"), ("1/9", "9 folds")):
        assert cli(*train, "--out", tmp_path.parent / "bad", "--fold", bad) != 0
        assert says in capsys.readouterr().err
    # A copy under another name, other units and another orientation is the same person.
    copied = tmp_path / "2XX999"
    for contrast in ("t1", "t2"):
        voxels = (person(0)[contrast] * 1.7).astype(np.float32)[::-1]
        turned = AFFINE @ np.array([[-1, 0, 0, 19], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
        write_scan(copied / f"2XX999_{contrast}.nii.gz", voxels, turned)
    assert cli(*train, "--out", tmp_path.parent / "leak") == 3
    assert "LEAK" in capsys.readouterr().err


@pytest.mark.slow
def test_mr_to_ct_on_real_templates(real_data, tmp_path, capsys):
    """Ends in HU, on the affine of the MR; the two templates have different grids."""
    for name in ("tpl-mrct-8mm", "tpl-mrct-brain"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for contrast in ("t1", "ct"):
            file = f"{name}_{contrast}.nii.gz"
            (tmp_path / "data" / name / file).symlink_to((real_data / name / file).resolve())
    for test, other in (("tpl-mrct-8mm", "tpl-mrct-brain"), ("tpl-mrct-brain", "tpl-mrct-8mm")):
        split = tmp_path / "split.csv"
        split.write_text(f"subject,part\n{other},train\n{test},test\n")
        run, out = tmp_path / f"run-{test}", tmp_path / f"out-{test}"
        assert cli("train", tmp_path / "data", "--source", "t1", "--target", "ct", "--out", run, "--steps", 2,
                   "--image-size", 32, "--split", split, "--quiet", *TINY) == 0  # fmt: skip
        given = tmp_path / "data" / test / f"{test}_t1.nii.gz"
        assert cli("sample", run, given, "--out", out, "--quiet") == 0
        made, given = nib.load(out / f"{test}_ct_syn.nii.gz"), nib.load(given)
        assert made.shape == given.shape
        assert np.array_equal(made.affine, given.affine)
        values = np.asarray(made.dataobj)
        assert -1024 <= values.min() < -900
        assert values.max() <= 3000
        assert json.loads((out / f"{test}_ct_syn.json").read_text())["units"] == "HU"
        capsys.readouterr()
        assert cli("evaluate", run, tmp_path / "data", "--quiet") == 0
        assert "MAE (HU)" in capsys.readouterr().out
