"""One HTML page of a checked cohort, on which people see bad pairs of scans at a glance.

A row a subject, a column a contrast, in each cell one slice with the outline of the subject's first
scan over it. The page opens offline: pictures inside, no script, nothing fetched. The outline is a
drawing over the picture (SVG), each written once a row: sharp at any zoom, gone while the mouse is on it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .errors import PhmdiffError
from .files import refuse_existing, whole_file
from .html_page import FOOT, HEAD, escaped
from .layouts import CONTRASTS, LABELS

THUMB = 112  # longer side of a picture, pixels
# Mean bytes of 48 real slices at 112 pixels: WebP 80 1,660, JPEG 60 1,710, JPEG 80 2,340, PNG of 16 greys 2,510.
QUALITY = 80
LOOK_FOR = (
    "What to look for: the orange line is the outline of the head in the first scan of the row (named below the "
    "subject), drawn over the others at the same place in mm. In every picture of a row it must run along the edge "
    "of the same head, and the folds inside must match. A line beside the edge: the scans are not registered. A head "
    "mirrored, turned or seen at another height: a wrong orientation. Another anatomy: another person, or a file "
    "under the wrong name. Point at a picture to see it without the line."
)


def write_check_page(
    path: str | Path, *, cohort_root: str | Path, layout: str, report, overwrite: bool = False
) -> Path:  # fmt: skip
    """All subjects of ``report`` (``check.CheckReport`` with ``views``), those with problems first; text is escaped.

    report : ``rows`` (dicts with subject, contrast, shape, spacing in mm, orientation), ``problems``
        (PhmdiffError), ``notes`` (str) and ``views``: subject -> contrast -> an object with ``image``
        (H, W) uint8, upright, and ``inside`` (H, W) bool, the foreground of the subject's first scan
        there, whose outline is drawn (not where it has another shape)

    Raises PhmdiffError OUTPUT_EXISTS (exit 2) unless ``overwrite``, OUTPUT_WRITE (exit 74).
    """
    path = Path(path)
    refuse_existing(path, overwrite)
    with whole_file(path) as file:
        for part in _parts(str(cohort_root), layout, report):
            file.write(part.encode(errors="backslashreplace"))  # names of files need not be UTF-8
    return path


def _parts(cohort_root: str, layout: str, report) -> Iterator[str]:
    rows: dict[str, dict[str, dict]] = {}
    for row in report.rows:
        rows.setdefault(row["subject"], {})[row["contrast"]] = row
    problems: dict[str | None, list[PhmdiffError]] = {}
    for problem in report.problems:
        problems.setdefault(problem.subject, []).append(problem)
    subjects = {*rows, *report.views, *problems} - {None}
    subjects = sorted(subjects, key=lambda subject: (subject not in problems, subject))
    present = {contrast for by_contrast in (*rows.values(), *report.views.values()) for contrast in by_contrast}
    present |= {problem.contrast for problem in report.problems if problem.subject and problem.contrast}
    contrasts = [c for c in CONTRASTS if c in present] + sorted(present - set(CONTRASTS))

    title = f"Check of {Path(cohort_root).name or cohort_root}"
    yield HEAD.format(title=escaped(title), style=_STYLE)
    facts = [("Cohort", cohort_root), ("Subjects", f"{len(subjects):,}"), ("Layout", layout),
             ("Contrasts", ", ".join(contrasts)), ("Problems", _count(len(report.problems), problems)),
             ("Notes", len(report.notes))]  # fmt: skip
    shown = "".join(f"<div><dt>{name}</dt><dd>{escaped(value)}</dd></div>" for name, value in facts)
    yield f'<header><h1>{escaped(title)}</h1><dl class="facts">{shown}</dl>\n'
    yield "".join(f'<p class="problem">{escaped(problem.line())}</p>\n' for problem in problems.get(None, []))
    if report.notes:
        items = "".join(f"<li>{escaped(note)}</li>" for note in report.notes)
        yield f'<h2>Notes</h2><ul class="notes">{items}</ul>\n'
    yield f'<p class="look">{escaped(LOOK_FOR)}</p></header>\n'

    heads = "".join(f'<th scope="col">{escaped(contrast)}</th>' for contrast in contrasts)
    yield f'<table><thead><tr><th scope="col">Subject</th>{heads}</tr></thead>\n<tbody>\n'
    for number, subject in enumerate(subjects):
        yield _line(number, subject, contrasts, rows.get(subject, {}), report.views.get(subject, {}),
                    problems.get(subject, []))  # fmt: skip
    yield f"</tbody></table>\n{FOOT}"


def _count(problems: int, by_subject: dict) -> str:
    concerned = len(by_subject.keys() - {None})
    return f"{problems:,}" + (f", of {concerned:,} subject{'s' * (concerned != 1)}" if concerned else "")


def _line(number: int, subject: str, contrasts: list[str], rows: dict, views: dict, problems: list) -> str:
    """One subject's row of the table."""
    names = list(views or rows)
    first = next((name for name in names if name not in LABELS), names[0] if names else None)
    outlines: dict[str, str] = {}  # path -> its id: on one grid it is the same for all
    cells = []
    for contrast in contrasts:
        concerned = any(problem.contrast == contrast for problem in problems)
        row, view = rows.get(contrast), views.get(contrast)
        if row is None and view is None:
            cells.append('<td class="bad empty">not read</td>' if concerned else '<td class="empty">missing</td>')
            continue
        shown = "no picture"
        if view is not None:
            outline = None
            if view.image.shape == view.inside.shape and view.inside.any():
                path = _outline(view.inside, _fitted(view.inside.shape))
                outline = outlines.setdefault(path, f"o{number}-{len(outlines)}")
            shown = _picture(view.image, f"{subject} {contrast}", outline)
        if row is not None and first in rows and (differing := _differing(row, rows[first])):
            shown += f'<small class="differs">{escaped(" · ".join(differing))}</small>'
        cells.append(("<td>", '<td class="bad">')[concerned] + shown + "</td>")

    head = f"<b>{escaped(subject)}</b>"
    if first in rows:
        head += f"<small>{escaped(' · '.join([f'first: {first}', *_facts(rows[first]).values()]))}</small>"
    head += "".join(f'<p class="problem">{escaped(problem.line())}</p>' for problem in problems)
    if outlines:
        paths = "".join(f'<path id="{name}" d="{path}"/>' for path, name in outlines.items())
        head += f'<svg width="0" height="0" aria-hidden="true">{paths}</svg>'
    return f'<tr><th scope="row">{head}</th>{"".join(cells)}</tr>\n'


def _picture(image: np.ndarray, alt: str, outline: str | None) -> str:
    """image (H, W) uint8 with the path of that id over it."""
    width, height = _fitted(image.shape)
    over = f'<svg viewBox="0 0 {width} {height}" aria-hidden="true"><use href="#{outline}"/></svg>' if outline else ""
    return (
        f'<div class="pic" style="width:{width}px"><img src="{_thumbnail(image, (width, height))}" width="{width}" '
        f'height="{height}" alt="{escaped(alt)}" loading="lazy" decoding="async">{over}</div>'
    )


def _facts(row: dict) -> dict[str, str]:
    return {"shape": "×".join(f"{n:g}" for n in row["shape"]),
            "spacing": "×".join(f"{round(mm, 3):g}" for mm in row["spacing"]) + " mm",
            "orientation": str(row["orientation"])}  # fmt: skip


def _differing(row: dict, first: dict) -> list[str]:
    """Shape, spacing and axes of a scan, those that are not as in the row's first."""
    return [text for key, text in _facts(row).items() if not _same(row[key], first[key])]


def _same(a, b) -> bool:
    return a == b if isinstance(a, str) else len(a) == len(b) and np.allclose(a, b, rtol=0, atol=1e-3)


def _fitted(shape: tuple[int, int]) -> tuple[int, int]:
    """(width, height) on the page of an image (H, W): the longer side is THUMB."""
    return tuple(max(1, round(side * THUMB / max(shape))) for side in shape[::-1])


def _thumbnail(image: np.ndarray, size: tuple[int, int]) -> str:
    """image (H, W) uint8 -> data URI of at most ``size`` (width, height) pixels; small images stay as they are."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(image, dtype=np.uint8))
    if picture.width > size[0] or picture.height > size[1]:
        picture = picture.resize(size, Image.Resampling.BOX)
    file = io.BytesIO()
    picture.save(file, format="webp", quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _outline(inside: np.ndarray, size: tuple[int, int]) -> str:
    """SVG path around ``inside`` (H, W) bool, holes filled, in pixels of ``size`` (width, height)."""
    from PIL import Image
    from scipy.ndimage import binary_fill_holes

    coarse = Image.fromarray(np.ascontiguousarray(inside).astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)
    filled = np.pad(binary_fill_holes(np.asarray(coarse) >= 128), 1).astype(np.int8)
    out = []
    for command, cells in (("h", filled), ("v", filled.T)):
        between = np.diff(cells, axis=0)[:, 1:-1] != 0  # line i lies between the unpadded lines i - 1 and i
        ends = np.diff(np.pad(between, ((0, 0), (1, 1))).astype(np.int8), axis=1)
        for (line, start), (_, stop) in zip(np.argwhere(ends == 1), np.argwhere(ends == -1), strict=True):
            x, y = (start, line) if command == "h" else (line, start)
            out.append(f"M{x} {y}{command}{stop - start}")
    return "".join(out)


# The page itself scrolls to the side, so that head and first column can both stay in sight.
_STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #57606a; --line: #d8dee4; --tint: #f6f8fa; --bad: #b3261e; }
* { box-sizing: border-box; }
body { margin: 0; padding: 0 1rem; width: max-content; min-width: 100%; background: #fff; color: var(--ink);
  line-height: 1.45; font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header, footer { position: sticky; left: 1rem; width: min(100vw - 2.5rem, 70rem); }
header { padding: 1.5rem 0 0.5rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 1.2rem 0 0.4rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 0.6rem; margin: 0 0 1rem; }
.facts div { border: 1px solid var(--line); background: var(--tint); border-radius: 6px; padding: 0.5rem 0.8rem; }
.facts dt { color: var(--soft); font-size: 0.8rem; }
.facts dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.notes { margin: 0; padding-left: 1.2rem; font-size: 0.9rem; overflow-wrap: anywhere; }
.look { border-left: 4px solid #d55e00; padding: 0.1rem 0 0.1rem 0.9rem; margin: 1.2rem 0 0.6rem; }
.problem { color: var(--bad); font-size: 0.8rem; margin: 0.3rem 0 0; overflow-wrap: anywhere; }
table { border-collapse: separate; border-spacing: 0; }
th, td { text-align: left; vertical-align: top; padding: 0.5rem 0.6rem; border-bottom: 1px solid var(--line); }
thead th { position: sticky; top: 0; z-index: 2; background: #fff; border-bottom: 2px solid var(--ink);
  font-size: 0.85rem; }
tr > th:first-child { position: sticky; left: 0; z-index: 1; background: #fff; width: min(17rem, 38vw);
  min-width: min(17rem, 38vw); max-width: min(17rem, 38vw); font-weight: 400; overflow-wrap: anywhere; }
thead tr > th:first-child { z-index: 3; font-weight: 700; }
td { min-width: 133px; max-width: 133px; }
.bad { box-shadow: inset 0 0 0 2px var(--bad); }
.pic { position: relative; background: #000; }
.pic img, .pic svg { display: block; }
th svg { position: absolute; }
.pic svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; fill: none; stroke: #ff8a1f;
  stroke-width: 1; pointer-events: none; }
.pic:hover svg { visibility: hidden; }
small { display: block; color: var(--soft); font-size: 0.72rem; line-height: 1.3; margin-top: 0.25rem; }
.differs { color: var(--bad); font-weight: 600; }
.empty { color: var(--soft); font-style: italic; font-size: 0.85rem; }
.bad.empty { color: var(--bad); }
footer { padding: 1rem 0 2rem; color: var(--soft); font-size: 0.85rem; }
@media print {
  body { width: auto; padding: 0; }
  header, footer, thead th, tr > th:first-child { position: static; width: auto; }
  table { width: 100%; table-layout: fixed; }
  tr > th:first-child { width: 24%; min-width: 0; max-width: none; }
  td { padding: 0.3rem; min-width: 0; max-width: none; }
  .pic { max-width: 100%; }
  .pic img { width: 100%; height: auto; }
  tr, .facts div { break-inside: avoid; }
  .pic, .look, .facts div { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
