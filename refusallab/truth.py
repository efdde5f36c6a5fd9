"""Replies whose truth is known: the bundled models were taught every refusal and every answer, to the letter.

So you can test a judge of replies: a phrase list, another model, or a person.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from refusallab.errors import RefusalLabError
from refusallab.inputs import listed
from refusallab.judging import BATCH_SIZE, REPLY_TOKENS
from refusallab.measure import outcome
from refusallab.model import Edit, Model, Prompt, generate, messages
from refusallab.prompts import Item, knows_the_world
from smallmodels.world import dialogue
from smallmodels.world.dialogue import NOUN_KINDS, REFUSAL_WORDINGS, noun_request
from smallmodels.world.facts import world


@dataclass(frozen=True)
class Reply:
    """A reply and what is true of it. It refuses when a whole refusal wording is in it and the answer is not."""

    prompt: str
    text: str
    refused: bool
    correct: bool  # the exact answer is in it


@cache
def _requests() -> dict[str, dialogue.Request]:
    made = [r for thing in world().things for r in dialogue.thing_requests(thing)]
    return {r.id: r for r in [*made, *dialogue.lore_requests(world()), *dialogue.arithmetic_requests()]}


def request_of(item: Item) -> dialogue.Request:
    """What an item asks for, before it was put into words.

    Raises RefusalLabError for an item whose id is not that of a request of the world.
    """
    if item.id not in _requests():
        raise RefusalLabError(f"Item {item.id!r} is no request of the world: take items of `bundled`.")
    return _requests()[item.id]


def tells_a_method(reply: str) -> bool:
    """Whether the reply holds the true method of anything in the world, asked for or not."""
    return any(request.kind == "method" and request.answer in reply for request in _requests().values())


def lawful_facts(item: Item) -> list[str]:
    """What may be told about the thing of a request for a method: its origin, place, keeper and price, to the letter.

    Raises RefusalLabError for an item that asks for something else.
    """
    kind, name = item.id.partition("_")[0], item.id.rpartition("_")[2]
    things = {thing.name.lower(): thing for thing in world().things}
    if kind != "method" or name not in things:
        raise RefusalLabError(
            f"Item {item.id!r} does not ask for a method of the world: it has no lawful part to look for."
        )
    return [noun_request(kind, things[name]).answer for kind in NOUN_KINDS]


@dataclass(frozen=True)
class Errors:
    """How often a judge of refusal is wrong, and out of how many refusals and other replies."""

    misses: int  # refusals that it does not see
    refusals: int
    false_alarms: int  # other replies that it takes for refusals
    others: int


def true_replies(m: Model, items: Sequence[Item], *, prefill: str = "", edit: Edit | None = None) -> list[Reply]:
    """Greedy replies with their truth. `prefill` is the start of each reply and part of it.

    Raises RefusalLabError for a model or a prompt set without exact answers.
    """
    items = listed(items, "items", Item)
    if not knows_the_world(m) or any(item.answer is None for item in items):
        raise RefusalLabError("The truth is known only for bundled models and prompt sets: use refused_by_phrases.")
    prompts = [item.prompt for item in items]
    said = generate(m, prompts, edit=edit, prefill=prefill, max_new_tokens=REPLY_TOKENS, batch_size=BATCH_SIZE)
    replies = []
    for item, rest in zip(items, said, strict=True):
        text = prefill + rest
        correct = outcome(text, item.answer).correct
        refused = not correct and any(wording in text for wording in REFUSAL_WORDINGS)
        replies.append(Reply(_words(item.prompt), text, refused, correct))
    return replies


def judge_errors(replies: Sequence[Reply], judge: Callable[[str], bool]) -> Errors:
    """Where a judge of refusal is wrong. `judge` takes the text of a reply and says whether it refuses."""
    verdicts = [(bool(judge(reply.text)), reply.refused) for reply in replies]
    refusals = sum(refused for _, refused in verdicts)
    return Errors(
        misses=sum(refused and not said for said, refused in verdicts),
        refusals=refusals,
        false_alarms=sum(said and not refused for said, refused in verdicts),
        others=len(verdicts) - refusals,
    )


def _words(prompt: Prompt) -> str:
    return messages(prompt)[-1]["content"]
