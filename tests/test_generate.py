"""Volumes out of a run: several samples and what they say of the error, several runs, and a cohort as a stream."""

from __future__ import annotations

import json
import shutil
import threading

import nibabel as nib
import numpy as np
import pytest
from conftest import TINY, cli

from phmdiff_fast import generate
from phmdiff_fast.config import SampleConfig
from phmdiff_fast.data import discover, load_subject
from phmdiff_fast.errors import PhmdiffError
from phmdiff_fast.evaluate import Calibration, Case, Evaluation, calibration_of
from phmdiff_fast.generate import Slices


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    file = tmp_path_factory.mktemp("split") / "split.json"
    file.write_text(json.dumps({"train": ["p0", "p1"], "val": ["p2"], "test": ["p3"]}))
    return file


def train(cohort, out, split, *more):
    assert cli("train", cohort, "--source", "t1", "--target", "t2", "--out", out, "--steps", 12, "--image-size", 24,
               "--split", split, "--quiet", *TINY, *more) == 0  # fmt: skip
    return out


@pytest.fixture(scope="module")
def trained(tiny_cohort, split, tmp_path_factory):
    more = ["--set", "model.members=2", "--set", "train.lr=5e-3"]
    return train(tiny_cohort, tmp_path_factory.mktemp("runs") / "run", split, *more)


@pytest.fixture(scope="module")
def coronal(tiny_cohort, split, tmp_path_factory):
    return train(tiny_cohort, tmp_path_factory.mktemp("runs") / "coronal", split, "--axis", "coronal")


def voxels(path):
    return np.asarray(nib.load(path).dataobj)


def test_several_samples_write_their_mean_and_their_deviation(trained, tiny_cohort, tmp_path):
    how = ["--samples", 3, "--steps", 4, "--sampler", "ddpm", "--quiet"]
    assert cli("sample", trained, tiny_cohort / "p3", "--out", tmp_path, *how) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p3_t2_syn.json", "p3_t2_syn.nii.gz", "p3_t2_syn_std.nii.gz"]
    run = generate.load(trained)
    source = tiny_cohort / "p3" / next(p.name for p in (tiny_cohort / "p3").iterdir() if "t1" in p.name)
    mean, deviation = run.uncertainty({"t1": source}, samples=3, steps=4, sampler="ddpm")
    np.testing.assert_allclose(voxels(tmp_path / "p3_t2_syn.nii.gz"), mean.get_fdata(), rtol=1e-5, atol=1e-2)
    np.testing.assert_allclose(voxels(tmp_path / "p3_t2_syn_std.nii.gz"), deviation.get_fdata(), rtol=1e-4, atol=1e-2)
    inside = load_subject(discover(tiny_cohort), "p3", ["t1"], foreground_from="t1").foreground
    spread = voxels(tmp_path / "p3_t2_syn_std.nii.gz")
    assert spread.min() >= 0
    assert np.count_nonzero(spread) <= inside.sum()
    assert np.count_nonzero(spread) > 0.9 * inside.sum()
    assert nib.load(tmp_path / "p3_t2_syn_std.nii.gz").header["descrip"].item() == b"SYNTHETIC phmdiff-fast std"
    assert json.loads((tmp_path / "p3_t2_syn.json").read_text())["samples"] == 3
    assert cli("sample", trained, tiny_cohort / "p3", "--out", tmp_path, *how) == 2  # neither is replaced
    (tmp_path / "p3_t2_syn.nii.gz").unlink()
    assert cli("sample", trained, tiny_cohort / "p3", "--out", tmp_path, *how) == 2
    one = generate.load(trained)
    one.model.usable = 1
    with pytest.raises(PhmdiffError, match="deviation"):
        one.uncertainty({"t1": source}, samples=1)


def test_the_deviation_is_in_the_volume_s_units(trained, tiny_cohort, monkeypatch):
    run = generate.load(trained)
    subject = load_subject(discover(tiny_cohort), "p3", ["t1"], foreground_from="t1")
    half = lambda run, sources, settings, **_: Slices(0 * sources[:, 0], np.full_like(sources[:, 0], 0.5))  # noqa: E731
    monkeypatch.setattr(generate, "predict", half)
    made = generate.synthesize(run, subject, SampleConfig(samples=2))
    assert np.allclose(made.deviation[subject.foreground], 0.25 * run.facts["median_p995"])  # 0.5 of a range of 2
    assert (made.deviation[~subject.foreground] == 0).all()


def test_a_run_of_another_axis_is_averaged(trained, coronal, tiny_cohort, tmp_path):
    for name, more in (("a", []), ("c", []), ("both", ["--also", coronal])):
        run = coronal if name == "c" else trained
        assert cli("sample", run, tiny_cohort / "p3", "--out", tmp_path / name, "--quiet", *more) == 0
    a, c, both = (voxels(tmp_path / name / "p3_t2_syn.nii.gz") for name in ("a", "c", "both"))
    assert not np.allclose(a, c)
    np.testing.assert_allclose(both, (a + c) / 2, rtol=1e-5, atol=1e-3)
    told = json.loads((tmp_path / "both" / "p3_t2_syn.json").read_text())
    assert len(told["averaged_with"]) == 1


def test_the_deviation_of_two_runs_holds_what_lies_between_them():
    class Run:
        units = "arbitrary"

        def __init__(self, scale):
            self.facts = {"median_p995": scale}

    shape = (2, 3, 4)
    made = [generate.Volumes(np.full(shape, 10.0, np.float32), np.full(shape, 3.0, np.float32)),
            generate.Volumes(np.full(shape, 36.0, np.float32), np.full(shape, 8.0, np.float32))]  # fmt: skip
    both = generate._averaged(made, [Run(100.0), Run(200.0)])  # the second one's are worth half: 18 and 4
    assert np.allclose(both.mean, 14)
    assert np.allclose(both.deviation, np.sqrt((9 + 16) / 2 + 16))


def test_a_run_of_another_task_is_refused(trained, tiny_cohort, split, tmp_path, capsys):
    other = tmp_path / "other"
    assert cli("train", tiny_cohort, "--source", "t2", "--target", "t1", "--out", other, "--steps", 1, "--image-size",
               24, "--split", split, "--quiet", *TINY) == 0  # fmt: skip
    assert cli("sample", trained, tiny_cohort / "p3", "--out", tmp_path / "o", "--also", other, "--quiet") == 2
    assert "error[OTHER_TASK]" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_cohort_is_read_ahead_and_written_behind(trained, tiny_cohort, tmp_path, monkeypatch):
    """Order and places: everything is written, in other threads than the one that computes."""
    threads, heard = {"read": set(), "write": set()}, []
    read, write = generate.load_subject, generate.write_volume

    def noted(name, function):
        return lambda *a, **k: (threads[name].add(threading.current_thread().name), function(*a, **k))[1]

    monkeypatch.setattr(generate, "load_subject", noted("read", read))
    monkeypatch.setattr(generate, "write_volume", noted("write", write))
    run = generate.load(trained)
    paths = generate.sample(run, [tiny_cohort], tmp_path, run.sample_settings(), progress=lambda *a: heard.append(a))
    assert [path.name for path in paths] == [f"p{n}_t2_syn.nii.gz" for n in range(4)]
    assert all(path.is_file() for path in paths)
    assert all(name.startswith("read") for name in threads["read"])
    assert all(name.startswith("write") for name in threads["write"])
    done = [share for _, share, _ in heard]
    assert done == sorted(done)
    assert [share for share in done if share == int(share)][-1] == 4
    assert {total for *_, total in heard} == {4}
    alone = generate.sample(run, [tiny_cohort / "p2"], tmp_path / "alone", run.sample_settings())
    assert np.array_equal(voxels(alone[0]), voxels(paths[2]))


def test_a_scan_that_breaks_in_the_middle_leaves_whole_volumes(trained, tiny_cohort, tmp_path, capsys):
    cohort = tmp_path / "cohort"
    shutil.copytree(tiny_cohort, cohort)
    broken = next(p for p in (cohort / "p2").iterdir() if "t1" in p.name)
    broken.write_bytes(broken.read_bytes()[:200])
    assert cli("sample", trained, cohort, "--out", tmp_path / "o", "--quiet") == 3
    assert "p2" in capsys.readouterr().err
    made = sorted(p.name for p in (tmp_path / "o").iterdir())
    assert made == ["p0_t2_syn.json", "p0_t2_syn.nii.gz", "p1_t2_syn.json", "p1_t2_syn.nii.gz"]
    assert all(np.isfinite(voxels(tmp_path / "o" / name)).all() for name in made if name.endswith("gz"))


def test_samples_that_cannot_differ_are_told_once(coronal, trained, tiny_cohort, tmp_path, capsys):
    for n, (run, more, told) in enumerate(((coronal, [], 1), (coronal, ["--steps", 2], 0), (trained, [], 0))):
        how = ["--out", tmp_path / str(n), "--samples", 2, "--quiet", *more]
        assert cli("sample", run, tiny_cohort / "p3", *how) == 0
        lines = capsys.readouterr().err.splitlines()
        assert [line.startswith("phmdiff-fast: one step of one member") for line in lines] == [True] * told


def test_background_may_be_computed_too(trained, tiny_cohort, tmp_path):
    for name, more in (("left_out", []), ("computed", ["--no-skip-background"])):
        assert cli("sample", trained, tiny_cohort / "p3", "--out", tmp_path / name, "--quiet", *more) == 0
        told = json.loads((tmp_path / name / "p3_t2_syn.json").read_text())
        assert told["skip_background"] == (name == "left_out")


# --- calibration ----------------------------------------------------------------------------------


def evaluation(error_over_deviation, people=3):
    rng = np.random.default_rng(0)
    cases, ours = [], {}
    for n in range(people):
        target = rng.normal(size=(4, 32, 32))
        deviation = rng.uniform(0.05, 0.5, target.shape)
        inside = rng.uniform(size=target.shape) < 0.7
        made = target + error_over_deviation * deviation * rng.normal(size=target.shape)
        made[~inside], deviation[~inside] = 9, 9  # outside nothing counts
        cases.append(Case(f"p{n}", None, target, inside, inside))
        ours[f"p{n}"] = Slices(made, deviation)
    return Evaluation([], {}, {}, cases, None, ours)


@pytest.mark.parametrize("ratio", [1.0, 2.5])
def test_calibration_finds_how_much_too_sure_a_model_is(ratio):
    found = calibration_of(evaluation(ratio))
    assert found.ratio == pytest.approx(ratio, rel=0.05)
    assert found.deviation == sorted(found.deviation)
    np.testing.assert_allclose(np.divide(found.error, found.deviation), ratio, rtol=0.2)
    assert max(found.pixels) - min(found.pixels) <= 1
    assert found.rank_correlation > 0.3
    assert f"{found.ratio:.2f}" in found.line()


def test_one_sample_has_no_calibration():
    result = evaluation(1.0)
    result.ours["p1"].deviation = None
    with pytest.raises(ValueError, match="deviation"):
        calibration_of(result)


def test_evaluate_draws_the_calibration_and_writes_it(trained, tiny_cohort, tmp_path, capsys):
    picture, table = tmp_path / "new" / "c.png", tmp_path / "t.json"
    how = ["--samples", 3, "--steps", 3, "--sampler", "ddpm", "--quiet"]
    assert cli("evaluate", trained, tiny_cohort, *how, "--calibration", picture, "--json", table) == 0
    told = capsys.readouterr().out
    assert "error / deviation" in told
    assert "mean of 3 samples" in told
    assert picture.read_bytes()[:4] == b"\x89PNG"
    found = Calibration(**json.loads(table.read_text())["calibration"])
    assert f"{found.ratio:.2f}" in told
    assert cli("evaluate", trained, tiny_cohort, "--quiet", "--calibration", picture) == 2  # exists
    assert cli("evaluate", trained, tiny_cohort, "--quiet", "--calibration", tmp_path / "d.png") == 2  # one sample
    assert "--samples" in capsys.readouterr().err
