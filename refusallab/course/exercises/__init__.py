"""How the exercises of the course are judged: a module for each lab, imported when it is needed."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from refusallab.course.catalogue import LABS, header
from refusallab.course.exercise import Exercise


@cache
def exercises_of(lab: str) -> tuple[Exercise, ...]:
    """The exercises of a lab, such as "02", in order."""
    return import_module(f"{__name__}.lab{lab}").EXERCISES


def find_exercise(number: str) -> Exercise:
    """The exercise with a number. RefusalLabError if there is none."""
    return next(e for e in exercises_of(header(number).lab) if e.number == number)


def every_exercise() -> tuple[Exercise, ...]:
    """All exercises of the course, in order."""
    return tuple(exercise for lab in LABS for exercise in exercises_of(lab))
