"""Grading, without running anybody's code: submissions, cells, plain data, verdicts, records, reports, exports."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from grading import RIGHT, cell, notebook, save

from grader import batch, exports, pages
from grader.examine import ExerciseResult, Graded, Task, _judge, hidden_inputs, written_answers
from grader.policy import flags
from grader.records import Records, answer_hash
from grader.report import write_reports
from grader.submissions import Submission
from refusallab.course.catalogue import HEADERS, LABS
from refusallab.course.cells import Cell, Notebook, read_cells
from refusallab.course.exercise import Case
from refusallab.course.exercises import find_exercise
from refusallab.errors import RefusalLabError
from refusallab.sandbox.plain import Foreign, from_json, storable, to_json

# --- cells ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (notebook()[:1000], "damaged or cut off"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b'{"a": 1}', "not a notebook"),
        (b"[" * 100_000, "damaged or cut off"),
        (b'{"cells": [1, 2]}', "not a notebook"),
    ],
)
def test_files_that_are_no_notebooks(data, reason):
    with pytest.raises(RefusalLabError, match=reason):
        read_cells(data)


def test_old_formats_and_byte_order_marks_are_read():
    old = {"worksheets": [{"cells": [{"cell_type": "code", "input": ["x = 1\n", "y = 2"]}]}], "nbformat": 3}
    assert read_cells(b"\xef\xbb\xbf" + json.dumps(old).encode()) == [Cell("code", "x = 1\ny = 2")]


def code(*sources):
    return Notebook([Cell("code", source) for source in sources])


def run(nb, names, whole=()):
    """What `names` are after what is needed has run, without IPython."""
    space = {}
    for _, source in nb.needed(names, whole):
        exec(source, space)
    return space


def test_only_what_an_answer_needs_is_run():
    nb = code(
        "from math import log\nbig = 1 / 0",
        "base = 2\nother = [1]\nother.append(1 / 0)",
        "cache = {}\ncache['two'] = base\nprint(1 / 0)",
        "def kl(x):\n    p = cache['two']\n    return helper(x) + p\np = 1 / 0",
        "def helper(x): return log(x)",
    )
    assert run(nb, ["kl"])["kl"](1) == 2
    assert [i for i, _ in nb.needed(["kl"])] == [0, 1, 2, 3, 4]
    with pytest.raises(ZeroDivisionError):
        run(nb, ["kl"], whole=[2])


@pytest.mark.parametrize(
    ("cells", "value"),
    [
        (["def f(): return 1", "def f():\n    '''Doc.'''\n    raise NotImplementedError()"], 1),
        (["def f(): return 1", "def f(): return 2"], 2),
        (["%%time\ndef f(): return 3"], 3),
        (["\n\n%%time\n\ndef f(): return 3"], 3),
        (["\n\n\n%matplotlib inline\n!ls\ndef f():\n    return 3\n\n"], 3),
        (["def f(): return 4", "this is no python"], 4),
        (["g = lambda: 5\nf = g"], 5),
        (["for k in range(3):\n    def f(k=k): return k"], 2),
        (["from math import *\ndef f(): return floor(2.5)"], 2),
        (["x = []\nx += [7]\ndef f(): return x[0]"], 7),
        (["import functools\n@functools.cache\ndef f():\n    return 8"], 8),
        (["class A:\n    b = 9\ndef f(): return A().b"], 9),
        (["try:\n    import nothing\nexcept ImportError:\n    z = 6\ndef f(): return z"], 6),
    ],
)
def test_which_definition_counts(cells, value):
    assert run(code(*cells), ["f"])["f"]() == value


def test_lines_keep_their_numbers():
    [(_, source)] = code("x = 1\n\nprint(x)\ndef f():\n    return x").needed(["f"])
    assert source == "x = 1\n\n\ndef f():\n    return x"


def test_own_cells_are_those_that_do_something_of_their_own():
    nb = code("x = start()", "print(x)", "def f(): return 1", "y = 2\nprint(y)", "check('2.1', f)")
    assert nb.own_cells(["x=start()"]) == [3]
    assert nb.own_cells([]) == [0, 3]


HOSTILE = ["-" * 100_000 + "1", "(" * 100_000, "a" + "[0]" * 50_000, "lambda:" * 20_000 + "1", "1" + "+1" * 50_000]


@pytest.mark.slow
@pytest.mark.parametrize("source", HOSTILE, ids=lambda s: s[:8])
def test_no_source_breaks_the_reader(source):
    nb = code("def f(): return 1", source, "def g(): return 2")
    assert run(nb, ["f", "g"])["g"]() == 2


def test_why_a_function_is_missing():
    assert "line 2" in code("def f(:\n  x").problem_of("f") or "line 1" in code("def f(:\n  x").problem_of("f")
    assert code("def g(:\n  x").problem_of("f") == ""


@pytest.mark.parametrize("tagged", [True, False])
def test_written_answers_are_found_with_and_without_metadata(tagged):
    cells = read_cells(notebook(written="Because of the maximum."))
    if not tagged:
        cells = [Cell(c.kind, c.source) for c in cells]
    assert written_answers(cells, "02") == {"2.6": "Because of the maximum."}
    assert written_answers(read_cells(notebook(written="YOUR ANSWER HERE\n")), "02") == {"2.6": ""}


@pytest.mark.parametrize("tagged", [True, False])
@pytest.mark.parametrize("left", ["YOUR ANSWER HERE\n", "", " \n"])
def test_a_written_answer_may_stand_in_cells_of_its_own_below_the_one_for_it(tagged, left):
    more = [("markdown", "Because of"), ("code", "max(1, 2)"), ("markdown", "### In short\n\nthe maximum.")]
    more += [("markdown", "## 8. What large models show"), ("markdown", "All have it.")]
    cells = [*read_cells(notebook(written=left)), *(Cell(kind, source) for kind, source in more)]
    if not tagged:
        cells = [Cell(c.kind, c.source) for c in cells]
    assert written_answers(cells, "02") == {"2.6": "Because of\n\n### In short\n\nthe maximum."}


@pytest.mark.parametrize("tagged", [True, False])
@pytest.mark.parametrize("lab", LABS)
def test_a_lab_as_it_was_released_has_no_written_answer(lab, tagged):
    [path] = (Path(__file__).parents[2] / "labs").glob(f"{lab}_*.ipynb")
    cells = [c if tagged else Cell(c.kind, c.source) for c in read_cells(path.read_bytes())]
    assert set(written_answers(cells, lab).values()) == {""}


# --- plain data ----------------------------------------------------------------------------------------------------

VALUES = [
    None, True, 3, -2.5, float("inf"), "text é \x00", [1, [2, "3"]], (1, (2,)), {"a": {1: 2}}, {"dict": 1}, {},
    torch.arange(6).reshape(2, 3), torch.randn(2, 0), torch.tensor(True), torch.tensor(2.0, dtype=torch.float64),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_plain_data_comes_back_as_it_was(value):
    back = from_json(to_json(value))
    if isinstance(value, torch.Tensor):
        assert back.dtype == value.dtype
        assert torch.equal(back, value)
    else:
        assert (type(back), back) == (type(value), value)


def test_what_is_not_plain_arrives_as_its_name():
    for value in (np.ones(2), object(), len, 1j, torch.tensor(1j)):
        assert isinstance(from_json(to_json(value)), Foreign)

    class Float(float):
        def __eq__(self, other):
            return True

    assert type(from_json(to_json(Float(2)))) is float
    assert from_json(to_json(torch.tensor([1.5], dtype=torch.bfloat16))).dtype == torch.float32


HOSTILE_TEXTS = [
    "", "nonsense", "[" * 100_000,
    '{"tensor": ["float32", [1000000000000], "AAAA"]}', '{"tensor": ["O", [1], "AAAA"]}',
    '{"tensor": ["float32", [-1], "AAAAAA=="]}', '{"tensor": ["float32", ["1"], "AAAAAA=="]}', '{"pickle": "gASVAA=="}',
    '{"dict": [[{"dict": []}, 1]]}', '{"dict": 3}',
    '{"tuple": 3}', '{"foreign": 3}', '{"a": 1, "b": 2}', '{"tensor": 1}',
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=lambda t: t[:30])
def test_nothing_but_plain_data_is_decoded(text):
    with pytest.raises(ValueError):
        from_json(text)


@pytest.mark.slow
@pytest.mark.parametrize("number", [e.number for e in HEADERS])
def test_every_exercise_can_be_graded_from_plain_data(number):
    exercise = find_exercise(number)
    cases, said = exercise.cases(31), []
    text = to_json([case.inputs for case in cases])
    assert '"foreign"' not in text
    for inputs in from_json(text):
        value = exercise.observe(exercise.reference, inputs)
        said.append({"value": value, "inputs": inputs})
    outcome = _judge(exercise, to_json({"cases": said}), Task("ada", exercise.lab, b"", 31))
    assert (outcome.points, outcome.problem) == (exercise.points, "")


def test_text_is_made_storable():
    bad = "a\udcffb\ud800c\x00d\x1b[2Je\x85f"
    assert storable(bad) == r"a\udcffb\ud800c\x00d\x1b[2Je\x85f"
    assert storable("tab\there, naïve\r\n日本 \u2028 😀") == "tab\there, naïve\r\n日本 \u2028 😀"
    storable("".join(map(chr, range(0x11000)))).encode()


# --- verdicts on what the sandbox says -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        "nonsense", to_json(None), to_json({"cases": []}), to_json({"cases": [1, 2, 3]}),
        to_json({"cases": [{}, {}, {}]}),
        to_json({"cases": [{"value": 1, "inputs": None}] * 3}), to_json({"cases": [{"value": 1, "inputs": {}}] * 3}),
        to_json({"cases": {"a": 1}}), to_json({"other": 1}),
        to_json({"cases": [{"error": 5, "message": {}, "line": "x"}] * 3}),
        to_json({"cases": [{"error": "a b", "message": "m", "line": 10**30}] * 3}),
        to_json({"points": 2, "passed": True}),
    ],
)  # fmt: skip
def test_no_answer_of_the_sandbox_scores_or_breaks_the_judge(said):
    outcome = _judge(find_exercise("2.1"), said, Task("ada", "02", b"", 31))
    assert outcome.points == 0
    assert outcome.problem


@pytest.mark.parametrize("value", [10**400, -(10**30), float("nan"), [10**400], (), {}, "1", True, None])
def test_no_number_breaks_the_judge(value):
    exercise = find_exercise("1.6")
    said = to_json({"cases": [{"value": value, "inputs": case.inputs} for case in exercise.cases(31)]})
    outcome = _judge(exercise, said, Task("ada", "01", b"", 31))
    assert outcome.points == 0
    assert outcome.problem


def test_a_broken_definition_is_not_taken_for_a_wrong_answer():
    broken = replace(find_exercise("2.1"), reference=lambda harmful, harmless: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hidden_inputs(broken, 31)
    odd = replace(find_exercise("2.1"), cases=lambda seed: [Case("odd", {"x": len})], reference=lambda x: 1)
    with pytest.raises(RefusalLabError, match="not plain data"):
        hidden_inputs(odd, 31)


def test_feedback_tells_no_value_that_came_from_hidden_inputs():
    exercise, secret = find_exercise("2.1"), "0.123456789"
    thief = type(f"T{secret}".replace(".", ""), (), {"__repr__": lambda self: secret})
    values = [secret, [secret], {secret: 1}, thief(), np.array([float(secret)]), (secret,)]
    for value in values:
        inputs = [case.inputs for case in exercise.cases(31)]
        said = to_json({"cases": [{"value": value, "inputs": i} for i in inputs]})
        outcome = _judge(exercise, said, Task("ada", "02", b"", 31))
        assert outcome.points == 0
        assert "123456789" not in outcome.problem + outcome.case + outcome.mistake
    for name in ("ValueError", f"E{secret}", "E123456789"):
        said = to_json({"cases": [{"error": name, "message": secret, "line": 3}] * 3})
        outcome = _judge(exercise, said, Task("ada", "02", b"", 31))
        assert "123456789" not in outcome.problem
        assert "line 3" in outcome.problem
    assert (
        "ValueError"
        in _judge(exercise, to_json({"cases": [{"error": "ValueError"}] * 3}), Task("", "02", b"", 31)).problem
    )


@pytest.mark.parametrize("end", ["", "SECRET", "got a str: 'x'", "Expected another text. Yours is that.", "\n \n x"])
def test_feedback_on_a_text_tells_nothing_of_it(end):
    exercise = find_exercise("9.1")
    cases = exercise.cases(31)
    right = exercise.observe(exercise.reference, cases[0].inputs)
    hidden = right[0][:60]
    for value in (f"{hidden} {end}", f"{hidden} {90 * 'x'} {end}", f"{right[0]} {end}", f"{90 * 'x'} {hidden} {end}"):
        said = to_json({"cases": [{"value": [value, *right[1:]], "inputs": case.inputs} for case in cases]})
        outcome = _judge(exercise, said, Task("ada", "09", b"", 31))
        assert outcome.detail != outcome.problem  # the instructor sees more
        assert outcome.problem in (f"Value 1 of 4: Expected another {what}." for what in ("text", "value of kind str"))


# --- answers for a person ------------------------------------------------------------------------------------------

IMPORT = "from refusallab.directions import difference_in_means"
F = "def mean_difference(a, b):"


@pytest.mark.parametrize(
    ("source", "flag"),
    [
        (f"{IMPORT} as d\n{F}\n    '''Doc.'''\n    return d(a, b)", "only calls the library"),
        (f"{IMPORT}\ndef go(a, b):\n    return difference_in_means(a, b)\n{F} return go(a, b)", "only calls"),
        (f"{F}\n    {IMPORT}\n    x = difference_in_means(a, b)\n    return x", "only calls"),
        (f"import refusallab.directions as r\n{F} return r.difference_in_means(a, b)", "only calls"),
        (f"{F}\n    import refusallab.course.exercises.lab02 as x\n    return x.CHOOSE", "inside of the course"),
        (f"from refusallab.course.exercises import find\n{F} return find('2.1')", "inside of the course"),
        (f"{F} return __import__('refusal' + 'lab.directions').directions", "unusual ways: __import__"),
        (f"import torch\ntorch.allclose = lambda *a: True\n{RIGHT['2.1']}", "changes what it imported"),
        (RIGHT["2.1"], ""),
        (f"import torch\n{F} return torch.sub(a.mean(0), b.mean(0))", ""),
    ],
)
def test_answers_that_only_fetch_the_answer_are_flagged(source, flag):
    found = flags(code(source), find_exercise("2.1"))
    assert (flag in " ".join(found)) if flag else found == []


@pytest.mark.parametrize("number", RIGHT)
def test_honest_answers_are_not_flagged(number):
    assert flags(code(*RIGHT.values()), find_exercise(number)) == []


# --- records, reports, exports -------------------------------------------------------------------------------------


def graded(student="ada", points=(2, 0, 3, 0, 2), written="My answer", **settings):
    exercises = [e for e in HEADERS if e.lab == "02"]
    outcomes = [
        ExerciseResult(e.number, p, e.points, "" if p else "Not <b>right</b>.", "" if p else "arguments swapped")
        for e, p in zip(exercises, points, strict=True)
    ]
    return Graded(student, "02", outcomes, written={"2.6": written}, **settings)


def submission(tmp_path, student="ada", account=""):
    return Submission(student, "02", tmp_path / "02.ipynb", account)


@pytest.fixture
def records(tmp_path):
    return Records(f"sqlite:///{tmp_path / 'grades.sqlite'}")


def test_a_submission_is_written_as_a_whole(records, tmp_path):
    broken = graded()
    broken.outcomes[-1].number = broken.outcomes[0].number  # breaks the primary key, after rows were deleted
    records.write(submission(tmp_path), graded(points=(2, 2, 3, 2, 2)), "one")
    with pytest.raises(Exception, match="UNIQUE"):
        records.write(submission(tmp_path), broken, "two")
    assert records.digests() == {("ada", "02"): "one"}
    assert sum(g.points or 0 for g in records.all_grades()) == 11
    records.write(submission(tmp_path), graded(points=(0, 0, 0, 0, 0)), "three")
    assert sum(g.points or 0 for g in records.all_grades()) == 0
    assert len(records.all_grades()) == 6


def test_points_given_by_hand_stay_with_the_answer(records, tmp_path):
    table = tmp_path / "by_hand.csv"
    records.write(submission(tmp_path), graded(), "one")
    pages.write_by_hand(records, table)
    lines = table.read_text().replace("2.6,,", "2.6,2.5,good")
    table.write_text(lines)
    pages.read_by_hand(records, table)
    of = lambda: next(g for g in records.all_grades() if g.exercise == "2.6")  # noqa: E731
    assert (of().points, of().problem) == (2.5, "good")
    records.write(submission(tmp_path), graded(points=(0, 0, 0, 0, 0)), "two")
    assert of().points == 2.5
    records.write(submission(tmp_path), graded(written="Another answer"), "three")
    assert of().points is None
    records.write(submission(tmp_path), graded(written=""), "four")
    assert of().points == 0


@pytest.mark.parametrize("hashed", [True, False])  # tables of version 0.2 have no hash
def test_points_in_the_table_are_not_for_an_answer_that_nobody_has_read(records, tmp_path, hashed):
    table = tmp_path / "by_hand.csv"
    records.write(submission(tmp_path), graded(), "one")
    write_reports(records, tmp_path, tmp_path / "none")
    rows = read(table)
    rows[1][3:5] = ["2.5", "good"]
    with table.open("w", newline="") as file:
        csv.writer(file).writerows(row if hashed else row[:-1] for row in rows)
    filled = table.read_bytes()
    write_reports(records, tmp_path, tmp_path / "none")
    assert read(table)[1][3:5] == ["2.5", "good"]
    table.write_bytes(filled)
    records.write(submission(tmp_path), graded(written="Another answer"), "two")
    assert pages.read_by_hand(records, table) == ["ada, 2.6: 2.5 points were for an earlier answer, read the new one"]
    write_reports(records, tmp_path, tmp_path / "none")
    assert [g.points for g in records.all_grades() if g.answer] == [None]
    assert read(table)[1][3:6] == ["", "", "Another answer"]
    assert "Another answer" in (tmp_path / "overview.html").read_text()


def test_no_spreadsheet_takes_a_hash_for_a_number():
    assert all(answer_hash(str(n))[0] == "h" for n in range(100))
    assert answer_hash("a \r\nb") == answer_hash("a\nb") != answer_hash("b\na")


@pytest.mark.parametrize("value", ["4", "-1", "two"])
def test_impossible_points_are_refused(records, tmp_path, value):
    records.write(submission(tmp_path), graded(), "one")
    (tmp_path / "by_hand.csv").write_text(f"student,lab,question,points,comment,answer\nada,02,2.6,{value},,\n")
    with pytest.raises(RefusalLabError, match="line 2"):
        pages.read_by_hand(records, tmp_path / "by_hand.csv")


def test_pages(records, tmp_path):
    evil = "<script>alert(1)</script>/../../etc"
    records.write(submission(tmp_path, evil), graded(evil, written="<img src=x>", output="<b>loud</b>"), "one")
    records.write(submission(tmp_path, "bob"), graded("bob", problem="The file is empty.", points=(0,) * 5), "one")
    write_reports(records, tmp_path, tmp_path / "none")
    files = sorted(path.name for path in (tmp_path / "feedback").iterdir())
    assert len(files) == 2
    [other] = set(files) - {"bob_02.html"}
    page, overview = (tmp_path / "feedback" / other).read_text(), (tmp_path / "overview.html").read_text()
    for text in (page, overview):
        assert "<script>" not in text
        assert "<img" not in text
        assert "&lt;img src=x&gt;" in text
    assert "7 of 14 points" in page
    assert "3 for a person" in page
    assert "arguments swapped (4)" in overview or "arguments swapped (2)" in overview
    assert "bob, lab 02: The file is empty." in overview


def test_the_overview_shows_the_rubric(records, tmp_path):
    (tmp_path / "solutions").mkdir()
    rubric = cell("One point for the word maximum.", "markdown", refusallab={"role": "rubric", "number": "2.6"})
    (tmp_path / "solutions" / "02_x.ipynb").write_bytes(save([rubric]))
    records.write(submission(tmp_path), graded(), "one")
    write_reports(records, tmp_path, tmp_path / "solutions")
    assert "One point for the word maximum." in (tmp_path / "overview.html").read_text()


def read(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_tables_for_canvas_and_moodle(records, tmp_path):
    records.write(submission(tmp_path, "ada-1234", "1234"), graded("ada-1234"), "one")
    records.write(submission(tmp_path, "bob"), graded("bob", points=(2, 2, 3, 2, 2)), "one")
    exports.write_tables(records, tmp_path)
    heading, possible, ada, bob = read(tmp_path / "canvas.csv")
    assert heading == ["Student", "ID", "SIS User ID", "SIS Login ID", "Section", "Lab 02"]
    assert possible[-1] == "14"
    assert (ada[1], ada[3], ada[-1]) == ("1234", "", "7")
    assert (bob[1], bob[3], bob[-1]) == ("", "bob", "11")
    assert read(tmp_path / "moodle_02.csv")[1] == ["Participant 1234", "ada", "7", "14"]
    assert len(read(tmp_path / "grades.csv")) == 13


@pytest.mark.slow
def test_nbgraders_gradebook(records, tmp_path):
    api = pytest.importorskip("nbgrader.api")
    url = f"sqlite:///{tmp_path / 'gradebook.db'}"
    records.write(submission(tmp_path), graded(), "one")
    exports.write_nbgrader(records, url)
    records.write_points("ada", "02", "2.6", 1.5, "")
    exports.write_nbgrader(records, url)
    with api.Gradebook(url) as book:
        [assignment] = book.assignments
        found = book.find_submission(assignment.name, "ada")
        assert (found.score, found.max_score, found.needs_manual_grade) == (8.5, 14, False)


def test_a_database_that_does_not_exist_is_named():
    with pytest.raises(RefusalLabError, match="cannot be used"):
        Records("sqlite:////nowhere/at/all.sqlite")
    with pytest.raises(RefusalLabError, match="cannot be used"):
        Records("nonsense")


def test_the_seed_is_secret_and_stays(tmp_path):
    seed = batch.read_seed(tmp_path)
    assert seed == batch.read_seed(tmp_path)
    assert (tmp_path / "seed").stat().st_mode & 0o077 == 0
    (tmp_path / "mine").write_text("autumn")
    assert batch.read_seed(tmp_path, tmp_path / "mine") != seed
    with pytest.raises(RefusalLabError, match="no seed file"):
        batch.read_seed(tmp_path, tmp_path / "other")
