"""Lab 09: its figures, and what its checks say of errors."""

from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch

from refusallab import plots
from refusallab.course.exercise import run_cases
from refusallab.course.exercises import find_exercise, lab09
from refusallab.defences.training import refat_loss
from refusallab.interventions import unit
from refusallab.measure import Outcome


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_the_curves_show_refusal_and_disclosure_apart():
    told, both, refused = Outcome(False, True), Outcome(True, True), Outcome(True, False)
    figure = plots.breaking_curves({"a": {0: [refused, refused], 5: [told, both]}, "b": {0: [refused], 5: [refused]}})
    left, right = (axis.lines[0].get_ydata() for axis in figure.axes)
    assert list(left) == [1, 0.5] and list(right) == [0, 1]
    assert [axis.get_title() for axis in figure.axes] == ["refused", "exact answer"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["0", "5"]


def test_the_grid_names_both_shares():
    told, refused = Outcome(False, True), Outcome(True, False)
    rows = {"direct": [refused] * 4, "anew": [told, told, told, refused]}
    axis, scale = plots.defence_grid({"a": rows, "b": {"anew": [refused] * 4}}).axes
    texts = [text.get_text() for text in axis.texts]
    assert texts == ["0.00\nrefused 1.00", "", "0.75\nrefused 0.25", "0.00\nrefused 1.00"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("defence", "attack"), "as in lab 08"
    assert [label.get_text() for label in axis.get_yticklabels()] == ["direct", "anew"]
    assert "exact forbidden answer (n=4)" in scale.get_ylabel()


@pytest.mark.slow
def test_a_loss_without_gradient_gets_advice():
    def a_number(m, forbidden, harmless, r):
        return refat_loss(m, forbidden, harmless, r).item()

    def without_gradient(m, forbidden, harmless, r):
        with torch.no_grad():
            return refat_loss(m, forbidden, harmless, r)

    for answer in (a_number, without_gradient):
        assert "no gradient" in run_cases(find_exercise("9.2"), answer, 0).problem


def test_the_lab_goes_on_with_every_answer():
    path = next(Path(__file__).parent.parent.glob("solutions/09_*.ipynb"))
    code = "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")
    for exercise in lab09.EXERCISES:
        assert f'solved("{exercise.number}", {exercise.function})' in code


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_step_that_is_not_the_asked_one_fails_on_every_seed(seed):
    def step(change):
        return lambda m, u, prompts, replies, lr: change(u, lr * lab09._gradient(m, u, prompts, replies), lr)

    def turned(u, move, lr):
        """Along the great circle, by an angle as large as the step is long."""
        return u * move.norm().cos() - unit(move) * move.norm().sin()

    verdict = run_cases(find_exercise("9.4"), step(lambda u, move, lr: u - move), seed)
    assert verdict.mistake == "length not restored" and verdict.notes == ()
    for change in (turned, lambda u, move, lr: unit(u - move / max(1, (move / lr).norm()))):  # or the gradient cut
        assert not run_cases(find_exercise("9.4"), step(change), seed).passed


def told(row):
    return sum(o.correct for o in row)


def first(fits, order=sorted):
    """An answer to 9.5: the first steps, in an order, for which fits(outcomes, share)."""
    return lambda curve, share: next((steps for steps in order(curve) if fits(curve[steps], share)), None)


def so_far(curve, share):
    answers = 0
    for steps in sorted(curve):
        answers += told(curve[steps])
        if answers / len(curve[steps]) >= share:
            return steps
    return None


def lowest_share(curve, share):
    fit = [s for s, row in curve.items() if told(row) >= share * len(row)]
    return min(fit, key=lambda s: told(curve[s]), default=None)


@pytest.mark.parametrize(
    ("answer", "mistake"),
    [
        (first(lambda row, share: told(row) >= int(share * len(row))), "number of answers rounded"),
        (first(lambda row, share: told(row) >= round(share * len(row))), "number of answers rounded"),
        (first(lambda row, share: told(row) / (len(row) - 1) >= share), "number of answers rounded"),
        (first(lambda row, share: told(row) >= share * len(row), lambda curve: sorted(curve)[:-1]), ""),
        (first(lambda row, share: told(row) >= share * len(row), lambda curve: sorted(curve, key=str)), ""),
        (so_far, ""),
        (lowest_share, "the last steps that fit"),
    ],
)
def test_steps_that_break_too_early_or_too_late_fail_on_every_seed(answer, mistake):
    for seed in range(12):
        verdict = run_cases(find_exercise("9.5"), answer, seed)
        assert not verdict.passed and verdict.mistake == mistake
