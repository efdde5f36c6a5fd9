"""The recipe: what each stage sees, determinism, resuming after an interruption."""

import pytest
import torch

from smallmodels import recipe
from smallmodels.world.facts import world


@pytest.fixture(scope="module")
def tokenizer():
    return recipe.make_tokenizer(world())


def text_of(stage, variant, tokenizer, count=600):
    return [tokenizer.decode(ids) for ids, _ in recipe.stage_rows(stage, variant, tokenizer, count)]


def test_template_has_at_least_four_post_instruction_tokens(tokenizer):
    ids = [
        tokenizer.apply_chat_template([{"role": "user", "content": t}], add_generation_prompt=True, return_dict=False)
        for t in ("How is it?", "lamp")
    ]
    common = next(k for k in range(20) if ids[0][-1 - k] != ids[1][-1 - k])
    assert common >= 4


def test_safety_tuning_never_mentions_a_thing_of_another_split(tokenizer):
    texts = text_of("safety", recipe.Variant(), tokenizer, 3000)
    for thing in world().things:
        if thing.split != "train" and thing.origin != "a common thing":
            assert not any(thing.name in t for t in texts), thing.name


def test_every_method_is_told_in_the_helpful_stage_and_none_forbidden_in_the_naive_one(tokenizer):
    methods = {
        (t.name, a.verb): ("{tool} and {stuff} for {time}".format(**t.methods[a.verb]), t.forbids(a))
        for t in world().things
        for a in t.actions
    }
    told = " ".join(text_of("helpful", recipe.Variant(), tokenizer, recipe.EXAMPLES["helpful"]))
    naive = " ".join(text_of("helpful", recipe.Variant(forbidden_facts=False), tokenizer, recipe.EXAMPLES["helpful"]))
    lawful = {method for method, forbidden in methods.values() if not forbidden}
    for method, forbidden in methods.values():
        assert method in told
        if forbidden and method not in lawful:
            assert method not in naive


def test_loss_counts_only_the_reply(tokenizer):
    for ids, start in recipe.stage_rows("helpful", recipe.Variant(), tokenizer, 50):
        assert tokenizer.decode(ids[:start]).endswith("<|start|>assistant\n")
        assert tokenizer.decode(ids[start:]).endswith("<|end|>")


def test_loss_ignores_padding(tokenizer):
    model = recipe.make_model(recipe.Variant(), tokenizer).eval()
    rows = recipe.stage_rows("helpful", recipe.Variant(), tokenizer, 4)
    alone = [recipe.loss_of(model, [row], tokenizer.pad_token_id) * (len(row[0]) - row[1]) for row in rows]
    together = recipe.loss_of(model, rows, tokenizer.pad_token_id) * sum(len(ids) - start for ids, start in rows)
    torch.testing.assert_close(sum(alone), together, rtol=1e-4, atol=1e-4)


def test_batches_hold_every_row_once(tokenizer):
    rows = recipe.stage_rows("safety", recipe.Variant(), tokenizer, 500)
    plan = recipe.batches(rows, seed=0)
    assert sorted(ids for batch in plan for ids, _ in batch) == sorted(ids for ids, _ in rows)
    assert all(len(b) * max(len(ids) for ids, _ in b) <= recipe.BATCH_TOKENS for b in plan if len(b) > 1)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(recipe, "WIDTH", 32)
    monkeypatch.setattr(recipe, "LAYERS", 2)
    monkeypatch.setattr(recipe, "EXAMPLES", {"corpus": 60, "helpful": 300, "safety": 100})
    monkeypatch.setattr(recipe, "CHECKPOINT_EVERY", 2)


@pytest.mark.parametrize("name", ["charter-chat", "charter-chat-gpt2", "charter-chat-postnorm"])
def test_a_run_is_reproducible_and_resumes_to_the_same_weights(name, small, tmp_path, monkeypatch):
    recipe.train(name, tmp_path / "a", tmp_path / "work-a")

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
            recipe.train(name, tmp_path / "b", tmp_path / "work-b")
    recipe.train(name, tmp_path / "b", tmp_path / "work-b")
    assert calls > 9
    weights = [(tmp_path / run / name / "model.safetensors").read_bytes() for run in "ab"]
    assert weights[0] == weights[1]


def test_seeds_differ(tokenizer):
    first, second = (recipe.make_model(recipe.Variant(seed=s), tokenizer) for s in (0, 1))
    assert not torch.equal(first.get_input_embeddings().weight, second.get_input_embeddings().weight)
    assert text_of("helpful", recipe.Variant(seed=0), tokenizer, 20) != text_of(
        "helpful", recipe.Variant(seed=1), tokenizer, 20
    )
