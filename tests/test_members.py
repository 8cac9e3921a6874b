"""Several members of a run: trained in turn, averaged when they synthesize, and exact when a training goes on."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import TINY, cli
from safetensors.torch import load_file
from test_phmdiff import awake, images, one

from phmdiff_fast.config import SampleConfig, build_config
from phmdiff_fast.ema import EMA
from phmdiff_fast.generate import load
from phmdiff_fast.trainer import PASSES, Trainer, members_for

MEMBERS = [*TINY, "--set", "model.members=2", "--set", "train.keep=20", "--set", "train.finetune_share=0.5"]


def test_a_step_trains_the_member_whose_turn_it_is_and_no_other():
    model = awake(members=3)
    average = EMA(model, 0.9)
    average.follow(model.nets[1])
    before = [value.clone() for value in average.shadow]
    model.active = 1
    one(model, mmd_weight=0.0).total.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained
    assert all(name.startswith("others.0.") for name in trained)
    idle = model.unused(True, 32, 32)
    assert {name for name, p in model.named_parameters() if any(p is q for q in idle)} == {
        name for name, p in model.named_parameters() if name not in trained
    }
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    average.update(5)
    moved = {n for n, new, old in zip(average.names, average.shadow, before, strict=True) if not torch.equal(new, old)}
    assert moved == {name for name, _ in model.named_parameters() if name.startswith("others.0.")}


def test_members_start_apart_and_their_estimates_are_averaged():
    model = awake(members=2).eval()
    source, _ = images()
    ids = torch.arange(4)
    assert not torch.equal(model.net.x_embedder[0].weight, model.others[0].x_embedder[0].weight)
    both = model.translate(source, ids, steps=2)
    model.usable = 1
    first = model.translate(source, ids, steps=2)
    model.net, model.others[0] = model.others[0], model.net
    second = model.translate(source, ids, steps=2)
    for mean, a, b in zip(both, first, second, strict=True):
        torch.testing.assert_close(mean, (a + b) / 2)
        assert not torch.allclose(a, b)
    seen = []
    model.usable = 2
    model.translate(source, ids, SampleConfig(steps=3, views=2), progress=seen.append)
    assert seen == [0, 1, 2] * 4


def test_a_later_member_warms_up_over_its_own_part():
    tables = {"model": {"members": 4}, "train": {"lr": 1.0, "warmup_steps": 10, "min_lr_ratio": 0.0}}
    at = Trainer.__new__(Trainer)  # its turns need neither data nor folder
    at.config, at.step, at.model = build_config("xs", tables), 500, awake(members=4)
    at.ema = EMA(at.model, 0.9)
    rates = {}
    for share in (0.0, 0.125, 0.25, 0.25 + 0.005 / 4, 0.375, 0.999, 1.0):
        rates[share] = at.rate(at.turn(share)), at.model.active, at.model.usable
    assert rates[0.0] == (1.0, 0, 1)
    assert rates[0.125] == (pytest.approx(0.5), 0, 1)
    assert rates[0.25] == (0.0, 1, 1)
    assert rates[0.25 + 0.005 / 4] == (pytest.approx(0.5, rel=1e-3), 1, 1)
    assert rates[0.375] == (pytest.approx(0.5), 1, 1)
    assert rates[0.999][1:] == (3, 3)
    assert rates[1.0][1:] == (3, 4)


@pytest.fixture(scope="module")
def trained(tiny_cohort, tmp_path_factory):
    out = tmp_path_factory.mktemp("members") / "run"
    code = cli("train", tiny_cohort, "--source", "t1", "--target", "t2", "--out", out, "--steps", 8, "--image-size", 32,
               "--quiet", *MEMBERS, "--set", "train.checkpoint_steps=2", "--set", "train.batch_size=4")  # fmt: skip
    assert code == 0
    return out


def weights(run, step):
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


@pytest.mark.slow
def test_members_take_their_turns_and_a_checkpoint_says_how_many_are_trained(trained):
    at = {step: weights(trained, step) for step in (2, 4, 6, 8)}
    for name in at[8]:  # the first four steps are the first member's, the others the second's
        before, after = (2, 4) if name.startswith("others.") else (4, 8)
        assert torch.equal(at[before][name], at[after][name]), name
    assert any(not torch.equal(at[2][n], at[4][n]) for n in at[8] if n.startswith("net."))
    assert any(not torch.equal(at[6][n], at[8][n]) for n in at[8] if n.startswith("others."))
    manifests = {s: json.loads((trained / f"checkpoints/step-{s:08d}/manifest.json").read_text()) for s in at}
    assert [manifests[s]["members"] for s in (2, 4, 6, 8)] == [1, 1, 1, 2]
    assert load(trained).model.usable == 2
    stages = [json.loads(line).get("stage") for line in (trained / "log.jsonl").read_text().splitlines()]
    assert stages[0] == "masked 1"


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 6])
def test_going_on_within_either_member_s_part_gives_the_same_bits(trained, tiny_cohort, tmp_path, step):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(trained, run)
    assert cli("train", tiny_cohort, "--out", run, "--steps", 8, "--resume", step, "--quiet") == 0
    for group in ("model", "ema", "optimizer"):
        name = f"checkpoints/step-00000008/{group}.safetensors"
        a, b = load_file(trained / name), load_file(run / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_members_are_not_shared_out(tiny_cohort, tmp_path, capsys):
    code = cli("train", tiny_cohort, "--source", "t1", "--target", "t2", "--out", tmp_path / "run", "--steps", 2,
               "--parallel", "fsdp", "--quiet", *MEMBERS)  # fmt: skip
    assert code == 2
    assert "members" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_budget_decides_how_many_members_there_are(tiny_cohort, tmp_path, capsys):
    assert [members_for(p * PASSES) for p in (0.01, 1.4, 1.6, 4.0, 100.0)] == [1, 1, 2, 4, 8]
    out = tmp_path / "run"
    # Four people of nine slices, two of them in training: 14 slices with foreground, 3 a batch.
    common = ["train", tiny_cohort, "--source", "t1", "--target", "t2", "--out", out, "--image-size", 24, "--quiet",
              *TINY, "--set", "model.members=0", "--set", "train.batch_size=3"]  # fmt: skip
    assert cli(*common, "--steps", 1) == 0
    facts = json.loads((out / "run.json").read_text())
    assert facts["members"] == 1
    assert cli("train", tiny_cohort, "--out", out, "--steps", 4, "--quiet") == 0  # keeps to what it was begun with
    assert json.loads((out / "run.json").read_text())["members"] == 1
    other = tmp_path / "by the clock"
    common[common.index(out)] = other
    assert cli(*common, "--minutes", 0.02, "--set", "train.lr=0.002") == 0
    assert 1 <= load(other).facts["members"] <= 8
    assert load(other).model.usable == load(other).facts["members"]
    (other / "run.json").write_text((other / "run.json").read_text().replace('"members": ', '"members": 1000'))
    capsys.readouterr()
    assert cli("sample", other, tiny_cohort / "p0", "--out", tmp_path / "o") == 4
    assert "members" in capsys.readouterr().err
