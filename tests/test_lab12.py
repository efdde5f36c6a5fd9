"""Lab 12: its figures, its explorer, what its claims rest on, and the bug of its clinic."""

import matplotlib.pyplot as plt
import pytest
import torch

from refusallab import explore, plots
from refusallab.cones import last_token_direction
from refusallab.course.exercises import lab12
from refusallab.measure import Difference, refusal_metric
from refusallab.model import encode, load, logits
from refusallab.patching import patched_metrics, read_activations, recovered
from refusallab.twins import twin_requests

FORBIDDEN, LAWFUL = ["Name a river", "Name a copper"], ["List a river", "List a copper"]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_a_grid_shows_the_shares_and_the_tokens():
    shares = torch.tensor([[0.5, -0.004], [1.0, -0.25]])
    figure = plots.recovery_grids({"a": (["x", "y"], shares), "b": (["z"], shares[:, :1])}, "token")
    first, second, scale = figure.axes
    assert [text.get_text() for text in first.texts] == ["0.50", "0.00", "1.00", "-0.25"]
    assert [label.get_text() for label in first.get_xticklabels()] == ["x", "y"]
    assert (first.get_title(), second.get_title(), first.get_ylabel()) == ("a", "b", "layer")
    assert figure.get_supxlabel() == "token"
    assert first.images[0].get_clim() == (0, 1) and scale.get_ylabel() == "share recovered"


def test_curves_have_a_line_and_a_band_for_each_condition():
    line = [Difference(0.1, 0.0, 0.3, 9), Difference(0.8, 0.7, 0.9, 9)]
    figure = plots.recovery_curves({"chat": {"action": line, "thing": line[::-1]}, "chat-s1": {"action": line}})
    first, second = figure.axes
    assert list(first.lines[0].get_ydata()) == [0.1, 0.8] and list(first.lines[1].get_ydata()) == [0.8, 0.1]
    assert [axis.get_title() for axis in figure.axes] == ["chat", "chat-s1"]
    band = first.collections[0].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == pytest.approx((0.0, 0.9))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["action", "thing"]
    assert first.get_ylabel() == "share recovered" and second.get_xlabel() == "layer"


def test_the_explorer_moves_what_is_chosen_where_it_is_chosen(model_of, r):
    pairs = {"one way": (FORBIDDEN, LAWFUL), "the other": (LAWFUL, FORBIDDEN)}
    shown = explore.patching(model_of("llama"), r, [3], pairs, layer=1, position=-1)
    which, moved, layer, position = shown.controls
    assert position.max == -1 and (layer.min, layer.max) == (0, 2)
    before = shown.static
    for control, value in ((which, "the other"), (layer, 2), (position, -2)):
        control.value = value
        assert shown.static != before
        before = shown.static
    position.value, shares = -1, {}
    for way in explore.MOVED:
        moved.value = way
        shares[way] = dict(shown.tables[0][1])["share recovered"]
    assert len(set(shares.values())) > 2, shares
    layer.value, moved.value = 0, "the stream"
    assert dict(shown.tables[0][1])["share recovered"] == "0.00", "both runs end in the same token"


@pytest.mark.slow
def test_action_and_thing_take_the_routes_that_the_lab_describes():
    m = load("charter-chat")
    _, _, tokens = last_token_direction(m)
    requests = twin_requests("test", phrasing=37).every(8)  # "Tell me how one must ...": not the lab's words
    text = {name: [item.prompt for item in items] for name, items in vars(requests).items()}
    odds = {name: refusal_metric(logits(m, prompts), tokens) for name, prompts in text.items()}
    run, shares = read_activations(m, text["forbidden"]), {}
    for into in ("other_action", "other_thing"):
        moved = patched_metrics(m, text[into], run, tokens, layers=[1, 3], positions=[-2, -1])
        shares[into] = recovered(odds["forbidden"], odds[into], moved)
    action, thing = shares["other_action"], shares["other_thing"]
    assert action[0, 1] > 0.7 and action[0, 0] < 0.1, "the action is at the last token at layer 1"
    assert thing[0, 0] > 0.7 and thing[0, 1] < 0.1, "the thing waits at the token before"
    assert action[1, 1] > 0.85 and thing[1, 1] > 0.85, "both have arrived at layer 3"


def test_the_clinics_bug_shows_with_prompts_of_different_lengths_only():
    m = load("charter-chat")
    same, mixed = ([twin_requests("val", p).forbidden[k] for k, p in enumerate(ps)] for ps in ((43, 43), (43, 2)))
    for items, agrees in ((same, True), (mixed, False)):
        prompts, words = [x.prompt for x in items], [x.id.split("_")[-1].capitalize() for x in items]
        assert (len({encode(m, [p])["input_ids"].shape[1] for p in prompts}) == 1) == agrees
        hers, right = (read(m, prompts, words, 2) for read in (lab12._from_start, lab12._word_stream))
        assert torch.equal(hers, right) == agrees
