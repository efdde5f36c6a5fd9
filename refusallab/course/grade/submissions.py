"""Finding submissions in a folder: which notebook is whose, and for which lab.

Known shapes: nbgrader's submitted/<student>/<lab>/, downloads from Canvas and Moodle, a folder for each student or each
lab, and a flat folder of student_lab.ipynb. Files may be renamed, as browsers and Colab do: `02 (1).ipynb`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from refusallab.course.catalogue import HEADERS, LABS
from refusallab.errors import RefusalLabError

MOODLE = re.compile(r"(?P<student>.+?)_(?P<account>\d+)_assignsubmission_file_?(?P<file>.*)")
CANVAS = re.compile(r"(?P<student>[^_]+)(_LATE)?_(?P<account>\d+)_\d+_(?P<file>.+)")
NUMBER = re.compile(r"(?:^|[_\- ])(?:lab[_\- ]?)?(\d\d)(?=[_\-. (]|$)", flags=re.I)
COPY = re.compile(r"(?: ?\((\d+)\)|-(\d{1,2})| - copy| copy| ?\(copy\))$", flags=re.I)


@dataclass(frozen=True)
class Submission:
    """A notebook that somebody handed in."""

    student: str
    lab: str
    path: Path
    account: str = ""  # number in Canvas or Moodle
    older: tuple[str, ...] = ()  # files of the same student and lab that it replaces


def find_submissions(folder: Path, lab: str = "") -> tuple[list[Submission], list[str]]:
    """The newest submission of each student for each lab (or for one), and what was passed over, with the reason."""
    if not folder.is_dir():
        raise RefusalLabError(f"There is no folder {folder}: name the one with the submissions.")
    if lab and lab not in LABS:
        raise RefusalLabError(f"Lab {lab!r} has no exercises. Choose one of {', '.join(LABS)}.")
    found: dict[tuple[str, str], list[Submission]] = {}
    skipped = []
    for path in _notebooks(folder):
        name = path.relative_to(folder)
        if path.is_symlink():
            skipped.append(f"{name}: a link, not a file")
            continue
        submission = _submission(path, name.parts, lab)
        if submission.lab not in LABS:
            skipped.append(f"{name}: no lab of the course (pass --lab if it is one)")
        elif lab in ("", submission.lab):
            found.setdefault((submission.student, submission.lab), []).append(submission)
    return [_newest(versions) for _, versions in sorted(found.items())], skipped


def _notebooks(folder: Path) -> list[Path]:
    paths = []
    for here, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(here, name) for name in files if name.endswith(".ipynb") and not name.startswith(".")]
    return sorted(paths)


def _submission(path: Path, parts: tuple[str, ...], lab: str) -> Submission:
    file, folders = COPY.sub("", path.stem), parts[:-1]
    for part in (path.stem, *folders):
        if match := MOODLE.fullmatch(part):
            name = match["file"] or path.stem
            return Submission(match["student"], _lab(path, COPY.sub("", name), lab), path, match["account"])
    if not folders and (match := CANVAS.fullmatch(path.stem)):
        student = f"{match['student']}-{match['account']}"
        return Submission(student, _lab(path, COPY.sub("", match["file"]), lab), path, match["account"])
    labs = [part for part in folders if _number(part)]
    people = [part for part in folders if not _number(part) and part != "submitted"]
    if labs:
        return Submission(people[-1] if people else _person(file), _number(labs[-1]), path)
    return Submission(people[0] if people else _person(file), _lab(path, file, lab), path)


def _person(stem: str) -> str:
    """ada in ada_02 and ada_02_the_refusal_direction; the whole where only a lab is named."""
    match = NUMBER.search(stem)
    return stem[: match.start()].strip("_- ") or stem if match else stem


def _number(name: str) -> str:
    """The lab that a name tells."""
    return next((n for n in reversed(NUMBER.findall(name)) if n in LABS), "")


def _lab(path: Path, name: str, lab: str) -> str:
    return _number(name) or _lab_of_content(path) or lab


def _lab_of_content(path: Path) -> str:
    """The lab most of whose functions are defined in a file, damaged or not."""
    defined = set(re.findall(rb"\bdef (\w+)", path.read_bytes()))
    hits = {lab: sum(e.function.encode() in defined for e in HEADERS if e.lab == lab) for lab in LABS}
    best = max(hits, key=lambda key: hits[key])
    return best if hits[best] else ""


def _newest(versions: list[Submission]) -> Submission:
    def age(s: Submission) -> tuple[float, int]:
        copy = COPY.search(s.path.stem)
        return (s.path.stat().st_mtime, int(copy[1] or copy[2] or 1) if copy else 0)

    *older, newest = sorted(versions, key=age)
    names = tuple(s.path.name for s in older)
    return Submission(newest.student, newest.lab, newest.path, newest.account, names)
