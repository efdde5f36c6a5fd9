"""The files in a folder: the notebooks as a tree, and for everything else the reason why it is not one."""

from __future__ import annotations

import io
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from refusallab.course.catalogue import HEADERS, LABS
from refusallab.course.cells import LARGEST, Cell, read_cells
from refusallab.errors import RefusalLabError
from refusallab.sandbox.plain import storable

ZIP = b"PK\x03\x04"
MOST_IN_ZIP = 10_000  # files
ARCHIVES = (".rar", ".7z", ".tar", ".gz", ".tgz", ".bz2", ".xz")
DEEPEST = 50  # folders in folders


@dataclass
class File:
    """A notebook in the folder."""

    path: Path
    parts: tuple[str, ...]  # of its path, from the folder
    labs: list[str]  # that its contents may be; empty if they do not say
    damaged: bool  # then its contents say little
    inner: str  # name in a zip file
    changed: float  # seconds since 1970


@dataclass
class Level:
    """A folder in the tree."""

    levels: dict[str, Level] = field(default_factory=dict)
    files: list[File] = field(default_factory=list)

    def all_files(self) -> Iterator[File]:
        yield from self.files
        for level in self.levels.values():
            yield from level.all_files()


@dataclass
class Folder:
    """Everything in a folder. `files` are counted as they are met."""

    root: Level = field(default_factory=Level)
    files: int = 0
    passed_over: list[tuple[str, str]] = field(default_factory=list)  # file, reason


def read_folder(path: Path) -> Folder:
    """Read a folder. No file in it can stop this: what cannot be read is passed over."""
    folder = Folder()
    _read(path, (), folder.root, folder)
    return folder


def _read(path: Path, parts: tuple[str, ...], level: Level, folder: Folder, why: str = "") -> None:
    """Sort what is below `path` into the tree or the list of what is passed over (all of it, if there is a `why`)."""
    try:
        if len(parts) > DEEPEST:
            raise OSError(0, f"more than {DEEPEST} nested folders")
        with os.scandir(path) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError as error:
        folder.files += 1
        folder.passed_over.append((shown(parts), f"a folder that cannot be read: {error.strerror}"))
        return
    for entry in entries:
        name = (*parts, entry.name)
        reason = why or _system(entry.name)
        if entry.is_dir(follow_symlinks=False):
            below = Level() if reason else level.levels.setdefault(entry.name, Level())
            _read(Path(entry.path), name, below, folder, reason)
            continue
        folder.files += 1
        try:
            if entry.is_symlink():
                reason = "a link, not a file"
            elif not entry.is_file(follow_symlinks=False):
                reason = "not an ordinary file"
            if not reason:
                level.files.append(_notebook(Path(entry.path), name))
        except RefusalLabError as error:
            reason = str(error)
        except Exception as error:  # whatever is in a file, it affects that file only
            reason = f"cannot be read: {storable(str(error))[:100] or type(error).__name__}"
        if reason:
            folder.passed_over.append((shown(name), reason))


def _system(name: str) -> str:
    if name == "__MACOSX":
        return "left there by macOS"
    return "hidden" if name.startswith(".") and name.strip(".") else ""


def shown(parts: Sequence[str]) -> str:
    """The name of a file in the folder, as it is shown and kept: on one line."""
    return re.sub(r"[^\S ]", lambda found: found[0].encode("unicode_escape").decode(), storable("/".join(parts)))


def _notebook(path: Path, parts: tuple[str, ...]) -> File:
    """A file as a notebook. RefusalLabError, with the reason, if it is not one."""
    named = path.name.lower().endswith(".ipynb")
    with path.open("rb") as file:
        head = file.read(100)
    zipped = head.startswith(ZIP)
    if not named and not zipped and not head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
        archive = path.name.lower().endswith(ARCHIVES)
        kind = "an archive of another kind than zip: unpack it" if archive else "no notebook"
        raise RefusalLabError(kind if head.strip() else "empty")
    data, inner = _contents(path)
    cells, damaged = [], False
    try:
        cells = read_cells(data)
    except RefusalLabError:
        damaged = True
        if not named and not zipped and b'"cell_type"' not in data:
            raise RefusalLabError("no notebook") from None
    return File(path, parts, _labs_of(cells, data), damaged, inner, path.stat().st_mtime)


def contents(path: Path) -> bytes:
    """The bytes of a notebook, or of the only notebook in a zip file; cut where `read_cells` refuses the length."""
    return _contents(path)[0]


def _contents(path: Path) -> tuple[bytes, str]:
    """The bytes, and the name in the zip file."""
    with path.open("rb") as file:
        data = file.read(LARGEST + 1)
    if not data.startswith(ZIP):
        return data, ""
    if len(data) > LARGEST or data.count(b"PK\x01\x02") > MOST_IN_ZIP:
        raise RefusalLabError(f"a zip of more than {LARGEST >> 20} MB or {MOST_IN_ZIP} files: unpack it")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            member = _only_notebook(archive)
            with archive.open(member) as file:
                return file.read(LARGEST + 1), member.filename
    except RefusalLabError:
        raise
    except Exception as error:  # zipfile has many kinds of them
        raise RefusalLabError(f"a zip that cannot be read: {storable(str(error))[:100]}") from error


def _only_notebook(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    notebooks = [
        member
        for member in archive.infolist()
        if member.filename.lower().endswith(".ipynb") and not any(map(_system, member.filename.split("/")))
    ]
    if not notebooks:
        raise RefusalLabError("a zip without a notebook")
    if len(notebooks) > 1:
        raise RefusalLabError(f"a zip with {len(notebooks)} notebooks: unpack it")
    if notebooks[0].flag_bits & 1:
        raise RefusalLabError("a zip with a password")
    if notebooks[0].file_size > LARGEST:
        raise RefusalLabError(f"a zip with a notebook of more than {LARGEST >> 20} MB")
    return notebooks[0]


def _labs_of(cells: Sequence[Cell], data: bytes) -> list[str]:
    """The lab that a notebook's contents tell; more than one if they leave it open, none if they say nothing."""
    code = "\n".join(cell.source for cell in cells if cell.kind == "code") if cells else data.decode("utf-8", "replace")
    start = r"^(?:async +)?" if cells else r"(?:\b|\\n)"  # a damaged file is read as it stands
    defined = set(re.findall(rf"{start}def +(\w+)", code, flags=re.M))
    defined |= set(re.findall(r"^(\w+) *= *lambda\b", code, flags=re.M))
    functions = Counter(e.lab for e in HEADERS if e.function in defined)
    labs = _most(functions)
    if len(labs) == 1 and functions[labs[0]] > 1:
        return labs
    told = Counter(lab for cell in cells for lab in _told(cell))
    if len(labs) > 1:
        told = Counter({lab: told[lab] for lab in labs if lab in told})
    return _most(told) or labs


def _told(cell: Cell) -> list[str]:
    """The labs that a cell's metadata, a heading or a check name."""
    numbers = re.findall(r"^(\d+)\.", str(cell.tag.get("exercise") or cell.tag.get("number")))
    if cell.kind == "code":
        numbers += re.findall(r"\bcheck\(\s*[\"'](\d+)\.", cell.source)
    else:
        numbers += re.findall(r"^#+ *(?:Lab|Exercise|Question) +(\d+)", cell.source, flags=re.M)
    return [lab for n in numbers if (lab := f"{n:0>2}") in LABS]


def _most(counts: Counter[str]) -> list[str]:
    return sorted(lab for lab, n in counts.items() if n == max(counts.values()))
