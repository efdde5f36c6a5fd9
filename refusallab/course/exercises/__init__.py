"""All exercises and written questions of the course, in order. One module for each lab."""

from __future__ import annotations

from refusallab.course.exercise import Exercise, Question
from refusallab.course.exercises import (
    lab00,
    lab01,
    lab02,
    lab03,
    lab04,
    lab05,
    lab06,
    lab07,
    lab08,
    lab09,
    lab10,
)

LABS = (lab00, lab01, lab02, lab03, lab04, lab05, lab06, lab07, lab08, lab09, lab10)
EXERCISES: tuple[Exercise, ...] = tuple(exercise for lab in LABS for exercise in lab.EXERCISES)
QUESTIONS: tuple[Question, ...] = tuple(lab.QUESTION for lab in LABS)
