"""Copies of a model with other weights, made without training.

Ranks of the difference to another checkpoint taken away or added; an edit of each layer with a strength of its own,
searched for; fewer bits. `refusallab.orthogonalization` has the textbook edit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from refusallab.errors import RefusalLabError
from refusallab.interventions import unit
from refusallab.measure import kl_divergence, refusal_metric
from refusallab.model import Model, Prompt, attention_writes, blocks, listed_prompts, logits, mlp_writes, wrap
from refusallab.orthogonalization import outputs_last

Change = Callable[[str, Tensor], Tensor]  # (name of a matrix, the matrix) -> what takes its place
Kernel = Callable[[int, float, float, float, float], float]  # (layer, peak, centre, edge, reach) -> strength
Project = Callable[[Tensor, Tensor, float], Tensor]  # (written [n, width], unit r [width], strength) -> [n, width]
WARM_UP = 20  # trials of a search before it learns from those done


@torch.no_grad()
def changed(m: Model, change: Change, name: str) -> Model:
    """A copy of m whose matrices are `change(name, matrix)`. Norms and biases stay, and so does m."""
    if m.remote is True:
        raise RefusalLabError("A remote model has no weights here: load it locally to change them.")
    hf = copy.deepcopy(m.hf)
    for key, weight in hf.named_parameters():
        if weight.ndim == 2:
            weight.copy_(change(key, weight.detach().clone()))
    return wrap(hf, m.tokenizer, name, m.commit)


# --- the difference of two checkpoints ---------------------------------------------------------------------------


def top_ranks(difference: Float[Tensor, "rows columns"], k: int) -> Float[Tensor, "rows columns"]:
    """The best approximation of a matrix by one of rank k: its k largest singular values (Eckart and Young)."""
    if k < 0:
        raise RefusalLabError(f"{k} ranks: give 0 or more.")
    wide = difference.to(torch.promote_types(difference.dtype, torch.float32))
    u, s, v = torch.linalg.svd(wide, full_matrices=False)
    return ((u[:, :k] * s[:k]) @ v[:k]).to(difference.dtype)


def add_ranks(m: Model, before: Model, k: int, share: float) -> Model:
    """A copy of m in which every matrix is W + share * top_k(W - W_before).

    share -1 takes out the k largest ranks of what training between the checkpoints did. A positive share extrapolates
    it, which is LoX (Perin et al. 2025, arXiv 2506.15606).
    """
    old, new = (dict(model.hf.named_parameters()) for model in (before, m))
    if {n: w.shape for n, w in old.items()} != {n: w.shape for n, w in new.items()}:
        raise RefusalLabError(f"{m.name} and {before.name} differ in shape: take two checkpoints of one training.")
    return changed(
        m, lambda name, w: w + share * top_ranks(w.float() - old[name].float(), k), f"{m.name} ({share:+g} x {k} ranks)"
    )


# --- an edit with a strength for each layer ----------------------------------------------------------------------


def keep_lengths(
    written: Float[Tensor, "n width"], r: Float[Tensor, " width"], strength: float = 1.0
) -> Float[Tensor, "n width"]:
    """Norm-preserving projection: each row loses `strength` of its component along unit r and keeps its length.

    A row is what one input writes to the stream (a column of a matrix of PyTorch's Linear). So at strength 1 nothing is
    left along r, because rescaling a row does not turn it. A row along r itself becomes 0.
    """
    new = written - strength * (written @ r)[:, None] * r
    lengths, left = written.norm(dim=1, keepdim=True), new.norm(dim=1, keepdim=True)
    return torch.where(left > 1e-6 * lengths, new * lengths / left.clamp(min=1e-30), new)


def tent(layer: int, peak: float, centre: float, edge: float, reach: float) -> float:
    """The strength of an edit at a layer: `peak` at `centre`, falling linearly to `edge` at a distance of `reach`.

    Further away it is 0. The shape is that of heretic (Weidmann 2025), which calls it a kernel.
    """
    distance = abs(layer - centre)
    return peak + (edge - peak) * distance / reach if distance <= reach else 0.0


@torch.no_grad()
def edit_writers(
    m: Model,
    r: Float[Tensor, " width"],
    attention: Sequence[float],
    mlp: Sequence[float],
    project: Project = keep_lengths,
) -> Model:
    """A copy of m in which what attention and MLP of each block write is projected with a strength of its own.

    attention, mlp: a strength for each block. Embeddings stay. Behind a post-norm the matrix itself is projected.
    """
    if not len(attention) == len(mlp) == m.n_layers:
        raise RefusalLabError(f"Give a strength for each of {m.n_layers} blocks, not {len(attention)} and {len(mlp)}.")
    hf = copy.deepcopy(m.hf)
    _project_writers(hf, unit(r).to(m.device), attention, mlp, project)
    return wrap(hf, m.tokenizer, f"{m.name} (edited)", m.commit)


@torch.no_grad()
def _project_writers(
    hf: torch.nn.Module, r: Tensor, attention: Sequence[float], mlp: Sequence[float], project: Project
) -> None:
    """What `edit_writers` does, in place; r has length 1."""
    for block, strengths in zip(blocks(hf), zip(attention, mlp, strict=True), strict=True):
        for module, strength in zip((attention_writes(block), mlp_writes(block)), strengths, strict=True):
            if strength:
                written = outputs_last(module)
                written.copy_(project(written.float(), r, strength).to(written.dtype))


@dataclass(frozen=True, eq=False)
class EditTrial:
    """An edit that the search tried, and its scores."""

    r: Float[Tensor, " width"]  # unit, between those of two layers
    source: float  # the layer that r comes from
    attention: tuple[float, ...]  # strengths, one for each block
    mlp: tuple[float, ...]
    bypass: float  # mean refusal metric of harmful prompts: low is good
    kl: float  # mean KL(m || edited) at the last token of harmless prompts, in nats: low is good


def search_edit(
    m: Model,
    vectors: Float[Tensor, "layers width"],
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    tokens: Sequence[int],
    *,
    trials: int = 100,
    seed: int = 0,
    kernel: Kernel = tent,
    project: Project = keep_lengths,
) -> list[EditTrial]:
    """Search edits with little refusal left and a small KL, as heretic does: Optuna's TPE on both scores at once.

    vectors: the candidate direction of each layer; the first one is not used. A trial takes a direction between two
    layers and a tent of strengths for attention and MLP each. The result holds all trials, in their order.
    """
    import optuna

    harmful, harmless = listed_prompts(harmful), listed_prompts(harmless)
    if len(vectors) != m.n_layers:
        raise RefusalLabError(f"Give a direction for each of {m.n_layers} layers, not {len(vectors)}.")
    untouched, last, done = logits(m, harmless), m.n_layers - 1, []
    none = [0.0] * m.n_layers
    edited = edit_writers(m, vectors[-1], none, none, project)  # one copy for all trials: to test each takes long

    def strengths(trial: optuna.Trial, part: str) -> tuple[float, ...]:
        peak = trial.suggest_float(f"{part} peak", 0.0, 1.5)
        centre = trial.suggest_float(f"{part} centre", 0, last)
        edge = peak * trial.suggest_float(f"{part} edge", 0, 1)
        reach = trial.suggest_float(f"{part} reach", 1, last)
        return tuple(kernel(layer, peak, centre, edge, reach) for layer in range(m.n_layers))

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        source = trial.suggest_float("source", 1, last)
        low = min(int(source), last - 1)
        r = unit(torch.lerp(unit(vectors[low]), unit(vectors[low + 1]), source - low))
        attention, mlp = strengths(trial, "attention"), strengths(trial, "MLP")
        with torch.no_grad():
            for weight, untouched_weight in zip(edited.hf.parameters(), m.hf.parameters(), strict=True):
                weight.copy_(untouched_weight)
        _project_writers(edited.hf, unit(r).to(m.device), attention, mlp, project)
        bypass = refusal_metric(logits(edited, harmful), tokens).mean().item()
        kl = kl_divergence(untouched, logits(edited, harmless)).mean().item()
        done.append(EditTrial(r, source, attention, mlp, bypass, kl))
        return bypass, kl

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=WARM_UP)
    optuna.create_study(directions=["minimize", "minimize"], sampler=sampler).optimize(objective, n_trials=trials)
    return done


# --- fewer bits --------------------------------------------------------------------------------------------------


def round_to_bits(weight: Float[Tensor, "rows columns"], bits: int) -> Float[Tensor, "rows columns"]:
    """Each row rounded to the nearest of 2^bits - 1 evenly spaced values, from minus its largest entry to plus that.

    This is symmetric quantization with one scale a row ("absmax"). The result is what the integers stand for. A row of
    zeros stays.
    """
    most = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(1, keepdim=True) / most
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (weight / scale).round() * scale


def quantize(m: Model, bits: int, round_weight: Callable[[Tensor, int], Tensor] = round_to_bits) -> Model:
    """A copy of m whose matrices, embeddings among them, have values that fit into `bits` bits each."""
    if not 2 <= bits <= 16:
        raise RefusalLabError(f"{bits} bits: give 2 to 16.")
    return changed(m, lambda _, weight: round_weight(weight, bits), f"{m.name} (int{bits})")
