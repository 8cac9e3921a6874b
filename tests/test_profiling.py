"""A profile of a few steps: files, tables that add up, and kernels given to the stage that launched them."""

from __future__ import annotations

import gzip
import json

import pytest
import torch

from phmdiff_fast.config import LevelSpec, ModelConfig, TrainConfig
from phmdiff_fast.errors import PhmdiffError
from phmdiff_fast.phmdiff import PHMDiff
from phmdiff_fast.profiling import Profile, operation_table, stage_picture, stage_table
from phmdiff_fast.stages import PREFIX, stage

CPU = torch.device("cpu")
NAMES = {"trace.json.gz", "stages.txt", "stages.json", "stages.png", "operations.txt"}


def tiny(device=CPU):
    """(model, step) of a real training step, its stages around the parts of the loop."""
    config = ModelConfig(depth=1, width=32, heads=2, decoder_depth=1, decoder_width=16, decoder_heads=2, patch=4,
                         stem=False, head=False, levels=[LevelSpec(mask_ratio=0.5)] * 2)  # fmt: skip
    model = PHMDiff(config, 1).to(device)
    optimizer, train = torch.optim.SGD(model.parameters(), lr=1e-3), TrainConfig(mmd_weight=0.0)

    def step(number: int) -> None:
        with stage("data"):
            images = torch.rand(2, 2, 16, 16, device=device)
            ids = torch.arange(2, device=device)
        with stage("forward"):
            terms = model.loss(images[:, :1], images[:, 1:], ids, (0, number), train, masked=True)
        with stage("backward"):
            terms.total.backward()
        with stage("update"):
            optimizer.step()
            optimizer.zero_grad()

    return model, step


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """The folder of a profile of three real steps, and the table."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run") / "profile"
    _, step = tiny()
    with Profile(folder, first_step=2, steps=3, device=CPU) as profile:
        for number in range(8):
            profile.at(number)
            step(number)
    return folder, profile.table


def test_a_profile_is_its_five_files(profiled):
    folder, _ = profiled
    assert {path.name for path in folder.iterdir()} == NAMES
    assert (folder / "stages.png").read_bytes().startswith(b"\x89PNG")
    assert "aten::addmm" in (folder / "operations.txt").read_text()


def test_stages_of_real_steps_add_up(profiled):
    folder, table = profiled
    rows = {row.stage: row for row in table.rows}
    assert {"data", "forward", "backward", "update", "no stage"} <= set(rows)
    assert table.steps == 3
    assert all(rows[name].calls == pytest.approx(1) for name in ("data", "forward", "backward", "update"))
    assert sum(row.host_own_ms for row in table.rows) == pytest.approx(table.step_ms, rel=1e-3)
    assert table.device_busy is None
    written = json.loads((folder / "stages.json").read_text())
    assert sum(row["share"] for row in written["rows"]) == pytest.approx(1, rel=1e-3)
    text = (folder / "stages.txt").read_text()
    assert "3 steps of" in text
    assert "device" not in text


def test_the_trace_gives_the_same_tables_again(profiled):
    folder, table = profiled
    trace = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))
    assert stage_table(trace) == table
    assert operation_table(trace) == (folder / "operations.txt").read_text()


def test_a_short_run_is_recorded_as_far_as_it_went(tmp_path, capsys):
    _, step = tiny()
    with Profile(tmp_path / "profile", first_step=1, steps=5, device=CPU) as profile:
        for number in range(3):
            profile.at(number)
            step(number)
    assert profile.table.steps == 2
    with Profile(tmp_path / "none", first_step=50, device=CPU) as profile:
        profile.at(0)
    assert not (tmp_path / "none").exists()
    assert "ended before step 50" in capsys.readouterr().err


def test_an_error_leaves_no_profile(tmp_path):
    def broken():
        with Profile(tmp_path / "profile", first_step=1, device=CPU) as profile:
            for number in range(3):
                profile.at(number)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert not (tmp_path / "profile").exists()
    with Profile(tmp_path / "again", first_step=1, steps=1, device=CPU) as profile:  # the profiler is free again
        for number in range(4):
            profile.at(number)
    assert (tmp_path / "again" / "stages.txt").exists()


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "profile").write_text("a file")
    profile = Profile(tmp_path / "profile", 1, steps=1, device=CPU)
    profile.at(0)
    profile.at(1)
    with pytest.raises(PhmdiffError) as told:
        profile.at(2)
    assert told.value.code == "OUTPUT_WRITE"


# --- a trace as a GPU gives it: two threads, a background thread, kernels that run late -----------------------

MAIN, AUTOGRAD, WRITER = 1, 2, 3


def annotation(name, ts, dur, tid=MAIN):
    return {"ph": "X", "cat": "user_annotation", "name": name, "pid": 1, "tid": tid, "ts": ts, "dur": dur}


def launch(number, ts, tid=MAIN):
    return {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "pid": 1, "tid": tid, "ts": ts, "dur": 1.0,
            "args": {"correlation": number}}  # fmt: skip


def kernel(number, ts, dur):
    return {"ph": "X", "cat": "kernel", "name": f"k{number}", "pid": 0, "tid": 7, "ts": ts, "dur": dur,
            "args": {"correlation": number}}  # fmt: skip


def gpu_trace():
    """One step of 10 ms; times in microseconds."""
    return {"traceEvents": [
        annotation("ProfilerStep#9", 0, 10_000),
        annotation(PREFIX + "encoder", 1000, 2000), annotation(PREFIX + "embed", 1200, 500),
        launch(1, 1300), kernel(1, 2000, 1000),  # of embed, though it runs after it
        launch(2, 2500), kernel(2, 3000, 2000),  # of encoder
        annotation(PREFIX + "backward", 4000, 4000),
        launch(3, 5000, AUTOGRAD), kernel(3, 5000, 1500),  # of backward, from a thread of autograd's
        annotation(PREFIX + "encoder", 6000, 1000, AUTOGRAD),  # computed again inside it
        launch(4, 6500, AUTOGRAD), kernel(4, 6500, 500),
        annotation(PREFIX + "checkpoint", 4500, 5000, WRITER),  # longer than backward: beside the steps
        launch(5, 9000), kernel(5, 9000, 250),  # of no stage
        launch(7, 4200, WRITER), kernel(7, 8000, 100),  # nor is this of backward
        annotation(PREFIX + "profile", 9990, 4000),  # the profiler's own work after the step
        launch(6, 20_000), kernel(6, 21_000, 1000),  # after the last step
        {"ph": "X", "cat": "gpu_user_annotation", "name": PREFIX + "encoder", "pid": 0, "tid": 7, "ts": 2000,
         "dur": 3000},
    ]}  # fmt: skip


def test_kernels_belong_to_the_stage_that_launched_them():
    table = stage_table(gpu_trace())
    found = {row.stage: (row.host_ms, row.host_own_ms, row.device_ms, row.device_own_ms) for row in table.rows}
    assert found == {
        "embed": (0.5, 0.5, 1.0, 1.0),
        "encoder": (3.0, 2.5, 3.5, 2.5),  # its own, and what was computed again
        "backward": (4.0, 3.0, 2.0, 1.5),
        "no stage": (4.0, 4.0, 0.35, 0.35),
    }
    assert [row.stage for row in table.background] == ["checkpoint"]
    assert table.background[0].device_ms == 0
    assert table.device_busy == pytest.approx((3000 + 1500 + 500 + 250 + 100) / 10_000)
    assert "beside the steps" in table.text()
    assert "busy 5" in table.text()
    assert operation_table(gpu_trace()).index("k2") < operation_table(gpu_trace()).index("k3")


def test_a_gpu_without_recorded_kernels_is_told():
    trace = {"traceEvents": [e for e in gpu_trace()["traceEvents"] if e["cat"] != "kernel"]}
    assert "CUPTI" in stage_table(trace).text()


def test_a_trace_without_steps_is_refused():
    with pytest.raises(ValueError, match="ProfilerStep"):
        stage_table({"traceEvents": []})


def test_the_picture_has_a_bar_for_both(tmp_path):
    path = stage_picture(tmp_path / "stages.png", stage_table(gpu_trace()))
    assert path.stat().st_size > 2000


@pytest.mark.gpu
def test_kernels_of_a_real_step_are_in_stages(tmp_path):
    cuda = torch.device("cuda")
    _, step = tiny(cuda)
    with Profile(tmp_path / "profile", first_step=4, steps=3, device=cuda) as profile:
        for number in range(8):
            profile.at(number)
            step(number)
    rows = {row.stage: row for row in profile.table.rows}
    assert profile.table.steps == 3
    assert all(rows[name].device_ms > 0 for name in ("forward", "backward", "update"))
    on_device = sum(row.device_own_ms for row in profile.table.rows)
    assert rows["no stage"].device_ms < 0.2 * on_device
    assert 0 < profile.table.device_busy <= 1
