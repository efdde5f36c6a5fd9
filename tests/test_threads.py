"""What importing the library sets for the process: threads that wait, and memory that is freed."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from refusallab.course import session
from refusallab.memory import give_back


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "PASSIVE 1000"),
        ({"GOMP_SPINCOUNT": "0"}, "PASSIVE 0"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"),
    ],
)
def test_threads_that_wait_soon_sleep_unless_the_user_says_otherwise(given, expected):
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} | given
    shown = """if True:
        import os, sys, refusallab
        assert 'torch' not in sys.modules
        print(*map(os.environ.get, ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')))"""
    done = subprocess.run([sys.executable, "-c", shown], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


USES = """
import refusallab, torch

def used(what):
    return int(next(line for line in open("/proc/self/status") if line.startswith(what)).split()[1])  # KiB

def faults():
    return int(open("/proc/self/stat").read().rsplit(")")[1].split()[7])  # pages given to this process, 4 KiB each

def fill(mebibytes):
    torch.empty(mebibytes * 2**18).fill_(1.0)

given_anew = 0
for mebibytes in (1, 2, 4, 8, 12, 15):
    fill(mebibytes)
    before = faults()
    for _ in range(10):
        fill(mebibytes)
    given_anew += faults() - before
print(given_anew * 4 // 1024)
before = used("VmRSS")
fill(256)
print((used("VmRSS") - before) // 1024)
many = [torch.empty(2 * 2**18).fill_(1.0) for _ in range(100)]
some = [x.clone() for x in many[::10]]
del many
before = used("VmRSS")
refusallab.memory.give_back()
print((before - used("VmRSS")) // 1024)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these switches")
def test_memory_of_small_tensors_is_kept_for_the_next_until_it_is_given_back_and_that_of_large_ones_is_not():
    done = subprocess.run([sys.executable, "-c", USES], capture_output=True, text=True, check=True)
    given_anew, kept, given_back = map(int, done.stdout.split())
    assert given_anew < 60  # MiB, of 420 that were used one after the other
    assert kept < 64
    assert given_back > 100  # MiB, of 200 that were freed


def test_a_lab_gives_memory_back_after_each_cell(monkeypatch):
    heard = {}
    shell = SimpleNamespace(events=SimpleNamespace(register=heard.__setitem__))
    monkeypatch.setattr(session, "get_ipython", lambda: shell)
    monkeypatch.setattr(session, "load", lambda name: name)
    assert session.start("charter-chat") == "charter-chat"
    assert heard == {"post_run_cell": give_back}
