"""Checkpoints and run folders that somebody made to do harm: ``KINDS``. Rows C9 and C10 of the fault matrix.

    python tests/faults/hostile_checkpoints.py [--json] [--first] [part of a name ...]

uses each as a training, or ``sample``, ``evaluate`` and ``train``, would, in a process of its own that may die, hang
or eat memory; prints a line a kind and ends with 1 if a promise is broken. A manifest states its own hash, and the
right hash of every file, as one who means harm would write it. Linux.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

SECONDS = 2.0  # a kind
DEAD = 4.0  # seconds after which a silent process counts as hung
MEMORY = 200  # MiB more than before
RUNS = (2, 3, 4)  # exit codes of a run folder that is refused: for its settings, its people or itself
RAN = "RAN"  # the file that hostile code would make
STEP = "step-00000001"


@dataclass(frozen=True)
class Kind:
    """``make(folder)`` -> the checkpoint to give to --resume or, of a run folder, command lines; ``codes`` that the
    error may have (none: it may also load, to what was saved) and ``exits``, the exit codes."""

    name: str
    make: Callable[[Path], Path | list[list]]
    codes: tuple[str, ...]
    exits: tuple[int, ...] = (4,)

    @property
    def of_run(self) -> bool:
        return self.exits == RUNS


KINDS: list[Kind] = []


def kind(*codes: str, exits: tuple[int, ...] = (4,)):
    """The function is the maker of a kind; its name, with blanks, is the kind's."""

    def add(make):
        KINDS.append(Kind(make.__name__.replace("_", " "), make, codes, exits))
        return make

    return add


def several(title: str, values: dict, make: Callable[[Path, object], Path | list], *codes: str, exits=(4,)) -> None:
    """A kind of each value, by its name."""
    for name, value in values.items():
        KINDS.append(Kind(f"{title} {name}", lambda folder, value=value: make(folder, value), codes, exits))


# ---------------------------------------------------------------- how they are made


def own(folder: Path) -> Path:
    """The sound checkpoint that is to be spoilt."""
    return folder / "checkpoints" / STEP


def outside(folder: Path) -> Path:
    path = folder / "outside"
    path.mkdir(exist_ok=True)
    return path


def put_manifest(step: Path, manifest: dict) -> Path:
    """A manifest that states its own hash."""
    from phmdiff_fast import checkpoint

    manifest.pop("sha256", None)
    manifest["sha256"] = checkpoint._own_sha256(manifest)
    (step / "manifest.json").write_text(json.dumps(manifest))
    return step


def manifest_of(step: Path) -> dict:
    return json.loads((step / "manifest.json").read_text())


def changed(folder: Path, **facts) -> Path:
    """The manifest with other facts; ``...`` takes one out."""
    manifest = {**manifest_of(own(folder)), **facts}
    return put_manifest(own(folder), {key: value for key, value in manifest.items() if value is not ...})


def listed(folder: Path, files: dict[str, bytes], **facts) -> Path:
    """Files with their right hashes in the manifest."""
    manifest = manifest_of(own(folder))
    for name, content in files.items():
        (own(folder) / name).write_bytes(content)
        manifest["files"][name] = hashlib.sha256(content).hexdigest()
    return put_manifest(own(folder), {**manifest, **facts})


def safetensors(header, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape=(3,), begin=0, end=12, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def model_file(folder: Path, content: bytes) -> Path:
    return listed(folder, {"model.safetensors": content})


def with_tensors(folder: Path, **groups: dict) -> Path:
    """The checkpoint with other tensors in some groups, right in every other way; ``...`` leaves a group out."""
    import torch

    from phmdiff_fast import checkpoint

    old = checkpoint.verify(own(folder))
    kept = {name: groups.get(name) or old.tensors(name) for name in ("model", "ema", "optimizer")}
    kept = {name: {key: torch.as_tensor(value).clone() for key, value in tensors.items()}
            for name, tensors in kept.items() if tensors is not ...}  # fmt: skip
    facts = {key: old.manifest[key] for key in ("seconds", "config", "spikes", "version")}
    shutil.rmtree(own(folder))
    return checkpoint.save(own(folder).parent, 1, kept, facts, keep=9)


def tensors_of(folder: Path, group: str) -> dict:
    from phmdiff_fast import checkpoint

    return checkpoint.verify(own(folder)).tensors(group)


def renamed(folder: Path, names: dict[str, str], **facts) -> Path:
    """Files under other names, in the folder and the manifest."""
    manifest = manifest_of(own(folder))
    for old, new in names.items():
        (own(folder) / old).rename(own(folder) / new)
        manifest["files"][new] = manifest["files"].pop(old)
    return put_manifest(own(folder), {**manifest, **facts})


class Canary:
    """Unpickled, it makes the file ``RAN``."""

    def __init__(self, folder: Path):
        self.path = folder / RAN

    def __reduce__(self):
        return Path.touch, (self.path,)


def pickled(folder: Path) -> bytes:
    return pickle.dumps(Canary(folder))


def zipped(content: bytes, name: str = "archive/data.pkl", level=zipfile.ZIP_STORED) -> bytes:
    """As torch.save writes: a zip file with a pickle in it."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", level) as file:
        file.writestr(name, content)
    return raw.getvalue()


# ---------------------------------------------------------------- what would have to be unpickled

several(
    "a pickle listed as",
    {name: name for name in ("model.pt", "model.pth", "model.bin", "model.ckpt", "model.pkl", ".metadata", "a.npz")},
    lambda folder, name: listed(folder, {name: pickled(folder)}),
    "UNSAFE_FORMAT",
)
several(
    "a file given to resume:",
    {"pickle .pt": ("a.pt", pickled), "torch.save .pt": ("a.pt", lambda folder: zipped(pickled(folder))),
     "named like a checkpoint": ("checkpoints/step-00000002", pickled), "safetensors": ("a.safetensors", pickled)},
    lambda folder, file: [(folder / file[0]).write_bytes(file[1](folder)), folder / file[0]][1],
    "UNSAFE_FORMAT",
)  # fmt: skip


@kind("UNSAFE_FORMAT")
def a_folder_of_torch_distributed(folder):
    (own(folder) / ".metadata").write_bytes(pickled(folder))
    return own(folder)


several(
    "model.safetensors that is",
    {"a pickle": pickled, "a torch.save": lambda folder: zipped(pickled(folder)),
     "a zip bomb": lambda folder: zipped(bytes(64 << 20), level=zipfile.ZIP_DEFLATED)},
    lambda folder, content: model_file(folder, content(folder)),
    "CHECKPOINT_BROKEN",
)  # fmt: skip


@kind("CHECKPOINT_BROKEN")
def a_manifest_that_is_a_pickle(folder):
    (own(folder) / "manifest.json").write_bytes(pickled(folder))
    return own(folder)


# ---------------------------------------------------------------- headers of safetensors

DATA = bytes(12)
TWO = {"a": entry((1,), 0, 4), "b": entry((1,), 4, 8)}
several(
    "a header",
    {
        "of no bytes": lambda: b"",
        "of one byte": lambda: b"\x01",
        "of length 0": lambda: safetensors(b""),
        "that claims 2^63": lambda: struct.pack("<Q", 2**63) + b"{}",
        "that claims 2^64 - 1": lambda: struct.pack("<Q", 2**64 - 1) + b"{}",
        "longer than the file": lambda: struct.pack("<Q", 10**6) + b"{}",
        "over 16 MiB": lambda: safetensors(b" " * ((16 << 20) + 1)),
        "of 100,001 tensors": lambda: safetensors({f"t{n}": entry((0,), 0, 0) for n in range(100_001)}),
        "of 250,000 tensors, written otherwise": lambda: safetensors(
            json.dumps({f"{n:x}": entry((0,), 0, 0) for n in range(250_000)}, separators=(",", ":"))
            .replace("dtype", "\\u0064type").encode()
        ),
        "with remarks, just few enough": lambda: safetensors(
            {"__metadata__": {f"{n:x}": "" for n in range(299_000)}, "weight": entry()}, DATA
        ),
        "with 1,000,000 remarks": lambda: safetensors(
            {"__metadata__": {f"{n:x}": "" for n in range(1_000_000)}, "weight": entry()}, DATA
        ),
        "nested 100,000 deep": lambda: safetensors(b"[" * 100_000),
        "nested 1,000,000 deep in a tensor": lambda: safetensors(b'{"weight":' + b'{"a":' * 1_000_000),
        "with a shape nested deep": lambda: safetensors({"weight": {**entry(), "shape": _nested(900)}}, DATA),
        "that is a list": lambda: safetensors(b"[]"),
        "that is null": lambda: safetensors(b"null"),
        "that is no text": lambda: safetensors(b'{"\xff\xfe": 1}'),
        "with a tensor that is a list": lambda: safetensors({"weight": []}),
        "with a tensor of nothing": lambda: safetensors({"weight": {}}),
        "with remarks that are no text": lambda: safetensors({"__metadata__": {"a": [1]}, "weight": entry()}, DATA),
        "with a name twice": lambda: safetensors(
            b'{"weight":%s,"weight":%s}' % ((json.dumps(entry()).encode(),) * 2), DATA
        ),
        "with bytes used twice": lambda: safetensors({**TWO, "b": entry((1,), 0, 4)}, bytes(4)),
        "with bytes that overlap": lambda: safetensors({**TWO, "b": entry((1,), 2, 6)}, bytes(6)),
        "with a gap": lambda: safetensors({**TWO, "b": entry((1,), 8, 12)}, DATA),
        "with offsets out of the file": lambda: safetensors({"weight": entry((3,), 0, 1 << 40)}, DATA),
        "with offsets backwards": lambda: safetensors({"weight": entry((3,), 12, 0)}, DATA),
        "with negative offsets": lambda: safetensors({"weight": entry((3,), -12, 0)}, DATA),
        "with three offsets": lambda: safetensors({"weight": {**entry(), "data_offsets": [0, 12, 12]}}, DATA),
        "with offsets that are text": lambda: safetensors({"weight": {**entry(), "data_offsets": "01"}}, DATA),
        "with bytes behind": lambda: safetensors({"weight": entry()}, bytes(99)),
        "with a negative size": lambda: safetensors({"weight": entry((-3,))}, DATA),
        "with two negative sizes": lambda: safetensors({"weight": entry((-3, -1))}, DATA),
        "with a size that is no whole number": lambda: safetensors({"weight": entry((3.0,))}, DATA),
        "with a size that is true": lambda: safetensors({"weight": entry((True,), 0, 4)}, bytes(4)),
        "with a size of 400 digits": lambda: safetensors({"weight": entry((10**400,))}, DATA),
        "with sizes whose product overflows": lambda: safetensors({"weight": entry((2**32, 2**32))}, DATA),
        "with sizes whose product overflows to the right one": lambda: safetensors(
            {"weight": entry((2**62 + 3,), 0, 12)}, DATA
        ),
        "with nothing times 2^63": lambda: safetensors({"weight": entry((0, 2**63), 0, 0)}),
        "with 500,000 sizes of 2^62": lambda: safetensors({"weight": entry([2**62] * 500_000)}, DATA),
        "with 3,000 sizes of 4,000 digits": lambda: safetensors({"weight": entry([10**4000] * 3_000)}, DATA),
        "with 100,000 sizes": lambda: safetensors({"weight": entry([1] * 100_000, 0, 4)}, bytes(4)),
        "with a type nobody knows": lambda: safetensors({"weight": entry(dtype="F33")}, DATA),
        "with a type that is a list": lambda: safetensors({"weight": entry(dtype=["F32"])}, DATA),
        "with a type of half bytes": lambda: safetensors({"weight": entry((2,), 0, 1, "F4")}, b"\0"),
        "with a name of control codes": lambda: safetensors({"\x1b[2J\n\0": entry()}, DATA),
        "without the weights": lambda: safetensors({}),
    },
    lambda folder, content: model_file(folder, content()),
    "CHECKPOINT_BROKEN",
)  # fmt: skip


@kind("CHECKPOINT_BROKEN")
def a_shard_of_a_tebibyte_of_nothing(folder):
    step = model_file(folder, safetensors({"weight": entry()}, DATA))
    os.truncate(step / "model.safetensors", 1 << 40)
    return step


# ---------------------------------------------------------------- manifests


def _nested(depth: int):
    made: list = []
    for _ in range(depth):
        made = [made]
    return made


def _text(folder: Path, text: str | Callable[[], str]) -> Path:
    (own(folder) / "manifest.json").write_text(text() if callable(text) else text)
    return own(folder)


def _named(count: int) -> str:
    return '{"format": 2, "files": {}, "x": {' + ",".join(f'"{n:07}":{n}' for n in range(count)) + "}}"


several(
    "a manifest",
    {
        "of nothing": "",
        "nested 100,000 deep": "[" * 100_000,
        "of lists, 16 MiB": "[" + "[],[]," * 2_700_000 + "[]]",
        "of lists, just few enough": lambda: '{"format": 2, "files": {}, "x": [' + "[]," * 149_000 + "[]]}",
        "of names, just few enough": lambda: _named(299_000),
        "of names, too many": lambda: _named(900_000),
        "of one text, 16 MiB": lambda: '{"format": 2, "files": {}, "x": "\U0001f9e0' + "x" * 16_000_000 + '"}',
        "of one text, 16 MiB, ASCII": lambda: (
            '{"format": 2, "files": {}, "x": "\\ud83e\\udde0' + "x" * 16_000_000 + '"}'
        ),
        "of a number of a million digits": lambda: '{"format": 2, "files": {}, "step": ' + "9" * 1_000_000 + "}",
        "of a fraction of a million digits": lambda: '{"format": 2, "files": {}, "step": 0.' + "9" * 1_000_000 + "}",
        "that is a list": "[]",
        "that is a text": '"text"',
        "that is a number": "1",
        "that is nothing": "null",
        "of format 1 without files": '{"format": 1, "step": 1}',
    },
    _text,
    "CHECKPOINT_BROKEN",
    "CHECKPOINT_HASH",
)


@kind("CHECKPOINT_BROKEN")
def a_manifest_of_100_MB(folder):
    os.truncate(own(folder) / "manifest.json", 100_000_000)
    return own(folder)


@kind()
def a_manifest_that_states_something_twice(folder):
    text = (own(folder) / "manifest.json").read_text()
    (own(folder) / "manifest.json").write_text(text.replace('"step"', '"step": 7, "step"'))
    return own(folder)


@kind()
def a_shard_listed_twice(folder):
    text = (own(folder) / "manifest.json").read_text()
    (own(folder) / "manifest.json").write_text(
        re.sub(r'("model.safetensors": ".{64}")', r"\1, \1", text)  # the hash of what is read stays right
    )
    return own(folder)


FORMAT_TYPES = {"nothing": None, "true": True, "-1": -1, "1.5": 1.5, "text": "x", "a list": [], "lists": [[[]]],
                "a table": {}, "1e999": math.inf, "nan": math.nan, "10^400": 10**400, "10^18": 10**18}  # fmt: skip
for _key in ("format", "step", "world", "files", "tensors", "config", "spikes", "seconds", "version", "val_psnr"):
    several(f"{_key} =", FORMAT_TYPES, lambda folder, value, key=_key: changed(folder, **{key: value}))
several(
    "no", {key: key for key in ("format", "step", "files", "tensors", "seconds")},
    lambda folder, key: changed(folder, **{key: ...}), "CHECKPOINT_BROKEN",
)  # fmt: skip
several(
    "spikes with",
    {"losses of text": {"losses": ["x"]}, "losses of 10^400": {"losses": [10**400] * 99}, "losses of 5": {"losses": 5},
     "a stage that is a list": {"stage": []}, "lists left out": {"left_out": [[]]}, "rollbacks of text":
     {"rollbacks": "x"}},
    lambda folder, spikes: changed(folder, spikes={"losses": [], "stage": None, "left_out": [], "rollbacks": 0,
                                                   **spikes}),
    "CHECKPOINT_BROKEN",
)  # fmt: skip
several(
    "tensors with",
    {"another size": {"weight": ["float32", 99], "bias": ["float32", 3]}, "a table": {"weight": {}}, "nothing": None,
     "nesting": {"weight": _nested(500)}},
    lambda folder, table: changed(folder, tensors={**manifest_of(own(folder))["tensors"], "model": table}),
    "CHECKPOINT_BROKEN",
)  # fmt: skip
several(
    "config with",
    {"another width": {"model.width": 999}, "nesting": {"model.width": _nested(900)}, "a text of 10 MB":
     {"model.width": "x" * 10_000_000}, "control codes": {"model.width": "\x1b[2J\n\0"}},
    lambda folder, config: changed(folder, config={**manifest_of(own(folder))["config"], **config}),
    "CHECKPOINT_DIFFERS", "CHECKPOINT_BROKEN",
)  # fmt: skip
several(
    "a hash that is",
    {"nothing": None, "a list": [], "a number": 10**400, "lists": _nested(900), "in capitals": "A" * 64},
    lambda folder, digest: changed(folder, files={**manifest_of(own(folder))["files"], "model.safetensors": digest}),
    "CHECKPOINT_HASH", "CHECKPOINT_BROKEN",
)  # fmt: skip


@kind("CHECKPOINT_BROKEN")
def another_step_than_its_folder(folder):
    return changed(folder, step=99)


@kind("CHECKPOINT_NEWER")
def a_newer_format_of_a_version_with_control_codes(folder):
    return changed(folder, format=3, version="\x1b[2J\n" * 100_000)


# ---------------------------------------------------------------- names and kinds of files

several(
    "a file called",
    {"../": "../model.safetensors", "absolute": "/etc/passwd", "in a folder": "a/b.safetensors", "..": "..",
     "nothing": "", "with NUL": "model\0.safetensors", "with a line": "model\n.safetensors", "with a last line":
     "model.safetensors\n", "with control codes": "\x1b[2J.safetensors", "of a million letters": "x" * 1_000_000 +
     ".safetensors", "other digits": "model.٠-of-١.safetensors"},
    lambda folder, name: changed(folder, files={**manifest_of(own(folder))["files"], name: "0" * 64}),
    "CHECKPOINT_BROKEN",
)  # fmt: skip
several(
    "a pickle called",
    {"../": "../../a.pt", "absolute": "/etc/a.pt", "with NUL": "\0.pt", "with a line": "a\nb.pt",
     "with control codes": "\x1b[2J.pt", "of a million letters": "x" * 1_000_000 + ".pt"},
    lambda folder, name: changed(folder, files={**manifest_of(own(folder))["files"], name: "0" * 64}),
    "UNSAFE_FORMAT",
)  # fmt: skip


def _moved_and_linked(folder: Path, name: str) -> Path:
    target = outside(folder) / name
    (own(folder) / name).rename(target)
    (own(folder) / name).symlink_to(target)
    return own(folder)


def _made(folder: Path, name: str, make: Callable[[Path], object]) -> Path:
    (own(folder) / name).unlink()
    make(own(folder) / name)
    return own(folder)


for _name in ("model.safetensors", "manifest.json"):
    several(
        f"{_name} that is",
        {"a pipe": os.mkfifo, "a folder": Path.mkdir, "a link to itself": lambda path: path.symlink_to(path),
         "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"), "a link to a pipe": lambda path:
         [os.mkfifo(path.with_name("pipe")), path.symlink_to("pipe")], "missing": lambda path: None,
         "a socket": lambda path: os.mknod(path, 0o140600)},
        lambda folder, make, name=_name: _made(folder, name, make),
        "CHECKPOINT_BROKEN",
    )  # fmt: skip
    several(f"{_name} linked", {"from outside": _name}, _moved_and_linked, "CHECKPOINT_BROKEN")


@kind("CHECKPOINT_BROKEN")
def a_checkpoint_that_is_a_pipe(folder):
    os.mkfifo(folder / "checkpoints" / "step-00000002")
    return folder / "checkpoints" / "step-00000002"


def _in_two(folder: Path) -> Path:
    """All of it in both shards."""
    manifest = manifest_of(own(folder))
    files = {}
    for group in ("model", "ema", "optimizer"):
        whole = own(folder) / f"{group}.safetensors"
        for n in (0, 1):
            shutil.copy(whole, own(folder) / f"{group}.{n}-of-2.safetensors")
            files[f"{group}.{n}-of-2.safetensors"] = manifest["files"][whole.name]
    return put_manifest(own(folder), {**manifest, "files": files, "world": 2})


several(
    "shards:",
    {
        "the model whole and in shards": lambda folder: listed(
            folder, {"model.0-of-1.safetensors": (own(folder) / "model.safetensors").read_bytes()}
        ),
        "3 of 2": lambda folder: renamed(folder, {"model.safetensors": "model.3-of-2.safetensors"}, world=2),
        "one of 2 is missing": lambda folder: renamed(folder, {"model.safetensors": "model.0-of-2.safetensors"}),
        "the same under two spellings": lambda folder: listed(
            folder, {f"model.{n}-of-2.safetensors": (own(folder) / "model.safetensors").read_bytes()
                     for n in ("0", "00")}
        ),
        "a tensor in two": lambda folder: _in_two(folder),
        "of 10^17": lambda folder: changed(folder, world=10**17),
        "of another world": lambda folder: changed(folder, world=2),
    },
    lambda folder, make: make(folder),
    "CHECKPOINT_BROKEN",
)  # fmt: skip

# ---------------------------------------------------------------- tensors of other shapes, which verify


def _other(group: str, change: Callable[[dict], dict]) -> Callable[[Path], Path]:
    return lambda folder: with_tensors(folder, **{group: change(tensors_of(folder, group))})


def _each(match: str, change: Callable) -> Callable[[dict], dict]:
    return lambda tensors: {name: change(value) if re.search(match, name) else value for name, value in tensors.items()}


several(
    "tensors right but for",
    {
        "weights of other shapes": _other("model", _each("weight", lambda value: value[:1])),
        "weights of another type": _other("model", _each("weight", lambda value: value.long())),
        "a weight more": _other("model", lambda tensors: {**tensors, "evil": tensors["bias"]}),
        "a weight less": _other("model", lambda tensors: {"bias": tensors["bias"]}),
        "an average of one number": _other("ema", _each("weight", lambda value: value[:1, :1])),
        "an average of another type": _other("ema", _each("weight", lambda value: value.double())),
        "an average of other names": _other("ema", lambda tensors: {f"x.{k}": v for k, v in tensors.items()}),
        "moments that are too short": _other("optimizer", _each("exp_avg/weight", lambda value: value[:1])),
        "moments of two numbers": _other("optimizer", _each("exp_avg", lambda value: value.reshape(-1)[:2])),
        "moments of another type": _other("optimizer", _each("exp_avg", lambda value: value.byte())),
        "a count of steps that is long": _other("optimizer", _each("step", lambda value: value.repeat(5))),
        "a count of steps of another type": _other("optimizer", _each("step", lambda value: value.long())),
        "moments of nobody": _other("optimizer", lambda tensors: {**tensors, "exp_avg/evil": tensors["step/bias"]}),
        "a state nobody knows": _other("optimizer", lambda tensors: {**tensors, "evil/bias": tensors["step/bias"]}),
        "moments that are missing": _other(
            "optimizer", lambda tensors: {k: v for k, v in tensors.items() if not k.startswith("exp_avg_sq")}
        ),
        "no average": lambda folder: with_tensors(folder, ema=...),
        "no model": lambda folder: with_tensors(folder, model=...),
        "no optimizer": lambda folder: with_tensors(folder, optimizer=...),
    },
    lambda folder, make: make(folder),
    "CHECKPOINT_DIFFERS", "CHECKPOINT_BROKEN",
)  # fmt: skip

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


# ---------------------------------------------------------------- how they are used


class User:
    """A training with a small model."""

    def __init__(self, out: Path):
        import torch

        from phmdiff_fast.config import Config
        from phmdiff_fast.distributed import Alone
        from phmdiff_fast.ema import EMA
        from phmdiff_fast.trainer import Trainer

        torch.manual_seed(0)
        self.training = training = Trainer(out, Config(), Alone(), torch.device("cpu"))
        training.model = torch.nn.Linear(400, 300)
        training.optimizer = torch.optim.AdamW(training.model.parameters(), fused=True)
        training.ema = EMA(training.model, 0.9)

    def step(self) -> None:
        for parameter in self.training.model.parameters():
            parameter.grad = parameter.detach() * 0.5
        self.training.optimizer.step()

    def state(self) -> dict[str, dict]:
        return self.training.groups()

    def prepare(self) -> None:
        from phmdiff_fast import checkpoint

        self.step()
        facts = {"seconds": 1.5, "version": "1", "val_psnr": None, "config": self.training.config.fixed(),
                 "spikes": self.training.spikes.state()}  # fmt: skip
        self.training.ema.update(0)
        checkpoint.save(self.training.out / "checkpoints", 1, self.state(), facts, keep=2)


def _use_checkpoint(folder: Path, given: Path) -> dict:
    """Look for the newest, and resume from what is given; what came of it."""
    import torch

    from phmdiff_fast import checkpoint
    from phmdiff_fast.errors import PhmdiffError

    lines: list[str] = []
    sound = User(folder)
    sound.step()
    sound.training.ema.update(0)
    told: dict = {"ended": "loaded", "lines": lines, "code": "", "exit_code": 0}
    try:
        checkpoint.newest(folder / "checkpoints", warn=lines.append)
        user = User(folder)
        user.training.resume(given)
    except PhmdiffError as problem:
        lines.append(problem.line())
        return {**told, "ended": "error", "code": problem.code, "exit_code": problem.exit_code}
    for group, tensors in sound.state().items():
        read = user.state()[group]
        same = read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in tensors)
        if not same:
            return {**told, "ended": f"loaded, with another {group}"}
    user.step()
    return told


def _use_run(command: list) -> dict:
    """Run a command line; what came of it."""
    from phmdiff_fast.cli import main

    said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (the process ends)
    os.dup2(said.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        main([str(part) for part in command])
    except SystemExit as leaving:
        code = leaving.code
    except BaseException as problem:
        return {"ended": f"{type(problem).__name__}: {problem}"[:300], "lines": [], "code": "", "exit_code": 1}
    sys.stderr.flush()
    said.seek(0)
    lines = said.read().splitlines()
    found = re.findall(r"error\[(\w+)\]", lines[-1] if lines else "")
    return {"ended": "error" if code else "loaded", "lines": lines, "code": found[0] if found else "",
            "exit_code": code}  # fmt: skip


def _in_child(act: Callable[[], dict]) -> dict:
    """Act in a forked process; what came of it, seconds, and MiB taken beyond what it had."""
    read, write = os.pipe()
    start = time.perf_counter()
    child = os.fork()
    if not child:
        try:
            os.close(read)
            signal.setitimer(signal.ITIMER_REAL, DEAD)
            Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
            before = _resident("VmRSS")
            try:
                told = act()
            except BaseException as problem:
                told = {"ended": f"{type(problem).__name__}: {problem}"[:300], "lines": [], "code": "", "exit_code": 1}
            told["mib"], told["lines"] = _resident("VmHWM") - before, [line[:3000] for line in told["lines"][:9]]
            os.write(write, json.dumps(told).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    seconds = time.perf_counter() - start
    if os.WIFSIGNALED(status) or not said:
        number = os.WTERMSIG(status)
        ended = "hangs" if number == signal.SIGALRM else f"dies of {signal.Signals(number).name}" if number else "ends"
        return {"ended": ended, "lines": [], "code": "", "exit_code": -number, "mib": 0.0, "seconds": seconds}
    return {**json.loads(said), "seconds": seconds}


def _resident(what: str) -> float:
    return int(re.search(rf"{what}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def _wrong(kind: Kind, told: dict, folder: Path) -> Iterator[str]:
    """The promises that are broken."""
    if told["ended"] == "loaded":
        if kind.codes:
            yield "it was taken"
    elif told["ended"] != "error":
        yield told["ended"]
    elif told["exit_code"] not in kind.exits or (kind.codes and told["code"] not in kind.codes):
        yield f"exit code {told['exit_code']}, {told['code'] or 'no code'}"
    if kind.of_run and told["ended"] == "error":
        errors = sum("error[" in line for line in told["lines"])
        if errors != 1 and told["exit_code"] != 3:  # those are told together
            yield f"{errors} lines of errors"
    for line in told["lines"]:
        if not line.isprintable() or len(line) > 2000:
            yield f"no line to print: {line[:100]!a}"
    if told["seconds"] > SECONDS:
        yield f"takes {told['seconds']:.1f} s"
    if told["mib"] > MEMORY:
        yield f"takes {told['mib']:.0f} MiB"
    if (folder / RAN).exists():
        yield "it ran"


def look(kind: Kind, template: Path, folder: Path, *, every: bool = True) -> Iterator[dict]:
    """What came of a kind: an answer for every way it is used, or for the first, with ``wrong``, a list."""
    shutil.copytree(template, folder, symlinks=True)
    try:
        given = kind.make(folder)
        ways = given if kind.of_run else [given]
        for one in ways if every else ways[:1]:
            act = (lambda one=one: _use_run(one)) if kind.of_run else (lambda one=one: _use_checkpoint(folder, one))
            answer = _in_child(act)
            how = one[0] if kind.of_run else "resume"
            yield {"kind": kind.name, "how": how, **answer, "wrong": list(_wrong(kind, answer, folder))}
    finally:
        shutil.rmtree(folder)


def prepare_run(folder: Path) -> None:
    """A sound run, of four people."""
    import numpy as np
    from conftest import TINY, phantom, write_scan

    from phmdiff_fast.cli import main

    affine = np.diag([1.5, 1.5, 2.0, 1.0])
    for number in range(4):
        for contrast, voxels in phantom(number).items():
            write_scan(folder / "data" / f"p{number}" / f"p{number}_{contrast}.nii.gz", voxels, affine)
    command = ["train", folder / "data", "--out", folder / "run", "--source", "t1", "--target", "t2", "--steps", 2,
               "--image-size", 24, "--quiet", *TINY, "--set", "train.mmd_weight=0.0"]  # fmt: skip
    try:
        main([str(part) for part in command])
    except SystemExit as leaving:
        if leaving.code:
            raise RuntimeError(f"the training ended with {leaving.code}") from None


def run(kinds: list[Kind], *, every: bool = True) -> Iterator[dict]:
    """The answers of ``look`` for these kinds."""
    import phmdiff_fast.evaluate
    import phmdiff_fast.train  # noqa: F401 (once, before any fork)

    with tempfile.TemporaryDirectory() as root:
        templates = {of_run: Path(root) / f"template-{of_run:d}" for of_run in {kind.of_run for kind in kinds}}
        for of_run, template in templates.items():
            template.mkdir()
            error = os.dup(2)  # what the training says is no answer
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            prepare_run(template) if of_run else User(template).prepare()
            os.dup2(error, 2)
        for kind in kinds:
            yield from look(kind, templates[kind.of_run], Path(root) / "spoilt", every=every)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="*", help="part of the name of a kind")
    parser.add_argument("--json", action="store_true", help="a line of JSON an answer")
    parser.add_argument("--first", action="store_true", help="of a run folder: only the first command that reads it")
    parser.add_argument("--without", action="append", default=[], help="a name that is left out (repeat)")
    given = parser.parse_args()
    kinds = [kind for kind in KINDS if kind.name not in given.without
             and (not given.name or any(name in kind.name for name in given.name))]  # fmt: skip
    failures = 0
    for told in run(kinds, every=not given.first):
        failures += bool(told["wrong"])
        if given.json:
            print(json.dumps(told), flush=True)
        else:
            print(f"{told['kind'][:60]:60} {told['how']:9} {told['ended'][:20]:20} {told['exit_code']:3} "
                  f"{told['code']:18} {told['seconds']:5.2f} s {told['mib']:4.0f} MiB  {'; '.join(told['wrong'])!a}",
                  flush=True)  # fmt: skip
    return int(failures > 0)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
