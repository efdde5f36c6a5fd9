"""Lab 03: projections, planes, held-out separation, the direct effect on logits; its figures and its explorer."""

import matplotlib.pyplot as plt
import pytest
import torch

from refusallab import explore, geometry, plots
from refusallab.errors import RefusalLabError
from refusallab.model import encode, final_norm, unembedding


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def streams():
    g = torch.Generator().manual_seed(0)
    shift = torch.zeros(3, 2, 6)
    shift[1:, :, 0] = 4
    draw = lambda n: torch.randn(n, 3, 2, 6, generator=g) * torch.tensor([0.0, 1, 1])[:, None, None]  # noqa: E731
    return {"harmful": draw(12) + shift, "harmless": draw(10), "borderline": draw(5)}


def test_a_projection_is_a_length_along_the_unit_vector():
    x, r = torch.tensor([[[3.0, 4.0], [1.0, 1.0]]]), torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    assert geometry.projections(x, r).tolist() == [[4.0, 0.0]]
    with pytest.raises(RefusalLabError, match="one direction for each site"):
        geometry.projections(x, r[0])


def test_the_principal_plane_holds_the_longest_axes():
    x = torch.randn(400, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 9, 0.1, 3, 0.1]) + 7
    plane = geometry.principal_plane(x)
    assert plane.axes.abs().argmax(1).tolist() == [1, 3]
    torch.testing.assert_close(plane.axes @ plane.axes.T, torch.eye(2))
    assert plane.shares[0] > plane.shares[1] > 0 and sum(plane.shares) > 0.99
    torch.testing.assert_close(plane.at(x).mean(0), torch.zeros(2), atol=1e-4, rtol=0)


def test_a_plane_along_a_direction_starts_with_it():
    g = torch.Generator().manual_seed(0)
    x, r = torch.randn(50, 5, generator=g), torch.randn(5, generator=g)
    plane = geometry.plane_along(x, r)
    torch.testing.assert_close(plane.axes[0], r / r.norm())
    torch.testing.assert_close(plane.axes @ plane.axes.T, torch.eye(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("plane", [geometry.principal_plane, lambda x: geometry.plane_along(x, torch.ones(5))])
def test_a_plane_needs_two_prompts(plane):
    with pytest.raises(RefusalLabError, match="number of prompts is 1: give 2 or more"):
        plane(torch.randn(1, 5))


def test_right_side_takes_direction_and_midpoint_from_the_first_two():
    a, b = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 0.0], [2.0, 0.0]])  # means 4 and 1, midpoint 2.5
    new_a, new_b = torch.tensor([[2.4, 9.0], [2.6, -9.0]]), torch.tensor([[2.6, 0.0]])
    assert geometry.right_side(a, b, new_a, new_b) == [False, True, False]


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gemma2", "gpt2", "cohere", "olmo"])
def test_the_direct_effect_is_what_norm_and_head_make_of_a_step(model_of, architecture):
    """Two streams that differ along a step, of one size with their means and without: only the step can act."""
    m = model_of(architecture)
    g = torch.Generator().manual_seed(0)
    x, r = torch.randn(2, m.width, generator=g)
    r = r / r.norm()
    x, centred = x - x.mean(), r - r.mean()
    x = x - (x @ centred) / centred.square().sum() * centred
    norm, head = final_norm(m.hf), unembedding(m.hf).weight
    up, down = (head @ norm((x + s * 0.5 * r)[None])[0] for s in (1, -1))
    effect = (up - down) - (up - down).mean()
    direct = geometry.direct_logits(m, 3 * r)
    assert torch.cosine_similarity(effect, direct, dim=0) > 0.9999


def test_a_strip_has_a_column_for_each_token(model_of, r):
    m = model_of("llama")
    strip = geometry.token_strip(m, "Name a river", r)
    assert strip.values.shape == (m.n_layers, len(strip.tokens))
    assert len(strip.tokens) == encode(m, ["Name a river"])["input_ids"].shape[1]


@pytest.mark.slow
@pytest.mark.parametrize("layers", [3, 30])
def test_figures_fit_models_of_any_depth(layers):
    grid = torch.rand(layers, 4)
    shares = plots.share_grids({"a": grid, "b": grid}, range(-4, 0), "share").axes
    square = torch.eye(layers)
    cosines = plots.cosine_maps({"layers": (square, range(layers))}).axes
    strip = geometry.Strip(("a", "\n", " b"), torch.randn(layers, 3))
    strips = plots.token_strips({"one": strip, "two": strip, "three": strip}).axes
    numbers = [[text.get_text() for text in axes[0].texts] for axes in (shares, cosines, strips)]
    if layers > 16:
        assert numbers == [[], [], []]
    else:
        assert numbers[0] == [f"{x:.2f}" for x in grid.T.flatten().tolist()]
        assert numbers[1] == ["1.00" if x else "0.00" for x in square.flatten().tolist()]
        assert numbers[2] == [str(round(x) + 0) for x in strip.values.flatten().tolist()]
    assert torch.equal(torch.tensor(shares[0].images[0].get_array().data), grid.T.double())
    assert [label.get_text() for label in strips[0].get_xticklabels()] == ["a", "\\n", "b"]
    assert [axes[-1].get_ylabel() for axes in (shares, cosines)] == ["share", "cosine"]
    assert "units of the stream" in strips[-1].get_ylabel()


def test_rows_of_dots_and_planes_hold_every_prompt():
    (axis,) = plots.dot_rows({"harmful": [1.0, 2.0], "other": [3.0]}, "x", {"chance": 0.5}).axes
    assert [dots.get_offsets()[:, 0].tolist() for dots in axis.collections] == [[1.0, 2.0], [3.0]]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["harmful", "other"]
    assert axis.lines[0].get_xdata()[0] == 0.5 and axis.texts[0].get_text() == "chance"
    points = {"harmful": torch.randn(3, 2), "borderline": torch.randn(2, 2)}
    figure = plots.plane_figure(points, "component 1", "component 2", torch.tensor([1.0, 2.0]))
    (axis,) = figure.axes
    for dots, xy in zip(axis.collections, points.values(), strict=True):
        assert torch.allclose(torch.tensor(dots.get_offsets().data), xy.double())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["harmful (3)", "borderline (2)"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("component 1", "component 2")
    assert [tuple(text.xy) for text in axis.texts] == [(1.0, 2.0), (1.0, 2.0)]


def test_a_plane_shows_any_set_and_two_of_one_kind_in_one_colour():
    names = ("harmful", "harmful, behind shots", "harmful, behind ten", "harmless", "of another kind")
    (axis,) = plots.plane_figure({name: torch.randn(3, 2) for name in names}, "x", "y").axes
    colours = [tuple(dots.get_edgecolor()[0]) for dots in axis.collections]
    shapes = [dots.get_paths()[0].vertices.tolist() for dots in axis.collections]
    assert len(set(colours[:3])) == 1 and len(set(colours)) == 3
    assert all(shapes[i] != shapes[j] for i in range(5) for j in range(i))


@pytest.mark.slow
def test_the_explorer_names_the_sides_and_says_when_there_is_nothing_to_see(streams):
    shown = explore.planes({k: streams[k] for k in ("harmful", "harmless")}, streams, layer=1, position=-1)
    layer, position, along = shown.controls
    assert "harmful | 12" in shown.static and "<img alt=" in shown.shown.value
    before = shown.shown.value
    along.value = True
    assert "first component of the rest" not in before and shown.shown.value != before
    layer.value = 0
    assert "Nothing to see" in shown.static
