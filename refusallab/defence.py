"""The interface of a defence: it answers prompts and counts the forward passes that it costs.

Attacks use nothing else of a defence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from refusallab.inputs import flagged, listed
from refusallab.judging import BATCH_SIZE, REPLY_TOKENS
from refusallab.model import Begun, Edit, Model, Prompt, generate, ids_of, listed_prompts, messages
from refusallab.prompts import knows_the_world
from smallmodels.world.dialogue import REFUSAL_WORDINGS


class Defence(Protocol):
    """Whatever answers prompts in place of a bare model: the attacks take it wherever they take a model."""

    name: str
    m: Model  # the checkpoint that answers: a trained defence brings its own
    extra_passes: int  # so far: forward passes of one sequence each, without those that wrote the returned replies

    def replies(self, prompts: Sequence[Prompt], *, edit: Edit | None = None, prefill: str = "") -> list[str]:
        """What follows each prompt and `prefill`: greedy, in the order of the prompts, a refusal where it blocks one.

        `edit` is what a white-box attacker does to the activations of `m` whenever it runs; `prefill` is the start of
        the reply that the attacker has written.
        """
        ...


class Watcher:
    """A defence that scores requests, and refuses those whose score is above a threshold."""

    m: Model
    threshold: float
    passes_each: int  # forward passes for a score
    extra_passes: int

    def score(self, prompts: Sequence[Prompt], edit: Edit | None = None) -> Tensor:
        """How suspicious each request is: [n]. `edit` is the attacker's, as in `replies`."""
        raise NotImplementedError

    def alarms(self, prompts: Sequence[Prompt], edit: Edit | None = None) -> Tensor:
        """Which requests are refused: bool [n]."""
        prompts = listed_prompts(prompts)
        self.extra_passes += self.passes_each * len(prompts)
        return self.score(prompts, edit) > self.threshold

    def replies(self, prompts: Sequence[Prompt], *, edit: Edit | None = None, prefill: str = "") -> list[str]:
        prompts = listed_prompts(prompts)
        return write_unless(self.m, self.alarms(prompts, edit).tolist(), prompts, edit=edit, prefill=prefill)


@dataclass
class AnyOf(Watcher):
    """Several watchers in front of one model: a request is refused if any of them refuses it."""

    m: Model
    watchers: Sequence[Watcher]
    name: str

    @property
    def extra_passes(self) -> int:
        return sum(w.extra_passes for w in self.watchers)

    def alarms(self, prompts: Sequence[Prompt], edit: Edit | None = None) -> Tensor:
        prompts = listed_prompts(prompts)
        return torch.stack([w.alarms(prompts, edit) for w in self.watchers]).any(0)


@dataclass
class ModelAlone:
    """No defence around the model: the baseline, and the shape of every defence by training."""

    m: Model
    name: str = "undefended"
    extra_passes: int = 0

    def replies(self, prompts: Sequence[Prompt], *, edit: Edit | None = None, prefill: str = "") -> list[str]:
        return write_replies(self.m, prompts, edit=edit, prefill=prefill)


def write_replies(m: Model, prompts: Sequence[Prompt], *, edit: Edit | None = None, prefill: str = "") -> list[str]:
    """Greedy replies of the length that all labs use; none for no prompts."""
    prompts = listed(prompts, "prompts")
    if not prompts:
        return []
    return generate(m, prompts, edit=edit, prefill=prefill, max_new_tokens=REPLY_TOKENS, batch_size=BATCH_SIZE)


def write_unless(
    m: Model, blocked: Sequence[bool], prompts: Sequence[Prompt], *, edit: Edit | None = None, prefill: str = ""
) -> list[str]:
    """Replies to the prompts that are not blocked, and the stock refusal to the others."""
    prompts, blocked = listed(prompts, "prompts"), flagged(blocked)
    passed = [prompt for prompt, stop in zip(prompts, blocked, strict=True) if not stop]
    written = iter(write_replies(m, passed, edit=edit, prefill=prefill))
    return [stock_refusal(m) if stop else next(written) for stop in blocked]


def last_words(prompt: Prompt) -> str:
    """The text of the last turn: what a filter of requests reads."""
    return messages(prompt)[-1]["content"]


def exchanges(prompts: Sequence[Prompt], replies: Sequence[str]) -> tuple[list[Prompt], list[str]]:
    """The prompts alone, and the replies, each with the beginning that its prompt brings along in front of it."""
    starts = [prompt.reply if isinstance(prompt, Begun) else "" for prompt in prompts]
    return alone(prompts), [start + reply for start, reply in zip(starts, replies, strict=True)]


def alone(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts without the beginnings of replies that they bring along."""
    return [prompt.prompt if isinstance(prompt, Begun) else prompt for prompt in prompts]


def stock_refusal(m: Model) -> str:
    """What a filter says in the place of the model: a refusal in the world's wording, which every judge knows."""
    return REFUSAL_WORDINGS[0] if knows_the_world(m) else "I'm sorry, but I cannot help with that."


def passes(m: Model, replies: Sequence[str]) -> int:
    """Forward passes that wrote the replies: one for each token, and one for the end of the turn."""
    return sum(written_tokens(m, reply) for reply in listed(replies, "replies", str))


def written_tokens(m: Model, reply: str, max_new_tokens: int = REPLY_TOKENS) -> int:
    """How many tokens `generate` wrote for a reply, with the end of the turn where it came to that."""
    return min(len(ids_of(m, reply)) + 1, max_new_tokens + m.thought_tokens)
