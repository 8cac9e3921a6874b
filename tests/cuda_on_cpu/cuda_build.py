"""The CUDA sources without a GPU: compiled by g++ into a library that runs them, and by nvcc for real.

Both keep what they made in a cache folder of the user, by the text of every source a file may include, so an
unchanged file is compiled once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
CUDA = sorted((CSRC / "cuda").glob("*.cu"))
CPU = [CSRC / "cpu" / source.with_suffix(".cpp").name for source in CUDA]
OWN = sorted(HERE.glob("*.cpp"))
ARCHES = ("80", "90a", "100")

# -fwrapv: an index that overflows is wrong on every machine, not undefined on one. No contraction, as nvcc's
# --fmad=false: the arithmetic has to be the CPU's bit for bit.
HOST = ["g++", "-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-fwrapv", "-Wall",
        "-Wno-unknown-pragmas", "-I.", "-DPHM_ISA=generic", "-x", "c++", "-c"]  # fmt: skip
DEVICE = ["nvcc", "-std=c++17", "-O3", "--fmad=false", "-Werror", "all-warnings", "-Xptxas", "-v"]


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "phmdiff_fast" / "cuda_on_cpu"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


def key(command: list[str], source: Path) -> str:
    headers = [*(CSRC / "common").glob("*.h"), *(CSRC / "cuda").glob("*.*h"), *HERE.glob("*.h"),
               CSRC / "cpu" / "kernels.h", CSRC / "cpu" / "rows.h"]  # fmt: skip
    parts = [
        " ".join(command),
        version(command[0]),
        *(f"{p.name}\n{p.read_text()}" for p in [source, *sorted(headers)]),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def made(command: list[str], target: Path) -> str:
    """What the compiler said while making `target`, which appears only when it is whole."""
    half = target.with_name(f"{os.getpid()}-{target.name}")
    done = subprocess.run([*command, "-o", str(half)], capture_output=True, text=True, cwd=HERE)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{(done.stdout + done.stderr)[:4000]}")
    half.replace(target)
    return done.stdout + done.stderr


def library() -> Path:
    """The CPU kernels and the CUDA ones, emulated, as one library for ctypes."""
    objects = []
    for source in [*CUDA, *CPU, *OWN]:
        target = cache_folder() / f"{source.name}-{key(HOST, source)}.o"
        if not target.exists():
            made([*HOST, str(source)], target)
        objects.append(target)
    name = hashlib.sha256("".join(map(str, objects)).encode()).hexdigest()[:32]
    target = cache_folder() / f"{name}.so"
    if not target.exists():
        made(["g++", "-shared", *map(str, objects)], target)
    return target


FIELDS = ("kernel", "arch", "stack", "stores", "loads", "registers", "shared")
ENTRY = re.compile(
    r"Compiling entry function '(\S+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers(?:.*?(\d+) bytes smem)?[^\n]*\n",
    re.DOTALL,
)


def resources() -> list[dict]:
    """Registers, stack, spills and shared memory of every kernel on every architecture, from nvcc and ptxas."""
    arches = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHES]
    rows = []
    for source in CUDA:
        command = [*DEVICE, *arches, "-c"]
        target = cache_folder() / f"{source.name}-{key(command, source)}.json"
        if not target.exists():
            said = made([*command, str(source)], target.with_suffix(".o"))
            target.with_suffix(".o").unlink()
            found = [dict(zip(FIELDS, entry, strict=True)) for entry in ENTRY.findall(said)]
            target.write_text(json.dumps(found))
        rows += [{"file": source.name, **row} for row in json.loads(target.read_text())]
    return rows


def readable(kernel: str) -> str:
    """resample_kernel<float, true> of a mangled name."""
    name = re.search(r"\d((?:[a-z]+_)+kernel)", kernel)
    rest = kernel.split("_kernel", 1)[1]
    kinds = {"If": "float", "Id": "double", "8bfloat16": "bfloat16", "7float16": "float16"}
    parts = [
        said for sign, said in kinds.items() if re.match(rf"I?(NS_)?(N\w*?)?{sign}" if sign[0] != "I" else sign, rest)
    ]
    parts += [str(bool(int(flag))).lower() for flag in re.findall(r"Lb(\d)E", rest)]
    return f"{name[1] if name else kernel}<{', '.join(filter(None, parts))}>".replace("<>", "")


def table(rows: list[dict]) -> str:
    """A line for each kernel: registers by architecture, shared memory, spilled bytes."""
    lines = [f"{'kernel':<58}" + "".join(f"{'sm_' + arch:>8}" for arch in ARCHES) + f"{'shared':>8}{'spilled':>9}"]
    kernels = {}
    for row in rows:
        kernels.setdefault((row["file"], readable(row["kernel"])), {})[row["arch"]] = row
    for (file, kernel), by in sorted(kernels.items()):
        most = {
            what: max(int(row[what] or 0) for row in by.values()) for what in ("shared", "stores", "loads", "stack")
        }
        registers = "".join(f"{by[arch]['registers'] if arch in by else '-':>8}" for arch in ARCHES)
        spilled = max(most["stores"], most["loads"], most["stack"])
        lines.append(f"{file + ' ' + kernel:<58}{registers}{most['shared']:>8}{spilled:>9}")
    return "\n".join(lines)


def has(compiler: str) -> bool:
    return shutil.which(compiler) is not None


if __name__ == "__main__":  # the table of registers and spills
    print(table(resources()))
