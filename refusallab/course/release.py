"""From solutions/ to labs/: execute the solutions, and make of them what students open.

The release is nbgrader's own: its preprocessors put stubs where solutions were, drop hidden tests, lock cells and add
checksums, so whatever reads that format can collect and grade the notebooks.
"""

from __future__ import annotations

import contextlib
import copy
import os
import subprocess
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from nbformat.v4 import new_notebook
from nbgrader import preprocessors
from nbgrader.preprocessors import NbGraderPreprocessor

from refusallab.course.notebook import SKIPPED, read_address, role, stamp
from refusallab.course.plan import lab_table, read_plan
from refusallab.errors import RefusalLabError

FOLDER = "refusal-mechanics-labs"  # the one folder inside the archive
ARCHIVED = (
    "*.md",
    "*.toml",
    "LICENSE*",
    "NOTICE",
    "constraints.txt",
    "labs/**/*",
    "refusallab/**/*",
    "smallmodels/**/*",
)
EPOCH = (1980, 1, 1, 0, 0, 0)  # the date of every file in the archive


class RemoveRubrics(NbGraderPreprocessor):
    """Rubrics are for those who grade."""

    def preprocess(self, nb: NotebookNode, resources: dict) -> tuple[NotebookNode, dict]:
        nb.cells = [cell for cell in nb.cells if role(cell) != "rubric"]
        return nb, resources


STEPS = (
    RemoveRubrics,
    preprocessors.LockCells,
    preprocessors.ClearSolutions,
    preprocessors.ClearOutput,
    preprocessors.ClearHiddenTests,
    preprocessors.ComputeChecksums,
    preprocessors.CheckCellMetadata,
)


def to_lab(solution: NotebookNode) -> NotebookNode:
    """The student's version of a stamped solution."""
    nb, resources = copy.deepcopy(solution), {}
    for step in STEPS:
        nb, resources = step().preprocess(nb, resources)
    return nb


def solutions(root: Path, names: Sequence[str] = ()) -> list[Path]:
    """The notebooks in solutions/, or those whose names begin with one of `names` ("02")."""
    paths = sorted((root / "solutions").glob("*.ipynb"))
    for name in names or [""]:
        if not any(path.name.startswith(name) for path in paths):
            raise RefusalLabError(f"There is no notebook solutions/{name}*: run this in the folder of the repository.")
    return [path for path in paths if not names or path.name.startswith(tuple(names))]


def read(path: Path) -> NotebookNode:
    """A notebook from disk. RefusalLabError if it is not one."""
    try:
        return nbformat.read(path, as_version=4)
    except (OSError, ValueError) as error:
        raise RefusalLabError(f"{path} is not a notebook that can be read: {error}") from error


def text(nb: NotebookNode) -> str:
    """A notebook as it stands in a file."""
    return nbformat.writes(nb) + "\n"


def build(root: Path) -> dict[Path, str]:
    """Every file that the release writes: stamped solutions, and the labs made of them."""
    address, files, plans = read_address(root), {}, {}
    for path in solutions(root):
        solution = stamp(read(path), path.stem, address)
        files[path] = text(solution)
        files[root / "labs" / path.name] = text(to_lab(solution))
        plans[path.name] = read_plan(solution.cells[0].source)
    return files | {root / "labs" / "README.md": lab_table(plans)}


def out_of_date(root: Path) -> list[Path]:
    """Files that `release` would change or remove."""
    files = build(root)
    changed = [path for path, new in files.items() if not path.is_file() or path.read_text(encoding="utf-8") != new]
    return changed + [path for path in sorted((root / "labs").glob("[0-9][0-9]_*.ipynb")) if path not in files]


def release(root: Path, *, force: bool = False) -> list[Path]:
    """Stamp the solutions and bring labs/ up to date. Returns the paths that changed.

    RefusalLabError if a notebook in labs/ holds work that git does not have. With `force` it is replaced or removed.
    """
    files, changed = build(root), out_of_date(root)
    labs = [path for path in changed if path.parent == root / "labs" and path.suffix == ".ipynb"]
    if work := [str(path) for path in labs if path.is_file() and not force and not _git_has(path)]:
        raise RefusalLabError(
            f"Git does not have what is in {', '.join(work)}. Move this work elsewhere or commit it, and run release "
            "again. To lose it, or without git: refusallab release --force."
        )
    for path in changed:
        if path in files:
            path.write_text(files[path], encoding="utf-8", newline="\n")
        else:
            path.unlink()
    for path in labs:
        _git(path, "hash-object", "-w", path.name)  # the next release may replace it, before a commit too
    return changed


def _git_has(path: Path) -> bool:
    """Whether git's store of objects holds a file as it is now: it was committed, or the last release wrote it."""
    return _git(path, "cat-file", "-t", _git(path, "hash-object", path.name)) == "blob"


def _git(path: Path, *words: str) -> str:
    """What git says in the folder of a file: nothing where it fails or is missing."""
    with contextlib.suppress(OSError):
        return subprocess.run(["git", *words], cwd=path.parent, capture_output=True, text=True).stdout.strip()
    return ""


def execute(root: Path, path: Path, *, real: bool = False) -> None:
    """Stamp a solution and run it in place. RefusalLabError if a cell fails; the file is not touched then.

    Cells of the role real keep their outputs: with `real` they, and no others, are run, on the models of this computer.
    """
    nb = stamp(read(path), path.stem, read_address(root))
    run = new_notebook(cells=[cell for cell in nb.cells if role(cell) == "real"]) if real else nb
    here = {"metadata": {"path": path.parent}}
    options = {"record_timing": False, "store_widget_state": False, "coalesce_streams": True}
    client = NotebookClient(
        run, timeout=None if real else 900, skip_cells_with_tag="" if real else SKIPPED, resources=here, **options
    )
    with tempfile.TemporaryDirectory() as folder:
        # One thread, no progress made before and no bars: the same outputs everywhere.
        settings = {"REFUSALLAB_PROGRESS": f"{folder}/progress.sqlite", "TQDM_DISABLE": "1"}
        settings |= {} if real else {"OMP_NUM_THREADS": "1"}
        try:
            client.execute(env=os.environ | settings)
        except CellExecutionError as error:
            raise RefusalLabError(f"{path}: {error}") from error
    for count, cell in enumerate((cell for cell in nb.cells if cell.cell_type == "code"), 1):
        cell.execution_count = count
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
    path.write_text(text(stamp(nb, path.stem, read_address(root))), encoding="utf-8", newline="\n")


def archive(root: Path, target: Path) -> None:
    """Write labs, library and models to a zip file, the same bytes each time: the course for a machine without it."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as file:
        for path in _archived(root):
            entry = zipfile.ZipInfo(f"{FOLDER}/{path.relative_to(root).as_posix()}", EPOCH)
            entry.external_attr = 0o644 << 16
            file.writestr(entry, path.read_bytes())


def _archived(root: Path) -> Iterable[Path]:
    found = {path for pattern in ARCHIVED for path in root.glob(pattern) if path.is_file()}
    return sorted(path for path in found if not {"__pycache__", ".ipynb_checkpoints"} & set(path.parts))
