"""Lab 10: what its exercises ask beside right values, and the replication that its second track runs."""

import pytest

from refusallab.course.exercise import find, judge
from refusallab.course.exercises import lab10


def test_one_budget_is_spent_and_not_exceeded():
    for case in lab10.BUDGET.cases(5):
        first, second, cost = case.inputs.values()
        t1, t2 = lab10.BUDGET.reference(first, second, cost)
        alarms = (first > t1) | (second > t2)
        assert 0 < alarms.double().mean() <= cost
        k = (first > t1).sum() + 1  # the next threshold of equal rank costs more than there is
        lower = [x.sort(descending=True).values[k] for x in (first, second)]
        assert ((first > lower[0]) | (second > lower[1])).double().mean() > cost


def test_a_cascade_that_asks_too_much_is_told_apart_from_one_that_stops_wrongly():
    exercise = find("10.2")
    assert judge(exercise, lambda cheap, costly, prompts: [False] * len(prompts), 0).mistake == ""
    spendthrift = next(m for m in exercise.mistakes if m.name == "the costly guard reads everything")
    assert "also read" in judge(exercise, spendthrift.wrong, 0).problem


@pytest.mark.parametrize("number", ["10.1", "10.5"])
def test_an_answer_may_use_the_library(number):
    assert judge(find(number), find(number).reference, 3).passed
