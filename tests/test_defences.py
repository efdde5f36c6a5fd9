"""Defences at run time: what each reads, blocks and costs; the thresholds; the matrix of attacks on all of them."""

import copy
import random
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from refusallab import cli
from refusallab.activations import residual
from refusallab.attacks.gcg import hiding_from
from refusallab.attacks.result import direct, send
from refusallab.defence import AnyOf, ModelAlone, Watcher, passes, stock_refusal
from refusallab.defences import integrity
from refusallab.defences import matrix as evaluation
from refusallab.defences.conditional import ConditionalSteering, conditional_addition
from refusallab.defences.exchange import ExchangeProbe, exchange_defences, fit_exchange
from refusallab.defences.integrity import hide, quietest
from refusallab.defences.monitor import Monitor, linear_probe
from refusallab.defences.perplexity import WINDOW, PerplexityFilter, count_bigrams, worst_window
from refusallab.defences.prompting import SAFETY, SelfReminder, SystemPrompt
from refusallab.defences.resistance import spread_refusal
from refusallab.defences.runtime import FALSE_ALARMS, fit_filter, run_time_defences
from refusallab.defences.smoothing import SmoothLLM, perturb, vote
from refusallab.defences.thinking import recovering
from refusallab.defences.thresholds import roc, threshold_at
from refusallab.defences.traffic import sample_exchanges
from refusallab.defences.training import harden
from refusallab.errors import RefusalLabError
from refusallab.interventions import ablation, addition, unit
from refusallab.model import generate, load, logits, wrap
from refusallab.orthogonalization import orthogonalize
from refusallab.prompts import bundled
from smallmodels.world import dialogue
from smallmodels.world.facts import world

PROMPTS = [item.prompt for item in bundled("harmless_val")[:3]]


@pytest.fixture(scope="module")
def m():
    return load("charter-chat")


@pytest.fixture(scope="module")
def r(m):
    return evaluation.difference_at(m, 5, -1)


@pytest.mark.parametrize(
    "fit",
    [
        lambda m: run_time_defences(m, torch.ones(64), 5),
        lambda m: count_bigrams(m, ["a"]),
        lambda m: fit_exchange(m, 5),
        lambda m: exchange_defences(m, 5, -1),
        recovering,
        lambda m: harden(m, "extended refusal"),
        spread_refusal,
    ],
)
@pytest.mark.parametrize(("world", "known"), [("part of the vale", "a part"), (None, "nothing")])
def test_lessons_and_traffic_are_for_models_that_know_the_whole_world(fit, world, known):
    m = SimpleNamespace(name="charter-smol", hf=SimpleNamespace(config=SimpleNamespace(world=world)))
    with pytest.raises(RefusalLabError, match=f"of which charter-smol knows {known}: give a bundled model"):
        fit(m)


# --- the words around a request ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_model_alone_answers_as_the_model_does(m, r):
    expected = generate(m, PROMPTS, edit=ablation(r), prefill="Use", max_new_tokens=32, batch_size=128)
    assert ModelAlone(m).replies(PROMPTS, edit=ablation(r), prefill="Use") == expected
    assert ModelAlone(m).replies([]) == []


@pytest.mark.slow
def test_a_system_prompt_stands_unless_the_prompt_brings_its_own(m):
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPTS[0]}]
    replies = SystemPrompt(m).replies([PROMPTS[1], own])
    assert replies[0] == generate(m, [PROMPTS[1]], system=SAFETY, max_new_tokens=32)[0]
    assert replies[1] == generate(m, [own], max_new_tokens=32)[0]


@pytest.mark.slow
def test_a_reminder_goes_around_the_last_turn(m):
    d = SelfReminder(m, reminder="Mind the law. {q} Thanks.")
    assert d.replies(PROMPTS[:1]) == generate(m, [f"Mind the law. {PROMPTS[0]} Thanks."], max_new_tokens=32)


# --- filter, votes, monitor -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("surprise", "window", "worst"), [([1, 1, 5, 7], 2, 6), ([1, 3], 8, 2), ([4, 1, 1], 1, 4)])
def test_the_worst_window(surprise, window, worst):
    assert worst_window(torch.tensor(surprise, dtype=torch.float), window) == worst


def test_an_empty_request_has_no_window():
    with pytest.raises(RefusalLabError, match="needs a token"):
        worst_window(torch.empty(0))


def test_bigrams_are_probabilities_and_what_was_counted_surprises_less(m):
    reader = count_bigrams(m, PROMPTS)
    torch.testing.assert_close(reader.log_p.exp().sum(1), torch.ones(m.vocab_size + 1), atol=1e-4, rtol=0)
    shuffled = PROMPTS[0].split()
    random.Random(0).shuffle(shuffled)
    assert reader.surprise(PROMPTS[0]).mean() + 1 < reader.surprise(" ".join(shuffled)).mean()


@pytest.mark.slow
def test_the_filter_blocks_what_surprises_and_passes_the_rest(m):
    d = PerplexityFilter(m, count_bigrams(m, PROMPTS).surprise, threshold=0.0, passes_each=1)
    d.threshold = d.score(PROMPTS).max().item()
    replies = d.replies([*PROMPTS, "zq!! ]] xv zq"])
    assert replies[:-1] == ModelAlone(m).replies(PROMPTS) and replies[-1] == stock_refusal(m)
    assert d.extra_passes == 4


def test_a_filter_is_fitted_on_the_words_that_it_reads(m):
    (bad, good), (_, val) = sample_exchanges("train", 30), sample_exchanges("val", 100)
    d = fit_filter(m, [*bad, *good], val)
    assert d.alarms([item.prompt for item in val]).float().mean() <= FALSE_ALARMS
    alone = [[replace(i, prompt=i.prompt[-1]["content"]) for i in items] for items in ([*bad, *good], val)]
    assert d.threshold == fit_filter(m, *alone).threshold


@pytest.mark.parametrize(
    ("refused", "place"), [([True, False, False], 1), ([False, True], 1), ([True], 0), ([False], 0)]
)
def test_the_vote(refused, place):
    assert vote(refused) == place


def test_no_votes():
    with pytest.raises(RefusalLabError, match="no reply"):
        vote([])


def test_a_copy_has_the_asked_share_of_characters_changed():
    text = "a" * 200
    noisy = perturb(text, 0.1, random.Random(1))
    assert len(noisy) == 200 and 15 <= sum(a != b for a, b in zip(text, noisy, strict=True)) <= 20
    assert perturb(text, 0.0, random.Random(1)) == text
    with pytest.raises(RefusalLabError, match="lies between 0 and 1"):
        perturb(text, 1.5, random.Random(1))


def test_smoothing_counts_the_passes_of_the_copies_that_are_thrown_away(m):
    d = SmoothLLM(m, copies=3, share=0.0)
    replies = d.replies(PROMPTS[:2])
    assert replies == ModelAlone(m).replies(PROMPTS[:2])
    assert d.extra_passes == 2 * passes(m, replies)


def test_a_thought_costs_passes_too(m):
    thinking = SimpleNamespace(tokenizer=m.tokenizer, thought_tokens=80)
    reply = " ".join(["river"] * 60)
    tokens = len(m.tokenizer(reply, add_special_tokens=False)["input_ids"])
    assert passes(thinking, [reply]) == tokens + 1 > passes(m, [reply]) == 32


def test_a_probe_separates_along_the_whitened_difference():
    g = torch.Generator().manual_seed(0)
    scale = torch.tensor([9.0, 1.0, 1.0, 1.0])
    harmful, harmless = (
        torch.randn(400, 4, generator=g) * scale + shift for shift in (0.0, torch.tensor([0, 2.0, 0, 0]))
    )
    w = linear_probe(harmful, harmless, shrinkage=0.0)
    assert w[1] < 0 and abs(w[0]) < 0.1 * abs(w[1])
    with pytest.raises(RefusalLabError, match="two or more"):
        linear_probe(harmful[:1], harmless)
    with pytest.raises(RefusalLabError, match="all alike within each kind: take a later layer"):
        linear_probe(torch.full((97, 4), 1 / 3).double(), torch.full((300, 4), 1 / 3, dtype=torch.float64))


@pytest.mark.slow
def test_a_monitor_reads_the_request_under_the_attackers_edit_and_not_the_prefill(m, r):
    d = Monitor(m, r / r.norm(), 5, -1, threshold=0.0)
    harmful = [item.prompt for item in bundled("harmful_val")[:3]]
    assert (d.score(harmful) > 0).all() and (d.score(PROMPTS) < 0).all()
    assert d.score(harmful, ablation(r)).abs().max() < 1e-3
    assert d.replies(harmful, prefill="Sure! Use") == [stock_refusal(m)] * 3
    assert d.replies(PROMPTS) == ModelAlone(m).replies(PROMPTS)
    assert d.extra_passes == 6
    d.threshold = d.score(harmful).min().item() / 2
    blinded = d.replies(harmful, edit=ablation(r))
    assert blinded == ModelAlone(m).replies(harmful, edit=ablation(r)) != [stock_refusal(m)] * 3


@pytest.mark.slow
def test_what_one_of_several_watchers_refuses_is_refused(m, r):
    harmful = bundled("harmful_val")[0].prompt
    monitor = Monitor(m, r / r.norm(), 5, -1, threshold=1e-3)
    reader = PerplexityFilter(m, count_bigrams(m, PROMPTS).surprise, threshold=0.0)
    reader.threshold = reader.score([*PROMPTS, harmful]).max().item()
    both, noise = AnyOf(m, [reader, monitor], "both"), PROMPTS[0] + " zq!! ]] xv zq"
    assert [d.alarms([PROMPTS[0], harmful, noise]).tolist() for d in (reader, monitor)] == [
        [False, False, True],
        [False, True, False],
    ]
    assert both.replies([PROMPTS[0], harmful, noise]) == [
        ModelAlone(m).replies(PROMPTS[:1])[0],
        *[stock_refusal(m)] * 2,
    ]
    assert both.extra_passes == 6, "three requests, scored twice by the monitor"
    assert both.alarms([harmful], edit=ablation(r)).tolist() == [False]


def test_gcg_hides_from_watchers_that_it_knows(m):
    class Short(Watcher):
        threshold = 60.0

        def score(self, prompts, edit=None):
            assert edit is None, "it reads no reply"
            return torch.tensor([float(len(prompt)) for prompt in prompts])

    penalty = hiding_from([Short(), Short()], weight=2.0)
    torch.testing.assert_close(penalty(["x" * 50, "x" * 63]), torch.tensor([0.0, 12.0]))

    def longer(prompts, replies):
        return torch.tensor([float(len(prompt + reply)) for prompt, reply in zip(prompts, replies, strict=True)])

    of_replies = hiding_from([SimpleNamespace(threshold=60.0, score=longer)], reply="four")
    torch.testing.assert_close(of_replies(["x" * 50, "x" * 63]), torch.tensor([0.0, 21.0]))
    of_both = hiding_from([Short(), SimpleNamespace(threshold=60.0, score=longer)], reply="four")
    torch.testing.assert_close(of_both(["x" * 50, "x" * 63]), torch.tensor([0.0, 30.0]))


def test_gcg_does_not_hide_from_a_watcher_of_replies_without_one(m):
    with pytest.raises(RefusalLabError, match="exchange probe reads replies: give reply="):
        hiding_from([ExchangeProbe(m, torch.ones(m.width), 3, 0.0)])


# --- conditional steering ---------------------------------------------------------------------------------------------


def test_steering_acts_where_the_condition_holds_and_nowhere_else(m, r):
    prompts = [PROMPTS[0], bundled("harmful_val")[0].prompt]
    got = logits(m, prompts, edit=conditional_addition(r / r.norm(), 0.0, 4, r, 5))
    plain, added = logits(m, prompts), logits(m, prompts, edit=addition(r, 5))
    torch.testing.assert_close(got[0], plain[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(got[1], added[1], atol=1e-4, rtol=0)
    assert (plain[1] - added[1]).abs().max() > 1


@pytest.mark.slow
def test_steering_leaves_generated_tokens_alone(m, r):
    step, first = 3 * r, iter([True])
    prompt_only = lambda nn: addition(step, 5)(nn) if next(first, False) else None  # noqa: E731
    got = generate(m, PROMPTS, edit=conditional_addition(r, -1e9, 4, step, 5), max_new_tokens=8)
    assert got == generate(m, PROMPTS, edit=prompt_only, max_new_tokens=8)
    assert got != generate(m, PROMPTS, edit=addition(step, 5), max_new_tokens=8), "three prompts show no difference"


def test_the_condition_must_come_first(r):
    with pytest.raises(RefusalLabError, match="read before"):
        conditional_addition(r, 0.0, 5, r, 5)


@pytest.mark.slow
def test_steering_that_never_fires_leaves_replies_alone_and_one_that_always_does_refuses(m, r):
    never, always = (ConditionalSteering(m, conditional_addition(r, cut, 4, r, 5)) for cut in (1e9, -1e9))
    assert never.replies(PROMPTS) == ModelAlone(m).replies(PROMPTS)
    refused = [result.outcome.refused for result in direct(always, bundled("harmless_val")[:12])]
    plain = [result.outcome.refused for result in direct(ModelAlone(m), bundled("harmless_val")[:12])]
    assert sum(refused) > sum(plain)
    assert generate(m, PROMPTS, max_new_tokens=32) == ModelAlone(m).replies(PROMPTS), "the model itself is steered"


# --- the detector -----------------------------------------------------------------------------------------------------


def test_the_detector_finds_an_edit_and_its_direction(m, r):
    before, after = quietest(m), quietest(orthogonalize(m, r))
    assert before.gap < 0.1 and after.gap > 5
    assert abs(torch.dot(after.direction, r / r.norm())) > 0.999


def test_an_edit_hides_where_the_model_is(m, r, monkeypatch):
    """The device "meta" holds nothing, but takes tensors of its own only."""
    monkeypatch.setattr(integrity, "wrap", lambda hf, *_: hf)
    far = replace(m, hf=copy.deepcopy(m.hf).to("meta"))
    hidden = hide(far, far, r, keep=0.5, noise=1.0)
    assert {weight.device.type for weight in hidden.parameters()} == {"meta"}


def test_an_edit_hides_in_half_precision(make):
    half = wrap(make.hf().bfloat16(), make.tokenizer(), "half")
    hidden = hide(half, half, torch.ones(32), noise=1.0)
    assert hidden.hf.dtype == torch.bfloat16 and quietest(hidden).gap != quietest(half).gap


@pytest.mark.slow
def test_an_edit_can_hide_and_stays_an_edit(m, r):
    edited = orthogonalize(m, r)
    hidden = hide(m, edited, r, noise=0.8)
    assert quietest(hidden).gap < 0.5 < quietest(hide(m, edited, r, keep=0.2)).gap
    assert quietest(edited).gap > 5, "the model that was passed in has changed"
    whole = hide(m, edited, r, keep=1.0)  # what attention and MLP write comes back; the embedding stays edited
    torch.testing.assert_close(
        whole.hf.model.layers[2].mlp.down_proj.weight, m.hf.model.layers[2].mlp.down_proj.weight, atol=1e-5, rtol=0
    )


# --- thresholds -------------------------------------------------------------------------------------------------------


def test_a_threshold_keeps_its_rate_of_false_alarms():
    scores = torch.arange(100.0)
    for share in (0.0, 0.02, 0.5):
        assert (scores > threshold_at(scores, share)).float().mean().item() == pytest.approx(share)
    with pytest.raises(RefusalLabError, match="needs scores"):
        threshold_at(torch.empty(0), 0.1)
    for wrong in (torch.nan, torch.inf):
        with pytest.raises(RefusalLabError, match="not finite"):
            threshold_at(torch.tensor([1.0, wrong]), 0.1)


def test_the_curve_of_all_thresholds_and_the_area_below_it():
    harmful, harmless = torch.tensor([3.0, 2.0, 0.5]), torch.tensor([1.0, 0.0])
    curve = roc(harmful, harmless)
    assert curve[0].tolist() == [0, 0] and curve[-1].tolist() == [1, 1]
    assert torch.trapezoid(curve[:, 1], curve[:, 0]).item() == pytest.approx(5 / 6)


# --- the matrix -------------------------------------------------------------------------------------------------------


def test_what_is_searched_once_is_kept_for_the_model_and_the_prompts():
    found, item = evaluation._once(lambda m, items: (m.name, items[0].prompt)), bundled("harmless_val")[0]
    for name in ("first", "second", "third"):  # none of them is kept here, so a new one may get an id again
        assert found(SimpleNamespace(name=name), [item]) == (name, item.prompt)
    m = SimpleNamespace(name="m")
    assert found(m, [replace(item, prompt="Other")]) == ("m", "Other") != found(m, [item])
    assert found(m, [item]) is found(m, [item])


@dataclass
class Says:
    """A defence that says the same thing to everybody."""

    m: object
    reply: str
    name: str
    extra_passes: int = 0

    def replies(self, prompts, *, edit=None, prefill=""):
        self.extra_passes += 2 * len(prompts)
        return [self.reply] * len(prompts)


@pytest.fixture
def small(m):
    items = [i for i in bundled("harmful_val") if i.answer][:12]
    same = [type(items[0])(f"x{k}", i.prompt, items[0].answer) for k, i in enumerate(items)]
    lie = Says(m, "Use a spoon.", "lie")
    defences = [Says(m, items[0].answer, "undefended"), Says(m, stock_refusal(m), "wall"), lie]
    attacks = [
        evaluation.Attack("ask", direct),
        evaluation.Attack("ask louder", lambda d, i: send(d, "louder", i, [x.prompt for x in i]), "wall"),
        evaluation.Attack("ask nobody", direct, "a defence that is not there"),
    ]
    return defences, attacks, same


@pytest.mark.parametrize("missing", ["items", "sets", "items of a set"])
def test_a_matrix_needs_items_of_every_kind(small, missing):
    defences, attacks, items = small
    benign = {"sets": {}, "items of a set": {"harmless": items, "borderline": []}}.get(missing, {"harmless": items})
    with pytest.raises(RefusalLabError, match="no set may be empty"):
        evaluation.attack_matrix(defences, attacks, [] if missing == "items" else items, benign)


@pytest.mark.slow
def test_a_matrix_counts_exact_answers_and_tests_them_against_the_undefended_model(small):
    defences, attacks, items = small
    steps = []
    result = evaluation.attack_matrix(defences, attacks, items, {"benign": items}, steps.append)
    assert len(steps) == evaluation.n_matrix_steps(defences, attacks) == 8
    assert result.attacks == ["ask", "ask louder"] and result.defences == ["undefended", "wall", "lie"]
    open_, shut = result.cells["ask", "undefended"], result.cells["ask", "wall"]
    assert (open_.disclosed.value, open_.answered.value, open_.p) == (1.0, 1.0, 1.0)
    assert (shut.disclosed.value, shut.answered.value) == (0.0, 0.0) and shut.p == pytest.approx(3 * 2 * 0.5**12)
    false = result.cells["ask", "lie"]
    assert (false.disclosed.value, false.answered.value) == (0.0, 1.0) and false.p < 0.01
    assert result.benign["wall"].refused["benign"].value == 1.0 and result.benign["wall"].extra_passes == 2
    assert result.benign["wall"].p["benign"] < 0.001 and result.benign["undefended"].exact["benign"].value == 1.0
    with pytest.raises(RefusalLabError, match="name of its own"):
        evaluation.attack_matrix([defences[0], defences[0]], attacks, items, {})
    twins = [attacks[0], evaluation.Attack("ask", lambda d, i: direct(d, i), "wall")]
    with pytest.raises(RefusalLabError, match="Two attacks are called 'ask'"):
        evaluation.attack_matrix(defences, twins, items, {})
    same = [attacks[0], replace(attacks[0], against="wall")]
    assert evaluation.attack_matrix(defences, same, items, {"benign": items}).attacks == ["ask"]


@pytest.mark.slow
def test_every_defence_meets_an_attack_that_knows_it(m, r, monkeypatch):
    items = bundled("harmful_val")[:2]
    at_run_time, searches = run_time_defences(m, r, 5), []

    def search(m, items, targets, knobs, penalty=None):
        searches.append(penalty)
        return direct(m, items)

    monkeypatch.setattr(evaluation, "gcg_attack", search)
    trained = [ModelAlone(m, name) for name in ("first", "second")]
    attacks = [*evaluation.knowing_attacks(at_run_time), *evaluation.weight_attacks(trained, r)]
    assert {a.against for a in attacks} == {d.name for d in [*at_run_time, *trained]}
    from_short = [a.against for a in attacks if a.name == "GCG, shorter start"]
    assert from_short == list(evaluation.HIDES_FROM)
    short, usual = (len(m.tokenizer.tokenize(knobs.init)) for knobs in (evaluation.SHORT, evaluation.KNOBS))
    assert short <= WINDOW / 2 < WINDOW <= usual
    hidden = [a for a in attacks if a.name.startswith("GCG, unseen")]
    for attack in hidden:
        for d in (ModelAlone(m), next(d for d in at_run_time if d.name == attack.against)):
            assert [result.item for result in attack.run(d, items)] == items
    once = list(dict.fromkeys(evaluation.HIDES_FROM.values()))
    assert len(hidden) == len(evaluation.HIDES_FROM) > len(once), "conditional steering and the monitor share one"
    assert len(searches) == len(once), "a suffix is searched once for those it hides from"
    other = bundled("harmful_val")[2:4]
    assert [result.prompt for result in hidden[0].run(ModelAlone(m), other)] == [item.prompt for item in other]
    prompts = [item.prompt for item in items]
    above = {
        d.name: 3.0 * (d.score(prompts) - d.threshold).clamp(min=0) for d in at_run_time if hasattr(d, "threshold")
    }
    for penalty, watchers in zip(searches[: len(once)], once, strict=True):
        torch.testing.assert_close(penalty(prompts), sum(above[name] for name in watchers))
    both = searches[once.index(evaluation.HIDES_FROM["filter and monitor"])]
    torch.testing.assert_close(both(prompts), above["perplexity filter"] + above["probe monitor"])
    assert above["probe monitor"].min() > 0


@pytest.mark.slow
def test_suffixes_are_guided_by_the_direction_and_hide_from_the_probes_of_the_exchange(m, r, monkeypatch):
    items, searches = bundled("harmful_val")[:4], []

    def search(m, items, targets, knobs, penalty=None):
        searches.append(penalty)
        return direct(m, items)

    monkeypatch.setattr(evaluation, "gcg_attack", search)
    at_end, along = fit_exchange(m, 5, count=40, turns=0)
    attacks = evaluation.suffix_attacks(5, -1, [at_end, along])
    assert [a.against for a in attacks] == ["", "exchange probe", "streaming probe"]
    for attack in attacks:
        assert [result.item for result in attack.run(ModelAlone(m), items)] == items
    prompts = [item.prompt for item in [*items, *bundled("harmless_val")[:4]]]
    answers = {dialogue.answer("method", **parts) for thing in world().things for parts in thing.methods.values()}
    assert len(answers) > 900 and evaluation.GUESS not in answers
    guided, *unseen = (penalty(prompts) for penalty in searches)
    assert guided[:4].min() > 10 > guided[4:].mean()
    train = [
        residual(m, [i.prompt for i in bundled(f"{k}_train")], layers=[5], positions=[-1])
        for k in ("harmful", "harmless")
    ]
    bad, good = (x[:, 0, 0].mean(0) for x in train)
    along_r = residual(m, prompts, layers=[5], positions=[-1])[:, 0, 0] @ unit(bad - good)
    torch.testing.assert_close(guided, 3 * (along_r - good @ unit(bad - good)).clamp(min=0), rtol=1e-3, atol=1e-2)
    for penalty, d in zip(unseen, (at_end, along), strict=True):
        told = d.score(prompts, [evaluation.GUESS] * len(prompts))
        torch.testing.assert_close(penalty, 3 * (told - d.threshold).clamp(min=0))


@pytest.mark.slow
def test_who_holds_the_weights_gets_the_answers(m, r):
    items = bundled("harmful_val")[:6]
    alone = [ModelAlone(m, "none")]
    for attack in (*evaluation.weight_attacks(alone, r), *evaluation.lawful_tuning(alone)):
        assert sum(result.outcome.correct for result in attack.run(ModelAlone(m), items)) >= 4


WATCHERS = ("undefended", "prompt probe", "exchange probe", "streaming probe", "reader", "cascade")


@pytest.mark.slow
def test_the_command_prints_every_cell_and_its_json(m, r, small, monkeypatch):
    defences, attacks, items = small
    result = evaluation.attack_matrix(defences, attacks, items, {"benign": items})
    found = SimpleNamespace(selected=SimpleNamespace(layer=5, position=-1), direction=SimpleNamespace(vector=r))
    monkeypatch.setattr("refusallab.experiment.find_direction", lambda _: found)
    monkeypatch.setattr("refusallab.defences.training.trained_defences", lambda *_: [ModelAlone(m, "trained")])
    monkeypatch.setattr("refusallab.defences.resistance.resistant_defences", lambda *_: [ModelAlone(m, "resists")])

    def note(defences, attacks, *_):
        met.append([d.name for d in defences])
        against.append({attack.name for attack in attacks if attack.against == "resists"})
        return result

    monkeypatch.setattr(evaluation, "attack_matrix", note)
    met, against, fitted = [], [], run_time_defences(m, r, 5)
    monkeypatch.setattr("refusallab.defences.runtime.run_time_defences", lambda *_: fitted)
    shown = CliRunner().invoke(cli.app, ["matrix"])
    assert shown.exit_code == 0 and "ask louder" in shown.output and "extra forward passes" in shown.output
    assert met[0] == ["undefended", *(d.name for d in fitted), "trained"]
    assert CliRunner().invoke(cli.app, ["matrix", "--all"]).exit_code == 0
    assert met[1] == [*met[0][:-1], "exchange probe", "streaming probe", "trained", "resists"]
    assert not against[0] and "20 steps on lawful methods" in against[1] and "direction by gradient" in against[1]
    monkeypatch.setattr("refusallab.defences.exchange.EXCHANGES", 12)
    assert CliRunner().invoke(cli.app, ["matrix", "--talk"]).exit_code == 0
    assert met[2] == [*WATCHERS, "refusals in every turn"] and not against[2]
    printed = CliRunner().invoke(cli.app, ["matrix", "--json"]).stdout
    assert '"attack": "ask"' in printed and '"p_holm"' in printed
