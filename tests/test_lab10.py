"""Lab 10: what its exercises ask beside right values; its figure."""

from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest

from refusallab import plots
from refusallab.course.exercise import run_cases
from refusallab.course.exercises import find_exercise, lab10
from refusallab.measure import Rate, rate


def test_one_budget_is_spent_and_not_exceeded():
    for case in lab10.BUDGET.cases(5):
        first, second, cost = case.inputs.values()
        t1, t2 = lab10.BUDGET.reference(first, second, cost)
        alarms = (first > t1) | (second > t2)
        assert 0 < alarms.double().mean() <= cost
        k = (first > t1).sum() + 1  # the next threshold of equal rank costs more than there is
        lower = [x.sort(descending=True).values[k] for x in (first, second)]
        assert ((first > lower[0]) | (second > lower[1])).double().mean() > cost


def test_a_cascade_that_asks_too_much_is_told_apart_from_one_that_stops_wrongly():
    exercise = find_exercise("10.2")
    assert run_cases(exercise, lambda cheap, costly, prompts: [False] * len(prompts), 0).mistake == ""
    spendthrift = next(m for m in exercise.mistakes if m.name == "the costly guard reads everything")
    assert "also read" in run_cases(exercise, spendthrift.wrong, 0).problem


@pytest.mark.parametrize("seed", [5441698, 0, 1, 7, 2**24])  # of the first, one prompt has no word of its own
def test_each_guard_stops_as_many_prompts_as_its_case_says(seed):
    for case in find_exercise("10.2").cases(seed):
        for guard in ("cheap", "costly"):
            words = case.inputs[guard]
            assert sum(any(word in prompt for word in words) for prompt in case.inputs["prompts"]) == len(words)


@pytest.mark.slow
@pytest.mark.parametrize("number", ["10.1", "10.5"])
def test_an_answer_may_use_the_library(number):
    assert run_cases(find_exercise(number), find_exercise(number).reference, 3).passed


def test_the_plane_shows_uncertainty_and_names_its_contours_beside_them():
    whole, kept, stopped = rate([True] * 20), Rate(0.8, 0.58, 0.92, 20), Rate(0.45, 0.35, 0.56, 20)
    figure = plots.score_plane({"undefended": (whole, Rate(0.26, 0.2, 0.4, 20)), "two guards": (kept, stopped)})
    (axis,) = figure.axes
    first, second = axis.containers
    assert not first.has_xerr and first.has_yerr, "what is kept is counted against the first, so it has no error there"
    across, upwards = (bars.get_segments()[0] for bars in second[2])
    assert across[:, 0] == pytest.approx([0.58, 0.92]) and upwards[:, 1] == pytest.approx([0.35, 0.56])
    labels = {text.get_text(): text for text in axis.texts}
    assert list(labels) == ["0 points", "25 points", "50 points", "75 points"]
    for points, text in enumerate(labels.values()):
        assert text.xy == (1, points / 4), "a contour ends where kept is 1 and stopped is its points"
    figure.canvas.draw()
    assert all(text.get_window_extent().x0 > axis.get_window_extent().x1 for text in labels.values())
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == ["refusing at random", "undefended (n=20)", "two guards (n=20)"]
    assert "95 % interval" in axis.get_xlabel() and "95 %" in axis.get_ylabel()
    plt.close(figure)


def test_the_lab_goes_on_with_every_answer():
    path = next(Path(__file__).parent.parent.glob("solutions/10_*.ipynb"))
    code = "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")
    for exercise in lab10.EXERCISES:
        assert f'solved("{exercise.number}", {exercise.function})' in code
