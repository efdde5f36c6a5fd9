"""The files of a model: where they are, and whether they can be read. No weights are loaded here."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import psutil
import torch
import transformers
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from refusallab.errors import RefusalLabError, first_line
from refusallab.model.gguf import dequantize, fetch_file, folder_for, read_header, sha256_of_file, version_of
from refusallab.model.merging import find_adapter
from refusallab.model.parts import equivalence_class, final_norm
from smallmodels import catalog, weights_dir

SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]  # of a hub repository: they tell whether the weights are of use
HUB_FILES = [*SMALL_FILES, "*.safetensors"]
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def find_files(name: str, source: str = "") -> tuple[Path, str]:
    """The folder of a model, and its commit if the hub knows it. Of a hub model, only the small files are fetched.

    A GGUF file, named by its path or in the catalogue, is fetched and dequantized first, if it was not before; its hash
    stands for a commit. `source`, one of gguf.SOURCES, allows one place only to fetch it from.
    """
    entry = catalog().get(name)
    if entry and entry.kind == "bundled":
        return weights_dir(name), ""
    if name and Path(name).is_dir():
        return Path(name), ""
    if (entry and entry.file) or name.endswith(".gguf"):
        folder = _find_gguf(name, source)
        return folder, version_of(folder)
    folder = fetch(name, SMALL_FILES)
    return folder, folder.name  # the hub cache names the folder after the commit


def _find_gguf(name: str, source: str) -> Path:
    """The folder with the dequantized weights of a GGUF file."""
    entry, file = catalog().get(name), Path(name)
    if not entry and not file.is_file():
        raise RefusalLabError(f"There is no file {name}: check the path.")
    sha256 = entry.sha256 if entry else sha256_of_file(file)
    folder = folder_for(sha256)
    if folder.is_dir():
        return folder
    if entry:
        file = fetch_file(entry, source)
    header = read_header(file, name)
    _check_architecture(header.config, name)
    check_memory(int(1.6 * 4 * header.n_parameters), name, "to be dequantized")  # at most 1.55 was measured
    try:
        folder = dequantize(file, name, sha256, header.precision)
    except RefusalLabError:
        raise
    except Exception as error:
        raise RefusalLabError(reading_failed(name, error)) from error
    shutil.rmtree(folder.with_suffix(".parts"), ignore_errors=True)
    return folder


def fetch(name: str, patterns: list[str], commit: str | None = None) -> Path:
    repository = hub_id(name)
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=commit, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]
        )
    except Exception as error:
        raise RefusalLabError(fetching_failed(name, error)) from error
    return Path(folder)


def is_on_disk(name: str) -> bool:
    """Whether a model can be loaded without a download."""
    entry = catalog().get(name)
    if adapter := find_adapter(name):
        return is_on_disk(adapter.base)
    if (entry and entry.kind == "bundled") or Path(name).is_dir():
        return True
    if name.endswith(".gguf") and Path(name).is_file():
        return True
    if entry and entry.file:
        return folder_for(entry.sha256).is_dir()
    try:
        folder = huggingface_hub.snapshot_download(hub_id(name), allow_patterns=HUB_FILES, local_files_only=True)
    except LocalEntryNotFoundError:
        return False
    try:
        return bool(_weight_files(Path(folder), name))
    except RefusalLabError:  # a download that broke off
        return False


def hub_id(name: str) -> str:
    entry = catalog().get(name)
    if entry and entry.kind == "hub":
        return entry.id
    if name.count("/") == 1 and all(name.split("/")) and not name.startswith((".", "~")):
        return name
    known = ", ".join(entry.name for entry in catalog().values() if entry.kind != "hub")
    raise RefusalLabError(
        f"Unknown model {name!r}: no such folder. Give {known}, an alias such as qwen2.5-0.5b, or owner/name."
    )


def read_config(folder: Path, name: str) -> transformers.PreTrainedConfig:
    """The configuration, of an architecture that this library can take apart. Reads no weights."""
    if not folder.is_dir():
        raise RefusalLabError(f"The weights of {name} are not in {folder}. Train it with python -m smallmodels.recipe.")
    adapters = sorted(folder.glob("adapter_*"))
    if not (folder / "config.json").is_file():
        if adapters:
            raise RefusalLabError(
                f"{name} is an adapter of another model. Download it (hf download {name} --local-dir FOLDER) and give "
                "the folder: load() merges the two."
            )
        raise RefusalLabError(_no_weights(folder, name, f"no config.json in {folder}"))
    if adapters:
        raise RefusalLabError(
            f"{name} holds a whole model and an adapter, which would be ignored. Merge it with merge_and_unload() of "
            f"peft and save the result, or remove {adapters[0].name} to study the model without it."
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise RefusalLabError(reading_failed(name, error)) from error
    if (entry := catalog().get(name)) and entry.kind == "bundled":  # the recipe made it, so its parts are known
        return config
    _check_architecture(config, name)
    return config


def _check_architecture(config: transformers.PreTrainedConfig, name: str) -> None:
    """Refuse an architecture that this library cannot take apart. Needs no weights."""
    check_config(config, (config.architectures or [""])[0], name)
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise RefusalLabError(f"{name} does not predict the next token ({config.model_type}). {_instead(config)}")
    try:
        with torch.device("meta"), no_init_weights():
            hf = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise RefusalLabError(reading_failed(name, error)) from error
    check_parts(hf, name)


def check_config(config: transformers.PreTrainedConfig, architecture: str, name: str) -> None:
    """Refuse anything but a text decoder in full precision, and name a model to use instead."""
    instead = _instead(config)
    configs = [c for c in (config, getattr(config, "text_config", None)) if c is not None]
    for settings in (getattr(c, key, None) for c in configs for key in ("quantization_config", "quantization")):
        if settings:
            fields = settings if isinstance(settings, dict) else vars(settings)
            method = fields.get("quant_method") or "quantization"
            raise RefusalLabError(f"{name} is quantized ({getattr(method, 'value', method)}). {in_full(name)}")
    if any(getattr(config, f"{sense}_config", None) for sense in ("vision", "audio", "speech")):
        raise RefusalLabError(f"{name} reads more than text ({architecture or config.model_type}). {instead}")
    if config.is_encoder_decoder:
        raise RefusalLabError(f"{name} is an encoder with a decoder, which has two streams. {instead}")
    if hasattr(transformers, architecture) and architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        what = "scores texts" if "Classification" in architecture else "does not predict the next token"
        raise RefusalLabError(f"{name} {what} ({architecture}). {instead}")


def check_parts(hf: torch.nn.Module, name: str) -> None:
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
    return max(aliases, key=lambda alias: max(alike(alias), 3))  # fewer letters in common may be chance


def in_full(name: str) -> str:
    """What to take in place of quantized weights."""
    plain = re.sub(r"(?i)[-_.](gptq|awq|bnb|fp8|(nv|mx)fp4|w\d+a\d+|int[48]|[48]-?bit|mlx|gguf|exl2|hqq).*", "", name)
    example = f", perhaps {plain}" if plain != name and not Path(name).exists() else ""
    return f"Take the same model in bf16, fp16 or fp32{example}: only full weights can be edited."


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
        raise RefusalLabError(f"{name}: {path.name} is damaged ({first_line(error)}): fetch it again.") from error
    return content if isinstance(content, dict) else {}


def check_weights(folder: Path, name: str) -> int:
    """Read the headers: the files are whole, agree with their index and hold full numbers, not codes.

    Returns how many numbers they hold.
    """
    files = _weight_files(folder, name)
    if not files:
        raise RefusalLabError(_no_weights(folder, name, f"no *.safetensors in {folder}, as transformers names them"))
    where, count = {}, 0
    for path in files:
        stored = _stored(path, name)
        types = {key: kind for key, (kind, _) in stored.items()}
        count += sum(math.prod(shape) for _, shape in stored.values())
        where |= dict.fromkeys(types, path.name)
        if low := sorted(key for key, kind in types.items() if kind not in FLOATS and not BUFFERS.search(key)):
            raise RefusalLabError(f"{name}: {low[0]} is stored as {types[low[0]]}, not as numbers. {in_full(name)}")
    index = folder / "model.safetensors.index.json"
    promised = {} if files == [folder / "model.safetensors"] else _weight_map(index, name)
    if lost := sorted(key for key, file in promised.items() if where.get(key) != file):
        raise RefusalLabError(f"{name}: {lost[0]} is not where {index.name} says. Fetch the files again.")
    return count


def _stored(path: Path, name: str) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of each tensor in a safetensors file, from its header."""
    try:
        with safe_open(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {key: (part.get_dtype(), part.get_shape()) for key, part in slices.items()}
    except Exception as error:
        with path.open("rb") as file:
            pointer = file.read(40).startswith(b"version https://git-lfs")
        if pointer:
            raise RefusalLabError(
                f"{name}: {path.name} only points to the weights: run `git lfs pull` in its folder."
            ) from error
        raise RefusalLabError(
            f"{name}: the weights in {path.name} are cut off or damaged ({first_line(error)}): fetch them again."
        ) from error


def check_memory(needed: int, name: str, what: str) -> None:
    """Raise RefusalLabError unless so many bytes of memory are free."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")  # of a container; what only caches files can be given up
    with suppress(OSError, ValueError, TypeError):
        cached = re.search(r"inactive_file (\d+)", (group / "memory.stat").read_text())[1]
        limit, used = (int((group / f"memory.{file}").read_text()) for file in ("max", "current"))
        free = min(free, limit - used + int(cached))
    if needed > free:
        raise RefusalLabError(
            f"{name} needs {needed / 1e9:.1f} GB of memory {what}, and {free / 1e9:.1f} GB are free. Close other "
            "programs and notebooks, or take a smaller model; dtype=torch.bfloat16 halves what loading needs."
        )


def check_report(report: dict[str, Any], name: str, architecture: str) -> None:
    """Every tensor that the model needs was in the files, and no other."""
    if missing := sorted(report["missing_keys"]):
        raise RefusalLabError(
            f"{name}: {len(missing)} tensors are missing from the weights, for example {missing[0]}. "
            "Fetch the files again."
        )
    if unknown := sorted(key for key in report["unexpected_keys"] if not BUFFERS.search(key)):
        if any(re.search(r"scale|zero|quant|qweight|absmax|packed|g_idx", key) for key in unknown):
            remedy = f"They look like scales of quantized weights. {in_full(name)}"
        else:
            remedy = "Take a model whose weights and config.json belong together, with adapters and extra heads merged."
        raise RefusalLabError(
            f"{name}: {len(unknown)} tensors have no place in {architecture}, for example {unknown[0]}. {remedy}"
        )


def _no_weights(folder: Path, name: str, what: str) -> str:
    """Why there is nothing to load: by the files in the folder or, of a hub model, in its repository."""
    names = [path.name for path in folder.iterdir()]
    if not Path(name).is_dir():
        with suppress(Exception):  # without the hub there is nothing more to find out
            names += huggingface_hub.list_repo_files(hub_id(name), revision=folder.name)
    weights = [file for file in names if not file.startswith(("training_args", "optimizer", "scheduler", "rng_state"))]
    endings = {Path(file).suffix for file in weights}
    if ".gguf" in endings:
        return f"{name} has its weights as GGUF: give the path of one .gguf file of it."
    if others := sorted(endings & {".onnx", ".h5", ".msgpack"}):
        return f"{name} has its weights as {others[0]}, for other programs. Take the same model as safetensors."
    if endings & {".bin", ".pt", ".pth"}:
        return (
            f"{name} has only pickled weights, which can run code when read. "
            "Convert them to safetensors, or use a model that ships them."
        )
    return f"{name}: {what}. Give a folder or repository in the format of transformers, with all its files."


def reading_failed(name: str, error: Exception) -> str:
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
        return f"{name} does not fit into memory: take a smaller model, or dtype=torch.bfloat16."
    if "trust_remote_code" in str(error):
        return f"{name} needs code from its repository, which this library never runs. Use another model."
    if "does not recognize this architecture" in str(error):
        return (
            f"{name} cannot be read: transformers {transformers.__version__} does not know its architecture. "
            "Use another model."
        )
    return f"{name} cannot be read ({first_line(error)}). The files may be damaged: fetch them again."


def fetching_failed(name: str, error: Exception) -> str:
    response = getattr(error, "response", None)
    if getattr(response, "status_code", None) == 401 and "authorization" in response.request.headers:
        return (
            f"The hub does not accept your token, so {name} cannot be fetched: it is wrong or has expired. "
            "Log in again with `hf auth login`, or log out with `hf auth logout` (and unset HF_TOKEN)."
        )
    if isinstance(error, GatedRepoError):  # a valid token gets this too, so it comes before the plain 403
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
    return f"{name} cannot be fetched ({first_line(error)}). Check the network and the disk, then try again."


def sha256_of_weights(folder: Path) -> str:
    """The first 12 digits of the SHA-256 of all safetensors in a folder: the name of these weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:12]
