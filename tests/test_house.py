"""How the house stands: imports run one way, between files and between rooms."""

import ast
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


def test_no_files_import_each_other_in_a_circle():
    assert circles(imports(ROOT)) == []


def test_no_rooms_import_each_other_in_a_circle():
    assert circles(between_rooms(ROOT)) == []


def test_imports_run_from_the_grader_to_the_library_to_the_models():
    tops = {(a.split(".")[0], b.split(".")[0]) for a, b in imports(ROOT).edges}
    assert {(a, b) for a, b in tops if a != b} == {("grader", "refusallab"), ("refusallab", "smallmodels")}


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
