"""Figures. Every function returns a matplotlib figure; colours are the Okabe-Ito palette, never the only carrier."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from refusallab.directions import DEPTH, MAX_KL, MIN_INDUCE, Search, discarded_because
from refusallab.geometry import Strip
from refusallab.interventions import unit
from refusallab.measure import Difference, Outcome, Rate, rate
from refusallab.steering import Dose

COLOURS = {"harmful": "#D55E00", "harmless": "#0072B2", "borderline": "#CC79A7"}
MARKERS = {"harmful": "x", "harmless": "o", "borderline": "^"}


def use_style() -> None:
    """The look of every figure of the course: legible at 100 % in a notebook."""
    plt.rcParams.update(
        {
            "figure.dpi": 100,
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": plt.cycler(color=["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]),
            "legend.frameon": False,
        }
    )


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


# --- lab 00 ---


def twin_distances(panels: dict[str, tuple[Sequence[str], Tensor]]) -> Figure:
    """Lab 00: how far apart the residual streams of two prompts are, relative to their length.

    panels: title -> (tokens, one label for each position; distances [layers + 1, seq]). Numbers stand in the cells.
    """
    widths = [len(tokens) for tokens, _ in panels.values()]
    layers = max(len(distances) for _, distances in panels.values())
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(0.42 * sum(widths) + 1.5, 0.27 * layers + 1.7),
        width_ratios=widths,
        layout="constrained",
        squeeze=False,
    )
    top = max(float(distances.max()) for _, distances in panels.values())
    for axis, (title, (tokens, distances)) in zip(axes[0], panels.items(), strict=True):
        axis.imshow(distances.numpy(), cmap="cividis", vmin=0, vmax=top, aspect="auto")
        for (layer, position), value in np.ndenumerate(distances.numpy()):
            text = f"{value:.1f}" if value else "0"
            axis.text(
                position,
                layer,
                text,
                ha="center",
                va="center",
                fontsize=7.5,
                color="white" if value < top / 2 else "black",
            )
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(tokens)), tokens, rotation=60, ha="right", rotation_mode="anchor", fontsize=8.5)
        axis.set_yticks(range(len(distances)), [*range(len(distances) - 1), "end"])
        axis.set_xlabel("token")
        axis.spines[:].set_visible(False)
    axes[0][0].set_ylabel("layer (block input)")
    return figure


def lens_grid(panels: dict[str, tuple[list[list[str]], Tensor]], columns: Sequence[str], marked: set[str]) -> Figure:
    """Lab 00: the logit lens, layers down and positions across: the likeliest token and its probability.

    panels: title -> (tokens [layers + 1][positions], probabilities [layers + 1, positions]). columns: a label for each
    position. Tokens in `marked`, those that open refusals, stand in bold inside a frame.
    """
    layers = len(next(iter(panels.values()))[0])
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(1.05 * len(columns) * len(panels) + 1, 0.29 * layers + 1.2),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axis, (title, (tokens, probabilities)) in zip(axes[0], panels.items(), strict=True):
        axis.imshow(probabilities.numpy(), cmap="Blues", vmin=0, vmax=1.4, aspect="auto")
        for (layer, position), p in np.ndenumerate(probabilities.numpy()):
            token = tokens[layer][position]
            weight = "bold" if token in marked else "normal"
            axis.text(position, layer, f"{token!r} {p:.1f}", ha="center", va="center", fontsize=7.5, weight=weight)
            if token in marked:
                frame = plt.Rectangle((position - 0.47, layer - 0.44), 0.94, 0.88, fill=False, edgecolor="#D55E00")
                axis.add_patch(frame)
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(columns)), columns, fontsize=8.5)
        axis.set_yticks(range(layers), [*range(layers - 1), "end"])
        axis.set_xlabel("position, and the token read there")
        axis.spines[:].set_visible(False)
    axes[0][0].set_ylabel("layer (block input)")
    return figure


def lens_curves(curves: dict[str, Tensor]) -> Figure:
    """Lab 00: the refusal metric read by the logit lens at the last position, layer by layer.

    curves: set name -> [n, layers + 1]. Lines are medians, bands hold 80 % of the prompts.
    """
    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    colours = [COLOURS["harmful"], COLOURS["harmless"], "#009E73", COLOURS["borderline"]]
    for (name, values), colour, marker, dash in zip(
        curves.items(), colours, "xo^s", ["-", "--", "-.", ":"], strict=False
    ):
        low, middle, high = np.quantile(values.numpy(), [0.1, 0.5, 0.9], axis=0)
        layers = np.arange(len(middle))
        axis.plot(layers, middle, dash, marker=marker, color=colour, label=f"{name} (n={len(values)})")
        axis.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(middle)), [*range(len(middle) - 1), "end"])
    axis.set_xlabel("layer (block input) that the lens reads")
    axis.set_ylabel("refusal metric (log-odds)")
    axis.legend(fontsize=8.5)
    return figure


# --- lab 01 ---


def metric_histograms(metrics: dict[str, Tensor]) -> Figure:
    """Lab 01: histograms of the refusal metric, one row for each set, on one axis. 0 is even odds."""
    figure, axes = plt.subplots(
        len(metrics), 1, figsize=(7, 1.1 * len(metrics) + 0.8), sharex=True, layout="constrained", squeeze=False
    )
    everything = np.concatenate([np.asarray(values) for values in metrics.values()])
    bins = np.linspace(min(everything.min(), -1), max(everything.max(), 1), 41)
    for axis, (name, values) in zip(axes[:, 0], metrics.items(), strict=True):
        kind = next((kind for kind in COLOURS if name.startswith(kind)), "harmless")
        axis.hist(values, bins, color=COLOURS[kind], alpha=0.8)
        axis.axvline(0, color="black", linestyle="--", linewidth=0.9)
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.set_ylabel("prompts")
        axis.set_title(f"{name} (n={len(values)})", fontsize=9.5, loc="left")
    axes[-1, 0].set_xlabel("refusal metric (log-odds that the reply opens with a refusal token)")
    return figure


def judged_shares(shares: dict[str, dict[str, Rate]], truth: dict[str, float]) -> Figure:
    """Lab 01: the share that each judge calls a refusal, beside the truth (grey bar), condition by condition.

    shares: condition -> judge -> Rate; truth: condition -> share. Whiskers are Wilson intervals.
    """
    figure, axis = plt.subplots(figsize=(8.5, 0.62 * len(shares) + 1.4), layout="constrained")
    judges = list(next(iter(shares.values())))
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for row, (condition, by_judge) in enumerate(shares.items()):
        for k, judge in enumerate(judges):
            r, height = by_judge[judge], row + 0.5 * ((k + 0.5) / len(judges) - 0.5)
            axis.plot([r.low, r.high], [height, height], color=colours[k], linewidth=1.5)
            axis.plot(r.value, height, "osD^v"[k % 5], color=colours[k], label=None if row else judge, markersize=6)
        axis.plot([truth[condition]] * 2, [row - 0.33, row + 0.33], color="grey", linewidth=3, zorder=0)
    axis.plot([], [], color="grey", linewidth=3, label="truth")
    axis.set_yticks(range(len(shares)), list(shares))
    axis.invert_yaxis()
    axis.set_xlim(-0.03, 1.03)
    axis.set_xlabel("share of replies called a refusal")
    axis.legend(loc="upper center", bbox_to_anchor=(0.4, 1.0 + 0.9 / (len(shares) + 1)), ncols=4, fontsize=8.5)
    return figure


def interval_coverage(coverage: dict[str, np.ndarray], p: np.ndarray, n: int) -> Figure:
    """Lab 01: how often a nominal 95 % interval holds the true share p, for n cases. A line for each kind."""
    figure, axis = plt.subplots(figsize=(7, 2.7), layout="constrained")
    for (name, values), dash in zip(coverage.items(), ["-", "--", "-."], strict=False):
        axis.plot(p, values, dash, label=name, linewidth=1.4)
    axis.axhline(0.95, color="black", linewidth=0.8, linestyle=":", label="what 95 % promises")
    axis.set_ylim(0, 1.02)
    axis.set_xlabel(f"true share (n={n})")
    axis.set_ylabel("share of samples whose\ninterval holds it")
    axis.legend(fontsize=8.5, loc="lower center")
    return figure


# --- lab 02 ---


def score_surfaces(search: Search) -> Figure:
    """Lab 02: the three scores of every candidate, layers across and positions down. The selected one is starred.

    Hatched cells are discarded by a filter. The numbers stand in the cells: colour carries nothing alone.
    """
    panels = {"bypass": "viridis_r", "induce": "viridis", "kl": "viridis_r"}  # bright is good
    titles = {"bypass": "bypass (low is good)", "induce": "induce (> 0)", "kl": "KL in nats (<= 0.1)"}
    positions = sorted({c.position for c in search.candidates})
    figure, axes = plt.subplots(1, 3, figsize=(13, 0.45 * len(positions) + 1.3), layout="constrained")
    for axis, (name, shades) in zip(axes, panels.items(), strict=True):
        grid = np.full((len(positions), search.n_layers), np.nan)
        for c in search.candidates:
            grid[positions.index(c.position), c.layer] = getattr(c, name)
        axis.imshow(grid, cmap=shades, aspect="auto")
        middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
        for c in search.candidates:
            row, value = positions.index(c.position), getattr(c, name)
            bright = value > middle if shades == "viridis" else value < middle
            text = f"{value:.2f}".replace("0.", ".", 1) if name == "kl" else f"{value:.1f}"
            if search.n_layers <= 16:
                axis.text(
                    c.layer, row, text, ha="center", va="center", fontsize=7.5, color="black" if bright else "white"
                )
            if discarded_because(c, search.n_layers):
                axis.add_patch(
                    plt.Rectangle(
                        (c.layer - 0.5, row - 0.5), 1, 1, fill=False, hatch="///", edgecolor="grey", linewidth=0
                    )
                )
        best = search.selected
        axis.plot(
            best.layer,
            positions.index(best.position) - 0.28,
            "*",
            color="#D55E00",
            markeredgecolor="white",
            markersize=11,
        )
        axis.set_title(titles[name])
        axis.set_xlabel("layer (block input)")
        axis.set_yticks(range(len(positions)), positions)
        axis.spines[:].set_visible(False)
    axes[0].set_ylabel("position")
    return figure


def null_bypass(search: Search, nulls: Sequence[float], untouched: float) -> Figure:
    """Lab 02: bypass of the selected candidate beside that of control directions and of the untouched model."""
    figure, axis = plt.subplots(figsize=(7, 1.9), layout="constrained")
    axis.plot(
        nulls, np.zeros(len(nulls)), "o", color=COLOURS["harmless"], alpha=0.6, label=f"{len(nulls)} random directions"
    )
    axis.plot(search.selected.bypass, 0, "*", color=COLOURS["harmful"], markersize=14, label="selected direction")
    axis.axvline(untouched, color="black", linestyle="--", linewidth=0.9, label="untouched model (layer-0 candidates)")
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.set_xlabel("bypass: mean refusal metric of harmful validation prompts (log-odds)")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.45), ncols=3, fontsize=8.5)
    return figure


# --- lab 03 ---


def share_grids(grids: dict[str, Tensor], positions: Sequence[int], label: str) -> Figure:
    """Lab 03: one number for every layer and position, [layers, positions], a grid for each name.

    The numbers stand in the cells, unless the model is so deep that they would not fit.
    """
    figure, axes = plt.subplots(
        1, len(grids), figsize=(6.3 * len(grids), 0.42 * len(positions) + 1.2), layout="constrained", squeeze=False
    )
    for axis, (name, grid) in zip(axes[0], grids.items(), strict=True):
        image = axis.imshow(grid.T.numpy(), cmap="viridis", aspect="auto", vmin=0.5, vmax=1)
        if len(grid) <= 16:
            for (layer, row), value in np.ndenumerate(grid.numpy()):
                shade = "black" if value > 0.75 else "white"
                axis.text(layer, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=shade)
        axis.set_title(name)
        axis.set_xlabel("layer (block input)")
        axis.set_yticks(range(len(positions)), positions)
        axis.spines[:].set_visible(False)
    axes[0, 0].set_ylabel("position")
    figure.colorbar(image, ax=axes[0, -1], label=label)
    return figure


def plane_figure(points: dict[str, Tensor], x: str, y: str, arrow: Tensor | None = None) -> Figure:
    """Lab 03: sets of prompts in a plane, coordinates [n, 2]. An arrow, [2], shows where a direction points."""
    figure, axis = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
    for name, xy in points.items():
        axis.scatter(
            *xy.numpy().T,
            s=26,
            alpha=0.75,
            marker=MARKERS[name],
            color=COLOURS[name],
            label=f"{name} ({len(xy)})",
            linewidths=1.2,
        )
    if arrow is not None:
        axis.annotate(
            "", xy=arrow.tolist(), xytext=(0, 0), arrowprops={"arrowstyle": "-|>", "color": "black", "lw": 1.6}
        )
        axis.annotate("direction r", xy=arrow.tolist(), xytext=(4, 6), textcoords="offset points")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_aspect("equal", adjustable="datalim")
    axis.legend(fontsize=9)
    return figure


def dot_rows(rows: dict[str, Sequence[float]], x: str, lines: dict[str, float] | None = None) -> Figure:
    """A row of dots for each name. Vertical dashed lines carry a name too. Rows named after a set have its marker."""
    figure, axis = plt.subplots(figsize=(8, 0.5 * len(rows) + 1.1), layout="constrained")
    rng = np.random.default_rng(0)
    for height, (name, values) in enumerate(rows.items()):
        values = [float(value) for value in values]
        kind = next((k for k in MARKERS if name.startswith(k)), "")
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


def cosine_maps(maps: dict[str, tuple[Tensor, Sequence[int]]], label: str = "cosine") -> Figure:
    """Lab 03: cosine of every pair, a square for each name, with what its rows are. The numbers stand in the cells."""
    figure, axes = plt.subplots(1, len(maps), figsize=(5 * len(maps) + 0.8, 4.2), layout="constrained", squeeze=False)
    for axis, (name, (square, ticks)) in zip(axes[0], maps.items(), strict=True):
        image = axis.imshow(square.numpy(), cmap="PuOr_r", vmin=-1, vmax=1)
        if len(square) <= 16:
            for (row, column), value in np.ndenumerate(square.numpy()):
                text, shade = f"{value:.2f}".replace("0.", ".", 1), "white" if abs(value) > 0.75 else "black"
                axis.text(column, row, text, ha="center", va="center", fontsize=7.5, color=shade)
        axis.set_title(name)
        step = range(0, len(square), max(1, len(square) // 12))
        axis.set_xticks(step, [ticks[k] for k in step])
        axis.set_yticks(step, [ticks[k] for k in step])
        axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes[0, -1], label=label)
    return figure


def token_strips(strips: dict[str, Strip], columns: int = 2) -> Figure:
    """Lab 03: projections of whole prompts on a direction, tokens across and layers down, one strip for each name."""
    rows = -(-len(strips) // columns)
    layers, longest = len(next(iter(strips.values())).values), max(len(s.tokens) for s in strips.values())
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(columns * (0.3 * longest + 0.6), rows * (0.24 * min(layers, 16) + 1.15)),
        layout="constrained",
        squeeze=False,
    )
    limit = max(float(s.values.abs().max()) for s in strips.values())
    for axis in axes.flat[len(strips) :]:
        axis.set_visible(False)
    for axis, (name, strip) in zip(axes.flat, strips.items(), strict=False):
        image = axis.imshow(strip.values.numpy(), cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
        if layers <= 16:
            for (layer, k), value in np.ndenumerate(strip.values.numpy()):
                shade = "white" if abs(value) > 0.7 * limit else "black"
                axis.text(k, layer, str(round(value)), ha="center", va="center", fontsize=7, color=shade)
        shown = [token.replace("\n", "\\n").strip() or "space" for token in strip.tokens]
        axis.set_xticks(range(len(shown)), shown, rotation=90, fontsize=8)
        axis.set_ylabel("layer")
        axis.set_title(name, fontsize=10)
        axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="projection (units of the stream)")
    return figure


# --- lab 04 ---


def rate_rows(table: dict[str, dict[str, Rate]], x: str = "share of prompts, with 95 % Wilson interval") -> Figure:
    """Shares with intervals: a row for each condition, a marker for each metric."""
    metrics = list(dict.fromkeys(metric for rates in table.values() for metric in rates))
    figure, axis = plt.subplots(figsize=(8.5, 0.5 * len(table) + 1.3), layout="constrained")
    for k, metric in enumerate(metrics):
        for row, rates in enumerate(table.values()):
            if metric in rates:
                r, height = rates[metric], row + 0.16 * (k - (len(metrics) - 1) / 2)
                axis.plot([r.low, r.high], [height, height], color=f"C{k}", linewidth=1.5)
                axis.plot(
                    r.value, height, "ox^Ds"[k % 5], color=f"C{k}", label=metric if row == 0 else None, markersize=7
                )
    axis.set_yticks(range(len(table)), list(table))
    axis.set_ylim(len(table) - 0.5, -0.5)
    axis.set_xlim(-0.03, 1.03)
    axis.set_xlabel(x)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(metrics), fontsize=9)
    return figure


def dose_figure(panels: dict[str, dict[str, Sequence[Dose]]], x: str = "coefficient (lengths of r)") -> Figure:
    """Lab 04: refusal, truth (above) and fluency (below) against the coefficient.

    panels: prompts -> vector -> doses. The first vector is drawn solid, its controls dashed or dotted.
    """
    figure, axes = plt.subplots(
        2, len(panels), figsize=(5.2 * len(panels), 6), sharex="col", sharey="row", layout="constrained", squeeze=False
    )
    for column, (prompts, curves) in enumerate(panels.items()):
        above, below = axes[:, column]
        for k, (vector, doses) in enumerate(curves.items()):
            dash, at = ["-", "--", ":"][min(k, 2)], [d.coefficient for d in doses]
            for metric, marker, colour in (("refused", "o", "C1"), ("exact", "s", "C0")):
                shares = [getattr(d, metric) for d in doses]
                above.plot(
                    at, [s.value for s in shares], dash, marker=marker, color=colour, label=f"{metric}, {vector}"
                )
                if k == 0:
                    above.fill_between(at, [s.low for s in shares], [s.high for s in shares], color=colour, alpha=0.15)
            below.plot(at, [d.loss for d in doses], dash, marker="D", color="C2", label=vector)
        above.set_title(prompts)
        below.set_xlabel(x)
        for axis in (above, below):
            axis.axvline(0, color="grey", linewidth=0.8)
    axes[0, 0].set_ylabel("share of replies, 95 % Wilson band")
    axes[1, 0].set_ylabel("loss of the reply under the\nuntouched model, nats per token")
    axes[0, 0].legend(fontsize=8)
    axes[1, 0].legend(fontsize=8)
    return figure


def response_curves(panels: dict[str, dict[str, dict[float, Rate]]], y: str) -> Figure:
    """Lab 04: a share against the strength of an edit; panels: edit -> set of prompts -> strength -> share."""
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.6), sharey=True, layout="constrained")
    for axis, (edit, sets) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        for name, curve in sets.items():
            at, shares = list(curve), list(curve.values())
            axis.plot(at, [s.value for s in shares], marker=MARKERS[name], color=COLOURS[name], label=f"{name} prompts")
            axis.fill_between(at, [s.low for s in shares], [s.high for s in shares], color=COLOURS[name], alpha=0.15)
        for mark in (0, 1):
            axis.axvline(mark, color="grey", linewidth=0.8, linestyle="--")
        axis.set_xlabel(edit)
    np.atleast_1d(axes)[0].set_ylabel(y)
    np.atleast_1d(axes)[0].legend(fontsize=9)
    return figure


# --- lab 05 ---


def write_strengths(strengths: dict[str, dict[str, float]]) -> Figure:
    """Lab 05: how strongly each matrix writes a direction, matrix by matrix. strengths: line -> matrix -> value."""
    names = list(next(iter(strengths.values())))
    figure, axis = plt.subplots(figsize=(max(7.0, 0.45 * len(names)), 3.3), layout="constrained")
    for k, (line, values) in enumerate(strengths.items()):
        axis.plot(
            list(values.values()),
            ["-", "--", ":"][k % 3],
            marker="osD"[k % 3],
            color=f"C{(1, 0, 2)[k % 3]}",
            label=line,
        )
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=9)
    axis.set_ylabel("share of what it writes along\nthe direction (1: by chance)")
    axis.set_ylim(bottom=-0.1)
    axis.legend(fontsize=9)
    return figure


def gap_curves(panels: dict[str, dict[str, Tensor]]) -> Figure:
    """Lab 05: the gap between hooks and weights, layer by layer and in the logits; panels: model -> edit -> gaps."""
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 3.8), sharey=True, layout="constrained", squeeze=False
    )
    kinds = list(dict.fromkeys(edit for edits in panels.values() for edit in edits))
    for axis, (model, edits) in zip(axes[0], panels.items(), strict=True):
        for edit, gaps in edits.items():
            k = kinds.index(edit)
            style = {
                "color": f"C{k}",
                "marker": "os^DvP"[k % 6],
                "markersize": max(13 - 2 * k, 3),  # lines that coincide stay apart by the size of their markers
                "fillstyle": "none",
                "linestyle": ["-", "--", ":", "-."][k % 4],
            }
            values = gaps.clamp(min=1e-7).tolist()
            axis.plot(range(len(values) - 1), values[:-1], label=edit, **style)
            axis.plot(len(values), values[-1], **style)
        n = len(values) - 1
        step = 1 if n <= 12 else n // 8
        axis.set_xticks([*range(0, n, step), n + 1], [*map(str, range(0, n, step)), "logits"])
        axis.set_yscale("log")
        axis.axhspan(1e-7, 1e-4, color="grey", alpha=0.15)
        axis.set_title(model, fontsize=10)
        axis.set_xlabel("layer (block input); grey: rounding in fp32")
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.2))
    axes[0, 0].set_ylabel("largest |hooks - weights|")
    return figure


def difference_rows(table: dict[str, dict[str, Difference]], x: str) -> Figure:
    """Lab 05: changes with their paired intervals: a row for each task, a marker for each condition."""
    conditions = list(dict.fromkeys(name for row in table.values() for name in row))
    figure, axis = plt.subplots(figsize=(8.5, 0.5 * len(table) + 1.4), layout="constrained")
    for k, condition in enumerate(conditions):
        for row, differences in enumerate(table.values()):
            d, height = differences[condition], row + 0.17 * (k - (len(conditions) - 1) / 2)
            axis.plot([d.low, d.high], [height, height], color=f"C{k}", linewidth=1.5)
            label = condition if row == 0 else None
            axis.plot(d.value, height, "os^Dv"[k % 5], color=f"C{k}", label=label, markersize=6)
    axis.axvline(0, color="black", linewidth=0.8, linestyle="--")
    axis.set_yticks(range(len(table)), list(table))
    axis.set_ylim(len(table) - 0.5, -0.5)
    axis.set_xlabel(x)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(conditions), fontsize=9)
    return figure


# --- lab 06 ---


def outcome_bars(panels: dict[str, dict[str, Sequence[Outcome]]]) -> Figure:
    """Lab 06: what became of every request, a bar for each attack; panels: condition -> attack -> outcomes.

    Whiskers are the Wilson interval of the exact share. A reply that refuses counts as refused whatever else it says.
    """
    rows = max(map(len, panels.values()))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.6 * len(panels), 0.36 * rows + 1.5), sharey=True, layout="constrained", squeeze=False
    )
    kinds = {
        "exact answer": ("#D55E00", "", lambda o: o.correct and not o.refused),
        "another answer": ("#E9C46A", "////", lambda o: not o.correct and not o.refused),
        "refused": ("#DDE3EA", "", lambda o: o.refused),
    }
    for axis, (condition, attacks) in zip(axes[0], panels.items(), strict=True):
        for row, outcomes in enumerate(attacks.values()):
            left = 0.0
            for name, (colour, hatch, belongs) in kinds.items():
                share = rate([belongs(o) for o in outcomes])
                label = name if row == 0 else None
                axis.barh(row, share.value, 0.72, left, color=colour, hatch=hatch, edgecolor="white", label=label)
                if name == "exact answer":
                    axis.plot([share.low, share.high], [row, row], "|-", color="black", linewidth=1.2, markersize=7)
                left += share.value
        axis.set_title(condition, fontsize=10)
        axis.set_xlim(0, 1)
        axis.set_xlabel("share of requests")
    axes[0, 0].set_yticks(range(rows), [f"{name} ({len(x)})" for name, x in next(iter(panels.values())).items()])
    axes[0, 0].invert_yaxis()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=9)
    return figure


def success_curves(panels: dict[str, dict[str, Sequence[Rate]]]) -> Figure:
    """Lab 06: best-of-n, shares against the number of tries; panels: condition -> what counts as success -> shares."""
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.4 * len(panels), 3.3), sharey=True, layout="constrained", squeeze=False
    )
    for axis, (condition, curves) in zip(axes[0], panels.items(), strict=True):
        for k, (name, shares) in enumerate(curves.items()):
            tries = range(1, len(shares) + 1)
            colour, style = f"C{(1, 0)[k % 2]}", ("s--", "o-")[k % 2]
            axis.plot(tries, [s.value for s in shares], style, color=colour, label=name)
            axis.fill_between(tries, [s.low for s in shares], [s.high for s in shares], color=colour, alpha=0.15)
        axis.set_title(condition, fontsize=10)
        axis.set_xlabel("tries")
        axis.set_xticks(tries)
    axes[0, 0].set_ylim(-0.03, 1.03)
    axes[0, 0].set_ylabel("share of requests,\n95 % Wilson band")
    axes[0, 0].legend(fontsize=9)
    return figure


def first_order(changes: dict[str, tuple[Tensor, Tensor]]) -> Figure:
    """Lab 06: the change of the loss that the gradient predicts against the real one; kind of swap -> (both, [n])."""
    figure, axis = plt.subplots(figsize=(6, 3.8), layout="constrained")
    for k, (name, (predicted, actual)) in enumerate(changes.items()):
        axis.plot(
            predicted, actual, "ox^"[k % 3], color=f"C{k}", alpha=0.6, markersize=5, label=f"{name} ({len(actual)})"
        )
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.axvline(0, color="grey", linewidth=0.8)
    axis.set_xlabel("predicted change of the loss, nats per token")
    axis.set_ylabel("real change of the loss")
    axis.legend(fontsize=9)
    return figure


def loss_curves(curves: dict[str, Sequence[Sequence[float]]], lines: dict[str, float]) -> Figure:
    """Lab 06: the lowest loss so far against the step: thin lines are single searches, thick ones their mean.

    curves: search -> losses of each run, equally many; lines: horizontal ones, with names.
    """
    figure, axis = plt.subplots(figsize=(7, 3.8), layout="constrained")
    for k, (name, runs) in enumerate(curves.items()):
        best = np.minimum.accumulate(np.array(runs), axis=1)
        steps, dash = range(1, best.shape[1] + 1), ["-", "--", ":"][k % 3]
        axis.plot(steps, best.T, dash, color=f"C{k}", linewidth=0.7, alpha=0.5)
        axis.plot(
            steps, best.mean(0), dash, color=f"C{k}", marker="osD"[k % 3], linewidth=2, label=f"{name} ({len(runs)})"
        )
    for k, (name, value) in enumerate(lines.items()):
        axis.axhline(value, color="black", linewidth=0.9, linestyle=[":", "-."][k % 2])
        axis.annotate(name, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=9)
    axis.set_xlabel("step")
    axis.set_ylabel("lowest loss of the target so far,\nnats per token")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=9, loc="lower left")
    return figure


# --- lab 07 ---


def layer_curves(panels: dict[str, dict[str, Tensor]], y: str) -> Figure:
    """Lab 07: a number by layer, a line for each condition, a panel for each name; panels: name -> line -> [n, layers].

    Lines are means over prompts, bands hold 80 % of them.
    """
    figure, axes = plt.subplots(
        1, len(panels), figsize=(max(6.8, 4.4 * len(panels)), 3.6), sharey=True, layout="constrained", squeeze=False
    )
    for axis, (name, curves) in zip(axes[0], panels.items(), strict=True):
        for k, (line, values) in enumerate(curves.items()):
            low, high = np.quantile(values.numpy(), [0.1, 0.9], axis=0)
            layers, dash = np.arange(values.shape[1]), ["-", "--", "-.", ":"][k % 4]
            axis.plot(layers, values.mean(0), dash, marker="osD^v"[k % 5], color=f"C{k}", label=line, markersize=5)
            axis.fill_between(layers, low, high, color=f"C{k}", alpha=0.13, linewidth=0)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("layer (block input)")
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel(y)
    axes[0, 0].legend(fontsize=8.5)
    return figure


def write_grids(grids: dict[str, tuple[Tensor, Tensor]], label: str) -> Figure:
    """Lab 07: what heads and MLPs write along a direction; grids: name -> (heads [layers, heads], MLPs [layers]).

    Layers down, heads across, the MLP in the last column. The numbers stand in the cells.
    """
    joined = {name: np.concatenate([h.numpy(), mlp.numpy()[:, None]], 1) for name, (h, mlp) in grids.items()}
    limit = max(np.abs(grid).max() for grid in joined.values())
    layers, columns = next(iter(joined.values())).shape
    figure, axes = plt.subplots(
        1,
        len(grids),
        figsize=(max(2.4, 0.52 * columns) * len(grids) + 1.4, 0.3 * layers + 1.3),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axis, (name, grid) in zip(axes[0], joined.items(), strict=True):
        image = axis.imshow(grid, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
        if layers <= 16:
            for (row, column), value in np.ndenumerate(grid):
                shade = "white" if abs(value) > 0.7 * limit else "black"
                axis.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=8, color=shade)
        axis.set_title(name, fontsize=10)
        step = max(1, columns // 8)
        axis.set_xticks([*range(0, columns - 1, step), columns - 1], [*range(0, columns - 1, step), "MLP"])
        axis.set_xlabel("head")
        axis.spines[:].set_visible(False)
    axes[0, 0].set_ylabel("layer")
    figure.colorbar(image, ax=axes[0, -1], label=label)
    return figure


def stacked_shares(rows: dict[str, dict[str, float]], x: str) -> Figure:
    """Lab 07: shares that add up to 1, a bar a row, parts apart by colour and hatch; rows: name -> part -> share.

    Shares of at least 0.06 stand in the bar as numbers.
    """
    figure, axis = plt.subplots(figsize=(8.8, 0.42 * len(rows) + 1.3), layout="constrained")
    parts = list(next(iter(rows.values())))
    left = np.zeros(len(rows))
    for k, part in enumerate(parts):
        values = np.array([shares[part] for shares in rows.values()])
        style = {"color": f"C{k}", "hatch": ["", "///", "...", "xx"][k % 4], "edgecolor": "white", "alpha": 0.75}
        axis.barh(range(len(rows)), values, left=left, height=0.72, label=part, **style)
        for row, value in enumerate(values):
            if value >= 0.06:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
                axis.text(left[row] + value / 2, row, f"{value:.2f}", ha="center", va="center", fontsize=8.5, bbox=box)
        left += values
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(0, 1)
    axis.set_xlabel(x)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(parts), fontsize=9)
    return figure


def cone_figure(panels: dict[str, dict[str, dict[float, Rate]]]) -> Figure:
    """Lab 07: shares against the angle of the ablated direction in a plane; panels: plane -> metric -> angle -> share.

    Between 0 and 90 degrees lies the cone of the two basis vectors.
    """
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 3.4), sharey=True, layout="constrained", squeeze=False
    )
    for axis, (plane, curves) in zip(axes[0], panels.items(), strict=True):
        axis.axvspan(0, 90, color="grey", alpha=0.12, label="cone")
        for k, (metric, curve) in enumerate(curves.items()):
            at, shares, colour = list(curve), list(curve.values()), ("C1", "C0", "C2")[k % 3]
            ends = [s.low for s in shares], [s.high for s in shares]
            axis.plot(at, [s.value for s in shares], ["-", "--"][k % 2], marker="os"[k % 2], color=colour, label=metric)
            axis.vlines(at, *ends, color=colour, linewidth=1)
        axis.set_title(plane, fontsize=10)
        axis.set_xticks(range(0, 181, 45))
        axis.set_xlabel("angle in the plane (degrees)")
    axes[0, 0].set_ylabel("share of forbidden requests")
    axes[0, 0].set_ylim(-0.04, 1.04)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=9)
    return figure


# --- lab 09 ---


def breaking_curves(curves: dict[str, dict[int, Sequence[Outcome]]]) -> Figure:
    """Lab 09: what a model says after some steps of an attack; curves: model -> steps -> outcomes.

    Left: the share that is refused. Right: the share that holds the exact answer, refused or not.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True, layout="constrained")
    panels = {
        "refused": lambda o: o.refused,
        "exact answer": lambda o: o.correct,
    }
    for axis, (what, counts) in zip(axes, panels.items(), strict=True):
        for k, (model, curve) in enumerate(curves.items()):
            shares = [rate([counts(o) for o in outcomes]) for outcomes in curve.values()]
            axis.plot(
                list(curve),
                [s.value for s in shares],
                ["-", "--", ":", "-.", "-"][k % 5],
                marker="osD^x"[k % 5],
                color=f"C{k}",
                label=model,
            )
            axis.fill_between(list(curve), [s.low for s in shares], [s.high for s in shares], color=f"C{k}", alpha=0.08)
        axis.set_xscale("symlog", linthresh=2, base=2)
        steps = sorted({steps for curve in curves.values() for steps in curve})
        axis.set_xticks(steps, [str(s) for s in steps])
        axis.minorticks_off()
        axis.set_xlabel("steps of fine-tuning on forbidden answers")
        axis.set_title(what, fontsize=10)
    axes[0].set_ylim(-0.03, 1.03)
    axes[0].set_ylabel("share of requests, 95 % Wilson band")
    axes[1].legend(fontsize=9)
    return figure


def defence_grid(table: dict[str, dict[str, Sequence[Outcome]]]) -> Figure:
    """Lab 09: attacks (columns) against defences (rows); table: defence -> attack -> outcomes.

    A cell is coloured by the share of exact answers, its large number; the small one is the share refused. A reply can
    be both: an answer with a refusal behind it.
    """
    attacks = list(next(iter(table.values())))
    told = [[np.mean([o.correct for o in row[a]]) for a in attacks] for row in table.values()]
    figure, axis = plt.subplots(figsize=(1.5 * len(attacks) + 2.2, 0.75 * len(table) + 1.2), layout="constrained")
    image = axis.imshow(told, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(table.values()):
        for x, attack in enumerate(attacks):
            colour = "black" if told[y][x] > 0.5 else "white"
            axis.text(x, y - 0.1, f"{told[y][x]:.2f}", ha="center", va="center", color=colour, fontsize=11)
            refused = np.mean([o.refused for o in row[attack]])
            axis.text(x, y + 0.27, f"refused {refused:.2f}", ha="center", va="center", color=colour, fontsize=8)
    axis.set_xticks(range(len(attacks)), attacks)
    axis.xaxis.tick_top()
    axis.set_yticks(range(len(table)), list(table))
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    figure.colorbar(image, label="replies with the exact forbidden answer")
    return figure


# --- lab 10 ---


def score_plane(defences: dict[str, tuple[float, float]]) -> Figure:
    """Defences by (share of ordinary traffic kept, share of attacks stopped). Dashed lines join equal points.

    The solid line is where refusing at random leads from the first defence on.
    """
    figure, axis = plt.subplots(figsize=(6.5, 5), layout="constrained")
    for level in (0, 25, 50, 75):
        axis.plot([level / 100, 1], [1, level / 100], color="grey", linewidth=0.8, linestyle="--")
        place = level / 100 + 0.02, 0.98
        axis.annotate(f"{level} points", place, rotation=-38, fontsize=8, color="dimgrey", va="top")
    kept, stopped = next(iter(defences.values()))
    axis.plot([0, kept], [1, stopped], color="black", linewidth=1.2)
    for k, (name, place) in enumerate(defences.items()):
        axis.plot(*place, "oXs^DvPp*h"[k % 10], color=f"C{k % 6}", markersize=9, label=name, clip_on=False, zorder=3)
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    axis.set_xlabel("ordinary traffic kept: the kind that suffers most")
    axis.set_ylabel("attacks stopped: mean of all and worst")
    axis.legend(loc="lower left", fontsize=9)
    return figure


# --- lab 08 ---


def matrix_grid(shares: dict[str, dict[str, Rate]]) -> Figure:
    """Lab 08: attacks in rows, defences in columns; each cell says how many exact forbidden answers came out."""
    columns = list(dict.fromkeys(d for row in shares.values() for d in row))
    values = np.array([[row[d].value if d in row else np.nan for d in columns] for row in shares.values()])
    figure, axis = plt.subplots(figsize=(1.3 * len(columns) + 2.4, 0.55 * len(shares) + 1.2), layout="constrained")
    axis.imshow(values, cmap="Blues", vmin=0, vmax=1.2, aspect="auto")
    for y, row in enumerate(shares.values()):
        for x, d in enumerate(columns):
            if d in row:
                r = row[d]
                text = f"{r.value:.2f}\n[{r.low:.2f}, {r.high:.2f}]"
                axis.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if r.value > 0.7 else "black")
    axis.set_xticks(range(len(columns)), [d.replace(" ", "\n", 1) for d in columns], fontsize=9)
    axis.set_yticks(range(len(shares)), list(shares), fontsize=9)
    axis.xaxis.tick_top()
    axis.spines[:].set_visible(False)
    return figure


def roc_curve(curves: dict[str, Tensor], at: tuple[float, float] | None = None) -> Figure:
    """Lab 08: catches against false alarms; curves: name -> points [k, 2]. A cross marks the chosen threshold."""
    figure, axis = plt.subplots(figsize=(4.6, 3.8), layout="constrained")
    for k, (name, points) in enumerate(curves.items()):
        axis.step(*points.T.numpy(), ["-", "--", ":"][k % 3], where="post", color=f"C{k}", label=name)
    axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    if at:
        axis.plot(*at, "kx", markersize=11, markeredgewidth=2, label="threshold")
    axis.set_xlabel("false alarms: share of harmless requests")
    axis.set_ylabel("catches: share of harmful requests")
    axis.legend(fontsize=8, loc="lower right")
    return figure
