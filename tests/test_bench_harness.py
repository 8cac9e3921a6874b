"""The benchmark harness on toys: its cells, its check before the clock, its figures; the runner of planted faults."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import mutants
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import compare, harness, plots  # noqa: E402
from benchmarks.case import Case, size  # noqa: E402

CPU = torch.device("cpu")


def make(device, dtype=torch.float32):
    drawn = torch.Generator(device).manual_seed(0)
    x = torch.randn(32, 8, generator=drawn, device=device).to(dtype).requires_grad_()
    return {"x": x, "ids": torch.arange(32, device=device), "nothing": None}


def toy(tags=("small",), dtype=torch.float32, make=make, **more) -> Case:
    variants = {
        "literal": lambda i: (i["x"] * i["x"], i["ids"]),
        "eager": lambda i: (i["x"].square(), i["ids"]),
        "triton": lambda i: (i["x"] ** 2, i["ids"]),
        **more,
    }
    floor = lambda i: (2 * size(i["x"]), 3 * size(i["x"]))  # noqa: E731
    return Case("toy", "32 x 8", lambda device: make(device, dtype), variants, floor, tags=frozenset(tags))


class Wrong(torch.autograd.Function):
    """Right forward, wrong backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, g):
        grad = 2 * g * ctx.saved_tensors[0]
        grad[-1, -1] = 0
        return grad


# --- cells -------------------------------------------------------------------------------------------


def test_cells_of_a_cpu(monkeypatch):
    monkeypatch.setattr(harness, "CUDA", [])
    cells = harness.cells([toy(), toy(("cpu",)), toy(("large",)), toy(("compile",))])
    assert len(cells) == 2 * 2 * 3
    assert {(device, variant) for device, _, variant, _ in cells} == {
        ("cpu", v) for v in ("literal", "eager", "compile")
    }


def test_cells_of_a_gpu(monkeypatch):
    monkeypatch.setattr(harness, "CUDA", ["cuda"])
    on_gpu = [
        (case, variant)
        for device, case, variant, _ in harness.cells([toy(("large",)), toy(("cpu",))])
        if device == "cuda"
    ]
    assert [variant for _, variant in on_gpu] == ["literal", "eager", "compile", "triton"] * 2
    assert all("large" in case.tags for case, _ in on_gpu)


def test_an_operation_without_gradients_has_no_backward():
    def fixed(device, dtype):
        return {"x": torch.zeros(3)}

    assert harness.ways_of(toy(make=fixed)) == ("forward",)
    assert harness.ways_of(toy()) == ("forward", "backward")


def test_cases_are_found_by_operation_and_by_file(tmp_path):
    path = tmp_path / "bench_my_toys.py"
    path.write_text("CASES = [__import__('types').SimpleNamespace(op=name) for name in ('a', 'b')]")
    assert [c.op for c in harness.load_cases(files=[path])] == ["a", "b"]
    assert [c.op for c in harness.load_cases("b", [path])] == ["b"]
    assert len(harness.load_cases("my_toys", [path])) == 2
    with pytest.raises(ValueError, match="'c'"):
        harness.load_cases("c", [path])


# --- the check before the clock ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["literal", "eager", "triton"])
def test_right_variants_pass(dtype, variant):
    case = toy(dtype=dtype)
    harness.check(case, variant, case.make(CPU))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda i: (i["x"].square() * 1.05, i["ids"]), "output 0 is off"),
        (lambda i: (i["x"].square().index_fill(0, torch.tensor([31]), 0), i["ids"]), "output 0 is off"),
        (lambda i: (i["x"].square() * math.nan, i["ids"]), "output 0 is off"),
        (lambda i: (i["x"].square()[:-1], i["ids"]), "shape"),
        (lambda i: (i["x"].square(), i["ids"].flip(0)), "differs in 32 of 32"),
        (lambda i: (i["x"].detach().square(), i["ids"]), "gives"),
        (lambda i: (Wrong.apply(i["x"]), i["ids"]), "gradient of x is off"),
    ],
    ids=["scaled", "a row dropped", "NaN", "shape", "integers", "no gradient", "gradient"],
)
def test_a_wrong_variant_is_told(wrong, said):
    case = toy(triton=wrong)
    with pytest.raises(harness.WrongResult, match=said):
        harness.check(case, "triton", case.make(CPU))


def test_kept_exact_values_are_those_of_the_case():
    first, second = toy(), toy(eager=lambda i: (i["x"] * 3, i["ids"]), triton=lambda i: (i["x"] * 3, i["ids"]))
    for case in (first, second, first):
        harness.check(case, "triton", case.make(CPU))


def test_an_error_like_eagers_own_is_allowed():
    def coarse(i):  # both as far off as this type makes eager
        return ((i["x"] + 1e4) - 1e4,)

    case = toy(eager=coarse, triton=coarse)
    harness.check(case, "triton", case.make(CPU))


# --- clocks and figures --------------------------------------------------------------------------------


def test_figures_take_the_ceiling_that_binds(monkeypatch):
    monkeypatch.setattr(harness, "ceiling", lambda device: (1e9, 1e12, "toy"))
    case = toy()
    inputs = case.make(CPU)
    found = harness.figures(case, "forward", inputs, 1e-5, CPU)
    assert found["floor_bytes"] == 2048
    assert found["gb_per_s"] == pytest.approx(0.2048)
    assert found["share"] == pytest.approx(0.2048)
    assert "tflop_per_s" not in found
    assert found["cached"]
    counted = dataclasses.replace(case, flops=lambda i: (1_000_000, 5_000_000))
    found = harness.figures(counted, "backward", inputs, 1e-5, CPU)
    assert found["floor_bytes"] == 3072
    assert found["tflop_per_s"] == pytest.approx(0.5)
    assert found["share"] == pytest.approx(0.5)


def test_backward_walks_a_kept_graph_alone():
    calls = []

    def counted(i):
        calls.append(1)
        return i["x"].square(), i["ids"]

    case = toy(triton=counted)
    inputs = case.make(CPU)
    call = harness.prepare(case, "triton", "backward", inputs)
    first, second = call(), call()
    assert len(calls) == 1
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[0], 2 * inputs["x"] * harness.cotangents([inputs["x"]])[0])


def test_incoming_gradients_are_the_same_in_every_type():
    wide, *others = (harness.cotangents([torch.empty(100, dtype=d)])[0] for d in harness.TOLERANCE)
    assert all(torch.equal(wide.double(), other.double()) for other in others)


def test_rounds_fit_the_budget():
    rounds, calls = harness.plan(lambda: None, CPU, flush=False)
    assert (rounds, calls) == (50, 100)
    assert harness.plan(lambda: __import__("time").sleep(0.02), CPU, flush=False, budget=0.1)[1] == 1


PLAIN = """
from __future__ import annotations
import torch
from benchmarks.case import Case, size
from benchmarks.harness import parametrize, run

def make(device):
    return {"x": torch.ones(64, device=device, requires_grad=True)}

def case(op, off):
    return Case(op, "64", make, {"literal": lambda i: i["x"] * i["x"] + off, "eager": lambda i: i["x"] ** 2},
                lambda i: (2 * size(i["x"]),) * 2, tags=frozenset({"small"}))

CASES = [case("right", 0.0), case("wrong", 0.5)]

@parametrize([c for c in CASES])
def test_toy(benchmark, device, case, variant, way):
    run(benchmark, device, case, variant, way)
"""


def test_pytest_benchmark_prints_shares_and_refuses_a_wrong_variant(tmp_path, monkeypatch):
    (tmp_path / "bench_plain.py").write_text(PLAIN)
    (tmp_path / "conftest.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom benchmarks.conftest import *  # noqa\n"
        "import torch\nfrom benchmarks import harness\nharness.ceiling = lambda device: (1e9, 1e12, 'toy ceiling')\n"
        "harness.CUDA.clear()\nharness.plan = lambda *args, **more: (5, 10)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-json=out.json",
               "-o", "python_files=bench_*.py", "-k", "not compile", "."]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "2 failed, 6 passed" in done.stdout, done.stdout + done.stderr
    assert "wrong [64]: literal is wrong, so it has no speed: output 0 is off" in done.stdout
    assert "toy ceiling" in done.stdout
    found = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert len(found) == 6
    for row in found:
        info = row["extra_info"]
        assert info["share"] == pytest.approx(512 / 1e9 / row["stats"]["median"])
        assert {"op", "shape", "way", "variant", "device", "date", "commit", "torch"} <= set(info)
        assert row["group"] == f"{info['op']} [64] {info['way']} on cpu"


# --- side by side, and the page ----------------------------------------------------------------------


@pytest.fixture
def records(monkeypatch, tmp_path, capsys) -> tuple[list[dict], Path, str]:
    """What comparing a right and a wrong toy gave: its records, its file, what it printed."""
    monkeypatch.setattr(harness, "ceiling", lambda device: (1e9, 1e12, "toy"))
    cases = [toy(reference=lambda i: (i["x"].square(), i["ids"])), toy(literal=lambda i: (i["x"] * 2, i["ids"]))]
    monkeypatch.setattr(harness, "load_cases", lambda op, files: cases)
    path = tmp_path / "out.json"
    arguments = ["--device", "cpu", "--seconds", "0.01", "--variants", "literal,eager,reference", "--json", str(path)]
    assert compare.main(arguments) == 1
    return json.loads(path.read_text())["compare"], path, capsys.readouterr().out


def test_operations_come_in_the_order_asked_for_until_time_is_up(monkeypatch, capsys):
    monkeypatch.setattr(harness, "load_cases", lambda op, files: [dataclasses.replace(toy(), op=op)])
    measured = []
    monkeypatch.setattr(compare, "measure", lambda case, way, *_, **__: measured.append(case.op) or {"variants": {}})
    monkeypatch.setattr(compare, "table", lambda records: [])
    arguments = ["--device", "cpu", "--op", "second,first"]
    assert compare.main(arguments) == 0
    assert measured == ["second", "second", "first", "first"]
    assert compare.main([*arguments, "--limit", "0"]) == 0
    assert len(measured) == 4
    assert "time is up: 4 of 4 not timed, from second [" in capsys.readouterr().out


def test_variants_are_compared_in_turn(records):
    found, _, said = records
    assert [(r["op"], r["way"]) for r in found] == [("toy", "forward"), ("toy", "backward")] * 2
    right, wrong = found[0]["variants"], found[2]["variants"]
    assert list(right) == ["literal", "eager", "reference"]
    assert all(f["call_s"] > 0 and f["graph_s"] is None and f["peak_bytes"] is None for f in right.values())
    assert "wrong" in wrong["literal"]["error"]
    assert "call_s" not in wrong["literal"]
    assert "WRONG toy [32 x 8]: literal" in said


@pytest.mark.gpu
@pytest.mark.parametrize("way", harness.WAYS)
def test_on_a_gpu_calls_and_graphs_are_timed(way):
    def large(device, dtype):
        return {
            "x": torch.ones(1 << 25, device=device, requires_grad=True),
            "ids": torch.zeros(1, device=device).long(),
        }

    case = toy(("large",), make=large)
    assert harness.flushes(case, case.make(torch.device("cuda")), way, torch.device("cuda"))
    record = compare.measure(case, way, torch.device("cuda"), budget=0.05)
    assert list(record["variants"]) == ["literal", "eager", "compile", "triton"]
    for figures in record["variants"].values():
        assert 0 < figures["graph_s"] <= 1.2 * figures["call_s"], figures
        assert figures["peak_bytes"] >= 1 << 27
        assert 0 < figures["share"] < 1.1


def test_ratios_of_the_table_are_of_medians():
    def timed(taken, **more):
        return {"call_s": 2 * taken, "graph_s": taken, "gb_per_s": 1.0, "share": 0.5, "cached": False,
                "peak_bytes": 1 << 20, **more}  # fmt: skip

    variants = {
        "literal": timed(8e-6),
        "eager": timed(4e-6),
        "compile": timed(2e-6),
        "triton": timed(1e-6, tflop_per_s=3),
    }
    rows = compare.table([{"op": "o", "shape": "s", "way": "forward", "variants": variants}])
    assert rows[0] == ("o", "s", "forward", "literal", "16.0", "8.0", "0.50", "0.25", "0.12", "1.0", "-", "50%", "1.0")
    assert rows[3] == ("", "", "", "triton", "2.0", "1.0", "4.00", "2.00", "1.00", "1.0", "3.00", "50%", "1.0")


def test_the_page_shows_every_operation_and_says_where_it_is_from(records, tmp_path):
    found, path, _ = records
    page = tmp_path / "page.html"
    plots.main([str(path), "--out", str(page)])
    text = page.read_text()

    assert text.count("data:image/svg+xml;base64,") == 2
    assert all(found[0][key] in text for key in ("device", "date", "commit"))
    assert "http" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "")


# --- planted faults ------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path) -> Path:
    """A project of one operation with one test that looks at half of it."""
    files = {
        "phmdiff_fast/__init__.py": "from pathlib import Path\n__path__.append(str(Path(__file__).parent.parent))\n",
        "kernels/toy.py": "def double(x):\n    return 2 * x\n\n\ndef halve(x):\n    return x / 2\n",
        "tests/test_toy.py": "from phmdiff_fast.kernels.toy import double\n\ndef test_it():\n    assert double(2) == 4",
        "tests/planted/toy.py": "FAULTS = [('kernels/toy.py', '2 * x', '3 * x', 'three times')]\n",
    }
    for name, text in files.items():
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "project"


def plant(project: Path, *rows: tuple) -> None:
    (project / "tests" / "planted" / "toy.py").write_text(f"FAULTS = {list(rows)!r}\n")


KILLED = ("kernels/toy.py", "2 * x", "3 * x", "three times")
SURVIVING = ("kernels/toy.py", "x / 2", "x / 3", "a third")


def test_a_noticed_fault_and_a_survivor(project, capsys):
    plant(project, KILLED, SURVIVING)
    assert mutants.main(["--op", "toy"], project) == 1
    said = capsys.readouterr().out
    assert "toy: 1 of 2 noticed" in said
    assert "SURVIVES toy: a third (kernels/toy.py)" in said
    assert "three times" not in said
    assert (project / "kernels" / "toy.py").read_text().count("2 * x") == 1


@pytest.mark.parametrize(
    ("planted", "surviving", "arguments", "status"),
    [(40, 2, [], 0), (40, 3, [], 1), (39, 0, [], 1), (20, 1, ["--op", "toy"], 0), (19, 1, ["--op", "toy"], 1)],
)
def test_what_share_and_how_many_are_enough(project, monkeypatch, planted, surviving, arguments, status):
    plant(project, *[(*KILLED[:3], str(number)) for number in range(planted)])
    monkeypatch.setattr(mutants, "sound", lambda *args: 1.0)
    monkeypatch.setattr(mutants, "noticed", lambda fault, *args: int(fault.what) >= surviving)
    assert mutants.main(arguments, project) == status


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (("kernels/toy.py", "return", "raise", "twice there"), "occurs 2 times"),
        (("kernels/toy.py", "2 * x", "2 *", "no Python"), "does not compile"),
        (("kernels/toy.py", "2 * x", "2 * x", "the same"), "nothing changes"),
        (("kernels/gone.py", "a", "b", "no file"), "no such file"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_faults_that_prove_nothing_are_refused(project, capsys, row, why):
    plant(project, row)
    assert mutants.main(["--op", "toy"], project) == 1
    assert why in capsys.readouterr().out


def test_a_copy_that_fails_unchanged_is_refused(project, capsys):
    (project / "tests" / "test_toy.py").write_text("def test_it():\n    assert False\n")
    assert mutants.main(["--op", "toy"], project) == 1
    assert "fail on the unchanged copy" in capsys.readouterr().out


def test_a_copy_that_is_not_what_runs_is_refused(project, tmp_path, capsys):
    installed = tmp_path / "installed" / "kernels" / "toy.py"
    installed.parent.mkdir(parents=True)
    installed.write_text((project / "kernels" / "toy.py").read_text())
    (project / "phmdiff_fast" / "__init__.py").write_text(f"__path__.append({str(installed.parents[1])!r})\n")
    assert mutants.main([], project) == 1
    assert "the copy is not what runs" in capsys.readouterr().out


def test_a_hang_is_noticed(project):
    fault = mutants.Fault("toy", "kernels/toy.py", "return 2 * x", "import time\n    time.sleep(60)", "sleeps")
    assert mutants.noticed(fault, 1, project)


def test_the_likelier_tests_run_first(project):
    (project / "tests" / "test_toy_triton.py").write_text("")
    assert mutants.files_of("toy", "kernels/toy.py", project) == ["tests/test_toy.py", "tests/test_toy_triton.py"]
    assert mutants.files_of("toy", "kernels/_toy_triton.py", project)[0] == "tests/test_toy_triton.py"


def test_planted_faults_of_the_project_fit_it():
    types_of = {type(field) for fault in mutants.faults() for field in dataclasses.astuple(fault)}
    assert types_of <= {str}
    for fault in mutants.faults():
        assert (ROOT / fault.file).read_text().count(fault.old) == 1, fault
