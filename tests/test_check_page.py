"""The page of a checked cohort: every scan shown once, the outline in place, all text escaped, bad subjects first."""

import base64
import io
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from phmdiff_fast.check_page import THUMB, write_check_page
from phmdiff_fast.errors import PhmdiffError


@dataclass
class View:
    image: np.ndarray
    inside: np.ndarray


@dataclass
class Report:
    rows: list = field(default_factory=list)
    problems: list = field(default_factory=list)
    notes: list = field(default_factory=list)
    views: dict = field(default_factory=dict)

    def add(self, subject, contrast, view=None, shape=(64, 48, 9), spacing=(1.0, 1.0, 2.0), orientation="LPS"):
        self.rows.append({"subject": subject, "contrast": contrast, "shape": shape, "spacing": spacing,
                          "orientation": orientation, "min": 0.0, "max": 1.0, "foreground": 0.3})  # fmt: skip
        if view is not None:
            self.views.setdefault(subject, {})[contrast] = view
        return self


def box(height=56, width=42, top=10, left=8, bottom=40, right=30):
    """Half a thumbnail's size. An image (H, W), 200 in a box and 0 around it, and the box as the foreground."""
    inside = np.zeros((height, width), bool)
    inside[top:bottom, left:right] = True
    return View((200 * inside).astype(np.uint8), inside)


class Page(HTMLParser):
    """rows: per subject (name, problem lines, text of each cell); and all tags with their attributes."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.rows, self.open = [], [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag == "tr":
            self.rows.append({"name": "", "about": "", "problems": [], "cells": []})
        elif tag == "td":
            self.rows[-1]["cells"].append({"text": "", "tags": [], "class": attrs.get("class") or ""})
        elif self.rows and self.rows[-1]["cells"]:
            self.rows[-1]["cells"][-1]["tags"].append((tag, attrs))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        self.text.append(data)
        if "td" in self.open:
            self.rows[-1]["cells"][-1]["text"] += data
        elif "tbody" in self.open and "b" in self.open:
            self.rows[-1]["name"] += data
        elif "tbody" in self.open and "p" in self.open:
            self.rows[-1]["problems"].append(data)
        elif "tbody" in self.open and "small" in self.open:
            self.rows[-1]["about"] += data

    def heads(self):
        return re.findall(r'<th scope="col">([^<]*)</th>', self.source)

    def subjects(self):
        return {row["name"]: row for row in self.rows[1:]}


@pytest.fixture
def write(tmp_path):
    def write(report, **changed):
        settings = {"cohort_root": "/data/brain", "layout": "brats2021", **changed}
        return Page(write_check_page(tmp_path / "check.html", report=report, overwrite=True, **settings))

    return write


def outline(path_data, width, height):
    """The closed curve's inside as (height, width) bool, even-odd; by its vertical and by its horizontal pieces."""
    sides, lines = np.zeros((height, width + 1), int), np.zeros((height + 1, width), int)
    for x, y, way, length in re.findall(r"M(\d+) (\d+)([hv])(\d+)", path_data):
        x, y, length = int(x), int(y), int(length)
        if way == "v":
            sides[y : y + length, x] += 1
        else:
            lines[y, x : x + length] += 1
    inside = np.cumsum(sides, axis=1)[:, :width] % 2 == 1
    np.testing.assert_array_equal(inside, np.cumsum(lines, axis=0)[:height] % 2 == 1)
    return inside


def image_of(cell):
    (attrs,) = [attrs for tag, attrs in cell["tags"] if tag == "img"]
    encoded = attrs["src"].removeprefix("data:image/webp;base64,")
    return attrs, np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("L"))


@pytest.mark.parametrize("enlarged", [1, 5])  # smaller than the thumbnail, and larger
def test_the_outline_is_that_of_the_first_scan_at_the_place_of_the_picture(write, enlarged):
    def big(image, inside):
        return View(*(np.kron(a, np.ones((enlarged, enlarged), a.dtype)) for a in (image, inside)))

    first, second = box(), box(left=14, right=36)
    report = Report().add("p1", "t1", big(first.image, first.inside)).add("p1", "t2", big(second.image, first.inside))
    page = write(report)
    cells = page.subjects()["p1"]["cells"]
    drawn = {attrs["id"]: attrs["d"] for tag, attrs in page.tags if tag == "path"}
    assert len(drawn) == 1
    agree = []
    for cell in cells:
        attrs, pixels = image_of(cell)
        assert max(pixels.shape) == min(THUMB, 56 * enlarged)
        (frame,) = [attrs for tag, attrs in cell["tags"] if tag == "svg"]
        (use,) = [attrs for tag, attrs in cell["tags"] if tag == "use"]
        width, height = int(attrs["width"]), int(attrs["height"])
        assert (width, height) == (84, 112)
        assert frame["viewbox"] == f"0 0 {width} {height}"
        shown = np.asarray(Image.fromarray(pixels).resize((width, height))) > 100
        inside = outline(drawn[use["href"].removeprefix("#")], width, height)
        assert abs(int(inside.sum()) - 2 * 2 * 30 * 22) < 60
        agree.append((shown == inside).mean())
    assert agree[0] > 0.98
    assert agree[1] < 0.95  # 6 of 42 columns aside: that is what is to be seen


def test_holes_are_no_outline_but_a_second_piece_is(write):
    view = box()
    view.inside[20:25, 15:20] = False
    view.inside[44:54, 32:40] = True
    page = write(Report().add("p1", "t1", view))
    (data,) = [attrs["d"] for tag, attrs in page.tags if tag == "path"]
    expected = np.zeros((112, 84), bool)
    expected[20:80, 16:60] = expected[88:108, 64:80] = True
    assert (outline(data, 84, 112) != expected).sum() <= 8
    assert data.count("M") == 8  # two boxes of four sides, each in one piece


def test_another_grid_gets_no_outline_and_says_what_differs(write):
    report = Report().add("p1", "t1", box())
    report.add("p1", "t2", View(box(28, 21).image, box().inside), shape=(24, 32, 9), spacing=(2.0, 2.0, 2.0))
    report.add("p1", "flair", box(), orientation="RAS").add("p1", "pd", box(), spacing=(1.0, 1.00001, 2.0))
    row = write(report).subjects()["p1"]
    t1, t2, flair, pd = row["cells"]
    assert row["about"] == "first: t1 · 64×48×9 · 1×1×2 mm · LPS"
    assert [cell["text"] for cell in row["cells"]] == ["", "24×32×9 · 2×2×2 mm", "RAS", ""]
    assert [any(tag == "use" for tag, _ in cell["tags"]) for cell in (t1, t2, flair, pd)] == [True, False, True, True]


def test_a_scan_on_another_grid_gets_the_outline_where_it_is_there(write):
    report = Report().add("p1", "mask", box()).add("p1", "t1", box()).add("p1", "t2", box(top=4, bottom=34))
    page = write(report)
    row = page.subjects()["p1"]
    assert row["about"].startswith("first: t1")  # the mask is no scan
    drawn = {"#" + attrs["id"]: outline(attrs["d"], 84, 112) for tag, attrs in page.tags if tag == "path"}
    used = [attrs["href"] for cell in row["cells"] for tag, attrs in cell["tags"] if tag == "use"]
    t1, t2, mask = (drawn[href] for href in used)
    assert len(drawn) == 2
    assert used[0] == used[2]
    np.testing.assert_array_equal(t1[12:], t2[:-12])
    assert t1[20:80, 16:60].mean() > 0.95
    assert (t1 == mask).all()


def test_every_subject_and_contrast_has_its_cell(write):
    report = Report().add("b", "flair", box()).add("a", "t1", box()).add("b", "t1", box()).add("a", "seg")
    report.problems.append(PhmdiffError("NII_TRUNC", "ends early", subject="c", contrast="zz"))
    page = write(report)
    assert page.heads() == ["Subject", "t1", "flair", "seg", "zz"]
    assert list(page.subjects()) == ["c", "a", "b"]
    texts = {name: [cell["text"] for cell in row["cells"]] for name, row in page.subjects().items()}
    assert texts == {
        "a": ["", "missing", "no picture", "missing"],
        "b": ["", "", "missing", "missing"],
        "c": ["missing", "missing", "missing", "not read"],
    }


def test_subjects_with_problems_come_first_with_their_lines(write):
    report = Report(notes=["2 of 4 subjects have no t2"])
    for subject in ("d", "b", "a", "c"):
        report.add(subject, "t1", box())
    report.problems = [
        PhmdiffError("LEAK", "has the same voxels as a/t1", "keep one", subject="d", contrast="t1", file="/d.nii"),
        PhmdiffError("MISSING_CONTRAST", "has no t2", subject="b"),
        PhmdiffError("GRID_MISMATCH", "lies 3 mm off", subject="d"),
        PhmdiffError("DATA_EMPTY", "is odd", file="/data"),
    ]
    page = write(report)
    assert list(page.subjects()) == ["b", "d", "a", "c"]
    assert page.subjects()["d"]["problems"] == [report.problems[0].line(), report.problems[2].line()]
    assert page.subjects()["a"]["problems"] == []
    assert page.subjects()["d"]["cells"][0]["class"] == "bad"
    seen = "".join(page.text)
    for text in ("4, of 2 subjects", "2 of 4 subjects have no t2", "brats2021", "What to look for", "is odd"):
        assert text in seen[: seen.index("Subject", seen.index("What to look for"))], text


def test_all_text_is_escaped_and_the_page_stands_alone(write):
    evil = "<script>x</script>\"'&<b>"
    report = Report(notes=[evil]).add(evil, evil, box()).add(evil, "t2", box(), orientation=evil)
    report.problems.append(PhmdiffError("X", evil, evil, subject=evil, contrast=evil, file=f"/\udcff{evil}"))
    page = write(report, cohort_root=evil, layout=evil)
    assert list(page.subjects()) == [evil]
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert "http" not in page.source
    assert "url(" not in page.source
    assert f"{evil} {evil}" in [attrs["alt"] for tag, attrs in page.tags if tag == "img"]
    for tag, attrs in page.tags:
        assert not {name for name in attrs if name.startswith("on")}, tag


def test_a_cohort_of_1251_with_four_contrasts_stays_below_25_mb(write):
    """Noise is worse than any scan; measured on real ones: 14.1 MB."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:240j, -1:1:240j]
    inside = x**2 / 0.6 + y**2 / 0.8 < 1
    report = Report()
    for subject in range(3):
        for contrast in ("t1", "t1ce", "t2", "flair"):
            noisy = 120 + 60 * np.sin(9 * x + subject) * np.cos(7 * y) + rng.normal(0, 20, x.shape)
            report.add(f"p{subject}", contrast, View(np.where(inside, noisy, 0).clip(0, 255).astype(np.uint8), inside))
    size, fixed = len(write(report).source), len(write(Report()).source)
    assert 1251 * (size - fixed) / 3 + fixed < 25e6


def test_pictures_wait_until_they_are_seen(write):
    page = write(Report().add("p1", "t1", box()))
    (attrs,) = [attrs for tag, attrs in page.tags if tag == "img"]
    assert (attrs["loading"], attrs["decoding"], attrs["alt"]) == ("lazy", "async", "p1 t1")


def test_an_empty_foreground_and_an_empty_report(write):
    page = write(Report().add("p1", "t1", View(box().image, np.zeros((56, 42), bool))))
    assert not [tag for tag, _ in page.tags if tag in ("path", "use")]
    assert write(Report()).subjects() == {}


def test_page_errors(tmp_path):
    place = {"cohort_root": "/data", "layout": "csv", "report": Report()}
    write_check_page(tmp_path / "a.html", **place)
    with pytest.raises(PhmdiffError) as caught:
        write_check_page(tmp_path / "a.html", **place)
    assert (caught.value.code, caught.value.exit_code) == ("OUTPUT_EXISTS", 2)
    with pytest.raises(PhmdiffError) as caught:
        write_check_page(tmp_path / "nowhere" / "a.html", **place)
    assert (caught.value.code, caught.value.exit_code) == ("OUTPUT_WRITE", 74)
    broken = Report().add("p1", "t1", View(None, box().inside))
    with pytest.raises(AttributeError):
        write_check_page(tmp_path / "b.html", cohort_root="/data", layout="csv", report=broken)
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]  # nothing half-written
