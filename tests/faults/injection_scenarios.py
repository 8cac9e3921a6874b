"""What ``injection.py`` disturbs: everything that is written, as scenarios of three functions each, and planted ones.

Nothing of the package is imported before a scenario needs it: the tests read the names alone.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from injection_cache import build_cache, cache_config, cache_is_whole_or_stale, cohort, cohort_and_cache, scans


class Scenario(NamedTuple):
    """prepare(folder) makes the old state; act(folder) is disturbed; verify(folder) raises AssertionError, or
    returns "old", "new", or "none" where what is there says of itself that it cannot be used. ``again(folder)``
    is what a user does after a crash, by default ``act``."""

    prepare: Callable[[Path], None]
    act: Callable[[Path], object]
    verify: Callable[[Path], str]
    again: Callable[[Path], object] | None = None


def _groups(step: int) -> dict:
    import torch

    weights = torch.arange(20_000, dtype=torch.float32).reshape(100, 200) + step
    return {"model": {"w": weights, "b": weights[0] * 2}, "ema": {"w": weights / 2},
            "optimizer": {"exp_avg/w": weights * 3, "step/w": torch.tensor(float(step))}}  # fmt: skip


def _save(folder: Path, step: int) -> None:
    from phmdiff_fast import checkpoint

    checkpoint.save(folder / "checkpoints", step, _groups(step), {"seconds": 1.5}, keep=2)


def _two_checkpoints(folder: Path) -> None:
    (folder / "checkpoints").mkdir()
    for step in (1, 2):
        _save(folder, step)


def _save_again(folder: Path) -> None:
    from phmdiff_fast import checkpoint

    checkpoint.remove_leftovers(folder / "checkpoints")
    _save(folder, 3)


def _newest_is_whole(folder: Path) -> str:
    import torch

    from phmdiff_fast import checkpoint
    from phmdiff_fast.errors import PhmdiffError

    def verifies(path):
        try:
            return bool(checkpoint.verify(path))
        except PhmdiffError:
            return False

    assert sum(map(verifies, checkpoint.found(folder / "checkpoints"))) >= 2, "fewer than two checkpoints verify"
    newest = checkpoint.newest(folder / "checkpoints")
    assert newest.step in (2, 3), f"the newest is of step {newest.step}, that of step 2 was acknowledged"
    for group, tensors in _groups(newest.step).items():
        read = newest.tensors(group)
        assert read.keys() == tensors.keys(), group
        assert all(torch.equal(read[name], value) for name, value in tensors.items()), group
    return "old" if newest.step == 2 else "new"


def _save_beside(folder: Path) -> None:
    from phmdiff_fast.checkpoint_writer import Writer

    writer = Writer(folder / "checkpoints", keep=2)
    writer.save(3, _groups(3), {"seconds": 1.5})
    writer.wait()


def _save_by_two(folder: Path) -> None:
    """Two processes' shares, one after the other here; where the second fails the first waits in vain."""
    from phmdiff_fast import checkpoint
    from phmdiff_fast.errors import PhmdiffError

    groups, failed = _groups(3), None
    for rank, timeout in ((1, 0), (0, 0.05)):
        try:
            checkpoint.save(folder / "checkpoints", 3, checkpoint.share(groups, rank, 2), {}, keep=2, rank=rank,
                            world=2, token="run", timeout=timeout)  # fmt: skip
        except PhmdiffError as problem:
            failed = failed or problem
    if failed:
        raise failed


def _voxels(which: str):
    import numpy as np

    return np.random.default_rng(len(which)).normal(100, 10, (24, 20, 9)).astype(np.float32) + (which == "new")


def _write_volume(name: str, which: str):
    def write(folder: Path) -> None:
        import numpy as np

        from phmdiff_fast import nifti

        grid = nifti.Grid((24, 20, 9), np.diag([1.5, 1.5, 2.0, 1.0]))
        nifti.write_volume(folder / name, _voxels(which), grid, overwrite=True)

    return write


def _volume_is_whole(name: str):
    def verify(folder: Path) -> str:
        import numpy as np

        from phmdiff_fast import nifti

        read = nifti.read_volume(folder / name).voxels
        return next(which for which in ("old", "new") if np.array_equal(read, _voxels(which)))

    return verify


def _json(which: str) -> dict:
    return {"which": which, "values": [len(which) + n / 7 for n in range(2000)]}


def _write_json(which: str):
    def write(folder: Path) -> None:
        from phmdiff_fast.files import write_json

        write_json(folder / "run.json", _json(which))

    return write


def _json_is_whole(folder: Path) -> str:
    read = json.loads((folder / "run.json").read_text())
    assert read == _json(read["which"])
    return read["which"]


def _write_locked(folder: Path) -> None:
    from phmdiff_fast.files import locked

    with locked(folder):
        _write_json("new")(folder)


def _scans_and_split(folder: Path) -> None:
    scans(folder)
    (folder / "split.json").write_text(json.dumps({"train": ["anna"], "val": [], "test": ["bela"]}))
    (folder / "run").mkdir()


def _run_config():
    from phmdiff_fast.config import Config

    return Config(data=cache_config("old"))


def _begin_run(folder: Path) -> None:
    from phmdiff_fast import run_folder
    from phmdiff_fast.files import locked, remove_unfinished

    run = folder / "run"
    split, _ = run_folder.start_folder(run, _run_config(), cohort(folder), folder / "split.json", None)
    with locked(run):
        remove_unfinished(run)
        run_folder.begin(run, _run_config(), split, {"subjects": 2})


def _run_begun_or_not(folder: Path) -> str:
    from phmdiff_fast.config import Config, load_toml

    run = folder / "run"
    if not (run / "run.json").exists():
        return "old"
    assert json.loads((run / "run.json").read_text()) == {"subjects": 2}
    assert json.loads((run / "split.json").read_text()) == json.loads((folder / "split.json").read_text())
    assert Config.model_validate(load_toml(run / "config.toml")) == _run_config()
    return "new"


def _records(*steps: int) -> list[dict]:
    return [{"step": step, "loss": step / 7} for step in steps]


def _old_log(folder: Path) -> None:
    lines = [json.dumps(record) for record in _records(1, 2, 3)]
    (folder / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "lo')  # as a crash leaves it


def _go_on_with_log(folder: Path) -> None:
    from phmdiff_fast.run_folder import Log

    with Log(folder / "log.jsonl", 2) as log:
        for record in _records(3, 4):
            log.write(record)


def _log_is_whole(folder: Path) -> str:
    from phmdiff_fast.run_folder import read_log

    read = read_log(folder / "log.jsonl")
    assert read[:2] == _records(1, 2), "records of a checkpoint's steps are lost"
    assert read[2:] == _records(3, 4)[: len(read) - 2]
    return "new" if len(read) == 4 else "old"


def _write_page(path: Path, which: str) -> None:
    from phmdiff_fast.report import write_demo_page

    rows = [{"method": method, "protocol": which, "metric": "psnr", "mean": 20.0 + n, "std": 1.0, "n": 4}
            for n, method in enumerate(("ours", "lookup"))]  # fmt: skip
    write_demo_page(path, title=which, facts=[("steps", "10")], table_rows=rows, strips=[], notes=["synthetic"],
                    overwrite=True)  # fmt: skip


def _draw_strip(path: Path, which: str) -> None:
    from phmdiff_fast.pictures import strip

    old = _voxels(which)[:, :, 0] / 150 - 1
    strip(path, [{"label": which, "source": old, "synthesized": old / 2, "truth": old / 3}])


@lru_cache
def _drawn(write, which: str) -> bytes:
    with tempfile.TemporaryDirectory() as elsewhere:
        write(Path(elsewhere) / "file", which)
        return (Path(elsewhere) / "file").read_bytes()


def _one_file(name: str, write) -> Scenario:
    """A file whose bytes are those of a writing undisturbed."""

    def verify(folder: Path) -> str:
        read = (folder / name).read_bytes()
        return next(which for which in ("old", "new") if read == _drawn(write, which))

    return Scenario(lambda folder: write(folder / name, "old"), lambda folder: write(folder / name, "new"), verify)


SCENARIOS = {
    "checkpoint": Scenario(_two_checkpoints, lambda folder: _save(folder, 3), _newest_is_whole, _save_again),
    "checkpoint_beside": Scenario(_two_checkpoints, _save_beside, _newest_is_whole, _save_again),
    "checkpoint_by_two": Scenario(_two_checkpoints, _save_by_two, _newest_is_whole, _save_again),
    "volume_gz": Scenario(
        _write_volume("a.nii.gz", "old"), _write_volume("a.nii.gz", "new"), _volume_is_whole("a.nii.gz")
    ),
    "volume": Scenario(_write_volume("a.nii", "old"), _write_volume("a.nii", "new"), _volume_is_whole("a.nii")),
    "json": Scenario(_write_json("old"), _write_json("new"), _json_is_whole),
    "lock": Scenario(_write_json("old"), _write_locked, _json_is_whole),
    "cache": Scenario(cohort_and_cache, build_cache("new"), cache_is_whole_or_stale),
    "run": Scenario(_scans_and_split, _begin_run, _run_begun_or_not),
    "log": Scenario(_old_log, _go_on_with_log, _log_is_whole),
    "page": _one_file("page.html", _write_page),
    "picture": _one_file("strip.png", _draw_strip),
}


def _write_in_place(folder: Path) -> None:
    (folder / "run.json").write_text(json.dumps(_json("new")))


def _write_without_looking(folder: Path) -> None:
    new = folder / "run.json.new"
    with open(new, "w") as file:
        file.write(json.dumps(_json("new")))
        file.flush()
        with suppress(OSError):
            os.fsync(file.fileno())
    new.rename(folder / "run.json")


# What must be found wanting, or nothing is proved by the others.
PLANTED = {
    "in_place": Scenario(_write_json("old"), _write_in_place, _json_is_whole),
    "sync_not_looked_at": Scenario(_write_json("old"), _write_without_looking, _json_is_whole),
}
