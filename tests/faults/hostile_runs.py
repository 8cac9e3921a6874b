"""Run folders that somebody made to do harm; ``hostile_use`` uses them."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

from hostile_kinds import RUNS, pickled, several

# ---------------------------------------------------------------- run folders


def _commands(folder: Path) -> dict[str, list]:
    run, data = folder / "run", folder / "data"
    return {"sample": ["sample", run, data / "p0", "--out", folder / "made", "--quiet", "--overwrite"],
            "evaluate": ["evaluate", run, data, "--quiet"],
            "train": ["train", data, "--out", run, "--steps", "3", "--quiet"]}  # fmt: skip


def _run_with(folder: Path, name: str, content, commands) -> list[list]:
    path = folder / "run" / name
    if callable(content):
        path.unlink()
        content(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [_commands(folder)[command] for command in commands]


def _facts(**facts) -> Callable[[Path], list]:
    """run.json with other facts."""

    def make(folder: Path) -> list:
        old = json.loads((folder / "run" / "run.json").read_text())
        new = {key: value for key, value in {**old, **facts}.items() if value is not ...}
        return _run_with(folder, "run.json", json.dumps(new), ("sample", "evaluate", "train"))

    return make


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 100_000_000)


ANY = {"nothing": "", "no text": b"\xff\xfe\0", "nested 100,000 deep": "[" * 100_000, "a pipe": os.mkfifo,
       "a folder": Path.mkdir, "100 MB": _sparse, "a pickle": lambda path: path.write_bytes(pickled(path.parents[1])),
       "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero")}  # fmt: skip
JSON = {"a list": "[]", "a text": '"x"', "a number": "1", "null": "null",
        "a list of 16 MB": lambda path: path.write_text("[" + "[]," * 5_000_000 + "[]]")}  # fmt: skip
several("run.json:", {**ANY, **JSON}, lambda folder, content: _run_with(folder, "run.json", content, _commands(folder)),
        exits=RUNS)  # fmt: skip
several("split.json:", {**ANY, **JSON}, lambda folder, content: _run_with(folder, "split.json", content,
        ("evaluate", "train")), exits=RUNS)  # fmt: skip
several(
    "split.json:",
    {"people of numbers": {"train": [1, 2], "val": [], "test": [3]}, "texts for lists": {"train": "p0", "val": "p1",
     "test": "p2"}, "no parts": {}, "lists in lists": {"train": [["p0"]], "val": [[]], "test": [["p1"]]},
     "paths": {"train": ["../../p0"], "val": ["/etc"], "test": ["\x1b[2J\n"]}, "tables": {"train": {}, "val": {},
     "test": {"p1": {}}}, "somebody in both": {"train": ["p0", "p1", "p2", "p3"], "val": ["p0"], "test": ["p0"]}},
    lambda folder, split: _run_with(folder, "split.json", json.dumps(split), ("evaluate", "train")),
    exits=RUNS,
)  # fmt: skip
several(
    "run.json with",
    {"a complexity of text": _facts(complexity="x"), "complexities of text": _facts(complexity=["x", "y", "z"]),
     "no complexity": _facts(complexity=...), "one complexity": _facts(complexity=[1.0]), "a complexity of nan":
     _facts(complexity=[math.nan] * 3), "complexities of 0": _facts(complexity=[0, 0, 0]), "complexities of 10^400":
     _facts(complexity=[10**400] * 3), "a complexity that is a table": _facts(complexity={}), "complexities below 0":
     _facts(complexity=[-1.0, 1.0, -1.0]), "median_p995 of text": _facts(median_p995="x"), "no median_p995":
     _facts(median_p995=...), "median_p995 of nan": _facts(median_p995=math.nan), "median_p995 of 10^400":
     _facts(median_p995=10**400), "units of a list": _facts(units=[]), "units nobody knows": _facts(units="\x1b[2J"),
     "nothing": lambda folder: _run_with(folder, "run.json", "{}", _commands(folder))},
    lambda folder, make: make(folder),
    exits=RUNS,
)  # fmt: skip


def _toml(change: str, instead: str = "") -> Callable[[Path], list]:
    def make(folder: Path) -> list:
        text = (folder / "run" / "config.toml").read_text()
        new = re.sub(change, lambda _: instead, text, count=1) if change else text + instead
        assert new != text, change
        return _run_with(folder, "config.toml", new, ("sample", "evaluate", "train"))

    return make


several("config.toml:", {key: value for key, value in ANY.items() if key not in ("nothing",)},
        lambda folder, content: _run_with(folder, "config.toml", content, _commands(folder)), exits=RUNS)  # fmt: skip
several(
    "config.toml with",
    {"a key nobody knows": _toml(r"\[data\]", '[data]\nevil = "x"'), "a table nobody knows": _toml("", "[evil]\nx = 1"),
     "a width of text": _toml("width = 32", 'width = "x"'), "a width that does not divide": _toml("width = 32",
     "width = 31"), "a width of 10^15": _toml("width = 32", "width = 1000000000000000"), "a depth of 10^9":
     _toml("depth = 1", "depth = 1000000000"), "a size of nothing": _toml("image_size = 24", "image_size = 0"),
     "lists 900 deep": _toml("", "[evil]\nx = " + "[" * 900 + "]" * 900), "tables 100,000 deep": _toml("", "[" + "a." *
     100_000 + "a]\n"), "a number of 10,000 digits": _toml("width = 32", "width = " + "9" * 10_000), "a target with a "
     "path": _toml('target = "t2"', 'target = "../../t2"'), "control codes": _toml('target = "t2"',
     'target = "\\u001b[2J"'), "two sources": _toml(r'sources = \[\n    "t1",\n\]', 'sources = ["t1", "t1"]'),
     "another model": _toml("width = 32", "width = 64"), "data that is a number": _toml(r"\[data\]",
     "data = 1\n[evil]")},
    lambda folder, make: make(folder),
    exits=RUNS,
)  # fmt: skip
