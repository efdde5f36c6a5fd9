"""Who writes along a direction? The stream of the last token, taken apart: embedding, every head, every MLP.

The residual stream is a sum, so its projection on a direction is one too (direct attribution). It says who *writes*
along the direction, not who caused it: what a head writes depends on everything before it. Arditi et al. 2024 (arXiv
2406.11717), section 5, look at a suffix in this way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from refusallab.activations import residual
from refusallab.errors import RefusalLabError
from refusallab.inputs import listed
from refusallab.interventions import unit
from refusallab.model import (
    Model,
    Prompt,
    attention,
    attention_writes,
    batches,
    blocks,
    encode,
    ids_behind,
    listed_prompts,
    messages,
    mlp,
    post_norm,
    render,
    residual_scale,
)
from refusallab.orthogonalization import outputs_last


def cosine_trace(m: Model, prompts: Sequence[Prompt], r: Float[Tensor, " width"]) -> Float32[Tensor, "n layers"]:
    """Cosine of the last token's stream with r at every block input."""
    return torch.nn.functional.cosine_similarity(residual(m, prompts, positions=[-1])[:, :, 0], r.float(), dim=-1)


@dataclass(frozen=True, eq=False)
class Attribution:
    """What each part of the model writes along a direction at the last prompt token, in units of the stream."""

    start: Float[Tensor, " n"]  # what enters block 0: the embedding
    heads: Float[Tensor, "n layers heads"]
    biases: Float[Tensor, " layers"]  # the output bias of each attention; zero in most models
    mlps: Float[Tensor, "n layers"]

    def projection(self, layer: int) -> Float[Tensor, " n"]:
        """The projection of the input of block `layer` on the direction: the sum of all parts before it.

        `layer` may be the number of layers: that is the end of the stream, before the final norm.
        """
        written = self.heads.sum(-1) + self.biases + self.mlps  # [n, layers]
        return self.start + written[:, :layer].sum(-1)


@torch.no_grad()
def attribute(m: Model, prompts: Sequence[Prompt], r: Float[Tensor, " width"], *, batch_size: int = 64) -> Attribution:
    """Direct attribution to r at the last prompt token. The parts add up to the projection on r^, exactly.

    Raises RefusalLabError for models with a norm between a head and the stream (Gemma-2/3, OLMo-2): what one head
    writes is not defined there without freezing that norm.
    """
    if any(norm is not None for norm in post_norm(blocks(m.hf)[0])):
        raise RefusalLabError(
            f"{m.name} normalizes what its attention writes, so heads have no share of their own: use another model."
        )
    nn, direction, prompts = m.nn, unit(r).to(m.device), listed_prompts(prompts)
    heads = m.hf.config.num_attention_heads
    reads = torch.stack([head_readout(outputs_last(attention_writes(b)).T, direction, heads) for b in blocks(m.hf)])
    start, z, mlps = [torch.empty(len(prompts), *shape) for shape in ((), reads.shape, (m.n_layers,))]
    for rows, batch in batches(m, prompts, batch_size):
        with nn.trace(**batch, logits_to_keep=1, remote=m.remote):
            first = (blocks(nn)[0].input[:, -1].float() @ direction).save()
            read, added = [], []
            for block in blocks(nn):
                read.append(attention_writes(block).input[:, -1])
                added.append(mlp(block).output[:, -1].float() @ direction)
            mixed, written = torch.stack(read, 1).save(), torch.stack(added, 1).save()
        start[rows], mlps[rows] = first.cpu(), written.cpu()
        z[rows] = mixed.float().cpu().unflatten(-1, reads.shape[1:])
    biases = [getattr(attention_writes(block), "bias", None) for block in blocks(m.hf)]
    constant = torch.tensor([0.0 if b is None else (b.float() @ direction).item() for b in biases])
    scale = residual_scale(m.hf)
    return Attribution(start, scale * head_writes(z, reads.cpu()), scale * constant, scale * mlps)


def head_readout(
    weight: Float[Tensor, "width inputs"], direction: Float[Tensor, " width"], heads: int
) -> Float32[Tensor, "{heads} size"]:
    """How much one unit in each coordinate of each head writes along a unit direction.

    `weight` is the output projection of an attention. It reads the heads side by side: heads * size inputs.
    """
    return (direction @ weight.float()).unflatten(-1, (heads, -1))


def head_writes(
    z: Float[Tensor, "*rest heads size"], reads: Float[Tensor, "... heads size"]
) -> Float[Tensor, "*rest heads"]:
    """What each head writes along the direction."""
    return (z * reads).sum(-1)


# ---------------------------------------------------------------------------------------------------------
# Where the last token looks


@torch.no_grad()
def attention_from_last(m: Model, prompts: Sequence[Prompt]) -> Float32[Tensor, "n layers heads seq"]:
    """Attention weights of the last prompt token, padded on the left like `encode`.

    Runs all prompts as one batch, with the plain implementation of attention: the fast ones do not return weights.
    """
    nn, batch = m.nn, encode(m, prompts)
    with _plain_attention(m), nn.trace(**batch, logits_to_keep=1, remote=m.remote):
        weights = torch.stack([attention(block).output[1][:, :, -1] for block in blocks(nn)], 1).save()
    return weights.float().cpu()


@contextmanager
def _plain_attention(m: Model) -> Iterator[None]:
    before = m.hf.config._attn_implementation
    m.hf.set_attn_implementation("eager")
    try:
        yield
    finally:
        m.hf.set_attn_implementation(before)


def mass(weights: Float[Tensor, "n *rest seq"], region: Bool[Tensor, "n seq"]) -> Float[Tensor, " n *rest"]:
    """The share of attention that falls into a region."""
    mask = region.reshape(len(region), *[1] * (weights.ndim - 2), region.shape[-1])
    return (weights * mask).sum(-1)


def regions(m: Model, prompts: Sequence[Prompt], suffixes: Sequence[str]) -> dict[str, Bool[Tensor, "n seq"]]:
    """Which tokens are "start" (template and earlier turns), "instruction", "suffix" and "end" (template).

    suffixes: how each prompt ends, "" where it has no suffix. Values are padded on the left like `encode`; every token
    that is not padding lies in one region.
    """
    prompts, suffixes = listed_prompts(prompts), listed(suffixes, "suffixes", str)
    batch = encode(m, prompts)
    seq, rows = batch["input_ids"].shape[1], []
    place = torch.arange(seq, 0, -1)  # counted from the end: the last token is 1
    for prompt, suffix in zip(prompts, suffixes, strict=True):
        text = messages(prompt)[-1]["content"]
        if not text.endswith(suffix):
            raise RefusalLabError(f"A prompt does not end in its suffix {suffix!r}: give the prompts as they are sent.")
        start, found, end = render(m, prompt).rpartition(text)
        if not found:
            raise RefusalLabError(f"The template of {m.name} changes {text!r}: give it without outer spaces.")
        heads = [start, start + text.removesuffix(suffix), start + text]
        pieces = [text + end, suffix + end, end]
        a, b, c = (len(ids_behind(m, head, piece)) for head, piece in zip(heads, pieces, strict=True))
        rows.append(torch.stack([place > a, (place <= a) & (place > b), (place <= b) & (place > c), place <= c]))
    masks = torch.stack(rows, 1) & batch["attention_mask"].bool().cpu()  # [4, n, seq]
    return dict(zip(("start", "instruction", "suffix", "end"), masks, strict=True))
