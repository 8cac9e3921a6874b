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
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .config import Config, differing
from .errors import CHECKPOINT, IO, PhmdiffError

FORMAT = 2  # 1 had no shards, settings or shapes
MOST_BYTES, MOST_TENSORS = 16 << 20, 100_000  # of a manifest or a header; ours have kilobytes and hundreds
VERIFIED = 2  # checkpoints that verify and are never removed
TEMPORARY = ".tmp-"
PICKLES = (".metadata", ".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".npy", ".npz")  # can run code when read
CHUNK = 4 << 20  # bytes hashed and written at a time
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
          torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip
_NAME = re.compile(r"step-(\d{8,18})$")
_FILE = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]{0,63})(?:\.\d{1,5}-of-\d{1,5})?\.safetensors")


@dataclass
class Checkpoint:
    """A verified checkpoint: its folder, step and manifest."""

    folder: Path
    step: int
    manifest: dict[str, Any] = field(repr=False)

    def _files(self, group: str) -> list[str]:
        return [name for name in self.manifest["files"] if _FILE.fullmatch(name)[1] == group]

    def tensors(self, group: str, device="cpu") -> dict[str, Tensor]:
        """The tensors of ``group`` (model, ema, optimizer), of all its shards."""
        return {
            key: value
            for name in self._files(group)
            for key, value in load_file(self.folder / name, device=str(device)).items()
        }

    def digest(self, group: str) -> str:
        """One SHA-256 that names the tensors of ``group``: its file's, or that of its shards' digests."""
        each = [self.manifest["files"][name] for name in self._files(group)]
        return each[0] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest()

    def refuse_other(self, config: Config, state: dict[str, Tensor]) -> None:
        """Raise CHECKPOINT_DIFFERS (exit 4) unless it was made with these settings and shapes of weights."""
        gaps = differing(self.manifest.get("config", {}), config.fixed())
        if gaps:
            raise PhmdiffError("CHECKPOINT_DIFFERS", f"was made with other settings: {'; '.join(gaps)}",
                               "give the same settings, or start a new run", exit_code=CHECKPOINT,
                               file=self.folder)  # fmt: skip
        shapes = self.manifest.get("tensors", {}).get("model")
        if shapes is not None and shapes != shapes_of(state):
            raise PhmdiffError("CHECKPOINT_DIFFERS", "has weights of other names or shapes than this version's model",
                               "use the version that wrote it", exit_code=CHECKPOINT, file=self.folder)  # fmt: skip


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
    """Put ``optimizer_tensors`` back, and nothing else."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for name, value in tensors.items():
        key, _, parameter = name.partition("/")
        optimizer.state[parameters[parameter]][key] = value


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
        ending = "" if world == 1 else f".{rank}-of-{world}"
        part = {
            "files": {
                f"{group}{ending}.safetensors": _write_tensors(
                    temporary / f"{group}{ending}.safetensors", tensors, cancelled
                )
                for group, tensors in groups.items()
            },
            "tensors": {group: shapes_of(tensors) for group, tensors in groups.items()},
        }
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
    steps = {path: int(match[1]) for path in folder.iterdir() if (match := _NAME.match(path.name))}
    return sorted(steps, key=steps.get, reverse=True)


def verify(folder: Path) -> Checkpoint:
    """The checkpoint in ``folder`` if every file has its hash; else PhmdiffError (exit 4) naming file and hash.

    UNSAFE_FORMAT: it is something that would have to be unpickled, which is not even opened.
    CHECKPOINT_NEWER: a later version wrote it. CHECKPOINT_HASH, CHECKPOINT_BROKEN: it is damaged.
    """
    path = folder / "manifest.json"
    _refuse_pickles(folder)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"a manifest of more than {MOST_BYTES >> 20} MiB")
        manifest = json.loads(path.read_text())
        files, own = manifest["files"], manifest.pop("sha256", None)
        if manifest["format"] > FORMAT:
            raise PhmdiffError("CHECKPOINT_NEWER", f"has format {manifest['format']}, this version reads {FORMAT}",
                               f"it needs phmdiff-fast >= {str(manifest.get('version', '?'))[:40]!r}",
                               exit_code=CHECKPOINT, file=folder)  # fmt: skip
        if (own is not None or manifest["format"] > 1) and own != _own_sha256(manifest):
            raise PhmdiffError("CHECKPOINT_HASH", "is damaged: its content does not have the SHA-256 it states",
                               "use an older checkpoint", exit_code=CHECKPOINT, file=path)  # fmt: skip
        for name, digest in files.items():
            if not _FILE.fullmatch(name):
                if name.endswith(PICKLES):
                    raise _unsafe(folder / name)
                raise ValueError(f"file name {name!r}")
            _check_header(folder / name)
            if (now := _sha256(folder / name)) != digest:
                what = f"is damaged: its SHA-256 is {now[:16]}..., its manifest says {str(digest)[:16]!r}..."
                raise PhmdiffError("CHECKPOINT_HASH", what, "use an older checkpoint", exit_code=CHECKPOINT,
                                   file=folder / name)  # fmt: skip
        return Checkpoint(folder, int(manifest["step"]), manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise PhmdiffError("CHECKPOINT_BROKEN", f"is not readable ({_short(problem)})", "use an older checkpoint",
                           exit_code=CHECKPOINT, file=folder) from None  # fmt: skip


def _own_sha256(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _short(problem: Exception) -> str:
    text = str(problem).encode("ascii", "backslashreplace").decode()
    return text if len(text) < 200 else text[:200] + "..."


def _refuse_pickles(path: Path) -> None:
    """Raise UNSAFE_FORMAT for a file given as a checkpoint, or torch.distributed's folder: both are pickles."""
    if path.is_file() or (path / ".metadata").exists():
        raise _unsafe(path)


def _unsafe(path: Path) -> PhmdiffError:
    return PhmdiffError("UNSAFE_FORMAT", "is no checkpoint of phmdiff-fast; other formats can run code when read",
                        "give a folder step-N, with safetensors and a manifest", exit_code=CHECKPOINT,
                        file=path)  # fmt: skip


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            total.update(chunk)
    return total.hexdigest()


def _check_header(path: Path) -> None:
    """Raise ValueError where a safetensors header claims more than ours ever have: it is parsed whole, in memory."""
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path.name} is no regular file")
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > min(MOST_BYTES, path.stat().st_size - 8):
            raise ValueError(f"{path.name}: a header of {size} bytes")
        if file.read(size).count(b'"dtype"') > MOST_TENSORS:
            raise ValueError(f"{path.name}: more than {MOST_TENSORS} tensors")


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
    inside = folder / (f"step-{int(text):08d}" if text.isdecimal() else text)
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
        if int(_NAME.match(path.name)[1]) > step:
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
