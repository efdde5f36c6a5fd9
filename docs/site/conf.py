"""Sphinx settings of the book site. `build.py` gathers the pages and runs Sphinx on them."""

from __future__ import annotations

import re
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

project = "Refusal Mechanics Labs"
author = "the authors of Refusal Mechanics Labs"
copyright = f"{author}. Code under MIT, text under CC BY 4.0"
version = release = version_of("refusal-mechanics-labs")
extensions = ["myst_nb", "sphinx.ext.autodoc", "teach.rendering"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the stored outputs are shown; nbval holds them against fresh runs
nb_merge_streams = True
html_theme = "furo"
html_title = project
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "a11y-high-contrast-dark"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_extra"]
html_copy_source = False
default_role = "code"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
python_display_short_literal_types = True
toc_object_entries = False


def plain(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with `code`: nothing else in them is markup."""
    lines[:] = [re.sub(r"(?<!`)([|*\\])(?!`)|(?<=\w)(_)(?=\W|$)", r"\\\1\2", line.strip()) for line in lines]


NAMED = {  # what the theme leaves out, for those who hear the page or have no mouse
    "<pre>": '<pre tabindex="0">',
    '<div class="table-wrapper ': '<div tabindex="0" class="table-wrapper ',
    '<p class="caption" role="heading">': '<p class="caption" role="heading" aria-level="2">',
    '<aside class="sidebar-drawer">': '<aside class="sidebar-drawer" aria-label="All pages">',
    '<aside class="toc-drawer">': '<aside class="toc-drawer" aria-label="This page">',
    '<aside class="toc-drawer no-toc">': '<aside class="toc-drawer no-toc" aria-label="This page">',
}


def name_landmarks(app: Sphinx, problem: Exception | None) -> None:
    for path in Path(app.outdir).rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        for before, after in NAMED.items():
            text = text.replace(before, after)
        path.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> None:
    app.connect("build-finished", name_landmarks)
    app.connect("autodoc-process-docstring", plain)
