"""The record of a course: a row for each submission, and one for each student, lab and exercise. Any SQL database."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
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

from grader.examine import Graded
from grader.submissions import FoundFiles, Submission
from refusallab.course.catalogue import QUESTIONS
from refusallab.course.cells import squeeze
from refusallab.errors import RefusalLabError
from refusallab.sandbox.kernel import LATE
from refusallab.sandbox.plain import storable

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


renamed = Table(
    "renamed",
    _metadata,
    Column("lab", String(10), primary_key=True),
    Column("old", String(200), primary_key=True),
    Column("student", String(200)),  # who it is now; "" if the row was taken out
)


def answer_hash(answer: str) -> str:
    """A short hash of a written answer without its white space. It begins with a letter: it is no number."""
    return "h" + hashlib.sha256(squeeze(answer).encode()).hexdigest()[:10]


class Records:
    """The database of a course."""

    def __init__(self, url: str):
        try:
            self.copy = ""  # name of the copy that was made of it
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

    def write_points(self, student: str, lab: str, question: str, points: float, comment: str, read: str = "") -> str:
        """Note what a person gave for a written answer: "noted", or "another" answer is there now, or "" for none.

        `read` is the hash of the answer that the person read. A table that was filled in before an identity changed may
        still use the old one.
        """
        with self.engine.begin() as connection:

            def give(name: str) -> str:
                own = (grades.c.student == name) & (grades.c.lab == lab) & (grades.c.exercise == question)
                own &= grades.c.answer.is_not(None)
                answer = connection.execute(select(grades.c.answer).where(own)).scalar()
                if answer is None:
                    return ""
                if read not in ("", answer_hash(answer)):
                    return "another"
                connection.execute(update(grades).where(own).values(points=points, problem=comment))
                return "noted"

            if said := give(student):
                return said
            where = (renamed.c.lab == lab) & (renamed.c.old == student)
            now = connection.execute(select(renamed.c.student).where(where)).scalar()
            return "noted" if now == "" else "" if now is None else give(now)

    def carry_over(self, found: FoundFiles) -> list[str]:
        """Give the rows of earlier runs to the students who have their files or accounts now, and say which.

        Points given by hand go along. A row that nobody takes over is removed, after the file of the records was
        copied.
        """
        lines, rows = [], self.all_submissions()
        taken = {(row.student, row.lab) for row in rows}
        current = {(s.student, s.lab) for s in found.submissions}
        for row in rows:
            owner = found.owners.get(row.file) or _owner_of_account(row, found)
            who = f"{row.student}, lab {row.lab}"
            if not owner or owner == (row.student, row.lab):
                continue
            if (row.student, row.lab) in current:  # has another file now, which is graded even if it is the same
                self._forget_digest(row.student, row.lab)
                continue
            new = owner[0] if owner in current - taken and owner[1] == row.lab else ""
            copy = self._keep_copy()
            if not new and not copy:
                lines.append(f"{who}: its file is {owner[0]}'s now, lab {owner[1]}. Remove that row from the records.")
                continue
            self._rename(row.student, row.lab, new)
            taken.add((new, row.lab))
            what = f"is {new} now" if new else f"was taken out: its file is {owner[0]}'s, lab {owner[1]}"
            lines.append(f"{who}, {what}." + (f" The records as they were: {copy}." if copy else ""))
        return lines

    def _forget_digest(self, student: str, lab: str) -> None:
        with self.engine.begin() as connection:
            mine = (submissions.c.student == student) & (submissions.c.lab == lab)
            connection.execute(update(submissions).where(mine).values(digest=""))

    def _rename(self, old: str, lab: str, new: str) -> None:
        with self.engine.begin() as connection:
            for table in (submissions, grades):
                mine = (table.c.student == old) & (table.c.lab == lab)
                connection.execute(update(table).where(mine).values(student=new) if new else delete(table).where(mine))
            connection.execute(delete(renamed).where((renamed.c.lab == lab) & (renamed.c.old == old)))
            connection.execute(insert(renamed).values(lab=lab, old=old, student=new))

    def _keep_copy(self) -> str:
        """Copy the file of the records once in a run, and give its name; "" if the database is not a file."""
        file = self.engine.url.database
        if self.engine.dialect.name != "sqlite" or not file or file == ":memory:":
            return ""
        if not self.copy:
            number = 1
            while (copy := Path(f"{file}.old{number}")).exists():
                number += 1
            with closing(sqlite3.connect(file)) as now, closing(sqlite3.connect(copy)) as then:
                now.backup(then)
            self.copy = copy.name
        return self.copy

    def all_submissions(self) -> list[Any]:
        """Every row of `submissions`, by lab and student."""
        with self.engine.connect() as connection:
            return list(connection.execute(select(submissions).order_by(submissions.c.lab, submissions.c.student)))

    def all_grades(self) -> list[Any]:
        """Every row of `grades`, by lab, student and exercise."""
        order = (grades.c.lab, grades.c.student, grades.c.exercise)
        with self.engine.connect() as connection:
            return list(connection.execute(select(grades).order_by(*order)))


def _owner_of_account(row: Any, found: FoundFiles) -> tuple[str, str] | None:
    """Whose a row is by its account: as earlier runs named them, or under a new name, where accounts last.

    (A number in Moodle is that of a participant in one assignment; another name may be another person.)
    """
    for s in found.submissions:
        if row.account and (row.account, row.lab) == (s.account, s.lab):
            earlier = row.student == s.student.removesuffix(f"-{s.account}")
            renamed = s.platform != "moodle" and row.student.endswith(f"-{s.account}")
            if earlier or renamed:
                return s.student, s.lab
    return None


def _about(submission: Submission, graded: Graded) -> dict[str, Any]:
    notes: Sequence[str] = graded.notes
    if submission.older:
        notes = [*notes, f"{submission.file} was graded. It replaces {', '.join(submission.older)}."]
    return {
        "account": submission.account,
        "file": storable(str(submission.path)),
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
