"""Low-rank adapters: found in a folder, checked, and merged into the weights that they change.

Many fine-tuned models are published as adapters (Hu et al. 2021, "LoRA"; Hugging Face's peft). Merged, such a model has
weights like any other, so every trace and every edit of this library works on it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from refusallab.errors import RefusalLabError, first_line
from refusallab.model.gguf import sha256_of_file
from smallmodels import catalog, weights_dir

MOVES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")  # initializations that change the weights of the base too
ELSEWHERE = "merge it with merge_and_unload() of peft, save the result and load that."


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on the disk: W becomes W + scale B A, where A is [rank, in] and B is [out, rank]."""

    file: Path
    base: str  # what `load` takes: an alias, a folder or a hub id
    scale: float
    transposed: bool  # for modules that keep W as [in, out], as GPT-2 does

    @property
    def chat_template(self) -> str | None:
        """The chat template of the fine-tuned model, if there is one."""
        file = self.file.parent / "chat_template.jinja"
        return file.read_text(encoding="utf-8") if file.is_file() else None

    @property
    def tokenizer(self) -> Path | None:
        """The folder, if the tokenizer and the chat template of the fine-tuned model are there too."""
        folder = self.file.parent
        return folder if (folder / "tokenizer_config.json").is_file() else None

    @property
    def sha256(self) -> str:
        """The first 12 digits, which name the adapter."""
        return sha256_of_file(self.file)[:12]


def find_adapter(name: str) -> Adapter | None:
    """The adapter of an adapted model, or in a folder without a whole model; None where `name` is anything else.

    Reads no weights. Raises RefusalLabError for an adapter that cannot be merged as it is.
    """
    entry = catalog().get(name)
    adapted = entry is not None and entry.kind == "adapted"
    folder = weights_dir(name) if adapted else Path(name)
    config = folder / "adapter_config.json"
    if not name or not config.is_file() or (folder / "config.json").is_file():
        return None
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        kind, base = settings["peft_type"], settings["base_model_name_or_path"]
        rank, alpha = (settings["r"], settings["lora_alpha"]) if kind == "LORA" else (1, 1)
    except (ValueError, KeyError, TypeError) as error:
        raise RefusalLabError(
            f"{name}: adapter_config.json is damaged ({first_line(error)}): fetch it again."
        ) from error
    others = (
        "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "trainable_token_indices",
        "alora_invocation_tokens", "kasa_config",
    )  # fmt: skip
    more = [key for key in others if settings.get(key)] + ["bias"] * (settings.get("bias", "none") != "none")
    if str(settings.get("init_lora_weights")).lower().startswith(MOVES_BASE):
        more.append("init_lora_weights")
    if kind != "LORA" or more:
        what = ", ".join(more) or kind
        raise RefusalLabError(f"{name} is more than a plain LoRA adapter ({what}): {ELSEWHERE}")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        raise RefusalLabError(
            f"{name}: adapter_config.json is damaged (r {rank!r}, lora_alpha {alpha!r}): fetch it again."
        )
    if not base:
        raise RefusalLabError(
            f"{name} does not say which model it changes: name it in adapter_config.json, as base_model_name_or_path."
        )
    file = folder / "adapter_model.safetensors"
    if adapted and (not file.is_file() or sha256_of_file(file) != entry.sha256):
        raise RefusalLabError(f"The adapter of {name} is missing or damaged: install the course again.")
    if not file.is_file():
        raise RefusalLabError(f"{name} has no adapter_model.safetensors (pickled weights are not read): {ELSEWHERE}")
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    return Adapter(file, base, scale, bool(settings.get("fan_in_fan_out")))


def merge(hf: torch.nn.Module, adapter: Adapter, name: str) -> None:
    """Add an adapter to the weights of its base, in place.

    Raises RefusalLabError when its file is damaged or its tensors do not fit.
    """
    try:
        tensors = load_file(adapter.file)
    except Exception as error:
        raise RefusalLabError(
            f"{name}: {adapter.file.name} is cut off or damaged ({first_line(error)}): fetch it again."
        ) from error
    downs = [key for key in tensors if key.endswith(".lora_A.weight")]
    weights = dict(hf.named_parameters())  # a tied weight has one name only, that of the embedding
    for key in downs:
        target = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
        up = tensors.pop(key.replace("lora_A", "lora_B"), None)
        change = None if up is None else adapter.scale * up.float() @ tensors.pop(key).float()
        if change is not None and adapter.transposed:
            change = change.T
        if change is None or target not in weights or weights[target].shape != change.shape:
            raise RefusalLabError(f"{name} does not fit its base, {adapter.base} ({target}): {ELSEWHERE}")
        weights[target].data += change.to(weights[target])
    if tensors or not downs:
        what = next(iter(tensors), "it is empty")
        raise RefusalLabError(f"{name} is more than a plain LoRA adapter ({what}): {ELSEWHERE}")
