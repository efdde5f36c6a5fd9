"""The residual stream: what enters each block, at chosen positions of a batch or all of one prompt; the logit lens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from refusallab.errors import RefusalLabError
from refusallab.model import (
    Edit,
    Model,
    Prompt,
    batches,
    blocks,
    encode,
    listed_prompts,
    no_edit,
    require_finite,
    unembed,
)
from refusallab.watch import all_rows


def residual(
    m: Model,
    prompts: Sequence[Prompt],
    *,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    edit: Edit | None = None,
    system: str | None = None,
    batch_size: int = 64,
) -> Float32[Tensor, "n layers positions width"]:
    """Block inputs (resid_pre), in the order of the prompts.

    `layers` defaults to 0..L-1 and `positions` to the post-instruction tokens; positions count from the end
    (-1 is the last prompt token), because prompts are padded on the left. With an edit, this is the stream
    after the edit: what the block reads.
    """
    prompts, (layers, positions) = listed_prompts(prompts), _sites(m, layers, positions)
    out = torch.empty(len(prompts), len(layers), len(positions), m.width)
    for rows, acts in _batched_residual(m, prompts, layers, positions, edit, system, batch_size):
        out[rows] = acts.float()
    return out


def mean_residual(
    m: Model,
    prompts: Sequence[Prompt],
    *,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    edit: Edit | None = None,
    system: str | None = None,
    batch_size: int = 64,
) -> Float64[Tensor, "layers positions width"]:
    """The mean of `residual` over the prompts, summed in float64."""
    prompts, (layers, positions) = listed_prompts(prompts), _sites(m, layers, positions)
    total = torch.zeros(len(layers), len(positions), m.width, dtype=torch.float64)
    for _, acts in _batched_residual(m, prompts, layers, positions, edit, system, batch_size):
        total += acts.double().sum(0)
    return total / len(prompts)


@torch.no_grad()
def stream(m: Model, prompt: Prompt, *, system: str | None = None) -> Float32[Tensor, "{m.n_layers}+1 seq width"]:
    """The whole residual stream of one prompt.

    Entry l is what enters block l; the last entry is what leaves the last block, before the final norm.
    """
    nn, batch = m.nn, encode(m, [prompt], system=system)
    with nn.trace(**batch, logits_to_keep=1, remote=m.remote):
        states = [block.input[0] for block in blocks(nn)]
        states = torch.stack([*states, blocks(nn)[-1].output[0]]).save()
    return states.float().cpu()


def logit_lens(m: Model, x: Float[Tensor, "*rest width"]) -> Float[Tensor, "*rest vocab"]:
    """Logits that the stream x would give if the blocks still to come did nothing.

    At the output of the last block these are the logits of the model.
    """
    return unembed(m.hf, x)


def _sites(m: Model, layers: Sequence[int] | None, positions: Sequence[int] | None) -> tuple[list[int], list[int]]:
    layers = list(range(m.n_layers) if layers is None else layers)
    positions = list(m.positions if positions is None else positions)
    if not layers or min(layers) < 0 or max(layers) >= m.n_layers:
        raise RefusalLabError(f"Layers {layers} are not all in 0 to {m.n_layers - 1}: {m.name} has {m.n_layers}.")
    if not positions or max(positions) >= 0:
        raise RefusalLabError(f"Positions {positions} must be negative: they count from the end of the prompt.")
    return layers, positions


def _batched_residual(
    m: Model,
    prompts: Sequence[Prompt],
    layers: list[int],
    positions: list[int],
    edit: Edit | None,
    system: str | None,
    batch_size: int,
) -> Iterator[tuple[list[int], Tensor]]:
    for rows, batch in batches(m, prompts, batch_size, edit=edit, system=system):
        shortest = int(batch["attention_mask"].sum(1).min())
        if -min(positions) > shortest:
            raise RefusalLabError(f"Position {min(positions)}, but a prompt has only {shortest} tokens.")
        acts = _trace_residual(m, batch, layers, positions, edit).cpu()
        require_finite(m, acts, edit, rows)
        yield rows, acts


@torch.no_grad()
def _trace_residual(
    m: Model, batch: dict[str, Tensor], layers: list[int], positions: list[int], edit: Edit | None
) -> Float[Tensor, "batch layers positions width"]:
    nn, plain, edit = m.nn, edit is None, edit or no_edit
    order = sorted(set(layers))  # a trace reads in the order of the forward pass
    with all_rows(), nn.trace(logits_to_keep=1, remote=m.remote) as tracer:
        with tracer.invoke(**batch):
            edit(nn)
        with tracer.invoke():  # a reader of its own: it sees what the edit leaves at each block
            acts = torch.stack([blocks(nn)[layer].input[:, positions] for layer in order], 1).save()
            if plain:
                tracer.stop()  # the blocks above need not run; an edit may still have work there
    return acts[:, [order.index(layer) for layer in layers]]
