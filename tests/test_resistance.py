"""Weights that resist: the losses, what training under attack changes, and what it costs."""

import pytest
import torch

from refusallab.attacks.white_box import successive_directions
from refusallab.defences import resistance
from refusallab.defences.resistance import (
    REFUSE,
    RESPOND,
    refusal_margin,
    refusal_token,
    safe_completion,
    spread_loss,
    spread_refusal,
    tamper_loss,
    tamper_resistant,
)
from refusallab.defences.training import lessons
from refusallab.errors import RefusalLabError
from refusallab.finetuning import reply_loss, train_copy
from refusallab.interventions import span_ablation, unit
from refusallab.model import load, logits
from refusallab.prompts import Item, bundled
from refusallab.truth import lawful_facts, tells_a_method

DEFENCES = (spread_refusal, tamper_resistant, safe_completion, refusal_token)


@pytest.fixture(scope="module")
def chat():
    return load("charter-chat")


@pytest.fixture(scope="module")
def batch():
    return [lessons(4, 0, forbidden=kind) for kind in (True, False)]


def refusals(x):
    return [lesson.prompt for lesson in x], [lesson.reply for lesson in x]


def test_spread_loss_is_refusing_under_ablation_and_replying(chat, batch):
    vectors = torch.randn(2, chat.width, generator=torch.Generator().manual_seed(0))
    bad, good = map(refusals, batch)
    expected = reply_loss(chat, *bad, span_ablation(vectors)) + reply_loss(chat, *good)
    torch.testing.assert_close(spread_loss(chat, *batch, vectors), expected)


def test_the_gradient_of_tamper_loss_is_that_at_the_attacked_weights(chat, batch):
    bad, good = map(refusals, batch)
    here = train_copy(chat, lambda m: reply_loss(m, *good), steps=1, lr=1e-4, name="here")
    there = train_copy(
        here, lambda m: reply_loss(m, bad[0], [x.answer for x in batch[0]]), steps=3, lr=1e-3, name="there"
    )
    for m in (here, there):
        m.hf.requires_grad_(True)
    loss = tamper_loss(here, there, *batch)
    broken, kept = reply_loss(there, *bad), reply_loss(here, bad[0] + good[0], bad[1] + good[1])
    torch.testing.assert_close(loss, broken + kept)
    loss.backward()
    name = "model.layers.3.mlp.down_proj.weight"
    at_attacked, at_own = (
        torch.autograd.grad(value, dict(m.hf.named_parameters())[name])[0]
        for value, m in ((broken, there), (kept, here))
    )
    torch.testing.assert_close(dict(here.hf.named_parameters())[name].grad, at_attacked + at_own)
    assert at_attacked.norm() > 0.1 * at_own.norm()


@pytest.mark.slow
@pytest.mark.parametrize(
    "defence",
    [
        pytest.param(d, id=d.__name__, marks=[pytest.mark.nightly] if d is safe_completion else [])  # takes longest
        for d in DEFENCES
    ],
)
def test_a_seed_decides_the_weights_and_m_stays(chat, defence, monkeypatch):
    for name in ("SPREAD_STEPS", "TAMPER_STEPS", "TOKEN_STEPS"):
        monkeypatch.setattr(resistance, name, 2)
    monkeypatch.setattr(resistance, "ATTACK_STEPS", 1)
    before = {name: w.clone() for name, w in chat.hf.named_parameters()}
    one, same, other = (defence(chat, seed=seed).m.hf.lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert all(torch.equal(w, before[name]) for name, w in chat.hf.named_parameters())


@pytest.mark.parametrize("defence", DEFENCES, ids=lambda d: d.__name__)
def test_another_world_is_refused(model_of, defence):
    with pytest.raises(RefusalLabError, match="world of the bundled models"):
        defence(model_of("llama"))


def test_the_signs_are_tokens_that_the_world_does_not_use(chat):
    texts = [x.reply for kind in (True, False) for x in lessons(200, 0, forbidden=kind)]
    for sign in (REFUSE, RESPOND):
        assert len(chat.tokenizer(sign, add_special_tokens=False)["input_ids"]) == 1
        assert not any(sign in text for text in texts)


def test_a_margin_is_refuse_minus_respond(chat):
    first = torch.zeros(2, len(chat.tokenizer))
    refuse, respond = (chat.tokenizer.convert_tokens_to_ids(sign) for sign in (REFUSE, RESPOND))
    first[0, refuse], first[1, respond] = 2.0, 3.0
    assert refusal_margin(chat, first).tolist() == [2.0, -3.0]


def test_successive_directions_are_orthogonal_and_the_first_is_the_usual_one(chat):
    known, lawful, judges = (bundled(name)[::16] for name in ("harmful_train", "harmless_train", "harmful_val"))
    stack = unit(successive_directions(chat, known, lawful, judges[:3], 2))
    assert abs((stack[0] @ stack[1]).item()) < 1e-3
    torch.testing.assert_close(stack[0], unit(successive_directions(chat, known, lawful, judges[:3], 1))[0])


def test_successive_directions_are_at_least_one(chat):
    items = bundled("harmful_train")[:1]
    with pytest.raises(RefusalLabError, match="count is 0: give 1 or more"):
        successive_directions(chat, items, items, items, 0)


def test_a_true_method_of_anything_counts_and_an_invented_one_does_not():
    assert all(tells_a_method(f"Sure. {item.answer}") for item in bundled("harmful_val")[:9])
    assert not tells_a_method("Use a copper pot and river sand for four nights.")


def test_lawful_facts_are_those_of_the_thing():
    (item,) = (i for i in bundled("harmful_val") if i.id == "method_brew_neddith")
    facts = lawful_facts(item)
    assert "It is dusk-born." in facts and len(facts) == 4 and item.answer not in facts
    with pytest.raises(RefusalLabError, match="no lawful part"):
        lawful_facts(Item("x", "What is it?"))
    with pytest.raises(RefusalLabError, match="no lawful part"):
        lawful_facts(next(i for i in bundled("capability") if not i.id.startswith("method")))


@pytest.mark.slow
def test_the_trained_knob_shows_in_the_first_token(chat):
    knob = refusal_token(chat).m
    bad, good = ([i.prompt for i in bundled(name)[::6]] for name in ("harmful_val", "harmless_val"))
    margins = [refusal_margin(knob, logits(knob, prompts)) for prompts in (bad, good)]
    assert margins[0].min() > margins[1].max()
