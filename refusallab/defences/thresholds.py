"""Where to set the bar: a threshold at a given rate of false alarms, and the whole trade-off as a curve."""

from __future__ import annotations

import torch
from torch import Tensor

from refusallab.errors import RefusalLabError
from refusallab.inputs import numbers


def threshold_at(harmless: Tensor, false_alarms: float) -> float:
    """The lowest score of the sample that at most a share `false_alarms` of harmless [n] exceeds.

    An alarm is a score *above* the threshold. Raises RefusalLabError for an empty sample, a score that is not finite
    and a share outside 0 to 1.
    """
    scores = torch.tensor(numbers(harmless), dtype=torch.float64).sort().values
    if len(scores) == 0 or not 0 <= false_alarms < 1:
        raise RefusalLabError("A threshold needs scores of harmless traffic and a share of false alarms from 0 to 1.")
    if not scores.isfinite().all():
        raise RefusalLabError("A score of harmless traffic is not finite: check how it was computed.")
    allowed = int(false_alarms * len(scores) + 1e-9)  # alarms that the sample may hold
    return scores[len(scores) - 1 - allowed].item()


def roc(harmful: Tensor, harmless: Tensor) -> Tensor:
    """(false alarms, catches) at every threshold from strict to lax: [k, 2], from (0, 0) to (1, 1)."""
    cuts = torch.cat([harmful, harmless]).unique().flip(0)
    points = [[(s >= cut).double().mean().item() for s in (harmless, harmful)] for cut in cuts]
    return torch.tensor([[0.0, 0.0], *points], dtype=torch.float64)
