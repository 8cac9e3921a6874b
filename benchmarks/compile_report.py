"""Registers, spills and loads of every kernel, with no GPU: ``python -m benchmarks.compile_report``.

The launches of all cases tagged "small" or "compile", forward and backward, are written down instead
of run, turned into signatures by Triton's own specialisation, and compiled for each architecture.
Registers and spills come from ``cuobjdump --dump-resource-usage`` of Triton's package, shared memory
from the compiler, load widths and tensor-core instructions from the PTX.

    widest    bits of the widest load from global memory
    narrow    share of the load instructions that take less than 32 bits
    barriers  where all warps of a program wait for each other; many mean sums that cross the warps

Exit 1 where a kernel spills or does not fit into the shared memory of its architecture. Results are
kept in a cache folder of the user, by Triton's version, the kernel's source and the signature.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

ARCHES = (80, 90, 100)
# Bytes one program may take; CUDA programming guide, technical specifications per compute capability.
SHARED = {80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 103: 227 << 10,
          120: 99 << 10}  # fmt: skip
FORMAT = 3  # of a cached row


@dataclass(frozen=True)
class Job:
    """One kernel at one signature; everything a worker process needs to compile it."""

    module: str
    folder: str  # where a module of the caller's own lies, or empty
    name: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], object]
    attributes: dict
    options: dict

    def key(self, arch: int) -> str:
        import triton

        parts = (FORMAT, triton.__version__, self.kernel().cache_key, self.name, arch, sorted(self.signature.items()),
                 sorted(map(repr, self.constants.items())), sorted(map(repr, self.attributes.items())),
                 sorted(self.options.items()))  # fmt: skip
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def kernel(self):
        if self.folder and self.folder not in sys.path:
            sys.path.insert(0, self.folder)
        return getattr(importlib.import_module(self.module), self.name)


@dataclass
class Row:
    """What one compiled kernel takes."""

    kernel: str
    arch: int
    warps: int
    registers: int
    spill_bytes: int
    shared: int
    widest: int
    narrow: float
    tensor_cores: str
    barriers: int = 0
    case: str = ""
    error: str = ""  # of the compiler

    @property
    def wrong(self) -> str:
        if self.error:
            return f"does not compile: {self.error}"
        if self.spill_bytes:
            return f"spills {self.spill_bytes} bytes a thread"
        limit = SHARED.get(self.arch)
        return f"takes {self.shared} bytes of shared memory of {limit}" if limit and self.shared > limit else ""


def specialised(kernel, args: tuple, meta: dict, arch: int) -> Job:
    """The signature Triton's JIT would compile for this launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", arch, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*args, **meta)
    _, signature, constants, attributes = kernel._pack_args(backend, dict(meta), bound, specialization, options)
    names = [p.name for p in kernel.params]
    chosen = {name: value for name, value in meta.items() if name not in names}
    module = sys.modules[kernel.fn.__module__]
    own = "" if kernel.fn.__module__.startswith(("phmdiff_fast", "benchmarks")) else str(Path(module.__file__).parent)
    return Job(module.__name__, own, kernel.fn.__name__, signature, constants, attributes, chosen)


def launches_of(case) -> list[tuple]:
    """(kernel, args, meta) of every launch of a case's "triton" variant, forward and backward; nothing runs."""
    import torch

    from benchmarks.harness import cotangents, outputs_of, trained
    from phmdiff_fast.kernels import _launch

    seen = []
    inputs = case.make(torch.device("cpu"))
    with _launch.observe(lambda kernel, grid, args, meta: seen.append((kernel, args, meta)), dry=True):
        moving = [t for t in outputs_of(case.variants["triton"](inputs)) if t.requires_grad]
        if moving:
            torch.autograd.grad(moving, list(trained(inputs).values()), cotangents(moving), allow_unused=True)
    return seen


# --- compiling one -----------------------------------------------------------------------------------


def compile_one(job: Job, arch: int) -> Row:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import ASTSource

    source = ASTSource(job.kernel(), job.signature, job.constants, job.attributes)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(job.options))
    except Exception as problem:  # of any kind: the compiler's, LLVM's, ptxas's
        said = " ".join(str(problem).split())[-300:]
        return Row(job.name, arch, job.options.get("num_warps", 4), 0, 0, 0, 0, 0.0, "none", error=said)
    registers, spill = resources(compiled.asm["cubin"])
    widest, narrow, cores = instructions(compiled.asm["ptx"])
    return Row(job.name, arch, compiled.metadata.num_warps, registers, spill, compiled.metadata.shared, widest, narrow,
               cores, compiled.asm["ptx"].count("bar.sync"))  # fmt: skip


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) a thread: spilled registers lie on the stack, which is local memory."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text.stdout)
    if not found:
        raise RuntimeError(f"cuobjdump said nothing of resources: {text.stdout!r}")
    registers, stack, local = map(int, found.groups())
    return registers, max(stack, local)


LOAD = re.compile(r"\bld\.global(?:\.(?!v[248]\b|[bfsu]\d)[\w:]+)*(?:\.v([248]))?\.[bfsu](\d+)")
COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[\w.:]* \[[^\]]+\], \[[^\]]+\], (0x[0-9a-fA-F]+|\d+)")
CORES = (("tcgen05.mma", "tcgen05"), ("wgmma.mma_async", "wgmma"), ("mma.sync", "mma"))


def instructions(ptx: str) -> tuple[int, float, str]:
    """(bits of the widest global load, share of loads below 32 bits, tensor-core instruction or "none")."""
    widths = [int(count or 1) * int(bits) for count, bits in LOAD.findall(ptx)]
    widths += [8 * int(size, 0) for size in COPY.findall(ptx)]
    narrow = sum(width < 32 for width in widths) / len(widths) if widths else 0.0
    cores = next((name for text, name in CORES if text in ptx), "none")
    return max(widths, default=0), narrow, cores


# --- all of them ---------------------------------------------------------------------------------------


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "phmdiff_fast" / "compile_report-2"  # the number: of what a row holds


def report(jobs: list[tuple[Job, int, str]], workers: int, folder: Path) -> list[Row]:
    """A row for each (job, arch, case), from the cache where it is known."""
    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{job.key(arch)}.json" for job, arch, _ in jobs]
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    made = {}
    for i, row in tqdm(
        _compiled(jobs, missing, workers), total=len(missing), desc="compiling", leave=False, disable=None
    ):
        made[i] = row
        if row.error:
            continue
        half = paths[i].with_suffix(f".{os.getpid()}")
        half.write_text(json.dumps(asdict(row)))
        half.replace(paths[i])
    rows = [made.get(i) or Row(**json.loads(path.read_text())) for i, path in enumerate(paths)]
    for row, (_, _, case) in zip(rows, jobs, strict=True):
        row.case = case
    return rows


def _compiled(jobs: list, missing: list[int], workers: int) -> Iterator[tuple[int, Row]]:
    if min(workers, len(missing)) <= 1:
        for i in missing:
            yield i, compile_one(*jobs[i][:2])
        return
    # spawn: a fork of a process that has used torch's threads may hang
    with ProcessPoolExecutor(min(workers, len(missing)), mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(compile_one, *jobs[i][:2]): i for i in missing}
        for done in as_completed(waiting):
            yield waiting[done], done.result()


HEADS = (
    "kernel",
    "case",
    "arch",
    "warps",
    "registers",
    "spill",
    "shared",
    "widest",
    "narrow",
    "tensor cores",
    "barriers",
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default=",".join(map(str, ARCHES)), help="comma-separated, %(default)s")
    parser.add_argument("--op", help="one operation, or the one of bench_<op>.py")
    parser.add_argument("--shape", help="only cases whose shape contains this text")
    parser.add_argument("--smallest", action="store_true", help="only the case of fewest bytes of each operation")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes")
    parser.add_argument("--bench", action="append", default=[], metavar="FILE", help="a file with CASES of your own")
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="%(default)s")
    args = parser.parse_args(argv)
    from benchmarks.harness import load_cases, smallest
    from benchmarks.traffic import print_table

    try:
        found = load_cases(args.op, args.bench)
    except ValueError as problem:
        parser.error(str(problem))
    wanted = [c for c in found if c.tags & {"small", "compile"} and "triton" in c.variants]
    wanted = [c for c in wanted if (args.shape or "") in c.shape]
    if args.smallest:
        wanted = smallest(wanted)
    if not wanted:
        parser.error("no case tagged small or compile with a triton variant is left")
    arches = [int(a) for a in args.arch.split(",")]
    jobs: dict[str, tuple[Job, int, list[str]]] = {}
    for case in wanted:
        for kernel, given, meta in launches_of(case):
            for arch in arches:
                job = specialised(kernel, given, meta, arch)
                jobs.setdefault(job.key(arch), (job, arch, []))[2].append(str(case))
    ordered = sorted(jobs.values(), key=lambda entry: (entry[0].name, entry[2][0], entry[1]))
    named = []
    for job, arch, cases in ordered:
        others = len(set(cases)) - 1
        named.append((job, arch, cases[0] + (f" + {others}" if others else "")))
    rows = report(named, args.jobs, args.cache)
    print_table(HEADS, [
        (r.kernel, r.case, r.arch, r.warps, r.registers, r.spill_bytes, r.shared, r.widest, f"{r.narrow:.0%}",
         r.tensor_cores, r.barriers) for r in rows
    ])  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in rows], indent=1))
    wrong = [r for r in rows if r.wrong]
    for r in wrong:
        print(f"MISS {r.kernel} for sm_{r.arch} ({r.case}): {r.wrong}")
    print(f"{len(rows)} compiled, {len(wrong)} wrong")
    return 1 if wrong else 0


def without_interpreter() -> None:
    """Start again where TRITON_INTERPRET is set: kernels defined under it cannot be compiled."""
    if os.environ.pop("TRITON_INTERPRET", None) is not None:
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.compile_report", *sys.argv[1:]])


if __name__ == "__main__":
    without_interpreter()
    # Launches are written down in this module's one instance, not in __main__'s copy of it.
    from benchmarks.compile_report import main as _main

    sys.exit(_main())
