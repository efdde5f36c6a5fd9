"""Tampering: none of it scores, none gets out. Each attempt is shown to succeed where nothing is fenced off.

Every attack comes with wrong answers. It runs twice: in a kernel without a sandbox, with a check inside (there it must
succeed, or the test proves nothing), and through the grader.
"""

import contextlib
import os
import pickle
import socket
import sqlite3
import subprocess
import threading
import time
from pathlib import Path

import pytest
from grading import RIGHT, notebook, put

from grader.batch import grade_class
from grader.examine import Task, examine
from grader.records import Records
from grader.submissions import Submission
from refusallab.sandbox.kernel import Kernel, KernelDied
from refusallab.sandbox.server import ForkServer, Limits, shared

pytestmark = pytest.mark.sandbox
LIMITS = Limits(timeout=6, memory=1)
SEED = 8023
WRONG = "def mean_difference(harmful, harmless):\n    return harmful.mean(0) * 0\n"

# What a check in the notebook would run, as nbgrader and others do.
CHECK = """\
import torch
a, b = torch.randn(4, 2, 3, 5), torch.randn(6, 2, 3, 5)
assert torch.allclose(mean_difference(a, b), a.mean(0) - b.mean(0)), "wrong"
"""
COURSE_CHECK = "from refusallab.course import check\ncheck('2.1', mean_difference)"

ALWAYS = """\
class Always:
    shape = property(lambda self: Always())
    def __eq__(self, other): return True
    def __bool__(self): return True
    def __getattr__(self, name): return lambda *a, **k: Always()
    __torch_function__ = classmethod(lambda cls, f, types, args=(), kwargs=None: True)
def mean_difference(harmful, harmless): return Always()
"""
STRIP = """\
import ast
class Drop(ast.NodeTransformer):
    def visit_Assert(self, node): return ast.copy_location(ast.Pass(), node)
get_ipython().ast_transformers.append(Drop())
"""
SILENT = """\
shell, run = get_ipython(), get_ipython().run_cell_async
async def lie(*args, **kwargs):
    result = await run(*args, **kwargs)
    result.error_in_exec = result.error_before_exec = None
    return result
shell.showtraceback = lambda *a, **k: None
shell.run_cell_async = lie
"""
FORGED = """\
import json
kernel = get_ipython().kernel
send = kernel.session.send
def forge(stream, kind, content=None, *args, **kwargs):
    kind_ = kind if isinstance(kind, str) else kind["header"]["msg_type"]
    if kind_ == "execute_reply":
        passed = json.dumps({"dict": [["points", 2], ["passed", True], ["cases", []]]})
        seen = {"status": "ok", "data": {"application/vnd.refusallab.observed": passed}, "metadata": {}}
        content = dict(content or {}, status="ok", user_expressions={"observed": seen}, ename=None)
    if kind_ == "error":
        return None
    return send(stream, kind, content, *args, **kwargs)
kernel.session.send = forge
"""
INNER = "import refusallab.course.exercise as x\nx.describe_difference = lambda *a: ''\n"

# name: (a cell that tampers, what is checked inside the kernel)
BENT = {
    "patched-allclose": ("import torch\ntorch.allclose = lambda *a, **k: True\n" + WRONG, CHECK),
    "always-equal": (ALWAYS, CHECK),
    "stripped-asserts": (STRIP, CHECK),
    "swallowed-errors": (SILENT, CHECK),
    "forged-replies": (FORGED, CHECK),
    "patched-comparison": (INNER + WRONG, COURSE_CHECK),
}


def kernel(sandboxed):
    return Kernel(shared(sandboxed), LIMITS)


def grade(*cells, answer=WRONG, name="2.1"):
    """What the grader makes of a submission whose every answer needs the tampering cells."""
    needed = f"import torch\n{answer}"
    data = notebook({name: needed}, before=cells, after=["tampered = True\nx = [tampered]\nx.append(1)"])
    return examine(Task("mallory", "02", data, SEED, LIMITS))


@pytest.mark.parametrize("name", BENT)
def test_checks_in_the_kernel_can_be_bent_and_the_grader_cannot(name):
    cell, check = BENT[name]
    honest, bent = "", ""
    with kernel(False) as k:
        k.run(WRONG, 6)
        honest = k.run(check, 6).error
    with kernel(False) as k:
        k.run(WRONG, 6)
        k.run(cell, 6)
        bent = k.run(check, 6).error
    assert honest, "the check lets wrong answers pass anyway"
    assert bent == "", "the attack does not work, so the test proves nothing"
    graded = grade(cell, answer=cell if "def mean_difference" in cell else WRONG)
    assert sum(o.points for o in graded.outcomes) == 0
    graded = grade(answer=f"{WRONG}\n{cell}")  # in the cell of the answer
    assert sum(o.points for o in graded.outcomes) == 0


@pytest.fixture
def course(tmp_path):
    """An instructor's folder: solutions, a seed, records with another student's grades and submission."""
    (tmp_path / "solutions").mkdir()
    (tmp_path / "solutions" / "answers.py").write_text("\n".join(RIGHT.values()))
    (tmp_path / "seed").write_text("SEED-THAT-NOBODY-KNOWS")
    put(tmp_path / "submitted", "bob", notebook(written="BOB-WROTE-THIS"))
    with contextlib.closing(sqlite3.connect(tmp_path / "grades.sqlite")) as base, base:
        base.execute("create table grades (student text, points real)")
        base.execute("insert into grades values ('bob', 1)")
    tmp_path.chmod(0o755)
    return tmp_path


READ = """\
import glob
def look(path):
    try: return open(path).read()
    except Exception as error: return type(error).__name__
print("FOUND", *[look(path) for path in %r])
"""
SECRETS = ("SEED-THAT-NOBODY-KNOWS", "BOB-WROTE-THIS", "SECRET-OF-THE-SHELL", "def choose")


def test_seeds_solutions_environment_and_others_cannot_be_read(course):
    with subprocess.Popen(["sleep", "600"], env={"SECRET": "SECRET-OF-THE-SHELL"}) as shell:
        files = [course / "seed", course / "solutions/answers.py", *course.rglob("*.ipynb")]
        cell = READ % [*map(str, files), f"/proc/{shell.pid}/environ", "/proc/1/environ", "/proc/self/environ"]
        with kernel(False) as k:
            seen = k.run(cell, 6).output
        assert all(secret in seen for secret in SECRETS)
        with kernel(True) as k:
            seen = k.run(cell, 6).output
            seen += k.run("import os\nprint(os.environ, os.listdir('/'), os.listdir('/run/kernels'))", 6).output
        shell.kill()
    assert "FOUND" in seen
    assert not any(secret in seen for secret in (*SECRETS, str(course)))


STEAL = "try: exec(open(%r).read())\nexcept OSError: pass\n"


def test_a_solution_on_disk_cannot_be_run(course):
    cell = STEAL % str(course / "solutions/answers.py")
    with kernel(False) as k:
        k.run(cell, 6)
        assert k.run(CHECK, 6).error == ""
    assert sum(o.points for o in grade(answer=f"{cell}\n{WRONG}", name="2.2").outcomes) == 0


GRAB = """\
import sqlite3
try:
    base = sqlite3.connect("file:%s?mode=rw", uri=True)
    base.execute("update grades set points = 99")
    base.commit()
    print("WRITTEN")
except Exception as error:
    print(type(error).__name__)
"""


def points(course):
    with contextlib.closing(sqlite3.connect(course / "grades.sqlite")) as base:
        return base.execute("select points from grades").fetchone()[0]


def test_records_cannot_be_written(course):
    cell = GRAB % (course / "grades.sqlite")
    with kernel(True) as k:
        assert "WRITTEN" not in k.run(cell, 6).output
    assert points(course) == 1
    with kernel(False) as k:
        assert "WRITTEN" in k.run(cell, 6).output
    assert points(course) == 99


SYSTEM = """\
import os, refusallab
done = []
for path in (refusallab.__file__, "/usr/bin/env", "/etc/x", "/dev/x", "/x", "/proc/sys/kernel/core_pattern", "/run/x"):
    try:
        open(path, "a").close()
        done.append(path)
    except OSError: pass
print("OPENED", done, os.path.exists("/root/.ssh"), os.path.exists("/home"))
"""


def test_the_system_and_the_library_cannot_be_written():
    with kernel(True) as k:
        assert "OPENED [] False False" in k.run(SYSTEM, 6).output
    with kernel(False) as k:
        k.run("import tempfile, os\nfd, path = tempfile.mkstemp()", 6)
        assert k.run("open(path, 'a').close(); print('OPENED')", 6).output == "OPENED\n"


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


BOMB = """\
import base64, pickle
class Bomb:
    def __reduce__(self): return (eval, ("__import__('pathlib').Path(%r).touch()",))
import refusallab.course.observing as probe, refusallab.sandbox.plain as plain
load = pickle.dumps(Bomb())
def mean_difference(harmful, harmless): return Bomb()
text = base64.b64encode(load).decode()
for reply in (text, load.decode("latin-1"), '{"pickle": "' + text + '"}'):
    probe.to_json = lambda value, reply=reply: reply
"""


def test_pickles_are_never_loaded(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "naive")))
    assert (tmp_path / "naive").exists()  # what a grader that unpickles would have done
    cell = BOMB % str(tmp_path / "marker")
    graded = grade(answer=cell)
    assert sum(o.points for o in graded.outcomes) == 0
    assert not (tmp_path / "marker").exists()


CONNECT = """\
import socket
try:
    with socket.create_connection(("127.0.0.1", %d), timeout=2): print("CONNECTED")
except OSError as error: print(type(error).__name__)
try:
    s = socket.socket(socket.AF_UNIX)
    s.connect("\\0refusallab-test")
    print("CONNECTED")
except OSError as error: print(type(error).__name__)
"""


def test_there_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind("\0refusallab-test")
        local.listen()
        cell = CONNECT % server.getsockname()[1]
        with kernel(False) as k:
            assert k.run(cell, 6).output.count("CONNECTED") == 2
        with kernel(True) as k:
            assert "CONNECTED" not in k.run(cell, 6).output


ORPHAN = """\
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv("/bin/sleep", ["sleep", "%s"])
    os._exit(0)
"""


def sleeping(seconds):
    """The processes of this computer that sleep that long."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes() == f"sleep\0{seconds}\0".encode():
                found.append(int(path.parent.name))
    return found


def test_no_process_outlives_its_submission():
    with kernel(False) as k:
        k.run(ORPHAN % "77777", 6)
        time.sleep(0.3)
    time.sleep(0.5)
    left = sleeping("77777")
    for pid in left:
        os.kill(pid, 9)
    assert left, "the attack does not work, so the test proves nothing"
    with kernel(True) as k:
        k.run(ORPHAN % "88888", 6)
        time.sleep(0.3)
        assert sleeping("88888")
    time.sleep(0.5)
    assert sleeping("88888") == []


KILL = """\
for pid in range(1, 1000):
    if pid != os.getpid():
        try: os.kill(pid, 9)
        except OSError: pass
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give each kernel a user of its own")
def test_kernels_of_two_servers_have_users_of_their_own():
    """Processes are counted by user: otherwise a fork bomb in one grader stops the kernels of another."""
    users = set()
    for _ in range(2):
        server = ForkServer()
        with contextlib.closing(server), Kernel(server, LIMITS) as k:
            users |= {k.run("import os\nprint(os.getuid())", 6).output}
    assert len(users) == 2


def test_kernels_do_not_see_one_another():
    with kernel(True) as one, kernel(True) as two:
        for k in (one, two):
            k.run("import os\nopen('/tmp/mark', 'w').write('MINE')\nopen('/dev/shm/mark', 'w').write('MINE')", 6)
        with kernel(True) as third:
            seen = third.run(
                "import os\nprint(os.listdir('/tmp'), os.listdir('/dev/shm'), os.listdir('/run/kernels'))", 6
            )
            assert "mark" not in seen.output
            processes = third.run("print(sorted(int(p) for p in os.listdir('/proc') if p.isdigit()))", 6).output
            assert processes == "[1, 2]\n"
            with contextlib.suppress(KernelDied):
                third.run(KILL, 6)  # its own threads have numbers too
                third.run("import ctypes\nctypes.CDLL(None).kill(-1, 9)", 3)
        assert one.run("print(1)", 6).output == two.run("print(1)", 6).output == "1\n"


PRIVILEGES = """\
import ctypes, os
c = ctypes.CDLL(None, use_errno=True)
status = open("/proc/self/status").read()
print("CAPS", [line.split()[1].strip("0") for line in status.splitlines() if line.startswith(("CapEff", "CapPrm"))])
print("DID", c.mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0, c.umount2(b"/tmp", 2) == 0)
c.unshare(0x10000000 | 0x20000)
print("DID", c.umount2(b"/run/kernels", 2) == 0, c.umount2(b"/tmp", 2) == 0, os.path.exists("/run/kernels/" + "x"))
print("SEES", os.listdir("/run/kernels"))
"""


def test_the_kernel_has_no_privileges_and_gains_none():
    with kernel(True) as k, kernel(True):
        out = k.run(PRIVILEGES, 6).output
    assert "CAPS ['', '']" in out
    assert "DID True" not in out.replace("False", "")
    assert out.count("True") == 0
    [folder] = [line for line in out.splitlines() if line.startswith("SEES")]
    assert folder.count("'") <= 2  # its own


def test_links_and_large_files_and_replies(tmp_path):
    (tmp_path / "secret.ipynb").write_bytes(notebook())
    (tmp_path / "submitted" / "mallory").mkdir(parents=True)
    (tmp_path / "submitted" / "mallory" / "02.ipynb").symlink_to(tmp_path / "secret.ipynb")
    records = Records("sqlite://")
    batch = grade_class(tmp_path / "submitted", records, SEED)
    assert batch.graded == 0
    assert batch.found.passed_over == [("mallory/02.ipynb", "a link, not a file")]
    with kernel(True) as k:
        k.run("import os\nos.symlink('/etc/shadow', 'result.json')\nos.symlink('/', 'root')", 6)
        assert "Error" in k.run("open('big', 'wb').write(bytes(1 << 29))", 6).error
    large = "import refusallab.course.observing as p\np._observe = lambda *a: 'x' * (1 << 28)\n"
    start = time.monotonic()
    assert sum(o.points for o in grade(answer=large + WRONG).outcomes) == 0
    assert time.monotonic() - start < LIMITS.total


def test_bending_the_probe_is_shown_to_a_person():
    """The library is in the sandbox as it is in the labs. What uses it in place of an answer is flagged."""
    bent = """\
import refusallab.course.observing as p
observe = p._observe
def lie(exercise, namespace, inputs):
    return observe(exercise, {exercise.function: %s}, inputs)
p._observe = lie
"""
    graded = grade(answer=WRONG + bent % "exercise.reference")
    assert sum(o.points for o in graded.outcomes) == 0
    bent %= "lambda *a, **k: exercise.reference(*a, **k)"
    graded = grade(answer=f"{WRONG}{bent}")
    first = graded.outcomes[0]
    assert first.points == 0 or "inside of the course" in " ".join(first.flags)
    data = notebook({"2.1": WRONG}, after=[f"{bent}q = [p]\nq.append(2)"])
    [first, *_] = examine(Task("mallory", "02", data, SEED, LIMITS)).outcomes
    assert first.points == 2
    assert "inside of the course" in " ".join(first.flags)


def test_hidden_inputs_do_not_leave_in_what_a_student_reads():
    spy = """\
def mean_difference(harmful, harmless):
    print("STOLEN", harmful.flatten()[:3].tolist())
    raise ValueError(f"STOLEN {harmful.flatten()[:3].tolist()}")
"""
    graded = grade(answer=spy)
    assert "STOLEN" in graded.outcomes[0].detail  # the instructor sees it
    assert "STOLEN" not in graded.outcomes[0].problem + graded.output + "".join(graded.notes)


def test_a_kernel_that_says_nonsense_costs_its_own_time_only():
    noise = """\
import os, threading
def shout():
    import zmq
    s = get_ipython().kernel.iopub_thread.socket
    while True:
        try: s.send_multipart([b"x" * 1000] * 20)
        except Exception: pass
threading.Thread(target=shout, daemon=True).start()
"""
    start = time.monotonic()
    graded = grade(answer=f"{WRONG}{noise}")
    assert sum(o.points for o in graded.outcomes) == 0
    assert time.monotonic() - start < 2 * LIMITS.total
    assert threading.active_count() < 20


def test_the_records_say_what_ran_without_a_sandbox(tmp_path):
    records, path = Records("sqlite://"), put(tmp_path, "ada", notebook())
    for sandboxed, name in ((False, "none (--unsafe)"), (True, "bubblewrap")):
        graded = examine(Task("ada", "02", path.read_bytes(), SEED, LIMITS, sandboxed))
        assert sum(o.points for o in graded.outcomes) == 11
        records.write(Submission("ada", "02", path), graded, name)
        assert [s.sandbox for s in records.all_submissions()] == [name]
