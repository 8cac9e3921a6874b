"""The bench of quality: who trains and who is scored, a queue that goes on, and tables that can be checked by hand."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from conftest import phantom, write_scan

from benchmarks import quality, quality_table
from benchmarks.quality_rows import AS_PRESET, FIXED, ROWS, TASKS, Task
from benchmarks.rivals import RIVALS
from phmdiff_fast.config import build_config
from phmdiff_fast.errors import PhmdiffError
from phmdiff_fast.layouts import Cohort

PEOPLE = ["mslub-cs-07", "mslub-cs-26", "mslub-long-04", "mslub-long-12", "tcga-du-7294", "tcga-fg-6692"]


def cohort(tmp_path, **contrasts) -> Cohort:
    files = {s: {c: tmp_path / f"{s}_{c}.nii.gz" for c in contrasts.get(s.replace("-", "_"), ("t1", "t2"))}
             for s in [*PEOPLE, "tpl-avg152"]}  # fmt: skip
    return Cohort(tmp_path, "BraTS 2021", files)


def test_the_fixed_split_trains_on_nobody_it_scores_or_chooses_by(tmp_path):
    (split,) = quality.splits(cohort(tmp_path), TASKS["t1-t2"], "fixed", "test")
    assert split.train == ("mslub-cs-07", "tcga-du-7294")
    assert split.val == FIXED["val"]
    assert split.test == FIXED["test"]
    (split,) = quality.splits(cohort(tmp_path), TASKS["t1-t2"], "fixed", "val")
    assert split.test == FIXED["val"]
    assert not set(split.train) & {*FIXED["val"], *FIXED["test"]}


def test_leave_one_out_scores_everybody_with_the_contrasts_once_and_no_template(tmp_path):
    everybody = cohort(tmp_path, mslub_long_04=("t1", "flair"))
    folds = list(quality.splits(everybody, TASKS["t1-t2"], "leave-one-out", "test"))
    assert sorted(p for fold in folds for p in fold.test) == [p for p in PEOPLE if p != "mslub-long-04"]
    for fold in folds:
        assert not set(fold.train) & set(fold.test)
        assert len(fold.train) == 4
        assert not any(p.startswith("tpl-") for p in fold.train)
    assert len({fold.name for fold in folds}) == 5
    assert any(s.startswith("tpl-") for fold in quality.splits(cohort(tmp_path), Task(("t1",), "t2", plumbing=True),
                                                               "fixed", "test") for s in fold.test)  # fmt: skip


def test_folds_score_everybody_once_by_a_training_on_all_others(tmp_path):
    folds = list(quality.splits(cohort(tmp_path), TASKS["t1-t2"], "3-fold", "test"))
    assert sorted(p for fold in folds for p in fold.test) == PEOPLE
    assert [len(fold.test) for fold in folds] == [2, 2, 2]
    assert all(sorted((*fold.train, *fold.test)) == PEOPLE and not fold.val for fold in folds)
    text = quality_table.tables([result("ours", p, 20.0, split=fold.name) for fold in folds for p in fold.test])
    assert text.count("### ") == 1
    assert "3 folds of people" in text
    with pytest.raises(PhmdiffError, match="TOO_FEW"):
        list(quality.splits(cohort(tmp_path), TASKS["t1-t2"], "9-fold", "test"))


def test_a_split_file_says_who_is_trained_on_and_scored(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"train": PEOPLE[:3], "val": [PEOPLE[3]], "test": PEOPLE[4:]}))
    (split,) = quality.splits(cohort(tmp_path, mslub_cs_26=("t1",)), TASKS["t1-t2"], str(path), "val")
    assert (split.train, split.val, split.test) == ((PEOPLE[0], PEOPLE[2]), (PEOPLE[3],), (PEOPLE[3],))  # 26 has no t2
    (split,) = quality.splits(cohort(tmp_path), TASKS["t1-t2"], str(path), "test")
    assert split.test == tuple(PEOPLE[4:])
    path.write_text(json.dumps({"train": PEOPLE[:3], "test": PEOPLE[2:]}))
    with pytest.raises(PhmdiffError, match="LEAK"):
        list(quality.splits(cohort(tmp_path), TASKS["t1-t2"], str(path), "test"))


def test_every_row_is_trained_by_something_and_has_settings_that_hold():
    for name, row in ROWS.items():
        assert (name in RIVALS or name == "lookup") != row.ours
        config = build_config("xs", row.settings)
        for how in row.sampling if row.ours else ():
            config.sample.model_copy(update=quality.sampling(how))
    assert quality.sampling("4 x 2") == {"steps": 4, "views": 2, "detail": 1.0}
    preset = build_config("xs").sample
    assert quality.sampling(AS_PRESET) == {"steps": preset.steps, "views": preset.views, "detail": preset.detail}
    assert len(build_config("xs", ROWS["dit"].settings).model.levels) == 1


def result(row, person, psnr, *, seed=0, sampling="1", **more):
    figures = {"psnr": psnr, "ssim": 80.0 + psnr / 10, "mae": 0.1}
    people = {person: {p: dict(figures) for p in quality.PROTOCOLS} | {"detail": {"sharpness": 0.5}}}
    facts = dict(row=row, task="t1-t2", split="fixed/test", seed=seed, minutes=1.0, image_size=64, device="CPU",
                 threads=2, dtype="float32", torch="2", date="2026-01-01", commit="abc", sampling=sampling, steps=100,
                 seconds=50.0, parameters=5_000_000, flops_step=2e9, people=people)  # fmt: skip
    return facts | more


def test_a_person_s_seeds_are_averaged_before_people_are():
    results = [result("ours", "a", 20.0), result("ours", "a", 24.0, seed=1), result("ours", "b", 30.0),
               result("unet_l1", "a", 21.0), result("unet_l1", "b", 27.0)]  # fmt: skip
    text = quality_table.table(results)
    ours = next(line for line in text.splitlines() if "ours" in line)
    unet = next(line for line in text.splitlines() if "U-Net" in line)
    # Ours 22 and 30: 26 +- 5.66, not the 24.67 of three trainings; U-Net 21 and 27.
    assert "**26.00 ± 5.66**" in ours
    assert "24.00 ± 4.24" in unet
    assert "**24.00" not in unet
    assert "| 100 | 2.0 | 5.0 M | 2 |" in ours
    mean, half, wins, count = quality_table.difference(*(quality_table.by_person(results)[row, "1"] for row in
                                                         ("ours", "unet_l1")), ("brain", "psnr"))  # fmt: skip
    assert (mean, wins, count) == (2.0, 2, 2)
    assert half == pytest.approx(12.7062047 * np.std([1, 3], ddof=1) / 2**0.5, rel=1e-6)
    assert "+2.00 ± 12.71 (2/2)" in quality_table.comparison(results)


def test_tables_keep_tasks_budgets_and_devices_apart_and_name_plumbing():
    results = [result("ours", "a", 20.0), result("ours", "a", 25.0, minutes=10.0),
               result("ours", "tpl", 30.0, task="mr-ct")]  # fmt: skip
    text = quality_table.tables(results)
    assert text.count("### ") == 3
    assert text.count(quality_table.PLUMBING) == 1
    assert "Table I" in text


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["quality", *map(str, arguments)])
    try:
        quality.main()
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


@pytest.mark.slow
def test_the_queue_trains_scores_stops_and_goes_on(tmp_path, monkeypatch, capsys):
    data = tmp_path / "cohort"
    for i in range(3):
        for contrast, voxels in phantom(i, (20, 24, 12)).items():
            write_scan(data / f"p{i}" / f"p{i}_{contrast}.nii.gz", voxels, np.diag([1.5, 1.5, 2, 1]))
    out = tmp_path / "results.jsonl"
    tiny = ["depth=1", "width=32", "heads=2", "decoder_depth=1", "decoder_width=16", "decoder_heads=2", "patch=4"]
    common = ["--data", data, "--people", "leave-one-out", "--minutes", 0.005, "--image-size", 24, "--quiet",
              "--out", out, *(x for item in tiny for x in ("--set", f"model.{item}"))]  # fmt: skip
    assert run(monkeypatch, *common, "--rows", "lookup,unet_l1") == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["row"], r["sampling"]) for r in lines] == [("lookup", "-"), ("unet_l1", "1"), ("unet_l1", "1 x 2"),
                                                         ("unet_l1", AS_PRESET)] * 3  # fmt: skip
    assert {p for r in lines for p in r["people"]} == {"p0", "p1", "p2"}
    assert all(p not in r["train"] for r in lines for p in r["people"])
    scores = lines[1]["people"]["p0"]
    assert set(scores) == {*quality.PROTOCOLS, "detail"}
    out.write_text("".join(json.dumps(r) + "\n" for r in lines[:-4]) + '{"row": "unet_l1", "ta')  # killed while writing
    assert run(monkeypatch, *common, "--rows", "lookup,unet_l1") == 2  # it exists
    assert "--resume" in capsys.readouterr().err
    assert run(monkeypatch, *common, "--rows", "lookup,unet_l1,ours", "--resume") == 0
    again = quality.read_results(out)
    assert again[: len(lines) - 4] == lines[:-4]  # nothing was trained twice
    assert sum(r["row"] == "unet_l1" for r in again) == 9
    ours = [r for r in again if r["row"] == "ours"]
    assert [r["sampling"] for r in ours] == [*ROWS["ours"].sampling] * 3
    assert all(r["steps"] >= 1 and r["flops_step"] > 0 for r in ours)
    assert "ours minus" in capsys.readouterr().out
    assert run(monkeypatch, "--out", out, "--table") == 0
    assert run(monkeypatch, *common, "--rows", "nobody") == 2
    for people in ("1-fold", "7-fold", "nowhere.json"):  # no cross-validation, more folds than people, no such file
        others = [people if x == "leave-one-out" else tmp_path / "no.jsonl" if x == out else x for x in common]
        assert run(monkeypatch, *others, "--rows", "lookup") == 2
        assert len(capsys.readouterr().err.strip().splitlines()[-1]) < 250
    assert not (tmp_path / "no.jsonl").exists()
    strangers = [x for x in common if x not in ("--people", "leave-one-out")]
    strangers[strangers.index(out)] = tmp_path / "strangers.jsonl"
    assert run(monkeypatch, *strangers, "--rows", "lookup") == 2  # none of them is in the fixed split
    assert "leave-one-out" in capsys.readouterr().err
    mine = tmp_path / "mine.jsonl"
    common[common.index(out)] = mine
    assert run(monkeypatch, *common, "--rows", "mine", "--extra", 'mine={"train": {"lr": 0.003}}') == 0
    (first, *_) = quality.read_results(mine)
    assert (first["row"], first["settings"]) == ("mine", {"train": {"lr": 0.003}})


def test_a_training_with_other_settings_is_another_training():
    split = quality.Split("fixed/test", ("a",), (), ("b",))
    one = quality.Job("ours", "t1-t2", split, 0, 1.0)
    assert one.key == quality.key_of(result("ours", "b", 20.0))
    for more in ({"image_size": 32}, {"looks": 10}, {"common": "train.lr=0.1"}):
        assert quality.Job("ours", "t1-t2", split, 0, 1.0, **more).key != one.key
        changed = quality.Job("ours", "t1-t2", split, 0, 1.0, **more)
        assert changed.key == quality.key_of(result("ours", "b", 20.0, **more))


def test_the_best_checkpoint_is_the_validation_person_s(monkeypatch, tmp_path):
    class One:
        def __init__(self, psnr):
            self.manifest = {"val_psnr": psnr}

    ones = {tmp_path / n: One(p) for n, p in (("a", 21.0), ("b", 23.5), ("c", 22.0))}
    monkeypatch.setattr(quality.checkpoint, "found", lambda folder: list(ones))
    monkeypatch.setattr(quality.checkpoint, "verify", ones.get)
    run = type("Run", (), {"folder": tmp_path})
    assert quality.best_checkpoint(run).manifest["val_psnr"] == 23.5
