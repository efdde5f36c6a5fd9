"""Answers that a person should look at: those that fetch the answer instead of giving it.

The library is at hand in the labs, so an answer can call the library's own function for the exercise, look up the
reference in the exercise's definition, or bend what observes it. The machine does not forbid that; a person sees it.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator

from refusallab.course.exercise import Exercise
from refusallab.course.grade.cells import Notebook, squeeze

LOOKS_UP = {
    "__builtins__", "__closure__", "__dict__", "__globals__", "__import__", "__subclasses__", "builtins", "compile",
    "ctypes", "eval", "exec", "f_back", "gc", "getattr", "globals", "importlib", "inspect", "setattr", "sys", "vars",
}  # fmt: skip
FOR_LABS = {"check", "progress", "real_model", "start"}  # of refusallab.course
GLUE = {"item", "tolist", "float", "int", "tuple", "list", "dict", "detach", "squeeze", "cpu"}
WORK = (ast.BinOp, ast.Compare, ast.For, ast.While, ast.With, ast.comprehension, ast.BoolOp, ast.AugAssign, ast.IfExp)


def flags(notebook: Notebook, exercise: Exercise, released: Collection[str] = ()) -> list[str]:
    """What a person should look at in the answer to an exercise, in words. `released` are the cells as given out."""
    own, imports = _own_code(notebook, released), _imports(notebook)
    code = list(_reachable(notebook, exercise.function))
    found = []
    if inner := sorted({origin for origin in _origins(own) if origin.startswith("refusallab.course.")}):
        found.append(f"uses the inside of the course: {', '.join(inner)}")
    if looked := sorted({name for part in own for name in _names(part)} & LOOKS_UP):
        found.append(f"looks for code in unusual ways: {', '.join(looked)}")
    if patched := sorted(_patched(own)):
        found.append(f"changes what it imported: {', '.join(patched)}")
    called = {imports[name] for name in _library_calls(code, imports)}
    reference = f"{exercise.reference.__module__}.{exercise.reference.__name__}"
    if reference in called or (len(called) == 1 and not _works(code, imports)):
        found.append(f"only calls the library: {', '.join(sorted(called))}")
    return found


def _own_code(notebook: Notebook, released: Collection[str]) -> list[ast.AST]:
    """The statements of the cells that the student wrote or changed. The set-up cell, as released, is not of these."""
    known = {squeeze(source) for source in released}
    if not known:
        known = {squeeze(c.source) for c in notebook.cells if c.tag.get("role") == "setup"}
    return [
        n for i, tree in notebook.trees.items() if squeeze(notebook.cells[i].source) not in known for n in tree.body
    ]


def _origins(code: list[ast.AST]) -> Iterator[str]:
    """What the code imports, by full name, and texts in it that may name a module."""
    for node in (n for part in code for n in ast.walk(part)):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{a.name}" if _is_module(node, a.name) else str(node.module) for a in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 200:
            yield node.value


def _is_module(node: ast.ImportFrom, name: str) -> bool:
    return node.module in {"refusallab", "refusallab.course"} and name not in FOR_LABS


def _patched(code: list[ast.AST]) -> set[str]:
    """Attributes of imported modules that are assigned to."""
    roots = set()
    for node in (n for part in code for n in ast.walk(part)):
        if isinstance(node, ast.Import):
            roots |= {a.asname or a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots |= {a.asname or a.name for a in node.names}
    stores = (
        n for part in code for n in ast.walk(part) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)
    )
    return {ast.unparse(n) for n in stores if _root(n) in roots}


def _reachable(notebook: Notebook, name: str) -> Iterator[ast.AST]:
    """The body of a function and of the functions of the notebook that it uses."""
    todo, seen = [name], set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for _, node in notebook.functions(name):
            for part in node.body:
                yield part
                todo += _names(part)


def _names(code: ast.AST) -> set[str]:
    found = {n.id for n in ast.walk(code) if isinstance(n, ast.Name)}
    found |= {n.attr for n in ast.walk(code) if isinstance(n, ast.Attribute)}
    return found | {a.name.split(".")[0] for n in ast.walk(code) if isinstance(n, ast.Import) for a in n.names}


def _imports(notebook: Notebook) -> dict[str, str]:
    """For each name that is imported from the library, anywhere in the notebook, where it comes from."""
    found = {}
    for tree in notebook.trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("refusallab"):
                found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            if isinstance(node, ast.Import):
                found |= {
                    a.asname or a.name.split(".")[0]: a.name for a in node.names if a.name.startswith("refusallab")
                }
    return {name: origin for name, origin in found.items() if not origin.startswith("refusallab.model")}


def _library_calls(code: list[ast.AST], imports: dict[str, str]) -> set[str]:
    """Names from the library, other than those for handling models, that are called."""
    called = (n.func for part in code for n in ast.walk(part) if isinstance(n, ast.Call))
    bases = {f.id for f in called if isinstance(f, ast.Name)}
    called = (n.func for part in code for n in ast.walk(part) if isinstance(n, ast.Call))
    return (bases | {_root(f) for f in called if isinstance(f, ast.Attribute)}) & set(imports)


def _root(node: ast.AST) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _works(code: list[ast.AST], imports: dict[str, str]) -> bool:
    """Whether the code does anything beyond one call of the library."""
    for part in code:
        for node in ast.walk(part):
            if isinstance(node, WORK):
                return True
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else _root(node.func)
                if name not in GLUE and _root(node.func) not in imports:
                    return True
    return False
