"""Checkpoints that somebody made to do harm, and what must not be in the code: rows C9 and C10 of the fault matrix."""

from __future__ import annotations

import ast
import hashlib
import json
import pickle
import struct
from pathlib import Path

import pytest
import torch

from phmdiff_fast import checkpoint
from phmdiff_fast.errors import PhmdiffError

ROOT = Path(__file__).resolve().parents[2]
OURS = [*sorted((ROOT / "phmdiff_fast").glob("*.py")), *sorted((ROOT / "kernels").glob("*.py"))]
# What runs or unpickles text that came from a file. torch.load unpickles whatever weights_only says.
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
FORBIDDEN_CALLS = {"torch.load", "torch.save", "eval", "exec", "compile", "__import__", "os.system", "numpy.load",
                   "np.load"}  # fmt: skip


def harm(tree: ast.AST) -> list[str]:
    """Forbidden imports, calls and arguments of a module, by line."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, a.name) for a in node.names if a.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
            found.append((node.lineno, node.module))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS or name.endswith(".extractall"):
                found.append((node.lineno, name))
            found += [(node.lineno, k.arg) for k in node.keywords
                      if (k.arg in ("allow_pickle", "shell") and not _is(k.value, False))
                      or (k.arg == "weights_only" and _is(k.value, False))]  # fmt: skip
    return [f"line {line}: {what}" for line, what in found]


def _is(node: ast.AST, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", OURS, ids=lambda p: p.name)
def test_c9_nothing_unpickles_or_runs_text(path):
    assert harm(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    "code",
    ["import pickle", "from yaml import load", "torch.load('x')", "numpy.load(f)", "eval(text)", "tar.extractall(p)",
     "read(allow_pickle=True)", "load(weights_only=False)", "subprocess.run(c, shell=True)"],
)  # fmt: skip
def test_c9_the_search_finds_what_it_is_for(code):
    assert len(harm(ast.parse(code))) == 1


@pytest.fixture
def folder(tmp_path):
    return checkpoint.save(tmp_path, 1, {"model": {"w": torch.ones(3)}}, {}, keep=2)


def listed(folder: Path, **files: bytes) -> None:
    """Put the files there, with the right hashes in the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, content in files.items():
        name = name.replace("__", ".")
        (folder / name).write_bytes(content)
        manifest["files"][name] = hashlib.sha256(content).hexdigest()
    put_manifest(folder, manifest)


def put_manifest(folder: Path, manifest: dict) -> None:
    """A manifest that states its own hash, as one who means harm would write it."""
    manifest.pop("sha256", None)
    manifest["sha256"] = checkpoint._own_sha256(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def refused(folder: Path) -> str:
    with pytest.raises(PhmdiffError) as caught:
        checkpoint.verify(folder)
    assert caught.value.exit_code == 4
    assert checkpoint.newest(folder.parent) is None
    return caught.value.line()


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["model.pt", "model.bin", "model.pkl", ".metadata", "model.safetensors"])
def test_c9_a_pickle_is_never_opened_as_one(folder, tmp_path, name):
    canary = tmp_path / "canary"
    listed(folder, **{name: pickle.dumps(Canary(canary))})
    assert ("CHECKPOINT_BROKEN" if name.endswith("safetensors") else "UNSAFE_FORMAT") in refused(folder)
    assert not canary.exists()


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x\\ny.safetensors"]
)
def test_c9_a_manifest_names_files_of_its_own_folder_only(folder, name):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: "0" * 64}
    put_manifest(folder, manifest)
    line = refused(folder)
    assert "\n" not in line
    assert repr(name) in line


def test_c10_a_manifest_of_many_megabytes_is_not_read(folder, monkeypatch):
    with open(folder / "manifest.json", "r+b") as file:
        file.truncate(checkpoint.MOST_BYTES + 1)
    monkeypatch.setattr(Path, "read_text", lambda *_: pytest.fail("it was read"))
    assert "MiB" in refused(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": 1, "step": 1, "files": []}', '{"format": {}, "files": {}}',
                                  "[]", '"text"', '{"format": 1, "step": "x", "files": {}}'])  # fmt: skip
def test_c10_a_manifest_of_another_shape_is_refused(folder, text):
    (folder / "manifest.json").write_text(text)
    refused(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        struct.pack("<Q", 2**63) + b"{}",  # claims more than there is memory for
        struct.pack("<Q", 10**6) + b"{}",  # claims more than the file has
        struct.pack("<Q", (16 << 20) + 1) + b" " * ((16 << 20) + 1),  # has it, and it is a bomb
    ],
    ids=["empty", "one byte", "2^63", "more than the file", "over 16 MiB"],
)
def test_c10_a_header_bomb_is_not_parsed(folder, content):
    listed(folder, model__safetensors=content)
    assert "header" in refused(folder)


def test_c10_a_hundred_thousand_tensors_are_too_many(folder):
    header = json.dumps({f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(100_001)})
    listed(folder, model__safetensors=struct.pack("<Q", len(header)) + header.encode())
    assert "100000 tensors" in refused(folder)
