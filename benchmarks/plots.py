"""A page of plots from result files: ``python -m benchmarks.plots RESULTS.json ... --out page.html``.

Takes the JSON of ``python -m benchmarks.compare --json`` and of ``pytest --benchmark-json``. The page
is one file that opens offline: for every operation, direction and device, how many times as fast as
eager PyTorch each variant is and its share of the ceiling, by shape, then the figures as a table.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from phmdiff_fast.html_page import FOOT, HEAD, escaped

INK, FAINT, GRID = "#1b1f24", "#8a929c", "#e4e7eb"
# Okabe and Ito's palette; ours are those that stand out.
COLOURS = {"literal": "#b9c0c8", "eager": "#56b4e9", "compile": "#0072b2", "reference": "#e69f00",
           "extension": "#d55e00", "triton": "#d55e00"}  # fmt: skip
ORDER = list(COLOURS)
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .3rem; } h2 { font-size: 1.25rem; margin: 2.4rem 0 .2rem; }
figure { margin: 0; } img { width: 100%; height: auto; } .note, figcaption { color: #5b6470; font-size: .88rem; }
details { margin: .6rem 0; } summary { cursor: pointer; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { text-align: right; padding: .2rem .7rem; border-bottom: 1px solid #e4e7eb; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
footer { margin-top: 3rem; color: #5b6470; font-size: .85rem; border-top: 1px solid #e4e7eb; padding-top: .6rem; }
"""


def read(paths: Iterable[Path]) -> tuple[list[dict], list[dict]]:
    """(rows of operations, other timings) of result files; of equal rows the last one stays.

    Raises ValueError for a file that is neither of the two kinds.
    """
    rows, others = {}, []
    for path in paths:
        found = json.loads(Path(path).read_text())
        if not isinstance(found, dict) or not {"compare", "benchmarks"} & set(found):
            raise ValueError(f"{path}: neither of benchmarks.compare nor of pytest-benchmark")
        for record in found.get("compare", []):
            for variant, figures in record["variants"].items():
                row = {**record, **figures, "variant": variant}
                row["seconds"] = figures.get("graph_s") or figures.get("call_s")
                rows[_key(row)] = row
        for bench in found.get("benchmarks", []):
            info, median = bench["extra_info"], bench["stats"]["median"]
            if "share" in info:
                rows[_key(info)] = {**info, "call_s": median, "seconds": info.get("graph_s") or median}
            else:
                machine = found["machine_info"]
                device = machine.get("gpu") if "cuda" in bench["name"] else machine["cpu"].get("brand_raw", "CPU")
                others.append({"name": bench["name"], "group": bench["group"], "seconds": median, "device": device,
                               "commit": machine.get("commit", ""), "date": found["datetime"][:10]})  # fmt: skip
    return list(rows.values()), others


def _key(row: dict) -> tuple:
    return tuple(row[name] for name in ("device", "op", "way", "shape", "variant"))


def grouped(rows: list[dict], *names: str) -> dict[tuple, list[dict]]:
    out: dict[tuple, list[dict]] = {}
    for row in rows:
        out.setdefault(tuple(row[name] for name in names), []).append(row)
    return out


def _duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1 or unit == "µs":
            return f"{seconds * scale:.3g} {unit}"
    raise AssertionError


def _label(axes, x: float, y: float, text: str, colour: str = INK) -> None:
    """Beside the end of a bar, readable over the dashed line."""
    plate = {"facecolor": "white", "edgecolor": "none", "pad": 0.4, "alpha": 0.85}
    axes.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", size=8, color=colour, bbox=plate)


def figure(rows: list[dict]) -> str:
    """Bars of one operation, direction and device, as an SVG: left the speed over eager, right the share."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    shapes = list(grouped(rows, "shape"))
    variants = [v for v in ORDER if any(r["variant"] == v for r in rows)]
    variants += sorted({r["variant"] for r in rows} - set(variants))
    height = 1 / (len(variants) + 1)
    fig, (left, right) = plt.subplots(1, 2, sharey=True, layout="constrained",
                                      figsize=(10.5, 0.9 + len(shapes) * (0.25 * len(variants) + 0.22)))  # fmt: skip
    of = {(r["shape"], r["variant"]): r for r in rows}
    for place, (shape,) in enumerate(shapes):
        eager = of.get((shape, "eager"), {}).get("seconds")
        for step, variant in enumerate(variants):
            row = of.get((shape, variant))
            at = place + (step - (len(variants) - 1) / 2) * height
            if not row or not row.get("seconds"):
                if row:
                    _label(left, 0, at, f"{variant}: {row['error'][:40]}", colour=FAINT)
                continue
            look = {"height": height * 0.92, "color": COLOURS.get(variant, FAINT)}
            speed = eager / row["seconds"] if eager else 0
            left.barh(at, speed, **look)
            _label(left, speed, at, f"{speed:.2f}×  {_duration(row['seconds'])}")
            right.barh(at, row["share"], **look)
            _label(right, row["share"], at, f"{row['share']:.1%}{'*' if row['cached'] else ''}")
    left.set_yticks(range(len(shapes)), [shape for (shape,) in shapes], size=8.5, color=INK)
    left.invert_yaxis()
    left.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 2)), zorder=0.9)
    right.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 2)), zorder=0.9)
    left.set_xlabel("times as fast as eager (more is better)", size=9, color=INK)
    right.set_xlabel("share of the device's ceiling", size=9, color=INK)
    right.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
    for axes in (left, right):
        axes.set_xlim(0, max(axes.get_xlim()[1], 1.0) * 1.25)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(labelsize=8.5, colors=INK, length=0)
        axes.grid(True, axis="x", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
    patches = [plt.Rectangle((0, 0), 1, 1, color=COLOURS.get(v, FAINT)) for v in variants]
    fig.legend(patches, variants, loc="outside upper center", ncols=len(variants), frameon=False, fontsize=8.5)
    text = io.StringIO()
    fig.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(fig)
    return text.getvalue()


def _origin(rows: list[dict]) -> str:
    """ "device, date, commit, torch" of the rows; several where they differ."""
    parts = []
    for name in ("device", "date", "commit", "torch"):
        values = sorted({str(r[name]) for r in rows if r.get(name)})
        parts.append(("" if name in ("device", "date") else f"{name} ") + " / ".join(values))
    return ", ".join(parts)


def _table(rows: list[dict]) -> str:
    heads = ("shape", "variant", "call", "CUDA graph", "floor", "GB/s", "TFLOP/s", "share", "memory on top")
    lines = ["<div class='scroll'><table><tr>" + "".join(f"<th>{h}</th>" for h in heads) + "</tr>"]
    for r in rows:
        if not r.get("seconds"):
            lines.append(f"<tr><td>{escaped(r['shape'])}</td><td>{escaped(r['variant'])}</td>"
                         f"<td colspan='7'>{escaped(r['error'])}</td></tr>")  # fmt: skip
            continue
        cells = (
            r["shape"], r["variant"], _duration(r["call_s"]), _duration(r["graph_s"]) if r.get("graph_s") else "–",
            f"{r['floor_bytes'] / 2**20:.3g} MiB", f"{r['gb_per_s']:.4g}",
            f"{r['tflop_per_s']:.3g}" if "tflop_per_s" in r else "–", f"{r['share']:.1%}{'*' if r['cached'] else ''}",
            f"{r['peak_bytes'] / 2**20:.4g} MiB" if r.get("peak_bytes") is not None else "–",
        )  # fmt: skip
        lines.append("<tr>" + "".join(f"<td>{escaped(c)}</td>" for c in cells) + "</tr>")
    return "\n".join([*lines, "</table></div>"])


def page(rows: list[dict], others: list[dict], title: str = "Kernels: speed and share of the ceiling") -> str:
    out = [HEAD.format(title=escaped(title), style=STYLE), f"<h1>{escaped(title)}</h1>"]
    if not rows and not others:
        out.append("<p>The files hold no timings.</p>")
    if rows:
        out.append(
            "<p class='note'>Medians. <b>literal</b> is the form found in other code, <b>eager</b> tuned PyTorch, "
            "<b>compile</b> torch.compile of eager, <b>reference</b>, <b>extension</b> and <b>triton</b> are ours. "
            "On a GPU bars show the replayed CUDA graph. The ceiling is a copy, or a bf16 product where arithmetic "
            "binds; a share marked * moves less than 256 MiB, so that caches take part and it may exceed 100 %. "
            "The dashed lines are eager and the ceiling.</p>"
        )
    for (device, op, way), part in grouped(rows, "device", "op", "way").items():
        drawn = base64.b64encode(figure(part).encode()).decode()
        said = f"{op} {way} on {device}: speed over eager and share of the ceiling by shape and variant"
        ceilings = " / ".join(sorted({r["ceiling"] for r in part if r.get("ceiling")}))
        out += [
            f"<h2>{escaped(op)}, {escaped(way)}</h2>",
            f"<figure><img alt='{escaped(said)}' src='data:image/svg+xml;base64,{drawn}'>",
            f"<figcaption>{escaped(_origin(part))}. Ceiling: {escaped(ceilings)}.</figcaption></figure>",
            f"<details><summary>Figures</summary>{_table(part)}</details>",
        ]
    if others:
        out.append("<h2>Whole steps</h2><div class='scroll'><table><tr><th>what</th><th>case</th><th>median</th>"
                   "<th>device</th><th>date</th><th>commit</th></tr>")  # fmt: skip
        for r in others:
            cells = (r["group"] or "", r["name"], _duration(r["seconds"]), r["device"], r["date"], r["commit"])
            out.append("<tr>" + "".join(f"<td>{escaped(c)}</td>" for c in cells) + "</tr>")
        out.append("</table></div>")
    return "\n".join([*out, FOOT])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        rows, others = read(args.results)
    except (OSError, ValueError, KeyError) as problem:
        print(f"plots: {problem}", file=sys.stderr)
        return 1
    args.out.write_text(page(rows, others), encoding="utf-8")
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
