"""Sphinx settings of the slide decks. `teach/decks.py` gathers them and runs Sphinx."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

project = "Refusal Mechanics Labs"
extensions = ["myst_parser", "sphinx_revealjs", "teach.rendering"]
root_doc = "lab00"
myst_enable_extensions = ["colon_fence", "dollarmath"]
suppress_warnings = ["toc.not_included"]
pygments_style = "a11y-high-contrast-light"
revealjs_style_theme = "white"
revealjs_static_path = ["_static"]
revealjs_css_files = ["slides.css"]
revealjs_script_conf = {
    "center": False,
    "controls": True,
    "hash": True,
    "slideNumber": "c/t",
    "transition": "none",
    "width": 1280,
    "height": 720,
    "margin": 0.06,
}
revealjs_script_plugins = [{"src": "revealjs/plugin/notes/notes.js", "name": "RevealNotes"}]


def without_mathjax(app: Sphinx, name: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Sphinx adds a script from elsewhere to each page with a formula."""
    context["script_files"] = [file for file in context.get("script_files", []) if "mathjax" not in str(file).lower()]


BETTER = {  # than the template, for those who enlarge the page or hear it
    ", maximum-scale=1.0, user-scalable=no": "",
    '<div class="slides" role="main">': '<div class="slides">',
    '<div class="reveal">': '<main><div class="reveal">',
    '<script src="_static/revealjs/dist/reveal.js">': '</main>\n<script src="_static/revealjs/dist/reveal.js">',
}


def mend(app: Sphinx, problem: Exception | None) -> None:
    for path in Path(app.outdir).glob("*.html"):
        text = path.read_text(encoding="utf-8")
        for before, after in BETTER.items():
            assert text.count(before) == 1, (path, before)
            text = text.replace(before, after)
        path.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> None:
    app.connect("html-page-context", without_mathjax, priority=999)
    app.connect("build-finished", mend)
