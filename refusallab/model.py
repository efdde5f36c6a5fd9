"""A chat model that you can look into: loading, names of parts, prompts, logits, greedy generation.

`load` gives a `Model`: the transformers model (`hf`), its nnsight view (`nn`), the tokenizer, and what the
library found out about them. `blocks`, `attention`, `mlp`, ... hide the names that architectures use.
`logits` and `generate` run prompts, with or without an *edit*.

An edit is a plain function `edit(nn) -> None` that assigns to parts of the nnsight model, for example
`nn.model.layers[3].mlp.output = ...`. It must visit the parts in the order of the forward pass.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import reprlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import nnsight
import torch
import transformers
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from nnsight import TransformersModel
from nnsight.intervention.interleaver import OutOfOrderError
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LogitsProcessor
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from refusallab.errors import RefusalLabError
from refusallab.inputs import listed
from refusallab.watch import WatchedEnvoy, all_rows
from smallmodels import catalog, weights_dir

Prompt = str | list[dict[str, Any]]  # an instruction (one user turn), or chat messages of role and content
Edit = Callable[[Any], None]

ROLES = ("system", "user", "assistant")

# Passed to every chat template: no thinking (Qwen3), no date of today (Llama-3.2; see `_pin_date` for others).
TODAY = datetime.datetime(2024, 7, 26)
TEMPLATE_SETTINGS = {"enable_thinking": False, "date_string": TODAY.strftime("%d %b %Y")}

# What opens or closes a thought: <think>, </think>, <|begin_of_thought|>, <|END_THINKING|>, [THINK], <reasoning>, ...
_WORDS = r"(?:\w+[_:])?(?:think(?:ing)?|thoughts?|reasoning|reflection|scratchpad)(?:_\w+)?"
THOUGHT = re.compile(rf"(?i:<[|/]{{0,2}}{_WORDS}\|?>)|\[/?(?:THINK|THINKING|THOUGHT|REASONING)\]|◁/?think▷")

# Hub models ship sampling settings and repetition penalties; the latter bend even greedy decoding.
GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
}

SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]  # of a hub repository: they tell whether the weights are of use
HUB_FILES = [*SMALL_FILES, "*.safetensors"]

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, repr=False)
class Model:
    """A loaded chat model. Made by `load` or `wrap`."""

    nn: TransformersModel  # nnsight's view of hf: trace this one
    hf: torch.nn.Module  # the transformers model: eval mode, no gradients
    tokenizer: Any  # pads on the left
    name: str
    commit: str  # of the hub repository; else the first 12 digits of sha256(weights)
    positions: tuple[int, ...]  # post-instruction positions, counted from the end: (-5, ..., -1)
    stop_ids: tuple[int, ...]  # tokens that end a reply
    equivalence: str  # see `equivalence_class`
    remote: bool | str  # True: runs on NDIF; "local": nnsight's simulation of that

    @property
    def n_layers(self) -> int:
        return len(blocks(self.hf))

    @property
    def width(self) -> int:
        return embedding(self.hf).weight.shape[1]

    @property
    def vocab_size(self) -> int:
        return unembedding(self.hf).weight.shape[0]

    @property
    def device(self) -> torch.device:
        """Where prompts go. A remote model has no weights here: its prompts are made on the CPU."""
        return torch.device("cpu") if self.remote is True else self.hf.device

    def __repr__(self) -> str:
        return (
            f"Model({self.name!r}, {self.n_layers} blocks, width {self.width}, vocabulary {self.vocab_size}, "
            f"post-instruction positions {self.positions[0]}..-1, equivalence {self.equivalence!r})"
        )


# ---------------------------------------------------------------------------------------------------------
# Names of parts. Each function takes the raw transformers model or its nnsight envoy and answers in kind.


def blocks(m: Any) -> Any:
    """The transformer blocks, first to last. Input and output: [batch, seq, width]."""
    return _either(_body(m), "h", "layers")


def embedding(m: Any) -> Any:
    """The token embedding; its weight is [vocab, width]."""
    return _either(_body(m), "wte", "embed_tokens")


def positional_embedding(m: Any) -> Any | None:
    """The learned position embedding (GPT-2), weight [positions, width]. None where there is none."""
    return _either(_body(m), "wpe", optional=True)


def final_norm(m: Any) -> Any:
    """The norm between the last block and the unembedding."""
    return _either(_body(m), "ln_f", "norm")


def unembedding(m: Any) -> Any:
    """The head; its weight is [vocab, width]."""
    return _either(m, "lm_head")


def attention(block: Any) -> Any:
    """The attention of a block. Its output is a tuple; [0] is the attention output [batch, seq, width]."""
    return _either(block, "attn", "self_attn")


def mlp(block: Any) -> Any:
    """The MLP of a block; its output is a tensor [batch, seq, width]."""
    return _either(block, "mlp")


def attention_writes(block: Any) -> Any:
    """The projection that ends the attention: what it writes is the attention output."""
    return _either(attention(block), "o_proj", "c_proj")


def mlp_writes(block: Any) -> Any:
    """The projection that ends the MLP: what it writes is the MLP output."""
    return _either(mlp(block), "down_proj", "c_proj")


def post_norm(block: Any) -> tuple[Any, Any]:
    """The norms between (attention output, MLP output) and the residual stream, or (None, None).

    Gemma-2/3, OLMo-2 and GLM-4 have them. Beware of the name: `post_attention_layernorm` is such a norm in the first
    two, but in Llama, Qwen and GLM-4 the same name is the norm *before* the MLP.
    """
    for after_attention, after_mlp in (
        ("post_attention_layernorm", "post_feedforward_layernorm"),
        ("post_self_attn_layernorm", "post_mlp_layernorm"),
    ):
        if _either(block, after_mlp, optional=True) is not None:
            return _either(block, after_attention), _either(block, after_mlp)
    return None, None


def residual_scale(hf: torch.nn.Module) -> float:
    """What attention and MLP outputs are multiplied by before they join the stream: 1 but in Granite."""
    return getattr(hf.config, "residual_multiplier", None) or 1.0


@torch.no_grad()
def unembed(hf: torch.nn.Module, x: Tensor) -> Tensor:
    """What the model makes of the end of its stream: [..., width] -> fp32 logits [..., vocab].

    Final norm, unembedding, then the scale (Granite, Cohere) and the cap (Gemma-2) that some models put on logits.
    """
    head, config = unembedding(hf), hf.config
    logits = head(final_norm(hf)(x.to(head.weight))).float()
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if divisor := getattr(config, "logits_scaling", None):
        logits = logits / divisor
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


def equivalence_class(hf: torch.nn.Module) -> str:
    """What the weight edit needs to equal ablation by hooks. One of these, or a sum such as "untie+biases":

    "exact"      projecting the output matrices is enough
    "untie"      the head shares the embedding: give it a copy of its own first
    "positions"  learned position embeddings write to the stream: project them too
    "biases"     output biases write to the stream: project them too
    "post-norm"  norms after attention and MLP rotate what is written: equality is not promised
    """
    writers = [write for block in blocks(hf) for write in (attention_writes(block), mlp_writes(block))]
    if any(norm is not None for block in blocks(hf) for norm in post_norm(block)):
        return "post-norm"
    tied = unembedding(hf).weight is embedding(hf).weight
    needs = [
        ("untie", tied),
        ("positions", positional_embedding(hf) is not None),
        ("biases", any(write.bias is not None for write in writers)),
    ]
    return "+".join(name for name, needed in needs if needed) or "exact"


def _body(m: Any) -> Any:
    return _either(m, "transformer", "model")


def _either(parent: Any, *names: str, optional: bool = False) -> Any:
    module = getattr(parent, "_module", parent)  # an envoy holds its module there
    for name in names:
        if isinstance(getattr(module, name, None), torch.nn.Module):
            return getattr(parent, name)
    if optional:
        return None
    if isinstance(parent, Model):
        raise RefusalLabError("Give m.hf, the model of transformers, or m.nn in a trace, not the Model around both.")
    raise RefusalLabError(
        f"{type(module).__name__} has no {' or '.join(names)}: use a model of the Llama kind, such as qwen2.5-0.5b."
    )


# ---------------------------------------------------------------------------------------------------------
# Loading


def load(name: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", remote: bool | str = False) -> Model:
    """Load a bundled model, a local folder, or a hub model (an alias of the catalogue or "owner/name").

    Only safetensors are read and no code from a repository is run. Configuration and tokenizer are looked at before any
    weights are fetched or read. `remote=True` runs the model on NDIF through nnsight: that needs a hub id, a network
    and an NDIF key. `remote="local"` rehearses the same path here. Raises RefusalLabError with one line when the model
    cannot be found, read or used.
    """
    if remote is True:
        return _load_remote(name)
    _check_place(dtype, device)
    folder, commit = _find(name)
    config = _read_config(folder, name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
    except Exception as error:  # many libraries read the files, each with exceptions of its own
        raise RefusalLabError(_reading_failed(name, error)) from error
    if commit:
        _post_instruction_positions(tokenizer, name)  # a base model is not worth the download
        folder = _fetch(name, HUB_FILES, commit)
    _check_weights(folder, name)
    try:
        with _no_progress_bar():
            hf, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        hf = hf.to(device)
    except Exception as error:
        raise RefusalLabError(_reading_failed(name, error)) from error
    _check_report(report, name, type(hf).__name__)
    return wrap(hf, tokenizer, name, commit or sha256_of_weights(folder), remote=remote)


def wrap(
    hf: torch.nn.Module, tokenizer: Any, name: str = "model", commit: str = "", *, remote: bool | str = False
) -> Model:
    """Make a `Model` of a transformers model and its tokenizer, in place, and test that it works.

    The test: the parts are found; the template renders, has post-instruction tokens and no double BOS; the weights have
    the size of weights; and, in one forward pass, logits are finite, an edit of each block changes them, the stream is
    the embedding plus what attentions and MLPs write, and `unembed` gives the logits. RefusalLabError if it fails.

    It cannot tell weights that are well formed and wrong, such as blocks in another order or those of another model of
    the same shape: read a few replies.
    """
    hf.eval().requires_grad_(False)
    envoys = None if remote else WatchedEnvoy  # NDIF has its own
    nn = TransformersModel(hf, tokenizer=tokenizer, task="text-generation", envoys=envoys)
    m = _assemble(nn, tokenizer, name, commit, remote)
    _test_weights(m)
    _test_stream(m)
    return m


def _assemble(nn: TransformersModel, tokenizer: Any, name: str, commit: str, remote: bool | str) -> Model:
    hf = nn._module
    if hasattr(hf, "merge_and_unload"):
        raise RefusalLabError(f"{name} carries an adapter: give hf.merge_and_unload(), which has it in the weights.")
    _check_config(hf.config, type(hf).__name__, name)
    _check_parts(hf, name)
    if remote:  # NDIF does not have this library: its functions travel with the request
        nnsight.register("refusallab")
    tokenizer.padding_side = "left"
    _check_vocabulary(tokenizer, embedding(hf).weight.shape[0], name)
    positions = _post_instruction_positions(tokenizer, name)
    stop_ids = _stop_ids(hf, tokenizer)
    return Model(nn, hf, tokenizer, name, commit, positions, stop_ids, equivalence_class(hf), remote)


def _check_vocabulary(tokenizer: Any, rows: int, name: str) -> None:
    """Padding and the end of a sequence have tokens, and the embedding has a row for each token but added ones.

    Gemma-3 without vision has an image token that no text needs and no row of the embedding stands for.
    """
    if tokenizer.eos_token is None:
        raise RefusalLabError(
            f"{name}: its tokenizer names no end of a sequence. Set eos_token in tokenizer_config.json, or "
            "tokenizer.eos_token, to the token that ends a reply."
        )
    ids = tokenizer.get_vocab().values()
    foreign = sum(i >= rows for i in ids) - sum(i >= rows for i in tokenizer.added_tokens_decoder)
    if foreign > 0 or tokenizer.eos_token_id >= rows:
        raise RefusalLabError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens but the model only {rows}. "
            "Use the tokenizer that belongs to these weights."
        )
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token


def _check_place(dtype: torch.dtype, device: str) -> None:
    """Weights can be held in this type and on this device."""
    if dtype not in FLOATS.values():
        raise RefusalLabError(f"dtype={dtype!r} cannot hold weights: give torch.float32, bfloat16 or float16.")
    try:
        torch.zeros(1, dtype=dtype, device=device).item()  # also fails for "meta", which holds nothing
    except Exception as error:  # RuntimeError, AssertionError, TypeError, by the kind of device
        raise RefusalLabError(
            f"device={device!r} cannot be used here ({_first_line(error)}). Leave it out to run on the CPU."
        ) from error


def _find(name: str) -> tuple[Path, str]:
    """The folder of a model, and its commit if the hub knows it. Of a hub model, only the small files are fetched."""
    entry = catalog().get(name)
    if entry and entry.kind == "bundled":
        return weights_dir(name), ""
    if name and Path(name).is_dir():
        return Path(name), ""
    folder = _fetch(name, SMALL_FILES)
    return folder, folder.name  # the hub cache names the folder after the commit


def _fetch(name: str, patterns: list[str], commit: str | None = None) -> Path:
    repository = _hub_id(name)
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=commit, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]
        )
    except Exception as error:
        raise RefusalLabError(_fetching_failed(name, error)) from error
    return Path(folder)


def is_on_disk(name: str) -> bool:
    """Whether a model can be loaded without a download."""
    entry = catalog().get(name)
    if (entry and entry.kind == "bundled") or Path(name).is_dir():
        return True
    try:
        folder = huggingface_hub.snapshot_download(_hub_id(name), allow_patterns=HUB_FILES, local_files_only=True)
    except LocalEntryNotFoundError:
        return False
    try:
        return bool(_weight_files(Path(folder), name))
    except RefusalLabError:  # a download that broke off
        return False


def _hub_id(name: str) -> str:
    entry = catalog().get(name)
    if entry and entry.kind == "hub":
        return entry.id
    if name.count("/") == 1 and all(name.split("/")) and not name.startswith((".", "~")):
        return name
    known = ", ".join(catalog())
    raise RefusalLabError(f"Unknown model {name!r}: no such folder. Give one of {known}, or a hub id owner/name.")


# What the small files of a folder say


def _read_config(folder: Path, name: str) -> transformers.PreTrainedConfig:
    """The configuration, of an architecture that this library can take apart. Reads no weights."""
    if not folder.is_dir():
        raise RefusalLabError(f"The weights of {name} are not in {folder}. Train it with python -m smallmodels.recipe.")
    adapters = sorted(folder.glob("adapter_*"))
    if not (folder / "config.json").is_file():
        if adapters:
            raise RefusalLabError(
                f"{name} is an adapter without the model that it changes: merge the two with merge_and_unload() of "
                "peft, save the result and load that."
            )
        raise RefusalLabError(_no_weights(folder, name, f"no config.json in {folder}"))
    if adapters:
        raise RefusalLabError(
            f"{name} holds a whole model and an adapter, which would be ignored. Merge it with merge_and_unload() of "
            f"peft and save the result, or take {adapters[0].name} away to study the model without it."
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise RefusalLabError(_reading_failed(name, error)) from error
    _check_config(config, (config.architectures or [""])[0], name)
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise RefusalLabError(f"{name} does not predict the next token ({config.model_type}). {_instead(config)}")
    if (entry := catalog().get(name)) and entry.kind == "bundled":  # the recipe made it, so its parts are known
        return config
    try:
        with torch.device("meta"), no_init_weights():
            hf = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise RefusalLabError(_reading_failed(name, error)) from error
    _check_parts(hf, name)
    return config


def _check_config(config: transformers.PreTrainedConfig, architecture: str, name: str) -> None:
    """Refuse what is no decoder of text in full precision, and say what to take in its place."""
    instead = _instead(config)
    configs = [c for c in (config, getattr(config, "text_config", None)) if c is not None]
    for settings in (getattr(c, key, None) for c in configs for key in ("quantization_config", "quantization")):
        if settings:
            fields = settings if isinstance(settings, dict) else vars(settings)
            method = fields.get("quant_method") or "quantization"
            raise RefusalLabError(f"{name} is quantized ({getattr(method, 'value', method)}). {_in_full(name)}")
    if any(getattr(config, f"{sense}_config", None) for sense in ("vision", "audio", "speech")):
        raise RefusalLabError(f"{name} reads more than text ({architecture or config.model_type}). {instead}")
    if config.is_encoder_decoder:
        raise RefusalLabError(f"{name} is an encoder with a decoder, which has two streams. {instead}")
    if hasattr(transformers, architecture) and architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        what = "scores texts" if "Classification" in architecture else "does not predict the next token"
        raise RefusalLabError(f"{name} {what} ({architecture}). {instead}")


def _check_parts(hf: torch.nn.Module, name: str) -> None:
    """Refuse an architecture whose parts this library does not know. Needs no weights."""
    try:
        final_norm(hf), equivalence_class(hf)
    except RefusalLabError as error:
        instead = f"Take a dense model, such as {_sibling(hf.config.model_type)}."
        experts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
        if any((getattr(hf.config, key, None) or 0) > 1 for key in experts):
            raise RefusalLabError(
                f"{name} is a mixture of experts ({type(hf).__name__}), not one MLP for each block. {instead}"
            ) from error
        raise RefusalLabError(f"{name} ({type(hf).__name__}): {error}") from error


def _instead(config: transformers.PreTrainedConfig) -> str:
    return f"Take a model that only reads text and predicts the next token, such as {_sibling(config.model_type)}."


def _sibling(model_type: str) -> str:
    """The model of the catalogue whose name is most like a type of transformers: "gemma3" -> "gemma-3-1b"."""

    def alike(alias: str) -> int:
        a, b = (re.sub(r"[^a-z0-9]", "", text) for text in (model_type, alias))
        return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

    aliases = [alias for alias, entry in catalog().items() if entry.kind == "hub"]
    return max(aliases, key=lambda alias: max(alike(alias), 3))  # fewer letters in common are chance


def _in_full(name: str) -> str:
    """What to take in place of quantized weights."""
    plain = re.sub(r"(?i)[-_.](gptq|awq|bnb|fp8|(nv|mx)fp4|w\d+a\d+|int[48]|[48]-?bit|mlx|gguf|exl2|hqq).*", "", name)
    example = f", perhaps {plain}" if plain != name and not Path(name).exists() else ""
    return f"Take the same model in bf16, fp16 or fp32{example}: only full weights can be edited."


# ---------------------------------------------------------------------------------------------------------
# What the files of weights say

# Buffers that older versions of transformers saved; the model makes them itself.
BUFFERS = re.compile(r"(^|\.)(attn|attention)\.(masked_)?bias$|(^|\.)position_ids$|(^|\.)inv_freq$")


def _weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors that transformers reads: none, or all of them."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    shards = sorted({str(file) for file in _weight_map(index, name).values()})
    if missing := [file for file in shards if not (folder / file).is_file()]:
        raise RefusalLabError(
            f"{name}: {len(missing)} of {len(shards)} files of weights are missing, for example {missing[0]}. "
            "Fetch them again."
        )
    return [folder / file for file in shards]


def _weight_map(index: Path, name: str) -> dict[str, str]:
    """Which file holds which tensor."""
    files = _read_json(index, name).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise RefusalLabError(f"{name}: {index.name} does not say which file holds which tensor: fetch it again.")
    return files


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RefusalLabError(f"{name}: {path.name} is damaged ({_first_line(error)}): fetch it again.") from error
    return content if isinstance(content, dict) else {}


def _check_weights(folder: Path, name: str) -> None:
    """Read the headers: the files are whole, agree with their index and hold full numbers, not codes."""
    files = _weight_files(folder, name)
    if not files:
        raise RefusalLabError(_no_weights(folder, name, f"no *.safetensors in {folder}, as transformers names them"))
    where = {}
    for path in files:
        types = _stored_types(path, name)
        where |= dict.fromkeys(types, path.name)
        if low := sorted(key for key, kind in types.items() if kind not in FLOATS and not BUFFERS.search(key)):
            raise RefusalLabError(f"{name}: {low[0]} is stored as {types[low[0]]}, not as numbers. {_in_full(name)}")
    index = folder / "model.safetensors.index.json"
    promised = {} if files == [folder / "model.safetensors"] else _weight_map(index, name)
    if lost := sorted(key for key, file in promised.items() if where.get(key) != file):
        raise RefusalLabError(f"{name}: {lost[0]} is not where {index.name} says. Fetch the files again.")


def _stored_types(path: Path, name: str) -> dict[str, str]:
    """The type of each tensor in a safetensors file, from its header."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    except Exception as error:
        with path.open("rb") as file:
            pointer = file.read(40).startswith(b"version https://git-lfs")
        if pointer:
            raise RefusalLabError(
                f"{name}: {path.name} only points to the weights: say `git lfs pull` in its folder."
            ) from error
        raise RefusalLabError(
            f"{name}: the weights in {path.name} are cut off or damaged ({_first_line(error)}): fetch them again."
        ) from error


def _check_report(report: dict[str, Any], name: str, architecture: str) -> None:
    """Every tensor that the model needs was in the files, and no other."""
    if missing := sorted(report["missing_keys"]):
        raise RefusalLabError(
            f"{name}: {len(missing)} tensors are missing from the weights, for example {missing[0]}. "
            "Fetch the files again."
        )
    if unknown := sorted(key for key in report["unexpected_keys"] if not BUFFERS.search(key)):
        if any(re.search(r"scale|zero|quant|qweight|absmax|packed|g_idx", key) for key in unknown):
            remedy = f"They look like scales of quantized weights. {_in_full(name)}"
        else:
            remedy = "Take a model whose weights and config.json belong together, with adapters and extra heads merged."
        raise RefusalLabError(
            f"{name}: {len(unknown)} tensors have no place in {architecture}, for example {unknown[0]}. {remedy}"
        )


def _no_weights(folder: Path, name: str, what: str) -> str:
    """Why there is nothing to load: by the files in the folder or, of a hub model, in its repository."""
    names = [path.name for path in folder.iterdir()]
    if not Path(name).is_dir():
        with suppress(Exception):  # no hub, no further news
            names += huggingface_hub.list_repo_files(_hub_id(name), revision=folder.name)
    weights = [file for file in names if not file.startswith(("training_args", "optimizer", "scheduler", "rng_state"))]
    endings = {Path(file).suffix for file in weights}
    if others := sorted(endings & {".gguf", ".onnx", ".h5", ".msgpack"}):
        return f"{name} has its weights as {others[0]}, for other programs. Take the same model as safetensors."
    if endings & {".bin", ".pt", ".pth"}:
        return (
            f"{name} has only pickled weights, which can run code when read. "
            "Convert them to safetensors, or use a model that ships them."
        )
    return f"{name}: {what}. Give a folder or repository in the format of transformers, with all its files."


def _reading_failed(name: str, error: Exception) -> str:
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
        return f"{name} does not fit into memory: take a smaller model, or dtype=torch.bfloat16."
    if "trust_remote_code" in str(error):
        return f"{name} needs code from its repository, which this library never runs. Use another model."
    if "does not recognize this architecture" in str(error):
        return (
            f"{name} cannot be read: transformers {transformers.__version__} does not know its architecture. "
            "Use another model."
        )
    return f"{name} cannot be read ({_first_line(error)}). The files may be damaged: fetch them again."


def _fetching_failed(name: str, error: Exception) -> str:
    response = getattr(error, "response", None)
    if getattr(response, "status_code", None) == 401 and "authorization" in response.request.headers:
        return (
            f"The hub does not accept your token, so {name} cannot be fetched: it is wrong or has expired. "
            "Log in again with `hf auth login`, or log out with `hf auth logout` (and unset HF_TOKEN)."
        )
    if isinstance(error, GatedRepoError):  # also with a token that is good, so this stands before the plain 403
        return f"{name} is gated: accept its licence on the model's hub page, then log in with `hf auth login`."
    if getattr(response, "status_code", None) == 403:
        return f"The hub forbids you to fetch {name}: log in with `hf auth login` and a token that may read it."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"There is no model {name} on the hub: check the spelling. If it is private, log in with `hf auth login`."
        )
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return (
            f"{name} is not on this computer and the hub cannot be reached. Connect (and unset "
            "HF_HUB_OFFLINE), or use a bundled model such as charter-chat."
        )
    return f"{name} cannot be fetched ({_first_line(error)}). Check the network and the disk, then try again."


def _first_line(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line if len(line) < 160 else f"{line[:150]} ..."


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """No bar for reading from the disk: in a notebook it is noise that differs in each run."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def sha256_of_weights(folder: Path) -> str:
    """The first 12 digits of the SHA-256 of all safetensors in a folder: the name of these weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:12]


def _load_remote(name: str) -> Model:
    entry = catalog().get(name)
    if (entry and entry.kind == "bundled") or Path(name).is_dir():
        raise RefusalLabError(f"{name} is a local model and NDIF does not host it: give a hub id with remote=True.")
    repository = _hub_id(name)
    if not nnsight.CONFIG.API.APIKEY:
        raise RefusalLabError("remote=True needs an NDIF key: set NDIF_API_KEY, then restart Python.")
    try:
        commit = huggingface_hub.model_info(repository).sha
        tokenizer = AutoTokenizer.from_pretrained(repository, padding_side="left", trust_remote_code=False)
        nn = TransformersModel(repository, tokenizer=tokenizer, task="text-generation")
    except Exception as error:
        raise RefusalLabError(_fetching_failed(name, error)) from error
    return _assemble(nn, tokenizer, name, commit, remote=True)


# ---------------------------------------------------------------------------------------------------------
# What the template and the blocks say about themselves

# Different lengths, and ends of three kinds: whatever they share at the end comes from the template.
PROBES = ("Name a river in the north", "What is 12 plus 7?", "List three tools: 1, 2, 3")


def _post_instruction_positions(tokenizer: Any, name: str) -> tuple[int, ...]:
    rendered = [_apply_template(tokenizer, [{"role": "user", "content": probe}], name) for probe in PROBES]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered]
    if ids[0][:2] == [tokenizer.bos_token_id] * 2:
        raise RefusalLabError(f"{name}: the chat template starts with two BOS tokens. Remove one from it.")
    n = 0
    while n < min(map(len, ids)) and len({row[-n - 1] for row in ids}) == 1:
        n += 1
    if n == 0:
        raise RefusalLabError(f"{name}: its chat template adds nothing after the instruction. Use a chat model.")
    return tuple(range(-n, 0))


def _stop_ids(hf: torch.nn.Module, tokenizer: Any) -> tuple[int, ...]:
    """End-of-sequence tokens of model and tokenizer, and the token that ends a reply in the template."""
    ids = {tokenizer.eos_token_id, end_of_turn(tokenizer)[0]}
    for config in (hf.config, hf.generation_config):
        eos = getattr(config, "eos_token_id", None)
        ids |= set(eos if isinstance(eos, list | tuple) else [eos])
    return tuple(sorted(ids - {None}))


def end_of_turn(tokenizer: Any) -> tuple[int | None, str]:
    """What the template writes after a reply: (the token that ends the turn, text that ends it before or instead).

    The token is the first added one that can be seen. Where the template writes nothing after the last reply, what
    opens the next turn ends it. White space ends nothing. (None, "") where the template shows no end.
    """
    reply, added = "A reply to begin with.", tokenizer.added_tokens_decoder
    turns = [{"role": "user", "content": PROBES[0]}, {"role": "assistant", "content": reply}]
    for later in ([], [{"role": "user", "content": PROBES[1]}]):
        try:
            text = _fill(tokenizer, turns + later, add_generation_prompt=False)
        except Exception:  # a template for single questions only; templates are programs of others
            continue
        after = text.rpartition(reply)[2].partition(PROBES[1])[0] if reply in text else ""
        for token in tokenizer(after, add_special_tokens=False)["input_ids"]:
            mark = str(added.get(token, "")).strip()
            if mark:
                return token, after.partition(mark)[0].strip()
        if after.strip():
            return None, after.rstrip().lstrip(" ")
    return None, ""


# ---------------------------------------------------------------------------------------------------------
# The self-test

# The mean square of a matrix times its number of inputs is about 1 in a network that works, trained or fresh, and a few
# tens at most. Eight-bit codes that lost their scales have thousands.
LARGEST_WEIGHTS = 1000.0


def _test_weights(m: Model) -> None:
    """All weights are numbers, and those of the matrices that write to the stream have the size of weights."""
    for key, weight in m.hf.named_parameters():
        if weight.dtype not in FLOATS.values():
            raise RefusalLabError(f"{m.name}: {key} is of type {weight.dtype}, not numbers. {_in_full(m.name)}")
    for i, block in enumerate(blocks(m.hf)):
        for part, write in (("attention", attention_writes(block)), ("MLP", mlp_writes(block))):
            weight = write.weight
            inputs = weight.numel() // m.width
            size = weight.flatten()[:: max(1, weight.numel() // 10_000)].float().square().mean().item() * inputs
            if size > LARGEST_WEIGHTS:
                raise RefusalLabError(
                    f"{m.name}: the weights at the end of {part} {i} are {size**0.5:.0f} times larger than those of a "
                    f"network that works, like codes without their scales. {_in_full(m.name)}"
                )


@torch.no_grad()
def _test_stream(m: Model) -> None:
    """Row i of one batch runs with the input of block i negated; the last row runs untouched and must add up."""
    nn, name = m.nn, m.name
    ids = encode(m, PROBES[:1])["input_ids"].repeat(m.n_layers + 1, 1)  # [L + 1, seq]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    try:
        with nn.trace(**batch, logits_to_keep=1, remote=m.remote):
            start, steps = _negate_one_row_each(nn, name)
            start, steps = nnsight.save(start), nnsight.save(steps)
            last = nn.output.logits[:, -1].save()
    except OutOfOrderError as error:
        raise RefusalLabError(f"{name}: some blocks never run as expected ({error}). Use another model.") from error
    last = last.float()
    if not last.isfinite().all():
        raise RefusalLabError(f"{name}: logits are not finite. The weights are damaged, or the dtype is too small.")
    moved = (last[:-1] - last[-1]).abs().amax(-1) > 1e-4 * last[-1].abs().max()
    if not moved.all():
        dead = [i for i, ok in enumerate(moved.tolist()) if not ok]
        raise RefusalLabError(f"{name}: editing blocks {dead} does not change the logits. Use another model.")
    _test_sums(m, start, steps)
    _test_end(m, steps[-1]["output"], last[-1])


def _negate_one_row_each(nn: Any, name: str) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """In a trace: what the last row starts from, and what each block reads, writes and puts out, [seq, width] each."""
    learned = positional_embedding(nn)
    start, steps = [part.output[-1] for part in (embedding(nn), learned) if part is not None], []
    for i, block in enumerate(blocks(nn)):
        x = block.input.clone()
        x[i] = -x[i]
        block.input = x
        step = {"input": x[-1]}
        parts = (("attention", attention, attention_writes), ("MLP", mlp, mlp_writes))
        for (kind, part, writes), norm in zip(parts, post_norm(block), strict=True):
            written, output = writes(block).output, part(block).output
            output = output[0] if kind == "attention" else output
            if not getattr(output, "shape", None) == getattr(written, "shape", None) == x.shape:
                raise RefusalLabError(f"{name}: block {i} is not attention, then one MLP. Use another model.")
            step |= {f"{kind} written": written[-1], f"{kind} put out": output[-1]}
            step[kind] = output[-1] if norm is None else norm.output[-1]
        steps.append(step | {"output": block.output[-1]})
    return start, steps


def _test_sums(m: Model, start: list[Tensor], steps: list[dict[str, Tensor]]) -> None:
    """The stream is the embedding, up to a factor, plus what attentions and MLPs write, and nothing else."""
    scale, other = residual_scale(m.hf), "Its edits could not be trusted: use another model."
    embedded, *learned = (part.cpu().double() for part in start)
    first = steps[0]["input"].cpu().double() - sum(learned)
    factor = (first * embedded).sum() / embedded.square().sum()
    if not _adds_up([factor * embedded, *learned], steps[0]["input"]):
        raise RefusalLabError(f"{m.name}: block 0 does not read the embedding alone. {other}")
    for i, step in enumerate(steps):
        for kind in ("attention", "MLP"):
            if not _adds_up([step[f"{kind} written"]], step[f"{kind} put out"]):
                raise RefusalLabError(f"{m.name}: {kind} {i} does not end in its output projection. {other}")
        writes = [scale * step[kind].cpu().double() for kind in ("attention", "MLP")]
        if not _adds_up([step["input"], *writes], step["output"]):
            raise RefusalLabError(f"{m.name}: block {i} puts out more than its input, attention and MLP. {other}")
        if i and not _adds_up([steps[i - 1]["output"]], step["input"]):
            raise RefusalLabError(f"{m.name}: block {i} does not read what block {i - 1} puts out. {other}")


def _adds_up(parts: Sequence[Tensor], whole: Tensor) -> bool:
    """Whether parts add up to the whole, in every entry, as well as its dtype can tell."""
    limits, parts = torch.finfo(whole.dtype), [part.cpu().double() for part in parts]
    error = (sum(parts) - whole.cpu().double()).abs()
    return bool((error <= 2 * limits.eps * sum(part.abs() for part in parts) + limits.tiny).all())


def _test_end(m: Model, x: Tensor, logits: Tensor) -> None:
    """`unembed` gives the model's own logits [vocab] of the last token of x [seq, width], the end of the stream."""
    error = (unembed(m.hf, x[-1:])[0] - logits).abs().max()
    if not error <= max(1e-4, 4 * torch.finfo(x.dtype).eps) * logits.abs().max():
        raise RefusalLabError(
            f"{m.name}: its logits are not what the final norm and the unembedding make of the stream. "
            "A logit lens would be wrong: use another model."
        )


# ---------------------------------------------------------------------------------------------------------
# Prompts


def render(m: Model, prompt: Prompt, *, system: str | None = None, prefill: str = "") -> str:
    """The text that the model reads: template, generation prompt, then `prefill` as the start of the reply.

    Without `system` the template decides: some (Qwen2.5, SmolLM2) insert a default system prompt. Where the
    template has no system role (Gemma) or does not keep the words, the system prompt goes in front of the first user
    turn. Where the template opens a thought, it is closed at once, with a warning.
    """
    if not isinstance(prefill, str):
        raise RefusalLabError(f"prefill is {reprlib.repr(prefill)}: give the first words of the reply as one text.")
    return _apply_template(m.tokenizer, messages(prompt, system), m.name) + prefill


def encode(m: Model, prompts: Iterable[Prompt], *, system: str | None = None, prefill: str = "") -> dict[str, Tensor]:
    """Rendered prompts as {"input_ids", "attention_mask"}, each [n, seq], padded on the left."""
    texts = [render(m, prompt, system=system, prefill=prefill) for prompt in listed_prompts(prompts)]
    batch = m.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    _check_length(m, batch["input_ids"].shape[1])
    _check_ids(m, batch["input_ids"])
    return {key: batch[key].to(m.device) for key in ("input_ids", "attention_mask")}


def encode_texts(
    m: Model, texts: Iterable[str], prompts: Iterable[Prompt] | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Texts whose tokens are to be predicted: (a batch as from `encode`, counted [n, seq] bool).

    Without prompts a text stands alone, and all its tokens count but the first, which nothing precedes. With prompts,
    text i is the reply to prompt i: it follows the rendered prompt, the end of the turn follows it, and only the tokens
    of the reply and its end count.
    """
    texts = listed(texts, "texts", str)
    if not texts:
        raise RefusalLabError("The list of texts is empty: give at least one.")
    if prompts is None:
        rows = [(ids, 1) for ids in m.tokenizer(texts, add_special_tokens=False)["input_ids"]]
    else:
        prompts = listed_prompts(prompts)
        if len(prompts) != len(texts):
            raise RefusalLabError(f"{len(texts)} replies to {len(prompts)} prompts: give one reply for each.")
        end = [i for i in (end_of_turn(m.tokenizer)[0], m.tokenizer.eos_token_id) if i is not None][:1]
        rows = []
        for prompt, text in zip(prompts, texts, strict=True):
            head = render(m, prompt)
            ids = ids_of(m, head)
            rows.append(([*ids, *ids_behind(m, head, text), *end], len(ids)))
    width = max(len(ids) for ids, _ in rows)
    _check_length(m, width)
    pads = [width - len(ids) for ids, _ in rows]
    ids = torch.tensor([[m.tokenizer.pad_token_id] * pad + row for pad, (row, _) in zip(pads, rows, strict=True)])
    _check_ids(m, ids)
    place = torch.arange(width)[None]  # [1, seq]
    start, first = torch.tensor(pads)[:, None], torch.tensor([first for _, first in rows])[:, None]  # [n, 1]
    batch = {"input_ids": ids, "attention_mask": (place >= start).long()}
    return {key: value.to(m.device) for key, value in batch.items()}, (place >= start + first).to(m.device)


def ids_of(m: Model, text: str) -> list[int]:
    """The tokens of a text, with nothing added."""
    return m.tokenizer(text, add_special_tokens=False)["input_ids"]


def ids_behind(m: Model, head: str, text: str) -> list[int]:
    """The tokens of a text that stands behind another one.

    Many tokenizers put a mark before the first word of whatever they read, so that a text alone has other tokens. Where
    the text joins the last token of `head`, its tokens are those that it has alone.
    """
    before, whole = ids_of(m, head), ids_of(m, head + text)
    return whole[len(before) :] if whole[: len(before)] == before else ids_of(m, text)


def text_behind(m: Model, anchor: Sequence[int], ids: Sequence[int]) -> str:
    """The text of tokens that stand behind others: some tokenizers strip the first space of what they decode."""
    settings = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before, whole = (m.tokenizer.decode([*anchor, *row], **settings) for row in ([], ids))
    return whole[len(before) :]


def messages(prompt: Prompt, system: str | None = None) -> list[dict[str, str]]:
    """The prompt as chat messages, behind a system turn if one is given. Content in parts of text is put together.

    Raises RefusalLabError where none fits.
    """
    if isinstance(prompt, str):
        turns = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, Mapping | bytes) or not isinstance(prompt, Iterable):
        raise RefusalLabError(f"{reprlib.repr(prompt)} is no prompt: give a text, or a list of messages.")
    else:
        turns = [_message(turn, i) for i, turn in enumerate(prompt)]
    if not turns or turns[-1]["role"] != "user" or not turns[-1]["content"].strip():
        raise RefusalLabError("A prompt must end with a user turn that says something (prefill= starts the reply).")
    if any(turn["role"] == "system" for turn in turns[1:]):
        raise RefusalLabError("A system turn stands behind another turn: put it first.")
    if system is None:
        return turns
    if not isinstance(system, str):
        raise RefusalLabError(f"system is {reprlib.repr(system)}: give one text, for all prompts.")
    if turns[0]["role"] == "system":
        raise RefusalLabError("Two system prompts: give it in the messages or as system=, not both.")
    return [{"role": "system", "content": system}, *turns]


def _message(turn: Any, i: int) -> dict[str, str]:
    """A message whose content is one text."""
    if not isinstance(turn, Mapping) or not {"role", "content"} <= set(turn):
        raise RefusalLabError(f"Message {i} is {reprlib.repr(turn)}: give a dict with role and content.")
    role, content = turn["role"], turn["content"]
    if role not in ROLES:
        raise RefusalLabError(f"Message {i} has the role {role!r}: the roles are {', '.join(ROLES)}.")
    if not isinstance(content, str):
        if not isinstance(content, Iterable) or isinstance(content, Mapping | bytes):
            raise RefusalLabError(f"The content of message {i} is {reprlib.repr(content)}: give a text.")
        content = "".join(_part(part, i) for part in content)
    return {**turn, "content": content}


def _part(part: Any, i: int) -> str:
    kind, text = (part.get("type", "text"), part.get("text")) if isinstance(part, Mapping) else ("text", part)
    if kind != "text":
        raise RefusalLabError(f"Message {i} holds a part of type {kind!r}: only text is read, so leave it out.")
    if not isinstance(text, str):
        raise RefusalLabError(f"Message {i} holds {reprlib.repr(part)}: a part is a dict with type 'text' and a text.")
    return text


def _apply_template(tokenizer: Any, messages: list[dict[str, str]], name: str) -> str:
    if not tokenizer.chat_template:
        raise RefusalLabError(f"{name} has no chat template. Use a chat model (often its name ends in Instruct or it).")

    system, attempts = "", [messages]
    if messages[0]["role"] == "system":
        system, (first, *rest) = messages[0]["content"].strip(), messages[1:]
        attempts.append([{**first, "content": f"{system}\n\n{first['content']}"}, *rest])
    reason = "the system prompt is dropped or changed"
    for turns in attempts:
        try:
            text = _fill(tokenizer, turns)
            if not system or _keeps(tokenizer, turns, system, text):
                return _close_thought(tokenizer, turns, text, name)
        except RefusalLabError:
            raise
        except Exception as error:  # templates are programs of others
            reason = _first_line(error)
    raise RefusalLabError(f"{name}: its chat template refuses these messages ({reason}). Change their roles.")


def _fill(tokenizer: Any, turns: list[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
    """The template filled in, the same on every day."""
    template = _pin_date(tokenizer.get_chat_template())
    settings = {"chat_template": template, "add_generation_prompt": add_generation_prompt, **TEMPLATE_SETTINGS}
    return tokenizer.apply_chat_template(turns, tokenize=False, **settings)


def _pin_date(template: str) -> str:
    """The template with TODAY in place of the date that it would ask the clock for.

    A macro takes the place of the function `strftime_now`: it replaces each directive of the format.
    """
    if "strftime_now" not in template:
        return template
    written = {f"%{letter}": TODAY.strftime(f"%{letter}") for letter in "aAwdbBmyYHIMpSfjUWcxXGuVeFTDhR"}
    written |= {f"%-{letter}": str(int(written[f"%{letter}"])) for letter in "dmyHIMSj"}  # without leading zeros
    steps = "".join(f" | replace({directive!r}, {text!r})" for directive, text in written.items())
    return f"{{%- macro strftime_now(format) %}}{{{{ format{steps} }}}}{{% endmacro %}}\n{template}"


def _keeps(tokenizer: Any, turns: list[dict[str, str]], words: str, text: str) -> bool:
    """Whether the first turn's words stand in the rendered text, whole and in the place of that turn."""
    mark = "The Mark of a First Turn"
    marked = [{**turns[0], "content": turns[0]["content"].replace(words, mark, 1)}, *turns[1:]]
    before, found, after = _fill(tokenizer, marked).partition(mark)
    return bool(found) and text == before + words + after


def _close_thought(tokenizer: Any, turns: list[dict[str, str]], text: str, name: str) -> str:
    """The rendered text, with a thought closed that the template has opened for the reply: replies are what is judged.

    Templates with a switch (Qwen3) do the same when thinking is switched off.
    """
    if not THOUGHT.search(text):
        return text
    asked = _fill(tokenizer, turns, add_generation_prompt=False)
    opening = text[len(asked) :] if text.startswith(asked) else text.rpartition(turns[-1]["content"].strip())[2]
    tags = THOUGHT.findall(opening)
    if not tags or _closes(tags[-1]):
        return text
    warnings.warn(
        f"The chat template of {name} opens a thought ({tags[-1]}) before each reply. It is closed at once, so that "
        "the reply follows and can be judged; the model may answer otherwise when it thinks first.",
        stacklevel=2,
    )
    return f"{text.rstrip()}\n\n{_closing(tags[-1])}\n\n"


def _closes(tag: str) -> bool:
    return "/" in tag or "end" in tag.lower()


def _closing(tag: str) -> str:
    """What closes a thought that `tag` opens: <think> </think>, <|begin_of_thought|> <|end_of_thought|>, ..."""
    for opens, closes in (("begin", "end"), ("BEGIN", "END"), ("start", "end"), ("START", "END")):
        if opens in tag:
            return tag.replace(opens, closes, 1)
    bracket = re.match(r"\W+", tag)[0]
    return f"{bracket}/{tag[len(bracket) :]}"


def spoken(reply: str) -> str:
    """A reply without its thoughts: without what stands between their tags, or before one that closes what the prompt
    opened, or behind one that nothing closes."""
    said, start, thinking = "", 0, False
    for tag in THOUGHT.finditer(reply):
        if not thinking and _closes(tag[0]):
            said = ""
        elif not thinking:
            said += reply[start : tag.start()]
        start, thinking = tag.end(), not _closes(tag[0])
    return said if thinking else (said + reply[start:]).lstrip() if start else reply


def listed_prompts(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Prompts as a list, in their own order. Raises RefusalLabError, with the place, for what is no prompt."""
    prompts = listed(prompts, "prompts")
    if not prompts:
        raise RefusalLabError("The list of prompts is empty: give at least one.")
    for i, prompt in enumerate(prompts):
        try:
            prompts[i] = prompt if messages(prompt) and isinstance(prompt, str) else messages(prompt)
        except RefusalLabError as error:
            raise RefusalLabError(f"Prompt {i}: {error}") from None
    return prompts


def _check_length(m: Model, n_tokens: int) -> None:
    limit = getattr(m.hf.config, "max_position_embeddings", None)
    if limit and n_tokens > limit:
        raise RefusalLabError(f"{n_tokens} tokens, but {m.name} reads at most {limit}: shorten the prompt or reply.")


def _check_ids(m: Model, ids: Tensor) -> None:
    rows = embedding(m.hf).weight.shape[0]
    if ids.max() >= rows:
        token = m.tokenizer.convert_ids_to_tokens(ids.max().item())
        raise RefusalLabError(
            f"The token {token!r} is known to the tokenizer but {m.name} has only {rows} tokens: "
            "take it out of the prompt or the chat template."
        )


def batches(m: Model, prompts: Iterable[Prompt], batch_size: int, **settings: Any) -> Iterator[tuple[list[int], dict]]:
    """Encoded prompts in batches, as (indices of the prompts, encoded batch).

    One batch keeps the order of the prompts, so that an edit may hold one direction per row. Several batches
    are sorted by length, which saves padding.
    """
    prompts = listed_prompts(prompts)
    order = list(range(len(prompts)))
    if len(prompts) > batch_size:
        order.sort(key=lambda i: len(render(m, prompts[i])))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield rows, encode(m, [prompts[i] for i in rows], **settings)


# ---------------------------------------------------------------------------------------------------------
# Running


def logits(
    m: Model,
    prompts: Iterable[Prompt],
    *,
    edit: Edit | None = None,
    system: str | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Next-token logits at the last prompt token: fp32 [n, vocab], in the order of the prompts.

    Raises RefusalLabError, with the prompt, where they are not finite.
    """
    out = unchecked_logits(m, prompts, edit=edit, system=system, batch_size=batch_size)
    require_finite(m, out, edit)
    return out


@torch.no_grad()
def unchecked_logits(
    m: Model, prompts: Iterable[Prompt], *, edit: Edit | None, system: str | None = None, batch_size: int
) -> Tensor:
    """`logits`, finite or not: for searches, where an edit may be too strong and loses by that."""
    prompts = listed_prompts(prompts)
    out = torch.empty(len(prompts), m.vocab_size)
    for rows, batch in batches(m, prompts, batch_size, system=system):
        out[rows] = trace_logits(m, batch, edit or no_edit).cpu()
    return out


def generate(
    m: Model,
    prompts: Iterable[Prompt],
    *,
    edit: Edit | None = None,
    system: str | None = None,
    prefill: str = "",
    max_new_tokens: int = 40,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Greedy replies in the order of the prompts: what follows prompt and `prefill`, up to the end of turn.

    `edit` is applied in the forward pass of every token. `progress(n)` is called with the number of finished
    prompts after each batch. Raises RefusalLabError, with the prompt, where logits are not finite.
    """
    prompts = listed_prompts(prompts)
    replies = [""] * len(prompts)
    n_done, (_, end), tags = 0, end_of_turn(m.tokenizer), _thought_tokens(m)
    for rows, batch in batches(m, prompts, batch_size, system=system, prefill=prefill):
        width = batch["input_ids"].shape[1]
        _check_length(m, width + max_new_tokens)
        highest = _Highest(width, m.stop_ids)
        settings = {
            **GREEDY,
            "max_new_tokens": max_new_tokens,
            "eos_token_id": list(m.stop_ids) or None,
            "pad_token_id": m.tokenizer.pad_token_id,
        }
        if not m.remote:
            settings["logits_processor"] = [highest]
        if edit is None and not m.remote:
            ids = m.hf.generate(**batch, **settings)
        else:
            ids = _trace_generate(m, batch, edit or no_edit, settings)
        if highest.seen:
            require_finite(m, torch.stack(highest.seen, 1), edit, rows)
        anchor = ids[:, width - 1 : width].tolist() if prefill else [[]] * len(rows)
        for i, head, new in zip(rows, anchor, ids[:, width:].tolist(), strict=True):
            stop = next((k for k, token in enumerate(new) if token in m.stop_ids), len(new))
            replies[i] = _text(m, head, new[:stop], tags)
            if end:
                replies[i] = replies[i].partition(end)[0]
        n_done += len(rows)
        if progress:
            progress(n_done)
    unfinished = sum(isinstance(reply, str) and bool(reply.strip()) and not spoken(reply).strip() for reply in replies)
    if unfinished:
        warnings.warn(
            f"{unfinished} of {len(replies)} replies end within a thought and say nothing: raise max_new_tokens.",
            stacklevel=2,
        )
    return replies


def no_edit(nn: Any) -> None:
    """The edit that changes nothing."""


def trace_logits(m: Model, batch: dict[str, Tensor], edit: Edit) -> Tensor:
    """Next-token logits of an encoded batch under an edit: fp32 [batch, vocab], on the model's device.

    Gradients flow through it, where they are enabled and something wants them.
    """
    nn = m.nn  # a trace ships every name that it reads: keep m out of it
    with all_rows(), nn.trace(**batch, logits_to_keep=1, remote=m.remote):
        edit(nn)
        last = nn.output.logits[:, -1].save()
    return last.float()


def require_finite(m: Model, values: Tensor, edit: Edit | None, rows: Sequence[int] | None = None) -> None:
    """RefusalLabError, with the first prompt and what to do, unless all values [n, ...] of the prompts are finite.

    `rows` are the places of the prompts, where these are not all of them in their order.
    """
    bad = (~values.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    if not bad:
        return
    first, others = (rows or range(len(values)))[bad[0]], len(bad) - 1
    dtype = str(m.hf.dtype).removeprefix("torch.")
    edited = edit not in (None, no_edit)
    remedy = "the edit is too strong" if edited else "the weights may be damaged: fetch them again"
    if m.hf.dtype == torch.float16:
        remedy = "load the model with dtype=torch.bfloat16 or torch.float32, which hold larger numbers"
    raise RefusalLabError(
        f"Prompt {first}{f' and {others} more' if others else ''}: {m.name} computes numbers that are not finite in "
        f"{dtype}; {remedy}."
    )


class _Highest(LogitsProcessor):
    """Notes the highest logit of every step, [batch], which is not finite when one of them is NaN or +inf."""

    def __init__(self, width: int, stop_ids: tuple[int, ...]) -> None:
        self.width, self.stop_ids = width, torch.tensor(stop_ids)
        self.seen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ended = torch.isin(input_ids[:, self.width :], self.stop_ids.to(input_ids)).any(1)
        self.seen.append(scores.amax(-1).float().masked_fill(ended, 0.0))
        return scores


def _thought_tokens(m: Model) -> dict[int, str]:
    """Special tokens that open or close a thought: id -> text."""
    added = m.tokenizer.added_tokens_decoder.items()
    return {i: str(token) for i, token in added if token.special and THOUGHT.fullmatch(str(token))}


def _text(m: Model, anchor: list[int], ids: list[int], tags: dict[int, str]) -> str:
    """The text of a reply behind the last token before it: no special tokens, but the tags of thoughts."""
    pieces = [[]]
    for token in ids:
        pieces[-1].append(token)
        if token in tags:
            pieces.append([])
    first, *rest = pieces
    text = text_behind(m, anchor, first) if anchor else m.tokenizer.decode(first, skip_special_tokens=True)
    for before, piece in zip(pieces, rest, strict=False):
        text += tags[before[-1]] + m.tokenizer.decode(piece, skip_special_tokens=True)
    return text


@torch.no_grad()
def _trace_generate(m: Model, batch: dict[str, Tensor], edit: Edit, settings: dict[str, Any]) -> Tensor:
    nn, n_steps = m.nn, settings["max_new_tokens"]
    with warnings.catch_warnings():
        # All replies may end before the last step; nnsight then says that the loop was cut short.
        warnings.filterwarnings("ignore", message=r".*was never reached")
        with all_rows(), nn.generate(**settings, remote=m.remote) as tracer:
            with tracer.invoke(**batch):
                for _ in tracer.iter[:n_steps]:  # a bounded loop: an edit that touches nothing must end too
                    edit(nn)
            with tracer.invoke():  # a second reader: the first one may be cut short
                ids = tracer.result.save()
    return ids
