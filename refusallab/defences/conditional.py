"""Conditional activation steering (CAST): refusal is added where a condition on the prompt holds. Lee et al. 2024.

arXiv 2409.05907. The condition reads an early block, the addition acts at a later one of the same forward pass, so it
costs no pass at all. The published method compares the prompt with a condition vector by cosine; here the condition is
a linear probe, which reads the same site with one more degree of freedom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from refusallab.defence import write_replies
from refusallab.errors import RefusalLabError
from refusallab.model import Edit, Model, Prompt, blocks, no_edit


def conditional_addition(w: Tensor, threshold: float, read: int, r: Tensor, act: int) -> Edit:
    """Add r [width] at the input of block `act` to those prompts whose stream scores x . w > threshold at block `read`.

    The stream is read at the last prompt token, which is the last one of a prefill if there is one. r is added at all
    positions of the prompt, prefill included, and to no generated token.
    Raises RefusalLabError unless read < act.
    """
    if not 0 <= read < act:
        raise RefusalLabError(f"The condition is read before the edit acts: block {read} does not come before {act}.")

    def edit(nn: Any) -> None:
        x = blocks(nn)[read].input  # [batch, seq, width]
        if x.shape[1] > 1:  # the prompt; after it comes one token at a time
            fires = (x[:, -1].float() @ w.to(x.device).float() > threshold).float()[:, None, None]
            site = blocks(nn)[act].input
            blocks(nn)[act].input = (site.float() + fires * r.to(x.device).float()).to(site.dtype)

    return edit


@dataclass
class ConditionalSteering:
    """The model with `conditional_addition` built into every forward pass."""

    m: Model
    steer: Edit
    name: str = "conditional steering"
    extra_passes: int = 0

    def replies(self, prompts: Sequence[Prompt], *, edit: Edit | None = None, prefill: str = "") -> list[str]:
        nn = self.m.nn
        with nn.edit() as (tracer, steered):
            for _ in tracer.all():
                self.steer(nn)
        return write_replies(replace(self.m, nn=steered), prompts, edit=edit or no_edit, prefill=prefill)
