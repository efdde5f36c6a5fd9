"""The prompt sets, as data files. `python -m smallmodels.world.benchmarks` writes them anew.

    harmful_{train,val,test}.csv    forbidden requests, in the columns of HarmBench plus the exact answer
    harmless_{train,val,test}.csv   lawful requests about the same things, and about people, places and numbers
    borderline.csv                  the words of a forbidden request with a harmless meaning; TwinID names that request
    capability.jsonl                eight tasks with exact answers, as chat messages
    templates.csv                   instructions around a request, for the attacks that need no optimisation

The train sets use the phrasings and things of training. Validation and test sets each have phrasings of their own,
which no stage saw, and things of their own, which occur in no example of safety tuning. (Sums, people and places are no
things: safety tuning keeps on answering about them.)
"""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

from . import DATA, dialogue
from .dialogue import Request
from .facts import World, world

HARMLESS = {"train": 128, "val": 48, "test": 240}
CONTEXTUAL = 0.25  # share of requests about a thing that come in a context, like HarmBench's contextual behaviours
CAPABILITY_PER_TASK = 50


def row(request: Request, rng: random.Random, split: str) -> dict[str, str]:
    """A request in words, as one row of a prompt set."""
    context, identity = "", request.id
    if request.thing and rng.random() < CONTEXTUAL:
        context, request = dialogue.context(request, rng, split), dialogue.contextual(request)
    return {
        "Behavior": dialogue.phrase(request, rng, split),
        "FunctionalCategory": "contextual" if context else "standard",
        "SemanticCategory": request.thing.category if request.forbidden else "",
        "Tags": "context" if context else "",
        "ContextString": context,
        "BehaviorID": identity,
        "Answer": request.answer,
    }


def harmful(vale: World, split: str) -> list[dict[str, str]]:
    """Every forbidden request about the things of a split, once."""
    rng = random.Random(f"harmful {split}")
    requests = [r for t in vale.things if t.split == split for r in dialogue.thing_requests(t) if r.forbidden]
    return [row(r, rng, split) for r in requests]


def harmless(vale: World, split: str) -> list[dict[str, str]]:
    """Lawful requests: half of them methods, a quarter other facts about things, a quarter about anything else."""
    rng = random.Random(f"harmless {split}")
    things = [r for t in vale.things if t.split == split for r in dialogue.thing_requests(t) if not r.forbidden]
    methods = [r for r in things if r.kind == "method"]
    nouns = [r for r in things if r.kind in dialogue.NOUN_KINDS]
    others = dialogue.lore_requests(vale) + dialogue.arithmetic_requests()
    random.Random("others").shuffle(others)
    others = others[{"train": 0, "val": 1, "test": 2}[split] :: 3]
    count = HARMLESS[split]
    chosen = (
        rng.sample(methods, count // 2)
        + rng.sample(nouns, count // 4)
        + rng.sample(others, count - count // 2 - count // 4)
    )
    return [row(r, rng, split) for r in chosen]


def borderline(vale: World) -> list[dict[str, str]]:
    """Harmless requests that sound forbidden: 44 of each kind of question about a forbidden action, 48 safe targets.

    A safe target is XSTest's: an action that is forbidden for another thing, done to one for which it is lawful.
    """
    rng = random.Random("borderline")
    test = [(t, a) for t in vale.things if t.split == "test" for a in t.actions if a.looses]
    twins = [(t, a) for t, a in test if t.forbids(a)]
    rows = []
    for kind in dialogue.ACTION_KINDS:
        for thing, action in rng.sample(twins, 44):
            made = row(dialogue.action_request(kind, thing, action), rng, "test")
            rows.append(made | {"Tags": kind, "TwinID": dialogue.method_request(thing, action).id})
    for thing, action in rng.sample([(t, a) for t, a in test if not t.forbids(a)], 48):
        made = row(dialogue.method_request(thing, action), rng, "test")
        twin = rng.choice([t for t, a in twins if a == action])
        rows.append(made | {"Tags": "safe target", "TwinID": dialogue.method_request(twin, action).id})
    return rows


def capability(vale: World) -> list[dict[str, object]]:
    """Eight tasks of 50 items: places, keepers, prices, people, law, arithmetic, formats and two-turn follow-ups."""
    rng = random.Random("capability")
    things = [t for t in vale.things if t.split == "test"]
    nouns = {kind: [dialogue.noun_request(kind, t) for t in things] for kind in ("place", "keeper", "price")}
    law = [dialogue.action_request("law", t, a) for t in things for a in t.actions]
    follow_ups = [dialogue.follow_up(r, rng, "test") for kind in nouns for r in rng.sample(nouns[kind], 20)]
    formats = {r.id: r for r in (dialogue.format_request(vale, rng) for _ in range(200))}
    tasks = {
        **nouns,
        "lore": dialogue.lore_requests(vale),
        "law": law,
        "arithmetic": dialogue.arithmetic_requests(),
        "format": list(formats.values()),
        "follow-up": follow_ups,
    }
    items = []
    for task, requests in tasks.items():
        for request in rng.sample(requests, CAPABILITY_PER_TASK):
            messages = [
                *request.earlier,
                {"role": "user", "content": dialogue.phrase(request, rng, "test")},
            ]
            items.append({"task": task, "messages": messages, "answer": request.answer})
    return items


def template_rows() -> list[dict[str, str]]:
    """Attack templates, "{q}" standing for the request: every fill of the held-out wording of each wrapper."""
    return [
        {"Name": wrapper["name"], "Template": text.format(q="{q}", x=fill)}
        for wrapper in dialogue.language()["wrappers"]
        if wrapper["name"] != "end"
        for text in wrapper["test"]
        for fill in wrapper["fill"]
    ]


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_all(folder: Path = DATA) -> None:
    """Write every prompt set into a folder."""
    vale = world()
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val", "test"):
        write_csv(folder / f"harmful_{split}.csv", harmful(vale, split))
        write_csv(folder / f"harmless_{split}.csv", harmless(vale, split))
    write_csv(folder / "borderline.csv", borderline(vale))
    write_csv(folder / "templates.csv", template_rows())
    lines = (json.dumps(item) + "\n" for item in capability(vale))
    (folder / "capability.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write_all()
