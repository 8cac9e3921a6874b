"""Checkpoints that somebody made to do harm, rows C9 and C10 of the fault matrix; ``hostile_use`` uses them.

A manifest states its own hash, and the right hash of every file, as one who means harm would write it.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

from hostile_kinds import (
    changed,
    entry,
    kind,
    listed,
    manifest_of,
    model_file,
    outside,
    own,
    pickled,
    put_manifest,
    renamed,
    safetensors,
    several,
    tensors_of,
    with_tensors,
    zipped,
)

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
