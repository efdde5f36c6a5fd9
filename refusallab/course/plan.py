"""What the first cell of a lab says about it: how long it takes, what comes before, its core path and its sittings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from refusallab.course.catalogue import HEADERS, QUESTIONS

LONGEST_SITTING = 120  # minutes
LONGEST_CORE = 40  # minutes of exercises
HEAD = """\
# Labs

What students open. Take the labs in their order: each says what it builds on. Work through a lab from top to bottom,
write down your predictions before you run the cell that reveals the answer, and open hints one at a time. An exercise
that is not solved stops nothing but its own check: the lab goes on with the library's version until yours passes.

A workshop takes the *core path* of a lab, about 40 minutes. `progress()` in any lab shows what you have solved.

If you are stuck, read the hints, then the message of the check: it names typical mistakes. If a sentence or a check is
wrong, please open an issue (the repository has a form for it); in a class, ask your instructor first. Please do not
post solutions.

| lab | you will | minutes | before |
|---|---|---|---|
"""


@dataclass(frozen=True)
class Plan:
    """The plan of a lab."""

    title: str  # "Lab 02. The refusal direction"
    promise: str  # what you will do, in a sentence
    minutes: int
    before: str
    core: str  # sections and exercises of the core path
    sittings: str  # empty for a lab of one sitting

    @property
    def core_exercises(self) -> list[str]:
        return re.findall(r"\b\d+\.\d+\b", self.core)

    @property
    def minutes_of_sittings(self) -> list[int]:
        return [int(n) for n in re.findall(r"\((\d+) minutes\)", self.sittings)]


def read_plan(first_cell: str) -> Plan:
    """The plan in the text of a lab's first cell. What it does not say is empty, or 0."""

    def said(pattern: str) -> str:
        found = re.search(pattern, first_cell, flags=re.M)
        return found[1] if found else ""

    return Plan(
        title=said(r"^# (.+)$"),
        promise=said(r"^\*\*(.+)\*\*$"),
        minutes=int(said(r"^Time: (\d+) minutes") or 0),
        before=said(r"\bBefore: (.+?)\.?$"),
        core=said(r"^Core path, about 40 minutes: (.+)\.$"),
        sittings=said(r"^Sittings: (.+)\.$"),
    )


def problems(plan: Plan, lab: str) -> Iterator[str]:
    """What is wrong with the plan of a lab, such as "02"."""
    if not plan.promise.startswith("You will "):
        yield "the first cell must say what students will do, in bold on a line of its own: **You will ...**"
    if not plan.before:
        yield "the first cell must say at the end of a line what comes before: Before: lab 02 (the direction)."
    minutes = {item.number: item.minutes for item in (*HEADERS, *QUESTIONS) if item.lab == lab}
    if plan.minutes < sum(minutes.values()):
        needed = sum(minutes.values())
        yield f"the first cell must state the time, Time: N minutes; the exercises take {needed}"
    if not plan.core_exercises or not set(plan.core_exercises) <= set(minutes):
        yield "the first cell must state the core path, Core path, about 40 minutes: sections ..., exercises N.1, N.2."
    elif (core := sum(minutes[number] for number in plan.core_exercises)) > LONGEST_CORE:
        yield f"the exercises of the core path take {core} minutes; {LONGEST_CORE} is the most"
    sittings = plan.minutes_of_sittings or [plan.minutes]
    if max(sittings) > LONGEST_SITTING or sum(sittings) != plan.minutes:
        yield (
            f"sittings of at most {LONGEST_SITTING} minutes that add up to {plan.minutes}: "
            "Sittings: sections 1 to 4 (70 minutes), 5 to 9 (60 minutes)."
        )


def lab_table(plans: Mapping[str, Plan]) -> str:
    """The text of labs/README.md, from the plans by the names of their files."""
    rows = []
    for name, plan in plans.items():
        sittings = f" ({' + '.join(map(str, plan.minutes_of_sittings))})" if plan.sittings else ""
        promise = plan.promise.removeprefix("You will ").rstrip(".")
        rows.append(f"| [{plan.title}]({name}) | {promise} | {plan.minutes}{sittings} | {plan.before} |")
    cores = [f"* {plan.title.partition('.')[0]}: {plan.core}." for plan in plans.values()]
    return "\n".join([HEAD.rstrip(), *rows, "", "## Core paths", "", *cores, ""])
