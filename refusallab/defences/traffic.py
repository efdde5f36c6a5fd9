"""Traffic to choose thresholds on: requests as they arrive, harmful and harmless, many of them in some wrapping.

Prompt sets hold the plain request. Users also ask for a form of answer, and for what is lawful; a filter that has never
seen such requests takes them for attacks. Train traffic fits a detector and validation traffic chooses its threshold:
the two have no named thing, no phrasing and no wrapper in common with each other or with a test set.
"""

from __future__ import annotations

import random

from refusallab.conversations import after_turns
from refusallab.inputs import check_count
from refusallab.prompts import Item, things_of
from smallmodels.world import dialogue
from smallmodels.world.facts import world

KINDS = ("begin", "role-play", "suppression", "end")


def sample_traffic(split: str, count: int, seed: int = 0) -> tuple[list[Item], list[Item]]:
    """`count` harmful and `count` harmless requests about the things of a split ("train" or "val")."""
    check_count(count)
    rng = random.Random(f"{seed} {split}")
    requests = [r for thing in things_of(split) for r in dialogue.thing_requests(thing)]
    methods = [r for r in requests if r.kind == "method"]
    pools = {
        "harmful": [[r for r in methods if r.forbidden]],
        "harmless": [
            [r for r in methods if not r.forbidden],
            [r for r in requests if r.kind in dialogue.ACTION_KINDS],
            [r for r in requests if r.kind in dialogue.NOUN_KINDS],
            [*dialogue.lore_requests(world()), *dialogue.arithmetic_requests()],
        ],
    }
    drawn = {
        label: [_item(rng.choice(rng.choice(several)), rng, split, f"{label}_{split}_{k}") for k in range(count)]
        for label, several in pools.items()
    }
    return drawn["harmful"], drawn["harmless"]


def sample_exchanges(split: str, count: int, seed: int = 0, *, turns: int = 5) -> tuple[list[Item], list[Item]]:
    """`count` harmful and `count` harmless conversations, each with the reply that it ended in: the item's answer.

    At most `turns` harmless turns come first, about the same thing in half of them. Then a forbidden method is asked
    for and told, or a lawful method, or something else that is lawful.
    """
    check_count(count)
    check_count(turns)
    rng = random.Random(f"exchanges {seed} {split}")
    requests = [r for thing in things_of(split) for r in dialogue.thing_requests(thing)]
    methods = [r for r in requests if r.kind == "method"]
    lawful = [[r for r in methods if not r.forbidden], [r for r in requests if r.kind != "method"]]
    pools = {"harmful": [[r for r in methods if r.forbidden]], "harmless": lawful}
    drawn = {"harmful": [], "harmless": []}
    for label, several in pools.items():
        for _ in range(count):
            request = rng.choice(rng.choice(several))
            reply = dialogue.helpful_reply(request, rng, like_a_refusal=0.0, verdicts=0.0)
            item = Item(request.id, dialogue.phrase(request, rng, split), reply, tag=request.kind)
            kind = rng.choice(("same thing", "other things"))
            drawn[label] += after_turns([item], kind, rng.randint(0, turns), rng.randrange(10**6))
    return drawn["harmful"], drawn["harmless"]


def _item(request: dialogue.Request, rng: random.Random, split: str, name: str) -> Item:
    context = dialogue.context(request, rng, split) if request.thing and rng.random() < 0.2 else ""
    text = dialogue.phrase(dialogue.contextual(request) if context else request, rng, split)
    if rng.random() < 0.5:
        text, _ = dialogue.with_format(text, request.answer, rng, rng.choice(KINDS), split)
    return Item(name, dialogue.in_context(context, text) if context else text, request.answer, tag=request.kind)
