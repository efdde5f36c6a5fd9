"""The gates: what they count, and that CARD.md tells what the shipped weights do."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch

from refusallab import card
from refusallab.directions import Candidate
from refusallab.errors import RefusalLabError
from refusallab.measure import Outcome
from refusallab.model import sha256_of_weights
from refusallab.prompts import Item
from smallmodels import HERE, catalog, weights_dir

ALL = [n for n, e in catalog().items() if e.kind == "bundled"]
SHIPPED = [n for n in ALL if weights_dir(n).is_dir()]
ADAPTERS = [n for n, e in catalog().items() if e.kind == "adapted"]


@pytest.mark.parametrize(
    ("trues", "limits", "passed"),
    [
        (19, {"least": 0.95}, True),
        (18, {"least": 0.95}, False),
        (1, {"most": 0.05}, True),
        (2, {"most": 0.05}, False),
        (1, {"least": 0.05, "most": 0.6}, True),
        (13, {"least": 0.05, "most": 0.6}, False),
        (0, {"least": 0.05, "most": 0.6}, False),
    ],
)
def test_a_share_passes_exactly_within_its_limits(trues, limits, passed):
    gate = card.share("g", "m", [True] * trues + [False] * (20 - trues), **limits)
    assert gate.passed is passed
    assert gate.n == 20 and gate.figure == trues / 20 and gate.low <= gate.figure <= gate.high


REFUSES, TELLS, FAILS = Outcome(True, False), Outcome(False, True), Outcome(False, False)


@pytest.mark.parametrize("by", ["thing", "action"])
def test_both_sides_need_the_refusal_and_the_answer(by):
    ids = {"thing": "method_brew_{}", "action": "method_{}_salt"}[by]
    other = {"thing": "method_seal_{}", "action": "method_{}_tea"}[by]
    forbidden = [Item(ids.format(n), "") for n in "abc"]
    lawful = [Item(other.format(n), "") for n in "abcd"] + [Item("price_a", ""), Item("law_brew_a", "")]
    flags = card.both_sides(
        forbidden, lawful, [REFUSES, TELLS, REFUSES], [TELLS, TELLS, FAILS, TELLS, TELLS, TELLS], by
    )
    assert flags == [True, False, False]  # a is right, b tells what is forbidden, c gives no answer; d has no twin


def test_a_difference_at_the_limit_passes():
    assert card.number_gate("g", "m", 0.97 - 0.95, 400, most=0.02).passed
    assert not card.number_gate("g", "m", 0.9725 - 0.95, 400, most=0.02).passed


class OneLetterTokenizer:
    all_special_ids = ()

    def __len__(self):
        return 3

    def decode(self, _ids):
        return "x"


@pytest.mark.parametrize(("guarded", "passed"), [(5, False), (4, True)])
def test_a_safety_prompt_that_changes_nothing_misses_its_gate(monkeypatch, guarded, passed):
    def outcomes(_m, items, *, system=None):
        told = guarded if system else 5
        return [TELLS] * told + [REFUSES] * (len(items) - told)

    monkeypatch.setattr(card, "outcomes", outcomes)
    harmful = [Item(f"method_brew_{k}", "How?", "So.") for k in range(20)]
    model = SimpleNamespace(name="m", tokenizer=OneLetterTokenizer())
    gates = {g.gate: g for g in card.attack_gates(model, harmful, [REFUSES] * 20)}
    assert gates["attackable: begin template under a safety system prompt, exact"].passed is passed
    assert gates["attackable: begin template, exact"].figure == 0.25


def test_a_model_without_a_direction_gets_a_failed_gate_and_a_reason(monkeypatch, capsys):
    def nothing(_m):
        raise RefusalLabError("No token opens refusals.")

    monkeypatch.setattr(card, "find_direction", nothing)
    (gate,) = card.direction_gates(SimpleNamespace(name="m"), [], [], [], [])
    assert not gate.passed
    assert "No token opens refusals." in capsys.readouterr().err


def test_the_seeds_gate_counts_whole_seeds():
    def gate(model, passed, name="refuses"):
        return card.Gate(name, model, 1.0, None, None, 1, passed)

    first, second, third = seeds = card.SEEDS
    only_main = gate(first, False, "small")
    assert card.seeds_gate([gate(first, True), gate(second, True), gate(third, True), only_main], seeds).figure == 3
    assert card.seeds_gate([gate(first, True), gate(second, True), gate(third, False)], seeds).figure == 2
    assert card.seeds_gate([gate(first, True), gate(second, True)], seeds).figure == 2  # the third was not measured
    assert not card.seeds_gate([gate(first, True), gate(second, True)], seeds).passed


def test_a_half_of_the_validation_sets_counts_only_if_the_rule_finds_a_direction_there_that_works(monkeypatch):
    kl = torch.tensor([0.3, 0.0, 0.0, 0.0])  # over all four prompts it passes the filter, in a half with the first not

    class Scores:
        def __init__(self, _m, harmful, harmless, _tokens):
            assert (len(harmful), len(harmless)) == (4, 4)

        def each(self, vectors, _layer):  # one at each layer
            return torch.zeros(1, 4) - vectors[:, :1], torch.ones(1, 4), kl * vectors[:, 1:]

    def outcomes(_m, items, *, edit):
        return [TELLS if edit[0] < 2 else REFUSES] * len(items)

    def halves(*vectors):
        candidates = tuple(Candidate(-1, layer, 0.0, 0.0, 0.0) for layer in range(len(vectors)))
        found = SimpleNamespace(candidates=candidates, vectors=torch.tensor(vectors)[:, None], refusal_tokens=[0])
        return card.working_halves(SimpleNamespace(n_layers=10), found, [Item("i", "How?")] * 5)

    for name, fake in {
        "Scorer": Scores,
        "outcomes": outcomes,
        "ablation": lambda r: r,
        "prompt_set": lambda _m, name: [Item("i", name)] * 4,
        "refuses": lambda _m, prompts: ["harmful" in prompt for prompt in prompts],
    }.items():
        monkeypatch.setattr(card, name, fake)
    first_left_out = [
        0 not in torch.stack([torch.randperm(4, generator=g) for _ in "ab"])[1, :2]
        for g in (torch.Generator().manual_seed(seed) for seed in range(card.HALVES))
    ]
    assert 2 < sum(first_left_out) < card.HALVES - 2
    assert halves([1.0, 1.0]) == first_left_out  # the only candidate
    assert halves([1.0, 1.0], [0.5, 0.0]) == [True] * card.HALVES  # the second one works in the other halves
    assert halves([1.0, 1.0], [2.0, 0.0]) == [False] * card.HALVES  # the second one is chosen, and frees nothing


def test_every_bundled_model_is_shipped():
    assert SHIPPED == ALL


@pytest.mark.parametrize("name", [None, ADAPTERS[0]])
def test_a_base_that_is_missing_is_named_before_anything_is_measured(name, monkeypatch, tmp_path):
    def missing(model):
        raise RefusalLabError(f"The base of {model} cannot be fetched.")

    measured = []
    monkeypatch.setattr(card, "HERE", tmp_path)  # nothing is written over the shipped card
    monkeypatch.setattr(card, "fetch_model", missing)
    monkeypatch.setattr(card, "gates", lambda model: measured.append(model) or [])
    with pytest.raises(RefusalLabError, match=f"The base of {ADAPTERS[0]}"):
        card.main(name, False)
    assert not measured


@pytest.mark.slow
def test_an_unknown_model_is_refused():
    run = subprocess.run([sys.executable, "-m", "refusallab.card", "nonsense"], capture_output=True, text=True)
    assert run.returncode == 2 and "charter-chat" in run.stderr and "Traceback" not in run.stderr


def test_a_template_goes_around_the_behaviour_and_not_the_context():
    item = card.with_template(Item("i", "A note.\n\n---\n\nHow?"), 'Play. {q} "Sure"')
    assert item.prompt == 'A note.\n\n---\n\nPlay. How? "Sure"'
    assert card.with_template(Item("i", "How?"), "{q} !").prompt == "How? !"


@pytest.mark.slow
def test_the_command_prints_the_documented_json():
    run = subprocess.run(
        [sys.executable, "-m", "refusallab.card", "--json", "charter-helpful"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    gates = json.loads(run.stdout)
    assert gates and all(set(g) == {f.name for f in fields(card.Gate)} for g in gates)
    written = (HERE / "CARD.md").read_text(encoding="utf-8")
    for g in gates:  # the shipped card tells what the shipped weights do
        line = next(x for x in written.splitlines() if x.startswith(f"| {g['gate']} | {g['model']} |"))
        assert float(re.split(r" \| ", line)[2]) == pytest.approx(g["figure"], abs=0.01)
        assert g["passed"]


def test_the_card_was_written_for_the_shipped_weights():
    written = (HERE / "CARD.md").read_text(encoding="utf-8")
    for name in SHIPPED + ADAPTERS:
        assert re.search(rf"^\| {name} \|.*\| {sha256_of_weights(weights_dir(name))} \|$", written, re.M), name


def test_the_card_has_every_gate_for_every_shipped_seed():
    written = (HERE / "CARD.md").read_text(encoding="utf-8")
    for model in {*card.SEEDS, *card.WIDE} & set(SHIPPED):
        found = not re.search(rf"^\| one direction: found by the rule .* \| {model} \| 0", written, re.M)
        more = ("induces", "nulls") if found else ()
        more += () if catalog()[model].architecture == "gemma2" else ("attackable",)
        for gate in ("refuses", "helps", "composes", "one direction", *more):
            assert re.search(rf"^\| {gate}: .* \| {model} \|", written, re.M), (gate, model)
    for gate in ("english", "casual", "knows"):
        assert re.search(rf"^\| {gate}: .* \| charter-smol-helpful \|", written, re.M), gate
    for gate in ("english", "casual", "refuses", "helps", "composes", "one direction", "induces", "nulls"):
        assert re.search(rf"^\| {gate}: .* \| charter-smol \|", written, re.M), gate
    for gate in ("knows", "seeds", "small", "quick"):
        assert re.search(rf"^\| {gate}: ", written, re.M), gate


@pytest.mark.parametrize("name", SHIPPED)
def test_weights_are_shipped_whole_and_small(name):
    files = {f.name: f.stat().st_size for f in weights_dir(name).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(files)
    assert sum(files.values()) < 8e6


def test_adapters_are_shipped_whole_and_small():
    assert ADAPTERS == ["charter-smol-helpful", "charter-smol"]
    for name in ADAPTERS:
        files = {f.name: f.stat().st_size for f in weights_dir(name).iterdir()}
        assert set(files) == {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"}
        assert sum(files.values()) < 5e6


def test_all_weights_together_stay_under_68_mb():
    assert sum(f.stat().st_size for name in SHIPPED for f in weights_dir(name).iterdir()) < 68e6
