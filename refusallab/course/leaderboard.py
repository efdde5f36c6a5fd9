"""The local leaderboard of the capstone: one small file that many runs may share.

It remembers results on the frozen trial, prompt by prompt, by the hash of the submitted code, so that a file is scored
once; and the undefended model on both trials, with which results are compared.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from refusallab.course.capstone import Result, Score, Trial, score_against
from refusallab.course.progress_file import shared_file
from refusallab.errors import RefusalLabError
from refusallab.model import Model

UNDEFENDED = "undefended"
EMPTY = "No defence has been scored yet: run refusallab capstone with your file."


@dataclass(frozen=True)
class LeaderboardRow:
    """One line of the leaderboard."""

    name: str
    result: Result | None  # None for a defence that failed
    problem: str  # why it failed
    attempt: int  # 1 for the first file of this name
    scored: str  # the day


def leaderboard_file() -> Path:
    """Where it is kept: beside the progress."""
    return shared_file("leaderboard.sqlite")


def trial_fingerprint(m: Model, trial: Trial) -> str:
    """What a result depends on beside the defence: weights, attacks and prompts. Others are never compared with it."""
    prompts = [str(item.prompt) for item in trial.forbidden]
    prompts += [str((item.prompt, start)) for groups in trial.traffic.values() for g, start in groups for item in g]
    text = json.dumps([m.commit, trial.name, [a.name for a in trial.attacks], prompts])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def key(source: str) -> str:
    """The hash of a submitted defence."""
    return hashlib.sha256(source.strip().encode()).hexdigest()[:16]


def _connect() -> sqlite3.Connection:
    leaderboard_file().parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(leaderboard_file(), timeout=10, isolation_level=None)  # waits while another run writes
    connection.execute(
        "CREATE TABLE IF NOT EXISTS scored (frozen TEXT, source TEXT, name TEXT NOT NULL, result TEXT NOT NULL, "
        "problem TEXT NOT NULL, scored TEXT NOT NULL, PRIMARY KEY (frozen, source))"
    )
    return connection


def add(frozen: str, source: str, name: str, result: Result | None, problem: str = "") -> None:
    """Note a result. An earlier one stays, unless it was a failure. RefusalLabError where nothing can be written."""
    values = (frozen, source, name, json.dumps(result and asdict(result)), problem, f"{datetime.now():%Y-%m-%d}")
    try:
        with closing(_connect()) as connection:
            connection.execute(
                "INSERT INTO scored VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET name = excluded.name, "
                "result = excluded.result, problem = excluded.problem, scored = excluded.scored WHERE problem != ''",
                values,
            )
    except (OSError, sqlite3.Error) as error:
        raise RefusalLabError(
            f"The leaderboard {leaderboard_file()} was not written ({error}): make the place writable, or move a "
            "damaged file away."
        ) from error


def rows(frozen: str) -> dict[str, LeaderboardRow]:
    """All results on one trial, by hash, in the order in which they were scored. An unreadable file counts as empty."""
    try:
        with closing(_connect()) as connection:
            found = connection.execute(
                "SELECT source, name, result, problem, scored FROM scored WHERE frozen = ? ORDER BY rowid", (frozen,)
            ).fetchall()
    except (OSError, sqlite3.Error):
        return {}
    leaderboard_table, seen = {}, {}
    for source, name, result, problem, scored in found:
        seen[name] = seen.get(name, 0) + 1
        fields = json.loads(result)
        leaderboard_table[source] = LeaderboardRow(name, fields and Result(**fields), problem, seen[name], scored)
    return leaderboard_table


def scores(frozen: str) -> list[tuple[LeaderboardRow, Score | None]]:
    """The rows with their scores, best first; those that failed last."""
    found = rows(frozen)
    base = found.get(UNDEFENDED)
    if base is None or base.result is None:
        return []
    scored = [(row, score_against(row.result, base.result) if row.result else None) for row in found.values()]
    return sorted(scored, key=lambda pair: -1.0 if pair[1] is None else pair[1].points, reverse=True)


def leaderboard_table(frozen: str) -> Table:
    """The leaderboard, for rich."""
    shown = Table(title="Leaderboard: all attacks, on test prompts")
    columns = ("", "defence", "points", "attacks stopped, mean", "worst attack", "traffic kept, least", "over-refusal")
    for heading in (*columns, "extra passes", "file of this name"):
        shown.add_column(heading)
    for place, (row, score) in enumerate(scores(frozen), 1):
        if score is None or row.result is None:
            shown.add_row(str(place), escape(row.name), "0.0", escape(row.problem), "", "", "", "", str(row.attempt))
            continue
        shown.add_row(
            str(place),
            escape(row.name),
            f"{score.points:.1f}",
            f"{score.mean:.2f}",
            f"{score.defended[score.worst]}\n{score.worst}",
            f"{score.kept[score.least]:.2f}\n{score.least}",
            f"{score.over_refusal}",
            f"{row.result.extra_passes:.1f}",
            str(row.attempt),
        )
    return shown
