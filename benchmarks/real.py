"""The candidate sweep on a pretrained model, beside a plain loop of hooks and beside the arithmetic itself.

    python benchmarks/real.py [MODEL]

Twelve fixed sites, 16 + 16 prompts (60 harmless requests with words that alarm stand for both kinds: only times and
equality are looked at). The plain loop is that of selection.py. The bound is the multiplications of the weights with
the tokens that must be computed, at the rate of this machine for one matrix of the model, measured in the same run.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable

import torch
from selection import plain_scores

from refusallab.directions import Candidate, Scorer, candidate_directions
from refusallab.model import Model, Prompt, encode, load
from refusallab.records import alarming

PROMPTS, SITES = 16, 12


def seconds(work: Callable[[], object]) -> float:
    """Processor time."""
    start = time.process_time()
    work()
    return time.process_time() - start


def multiplications_a_second(m: Model) -> float:
    """The rate of this machine for the MLP of a middle block and the tokens of one batch."""
    weight = m.hf.model.layers[m.n_layers // 2].mlp.up_proj.weight
    x = torch.randn(PROMPTS * 24, weight.shape[1])
    x @ weight.T
    return 20 * x.shape[0] * weight.numel() / seconds(lambda: [x @ weight.T for _ in range(20)])


def needed(m: Model, score: Scorer, prompts: tuple[list[Prompt], list[Prompt]], layers: list[int]) -> float:
    """Multiplications of weights and tokens that the sweep cannot do without, all that prompts share run once."""
    block = sum(p.numel() for p in m.hf.model.layers[0].parameters())
    head = m.vocab_size * m.width
    shared = score.all.shared.shape[1]
    lengths = [int(encode(m, part)["attention_mask"].sum()) - shared * len(part) for part in prompts]
    total = 0.0
    for layer in layers:
        total += (sum(lengths) + shared) * block * m.n_layers + 2 * PROMPTS * head  # ablated: bypass and KL
        total += (lengths[1] + shared) * block * (m.n_layers - layer) + PROMPTS * head  # added: induce
    return total


def main() -> None:
    m = load(sys.argv[1] if len(sys.argv) > 1 else "qwen2.5-coder-0.5b")
    asked: list[Prompt] = [item.prompt for item in alarming()]
    sets = asked[:PROMPTS], asked[PROMPTS : 2 * PROMPTS]
    tokens = [m.tokenizer("I")["input_ids"][-1]]
    layers = [round(i * (m.n_layers - 1) / (SITES - 1)) for i in range(SITES)]
    vectors = candidate_directions(m, *sets)
    scores: dict[str, list[Candidate]] = {}

    def ours() -> None:
        score = Scorer(m, *sets, tokens)
        scores["ours"] = [c for layer in layers for c in score(vectors[layer, -1:], layer, [-1])]

    def plain() -> None:
        scores["plain"] = plain_scores(m, vectors, *sets, tokens, sites=[(layer, -1) for layer in layers])

    mine, theirs = seconds(ours), seconds(plain)
    apart = max(
        abs(getattr(a, name) - getattr(b, name))
        for a, b in zip(*scores.values(), strict=True)
        for name in ("bypass", "induce", "kl")
    )
    score = Scorer(m, *sets, tokens)
    bound = needed(m, score, sets, layers) / multiplications_a_second(m)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{m.name}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    print(f"  {SITES} sites, {PROMPTS} + {PROMPTS} prompts, {score.all.shared.shape[1]} tokens shared")
    print(f"  processor seconds: refusallab {mine:.1f}, plain hooks {theirs:.1f}: {mine / theirs:.2f} of its time")
    print(f"  the multiplications alone {bound:.1f}: {mine / bound:.1f} times that")
    print(f"  largest difference of a score {apart:.1e}; peak memory {memory:.1f} GB")


if __name__ == "__main__":
    main()
