"""Whose code a function runs: the course's, or that of whoever wrote the notebook.

What counts is the code that would run, not what it is called, where its file name points, or the words around it. A
function of the course stays one under another name, in `functools.partial`, behind a decorator, as a bound method, and
as a copy of its code. A function that somebody has written is theirs, even where it calls the library or does the same
as the library.
"""

from __future__ import annotations

import functools
import linecache
import sysconfig
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import refusallab
import smallmodels

PACKAGES = tuple(Path(package.__file__).resolve().parent for package in (refusallab, smallmodels))
OTHERS = ("<frozen ", *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")))
MOST = 1000  # callables that are looked at inside one answer
METHODS = (types.MethodType, types.BuiltinMethodType, types.MethodWrapperType)


def course_code(function: Any) -> str:
    """The full name of the function of the course that `function` comes down to. Empty if it is somebody's own."""
    todo, seen, found = [function], [], ""
    while todo and len(seen) < MOST:
        part = todo.pop()
        if any(part is known for known in seen):
            continue
        seen.append(part)
        if type(part) is types.FunctionType:
            if name := _course_name(part.__code__):
                found = found or name
                continue
            if not part.__code__.co_filename.startswith(OTHERS):
                return ""
        todo += [inner for inner in _inside(part) if callable(inner)]
    return found


def _inside(part: Any) -> Iterator[Any]:
    """What a callable may hand its call on to."""
    kind = type(part)
    if kind is types.FunctionType:
        yield from (cell.cell_contents for cell in part.__closure__ or () if cell != types.CellType())
    elif issubclass(kind, functools.partial):
        yield from (part.func, *part.args, *part.keywords.values())
    elif issubclass(kind, METHODS):
        yield part.__self__
        yield getattr(part, "__func__", None)
    elif kind in (staticmethod, classmethod):
        yield part.__func__
    elif issubclass(kind, type):
        yield from (_attribute(part, name) for name in ("__new__", "__init__"))
    yield _attribute(kind, "__call__")
    try:
        yield from object.__getattribute__(part, "__dict__").values()  # __wrapped__, and what instances keep
    except Exception:  # it has none, or one that does not want to be read
        return


def _attribute(kind: type, name: str) -> Any:
    """An attribute of a class as it stands there, None if there is none."""
    return next((vars(base)[name] for base in type.mro(kind) if name in vars(base)), None)


def _course_name(code: types.CodeType) -> str:
    """The full name of a function of the course with this code. Empty if there is none."""
    path = Path(code.co_filename)
    for package in PACKAGES:
        if package in path.parents:
            return _full_name(package, path, code)
    name = codes().get(_content(code), "")
    return "" if name and _is_written(code) else name


def _is_written(code: types.CodeType) -> bool:
    """Whether the code stands in the cell or file that it says it is from: there, somebody wrote it out."""
    source = "".join(linecache.getlines(code.co_filename))
    try:
        return _content(code) in set(map(_content, _all(compile(source, "", "exec", dont_inherit=True))))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


@cache
def codes() -> dict[Any, str]:
    """The code of every function of the course, with its full name."""
    found = {}
    for package in PACKAGES:
        for path in sorted(package.rglob("*.py")):
            for code in _all(compile(path.read_bytes(), str(path), "exec", dont_inherit=True)):
                found.setdefault(_content(code), _full_name(package, path, code))
    return found


def _all(module: types.CodeType) -> Iterator[types.CodeType]:
    """The code of the functions in a module, at any depth."""
    for constant in module.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _all(constant)


def _content(code: types.CodeType) -> Any:
    """What a code does, without the names and places that can be written over."""
    constants = tuple(
        _content(c) if isinstance(c, types.CodeType) else (type(c).__name__, repr(c)) for c in code.co_consts
    )
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    return code.co_code, constants, names, code.co_argcount, code.co_kwonlyargcount


def _full_name(package: Path, path: Path, code: types.CodeType) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join([*parts, code.co_qualname])
