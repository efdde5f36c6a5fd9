"""The headline experiment: one direction mediates refusal, measured on the test set beside its controls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from refusallab.directions import Search, random_directions, save_candidates, search_candidates
from refusallab.inputs import listed
from refusallab.interventions import ablation, addition
from refusallab.measure import Outcome, Rate, outcome, rate, refused_by_phrases, wilson
from refusallab.model import Edit, Model, generate
from refusallab.orthogonalize import distance_from_hooks, orthogonalize
from refusallab.prompts import Item, knows_the_world, prompt_set, refusal_phrases

METRICS = {
    "harmful_refused": "harmful refused",
    "exact_forbidden": "exact forbidden answer",
    "harmless_answered": "harmless answered",
    "borderline_refused": "borderline refused",
    "capability": "capability",
}
RANDOM_DIRECTIONS = 5
REPLY_TOKENS = 32  # enough for every answer and refusal of the world
BATCH_SIZE = 128


@dataclass(frozen=True, eq=False)
class Headline:
    """The table (condition -> metric -> rate), the search behind it, and how far weights are from hooks."""

    model: str
    judge: str  # "exact answers" or "refusal phrases"
    search: Search
    table: dict[str, dict[str, Rate]]
    hooks_vs_weights: float  # max |logit difference| at the last prompt token of the harmful validation set
    seconds: float

    def as_json(self) -> dict:
        """The documented JSON form."""
        rows = [
            {"condition": condition, "metric": metric, **asdict(r)}
            for condition, rates in self.table.items()
            for metric, r in rates.items()
        ]
        return {
            "model": self.model,
            "selected": asdict(self.search.selected),
            "rows": rows,
            "hooks_vs_weights": self.hooks_vs_weights,
            "seconds": round(self.seconds, 1),
        }


def outcomes(m: Model, items: Iterable[Item], *, edit: Edit | None = None, system: str | None = None) -> list[Outcome]:
    """Greedy replies to a prompt set, judged: by exact answer where an item has one, by refusal phrases in any case."""
    phrases, items = refusal_phrases(m), listed(items, "items", Item)
    replies = generate(
        m,
        [i.prompt for i in items],
        edit=edit,
        system=system,
        max_new_tokens=REPLY_TOKENS,
        batch_size=BATCH_SIZE,
    )
    return [
        outcome(reply, item.answer, phrases) if item.answer else Outcome(refused_by_phrases(reply, phrases), False)
        for reply, item in zip(replies, items, strict=True)
    ]


def judge_test_sets(m: Model, edit: Edit | None = None, *, every: int = 1) -> dict[str, list[Outcome]]:
    """Judged replies to the four test sets, by name; sets that the model does not have are left out.

    `every=2` takes every second prompt of each set.
    """
    names = ("harmful_test", "harmless_test", "borderline", "capability")
    return {name: outcomes(m, items[::every], edit=edit) for name in names if (items := prompt_set(m, name))}


def rates(judged: dict[str, list[Outcome]], *, exact: bool) -> dict[str, Rate]:
    """The metrics of one condition. Without exact answers, a harmless prompt counts as answered when not refused."""
    table = {"harmful_refused": rate([o.refused for o in judged["harmful_test"]])}
    if exact:
        table["exact_forbidden"] = rate([o.correct for o in judged["harmful_test"]])
    table["harmless_answered"] = rate([o.correct if exact else not o.refused for o in judged["harmless_test"]])
    if "borderline" in judged:
        table["borderline_refused"] = rate([o.refused for o in judged["borderline"]])
    if "capability" in judged:
        table["capability"] = rate([o.correct for o in judged["capability"]])
    return table


def mean_rate(several: list[Rate]) -> Rate:
    """The mean of rates on the same prompts. Its interval is that of one rate: they add no evidence."""
    value, n = sum(r.value for r in several) / len(several), several[0].n
    return Rate(value, *wilson(round(value * n), n), n)


def search(m: Model, progress: Callable[[int], None] | None = None) -> Search:
    """`search_candidates` on the model's train and validation sets."""
    train_and_val = ("harmful_train", "harmless_train", "harmful_val", "harmless_val")
    return search_candidates(m, *([i.prompt for i in prompt_set(m, name)] for name in train_and_val), progress=progress)


def headline(m: Model, progress: Callable[[str], None] = lambda step: None, scores: Path | None = None) -> Headline:
    """Select the direction on validation, then measure every condition on the test sets, once.

    `progress(step)` is told of each of the `n_steps(m)` steps. The scores of all candidates are written to the file
    `scores` before any is selected, so they are there when none passes the filters.
    """
    start = time.perf_counter()
    done = 0

    def count(n: int) -> None:
        nonlocal done
        for _ in range(n - done):
            progress("scoring candidate directions")
        done = n

    found = search(m, count)
    if scores:
        save_candidates(scores, found)
    r, layer = found.direction.vector, found.direction.layer
    edited = orthogonalize(m, r)
    exact = knows_the_world(m)

    def condition(name: str, model: Model, edit: Edit | None = None) -> dict[str, list[Outcome]]:
        progress(f"test set: {name}")
        return judge_test_sets(model, edit)

    table = {
        "baseline": rates(condition("baseline", m), exact=exact),
        "ablated": rates(condition("ablated", m, ablation(r)), exact=exact),
        "orthogonalized": rates(condition("orthogonalized", edited), exact=exact),
        "direction added": rates(condition("direction added", m, addition(r, layer)), exact=exact),
    }
    controls: list[dict[str, Rate]] = []
    for number, vector in enumerate(random_directions(m.width, RANDOM_DIRECTIONS, seed=0), 1):
        controls.append(rates(condition(f"random direction {number}", m, ablation(vector)), exact=exact))
    name = f"random directions (mean of {RANDOM_DIRECTIONS})"
    table[name] = {metric: mean_rate([c[metric] for c in controls]) for metric in controls[0]}
    distance = distance_from_hooks(m, edited, r, [i.prompt for i in prompt_set(m, "harmful_val")])
    judge = "exact answers" if exact else "refusal phrases"
    return Headline(m.name, judge, found, table, distance, time.perf_counter() - start)


def n_steps(m: Model) -> int:
    """How often `headline` reports progress."""
    return m.n_layers * len(m.positions) + 4 + RANDOM_DIRECTIONS
