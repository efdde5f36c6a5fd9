"""Prompts with a common beginning: run once, and the numbers are those of plain hooks."""

from functools import partial

import pytest
import torch
from test_directions import HARMFUL, HARMLESS, TOKENS, hooked_scores

from refusallab import directions, prefix
from refusallab.interventions import ablation, addition
from refusallab.model import encode, unchecked_logits, wrap

pytestmark = pytest.mark.slow

SYSTEM = "<|start|>system\nList three tools and name a river in the north.<|end|>\n"


@pytest.fixture
def spoken(make):
    """spoken("llama"): a model of that architecture whose template has a system prompt."""

    def get(architecture):
        tokenizer = make.tokenizer()
        tokenizer.chat_template = SYSTEM + tokenizer.chat_template
        return wrap(make.hf(architecture), tokenizer, architecture)

    return get


def test_scores_equal_plain_hooks(m, spoken, hooks):
    m = spoken(m.name)
    vectors = directions.candidate_directions(m, HARMFUL, HARMLESS)
    score = directions.Scorer(m, HARMFUL, HARMLESS, TOKENS)
    assert (score.all.shared.shape[1] >= prefix.WORTH) == (
        m.name not in ("gpt2", "gemma2", "gemma3")
    )  # learned positions; a window of 16 tokens
    for layer in range(1, m.n_layers):
        for c in score(vectors[layer, -2:], layer, [-2, -1]):  # two vectors in one trace
            expected = hooked_scores(m, hooks, vectors[layer, c.position], layer)
            assert (c.bypass, c.induce, c.kl) == pytest.approx(expected, abs=1e-4)


def test_batches_of_other_lengths_keep_their_order(m, spoken):
    m = spoken(m.name)
    vectors, prompts = torch.randn(3, m.width), [*HARMFUL, *HARMLESS]
    singly = torch.stack([unchecked_logits(m, prompts, edit=ablation(v), batch_size=64) for v in vectors])
    for size in (2, 64):
        runs = prefix.PromptRuns(m, prompts, size)
        torch.testing.assert_close(runs.logits(ablation, vectors), singly, rtol=1e-4, atol=1e-4)


def test_what_is_shared_is_the_whole_common_beginning_and_no_more(spoken):
    m = spoken("llama")
    shared = prefix.shared_tokens(m, HARMFUL)
    assert m.tokenizer.decode(shared[0]).startswith(SYSTEM)
    assert all(shared.shape[1] < row.sum() for row in encode(m, HARMFUL)["attention_mask"])
    assert prefix.shared_tokens(m, [HARMFUL[0]] * 2).shape[1] == encode(m, HARMFUL[:1])["input_ids"].shape[1] - 1


def test_a_short_beginning_is_not_shared(model_of):
    assert prefix.shared_tokens(model_of("llama"), HARMFUL).shape == (1, 0)


@pytest.mark.parametrize("most", (1, 3, 8))
def test_groups_take_the_least_time(most):
    lengths = [15, 40, 16, 90, 15, 38, 41, 300]

    def time_of(groups):
        return sum(prefix.A_PASS + len(group) * max(lengths[i] for i in group) for group in groups)

    def every(places):
        """All ways to split sorted places into groups that follow one another."""
        if not places:
            yield []
        for n in range(1, min(most, len(places)) + 1):
            yield from ([places[:n], *rest] for rest in every(places[n:]))

    groups = prefix.groups_of_like_length(lengths, most)
    assert sorted(place for group in groups for place in group) == list(range(len(lengths)))
    assert max(map(len, groups)) <= most
    assert time_of(groups) == min(map(time_of, every(sorted(range(len(lengths)), key=lengths.__getitem__))))


def test_the_head_reads_its_weights_once_for_all_rows(spoken, monkeypatch):
    """A batch that is not contiguous would be multiplied row by row."""
    m, seen = spoken("llama"), []
    runs = prefix.PromptRuns(m, HARMFUL, 64, streams=True)
    linear = torch.nn.functional.linear

    def watched(x, weight, *bias):
        if weight is m.hf.lm_head.weight:
            seen.append(x)
        return linear(x, weight, *bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    runs.logits(ablation, torch.randn(2, m.width))
    runs.logits_from(1, partial(addition, layer=1), torch.randn(2, m.width))
    assert [x.shape[:2] for x in seen] == [(2 * len(HARMFUL), 1)] * 2  # once each; what is shared needs no head
    assert all(x.is_contiguous() for x in seen)
