"""Tables of scores for the terminal, for Markdown and in one self-contained HTML page.

``table_rows`` are those of ``evaluate --json``: dicts with ``method``, ``protocol``, ``metric``,
``mean``, ``std`` and ``n``. The best of each protocol and metric is marked by the figure as shown, so
that two equal figures are both marked.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from pathlib import Path

from .errors import IO, PhmdiffError
from .files import refuse_existing, whole_file
from .html_page import FOOT, HEAD, escaped

METHOD_NAMES = {"ours": "PHMDiff (ours)", "lookup": "value lookup table", "unet_l1": "U-Net, L1 loss"}
# metric -> (head, decimals, whether more is better)
METRICS = {"psnr": ("PSNR (dB)", 2, True), "ssim": ("SSIM (%)", 2, True), "mae": ("MAE", 4, False),
           "mae_hu": ("MAE (HU)", 1, False)}  # fmt: skip
UNITS = {"mae": "MAE in normalised units, of a range of 2", "mae_hu": "MAE (HU) is the MAE in Hounsfield units"}


@dataclass(frozen=True)
class _Cell:
    text: str
    best: bool


@dataclass(frozen=True)
class _Table:
    """One protocol: heads of the metrics, and per method its name, n and cells."""

    protocol: str
    heads: list[str]
    lines: list[tuple[str, str, list[_Cell]]]


def format_table(table_rows: list[dict]) -> str:
    """The scores as aligned plain text, a block a protocol, the best marked with ``*``. No trailing newline.

    Raises ValueError for a row twice or an unknown metric.
    """
    blocks = []
    for table in _tables(table_rows):
        grid = [["method", *(head + "  " for head in table.heads), "n"]]
        for name, n, cells in table.lines:
            grid.append([name, *(cell.text + (" *" if cell.best else "  ") for cell in cells), n])
        widths = [max(len(line[i]) for line in grid) for i in range(len(grid[0]))]
        sides = "<" + ">" * (len(widths) - 1)  # names at the left, figures at the right
        lines = ["  ".join(f"{text:{side}{width}}" for text, side, width in zip(line, sides, widths, strict=True))
                 for line in grid]  # fmt: skip
        lines.insert(1, "-" * len(lines[0]))
        blocks.append("\n".join([f"protocol {table.protocol}", *(line.rstrip() for line in lines)]))
    blocks.append(f"mean ± standard deviation over n subjects; * best{_units(table_rows)}")
    return "\n\n".join(blocks)


def markdown_table(table_rows: list[dict]) -> str:
    """The scores as one Markdown table, the best in bold. Errors as ``format_table``."""
    tables = _tables(table_rows)
    metrics = _metrics(table_rows)
    heads = ["protocol", "method", *(METRICS[metric][0] for metric in metrics), "n"]
    lines = [heads, ["---", "---", *("---:" for _ in metrics), "---:"]]
    for table in tables:
        for name, n, cells in table.lines:
            shown = [f"**{cell.text}**" if cell.best else cell.text for cell in cells]
            lines.append([_markdown(table.protocol), _markdown(name), *shown, n])
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{text}\n\nMean ± standard deviation over n subjects, best in bold{_units(table_rows)}."


def write_demo_page(
    path: str | Path,
    *,
    title: str,
    facts: list[tuple[str, str]],
    table_rows: list[dict],
    strips: list[tuple[str, str | Path]],
    curves_png: str | Path | None = None,
    notes: list[str],
    overwrite: bool = False,
) -> Path:
    """One HTML page that opens offline: pictures inside, no script, nothing fetched. All text is escaped.

    facts : (name, value) pairs, shown in a grid
    table_rows : as ``format_table``
    strips : (caption, PNG file) pairs; curves_png : one more PNG
    notes : shown in a banner at the top; say what the images are and that this is no diagnosis

    Raises PhmdiffError: OUTPUT_EXISTS (exit 2) unless ``overwrite``, PICTURE (exit 74) if a picture
    cannot be read, OUTPUT_WRITE (exit 74); ValueError as ``format_table``.
    """
    path = Path(path)
    refuse_existing(path, overwrite)
    parts = [f"<header><h1>{escaped(title)}</h1></header>"]
    if notes:
        items = "".join(f"<p>{escaped(note)}</p>" for note in notes)
        parts.append(f'<aside class="banner" role="note">{items}</aside>')
    if facts:
        items = "".join(f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>" for name, value in facts)
        parts.append(f'<section><dl class="facts">{items}</dl></section>')
    if table_rows:
        parts.append(_html_tables(table_rows))
    if strips:
        figures = "".join(_figure(caption, picture, caption) for caption, picture in strips)
        parts.append(f"<section><h2>Pictures</h2>{figures}</section>")
    if curves_png is not None:
        figure = _figure("Training loss and validation score over optimizer steps.", curves_png, "training curves")
        parts.append(f'<section class="narrow"><h2>Training</h2>{figure}</section>')
    body = "\n".join(parts)
    page = f"{HEAD.format(title=escaped(title), style=_STYLE)}<main>\n{body}\n</main>\n{FOOT}"
    with whole_file(path) as file:
        file.write(page.encode())
    return path


def _metrics(table_rows: list[dict]) -> list[str]:
    unknown = {row["metric"] for row in table_rows} - METRICS.keys()
    if unknown:
        raise ValueError(f"unknown metrics: {', '.join(sorted(unknown))}")
    return [metric for metric in METRICS if any(row["metric"] == metric for row in table_rows)]


def _units(table_rows: list[dict]) -> str:
    """What the notes below a table say about the units of its metrics."""
    return "".join(f"; {UNITS[metric]}" for metric in _metrics(table_rows) if metric in UNITS)


def _tables(table_rows: list[dict]) -> list[_Table]:
    """The rows by protocol, methods and protocols in order of appearance."""
    metrics = _metrics(table_rows)
    by_place: dict[tuple[str, str, str], dict] = {}
    for row in table_rows:
        place = (row["protocol"], row["method"], row["metric"])
        if place in by_place:
            raise ValueError(f"two rows for {' / '.join(place)}")
        by_place[place] = row
    out = []
    for protocol in dict.fromkeys(row["protocol"] for row in table_rows):
        methods = list(dict.fromkeys(row["method"] for row in table_rows if row["protocol"] == protocol))
        best = {metric: _best([by_place.get((protocol, method, metric)) for method in methods], metric)
                for metric in metrics}  # fmt: skip
        lines = []
        for method in methods:
            rows = [by_place.get((protocol, method, metric)) for metric in metrics]
            cells = [_cell(row, metric, best[metric]) for row, metric in zip(rows, metrics, strict=True)]
            counts = dict.fromkeys(str(row["n"]) for row in rows if row is not None)
            lines.append((METHOD_NAMES.get(method, method), "/".join(counts), cells))
        out.append(_Table(protocol, [METRICS[metric][0] for metric in metrics], lines))
    return out


def _best(rows: list[dict | None], metric: str) -> str | None:
    """The best mean as it is shown; None for a lone method, which is not the best of anything."""
    _, decimals, more = METRICS[metric]
    means = [row["mean"] for row in rows if row is not None]
    known = [mean for mean in means if not math.isnan(mean)]
    return f"{(max if more else min)(known):.{decimals}f}" if known and len(means) > 1 else None


def _cell(row: dict | None, metric: str, best: str | None) -> _Cell:
    if row is None:
        return _Cell("–", False)
    decimals = METRICS[metric][1]
    mean = f"{row['mean']:.{decimals}f}"
    spread = f" ± {row['std']:.{decimals}f}" if row["n"] > 1 else ""  # one subject has no spread
    return _Cell(mean + spread, mean == best)


def _markdown(text: str) -> str:
    return str(text).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _html_tables(table_rows: list[dict]) -> str:
    metrics = _metrics(table_rows)
    heads = "".join(f'<th scope="col" class="number">{escaped(METRICS[metric][0])}</th>' for metric in metrics)
    bodies = []
    for table in _tables(table_rows):
        lines = [f'<tr class="protocol"><th scope="rowgroup" colspan="{len(metrics) + 2}">'
                 f"Protocol {escaped(table.protocol)}</th></tr>"]  # fmt: skip
        for name, n, cells in table.lines:
            figures = ((escaped(cell.text), cell.best) for cell in cells)
            shown = "".join(
                f'<td class="number">{f"<strong>{text}</strong>" if best else text}</td>' for text, best in figures
            )
            lines.append(f'<tr><th scope="row">{escaped(name)}</th>{shown}<td class="number">{escaped(n)}</td></tr>')
        bodies.append("<tbody>" + "".join(lines) + "</tbody>")
    return (
        '<section><h2>Scores</h2><div class="scroll"><table><thead><tr><th scope="col">Method</th>'
        f'{heads}<th scope="col" class="number">n</th></tr></thead>{"".join(bodies)}</table></div>'
        '<p class="small">Mean ± standard deviation over n test subjects; the best of each protocol in bold. '
        f"Higher is better for PSNR and SSIM, lower for MAE{escaped(_units(table_rows))}.</p></section>"
    )


def _figure(caption: str, picture: str | Path, alt: str) -> str:
    try:
        data = base64.b64encode(Path(picture).read_bytes()).decode("ascii")
    except OSError as problem:
        raise PhmdiffError("PICTURE", f"a picture of the page cannot be read ({problem.strerror})",
                           "draw it first", exit_code=IO, file=picture) from None  # fmt: skip
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{escaped(alt)}">'
        f"<figcaption>{escaped(caption)}</figcaption></figure>"
    )


_STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #57606a; --line: #d8dee4; --tint: #f6f8fa; --accent: #0b5cad; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2rem 1.25rem 1rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 1rem; letter-spacing: -0.01em; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 0.75rem; }
.banner { border: 1px solid #d4a72c; border-left-width: 6px; background: #fff8e1; border-radius: 6px;
  padding: 0.75rem 1rem; margin: 0 0 1.5rem; }
.banner p { margin: 0.2rem 0; }
.banner p:first-child { font-weight: 600; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 0.6rem; margin: 0; }
.facts div { border: 1px solid var(--line); background: var(--tint); border-radius: 6px; padding: 0.55rem 0.8rem; }
.facts dt { color: var(--soft); font-size: 0.8rem; }
.facts dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.95rem; }
th, td { text-align: left; padding: 0.5rem 0.8rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { border-bottom: 2px solid var(--ink); font-size: 0.85rem; }
tbody th { font-weight: 400; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.protocol th { background: var(--tint); color: var(--soft); font-size: 0.8rem; font-weight: 600; }
strong { color: var(--accent); }
figure { margin: 0 0 1.5rem; }
img { display: block; max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: 6px; }
.narrow img { max-width: min(100%, 860px); }
figcaption, .small { color: var(--soft); font-size: 0.88rem; margin: 0.45rem 0 0; }
footer { max-width: 1120px; margin: 0 auto; padding: 1rem 1.25rem 2rem; color: var(--soft); font-size: 0.85rem; }
@media print {
  main { padding: 0; max-width: none; }
  figure, tr, .facts div, .banner { break-inside: avoid; }
  h2 { break-after: avoid; }
  .banner, .facts div, tr.protocol th { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
