"""Grades for other systems: Canvas, Moodle, plain CSV, and nbgrader's gradebook."""

from __future__ import annotations

import os
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from grader.pages import points_in_words
from grader.records import Records
from grader.tables import write_safe_csv
from refusallab.course.catalogue import HEADERS, QUESTIONS
from refusallab.errors import RefusalLabError


def write_tables(records: Records, folder: Path) -> None:
    """Write grades.csv (all points), canvas.csv and moodle_<lab>.csv (totals, for their import of grades)."""
    submissions, grades = records.all_submissions(), records.all_grades()
    by_key = {key: list(rows) for key, rows in groupby(grades, key=lambda g: (g.lab, g.student))}
    totals = {key: sum(g.points or 0 for g in rows) for key, rows in by_key.items()}
    labs = sorted({s.lab for s in submissions})
    accounts = {s.student: s.account for s in submissions}
    write_safe_csv(folder / "grades.csv", _all_points(grades))
    write_safe_csv(folder / "canvas.csv", _canvas(labs, accounts, totals))
    for lab in labs:
        own = [s for s in submissions if s.lab == lab]
        write_safe_csv(folder / f"moodle_{lab}.csv", _moodle(own, totals))


def _most(lab: str) -> str:
    return points_in_words(sum(item.points for item in (*HEADERS, *QUESTIONS) if item.lab == lab))


def _all_points(grades: list[Any]) -> list[list[str]]:
    heading = ["student", "lab", "exercise", "points", "most", "mistake", "problem"]
    rows = [
        [
            g.student,
            g.lab,
            g.exercise,
            "" if g.points is None else points_in_words(g.points),
            points_in_words(g.most),
            g.mistake,
            g.problem,
        ]
        for g in grades
    ]
    return [heading, *rows]


def _canvas(labs: list[str], accounts: dict[str, str], totals: dict[Any, float]) -> list[list[str]]:
    """Canvas finds students by ID, a number, or by login where the download did not tell the ID."""
    heading = ["Student", "ID", "SIS User ID", "SIS Login ID", "Section", *(f"Lab {lab}" for lab in labs)]
    possible = ["    Points Possible", "", "", "", "", *(_most(lab) for lab in labs)]
    rows = []
    for student, account in sorted(accounts.items()):
        values = [points_in_words(totals[lab, student]) if (lab, student) in totals else "" for lab in labs]
        number = account if account.isdecimal() else ""
        rows.append([student, number, "", "" if number else account or student, "", *values])
    return [heading, possible, *rows]


def _moodle(submissions: list[Any], totals: dict[Any, float]) -> list[list[str]]:
    heading = ["Identifier", "Full name", "Grade", "Maximum Grade"]
    rows = []
    for s in submissions:
        who = f"Participant {s.account}" if s.account.isdecimal() else ""
        name = s.student.removesuffix(f"-{s.account}")
        rows.append([who, name, points_in_words(totals.get((s.lab, s.student), 0)), _most(s.lab)])
    return [heading, *rows]


def write_nbgrader(records: Records, url: str) -> list[str]:
    """Write all points into nbgrader's gradebook: the cells check-2-1 (and so on) of the notebook of each lab.

    Returns the submissions that it does not take, with the reason.
    """
    from nbgrader.api import Gradebook, MissingEntry

    failed = []

    os.environ["PATH"] += os.pathsep + os.path.dirname(sys.executable)  # a new gradebook is made by the command alembic
    submissions, grades = records.all_submissions(), records.all_grades()
    try:
        with Gradebook(url) as book:
            for lab in sorted({s.lab for s in submissions}):
                assignment, notebook = _nbgrader_notebook(book, lab)
                for item in (i for i in (*HEADERS, *QUESTIONS) if i.lab == lab):
                    kind = {"max_score": item.points, "cell_type": "code" if item in HEADERS else "markdown"}
                    book.update_or_create_grade_cell(_cell(item.number), notebook, assignment, **kind)
            for s in submissions:
                own = [g for g in grades if (g.lab, g.student) == (s.lab, s.student)]
                try:
                    _write_submission(book, s, own)
                except MissingEntry:
                    raise
                except Exception as error:
                    book.db.rollback()
                    failed.append(f"{s.student}, lab {s.lab}, in the gradebook: {error}")
    except MissingEntry as error:
        raise RefusalLabError(f"The gradebook {url} does not fit this course: {error}") from error
    return failed


def _write_submission(book: Any, submission: Any, grades: list[Any]) -> None:
    assignment, notebook = _nbgrader_notebook(book, submission.lab)
    book.update_or_create_student(submission.student)
    book.update_or_create_submission(assignment, submission.student)
    for g in grades:
        grade = book.find_grade(_cell(g.exercise), notebook, assignment, submission.student)
        by_hand = g.answer is not None
        grade.auto_score = None if by_hand else g.points
        grade.manual_score = g.points if by_hand else None
        grade.needs_manual_grade = g.points is None
    book.db.commit()


def _cell(number: str) -> str:
    kind = "check" if any(e.number == number for e in HEADERS) else "written"
    return f"{kind}-{number.replace('.', '-')}"


def _nbgrader_notebook(book: Any, lab: str) -> tuple[str, str]:
    """The assignment and the notebook of a lab: those in the gradebook, or new ones."""
    for assignment in book.assignments:
        for notebook in assignment.notebooks:
            if notebook.name.startswith(lab):
                return assignment.name, notebook.name
    book.update_or_create_assignment(f"lab{lab}")
    book.update_or_create_notebook(f"{lab}", f"lab{lab}")
    return f"lab{lab}", lab
