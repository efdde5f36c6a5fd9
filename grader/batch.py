"""A whole class: what is new or changed is graded, by threads here or by a Dask cluster, and written as it comes."""

from __future__ import annotations

import hashlib
import inspect
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy.exc import OperationalError

import refusallab
from grader.examine import Graded, Task, examine, not_graded
from grader.records import Records
from grader.submissions import FoundFiles, Submission, find_submissions
from refusallab.course.catalogue import QUESTIONS
from refusallab.course.cells import read_cells
from refusallab.course.exercises import exercises_of
from refusallab.errors import RefusalLabError
from refusallab.sandbox.plain import storable
from refusallab.sandbox.server import Limits, shared

USUAL = Limits()
ATTEMPTS = 3  # to grade a submission whose worker was lost


@dataclass
class Batch:
    """What a run did."""

    graded: int = 0
    unchanged: int = 0
    failed: list[str] = field(default_factory=list)  # submissions that the grader itself could not deal with
    found: FoundFiles = field(default_factory=FoundFiles)  # what became of the files
    carried: list[str] = field(default_factory=list)  # what became of rows of earlier runs

    @property
    def counts(self) -> dict[str, int]:
        """What became of the files that were found, in numbers of files."""
        return {
            "graded": self.graded,
            "unchanged": self.unchanged,
            "failed": len(self.failed),
            "older versions": self.found.older,
            "in conflict": sum(len(conflict.files) for conflict in self.found.conflicts),
            "passed over": len(self.found.passed_over),
        }

    @property
    def complete(self) -> bool:
        """Whether every file that was found is accounted for."""
        return self.found.files == sum(self.counts.values())

    @property
    def account(self) -> str:
        """The sum of files, in words."""
        terms = " + ".join(f"{n} {what}" for what, n in self.counts.items())
        return f"{self.found.files} files found {'=' if self.complete else '≠'} {terms}."


def read_seed(out: Path, file: Path | None = None) -> int:
    """The secret seed: from a file, or drawn once and kept in the output folder, where only its owner can read it."""
    path = file or out / "seed"
    if not path.exists():
        if file:
            raise RefusalLabError(f"There is no seed file {file}: write any text into it, or leave out --seed-file.")
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as seed:
            seed.write(secrets.token_hex(16))
    text = path.read_bytes().strip()
    if not text:
        raise RefusalLabError(f"The seed file {path} is empty: write any text into it.")
    return 1000 + int.from_bytes(hashlib.sha256(text).digest()[:3], "big")


def read_released(folder: Path) -> dict[str, tuple[str, ...]]:
    """For each lab the sources of the code cells that students were given, from a folder of released labs."""
    return {
        path.name[:2]: tuple(cell.source for cell in read_cells(path.read_bytes()) if cell.kind == "code")
        for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    }


def grade_class(
    folder: Path,
    records: Records,
    seed: int,
    *,
    lab: str = "",
    shape: str = "",
    workers: int = 2,
    limits: Limits = USUAL,
    sandboxed: bool = True,
    cluster: str = "",
    released: dict[str, tuple[str, ...]] | None = None,
    regrade: str = "",
    on_graded: Callable[[int, int], None] = lambda done, of: None,
) -> Batch:
    """Grade every submission in a folder that is new or has changed. A failure affects one submission only.

    `regrade`: also those that have not changed, "all" of them or those that reached a limit of time ("timeouts").
    """
    found = find_submissions(folder, lab, shape)
    batch = Batch(found=found, carried=records.carry_over(found))
    known, todo = records.digests(), []
    again = {"": set, "timeouts": records.timed_out, "all": lambda: set(known)}[regrade]()
    for submission in found.submissions:
        key = (submission.student, submission.lab)
        try:
            digest = _digest(submission, seed, limits, sandboxed)
        except (OSError, RefusalLabError) as error:
            batch.failed.append(_failure(submission, error))
            continue
        if known.get(key) == digest and key not in again:
            batch.unchanged += 1
        else:
            todo.append((submission, digest))
    if not todo:
        return batch
    with _executor(workers, sandboxed, cluster) as (executor, width):

        def start(submission: Submission) -> Future[Graded]:
            data, sources = submission.read(), (released or {}).get(submission.lab, ())
            task = Task(submission.student, submission.lab, data, seed, limits, sandboxed, sources)
            return executor.submit(examine, task)

        for submission, digest, graded in _in_turn(todo, start, 2 * width):
            error = graded if isinstance(graded, Exception) else _record(records, submission, graded, digest)
            if error:
                batch.failed.append(_failure(submission, error))
            else:
                batch.graded += 1
            on_graded(batch.graded + len(batch.failed), len(todo))
    return batch


def _failure(submission: Submission, error: Exception) -> str:
    return storable(f"{submission.file} of {submission.student}: {error}"[:1000])


def _record(records: Records, submission: Submission, graded: Graded, digest: str) -> Exception | None:
    """Write what became of a submission; if the records do not take that, that a person has to look at it.

    Returns the error if nothing could be written: then it is the database.
    """
    try:
        records.write(submission, graded, digest)
    except OperationalError as error:
        return error
    except Exception as error:
        try:
            records.write(submission, not_graded(graded, error), digest)
        except Exception:
            return error
    return None


def _in_turn(
    todo: list[tuple[Submission, str]], start: Callable[[Submission], Future[Graded]], width: int
) -> Iterator[tuple[Submission, str, Graded | Exception]]:
    """Results as they come, with at most `width` submissions under way, each tried again if its worker is lost."""
    waiting, running = [(s, digest, 1) for s, digest in reversed(todo)], {}
    while waiting or running:
        while waiting and len(running) < width:
            entry = waiting.pop()
            try:
                future = start(entry[0])
            except Exception as error:  # a file that has gone, for example
                future = Future()
                future.set_exception(error)
            running[future] = entry
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            submission, digest, attempt = running.pop(future)
            error = future.exception()
            if error is None:
                yield submission, digest, future.result()
            elif not isinstance(error, Exception):
                raise error
            elif attempt < ATTEMPTS:
                waiting.append((submission, digest, attempt + 1))
            else:
                yield submission, digest, error


@contextmanager
def _executor(workers: int, sandboxed: bool, cluster: str) -> Iterator[tuple[Executor, int]]:
    """Where submissions are graded, and how many at a time."""
    if cluster:
        from distributed import Client

        try:
            client = Client(cluster, timeout=5)
        except (OSError, TimeoutError, ValueError) as error:
            raise RefusalLabError(
                f"There is no Dask scheduler at {cluster}: start one with `dask scheduler`."
            ) from error
        with client:
            yield client.get_executor(pure=False), max(1, sum(client.nthreads().values()))
        return
    shared(sandboxed)  # started here, where its failure is reported once
    with ThreadPoolExecutor(workers) as executor:
        try:
            yield executor, workers
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def _digest(submission: Submission, seed: int, limits: Limits, sandboxed: bool) -> str:
    """Changes with whatever may change the grade, except limits of time and the code of the grader: see `regrade`."""
    modules = {inspect.getsourcefile(e.cases) or "" for e in exercises_of(submission.lab)}
    definition = "".join(Path(file).read_text(encoding="utf-8") for file in sorted(modules) if file)
    questions = [q for q in QUESTIONS if q.lab == submission.lab]
    versions = (refusallab.__version__, sys.version_info[:2])
    parts = (submission.lab, seed, limits.memory, sandboxed, versions, definition, questions)
    return hashlib.sha256(repr(parts).encode() + submission.read()).hexdigest()
