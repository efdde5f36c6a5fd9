"""A linear probe on the residual stream as a monitor: it reads whether a request is harmful, and blocks the reply.

The probe is a linear discriminant: difference in means, seen through the inverse of the covariance within the classes.
It costs a forward pass over the prompt, or nothing where it is built into the serving of the model. Inputs that were
optimized against it break it, and so do activations that hide the direction it reads (Bailey et al. 2024, arXiv
2412.09565).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refusallab.activations import residual
from refusallab.defence import Watcher, alone
from refusallab.errors import RefusalLabError
from refusallab.model import Edit, Model, Prompt

SHRINKAGE = 0.1


def linear_probe(harmful: Tensor, harmless: Tensor, shrinkage: float = SHRINKAGE) -> Tensor:
    """w = S^-1 (mean harmful - mean harmless): [width]; a stream x scores x . w.

    harmful [n, width], harmless [k, width]. S is the covariance within the classes, mixed with a share `shrinkage` of
    the identity times its mean variance, because there are few prompts and many dimensions. Raises RefusalLabError
    where the streams of a kind do not differ, as at the input of block 0.
    """
    if harmful.ndim != 2 or harmless.ndim != 2 or min(len(harmful), len(harmless)) < 2:
        raise RefusalLabError("A probe needs two or more streams [n, width] of each kind.")
    harmful, harmless = harmful.double(), harmless.double()
    centred = torch.cat([harmful - harmful.mean(0), harmless - harmless.mean(0)])
    within = centred.T @ centred / len(centred)  # [width, width]
    if within.diagonal().mean() <= 1e-24 * harmful.square().mean():  # not 0, where means are rounded
        raise RefusalLabError("The streams are all alike within each kind: take a later layer.")
    identity = torch.eye(len(within), dtype=torch.float64) * within.diagonal().mean()
    mixed = (1 - shrinkage) * within + shrinkage * identity
    return torch.linalg.solve(mixed, harmful.mean(0) - harmless.mean(0)).float()


@dataclass
class Monitor(Watcher):
    """Refuses what a probe at the input of block `layer`, at one position of the prompt, scores above the threshold."""

    m: Model
    w: Tensor  # [width]
    layer: int
    position: int
    threshold: float
    passes_each: int = 1
    name: str = "probe monitor"
    extra_passes: int = 0

    def score(self, prompts: Sequence[Prompt], edit: Edit | None = None) -> Tensor:
        """x . w for each prompt: [n]. A reply that has begun is not read: positions are those of the prompt."""
        x = residual(self.m, alone(prompts), layers=[self.layer], positions=[self.position], edit=edit)
        return x[:, 0, 0] @ self.w
