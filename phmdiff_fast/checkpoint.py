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
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .checkpoint_format import (
    FILE,
    FORMAT,
    MOST_BYTES,
    STEP,
    Cancelled,
    broken,
    check_manifest,
    file_name,
    own_sha256,
    parsed,
    read_header,
    refuse_irregular,
    refuse_pickles,
    shapes_of,
    short,
    write_tensors,
)
from .config import Config, differing
from .errors import CHECKPOINT, IO, PhmdiffError
from .files import sha256_of

VERIFIED = 2  # checkpoints that verify and are never removed
TEMPORARY = ".tmp-"


@dataclass
class Checkpoint:
    """A verified checkpoint: its folder, step and manifest."""

    folder: Path
    step: int
    manifest: dict[str, Any] = field(repr=False)

    def _files(self, group: str) -> list[str]:
        return [name for name in self.manifest["files"] if FILE.fullmatch(name)[1] == group]

    def tensors(self, group: str, device="cpu") -> dict[str, Tensor]:
        """The tensors of ``group`` (model, ema, optimizer), of all its shards.

        Raises CHECKPOINT_BROKEN (exit 4) if there are none, or no longer those that were verified.
        """
        made: dict[str, Tensor] = {}
        for name in self._files(group):
            try:
                made |= load_file(self.folder / name, device=str(device))
            except (SafetensorError, OSError, ValueError, TypeError) as problem:
                raise broken(self.folder / name, problem) from None
        if shapes_of(made) != self.manifest["tensors"].get(group):
            raise broken(self.folder, f"no {group!r}, or another than was verified")
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
            raise broken(self.folder, problem) from None
        if gaps:
            told = short("; ".join(gaps), 1000)
            raise PhmdiffError("CHECKPOINT_DIFFERS", f"was made with other settings: {told}",
                               "give the same settings, or start a new run", exit_code=CHECKPOINT,
                               file=self.folder)  # fmt: skip
        # Of the average too: copying it into place would stretch a single number over a whole matrix.
        if any(self.manifest["tensors"].get(group) != shapes_of(state) for group in ("model", "ema")):
            raise PhmdiffError("CHECKPOINT_DIFFERS", "has weights of other names or shapes than this version's model",
                               "use the version that wrote it", exit_code=CHECKPOINT, file=self.folder)  # fmt: skip
        if "seconds" not in self.manifest:
            raise broken(self.folder / "manifest.json", KeyError("seconds"))


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
            raise PhmdiffError("CHECKPOINT_DIFFERS", f"has a state of the optimizer that does not fit {short(name)!r}",
                               "use the version that wrote it", exit_code=CHECKPOINT)  # fmt: skip
    optimizer.state.clear()
    for name, state in states.items():
        optimizer.state[parameters[name]].update(state)


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
    cancelled: Callable[[], bool] = lambda: False, read_back: set[str] | None = None,
) -> Path:  # fmt: skip
    """Write ``folder/step-<step>`` and remove all but the newest ``keep``, never the last two that verify.

    groups : file stem -> tensors on the CPU, of this process' ``share`` (some group must have one on each)
    facts : JSON values kept in the manifest
    rank, world, token : which of how many processes this is, and a word of their own; each calls this.
        Process 0 waits for what the others have written, writes the manifest and gives the folder its name.
    cancelled : asked between chunks; if it says yes, Cancelled is raised and nothing is left
    read_back : names of checkpoints that this process has found whole, kept from call to call: each is read once

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
        names = {group: file_name(group, rank, world) for group in groups}
        part = {
            "files": {names[group]: write_tensors(temporary / names[group], tensors, cancelled)
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
        _write_synced(temporary / "manifest.json", json.dumps({"sha256": own_sha256(manifest), **manifest}, indent=1))
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
    prune(folder, keep, read_back)
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
    steps = {path: int(match[1]) for path in folder.iterdir() if (match := STEP.fullmatch(path.name))}
    return sorted(steps, key=steps.get, reverse=True)


def verify(folder: Path) -> Checkpoint:
    """The checkpoint in ``folder`` if every file has its hash; else PhmdiffError (exit 4) naming file and hash.

    UNSAFE_FORMAT: it is something that would have to be unpickled, which is not even opened.
    CHECKPOINT_NEWER: a later version wrote it. CHECKPOINT_HASH: it is damaged. CHECKPOINT_BROKEN: it is none, or one
    that does harm. A hash is no signature: whoever wants to can state the right ones, so nothing is used unseen.
    """
    path = folder / "manifest.json"  # what is looked at
    refuse_pickles(folder)
    try:
        refuse_irregular(path)
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"a manifest of more than {MOST_BYTES >> 20} MiB")
        manifest = parsed(path.read_bytes())
        own, number = manifest.pop("sha256", None), manifest["format"]
        if type(number) is not int or number < 1:
            raise ValueError("another format")
        if number > FORMAT:
            needed = short(manifest.get("version", "?"), 40)
            raise PhmdiffError("CHECKPOINT_NEWER", f"has format {short(number, 40)}, this version reads {FORMAT}",
                               f"it needs phmdiff-fast >= {needed!r}", exit_code=CHECKPOINT, file=path)  # fmt: skip
        if (own is not None or number > 1) and own != own_sha256(manifest):
            raise PhmdiffError("CHECKPOINT_HASH", "is damaged: its content does not have the SHA-256 it states",
                               "use an older checkpoint", exit_code=CHECKPOINT, file=path)  # fmt: skip
        check_manifest(manifest, folder)
        shapes: dict[str, dict[str, list]] = {}
        for name, digest in manifest["files"].items():
            path = folder / name
            header, group = read_header(path), shapes.setdefault(FILE.fullmatch(name)[1], {})
            if header.keys() & group.keys():
                raise ValueError("a tensor that another shard holds")
            group.update(header)
            if (now := sha256_of(path)) != digest:
                what = f"is damaged: its SHA-256 is {now[:16]}..., its manifest says {short(digest, 16)!r}"
                raise PhmdiffError("CHECKPOINT_HASH", what, "use an older checkpoint", exit_code=CHECKPOINT,
                                   file=path)  # fmt: skip
        path = folder / "manifest.json"
        if (number > 1 or "tensors" in manifest) and manifest["tensors"] != shapes:
            raise ValueError("'tensors' are not those of the files")
        return Checkpoint(folder, manifest["step"], {**manifest, "tensors": shapes})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise broken(path, problem) from None


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
        if int(STEP.fullmatch(path.name)[1]) > step:
            names = (path.with_name(f"aside-{path.name}" + f"-{again}" * (again > 1)) for again in range(1, 10_000))
            moved.append(path.rename(next(name for name in names if not name.exists())))
    return moved


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half-written. Only for who holds the run's lock."""
    for path in folder.glob(f"{TEMPORARY}*") if folder.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path, keep: int, read_back: set[str] | None = None) -> None:
    """Remove what is older than the newest ``keep``, once two of those that stay verify (or are in ``read_back``)."""
    verified, whole = 0, set() if read_back is None else read_back
    for number, path in enumerate(found(folder)):
        if number >= keep and verified >= VERIFIED:
            # Renamed first: a removal that is cut short must not leave a folder that looks like a checkpoint.
            going = folder / f"{TEMPORARY}{path.name}-going"
            with contextlib.suppress(OSError):  # the new one is whole: what cannot be removed stays until next time
                path.rename(going)
                shutil.rmtree(going)
        elif verified < VERIFIED:
            if path.name not in whole:
                with contextlib.suppress(PhmdiffError):
                    verify(path)
                    whole.add(path.name)
            verified += path.name in whole
