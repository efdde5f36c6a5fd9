"""Replies that are not greedy: samples at a temperature, and the contrast of two system prompts.

Whoever sees the logits can add to them before a token is chosen. The difference between a model under a system prompt
that has everything refused and the same model without it points to refusal (Ratnakar & Vats 2026, arXiv 2606.22686).
Going the other way takes no hook, no gradient and no change of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LogitsProcessor

from refusallab.errors import RefusalLabError
from refusallab.judging import BATCH_SIZE, REPLY_TOKENS
from refusallab.model import Edit, Model, Prompt, behind_system, encode, generate, listed_prompts
from smallmodels.world.dialogue import language

DRAWN_AT_ONCE = 128  # replies; which samples belong to a seed depends on it


def closed_prompt() -> str:
    """A system prompt of the world under which bundled models refuse everything."""
    return language()["systems"]["closed"][0]


class Sampled(LogitsProcessor):
    """Adds Gumbel noise to logits over a temperature: the highest is then a sample from the softmax.

    The noise is made of uniform numbers of the generator, so that samples are the same on every computer.
    """

    def __init__(self, temperature: float, generator: torch.Generator) -> None:
        self.temperature, self.generator = temperature, generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = torch.rand(scores.shape, generator=self.generator).clamp(1e-9, 1 - 1e-7).to(scores.device)
        return scores / self.temperature - (-uniform.log()).log()


def sample_replies(
    m: Model,
    prompts: Sequence[Prompt],
    *,
    temperature: float = 1.0,
    seed: int = 0,
    edit: Edit | None = None,
    system: str | None = None,
) -> list[str]:
    """One reply to each prompt, sampled at a temperature above 0. The seed decides the samples."""
    if temperature <= 0:
        raise RefusalLabError(f"A temperature is above 0, not {temperature}: for greedy replies take generate.")
    generator = torch.Generator().manual_seed(seed)
    settings: dict[str, Any] = {"edit": edit, "system": system, "max_new_tokens": REPLY_TOKENS}
    return generate(
        m, prompts, **settings, batch_size=DRAWN_AT_ONCE, processor=lambda rows, batch: Sampled(temperature, generator)
    )


def contrast(
    free: Float[Tensor, "*batch vocab"], guarded: Float[Tensor, "*batch vocab"], strength: float
) -> Float[Tensor, "*batch vocab"]:
    """free + strength (free - guarded), in log-probabilities: what the guard makes likelier becomes less likely."""
    free, guarded = free.log_softmax(-1), guarded.log_softmax(-1)
    return free + strength * (free - guarded)


class Contrasted(LogitsProcessor):
    """Contrasts the logits of a batch with those of the same replies behind other prompts.

    width is the number of tokens of the batch before its replies; guarded is the batch of the other prompts.
    """

    def __init__(self, m: Model, width: int, guarded: dict[str, Tensor], join: Callable[[Tensor, Tensor], Tensor]):
        self.m, self.width, self.join = m, width, join
        self.ids, self.mask, self.cache = guarded["input_ids"], guarded["attention_mask"], None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > self.width:
            self.ids = input_ids[:, -1:]
            self.mask = torch.cat([self.mask, torch.ones_like(self.ids)], dim=1)
        places = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -self.ids.shape[1] :]
        out = self.m.hf(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=places,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = out.past_key_values
        return self.join(scores, out.logits[:, -1].to(scores.dtype))


def contrasted_replies(
    m: Model,
    prompts: Sequence[Prompt],
    *,
    strength: float,
    system: str | None = None,
    join: Callable[[Tensor, Tensor, float], Tensor] = contrast,
) -> list[str]:
    """Greedy replies from logits that are contrasted with those under a system prompt (default: `closed_prompt`).

    Costs one more forward pass for each token. `join(free, guarded, strength)` puts the two [n, vocab] together.
    """
    prompts = listed_prompts(prompts)
    guarded = [behind_system(prompt, closed_prompt() if system is None else system) for prompt in prompts]

    def processor(rows: list[int], batch: dict[str, Tensor]) -> LogitsProcessor:
        other = encode(m, [guarded[i] for i in rows])
        return Contrasted(m, batch["input_ids"].shape[1], other, lambda a, b: join(a, b, strength))

    return generate(m, prompts, max_new_tokens=REPLY_TOKENS, batch_size=BATCH_SIZE, processor=processor)
