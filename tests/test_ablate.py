"""The ablation: each row lacks one component and nothing else, and the command goes on where it stopped."""

from __future__ import annotations

import json

import pytest
from conftest import TINY, cli

from phmdiff_fast import trainer
from phmdiff_fast.ablate import CHANGES, TITLES, settings_of
from phmdiff_fast.config import build_config, differing
from phmdiff_fast.errors import PhmdiffError


def test_each_row_takes_one_component_away_and_nothing_else():
    config = build_config("xs", {"train": {"mmd_weight": 0.07, "last_t_share": 0.5, "minutes": 1.0}})
    full = settings_of("full", config)
    assert full == config
    apart = {row: differing(full.fixed(), settings_of(row, config).fixed()) for row in CHANGES}
    assert [line.split()[0] for line in apart["no-cgr"]] == ["train.mmd_weight"]
    assert apart["no-cgr"][0].endswith("0.07 -> 0.0")
    assert [line.split()[0] for line in apart["no-diffusion"]] == ["train.last_t_share"]
    assert [line.split()[0] for line in apart["no-transformer"]] == ["model.denoiser"]
    assert [line.split()[0] for line in apart["no-masking"]] == ["model.levels"]
    assert [level.mask_ratio for level in settings_of("no-masking", config).model.levels] == [0.0] * 3
    pyramid = settings_of("no-pyramid", config).model.levels
    assert pyramid == full.model.levels[:1]
    assert set(TITLES) == set(CHANGES)


def test_the_full_method_has_the_loss_that_a_preset_leaves_out():
    config = build_config("xs", {"train": {"mmd_weight": 0.0}})
    assert settings_of("full", config).train.mmd_weight > 0
    assert settings_of("no-cgr", config).train.mmd_weight == 0


@pytest.mark.parametrize("lacking", [
    {"model": {"levels": [{"mask_ratio": 0.5}]}}, {"model": {"levels": [{"mask_ratio": 0.0}] * 2}},
    {"train": {"finetune_share": 1.0}}, {"train": {"last_t_share": 1.0}}, {"model": {"denoiser": "convolutions"}},
])  # fmt: skip
def test_settings_that_lack_a_component_already_are_refused(lacking):
    with pytest.raises(PhmdiffError, match="ABLATE_SETTINGS"):
        settings_of("full", build_config("xs", lacking))


@pytest.mark.slow
def test_the_command_makes_one_table_and_goes_on(tiny_cohort, tmp_path, capsys, monkeypatch):
    numbers = iter([2, 3, 4, 5, 6, 7])  # a budget has room for more members of a cheaper network
    monkeypatch.setattr(trainer, "members_for", lambda passes: next(numbers))
    out = tmp_path / "ablation"
    arguments = ["ablate", tiny_cohort, "--source", "t1", "--target", "t2", "--out", out, "--steps", 2, "--image-size",
                 32, "--quiet", *TINY]  # fmt: skip
    assert cli(*arguments, "--rows", "full,no-transformer") == 0
    first = json.loads((out / "table.json").read_text())
    assert cli(*arguments) == 0
    printed = capsys.readouterr()
    table = json.loads((out / "table.json").read_text())
    assert set(table["runs"]) == set(CHANGES)
    assert all(run["steps"] == 2 for run in table["runs"].values())
    for row in ("full", "no-transformer"):  # trained once
        assert table["runs"][row] == first["runs"][row]
    splits = {(out / row / "split.json").read_text() for row in CHANGES}
    assert len(splits) == 1
    assert {json.loads((out / row / "run.json").read_text())["members"] for row in CHANGES} == {2}
    text = (out / "table.md").read_text()
    for title in TITLES.values():
        assert title in text
        assert title in printed.err + printed.out
    assert {r["method"] for r in table["rows"]} == set(CHANGES)
    assert cli(*arguments, "--rows", "full,no-wings") == 2
    assert "no-wings" in capsys.readouterr().err
