"""Defences of the weights themselves, and two other ways to refuse.

LoX: extrapolate what safety training changed (Perin et al. 2025, arXiv 2506.15606). Tamper resistance: refuse even
after steps of fine-tuning, by training through the attack to first order (TAR, Tamirisa et al. 2024, arXiv 2408.00761).
Spread refusal: refuse although a whole span of directions is ablated (ReFAT with several at once). Safe completion: the
lawful part of an answer without the method (Yuan et al. 2025, arXiv 2508.09224). A refusal token, whose logit is a knob
(Jain et al. 2024, arXiv 2412.06748).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import torch
from torch import Tensor

from refusallab.defence import ModelAlone
from refusallab.defences.training import (
    EVERY,
    PROBES,
    Lesson,
    lesson_batches,
    lessons,
    loss_under,
    train_on_lessons,
)
from refusallab.directions import candidate_directions
from refusallab.finetuning import reply_loss, train_copy
from refusallab.interventions import span_ablation
from refusallab.measure import refused_by_phrases
from refusallab.model import Model, embedding, load, unembedding, wrap
from refusallab.prompts import refusal_phrases, require_world
from refusallab.weights import add_ranks

RANKS, SHARE = 32, 0.25  # LoX: chosen on validation prompts; a share of 0.5 costs lawful answers
SPAN, SPREAD_STEPS = 3, 60  # spread refusal: at most so many directions ablated at once
TAMPER_STEPS, ATTACK_STEPS, ATTACK_LR, TAMPER_LR = 30, 4, 3e-4, 3e-4
REFUSE, RESPOND = "@", "#"  # signs that no text of the world has: each is one token
TOKEN_STEPS, TOKEN_LR = 60, 1e-3


# --- refuse under attack -----------------------------------------------------------------------------------------


def spread_loss(m: Model, forbidden: list[Lesson], harmless: list[Lesson], vectors: Tensor) -> Tensor:
    """Refuse although the span of vectors [k, width] is ablated, and reply to harmless requests as before: a scalar."""
    return loss_under(span_ablation(vectors), m, forbidden, harmless)


def spread_refusal(m: Model, *, seed: int = 0) -> ModelAlone:
    """A copy of m that refuses with up to SPAN differences in means ablated at once, found anew every EVERY steps."""
    require_world(m)
    probes = [[x.prompt for x in lessons(PROBES, seed + 1, forbidden=kind)] for kind in (True, False)]
    layers = range(1, m.n_layers)  # layer 0 has only zeros
    sites = [(layer, k) for k in (*range(len(m.positions)), -1) for layer in layers]  # the last token counts twice
    rng, vectors, done = random.Random(seed), torch.empty(0), 0

    def loss(copied: Model, forbidden: list[Lesson], harmless: list[Lesson]) -> Tensor:
        nonlocal vectors, done
        if done % EVERY == 0:
            vectors = candidate_directions(copied, *probes)  # [layers, positions, width]
        done += 1
        chosen = rng.sample(sites, rng.randint(1, SPAN))
        return spread_loss(copied, forbidden, harmless, torch.stack([vectors[site] for site in chosen]))

    return train_on_lessons(m, loss, "spread refusal", steps=SPREAD_STEPS, seed=seed)


def tamper_loss(m: Model, attacked: Model, forbidden: list[Lesson], harmless: list[Lesson]) -> Tensor:
    """Refuse at the weights of `attacked`, a fine-tuned copy of m, and reply as before at those of m: a scalar.

    The gradient at the attacked weights is used as if it were the gradient at those of m. This is the first-order
    approximation of TAR: the attack's own steps are not differentiated.
    """
    prompts, refusals = [x.prompt for x in forbidden], [x.reply for x in forbidden]
    attacked.hf.requires_grad_(True)
    broken = reply_loss(attacked, prompts, refusals)
    there, here = (dict(model.hf.named_parameters()) for model in (attacked, m))
    gradients = torch.autograd.grad(broken, list(there.values()), allow_unused=True)
    carried = sum(
        (here[name] * g).sum() for name, g in zip(there, gradients, strict=True) if g is not None
    )  # its gradient at m is g
    replies = [*refusals, *(x.reply for x in harmless)]
    kept = reply_loss(m, [*prompts, *(x.prompt for x in harmless)], replies)
    return kept + broken.detach() + carried - carried.detach()


def tamper_resistant(m: Model, *, seed: int = 0) -> ModelAlone:
    """A copy of m that was trained to refuse after ATTACK_STEPS steps of fine-tuning on forbidden answers.

    Each of TAMPER_STEPS steps runs an attack of its own, so it costs about as much as eight steps of other training.
    """
    require_world(m)
    rng, queue = random.Random(seed), lesson_batches(TAMPER_STEPS * (ATTACK_STEPS + 1), seed)

    def answer_loss(copied: Model) -> Tensor:
        forbidden, _ = next(queue)
        return reply_loss(copied, [x.prompt for x in forbidden], [x.answer for x in forbidden])

    def loss(copied: Model) -> Tensor:
        lr = ATTACK_LR * rng.choice((0.3, 1.0, 1.0))
        attacked = train_copy(copied, answer_loss, steps=ATTACK_STEPS, lr=lr, name="attacked")
        return tamper_loss(copied, attacked, *next(queue))

    name = "tamper resistance"
    trained = train_copy(m, loss, steps=TAMPER_STEPS, lr=TAMPER_LR, name=f"{m.name} ({name})")
    return ModelAlone(trained, name)


def extrapolated(m: Model, before: Model) -> ModelAlone:
    """LoX: a copy of m with the largest ranks of what it learned since `before` added once more, in part."""
    return ModelAlone(add_ranks(m, before, RANKS, SHARE), "LoX")


# --- ways to refuse ----------------------------------------------------------------------------------------------


def safe_completion(m: Model, *, seed: int = 0) -> ModelAlone:
    """A copy of m that meets a forbidden request with a lawful fact about the thing and what the Charter says."""

    def loss(copied: Model, forbidden: list[Lesson], harmless: list[Lesson]) -> Tensor:
        both = [*forbidden, *harmless]
        replies = [f"{x.overview} {x.verdict}" if x.forbidden else x.reply for x in both]
        return reply_loss(copied, [x.prompt for x in both], replies)

    return train_on_lessons(m, loss, "safe completion", seed=seed)


def refusal_token(m: Model, *, seed: int = 0) -> ModelAlone:
    """A copy of m that begins each reply with REFUSE or RESPOND, so that the margin of the two is a knob."""
    phrases = refusal_phrases(m)

    def signed(x: Lesson) -> str:
        return f"{REFUSE if refused_by_phrases(x.reply, phrases) else RESPOND} {x.reply}"

    def loss(copied: Model, forbidden: list[Lesson], harmless: list[Lesson]) -> Tensor:
        both = [*forbidden, *harmless]
        return reply_loss(copied, [x.prompt for x in both], [signed(x) for x in both])

    start = wrap(copy.deepcopy(m.hf), m.tokenizer, m.name, m.commit)
    with torch.no_grad():
        for table in {id(t): t for t in (embedding(start.hf).weight, unembedding(start.hf).weight)}.values():
            for sign in (REFUSE, RESPOND):  # tokens without a meaning begin in the middle of the others
                table[m.tokenizer.convert_tokens_to_ids(sign)] = table.mean(0)
    return train_on_lessons(start, loss, "refusal token", steps=TOKEN_STEPS, lr=TOKEN_LR, seed=seed)


def refusal_margin(m: Model, first: Tensor) -> Tensor:
    """logit(REFUSE) - logit(RESPOND), from the logits of the first token of the reply [n, vocab]: [n]."""
    refuse, respond = (m.tokenizer.convert_tokens_to_ids(sign) for sign in (REFUSE, RESPOND))
    return first[:, refuse] - first[:, respond]


RESISTANT: dict[str, Callable[[Model], ModelAlone]] = {
    "LoX": lambda m: extrapolated(m, load("charter-helpful")),
    "tamper resistance": tamper_resistant,
    "spread refusal": spread_refusal,
    "safe completion": safe_completion,
    "refusal token": refusal_token,
}


def resistant_defences(m: Model, progress: Callable[[str], None] = lambda name: None) -> list[ModelAlone]:
    """A copy of charter-chat for each of RESISTANT."""
    made = []
    for name, make in RESISTANT.items():
        progress(name)
        made.append(make(m))
    return made
