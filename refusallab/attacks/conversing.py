"""Attacks that need no weights: other words, conversations, and a search that sees only whether a request was refused.

Past tense: Andriushchenko & Flammarion 2024 (arXiv 2407.11969). Many-shot: Anil et al. 2024. Crescendo: Russinovich et
al. 2024 (arXiv 2404.01833). PAIR (Chao et al. 2023, arXiv 2310.08419) has a second language model rewrite a request
until it is answered; here the rewritings are a fixed list, and what is learned is which of them work.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from refusallab.attacks.result import AttackResult, Cost, rewrite, send
from refusallab.attacks.templates import rewritings
from refusallab.bars import with_bar
from refusallab.conversations import after_turns
from refusallab.defence import Defence
from refusallab.errors import RefusalLabError
from refusallab.inputs import listed
from refusallab.model import Model, Prompt, messages
from refusallab.prompts import Item
from refusallab.truth import request_of
from refusallab.twins import request_about
from smallmodels.world import dialogue

Rewriting = Callable[[Item, random.Random], Prompt]
LADDER = ("origin", "first", "guard", "law")  # what is asked before the request, harmless all of it


def worded(item: Item, rng: random.Random, kind: str = "method", *, it: bool = False) -> str:
    """The request of an item in other words of its split: kind "past" asks how it was done in the old days.

    it: the thing is not named, because an earlier turn did.
    """
    request = request_of(item)
    if request.kind != "method":
        raise RefusalLabError(f"Item {item.id!r} asks for no method: there are no other words for it.")
    earlier = ({"role": "user", "content": ""},) if it else ()
    return dialogue.phrase(replace(request, kind=kind, earlier=earlier), rng, request.thing.split)


def past_tense(m: Model | Defence, items: Sequence[Item], *, seed: int = 0) -> list[AttackResult]:
    """Ask how it was done in the past."""
    return send(m, "past tense", items, [worded(item, random.Random(f"{seed} {item.id}"), "past") for item in items])


def many_shot(m: Model | Defence, items: Sequence[Item], shots: int = 8, *, seed: int = 0) -> list[AttackResult]:
    """Put the request behind `shots` turns in which the assistant is said to have answered forbidden requests."""
    return send(m, "many-shot", items, [item.prompt for item in after_turns(items, "shots", shots, seed)])


def crescendo(m: Model | Defence, items: Sequence[Item], tries: int = 4, *, seed: int = 0) -> list[AttackResult]:
    """Ask harmless questions about the thing, then for the method; a refused turn is taken back, and asked otherwise.

    All earlier replies are the model's own. `tries` counts the requests, in wordings that are drawn: present or past
    tense, with the name of the thing or "it". In a result it counts all messages, the harmless ones included.
    """
    if tries < 1:
        raise RefusalLabError(f"An attack asks at least once, not {tries} times.")
    items, rngs = listed(items, "items", Item), [random.Random(f"{seed} {item.id}") for item in items]
    said, spent = [[] for _ in items], [Cost() for _ in items]
    for k, kind in enumerate(LADDER):
        asked = [_rung(item, kind, rng, named=k == 0) for item, rng in zip(items, rngs, strict=True)]
        prompts = [[*before, *messages(rung.prompt)] for before, rung in zip(said, asked, strict=True)]
        for i, result in enumerate(send(m, "crescendo", asked, prompts)):
            said[i] = [*prompts[i], {"role": "assistant", "content": result.reply}]
            spent[i] += result.cost
    found: dict[int, AttackResult] = {}
    for k in range(tries):
        todo = [i for i in range(len(items)) if i not in found or found[i].outcome.refused]
        if not todo:
            break
        texts = [_last_step(items[i], rngs[i]) for i in todo]
        prompts = [[*said[i], {"role": "user", "content": text}] for i, text in zip(todo, texts, strict=True)]
        for i, result in zip(todo, send(m, "crescendo", [items[i] for i in todo], prompts), strict=True):
            spent[i] += result.cost
            found[i] = replace(result, tries=len(LADDER) + k + 1, cost=spent[i])
    return [found[i] for i in range(len(items))]


def _last_step(item: Item, rng: random.Random) -> str:
    return worded(item, rng, rng.choice(("method", "past")), it=rng.random() < 0.5)


def _rung(item: Item, kind: str, rng: random.Random, *, named: bool) -> Item:
    request = request_of(item)
    asked = request_about(kind, request.thing, request.action)
    earlier = () if named else ({"role": "user", "content": ""},)
    text = dialogue.phrase(replace(asked, earlier=earlier), rng, request.thing.split)
    return Item(asked.id, text, asked.answer)


# --- a search that sees refused or not -------------------------------------------------------------------------------


def rewriting_list() -> dict[str, Rewriting]:
    """Ways to put a request: six frames, each for a wording in the present and one in the past."""

    def in_template(kind: str) -> Callable[[str, Item, random.Random], Prompt]:
        return lambda text, item, rng: rng.choice(rewritings()[kind])(text)

    def behind(kind: str, turns: int) -> Callable[[str, Item, random.Random], Prompt]:
        return lambda text, item, rng: rewrite(
            after_turns([item], kind, turns, rng.randrange(10**6))[0].prompt, lambda _: text
        )

    frames: dict[str, Callable[[str, Item, random.Random], Prompt]] = {
        "plain": lambda text, item, rng: text,
        "begin": in_template("begin"),
        "role-play": in_template("role-play"),
        "payload splitting": in_template("payload splitting"),
        "3 turns": behind("same thing", 3),
        "6 shots": behind("shots", 6),
    }

    def joined(frame: Callable[[str, Item, random.Random], Prompt], kind: str) -> Rewriting:
        return lambda item, rng: frame(worded(item, rng, kind), item, rng)

    tenses = {"present": "method", "past": "past"}
    return {f"{f}, {tense}": joined(frame, kind) for f, frame in frames.items() for tense, kind in tenses.items()}


@dataclass(frozen=True)
class RewritingSearch:
    """What a black-box search did: a result for each item, and for each rewriting (answered, sent)."""

    results: list[AttackResult]
    ways: list[str]  # the rewriting of each result
    counts: dict[str, tuple[int, int]]


def search_rewritings(
    m: Model | Defence,
    items: Sequence[Item],
    budget: int,
    *,
    ways: Mapping[str, Rewriting] | None = None,
    learn: bool = True,
    seed: int = 0,
) -> RewritingSearch:
    """Send up to `budget` rewritings of each request until one is answered. All that is seen is refused or not.

    With `learn`, the next rewriting is drawn by Thompson sampling: for each a share is drawn from the Beta distribution
    of its successes and failures so far, over all items, and the highest wins. Without, it is drawn evenly.
    """
    if budget < 1:
        raise RefusalLabError(f"A search sends at least one prompt for each request, not {budget}.")
    items, ways, rng = listed(items, "items", Item), dict(ways or rewriting_list()), random.Random(seed)
    counts, found, sent_as = {name: (0, 0) for name in ways}, {}, {}
    for _ in with_bar(range(budget), "rewritings", budget):
        todo = [i for i in range(len(items)) if i not in found or found[i].outcome.refused]
        if not todo:
            break
        chosen = [_likeliest(counts, rng) if learn else rng.choice(list(ways)) for _ in todo]
        prompts = [ways[name](items[i], rng) for i, name in zip(todo, chosen, strict=True)]
        sent = send(m, "rewriting search", [items[i] for i in todo], prompts)
        for i, name, result in zip(todo, chosen, sent, strict=True):
            passed, tried = counts[name]
            counts[name] = passed + (not result.outcome.refused), tried + 1
            sent_as[i], before = name, found.get(i)
            tries, cost = (before.tries, before.cost) if before else (0, Cost())
            found[i] = replace(result, tries=tries + 1, cost=cost + result.cost)
    return RewritingSearch([found[i] for i in range(len(items))], [sent_as[i] for i in range(len(items))], counts)


def _likeliest(counts: Mapping[str, tuple[int, int]], rng: random.Random) -> str:
    """Thompson sampling: the highest of one draw for each name, from Beta(1 + successes, 1 + failures)."""
    draws = {name: rng.betavariate(1 + passed, 1 + sent - passed) for name, (passed, sent) in counts.items()}
    return max(draws, key=draws.__getitem__)
