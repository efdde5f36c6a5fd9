"""How the house stands: imports run one way, between files and between rooms."""

import ast
import importlib
import inspect
from collections import defaultdict
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parent.parent
TOP = ("grader", "refusallab", "smallmodels")


def modules(root):
    """Every module of the packages, by its full name."""
    paths = [path for top in TOP for path in (root / top).rglob("*.py") if "tests" not in path.parts]
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports(root):
    """Which module imports which, wherever in the file the import stands."""
    known, graph = modules(root), nx.DiGraph()
    for name, path in known.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                start = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
                module = ".".join(part for part in (start, node.module) if part)
                wanted = [f"{module}.{alias.name}" for alias in node.names] + [module]
            else:
                continue
            graph.add_edges_from((name, other) for other in wanted if other in known and other != name)
    return graph


def room(name):
    """The room a module stands in, a package in `refusallab`, or the module itself where it stands in the hall."""
    return ".".join(name.split(".")[: 2 if name.startswith("refusallab.") else 1])


def circles(graph):
    return [sorted(part) for part in nx.strongly_connected_components(graph) if len(part) > 1]


def between_rooms(root):
    graph = nx.DiGraph()
    graph.add_edges_from((room(a), room(b)) for a, b in imports(root).edges)
    graph.remove_edges_from(list(nx.selfloop_edges(graph)))
    return graph


@pytest.mark.slow
def test_no_files_import_each_other_in_a_circle():
    assert circles(imports(ROOT)) == []


@pytest.mark.slow
def test_no_rooms_import_each_other_in_a_circle():
    assert circles(between_rooms(ROOT)) == []


@pytest.mark.slow
def test_imports_run_from_the_grader_to_the_library_to_the_models():
    tops = {(a.split(".")[0], b.split(".")[0]) for a, b in imports(ROOT).edges}
    assert {(a, b) for a, b in tops if a != b} == {("grader", "refusallab"), ("refusallab", "smallmodels")}


def defined(root):
    """Where each public function and class is defined, by its name. Commands are named by what users type."""
    homes = defaultdict(set)
    for module, path in modules(root).items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].add(module)
    return {
        name: sorted(m for m in found if name != "main" and not m.endswith(".cli")) for name, found in homes.items()
    }


def test_one_name_is_one_thing():
    assert {name: homes for name, homes in defined(ROOT).items() if len(homes) > 1} == {}


FACES = ("refusallab", "refusallab.attacks", "refusallab.defences", "refusallab.course")


@pytest.mark.parametrize("face", FACES)
def test_a_face_offers_what_it_says(face):
    offered = importlib.import_module(face)
    for name in offered.__all__:
        home = getattr(getattr(offered, name), "__module__", f"{face}.{name}")
        is_module = f"{face}.{name}" in modules(ROOT)
        assert home.startswith(face) and is_module == inspect.ismodule(getattr(offered, name)), name


def test_the_library_does_not_use_its_own_faces():
    """They are for notebooks: a circle through them would not be seen above."""
    known = modules(ROOT)
    for module, path in known.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in FACES and not node.level:
                through = {alias.name for alias in node.names if f"{node.module}.{alias.name}" not in known}
                assert through <= {"__version__"}, module


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("smallmodels/recipe.py", "from refusallab.measure import rate"),
        ("refusallab/attacks/result.py", "from refusallab.defences.monitor import Monitor"),
        ("refusallab/measure.py", "from refusallab import judging"),
        ("refusallab/sandbox/zygote.py", "import grader.batch"),
    ],
)
def test_a_planted_circle_is_found(path, line, tmp_path):
    for name in modules(ROOT).values():
        copy = tmp_path / name.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(name.read_text(encoding="utf-8"), encoding="utf-8")
    planted = tmp_path / path
    planted.write_text(f"{planted.read_text(encoding='utf-8')}\n{line}\n", encoding="utf-8")
    assert circles(between_rooms(tmp_path)) != []
