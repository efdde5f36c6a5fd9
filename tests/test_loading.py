"""What `load` and `wrap` refuse, and with which remedy: other architectures, codes for weights, incomplete folders."""

import json
import shutil
from pathlib import Path

import httpx
import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from refusallab import orthogonalization
from refusallab.activations import logit_lens, stream
from refusallab.attacks.gcg import allowed_tokens
from refusallab.errors import RefusalLabError
from refusallab.interventions import unit
from refusallab.model import (
    blocks,
    embedding,
    encode,
    encode_texts,
    files,
    is_on_disk,
    load,
    logits,
    mlp_writes,
    render,
    selftest,
    wrap,
)
from refusallab.orthogonalization import orthogonalize
from smallmodels import catalog


@pytest.fixture(scope="module")
def saved(save):
    return save("llama")


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def refused(name, **settings):
    with pytest.raises(RefusalLabError) as error:
        load(str(name), **settings)
    assert "\n" not in str(error.value) and len(str(error.value)) < 450
    return str(error.value)


def configure(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewrite(folder, change):
    """Change the tensors of a folder: change({name: tensor}) edits the dictionary."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def matrices(tensors):
    return [key for key, x in tensors.items() if x.ndim == 2 and "embed" not in key and "lm_head" not in key]


def same_logits(ours, theirs, prompts):
    torch.testing.assert_close(logits(ours, prompts), logits(theirs, prompts), atol=1e-5, rtol=0)


# The stream adds up


@pytest.mark.slow
def test_the_lens_gives_the_logits_of_every_architecture(m, prompts):
    for prompt in prompts[:2]:
        torch.testing.assert_close(logit_lens(m, stream(m, prompt)[-1, -1]), logits(m, [prompt])[0], atol=1e-4, rtol=0)


def patched(module, change):
    """Make a module put out change(output), inside its forward, as another architecture would."""
    forward = module.forward
    module.forward = lambda *args, **kwargs: change(forward(*args, **kwargs))


def another_writer(hf):
    patched(hf.model.layers[1], lambda x: x + 0.1 * torch.ones_like(x))


def another_scale(hf):
    hf.config.residual_multiplier = 0.5


def a_norm_after_the_mlp(hf):
    """As GLM-4 was before its norms were known: what the MLP outputs is not what the stream gets."""
    layer = hf.model.layers[2]
    layer.another_norm = norm = torch.nn.RMSNorm(32)
    torch.nn.init.uniform_(norm.weight)

    def forward(x, **kwargs):
        x = x + layer.self_attn(layer.input_layernorm(x), **kwargs)[0]
        return x + norm(layer.mlp(layer.post_attention_layernorm(x)))

    layer.forward = forward


def a_skip_between_blocks(hf):
    model, seen = hf.model, {}
    forward = model.layers[0].forward
    last = model.layers[2]

    def keep(x, **kwargs):
        seen["x"] = forward(x, **kwargs)
        return seen["x"]

    model.layers[0].forward = keep
    last.register_forward_pre_hook(lambda _module, args: (args[0] + 0.1 * seen["x"], *args[1:]))


def attention_beyond_its_projection(hf):
    patched(hf.model.layers[1].self_attn, lambda out: (0.9 * out[0], *out[1:]))


def another_scale_of_logits(hf):
    forward = hf.forward

    def scaled(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = 1.1 * out.logits
        return out

    hf.forward = scaled


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (another_writer, "block 1 outputs more than its input, attention and MLP"),
        (another_scale, "block 0 outputs more than its input, attention and MLP"),
        (a_norm_after_the_mlp, "block 2 outputs more than its input, attention and MLP"),
        (a_skip_between_blocks, "block 2 does not read what block 1 outputs"),
        (attention_beyond_its_projection, "attention 1 does not end in its output projection"),
        (another_scale_of_logits, "its logits are not what the final norm"),
    ],
)
def test_a_stream_that_does_not_add_up_is_refused(make, change, message, dtype):
    hf = make.hf("llama")
    change(hf)
    hf.to(dtype)
    with pytest.raises(RefusalLabError, match=message):
        wrap(hf, make.tokenizer())


def test_the_start_of_the_stream_is_the_embedding(make):
    hf = make.hf("llama")
    hf.model.layers[0].register_forward_pre_hook(
        lambda _module, args: (torch.nn.functional.normalize(args[0], dim=-1), *args[1:])
    )
    with pytest.raises(RefusalLabError, match="block 0 does not read the embedding alone"):
        wrap(hf, make.tokenizer())


SIZE = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prefix", "extra", "message"),
    [
        ("Gemma3nText", {"vocab_size_per_layer_input": 400, "num_kv_shared_layers": 0}, "not attention, then one MLP"),
        ("Gemma4Text", {"vocab_size_per_layer_input": 400}, "more than its input"),
        ("HyperCLOVAX", {"residual_multiplier": 0.3}, "more than its input"),
        ("Qwen3Moe", EXPERTS, "mixture of experts .*qwen3-0.6b"),
        ("Qwen2Moe", EXPERTS, "mixture of experts .*qwen2.5-0.5b"),
        ("Mixtral", {"num_local_experts": 4}, "mixture of experts .*qwen2.5-0.5b"),
        ("GptOss", {"num_local_experts": 4}, "mixture of experts"),
        ("Phi", {}, "PhiModel has no ln_f or norm: use a model of the Llama kind"),
        ("GPTNeoX", {}, "has no transformer or model"),
        ("Falcon", {}, "FalconDecoderLayer has no attn or self_attn"),
    ],
)
def test_other_architectures_are_refused_with_the_reason(make, prefix, extra, message):
    sizes = {key: value for key, value in SIZE.items() if prefix != "Falcon" or key != "head_dim"}
    config = getattr(transformers, f"{prefix}Config")(**sizes, **extra)
    hf = transformers.AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    for parameter in hf.parameters():
        parameter.data.normal_(std=0.3)
    with pytest.raises(RefusalLabError, match=message) as error:
        wrap(hf, make.tokenizer(), "theirs")
    assert "theirs" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prefix", "equivalence"),
    [
        ("Exaone4", "post-norm"),
        ("Olmo3", "post-norm"),
        ("SmolLM3", "untie"),
        ("Starcoder2", "untie+biases"),
        ("StableLm", "exact"),
        ("Nemotron", "exact"),
        ("Cohere2", "untie"),
        ("Gemma", "untie"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_architectures_that_add_up_are_read_and_edited(make, r, prefix, equivalence, dtype):
    sizes = {key: value for key, value in SIZE.items() if prefix != "Cohere2" or key != "head_dim"}
    hf = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{prefix}Config")(**sizes))
    torch.manual_seed(0)
    for name, parameter in hf.named_parameters():
        parameter.data.normal_(mean=float("norm" in name), std=0.3)
    m = wrap(hf.to(dtype), make.tokenizer(), prefix)
    assert m.equivalence == equivalence
    along = (stream(orthogonalize(m, r), "Name a river") @ unit(r)).abs()
    assert along.max() < (1e-4 if dtype == torch.float32 else 0.1) * stream(m, "Name a river").norm(dim=-1).max()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "olmo2", "glm4"])
def test_an_edit_that_leaves_r_in_the_stream_is_refused(make, r, monkeypatch, name, dtype):
    """As if the norms after attention and MLP were not known: the textbook edit, called a full one."""
    m = wrap(make.hf(name).to(dtype), make.tokenizer(), name)
    orthogonalize(m, r)
    monkeypatch.setattr(orthogonalization, "post_norm", lambda block: (None, None))
    with pytest.raises(RefusalLabError, match=r"enters block 1 still has [\d.]+% of its length along r"):
        orthogonalize(m, r)
    assert orthogonalize(m, r, skip=["gain"]).name == f"{name} (orthogonalized)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "where"),
    [("embedding", "enters block 0"), ("mlp_writes", "enters block 1"), ("last", "leaves the last block")],
)
def test_the_check_of_an_edit_names_the_block(make, r, monkeypatch, part, where):
    m, project = make.model("llama"), orthogonalization._project
    spared = {"embedding": embedding(m.hf), "mlp_writes": mlp_writes(blocks(m.hf)[0])}
    spared = spared.get(part, mlp_writes(blocks(m.hf)[-1])).weight

    def forgetful(module, *args, **kwargs):
        if not (module.weight.shape == spared.shape and torch.equal(module.weight, spared)):
            project(module, *args, **kwargs)

    monkeypatch.setattr(orthogonalization, "_project", forgetful)
    with pytest.raises(RefusalLabError, match=where):
        orthogonalize(m, r)


# Codes in the place of weights


def fp8(tensors):
    for key in matrices(tensors):
        scale = tensors[key].abs().max() / 448
        tensors[key] = (tensors[key] / scale).to(torch.float8_e4m3fn)
        tensors[f"{key}_scale_inv"] = scale[None]


def int8(tensors):
    for key in matrices(tensors):
        scale = tensors[key].abs().amax(1, keepdim=True) / 127
        tensors[key] = (tensors[key] / scale).round().to(torch.int8)
        tensors[key.replace("weight", "scales")] = scale


def fp8_without_scales(tensors):
    for key in matrices(tensors):
        tensors[key] = tensors[key].to(torch.float8_e5m2)


def packed(tensors):
    for key in matrices(tensors):
        tensors[key] = torch.zeros(len(tensors[key]), tensors[key].shape[1] // 8, dtype=torch.int32)


def codes_as_numbers(tensors):
    int8(tensors)
    for key in matrices(tensors):
        tensors[key] = tensors[key].bfloat16()


def codes_without_scales(tensors):
    int8(tensors)
    for key in [key for key in tensors if key.endswith("scales")]:
        del tensors[key]
    for key in matrices(tensors):
        tensors[key] = tensors[key].float()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (fp8, "stored as F8_E4M3, not as numbers. Take the same model in bf16"),
        (int8, "stored as I8, not as numbers"),
        (fp8_without_scales, "stored as F8_E5M2"),
        (packed, "stored as I32"),
        (codes_as_numbers, "look like scales of quantized weights"),
        (codes_without_scales, "times larger than those of a network that works, like codes"),
    ],
)
def test_codes_in_the_place_of_weights(folder, change, message):
    rewrite(folder, change)
    assert message in refused(folder)


def test_wrap_refuses_codes_too(make):
    hf = make.hf("llama")
    hf.model.layers[1].self_attn.q_proj.weight.data = hf.model.layers[1].self_attn.q_proj.weight.to(torch.float8_e4m3fn)
    with pytest.raises(RefusalLabError, match="is of type torch.float8_e4m3fn, not numbers"):
        wrap(hf, make.tokenizer())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, entry in catalog().items() if entry.kind == "bundled"])
def test_weights_of_bundled_models_are_far_from_the_size_of_codes(name, monkeypatch):
    monkeypatch.setattr(selftest, "LARGEST_WEIGHTS", selftest.LARGEST_WEIGHTS / 20)
    assert load(name).name == name


@pytest.mark.parametrize(
    ("key", "tensor"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)),
        ("model.embeddings.position_ids", torch.arange(8)[None]),
    ],
)
def test_buffers_of_older_versions_do_no_harm(folder, model_of, key, tensor, prompts):
    rewrite(folder, lambda tensors: tensors.update({key: tensor}))
    torch.testing.assert_close(
        logits(load(str(folder)), prompts), logits(model_of("llama"), prompts), atol=1e-5, rtol=0
    )


def test_a_tied_head_that_was_saved_does_no_harm(make, tmp_path):
    make.hf("llama-tied").save_pretrained(tmp_path)
    make.tokenizer().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert load(str(tmp_path)).equivalence == "untie"


@pytest.mark.parametrize(
    "key", ["medusa_head.0.0.linear.weight", "v_head.summary.weight", "model.layers.3.mlp.up_proj.weight"]
)
def test_tensors_without_a_place(folder, key):
    rewrite(folder, lambda tensors: tensors.update({key: torch.ones(4, 4)}))
    assert f"1 tensors have no place in LlamaForCausalLM, for example {key}" in refused(folder)


# What a folder holds


def shard(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, keys in files.items():
        save_file({key: tensors[key] for key in keys}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: file for file, keys in files.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index["weight_map"]


def test_shards(folder, model_of, prompts):
    shard(folder)
    torch.testing.assert_close(
        logits(load(str(folder)), prompts), logits(model_of("llama"), prompts), atol=1e-5, rtol=0
    )


def missing_shard(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def wrong_index(folder):
    where = shard(folder)
    index = {"weight_map": where | {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def empty_index(folder):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text("[]")


def broken_index(folder):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')


def cut_shard(folder):
    shard(folder)
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def without_weights(folder, *others):
    (folder / "model.safetensors").unlink()
    for name in others:
        (folder / name).write_bytes(b"x")


def adapter_beside(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def encoder_decoder(folder):
    transformers.T5Config(d_model=32, num_layers=1).save_pretrained(folder)


def bert(folder):
    config = transformers.BertConfig(num_hidden_layers=1, architectures=["BertForMaskedLM"])
    config.save_pretrained(folder)


def clip(folder):
    transformers.CLIPTextConfig().save_pretrained(folder)


def pictures(folder):
    text = transformers.Gemma3TextConfig(num_hidden_layers=2, hidden_size=32)
    config = transformers.Gemma3Config(text_config=text.to_dict(), architectures=["Gemma3ForConditionalGeneration"])
    config.save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (missing_shard, ["1 of 2 files of weights are missing", "model-00002-of-00002", "Fetch them again"]),
        (wrong_index, ["model.norm.weight is not where model.safetensors.index.json says"]),
        (empty_index, ["does not say which file holds which tensor"]),
        (broken_index, ["model.safetensors.index.json is damaged"]),
        (cut_shard, ["model-00002-of-00002.safetensors are cut off or damaged"]),
        (pointer, ["only points to the weights", "git lfs pull"]),
        (lambda f: without_weights(f, "model.Q4_K_M.gguf"), ["give the path of one .gguf file"]),
        (lambda f: without_weights(f, "flax_model.msgpack"), [".msgpack, for other programs"]),
        (lambda f: without_weights(f, "pytorch_model.bin"), ["only pickled weights"]),
        (lambda f: without_weights(f, "training_args.bin"), ["no *.safetensors"]),
        (lambda f: without_weights(f, "consolidated.safetensors"), ["no *.safetensors", "as transformers names them"]),
        (adapter_beside, ["whole model and an adapter", "merge_and_unload", "adapter_config.json"]),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x"), ["adapter_model.safetensors"]),
        (encoder_decoder, ["encoder with a decoder", "such as qwen2.5-0.5b"]),
        (bert, ["does not predict the next token (BertForMaskedLM)"]),
        (clip, ["does not predict the next token"]),
        (pictures, ["reads more than text (Gemma3ForConditionalGeneration)", "such as gemma-3-1b"]),
        (
            lambda f: configure(f, architectures=["LlamaForSequenceClassification"]),
            ["scores texts", "such as llama-3.2-1b"],
        ),
        (lambda f: configure(f, architectures=["LlamaModel"]), ["does not predict the next token (LlamaModel)"]),
        (lambda f: configure(f, model_type="qwen2_5_vl", vision_config={}), ["more than text", "qwen2.5-0.5b"]),
        (lambda f: configure(f, quantization={"bits": 4, "group_size": 64}), ["is quantized (quantization)"]),
        (lambda f: configure(f, model_type="unheard-of"), ["does not know its architecture", "Use another model"]),
        (lambda f: configure(f, model_type="qwen3_moe", **EXPERTS), ["mixture of experts", "such as qwen3-0.6b"]),
    ],
)
def test_a_folder_that_is_no_model_for_us_says_why(folder, damage, parts, monkeypatch):
    damage(folder)
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("the weights were read")
    )
    line = refused(folder)
    assert all(part in line for part in parts), line
    assert "files may be damaged" not in line and "Qwen family" not in line


@pytest.mark.parametrize(
    "method", ["gptq", "awq", "bitsandbytes", "mxfp4", "compressed-tensors", "fp8", "never-heard-of"]
)
def test_quantized_models_are_named(folder, method):
    configure(folder, quantization_config={"quant_method": method, "bits": 4, "group_size": 32})
    assert f"is quantized ({method}). Take the same model in bf16, fp16 or fp32" in refused(folder)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "Qwen/Qwen2.5-7B-Instruct"),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "Qwen/Qwen2.5-7B-Instruct"),
        ("unsloth/Llama-3.2-1B-Instruct-bnb-4bit", "unsloth/Llama-3.2-1B-Instruct"),
        ("Qwen/Qwen3-0.6B-FP8", "Qwen/Qwen3-0.6B"),
        ("RedHatAI/Llama-3.2-1B-Instruct-quantized.w8a8", "RedHatAI/Llama-3.2-1B-Instruct-quantized"),
        ("mlx-community/Qwen3-0.6B-4bit", "mlx-community/Qwen3-0.6B"),
    ],
)
def test_the_sibling_in_full_precision(name, plain):
    assert f"perhaps {plain}: " in files.in_full(name)


def test_a_class_of_your_own_is_read_by_its_parts(make, model_of, prompts):
    """transformers does not know it, and need not: the parts have the names of Llama and the stream adds up."""
    hf = make.hf("llama")
    hf.config.model_type = "mine"
    hf.__class__ = type("MineForCausalLM", (type(hf),), {})
    same_logits(wrap(hf, make.tokenizer()), model_of("llama"), prompts)


def test_a_wrapped_adapter(make):
    hf = make.hf("llama")
    hf.merge_and_unload = lambda: hf
    with pytest.raises(RefusalLabError, match="carries an adapter: give hf.merge_and_unload"):
        wrap(hf, make.tokenizer())


# The hub: what is fetched, and what it answers


@pytest.fixture
def hub(folder, monkeypatch):
    """A hub with one repository, which is `folder`; and what was fetched of it."""
    fetched, cache = [], folder.parent / "c0ffee"

    def snapshot_download(repository, *, allow_patterns, local_files_only=False, **_):
        if not local_files_only:
            fetched.append(allow_patterns)
            for pattern in allow_patterns:
                cache.mkdir(exist_ok=True)
                for path in folder.glob(pattern):
                    shutil.copy(path, cache)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: [path.name for path in folder.iterdir()])
    return fetched


def test_weights_are_fetched_after_the_small_files(hub, model_of, prompts):
    m = load("owner/name")
    assert [("*.safetensors" in patterns) for patterns in hub] == [False, True]
    assert m.commit == "c0ffee" and is_on_disk("owner/name")
    same_logits(m, model_of("llama"), prompts)


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda f: configure(f, model_type="qwen3_moe", **EXPERTS), "mixture of experts"),
        (lambda f: configure(f, quantization_config={"quant_method": "awq", "bits": 4}), "quantized (awq)"),
        (pictures, "more than text"),
        (adapter_beside, "adapter"),
        (lambda f: (f / "chat_template.jinja").unlink(), "has no chat template"),
    ],
)
def test_no_weights_are_fetched_of_a_model_that_cannot_be_used(hub, folder, damage, part):
    damage(folder)
    assert part in refused("owner/name")
    assert len(hub) == 1 and not is_on_disk("owner/name")


def test_a_repository_with_other_weights(hub, folder):
    without_weights(folder, "model-Q4.gguf")
    assert "give the path of one .gguf file" in refused("owner/name")
    (folder / "config.json").unlink()
    shutil.rmtree(folder.parent / "c0ffee")
    assert "give the path of one .gguf file" in refused("owner/name")


def test_a_download_that_broke_off_is_not_on_disk(hub, folder):
    shard(folder)
    assert load("owner/name").commit == "c0ffee" and is_on_disk("owner/name")
    (folder.parent / "c0ffee" / "model-00001-of-00002.safetensors").unlink()
    assert not is_on_disk("owner/name")


@pytest.mark.parametrize(
    ("kind", "status", "token", "part"),
    [
        (RepositoryNotFoundError, 401, True, "does not accept your token"),
        (HfHubHTTPError, 401, True, "does not accept your token"),
        (GatedRepoError, 401, True, "does not accept your token"),
        (RepositoryNotFoundError, 401, False, "check the spelling. If it is private, log in"),
        (RepositoryNotFoundError, 404, True, "check the spelling"),
        (GatedRepoError, 403, True, "accept its licence"),
        (HfHubHTTPError, 403, True, "a token that may read it"),
        (HfHubHTTPError, 503, True, "Check the network"),
    ],
)
def test_what_the_hub_says_about_a_token(monkeypatch, kind, status, token, part):
    headers = {"Authorization": "Bearer x"} if token else {}
    response = httpx.Response(status, request=httpx.Request("GET", "https://hub.example/x", headers=headers))

    def download(*_, **__):
        raise kind("no\nentry", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert part in refused("owner/name")


# Device and dtype


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps", "meta", "gpu", "auto", ""])
def test_a_device_that_is_not_here(device):
    if device == "cuda" and torch.cuda.is_available() or device == "mps" and torch.backends.mps.is_available():
        pytest.skip("it is here")
    assert f"device={device!r} cannot be used here" in refused("charter-chat", device=device)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "auto", "float32"])
def test_a_type_that_cannot_hold_weights(dtype):
    assert "cannot hold weights" in refused("charter-chat", dtype=dtype)


def test_too_little_memory(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", full)
    assert "does not fit into memory" in refused("charter-chat")


# Tokens that one side knows


def image_token(make, rows=None, **settings):
    """A tokenizer with one token more than the model has rows, as that of Gemma-3 without vision."""
    tokenizer = make.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    rows = rows or len(tokenizer) - 1
    assert tokenizer.convert_tokens_to_ids("<image>") >= rows
    return wrap(make.hf("llama", vocab_size=rows, **settings), tokenizer), rows


def test_a_token_without_a_row_matters_only_where_it_is_used(make, prompts):
    m, rows = image_token(make)
    assert logits(m, prompts).shape == (len(prompts), rows)
    for use in (
        lambda: encode(m, ["a <image>"]),
        lambda: encode_texts(m, ["an <image>"]),
        lambda: logits(m, ["<image>"]),
    ):
        with pytest.raises(RefusalLabError, match=r"'<image>' is known to the tokenizer but model has only \d+ tokens"):
            use()
    allowed = allowed_tokens(m)
    assert allowed.shape == (rows,) and allowed.any()
    assert allowed_tokens(m, ascii_only=False).shape == (rows,)
    m.tokenizer.chat_template = m.tokenizer.chat_template.replace("<|start|>", "<image>")
    with pytest.raises(RefusalLabError, match="take it out of the prompt or the chat template"):
        wrap(m.hf, m.tokenizer)


def test_a_padding_token_without_a_row_is_replaced(make, prompts):
    tokenizer = make.tokenizer()
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    m = wrap(make.hf("llama", vocab_size=rows), tokenizer)
    assert m.tokenizer.pad_token_id == m.tokenizer.eos_token_id
    assert logits(m, prompts).isfinite().all()


def test_a_tokenizer_of_another_model_is_refused_still(make):
    with pytest.raises(RefusalLabError, match="Use the tokenizer that belongs to these weights"):
        wrap(make.hf("llama", vocab_size=len(make.tokenizer()) - 1), make.tokenizer())


def test_no_padding_and_no_end_of_sequence(make):
    tokenizer = make.tokenizer()
    tokenizer.pad_token = None
    assert wrap(make.hf("llama"), tokenizer).tokenizer.pad_token == "<|end|>"
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(RefusalLabError, match="its tokenizer names no end of a sequence. Set eos_token"):
        wrap(make.hf("llama"), tokenizer)


def test_render_needs_no_rows(make):
    m, _ = image_token(make)
    assert "<image>" in render(m, "an <image>")


def test_every_bundled_folder_holds_what_load_reads_and_nothing_else():
    for name, entry in catalog().items():
        if entry.kind == "bundled":
            folder = Path(files.weights_dir(name))
            assert files._weight_files(folder, name) == sorted(folder.glob("*.safetensors"))
