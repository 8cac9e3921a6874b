"""The package installs both ways, from a checkout (editable) and as a wheel through an sdist."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOOK = (
    "import phmdiff_fast, phmdiff_fast.kernels.mmd as m, phmdiff_fast.kernels._philox as p, importlib.metadata as d;"
    "print(phmdiff_fast.__file__, m.__file__, d.version('phmdiff-fast') == phmdiff_fast.__version__)"
)


def run(*command, cwd=ROOT, **more):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=cwd, **more)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def tracked_copy(folder: Path) -> Path:
    """The project's own files, without what was built beside them."""
    for name in ("phmdiff_fast", "kernels", "csrc"):
        for path in (ROOT / name).rglob("*"):
            if path.is_file() and path.suffix in (".py", ".md", ".cpp", ".h", ".cu"):
                target = folder / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A virtual environment that borrows this one's packages but not this project."""
    folder = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    here = next(p for p in sys.path if p.endswith("site-packages"))
    there = next(folder.glob("lib/python*/site-packages"))
    # Without the finder or .pth file that makes this checkout importable from everywhere.
    (there / "borrowed.pth").write_text(f"import sys; sys.path.append({here!r})\n")
    return folder / "bin" / "python"


def test_wheel_through_sdist(tmp_path, environment):
    source = tracked_copy(tmp_path / "src")
    build = "import sys; from setuptools import build_meta as b; print(b.{}(sys.argv[1]))"
    sdist = run(sys.executable, "-c", build.format("build_sdist"), tmp_path, cwd=source).split()[-1]
    with tarfile.open(tmp_path / sdist) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    unpacked = next((tmp_path / "unpacked").iterdir())
    assert (unpacked / "csrc").is_dir()
    quick = os.environ | {"PHMDIFF_ISAS": "generic", "PHMDIFF_CUDA": "0"}
    wheel = run(sys.executable, "-c", build.format("build_wheel"), tmp_path, cwd=unpacked, env=quick).split()[-1]
    with zipfile.ZipFile(tmp_path / wheel) as z:
        names = z.namelist()
    assert {"phmdiff_fast/cli.py", "phmdiff_fast/kernels/mmd.py", "phmdiff_fast/kernels/_philox.py"} <= set(names)
    assert not [n for n in names if n.startswith("kernels/")]
    if shutil.which("c++") and sys.platform == "linux":  # a library of the platform, for any Python
        assert "phmdiff_fast/_C.so" in names
        assert "-py3-none-linux_" in wheel
    target = tmp_path / "installed"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, tmp_path / wheel)
    out = run(environment, "-c", f"import sys; sys.path.insert(0, {str(target)!r}); {LOOK}", cwd=tmp_path).split()
    assert out[0].startswith(str(target))
    assert out[1] == str(target / "phmdiff_fast" / "kernels" / "mmd.py")
    assert out[2] == "True"


def test_editable(tmp_path, environment):
    source = tracked_copy(tmp_path / "src")
    run(sys.executable, "-m", "pip", "--python", environment, "install", "-q", "--no-deps", "--no-build-isolation",
        "--no-index", "-e", source, env=os.environ | {"PHMDIFF_EXTENSION": "0"})  # fmt: skip
    for where in (tmp_path, source):  # the repository's root on sys.path must not change what is found
        out = run(environment, "-c", LOOK, cwd=where).split()
        assert out == [str(source / "phmdiff_fast" / "__init__.py"), str(source / "kernels" / "mmd.py"), "True"]


def test_another_package_named_kernels_is_left_alone(tmp_path):
    other = tmp_path / "site" / "kernels"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("NAME = 'somebody else'\n")
    code = f"import sys; sys.path.append({str(tmp_path / 'site')!r}); import kernels; print(kernels.NAME)"
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == "somebody else"
