"""Training a copy of a model: to attack it with a few replies, or to harden it with any loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refusallab.bars import with_bar
from refusallab.errors import RefusalLabError
from refusallab.inputs import check_count, listed
from refusallab.measure import next_token_loss
from refusallab.model import Edit, Model, Prompt, check_batches, encode_texts, listed_prompts, no_edit, wrap
from refusallab.watch import all_rows


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
    lr: float = 1e-4,
    batch_size: int = 8,
    seed: int = 0,
) -> FineTuned:
    """Train a copy of m to give these replies, with AdamW on all weights. m itself stays as it is.

    Every step takes the next `batch_size` pairs of a shuffled list, which is shuffled again when it is used up. The
    loss counts only the reply and its end.
    """
    prompts, replies = listed_prompts(prompts), listed(replies, "replies", str)
    if len(prompts) == 0 or len(prompts) != len(replies):
        raise RefusalLabError(f"{len(prompts)} prompts and {len(replies)} replies: give one reply for each prompt.")
    queue, read = shuffled(len(prompts), batch_size, seed), []

    def loss(copied: Model) -> Tensor:
        rows = next(queue)
        pairs = [prompts[i] for i in rows], [replies[i] for i in rows]
        read.append(int(encode_texts(m, pairs[1], pairs[0])[0]["attention_mask"].sum()))
        return reply_loss(copied, *pairs)

    losses = []
    edited = train_copy(m, loss, steps=steps, lr=lr, name=f"{m.name} (fine-tuned)", report=losses.append)
    return FineTuned(edited, tuple(losses), sum(read))


def train_copy(
    m: Model,
    loss: Callable[[Model], Tensor],
    *,
    steps: int,
    lr: float,
    name: str,
    decay: bool = False,
    report: Callable[[float], None] = lambda loss: None,
) -> Model:
    """A copy of m after some steps of AdamW on all weights. m itself stays as it is.

    `loss(copied)` is called once a step with the copy, whose weights take gradients, and returns a scalar. With `decay`
    the learning rate falls linearly: step i of n, counted from 0, has lr * (1 - 0.98 i / n). `report` is called with
    the loss before each step.

    Weights in half precision are trained in float32 and rounded once, at the end: most of a small step would be lost
    in bfloat16, and float16 would overflow. Raises RefusalLabError for a loss that is not finite.
    """
    if m.remote is True:
        raise RefusalLabError("A remote model has no weights here: load it locally to train it.")
    check_count(steps, what="number of steps")
    half = m.hf.dtype.itemsize < 4
    copied = copy.deepcopy(m.hf)
    copied = wrap(copied.float() if half else copied, m.tokenizer, name, m.commit, remote=m.remote)
    copied.hf.requires_grad_(True)
    optimizer = torch.optim.AdamW(copied.hf.parameters(), lr=lr, weight_decay=0.0)
    for step in with_bar(range(steps), "training", steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - 0.98 * step / steps) if decay else lr
        value = loss(copied)
        if not math.isfinite(number := value.item()):
            raise RefusalLabError(
                f"The loss before step {step} is {number}: train with a smaller lr than {lr}, or with other replies."
            )
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        report(number)
    copied.hf.requires_grad_(False)
    copied.hf.zero_grad()
    if not half:
        return copied
    rounded = copy.deepcopy(m.hf)
    rounded.load_state_dict(copied.hf.state_dict())  # each weight takes the type that it had
    return wrap(rounded, m.tokenizer, name, m.commit, remote=m.remote)


def reply_loss(m: Model, prompts: Sequence[Prompt], replies: Sequence[str], edit: Edit = no_edit) -> Tensor:
    """Cross-entropy of the replies and their ends, in nats per token, mean over the prompts: a scalar with its graph.

    `edit` acts on the forward pass, and the gradient flows through it.
    """
    batch, counted = encode_texts(m, replies, prompts)
    kept = counted.shape[1] - int(counted.any(0).float().argmax()) + 1  # from before the first token that counts
    nn = m.nn
    with all_rows(), nn.trace(**batch, logits_to_keep=kept, use_cache=False, remote=m.remote):
        edit(nn)
        logits = nn.output.logits.save()  # [batch, kept, vocab]
    return next_token_loss(logits, batch["input_ids"][:, -kept:], counted[:, -kept:]).mean()


def shuffled(count: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Batches of the numbers 0 to count - 1 without end, in an order that is drawn again when it is used up."""
    check_batches(count, batch_size)
    generator, queue = torch.Generator().manual_seed(seed), []
    while True:
        while len(queue) < min(batch_size, count):
            queue += torch.randperm(count, generator=generator).tolist()
        rows, queue = queue[:batch_size], queue[batch_size:]
        yield rows
