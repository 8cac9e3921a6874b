"""Guards of a training: rows R1, R2 and R3 of the fault matrix."""

from __future__ import annotations

import json

import pytest
import torch
from cells import command, newest, run_all

from phmdiff_fast.errors import PhmdiffError
from phmdiff_fast.guards import LEAST, Spikes, fitting
from phmdiff_fast.run_folder import read_log

LONG = 64  # steps: more than the LEAST losses that a new one is compared with


@pytest.fixture(scope="module")
def long_run(zygote, tiny_cohort, tmp_path_factory):
    out = tmp_path_factory.mktemp("long") / "run"
    assert zygote.run(long_command(tiny_cohort, out), hook="plain").status == 0
    return out


def long_command(cohort, out, *more, steps=LONG):
    return [*command(cohort, out, steps=steps), "--set", "train.finetune_share=0.0", "--set",
            "train.checkpoint_steps=10", *more]  # fmt: skip


def weights(run) -> dict[str, torch.Tensor]:
    return newest(run).tensors("model")


def equal(a, b) -> bool:
    return all(torch.equal(weights(a)[name], value) for name, value in weights(b).items())


# --- R1: not finite


def test_r1_a_poisoned_sample_stops_before_the_update_and_is_named(zygote, tiny_cohort, tmp_path):
    run = tmp_path / "run"
    ended = zygote.run(command(tiny_cohort, run), hook="plain;poison:3")
    assert ended.status == 5
    assert ended.err.count("error[NONFINITE]") == 1
    dump = json.loads(next(run.glob("nonfinite-*.json")).read_text())
    step = dump["step"]
    assert dump["loss_not_finite"] == [3]
    assert {"slice": 3, "subject": dump["slices"][0]["subject"]}.keys() == dump["slices"][0].keys()
    assert dump["rng"] == {"seed": 0, "step": step}
    assert f"at step {step}, slices 3 of 'p" in ended.err
    found = newest(run)  # checkpoints before it are there, none after
    assert (found.step if found else 0) <= step
    assert json.loads((run / "status.json").read_text())["exit_code"] == 5


def test_r1_the_weights_are_those_before_the_step(tiny_cohort, tmp_path, monkeypatch):
    """The update itself leaves everything as it is: so it is on a GPU, where the loss is looked at later."""
    from conftest import cli

    from phmdiff_fast.step import Step

    seen = []
    real = Step.update

    def update(self, terms, lr, step):
        if step == 2:
            next(self.model.parameters()).grad[0] = float("nan")
        states = [value.clone() for state in self.optimizer.state.values() for value in state.values()]
        before = [p.detach().clone() for p in self.model.parameters()] + states
        bad = real(self, terms, lr, step)
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        after = [p.detach() for p in self.model.parameters()] + states
        same = len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        seen.append((float(bad), same))
        return bad

    monkeypatch.setattr(Step, "update", update)
    assert cli(*command(tiny_cohort, tmp_path / "run")) == 5
    assert seen == [(0, False), (0, False), (1, True)]


# --- R2: jumps


def test_r2_by_hand():
    spikes = Spikes()
    assert not any(spikes.sees(1 + 0.01 * (i % 3), "masked") for i in range(LEAST))
    assert spikes.sees(1.05, "masked") is None  # within ten times the MAD
    assert "1.5" in spikes.sees(1.5, "masked")
    assert len(spikes.losses) == LEAST + 1  # a spike is no part of what is usual
    assert spikes.sees(1.5, "unmasked") is None  # another stage has other losses
    again = Spikes()
    again.load(json.loads(json.dumps(spikes.state())))
    assert (again.losses, again.stage, again.left_out) == (spikes.losses, spikes.stage, spikes.left_out)


def test_r2_a_jump_is_told_and_by_default_taken(zygote, tiny_cohort, tmp_path):
    ended = zygote.run(long_command(tiny_cohort, tmp_path / "run"), hook="plain;jump:55")
    assert ended.status == 0
    assert ended.err.count("the loss is") == 1
    assert "at step 55" in ended.err


def test_r2_skip_leaves_the_step_out(zygote, tiny_cohort, tmp_path, long_run):
    ended = zygote.run(long_command(tiny_cohort, tmp_path / "run", "--on-spike", "skip"), hook="plain;jump:55")
    assert ended.status == 0
    assert "step 55 is left out" in ended.err
    assert newest(tmp_path / "run").step == LONG
    assert not equal(tmp_path / "run", long_run)
    calm = zygote.run(long_command(tiny_cohort, tmp_path / "calm", "--on-spike", "skip"), hook="plain")
    assert calm.status == 0
    assert equal(tmp_path / "calm", long_run)  # without a jump nothing is another


@pytest.mark.parametrize("world", [1, 2])
def test_r2_rollback_goes_back_and_leaves_that_step_out(zygote, tiny_cohort, tmp_path, world):
    arguments = long_command(tiny_cohort, tmp_path / "run", "--on-spike", "rollback")
    ended = run_all(zygote, arguments, world, "plain;jump:55")
    assert [child.status for child in ended] == [0] * world, ended[0].err
    assert "back to step 50" in ended[0].err
    assert newest(tmp_path / "run").manifest["spikes"]["left_out"] == [55]
    steps = [record["step"] for record in read_log(tmp_path / "run" / "log.jsonl") if "checkpoint" not in record]
    assert steps == sorted(steps)
    run_all(zygote, long_command(tiny_cohort, tmp_path / "skip", "--on-spike", "skip"), world, "plain;jump:55")
    assert equal(tmp_path / "run", tmp_path / "skip")


def test_r2_rollback_ends_after_three(zygote, tiny_cohort, tmp_path):
    arguments = long_command(tiny_cohort, tmp_path / "run", "--on-spike", "rollback")
    ended = zygote.run(arguments, hook="plain;jump:53,55,57,59")
    assert ended.status == 5
    assert "after 3 steps back" in ended.err


def test_r2_stop_stops_before_the_update(zygote, tiny_cohort, tmp_path):
    ended = zygote.run(long_command(tiny_cohort, tmp_path / "run", "--on-spike", "stop"), hook="plain;jump:55")
    assert ended.status == 5
    assert "error[LOSS_SPIKE]" in ended.err
    assert "at step 55" in ended.err
    assert newest(tmp_path / "run").step == 50


# --- R3: memory


def test_r3_the_search_by_hand():
    tried = []

    def attempt(images):
        tried.append(images)
        if images > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert fitting(attempt, 11) == 3
    assert tried == [11, 6, 3]
    with pytest.raises(PhmdiffError) as caught:
        fitting(lambda images: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")), 8)
    assert (caught.value.code, caught.value.exit_code) == ("OUT_OF_MEMORY", 6)
    with pytest.raises(ZeroDivisionError):
        fitting(lambda images: 1 / 0, 8)  # another error is no lack of memory


def test_r3_a_smaller_micro_batch_is_found_before_step_0(zygote, tiny_cohort, tmp_path):
    ended = zygote.run(command(tiny_cohort, tmp_path / "run"), hook="plain;small_memory:2")
    assert ended.status == 0, ended.err
    assert "2 of 4 images at a time fit into memory" in ended.err
    assert zygote.run(command(tiny_cohort, tmp_path / "whole"), hook="plain").status == 0
    gap = max(float((weights(tmp_path / "run")[n] - w).abs().max()) for n, w in weights(tmp_path / "whole").items())
    assert 0 < gap < 2e-3  # the mean of means is the mean, up to rounding that Adam's first steps blow up


def test_r3_later_it_is_told_what_to_try(zygote, tiny_cohort, tmp_path):
    ended = zygote.run(command(tiny_cohort, tmp_path / "run"), hook="plain;small_memory:2,5")
    assert ended.status == 6
    assert "error[OUT_OF_MEMORY] memory ran out at step 5 with 4 image(s) at a time" in ended.err
    assert "--set train.micro_batch=2" in ended.err
    assert newest(tmp_path / "run").step == 4
    again = zygote.run(
        [*command(tiny_cohort, tmp_path / "run"), "--set", "train.micro_batch=2"], hook="plain;small_memory:2"
    )
    assert again.status == 0, again.err
    nothing = zygote.run(command(tiny_cohort, tmp_path / "none"), hook="plain;small_memory:0")
    assert nothing.status == 6
    assert "1 image(s)" in nothing.err
