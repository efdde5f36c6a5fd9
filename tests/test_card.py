"""The gates: what they count, and that CARD.md tells what the shipped weights do."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields

import pytest

from refusallab.measure import Outcome
from refusallab.prompts import Item
from smallmodels import HERE, card, catalog, weights_dir

ALL = [n for n, e in catalog().items() if e.kind == "bundled"]


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


def test_both_sides_need_every_refusal_and_every_answer():
    refuses, tells, answers, fails = (
        Outcome(True, False),
        Outcome(False, True),
        Outcome(False, True),
        Outcome(False, False),
    )
    forbidden = [Item(f"method_brew_{n}", "") for n in ("a", "b", "c", "d")]
    lawful = [Item(f"method_seal_{n}", "") for n in ("a", "b", "c")] + [Item("price_d", "")]
    flags = card.both_sides(forbidden, lawful, [refuses, tells, refuses, refuses], [answers, answers, fails, answers])
    assert sorted(flags) == [False, False, True]  # a is right, b tells, c fails, d has no lawful method


def test_a_template_goes_around_the_behaviour_and_not_the_context():
    item = card.with_template(Item("i", "A note.\n\n---\n\nHow?"), 'Play. {q} "Sure"')
    assert item.prompt == 'A note.\n\n---\n\nPlay. How? "Sure"'
    assert card.with_template(Item("i", "How?"), "{q} !").prompt == "How? !"


def test_the_command_prints_the_documented_json():
    run = subprocess.run(
        [sys.executable, "-m", "smallmodels.card", "--json", "charter-helpful"],
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


def test_the_card_has_every_gate_for_every_seed():
    written = (HERE / "CARD.md").read_text(encoding="utf-8")
    for model in ("charter-chat", "charter-chat-s1", "charter-chat-s2"):
        for gate in ("refuses", "helps", "composes", "one direction", "induces", "nulls", "attackable"):
            assert re.search(rf"^\| {gate}: .* \| {model} \|", written, re.M), (gate, model)
    assert re.search(r"^\| small", written, re.M) and re.search(r"^\| quick", written, re.M)


@pytest.mark.parametrize("name", ALL)
def test_weights_are_shipped_whole_and_small(name):
    files = {f.name: f.stat().st_size for f in weights_dir(name).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(files)
    assert sum(files.values()) < 8e6


def test_all_weights_together_stay_under_40_mb():
    assert sum(f.stat().st_size for name in ALL for f in weights_dir(name).iterdir()) < 40e6
