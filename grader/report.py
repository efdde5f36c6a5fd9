"""Everything that is written after a run, in the order in which it has to be."""

from __future__ import annotations

from pathlib import Path

from grader.batch import Batch
from grader.exports import write_nbgrader, write_tables
from grader.pages import read_by_hand, read_rubrics, write_by_hand, write_feedback, write_overview
from grader.records import Records
from refusallab.errors import RefusalLabError


def write_reports(
    records: Records, out: Path, solutions: Path, gradebook: str = "", done: Batch | None = None
) -> list[str]:
    """Take over points given by hand, then write feedback, overview and tables.

    Rubrics are in `solutions`; `done` is what the run did, for the account of files in the overview. One file costs no
    other. Returns what could not be written, with the reason.
    """
    passed_over = read_by_hand(records, out / "by_hand.csv")
    if done:
        done.carried += passed_over
    failed = write_feedback(records, out / "feedback")
    steps = {
        "by_hand.csv": lambda: write_by_hand(records, out / "by_hand.csv"),
        "overview.html": lambda: write_overview(records, out / "overview.html", read_rubrics(solutions), done),
        "the tables": lambda: write_tables(records, out),
        "the gradebook": lambda: write_nbgrader(records, gradebook) if gradebook else [],
    }
    for name, write in steps.items():
        try:
            failed += write() or []
        except RefusalLabError:
            raise
        except Exception as error:
            failed.append(f"{name}: {error}")
    return failed
