"""Bytes every operation moves over its floor, counted on a CPU: ``python -m benchmarks.traffic [--op adaln]``.

The kernels run in Triton's interpreter on the cases tagged "small", and every load and store says
which addresses it touched. Counted are the distinct bytes of a launch, loads and stores apart,
summed over launches, and the inputs and outputs of torch operators that run in between: so
workspaces, intermediates and hidden copies count, and a byte read twice within one launch is taken
as cached. The floor is the case's own (each input read once, each output written once).

    re-read   bytes loaded in all over distinct bytes loaded
    sectors   the same ratio with every touched sector of 32 bytes counted whole

Exit 1 where a ratio is over its limit, or where embed_visible touches a dropped patch.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context

if __name__ == "__main__":  # before any kernel is imported
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from benchmarks.case import Case
from benchmarks.harness import cotangents, load_cases, outputs_of, trained

LIMITS = {"adaln_modulate": 1.05, "gated_residual_adaln": 1.05, "restore_tokens": 1.05, "embed_visible": 1.10}
SECTOR = 32  # bytes a GPU fetches at the least
PATCHES = ("y", "eps", "sources")  # inputs of embed_visible that are cut into patches


class OutOfBounds(AssertionError):
    """A kernel touched memory that belongs to none of its tensors."""


@dataclass
class Buffer:
    """What one launch did to one storage: a byte each, by kind of access."""

    base: int
    bytes: int
    touched: dict[str, np.ndarray] = field(default_factory=dict)

    def mark(self, kind: str, offsets: np.ndarray, width: int) -> None:
        flags = self.touched.setdefault(kind, np.zeros(self.bytes, dtype=bool))
        for byte in range(width):
            flags[offsets + byte] = True

    def distinct(self, kind: str) -> int:
        return int(self.touched[kind].sum()) if kind in self.touched else 0

    def sectors(self, kind: str) -> int:
        """Bytes of the sectors touched; they lie on multiples of 32 in memory, not in the buffer."""
        if kind not in self.touched:
            return 0
        front = self.base % SECTOR
        flags = np.pad(self.touched[kind], (front, -(front + self.bytes) % SECTOR))
        return SECTOR * int(flags.reshape(-1, SECTOR).any(1).sum())


@dataclass
class Launch:
    """Bytes of one launch."""

    name: str
    loaded: int
    stored: int
    sectors: int
    loaded_in_all: int


@dataclass
class Moved:
    """What happened while one direction of an operation ran; floor in bytes."""

    floor: int
    launches: list[Launch] = field(default_factory=list)
    torch_ops: list[tuple[str, int]] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    @property
    def between(self) -> int:
        return sum(size for _, size in self.torch_ops)

    @property
    def total(self) -> int:
        return sum(launch.loaded + launch.stored for launch in self.launches) + self.between

    @property
    def ratio(self) -> float:
        return self.total / self.floor

    @property
    def sectors(self) -> float:
        return (sum(launch.sectors for launch in self.launches) + self.between) / self.floor

    @property
    def reread(self) -> float:
        distinct = sum(launch.loaded for launch in self.launches)
        return sum(launch.loaded_in_all for launch in self.launches) / distinct if distinct else 1.0


class Recorder:
    """Observer of launches (``_launch.observe``): runs each one and writes down what it touched."""

    def __init__(self, moved: Moved, forbidden: dict[str, tuple[Tensor, Tensor]] | None = None):
        self.moved, self.forbidden = moved, forbidden or {}
        self.buffers: list[Buffer] = []
        self.bases = np.empty(0, dtype=np.int64)
        self.loaded_in_all = 0

    def __call__(self, kernel, grid, args, meta) -> None:
        storages = {}
        for value in (*args, *meta.values()):
            if isinstance(value, Tensor) and value.numel():
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = Buffer(storage.data_ptr(), storage.nbytes())
        self.buffers = [storages[base] for base in sorted(storages)]
        self.bases = np.array([buffer.base for buffer in self.buffers], dtype=np.int64)
        self.loaded_in_all = 0
        with _disable_current_modes():  # torch operators of the interpreter and of this class do not count
            with watched(self.access), patched_once():
                kernel[grid](*args, **meta)
            dropped = list(self.dropped())
        loaded, stored = (sum(b.distinct(kind) for b in self.buffers) for kind in ("load", "store"))
        sectors = sum(b.sectors(kind) for b in self.buffers for kind in ("load", "store"))
        name = getattr(kernel, "__name__", None) or kernel.fn.__name__
        self.moved.launches.append(Launch(name, loaded, stored, sectors, self.loaded_in_all))
        self.moved.dropped += [f"{name}: {line}" for line in dropped]

    def access(self, kind: str, addresses: np.ndarray, width: int) -> None:
        """addresses : first byte of every element touched; width : bytes of an element."""
        if not addresses.size:
            return
        addresses = addresses.reshape(-1).astype(np.int64)
        if kind == "load":
            self.loaded_in_all += addresses.size * width
        owner = np.searchsorted(self.bases, addresses, side="right") - 1
        for which in np.unique(owner) if owner.min() != owner.max() else owner[:1]:
            offsets = addresses[owner == which] - self.bases[which]
            buffer = self.buffers[which] if which >= 0 else None
            if buffer is None or offsets.max() + width > buffer.bytes:
                raise OutOfBounds(f"a {kind} of {width} bytes lies in no tensor of the launch")
            buffer.mark(kind, offsets, width)

    def dropped(self) -> Iterator[str]:
        """Inputs of which a forbidden byte was read. forbidden : name -> (tensor, bool of its shape)."""
        for name, (tensor, wrong) in self.forbidden.items():
            buffer = next((b for b in self.buffers if b.base == tensor.untyped_storage().data_ptr()), None)
            if buffer is None or "load" not in buffer.touched:
                continue
            width = tensor.element_size()
            elements = torch.from_numpy(buffer.touched["load"].reshape(-1, width).any(1))
            seen = elements.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            if count := int((seen & wrong).sum()):
                yield f"{count} values of dropped patches of {name} read"


@contextlib.contextmanager
def patched_once() -> Iterator[None]:
    """Let the interpreter patch triton.language once a launch, not at each call of a device function.

    The patch is of shared modules, so the later ones change nothing and take half of the time.
    """
    from triton.runtime import interpreter

    original, done = interpreter._patch_lang, set()

    def patch(fn):
        found = {id(v) for v in fn.__globals__.values() if v is interpreter.tl or v is interpreter.tl.core}
        if found <= done:
            return interpreter._LangPatchScope() if hasattr(interpreter, "_LangPatchScope") else None
        done.update(found)
        return original(fn)

    interpreter._patch_lang = patch
    try:
        yield
    finally:
        interpreter._patch_lang = original


@contextlib.contextmanager
def watched(access) -> Iterator[None]:
    """Tell ``access(kind, addresses, width)`` of everything the interpreter loads and stores."""
    from triton.runtime.interpreter import interpreter_builder as builder

    def width_of(ptrs) -> int:
        return max(1, ptrs.get_element_ty().primitive_bitwidth // 8)

    def told(name: str, kinds: tuple[str, ...], mask_at: int | None):
        original = getattr(builder, name)

        def call(*args, **kwargs):
            ptrs = args[0] if name.startswith("create_masked") or mask_at is None else args[1]
            mask = None if mask_at is None else args[mask_at].data
            touched = ptrs.data if mask is None else ptrs.data[np.broadcast_to(mask, ptrs.data.shape).astype(bool)]
            for kind in kinds:
                access(kind, touched, width_of(ptrs))
            return original(*args, **kwargs)

        return call

    # create_load, create_store, tensor and block pointers and descriptors all end in these.
    hooks = {
        "create_masked_load": told("create_masked_load", ("load",), 1),
        "create_masked_store": told("create_masked_store", ("store",), 2),
        "create_atomic_rmw": told("create_atomic_rmw", ("load", "store"), 3),
        "create_atomic_cas": told("create_atomic_cas", ("load", "store"), None),
    }
    for name, hook in hooks.items():
        setattr(builder, name, hook)
    try:
        yield
    finally:
        for name in hooks:
            delattr(builder, name)


class TorchOps(TorchDispatchMode):
    """Counts bytes of torch operators, those inside our custom operators included."""

    ours = "phmdiff_fast"

    def __init__(self, moved: Moved, whole: dict[int, str] | None = None):
        super().__init__()
        self.moved, self.whole = moved, whole or {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == self.ours:  # the body runs under this mode too
            from torch._library.custom_ops import OPDEFS

            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        result = func(*args, **kwargs)
        self.count(func, args, kwargs, result)
        return result

    def count(self, func, args, kwargs, result) -> None:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        name = func._schema.name.removeprefix("aten::")
        storages = {t.untyped_storage().data_ptr() for t in given}
        if "empty" in name or name in ("detach", "alias", "lift_fresh"):
            return
        if not func._schema.is_mutable and made and all(t.untyped_storage().data_ptr() in storages for t in made):
            return  # a view moves nothing
        if name in ("fill_", "zero_") or name.startswith("new_") or name.endswith("_like"):
            given = []  # only its shape is looked at
        elif name == "copy_":
            given = given[1:]
        moved = sum(_bytes(t) for t in (*given, *made))
        if moved:
            self.moved.torch_ops.append((name, moved))
        for t in given:
            if t.numel() > 1 and (what := self.whole.get(t.untyped_storage().data_ptr())):
                self.moved.dropped.append(f"torch.{name} reads {what}")


def _bytes(t: Tensor) -> int:
    """Distinct bytes of a tensor: an expanded dimension holds its values once."""
    held = math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride) if t.numel() else 0
    return held * t.element_size()


def dropped_patches(inputs: dict) -> dict[str, tuple[Tensor, Tensor]]:
    """For embed_visible: name -> (image (B, C, H, W), True where its patch is dropped)."""
    ids, y, sources = inputs.get("keep_ids"), inputs["y"], inputs["sources"]
    if ids is None:
        return {}
    merged = y.shape[1] * (1 + (inputs.get("coarse") is not None)) + sources.shape[1]
    patch = math.isqrt(inputs["weight"].shape[1] // merged)
    batch, _, height, width = sources.shape
    kept = torch.zeros(batch, (height // patch) * (width // patch), dtype=torch.bool)
    kept.scatter_(1, ids.long(), True)
    grid = kept.view(batch, 1, height // patch, width // patch)
    gone = ~grid.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    images = {name: inputs[name] for name in PATCHES if inputs.get(name) is not None and inputs[name].numel()}
    return {name: (image, gone.expand(image.shape)) for name, image in images.items()}


def measure(case: Case, variant: str = "triton") -> dict[str, Moved]:
    """Run a case on the CPU; way -> what it moved. "backward" only where something trains."""
    from phmdiff_fast.kernels import _impl, _launch

    if not _impl.INTERPRET:
        raise RuntimeError("traffic is counted in Triton's interpreter: set TRITON_INTERPRET=1")
    torch.manual_seed(0)
    inputs = case.make(torch.device("cpu"))
    forward, backward = (Moved(floor) for floor in case.floor(inputs))
    forbidden = dropped_patches(inputs) if case.op == "embed_visible" else {}
    whole = {image.untyped_storage().data_ptr(): name for name, (image, gone) in forbidden.items() if gone.any()}
    with _launch.observe(Recorder(forward, forbidden)), TorchOps(forward, whole):
        outputs = outputs_of(case.variants[variant](inputs))
    moving = [t for t in outputs if t.requires_grad]
    if not moving:
        return {"forward": forward}
    incoming = cotangents(moving)
    with _launch.observe(Recorder(backward)), TorchOps(backward):
        torch.autograd.grad(moving, list(trained(inputs).values()), incoming, allow_unused=True)
    return {"forward": forward, "backward": backward}


def misses(case: Case, way: str, moved: Moved, limits: dict[str, float] = LIMITS) -> list[str]:
    """What is wrong with it, a line each."""
    out = [f"{case} {way}: {line}" for line in dict.fromkeys(moved.dropped)]
    limit = limits.get(case.op)
    if limit is not None and moved.ratio > limit:
        parts = [f"{launch.name} {launch.loaded} + {launch.stored}" for launch in moved.launches]
        parts += [f"torch.{name} {size}" for name, size in moved.torch_ops]
        out.append(f"{case} {way}: {moved.ratio:.3f} of the floor, limit {limit} ({'; '.join(parts)})")
    if limit is not None and not moved.launches:
        out.append(f"{case} {way}: no kernel was launched")
    return out


HEADS = ("operation", "shape", "way", "launches", "floor KiB", "moved KiB", "ratio", "limit", "sectors", "re-read",
         "torch KiB")  # fmt: skip


def countable(op: str | None, files: list[str]) -> list[Case]:
    return [c for c in load_cases(op, files) if "small" in c.tags and "triton" in c.variants]


def counted(op: str | None, files: list[str], number: int) -> tuple[list[tuple], list[str]]:
    """(rows of the table, misses) of one case. Cases do not travel between processes, their number does."""
    torch.set_num_threads(1)
    case = countable(op, files)[number]
    rows, wrong = [], []
    for way, moved in measure(case).items():
        rows.append((
            case.op, case.shape, way, len(moved.launches), f"{moved.floor / 1024:.1f}", f"{moved.total / 1024:.1f}",
            f"{moved.ratio:.3f}", LIMITS.get(case.op, "-"), f"{moved.sectors:.3f}", f"{moved.reread:.2f}",
            f"{moved.between / 1024:.1f}",
        ))  # fmt: skip
        wrong += misses(case, way, moved)
    return rows, wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", help="one operation, or the one of bench_<op>.py")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes")
    parser.add_argument("--bench", action="append", default=[], metavar="FILE", help="a file with CASES of your own")
    args = parser.parse_args(argv)
    try:
        number = len(countable(args.op, args.bench))
    except ValueError as problem:
        parser.error(str(problem))
    if not number:
        parser.error(f"no case tagged small with a triton variant for {args.op!r}")
    from tqdm import tqdm

    with contextlib.ExitStack() as stack:
        if args.jobs > 1:
            pool = stack.enter_context(ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")))
            found = pool.map(counted, *zip(*((args.op, args.bench, n) for n in range(number)), strict=True))
        else:
            found = (counted(args.op, args.bench, n) for n in range(number))
        parts = list(tqdm(found, total=number, desc="counting", leave=False, disable=None))
    rows, wrong = ([entry for part in parts for entry in part[i]] for i in range(2))
    print_table(HEADS, rows)
    for line in wrong:
        print(f"MISS {line}")
    print(f"{len(rows)} rows, {len(wrong)} over a limit")
    return 1 if wrong else 0


def print_table(heads, rows) -> None:
    """Columns as wide as what they hold; the first three to the left."""
    text = [[str(cell) for cell in row] for row in [heads, *rows]]
    wide = [max(len(row[i]) for row in text) for i in range(len(heads))]
    for row in text:
        cells = (c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(row, wide, strict=True)))
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    sys.exit(main())
