"""Damaged submissions: each gets the right score with a reason, and the batch goes on."""

import html
import os
from dataclasses import replace

import pytest
from grading import POINTS, RIGHT, STUB, WRONG, answer, cell, notebook, points_of, put, save

from grader.batch import grade_class
from grader.pages import write_feedback
from grader.records import Records
from refusallab.errors import RefusalLabError
from refusallab.sandbox.server import ForkServer, Limits

pytestmark = pytest.mark.sandbox
LIMITS = Limits(timeout=4, memory=0.5)
SEED = 4711


def with_(**changed):
    """The right answers, some of them replaced: with_(kl=source)."""
    numbers = {"mean_difference": "2.1", "kl": "2.2", "score": "2.3", "choose": "2.4", "last_token_stream": "2.5"}
    return RIGHT | {numbers[name]: source for name, source in changed.items()}


def answers(source):
    return notebook(with_(kl=source))


LOCKED = {"grade_id": "check-2-1", "grade": True, "locked": True, "solution": False, "points": 2}
CHECK = cell('check("2.1", mean_difference)', nbgrader=LOCKED)
CELLS = [answer(number, source) for number, source in RIGHT.items()]
KL = "def kl(base_logits, edited_logits):"
BODY = RIGHT["2.2"].partition("\n")[2]  # what stands below that line in a right answer
WARN = f"import sys, warnings\n{KL}\n    warnings.warn('x')\n    print('y', file=sys.stderr)\n{BODY}"
HOG = f"{KL}\n    kept = []\n    while True:\n        kept.append(bytearray(1 << 24))\n"
LOOP = f"n = [0]\nwhile True:\n    n[0] += 1\n{KL}\n    return n"
STUBBORN = f"{KL}\n    while True:\n        try:\n            while True: pass\n        except BaseException: pass\n"
IN_PLACE = (
    "def mean_difference(harmful, harmless):\n    harmful -= 1\n    return harmful.mean(0) + 1 - harmless.mean(0)"
)
SLEEP = f"import time\n{KL}\n    time.sleep({{}})\n{BODY}"
FORKS = f"import os, time\n{KL}\n    if os.fork() == 0:\n        while True: pass\n    time.sleep(600)"
WORK = "def work():\n    while True: hashlib.sha256(bytes(1 << 24))"
THREADS = f"import hashlib, threading\n{WORK}\n{KL}\n    threading.Thread(target=work, daemon=True).start()\n    work()"
STOPS = f"import os\n{KL}\n    os.kill(os.getpid(), 19)"
PASTED = f"# from\u2028the web\n{KL}\n    s = 'One\u2029two\x0cthree.'\n{BODY}"
COURSE = "from refusallab.course.exercises.lab02 import EXERCISES\n_, kl, *_ = (e.reference for e in EXERCISES)"
SOLVED = f"from refusallab.course import solved\n{KL}\n    return solved('2.2', kl)(base_logits, edited_logits)"
ABOVE = (
    f"from refusallab import course\nf = course.solved('2.2', print)\n{KL}\n    return f(base_logits, edited_logits)"
)
GOES_ON = f"from refusallab.course import solved\n{RIGHT['2.2']}kl = solved('2.2', kl)"
TWICE = f"import os\n{KL}\n    os.fork()\n{BODY}"
LOUD = "print('x' * 50_000_000)"
EDITED = [answer("2.1", WRONG["2.1"][0][0]), cell("print('all right')", nbgrader=LOCKED), *CELLS[1:]]
ALL, NONE = 11, 0

# name: (file, points, exercise that is lost, the reason that the student reads)
DAMAGED = {
    "crash-in-an-answer": (answers(f"import os\n{KL} os._exit(3)"), 9, "2.2", "ended itself with code 3"),
    "crash-in-a-cell": (notebook(before=["import os\nos._exit(1)"]), ALL, "", ""),
    "crash-in-a-needed-cell": (answers(f"x = __import__('os')._exit(1)\n{KL} return x"), 9, "2.2", "was not defined"),
    "segfault": (answers(f"import ctypes\n{KL} ctypes.string_at(0)"), 9, "2.2", "SIGSEGV"),
    "endless-answer": (answers(f"{KL}\n    while True: pass"), 9, "2.2", "in time"),
    "endless-and-stubborn": (answers(STUBBORN), 9, "2.2", "in time"),
    "sleeps-but-is-right": (answers(SLEEP.format(3)), ALL, "", ""),
    "sleeps-for-ever": (answers(SLEEP.format(600)), 9, "2.2", "20 s by the clock"),
    "works-in-a-process": (answers(FORKS), 9, "2.2", "4 s of processor time"),
    "works-in-threads": (answers(THREADS), 9, "2.2", "4 s of processor time"),
    "stops-itself": (answers(STOPS), 9, "2.2", "20 s by the clock"),
    "pasted-ends-of-lines": (answers(PASTED), ALL, "", ""),
    "of-the-course": (answers(COURSE), 9, "2.2", "course's own"),
    "asks-solved": (answers(SOLVED), 9, "2.2", "course's own"),
    "asked-solved-above": (answers(ABOVE), 9, "2.2", "course's own"),
    "goes-on-with-solved": (answers(GOES_ON), ALL, "", ""),
    "500-magics-and-half-a-character": (
        notebook(before=["\n".join(["%time 1"] * 500), "'\ud800'"]),
        ALL,
        "",
        "",
    ),
    "endless-cell": (notebook(after=["while True: pass"]), ALL, "", ""),
    "endless-needed-cell": (answers(LOOP), 9, "2.2", "was not defined"),
    "loud": (notebook(with_(kl=f"{KL}\n    {LOUD}"), before=[LOUD]), 9, "2.2", "got"),
    "loud-but-right": (answers(f"{KL}\n    {LOUD}\n{BODY}"), ALL, "", ""),
    "large-result": (answers(f"import torch\n{KL} return torch.zeros(10_000_000)"), 9, "2.2", "too much data"),
    "memory": (answers(HOG), 9, "2.2", "MemoryError"),
    "memory-at-once": (answers(f"import torch\n{KL} return torch.ones(10**11)"), 9, "2.2", "RuntimeError"),
    "processes": (answers(f"import os\n{KL}\n    while True: os.fork()"), 9, "2.2", ""),
    "answers-twice": (answers(TWICE), 9, "2.2", "not plain data"),
    "syntax-error": (answers("def kl(base_logits)\n    return base_logits"), 9, "2.2", "line 1"),
    "stub": (answers(STUB["2.2"]), 9, "2.2", "not written yet"),
    "duplicated-answer": (save([*CELLS, answer("2.1", STUB["2.1"])]), ALL, "", ""),
    "duplicated-check": (save([CHECK, CHECK, *CELLS, CHECK]), ALL, "", ""),
    "deleted-answer": (save(CELLS[:1] + CELLS[2:]), 9, "2.2", "no function `kl`"),
    "deleted-checks": (save(CELLS), ALL, "", ""),
    "edited-check": (save(EDITED), 9, "2.1", "sign"),
    "truncated": (notebook()[:700], NONE, "2.2", "damaged or cut off"),
    "empty": (b"", NONE, "2.2", "empty"),
    "no-cells": (save([]), NONE, "2.2", "empty"),
    "no-metadata": (save([cell(source) for source in RIGHT.values()]), ALL, "", ""),
    "warns": (answers(WARN), ALL, "", ""),
    "magic": (answers("%%time\n" + RIGHT["2.2"]), ALL, "", ""),
    "by-other-means": (answers(f"exec({RIGHT['2.2']!r})"), ALL, "", ""),
    "changes-its-input": (notebook(with_(mean_difference=IN_PLACE)), 9, "2.1", "changes its input"),
    "raises": (answers(f"{KL}\n    x = 1\n    return base_logits.nothing"), 9, "2.2", "AttributeError at line 3"),
    "not-a-function": (answers("kl = 3"), 9, "2.2", "must be a function"),
    "renamed-function": (answers(RIGHT["2.2"].replace("kl", "KL")), 9, "2.2", "no function `kl`"),
}
BUSY = {"works-in-a-process", "works-in-threads"}  # graded alone, so that the clock does not stop them first
RENAMED = {
    "renamed": "02 (1).ipynb",
    "by-colab": "Copy of 02_the_refusal_direction.ipynb",
    "untitled": "Untitled.ipynb",
}


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """The records and the pages of all of them."""
    folder = tmp_path_factory.mktemp("submitted")
    for name, (data, *_) in DAMAGED.items():
        put(folder / "busy" if name in BUSY else folder / "others", name, data)
    for name, file in RENAMED.items():
        put(folder / "others", name, notebook(), file)
    records = Records(f"sqlite:///{folder / 'grades.sqlite'}")
    for part, workers in (("busy", 1), ("others", 4)):  # of the others, several sleep until they are late
        batch = grade_class(folder / part, records, SEED, limits=LIMITS, workers=workers)
        assert batch.failed == []
    assert batch.graded == len(DAMAGED) - len(BUSY) + len(RENAMED)
    write_feedback(records, folder / "feedback")
    return records, folder / "feedback"


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged(graded, name):
    _, points, lost, reason = DAMAGED[name]
    records, pages = graded
    rows = {g.exercise: g for g in records.all_grades() if g.student == name and g.answer is None}
    found = [(g.exercise, g.points, g.problem, g.detail) for g in rows.values()]
    assert sum(g.points for g in rows.values()) == points, found
    assert all(bool(g.problem) != bool(g.points) for g in rows.values())
    if lost:
        assert rows[lost].points == 0
        assert reason in rows[lost].problem
    page = pages / f"{name}_02.html"
    assert page.stat().st_size < 100_000
    if reason:
        assert reason in html.unescape(page.read_text())


@pytest.mark.parametrize("name", RENAMED)
def test_renamed(graded, name):
    assert points_of(graded[0])[name] == POINTS


def test_resubmissions(tmp_path):
    """Worse, then damaged, then right again: never an older score, and what did not change is not graded again."""
    records = Records(f"sqlite:///{tmp_path / 'grades.sqlite'}")
    folder = tmp_path / "submitted"
    put(folder, "bob", notebook())

    def grade(data, limits=LIMITS):
        put(folder, "ada", data)
        batch = grade_class(folder, records, SEED, limits=limits)
        return sum(points_of(records)["ada"].values()), batch.graded, batch.unchanged

    assert grade(notebook()) == (11, 2, 0)
    assert grade(notebook()) == (11, 0, 2)
    assert grade(answers(WRONG["2.2"][0][0])) == (9, 1, 1)
    assert grade(notebook()[:500]) == (0, 1, 1)
    assert grade(notebook(written="Now with an answer")) == (11, 1, 1)
    assert grade(notebook(written="Now with an answer"), replace(LIMITS, memory=0.6)) == (11, 2, 0)
    assert grade(notebook(written="Now with an answer"), replace(LIMITS, memory=0.6, timeout=5)) == (11, 0, 2)


def test_without_bubblewrap_grading_refuses(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RefusalLabError, match="apt-get install bubblewrap.*--unsafe"):
        ForkServer()


def test_a_sandbox_that_does_not_start_is_refused(tmp_path, monkeypatch):
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho setting up uid map: Permission denied >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(RefusalLabError, match="uid map: Permission denied.*--unsafe"):
        ForkServer()
