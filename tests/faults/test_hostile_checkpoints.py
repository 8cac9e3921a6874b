"""Checkpoints and run folders that somebody made to do harm, and what must not be in the code: rows C9 and C10 of the
fault matrix. See ``hostile_use.py``."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hostile_kinds import put_manifest
from hostile_use import KINDS

from phmdiff_fast import checkpoint
from phmdiff_fast.checkpoint_format import MOST_BYTES
from phmdiff_fast.errors import PhmdiffError

ROOT = Path(__file__).resolve().parents[2]
OURS = [path for folder in ("phmdiff_fast", "kernels", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
OURS.append(ROOT / "setup.py")
# What runs or unpickles what came from a file. torch.load unpickles whatever weights_only says.
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml",
                     "runpy", "jsonpickle"}  # fmt: skip
FORBIDDEN = {"torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "eval", "exec", "compile", "__import__",
             "os.system", "os.popen", "numpy.load", "shutil.unpack_archive"}  # fmt: skip
FORBIDDEN_NAMES = {"extractall", "__reduce__", "__reduce_ex__", "__setstate__"}  # of whatever they are


def harm(tree: ast.AST) -> list[str]:
    """Forbidden imports, names and arguments of a module, by line; under whatever name they are imported."""
    full = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            full |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            full |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
            found.append((node, node.module))
        elif isinstance(node, (ast.Name, ast.Attribute)):
            first, *rest = ast.unparse(node).split(".")
            name = ".".join([full.get(first, first), *rest])
            if name in FORBIDDEN or (isinstance(node, ast.Attribute) and node.attr in FORBIDDEN_NAMES):
                found.append((node, name))
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name in FORBIDDEN_NAMES:
            found.append((node, node.name))
        elif isinstance(node, ast.Call):
            found += [(node, k.arg) for k in node.keywords
                      if (k.arg in ("allow_pickle", "shell") and not _is(k.value, False))
                      or (k.arg == "weights_only" and not _is(k.value, True)) or k.arg == "pickle_module"]  # fmt: skip
    return [f"line {node.lineno}: {what}" for node, what in found]


def _is(node: ast.AST, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(ROOT)))
def test_c9_nothing_unpickles_or_runs_text(path):
    assert harm(ast.parse(path.read_text())) == []


def test_c9_all_of_the_code_is_searched():
    assert len(OURS) > 60
    assert {path.relative_to(ROOT).parts[0] for path in OURS} == {"phmdiff_fast", "kernels", "benchmarks", "setup.py"}


@pytest.mark.parametrize(
    "code",
    ["import pickle", "import pickle as p", "from pickle import loads", "import _pickle", "import marshal",
     "import shelve", "import dill", "import joblib", "from joblib import load", "import cloudpickle", "import yaml",
     "from yaml import load", "import runpy", "torch.load('x')", "torch.load('x', weights_only=True)",
     "f = torch.load", "torch.save(x, f)", "torch.jit.load(f)", "numpy.load(f)", "eval(text)", "map(eval, lines)",
     "exec(text)", "compile(text, f, 'exec')", "__import__(text)", "os.system(text)", "os.popen(text)",
     "tar.extractall(p)", "zipfile.ZipFile(f).extractall()", "shutil.unpack_archive(f)", "read(allow_pickle=True)",
     "read(allow_pickle=flag)", "load(weights_only=False)", "load(weights_only=flag)", "read(pickle_module=p)",
     "subprocess.run(c, shell=True)", "class A:\n    def __reduce__(self): ...", "x.__reduce__()",
     "class A:\n    def __setstate__(self, state): ..."],
)  # fmt: skip
def test_c9_the_search_finds_what_it_is_for(code):
    assert len(harm(ast.parse(code))) == 1


@pytest.mark.parametrize(
    "code",
    ["import torch as t\nt.load(f)", "from torch import load\nload(f)", "from os import system as s\ns(text)",
     "import numpy as np\nnp.load(f)", "from torch import load as read\nread(f)", "from os import popen\npopen(text)"],
)  # fmt: skip
def test_c9_the_search_finds_it_under_another_name(code):
    assert len(harm(ast.parse(code))) == 1


@pytest.mark.parametrize(
    "code", ["model.eval()", "torch.compile(f)", "re.compile(p)", "json.load(f)", "load(weights_only=True)",
             "run(c, shell=False)", "from .config import load_toml\nload_toml(f)"]
)  # fmt: skip
def test_c9_the_search_leaves_the_rest_alone(code):
    assert harm(ast.parse(code)) == []


# --- the kinds


# Still to be refused in time by what reads config.toml, run.json and split.json.
@pytest.fixture(scope="module")
def answers():
    """Kind -> what came of it; all of them by a process of its own, which forks one for each."""
    if sys.platform != "linux":
        pytest.skip("counts memory as Linux does")
    command = [sys.executable, str(Path(__file__).with_name("hostile_use.py")), "--json", "--first"]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    return {told["kind"]: told for told in map(json.loads, ran.stdout.splitlines())}


def test_c9_c10_the_kinds_are_many_and_named_once():
    names = [kind.name for kind in KINDS]
    assert len(names) == len(set(names))
    assert sum(not kind.of_run for kind in KINDS) > 200
    assert sum(kind.of_run for kind in KINDS) > 50


@pytest.mark.parametrize("name", [kind.name for kind in KINDS if not kind.of_run])
def test_c9_c10_a_hostile_checkpoint_does_no_harm(answers, name):
    """One line and exit 4, or what was saved; in 2 s and 200 MiB, and nothing of it runs."""
    assert answers[name]["wrong"] == []


@pytest.mark.parametrize("name", [kind.name for kind in KINDS if kind.of_run])
def test_c9_c10_a_hostile_run_folder_does_no_harm(answers, name):
    """One line and exit 2, 3 or 4, or no matter; in 2 s and 200 MiB, and nothing of it runs."""
    assert answers[name]["wrong"] == []


# --- one by one


@pytest.fixture
def folder(tmp_path):
    return checkpoint.save(tmp_path, 1, {"model": {"w": torch.ones(3)}}, {}, keep=2)


def refused(folder: Path) -> str:
    with pytest.raises(PhmdiffError) as caught:
        checkpoint.verify(folder)
    assert caught.value.exit_code == 4
    assert checkpoint.newest(folder.parent) is None
    return caught.value.line()


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x\\ny.safetensors"]
)
def test_c9_a_manifest_names_files_of_its_own_folder_only(folder, name):
    manifest = json.loads((folder / "manifest.json").read_text())
    line = refused(put_manifest(folder, {**manifest, "files": {name: "0" * 64}}))
    assert "\n" not in line
    assert repr(name) in line


def test_c10_a_manifest_of_many_megabytes_is_not_read(folder, monkeypatch):
    with open(folder / "manifest.json", "r+b") as file:
        file.truncate(MOST_BYTES + 1)
    monkeypatch.setattr(Path, "read_text", lambda *_: pytest.fail("it was read"))
    monkeypatch.setattr(Path, "read_bytes", lambda *_: pytest.fail("it was read"))
    assert "MiB" in refused(folder)


@pytest.mark.parametrize(
    "change", [lambda path: path.write_bytes(b"1" * 8), Path.unlink, lambda path: os.truncate(path, 9)]
)
def test_c7_a_file_that_changes_after_it_was_verified_is_refused(folder, change):
    found = checkpoint.verify(folder)
    change(folder / "model.safetensors")
    with pytest.raises(PhmdiffError) as caught:
        found.tensors("model")
    assert (caught.value.code, caught.value.exit_code) == ("CHECKPOINT_BROKEN", 4)
    assert "model.safetensors" in caught.value.line()


def test_c9_a_group_that_is_not_there_is_said(folder):
    with pytest.raises(PhmdiffError, match=r"CHECKPOINT_BROKEN.*'ema'"):
        checkpoint.verify(folder).tensors("ema")


def test_c9_the_state_of_an_optimizer_must_fit_its_parameters():
    """The fused step would go on behind the end of a state that is too short."""
    model = torch.nn.Linear(400, 300)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    short = {"step/weight": torch.tensor(1.0), "exp_avg/weight": torch.zeros(2), "exp_avg_sq/weight": torch.zeros(2)}
    with pytest.raises(PhmdiffError, match=r"CHECKPOINT_DIFFERS.*'weight'"):
        checkpoint.load_optimizer(optimizer, model, short)
    assert not optimizer.state
