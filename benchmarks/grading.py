"""How many submissions of lab 02 are graded in a minute: with kernels from the fork server, and with plain ones.

    python benchmarks/grading.py [--submissions 60] [--plain 8] [--workers 2]

Both grade submissions of known scores, in one run, with the same sandbox, client, judge and number of workers. They
differ in the kernel alone: forked with everything imported, or `python -m ipykernel` started for each submission.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "grader" / "tests"))

from grading import notebook, points_of, put  # noqa: E402
from test_grade_class import make_class  # noqa: E402

from grader import batch, examine  # noqa: E402
from grader.records import Records  # noqa: E402
from refusallab.sandbox import server  # noqa: E402


class PlainServer:
    """Stands in for a ForkServer, and starts each kernel from nothing."""

    def __init__(self, folder: Path):
        self.folder = folder

    def new_folder(self) -> Path:
        folder = Path(tempfile.mkdtemp(dir=self.folder)) / "run"
        folder.mkdir()
        return folder

    def start_kernel(self, connection: dict[str, Any], limits: server.Limits) -> tuple[socket.socket, int]:
        folder = Path(connection["ip"]).parent
        (folder / "connection.json").write_text(json.dumps(connection | {"ip": f"{server.INSIDE}/k"}))
        kernel = [sys.executable, "-m", "ipykernel_launcher", "-f", f"{server.INSIDE}/connection.json"]
        process = subprocess.Popen(
            [*server.bubblewrap(folder), "--die-with-parent", "--chdir", "/tmp", *kernel],
            env=server.sandbox_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        ours, theirs = socket.socketpair()
        theirs.send(b"ready")
        threading.Thread(target=lambda: (theirs.recv(1), process.kill(), process.wait()), daemon=True).start()
        return ours, os.memfd_create("meter")  # which stands still: the clock alone limits its time


def grade(folder: Path, points: dict[str, dict[str, int]], workers: int, seed: int) -> tuple[float, float]:
    """Submissions a minute, and seconds of the slowest. The scores have to be right."""
    records, start = Records("sqlite://"), time.perf_counter()
    done = batch.grade_class(folder, records, seed, workers=workers)
    seconds = time.perf_counter() - start
    assert done.graded == len(points) and points_of(records) == points, "wrong scores"
    return 60 * len(points) / seconds, max(s.seconds for s in records.all_submissions())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--submissions", type=int, default=60)
    parser.add_argument("--plain", type=int, default=8, help="submissions for the plain kernel")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    seed, load = 271828, os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        server.shared(True)
        started = time.perf_counter() - start
        put(folder / "first", "ada", notebook())
        batch.grade_class(folder / "first", Records("sqlite://"), seed)  # expected values are computed once a seed
        points, _ = make_class(folder / "forked", options.submissions)
        forked, slowest = grade(folder / "forked", points, options.workers, seed)
        points, _ = make_class(folder / "plain", options.plain)
        plain_server = PlainServer(folder)
        batch.shared = examine.shared = lambda sandboxed: plain_server
        plain, slowest_plain = grade(folder / "plain", points, options.workers, seed)
    print(f"{os.cpu_count()} cores, load {load:.1f} before, {options.workers} workers, one thread each")
    print(
        f"fork server: {forked:.0f} submissions a minute (slowest {slowest:.1f} s), after {started:.1f} s to start it"
    )
    print(f"plain kernel: {plain:.0f} submissions a minute (slowest {slowest_plain:.1f} s)")
    print(f"ratio {forked / plain:.1f}")


if __name__ == "__main__":
    main()
