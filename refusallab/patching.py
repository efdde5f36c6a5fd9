"""Activation patching: put what one run of the model computed into another run, and see what comes back.

Two runs differ in one thing, such as a word of the prompt. Replacing a single activation of the second run by that of
the first says whether this activation *carries* the difference: a cause, where attribution only says who writes.
Meng et al. 2022 (arXiv 2202.05262) trace facts in this way; Heimersheim and Nanda 2024 (arXiv 2404.15255) say how to
read the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from refusallab.errors import RefusalLabError
from refusallab.interventions import project_out, row_by_row
from refusallab.measure import Difference, refusal_metric
from refusallab.model import (
    Edit,
    Model,
    Prompt,
    attention,
    attention_writes,
    blocks,
    encode,
    listed_prompts,
    logits,
    mlp,
)

PARTS = ("stream", "heads", "attention", "MLP")
DRAWS = 2000  # of the bootstrap
NO_DISTANCE = 1e-6  # between the means of two runs that hardly differ
Change = Callable[[Tensor, Tensor], Tensor]  # (activation of this run, of the other run) -> what takes its place


@dataclass(frozen=True, eq=False)
class Activations:
    """What a model computed for some prompts. Tokens are counted from the end: prompts are padded on the left.

    "stream" is the input of each block; "heads" what the output projection of the attention reads, the results of all
    heads side by side; "attention" and "MLP" what these two write.
    """

    parts: dict[str, Float[Tensor, "n layers seq _"]]
    shortest: int | None = None  # tokens of the shortest prompt, where some are padded


@torch.no_grad()
def read_activations(m: Model, prompts: Sequence[Prompt]) -> Activations:
    """Run the prompts as one batch and keep all that `patch` can move."""
    nn, batch = m.nn, encode(m, prompts)
    with nn.trace(**batch, logits_to_keep=1, remote=m.remote):
        stream, heads, attended, written = [], [], [], []
        for block in blocks(nn):
            stream.append(block.input)
            heads.append(attention_writes(block).input)
            attended.append(attention(block).output[0])
            written.append(mlp(block).output)
        stream, heads = torch.stack(stream, 1).save(), torch.stack(heads, 1).save()
        attended, written = torch.stack(attended, 1).save(), torch.stack(written, 1).save()
    parts = dict(zip(PARTS, (x.cpu() for x in (stream, heads, attended, written)), strict=True))
    return Activations(parts, int(batch["attention_mask"].sum(1).min()))


def replace(_x: Float[Tensor, "*rest width"], source: Float[Tensor, "*rest width"]) -> Float[Tensor, "*rest width"]:
    """The other run's activation, whole."""
    return source


def swap_component(
    x: Float[Tensor, "*rest width"], source: Float[Tensor, "*rest width"], r: Float[Tensor, " width"]
) -> Float[Tensor, "*rest width"]:
    """x with its component along r taken from `source`: x - (x . r^) r^ + (source . r^) r^."""
    return source + project_out(x - source, r)


def swap_head(
    x: Float[Tensor, "*rest inputs"], source: Float[Tensor, "*rest inputs"], head: int, heads: int
) -> Float[Tensor, "*rest inputs"]:
    """x with the results of one head taken from `source`. The heads lie side by side."""
    mixed, part = x.unflatten(-1, (heads, -1)).clone(), source.unflatten(-1, (heads, -1))
    mixed[..., head, :] = part[..., head, :]
    return mixed.flatten(-2)


def patch(run: Activations, part: str, layer: int, positions: Sequence[int], change: Change = replace) -> Edit:
    """An edit that puts the activations of `run` at these tokens of the prompt, counted from the end.

    Row i of a batch gets those of row i of the run: give the model as many prompts, in one batch. In generation the
    prompt is patched and the tokens of the reply are not, but they read what the prompt left behind.

    Raises RefusalLabError for positions that the run's shortest prompt does not have. `logits` and `generate` raise it
    for a prompt that does not have them, whose padding would be patched, unless another edit calls this one.
    """
    if part not in run.parts:
        raise RefusalLabError(f"There is no part {part!r}: choose one of {', '.join(run.parts)}.")
    kept, positions = run.parts[part], list(positions)
    rows, layers, seq, _ = kept.shape
    if not 0 <= layer < layers:
        raise RefusalLabError(f"There is no layer {layer}: the run has layers 0 to {layers - 1}.")
    first = -(run.shortest or seq)
    if not positions or not first <= min(positions) <= max(positions) < 0:
        raise RefusalLabError(
            f"Positions {positions} must lie in {first} to -1: they count from the end of the shortest prompt."
        )
    source = kept[:, layer, positions]  # [rows, positions, width]

    def patched(x: Tensor) -> Tensor:
        if x.shape[1] == 1:  # a token of the reply
            return x
        if len(x) != rows:
            raise RefusalLabError(f"{len(x)} prompts in a batch, but the run has {rows}: give as many, in one batch.")
        x = x.clone()
        x[:, positions] = change(x[:, positions], source.to(x))
        return x

    def edit(nn: Any) -> None:
        block = blocks(nn)[layer]
        if part == "stream":
            block.input = patched(block.input)
        elif part == "heads":
            attention_writes(block).input = patched(attention_writes(block).input)
        elif part == "attention":
            output, *rest = attention(block).output
            attention(block).output = (patched(output), *rest)
        else:
            mlp(block).output = patched(mlp(block).output)

    edit.reach = -min(positions)  # type: ignore[attr-defined]
    return row_by_row(edit, source)


def patched_metrics(
    m: Model,
    prompts: Sequence[Prompt],
    run: Activations,
    tokens: Sequence[int],
    *,
    part: str = "stream",
    layers: Sequence[int] | None = None,
    positions: Sequence[int] = (-1,),
    change: Change = replace,
) -> Float32[Tensor, "layers positions n"]:
    """The refusal metric of each prompt, with one layer and one token patched from `run` at a time."""
    prompts, layers = listed_prompts(prompts), list(range(m.n_layers) if layers is None else layers)
    out = torch.empty(len(layers), len(positions), len(prompts))
    for i, layer in enumerate(layers):
        for j, position in enumerate(positions):
            edit = patch(run, part, layer, [position], change)
            out[i, j] = refusal_metric(logits(m, prompts, edit=edit, batch_size=len(prompts)), tokens).float()
    return out


def recovered(
    source: Float[Tensor, " n"], untouched: Float[Tensor, " n"], patched: Float[Tensor, "*rest n"]
) -> Float[Tensor, " *rest"]:
    """The share of a difference that patching brings back: 0 for nothing, 1 for all of it.

    source, untouched: a metric in the run that the activations come from, and in the one that they are put into. Means
    over prompts are divided, not prompt by prompt, where a small difference would blow up. Raises RefusalLabError when
    the two runs hardly differ.
    """
    distance = source.double().mean() - untouched.double().mean()
    if not distance.abs() > NO_DISTANCE:
        raise RefusalLabError("Both runs have the same mean, so there is nothing to recover: choose runs that differ.")
    return ((patched.double().mean(-1) - untouched.double().mean()) / distance).to(patched)


def recovery(
    source: Float[Tensor, " n"],
    untouched: Float[Tensor, " n"],
    patched: Float[Tensor, " n"],
) -> Difference:
    """`recovered`, with a percentile bootstrap over the prompts: each draw takes the same prompts of all three.

    Raises RefusalLabError when the two runs hardly differ in one of the draws.
    """
    if not len(source) == len(untouched) == len(patched):
        raise RefusalLabError(
            f"{len(source)}, {len(untouched)} and {len(patched)} values: give one of each for the same prompts."
        )
    share = recovered(source, untouched, patched).item()
    picks = torch.randint(len(source), (DRAWS, len(source)), generator=torch.Generator().manual_seed(0))
    a, b, c = (x.double()[picks].mean(1) for x in (source, untouched, patched))
    if alike := int(((a - b).abs() <= NO_DISTANCE).sum()):
        raise RefusalLabError(
            f"In {alike} of {DRAWS} draws of the prompts both runs have the same mean, so the share has no interval: "
            "give more prompts, or runs that differ more."
        )
    low, high = ((c - b) / (a - b)).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Difference(share, low, high, len(source))
