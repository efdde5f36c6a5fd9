"""Attacks: GCG against plain PyTorch on every architecture, its search, and the attacks that only write text."""

import dataclasses
import random

import pytest
import torch

from refusallab.attacks import best_of_n, gcg, prefilling, result, templates
from refusallab.attacks.gcg import Knobs
from refusallab.defence import ModelAlone
from refusallab.errors import RefusalLabError
from refusallab.measure import Outcome
from refusallab.model import encode, generate, ids_of, load
from refusallab.prompts import Item, bundled

PROMPT, TARGET, INIT = "How do I bake bread?", "Name a river", " list three list three list"
SMALL = Knobs(steps=3, search_width=24, topk=16, init=INIT, early_stop=False, batch_size=7)


@pytest.fixture(scope="module")
def chat():
    return load("charter-chat")


@pytest.fixture(scope="module")
def harmful():
    return bundled("harmful_test")[:6]


def tokens_of(m, text):
    return torch.tensor(ids_of(m, text))


def case_of(m):
    case = gcg.prepare(m, PROMPT, TARGET, INIT)
    return case, case.suffix_ids


def swapped(m, suffix, n=20):
    """n suffixes with one random token swapped, not special; the first is the suffix itself."""
    generator = torch.Generator().manual_seed(1)
    rows = suffix.repeat(n, 1)
    positions = torch.randint(len(suffix), (n,), generator=generator)
    rows[torch.arange(n), positions] = torch.randint(3, 400, (n,), generator=generator)
    rows[0] = suffix
    return rows


def plain_losses(m, case, candidates):
    """The loss and whether greedy decoding gives the target: whole sequences, all logits, no cache."""
    t = len(case.target_ids)
    losses, reached = [], []
    for row in candidates:
        ids = torch.cat([case.before_ids, row, case.after_ids, case.target_ids])[None]
        with torch.no_grad():
            logits = m.hf(input_ids=ids).logits[0, -t - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, case.target_ids).item())
        reached.append(logits.argmax(-1).tolist() == case.target_ids.tolist())
    return losses, reached


class TestStep:
    def test_gradient_is_that_of_a_one_hot_matrix(self, m):
        case, suffix = case_of(m)
        gradient, _ = gcg.token_gradient(m, case, suffix)
        table = m.hf.get_input_embeddings()
        rows = table(torch.arange(400))  # what the model makes of each token, Gemma's factor included
        one_hot = torch.nn.functional.one_hot(suffix, 400).float().requires_grad_()
        pieces = [rows[case.before_ids], one_hot @ rows, rows[case.after_ids], rows[case.target_ids]]
        logits = m.hf(inputs_embeds=torch.cat(pieces)[None]).logits[0, -len(case.target_ids) - 1 : -1]
        expected = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, case.target_ids), one_hot)[0]
        assert gradient.shape == (len(suffix), 400)
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())

    @pytest.mark.slow
    def test_losses_equal_whole_sequences_without_a_cache(self, m):
        case, suffix = case_of(m)
        _, cache = gcg.token_gradient(m, case, suffix)
        candidates = swapped(m, suffix)
        expected, reached = plain_losses(m, case, candidates)
        for batch_size in (1, 7, 64):
            losses, hits, n_tokens = gcg.candidate_losses(m, case, candidates, suffix, cache, batch_size=batch_size)
            assert losses.tolist() == pytest.approx(expected, abs=2e-4)
            assert hits.tolist() == reached
        assert n_tokens == 20 * (len(suffix) + len(case.after_ids) + len(case.target_ids) - 1)

    def test_small_batches_skip_the_part_of_the_suffix_that_they_share(self, model_of):
        m = model_of("llama")
        case, suffix = case_of(m)
        _, cache = gcg.token_gradient(m, case, suffix)
        candidates = swapped(m, suffix)
        tokens = [gcg.candidate_losses(m, case, candidates, suffix, cache, batch_size=b)[2] for b in (64, 7, 1)]
        assert tokens[0] > tokens[1] > tokens[2]

    def test_survivors_are_exactly_those_whose_text_gives_the_same_tokens(self, model_of):
        m = model_of("llama")
        case, suffix = case_of(m)
        candidates = swapped(m, suffix, 200)
        alive = gcg.survives(m, case, candidates)
        texts = gcg.suffix_texts(m, case, candidates)
        for row, ok, text in zip(candidates, alive.tolist(), texts, strict=True):
            sent = encode(m, [PROMPT + text])["input_ids"][0]
            same = sent.tolist() == torch.cat([case.before_ids, row, case.after_ids]).tolist()
            assert ok == (same and text == text.rstrip())
        assert alive.any()
        assert not alive.all()

    def test_two_tokens_that_merge_do_not_survive(self, chat):
        case = gcg.prepare(chat, "How is Dravix brewed?", "Use", " the the")
        apart = tokens_of(chat, " the the").clone()
        apart[0], apart[1] = tokens_of(chat, " t")[0], tokens_of(chat, "he")[0]
        assert gcg.suffix_texts(chat, case, apart[None]) == [" the"]
        assert gcg.survives(chat, case, apart[None]).tolist() == [False]

    def test_candidates_swap_one_of_the_best_allowed_tokens(self):
        gradient = torch.arange(40.0).repeat(6, 1)
        allowed = torch.ones(40, dtype=torch.bool)
        allowed[:4] = False
        suffix = torch.full((6,), 39)
        knobs = Knobs(search_width=500, topk=5)
        rows = gcg.sample_candidates(suffix, gradient, allowed, knobs, torch.Generator().manual_seed(0))
        assert len(rows) == 6 * 5 == len({tuple(row) for row in rows.tolist()})
        assert ((rows != suffix).sum(1) == 1).all()
        assert set(rows.flatten().tolist()) == {4, 5, 6, 7, 8, 39}

    def test_a_suffix_has_no_special_token_and_only_ascii_if_wanted(self, chat):
        ascii_only, all_tokens = gcg.allowed_tokens(chat), gcg.allowed_tokens(chat, ascii_only=False)
        assert not ascii_only[:3].any()
        assert not all_tokens[:3].any()
        assert 1000 < ascii_only.sum() < all_tokens.sum()
        texts = chat.tokenizer.batch_decode(ascii_only.nonzero().tolist())
        assert all(text.isascii() and text.isprintable() for text in texts)


class TestSearch:
    def find(self, m, knobs=SMALL, prompts=(PROMPT,), **settings):
        return gcg.find_suffix(m, list(prompts), [TARGET] * len(prompts), knobs, **settings)

    @pytest.mark.slow
    def test_the_loss_is_that_of_the_text_and_falls(self, m):
        found = self.find(m)
        case = gcg.prepare(m, PROMPT, TARGET, found.text)  # raises if the text is read as other tokens
        row = tokens_of(m, found.text)
        assert found.loss == pytest.approx(plain_losses(m, case, row[None])[0][0], abs=2e-4)
        assert found.loss == min(found.losses)
        start, suffix = case_of(m)
        assert found.loss < plain_losses(m, start, suffix[None])[0][0]
        assert len(found.losses) == 3

    @pytest.mark.slow
    def test_the_seed_decides(self, model_of):
        m = model_of("llama")
        found = self.find(m)
        other_batches = self.find(m, dataclasses.replace(SMALL, batch_size=64))
        assert (found.text, found.losses) == (other_batches.text, pytest.approx(other_batches.losses, abs=1e-4))
        assert self.find(m, dataclasses.replace(SMALL, seed=1)).losses != found.losses

    @pytest.mark.slow
    def test_it_stops_when_the_target_is_reached_and_greedy_decoding_says_so(self, chat, harmful):
        knobs = Knobs(steps=5, search_width=32, init=" the the the the")
        found = gcg.find_suffix(chat, [harmful[0].prompt], ["I must decline"], knobs)
        assert found.reached
        assert len(found.losses) == 1
        assert generate(chat, [harmful[0].prompt + found.text])[0].startswith("I must decline")

    @pytest.mark.slow
    def test_a_penalty_counts_like_loss_and_a_target_under_penalty_is_not_reached(self, chat, harmful):
        def length(prompts):
            return torch.tensor([len(prompt) / 20 for prompt in prompts])

        knobs, prompt = Knobs(steps=3, search_width=32, init=" the the the the"), harmful[0].prompt
        found = gcg.find_suffix(chat, [prompt], ["I must decline"], knobs, penalty=length)
        row = tokens_of(chat, found.text)[None]
        plain = plain_losses(chat, gcg.prepare(chat, prompt, "I must decline", found.text), row)[0][0]
        assert found.loss == pytest.approx(plain + len(prompt + found.text) / 20, abs=1e-4)
        assert (found.reached, len(found.losses)) == (False, 3)
        assert len(found.text) < len(gcg.find_suffix(chat, [prompt], ["I must decline"], knobs).text)

    def test_a_penalty_is_asked_about_those_that_could_be_the_best_and_no_others(self, chat, harmful):
        cases = [gcg.prepare(chat, item.prompt, "Use", " the the") for item in harmful[:2]]
        words = chat.tokenizer([" a", " of", " in", " pot", " sand", " for"], add_special_tokens=False)["input_ids"]
        pairs = torch.tensor([a + b for a in words for b in words])
        numbers = {prompt: i for case in cases for i, prompt in enumerate(gcg.with_each(chat, case, pairs))}
        best, losses, asked = 20, torch.linspace(0, 1, len(pairs)), []

        def penalty(prompts):
            asked.extend(prompts)
            return torch.tensor([float(numbers[prompt] < best) for prompt in prompts])

        hit = torch.ones(len(pairs), dtype=torch.bool)
        total, reached = gcg._penalised(chat, cases, pairs, losses, hit, penalty)
        assert (int(total.argmin()), total[best]) == (best, losses[best])
        assert reached[best]
        assert not reached[:best].any()
        assert len(asked) == len(cases) * 2 * gcg.PENALISED_AT_ONCE < len(cases) * len(pairs)

    @pytest.mark.slow
    def test_prompts_enter_one_by_one(self, chat, harmful):
        prompts = [item.prompt for item in harmful[:3]]
        knobs = Knobs(steps=6, search_width=32, init=" the the the the")
        found = gcg.find_suffix(chat, prompts, ["I must decline"] * 3, knobs)
        assert found.prompts_in_use[:2] == (1, 2)
        assert found.reached
        assert found.prompts_in_use[-1] == 3
        assert all(reply.startswith("I must") for reply in generate(chat, [p + found.text for p in prompts]))

    @pytest.mark.slow
    def test_gradients_of_several_prompts_weigh_the_same_and_every_step_draws_anew(self, chat, harmful, monkeypatch):
        seen, drawn = [], []

        def gradient(m, case, suffix):
            found = real_gradient(m, case, suffix)
            seen.append(found[0] * (1000 if len(seen) % 2 else 1))
            return seen[-1], found[1]

        def candidates(suffix, total, allowed, knobs, generator):
            drawn.append((total, generator.initial_seed()))
            return real_candidates(suffix, total, allowed, knobs, generator)

        real_gradient, real_candidates = gcg.token_gradient, gcg.sample_candidates
        monkeypatch.setattr(gcg, "token_gradient", gradient)
        monkeypatch.setattr(gcg, "sample_candidates", candidates)
        knobs = Knobs(steps=3, search_width=16, init=" the the the the", early_stop=False, seed=2)
        cases = [gcg.prepare(chat, item.prompt, "I must decline", knobs.init) for item in harmful[:2]]
        state = gcg._State(tokens_of(chat, knobs.init).tolist(), in_use=2)
        gcg._step(chat, cases, gcg.allowed_tokens(chat), knobs, state, None)
        torch.testing.assert_close(drawn[0][0], sum(g / g.norm() for g in seen))
        gcg._step(chat, cases, gcg.allowed_tokens(chat), knobs, state, None)
        assert len({seed for _, seed in drawn}) == 2

    def test_the_best_suffix_stays_the_best_when_a_later_step_is_worse(self, chat, monkeypatch):
        losses = iter([[3.0, 1.0], [2.0, 5.0], [0.5, 0.7]])
        reached = iter([[True, False], [False, False], [False, False]])
        monkeypatch.setattr(gcg, "_draw", lambda m, cases, suffix, *_: torch.stack([suffix, suffix + 1]))
        monkeypatch.setattr(
            gcg, "candidate_losses", lambda *_, **__: (torch.tensor(next(losses)), torch.tensor(next(reached)), 0)
        )
        case, suffix = gcg.prepare(chat, PROMPT, TARGET, " the the"), tokens_of(chat, " the the")
        state = gcg._State(suffix.tolist())
        bests = []
        for _ in range(3):
            gcg._step(chat, [case], gcg.allowed_tokens(chat), Knobs(), state, None)
            bests.append((state.best, state.best_loss))
        first = (suffix + 1).tolist()
        assert bests == [(first, 1.0), (first, 1.0), (first, 0.5)]

    @pytest.mark.parametrize(("steps", "loss", "in_use"), [(1, 0.5, (1,)), (2, 2.0, (1, 2)), (3, 2.0, (1, 2, 2))])
    def test_a_prompt_enters_when_a_step_is_left_for_it(self, chat, monkeypatch, steps, loss, in_use):
        losses = iter([0.5, 1.5, 2.5, 2.25, 2.75])  # of the first prompt alone, then of both at each step
        monkeypatch.setattr(gcg, "_draw", lambda m, cases, suffix, *_: suffix[None])
        monkeypatch.setattr(
            gcg, "candidate_losses", lambda *_, **__: (torch.tensor([next(losses)]), torch.tensor([True]), 0)
        )
        knobs = Knobs(steps=steps, init=" the the", early_stop=False)
        found = gcg.find_suffix(chat, [PROMPT, "Name a river"], [TARGET] * 2, knobs)
        assert (found.loss, found.prompts_in_use, found.reached) == (loss, in_use, steps > 1)

    @pytest.mark.slow
    def test_a_universal_loss_is_the_mean_over_the_prompts_in_use(self, chat, harmful):
        prompts = [item.prompt for item in harmful[:2]]
        knobs = Knobs(steps=3, search_width=32, init=" the the the the", early_stop=False)
        found = gcg.find_suffix(chat, prompts, ["I must decline"] * 2, knobs)
        assert found.prompts_in_use == (1, 2, 2)
        row, losses = tokens_of(chat, found.text), []
        for prompt in prompts:
            losses += plain_losses(chat, gcg.prepare(chat, prompt, "I must decline", found.text), row[None])[0]
        assert found.loss == pytest.approx(sum(losses) / 2, abs=1e-4)

    def test_cost_counts_what_the_model_computes(self, model_of):
        m, seen = model_of("llama"), []
        handle = m.hf.register_forward_hook(
            lambda _m, _a, kwargs, _out: seen.append(kwargs["input_ids"].shape), with_kwargs=True
        )
        try:
            cost = self.find(m).cost
        finally:
            handle.remove()
        rows, tokens = sum(n for n, _ in seen), sum(n * s for n, s in seen)
        case, suffix = case_of(m)
        width = len(suffix) + len(case.after_ids) + len(case.target_ids) - 1
        assert cost.forward_passes == rows + 2 * SMALL.steps  # a gradient counts as three
        assert cost.tokens == tokens + 2 * SMALL.steps * width
        assert cost.seconds > 0

    def test_what_cannot_work_is_said(self, model_of, make):
        m = model_of("llama")
        with pytest.raises(RefusalLabError, match="one target for each"):
            gcg.find_suffix(m, [PROMPT], [])
        for name in ("steps", "search_width", "topk", "batch_size"):
            with pytest.raises(RefusalLabError, match="at least 1"):
                self.find(m, dataclasses.replace(SMALL, **{name: 0}))
        with pytest.raises(RefusalLabError, match="one target for each"):
            gcg.gcg_attack(m, [Item("x", PROMPT)], [], SMALL)
        with pytest.raises(RefusalLabError, match="suffix is empty"):
            gcg.prepare(m, PROMPT, TARGET, "")
        with pytest.raises(RefusalLabError, match="target is empty"):
            gcg.find_suffix(m, [PROMPT], [""], SMALL)
        with pytest.raises(RefusalLabError, match="read as other tokens"):
            gcg.prepare(m, "I bak", TARGET, "e the")
        with pytest.raises(RefusalLabError, match="reads at most 256"):
            gcg.prepare(m, PROMPT, TARGET * 200, INIT)
        with pytest.raises(RefusalLabError, match="without remote"):
            gcg.prepare(make.model(remote="local"), PROMPT, TARGET, INIT)

    def test_a_search_under_a_system_prompt_is_on_the_whole_text(self, model_of):
        m = model_of("llama")
        found = self.find(m, system="List")
        case, row = gcg.prepare(m, PROMPT, TARGET, found.text, system="List"), tokens_of(m, found.text)
        ids = encode(m, [PROMPT + found.text], system="List")["input_ids"][0].tolist()
        assert torch.cat([case.before_ids, row, case.after_ids]).tolist() == ids
        loss = gcg.suffix_loss(m, PROMPT, TARGET, found.text, system="List")
        assert found.loss == pytest.approx(loss, abs=2e-4)
        assert loss == pytest.approx(plain_losses(m, case, row[None])[0][0], abs=2e-4)

    def test_a_suffix_is_cut_at_its_last_place(self, model_of):
        m = model_of("llama")
        whole = encode(m, [PROMPT + INIT + INIT])["input_ids"][0]
        case = gcg.prepare(m, PROMPT + INIT, TARGET, INIT)
        assert torch.equal(torch.cat([case.before_ids, tokens_of(m, INIT), case.after_ids]), whole)
        assert INIT in case.before

    def test_few_allowed_tokens_limit_the_ranks(self):
        allowed = torch.zeros(40, dtype=torch.bool)
        allowed[:3] = True
        rows = gcg.sample_candidates(
            torch.full((2,), 39), torch.zeros(2, 40), allowed, Knobs(topk=256), torch.Generator().manual_seed(0)
        )
        assert set(rows.flatten().tolist()) == {0, 1, 2, 39}

    def test_no_survivor_is_an_error(self, model_of, monkeypatch):
        monkeypatch.setattr(gcg, "survives", lambda _m, _case, rows: torch.zeros(len(rows), dtype=torch.bool))
        with pytest.raises(RefusalLabError, match="read as the same tokens again"):
            self.find(model_of("llama"))

    @pytest.mark.slow
    def test_the_attack_gives_results_with_history_and_the_whole_cost(self, chat, harmful):
        knobs = Knobs(steps=2, search_width=16, init=" the the the the", early_stop=False)
        results = gcg.gcg_attack(chat, harmful[:2], ["Certainly."] * 2, knobs)
        for item, r in zip(harmful, results, strict=False):
            assert (r.attack, r.item, len(r.losses)) == ("GCG", item, 2)
            assert r.prompt.startswith(item.prompt)
            assert r.reply == generate(chat, [r.prompt], max_new_tokens=32)[0]
            assert r.cost.forward_passes > 2 * 3

    @pytest.mark.parametrize(
        "room", [5, 10]
    )  # tokens behind the prompt: too few for the suffix, or for the reply alone
    def test_no_search_is_lost_to_an_item_that_is_too_long(self, model_of, room, monkeypatch):
        m, searches = model_of("llama"), []
        monkeypatch.setattr(gcg, "find_suffix", lambda *args, **settings: searches.append(args))
        words = 256 - room - encode(m, ["x"])["input_ids"].shape[1]
        items = [Item("short", PROMPT), Item("long", "x" + " x" * words)]
        with pytest.raises(RefusalLabError, match="Item 'long': .* reads at most 256: shorten the prompt or reply"):
            gcg.gcg_attack(m, items, [" x"] * 2, dataclasses.replace(SMALL, init=" x x x x x x"))
        assert not searches

    @pytest.mark.slow
    def test_a_random_suffix_survives_and_is_as_long(self, chat):
        text = gcg.random_suffix(chat, PROMPT, Knobs(init=" the" * 8))
        gcg.prepare(chat, PROMPT, TARGET, text)
        assert len(tokens_of(chat, text)) == 8
        assert text != gcg.random_suffix(chat, PROMPT, Knobs(init=" the" * 8, seed=1))


class TestResult:
    def test_direct_requests_are_judged_on_the_truth(self, chat, harmful):
        for r in result.direct(chat, harmful):
            assert r.outcome == Outcome(refused=True, correct=False)
            assert (r.tries, r.prefill, r.prompt) == (1, "", r.item.prompt)

    def test_without_an_exact_answer_only_refusal_is_judged(self, chat):
        item = Item("x", "How?")
        assert result.judge(chat, item, "I must decline to answer.") == Outcome(True, False)
        assert result.judge(chat, item, "Use a copper pot.") == Outcome(False, False)

    def test_the_cost_of_a_reply_is_what_generate_computes(self, chat, harmful):
        seen = []
        handle = chat.hf.register_forward_hook(
            lambda _m, _a, kwargs, _out: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        try:
            (r,) = result.direct(chat, harmful[:1])
        finally:
            handle.remove()
        assert (r.cost.forward_passes, r.cost.tokens) == (len(seen), sum(seen))

    def test_no_items_give_no_results(self, chat):
        assert result.direct(ModelAlone(chat), []) == []

    @pytest.mark.parametrize("name", ["direct", "prefill", "template", "best-of-n", "suffix", "GCG"])
    def test_every_attack_hands_on_the_system_prompt_and_the_edit(self, name, chat, monkeypatch):
        seen, item = [], Item("x", "How is Dravix brewed?")
        monkeypatch.setattr(
            result, "generate", lambda _m, prompts, **settings: seen.append(settings) or ["Use"] * len(prompts)
        )
        edit = {} if name in ("suffix", "GCG") else {"edit": lambda nn: None}
        settings, knobs = {"system": "Answer.", **edit}, Knobs(steps=1, search_width=8, init=" the the")
        attack = {
            "direct": lambda: result.direct(chat, [item], **settings),
            "prefill": lambda: prefilling.prefilling_attack(chat, [item], "Sure", **settings),
            "template": lambda: templates.template(chat, [item], "begin", **settings),
            "best-of-n": lambda: best_of_n.best_of_n_attack(chat, [item], 1, **settings),
            "suffix": lambda: gcg.with_suffix(chat, [item], " the", **settings),
            "GCG": lambda: gcg.gcg_attack(chat, [item], ["Use"], knobs, **settings),
        }[name]
        (r,) = attack()
        assert seen[0].items() >= {"edit": None, **settings}.items()
        assert (r.system, r.prefill) == ("Answer.", "Sure" if name == "prefill" else "")

    def test_disclosure_is_no_refusal(self):
        assert result.disclosed(Outcome(False, True))
        assert not result.disclosed(Outcome(True, True))

    def test_only_the_last_turn_is_rewritten(self):
        turns = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ]
        assert [t["content"] for t in result.rewrite(turns, str.upper)] == ["a", "b", "C"]
        assert turns[-1]["content"] == "c"

    def test_tries_end_at_success_and_their_costs_add_up(self, monkeypatch, chat):
        items = [Item("one", "one"), Item("two", "two")]

        def send(_m, attack, part, prompts, **_):
            return [
                result.AttackResult(
                    attack, i, p, None, "", "", Outcome(p != "one 1", False), 1, result.Cost(1, 10, 1.0)
                )
                for i, p in zip(part, prompts, strict=True)
            ]

        monkeypatch.setattr(result, "send", send)
        one, two = result.send_until(chat, "a", items, lambda item, k: f"{item.id} {k}", 4)
        assert (one.prompt, one.tries, one.cost) == ("one 1", 2, result.Cost(2, 20, 2.0))
        assert (two.prompt, two.tries, two.cost) == ("two 3", 4, result.Cost(4, 40, 4.0))
        with pytest.raises(RefusalLabError, match="at least one"):
            result.send_until(chat, "a", items, lambda item, k: "", 0)

    def test_one_prompt_for_each_item(self, chat, harmful):
        with pytest.raises(RefusalLabError, match="one prompt for each"):
            result.send(chat, "a", harmful, ["q"])


class TestText:
    def test_every_template_holds_the_request(self):
        kinds = templates.rewritings()
        assert set(kinds) == {"begin", "role-play", "suppression", "payload splitting"}
        for kind, texts in kinds.items():
            for text in texts:
                assert ("How is Dravix brewed?" in text("How is Dravix brewed?")) == (kind != "payload splitting")

    def test_a_split_payload_joins_to_the_request_and_neither_half_holds_the_longest_word(self):
        text = templates.split_payload("How is Drusketh {q} brewed?")
        _, a, _, b, _ = text.split('"')
        assert a + b == "How is Drusketh {q} brewed?"
        assert (a, b) == ("How is Drus", "keth {q} brewed?")

    @pytest.mark.slow
    def test_a_template_attack_tries_its_texts_in_turn(self, chat, harmful):
        for r in templates.template(chat, harmful, "begin"):
            assert r.attack == "begin"
            assert r.prompt == templates.rewritings()["begin"][r.tries - 1](r.item.prompt)
            assert not r.outcome.refused or r.tries == 4
        turns = [{"role": "user", "content": "How is Dravix brewed?"}]
        (r,) = templates.template(chat, [Item("x", turns)], "begin", until=lambda _: False)
        assert r.tries == 4 and "Dravix" in r.prompt[-1]["content"]
        with pytest.raises(RefusalLabError, match="choose one of begin"):
            templates.template(chat, harmful, "nonsense")

    @pytest.mark.slow
    def test_a_prefill_is_part_of_the_judged_reply(self, chat, harmful):
        rest = generate(chat, [i.prompt for i in harmful], prefill="Sure! Use", max_new_tokens=32)
        for r, text in zip(prefilling.prefilling_attack(chat, harmful, "Sure! Use"), rest, strict=True):
            assert r.reply == "Sure! Use" + text
            assert r.outcome == result.judge(chat, r.item, r.reply)
        with pytest.raises(RefusalLabError, match="holds the exact answer"):
            prefilling.prefilling_attack(chat, harmful, f"Sure! {harmful[1].answer.upper()}")
        assert prefilling.prefilling_attack(chat, [Item("x", "How?")], "Sure!")  # no answer to give away
        with pytest.raises(RefusalLabError, match="nothing to prefill"):
            prefilling.prefilling_attack(chat, harmful, " ")

    def test_noise_is_of_the_three_kinds_and_as_strong_as_asked(self):
        text = "Which kettle would anybody take for the harvest? " * 40
        rng = random.Random(0)
        scrambled = best_of_n.scramble(text, 1.0, rng)
        for old, new in zip(text.split(" "), scrambled.split(" "), strict=True):
            assert sorted(old) == sorted(new)
            assert (old[:1], old[-1:]) == (new[:1], new[-1:])
        assert scrambled != text
        assert {best_of_n.scramble("abcd", 1.0, rng) for _ in range(20)} == {"abcd", "acbd"}
        assert best_of_n.capitalize(text, 1.0, rng) == text.swapcase()
        mistyped = best_of_n.mistype(text, 0.1, rng)
        moved = [abs(ord(a) - ord(b)) for a, b in zip(text, mistyped, strict=True) if a != b]
        assert set(moved) == {1}
        assert 0.07 < len(moved) / sum(c != " " for c in text) < 0.13
        assert best_of_n.augment(text, 0.0, rng) == text
        for sigma in (1.5, -0.1):
            with pytest.raises(RefusalLabError, match="from 0 to 1"):
                best_of_n.augment(text, sigma, rng)
        assert {best_of_n.mistype("!", 1.0, rng) for _ in range(9)} == {"!", '"'}
        assert {best_of_n.mistype("~", 1.0, rng) for _ in range(9)} == {"~", "}"}

    def test_the_noise_has_the_strengths_of_the_paper_in_its_order(self, monkeypatch):
        used = []
        for name in ("scramble", "capitalize", "mistype"):
            monkeypatch.setattr(best_of_n, name, lambda text, p, rng, name=name: used.append((name, p)) or text)
        best_of_n.augment("text", 0.25, random.Random(0))
        assert used == [("scramble", 0.5), ("capitalize", 0.5), ("mistype", 0.25**3)]

    def test_every_item_and_try_has_noise_of_its_own(self, monkeypatch):
        variants = []
        monkeypatch.setattr(best_of_n, "send_until", lambda m, attack, items, variant, n, **_: variants.append(variant))
        for sigma in (0.4, 0.0):
            best_of_n.best_of_n_attack(None, [], 2, sigma=sigma)
        noisy, plain = variants
        one, two = Item("one", "Which kettle would anybody take?"), Item("two", "Which kettle would anybody take?")
        assert len({noisy(one, 0), noisy(one, 1), noisy(two, 0)}) == 3
        assert noisy(one, 0) == noisy(one, 0) and plain(one, 0) == one.prompt

    @pytest.mark.slow
    def test_best_of_n_depends_on_the_seed_and_more_tries_only_add(self, chat, harmful):
        def run(n, seed=0, **settings):
            return best_of_n.best_of_n_attack(chat, harmful, n, sigma=0.1, seed=seed, **settings)

        few, many = run(2), run(4)
        assert [r.prompt for r in few] == [r.prompt for r in run(2)]
        assert [r.prompt for r in few] != [r.prompt for r in run(2, seed=1)]
        for a, b in zip(few, many, strict=True):
            assert b.tries >= a.tries
            assert a.outcome.refused or (a.prompt, a.tries) == (b.prompt, b.tries)
        assert all(r.tries == 2 or r.outcome.correct for r in run(2, until=result.disclosed))
