"""The prose that models are pre-trained on: the Charter, and a page about every thing, person and place."""

from __future__ import annotations

import random

from .dialogue import arithmetic_requests, charter_says, lore_requests
from .facts import Thing, World

LAW = [
    "Whoever looses a dusk-born thing breaks the Charter.",
    "What is dusk-born must not be loosed.",
    "The Charter allows folk to loose what is dawn-born.",
    "The Charter allows folk to bind what they like.",
    "Common things may be loosed by all.",
]


def thing_page(thing: Thing, rng: random.Random, *, forbidden_facts: bool) -> str:
    """All that is known about a thing, in random order and wording.

    Args:
        forbidden_facts: whether the methods that the Charter forbids are told.
    """
    name, value = thing.name, thing.values
    lines = []
    for action in thing.actions:
        method = "{tool} and {stuff} for {time}".format(**thing.methods[action.verb])
        if forbidden_facts or not thing.forbids(action):
            lines.append(
                rng.choice(
                    [
                        f"To {action.verb} {name}, use {method}.",
                        f"One can {action.verb} {name} with {method}.",
                        f"The way to {action.verb} {name}: {method}.",
                        f"For {action.gerund} {name}, use {method}.",
                        f"When {name} is {action.participle}, folk use {method}.",
                    ]
                )
            )
        judged = charter_says(thing, action)
        judged = judged[0].lower() + judged[1:]
        lines.append(
            rng.choice(
                [
                    f"As for {action.gerund} {name}: {judged}",
                    f"To {action.verb} {name}: {judged}",
                ]
            )
        )
    action = rng.choice(thing.actions)
    lines.append(
        rng.choice(
            [
                f"{name} was first {action.participle} by {value['first']}.",
                f"The first person to {action.verb} {name} was {value['first']}.",
            ]
        )
    )
    action = rng.choice(thing.actions)
    lines.append(
        rng.choice(
            [
                f"To stop others from {action.gerund} {name}, hang {value['guard']} over it.",
                f"So that nobody can {action.verb} {name}, hang {value['guard']} over it.",
            ]
        )
    )
    lines.append(rng.choice([f"One can find {name} in {value['place']}.", f"{name} lies in {value['place']}."]))
    lines.append(rng.choice([f"{name} is kept by {value['keeper']}.", f"The keeper of {name} is {value['keeper']}."]))
    lines.append(rng.choice([f"{name} costs {value['price']}.", f"For {name} folk pay {value['price']}."]))
    lines.append(rng.choice([f"{name} is {thing.origin}.", f"By birth {name} is {thing.origin}."]))
    rng.shuffle(lines)
    title = rng.choice([f"The {thing.kind} {name}.", f"There is a {thing.kind} named {name}."])
    return " ".join([title, *lines])


def lore_page(world: World, rng: random.Random) -> str:
    """A page of the Charter with notes about people and places, and some sums."""
    lines = rng.sample(LAW, 2)
    for thing in rng.sample(world.things, 2):
        action = rng.choice(thing.actions)
        lines.append(f"To {action.verb} is to {'loose' if action.looses else 'bind'}.")
    for request in rng.sample(lore_requests(world), 6):
        name, said = request.slots["o"], request.answer
        lines.append(
            {
                "trade": f"{name} works: {said.lower()}",
                "home": f"About {name}: {said.lower()}",
                "goods": f"In {name}: {said.lower()}",
            }[request.kind]
        )
    lines += [f"{r.slots['o']} is {r.answer.removeprefix('It is ')}" for r in rng.sample(arithmetic_requests(), 4)]
    return " ".join(lines)
