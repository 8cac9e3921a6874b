"""What a training log shows over its steps: loss, loss and MMD of each level, validation PSNR."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

INK, FAINT, BLUE, ORANGE = "#1b1f24", "#8a929c", "#0072b2", "#d55e00"  # the last two: Okabe and Ito's palette
LEVELS = [(BLUE, "-"), (ORANGE, "--"), ("#009e73", "-."), ("#cc79a7", ":")]  # colour and dash: also told apart in grey
PANEL = 4.6, 3.0  # inches


def panels(log_records: list[dict], reference: dict[str, float] | None = None) -> list:
    """Functions of one ``Axes``, a panel each, of what the records hold; all mark the change of stage.

    log_records : see ``pictures.curves``; reference : name -> PSNR (dB)
    """
    out = []
    if losses := _series(log_records, "loss"):
        out.append(lambda axes: _draw_loss(axes, *losses))
    if scores := _series(log_records, "val_psnr"):
        out.append(lambda axes: _draw_psnr(axes, *scores, reference or {}))
    if terms := _series(log_records, "denoise"):
        out.append(lambda axes: _draw_levels(axes, *terms, "denoising loss"))
    if (terms_mmd := _series(log_records, "mmd")) and np.any(terms_mmd[1]):  # all 0 where it has no weight
        out.append(lambda axes: _draw_levels(axes, *terms_mmd, "MMD$^2$, noise predicted and drawn"))
    changes = _changes(log_records)
    return [lambda axes, draw=draw: _dressed(axes, draw, changes) for draw in out]


def _series(log_records: list[dict], key: str) -> tuple[np.ndarray, np.ndarray] | None:
    """(steps (n,), values (n,) or (n, levels)) of the records that have ``key``."""
    having = [record for record in log_records if record.get(key) is not None]
    if not having:
        return None
    return tuple(np.array([record[name] for record in having], dtype=np.float64) for name in ("step", key))


def _changes(log_records: list[dict]) -> list[tuple[float, str]]:
    """(step, new stage) wherever the stage is another than before."""
    stages = [(record["step"], record["stage"]) for record in log_records if record.get("stage")]
    return [(step, stage) for (_, before), (step, stage) in pairwise(stages) if stage != before]


def _dressed(axes, draw, changes: list[tuple[float, str]]) -> None:
    from matplotlib.ticker import MaxNLocator

    draw(axes)
    for step, stage in changes:
        axes.axvline(step, color=FAINT, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
        axes.text(step, 1.01, stage, transform=axes.get_xaxis_transform(), ha="center", va="bottom", size=7.5,
                  color=INK)  # fmt: skip
    axes.set_xlabel("optimizer step", size=9, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.tick_params(labelsize=8, colors=INK, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e4e7eb", linewidth=0.6)
    axes.set_axisbelow(True)


def _log_if_positive(axes, values: np.ndarray) -> None:
    finite = values[np.isfinite(values)]
    if finite.size and finite.min() > 0:
        axes.set_yscale("log")


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    return np.convolve(values, np.ones(window) / window, mode="valid")


def _draw_loss(axes, step: np.ndarray, loss: np.ndarray) -> None:
    _log_if_positive(axes, loss)
    window = max(1, len(loss) // 20)
    axes.plot(
        step, loss, color=BLUE, alpha=0.3 if window > 1 else 1.0, linewidth=0.8, marker="." if len(loss) < 30 else ""
    )
    if window > 1:
        axes.plot(_smooth(step, window), _smooth(loss, window), color=BLUE, linewidth=1.8, label=f"mean of {window}")
        axes.legend(frameon=False, fontsize=8)
    axes.set_ylabel("training loss", size=9, color=INK)


def _draw_levels(axes, step: np.ndarray, terms: np.ndarray, name: str) -> None:
    """terms (n, levels), fine to coarse; running means of as many records as in the loss."""
    _log_if_positive(axes, terms)
    window = max(1, len(step) // 20)
    last = terms.shape[1] - 1
    for level, values in enumerate(terms.T):
        colour, dash = LEVELS[level % len(LEVELS)]
        which = {0: " (fine)", last: " (coarse)"}.get(level, "") if last else ""
        axes.plot(_smooth(step, window), _smooth(values, window), color=colour, linestyle=dash, linewidth=1.0,
                  label=f"level {level}{which}")  # fmt: skip
    axes.legend(frameon=False, fontsize=7.5, title=f"mean of {window}" if window > 1 else None, title_fontsize=7.5)
    axes.set_ylabel(name, size=9, color=INK)


def _draw_psnr(axes, step: np.ndarray, psnr: np.ndarray, reference: dict[str, float]) -> None:
    axes.plot(step, psnr, color=ORANGE, linewidth=1.4, marker="o", markersize=3.5)
    axes.set_ylabel("validation PSNR (dB)", size=9, color=INK)
    for (name, value), dash in zip(reference.items(), ["--", ":", "-."] * len(reference), strict=False):
        axes.axhline(value, color=INK, linewidth=0.9, linestyle=dash, label=f"{name} {value:.2f} dB")
    finite = np.flatnonzero(np.isfinite(psnr))
    if finite.size:
        best = finite[psnr[finite].argmax()]
        axes.annotate(
            f"best {psnr[best]:.2f} dB\nat step {int(step[best])}", (step[best], psnr[best]), xytext=(0.97, 0.08),
            textcoords="axes fraction", ha="right", size=8, color=INK,
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.7},
        )  # fmt: skip
    if reference:
        axes.legend(loc="best", framealpha=0.8, edgecolor="none", fontsize=7.5)
