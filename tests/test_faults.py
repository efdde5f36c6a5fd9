"""A library that is wrong in one place makes a notebook fail: its stored outputs show it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
QUICK = "position off by one"  # is seen early; `make test-nightly` tries the others
FAULTS = {  # what is wrong: the file, what stands there, what is put in its place
    "sign of the direction": ("directions.py", "difference = a - b", "difference = b - a"),
    "position off by one": ("activations.py", ".input[:, positions]", ".input[:, [p - 1 for p in positions]]"),
    "layer off by one": ("activations.py", "blocks(nn)[layer].input[:", "blocks(nn)[max(0, layer - 1)].input[:"),
}


each_fault = pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        pytest.param(*fault, id=name, marks=pytest.mark.slow if name == QUICK else pytest.mark.nightly)
        for name, fault in FAULTS.items()
    ],
)


@each_fault
def test_the_notebook_notices_a_fault_in_the_library(file, right, wrong, tmp_path):
    shutil.copytree(ROOT / "refusallab", tmp_path / "refusallab", ignore=shutil.ignore_patterns("__pycache__"))
    broken = tmp_path / "refusallab" / file
    source = broken.read_text(encoding="utf-8")
    assert right in source
    broken.write_text(source.replace(right, wrong, 1), encoding="utf-8")

    nb = nbformat.read(ROOT / "solutions" / "02_the_refusal_direction.ipynb", 4)
    last = next(i for i, cell in enumerate(nb.cells) if "found = find_direction(m)" in cell.source)
    nb.cells = nb.cells[: last + 1]  # up to where the library's search meets the student's
    nbformat.write(nb, tmp_path / "notebook.ipynb")

    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-x", "-p", "no:cacheprovider"]
    sanitize = ["--nbval-sanitize-with", str(ROOT / "tests" / "sanitize.cfg")]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, *sanitize, "notebook.ipynb"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert re.search(r"1 failed, [1-9]\d* passed", result.stdout), result.stdout + result.stderr
