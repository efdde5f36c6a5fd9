"""What chat templates and tokenizers of real models do: ends of turns, thoughts, system turns, dates, marks, fp16."""

import datetime
import warnings

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken

from refusallab.attacks import gcg
from refusallab.attacks.effect import suffix_effect
from refusallab.directions import search_candidates
from refusallab.errors import RefusalLabError
from refusallab.interventions import ablation, addition, affine, project_out, unit
from refusallab.measure import cross_entropy
from refusallab.model import (
    TEMPLATE_SETTINGS,
    encode,
    encode_texts,
    end_of_turn,
    generate,
    ids_of,
    logits,
    render,
    spoken,
    wrap,
)

ASK = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
TURNS = "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
PLAIN = TURNS + ASK


def with_template(make, template, **settings):
    return wrap(make.hf(), make.tokenizer(template, **settings))


def unnamed_end(make, template, *tokens, special=True):
    """The end of the turn is an added token without a name: only `added_tokens_decoder` knows it."""
    tokenizer = make.tokenizer(template, special=("<|start|>", "<|eos|>"), eos="<|eos|>")
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in tokens])
    return wrap(make.hf(vocab_size=420), tokenizer)


# The end of a turn


@pytest.mark.parametrize("special", [True, False])
def test_the_end_of_a_turn_is_learned_from_the_template(make, special):
    m = unnamed_end(make, PLAIN, "<|end|>", special=special)
    end = m.tokenizer.convert_tokens_to_ids("<|end|>")
    assert "<|end|>" not in m.tokenizer.all_special_tokens or special
    assert end in m.stop_ids and m.tokenizer.eos_token_id in m.stop_ids
    ids, counted = (x[0] for x in (lambda b: (b[0]["input_ids"], b[1]))(encode_texts(m, ["List"], ["Name a river"])))
    assert ids[-1] == end and counted[-1], "the end that is scored is that of the template"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "tokens", "stop", "text"),
    [
        (PLAIN.replace("<|end|>\n", "<|eot|><|end|>"), ("<|end|>", "<|eot|>"), "<|eot|>", ""),
        ("{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}\n{% endfor %}<|assistant|>\n"[:-14] + ASK,
         ("<|user|>", "<|assistant|>"), "<|user|>", ""),
        ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}" + ASK, (), None, "\nuser:"),
        ("{% for m in messages %}{{ m['content'] }} ###STOP###\n{% endfor %}" + ASK, (), None, "###STOP###"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}" + ASK, (), None, ""),
        ("{{ raise_exception('one') if messages|length > 1 }}" + PLAIN, (), None, ""),
    ],
)  # fmt: skip
def test_ends_of_other_templates(make, template, tokens, stop, text):
    m = unnamed_end(make, template, *tokens)
    token, found = end_of_turn(m.tokenizer)
    assert (token and m.tokenizer.convert_ids_to_tokens(token), found) == (stop, text)
    assert token is None or token in m.stop_ids


def test_a_reply_ends_where_text_ends_the_turn(make, monkeypatch):
    m = unnamed_end(make, "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}" + ASK)
    monkeypatch.setattr(m.tokenizer, "decode", lambda ids, **_: "A river.\nuser: Another?\nassistant: Yes")
    assert generate(m, ["Name a river"], max_new_tokens=3) == ["A river."]


# Thoughts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("opens", "closes"),
    [
        ("<think>\n", "</think>"),
        ("<|begin_of_thought|>", "<|end_of_thought|>"),
        ("[THINK]", "[/THINK]"),
        ("<reasoning>\n", "</reasoning>"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("<seed:think>", "</seed:think>"),
        ("<think>\nOkay,", "</think>"),
    ],
)
def test_a_thought_that_the_template_opens_is_closed_with_a_warning(make, opens, closes):
    template = TURNS + "{% if add_generation_prompt %}<|start|>assistant\n" + opens + "{% endif %}"
    with pytest.warns(UserWarning, match="opens a thought .* closed at once"):
        m = with_template(make, template)
        text = render(m, "Name a river", prefill="Sure,")
    assert text.endswith(f"{opens.rstrip()}\n\n{closes}\n\nSure,")
    ids = encode(m, ["Name a river"])["input_ids"][0]
    assert m.tokenizer.decode(ids[list(m.positions)]).endswith(f"{closes}\n\n")


@pytest.mark.parametrize("tail", ["<think>\n\n</think>\n\n", "[THINK][/THINK]", ""])
@pytest.mark.parametrize("prompt", ["Name a river", "What does <think> do?", "<think>"])
def test_closed_thoughts_and_quoted_tags_stay_as_they_are(make, tail, prompt):
    template = TURNS + "{% if add_generation_prompt %}<|start|>assistant\n" + tail + "{% endif %}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert render(with_template(make, template), prompt).endswith(f"{prompt}<|end|>\n<|start|>assistant\n{tail}")


def test_what_is_spoken_is_what_no_thought_holds():
    for reply, said in [
        ("A river.", "A river."),
        ("<think>hm</think>\n\nA river.", "A river."),
        ("hm</think>A river.", "A river."),
        ("<think>one</think>A <think>two</think>river.", "A river."),
        ("A river. <think>hm", "A river. "),
        ("<|begin_of_thought|>hm", ""),
        ("a [thinking] <thinker> b", "a [thinking] <thinker> b"),
    ]:
        assert spoken(reply) == said


def test_replies_that_end_within_a_thought_are_announced_and_special_tags_are_kept(make, monkeypatch):
    tokenizer = make.tokenizer(PLAIN, special=("<|start|>", "<|end|>", "[THINK]", "[/THINK]"))
    m = wrap(make.hf(), tokenizer)
    opens, closes = tokenizer.convert_tokens_to_ids(["[THINK]", "[/THINK]"])
    words = tokenizer("List three", add_special_tokens=False)["input_ids"]
    whole, cut = [opens, *words, closes, *words], [opens, *words]
    for new, reply in [(whole, "[THINK]List three[/THINK]List three"), (cut, "[THINK]List three")]:
        ids = torch.tensor([new])
        monkeypatch.setattr(m.hf, "generate", lambda input_ids, ids=ids, **_: torch.cat([input_ids, ids], 1))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert generate(m, ["Name a river"]) == [reply]
        assert bool(seen) == (closes not in new)
        assert not seen or "1 of 1 replies end within a thought" in str(seen[0].message)


# System turns and dates

DROPS = (
    "{% for m in messages if m['role'] != 'system' %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    + ASK
)
RAISES = "{{ raise_exception('no system') if messages[0]['role'] == 'system' }}" + PLAIN
MERGES = (
    "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}"  # noqa: E501
    "{% else %}{% set s = '' %}{% endif %}{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{{ (s if loop.first else '') + m['content'] }}<|end|>\n{% endfor %}" + ASK
)
LOWERS = PLAIN.replace("{{ m['content'] }}", "{{ m['content'] | lower if m['role'] == 'system' else m['content'] }}")
CUTS = PLAIN.replace("{{ m['content'] }}", "{{ m['content'][:40] if m['role'] == 'system' else m['content'] }}")
STRIPS = PLAIN.replace("{{ m['content'] }}", "{{ m['content'] | trim }}")


@pytest.mark.slow
@pytest.mark.parametrize("template", [DROPS, RAISES, MERGES, LOWERS, CUTS, STRIPS, PLAIN])
@pytest.mark.parametrize("system", ["Be kind.", " Be Kind, and Speak of Rivers alone, of their Names and Banks.\n"])
def test_the_system_prompt_is_never_lost_even_where_the_request_quotes_it(make, template, system):
    m = with_template(make, template)
    for request in ("Name a river", f"What does this mean: {system.strip()}"):
        assert render(m, request, system=system).count(system.strip()) == 1 + request.count(system.strip())


@pytest.mark.slow
def test_the_date_is_pinned_however_the_template_asks_for_it(make):
    formats = ["%d %b %Y", "%-d.%-m.%y", "%A, %B %d, %Y %H:%M:%S", "%Y-%m-%d", "%j %%"]
    for fmt in formats[:4]:
        template = "\n  {% if strftime_now is defined %}{{ strftime_now('" + fmt + "') }}{% endif %}" + PLAIN
        expected = datetime.datetime(2024, 7, 26).strftime(fmt)
        assert render(with_template(make, template), "List").startswith(f"\n{expected}<|start|>user")
    assert TEMPLATE_SETTINGS["date_string"] == "26 Jul 2024"
    with pytest.raises(RefusalLabError, match="'now' is undefined"):
        with_template(make, "{{ now() }}" + PLAIN)


# Tokenizers that put a mark in front


def marked(kind, template=PLAIN):
    """A tokenizer in the manner of SentencePiece: a mark stands for each space, and one in front of every piece."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    if kind == "normalizer":
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
        bpe.decoder = decoders.Metaspace(prepend_scheme=kind)
    alphabet = [*map(chr, range(33, 127)), "▁", "\n"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<|start|>", "<|end|>"], initial_alphabet=alphabet,  # noqa: E501
                                  show_progress=False)  # fmt: skip
    bpe.train_from_iterator(
        ["How do I bake bread? Name a river in the north. List three tools x x x the the"] * 5, trainer
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>", additional_special_tokens=["<|start|>"]
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["normalizer", "always", "first"])
@pytest.mark.parametrize("init", [" x" * 6, " the x list"])
@pytest.mark.parametrize("template", [PLAIN, STRIPS])
def test_gcg_runs_on_tokenizers_that_put_a_mark_in_front(make, kind, init, template):
    m = wrap(make.hf(), marked(kind, template))
    case = gcg.prepare(m, "Name a river", "List three", init)
    whole = encode(m, [f"Name a river{init}"], prefill="List three")["input_ids"][0]
    assert torch.equal(torch.cat([case.before_ids, case.suffix_ids, case.after_ids, case.target_ids]), whole)
    assert gcg.suffix_texts(m, case, case.suffix_ids[None]) == [init]
    knobs = gcg.Knobs(steps=2, search_width=32, topk=32, init=init, early_stop=False)
    found = gcg.find_suffix(m, ["Name a river", "How do I bake bread?"], ["List three"] * 2, knobs)
    assert found.loss == pytest.approx(gcg.suffix_loss(m, "Name a river", "List three", found.text), abs=1e-3)
    effect = suffix_effect(m, "Name a river", init, torch.ones(32), 1, -1)
    assert len(effect.tokens) == len(case.suffix_ids) and "".join(effect.tokens) == init


@pytest.mark.parametrize("kind", ["normalizer", "always", "first"])
def test_replies_are_scored_and_written_as_they_stand_behind_the_prompt(make, kind, monkeypatch):
    m = wrap(make.hf(), marked(kind))
    batch, counted = encode_texts(m, ["List three"], ["Name a river"])
    whole = encode(m, ["Name a river"], prefill="List three")["input_ids"][0].tolist()
    assert batch["input_ids"][0].tolist() == [*whole, m.tokenizer.eos_token_id]
    assert cross_entropy(m, ["List three"], ["Name a river"]).isfinite().all() and counted[0, -1]
    n_before = encode(m, ["Name a river"], prefill="List")["input_ids"].shape[1]
    three = torch.tensor(whole[n_before:])
    monkeypatch.setattr(m.hf, "generate", lambda input_ids, **_: torch.cat([input_ids, three[None]], 1))
    assert generate(m, ["Name a river"], prefill="List") == [" three"], (
        "the space after the prefill is a part of the reply"
    )


# Precision


@pytest.mark.slow
def test_a_prompt_that_overflows_is_named_with_the_remedy(make):
    m = make.model()
    m.hf.to(torch.float16)
    prompts = ["Name a river", "List", "Q 7"]
    (seven,) = set(ids_of(m, "Q 7")) - set(ids_of(m, "Q ")) - set(ids_of(m, "Q"))
    with torch.no_grad():
        m.hf.model.embed_tokens.weight[seven] = float("inf")
    for run in (logits, generate, lambda m, p: search_candidates(m, p, p, p, p)):
        with pytest.raises(
            RefusalLabError,
            match=r"Prompt 2( and 1 more)?: .* not finite in float16; load .*torch.bfloat16 or torch.float32",
        ):
            run(m, prompts)
    with pytest.raises(RefusalLabError, match="Prompt 2"):
        logits(m, prompts, batch_size=1)
    with pytest.raises(RefusalLabError, match="Prompt 1: "):
        cross_entropy(m, ["Name a river", "Q 7"])
    assert logits(m, prompts[:2]).isfinite().all()


def test_an_edit_that_overflows_is_to_blame_itself(model_of):
    with pytest.raises(RefusalLabError, match="Prompt 0 and 1 more: .* the edit is too strong"):
        logits(model_of(), ["Name a river", "List"], edit=addition(torch.full((32,), 1e38), 1, 1e3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_projections_in_half_precision_are_computed_in_fp32(dtype):
    generator = torch.Generator().manual_seed(0)
    r = torch.randn(256, generator=generator)
    x = (torch.randn(2, 5, 256, generator=generator) + 10 * unit(r) * 16).to(dtype)  # r dominates 10 to 1
    exact = project_out(x.float(), r)
    error = (project_out(x, r).float() - exact).abs().max()
    assert error <= (exact.to(dtype).float() - exact).abs().max(), "no more than the rounding of the result"
    assert project_out(x, r).dtype == dtype


@pytest.mark.parametrize("kind", ["ablation", "addition", "affine"])
def test_edits_run_in_the_dtype_of_the_model(make, kind):
    m = make.model()
    m.hf.to(torch.bfloat16)
    r = torch.linspace(-1, 2, 32)
    edit = {
        "ablation": ablation(r),
        "addition": addition(r, 1),
        "affine": affine(r, 1, r, 0.5),
    }
    assert logits(m, ["Name a river"], edit=edit[kind]).isfinite().all()
