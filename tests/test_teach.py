"""The instructor's pack: plans that add up, questions that can be graded, exports, and slides for everybody."""

import re
import shutil
import xml.etree.ElementTree as ET
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import xmlschema
from axe_playwright_python.sync_playwright import Axe

from refusallab.course.catalogue import HEADERS
from refusallab.course.catalogue import QUESTIONS as WRITTEN
from refusallab.course.plan import read_plan
from refusallab.course.release import solutions
from refusallab.errors import RefusalLabError
from teach import HERE, ROOT, decks, questions, rendering
from teach.__main__ import pages
from teach.figures import figure, figures

SCHEMAS = Path(__file__).parent / "schemas"
QTI = "{http://www.imsglobal.org/xsd/ims_qtiasiv1p2}"
CHROMIUM = next(filter(None, map(shutil.which, rendering.CHROMIUM)), None)
MINUTES = {"Workshop of 90 minutes": 90, "Workshop of 3 hours on Colab": 180}


# --- plans ---------------------------------------------------------------------------------------------------------


def tables(text):
    """The tables of a page by the heading above them: rows of cells."""
    found, heading = {}, ""
    for line in text.splitlines():
        if line.startswith("## "):
            heading = line[3:]
        elif line.startswith("|") and not set(line) <= set("|-"):
            found.setdefault(heading, []).append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def misfits(text):
    """What a page of plans names and the labs do not have, and plans whose minutes do not add up."""
    problems = []
    plans = {path.name[:2]: nbformat.read(path, 4).cells for path in solutions(ROOT)}
    sections = {
        lab: set(re.findall(r"^## (\d+)\. ", "\n".join(c.source for c in cells if c.cell_type == "markdown"), re.M))
        for lab, cells in plans.items()
    }
    known = {header.number: header.minutes for header in (*HEADERS, *WRITTEN)}
    for heading, rows in tables(text).items():
        if heading in MINUTES:
            if sum(int(row[0]) for row in rows[1:]) != MINUTES[heading]:
                problems.append(f"{heading}: the minutes do not add up")
            for row in rows[1:]:
                named = re.findall(r"\b\d+\.\d+\b", row[1])
                if sum(known.get(number, 0) for number in named) > int(row[0]):
                    problems.append(f"{heading}: {row[1]} needs more than {row[0]} minutes")
        for row in rows[1:]:
            for number in re.findall(r"\b\d+\.\d+\b", " ".join(row)):
                if number not in known:
                    problems.append(f"{heading}: there is no exercise {number}")
            for lab, listed in re.findall(r"lab (\d\d), ([\d, andto]+)", " ".join(row)):
                numbers = re.findall(r"\d+", listed)
                problems += [f"{heading}: lab {lab} has no section {n}" for n in numbers if n not in sections[lab]]
    return problems


def test_plans_add_up_and_name_what_there_is():
    text = (HERE / "routes.md").read_text(encoding="utf-8")
    assert len(tables(text)) == 4 and misfits(text) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("| 10 | break", "| 15 | break", "do not add up"),
        ("exercises 0.1 and 0.2", "exercises 0.1, 0.2 and 0.3 to 0.5, that is 0.4", "needs more than 40"),
        ("lab 08, 1 and 2", "lab 08, 1 and 12", "lab 08 has no section 12"),
        ("question 8.6", "question 8.9", "there is no exercise 8.9"),
    ],
)
def test_a_plan_that_does_not_fit_is_found(old, new, problem):
    text = (HERE / "routes.md").read_text(encoding="utf-8")
    assert old in text
    assert any(problem in line for line in misfits(text.replace(old, new)))


def test_core_paths_of_the_plans_are_those_of_the_labs():
    text = (HERE / "routes.md").read_text(encoding="utf-8")
    for _, what, place, _ in tables(text)["Workshop of 3 hours on Colab"][1:]:
        if what.startswith("core path"):
            (path,) = solutions(ROOT, [place[4:6]])
            plan = read_plan(nbformat.read(path, 4).cells[0].source)
            assert re.findall(r"\b\d+\.\d+\b", what) == plan.core_exercises


# --- questions -----------------------------------------------------------------------------------------------------


def test_every_lab_has_questions_of_every_kind():
    by_lab = {}
    for q in questions.bank().values():
        by_lab.setdefault(q.lab, []).append(q.kind)
    assert sorted(by_lab) == [path.name[:2] for path in solutions(ROOT)]
    for lab, kinds in by_lab.items():
        assert len(kinds) >= 5 and set(kinds) == set(questions.KINDS), (lab, kinds)


def test_the_place_of_the_right_option_tells_nothing():
    """Nobody gets far by always taking the same letter, or the longest option."""
    chosen = [q for q in questions.bank().values() if q.option]
    places = Counter(next(k for k, option in enumerate(q.option) if option.right) for q in chosen)
    assert max(places.values()) <= 0.45 * len(chosen), places
    longest = sum(max(q.option, key=lambda option: len(option.text)).right for q in chosen)
    assert longest <= 0.5 * len(chosen), (longest, len(chosen))


def test_ids_begin_with_the_lab_and_figures_are_of_it():
    for path in sorted(questions.QUESTIONS.glob("*.toml")):
        for q in questions.read(path):
            assert q.id.startswith(f"{path.stem[3:]}-"), q.id
            assert not q.figure or (q.figure.startswith(path.stem) and figure(q.figure).alt), q.id


A_QUESTION = """
[[question]]
id = "02-x"
kind = "recall"
title = "A title"
minutes = 1
points = 1
text = "Which?"
option = [{text = "a", why = "w", right = true}, {text = "b", why = "w"}, {text = "c", why = "w"}]
"""


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('{text = "b", why = "w"}', '{text = "b", why = "w", right = true}', "exactly one option"),
        ('why = "w"}', 'why = ""}', "say why"),
        ('"recall"', '"riddle"', "no kind 'riddle'"),
        ('why = "w"}]', 'because = "w"}]', "unexpected keyword argument 'because'"),
        ('"recall"', '"figure"', "a figure belongs to"),
        ('"recall"', '"numerical"', "needs answer, tolerance"),
        ('"recall"', '"design"', "a key and a slip"),
        ('kind = "recall"', 'kind = "recall"\ncolour = "red"', "unexpected keyword argument 'colour'"),
    ],
)
def test_a_question_that_cannot_be_asked_is_named(old, new, problem, tmp_path):
    file = tmp_path / "lab02.toml"
    file.write_text(A_QUESTION, encoding="utf-8")
    assert len(questions.read(file)) == 1
    file.write_text(A_QUESTION.replace(old, new), encoding="utf-8")
    with pytest.raises(RefusalLabError, match=f"lab02.toml, 02-x: .*{re.escape(problem)}"):
        questions.read(file)


def test_a_slip_that_would_earn_the_points_is_named():
    q = next(q for q in questions.bank().values() if q.kind == "numerical")
    assert "would earn the points" in questions.problem(replace(q, slips=(questions.Slip(q.answer, "?"),)))


def test_two_exams_are_of_an_hour_and_share_no_question():
    first, second = questions.exams().values()
    assert not {q.id for q in first} & {q.id for q in second}
    for asked in (first, second):
        assert 50 <= sum(q.minutes for q in asked) <= 70 and {q.kind for q in asked} == set(questions.KINDS)


@pytest.mark.parametrize("name", ["lab02", "lab02/0", "lab02/99", "lab02/x", "../lab02/1"])
def test_a_figure_that_is_not_there_is_named(name):
    with pytest.raises(RefusalLabError, match="There is no figure"):
        figure(name)


def test_every_figure_of_the_labs_is_described():
    for path in solutions(ROOT):
        assert all(len(shown.alt) > 40 and shown.png.startswith(b"\x89PNG") for shown in figures(path.name[:2]))


# --- exports -------------------------------------------------------------------------------------------------------


def test_moodle_reads_the_bank():
    text = questions.moodle({"all": list(questions.bank().values()), **questions.exams()})
    xmlschema.XMLSchema(SCHEMAS / "moodle.xsd").validate(text)
    asked = [q for q in ET.fromstring(text.encode()) if q.get("type") != "category"]
    bank = [*questions.bank().values(), *(q for exam in questions.exams().values() for q in exam)]
    assert [q.findtext("name/text").partition(":")[0] for q in asked] == [q.id for q in bank]
    for element, q in zip(asked, bank, strict=True):
        full = [a.findtext("text") for a in element.iter("answer") if a.get("fraction") == "100"]
        right = [questions.html(o.text) for o in q.option if o.right]
        assert full == (right or ([str(q.answer)] if q.kind == "numerical" else []))


@pytest.mark.parametrize("damage", [("<single>true", "<single>perhaps"), ('fraction="100"', 'fraction="many"')])
def test_the_schema_finds_a_damaged_export(damage):
    text = questions.moodle({"all": list(questions.bank().values())})
    assert damage[0] in text
    with pytest.raises(xmlschema.XMLSchemaValidationError):
        xmlschema.XMLSchema(SCHEMAS / "moodle.xsd").validate(text.replace(*damage))


def test_qti_reads_the_bank_and_gives_points_for_the_right_answer(tmp_path):
    bank = list(questions.bank().values())
    questions.save_qti("All", bank, tmp_path / "all.zip")
    with zipfile.ZipFile(tmp_path / "all.zip") as package:
        manifest = package.read("imsmanifest.xml").decode()
        names = package.namelist()
        (name,) = (n for n in names if n.startswith("text2qti") and n.endswith(".xml") and "meta" not in n)
        text = package.read(name).decode()
    assert set(re.findall(r'<file href="([^"]+)"', manifest)) <= set(names)
    xmlschema.XMLSchema(SCHEMAS / "qti.xsd").validate(text)
    items = list(ET.fromstring(text).iter(f"{QTI}item"))
    assert [item.get("title").partition(":")[0] for item in items] == [q.id for q in bank]
    for item, q in zip(items, bank, strict=True):
        scored = [c for c in item.iter(f"{QTI}respcondition") if c.find(f"{QTI}setvar") is not None]
        if q.option:
            labels = [label.get("ident") for label in item.iter(f"{QTI}response_label")]
            right = labels[next(k for k, option in enumerate(q.option) if option.right)]
            assert [c.findtext(f"{QTI}conditionvar/{QTI}varequal") for c in scored] == [right]
        if q.kind == "numerical":
            (condition,) = scored
            low, high = (float(next(condition.iter(f"{QTI}{bound}")).text) for bound in ("vargte", "varlte"))
            assert low < q.answer < high and not any(low <= slip.value <= high for slip in q.slips)


@pytest.mark.slow
def test_generated_pages_are_up_to_date():
    made = pages()
    for path, content in made.items():
        assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode()), path
    there = {path for path in (HERE / "exams").rglob("*") if path.is_file()}
    assert there == {path for path in made if path.parent != HERE}
    guide = (HERE / "ta_guide.md").read_text(encoding="utf-8")
    assert all(f"### {header.number}. " in guide for header in (*HEADERS, *WRITTEN))


# --- slides --------------------------------------------------------------------------------------------------------


def slides(text):
    """The slides of a deck, each with its title. A comment in code is no title."""
    outside = re.sub(r"^# ", "#\N{NO-BREAK SPACE}", text.partition("\n")[2], flags=re.M)
    return re.split(r"^## ", outside, flags=re.M)


@pytest.mark.parametrize("name", decks.names())
def test_decks_have_notes_a_prediction_and_figures(name):
    text = (decks.SLIDES / f"{name}.md").read_text(encoding="utf-8")
    parts = slides(text)
    assert 12 <= len(parts) <= 20
    assert sum(part.startswith("Predict:") for part in parts) == 1
    for part in parts:
        assert part.count(":::{revealjs-notes}") == 1, part[:60]
        shown = part.partition(":::{revealjs-notes}")[0]
        bullets = re.findall(r"^\* (.+)$", shown, re.M)
        assert len(bullets) <= (2 if decks.IMAGE.search(shown) else 5), part[:60]
        code = "".join(re.findall(r"```python\n(.*?)```", shown, re.S))
        assert all(len(line) <= 70 for line in code.splitlines()), part[:60]
    assert len(decks.IMAGE.findall(text)) >= 1 and "![" not in decks.IMAGE.sub("", text)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("teach") / "slides"
    decks.build(out)
    return out


@pytest.mark.browser
@pytest.mark.parametrize("name", decks.names())
def test_slides_fit_and_everybody_can_read_them(name, built, browser):
    wrong = []
    page = browser.new_page(viewport={"width": 1280, "height": 720})
    page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith(("file:", "data:")) else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(f"file://{built / f'{name}.html'}")
    page.wait_for_function("window.Reveal && Reveal.isReady()")
    count = page.evaluate("Reveal.getTotalSlides()")
    assert count == len(slides((decks.SLIDES / f"{name}.md").read_text(encoding="utf-8")))
    for number in range(count):
        page.evaluate("k => Reveal.slide(k)", number)
        title, height = page.evaluate("[Reveal.getCurrentSlide().innerText, Reveal.getCurrentSlide().scrollHeight]")
        if height > 720:
            wrong.append(f"{height} pixels high: {title[:60]}")
    page.goto(f"file://{built / f'{name}.html'}?print-pdf")  # all slides, one below the other
    page.wait_for_function(f"document.querySelectorAll('.pdf-page').length == {count}")
    page.evaluate("document.querySelectorAll('section').forEach(slide => slide.removeAttribute('aria-hidden'))")
    found = Axe().run(page)
    wrong += [f"{v['id']}: {node['html'][:80]}" for v in found.response["violations"] for node in v["nodes"]]
    page.close()
    assert wrong == []


@pytest.mark.browser
def test_decks_are_printed_with_a_page_for_each_slide(built, browser):
    decks.print_pdf(built, browser)
    for name in decks.names():
        pages_of = len(re.findall(rb"/Type\s*/Page\b", (built / f"{name}.pdf").read_bytes()))
        assert pages_of == len(slides((decks.SLIDES / f"{name}.md").read_text(encoding="utf-8")))
