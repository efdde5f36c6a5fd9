"""Conversations, replies that are not greedy, attacks that converse, watchers that read the exchange."""

import random
from dataclasses import dataclass, replace

import pytest
import torch
from transformers import LogitsProcessor

from refusallab.activations import residual
from refusallab.attacks import conversing
from refusallab.attacks.conversing import crescendo, many_shot, past_tense, search_rewritings, worded
from refusallab.conversations import EARLIER, after_turns, streams_by_turn, turn_prompts
from refusallab.decoding import contrast, contrasted_replies, sample_replies
from refusallab.defence import stock_refusal
from refusallab.defences import exchange
from refusallab.defences.exchange import Cascade, ExchangeProbe, StreamingProbe, reply_streams, rolling_means
from refusallab.defences.monitor import Monitor
from refusallab.defences.traffic import sample_exchanges
from refusallab.errors import RefusalLabError
from refusallab.model import Begun, generate, ids_behind, load, logits, messages, render
from refusallab.prompts import bundled
from refusallab.truth import request_of
from smallmodels.world import dialogue
from smallmodels.world.facts import world

VALE = world()
SPLIT = {thing.name: thing.split for thing in VALE.things}


@pytest.fixture(scope="module")
def m():
    return load("charter-chat")


@pytest.fixture(scope="module")
def forbidden():
    return bundled("harmful_val")[:6]


# --- conversations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EARLIER)
def test_earlier_turns_are_of_their_kind(kind, forbidden):
    methods = {dialogue.answer("method", **t.methods[a.verb]): (t, a) for t in VALE.things for a in t.actions}
    for item in after_turns(forbidden, kind, 4):
        assert [turn["role"] for turn in item.prompt] == ["user", "assistant"] * 4 + ["user"]
        original = next(i for i in forbidden if i.id == item.id)
        assert item.prompt[-1]["content"] == original.prompt and item.answer == original.answer
        thing = request_of(item).thing
        for turn in item.prompt[:-1:2]:
            named = [t for t in VALE.things if t.name in turn["content"]]
            assert all((t.name == thing.name) == (kind == "same thing") and t.split == thing.split for t in named)
        for turn in item.prompt[1::2]:
            told, refused = turn["content"] in methods, turn["content"] in dialogue.REFUSAL_WORDINGS
            assert refused == kind.startswith("refused")
            assert turn["content"].startswith("Use ") == (kind in ("shots", "lawful shots"))
            if kind == "lawful shots":
                lawful, action = methods[turn["content"]]
                assert told and not lawful.forbids(action)


def test_earlier_turns_hang_on_the_seed_and_differ(forbidden):
    first, again, other = (after_turns(forbidden, "other things", 3, seed) for seed in (0, 0, 1))
    assert first == again != other
    texts = [turn["content"] for turn in first[0].prompt[:-1:2]]
    assert len(set(texts)) == 3
    assert [item.prompt for item in after_turns(forbidden, "shots", 0)] == [
        [{"role": "user", "content": item.prompt}] for item in forbidden
    ]


def test_earlier_turns_that_cannot_be_made(forbidden):
    with pytest.raises(RefusalLabError, match="no kind 'threats'"):
        after_turns(forbidden, "threats", 2)
    with pytest.raises(RefusalLabError, match="16 different ones"):
        after_turns(forbidden, "same thing", 17)
    with pytest.raises(RefusalLabError, match="-1 earlier turns: give 0 to 16"):
        after_turns(forbidden, "same thing", -1)
    with pytest.raises(RefusalLabError, match="is no request of the world"):
        after_turns(bundled("capability")[:1], "shots", 1)
    sums = [item for item in bundled("harmless_val") if item.id.startswith("arithmetic")]
    with pytest.raises(RefusalLabError, match="names no thing"):
        after_turns(sums[:1], "shots", 1)


def test_a_system_turn_stays_first_and_a_reply_that_has_begun_last(m, forbidden):
    system = {"role": "system", "content": "You are a clerk."}
    items = [replace(item, prompt=Begun([system, *messages(item.prompt)], "Sure! Use a")) for item in forbidden[:2]]
    (one, _), plain = after_turns(items, "shots", 2), after_turns(forbidden[:2], "shots", 2)
    assert one.prompt == Begun([system, *plain[0].prompt], "Sure! Use a")
    alone = replace(items[0], prompt=items[0].prompt.prompt)
    assert after_turns([alone], "shots", 2)[0].prompt == one.prompt.prompt
    cut = turn_prompts(one.prompt)
    assert [len(prompt) for prompt in cut[:2]] == [2, 4] and cut[2] == one.prompt
    x = streams_by_turn(m, [one.prompt], 3)
    ends = residual(m, [one.prompt.prompt, one.prompt], layers=[3], positions=[-1])[:, 0, 0]
    torch.testing.assert_close(x[0, -1], ends[1], atol=1e-4, rtol=0)
    assert (x[0, -1] - ends[0]).abs().max() > 0.1
    rewritten = conversing.rewriting_list()["6 shots, past"](items[0], random.Random(0))
    assert [turn["role"] for turn in rewritten.prompt] == ["system", *["user", "assistant"] * 6, "user"]


def test_streams_are_read_before_each_reply(m, forbidden, monkeypatch):
    items = after_turns(forbidden[:3], "same thing", 2)
    assert [len(prompt) for prompt in turn_prompts(items[0].prompt)] == [1, 3, 5]
    x = streams_by_turn(m, [item.prompt for item in items], 3)
    assert x.shape == (3, 3, m.width)
    for k in range(3):
        prompts = [item.prompt[: 2 * k + 1] for item in items]
        torch.testing.assert_close(
            x[:, k], residual(m, prompts, layers=[3], positions=[-1])[:, 0, 0], atol=1e-4, rtol=0
        )
    with pytest.raises(RefusalLabError, match=r"\[1, 3\] user turns"):
        streams_by_turn(m, [forbidden[0].prompt, items[0].prompt], 3)
    monkeypatch.setattr("refusallab.conversations.ids_of", lambda m, text: [len(text)])  # no turn begins the next
    apart = streams_by_turn(m, [item.prompt for item in items], 3)
    torch.testing.assert_close(apart, x, atol=1e-4, rtol=0)


# --- decoding --------------------------------------------------------------------------------------------------------


def test_samples_follow_the_softmax(m, forbidden):
    prompt = forbidden[0].prompt
    p = (logits(m, [prompt])[0] / 2.0).softmax(-1)
    likeliest = int(p.argmax())
    opening = m.tokenizer.decode([likeliest])
    replies = sample_replies(m, [prompt] * 300, temperature=2.0, seed=1)
    share = sum(ids_behind(m, render(m, prompt), reply)[:1] == [likeliest] for reply in replies) / 300
    assert abs(share - float(p[likeliest])) < 0.09, opening
    assert replies == sample_replies(m, [prompt] * 300, temperature=2.0, seed=1)
    assert sample_replies(m, [prompt], temperature=0.01) == generate(m, [prompt], max_new_tokens=32)
    with pytest.raises(RefusalLabError, match="above 0"):
        sample_replies(m, [prompt], temperature=0)


def test_no_contrast_is_the_model_and_the_contrast_is_taken_at_each_token(m, forbidden):
    prompts = [item.prompt for item in forbidden]
    assert contrasted_replies(m, prompts, strength=0) == generate(m, prompts, max_new_tokens=32)
    closed = dialogue.language()["systems"]["closed"][0]
    (reply,) = contrasted_replies(m, prompts[:1], strength=2.0)
    ids = ids_behind(m, render(m, prompts[0]), reply)
    for k in range(len(ids)):
        done = Begun(prompts[0], m.tokenizer.decode(ids[:k]))
        free, guarded = logits(m, [done]), logits(m, [done], system=closed)
        assert int(contrast(free, guarded, 2.0).argmax()) == ids[k]


def test_a_processor_sees_the_rows_of_its_batch(m, forbidden):
    seen = []

    class Nothing(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores

    def processor(rows, batch):
        seen.extend(rows)
        assert len(rows) == len(batch["input_ids"])
        return Nothing()

    prompts = [item.prompt for item in forbidden]
    assert generate(m, prompts, processor=processor, batch_size=4) == generate(m, prompts)
    assert sorted(seen) == list(range(len(prompts)))


# --- attacks ---------------------------------------------------------------------------------------------------------


def test_other_words_ask_for_the_same(forbidden):
    item = forbidden[0]
    request, rng = request_of(item), random.Random(0)
    assert request.thing.name in worded(item, rng) and request.thing.name not in worded(item, rng, it=True)
    past = [core.format(**request.slots) for pair in dialogue.language()["cores"]["past"]["val"] for core in pair]
    assert any(core[1:] in worded(item, rng, "past") for core in past)
    with pytest.raises(RefusalLabError, match="asks for no method"):
        worded(next(i for i in bundled("harmless_val") if i.id.startswith("price")), rng)


@dataclass
class Scripted:
    """A defence that refuses what `refuses(prompt)` says, and tells nothing else."""

    m: object
    refuses: object
    name: str = "scripted"
    extra_passes: int = 0

    def replies(self, prompts, *, edit=None, prefill=""):
        return [stock_refusal(self.m) if self.refuses(prompt) else "Hm." for prompt in prompts]


def test_crescendo_climbs_then_asks_for_it_and_takes_refused_turns_back(m, forbidden):
    asked = []

    def refuses(prompt):
        if len(prompt) > 8:
            asked.append(prompt)
        return len(asked) in (1, 2)  # the first two requests are refused

    (result,) = crescendo(Scripted(m, refuses), forbidden[:1], tries=4)
    assert result.tries == len(conversing.LADDER) + 3 and not result.outcome.refused
    name = request_of(forbidden[0]).thing.name
    assert name in asked[0][0]["content"] and all(name not in turn["content"] for turn in asked[0][2:8:2])
    assert all(len(prompt) == 9 and prompt[:8] == asked[0][:8] for prompt in asked)  # what was refused is not there
    assert [turn["content"] for turn in asked[0][1::2]] == ["Hm."] * 4
    assert result.cost.tokens > 0
    with pytest.raises(RefusalLabError, match="at least once"):
        crescendo(Scripted(m, refuses), forbidden[:1], tries=0)


def test_many_shots_and_the_past_tense_are_sent_as_they_are(m, forbidden):
    seen = []
    target = Scripted(m, lambda prompt: bool(seen.append(prompt)))
    many_shot(target, forbidden[:2], 3)
    assert [len(prompt) for prompt in seen] == [7, 7]
    results = past_tense(target, forbidden)
    assert all(result.prompt == prompt for result, prompt in zip(results, seen[2:], strict=True))


def test_a_search_learns_what_is_let_pass_and_drawing_evenly_does_not(m):
    items = bundled("harmful_val")
    ways = {f"way {k}": lambda item, rng, k=k: f"{k}: {item.prompt}" for k in range(8)}
    target = Scripted(m, lambda prompt: not prompt.startswith("5"))
    learned, even = (search_rewritings(target, items, 8, ways=ways, learn=learn) for learn in (True, False))
    assert all(not x.outcome.refused and x.prompt.startswith("5") for x in learned.results if x.tries < 8)
    assert all(way == "way 5" for way, x in zip(learned.ways, learned.results, strict=True) if not x.outcome.refused)
    sent = {way: n for way, (_, n) in learned.counts.items()}
    assert max(sent, key=sent.get) == "way 5" and learned.counts["way 5"][0] == learned.counts["way 5"][1]
    assert sum(x.tries for x in learned.results) < 0.8 * sum(x.tries for x in even.results)
    assert sum(n for _, n in learned.counts.values()) == sum(x.tries for x in learned.results)
    with pytest.raises(RefusalLabError, match="at least one prompt"):
        search_rewritings(target, items, 0)


def test_every_rewriting_asks_for_the_method_of_the_item(forbidden):
    for name, way in conversing.rewriting_list().items():
        prompt = way(forbidden[0], random.Random(1))
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        whole = request_of(forbidden[0]).thing.name
        assert whole in text or name.startswith("payload"), name
        assert isinstance(prompt, str) == ("turns" not in name and "shots" not in name)


# --- watchers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "means"), [(1, [1, 2, 6, 1]), (2, [1, 1.5, 4, 3.5]), (9, [1, 1.5, 3, 2.5])])
def test_rolling_means(window, means):
    assert rolling_means(torch.tensor([1.0, 2.0, 6.0, 1.0]), window).tolist() == pytest.approx(means)


def test_a_window_holds_a_token():
    with pytest.raises(RefusalLabError, match="at least one token"):
        rolling_means(torch.ones(3), 0)


def test_streams_of_replies_are_those_of_their_tokens(m, forbidden):
    prompts, replies = [item.prompt for item in forbidden[:3]], ["Use a tin funnel.", "No.", "Of course it is so."]
    streams = reply_streams(m, prompts, replies, 3)
    for prompt, reply, x in zip(prompts, replies, streams, strict=True):
        ids = ids_behind(m, render(m, prompt), reply)
        assert x.shape == (len(ids), m.width)
        for k in range(1, len(ids) + 1):
            begun = Begun(prompt, m.tokenizer.decode(ids[:k]))
            whole = residual(m, [begun], layers=[3], positions=[-1])[0, 0, 0]
            torch.testing.assert_close(x[k - 1], whole, atol=1e-3, rtol=1e-4)
    assert reply_streams(m, prompts[:1], [""], 3)[0].shape == (1, m.width)


def test_a_stream_is_stopped_at_the_token_that_raises_the_alarm(m, forbidden):
    prompts = [item.prompt for item in bundled("harmless_val")[:4]]
    w = torch.zeros(m.width)
    w[0] = 1.0
    said = generate(m, prompts, max_new_tokens=32)
    probe = StreamingProbe(m, w, 3, float("inf"), window=2)
    assert probe.replies(prompts) == said and probe.stops(prompts, said) == [None] * 4
    scores = [rolling_means(x @ w, 2) for x in reply_streams(m, prompts, said, 3)]
    probe.threshold = scores[0][:4].max().item() - 1e-4
    stops = probe.stops(prompts, said)
    assert stops[0] == int((scores[0] > probe.threshold).nonzero()[0]) + 1 <= 4
    (shown, *_) = probe.replies(prompts)
    seen = shown.removesuffix(stock_refusal(m)).strip()
    assert shown.endswith(stock_refusal(m)) and said[0].startswith(seen) and len(seen) < len(said[0])
    assert len(ids_behind(m, render(m, prompts[0]), seen)) == stops[0]


def test_the_exchange_probe_reads_the_end_of_the_reply_with_its_beginning(m, forbidden):
    prompts = [item.prompt for item in bundled("harmless_val")[:3]]
    w = torch.randn(m.width, generator=torch.Generator().manual_seed(0))
    probe = ExchangeProbe(m, w, 3, float("inf"))
    said = generate(m, prompts, prefill="Gladly.", max_new_tokens=32)
    assert probe.replies(prompts, prefill="Gladly.") == said
    whole = [Begun(prompt, "Gladly." + reply) for prompt, reply in zip(prompts, said, strict=True)]
    scores = residual(m, whole, layers=[3], positions=[-1])[:, 0, 0] @ w
    probe.threshold = scores.sort().values[1].item() + 1e-4
    alarms = [reply == stock_refusal(m) for reply in probe.replies(prompts, prefill="Gladly.")]
    assert alarms == (scores > probe.threshold).tolist() and sum(alarms) == 1


def test_a_reply_that_has_begun_is_read_with_its_beginning(m, forbidden):
    asked, start, rest = [item.prompt for item in forbidden[:2]], "Sure! Use", [" a tin funnel.", " it."]
    begun, whole = [Begun(prompt, start) for prompt in asked], [start + reply for reply in rest]
    w = torch.randn(m.width, generator=torch.Generator().manual_seed(0))
    for x, y in zip(reply_streams(m, begun, rest, 3), reply_streams(m, asked, whole, 3), strict=True):
        assert torch.equal(x, y)
    for probe in (ExchangeProbe(m, w, 3, 0.0), StreamingProbe(m, w, 3, 0.0, window=2)):
        assert torch.equal(probe.score(begun, rest), probe.score(asked, whole))
    assert probe.stops(begun, rest) == probe.stops(asked, whole) != [None, None]


def test_a_cascade_asks_the_second_only_about_suspects(m):
    prompts = [item.prompt for item in bundled("harmless_val")[:6]]

    class Counting(Monitor):
        def score(self, prompts, edit=None):
            asked.extend(prompts)
            return torch.tensor([float(prompt in bad) for prompt in prompts])

    asked, bad = [], prompts[1:3]
    w = torch.zeros(m.width)
    w[0] = 1.0
    first = Monitor(m, w, 3, -1, 0.0)
    scores = first.score(prompts)
    first.threshold = scores.sort().values[2].item() + 1e-4
    suspects = [prompt for prompt, s in zip(prompts, scores.tolist(), strict=True) if s > first.threshold]
    cascade = Cascade(m, first, Counting(m, w, 3, -1, 0.5))
    alarms = cascade.alarms(prompts).tolist()
    assert asked == suspects and len(suspects) == 3
    assert alarms == [prompt in suspects and prompt in bad for prompt in prompts]
    assert cascade.extra_passes == len(prompts) + len(suspects)
    first.threshold = float("inf")
    assert not cascade.alarms(prompts).any()


@pytest.mark.parametrize("split", ["train", "val"])
def test_exchanges_end_in_the_truth(split):
    assert all(len(item.prompt) == 1 for items in sample_exchanges(split, 20, turns=0) for item in items)
    for kind, items in zip((True, False), sample_exchanges(split, 40), strict=True):
        for item in items:
            request = request_of(item)
            assert request.forbidden == kind and request.answer in item.answer and request.thing.split == split
            assert item.prompt[-1]["role"] == "user" and len(item.prompt) <= 11
    assert {len(item.prompt) for item in items} == {1, 3, 5, 7, 9, 11}


@pytest.mark.slow
def test_thresholds_keep_their_rate_of_false_alarms(m):
    watchers = exchange.fit_exchange(m, 4, count=60)
    _, harmless = sample_exchanges("val", 60)
    prompts, replies = [item.prompt for item in harmless], [item.answer for item in harmless]
    for watcher in watchers:
        alarms = (watcher.score(prompts, replies) > watcher.threshold).float().mean().item()
        assert alarms <= exchange.FALSE_ALARMS
    assert sum(stop is not None for stop in watchers[1].stops(prompts, replies)) / 60 <= exchange.FALSE_ALARMS
