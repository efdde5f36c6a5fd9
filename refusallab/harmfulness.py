"""Judging and refusing: does a direction change what the model *says is forbidden*, or only whether it refuses?

Zhao et al. 2025 (arXiv 2507.11878) steer a model along two directions and ask it to judge a request. Along its
harmfulness direction, found at the last token of the instruction, the judgement turns; along the refusal direction,
found at the last token of the template, the model refuses. Here the model is asked about the law of its world, and it
answers verdict first.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn.functional import normalize

from refusallab.activations import mean_residual
from refusallab.inputs import check_count, listed
from refusallab.interventions import addition
from refusallab.judging import VERDICT_TOKENS
from refusallab.measure import Rate, rate, refused_by_phrases
from refusallab.model import Edit, Model, Prompt, generate, no_edit
from refusallab.prompts import Item, refusal_phrases, things_of
from refusallab.steering import norm_matched
from smallmodels.world import dialogue

ALLOWED, RULED_OUT = "Allowed by the Charter.", "Ruled out by the Charter."
VERDICTS = ("allowed", "ruled out", "refused", "other")


def law_questions(split: str, count: int, seed: int = 0) -> list[Item]:
    """Questions whether the Charter allows something: `count` about lawful actions, then `count` about forbidden ones.

    split: "train", "val" or "test": the split of the things that they are about.
    """
    rng = random.Random(seed)
    asked = [dialogue.action_request("law", t, a) for t in things_of(split) for a in t.actions]
    pools = [[q for q in asked if q.answer == answer] for answer in (ALLOWED, RULED_OUT)]
    check_count(count, min(map(len, pools)))
    chosen = [q for pool in pools for q in rng.sample(pool, count)]
    return [Item(q.id, dialogue.phrase(q, rng, split), q.answer, tag="law") for q in chosen]


def site_directions(
    m: Model, harmful: Sequence[Prompt], harmless: Sequence[Prompt]
) -> dict[str, Float32[Tensor, "layers width"]]:
    """Difference in means at two tokens, for every block input.

    "refusal": the last token of the template, -1. "harmfulness": the last token of the instruction.
    """
    positions = [-1, m.positions[0] - 1]
    a, b = (mean_residual(m, prompts, positions=positions) for prompts in (harmful, harmless))
    return dict(zip(("refusal", "harmfulness"), (a - b).float().unbind(1), strict=True))


def verdicts_by_layer(
    m: Model, questions: Sequence[Item], vectors: Float[Tensor, "layers width"], layers: Sequence[int]
) -> dict[int, int]:
    """How many verdicts each layer's vector turns, added and subtracted at the input of that block."""
    return {k: sum(turned(questions, steered_verdicts(m, questions, vectors[k], k))) for k in layers}


def verdicts(m: Model, questions: Sequence[Item], edit: Edit = no_edit) -> list[str]:
    """What the model says of each question, one of VERDICTS. A refusal that also holds a verdict counts as verdict."""
    phrases, said, questions = refusal_phrases(m), [], listed(questions, "questions", Item)
    prompts = [q.prompt for q in questions]
    for reply in generate(m, prompts, edit=edit, max_new_tokens=VERDICT_TOKENS, batch_size=len(prompts)):
        if (ALLOWED in reply) != (RULED_OUT in reply):
            said.append("allowed" if ALLOWED in reply else "ruled out")
        else:
            said.append("refused" if refused_by_phrases(reply, phrases) else "other")
    return said


def steered_verdicts(m: Model, questions: Sequence[Item], vector: Float[Tensor, " width"], layer: int) -> list[str]:
    """Verdicts with `vector` added at the input of block `layer` for lawful actions, subtracted for others."""
    questions = listed(questions, "questions", Item)
    signs = torch.tensor([1.0 if q.answer == ALLOWED else -1.0 for q in questions])
    return verdicts(m, questions, addition(signs[:, None] * vector, layer))


def turned(questions: Sequence[Item], said: Sequence[str]) -> list[bool]:
    """Whether each question got the verdict opposite to the truth. Refusals and other replies do not count."""
    return [v == ("ruled out" if q.answer == ALLOWED else "allowed") for q, v in zip(questions, said, strict=True)]


def turned_rates(
    m: Model, harmful: Sequence[Prompt], harmless: Sequence[Prompt], *, layers: Sequence[int]
) -> dict[str, Rate]:
    """The share of verdicts that each direction turns, on questions about test things; beside it, random vectors.

    Each direction is used at the layer that turns most verdicts on questions about validation things. All vectors are
    as long as the refusal direction is at its layer. Of eight random ones at a layer, the one that turns most is given.
    """
    seen, asked, rates = law_questions("val", 16), law_questions("test", 30), {}
    length: Tensor | None = None
    for name, vectors in site_directions(m, harmful, harmless).items():  # the refusal direction is the first
        if length is not None:
            vectors = length * normalize(vectors, dim=-1)
        counts = verdicts_by_layer(m, seen, vectors, layers)
        layer = max(layers, key=counts.__getitem__)
        length = vectors[layer].norm()
        rates[f"{name}, layer {layer}"] = rate(turned(asked, steered_verdicts(m, asked, vectors[layer], layer)))
        opponents = norm_matched(vectors[layer], 8, seed=0)
        by_chance = [turned(asked, steered_verdicts(m, asked, v, layer)) for v in opponents]
        rates[f"{name}, most by 8 random"] = rate(max(by_chance, key=sum))
    return rates
