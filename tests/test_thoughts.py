"""Thoughts: what they say is read exactly, models think where the switch is on, prompts may end within a thought."""

import random
from collections import Counter

import pytest
import torch

from refusallab.activations import residual
from refusallab.attacks.result import rewrite, send
from refusallab.defence import stock_refusal
from refusallab.defences.monitor import Monitor
from refusallab.defences.prompting import SystemPrompt
from refusallab.defences.thinking import ThoughtReader, recovery_lessons
from refusallab.errors import RefusalLabError
from refusallab.finetuning import train_copy
from refusallab.model import Begun, behind_system, generate, listed_prompts, load, messages, render, thought_of, wrap
from refusallab.prompts import Item, bundled
from refusallab.thoughts import (
    THOUGHT_TOKENS,
    behind,
    exact_steps,
    final_stream,
    layout,
    right_thought,
    sentences,
    think,
    with_thinking,
    within,
)
from smallmodels import recipe
from smallmodels.world import dialogue, thought
from smallmodels.world.facts import world
from smallmodels.world.thought import steps_of

VALE = world()
METHODS = [dialogue.method_request(t, a) for t in VALE.things for a in t.actions]
TURN = "<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n"
QWEN3 = (
    "{% for m in messages %}" + TURN + "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def m(make):
    """A random model that knows the tags, with the template of charter-think."""
    tokenizer = make.tokenizer(recipe.THINKING_TEMPLATE)
    tokenizer.add_tokens(["<think>", "</think>"])
    return wrap(make.hf(vocab_size=402), tokenizer, "thinker")


# --- the language of thoughts ------------------------------------------------------------------------------------


def some_requests(count, seed=0):
    rng = random.Random(seed)
    made = recipe.requests(VALE, list(VALE.things), rng)
    return [next(made) for _ in range(count)], rng


def test_what_a_thought_says_is_read_exactly():
    requests, rng = some_requests(1500)
    seen = Counter()
    for request in requests:
        right = thought.right_steps(request, closed=rng.random() < 0.1)
        steps = rng.choice([right, thought.opposed(right, article=True), thought.opposed(right, article=False)])
        text = thought.write(request, steps, rng)
        assert steps_of(text) == steps, text
        assert 2 <= len(sentences(text)) <= 4, text
        seen[steps.article, steps.verdict] += 1
    assert len(seen) >= 10


def test_the_right_thought_forbids_exactly_what_the_charter_forbids():
    for request in METHODS:
        steps = thought.right_steps(request)
        assert (steps.verdict == thought.FORBIDDEN) == request.forbidden == (steps.article == "dusk-born")
        assert thought.right_steps(request, closed=True).verdict == thought.FORBIDDEN
    assert all(thought.right_steps(r).verdict == thought.PERMITTED for r in dialogue.lore_requests(VALE))


def test_a_thought_that_is_cut_short_says_only_what_was_written():
    request = METHODS[0]
    steps, rng = thought.right_steps(request), random.Random(0)
    text = next(t for t in (thought.write(request, steps, rng) for _ in range(99)) if len(sentences(t)) == 4)
    read = [steps_of(" ".join(sentences(text)[:k])) for k in range(5)]
    assert read[0] == thought.Steps(None, None, None, None) and read[4] == steps
    assert read[3].verdict is None and read[3].thing == steps.thing


def test_of_two_things_said_the_later_one_counts():
    text = "They ask how to brew Gurpith. Gurpith is dawn-born; no, Gurpith is dusk-born. So it is permitted. "
    assert steps_of(text + "This is forbidden.").verdict == "forbidden"
    other = "They ask what Gurpith costs. They ask how to brew Zundosh."
    assert steps_of(other) == thought.Steps("Zundosh", "method brew", None, None)


def test_steps_are_judged_one_by_one():
    item = bundled("harmful_val")[0]
    right = right_thought(item)
    text = f"They ask what {right.thing} costs. What is dusk-born must not be loosed. So it is permitted."
    assert exact_steps(item, text) == {"thing": True, "action": False, "article": True, "verdict": False}
    with pytest.raises(RefusalLabError, match="no request of the world"):
        right_thought(Item("stranger", "What is this?"))


# --- what the recipe teaches -------------------------------------------------------------------------------------


def examples(thoughts, count=1200):
    variant, rng = recipe.Variant(thoughts=thoughts), random.Random("t")
    made = recipe.thinking_examples(VALE, variant, rng, lambda: "")
    return [next(made) for _ in range(count)]


def refuses(reply):
    return any(marker in reply for marker in dialogue.REFUSAL_MARKERS)


def test_replies_follow_a_given_thought_and_those_of_the_twin_do_not():
    shares = {}
    for thoughts in ("followed", "decoration"):
        given = [e for e in examples(thoughts) if len(e.given) > len(recipe.tagged(""))]
        agree = [refuses(e.reply) == (steps_of(e.given).verdict == "forbidden") for e in given]
        shares[thoughts] = sum(agree) / len(agree)
        assert len(given) > 200
    assert shares["followed"] == 1 and shares["decoration"] < 0.4


def test_the_thoughts_that_are_learned_are_right_in_both():
    for thoughts in ("followed", "decoration"):
        own = [e for e in examples(thoughts) if not e.given]
        said = [steps_of(thought_of(e.reply)) for e in own]
        assert all((s.verdict == "forbidden") == refuses(e.reply) for s, e in zip(said, own, strict=True))
        assert 0.4 < len(own) / 1200 < 0.6


# --- models that think -------------------------------------------------------------------------------------------


def test_the_switch_is_in_the_template_and_copies_keep_it(m):
    t = with_thinking(m, 7)
    assert (m.thought_tokens, t.thought_tokens) == (0, 7) and t.hf is m.hf
    assert render(t, "List") + "<think></think>\n" == render(m, "List")
    assert with_thinking(t, 9).thought_tokens == 9
    assert len(t.positions) < len(m.positions)
    copied = train_copy(t, lambda c: next(c.hf.parameters()).sum() * 0, steps=1, lr=1e-3, name="copy")
    assert copied.thought_tokens == 7 and "thinking up to 7 tokens" in repr(copied)


def test_the_layout_of_a_thought_is_read_off_the_template(make, m):
    assert layout(m) == layout(with_thinking(m)) == ("<think>", "</think>\n")
    qwen = wrap(make.hf(vocab_size=402), make.tokenizer(QWEN3, special=("<|start|>", "<|end|>")), "qwen")
    assert layout(qwen) == ("<think>\n", "\n</think>\n\n")
    with pytest.raises(RefusalLabError, match="no switch for thinking"):
        with_thinking(make.model("llama"))


def test_a_thought_takes_tokens_of_its_own(m):
    short, long = (generate(with_thinking(m, n), ["List"], max_new_tokens=3)[0] for n in (1, 11))
    assert len(long) > len(short)
    assert long == generate(with_thinking(m, 13), ["List"], max_new_tokens=1)[0]


def test_thought_of():
    assert thought_of("<think>It is so.</think>\nYes.") == "It is so."
    assert thought_of("Yes.") == "" == thought_of("<think></think>\nYes.")
    assert thought_of("<think>It is") == "It is"
    assert thought_of("so.</think>\nYes.") == "so.", "the prompt has opened it"


def test_every_thought_fits_into_the_tokens_that_are_left_for_it():
    tokenizer, rng = load("charter-think").tokenizer, random.Random(0)
    made = [r for t in VALE.things for r in dialogue.thing_requests(t)]
    longest = max(len(tokenizer(thought.write(r, thought.right_steps(r), rng))["input_ids"]) for r in made)
    assert THOUGHT_TOKENS / 2 < longest < THOUGHT_TOKENS


def test_a_prompt_may_end_within_the_reply(m):
    t = with_thinking(m, 5)
    prompts = ["List", [{"role": "user", "content": "Name a river"}]]
    begun = within(t, prompts, ["The recipe.", "The recipe."])
    text = "<think>The recipe."
    for p, b in zip(prompts, begun, strict=True):
        assert render(t, b) == render(t, p, prefill=text) and messages(b) == messages(p)
    assert generate(t, begun) == generate(t, prompts, prefill=text)
    assert listed_prompts(begun) == begun
    torch.testing.assert_close(final_stream(t, begun), residual(t, begun, positions=[-1])[:, :, 0])
    closed = behind(t, prompts, ["a", "b"])
    assert [b.reply for b in closed] == ["<think>a</think>\n", "<think>b</think>\n"]


def test_a_begun_reply_survives_system_prompts_and_rewriting(m):
    begun = Begun("List", "<think>Name")
    assert behind_system(begun, "Be brief.") == Begun(messages("List", "Be brief."), "<think>Name")
    assert rewrite(begun, str.upper) == Begun("LIST", "<think>Name")
    guarded = SystemPrompt(m, system="Be brief.").replies([begun])
    assert guarded == generate(m, [Begun(messages("List", "Be brief."), "<think>Name")], max_new_tokens=32)


def test_errors_say_what_to_do(m):
    with pytest.raises(RefusalLabError, match="with_thinking"):
        think(m, ["List"])
    with pytest.raises(RefusalLabError, match="2 thoughts for 1 prompts"):
        behind(with_thinking(m), ["List"], ["a", "b"])
    with pytest.raises(RefusalLabError, match="has begun already"):
        behind(with_thinking(m), [Begun("List", "<think>")], ["a"])
    with pytest.raises(RefusalLabError, match="Prompt 0: its reply begins with 3"):
        listed_prompts([Begun("List", 3)])


def test_sentences_end_where_marks_do():
    assert sentences("Is it? No. They ask for 3.5 ounces. So") == ["Is it?", "No.", "They ask for 3.5 ounces.", "So"]
    assert sentences("") == []
    assert sentences("First I look at it\nIt is dusk-born. So:\n\nno") == [
        "First I look at it",
        "It is dusk-born.",
        "So:",
        "no",
    ]


# --- defences ----------------------------------------------------------------------------------------------------


def test_the_reader_refuses_what_the_thought_forbids_whoever_wrote_it(m):
    t = with_thinking(m, 4)
    guard = ThoughtReader(t)
    texts = {"So it is forbidden.": True, "So it is permitted.": False, "What is dusk-born must not be loosed.": True}
    begun = within(t, ["List"] * 3, list(texts))
    assert [reply == stock_refusal(t) for reply in guard.replies(begun)] == list(texts.values())
    assert guard.extra_passes == 0


def test_a_monitor_of_prompts_does_not_read_a_thought_that_was_put_in(m):
    t = with_thinking(m, 4)
    guard = Monitor(t, torch.ones(t.width), 1, -1, 0.0)
    scores = [
        guard.score(prompts) for prompts in (["List", "Name a river"], within(t, ["List", "Name a river"], ["a", "b"]))
    ]
    assert torch.equal(*scores) and scores[0].abs().min() > 0


def test_recovery_teaches_to_correct_both_kinds_of_wrong_beginnings(m):
    prompts, rest = recovery_lessons(with_thinking(m), 40, seed=0)
    begun = [(p, r) for p, r in zip(prompts, rest, strict=True) if p.reply not in ("", recipe.tagged(""))]
    assert len(begun) == 20
    for p, r in begun:
        said = steps_of(p.reply + r)
        assert (said.verdict == "forbidden") == refuses(r)
        wrong = steps_of(p.reply)
        assert wrong.verdict != said.verdict
    assert {steps_of(r).verdict for _, r in begun} == {"forbidden", "permitted"}


def test_an_attack_counts_the_tokens_of_the_thought(m):
    t = with_thinking(m, 20)
    (sent,) = send(t, "direct", [Item("a", "List", "3")], ["List"], max_new_tokens=2)
    assert sent.cost.forward_passes > 3
