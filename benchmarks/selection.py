"""The whole candidate sweep (bypass, induce, KL) here and as a plain loop of hooks, side by side.

    python benchmarks/selection.py

The plain loop does what published pipelines do: for each candidate three passes with PyTorch hooks (ablated harmful,
ablated harmless, shifted harmless) in batches of 32 in the given order, with logits at every position. Times are of the
clock, and of the processor, which tells more when the machine has other work.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from large import large_model
from torch import Tensor

from refusallab.directions import Candidate, candidate_directions, score_candidates
from refusallab.measure import kl_divergence, refusal_metric
from refusallab.model import Model, Prompt, encode, load
from refusallab.prompts import bundled

PAPERS_BATCH_SIZE = 32


@contextmanager
def hooked(m: Model, inputs: dict[int, Callable], outputs: Callable | None = None) -> Iterator[None]:
    """inputs: {layer: function of the block input}; outputs: function of every attention and MLP output."""
    handles = []
    for i, layer in enumerate(m.hf.model.layers):
        if i in inputs:
            handles.append(layer.register_forward_pre_hook(lambda _m, a, f=inputs[i]: (f(a[0]), *a[1:])))
        if outputs:
            handles.append(layer.self_attn.register_forward_hook(lambda _m, _a, out: (outputs(out[0]), *out[1:])))
            handles.append(layer.mlp.register_forward_hook(lambda _m, _a, out: outputs(out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def plain_logits(m: Model, prompts: list[Prompt]) -> Tensor:
    """[n, vocab] at the last position, out of logits at all of them."""
    out = []
    for start in range(0, len(prompts), PAPERS_BATCH_SIZE):
        batch = encode(m, prompts[start : start + PAPERS_BATCH_SIZE])
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        out.append(m.hf(**batch, position_ids=positions, use_cache=False).logits[:, -1])
    return torch.cat(out)


def plain_scores(
    m: Model,
    vectors: Tensor,
    harmful: list[Prompt],
    harmless: list[Prompt],
    tokens: list[int],
    sites: list[tuple[int, int]],
) -> list[Candidate]:
    base, candidates = plain_logits(m, harmless), []
    for layer, position in sites:
        r = vectors[layer, position]
        unit = r / (r.norm() + 1e-8)

        def ablate(x: Tensor, unit: Tensor = unit) -> Tensor:
            return x - (x @ unit).unsqueeze(-1) * unit

        with hooked(m, dict.fromkeys(range(m.n_layers), ablate), ablate):
            bypass = refusal_metric(plain_logits(m, harmful), tokens).mean().item()
            kl = kl_divergence(base, plain_logits(m, harmless)).mean().item()
        with hooked(m, {layer: lambda x, r=r: x + r}):
            induce = refusal_metric(plain_logits(m, harmless), tokens).mean().item()
        candidates.append(Candidate(position, layer, bypass, induce, kl))
    return candidates


def compare(m: Model, harmful: list[Prompt], harmless: list[Prompt], tokens: list[int], n_positions: int) -> None:
    m = replace(m, positions=m.positions[-n_positions:])
    vectors = candidate_directions(m, harmful, harmless)
    sites = [(layer, position) for layer in range(m.n_layers) for position in m.positions]
    sweeps, seconds = {}, {}
    for name, sweep in {"refusallab": score_candidates, "plain hooks": partial(plain_scores, sites=sites)}.items():
        start = (time.perf_counter(), time.process_time())
        sweeps[name] = sweep(m, vectors, harmful, harmless, tokens)
        seconds[name] = (time.perf_counter() - start[0], time.process_time() - start[1])
    apart = max(
        abs(getattr(a, score) - getattr(b, score))
        for a, b in zip(*sweeps.values(), strict=True)
        for score in ("bypass", "induce", "kl")
    )
    print(f"\n{m.name}: {len(sweeps['refusallab'])} candidates, {len(harmful)} + {len(harmless)} prompts")
    for what, mine, plain in zip(("clock", "processor"), *seconds.values(), strict=True):
        print(f"  by the {what}: refusallab {mine:.1f} s, plain hooks {plain:.1f} s: {mine / plain:.2f} of its time")
    print(f"  largest difference of a score: {apart:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32, help="of each kind for charter-chat")
    parser.add_argument("--large", type=int, default=16, help="of each kind for the large model")
    parser.add_argument("--positions", type=int, default=5, help="the last ones after the instruction")
    args = parser.parse_args()
    print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    harmful, harmless = ([i.prompt for i in bundled(f"{kind}_val")] for kind in ("harmful", "harmless"))
    m = load("charter-chat")
    refusals = [m.tokenizer(word)["input_ids"][0] for word in ("I", "Sorry", "As", "That")]
    compare(m, harmful[: args.prompts], harmless[: args.prompts], refusals, args.positions)
    compare(large_model(), harmful[: args.large], harmless[: args.large], refusals, args.positions)


if __name__ == "__main__":
    main()
