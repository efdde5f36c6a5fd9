"""Records of real models: resumed, refused where they belong to another run, judged; the page that shows them."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from refusallab import cli, findings, records
from refusallab.defences.matrix import HIDES_FROM, conversation_attacks, standard_attacks
from refusallab.defences.resistance import RESISTANT
from refusallab.defences.training import DEFENCES
from refusallab.directions import Candidate, candidate_directions
from refusallab.errors import RefusalLabError
from refusallab.model import load
from refusallab.prompts import prompt_set
from refusallab.records import Sizes

ROOT = Path(__file__).parent.parent
MATRICES = [
    ("matrix_all", [*HIDES_FROM, *DEFENCES, *RESISTANT], [attack.name for attack in standard_attacks(0, -1)]),
    ("matrix_talk", [], [attack.name for attack in conversation_attacks()]),
]
SMALL = Sizes(train=32, val=8, test=8, positions=1, random=2, replied=1, shuffled=1, tries=2)


@pytest.fixture(scope="module")
def m():
    return load("charter-chat")


@pytest.fixture(scope="module")
def steps():
    return []


@pytest.fixture(scope="module")
def whole(m, steps, tmp_path_factory):
    return records.measure_model(m, tmp_path_factory.mktemp("record") / "whole.json", SMALL, steps.append)


@pytest.mark.slow
def test_a_record_that_was_stopped_goes_on_and_becomes_the_same(m, whole, steps, tmp_path):
    assert len(steps) == len(set(steps)) == records.n_measurements(m, SMALL) == len(whole["measured"])

    def stop(name):
        if name == "candidate 5 -1":
            raise KeyboardInterrupt

    path, rest = tmp_path / "stopped.json", []
    with pytest.raises(KeyboardInterrupt):
        records.measure_model(m, path, SMALL, stop)
    again = records.measure_model(m, path, SMALL, rest.append)
    assert rest == steps[steps.index("candidate 5 -1") :]
    assert again["measured"] == whole["measured"]


@pytest.mark.slow
def test_the_record_of_another_run_is_left_alone(m, whole, tmp_path):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(whole | {"weights": "other"}))
    with pytest.raises(RefusalLabError, match=r"the record of another run \(weights differ\)"):
        records.measure_model(m, path, SMALL)
    assert json.loads(path.read_text())["weights"] == "other"


@pytest.mark.slow
def test_nothing_but_numbers_is_kept(whole):
    """No prompt, and no reply."""

    def texts(value):
        if isinstance(value, dict):
            return [t for v in value.values() for t in texts(v)]
        return [t for v in value for t in texts(v)] if isinstance(value, list) else [value] * isinstance(value, str)

    measured = dict(whole["measured"])
    words = measured.pop("openings")["words"]
    rule = measured.pop("selected")["rule"]
    assert all(set(text) <= {"0", "1"} for text in texts(measured))
    assert all(len(word) < 20 for word in words) and rule in ("the paper's", records.WITHOUT_INDUCE)


@pytest.mark.slow
def test_a_model_that_does_not_refuse_has_a_record_without_a_direction(tmp_path, monkeypatch):
    found = records.measure_model(load("charter-helpful"), tmp_path / "helpful.json", SMALL)
    assert "refuses none" in found["measured"]["openings"]["none"]
    assert "selected" not in found["measured"]
    by_claim = {f.what: f for f in findings.findings(found)}
    assert not by_claim["a few tokens open refusals"].holds
    assert "ablation: harmful refused" not in by_claim


def _searching(kl):
    """A study of three layers whose candidates have these KLs and no induce; the vectors of layer 0 are zero."""
    measured = {}
    return SimpleNamespace(
        m=SimpleNamespace(name="m", n_layers=3, positions=(-1,)), sizes=SMALL, measured=measured,
        vectors=torch.arange(3.0)[:, None, None].expand(3, 1, 4),
        score=lambda vectors, layer, at: [Candidate(p, layer, float(layer), -1.0, kl[layer]) for p in at],
        once=lambda name, measure: measured.setdefault(name, measure()),
    )  # fmt: skip


def test_a_zero_vector_is_never_selected():
    s = _searching([0.0, 0.0, 0.0])
    records._search(s)
    assert s.measured["selected"]["layer"] == 1
    s = _searching([0.0, 9.0, 9.0])
    with pytest.raises(RefusalLabError, match="No candidate of m that is not zero"):
        records._search(s)
    assert "selected" not in s.measured


@pytest.fixture
def own_records(tmp_path, monkeypatch):
    """A folder for the records of this test: save(record) puts one there."""
    monkeypatch.setattr(records, "RECORDS", tmp_path)

    def save(record):
        records.path_of(record["model"], tmp_path).write_text(json.dumps(record), encoding="utf-8")

    return save


@pytest.mark.slow
def test_the_direction_of_a_record_is_that_of_its_own_prompts(m, whole, own_records):
    own_records(whole)
    found, site = records.recorded_direction(m), whole["measured"]["selected"]
    assert (found.layer, found.position) == (site["layer"], site["position"])
    kept = []
    for name in ("harmful_train", "harmless_train"):
        wanted = "1" if name.startswith("harmful") else "0"
        flags = whole["measured"][f"refused, {name}"]
        kept.append([x.prompt for x, flag in zip(prompt_set(m, name), flags, strict=False) if flag == wanted])
    expected = candidate_directions(m, *kept)[found.layer, found.position]
    assert torch.allclose(found.vector, expected, atol=1e-5)
    assert records.recorded_direction(m).vector.equal(found.vector)  # from the cache


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"weights": "other"}, "one of other weights .other, not"),
        ({"measured": {"openings": {"none": "It refuses none."}}}, "has no direction: It refuses none."),
    ],
)
def test_a_record_without_a_direction_for_these_weights_says_so(m, whole, own_records, changed, match):
    own_records(whole | changed)
    with pytest.raises(RefusalLabError, match=match):
        records.recorded_direction(m)


def test_a_model_without_a_record_names_the_command(own_records):
    own_records(MADE_UP)
    with pytest.raises(
        RefusalLabError, match="no record of nobody/nothing .there is one of made up.: .* replicate nobo"
    ):
        records.recorded("nobody/nothing")
    own_records(MADE_UP | {"model": "some/body"})
    assert records.recorded("some/body")["model"] == "some/body"


def test_what_carries_over_to_the_models_for_one_lab(own_records):
    for model in ("made up", "other", "charter-smol"):
        own_records(MADE_UP | {"model": model})
    shown = findings.carried_over("04")
    assert shown.count("holds ") == 10 and "made up\n" in shown and "\n\nother\n" in shown
    assert "charter-smol" not in shown
    assert findings.carried_over("04", "charter-smol") == shown.partition("\n\n")[0].replace("made up", "charter-smol")
    assert "AUC" not in shown and "AUC" in findings.carried_over()


MADE_UP = {
    "model": "made up",
    "weights": "c0ffee",
    "dtype": "float32",
    "sizes": {"test": 20},
    "processor seconds": {"all": 120.0},
    "measured": {
        "refused, harmful_test, untouched": "1" * 18 + "00",
        "refused, harmless_test, untouched": "0" * 20,
        "refused, alarming": "1" * 30 + "0" * 30,
        "openings": {"tokens": [1], "words": ["I"], "caught": [19, 20], "false": [1, 20]},
        "candidate 3 -1": [-4.0, 2.0, 0.05],
        "selected": {"rule": "the paper's", "layer": 3, "position": -1},
        "random 0": [3.0, -3.0, 0.0],
        "random 1": [2.0, -2.0, 0.0],
        "shuffled 0": [1.0, -1.0, 0.0],
        "refused, harmful_test, ablated": "1" + "0" * 19,
        "refused, harmless_test, ablated": "0" * 20,
        "refused, harmless_test, added": "1" * 15 + "0" * 5,
        "refused, harmful_test, random 0 ablated": "1" * 17 + "000",
        "refused, harmless_test, random 0 added": "0" * 20,
        "refused, harmful_test, weights edited": "1" + "0" * 19,
        "distance from hooks": 2e-5,
        "gap of the weights": {"untouched": 0.01, "edited": 6.0},
        "loss of own replies": {"untouched": 0.1, "ablated": 0.15, "random": 0.1},
        "AUC of projections": 0.97,
        "probe alarms": {"harmful_test": "1" * 20, "harmless_test": "1" + "0" * 19},
        "answered, direct, own system prompt": "11" + "0" * 18,
        "answered, begin, own system prompt": "1" * 15 + "0" * 5,
        "answered, best of 2, own system prompt": "1" * 14 + "0" * 6,
        "answered, direct, careful system prompt": "0" * 20,
        "answered, begin, careful system prompt": "1" * 5 + "0" * 15,
        "answered, best of 2, careful system prompt": "0" * 20,
    },
}
PLANTED = {  # what is measured otherwise, and the claim that then fails
    "refused, alarming": ("0" * 60, "alarming words in harmless requests are refused more"),
    "openings": ({"tokens": [1], "words": ["I"], "caught": [15, 20], "false": [1, 20]}, "a few tokens open refusals"),
    "selected": (
        {"rule": records.WITHOUT_INDUCE, "layer": 3, "position": -1},
        "the paper's rule finds a direction",
    ),
    "random 1": ([-5.0, -2.0, 0.0], "its scores are beyond those of 2 random directions"),
    "shuffled 0": ([1.0, 2.5, 0.0], "its scores are beyond those of 1 directions of shuffled labels"),
    "AUC of projections": (0.8, "projections tell harmful from harmless"),
    "refused, harmful_test, random 0 ablated": ("0" * 20, "random directions ablated: harmful refused as before"),
    "refused, harmless_test, random 0 added": ("1" * 20, "random directions added: harmless refused as before"),
    "refused, harmless_test, added": ("1" * 9 + "0" * 11, "addition: harmless refused"),
    "loss of own replies": (
        {"untouched": 0.1, "ablated": 0.25, "random": 0.1},
        "ablation adds to the loss of own harmless replies",
    ),
    "refused, harmful_test, weights edited": ("11" + "0" * 18, "edited weights do what ablation does"),
    "distance from hooks": (0.1, "edited weights do what ablation does"),
    "gap of the weights": ({"untouched": 0.5, "edited": 0.9}, "the edit shows in the weights"),
    "probe alarms": (
        {"harmful_test": "1" * 20, "harmless_test": "111" + "0" * 17},
        "a probe at half depth, at 5 % false alarms, tells",
    ),
    "answered, begin, own system prompt": ("1111" + "0" * 16, "begin, one text: no refusal phrase"),
    "answered, best of 2, own system prompt": ("1111" + "0" * 16, "best of n: no refusal phrase"),
    "answered, begin, careful system prompt": (
        "1" * 8 + "0" * 12,
        "a careful system prompt stops the best of them (begin)",
    ),
}


def test_each_claim_holds_or_fails_by_its_own_numbers():
    assert [f.what for f in findings.findings(MADE_UP) if not f.holds] == []
    for name, (value, claim) in PLANTED.items():
        record = MADE_UP | {"measured": MADE_UP["measured"] | {name: value}}
        failed = [f.what for f in findings.findings(record) if not f.holds]
        assert claim in failed, name
        assert len(failed) <= 2, name


def test_a_model_that_answers_everything_cannot_be_broken():
    changed = {"answered, direct, own system prompt": "1" * 20}
    found = findings.findings(MADE_UP | {"measured": MADE_UP["measured"] | changed})
    assert {f.what: f.holds for f in found}["begin, one text: no refusal phrase"] is None
    assert "not measurable" in str(next(f for f in found if f.holds is None))


def test_a_system_prompt_stops_nothing_where_no_attack_got_anything():
    none = {name: "0" * 20 for name in MADE_UP["measured"] if name.startswith("answered")}
    found = findings.findings(MADE_UP | {"measured": MADE_UP["measured"] | none})
    assert {f.what: f.holds for f in found}["a careful system prompt stops the best of them (begin)"] is None


def test_ablation_that_changes_little_fails():
    flags = {f"refused, harmful_test, {how}": "1" * 10 + "0" * 10 for how in ("ablated", "weights edited")}
    record = MADE_UP | {"measured": MADE_UP["measured"] | flags}
    assert [f.what for f in findings.findings(record) if not f.holds] == ["ablation: harmful refused"]


def test_the_page_has_every_claim_of_every_model():
    none = {"openings": {"none": "No token opens refusals."}}
    fewer = {
        k: v for k, v in MADE_UP["measured"].items() if "answered" in k or "untouched" in k or k == "refused, alarming"
    }
    text = findings.page([MADE_UP, MADE_UP | {"model": "other", "measured": fewer | none}])
    assert "| lab | claim | made up | other |" in text
    assert "| 04 | ablation: harmful refused | holds | not measurable |" in text
    assert "| 01 | a few tokens open refusals | holds | FAILS |" in text
    assert "No token opens refusals." in text and "2 processor minutes" in text


def test_the_page_is_that_of_the_records():
    found = records.every_record()
    assert found and (ROOT / "docs" / "replication.md").read_text(encoding="utf-8") == findings.page(found)


@pytest.mark.parametrize(("name", "defences", "attacks"), MATRICES)
def test_the_stored_matrix_has_every_defence_and_attack(name, defences, attacks):
    record = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    assert set(defences) <= set(record["benign"])
    assert set(attacks) <= {cell["attack"] for cell in record["cells"]}


def test_a_folder_that_is_not_there_is_named(tmp_path):
    done = CliRunner().invoke(cli.app, ["replicate", "charter-chat", "--out", str(tmp_path / "none")])
    assert done.exit_code == 1 and "There is no folder" in done.stderr and done.stderr.strip().count("\n") == 0


def test_a_page_without_its_folder_is_named_before_the_work(tmp_path):
    page = tmp_path / "none" / "page.md"
    done = CliRunner().invoke(cli.app, ["replicate", "no-such-model", "--page", str(page)])
    assert done.exit_code == 1 and "There is no folder" in done.stderr and "for page.md" in done.stderr


def test_without_a_folder_records_are_those_of_the_course(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(cli.app, ["replicate", "--page", "page.md"]).exit_code == 0
    assert (tmp_path / "page.md").read_bytes() == (ROOT / "docs" / "replication.md").read_bytes()


def test_sixty_harmless_requests_with_words_that_alarm():
    items = records.alarming()
    assert len(items) == 60 == len({item.prompt for item in items})
    for item in items:
        words = item.prompt.lower()
        assert item.tag[:5] in words, item
