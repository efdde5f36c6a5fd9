"""The command `refusallab grade`."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from tqdm import tqdm

from refusallab.console import errors_in_one_line
from refusallab.errors import RefusalLabError

if TYPE_CHECKING:
    from grader.batch import Batch


class Regrade(StrEnum):
    """What `refusallab grade` can grade again although it has not changed."""

    timeouts = "timeouts"
    all = "all"


def grade(
    submissions: Annotated[Path, typer.Argument(help="The folder with the notebooks, as it was downloaded.")],
    out: Annotated[Path, typer.Option(help="The folder for records, feedback and tables.")],
    lab: Annotated[str, typer.Option(help="Grade this lab only, such as 02.")] = "",
    shape: Annotated[
        str,
        typer.Option(
            help="What the folder holds, if the command cannot tell: students (a folder or file for each), labs (a "
            "folder for each, with the students in it), moodle, canvas, blackboard or github."
        ),
    ] = "",
    workers: Annotated[int, typer.Option(min=1, help="Submissions at a time.")] = 2,
    timeout: Annotated[
        float,
        typer.Option(min=1, help="Seconds of processor time for a cell or an exercise; six times that in all."),
    ] = 20,
    memory: Annotated[float, typer.Option(min=0.1, help="GB for a submission.")] = 2,
    seed_file: Annotated[
        Path | None, typer.Option(help="Any text: it makes the hidden inputs. Left out: one is made.")
    ] = None,
    database: Annotated[
        str, typer.Option(help="SQLAlchemy URL of the records; grades.sqlite in --out if left out.")
    ] = "",
    cluster: Annotated[str, typer.Option(help="Address of a Dask scheduler that shares out the work.")] = "",
    gradebook: Annotated[str, typer.Option(help="Also write to this nbgrader gradebook: sqlite:///gradebook.db.")] = "",
    regrade: Annotated[
        Regrade | None,
        typer.Option(help="Grade again what has not changed: timeouts (what reached a limit of time) or all."),
    ] = None,
    unsafe: Annotated[bool, typer.Option("--unsafe", help="Run the students' code without a sandbox.")] = False,
) -> None:
    """Grade a class. Run it again after resubmissions, or after a break: only what is new is graded."""
    with errors_in_one_line():
        from grader import batch as grading
        from grader.pages import read_by_hand
        from grader.records import Records
        from grader.report import write_reports
        from refusallab.sandbox.server import Limits

        out.mkdir(parents=True, exist_ok=True)
        records = Records(database or f"sqlite:///{out / 'grades.sqlite'}")
        read_by_hand(records, out / "by_hand.csv", early=True)  # under the names of the run that wrote it
        with tqdm(total=0, file=sys.stderr, leave=False, unit="submission") as bar:

            def step(done: int, of: int) -> None:
                bar.total, bar.n = of, done
                bar.refresh()

            done = grading.grade_class(
                submissions,
                records,
                grading.read_seed(out, seed_file),
                lab=lab,
                shape=shape,
                workers=workers,
                limits=Limits(timeout, memory),
                sandboxed=not unsafe,
                cluster=cluster,
                released=grading.read_released(Path("labs")),
                regrade=regrade or "",
                on_graded=step,
            )
        unwritten = write_reports(records, out, Path("solutions"), gradebook, done)
        _print_files(done)
        if late := len(records.timed_out()):
            print(f"{late} ran into a limit of time. `--regrade timeouts` grades them again, `--timeout` gives more.")
        print(f"{done.graded} graded, {done.unchanged} unchanged. Begin with {out / 'overview.html'}.")
        if not done.complete:
            raise RefusalLabError("The counts of files do not add up, so some were lost: compare them with the folder.")
        if unwritten:
            raise RefusalLabError(f"Not everything could be written: {'; '.join(unwritten)}")
        if done.failed:
            raise RefusalLabError("Some submissions were not graded: run the command again, then look at them by hand.")
        if done.found.conflicts:
            raise RefusalLabError("Some files are in conflict and were not graded: resolve that, then run it again.")


def _print_files(done: Batch) -> None:
    from grader.submissions import some

    for line in done.carried:
        print(line)
    for reason, names in done.found.reasons().items():
        print(f"passed over, {reason}: {some(names)}")
    for submission in done.found.submissions:
        if submission.older:
            print(f"older than {submission.file}: {submission.student}, {some(submission.older)}")
    for line in (*(f"conflict: {c}" for c in done.found.conflicts), *(f"not graded: {f}" for f in done.failed)):
        print(line)
    print(done.account)
