"""Exact resume: rows C2, C6, C7, C8 and C12 of the fault matrix, and that no part of the state is left out."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from cells import Resumes, bits, cells, command, kills, newest, run_all, said_written, sigterms

from phmdiff_fast import checkpoint
from phmdiff_fast.run_folder import read_log


@pytest.fixture(scope="module")
def through(zygote, tiny_cohort, tmp_path_factory):
    """A training of 12 steps with a checkpoint every 2, of which 4 are kept."""
    out = tmp_path_factory.mktemp("through") / "run"
    assert zygote.run(command(tiny_cohort, out, "--set", "train.keep=4"), hook="plain").status == 0
    return out


@pytest.fixture
def copied(through, tmp_path):
    return shutil.copytree(through, tmp_path / "run")


def again(zygote, cohort, run, *more, hook=""):
    return zygote.run(command(cohort, run, "--set", "train.keep=4", *more), hook=f"plain;{hook}" if hook else "plain")


def test_c2_resume_is_exact_whatever_the_moment_and_the_way(zygote, tiny_cohort, tmp_path):
    """A sample of the grid that ``make torture`` runs whole."""
    resumes = Resumes(zygote, tiny_cohort, tmp_path)
    wrong = {f"{way} {moment}": why for way, moment in cells(11) if (why := resumes.cell(way, moment))}
    assert not wrong


def test_c2_killed_at_random(zygote, tiny_cohort, tmp_path):
    figures = kills(zygote, tiny_cohort, tmp_path, 8)
    assert figures["furthest"] > 10
    assert figures | {"furthest": 0} == {"kills": 8, "lost": 0, "steps behind": 0, "did not go on": 0, "furthest": 0,
                                         "same bits": True}  # fmt: skip


def test_c4_sigterm_at_random(zygote, tiny_cohort, tmp_path):
    figures = sigterms(zygote, tiny_cohort, tmp_path, 5)
    assert figures == {"signals": 5, "saves": 5, "most steps lost": 0, "other exit codes": 0}


STATES = ["model", "ema", "exp_avg", "exp_avg_sq", "step", "position", "rng", "schedule"]


@pytest.mark.parametrize("state", STATES)
def test_without_any_part_of_the_state_a_resumed_run_ends_elsewhere(zygote, tiny_cohort, through, copied, state):
    shutil.rmtree(copied / "checkpoints" / "step-00000012")
    ended = again(zygote, tiny_cohort, copied, hook=f"forget:{state}")
    assert ended.status == 0, ended.err
    assert newest(copied).step == 12
    assert bits(copied) != bits(through)


def test_with_all_of_it_it_ends_the_same(zygote, tiny_cohort, through, copied):
    shutil.rmtree(copied / "checkpoints" / "step-00000012")
    assert again(zygote, tiny_cohort, copied).status == 0
    assert bits(copied) == bits(through)
    steps = [record["step"] for record in read_log(copied / "log.jsonl") if "checkpoint" not in record]
    assert steps == sorted(steps)


def test_the_window_of_losses_is_kept(through):
    kept = newest(through).manifest["spikes"]
    assert (len(kept["losses"]), kept["stage"]) == (6, "unmasked")


def test_deterministic_gives_the_same_bits_and_needs_steps(zygote, tiny_cohort, through, tmp_path):
    assert again(zygote, tiny_cohort, tmp_path / "a", "--deterministic").status == 0
    assert bits(tmp_path / "a") == bits(through)
    refused = zygote.run([*command(tiny_cohort, tmp_path / "b", "--deterministic"), "--minutes", 1], hook="plain")
    assert refused.status == 2
    assert "--deterministic" in refused.err
    assert not (tmp_path / "b").exists()


# --- C6: other world sizes


def test_c6_another_world_size_goes_on_and_sees_the_same_samples(zygote, tiny_cohort, through, tmp_path):
    out = tmp_path / "run"
    for world, steps in ((2, 4), (1, 8), (4, 12)):
        ended = run_all(
            zygote, [*command(tiny_cohort, out), "--steps", steps, "--set", "train.finetune_share=0.5"], world
        )
        assert [child.status for child in ended] == [0] * world, ended[0].err
        assert newest(out).manifest["world"] == world
        names = {name for name in newest(out).manifest["files"] if name.startswith("model")}
        assert names == (
            {"model.safetensors"} if world == 1 else {f"model.{r}-of-{world}.safetensors" for r in range(world)}
        )


def test_c6_the_mean_gradient_of_two_is_that_of_one(zygote, tiny_cohort, tmp_path):
    for world in (1, 2):
        run_all(zygote, command(tiny_cohort, tmp_path / f"{world}", steps=3), world)
    one, two = (newest(tmp_path / f"{world}").tensors("model") for world in (1, 2))
    assert one.keys() == two.keys()
    moved = max(float((one[name] - two[name]).abs().max()) for name in one)
    assert moved < 1e-5  # of steps of 1e-3: Adam's first steps turn rounding into sign only where a gradient is 0


def test_c6_a_world_that_does_not_divide_the_batch_is_told_which_do(zygote, tiny_cohort, tmp_path):
    ended = run_all(zygote, command(tiny_cohort, tmp_path / "run"), 3)
    assert [child.status for child in ended] == [2, 2, 2]
    assert "start one of 1, 2, 4" in ended[0].err
    assert not (tmp_path / "run" / "run.json").exists()


# --- C7: damage, and a checkpoint asked for


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "manifest.json"])
def test_c7_a_damaged_checkpoint_is_passed_over_but_not_when_asked_for(zygote, tiny_cohort, copied, name, damage):
    file = copied / "checkpoints" / "step-00000012" / name
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    else:
        data[len(data) // 2] ^= 0x40
        file.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    asked = again(zygote, tiny_cohort, copied, "--resume", 12)
    assert asked.status == 4
    line = asked.err.strip()
    assert "\n" not in line
    assert "step-00000012" in line
    if name != "manifest.json" and damage == "flip":
        assert "SHA-256" in line
        assert name in line
    ended = again(zygote, tiny_cohort, copied)
    assert ended.status == 0, ended.err
    assert ended.err.count("An older one is used") == 1
    assert "going on from step 10" in ended.err


def test_c7_nothing_whole_is_left(zygote, tiny_cohort, copied):
    for path in (copied / "checkpoints").iterdir():
        (path / "model.safetensors").write_bytes(b"damaged")
    ended = again(zygote, tiny_cohort, copied)
    assert ended.status == 4
    assert "error[NO_CHECKPOINT]" in ended.err


def test_c7_an_earlier_checkpoint_is_gone_back_to_and_later_ones_are_set_aside(zygote, tiny_cohort, copied, through):
    ended = again(zygote, tiny_cohort, copied, "--resume", "step-00000008")
    assert ended.status == 0, ended.err
    assert "going on from step 8" in ended.err
    assert bits(copied) == bits(through)
    aside = sorted(path.name for path in (copied / "checkpoints").iterdir() if path.name.startswith("aside"))
    assert aside == ["aside-step-00000010", "aside-step-00000012"]
    missing = again(zygote, tiny_cohort, copied, "--resume", "7")
    assert missing.status == 4
    assert "there is no checkpoint '7'" in missing.err


# --- C8: other settings, newer formats


def test_c8_another_runs_checkpoint_gets_a_field_diff(zygote, tiny_cohort, through, tmp_path):
    other = through / "checkpoints" / "step-00000012"
    ended = zygote.run(
        [*command(tiny_cohort, tmp_path / "run"), "--resume", other, "--set", "model.width=64"], hook="plain"
    )
    assert ended.status == 4
    assert "error[CHECKPOINT_DIFFERS]" in ended.err
    assert "model.width 32 -> 64" in ended.err
    assert len(ended.err.strip().splitlines()) == 1


def test_c8_a_newer_format_says_what_it_needs(zygote, tiny_cohort, copied):
    path = copied / "checkpoints" / "step-00000012" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "format": 3, "version": "9.1"}))
    ended = again(zygote, tiny_cohort, copied, "--resume", 12)
    assert ended.status == 4
    assert "needs phmdiff-fast >= '9.1'" in ended.err


def test_c8_the_first_format_is_still_read(tmp_path):
    folder = checkpoint.save(tmp_path, 1, {"model": {"w": torch.ones(2)}}, {}, keep=1)
    manifest = json.loads((folder / "manifest.json").read_text())
    old = {"format": 1, "step": 1, "seconds": 2.0, "version": "0.1.0", "val_psnr": None, "files": manifest["files"]}
    (folder / "manifest.json").write_text(json.dumps(old))
    assert checkpoint.newest(tmp_path).tensors("model")["w"].tolist() == [1, 1]


# --- C9 by the command line, C12


@pytest.mark.parametrize("make", ["model.pt", "folder"])
def test_c9_a_pickle_given_to_resume_is_not_opened(zygote, tiny_cohort, tmp_path, make):
    given = tmp_path / make
    if make == "folder":
        given.mkdir()
        (given / ".metadata").write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    else:
        given.write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    ended = zygote.run([*command(tiny_cohort, tmp_path / "run"), "--resume", given], hook="plain")
    assert ended.status == 4
    assert "error[UNSAFE_FORMAT]" in ended.err


@pytest.mark.parametrize("world", [1, 2])
def test_c12_a_checkpoint_that_cannot_be_written_stops_the_run_with_the_cause(zygote, tiny_cohort, tmp_path, world):
    ended = run_all(
        zygote, [*command(tiny_cohort, tmp_path / "run"), "--set", "train.keep=4"], world, only="no_space:6"
    )
    assert [child.status for child in ended] == [74] * world
    told = "".join(child.err for child in ended)
    assert told.count("error[CHECKPOINT_WRITE]") == 1
    assert "No space left on device" in told
    assert "bytes free" in told
    assert "Traceback" not in told
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000004"]
    assert said_written(tmp_path / "run") == 4
    made = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert max(made) <= 8  # not trained on to the end for nothing
