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
import re
import reprlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from nnsight import TransformersModel
from nnsight.intervention.interleaver import OutOfOrderError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

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
    envoys = None if remote else WatchedEnvoy  # NDIF has its own
    nn = TransformersModel(hf, tokenizer=tokenizer, task="text-generation", envoys=envoys)
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
    template has no system role (Gemma) or does not keep the words, the system prompt goes in front of the first user
    turn. Where the template opens a thought, it is closed at once, with a warning.
    """
    if not isinstance(prefill, str):
        raise RefusalLabError(f"prefill is {reprlib.repr(prefill)}: give the first words of the reply as one text.")
    return _apply_template(m.tokenizer, messages(prompt, system), m.name) + prefill


def encode(
    m: Model, prompts: Iterable[Prompt], *, system: str | None = None, prefill: str = ""
) -> dict[str, Tensor]:
    """Rendered prompts as {"input_ids", "attention_mask"}, each [n, seq], padded on the left."""
    texts = [render(m, prompt, system=system, prefill=prefill) for prompt in listed_prompts(prompts)]
    batch = m.tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    )
    _check_length(m, batch["input_ids"].shape[1])
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
        raise RefusalLabError(
            "A prompt must end with a user turn that says something (prefill= starts the reply)."
        )
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
        raise RefusalLabError(
            f"{name} has no chat template. Use a chat model (often its name ends in Instruct or it)."
        )

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
        raise RefusalLabError(
            f"{n_tokens} tokens, but {m.name} reads at most {limit}: shorten the prompt or reply."
        )


def batches(
    m: Model, prompts: Iterable[Prompt], batch_size: int, **settings: Any
) -> Iterator[tuple[list[int], dict]]:
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
