"""The record of a course: a row for each submission, and one for each student, lab and exercise. Any SQL database."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    Column,
    Engine,
    Float,
    MetaData,
    String,
    Table,
    create_engine,
    delete,
    insert,
    select,
    update,
)
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from refusallab.course.exercises import QUESTIONS
from refusallab.course.grade.examine import Graded
from refusallab.course.grade.kernel import LATE
from refusallab.course.grade.submissions import Submission
from refusallab.errors import RefusalLabError

_metadata = MetaData()
submissions = Table(
    "submissions",
    _metadata,
    Column("student", String(200), primary_key=True),
    Column("lab", String(10), primary_key=True),
    Column("account", String(50)),
    Column("file", String(500)),
    Column("digest", String(64)),  # of all that decides the grade
    Column("problem", String),
    Column("notes", JSON),
    Column("output", String),
    Column("seconds", Float),
    Column("sandbox", String(50)),
    Column("graded", String(40)),
)
grades = Table(
    "grades",
    _metadata,
    Column("student", String(200), primary_key=True),
    Column("lab", String(10), primary_key=True),
    Column("exercise", String(10), primary_key=True),
    Column("points", Float),  # NULL until a person has graded a written answer
    Column("most", Float),
    Column("problem", String),
    Column("mistake", String(200)),
    Column("case", String),
    Column("right", JSON),
    Column("detail", String),
    Column("flags", JSON),
    Column("answer", String),  # to a written question
)


class Records:
    """The database of a course."""

    def __init__(self, url: str):
        try:
            self.engine: Engine = create_engine(url)
            _metadata.create_all(self.engine)
        except (ArgumentError, SQLAlchemyError, ImportError) as error:
            raise RefusalLabError(f"The database {url} cannot be used: {str(error).splitlines()[0]}") from error

    def digests(self) -> dict[tuple[str, str], str]:
        """What has been graded: for each student and lab the digest of it."""
        with self.engine.connect() as connection:
            rows = connection.execute(select(submissions.c.student, submissions.c.lab, submissions.c.digest))
            return {(row.student, row.lab): row.digest for row in rows}

    def timed_out(self) -> set[tuple[str, str]]:
        """The students and labs of which the records say that something ran into a limit of time."""
        found = {(row.student, row.lab) for row in self.all_submissions() if any(LATE in note for note in row.notes)}
        return found | {(row.student, row.lab) for row in self.all_grades() if not row.points and LATE in row.problem}

    def write(self, submission: Submission, graded: Graded, digest: str) -> None:
        """Replace all rows of a submission, in one transaction. Points for an unchanged written answer stay."""
        key = {"student": submission.student, "lab": submission.lab}
        with self.engine.begin() as connection:
            mine = (grades.c.student == key["student"]) & (grades.c.lab == key["lab"])
            old = {row.exercise: row for row in connection.execute(select(grades).where(mine))}
            connection.execute(delete(grades).where(mine))
            same = (submissions.c.student == key["student"]) & (submissions.c.lab == key["lab"])
            connection.execute(delete(submissions).where(same))
            connection.execute(insert(submissions).values(**key, **_about(submission, graded), digest=digest))
            rows = [key | _row(outcome) for outcome in graded.outcomes]
            rows += [key | _question(question, graded, old) for question in QUESTIONS if question.lab == graded.lab]
            if rows:
                connection.execute(insert(grades), rows)

    def write_points(self, student: str, lab: str, question: str, points: float, comment: str) -> bool:
        """Note what a person gave for a written answer. False if there is no such answer."""
        own = (grades.c.student == student) & (grades.c.lab == lab) & (grades.c.exercise == question)
        own &= grades.c.answer.is_not(None)
        with self.engine.begin() as connection:
            return bool(connection.execute(update(grades).where(own).values(points=points, problem=comment)).rowcount)

    def all_submissions(self) -> list[Any]:
        """Every row of `submissions`, by lab and student."""
        with self.engine.connect() as connection:
            return list(connection.execute(select(submissions).order_by(submissions.c.lab, submissions.c.student)))

    def all_grades(self) -> list[Any]:
        """Every row of `grades`, by lab, student and exercise."""
        order = (grades.c.lab, grades.c.student, grades.c.exercise)
        with self.engine.connect() as connection:
            return list(connection.execute(select(grades).order_by(*order)))


def _about(submission: Submission, graded: Graded) -> dict[str, Any]:
    notes: Sequence[str] = graded.notes
    if submission.older:
        notes = [*notes, f"{submission.path.name} was graded. It replaces {', '.join(submission.older)}."]
    return {
        "account": submission.account,
        "file": str(submission.path),
        "problem": graded.problem,
        "notes": list(notes),
        "output": graded.output,
        "seconds": graded.seconds,
        "sandbox": "bubblewrap" if graded.sandboxed else "none (--unsafe)",
        "graded": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _row(outcome: Any) -> dict[str, Any]:
    return {
        "exercise": outcome.number,
        "points": outcome.points,
        "most": outcome.most,
        "problem": outcome.problem,
        "mistake": outcome.mistake,
        "case": outcome.case,
        "right": list(outcome.right),
        "detail": outcome.detail,
        "flags": list(outcome.flags),
        "answer": None,
    }


def _question(question: Any, graded: Graded, old: dict[str, Any]) -> dict[str, Any]:
    answer, before = graded.written.get(question.number, ""), old.get(question.number)
    kept = before is not None and before.answer == answer
    return {
        "exercise": question.number,
        "points": before.points if kept else None if answer else 0,
        "most": question.points,
        "problem": before.problem if kept else "" if answer else "There is no answer.",
        "mistake": "",
        "case": "",
        "right": [],
        "detail": "",
        "flags": [],
        "answer": answer,
    }
