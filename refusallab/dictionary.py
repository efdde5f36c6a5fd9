"""A sparse dictionary of the stream: few features at a time out of many, trained to give the stream back.

This is a TopK sparse autoencoder (Gao et al. 2024, arXiv 2406.04093) of a size that trains in seconds. A feature is a
unit vector, and a number for each token that says how much of it the stream holds. What a feature *means* is a story
that people tell about the tokens where it is active. In the Vale this story can be checked.

A transcoder (Dunefsky et al. 2024, arXiv 2406.11944) is trained the same way to do what an MLP does: it reads the input
and gives back the output, so its features say what the MLP computes and not what the stream holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import embedding_bag

from refusallab.bars import with_bar
from refusallab.errors import RefusalLabError
from refusallab.interventions import unit
from refusallab.measure import Rate, rate
from refusallab.model import Edit, Model, Prompt, batches, blocks, listed_prompts, mlp

FEATURES, ACTIVE, STEPS, BATCH, LEARNING_RATE = 512, 8, 800, 1024, 3e-3
COOLING = 0.4  # the share of the steps over which the learning rate falls to 0
LABELLED_BY = 10  # a label is read off the prompts on which a feature is most active


@dataclass(frozen=True, eq=False)
class Dictionary:
    """Features of the stream at one site. Activations are in units of the stream."""

    encoder: Float[Tensor, "features width"]
    bias: Float[Tensor, " features"]
    decoder: Float[Tensor, "features width"]  # unit vectors
    mean: Float[Tensor, " width"]  # of the streams that it was trained on
    scale: float  # their mean distance from it
    active: int  # how many features may be active at a token

    def encode(self, x: Float[Tensor, "*rest width"]) -> Float[Tensor, "*rest features"]:
        """How active each feature is: 0 for all but `active` of them."""
        mean, encoder, bias = (part.to(x.device) for part in (self.mean, self.encoder, self.bias))
        return sparse_code((x.float() - mean) / self.scale, encoder, bias, self.active) * self.scale

    def decode(self, code: Float[Tensor, "*rest features"]) -> Float[Tensor, "*rest width"]:
        """The stream that these activations describe."""
        return code @ self.decoder.to(code.device) + self.mean.to(code.device)

    def explained(self, x: Float[Tensor, "n width"], target: Float[Tensor, "n width"] | None = None) -> float:
        """The share of the variance of the target (by default x itself) that the dictionary gives back from x."""
        wanted = x if target is None else target
        missed = (wanted - self.decode(self.encode(x))).square().sum()
        return 1 - (missed / (wanted - wanted.mean(0)).square().sum()).item()

    def _written(self, x: Tensor, features: list[int]) -> Tensor:
        """What these features write where x is read: both [..., width]."""
        return self.encode(x)[..., features] @ self.decoder[features].to(x.device)

    def remove(self, features: Sequence[int], layer: int) -> Edit:
        """An edit that takes what these features write out of the input of one block, at all tokens."""
        chosen = list(features)

        def edit(nn: Any) -> None:
            block = blocks(nn)[layer]
            block.input = block.input - self._written(block.input, chosen).to(block.input)

        return edit


@dataclass(frozen=True, eq=False)
class Transcoder(Dictionary):
    """Features of what an MLP computes: `encode` takes its input, `decode` gives its output, in units of the stream."""

    written_mean: Float[Tensor, " width"]  # of the outputs that it was trained on
    written_scale: float  # their mean distance from it

    def encode(self, x: Float[Tensor, "*rest width"]) -> Float[Tensor, "*rest features"]:
        return super().encode(x) * (self.written_scale / self.scale)

    def decode(self, code: Float[Tensor, "*rest features"]) -> Float[Tensor, "*rest width"]:
        return code @ self.decoder.to(code.device) + self.written_mean.to(code.device)

    def explained(self, x: Float[Tensor, "n width"], target: Float[Tensor, "n width"] | None = None) -> float:
        """The share of the variance of the target, what the MLP writes when it reads x, that is given back from x."""
        if target is None:
            raise RefusalLabError("A transcoder does not give back what it reads: give what it writes as the target.")
        return super().explained(x, target)

    def remove(self, features: Sequence[int], layer: int) -> Edit:
        """An edit that takes what these features write out of what the MLP of one block writes, at all tokens."""
        chosen = list(features)

        def edit(nn: Any) -> None:
            part = mlp(blocks(nn)[layer])
            written = self._written(part.input, chosen)
            part.output = part.output - written.to(part.output)

        return edit


def sparse_code(
    x: Float[Tensor, "*rest width"], encoder: Float[Tensor, "features width"], bias: Float[Tensor, " features"], k: int
) -> Float[Tensor, "*rest features"]:
    """max(0, encoder x + bias), and of that the k largest in each row; the rest is 0."""
    value, index = _largest(x, encoder, bias, k)
    return torch.zeros(*x.shape[:-1], len(encoder)).to(value).scatter(-1, index, value)


def _largest(x: Tensor, encoder: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What `sparse_code` keeps of each row, and the numbers of these features: [*rest, k] each."""
    value, index = (x @ encoder.T + bias).topk(k, -1)
    return value.relu(), index  # relu after the choice: its gradient is that of k numbers a row, not of all


def token_streams(
    m: Model, prompts: Sequence[Prompt], layer: int, *, batch_size: int = 128
) -> Float[Tensor, "tokens width"]:
    """The input of one block at every token of the prompts, padding left out."""
    return _at_every_token(m, prompts, lambda nn: blocks(nn)[layer].input, batch_size)


def token_mlps(
    m: Model, prompts: Sequence[Prompt], layer: int, *, batch_size: int = 128
) -> tuple[Float[Tensor, "tokens width"], Float[Tensor, "tokens width"]]:
    """What the MLP of one block reads and what it writes at every token of the prompts, padding left out."""

    def both(nn: Any) -> Any:
        part = mlp(blocks(nn)[layer])
        return torch.stack([part.input, part.output], -2)

    read, written = _at_every_token(m, prompts, both, batch_size).unbind(-2)
    return read, written


@torch.no_grad()
def _at_every_token(
    m: Model, prompts: Sequence[Prompt], site: Callable[[Any], Any], batch_size: int
) -> Float[Tensor, "tokens *rest width"]:
    nn, found, filled = m.nn, torch.empty(0), 0
    passes = [batch for _, batch in batches(m, listed_prompts(prompts), batch_size)]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in passes)
    for batch in passes:
        with nn.trace(**batch, logits_to_keep=1, remote=m.remote) as tracer:
            x = site(nn).save()
            tracer.stop()
        rows = x[batch["attention_mask"].bool()]
        if not filled:  # room for all: pieces put together at the end would be there twice
            found = torch.empty(tokens, *rows.shape[1:])
        found[filled : filled + len(rows)] = rows
        filled += len(rows)
    return found


def train_dictionary(
    x: Float[Tensor, "tokens width"], *, features: int = FEATURES, active: int = ACTIVE, seed: int = 0
) -> Dictionary:
    """Train a dictionary on streams: least squares by Adam, features kept at length 1.

    Raises RefusalLabError for streams that are all alike.
    """
    mean, scale = _centre(x)

    def standard(rows: Tensor) -> tuple[Tensor, Tensor]:
        given = (x[rows] - mean) / scale
        return given, given

    return Dictionary(*_fit(standard, x.shape, features, active, seed), mean, scale, active)


def train_transcoder(
    x: Float[Tensor, "tokens width"],
    written: Float[Tensor, "tokens width"],
    *,
    features: int = FEATURES,
    active: int = ACTIVE,
    seed: int = 0,
) -> Transcoder:
    """Train a transcoder on what an MLP reads and writes, as `train_dictionary` trains on streams.

    Raises RefusalLabError for inputs or outputs that are all alike.
    """
    (mean, scale), (written_mean, written_scale) = _centre(x), _centre(written)

    def standard(rows: Tensor) -> tuple[Tensor, Tensor]:
        return (x[rows] - mean) / scale, (written[rows] - written_mean) / written_scale

    fitted = _fit(standard, x.shape, features, active, seed)
    return Transcoder(*fitted, mean, scale, active, written_mean, written_scale)


def _centre(x: Float[Tensor, "tokens width"]) -> tuple[Float[Tensor, " width"], float]:
    """The mean of the rows, and their mean distance from it."""
    mean = x.mean(0)
    scale = (x - mean).norm(dim=-1).mean().item()
    if not scale > 0:
        raise RefusalLabError("The streams are all alike, or none: give those of more tokens.")
    return mean, scale


def _fit(
    standard: Callable[[Tensor], tuple[Tensor, Tensor]], shape: Sequence[int], features: int, active: int, seed: int
) -> tuple[Float[Tensor, "features width"], Float[Tensor, " features"], Float[Tensor, "features width"]]:
    """Encoder, bias and decoder of a sparse code of some rows that gives others.

    standard: from the numbers of rows to what is read and what is to be given back, standardised. shape: tokens, width.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens, width = shape
    start = unit(torch.randn(features, width, generator=generator))
    encoder, decoder, bias = (t.clone().requires_grad_() for t in (start, start, torch.zeros(features)))
    optimizer = torch.optim.Adam([encoder, decoder, bias], lr=LEARNING_RATE)
    for step in with_bar(range(STEPS), "training", STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (STEPS - step) / (COOLING * STEPS))
        read, wanted = standard(torch.randint(tokens, (BATCH,), generator=generator))
        value, index = _largest(read, encoder, bias, active)
        # a sum of k rows: in the product with the whole decoder nearly all is times 0
        given = embedding_bag(index, decoder, per_sample_weights=value, mode="sum")
        optimizer.zero_grad()
        (given - wanted).square().sum(-1).mean().backward()
        optimizer.step()
        with torch.no_grad():
            decoder /= decoder.norm(dim=-1, keepdim=True)
    return encoder.detach(), bias.detach(), decoder.detach()


def random_dictionary(like: Dictionary, seed: int) -> Dictionary:
    """The control: as many features, all of them random unit vectors, at the same means and scales.

    That of a transcoder is a transcoder.
    """
    vectors = unit(torch.randn(like.decoder.shape, generator=torch.Generator().manual_seed(seed)))
    return replace(like, encoder=vectors, bias=torch.zeros(len(vectors)), decoder=vectors)


@dataclass(frozen=True)
class Feature:
    """A feature, and how well "this request is forbidden" describes it."""

    number: int
    cosine: float  # of its vector with a direction
    top: int  # forbidden requests among the LABELLED_BY on which it is most active, if it is active on them at all
    precision: Rate  # of the requests on which it is active at all, those that are forbidden
    recall: Rate  # of the forbidden requests, those on which it is active at all
    auc: float  # how often it is more active on a forbidden request than on another; a tie counts half


def features_of(
    dictionary: Dictionary,
    x: Float[Tensor, "n width"],
    forbidden: Bool[Tensor, " n"],
    r: Float[Tensor, " width"],
    count: int,
) -> list[Feature]:
    """The features that are more active on forbidden requests than on others: those with the largest difference first.

    x: the stream of each request at one token. Features that are active on none of them are left out.
    """
    code = dictionary.encode(x)
    apart = code[forbidden].mean(0) - code[~forbidden].mean(0)
    order = [number for number in apart.argsort(descending=True, stable=True).tolist() if code[:, number].any()]
    found = []
    for number in order[:count]:
        activity, on = code[:, number], code[:, number] > 0
        found.append(
            Feature(
                number,
                torch.nn.functional.cosine_similarity(dictionary.decoder[number], r.float(), dim=0).item(),
                int((forbidden & on)[activity.argsort(descending=True, stable=True)[:LABELLED_BY]].sum()),
                rate(forbidden[on].tolist()),
                rate(on[forbidden].tolist()),
                float(roc_auc_score(forbidden, activity)),
            )
        )
    return found
