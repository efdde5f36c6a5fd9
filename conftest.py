"""For tests and notebooks alike: no model from this computer's cache, no trace in the progress of whoever runs them.

Notebooks that changed last are verified first. After REFUSALLAB_DEADLINE (seconds since 1970) neither a notebook nor a
test that takes long is begun.
"""

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

FOLDER = tempfile.TemporaryDirectory(prefix="refusallab-")  # goes when the tests end
os.environ["HF_HUB_CACHE"] = FOLDER.name
os.environ["REFUSALLAB_PROGRESS"] = os.path.join(FOLDER.name, "progress.sqlite")

import matplotlib.font_manager  # noqa: E402, F401 - if it must build its cache, it says so here and in no notebook

ROOT = Path(__file__).parent
BEGUN = set()
COSTLY = ("slow", "sandbox", "browser", "nightly")
NEEDS = {  # the part of a computer that the tests with a marker need: programs, any of which will do
    "sandbox": ("bwrap",),
    "browser": ("chromium", "chromium-browser", "google-chrome"),
}


def last_change(path):
    """When a file was last committed, in seconds since 1970; 0 where git does not know."""
    command = ["git", "log", "-1", "--format=%ct", "--", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return int(done.stdout.strip() or 0)


def pytest_collection_modifyitems(items):
    changed = {path: last_change(path) for path in {item.path for item in items if item.path.suffix == ".ipynb"}}
    items.sort(key=lambda item: -changed.get(item.path, float("inf")))  # a stable sort: cells keep their order


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    for marker, programs in NEEDS.items():
        if item.get_closest_marker(marker) and not any(map(shutil.which, programs)):
            pytest.skip(f"the {marker} tests need {programs[0]}, which is not installed")
    notebook = item.path.suffix == ".ipynb"
    if item.path in BEGUN or not (notebook or any(map(item.get_closest_marker, COSTLY))):
        return
    if time.time() > float(os.environ.get("REFUSALLAB_DEADLINE") or "inf"):
        pytest.skip(f"{item.path.name} was not verified: the deadline had passed")
    if notebook:
        BEGUN.add(item.path)
