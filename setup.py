"""Packaging, and the build of the C++/CUDA extension (csrc/) into phmdiff_fast/_C.so.

The one packaging variant that works in every install mode: ``kernels/`` lies at the top level for
people, but is the package ``phmdiff_fast.kernels``; it has no __init__.py, because a top-level package
of that name would shadow another well-known one.

The extension is a plain library over libtorch's stable ABI (torch >= 2.10), brought in by
``torch.ops.load_library``: no header of Python is needed, and one build serves every Python and torch.
It needs a C++17 compiler; its CUDA kernels are added where nvcc and a CUDA build of torch are found.
Without a compiler the package installs all the same, and runs its slower reference functions.

    PHMDIFF_EXTENSION=0     do not build it            =1  fail where it cannot be built
    PHMDIFF_CUDA=0          no CUDA kernels            =1  with them, whatever torch says (nvcc is needed)
    PHMDIFF_CUDA_ARCHS      architectures, "80;90;100" unless told
    PHMDIFF_ISAS=generic    the CPU kernels for that instruction set alone (quick builds)
    PHMDIFF_SANITIZE=1      under AddressSanitizer and UBSan (make sanitize)
    CXX, CXXFLAGS, CUDA_HOME are heeded.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
# No product may be contracted with a sum: then every instruction set and device gives the same bits.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
         "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]  # fmt: skip
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mf16c"]
ISAS = {"generic": [], "avx2": ["-mavx2", "-mf16c"], "avx512": AVX512}
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # 2.10, the oldest torch it must load beside


class CannotBuild(Exception):
    """Why there will be no extension, for people."""


def fingerprint(cuda: bool) -> str:
    """Of the sources; the package compares it with the one built in."""
    spec = spec_from_file_location("_extension", ROOT / "kernels" / "_extension.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fingerprint(CSRC, cuda)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")
    return found or shutil.which("/usr/local/cuda/bin/nvcc")


def find_torch() -> tuple[Path, bool]:
    """(folder of torch, whether it is a CUDA build).

    Looked for on disk, not imported: that takes seconds, and pip's isolated build hides what is installed.
    """
    spec, paths = find_spec("torch"), sysconfig.get_paths()
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    folders += [Path(paths[name]) / "torch" for name in ("purelib", "platlib")]
    folder = next((f for f in folders if (f / "lib").is_dir()), None)
    if folder is None:
        raise CannotBuild("torch is not installed where this is built: install it first, and use --no-build-isolation")
    if not (folder / "include/torch/csrc/stable/library.h").is_file():
        raise CannotBuild("this torch has no stable C++ interface; torch 2.10 or newer is needed")
    return folder, any((folder / "lib").glob("*torch_cuda.*"))


class Build(build_ext):
    """Compiles csrc/ with the plain commands below, as many at a time as there are cores."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext):
        must = os.environ.get("PHMDIFF_EXTENSION") == "1"
        try:
            self._build(Path(self.get_ext_fullpath(ext.name)))
        except CannotBuild as problem:
            if must:
                raise SystemExit(f"phmdiff-fast: the C++ extension cannot be built: {problem}") from problem
            print(f"\n{'!' * 78}\nphmdiff-fast: NO C++ EXTENSION: {problem}\n"
                  "Everything works, on the slower reference path (see `phmdiff-fast doctor`).\n" + "!" * 78 + "\n",
                  file=sys.stderr)  # fmt: skip

    def _build(self, target: Path) -> None:
        if os.environ.get("PHMDIFF_EXTENSION") == "0":
            raise CannotBuild("PHMDIFF_EXTENSION=0")
        if sys.platform not in ("linux", "darwin"):
            raise CannotBuild(f"it is built on Linux and macOS only, not on {sys.platform}")
        cxx = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or ""]
        if not shutil.which(cxx[0]):
            raise CannotBuild(f"no C++ compiler ({cxx[0] or 'c++'} is not on the path)")
        torch, torch_has_cuda = find_torch()
        nvcc, asked = find_nvcc(), os.environ.get("PHMDIFF_CUDA")
        cuda = nvcc is not None and asked != "0" and (torch_has_cuda or asked == "1")
        if asked == "1" and not cuda:
            raise CannotBuild("PHMDIFF_CUDA=1, but there is no nvcc (set CUDA_HOME)")

        work = Path(self.build_temp).resolve() / "csrc"
        work.mkdir(parents=True, exist_ok=True)
        commands = self._compile_commands(cxx, torch, nvcc if cuda else None, work)
        with ThreadPoolExecutor(self._jobs()) as pool:
            list(pool.map(lambda item: self._compile(*item), commands.items()))
        if target.is_file() and target.stat().st_mtime > max(out.stat().st_mtime for out in commands):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        # nvcc knows where CUDA's runtime is, which goes in whole: no libcudart is needed where this runs.
        link = [nvcc, "-cudart", "static", "-ccbin", cxx[-1]] if cuda else cxx
        link = [*link, "-shared", *map(str, commands), "-o", str(target), f"-L{torch / 'lib'}", "-ltorch_cpu"]
        self._run(link + self._sanitize())

    def _compile(self, out: Path, command: list[str]) -> None:
        """Run the command unless its result is there, made by the same command from the same text."""
        source = Path(command[command.index("-c") + 1])
        headers = sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cuh"))
        text = b"\0".join([repr(command).encode(), *(p.read_bytes() for p in [source, *headers])])
        key, made = hashlib.sha256(text).hexdigest(), out.with_suffix(".made")
        if not self.force and out.is_file() and made.is_file() and made.read_text() == key:
            return
        self._run(command)
        made.write_text(key)

    def _compile_commands(self, cxx: list[str], torch: Path, nvcc: str | None, work: Path) -> dict[Path, list[str]]:
        """The command of each object file."""
        isas = ISAS if platform.machine() in ("x86_64", "AMD64") else {"generic": []}
        if os.environ.get("PHMDIFF_ISAS") == "generic":
            isas = {"generic": []}
        host = [*cxx, *FLAGS, *shlex.split(os.environ.get("CXXFLAGS", "")), *self._sanitize()]
        facts = [
            f'-DPHM_SOURCES="{fingerprint(nvcc is not None)}"',
            f'-DPHM_CUDA="{self._archs() if nvcc else "none"}"',
        ]
        facts += ["-DPHM_X86"] * ("avx512" in isas) + ["-DPHM_WITH_CUDA"] * bool(nvcc)
        includes = ["-isystem", str(torch / "include")]
        commands = {}
        for isa, options in isas.items():
            wide = ["-mprefer-vector-width=512"] if isa == "avx512" and "clang" not in self._version(cxx) else []
            for source in sorted((CSRC / "cpu").glob("*.cpp")):
                out = work / f"{isa}_{source.stem}.o"
                commands[out] = [*host, f"-DPHM_ISA={isa}", *options, *wide, "-c", str(source), "-o", str(out)]
        for source in sorted(CSRC.glob("*.cpp")):
            out = work / f"{source.stem}.o"
            commands[out] = [*host, "-O2", STABLE_ABI, *facts, *includes, "-c", str(source), "-o", str(out)]
        for source in sorted((CSRC / "cuda").glob("*.cu")) if nvcc else []:
            out = work / f"cuda_{source.stem}.o"
            archs = self._archs().split(";")
            code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
            code.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")  # for what comes later
            host_flags = ",".join(["-fPIC", "-fvisibility=hidden", "-ffp-contract=off"])
            commands[out] = [nvcc, "-std=c++17", "-O3", "--fmad=false", "-Xcompiler", host_flags, *code]
            commands[out] += ["-c", str(source), "-o", str(out)]
        return commands

    @staticmethod
    def _archs() -> str:
        return os.environ.get("PHMDIFF_CUDA_ARCHS", "80;90;100")

    @staticmethod
    def _sanitize() -> list[str]:
        if os.environ.get("PHMDIFF_SANITIZE") != "1":
            return []
        return ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"]

    @staticmethod
    def _version(cxx: list[str]) -> str:
        return subprocess.run([*cxx, "--version"], capture_output=True, text=True).stdout

    def _jobs(self) -> int:
        return self.parallel or int(os.environ.get("MAX_JOBS") or 0) or os.cpu_count() or 1

    @staticmethod
    def _run(command: list[str]) -> None:
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            raise CannotBuild(f"this command failed:\n{shlex.join(command)}\n{(ran.stderr or ran.stdout)[-3000:]}")


class Wheel(bdist_wheel):
    """The library is of the platform, but of no Python in particular."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    packages=["phmdiff_fast", "phmdiff_fast.kernels"],
    package_dir={"phmdiff_fast": "phmdiff_fast", "phmdiff_fast.kernels": "kernels"},
    ext_modules=[Extension("phmdiff_fast._C", sources=[], optional=True)],
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
)
