"""Prefilling: the attacker writes the first words of the reply, and the model goes on from there.

Anyone who runs the weights, or uses an interface that lets users start the reply, can do this. Qi et al. 2024 (arXiv
2406.05946): safety tuning acts on the first tokens, so a model that is past them tends to comply.
"""

from __future__ import annotations

from collections.abc import Sequence

from refusallab.attacks.result import AttackResult, send
from refusallab.errors import RefusalLabError
from refusallab.inputs import listed
from refusallab.measure import plain
from refusallab.model import Edit, Model
from refusallab.prompts import Item


def prefilling_attack(
    m: Model, items: Sequence[Item], start: str, *, system: str | None = None, edit: Edit | None = None
) -> list[AttackResult]:
    """Start each reply with `start`, such as "Sure!". It counts as part of the reply when the reply is judged.

    Raises RefusalLabError when `start` is empty or gives an exact answer away.
    """
    if not isinstance(start, str) or not start.strip():
        raise RefusalLabError("There is nothing to prefill: give the first words of the reply.")
    items = listed(items, "items", Item)
    told = next((item for item in items if item.answer and plain(item.answer) in plain(start)), None)
    if told:
        raise RefusalLabError(f"The prefill holds the exact answer of {told.id}, so every reply would be correct.")
    return send(m, "prefilling", items, [item.prompt for item in items], prefill=start, system=system, edit=edit)
