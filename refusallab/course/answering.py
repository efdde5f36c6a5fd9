"""A submitted defence at work: this process runs the code of a student and answers prompts, a line of JSON for each.

Started by `refusallab.course.submitted.Submitted`, behind a wall where there is one. It sends nothing but plain data to
the process that started it, which trusts none of it.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from pathlib import Path
from typing import Any, TextIO

FILE = "<defence>"  # the name of the student's code in tracebacks


def main() -> None:
    """Read the source, say what came of it, then answer until the input ends."""
    requests, answers = _own_channels()
    from refusallab.sandbox.plain import from_json, to_json

    def say(**what: Any) -> None:
        answers.write(to_json(what) + "\n")
        answers.flush()

    try:
        defence, direction = _begin(from_json(requests.readline()))
        say(name=defence.name[:40], direction=direction)
        for line in requests:
            replies = _answer(defence, from_json(line))
            say(replies=replies, extra_passes=int(defence.extra_passes))
    except BaseException as error:  # an exit too: whatever ends the defence is reported
        say(problem=error_in_words(error))


def _own_channels() -> tuple[TextIO, TextIO]:
    """The input and output of this process, out of reach of what prints."""
    requests, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull, "r+") as nothing:
        for fd in (0, 1, 2):
            os.dup2(nothing.fileno(), fd)
    return requests, answers


def _begin(order: dict[str, Any]) -> tuple[Any, Any]:
    import torch

    from refusallab.course.capstone import attackers_direction
    from refusallab.model import load
    from refusallab.sandbox import confine

    m = load(order["model"])
    if order["walled"]:
        confine.drop_privileges(1)
    _limit(int(order["memory"] * 2**30), int(order["seconds"]), order["walled"])
    torch.manual_seed(0)
    defence = make(order["source"], m)
    return defence, attackers_direction(defence.m)


def make(source: str, m: Any) -> Any:
    """The defence that the code of a student makes around a model. RefusalLabError if it breaks the interface."""
    from refusallab.course.capstone import check_interface
    from refusallab.errors import RefusalLabError

    namespace: dict[str, Any] = {"__name__": "defence"}
    exec(compile(source, FILE, "exec"), namespace)
    if not callable(namespace.get("defend")):
        raise RefusalLabError("It defines no function defend(m) that returns a defence.")
    defence = namespace["defend"](m)
    check_interface(defence)
    return defence


def _answer(defence: Any, order: dict[str, Any]) -> list[str]:
    from refusallab.course.capstone import Removal, replies

    edit = None if order["edit"] is None else Removal(**order["edit"])
    return replies(defence, order["prompts"], edit=edit, prefill=order["prefill"])


def _limit(memory: int, seconds: int, walled: bool) -> None:
    """Limit memory (bytes beyond those in use), time (of the processor) and files; behind the wall also processes."""
    from refusallab.sandbox import confine

    with contextlib.suppress(OSError):  # not Linux
        used = int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
        confine.limit(memory, seconds, used, processes=walled)


def error_in_words(error: BaseException) -> str:
    """What went wrong, for the author of the defence."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == FILE]
    if isinstance(error, SyntaxError):
        return f"It is not valid Python: line {error.lineno}: {error.msg}."
    text = next(iter(str(error).strip().splitlines()), "")[:300]
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return "It needs more memory than it may have."
    from refusallab.errors import RefusalLabError

    if isinstance(error, RefusalLabError) and not lines:
        return text
    return f"It raised {type(error).__name__}: {text}" + (f" (line {lines[-1]} of the defence)." if lines else ".")


if __name__ == "__main__":
    main()
