"""The stored outputs of the notebooks hold on another CPU: without vector instructions, and with more threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.cpu
NBVAL = ["--nbval", "--nbval-current-env", "--nbval-cell-timeout", "900", "--nbval-sanitize-with", "tests/sanitize.cfg"]
COMPUTERS = {
    "no vector instructions, one thread": {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"},
    "two threads": {"OMP_NUM_THREADS": "2"},
}


@pytest.mark.parametrize("settings", COMPUTERS.values(), ids=COMPUTERS)
@pytest.mark.parametrize("path", sorted(ROOT.glob("solutions/*.ipynb")), ids=lambda path: path.stem)
def test_the_outputs_are_the_same(path, settings):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *NBVAL, str(path)]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
