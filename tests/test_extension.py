"""The C++ extension as a whole: how it is found, chosen, refused and built; what its library asks of others."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import phmdiff_fast
from phmdiff_fast.kernels import _extension
from phmdiff_fast.kernels._impl import BackendError
from phmdiff_fast.kernels.patch_mask import embed_visible
from phmdiff_fast.pyramid import build_pyramid

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
NAMED = os.environ.get("PHMDIFF_EXTENSION", "")
LIBRARY = Path(NAMED) if os.sep in NAMED else Path(phmdiff_fast.__file__).parent / "_C.so"
COMPILER = shutil.which("c++") or shutil.which("g++")
needs_extension = pytest.mark.skipif(
    bool(_extension.problem()), reason=_extension.problem() or "the extension is there"
)
needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").is_file() or not CSRC.is_dir(), reason="needs the sources")
needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")
@pytest.mark.skipif(os.environ.get("PHMDIFF_EXTENSION") == "0", reason="PHMDIFF_EXTENSION=0")
def test_where_there_is_a_compiler_there_is_the_extension():
    """Else every test of it would be left out without a word."""
    assert _extension.problem() == ""
    assert phmdiff_fast.has_extension()
    facts = _extension.status()[1]
    assert set(facts) == {"cpu", "cuda", "sources"}
    assert facts["cpu"] in ("generic", "avx2", "avx512")


# --- loading -----------------------------------------------------------------------------------

# An editable install would find its own library for a checkout that has none.
SCRIPT = """
import json, sys, warnings
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    import torch
    import phmdiff_fast
    from phmdiff_fast.haar import haar3d, inverse_haar3d
    from phmdiff_fast.kernels import _extension, _philox
    from phmdiff_fast.kernels._impl import BackendError
    from phmdiff_fast.pyramid import build_pyramid, level_error, merge_state, upsample, upsample_add
    y, coarse, v = torch.rand(2, 1, 5, 4), torch.rand(2, 1, 3, 2), torch.rand(2)
    calls = [
        lambda i: build_pyramid(y, 3, impl=i)[2],
        lambda i: merge_state(y, None, coarse, v, rng=(1, 2), sample_ids=torch.arange(2), impl=i),
        lambda i: upsample(coarse, 5, 4, impl=i),
        lambda i: upsample_add(coarse, y, v, impl=i),
        lambda i: level_error(y, coarse, impl=i),
        lambda i: haar3d(y[None], impl=i),
        lambda i: inverse_haar3d(haar3d(y[None], impl=i), shape=(1, 5, 4), impl=i),
    ]
    equal, raised = [], []
    for call in calls:
        for _ in range(2):
            equal.append(torch.equal(call(None), call("reference")))
        try:
            call("extension")
        except BackendError as problem:
            raised.append(str(problem))
    draws = _philox.normals(torch.arange(2), 5, rng=(1, 2), stream=3).tolist()
    draws = draws == _philox.normals_reference(torch.arange(2), 5, rng=(1, 2), stream=3).tolist()
print(json.dumps(dict(problem=_extension.problem(), has=phmdiff_fast.has_extension(), equal=all(equal), draws=draws,
                      raised=raised, told=[str(w.message) for w in told if "phmdiff_fast:" in str(w.message)],
                      file=phmdiff_fast.__file__)))
"""


def package(folder: Path) -> Path:
    """A checkout without a build."""
    for name in ("phmdiff_fast", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "_C*"))
    if CSRC.is_dir():
        shutil.copytree(CSRC, folder / "csrc")
    return folder


def outcome(folder: Path, **env) -> dict:
    env = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", **env}
    ran = subprocess.run([sys.executable, "-c", SCRIPT], cwd=folder, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    said = json.loads(ran.stdout.strip().splitlines()[-1])
    assert Path(said["file"]).resolve().is_relative_to(folder.resolve())
    return said


def switched_off(folder):
    return "PHMDIFF_EXTENSION=0 leaves the extension out"


def missing(folder):
    return "the extension is not built"


def no_library(folder):
    (folder / "phmdiff_fast" / "_C.so").write_bytes(b"\x7fELF, but no more than that")
    return "the extension cannot be loaded"


def other_sources(folder):
    shutil.copy2(LIBRARY, folder / "phmdiff_fast")
    with open(folder / "csrc" / "common" / "merge.h", "a") as file:
        file.write("// changed since\n")
    return "built from other sources than those in csrc/"


def another_library(folder):
    """A real one, but not ours: any that Python or torch brings."""
    found = next(p for p in sorted(Path(torch.__file__).parent.glob("lib/*.so*")) if "c10" in p.name)
    shutil.copy2(found, folder / "phmdiff_fast" / "_C.so")
    return "the extension cannot be loaded"


@needs_extension
@needs_sources
@pytest.mark.parametrize("broken", [switched_off, missing, no_library, other_sources, another_library])
def test_r6_without_a_usable_library_the_reference_runs_and_says_why_once(tmp_path, broken):
    folder = package(tmp_path)
    why = broken(folder)
    said = outcome(folder, PHMDIFF_EXTENSION="0" if broken is switched_off else "")
    assert why in said["problem"]
    assert not said["has"]
    assert said["equal"]
    assert said["draws"]
    assert len(said["told"]) == 1
    assert "slower reference path" in said["told"][0]
    assert said["problem"] in said["told"][0]
    assert len(said["raised"]) == 7
    assert all(said["problem"] in message for message in said["raised"])
    if broken in (no_library, other_sources, another_library):
        assert "rebuild it with `pip install" in said["problem"]


@needs_extension
@needs_sources
def test_a_build_that_lies_elsewhere_can_be_named(tmp_path):
    shutil.copy2(LIBRARY, tmp_path / "sanitized.so")
    said = outcome(package(tmp_path / "checkout"), PHMDIFF_EXTENSION=str(tmp_path / "sanitized.so"))
    assert said["problem"] == ""
    assert said["has"]
    assert not said["raised"]
    assert not said["told"]


def test_the_fingerprint_is_of_names_and_texts_and_of_cuda_only_where_that_is_built(tmp_path):
    def written(files):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return folder

    files = {"a.cpp": "1", "cpu/b.h": "2", "cuda/c.cu": "3", "cuda/d.cuh": "4", "cuda/e.h": "5", "README.md": "6"}
    base = written(files)
    for cuda in (False, True):
        same = _extension.fingerprint(base, cuda)
        assert len(same) == 16
        assert _extension.fingerprint(written(files), cuda) == same
        for name in files:
            counts = name != "README.md" and (cuda or not name.startswith("cuda/"))
            other = _extension.fingerprint(written({**files, name: "other"}), cuda)
            assert (other != same) == counts, (name, cuda)
        renamed = {("z.cpp" if n == "a.cpp" else n): t for n, t in files.items()}
        assert _extension.fingerprint(written(renamed), cuda) != same
    assert _extension.fingerprint(base, True) != _extension.fingerprint(base, False)


# --- choosing ----------------------------------------------------------------------------------


@pytest.fixture
def cpu_only(monkeypatch):
    """As if the extension was there, built without CUDA kernels; nothing was warned of yet."""
    monkeypatch.setattr(_extension, "status", lambda: ("", {"cpu": "generic", "cuda": "none", "sources": ""}))
    monkeypatch.setattr(_extension, "_warned", set())


def test_r6_forced_implementations_that_cannot_run_raise(cpu_only):
    x = {"x": torch.zeros(1)}
    with pytest.raises(ValueError, match="impl='fast' is unknown"):
        _extension.choose("op", "fast", x)
    with pytest.raises(BackendError, match="op: impl='triton' cannot run here: this operation has none"):
        _extension.choose("op", "triton", x)
    with pytest.raises(BackendError, match="on CPU and CUDA tensors, not on meta"):
        _extension.choose("op", "extension", {"x": torch.zeros(1, device="meta")})
    with pytest.raises(BackendError, match="x is int32"):
        _extension.choose("op", "extension", {"x": torch.zeros(1, dtype=torch.int32)})
    with pytest.raises(BackendError, match="cannot run here: too odd"):
        _extension.choose("op", "extension", x, "too odd")
    with pytest.raises(ValueError, match="b is on meta, expected cpu like x"):
        _extension.choose("op", None, {**x, "a": None, "b": torch.zeros(1, device="meta")})


def test_what_runs_where_nothing_is_forced(cpu_only, recwarn):
    x = {"x": torch.zeros(1), "absent": None}
    assert _extension.choose("op", None, x) is True
    assert _extension.choose("op", "extension", x) is True
    assert _extension.choose("op", "reference", x) is False
    assert _extension.choose("op", None, {"x": torch.zeros(1, device="meta")}) is False
    assert not recwarn.list


def test_a_reason_is_told_once_whatever_the_operation(cpu_only):
    with pytest.warns(UserWarning, match="phmdiff_fast: op runs the slower reference path: too odd") as told:
        chosen = [_extension.choose(op, None, {"x": torch.zeros(1)}, "too odd") for op in ("op", "op", "other")]
    assert chosen == [False] * 3
    assert len(told) == 1
    with pytest.warns(UserWarning, match="too long"):
        _extension.choose("op", None, {"x": torch.zeros(1)}, "too long")


def test_cuda_tensors_need_cuda_kernels(cpu_only, monkeypatch):
    gpu = torch.device("cuda", 0)
    assert "built without CUDA kernels" in _extension.problem_on(gpu)
    assert _extension.problem_on(torch.device("cpu")) == _extension.problem_on(None) == ""
    monkeypatch.setattr(_extension, "status", lambda: ("", {"cpu": "generic", "cuda": "80;90", "sources": ""}))
    assert _extension.problem_on(gpu) == ""
    monkeypatch.setattr(_extension, "status", lambda: ("not today", {}))
    assert _extension.problem_on(gpu) == _extension.problem_on(None) == _extension.problem() == "not today"


@needs_extension
def test_types_the_extension_does_not_know_run_the_reference(monkeypatch):
    monkeypatch.setattr(_extension, "_warned", set())
    x = torch.zeros(1, 1, 4, 4).to(torch.float8_e5m2)
    with pytest.warns(UserWarning, match="x is float8_e5m2"):  # noqa: SIM117
        with pytest.raises(NotImplementedError):  # PyTorch cannot either
            build_pyramid(x, 2)
    with pytest.raises(BackendError, match="x is float8_e5m2"):
        build_pyramid(x, 2, impl="extension")


# --- building ----------------------------------------------------------------------------------


def checkout(folder: Path, sources: dict[str, str]) -> Path:
    """With these sources alone."""
    (folder / "phmdiff_fast").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "phmdiff_fast/__init__.py"):
        shutil.copy2(ROOT / name, folder / name)
    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in sources.items():
        (folder / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "csrc" / name).write_text(text)
    return folder


def build(folder: Path, **env) -> subprocess.CompletedProcess:
    clean = {n: v for n, v in os.environ.items() if not n.startswith("PHMDIFF_") and n not in ("CXX", "CXXFLAGS")}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=folder, env={**clean, **env}, capture_output=True, text=True)


@needs_sources
@pytest.mark.parametrize(
    ("env", "why"),
    [({"CXX": "/nonexistent/c++"}, "no C++ compiler (/nonexistent/c++ is not on the path)"),
     ({"PHMDIFF_EXTENSION": "0"}, "PHMDIFF_EXTENSION=0")],
    ids=["no compiler", "switched off"],
)  # fmt: skip
def test_a_build_that_cannot_be_is_loud_but_no_failure(tmp_path, env, why):
    ran = build(checkout(tmp_path / "project", {"a.cpp": ""}), **env)
    assert ran.returncode == 0, ran.stderr
    assert f"NO C++ EXTENSION: {why}" in ran.stderr
    assert "slower reference path" in ran.stderr
    assert not list(tmp_path.rglob("*.so"))


@needs_sources
def test_a_build_that_must_be_fails_without_a_compiler(tmp_path):
    project = checkout(tmp_path / "project", {"a.cpp": ""})
    ran = build(project, CXX="/nonexistent/c++", PHMDIFF_EXTENSION="1")
    assert ran.returncode != 0
    assert "the C++ extension cannot be built: no C++ compiler" in ran.stderr


@needs_sources
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")
@pytest.mark.parametrize("must", [False, True])
def test_a_source_that_does_not_compile_is_shown(tmp_path, must):
    env = {"PHMDIFF_EXTENSION": "1"} if must else {}
    project = checkout(tmp_path / "project", {"broken.cpp": "#error this is broken\n"})
    ran = build(project, PHMDIFF_CUDA="0", **env)
    assert (ran.returncode != 0) == must
    for said in ("this command failed", "broken.cpp", "this is broken"):
        assert said in ran.stderr
    assert ("NO C++ EXTENSION" in ran.stderr) == (not must)
    assert not list(tmp_path.rglob("*.so"))


@needs_sources
@pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs a C++ compiler on Linux")
def test_only_what_changed_is_compiled_again(tmp_path):
    """With a compiler that writes down what it is asked for, and otherwise only copies."""
    log, tool = tmp_path / "log", tmp_path / "tool"
    tool.write_text(
        f'#!/bin/sh\ncase "$*" in *--version*) echo tool; exit;; esac\necho "$@" >> {log}\n'
        'while [ $# -gt 1 ]; do [ "$1" = -o ] && echo made > "$2"; shift; done\n'
    )
    tool.chmod(0o755)
    sources = {"a.cpp": "1\n", "b.cpp": '#include "common/c.h"\n', "cpu/k.cpp": "3\n", "common/c.h": "4\n"}
    env = {"CXX": str(tool), "PHMDIFF_CUDA": "0", "PHMDIFF_ISAS": "generic", "PHMDIFF_EXTENSION": "1"}
    project = checkout(tmp_path / "project", sources)

    def compiled():
        log.unlink(missing_ok=True)
        ran = build(project, **env)
        assert ran.returncode == 0, ran.stderr
        lines = log.read_text().splitlines() if log.exists() else []
        return {Path(line.split("-c ")[1].split()[0]).name if "-c " in line else "link" for line in lines}

    assert compiled() == {"a.cpp", "b.cpp", "k.cpp", "link"}
    assert compiled() == set()
    (project / "csrc" / "common" / "c.h").write_text("changed\n")
    assert compiled() >= {"b.cpp", "link"}
    (project / "csrc" / "cpu" / "k.cpp").write_text("changed\n")
    assert compiled() >= {"k.cpp", "link"}


@needs_extension
@needs_nm
def test_of_torch_the_library_uses_the_stable_c_interface_alone():
    said = subprocess.run(["nm", "-D", "-C", "--undefined-only", LIBRARY], capture_output=True, text=True, check=True)
    names = [line.split(maxsplit=1)[1] for line in said.stdout.splitlines()]
    assert any(n.startswith("aoti_torch_") for n in names)
    ours = ("aoti_torch_", "torch_", "_ITM_", "__gmon_start__", "__cxa_finalize")
    # The rest is of the C and C++ libraries: versioned, or of namespace std or the C++ ABI.
    others = [n for n in names if not n.startswith(ours) and "@" not in n and "std::" not in n]
    assert not [n for n in others if any(word in n for word in ("at::", "c10", "torch::", "caffe2", "Py"))], others
    assert not [n for n in names if "Py" in n and not n.startswith("torch_")]


@needs_sources
@needs_nm
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="one instruction set alone")
def test_kernels_of_one_instruction_set_share_no_code_with_another(tmp_path):
    """The linker keeps one copy of a weak symbol, for every processor: so all must be in the set's own namespace."""
    # The quickest to compile that uses the shared headers, the scratch rows and both conversions.
    objects = sorted(ROOT.glob("build/temp*/csrc/avx*.o"))
    if not objects:
        wide = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
        for isa, options in (("avx2", ["-mavx2", "-mf16c"]), ("avx512", ["-mavx2", "-mf16c", *wide])):
            objects.append(tmp_path / f"{isa}_haar.o")
            subprocess.run([COMPILER, "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", f"-DPHM_ISA={isa}", *options,
                            "-c", CSRC / "cpu" / "haar.cpp", "-o", objects[-1]], check=True)  # fmt: skip
    seen = 0
    for path in objects:
        isa = path.name.split("_")[0]
        said = subprocess.run(["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        for line in said.splitlines():
            kind, name = line.split(maxsplit=2)[1:]
            if kind not in "WVu" or name == "DW.ref.__gxx_personality_v0":
                continue
            seen += 1
            assert f"phmdiff::{isa}::" in name.split("(")[0], f"{path.name}: {name}"
    assert seen


STEP = """
import torch, warnings
warnings.simplefilter("ignore")
from phmdiff_fast.config import build_config
from phmdiff_fast.kernels import _extension
from phmdiff_fast.phmdiff import PHMDiff
torch.manual_seed(0)
config = build_config("xs", {"model": dict(depth=1, width=32, heads=2, decoder_depth=1, decoder_width=16,
                                           decoder_heads=2, patch=4)})
model = PHMDiff(config.model, 1)
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.05)
target = torch.linspace(-1, 1, 2 * 30 * 33).view(2, 1, 30, 33)
found = []
for masked in (True, False):
    terms = model.loss(target, target.cos(), torch.arange(2), (3, 5), config.train, masked=masked)
    terms.total.backward()
    found.append(float(terms.total))
found += [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]
image = model.translate(target.cos(), torch.arange(2), steps=2)[0]
print([bool(_extension.problem()), *found, float(image.mean()), float(image.std())])
"""


@needs_extension
def test_training_and_sampling_give_the_same_with_and_without_it():
    results = []
    for asked in ("0", "1"):
        ran = subprocess.run([sys.executable, "-c", STEP], cwd=ROOT, env=os.environ | {"PHMDIFF_EXTENSION": asked},
                             capture_output=True, text=True)  # fmt: skip
        assert ran.returncode == 0, ran.stderr[-2000:]
        left_out, *numbers = ast.literal_eval(ran.stdout.strip().splitlines()[-1])
        assert left_out == (asked == "0")
        results.append(numbers)
    assert results[0] == pytest.approx(results[1], rel=2e-4, abs=1e-6)
    assert results[0][0] > 0


def test_embed_visible_says_that_it_runs_without_the_extension(monkeypatch):
    monkeypatch.setattr(_extension, "problem_on", lambda device: "there is none")
    monkeypatch.setattr(_extension, "_warned", set())
    image, weight = torch.randn(1, 1, 4, 4), torch.randn(8, 8)
    with pytest.warns(UserWarning, match="embed_visible runs the slower reference path: there is none") as seen:
        embed_visible(image, image, None, torch.ones(1), None, weight, None, None, eps=image)
    assert len(seen) == 1
    with warnings.catch_warnings():  # and is not said again
        warnings.simplefilter("error")
        embed_visible(image, image, None, torch.ones(1), None, weight, None, None, eps=image)
