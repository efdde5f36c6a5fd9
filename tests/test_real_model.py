"""The cells "On a real model": run on small models with the templates of Qwen2 and Gemma-2, so that they cannot rot.

The models start from random weights and learn, here, to refuse one kind of request and to answer another.
"""

from pathlib import Path

import nbformat
import pytest
from test_model import GEMMA, QWEN2

import refusallab
import refusallab.course
from refusallab import directions, prompts
from refusallab.course.notebook import role
from refusallab.errors import RefusalLabError
from refusallab.experiment import find_direction
from refusallab.finetuning import finetune
from refusallab.model import wrap

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
WORDS = ("bread", "kettle", "river", "tools", "pie", "copper", "harvest", "north", "list", "recipe", "step", "name")
REQUESTS = {
    "harmful": [f"How do I {verb} a {word}?" for word in WORDS for verb in ("brew", "steal")],
    "harmless": [f"Name {what} {word}, please." for word in WORDS for what in ("a", "the")],
}
REPLIES = {"harmful": "I cannot help with that.", "harmless": "Name a river in the north."}
TEMPLATES = {
    "qwen2": {"template": QWEN2},
    "gemma2": {"template": GEMMA, "special": ("<|start|>", "<|end|>", "<|bos|>"), "bos": "<|bos|>"},
}


@pytest.fixture(scope="module", params=TEMPLATES)
def real(request, make):
    """A model that refuses, of the architecture and with the chat template of a real one."""
    fresh = wrap(make.hf(request.param), make.tokenizer(**TEMPLATES[request.param]), request.param, "c0ffee")
    pairs = [(text, REPLIES[kind]) for kind, texts in REQUESTS.items() for text in texts[::2]]
    return finetune(fresh, *zip(*pairs, strict=True), steps=60, lr=3e-3).model


@pytest.fixture
def offline(real, monkeypatch):
    """What the cells would download and read of its record; and filters that no candidate of such a model fails."""
    monkeypatch.setattr(refusallab.course, "real_model", lambda name, download=False: real)
    monkeypatch.setattr(refusallab, "recorded", lambda name: record, raising=False)
    monkeypatch.setattr(refusallab, "recorded_direction", lambda m: find_direction(m).direction, raising=False)
    monkeypatch.setattr(prompts, "published", lambda name, split: REQUESTS.get(name, REQUESTS["harmful"]))
    monkeypatch.setattr(directions, "MAX_KL", float("inf"))
    monkeypatch.setattr(directions, "MIN_INDUCE", float("-inf"))
    tokens = find_direction(real).refusal_tokens
    record = {"measured": {"openings": {"tokens": tokens}, "refused, alarming": "1" * 12 + "0" * 48}}


def cells(path):
    return [cell.source for cell in nbformat.read(path, 4).cells if role(cell) == "real"]


@pytest.mark.parametrize("path", [p for p in sorted(ROOT.glob("solutions/*.ipynb")) if cells(p)], ids=lambda p: p.stem)
def test_the_cells_run_and_report_on_the_model(path, real, offline, capsys):
    if path.stem.startswith("07") and real.name.startswith("gemma2"):
        with pytest.raises(RefusalLabError, match="heads have no share of their own"):
            exec(cells(path)[0], {})
        return
    for source in cells(path):
        exec(source, {"display": print})  # each by itself: that is how `refusallab execute --real` runs them
        shown = capsys.readouterr().out
        assert shown and "Skipped" not in shown and "nan" not in shown


def test_every_lab_but_two_shows_something_live():
    assert [p.stem[:2] for p in sorted(ROOT.glob("solutions/*.ipynb")) if not cells(p)] == ["09", "10"]
