"""What the exercises share: the model on which answers are tried, and prompts for it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from refusallab.model import Model, load
from refusallab.prompts import bundled
from refusallab.thoughts import with_thinking


@cache
def chat_model() -> Model:
    """The model on which answers are tried."""
    return load("charter-chat")


@cache
def thinking_model(tokens: int) -> Model:
    """The model on which answers about thoughts are tried. `tokens`: how many a thought may take."""
    return with_thinking(load("charter-think"), tokens)


def prompts(name: str, seed: int, count: int) -> list[str]:
    """Some prompts of a bundled set, another choice for every seed."""
    items = bundled(name)
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    return [items[i].prompt for i in order[:count]]


def on_chat_model(function: Any, inputs: dict[str, Any]) -> Any:
    """Observation of a function whose first argument is the model."""
    return function(chat_model(), **inputs)
