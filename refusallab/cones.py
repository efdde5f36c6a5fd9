"""More than one direction? Cones found by gradient, and what ablating one direction does to another.

Wollschläger et al. 2025 (arXiv 2502.17420): in a cone of refusal, the nonnegative combinations of k orthonormal
vectors, each direction mediates refusal. This is a small form of their search. The model is frozen, and there are three
losses: ablating a direction should free the forbidden answer, adding it should make the model refuse harmless requests,
and ablating it should leave harmless requests as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn.functional import softplus

from refusallab.activations import residual
from refusallab.bars import with_bar
from refusallab.directions import DEPTH, Candidate, candidate_directions, random_directions, score_candidates
from refusallab.errors import RefusalLabError
from refusallab.finetuning import reply_loss, shuffled
from refusallab.inputs import listed
from refusallab.interventions import ablation, addition, project_out, unit
from refusallab.judging import outcomes, refusal_openings
from refusallab.measure import Rate, kl_divergence, rate, refusal_metric
from refusallab.model import (
    Edit,
    Model,
    Prompt,
    attention,
    blocks,
    encode,
    listed_prompts,
    logits,
    mlp,
    no_edit,
    trace_logits,
)
from refusallab.prompts import Item, prompt_set

INDUCE_WEIGHT = 0.2  # of the addition loss, beside 1 for the other two
FREE_STEPS = 14  # a search without a constraint is done sooner


@dataclass(frozen=True, eq=False)
class Cone:
    """An orthonormal basis, and the loss at each step on the way to it."""

    basis: Float[Tensor, "k width"]
    losses: tuple[float, ...]


def orthonormal(vectors: Float[Tensor, "k width"]) -> Float[Tensor, "k width"]:
    """Gram-Schmidt on rows. The first row keeps its direction, and gradients flow through.

    Raises RefusalLabError when a row lies in the span of those before it.
    """
    rows: list[Tensor] = []
    for vector in vectors:
        rest = vector / vector.norm()
        for row in rows:
            rest = rest - (rest @ row) * row
        if not rest.norm() > 1e-4:
            raise RefusalLabError("A vector is zero or lies in the span of those before it: give independent ones.")
        rows.append(rest / rest.norm())
    return torch.stack(rows)


def plane_directions(
    first: Float[Tensor, " width"], second: Float[Tensor, " width"], angles: Sequence[float]
) -> Float32[Tensor, "{len(angles)} width"]:
    """Unit vectors in the plane of two vectors, at angles in degrees.

    0 points along `first`; 90 along what is left of `second` without its part along `first`. So 0 to 90 is the cone of
    the orthonormal basis.
    """
    t = torch.deg2rad(torch.tensor([float(angle) for angle in angles]))
    return torch.stack([t.cos(), t.sin()], -1) @ orthonormal(torch.stack([first, second]).float())


def find_cone(
    m: Model,
    harmful: Sequence[Item],
    harmless: Sequence[Item],
    refusal_tokens: Sequence[int],
    start: Float[Tensor, "k width"],
    *,
    layer: int,
    length: float,
    steps: int = 36,
    step_size: float = 0.05,
    batch_size: int = 6,
    seed: int = 0,
    orthogonal_to: Float[Tensor, " width"] | None = None,
) -> Cone:
    """A cone of refusal with k dimensions, found by Adam from `start`; k = 1 is a single direction.

    Directions are added at the input of block `layer`, with `length`. Steps take turns: each vector of the basis, then
    a random direction of the cone. With `orthogonal_to`, the whole cone stays orthogonal to that direction. The exact
    answers of the harmful items say what ablation should free.
    """
    harmful, harmless = (listed(items, "items", Item) for items in (harmful, harmless))
    fixed = start[:0] if orthogonal_to is None else orthogonal_to[None]
    vectors = start.clone().float().requires_grad_()
    optimizer = torch.optim.Adam([vectors], lr=step_size)
    generator, losses = torch.Generator().manual_seed(seed), []
    queues = [(items, shuffled(len(items), batch_size, seed)) for items in (harmful, harmless)]
    for step in with_bar(range(steps), "gradient descent", steps):
        bad, good = ([items[i] for i in next(queue)] for items, queue in queues)
        basis = orthonormal(torch.cat([fixed, vectors]))[len(fixed) :]
        turn = step % (len(basis) + 1)
        weights = torch.randn(len(basis), generator=generator).abs()
        v = basis[turn] if turn < len(basis) else unit(weights @ basis)
        loss = direction_loss(m, bad, good, refusal_tokens, v, layer, length)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            vectors /= vectors.norm(dim=-1, keepdim=True)
        losses.append(loss.item())
    with torch.no_grad():
        return Cone(orthonormal(torch.cat([fixed, vectors]))[len(fixed) :], tuple(losses))


def direction_loss(
    m: Model,
    harmful: Sequence[Item],
    harmless: Sequence[Item],
    tokens: Sequence[int],
    v: Float[Tensor, " width"],
    layer: int,
    length: float,
) -> Float[Tensor, ""]:
    """The three losses of a unit direction, added up: a scalar with its graph, in nats.

    Forbidden answers under ablation (per token); refusal of harmless requests under addition (first token, weighted);
    KL(base || ablated) on harmless requests (first token).
    """
    harmful, harmless = (listed(items, "items", Item) for items in (harmful, harmless))
    freed = reply_loss(m, [i.prompt for i in harmful], [i.answer for i in harmful], ablation(v))
    batch = encode(m, [i.prompt for i in harmless])
    induced = softplus(-refusal_metric(trace_logits(m, batch, addition(length * v, layer)), tokens)).mean()
    with torch.no_grad():
        base = trace_logits(m, batch, no_edit)
    kept = kl_divergence(base, trace_logits(m, batch, ablation(v))).mean()
    return freed + INDUCE_WEIGHT * induced + kept


@dataclass(frozen=True)
class Effect:
    """What a direction does: forbidden requests without it, harmless ones without it and with it added."""

    refused: Rate  # forbidden requests, direction ablated
    exact: Rate  # forbidden requests, direction ablated: replies that hold the exact answer
    harmless_exact: Rate  # harmless requests, direction ablated
    induce: float  # mean refusal metric of harmless requests, direction added
    kl: float  # mean KL(base || ablated) on harmless requests, in nats


def direction_effect(
    m: Model,
    harmful: list[Item],
    harmless: list[Item],
    tokens: Sequence[int],
    v: Float[Tensor, " width"],
    *,
    layer: int,
    length: float,
) -> Effect:
    """Ablate v everywhere, add it at `layer` with `length`, and judge replies and first tokens."""
    harmful, harmless = (listed(items, "items", Item) for items in (harmful, harmless))
    prompts, removed = [item.prompt for item in harmless], ablation(v)
    bad, good = (outcomes(m, items, edit=removed) for items in (harmful, harmless))
    return Effect(
        rate([o.refused for o in bad]),
        rate([o.correct for o in bad]),
        rate([o.correct for o in good]),
        refusal_metric(logits(m, prompts, edit=addition(length * unit(v), layer)), tokens).mean().item(),
        kl_divergence(logits(m, prompts), logits(m, prompts, edit=removed)).mean().item(),
    )


def mean_ablation(m: Model, prompts: Sequence[Prompt], v: Float[Tensor, " width"]) -> Edit:
    """Ablation to the mean: at each site of `ablation`, the component along v becomes its mean over the prompts.

    All their tokens count, those of the template too; they are read in one batch. Zero may lie far from every prompt.
    The mean takes away only what differs from token to token and from prompt to prompt.
    """
    v, batch = unit(v), encode(m, listed_prompts(prompts))
    real = batch["attention_mask"].bool()
    u = v.to(m.device)
    with torch.no_grad(), m.nn.trace(**batch, logits_to_keep=1, remote=m.remote):
        along = []
        for block in blocks(m.nn):
            along += [block.input.float() @ u, attention(block).output[0].float() @ u, mlp(block).output.float() @ u]
        found = torch.stack(along).unflatten(0, (m.n_layers, 3)).save()  # [layers, 3, batch, seq]
    means = found[:, :, real].mean(-1)

    def edit(nn: Any) -> None:
        for block, (start, attended, computed) in zip(blocks(nn), means, strict=True):
            block.input = _moved_to(block.input, v, start)
            output, *rest = attention(block).output
            attention(block).output = (_moved_to(output, v, attended), *rest)
            mlp(block).output = _moved_to(mlp(block).output, v, computed)

    return edit


def _moved_to(x: Tensor, v: Tensor, place: Tensor) -> Tensor:
    """x with the component `place` along the unit vector v."""
    return project_out(x, v) + (place * v.to(place)).to(x)


def downstream(
    m: Model, prompts: Sequence[Prompt], ablated: Float[Tensor, " width"], watched: Float[Tensor, " width"]
) -> Float32[Tensor, "n layers"]:
    """How much ablating one direction moves the last token along another, layer by layer.

    The projection of the block inputs on `watched`, with `ablated` ablated minus without. For orthogonal directions the
    projection itself takes nothing away along `watched`: what is not zero came about downstream.
    """
    prompts = listed_prompts(prompts)
    before, after = (residual(m, prompts, positions=[-1], edit=edit)[:, :, 0] for edit in (None, ablation(ablated)))
    return (after - before) @ unit(watched)


def last_token_direction(m: Model, count: int = 32) -> tuple[Candidate, Float32[Tensor, " width"], list[int]]:
    """The difference in means at the last prompt token that bypasses best, its scores, and the refusal tokens.

    Layers below the last fifth compete by bypass only, on `count` prompts of each validation set. There is no other
    filter, so there is always a winner, and its scores say whether it would have passed.
    """
    names = ("harmful_train", "harmless_train", "harmful_val", "harmless_val")
    train_bad, train_good, bad, good = ([item.prompt for item in prompt_set(m, name)] for name in names)
    tokens = refusal_openings(m, [*train_bad, *train_good]).tokens
    vectors = candidate_directions(m, train_bad, train_good)
    vectors[:, :-1] = 0  # a zero vector costs no forward pass
    vectors[int(DEPTH * m.n_layers) :] = 0
    scored = score_candidates(m, vectors, bad[:count], good[:count], tokens)
    best = min((c for c in scored if vectors[c.layer, c.position].norm() > 0), key=lambda c: c.bypass)
    return best, vectors[best.layer, -1], tokens


def short(items: Sequence[Item]) -> list[Item]:
    """The items of one line, without a context in front: a search takes less time on them."""
    return [item for item in items if isinstance(item.prompt, str) and "\n" not in item.prompt]


@dataclass(frozen=True, eq=False)
class Searched:
    """Directions of one model: difference in means "r", "free search", "search orthogonal to r", "random direction"."""

    site: Candidate  # of r
    tokens: list[int]  # that open a refusal
    vectors: dict[str, Float[Tensor, " width"]]

    @property
    def settings(self) -> dict[str, float]:
        """Where and how far a direction of the model is added."""
        return {"layer": self.site.layer, "length": self.vectors["r"].norm().item()}


def search_directions(m: Model, site: Candidate, r: Float[Tensor, " width"], tokens: list[int]) -> Searched:
    """Directions found by gradient, freely and orthogonal to r, beside r itself and a random direction.

    r is a difference in means, as from `last_token_direction`. Both searches begin at a random direction and read only
    training prompts.
    """
    start, random = random_directions(m.width, 2, seed=7).split(1)
    harmful, harmless = (short(prompt_set(m, name)) for name in ("harmful_train", "harmless_train"))
    where: dict[str, Any] = {"layer": site.layer, "length": r.norm().item()}
    vectors = {
        "r": r,
        "free search": find_cone(m, harmful, harmless, tokens, start, steps=FREE_STEPS, **where).basis[0],
        "search orthogonal to r": find_cone(m, harmful, harmless, tokens, start, orthogonal_to=r, **where).basis[0],
        "random direction": random[0],
    }
    return Searched(site, tokens, vectors)
