"""Checkpoints: a folder a step, safetensors and a manifest, written whole or not at all.

    step-00000500/  model.safetensors      the weights
                    ema.safetensors        their average, what sampling uses
                    optimizer.safetensors  AdamW's two moments and step counts
                    manifest.json          step, settings, every tensor's shape, sha256 of every file

With W processes every file is W shards, ``model.0-of-2.safetensors``, each process writing a share; any
number of processes reads them. A checkpoint is written to a temporary folder, synced and renamed; an
existing one is never overwritten. Nothing here unpickles. ``checkpoint_writer`` writes them beside a training.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .config import Config, differing
from .errors import CHECKPOINT, IO, PhmdiffError

FORMAT = 2  # 1 had no shards, settings or shapes
MOST_BYTES, MOST_TENSORS = 16 << 20, 100_000  # of a manifest or a header; ours have kilobytes and hundreds
MOST_VALUES = 3 * MOST_TENSORS  # ours have thousands; 16 MiB of "[]," would be 400 MiB of lists
MOST_SIZES = 32  # of a tensor: a million whose product is asked for would take minutes
VERIFIED = 2  # checkpoints that verify and are never removed
TEMPORARY = ".tmp-"
PICKLES = (".metadata", ".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".npy", ".npz")  # can run code when read
CHUNK = 4 << 20  # bytes hashed and written at a time
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
          torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip
_KNOWN = {name: (str(dtype).removeprefix("torch."), dtype.itemsize) for dtype, name in DTYPES.items()}
_NAME = re.compile(r"step-([0-9]{8,18})")
_FILE = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]{0,63})(?:\.[0-9]{1,5}-of-[0-9]{1,5})?\.safetensors")


@dataclass
class Checkpoint:
    """A verified checkpoint: its folder, step and manifest."""

    folder: Path
    step: int
    manifest: dict[str, Any] = field(repr=False)

    def _files(self, group: str) -> list[str]:
        return [name for name in self.manifest["files"] if _FILE.fullmatch(name)[1] == group]

    def tensors(self, group: str, device="cpu") -> dict[str, Tensor]:
        """The tensors of ``group`` (model, ema, optimizer), of all its shards.

        Raises CHECKPOINT_BROKEN (exit 4) if there are none, or no longer those that were verified.
        """
        made: dict[str, Tensor] = {}
        for name in self._files(group):
            try:
                made |= load_file(self.folder / name, device=str(device))
            except (SafetensorError, OSError, ValueError, TypeError) as problem:
                raise _broken(self.folder / name, problem) from None
        if shapes_of(made) != self.manifest["tensors"].get(group):
            raise _broken(self.folder, f"no {group!r}, or another than was verified")
        return made

    def digest(self, group: str) -> str:
        """One SHA-256 that names the tensors of ``group``: its file's, or that of its shards' digests."""
        each = [self.manifest["files"][name] for name in self._files(group)]
        return each[0] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest()

    def refuse_other(self, config: Config, state: dict[str, Tensor]) -> None:
        """Raise CHECKPOINT_DIFFERS (exit 4) unless it was made with these settings and shapes of weights."""
        try:
            gaps = differing(self.manifest.get("config", {}), config.fixed())
        except RecursionError as problem:  # a setting that is a list in a list in a list ...
            raise _broken(self.folder, problem) from None
        if gaps:
            told = _short("; ".join(gaps), 1000)
            raise PhmdiffError("CHECKPOINT_DIFFERS", f"was made with other settings: {told}",
                               "give the same settings, or start a new run", exit_code=CHECKPOINT,
                               file=self.folder)  # fmt: skip
        # Of the average too: copying it into place would stretch a single number over a whole matrix.
        if any(self.manifest["tensors"].get(group) != shapes_of(state) for group in ("model", "ema")):
            raise PhmdiffError("CHECKPOINT_DIFFERS", "has weights of other names or shapes than this version's model",
                               "use the version that wrote it", exit_code=CHECKPOINT, file=self.folder)  # fmt: skip
        if "seconds" not in self.manifest:
            raise _broken(self.folder / "manifest.json", KeyError("seconds"))


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, list]:
    """name -> [type, size, size ...]."""
    return {name: [str(value.dtype).removeprefix("torch."), *value.shape] for name, value in tensors.items()}


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: ``<state>/<parameter>``."""
    names = {p: name for name, p in model.named_parameters()}
    return {
        f"{key}/{names[p]}": torch.as_tensor(value).detach()
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put ``optimizer_tensors`` back, and nothing else.

    Raises CHECKPOINT_DIFFERS (exit 4) unless each parameter has AdamW's whole state, or none, in its own shape: the
    fused step looks at no shapes, it would read and write behind the end of what is too short.
    """
    parameters = dict(model.named_parameters())
    states: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        key, _, parameter = name.partition("/")
        states.setdefault(parameter, {})[key] = value
    for name, state in states.items():
        like, step = parameters.get(name), torch.zeros((), dtype=torch.float32)
        if like is None or shapes_of(state) != shapes_of({"step": step, "exp_avg": like, "exp_avg_sq": like}):
            raise PhmdiffError("CHECKPOINT_DIFFERS", f"has a state of the optimizer that does not fit {_short(name)!r}",
                               "use the version that wrote it", exit_code=CHECKPOINT)  # fmt: skip
    optimizer.state.clear()
    for name, state in states.items():
        optimizer.state[parameters[name]].update(state)


class Cancelled(Exception):
    """The writing was called off; nothing half-written is left."""


Groups = dict[str, dict[str, Tensor]]


def share(groups: Groups, rank: int, world: int) -> Groups:
    """What process ``rank`` of ``world`` writes of ``groups`` (file stem -> tensors): as many bytes as any other."""
    load = [0] * world
    mine: Groups = {group: {} for group in groups}
    each = [(value.nbytes, group, name) for group, tensors in groups.items() for name, value in tensors.items()]
    for size, group, name in sorted(each, key=lambda item: (-item[0], item[1:])):
        lightest = load.index(min(load))
        load[lightest] += size
        if lightest == rank:
            mine[group][name] = groups[group][name]
    return mine


def save(
    folder: Path, step: int, groups: Groups, facts: dict[str, Any], *, keep: int,
    rank: int = 0, world: int = 1, token: str = "", timeout: float = 300.0,
    cancelled: Callable[[], bool] = lambda: False,
) -> Path:  # fmt: skip
    """Write ``folder/step-<step>`` and remove all but the newest ``keep``, never the last two that verify.

    groups : file stem -> tensors on the CPU, of this process' ``share`` (some group must have one on each)
    facts : JSON values kept in the manifest
    rank, world, token : which of how many processes this is, and a word of their own; each calls this.
        Process 0 waits for what the others have written, writes the manifest and gives the folder its name.
    cancelled : asked between chunks; if it says yes, Cancelled is raised and nothing is left

    Returns the checkpoint's folder (an existing one of that step is left as it is). Raises
    PhmdiffError (exit 74) when the disk refuses, with nothing half-written left.
    """
    final = folder / f"step-{step:08d}"
    if final.exists():
        return final
    temporary = folder / f"{TEMPORARY}{final.name}-{token or os.getpid()}"
    needed = sum(value.nbytes for tensors in groups.values() for value in tensors.values())
    try:
        temporary.mkdir(parents=True, exist_ok=world > 1)
        names = {group: _file_name(group, rank, world) for group in groups}
        part = {
            "files": {names[group]: _write_tensors(temporary / names[group], tensors, cancelled)
                      for group, tensors in groups.items()},
            "tensors": {group: shapes_of(tensors) for group, tensors in groups.items()},
        }  # fmt: skip
        if rank:
            _write_synced(temporary / f"part-{rank}.json.new", json.dumps(part))
            os.rename(temporary / f"part-{rank}.json.new", temporary / f"part-{rank}.json")
            return final
        parts = [part, *(_part_of(temporary, other, timeout, cancelled) for other in range(1, world))]
        manifest = {"format": FORMAT, "step": step, "world": world, **facts}
        manifest["files"] = {name: digest for each in parts for name, digest in each["files"].items()}
        manifest["tensors"] = {group: {k: v for each in parts for k, v in each["tensors"][group].items()}
                               for group in groups}  # fmt: skip
        _write_synced(temporary / "manifest.json", json.dumps({"sha256": _own_sha256(manifest), **manifest}, indent=1))
        _sync(temporary)
        temporary.rename(final)
        _sync(folder)
    except OSError as problem:
        room = ""
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            room = f"; {shutil.disk_usage(folder).free} bytes free, {needed} needed"
        raise PhmdiffError("CHECKPOINT_WRITE", f"cannot be written ({problem.strerror or problem}{room})",
                           "free some space or choose another --out", exit_code=IO, file=final) from None  # fmt: skip
    finally:
        if not rank:  # the others' files go with it; once it has its name there is nothing to remove
            shutil.rmtree(temporary, ignore_errors=True)
    prune(folder, keep)
    return final


def _file_name(group: str, rank: int, world: int) -> str:
    return f"{group}.safetensors" if world == 1 else f"{group}.{rank}-of-{world}.safetensors"


def _part_of(temporary: Path, rank: int, timeout: float, cancelled) -> dict:
    """What process ``rank`` has written, once it has; its part of the manifest."""
    path = temporary / f"part-{rank}.json"
    until = time.monotonic() + timeout
    while not path.exists():
        if cancelled():
            raise Cancelled
        if time.monotonic() > until:
            raise TimeoutError(errno.ETIMEDOUT, f"process {rank} has not written its share within {timeout:.0f} s")
        time.sleep(0.01)
    part = json.loads(path.read_text())
    path.unlink()
    return part


def _write_tensors(path: Path, tensors: dict[str, Tensor], cancelled) -> str:
    """Write a safetensors file, synced; its SHA-256. Hashed on the way: a file is not read again to be hashed."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so every tensor is aligned
    header, end = {}, 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape),
                        "data_offsets": [begin, end]}  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    total = hashlib.sha256()
    with open(path, "xb") as file:

        def put(data) -> None:
            if cancelled():
                raise Cancelled
            total.update(data)
            file.write(data)

        put(len(text).to_bytes(8, "little") + text)
        for name in order:
            data = memoryview(tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy())
            for begin in range(0, len(data), CHUNK):
                put(data[begin : begin + CHUNK])
        file.flush()
        os.fsync(file.fileno())
    return total.hexdigest()


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def found(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    if not folder.is_dir():
        return []
    steps = {path: int(match[1]) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))}
    return sorted(steps, key=steps.get, reverse=True)


def verify(folder: Path) -> Checkpoint:
    """The checkpoint in ``folder`` if every file has its hash; else PhmdiffError (exit 4) naming file and hash.

    UNSAFE_FORMAT: it is something that would have to be unpickled, which is not even opened.
    CHECKPOINT_NEWER: a later version wrote it. CHECKPOINT_HASH: it is damaged. CHECKPOINT_BROKEN: it is none, or one
    that does harm. A hash is no signature: whoever wants to can state the right ones, so nothing is used unseen.
    """
    path = folder / "manifest.json"  # what is looked at
    _refuse_pickles(folder)
    try:
        _refuse_irregular(path)
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"a manifest of more than {MOST_BYTES >> 20} MiB")
        manifest = _parsed(path.read_bytes())
        own, number = manifest.pop("sha256", None), manifest["format"]
        if type(number) is not int or number < 1:
            raise ValueError("another format")
        if number > FORMAT:
            needed = _short(manifest.get("version", "?"), 40)
            raise PhmdiffError("CHECKPOINT_NEWER", f"has format {_short(number, 40)}, this version reads {FORMAT}",
                               f"it needs phmdiff-fast >= {needed!r}", exit_code=CHECKPOINT, file=path)  # fmt: skip
        if (own is not None or number > 1) and own != _own_sha256(manifest):
            raise PhmdiffError("CHECKPOINT_HASH", "is damaged: its content does not have the SHA-256 it states",
                               "use an older checkpoint", exit_code=CHECKPOINT, file=path)  # fmt: skip
        _check_manifest(manifest, folder)
        shapes: dict[str, dict[str, list]] = {}
        for name, digest in manifest["files"].items():
            path = folder / name
            header, group = _header(path), shapes.setdefault(_FILE.fullmatch(name)[1], {})
            if header.keys() & group.keys():
                raise ValueError("a tensor that another shard holds")
            group.update(header)
            if (now := _sha256(path)) != digest:
                what = f"is damaged: its SHA-256 is {now[:16]}..., its manifest says {_short(digest, 16)!r}"
                raise PhmdiffError("CHECKPOINT_HASH", what, "use an older checkpoint", exit_code=CHECKPOINT,
                                   file=path)  # fmt: skip
        path = folder / "manifest.json"
        if (number > 1 or "tensors" in manifest) and manifest["tensors"] != shapes:
            raise ValueError("'tensors' are not those of the files")
        return Checkpoint(folder, manifest["step"], {**manifest, "tensors": shapes})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise _broken(path, problem) from None


def _check_manifest(manifest: dict, folder: Path) -> None:
    """Raise ValueError unless all that is used of it is of the type and in the range that it is used as, and its
    files are those that ``save`` writes; UNSAFE_FORMAT if one would have to be unpickled."""
    step, world, files = manifest["step"], manifest.get("world", 1), manifest["files"]
    spikes, seconds = manifest.get("spikes", {}), manifest.get("seconds", 0.0)
    right = {
        "step": type(step) is int and 0 <= step < 10**18,
        "world": type(world) is int and 0 < world < 10**5,
        "seconds": type(seconds) in (int, float) and 0 <= seconds < 2**63,
        **{key: type(manifest.get(key, {})) is dict for key in ("files", "tensors", "config", "spikes")},
    }
    if right["spikes"]:
        right["spikes"] = _list_of(float, spikes.get("losses", [])) and _list_of(int, spikes.get("left_out", []))
        right["spikes"] &= type(spikes.get("rollbacks", 0)) is int and type(spikes.get("stage")) in (str, type(None))
    for key, is_right in right.items():
        if not is_right:
            raise ValueError(f"{key!r} has a value that it cannot have")
    if (match := _NAME.fullmatch(folder.name)) and int(match[1]) != step:
        raise ValueError(f"it is of step {step}")
    for name in files:
        if not _FILE.fullmatch(name):
            raise _unsafe(folder, name) if name.endswith(PICKLES) else ValueError(f"file name {name!r}")
    groups = {_FILE.fullmatch(name)[1] for name in files}
    if len(files) != len(groups) * world or set(files) != {
        _file_name(group, rank, world) for group in groups for rank in range(world)
    }:
        raise ValueError(f"its files are not {world} of each group")


def _list_of(kind: type, value) -> bool:
    return type(value) is list and all(type(each) is kind for each in value)


def _parsed(raw: bytes) -> dict:
    """The table of a manifest or a header. Raises ValueError if it is none, or would fill the memory."""
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > MOST_VALUES:
        raise ValueError(f"a header or manifest of more than {MOST_VALUES} values, as {MOST_TENSORS} tensors have")
    made = json.loads(raw.decode("ascii"))
    if type(made) is not dict:
        raise ValueError("no table")
    return made


def _own_sha256(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _short(said, most: int = 200) -> str:
    """Text of a file as part of a line: printable ASCII, and an end."""
    text = str(said)
    cut = text if len(text) <= most else text[:most] + "..."
    return re.sub(r"[^\x20-\x7e]", lambda found: ascii(found[0])[1:-1], cut)


def _broken(path: Path, problem) -> PhmdiffError:
    said = f"lacks {problem}" if isinstance(problem, KeyError) else getattr(problem, "strerror", None) or problem
    return PhmdiffError("CHECKPOINT_BROKEN", f"is not readable ({_short(said)})", "use an older checkpoint",
                        exit_code=CHECKPOINT, file=path)  # fmt: skip


def _refuse_pickles(path: Path) -> None:
    """Raise UNSAFE_FORMAT for a file given as a checkpoint, or torch.distributed's folder: both are pickles."""
    if path.is_file() or (path / ".metadata").exists():
        raise _unsafe(path)


def _unsafe(path: Path, name: str = "") -> PhmdiffError:
    what = f"lists {_short(name)!r}, which is" if name else "is"
    return PhmdiffError("UNSAFE_FORMAT", f"{what} no checkpoint of phmdiff-fast; other formats can run code when read",
                        "give a folder step-N, with safetensors and a manifest", exit_code=CHECKPOINT,
                        file=path)  # fmt: skip


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            total.update(chunk)
    return total.hexdigest()


def _refuse_irregular(path: Path) -> None:
    """Raise ValueError for a link, which may lead anywhere, a pipe, which would be waited for, and a device."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError("no regular file")


def _header(path: Path) -> dict[str, list]:
    """A safetensors file's tensors as ``shapes_of``. Raises ValueError unless the header is one that ``_write_tensors``
    could have written: types it knows, bytes that follow each other, and no others."""
    _refuse_irregular(path)
    with open(path, "rb") as file:
        length, room = int.from_bytes(file.read(8), "little"), path.stat().st_size - 8
        if length > min(MOST_BYTES, room):
            raise ValueError(f"a header of {length} bytes")
        header = _parsed(file.read(length))
    header.pop("__metadata__", None)
    shapes, end = {}, 0
    for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape, span = about["shape"], about["data_offsets"]
        kind, size = _KNOWN[about["dtype"]]
        right = _list_of(int, shape) and len(shape) <= MOST_SIZES and all(0 <= each < 2**63 for each in shape)
        if not right or not _list_of(int, span) or span != [end, end + size * math.prod(shape)]:
            raise ValueError(f"a header in which {_short(repr(name), 100)} does not fit")
        shapes[name], end = [kind, *shape], span[1]
    if end != room - length:
        raise ValueError(f"a header of {end} bytes of tensors, there are {room - length}")
    return shapes


def newest(folder: Path, *, warn=None) -> Checkpoint | None:
    """The newest checkpoint that verifies; damaged ones are told to ``warn(line)`` and passed over."""
    for candidate in found(folder):
        try:
            return verify(candidate)
        except PhmdiffError as problem:
            if warn is not None:
                warn(problem.line())
    return None


def named(folder: Path, which) -> Checkpoint:
    """The checkpoint ``which`` names: a step of ``folder``, the name of one in it, or a path.

    Raises what ``verify`` raises, and NO_CHECKPOINT (exit 4) if there is none.
    """
    text = str(which)
    inside = folder / (f"step-{int(text):08d}" if text.isdecimal() and len(text) <= 18 else text)
    path = inside if inside.exists() else Path(which)
    if not path.exists():
        there = ", ".join(p.name for p in found(folder)) or "none"
        raise PhmdiffError("NO_CHECKPOINT", f"there is no checkpoint {text!r}", f"there are: {there}",
                           exit_code=CHECKPOINT, file=folder)  # fmt: skip
    return verify(path)


def set_aside(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints after ``step`` to ``aside-N``, so that a run can go on from that step; the new names."""
    moved = []
    for path in found(folder):
        if int(_NAME.fullmatch(path.name)[1]) > step:
            names = (path.with_name(f"aside-{path.name}" + f"-{again}" * (again > 1)) for again in range(1, 10_000))
            moved.append(path.rename(next(name for name in names if not name.exists())))
    return moved


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half-written. Only for who holds the run's lock."""
    for path in folder.glob(f"{TEMPORARY}*") if folder.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path, keep: int) -> None:
    """Remove what is older than the newest ``keep``, once two of those that stay verify."""
    verified = 0
    for number, path in enumerate(found(folder)):
        if number >= keep and verified >= VERIFIED:
            # Renamed first: a removal that is cut short must not leave a folder that looks like a checkpoint.
            going = folder / f"{TEMPORARY}{path.name}-going"
            with contextlib.suppress(OSError):  # the new one is whole: what cannot be removed stays until next time
                path.rename(going)
                shutil.rmtree(going)
        elif verified < VERIFIED:
            verified += _verifies(path)


def _verifies(folder: Path) -> bool:
    try:
        verify(folder)
    except PhmdiffError:
        return False
    return True
