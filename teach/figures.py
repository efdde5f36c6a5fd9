"""Figures of the executed notebooks, each with the description that stands below it."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from functools import cache

import nbformat

from refusallab.course.release import solutions
from refusallab.errors import RefusalLabError
from teach import ROOT

NAME = re.compile(r"lab(\d\d)/(\d+)")
DESCRIPTION = re.compile(r"\*Figure: (.+?)\*(?=\n|$)", re.DOTALL)


@dataclass(frozen=True)
class Figure:
    png: bytes
    alt: str


@cache
def figures(lab: str) -> tuple[Figure, ...]:
    """The figures of a lab ("02") in their order. A description holds for all figures of the cell above it."""
    (path,) = solutions(ROOT, [lab])
    found, waiting = [], []
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code":
            data = [output["data"] for output in cell.outputs if "data" in output]
            waiting = [base64.b64decode(d["image/png"]) for d in data if "image/png" in d]
        elif waiting:
            described = DESCRIPTION.match(cell.source)
            assert described, f"{path.name}: a figure without its description"  # the lint of labs sees to it
            found += [Figure(png, described[1].replace("\n", " ")) for png in waiting]
            waiting = []
    return tuple(found)


def figure(name: str) -> Figure:
    """The figure with a name: "lab02/1" is the first one of lab 02. RefusalLabError if there is none."""
    parts = NAME.fullmatch(name)
    if parts and 1 <= int(parts[2]) <= len(figures(parts[1])):
        return figures(parts[1])[int(parts[2]) - 1]
    raise RefusalLabError(f"There is no figure {name!r}: lab02/1 is the first figure of lab 02.")
