"""What the files of a checkpoint look like, and everything that is asked of them before they are used.

A hash is no signature: whoever wants to can state the right ones. So nothing of a manifest or a header is used
that is not of the type, range and size that our own have.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from pathlib import Path

import torch
from torch import Tensor

from .errors import CHECKPOINT, PhmdiffError

FORMAT = 2  # 1 had no shards, settings or shapes
MOST_BYTES, MOST_TENSORS = 16 << 20, 100_000  # of a manifest or a header; ours have kilobytes and hundreds
MOST_VALUES = 3 * MOST_TENSORS  # ours have thousands; 16 MiB of "[]," would be 400 MiB of lists
MOST_SIZES = 32  # of a tensor: a million whose product is asked for would take minutes
PICKLES = (".metadata", ".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".npy", ".npz")  # can run code when read
CHUNK = 4 << 20  # bytes hashed and written at a time
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
          torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip
_KNOWN = {name: (str(dtype).removeprefix("torch."), dtype.itemsize) for dtype, name in DTYPES.items()}
STEP = re.compile(r"step-([0-9]{8,18})")
FILE = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]{0,63})(?:\.[0-9]{1,5}-of-[0-9]{1,5})?\.safetensors")


class Cancelled(Exception):
    """The writing was called off; nothing half-written is left."""


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, list]:
    """name -> [type, size, size ...]."""
    return {name: [str(value.dtype).removeprefix("torch."), *value.shape] for name, value in tensors.items()}


def file_name(group: str, rank: int, world: int) -> str:
    return f"{group}.safetensors" if world == 1 else f"{group}.{rank}-of-{world}.safetensors"


def write_tensors(path: Path, tensors: dict[str, Tensor], cancelled) -> str:
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


def check_manifest(manifest: dict, folder: Path) -> None:
    """Raise ValueError unless all that is used of it is of the type and in the range that it is used as, and its
    files are those that ``save`` writes; UNSAFE_FORMAT if one would have to be unpickled."""
    step, world, files = manifest["step"], manifest.get("world", 1), manifest["files"]
    members = manifest.get("members", 1)
    spikes, seconds = manifest.get("spikes", {}), manifest.get("seconds", 0.0)
    right = {
        "step": type(step) is int and 0 <= step < 10**18,
        "world": type(world) is int and 0 < world < 10**5,
        "members": type(members) is int and 0 < members < 10**3,
        "seconds": type(seconds) in (int, float) and 0 <= seconds < 2**63,
        **{key: type(manifest.get(key, {})) is dict for key in ("files", "tensors", "config", "spikes")},
    }
    if right["spikes"]:
        right["spikes"] = _list_of(float, spikes.get("losses", [])) and _list_of(int, spikes.get("left_out", []))
        right["spikes"] &= type(spikes.get("rollbacks", 0)) is int and type(spikes.get("stage")) in (str, type(None))
    for key, is_right in right.items():
        if not is_right:
            raise ValueError(f"{key!r} has a value that it cannot have")
    if (match := STEP.fullmatch(folder.name)) and int(match[1]) != step:
        raise ValueError(f"it is of step {step}")
    for name in files:
        if not FILE.fullmatch(name):
            raise _unsafe(folder, name) if name.endswith(PICKLES) else ValueError(f"file name {name!r}")
    groups = {FILE.fullmatch(name)[1] for name in files}
    if len(files) != len(groups) * world or set(files) != {
        file_name(group, rank, world) for group in groups for rank in range(world)
    }:
        raise ValueError(f"its files are not {world} of each group")


def _list_of(kind: type, value) -> bool:
    return type(value) is list and all(type(each) is kind for each in value)


def parsed(raw: bytes) -> dict:
    """The table of a manifest or a header. Raises ValueError if it is none, or would fill the memory."""
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > MOST_VALUES:
        raise ValueError(f"a header or manifest of more than {MOST_VALUES} values, as {MOST_TENSORS} tensors have")
    made = json.loads(raw.decode("ascii"))
    if type(made) is not dict:
        raise ValueError("no table")
    return made


def own_sha256(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def short(said, most: int = 200) -> str:
    """Text of a file as part of a line: printable ASCII, and an end."""
    text = str(said)
    cut = text if len(text) <= most else text[:most] + "..."
    return re.sub(r"[^\x20-\x7e]", lambda found: ascii(found[0])[1:-1], cut)


def broken(path: Path, problem) -> PhmdiffError:
    said = f"lacks {problem}" if isinstance(problem, KeyError) else getattr(problem, "strerror", None) or problem
    return PhmdiffError("CHECKPOINT_BROKEN", f"is not readable ({short(said)})", "use an older checkpoint",
                        exit_code=CHECKPOINT, file=path)  # fmt: skip


def refuse_pickles(path: Path) -> None:
    """Raise UNSAFE_FORMAT for a file given as a checkpoint, or torch.distributed's folder: both are pickles."""
    if path.is_file() or (path / ".metadata").exists():
        raise _unsafe(path)


def _unsafe(path: Path, name: str = "") -> PhmdiffError:
    what = f"lists {short(name)!r}, which is" if name else "is"
    return PhmdiffError("UNSAFE_FORMAT", f"{what} no checkpoint of phmdiff-fast; other formats can run code when read",
                        "give a folder step-N, with safetensors and a manifest", exit_code=CHECKPOINT,
                        file=path)  # fmt: skip


def refuse_irregular(path: Path) -> None:
    """Raise ValueError for a link, which may lead anywhere, a pipe, which would be waited for, and a device."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError("no regular file")


def read_header(path: Path) -> dict[str, list]:
    """A safetensors file's tensors as ``shapes_of``. Raises ValueError unless the header is one that ``write_tensors``
    could have written: types it knows, bytes that follow each other, and no others."""
    refuse_irregular(path)
    with open(path, "rb") as file:
        length, room = int.from_bytes(file.read(8), "little"), path.stat().st_size - 8
        if length > min(MOST_BYTES, room):
            raise ValueError(f"a header of {length} bytes")
        header = parsed(file.read(length))
    header.pop("__metadata__", None)
    shapes, end = {}, 0
    for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape, span = about["shape"], about["data_offsets"]
        kind, size = _KNOWN[about["dtype"]]
        right = _list_of(int, shape) and len(shape) <= MOST_SIZES and all(0 <= each < 2**63 for each in shape)
        if not right or not _list_of(int, span) or span != [end, end + size * math.prod(shape)]:
            raise ValueError(f"a header in which {short(repr(name), 100)} does not fit")
        shapes[name], end = [kind, *shape], span[1]
    if end != room - length:
        raise ValueError(f"a header of {end} bytes of tensors, there are {room - length}")
    return shapes
