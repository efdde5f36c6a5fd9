"""Finding submissions in a folder: which notebook is whose, and for which lab.

Whose: folders that an instructor puts around submissions are taken off; then the first part of the path decides, which
is the one that the platform wrote. What comes below or after it was chosen by the student and decides nothing.
Which lab: the functions that a notebook defines decide, then its metadata and headings, and names only after these.
Every file that is found ends in exactly one list of `FoundFiles`, so that the sum can be checked.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from grader.files import LABS, File, Level, contents, read_folder, shown
from refusallab.errors import RefusalLabError
from refusallab.sandbox.plain import storable

TITLES = (  # as in the names of the notebooks
    "meet the model",
    "measuring refusal",
    "the refusal direction",
    "seeing refusal",
    "cause not correlation",
    "weight orthogonalization",
    "prompt attacks",
    "why attacks work",
    "defences at run time",
    "defences by training",
    "capstone",
    "refusal that thinks",
    "inside causally",
    "conversations and watchers",
    "weights that resist",
)

# What platforms write before a student's own file name, or as a folder's name
PLATFORMS = {
    "moodle": re.compile(r"(?P<name>.*?)_(?P<account>\d+)_assignsubmission_[a-z]+(?:_(?P<file>.*))?", flags=re.S),
    "canvas": re.compile(
        r"(?:anon_(?P<anonymous>[A-Za-z0-9]+)(?:_LATE)?(?:_\d+)??_\d+"
        r"|(?P<name>[^_]+|.+?(?=(?:_LATE)?_\d{3,}_\d{3,}_))(?:_LATE)?_(?P<account>\d+)_\d+)_(?P<file>.+)",
        flags=re.S,
    ),
    "blackboard": re.compile(
        r"(?P<hint>.+?)_(?P<account>[^_]+)_attempt_(?P<time>\d{4}(?:-\d\d){5})(?:[_.](?P<file>.*))?", flags=re.S
    ),
}
_TITLE = "|".join(title.replace(" ", "[-_]") for title in TITLES)
GITHUB = re.compile(
    rf"(?P<hint>(?:[\w.]+-)*?(?P<sure>lab-?)?0?\d\d?(?P<title>-(?:{_TITLE}))?)-(?P<account>[a-z0-9][a-z0-9-]*)",
    flags=re.I,
)
SHAPES = ("students", "labs", *PLATFORMS, "github")

# What instructors call the folders around submissions
OF_NBGRADER = {"source", "release", "autograded", "feedback", "downloaded"}  # beside its submitted/
AROUND = re.compile(
    "submissions?|submitted|(down|up)loads?|downloaded|assignments?|homeworks?|hw|labs?|weeks?|sections?|tutorials?|late|"
    "all|class|students|collected|inbox|moodle|canvas|blackboard|nbgrader|github|classroom|gradebook|repos|abgaben?"
)
NUMBER = re.compile(r"(?:^|[_\- ])(?:lab[_\- ]?)?(\d\d)(?=[_\-. (]|$)|(?:^|[_\- ])lab[_\- ]?(\d)(?!\d)", flags=re.I)
COPY = re.compile(r"(?: ?\((\d+)\)|-(\d{1,2})| - copy| copy| ?\(copy\))$", flags=re.I)
ENDING = re.compile(r"(?:\.ipynb)?(?:\.(?:ipynb|json|txt|html?|zip|download))?$", flags=re.I)
SAME_TIME = 2  # seconds: the resolution of times in zip files
LONGEST_NAME = 150  # characters of a student's name; the records hold 200


def some(names: Sequence[str], shown: int = 5) -> str:
    """The first of many names, and how many more there are."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


@dataclass(frozen=True)
class Submission:
    """A notebook that somebody handed in."""

    student: str  # who it is, everywhere: the platform's account, behind the name where there is one
    lab: str
    path: Path  # a notebook, or a zip file that holds one
    account: str = ""  # number or login in Canvas, Moodle, Blackboard, GitHub
    older: tuple[str, ...] = ()  # files of the same student and lab that it replaces
    platform: str = ""  # whose account it is: a key of PLATFORMS, or github

    @property
    def file(self) -> str:
        """The name of the file, to be shown and stored."""
        return shown([self.path.name])

    def read(self) -> bytes:
        """The bytes of the notebook. RefusalLabError or OSError if it cannot be read."""
        return contents(self.path)


@dataclass(frozen=True)
class Conflict:
    """Files of which a person has to say whose they are, or which of them counts. None of them is graded."""

    student: str
    lab: str
    files: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        whose = f"{self.student}, lab {self.lab}" if self.lab else self.student
        return f"{whose}: {some(self.files)}: {self.reason}"


@dataclass
class FoundFiles:
    """What became of every file in a folder."""

    files: int = 0  # counted while the folder is read
    submissions: list[Submission] = field(default_factory=list)
    conflicts: list[Conflict] = field(default_factory=list)
    passed_over: list[tuple[str, str]] = field(default_factory=list)  # file, reason
    owners: dict[str, tuple[str, str]] = field(default_factory=dict)  # path of every notebook: its student and lab

    @property
    def older(self) -> int:
        return sum(len(s.older) for s in self.submissions)

    def reasons(self) -> dict[str, list[str]]:
        """The files that were passed over, by reason."""
        grouped = defaultdict(list)
        for name, reason in self.passed_over:
            grouped[reason].append(name)
        return dict(grouped)


@dataclass(frozen=True)
class _Part:
    """What a platform wrote into a name."""

    platform: str
    name: str
    account: str
    file: str  # the rest, which the student chose
    hint: str = ""  # may tell the lab
    time: str = ""  # of the attempt


@dataclass
class _Claim:
    """A notebook, and whose it is by its path."""

    file: File
    student: str
    part: _Part | None
    source: tuple[str, ...]  # what said whose it is: differs for different folders, names and accounts
    names: tuple[str, ...]  # that may tell the lab, the nearest first
    lab: str = ""
    known: bool = True  # whether anything in it tells the lab


def find_submissions(folder: Path, lab: str = "", shape: str = "") -> FoundFiles:
    """The newest submission of each student for each lab (or for one), and what became of every other file."""
    if not folder.is_dir():
        raise RefusalLabError(f"There is no folder {folder}: name the one with the submissions.")
    if lab and lab not in LABS:
        raise RefusalLabError(f"Lab {lab!r} has no exercises. Choose one of {', '.join(LABS)}.")
    if shape and shape not in SHAPES:
        raise RefusalLabError(f"There is no shape {shape!r}. Choose one of {', '.join(SHAPES)}.")
    read = read_folder(folder)
    found = FoundFiles(read.files, passed_over=read.passed_over)
    claims = []
    for claim in _Reader(shape, found).claims(read.root):
        claim.lab, claim.known = _lab(claim, lab)
        name = shown(claim.file.parts)
        if "," in claim.lab:
            found.passed_over.append((name, f"it may be lab {claim.lab}: pass --lab"))
        elif claim.lab not in LABS:
            found.passed_over.append((name, "no lab of the course (pass --lab if it is one)"))
        elif lab not in ("", claim.lab):
            found.passed_over.append((name, f"lab {claim.lab}, not {lab}"))
        else:
            found.owners[storable(str(claim.file.path))] = (claim.student, claim.lab)
            claims.append(claim)
    for group in _same_student_and_lab(claims):
        _settle(group, found)
    if found.conflicts and not found.submissions and all(not c.lab for c in found.conflicts):
        raise RefusalLabError(f"{found.conflicts[0].student}: {found.conflicts[0].reason}.")
    found.submissions.sort(key=lambda s: (s.student, s.lab))
    return found


def _lab(claim: _Claim, lab: str) -> tuple[str, bool]:
    """The lab of a claim (several, with commas, if it is open), and whether anything in it said so."""
    labs = claim.file.labs
    if len(labs) == 1:
        return labs[0], True
    named = [number for name in claim.names if (number := _number(name)) and number in (labs or LABS)]
    if named:
        return named[0], bool(labs) or claim.file.damaged
    if lab and lab in (labs or LABS):
        return lab, bool(labs)
    return ", ".join(labs), True


def _numbers(name: str) -> list[re.Match[str]]:
    return [match for match in NUMBER.finditer(name) if (match[1] or f"0{match[2]}") in LABS]


def _number(name: str) -> str:
    """The lab that a name tells."""
    return next((match[1] or f"0{match[2]}" for match in reversed(_numbers(name))), "")


# --- whose ---------------------------------------------------------------------------------------------------------


def _stem(name: str) -> str:
    """The name of a file without its endings and the marks of a copy: 02 of `Copy of 02 (1).ipynb.txt`."""
    match = COPY.search(stem := re.sub(r"^copy of ", "", ENDING.sub("", name), flags=re.I))
    return stem[: match.start()] if match and not match[2] else stem


def _person(stem: str, lab: str = "") -> str:
    """ada in ada_02 and ada_02_the_refusal_direction (the number of its lab, where that is known); else ""."""
    numbers = [match for match in _numbers(stem) if lab in ("", match[1] or f"0{match[2]}")]
    return stem[: numbers[-1].start()].strip("_- ") if numbers else stem


def _is_numbered(person: str, lab: str, other: str) -> bool:
    """Whether another file shows that numbers stand for people: student_17 beside student_02, both of lab 02."""
    match = re.fullmatch(rf"{re.escape(person)}[_\- ]?(\d+)", other)
    return bool(match) and match[1].zfill(2) != lab


def _part(name: str) -> _Part | None:
    """What a platform wrote at the beginning of a name: the shortest, as a student may have added more."""
    matches = [(kind, match) for kind, pattern in PLATFORMS.items() if (match := pattern.fullmatch(name))]
    if not matches:
        return None
    kind, match = max(matches, key=lambda pair: len(pair[1]["file"] or ""))
    said = match.groupdict()
    account = said.get("account") or said.get("anonymous") or ""
    name = said.get("name") or ("anon" if said.get("anonymous") else "")
    return _Part(kind, name, account, said["file"] or "", said.get("hint") or "", said.get("time") or "")


def _around(name: str) -> bool:
    """Whether a folder's name is one that instructors give to folders around submissions: submissions (1), Lab 02."""
    rest, titled = _without_title(name)
    words = re.findall(r"[^\W\d_]+|\d+", rest)
    ordinary = [bool(AROUND.fullmatch(word)) for word in words]
    if not any(ordinary):
        return bool(re.fullmatch(rf"{'|'.join(LABS)}|20\d\d", " ".join(words))) or (titled and not words)
    return all(known or word.isdigit() for known, word in zip(ordinary, words, strict=True))


def _maybe_around(name: str) -> bool:
    rest, titled = _without_title(name)
    return not GITHUB.fullmatch(name) and (titled or any(map(AROUND.fullmatch, re.findall(r"[^\W\d_]+", rest))))


def _without_title(name: str) -> tuple[str, bool]:
    words = " ".join(re.findall(r"[^\W_]+", name.lower()))
    rest = re.sub(rf"\b(?:{'|'.join(TITLES)})\b", "", words)
    return rest, rest != words


def _people(level: Level) -> tuple[int, int]:
    """How many people a folder seems to hold, by its folders and by its files. What a platform wrote counts as many."""
    if any(_part(name) for name in (*level.levels, *(file.parts[-1] for file in level.files))):
        return 2, 2
    folders, named, inside = set(), [0], [level]
    for here in inside:
        inside += [below for name, below in here.levels.items() if _around(name)]
        folders |= {name for name, below in here.levels.items() if not _around(name) and any(below.all_files())}
        by_lab = defaultdict(set)
        for file in here.files:
            stem = _stem(file.parts[-1])
            lab = file.labs[0] if len(file.labs) == 1 else _number(stem)
            by_lab[lab].add(_person(stem, lab))
        named += [len(names - {""}) for names in by_lab.values()]
    return len(folders), max(named)


class _Reader:
    """Goes down a tree of folders to where the students are."""

    def __init__(self, shape: str, found: FoundFiles):
        self.shape = shape
        self.found = found
        self._misfit = f"not where shape {shape} has its submissions"

    def claims(self, level: Level, above: tuple[str, ...] = ()) -> Iterator[_Claim]:
        """The notebooks below, with their students. `above` are the folders around, from the top."""
        down, students = self._sort(level, above)
        for name in down:
            yield from self.claims(level.levels[name], (*above, name))
        named = [name for name in students if not _around(name)]
        accounts = [match for name in named if (match := GITHUB.fullmatch(name))]
        github = self.shape == "github" or (
            not self.shape
            and len(accounts) == len(named)
            and all(match["sure"] or match["title"] for match in accounts)
        )
        for name, below in level.levels.items():
            if name in down:
                continue
            part = self._part(name)
            if github and name in students and (match := GITHUB.fullmatch(name)):
                part = _Part("github", "", match["account"], "", match["hint"])
            if part or name in students:
                student = _student(part) if part else _label(name)
                for file in below.all_files():
                    inner = file.parts[len(above) + 1 : -1]
                    hints = (*reversed(inner), part.hint if part else "", *reversed(above))
                    yield _Claim(file, student, part, (*above, name, *inner), (*_names(file), *hints))
        for file in level.files:
            yield from self._of_name(file, above, level)

    def _sort(self, level: Level, above: tuple[str, ...]) -> tuple[list[str], list[str]]:
        """Which folders only hold submissions, and which are students'. All others are passed over."""
        rest = [name for name in level.levels if not self._part(name)]
        if self.shape == "students":
            return [], rest
        if self.shape == "labs":
            return ([], rest) if above else (rest, [])
        around = [name for name in rest if _around(name)]
        people = [name for name in rest if name not in around]
        if self.shape:
            fit = [name for name in people if self.shape == "github" and GITHUB.fullmatch(name)]
            if not fit and len(rest) == len(level.levels) and not any(self._part(f.parts[-1]) for f in level.files):
                return rest, []
            self._pass_over(level, [name for name in people if name not in fit], self._misfit)
            return around, fit
        if "submitted" in around and set(people) <= OF_NBGRADER:
            self._pass_over(level, people, "nbgrader's own, not what was submitted")
            return around, []
        if not any(any(level.levels[name].all_files()) for name in people):
            return self._labs_or_numbers(level, above, around)
        least = 1 if len(people) == 1 and _maybe_around(people[0]) else 2
        if all(max(_people(level.levels[name])) >= least for name in people):
            down = [name for name in people if _is_around(name, level.levels[name])]
            self._unclear(level, above, [name for name in people if name not in down])
            return around + down, []
        held = {name: _people(level.levels[name]) for name in around}
        unclear = [name for name, (folders, files) in held.items() if folders > 0 or files > 1]
        self._unclear(level, above, unclear)
        return [], [name for name in rest if name not in unclear]

    def _labs_or_numbers(self, level: Level, above: tuple[str, ...], around: list[str]) -> tuple[list[str], list[str]]:
        """Folders 01, 02 and so on with one lab in all of them may be those of students who have numbers."""
        numbers = [name for name in around if name in LABS]
        held = [_people(level.levels[name]) for name in numbers]
        labs = {tuple(file.labs) for name in numbers for file in level.levels[name].all_files() if file.labs}
        if len(numbers) < 2 or len(labs) != 1 or any(max(people) > 1 for people in held):
            return around, []
        others = [name for name in around if name not in numbers]
        if any(any(people) for people in held):
            self._unclear(level, above, numbers)
            return others, []
        return others, numbers

    def _part(self, name: str) -> _Part | None:
        part = _part(name)
        return part if part and self.shape in ("", "labs", part.platform) else None

    def _of_name(self, file: File, above: tuple[str, ...], level: Level) -> Iterator[_Claim]:
        """The claim of a file that is in no student's folder."""
        name = file.parts[-1]
        if part := self._part(name):
            own = (*above, part.platform, part.name, part.account, part.hint)
            hints = (ENDING.sub("", part.file), file.inner, part.hint, *reversed(above))
            yield _Claim(file, _student(part), part, own, hints)
        elif file.inner and (_around(_stem(name)) or any(map(_part, file.inner.split("/")))):
            self.found.passed_over.append((shown(file.parts), "a zip that may hold what others submitted: unpack it"))
        elif self.shape in PLATFORMS or self.shape == "github" or (self.shape == "labs" and not above):
            self.found.passed_over.append((shown(file.parts), self._misfit))
        else:
            stem = _stem(name)
            lab = file.labs[0] if len(file.labs) == 1 else _number(stem)
            person = _person(stem, lab)
            if any(_is_numbered(person, lab, _stem(f.parts[-1])) for f in level.files if f.labs == file.labs):
                person = stem
            yield _Claim(file, _label(person or stem), None, (*above, name), (*_names(file), *reversed(above)))

    def _pass_over(self, level: Level, names: Sequence[str], reason: str) -> None:
        files = [file for name in names for file in level.levels[name].all_files()]
        self.found.passed_over += [(shown(file.parts), reason) for file in files]

    def _unclear(self, level: Level, above: tuple[str, ...], names: Sequence[str]) -> None:
        for name in names:
            files = tuple(shown(file.parts) for file in level.levels[name].all_files())
            if files:
                self.found.conflicts.append(
                    Conflict(
                        shown((*above, name)),
                        "",
                        files,
                        "it is not clear whether this folder is a student's or only holds submissions. Pass "
                        "--shape students (or moodle, canvas, blackboard, github) with the folder that holds them, "
                        "or --shape labs with one that holds a folder for each lab",
                    )
                )


def _is_around(name: str, level: Level) -> bool:
    """Whether a folder that holds several people has a name like CS101 Lab 02, or COURSE-Task-4711 with nothing in it
    but what a platform wrote."""
    parts = [_part(name) for name in (*level.levels, *(file.parts[-1] for file in level.files))]
    several = all(parts) and len({part.account for part in parts if part}) > 1
    return (several and bool(re.search(r"\d{3}", name))) or (_maybe_around(name) and max(_people(level)) > 1)


def _names(file: File) -> tuple[str, ...]:
    return ENDING.sub("", file.parts[-1]), ENDING.sub("", file.inner)


def _student(part: _Part) -> str:
    return _label(f"{part.name}-{part.account}" if part.name else part.account)


def _label(name: str) -> str:
    """A name as it is kept: one form of Unicode, single spaces, no control characters, not too long."""
    text = storable(" ".join(unicodedata.normalize("NFC", name).split())) or repr(name)
    mark = hashlib.sha256(text.encode()).hexdigest()[:8]
    return text if len(text) <= LONGEST_NAME else f"{text[:LONGEST_NAME]}-{mark}"


def _fold(name: str) -> str:
    """The same for names that people or file systems take for one: capitals, spaces, invisible characters."""
    visible = "".join(c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf")
    return " ".join(unicodedata.normalize("NFKC", visible.casefold()).split())


# --- which of several ----------------------------------------------------------------------------------------------


def _same_student_and_lab(claims: Sequence[_Claim]) -> list[list[_Claim]]:
    """Claims in groups that fall on one student and lab, by name or by account."""
    groups, names = defaultdict(list), {}
    for claim in claims:
        name = _fold(claim.student)
        if claim.part:
            account = (claim.part.platform, claim.part.account.casefold(), claim.lab)
            name = names.setdefault(account, name)
        groups[name, claim.lab].append(claim)
    return list(groups.values())


def _settle(group: Sequence[_Claim], found: FoundFiles) -> None:
    """Let the newest of several versions count. Claims from different folders, names or accounts are a conflict."""
    known = [claim for claim in group if claim.known] or group
    for claim in group:
        if claim not in known:
            reason = f"it holds nothing of lab {claim.lab}, but other files of this student do"
            found.passed_over.append((shown(claim.file.parts), reason))
    newest, sure = _newest(known)
    alike = len({claim.source for claim in known}) == 1
    if sure and alike:
        older = tuple(shown(claim.file.parts[-1:]) for claim in known if claim is not newest)
        account, platform = (newest.part.account, newest.part.platform) if newest.part else ("", "")
        found.submissions.append(Submission(newest.student, newest.lab, newest.file.path, account, older, platform))
        return
    reason = "equally old: leave only the one that counts"
    if not alike:
        reason = (
            "from different folders, names or accounts: leave only the one that counts, "
            "or pass --shape if these are different people"
        )
    files = tuple(shown(claim.file.parts) for claim in known)
    found.conflicts.append(Conflict(newest.student, newest.lab, files, reason))


def _newest(versions: Sequence[_Claim]) -> tuple[_Claim, bool]:
    """The newest version, and whether that is certain: by the platform's time, the file's, the number of a copy."""

    def age(claim: _Claim) -> tuple[str, float]:
        return claim.part.time if claim.part else "", claim.file.changed

    def copy(claim: _Claim) -> int:
        match = COPY.search(ENDING.sub("", claim.file.parts[-1]))
        return int(match[1] or match[2] or 1) if match else 0

    time, changed = max(map(age, versions))
    last = [c for c in versions if age(c)[0] == time and age(c)[1] >= changed - SAME_TIME]
    newest = max(last, key=copy)
    return newest, sum(copy(c) == copy(newest) for c in last) == 1
