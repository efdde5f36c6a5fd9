"""Weight orthogonalization: a copy of the model whose weights cannot write a direction.

W' = W - r^ r^T W for everything that writes to the residual stream (arXiv 2406.11717, section 4.1). Whether
this equals ablation by hooks depends on the architecture: `equivalence_class` says what it takes.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from transformers import PreTrainedModel

from refusallab.activations import residual, stream
from refusallab.errors import RefusalLabError
from refusallab.interventions import ablation, project_out, unit
from refusallab.model import (
    PROBES,
    Model,
    Prompt,
    attention_writes,
    blocks,
    embedding,
    equivalence_class,
    listed_prompts,
    logits,
    mlp_writes,
    norm_gain,
    positional_embedding,
    post_norm,
    unembedding,
    wrap,
)

__all__ = [
    "REPAIRS",
    "distance_from_hooks",
    "equivalence_class",
    "gap_by_layer",
    "orthogonalize",
    "outputs_last",
    "write_strength",
    "written_weights",
]

REPAIRS = ("untie", "positions", "biases", "gain")  # what the textbook edit leaves out


@torch.no_grad()
def orthogonalize(m: Model, r: Float[Tensor, " width"], *, skip: Collection[str] = (), sharing: bool = False) -> Model:
    """A copy of m in which nothing writes r: embeddings, attention outputs, MLP outputs and their biases.

    A tied head gets a copy of its own first, so that the unembedding stays as it was. Behind a post-norm
    y = gamma * x / rms(x) the matrix is made orthogonal to gamma * r, so that the stream never receives r; the
    norm then rescales the rest, so equality with hooks is not promised there. In the end a prompt is run to see
    that no block reads anything along r. Raises RefusalLabError with the block if one does.

    `skip` leaves out some of REPAIRS, to see what each is for. Without all four this is the textbook edit. `sharing`
    copies only what is edited, which saves memory; change no weight of such a copy, because m may have the same.
    """
    if m.remote is True:
        raise RefusalLabError("A remote model has no weights here: use ablation(r) instead, or load it locally.")
    if unknown := set(skip) - set(REPAIRS):
        raise RefusalLabError(f"There is no {sorted(unknown)[0]!r} to skip: choose from {', '.join(REPAIRS)}.")
    r = unit(r).to(m.device)
    if r.shape != (m.width,):
        raise RefusalLabError(f"The direction has shape {list(r.shape)} but {m.name} needs [{m.width}].")
    hf = _with_own_writers(m.hf) if sharing else copy.deepcopy(m.hf)
    biases = "biases" not in skip
    if "untie" not in skip:
        _untie(hf)
    _project(embedding(hf), r)
    positions = positional_embedding(hf)
    if positions is not None and "positions" not in skip:
        _project(positions, r)
    for block in blocks(hf):
        for write, norm in zip((attention_writes(block), mlp_writes(block)), post_norm(block), strict=True):
            _project(write, _before_norm(r, None if "gain" in skip else norm), biases=biases)
    edited = wrap(hf, m.tokenizer, f"{m.name} (orthogonalized)", m.commit, remote=m.remote)
    if not skip:
        _check_stream(edited, r, m.name)
    return edited


def _with_own_writers(hf: PreTrainedModel) -> PreTrainedModel:
    """A copy whose writers to the stream are its own. It shares every other weight with the original."""
    modules = [embedding(hf), *(write(block) for block in blocks(hf) for write in (attention_writes, mlp_writes))]
    if (positions := positional_embedding(hf)) is not None:
        modules.append(positions)
    own = {id(p) for module in modules for p in module.parameters()}
    return copy.deepcopy(hf, {id(p): p for p in hf.parameters() if id(p) not in own})


def _check_stream(edited: Model, r: Tensor, name: str) -> None:
    """Run a prompt and check that nothing but rounding errors lies along the unit direction r in the stream.

    Rounding an entry of the stream leaves up to eps of it, so eps * |x * r| of x along r, once for each write.
    """
    x = stream(edited, PROBES[0])
    r = r.cpu()
    typical = torch.maximum((x * r).norm(dim=-1), x.norm(dim=-1) / edited.width**0.5).cummax(0).values
    allowed = max(1e-3, 16 * torch.finfo(edited.hf.dtype).eps) * typical
    along = (x @ r).abs()
    if not (along <= allowed).all():
        layer = int((along > allowed).any(1).nonzero()[0])
        where = f"enters block {layer}" if layer < edited.n_layers else "leaves the last block"
        share = (along / x.norm(dim=-1))[layer].max().item()
        raise RefusalLabError(
            f"{name}: after the edit, what {where} still has {share:.1%} of its length along r, so something writes to "
            "the stream that was not edited. Use ablation(r) instead."
        )


def distance_from_hooks(m: Model, edited: Model, r: Float[Tensor, " width"], prompts: Sequence[Prompt]) -> float:
    """max |logit difference| at the last prompt token between ablation(r) on m and the weights edited."""
    prompts = listed_prompts(prompts)
    return (logits(m, prompts, edit=ablation(r)) - logits(edited, prompts)).abs().max().item()


def gap_by_layer(
    m: Model, edited: Model, r: Float[Tensor, " width"], prompts: Sequence[Prompt]
) -> Float32[Tensor, " {m.n_layers}+1"]:
    """Where hooks and weights part ways.

    Entry l is the largest difference between the streams that enter block l, under ablation(r) on m and in `edited`, at
    the last prompt token. The last entry is that of the logits, `distance_from_hooks`.
    """
    prompts = listed_prompts(prompts)
    hooks, weights = (residual(x, prompts, positions=[-1], edit=edit) for x, edit in ((m, ablation(r)), (edited, None)))
    streams = (hooks - weights).abs().amax((0, 2, 3))  # [layers]
    return torch.cat([streams, torch.tensor([distance_from_hooks(m, edited, r, prompts)])])


@torch.no_grad()
def write_strength(m: Model, r: Float[Tensor, " width"]) -> dict[str, float]:
    """How much of what each matrix writes lies along r: |r^ W| / |W| (Frobenius), times the root of the width.

    1 is what a random direction gets, and 0 means that the matrix cannot write r. Keys: "embedding", "positions" where
    they are learned, then "attention 0", "MLP 0", and so on. Behind a post-norm it is the matrix with its gain that
    counts. Needs no prompt.
    """
    r = unit(r).to(m.device)
    return {
        name: ((written @ r).norm() / written.norm()).item() * m.width**0.5
        for name, written in written_weights(m).items()
    }


def written_weights(m: Model) -> dict[str, Float32[Tensor, "_ width"]]:
    """What writes to the residual stream, each with the gain of a post-norm: keys as above."""
    written = {"embedding": outputs_last(embedding(m.hf)).float()}
    positions = positional_embedding(m.hf)
    if positions is not None:
        written["positions"] = outputs_last(positions).float()
    for i, block in enumerate(blocks(m.hf)):
        writers = (("attention", attention_writes(block)), ("MLP", mlp_writes(block)))
        for (kind, module), norm in zip(writers, post_norm(block), strict=True):
            weight = outputs_last(module).float()
            written[f"{kind} {i}"] = weight if norm is None else weight * norm_gain(norm, weight[0])
    return written


def _untie(hf: PreTrainedModel) -> None:
    head = unembedding(hf)
    if head.weight is embedding(hf).weight:
        head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)
        hf.config.tie_word_embeddings = False


def _before_norm(r: Tensor, norm: torch.nn.Module | None) -> Tensor:
    """What a matrix must not write, so that r does not reach the stream: behind a post-norm that is gamma * r."""
    return r if norm is None else norm_gain(norm, r) * r


def outputs_last(module: Any) -> Float[Tensor, "_ width"]:
    """The weight, outputs last, as a view: nn.Linear keeps its outputs in rows, embeddings and Conv1D in columns."""
    weight: Tensor = module.weight.data
    return weight.T if isinstance(module, torch.nn.Linear) else weight


def _project(module: Any, r: Tensor, *, biases: bool = True) -> None:
    """Remove r from all that a module can write."""
    written = outputs_last(module)
    written.copy_(project_out(written.float(), r).to(written.dtype))
    if biases and getattr(module, "bias", None) is not None:
        module.bias.data = project_out(module.bias.data.float(), r).to(module.bias.dtype)
