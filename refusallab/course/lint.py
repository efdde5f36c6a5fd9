"""Rules that every notebook of the course keeps, as far as a machine can check them. solutions/README.md lists them."""

from __future__ import annotations

import ast
import itertools
import re
import symtable
from collections.abc import Iterator
from pathlib import Path

from nbformat import NotebookNode

from refusallab.course.catalogue import HEADERS, QUESTIONS
from refusallab.course.notebook import exercise_number, role
from refusallab.course.plan import problems, read_plan
from refusallab.course.release import read

LINES = 25
COLUMNS = 100  # of code: what fits beside the margins of a laptop
PLACES = 6  # that a lab imports from, of the course's own: more are hard to remember
ROW = re.compile(r"\S {2,}\S.*\S {2,}\S")  # of a printed table: three columns or more
SECTIONS = ("What you will be able to do", "On a real model", "What this lab does not show", "References")
CAPTION = re.compile(r"\*Figure: [^*]{30,}\*")
GRADED = ("setup", "header", "hints", "answer", "check", "question", "written", "rubric")
NOT_PORTABLE = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|var|mnt|Users)/|\b[A-Z]:\\\w")
VOLATILE = {
    "an address in memory": re.compile(r"\b0x[0-9a-f]{6,}", re.I),
    "a measured time": re.compile(r"\b\d+(?:\.\d+)?\s?(?:ns|µs|us|ms|s|sec|seconds|it/s)\b"),
}
CLOCKS = re.compile(r"\bperf_counter\(|\btime\.time\(")
MARKERS = re.compile(r"### (?:BEGIN|END) (?:SOLUTION|HIDDEN TESTS)")
TERMS = {  # the course's term: what must not be written instead
    "resid_pre": r"resid(?:ual)?[- ]pre\b|residual_pre\b",
    "resid_mid": r"resid(?:ual)?[- ]mid\b|residual_mid\b",
    "resid_post": r"resid(?:ual)?[- ]post\b|residual_post\b",
    "difference in means": r"difference-in-means|differences? (?:of|between) (?:the )?means|mean-difference",
    "activation addition": r"activation-addition|addition of activations",
    "directional ablation": r"directional-ablation|direction ablation",
    "weight orthogonalization": r"orthogonalis\w+|weight-orthogonalization|weights orthogonalization",
    "unembedding": r"un-embedding",
    "chat template": r"chat-template",
    "post-instruction": r"post instruction|postinstruction",
    "HarmBench": r"(?-i:Harmbench|harmbench|HARMBENCH)|Harm[- ]Bench",
    "JailbreakBench": r"(?-i:Jailbreakbench|JailBreakBench|jailbreakbench)|Jailbreak[- ]Bench",
    "AdvBench": r"(?-i:Advbench|advbench)|Adv[- ]Bench",
    "Wilson interval": r"Wilson confidence|Wilson's",
}

Problems = Iterator[tuple[NotebookNode, str]]


def lint(path: Path) -> list[str]:
    """One line for each rule that a notebook breaks."""
    nb = read(path)
    rules = (
        headings, alternatives, code, one_figure, places, portable, reproducible, links, graded_cells, independent,
        skippable, sections, terms,
    )  # fmt: skip
    return [f"{path}: {cell.id}: {text}" for rule in rules for cell, text in rule(nb, path)]


def is_released(path: Path) -> bool:
    """Whether a notebook is for students."""
    return path.resolve().parent.name == "labs"


def _markdown(nb: NotebookNode) -> Iterator[tuple[NotebookNode, str]]:
    """Markdown cells and their text without code blocks."""
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            yield cell, re.sub(r"^```.*?^```", "", cell.source, flags=re.M | re.S)


def _headings(nb: NotebookNode) -> Iterator[tuple[NotebookNode, int, str]]:
    for cell, text in _markdown(nb):
        for marks, title in re.findall(r"^(#{1,6}) +(.+?)\s*$", text, flags=re.M):
            yield cell, len(marks), title


def _outputs(cell: NotebookNode) -> Iterator[tuple[str, str]]:
    """The outputs of a cell as (kind, text)."""
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            yield output.name, output.text
        elif output.output_type == "error":
            yield "error", f"{output.ename}: {output.evalue}"
        yield from output.get("data", {}).items()


def headings(nb: NotebookNode, path: Path) -> Problems:
    """One title at the top, and no level skipped below it."""
    above = 0
    for cell, level, title in _headings(nb):
        if (level == 1) != (above == 0):
            yield cell, f"a notebook has one title, at its top: {title!r}"
        elif level > above + 1:
            yield cell, f"a heading skips a level: {title!r}"
        above = level


def alternatives(nb: NotebookNode, path: Path) -> Problems:
    """Images have alt text. The cell below a figure describes it: `*Figure: ...*`."""
    for cell, text in _markdown(nb):
        if re.search(r"!\[\s*\]", text) or _without_alt(text):
            yield cell, "an image without alt text"
    for cell, below in itertools.zip_longest(nb.cells, nb.cells[1:]):
        outputs = list(_outputs(cell))
        if any(kind == "text/html" and _without_alt(text) for kind, text in outputs):
            yield cell, "its output has an image without alt text"
        if any(kind.startswith("image/") for kind, _ in outputs) and not (below and CAPTION.match(below.source)):
            yield cell, "the cell below must describe the figure: *Figure: ...*, 30 characters or more"


def _without_alt(html: str) -> bool:
    return any(not re.search(r"\balt=[\"'][^\"']", tag) for tag in re.findall(r"<img\b[^>]*>", html))


def code(nb: NotebookNode, path: Path) -> Problems:
    """Code cells are short, and nothing meant for instructors reaches students."""
    for cell in nb.cells:
        lines = cell.source.count("\n") + 1
        if cell.cell_type == "code" and lines > LINES:
            yield cell, f"{lines} lines of code; {LINES} is the most"
        columns = max(map(len, cell.source.split("\n")))
        if cell.cell_type == "code" and role(cell) != "setup" and columns > COLUMNS:
            yield cell, f"{columns} columns of code; {COLUMNS} is the most"
        if is_released(path) and (MARKERS.search(cell.source) or role(cell) == "rubric"):
            yield cell, "this belongs only in solutions/"
        if is_released(path) and cell.get("outputs"):
            yield cell, "a released notebook has no outputs"


def one_figure(nb: NotebookNode, path: Path) -> Problems:
    """A cell shows one figure at most, last, and one table at most."""
    for cell in nb.cells:
        outputs = list(_outputs(cell))
        if sum(kind.startswith("image/") for kind, _ in outputs) > 1:
            yield cell, "two figures: make two cells of it"
        printed = "".join(text for kind, text in outputs if kind == "stdout")
        tables = [part for part in re.split(r"\n\s*\n", printed) if len(ROW.findall(part)) > 1]
        if len(tables) > 1:
            yield cell, "two tables: make two cells of it"
        if cell.cell_type == "code" and "plt.show()" in cell.source.rstrip().removesuffix("plt.show()"):
            yield cell, "plt.show() comes last, once"


def places(nb: NotebookNode, path: Path) -> Problems:
    """What a lab imports of the course comes from few places. `refusallab` offers most of it."""
    found = set()
    for cell in nb.cells:
        if cell.cell_type != "code" or role(cell) == "setup":
            continue
        try:
            nodes = list(ast.walk(ast.parse(cell.source)))
        except SyntaxError:
            continue  # `independent` says so
        found |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module}
    own = sorted(name for name in found if name.partition(".")[0] in ("refusallab", "smallmodels"))
    if len(own) > PLACES:
        yield nb.cells[0], f"it imports from {len(own)} places: {', '.join(own)}; {PLACES} is the most"


def portable(nb: NotebookNode, path: Path) -> Problems:
    """No path of one particular computer."""
    for cell in nb.cells:
        for text in (cell.source, *(str(text) for kind, text in _outputs(cell) if not kind.startswith("image/"))):
            if found := NOT_PORTABLE.search(text):
                yield cell, f"a path of one computer: {found[0]}"


def reproducible(nb: NotebookNode, path: Path) -> Problems:
    """Outputs are the same in each run, and free of errors and warnings."""
    for cell in nb.cells:
        if cell.cell_type == "code" and CLOCKS.search(cell.source):
            yield cell, "it measures time, which differs in each run"
        for kind, text in _outputs(cell):
            if kind in ("stderr", "error"):
                yield cell, f"{kind} in its output: {text.strip().splitlines()[0]}"
            if kind in ("stdout", "text/plain"):
                yield from ((cell, f"its output shows {what}") for what, sign in VOLATILE.items() if sign.search(text))


def links(nb: NotebookNode, path: Path) -> Problems:
    """Links to files of the repository lead somewhere."""
    for cell, text in _markdown(nb):
        for target in re.findall(r"\]\(([^)\s]+)|\b(?:src|href)=[\"']([^\"']+)", text):
            file = "".join(target).partition("#")[0]
            if file and not re.match(r"https?://|mailto:", file) and not (path.parent / file).exists():
                yield cell, f"a link that leads nowhere: {file}"


def graded_cells(nb: NotebookNode, path: Path) -> Problems:
    """Every exercise and question of the lab once, in order, with all its cells; one set-up cell."""
    lab, released = path.name[:2], is_released(path)
    question = ("question", "written") if released else ("question", "written", "rubric")
    wanted = [("setup", "")]
    wanted += [(r, e.number) for e in HEADERS if e.lab == lab for r in ("header", "hints", "answer", "check")]
    wanted += [(r, q.number) for q in QUESTIONS if q.lab == lab for r in question]
    cells = [cell for cell in nb.cells if role(cell) in GRADED]
    for cell, want in itertools.zip_longest(cells, wanted):
        if cell is None or want is None or (role(cell), exercise_number(cell)) != want:
            got = "the end" if cell is None else f"{role(cell)} {exercise_number(cell)}".strip()
            yield cell or nb.cells[-1], f"{got} where {' '.join(want).strip() if want else 'nothing'} should be"
            return
    functions = {e.number: e.function for e in HEADERS}
    for cell in cells:
        if role(cell) != "answer":
            continue
        if not re.search(
            rf"^def {functions[exercise_number(cell)]}\(.*?:\n    r?\"\"\"", cell.source, flags=re.M | re.S
        ):
            yield cell, f"it must define {functions[exercise_number(cell)]} with a docstring"
        if not released and len(MARKERS.findall(cell.source)) != 2:
            yield cell, "it needs one pair of ### BEGIN SOLUTION and ### END SOLUTION"


def _outside_solved(tree: ast.AST) -> Iterator[ast.Name]:
    """The names in some code, but for those that it hands to `solved`."""
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id == "solved":
        return
    if isinstance(tree, ast.Name):
        yield tree
    for child in ast.iter_child_nodes(tree):
        yield from _outside_solved(child)


def independent(nb: NotebookNode, path: Path) -> Problems:
    """Cells take what students write through `solved`: an unsolved lab fails at its checks and nowhere else."""
    answers = {e.function for e in HEADERS if e.lab == path.name[:2]}
    for cell in nb.cells:
        if cell.cell_type != "code" or role(cell) == "check":
            continue
        try:
            tree = ast.parse(cell.source)
        except SyntaxError as error:
            yield cell, f"not plain Python: {error.msg}"
            continue
        if role(cell) == "answer":
            allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef)
            if not all(isinstance(statement, allowed) for statement in tree.body):
                yield cell, "an answer holds imports and functions only"
        elif used := answers & {node.id for node in _outside_solved(tree)}:
            yield cell, f"it uses {min(used)}, which students write: take solved(number, {min(used)})"


def names(source: str) -> tuple[set[str], set[str], set[str]]:
    """Names that code sets, those whose values it changes in place, and those that it reads; without names of loops."""
    scope = symtable.symtable(source, "code", "exec")
    assigned = {name.get_name() for name in scope.get_symbols() if name.is_assigned() or name.is_imported()}
    read = {name.get_name() for name in scope.get_symbols() if name.is_referenced()}
    inner = [*scope.get_children()]
    for table in inner:
        read |= {name.get_name() for name in table.get_symbols() if name.is_global()}
        inner += table.get_children()
    changed, loops = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.For):
            loops |= {part.id for part in ast.walk(node.target) if isinstance(part, ast.Name)}
        place = node if isinstance(getattr(node, "ctx", None), ast.Store) else None
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            place = node.value.func  # such as rows.append(row)
        while isinstance(place, ast.Attribute | ast.Subscript):
            place = place.value
            changed |= {place.id} if isinstance(place, ast.Name) else set()
    return assigned - loops, changed, read - loops


def skippable(nb: NotebookNode, path: Path) -> Problems:
    """A part whose heading says that it is optional can be left out: no other cell needs what its cells set."""
    level, imported = 7, set()  # of the heading of the part
    known, values = set(), set()  # names that other cells set, and those that were last set in such a part
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            for marks, title in re.findall(r"^(#{1,6}) +(.+)", cell.source, flags=re.M):
                if len(marks) <= level:
                    level = len(marks) if "optional" in title.lower() else 7
            continue
        try:
            statements = ast.parse(cell.source).body
        except SyntaxError:
            continue  # `independent` says so
        for statement in statements:
            assigned, changed, read = names(ast.unparse(statement))
            imports = isinstance(statement, ast.Import | ast.ImportFrom)
            imported |= assigned if imports else set()
            if level < 7:
                values |= (assigned - known if imports else assigned) | (changed - imported)
                continue
            own = assigned if hasattr(statement, "body") else set()  # a block may set what it reads
            if missing := sorted((read & values) - own):
                yield cell, f"it needs {missing[0]}, which an optional part sets"
            known |= assigned
            values -= assigned


def sections(nb: NotebookNode, path: Path) -> Problems:
    """The sections that every lab has, and a plan that fits its exercises."""
    titles = {title for _, level, title in _headings(nb) if level == 2}
    yield from ((nb.cells[0], f"no section {title!r}") for title in SECTIONS if title not in titles)
    yield from ((nb.cells[0], problem) for problem in problems(read_plan(nb.cells[0].source), path.name[:2]))


def terms(nb: NotebookNode, path: Path) -> Problems:
    """One name for one thing."""
    for cell in nb.cells:
        for term, others in TERMS.items():
            if found := re.search(rf"\b(?:{others})", cell.source, flags=re.I):
                yield cell, f"{found[0]!r}: write {term!r}"
