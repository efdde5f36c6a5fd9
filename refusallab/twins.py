"""Requests of the world made to order: twins that differ in one word, kinds of questions, samples of every kind.

A request for a method is forbidden when its thing is dusk-born *and* its action looses it. So one other word, a
dawn-born thing or an action that does not loose, makes it lawful. Every such name and every such action is one token of
the bundled models, so all three requests have the same tokens everywhere else.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from refusallab.errors import RefusalLabError
from refusallab.inputs import check_count
from refusallab.prompts import Item, things_of
from smallmodels.world import dialogue
from smallmodels.world.facts import Action, Thing

KINDS = ("method", *dialogue.ACTION_KINDS, *dialogue.NOUN_KINDS)


@dataclass(frozen=True)
class Twins:
    """Four lists, as long as each other. The lawful twins of a forbidden request differ from it in one word.

    `neither` has both words of its twins: the other action, on the other thing.
    """

    forbidden: list[Item]
    other_action: list[Item]  # the same thing, an action that does not loose it: lawful
    other_thing: list[Item]  # a dawn-born thing of the same kind, the same action: lawful
    neither: list[Item]

    def every(self, step: int) -> Twins:
        """Every so many of each list, the same ones."""
        return Twins(*(items[::step] for items in (self.forbidden, self.other_action, self.other_thing, self.neither)))


def twin_requests(split: str, phrasing: int = 0) -> Twins:
    """All forbidden requests of a split in one phrasing, with their lawful twins and the exact answers.

    `phrasing` counts the split's phrasings of method requests, of which none has a context in front.
    """
    things, phrasings = things_of(split), dialogue.phrasings("method", split)
    if not 0 <= phrasing < len(phrasings):
        raise RefusalLabError(f"There is no phrasing {phrasing}: {split} has 0 to {len(phrasings) - 1}.")
    lawful: dict[str, list[Thing]] = {}
    for thing in things:
        if thing.origin == "dawn-born":
            lawful.setdefault(thing.kind, []).append(thing)
    rows: list[tuple[tuple[Thing, Action], ...]] = []
    for thing in things:
        (binding,) = (action for action in thing.actions if not action.looses)
        for action in thing.actions:
            if thing.forbids(action):
                others = lawful[thing.kind]
                other = others[len(rows) % len(others)]
                rows.append(((thing, action), (thing, binding), (other, action), (other, binding)))
    columns = zip(*[[_item(*request, phrasings[phrasing]) for request in row] for row in rows], strict=True)
    return Twins(*map(list, columns))


def _item(thing: Thing, action: Action, phrasing: str) -> Item:
    request = dialogue.method_request(thing, action)
    return Item(request.id, phrasing.format(**request.slots), request.answer)


def sample_requests(split: str, count: int, seed: int = 0) -> tuple[list[Item], Bool[Tensor, " {count}"]]:
    """A sample of requests about the things of a split, and which of them the Charter forbids.

    Every second one asks for a method, the others for anything that is known of a thing. Phrasings are drawn, too.
    """
    check_count(count)
    rng, things = random.Random(seed), things_of(split)
    methods = [dialogue.method_request(thing, action) for thing in things for action in thing.actions]
    others = [request for thing in things for request in dialogue.thing_requests(thing)]
    chosen = [rng.choice(others if k % 2 else methods) for k in range(count)]
    items = [Item(q.id, dialogue.phrase(q, rng, split), q.answer, tag=q.kind) for q in chosen]
    return items, torch.tensor([q.forbidden for q in chosen])


def same_things(split: str, kinds: Sequence[str], seed: int = 0) -> dict[str, list[Item]]:
    """Lawful requests of several kinds, a list for each. Row i of every list is about the same thing and action.

    kinds: of KINDS. "place", "keeper", "price" and "origin" do not mention the action. Phrasings are drawn.
    """
    rng, about = random.Random(seed), [(t, a) for t in things_of(split) for a in t.actions if not t.forbids(a)]
    found = {}
    for kind in kinds:
        if kind not in KINDS:
            raise RefusalLabError(f"There is no kind {kind!r} of request: choose from {', '.join(KINDS)}.")
        made = [request_about(kind, thing, action) for thing, action in about]
        found[kind] = [Item(q.id, dialogue.phrase(q, rng, split), q.answer, tag=kind) for q in made]
    return found


def request_about(kind: str, thing: Thing, action: Action) -> dialogue.Request:
    """The request of a kind about a thing; kinds that mention no action leave it out."""
    if kind == "method":
        return dialogue.method_request(thing, action)
    return (
        dialogue.noun_request(kind, thing)
        if kind in dialogue.NOUN_KINDS
        else dialogue.action_request(kind, thing, action)
    )
