"""Figures of what goes on in the layers: streams compared, the logit lens, what parts write, patched activations."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from refusallab.geometry import Strip
from refusallab.measure import Difference
from refusallab.plots.heatmaps import DIVERGING, colour_bar, heat_map
from refusallab.plots.intervals import interval_band
from refusallab.plots.style import (
    COLOURS,
    DASHES,
    GREEN,
    LEGIBLE,
    PALETTE,
    VERMILLION,
    Style,
    layer_names,
    legend_above,
    number,
    panels,
    series,
    thinned,
    whole,
)

HATCHES = ("", "///", "...", "xx")


def twin_distances(grids: dict[str, tuple[Sequence[str], Tensor]]) -> Figure:
    """Lab 00: how far apart the residual streams of two prompts are, relative to their length.

    grids: title -> (tokens, one label for each position; distances [layers + 1, seq]). Numbers stand in the cells.
    """
    widths = [len(tokens) for tokens, _ in grids.values()]
    layers = max(len(distances) for _, distances in grids.values())
    figure, axes = panels(len(grids), 0.42 * sum(widths) + 1.9, 0.27 * layers + 1.7, width_ratios=widths)
    top = max(float(distances.max()) for _, distances in grids.values())
    for axis, (title, (tokens, distances)) in zip(axes, grids.items(), strict=True):
        image = heat_map(
            axis,
            distances,
            [[number(x, 1) if x else "0" for x in row] for row in distances.tolist()],
            rows=layer_names(len(distances)),
            columns=tokens,
            limits=(0, top),
        )
        axis.set_xticks(range(len(tokens)), tokens, rotation=60, ha="right", rotation_mode="anchor", fontsize=9)
        axis.set_title(title)
        axis.set_xlabel("token")
    axes[0].set_ylabel("layer (block input)")
    colour_bar(figure, image, axes, "distance, in mean lengths")
    return figure


def lens_grid(grids: dict[str, tuple[list[list[str]], Tensor]], columns: Sequence[str], marked: set[str]) -> Figure:
    """Lab 00: the logit lens, layers down and positions across: the likeliest token and its probability.

    grids: title -> (tokens [layers + 1][positions], probabilities [layers + 1, positions]). columns: a label for each
    position. Tokens in `marked`, those that open refusals, are bold and framed.
    """
    layers = len(next(iter(grids.values()))[0])
    figure, axes = panels(len(grids), 1.05 * len(columns) * len(grids) + 1.9, 0.29 * layers + 1.2, sharey=True)
    for axis, (title, (tokens, probabilities)) in zip(axes, grids.items(), strict=True):
        rows = zip(tokens, probabilities.tolist(), strict=True)
        image = heat_map(
            axis,
            probabilities,
            [[f"{token!r} {p:.1f}" for token, p in zip(*row, strict=True)] for row in rows],
            rows=layer_names(layers),
            columns=columns,
            limits=(0, 1),
            colours="Blues",  # frames stand out on it
        )
        for text, token in zip(axis.texts, (token for row in tokens for token in row), strict=True):
            if token in marked:
                text.set_fontweight("bold")
                column, layer = text.get_position()
                corner = column - 0.47, layer - 0.44
                axis.add_patch(plt.Rectangle(corner, 0.94, 0.88, fill=False, edgecolor=VERMILLION, linewidth=1.5))
        axis.set_title(title)
        axis.set_xlabel("position, and the prompt's token there")
    axes[0].set_ylabel("layer (block input)")
    colour_bar(figure, image, axes, "probability of the token")
    return figure


def lens_curves(curves: dict[str, Tensor]) -> Figure:
    """Lab 00: the refusal metric read by the logit lens at the last position, layer by layer.

    curves: set name -> [n, layers + 1]. Lines are medians, bands hold 80 % of the prompts.
    """
    figure, (axis,) = panels(1, 7, 3.4)
    colours = [COLOURS["harmful"], COLOURS["harmless"], GREEN, COLOURS["borderline"]]
    styles = zip(colours, "xo^s", DASHES, strict=True)
    for (name, values), (colour, marker, dash) in zip(curves.items(), styles, strict=False):
        low, middle, high = np.quantile(values.numpy(), [0.1, 0.5, 0.9], axis=0)
        layers = np.arange(len(middle))
        axis.plot(layers, middle, dash, marker=marker, color=colour, label=f"{name} (n={len(values)})")
        axis.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(middle)), layer_names(len(middle)))
    axis.set_xlabel("layer (block input) that the lens reads")
    axis.set_ylabel("refusal metric (log-odds)")
    legend_above(figure)
    return figure


def token_strips(strips: dict[str, Strip]) -> Figure:
    """Lab 03: projections of whole prompts on a direction, tokens across and layers down, one strip for each name."""
    columns, rows = 2, -(-len(strips) // 2)
    layers, longest = len(next(iter(strips.values())).values), max(len(s.tokens) for s in strips.values())
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(columns * (0.32 * longest + 0.6), rows * (0.24 * min(layers, LEGIBLE) + 1.15) + 0.2),
        layout="constrained",
        squeeze=False,
    )
    limit = max(float(s.values.abs().max()) for s in strips.values())
    for axis in axes.flat[len(strips) :]:
        axis.set_visible(False)
    for axis, (name, strip) in zip(axes.flat, strips.items(), strict=False):
        image = heat_map(
            axis,
            strip.values,
            [[number(x, 0) for x in row] for row in strip.values.tolist()] if layers <= LEGIBLE else None,
            rows=thinned(range(layers)),
            columns=[token.replace("\n", "\\n").strip() or "space" for token in strip.tokens],
            limits=(-limit, limit),
            colours=DIVERGING,
        )
        axis.tick_params("x", rotation=90, labelsize=9)
        axis.set_title(name)
    for axis in axes[:, 0]:
        axis.set_ylabel("layer (block input)")
    figure.supxlabel("token", fontsize=10)
    colour_bar(figure, image, axes.flatten().tolist(), "projection (units of the stream)")
    return figure


def layer_curves(curves: dict[str, dict[str, Tensor]], y: str, x: str = "layer (block input)") -> Figure:
    """Labs 07 and 13: a number by layer or turn, a line for each condition; curves: panel -> line -> [n, layers].

    Lines are means over prompts, bands hold 80 % of them.
    """
    figure, axes = panels(len(curves), max(6.8, 4.4 * len(curves)), 3.8, sharey=True)
    for axis, (name, lines) in zip(axes, curves.items(), strict=True):
        for k, (line, values) in enumerate(lines.items()):
            low, high = np.quantile(values.numpy(), [0.1, 0.9], axis=0)
            layers = np.arange(values.shape[1])
            axis.plot(layers, values.mean(0), label=line, markersize=5, **series(k))
            axis.fill_between(layers, low, high, color=series(k)["color"], alpha=0.13, linewidth=0)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title(name)
        axis.set_xlabel(x)
        whole(axis.xaxis)
    axes[0].set_ylabel(y)
    legend_above(figure)
    return figure


def write_grids(grids: dict[str, tuple[Tensor, Tensor]], label: str) -> Figure:
    """Lab 07: what heads and MLPs write along a direction; grids: name -> (heads [layers, heads], MLPs [layers]).

    Layers down, heads across, the MLP in the last column. The numbers are written in the cells.
    """
    joined = {name: np.concatenate([h.numpy(), mlp.numpy()[:, None]], 1) for name, (h, mlp) in grids.items()}
    limit = max(np.abs(grid).max() for grid in joined.values())
    layers, columns = next(iter(joined.values())).shape
    figure, axes = panels(len(grids), max(2.4, 0.52 * columns) * len(grids) + 1.4, 0.3 * layers + 1.3, sharey=True)
    for axis, (name, grid) in zip(axes, joined.items(), strict=True):
        image = heat_map(
            axis,
            grid,
            [[number(x, 1) for x in row] for row in grid] if max(layers, columns) <= LEGIBLE + 1 else None,
            rows=thinned(range(layers)),
            columns=[*thinned(range(columns - 1)), "MLP"],
            limits=(-limit, limit),
            colours=DIVERGING,
        )
        axis.set_title(name)
        axis.set_xlabel("head")
    axes[0].set_ylabel("layer")
    colour_bar(figure, image, axes, label)
    return figure


def stacked_shares(rows: dict[str, dict[str, float]], x: str) -> Figure:
    """Lab 07: shares that add up to 1, a bar a row, parts apart by colour and hatch; rows: name -> part -> share.

    Shares of at least 0.06 are written in the bar.
    """
    figure, (axis,) = panels(1, 8.8, 0.42 * len(rows) + 1.3)
    parts = list(next(iter(rows.values())))
    left = np.zeros(len(rows))
    for k, part in enumerate(parts):
        values = np.array([shares[part] for shares in rows.values()])
        style: Style = {"color": PALETTE[k % 6], "alpha": 0.75, "hatch": HATCHES[k % 4], "edgecolor": "white"}
        axis.barh(range(len(rows)), values, left=left, height=0.72, label=part, **style)
        for row, value in enumerate(values):
            if value >= 0.06:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
                axis.text(left[row] + value / 2, row, f"{value:.2f}", ha="center", va="center", fontsize=9, bbox=box)
        left += values
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(0, 1)
    axis.set_xlabel(x)
    legend_above(figure)
    return figure


def recovery_grids(grids: dict[str, tuple[Sequence[str], Tensor]], x: str) -> Figure:
    """Lab 12: the share that patching brings back; grids: title -> (column labels, shares [layers, columns]).

    Layers down; x says what the columns are. The numbers are written in the cells.
    """
    widths = [len(columns) for columns, _ in grids.values()]
    layers = len(next(iter(grids.values()))[1])
    figure, axes = panels(len(grids), 0.56 * sum(widths) + 1.6, 0.29 * layers + 1.6, width_ratios=widths, sharey=True)
    for axis, (title, (columns, shares)) in zip(axes, grids.items(), strict=True):
        image = heat_map(
            axis,
            shares,
            [[number(x, 2) for x in row] for row in shares.tolist()],
            rows=thinned(range(layers)),
            columns=columns,
            limits=(0, 1),
        )
        axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor", fontsize=9)
        axis.set_title(title)
    axes[0].set_ylabel("layer")
    figure.supxlabel(x, fontsize=10)
    colour_bar(figure, image, axes, "share recovered")
    return figure


def recovery_curves(curves: dict[str, dict[str, Sequence[Difference]]]) -> Figure:
    """Lab 12: shares recovered by layer with their bootstrap intervals; curves: panel -> line -> one for each layer."""
    figure, axes = panels(len(curves), max(6.8, 2.4 * len(curves)), 3.6, sharey=True)
    for axis, (name, lines) in zip(axes, curves.items(), strict=True):
        for k, (line, shares) in enumerate(lines.items()):
            interval_band(axis, range(len(shares)), shares, label=line, markersize=5, **series(k))
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title(name)
        axis.set_xlabel("layer")
        whole(axis.xaxis)
    axes[0].set_ylabel("share recovered")
    legend_above(figure)
    return figure
