"""Was refusal taken out of this checkpoint? A test of the weights that needs no prompt.

Weight orthogonalization leaves a fingerprint: a direction that no matrix can write. Each writing matrix W, scaled to
size 1, writes the share |u^T W|^2 / |W|^2 along a unit vector u. `quietest` finds the u whose mean share over the
matrices is smallest: the lowest eigenvector of the mean of W W^T / |W|^2. Ordinary training leaves the lowest shares
close together; the edit leaves one at zero, far below the second.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refusallab.errors import RefusalLabError
from refusallab.interventions import unit
from refusallab.model import Model, attention_writes, blocks, mlp_writes, wrap
from refusallab.orthogonalization import outputs_last, written_weights


@dataclass(frozen=True, eq=False)
class Quietest:
    """The direction that the matrices of a checkpoint write least."""

    direction: Tensor  # [width], unit
    shares: Tensor  # [width], ascending: mean share along each eigenvector, times the width, so that 1 is chance
    gap: float  # log10(second lowest share / lowest share): near 0 untouched, large after the edit


def mean_write_shares(matrices: Sequence[Tensor]) -> Tensor:
    """The mean of width * W W^T / |W|^2 over the matrices: [width, width], symmetric, with trace width.

    Each matrix is [n, width], a row for each thing that it can write: a token or an input.
    """
    if len(matrices) == 0:
        raise RefusalLabError("There is no matrix to test.")
    parts = [w.double().T @ w.double() / w.double().square().sum() for w in matrices]
    return torch.stack(parts).mean(0) * parts[0].shape[0]


def quietest(m: Model) -> Quietest:
    """The direction that attention and MLP outputs of all blocks write least, and how far it falls below the next.

    Embeddings are left out, because some edits skip them; behind a post-norm the matrix with its gain counts.
    """
    written = [w for name, w in written_weights(m).items() if name not in ("embedding", "positions")]
    shares, vectors = torch.linalg.eigh(mean_write_shares(written))
    low = shares.clamp(min=1e-12)
    return Quietest(vectors[:, 0].float(), shares, (low[1] / low[0]).log10().item())


@torch.no_grad()
def hide(m: Model, edited: Model, r: Tensor, *, keep: float = 0.0, noise: float = 0.0, seed: int = 0) -> Model:
    """A copy of an orthogonalized model that hides the edit from `quietest`: the attacker who knows the test.

    keep: the share of what the matrices of m wrote along r [width] that comes back. noise: meaningless weights along r,
    of `noise` times the size that chance would give. Raises RefusalLabError behind a post-norm.
    """
    if m.equivalence == "post-norm":
        raise RefusalLabError("Behind a post-norm the matrix does not write r itself: use a model without post-norms.")
    hf, u, generator = copy.deepcopy(edited.hf), unit(r).to(m.device), torch.Generator().manual_seed(seed)
    for before, after in zip(blocks(m.hf), blocks(hf), strict=True):
        for writes in (attention_writes, mlp_writes):
            old, new = outputs_last(writes(before)), outputs_last(writes(after))  # [n, width], views
            random = torch.randn(len(new), generator=generator).to(u)
            random *= noise * new.float().norm() / m.width**0.5 / random.norm()
            back = keep * (old.float() @ u) + random
            new.copy_(new.float() + back[:, None] * u)
    return wrap(hf, m.tokenizer, f"{edited.name}, hidden", m.commit)
