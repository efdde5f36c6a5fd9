"""What a direction looks like: projections, planes to draw, separation of new prompts, effect on the logits.

Everything here describes activations. Whether a direction *does* anything is a question for `interventions`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from refusallab.activations import stream
from refusallab.directions import difference_in_means
from refusallab.errors import RefusalLabError
from refusallab.inputs import check_count
from refusallab.interventions import unit
from refusallab.model import Model, Prompt, encode, final_norm, norm_centres, norm_gain, unembedding


def projections(
    streams: Float[Tensor, "n *rest width"], vectors: Float[Tensor, "*rest width"]
) -> Float32[Tensor, " n *rest"]:
    """How far each prompt lies along the direction of its site: x . r / |r|, in units of the residual stream.

    A zero vector gives 0.
    """
    if streams.shape[1:] != vectors.shape:
        raise RefusalLabError(
            f"Streams {list(streams.shape)} need one direction for each site, {list(streams.shape[1:])}, "
            f"not {list(vectors.shape)}."
        )
    return (streams.float() * torch.nn.functional.normalize(vectors.float(), dim=-1)).sum(-1)


@dataclass(frozen=True, eq=False)
class Plane:
    """A flat window into the stream: a point and two orthonormal axes."""

    mean: Float[Tensor, " width"]
    axes: Float[Tensor, "2 width"]
    shares: tuple[float, float]  # of the variance of the points that the plane was fitted to

    def at(self, x: Float[Tensor, "*rest width"]) -> Float32[Tensor, "*rest 2"]:
        """Coordinates of x in the plane."""
        return (x.float() - self.mean) @ self.axes.T


def principal_plane(x: Float[Tensor, "n width"]) -> Plane:
    """The plane of the first two principal components of x. Its axes have no preferred sign."""
    check_count(len(x), least=2, what="number of prompts")
    mean = x.float().mean(0)
    _, lengths, axes = torch.linalg.svd(x.float() - mean, full_matrices=False)  # axes [k, width], longest first
    return Plane(mean, axes[:2], _shares(lengths.square()[:2], x))


def plane_along(x: Float[Tensor, "n width"], r: Float[Tensor, " width"]) -> Plane:
    """The plane whose first axis is r^; the second is the first principal component of what is left of x."""
    check_count(len(x), least=2, what="number of prompts")
    mean, direction = x.float().mean(0), unit(r)
    centred = x.float() - mean
    rest = centred - (centred @ direction)[:, None] * direction
    second = torch.linalg.svd(rest, full_matrices=False).Vh[0]
    axes = torch.stack([direction, second])
    return Plane(mean, axes, _shares((centred @ axes.T).square().sum(0), x))


def _shares(squares: Tensor, x: Tensor) -> tuple[float, float]:
    total = (x.float() - x.float().mean(0)).square().sum().clamp_min(1e-12)
    first, second = (squares / total).tolist()
    return first, second


def right_side(
    a: Float[Tensor, "n width"],
    b: Float[Tensor, "m width"],
    new_a: Float[Tensor, "_ width"],
    new_b: Float[Tensor, "_ width"],
) -> list[bool]:
    """Which new points lie on the right side of the midpoint between the means of a and b.

    Direction and midpoint come only from a and b; the flags are for all of new_a, then new_b.
    """
    r, middle = difference_in_means(a, b), (a.double().mean(0) + b.double().mean(0)).float() / 2
    return (((new_a - middle) @ r > 0).tolist()) + (((new_b - middle) @ r < 0).tolist())


def direct_logits(m: Model, r: Float[Tensor, " width"]) -> Float32[Tensor, " vocab"]:
    """What the direction adds to each logit when the final norm and the unembedding read it.

    W_U (gamma * r^), minus its mean over the vocabulary, since a constant changes no probability. Up to a positive
    factor: the final norm also divides by the size of the whole stream.
    """
    norm, direction = final_norm(m.hf), unit(r).to(m.device)
    if norm_centres(norm, direction):
        direction = direction - direction.mean()
    effect = (unembedding(m.hf).weight.float() @ (norm_gain(norm, direction) * direction)).detach().cpu()
    return effect - effect.mean()


@dataclass(frozen=True, eq=False)
class Strip:
    """Projections of one prompt on a direction, token by token and layer by layer."""

    tokens: tuple[str, ...]
    values: Float[Tensor, "layers seq"]


def token_strip(m: Model, prompt: Prompt, r: Float[Tensor, " width"]) -> Strip:
    """The projection of every block input on r, at every token of the rendered prompt."""
    ids = encode(m, [prompt])["input_ids"][0].tolist()
    return Strip(tuple(m.tokenizer.decode([i]) for i in ids), stream(m, prompt)[:-1] @ unit(r))
