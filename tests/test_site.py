"""The book site: built without a warning, nothing from elsewhere, no dead link, no answer, and open to everybody."""

import re
import runpy
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from axe_playwright_python.sync_playwright import Axe

from refusallab.course.notebook import launch_addresses, role, stamp
from refusallab.course.release import solutions

ROOT = Path(__file__).parent.parent
KINDS = {  # of pages, and one of each
    "start": "index.html",
    "lab": "labs/02_the_refusal_direction.html",
    "table": "docs/replication.html",
    "wide table": "docs/matrix.html",
    "text": "docs/decisions.html",
    "api": "api/refusallab.attacks.html",
    "plan": "teach/routes.html",
    "play": "play.html",
}

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("site")]  # one worker builds the site


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "docs" / "site" / "build.py"))


@pytest.fixture(scope="module")
def site(script, tmp_path_factory):
    out = tmp_path_factory.mktemp("book") / "site"
    script["build"](out)
    return out


class Links(HTMLParser):
    """What a page refers to, and the anchors that it has."""

    def __init__(self, text):
        super().__init__()
        self.targets, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        self.targets += [(tag, found[name]) for name in ("href", "src") if found.get(name)]


def test_every_link_leads_somewhere_and_nothing_is_fetched_from_elsewhere(site):
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    assert len(pages) > 30
    for page, found in pages.items():
        if page.parent.name == "slides":
            continue  # tests/test_teach.py looks at the decks
        for tag, target in found.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                assert tag == "a" or target.startswith("data:"), f"{page}: {target}"
                continue
            path = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert path.exists(), f"{page}: {target}"
            if parts.fragment and path in pages:
                assert unquote(parts.fragment) in pages[path].anchors, f"{page}: {target}"


def test_labs_have_figures_and_outputs_and_no_answers(site):
    for path in solutions(ROOT):
        text = (site / "labs" / f"{path.stem}.html").read_text(encoding="utf-8")
        nb = nbformat.read(path, 4)
        assert "cell_output" in text and "<strong>Rubric" not in text and "HIDDEN" not in text
        plain = unescape(re.sub(r"<[^>]+>", "", text))
        for cell in nb.cells:
            if role(cell) == "written":
                assert cell.source[:80] not in plain
            if role(cell) == "answer":
                secret = cell.source.partition("### BEGIN SOLUTION\n")[2].partition("### END SOLUTION")[0].strip()
                assert secret and secret not in plain, secret
        figures = sum("image/png" in output.get("data", {}) for cell in nb.cells for output in cell.get("outputs", []))
        assert len(re.findall(r"<img [^>]*_images/", text)) == figures


@pytest.mark.parametrize("address", ["", "https://github.com/ann/labs"])
def test_labs_open_elsewhere_once_the_repository_is_published(address, script, monkeypatch):
    path = solutions(ROOT)[2]
    monkeypatch.setitem(script["_shown"].__globals__, "read_address", lambda root: address)
    shown = script["_shown"](stamp(nbformat.read(path, 4), path.stem, address), path.stem)
    title, links, *text = shown.cells[0].source.split("\n\n")
    places = launch_addresses(path.stem, address).values() if address else []
    assert title.startswith("# Lab 02") and not any("badge" in part for part in text)
    assert re.findall(r'href="([^"]+)"', unescape(links)) == [f"../download/{path.name}", *places]


def test_every_lab_can_be_downloaded_as_students_get_it(site):
    for path in (ROOT / "labs").glob("*.ipynb"):
        assert (site / "download" / path.name).read_bytes() == path.read_bytes()


def test_formulas_need_no_script(site):
    text = (site / "labs" / "05_weight_orthogonalization.html").read_text(encoding="utf-8")
    assert text.count("<math") > 20 and not re.search(r"<script[^>]*mathjax", text, re.I) and "$$" not in text


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", KINDS)
def test_everybody_can_read_it(kind, scheme, site, browser, tmp_path):
    page = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme=scheme)
    page.goto(f"file://{site / KINDS[kind]}")
    page.wait_for_load_state("networkidle")
    page.screenshot(path=tmp_path / "page.png")
    found = Axe().run(page)
    page.close()
    assert found.violations_count == 0, found.generate_report()


def test_the_first_page_is_light(site):
    page = site / "index.html"
    needed = {
        (page.parent / urlsplit(target).path)
        for tag, target in Links(page.read_text()).targets
        if tag in ("link", "script", "img")
    }
    assert page.stat().st_size + sum(path.stat().st_size for path in needed if path.is_file()) < 1e6
