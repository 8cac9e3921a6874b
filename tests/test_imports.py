"""Imports run one way, and the cheap ones stay cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# DESIGN: cli -> train | generate | evaluate | report -> the method -> its parts -> rooms of one idea
# -> kernels and the extension. A module may import from strictly lower ranks only.
RANKS = [
    ["errors"],
    ["config", "progress", "files", "html_page", "distributed", "kernel_caches", "packing", "stages", "convolutions"],
    ["signals", "streaming"],
    ["kernels._impl"],
    ["kernels._extension"],
    ["kernels._philox", "kernels._pyramid_ops", "kernels._adaln_ops", "kernels._short_attention_ops"],
    ["kernels._launch", "kernels._tl"],
    ["kernels._patch_mask_triton", "kernels._adaln_triton", "kernels._mmd_triton", "kernels._short_attention_triton"],
    ["kernels._embed_triton"],
    ["kernels._patch_mask_ops"],
    ["kernels.patch_mask", "kernels.adaln", "kernels.mmd", "kernels.gelu", "kernels.short_attention"],
    ["pyramid", "haar", "attention", "nifti", "grid", "device", "curves"],
    ["masking", "mha", "layouts", "lean_block"],
    ["blocks"],
    ["flops"],
    ["diffusion", "splits", "views", "checkpoint_format"],
    ["data"],
    ["check", "cache", "augment", "guards"],
    ["model", "sampling", "losses", "checkpoint", "ema", "metrics", "pictures", "simulate", "loader"],
    ["conv_denoiser", "engine", "background"],
    ["phmdiff", "baselines", "check_page", "checkpoint_writer", "run_folder", "meters", "trace_tables"],
    ["held_out", "parallel", "profiling"],
    ["step"],
    ["trainer"],
    ["train", "generate", "report"],
    ["evaluate"],
    ["demo", "doctor", "ablate", "distill"],
    ["cli"],
    ["__main__"],
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
FILES = {
    **{p.stem: p for p in (ROOT / "phmdiff_fast").glob("*.py") if p.stem != "__init__"},
    **{f"kernels.{p.stem}": p for p in (ROOT / "kernels").glob("*.py")},
}


def imported(name: str, path: Path) -> set[str]:
    """Modules of this package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("phmdiff_fast.")
                for alias in node.names
                if alias.name.startswith("phmdiff_fast")
            }
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                inside = name.rpartition(".")[0]
                module = f"{inside}.{module}" if inside and module else inside or module
            elif module == "phmdiff_fast" or module.startswith("phmdiff_fast."):
                module = module.removeprefix("phmdiff_fast").removeprefix(".")
            else:
                continue
            whole = [f"{module}.{alias.name}" if module else alias.name for alias in node.names]
            found |= {m for m in whole if m in FILES} or ({module} & set(FILES))
    return found


def test_every_module_has_a_rank():
    assert set(FILES) == set(RANK)


@pytest.mark.parametrize("name", FILES)
def test_imports_run_one_way(name):
    wrong = [other for other in imported(name, FILES[name]) if RANK[other] >= RANK[name]]
    assert not wrong, f"{name} imports {wrong}"


def test_the_reader_of_imports_sees_every_form(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "from . import train, __version__\nfrom .config import Config\nimport phmdiff_fast.model\n"
        "def f():\n    from phmdiff_fast.kernels.mmd import mmd2\n    from .kernels import _philox\n"
    )
    assert imported("cli", path) == {"train", "config", "model", "kernels.mmd", "kernels._philox"}
    path.write_text("from ._impl import choose\nfrom . import _philox\n")
    assert imported("kernels.mmd", path) == {"kernels._impl", "kernels._philox"}


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith("kernels.")])
def test_kernels_stand_alone(name):
    assert all(other.startswith("kernels._") for other in imported(name, FILES[name]))


def test_kernels_have_no_init():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout


@pytest.mark.parametrize("module", ["phmdiff_fast", "phmdiff_fast.cli", "phmdiff_fast.nifti", "phmdiff_fast.data",
                                    "phmdiff_fast.cache", "phmdiff_fast.grid"])  # fmt: skip
def test_no_torch_where_none_is_needed(module):
    assert run(f"import sys, {module}; print('torch' in sys.modules)").strip() == "False"


def test_importing_everything_brings_no_torchvision():
    names = ", ".join(f"phmdiff_fast.{n}" for n in FILES if n != "__main__")
    assert run(f"import sys, {names}; print('torchvision' in sys.modules)").strip() == "False"


def test_help_is_quick():
    """A command line that takes long to say --help is not used; the goal is 0.5 s on an idle machine."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "phmdiff_fast", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 1.5


def test_public_names_exist():
    out = run("import phmdiff_fast as p; print(all(getattr(p, n) is not None for n in p.__all__), p.has_extension())")
    assert out.split() in (["True", "True"], ["True", "False"])
