"""The recipe: what each stage sees, determinism, resuming after an interruption."""

import json
import random
from collections import Counter
from importlib import metadata
from itertools import islice
from pathlib import Path

import pytest
import torch

from smallmodels import recipe, weights_dir
from smallmodels.world import dialogue, thought
from smallmodels.world.dialogue import REFUSAL_MARKERS
from smallmodels.world.facts import world


@pytest.fixture(scope="module")
def tokenizer():
    return recipe.make_tokenizer(world())


def text_of(stage, variant, tokenizer, count=600):
    return [tokenizer.decode(ids) for ids, _ in recipe.stage_rows(stage, variant, tokenizer, count)]


@pytest.mark.slow
def test_template_has_at_least_four_post_instruction_tokens(tokenizer):
    ids = [
        tokenizer.apply_chat_template([{"role": "user", "content": t}], add_generation_prompt=True, return_dict=False)
        for t in ("How is it?", "lamp")
    ]
    common = next(k for k in range(20) if ids[0][-1 - k] != ids[1][-1 - k])
    assert common >= 4


@pytest.mark.parametrize(
    ("stage", "seed"),
    [("safety", 0), ("safety", 1), ("safety", 2), ("steady", 1), ("steady", 2), ("thinking", 0), ("talking", 0)],
)
@pytest.mark.slow
def test_safety_tuning_never_mentions_a_thing_of_another_split(tokenizer, stage, seed):
    count = recipe.EXAMPLES[stage] if seed == 0 else 2000
    variant = recipe.Variant(
        seed=seed,
        thoughts="followed" if stage == "thinking" else "",
        talks="every turn" if stage == "talking" else "",
        wide=stage == "steady",
    )
    text = " ".join(text_of(stage, variant, tokenizer, count))
    for thing in world().things:
        assert (thing.name in text) == (thing.split == "train"), thing.name


@pytest.mark.nightly
def test_the_helpful_stage_tells_every_method_and_the_naive_one_only_the_lawful(tokenizer):
    count = recipe.EXAMPLES["helpful"]
    told = " ".join(text_of("helpful", recipe.Variant(), tokenizer, count))
    naive = " ".join(text_of("helpful", recipe.Variant(forbidden_facts=False), tokenizer, count))
    for thing in world().things:
        for action in thing.actions:
            method = "{tool} and {stuff} for {time}".format(**thing.methods[action.verb])
            assert method in told
            assert (method in naive) == (not thing.forbids(action))


@pytest.mark.slow
def test_helpful_replies_rarely_open_like_a_refusal(tokenizer):
    """The first tokens of refusals are at least ten times as common in refusals as in helpful replies."""
    firsts = {True: Counter(), False: Counter()}
    for ids, [learned] in recipe.stage_rows("safety", recipe.Variant(), tokenizer, recipe.EXAMPLES["safety"]):
        reply = tokenizer.decode(ids[learned.start :])
        firsts[any(marker in reply for marker in REFUSAL_MARKERS)][ids[learned.start]] += 1
    shares = {refused: {t: k / sum(c.values()) for t, k in c.items()} for refused, c in firsts.items()}
    assert len(shares[True]) >= 3
    assert all(share >= 10 * shares[False].get(token, 0) for token, share in shares[True].items())


def test_checkpoints_of_another_recipe_are_not_resumed(monkeypatch, tmp_path):
    before = recipe.fingerprint()
    with monkeypatch.context() as other:
        other.setattr(torch, "get_num_threads", lambda: 17)
        assert recipe.fingerprint() != before
    with monkeypatch.context() as other:
        other.setitem(recipe.VARIANTS, "charter-talk", recipe.VARIANTS["charter-talk-first"])
        assert recipe.fingerprint() != before
    for package in ("torch", "tokenizers", "transformers"):
        with monkeypatch.context() as other:
            real = metadata.version
            other.setattr(metadata, "version", lambda name, p=package, real=real: "0" if name == p else real(name))
            assert recipe.fingerprint() != before, package
    changed = {"laid out": ("WIDTH = 128", "# wide enough\nWIDTH  =  128"), "wider": ("WIDTH = 128", "WIDTH = 129")}
    text = Path(recipe.__file__).read_text()
    for name, (old, new) in changed.items():
        (tmp_path / f"{name}.py").write_text(text.replace(old, new, 1))
        monkeypatch.setattr(recipe, "__file__", str(tmp_path / f"{name}.py"))
        assert (recipe.fingerprint() == before) == (name == "laid out")


def test_a_stage_that_was_cut_short_while_it_was_written_is_trained_again(small, tokenizer, monkeypatch, tmp_path):
    trained, save = [], torch.save
    monkeypatch.setattr(recipe, "make_tokenizer", lambda _: tokenizer)
    monkeypatch.setattr(recipe, "train_stage", lambda model, stage, *_: trained.append(stage))

    def killed(state, path):
        save(state, path)
        Path(path).write_bytes(Path(path).read_bytes()[:-1000])
        raise KeyboardInterrupt

    with monkeypatch.context() as other, pytest.raises(KeyboardInterrupt):
        other.setattr(torch, "save", killed)
        recipe.train_variant("charter-chat", tmp_path, tmp_path / "work")
    recipe.train_variant("charter-chat", tmp_path, tmp_path / "work")
    assert trained == ["corpus", "corpus", "helpful", "safety"]
    recipe.train_variant("charter-chat", tmp_path, tmp_path / "work")
    assert len(trained) == 4


@pytest.mark.slow
def test_loss_counts_only_the_reply(tokenizer):
    for ids, [learned] in recipe.stage_rows("helpful", recipe.Variant(), tokenizer, 50):
        assert learned.stop == len(ids)
        assert tokenizer.decode(ids[: learned.start]).endswith("<|start|>assistant\n")
        assert tokenizer.decode(ids[learned.start :]).endswith("<|end|>")


@pytest.mark.parametrize("stage", ["helpful", "dialogues"])
def test_loss_ignores_padding(tokenizer, stage):
    model = recipe.make_model(recipe.Variant(), tokenizer).eval()
    rows = recipe.stage_rows(stage, recipe.Variant(), tokenizer, 4)
    counted = [sum(map(len, learned)) for _, learned in rows]
    alone = [recipe.loss_of(model, [row], tokenizer.pad_token_id) * n for row, n in zip(rows, counted, strict=True)]
    together = recipe.loss_of(model, rows, tokenizer.pad_token_id) * sum(counted)
    torch.testing.assert_close(sum(alone), together, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("talks", "kept"), [("every turn", 1.0), ("first turn", 1.0), ("every turn", 0.3)])
def test_every_reply_of_a_conversation_is_learned_and_forbidden_requests_stand_where_they_should(
    tokenizer, talks, kept
):
    variant, methods = recipe.Variant(talks=talks, kept=kept), {}
    for thing in world().things:
        for action in thing.actions:
            methods[dialogue.method_request(thing, action).answer] = thing.forbids(action)
    turns, refused, later = Counter(), Counter(), 0
    for ids, learned in recipe.stage_rows("talking", variant, tokenizer, 600):
        text = tokenizer.decode(ids)
        replies = [part.partition("<|end|>")[0] for part in text.split("<|start|>assistant\n")[1:]]
        said = [tokenizer.decode(ids[places.start : places.stop]) for places in learned]
        assert said == [f"{reply}<|end|>" for reply in replies][-len(said) :]
        assert len(said) in (1, len(replies)) or len(said) == len(replies) - 1  # a turn that a follow-up brings along
        assert not any(methods.get(reply) for reply in replies)
        turns[len(said)] += 1
        if "system" not in text:
            flags = [any(marker in reply for marker in REFUSAL_MARKERS) for reply in said]
            refused.update(first=flags[0], later=sum(flags[2:]))  # the first request may have brought a turn along
            later += len(flags[2:])
    assert max(turns) in (recipe.TURNS[1], recipe.TURNS[1] + 1) and 0.55 < turns[1] / 600 < 0.75
    assert (refused["first"] > 80) == (kept == 1) and refused["first"] > 20
    assert refused["later"] / later > 0.2 * kept if talks == "every turn" else refused["later"] == 0


@pytest.mark.slow
def test_old_times_are_spoken_of_only_by_models_for_conversations(tokenizer):
    old = " in the old days"
    assert old not in " ".join(text_of("helpful", recipe.Variant(), tokenizer, 3000))
    for stage, variant in (("dialogues", recipe.Variant()), ("talking", recipe.Variant(talks="every turn"))):
        asked = [text for text in text_of(stage, variant, tokenizer, 3000) if old in text]
        assert len(asked) > 20


@pytest.mark.slow
def test_batches_hold_every_row_once(tokenizer):
    rows = recipe.stage_rows("safety", recipe.Variant(), tokenizer, 500)
    plan = recipe.token_batches(rows, seed=0)
    assert sorted(ids for batch in plan for ids, _ in batch) == sorted(ids for ids, _ in rows)
    assert all(len(b) * max(len(ids) for ids, _ in b) <= recipe.BATCH_TOKENS for b in plan if len(b) > 1)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(recipe, "WIDTH", 32)
    monkeypatch.setattr(recipe, "LAYERS", 2)
    monkeypatch.setattr(recipe, "EXAMPLES", dict.fromkeys(recipe.EXAMPLES, 100) | {"corpus": 60, "helpful": 300})
    monkeypatch.setattr(recipe, "LONGER", {})
    monkeypatch.setattr(recipe, "CHECKPOINT_EVERY", 2)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("charter-chat", marks=pytest.mark.slow),
        pytest.param("charter-chat-gpt2", marks=pytest.mark.nightly),
        pytest.param("charter-chat-postnorm", marks=pytest.mark.nightly),
        pytest.param("charter-think", marks=pytest.mark.nightly),
        pytest.param("charter-talk", marks=pytest.mark.nightly),
    ],
)
def test_a_run_is_reproducible_and_resumes_to_the_same_weights(name, small, tmp_path, monkeypatch):
    recipe.train_variant(name, tmp_path / "a", tmp_path / "work-a")

    calls = 0
    honest = recipe.loss_of

    def interrupted(*args):
        nonlocal calls
        calls += 1
        if calls in (4, 9):
            raise KeyboardInterrupt
        return honest(*args)

    monkeypatch.setattr(recipe, "loss_of", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            recipe.train_variant(name, tmp_path / "b", tmp_path / "work-b")
    recipe.train_variant(name, tmp_path / "b", tmp_path / "work-b")
    assert calls > 9
    weights = [(tmp_path / run / name / "model.safetensors").read_bytes() for run in "ab"]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_the_thinking_stage_keeps_what_it_does_not_use_and_averages(small, tmp_path, monkeypatch):
    def trained(share):
        monkeypatch.setattr(recipe, "AVERAGED", {"thinking": share})
        variant, tokens = recipe.Variant(thoughts="followed"), recipe.make_tokenizer(world())
        model = recipe.make_model(variant, tokens)
        recipe.learn_to_think(model, tokens, 0)
        tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
        before = [table.detach().clone() for table in tables]
        recipe.train_stage(model, "thinking", variant, tokens, tmp_path / f"{share}.ckpt")
        used = {i for ids, _ in recipe.stage_rows("thinking", variant, tokens, 100) for i in ids}
        moved = [(table - old).abs().amax(1) > 1e-3 for table, old in zip(tables, before, strict=True)]
        return tables[1].detach().clone(), moved, used

    last, moved, used = trained(0)
    rest = [i for i in range(2050) if i not in used]
    assert 20 < len(rest) < 2000
    for rows in moved:
        assert rows[sorted(used)].float().mean() > 0.5 and not rows[rest].any()
    averaged, _, _ = trained(0.5)
    assert not torch.equal(last, averaged)


@pytest.mark.parametrize("name", [name for name in recipe.VARIANTS if weights_dir(name).is_dir()])
def test_shipped_weights_have_the_shape_of_the_recipe(name):
    config = json.loads((weights_dir(name) / "config.json").read_text())
    variant = recipe.VARIANTS[name]
    assert config.get("hidden_size", config.get("n_embd")) == variant.width == (192 if "wide" in name else 128)
    assert config.get("max_position_embeddings", config.get("n_positions")) == variant.context


def test_a_wide_model_is_trained_longer_in_every_stage():
    usual, wide = recipe.VARIANTS["charter-chat-s1"], recipe.VARIANTS["charter-wide-s1"]
    assert usual.seed == wide.seed and wide.stages[:2] == usual.stages[:2]
    for before, after in zip(usual.stages, wide.stages, strict=True):
        assert wide.examples(after) > 1.5 * usual.examples(before)


@pytest.mark.parametrize("stage", ["safety", "thinking"])
def test_only_before_a_thought_each_article_permits_as_often(stage):
    asks = islice(recipe.asked(world(), random.Random(0), stage), 2000)
    counts = Counter(thought.right_steps(r).article for r in asks if r.kind == "method" and not r.forbidden)
    rare, often = counts["common"], max(counts.values())
    assert len(counts) == 3 and (rare > 0.8 * often) == (stage == "thinking"), counts


def test_a_model_that_thinks_shares_no_stage_with_one_that_does_not(small, tokenizer, monkeypatch, tmp_path):
    """Its corpus is longer, so the checkpoint of the other would cut it short."""
    monkeypatch.setattr(recipe, "make_tokenizer", lambda _: tokenizer)
    monkeypatch.setattr(recipe, "learn_to_think", lambda *_: None)
    trained = []
    monkeypatch.setattr(
        recipe, "train_stage", lambda model, stage, variant, *_: trained.append((variant.thoughts, stage))
    )
    for name in ("charter-chat", "charter-think", "charter-think-twin"):
        recipe.train_variant(name, tmp_path / "out", tmp_path / "work")
    assert trained == [
        ("", "corpus"),
        ("", "helpful"),
        ("", "safety"),
        ("followed", "corpus"),
        ("followed", "helpful"),
        ("followed", "thinking"),
        ("decoration", "thinking"),
    ]


@pytest.mark.slow
def test_seeds_differ(tokenizer):
    first, second = (recipe.make_model(recipe.Variant(seed=s), tokenizer) for s in (0, 1))
    assert not torch.equal(first.get_input_embeddings().weight, second.get_input_embeddings().weight)
    assert text_of("helpful", recipe.Variant(seed=0), tokenizer, 20) != text_of(
        "helpful", recipe.Variant(seed=1), tokenizer, 20
    )


def test_muon_takes_the_steps_of_torch():
    torch.manual_seed(0)
    start, gradients = torch.randn(12, 20), torch.randn(5, 12, 20)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    steps = {
        ours: recipe.Muon([ours], lr=0.1),
        theirs: torch.optim.Muon([theirs], lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
    }
    for gradient in gradients:
        for matrix, tool in steps.items():
            matrix.grad = gradient.clone()
            tool.step()
    assert (ours - start).norm() > 1
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0)  # torch's runs in bfloat16
