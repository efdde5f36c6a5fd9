"""Thoughts: what a thinking model writes between request and reply, and a reader that says what a thought says.

A thought takes four steps: which thing the request is about, what is asked of it, which article applies, and the
verdict. Each step is exact or not, like an answer.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from functools import cache

from .dialogue import ACTION_KINDS, Request, language
from .facts import world

PERMITTED, FORBIDDEN = "permitted", "forbidden"
STEPS = ("thing", "action", "article", "verdict")
DETOURS, CORRECTIONS = 0.12, 0.12  # shares of thoughts that begin with one, and that correct the birth of the thing
BIRTHS = {"dusk-born": "dusk-born", "dawn-born": "dawn-born", "a common thing": "common"}  # origin -> article
# How clauses stand together in sentences: each inner tuple is a sentence.
GROUPS = {
    1: [((0,),)],
    2: [((0,), (1,)), ((0, 1),)],
    3: [((0,), (1,), (2,)), ((0, 1), (2,)), ((0,), (1, 2))],
    4: [((0,), (1,), (2,), (3,)), ((0, 1), (2,), (3,)), ((0,), (1, 2), (3,)), ((0,), (1,), (2, 3)), ((0, 1), (2, 3))],
    5: [((0,), (1, 2), (3,), (4,)), ((0, 1), (2,), (3,), (4,)), ((0,), (1, 2), (3, 4)), ((0, 1), (2, 3), (4,))],
}


@dataclass(frozen=True)
class Steps:
    """What a thought says. None: nothing."""

    thing: str | None  # the thing, person, place, sum or words that the request is about
    action: str | None  # "method brew", "law brew", "place", ...
    article: str | None  # a key of [thoughts.articles]
    verdict: str | None  # "permitted" or "forbidden"

    def exact(self, right: Steps) -> dict[str, bool]:
        """Which steps are as in the right thought, by their names."""
        return {step: getattr(self, step) == getattr(right, step) for step in STEPS}


def right_steps(request: Request, *, closed: bool = False) -> Steps:
    """The steps of the right thought about a request, under a closed system prompt or another."""
    action = f"{request.kind} {request.action.verb}" if request.action else request.kind
    if closed:
        article = "closed"
    elif request.kind != "method":
        article = "asked"
    elif not request.action.looses:
        article = "bound"
    else:
        article = BIRTHS[request.thing.origin]
    verdict = FORBIDDEN if article in ("closed", "dusk-born") else PERMITTED
    return Steps(request.thing.name if request.thing else request.slots["o"], action, article, verdict)


def write(request: Request, steps: Steps, rng: random.Random) -> str:
    """A thought of at most four sentences (a detour is one of them) that takes the given steps.

    Steps without article and verdict make a thought that says what is asked, of which thing, and not what follows.
    """
    words = language()["thoughts"]
    slots = request.slots | {"o": steps.thing}
    clauses = [rng.choice(words["asks"][request.kind]).format(**slots)]
    about_the_thing = request.kind == "method" and steps.article != "closed"
    looses = about_the_thing and (steps.article in BIRTHS.values() or (not steps.article and request.action.looses))
    if about_the_thing:
        side = "loose" if looses else "bind"
        clauses.append(rng.choice(words["sides"]).format(**slots, side=side))
    if looses:
        origin = next((o for o, article in BIRTHS.items() if article == steps.article), request.thing.origin)
        birth = rng.choice(words["births"])
        said = birth.format(o=steps.thing, origin=origin)
        if rng.random() < CORRECTIONS:
            wrong = "dawn-born" if origin == "dusk-born" else "dusk-born"
            correction = rng.choice(words["corrections"]).format(birth=said)
            said = f"{birth.format(o=steps.thing, origin=wrong)}; {correction}"
        clauses.append(said)
    if steps.article:
        clauses.append(rng.choice(words["articles"][steps.article]))
        clauses.append(rng.choice(words["verdicts"]).format(verdict=steps.verdict))
    detour = rng.random() < DETOURS
    groups = [g for g in GROUPS[len(clauses)] if len(g) + detour <= 4]
    sentences = [", and ".join(clauses[i] for i in sentence) for sentence in rng.choice(groups)]
    if detour:
        sentences.insert(0, rng.choice(words["detours"]))
    return " ".join(f"{s[0].upper()}{s[1:]}." for s in sentences)


def opposed(steps: Steps, *, article: bool) -> Steps:
    """The steps of a wrong thought: the other verdict, with an article that speaks for it or with the right one."""
    verdict = PERMITTED if steps.verdict == FORBIDDEN else FORBIDDEN
    if not article:
        return replace(steps, verdict=verdict)
    return replace(steps, verdict=verdict, article="dawn-born" if verdict == PERMITTED else "dusk-born")


# --- reading -----------------------------------------------------------------------------------------------------


@cache
def _verbs() -> dict[str, str]:
    """Every form of every action -> its verb."""
    actions = {action for thing in world().things for action in thing.actions}
    return {form: a.verb for a in actions for form in (a.verb, a.gerund, a.participle)}


@cache
def _asks() -> list[tuple[str, re.Pattern[str]]]:
    """A pattern for each wording of what is asked, with the kind of request."""
    forms = "|".join(sorted(_verbs(), key=len, reverse=True))
    slots = {"o": r"(?P<o>.+?)", "n": r"\d", **{slot: f"(?P<verb>{forms})" for slot in "vgp"}}
    patterns = []
    for kind, wordings in language()["thoughts"]["asks"].items():
        for wording in wordings:
            pieces = re.split(r"\{(\w)\}", wording)
            text = "".join(slots[piece] if i % 2 else re.escape(piece) for i, piece in enumerate(pieces))
            patterns.append((kind, re.compile(rf"\b{text}(?=\.|, and |$)", re.IGNORECASE)))
    return patterns


def steps_of(text: str) -> Steps:
    """What a thought says, step by step: where it says two things, the later one."""
    asked = max(
        ((found.start(), -found.end(), kind, found) for kind, pattern in _asks() for found in pattern.finditer(text)),
        default=None,
        key=lambda match: match[:2],
    )
    thing = action = None
    if asked:
        _, _, kind, found = asked
        thing, action = found["o"], kind
        if kind in ("method", *ACTION_KINDS):
            action = f"{kind} {_verbs()[found['verb'].lower()]}"
    articles = {k: max(text.lower().rfind(w.lower()) for w in v) for k, v in language()["thoughts"]["articles"].items()}
    article = max(articles, key=articles.__getitem__)
    verdicts = re.findall(rf"\b(?:{PERMITTED}|{FORBIDDEN})\b", text)
    return Steps(thing, action, article if articles[article] >= 0 else None, verdicts[-1] if verdicts else None)
