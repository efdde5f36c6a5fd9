"""Exercises: what an exercise is, and how a student's function is judged on fresh inputs.

An exercise is defined once, in `refusallab/course/exercises/`. Notebook headers, checks, release and grading read that
definition. A function is judged by what it does on inputs made from a seed: `observe` turns it into plain data, which
is compared with what the reference gives. So a hard-coded answer fails on the next seed.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refusallab.course.catalogue import Header, header
from refusallab.course.origin import course_code
from refusallab.errors import RefusalLabError

BORROWED = (
    "This is the course's own {}. You may use it wherever you like, but as an answer it earns no points: write {} "
    "yourself."
)

SHOWN = 80  # characters of a value that a message shows


@dataclass(frozen=True)
class Case:
    """One input: what it is in words, and the keyword arguments. `model` arguments are names of bundled models."""

    what: str
    inputs: dict[str, Any]


Observe = Callable[[Callable[..., Any], dict[str, Any]], Any]
FAILED = object()  # in place of a result: there is none, and None may be one


def call(function: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    """The usual observation: what the function returns."""
    return function(**inputs)


@dataclass(frozen=True)
class Mistake:
    """A typical mistake: its name, a plain implementation that makes it, and what to tell whoever made it."""

    name: str
    wrong: Callable[..., Any]
    advice: str


@dataclass(frozen=True)
class Exercise(Header):
    """An exercise that is graded automatically: its header, and how an answer is judged."""

    reference: Callable[..., Any]
    cases: Callable[[int], Sequence[Case]]  # seed -> inputs
    mistakes: tuple[Mistake, ...]
    hints: tuple[str, ...]  # from nudge to near-answer, Markdown
    observe: Observe = call
    tolerance: float = 1e-4  # largest absolute difference of numbers, relative to the largest expected one (at least 1)

    def try_answer(self, answer: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        """What is observed of an answer. Borrowed if the answer calls what `solved` gave in its place."""
        _tried.append(self.number)
        try:
            return self.observe(answer, inputs)
        finally:
            _tried.pop()

    def lend(self, answer: Callable[..., Any]) -> Callable[..., Any]:
        """The reference, to be used in place of `answer` wherever the lab goes on. In an answer it raises Borrowed."""

        @wraps(self.reference)
        def lent(*args: Any, **settings: Any) -> Any:
            if self.number in _tried:
                raise Borrowed("refusallab.course.solved")
            return self.reference(*args, **settings)

        lent.__signature__ = inspect.signature(self.reference)  # type: ignore[attr-defined]
        del lent.__wrapped__  # type: ignore[attr-defined]  # or the reference could be had through it
        lent.lent_for = getattr(answer, "lent_for", answer)  # type: ignore[attr-defined]
        return lent


class Borrowed(BaseException):
    """An answer called the reference of its own exercise. Its `except Exception` does not stop this."""


_tried: list[str] = []  # the exercises whose answers are running


def define(number: str, **judged: Any) -> Exercise:
    """The exercise with a number of the catalogue: `judged` gives what Exercise has beyond its header."""
    return Exercise(**vars(header(number)), **judged)


@dataclass(frozen=True)
class CheckResult:
    """What became of one exercise."""

    exercise: Exercise
    problem: str = ""  # empty when every case passes
    mistake: str = ""  # its name, if the problem is a typical one
    case: str = ""
    notes: tuple[str, ...] = field(default=())  # what was right before the problem showed

    @property
    def passed(self) -> bool:
        return not self.problem


class CheckFailed(AssertionError):
    """A check that did not pass. Notebooks show its message without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


@cache
def _expected(exercise: Exercise, seed: int) -> tuple[tuple[Case, Any], ...]:
    cases = exercise.cases(seed)
    with _quiet():
        return tuple((case, exercise.observe(exercise.reference, _fresh(case))) for case in cases)


def _fresh(case: Case) -> dict[str, Any]:
    return copy.deepcopy(case.inputs)


def run_cases(exercise: Exercise, function: Callable[..., Any], seed: int) -> CheckResult:
    """Run a function on the cases of a seed. The first case that fails gives the verdict.

    What the function prints or warns about is dropped, and whatever it raises becomes part of the verdict.
    """
    if not callable(function):
        return CheckResult(
            exercise, f"`{exercise.function}` must be a function, and this is a {type(function).__name__}."
        )
    try:
        return check_cases(exercise, seed, lambda place, inputs: exercise.try_answer(function, inputs))
    except Borrowed as name:
        return CheckResult(exercise, _borrowed_text(exercise, str(name)))


def borrowed(exercise: Exercise, function: Any) -> str:
    """What to tell whoever hands in a function of the course as their answer. Empty where it is their own."""
    name = course_code(function)
    return _borrowed_text(exercise, name) if name else ""


def _borrowed_text(exercise: Exercise, name: str) -> str:
    return BORROWED.format(f"`{name}`", f"`{exercise.function}`")


def check_cases(exercise: Exercise, seed: int, observed: Callable[[int, dict[str, Any]], Any]) -> CheckResult:
    """The verdict on what was observed of an answer: `observed(place, inputs)` gives it for one of the cases."""
    notes: list[str] = []
    for place, (case, expected) in enumerate(_expected(exercise, seed)):
        inputs = _fresh(case)
        try:
            with _quiet():
                got = observed(place, inputs)
        except Exception as error:
            if isinstance(error, NotImplementedError) and not str(error):  # that of the stub; those of torch say more
                return CheckResult(
                    exercise, "It is not written yet: replace the `raise NotImplementedError()` by your code."
                )
            problem = f"It raised {type(error).__name__}: {_first_line(error)}"
            if isinstance(error, RefusalLabError):
                problem = str(error)
            if isinstance(error, UnboundLocalError) or (isinstance(error, NameError) and _in_a_trace(error)):
                problem += (
                    ". Was it made inside a trace? Then it needs `.save()` to be there after it. A list that is made "
                    "inside needs it too, whatever is in it: make the list before the trace, or save "
                    "`torch.stack(...)` of it."
                )
            return CheckResult(exercise, problem, case=case.what, notes=tuple(notes))
        if changed := _changed(inputs, case.inputs):
            problem = f"It changes its input `{changed}`. {_how_to_keep(inputs[changed], case.inputs[changed])}"
            return CheckResult(exercise, problem, "changes its input", case.what, tuple(notes))
        difference = describe_difference(got, expected, exercise.tolerance)
        if difference:
            mistake = _recognise(exercise, seed, place, got)
            problem = mistake.advice if mistake else difference
            return CheckResult(exercise, problem, mistake.name if mistake else "", case.what, tuple(notes))
        notes.append(case.what)
    return CheckResult(exercise, notes=tuple(notes))


def _recognise(exercise: Exercise, seed: int, place: int, got: Any) -> Mistake | None:
    """The typical mistake that gives just this wrong result."""
    for mistake in exercise.mistakes:
        wrong = _mistaken(exercise, mistake, seed, place)
        if wrong is not FAILED and not describe_difference(got, wrong, exercise.tolerance):
            return mistake
    return None


@cache
def _mistaken(exercise: Exercise, mistake: Mistake, seed: int, place: int) -> Any:
    """What a typical mistake makes of a case. FAILED if it raises an exception there."""
    try:
        with _quiet():
            return exercise.observe(mistake.wrong, _fresh(_expected(exercise, seed)[place][0]))
    except Exception:
        return FAILED


def _in_a_trace(error: Exception) -> bool:
    """Whether an error arose inside a trace of nnsight, where names of an earlier trace are gone unless saved."""
    return any("nnsight" in frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__))


def _how_to_keep(now: Any, before: Any) -> str:
    """What to do instead of the edit in place that made an input what it is now."""
    if isinstance(now, list) and isinstance(before, list) and len(now) == len(before):
        return next(_how_to_keep(a, b) for a, b in zip(now, before, strict=True) if describe_difference(a, b, 0.0))
    if isinstance(before, Tensor):
        return "Work on a new tensor: x - y makes one, x -= y does not."
    return "Work on a copy: [*x, y] makes a new list, x.append(y) does not."


def _changed(inputs: dict[str, Any], before: dict[str, Any]) -> str:
    """The name of an input that the function has edited in place."""
    return next((name for name, value in inputs.items() if describe_difference(value, before[name], 0.0)), "")


def describe_difference(got: Any, expected: Any, tolerance: float) -> str:
    """In words, how a result differs from the expected one; empty when it does not. No expected value is shown."""
    if isinstance(got, np.generic) or (isinstance(expected, bool) and _is_truth_value(got)):
        got = got.item()
    if isinstance(expected, Tensor):
        return _compare_tensors(got, expected, tolerance)
    if isinstance(expected, float | int) and not isinstance(expected, bool):
        if isinstance(got, bool) or not isinstance(got, float | int | Tensor) or not _is_scalar(got):
            return f"Expected one number, got {_kind(got)}."
        return _compare_tensors(
            torch.as_tensor(got, dtype=torch.float64), torch.tensor(float(expected), dtype=torch.float64), tolerance
        )
    if isinstance(expected, dict):
        if not isinstance(got, dict) or set(got) != set(expected):
            return f"Expected a dict with the keys {sorted(expected)}, got {_kind(got)}."
        parts = ((f"At key {key!r}: ", got[key], expected[key]) for key in expected)
    elif isinstance(expected, list | tuple):
        if not isinstance(got, list | tuple) or len(got) != len(expected):
            return f"Expected a {type(expected).__name__} of {len(expected)} values, got {_kind(got)}."
        pairs = enumerate(zip(got, expected, strict=True), 1)
        parts = ((f"Value {i} of {len(expected)}: ", a, b) for i, (a, b) in pairs)
    else:
        if type(got) is type(expected) and got == expected:
            return ""
        if isinstance(expected, bool):
            return (
                f"This is {got}, and should not be."
                if isinstance(got, bool)
                else f"Expected True or False, got {_kind(got)}."
            )
        if isinstance(got, str) and isinstance(expected, str) and len(got) > SHOWN and got[0] == expected[:1]:
            return f"Expected another text. {_where_texts_part(got, expected)}"
        return f"Expected another value of kind {type(expected).__name__} than {_short(got)}."
    return next((where + text for where, a, b in parts if (text := describe_difference(a, b, tolerance))), "")


def _where_texts_part(got: str, expected: str) -> str:
    """Up to where a text is right, and how it goes on: all of it in its own words."""
    same = len(os.path.commonprefix([got, expected]))
    further = f"goes on with {got[same : same + 40]!r}" if same < len(got) else "ends"
    return f"Yours is right up to {got[max(0, same - 40) : same]!r}; there it {further}."


def _is_truth_value(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bool and value.numel() == 1


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.numel() == 1


def _compare_tensors(got: Any, expected: Tensor, tolerance: float) -> str:
    if not isinstance(got, Tensor):
        return f"Expected a tensor of shape {list(expected.shape)}, got {_kind(got)}."
    if got.shape != expected.shape and not (got.numel() == expected.numel() == 1):
        return f"The shape is {list(got.shape)}, expected {list(expected.shape)}."
    got, expected = got.detach().double().cpu().reshape(expected.shape), expected.double()
    if torch.equal(got.isnan(), expected.isnan()) and got.isnan().any():
        got, expected = got.nan_to_num(), expected.nan_to_num()
    if not got.isfinite().all() and expected.isfinite().all():
        return "Some values are NaN or infinite, and none should be."
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    away = (got - expected).abs()
    if away.numel() == 0 or bool((away <= tolerance * scale).all()):
        return ""
    share = float((away > tolerance * scale).double().mean())
    where = [int(i) for i in torch.unravel_index(away.argmax(), away.shape)]
    if not where:
        return f"The number is off by {float(away.max()):.1g}."
    many = f"{share:.0%}" if share >= 0.01 else "less than 1%"
    return f"The shape is right, but {many} of the values are off, by up to {float(away.max()):.1g} at index {where}."


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return "nothing (a missing return?)" if value is None else f"a {type(value).__name__}: {_short(value)}"


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop what is printed, warned and logged. Graders take any text on stderr for a failure, however it got there."""
    level, stderr = logging.root.manager.disable, os.dup(2)
    with (
        open(os.devnull, "w") as nowhere,
        warnings.catch_warnings(),
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        warnings.simplefilter("ignore")
        logging.disable()
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            logging.disable(level)


def result_text(check_cases: CheckResult) -> str:
    """The verdict in words: what is right, what is not, on which input, and where to look."""
    e = check_cases.exercise
    if check_cases.passed:
        cases = f"{len(check_cases.notes)} inputs" if len(check_cases.notes) != 1 else "1 input"
        return f"✓ {e.number} {e.title}: right on {cases}. {e.points} of {e.points} points."
    lines = [f"✗ {e.number} {e.title}: not yet. 0 of {e.points} points."]
    lines += [f"  right: {note}" for note in check_cases.notes]
    if check_cases.case:
        lines.append(f"  wrong: {check_cases.case}")
    if check_cases.mistake:
        lines.append(f"  This looks like a known mistake: {check_cases.mistake}.")
    return "\n".join([*lines, f"  {check_cases.problem}", f"  The hints of exercise {e.number} are above its cell."])
