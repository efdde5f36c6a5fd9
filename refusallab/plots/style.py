"""The look of every figure: the palette of Okabe and Ito, marks and dashes beside the colours, one legend above."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
PALETTE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
MARKS, DASHES = "ox^Dsv", ("-", "--", "-.", ":")
COLOURS = {"harmful": VERMILLION, "harmless": BLUE, "borderline": PURPLE}  # of the sets of prompts
MARKERS = {"harmful": "x", "harmless": "o", "borderline": "^"}
LEGIBLE = 16  # more layers than this leave no room for numbers and labels
Style = dict[str, Any]  # keywords of a drawing function of matplotlib


def use_style() -> None:
    """The look of every figure of the course: legible at 100 % in a notebook."""
    plt.rcParams.update(
        {
            "figure.dpi": 100,
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "axes.prop_cycle": plt.cycler(color=PALETTE),
            "legend.frameon": False,
            "legend.fontsize": 9,
        }
    )


def panels(count: int, width: float, height: float, **settings: Any) -> tuple[Figure, list[Axes]]:
    """A figure of that many inches with `count` panels side by side."""
    figure, axes = plt.subplots(1, count, figsize=(width, height), layout="constrained", squeeze=False, **settings)
    return figure, list(axes[0])


def series(k: int) -> Style:
    """Colour, marker and dash of the k-th line of a panel: any two of the first twelve differ."""
    return {"color": PALETTE[k % 6], "marker": MARKS[k % 6], "linestyle": DASHES[(k + k // 6) % 4]}


def kind_of(name: str) -> str:
    """The kind of a set of prompts, which its name begins with: a key of COLOURS and MARKERS, or ""."""
    return next((kind for kind in COLOURS if name.startswith(kind)), "")


def legend_above(figure: Figure, *axes: Axes) -> None:
    """One legend for these panels (default: all), above the figure, where it covers no data."""
    handles: dict[str, Any] = {}
    for axis in axes or figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    entry = 0.6 + 0.075 * max(map(len, handles))  # inches
    columns = max(1, min(len(handles), int(figure.get_figwidth() / entry)))
    figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=columns)


def whole(axis: Axis) -> None:
    """Ticks at whole numbers."""
    axis.set_major_locator(MaxNLocator(integer=True))


def number(value: float, digits: int) -> str:
    """A number with so many digits behind the point, and never -0."""
    return f"{round(float(value), digits) + 0.0:.{digits}f}"


def thinned(labels: Sequence[object]) -> list[str]:
    """The labels of an axis, most of them blank where there are too many to be read."""
    step = -(-len(labels) // LEGIBLE)
    return ["" if k % step else str(label) for k, label in enumerate(labels)]


def layer_names(count: int) -> list[str]:
    """Labels of `count` states of the residual stream: the block inputs, and the end."""
    return [*thinned(range(count - 1)), "end"]
