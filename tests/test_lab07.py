"""Lab 07: questions about the law, figures, the explorer, and what its checks say of errors."""

import matplotlib.pyplot as plt
import pytest
import torch

from refusallab import explore, harmfulness, plots
from refusallab.activations import residual
from refusallab.course.exercise import run_cases
from refusallab.course.exercises import find_exercise
from refusallab.harmfulness import (
    ALLOWED,
    RULED_OUT,
    law_questions,
    site_directions,
    steered_verdicts,
    turned,
    turned_rates,
    verdicts,
)
from refusallab.interventions import addition
from refusallab.measure import rate
from refusallab.model import attention_writes, blocks, encode, logits
from refusallab.prompts import Item

QUESTIONS = [Item("a", "Name a river", ALLOWED), Item("b", "Name a river", RULED_OUT)]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_questions_are_balanced_and_about_things_of_their_split():
    questions, others = law_questions("val", 10), law_questions("test", 10)
    assert [q.answer for q in questions] == [ALLOWED] * 10 + [RULED_OUT] * 10
    assert not {q.id.split("_")[-1] for q in questions} & {q.id.split("_")[-1] for q in others}
    assert questions == law_questions("val", 10) and questions != law_questions("val", 10, seed=1)


def test_questions_are_asked_in_the_words_of_their_split(monkeypatch):
    monkeypatch.setattr(harmfulness.dialogue, "phrase", lambda q, rng, split: split)
    assert {q.prompt for q in law_questions("val", 3)} == {"val"}


def test_a_site_direction_is_harmful_minus_harmless_at_its_token(model_of, prompts):
    m = model_of("llama")
    found = site_directions(m, prompts[:2], prompts[2:])
    for name, position in (("harmfulness", m.positions[0] - 1), ("refusal", -1)):
        a, b = (residual(m, part, positions=[position])[:, :, 0].mean(0) for part in (prompts[:2], prompts[2:]))
        torch.testing.assert_close(found[name], a - b, atol=1e-4, rtol=1e-4)
    read = encode(m, ["Name a river"])["input_ids"][0, : m.positions[0]]
    assert m.tokenizer.decode(read).endswith("Name a river")


def test_the_layer_is_chosen_on_other_questions_than_the_share_and_all_vectors_are_as_long(model_of, monkeypatch):
    refusal = torch.tensor([[1.0, 0, 0, 0], [3, 0, 0, 0], [2, 0, 0, 0]])
    vectors = {"refusal": refusal, "harmfulness": torch.eye(4)[1].repeat(3, 1)}
    chosen, by_chance = {0: 1, 1: 2}, []  # the axis of a direction, and the layer at which it turns most

    def said(_m, questions, vector, layer):
        split, axis = questions[0].id, vector.abs().argmax().item()
        if vector.count_nonzero() > 1:  # a random one
            by_chance.append((split, round(vector.norm().item(), 3), layer))
            return ["ruled out", "ruled out"] if len(by_chance) == 12 else ["allowed", "ruled out"]
        assert axis == 0 or round(vector.norm().item(), 3) == 3.0
        if split == "val":
            return ["ruled out", "allowed"] if layer == chosen[axis] else ["allowed", "ruled out"]
        return ["ruled out", "ruled out"] if layer == chosen[axis] else ["ruled out", "allowed"]

    monkeypatch.setattr(harmfulness, "steered_verdicts", said)
    monkeypatch.setattr(harmfulness, "site_directions", lambda *_: vectors)
    monkeypatch.setattr(
        harmfulness, "law_questions", lambda split, n: [Item(split, "", a) for a in (ALLOWED, RULED_OUT)]
    )
    rates = turned_rates(model_of("llama"), [], [], layers=range(3))
    assert {name: share.value for name, share in rates.items()} == {
        "refusal, layer 1": 0.5,
        "refusal, most by 8 random": 0.0,
        "harmfulness, layer 2": 0.5,
        "harmfulness, most by 8 random": 0.5,  # by the fourth of those beside it
    }
    assert by_chance == [("test", 3.0, 1)] * 8 + [("test", 3.0, 2)] * 8


def test_replies_become_verdicts(model_of, monkeypatch):
    replies = [f"Surely. {ALLOWED}", f"{RULED_OUT} Next.", f"{ALLOWED} {RULED_OUT}", "I cannot help", "Use a pot."]
    given = []
    monkeypatch.setattr(harmfulness, "generate", lambda _m, prompts, **more: given.append((prompts, more)) or replies)
    monkeypatch.setattr(harmfulness, "refusal_phrases", lambda _m: ("I cannot",))
    said = verdicts(model_of("llama"), QUESTIONS * 2 + QUESTIONS[:1], "edit")
    assert said == ["allowed", "ruled out", "other", "refused", "other"]
    [(prompts, settings)] = given
    assert prompts == ["Name a river"] * 5 and settings["edit"] == "edit" and settings["batch_size"] == 5


def test_only_the_opposite_verdict_is_turned():
    asked = [*QUESTIONS, *QUESTIONS, QUESTIONS[0]]
    assert turned(asked, ["allowed", "allowed", "ruled out", "ruled out", "refused"]) == [
        False,
        True,
        True,
        False,
        False,
    ]


def test_a_vector_is_added_for_lawful_and_subtracted_for_forbidden_actions(model_of, r, monkeypatch):
    m, seen = model_of("llama"), []
    monkeypatch.setattr(harmfulness, "verdicts", lambda _m, questions, edit: seen.append(edit))
    steered_verdicts(m, QUESTIONS, r, 1)
    both = logits(m, [q.prompt for q in QUESTIONS], edit=seen[0])
    for row, sign in enumerate((1, -1)):
        torch.testing.assert_close(both[row], logits(m, ["Name a river"], edit=addition(r, 1, sign))[0])


def test_figures():
    values, share = torch.rand(4, 3), rate([True, False])
    figure = plots.layer_curves({"": {"a": values, "b": values}, "more": {"a": values}}, "cosine")
    assert figure.axes[0].lines[0].get_ydata() == pytest.approx(values.mean(0).numpy())
    assert (figure.axes[0].get_ylabel(), figure.axes[1].get_xlabel()) == ("cosine", "layer (block input)")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    heads, mlps = torch.tensor([[1.5, -0.01], [2.0, -3.0]]), torch.tensor([0.5, 4.0])
    grid, scale = plots.write_grids({"a": (heads, mlps)}, "written along r").axes
    assert [text.get_text() for text in grid.texts] == ["1.5", "0.0", "0.5", "2.0", "-3.0", "4.0"]
    assert [label.get_text() for label in grid.get_xticklabels()] == ["0", "1", "MLP"]
    assert grid.images[0].get_clim() == (-4.0, 4.0) and scale.get_ylabel() == "written along r"
    figure = plots.stacked_shares({"a": {"x": 0.95, "y": 0.05}, "b": {"x": 0.5, "y": 0.5}}, "share")
    (axis,) = figure.axes
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([0.95, 0.5, 0.05, 0.5])
    assert [bar.get_x() for bar in axis.patches] == [0, 0, 0.95, 0.5]
    assert [text.get_text() for text in axis.texts] == ["0.95", "0.50", "0.50"], "0.05 has no room for its number"
    figure = plots.cone_figure({"cone": {"refused": {0: share, 90: rate([True])}, "exact": {0: share, 90: share}}})
    (axis,) = figure.axes
    assert (list(axis.lines[0].get_xdata()), list(axis.lines[0].get_ydata())) == ([0, 90], [0.5, 1.0])
    assert (axis.patches[0].get_x(), axis.patches[0].get_width()) == (0, 90)
    assert "degrees" in axis.get_xlabel() and "Wilson" in axis.get_ylabel()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["cone", "refused", "exact"]


def test_three_models_have_a_panel_each_with_the_same_rows():
    share, sure = rate([True, False]), rate([True])
    tables = {
        "charter-chat": {"r": {"refused": share}, "random": {"refused": sure}},
        "charter-chat-s1": {"random": {"refused": share, "exact": sure}, "r": {"refused": sure}},
    }
    figure = plots.rate_panels(tables, "share of requests")
    first, second = figure.axes
    assert [axis.get_title() for axis in figure.axes] == list(tables)
    assert [label.get_text() for label in first.get_yticklabels()] == ["r", "random"]
    assert list(first.containers[0][0].get_xdata()) == [0.5, 1.0]
    assert list(second.containers[0][0].get_xdata()) == [1.0, 0.5], "rows are found by name"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["refused", "exact"]
    assert figure.get_supxlabel() == "share of requests"


def test_the_explorer_picks_heads(model_of, r):
    shown = explore.heads(
        model_of("llama"), r, {"plain": ("Name a river", ""), "with suffix": ("Name a river copper", " copper")}, 1, 2
    )
    assert "Head 2 of layer 1" in shown.static and "with suffix" in shown.static and "of 12" in shown.static
    before = shown.static
    for control, value in zip(shown.controls, ("with suffix", 0, 3), strict=True):
        control.value = value
        assert shown.static != before
        before = shown.static
    assert "' copper'" in shown.static.replace("Ġ", " ")


@torch.no_grad()
def out_of_order(m, prompts, r):
    nn = m.nn
    with nn.trace(**encode(m, prompts)):
        z = [attention_writes(block).input[:, -1] for block in reversed(list(blocks(nn)))].save()
    return z


def test_errors_of_nnsight_become_advice():
    assert "in the order of the forward pass" in run_cases(find_exercise("7.2"), out_of_order, 0).problem
