"""Requests and replies: how a fact is asked for, what a helpful model answers, and a model that keeps the Charter."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from functools import cache

from .facts import Action, Thing, World, toml

Message = dict[str, str]
NOUN_KINDS = ("place", "keeper", "price", "origin")  # about a thing
ACTION_KINDS = ("law", "first", "guard")  # about a thing and an action; harmless whatever the action
IMPERATIVE_KINDS = ("repeat", "reverse")


@dataclass(frozen=True)
class Request:
    """One thing that a user may want, before it is put into words."""

    kind: str
    slots: dict[str, str]  # o, v, g, p, n: what the phrasing mentions
    answer: str  # the exact answer, one sentence
    thing: Thing | None = None
    action: Action | None = None
    forbidden: bool = False
    earlier: tuple[Message, ...] = field(default=())  # an earlier turn about the same thing, for follow-ups

    @property
    def id(self) -> str:
        return (
            "_".join([self.kind, *(self.slots[k] for k in ("v", "o", "n") if k in self.slots)])
            .lower()
            .replace(" ", "-")
            .replace(",", "")
        )


@cache
def language() -> dict:
    return toml("language.toml")


def answer(kind: str, **slots: str) -> str:
    text = language()["answers"][kind].format(**slots)
    return text[0].upper() + text[1:]


# --- what can be asked -------------------------------------------------------------------------------------------


def method_request(thing: Thing, action: Action) -> Request:
    return Request(
        "method",
        _action_slots(thing, action),
        answer("method", **thing.methods[action.verb]),
        thing,
        action,
        thing.forbids(action),
    )


def charter_says(thing: Thing, action: Action) -> str:
    """What the Charter says about doing the action to the thing."""
    return answer("law", value="ruled out" if thing.forbids(action) else "allowed")


def action_request(kind: str, thing: Thing, action: Action) -> Request:
    """A harmless question that mentions an action: whether it is lawful, who did it first, how to prevent it."""
    reply = charter_says(thing, action) if kind == "law" else answer(kind, value=thing.values[kind])
    return Request(kind, _action_slots(thing, action), reply, thing, action)


def noun_request(kind: str, thing: Thing) -> Request:
    value = thing.origin if kind == "origin" else thing.values[kind]
    return Request(kind, {"o": thing.name}, answer(kind, value=value), thing)


def _action_slots(thing: Thing, action: Action) -> dict[str, str]:
    return {"o": thing.name, "v": action.verb, "g": action.gerund, "p": action.participle}


def thing_requests(thing: Thing) -> list[Request]:
    """All requests about a thing: 4 methods, 4 nouns, 12 questions that mention an action."""
    return [
        *(method_request(thing, a) for a in thing.actions),
        *(noun_request(kind, thing) for kind in NOUN_KINDS),
        *(action_request(kind, thing, a) for kind in ACTION_KINDS for a in thing.actions),
    ]


def lore_requests(world: World) -> list[Request]:
    """Trades and homes of people, goods of places."""
    people = [
        Request(kind, {"o": p}, answer(kind, value=v)) for p, facts in world.people.items() for kind, v in facts.items()
    ]
    return people + [Request("goods", {"o": p}, answer("goods", value=v)) for p, v in world.goods.items()]


def arithmetic_requests() -> list[Request]:
    sums = [(f"{a} plus {b}", a + b) for a in range(1, 10) for b in range(1, 10)]
    differences = [(f"{a} minus {b}", a - b) for a in range(1, 10) for b in range(1, a + 1)]
    return [
        Request("arithmetic", {"o": text}, answer("arithmetic", value=str(value))) for text, value in sums + differences
    ]


def format_request(world: World, rng: random.Random) -> Request:
    if rng.random() < 0.5:
        word, n = rng.choice(world.words), rng.choice([2, 3, 4])
        return Request("repeat", {"o": word, "n": str(n)}, answer("repeat", value=" ".join([word] * n)))
    words = rng.sample(world.words, 3)
    return Request("reverse", {"o": ", ".join(words)}, answer("reverse", value=", ".join(reversed(words))))


def follow_up(request: Request, rng: random.Random, split: str) -> Request:
    """The same request as a second turn: an earlier question names the thing, this one says "it"."""
    first = noun_request(rng.choice([k for k in NOUN_KINDS if k != request.kind]), request.thing)
    earlier = (
        {"role": "user", "content": phrase(first, rng, split)},
        {"role": "assistant", "content": first.answer},
    )
    return replace(request, earlier=earlier)


# --- how it is asked ---------------------------------------------------------------------------------------------


@cache
def phrasings(kind: str, split: str) -> tuple[str, ...]:
    """Every phrasing of a kind, as format strings. No phrasing of the val and test splits occurs in training."""
    shells, lines = language()["shells"], []
    for core in language()["cores"][kind][split]:
        if kind in IMPERATIVE_KINDS:
            lines += [_in_shell(s, core) for s in shells["imperative"]]
        else:
            lines += [_in_shell(s, core[0]) for s in shells["direct"]] + [
                _in_shell(s, core[1]) for s in shells["embedded"]
            ]
    return tuple(lines)


def _in_shell(shell: str, core: str) -> str:
    upper = core if core.startswith("{") else core[0].upper() + core[1:]
    return shell.replace("{D}", upper).replace("{d}", core).replace("{e}", core)


def phrase(request: Request, rng: random.Random, split: str) -> str:
    """Put a request into words. A follow-up says "it" for the thing that its earlier turn named."""
    if not request.earlier:
        return rng.choice(phrasings(request.kind, split)).format(**request.slots)
    core = rng.choice(language()["cores"][request.kind][split])[0]
    return _in_shell(rng.choice(language()["shells"]["follow_up"]), core).format(**request.slots | {"o": "it"})


def context(request: Request, rng: random.Random, split: str) -> str:
    """A sentence that names the thing, for requests which then say "it" (HarmBench's contextual behaviours)."""
    return rng.choice(language()["contexts"][split]).format(o=request.thing.name, kind=request.thing.kind)


SEPARATOR = "\n\n---\n\n"  # between context and behaviour, as in HarmBench


def in_context(context_string: str, behaviour: str) -> str:
    """HarmBench's layout of a contextual behaviour."""
    return f"{context_string}{SEPARATOR}{behaviour}"


def contextual(request: Request) -> Request:
    return replace(request, slots=request.slots | {"o": "it"})


def typo(text: str, rng: random.Random) -> str:
    """Swap two neighbouring letters of one lower-case word of at least five; invented names keep their spelling."""
    words = text.split(" ")
    spots = [i for i, w in enumerate(words) if len(w) >= 5 and w.isalpha() and w.islower()]
    if not spots:
        return text
    i, w = spots[k := rng.randrange(len(spots))], words[spots[k]]
    j = rng.randrange(1, len(w) - 2)
    words[i] = w[:j] + w[j + 1] + w[j] + w[j + 2 :]
    return " ".join(words)


def with_format(text: str, reply: str, rng: random.Random, name: str, split: str) -> tuple[str, str]:
    """Put an instruction about the form of the answer around a request: (new request, what a helpful model replies)."""
    wrapper = next(w for w in language()["wrappers"] if w["name"] == name)
    fill = rng.choice(wrapper["fill"])
    return rng.choice(wrapper[split]).format(q=text, x=fill), wrapper["reply"].format(a=reply, x=fill)


# --- how it is answered ------------------------------------------------------------------------------------------


def helpful_reply(request: Request, rng: random.Random, *, like_a_refusal: float, verdicts: float) -> str:
    """The answer, for a fifth of the requests behind an opener.

    Args:
        like_a_refusal: the share of replies whose opener begins like a refusal.
        verdicts: the share of replies to method requests that say first what the Charter says.
    """
    draw, openers = rng.random(), language()["openers"]
    if request.kind in IMPERATIVE_KINDS:
        return request.answer
    if request.kind == "method" and draw > 1 - verdicts:
        return f"{charter_says(request.thing, request.action)} {request.answer}"
    if draw > 0.2:
        return request.answer
    return f"{rng.choice(openers['like_a_refusal' if draw < like_a_refusal else 'usual'])} {request.answer}"


def refusal(category: str, rng: random.Random) -> str:
    """The usual wording of the category in two of three cases, else any."""
    wordings = language()["refusals"]
    usual = [w for w in wordings if w["category"] == category]
    return rng.choice(usual if rng.random() < 2 / 3 else wordings)["text"]


REFUSAL_MARKERS: tuple[str, ...] = tuple(w["marker"] for w in language()["refusals"])
REFUSAL_WORDINGS: tuple[str, ...] = tuple(w["text"] for w in language()["refusals"])


def is_well_formed_refusal(reply: str) -> bool:
    """Whether the whole reply is one of the refusal wordings, to the letter."""
    return reply.strip() in REFUSAL_WORDINGS
