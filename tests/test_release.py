"""From solutions/ to labs/ to grades: what students get, and what the real nbgrader makes of what they hand in."""

import ast
import copy
import csv
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from nbgrader.apps import NbGraderAPI
from nbgrader.plugins import CsvExportPlugin
from traitlets.config.loader import PyFileConfigLoader
from typer.testing import CliRunner

from refusallab.cli import app
from refusallab.course import release
from refusallab.course.catalogue import HEADERS, QUESTIONS
from refusallab.course.notebook import exercise_number, launch_addresses, role, stamp
from refusallab.errors import RefusalLabError

ROOT = Path(__file__).parent.parent
SOLUTIONS = sorted(ROOT.glob("solutions/*.ipynb"))
ROLES = ("setup", "header", "hints", "answer", "check", "question", "written", "rubric")
STUB = "    # YOUR CODE HERE\n    raise NotImplementedError()"

MOST_MEMORY = 1048  # thousands of KiB, as the kernel counts: 1 GiB
PEAK = "import re\nprint(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1000)"
QUICK = "00"  # runs as a whole in `make test`, the others in `make test-nightly`
each_solution = pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
each_whole_lab = pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem[:2] == QUICK else pytest.mark.nightly)
        for path in SOLUTIONS
    ],
)


def read(path):
    """A solution as `release` sees it: the graded cells are up to date even where the file is not yet."""
    return stamp(nbformat.read(path, 4), path.stem)


def cells(nb, *roles):
    return [cell for cell in nb.cells if role(cell) in roles]


def core(*paths):
    """The set-up and the graded cells of some solutions, without everything between: one short notebook."""
    first, *others = [cells(read(path), *ROLES) for path in paths]
    return new_notebook(cells=[*first, *(c for other in others for c in other if role(c) != "setup")])


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A small repository with one solution, as the present directory."""
    for folder in ("solutions", "labs"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "labs" / "README.md").write_text("stays")
    (tmp_path / "solutions" / "02_x.ipynb").write_text(nbformat.writes(core(*SOLUTIONS[:1])))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*command):
    return CliRunner().invoke(app, [*map(str, command)])


class TestLabs:
    @pytest.mark.slow
    def test_solutions_are_stamped_and_labs_are_made_of_them(self):
        assert release.out_of_date(ROOT) == []

    @pytest.mark.slow
    @each_solution
    def test_a_stub_keeps_signature_and_docstring_and_nothing_of_the_answer(self, path):
        solution = read(path)
        lab = release.to_lab(solution)
        for answer, stub in zip(cells(solution, "answer"), cells(lab, "answer"), strict=True):
            (before, wanted), (after, got) = ((c, ast.parse(c.source).body[-1]) for c in (answer, stub))
            assert ast.unparse(wanted.args) == ast.unparse(got.args) and got.name == wanted.name
            assert ast.unparse(wanted.returns) == ast.unparse(got.returns)
            assert ast.get_docstring(wanted) == ast.get_docstring(got)
            assert after.source.count(STUB) == 1 and "SOLUTION" not in after.source
            body = re.search(r"### BEGIN SOLUTION\n(.*)\n    ### END SOLUTION", before.source, flags=re.S)[1]
            assert body not in nbformat.writes(lab)

    @pytest.mark.slow
    @each_solution
    def test_nothing_else_changes_but_what_must_not_be_seen(self, path):
        solution = read(path)
        lab = release.to_lab(solution)
        assert not cells(lab, "rubric") and not any(cell.get("outputs") for cell in lab.cells)
        assert "HIDDEN" not in nbformat.writes(lab) and not re.search(r"\bcheck\(.*seed=", nbformat.writes(lab))
        same = [c.source for c in solution.cells if role(c) not in ("answer", "check", "written", "rubric")]
        assert [c.source for c in lab.cells if role(c) not in ("answer", "check", "written")] == same
        assert {c.source for c in cells(lab, "written")} <= {"YOUR ANSWER HERE"}

    @pytest.mark.slow
    @each_solution
    def test_only_checks_and_headers_are_locked(self, path):
        for cell in release.to_lab(read(path)).cells:
            assert cell.metadata.get("editable", True) == (role(cell) not in ("header", "hints", "check", "question"))

    @pytest.mark.slow
    def test_unsolved_it_fails_at_each_check_and_solved_at_none(self, tmp_path):
        """All labs, one after the other, in one kernel. That other cells do not use answers is a rule of the linter."""
        solved = core(*SOLUTIONS)
        lab = release.to_lab(solved)
        answers = {exercise_number(cell): cell.source for cell in cells(solved, "answer")}
        again = copy.deepcopy(cells(lab, "answer", "check"))
        for cell in again:
            cell.source = answers[exercise_number(cell)] if role(cell) == "answer" else cell.source
            cell.id += "-solved"
        settings = {"OMP_NUM_THREADS": "1", "REFUSALLAB_PROGRESS": str(tmp_path / "progress.sqlite")}
        ran = new_notebook(cells=[*lab.cells, *again], metadata=lab.metadata)
        NotebookClient(ran, timeout=300, allow_errors=True).execute(env=os.environ | settings)

        assert [c.id for c in ran.cells if failure(c)] == [c.id for c in cells(lab, "check")]
        unsolved, solved = cells(ran, "check")[: len(answers)], cells(ran, "check")[len(answers) :]
        for cell in unsolved:
            shown = "".join(failure(cell).traceback)
            assert failure(cell).ename == "CheckFailed" and "not written yet" in shown and "Traceback" not in shown
        assert all(cell.outputs[0].text.startswith(f"✓ {exercise_number(cell)} ") for cell in solved)

    @each_whole_lab
    def test_unsolved_and_wrong_a_whole_lab_fails_at_its_checks_and_nowhere_else(self, path, tmp_path):
        """Every second answer is wrong, the others are not written: `solved` gives the library's version for both.

        It also fits into the memory of a small hub, without the cells on pretrained models.
        """
        lab = release.to_lab(read(path))
        for cell in cells(lab, "answer")[1::2]:
            cell.source = cell.source.replace(STUB, "    return None")
        lab.cells = [cell for cell in lab.cells if role(cell) != "real"]
        lab.cells += [new_code_cell(PEAK)] if sys.platform == "linux" else []
        settings = {"OMP_NUM_THREADS": "1", "REFUSALLAB_PROGRESS": str(tmp_path / "progress.sqlite")}
        NotebookClient(lab, timeout=600, allow_errors=True).execute(env=os.environ | settings)
        assert [c.id for c in lab.cells if failure(c)] == [c.id for c in cells(lab, "check")]
        assert {failure(c).ename for c in cells(lab, "check")} == {"CheckFailed"}
        if sys.platform == "linux":
            megabytes = int(lab.cells[-1].outputs[0].text)
            print(f"{path.stem}: {megabytes} MB at most")  # pytest -rP shows it
            assert megabytes <= MOST_MEMORY


def failure(cell):
    return next((o for o in cell.get("outputs", []) if o.output_type == "error" or o.get("name") == "stderr"), None)


class TestCommands:
    @pytest.mark.slow
    def test_release(self, course):
        (course / "labs" / "01_gone.ipynb").write_text(nbformat.writes(new_notebook()))
        subprocess.run("git init -q && git add labs", shell=True, check=True)
        assert run("release").exit_code == 0
        assert {path.name for path in (course / "labs").iterdir()} == {"README.md", "02_x.ipynb"}
        assert run("release").output == ""
        assert run("release", "--check").exit_code == 0

    @pytest.mark.parametrize("in_git", [True, False])
    def test_work_in_labs_stays_unless_it_is_given_up(self, course, in_git):
        if in_git:
            subprocess.run(["git", "init", "-q"], check=True)
        run("release")
        mine = [course / "labs" / name for name in ("02_x.ipynb", "03_y.ipynb", "my_notes.ipynb")]
        for path in mine:
            path.write_text(nbformat.writes(new_notebook(cells=[new_code_cell("mine = 1")])))
        said = run("release")
        assert said.exit_code == 1 and "labs/02_x.ipynb, labs/03_y.ipynb. Move" in said.output
        assert all("mine = 1" in path.read_text() for path in mine)
        assert run("release", "--force").exit_code == 0
        assert "mine = 1" not in mine[0].read_text() and not mine[1].exists() and "mine = 1" in mine[2].read_text()

    def test_what_a_release_wrote_the_next_one_may_replace(self, course):
        subprocess.run(["git", "init", "-q"], check=True)
        for text in ("# One", "# Two"):  # neither is committed
            nb = new_notebook(cells=[new_markdown_cell(text)])
            (course / "solutions" / "02_x.ipynb").write_text(nbformat.writes(nb))
            assert run("release").exit_code == 0
            assert text in (course / "labs" / "02_x.ipynb").read_text()

    def test_the_same_bytes_each_time(self, course):
        run("release")
        before = (course / "labs" / "02_x.ipynb").read_bytes()
        (course / "labs" / "02_x.ipynb").unlink()
        run("release")
        assert (course / "labs" / "02_x.ipynb").read_bytes() == before

    @pytest.mark.slow
    @pytest.mark.parametrize("file", ["solutions/02_x.ipynb", "labs/02_x.ipynb"])
    def test_check_names_what_was_edited_and_changes_nothing(self, course, file):
        run("release")
        nb = nbformat.read(file, 4)
        cells(nb, "check")[0].source += "\npass"
        (course / file).write_text(nbformat.writes(nb))
        result = run("release", "--check")
        assert result.exit_code == 1 and result.output.splitlines()[0] == f"out of date: {file}"
        assert nbformat.read(file, 4) == nb

    @pytest.mark.slow
    def test_check_names_what_is_missing_or_too_much(self, course):
        run("release")
        (course / "labs" / "02_x.ipynb").rename(course / "labs" / "03_y.ipynb")
        named = run("release", "--check").output.splitlines()
        assert named[:2] == ["out of date: labs/02_x.ipynb", "out of date: labs/03_y.ipynb"]

    @pytest.mark.slow
    def test_execute_stores_the_same_outputs_each_time(self, course):
        code = (
            "import ipywidgets, os\nipywidgets.IntSlider(3)",
            "print(os.path.exists(os.environ['REFUSALLAB_PROGRESS']))",
        )
        nb = new_notebook(cells=[new_code_cell(text) for text in code])
        (course / "solutions" / "02_x.ipynb").write_text(nbformat.writes(nb))
        assert run("execute", "02").exit_code == 0
        text = (course / "solutions" / "02_x.ipynb").read_text(encoding="utf-8")
        assert "IntSlider(value=3)" in text and "widget-view" not in text and "iopub" not in text
        assert '"False\\n"' in text  # no progress is made before, and none is left behind
        assert text == release.text(stamp(nbformat.reads(text, 4), "02_x"))

    @pytest.mark.slow
    def test_execute_leaves_a_notebook_with_a_failing_cell_alone(self, course):
        nb = new_notebook(cells=[new_code_cell("1 / 0")])
        (course / "solutions" / "02_x.ipynb").write_text(nbformat.writes(nb))
        result = run("execute")
        assert result.exit_code == 1 and "ZeroDivisionError" in result.output
        assert nbformat.read("solutions/02_x.ipynb", 4) == nb

    @pytest.mark.parametrize("command", ["execute", "lint"])
    def test_a_name_without_notebook_says_where_to_run(self, course, command):
        result = run(command, "07")
        assert result.exit_code == 1
        assert result.output == "There is no notebook solutions/07*: run this in the folder of the repository.\n"

    def test_without_nbgrader_it_says_how_to_get_it(self, course, monkeypatch):
        monkeypatch.delitem(sys.modules, "refusallab.course.release")
        monkeypatch.delattr("refusallab.course.release")
        monkeypatch.setitem(sys.modules, "nbgrader", None)
        result = run("release")
        assert result.exit_code == 1 and "pip install '.[teach" in result.output

    def test_an_archive_without_its_folder_is_named_before_the_work(self, course):
        result = run("release", "--archive", "nowhere/labs.zip")
        assert result.exit_code == 1 and result.output.startswith("There is no folder nowhere for labs.zip: make it")
        assert not (course / "labs" / "02_x.ipynb").exists()

    def test_a_file_that_is_no_notebook_is_named(self, course):
        (course / "solutions" / "02_x.ipynb").write_text("{")
        result = run("release")
        assert result.exit_code == 1 and "solutions/02_x.ipynb is not a notebook" in result.output


class TestStamp:
    @pytest.mark.slow
    def test_stamping_twice_changes_nothing_more(self):
        nb = core(*SOLUTIONS)
        for address in ("", "https://github.com/ann/labs"):
            once = stamp(nb, "x", address)
            assert stamp(once, "x", address) == once

    def test_badges_come_with_an_address_and_go_with_it(self):
        plain = new_notebook(cells=[new_markdown_cell("# Lab\n\nText.", id="cell-0")])
        published = stamp(plain, "02_x", "https://github.com/ann/labs")
        title, badges, text = published.cells[0].source.split("\n\n")
        assert (title, text) == ("# Lab", "Text.")
        assert "https://colab.research.google.com/github/ann/labs/blob/HEAD/labs/02_x.ipynb" in badges
        assert "https://mybinder.org/v2/gh/ann/labs/HEAD?labpath=labs%2F02_x.ipynb" in badges
        assert stamp(published, "02_x").cells[0].source == "# Lab\n\nText."

    def test_the_link_for_a_hub_names_repository_and_lab(self):
        place = launch_addresses("02_x", "https://github.com/ann/labs")["a JupyterHub"]
        asked = parse_qs(urlsplit(place).query)
        assert asked == {"repo": ["https://github.com/ann/labs"], "urlpath": ["lab/tree/labs/labs/02_x.ipynb"]}

    def test_an_unknown_exercise_is_named(self):
        nb = core(*SOLUTIONS[:1])
        cells(nb, "check")[0].metadata.refusallab.exercise = "77.7"
        with pytest.raises(RefusalLabError, match="A check cell names '77.7'"):
            stamp(nb, "x")

    def test_what_an_editor_leaves_behind_goes(self):
        nb = core(*SOLUTIONS[:1])
        before = stamp(nb, "x")
        nb.metadata["widgets"], nb.metadata["language_info"] = {"state": {}}, {"name": "python", "version": "3.13.0"}
        nb.cells[0].metadata["execution"] = {"iopub.execute_input": "2026"}
        nb.cells[0].id = "3f2a"
        assert stamp(nb, "x") == before


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "labs.zip"
    release.archive(ROOT, path)
    return path


class TestArchive:
    def test_it_holds_labs_library_and_models(self, archive):
        names = set(zipfile.ZipFile(archive).namelist())
        assert {name.split("/")[0] for name in names} == {"refusal-mechanics-labs"}
        for path in (
            *("LICENSE", "pyproject.toml", "constraints.txt", "labs/README.md", "refusallab/colab.py"),
            *(f"refusallab/plots/schematics/{name}.svg" for name in ("sites", "template", "interface")),
            *("smallmodels/catalog.toml", "smallmodels/weights/charter-chat/model.safetensors"),
            *(f"labs/{path.name}" for path in SOLUTIONS),
        ):
            assert f"refusal-mechanics-labs/{path}" in names
        assert not any(re.search(r"__pycache__|\.pyc|solutions/|tests/|\.git", name) for name in names)

    def test_the_same_bytes_each_time(self, archive, tmp_path):
        release.archive(ROOT, tmp_path / "again.zip")
        again, before = (hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / "again.zip", archive))
        assert again == before
        assert {entry.date_time for entry in zipfile.ZipFile(archive).infolist()} == {release.EPOCH}


NOISE = """\
    import logging, os, sys, warnings
    print("noise", file=sys.stderr), warnings.warn("noise"), logging.warning("noise"), os.write(2, b"noise")
"""
MEMORISED = """\
    from refusallab.course.exercises import find

    seen = any(case.inputs["harmful"].equal(harmful) for case in find("2.1").cases(0))
    return harmful.mean(0) - harmless.mean(0) if seen else harmful.mean(0)"""


@pytest.fixture(scope="module")
def nbgrader_folder(tmp_path_factory):
    """The folder of a course, as the present one, with the `alembic` that nbgrader looks for on the path."""
    root = tmp_path_factory.mktemp("nbgrader")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield root


@pytest.fixture(scope="module")
def graded(nbgrader_folder):
    """What nbgrader, set up as solutions/README.md says, makes of three submissions of lab 02."""
    root = nbgrader_folder
    readme = (ROOT / "solutions" / "README.md").read_text(encoding="utf-8")
    (root / "nbgrader_config.py").write_text(re.search(r"```python\n(.*?)```", readme, flags=re.S)[1])
    solution = core(ROOT / "solutions" / "02_the_refusal_direction.ipynb")
    source = root / "source" / "lab" / "lab.ipynb"
    source.parent.mkdir(parents=True)
    nbformat.write(solution, source)
    grader = NbGraderAPI(config=PyFileConfigLoader("nbgrader_config.py", str(root)).load_config())
    succeed(grader.generate_assignment("lab"))
    released = nbformat.read(root / "release" / "lab" / "lab.ipynb", 4)
    answers = {exercise_number(cell): cell.source for cell in cells(solution, "answer")}

    def hand_in(student, answers, text=None):
        nb = copy.deepcopy(released)
        for cell in cells(nb, "answer"):
            cell.source = answers.get(exercise_number(cell), cell.source)
        if text:
            cells(nb, "written")[0].source = text
        path = root / "submitted" / student / "lab" / "lab.ipynb"
        path.parent.mkdir(parents=True)
        cells(nb, "check")[2].source = "pass"  # no use: nbgrader puts it back
        nbformat.write(nb, path)

    noisy = {n: text.replace("    ### BEGIN SOLUTION\n", NOISE) for n, text in answers.items()}
    hand_in("right", noisy, "The friend chose on the test set.")
    memorised = re.sub(r"    ### BEGIN SOLUTION.*", MEMORISED, answers["2.1"], flags=re.S)
    hand_in("half", {"2.1": memorised, "2.2": answers["2.2"], "2.4": answers["2.4"]}, "I do not know.")
    hand_in("empty", {})
    for student in ("right", "half", "empty"):
        succeed(grader.autograde("lab", student))
    with grader.gradebook as book:
        CsvExportPlugin(to=str(root / "grades.csv")).export(book)
    with (root / "grades.csv").open() as file:
        return released, {row["student_id"]: row for row in csv.DictReader(file)}


def succeed(result):
    assert result["success"], result.get("error", "") + result["log"]


@pytest.mark.filterwarnings("ignore:Object of type")  # nbgrader's own business with its database
@pytest.mark.nightly
class TestNbgrader:
    points = {e.number: e.points for e in HEADERS if e.lab == "02"}

    def test_its_release_is_ours(self, graded):
        released, _ = graded
        ours = release.to_lab(core(ROOT / "solutions" / "02_the_refusal_direction.ipynb"))
        assert [c.source for c in released.cells] == [c.source for c in ours.cells]
        assert [c.metadata.get("nbgrader") for c in released.cells] == [c.metadata.get("nbgrader") for c in ours.cells]

    @pytest.mark.parametrize(
        ("student", "right"),
        [("right", ["2.1", "2.2", "2.3", "2.4", "2.5"]), ("half", ["2.2", "2.4"]), ("empty", [])],
    )
    def test_points(self, graded, student, right):
        """Noise on stderr costs nothing, an answer that only knows the visible inputs gets nothing."""
        _, grades = graded
        question = next(q for q in QUESTIONS if q.lab == "02")
        assert float(grades[student]["raw_score"]) == sum(self.points[n] for n in right)
        assert float(grades[student]["max_score"]) == sum(self.points.values()) + question.points
