"""The self-test of a loaded model: weights look like weights, the stream adds up, edits reach the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import nnsight
import torch
from nnsight.intervention.interleaver import OutOfOrderError
from torch import Tensor

from refusallab.errors import RefusalLabError
from refusallab.model.files import FLOATS, in_full
from refusallab.model.parts import (
    Model,
    attention,
    attention_writes,
    blocks,
    embedding,
    mlp,
    mlp_writes,
    positional_embedding,
    post_norm,
    residual_scale,
    unembed,
)
from refusallab.model.prompts import encode
from refusallab.model.templates import PROBES

# The mean square of a matrix times its number of inputs is about 1 in a network that works, trained or fresh, and a few
# tens at most. Eight-bit codes that lost their scales have thousands.
LARGEST_WEIGHTS = 1000.0


def try_weights(m: Model) -> None:
    """Check that all weights are numbers, and that the matrices that write to the stream have a plausible size."""
    for key, weight in m.hf.named_parameters():
        if weight.dtype not in FLOATS.values():
            raise RefusalLabError(f"{m.name}: {key} is of type {weight.dtype}, not numbers. {in_full(m.name)}")
    for i, block in enumerate(blocks(m.hf)):
        for part, write in (("attention", attention_writes(block)), ("MLP", mlp_writes(block))):
            weight = write.weight
            inputs = weight.numel() // m.width
            size = weight.flatten()[:: max(1, weight.numel() // 10_000)].float().square().mean().item() * inputs
            if size > LARGEST_WEIGHTS:
                raise RefusalLabError(
                    f"{m.name}: the weights at the end of {part} {i} are {size**0.5:.0f} times larger than those of a "
                    f"network that works, like codes without their scales. {in_full(m.name)}"
                )


@torch.no_grad()
def try_stream(m: Model) -> None:
    """Row i of one batch runs with the input of block i negated; the last row runs untouched and must add up."""
    nn, name = m.nn, m.name
    ids = encode(m, PROBES[:1])["input_ids"].repeat(m.n_layers + 1, 1)  # [L + 1, seq]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    try:
        with nn.trace(**batch, logits_to_keep=1, remote=m.remote):
            start, steps = _negate_one_row_each(nn, name)
            start, steps = nnsight.save(start), nnsight.save(steps)
            last = nn.output.logits[:, -1].save()
    except OutOfOrderError as error:
        raise RefusalLabError(f"{name}: some blocks never run as expected ({error}). Use another model.") from error
    last = last.float()
    if not last.isfinite().all():
        raise RefusalLabError(f"{name}: logits are not finite. The weights are damaged, or the dtype is too small.")
    moved = (last[:-1] - last[-1]).abs().amax(-1) > 1e-4 * last[-1].abs().max()
    if not moved.all():
        dead = [i for i, ok in enumerate(moved.tolist()) if not ok]
        raise RefusalLabError(f"{name}: editing blocks {dead} does not change the logits. Use another model.")
    _test_sums(m, start, steps)
    _test_end(m, steps[-1]["output"], last[-1])


def _negate_one_row_each(nn: Any, name: str) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """In a trace: what the last row starts from, and what each block reads, writes and outputs, [seq, width] each."""
    learned = positional_embedding(nn)
    start, steps = [part.output[-1] for part in (embedding(nn), learned) if part is not None], []
    for i, block in enumerate(blocks(nn)):
        x = block.input.clone()
        x[i] = -x[i]
        block.input = x
        step = {"input": x[-1]}
        parts = (("attention", attention, attention_writes), ("MLP", mlp, mlp_writes))
        for (kind, part, writes), norm in zip(parts, post_norm(block), strict=True):
            written, output = writes(block).output, part(block).output
            output = output[0] if kind == "attention" else output
            if not getattr(output, "shape", None) == getattr(written, "shape", None) == x.shape:
                raise RefusalLabError(f"{name}: block {i} is not attention, then one MLP. Use another model.")
            step |= {f"{kind} written": written[-1], f"{kind} put out": output[-1]}
            step[kind] = output[-1] if norm is None else norm.output[-1]
        steps.append(step | {"output": block.output[-1]})
    return start, steps


def _test_sums(m: Model, start: list[Tensor], steps: list[dict[str, Tensor]]) -> None:
    """The stream is the embedding, up to a factor, plus what attentions and MLPs write, and nothing else."""
    scale, other = residual_scale(m.hf), "Its edits could not be trusted: use another model."
    embedded, *learned = (part.cpu().double() for part in start)
    first = steps[0]["input"].cpu().double() - sum(learned)
    factor = (first * embedded).sum() / embedded.square().sum()
    if not _adds_up([factor * embedded, *learned], steps[0]["input"]):
        raise RefusalLabError(f"{m.name}: block 0 does not read the embedding alone. {other}")
    for i, step in enumerate(steps):
        for kind in ("attention", "MLP"):
            if not _adds_up([step[f"{kind} written"]], step[f"{kind} put out"]):
                raise RefusalLabError(f"{m.name}: {kind} {i} does not end in its output projection. {other}")
        writes = [scale * step[kind].cpu().double() for kind in ("attention", "MLP")]
        if not _adds_up([step["input"], *writes], step["output"]):
            raise RefusalLabError(f"{m.name}: block {i} outputs more than its input, attention and MLP. {other}")
        if i and not _adds_up([steps[i - 1]["output"]], step["input"]):
            raise RefusalLabError(f"{m.name}: block {i} does not read what block {i - 1} outputs. {other}")


def _adds_up(parts: Sequence[Tensor], whole: Tensor) -> bool:
    """Whether parts add up to the whole, in every entry, as well as its dtype can tell."""
    limits, parts = torch.finfo(whole.dtype), [part.cpu().double() for part in parts]
    error = (sum(parts) - whole.cpu().double()).abs()
    return bool((error <= 2 * limits.eps * sum(part.abs() for part in parts) + limits.tiny).all())


def _test_end(m: Model, x: Tensor, logits: Tensor) -> None:
    """`unembed` gives the model's own logits [vocab] of the last token of x [seq, width], the end of the stream."""
    error = (unembed(m.hf, x[-1:])[0] - logits).abs().max()
    if not error <= max(1e-4, 4 * torch.finfo(x.dtype).eps) * logits.abs().max():
        raise RefusalLabError(
            f"{m.name}: its logits are not what the final norm and the unembedding make of the stream. "
            "A logit lens would be wrong: use another model."
        )
