"""PNG pictures for people: strips of slices with error maps, the levels of the pyramid, training curves.

Images come as (H, W) arrays in RAS, as the network sees them ([x, y] where axial), and are turned
upright: front of the head (axial) or its top up, the patient's left at the left of the picture
(neurological view, marked L and R); sagittal slices face right (marked P and A). Files are written
under a temporary name and renamed.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from . import curves as training
from .curves import INK
from .files import whole_file

ERROR_TOP = 0.5  # |error| at the end of the colour scale, of a range of 2: fixed, so that strips compare
ERROR_MAP = "magma"  # readable without colour vision, and on grey print
CELL, GAP, BAR, LETTER = 1.3, 0.05, 0.85, 0.075  # inches: a picture, between two, the colour bar, a letter of a label
DPI = 110
SIDES = {"axial": "LR", "coronal": "LR", "sagittal": "PA"}  # what lies at the left and right of an upright slice


def strip(path: str | Path, rows: list[dict], *, title: str | None = None, axis: str = "axial") -> Path:
    """One row per slice: source(s) | other methods | synthesized | truth | |error| of each method.

    rows : dicts with
        ``label``        text at the left, may have several lines
        ``source``       (H, W) or a list of them
        ``synthesized``  (H, W), ours
        ``truth``        (H, W)
        ``others``       optional ``{method: (H, W)}``, shown before ours
        ``source_names`` optional list of names for the source columns
    axis : "axial" (images [x, y]), "coronal" ([x, z]) or "sagittal" ([y, z])
    All images in [-1, 1], grey from -1 to 1; |error| = |image - truth| on a fixed scale 0 to 0.5.
    Column heads are those of the first row; every row must have the same columns.

    Raises ValueError if rows are missing, differ in their columns, an image has another shape than
    its truth, or for another axis; PhmdiffError OUTPUT_WRITE (exit 74) if the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if axis not in SIDES:
        raise ValueError(f"unknown axis {axis!r}, known: {', '.join(SIDES)}")
    if not rows:
        raise ValueError("a strip needs at least one row")
    table = [_columns(row) for row in rows]  # per row: [(head, image, is_error), ...]
    heads = [head for head, _, _ in table[0]]
    if any([head for head, _, _ in columns] != heads for columns in table):
        raise ValueError("the rows of a strip have different columns")

    heights = [CELL * max(image.shape[0] / image.shape[1] for _, image, _ in columns) for columns in table]
    head_lines = max(head.count("\n") + 1 for head in heads)
    top = 0.1 + 0.17 * head_lines + (0.28 if title else 0.0)
    label_width = 0.2 + LETTER * max(len(line) for row in rows for line in str(row["label"]).split("\n"))
    first_error = next(i for i, (_, _, is_error) in enumerate(table[0]) if is_error)
    lefts = [label_width + i * (CELL + GAP) + (2 * GAP if i >= first_error else 0.0) for i in range(len(heads))]
    width = lefts[-1] + CELL + BAR
    height = top + sum(heights) + GAP * (len(rows) - 1) + 0.1

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)

    def axes_at(left, below, wide, tall):
        return figure.add_axes((left / width, below / height, wide / width, tall / height))

    if title:
        figure.text(0.1 / width, 1 - 0.1 / height, title, va="top", size=11, weight="bold", color=INK)
    below = height - top
    error_image = None
    for r, (row, columns) in enumerate(zip(rows, table, strict=True)):
        below -= heights[r] + (GAP if r else 0.0)
        figure.text(0.1 / width, (below + heights[r] / 2) / height, str(row["label"]), va="center", size=8.5, color=INK)
        for left, (head, image, is_error) in zip(lefts, columns, strict=True):
            axes = axes_at(left, below, CELL, heights[r])
            axes.set_axis_off()
            shown = axes.imshow(image, interpolation="bilinear", **_scale(is_error))
            error_image = shown if is_error else error_image
            if r == 0:
                ours = head.startswith("synthesized")
                axes.set_title(head, size=8.5, pad=4, color=INK, weight="bold" if ours else "normal")
                if left == lefts[0]:
                    _mark_sides(axes, axis)

    bar_height = min(height - top - 0.1, 2.4)
    bar_axes = axes_at(lefts[-1] + CELL + 0.1, (height - top + 0.1 - bar_height) / 2, 0.11, bar_height)
    _error_bar(bar_axes, error_image)
    return _save(path, canvas, _strip_palette())


def levels(path: str | Path, rows: list[dict], *, title: str | None = None, axis: str = "axial") -> Path:
    """What each level of the pyramid makes (the paper's Fig. 9): coarse to fine from left to right.

    rows : dicts with
        ``label``      text at the left, may have several lines
        ``estimates``  (H_n, W_n) of each level, fine to coarse, in [-1, 1]
        ``truths``     the same
    axis : as in ``strip``
    Per row three lines: estimate, truth, |error| (scales as in ``strip``). A level is enlarged to the
    cell of the finest without interpolation, so that its pixels are seen, and below it stands its
    PSNR in dB (data range 2).

    Raises ValueError if rows are missing, the rows' levels differ, an estimate has another shape than
    its truth, or for another axis; PhmdiffError OUTPUT_WRITE (exit 74) as ``strip``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if axis not in SIDES:
        raise ValueError(f"unknown axis {axis!r}, known: {', '.join(SIDES)}")
    if not rows:
        raise ValueError("a picture of levels needs at least one row")
    pairs = [_level_pairs(row) for row in rows]
    shapes = [truth.shape for _, truth in pairs[0]]
    if any([truth.shape for _, truth in row] != shapes for row in pairs):
        raise ValueError("the rows have levels of different shapes")

    # All in whole pixels, from the top left: a cell is a whole multiple of the finest level.
    factor = max(1, -(-128 // max(shapes[0])))
    wide, tall = shapes[0][0] * factor, shapes[0][1] * factor  # images are [x, y]
    gap, line, edge = 6, 19, 11
    label_width = edge + round(
        DPI * (0.1 + LETTER * max(len(t) for row in rows for t in str(row["label"]).split("\n")))
    )
    left = label_width + round(DPI * LETTER * 9)  # room for "estimate"
    top = edge + (31 if title else 0) + 2 * line
    block = 3 * tall + 2 * gap + line + edge
    width = left + len(shapes) * (wide + gap) + round(DPI * BAR)
    height = top + len(rows) * block
    figure = Figure(figsize=((width + 0.01) / DPI, (height + 0.01) / DPI), dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)

    def axes_at(x, y, w, h):
        return figure.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))

    def write(x, y, text, **more):
        figure.text(x / width, 1 - y / height, text, **{"size": 8.5, "color": INK, "va": "center", **more})

    if title:
        write(edge, edge, title, va="top", size=11, weight="bold")
    for r, (row, levels_of_row) in enumerate(zip(rows, pairs, strict=True)):
        y = top + r * block
        write(edge, y + (block - edge) / 2, str(row["label"]))
        for i, name in enumerate(("estimate", "truth", "|error|")):
            write(left - gap, y + i * (tall + gap) + tall / 2, name, ha="right", size=8)
        for column, level in enumerate(reversed(range(len(shapes)))):
            estimate, truth = levels_of_row[level]
            x = left + column * (wide + gap)
            images = estimate, truth, np.abs(estimate - truth)
            for i, image in enumerate(images):
                axes = axes_at(x, y + i * (tall + gap), wide, tall)
                axes.set_axis_off()
                shown = axes.imshow(np.rot90(image), interpolation="nearest", aspect="auto", **_scale(i == 2))
                if r == column == i == 0:
                    _mark_sides(axes, axis)
            write(x + wide / 2, y + block - edge - line / 2, _psnr_text(estimate, truth), ha="center")
            if r == 0:
                head = f"level {level}\n{shapes[level][0]} x {shapes[level][1]}"
                write(x + wide / 2, y - line, head, ha="center", weight="normal" if level else "bold")
    bar_height = min(height - top - line - edge, 264)
    _error_bar(axes_at(width - round(DPI * BAR) + gap, top, 12, bar_height), shown)
    return _save(path, canvas, _strip_palette())


def curves(
    path: str | Path,
    log_records: list[dict],
    *,
    title: str | None = None,
    reference: dict[str, float] | None = None,
) -> Path:
    """Loss over steps (log scale, running mean over it) and, where recorded, what else the log holds.

    log_records : dicts with ``step``, ``loss`` and, in some, ``val_psnr`` (dB), ``denoise`` and
        ``mmd`` (lists over the levels, fine to coarse; each its own panel), ``stage`` (a line marks
        where it changes)
    reference : name -> dB, horizontal lines in the panel of ``val_psnr``
    Raises ValueError without a loss or score; PhmdiffError OUTPUT_WRITE (exit 74) as ``strip``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = training.panels(log_records, reference)
    if not panels:
        raise ValueError("there is no loss and no validation score to draw")
    across = min(len(panels), 2)
    down = -(-len(panels) // across)
    wide, tall = training.PANEL
    figure = Figure(figsize=(wide * across, tall * down), dpi=DPI, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, size=11, weight="bold", color=INK)
    for index, draw in enumerate(panels):
        draw(figure.add_subplot(down, across, index + 1))
    return _save(path, canvas)


def calibration(path: str | Path, found) -> Path:
    """Error over predicted deviation, a point a bin, with the line on which both are equal.

    found : ``evaluate.Calibration``. Raises PhmdiffError OUTPUT_WRITE (exit 74) as ``strip``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 4.2), dpi=DPI, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    top = 1.05 * max(*found.deviation, *found.error, 1e-6)
    axes.plot([0, top], [0, top], color="#8a929c", linestyle="--", linewidth=1, label="calibrated")
    axes.plot(found.deviation, found.error, "o-", color="#0072b2", markersize=4, label="this run")
    axes.set(xlim=(0, top), ylim=(0, top))
    axes.set_xlabel("predicted standard deviation (of a range of 2)", size=9, color=INK)
    axes.set_ylabel("root mean square error", size=9, color=INK)
    axes.set_title(f"error / deviation {found.ratio:.2f}, rank correlation {found.rank_correlation:.2f}", size=9.5,
                   color=INK)  # fmt: skip
    axes.tick_params(labelsize=8, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e4e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return _save(path, canvas)


def _columns(row: dict) -> list[tuple[str, np.ndarray, bool]]:
    """(head, upright image, whether it is an error map) from left to right."""
    sources = row["source"] if isinstance(row["source"], (list, tuple)) else [row["source"]]
    names = row.get("source_names") or (
        [f"source {i + 1}" for i in range(len(sources))] if len(sources) > 1 else ["source"]
    )
    if len(names) != len(sources):
        raise ValueError(f"{len(sources)} sources have {len(names)} names")
    truth = np.asarray(row["truth"], dtype=np.float64)
    methods = {**row.get("others", {}), "synthesized": row["synthesized"]}
    images = [(str(name), image) for name, image in zip(names, sources, strict=True)]
    images += [*methods.items(), ("truth", truth)]
    out = []
    for head, image in images:
        image = np.asarray(image, dtype=np.float64)
        if image.ndim != 2 or image.shape != truth.shape:
            raise ValueError(f"{head!r} is {image.shape}, the truth is {truth.shape}, both must be one (H, W)")
        out.append((head, np.rot90(image), False))
    for head, image in methods.items():
        name = "|error|" if len(methods) == 1 else f"|error|\n{head}"
        out.append((name, np.rot90(np.abs(np.asarray(image, dtype=np.float64) - truth)), True))
    return out


def _level_pairs(row: dict) -> list[tuple[np.ndarray, np.ndarray]]:
    """(estimate, truth) of each level, fine to coarse."""
    if not row["truths"] or len(row["estimates"]) != len(row["truths"]):
        raise ValueError(f"{len(row['estimates'])} estimates and {len(row['truths'])} truths are no levels")
    out = []
    for level, pair in enumerate(zip(row["estimates"], row["truths"], strict=True)):
        estimate, truth = (np.asarray(image, dtype=np.float64) for image in pair)
        if truth.ndim != 2 or estimate.shape != truth.shape:
            raise ValueError(f"level {level} is {estimate.shape}, its truth {truth.shape}, both must be one (H, W)")
        out.append((estimate, truth))
    return out


def _psnr_text(estimate: np.ndarray, truth: np.ndarray) -> str:
    """10 log10(2^2 / MSE), the data range being 2."""
    mse = np.mean((estimate - truth) ** 2)
    return f"{10 * np.log10(4 / mse):.2f} dB" if mse else "exact"


def _scale(is_error: bool) -> dict:
    return {"cmap": ERROR_MAP, "vmin": 0, "vmax": ERROR_TOP} if is_error else {"cmap": "gray", "vmin": -1, "vmax": 1}


def _mark_sides(axes, axis: str) -> None:
    for side, x, ha in zip(SIDES[axis], (0.03, 0.97), ("left", "right"), strict=True):
        axes.text(x, 0.97, side, transform=axes.transAxes, ha=ha, va="top", size=7, color="white")


def _error_bar(axes, error_image) -> None:
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Normalize

    bar = Colorbar(axes, mappable=error_image, norm=Normalize(0, ERROR_TOP), extend="max", ticks=[0, 0.25, 0.5])
    bar.ax.tick_params(labelsize=7.5, length=2, colors=INK)
    bar.set_label("|error| (of a range of 2)", size=7.5, color=INK)
    bar.outline.set_linewidth(0.4)


def _strip_palette() -> np.ndarray:
    """(256, 3) uint8: 128 greys and 128 colours of the error map, all that a strip shows."""
    from matplotlib import colormaps

    share = np.linspace(0, 1, 128)
    colours = np.concatenate([colormaps[name](share)[:, :3] for name in ("gray", ERROR_MAP)])
    return np.round(255 * colours).astype(np.uint8)


def _nearest(pixels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """(height, width) uint8 indices of the nearest colours; Pillow's own search turns white to grey."""
    packed = pixels.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.int32)
    found, where = np.unique(packed, return_inverse=True)
    colours = np.stack([found >> 16, found >> 8 & 255, found & 255], axis=-1)  # (U, 3)
    apart = ((colours[:, None] - palette.astype(np.int32)) ** 2).sum(-1)  # (U, 256)
    return apart.argmin(1).astype(np.uint8)[where].reshape(packed.shape)


def _save(path: str | Path, canvas, palette: np.ndarray | None = None) -> Path:
    """Draw and write; with a palette (256, 3) uint8 a pixel takes one byte."""
    from PIL import Image

    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]  # (height, width, 3)
    if palette is None:
        picture = Image.fromarray(pixels)
    else:
        picture = Image.fromarray(_nearest(pixels, palette))
        picture.putpalette(palette.tobytes())
    png = io.BytesIO()
    picture.save(png, format="png", optimize=True, dpi=(DPI, DPI))
    path = Path(path)
    with whole_file(path) as file:
        file.write(png.getvalue())
    return path
