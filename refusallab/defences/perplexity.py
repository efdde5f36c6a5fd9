"""The perplexity filter: a request that nobody would write is refused before the model reads it.

Alon and Kamfonas 2023 (arXiv 2308.14132), Jain et al. 2023 (arXiv 2309.00614). The score is the mean surprise of the
most surprising window of tokens, in nats per token, to some language model; its exponential is the perplexity. That
model need not be the one that answers. The bundled models learned replies and cannot judge requests, so for them
two neighbouring tokens, counted in ordinary traffic, serve as the language model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refusallab.defence import Watcher, last_words
from refusallab.errors import RefusalLabError
from refusallab.inputs import listed
from refusallab.model import Edit, Model, Prompt, listed_prompts
from refusallab.prompts import require_world

PSEUDO_COUNT = 2.0  # weight of single tokens against pairs
WINDOW = 8  # tokens


@dataclass(frozen=True, eq=False)
class Bigrams:
    """A language model of neighbouring tokens, counted in texts."""

    m: Model  # whose tokenizer reads
    log_p: Tensor  # [vocab + 1, vocab]: natural log of P(token | token before); the last row is for the first token

    def surprise(self, text: str) -> Tensor:
        """Surprise of each token of a text, in nats: [tokens]."""
        ids = _tokens(self.m, text)
        return -self.log_p[_before(self.m, ids), ids]


def count_bigrams(m: Model, texts: Sequence[str]) -> Bigrams:
    """Pairs of tokens in the texts; a pair seldom or never seen falls back on how common its second token is."""
    require_world(m)  # others have too many tokens for a table of pairs
    vocab = m.vocab_size
    single, pairs = torch.ones(vocab), torch.zeros(vocab + 1, vocab)
    for text in listed(texts, "texts", str):
        ids = _tokens(m, text)
        one = torch.ones(len(ids))
        single.index_add_(0, ids, one)
        pairs.index_put_((_before(m, ids), ids), one, accumulate=True)
    expected = PSEUDO_COUNT * single / single.sum()
    return Bigrams(m, ((pairs + expected) / (pairs.sum(1, keepdim=True) + PSEUDO_COUNT)).log())


def worst_window(surprise: Tensor, window: int = WINDOW) -> float:
    """The largest mean surprise of `window` neighbouring tokens; of all tokens where there are fewer.

    surprise [tokens], in nats; the result is in nats per token. Raises RefusalLabError where there is no token.
    """
    if len(surprise) == 0 or window < 1:
        raise RefusalLabError("A window needs a token to read, and to be at least 1 wide.")
    return surprise.unfold(0, min(window, len(surprise)), 1).mean(-1).max().item()


@dataclass
class PerplexityFilter(Watcher):
    """Refuses requests whose worst window surprises by more than the threshold."""

    m: Model
    surprise: Callable[[str], Tensor]  # text -> nats of each token
    threshold: float
    passes_each: int = 0  # forward passes that the language model costs for one request: none for counts
    name: str = "perplexity filter"
    extra_passes: int = 0

    def score(self, prompts: Sequence[Prompt], edit: Edit | None = None) -> Tensor:
        """Worst window of each request: [n], nats per token. It reads texts, which no edit of activations reaches."""
        return torch.tensor([worst_window(self.surprise(last_words(prompt))) for prompt in listed_prompts(prompts)])


def _tokens(m: Model, text: str) -> Tensor:
    return torch.tensor(m.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)


def _before(m: Model, ids: Tensor) -> Tensor:
    """The token before each; the row after the vocabulary stands for the beginning."""
    return torch.cat([torch.tensor([m.vocab_size]), ids[:-1]])
