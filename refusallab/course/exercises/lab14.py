"""Lab 14, weights that give way, and weights that resist: ranks, edits, bits, spans, and an audit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from refusallab.audit import rank_one_share
from refusallab.course.exercise import Case, Mistake, define
from refusallab.interventions import project_out, project_out_span
from refusallab.weights import keep_lengths, round_to_bits, tent, top_ranks

# --- 14.1 ----------------------------------------------------------------------------------------------------------


def _plus_ranks(new: Tensor, old: Tensor, k: int, share: float) -> Tensor:
    return new + share * top_ranks(new - old, k)


def _pairs(seed: int) -> list[Case]:
    g = torch.Generator().manual_seed(seed)

    def inputs(rows: int, columns: int, k: int, share: float) -> dict[str, Any]:
        old = torch.randn(rows, columns, generator=g)
        return {"new": old + torch.randn(rows, columns, generator=g), "old": old, "k": k, "share": share}

    return [
        Case("three quarters of 2 ranks of a 6 x 5 matrix taken out", inputs(6, 5, 2, -0.75)),
        Case("half of the top rank of a 4 x 7 matrix added", inputs(4, 7, 1, 0.5)),
    ]


def _parts(rows: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """A wrong version that takes other singular values than the k largest."""

    def wrong(new: Tensor, old: Tensor, k: int, share: float) -> Tensor:
        u, s, v = torch.linalg.svd(new - old, full_matrices=False)
        kept = rows(torch.arange(len(s)) < k)
        return new + share * (u * s * kept) @ v

    return wrong


def _without_values(new: Tensor, old: Tensor, k: int, share: float) -> Tensor:
    u, _, v = torch.linalg.svd(new - old, full_matrices=False)
    return new + share * u[:, :k] @ v[:k]


RANKS = define(
    "14.1",
    reference=_plus_ranks,
    cases=_pairs,
    mistakes=(
        Mistake(
            "the wrong difference",
            lambda new, old, k, share: new + share * top_ranks(old - new, k),
            "The sign is turned: the difference is new - old, what the training between them did.",
        ),
        Mistake(
            "ranks of the weight",
            lambda new, old, k, share: new + share * top_ranks(new, k),
            "You took ranks of the weight itself. Take those of new - old.",
        ),
        Mistake(
            "added to the old one",
            lambda new, old, k, share: old + share * top_ranks(new - old, k),
            "You started from the old weight. Start from the new one.",
        ),
        Mistake(
            "smallest ranks",
            _parts(lambda first: first.flip(0)),
            "These are the smallest singular values. torch.linalg.svd sorts them from large to small.",
        ),
        Mistake(
            "all but the top",
            _parts(lambda first: ~first),
            "You kept all but the k largest. Keep the first k.",
        ),
        Mistake(
            "only one rank",
            _parts(lambda first: first.cumsum(0) * first == first.sum()),
            "You kept one rank, the k-th. Keep the first k together.",
        ),
        Mistake(
            "no singular values",
            _without_values,
            "The singular values are missing: a rank is s * u v^T.",
        ),
        Mistake(
            "share left out",
            lambda new, old, k, share: new + top_ranks(new - old, k),
            "`share` has no effect. Multiply the ranks by it.",
        ),
    ),
    hints=(
        "`u, s, v = torch.linalg.svd(new - old, full_matrices=False)`. What are the columns of u, and the rows of v?",
        "The best approximation of rank k uses the first k columns of u, the first k values and the first k rows of v.",
        "`new + share * (u[:, :k] * s[:k]) @ v[:k]`.",
    ),
)

# --- 14.2 ----------------------------------------------------------------------------------------------------------


def _norm_preserving(weight: Tensor, r: Tensor, strength: float) -> Tensor:
    return keep_lengths(weight.T, r / r.norm(), strength).T


def _weights(seed: int) -> list[Case]:
    g = torch.Generator().manual_seed(seed)

    def inputs(width: int, n: int, strength: float) -> dict[str, Any]:
        return {
            "weight": torch.randn(width, n, generator=g),
            "r": 2 * torch.randn(width, generator=g),
            "strength": strength,
        }

    return [
        Case("6 x 4, the whole component", inputs(6, 4, 1.0)),
        Case("a square matrix, half of the component", inputs(5, 5, 0.5)),
    ]


def _less(weight: Tensor, r: Tensor, strength: float) -> Tensor:
    """The projection alone."""
    u = r / r.norm()
    return weight - strength * torch.outer(u, u @ weight)


def _rows_rescaled(weight: Tensor, r: Tensor, strength: float) -> Tensor:
    new = _less(weight, r, strength)
    return new * weight.norm(dim=1, keepdim=True) / new.norm(dim=1, keepdim=True)


LENGTHS = define(
    "14.2",
    reference=_norm_preserving,
    cases=_weights,
    mistakes=(
        Mistake(
            "the bug",
            _rows_rescaled,
            "The bug is still there. What one input writes to the stream is a *column*; rescaling rows mixes what the "
            "projection has just made orthogonal to r.",
        ),
        Mistake(
            "lengths not restored",
            _less,
            "The columns have become shorter. Give each one its old length back.",
        ),
        Mistake(
            "one factor for all",
            lambda weight, r, strength: _less(weight, r, strength) * weight.norm() / _less(weight, r, strength).norm(),
            "You rescaled the whole matrix by one factor. Each column has a length of its own.",
        ),
        Mistake(
            "lengths of 1",
            lambda weight, r, strength: torch.nn.functional.normalize(_less(weight, r, strength), dim=0),
            "The columns have length 1 now. Multiply each by the length that it had.",
        ),
        Mistake(
            "r not made a unit vector",
            lambda weight, r, strength: keep_lengths(weight.T, r, strength).T,
            "r may have any length. Divide it by its norm first.",
        ),
        Mistake(
            "strength left out",
            lambda weight, r, strength: _norm_preserving(weight, r, 1.0),
            "`strength` has no effect. Take away strength times the component.",
        ),
        Mistake(
            "added",
            lambda weight, r, strength: _norm_preserving(weight, r, -strength),
            "The component along r has grown. Subtract it.",
        ),
    ),
    hints=(
        "Compute `r @ new` for the result at strength 1, before and after the lengths are restored. Which line brings "
        "it back?",
        "A vector that is orthogonal to r stays so when you make it longer. Which vectors are orthogonal to r here: "
        "the rows or the columns?",
        "Lengths of columns: `weight.norm(dim=0, keepdim=True)`, shape [1, inputs].",
    ),
)

# --- 14.3 ----------------------------------------------------------------------------------------------------------


def _tents(seed: int) -> list[Case]:
    g = torch.Generator().manual_seed(seed)

    def inputs(layer: int, centre: float, reach: float) -> dict[str, Any]:
        peak, share = 1 + torch.rand(2, generator=g)
        return {"layer": layer, "peak": peak.item(), "centre": centre, "edge": share.item() / 4, "reach": reach}

    shift = torch.rand(1, generator=g).item()
    return [
        Case("below the centre", inputs(3, 4 + shift, 3.0)),
        Case("above the centre", inputs(6, 5 - shift, 4.0)),
        Case("just at the end of the reach", inputs(2, 4.0, 2.0)),
        Case("just outside", inputs(2, 4.6 + shift / 3, 2.5)),
        Case("just at the end of the reach, above the centre", inputs(6, 4.0, 2.0)),
        Case("far outside, above the centre", inputs(7, 3 + shift, 2.5)),
    ]


TENT = define(
    "14.3",
    reference=tent,
    cases=_tents,
    mistakes=(
        Mistake(
            "never ends",
            lambda layer, peak, centre, edge, reach: peak + (edge - peak) * abs(layer - centre) / reach,
            "Outside the reach the strength is 0.",
        ),
        Mistake(
            "edge outside",
            lambda layer, peak, centre, edge, reach: max(tent(layer, peak, centre, edge, reach), edge),
            "Outside the reach the strength is 0, not `edge`.",
        ),
        Mistake(
            "end left out",
            lambda layer, peak, centre, edge, reach: (
                tent(layer, peak, centre, edge, reach) if abs(layer - centre) < reach else 0.0
            ),
            "At a distance of exactly `reach` the strength is `edge`.",
        ),
        Mistake(
            "0 at the edge",
            lambda layer, peak, centre, edge, reach: tent(layer, peak, centre, 0.0, reach),
            "The tent falls to `edge` at a distance of `reach`, and only further away to 0.",
        ),
        Mistake(
            "only one side",
            lambda layer, peak, centre, edge, reach: tent(layer, peak, centre, edge, reach) if layer >= centre else 0.0,
            "A tent has two sides: use the distance |layer - centre|.",
        ),
        Mistake(
            "flat",
            lambda layer, peak, centre, edge, reach: peak if abs(layer - centre) <= reach else 0.0,
            "The strength does not fall. At a distance d it is peak + (edge - peak) * d / reach.",
        ),
        Mistake(
            "turned",
            lambda layer, peak, centre, edge, reach: tent(layer, edge, centre, peak, reach),
            "Peak and edge have changed places: the strength is `peak` at the centre.",
        ),
    ),
    hints=(
        "How far is the layer from the centre? What is the strength at distances 0 and `reach`?",
        "On the straight line between them, at a distance d: peak + (edge - peak) * d / reach.",
    ),
)

# --- 14.4 ----------------------------------------------------------------------------------------------------------


def _to_round(seed: int) -> list[Case]:
    g = torch.Generator().manual_seed(seed)
    with_zeros = torch.randn(4, 6, generator=g)
    with_zeros[1] = 0
    of_sizes = torch.tensor([[1.0], [10.0], [0.1]]) * torch.randn(3, 8, generator=g)
    of_sizes[0, 3] = -4.0  # the largest magnitude of its row
    return [
        Case("4 bits, rows of three sizes", {"weight": of_sizes, "bits": 4}),
        Case("3 bits, a row of zeros", {"weight": with_zeros, "bits": 3}),
    ]


def _rounded(
    scale: Callable[[Tensor, int], Tensor], rounding: Callable[[Tensor], Tensor] = torch.round
) -> Callable[[Tensor, int], Tensor]:
    """A wrong version with another scale or another rounding."""

    def wrong(weight: Tensor, bits: int) -> Tensor:
        s = scale(weight, bits)
        s = torch.where(s > 0, s, torch.ones_like(s))
        return rounding(weight / s) * s

    return wrong


def _no_guard(weight: Tensor, bits: int) -> Tensor:
    scale = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (weight / scale).round() * scale


def _row_scale(weight: Tensor, bits: int) -> Tensor:
    return weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)


BITS = define(
    "14.4",
    reference=round_to_bits,
    cases=_to_round,
    mistakes=(
        Mistake(
            "one scale for all rows",
            _rounded(lambda weight, bits: weight.abs().max() / (2 ** (bits - 1) - 1)),
            "All rows share one scale, so small rows are lost. Give each row its own.",
        ),
        Mistake(
            "one scale a column",
            _rounded(lambda weight, bits: weight.abs().amax(0, keepdim=True) / (2 ** (bits - 1) - 1)),
            "You took the scale of each column. Take that of each row.",
        ),
        Mistake(
            "all codes for one sign",
            _rounded(lambda weight, bits: weight.abs().amax(1, keepdim=True) / (2**bits - 1)),
            "There are twice too many steps: half of the codes are for negative numbers, so the largest integer is "
            "2^(bits-1) - 1.",
        ),
        Mistake(
            "largest entry, not its magnitude",
            _rounded(lambda weight, bits: weight.amax(1, keepdim=True) / (2 ** (bits - 1) - 1)),
            "The scale comes from the largest *magnitude* of a row: a large negative entry counts too.",
        ),
        Mistake(
            "cut instead of rounded",
            _rounded(_row_scale, torch.floor),
            "You cut down. Round to the nearest integer.",
        ),
        Mistake(
            "fraction dropped",
            _rounded(_row_scale, torch.trunc),
            "`int` drops the fraction. Round to the nearest integer.",
        ),
        Mistake(
            "integers",
            lambda weight, bits: round_to_bits(weight, bits) / _row_scale(weight, bits).clamp(min=1e-30),
            "These are the integers. Multiply by the scale again, so that the result can take the weight's place.",
        ),
        Mistake(
            "0 / 0",
            _no_guard,
            "A row of zeros gives 0 / 0, which is NaN. Give such a row any scale that is not 0.",
        ),
    ),
    hints=(
        "A row's largest magnitude becomes the largest integer, 2^(bits-1) - 1. What is one step worth?",
        "`scale = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)`; round `weight / scale`; multiply back.",
        "Before dividing: `torch.where(scale > 0, scale, 1.0)`.",
    ),
)

# --- 14.5 ----------------------------------------------------------------------------------------------------------


def _spans(seed: int) -> list[Case]:
    g = torch.Generator().manual_seed(seed)
    leaning = torch.randn(2, 6, generator=g)
    leaning[1] += 2 * leaning[0]  # far from orthogonal
    return [
        Case("two vectors that lean on each other", {"x": torch.randn(3, 6, generator=g), "vectors": leaning}),
        Case(
            "three vectors, streams [2, 4, 7]",
            {"x": torch.randn(2, 4, 7, generator=g), "vectors": 3 * torch.randn(3, 7, generator=g)},
        ),
    ]


def _one_by_one(x: Tensor, vectors: Tensor) -> Tensor:
    for vector in vectors:
        x = project_out(x, vector)
    return x


def _basis(vectors: Tensor) -> Tensor:
    return torch.linalg.qr(vectors.T)[0]


SPAN = define(
    "14.5",
    reference=project_out_span,
    cases=_spans,
    mistakes=(
        Mistake(
            "one after the other",
            _one_by_one,
            "One after the other: removing the second vector brings a part of the first one back. Take an orthonormal "
            "basis of their span first.",
        ),
        Mistake(
            "components of all at once",
            lambda x, vectors: (
                x
                - (x @ torch.nn.functional.normalize(vectors, dim=1).T) @ torch.nn.functional.normalize(vectors, dim=1)
            ),
            "Where vectors lean on each other, their common part is taken away twice. Take an orthonormal basis first.",
        ),
        Mistake(
            "the mean direction",
            lambda x, vectors: project_out(x, vectors.mean(0)),
            "You removed one direction, the mean. Remove the whole span.",
        ),
        Mistake(
            "only the first",
            lambda x, vectors: project_out(x, vectors[0]),
            "You removed only the first vector.",
        ),
        Mistake(
            "what is left is what was to go",
            lambda x, vectors: x @ _basis(vectors) @ _basis(vectors).T,
            "This is the component in the span. Subtract it from x.",
        ),
        Mistake(
            "lengths not 1",
            lambda x, vectors: x - (x @ vectors.T) @ vectors,
            "The vectors are not unit vectors, and not orthogonal. Take an orthonormal basis of their span.",
        ),
    ),
    hints=(
        "If the vectors were orthonormal, what would you subtract? How do you get there?",
        "`torch.linalg.qr(vectors.T)` gives q [width, k]: its columns are an orthonormal basis of the span.",
        "`x - x @ q @ q.T`.",
    ),
)

# --- 14.6 ----------------------------------------------------------------------------------------------------------


def _differences(seed: int) -> list[Case]:
    g = torch.Generator().manual_seed(seed)
    one_rank = torch.outer(torch.randn(5, generator=g), torch.randn(4, generator=g))
    spread = torch.randn(4, 6, generator=g)
    whole = torch.randint(1, 9, (4, 4), generator=g).float()
    turned = whole.triu(1) - whole.triu(1).T  # the entries add up to 0, and those of the diagonal are 0
    return [
        Case("one of rank 1 and one that is spread", {"differences": [one_rank, spread]}),
        Case(
            "three of different sizes", {"differences": [10 * spread.T, torch.randn(3, 3, generator=g), one_rank / 9]}
        ),
        Case(
            "one matrix that did not change, one that hardly did, two with entries of 0",
            {
                "differences": [
                    torch.zeros(4, 4),
                    0.005 * spread / spread.norm(),
                    turned,
                    -torch.diag(torch.tensor([2.0, 1.0, 0.0])),
                ]
            },
        ),
    ]


def _mean(share: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], float]:
    def wrong(differences: list[Tensor]) -> float:
        shares = [share(torch.linalg.svdvals(d)).item() if d.abs().sum() > 0 else 0.0 for d in differences]
        return sum(shares) / len(shares)

    return wrong


def _pooled(differences: list[Tensor]) -> float:
    values = [torch.linalg.svdvals(d).square() for d in differences]
    return (sum(v[0] for v in values) / sum(v.sum() for v in values)).item()


ENERGY = define(
    "14.6",
    reference=rank_one_share,
    cases=_differences,
    mistakes=(
        Mistake(
            "not squared",
            _mean(lambda s: s[0] / s.sum()),
            "Energy is the *square* of a singular value: s_1^2 / sum of s_i^2.",
        ),
        Mistake(
            "square of the share",
            _mean(lambda s: (s[0] / s.sum()).square()),
            "You squared the share. Square the singular values first, and then add them.",
        ),
        Mistake(
            "pooled",
            _pooled,
            "You pooled the matrices, so a large one outweighs the others. Take the mean of their shares.",
        ),
        Mistake(
            "largest, not mean",
            lambda differences: max(rank_one_share([d]) for d in differences),
            "This is the largest share. Take the mean over the matrices.",
        ),
        Mistake(
            "unchanged matrices left out",
            lambda differences: rank_one_share([d for d in differences if d.abs().sum() > 0]),
            "A matrix that did not change counts 0. Keep it in the mean.",
        ),
        Mistake(
            "entries added up",
            lambda differences: sum(rank_one_share([d]) for d in differences if d.sum() != 0) / len(differences),
            "Entries of both signs can add up to 0 in a matrix that did change. Add up their squares, or those of the "
            "singular values.",
        ),
        Mistake(
            "small changes counted 0",
            lambda differences: sum(rank_one_share([d]) for d in differences if d.norm() > 0.1) / len(differences),
            "A small change is one, too. Only a matrix of zeros counts 0.",
        ),
        Mistake(
            "smallest value",
            _mean(lambda s: s[-1].square() / s.square().sum()),
            "This is the smallest singular value. They are sorted from large to small.",
        ),
    ),
    hints=(
        "`torch.linalg.svdvals(d)` gives the singular values, from large to small.",
        "For each matrix: `s[0] ** 2 / (s ** 2).sum()`, or 0 where the sum is 0. Then the mean.",
    ),
)

EXERCISES = (RANKS, LENGTHS, TENT, BITS, SPAN, ENERGY)
