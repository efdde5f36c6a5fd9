"""The set-up files agree with each other, the code and the README; `make` does what the README says."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import refusallab
from refusallab.errors import RefusalLabError

ROOT = Path(__file__).parent.parent
CONDA_NAMES = {"pytorch": "torch"}
HADOLINT = Path(sys.executable).with_name("hadolint")


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def pins(lines):
    """Exact public versions, by canonical name. Any other kind of line is a mistake in these files."""
    found = {}
    for line in lines:
        pin = re.fullmatch(r"([\w.-]+)==([\w.]+)", line)
        if pin is None:
            raise ValueError(f"not an exact public version: {line}")
        found[canonicalize_name(CONDA_NAMES.get(pin[1], pin[1]))] = pin[2]
    return found


def requirements(pyproject, extras=("lab", "gguf", "teach", "grade", "site", "test")):
    project = tomllib.loads(pyproject)["project"]
    lines = project["dependencies"] + [line for e in extras for line in project["optional-dependencies"][e]]
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


def disagreements(pyproject, constraints, environment):
    """One line for each way in which the three texts differ; none when they agree."""
    direct = requirements(pyproject)
    pinned = pins(line for line in constraints.splitlines() if line and not line.startswith("#"))
    conda = yaml.safe_load(environment)["dependencies"]
    python, pip, *packages, from_pip = conda
    assert pip == "pip"
    *pip_packages, project = from_pip["pip"]
    assert project == "-e ."
    env = pins(packages) | pins(pip_packages)

    problems = []
    requires_python = Requirement("python" + tomllib.loads(pyproject)["project"]["requires-python"])
    if python.removeprefix("python=") not in requires_python.specifier:
        problems.append(f"environment.yml has {python}, pyproject.toml wants {requires_python}")
    for name, requirement in direct.items():
        if name not in pinned:
            problems.append(f"{name} is not in constraints.txt")
        elif pinned[name] not in requirement.specifier:
            problems.append(f"constraints.txt has {name} {pinned[name]}, pyproject.toml wants {requirement}")
        if env.get(name) != pinned.get(name):
            problems.append(f"{name}: environment.yml {env.get(name)}, constraints.txt {pinned.get(name)}")
    problems += [f"{name} is in environment.yml, not in pyproject.toml" for name in env if name not in direct]
    return problems


FILES = ("pyproject.toml", "constraints.txt", "environment.yml")


def test_the_three_files_agree():
    assert disagreements(*map(read, FILES)) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        ("environment.yml", "scipy==1", "scipy==2", "scipy: environment.yml 2"),
        ("environment.yml", "  - pytorch==2.13.0\n", "", "torch: environment.yml None"),
        ("environment.yml", "- rich==", "- fastai==1.0\n  - rich==", "fastai is in environment.yml, not in"),
        ("environment.yml", "python=3.11", "python=3.10", "environment.yml has python=3.10"),
        ("constraints.txt", "nnsight==0.8.1", "nnsight==0.8.2", "constraints.txt has nnsight 0.8.2"),
        ("constraints.txt", "torch==2.13.0\n", "", "torch is not in constraints.txt"),
        ("pyproject.toml", "transformers>=5.20,<5.23", "transformers<5", "wants transformers<5"),
        ("pyproject.toml", '"tqdm>=4.66"', '"tqdm>=4.66", "fastai"', "fastai is not in constraints.txt"),
    ],
)
def test_a_planted_disagreement_is_found(file, old, new, problem):
    texts = {name: read(name) for name in FILES}
    changed = re.sub(rf"^(.*?){re.escape(old)}", lambda m: m[1] + new, texts[file], count=1, flags=re.M)
    assert changed != texts[file]
    texts[file] = changed
    assert any(problem in line for line in disagreements(*texts.values()))


@pytest.mark.parametrize("line", ["torch==2.13.0+cpu", "torch>=2.13", "-e .", "torch @ file:///t.whl"])
def test_constraints_hold_exact_public_versions_only(line):
    pyproject, constraints, environment = map(read, FILES)
    with pytest.raises(ValueError, match="not an exact public version"):
        disagreements(pyproject, f"{constraints}{line}\n", environment)


def undeclared_imports(folder, pyproject):
    """Packages that the Python files below a folder import and pyproject.toml does not list for it."""
    names = set()
    for path in (ROOT / folder).rglob("*.py"):
        if path.parent.name == "tests" and folder != path.parent.relative_to(ROOT).as_posix():
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.split(".")[0])
    own = {"conftest", "grader", "refusallab", "smallmodels", "teach"}
    own |= {path.stem for path in (ROOT / folder).glob("*.py")}
    distributions = packages_distributions()
    special = {
        "refusallab": ["adapters", "inspect"],
        "teach": ["site", "test"],
        "tests": ["site", "test"],
        "grader/tests": ["test"],
    }
    extras = ("lab", "gguf", "teach", "grade", *special.get(folder, []))
    declared = requirements(pyproject, extras)
    return {
        name
        for name in names - own - sys.stdlib_module_names
        if not any(canonicalize_name(d) in declared for d in distributions.get(name, [name]))
    }


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["grader", "grader/tests", "refusallab", "smallmodels", "teach", "tests"])
def test_every_import_is_a_declared_dependency(folder):
    assert undeclared_imports(folder, read("pyproject.toml")) == set()


@pytest.mark.slow
def test_an_undeclared_import_is_found():
    pyproject = read("pyproject.toml").replace('    "scipy>=1.13",\n', "")
    assert undeclared_imports("refusallab", pyproject) == {"scipy"}


@pytest.mark.parametrize(("extra", "package"), [("inspect", "inspect_ai"), ("adapters", "peft")])
def test_without_its_extra_a_module_says_what_to_install(monkeypatch, extra, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"refusallab.{extra}", raising=False)
    with pytest.raises(RefusalLabError, match=rf"pip install '\.\[{extra}\]'"):
        importlib.import_module(f"refusallab.{extra}")


def test_versions_agree():
    version = tomllib.loads(read("pyproject.toml"))["project"]["version"]
    assert refusallab.__version__ == version == yaml.safe_load(read("CITATION.cff"))["version"]


def test_readme_names_every_bundled_model():
    bundled = tomllib.loads(read("smallmodels/catalog.toml"))["bundled"]
    first_cells = re.findall(r"^\| (`charter-[^|]*)", read("README.md"), flags=re.M)
    assert sorted(re.findall(r"`([\w-]+)`", "".join(first_cells))) == sorted(bundled)


def targets(command):
    """The make targets of a command line."""
    return [word for word in command.split()[1:] if "=" not in word]


def make_targets():
    return set(re.findall(r"^([\w-]+):(?!=)", read("Makefile"), flags=re.M))


def test_ci_runs_the_check_and_every_suite_with_the_test_command_of_the_readme_last():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    suites = ["check", "test-fast", "test-sandbox", "test-browser", "test-real", "test"]
    assert targets(read(".ci/run").splitlines()[-1]) == suites
    assert "`make test`" in read("README.md")


def jobs(name):
    """The jobs of a workflow."""
    return yaml.safe_load(read(f".github/workflows/{name}"))["jobs"]


def commands(job):
    return [step["run"] for step in job["steps"] if "run" in step]


def problems_of(job):
    """What a job calls besides set-up and make targets that exist; none when it is as it should be."""
    found = []
    for command in commands(job):
        if command.startswith("make "):
            found += [f"no target {target}" for target in targets(command) if target not in make_targets()]
        elif not re.match(r"sudo (apt-get|sysctl) ", command):
            found.append(f"not a make target: {command}")
    actions = {step["uses"].partition("@")[0] for step in job["steps"] if "uses" in step}
    return found + sorted(actions - {"actions/checkout", "actions/setup-python", "actions/upload-artifact"})


WORKFLOWS = ("ci.yml", "nightly.yml")


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows_call_make_targets_and_nothing_else(name):
    assert {job: problems_of(steps) for job, steps in jobs(name).items() if problems_of(steps)} == {}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_jobs_with_tests_of_the_sandbox_have_bubblewrap(name):
    commands = [" ".join(step.get("run", "") for step in job["steps"]) for job in jobs(name).values()]
    tests = [text for text in commands if re.search(r"\btest-(sandbox|nightly|all)\b", text)]
    assert len(tests) == 1
    assert "install -y bubblewrap" in tests[0]
    assert "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0" in tests[0]


@pytest.mark.parametrize(
    ("command", "problem"),
    [("make chekc test", "no target chekc"), ("pytest tests", "not a make target: pytest tests")],
)
def test_a_planted_step_of_a_workflow_is_found(command, problem):
    job = jobs("ci.yml")["fast"]
    job["steps"].append({"run": command})
    assert problems_of(job) == [problem]


def pythons(job):
    matrix = job.get("strategy", {}).get("matrix", {})
    setup = next(step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", ""))
    return {*matrix.get("python", []), *(case["python"] for case in matrix.get("include", []))} or {setup}


def test_workflows_run_the_pythons_of_the_project_on_every_system():
    wanted = Requirement("python" + tomllib.loads(read("pyproject.toml"))["project"]["requires-python"]).specifier
    for name in WORKFLOWS:
        assert all(version in wanted for job in jobs(name).values() for version in pythons(job))
    assert pythons(jobs("ci.yml")["fast"]) == {"3.11", "3.12", "3.13"}
    assert {"os": "macos-latest", "python": "3.13"} in jobs("ci.yml")["fast"]["strategy"]["matrix"]["include"]
    assert pythons(jobs("ci.yml")["full"]) == {"3.11"}


def test_pre_commit_runs_the_tools_of_make_check():
    hooks = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"][0]["hooks"]
    entries = " ".join(hook["entry"].replace(".venv/bin/python", "$(RUN)").replace(" -m", "") for hook in hooks)
    check = re.search(r"^check:.*\n((?:\t.*\n)+)", read("Makefile"), flags=re.M)[1]
    assert all(line.strip().replace(" --check", "") in entries for line in check.splitlines())


@pytest.mark.slow
class TestDeadline:
    @pytest.fixture
    def run(self, tmp_path):
        """Run two notebooks with the project's conftest.py, some time before or after the deadline."""
        shutil.copy(ROOT / "conftest.py", tmp_path)
        for name in ("a", "b"):
            nb = new_notebook(cells=[new_code_cell("1 + 1") for _ in range(2)])
            nbformat.write(nb, tmp_path / f"{name}.ipynb")

        def go(**settings):
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-ra",
                "--nbval-lax",
                "--nbval-current-env",
                "-p",
                "no:cacheprovider",
            ]
            env = {k: v for k, v in os.environ.items() if k != "REFUSALLAB_DEADLINE"} | settings
            return subprocess.run([*command, "."], cwd=tmp_path, env=env, capture_output=True, text=True)

        return go

    def test_past_it_no_notebook_is_begun_and_each_is_listed(self, run):
        done = run(REFUSALLAB_DEADLINE="1000")
        assert done.returncode == 0 and "4 skipped" in done.stdout
        assert all(f"{name}.ipynb was not verified: the deadline had passed" in done.stdout for name in "ab")

    def test_past_it_no_long_test_is_begun(self, run, tmp_path):
        for name in ("slow", "sandbox", "browser", "nightly"):
            (tmp_path / f"test_{name}.py").write_text(f"import pytest\n\n@pytest.mark.{name}\ndef test_x(): assert 0\n")
        (tmp_path / "test_short.py").write_text("def test_x(): pass\n")
        done = run(REFUSALLAB_DEADLINE="1000")
        assert done.returncode == 0 and "1 passed, 8 skipped" in done.stdout
        assert "test_slow.py was not verified: the deadline had passed" in done.stdout

    def test_before_it_and_without_one_every_notebook_runs(self, run):
        assert "4 passed" in run(REFUSALLAB_DEADLINE="99999999999").stdout
        assert "4 passed" in run().stdout


FAKE_PYTHON = """#!/bin/sh
case "$1 $2" in
  "-c "*) exit $OLD ;;
  "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; cp "$0" "$3/bin/refusallab" ;;
esac
case "$*" in *"$BREAK"*) exit 1 ;; esac
echo "$PATH" > path
echo "$(basename "$0") $*" >> calls
"""


@pytest.fixture
def make(tmp_path):
    """Run make on a copy of the set-up files, with a stand-in for Python that notes its calls."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    tools = {"python3": FAKE_PYTHON, "uname": "#!/bin/sh\necho $SYSTEM", "id": "#!/bin/sh\necho $USER_ID"}
    for name, text in tools.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def run(target, *, ok=True, **variables):
        (tmp_path / "calls").write_text("")
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        settings = {"PATH": path, "OLD": "0", "BREAK": "nothing", "SYSTEM": "Linux", "USER_ID": "1000"}
        env = settings | variables
        overrides = [f"{name}={env.pop(name)}" for name in ("CONSTRAINTS", "LAB") if name in env]
        result = subprocess.run(["make", target, *overrides], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert (result.returncode == 0) == ok, result.stdout + result.stderr
        return result.stderr if not ok else (tmp_path / "calls").read_text().splitlines()

    run.folder = tmp_path
    return run


needs_make = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


@needs_make
class TestMake:
    def test_setup_installs_what_students_need_once(self, make):
        venv, install = make("setup")
        assert venv == "python3 -m venv .venv"
        assert install == "python -m pip install --no-compile --constraint constraints.txt --editable .[lab,gguf]"
        assert make("setup") == []

    def test_develop_adds_the_rest_once(self, make):
        make("setup")
        install, panels = make("develop")
        assert install.endswith(" --constraint constraints.txt --editable .[lab,gguf,teach,grade,site,test]")
        assert panels == "python -m jupyterlab.labextensions disable --level=sys_prefix @jupyter/nbgrader"
        assert make("develop") == make("setup") == []

    def test_versions_can_be_left_open(self, make):
        assert make("develop", CONSTRAINTS="")[1] == "python -m pip install --no-compile --editable .[lab,gguf]"

    @pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
    def test_setup_runs_again_when_a_file_changed(self, make, changed):
        make("setup")
        stamp = (make.folder / ".venv" / ".students").stat().st_mtime
        os.utime(make.folder / changed, (stamp + 1, stamp + 1))
        assert len(make("setup")) == 2

    def test_a_failed_setup_is_not_taken_for_done(self, make):
        make("setup", ok=False, BREAK="pip install")
        assert len(make("setup")) == 2

    @pytest.mark.parametrize(("target", "command"), [("demo", "refusallab demo"), ("lab", "-m jupyterlab")])
    def test_students_targets_work_alone(self, make, target, command):
        _venv, install, call = make(target)
        assert install.endswith(".[lab,gguf]")
        assert command in call
        assert len(make(target)) == 1

    @pytest.mark.parametrize(
        ("target", "words"),
        [
            ("check", ["ruff check", "ruff format --check", "mypy"]),
            ("test-fast", ["-m not (slow or sandbox or browser or nightly or cpu or real) tests grader/tests"]),
            ("test-lab", ["tests/test_lab02.py solutions/02_x.ipynb"]),
            ("test", ["-m not (slow", "-m slow and not (sandbox", "--no-loadscope-reorder solutions"]),
            (
                "test-all",
                [
                    "-m not (slow",
                    "-m slow and",
                    "solutions",
                    "-m sandbox and not nightly",
                    "-m browser and not nightly",
                    "-m nightly",
                    "-m real",
                    "-m cpu",
                ],
            ),
        ],
    )
    def test_developers_targets_work_alone(self, make, target, words):
        for path in ("tests/test_lab02.py", "solutions/02_x.ipynb"):
            (make.folder / path).parent.mkdir(exist_ok=True)
            (make.folder / path).touch()
        *_, panels = make("develop")
        calls = make(target, LAB="02")
        assert "labextensions" in panels
        assert len(calls) == len(words)
        assert all(word in call for word, call in zip(words, calls, strict=True))

    def test_a_lab_must_be_named(self, make):
        make("develop")
        assert "make test-lab LAB=02" in make("test-lab", ok=False)

    @pytest.mark.parametrize(
        ("variables", "browser"),
        [
            ({}, False),
            ({"DISPLAY": ":0"}, True),
            ({"WAYLAND_DISPLAY": "wayland-0"}, True),
            ({"SYSTEM": "Darwin"}, True),
            ({"CI": "true", "DISPLAY": ":0"}, False),
            ({"CI": "true", "SYSTEM": "Darwin"}, False),
        ],
    )
    def test_lab_opens_a_browser_where_there_is_one(self, make, variables, browser):
        call = make("lab", **variables)[-1]
        assert "--ServerApp.root_dir=labs" in call
        assert ("--no-browser" not in call) == browser
        assert "--allow-root" not in call

    def test_terminals_of_the_lab_find_the_commands_of_the_course(self, make):
        make("lab")
        assert (make.folder / "path").read_text().startswith(f"{make.folder / '.venv' / 'bin'}{os.pathsep}")

    def test_lab_as_root(self, make):
        assert "--allow-root" in make("lab", USER_ID="0")[-1]

    def test_old_python_is_named_with_the_way_out(self, make):
        message = make("setup", ok=False, OLD="1")
        assert "needs Python 3.11 or newer" in message
        assert "make setup PYTHON=" in message
        assert not (make.folder / ".venv").exists()


def test_the_image_is_built_by_the_rules_and_from_what_is_there():
    """Hadolint finds nothing, every copied file exists, and the devcontainer builds this image."""
    lint = subprocess.run([HADOLINT, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (lint.returncode, lint.stdout) == (0, "")
    copied = re.findall(r"^COPY (?:--chown=\w+ )?(.+) \S+$", read("Dockerfile"), re.M)
    assert copied and all((ROOT / name).exists() for line in copied for name in line.split())
    container = json.loads(read(".devcontainer/devcontainer.json"))["build"]
    assert (ROOT / ".devcontainer" / container["dockerfile"]).resolve() == ROOT / "Dockerfile"


@pytest.mark.parametrize("name", ["README.md", "Dockerfile"])
def test_a_container_keeps_its_labs_on_a_volume(name):
    folder = re.search(r"^COPY .* labs (\S+)$", read("Dockerfile"), re.M)[1]
    runs = re.findall(r"^.*docker run .*$", read(name), re.M)
    assert runs and all(f" --volume labs:{folder} " in line for line in runs)


def test_conda_hides_the_panels_of_nbgrader_as_make_does():
    hide = re.search(r"jupyterlab\.labextensions disable .*", read("Makefile"))[0]
    assert f"`python -m {hide}`" in read("README.md")


def test_a_fault_in_the_image_is_found(tmp_path):
    (tmp_path / "Dockerfile").write_text(read("Dockerfile").replace("USER 1000\n", "USER root\n"))
    assert subprocess.run([HADOLINT, tmp_path / "Dockerfile"], capture_output=True).returncode == 1


@pytest.mark.nightly
def test_the_wheel_has_valid_metadata_and_is_small_enough_for_an_index(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", tmp_path, ROOT]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as package:
        (name,) = (n for n in package.namelist() if n.endswith(".dist-info/METADATA"))
        found = Metadata.from_email(package.read(name), validate=True)
        assert any(n.startswith("smallmodels/weights/charter-chat/") for n in package.namelist())
    assert found.name == "refusal-mechanics-labs" and wheel.stat().st_size < 95e6
