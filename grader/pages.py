"""What people read: a page of feedback for each student and lab, and an overview of the class."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader

from grader.records import Records, answer_hash
from grader.submissions import some
from grader.tables import as_it_was, write_safe_csv
from refusallab.course.catalogue import HEADERS, QUESTIONS
from refusallab.course.cells import read_cells
from refusallab.errors import RefusalLabError

if TYPE_CHECKING:
    from grader.batch import Batch

TITLES = {item.number: item.title for item in (*HEADERS, *QUESTIONS)}
BY_HAND = ("student", "lab", "question", "points", "comment", "answer", "hash")
MOST_COMMON = 4


def points_in_words(value: float | None) -> str:
    """Points in words: 2, 1.5, open."""
    return "open" if value is None else f"{value:g}"


def _environment() -> Environment:
    folder = Path(__file__).parent / "templates"
    environment = Environment(loader=FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"points": points_in_words, "some": some}
    environment.globals["titles"] = TITLES
    return environment


def page_name(student: str, lab: str) -> str:
    """A file name for a student's page, safe on any system, different for different students."""
    plain = re.sub(r"[^\w.-]+", "-", student).strip("-.").encode()[:80].decode(errors="ignore")
    mark = "" if plain == student else "-" + hashlib.sha256(student.encode()).hexdigest()[:6]
    return f"{plain}{mark}_{lab}.html"


def write_feedback(records: Records, folder: Path) -> list[str]:
    """Write a page for each submission. Returns those that could not be written, with the reason."""
    folder.mkdir(exist_ok=True)
    template, grades, failed = _environment().get_template("feedback.html"), records.all_grades(), []
    by_key = {key: list(rows) for key, rows in groupby(grades, key=lambda g: (g.lab, g.student))}
    for submission in records.all_submissions():
        own = by_key.get((submission.lab, submission.student), [])
        try:
            page = template.render(
                student=submission.student,
                lab=submission.lab,
                submission=submission,
                exercises=own,
                points=points_in_words(sum(g.points or 0 for g in own)),
                most=points_in_words(sum(g.most for g in own)),
                open=points_in_words(sum(g.most for g in own if g.points is None))
                if any(g.points is None for g in own)
                else "",
            )
            (folder / page_name(submission.student, submission.lab)).write_text(page, encoding="utf-8")
        except Exception as error:
            failed.append(f"the page of {submission.student}, lab {submission.lab}: {error}")
    return failed


def write_overview(records: Records, path: Path, rubrics: dict[str, str], done: Batch | None = None) -> None:
    """Write the page of the class: distributions, mistakes, what needs a person, and what became of each file.

    `rubrics` are by question, `done` is what the run did.
    """
    submissions, grades = records.all_submissions(), records.all_grades()
    waiting = [g for g in grades if g.answer and g.points is None]
    page = (
        _environment()
        .get_template("overview.html")
        .render(
            sandboxes=sorted({s.sandbox for s in submissions}),
            labs=[_lab(lab, list(rows), submissions) for lab, rows in groupby(grades, key=lambda g: g.lab)],
            damaged=[s for s in submissions if s.problem],
            flagged=[g for g in grades if g.flags],
            done=done,
            questions=[
                {"number": n, "rubric": rubrics.get(n, ""), "answers": [g for g in waiting if g.exercise == n]}
                for n in sorted({g.exercise for g in waiting})
            ],
        )
    )
    path.write_text(page, encoding="utf-8")


def _lab(lab: str, grades: Sequence[Any], submissions: Sequence[Any]) -> dict[str, Any]:
    rows = sorted(grades, key=lambda g: [int(n) for n in g.exercise.split(".")])
    exercises = [_exercise(number, list(own)) for number, own in groupby(rows, key=lambda g: g.exercise)]
    return {"name": lab, "submissions": sum(s.lab == lab for s in submissions), "exercises": exercises}


def _exercise(number: str, grades: Sequence[Any]) -> dict[str, Any]:
    given = [g.points for g in grades if g.points is not None]
    mean, most = sum(given) / len(given) if given else 0, max(g.most for g in grades)
    counts = Counter(g.points for g in grades)
    return {
        "number": number,
        "distribution": [
            (points_in_words(p), n) for p, n in sorted(counts.items(), key=lambda pair: (pair[0] is None, pair[0]))
        ],
        "mean": f"{mean:.2f}" if given else "open",
        "share": round(100 * mean / most) if most else 0,
        "most": most,
        "mistakes": Counter(g.mistake for g in grades if g.mistake).most_common(MOST_COMMON),
    }


def read_rubrics(folder: Path) -> dict[str, str]:
    """The rubric of each written question, from the solutions in a folder."""
    cells = (cell for path in sorted(folder.glob("*.ipynb")) for cell in read_cells(path.read_bytes()))
    return {cell.tag["number"]: cell.source for cell in cells if cell.tag.get("role") == "rubric"}


def read_by_hand(records: Records, path: Path, *, early: bool = False) -> list[str]:
    """Take over the points that people have filled in, where the answer is still the one that they read.

    Returns a line for all others. RefusalLabError if a line of the table makes no sense.
    `early` stands for a run that has not graded yet: lines for what the records do not know may make sense later.
    """
    if not path.exists():
        return []
    passed_over = []
    most = {question.number: question.points for question in QUESTIONS}
    for number, row in enumerate(_read_table(path), 2):
        given = row["points"].strip().replace(",", ".")
        if not given:
            continue
        student, comment = as_it_was(row["student"]), as_it_was(row["comment"])
        read = row["hash"].strip() or answer_hash(as_it_was(row["answer"]))  # tables of version 0.2 have no hash
        lab = row["lab"].zfill(2)  # spreadsheets write 2 for 02
        try:
            value = float(given)
            fits = 0 <= value <= most[row["question"]]
        except (ValueError, KeyError):
            fits = False
        said = records.write_points(student, lab, row["question"], value, comment, read) if fits else ""
        if not fits or not (said or early):
            raise RefusalLabError(f"{path.name}, line {number}: {given!r} cannot be given there. Correct that line.")
        if said == "another":
            passed_over.append(
                f"{student}, {row['question']}: {given} points were for an earlier answer, read the new one"
            )
    return passed_over


def _read_table(path: Path) -> list[dict[str, str]]:
    """The lines of by_hand.csv, which a spreadsheet may have saved with semicolons."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RefusalLabError(f"{path.name} is not text in UTF-8: save it as `CSV UTF-8`.") from error
    heading = text.partition("\n")[0]
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=";" if heading.count(";") > 3 else ",")
    if missing := [name for name in BY_HAND[:-1] if name not in (table.fieldnames or ())]:
        raise RefusalLabError(f"{path.name} has no column {missing[0]!r}: save it as CSV, with its first line.")
    return [{name: row.get(name) or "" for name in BY_HAND} for row in table]


def write_by_hand(records: Records, path: Path) -> None:
    """Write the table in which people fill in points for written answers."""
    rows = [
        (g.student, g.lab, g.exercise, given, g.problem, g.answer, answer_hash(g.answer))
        for g in records.all_grades()
        if g.answer
        for given in ["" if g.points is None else points_in_words(g.points)]
    ]
    write_safe_csv(path, [BY_HAND, *rows])
