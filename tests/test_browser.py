"""JupyterLab in a real browser: a solution runs to its explorer, which follows the keyboard, and no error is reported;
the labs that students open have no accessibility issue that jupyterlab-a11y-checker finds.
"""

import ast
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_markdown_cell, new_notebook
from playwright.sync_api import TimeoutError

from refusallab.course.lint import names
from refusallab.course.notebook import role

ROOT = Path(__file__).parent.parent
LABS = sorted(ROOT.glob("labs/*.ipynb"))
NOTEBOOKS = [path for path in sorted(ROOT.glob("solutions/*.ipynb")) if "explore." in path.read_text(encoding="utf-8")]
CONTROLS = {  # of an explorer, and what a person without a mouse does to them
    ".widget-slider [role=slider]": ["ArrowLeft"],
    ".widget-text input": ["ControlOrMeta+a", *"Hello", "Tab"],
    ".widget-dropdown select": ["ArrowDown"],
}
FORKED = sys.platform == "linux"  # the first notebook has a kernel as students have; others are forked, imports done
MINUTE = 60_000  # milliseconds, the unit of playwright
SETTINGS = {  # all cells are in the page, not only those in sight; nothing is fetched from the net
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
KERNEL = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel"
WAITING = "[...document.querySelectorAll('.jp-InputPrompt')].filter(prompt => prompt.innerText == '[*]:').length"
CELLS = "window.jupyterapp.shell.currentWidget.content.widgets.map(cell => cell.model)"
OUTPUTS = f"{CELLS}.filter(model => model.type == 'code').flatMap(model => model.outputs.toJSON())"

FAULTY = new_notebook(
    cells=[
        new_markdown_cell("# One\n\n### Three"),
        new_markdown_cell("![](figure.png)\n\n[here](https://example.org)"),
    ]
)
FAULTS = {"heading-wrong-order", "image-missing-alt", "link-discernible-text"}

pytestmark = pytest.mark.browser


def what_the_last_cell_needs(cells: list) -> list:
    """The cells. Of those between the first and the last are left the imports and what the last one needs.

    All cells are run as they are, and their outputs compared, without a browser.
    """
    trees = [ast.parse(cell.source).body for cell in cells[1:-1]]
    imports = [x for body in trees for x in body if isinstance(x, ast.Import | ast.ImportFrom)]
    imported = {alias.asname or alias.name.partition(".")[0] for x in imports for alias in x.names}
    needed = names(cells[-1].source)[2] - imported
    for cell, body in zip(reversed(cells[1:-1]), reversed(trees), strict=True):
        kept = []
        for statement in reversed(body):
            assigned, changed, read = names(ast.unparse(statement))
            if (assigned | changed) & needed:
                if isinstance(statement, ast.Assign | ast.FunctionDef):
                    needed -= assigned
                needed |= read - imported
            elif statement not in imports:
                continue
            kept.append(statement)
        cell.source = "\n".join(map(ast.unparse, reversed(kept)))
    return cells


@pytest.fixture(scope="module")
def jupyterlab(tmp_path_factory):
    """The address of a JupyterLab that serves copies: of the solutions what their explorers need, of the labs all."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "labs", folder / "served" / "labs")
    (folder / "served" / "solutions").mkdir()
    for path in NOTEBOOKS:
        nb = nbformat.read(path, 4)
        code = [cell for cell in nb.cells if cell.cell_type == "code" and role(cell) != "real"]
        last = max(i for i, cell in enumerate(code) if "explore." in cell.source)
        nb.cells = what_the_last_cell_needs(code[: last + 1])
        if FORKED and path != NOTEBOOKS[0]:
            nb.metadata.kernelspec = {"name": "refusallab", "display_name": "preloaded", "language": "python"}
        nbformat.write(nb, folder / "served" / "solutions" / path.name)
    nbformat.write(FAULTY, folder / "served" / "faulty.ipynb")
    for name, settings in SETTINGS.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--IdentityProvider.token="]
    options = {"ServerApp.root_dir": folder / "served", "ServerApp.port": port, "LabApp.expose_app_in_browser": True}
    environment = os.environ | {
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_PATH": str(ROOT / "refusallab" / "sandbox"),
        "OMP_NUM_THREADS": "1",
    }
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, *(f"--{name}={value}" for name, value in options.items())],
            env=environment,
            stderr=log,
            stdout=log,
        )
        address = f"http://127.0.0.1:{port}"
        try:
            for _ in range(120):
                try:
                    urllib.request.urlopen(f"{address}/api").close()
                    break
                except OSError:
                    assert server.poll() is None, (folder / "log").read_text()
                    time.sleep(1)
            yield address
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:  # on a busy computer its kernels take longer; they end with it
                server.kill()
                server.wait()


@pytest.fixture(scope="module")
def context(browser):
    """One window for all tests: it keeps what it compiled of JupyterLab."""
    context = browser.new_context(viewport={"width": 1280, "height": 1600})
    context.set_default_timeout(3 * MINUTE)
    context.route("https://fonts.googleapis.com/**", lambda route: route.fulfill(content_type="text/css", body=""))
    return context


@pytest.fixture
def page(context, tmp_path):
    page = context.new_page()
    yield page
    page.screenshot(path=tmp_path / "page.png")
    page.close()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_its_explorer_answers_the_keyboard(path, jupyterlab, page):
    errors = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{jupyterlab}/doc/tree/solutions/{path.name}")
    page.wait_for_function(f"{KERNEL}?.status == 'idle'")
    page.evaluate("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_function(f"{WAITING} > 0")
    page.wait_for_function(f"{WAITING} == 0 && {KERNEL}.status == 'idle'", timeout=10 * MINUTE)
    outputs = page.evaluate(OUTPUTS)
    assert outputs and [output for output in outputs if output["output_type"] == "error"] == []

    control, keys = next((page.locator(c).first, keys) for c, keys in CONTROLS.items() if page.locator(c).count())
    view = page.locator(".jp-OutputArea-output", has=control).locator(".widget-html-content").last
    before = view.inner_text()
    for left in reversed(range(5)):  # a key that comes right behind the last cell is lost now and then
        control.focus()
        for key in keys:
            page.keyboard.press(key)
        changed, seen = "([view, before]) => view.innerText != before", [view.element_handle(), before]
        try:
            page.wait_for_function(changed, arg=seen, timeout=MINUTE)
            break
        except TimeoutError:
            assert left, f"{keys} changed nothing:\n{before}"
    assert errors == []


def issues(page, address: str) -> list[str]:
    """What jupyterlab-a11y-checker finds in a notebook. It looks at what is written, and runs nothing."""
    page.goto(address)
    page.wait_for_function("window.jupyterapp?.shell.currentWidget?.context?.isReady")
    report = page.evaluate("window.jupyterapp.commands.execute('jupyterlab-a11y-checker:scan-notebook')")
    return [issue["violationId"] for issue in report["issues"]]


@pytest.mark.nightly
@pytest.mark.parametrize("path", LABS, ids=lambda path: path.stem)
def test_a_lab_has_no_accessibility_issue(path, jupyterlab, page):
    assert issues(page, f"{jupyterlab}/doc/tree/labs/{path.name}") == []


def test_accessibility_issues_are_found(jupyterlab, page):
    assert set(issues(page, f"{jupyterlab}/doc/tree/faulty.ipynb")) == FAULTS
