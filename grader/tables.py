"""Tables for spreadsheets: what a student wrote stays text there."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

# Where a spreadsheet may see a formula: at the beginning, and after signs that separate cells in other countries
_START, _SIGN = r"(^|[;\t])", r"(?='*\s*[=+\-@＝＋－＠﹦﹢﹣﹫−\t\r])"
NUMBER = re.compile(r"-?\d+([.,]\d+)?")


def safe(text: str) -> str:
    """A cell that no spreadsheet takes for a formula: it begins with an apostrophe. Numbers stay as they are."""
    return text if NUMBER.fullmatch(text) else re.sub(_START + _SIGN, r"\1'", text)


def as_it_was(cell: str) -> str:
    """The text of which `safe` made a cell."""
    return re.sub(_START + "'" + _SIGN, r"\1", cell)


def write_safe_csv(path: Path, rows: Iterable[Sequence[str]]) -> None:
    """Write a table in which no cell is a formula."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([safe(cell) for cell in row] for row in rows)
