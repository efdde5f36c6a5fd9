"""Progress: which exercises passed, in one small local file that all notebooks share."""

from __future__ import annotations

import os
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

from refusallab.course.catalogue import HEADERS, LABS


def progress_path() -> Path:
    """Where progress is kept: the environment variable REFUSALLAB_PROGRESS, or a file in the home folder."""
    return Path(os.environ.get("REFUSALLAB_PROGRESS", Path.home() / ".refusallab" / "progress.sqlite"))


def shared_file(name: str) -> Path:
    """A file that one lab writes and another reads, beside the progress."""
    return progress_path().with_name(name)


def _connect() -> sqlite3.Connection:
    progress_path().parent.mkdir(parents=True, exist_ok=True)
    # It waits while another notebook writes.
    connection = sqlite3.connect(progress_path(), timeout=10, isolation_level=None)
    connection.execute("CREATE TABLE IF NOT EXISTS passed (exercise TEXT PRIMARY KEY, points INTEGER NOT NULL)")
    return connection


def record(number: str, points: int) -> None:
    """Note that an exercise passed. It stays passed. If the file cannot be written, a line says so."""
    try:
        with closing(_connect()) as connection:
            connection.execute("INSERT OR REPLACE INTO passed VALUES (?, ?)", (number, points))
    except (OSError, sqlite3.Error) as error:
        print(
            f"(Progress was not saved to {progress_path()}: {error}. Your work in the notebook is safe.)",
            file=sys.stdout,
        )


def passed() -> set[str]:
    """The numbers of all exercises that have passed. An unreadable file counts as empty."""
    try:
        with closing(_connect()) as connection:
            return {number for (number,) in connection.execute("SELECT exercise FROM passed")}
    except (OSError, sqlite3.Error):
        return set()


def progress(lab: str | None = None) -> None:
    """Print what is done, over all labs or in one ("02")."""
    done = passed()
    for name in LABS:
        if lab in (None, name):
            exercises = [header for header in HEADERS if header.lab == name]
            marks = "  ".join(e.number + (" ✓" if e.number in done else " ·") for e in exercises)
            points = sum(e.points for e in exercises if e.number in done)
            print(f"Lab {name}   {marks}   {points} of {sum(e.points for e in exercises)} points")
