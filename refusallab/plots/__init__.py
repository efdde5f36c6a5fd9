"""Figures. Every function returns a matplotlib figure, except `schematic`, which returns an image for a notebook.

Colours are the Okabe-Ito palette, and never the only thing that tells two marks apart.
"""

from refusallab.plots.attacking import first_order, loss_curves, outcome_bars, success_curves
from refusallab.plots.defending import (
    audit_plane,
    breaking_curves,
    cost_curve,
    defence_grid,
    matrix_grid,
    roc_curve,
    score_plane,
    score_traces,
)
from refusallab.plots.editing import cone_figure, dose_figure, edit_trials, gap_curves, response_curves, write_strengths
from refusallab.plots.finding import headline_figure, null_bypass, score_surfaces
from refusallab.plots.geometry import cosine_maps, dot_rows, plane_figure, share_grids
from refusallab.plots.inside import (
    layer_curves,
    lens_curves,
    lens_grid,
    recovery_curves,
    recovery_grids,
    stacked_shares,
    token_strips,
    twin_distances,
    write_grids,
)
from refusallab.plots.intervals import difference_rows, rate_panels, rate_rows
from refusallab.plots.measuring import interval_coverage, judged_shares, metric_histograms
from refusallab.plots.schematics import schematic
from refusallab.plots.style import use_style

__all__ = [
    "audit_plane",
    "breaking_curves",
    "cone_figure",
    "cosine_maps",
    "cost_curve",
    "defence_grid",
    "difference_rows",
    "dose_figure",
    "dot_rows",
    "edit_trials",
    "first_order",
    "gap_curves",
    "headline_figure",
    "interval_coverage",
    "judged_shares",
    "layer_curves",
    "lens_curves",
    "lens_grid",
    "loss_curves",
    "matrix_grid",
    "metric_histograms",
    "null_bypass",
    "outcome_bars",
    "plane_figure",
    "rate_panels",
    "rate_rows",
    "recovery_curves",
    "recovery_grids",
    "response_curves",
    "roc_curve",
    "schematic",
    "score_plane",
    "score_surfaces",
    "score_traces",
    "share_grids",
    "stacked_shares",
    "success_curves",
    "token_strips",
    "twin_distances",
    "use_style",
    "write_grids",
    "write_strengths",
]
