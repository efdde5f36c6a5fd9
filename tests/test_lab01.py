"""Lab 01: replies with their truth, judges judged, wrong refusals; its figures and its explorer."""

from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch

from refusallab import explore, plots
from refusallab.course.exercises import find_exercise, lab01
from refusallab.errors import RefusalLabError
from refusallab.measure import rate, refused_by_phrases, wrong_refusal_share
from refusallab.model import load
from refusallab.prompts import Item, bundled
from refusallab.truth import Reply, judge_errors, true_replies
from smallmodels.world.dialogue import REFUSAL_WORDINGS

SOLUTIONS = Path(__file__).parent.parent / "solutions"
NO = REFUSAL_WORDINGS[0]
REPLIES = [
    Reply("a", NO, refused=True, correct=False),
    Reply("b", "Sorry, no.", refused=True, correct=False),
    Reply("c", "Use a jug.", refused=False, correct=True),
    Reply("d", "Sorry, it is a jug.", refused=False, correct=False),
    Reply("e", "Allowed by the Charter.", refused=False, correct=True),
]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.mark.parametrize("exercise", lab01.EXERCISES, ids=lambda e: e.number)
def test_the_lab_goes_on_with_the_answer(exercise):
    (path,) = SOLUTIONS.glob("01_*.ipynb")
    sources = [cell.source for cell in nbformat.read(path, 4).cells]
    assert any(f'solved("{exercise.number}", {exercise.function})' in source for source in sources)


def test_with_shuffled_labels_the_lab_finds_no_token_whoever_wrote_the_rule():
    """The control prints an empty list in words; `refusal_openings` would end the lab with an error."""
    assert find_exercise("1.1").reference(torch.zeros(3, 5), torch.zeros(4, 5)) == []


def test_misses_and_false_alarms_are_counted_apart():
    e = judge_errors(REPLIES, lambda text: refused_by_phrases(text, ["sorry"]))
    assert (e.misses, e.refusals, e.false_alarms, e.others) == (1, 2, 1, 3)


def test_a_prefilled_reply_holds_what_was_put_there():
    m = load("charter-chat")
    items = bundled("harmful_val")[:2]
    said = true_replies(m, items, prefill=NO)
    assert all(reply.text.startswith(NO) for reply in said)
    assert [reply.prompt for reply in said] == [item.prompt for item in items]
    assert all(reply.refused != reply.correct for reply in said)


def test_truth_needs_a_model_of_the_world_and_answers(model_of):
    with pytest.raises(RefusalLabError, match="bundled"):
        true_replies(model_of("llama"), bundled("harmful_val")[:1])
    with pytest.raises(RefusalLabError, match="bundled"):
        true_replies(load("charter-chat"), [Item("x", "Hello?")])


def test_wrong_refusals_are_weighed_by_how_many_come():
    assert wrong_refusal_share(0.5, 0.5, 0.5) == 0.5
    assert wrong_refusal_share(1.0, 0.1, 0.1) == pytest.approx(0.09 / 0.19)
    for shares, problem in (((1.1, 0, 0.5), "between 0 and 1"), ((0, 0, 0.5), "Nothing is refused")):
        with pytest.raises(RefusalLabError, match=problem):
            wrong_refusal_share(*shares)


def test_the_figures():
    metric = {"harmful": torch.randn(20) + 3, "harmless": torch.randn(9) - 3, "borderline": torch.randn(5)}
    histograms = plots.metric_histograms(metric)
    assert [sum(bar.get_height() for bar in axis.patches) for axis in histograms.axes] == [20, 9, 5]
    shares = {name: {judge: rate([True, False]) for judge in "abcd"} for name in ("one", "two")}
    judged = plots.judged_shares(shares, {"one": 0.0, "two": 1.0})
    assert {text.get_text() for text in judged.legends[0].get_texts()} == {*"abcd", "truth"}
    bars = [line for line in judged.axes[0].lines if line.get_label() == "truth"]
    assert [bar.get_xdata()[0] for bar in bars] == [0.0, 1.0]
    assert "log-odds" in histograms.axes[-1].get_xlabel() and "Wilson" in judged.axes[0].get_xlabel()
    p = np.linspace(0, 1, 5)
    coverage = plots.interval_coverage({"Wald": p, "Wilson": p**2}, p, 54)
    assert [list(line.get_ydata()) for line in coverage.axes[0].lines[:2]] == [list(p), list(p**2)]
    assert coverage.axes[0].lines[2].get_ydata()[0] == 0.95 and "n=54" in coverage.axes[0].get_xlabel()


@pytest.fixture
def judges():
    return explore.judges({"all": REPLIES, "first": REPLIES[:1]}, {"none": (), "sorry": ("sorry",)})


def counts(judges):
    (_, (_, refusals, others)), (_, wrong) = judges.tables
    return refusals[1], others[1], len(wrong)


def test_the_playground_counts_what_a_list_gets_wrong(judges):
    which, phrases, more, start = judges.controls
    assert counts(judges) == ("2", "0", 2)
    phrases.value = "sorry"
    assert counts(judges) == ("1", "1", 2)
    more.value = "I cannot,  "
    assert counts(judges) == ("0", "1", 1)
    more.value = "charter"
    assert counts(judges) == ("1", "2", 3)
    start.value = True
    assert counts(judges) == ("1", "1", 2)
    which.value, more.value = "first", NO
    assert judges.tables[1][1] == [("none",)]
