"""The model catalogue: what is bundled here and which open models the labs know."""

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Entry:
    """One line of catalog.toml. Bundled models have a role, hub models an id.

    An adapted model has a role, and the alias of the hub model that is its base: only the adapter is bundled, with a
    SHA-256.

    A hub model with a `file` is that GGUF file of the repository, at a revision and with a SHA-256. Wheels of the
    package index hold it too: `wheel` is a requirement with {} for the number of each of the `parts`.
    """

    name: str
    kind: str  # "bundled", "adapted" or "hub"
    role: str = ""
    architecture: str = ""
    seed: int | None = None
    thoughts: str = ""  # of a thinking model: see recipe.Variant
    talks: str = ""  # of a model for conversations: see recipe.Variant
    wide: bool = False  # see recipe.Variant
    base: str = ""
    world: str = ""  # one of facts.WORLDS
    id: str = ""
    parameters: str = ""
    license: str = ""
    gated: bool = False
    memory_gb: float = 0.0  # weights in fp32
    dtype: str = ""
    quirks: str = ""
    file: str = ""
    revision: str = ""
    bytes: int = 0
    sha256: str = ""
    precision: str = ""
    wheel: str = ""
    parts: int = 0


@cache
def catalog() -> dict[str, Entry]:
    """Every known model by name (bundled, adapted) or alias (hub), in the order of catalog.toml."""
    tables = tomllib.loads((HERE / "catalog.toml").read_text(encoding="utf-8"))
    return {
        name: Entry(name=name, kind=kind, **fields)
        for kind in ("bundled", "adapted", "hub")
        for name, fields in tables[kind].items()
    }


def weights_dir(name: str) -> Path:
    """The folder of a bundled model: config, safetensors, tokenizer; or of an adapter."""
    return HERE / "weights" / name
