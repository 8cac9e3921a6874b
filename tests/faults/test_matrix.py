"""docs/FAULTS.md is a promise: every row of it has a test whose name holds its code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "FAULTS.md"
MATRIX = {"D": 23, "C": 12, "R": 7, "K": 11}  # rows of each kind


def codes_of_page(text: str) -> list[str]:
    return re.findall(r"^\| ([A-Z]\d+) \|", text, re.MULTILINE)


def codes_of_tests(sources) -> dict[str, list[str]]:
    """Code -> names of the tests that hold it, as in ``test_c4_c5_...``."""
    found: dict[str, list[str]] = {}
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for code in re.findall(r"(?<=_)([dcrk]\d{1,2})(?=_|$)", node.name):
                    found.setdefault(code.upper(), []).append(node.name)
    return found


def test_every_row_has_a_test():
    have = codes_of_tests(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    rows = codes_of_page(PAGE.read_text())
    assert not [code for code in rows if code not in have], "rows without a test"
    assert not [code for code in have if code not in rows], "tests of rows that are not there"


def test_no_row_is_left_out_of_the_page():
    rows = codes_of_page(PAGE.read_text())
    assert rows == [f"{kind}{n}" for kind, count in MATRIX.items() for n in range(1, count + 1)]


def test_a_row_without_a_test_is_noticed():
    page = "| C4 | x | y |\n| C13 | x | y |\n"
    have = codes_of_tests(["def test_c4_c5_both(): pass\ndef test_c1(): pass\ndef helper_c13_x(): pass"])
    assert sorted(have) == ["C1", "C4", "C5"]
    assert [code for code in codes_of_page(page) if code not in have] == ["C13"]
