"""A defence that somebody handed in: read from a file, run in a process of its own, with limits.

The process sees prompts and returns replies; attacks run and replies are judged here. Where bubblewrap works, the
process is behind the wall of the grader: a system to read, no network, nothing of yours, and no file of the test sets.
Elsewhere it has your rights, and limits on time, memory and the size of files only.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from refusallab.course import leaderboard
from refusallab.course.capstone import Removal, Score, Trial, attackers_direction, run_trial, score_against
from refusallab.course.leaderboard import LeaderboardRow
from refusallab.defence import ModelAlone
from refusallab.errors import RefusalLabError
from refusallab.model import Model, Prompt, load
from refusallab.sandbox.plain import from_json, storable, to_json
from refusallab.sandbox.server import SETTINGS, bubblewrap, sandbox_environment
from smallmodels.world import DATA

MARK = re.compile(r"\s*#\s*capstone\b", re.I)  # how the first line of a submitted cell begins
HIDDEN = ("harmful_test.csv", "harmless_test.csv", "borderline.csv", "capability.jsonl")
LARGEST = 1 << 24  # bytes of an answer
LONGEST_REPLY = 2000  # characters, of which a reply of 32 tokens needs some 150; judging takes longer than reading


class Failed(RefusalLabError):
    """The defence failed. The message says how, and is shown beside its score of 0."""


@dataclass(frozen=True)
class DefenceLimits:
    """What a defence may use."""

    start: float = 240  # seconds until it is ready: imports, its own training, and the attacker's search
    call: float = 120  # seconds for one batch of replies
    total: float = 900  # seconds for everything
    memory: float = 2  # GB beyond what the model and the libraries take


def read_source(path: Path) -> str:
    """The code of a defence: a .py file, or the cells of a notebook that begin with the comment `# capstone`.

    Raises RefusalLabError when there is none.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RefusalLabError(f"{path} cannot be read ({error.strerror}): give the file with your defence.") from error
    if path.suffix != ".ipynb":
        return data.decode("utf-8", errors="replace").strip() + "\n"
    from refusallab.course.cells import read_cells

    cells = [cell.source.strip() for cell in read_cells(data) if cell.kind == "code" and MARK.match(cell.source)]
    if not cells:
        raise RefusalLabError(f"{path.name} has no cell whose first line is `# capstone`: mark the one with defend(m).")
    return "\n\n".join(cells) + "\n"


def wall(folder: Path) -> list[str] | None:
    """The command that puts a program behind the wall, with `folder` for its copies; None where that does not work."""
    if shutil.which("bwrap") is None:
        return None
    run = folder / "run"
    run.mkdir()
    run.chmod(0o755)
    command = [*bubblewrap(run), "--die-with-parent"]
    for name in HIDDEN:
        command += ["--ro-bind", os.devnull, str(DATA / name)]
    probe = [*command, sys.executable, "-c", "import refusallab"]
    works = subprocess.run(probe, env=sandbox_environment(), capture_output=True, stdin=subprocess.DEVNULL)
    return command if works.returncode == 0 else None


class Submitted:
    """A submitted defence. It keeps to the interface, so attacks take it. Use it in a `with`: leaving that ends it."""

    def __init__(self, source: str, m: Model, *, limits: DefenceLimits = DefenceLimits(), walled: bool = True):  # noqa: B008 - frozen
        self.m, self.name, self.extra_passes = m, "", 0
        self.direction: Tensor | None = None
        self._limits, self._end = limits, time.monotonic() + limits.total
        self._folder = Path(tempfile.mkdtemp(prefix="rl-"))
        before = wall(self._folder) if walled else None
        self.walled = before is not None
        self._process = subprocess.Popen(
            [*(before or []), sys.executable, "-m", "refusallab.course.answering"],
            env=sandbox_environment() if self.walled else os.environ | SETTINGS,
            cwd=None if self.walled else self._folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._read = b""  # of its output, and not used yet
        order = {"source": source, "model": m.name, "walled": self.walled}
        order |= {"memory": limits.memory, "seconds": limits.total}
        try:
            ready = self._ask(order, limits.start, "it was not ready")
            self.name = storable(str(ready["name"]))[:40]
            direction = ready["direction"]  # of the student's process, which may hand over anything
            self.direction = direction if _points_somewhere(direction, m.width) else attackers_direction(m)
        except BaseException:
            self.close()
            raise

    def replies(self, prompts: Sequence[Prompt], *, edit: Removal | None = None, prefill: str = "") -> list[str]:
        """What the defence replies, at most `LONGEST_REPLY` characters each.

        Raises Failed where it raises, hangs, ends or returns something else.
        """
        order = {"prompts": list(prompts), "edit": None if edit is None else asdict(edit), "prefill": prefill}
        said = self._ask(order, self._limits.call)
        replies = said["replies"]
        if not isinstance(replies, list) or len(replies) != len(prompts) or any(type(x) is not str for x in replies):
            raise Failed("It returned something other than a text for each prompt.")
        self.extra_passes = said["extra_passes"] if type(said["extra_passes"]) is int else 0
        return [reply[:LONGEST_REPLY] for reply in replies]

    def _ask(self, order: dict[str, Any], seconds: float, what: str = "no answer came") -> dict[str, Any]:
        end = min(time.monotonic() + seconds, self._end)
        try:
            self._send(to_json(order).encode() + b"\n", end)
            line = self._next_line(end)
        except TimeoutError:
            within = min(seconds, self._limits.total)
            raise Failed(f"It hangs or is too slow: {what} within {within:.0f} s.") from None
        if not line:
            raise Failed(f"Its process ended: {_why(self._process.wait())}.")
        try:
            answer = from_json(line)
            if problem := answer.get("problem"):
                raise Failed(storable(str(problem))[:400])
            return answer
        except (ValueError, AttributeError) as error:
            if isinstance(error, Failed):
                raise
            raise Failed("It returned something that is not plain data.") from error

    def _send(self, order: bytes, end: float) -> None:
        """Write an order, which the process may leave unread."""
        orders = self._process.stdin.fileno()
        os.set_blocking(orders, False)
        while order:
            left = end - time.monotonic()
            if left <= 0 or not select.select([], [orders], [], left)[1]:
                raise TimeoutError
            try:
                order = order[os.write(orders, order) :]
            except BlockingIOError:
                continue
            except OSError:  # it has ended: the next line says so
                return

    def _next_line(self, end: float) -> str:
        """The next line of the process, empty where it has ended. No more is read, however much it writes."""
        output = self._process.stdout.fileno()
        while b"\n" not in self._read and len(self._read) < LARGEST:
            left = end - time.monotonic()
            if left <= 0 or not select.select([output], [], [], left)[0]:
                raise TimeoutError
            piece = os.read(output, 1 << 16)
            if not piece:
                return ""
            self._read += piece
        line, _, self._read = self._read.partition(b"\n")
        return line.decode(errors="replace") + "\n"

    def close(self) -> None:
        """End the process and whatever it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                stream.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Submitted:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _points_somewhere(direction: Any, width: int) -> bool:
    if not isinstance(direction, Tensor) or direction.shape != (width,):
        return False
    return 0 < direction.float().norm().item() < math.inf  # and so not NaN


def _why(code: int) -> str:
    number = -code if code < 0 else code - 128  # bubblewrap tells a signal as 128 + its number
    if number in set(signal.Signals):
        return f"by {signal.Signals(number).name}, as when it uses more time or memory than it may"
    return f"by itself, with code {code}"


def score_file(
    path: Path,
    trial: Trial,
    progress: Callable[[str], None],
    *,
    limits: DefenceLimits = DefenceLimits(),  # noqa: B008 - frozen
    walled: bool = True,
) -> tuple[LeaderboardRow, Score | None, bool]:
    """Score a file: its row, its score (None if it failed), and whether it ran behind the wall.

    On the frozen trial a file that has its score already does not run again. `progress` is called at each of the steps:
    those of `run_trial`, twice where the undefended model has not been measured yet.
    """
    source, m = read_source(path), load("charter-chat")
    frozen, code = leaderboard.trial_fingerprint(m, trial), leaderboard.key(source)
    known = leaderboard.rows(frozen)
    if leaderboard.UNDEFENDED in known:
        base = known[leaderboard.UNDEFENDED].result
    else:
        base = run_trial(ModelAlone(m), trial, attackers_direction(m), progress)
        leaderboard.add(frozen, leaderboard.UNDEFENDED, base.name, base)
    if code in known and known[code].result:
        return known[code], score_against(known[code].result, base), True
    name, result, problem = path.stem, None, ""
    try:
        with Submitted(source, m, limits=limits, walled=walled) as defence:
            walled, name = defence.walled, defence.name
            result = run_trial(defence, trial, defence.direction, progress)
    except Failed as failed:
        problem = str(failed)
    if trial.name == "frozen":
        leaderboard.add(frozen, code, name, result, problem)
    row = leaderboard.rows(frozen).get(code) or LeaderboardRow(name, result, problem, 1, "")
    return row, score_against(result, base) if result else None, walled
