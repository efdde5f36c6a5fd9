"""Which code of a notebook has to run for an answer to be tried.

A lab computes for a minute; its answers need little of that. So the answers are tried first with what they need: the
statements that define a name that the answer uses, found from the syntax alone (`needed`). Where that is not enough,
the cells that the student wrote or changed run whole (`changed_cells`), with what they need. Lines keep their numbers.
"""

from __future__ import annotations

import ast
import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from IPython.core.inputtransformer2 import TransformerManager

from refusallab.errors import RefusalLabError

LARGEST = 50 << 20  # bytes of a notebook, with its outputs
MOST_CELLS = 2_000
MOST_CODE = 1_000_000  # characters in all code cells
LONGEST = 200_000  # characters of a cell that is read
MAGIC = re.compile(r"^[ \t]*[%!?,;/]|\?[ \t]*$|=[ \t]*[%!]", flags=re.M)  # a line that IPython may have to rewrite
MOST_MAGIC = 1_000_000  # of such lines times the characters of their cell, each of which IPython reads for each line
HARMLESS = {"print", "display", "check", "progress", "help", "len", "type"}  # skipping such a call changes no answer


@dataclass(frozen=True)
class Cell:
    """A cell of a notebook, of any format, with or without metadata."""

    kind: str  # "code", "markdown", ...
    source: str
    tag: dict[str, str] = field(default_factory=dict)  # {"role": ..., "exercise" or "number": ...}; empty if lost


def read_cells(data: bytes) -> list[Cell]:
    """The cells of a notebook file. RefusalLabError, with the reason, if it is not one."""
    if not data.strip():
        raise RefusalLabError("The file is empty.")
    if len(data) > LARGEST:
        raise RefusalLabError(f"The file is larger than {LARGEST >> 20} MB: clear the outputs of its cells.")
    try:
        notebook = json.loads(data.decode("utf-8-sig"))
        cells = notebook["cells"] if "cells" in notebook else notebook["worksheets"][0]["cells"]
        if len(cells) > MOST_CELLS:
            raise RefusalLabError(f"The notebook has {len(cells)} cells. At most {MOST_CELLS} are read.")
        found = [_cell(cell) for cell in cells]
    except UnicodeDecodeError as error:
        raise RefusalLabError("The file is not text in UTF-8, so it is not a notebook.") from error
    except (ValueError, RecursionError) as error:
        raise RefusalLabError(f"The file is damaged or cut off: {str(error)[:100]}.") from error
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise RefusalLabError("The file is JSON, but not a notebook.") from error
    if (size := sum(len(cell.source) for cell in found if cell.kind == "code")) > MOST_CODE:
        raise RefusalLabError(f"The notebook has {size:,} characters of code. At most {MOST_CODE:,} are read.")
    return found


def _cell(raw: dict[str, Any]) -> Cell:
    source = raw.get("source", raw.get("input", ""))
    tag = raw.get("metadata", {}).get("refusallab", {})
    text = source if isinstance(source, str) else "".join(map(str, source))
    return Cell(str(raw["cell_type"]), lines_as_in_python(text), tag if isinstance(tag, dict) else {})


def lines_as_in_python(text: str) -> str:
    """A text whose lines end with \\n alone. Python ends them at \\n, \\r and \\r\\n; `splitlines` at more."""
    return re.sub(r"\r\n?", "\n", text)


@dataclass(frozen=True)
class Statement:
    """A statement at the top level of a cell, and the names that matter to others."""

    cell: int
    node: ast.stmt
    first: int  # line, from 1
    last: int
    binds: frozenset[str]  # names that it defines
    uses: frozenset[str]
    changes: frozenset[str]  # names whose values it may change
    imports: bool
    stub: bool  # a function that is not written yet
    harmless: bool


class Notebook:
    """The code of a notebook, read but not run."""

    def __init__(self, cells: Sequence[Cell]):
        self.cells = list(cells)
        self.problems: dict[int, str] = {}  # cells that are not Python, with the reason

    @cached_property
    def trees(self) -> dict[int, ast.Module]:
        """The syntax of every code cell that has one. Fills `problems`."""
        found, magic = {}, 0
        for index, cell in enumerate(self.cells):
            if cell.kind == "code":
                try:
                    cost = len(MAGIC.findall(cell.source)) * len(cell.source)
                    if cost and magic + cost > MOST_MAGIC:
                        raise ValueError("too many magics and shell lines")
                    magic += cost
                    found[index] = _parse(cell.source)
                except SyntaxError as error:
                    self.problems[index] = f"line {error.lineno}: {error.msg}"
                except Exception as error:  # what IPython and Python say about odd cells is not one kind of error
                    self.problems[index] = str(error) or "nested too deep"
        return found

    @cached_property
    def statements(self) -> list[Statement]:
        return [_statement(index, node) for index, tree in self.trees.items() for node in tree.body]

    @cached_property
    def bindings(self) -> dict[str, list[tuple[int, ast.stmt]]]:
        """For each name the statements that define it, with the cells they stand in."""
        found = defaultdict(list)
        for s in self.statements:
            for name in s.binds:
                found[name].append((s.cell, s.node))
        return found

    def functions(self, name: str) -> list[tuple[int, ast.FunctionDef | ast.AsyncFunctionDef]]:
        """The definitions of a function, with the cells they stand in. Stubs only if there is nothing else."""
        kinds = ast.FunctionDef | ast.AsyncFunctionDef
        found = [(i, n) for i, n in self.bindings.get(name, ()) if isinstance(n, kinds)]
        return [pair for pair in found if not _is_stub(pair[1])] or found

    def problem_of(self, name: str) -> str:
        """Why a function cannot be read, if its cell is not Python."""
        for index, problem in self.problems.items() if self.trees is not None else ():
            if re.search(rf"^\s*(async\s+)?def\s+{name}\b", self.cells[index].source, flags=re.M):
                return problem
        return ""

    def needed(self, names: Collection[str], whole: Collection[int] = ()) -> list[tuple[int, str]]:
        """What to run, cell by cell, so that `names` are defined and the cells `whole` have run."""
        candidates, whole = self._without_stubs(), set(whole)
        variables = {name for s in candidates if not s.imports for name in s.binds}
        touching = defaultdict(list)  # for each name, what defines it or may change it
        for place, s in enumerate(candidates):
            for name in s.binds | s.changes & variables:
                touching[name].append(place)
        chosen: set[int] = set()
        todo = [place for place, s in enumerate(candidates) if s.cell in whole or "*" in s.binds]
        wanted, names = set(), list(names)
        while todo or names:
            if todo:
                place = todo.pop()
                if place not in chosen:
                    chosen.add(place)
                    names += candidates[place].uses
            elif (name := names.pop()) not in wanted:
                wanted.add(name)
                todo += touching[name]
        by_cell = _by_cell(candidates[place] for place in sorted(chosen))
        return [(i, self._source(i, by_cell[i], i in whole)) for i in sorted(by_cell)]

    def _without_stubs(self) -> list[Statement]:
        written = {name for s in self.statements if not s.stub for name in s.binds}
        return [s for s in self.statements if not (s.stub and s.binds <= written)]

    def _source(self, index: int, chosen: Sequence[Statement], whole: bool) -> str:
        lines = self.cells[index].source.split("\n")
        if whole:
            kept = {id(s) for s in chosen}
            dropped = {n for s in self._statements_of[index] if id(s) not in kept for n in _lines(s)}
            return "\n".join("" if n in dropped else line for n, line in enumerate(lines, 1))
        kept = {n for s in chosen for n in _lines(s)}
        return "\n".join(line if n in kept else "" for n, line in enumerate(lines, 1)).rstrip()

    @cached_property
    def _statements_of(self) -> dict[int, list[Statement]]:
        return _by_cell(self.statements)

    def own_cells(self, released: Collection[str]) -> list[int]:
        """The code cells that do something which `needed` may have left out, and are not as they were released."""
        known = {squeeze(source) for source in released}
        return [
            index
            for index in self.trees
            if squeeze(self.cells[index].source) not in known
            and any(not s.harmless for s in self._statements_of[index])
        ]


def _by_cell(statements: Iterable[Statement]) -> dict[int, list[Statement]]:
    found = defaultdict(list)
    for s in statements:
        found[s.cell].append(s)
    return found


def _lines(s: Statement) -> range:
    return range(s.first, s.last + 1)


def squeeze(source: str) -> str:
    """A source without white space, to compare it."""
    return "".join(source.split())


def _parse(source: str) -> ast.Module:
    if len(source) > LONGEST:
        raise ValueError(f"a cell of more than {LONGEST} characters")
    body = source.lstrip()
    if body.startswith("%%"):  # %%time and the like stand above ordinary code
        body = re.sub(r"^%%.*", "pass", body, count=1)
    space = source[: len(source) - len(source.lstrip())]
    indent, above = space.rpartition("\n")[2], space.count("\n")
    return ast.increment_lineno(ast.parse(TransformerManager().transform_cell(indent + body)), above)


def _is_stub(node: ast.AST) -> bool:
    """Whether a function has nothing but a docstring and `raise NotImplementedError()`, `pass` or `...`."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    body = [n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
    return all(isinstance(n, ast.Pass) or (isinstance(n, ast.Raise) and _not_written(n)) for n in body)


def _not_written(node: ast.Raise) -> bool:
    return any(isinstance(n, ast.Name) and n.id == "NotImplementedError" for n in ast.walk(node))


def _statement(cell: int, node: ast.stmt) -> Statement:
    definition = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    imports = isinstance(node, ast.Import | ast.ImportFrom)
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    stored, uses, changes, inner = set(), set(), set(), set()
    for part in ast.walk(node):
        match part:
            case ast.Name(id=name, ctx=ast.Load()):
                uses.add(name)
            case ast.Name(id=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                stored.add(name)
            case ast.ClassDef(name=name):
                stored.add(name)
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                stored |= {alias.asname or alias.name.split(".")[0] for alias in names}
            case ast.arg(arg=name):
                inner.add(name)
            case ast.comprehension(target=target):
                inner |= {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
            case ast.Attribute(ctx=ast.Store()) | ast.Subscript(ctx=ast.Store()):
                changes |= _base(part)
            case ast.Call(func=ast.Attribute(value=owner)):
                changes |= _base(owner)
        if isinstance(part, ast.AugAssign):
            uses |= _base(part.target)
    if definition:
        binds, uses, changes = {node.name}, uses - stored - inner, set()
    else:
        binds, uses = stored - inner, uses - inner
    return Statement(
        cell,
        node,
        first,
        node.end_lineno or node.lineno,
        frozenset(binds),
        frozenset(uses),
        frozenset(changes),
        imports,
        _is_stub(node),
        definition or imports or _is_harmless(node),
    )


def _base(node: ast.AST) -> set[str]:
    """The name at the root of a.b[c]."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Starred):
        node = node.value
    return {node.id} if isinstance(node, ast.Name) else set()


def _is_harmless(node: ast.stmt) -> bool:
    match node:
        case ast.Expr(value=ast.Constant()) | ast.Expr(value=ast.Name()):
            return True
        case ast.Expr(value=ast.Call(func=ast.Name(id=name))):
            return name in HARMLESS
    return False
