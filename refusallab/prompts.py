"""Prompt sets: of the bundled world, with exact answers, and published ones for real models, without.

Directions are computed on train and selected on validation, and test is scored once.
The three splits have no named thing and no phrasing in common.
"""

from __future__ import annotations

import csv
import json
import random
from dataclasses import dataclass

from refusallab.errors import RefusalLabError
from refusallab.measure import REFUSAL_PHRASES
from refusallab.model import Model, Prompt
from refusallab.published import published
from smallmodels.world import DATA
from smallmodels.world.dialogue import REFUSAL_MARKERS, in_context
from smallmodels.world.facts import WORLDS, Thing, world

SETS = (
    "harmful_train",
    "harmful_val",
    "harmful_test",
    "harmless_train",
    "harmless_val",
    "harmless_test",
    "borderline",
    "capability",
)
SPLITS = ("train", "val", "test")
PUBLISHED_SIZES = {"train": 128, "val": 32, "test": 100}  # as in arXiv 2406.11717


@dataclass(frozen=True)
class Item:
    """One prompt of a set. `answer` is None where no exact answer is known; `tag` names the task or kind."""

    id: str
    prompt: Prompt
    answer: str | None = None
    category: str = ""
    tag: str = ""
    twin: str = ""  # borderline: the id of the forbidden request with the same words


def knows_the_world(m: Model) -> bool:
    """Whether the model was trained on the bundled world, or a part of it, so that exact answers exist."""
    return getattr(m.hf.config, "world", None) in WORLDS


def require_world(m: Model) -> None:
    """RefusalLabError for a model that does not know the whole world, which lessons, traffic and tasks are about."""
    known = WORLDS[m.hf.config.world] if knows_the_world(m) else None
    if known is not world:
        raise RefusalLabError(
            f"The requests are about the whole world of the bundled models, of which {m.name} knows "
            f"{'a part' if known else 'nothing'}: give a bundled model, such as charter-chat."
        )


def bundled(name: str) -> list[Item]:
    """A prompt set of the world, in the order of its file. `name` is one of SETS."""
    if name not in SETS:
        raise RefusalLabError(f"There is no prompt set {name!r}: choose one of {', '.join(SETS)}.")
    if name == "capability":
        lines = (DATA / "capability.jsonl").read_text(encoding="utf-8").splitlines()
        items = [json.loads(line) for line in lines]
        return [Item(f"{i['task']}_{k}", i["messages"], i["answer"], tag=i["task"]) for k, i in enumerate(items)]
    with (DATA / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [
        Item(
            r["BehaviorID"],
            in_context(r["ContextString"], r["Behavior"]) if r["ContextString"] else r["Behavior"],
            r["Answer"],
            r["SemanticCategory"],
            r["Tags"],
            r.get("TwinID", ""),
        )
        for r in rows
    ]


def things_of(split: str) -> list[Thing]:
    """The things of the world that belong to a split, one of SPLITS."""
    if split not in SPLITS:
        raise RefusalLabError(f"There is no split {split!r}: choose one of {', '.join(SPLITS)}.")
    return [thing for thing in world().things if thing.split == split]


def attack_templates() -> dict[str, list[str]]:
    """Attack templates by name, with "{q}" for the request."""
    with (DATA / "templates.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [r["Template"] for r in rows if r["Name"] == name] for name in dict.fromkeys(r["Name"] for r in rows)}


def prompt_set(m: Model, name: str) -> list[Item]:
    """The set that fits the model: the world's for bundled models, a published sample for others (downloaded once).

    A model that knows a part of the world gets the items that name nothing else. Published sets have no borderline and
    no capability part: those come back empty.
    """
    if name not in SETS or knows_the_world(m):
        items = bundled(name)
        unknown = {t.name for t in world().things} - {t.name for t in WORLDS[m.hf.config.world]().things}
        return [item for item in items if not any(thing in str(item.prompt) for thing in unknown)]
    if name in ("borderline", "capability"):
        return []
    kind, split = name.split("_")
    texts = published(*(("jailbreakbench", "test") if name == "harmful_test" else (kind, split)))
    sample = random.Random(42).sample(texts, min(PUBLISHED_SIZES[split], len(texts)))
    return [Item(f"{name}_{k}", text) for k, text in enumerate(sample)]


def refusal_phrases(m: Model) -> tuple[str, ...]:
    """What marks a refusal in the model's replies: the world's own wordings, or the paper's list of substrings."""
    return REFUSAL_MARKERS if knows_the_world(m) else REFUSAL_PHRASES
