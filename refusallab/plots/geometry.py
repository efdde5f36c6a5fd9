"""Figures of where prompts lie and how directions turn: planes, rows of dots, grids over layers and positions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from refusallab.plots.heatmaps import DIVERGING, colour_bar, heat_map
from refusallab.plots.style import COLOURS, LEGIBLE, MARKERS, MARKS, kind_of, legend_above, number, panels, thinned


def share_grids(grids: dict[str, Tensor], positions: Sequence[int], label: str) -> Figure:
    """Lab 03: one number for every layer and position, [layers, positions], a grid for each name.

    The numbers are written in the cells, unless the model is so deep that they would not fit.
    """
    figure, axes = panels(len(grids), 6.3 * len(grids), 0.42 * len(positions) + 1.2)
    for axis, (name, grid) in zip(axes, grids.items(), strict=True):
        image = heat_map(
            axis,
            grid.T,
            [[number(x, 2) for x in row] for row in grid.T.tolist()] if len(grid) <= LEGIBLE else None,
            rows=positions,
            columns=thinned(range(len(grid))),
            limits=(0.5, 1),
        )
        axis.set_title(name)
        axis.set_xlabel("layer (block input)")
    axes[0].set_ylabel("position")
    colour_bar(figure, image, axes, label)
    return figure


def cosine_maps(maps: dict[str, tuple[Tensor, Sequence[int]]]) -> Figure:
    """Lab 03: cosine of every pair; maps: name -> (cosines [n, n], labels of its rows). The numbers stand in the cells.

    A name begins with what the rows are, such as "layers, at position -1".
    """
    figure, axes = panels(len(maps), 5 * len(maps) + 0.8, 4.3)
    for axis, (name, (square, ticks)) in zip(axes, maps.items(), strict=True):
        image = heat_map(
            axis,
            square,
            [[number(x, 2) for x in row] for row in square.tolist()] if len(square) <= LEGIBLE else None,
            rows=thinned(ticks),
            columns=thinned(ticks),
            limits=(-1, 1),
            colours=DIVERGING,
        )
        kind = name.split(",")[0]
        axis.set(title=name, xlabel=kind, ylabel=kind, aspect="equal")
    colour_bar(figure, image, axes, "cosine")
    return figure


def plane_figure(points: dict[str, Tensor], x: str, y: str, arrow: Tensor | None = None) -> Figure:
    """Lab 03: sets of prompts in a plane, coordinates [n, 2]. An arrow, [2], shows where a direction points.

    The name of a set begins with its kind, such as "harmful, behind shots". Sets of a kind have one colour.
    """
    figure, (axis,) = panels(1, 6.4, 4.8)
    marks, spare = dict(MARKERS), cycle(mark for mark in MARKS if mark not in MARKERS.values())
    for name, xy in points.items():
        kind = kind_of(name)
        across, upwards = xy.numpy().T
        axis.scatter(
            across,
            upwards,
            s=26,
            alpha=0.75,
            marker=marks.pop(kind, None) or next(spare),
            color=COLOURS.get(kind, "#555555"),
            label=f"{name} ({len(xy)})",
            linewidths=1.2,
        )
    if arrow is not None:
        tip = arrow[0].item(), arrow[1].item()
        axis.annotate("", xy=tip, xytext=(0, 0), arrowprops={"arrowstyle": "-|>", "color": "black", "lw": 1.6})
        axis.annotate("direction r", xy=tip, xytext=(4, 6), textcoords="offset points")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_aspect("equal", adjustable="datalim")
    legend_above(figure)
    return figure


def dot_rows(rows: dict[str, Sequence[float]], x: str, lines: dict[str, float] | None = None) -> Figure:
    """A row of dots for each name. Vertical dashed lines carry a name too. Rows named after a set have its marker."""
    figure, (axis,) = panels(1, 8, 0.5 * len(rows) + 1.1)
    rng = np.random.default_rng(0)
    for height, (name, values) in enumerate(rows.items()):
        values = [float(value) for value in values]
        kind = kind_of(name)
        axis.scatter(
            values,
            height + rng.uniform(-0.22, 0.22, len(values)),
            s=18,
            alpha=0.65,
            marker=MARKERS.get(kind, "D"),
            color=COLOURS.get(kind, "#555555"),
            linewidths=1,
        )
    for name, value in (lines or {}).items():
        axis.axvline(value, color="black", linestyle="--", linewidth=0.9)
        axis.annotate(name, (value, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=9)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel(x)
    return figure
