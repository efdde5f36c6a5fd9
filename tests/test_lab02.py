"""Lab 02: its figures, its explorer, what its checks tell from a guess, and the bug of its clinic."""

import math
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch

from refusallab import explore, plots
from refusallab.activations import residual
from refusallab.course.exercise import run_cases
from refusallab.course.exercises import find_exercise, lab02
from refusallab.directions import candidate_directions, discarded_because
from refusallab.interventions import unit
from refusallab.model import load, logits
from refusallab.plots.heatmaps import FADED

SOLUTIONS = Path(__file__).parent.parent / "solutions"


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.mark.parametrize("exercise", lab02.EXERCISES, ids=lambda e: e.number)
def test_the_lab_goes_on_with_the_answer(exercise):
    (path,) = SOLUTIONS.glob("02_*.ipynb")
    sources = [cell.source for cell in nbformat.read(path, 4).cells]
    assert any(f'solved("{exercise.number}", {exercise.function})' in source for source in sources)


@pytest.fixture
def search(made_search):
    return made_search(8, 5)


def panels(figure):
    return [axis for axis in figure.axes if axis.images]


def test_the_surfaces_fade_what_is_discarded_and_hatch_nothing(search):
    kept = [[discarded_because(c, 8) is None for c in search.candidates if c.position == p] for p in range(-5, 0)]
    assert 0 < np.sum(kept) < 40
    for axis in panels(plots.score_surfaces(search)):
        assert np.array_equal(axis.images[0].get_alpha(), np.where(kept, 1, FADED))
        assert not axis.patches, "nothing lies on the numbers"


def test_the_surfaces_hold_every_score_with_its_unit(search):
    bypass, induce, kl = panels(plots.score_surfaces(search))
    for axis, name, digits in ((bypass, "bypass", 1), (induce, "induce", 1), (kl, "kl", 2)):
        shown = {text.get_position(): float(text.get_text()) for text in axis.texts}
        for c in search.candidates:
            assert shown[c.layer, c.position + 5] == pytest.approx(getattr(c, name), abs=0.51 * 10**-digits)
        assert axis.get_xlabel() == "layer (block input)"
    assert "log-odds" in bypass.get_title() and "log-odds" in induce.get_title() and "nats" in kl.get_title()
    assert bypass.get_ylabel() == "position"
    assert [label.get_text() for label in bypass.get_yticklabels()] == ["-5", "-4", "-3", "-2", "-1"]


def test_bright_is_good_in_every_grid_and_the_legend_says_so(search):
    """The best candidates by each score are the brightest cells, the worst the darkest."""
    figure = plots.score_surfaces(search)
    for axis, sign in zip(panels(figure), (-1, 1, -1), strict=True):
        image = axis.images[0]
        values = np.asarray(image.get_array())
        bright = image.cmap(image.norm(values))[..., :3].sum(-1)
        best, worst = (sign * values).argmax(), (sign * values).argmin()
        assert bright.flat[best] == bright.max() and bright.flat[worst] == bright.min()
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == ["good score", "bad score", "pale: discarded by a filter", "selected"]
    good, bad = (handle.get_facecolor()[:3] for handle in figure.legends[0].get_patches()[:2])
    assert sum(good) > sum(bad)


def test_the_star_stands_on_the_selected_candidate(search):
    best = search.selected
    for axis in panels(plots.score_surfaces(search)):
        (star,) = (line for line in axis.lines if line.get_marker() == "*")
        assert (star.get_xdata()[0], round(star.get_ydata()[0])) == (best.layer, best.position + 5)


def test_a_score_that_is_no_number_is_said_and_has_no_colour(search):
    first, *others = search.candidates
    broken = replace(search, candidates=(replace(first, bypass=math.nan, induce=math.nan, kl=math.nan), *others))
    for axis in panels(plots.score_surfaces(broken)):
        assert {text.get_position(): text.get_text() for text in axis.texts}[0, 0] == "nan"
        assert axis.images[0].get_array().mask.sum() == 1


def test_the_surfaces_of_a_deep_model_hold_no_numbers(made_search):
    for axis in panels(plots.score_surfaces(made_search(30, 5))):
        assert not axis.texts
        assert sum(bool(label.get_text()) for label in axis.get_xticklabels()) <= 16


def test_the_null_shows_every_control_beside_the_selected_direction(search):
    nulls = [3.1, 3.4, 3.9]
    figure = plots.null_bypass(search, nulls, 3.7)
    (axis,) = figure.axes
    controls, star, untouched = axis.lines
    assert list(controls.get_xdata()) == nulls and list(star.get_xdata()) == [search.selected.bypass]
    assert untouched.get_xdata()[0] == 3.7 and "log-odds" in axis.get_xlabel()
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == ["3 random directions", "selected direction", "untouched model (layer-0 candidates)"]


def test_the_headline_shows_scores_limits_and_projections(search):
    streams = {name: torch.randn(n, 5) for name, n in (("harmful", 4), ("harmless", 6), ("borderline", 3))}
    figure = plots.headline_figure(search, streams)
    bypass, induce, kl, projections = figure.axes
    for axis, name in ((bypass, "bypass"), (induce, "induce"), (kl, "kl")):
        lines = [line for line in axis.lines if str(line.get_label()).startswith("position")]
        assert len(lines) == 5
        for line in lines:
            position = int(line.get_label().split()[-1])
            assert list(line.get_ydata()) == [getattr(c, name) for c in search.candidates if c.position == position]
    assert [kl.get_ylabel(), induce.get_ylabel()] == ["nats", "refusal metric (log-odds)"]
    limits = [line.get_ydata()[0] for axis in (induce, kl) for line in axis.lines if "limit" in str(line.get_label())]
    assert limits == [0.0, 0.1]
    (late,) = bypass.patches
    assert (late.get_x(), late.get_x() + late.get_width()) == (5.5, 7.5)  # layers 6 and 7 of 8
    direction = unit(search.direction.vector)
    for points, stream in zip(projections.collections, streams.values(), strict=True):
        assert np.allclose(points.get_offsets().data[:, 0], stream @ direction)
    assert [label.get_text() for label in projections.get_yticklabels()][0] == "harmful\n(n=4)"
    assert "limit of a filter" in [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.slow
def test_the_explorer_says_why_a_candidate_is_discarded_and_who_wins(model_of, made_search):
    m = model_of("llama")
    vectors = torch.randn(m.n_layers, len(m.positions), m.width, generator=torch.Generator().manual_seed(0))
    search = replace(made_search(m.n_layers, len(m.positions)), vectors=vectors)
    search = replace(search, candidates=tuple(replace(c, induce=c.layer - 0.5) for c in search.candidates))
    shown = explore.candidates(m, search, ["Name a river"], ["List"])
    layer, position, *filters = shown.controls
    assert (layer.value, position.value) == (search.selected.layer, search.selected.position) == (1, -1)
    assert [switch.description for switch in filters] == ["KL filter", "induce filter", "layer filter"]
    layer.value = 2
    assert "chosen: layer in the last 20%" in shown.static
    filters[2].value = False
    (_, rows), *_ = shown.tables
    assert rows[2][:2] == ("2", "-1") and rows[0][2:5] == ("bypass", "induce", "KL")


@pytest.mark.slow
@pytest.mark.parametrize("exercise", lab02.EXERCISES, ids=lambda e: e.number)
def test_the_cases_tell_the_reference_from_a_guess(exercise):
    assert run_cases(find_exercise(exercise.number), exercise.reference, 11).passed
    assert not run_cases(find_exercise(exercise.number), lambda *args, **kwargs: 0.0, 11).passed


def test_layer_0_is_a_free_control(model_of, prompts):
    """Before the first block every prompt is the same at a template token: no direction, and scores that say so."""
    vectors = candidate_directions(model_of("llama"), prompts[:2], prompts[2:])
    assert not vectors[0].any() and vectors[1:].norm(dim=-1).min() > 0


def test_the_last_token_is_read_whatever_else_is_in_the_batch(model_of):
    """The bug of the clinic, not in the library: padding on the right would make position -1 a padding token."""
    m = model_of("llama")
    alone = residual(m, ["List"], layers=[1], positions=[-1])
    together = residual(m, ["List", "Please explain the recipe for the harvest pie"], layers=[1], positions=[-1])
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-4)


def test_the_model_of_the_lab_has_the_sites_that_the_lab_counts():
    m = load("charter-chat")
    assert (m.n_layers, list(m.positions)) == (8, [-5, -4, -3, -2, -1])
    assert logits(m, ["How do I brew Maddith?"]).shape == (1, m.vocab_size)
