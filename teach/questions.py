"""The question bank: a file for each lab in questions/, two exams put together from it, exports for Moodle and QTI.

Each question has a kind. A recall, a figure and a claim question have options of which one is right, a numerical one
has an answer with a tolerance, and a design question is graded by a person. Each says why the usual wrong answer is
wrong.
"""

from __future__ import annotations

import base64
import tempfile
import tomllib
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from text2qti.config import Config
from text2qti.qti import QTI
from text2qti.quiz import Quiz

from refusallab.errors import RefusalLabError
from teach import HERE
from teach.figures import figure

QUESTIONS = HERE / "questions"
EXAMS = HERE / "exams.toml"
KINDS = ("recall", "figure", "numerical", "design", "claim")


@dataclass(frozen=True)
class Option:
    text: str
    why: str  # it is right, or people take it though it is wrong
    right: bool = False


@dataclass(frozen=True)
class Slip:
    """A usual wrong number."""

    value: float
    why: str


@dataclass(frozen=True)
class Question:
    id: str  # "02-mean-difference"
    kind: str
    title: str
    minutes: int
    points: int
    text: str  # Markdown with $formulas$
    figure: str = ""  # "lab02/1"
    option: tuple[Option, ...] = ()
    answer: float | None = None
    tolerance: float = 0.0
    why: str = ""  # how the number is computed
    slips: tuple[Slip, ...] = ()
    key: str = ""  # what a full answer of a design question holds
    slip: str = ""  # its usual wrong answer

    @property
    def lab(self) -> str:
        return self.id[:2]


def read(path: Path) -> list[Question]:
    """The questions of a file. RefusalLabError, with the question's id, for one that cannot be asked or graded."""
    found = []
    for entry in tomllib.loads(path.read_text(encoding="utf-8"))["question"]:
        try:
            entry["option"] = tuple(Option(**option) for option in entry.get("option", ()))
            slip = entry.pop("slip", "")
            entry |= {"slip": slip} if isinstance(slip, str) else {"slips": tuple(Slip(**s) for s in slip)}
            question = Question(**{k: v.strip() if isinstance(v, str) else v for k, v in entry.items()})
        except TypeError as error:
            raise RefusalLabError(f"{path.name}, {entry.get('id')}: {error}") from None
        if wrong := problem(question):
            raise RefusalLabError(f"{path.name}, {question.id}: {wrong}.")
        found.append(question)
    return found


def problem(q: Question) -> str:
    """What keeps a question from being asked or graded; empty if nothing does."""
    chosen = q.kind in ("recall", "figure", "claim")
    if q.kind not in KINDS:
        return f"there is no kind {q.kind!r}, only {', '.join(KINDS)}"
    if chosen and sum(option.right for option in q.option) != 1:
        return "exactly one option must be right"
    if chosen and (len(q.option) < 3 or not all(option.why for option in q.option)):
        return "give at least three options, and say why for each of them"
    if q.kind == "numerical" and (q.answer is None or q.tolerance <= 0 or not q.why or not q.slips):
        return "a numerical question needs answer, tolerance, why, and a slip"
    if any(abs(slip.value - (q.answer or 0)) <= q.tolerance for slip in q.slips):
        return "a slip within the tolerance would earn the points"
    if q.kind == "design" and not (q.key and q.slip):
        return "a design question needs a key and a slip"
    if (q.kind == "figure") != bool(q.figure):
        return "a figure belongs to questions of the kind figure, and to all of them"
    return ""


@cache
def bank() -> dict[str, Question]:
    """All questions by their ids, in the order of the labs."""
    found = [question for path in sorted(QUESTIONS.glob("lab*.toml")) for question in read(path)]
    return {question.id: question for question in found}


def exams() -> dict[str, list[Question]]:
    """The exams by their titles."""
    tables = tomllib.loads(EXAMS.read_text(encoding="utf-8"))["exam"]
    return {exam["title"]: [bank()[name] for name in exam["questions"]] for exam in tables}


# --- Moodle ------------------------------------------------------------------------------------------------------


def _formula(content: str, settings: dict[str, bool]) -> str:
    return rf"\[{content}\]" if settings["display_mode"] else rf"\({content}\)"


@cache
def _markdown() -> MarkdownIt:
    return MarkdownIt("commonmark").enable("table").use(dollarmath_plugin, renderer=_formula)


def html(text: str) -> str:
    """Markdown as HTML, with formulas in the signs that Moodle's MathJax reads."""
    return _markdown().render(text).strip()


def moodle(categories: dict[str, list[Question]]) -> str:
    """Moodle XML: a category of the question bank for each entry."""
    quiz = ET.Element("quiz")
    for title, questions in categories.items():
        category = ET.SubElement(ET.SubElement(quiz, "question", type="category"), "category")
        ET.SubElement(category, "text").text = f"$course$/top/Refusal Mechanics Labs/{title}"
        for q in questions:
            _moodle_question(quiz, q)
    ET.indent(quiz)
    return ET.tostring(quiz, encoding="unicode", xml_declaration=True) + "\n"


def _moodle_question(quiz: ET.Element, q: Question) -> None:
    kind = {"numerical": "numerical", "design": "essay"}.get(q.kind, "multichoice")
    element = ET.SubElement(quiz, "question", type=kind)
    ET.SubElement(ET.SubElement(element, "name"), "text").text = f"{q.id}: {q.title}"
    asked = _text(element, "questiontext", html(q.text))
    if q.figure:
        shown = figure(q.figure)
        picture = ET.Element("img", src="@@PLUGINFILE@@/figure.png", alt=shown.alt)
        asked.find("text").text += ET.tostring(picture, encoding="unicode")
        file = ET.SubElement(asked, "file", name="figure.png", path="/", encoding="base64")
        file.text = base64.b64encode(shown.png).decode()
    _text(element, "generalfeedback", html(q.why or q.slip))
    ET.SubElement(element, "defaultgrade").text = str(q.points)
    if kind == "multichoice":
        ET.SubElement(element, "single").text = "true"
        ET.SubElement(element, "shuffleanswers").text = "true"
        ET.SubElement(element, "answernumbering").text = "abc"
        for option in q.option:
            answer = _text(element, "answer", html(option.text), fraction="100" if option.right else "0")
            _text(answer, "feedback", html(option.why))
    elif kind == "numerical":
        for value, why, points in [(q.answer, q.why, "100"), *((slip.value, slip.why, "0") for slip in q.slips)]:
            answer = ET.SubElement(element, "answer", fraction=points, format="moodle_auto_format")
            ET.SubElement(answer, "text").text = str(value)
            ET.SubElement(answer, "tolerance").text = str(q.tolerance)
            _text(answer, "feedback", html(why))
    else:
        ET.SubElement(element, "responseformat").text = "editor"
        _text(element, "graderinfo", html(f"{q.key}\n\n{q.slip}"))


def _text(parent: ET.Element, name: str, text: str, **attributes: str) -> ET.Element:
    element = ET.SubElement(parent, name, format="html", **attributes)
    ET.SubElement(element, "text").text = text
    return element


# --- QTI 1.2, which Canvas reads ---------------------------------------------------------------------------------


def save_qti(title: str, questions: list[Question], file: Path) -> None:
    """A quiz as a QTI package (zip)."""
    with tempfile.TemporaryDirectory() as folder:
        numbered = enumerate(questions, 1)
        text = f"Quiz title: {title}\n\n" + "\n".join(_plain(number, q, Path(folder)) for number, q in numbered)
        QTI(Quiz(text, config=Config(), source_name=title)).save(file)


def _plain(number: int, q: Question, folder: Path) -> str:
    """A question in the format of text2qti: each part is a mark and Markdown, indented behind it."""
    picture = ""
    if q.figure:
        (folder / f"{q.id}.png").write_bytes(figure(q.figure).png)
        picture = f"\n\n![{figure(q.figure).alt}]({folder / q.id}.png)"
    lines = [f"Title: {q.id}: {q.title}", f"Points: {q.points}", _part(f"{number}.", q.text + picture)]
    if q.kind == "numerical":
        lines += [_part("...", q.why), f"=   {q.answer} +- {q.tolerance}"]
    elif q.kind == "design":
        lines.append("____")  # the key stays with who grades: students would read it as feedback
    else:
        for letter, option in zip("abcdefgh", q.option, strict=False):
            lines += [_part(f"{'*' if option.right else ''}{letter})", option.text), _part("...", option.why)]
    return "\n".join(lines) + "\n"


def _part(mark: str, text: str) -> str:
    first, *others = text.splitlines()
    indent = max(4, len(mark) + 1)
    return "\n".join([f"{mark:<{indent}}{first}", *(" " * indent + line if line else "" for line in others)])


# --- on paper ----------------------------------------------------------------------------------------------------


def paper(title: str, questions: list[Question], *, key: bool) -> str:
    """An exam as Markdown, or its key."""
    minutes, points = sum(q.minutes for q in questions), sum(q.points for q in questions)
    lines = [f"# {title}{', key' if key else ''}", f"{minutes} minutes, {points} points."]
    for number, q in enumerate(questions, 1):
        unit = "point" if q.points == 1 else "points"
        lines += [f"## {number}. {q.title} ({q.points} {unit})", q.text]
        if q.figure:
            lines.append(f"![{figure(q.figure).alt}](figures/{q.figure.replace('/', '-')}.png)")
        letters = list(zip("abcdefgh", q.option, strict=False))
        lines += ["\n".join(f"* **{letter}.** {option.text}" for letter, option in letters)] if letters else []
        if key:
            lines += _key(q, letters)
    return "\n\n".join(lines) + "\n"


def _key(q: Question, letters: list[tuple[str, Option]]) -> list[str]:
    right = [letter for letter, option in letters if option.right]
    answer = right[0] if right else f"{q.answer} (± {q.tolerance}). {q.why}" if q.kind == "numerical" else q.key
    reasons = [f"* **{letter}.** {option.why}" for letter, option in letters]
    reasons += [f"* {slip.value}: {slip.why}" for slip in q.slips]
    return [f"**Answer:** {answer}", *(["\n".join(reasons)] if reasons else []), *([q.slip] if q.slip else [])]
