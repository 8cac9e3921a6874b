"""The main job through the command line: check, train, resume, sample, evaluate; and its error lines."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import TINY, cli, phantom, write_scan

from phmdiff_fast import evaluate, generate, trainer
from phmdiff_fast.config import SampleConfig, TrainConfig
from phmdiff_fast.data import Subject, discover, load_subject
from phmdiff_fast.errors import PhmdiffError
from phmdiff_fast.kernels._impl import BackendError
from phmdiff_fast.nifti import Grid


@pytest.fixture(scope="module")
def trained(tiny_cohort, tmp_path_factory):
    """A run of 6 steps on three people, the fourth held out."""
    out = tmp_path_factory.mktemp("runs") / "run"
    split = out.parent / "split.json"
    split.write_text(json.dumps({"train": ["p0", "p1"], "val": ["p2"], "test": ["p3"]}))
    code = cli("train", tiny_cohort, "--source", "t1", "--target", "t2", "--out", out, "--steps", 6,
               "--image-size", 24, "--split", split, "--quiet", *TINY)  # fmt: skip
    assert code == 0
    return out


def test_the_run_folder_holds_all_that_is_needed(trained):
    names = {p.name for p in trained.iterdir()}
    assert {"config.toml", "run.json", "split.json", "log.jsonl", "cache", "checkpoints", "pictures"} <= names
    facts = json.loads((trained / "run.json").read_text())
    assert facts["version"]
    assert len(facts["mask_ratios"]) == 3
    records = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert records[0]["step"] == 1
    assert {"loss", "denoise", "mmd", "lr", "images_per_s", "stage"} <= set(records[0])
    assert any("val_psnr" in record for record in records)
    folder = trained / "checkpoints" / "step-00000006"
    assert json.loads((folder / "manifest.json").read_text())["step"] == 6
    assert (trained / "pictures" / "step-00000006.png").stat().st_size > 1000


def test_slices_kept_finer_train_the_same_where_nothing_is_moved(tiny_cohort, tmp_path):
    """data.oversample is about where slices are moved: without that the losses and the held-out figure are the same."""
    losses = {}
    still = ["train.rotate=0", "train.zoom=0", "train.elastic=0", "train.shift=0", "train.finetune_share=0.5"]
    for finer in (1, 2):
        out = tmp_path / str(finer)
        assert cli("train", tiny_cohort, "--source", "t1", "--target", "t2", "--out", out, "--steps", 4, "--image-size",
                   24, "--quiet", *TINY, "--set", f"data.oversample={finer}",
                   *(part for item in still for part in ("--set", item))) == 0  # fmt: skip
        records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        losses[finer] = [r[name] for r in records for name in ("loss", "val_psnr") if name in r]
    assert len(losses[1]) >= 2
    assert losses[2] == pytest.approx(losses[1], rel=1e-3)


def test_train_resume_sample_evaluate(trained, tiny_cohort, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    # The same command with the same budget has nothing to do; a larger budget goes on.
    assert cli("train", tiny_cohort, "--out", run, "--steps", 6, "--quiet") == 0
    assert "already has its 6 steps" in capsys.readouterr().err
    assert cli("train", tiny_cohort, "--out", run, "--steps", 10, "--quiet") == 0
    assert "going on from step 6" in capsys.readouterr().err
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step-00000006", "step-00000010"]
    spent = [
        json.loads((run / "checkpoints" / f"step-{n:08d}" / "manifest.json").read_text())["seconds"] for n in (6, 10)
    ]
    assert spent[1] > spent[0]  # the time of both parts counts
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    stages = {record["step"]: record["stage"] for record in records if "stage" in record}
    assert (stages[1], stages[10]) == ("masked", "unmasked")

    out = tmp_path / "out"
    source = tiny_cohort / "p3" / "p3_t1.nii.gz"
    assert cli("sample", run, source, tiny_cohort / "p0", "--out", out, "--steps", 2, "--quiet") == 0
    capsys.readouterr()
    made, given = nib.load(out / "p3_t2_syn.nii.gz"), nib.load(source)
    assert made.shape == given.shape
    assert np.array_equal(made.affine, given.affine)
    assert b"SYNTHETIC phmdiff-fast" in bytes(made.header["descrip"])
    values = np.asarray(made.dataobj)
    assert np.isfinite(values).all()
    assert (values[np.asarray(given.dataobj) == 0] == 0).all()
    sidecar = json.loads((out / "p3_t2_syn.json").read_text())
    assert (sidecar["units"], sidecar["steps"], sidecar["seed"], sidecar["checkpoint_step"]) == ("arbitrary", 2, 0, 10)
    assert len(sidecar["checkpoint_sha256"]) == 64
    assert {p.name for p in out.iterdir()} == {f"p{i}_t2_syn.{e}" for i in (0, 3) for e in ("nii.gz", "json")}

    table = tmp_path / "table.json"
    assert cli("evaluate", run, tiny_cohort, "--baselines", "--json", table, "--quiet") == 0
    printed = capsys.readouterr().out
    assert "phmdiff-slice" in printed
    assert "p3" in printed
    rows = json.loads(table.read_text())["rows"]
    assert {row["method"] for row in rows} == {"ours", "lookup", "unet_l1"}
    assert {(row["protocol"], row["metric"]) for row in rows} == {
        (p, m) for p in ("phmdiff-slice", "brain") for m in ("psnr", "ssim", "mae")
    }
    assert all(set(row) == {"method", "protocol", "metric", "mean", "std", "n"} and row["n"] == 1 for row in rows)
    assert all(np.isfinite(row["mean"]) for row in rows)


def test_resuming_equals_training_through(trained, tiny_cohort, tmp_path):
    """6 steps, then 4 more, gives the weights of 10 steps in one go (the schedule is by step)."""
    split = trained.parent / "split.json"
    common = ["train", tiny_cohort, "--source", "t1", "--target", "t2", "--image-size", 24, "--split", split,
              "--quiet", *TINY, "--set", "train.min_lr_ratio=1.0", "--set", "train.finetune_share=0.0"]  # fmt: skip
    for steps in (6, 10):
        assert cli(*common, "--out", tmp_path / "a", "--steps", steps) == 0
    assert cli(*common, "--out", tmp_path / "b", "--steps", 10) == 0
    digests = [
        json.loads((tmp_path / run / "checkpoints" / "step-00000010" / "manifest.json").read_text())["files"]
        for run in "ab"
    ]
    assert digests[0] == digests[1]


def test_the_same_seed_gives_the_same_volume_whatever_the_batch(trained, tiny_cohort):
    run = generate.load(trained)
    subject = load_subject(discover(tiny_cohort), "p3", ["t1"], foreground_from="t1")
    volumes = [generate.synthesize(run, subject, SampleConfig(batch_size=b, seed=4, steps=3)).mean for b in (1, 32)]
    np.testing.assert_allclose(volumes[0], volumes[1], rtol=1e-4, atol=1e-2)
    other = generate.synthesize(run, subject, SampleConfig(seed=5, steps=3)).mean
    assert not np.array_equal(volumes[1], other)


def test_a_changed_source_file_is_noticed(trained, tiny_cohort, tmp_path, capsys):
    cohort, run = tmp_path / "cohort", tmp_path / "run"
    shutil.copytree(tiny_cohort, cohort)
    shutil.copytree(trained, run)
    affine = nib.load(cohort / "p1" / "p1_t2.nii.gz").affine
    write_scan(cohort / "p1" / "p1_t2.nii.gz", phantom(99)["t2"], affine)
    assert cli("train", cohort, "--out", run, "--steps", 7, "--quiet") == 0
    err = capsys.readouterr().err
    assert "cache is built again" in err
    assert "p1" in err


def test_check_tells_every_problem_at_once(tiny_cohort, tmp_path, capsys):
    cohort = tmp_path / "cohort"
    shutil.copytree(tiny_cohort, cohort)
    assert cli("check", cohort, "--quiet") == 0
    assert "4 people in brats2021 layout, no problem found" in capsys.readouterr().out
    (cohort / "p0" / "p0_t2.nii.gz").unlink()
    path = cohort / "p1" / "p1_t1.nii.gz"
    path.write_bytes(path.read_bytes()[:-200])
    image = nib.load(cohort / "p2" / "p2_t2.nii.gz")
    voxels = np.asarray(image.dataobj).astype(np.float32)
    voxels[3, 3, 3] = np.nan
    write_scan(cohort / "p2" / "p2_t2.nii.gz", voxels, image.affine)
    shifted = image.affine.copy()
    shifted[0, 3] += 3
    write_scan(cohort / "p3" / "p3_t2.nii.gz", phantom(3)["t2"], shifted)
    assert cli("check", cohort, "--source", "t1", "--target", "t2", "--quiet") == 3
    lines = capsys.readouterr().err.strip().splitlines()
    for code, where in (("MISSING_CONTRAST", "p0: has no t2"), ("NII_TRUNC", "p1/t1"), ("NII_NONFINITE", "p2/t2"),
                        ("GRID_MISMATCH", "p3/t2")):  # fmt: skip
        assert [line for line in lines if f"error[{code}] {where}" in line], (code, lines)
    assert len(lines) == 4
    # Training refuses the same cohort with the same lines, and leaves nothing behind.
    out = tmp_path / "run"
    arguments = ["train", cohort, "--source", "t1", "--target", "t2", "--out", out, "--steps", 1, "--quiet", *TINY]
    assert cli(*arguments) == 3
    assert "MISSING_CONTRAST] p0: has no t2" in capsys.readouterr().err
    assert cli(*arguments, "--skip-incomplete") == 3
    assert len(capsys.readouterr().err.strip().splitlines()) == 3
    assert not out.exists()


def test_the_other_layouts_go_the_same_way(trained, tiny_cohort, tmp_path, capsys):
    newer, listed = tmp_path / "newer", tmp_path / "listed"
    lines = ["subject,contrast,path"]
    for name in ("p0", "p3"):
        (newer / name).mkdir(parents=True)
        listed.mkdir(exist_ok=True)
        for old, new in (("t1", "t1n"), ("t2", "t2w")):
            file = tiny_cohort / name / f"{name}_{old}.nii.gz"
            shutil.copy(file, newer / name / f"{name}-{new}.nii.gz")
            shutil.copy(file, listed / f"{old}of{name}.nii.gz")
            lines.append(f"{name},{old},{old}of{name}.nii.gz")
    (listed / "people.csv").write_text("\n".join(lines))
    volumes = []
    for data, layout in ((newer, "brats2023"), (listed / "people.csv", "csv")):
        assert cli("check", data, "--source", "t1", "--target", "t2", "--quiet") == 0
        assert f"2 people in {layout} layout" in capsys.readouterr().out
        out = tmp_path / layout
        assert cli("sample", trained, data, "--out", out, "--quiet") == 0
        assert cli("evaluate", trained, data, "--quiet") == 0
        assert "people: p3" in capsys.readouterr().out
        volumes.append(np.asarray(nib.load(out / "p3_t2_syn.nii.gz").dataobj))
    assert np.array_equal(*volumes)


def mistakes(cohort, run, tmp):
    """(arguments, exit code, what the line must say)."""
    (tmp / "empty").mkdir()
    (tmp / "text.nii.gz").write_text("<html>")
    (tmp / "taken").mkdir()
    (tmp / "taken" / "file").write_text("x")
    (tmp / "bad.json").write_text('{"train": ["p0", "nobody"]}')
    constant = tmp / "flat" / "q" / "q_t1.nii.gz"
    write_scan(constant, np.full((8, 8, 8), 5, np.int16), np.eye(4))
    train = ["train", cohort, "--source", "t1", "--target", "t2", "--steps", 1]
    return {
        "no such data": (["check", tmp / "nowhere"], 3, "DATA_EMPTY"),
        "empty folder": (["check", tmp / "empty"], 3, "DATA_EMPTY"),
        "constant file": (["check", tmp / "flat"], 3, "NII_CONSTANT] q/t1"),
        "unknown option": (["train", cohort, "--sauce", "t1"], 2, "--sauce"),
        "unknown command": (["trian"], 2, "trian"),
        "no budget": ([*train[:-2], "--out", tmp / "r"], 2, "--minutes"),
        "no target": (["train", cohort, "--source", "t1", "--out", tmp / "r", "--steps", 1], 2, "--target"),
        "unknown preset": ([*train, "--out", tmp / "r", "--preset", "xxs"], 2, "did you mean 'xs'"),
        "unknown setting": ([*train, "--out", tmp / "r", "--set", "train.lrate=1"], 2, "train.lrate"),
        "attention of a GPU": ([*train, "--out", tmp / "r", "--device", "cpu", "--set", "train.attention=varlen"], 8,
                               "varlen"),
        "slices on a GPU": ([*train, "--out", tmp / "r", "--device", "cpu", "--data-device", "cuda"], 8, "NO_GPU"),
        "missing contrast": (["train", cohort, "--source", "t1", "--target", "flair", "--out", tmp / "r", "--steps", 1],
                             3, "p0: has no flair"),
        "out is no run": ([*train, "--out", tmp / "taken"], 2, "OUTPUT_EXISTS"),
        "unknown person in the split": ([*train, "--out", tmp / "r", "--split", tmp / "bad.json"], 2, "nobody"),
        "no run": (["sample", tmp / "empty", cohort, "--out", tmp / "o"], 2, "NO_RUN"),
        "not a scan": (["sample", run, tmp / "text.nii.gz", "--out", tmp / "o"], 3, "text.nii.gz"),
        "wrong contrast": (["sample", run, cohort / "p0" / "p0_t2.nii.gz", "--out", tmp / "o"], 2, "is a t2"),
        "too many steps": (["sample", run, cohort / "p0", "--out", tmp / "o", "--steps", 2000], 2, "2000 steps"),
        "missing input": (["sample", run, tmp / "none.nii.gz", "--out", tmp / "o"], 3, "none.nii.gz"),
        "unknown protocol": (["evaluate", run, cohort, "--protocol", "best"], 2, "phmdiff-slice"),
        "other settings": ([*train, "--out", run, "--set", "model.depth=2"], 2, "model.depth"),
    }  # fmt: skip


def test_mistakes_get_one_line_the_right_code_and_leave_nothing(trained, tiny_cohort, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for name, (arguments, code, expected) in mistakes(tiny_cohort, run, tmp_path).items():
        assert cli(*arguments, *([] if arguments[0] in ("trian",) else ["--quiet"])) == code, name
        lines = capsys.readouterr().err.strip().splitlines()
        assert all(line.startswith("phmdiff-fast: error[") for line in lines), (name, lines)
        assert expected in lines[0], (name, lines)
        assert len(lines) == 1 or name == "missing contrast", (name, lines)
        assert not (tmp_path / "r").exists(), name
        assert not (tmp_path / "o").exists(), name


def test_a_profile_and_the_figures_of_a_training(tiny_cohort, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli("train", tiny_cohort, "--source", "t1", "--target", "t2", "--out", out, "--steps", 20,
               "--image-size", 24, "--profile", *TINY) == 0  # fmt: skip
    said = capsys.readouterr().err
    assert "attention: " in said
    assert "images/s" in said
    assert "waiting for data: " in said
    names = {path.name for path in (out / "profile").iterdir()}
    assert names == {"trace.json.gz", "stages.txt", "stages.json", "stages.png", "operations.txt"}
    stages = {row["stage"] for row in json.loads((out / "profile" / "stages.json").read_text())["rows"]}
    assert {"data", "augment", "embed", "encoder", "decoder", "backward", "update", "ema"} <= stages
    first, record = (json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()[:2])
    assert first["runs_on"].startswith("attention: ")
    assert {"images_per_s", "tokens_per_s", "tflop_per_s", "peak_bytes", "data_wait_share", "stage_s"} <= set(record)
    assert record["tflop_per_s"] > 0


def test_an_existing_output_is_kept(trained, tiny_cohort, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    kept = out / "p3_t2_syn.nii.gz"
    kept.write_text("mine")
    arguments = ["sample", trained, tiny_cohort / "p3", "--out", out, "--quiet"]
    assert cli(*arguments) == 2
    assert "OUTPUT_EXISTS" in capsys.readouterr().err
    assert kept.read_text() == "mine"
    assert cli(*arguments, "--overwrite") == 0
    assert nib.load(kept).shape == (20, 24, 9)


def test_a_constant_input_gives_zeros_and_a_warning(trained, tmp_path, capsys):
    write_scan(tmp_path / "q_t1.nii.gz", np.full((20, 24, 9), 5, np.int16), np.eye(4))
    assert cli("sample", trained, tmp_path / "q_t1.nii.gz", "--out", tmp_path / "out", "--quiet") == 0
    assert "one value only" in capsys.readouterr().err
    assert not np.asarray(nib.load(tmp_path / "out" / "q_t2_syn.nii.gz").dataobj).any()


def test_debug_shows_the_traceback_and_plain_use_does_not(tmp_path):
    for flags, shown in (([], False), (["--debug"], True)):
        command = [sys.executable, "-m", "phmdiff_fast", *flags, "check", str(tmp_path / "nowhere")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert ("Traceback" in done.stderr) == shown
        assert done.returncode == (1 if shown else 3)


def test_doctor_names_every_operation(capsys):
    assert cli("doctor") == 0
    out = capsys.readouterr().out
    for word in ("torch", "draw_mask", "embed_visible", "mmd2", "build_pyramid", "attention", "precision"):
        assert word in out


def test_a_run_is_opened_with_its_averaged_weights(trained):
    run = generate.load(trained)
    average, last = (run.found.tensors(name) for name in ("ema", "model"))
    weights = dict(run.model.named_parameters())
    assert all(torch.equal(weights[name], value) for name, value in average.items())
    assert any(not torch.equal(last[name], value) for name, value in average.items())


def test_a_volume_s_units_are_those_of_the_training_set(trained, tiny_cohort, monkeypatch):
    """A prediction of 1 everywhere becomes the median 99.5 percentile inside, and 0 outside."""
    run = generate.load(trained)
    subject = load_subject(discover(tiny_cohort), "p3", ["t1"], foreground_from="t1")
    ones = lambda run, sources, settings, **_: generate.Slices(np.ones_like(sources[:, 0]))  # noqa: E731
    monkeypatch.setattr(generate, "predict", ones)
    volume = generate.synthesize(run, subject, SampleConfig()).mean
    assert np.allclose(volume[subject.foreground], run.facts["median_p995"])
    assert (volume[~subject.foreground] == 0).all()
    assert run.facts["median_p995"] > 500  # the phantom's brightest shell has 1100


def test_slices_keep_their_numbers_and_the_foreground_is_half_a_pixel(trained, monkeypatch):
    run = generate.load(trained)
    inside = np.zeros((48, 48, 6), bool)
    inside[4:24, 4:24, 2:5] = True
    inside[24, 4:24, 2:5] = True  # one of two voxels of a pixel at 24 x 24: half of it counts
    voxels = np.where(inside, np.random.default_rng(0).uniform(100, 200, inside.shape), 0).astype(np.float32)
    subject = Subject("q", {"t1": voxels}, np.eye(4), Grid(voxels.shape, np.eye(4)), inside)
    firsts = []

    def predict(run, sources, settings, *, first=0, **_):
        firsts.append((first, len(sources)))
        return generate.Slices(sources[:, 0])

    monkeypatch.setattr(generate, "predict", predict)
    generate.synthesize(run, subject, SampleConfig())
    assert firsts == [(2, 3)]
    on_grid = generate.foreground_slices(inside, generate.in_plane(run, subject))
    assert on_grid.shape == (6, 24, 24)
    assert on_grid[3].sum() == 11 * 10
    assert not on_grid[[0, 1, 5]].any()


def test_baselines_see_the_training_people_only(trained, tiny_cohort, monkeypatch):
    seen = {}

    def train_unet(cache, rows, config, seconds, *_, **__):
        seen.update(cache=cache, rows=rows, seconds=seconds)
        return None, 0

    monkeypatch.setattr(evaluate, "train_unet", train_unet)
    run = generate.load(trained)
    evaluate.predictors(run, discover(tiny_cohort), True, None)
    assert seen["cache"].subjects == ["p0", "p1", "p2"]
    assert seen["rows"].tolist() == [*seen["cache"].rows_of("p0"), *seen["cache"].rows_of("p1")]
    assert seen["seconds"] == run.found.manifest["seconds"]


def test_r1_a_gradient_that_is_not_finite_stops_before_the_update(tiny_cohort, tmp_path, capsys):
    arguments = ["train", tiny_cohort, "--source", "t1", "--target", "t2", "--out", tmp_path / "r", "--steps", 9,
                 "--image-size", 24, "--quiet", *TINY, "--set", "train.lr=1e30"]  # fmt: skip
    assert cli(*arguments) == 5
    assert "error[NONFINITE]" in capsys.readouterr().err
    assert not (tmp_path / "r" / "checkpoints").exists()  # weights that blew up are not kept


def test_r6_a_backend_that_cannot_run_gets_exit_code_8(monkeypatch, capsys):
    def refuse():
        raise BackendError("mmd2: impl='triton' cannot run here")

    monkeypatch.setattr("phmdiff_fast.doctor.report", refuse)
    assert cli("doctor") == 8
    assert "error[BACKEND]" in capsys.readouterr().err


def test_learning_rate_by_hand():
    config = TrainConfig(lr=1.0, warmup_steps=4, min_lr_ratio=0.1)
    assert trainer.learning_rate(config, 0, 0.0) == pytest.approx(0.25)
    assert trainer.learning_rate(config, 9, 0.5) == pytest.approx(0.55)
    assert trainer.learning_rate(config, 9, 1.5) == pytest.approx(0.1)


@pytest.mark.slow
def test_two_real_people(real_data, tmp_path, capsys):
    """On real scans, from files to a table."""
    cohort = tmp_path / "cohort"
    for name in ("mslub-cs-07", "mslub-cs-26"):
        (cohort / name).mkdir(parents=True)
        for contrast in ("t1", "t2"):
            file = f"{name}_{contrast}.nii.gz"
            (cohort / name / file).symlink_to((real_data / name / file).resolve())
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ["mslub-cs-07"], "val": [], "test": ["mslub-cs-26"]}))
    run = tmp_path / "run"
    assert cli("train", cohort, "--source", "t1", "--target", "t2", "--out", run, "--steps", 4, "--image-size", 32,
               "--split", split, "--quiet", *TINY) == 0  # fmt: skip
    given = nib.load(cohort / "mslub-cs-26" / "mslub-cs-26_t1.nii.gz")
    assert cli("sample", run, cohort / "mslub-cs-26", "--out", tmp_path / "out", "--quiet") == 0
    made = nib.load(tmp_path / "out" / "mslub-cs-26_t2_syn.nii.gz")
    assert made.shape == given.shape
    assert np.array_equal(made.affine, given.affine)
    assert cli("evaluate", run, cohort, "--json", tmp_path / "t.json", "--quiet") == 0
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert len(rows) == 6
    assert all(np.isfinite(row["mean"]) for row in rows)


def test_translate_takes_paths_and_images_and_equals_sample(trained, tiny_cohort, tmp_path):
    run = generate.load(trained)
    path = tiny_cohort / "p3" / "p3_t1.nii.gz"
    assert cli("sample", trained, path, "--out", tmp_path, "--seed", 3, "--quiet") == 0
    written = nib.load(tmp_path / "p3_t2_syn.nii.gz")
    given = nib.load(path)
    for source in (path, str(path), given):
        made = run.translate({"t1": source}, seed=3)
        assert isinstance(made, nib.Nifti1Image)
        assert np.array_equal(made.affine, given.affine)
        assert b"SYNTHETIC" in bytes(made.header["descrip"])
        np.testing.assert_allclose(made.get_fdata(), written.get_fdata(), rtol=1e-5, atol=1e-3)
    mask = np.zeros(given.shape, np.uint8)
    mask[8:12, 8:16, 3:6] = 1
    masked = run.translate({"t1": given, "mask": nib.Nifti1Image(mask, given.affine)}).get_fdata()
    assert (masked[mask == 0] == 0).all()
    assert (masked[mask == 1] > 0).any()
    for images, says in (({}, "nothing"), ({"t2": path}, "needs 't1'"), ({"t1": path, "flair": path}, "'flair'")):
        with pytest.raises(PhmdiffError, match=says):
            run.translate(images)
    for image, code in ((nib.Nifti1Image(np.zeros((4, 4, 4, 2), np.int16), np.eye(4)), "NII_4D"),
                        (nib.Nifti1Image(np.full((4, 4, 4), np.nan), np.eye(4)), "NII_NONFINITE")):  # fmt: skip
        with pytest.raises(PhmdiffError) as caught:
            run.translate({"t1": image})
        assert caught.value.code == code
    with pytest.raises(PhmdiffError, match="steps"):
        run.translate({"t1": path}, steps=0)


def test_the_papers_preset_trains_and_its_sampling_settings_hold(tiny_cohort, tmp_path):
    run, out = tmp_path / "r", tmp_path / "o"
    assert cli("train", tiny_cohort, "--source", "t1", "--target", "t2", "--out", run, "--preset", "paper", "--steps",
               2, "--image-size", 24, "--quiet", *TINY, "--set", "sample.steps=6") == 0  # fmt: skip
    assert cli("sample", run, tiny_cohort / "p0", "--out", out, "--quiet") == 0
    assert cli("sample", run, tiny_cohort / "p1", "--out", out, "--steps", 2, "--sampler", "ddim", "--quiet") == 0
    told = [json.loads((out / f"p{i}_t2_syn.json").read_text()) for i in (0, 1)]
    assert [(t["sampler"], t["steps"]) for t in told] == [("ddpm", 6), ("ddim", 2)]


HOSTILE = {
    "config.toml": ["", "x = 1", "[model]\nwidht = 3", "[model]\nwidth = 'x'", "data = 3", "a = " + "[" * 5000, "\0"],
    "run.json": ["", "[]", "{}", '{"complexity": "x"}', '{"complexity": [1, 2, NaN], "median_p995": 1}', "[" * 10**5,
                 '{"complexity": [1, 2], "median_p995": 1}', '{"complexity": [1, 2, 3], "median_p995": 1e400}'],
}  # fmt: skip


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in HOSTILE.items() for text in texts],
                         ids=lambda text: repr(text[:24]))  # fmt: skip
def test_what_a_run_was_begun_with_may_be_damaged(trained, tmp_path, capsys, name, text):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / name).write_text(text)
    code = cli("sample", run, tmp_path / "x_t1.nii.gz", "--out", tmp_path / "out")
    err = capsys.readouterr().err
    if name == "config.toml" and text == "":
        assert code == 4  # all defaults: not the settings of this checkpoint
    assert code in (2, 4)
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err
    assert name in err or "step-" in err
    assert not (tmp_path / "out").exists()
