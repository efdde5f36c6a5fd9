"""How much is too much? Replies under activation addition of growing strength: refusal, truth and fluency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from refusallab.directions import random_directions
from refusallab.inputs import listed
from refusallab.interventions import addition
from refusallab.judging import SHOWN_TOKENS, judge
from refusallab.measure import Rate, cross_entropy, rate
from refusallab.model import Model, generate
from refusallab.prompts import Item

BATCH_SIZE = 64  # for the loss, which holds all logits of a batch


@dataclass(frozen=True)
class Dose:
    """What a model says at one strength of an edit."""

    coefficient: float
    refused: Rate
    exact: Rate  # replies that hold the exact answer
    loss: float  # how the replies surprise the *untouched* model, mean nats per token


def dose_curve(
    m: Model,
    items: Sequence[Item],
    r: Float[Tensor, " width"],
    layer: int,
    coefficients: Sequence[float],
    *,
    batch_size: int = 512,
) -> list[Dose]:
    """Greedy replies to a prompt set with coefficient * r added at the input of block `layer`, judged, per coefficient.

    The loss reads the finished replies with the untouched model. It measures fluency and nothing else: a fluent reply
    may be wrong. All coefficients run side by side, one row for each prompt and coefficient.
    """
    items, coefficients = listed(items, "items", Item), list(coefficients)
    rows = [(c, item) for c in coefficients for item in items]
    prompts, replies = [item.prompt for _, item in rows], []
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        steps = torch.tensor([c for c, _ in rows[part]])[:, None] * r.float()  # [rows, width]
        replies += generate(
            m, prompts[part], edit=addition(steps, layer), max_new_tokens=SHOWN_TOKENS, batch_size=batch_size
        )
    losses = cross_entropy(m, replies, prompts, batch_size=BATCH_SIZE).tolist()
    doses = []
    for k, coefficient in enumerate(coefficients):
        here = slice(k * len(items), (k + 1) * len(items))
        said = [judge(m, item, text) for text, item in zip(replies[here], items, strict=True)]
        refused, exact = rate([o.refused for o in said]), rate([o.correct for o in said])
        doses.append(Dose(coefficient, refused, exact, sum(losses[here]) / len(items)))
    return doses


def norm_matched(r: Float[Tensor, " width"], count: int, seed: int) -> Float[Tensor, "{count} width"]:
    """Random vectors of the length of r. The control for adding r."""
    return random_directions(r.shape[-1], count, seed) * r.norm()
