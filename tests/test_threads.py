"""What importing the library sets for the process: threads that wait, and memory that is freed."""

import os
import platform
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("chosen", "policy"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_that_wait_sleep(chosen, policy):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": chosen} if chosen else {}
    shown = "import os, sys, refusallab; assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
    done = subprocess.run([sys.executable, "-c", shown], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == policy


USES = """
import refusallab, torch

def used(what):
    return int(next(line for line in open("/proc/self/status") if line.startswith(what)).split()[1])  # KiB

def faults():
    return int(open("/proc/self/stat").read().rsplit(")")[1].split()[7])  # pages given to this process, 4 KiB each

def fill(mebibytes):
    torch.empty(mebibytes * 2**18).fill_(1.0)

given_anew = 0
for mebibytes in (1, 4, 8, 12, 16, 20, 31):
    fill(mebibytes)
    before = faults()
    for _ in range(10):
        fill(mebibytes)
    given_anew += faults() - before
print(given_anew * 4 // 1024)
before = used("VmRSS")
fill(256)
print((used("VmRSS") - before) // 1024)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these switches")
def test_memory_of_small_tensors_is_kept_for_the_next_and_that_of_large_ones_goes_back():
    done = subprocess.run([sys.executable, "-c", USES], capture_output=True, text=True, check=True)
    given_anew, kept = map(int, done.stdout.split())
    assert given_anew < 92  # MiB, of 920 that were used one after the other
    assert kept < 64
