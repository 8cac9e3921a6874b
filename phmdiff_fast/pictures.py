"""PNG pictures for people: strips of slices with error maps, and training curves.

Images come as (H, W) arrays [x, y] in RAS, as the network sees them, and are turned upright: front
of the head up, the patient's left at the left of the picture (neurological view, marked L and R).
Files are written under a temporary name and renamed.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from .files import whole_file

ERROR_TOP = 0.5  # |error| at the end of the colour scale, of a range of 2: fixed, so that strips compare
ERROR_MAP = "magma"  # readable without colour vision, and on grey print
CELL, GAP, BAR, LETTER = 1.3, 0.05, 0.85, 0.075  # inches: a picture, between two, the colour bar, a letter of a label
DPI = 110
INK, FAINT, BLUE, ORANGE = "#1b1f24", "#8a929c", "#0072b2", "#d55e00"  # the last two: Okabe and Ito's palette


def strip(path: str | Path, rows: list[dict], *, title: str | None = None) -> Path:
    """One row per slice: source(s) | other methods | synthesized | truth | |error| of each method.

    rows : dicts with
        ``label``        text at the left, may have several lines
        ``source``       (H, W) or a list of them
        ``synthesized``  (H, W), ours
        ``truth``        (H, W)
        ``others``       optional ``{method: (H, W)}``, shown before ours
        ``source_names`` optional list of names for the source columns
    All images in [-1, 1], grey from -1 to 1; |error| = |image - truth| on a fixed scale 0 to 0.5.
    Column heads are those of the first row; every row must have the same columns.

    Raises ValueError if rows are missing, differ in their columns or an image has another shape
    than its truth; PhmdiffError OUTPUT_WRITE (exit 74) if the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

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
            scale = (
                {"cmap": ERROR_MAP, "vmin": 0, "vmax": ERROR_TOP}
                if is_error
                else {"cmap": "gray", "vmin": -1, "vmax": 1}
            )
            shown = axes.imshow(image, interpolation="bilinear", **scale)
            error_image = shown if is_error else error_image
            if r == 0:
                ours = head.startswith("synthesized")
                axes.set_title(head, size=8.5, pad=4, color=INK, weight="bold" if ours else "normal")
                if left == lefts[0]:
                    for side, x in (("L", 0.03), ("R", 0.97)):
                        axes.text(x, 0.97, side, transform=axes.transAxes, ha="left" if side == "L" else "right",
                                  va="top", size=7, color="white")  # fmt: skip

    bar_height = min(height - top - 0.1, 2.4)
    bar_axes = axes_at(lefts[-1] + CELL + 0.1, (height - top + 0.1 - bar_height) / 2, 0.11, bar_height)
    bar = Colorbar(bar_axes, mappable=error_image, norm=Normalize(0, ERROR_TOP), extend="max", ticks=[0, 0.25, 0.5])
    bar.ax.tick_params(labelsize=7.5, length=2, colors=INK)
    bar.set_label("|error| (of a range of 2)", size=7.5, color=INK)
    bar.outline.set_linewidth(0.4)
    return _save(path, canvas, _strip_palette())


def curves(path: str | Path, log_records: list[dict], *, title: str | None = None) -> Path:
    """Loss over steps (log scale, running mean over it) and, where recorded, validation PSNR.

    log_records : dicts with ``step``, ``loss`` and, in some, ``val_psnr`` (dB)
    Raises ValueError without a record; PhmdiffError OUTPUT_WRITE (exit 74) as ``strip``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    losses = [(record["step"], record["loss"]) for record in log_records if record.get("loss") is not None]
    scores = [(record["step"], record["val_psnr"]) for record in log_records if record.get("val_psnr") is not None]
    if not losses and not scores:
        raise ValueError("there is no loss and no validation score to draw")

    panels = [panel for panel in (losses, scores) if panel]
    figure = Figure(figsize=(4.6 * len(panels), 3.0), dpi=DPI, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, size=11, weight="bold", color=INK)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        step, value = np.array(panel, dtype=np.float64).T  # (n,), (n,)
        if panel is losses:
            _draw_loss(axes, step, value)
        else:
            _draw_psnr(axes, step, value)
        axes.set_xlabel("optimizer step", size=9, color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.tick_params(labelsize=8, colors=INK, which="both")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#e4e7eb", linewidth=0.6)
        axes.set_axisbelow(True)
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


def _draw_loss(axes, step: np.ndarray, loss: np.ndarray) -> None:
    positive = loss[np.isfinite(loss)]
    if positive.size and positive.min() > 0:
        axes.set_yscale("log")
    window = max(1, len(loss) // 20)
    axes.plot(
        step, loss, color=BLUE, alpha=0.3 if window > 1 else 1.0, linewidth=0.8, marker="." if len(loss) < 30 else ""
    )
    if window > 1:
        share = np.ones(window) / window
        middle = np.convolve(step, share, mode="valid")
        axes.plot(middle, np.convolve(loss, share, mode="valid"), color=BLUE, linewidth=1.8, label=f"mean of {window}")
        axes.legend(frameon=False, fontsize=8)
    axes.set_ylabel("training loss", size=9, color=INK)


def _draw_psnr(axes, step: np.ndarray, psnr: np.ndarray) -> None:
    axes.plot(step, psnr, color=ORANGE, linewidth=1.4, marker="o", markersize=3.5)
    axes.set_ylabel("validation PSNR (dB)", size=9, color=INK)
    finite = np.flatnonzero(np.isfinite(psnr))
    if finite.size:
        best = finite[psnr[finite].argmax()]
        axes.annotate(
            f"best {psnr[best]:.2f} dB\nat step {int(step[best])}", (step[best], psnr[best]), xytext=(0.97, 0.08),
            textcoords="axes fraction", ha="right", size=8, color=INK,
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.7},
        )  # fmt: skip


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
