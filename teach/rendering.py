"""Sphinx and Chromium, as the book site and the decks use them. As a Sphinx extension it draws formulas as MathML."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from playwright.sync_api import Browser, sync_playwright
from sphinx.application import Sphinx

from refusallab.errors import RefusalLabError
from teach import ROOT

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


def sphinx(builder: str, source: Path, out: Path, *settings: str) -> None:
    """Build the pages in `source` into `out`, made anew; CalledProcessError at the first warning."""
    shutil.rmtree(out, ignore_errors=True)
    checks = ["--fail-on-warning", "--keep-going", "--quiet", "-d", source.resolve() / "_doctrees"]
    command = [sys.executable, "-m", "sphinx", "--builder", builder, *checks, *settings]
    subprocess.run([*command, source.resolve(), out.resolve()], check=True, cwd=ROOT)  # where this package is found


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser without a window. RefusalLabError where none is installed."""
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        raise RefusalLabError("PDF needs Chromium: install it, or print the pages from a browser (decks: ?view=print).")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def formula(translator: Any, node: nodes.Element) -> None:
    """MathML, which browsers draw and screen readers read by themselves: no script, no font to fetch."""
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    translator.body.append(convert(node.astext(), display=display))
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    for node in (nodes.math, nodes.math_block):
        app.add_node(node, override=True, html=(formula, None), revealjs=(formula, None))
    return {"parallel_read_safe": True}
