"""Lab 08: its figures say what they are given, and its explorer does the arithmetic of rare harm."""

from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch

from refusallab import explore, plots
from refusallab.course.exercise import run_cases
from refusallab.course.exercises import find_exercise, lab08
from refusallab.defence import ModelAlone
from refusallab.defences.matrix import HIDES_FROM, knowing_attacks, standard_attacks
from refusallab.measure import rate, wilson
from refusallab.model import load


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_the_grid_leaves_cells_empty_that_were_not_run():
    grid = {"ask": {"a": rate([True, False]), "b": rate([False])}, "ask louder": {"b": rate([True])}}
    figure = plots.matrix_grid(grid)
    axis, scale = figure.axes
    assert [text.get_text().split("\n")[0] for text in axis.texts] == ["0.50", "0.00", "", "1.00"]
    assert axis.texts[0].get_text().split("\n")[1] == "[{:.2f}, {:.2f}]".format(*wilson(1, 2))
    assert axis.images[0].get_array().mask.tolist() == [[False, False], [True, False]]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("defence", "attack")
    assert "exact forbidden answer" in scale.get_ylabel() and "n=1 to 2" in scale.get_ylabel()


def test_rows_of_the_grid_have_short_labels(monkeypatch):
    """Those of the course fit in two lines of 24 letters, as they are."""
    m = load("charter-chat")
    defences = [ModelAlone(m, name) for name in ("perplexity filter", "probe monitor", *HIDES_FROM)]
    monkeypatch.setattr("refusallab.defences.matrix.hiding_from", lambda watchers: None)
    attacks = [*standard_attacks(4, -1), *knowing_attacks(defences)]
    figure = plots.matrix_grid({attack.name: {"undefended": rate([True])} for attack in attacks})
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert all(len(line) <= 24 for label in labels for line in label.split("\n"))
    assert max(label.count("\n") for label in labels) == 1 and "GCG, unseen by monitor" in labels


def test_the_curve_marks_the_threshold():
    points = torch.tensor([[0.0, 0.0], [0.1, 0.8], [1.0, 1.0]])
    axis = plots.roc_curve({"as they come": points}, (0.1, 0.8)).axes[0]
    assert [line.get_label() for line in axis.lines] == ["as they come", "chance", "threshold"]
    assert axis.lines[0].get_xydata() == pytest.approx(points.numpy())
    assert axis.lines[-1].get_xydata().tolist() == [[0.1, 0.8]]
    assert "harmless" in axis.get_xlabel() and "harmful" in axis.get_ylabel()


def test_the_explorer_counts_who_is_blocked_where_harm_is_rare():
    harmless = torch.arange(100.0)
    explorer = explore.thresholds(torch.full((50,), 200.0), harmless, torch.full((20,), -5.0))
    assert "1.00" in explorer.static and "n=20" in explorer.static
    assert "0.95" in explorer.static  # at 2 % false alarms and 1 in 1000: 0.02 * 0.999 / (0.001 + 0.02 * 0.999)


@pytest.mark.parametrize("exercise", lab08.EXERCISES, ids=lambda e: e.number)
def test_the_cases_tell_the_reference_from_a_guess(exercise):
    assert run_cases(find_exercise(exercise.number), exercise.reference, 11).passed
    assert not run_cases(find_exercise(exercise.number), lambda *args, **kwargs: 0.0, 11).passed


def test_the_lab_goes_on_with_every_answer():
    path = next(Path(__file__).parent.parent.glob("solutions/08_*.ipynb"))
    code = "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")
    for exercise in lab08.EXERCISES:
        assert f'solved("{exercise.number}", {exercise.function})' in code


def cut(place):
    """An answer to 8.3 with the right probe, and place(scores, share) for the threshold."""

    def fit_monitor(harmful, harmless, calibration, false_alarms):
        w, _ = lab08.monitor(harmful, harmless, calibration, false_alarms)
        scores = calibration @ w
        return w, place(scores, false_alarms)

    return fit_monitor


@pytest.mark.parametrize(
    ("answer", "mistake"),
    [
        (cut(lambda s, share: s.sort().values[len(s) - 1 - int((len(s) + 1) * share + 1e-9)]), "share rounded up"),
        (cut(lambda s, share: s.quantile(1 - share, interpolation="nearest")), "share rounded up"),
        (cut(lambda s, share: s.sort().values[len(s) - 1 - int((len(s) - 1) * share)]), "alarm at the threshold"),
        (cut(lambda s, share: s.quantile(1 - share, interpolation="higher")), "alarm at the threshold"),
        (
            cut(lambda s, share: min(t for t in s.tolist() if (s > t).double().mean() < share)),
            "alarm at the threshold",
        ),
        (cut(lambda s, share: lab08.threshold_at(s.unique(), share)), ""),
        (cut(lambda s, share: lab08.threshold_at(s.abs(), share)), ""),
    ],
)
def test_a_threshold_in_the_wrong_place_fails_on_every_seed(answer, mistake):
    for seed in (0, 1, 11, 14, 23):
        verdict = run_cases(find_exercise("8.3"), answer, seed)
        assert not verdict.passed and verdict.mistake == mistake
