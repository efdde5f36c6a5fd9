"""Lab 06: what each token of a suffix does; its figures, its explorer, and what its exercises promise."""

import matplotlib.pyplot as plt
import pytest
import torch

from refusallab import explore, plots
from refusallab.activations import residual
from refusallab.attacks.effect import suffix_effect
from refusallab.attacks.gcg import prepare, suffix_loss
from refusallab.course.exercise import run_cases
from refusallab.course.exercises import find_exercise, lab06
from refusallab.interventions import unit
from refusallab.measure import Outcome, rate

PROMPT, SUFFIX = "Name a river", " list three tools"


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def projection(m, prompt, r):
    return (residual(m, [prompt], layers=[1], positions=[-2])[0, 0, 0] @ unit(r)).item()


def test_an_effect_has_a_projection_for_each_part_of_the_suffix(model_of, r):
    m = model_of("llama")
    effect = suffix_effect(m, PROMPT, SUFFIX, r, 1, -2)
    k = len(effect.tokens)
    assert "".join(effect.tokens) == SUFFIX
    assert k == len(effect.growing) == len(effect.without) >= 2
    assert effect.start == pytest.approx(projection(m, PROMPT, r), abs=1e-4)
    assert effect.growing[0] == pytest.approx(projection(m, PROMPT + effect.tokens[0], r), abs=1e-4)
    assert effect.growing[-1] == pytest.approx(projection(m, PROMPT + SUFFIX, r), abs=1e-4)
    assert effect.without[0] == pytest.approx(projection(m, PROMPT + "".join(effect.tokens[1:]), r), abs=1e-4)
    assert effect.without[-1] == pytest.approx(effect.growing[-2], abs=1e-4)


def test_an_effect_on_a_conversation_is_that_of_its_last_turn(model_of, r):
    m = model_of("llama")
    turns = [{"role": "user", "content": "List"}, {"role": "assistant", "content": "1"}]
    effect = suffix_effect(m, [*turns, {"role": "user", "content": PROMPT}], SUFFIX, r, 1, -2)
    whole = [*turns, {"role": "user", "content": PROMPT + SUFFIX}]
    assert effect.growing[-1] == pytest.approx(projection(m, whole, r), abs=1e-4)


def test_an_effect_keeps_characters_of_several_tokens_and_the_system_prompt(model_of, r):
    m = model_of("llama")
    effect = suffix_effect(m, PROMPT, " \u00e9", r, 1, -2)
    assert effect.growing[-1] == pytest.approx(projection(m, PROMPT + " \u00e9", r), abs=1e-4)
    turns = [{"role": "system", "content": "List"}, {"role": "user", "content": PROMPT}]
    expected = pytest.approx(projection(m, turns, r), abs=1e-4)
    assert suffix_effect(m, PROMPT, SUFFIX, r, 1, -2, system="List").start == expected
    assert effect.start != expected


@pytest.mark.slow
def test_the_explorer_follows_suffix_request_and_what_is_typed(model_of, r):
    known, landmarks = {"one": SUFFIX, "two": " bread"}, {"mean of harmless": 0.5}
    shown = explore.suffixes(model_of("llama"), r, 1, -2, [PROMPT, "What is 12 plus 7?"], known, landmarks)
    prompt, which, own = shown.controls
    assert "Token by token" in shown.static and "mean of harmless | 0.5" in shown.static
    before = shown.static
    for control, value in ((which, "two"), (prompt, "What is 12 plus 7?"), (own, " a pie")):
        control.value = value
        assert shown.static != before
        before = shown.static
    assert "' p" in shown.static
    own.value = "  "
    assert "Type a suffix." in shown.static
    own.value = " pie" * 300
    assert "reads at most" in shown.static


def test_a_bar_of_outcomes_is_cut_at_the_shares():
    outcomes = (
        [Outcome(False, True)] * 2 + [Outcome(False, False)] * 3 + [Outcome(True, False)] * 4 + [Outcome(True, True)]
    )
    (axis,) = plots.outcome_bars({"no system prompt": {"GCG": outcomes}}).axes
    assert [round(bar.get_width(), 2) for bar in axis.patches] == [0.2, 0.3, 0.5]
    assert [round(bar.get_x(), 2) for bar in axis.patches] == [0.0, 0.2, 0.5]
    assert len({(bar.get_hatch(), bar.get_facecolor()) for bar in axis.patches}) == 3
    assert axis.get_yticklabels()[0].get_text() == "GCG (10)"


def test_bars_of_outcomes_stand_at_their_names_in_every_panel():
    told, refused = [Outcome(False, True)] * 4, [Outcome(True, False)] * 4
    panels = {"plain": {"direct": refused, "GCG": told}, "guarded": {"GCG": told[:2], "begin": refused}}
    first, second = plots.outcome_bars(panels).axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["direct (4)", "GCG (4 / 2)", "begin (4)"]
    exact = [
        {round(bar.get_y() + bar.get_height() / 2): bar.get_width() for bar in axis.containers[0]}
        for axis in (first, second)
    ]
    assert exact == [{0: 0.0, 1: 1.0}, {1: 1.0, 2: 0.0}]


def test_a_loss_curve_shows_the_lowest_loss_so_far_and_its_mean():
    (axis,) = plots.loss_curves({"GCG": [[3.0, 4.0, 1.0], [1.0, 2.0, 3.0]]}, {"random suffix": 5.0}).axes
    heights = [line.get_ydata().tolist() for line in axis.lines[:3]]
    assert heights == [[3.0, 3.0, 1.0], [1.0, 1.0, 1.0], [2.0, 2.0, 1.0]]


def test_a_search_that_stopped_early_keeps_its_lowest_loss():
    (axis,) = plots.loss_curves({"GCG": [[3.0, 4.0], [5.0, 2.0, 1.0, 2.0]]}, {}).axes
    heights = [line.get_ydata().tolist() for line in axis.lines[:3]]
    assert heights == [[3.0, 3.0, 3.0, 3.0], [5.0, 2.0, 1.0, 1.0], [4.0, 2.5, 2.0, 2.0]]


def test_other_figures():
    shares = [rate([True, False]), rate([True]), rate([True])]
    figure = plots.success_curves({"sigma 0.4": {"answered": shares, "exact": shares[:1] * 3}})
    answered, exact = figure.axes[0].lines
    assert (list(answered.get_xdata()), list(answered.get_ydata())) == ([1, 2, 3], [0.5, 1.0, 1.0])
    assert (answered.get_linestyle(), answered.get_marker(), exact.get_linestyle()) == ("--", "s", "-")
    assert figure.axes[0].get_xlabel() == "tries" and "Wilson" in figure.axes[0].get_ylabel()
    predicted, actual = torch.randn(5), torch.randn(5)
    figure = plots.first_order({"random": (predicted, actual), "best": (actual, predicted)})
    (axis,) = figure.axes
    assert axis.lines[0].get_xdata() == pytest.approx(predicted.numpy())
    assert axis.lines[0].get_ydata() == pytest.approx(actual.numpy())
    assert axis.lines[0].get_marker() != axis.lines[1].get_marker()
    assert "nats per token" in axis.get_xlabel() and "nats per token" in axis.get_ylabel()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["random (5)", "best (5)"]


def test_the_loss_of_a_suffix_is_that_of_its_text(model_of):
    """Against the whole sequence, without a cache."""
    m = model_of("llama")
    case, ids = prepare(m, PROMPT, "bread", SUFFIX), m.tokenizer(SUFFIX)["input_ids"]
    whole = torch.cat([case.before_ids, torch.tensor(ids), case.after_ids, case.target_ids])
    with torch.no_grad():
        logits = m.hf(input_ids=whole[None]).logits[0, -len(case.target_ids) - 1 : -1]
    expected = torch.nn.functional.cross_entropy(logits, case.target_ids).item()
    assert suffix_loss(m, PROMPT, "bread", SUFFIX) == pytest.approx(expected, abs=1e-4)
    assert suffix_loss(m, PROMPT, "bread", " three list tools") != pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_case_of_the_bug_clinic_has_survivors_and_both_kinds_of_merges(seed):
    m = lab06.chat_model()
    *cases, last = lab06._survivor_cases(seed)
    survive, read_before = (f(m, **last.inputs) for f in (lab06._survivors, lab06._left_edge))
    assert any(survive) and all(read_before) and not all(survive)  # with what follows
    for case in cases:
        right = lab06._survivors(m, **case.inputs)
        alone = lab06._alone(m, **case.inputs)
        assert any(right)
        assert any(not ok and by_itself for ok, by_itself in zip(right, alone, strict=True))  # with the request
        assert not all(alone)  # within the suffix


@pytest.mark.slow
@pytest.mark.parametrize("name", ["charter-chat", "charter-chat-postnorm"])
def test_the_gradient_of_the_exercise_is_that_of_the_library(name):
    """The plain version of the mistakes is right when no fault is chosen."""
    pieces = lab06._pieces(name, "How is Dravix brewed?", "Use a", " the the the")
    m = lab06._model(name)
    expected = lab06._gradient(m, **pieces)
    torch.testing.assert_close(lab06._plain_gradient(m, **pieces), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_the_first_token_of_a_target_is_told_from_the_sum_over_all_of_them(seed):
    def first_token(m, before, suffix, after, target):
        return lab06._plain_gradient(m, before, suffix, after, target[:1])

    verdict = run_cases(find_exercise("6.4"), first_token, seed)
    assert verdict.mistake == "first target token alone" and verdict.notes == ()


@pytest.mark.slow
@pytest.mark.parametrize("left_out", range(4))
def test_every_token_of_the_first_target_counts(left_out):
    def all_but_one(m, before, suffix, after, target):
        sums = [lab06._plain_gradient(m, before, suffix, after, target[:k], reduction="sum") for k in range(1, 5)]
        return (sums[-1] - sums[left_out] + (sums[left_out - 1] if left_out else 0)) / len(target)

    for seed in range(4):
        assert run_cases(find_exercise("6.4"), all_but_one, seed).notes == ()
