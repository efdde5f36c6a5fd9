"""Lab 10: what its exercises ask beside right values, and the replication that its second track runs; its figure."""

from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch

from refusallab import plots
from refusallab.course import replication
from refusallab.course.exercise import run_cases
from refusallab.course.exercises import find_exercise, lab10
from refusallab.course.replication import replicate
from refusallab.findings import Published
from refusallab.interventions import unit
from refusallab.measure import Outcome, Rate, rate
from refusallab.prompts import Item


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


@pytest.mark.slow
@pytest.mark.parametrize("number", ["10.1", "10.5"])
def test_an_answer_may_use_the_library(number):
    assert run_cases(find_exercise(number), find_exercise(number).reference, 3).passed


MEASURED = {  # everything just inside its tolerance
    "depth": 0.43,  # published; ours is 1/3
    "position": -2,
    "bypass": -7.9,
    "induce": 4.9,
    "area": 9,  # of 10 harmful prompts above the harmless ones
    ("harmful", ""): 85,
    ("harmful", "r ablated"): 34,
    ("harmful", "other ablated"): 76,
    ("harmless", "r added at 1"): 50,
    ("edited", ""): 38,
    "untouched": 1.0,
    "r ablated": 1.09,
    "r subtracted at 1": 1.2,
}


@pytest.fixture
def replicated(model_of, r, monkeypatch):
    """replicated({what: value}): the findings where these differ from MEASURED."""
    m, edited = model_of("llama"), object()

    def ablation(v):
        return "r ablated" if v is r else "other ablated"

    def addition(v, layer, coefficient=1):
        return f"{'r' if v is r else 'other'} {'added' if coefficient == 1 else 'subtracted'} at {layer}"

    def run(changed, published=True):
        value = MEASURED | changed
        best = SimpleNamespace(position=value["position"], layer=1, bypass=value["bypass"], induce=value["induce"])

        def residual(_m, prompts, layers, positions):
            assert (layers, positions) == ([1], [value["position"]])
            along = [k < value["area"] for k in range(10)] if "harmful" in prompts[0] else [0.5]
            return (torch.tensor(along).float()[:, None] * unit(r))[:, None, None]

        def outcomes(model, items, edit=None):
            kind = "edited" if model is edited else items[0].prompt.split("_")[0]
            return [Outcome(k < value[kind, edit or ""], False) for k in range(100)]

        def cross_entropy(_m, replies, prompts, edit=None):
            assert replies == ["own", " "] and all("harmless" in prompt for prompt in prompts)
            return torch.tensor([0.0, 2.0]).double() * value[edit or "untouched"]

        stubs = {
            "find_direction": lambda _m: SimpleNamespace(selected=best, direction=SimpleNamespace(vector=r)),
            "prompt_set": lambda _m, name: [Item(str(k), name) for k in range(2)],
            "generate": lambda _m, prompts, **_: ["own", ""],
            "orthogonalize": lambda _m, v: edited,
            "distance_from_hooks": lambda *_: 0.0,
            "PUBLISHED": {"llama": Published(-2, value["depth"], -6.0, 3.0, (0.2, 0.3, 0.8))} if published else {},
        }
        for f in (ablation, addition, residual, outcomes, cross_entropy):
            stubs[f.__name__] = f
        for name, stub in stubs.items():
            monkeypatch.setattr(replication, name, stub)
        return replicate(m)

    return run


@pytest.mark.parametrize(
    ("what", "value", "fails"),
    [
        ("depth", 0.44, "depth of the layer"),
        ("depth", 0.23, "depth of the layer"),
        ("position", -1, "position"),
        ("bypass", -8.1, "bypass"),
        ("bypass", -3.9, "bypass"),
        ("induce", 5.1, "induce"),
        ("induce", 0.9, "induce"),
        ("area", 8, "projection tells harmful from harmless (AUC)"),
        (("harmful", "r ablated"), 36, "harmful refused, r ablated"),
        (("harmful", "other ablated"), 74, "harmful refused, random direction ablated"),
        (("harmful", "other ablated"), 96, "harmful refused, random direction ablated"),
        (("harmless", "r added at 1"), 49, "harmless refused, r added"),
        (("edited", ""), 40, "harmful refused, weights edited"),
        (("edited", ""), 28, "harmful refused, weights edited"),
        ("r ablated", 1.11, "loss of own replies, r ablated"),
        ("r subtracted at 1", 1.09, "loss of own replies, r subtracted"),
    ],
)
def test_a_replication_fails_where_one_tolerance_is_left(replicated, what, value, fails):
    assert [f.what for f in replicated({}) if not f.holds] == []
    [failed] = [f for f in replicated({what: value}) if not f.holds]
    assert failed.what.startswith(fails) and "FAILS" in str(failed)


def test_only_signs_are_compared_where_nothing_is_published(replicated):
    for bypass, induce, holds in ((-0.1, 0.1, [True, True]), (0.1, -0.1, [False, False])):
        found = replicated({"bypass": bypass, "induce": induce}, published=False)
        assert [f.holds for f in found if f.lab == "02"] == holds


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
