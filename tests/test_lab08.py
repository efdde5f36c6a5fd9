"""Lab 08: its figures say what they are given, and its explorer does the arithmetic of rare harm."""

import matplotlib.pyplot as plt
import pytest
import torch

from refusallab import explore, plots
from refusallab.course.exercise import judge
from refusallab.course.exercises import find, lab08
from refusallab.measure import rate


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_the_grid_leaves_cells_empty_that_were_not_run():
    grid = {"ask": {"a": rate([True, False]), "b": rate([False])}, "ask louder": {"b": rate([True])}}
    figure = plots.matrix_grid(grid)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert [text.split("\n")[0] for text in texts] == ["0.50", "0.00", "1.00"]


def test_the_curve_marks_the_threshold():
    points = torch.tensor([[0.0, 0.0], [0.1, 0.8], [1.0, 1.0]])
    axis = plots.roc_curve({"as they come": points}, (0.1, 0.8)).axes[0]
    assert [line.get_label() for line in axis.lines if not line.get_label().startswith("_")] == [
        "as they come",
        "threshold",
    ]


def test_the_explorer_counts_who_is_blocked_where_harm_is_rare():
    harmless = torch.arange(100.0)
    explorer = explore.thresholds(torch.full((50,), 200.0), harmless, torch.full((20,), -5.0))
    assert "1.00" in explorer.static and "n=20" in explorer.static
    assert "0.95" in explorer.static  # at 2 % false alarms and 1 in 1000: 0.02 * 0.999 / (0.001 + 0.02 * 0.999)


@pytest.mark.parametrize("exercise", lab08.EXERCISES, ids=lambda e: e.number)
def test_the_cases_tell_the_reference_from_a_guess(exercise):
    assert judge(find(exercise.number), exercise.reference, 11).passed
    assert not judge(find(exercise.number), lambda *args, **kwargs: 0.0, 11).passed
