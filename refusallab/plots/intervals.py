"""Estimates with their intervals: in rows, and along a curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from refusallab.measure import Difference, Rate
from refusallab.plots.style import MARKS, PALETTE, legend_above, panels

Estimate = Rate | Difference
SHARE = "share of prompts, with 95 % Wilson interval"


def reach(estimates: Sequence[Estimate]) -> np.ndarray:
    """How far the intervals reach below and above their values: [2, n]."""
    return np.array([[max(e.value - e.low, 0.0), max(e.high - e.value, 0.0)] for e in estimates]).T


def interval_band(
    axis: Axes, x: Sequence[float], estimates: Sequence[Estimate], *, alpha: float = 0.15, **style: Any
) -> None:
    """A curve through the estimates, and a band of its colour that holds their intervals."""
    (line,) = axis.plot(x, [e.value for e in estimates], **style)
    lows, highs = [e.low for e in estimates], [e.high for e in estimates]
    axis.fill_between(x, lows, highs, color=line.get_color(), alpha=alpha, linewidth=0)


def interval_rows(axis: Axes, table: Mapping[str, Mapping[str, Estimate]]) -> None:
    """A row for each name of the table, and in it a marker with its interval for each estimate."""
    kinds = list(dict.fromkeys(kind for estimates in table.values() for kind in estimates))
    apart = min(0.17, 0.6 / len(kinds))
    for k, kind in enumerate(kinds):
        rows = [row for row, estimates in enumerate(table.values()) if kind in estimates]
        shown = [estimates[kind] for estimates in table.values() if kind in estimates]
        axis.errorbar(
            [e.value for e in shown],
            [row + apart * (k - (len(kinds) - 1) / 2) for row in rows],
            xerr=reach(shown),
            fmt=MARKS[k % 6],
            color=PALETTE[k % 6],
            markersize=6.5,
            label=kind,
        )
    axis.set_yticks(range(len(table)), list(table))
    axis.set_ylim(len(table) - 0.5, -0.5)
    axis.grid(axis="y", alpha=0.3)


def rate_rows(table: dict[str, dict[str, Rate]], x: str = SHARE) -> Figure:
    """Shares with intervals: a row for each condition, a marker for each metric."""
    return rate_panels({"": table}, x)


def rate_panels(tables: dict[str, dict[str, dict[str, Rate]]], x: str = SHARE) -> Figure:
    """Shares with intervals, a panel for each table: panel -> condition -> metric -> share. All have the same rows."""
    rows = list(next(iter(tables.values())))
    width = 8.5 if len(tables) == 1 else 3.4 * len(tables) + 1.8
    figure, axes = panels(len(tables), width, 0.5 * len(rows) + 1.3, sharex=True, sharey=True)
    for axis, (name, table) in zip(axes, tables.items(), strict=True):
        interval_rows(axis, {row: table[row] for row in rows})
        axis.set_title(name)
    axes[0].set_xlim(-0.03, 1.03)
    figure.supxlabel(x, fontsize=10)
    legend_above(figure)
    return figure


def difference_rows(table: dict[str, dict[str, Difference]], x: str) -> Figure:
    """Changes with their paired intervals: a row for each task, a marker for each condition."""
    figure, (axis,) = panels(1, 8.5, 0.5 * len(table) + 1.4)
    interval_rows(axis, table)
    axis.axvline(0, color="black", linewidth=0.8, linestyle="--")
    axis.set_xlabel(x)
    legend_above(figure)
    return figure
