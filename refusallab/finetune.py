"""Fine-tuning a copy of a model on a few replies. As an attack, it trains refusal away."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from refusallab.errors import RefusalLabError
from refusallab.measure import next_token_loss
from refusallab.model import Model, Prompt, encode_texts, wrap


@dataclass(frozen=True, eq=False)
class FineTuned:
    """A fine-tuned copy and what went into it."""

    model: Model
    losses: tuple[float, ...]  # before each step, in nats per token of a reply
    tokens: int  # read during training, padding not counted


def finetune(
    m: Model,
    prompts: Sequence[Prompt],
    replies: Sequence[str],
    *,
    steps: int = 10,
    rate: float = 1e-4,
    batch_size: int = 8,
    seed: int = 0,
) -> FineTuned:
    """Train a copy of m to give these replies, with AdamW on all weights. m itself stays as it is.

    Every step takes the next `batch_size` pairs of a shuffled list, which is shuffled anew when it is used up; the loss
    is that of the reply and its end alone.
    """
    if m.remote is True:
        raise RefusalLabError("A remote model has no weights here: load it locally to fine-tune it.")
    if len(prompts) == 0 or len(prompts) != len(replies):
        raise RefusalLabError(f"{len(prompts)} prompts and {len(replies)} replies: give one reply for each prompt.")
    generator, queue, losses, tokens = torch.Generator().manual_seed(seed), [], [], 0
    hf = copy.deepcopy(m.hf).requires_grad_(True)
    optimizer = torch.optim.AdamW(hf.parameters(), lr=rate, weight_decay=0.0)
    for _ in range(steps):
        while len(queue) < min(batch_size, len(prompts)):
            queue += torch.randperm(len(prompts), generator=generator).tolist()
        rows, queue = queue[:batch_size], queue[batch_size:]
        batch, counted = encode_texts(m, [replies[i] for i in rows], [prompts[i] for i in rows])
        position_ids = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits = hf(**batch, position_ids=position_ids, use_cache=False).logits  # [batch, seq, vocab]
        loss = next_token_loss(logits, batch["input_ids"], counted).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        tokens += int(batch["attention_mask"].sum())
    edited = wrap(hf, m.tokenizer, f"{m.name} (fine-tuned)", m.commit, remote=m.remote)
    return FineTuned(edited, tuple(losses), tokens)
