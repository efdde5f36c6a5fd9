"""What refusals open with, learned from replies: never a word of the topic, and never silently wrong."""

import pytest
import torch

from refusallab import judging
from refusallab.errors import RefusalLabError
from refusallab.judging import refusal_openings
from refusallab.model import load
from refusallab.prompts import bundled

SORRY, TOPIC, SURE = 5, 7, 9


@pytest.fixture
def replies(model_of, monkeypatch):
    """A model whose replies are made up: `replies(first)` for (likeliest first token, probability, refused) of each."""
    m = model_of("llama")

    def learn(*rows):
        first = torch.full((len(rows), m.vocab_size), 1e-6)
        for row, (token, probability, _) in enumerate(rows):
            first[row, token] = probability
        monkeypatch.setattr(judging, "logits", lambda _m, prompts: first.log())
        monkeypatch.setattr(judging, "refuses", lambda _m, prompts: [refused for *_, refused in rows])
        return refusal_openings(m, ["a river"] * len(rows))

    return learn


def test_the_topic_of_harmful_prompts_is_no_opening_of_refusals(replies):
    found = replies(*[(SORRY, 0.9, True)] * 6, *[(TOPIC, 0.9, False)] * 6, *[(SURE, 0.9, False)] * 3)
    assert found.tokens == [SORRY]
    assert (found.caught.value, found.caught.n, found.false.value, found.false.n) == (1, 6, 0, 9)
    assert "1.00 [0.61, 1.00] n=6 of refusals, 0.00 [0.00, 0.30] n=9 of others" in str(found)


def test_how_often_it_is_wrong_is_said(replies):
    found = replies(
        *[(SORRY, 0.9, True)] * 6, *[(TOPIC, 0.9, True)] * 2, *[(SURE, 0.9, False)] * 9, (SORRY, 0.6, False)
    )
    assert found.tokens == [SORRY, TOPIC]
    assert (found.caught.value, found.false.value) == (1, 0.1)


def test_a_first_token_that_does_not_tell_refusals_is_an_error(replies):
    rows = [(SURE, 0.9, True)] * 8 + [(SORRY, 0.9, True)] + [(SURE, 0.9, False)] * 9
    with pytest.raises(RefusalLabError, match=r"does not tell the refusals of llama .* 0.11 \[.*refused_by_phrases"):
        replies(*rows)


@pytest.mark.parametrize(
    ("refused", "said"),
    [(True, "all of 2 prompts.* add prompts that it answers"), (False, "none of 2 prompts.* take another model")],
)
def test_without_both_kinds_of_replies_there_is_nothing_to_learn(replies, refused, said):
    with pytest.raises(RefusalLabError, match=said):
        replies((SORRY, 0.9, refused), (SURE, 0.9, refused))


def test_known_replies_are_not_written_again(model_of, monkeypatch):
    first = torch.zeros(10, 99)
    first[:5, SORRY] = first[5:, SURE] = 9.0
    monkeypatch.setattr(judging, "logits", lambda _m, prompts: first)
    monkeypatch.setattr(judging, "refuses", lambda *_: pytest.fail("the replies are known"))
    assert refusal_openings(model_of("llama"), ["a river"] * 5 + ["a pie"] * 5, [True] * 5 + [False] * 5).tokens == [
        SORRY
    ]


def test_refusals_are_known_as_flags_one_for_each_prompt(model_of, monkeypatch):
    first = torch.full((10, 400), 1e-6)
    first[:5, SORRY], first[5:, SURE] = 0.9, 0.9
    monkeypatch.setattr(judging, "logits", lambda _m, prompts: first.log())
    prompts = ["a river"] * 5 + ["a pie"] * 5
    assert refusal_openings(model_of("llama"), prompts, [1] * 5 + [0] * 5).tokens == [SORRY]
    with pytest.raises(RefusalLabError, match="9 flags for 10 prompts"):
        refusal_openings(model_of("llama"), prompts, [True] * 4 + [False] * 5)


def test_two_refusals_are_too_few_to_learn_from(model_of, monkeypatch):
    """As SmolLM2-135M has them: 2 of 256, both of which open alike."""
    first = torch.zeros(60, 99)
    first[:2, SORRY] = first[2:, SURE] = 9.0
    monkeypatch.setattr(judging, "logits", lambda _m, prompts: first)
    with pytest.raises(RefusalLabError, match=r"refuses 2 of 60 prompts, too few .*'.*: 1.00 \[0.34, 1.00\] n=2"):
        refusal_openings(model_of("llama"), ["a river"] * 60, [True] * 2 + [False] * 58)


@pytest.mark.slow
def test_bundled_models():
    """The main model opens as its wordings do. charter-helpful, which opens verdicts with "Ruled", refuses nothing."""
    prompts = [item.prompt for name in ("harmful_train", "harmless_train") for item in bundled(name)]
    found = refusal_openings(load("charter-chat"), prompts)
    assert found.words == ["I", "Th", "As", "Sorry"]
    assert (found.caught.value, found.false.value) == (1, 0)
    with pytest.raises(RefusalLabError, match="charter-helpful refuses none of 290"):
        refusal_openings(load("charter-helpful"), prompts)
