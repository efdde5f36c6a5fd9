"""The course: answers are judged as they should be, checks tell no answer, progress is never lost."""

import copy
import inspect
import logging
import multiprocessing
import os
import re
import sys
import threading
import warnings

import numpy as np
import pytest
import torch

from refusallab.course import check, checking, observing, progress, solved
from refusallab.course.catalogue import QUESTIONS
from refusallab.course.checking import PUBLIC_SEED
from refusallab.course.exercise import Case, CheckFailed, Exercise, Mistake, result_text, run_cases
from refusallab.course.exercises import every_exercise, find_exercise
from refusallab.course.notebook import DIFFICULTY, HIDDEN_SEED
from refusallab.course.progress_file import passed, record
from refusallab.errors import RefusalLabError
from refusallab.model import blocks, encode
from refusallab.sandbox.plain import from_json, to_json

EXERCISES = every_exercise()
each_exercise = pytest.mark.parametrize("e", EXERCISES, ids=lambda e: e.number)
each_mistake = pytest.mark.parametrize(
    ("e", "mistake"),
    [pytest.param(e, mistake, id=f"{e.number} {mistake.name}") for e in EXERCISES for mistake in e.mistakes],
)


@pytest.fixture(autouse=True)
def progress_file(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "progress.sqlite"
    monkeypatch.setenv("REFUSALLAB_PROGRESS", str(path))
    return path


NO_CONSTANTS = {"9.3"}  # here a number does not do: its gradient with respect to the inputs is looked at


@pytest.mark.slow
class TestExercises:
    @each_exercise
    @pytest.mark.parametrize("seed", [PUBLIC_SEED, HIDDEN_SEED, 2])
    def test_the_reference_passes(self, e, seed):
        assert run_cases(e, e.reference, seed).problem == ""

    @each_mistake
    def test_a_typical_mistake_is_called_by_its_name(self, e, mistake, monkeypatch):
        assert run_cases(e, mistake.wrong, PUBLIC_SEED).mistake == mistake.name
        monkeypatch.setattr("refusallab.course.exercise._recognise", lambda *_: None)  # naming is half of the work
        assert not run_cases(e, mistake.wrong, HIDDEN_SEED).passed

    @each_exercise
    def test_a_hard_coded_answer_passes_once_and_fails_the_hidden_check(self, e):
        given = []

        def noting(*args, **inputs):
            given.append(e.reference(*args, **inputs))
            return given[-1]

        assert run_cases(e, noting, PUBLIC_SEED).passed
        for seed, right in ((PUBLIC_SEED, e.number not in NO_CONSTANTS), (HIDDEN_SEED, False)):
            answers = copy.copy(given)
            assert run_cases(e, lambda *_, answers=answers, **__: answers.pop(0), seed).passed == right

    @each_exercise
    def test_definitions_are_complete(self, e):
        assert len(e.mistakes) >= 3 and len({m.name for m in e.mistakes}) == len(e.mistakes)
        assert len(e.hints) >= 2 and e.difficulty in DIFFICULTY and e.minutes > 0 and e.points > 0
        assert e.function.isidentifier() and find_exercise(e.number) is e

    def test_numbers_are_those_of_the_labs_in_order(self):
        for lab in {e.lab for e in EXERCISES}:
            numbers = [item.number for item in (*EXERCISES, *QUESTIONS) if item.lab == lab]
            assert numbers == [f"{int(lab)}.{i}" for i in range(1, len(numbers) + 1)]


def exercise(reference, inputs, **settings):
    """A small exercise, judged on one input."""
    fields = {"number": "9.1", "title": "T", "difficulty": 1, "minutes": 1, "points": 1, "function": "f"}
    cases = lambda seed: [Case("one input", copy.deepcopy(inputs))]  # noqa: E731
    return Exercise(**fields, reference=reference, cases=cases, mistakes=(), hints=(), **settings)


DOUBLE = exercise(lambda x: 2 * x, {"x": torch.tensor([1.2345, 6.7891])})


def lost_in_a_trace(x):
    if x is None:
        doubled = 2
    return doubled


class TestJudge:
    @pytest.mark.parametrize(
        ("answer", "problem"),
        [
            (lambda x: None, "a missing return?"),
            (lambda x: 2 * x[:1], "The shape is [1], expected [2]."),
            (lambda x: [2.469, 13.5782], "Expected a tensor of shape [2]"),
            (lambda x: x / 0, "NaN or infinite"),
            (lambda x: x, "100% of the values are off"),
            (lambda x: 2 * x + torch.tensor([0.0, 1.0]), "50% of the values are off, by up to 1 at index [1]"),
            (lambda x: 1 / 0, "It raised ZeroDivisionError: division by zero"),
            (lost_in_a_trace, "Was it made inside a trace? Then it needs `.save()`"),
            (lambda y: 2 * y, "unexpected keyword argument 'x'"),
            (torch.tensor(1.0), "must be a function, and this is a Tensor"),
        ],
    )
    def test_the_problem_is_named(self, answer, problem):
        verdict = run_cases(DOUBLE, answer, 0)
        assert problem in verdict.problem
        assert problem in result_text(verdict)

    def test_a_flag_that_is_wrong_is_told_as_such(self):
        verdict = run_cases(
            exercise(lambda x: {"the same seed": True}, {"x": 1}), lambda x: {"the same seed": False}, 0
        )
        assert verdict.problem == "At key 'the same seed': This is False, and should not be."

    def test_a_stub_is_not_an_error_but_not_written_yet(self):
        def stub(x):
            raise NotImplementedError()

        assert "not written yet" in run_cases(DOUBLE, stub, 0).problem

    def test_what_torch_has_not_implemented_is_an_error_of_the_answer(self):
        problem = run_cases(DOUBLE, lambda x: torch.ones(2, dtype=torch.int64).softmax(-1), 0).problem
        assert problem.startswith("It raised NotImplementedError: ")

    def test_a_message_for_people_stands_for_itself(self):
        def told(x):
            raise RefusalLabError("Return one tensor.")

        assert run_cases(DOUBLE, told, 0).problem == "Return one tensor."

    @pytest.mark.slow
    def test_a_name_that_a_trace_does_not_know_is_told_apart_from_other_unknown_names(self):
        def not_saved(m, prompts, source, layer, position):
            with m.nn.trace(**encode(m, source)):
                kept = blocks(m.nn)[layer].input[:, position]
            with m.nn.trace(**encode(m, prompts)):
                x = blocks(m.nn)[layer].input.clone()
                x[:, position] = kept
            return x

        def not_imported(m, prompts, source, layer, position):
            with m.nn.trace(**encode(m, prompts)):
                x = blocks(m.nn)[layer].input.clone().save()
            return einsum(x, "n t w -> n w")  # noqa: F821

        saving, name = "Then it needs `.save()`", "It raised NameError: name "
        verdict = run_cases(find_exercise("12.1"), not_saved, 0)
        assert verdict.problem.startswith(f"{name}'kept' is not defined") and saving in verdict.problem
        verdict = run_cases(find_exercise("12.1"), not_imported, 0)
        assert verdict.problem.startswith(f"{name}'einsum' is not defined") and saving not in verdict.problem

    @pytest.mark.parametrize(
        ("got", "problem"),
        [
            (f"{20 * 'same '}My end.", f"right up to {8 * 'same '!r}; there it goes on with 'My end.'."),
            (f"{20 * 'same '}Here comes more.\n", "same Here comes more.'; there it goes on with '\\n'."),
            (20 * "same ", f"right up to {8 * 'same '!r}; there it ends."),
            (f"Not the {20 * 'same '}", "Expected another value of kind str than 'Not the same same"),
            ("Short.", "Expected another value of kind str than 'Short.'."),
        ],
    )
    def test_of_a_long_text_the_place_is_told_where_it_goes_wrong(self, got, problem):
        expected = f"{20 * 'same '}Here comes more."
        verdict = run_cases(exercise(lambda x: {"reply": [expected]}, {"x": 1}), lambda x: {"reply": [got]}, 0)
        assert verdict.problem.startswith("At key 'reply': Value 1 of 1: Expected another ")
        assert problem in verdict.problem
        assert "comes" in got or "comes" not in verdict.problem

    @pytest.mark.parametrize("observe", [None, lambda function, inputs: function("model", **inputs)])
    @pytest.mark.parametrize(
        ("inputs", "edit", "advice"),
        [
            ({"x": torch.ones(3)}, lambda x: x.mul_(2), "Work on a new tensor"),
            ({"x": torch.tensor(float("nan"))}, lambda x: x.fill_(1), "Work on a new tensor"),
            ({"x": [torch.ones(3), torch.ones(3)]}, lambda x: x[1].mul_(2), "Work on a new tensor"),
            ({"x": [torch.ones(3)]}, lambda x: x.clear(), "Work on a copy: [*x, y]"),
            ({"x": [1, 2]}, lambda x: x.append(3), "Work on a copy: [*x, y]"),
            ({"x": [2, 1]}, lambda x: x.sort(), "Work on a copy: [*x, y]"),
            ({"x": {"a": 1.0}}, lambda x: x.pop("a"), "Work on a copy: [*x, y]"),
        ],
    )
    def test_an_edit_in_place_is_caught(self, inputs, edit, advice, observe):
        """Though the result is right."""

        def answer(*_, x):
            edit(x)
            return 1

        e = exercise(lambda *_, x: 1, inputs, **({"observe": observe} if observe else {}))
        assert run_cases(e, lambda *_, x: 1, 0).passed
        verdict = run_cases(e, answer, 0)
        assert verdict.mistake == "changes its input" and "`x`" in verdict.problem
        assert advice in verdict.problem

    def test_an_answer_cannot_spoil_the_inputs_of_the_next_check(self):
        e = exercise(lambda x: x.sum(), {"x": torch.ones(3)})
        run_cases(e, lambda x: x.zero_(), 0)
        assert run_cases(e, lambda x: x.sum(), 0).passed

    @pytest.mark.parametrize(
        ("expected", "got"),
        [
            (1.2345, 0.0),
            (torch.tensor([1.2345, 6.7891]), torch.zeros(2)),
            ({"key": 1.2345}, {"key": 0.0}),
            ([1.2345, 1.0], [0.0, 1.0]),
            ("1.2345", "0"),
            (f"{90 * '1'}1.2345", 90 * "1"),
            (12345, 0),
        ],
    )
    def test_a_report_tells_no_expected_value(self, expected, got):
        verdict = run_cases(exercise(lambda x: expected, {"x": 1}), lambda x: got, 0)
        assert not verdict.passed
        assert not re.search(r"1\.?23|6\.79", result_text(verdict))

    @pytest.mark.parametrize(
        ("expected", "got", "right"),
        [
            (1.0, torch.tensor(1.0), True),
            (1.0, 1 + 1e-5, True),
            (1.0, 1 + 1e-3, False),
            (1, True, False),
            (True, 1, False),
            (3, np.int64(3), True),
            (3, np.int64(4), False),
            (1.0, np.float32(1), True),
            (1, np.bool_(True), False),
            (True, np.bool_(True), True),
            (True, np.bool_(False), False),
            (True, np.int64(1), False),
            (True, torch.tensor(True), True),
            (True, torch.tensor([False]), False),
            (True, torch.tensor(1), False),
            (True, torch.tensor([True, True]), False),
            ("a", np.str_("a"), True),
            ([1, True], [np.int64(1), torch.tensor(True)], True),
            ("a", "a", True),
            ((1.0, 2.0), [1.0, 2.0], True),
            ((1.0, 2.0), [1.0], False),
            ({"a": 1.0}, {"b": 1.0}, False),
            (torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0]), True),
            (torch.tensor([float("nan"), 1.0]), torch.tensor([0.0, 1.0]), False),
            (torch.tensor([1.0, 1e4]), torch.tensor([1.5, 1e4]), True),  # the tolerance grows with the largest value
        ],
    )
    def test_what_counts_as_equal_in_the_notebook_and_for_the_grader(self, expected, got, right):
        for value in (got, from_json(to_json(got))):
            assert run_cases(exercise(lambda x: expected, {"x": 1}), lambda x, value=value: value, 0).passed == right

    def test_a_mistake_is_recognised_by_its_result(self):
        triple = Mistake("triple", lambda x: 3 * x, "Twice, not three times.")
        broken = Mistake("broken", lambda x: 1 / 0, "Never seen.")
        e = exercise(lambda x: 2 * x, {"x": torch.ones(2)})
        e = Exercise(**{**vars(e), "mistakes": (broken, triple)})
        assert run_cases(e, lambda x: x + x + x, 0).mistake == "triple"
        assert run_cases(e, lambda x: 5 * x, 0).mistake == ""
        assert "Twice, not three times." in result_text(run_cases(e, lambda x: x + x + x, 0))

    def test_a_mistake_whose_result_is_none_has_a_name_too(self):
        never = Mistake("none for zero", lambda x: x or None, "Zero is a number.")
        broken = Mistake("broken", lambda x: 1 / 0, "Never seen.")
        e = exercise(lambda x: x, {"x": 0})
        e = Exercise(**{**vars(e), "mistakes": (broken, never)})
        assert run_cases(e, lambda x: None if x == 0 else x, 0).mistake == "none for zero"

    def test_nothing_that_an_answer_says_is_shown(self, capfd):
        handler = logging.StreamHandler(sys.stderr)  # as libraries make them: bound to the stderr of that time
        logger = logging.getLogger("a library")
        logger.addHandler(handler)

        def noisy(x):
            print("out")
            print("err", file=sys.stderr)
            warnings.warn("warning", stacklevel=1)
            logger.warning("log")
            os.write(2, b"descriptor")
            return 2 * x

        assert run_cases(DOUBLE, noisy, 0).passed
        assert capfd.readouterr() == ("", "")
        logger.warning("log")
        os.write(2, b"descriptor")
        assert capfd.readouterr().err == "log\ndescriptor"  # afterwards all is as it was


def own(harmful, harmless):
    return harmful.mean(0) - harmless.mean(0)


class TestCheck:
    @pytest.mark.slow
    def test_right(self, capsys):
        e = find_exercise("2.1")
        check("2.1", own)
        assert capsys.readouterr().out == f"✓ 2.1 {e.title}: right on 3 inputs. {e.points} of {e.points} points.\n"
        assert passed() == {"2.1"}

    def test_wrong(self):
        e = find_exercise("2.1")
        with pytest.raises(CheckFailed) as failed:
            check("2.1", lambda harmful, harmless: own(harmless, harmful))
        message = str(failed.value)
        assert e.mistakes[0].name in message and e.mistakes[0].advice in message and "not yet" in message
        assert failed.value._render_traceback_() == [message]  # what a notebook shows instead of the traceback
        assert passed() == set()

    def test_the_hidden_check_says_nothing_and_records_nothing(self, capsys):
        check("2.1", own, seed=HIDDEN_SEED)
        assert capsys.readouterr().out == ""
        assert passed() == set()

    def test_an_unknown_number(self):
        with pytest.raises(RefusalLabError, match=r"There is no exercise '99\.1'"):
            check("99.1", print)


class TestSolved:
    @pytest.fixture(autouse=True)
    def nothing_approved(self, monkeypatch):
        monkeypatch.setattr(checking, "_approved", {})

    @staticmethod
    def right(harmful, harmless):
        return harmful.mean(0) - harmless.mean(0)

    @staticmethod
    def is_the_library(function):
        e = find_exercise("2.1")
        assert inspect.signature(function) == inspect.signature(e.reference) and not hasattr(function, "__wrapped__")
        return all(torch.equal(function(**case.inputs), e.reference(**case.inputs)) for case in e.cases(0))

    def test_an_approved_answer_is_what_the_lab_goes_on_with(self, capsys):
        check("2.1", self.right)
        capsys.readouterr()
        assert solved("2.1", self.right) is self.right
        assert capsys.readouterr().out == ""

    def test_without_approval_it_is_the_library_and_a_line(self, capsys):
        def wrong(harmful, harmless):
            return harmful.mean(0)

        with pytest.raises(CheckFailed):
            check("2.1", wrong)
        assert self.is_the_library(solved("2.1", wrong))
        said = "2.1 is not solved yet: the cells below use the library's version.\n"
        assert capsys.readouterr().out == said

    def test_an_answer_that_changed_since_its_check_is_not_approved(self):
        check("2.1", self.right)
        assert self.is_the_library(solved("2.1", lambda harmful, harmless: harmful.mean(0)))

    def test_a_hidden_check_alone_approves_nothing(self):
        check("2.1", self.right, seed=3)
        assert self.is_the_library(solved("2.1", self.right))

    def test_the_fallback_is_no_answer(self):
        with pytest.raises(CheckFailed, match="the course's own"):
            check("2.1", solved("2.1", print))

    def test_an_answer_that_calls_the_fallback_is_no_answer(self):
        def asks(harmful, harmless):
            return solved("2.1", asks)(harmful, harmless)

        fallback = solved("2.1", print)
        for answer in (asks, lambda harmful, harmless: fallback(harmful, harmless)):
            with pytest.raises(CheckFailed, match=r"course's own `refusallab\.course\.solved`.* write"):
                check("2.1", answer)
        assert passed() == set()
        assert fallback(torch.ones(1, 2), torch.zeros(1, 2)).tolist() == [1, 1]  # anywhere else it works

    def test_in_the_sandbox_an_answer_may_call_itself_and_be_gone_on_with_twice(self):
        source = "def kl(**given): return kl() if given else 0\nkl = solved('2.2', kl)\nkl = solved('2.2', kl)"
        names = {"solved": solved}
        exec(source, names)
        inputs = to_json([case.inputs for case in find_exercise("2.2").cases(0)])
        assert "cases" in from_json(observing._observe(find_exercise("2.2"), names, inputs))

    def test_an_answer_may_call_the_fallback_of_another_exercise(self):
        divergence = solved("2.2", print)

        def right(harmful, harmless):
            divergence(torch.zeros(1, 2), torch.zeros(1, 2))
            return self.right(harmful, harmless)

        check("2.1", right)


class TestProgress:
    def test_what_passed_stays_passed(self, capsys):
        record("2.1", 2)
        record("2.1", 2)
        record("2.4", 2)
        progress("02")
        total = sum(e.points for e in EXERCISES if e.lab == "02")
        assert capsys.readouterr().out == f"Lab 02   2.1 ✓  2.2 ·  2.3 ·  2.4 ✓  2.5 ·   4 of {total} points\n"
        progress()
        assert len(capsys.readouterr().out.splitlines()) == len({e.lab for e in EXERCISES})

    def test_a_corrupt_file_costs_no_work(self, progress_file, capsys):
        progress_file.parent.mkdir()
        progress_file.write_bytes(b"not a database" * 100)
        check("2.1", own)
        said = capsys.readouterr()
        assert "Progress was not saved" in said.out and "✓ 2.1" in said.out and said.err == ""
        assert passed() == set()
        progress()

    def test_a_place_where_nothing_can_be_written_costs_no_work(self, tmp_path, monkeypatch, capsys):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("REFUSALLAB_PROGRESS", str(tmp_path / "file" / "progress.sqlite"))
        check("2.1", own)
        assert "✓ 2.1" in capsys.readouterr().out

    def test_notebooks_may_write_at_the_same_time(self):
        def write(start):
            for i in range(start, start + 5):
                record(str(i), 1)

        process = multiprocessing.get_context("fork").Process  # forked before there are threads with open files
        workers = [kind(target=write, args=(10 * k,)) for k, kind in enumerate([process] * 2 + [threading.Thread] * 2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert passed() == {str(10 * k + i) for k in range(4) for i in range(5)}
