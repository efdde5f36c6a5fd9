"""Lab 05: cross-entropy, paired intervals, the edit with parts left out, fine-tuning; its figures."""

import copy
import math

import matplotlib.pyplot as plt
import pytest
import torch

from refusallab import plots
from refusallab.errors import RefusalLabError
from refusallab.finetuning import finetune
from refusallab.interventions import ablation
from refusallab.measure import (
    Difference,
    cross_entropy,
    next_token_loss,
    paired_bootstrap,
    paired_difference,
    wilson,
)
from refusallab.model import encode_texts, logits, positional_embedding, render, unembedding
from refusallab.orthogonalization import (
    REPAIRS,
    distance_from_hooks,
    gap_by_layer,
    orthogonalize,
    write_strength,
)

PAGES = ["Name a river in the north.", "Bake bread with a copper kettle, step by step.", "List three tools: 1, 2, 3"]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


# --- texts to predict ----------------------------------------------------------------------------------------------


def test_a_page_counts_from_its_second_token_on(model_of):
    m = model_of("llama")
    batch, counted = encode_texts(m, PAGES)
    lengths = batch["attention_mask"].sum(1)
    assert counted.sum(1).tolist() == (lengths - 1).tolist()
    for row, ids, text in zip(counted, batch["input_ids"], PAGES, strict=True):
        assert m.tokenizer.decode(ids[-int(row.sum()) - 1 :]) == text


def test_of_a_conversation_the_reply_and_its_end_count(model_of):
    m, prompts = model_of("llama"), ["Name a river", "List"]
    batch, counted = encode_texts(m, ["river", "1, 2, 3"], prompts)
    for row, ids, reply, prompt in zip(counted, batch["input_ids"], ["river", "1, 2, 3"], prompts, strict=True):
        assert m.tokenizer.decode(ids[row]) == reply + m.tokenizer.eos_token
        assert m.tokenizer.decode(ids[~row]).endswith(render(m, prompt))


@pytest.mark.parametrize(("texts", "prompts"), [(["a", "b"], ["List"]), ("text", None), ([], None)])
def test_texts_that_cannot_be_encoded(model_of, texts, prompts):
    with pytest.raises(RefusalLabError):
        encode_texts(model_of("llama"), texts, prompts)


# --- cross-entropy -------------------------------------------------------------------------------------------------


def test_loss_against_a_loop_over_tokens():
    g = torch.Generator().manual_seed(0)
    x, ids = torch.randn(2, 6, 9, generator=g), torch.randint(9, (2, 6), generator=g)
    counted = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]], dtype=torch.bool)
    expected = []
    for row in range(2):
        places = [i for i in range(6) if counted[row, i]]
        expected.append(-sum(x[row, i - 1].log_softmax(-1)[ids[row, i]] for i in places) / len(places))
    torch.testing.assert_close(next_token_loss(x, ids, counted), torch.stack(expected))


def test_even_odds_cost_the_logarithm_of_the_vocabulary():
    counted = torch.tensor([[False, True, True]])
    assert next_token_loss(torch.zeros(1, 3, 7), torch.zeros(1, 3, dtype=torch.long), counted).item() == pytest.approx(
        math.log(7)
    )


def test_loss_needs_fitting_shapes_and_a_token_to_score():
    x, ids = torch.zeros(1, 3, 7), torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(RefusalLabError, match="no token to score"):
        next_token_loss(x, ids, torch.tensor([[True, False, False]]))
    with pytest.raises(RefusalLabError, match="need ids and counted"):
        next_token_loss(x[0], ids, ids.bool())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_neither_padding_nor_batches_matter(model_of, architecture):
    m = model_of(architecture)
    together, small = cross_entropy(m, PAGES), cross_entropy(m, PAGES, batch_size=2)
    for text, loss in zip(PAGES, together, strict=True):
        ids = m.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            alone = m.hf(input_ids=ids, labels=ids).loss
        assert loss.item() == pytest.approx(alone.item(), abs=1e-4)
    torch.testing.assert_close(small, together, atol=1e-5, rtol=0)
    assert together.dtype == torch.float64


def test_in_later_batches_each_reply_keeps_its_prompt(model_of, prompts):
    m, replies = model_of("llama"), ["river"] * len(prompts)
    alone = torch.cat([cross_entropy(m, ["river"], [prompt]) for prompt in prompts])
    torch.testing.assert_close(cross_entropy(m, replies, prompts, batch_size=2), alone, atol=1e-4, rtol=0)
    assert alone.std() > 0.01
    assert cross_entropy(m, []).shape == cross_entropy(m, [], []).shape == (0,)


def test_an_edit_acts_at_every_token(model_of, r):
    m = model_of("llama")
    hooks = cross_entropy(m, ["river", "1"], ["Name a river", "List"], edit=ablation(r))
    weights = cross_entropy(orthogonalize(m, r), ["river", "1"], ["Name a river", "List"])
    torch.testing.assert_close(hooks, weights, atol=1e-4, rtol=0)
    assert not torch.allclose(hooks, cross_entropy(m, ["river", "1"], ["Name a river", "List"]), atol=1e-2)


# --- paired intervals ----------------------------------------------------------------------------------------------


def flags(both, before, after, neither):
    return [True] * (both + before) + [False] * (after + neither), (
        [True] * both + [False] * before + [True] * after + [False] * neither
    )


def test_newcombe_by_hand():
    # 20 cases, 10 and 6 of them true, 5 in both: phi = (5 * 9 - 5 * 1 - 10) / sqrt(10 * 10 * 6 * 14)
    before, after = flags(5, 5, 1, 9)
    phi, (l0, u0), (l1, u1) = 30 / math.sqrt(8400), (0.29930, 0.70070), (0.14548, 0.51897)
    d = paired_difference(before, after)
    low = -0.2 - math.sqrt((0.3 - l1) ** 2 - 2 * phi * (0.3 - l1) * (u0 - 0.5) + (u0 - 0.5) ** 2)
    high = -0.2 + math.sqrt((u1 - 0.3) ** 2 - 2 * phi * (u1 - 0.3) * (0.5 - l0) + (0.5 - l0) ** 2)
    assert (d.value, d.low, d.high, d.n) == (
        pytest.approx(-0.2),
        pytest.approx(low, abs=1e-4),
        pytest.approx(high, abs=1e-4),
        20,
    )


def test_a_slight_correlation_counts_as_none():
    before, after = flags(1, 2, 5, 12)  # 1 * 12 - 2 * 5 = 2, which the correction of 20 / 2 would turn round
    (l0, u0), (l1, u1) = wilson(3, 20), wilson(6, 20)
    d = paired_difference(before, after)
    low, high = 0.15 - math.hypot(0.3 - l1, u0 - 0.15), 0.15 + math.hypot(u1 - 0.3, 0.15 - l0)
    assert (d.low, d.high) == pytest.approx((low, high))


def test_the_difference_mirrors_and_keeps_a_width_without_changes():
    before, after = flags(30, 4, 9, 20)
    d, mirrored = paired_difference(before, after), paired_difference(after, before)
    assert (mirrored.value, mirrored.low, mirrored.high) == pytest.approx((-d.value, -d.high, -d.low))
    same = paired_difference([True] * 95 + [False] * 5, [True] * 95 + [False] * 5)
    assert same.value == 0 and 0.005 < same.high < 0.06
    for k in (0, 10):
        assert paired_difference([True] * k + [False] * (10 - k), [True] * k + [False] * (10 - k)).value == 0


@pytest.mark.slow
def test_the_interval_covers_the_truth():
    g = torch.Generator().manual_seed(0)
    kinds = torch.multinomial(torch.tensor([0.8, 0.1, 0.03, 0.07]), 400 * 100, True, generator=g).view(400, 100)
    inside = 0
    for row in kinds:  # true change: 0.03 - 0.10
        d = paired_difference((row < 2).tolist(), ((row == 0) | (row == 2)).tolist())
        inside += d.low <= -0.07 <= d.high
    assert 0.92 < inside / 400 < 0.99


def test_bootstrap_of_a_constant_change_and_of_noise():
    before = torch.linspace(0, 5, 30)
    d = paired_bootstrap(before, before + 0.5)
    assert (d.value, d.low, d.high) == pytest.approx((0.5, 0.5, 0.5), abs=1e-6)
    noise = torch.randn(200, generator=torch.Generator().manual_seed(0))
    d = paired_bootstrap(torch.zeros(200), noise)
    half = 1.96 * noise.std().item() / math.sqrt(200)
    assert d.low == pytest.approx(d.value - half, abs=0.03) and d.high == pytest.approx(d.value + half, abs=0.03)
    once = paired_bootstrap(torch.zeros(200), noise, draws=1)
    assert once.low == once.high
    assert paired_bootstrap(torch.zeros(200), noise) == d != paired_bootstrap(torch.zeros(200), noise, seed=1)


def test_a_difference_prints_itself():
    assert str(Difference(-0.001, -0.012, 0.004, 40)) == "+0.00 [-0.01, +0.00] n=40"


@pytest.mark.parametrize("compare", [paired_difference, paired_bootstrap])
@pytest.mark.parametrize(("before", "after"), [([], []), ([1, 0], [1])])
def test_pairs_are_needed(compare, before, after):
    with pytest.raises(RefusalLabError, match="same cases twice"):
        compare(before, after)


# --- the edit, with parts left out ---------------------------------------------------------------------------------

STARTS = {  # fault: (architecture, where hooks and weights part); there are 3 blocks, and index 3 is the logits
    "untie": ("gpt2", 3),
    "positions": ("gpt2", 0),
    "biases": ("gpt2", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", STARTS)
def test_a_part_that_is_left_out_shows_where_it_should(model_of, r, prompts, fault):
    architecture, start = STARTS[fault]
    m = model_of(architecture)
    gaps = gap_by_layer(m, orthogonalize(m, r, skip=[fault]), r, prompts)
    assert gaps.shape == (4,)
    assert (gaps[:start] < 1e-4).all() and gaps[start] > 1e-3
    assert gap_by_layer(m, orthogonalize(m, r), r, prompts).max() < 1e-4


def test_the_last_gap_is_the_distance(model_of, r, prompts):
    m = model_of("gemma2")
    textbook = orthogonalize(m, r, skip=REPAIRS)
    assert gap_by_layer(m, textbook, r, prompts)[-1] == pytest.approx(distance_from_hooks(m, textbook, r, prompts))


def test_skipping_leaves_just_that_part(model_of, r):
    m = model_of("gpt2")
    edited = orthogonalize(m, r, skip=["positions"])
    assert torch.equal(positional_embedding(edited.hf).weight, positional_embedding(m.hf).weight)
    tied = orthogonalize(m, r, skip=["untie"])
    assert not torch.equal(unembedding(tied.hf).weight, unembedding(m.hf).weight)
    with pytest.raises(RefusalLabError, match="no 'bias' to skip"):
        orthogonalize(m, r, skip=["bias"])


@pytest.mark.slow
def test_no_matrix_of_an_edited_model_writes_r(m, r):
    strength, other = write_strength(orthogonalize(m, r), r), write_strength(m, r)
    assert max(strength.values()) < 1e-4 < 0.3 < min(other.values())
    assert len(other) == 1 + 2 * m.n_layers + (positional_embedding(m.hf) is not None)
    scaled = write_strength(m, 5 * r)
    assert scaled == pytest.approx(other, rel=1e-5)


def test_random_directions_have_strength_one_on_average(model_of):
    m, g = model_of("llama"), torch.Generator().manual_seed(0)
    values = [v for _ in range(40) for v in write_strength(m, torch.randn(32, generator=g)).values()]
    assert sum(v * v for v in values) / len(values) == pytest.approx(1, abs=0.05)


# --- fine-tuning ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_finetuning_learns_the_replies_on_a_copy(model_of):
    m, prompts, replies = model_of("llama"), ["Name a river", "List"], ["bread", "kettle"]
    weights = copy.deepcopy(m.hf.state_dict())
    tuned = finetune(m, prompts, replies, steps=20, lr=1e-3)
    assert all(torch.equal(value, weights[key]) for key, value in m.hf.state_dict().items())
    assert tuned.losses[0] == pytest.approx(cross_entropy(m, replies, prompts).mean().item(), abs=1e-4)
    assert cross_entropy(tuned.model, replies, prompts).mean() < 0.5 * tuned.losses[0]
    batch, _ = encode_texts(m, replies, prompts)
    assert len(tuned.losses) == 20 and tuned.tokens == 20 * int(batch["attention_mask"].sum())
    assert not any(p.requires_grad for p in tuned.model.hf.parameters()) and not tuned.model.hf.training


def test_finetuning_is_reproducible_and_the_seed_orders_the_pairs(model_of):
    m, prompts, replies = model_of("gpt2"), PAGES, ["river", "bread", "tools"]
    runs = [finetune(m, prompts, replies, steps=4, batch_size=2, seed=seed) for seed in (0, 0, 1)]
    same = [logits(run.model, prompts) for run in runs]
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], same[2])


def test_finetuning_needs_pairs(model_of):
    with pytest.raises(RefusalLabError, match="one reply for each"):
        finetune(model_of("llama"), ["List"], [])
    with pytest.raises(RefusalLabError, match="list of prompts is empty"):
        finetune(model_of("llama"), [], [])


def test_finetuning_needs_a_batch_and_no_steps_below_zero(model_of):
    with pytest.raises(RefusalLabError, match="batch_size is 0: give at least 1"):
        finetune(model_of("llama"), ["List"], ["bread"], steps=1, batch_size=0)
    with pytest.raises(RefusalLabError, match="number of steps is -1: give 0 or more"):
        finetune(model_of("llama"), ["List"], ["bread"], steps=-1)


# --- figures -------------------------------------------------------------------------------------------------------


def test_figures():
    names = {"embedding": 1.0, "attention 0": 0.9, "MLP 0": 0.0}
    (axis,) = plots.write_strengths({"untouched": names, "orthogonalized": names}).axes
    assert list(axis.lines[0].get_ydata()) == list(names.values())
    assert [label.get_text() for label in axis.get_xticklabels()] == list(names)
    assert "by chance" in axis.get_ylabel() and axis.get_xlabel()
    d, lower = Difference(0.1, 0.0, 0.2, 50), Difference(-0.3, -0.4, -0.1, 50)
    figure = plots.difference_rows({"law": {"edit": lower, "control": d}, "place": {"edit": d}}, "change")
    (axis,) = figure.axes
    assert [list(bars[0].get_xdata()) for bars in axis.containers] == [[-0.3, 0.1], [0.1]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["edit", "control"]
    assert axis.get_xlabel() == "change" and axis.lines[-1].get_xdata()[0] == 0


def test_gaps_of_all_models_share_one_legend():
    gaps = torch.rand(25)
    many = {"exact": {"textbook": torch.zeros(25)}, "tied": {"head still tied": gaps, "textbook": torch.rand(25)}}
    figure = plots.gap_curves(many)
    exact, tied = figure.axes
    (legend,) = figure.legends
    kinds = ["textbook", "head still tied", "rounding in fp32"]
    assert [text.get_text() for text in legend.get_texts()] == kinds and not exact.get_legend()
    line, logits_of_it, other, _ = tied.lines
    assert list(line.get_ydata()) == gaps[:-1].tolist() and logits_of_it.get_ydata()[0] == gaps[-1].item()
    assert other.get_color() == exact.lines[0].get_color(), "an edit looks the same in every panel"
    assert exact.lines[0].get_ydata()[0] == pytest.approx(1e-7), "a gap of 0 stands at the foot of the logarithmic axis"
    assert tied.get_yscale() == "log" and "units of the stream" in exact.get_ylabel()
    assert tied.get_xticklabels()[-1].get_text() == "logits"
