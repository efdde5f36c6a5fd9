"""The set-up cell on machines that do not have the course: Colab, or somebody's own notebook server."""

import io
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

from refusallab import colab
from refusallab.course.notebook import DOWNLOAD, EXPLAIN, SETUP
from refusallab.course.release import archive

ROOT = Path(__file__).parent.parent
CELL = SETUP.format(otherwise=EXPLAIN)
COLAB = """import importlib.machinery, sys, types
colab = sys.modules["google.colab"] = types.ModuleType("google.colab")
colab.__spec__ = importlib.machinery.ModuleSpec("google.colab", None)
"""


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


@pytest.mark.slow
def test_an_archive_beside_the_notebook_is_enough(run, labs_zip, tmp_path):
    shutil.copy(labs_zip, tmp_path)
    after = "\nimport pooch, refusallab, torch\nprint(refusallab.__file__, pooch.__file__, torch.__file__, sep='\\n')"
    result = run(COLAB + CELL + after)
    assert result.returncode == 0, result.stderr
    *said, library, installed, untouched = result.stdout.splitlines()
    assert "charter-chat" in said[-1]
    assert said[0].startswith("The course installs what this machine lacks: about a minute")
    assert [step.strip() for step in said[1:] if step][:3] == ["packages found: 1", "installing", "done"]
    assert Path(library) == tmp_path / "refusal-mechanics-labs" / "refusallab" / "__init__.py"
    assert "/venv/lib/" in installed and "/packages/torch/" in untouched


@pytest.mark.parametrize(
    ("before", "what"), [(COLAB, "Upload labs.zip (folder icon, left)"), ("", "Start with `make lab`")]
)
@pytest.mark.slow
def test_without_an_archive_it_says_in_one_line_what_to_do(run, before, what):
    guarded = "try:\n" + re.sub("^", "    ", CELL, flags=re.M)
    result = run(f"{before}{guarded}\nexcept ImportError as error:\n    print(*error._render_traceback_(), sep='\\n')")
    assert result.stdout.count("\n") == 1
    assert result.stdout.startswith(f"The course is not installed here. {what}")
    assert run(before + CELL).returncode == 1


def _cut(good):
    return good[: len(good) // 2]


def _zip_of(files, password=False):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, text in files.items():
            file.writestr(name, text)
    data = buffer.getvalue()
    return data.replace(b"PK\x03\x04\x14\x00\x00", b"PK\x03\x04\x14\x00\x01").replace(
        b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"
    ) if password else data  # fmt: skip


def _damaged(good):
    """Whole to look at, with other bytes within: what a broken disk or a resumed download leaves."""
    middle = len(good) // 2
    return good[:middle] + bytes(1000) + good[middle + 1000 :]


@pytest.mark.slow
@pytest.mark.parametrize("before", [COLAB, ""])
@pytest.mark.parametrize(
    "contents",
    [
        lambda good: b"",
        _cut,
        _damaged,
        lambda good: b"<!doctype html><html><title>Sign in</title></html>" * 100,
        lambda good: _zip_of({"photos/one.txt": "1", "photos/refusallab/two.txt": "2"}),
        lambda good: _zip_of({"course/refusallab/colab.py": ""}, password=True),
    ],
    ids=["empty", "cut off", "damaged", "HTML", "other zip", "password"],
)
def test_a_bad_archive_gives_one_line_that_says_what_to_do(run, labs_zip, tmp_path, before, contents):
    (tmp_path / "labs.zip").write_bytes(contents(labs_zip.read_bytes()))
    guarded = "try:\n" + re.sub("^", "    ", CELL, flags=re.M)
    result = run(f"{before}{guarded}\nexcept ImportError as error:\n    print(*error._render_traceback_(), sep='\\n')")
    assert result.stdout.count("\n") == 1, result.stderr
    assert "labs.zip is not whole (yet): remove it. " in result.stdout
    assert result.stdout.rstrip().endswith(", then run this cell again.")


@pytest.mark.slow
def test_a_full_disk_is_no_damaged_archive(run, labs_zip, tmp_path):
    shutil.copy(labs_zip, tmp_path)
    full = (
        "import zipfile\n\ndef full(*_):\n    raise OSError(28, 'No space left on device')\n\n"
        "zipfile.ZipFile.extractall = full\n"
    )
    guarded = "try:\n" + re.sub("^", "    ", CELL, flags=re.M)
    result = run(f"{full}{guarded}\nexcept ImportError as error:\n    print(*error._render_traceback_(), sep='\\n')")
    assert "labs.zip: [Errno 28] No space left on device. " in result.stdout


@pytest.mark.slow
def test_an_archive_that_was_packed_again_is_fine(run, labs_zip, tmp_path):
    """Unpacked and zipped by hand, the course lies one folder deeper."""
    with zipfile.ZipFile(labs_zip) as old, zipfile.ZipFile(tmp_path / "labs.zip", "w") as new:
        for name in old.namelist():
            new.writestr(f"Downloads/{name}", old.read(name))
    find, _ = CELL.split("\nfrom refusallab.course import")
    result = run(f"{find}\nimport refusallab\nprint(refusallab.__file__)")
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.splitlines()[-1]).is_relative_to(tmp_path / "Downloads" / "refusal-mechanics-labs")


@pytest.mark.slow
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
    assert Path(result.stdout.splitlines()[-1]).is_relative_to(tmp_path / "refusal-mechanics-labs")


class TestInstall:
    @pytest.fixture
    def pip(self, monkeypatch):
        """Stand-in for pip: notes its requirements and constraints."""
        calls = []

        def stand_in(command, **settings):
            constraints = Path(command[command.index("--constraint") + 1]).read_text()
            calls.append((command[command.index("--constraint") + 2 :], constraints))
            code = f"import sys; print({stand_in.said!r}); sys.exit({stand_in.code})"
            return started([sys.executable, "-c", code], **settings)

        started = subprocess.Popen
        stand_in.calls, stand_in.code, stand_in.said = calls, 0, ""
        monkeypatch.setattr(colab.subprocess, "Popen", stand_in)
        monkeypatch.setenv("PYTHONPATH", "/env/python")  # as on Colab
        return stand_in

    def test_torch_and_numpy_are_held_and_never_asked_for(self, pip):
        colab.install(ROOT)
        [(wanted, constraints)] = pip.calls
        assert "nnsight==0.8.1" in wanted and any(re.match(r"transformers>=.*,<", line) for line in wanted)
        assert not any(re.match(r"(torch|numpy)\b", line) for line in wanted)
        held = [f"{name}=={colab.version(name)}" for name in ("numpy", "torch")]
        assert constraints.splitlines() == held

    def test_commands_that_a_cell_starts_find_the_course(self, pip):
        colab.install(ROOT)
        assert os.environ["PYTHONPATH"] == f"{ROOT}{os.pathsep}/env/python"

    def test_a_part_of_the_course_is_not_installed(self, pip, tmp_path):
        with pytest.raises(colab.SetUpError, match="only a part of the course"):
            colab.install(tmp_path)
        assert pip.calls == []

    def test_another_numpy_in_memory_asks_for_a_restart_before_anything_is_installed(self, pip, monkeypatch):
        monkeypatch.setattr(numpy, "__version__", "1.26.4")
        with pytest.raises(colab.SetUpError, match=r"numpy 1\.26\.4 is loaded.*Restart the kernel") as raised:
            colab.install(ROOT)
        assert raised.value._render_traceback_() == [str(raised.value)]
        assert pip.calls == []

    def test_a_missing_torch_is_not_installed(self, pip, monkeypatch):
        def missing(name):
            raise colab.PackageNotFoundError(name)

        monkeypatch.setattr(colab, "version", missing)
        with pytest.raises(colab.SetUpError, match="is not installed here"):
            colab.install(ROOT)
        assert pip.calls == []

    def test_a_failing_pip_gives_its_reason(self, pip):
        pip.code, pip.said = 1, "WARNING: slow\nERROR: No matching distribution found for nnsight==0.8.1\nERROR: x\n"
        with pytest.raises(colab.SetUpError, match=r"needs\. ERROR: No matching distribution.*0\.8\.1$"):
            colab.install(ROOT)

    def test_a_python_of_the_system_asks_for_an_environment(self, pip):
        """Debian, Ubuntu and Homebrew: PEP 668."""
        pip.code, pip.said = 1, "error: externally-managed-environment\n\n× This environment is externally managed\n"
        with pytest.raises(colab.SetUpError, match=r"takes no packages from pip.*python3 -m venv"):
            colab.install(ROOT)


def test_the_library_can_be_imported_with_the_standard_library_alone():
    code = "import sys, refusallab.colab\nprint(*(m for m in sys.modules if m.startswith(('torch', 'numpy'))))"
    result = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("\n", "")


def test_the_cell_is_short():
    assert CELL.count("\n") < 25
