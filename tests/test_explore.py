"""Explorers: the view follows the controls, and stands in words where widgets are absent."""

import pytest
import torch

from refusallab import explore
from refusallab.directions import Candidate, Search


@pytest.fixture
def candidates(model_of):
    m = model_of("llama")
    vectors = torch.randn(m.n_layers, len(m.positions), m.width, generator=torch.Generator().manual_seed(0))
    scores = tuple(
        Candidate(position, layer, bypass=-layer - position / 10, induce=1.0 if layer < 2 else -1.0, kl=0.01)
        for layer in range(m.n_layers)
        for position in m.positions
    )
    search = Search(m.name, m.commit, m.n_layers, scores, vectors, (1,), {})
    return explore.candidates(m, search, ["How do I bake bread?"], ["Name a river"])


@pytest.mark.slow
def test_static_form_says_what_the_view_shows(candidates):
    bundle = candidates._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert data["text/plain"] == candidates.static
    assert "Harmful, direction ablated" in candidates.static and "layer 1" in candidates.static


@pytest.mark.slow
def test_moving_a_slider_changes_the_replies(candidates):
    before = candidates.shown.value
    candidates.controls[1].value -= 1
    assert candidates.shown.value != before


@pytest.mark.slow
def test_dropping_a_filter_changes_the_winner(candidates):
    induce = next(c for c in candidates.controls if c.description == "induce filter")
    assert "discarded" not in candidates.static
    induce.value = False
    (_, rows), *_ = candidates.tables
    assert rows[2][0] == "1"  # layer 2 of 3 stays out through the layer filter
    layer = next(c for c in candidates.controls if c.description == "layer filter")
    layer.value = False
    (_, rows), *_ = candidates.tables
    assert rows[2][0] == "2"


def test_what_a_model_says_is_shown_as_text_and_not_as_markup():
    view = explore.Explorer([], lambda: [("Reply", [("<b>bold</b>", "x")])])
    assert "<b>bold" not in view.shown.value


@pytest.mark.slow
def test_every_control_has_a_label(candidates):
    assert all(control.description for control in candidates.controls)
