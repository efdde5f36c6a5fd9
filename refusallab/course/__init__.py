"""What the notebooks use of the course: `start`, `check`, `progress`, `real_model`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from refusallab.course.exercise import CheckFailed, Verdict, borrowed, find, judge, report
from refusallab.course.progress import progress, record
from refusallab.course.session import real_model, start

__all__ = ["CheckFailed", "check", "progress", "real_model", "start"]

PUBLIC_SEED = 0


def check(number: str, function: Callable[..., Any], *, seed: int = PUBLIC_SEED) -> None:
    """Judge the answer to an exercise: print what is right, or raise CheckFailed with what is not.

    `seed` makes the inputs; any seed must give the same verdict. Seeds other than the public one are for hidden checks,
    which say nothing when all is well. A function of the course is no answer.
    """
    exercise = find(number)
    problem = borrowed(exercise, function)
    verdict = Verdict(exercise, problem) if problem else judge(exercise, function, seed)
    if not verdict.passed:
        raise CheckFailed(report(verdict))
    if seed == PUBLIC_SEED:
        record(number, verdict.exercise.points)
        print(report(verdict))
