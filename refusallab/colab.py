"""Get a foreign machine (Colab) ready for the course, with nothing but the standard library.

The set-up cell of every lab calls `install` after it has unpacked the course. The torch and numpy found there are kept:
replacing them under a running kernel would break it.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HELD = ("numpy", "torch")
ROOT = Path(__file__).resolve().parent.parent


class SetUpError(RuntimeError):
    """The machine cannot run the course. Notebooks show the one line that says what to do, and no traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def install(root: Path = ROOT) -> None:
    """Install what the pyproject.toml in `root` asks for and this Python lacks. SetUpError when that is impossible."""
    held = {name: _installed(name) for name in HELD}
    loaded = getattr(sys.modules.get("numpy"), "__version__", held["numpy"])
    if loaded != held["numpy"]:
        raise SetUpError(
            f"numpy {loaded} is loaded, but {held['numpy']} is installed. Restart the kernel, then run this cell again."
        )
    try:
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    except (OSError, ValueError, KeyError):
        raise SetUpError(f"{root} holds only a part of the course. Remove it, and upload labs.zip again.") from None
    wanted = [line for line in project["dependencies"] if re.match(r"[\w.-]+", line)[0] not in HELD]
    with tempfile.TemporaryDirectory() as folder:
        hold = Path(folder) / "hold.txt"
        hold.write_text("".join(f"{name}=={version}\n" for name, version in held.items()), encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
        problems = _run_pip([*pip, "--constraint", str(hold), *wanted])
    if any("externally-managed-environment" in line for line in problems):
        raise SetUpError(
            "This Python takes no packages from pip. Make an environment and start Jupyter there: "
            "python3 -m venv .venv; .venv/bin/pip install torch numpy jupyterlab; .venv/bin/jupyter lab. "
            "Then run this cell again."
        )
    if problems:
        raise SetUpError(f"pip could not install what the course needs. {problems[0]}")
    importlib.invalidate_caches()
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(root), *([before] if before else [])])  # for what a cell starts


def _run_pip(command: list[str]) -> list[str]:
    """Run pip, show how far it is, and return its errors: at least one if it failed."""
    print("The course installs what this machine lacks: about a minute.")
    errors, read = [], 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            errors += [line.strip()] if line.lower().startswith("error") else []
            if line.startswith(("Collecting", "Processing", "Installing")):
                read += 1
                step = "installing" if line.startswith("Installing") else f"packages found: {read}"
                print(f"\r{step:<30}", end="", flush=True)
    if read:
        print(f"\r{'done' if not process.returncode else 'stopped':<30}")
    return errors or ["pip gave no reason."] if process.returncode else []


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        raise SetUpError(f"{name} is not installed here. Install it first: the README says how.") from None
