"""The TA guide: what each exercise asks, what goes wrong, what to say; and the rubrics. Made from the labs."""

from __future__ import annotations

import nbformat

from refusallab.course.catalogue import HEADERS, QUESTIONS
from refusallab.course.exercises import find_exercise
from refusallab.course.notebook import exercise_number, role
from refusallab.course.plan import read_plan
from refusallab.course.release import solutions
from teach import HERE, ROOT


def guide() -> str:
    """The guide as Markdown: the text in guide_head.md, then a section for each lab."""
    lines = [(HERE / "guide_head.md").read_text(encoding="utf-8").rstrip()]
    for path in solutions(ROOT):
        cells = nbformat.read(path, 4).cells
        plan, lab = read_plan(cells[0].source), path.name[:2]
        lines += ["", f"## {plan.title}", "", f"{plan.minutes} minutes. Core path: {plan.core}"]
        for header in HEADERS:
            if header.lab == lab:
                lines += ["", *_exercise(header.number, header.number in plan.core_exercises)]
        for question in QUESTIONS:
            if question.lab == lab:
                rubric = next(c.source for c in cells if role(c) == "rubric" and exercise_number(c) == question.number)
                title = f"### {question.number}. {question.title} (written, {question.minutes} minutes)"
                lines += ["", title, "", rubric]
    return "\n".join(lines) + "\n"


def _exercise(number: str, core: bool) -> list[str]:
    found = find_exercise(number)
    where = ", core path" if core else ""
    lines = [
        f"### {number}. {found.title} ({found.minutes} minutes, difficulty {found.difficulty} of 3{where})",
        "",
        f"Students write `{found.function}`. First nudge: {found.hints[0]}",
        "",
        "| they may have | say |",
        "|---|---|",
    ]
    return lines + [f"| {_cell(m.name)} | {_cell(m.advice)} |" for m in found.mistakes]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
