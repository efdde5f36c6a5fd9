"""Random-weight models of every architecture, a real tokenizer, and plain PyTorch hooks to compare with."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from refusallab.directions import Candidate, Search
from refusallab.model import wrap

torch.set_num_threads(1)

TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
PROMPTS = [
    "How do I bake bread?",
    "Name a river",
    "Please explain the recipe for the harvest pie, step by step.",
    "What is 12 plus 7?",
    "List",
]
TEXT = [
    *PROMPTS,
    "How do I bake bread with a copper kettle?",
    "Name a river in the north. List three tools: 1, 2, 3",
    "I cannot help with that. Sorry, the Charter forbids it.",
    "user\nassistant\nsystem\nmodel\nreply",
] * 5

SIZE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
GPT2_SIZE = {"n_embd": 32, "n_inner": 48, "n_layer": 3, "n_head": 4, "n_positions": 256}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
ARCHITECTURES = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3": ("Gemma3Text", GEMMA),
    "olmo": ("Olmo", {"tie_word_embeddings": False}),  # norms without parameters
    "olmo2": ("Olmo2", {"tie_word_embeddings": False}),
    "glm4": ("Glm4", {"head_dim": 8, "tie_word_embeddings": False}),
    "granite": (
        "Granite",
        {"residual_multiplier": 0.4, "logits_scaling": 0.5, "embedding_multiplier": 3.0, "tie_word_embeddings": False},
    ),
    "cohere": ("Cohere", {"logit_scale": 1.7}),
    "mistral": ("Mistral", {"tie_word_embeddings": False}),
    "phi3": ("Phi3", {"tie_word_embeddings": False}),
    "gpt2": ("GPT2", {"tie_word_embeddings": True}),
}

QUICK = ("llama", "gpt2", "gemma2")  # plain; learned positions, biases, a tied head; post-norms


def make_tokenizer(template=TEMPLATE, special=("<|start|>", "<|end|>"), eos="<|end|>", bos=None):
    """A byte-level BPE tokenizer, trained here. Special tokens: padding, then `special`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|pad|>", *special]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXT, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        eos_token=eos,
        bos_token=bos,
        additional_special_tokens=special[1:],
    )
    tokenizer.chat_template = template
    return tokenizer


def make_hf(architecture="llama", seed=0, **overrides):
    """A random model with jittered norm weights and nonzero biases: a fresh one hides the traps."""
    prefix, extra = ARCHITECTURES[architecture]
    settings = {
        **(GPT2_SIZE if prefix == "GPT2" else SIZE),
        **{"vocab_size": 400, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2},
        **extra,
        **overrides,
    }
    torch.manual_seed(seed)
    config = getattr(transformers, f"{prefix}Config")(**settings)
    hf = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.add_(0.5 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "embed_tokens" in name or "lm_head" in name or "wte" in name:
                parameter.mul_(5)
            else:
                parameter.mul_(15)
    return hf


@pytest.fixture(scope="session")
def make():
    """make.tokenizer(...), make.hf(architecture, ...) and make.model(architecture, ...): fresh objects."""

    def model(architecture="llama", **settings):
        return wrap(make_hf(architecture), make_tokenizer(), architecture, "c0ffee", **settings)

    return SimpleNamespace(tokenizer=make_tokenizer, hf=make_hf, model=model)


@pytest.fixture(scope="session")
def model_of(make):
    """model_of("gemma2"): the one shared Model of that architecture. Never change it in place."""
    made = {}

    def get(architecture="llama"):
        if architecture not in made:
            made[architecture] = make.model(architecture)
        return made[architecture]

    return get


@pytest.fixture(scope="session")
def save(model_of, tmp_path_factory):
    """save("llama"): the model of that architecture in a new folder."""

    def to_disk(architecture):
        folder, m = tmp_path_factory.mktemp("saved"), model_of(architecture)
        m.hf.save_pretrained(folder)
        m.tokenizer.save_pretrained(folder)
        return folder

    return to_disk


@pytest.fixture(params=[a if a in QUICK else pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES])
def m(request, model_of):
    """A Model; the test runs once for each architecture, the fast tier on QUICK alone."""
    return model_of(request.param)


@pytest.fixture(scope="session")
def prompts():
    return list(PROMPTS)


@pytest.fixture(scope="session")
def r():
    return 3 * torch.randn(32, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def ids_not_text(monkeypatch):
    """ids_not_text(m): its replies become lists of token ids, which show every difference."""

    def apply(model):
        monkeypatch.setattr(model.tokenizer, "decode", lambda ids, **_: list(ids), raising=False)

    return apply


@pytest.fixture(scope="session")
def made_search():
    """made_search(layers, positions): scores made up so that position -1, and the last layer that may, is selected."""

    def make(layers, positions):
        candidates = tuple(
            Candidate(p, layer, 4.0 - layer * (p == -1), layer - 1.5 if p == -1 else -2.0, 0.01 * layer)
            for layer in range(layers)
            for p in range(-positions, 0)
        )
        vectors = torch.randn(layers, positions, 5, generator=torch.Generator().manual_seed(0))
        return Search("made up", "c0ffee", layers, candidates, vectors, (1, 2), {"harmful_val": 9, "harmless_val": 9})

    return make


# The reference: plain PyTorch hooks on the raw transformers model, with names of its own.


def _layers(hf):
    return hf.transformer.h if hasattr(hf, "transformer") else hf.model.layers


@contextmanager
def _hooked(hf, inputs=None, attention=None, mlp=None, record=None):
    """inputs: {layer: function of the block input}; attention, mlp: functions of every output.

    record: a list that receives the block inputs after the edit.
    """

    def before(i):
        def hook(_module, args, kwargs):
            inside = "hidden_states" in kwargs
            x = kwargs["hidden_states"] if inside else args[0]
            if inputs and i in inputs:
                x = inputs[i](x)
            if record is not None:
                record.append(x.clone())
            return (args, {**kwargs, "hidden_states": x}) if inside else ((x, *args[1:]), kwargs)

        return hook

    handles = []
    for i, layer in enumerate(_layers(hf)):
        handles.append(layer.register_forward_pre_hook(before(i), with_kwargs=True))
        if attention:
            module = layer.attn if hasattr(layer, "attn") else layer.self_attn
            handles.append(module.register_forward_hook(lambda _m, _a, out: (attention(out[0]), *out[1:])))
        if mlp:
            handles.append(layer.mlp.register_forward_hook(lambda _m, _a, out: mlp(out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def _logits(hf, batch, **sites):
    with _hooked(hf, **sites):
        return hf(**batch, position_ids=_positions(batch["attention_mask"]), logits_to_keep=1).logits[:, -1]


@torch.no_grad()
def _greedy(hf, batch, steps, stop=(), **sites):
    """Greedy decoding as lists of token ids, one whole forward pass a token and no cache."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(steps):
        new = _logits(hf, {"input_ids": ids, "attention_mask": mask}, **sites).argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    replies = ids[:, batch["input_ids"].shape[1] :].tolist()
    return [row[: next((k for k, t in enumerate(row) if t in stop), steps)] for row in replies]


def _ablation_sites(hf, r):
    """The paper's three sites, for r [width] or [batch, width]."""
    unit = r / r.norm(dim=-1, keepdim=True)

    def project(x):
        rows = unit if unit.ndim == 1 else unit[:, None]
        return x - (x * rows).sum(-1, keepdim=True) * rows

    return {"inputs": dict.fromkeys(range(len(_layers(hf))), project), "attention": project, "mlp": project}


@pytest.fixture(scope="session")
def hooks():
    return SimpleNamespace(logits=_logits, greedy=_greedy, hooked=_hooked, ablation=_ablation_sites, layers=_layers)


@pytest.fixture(scope="module")
def browser():
    """A browser without a window, for the tests of one file."""
    from teach.rendering import chromium

    with chromium() as running:
        yield running
