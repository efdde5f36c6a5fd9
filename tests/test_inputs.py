"""Prompts, texts, items and flags in whatever holds them: read in their own order, and refused with their place."""

import numpy as np
import pandas as pd
import pytest
import torch

from refusallab.activations import mean_residual, residual
from refusallab.attacks import gcg
from refusallab.attacks.best_of_n import best_of_n_attack
from refusallab.attacks.prefilling import prefilling_attack
from refusallab.attacks.result import direct, rewrite, send
from refusallab.attribution import attention_from_last, attribute, cosine_trace, regions
from refusallab.cones import downstream
from refusallab.defence import ModelAlone, last_words
from refusallab.defences.smoothing import vote
from refusallab.defences.thresholds import threshold_at
from refusallab.directions import candidate_directions, score_candidates
from refusallab.errors import RefusalLabError
from refusallab.finetuning import finetune
from refusallab.interventions import ablation
from refusallab.judging import outcomes
from refusallab.measure import (
    Outcome,
    cross_entropy,
    holm,
    mcnemar,
    paired_bootstrap,
    paired_difference,
    rate,
    refused_by_phrases,
    two_by_two,
)
from refusallab.model import blocks, encode, encode_texts, generate, logits, render
from refusallab.orthogonalization import distance_from_hooks
from refusallab.prompts import Item


class Column:
    """Like a column of a dataset: it can be walked through and has a length, no more."""

    def __init__(self, values):
        self.values = values

    def __iter__(self):
        return iter(self.values)

    def __len__(self):
        return len(self.values)


def shuffled(values):
    """A Series whose labels are in another order than its values, as `sample(frac=1)` leaves them."""
    return pd.Series(list(values), index=range(len(values))[::-1], dtype=object)


KINDS = {
    "generator": lambda values: (value for value in values),
    "tuple": tuple,
    "shuffled series": shuffled,
    "filtered series": lambda values: pd.Series([None, *values, None], dtype=object).iloc[1:-1],
    "series with names": lambda values: pd.Series(list(values), index=[f"row {i}" for i in range(len(values))]),
    "column of a table": lambda values: pd.DataFrame({"x": pd.Series(list(values), index=range(5, 5 + len(values)))})[
        "x"
    ],
    "column": Column,
}
TEXT_KINDS = KINDS | {
    "array": np.array,
    "array of objects": lambda values: np.array(values, dtype=object),
    "index": pd.Index,
    "keys": lambda values: dict.fromkeys(values).keys(),
}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if hasattr(a, "__dataclass_fields__") and any(isinstance(x, torch.Tensor) for x in vars(a).values()):
        return all(same(x, vars(b)[name]) for name, x in vars(a).items())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


TAKE_PROMPTS = {
    "encode": lambda m, p: encode(m, p(PROMPTS)),
    "encode_texts": lambda m, p: encode_texts(m, p(REPLIES), p(PROMPTS)),
    "logits": lambda m, p: logits(m, p(PROMPTS), batch_size=2),
    "generate": lambda m, p: generate(m, p(PROMPTS), max_new_tokens=4, batch_size=2),
    "residual": lambda m, p: residual(m, p(PROMPTS), batch_size=2),
    "mean_residual": lambda m, p: mean_residual(m, p(PROMPTS), batch_size=2),
    "cross_entropy": lambda m, p: cross_entropy(m, p(REPLIES), p(PROMPTS), batch_size=2),
    "cross_entropy of texts": lambda m, p: cross_entropy(m, p(REPLIES), batch_size=2),
    "attribution": lambda m, p: attribute(m, p(PROMPTS), R, batch_size=2),
    "cosine_trace": lambda m, p: cosine_trace(m, p(PROMPTS), R),
    "attention": lambda m, p: attention_from_last(m, p(PROMPTS)),
    "regions": lambda m, p: regions(m, p(PROMPTS), p(SUFFIXES)),
    "downstream": lambda m, p: downstream(m, p(PROMPTS), R, R.flip(0)),
    "candidates": lambda m, p: candidate_directions(m, p(PROMPTS[:2]), p(PROMPTS[2:])),
    "scores": lambda m, p: score_candidates(m, torch.ones(1, 5, 32), p(PROMPTS[:2]), p(PROMPTS[2:]), [3]),
    "finetune": lambda m, p: finetune(m, p(PROMPTS), p(REPLIES), steps=1, batch_size=2).losses,
    "distance": lambda m, p: distance_from_hooks(m, m, R, p(PROMPTS)),
    "defence": lambda m, p: ModelAlone(m).replies(p(PROMPTS)),
}
PROMPTS = [
    "How do I bake bread?",
    "Name a river",
    "Please explain the recipe for the harvest pie, step by step.",
    "List",
]
REPLIES = ["Name a river", "List three tools", "I cannot help with that. Sorry,", "harvest pie"]
SUFFIXES = ["bread?", "river", "step.", "List"]
ITEMS = [Item(f"i{k}", prompt, answer) for k, (prompt, answer) in enumerate(zip(PROMPTS, REPLIES, strict=True))]
R = torch.linspace(-1, 2, 32)


@pytest.mark.slow
@pytest.mark.parametrize("run", TAKE_PROMPTS.values(), ids=TAKE_PROMPTS)
def test_prompts_and_texts_in_any_series_give_what_a_list_gives(model_of, run):
    m = model_of()
    expected = run(m, list)
    for name, kind in TEXT_KINDS.items():
        assert same(run(m, kind), expected), name


TAKE_ITEMS = {
    "outcomes": lambda m, p: outcomes(m, p(ITEMS)),
    "direct": lambda m, p: [x.reply for x in direct(m, p(ITEMS))],
    "send": lambda m, p: [x.reply for x in send(m, "x", p(ITEMS), p(PROMPTS))],
    "prefilling": lambda m, p: [x.reply for x in prefilling_attack(m, p(ITEMS), "Sure!")],
    "best_of_n": lambda m, p: [x.reply for x in best_of_n_attack(m, p(ITEMS), 2, until=lambda o: False)],
    "with_suffix": lambda m, p: [x.reply for x in gcg.with_suffix(m, p(ITEMS), " the")],
}


@pytest.mark.slow
@pytest.mark.parametrize("run", TAKE_ITEMS.values(), ids=TAKE_ITEMS)
def test_items_in_any_series_give_what_a_list_gives(model_of, run):
    m = model_of()
    expected = run(m, list)
    for name, kind in KINDS.items():
        assert run(m, kind) == expected, name


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


A, B = [True, True, False, True, False, True], [False, True, False, False, True, False]
TAKE_FLAGS = {
    "rate": lambda p: rate(p(A)),
    "mcnemar": lambda p: mcnemar(p(A), p(B)),
    "paired_difference": lambda p: paired_difference(p(A), p(B)),
    "vote": lambda p: vote(p(B)),
    "bootstrap": lambda p: paired_bootstrap(p([0.1, 0.7, 0.2, 0.5]), p([0.2, 0.9, 0.2, 0.1])),
    "holm": lambda p: holm(p([0.01, 0.04, 0.5])),
    "threshold": lambda p: threshold_at(p([0.3, 0.1, 0.9, 0.5]), 0.3),
}


@pytest.mark.slow
@pytest.mark.parametrize("run", TAKE_FLAGS.values(), ids=TAKE_FLAGS)
def test_flags_and_numbers_in_any_series_give_what_a_list_gives(run):
    for kind in (*KINDS.values(), np.array, doubles, lambda values: map(float, values)):
        assert run(kind) == run(list)


def test_outcomes_are_counted_from_any_series():
    judged = [Outcome(True, False), Outcome(False, True)]
    for kind in KINDS.values():
        assert two_by_two(kind(judged)) == two_by_two(judged)
    with pytest.raises(RefusalLabError, match="Entry 1 of outcomes is None"):
        two_by_two([judged[0], None])


@pytest.mark.parametrize("wrong", ["False", "yes", 0.5, None, float("nan"), pd.NA, 2])
def test_what_is_no_flag_is_named_with_its_place(wrong):
    for run in (rate, lambda flags: mcnemar(flags, flags), lambda flags: paired_difference(flags, flags)):
        with pytest.raises(RefusalLabError, match="Entry 2 of flags"):
            run([True, False, wrong])


@pytest.mark.parametrize("run", [encode, logits, generate, residual])
@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["List", None], "Entry 1 of prompts is None"),
        (["List", float("nan")], "Entry 1 of prompts is nan"),
        (pd.Series(["List", pd.NA], dtype=object), "Entry 1 of prompts is <NA>"),
        (["List", 7], "Prompt 1: 7 is not a prompt"),
        (["List", ITEMS[0]], "Prompt 1: .* is not a prompt"),
        (["List", b"List"], "Prompt 1: .* is not a prompt"),
        ([{"role": "user", "content": "List"}], "Prompt 0: .* is not a prompt"),
        ({"List": 1}, "prompts is a dict"),
        ({"List", "Name"}, "prompts is a set"),
        (pd.DataFrame({"prompt": ["List"]}), "prompts has 2 dimensions"),
        (np.array([["List"]]), "prompts has 2 dimensions"),
        (np.array("List"), "prompts has 0 dimensions"),
        (7, "prompts is a int"),
        ("List", "one string"),
        ((p for p in ()), "list of prompts is empty"),
    ],
)
def test_what_is_no_prompt_is_named_with_its_place(model_of, run, prompts, message):
    with pytest.raises(RefusalLabError, match=message) as error:
        run(model_of(), prompts)
    assert "\n" not in str(error.value)


def test_what_is_no_item_text_or_phrase(model_of):
    m = model_of()
    with pytest.raises(RefusalLabError, match="Entry 0 of items is 'List', not an Item"):
        outcomes(m, ["List"])
    with pytest.raises(RefusalLabError, match="Entry 1 of texts is None, not a text"):
        cross_entropy(m, ["Name a river", None])
    for texts, place in (([""], 0), (["Name a river", ""], 1)):
        with pytest.raises(RefusalLabError, match=f"Text {place} is empty"):
            cross_entropy(m, texts)
    with pytest.raises(RefusalLabError, match="phrases is one string"):
        refused_by_phrases("Sure.", "I cannot")
    with pytest.raises(RefusalLabError, match="A phrase is empty"):
        refused_by_phrases("Sure.", ["I cannot", " "])
    with pytest.raises(RefusalLabError, match="A text is needed, not None"):
        refused_by_phrases(None)


# Messages


def test_content_in_parts_of_text_is_one_text(model_of):
    m = model_of()
    parts = [{"type": "text", "text": "Name "}, {"type": "text", "text": "a river"}]
    for content in (parts, tuple(parts), np.array(parts)):
        asked = [{"role": "user", "content": content}]
        assert render(m, asked) == render(m, "Name a river")
        assert render(m, rewrite(asked, str.upper)) == render(m, "NAME A RIVER")
        assert last_words(asked) == "Name a river"
    assert torch.equal(logits(m, np.array([{"role": "user", "content": "List"}])[None].tolist()), logits(m, ["List"]))


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "Message 0 holds a part of type 'image'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "Message 0 holds {'type': 'text'}"),
        ([{"role": "user", "content": None}], "The content of message 0 is None"),
        ([{"role": "user", "content": {"text": "x"}}], "The content of message 0 is {'text'"),
        ([{"role": "user", "content": []}], "says something"),
        ([{"role": "user"}], "Message 0 is {'role': 'user'}: give a dict with role and content"),
        ([{"content": "x"}], "give a dict with role and content"),
        (["x"], "Message 0 is 'x'"),
        ([{"role": "human", "content": "x"}], "has the role 'human': the roles are system, user, assistant"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "end with a user turn"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}] * 2, "must end|put it first"),
    ],
)
def test_messages_that_do_not_fit_give_one_line(model_of, turns, message):
    for run in (logits, generate):
        with pytest.raises(RefusalLabError, match=message) as error:
            run(model_of(), ["List", turns])
        assert str(error.value).startswith("Prompt 1: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("system", [7, ["Be kind."], float("nan")])
def test_a_system_prompt_is_one_text(model_of, system):
    with pytest.raises(RefusalLabError, match="system is .*: give one text"):
        logits(model_of(), ["List"], system=system)


# An old habit


def in_place(nn, change):
    for block in nn.model.layers:
        change(block)


def assign(block):
    block.output[0] = 0.5 * block.output[0]


def add(block):
    block.output[0] += 1.0


def alias(block):
    stream = block.output[0]
    stream[:] = 0.5 * stream


def method(block):
    block.output[0].mul_(0.5)


def one_position(block):
    block.output[0, -1] = 0.0


def of_the_input(block):
    block.input[0] = 0.5 * block.input[0]


def of_the_mlp(block):
    block.mlp.output[0] = 0.5 * block.mlp.output[0]


@pytest.mark.slow
@pytest.mark.parametrize("change", [assign, add, alias, method, one_position, of_the_input, of_the_mlp])
def test_an_edit_of_the_first_prompt_alone_is_refused(model_of, change):
    m = model_of()

    def edit(nn):
        in_place(nn, change)

    for run in (logits, generate, residual):
        with pytest.raises(RefusalLabError, match="changes the first prompt of the batch in place, and no other"):
            run(m, PROMPTS, edit=edit)
        run(m, PROMPTS[:1], edit=edit)  # of one prompt, the first is all
    with pytest.raises(RefusalLabError, match="first prompt of the batch"):
        cross_entropy(m, REPLIES, PROMPTS, edit=edit)
    assert torch.equal(logits(m, PROMPTS), logits(model_of(), PROMPTS))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_ablation_in_place_is_fine_where_it_changes_rounding_alone(model_of, name):
    m = model_of(name)
    for seed in range(6):
        u = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(seed)), dim=0)

        def edit(nn):
            for block in blocks(nn):  # behind the first one nearly nothing is left along u
                for _ in range(2):
                    block.input -= (block.input @ u)[..., None] * u  # noqa: B023

        logits(m, PROMPTS, edit=edit)


def test_edits_of_all_rows_of_one_row_of_a_copy_and_of_another_row_are_fine(model_of):
    m = model_of()
    rows = torch.zeros(len(PROMPTS), 32)
    rows[0] = 1.0

    def whole(block):
        block.output[:] = 0.5 * block.output

    def attention(block):
        block.self_attn.output[0][:] = 0.0

    def copy(block):
        x = block.output.clone()
        x[0] = 0.0
        block.output = x

    def second(block):
        block.output[1] = 0.0

    def first_row_by_assignment(block):
        block.output = block.output + rows[:, None]

    for change in (whole, attention, copy, second, first_row_by_assignment):

        def edit(nn, change=change):
            in_place(nn, change)

        assert not torch.equal(logits(m, PROMPTS, edit=edit), logits(m, PROMPTS))
        generate(m, PROMPTS, edit=edit, max_new_tokens=3)
    logits(m, PROMPTS, edit=ablation(R))
