"""Was refusal taken out of this checkpoint? Two signals, with the original at hand.

Hurtado 2026 (arXiv 2607.01854) compares a checkpoint with one that is trusted. The refusal gap says how much of the
difference between harmful and harmless prompts is left along the trusted model's directions; the rank-one energy says
how much of the change of the weights lies in one direction for each matrix. `refusallab.defences.integrity` has a test
that needs no original.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from refusallab.activations import mean_residual
from refusallab.errors import RefusalLabError
from refusallab.interventions import unit
from refusallab.model import Model, Prompt, listed_prompts

BAND = (0.33, 0.67)  # of the depth: the layers that both signals read


def band(n_layers: int) -> list[int]:
    """The layers in the middle of a model that both signals read. Never 0, where the last token is always the same."""
    return list(range(max(1, int(BAND[0] * n_layers)), int(BAND[1] * n_layers) + 1))


def last_token_gap(m: Model, harmful: Sequence[Prompt], harmless: Sequence[Prompt]) -> Float[Tensor, "band width"]:
    """The difference in means at the last prompt token, at each layer of the band."""
    sets = (listed_prompts(harmful), listed_prompts(harmless))
    bad, good = (mean_residual(m, prompts, layers=band(m.n_layers), positions=[-1])[:, 0].float() for prompts in sets)
    return bad - good


def gap_left(m: Model, original: Model, harmful: Sequence[Prompt], harmless: Sequence[Prompt]) -> float:
    """The refusal gap of m, as a share of that of the original: 1 is intact, towards 0 is removed.

    The gap is the mean over the layers of <mean harmful - mean harmless, r^>, with the unit directions r^ of the
    original.
    """
    before = last_token_gap(original, harmful, harmless)
    r = unit(before)
    return ((last_token_gap(m, harmful, harmless) * r).sum(-1).mean() / (before * r).sum(-1).mean()).item()


def rank_one_share(differences: Sequence[Float[Tensor, "_ _"]]) -> float:
    """The mean over matrices of sigma_1^2 / sum of sigma_i^2: how much of a change one rank holds. 1 for one rank.

    A matrix that did not change counts 0.
    """
    if len(differences) == 0:
        raise RefusalLabError("There is no difference to look at: give at least one matrix.")
    shares = []
    for difference in differences:
        energy = torch.linalg.svdvals(difference.double()).square()
        shares.append((energy[0] / energy.sum()).item() if energy.sum() > 0 else 0.0)
    return sum(shares) / len(shares)
