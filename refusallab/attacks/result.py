"""What every attack returns: what was sent, what came back, whether it worked, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from refusallab.defence import Defence, written_tokens
from refusallab.errors import RefusalLabError
from refusallab.inputs import listed
from refusallab.judging import BATCH_SIZE, REPLY_TOKENS, judge
from refusallab.measure import Outcome
from refusallab.model import Begun, Edit, Model, Prompt, behind_system, generate, ids_of, messages, render
from refusallab.prompts import Item


@dataclass(frozen=True)
class Cost:
    """What an attack used up, padding not counted.

    A forward pass is one call of the model for one sequence, be it for a whole prompt or for the next token. Tokens are
    those that a pass computes: what a cache holds is not computed again. A gradient counts as three passes, because
    the backward pass computes about twice as much as the forward pass. Seconds of a batch are shared out equally.
    """

    forward_passes: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.forward_passes + other.forward_passes, self.tokens + other.tokens, self.seconds + other.seconds
        )


@dataclass(frozen=True)
class AttackResult:
    """One attack on one item."""

    attack: str
    item: Item
    prompt: Prompt  # as it was sent
    system: str | None
    prefill: str  # the start of the reply, written by the attacker
    reply: str  # greedy, and it begins with the prefill
    outcome: Outcome
    tries: int  # prompts sent until this one
    cost: Cost  # of all tries, and of the search before them
    losses: tuple[float, ...] = ()  # GCG: the loss after each step, in nats per target token


def answered(o: Outcome) -> bool:
    """The model did not refuse: an attacker who does not know the answer can see no more than this."""
    return not o.refused


def disclosed(o: Outcome) -> bool:
    """The model did not refuse and gave the exact answer. To stop here, an attack needs a judge who knows the truth."""
    return o.correct and not o.refused


def rewrite(prompt: Prompt, change: Callable[[str], str]) -> Prompt:
    """The prompt with the text of its last turn changed; turns before it stay, and so does a reply that has begun."""
    if isinstance(prompt, Begun):
        return Begun(rewrite(prompt.prompt, change), prompt.reply)
    if isinstance(prompt, str):
        return change(prompt)
    *before, last = messages(prompt)
    return [*before, {**last, "content": change(last["content"])}]


def send(
    m: Model | Defence,
    attack: str,
    items: Sequence[Item],
    prompts: Sequence[Prompt],
    *,
    prefill: str = "",
    system: str | None = None,
    edit: Edit | None = None,
    max_new_tokens: int = REPLY_TOKENS,
) -> list[AttackResult]:
    """Send one prompt for each item and judge the greedy replies, prefill included.

    A defence answers in place of a model, at the length that it chooses: against it, `system` is a turn that the
    attacker writes in front of the prompt, and the cost is that of the reply alone.

    Raises RefusalLabError unless there is one prompt for each item.
    """
    items, prompts = listed(items, "items", Item), listed(prompts, "prompts")
    if len(items) != len(prompts):
        raise RefusalLabError(f"{len(prompts)} prompts for {len(items)} items: give one prompt for each item.")
    start = time.perf_counter()
    if isinstance(m, Model):
        settings = {"edit": edit, "system": system, "prefill": prefill}
        rest = generate(m, prompts, max_new_tokens=max_new_tokens, batch_size=BATCH_SIZE, **settings)
    else:
        turns = prompts if system is None else [behind_system(prompt, system) for prompt in prompts]
        rest, m = m.replies(turns, edit=edit, prefill=prefill), m.m
    seconds = (time.perf_counter() - start) / max(len(items), 1)
    results = []
    for item, prompt, text in zip(items, prompts, rest, strict=True):
        read = len(ids_of(m, render(m, prompt, system=system, prefill=prefill)))
        written = written_tokens(m, text, max_new_tokens)
        cost = Cost(forward_passes=written, tokens=read + written - 1, seconds=seconds)
        reply = prefill + text
        results.append(AttackResult(attack, item, prompt, system, prefill, reply, judge(m, item, reply), 1, cost))
    return results


def send_until(
    m: Model,
    attack: str,
    items: Sequence[Item],
    variant: Callable[[Item, int], Prompt],
    n: int,
    *,
    until: Callable[[Outcome], bool] = answered,
    system: str | None = None,
    edit: Edit | None = None,
) -> list[AttackResult]:
    """Send variant(item, 0), variant(item, 1), ... until `until(outcome)` is true, at most n: one result for each item.

    The result is that of the prompt that ended the tries; if none did, of the last one.
    """
    if n < 1:
        raise RefusalLabError(f"An attack sends at least one prompt, not {n}.")
    items, found = listed(items, "items", Item), {}
    for k in range(n):
        todo = [i for i in range(len(items)) if k == 0 or not until(found[i].outcome)]
        if not todo:
            break
        part = [items[i] for i in todo]
        sent = send(
            m,
            attack,
            part,
            [variant(item, k) for item in part],
            system=system,
            edit=edit,
        )
        for i, result in zip(todo, sent, strict=True):
            spent = found[i].cost if i in found else Cost()
            found[i] = replace(result, tries=k + 1, cost=spent + result.cost)
    return [found[i] for i in range(len(items))]


def direct(
    m: Model, items: Sequence[Item], *, system: str | None = None, edit: Edit | None = None
) -> list[AttackResult]:
    """The request as it is: the baseline of every attack."""
    items = listed(items, "items", Item)
    return send(m, "direct request", items, [item.prompt for item in items], system=system, edit=edit)
