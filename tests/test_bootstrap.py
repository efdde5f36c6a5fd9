"""The set-up cell on machines that do not have the course: Colab, or somebody's own notebook server."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import numpy
import pytest

from refusallab import bootstrap
from refusallab.course.notebook import DOWNLOAD, EXPLAIN, SETUP
from refusallab.course.release import archive

ROOT = Path(__file__).parent.parent
CELL = SETUP.format(otherwise=EXPLAIN)
COLAB = "import sys, types\nsys.modules['google.colab'] = types.ModuleType('google.colab')\n"


@pytest.fixture(scope="module")
def labs_zip(tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "labs.zip"
    archive(ROOT, path)
    return path


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A Python with what the tests have, but for the course and pooch; pip finds pooch in a folder, not on the net."""
    root = tmp_path_factory.mktemp("machine")
    venv.create(root / "venv", with_pip=True, symlinks=True)
    python = root / "venv" / "bin" / "python"
    packages = root / "packages"
    packages.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not re.match(r"pooch|refusal|__editable__|pip\b|pip-|_distutils_hack|.*\.pth$", path.name):
            (packages / path.name).symlink_to(path)
    code = "import site; print(site.getsitepackages()[0])"
    site = Path(subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip())
    for old in site.glob("setuptools*"):  # older Pythons put one there that torch does not like
        shutil.rmtree(old)
    (site / "packages.pth").write_text(str(packages))
    _wheel("pooch", root / "wheels")
    return root


def _wheel(name, folder):
    """The installed distribution as a wheel."""
    folder.mkdir()
    found = distribution(name)
    with zipfile.ZipFile(folder / f"{name}-{found.version}-py3-none-any.whl", "w") as wheel:
        for file in found.files:
            if not re.search(r"\.pyc$|INSTALLER|REQUESTED|^\.\.", str(file)):
                wheel.write(file.locate(), str(file))


@pytest.fixture
def run(machine, tmp_path):
    """Run a cell, in a folder of its own, with the Python of that machine."""

    def go(source):
        path = tmp_path / "cell.py"
        path.write_text(source, encoding="utf-8")
        settings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(machine / "wheels"), "OMP_NUM_THREADS": "1"}
        unset = ("PYTHONPATH", "VIRTUAL_ENV")
        environment = {k: v for k, v in (os.environ | settings).items() if k not in unset}
        return subprocess.run(
            [machine / "venv" / "bin" / "python", path], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    return go


def test_an_archive_beside_the_notebook_is_enough(run, labs_zip, tmp_path):
    shutil.copy(labs_zip, tmp_path)
    after = "\nimport pooch, refusallab, torch\nprint(refusallab.__file__, pooch.__file__, torch.__file__, sep='\\n')"
    result = run(COLAB + CELL + after)
    assert result.returncode == 0, result.stderr
    *said, library, installed, untouched = result.stdout.splitlines()
    assert "charter-chat" in said[-1]
    assert Path(library) == tmp_path / "refusal-mechanics-labs" / "refusallab" / "__init__.py"
    assert "/venv/lib/" in installed and "/packages/torch/" in untouched


@pytest.mark.parametrize(
    ("before", "what"), [(COLAB, "Upload labs.zip (folder icon, left)"), ("", "Start with `make lab`")]
)
def test_without_an_archive_it_says_in_one_line_what_to_do(run, before, what):
    guarded = "try:\n" + re.sub("^", "    ", CELL, flags=re.M)
    result = run(f"{before}{guarded}\nexcept ImportError as error:\n    print(*error._render_traceback_(), sep='\\n')")
    assert result.stdout.count("\n") == 1
    assert result.stdout.startswith(f"The course is not installed here. {what}")
    assert run(before + CELL).returncode == 1


def test_with_an_address_it_fetches_the_course(run, labs_zip, tmp_path):
    """A file stands for the published repository."""
    published = tmp_path / "repository"
    (published / "archive").mkdir(parents=True)
    shutil.copy(labs_zip, published / "archive" / "HEAD.zip")
    find, _ = SETUP.format(otherwise=DOWNLOAD.format(address=published.as_uri())).split(
        "\nfrom refusallab.course import"
    )
    result = run(f"{find}\nimport pooch, refusallab\nprint(refusallab.__file__)")
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).is_relative_to(tmp_path / "refusal-mechanics-labs")


class TestInstall:
    @pytest.fixture
    def pip(self, monkeypatch):
        """Stand-in for pip: notes its requirements and constraints."""
        calls = []

        def stand_in(command, **_):
            constraints = Path(command[command.index("--constraint") + 1]).read_text()
            calls.append((command[command.index("--constraint") + 2 :], constraints))
            return subprocess.CompletedProcess(command, stand_in.code, "", stand_in.stderr)

        stand_in.calls, stand_in.code, stand_in.stderr = calls, 0, ""
        monkeypatch.setattr(bootstrap.subprocess, "run", stand_in)
        return stand_in

    def test_torch_and_numpy_are_held_and_never_asked_for(self, pip):
        bootstrap.install(ROOT)
        [(wanted, constraints)] = pip.calls
        assert "nnsight==0.8.1" in wanted and any(re.match(r"transformers>=.*,<", line) for line in wanted)
        assert not any(re.match(r"(torch|numpy)\b", line) for line in wanted)
        held = [f"{name}=={bootstrap.version(name)}" for name in ("numpy", "torch")]
        assert constraints.splitlines() == held

    def test_another_numpy_in_memory_asks_for_a_restart_before_anything_is_installed(self, pip, monkeypatch):
        monkeypatch.setattr(numpy, "__version__", "1.26.4")
        with pytest.raises(bootstrap.SetUpError, match=r"numpy 1\.26\.4 is loaded.*Restart the kernel") as raised:
            bootstrap.install(ROOT)
        assert raised.value._render_traceback_() == [str(raised.value)]
        assert pip.calls == []

    def test_a_missing_torch_is_not_installed(self, pip, monkeypatch):
        def missing(name):
            raise bootstrap.PackageNotFoundError(name)

        monkeypatch.setattr(bootstrap, "version", missing)
        with pytest.raises(bootstrap.SetUpError, match="is not installed here"):
            bootstrap.install(ROOT)
        assert pip.calls == []

    def test_a_failing_pip_gives_its_reason(self, pip):
        pip.code, pip.stderr = 1, "WARNING: slow\nERROR: No matching distribution found for nnsight==0.8.1\nERROR: x\n"
        with pytest.raises(bootstrap.SetUpError, match=r"needs\. ERROR: No matching distribution.*0\.8\.1$"):
            bootstrap.install(ROOT)


def test_the_library_can_be_imported_with_the_standard_library_alone():
    code = "import sys, refusallab.bootstrap\nprint(*(m for m in sys.modules if m.startswith(('torch', 'numpy'))))"
    result = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("\n", "")


def test_the_cell_is_short():
    assert CELL.count("\n") < 25
