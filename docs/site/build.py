"""Gather the pages of the book site and build it: `make site`, in build/site, or as a PDF with `make book`.

The tree of pages mirrors the repository, so that links between files work on the site too. Labs are those that students
get, with the figures and outputs of the executed solutions and without answers. Play page and slides come with it.
"""

from __future__ import annotations

import ast
import html
import importlib
import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import ModuleType

import nbformat

from refusallab.course.notebook import BADGES, launch_addresses, read_address, role
from refusallab.course.release import solutions, to_lab
from teach import decks
from teach.rendering import chromium, sphinx

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
PAGES = (
    "CONTRIBUTING.md",
    "docs/benchmarks.md",
    "docs/decisions.md",
    "docs/glossary.md",
    "docs/grading.md",
    "docs/play/README.md",
    "docs/replication.md",
    "docs/style.md",
    "labs/README.md",
    "smallmodels/CARD.md",
    "solutions/README.md",
    *(f"teach/{name}.md" for name in ("README", "accessibility", "ai_policy", "ethics", "mini_project", "routes")),
)
FACES = {
    "refusallab": "Measure, find, edit",
    "refusallab.model": "Models",
    "refusallab.attacks": "Attacks",
    "refusallab.defences": "Defences",
    "refusallab.plots": "Figures",
    "refusallab.course": "The course",
}
HIDDEN = ("answer", "written", "check")  # roles whose outputs would give answers away
FORMULA = re.compile(r"\s*\$\$(.+?)\$\$\s*", re.DOTALL)  # on lines of its own, for Sphinx
REFERENCE = re.compile(r"^\* (.+)$", re.MULTILINE)
MATRICES = {"matrix_all": "Single requests", "matrix_talk": "Conversations"}  # records in docs/results
COLUMNS = 5  # defences beside each other


def gather(source: Path) -> None:
    """Write every page into the folder `source`, which is made anew."""
    shutil.rmtree(source, ignore_errors=True)
    (source / "_static").mkdir(parents=True)
    shutil.copyfile(HERE / "conf.py", source / "conf.py")
    shutil.copyfile(HERE / "site.css", source / "_static" / "site.css")
    shutil.copyfile(ROOT / "docs" / "headline.png", source / "_static" / "headline.png")
    shutil.copyfile(HERE / "index.md", source / "index.md")
    shutil.copyfile(HERE / "play.md", source / "play.md")
    for name in PAGES:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(_without_dead_links(name), encoding="utf-8")
    cited: dict[str, None] = {}
    for path in solutions(ROOT):
        nb = nbformat.read(path, 4)
        cited |= dict.fromkeys(_references(nb))
        nbformat.write(_shown(nb, path.stem), source / "labs" / path.name)
        (source / "_extra" / "download").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "labs" / path.name, source / "_extra" / "download" / path.name)
    (source / "docs" / "references.md").write_text(
        "# References\n\nAll that the labs cite.\n\n" + "\n".join(f"* {line}" for line in sorted(cited)) + "\n",
        encoding="utf-8",
    )
    (source / "docs" / "matrix.md").write_text(_matrix(), encoding="utf-8")
    (source / "slides.md").write_text(_slides(), encoding="utf-8")
    (source / "api").mkdir()
    for name, title in FACES.items():
        (source / "api" / f"{name}.md").write_text(_api(name, title), encoding="utf-8")


def _shown(solution: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
    """The student's version, with the outputs of the solution wherever they give no answer away."""
    outputs = {
        cell.id: cell.outputs for cell in solution.cells if cell.cell_type == "code" and role(cell) not in HIDDEN
    }
    lab = to_lab(solution)
    places = {"Download": f"../download/{name}.ipynb"}
    if address := read_address(ROOT):
        places |= launch_addresses(name, address)
    links = " · ".join(f'<a href="{html.escape(place)}">{label}</a>' for label, place in places.items())
    # The pictures of badges come from elsewhere.
    parts = [part for part in lab.cells[0].source.split("\n\n") if not part.startswith(BADGES)]
    lab.cells[0].source = "\n\n".join([parts[0], f'<p class="launch">Open this lab: {links}</p>', *parts[1:]])
    for cell in lab.cells:
        if cell.cell_type == "code":
            cell.outputs = outputs.get(cell.id, [])
        else:
            cell.source = FORMULA.sub(r"\n\n$$\n\1\n$$\n\n", cell.source)
        if role(cell) == "setup":
            cell.metadata["tags"] = ["hide-input"]
    return lab


def _references(nb: nbformat.NotebookNode) -> list[str]:
    """The lines under "References" in a lab, without what follows the address."""
    texts = [cell.source.partition("## References")[2] for cell in nb.cells if cell.cell_type == "markdown"]
    return [line.split("): ")[0] + ")" * ("): " in line) for text in texts for line in REFERENCE.findall(text)]


def _matrix() -> str:
    """The page of attacks against defences, from the records."""
    lines = [(HERE / "matrix_head.md").read_text(encoding="utf-8").rstrip(), ""]
    for name, title in MATRICES.items():
        record = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        cells = {(c["attack"], c["defence"]): _share(c["disclosed"], c["p_holm"]) for c in record["cells"]}
        attacks, benign = list(dict.fromkeys(attack for attack, _ in cells)), record["benign"]
        undefended, *defences = benign
        n = record["cells"][0]["disclosed"]["n"]
        lines += [f"## {title}", "", f"### Exact forbidden answers of {record['model']}, n = {n}", ""]
        for start in range(0, len(defences), COLUMNS - 1):
            shown = [undefended, *defences[start : start + COLUMNS - 1]]
            met = [attack for attack in attacks if any((attack, d) in cells for d in shown[1:])]
            lines += _table("attack", shown, {attack: [cells.get((attack, d), "") for d in shown] for attack in met})
        sets = {name: rate["n"] for name, rate in benign[undefended]["exact"].items()}
        headings = [f"{kind}, {name}" for name in sets for kind in ("refused", "exact")]
        lines += ["### What the defences cost, n = " + ", ".join(f"{n} ({name})" for name, n in sets.items()), ""]
        price = {
            defence: [
                *(t for k in sets for t in (_share(cost["refused"][k]), _share(cost["exact"][k], cost["p"][k]))),
                f"{cost['extra_passes']:.1f}",
            ]
            for defence, cost in benign.items()
        }
        lines += _table("defence", [*headings, "extra passes"], price)
    return "\n".join(lines)


def _share(rate: dict, p: float = 1.0) -> str:
    return f"{rate['value']:.2f}{' *' if p < 0.05 else ''}<br>[{rate['low']:.2f}, {rate['high']:.2f}]"


def _table(corner: str, headings: list[str], rows: dict[str, list[str]]) -> list[str]:
    lines = [f"| {corner} | {' | '.join(headings)} |", "|---|" + "---|" * len(headings)]
    return [*lines, *(f"| {name} | {' | '.join(row)} |" for name, row in rows.items()), ""]


def _slides() -> str:
    """The page that leads to the decks."""
    lines = ["# Slides", "", "Press S in a deck for the speaker notes, and ? for all keys.", ""]
    for name in decks.names():
        title = (decks.SLIDES / f"{name}.md").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        lines.append(f'* <a href="slides/{name}.html">{title}</a>')
    return "\n".join([*lines, ""])


def _without_dead_links(name: str) -> str:
    """A page whose links lead to pages of the site, to the published repository, or nowhere."""
    address, folder = read_address(ROOT), (ROOT / name).parent

    def link(found: re.Match[str]) -> str:
        text, target = found.groups()
        path, _, anchor = target.partition("#")
        if "://" in target or not path:
            return found[0]
        inside = (folder / path).resolve().relative_to(ROOT).as_posix()
        if inside in PAGES or (inside.startswith("labs/") and inside.endswith(".ipynb")):
            return found[0]
        return f"[{text}]({address}/blob/HEAD/{inside})" if address else text

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", link, (ROOT / name).read_text(encoding="utf-8"))


def _api(name: str, title: str) -> str:
    """The public names of a package, each from the module that defines it."""
    package = importlib.import_module(name)
    lines = [f"# {title}", "", f"`import {name}`", "", "```{eval-rst}"]
    for public in sorted(_public(package), key=str.lower):
        value = getattr(package, public)
        if isinstance(value, ModuleType):
            continue
        kind = "autoclass" if isinstance(value, type) else "autofunction" if callable(value) else "autodata"
        lines += [f".. {kind}:: {name}.{public}", "   :members:" if kind == "autoclass" else "", ""]
    return "\n".join([*lines, "```", ""])


def _public(package: ModuleType) -> list[str]:
    stub = Path(str(package.__file__)).with_suffix(".pyi")
    if stub.exists():
        body = ast.parse(stub.read_text(encoding="utf-8")).body
        return [alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names]
    return list(package.__all__)


def build(out: Path) -> None:
    """The site in `out`; raises CalledProcessError at the first warning of Sphinx."""
    source = out.with_name(out.name + "-source")
    gather(source)
    runpy.run_path(str(ROOT / "docs" / "play" / "build.py"))["build"](source / "_extra" / "play")
    decks.build(source / "_extra" / "slides")
    sphinx("html", source, out)


def book(pdf: Path) -> None:
    """The labs as one PDF, from the same pages. RefusalLabError without Chromium, which prints it."""
    source, out = pdf.with_name("book-source"), pdf.with_name("book")
    gather(source)
    for path in source.rglob("*.md"):
        if path.parent != source / "labs":
            path.unlink()
    labs = "\n".join(f"labs/{path.stem}" for path in solutions(ROOT))
    (source / "book.md").write_text(f"# Refusal Mechanics Labs\n\n```{{toctree}}\n:maxdepth: 2\n{labs}\n```\n", "utf-8")
    settings = ("-D", "root_doc=book", "-D", "suppress_warnings=toc.not_included,myst.xref_missing")
    sphinx("singlehtml", source, out, *settings)
    margin = dict.fromkeys(("top", "right", "bottom", "left"), "18mm")
    with chromium() as browser:
        page = browser.new_page()
        page.goto((out / "book.html").resolve().as_uri())
        page.pdf(path=pdf, format="A4", margin=margin, tagged=True, outline=True)


if __name__ == "__main__":
    book(Path("build/book.pdf")) if sys.argv[1:] == ["book"] else build(Path("build/site"))
