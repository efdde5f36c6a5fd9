"""A submission costs nobody else anything: whatever is in it, whatever step it breaks."""

import json
from dataclasses import replace

import pytest
from grading import RIGHT, answer, cell, notebook, put, save
from typer.testing import CliRunner

from grader import batch, examine, exports, pages, report
from grader.examine import ExerciseResult, Graded, Task, not_graded
from grader.records import Records
from grader.submissions import Submission
from refusallab import cli
from refusallab.course.cells import MOST_CELLS, MOST_CODE, Cell, Notebook, read_cells
from refusallab.course.exercises import exercises_of, find_exercise
from refusallab.errors import RefusalLabError
from refusallab.sandbox.kernel import LATE, Execution, Kernel, _take
from refusallab.sandbox.server import Limits

LAB = exercises_of("02")
BAD = "a\ud800b\x00c\udcffd"  # half a character, a byte that ends texts, a byte of a file name


def full(task):
    """A result with all points, as the sandbox would give it."""
    outcomes = [ExerciseResult(e.number, e.points, e.points) for e in LAB]
    return Graded(task.student, task.lab, outcomes, written={"2.6": "An answer"})


@pytest.fixture
def classroom(tmp_path, monkeypatch):
    """Three submissions, of which mallory's breaks a step: run(...) grades them and writes everything."""
    for student in ("ada", "mallory", "zoe"):
        put(tmp_path / "submitted", student, notebook(written="An answer"))
    monkeypatch.setattr(batch, "shared", lambda sandboxed: None)
    monkeypatch.setattr(batch, "examine", full)
    records = Records(f"sqlite:///{tmp_path / 'grades.sqlite'}")

    def run(**settings):
        done = batch.grade_class(tmp_path / "submitted", records, 99, **settings)
        return done, report.write_reports(records, tmp_path, tmp_path / "none"), records

    return run


BROKEN = ValueError("broken")


def breaks(function, error=BROKEN):
    """The function, raising wherever mallory is among what it is given."""

    def wrapped(*args, **settings):
        if any("mallory" in repr(value) for value in (*args, *settings.values())):
            raise error
        return function(*args, **settings)

    return wrapped


def points(records):
    found = {}
    for g in records.all_grades():
        found[g.student] = found.get(g.student, 0) + (g.points or 0)
    return found


STEPS = {
    "reading the file, to see whether it has changed": (batch, "_digest", OSError("gone")),
    "making a task of it": (batch, "Task", OSError("gone")),
    "grading it, by a trouble of the grader": (batch, "examine", RefusalLabError("no server")),
}


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_a_trouble_of_the_grader_costs_one_and_is_tried_again_next_time(classroom, monkeypatch, step):
    module, name, error = STEPS[step]
    with monkeypatch.context() as patch:
        patch.setattr(module, name, breaks(getattr(module, name), error))
        done, unwritten, records = classroom()
    assert (done.graded, unwritten) == (2, [])
    assert len(done.failed) == 1
    assert "mallory" in done.failed[0]
    assert str(error) in done.failed[0]
    assert points(records) == {"ada": 11, "zoe": 11}
    done, _, records = classroom()
    assert (done.graded, done.unchanged, done.failed) == (1, 2, [])
    assert points(records)["mallory"] == 11


def test_what_the_records_do_not_take_is_a_row_for_a_person(classroom, monkeypatch, tmp_path):
    write = Records.write

    def picky(self, submission, graded, digest):
        if submission.student == "mallory" and not graded.problem:
            raise UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")
        write(self, submission, graded, digest)

    monkeypatch.setattr(Records, "write", picky)
    done, unwritten, records = classroom()
    assert (done.graded, done.failed, unwritten) == (3, [], [])
    assert points(records) == {"ada": 11, "mallory": 0, "zoe": 11}
    for page in ("overview.html", "feedback/mallory_02.html"):
        assert "UnicodeEncodeError" in (tmp_path / page).read_text()
        assert "A person has to look at it" in (tmp_path / page).read_text()
    done, _, _ = classroom()
    assert (done.graded, done.unchanged, done.failed) == (0, 3, [])


def test_a_page_that_cannot_be_written_costs_no_other(classroom, monkeypatch, tmp_path):
    monkeypatch.setattr(pages, "page_name", breaks(pages.page_name))
    done, unwritten, _ = classroom()
    assert done.graded == 3
    assert unwritten == ["the page of mallory, lab 02: broken"]
    assert {path.name for path in (tmp_path / "feedback").iterdir()} == {"ada_02.html", "zoe_02.html"}
    assert all((tmp_path / name).exists() for name in ("by_hand.csv", "overview.html", "grades.csv", "moodle_02.csv"))


@pytest.mark.parametrize("step", ["write_by_hand", "write_overview", "write_tables"])
def test_a_file_that_cannot_be_written_costs_no_other(classroom, monkeypatch, tmp_path, step):
    def fail(*args):
        raise ValueError("broken")

    monkeypatch.setattr(report, step, fail)
    _, unwritten, _ = classroom()
    assert [line.partition(": ")[2] for line in unwritten] == ["broken"]
    names = {"write_by_hand": "by_hand.csv", "write_overview": "overview.html", "write_tables": "grades.csv"}
    assert {step for step, name in names.items() if not (tmp_path / name).exists()} == {step}
    assert len(list((tmp_path / "feedback").iterdir())) == 3


@pytest.mark.slow
def test_the_gradebook_takes_the_others(classroom, monkeypatch, tmp_path):
    pytest.importorskip("nbgrader.api")
    _, _, records = classroom()
    monkeypatch.setattr(exports, "_write_submission", breaks(exports._write_submission))
    url = f"sqlite:///{tmp_path / 'gradebook.db'}"
    assert exports.write_nbgrader(records, url) == ["mallory, lab 02, in the gradebook: broken"]
    from nbgrader.api import Gradebook

    with Gradebook(url) as book:
        assert {s.id for s in book.students} >= {"ada", "zoe"}
        assert book.find_submission("lab02", "zoe").score == 11


def test_names_of_pages_fit_in_any_folder(tmp_path):
    name = pages.page_name("𝔸" * 200, "02")
    assert len(name.encode()) < 150
    (tmp_path / name).write_text("x")
    assert pages.page_name("𝔸" * 199, "02") != name


# --- what is in it -------------------------------------------------------------------------------------------------


class Sandbox:
    """In place of a kernel: gives back what a test wants it to."""

    said = "{}"

    def __init__(self, *args): ...

    def run(self, code, seconds, observe="", clock=0):
        return Execution(error=f"ValueError: {BAD}", output=BAD * 10_000, observed=self.said if observe else "")

    def close(self): ...


@pytest.fixture
def graded(monkeypatch):
    """graded(data): what becomes of a notebook whose kernel says what Sandbox.said holds."""
    monkeypatch.setattr(examine, "shared", lambda sandboxed: None)
    monkeypatch.setattr(examine, "Kernel", Sandbox)
    return lambda data: examine.examine(Task("mallory", "02", data, 31, Limits()))


def test_all_that_is_run_of_a_submission_shares_its_time(graded, monkeypatch):
    spent = []

    def run(self, code, seconds, observe="", clock=0):
        spent.append(min(seconds, 7))
        return Execution(processor=spent[-1])

    monkeypatch.setattr(Sandbox, "run", run)
    result = graded(notebook(after=["x = [1]\nx.append(2)"] * 20))
    assert sum(spent) == Limits().total
    assert "120 s of processor time for all" in result.outcomes[-1].problem


RAISES = json.dumps({"dict": [["cases", [{"dict": [["error", "Value" + BAD], ["message", BAD]]}] * 3]]})
CONTENTS = {
    "text that is none, in an answer": notebook(written=BAD * 100),
    "enormous text": notebook(written="x" * 3_000_000),
    "text that is none, in code": save([answer("2.1", f"x = '{BAD}'\n{RIGHT['2.1']}"), cell(BAD, "markdown")]),
    "500 magics in a cell": notebook(before=["\n".join(["%time 1"] * 500)]),
    "an attribute chain 400 deep": notebook(before=[f"import torch\ntorch{'.a' * 400} = 1"]),
    "an attribute chain 5000 deep": notebook(before=[f"import torch\ntorch{'.a' * 5000} = 1"]),
    "a sum of 100,000": notebook(before=["x = " + "+".join("1" * 50_000)]),
    "metadata of odd kinds": json.dumps(
        {"cells": [cell("x = 1", refusallab={"role": ["written"], "number": {"a": 1}}), cell(["x", 1, None])]}
    ).encode(),
    "a cell of an odd kind": json.dumps({"cells": [{"cell_type": ["code"], "source": {"a": 1}}]}).encode(),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("said", ["{}", RAISES, '"' + "\\ud800" * 100 + '"', "[" * 5000], ids=lambda s: s[:10])
@pytest.mark.parametrize("name", CONTENTS)
def test_whatever_is_in_it_there_is_a_row_and_a_page(graded, monkeypatch, tmp_path, name, said):
    monkeypatch.setattr(Sandbox, "said", said)
    result = graded(CONTENTS[name])
    assert [o.number for o in result.outcomes] == [e.number for e in LAB]
    assert all(o.problem and not o.points for o in result.outcomes)
    records = Records(f"sqlite:///{tmp_path / 'grades.sqlite'}")
    records.write(Submission("mallory", "02", tmp_path / "02.ipynb"), result, "digest")
    assert report.write_reports(records, tmp_path, tmp_path / "none") == []
    assert (tmp_path / "feedback" / "mallory_02.html").stat().st_size < 500_000


@pytest.mark.slow
def test_what_the_grader_cannot_deal_with_is_recorded_with_the_reason(graded, monkeypatch):
    def fail(*args):
        raise RecursionError("maximum recursion depth exceeded")

    monkeypatch.setattr(examine, "_examine", fail)
    result = graded(notebook())
    assert "RecursionError: maximum recursion depth" in result.problem
    assert [(o.points, o.problem) for o in result.outcomes] == [(0, result.problem)] * len(LAB)


def test_flags_that_cannot_be_read_are_a_flag(monkeypatch):
    monkeypatch.setattr(examine, "flags", breaks(len, RecursionError()))
    assert examine._flags("mallory", find_exercise("2.1"), ()) == ("could not be read by machine: RecursionError",)


def test_a_trouble_of_the_grader_is_no_grade(graded, monkeypatch):
    def fail(*args):
        raise RefusalLabError("The kernels' server did not start.")

    monkeypatch.setattr(examine, "shared", fail)
    with pytest.raises(RefusalLabError, match="did not start"):
        graded(notebook())
    broken = replace(find_exercise("2.1"), reference=lambda harmful, harmless: 1 / 0)
    monkeypatch.setattr(examine, "exercises_of", lambda lab: [broken])
    with pytest.raises(ZeroDivisionError):
        graded(notebook())


MESSAGES = [
    None, [], 3, {}, {"parent_header": None}, {"parent_header": []}, {"parent_header": {"msg_id": "own"}},
    {"parent_header": {"msg_id": "own"}, "header": {"msg_type": ["stream"]}, "content": None},
    {"parent_header": {"msg_id": "own"}, "header": {"msg_type": "status"}, "content": {"execution_state": {}}},
    {"parent_header": {"msg_id": "own"}, "header": {"msg_type": "stream"}, "content": [1]},
    {"parent_header": {"msg_id": "own"}, "header": {"msg_type": "execute_reply"}, "content": {"user_expressions": 1}},
    {"parent_header": {"msg_id": "own"}, "header": {"msg_type": "error"}, "content": {"ename": []}},
]  # fmt: skip


def test_odd_messages_of_a_kernel_are_passed_over():
    good = {"parent_header": {"msg_id": "own"}, "header": {"msg_type": "execute_reply"}, "content": {}}
    idle = good | {"header": {"msg_type": "status"}, "content": {"execution_state": "idle"}}
    messages = [*MESSAGES, good, idle]

    class Odd(Kernel):
        def __init__(self):
            self._limits, self._sockets = Limits(), {"shell": None}
            self._session = type("", (), {"send": lambda *args: {"header": {"msg_id": "own"}}})()

        _processor = lambda self: 0.0  # noqa: E731
        _poll = lambda self, seconds: {"shell"}  # noqa: E731
        _receive = lambda self, channel: messages.pop(0)  # noqa: E731

    assert Odd().run("", 1) == Execution(error="")
    assert messages == []
    assert _take(Execution(), "execute_reply", {}) == "reply"


# --- size and time -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_notebook_has_a_most():
    with pytest.raises(RefusalLabError, match=f"{MOST_CELLS + 1} cells"):
        read_cells(save([cell("x = 1")] * (MOST_CELLS + 1)))
    with pytest.raises(RefusalLabError, match="characters of code"):
        read_cells(save([cell("x" * 1000)] * (MOST_CODE // 1000 + 1)))
    assert len(read_cells(save([cell("x = 1")] * MOST_CELLS))) == MOST_CELLS
    with pytest.raises(RefusalLabError, match="larger than 50 MB: clear the outputs"):
        read_cells(b" " * (50 << 20) + b"{}")


def effort(size, kind):
    """How often names are looked at to find what an answer needs, in a notebook of so many cells."""
    import cProfile
    import pstats

    sources = {
        "a chain": [f"def f{i}(x): return f{i + 1}(x)" for i in range(size)] + ["def kl(a, b): return f0(a)"],
        "one name": [f"x = {i}\nx.append({i})" for i in range(size)] + ["def kl(a, b): return x"],
        "a cell": ["\n".join(f"v{i} = v{i - 1}" for i in range(size)) + f"\ndef kl(a, b): return v{size - 1}"],
    }[kind]
    nb = Notebook([Cell("code", source) for source in sources])
    assert nb.statements
    with cProfile.Profile() as profile:
        assert len(nb.needed(["kl"])) == len(sources)
        nb.needed(["kl"], nb.own_cells(()))
        examine.flags(nb, find_exercise("2.2"))
    return pstats.Stats(profile).total_calls


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a chain", "one name", "a cell"])
def test_what_is_needed_is_found_in_linear_time(kind):
    """Counted in calls, which a busy machine does not change."""
    assert effort(800, kind) < 2.5 * effort(400, kind)


# --- ends of lines -------------------------------------------------------------------------------------------------

ODD = "\u2028\u2029\x0b\x0c\x1c\x1d\x1e\x85"  # str.splitlines ends lines there; Python and Jupyter do not


@pytest.mark.parametrize("end", ODD, ids=lambda c: f"U+{ord(c):04X}")
@pytest.mark.parametrize("whole", [(), (0, 1)])
def test_lines_end_where_python_ends_them(end, whole):
    first = f"unused = 1\nk = 2  # pasted{end} from the web\nprint(unused)"
    second = f"def f():\n    '''One{end}two.'''\n    s = 'a{end}b'\n    return len(s) * k"
    space = {}
    for _, source in Notebook([Cell("code", first), Cell("code", second)]).needed(["f"], whole):
        exec(source, space)
    assert space["f"]() == 6


def test_other_ends_of_lines_are_read_as_python_reads_them():
    [one] = read_cells(save([cell("x = 1\r\ny = 2\rz = 3\n")]))
    assert one.source == "x = 1\ny = 2\nz = 3\n"


# --- limits of time ------------------------------------------------------------------------------------------------


def late(task):
    result = full(task)
    if task.student == "mallory":
        result.outcomes[1] = ExerciseResult("2.2", 0, 2, f"It {LATE}: it used more than 20 s of processor time.")
    if task.student == "zoe":
        result.notes, result.outcomes[0] = (
            [f"Cell 3 {LATE}, and was stopped"],
            ExerciseResult("2.1", 0, 2, "There is no"),
        )
    return result


def test_those_that_ran_out_of_time_are_graded_again_when_asked_for(classroom, monkeypatch):
    monkeypatch.setattr(batch, "examine", late)
    done, _, records = classroom()
    assert records.timed_out() == {("mallory", "02"), ("zoe", "02")}
    monkeypatch.setattr(batch, "examine", full)
    done, _, _ = classroom(limits=Limits(timeout=60))
    assert (done.graded, done.unchanged) == (0, 3)
    done, _, _ = classroom(limits=Limits(timeout=60), regrade="timeouts")
    assert (done.graded, done.unchanged) == (2, 1)
    assert records.timed_out() == set()
    assert points(records) == {"ada": 11, "mallory": 11, "zoe": 11}


@pytest.mark.slow
def test_the_command_offers_it(classroom, monkeypatch, tmp_path):
    monkeypatch.setattr(batch, "examine", late)
    command = ["grade", str(tmp_path / "submitted"), "--out", str(tmp_path / "out")]
    first = CliRunner().invoke(cli.app, command)
    assert "2 ran into a limit of time. `--regrade timeouts` grades them again" in first.output
    monkeypatch.setattr(batch, "examine", full)
    again = CliRunner().invoke(cli.app, [*command, "--regrade", "timeouts"])
    assert (again.exit_code, "2 graded, 1 unchanged" in again.output) == (0, True), again.output
    assert "limit of time" not in again.output
    again = CliRunner().invoke(cli.app, [*command, "--regrade", "all"])
    assert (again.exit_code, "3 graded, 0 unchanged" in again.output) == (0, True), again.output
    assert CliRunner().invoke(cli.app, [*command, "--regrade", "some"]).exit_code == 2


def test_all_are_graded_again_when_asked_for(classroom, monkeypatch):
    def mended(task):
        result = full(task)
        result.outcomes[0].points = 0
        return result

    classroom()
    monkeypatch.setattr(batch, "examine", mended)
    done, _, records = classroom(regrade="all")
    assert (done.graded, done.unchanged) == (3, 0)
    assert points(records) == {"ada": 9, "mallory": 9, "zoe": 9}


def test_what_ran_without_a_sandbox_is_graded_again_with_one(classroom):
    for sandboxed, graded in ((False, 3), (False, 0), (True, 3), (True, 0)):
        done, _, _ = classroom(sandboxed=sandboxed)
        assert done.graded == graded


def test_the_result_for_what_is_not_graded():
    result = not_graded(Graded("mallory", "02", [], sandboxed=False), ValueError(BAD))
    assert r"ValueError: a\ud800b\x00c\udcffd" in result.problem
    assert (result.sandboxed, len(result.outcomes)) == (False, len(LAB))
