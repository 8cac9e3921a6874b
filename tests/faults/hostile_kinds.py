"""How hostile checkpoints and run folders are made: what ``hostile_checkpoints`` and ``hostile_runs`` share."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
    manifest["sha256"] = checkpoint.own_sha256(manifest)
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
