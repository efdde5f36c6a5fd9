"""A class with known scores, killed halfway and started again; and a cluster that loses a worker."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import pytest
from grading import POINTS, RIGHT, STUB, WRONG, notebook, points_of, put

from grader.batch import grade_class
from grader.records import Records

pytestmark = pytest.mark.sandbox
CLASS = 24


def draw(rng, number):
    """An answer to an exercise, its points, and the mistake that has to be named ("" for none)."""
    kind = rng.choice(("right", "right", "right", "wrong", "stub", "missing"))
    if kind == "right":
        return f"# {rng.random()}\n{RIGHT[number]}", POINTS[number], ""
    if kind == "wrong":
        source, mistake = rng.choice(WRONG[number])
        return source, 0, mistake
    return STUB.get(number) if kind == "stub" else None, 0, ""


def make_class(folder, size, whole=1):
    """Hand in `size` notebooks, of which every `whole`-th answers the exercises that need the model too.

    Returns the points and the mistakes that they must get.
    """
    points, mistakes = {}, {}
    for k in range(size):
        rng, student = random.Random(k), f"student{k:03}"
        drawn = {number: draw(rng, number) for number in RIGHT}
        if k % whole:
            drawn |= {number: (None, 0, "") for number in ("2.3", "2.5")}
        put(folder, student, notebook({n: source for n, (source, *_) in drawn.items() if source}))
        points[student] = {n: p for n, (_, p, _) in drawn.items()}
        mistakes |= {(student, n): mistake for n, (_, _, mistake) in drawn.items() if mistake}
    return points, mistakes


def rows(path):
    """Every submission in the records: who, and when it was written there."""
    if not path.exists():
        return {}
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as base:
        try:
            return dict(base.execute("select student, graded || seconds from submissions"))
        except sqlite3.OperationalError:
            return {}


def servers(folder):
    """The fork servers that were started in a folder."""
    found = subprocess.run(["pgrep", "-f", "sandbox.zygote"], capture_output=True, text=True).stdout.split()

    def works_there(pid):
        try:
            return os.readlink(f"/proc/{pid}/cwd") == str(folder)
        except OSError:  # it ended meanwhile
            return False

    return [pid for pid in found if works_there(pid)]


def gone(look, seconds=20):
    """Whether what `look` finds is gone within some time."""
    end = time.monotonic() + seconds
    while found := look():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return not found


def test_a_class_killed_halfway_and_started_again(tmp_path):
    points, mistakes = make_class(tmp_path / "submitted", CLASS, whole=4)
    command = [sys.executable, "-m", "refusallab.cli", "grade", "submitted", "--out", "out"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(rows(tmp_path / "out" / "grades.sqlite")) < CLASS // 2:
        time.sleep(0.2)
    assert servers(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = rows(tmp_path / "out" / "grades.sqlite")
    assert CLASS // 2 <= len(before) < CLASS
    assert gone(lambda: servers(tmp_path)), "a server outlives the grader"

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert f"{CLASS - len(before)} graded, {len(before)} unchanged" in done.stdout, done.stderr
    after = rows(tmp_path / "out" / "grades.sqlite")
    assert len(after) == CLASS
    assert before.items() <= after.items()  # none was graded again
    records = Records(f"sqlite:///{tmp_path / 'out' / 'grades.sqlite'}")
    assert points_of(records) == points
    named = {(g.student, g.exercise): g.mistake for g in records.all_grades()}
    assert {key: named[key] for key in mistakes} == mistakes
    assert len(list((tmp_path / "out" / "feedback").iterdir())) == CLASS
    assert all((tmp_path / "out" / f).exists() for f in ("overview.html", "canvas.csv", "moodle_02.csv", "by_hand.csv"))


@pytest.mark.nightly
def test_a_cluster_loses_a_worker_and_no_submission(tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    points, _ = make_class(tmp_path / "submitted", 8)
    records = Records(f"sqlite:///{tmp_path / 'grades.sqlite'}")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, local_directory=str(tmp_path)
    ) as cluster:
        lost = []

        def lose_one(done, of):
            if done == 2:
                lost.append(next(iter(cluster.workers.values())).pid)
                os.kill(lost[0], signal.SIGKILL)

        batch = grade_class(tmp_path / "submitted", records, 99, cluster=cluster.scheduler_address, on_graded=lose_one)
    assert lost
    assert (batch.graded, batch.failed) == (8, [])
    assert points_of(records) == points


def test_a_cluster_that_is_not_there(tmp_path):
    pytest.importorskip("distributed")
    from refusallab.errors import RefusalLabError

    put(tmp_path, "ada", notebook())
    with pytest.raises(RefusalLabError, match="no Dask scheduler"):
        grade_class(tmp_path, Records("sqlite://"), 99, cluster="tcp://127.0.0.1:9")
