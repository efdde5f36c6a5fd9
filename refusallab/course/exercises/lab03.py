"""Lab 03, seeing refusal: projections, the principal plane, an honest separation, cosines, the unembedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from refusallab.course.exercise import Case, Mistake, define
from refusallab.course.exercises.common import chat_model, on_chat_model
from refusallab.directions import cosines, difference_in_means, random_directions
from refusallab.errors import RefusalLabError
from refusallab.geometry import direct_logits, principal_plane, projections, right_side
from refusallab.interventions import unit
from refusallab.model import embedding, final_norm, unembedding

# --- 3.1 -----------------------------------------------------------------------------------------------------------


def _sites(seed: int) -> list[Case]:
    g = torch.Generator().manual_seed(seed)

    def inputs(n: int, *shape: int) -> dict[str, Tensor]:
        return {"streams": 3 * torch.randn(n, *shape, generator=g), "vectors": 2 * torch.randn(*shape, generator=g) + 1}

    with_zero = inputs(4, 3, 2, 5)
    with_zero["vectors"][0] = 0
    return [
        Case("6 prompts, 3 layers, 2 positions, width 8", inputs(6, 3, 2, 8)),
        Case("a single prompt", inputs(1, 2, 4, 7)),
        Case("vectors that are zero at layer 0", with_zero),
    ]


PROJECT = define(
    "3.1",
    reference=projections,
    cases=_sites,
    mistakes=(
        Mistake(
            "NaN at the zero vector",
            lambda streams, vectors: (streams * (vectors / vectors.norm(dim=-1, keepdim=True))).sum(-1),
            "At layer 0 the candidate is zero, and 0 / 0 is NaN. `torch.nn.functional.normalize(vectors, dim=-1)` "
            "leaves a zero vector zero.",
        ),
        Mistake(
            "vector not normalized",
            lambda streams, vectors: (streams * vectors).sum(-1),
            "This is the dot product with r, which grows with the length of r. Divide by |r|, so that the result is a "
            "length in the stream.",
        ),
        Mistake(
            "cosine",
            lambda streams, vectors: (normalize(streams, dim=-1) * normalize(vectors, dim=-1)).sum(-1),
            "This is the cosine: you divided by the length of the stream as well. Divide by |r| only.",
        ),
        Mistake(
            "multiples of r",
            lambda streams, vectors: (streams * vectors).sum(-1) / vectors.square().sum(-1).clamp_min(1e-12),
            "You divided by |r| twice: this counts in multiples of r. One division gives a length in the stream.",
        ),
        Mistake(
            "one length for all sites",
            lambda streams, vectors: (streams * vectors).sum(-1) / vectors.norm(),
            "You divided by the norm of all vectors together. Each site has a length of its own: norm(dim=-1).",
        ),
    ),
    hints=(
        r"The projection is $\hat r^\top x$ with $\hat r=r/|r|$. Which dimension does the dot product sum over?",
        "`streams * unit_vectors` broadcasts `[n, layers, positions, width]` against `[layers, positions, width]`. "
        "Then sum over the width.",
        "`torch.nn.functional.normalize(vectors, dim=-1)` gives unit vectors and leaves zero vectors zero.",
    ),
)

# --- 3.2 -----------------------------------------------------------------------------------------------------------


def _clouds(seed: int) -> list[Case]:
    g = torch.Generator().manual_seed(seed)

    def cloud(n: int, width: int, shift: float, *lengths: float) -> Tensor:
        frame = torch.linalg.qr(torch.randn(width, width, generator=g)).Q
        scales = torch.cat([torch.tensor(lengths), torch.full((width - len(lengths),), 0.3)])
        return (torch.randn(n, width, generator=g) * scales) @ frame.T + shift * torch.randn(width, generator=g)

    return [
        Case("40 points around the origin, width 6", {"x": cloud(40, 6, 0, 5, 2)}),
        Case("60 points far from the origin, width 9", {"x": cloud(60, 9, 10, 4, 2)}),
        Case("fewer points than dimensions", {"x": cloud(12, 20, 3, 6, 3)}),
    ]


def _plane_seen(function: Any, inputs: dict[str, Any]) -> Any:
    """The mean, and each axis as the square matrix that does not know its sign."""
    result, width = function(**inputs), inputs["x"].shape[1]
    if not isinstance(result, tuple | list) or len(result) != 2 or not all(isinstance(x, Tensor) for x in result):
        raise RefusalLabError("Return two tensors: the mean, [width], and the two axes in one tensor, [2, width].")
    mean, axes = result
    for what, x, shape in (("mean", mean, [width]), ("tensor of the axes", axes, [2, width])):
        if list(x.shape) != shape:
            raise RefusalLabError(f"The {what} is {list(x.shape)}, and must be {shape}.")
    return {"mean": mean, "first axis": torch.outer(axes[0], axes[0]), "second axis": torch.outer(axes[1], axes[1])}


def _plane(x: Tensor) -> tuple[Tensor, Tensor]:
    fitted = principal_plane(x)
    return fitted.mean, fitted.axes


def _plane_without_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), torch.linalg.svd(x, full_matrices=False).Vh[:2]


def _plane_smallest(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), torch.linalg.eigh(torch.cov(x.T)).eigenvectors.T[:2]


def _plane_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), torch.linalg.eigh(torch.cov(x.T)).eigenvectors.flip(1)[:2]


def _plane_columns(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), torch.linalg.svd(x - x.mean(0), full_matrices=True).Vh[:, :2].T


def _plane_longest_last(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), _plane(x)[1].flip(0)


def _plane_standardized(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), torch.linalg.svd((x - x.mean(0)) / x.std(0), full_matrices=False).Vh[:2]


def _plane_scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    _, lengths, axes = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    return x.mean(0), lengths[:2, None] * axes[:2]


PLANE = define(
    "3.2",
    reference=_plane,
    observe=_plane_seen,
    cases=_clouds,
    tolerance=1e-3,
    mistakes=(
        Mistake(
            "not centred",
            _plane_without_mean,
            "Subtract the mean of the points first. Without that, the first axis points from the origin to the cloud.",
        ),
        Mistake(
            "smallest components",
            _plane_smallest,
            "These are the axes with the least variance: `eigh` sorts in ascending order. You want the two with the "
            "most.",
        ),
        Mistake(
            "rows for columns",
            _plane_rows,
            "`eigh` stores eigenvectors in columns. You took rows, and rows are not axes.",
        ),
        Mistake(
            "columns for rows",
            _plane_columns,
            "You took columns of `Vh`, and columns are not axes. Its rows are: take `Vh[:2]`.",
        ),
        Mistake(
            "longest axis last",
            _plane_longest_last,
            "These are the right two axes in the wrong order: `eigh` sorts in ascending order. The longest comes "
            "first.",
        ),
        Mistake(
            "standardized",
            _plane_standardized,
            "You divided each coordinate by its spread. All coordinates of the stream have the same unit, so only "
            "subtract the mean.",
        ),
        Mistake(
            "axes of another length",
            _plane_scaled,
            "The axes must have length 1: you multiplied them by the singular values.",
        ),
    ),
    hints=(
        "Principal components are directions of the *centred* cloud. What does the singular value decomposition of a "
        "matrix of n points give for its n rows, and what for its columns?",
        "`U, S, Vh = torch.linalg.svd(centred, full_matrices=False)`. The rows of `Vh` are unit vectors in the stream, "
        "longest spread first.",
        "Return `x.mean(0)` and `Vh[:2]`.",
    ),
)

# --- 3.3 -----------------------------------------------------------------------------------------------------------


def _halves(seed: int) -> list[Case]:
    g = torch.Generator().manual_seed(seed)

    def inputs(n: int, k: int, width: int, gap: float, offset: float) -> dict[str, Tensor]:
        towards = gap * normalize(torch.randn(width, generator=g), dim=0)
        centre = offset * torch.randn(width, generator=g)
        cloud = lambda count, shift: torch.randn(count, width, generator=g) + centre + shift  # noqa: E731
        fit = {"a": cloud(n, towards), "b": cloud(k, -towards)}
        r = difference_in_means(fit["a"], fit["b"])
        new = {"new_a": cloud(110, towards), "new_b": cloud(80, -towards)}
        return fit | {k: x[((x - _midpoint(**fit)) @ r).abs() > 1e-3 * r.norm()] for k, x in new.items()}  # no near tie

    cases = [
        Case("two clouds far from the origin", inputs(70, 70, 50, 0.7, 2)),
        Case("15 points of one kind and 60 of the other", inputs(15, 60, 12, 1.0, 0.5)),
        Case("fewer points than dimensions, and no difference at all", inputs(16, 20, 64, 0, 1)),
    ]
    a, new_a, new_b = (torch.randn(n, 8, generator=g) for n in (6, 9, 7))
    no_side = {"a": a, "b": a.clone(), "new_a": new_a, "new_b": new_b}
    return [*cases, Case("a and b are the same points, so that there is no direction", no_side)]


def held_out_share(a: Tensor, b: Tensor, new_a: Tensor, new_b: Tensor) -> float:
    """The share of new points on the right side."""
    flags = right_side(a, b, new_a, new_b)
    return sum(flags) / len(flags)


def _share(middle: Any, direction: Any = lambda a, b, new_a, new_b: difference_in_means(a, b)) -> Any:
    """A wrong version: another middle (a point or a projection), or another direction."""

    def share(a: Tensor, b: Tensor, new_a: Tensor, new_b: Tensor) -> float:
        r, point = direction(a, b, new_a, new_b), middle(a, b, new_a, new_b)
        above = ((new_a - point) @ r > 0).float().sum() + ((new_b - point) @ r < 0).float().sum()
        return (above / (len(new_a) + len(new_b))).item()

    return share


def _difference_of_all(a: Tensor, b: Tensor, new_a: Tensor, new_b: Tensor) -> Tensor:
    return difference_in_means(torch.cat([a, new_a]), torch.cat([b, new_b]))


def _midpoint(a: Tensor, b: Tensor, *_new: Tensor) -> Tensor:
    return (a.mean(0) + b.mean(0)) / 2


HELD_OUT = define(
    "3.3",
    reference=held_out_share,
    cases=_halves,
    mistakes=(
        Mistake(
            "tested on the points that made it",
            lambda a, b, new_a, new_b: held_out_share(a, b, a, b),
            "You tested on a and b, which made the direction. Count new_a and new_b, which had no part in it.",
        ),
        Mistake(
            "direction from the new points",
            lambda a, b, new_a, new_b: held_out_share(new_a, new_b, new_a, new_b),
            "The direction comes from the new points themselves. It must come from a and b alone.",
        ),
        Mistake(
            "direction from all points",
            _share(_midpoint, _difference_of_all),
            "The new points helped to make the direction. It must come from a and b alone.",
        ),
        Mistake(
            "threshold at zero",
            _share(lambda a, b, new_a, new_b: torch.zeros(())),
            "You compared the projection with 0, but 0 need not lie between the clouds. Use the midpoint of the two "
            "means.",
        ),
        Mistake(
            "pooled mean for midpoint",
            _share(lambda a, b, new_a, new_b: torch.cat([a, b]).mean(0)),
            "This is the mean of all points, which lies closer to the larger set. The midpoint is the mean of the two "
            "means.",
        ),
        Mistake(
            "the midpoint counted",
            lambda a, b, new_a, new_b: 1 - held_out_share(b, a, new_a, new_b),
            "A point on the midpoint counts as right here. It is on neither side: > for a, < for b.",
        ),
        Mistake(
            "sides swapped",
            lambda a, b, new_a, new_b: 1 - held_out_share(a, b, new_a, new_b),
            "The sides are swapped: the direction points from b to a, so points like a lie above the midpoint.",
        ),
        Mistake(
            "mean of the two shares",
            lambda a, b, new_a, new_b: (
                held_out_share(a, b, new_a, new_b[:0]) / 2 + held_out_share(a, b, new_a[:0], new_b) / 2
            ),
            "You averaged the share of new_a and that of new_b. Count all new points together.",
        ),
    ),
    hints=(
        "Three steps: a direction and a midpoint from `a` and `b`; the projections of the new points; a count.",
        "`(new_a - middle) @ r` is positive on the side of `a`. The length of r does not matter for a sign.",
        "The `new_a` above 0 and the `new_b` below 0 are on the right side. Divide their number by "
        "`len(new_a) + len(new_b)`.",
    ),
)


# --- 3.4 -----------------------------------------------------------------------------------------------------------


def _vector_sets(seed: int) -> list[Case]:
    g = torch.Generator().manual_seed(seed)
    usual, with_zero, far = (torch.randn(n, width, generator=g) for n, width in ((5, 12), (4, 6), (6, 20)))
    with_zero[1] = 0
    return [
        Case("5 vectors of width 12", {"vectors": 3 * usual}),
        Case("vectors that all share a large part", {"vectors": far + 4}),
        Case("one of 4 vectors is zero", {"vectors": with_zero}),
    ]


COSINES = define(
    "3.4",
    reference=cosines,
    cases=_vector_sets,
    mistakes=(
        Mistake(
            "NaN at the zero vector",
            lambda vectors: (
                (vectors / vectors.norm(dim=-1, keepdim=True)) @ (vectors / vectors.norm(dim=-1, keepdim=True)).T
            ),
            "A zero vector has no direction, and 0 / 0 is NaN. `torch.nn.functional.normalize` leaves it zero.",
        ),
        Mistake(
            "dot products",
            lambda vectors: vectors @ vectors.T,
            "These are dot products: they grow with the lengths. Normalize every vector first.",
        ),
        Mistake(
            "normalized over the wrong axis",
            lambda vectors: normalize(vectors, dim=0) @ normalize(vectors, dim=0).T,
            "You normalized columns. A vector is a row: dim=-1.",
        ),
        Mistake(
            "correlation",
            lambda vectors: (
                normalize(vectors - vectors.mean(-1, keepdim=True), dim=-1)
                @ normalize(vectors - vectors.mean(-1, keepdim=True), dim=-1).T
            ),
            "This is the correlation of the coordinates: you subtracted a mean. The cosine keeps the vectors as they "
            "are.",
        ),
        Mistake(
            "without the sign",
            lambda vectors: cosines(vectors).abs(),
            "The sign is lost. Two candidates that point in opposite directions have cosine -1.",
        ),
    ),
    hints=(
        "The cosine of two unit vectors is their dot product.",
        "`U @ U.T` holds the dot products of all pairs of rows of `U`.",
        "`U = torch.nn.functional.normalize(vectors, dim=-1)`.",
    ),
)

# --- 3.5 -----------------------------------------------------------------------------------------------------------


def _directions(seed: int) -> list[Case]:
    vectors = random_directions(chat_model().width, 2, seed=500 + seed)
    return [
        Case("a random unit direction", {"r": vectors[0]}),
        Case("a random direction of length 7", {"r": 7 * vectors[1]}),
    ]


def _read_out(weight: Tensor, x: Tensor) -> Tensor:
    return weight @ x - (weight @ x).mean()


PROMOTED = define(
    "3.5",
    reference=direct_logits,
    observe=on_chat_model,
    cases=_directions,
    tolerance=1e-3,
    mistakes=(
        Mistake(
            "gain forgotten",
            lambda m, r: _read_out(unembedding(m.hf).weight, unit(r)),
            "The final norm multiplies every coordinate by its gain before the unembedding reads it: "
            "final_norm(m.hf).weight.",
        ),
        Mistake(
            "through the whole norm",
            lambda m, r: _read_out(unembedding(m.hf).weight, final_norm(m.hf)(r)),
            "You sent r through the norm as if it were the whole stream: the norm then stretches r to a length of its "
            "own. Multiply by the gain only.",
        ),
        Mistake(
            "direction not normalized",
            lambda m, r: _read_out(unembedding(m.hf).weight, final_norm(m.hf).weight * r),
            "The result grows with the length of r. Use the unit vector.",
        ),
        Mistake(
            "mean kept",
            lambda m, r: unembedding(m.hf).weight @ (final_norm(m.hf).weight * unit(r)),
            "Subtract the mean over the vocabulary: what is added to every logit alike changes no probability.",
        ),
        Mistake(
            "embedding for unembedding",
            lambda m, r: _read_out(embedding(m.hf).weight, final_norm(m.hf).weight * unit(r)),
            "This is the embedding, which writes tokens into the stream. The unembedding reads them out.",
        ),
    ),
    hints=(
        "What happens to the stream after the last block? First the final norm, then the unembedding. Which part of "
        "the norm does not depend on the rest of the stream?",
        "`final_norm(m.hf).weight` is the gain, `[width]`; `unembedding(m.hf).weight` is `[vocab, width]`.",
        "`effect = W_U @ (gain * r / r.norm())`, then subtract `effect.mean()`.",
    ),
)

EXERCISES = (PROJECT, PLANE, HELD_OUT, COSINES, PROMOTED)
