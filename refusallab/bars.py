"""A progress bar in a notebook, for what takes more than a moment. The commands draw bars of their own."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
DELAY = 2.0  # seconds; what is done before shows no bar

_drawn = False  # one bar at a time: a notebook cannot draw one within another


@contextmanager
def bar(what: str, total: int) -> Iterator[tqdm]:
    """A bar that is gone when its block ends; `update(n)` moves it on. With TQDM_DISABLE=1 or a single step: none."""
    global _drawn
    shown = total > 1 and not _drawn and _in_a_notebook()
    before, _drawn = _drawn, _drawn or shown
    hidden = {} if shown else {"disable": True}
    try:
        with tqdm(desc=what, total=total, leave=False, delay=DELAY, file=sys.stdout, **hidden) as drawn:
            yield drawn
    finally:
        _drawn = before


def with_bar(steps: Iterable[T], what: str, total: int) -> Iterator[T]:
    """The steps one by one, with a bar."""
    with bar(what, total) as drawn:
        for step in steps:
            yield step
            drawn.update()


def _in_a_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")
