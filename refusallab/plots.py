"""Figures. Every function returns a matplotlib figure; colours are the Okabe-Ito palette, never the only carrier."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from refusallab.directions import DEPTH, MAX_KL, MIN_INDUCE, Search
from refusallab.interventions import unit

COLOURS = {"harmful": "#D55E00", "harmless": "#0072B2", "borderline": "#CC79A7"}
MARKERS = {"harmful": "x", "harmless": "o", "borderline": "^"}


def headline_figure(search: Search, streams: dict[str, Tensor]) -> Figure:
    """Left: the three scores of every candidate by layer, a line per position. Right: projections on the direction.

    streams: set name ("harmful", "harmless", "borderline") -> residual stream [n, width] at the selected site.
    """
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    panels = {
        "bypass": ("bypass: refusal metric, ablated\n(harmful; lower is better)", None),
        "induce": ("induce: refusal metric, added\n(harmless; must be > 0)", MIN_INDUCE),
        "kl": ("KL(base || ablated), nats\n(harmless; must be <= 0.1)", MAX_KL),
    }
    for axis, (score, (title, limit)) in zip(axes, panels.items(), strict=False):
        _score_panel(axis, search, score)
        axis.set_title(title, fontsize=10)
        if limit is not None:
            axis.axhline(limit, color="black", linewidth=0.8, linestyle="--")
    axes[2].set_yscale("symlog", linthresh=0.01)
    axes[0].legend(title="position", fontsize=8, title_fontsize=8)
    _projection_panel(axes[3], search, streams)
    return figure


def _score_panel(axis: plt.Axes, search: Search, score: str) -> None:
    shades, dashes = plt.get_cmap("viridis"), ["-", "--", "-.", ":"]
    positions = sorted({c.position for c in search.candidates})
    for k, position in enumerate(positions):
        line = sorted((c for c in search.candidates if c.position == position), key=lambda c: c.layer)
        axis.plot(
            [c.layer for c in line],
            [getattr(c, score) for c in line],
            dashes[k % 4],
            marker=".",
            color=shades(0.9 * k / max(1, len(positions) - 1)),
            label=str(position),
            linewidth=1.2,
        )
    best = search.selected
    axis.plot(best.layer, getattr(best, score), "*", color="#D55E00", markersize=14, label="selected")
    axis.axvspan(int(DEPTH * search.n_layers) - 0.5, search.n_layers - 0.5, color="grey", alpha=0.15)
    axis.set_xlabel("layer (block input); grey: discarded")
    axis.set_xlim(-0.5, search.n_layers - 0.5)


def _projection_panel(axis: plt.Axes, search: Search, streams: dict[str, Tensor]) -> None:
    direction, rng = unit(search.direction.vector), np.random.default_rng(0)
    for height, (name, x) in enumerate(streams.items()):
        projections = (x.float() @ direction).numpy()
        axis.scatter(
            projections,
            height + rng.uniform(-0.3, 0.3, len(projections)),
            s=12,
            alpha=0.6,
            color=COLOURS[name],
            marker=MARKERS[name],
        )
    axis.set_yticks(range(len(streams)), list(streams))
    best = search.selected
    axis.set_xlabel("projection on the direction\n(units of the residual stream)")
    axis.set_title(f"test prompts at layer {best.layer}, position {best.position}", fontsize=10)
