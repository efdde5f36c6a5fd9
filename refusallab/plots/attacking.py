"""Figures of attacks with prompts: what became of requests, how many tries it takes, how a search goes down."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from refusallab.measure import Outcome, Rate, rate
from refusallab.plots.intervals import interval_band, reach
from refusallab.plots.style import BLUE, MARKS, ORANGE, PALETTE, VERMILLION, Style, legend_above, panels, series

BECAME = {
    "exact answer": (VERMILLION, "", lambda o: o.correct and not o.refused),
    "another answer": (ORANGE, "////", lambda o: not o.correct and not o.refused),
    "refused": ("lightgrey", "", lambda o: o.refused),
}


def outcome_bars(bars: dict[str, dict[str, Sequence[Outcome]]]) -> Figure:
    """Lab 06: what became of every request, a bar for each attack; bars: condition -> attack -> outcomes.

    Whiskers are the Wilson interval of the exact share. A reply that refuses counts as refused whatever else it says.
    """
    sizes: dict[str, dict[int, None]] = {}  # attack -> its numbers of requests in the panels, each once
    for attacks in bars.values():
        for name, outcomes in attacks.items():
            sizes.setdefault(name, {})[len(outcomes)] = None
    places = {name: k for k, name in enumerate(sizes)}
    figure, axes = panels(len(bars), 5.6 * len(bars), 0.36 * len(sizes) + 1.5, sharey=True)
    for axis, (condition, attacks) in zip(axes, bars.items(), strict=True):
        rows, left = np.array([places[name] for name in attacks]), np.zeros(len(attacks))
        for name, (colour, hatch, belongs) in BECAME.items():
            shares = [rate([belongs(o) for o in outcomes]) for outcomes in attacks.values()]
            values = np.array([share.value for share in shares])
            axis.barh(rows, values, 0.72, left, color=colour, hatch=hatch, edgecolor="white", label=name)
            if name == "exact answer":
                axis.errorbar(values, rows, xerr=reach(shares), fmt="none", ecolor="black", elinewidth=1.2, capsize=3)
            left += values
        axis.set_title(condition)
        axis.set_xlim(0, 1)
        axis.set_xlabel("share of requests")
    axes[0].set_yticks(range(len(sizes)), [f"{name} ({' / '.join(map(str, n))})" for name, n in sizes.items()])
    axes[0].invert_yaxis()
    legend_above(figure)
    return figure


def success_curves(curves: dict[str, dict[str, Sequence[Rate]]]) -> Figure:
    """Lab 06: best-of-n, shares against the number of tries; curves: condition -> what counts as success -> shares."""
    figure, axes = panels(len(curves), 4.4 * len(curves), 3.5, sharey=True)
    for axis, (condition, by_kind) in zip(axes, curves.items(), strict=True):
        styles = zip((VERMILLION, BLUE), "so", ("--", "-"), strict=True)
        for (name, shares), (colour, marker, dash) in zip(by_kind.items(), styles, strict=False):
            tries = range(1, len(shares) + 1)
            interval_band(axis, tries, shares, color=colour, marker=marker, linestyle=dash, label=name)
        axis.set_title(condition)
        axis.set_xlabel("tries")
        axis.set_xticks(tries)
    axes[0].set_ylim(-0.03, 1.03)
    axes[0].set_ylabel("share of requests,\n95 % Wilson band")
    legend_above(figure)
    return figure


def first_order(changes: dict[str, tuple[Tensor, Tensor]]) -> Figure:
    """Lab 06: the change of the loss that the gradient predicts against the real one; kind of swap -> (both, [n])."""
    figure, (axis,) = panels(1, 6, 4)
    for k, (name, (predicted, actual)) in enumerate(changes.items()):
        style: Style = {"color": PALETTE[k % 6], "alpha": 0.6, "markersize": 5, "label": f"{name} ({len(actual)})"}
        axis.plot(predicted, actual, MARKS[k % 6], **style)
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.axvline(0, color="grey", linewidth=0.8)
    axis.set_xlabel("predicted change of the loss, nats per token")
    axis.set_ylabel("real change of the loss,\nnats per token")
    legend_above(figure)
    return figure


def loss_curves(curves: dict[str, Sequence[Sequence[float]]], lines: dict[str, float]) -> Figure:
    """Lab 06: the lowest loss so far against the step: thin lines are single searches, thick ones their mean.

    curves: search -> losses of each run; lines: horizontal ones, with names. A run that stopped early keeps its lowest
    loss.
    """
    figure, (axis,) = panels(1, 7, 4)
    for k, (name, runs) in enumerate(curves.items()):
        longest, style = max(map(len, runs)), series(k)
        even = [[*run, *[run[-1]] * (longest - len(run))] for run in runs]
        best = np.minimum.accumulate(np.array(even), axis=1)
        steps = range(1, best.shape[1] + 1)
        axis.plot(steps, best.T, style["linestyle"], color=style["color"], linewidth=0.7, alpha=0.5)
        axis.plot(steps, best.mean(0), linewidth=2, label=f"{name}: mean of {len(runs)}", **style)
    for k, (name, value) in enumerate(lines.items()):
        axis.axhline(value, color="black", linewidth=0.9, linestyle=[":", "-."][k % 2])
        axis.annotate(name, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=9)
    axis.set_xlabel("step")
    axis.set_ylabel("lowest loss of the target so far,\nnats per token")
    axis.set_ylim(bottom=0)
    legend_above(figure)
    return figure
