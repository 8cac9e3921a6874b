"""Distillation: the student begins as the teacher's first member, learns its mean, and goes on where it stopped."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import TINY, cli
from safetensors.torch import load_file
from test_phmdiff import awake, images

from phmdiff_fast.config import SampleConfig, build_config
from phmdiff_fast.diffusion import Schedule, trailing_timesteps
from phmdiff_fast.distill import Teacher, student_config
from phmdiff_fast.engine import Engine
from phmdiff_fast.errors import PhmdiffError
from phmdiff_fast.generate import load


@pytest.fixture(scope="module")
def teacher(tiny_cohort, tmp_path_factory):
    """Two members of 12 steps each, far enough apart."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    code = cli("train", tiny_cohort, "--source", "t1", "--target", "t2", "--out", out, "--steps", 24, "--image-size",
               16, "--quiet", *TINY, "--set", "model.members=2", "--set", "train.lr=5e-3", "--set",
               "sample.views=2", "--set", "sample.detail=1.3")  # fmt: skip
    assert code == 0
    return out


def distilled(teacher, cohort, out, steps=1, train_steps=40, *more):
    return cli(
        "distill", teacher, cohort, "--out", out, "--steps", steps, "--train-steps", train_steps, "--quiet", *more
    )


@pytest.fixture(scope="module")
def student(teacher, tiny_cohort, tmp_path_factory):
    out = tmp_path_factory.mktemp("student") / "run"
    more = ["--set", "train.checkpoint_steps=20", "--set", "train.keep=9", "--set", "train.lr=2e-3"]
    assert distilled(teacher, tiny_cohort, out, 1, 40, *more) == 0
    return out


def test_the_student_comes_nearer_to_its_teacher_than_the_member_it_began_as(teacher, student, tiny_cohort):
    taught, made = load(teacher), load(student)
    assert (taught.model.usable, made.model.usable) == (2, 1)
    sources, ids = images(8, 16)[0], torch.arange(8)
    wanted = Teacher(taught)(sources, ids)
    begun = Engine(_first_member(taught), SampleConfig())(sources, ids).levels[0]
    learnt = Engine(made.model, SampleConfig())(sources, ids).levels[0]
    assert float((learnt - wanted).square().mean()) < 0.8 * float((begun - wanted).square().mean())


def _first_member(run):
    run.model.usable = 1
    model = load(run.folder).model
    model.usable = 1
    run.model.usable = len(run.model.nets)
    return model


def test_the_student_s_settings_are_those_of_few_steps(student, teacher):
    config = load(student).config
    assert (config.sample.steps, config.sample.views, config.sample.detail) == (1, 1, 1.3)
    assert (config.train.only_steps, config.train.finetune_share, config.model.members) == (1, 1.0, 1)
    assert json.loads((student / "split.json").read_text()) == json.loads((teacher / "split.json").read_text())
    stages = {json.loads(line).get("stage") for line in (student / "log.jsonl").read_text().splitlines()}
    assert stages <= {"unmasked", None}


def test_a_teacher_shows_no_added_detail_and_its_weights_do_not_move(teacher):
    run = load(teacher)
    taught = Teacher(run)
    assert taught.engine.settings.detail == 1.0
    assert taught.engine.settings.views == 2
    assert not any(p.requires_grad for p in run.model.parameters())


def test_a_student_goes_on_where_it_stopped_with_the_same_bits(student, teacher, tiny_cohort, tmp_path):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(student, run)
    shutil.rmtree(run / "checkpoints" / "step-00000040")
    more = ["--set", "train.checkpoint_steps=20", "--set", "train.keep=9", "--set", "train.lr=2e-3"]
    assert distilled(teacher, tiny_cohort, run, 1, 40, *more) == 0
    for group in ("model", "ema"):
        name = f"checkpoints/step-00000040/{group}.safetensors"
        a, b = load_file(student / name), load_file(run / name)
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_another_teacher_or_none_is_refused(teacher, student, tiny_cohort, tmp_path, capsys):
    assert cli("train", tiny_cohort, "--out", student, "--steps", 50, "--quiet") == 4
    assert "error[TEACHER_DIFFERS]" in capsys.readouterr().err
    more = ["--set", "train.checkpoint_steps=20", "--set", "train.keep=9", "--set", "train.lr=2e-3"]
    assert distilled(student, tiny_cohort, student, 1, 50, *more) == 4
    assert "distilled from another run" in capsys.readouterr().err
    assert distilled(teacher, tiny_cohort, tmp_path / "x", 1001) == 2
    assert "error[STEPS]" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert distilled(teacher, tiny_cohort, teacher) in (2, 4)  # into its own folder
    assert distilled(tmp_path, tiny_cohort, tmp_path / "x") == 2
    assert "error[NO_RUN]" in capsys.readouterr().err


def test_a_student_of_two_steps_samples_in_two(teacher, tiny_cohort, tmp_path):
    assert distilled(teacher, tiny_cohort, tmp_path / "s", 2, 4) == 0
    assert load(tmp_path / "s").sample_settings().steps == 2
    assert cli("sample", tmp_path / "s", tiny_cohort / "p0", "--out", tmp_path / "o", "--quiet") == 0
    assert (tmp_path / "o" / "p0_t2_syn.nii.gz").is_file()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 1000])
@pytest.mark.parametrize("level", [0, 2])
def test_only_the_few_timesteps_are_drawn_and_equally_often(steps, level):
    drawn = Schedule().draw(torch.arange(20000), (0, 1), 0.8, level=level, only=steps).numpy()
    times, counts = np.unique(drawn, return_counts=True)
    assert set(times) <= set(trailing_timesteps(1000, steps))
    if steps <= 7:
        assert sorted(times, reverse=True) == trailing_timesteps(1000, steps)
        assert counts.min() > 0.9 * 20000 / steps


def test_what_cannot_be_distilled_is_refused_in_a_line(teacher, tiny_cohort, tmp_path, monkeypatch, capsys):
    assert cli("distill", teacher, tiny_cohort, "--out", tmp_path / "x", "--quiet") == 2
    assert "--train-steps" in capsys.readouterr().err
    with pytest.raises(PhmdiffError, match="predicts noise"):
        student_config(build_config("paper"), 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distilled(teacher, tiny_cohort, tmp_path / "x") == 2
    assert "torchrun" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_more_steps_than_timesteps_are_refused():
    with pytest.raises(PhmdiffError, match="timesteps"):
        student_config(build_config("xs", {"model": {"timesteps": 10, "coarse_noise": 5}}), 11)


def test_a_teacher_is_the_mean_of_members_and_views():
    class Fake:
        pass

    run = Fake()
    run.model, run.config, run.found = awake(members=2).eval(), Fake(), Fake()
    run.config.sample, run.found.digest = SampleConfig(views=2, detail=1.5, samples=4), lambda group: "x"
    sources, ids = images()[0], torch.arange(4)
    expected = run.model.translate(sources, ids, SampleConfig(views=2))[0]
    torch.testing.assert_close(Teacher(run)(sources, ids), expected)
