"""A chat model that you can look into: loading, names of parts, prompts, logits, greedy generation.

`load` gives a `Model`: the transformers model (`hf`), its nnsight view (`nn`), the tokenizer, and what the
library found out about them. `blocks`, `attention`, `mlp`, ... hide the names that architectures use.
`logits` and `generate` run prompts, with or without an *edit*.

An edit is a plain function `edit(nn) -> None` that assigns to parts of the nnsight model, for example
`nn.model.layers[3].mlp.output = ...`. It must visit the parts in the order of the forward pass.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from jinja2 import TemplateError
from nnsight import TransformersModel
from nnsight.intervention.interleaver import OutOfOrderError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from refusallab.errors import RefusalLabError
from smallmodels import catalog, weights_dir

Prompt = str | list[dict[str, str]]  # an instruction (one user turn), or chat messages
Edit = Callable[[Any], None]

# Passed to every chat template: no thinking (Qwen3), no date of today (Llama-3.2).
TEMPLATE_SETTINGS = {"enable_thinking": False, "date_string": "26 Jul 2024"}

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

HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


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

    Gemma-2/3 and OLMo-2 have them. Beware of the name: `post_attention_layernorm` is such a norm there, but
    in Llama and Qwen the same name is the norm *before* the MLP.
    """
    mlp_norm = _either(block, "post_feedforward_layernorm", optional=True)
    return (None, None) if mlp_norm is None else (block.post_attention_layernorm, mlp_norm)


def equivalence_class(hf: torch.nn.Module) -> str:
    """What the weight edit needs to equal ablation by hooks. One of these, or a sum such as "untie+biases":

    "exact"      projecting the output matrices is enough
    "untie"      the head shares the embedding: give it a copy of its own first
    "positions"  learned position embeddings write to the stream: project them too
    "biases"     output biases write to the stream: project them too
    "post-norm"  norms after attention and MLP rotate what is written: equality is not promised
    """
    if any(norm is not None for block in blocks(hf) for norm in post_norm(block)):
        return "post-norm"
    tied = unembedding(hf).weight is embedding(hf).weight
    writers = [write for block in blocks(hf) for write in (attention_writes(block), mlp_writes(block))]
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
        f"{type(module).__name__} has no {' or '.join(names)}: use a model of the Llama, Qwen, Gemma, "
        "OLMo-2, Mistral, Phi-3 or GPT-2 family."
    )


# ---------------------------------------------------------------------------------------------------------
# Loading


def load(
    name: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", remote: bool | str = False
) -> Model:
    """Load a bundled model, a local folder, or a hub model (an alias of the catalogue or "owner/name").

    Only safetensors are read and no code from a repository is run. `remote=True` runs the model on NDIF
    through nnsight: that needs a hub id, a network and an NDIF key. `remote="local"` rehearses the same path
    here. Raises RefusalLabError with one line when the model cannot be found, read or used.
    """
    if remote is True:
        return _load_remote(name)
    folder, commit = _find(name)
    _check_files(folder, name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
        with _no_progress_bar():
            hf, report = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
    except Exception as error:  # many libraries read the files, each with exceptions of its own
        raise RefusalLabError(_reading_failed(name, error)) from error
    if report["missing_keys"]:
        raise RefusalLabError(
            f"{name}: {len(report['missing_keys'])} tensors are missing from the weights, for example "
            f"{sorted(report['missing_keys'])[0]}. Fetch the files again."
        )
    return wrap(hf.to(device), tokenizer, name, commit or sha256_of_weights(folder), remote=remote)


def wrap(
    hf: torch.nn.Module, tokenizer: Any, name: str = "model", commit: str = "", *, remote: bool | str = False
) -> Model:
    """Make a `Model` of a transformers model and its tokenizer, in place, and test that it works.

    The test: the parts are found, the template renders, it has post-instruction tokens and no double BOS,
    logits are finite, and an edit of each block changes them. One forward pass; RefusalLabError if it fails.
    """
    hf.eval().requires_grad_(False)
    nn = TransformersModel(hf, tokenizer=tokenizer, task="text-generation")
    m = _assemble(nn, tokenizer, name, commit, remote)
    _test_blocks(m)
    return m


def _assemble(nn: TransformersModel, tokenizer: Any, name: str, commit: str, remote: bool | str) -> Model:
    hf = nn._module
    if remote:  # NDIF does not have this library: its functions travel with the request
        nnsight.register("refusallab")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if len(tokenizer) > embedding(hf).weight.shape[0]:
        raise RefusalLabError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens but the model only "
            f"{embedding(hf).weight.shape[0]}. Use the tokenizer that belongs to these weights."
        )
    positions = _post_instruction_positions(tokenizer, name)
    stop_ids = _stop_ids(hf, tokenizer)
    return Model(nn, hf, tokenizer, name, commit, positions, stop_ids, equivalence_class(hf), remote)


def _find(name: str) -> tuple[Path, str]:
    """The folder of a model, and its commit if the hub knows it."""
    entry = catalog().get(name)
    if entry and entry.kind == "bundled":
        return weights_dir(name), ""
    if name and Path(name).is_dir():
        return Path(name), ""
    repository = _hub_id(name)
    try:
        folder = huggingface_hub.snapshot_download(
            repository, allow_patterns=HUB_FILES, ignore_patterns=["*/*", "consolidated*"]
        )
    except Exception as error:
        raise RefusalLabError(_fetching_failed(name, error)) from error
    return Path(folder), Path(folder).name  # the hub cache names the folder after the commit


def is_on_disk(name: str) -> bool:
    """Whether a model can be loaded without a download."""
    entry = catalog().get(name)
    if (entry and entry.kind == "bundled") or Path(name).is_dir():
        return True
    try:
        huggingface_hub.snapshot_download(_hub_id(name), allow_patterns=["config.json"], local_files_only=True)
    except LocalEntryNotFoundError:
        return False
    return True


def _hub_id(name: str) -> str:
    entry = catalog().get(name)
    if entry and entry.kind == "hub":
        return entry.id
    if name.count("/") == 1 and all(name.split("/")) and not name.startswith((".", "~")):
        return name
    known = ", ".join(catalog())
    raise RefusalLabError(
        f"Unknown model {name!r}: no such folder. Give one of {known}, or a hub id owner/name."
    )


def _check_files(folder: Path, name: str) -> None:
    if not folder.is_dir():
        raise RefusalLabError(
            f"The weights of {name} are not in {folder}. Train it with python -m smallmodels.recipe."
        )
    if not (folder / "config.json").is_file():
        raise RefusalLabError(f"{name}: no config.json in {folder}. Give a folder in Hugging Face format.")
    if any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise RefusalLabError(
            f"{name} has only pickled weights, which can run code when read. "
            "Convert them to safetensors, or use a model that ships them."
        )
    raise RefusalLabError(f"{name}: no *.safetensors in {folder}. Fetch the weights again.")


def _reading_failed(name: str, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return f"{name} needs code from its repository, which this library never runs. Use another model."
    return f"{name} cannot be read ({_first_line(error)}). The files may be damaged: fetch them again."


def _fetching_failed(name: str, error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return (
            f"{name} is gated: accept its licence on the model's hub page, then log in with `hf auth login`."
        )
    if isinstance(error, RepositoryNotFoundError):
        return f"There is no model {name} on the hub: check the spelling."
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return (
            f"{name} is not on this computer and the hub cannot be reached. Connect (and unset "
            "HF_HUB_OFFLINE), or use a bundled model such as charter-chat."
        )
    return f"{name} cannot be fetched ({_first_line(error)}). Check the network and the disk, then try again."


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


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
        raise RefusalLabError(
            f"{name} is a local model and NDIF does not host it: give a hub id with remote=True."
        )
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
        raise RefusalLabError(
            f"{name}: its chat template adds nothing after the instruction. Use a chat model."
        )
    return tuple(range(-n, 0))


def _stop_ids(hf: torch.nn.Module, tokenizer: Any) -> tuple[int, ...]:
    """End-of-sequence tokens of model and tokenizer, and the token that the template puts after a reply."""
    eos = getattr(hf.generation_config, "eos_token_id", None)
    ids = set(eos if isinstance(eos, list) else [eos]) | {tokenizer.eos_token_id}
    turns = [{"role": "user", "content": PROBES[0]}, {"role": "assistant", "content": "reply"}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, **TEMPLATE_SETTINGS)
    except TemplateError:  # a template for single questions only
        text = ""
    after = tokenizer(text.rpartition("reply")[2], add_special_tokens=False)["input_ids"]
    ids |= {i for i in after[:1] if i in tokenizer.all_special_ids}
    return tuple(sorted(ids - {None}))


@torch.no_grad()
def _test_blocks(m: Model) -> None:
    """Row i of one batch runs with the input of block i negated; the last row runs untouched."""
    ids = encode(m, PROBES[:1])["input_ids"].repeat(m.n_layers + 1, 1)  # [L + 1, seq]
    name = m.name

    def negate_one_row_each(nn: Any) -> None:
        for i, block in enumerate(blocks(nn)):
            x = block.input.clone()
            x[i] = -x[i]
            block.input = x
            for part in (attention(block).output[0], mlp(block).output):
                if getattr(part, "shape", None) != x.shape:
                    raise RefusalLabError(
                        f"{name}: block {i} is not attention, then one MLP. Use another model."
                    )

    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    try:
        last = trace_logits(m, batch, negate_one_row_each)
    except OutOfOrderError as error:
        raise RefusalLabError(
            f"{name}: some blocks never run as expected ({error}). Use another model."
        ) from error
    if not last.isfinite().all():
        raise RefusalLabError(
            f"{name}: logits are not finite. The weights are damaged, or the dtype is too small."
        )
    moved = (last[:-1] - last[-1]).abs().amax(-1) > 1e-4 * last[-1].abs().max()
    if not moved.all():
        dead = [i for i, ok in enumerate(moved.tolist()) if not ok]
        raise RefusalLabError(f"{name}: editing blocks {dead} does not change the logits. Use another model.")


# ---------------------------------------------------------------------------------------------------------
# Prompts


def render(m: Model, prompt: Prompt, *, system: str | None = None, prefill: str = "") -> str:
    """The text that the model reads: template, generation prompt, then `prefill` as the start of the reply.

    Without `system` the template decides: some (Qwen2.5, SmolLM2) insert a default system prompt. Where the
    template has no system role (Gemma), the system prompt goes in front of the first user turn.
    """
    return _apply_template(m.tokenizer, messages(prompt, system), m.name) + prefill


def encode(
    m: Model, prompts: Sequence[Prompt], *, system: str | None = None, prefill: str = ""
) -> dict[str, Tensor]:
    """Rendered prompts as {"input_ids", "attention_mask"}, each [n, seq], padded on the left."""
    _check_prompts(prompts)
    texts = [render(m, prompt, system=system, prefill=prefill) for prompt in prompts]
    batch = m.tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    )
    _check_length(m, batch["input_ids"].shape[1])
    return {key: batch[key].to(m.device) for key in ("input_ids", "attention_mask")}


def encode_texts(
    m: Model, texts: Sequence[str], prompts: Sequence[Prompt] | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Texts whose tokens are to be predicted: (a batch as from `encode`, counted [n, seq] bool).

    Without prompts a text stands alone, and all its tokens count but the first, which nothing precedes. With prompts,
    text i is the reply to prompt i: it follows the rendered prompt, the end of the turn follows it, and only the tokens
    of the reply and its end count.
    """
    _check_prompts(texts)
    tokens = m.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    if prompts is None:
        rows = [(ids, 1) for ids in tokens]
    elif len(prompts) != len(texts):
        raise RefusalLabError(f"{len(texts)} replies to {len(prompts)} prompts: give one reply for each.")
    else:
        heads = m.tokenizer([render(m, prompt) for prompt in prompts], add_special_tokens=False)["input_ids"]
        end = m.tokenizer.eos_token_id
        rows = [([*head, *reply, end], len(head)) for head, reply in zip(heads, tokens, strict=True)]
    width = max(len(ids) for ids, _ in rows)
    _check_length(m, width)
    pads = [width - len(ids) for ids, _ in rows]
    ids = torch.tensor([[m.tokenizer.pad_token_id] * pad + row for pad, (row, _) in zip(pads, rows, strict=True)])
    place = torch.arange(width)[None]  # [1, seq]
    start, first = torch.tensor(pads)[:, None], torch.tensor([first for _, first in rows])[:, None]  # [n, 1]
    batch = {"input_ids": ids, "attention_mask": (place >= start).long()}
    return {key: value.to(m.device) for key, value in batch.items()}, (place >= start + first).to(m.device)


def messages(prompt: Prompt, system: str | None = None) -> list[dict[str, str]]:
    """The prompt as chat messages, behind a system turn if one is given. Raises RefusalLabError where none fits."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if not turns or turns[-1].get("role") != "user" or not turns[-1].get("content", "").strip():
        raise RefusalLabError(
            "A prompt must end with a user turn that says something (prefill= starts the reply)."
        )
    if system is None:
        return turns
    if turns[0]["role"] == "system":
        raise RefusalLabError("Two system prompts: give it in the messages or as system=, not both.")
    return [{"role": "system", "content": system}, *turns]


def _apply_template(tokenizer: Any, messages: list[dict[str, str]], name: str) -> str:
    if not tokenizer.chat_template:
        raise RefusalLabError(
            f"{name} has no chat template. Use a chat model (often its name ends in Instruct or it)."
        )

    system, attempts = "", [messages]
    if messages[0]["role"] == "system":
        system, (first, *rest) = messages[0]["content"].strip(), messages[1:]
        attempts.append([{**first, "content": f"{system}\n\n{first['content']}"}, *rest])
    reason = "the system prompt is dropped"
    for turns in attempts:
        try:
            text = tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, **TEMPLATE_SETTINGS
            )
        except TemplateError as error:
            reason = str(error)
            continue
        if system in text:
            return text
    raise RefusalLabError(f"{name}: its chat template refuses these messages ({reason}). Change their roles.")


def _check_prompts(prompts: Sequence[Prompt]) -> None:
    if isinstance(prompts, str):
        raise RefusalLabError("prompts is one string: give a list of prompts, even for a single one.")
    if len(prompts) == 0:
        raise RefusalLabError("The list of prompts is empty: give at least one.")


def _check_length(m: Model, n_tokens: int) -> None:
    limit = getattr(m.hf.config, "max_position_embeddings", None)
    if limit and n_tokens > limit:
        raise RefusalLabError(
            f"{n_tokens} tokens, but {m.name} reads at most {limit}: shorten the prompt or reply."
        )


def batches(
    m: Model, prompts: Sequence[Prompt], batch_size: int, **settings: Any
) -> Iterator[tuple[list[int], dict]]:
    """Encoded prompts in batches, as (indices of the prompts, encoded batch).

    One batch keeps the order of the prompts, so that an edit may hold one direction per row. Several batches
    are sorted by length, which saves padding.
    """
    _check_prompts(prompts)
    order = list(range(len(prompts)))
    if len(prompts) > batch_size:
        order.sort(key=lambda i: len(render(m, prompts[i])))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield rows, encode(m, [prompts[i] for i in rows], **settings)


# ---------------------------------------------------------------------------------------------------------
# Running


@torch.no_grad()
def logits(
    m: Model,
    prompts: Sequence[Prompt],
    *,
    edit: Edit | None = None,
    system: str | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Next-token logits at the last prompt token: fp32 [n, vocab], in the order of the prompts."""
    out = torch.empty(len(prompts), m.vocab_size)
    for rows, batch in batches(m, prompts, batch_size, system=system):
        out[rows] = trace_logits(m, batch, edit or no_edit).cpu()
    return out


def generate(
    m: Model,
    prompts: Sequence[Prompt],
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
    prompts after each batch.
    """
    replies = [""] * len(prompts)
    n_done = 0
    for rows, batch in batches(m, prompts, batch_size, system=system, prefill=prefill):
        width = batch["input_ids"].shape[1]
        _check_length(m, width + max_new_tokens)
        settings = {
            **GREEDY,
            "max_new_tokens": max_new_tokens,
            "eos_token_id": list(m.stop_ids),
            "pad_token_id": m.tokenizer.pad_token_id,
        }
        if edit is None and not m.remote:
            ids = m.hf.generate(**batch, **settings)
        else:
            ids = _trace_generate(m, batch, edit or no_edit, settings)
        for i, new in zip(rows, ids[:, width:].tolist(), strict=True):
            end = next((k for k, token in enumerate(new) if token in m.stop_ids), len(new))
            replies[i] = m.tokenizer.decode(new[:end], skip_special_tokens=True)
        n_done += len(rows)
        if progress:
            progress(n_done)
    return replies


def no_edit(nn: Any) -> None:
    """The edit that changes nothing."""


def trace_logits(m: Model, batch: dict[str, Tensor], edit: Edit) -> Tensor:
    """Next-token logits of an encoded batch under an edit: fp32 [batch, vocab], on the model's device.

    Gradients flow through it, where they are enabled and something wants them.
    """
    nn = m.nn  # a trace ships every name that it reads: keep m out of it
    with nn.trace(**batch, logits_to_keep=1, remote=m.remote):
        edit(nn)
        last = nn.output.logits[:, -1].save()
    return last.float()


@torch.no_grad()
def _trace_generate(m: Model, batch: dict[str, Tensor], edit: Edit, settings: dict[str, Any]) -> Tensor:
    nn, n_steps = m.nn, settings["max_new_tokens"]
    with warnings.catch_warnings():
        # All replies may end before the last step; nnsight then says that the loop was cut short.
        warnings.filterwarnings("ignore", message=r".*was never reached")
        with nn.generate(**settings, remote=m.remote) as tracer:
            with tracer.invoke(**batch):
                for _ in tracer.iter[:n_steps]:  # a bounded loop: an edit that touches nothing must end too
                    edit(nn)
            with tracer.invoke():  # a second reader: the first one may be cut short
                ids = tracer.result.save()
    return ids
