"""One submission: run it in the sandbox, and judge the results outside."""

from __future__ import annotations

import builtins
import re
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from itertools import takewhile
from typing import Any

from grader.policy import flags
from refusallab.course.catalogue import HEADERS, QUESTIONS
from refusallab.course.cells import Cell, Notebook, read_cells
from refusallab.course.exercise import BORROWED, Exercise, check_cases, run_cases
from refusallab.course.exercises import exercises_of
from refusallab.errors import RefusalLabError
from refusallab.sandbox.kernel import LATE, Execution, Kernel, KernelDied
from refusallab.sandbox.plain import from_json, storable, to_json
from refusallab.sandbox.server import Limits, shared

SHOWN = 2_000  # characters of output that are kept of a cell
LONGEST_ANSWER = 50_000  # characters of a written answer that are kept
LONGEST_OUTPUT = 200_000  # characters of output that are kept of a submission
KINDS = {"Tensor", "ndarray", "str", "list", "tuple", "dict", "set", "int", "float", "bool", "function", "Series"}
NOT_WRITTEN = "It is not written yet: replace the `raise NotImplementedError()` by your code."
PLACEHOLDER = "YOUR ANSWER HERE"  # what the release puts in place of a model answer
MISSING = "There is no function `{}` in the notebook."
_judging = threading.Lock()  # judging redirects stdout, which all threads share


@dataclass(frozen=True)
class Task:
    """A submission and what is needed to grade it."""

    student: str
    lab: str
    data: bytes  # the notebook
    seed: int
    limits: Limits = Limits()
    sandboxed: bool = True
    released: tuple[str, ...] = ()  # sources of the cells of the lab, as students got it


@dataclass
class ExerciseResult:
    """What became of one exercise."""

    number: str
    points: float
    most: float
    problem: str = ""  # for the student: nothing of the hidden inputs
    mistake: str = ""
    case: str = ""
    right: tuple[str, ...] = ()  # cases before the one that failed
    detail: str = ""  # for the instructor: may hold what the answer gave back
    flags: tuple[str, ...] = ()  # why a person should look at it


@dataclass
class Graded:
    """What became of a submission."""

    student: str
    lab: str
    outcomes: list[ExerciseResult]
    problem: str = ""  # of the whole submission
    notes: list[str] = field(default_factory=list)  # cells that failed, and how
    output: str = ""  # what its cells printed, cut
    written: dict[str, str] = field(default_factory=dict)  # answers to questions, by number
    seconds: float = 0
    sandboxed: bool = True


def examine(task: Task) -> Graded:
    """Grade a submission. Whatever is in it, this returns a result with a reason.

    An exception means a fault of the grader, not a result: a server that does not start, a definition that is broken.
    """
    start, exercises = time.monotonic(), exercises_of(task.lab)
    for exercise in exercises:
        hidden_inputs(exercise, task.seed)
    graded = Graded(task.student, task.lab, [], sandboxed=task.sandboxed)
    try:
        notebook = _read(task.data)
        graded.written = written_answers(notebook.cells, task.lab)
        graded.outcomes = _examine(task, notebook, exercises, graded)
    except Damaged as error:
        graded.problem = str(error)
        graded.outcomes = [ExerciseResult(e.number, 0, e.points, graded.problem) for e in exercises]
    except RefusalLabError:
        raise
    except Exception as error:
        graded = not_graded(graded, error)
    graded.seconds = round(time.monotonic() - start, 2)
    return _storable(graded)


class Damaged(RefusalLabError):
    """A file that is not a notebook, or cannot be graded."""


def _read(data: bytes) -> Notebook:
    try:
        notebook = Notebook(read_cells(data))
    except RefusalLabError as error:
        raise Damaged(f"{error} Please hand in again.") from error
    if not any(cell.source.strip() for cell in notebook.cells):
        raise Damaged("The notebook is empty. Please hand in again.")
    return notebook


def not_graded(graded: Graded, error: Exception) -> Graded:
    """The result for a submission that the grader cannot deal with: no points, the reason, and a person looks at it."""
    reason = f"{type(error).__name__}: {error}"[:300].removesuffix(": ")
    problem = f"This could not be graded by machine ({reason}). A person has to look at it."
    outcomes = [ExerciseResult(e.number, 0, e.points, problem) for e in HEADERS if e.lab == graded.lab]
    return _storable(Graded(graded.student, graded.lab, outcomes, problem, sandboxed=graded.sandboxed))


def _storable(value: Any) -> Any:
    """The same with every text in it made storable."""
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, list | tuple):
        return type(value)(map(_storable, value))
    if isinstance(value, dict):
        return {_storable(key): _storable(item) for key, item in value.items()}
    if is_dataclass(value):
        return replace(value, **{f.name: _storable(getattr(value, f.name)) for f in fields(value)})
    return value


def _examine(task: Task, notebook: Notebook, exercises: Sequence[Exercise], graded: Graded) -> list[ExerciseResult]:
    names = [e.function for e in exercises]
    there = [e for e in exercises if any(e.function in s.binds for s in notebook.statements)]
    run = Run(task)
    outcomes = _attempt(run, notebook, exercises, there, notebook.needed(names), graded)
    tried = [e for e in exercises if not outcomes[e.number].points and outcomes[e.number].problem != NOT_WRITTEN]
    if tried and (own := notebook.own_cells(task.released)):  # more of the student's code may be needed than it seems
        again = _attempt(run, notebook, tried, tried, notebook.needed(names, own), graded)
        outcomes |= {number: outcome for number, outcome in again.items() if outcome.points}
    return [outcomes[e.number] for e in exercises]


def _attempt(
    run: Run,
    notebook: Notebook,
    exercises: Sequence[Exercise],
    probed: Sequence[Exercise],
    chunks: list[tuple[int, str]],
    graded: Graded,
) -> dict[str, ExerciseResult]:
    """Run `chunks`, then judge `exercises`, of which those in `probed` are tried."""
    task, observed = run.task, {}
    if probed:
        with run.of(chunks):
            observed = {e.number: run.probe(e) for e in probed}
        graded.notes += [note for note in run.notes.values() if note not in graded.notes]
        graded.output = run.output or graded.output
    outcomes = {}
    for e in exercises:
        outcome = outcomes[e.number] = _judge(e, observed.get(e.number, to_json({"missing": True})), task)
        if outcome.problem == MISSING.format(e.function):
            outcome.problem = _why_missing(notebook, e, run.notes if probed else {})
        if outcome.points:
            outcome.flags = _flags(notebook, e, task.released)
    return outcomes


def _flags(notebook: Notebook, exercise: Exercise, released: Sequence[str]) -> tuple[str, ...]:
    try:
        return tuple(flags(notebook, exercise, released))
    except Exception as error:
        return (f"could not be read by machine: {type(error).__name__}",)


def _why_missing(notebook: Notebook, exercise: Exercise, notes: dict[int, str]) -> str:
    if problem := notebook.problem_of(exercise.function):
        return f"The cell of `{exercise.function}` is not valid Python: {problem}."
    for index, _ in notebook.functions(exercise.function):
        if index in notes:
            return f"`{exercise.function}` was not defined. {notes[index]}"
    return MISSING.format(exercise.function)


class Run:
    """Cells of a submission, run in a kernel, and again in a new one when it dies: `with run.of(chunks)`.

    All that is run of a submission shares its time.
    """

    def __init__(self, task: Task):
        self.task = task
        self.chunks: list[tuple[int, str]] = []
        self.notes: dict[int, str] = {}
        self.output = ""
        self._kernel: Kernel | None = None
        self._left = task.limits.total  # seconds of processor time
        self._end = time.monotonic() + task.limits.by_the_clock(task.limits.total)

    def of(self, chunks: list[tuple[int, str]]) -> Run:
        """The same with these cells, and with what is left of the time."""
        self.chunks, self.notes, self.output = list(chunks), {}, ""
        return self

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._kernel:
            self._kernel.close()
        self._kernel = None

    def _ready(self) -> Kernel:
        """A kernel in which the cells have run, without those that kill it."""
        while self._kernel is None:
            self._kernel, self.output = Kernel(shared(self.task.sandboxed), self.task.limits), ""
            for index, source in list(self.chunks):
                try:
                    self._run_cell(index, source)
                except KernelDied as died:
                    self.notes[index] = f"Cell {index + 1}: the kernel {died}. The others were run without it."
                    self.chunks.remove((index, source))
                    self._stop()
                    break
        return self._kernel

    def _run_cell(self, index: int, source: str) -> None:
        reply = self._run(source)
        if reply.timed_out:
            self.notes[index] = (
                f"Cell {index + 1} {LATE}, and was stopped: {_limit(reply.timed_out, self.task.limits)}."
            )
        elif reply.error:
            self.notes[index] = f"Cell {index + 1} failed with {reply.error}"
        if reply.output.strip() and len(self.output) < LONGEST_OUTPUT:
            self.output += f"[cell {index + 1}]\n{_cut(reply.output, SHOWN)}\n"

    def _run(self, source: str, observe: str = "") -> Execution:
        """Run something within the time for one cell or exercise, and within what is left of the time for all."""
        assert self._kernel
        limits, clock = self.task.limits, self._end - time.monotonic()
        if self._left <= 0 or clock <= 0:
            raise OutOfTime("processor" if self._left <= 0 else "clock")
        seconds = min(self._left, limits.timeout)
        reply = self._kernel.run(source, seconds, observe, min(clock, limits.by_the_clock(limits.timeout)))
        self._left -= reply.processor
        return reply

    def probe(self, exercise: Exercise) -> str:
        """What the sandbox says about an answer, as text of plain data."""
        try:
            fresh = self._kernel is None
            self._ready()
            inputs, _ = hidden_inputs(exercise, self.task.seed)
            call = f"observe_answer({exercise.number!r}, globals(), {inputs!r})"
            reply = self._run("", f"__import__('refusallab.course.observing', fromlist=['x']).{call}")
            if reply.timed_out or not _has_cases(reply.observed):
                self._stop()  # what it left behind goes with the kernel, and a new one has another user
            if reply.timed_out and not fresh:
                return self.probe(exercise)  # the time may have gone into what an earlier answer left running
            if reply.timed_out:
                return to_json({"timeout": reply.timed_out})
            return reply.observed or to_json({"silent": reply.error})
        except KernelDied as died:
            self._stop()
            return to_json({"died": str(died)})
        except OutOfTime as limit:
            self._stop()
            return to_json({"timeout": f"{limit} for all"})


def _has_cases(text: str) -> bool:
    """Whether what the sandbox says is plain data with cases. An answer that forks says several things at once."""
    try:
        return "cases" in from_json(text)
    except Exception:
        return False


class OutOfTime(Exception):
    """A submission has used up its time, of the processor or by the clock."""


def _limit(which: str, limits: Limits) -> str:
    """A limit of time in words."""
    seconds, what = limits.timeout, "a cell or an exercise"
    if which.endswith("for all"):
        seconds, what = limits.total, "all cells and exercises"
    if which.startswith("clock"):
        return f"more than {limits.by_the_clock(seconds):g} s by the clock for {what}"
    return f"more than {seconds:g} s of processor time for {what}"


@cache
def hidden_inputs(exercise: Exercise, seed: int) -> tuple[str, int]:
    """The inputs of an exercise as text of plain data, and how many there are. Says so if its definition is broken."""
    with _judging:
        cases = exercise.cases(seed)
        text, own = to_json([case.inputs for case in cases]), run_cases(exercise, exercise.reference, seed)
    if '"foreign"' in text:
        raise RefusalLabError(f"Exercise {exercise.number} has inputs that are not plain data: correct its `cases`.")
    if not own.passed:
        raise RefusalLabError(f"The reference of exercise {exercise.number} fails: {own.problem} Correct it.")
    return text, len(cases)


def _judge(exercise: Exercise, text: str, task: Task) -> ExerciseResult:
    """The outcome of an exercise from what the sandbox says."""
    outcome, (_, count) = ExerciseResult(exercise.number, 0, exercise.points), hidden_inputs(exercise, task.seed)
    try:
        said = from_json(text)
        cases = said.get("cases")
        if cases is None:
            outcome.problem = _without_cases(exercise, said, task.limits)
            outcome.detail = str(said.get("silent", ""))[:1000]
            return outcome
        if len(cases) != count or not all(isinstance(case, dict) for case in cases):
            raise ValueError("not an answer for each input")
        with _judging:
            found = check_cases(exercise, task.seed, lambda place, inputs: _replay(cases[place], inputs))
    except Exception as error:
        outcome.problem = "The answer returned something that is not plain data."
        outcome.detail = str(error)[:500]
        return outcome
    outcome.points = exercise.points if found.passed else 0
    outcome.mistake, outcome.case, outcome.right = found.mistake, found.case, found.notes
    outcome.detail = found.problem[:1000]
    failed = cases[len(found.notes)] if not found.passed and len(found.notes) < len(cases) else {}
    outcome.problem = _public(found.problem, failed)
    return outcome


def _without_cases(exercise: Exercise, said: dict[str, Any], limits: Limits) -> str:
    if "missing" in said:
        return MISSING.format(exercise.function)
    if "kind" in said:
        return f"`{exercise.function}` must be a function, but it is something else."
    if "timeout" in said:
        return f"It {LATE}: it used {_limit(str(said['timeout']), limits)}."
    if "borrowed" in said:
        name = str(said["borrowed"])
        known = re.fullmatch(r"(refusallab|smallmodels)\.[\w.<>]{1,150}", name)
        return BORROWED.format(f"`{name}`" if known else "code", f"`{exercise.function}`")
    if "died" in said:
        return f"The kernel {str(said['died'])[:100]} while it ran."
    if "large" in said:
        return "It returns too much data."
    return "It returned nothing: the kernel no longer worked after the cells had run."


def _replay(case: dict[str, Any], inputs: dict[str, Any]) -> Any:
    """Do to the inputs, return or raise what the answer did, returned or raised in the sandbox."""
    if "error" in case:
        name = str(case["error"])
        if name == "NotImplementedError" and not case.get("message"):  # that of the stub
            raise NotImplementedError
        raise type(name if name.isidentifier() else "Exception", (Exception,), {})(str(case.get("message", "")))
    after = case["inputs"]
    inputs.update({key: after[key] for key in inputs if key in after})
    return case["value"]


def _public(problem: str, case: dict[str, Any]) -> str:
    """A problem without values that come from hidden inputs, for the student."""
    if "error" in case and problem != NOT_WRITTEN:
        name, line = str(case["error"]), case.get("line")
        known = isinstance(getattr(builtins, name, None), type)
        where = f" at line {line} of its cell" if isinstance(line, int) and 0 < line < 10_000 else ""
        return f"It raised {name if known else 'an exception of its own'}{where}."
    problem = re.sub(r"(Expected another (?:value of kind \w+|text))(?: than|\. Yours) .*", r"\1.", problem, flags=re.S)
    if got := re.search(r"got an? ([^:]*): ", problem):
        return f"{problem[: got.start()]}got {got[1] if got[1] in KINDS else 'something else'}."
    return problem


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}\n... ({len(text) - most} or more characters left out)"


def written_answers(cells: Sequence[Cell], lab: str) -> dict[str, str]:
    """The answers to the written questions of a lab: from the cells with their tag, or from those below."""
    found = {}
    for question in (q for q in QUESTIONS if q.lab == lab):
        tag = {"role": "written", "number": question.number}
        places = [i for i, cell in enumerate(cells) if tag.items() <= cell.tag.items()]
        if places:
            answer = _joined(cells[i] for i in places) or _joined(_text_below(cells, places[-1]))
        else:
            answer = _joined(_text_below(cells, _heading(cells, question.number))[1:])  # the first one asks it
        found[question.number] = _cut(answer, LONGEST_ANSWER)
    return found


def _joined(cells: Iterable[Cell]) -> str:
    """What somebody wrote into cells. Empty if they are as they were released."""
    texts = (cell.source.strip() for cell in cells)
    return "\n\n".join(text for text in texts if text not in ("", PLACEHOLDER))


def _heading(cells: Sequence[Cell], number: str) -> int:
    """The place of the heading of a question; that of the last cell if there is none."""
    heading = re.compile(rf"^#+ Question {re.escape(number)}\b", flags=re.M)
    places = (i for i, cell in enumerate(cells) if cell.kind == "markdown" and heading.search(cell.source))
    return next(places, len(cells) - 1)


def _text_below(cells: Sequence[Cell], place: int) -> list[Cell]:
    """The cells of text without a tag below a place, up to the next section."""
    texts = [cell for cell in cells[place + 1 :] if cell.kind == "markdown" and not cell.tag]
    return list(takewhile(lambda cell: not re.match(r"\s*##? ", cell.source), texts))
