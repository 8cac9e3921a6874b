"""Tables and the page: the same figures everywhere, the best marked, nothing fetched, all escaped."""

import base64
import math
import re
from html.parser import HTMLParser

import pytest

from phmdiff_fast import report
from phmdiff_fast.errors import PhmdiffError

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII=")


def rows(protocol="brain", n=3, **methods):
    """methods: name=(psnr, ssim, mae)"""
    return [
        {"method": method, "protocol": protocol, "metric": metric, "mean": mean, "std": 0.5, "n": n}
        for method, means in methods.items()
        for metric, mean in zip(("psnr", "ssim", "mae"), means, strict=True)
    ]


TABLE = [
    *rows("phmdiff-slice", ours=(27.9, 93.2, 0.03), lookup=(26.1, 90.7, 0.04), unet_l1=(27.5, 93.4, 0.031)),
    *rows("brain", ours=(22.0, 80.0, 0.13), lookup=(23.0, 79.0, 0.12), unet_l1=(22.5, 78.0, 0.14)),
]


class Page(HTMLParser):
    """What a browser would see: tags with attributes, text, and the bold figures."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.bold, self.open = [], [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] == "strong":
            self.bold.append(data)


@pytest.fixture
def write(tmp_path):
    def write(name="index.html", **changed):
        picture = tmp_path / "strip.png"
        picture.write_bytes(PNG)
        content = dict(
            title="Demo", facts=[("Task", "T1 to T2")], table_rows=TABLE, strips=[("patient 1", picture)],
            curves_png=picture, notes=["Simulated patients.", "Never a diagnosis."],
        )  # fmt: skip
        return Page(report.write_demo_page(tmp_path / name, **{**content, **changed}))

    return write


def test_plain_table_aligned_with_the_best_marked():
    text = report.format_table(TABLE)
    first, second, _ = text.split("\n\n")
    lines = first.split("\n")
    assert lines[0] == "protocol phmdiff-slice"
    assert [line.split("  ")[0] for line in lines[3:]] == ["PHMDiff (ours)", "value lookup table", "U-Net, L1 loss"]
    assert len({line.index("±") for line in lines[3:]}) == 1
    assert len({len(line) for line in lines[1:]}) == 1
    # The best is the highest PSNR and SSIM and the lowest MAE, one protocol at a time.
    assert re.findall(r"([\d.]+) ± [\d.]+ \*", first) == ["27.90", "0.0300", "93.40"]
    assert re.findall(r"([\d.]+) ± [\d.]+ \*", second) == ["80.00", "23.00", "0.1200"]


def test_markdown_table():
    lines = report.markdown_table(TABLE).split("\n")
    assert lines[0] == "| protocol | method | PSNR (dB) | SSIM (%) | MAE | n |"
    assert lines[2] == "| phmdiff-slice | PHMDiff (ours) | **27.90 ± 0.50** | 93.20 ± 0.50 | **0.0300 ± 0.5000** | 3 |"
    assert len({line.count("|") for line in lines[:8]}) == 1


def test_units_are_told_of_the_metrics_that_are_there(write):
    hu = [{"method": method, "protocol": "ct", "metric": "mae_hu", "mean": mean, "std": 4.26, "n": 3}
          for method, mean in (("ours", 61.26), ("lookup", 80.0))]  # fmt: skip
    lines = report.markdown_table(hu).split("\n")
    assert lines[0] == "| protocol | method | MAE (HU) | n |"
    assert lines[2] == "| ct | PHMDiff (ours) | **61.3 ± 4.3** | 3 |"  # less is better
    only_psnr = [row for row in TABLE if row["metric"] == "psnr"]
    for table, units in ((hu, (False, True)), (TABLE, (True, False)), (TABLE + hu, (True, True)),
                         (only_psnr, (False, False))):  # fmt: skip
        for text in (report.format_table(table), report.markdown_table(table), write("u.html", table_rows=table,
                     overwrite=True).source):  # fmt: skip
            assert ("MAE in normalised units" in text, "MAE in Hounsfield units" in text) == units


def test_equal_as_shown_are_both_best_and_a_lone_method_is_none():
    text = report.markdown_table(rows(ours=(27.901, 93.2, 0.03), unet_l1=(27.904, 90.0, 0.04)))
    assert text.count("**27.90 ± 0.50**") == 2
    assert "**" not in report.markdown_table(rows(ours=(27.9, 93.2, 0.03)))


def test_odd_figures_are_shown_as_they_are():
    one = rows(n=1, ours=(math.inf, 100.0, 0.0), lookup=(math.nan, 90.0, 0.1))
    text = report.markdown_table(one)
    assert "**inf**" in text
    assert "| nan |" in text
    assert "±" not in text.split("\n\n")[0]  # one subject has no spread
    missing = [row for row in TABLE if row["method"] != "lookup" or row["metric"] != "ssim"]
    assert "–" in report.format_table(missing)


def test_rows_that_contradict_are_refused():
    with pytest.raises(ValueError, match="two rows for brain / ours / psnr"):
        report.format_table(TABLE + rows(ours=(1, 1, 1)))
    with pytest.raises(ValueError, match="unknown metrics: lpips"):
        report.markdown_table([{**TABLE[0], "metric": "lpips"}])


def test_page_stands_alone_and_shows_everything(write):
    page = write()
    seen = " ".join(page.text)
    for text in (
        "Demo", "T1 to T2", "patient 1", "Simulated patients.", "Never a diagnosis.", "PHMDiff (ours)",
        "value lookup table", "U-Net, L1 loss", "Protocol phmdiff-slice", "Protocol brain", "26.10 ± 0.50",
    ):  # fmt: skip
        assert text in seen, text
    assert page.bold == [
        "27.90 ± 0.50",
        "0.0300 ± 0.5000",
        "93.40 ± 0.50",
        "80.00 ± 0.50",
        "23.00 ± 0.50",
        "0.1200 ± 0.5000",
    ]
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object"}
    assert "http" not in page.source
    assert "url(" not in page.source
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 2
    for image in images:
        assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == PNG
        assert image["alt"]
    assert page.source.index("Never a diagnosis.") < page.source.index("<table")


def test_page_escapes_every_text(write):
    evil = '<script>alert("1")</script>&'
    page = write(
        title=evil, facts=[(evil, evil)], notes=[evil], strips=[], curves_png=None,
        table_rows=rows(protocol=evil, **{evil: (1, 2, 3)}),
    )  # fmt: skip
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert "".join(page.text).count(evil) == 7  # title twice, fact twice, note, protocol, method


def test_page_escapes_captions_and_alt(write, tmp_path):
    evil = '"><script>x</script>'
    (tmp_path / "p.png").write_bytes(PNG)
    page = write(strips=[(evil, tmp_path / "p.png")], curves_png=None)
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert [attrs["alt"] for tag, attrs in page.tags if tag == "img"] == [evil]


def test_page_without_extras(write):
    page = write(facts=[], table_rows=[], strips=[], curves_png=None, notes=[])
    assert not {"img", "table", "dl", "aside"} & {tag for tag, _ in page.tags}


def test_page_errors(write, tmp_path):
    write()
    with pytest.raises(PhmdiffError) as caught:
        write()
    assert (caught.value.code, caught.value.exit_code) == ("OUTPUT_EXISTS", 2)
    assert "Other" in write(title="Other", overwrite=True).source
    with pytest.raises(PhmdiffError) as caught:
        write("new.html", curves_png=tmp_path / "gone.png")
    assert (caught.value.code, caught.value.exit_code) == ("PICTURE", 74)
    with pytest.raises(PhmdiffError) as caught:
        write("nowhere/new.html")
    assert (caught.value.code, caught.value.exit_code) == ("OUTPUT_WRITE", 74)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "strip.png"]
