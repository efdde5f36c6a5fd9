"""Answers that a person should look at: those that fetch the answer instead of giving it.

The library is at hand in the labs, so an answer can call the library's own function for the exercise, look up the
reference in the exercise's definition, or tamper with the code that observes it. The grader does not forbid that, but
shows it to a person. What each flag means, and how often honest work raises one, is in docs/grading.md.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import refusallab
from refusallab import course
from refusallab.course.cells import Notebook, squeeze
from refusallab.course.exercise import Exercise

SOLVED = "refusallab.course.solved"
FOR_LABS = {"*", "capstone", "leaderboard", *course.__all__}
BUILTINS = {"__builtins__", "__import__", "compile", "eval", "exec", "globals"}
ATTRIBUTES = {
    "__closure__", "__code__", "__defaults__", "__globals__", "__kwdefaults__", "__subclasses__", "__wrapped__",
    "ast_transformers", "cell_contents", "cr_frame", "f_back", "f_globals", "f_locals", "gi_frame", "run_cell",
    "run_cell_async", "showtraceback", "tb_frame", "user_global_ns", "user_ns",
}  # fmt: skip
NAMES = (  # by full name, with all that is in them
    "builtins", "ctypes", "gc.callbacks", "gc.get_objects", "gc.get_referents", "gc.get_referrers",
    "inspect.currentframe", "inspect.getclosurevars", "inspect.getinnerframes", "inspect.getouterframes",
    "inspect.stack", "inspect.trace", "inspect.unwrap", "linecache", "marshal", "sys._current_frames", "sys._getframe",
    "sys.meta_path", "sys.modules", "sys.path_hooks", "sys.setprofile", "sys.settrace", "types.CodeType",
    "types.FunctionType", "unittest.mock",
)  # fmt: skip
OPENED = {"getattr", "vars"}  # ordinary calls, but not on modules in which code is to be found
SET = {"delattr", "setattr"}
MODULES = {"importlib", "refusallab", "sys"}
INNER = {"__dict__", "__file__", "__loader__", "__path__", "__spec__"}  # of these modules
GLUE = {"item", "tolist", "float", "int", "tuple", "list", "dict", "detach", "squeeze", "cpu"}
WORK = (ast.BinOp, ast.Compare, ast.For, ast.While, ast.With, ast.comprehension, ast.BoolOp, ast.AugAssign, ast.IfExp)


def flags(notebook: Notebook, exercise: Exercise, released: Collection[str] = ()) -> list[str]:
    """What a person should look at in the answer to an exercise, in words. `released` are the cells as given out."""
    own, known = _own_code(notebook, released), _known(n for tree in notebook.trees.values() for n in tree.body)
    found = []
    if inner := sorted(set(filter(_is_inside, _origins(own, known)))):
        found.append(f"uses the inside of the course: {', '.join(inner)}")
    if looked := sorted(set(_looks(own, known))):
        found.append(f"looks for code in unusual ways: {', '.join(looked)}")
    if patched := sorted(set(_patched(own, known))):
        found.append(f"changes what it imported: {', '.join(patched)}")
    code = [n for n in _reachable(notebook, exercise.function, own) if not _goes_on(n, exercise, known)]
    called = set(_library_calls(code, known))
    fetches = any(_named(name) is exercise.reference for name in called) or _asks_solved(code, exercise, known)
    if fetches or (len(called) == 1 and not _works(code, known)):
        found.append(f"only calls the library: {', '.join(sorted(called))}")
    return found


def _own_code(notebook: Notebook, released: Collection[str]) -> list[ast.stmt]:
    """The statements of the cells that the student wrote or changed. The set-up cell, as released, is not of these."""
    known = {squeeze(source) for source in released}
    if not known:
        known = {squeeze(c.source) for c in notebook.cells if c.tag.get("role") == "setup"}
    return [
        n for i, tree in notebook.trees.items() if squeeze(notebook.cells[i].source) not in known for n in tree.body
    ]


def _known(code: Iterable[ast.AST]) -> dict[str, str]:
    """For each name that the code imports, the full name of what it stands for."""
    found = {}
    for node in _nodes(code):
        if isinstance(node, ast.Import):
            for a in node.names:
                package = a.name.partition(".")[0]
                found |= {a.asname: a.name} if a.asname else {package: package}
        elif isinstance(node, ast.ImportFrom):
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return found


def _nodes(code: Iterable[ast.AST]) -> Iterator[ast.AST]:
    return (node for part in code for node in ast.walk(part))


def _full_name(node: ast.AST, known: dict[str, str]) -> str:
    """a.b.c, with what `a` was imported as in its place. Empty if it does not begin with a name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([known.get(node.id, node.id), *reversed(parts)]) if isinstance(node, ast.Name) else ""


def _full_names(code: Iterable[ast.AST], known: dict[str, str]) -> Iterator[tuple[ast.AST, str]]:
    """Every name in the code, once and with all that follows it: a.b.c, but not a.b and a as well."""
    nodes = list(_nodes(code))
    inner = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    for node in nodes:
        if isinstance(node, ast.Attribute | ast.Name) and id(node) not in inner:
            yield node, _full_name(node, known)
        elif isinstance(node, ast.Import):
            yield from ((node, a.name) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node, f"{node.module}.{a.name}") for a in node.names)


def _is_inside(origin: str) -> bool:
    """Whether a full name belongs to the part of the course that labs leave alone."""
    package, course, inner = [*origin.split("."), "", "", ""][:3]
    return (package, course) == ("refusallab", "course") and inner not in {"", *FOR_LABS}


def _origins(code: list[ast.stmt], known: dict[str, str]) -> Iterator[str]:
    """What the code uses, by full name, and texts in it that may name a module."""
    yield from (name for _, name in _full_names(code, known))
    texts = (n.value for n in _nodes(code) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    yield from (text for text in texts if all(part.isidentifier() for part in text.split(".")))


def _looks(code: list[ast.stmt], known: dict[str, str]) -> Iterator[str]:
    """Ways to code and values that are not the student's own, by name."""
    asked = {  # "google.colab" in sys.modules
        id(part)
        for node in _nodes(code)
        if isinstance(node, ast.Compare) and all(isinstance(op, ast.In | ast.NotIn) for op in node.ops)
        for part in ast.walk(node.comparators[0])
    }
    for node, name in _full_names(code, known):
        if id(node) not in asked:
            yield from (odd for odd in NAMES if name == odd or name.startswith(f"{odd}."))
    for node in _nodes(code):
        match node:
            case ast.Name(id=name, ctx=ast.Load()) if name in BUILTINS and id(node) not in asked:
                yield name
            case ast.Attribute(attr=name) if name in ATTRIBUTES:
                yield name
            case ast.Attribute(attr=name) if name in INNER and _full_name(node, known).split(".")[0] in MODULES:
                yield name
            case ast.Constant(value=str(name)) if name in ATTRIBUTES and name.startswith("__"):
                yield name
            case ast.Call(func=function, args=[first, *_]):
                name = _full_name(function, known)
                if name in OPENED and _full_name(first, known).split(".")[0] in MODULES:
                    yield name
                if name == "importlib.import_module" and not _names_an_ordinary_module(first):
                    yield name


def _names_an_ordinary_module(node: ast.AST) -> bool:
    """Whether this is a literal text that names no module of the library except the one in the set-up cell."""
    if not isinstance(node, ast.Constant):
        return False
    return node.value == "refusallab.colab" or not str(node.value).startswith("refusallab")


def _patched(code: list[ast.stmt], known: dict[str, str]) -> Iterator[str]:
    """Attributes of what was imported to which something else than a plain value is assigned."""
    for node in _nodes(code):
        match node:
            case ast.Assign(targets=targets):
                pass
            case ast.AnnAssign(target=target) | ast.AugAssign(target=target) | ast.For(target=target):
                targets = [target]
            case ast.Call(func=ast.Name(id=name), args=[owner, ast.Constant(value=attribute), *_]) if name in SET:
                if _root(owner) in known:
                    yield f"{_full_name(owner, known)}.{attribute}"
                continue
            case _:
                continue
        plain = isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant)
        for part in _nodes(targets):
            if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store) and _root(part) in known:
                name = _full_name(part, known)
                if not plain or name.startswith("refusallab"):
                    yield name


def _reachable(notebook: Notebook, name: str, own: list[ast.stmt]) -> Iterator[ast.AST]:
    """The body of a function, or what else gives it its value, and those of the functions of the notebook it uses."""
    mine, todo, seen = {id(n) for n in own}, [(name, True)], set()
    while todo:
        name, called = todo.pop()
        if (name, called) in seen:
            continue
        seen.add((name, called))
        for _, node in notebook.functions(name):
            inner = {n.arg for n in ast.walk(node.args) if isinstance(n, ast.arg)} - _names(node.args)  # f(x=x): both
            for part in node.body:
                yield part
                todo += [(n, False) for n in _names(part) - inner]
                todo += [(n, True) for n in _called(part) - inner]
        for _, node in notebook.bindings.get(name, ()) if called else ():
            if id(node) in mine and isinstance(node, ast.Assign | ast.AnnAssign | ast.ClassDef):
                yield node
                todo += [(n, True) for n in _names(node)]


def _names(code: ast.AST) -> set[str]:
    found = {n.id for n in ast.walk(code) if isinstance(n, ast.Name)}
    return found | {n.attr for n in ast.walk(code) if isinstance(n, ast.Attribute)}


def _called(code: ast.AST) -> set[str]:
    return {n.func.id for n in ast.walk(code) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}


def _library_calls(code: list[ast.AST], known: dict[str, str]) -> Iterator[str]:
    """What is called of the library, by full name, other than what handles models."""
    for node in _nodes(code):
        if isinstance(node, ast.Call) and _is_library(name := _full_name(node.func, known)):
            yield name


def _named(name: str) -> Any:
    """What a full name of the library stands for: its packages offer many functions under a shorter name."""
    found: Any = refusallab
    for part in name.split(".")[1:]:
        found = getattr(found, part, None)
    return found


def _goes_on(node: ast.AST, exercise: Exercise, known: dict[str, str]) -> bool:
    """Whether this is `f = solved(number, f)`, with which a notebook goes on after the check of f."""
    match node:
        case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(func=function, args=[_, ast.Name(id=answer)])):
            return name == answer == exercise.function and _full_name(function, known) == SOLVED
    return False


def _asks_solved(code: list[ast.AST], exercise: Exercise, known: dict[str, str]) -> bool:
    """Whether the code calls `solved` for this exercise, or for one whose number it does not spell out."""
    for node in _nodes(code):
        if isinstance(node, ast.Call) and _full_name(node.func, known) == SOLVED:
            numbers = [part.value for part in node.args[:1] if isinstance(part, ast.Constant)]
            if numbers in ([], [exercise.number]):
                return True
    return False


def _is_library(name: str) -> bool:
    return name.startswith("refusallab.") and not name.startswith("refusallab.model")


def _root(node: ast.AST) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _works(code: list[ast.AST], known: dict[str, str]) -> bool:
    """Whether the code does anything beyond one call of the library."""
    for node in _nodes(code):
        if isinstance(node, WORK):
            return True
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else _root(node.func)
            if name not in GLUE and not _is_library(_full_name(node.func, known)):
                return True
    return False
