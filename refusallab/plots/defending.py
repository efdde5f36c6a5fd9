"""Figures of defences: attack x defence, thresholds, what fine-tuning undoes, and the plane of the capstone's score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from refusallab.measure import Outcome, Rate, rate
from refusallab.plots.heatmaps import colour_bar, heat_map
from refusallab.plots.intervals import interval_band, reach
from refusallab.plots.style import PALETTE, Style, legend_above, panels, series, whole

ROW, COLUMN = 24, 13  # letters in a line of a label


def _attack_grid(cells: Mapping[str, Mapping[str, tuple[Rate, str]]], label: str, columns: str = "defence") -> Figure:
    """Attacks in rows, defences, or what `columns` says, in columns.

    cells: attack -> defence -> (share that gives colour and number, remark). A pair that was not run has no cell.
    """
    attacks, defences = list(cells), list(dict.fromkeys(d for row in cells.values() for d in row))
    shares = [[row[d][0].value if d in row else np.nan for d in defences] for row in cells.values()]
    texts = [[f"{row[d][0].value:.2f}\n{row[d][1]}" if d in row else "" for d in defences] for row in cells.values()]
    figure, (axis,) = panels(1, 1.15 * len(defences) + 3.4, 0.5 * len(attacks) + 1.4)
    image = heat_map(
        axis,
        shares,
        texts,
        rows=[fill(name, ROW, break_on_hyphens=False) for name in attacks],
        columns=[fill(name, COLUMN, break_on_hyphens=False) for name in defences],
        limits=(0, 1),
        size=8.5,
    )
    axis.xaxis.tick_top()
    axis.xaxis.set_label_position("top")
    axis.set_xlabel(columns)
    axis.set_ylabel("attack")
    colour_bar(figure, image, [axis], label)
    return figure


def matrix_grid(shares: dict[str, dict[str, Rate]]) -> Figure:
    """Lab 08: attacks in rows, defences in columns; each cell says how many exact forbidden answers came out.

    shares: attack -> defence -> share; its Wilson interval is below it. Cells that were not run are empty.
    """
    cells = {a: {d: (r, f"[{r.low:.2f}, {r.high:.2f}]") for d, r in row.items()} for a, row in shares.items()}
    return _attack_grid(cells, f"share of requests with the exact forbidden answer ({_cases(cells)})")


def defence_grid(table: dict[str, dict[str, Sequence[Outcome]]], columns: str = "defence") -> Figure:
    """Labs 09 and 11: attacks in rows, defences, or what `columns` says, in columns.

    table: defence -> attack -> outcomes. A cell is coloured by the share of exact answers, its first number; the share
    refused is below it. A reply can be both: an answer with a refusal behind it.
    """
    cells: dict[str, dict[str, tuple[Rate, str]]] = {}
    for defence, row in table.items():
        for attack, outcomes in row.items():
            remark = f"refused {rate([o.refused for o in outcomes]).value:.2f}"
            cells.setdefault(attack, {})[defence] = rate([o.correct for o in outcomes]), remark
    return _attack_grid(cells, f"share of replies with the exact forbidden answer ({_cases(cells)})", columns)


def _cases(cells: Mapping[str, Mapping[str, tuple[Rate, str]]]) -> str:
    numbers = sorted({share.n for row in cells.values() for share, _ in row.values()})
    return f"n={numbers[0]}" if len(numbers) == 1 else f"n={numbers[0]} to {numbers[-1]}"


def roc_curve(curves: dict[str, Tensor], at: tuple[float, float] | None = None) -> Figure:
    """Lab 08: catches against false alarms; curves: name -> points [k, 2]. A cross marks the chosen threshold."""
    figure, (axis,) = panels(1, 4.6, 4.1)
    for k, (name, points) in enumerate(curves.items()):
        style = series(k)
        axis.step(*points.T.numpy(), where="post", color=style["color"], linestyle=style["linestyle"], label=name)
    axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8, label="chance")
    if at:
        axis.plot(*at, "kx", markersize=11, markeredgewidth=2, label="threshold")
    axis.set_xlabel("false alarms: share of harmless requests")
    axis.set_ylabel("catches: share of harmful requests")
    legend_above(figure)
    return figure


def breaking_curves(
    curves: dict[str, dict[int, Sequence[Outcome]]],
    x: str = "steps of fine-tuning on forbidden answers",
    *,
    doublings: bool = True,
) -> Figure:
    """Labs 09, 13, 14: what a model says after a dose of an attack; curves: model -> dose, such as steps -> outcomes.

    Left: the share that is refused. Right: the share that holds the exact answer, refused or not. `doublings` spaces
    the doses from 2 on by their logarithm.
    """
    figure, axes = panels(2, 11, 4, sharey=True)
    counted = {"refused": lambda o: o.refused, "exact answer": lambda o: o.correct}
    steps = sorted({steps for curve in curves.values() for steps in curve})
    for axis, (what, counts) in zip(axes, counted.items(), strict=True):
        for k, (model, curve) in enumerate(curves.items()):
            shares = [rate([counts(o) for o in outcomes]) for outcomes in curve.values()]
            interval_band(axis, list(curve), shares, alpha=0.08, label=model, **series(k))
        if doublings:
            axis.set_xscale("symlog", linthresh=2, base=2)
        axis.set_xticks(steps, list(map(str, steps)))
        axis.minorticks_off()
        axis.set_xlabel(x)
        axis.set_title(what)
    axes[0].set_ylim(-0.03, 1.03)
    axes[0].set_ylabel("share of requests, 95 % Wilson band")
    legend_above(figure)
    return figure


def audit_plane(points: dict[str, dict[str, tuple[float, float]]]) -> Figure:
    """Lab 14: checkpoints by the two signals of an audit; points: kind -> name -> (rank-one energy, gap left).

    Points are numbered in their order. Dashed lines mark what an untouched copy has: energy 0, the whole gap.
    """
    figure, (axis,) = panels(1, 7, 4.4)
    numbers = iter(range(1, sum(map(len, points.values())) + 1))
    for k, (kind, named) in enumerate(points.items()):
        style = series(k)
        xy = np.array(list(named.values()))
        axis.scatter(xy[:, 0], xy[:, 1], s=42, alpha=0.8, color=style["color"], marker=style["marker"], label=kind)
        side: Style = {"xytext": (-6, -3), "ha": "right"} if k == 0 else {"xytext": (5, 4)}
        for place in named.values():
            axis.annotate(str(next(numbers)), place, textcoords="offset points", fontsize=9, **side)
    axis.axhline(1, color="grey", linestyle="--", linewidth=0.8)
    axis.axvline(0, color="grey", linestyle="--", linewidth=0.8)
    axis.set_xlabel("rank-one energy of the change")
    axis.set_ylabel("refusal gap left, as a share")
    legend_above(figure)
    return figure


def score_plane(defences: dict[str, tuple[Rate, Rate]]) -> Figure:
    """Lab 10: defences by (share of ordinary traffic kept, share of attacks stopped), with their intervals.

    Dashed lines join equal points. The solid line shows where the first defence ends up when it also refuses at random.
    What is kept is counted against that defence, so its own share is 1 and has no interval.
    """
    figure, (axis,) = panels(1, 7, 5.3)
    for level in (0, 25, 50, 75):
        axis.plot([level / 100, 1], [1, level / 100], color="grey", linewidth=0.8, linestyle="--")
        beside: Style = {"xytext": (12, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
        axis.annotate(f"{level} points", (1, level / 100), fontsize=9, color="dimgrey", **beside)
    kept, stopped = next(iter(defences.values()))
    axis.plot([0, kept.value], [1, stopped.value], color="black", linewidth=1.2, label="refusing at random")
    for k, (name, (kept, stopped)) in enumerate(defences.items()):
        axis.errorbar(
            kept.value,
            stopped.value,
            xerr=reach([kept]) if k else None,
            yerr=reach([stopped]),
            fmt="oXs^DvPp*h"[k % 10],
            color=PALETTE[k % 6],
            markersize=9,
            elinewidth=1.2,
            label=f"{name} (n={stopped.n})",
            clip_on=False,
            zorder=3,
        )
    axis.set(xlim=(0, 1), ylim=(0, 1))
    axis.set_xlabel("share of ordinary traffic kept: the kind that suffers most, 95 % interval")
    axis.set_ylabel("share of attacks stopped: mean of all and worst,\n95 % interval")
    legend_above(figure)
    return figure


def score_traces(traces: dict[str, dict[str, Tensor]], threshold: float) -> Figure:
    """Lab 13: scores token by token, a panel for each name, and the threshold; traces: panel -> line -> [tokens].

    A cross marks the first token above the threshold.
    """
    figure, axes = panels(len(traces), 4.6 * len(traces), 3.4, sharey=True)
    for axis, (name, lines) in zip(axes, traces.items(), strict=True):
        for k, (line, scores) in enumerate(lines.items()):
            tokens = np.arange(1, len(scores) + 1)
            axis.plot(tokens, scores, label=line, markersize=4, **series(k))
            above = (scores > threshold).nonzero().flatten()
            if len(above):
                first = int(above[0])
                axis.plot(first + 1, scores[first], "X", color="black", markersize=9, zorder=3)
        axis.axhline(threshold, color="black", linewidth=0.9, linestyle=":")
        axis.set_title(name)
        axis.set_xlabel("token of the reply")
        whole(axis.xaxis)
    axes[0].annotate(
        "threshold", (1, threshold), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=9
    )
    axes[0].set_ylabel("score")
    legend_above(figure)
    return figure


def cost_curve(curves: dict[str, Sequence[tuple[float, Rate]]], x: str, y: str) -> Figure:
    """Lab 13: what a watcher catches against what it costs; curves: watcher -> (cost, share) from cheap to dear."""
    figure, (axis,) = panels(1, 7, 3.8)
    for k, (name, points) in enumerate(curves.items()):
        interval_band(axis, [cost for cost, _ in points], [share for _, share in points], label=name, **series(k))
    axis.set_ylim(-0.03, 1.03)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    legend_above(figure)
    return figure
