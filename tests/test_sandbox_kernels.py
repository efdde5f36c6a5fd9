"""Kernels of the fork server for nbclient and nbval."""

import os
import shutil
import subprocess
import sys
import time

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbformat.v4 import new_code_cell, new_notebook, new_output

from refusallab.sandbox import provisioner

pytestmark = pytest.mark.slow

KERNELS = [
    "refusallab",
    pytest.param(
        "refusallab-sandbox",
        marks=pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed"),
    ),
]


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.setenv("JUPYTER_PATH", str(provisioner.FOLDER))


def run(name, *sources, **settings):
    """The outputs of a notebook, as text."""
    nb = new_notebook(cells=[new_code_cell(source) for source in sources])
    NotebookClient(nb, kernel_name=name, **{"timeout": 60, "allow_errors": True} | settings).execute()
    return ["".join(map(text, c.outputs)) for c in nb.cells]


def text(output):
    """An output in words."""
    return output.get("text") or output.get("evalue") or output.get("data", {}).get("text/plain", "")


@pytest.mark.parametrize("name", KERNELS)
def test_a_notebook_runs(name):
    seen = run(name, "x = 1", "print(x + 1)", "1 / 0", "import torch\ntorch.ones(2).sum().item()", "%matplotlib inline")
    assert seen == ["", "2\n", "division by zero", "2.0", ""]


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_differ_in_what_is_random(name):
    draw = "import random, torch, numpy as np\nprint(random.random(), torch.rand(1).item(), np.random.rand())"
    one, two = run(name, draw)[0].split(), run(name, draw)[0].split()
    assert all(a != b for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("name", KERNELS)
def test_threads_and_processes_work_after_the_fork(name):
    parallel = """\
import torch
torch.set_num_threads(2)
x = torch.randn(800, 800)
print((x @ x).shape)
from torch.utils.data import DataLoader
print(len(list(DataLoader(list(range(8)), batch_size=2, num_workers=2))))
"""
    assert run(name, parallel)[0] == "torch.Size([800, 800])\n4\n"


@pytest.mark.parametrize("name", KERNELS)
def test_an_interrupt_ends_a_cell_and_not_the_kernel(name):
    seen = run(name, "while True: pass", "print('alive')", timeout=2, interrupt_on_timeout=True)
    assert seen[1] == "alive\n"
    with pytest.raises(CellTimeoutError):
        run(name, "while True: pass", timeout=2)


@pytest.mark.parametrize("name", KERNELS)
def test_a_crash_is_noticed_and_the_server_lives(name):
    with pytest.raises(DeadKernelError):
        run(name, "import ctypes\nctypes.string_at(0)")
    assert run(name, "print(3)") == ["3\n"]


def test_a_kernel_without_the_sandbox_runs_where_the_notebook_is(tmp_path):
    [seen] = run("refusallab", "import os\nprint(os.getcwd())", resources={"metadata": {"path": tmp_path}})
    assert seen.strip() == str(tmp_path)


def test_no_kernel_stays_behind():
    [seen] = run("refusallab", "import os\nprint(os.getpid())")
    end = time.monotonic() + 10
    while os.path.exists(f"/proc/{int(seen)}") and time.monotonic() < end:
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{int(seen)}")


def test_nbval(tmp_path):
    """pytest --nbval verifies notebooks through it, and sees what differs."""
    for name, stored in (("good", "3\n"), ("bad", "4\n")):
        stream = new_output("stream", name="stdout", text=stored)
        cells = [new_code_cell("x = 1"), new_code_cell("print(x + 2)", outputs=[stream], execution_count=2)]
        nbformat.write(new_notebook(cells=cells), tmp_path / f"{name}.ipynb")
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-kernel-name", "refusallab", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, "."], cwd=tmp_path, env=os.environ, capture_output=True, text=True)
    assert "1 failed, 3 passed" in done.stdout, done.stdout
    assert "bad.ipynb::Cell 1" in done.stdout
