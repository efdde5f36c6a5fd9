"""Every notebook keeps the rules of the course, and every rule can be broken."""

import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from typer.testing import CliRunner

from refusallab.cli import app
from refusallab.course.catalogue import HEADERS, QUESTIONS
from refusallab.course.lint import SECTIONS, TERMS, lint
from refusallab.course.notebook import role, stamp
from refusallab.course.release import to_lab

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted([*ROOT.glob("solutions/*.ipynb"), *ROOT.glob("labs/*.ipynb")])


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_notebook_keeps_every_rule(path):
    assert lint(path) == []


def test_every_exercise_and_question_has_its_notebook():
    labs = {item.lab for item in (*HEADERS, *QUESTIONS)}
    assert labs == {path.name[:2] for path in ROOT.glob("solutions/*.ipynb")}


def test_labs_go_on_with_what_students_write():
    """After its check every answer is handed to `solved`, and the lab goes on with what comes back."""
    used = set()
    for path in ROOT.glob("solutions/*.ipynb"):
        source = "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")
        used |= set(re.findall(r"\bsolved\(\s*\"([\d.]+)\"", source))
    assert used == {header.number for header in HEADERS}


def test_the_readme_lists_every_role():
    used = {role(cell) for path in ROOT.glob("solutions/*.ipynb") for cell in nbformat.read(path, 4).cells} - {""}
    readme = (ROOT / "solutions" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", readme, flags=re.M)) == used


def markdown(text, **tag):
    return new_markdown_cell(text, metadata={"refusallab": tag} if tag else {})


def code(text, *outputs, **tag):
    return new_code_cell(text, metadata={"refusallab": tag} if tag else {}, outputs=list(outputs))


def stdout(text):
    return new_output("stream", name="stdout", text=text)


def shown(**data):
    return new_output("display_data", data={kind.replace("_", "/"): text for kind, text in data.items()})


PROMISE, TIME, BEFORE = "**You will find a direction.**", "Time: 90 minutes.", "Before: lab 01 (the metric)."
CORE = "Core path, about 40 minutes: section 2, exercises 2.1 and 2.3."


@pytest.fixture
def good():
    """A notebook of lab 02 that keeps every rule."""
    cells = [
        markdown(f"# Lab 02\n\n{PROMISE}\n\n{TIME} {BEFORE}\n\n{CORE}"),
        markdown(f"## {SECTIONS[0]}"),
        code("", role="setup"),
    ]
    for e in (e for e in HEADERS if e.lab == "02"):
        answer = f'def {e.function}(x):\n    """Doc."""\n    ### BEGIN SOLUTION\n    pass\n    ### END SOLUTION'
        roles = {"header": markdown(""), "answer": code(answer), "check": code("")}
        for name, cell in roles.items():
            cell.metadata["refusallab"] = {"role": name, "exercise": e.number}
        cells += roles.values()
    cells += [markdown("text", role=name, number="2.6") for name in ("question", "written", "rubric")]
    cells += [
        code("plot()", shown(image_png="AAAA")),
        markdown("*Figure: what there is to be seen, in a sentence.* [A table](table.csv), [arXiv](https://arxiv.org)"),
        code("print(1)", stdout("0.25 of 12 prompts, position -1\n")),
        *(markdown(f"## {title}") for title in SECTIONS[1:]),
    ]
    return stamp(new_notebook(cells=cells), "02_x")


@pytest.fixture
def problems(tmp_path):
    """The problems of a notebook in solutions/ or labs/, without paths and cells."""

    def find(nb, folder="solutions"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "table.csv").write_text("")
        path = tmp_path / folder / "02_x.ipynb"
        nbformat.write(nb, path)
        return [line.split(": ", 2)[2] for line in lint(path)]

    return find


def first(nb, name):
    return next(i for i, cell in enumerate(nb.cells) if role(cell) == name)


def test_a_good_notebook_and_its_release_have_no_problems(good, problems):
    assert problems(good) == []
    assert problems(to_lab(good), "labs") == []


ADDED = {  # a cell at the end: the problem
    "second title": (markdown("# Again"), "one title, at its top: 'Again'"),
    "skipped level": (markdown("#### Deep"), "skips a level: 'Deep'"),
    "image without alt": (markdown("![](https://x.org/a.png)"), "an image without alt text"),
    "html image": (markdown('<img src="https://x.org/a.png">'), "an image without alt text"),
    "html image in an output": (code("show()", shown(text_html="<img src='x'>")), "its output has an image without"),
    "figure without words": (code("plot()", shown(image_png="AAAA")), "*Figure: ...*"),
    "long cell": (code("x = 1\n" * 26), "27 lines of code; 25 is the most"),
    "wide cell": (code("x = " + "1" * 97), "101 columns of code; 100 is the most"),
    "two tables": (
        code("show()", stdout("aa  bb  cc\n11  22  33\n\n" * 2)),
        "two tables: make two cells of it",
    ),
    "figure in the middle": (code("plt.show()\nplt.show()"), "plt.show() comes last, once"),
    "too many places": (
        code("\n".join(f"from refusallab.{name} import x" for name in "abcdefg")),
        "it imports from 7 places: ",
    ),
    "path in a source": (code('open("/home/ann/x")'), "a path of one computer: /home/"),
    "path in an output": (code("print(path)", stdout("in /tmp/x")), "a path of one computer: /tmp/"),
    "path of Windows": (markdown(r"look in C:\Users"), "a path of one computer: C:\\U"),
    "address": (code("print(f)", stdout("<function f at 0x7f12ab34>")), "its output shows an address in memory"),
    "time": (code("print(t)", stdout("done in 1.3 s")), "its output shows a measured time"),
    "progress bar": (code("bar()", stdout("100%|###| 5/5 [00:01, 4.1it/s]")), "its output shows a measured time"),
    "clock": (code("start = time.time()"), "it measures time"),
    "warning": (code("f()", new_output("stream", name="stderr", text="Warning: x")), "stderr in its output: Warning"),
    "error": (code("f()", new_output("error", ename="NameError", evalue="f")), "error in its output: NameError: f"),
    "dead link": (markdown("[see](nowhere.md#part)"), "a link that leads nowhere: nowhere.md"),
    "dead image": (markdown('<img alt="a" src="nowhere.png">'), "a link that leads nowhere: nowhere.png"),
    "magic": (code("%matplotlib inline"), "not plain Python"),
    "use of an answer": (code("x = mean_difference(a, b)"), "it uses mean_difference, which students write"),
    "use beside solved": (code('f = solved("2.1", mean_difference)\nmean_difference(a)'), "it uses mean_difference"),
    "one cell too many": (code('check("2.1", f)', role="check", exercise="2.1"), "check 2.1 where nothing should be"),
    **{
        f"not {term}": (markdown(wrong), f"write {term!r}")
        for term, wrong in {
            "resid_pre": "the resid-pre of block 3",
            "difference in means": "the difference-in-means vector",
            "activation addition": "activation-addition",
            "directional ablation": "directional-ablation",
            "weight orthogonalization": "Weight orthogonalisation",
            "HarmBench": "prompts of Harmbench",
            "JailbreakBench": "JailBreakBench",
        }.items()
    },
}


def test_a_cell_shows_one_figure(good, problems):
    good.cells.append(code("plot()", shown(image_png="AAAA"), shown(image_png="BBBB"), role=""))
    good.cells.append(markdown("*Figure: two bars that are equally high, with their intervals.*"))
    assert problems(good) == ["two figures: make two cells of it"]


@pytest.mark.slow
@pytest.mark.parametrize(("cell", "problem"), ADDED.values(), ids=ADDED)
def test_a_bad_cell_is_found(good, problems, cell, problem):
    cell["id"] = "bad"
    good.cells.append(cell)
    found = problems(good)
    assert len(found) == 1 and problem in found[0]


@pytest.mark.parametrize(
    ("inside", "outside", "missing"),
    [
        ("x = 1", "print(x)", "x"),
        ("rows.append(2)", "print(rows)", "rows"),
        ("import math", "def area(r):\n    return math.pi * r**2", "math"),
        ("x = 1", "x = 2\nprint(x)", None),
        ("x = 1", "for x in rows:\n    print(x)", None),
        ("import ast\nast.parse('')", "print(ast)", None),
    ],
)
def test_what_an_optional_part_sets_is_needed_nowhere_else(good, problems, inside, outside, missing):
    good.cells.append(code("import ast\nrows = []"))
    good.cells += [markdown("### Optional: more"), markdown("#### In detail"), code(inside), markdown("## 9. On")]
    good.cells.append(code(outside))
    assert problems(good) == ([f"it needs {missing}, which an optional part sets"] if missing else [])


def test_a_cell_may_use_an_answer_through_solved(good, problems):
    good.cells.append(code('difference_in_means = solved("2.1", mean_difference)'))
    assert problems(good) == []


@pytest.mark.parametrize("term", TERMS)
def test_the_right_term_is_right(good, problems, term):
    good.cells.append(markdown(f"About {term}, `{term}`."))
    assert problems(good) == []


@pytest.mark.parametrize("name", ["setup", "header", "hints", "answer", "check", "question", "written", "rubric"])
def test_a_missing_cell_is_found(good, problems, name):
    del good.cells[first(good, name)]
    assert any(f"where {name}" in problem for problem in problems(good))


def test_cells_in_the_wrong_order_are_found(good, problems):
    i = first(good, "answer")
    good.cells[i : i + 2] = reversed(good.cells[i : i + 2])
    assert problems(good) == ["check 2.1 where answer 2.1 should be"]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("def mean_difference", "def difference", "it must define mean_difference with a docstring"),
        ('"""Doc."""', "pass", "it must define mean_difference with a docstring"),
        ("    ### END SOLUTION", "", "one pair of ### BEGIN SOLUTION and ### END SOLUTION"),
        ("def mean", "x = 1\n\n\ndef mean", "an answer holds imports and functions only"),
    ],
)
def test_a_bad_answer_is_found(good, problems, old, new, problem):
    cell = good.cells[first(good, "answer")]
    cell.source = cell.source.replace(old, new)
    assert any(problem in line for line in problems(good))


@pytest.mark.parametrize("title", SECTIONS)
def test_a_missing_section_is_found(good, problems, title):
    for cell in good.cells:
        cell.source = cell.source.replace(title, "Something else")
    assert problems(good) == [f"no section {title!r}"]


STATE_CORE = "the first cell must state the core path, Core path, about 40 minutes: sections ..., exercises N.1, N.2."
PLANS = {
    "no promise": (
        f"{TIME} {BEFORE}\n\n{CORE}",
        "what students will do, in bold on a line of its own: **You will ...**",
    ),
    "nothing before": (f"{PROMISE}\n\n{TIME}\n\n{CORE}", "what comes before: Before: lab 02 (the direction)."),
    "no time": (CORE, "the first cell must state the time, Time: N minutes; the exercises take 85"),
    "too short": (f"Time: 20 minutes.\n\n{CORE}", "Time: N minutes; the exercises take 85"),
    "no core path": ("Time: 90 minutes.", STATE_CORE),
    "core path of another lab": ("Time: 90 minutes.\n\n" + CORE.replace("2.3", "3.3"), STATE_CORE),
    "long core path": (
        "Time: 90 minutes.\n\n" + CORE.replace("2.3", "2.3, 2.4"),
        "the exercises of the core path take 45 minutes; 40 is the most",
    ),
    "one long sitting": (f"Time: 130 minutes.\n\n{CORE}", "sittings of at most 120 minutes that add up to 130"),
    "sittings that do not add up": (
        f"Time: 130 minutes.\n\n{CORE}\n\nSittings: sections 1 to 4 (70 minutes), 5 to 9 (50 minutes).",
        "sittings of at most 120 minutes that add up to 130",
    ),
}


@pytest.mark.parametrize(("plan", "problem"), PLANS.values(), ids=PLANS)
def test_a_plan_that_does_not_fit_is_found(good, problems, plan, problem):
    good.cells[0].source = f"# Lab 02\n\n{plan}"
    assert any(problem in line for line in problems(good))


def test_two_sittings_are_a_plan(good, problems):
    sittings = "Sittings: sections 1 to 4 (70 minutes), 5 to 9 (60 minutes)."
    good.cells[0].source = f"# Lab 02\n\n{PROMISE}\n\nTime: 130 minutes. {BEFORE}\n\n{CORE}\n\n{sittings}"
    assert problems(good) == []


def test_what_is_not_for_students_is_found(good, problems):
    found = problems(good, "labs")
    assert found.count("this belongs only in solutions/") == 2 * 5 + 1  # answers, hidden tests, the rubric
    assert "a released notebook has no outputs" in found


def test_the_command_names_the_cell_and_fails(good, problems, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good.cells.append(new_markdown_cell("# Again", id="again"))
    problems(good)
    result = CliRunner().invoke(app, ["lint", "02"])
    assert result.exit_code == 1
    assert result.output == "solutions/02_x.ipynb: again: a notebook has one title, at its top: 'Again'\n"
    problems(stamp(nbformat.v4.new_notebook(cells=good.cells[:-1]), "02_x"))
    assert CliRunner().invoke(app, ["lint"]).exit_code == 0
