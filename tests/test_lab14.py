"""Lab 14: its figures, its explorer, what its claims rest on, and the bug of its clinic."""

import matplotlib.pyplot as plt
import pytest
import torch

from refusallab import explore, plots
from refusallab.attacks import gradient_direction
from refusallab.course.exercise import run_cases
from refusallab.course.exercises import find_exercise, lab14
from refusallab.defences.resistance import RESISTANT
from refusallab.interventions import ablation
from refusallab.judging import outcomes
from refusallab.measure import Outcome
from refusallab.model import load
from refusallab.prompts import bundled


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_the_plane_numbers_checkpoints_in_their_order():
    figure = plots.audit_plane({"out": {"a": (1.0, 0.2), "b": (0.5, 0.4)}, "refuses": {"c": (0.1, 0.9)}})
    (axis,) = figure.axes
    assert {text.get_text(): text.xy for text in axis.texts} == {"1": (1.0, 0.2), "2": (0.5, 0.4), "3": (0.1, 0.9)}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["out", "refuses"]
    assert [line.get_ydata()[0] for line in axis.lines[:1]] == [1] and axis.lines[1].get_xdata()[0] == 0


def test_the_line_of_a_search_joins_what_no_other_trial_beats():
    trials = [(0.3, -1.0), (0.1, 1.0), (0.2, 2.0), (0.4, 0.5)]
    figure = plots.edit_trials({"chat": (trials, {"textbook": (0.5, -0.5)})})
    (axis,) = figure.axes
    best = next(line for line in axis.lines if line.get_label() == "not beaten in both")
    assert list(zip(*best.get_data(), strict=True)) == [(0.1, 1.0), (0.3, -1.0)]
    assert len(axis.collections[0].get_offsets()) == 4 and axis.get_xscale() == "log" and axis.get_title() == "chat"


def test_edits_that_cost_nothing_stand_at_the_left_end():
    figure = plots.edit_trials({"chat": ([(-1e-7, 3.0), (0.0, 2.5), (0.1, -2.0)], {"textbook": (0.0, -1.0)})})
    (axis,) = figure.axes
    assert axis.collections[0].get_offsets()[:, 0].tolist() == [1e-7, 1e-7, 0.1]
    lines = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axis.lines}
    assert lines == {"not beaten in both": [(1e-7, 2.5), (0.1, -2.0)], "textbook": [(1e-7, -1.0)]}


def test_doses_of_another_attack_have_their_label():
    figure = plots.breaking_curves({"a": {0: [Outcome(True, False)], 2: [Outcome(False, True)]}}, "directions")
    assert {axis.get_xlabel() for axis in figure.axes} == {"directions"}


def test_the_explorer_edits_where_and_as_much_as_it_is_told(model_of, r):
    shown = explore.layer_edit(model_of("llama"), r, [3], ["Name a river"], ["List a copper"])
    centre, reach, attention, mlp = shown.controls
    assert (centre.min, centre.max, reach.max) == (0, 2, 2) and centre.value > 0
    before = dict(shown.tables[0][1])
    assert before["strengths, attention"] == before["strengths, MLP"]
    attention.value = 0.0
    one = dict(shown.tables[0][1])
    assert set(one["strengths, attention"].split()) == {"0.0"} and one["strengths, MLP"] == before["strengths, MLP"]
    mlp.value = 0.0
    still = dict(shown.tables[0][1])
    assert still["refusal metric of harmful prompts, untouched"] == still["the same, edited"]
    assert still["KL on harmless prompts (nats)"] == "0.000" and set(still["strengths, MLP"].split()) == {"0.0"}


def test_the_clinics_bug_brings_the_direction_back():
    g = torch.Generator().manual_seed(1)
    weight, r = torch.randn(16, 16, generator=g), torch.randn(16, generator=g)
    u = r / r.norm()
    hers, mended = lab14._rows_rescaled(weight, r, 1.0), lab14._norm_preserving(weight, r, 1.0)
    assert (u @ hers).norm() > 0.01 * (u @ weight).norm() > 1e4 * (u @ mended).norm()
    torch.testing.assert_close(mended.norm(dim=0), weight.norm(dim=0))


@pytest.mark.slow
def test_spread_refusal_falls_to_one_direction_by_gradient():
    m = RESISTANT["spread refusal"](load("charter-chat")).m
    known, lawful, judges = (bundled(name) for name in ("harmful_train", "harmless_train", "harmful_val"))
    start = torch.randn(m.width, generator=torch.Generator().manual_seed(0))
    found = gradient_direction(m, known, lawful, judges[1::8], start).vector
    untouched, freed = (outcomes(m, bundled("harmful_test")[::8], edit=e) for e in (None, ablation(found)))
    assert sum(o.refused for o in untouched) > 0.9 * len(untouched)
    assert sum(o.correct for o in freed) > 0.5 * len(freed)


@pytest.mark.parametrize(
    ("unchanged", "mistake"),
    [
        (lambda d: d.sum() == 0, "entries added up"),
        (lambda d: d.sum().abs() < 1e-6, "entries added up"),
        (lambda d: d[0, 0] == 0, "entries added up"),
        (lambda d: not d.all(), ""),
        (lambda d: d.max() <= 0, ""),
        (lambda d: d.square().sum() < 1e-3, "small changes counted 0"),
        (lambda d: torch.allclose(d, torch.zeros_like(d), atol=1e-2), "small changes counted 0"),
        (lambda d: not d.any(), None),
    ],
)
def test_only_a_matrix_of_zeros_counts_0(unchanged, mistake):
    def one_rank_energy(differences):
        energies = [torch.linalg.svdvals(d).square() for d in differences if not unchanged(d)]
        return sum(float(e[0] / e.sum()) for e in energies) / len(differences)

    for seed in range(12):
        verdict = run_cases(find_exercise("14.6"), one_rank_energy, seed)
        assert verdict.passed == (mistake is None) and verdict.mistake == (mistake or "")
