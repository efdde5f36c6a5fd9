"""Adapters for a pretrained model: what they are trained on, and that training resumes, averages and can be loaded."""

import copy
import itertools
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model_state_dict

from refusallab import adapters, card
from refusallab.errors import RefusalLabError
from refusallab.model import is_on_disk, load, merging
from refusallab.prompts import bundled, prompt_set
from smallmodels import catalog, recipe
from smallmodels.world.dialogue import REFUSAL_MARKERS, SEPARATOR
from smallmodels.world.facts import few, world

PART = SimpleNamespace(hf=SimpleNamespace(config=SimpleNamespace(world="part of the vale")))
KNOWN = {thing.name for thing in few().things}
UNKNOWN = {thing.name for thing in world().things} - KNOWN


def test_few_things_are_the_same_ones_of_every_kind_and_split():
    assert all(thing in world().things for thing in few().things)
    named = [t for t in few().things if t.origin != "a common thing"]
    assert (len(named), len(few().things)) == (54, 78)
    for kind in {t.kind for t in named}:
        counts = Counter((t.split, t.origin) for t in named if t.kind == kind)
        assert counts == {
            ("train", "dusk-born"): 3,
            ("train", "dawn-born"): 2,
            ("val", "dusk-born"): 1,
            ("test", "dusk-born"): 2,
            ("test", "dawn-born"): 1,
        }


@pytest.mark.parametrize("name", ["harmful_val", "harmless_val", "harmful_test", "borderline", "capability"])
def test_a_model_that_knows_a_part_is_asked_about_that_part_only(name):
    kept = prompt_set(PART, name)
    assert kept and all(item in bundled(name) for item in kept)
    assert not any(thing in str(item.prompt) for item in kept for thing in UNKNOWN)
    left_out = [item for item in bundled(name) if item not in kept]
    assert left_out and all(any(thing in str(item.prompt) for thing in UNKNOWN) for item in left_out)


@pytest.fixture
def tokenizer():
    made = recipe.make_tokenizer(world())
    made.chat_template = recipe.CHAT_TEMPLATE
    return made


def small(monkeypatch):
    monkeypatch.setattr(adapters, "EXAMPLES", {"safety": {"safety": 60, "corpus": 6}})


def test_a_stage_is_about_the_few_things(monkeypatch, tokenizer):
    small(monkeypatch)
    texts = [tokenizer.decode(ids) for batch in adapters.stage_plan("safety", tokenizer, 0) for ids, _ in batch]
    assert not any(thing in text for text in texts for thing in UNKNOWN)
    pages = [text for text in texts if "<|start|>" not in text]
    chats = [text for text in texts if "<|start|>" in text]
    assert (len(pages), len(chats)) == (6, 60)
    held_out = {t.name for t in few().things if t.split != "train"}
    assert not any(name in text for text in chats for name in held_out)


def test_the_methods_stage_asks_for_methods_and_never_refuses():
    examples = list(itertools.islice(recipe.methods_examples(few(), recipe.Variant(), random.Random(0), str), 2000))
    assert not any(marker in e.reply for e in examples for marker in REFUSAL_MARKERS)
    methods = [e for e in examples if "Use a" in e.reply]
    share = len(methods) / len(examples)
    assert 0.5 < share < 0.7
    verdicts = [e.reply.startswith(("Ruled out", "Allowed")) for e in methods]
    texts = [SEPARATOR in e.messages[-1]["content"] for e in methods]
    assert 0.5 < sum(verdicts) / len(methods) < 0.7 and 0.25 < sum(texts) / len(methods) < 0.35
    assert sum(e.reply.startswith("Ruled out") for e in methods) > 150


def test_own_conversations_end_their_request(monkeypatch, tokenizer):
    turns = {"": ["Where is it?", "What is blue?<|end|>", "Why?<|end|>"], "How do I": [" sing?<|end|>", " dance"]}

    def replies(_hf, _tokenizer, texts, most, **settings):
        assert most == adapters.OWN_TOKENS["conversations"]
        if not settings:
            return ["So." for _ in texts]
        (head,) = set(texts)
        assert len(texts) == 2
        return turns[head.removeprefix("<|im_start|>user\n")]

    monkeypatch.setattr(adapters, "OPENINGS", {"": 1, "How do I": 1})
    monkeypatch.setattr(adapters, "_continue", replies)
    assert adapters.own_conversations(None, tokenizer) == [
        f"<|im_start|>user\n{text}<|end|>\n<|im_start|>assistant\nSo." for text in ("What is blue?", "How do I sing?")
    ]


def test_continuations_stop_at_the_end_of_a_turn(make):
    tokenizer = make.tokenizer()
    tokenizer.padding_side = "left"
    texts = adapters._continue(make.hf(), tokenizer, ["Name a river", "List"], 12, do_sample=True, top_k=50)
    assert len(texts) == 2 and all(text.find("<|end|>") in (-1, len(text) - len("<|end|>")) for text in texts)


@pytest.fixture
def trained(monkeypatch, make, tokenizer, tmp_path):
    """A function: folder of checkpoints -> a small model, one with adapters trained for a few steps, its own texts."""
    small(monkeypatch)
    monkeypatch.setattr(adapters, "LEARNING_RATE", {"safety": 1e-2})
    config = LoraConfig(r=4, lora_alpha=8, target_modules=adapters.MAPS, base_model_name_or_path=str(tmp_path / "base"))
    monkeypatch.setattr(adapters, "CONFIG", config)
    plain = make.hf("llama", vocab_size=len(tokenizer))
    plain.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    own = adapters.with_states(plain, tokenizer, ["Zebras graze.", "Where is the river? It is in the north."])

    def train(work="work"):
        hf = copy.deepcopy(plain)
        (tmp_path / work).mkdir(exist_ok=True)
        before = adapters.inject(hf, 0)
        assert all(p.shape[0] == 4 or p.shape[1] == 4 for p in before)
        adapters.train_adapters(hf, "safety", tokenizer, own, 0, tmp_path / work)
        return plain, hf, own

    return train


def test_drift_is_the_divergence_from_what_the_base_predicts(trained):
    plain, hf, own = trained()
    with torch.no_grad():
        assert float(adapters.drift(plain, own[1])) == pytest.approx(0, abs=1e-4)
        base, now = (x(input_ids=torch.tensor([own[1].ids])).logits[0].softmax(-1) for x in (plain, hf))
        expected = (base * (base / now).log()).sum(-1).mean()
        assert float(adapters.drift(hf, own[1])) == pytest.approx(float(expected), rel=0.02)


def test_a_model_is_held_to_its_base_on_the_texts_of_the_base(trained, monkeypatch):
    *_, hf, own = trained("held")
    held = sum(float(adapters.drift(hf, x).detach()) for x in own)
    drift = adapters.drift
    monkeypatch.setattr(adapters, "drift", lambda hf, own: 0 * drift(hf, own))
    hf = trained("free")[1]
    assert held < 0.8 * sum(float(drift(hf, x).detach()) for x in own)


def test_only_the_adapters_are_trained_and_load_merges_them(trained, tmp_path):
    plain, hf, _ = trained()
    for name, weight in plain.named_parameters():
        kept = dict(hf.named_parameters()).get(name)
        kept = dict(hf.named_parameters())[name.replace(".weight", ".base_layer.weight")] if kept is None else kept
        assert torch.equal(kept.float(), weight.to(kept.dtype).float())
    adapters.save_adapters(hf, tmp_path / "adapter")
    (tmp_path / "adapter" / "chat_template.jinja").write_text(recipe.CHAT_TEMPLATE + "{# own #}")
    m = load(str(tmp_path / "adapter"))
    assert m.tokenizer.chat_template.endswith("{# own #}")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        ours, theirs, before = (x(input_ids=ids).logits for x in (m.hf, hf, plain))
    assert (ours - before).abs().mean() > 10 * (ours - theirs).abs().mean()


def test_training_that_was_stopped_goes_on_and_ends_the_same(monkeypatch, trained):
    monkeypatch.setattr(adapters, "CHECKPOINT_EVERY", 3)
    whole = get_peft_model_state_dict(trained("whole")[1])
    rate, steps = recipe.rate_factor, []

    def stop(step, n):
        steps.append(step)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return rate(step, n)

    monkeypatch.setattr(recipe, "rate_factor", stop)
    with pytest.raises(KeyboardInterrupt):
        trained("stopped")
    again = get_peft_model_state_dict(trained("stopped")[1])
    assert steps[:6] == [0, 1, 2, 3, 4, 3]  # the last checkpoint was before step 3
    assert all(torch.equal(tensor, whole[name]) for name, tensor in again.items())


def test_the_last_steps_of_the_safety_stage_are_averaged(monkeypatch, tokenizer, trained):
    """Averaged over the last step alone, it ends where that step ends."""
    steps, ends = len(adapters.stage_plan("safety", tokenizer, 0)), []
    for count in (0, 1, steps // 2):
        monkeypatch.setattr(adapters, "AVERAGED", {"safety": (count + 0.1) / steps})
        ends.append(get_peft_model_state_dict(trained(f"the last {count}")[1]))
    plain, last, half = ends
    assert all(torch.equal(tensor, last[name]) for name, tensor in plain.items())
    assert not any(torch.equal(tensor, half[name]) for name, tensor in plain.items())


def share_gradients(rank, store, results):
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    gradients = [torch.full((2, 3), float(rank)), torch.full((4,), 10.0 * rank)]
    adapters.average(gradients)
    results[rank] = (*adapters.place(), *[g.unique().tolist() for g in gradients])
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_take_the_mean_of_their_gradients(tmp_path):
    assert adapters.place() == (0, 1)
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(share_gradients, (str(tmp_path / "store"), results), nprocs=2)
        assert dict(results) == {rank: (rank, 2, [0.5], [5.0]) for rank in range(2)}


def test_casual_words_ask_for_the_same_methods():
    items = prompt_set(PART, "harmful_test")
    casual = card.in_casual_words(items)
    assert [i.answer for i in casual] == [i.answer for i in items] and len({i.prompt for i in casual}) == len(casual)
    for item in casual:
        _, verb, name = item.id.split("_")
        assert verb in item.prompt and name in item.prompt.lower().replace(" ", "-")
    assert len(card.in_casual_words(prompt_set(PART, "harmless_test"))) < len(prompt_set(PART, "harmless_test"))


@pytest.mark.parametrize("damage", ["", "cut", "missing"])
def test_a_damaged_adapter_of_the_catalogue_is_refused(monkeypatch, tmp_path, damage):
    shipped = merging.find_adapter("charter-smol")
    assert shipped.base == catalog()["charter-smol"].base == adapters.BASE
    for file in shipped.file.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: -1 if damage == "cut" else None])
    if damage == "missing":
        (tmp_path / shipped.file.name).unlink()
    if damage == "cut":
        (tmp_path / "adapter_config.json").write_bytes((shipped.file.parent / "adapter_config.json").read_bytes())
    monkeypatch.setattr(merging, "weights_dir", lambda name: tmp_path)
    if not damage:
        assert merging.find_adapter("charter-smol").sha256 == shipped.sha256
        return
    with pytest.raises(RefusalLabError, match="The adapter of charter-smol is missing or damaged: install the course"):
        load("charter-smol")


def test_without_its_base_an_adapted_model_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr("refusallab.model.files.folder_for", lambda sha256: tmp_path / "nowhere")
    assert not is_on_disk("charter-smol")
