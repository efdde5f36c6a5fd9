"""Figures about measuring: the refusal metric, judges beside the truth, what an interval promises."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from refusallab.measure import Rate
from refusallab.plots.intervals import interval_rows
from refusallab.plots.style import COLOURS, kind_of, legend_above, panels


def metric_histograms(metrics: dict[str, Tensor]) -> Figure:
    """Lab 01: histograms of the refusal metric, one row for each set, on one axis. 0 is even odds."""
    figure, axes = plt.subplots(
        len(metrics), 1, figsize=(7, 1.1 * len(metrics) + 0.8), sharex=True, layout="constrained", squeeze=False
    )
    everything = np.concatenate([np.asarray(values) for values in metrics.values()])
    bins = np.linspace(min(everything.min(), -1), max(everything.max(), 1), 41)
    for axis, (name, values) in zip(axes[:, 0], metrics.items(), strict=True):
        kind = kind_of(name) or "harmless"
        axis.hist(values, bins, color=COLOURS[kind], alpha=0.8)
        axis.axvline(0, color="black", linestyle="--", linewidth=0.9)
        axis.yaxis.set_major_locator(MaxNLocator(3, integer=True))  # a low panel
        axis.set_ylabel("prompts")
        axis.set_title(f"{name} (n={len(values)})", loc="left")
    axes[-1, 0].set_xlabel("refusal metric (log-odds that the reply opens with a refusal token)")
    return figure


def judged_shares(shares: dict[str, dict[str, Rate]], truth: dict[str, float]) -> Figure:
    """Lab 01: the share that each judge calls a refusal, beside the truth (grey bar), condition by condition.

    shares: condition -> judge -> Rate; truth: condition -> share. Whiskers are Wilson intervals.
    """
    figure, (axis,) = panels(1, 8.5, 0.62 * len(shares) + 1.4)
    interval_rows(axis, shares)
    for row, condition in enumerate(shares):
        ends = [row - 0.33, row + 0.33]
        axis.plot([truth[condition]] * 2, ends, color="grey", linewidth=3, zorder=0, label="truth")
    axis.set_xlim(-0.03, 1.03)
    axis.set_xlabel("share of replies called a refusal, with 95 % Wilson interval")
    legend_above(figure)
    return figure


def interval_coverage(coverage: dict[str, np.ndarray], p: np.ndarray, n: int) -> Figure:
    """Lab 01: how often a nominal 95 % interval holds the true share p, for n cases. A line for each kind."""
    figure, (axis,) = panels(1, 7, 2.9)
    for (name, values), dash in zip(coverage.items(), ["-", "--", "-."], strict=False):
        axis.plot(p, values, dash, label=name, linewidth=1.4)
    axis.axhline(0.95, color="black", linewidth=0.8, linestyle=":", label="what 95 % promises")
    axis.set_ylim(0, 1.02)
    axis.set_xlabel(f"true share (n={n})")
    axis.set_ylabel("share of samples whose interval\ncontains the true share")
    legend_above(figure)
    return figure
