"""Checkpoints: a folder a step, safetensors and a manifest, written whole or not at all.

    step-00000500/  model.safetensors      the weights
                    ema.safetensors        their average, what sampling uses
                    optimizer.safetensors  AdamW's two moments and step counts
                    manifest.json          step, seconds trained, sha256 of every file

A checkpoint is written to a temporary folder, synced and renamed; an existing one is never
overwritten. Nothing here unpickles.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import CHECKPOINT, IO, PhmdiffError

FORMAT = 1
MOST_BYTES, MOST_TENSORS = 16 << 20, 100_000  # of a manifest or a header; ours have kilobytes and hundreds
VERIFIED = 2  # checkpoints that verify and are never removed
_NAME = re.compile(r"step-(\d{8})$")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}\.safetensors")


@dataclass
class Checkpoint:
    """A verified checkpoint: its folder, step and manifest."""

    folder: Path
    step: int
    manifest: dict[str, Any] = field(repr=False)

    def tensors(self, name: str, device="cpu") -> dict[str, Tensor]:
        """The tensors of ``<name>.safetensors``."""
        return load_file(self.folder / f"{name}.safetensors", device=str(device))


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            total.update(chunk)
    return total.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: ``<state>/<parameter>``."""
    names = {p: name for name, p in model.named_parameters()}
    return {
        f"{key}/{names[p]}": torch.as_tensor(value).detach()
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put ``optimizer_tensors`` back."""
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        key, _, parameter = name.partition("/")
        optimizer.state[parameters[parameter]][key] = value


def save(folder: Path, step: int, groups: dict[str, dict[str, Tensor]], facts: dict[str, Any], *, keep: int) -> Path:
    """Write ``folder/step-<step>`` and remove all but the newest ``keep``, never the last two that verify.

    groups : file stem -> tensors; facts : JSON values kept in the manifest.
    Returns the checkpoint's folder (an existing one of that step is left as it is). Raises
    PhmdiffError (exit 74) when the disk refuses, with nothing half-written left.
    """
    final = folder / f"step-{step:08d}"
    if final.exists():
        return final
    temporary = folder / f".tmp-{final.name}-{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        files = {}
        for name, tensors in groups.items():
            path = temporary / f"{name}.safetensors"
            save_file({key: value.contiguous() for key, value in tensors.items()}, path)
            _sync(path)
            files[path.name] = _sha256(path)
        manifest = {"format": FORMAT, "step": step, **facts, "files": files}
        path = temporary / "manifest.json"
        path.write_text(json.dumps(manifest, indent=1))
        _sync(path)
        _sync(temporary)
        temporary.rename(final)
        _sync(folder)
    except OSError as problem:
        raise PhmdiffError("CHECKPOINT_WRITE", f"cannot be written ({problem.strerror or problem})",
                           "free some space or choose another --out", exit_code=IO, file=final) from None  # fmt: skip
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _prune(folder, keep)
    return final


def _prune(folder: Path, keep: int) -> None:
    """Remove what is older than the newest ``keep``, once two of those that stay verify."""
    names = found(folder)
    verified = 0
    for number, path in enumerate(names):
        if number >= keep and verified >= VERIFIED:
            # Renamed first: a removal that is cut short must not leave a folder that looks like a checkpoint.
            going = folder / f".tmp-{path.name}-going"
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


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half-written. Only for who holds the run's lock."""
    for path in folder.glob(".tmp-*") if folder.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)


def found(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.match(p.name)), reverse=True)


def verify(folder: Path) -> Checkpoint:
    """The checkpoint in ``folder`` if every file has its hash; else PhmdiffError (exit 4)."""
    path = folder / "manifest.json"
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"a manifest of more than {MOST_BYTES >> 20} MiB")
        manifest = json.loads(path.read_text())
        files = manifest["files"]
        if manifest["format"] > FORMAT:
            raise PhmdiffError("CHECKPOINT_NEWER", f"has format {manifest['format']}, this version reads {FORMAT}",
                               "update phmdiff-fast", exit_code=CHECKPOINT, file=folder)  # fmt: skip
        for name, digest in files.items():
            if not _FILE.fullmatch(name):
                raise ValueError(f"file name {name!r}")
            _check_header(folder / name)
            if _sha256(folder / name) != digest:
                raise PhmdiffError("CHECKPOINT_HASH", "differs from the hash in its manifest",
                                   "it is damaged: use an older checkpoint", exit_code=CHECKPOINT,
                                   file=folder / name)  # fmt: skip
        return Checkpoint(folder, int(manifest["step"]), manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise PhmdiffError("CHECKPOINT_BROKEN", f"is not readable ({problem})", "use an older checkpoint",
                           exit_code=CHECKPOINT, file=folder) from None  # fmt: skip


def _check_header(path: Path) -> None:
    """Raise ValueError where a safetensors header claims more than ours ever have: it is parsed whole, in memory."""
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
