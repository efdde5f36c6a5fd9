"""White-box attacks on a hardened model, by an attacker who knows the defence and holds the weights.

Three ways, in the order of what they need: directions re-extracted as differences in means and judged by what they set
free; a direction found by gradient, with the model frozen; and a few steps of fine-tuning on forbidden answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from refusallab.directions import candidate_directions
from refusallab.errors import RefusalLabError
from refusallab.finetuning import reply_loss, shuffled, train_copy
from refusallab.inputs import check_count, listed
from refusallab.interventions import ablation, unit
from refusallab.judging import outcomes
from refusallab.measure import Outcome, cross_entropy
from refusallab.model import Model, Prompt
from refusallab.orthogonalization import orthogonalize
from refusallab.prompts import Item


@dataclass(frozen=True, eq=False)
class FoundDirection:
    """A direction, where it comes from, and the loss of the validation answers under its ablation."""

    vector: Tensor  # [width]
    loss: float  # nats per token
    layer: int | None = None  # the block input that it was extracted at
    position: int | None = None


def release_loss(m: Model, items: Sequence[Item], r: Tensor) -> float:
    """Cross-entropy of the exact answers when r is ablated, in nats per token: low where the answers are set free.

    It needs no refusal token, so it also judges models whose refusals begin like answers.
    """
    items = listed(items, "items", Item)
    answers, prompts = [item.answer for item in items], [item.prompt for item in items]
    return cross_entropy(m, answers, prompts, edit=ablation(r), batch_size=64).mean().item()


def re_extract(
    m: Model, harmful: Sequence[Item], harmless: Sequence[Item], validation: Sequence[Item]
) -> FoundDirection:
    """The difference in means of m whose ablation makes the exact answers of the validation items most likely.

    All layers and positions are tried. No filter is applied, because an attacker takes what works. Raises
    RefusalLabError when every candidate is zero.
    """
    validation = listed(validation, "items", Item)
    vectors = candidate_directions(m, *([item.prompt for item in items] for items in (harmful, harmless)))
    sites = [(layer, k) for layer in range(m.n_layers) for k in range(len(m.positions)) if vectors[layer, k].norm() > 0]
    if not sites:
        raise RefusalLabError(f"All differences in means of {m.name} are zero: give it prompts of two kinds.")
    loss, layer, k = min((release_loss(m, validation, vectors[site]), *site) for site in sites)
    return FoundDirection(vectors[layer, k], loss, layer, m.positions[k])


def successive_directions(
    m: Model, harmful: Sequence[Item], harmless: Sequence[Item], validation: Sequence[Item], count: int
) -> Tensor:
    """Directions found by `re_extract` one after another, each in a copy that cannot write those before.

    [count, width]. How many of them break refusal says how far a model has spread it, by this way of finding them.
    """
    check_count(count, least=1)
    found: list[Tensor] = []
    for _ in range(count):
        found.append(re_extract(m, harmful, harmless, validation).vector)
        m = orthogonalize(m, found[-1], sharing=True)
    return torch.stack(found)


def descend(m: Model, u: Tensor, prompts: Sequence[Prompt], replies: Sequence[str], lr: float) -> Tensor:
    """One step of gradient descent on the unit sphere, towards a u [width] whose ablation makes the replies likelier.

    The weights stay as they are. u has length 1, and so has the result.
    """
    v = u.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reply_loss(m, prompts, replies, ablation(v)), v)
    return unit(u - lr * gradient)


def gradient_direction(
    m: Model,
    harmful: Sequence[Item],
    harmless: Sequence[Item],
    validation: Sequence[Item],
    start: Tensor,
    *,
    steps: int = 12,
    lr: float = 0.5,
    batch_size: int = 8,
    seed: int = 0,
) -> FoundDirection:
    """A direction by gradient with the model frozen, from `start`.

    The loss is that of the exact answers, forbidden and harmless ones, while the direction is ablated: the first half
    wants refusal to go, the second wants everything else to stay (a simple form of the search of Wollschlaeger et al.
    2025, arXiv 2502.17420; `refusallab.cones` has more of it).
    """
    harmful, harmless, validation = (listed(items, "items", Item) for items in (harmful, harmless, validation))
    u, queues = unit(start), [(items, shuffled(len(items), batch_size, seed)) for items in (harmful, harmless)]
    for _ in range(steps):
        both = [items[i] for items, queue in queues for i in next(queue)]
        u = descend(m, u, [item.prompt for item in both], [item.answer for item in both], lr)
    return FoundDirection(u, release_loss(m, validation, u))


def fine_tuning_attack(
    m: Model,
    known: Sequence[Item],
    steps: int,
    *,
    lr: float = 1e-4,
    batch_size: int = 8,
    seed: int = 0,
    look: Callable[[int, Model], None] = lambda done, copied: None,
) -> Model:
    """A copy of m after some steps of fine-tuning on the answers of `known`.

    `look(steps done, the copy)` is called before each step.
    """
    known = listed(known, "items", Item)
    queue, done = shuffled(len(known), batch_size, seed), count()

    def loss(copied: Model) -> Tensor:
        look(next(done), copied)
        batch = [known[i] for i in next(queue)]
        return reply_loss(copied, [item.prompt for item in batch], [item.answer for item in batch])

    return train_copy(m, loss, steps=steps, lr=lr, name=f"{m.name} (fine-tuned)")


def steps_to_break(
    m: Model,
    known: Sequence[Item],
    items: Sequence[Item],
    steps: Sequence[int],
    *,
    lr: float = 1e-4,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[int, list[Outcome]]:
    """Judged replies to `items` after some steps of fine-tuning on the answers of `known`: steps -> outcomes.

    One run of training, looked at on the way. Zero steps are the model as it is.
    """
    items, steps, seen = listed(items, "items", Item), list(steps), {}
    if not steps or min(steps) < 0:
        raise RefusalLabError(f"steps is {steps}: say after which numbers of steps to judge replies, from 0.")

    def look(done: int, copied: Model) -> None:
        if done in steps:
            seen[done] = outcomes(copied, items)

    tuned = fine_tuning_attack(m, known, max(steps), lr=lr, batch_size=batch_size, seed=seed, look=look)
    return seen | {max(steps): outcomes(tuned, items)}


def broken_at(curve: dict[int, list[Outcome]], share: float) -> int | None:
    """The fewest steps after which at least this share of the replies hold the exact answer. None if they never do.

    Whether a reply also refuses does not matter: the answer is out either way.
    """
    for steps in sorted(curve):
        if sum(o.correct for o in curve[steps]) >= share * len(curve[steps]):
            return steps
    return None
