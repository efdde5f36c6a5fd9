"""`python -m teach [OUT]` builds what teachers hand out; `python -m teach --write` writes the generated pages anew."""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer

from refusallab.errors import RefusalLabError
from teach import HERE, decks, questions
from teach.figures import figure
from teach.guide import guide
from teach.rendering import chromium


def pages() -> dict[Path, str | bytes]:
    """The files in teach/ that are made from the labs and the question bank."""
    made: dict[Path, str | bytes] = {HERE / "ta_guide.md": guide()}
    for number, (title, asked) in enumerate(questions.exams().items(), 1):
        for key in (False, True):
            name = f"exam{number}{'_key' if key else ''}.md"
            made[HERE / "exams" / name] = questions.paper(title, asked, key=key)
        for q in asked:
            if q.figure:
                made[HERE / "exams" / "figures" / f"{q.figure.replace('/', '-')}.png"] = figure(q.figure).png
    return made


def build(out: Path) -> None:
    """Slides as HTML and PDF, the bank and the exams for Moodle and as QTI."""
    decks.build(out / "slides")
    sets = {f"Lab {lab}": list(asked) for lab, asked in groupby(questions.bank().values(), key=lambda q: q.lab)}
    sets |= questions.exams()
    (out / "moodle.xml").write_text(questions.moodle(sets), encoding="utf-8")
    (out / "qti").mkdir(exist_ok=True)
    for title, asked in sets.items():
        name = title.partition(".")[0].lower().replace(" ", "_")
        questions.save_qti(title, asked, out / "qti" / f"{name}.zip")
    try:
        with chromium() as browser:
            decks.print_pdf(out / "slides", browser)
    except RefusalLabError as error:  # everything else is there
        print(error, file=sys.stderr)


def main(
    out: Annotated[Path, typer.Argument(help="The folder to build in.")] = Path("build/teach"),
    write: Annotated[bool, typer.Option("--write", help="Only write the generated pages in teach/ anew.")] = False,
) -> None:
    """Build the instructor's pack."""
    try:
        if write:
            for path, content in pages().items():
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content if isinstance(content, bytes) else content.encode())
        else:
            build(out)
    except RefusalLabError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
