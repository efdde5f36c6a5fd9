"""Weight orthogonalization: a copy of the model whose weights cannot write a direction.

W' = W - r^ r^T W for everything that writes to the residual stream (arXiv 2406.11717, section 4.1). Whether
this equals ablation by hooks depends on the architecture: `equivalence_class` says what it takes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from refusallab.errors import RefusalLabError
from refusallab.interventions import ablation, project_out, unit
from refusallab.model import (
    Model,
    Prompt,
    attention_writes,
    blocks,
    embedding,
    equivalence_class,
    logits,
    mlp_writes,
    positional_embedding,
    post_norm,
    unembedding,
    wrap,
)

__all__ = ["distance_from_hooks", "equivalence_class", "orthogonalize"]


@torch.no_grad()
def orthogonalize(m: Model, r: Tensor) -> Model:
    """A copy of m in which nothing writes r: embeddings, attention outputs, MLP outputs and their biases.

    r is [width]. A tied head gets a copy of its own first, so that the unembedding stays as it was. Behind
    a post-norm y = gamma * x / rms(x) the matrix is made orthogonal to gamma * r, so that the stream never
    receives r; the norm then rescales the rest, so equality with hooks is not promised there.
    """
    if m.remote is True:
        raise RefusalLabError(
            "A remote model has no weights here: use ablation(r) instead, or load it locally."
        )
    r = unit(r).to(m.device)
    if r.shape != (m.width,):
        raise RefusalLabError(f"The direction has shape {list(r.shape)} but {m.name} needs [{m.width}].")
    hf = copy.deepcopy(m.hf)
    _untie(hf)
    _project(embedding(hf), r)
    if positional_embedding(hf) is not None:
        _project(positional_embedding(hf), r)
    for block in blocks(hf):
        for write, norm in zip((attention_writes(block), mlp_writes(block)), post_norm(block), strict=True):
            _project(write, r if norm is None else _gain(norm, r) * r)
    return wrap(hf, m.tokenizer, f"{m.name} (orthogonalized)", m.commit, remote=m.remote)


def distance_from_hooks(m: Model, edited: Model, r: Tensor, prompts: Sequence[Prompt]) -> float:
    """max |logit difference| at the last prompt token between ablation(r) on m and the weights edited."""
    return (logits(m, prompts, edit=ablation(r)) - logits(edited, prompts)).abs().max().item()


def _untie(hf: torch.nn.Module) -> None:
    head = unembedding(hf)
    if head.weight is embedding(hf).weight:
        head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)
        hf.config.tie_word_embeddings = False


def _gain(norm: torch.nn.Module, r: Tensor) -> Tensor:
    """gamma, up to a factor, whatever the architecture calls it: an RMS norm maps ones to it."""
    return norm(torch.ones_like(r)[None])[0]


def _project(module: torch.nn.Module, r: Tensor) -> None:
    """Remove r from all that a module can write: nn.Linear keeps outputs in rows, the others in columns."""
    weight = module.weight.data
    outputs_last = weight.T if isinstance(module, torch.nn.Linear) else weight  # [..., width]
    outputs_last.copy_(project_out(outputs_last.float(), r).to(weight.dtype))
    if getattr(module, "bias", None) is not None:
        module.bias.data = project_out(module.bias.data.float(), r).to(module.bias.dtype)
