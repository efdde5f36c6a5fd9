"""Plain data as JSON text: what crosses the wall of the sandbox, both ways.

Numbers, texts, lists, tuples, dicts and tensors (as raw bytes with type and shape) pass, and NumPy's scalars as what
they hold. Anything else arrives as `Foreign`, which can be named in a message and equals nothing. Decoding builds only
such values: it runs no code and reads no file, and its cost is bounded by the length of the text.
"""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refusallab.errors import RefusalLabError

MIME = "application/vnd.refusallab.observed"  # of a text that a kernel shows to whoever asked for it
LARGEST = 16 << 20  # bytes of such a text

TYPES = {"float32", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"}
DEPTH = 50
UNSTORABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def storable(text: str) -> str:
    """A text that any file, database and terminal takes: escapes (`\\x1b`, `\\udcff`) stand for lone surrogates and
    control characters, but for tabs and ends of lines."""
    return UNSTORABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class Foreign:
    """Something that is not plain data. Only the name of its type and a short description are kept."""

    def __init__(self, description: str):
        self.description = description

    def __repr__(self) -> str:
        return self.description


def to_json(value: Any) -> str:
    """The JSON text of a value."""
    return json.dumps(_pack(value, DEPTH))


def _pack(value: Any, depth: int) -> Any:
    if depth == 0:
        raise RefusalLabError(f"The data is nested more than {DEPTH} deep.")
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Tensor):
        return _pack_tensor(value)
    if isinstance(value, list):
        return [_pack(item, depth - 1) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_pack(item, depth - 1) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_pack(key, depth - 1), _pack(item, depth - 1)] for key, item in value.items()]}
    return {"foreign": [type(value).__name__, repr(value)[:200]]}


def _pack_tensor(value: Tensor) -> dict[str, Any]:
    value = value.detach().cpu()
    if value.dtype in (torch.float16, torch.bfloat16):
        value = value.float()
    array = value.numpy()
    if array.dtype.name not in TYPES:
        return {"foreign": [f"tensor of {value.dtype}", "..."]}
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"tensor": [array.dtype.name, list(array.shape), data]}


def from_json(text: str) -> Any:
    """The value of a JSON text. ValueError if it is not one that `to_json` could have written."""
    try:
        return _unpack(json.loads(text), 2 * DEPTH)
    except (TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"not plain data: {error}") from error


def _unpack(packed: Any, depth: int) -> Any:
    if depth == 0:
        raise ValueError("nested too deep")
    if isinstance(packed, list):
        return [_unpack(item, depth - 1) for item in packed]
    if not isinstance(packed, dict):
        return packed
    if len(packed) != 1:
        raise ValueError("an object with one key was expected")
    [(kind, body)] = packed.items()
    match kind:
        case "tuple":
            return tuple(_unpack(item, depth - 1) for item in body)
        case "dict":
            return {_unpack(key, depth - 1): _unpack(item, depth - 1) for key, item in body}
        case "tensor":
            return _unpack_tensor(*body)
        case "foreign":
            name, description = body
            kind = "".join(c for c in str(name)[:40] if c.isalnum() or c in "_ .") or "thing"
            return type(kind, (Foreign,), {})(str(description)[:200])
    raise ValueError(f"unknown kind {str(kind)[:40]!r}")


def _unpack_tensor(dtype: str, shape: list[int], data: str) -> Tensor:
    if dtype not in TYPES or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("not a tensor")
    array = np.frombuffer(base64.b64decode(data, validate=True), dtype=dtype)
    return torch.from_numpy(array.reshape(shape).copy())
