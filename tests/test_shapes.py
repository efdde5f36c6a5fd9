"""Tensors have the shapes that annotations say. Nothing checks the annotations outside this test."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
FAULTS = {  # the file, what stands there, what is put in its place, and the function where that shows
    "another order of axes in an annotation": (
        "directions.py",
        '-> Float32[Tensor, "layers positions width"]',
        '-> Float32[Tensor, "positions layers width"]',
        "directions.candidate_directions",
    ),
    "another order of axes in a field": (
        "attribution.py",
        "scale * constant, scale * mlps)",
        "scale * constant, scale * mlps.T)",
        "attribution.Attribution.__init__",
    ),
}


def check_shapes(root):
    """Run check_shapes.py on the library in `root`."""
    path = os.pathsep.join(map(str, (root, ROOT / "tests", ROOT)))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "import check_shapes; check_shapes.main()"]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def test_every_function_with_a_shape_is_called_and_keeps_it():
    result = check_shapes(ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "not called: []"


@pytest.mark.nightly
@pytest.mark.parametrize(("file", "right", "wrong", "function"), FAULTS.values(), ids=FAULTS)
def test_a_planted_shape_is_found(file, right, wrong, function, tmp_path):
    shutil.copytree(ROOT / "refusallab", tmp_path / "refusallab", ignore=shutil.ignore_patterns("__pycache__"))
    broken = tmp_path / "refusallab" / file
    source = broken.read_text(encoding="utf-8")
    assert right in source
    broken.write_text(source.replace(right, wrong, 1), encoding="utf-8")
    result = check_shapes(tmp_path)
    assert result.returncode != 0
    assert "TypeCheckError" in result.stderr and f"refusallab.{function}." in result.stderr
