"""Figures of the search for a direction: the scores of all candidates, and what is selected."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from refusallab.directions import DEPTH, MAX_KL, MIN_INDUCE, Search, discarded_because
from refusallab.interventions import unit
from refusallab.plots.heatmaps import FADED, SEQUENTIAL, heat_map
from refusallab.plots.style import (
    COLOURS,
    DASHES,
    LEGIBLE,
    MARKERS,
    PALETTE,
    Style,
    legend_above,
    number,
    panels,
    thinned,
    whole,
)

LIMITS = {"induce": MIN_INDUCE, "kl": MAX_KL}
STAR: Style = {"marker": "*", "color": "black", "markeredgecolor": "white", "markersize": 15, "linestyle": "none"}
GRID_TITLES = {
    "bypass": "bypass, log-odds: low is good",
    "induce": f"induce, log-odds: high is good, must be > {MIN_INDUCE:g}",
    "kl": f"KL, nats: low is good, must be ≤ {MAX_KL:g}",
}
CURVE_TITLES = {
    "bypass": "bypass: direction ablated, harmful prompts\n(lower is better)",
    "induce": f"induce: direction added, harmless prompts\n(higher is better; must be > {MIN_INDUCE:g})",
    "kl": f"KL(base || ablated), harmless prompts\n(lower is better; must be ≤ {MAX_KL:g})",
}
UNITS = {"bypass": "refusal metric (log-odds)", "induce": "refusal metric (log-odds)", "kl": "nats"}


def headline_figure(search: Search, streams: dict[str, Tensor]) -> Figure:
    """Three scores of every candidate by layer, a line per position; lower right, projections on the direction.

    streams: set name ("harmful", "harmless", "borderline") -> residual stream [n, width] at the selected site.
    """
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for axis, score in zip(axes.flat, CURVE_TITLES, strict=False):
        _score_panel(axis, search, score)
    _projection_panel(axes[1, 1], search, streams)
    legend_above(figure, axes[0, 1])  # the first panel has no limit
    return figure


def _score_panel(axis: Axes, search: Search, score: str) -> None:
    for k, position in enumerate(_positions(search)):
        line = sorted((c for c in search.candidates if c.position == position), key=lambda c: c.layer)
        axis.plot(
            [c.layer for c in line],
            [getattr(c, score) for c in line],
            color=PALETTE[k % 6],
            linestyle=DASHES[(k + k // 6) % 4],
            marker=".",
            label=f"position {position}",
        )
    best = search.selected
    axis.plot(best.layer, getattr(best, score), **STAR, zorder=3, label="selected")
    if score in LIMITS:
        axis.axhline(LIMITS[score], color="black", linewidth=0.8, linestyle="--", label="limit of a filter")
    late = int(DEPTH * search.n_layers) - 0.5, search.n_layers - 0.5
    axis.axvspan(*late, color="grey", alpha=0.15, linewidth=0, label="too late: discarded")
    if score == "kl":
        axis.set_yscale("symlog", linthresh=0.01)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_ylim(bottom=-0.002)
    axis.set_title(CURVE_TITLES[score])
    axis.set_xlabel("layer (block input)")
    axis.set_ylabel(UNITS[score])
    axis.set_xlim(-0.5, search.n_layers - 0.5)
    whole(axis.xaxis)


def _projection_panel(axis: Axes, search: Search, streams: dict[str, Tensor]) -> None:
    direction, rng = unit(search.direction.vector), np.random.default_rng(0)
    for height, (name, x) in enumerate(streams.items()):
        heights = height + rng.uniform(-0.3, 0.3, len(x))
        axis.scatter(
            (x.float() @ direction).numpy(), heights, s=12, alpha=0.6, color=COLOURS[name], marker=MARKERS[name]
        )
    best = search.selected
    axis.set_yticks(range(len(streams)), [f"{name}\n(n={len(x)})" for name, x in streams.items()])
    axis.set_xlabel("projection on the direction (units of the stream)")
    axis.set_title(f"test prompts at layer {best.layer}, position {best.position}")


def score_surfaces(search: Search) -> Figure:
    """Lab 02: the three scores of every candidate, layers across and positions down. The selected one is starred.

    Bright is good in each grid. Candidates that a filter discards are pale. The numbers are written in the cells.
    """
    positions, best = _positions(search), search.selected
    figure, axes = panels(3, 13, 0.45 * len(positions) + 1.7)
    shape = len(positions), search.n_layers
    discarded = np.zeros(shape, dtype=bool)
    for c in search.candidates:
        discarded[positions.index(c.position), c.layer] = discarded_because(c, search.n_layers) is not None
    for axis, (name, title) in zip(axes, GRID_TITLES.items(), strict=True):
        grid = np.full(shape, np.nan)
        for c in search.candidates:
            grid[positions.index(c.position), c.layer] = getattr(c, name)
        digits = 2 if name == "kl" else 1
        heat_map(
            axis,
            grid,
            [[number(x, digits) for x in row] for row in grid] if search.n_layers <= LEGIBLE else None,
            rows=positions,
            columns=thinned(range(search.n_layers)),
            colours=SEQUENTIAL if name == "induce" else f"{SEQUENTIAL}_r",
            limits=(0, MAX_KL) if name == "kl" else (None, None),
            faded=discarded,
        )
        axis.plot(best.layer, positions.index(best.position) - 0.3, **STAR | {"markersize": 12})
        axis.set_title(title)
        axis.set_xlabel("layer (block input)")
    axes[0].set_ylabel("position")
    shades = plt.get_cmap(SEQUENTIAL)
    legend = {
        "good score": Patch(color=shades(1.0)),
        "bad score": Patch(color=shades(0.0)),
        "pale: discarded by a filter": Patch(color=shades(0.5), alpha=FADED),
        "selected": Line2D([], [], **STAR | {"markersize": 12}),
    }
    figure.legend(list(legend.values()), list(legend), loc="outside upper center", ncols=len(legend))
    return figure


def null_bypass(search: Search, nulls: Sequence[float], untouched: float) -> Figure:
    """Lab 02: bypass of the selected candidate beside that of control directions and of the untouched model."""
    figure, (axis,) = panels(1, 7, 1.9)
    controls = f"{len(nulls)} random directions"
    axis.plot(nulls, np.zeros(len(nulls)), "o", color=COLOURS["harmless"], alpha=0.6, label=controls)
    axis.plot(search.selected.bypass, 0, **STAR, label="selected direction")
    axis.axvline(untouched, color="black", linestyle="--", linewidth=0.9, label="untouched model (layer-0 candidates)")
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.set_xlabel("bypass: mean refusal metric of harmful validation prompts (log-odds)")
    legend_above(figure)
    return figure


def _positions(search: Search) -> list[int]:
    return sorted({c.position for c in search.candidates})
