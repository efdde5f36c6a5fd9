"""Prompts with a common beginning: run once, and the numbers are those of plain hooks."""

import pytest
import torch
from test_directions import HARMFUL, HARMLESS, TOKENS, hooked_scores

from refusallab import directions, prefix
from refusallab.interventions import ablation
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
        c = score(vectors[layer, -1], layer, -1)
        assert (c.bypass, c.induce, c.kl) == pytest.approx(hooked_scores(m, hooks, vectors[layer, -1], layer), abs=1e-4)


def test_batches_of_other_lengths_keep_their_order(m, spoken):
    m = spoken(m.name)
    edit, prompts = ablation(torch.randn(m.width)), [*HARMFUL, *HARMLESS]
    for size in (2, 64):
        runs = prefix.PromptRuns(m, prompts, size)
        torch.testing.assert_close(
            runs.logits(edit), unchecked_logits(m, prompts, edit=edit, batch_size=64), rtol=1e-4, atol=1e-4
        )


def test_what_is_shared_is_the_whole_common_beginning_and_no_more(spoken):
    m = spoken("llama")
    shared = prefix.shared_tokens(m, HARMFUL)
    assert m.tokenizer.decode(shared[0]).startswith(SYSTEM)
    assert all(shared.shape[1] < row.sum() for row in encode(m, HARMFUL)["attention_mask"])
    assert prefix.shared_tokens(m, [HARMFUL[0]] * 2).shape[1] == encode(m, HARMFUL[:1])["input_ids"].shape[1] - 1


def test_a_short_beginning_is_not_shared(model_of):
    assert prefix.shared_tokens(model_of("llama"), HARMFUL).shape == (1, 0)
