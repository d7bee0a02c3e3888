"""The curves of a report: small multiples on one style, as PNG data URIs.

matplotlib's object interface is used, without pyplot: no window system, no global state, safe beside a notebook's own.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["COLOURS", "Series", "figure"]

COLOURS = ("#3b5bdb", "#0ca678", "#e8590c", "#9c36b5", "#1098ad", "#66a80f")
INK, FAINT = "#343a40", "#e9ecef"


@dataclass(frozen=True)
class Series:
    """One line of a panel.

    Attributes:
        label: in the legend; "" for none.
        x: places.
        y: values; NaN leaves a gap.
        error: standard errors, drawn as a band.
        colour: of the line.
        smooth: width of a running mean drawn over the faint raw values.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None
    colour: str = COLOURS[0]
    smooth: int = 0


def figure(
    panels: Mapping[str, Sequence[Series]],
    xlabel: str,
    *,
    percent: Sequence[str] = (),
    lines: Mapping[str, float] | None = None,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """Draw panels side by side, three a row.

    Args:
        panels: title → lines; a panel without points is left out.
        xlabel: of all panels.
        percent: titles of panels whose values are shares.
        lines: title → a level to mark.
        marks: places on the x axis to mark in every panel, with their colours.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    shown = {k: [s for s in v if len(s.x)] for k, v in panels.items()}
    shown = {k: v for k, v in shown.items() if v}
    if not shown:
        return ""
    columns = 3  # always, so that one and two panels are no larger than three
    rows = math.ceil(len(shown) / columns)
    fig = Figure(figsize=(4.1 * columns, 2.75 * rows), dpi=160, layout="constrained")
    FigureCanvasAgg(fig)
    for i, (title, series) in enumerate(shown.items()):
        ax = fig.add_subplot(rows, columns, i + 1)
        for s in series:
            _draw(ax, s)
        if lines and title in lines:
            ax.axhline(lines[title], color="#868e96", linewidth=1, linestyle=(0, (4, 3)))
        for x, colour in marks:
            ax.axvline(x, color=colour, linewidth=1.2, linestyle=(0, (2, 2)))
        if title in percent:
            ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _dress(ax, title, xlabel, any(s.label for s in series))
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", facecolor="white")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _draw(ax: Any, s: Series) -> None:
    y = list(s.y)
    if s.smooth > 1 and len(y) > s.smooth:
        ax.plot(s.x, y, color=s.colour, alpha=0.2, linewidth=0.8)
        y = _running(y, s.smooth)
    marker = "o" if len(y) <= 40 and not s.smooth else None
    ax.plot(s.x, y, color=s.colour, linewidth=1.8, label=s.label or None, marker=marker, markersize=3.2)
    if s.error is not None:
        low, high = ([a + k * b for a, b in zip(y, s.error, strict=True)] for k in (-1, 1))
        ax.fill_between(s.x, low, high, color=s.colour, alpha=0.15, linewidth=0)


def _running(y: list[float], width: int) -> list[float]:
    """Return the mean of the last ``width`` values at each place."""
    out = []
    for i in range(len(y)):
        part = [v for v in y[max(0, i - width + 1) : i + 1] if not math.isnan(v)]
        out.append(sum(part) / len(part) if part else math.nan)
    return out


def _dress(ax: Any, title: str, xlabel: str, legend: bool) -> None:
    ax.set_title(title, fontsize=10, color=INK, loc="left", fontweight="bold")
    ax.set_xlabel(xlabel, fontsize=8, color=INK)
    ax.tick_params(labelsize=8, colors=INK, length=0)
    ax.grid(True, color=FAINT, linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color("#ced4da")
    if legend:
        ax.legend(fontsize=7.5, frameon=False, labelcolor=INK)
