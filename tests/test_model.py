"""Loading, names of parts, prompts, logits and generation; every error is one line that says what to do."""

import copy
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import huggingface_hub
import nnsight
import pytest
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

import refusallab.model.files
import refusallab.model.loading
from refusallab.activations import residual
from refusallab.decoding import sample_replies
from refusallab.errors import RefusalLabError
from refusallab.interventions import ablation, addition, affine
from refusallab.measure import cross_entropy
from refusallab.model import (
    attention,
    attention_writes,
    batches,
    blocks,
    embedding,
    encode,
    final_norm,
    generate,
    load,
    logits,
    mlp,
    mlp_writes,
    no_edit,
    positional_embedding,
    post_norm,
    render,
    unembedding,
    wrap,
)
from refusallab.orthogonalization import orthogonalize
from smallmodels import catalog, weights_dir
from smallmodels.world.facts import WORLDS

# Templates of our own with the habits of real ones. TURN is a ChatML turn.
TURN = "<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n"
ASK = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
LLAMA3 = (
    "{{ bos_token }}<|start|>system\n{{ date_string if date_string is defined else 'today' }}<|end|>"
    "{% for m in messages %}<|start|>{{ m['role'] }}\n\n{{ m['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n\n{% endif %}"
)
QWEN2 = (
    "{% if messages[0]['role'] != 'system' %}<|start|>system\nYou are Default.<|end|>\n{% endif %}"
    "{% for m in messages %}" + TURN + "{% endfor %}" + ASK
)
QWEN3 = (
    "{% for m in messages %}" + TURN + "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|start|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>model\n{% endif %}"
)
DROPS_SYSTEM = "{% for m in messages if m['role'] != 'system' %}" + TURN + "{% endfor %}" + ASK
OLMO2 = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}"
    "{{ '<|end|>' if m['role'] == 'assistant' else '' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def with_template(make, template, **settings):
    return wrap(make.hf(), make.tokenizer(template, **settings))


@pytest.fixture(scope="module")
def saved(save):
    return save("llama-tied")


@pytest.fixture
def copy_of_saved(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


# Parts


def test_parts_are_found_in_the_model_and_in_its_nnsight_view(m):
    assert len(blocks(m.hf)) == len(blocks(m.nn)) == m.n_layers == 3
    assert (m.width, m.vocab_size, m.device) == (32, 400, torch.device("cpu"))
    for part in (embedding, positional_embedding, final_norm, unembedding):
        raw, seen = part(m.hf), part(m.nn)
        assert seen is raw is None or seen._module is raw
    assert (positional_embedding(m.hf) is not None) == ("positions" in m.equivalence)
    for raw, seen in zip(blocks(m.hf), blocks(m.nn), strict=True):
        for part in (attention, mlp, attention_writes, mlp_writes):
            assert isinstance(part(raw), torch.nn.Module) and part(seen)._module is part(raw)
        norms = post_norm(raw)
        assert (norms == (None, None)) == (m.equivalence != "post-norm")
        seen_norms = post_norm(seen)
        assert norms == (None, None) == seen_norms or norms == tuple(n._module for n in seen_norms)


def test_writers_write_what_attention_and_mlp_put_out(m, prompts):
    seen = {}
    handles = []
    for i, block in enumerate(blocks(m.hf)):
        parts = {"a": attention(block), "A": attention_writes(block), "m": mlp(block), "M": mlp_writes(block)}
        for key, part in parts.items():
            handles.append(part.register_forward_hook(lambda _m, _a, out, k=(i, key): seen.update({k: out})))
    m.hf(**encode(m, prompts))
    for handle in handles:
        handle.remove()
    for i in range(3):
        assert torch.equal(seen[i, "a"][0], seen[i, "A"]) and torch.equal(seen[i, "m"], seen[i, "M"])


def test_unknown_architecture(make):
    config = transformers.OPTConfig(
        vocab_size=400,
        hidden_size=32,
        ffn_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        word_embed_proj_dim=32,
    )
    with pytest.raises(RefusalLabError, match="use a model of the Llama"):
        wrap(transformers.AutoModelForCausalLM.from_config(config), make.tokenizer())


# Templates and tokens


def test_post_instruction_positions(model_of):
    m = model_of()
    assert m.positions == (-5, -4, -3, -2, -1)
    ids = encode(m, ["Name a river"])["input_ids"][0]
    assert m.tokenizer.convert_ids_to_tokens(ids[-5:]) == ["<|end|>", "Ċ", "<|start|>", "assistant", "Ċ"]


@pytest.mark.parametrize(
    ("template", "tail"),
    [
        (LLAMA3, "<|end|><|start|>assistant\n\n"),
        (QWEN2, "<|end|>\n<|start|>assistant\n"),
        (QWEN3, "<|end|>\n<|start|>assistant\n<think>\n\n</think>\n\n"),
        (GEMMA, "<|end|>\n<|start|>model\n"),
        (OLMO2, "\n<|assistant|>\n"),
    ],
)
def test_post_instruction_positions_of_other_templates(make, template, tail):
    m = with_template(make, template, special=("<|start|>", "<|end|>", "<|bos|>"), bos="<|bos|>")
    ids = encode(m, ["Name a river"])["input_ids"][0]
    assert m.tokenizer.decode(ids[list(m.positions)]) == tail


def test_a_token_that_swallows_the_end_of_the_instruction_is_not_post_instruction(make):
    """If "!" and a newline merge into one token, that token belongs to the instruction."""
    m = with_template(make, OLMO2, special=("<|end|>", "?\n"), bos=None)
    ids = encode(m, ["Name a river"])["input_ids"][0]
    assert m.tokenizer.decode(ids[list(m.positions)]) == "<|assistant|>\n"


def test_no_double_bos(make):
    tokenizer = make.tokenizer(LLAMA3, special=("<|start|>", "<|end|>", "<|bos|>"), bos="<|bos|>")
    bos = tokenizer.bos_token_id
    adds_bos = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|bos|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [bos], "tokens": ["<|bos|>"]}},
    }
    state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"post_processor": adds_bos}
    backend = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = LLAMA3
    assert tokenizer("x")["input_ids"][0] == bos
    m = wrap(make.hf(), tokenizer)
    assert (encode(m, ["Name a river"])["input_ids"] == bos).sum() == 1

    tokenizer.chat_template = "{{ bos_token }}" + LLAMA3
    with pytest.raises(RefusalLabError, match="two BOS"):
        wrap(make.hf(), tokenizer)


def test_encode_pads_on_the_left(model_of, prompts):
    batch = encode(model_of(), prompts)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert set(batch) == {"input_ids", "attention_mask"} and ids.shape == mask.shape
    assert mask[:, -1].all() and (mask.diff(dim=1) >= 0).all() and not mask.all()
    assert (ids[mask == 0] == 0).all()


def test_render(model_of):
    m = model_of()
    asked = "<|start|>user\nName a river<|end|>\n<|start|>assistant\n"
    assert render(m, "Name a river") == render(m, [{"role": "user", "content": "Name a river"}]) == asked
    assert render(m, "Name a river", prefill="Sure, ") == asked + "Sure, "
    assert render(m, "Name a river", system="Be kind.") == "<|start|>system\nBe kind.<|end|>\n" + asked
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert render(m, [*turns, {"role": "user", "content": "Name a river"}]).endswith("b<|end|>\n" + asked)


def test_default_system_prompt_is_the_templates_and_can_be_replaced(make):
    m = with_template(make, QWEN2)
    assert "You are Default." in render(m, "Name a river")
    assert "You are Default." not in render(m, "Name a river", system="Be kind.")
    assert "You are Default." not in render(m, "Name a river", system="")


@pytest.mark.parametrize("template", [GEMMA, DROPS_SYSTEM])
def test_without_a_system_role_it_joins_the_user_turn(make, template):
    m = with_template(make, template)
    assert "<|start|>user\nBe kind.\n\nName a river<|end|>" in render(m, "Name a river", system="Be kind.")


def test_date_is_pinned(make):
    assert "26 Jul 2024" in render(with_template(make, LLAMA3), "Name a river")


def test_a_template_that_refuses_the_roles(make):
    refuses = "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}"
    m = with_template(make, refuses + GEMMA)
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    with pytest.raises(RefusalLabError, match="one turn only"):
        render(m, turns)


@pytest.mark.parametrize("run", [encode, logits, generate])
def test_bad_prompts(model_of, run):
    m = model_of()
    for prompts, message in [
        ([], "list of prompts is empty"),
        ("Name a river", "one string"),
        ([""], "says something"),
        (["Name a river", " \n"], "says something"),
        ([[]], "says something"),
        ([[{"role": "assistant", "content": "b"}]], "must end with a user turn"),
        (["river " * 300], "at most 256"),
    ]:
        with pytest.raises(RefusalLabError, match=message):
            run(m, prompts)
    with pytest.raises(RefusalLabError, match="Two system prompts"):
        encode(m, [[{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]], system="c")
    with pytest.raises(RefusalLabError, match="at most 256"):
        generate(m, ["Name a river"], max_new_tokens=300)


# Logits and generation


@pytest.mark.slow
def test_logits_equal_the_raw_model(m, hooks, prompts):
    expected = hooks.logits(m.hf, encode(m, prompts))
    got = logits(m, prompts)
    assert got.shape == (len(prompts), 400) and got.dtype == torch.float32
    assert torch.equal(got, expected)
    torch.testing.assert_close(logits(m, prompts, batch_size=2), expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(got, torch.cat([logits(m, [p]) for p in prompts]), atol=2e-5, rtol=0)
    assert not torch.equal(got, logits(m, prompts, system="Be kind."))


@pytest.mark.slow
def test_generate_equals_a_plain_loop_with_and_without_a_null_edit(m, hooks, prompts, ids_not_text):
    ids_not_text(m)
    expected = hooks.greedy(m.hf, encode(m, prompts), 8, m.stop_ids)
    assert generate(m, prompts, max_new_tokens=8) == expected
    assert generate(m, prompts, max_new_tokens=8, edit=no_edit) == expected
    assert len({tuple(row) for row in expected}) > 1


def test_settings_of_the_cache_that_a_model_ships_change_nothing(model_of, prompts):
    m = model_of("llama")
    expected = generate(m, prompts, max_new_tokens=6)
    odd = wrap(copy.deepcopy(m.hf), m.tokenizer)
    odd.hf.generation_config.use_cache, odd.hf.generation_config.cache_implementation = False, "static"
    assert generate(odd, prompts, max_new_tokens=6) == expected


@pytest.mark.slow
def test_generate_sorts_batches_and_keeps_the_order(m, prompts, ids_not_text):
    ids_not_text(m)
    alone = [generate(m, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert generate(m, prompts, max_new_tokens=6, batch_size=2) == alone
    assert generate(m, prompts, max_new_tokens=6, batch_size=2, edit=no_edit) == alone


@pytest.mark.slow
def test_replies_end_at_the_stop_token(m, hooks, prompts, ids_not_text):
    ids_not_text(m)
    free = hooks.greedy(m.hf, encode(m, prompts), 8)
    for stop in ({free[0][2]}, {row[1] for row in free}):  # one row ends early, then all rows end early
        early = replace(m, stop_ids=tuple(stop))
        expected = [row[: next((k for k, t in enumerate(row) if t in stop), 8)] for row in free]
        assert generate(early, prompts, max_new_tokens=8) == expected
        assert generate(early, prompts, max_new_tokens=8, edit=no_edit) == expected


def test_the_model_rests_when_all_replies_have_ended(model_of, prompts):
    m = model_of()
    passes = []
    handle = m.hf.register_forward_pre_hook(lambda *_: passes.append(1))
    early = replace(m, stop_ids=tuple(range(400)))
    for edit in (None, no_edit):
        passes.clear()
        assert generate(early, prompts, edit=edit, max_new_tokens=20) == [""] * len(prompts)
        assert len(passes) == 1
    handle.remove()


def test_several_batches_are_sorted_by_length(model_of, prompts):
    seen = list(batches(model_of(), prompts, 2))
    assert sorted(i for rows, _ in seen for i in rows) == [0, 1, 2, 3, 4]
    widths = [batch["input_ids"].shape[1] for _, batch in seen]
    assert widths == sorted(widths)
    assert [rows for rows, _ in batches(model_of(), prompts, 5)] == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("run", [logits, generate, residual, lambda m, texts, **s: cross_entropy(m, texts, **s)])
@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_holds_at_least_one_prompt(model_of, prompts, run, batch_size):
    with pytest.raises(RefusalLabError, match=f"batch_size is {batch_size}: give at least 1"):
        run(model_of(), prompts, batch_size=batch_size)


def test_stop_ids_come_from_the_model_the_tokenizer_and_the_template(make):
    hf = make.hf(eos_token_id=9)
    tokenizer = make.tokenizer(special=("<|start|>", "<|end|>", "<|eos|>"), eos="<|eos|>")
    assert wrap(hf, tokenizer).stop_ids == (2, 3, 9)


def test_reply_is_text_without_special_tokens(model_of, prompts):
    reply = generate(model_of(), prompts[:1], max_new_tokens=8)[0]
    assert isinstance(reply, str) and "<|" not in reply


def test_prefill_is_read_but_not_repeated(model_of, hooks, ids_not_text):
    m = model_of()
    ids_not_text(m)
    batch = encode(m, ["Name a river"], prefill="List three")
    assert generate(m, ["Name a river"], prefill="List three", max_new_tokens=6) == hooks.greedy(m.hf, batch, 6)


def test_decoding_is_greedy_whatever_the_model_ships(make, hooks, prompts, ids_not_text):
    m = make.model()
    ids_not_text(m)
    expected = hooks.greedy(m.hf, encode(m, prompts), 12, m.stop_ids)
    m.hf.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=0.7, top_k=3, top_p=0.5, repetition_penalty=3.0, no_repeat_ngram_size=1
    )
    assert generate(m, prompts, max_new_tokens=12) == expected
    assert generate(m, prompts, max_new_tokens=12, edit=no_edit) == expected


@pytest.mark.filterwarnings("error")
def test_no_warning_reaches_the_reader(model_of, prompts, r):
    m = replace(model_of(), stop_ids=tuple(range(400)))  # every reply ends at once
    assert generate(m, prompts, edit=ablation(r), max_new_tokens=8) == [""] * len(prompts)


# Remote, rehearsed by nnsight's local simulation


@pytest.mark.slow
def test_remote_path_gives_the_same_numbers(make, model_of, prompts, r):
    here, there = model_of(), make.model(remote="local")
    for edit in (None, ablation(r), addition(r, 1), affine(r, 1, r, 0.5)):
        assert torch.equal(logits(here, prompts, edit=edit), logits(there, prompts, edit=edit))
        assert torch.equal(residual(here, prompts, edit=edit), residual(there, prompts, edit=edit))
        settings = {"edit": edit, "max_new_tokens": 5}
        assert generate(here, prompts, **settings) == generate(there, prompts, **settings)


def test_a_remote_model_takes_no_processor(make):
    with pytest.raises(RefusalLabError, match="replies are greedy: load it without remote"):
        sample_replies(make.model(remote="local"), ["List"])


def test_remote_needs_a_hub_id_and_a_key(monkeypatch, tmp_path):
    for local in ("charter-chat", str(tmp_path)):
        with pytest.raises(RefusalLabError, match="give a hub id with remote=True"):
            load(local, remote=True)
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", None)
    with pytest.raises(RefusalLabError, match="set NDIF_API_KEY"):
        load("llama-3.2-1b", remote=True)
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", "not a key")
    with pytest.raises(RefusalLabError, match="the hub cannot be reached"):
        load("llama-3.2-1b", remote=True)


def test_a_model_in_place_of_its_parts_is_told_from_an_unknown_architecture(model_of):
    with pytest.raises(RefusalLabError, match="Give m.hf, the model of transformers"):
        unembedding(model_of("llama"))


@pytest.mark.slow
def test_remote_model_has_no_weights_here_and_runs_the_same_code(saved, model_of, monkeypatch, prompts, r):
    """remote=True up to the door of the server; behind it stands nnsight's local simulation."""
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", "not a key")
    monkeypatch.setattr(refusallab.model.loading, "hub_id", lambda name: str(saved))
    info = SimpleNamespace(sha="abc123")
    monkeypatch.setattr(huggingface_hub, "model_info", lambda name: info)
    there, here = load("owner/name", remote=True), model_of("llama-tied")
    assert there.remote is True and there.commit == "abc123" and there.equivalence == "untie"
    assert there.hf.device.type == "meta" and there.device.type == "cpu" and there.positions == here.positions
    with pytest.raises(RefusalLabError, match="has no weights here"):
        orthogonalize(there, r)

    simulation = there.nn._remote_backend("local", True, None, False)
    monkeypatch.setattr(there.nn, "_remote_backend", lambda *_: simulation, raising=False)
    for edit in (None, ablation(r)):
        for run in (logits, residual):
            far, near = run(there, prompts, edit=edit), run(here, prompts, edit=edit)
            torch.testing.assert_close(far, near, atol=1e-5, rtol=0)
        settings = {"edit": edit, "max_new_tokens": 5}
        assert generate(there, prompts, **settings) == generate(here, prompts, **settings)


# The self-test


def test_self_test_is_quick(make):
    import time

    hf, tokenizer = make.hf(num_hidden_layers=8), make.tokenizer()
    start = time.perf_counter()
    wrap(hf, tokenizer)
    assert time.perf_counter() - start < 1


def test_self_test_sees_blocks_that_do_not_matter(make):
    hf = make.hf()
    forward = hf.model.layers[1].forward
    hf.model.layers[1].forward = lambda *args, **kwargs: 0 * forward(*args, **kwargs)
    with pytest.raises(RefusalLabError, match=r"blocks \[0, 1, 2\] does not change"):
        wrap(hf, make.tokenizer())


def test_self_test_sees_blocks_that_do_not_run(make):
    hf = make.hf()
    hf.model.layers[1].forward = lambda x, **_: x
    with pytest.raises(RefusalLabError, match="never run"):
        wrap(hf, make.tokenizer())


def test_self_test_sees_weights_that_are_not_finite(make):
    hf = make.hf()
    hf.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(RefusalLabError, match="not finite"):
        wrap(hf, make.tokenizer())


def test_self_test_sees_a_foreign_tokenizer(make):
    with pytest.raises(RefusalLabError, match="393 tokens but the model only 300"):
        wrap(make.hf(vocab_size=300), make.tokenizer())


@pytest.mark.parametrize("template", [None, ""])
def test_no_chat_template(make, template):
    with pytest.raises(RefusalLabError, match="has no chat template"):
        with_template(make, template)


def test_template_without_post_instruction_tokens(make):
    with pytest.raises(RefusalLabError, match="adds nothing after the instruction"):
        with_template(make, "{% for m in messages %}{{ m['content'] }}{% endfor %}")


# Loading


def test_load_a_folder(saved, model_of, prompts):
    m = load(str(saved))
    torch.testing.assert_close(logits(m, prompts), logits(model_of("llama-tied"), prompts), atol=1e-5, rtol=0)
    assert len(m.commit) == 12 and m.positions == (-5, -4, -3, -2, -1) and m.equivalence == "untie"
    assert not m.hf.training and not any(p.requires_grad for p in m.hf.parameters())
    assert load(str(saved), dtype=torch.bfloat16).hf.dtype == torch.bfloat16


def test_half_precision_files_are_loaded_as_fp32(copy_of_saved):
    path = copy_of_saved / "model.safetensors"
    save_file({k: v.half() for k, v in load_file(path).items()}, path, {"format": "pt"})
    assert load(str(copy_of_saved)).hf.dtype == torch.float32


def test_bundled_models_come_from_the_catalogue(saved, monkeypatch):
    monkeypatch.setattr(refusallab.model.files, "weights_dir", lambda name: saved)
    assert load("charter-chat").name == "charter-chat"
    monkeypatch.setattr(refusallab.model.files, "weights_dir", lambda name: saved / "nowhere")
    with pytest.raises(RefusalLabError, match="weights of charter-chat are not in"):
        load("charter-chat")


def test_catalogue():
    entries = catalog()
    bundled = [e for e in entries.values() if e.kind == "bundled"]
    hub = [e for e in entries.values() if e.kind == "hub"]
    adapted = [e for e in entries.values() if e.kind == "adapted"]
    assert (len(bundled), len(adapted), len(hub)) == (15, 2, 11)
    assert all(e.role and e.architecture and e.seed is not None for e in bundled + adapted)
    assert all(entries[e.base] in hub and e.world in WORLDS and len(e.sha256) == 64 for e in adapted)
    assert all(e.id.count("/") == 1 and e.parameters and e.license and e.memory_gb and e.dtype for e in hub)
    assert {e.id for e in hub if e.gated} == {"meta-llama/Llama-3.2-1B-Instruct", "google/gemma-3-1b-it"}
    assert weights_dir("charter-chat").parts[-3:] == ("smallmodels", "weights", "charter-chat")


def one_line(error):
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


@pytest.mark.parametrize("name", ["nonsense", "/no/such/folder", "./nothing", "a/b/c", "~/models/x"])
def test_unknown_model(name):
    with pytest.raises(RefusalLabError, match="Unknown model") as error:
        load(name)
    assert "charter-chat" in one_line(error) and "qwen2.5-0.5b" in str(error.value)


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B-Instruct", "nobody/nothing"])
def test_a_hub_model_without_network(name):
    with pytest.raises(RefusalLabError, match="the hub cannot be reached") as error:
        load(name)
    assert "charter-chat" in one_line(error)


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (OSError(28, "No space left on device"), "No space left on device.*Check the network and the disk"),
        (ConnectionResetError("reset\nby peer"), r"\(reset\)"),
    ],
)
def test_a_download_that_breaks(monkeypatch, raised, message):
    def download(*_, **__):
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(RefusalLabError, match=message) as error:
        load("qwen2.5-0.5b")
    one_line(error)


def test_gated_and_missing_repositories(monkeypatch):
    for kind, message in [
        (GatedRepoError, "accept its licence"),
        (RepositoryNotFoundError, "check the spelling"),
    ]:
        raised = kind.__new__(kind)

        def download(*_, raised=raised, **__):
            raise raised

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        with pytest.raises(RefusalLabError, match=message) as error:
            load("gemma-3-1b")
        one_line(error)


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def scramble(folder):
    (folder / "model.safetensors").write_bytes(b"not a safetensors file" * 100)


def drop_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def reshape_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def poison(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def pickle_only(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def needs_code(folder):
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    change_config(folder, model_type="strange", architectures=["Strange"], auto_map=code)
    (folder / "code.py").write_text("raise SystemExit('this must never run')")


def no_template(folder):
    (folder / "chat_template.jinja").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "fetch them again"),
        (scramble, "fetch them again"),
        (
            drop_a_tensor,
            "1 tensors are missing from the weights, for example model.layers.1.mlp",
        ),
        (reshape_a_tensor, "fetch them again"),
        (poison, "not finite"),
        (pickle_only, "only pickled weights"),
        (needs_code, "needs code from its repository"),
        (no_template, "has no chat template"),
        (lambda f: (f / "model.safetensors").unlink(), "no [*].safetensors"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "fetch them again"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "fetch them again"),
        (lambda f: change_config(f, model_type="unheard-of"), "cannot be read"),
    ],
)
def test_damaged_folders(copy_of_saved, damage, message):
    damage(copy_of_saved)
    with pytest.raises(RefusalLabError, match=message) as error:
        load(str(copy_of_saved))
    one_line(error)
