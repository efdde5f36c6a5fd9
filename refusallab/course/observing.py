"""In the sandbox: run an answer on inputs and send plain data back. Whoever reads that data does not trust it."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import traceback
import types
import warnings
from collections.abc import Callable
from typing import Any

from refusallab.course.exercise import Borrowed, Exercise, call
from refusallab.course.exercises import every_exercise, find_exercise
from refusallab.course.origin import codes, course_code
from refusallab.sandbox.plain import LARGEST, MIME, from_json, to_json

CHUNK = 1 << 16


def warm_up() -> None:
    """Import and compute what every probe needs, before kernels are forked."""
    every_exercise()
    codes()


class Observed:
    """What came of a probe, as a kernel shows it to its client."""

    def __init__(self, text: str):
        self.text = text

    def _repr_mimebundle_(self, **settings: Any) -> dict[str, str]:
        return {MIME: self.text, "text/plain": ""}


def observe_answer(number: str, namespace: dict[str, Any], inputs: str) -> Observed:
    """Try the answer to an exercise on a list of inputs, in a process of its own, so that it breaks nothing else.

    Whoever asked for it watches its time, and interrupts it.
    """
    from refusallab.course.exercises.common import chat_model

    exercise = find_exercise(number)
    if exercise.observe is not call:
        chat_model()  # loaded here, every process below has it
    return Observed(_in_child(lambda: _observe(exercise, namespace, inputs)))


def _observe(exercise: Exercise, namespace: dict[str, Any], inputs: str) -> str:
    if exercise.function not in namespace:
        return to_json({"missing": True})
    function = namespace[exercise.function]
    if type(function) is types.FunctionType:  # f = solved(number, f) stands for f: no check has approved it here
        function = namespace[exercise.function] = vars(function).get("lent_for", function)  # it may call itself
    if not callable(function):
        return to_json({"kind": type(function).__name__})
    if name := course_code(function):
        return to_json({"borrowed": name})
    try:
        return to_json({"cases": [_try(exercise, function, case) for case in from_json(inputs)]})
    except Borrowed as name:
        return to_json({"borrowed": str(name)})


def _try(exercise: Exercise, function: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, Any]:
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            value = exercise.try_answer(function, inputs)
        return {"value": value, "inputs": inputs}
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)[:500], "line": _line(error)}


def _line(error: Exception) -> int:
    """The line of the student's cell in which an error arose, 0 if there is none."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if "ipykernel" in f.filename]
    return (lines or [0])[-1] or 0


def _in_child(work: Callable[[], str]) -> str:
    """What `work` returns in a forked process; the reason if it returns nothing."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os.close(reader)
        try:
            _write(writer, _text(work).encode())
        finally:
            os._exit(0)
    os.close(writer)
    try:
        text = _read(reader)
    except KeyboardInterrupt:
        text = to_json({"interrupted": True})
    os.close(reader)
    code = 0 if text else os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # with all that it started
    if text:
        os.waitpid(child, 0)
        return text
    return to_json({"died": f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended itself with code {code}"})


def _text(work: Callable[[], str]) -> str:
    try:
        return work()
    except Exception:  # what the answer raises is caught where it is called: this is the encoding, of too much
        return to_json({"large": True})


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _read(fd: int) -> str:
    """Everything up to the end; too much text counts as {"large": True}."""
    parts, size = [], 0
    while part := os.read(fd, CHUNK):
        size += len(part)
        if size > LARGEST:
            return to_json({"large": True})
        parts.append(part)
    return b"".join(parts).decode()
