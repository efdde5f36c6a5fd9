"""Lab 07, why attacks work, and is it one direction? Cosines, heads, attention, planes and what happens downstream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from refusallab.activations import residual
from refusallab.attribution import attribute, cosine_trace, mass
from refusallab.cones import downstream, plane_directions
from refusallab.course.exercise import Case, Mistake, define
from refusallab.course.exercises.common import chat_model, on_chat_model, prompts
from refusallab.directions import random_directions
from refusallab.errors import RefusalLabError
from refusallab.interventions import ablation, project_out, unit
from refusallab.model import Model, attention_writes, blocks, encode

# --- 7.1 -----------------------------------------------------------------------------------------------------------


def _prompts_and_direction(seed: int) -> list[Case]:
    r = random_directions(chat_model().width, 2, seed=700 + seed)
    return [
        Case("3 harmful prompts, a direction of length 3", {"prompts": prompts("harmful_val", seed, 3), "r": 3 * r[0]}),
        Case(
            "2 harmless prompts, a direction of length 8", {"prompts": prompts("harmless_val", seed, 2), "r": 8 * r[1]}
        ),
    ]


def _cosines_of(position: int) -> Any:
    def trace(m: Model, prompts: list[str], r: Tensor) -> Tensor:
        return cosine_similarity(residual(m, prompts, positions=[position])[:, :, 0], r, dim=-1)

    return trace


def _last(m: Model, prompts: list[str]) -> Tensor:
    return residual(m, prompts, positions=[-1])[:, :, 0]


COSINE = define(
    "7.1",
    reference=cosine_trace,
    observe=on_chat_model,
    cases=_prompts_and_direction,
    mistakes=(
        Mistake(
            "projection",
            lambda m, prompts, r: _last(m, prompts) @ unit(r),
            "This is the projection, a length in units of the stream. Divide by the length of the stream as well.",
        ),
        Mistake(
            "dot product",
            lambda m, prompts, r: _last(m, prompts) @ r,
            "This is the dot product: it grows with the length of the stream and of r. Divide by both.",
        ),
        Mistake(
            "only the stream normalized",
            lambda m, prompts, r: cosine_similarity(_last(m, prompts), r, dim=-1) * r.norm(),
            "The result grows with the length of r. Divide by that too.",
        ),
        Mistake(
            "first post-instruction position",
            _cosines_of(-5),
            "This is another token: positions=[-1] is the last one of the prompt.",
        ),
        Mistake(
            "mean over prompts",
            lambda m, prompts, r: cosine_trace(m, prompts, r).mean(0),
            "Keep one row for each prompt: the shape is [n, layers].",
        ),
        Mistake(
            "layers first",
            lambda m, prompts, r: cosine_trace(m, prompts, r).T,
            "Rows and columns are swapped: one row for each prompt.",
        ),
    ),
    hints=(
        "`residual(m, prompts, positions=[-1])` is the last token's stream at every block input. What is its shape?",
        "It is `[n, layers, 1, width]`. Take the only position, then x . r / (|x| |r|), over the last dimension.",
        "`torch.nn.functional.cosine_similarity(x[:, :, 0], r, dim=-1)`.",
    ),
)

# --- 7.2 -----------------------------------------------------------------------------------------------------------


def _heads(m: Model, prompts: Sequence[str], r: Tensor) -> Tensor:
    return attribute(m, prompts, r).heads


@torch.no_grad()
def _heads_from(m: Model, prompts: list[str], r: Tensor, parts: Any, *, position: int = -1) -> Tensor:
    """A wrong version of head_writes: `parts(z, weight)` of each layer. z is [n, width], weight [width, width]."""
    nn, batch = m.nn, encode(m, prompts)
    with nn.trace(**batch):
        z = torch.stack([attention_writes(block).input[:, position] for block in blocks(nn)]).save()
    return torch.stack([parts(z[k], attention_writes(b).weight) for k, b in enumerate(blocks(m.hf))], 1)


def _split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (chat_model().hf.config.num_attention_heads, -1))


def _heads_seen(function: Any, inputs: dict[str, Any]) -> Any:
    try:
        return on_chat_model(function, inputs)
    except Exception as error:
        if "already ran past" in str(error):
            raise RefusalLabError(
                "Read the parts in the order of the forward pass: one block after the other."
            ) from error
        raise


HEADS = define(
    "7.2",
    reference=_heads,
    observe=_heads_seen,
    cases=_prompts_and_direction,
    tolerance=5e-4,
    mistakes=(
        Mistake(
            "direction not normalized",
            lambda m, prompts, r: _heads(m, prompts, r) * r.norm(),
            "The result grows with the length of r. Use the unit vector.",
        ),
        Mistake(
            "weight transposed",
            lambda m, prompts, r: _heads_from(m, prompts, r, lambda z, w: (_split(z) * _split(w @ unit(r))).sum(-1)),
            "The weight is the wrong way round. A Linear computes z @ W.T, so r^ @ W is what you multiply z by. W is "
            "square, so no error warns you.",
        ),
        Mistake(
            "heads interleaved",
            lambda m, prompts, r: _heads_from(
                m,
                prompts,
                r,
                lambda z, w: (z * (unit(r) @ w)).unflatten(-1, (-1, _split(z).shape[1])).sum(-2),
            ),
            "You took every fourth coordinate for a head. The heads are side by side: the first `head_dim` "
            "coordinates are head 0.",
        ),
        Mistake(
            "projected before W_O",
            lambda m, prompts, r: _heads_from(m, prompts, r, lambda z, w: (_split(z) * _split(unit(r))).sum(-1)),
            "What a head has gathered is not yet in the stream: W_O of the attention writes it. r belongs behind W_O.",
        ),
        Mistake(
            "first token",
            lambda m, prompts, r: _heads_from(
                m, prompts, r, lambda z, w: (_split(z) * _split(unit(r) @ w)).sum(-1), position=0
            ),
            "This is the first token of the row. Read the last one, -1.",
        ),
        Mistake(
            "magnitude",
            lambda m, prompts, r: _heads(m, prompts, r).abs(),
            "The sign is lost: a head can write against r too.",
        ),
        Mistake(
            "heads added up",
            lambda m, prompts, r: _heads(m, prompts, r).sum(-1),
            "The heads are added up. Keep them apart: [n, layers, heads].",
        ),
    ),
    hints=(
        "The attention output is `z @ W.T`, where z holds the results of all heads side by side. So its projection on "
        r"$\hat r$ is `z @ (W.T @ u)`, a sum over coordinates. Which coordinates belong to a head?",
        "In the trace, block by block: `attention_writes(block).input[:, -1]` is z, `[n, heads * size]`. Stack, save. "
        "The weight is `attention_writes(block).weight` of `blocks(m.hf)`, outside the trace.",
        "With `u = r / r.norm()`: `read = u @ W`, then `(z * read).unflatten(-1, (heads, -1)).sum(-1)`; "
        "`heads = m.hf.config.num_attention_heads`.",
    ),
)

# --- 7.3 -----------------------------------------------------------------------------------------------------------


def _weights(seed: int) -> list[Case]:
    g = torch.Generator().manual_seed(seed)

    def inputs(n: int, layers: int, heads: int, seq: int) -> dict[str, Tensor]:
        weights = torch.randn(n, layers, heads, seq, generator=g).softmax(-1)
        region = torch.rand(n, seq, generator=g) < 0.4
        region[:, 1], region[:, 2] = True, False
        return {"weights": weights, "region": region}

    return [
        Case("4 prompts, 3 layers, 2 heads, 9 tokens", inputs(4, 3, 2, 9)),
        Case("2 prompts, 2 layers, 2 heads, 6 tokens", inputs(2, 2, 2, 6)),
    ]


MASS = define(
    "7.3",
    reference=mass,
    cases=_weights,
    mistakes=(
        Mistake(
            "mean instead of sum",
            lambda weights, region: mass(weights, region) / region.sum(-1)[:, None, None],
            "You averaged over the tokens of the region. The mass is their sum: over all regions it must give 1.",
        ),
        Mistake(
            "divided by all tokens",
            lambda weights, region: mass(weights, region) / region.shape[-1],
            "You averaged over all tokens. The mass is a sum: over all regions it must give 1.",
        ),
        Mistake(
            "outside the region",
            lambda weights, region: mass(weights, ~region),
            "This is the mass outside the region.",
        ),
        Mistake(
            "heads averaged",
            lambda weights, region: mass(weights, region).mean(-1),
            "The heads are averaged. Keep them apart: [n, layers, heads].",
        ),
        Mistake(
            "region of the first prompt",
            lambda weights, region: (weights * region[0]).sum(-1),
            "You used the region of the first prompt for all of them.",
        ),
        Mistake(
            "largest weight",
            lambda weights, region: (weights * region[:, None, None]).amax(-1),
            "This is the largest weight in the region. Add all of them up.",
        ),
    ),
    hints=(
        "The attention weights of a head add up to 1 over the tokens. Keep those of the region, and add them up.",
        "The region has no axes for layers and heads: `region[:, None, None]` is [n, 1, 1, seq] and broadcasts.",
        "`(weights * region[:, None, None]).sum(-1)`.",
    ),
)

# --- 7.4 -----------------------------------------------------------------------------------------------------------


def _planes(seed: int) -> list[Case]:
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 12, generator=g), torch.randn(2, 6, generator=g)
    return [
        Case("width 12, vectors of unlike lengths", {"first": 3 * a[0], "second": a[1] + a[0], "angles": [0, 30, 90]}),
        Case(
            "vectors at a blunt angle",
            {"first": 2 * b[0], "second": 0.3 * b[1] - b[0], "angles": [0.0, 45.0, 60.0, 135.0]},
        ),
    ]


def _plane(basis: Any, to_radians: Any = torch.deg2rad) -> Any:
    """A wrong version of cone_directions: another basis (first, second) -> (b0, b1), or other angles."""

    def directions(first: Tensor, second: Tensor, angles: Sequence[float]) -> Tensor:
        b0, b1 = basis(first, second)
        t = to_radians(torch.tensor([float(a) for a in angles]))[:, None]
        return t.cos() * b0 + t.sin() * b1

    return directions


def _right_basis(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    return unit(first), unit(project_out(second, first))


PLANE = define(
    "7.4",
    reference=plane_directions,
    cases=_planes,
    mistakes=(
        Mistake(
            "not orthogonal",
            _plane(lambda a, b: (unit(a), unit(b))),
            "The second vector still has a part along the first. Remove it before you normalize.",
        ),
        Mistake(
            "orthogonalized without a unit vector",
            _plane(lambda a, b: (unit(a), unit(b - (b @ a) * a))),
            "The projection needs the unit vector of the first: (second . b0) b0.",
        ),
        Mistake(
            "second not normalized",
            _plane(lambda a, b: (unit(a), project_out(b, a))),
            "What is left of the second vector must be normalized too, after its part along the first is gone.",
        ),
        Mistake(
            "normalized too early",
            _plane(lambda a, b: (unit(a), project_out(unit(b), a))),
            "You normalized the second vector before you removed its part along the first, so what is left is "
            "shorter than 1. Normalize last.",
        ),
        Mistake(
            "first not normalized",
            _plane(lambda a, b: (a, unit(project_out(b, a)))),
            "The first vector must be normalized too.",
        ),
        Mistake(
            "degrees taken for radians",
            _plane(_right_basis, lambda t: t),
            "The angles are degrees, and `cos` wants radians: `torch.deg2rad`.",
        ),
        Mistake(
            "sine and cosine swapped",
            _plane(lambda a, b: _right_basis(a, b)[::-1]),
            "0 degrees must give the first vector: cosine belongs to it.",
        ),
    ),
    hints=(
        "First a basis of two unit vectors at right angles; then, for angle t, cos(t) of one and sin(t) of the other.",
        "`b0 = first / first.norm()`; subtract `(second @ b0) * b0` from `second`, then divide the rest by its length.",
        "`t = torch.deg2rad(torch.tensor(angles, dtype=torch.float32))[:, None]`, then `t.cos() * b0 + t.sin() * b1`.",
    ),
)

# --- 7.5 -----------------------------------------------------------------------------------------------------------


def _pairs(seed: int) -> list[Case]:
    a, b, c, d = random_directions(chat_model().width, 4, seed=750 + seed)
    return [
        Case(
            "two random directions at right angles, 3 harmful prompts",
            {"prompts": prompts("harmful_val", seed, 3), "ablated": a, "watched": project_out(b, a)},
        ),
        Case(
            "a pair that is not orthogonal, lengths 5 and 3",
            {"prompts": prompts("harmless_val", seed, 2), "ablated": 5 * c, "watched": 3 * (c + d)},
        ),
    ]


def _without_the_rest(m: Model, prompts: list[str], ablated: Tensor, watched: Tensor) -> Tensor:
    x = _last(m, prompts)
    return (project_out(x, ablated) - x) @ unit(watched)


def _one_layer(m: Model, prompts: list[str], ablated: Tensor, watched: Tensor) -> Tensor:
    def edit(nn: Any) -> None:
        blocks(nn)[0].input = project_out(blocks(nn)[0].input, ablated)

    after = residual(m, prompts, positions=[-1], edit=edit)[:, :, 0]
    return (after - _last(m, prompts)) @ unit(watched)


DOWNSTREAM = define(
    "7.5",
    reference=downstream,
    observe=on_chat_model,
    cases=_pairs,
    tolerance=5e-4,
    mistakes=(
        Mistake(
            "sign reversed",
            lambda m, prompts, ablated, watched: -downstream(m, prompts, ablated, watched),
            "The sign is reversed: a change is after minus before.",
        ),
        Mistake(
            "roles swapped",
            lambda m, prompts, ablated, watched: downstream(m, prompts, watched, ablated),
            "You ablated the direction to watch, and watched the one to ablate.",
        ),
        Mistake(
            "watched direction not normalized",
            lambda m, prompts, ablated, watched: downstream(m, prompts, ablated, watched) * watched.norm(),
            "The result grows with the length of `watched`. Project on the unit vector.",
        ),
        Mistake(
            "watched the ablated direction",
            lambda m, prompts, ablated, watched: downstream(m, prompts, ablated, ablated),
            "You watched the direction that is ablated: its projection must become zero. Project on `watched`.",
        ),
        Mistake(
            "projected afterwards",
            _without_the_rest,
            "You took the component out of streams that were already recorded, so the model never ran without it. Run "
            "it with `edit=ablation(ablated)`.",
        ),
        Mistake(
            "only after",
            lambda m, prompts, ablated, watched: (
                residual(m, prompts, positions=[-1], edit=ablation(ablated))[:, :, 0] @ unit(watched)
            ),
            "This is the projection under ablation. Subtract what it is without.",
        ),
        Mistake(
            "ablated at the first block only",
            _one_layer,
            "You ablated at one block input. `ablation(ablated)` does it everywhere.",
        ),
    ),
    hints=(
        "Two runs of the model: one as it is, one with the ablation as an edit. What do you read in both, and where?",
        "`residual(m, prompts, positions=[-1], edit=ablation(ablated))[:, :, 0]` is [n, layers, width] under ablation.",
        "`(after - before) @ (watched / watched.norm())`.",
    ),
)

EXERCISES = (COSINE, HEADS, MASS, PLANE, DOWNSTREAM)
