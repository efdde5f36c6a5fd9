"""Inputs from callers as plain lists. Anything that holds its entries in an order is read in that order."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from refusallab.errors import RefusalLabError


def listed(values: Iterable, what: str, kind: type | None = None, *, missing: bool = False) -> list:
    """The entries as a list in their own order: of a list, tuple, generator, array, or column of a table.

    Labels, such as the index of a pandas Series, play no part. `what` names the entries in errors. Raises
    RefusalLabError for one text, a table, a mapping or a set, for an entry that is missing (None, NaN) unless `missing`
    ones are allowed, and, where `kind` is given, for one that is not of this type.
    """
    if isinstance(values, str | bytes):
        raise RefusalLabError(f"{what} is one string: give a list of {what}, even for a single one.")
    if (dimensions := getattr(values, "ndim", 1)) != 1:
        raise RefusalLabError(f"{what} has {dimensions} dimensions, not one: give one column, or a flat list.")
    if isinstance(values, Mapping | set | frozenset) or not isinstance(values, Iterable):
        raise RefusalLabError(f"{what} is a {type(values).__name__}: give a list, whose entries have an order.")
    entries = list(values)
    for i, entry in enumerate(entries):
        if (is_missing(entry) and not missing) or (kind and not isinstance(entry, kind)):
            wanted = "" if kind is None else f", not {'a text' if kind is str else f'an {kind.__name__}'}"
            raise RefusalLabError(f"Entry {i} of {what} is {reprlib.repr(entry)}{wanted}: correct it, or leave it out.")
    return entries


def flagged(values: Iterable) -> list[bool]:
    """True and False, or 1 and 0, as a list of bool. Raises RefusalLabError for anything else, such as "False"."""
    flags = []
    for i, entry in enumerate(listed(values, "flags")):
        value = entry.item() if _is_scalar(entry) else entry
        if not isinstance(value, Real) or value not in (0, 1):
            raise RefusalLabError(f"Entry {i} of flags is {reprlib.repr(entry)}: give True or False for each case.")
        flags.append(bool(value))
    return flags


def numbers(values: Iterable) -> list[float]:
    """Numbers as a list of float; NaN is one of them. Raises RefusalLabError for anything else."""
    entries = [entry.item() if _is_scalar(entry) else entry for entry in listed(values, "values", missing=True)]
    for i, entry in enumerate(entries):
        if not isinstance(entry, Real):
            raise RefusalLabError(f"Entry {i} of the values is {reprlib.repr(entry)}: give a number for each case.")
    return [float(entry) for entry in entries]


def check_count(count: int, most: int | None = None, *, least: int = 0, what: str = "count") -> None:
    """RefusalLabError for a count below `least`, or above `most` where it is given. `what` names it in the error."""
    if count < least or (most is not None and count > most):
        raise RefusalLabError(f"The {what} is {count}: give {least} {'or more' if most is None else f'to {most}'}.")


def _is_scalar(entry: Any) -> bool:
    """Whether an entry is one number of an array or tensor."""
    return hasattr(entry, "item") and getattr(entry, "ndim", 1) == 0


def is_missing(entry: Any) -> bool:
    """Whether an entry stands for no value: None, NaN, or what pandas has for them."""
    if entry is None or type(entry).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(entry, Real) and entry != entry
