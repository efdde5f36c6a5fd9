"""Notebooks of the course: what the generated cells say, and the stamp that writes them.

A cell tells what it is in its metadata, {"refusallab": {"role": ..., "exercise" or "number": ...}}:

setup      code, generated, the same in every lab
header     markdown, generated from the Exercise: title, difficulty, minutes, points
hints      markdown, generated from the Exercise, put before its answer cell
answer     code, by the author, the solution between ### BEGIN SOLUTION and ### END SOLUTION
check      code, generated: the check that students see, and a hidden one with another seed
question   markdown, generated from the Question
written    markdown, by the author: a model answer
rubric     markdown, by the author: how to grade the answer; in solutions only
real       code, by the author: what the lab measures, on a hub model
"""

from __future__ import annotations

import copy
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from nbformat import NotebookNode
from nbformat.notebooknode import from_dict
from nbformat.v4 import new_markdown_cell

from refusallab.course.catalogue import QUESTIONS, Question
from refusallab.course.exercise import Exercise
from refusallab.course.exercises import every_exercise
from refusallab.errors import RefusalLabError

DIFFICULTY = {1: "●○○ easy", 2: "●●○ medium", 3: "●●● hard"}
HIDDEN_SEED = 1
FOLDED = {"jupyter": {"source_hidden": True}, "cellView": "form"}  # in JupyterLab, in Colab
SKIPPED = "nbval-skip"  # the tag of cells whose outputs depend on what models a computer has
WIDGET = "application/vnd.jupyter.widget-view+json"
BADGES = "[![Open in Colab]"

SETUP = """\
# @title Set-up, the same in every lab: find the course (or unpack labs.zip), then load the model.
import importlib.util
import sys
import zipfile
from pathlib import Path

if importlib.util.find_spec("refusallab") is None:
    file = next((path for path in (Path("labs.zip"), Path("/content/labs.zip")) if path.is_file()), None)
    try:
        with zipfile.ZipFile(file or {otherwise}) as archive:
            root = next(Path(x).parents[1] for x in archive.namelist() if x.endswith("refusallab/colab.py"))
            archive.extractall()
    except Exception as e:
        bad = file and (f" {{file}}: {{e}}." if isinstance(e, OSError) else f" {{file}} is not whole (yet): remove it.")
        upload, place = "Upload labs.zip (folder icon, left)", "Start with `make lab`, or put labs.zip beside this file"
        what = upload if "google.colab" in sys.modules else place
        stop = ImportError(f"The course is not installed here.{{bad or ''}} {{what}}, then run this cell again.")
        stop._render_traceback_ = lambda: [str(stop)]
        raise stop from None
    sys.path.insert(0, str(root.resolve()))
    importlib.import_module("refusallab.colab").install()

from refusallab.course import check, progress, solved, start

m = start()"""
EXPLAIN = '"labs.zip"'  # where the course cannot be fetched: the error of a file that is not there leads to the line
DOWNLOAD = """\
importlib.import_module("urllib.request").urlretrieve(
            "{address}/archive/HEAD.zip", "labs.zip"
        )[0]"""


def read_address(root: Path) -> str:
    """Where the repository is published: `address` under [tool.refusallab] in pyproject.toml. Empty until it is."""
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["refusallab"]["address"]


def role(cell: NotebookNode) -> str:
    """The role of a cell, empty for an ordinary one."""
    return cell.metadata.get("refusallab", {}).get("role", "")


def exercise_number(cell: NotebookNode) -> str:
    """The number of the exercise or question that a cell belongs to, empty for none."""
    tag = cell.metadata.get("refusallab", {})
    return tag.get("exercise", tag.get("number", ""))


def stamp(nb: NotebookNode, name: str, address: str = "") -> NotebookNode:
    """A copy of the notebook `name` with its generated cells filled, and without what varies from run to run.

    Stamping twice changes nothing more. `address` is that of the repository; badges appear once there is one.
    """
    nb = from_dict({**copy.deepcopy(nb), "nbformat": 4, "nbformat_minor": 5})
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    nb.metadata = from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    nb.cells = _with_hints(nb.cells)
    for index, cell in enumerate(nb.cells):
        grader = _grader(cell)
        cell.id = grader.get("grade_id", f"{role(cell) or 'cell'}-{exercise_number(cell).replace('.', '-') or index}")
        cell.source = _source(cell, address)
        if role(cell) in ("header", "question") and cell.cell_type == "code":
            cell.cell_type = "markdown"
            del cell["outputs"], cell["execution_count"]
        kept = {key: cell.metadata[key] for key in ("refusallab", "tags", "jupyter") if key in cell.metadata}
        if role(cell) == "setup":
            kept |= FOLDED
        if role(cell) == "real":
            kept["tags"] = [SKIPPED]
        cell.metadata = from_dict(kept | ({"nbgrader": grader} if grader else {}))
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET, None)
    _put_badges(nb.cells, name, address)
    return nb


def _with_hints(cells: list[NotebookNode]) -> list[NotebookNode]:
    """The cells, with one for the hints before each answer."""
    result: list[NotebookNode] = []
    for cell in cells:
        if role(cell) == "answer":
            tag = {"role": "hints", "exercise": exercise_number(cell)}
            result.append(new_markdown_cell(metadata={"refusallab": tag}))
        if role(cell) != "hints":
            result.append(cell)
    return result


def _definition(cell: NotebookNode) -> Any:
    known = {item.number: item for item in (*every_exercise(), *QUESTIONS)}
    if exercise_number(cell) not in known:
        raise RefusalLabError(
            f"A {role(cell)} cell names {exercise_number(cell)!r}: it is not one of {', '.join(known)}."
        )
    return known[exercise_number(cell)]


def _source(cell: NotebookNode, address: str) -> str:
    match role(cell):
        case "setup":
            return SETUP.format(otherwise=DOWNLOAD.format(address=address) if address else EXPLAIN)
        case "header":
            return header_cell(_definition(cell))
        case "hints":
            return hints(_definition(cell))
        case "check":
            return check_source(_definition(cell))
        case "question":
            return question_header(_definition(cell))
    return cell.source


def header_cell(e: Exercise) -> str:
    """The cell above an exercise."""
    return f"### Exercise {e.number} · {e.title}\n\n{DIFFICULTY[e.difficulty]} · {e.minutes} minutes · {_points(e)}"


def hints(e: Exercise) -> str:
    """The hints of an exercise, each folded away."""
    return "\n\n".join(
        f"<details><summary>Hint {i} of {len(e.hints)}</summary>\n\n{hint}\n\n</details>"
        for i, hint in enumerate(e.hints, 1)
    )


def check_source(e: Exercise) -> str:
    """The check of an exercise: once in sight, once with a seed that students do not see."""
    return (
        f'check("{e.number}", {e.function})\n### BEGIN HIDDEN TESTS\n'
        f'check("{e.number}", {e.function}, seed={HIDDEN_SEED})\n### END HIDDEN TESTS'
    )


def question_header(q: Question) -> str:
    """The cell above a written question."""
    return f"### Question {q.number} · {q.title}\n\n{q.minutes} minutes · {_points(q)}, graded by a person"


def _points(item: Exercise | Question) -> str:
    return f"{item.points} point{'s' if item.points != 1 else ''}"


def _grader(cell: NotebookNode) -> dict[str, Any]:
    """What nbgrader has to know of a cell, in its own metadata format."""
    kinds = {  # role: grade id, solution, grade, locked
        "header": ("header", False, False, True),
        "hints": ("hints", False, False, True),
        "answer": ("ex", True, False, False),
        "check": ("check", False, True, True),
        "question": ("question", False, False, True),
        "written": ("written", True, True, False),
    }
    if role(cell) not in kinds:
        return {}
    prefix, solution, grade, locked = kinds[role(cell)]
    fields = {
        "grade_id": f"{prefix}-{exercise_number(cell).replace('.', '-')}",
        "solution": solution,
        "grade": grade,
        "locked": locked,
        "task": False,
        "schema_version": 3,
    }
    return fields | ({"points": _definition(cell).points} if grade else {})


def launch_addresses(name: str, address: str) -> dict[str, str]:
    """Where the lab `name` of the repository at `address` opens; for a hub, where its address is put into a link."""
    owner_and_repository, path = "/".join(address.split("/")[-2:]), f"labs/{name}.ipynb"
    on_hub = urlencode({"repo": address, "urlpath": f"lab/tree/{address.split('/')[-1]}/{path}"})
    return {
        "Colab": f"https://colab.research.google.com/github/{owner_and_repository}/blob/HEAD/{path}",
        "Binder": f"https://mybinder.org/v2/gh/{owner_and_repository}/HEAD?labpath={quote(path, safe='')}",
        "a JupyterHub": f"https://nbgitpuller.readthedocs.io/en/latest/link.html?{on_hub}",
    }


def _put_badges(cells: list[NotebookNode], name: str, address: str) -> None:
    first = next((cell for cell in cells if cell.cell_type == "markdown"), None)
    if first is None:
        return
    lines = [line for line in first.source.split("\n\n") if not line.startswith(BADGES)]
    if address:
        places = launch_addresses(name, address)
        lines.insert(
            1,
            f"{BADGES}(https://colab.research.google.com/assets/colab-badge.svg)]({places['Colab']}) "
            f"[![Open in Binder](https://mybinder.org/badge_logo.svg)]({places['Binder']})",
        )
    first.source = "\n\n".join(lines)
