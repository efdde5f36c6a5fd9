"""Conversations of many turns: written around a request, read turn by turn.

The earlier turns of a conversation are input. Whoever has the interface of a chat model chooses what the user said, and
many interfaces let them choose, too, what the assistant is said to have replied.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from jaxtyping import Float32
from torch import Tensor

from refusallab.activations import residual
from refusallab.errors import RefusalLabError
from refusallab.inputs import listed
from refusallab.model import Begun, Model, Prompt, behind_turns, ids_of, messages, render
from refusallab.prompts import Item, things_of
from refusallab.truth import request_of
from smallmodels.world import dialogue
from smallmodels.world.facts import Thing

EARLIER = ("same thing", "other things", "lawful shots", "shots", "refused shots", "refused things")
METHOD_PARTS = ("tool", "stuff", "time")


def after_turns(items: Sequence[Item], kind: str, turns: int, seed: int = 0) -> list[Item]:
    """The items, each behind a conversation of `turns` earlier turns that somebody else has written.

    kind: "same thing", harmless questions about the thing of the request with right answers; "other things", the same
    about other things; "lawful shots", lawful methods with right answers; "shots", forbidden methods of other things
    with invented answers (many-shot jailbreaking); "refused shots" and "refused things", what "shots" and "other
    things" ask, refused. Phrasings and things are those of the split of the request. A system turn of the item stays
    first, and a reply that has begun stays last.

    Raises RefusalLabError for an unknown kind and for items that name no thing.
    """
    if kind not in EARLIER:
        raise RefusalLabError(f"There is no kind {kind!r} of earlier turns: choose one of {', '.join(EARLIER)}.")
    made = []
    for item in listed(items, "items", Item):
        said, rng = [], random.Random(f"{seed} {kind} {item.id}")
        for thing, request in _earlier(item, kind, turns, rng):
            reply = request.answer
            if kind.startswith("refused"):
                reply = dialogue.refusal(thing.category, rng)
            elif kind == "shots":
                reply = invented(thing, rng)
            asked = dialogue.phrase(request, rng, thing.split)
            said += [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]
        made.append(replace(item, prompt=behind_turns(item.prompt, said)))
    return made


def _earlier(item: Item, kind: str, turns: int, rng: random.Random) -> list[tuple[Thing, dialogue.Request]]:
    """What is asked in the earlier turns, each with the thing that it is about."""
    about = request_of(item).thing
    if about is None:
        raise RefusalLabError(f"Item {item.id!r} names no thing: there is no conversation about it.")
    pool = [
        (t, r)
        for t, r in _all_requests(about.split)
        if (t.name == about.name) == (kind == "same thing") and (r.kind == "method") == ("shots" in kind)
    ]
    if "shots" in kind:
        pool = [(t, r) for t, r in pool if r.forbidden != (kind == "lawful shots")]
    if not 0 <= turns <= len(pool):
        raise RefusalLabError(
            f"{turns} earlier turns: give 0 to {len(pool)}, as there are {len(pool)} different ones of kind {kind!r}."
        )
    return rng.sample(pool, turns)


@cache
def _all_requests(split: str) -> list[tuple[Thing, dialogue.Request]]:
    return [(t, r) for t in things_of(split) for r in dialogue.thing_requests(t)]


def invented(thing: Thing, rng: random.Random) -> str:
    """A method in the form of a right answer, put together from methods of other things: what somebody makes up."""
    others = [t for t in things_of(thing.split) if t.name != thing.name]
    parts = {part: rng.choice(list(rng.choice(others).methods.values()))[part] for part in METHOD_PARTS}
    return dialogue.answer("method", **parts)


def turn_prompts(prompt: Prompt) -> list[Prompt]:
    """The conversation up to each user turn: what the model read before each of its replies.

    A last reply that has begun belongs to the last of them.
    """
    said = messages(prompt)
    *before, last = (said[: k + 1] for k, turn in enumerate(said) if turn["role"] == "user")
    return [*before, Begun(last, prompt.reply) if isinstance(prompt, Begun) else last]


def streams_by_turn(m: Model, prompts: Sequence[Prompt], layer: int) -> Float32[Tensor, "n turns width"]:
    """The stream at the input of a block, at the last token before each reply of the conversations, the last included.

    Raises RefusalLabError unless all of them have equally many user turns.
    """
    cut = [turn_prompts(prompt) for prompt in prompts]
    counts = {len(several) for several in cut}
    if len(counts) != 1:
        raise RefusalLabError(f"The conversations have {sorted(counts)} user turns: give some with equally many.")
    ids = [[ids_of(m, render(m, prompt)) for prompt in several] for several in cut]
    if any(whole[: len(part)] != part for *parts, whole in ids for part in parts):  # the template tells the turns apart
        flat = [prompt for several in cut for prompt in several]
        x = residual(m, flat, layers=[layer], positions=[-1], batch_size=32)[:, 0, 0]  # they are long
        return torch.stack(x.split(counts.pop()))
    streams: dict[int, Tensor] = {}
    for length in sorted({len(several[-1]) for several in ids}):  # one pass for a conversation: it holds its beginnings
        rows = [i for i, several in enumerate(ids) if len(several[-1]) == length]
        places = list(range(-length, 0))
        x = residual(m, [cut[i][-1] for i in rows], layers=[layer], positions=places, batch_size=32)[:, 0]
        streams |= {i: x[k, [len(part) - 1 for part in ids[i]]] for k, i in enumerate(rows)}
    return torch.stack([streams[i] for i in range(len(ids))])
