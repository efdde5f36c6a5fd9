"""Hardening: lessons of the train split alone, the losses, the training; and the white-box attacks on the result."""

import copy
import dataclasses
from itertools import islice

import pytest
import torch

from refusallab.activations import residual
from refusallab.attacks import white_box
from refusallab.defences import training
from refusallab.defences.training import DEFENCES, away, extend, harden, lessons, refat_loss, rerouting_loss, stay
from refusallab.directions import candidate_directions
from refusallab.errors import RefusalLabError
from refusallab.finetuning import finetune, reply_loss, shuffled, train_copy
from refusallab.interventions import ablation, unit
from refusallab.judging import REPLY_TOKENS, outcomes
from refusallab.measure import Outcome, cross_entropy, outcome
from refusallab.model import load, logits, wrap
from refusallab.prompts import bundled, refusal_phrases
from smallmodels.world.facts import world


@pytest.fixture(scope="module")
def chat():
    return load("charter-chat")


@pytest.fixture(scope="module")
def some():
    return {kind: lessons(300, 0, forbidden=kind) for kind in (True, False)}


def spoken(lesson):
    return " ".join([*(turn["content"] for turn in lesson.prompt), lesson.reply, lesson.answer, lesson.overview])


class TestLessons:
    def test_they_name_no_thing_that_is_held_out(self, some):
        held_out = [thing.name for thing in world().things if thing.split != "train"]
        told = [spoken(x) for part in some.values() for x in part]
        assert not [name for name in held_out if any(name in text for text in told)]
        names = [thing.name for thing in world().things if thing.split == "train"]
        assert sum(any(name in text for name in names) for text in told) > 0.8 * len(told)

    def test_they_are_none_of_the_prompts_of_the_test_sets(self, some):
        asked = {x.prompt[-1]["content"] for part in some.values() for x in part}
        sets = ("harmful_val", "harmful_test", "harmless_val", "harmless_test", "borderline")
        assert not asked & {item.prompt for name in sets for item in bundled(name) if isinstance(item.prompt, str)}

    @pytest.mark.slow
    def test_forbidden_ones_are_refused_and_harmless_ones_answered(self, some, chat):
        phrases = refusal_phrases(chat)
        assert all(x.forbidden and outcome(x.reply, x.answer, phrases) == Outcome(True, False) for x in some[True])
        answered = [
            not x.forbidden and outcome(x.reply, x.answer, phrases) == Outcome(False, True) for x in some[False]
        ]
        assert sum(answered) > 0.7 * len(answered)  # the others stand under a system prompt that has all refused

    def test_a_seed_gives_the_same_ones_again(self, some):
        assert lessons(300, 0, forbidden=True) == some[True]
        assert lessons(300, 1, forbidden=True) != some[True]


class TestExtendedRefusal:
    def test_it_is_a_refusal_that_tells_nothing_and_fits_into_a_reply(self, some, chat):
        for x, text in zip(some[True], extend(some[True]), strict=True):
            assert text.startswith(x.overview) and text.endswith("Ruled out by the Charter.")
            assert outcome(text, x.answer, refusal_phrases(chat)) == Outcome(True, False)
            assert len(chat.tokenizer(text)["input_ids"]) <= REPLY_TOKENS

    def test_harmless_replies_stay(self, some):
        assert extend(some[False]) == [x.reply for x in some[False]]


class TestLosses:
    def test_refat_adds_a_term_under_ablation_and_one_without(self, some, chat):
        r = residual(chat, ["Where is Marn?"], layers=[4], positions=[-1])[0, 0, 0]  # to ablate it changes much
        bad, good = some[True][:3], some[False][:3]
        losses = [
            cross_entropy(chat, [x.reply for x in part], [x.prompt for x in part], edit=edit).mean()
            for part, edit in ((bad, ablation(r)), (good, None), (bad, None))
        ]
        value = refat_loss(chat, bad, good, r).item()
        assert value == pytest.approx((losses[0] + losses[1]).item(), abs=1e-4)
        assert abs(losses[0] - losses[2]) > 1e-3  # the ablation matters here

    def test_the_gradient_goes_through_the_edit(self, some, chat):
        r = torch.randn(chat.width, generator=torch.Generator().manual_seed(0)).requires_grad_()
        x = some[True][0]
        (gradient,) = torch.autograd.grad(reply_loss(chat, [x.prompt], [x.reply], ablation(r)), r)
        assert gradient.norm() > 0

    def test_away_is_the_positive_part_of_the_cosine_of_counted_tokens(self):
        old = torch.tensor([[[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [5.0, 0.0]]]])
        new = torch.tensor([[[[3.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [1.0, 0.0]]]])
        counted = torch.tensor([[True, True, True, False]])
        assert away(new, old, counted).item() == pytest.approx(1 / 3)
        assert stay(new, old, counted).item() == pytest.approx((4 + 4 + 5) / 3)
        assert stay(old, old, counted) == 0

    @pytest.mark.slow
    def test_rerouting_starts_at_full_likeness_with_a_finite_gradient(self, some, chat):
        def loss(m):
            return rerouting_loss(m, chat, some[True][:4], some[False][:4])

        assert loss(chat).item() == pytest.approx(training.AWAY, rel=1e-3)
        moved = train_copy(chat, loss, steps=2, lr=1e-3, name="moved")
        assert all(value.isfinite().all() for value in moved.hf.state_dict().values())


class TestHarden:
    @pytest.mark.slow
    @pytest.mark.parametrize("defence", DEFENCES)
    def test_a_copy_is_trained_and_the_seed_decides(self, defence, chat, monkeypatch):
        monkeypatch.setattr(training, "BATCH_SIZE", 2)
        before = copy.deepcopy(chat.hf.state_dict())
        runs = [harden(chat, defence, steps=2, seed=seed) for seed in (0, 0, 1)]
        assert all(torch.equal(value, before[key]) for key, value in chat.hf.state_dict().items())
        last = [logits(run.m, ["Where is Marn?"]) for run in runs]
        assert torch.equal(last[0], last[1]) and not torch.equal(last[0], last[2])
        assert not torch.equal(last[0], logits(chat, ["Where is Marn?"]))
        assert runs[0].name == defence and len(runs[0].replies(["Where is Marn?"])) == 1

    def test_unknown_defences_and_models_are_named(self, chat, model_of):
        with pytest.raises(RefusalLabError, match="choose one of extended refusal, ReFAT, rerouting"):
            harden(chat, "prayer")
        with pytest.raises(RefusalLabError, match="world of the bundled models"):
            harden(model_of("llama"), "ReFAT")

    def test_the_rate_falls_with_decay(self, model_of, monkeypatch):
        rates, step = [], torch.optim.AdamW.step

        def noted(optimizer, *args, **settings):
            rates.append(optimizer.param_groups[0]["lr"])
            return step(optimizer, *args, **settings)

        monkeypatch.setattr(torch.optim.AdamW, "step", noted)
        loss = lambda m: reply_loss(m, ["Name a river"], ["bread"])  # noqa: E731
        train_copy(model_of("llama"), loss, steps=2, lr=1e-3, name="x", decay=True)
        assert rates == pytest.approx([1e-3, 0.51e-3])

    def test_without_a_gradient_the_weights_stay(self, model_of):
        m = model_of("llama")
        tuned = train_copy(m, lambda copied: 0 * reply_loss(copied, ["List"], ["bread"]), steps=1, lr=0.1, name="still")
        before = m.hf.state_dict()
        assert all(torch.equal(value, before[key]) for key, value in tuned.hf.state_dict().items())
        assert tuned.name == "still" and all(p.grad is None for p in tuned.hf.parameters())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_trained_in_float32_and_rounded_once(self, dtype, make):
        hf = make.hf("llama-tied").to(dtype)
        m = wrap(hf, make.tokenizer(), "half")
        wide = wrap(copy.deepcopy(hf).float(), m.tokenizer, "wide")
        before = copy.deepcopy(hf.state_dict())
        loss = lambda copied: reply_loss(copied, ["Name a river"], ["bread"])  # noqa: E731
        tuned, whole = (train_copy(each, loss, steps=3, lr=1e-4, name="tuned") for each in (m, wide))
        for key, value in tuned.hf.state_dict().items():
            assert value.dtype == dtype and torch.equal(value, whole.hf.state_dict()[key].to(dtype))
        assert not torch.equal(tuned.hf.lm_head.weight, before["lm_head.weight"])
        assert tuned.hf.lm_head.weight is tuned.hf.model.embed_tokens.weight and tuned.name == "tuned"
        assert all(torch.equal(value, before[key]) for key, value in hf.state_dict().items())

    def test_a_loss_that_is_not_finite_ends_the_training(self, model_of):
        with pytest.raises(RefusalLabError, match="step 1.*nan.*smaller lr"):
            losses = iter([1.0, float("nan")])
            train_copy(
                model_of("llama"),
                lambda copied: next(losses) * reply_loss(copied, ["Name a river"], ["bread"]),
                steps=2,
                lr=1e-3,
                name="x",
            )

    def test_a_remote_model_is_not_trained(self, model_of):
        remote = dataclasses.replace(model_of("llama"), remote=True)
        with pytest.raises(RefusalLabError, match="load it locally"):
            train_copy(remote, lambda m: reply_loss(m, ["List"], ["bread"]), steps=1, lr=1e-3, name="x")

    def test_batches_are_full_and_every_number_comes_once_a_round(self):
        batches = list(islice(shuffled(5, 2, 0), 5))
        numbers = sum(batches, [])
        assert [len(rows) for rows in batches] == [2] * 5
        assert sorted(numbers[:5]) == sorted(numbers[5:]) == [0, 1, 2, 3, 4]


class TestWhiteBox:
    @pytest.mark.slow
    def test_extraction_takes_the_candidate_that_frees_the_answers(self, chat):
        known, lawful, items = bundled("harmful_train")[:24], bundled("harmless_train")[:24], bundled("harmful_val")[:6]
        found = white_box.re_extract(chat, known, lawful, items)
        assert found.loss == white_box.release_loss(chat, items, found.vector)
        vectors = candidate_directions(chat, [i.prompt for i in known], [i.prompt for i in lawful])
        assert torch.equal(found.vector, vectors[found.layer, chat.positions.index(found.position)])
        untouched = cross_entropy(chat, [i.answer for i in items], [i.prompt for i in items]).mean()
        assert found.loss < 0.5 * untouched
        assert sum(o.correct for o in outcomes(chat, items, edit=ablation(found.vector))) >= 4

    def test_two_equal_sets_have_no_direction(self, chat):
        items = bundled("harmful_train")[:2]
        with pytest.raises(RefusalLabError, match="prompts of two kinds"):
            white_box.re_extract(chat, items, items, items)

    @pytest.mark.slow
    def test_a_direction_by_gradient_is_that_of_its_steps_on_both_sets(self, chat):
        harmful, harmless, items = (
            bundled("harmful_train")[:4],
            bundled("harmless_train")[:4],
            bundled("harmful_val")[:2],
        )
        start = 3 * torch.randn(chat.width, generator=torch.Generator().manual_seed(3))
        settings = {"steps": 2, "lr": 0.1, "batch_size": 2, "seed": 1}
        found = white_box.gradient_direction(chat, harmful, harmless, items, start, **settings)
        u = unit(start)
        for rows in islice(shuffled(4, 2, 1), 2):
            both = [part[i] for part in (harmful, harmless) for i in rows]
            u = white_box.descend(chat, u, [i.prompt for i in both], [i.answer for i in both], 0.1)
        torch.testing.assert_close(found.vector, u)
        assert found.loss == pytest.approx(white_box.release_loss(chat, items, u), abs=1e-5)

    def test_a_step_goes_down_and_stays_on_the_sphere(self, chat):
        items = bundled("harmful_train")[:4]
        texts = [i.prompt for i in items], [i.answer for i in items]
        u = torch.nn.functional.normalize(torch.randn(chat.width, generator=torch.Generator().manual_seed(3)), dim=0)
        given = u.clone()
        losses = [reply_loss(chat, *texts, ablation(v)).item() for v in (u, white_box.descend(chat, u, *texts, 0.05))]
        assert losses[1] < losses[0] and torch.equal(u, given)
        assert white_box.descend(chat, u, *texts, 0.05).norm().item() == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(white_box.descend(chat, u, *texts, 0.0), u)

    @pytest.mark.slow
    def test_the_curve_of_fine_tuning_starts_at_the_model_and_leaves_it(self, chat):
        known, items = bundled("harmful_train")[:4], bundled("harmful_val")[:6]
        before = copy.deepcopy(chat.hf.state_dict())
        curve = white_box.steps_to_break(chat, known, items, (0, 1, 12), batch_size=4, lr=3e-4)
        assert sorted(curve) == [0, 1, 12] and curve[0] == outcomes(chat, items)
        assert sum(o.refused for o in curve[12]) < sum(o.refused for o in curve[0])
        assert all(torch.equal(value, before[key]) for key, value in chat.hf.state_dict().items())

    @pytest.mark.slow
    def test_the_curve_looks_at_the_copy_after_so_many_steps(self, chat, monkeypatch):
        monkeypatch.setattr(white_box, "outcomes", lambda m, _items: logits(m, ["Where is Marn?"]))
        known, settings = bundled("harmful_train")[:4], {"lr": 3e-4, "batch_size": 2, "seed": 1}
        curve = white_box.steps_to_break(chat, known, [], (1, 2), **settings)
        for steps, seen in curve.items():
            tuned = finetune(chat, [i.prompt for i in known], [i.answer for i in known], steps=steps, **settings)
            assert torch.equal(seen, logits(tuned.model, ["Where is Marn?"]))

    @pytest.mark.parametrize("steps", [[], [-1, 2]])
    def test_the_curve_needs_numbers_of_steps(self, chat, steps):
        with pytest.raises(RefusalLabError, match="say after which numbers of steps"):
            white_box.steps_to_break(chat, bundled("harmful_train")[:4], [], steps)

    def test_broken_means_answers_that_are_told(self):
        told, both, wrong, refused = (
            Outcome(False, True),
            Outcome(True, True),
            Outcome(False, False),
            Outcome(True, False),
        )
        curve = {9: [told, told], 0: [refused, refused], 2: [wrong, wrong], 5: [both, refused]}
        assert white_box.broken_at(curve, 0.5) == 5
        assert white_box.broken_at(curve, 1.0) == 9
        assert white_box.broken_at({0: [refused], 4: [wrong]}, 0.5) is None
