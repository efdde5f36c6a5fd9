"""Whose code an answer runs: the course's under any name or cover, or the student's own."""

import functools
import importlib.util
import inspect
import marshal
import operator
import types
from unittest import mock

import numpy as np
import pytest
import torch

from refusallab.course import check
from refusallab.course.exercise import CheckFailed
from refusallab.course.exercises import every_exercise
from refusallab.course.origin import course_code
from refusallab.course.progress_file import passed
from refusallab.directions import difference_in_means as library

CODE = library.__code__
RENAMED = {"co_filename": "<ipython>", "co_name": "f", "co_qualname": "f", "co_firstlineno": 1, "co_linetable": b""}


class Calls:
    __call__ = staticmethod(library)


class Makes:
    __new__ = lambda cls, *args: library(*args)  # noqa: E731


def disguised():
    def answer(harmful, harmless): ...

    answer.__code__ = CODE
    return answer


def copied(**changes):
    return types.FunctionType(CODE.replace(**changes), {})


COVERS = {
    "itself": library,
    "partial": functools.partial(library),
    "partial of a call": functools.partial(operator.call, library),
    "no_grad": torch.no_grad()(library),
    "cache": functools.cache(library),
    "singledispatch": functools.singledispatch(library),
    "compiled": torch.compile(library),
    "vectorized": np.vectorize(library),
    "mock": mock.Mock(side_effect=library),
    "its __call__": library.__call__,
    "bound": types.MethodType(library, 1),
    "static": staticmethod(library),
    "an object that calls it": Calls(),
    "another function with its code": disguised(),
    "a copy": copied(),
    "a copy under other names": copied(**RENAMED),
    "a copy that says it is of the standard library": copied(co_filename=functools.__file__),
    "a copy through marshal": types.FunctionType(marshal.loads(marshal.dumps(CODE)), {}),
}


@pytest.fixture(autouse=True)
def progress_file(tmp_path, monkeypatch):
    monkeypatch.setenv("REFUSALLAB_PROGRESS", str(tmp_path / "progress.sqlite"))


@pytest.mark.parametrize("name", COVERS)
def test_a_function_of_the_course_is_known_under_any_cover(name):
    assert course_code(COVERS[name]) == "refusallab.directions.difference_in_means"


@pytest.mark.parametrize("e", every_exercise(), ids=lambda e: e.number)
def test_every_reference_is_known(e):
    assert course_code(e.reference).startswith("refusallab.")
    with pytest.raises(CheckFailed, match="course's own"):
        check(e.number, e.reference)


def own(harmful, harmless):
    return harmful.mean(0) - harmless.mean(0)


def calls(*args):
    return library(*args)


OWN = [
    own, calls, functools.partial(calls, library), torch.no_grad()(own), functools.wraps(library)(own),
    functools.cache(own), lambda a, b: library(a, b), Makes, len, torch.sub, torch.nn.functional.kl_div, 3, None,
]  # fmt: skip


@pytest.mark.parametrize("function", OWN, ids=range(len(OWN)))
def test_what_somebody_wrote_is_theirs(function):
    assert course_code(function) == ""


def test_what_somebody_typed_in_is_theirs_word_for_word(tmp_path):
    path = tmp_path / "typed.py"
    path.write_text("from __future__ import annotations\n\n" + inspect.getsource(library))
    spec = importlib.util.spec_from_file_location("typed", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert course_code(module.difference_in_means) == ""


def test_an_object_that_minds_being_looked_at():
    class Touchy:
        __class__ = property(lambda self: 1 / 0)
        __eq__ = __getattribute__ = __hash__ = lambda self, *args: 1 / 0

        def __call__(self): ...

    assert course_code(Touchy()) == ""


def test_the_check_says_kindly_that_the_answer_is_to_be_ones_own():
    with pytest.raises(CheckFailed) as failed:
        check("2.1", library)
    assert "0 of 2 points" in str(failed.value)
    assert "`refusallab.directions.difference_in_means`" in str(failed.value)
    assert "write `mean_difference` yourself" in str(failed.value)
    assert passed() == set()
    check("2.1", own)
    assert passed() == {"2.1"}
