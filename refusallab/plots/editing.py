"""Figures of edits: of activations at some strength, of weights matrix by matrix, of directions in a plane."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from refusallab.measure import Rate
from refusallab.plots.intervals import interval_band
from refusallab.plots.style import (
    BLUE,
    COLOURS,
    DASHES,
    GREEN,
    MARKERS,
    VERMILLION,
    Style,
    legend_above,
    panels,
    series,
)
from refusallab.steering import Dose

OUTCOMES: dict[str, Style] = {"refused": {"color": VERMILLION, "marker": "o"}, "exact": {"color": BLUE, "marker": "s"}}
ROUNDING = 1e-4  # what fp32 leaves of equal numbers
FLOOR = 1e-7  # where a logarithmic axis shows 0


def dose_figure(curves: dict[str, dict[str, Sequence[Dose]]]) -> Figure:
    """Lab 04: refusal, truth (above) and fluency (below) against the coefficient.

    curves: prompts -> vector -> doses. The first vector is drawn solid, its controls dashed or dotted.
    """
    figure, axes = plt.subplots(
        2,
        len(curves),
        figsize=(5.2 * len(curves), 6.4),
        sharex="col",
        sharey="row",
        layout="constrained",
        squeeze=False,
    )
    for (above, below), (prompts, by_vector) in zip(axes.T, curves.items(), strict=True):
        for k, (vector, doses) in enumerate(by_vector.items()):
            dash, at = DASHES[k % 4], [d.coefficient for d in doses]
            for metric, style in OUTCOMES.items():
                shares = [getattr(d, metric) for d in doses]
                label = f"{metric}, {vector}"
                interval_band(above, at, shares, alpha=0 if k else 0.15, label=label, linestyle=dash, **style)
            loss = [d.loss for d in doses]
            below.plot(at, loss, linestyle=dash, marker="D", color=GREEN, label=f"loss, {vector}")
        above.set_title(prompts)
        below.set_xlabel("coefficient (lengths of r)")
        for axis in (above, below):
            axis.axvline(0, color="grey", linewidth=0.8)
    axes[0, 0].set_ylabel("share of replies, 95 % Wilson band")
    axes[1, 0].set_ylabel("loss of the reply under the\nuntouched model, nats per token")
    legend_above(figure)
    return figure


def response_curves(curves: dict[str, dict[str, dict[float, Rate]]], y: str) -> Figure:
    """Lab 04: a share against the strength of an edit; curves: edit -> set of prompts -> strength -> share."""
    figure, axes = panels(len(curves), 5.2 * len(curves), 3.8, sharey=True)
    for axis, (edit, sets) in zip(axes, curves.items(), strict=True):
        for name, curve in sets.items():
            style: Style = {"marker": MARKERS[name], "color": COLOURS[name]}
            label = f"{name} prompts, 95 % Wilson band"
            interval_band(axis, list(curve), list(curve.values()), label=label, **style)
        for mark in (0, 1):
            axis.axvline(mark, color="grey", linewidth=0.8, linestyle="--")
        axis.set_xlabel(edit)
    axes[0].set_ylabel(y)
    legend_above(figure)
    return figure


def write_strengths(strengths: dict[str, dict[str, float]]) -> Figure:
    """Lab 05: how strongly each matrix writes a direction, matrix by matrix. strengths: line -> matrix -> value."""
    names = list(next(iter(strengths.values())))
    figure, (axis,) = panels(1, max(7.0, 0.45 * len(names)), 3.6)
    for k, (line, values) in enumerate(strengths.items()):
        axis.plot(list(values.values()), label=line, **series(k))
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=9)
    axis.set_xlabel("matrix that writes into the stream")
    axis.set_ylabel("strength of writing along\nthe direction (1: by chance)")
    axis.set_ylim(bottom=-0.1)
    legend_above(figure)
    return figure


def gap_curves(curves: dict[str, dict[str, Tensor]]) -> Figure:
    """Lab 05: the gap between hooks and weights, layer by layer and in the logits; curves: model -> edit -> gaps."""
    figure, axes = panels(len(curves), 4.6 * len(curves), 3.8, sharey=True)
    kinds = list(dict.fromkeys(edit for edits in curves.values() for edit in edits))
    for axis, (model, edits) in zip(axes, curves.items(), strict=True):
        for edit, gaps in edits.items():
            k = kinds.index(edit)
            style = {**series(k), "markersize": max(13 - 2 * k, 3), "fillstyle": "none"}  # lines may coincide
            values = gaps.clamp(min=FLOOR).tolist()
            axis.plot(range(len(values) - 1), values[:-1], label=edit, **style)
            axis.plot(len(values), values[-1], **style)
        n = len(values) - 1
        step = 1 if n <= 12 else n // 8
        axis.set_xticks([*range(0, n, step), n + 1], [*map(str, range(0, n, step)), "logits"])
        axis.set_yscale("log")
        label = "rounding in fp32" if axis is axes[-1] else None  # the last entry of the legend
        axis.axhspan(FLOOR, ROUNDING, color="grey", alpha=0.15, linewidth=0, label=label)
        axis.set_title(model)
        axis.set_xlabel("layer (block input)")
    axes[0].set_ylabel("largest |hooks - weights|\n(units of the stream; logits)")
    legend_above(figure)
    return figure


def cone_figure(curves: dict[str, dict[str, dict[float, Rate]]]) -> Figure:
    """Lab 07: shares against the angle of the ablated direction in a plane; curves: plane -> metric -> angle -> share.

    Between 0 and 90 degrees lies the cone of the two basis vectors. Bands are Wilson intervals.
    """
    figure, axes = panels(len(curves), 4.6 * len(curves), 3.5, sharey=True)
    for axis, (plane, by_metric) in zip(axes, curves.items(), strict=True):
        axis.axvspan(0, 90, color="grey", alpha=0.12, linewidth=0, label="cone")
        for metric, dash in zip(OUTCOMES, DASHES, strict=False):
            curve, style = by_metric[metric], OUTCOMES[metric]
            interval_band(axis, list(curve), list(curve.values()), label=metric, linestyle=dash, **style)
        axis.set_title(plane)
        axis.set_xticks(list(curve))
        axis.set_xlabel("angle in the plane (degrees)")
    axes[0].set_ylabel("share of forbidden requests,\n95 % Wilson band")
    axes[0].set_ylim(-0.04, 1.04)
    legend_above(figure)
    return figure


def edit_trials(
    searches: dict[str, tuple[Sequence[tuple[float, float]], dict[str, tuple[float, float]]]],
) -> Figure:
    """Lab 14: all edits that a search tried, by what refusal they leave and what they cost; a panel for each model.

    searches: model -> (trials, name -> single edit to compare with), each edit as (KL, bypass). Low and left is good
    for whoever edits. A KL of 0, or below by rounding, is drawn at FLOOR. A line joins the trials that no other beats
    in both scores.
    """
    figure, axes = panels(len(searches), 5.2 * len(searches), 4.2, sharey=True)
    for axis, (model, (trials, others)) in zip(axes, searches.items(), strict=True):
        kl, bypass = np.array(sorted((max(kl, FLOOR), bypass) for kl, bypass in trials)).T
        best = bypass <= np.minimum.accumulate(bypass)
        axis.scatter(kl, bypass, s=14, alpha=0.5, color="grey", label="a trial")
        axis.step(kl[best], bypass[best], where="post", color=BLUE, label="not beaten in both")
        for k, (name, (cost, left)) in enumerate(others.items(), start=1):
            look: Style = {"color": series(k)["color"], "marker": series(k)["marker"], "markersize": 9}
            axis.plot(max(cost, FLOOR), left, linestyle="", label=name, **look)
        axis.set_xscale("log")
        axis.set_xlabel("KL on harmless prompts (nats)")
        axis.set_title(model)
    axes[0].set_ylabel("mean refusal metric (log-odds)")
    legend_above(figure)
    return figure
