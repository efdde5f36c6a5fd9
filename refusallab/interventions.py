"""Edits of the residual stream along a direction: ablate, add, affine.

Each function returns an edit for `refusallab.model.logits`, `generate` and `residual`. In generation it acts
on the prompt and on every generated token. x is the residual stream [batch, seq, width], r a direction,
r^ = r / |r|. The sums are done in fp32, or in the precision of x where that is higher, and rounded to the
dtype of x once: where r dominates a site, half precision would lose the rest of the stream.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from refusallab.errors import RefusalLabError
from refusallab.model import Edit, attention, blocks, mlp

Vectors = Float[Tensor, " width"] | Float[Tensor, "batch width"]  # one for all prompts, or one for each


def unit(r: Float[Tensor, "*batch width"]) -> Float32[Tensor, "*batch width"]:
    """r / |r|, for one vector or row by row.

    Raises RefusalLabError for a zero direction, NaN or infinity, or another number of dimensions.
    """
    r = _finite(r)
    norm = r.norm(dim=-1, keepdim=True)
    if (norm == 0).any():
        raise RefusalLabError("The direction is zero, so it points nowhere: take another layer or position.")
    return r / norm


def project_out(x: Float[Tensor, "*rest width"], r: Vectors) -> Float[Tensor, "*rest width"]:
    """x - (x . r^) r^: x without its component along r. With one r for each row, x is [batch, seq, width]."""
    wide = _wide(x)
    r = _fit(unit(r), wide)
    return (wide - (wide * r).sum(-1, keepdim=True) * r).to(x.dtype)


def ablation(r: Vectors) -> Edit:
    """Directional ablation: no component along r anywhere (arXiv 2406.11717, section 2.4).

    Projects r out of the input of every block, every attention output and every MLP output, at all positions.
    """
    r = unit(r)

    def edit(nn: Any) -> None:
        for block in blocks(nn):
            block.input = project_out(block.input, r)
            output, *rest = attention(block).output
            attention(block).output = (project_out(output, r), *rest)
            mlp(block).output = project_out(mlp(block).output, r)

    return row_by_row(edit, r)


def project_out_span(
    x: Float[Tensor, "*rest width"], vectors: Float[Tensor, "k width"]
) -> Float[Tensor, "*rest width"]:
    """x without its component in the span of the vectors, which need not be orthogonal: x - x Q Q^T.

    The columns of Q are an orthonormal basis of the span. Vectors in the span of the others add nothing.
    """
    wide = _wide(x)
    if vectors.shape[-1] != wide.shape[-1]:
        raise RefusalLabError(f"The directions have width {vectors.shape[-1]} but the stream {wide.shape[-1]}.")
    _, s, v = torch.linalg.svd(unit(vectors).to(wide), full_matrices=False)
    basis = v[s > 1e-5 * s[0]]  # [rank, width]
    return (wide - wide @ basis.T @ basis).to(x.dtype)


def span_ablation(vectors: Float[Tensor, "k width"]) -> Edit:
    """Ablation of several directions at once: no component in their span anywhere. `ablation` has the sites."""
    unit(vectors)  # raises before the model runs

    def edit(nn: Any) -> None:
        for block in blocks(nn):
            block.input = project_out_span(block.input, vectors)
            output, *rest = attention(block).output
            attention(block).output = (project_out_span(output, vectors), *rest)
            mlp(block).output = project_out_span(mlp(block).output, vectors)

    return edit


def addition(r: Vectors, layer: int, coefficient: float = 1.0) -> Edit:
    """Activation addition: x + coefficient * r at the input of one block (2406.11717, section 2.4).

    Acts at all positions; r keeps its length. A zero r is allowed and changes nothing.
    """
    step = coefficient * _finite(r)

    def edit(nn: Any) -> None:
        block = _block(nn, layer)
        x = _wide(block.input)
        block.input = (x + _fit(step, x)).to(block.input.dtype)

    return row_by_row(edit, step)


def affine(r: Vectors, layer: int, reference: Float[Tensor, " width"], alpha: float) -> Edit:
    """Affine concept editing: x - proj_r(x - reference) + alpha * r (arXiv 2411.09003).

    Acts at the input of one block, all positions. The component along r becomes that of `reference` (for
    example the harmless mean) plus alpha lengths of r. With reference 0 and alpha 0 this is ablation at one
    site.
    """
    direction, step, origin = unit(r), alpha * _finite(r), _finite(reference)
    if origin.ndim != 1:
        raise RefusalLabError(f"A reference has shape [width], not {list(origin.shape)}: it is one for all prompts.")

    def edit(nn: Any) -> None:
        block = _block(nn, layer)
        x = _wide(block.input)
        away = x - _fit(origin, x)
        block.input = (project_out(away, direction) + _fit(origin, x) + _fit(step, x)).to(block.input.dtype)

    return row_by_row(edit, step)


def row_by_row(edit: Edit, values: Tensor) -> Edit:
    """The edit. Where it has values for each row, `rows` says for how many: it needs as many prompts, in one batch."""
    if values.ndim > 1:
        edit.rows = len(values)  # type: ignore[attr-defined]
    return edit


def _finite(r: Tensor) -> Tensor:
    r = torch.as_tensor(r).float()
    if r.ndim not in (1, 2):
        raise RefusalLabError(f"A direction has shape [width] or [batch, width], not {list(r.shape)}.")
    if not r.isfinite().all():
        raise RefusalLabError("The direction has NaN or infinite entries: check how it was computed.")
    return r


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _fit(r: Tensor, x: Tensor) -> Tensor:
    """r with the dtype and device of x, shaped to broadcast over the positions of x."""
    if r.shape[-1] != x.shape[-1]:
        raise RefusalLabError(
            f"The direction has width {r.shape[-1]} but the residual stream {x.shape[-1]}: "
            "take the direction from the same model."
        )
    r = r.to(x)
    if r.ndim == 1:
        return r
    if r.shape[0] != x.shape[0]:
        raise RefusalLabError(
            f"{r.shape[0]} directions for a batch of {x.shape[0]}: give one per prompt, "
            "and a batch_size that holds all prompts."
        )
    return r[:, None]  # [batch, 1, width]


def _block(nn: Any, layer: int) -> Any:
    if not 0 <= layer < len(blocks(nn)):
        raise RefusalLabError(f"There is no layer {layer}: the model has layers 0 to {len(blocks(nn)) - 1}.")
    return blocks(nn)[layer]
