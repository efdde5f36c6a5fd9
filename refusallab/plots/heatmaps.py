"""Numbers as colours, with the numbers written in the cells."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import ArrayLike

SEQUENTIAL, DIVERGING = "viridis", "PuOr_r"  # both can be read with every kind of colour vision
FADED = 0.25  # opacity of the cells that do not count


def heat_map(
    axis: Axes,
    values: ArrayLike,
    texts: Sequence[Sequence[str]] | None = None,
    *,
    rows: Sequence[object],
    columns: Sequence[object],
    limits: tuple[float | None, float | None] = (None, None),
    colours: str = SEQUENTIAL,
    faded: ArrayLike = False,
    size: float = 8,
) -> AxesImage:
    """Draw values [rows, columns] as colours between `limits`, with `texts` [rows][columns] in black or white.

    rows, columns: labels of the axes. faded: bool [rows, columns], the cells that are pale. Cells with NaN are empty.
    """
    grid = np.asarray(values, dtype=float)
    opacity = np.where(np.broadcast_to(faded, grid.shape), FADED, 1.0)
    image = axis.imshow(
        np.ma.masked_invalid(grid), cmap=colours, vmin=limits[0], vmax=limits[1], alpha=opacity, aspect="auto"
    )
    axis.set_xticks(range(len(columns)), list(map(str, columns)))
    axis.set_yticks(range(len(rows)), list(map(str, rows)))
    axis.spines[:].set_visible(False)
    axis.tick_params(length=2)
    if texts is not None:
        shown = image.to_rgba(grid)[..., :3]
        shown = np.where(np.isnan(grid)[..., None], 1.0, 1 - opacity[..., None] * (1 - shown))  # on white
        for row, column in np.ndindex(grid.shape):
            ink = _ink(shown[row, column])
            axis.text(column, row, texts[row][column], ha="center", va="center", fontsize=size, color=ink)
    return image


def colour_bar(figure: Figure, image: AxesImage, axes: Sequence[Axes], label: str) -> None:
    """The scale of the colours, on the right of these panels."""
    figure.colorbar(image, ax=list(axes), label=label, fraction=0.04, pad=0.02)


def _ink(background: np.ndarray) -> str:
    """Black or white, whichever has more contrast with a colour [3] (relative luminance, WCAG 2)."""
    linear = np.where(background <= 0.04045, background / 12.92, ((background + 0.055) / 1.055) ** 2.4)
    return "black" if linear @ (0.2126, 0.7152, 0.0722) > 0.179 else "white"
