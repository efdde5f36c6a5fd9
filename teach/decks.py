"""Slide decks: Markdown in slides/, figures from the notebooks, built with Sphinx for reveal.js; and PDF of them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from playwright.sync_api import Browser

from teach import HERE
from teach.figures import figure
from teach.rendering import sphinx

SLIDES = HERE / "slides"
IMAGE = re.compile(r"!\[\]\((lab\d\d/\d+)\)")


def names() -> list[str]:
    """The decks: "lab02" for each lab, and "workshop"."""
    return sorted(path.stem for path in SLIDES.glob("*.md"))


def gather(source: Path) -> None:
    """Write the decks into the folder `source`, which is made anew, with their figures and alt texts."""
    shutil.rmtree(source, ignore_errors=True)
    (source / "_static").mkdir(parents=True)
    shutil.copyfile(SLIDES / "conf.py", source / "conf.py")
    shutil.copyfile(SLIDES / "slides.css", source / "_static" / "slides.css")

    def placed(found: re.Match[str]) -> str:
        shown, file = figure(found[1]), found[1].replace("/", "-") + ".png"
        (source / file).write_bytes(shown.png)
        alt = re.sub(r"([\[\]\\*_`])", r"\\\1", shown.alt)
        return f"![{alt}]({file})"

    for name in names():
        text = (SLIDES / f"{name}.md").read_text(encoding="utf-8")
        (source / f"{name}.md").write_text(IMAGE.sub(placed, text), encoding="utf-8")


def build(out: Path) -> None:
    """The decks as pages in `out`, one HTML file each; CalledProcessError at the first warning of Sphinx."""
    source = out.with_name(out.name + "-source")
    gather(source)
    sphinx("revealjs", source, out)


def print_pdf(folder: Path, browser: Browser) -> None:
    """Print the decks in a folder as PDF beside them, one slide on each page."""
    for deck in names():
        page = browser.new_page(viewport={"width": 1280, "height": 720})
        page.goto(f"{(folder / deck).resolve().as_uri()}.html?view=print")
        page.wait_for_selector(".pdf-page")
        page.pdf(path=folder / f"{deck}.pdf", prefer_css_page_size=True, tagged=True, outline=True)
        page.close()
