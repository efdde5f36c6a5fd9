"""Everything that is written after a run, in the order in which it has to be."""

from __future__ import annotations

from pathlib import Path

from refusallab.course.grade.batch import Batch
from refusallab.course.grade.exports import write_nbgrader, write_tables
from refusallab.course.grade.pages import read_by_hand, read_rubrics, write_by_hand, write_feedback, write_overview
from refusallab.course.grade.records import Records


def write_all(records: Records, out: Path, solutions: Path, gradebook: str = "", done: Batch | None = None) -> None:
    """Take over points given by hand, then write feedback, overview and tables.

    Rubrics are in `solutions`; `done` is what the run did, for the account of files in the overview.
    """
    read_by_hand(records, out / "by_hand.csv")
    write_by_hand(records, out / "by_hand.csv")
    write_feedback(records, out / "feedback")
    write_overview(records, out / "overview.html", read_rubrics(solutions), done)
    write_tables(records, out)
    if gradebook:
        write_nbgrader(records, gradebook)
