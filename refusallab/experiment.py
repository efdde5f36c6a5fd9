"""The headline experiment: one direction mediates refusal, measured on the test set beside its controls."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import joblib
import nnsight
import pooch
import torch
import transformers

from refusallab.directions import Search, random_directions, save_candidates, search_candidates
from refusallab.interventions import ablation, addition
from refusallab.judging import judge_test_sets, mean_rate, rates
from refusallab.measure import Outcome, Rate
from refusallab.model import Edit, Model, Prompt, digest_of_weights, encode
from refusallab.orthogonalization import distance_from_hooks, orthogonalize
from refusallab.prompts import knows_the_world, prompt_set, refusal_phrases
from refusallab.thoughts import behind, think

METRICS = {
    "harmful_refused": "harmful refused",
    "exact_forbidden": "exact forbidden answer",
    "harmless_answered": "harmless answered",
    "borderline_refused": "borderline refused",
    "capability": "capability",
}
RANDOM_DIRECTIONS = 5


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


def find_direction(m: Model, progress: Callable[[int], None] | None = None) -> Search:
    """`search_candidates` on the model's train and validation sets; of a model that thinks, behind its own thoughts.

    The result is kept in the cache of this computer, for these weights, prompts, phrases, code, versions and processor.
    So the labs search once, and each other search is new.
    """
    names = ("harmful_train", "harmless_train", "harmful_val", "harmless_val")
    sets: list[Sequence[Prompt]] = [[item.prompt for item in prompt_set(m, name)] for name in names]
    if m.thought_tokens:
        sets = [behind(m, prompts, think(m, prompts)) for prompts in sets]
    found: Search = kept(_search, m, sets, progress=progress)
    if progress:
        progress(len(found.candidates))  # all at once where the search was read
    return found


def kept(compute: Callable[..., Any], m: Model, sets: Sequence[Sequence[Prompt]], **settings: Any) -> Any:
    """`compute(key, m, sets, **settings)`, once for these weights, prompts, phrases, code, versions and processor.

    The value is kept in the cache of this computer. `key` stands for m and sets; a setting `progress` changes nothing.
    """
    with warnings.catch_warnings():  # a cache that cannot be read or written costs time only
        warnings.filterwarnings("ignore", module="joblib")
        try:
            memory = joblib.Memory(pooch.os_cache("refusallab"), verbose=0)
            ignored = ["m", "sets", *{"progress"} & set(settings)]
            compute = memory.cache(compute, ignore=ignored)
        except OSError:
            pass
        return compute(_circumstances(m, sets), m, sets, **settings)


def _search(key: object, m: Model, sets: Sequence[Sequence[Prompt]], progress: Callable[[int], None] | None) -> Search:
    return search_candidates(m, *sets, progress=progress)


def _circumstances(m: Model, sets: Sequence[Sequence[Prompt]]) -> tuple[Any, ...]:
    """All that the numbers of a search depend on, to the last digit."""
    ids = [joblib.hash(encode(m, prompts)["input_ids"].cpu().numpy()) for prompts in sets]
    versions = (torch.__version__, transformers.__version__, nnsight.__version__, _code())
    processor = (str(m.device), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())
    return (m.name, m.commit, m.remote, digest_of_weights(m), refusal_phrases(m), *ids, *versions, *processor)


@cache
def _code() -> str:
    """A hash of the library's code."""
    folder = Path(__file__).parent
    return joblib.hash({str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.py")})


def headline(m: Model, progress: Callable[[str], None] = lambda step: None, scores: Path | None = None) -> Headline:
    """Select the direction on validation, then measure every condition on the test sets, once.

    `progress(step)` is called at each of the `n_steps(m)` steps. The scores of all candidates are written to the file
    `scores` before any is selected, so you have them even when none passes the filters.
    """
    start = time.perf_counter()
    done = 0

    def count(n: int) -> None:
        nonlocal done
        for _ in range(n - done):
            progress("scoring candidate directions")
        done = n

    found = find_direction(m, count)
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
