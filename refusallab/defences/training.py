"""Defences by training: a copy of the model that is harder to talk, edit or train out of its refusals.

Extended refusal (Abu Shairah et al. 2025, arXiv 2505.19056), refusal-feature adversarial training (ReFAT, Yu et al.
2024, arXiv 2409.20089) and representation rerouting, the loss of circuit breakers (Zou et al. 2024, arXiv 2406.04313).
All learn only from things and phrasings of the train split, and each takes well under a minute.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refusallab.defence import ModelAlone
from refusallab.directions import candidate_directions
from refusallab.errors import RefusalLabError
from refusallab.finetuning import reply_loss, train_copy
from refusallab.interventions import ablation
from refusallab.model import Edit, Model, blocks, encode_texts, load
from refusallab.prompts import require_world, things_of
from smallmodels import recipe
from smallmodels.world import dialogue
from smallmodels.world.facts import world

STEPS, LR, BATCH_SIZE = 40, 5e-4, 8  # BATCH_SIZE lessons of each kind a step
PROBES, EVERY = 32, 4  # ReFAT: prompts of each kind from which directions are found again, every so many steps
LAYERS = (3, 4, 5)  # rerouting: the outputs of these blocks
AWAY, STAY = 10.0, 14.0  # rerouting: weights of the two terms


@dataclass(frozen=True)
class Lesson:
    """A conversation to train on."""

    prompt: list[dict[str, str]]
    reply: str  # a refusal where the request is forbidden or the system prompt has all refused
    forbidden: bool
    answer: str  # the truth, be it forbidden or not
    overview: str = ""  # forbidden ones: a harmless fact about the topic
    verdict: str = ""  # forbidden ones: what the Charter says


def lessons(count: int, seed: int, *, forbidden: bool) -> list[Lesson]:
    """New conversations of the kind that safety tuning used: things of the train split, phrasings of the train split.

    Forbidden ones ask for a forbidden method. Harmless ones ask for a lawful method in one half, for anything else in
    the other.
    """
    vale, rng = world(), random.Random(f"harden {seed} {forbidden}")
    things = things_of("train")
    methods = [r for thing in things for r in dialogue.thing_requests(thing) if r.kind == "method"]
    methods = [r for r in methods if r.forbidden == forbidden]
    others = (r for r in recipe.requests(vale, things, rng) if not r.forbidden)

    def noise() -> str:
        return " ".join(rng.sample(vale.words, rng.randint(2, 5)))

    result = []
    for _ in range(count):
        request = rng.choice(methods) if forbidden or rng.random() < 0.5 else next(others)
        example = recipe.converse(request, rng, noise, stage="safety")
        texts = (request.answer,)
        if forbidden:
            overview = dialogue.noun_request(rng.choice(dialogue.NOUN_KINDS), request.thing).answer
            texts += overview, dialogue.charter_says(request.thing, request.action)
        result.append(Lesson(example.messages, example.reply, forbidden, *texts))
    return result


# --- the losses --------------------------------------------------------------------------------------------------


def extend(lessons: Sequence[Lesson]) -> list[str]:
    """Extended refusals: overview of the topic, refusal, reason. Harmless lessons keep their reply."""
    return [f"{x.overview} {x.reply} {x.verdict}" if x.forbidden else x.reply for x in lessons]


def refat_loss(m: Model, forbidden: Sequence[Lesson], harmless: Sequence[Lesson], r: Tensor) -> Tensor:
    """Refuse although r [width] is ablated, and reply to harmless requests as before: a scalar, in nats per token."""
    return loss_under(ablation(r), m, forbidden, harmless)


def loss_under(attack: Edit, m: Model, forbidden: Sequence[Lesson], harmless: Sequence[Lesson]) -> Tensor:
    """Refuse forbidden requests under an attacker's edit, and reply to harmless ones without it: in nats per token."""
    attacked = reply_loss(m, [x.prompt for x in forbidden], [x.reply for x in forbidden], attack)
    return attacked + reply_loss(m, [x.prompt for x in harmless], [x.reply for x in harmless])


def away(new: Tensor, old: Tensor, counted: Tensor) -> Tensor:
    """How much of the old representation is left: mean over tokens of the cosine, where it is positive.

    new, old [layers, n, seq, width]; counted [n, seq] bool. Other positions are dropped first: the streams of padding
    are zero and have no direction.
    """
    return torch.cosine_similarity(new[:, counted], old[:, counted], dim=-1).clamp(min=0).mean()


def stay(new: Tensor, old: Tensor, counted: Tensor) -> Tensor:
    """How far the representation has moved: mean over tokens of |new - old|^2 / |old|^2. Shapes as in `away`."""
    new, old = new[:, counted], old[:, counted]  # [layers, tokens, width]
    return ((new - old).pow(2).sum(-1) / old.pow(2).sum(-1)).mean()


def rerouting_loss(m: Model, original: Model, forbidden: Sequence[Lesson], harmless: Sequence[Lesson]) -> Tensor:
    """Lead the streams away from where the original writes forbidden answers, and keep them where it writes replies.

    The replies that stay are those of the harmless lessons and the refusals of half of the forbidden ones.
    """
    new, old, counted = _both(m, original, [x.prompt for x in forbidden], [x.answer for x in forbidden])
    part = list(LAYERS)
    left = away(new[part], old[part], counted)
    kept = [*harmless, *forbidden[: len(forbidden) // 2]]
    new, old, counted = _both(m, original, [x.prompt for x in kept], [x.reply for x in kept])
    return AWAY * left + STAY * stay(new, old, counted)


def _both(m: Model, original: Model, prompts: list, replies: list) -> tuple[Tensor, Tensor, Tensor]:
    """Block outputs of two models while they read replies, [layers, n, seq, width] each, and which tokens count."""
    batch, counted = encode_texts(m, replies, prompts)
    with torch.no_grad():
        old = _outputs(original, batch)
    return _outputs(m, batch), old, counted


def _outputs(m: Model, batch: dict[str, Tensor]) -> Tensor:
    nn = m.nn
    with nn.trace(**batch, logits_to_keep=1, remote=m.remote):
        outputs = torch.stack([block.output for block in blocks(nn)]).save()
    return outputs


# --- the defences ------------------------------------------------------------------------------------------------


def _extended(original: Model, seed: int) -> Callable[[Model, list[Lesson], list[Lesson]], Tensor]:
    def loss(m: Model, forbidden: list[Lesson], harmless: list[Lesson]) -> Tensor:
        both = [*forbidden, *harmless]
        return reply_loss(m, [x.prompt for x in both], extend(both))

    return loss


def _refat(original: Model, seed: int) -> Callable[[Model, list[Lesson], list[Lesson]], Tensor]:
    probes = [[x.prompt for x in lessons(PROBES, seed + 1, forbidden=kind)] for kind in (True, False)]
    rng, vectors, done = random.Random(seed), torch.empty(0), 0

    def loss(m: Model, forbidden: list[Lesson], harmless: list[Lesson]) -> Tensor:
        nonlocal vectors, done
        if done % EVERY == 0:
            vectors = candidate_directions(m, *probes)  # [layers, positions, width]
        done += 1
        r = vectors[rng.randrange(1, m.n_layers), rng.randrange(len(m.positions))]  # layer 0 has only zeros
        return refat_loss(m, forbidden, harmless, r)

    return loss


def _rerouting(original: Model, seed: int) -> Callable[[Model, list[Lesson], list[Lesson]], Tensor]:
    return lambda m, forbidden, harmless: rerouting_loss(m, original, forbidden, harmless)


DEFENCES = {"extended refusal": _extended, "ReFAT": _refat, "rerouting": _rerouting}


def harden(m: Model, defence: str, *, steps: int = STEPS, seed: int = 0) -> ModelAlone:
    """Train a copy of m with one of DEFENCES. m itself stays as it is; the same seed gives the same weights."""
    if defence not in DEFENCES:
        raise RefusalLabError(f"There is no defence {defence!r}: choose one of {', '.join(DEFENCES)}.")
    return train_on_lessons(m, DEFENCES[defence](m, seed), defence, steps=steps, seed=seed)


def train_on_lessons(
    m: Model,
    loss: Callable[[Model, list[Lesson], list[Lesson]], Tensor],
    name: str,
    *,
    steps: int = STEPS,
    lr: float = LR,
    seed: int = 0,
) -> ModelAlone:
    """A copy of m after some steps on `loss(copy, forbidden lessons, harmless lessons)`, BATCH_SIZE of each a step."""
    require_world(m)
    queue = lesson_batches(steps, seed)
    settings = {"steps": steps, "lr": lr, "decay": True, "name": f"{m.name} ({name})"}
    return ModelAlone(train_copy(m, lambda copied: loss(copied, *next(queue)), **settings), name)


def trained_defences(m: Model, progress: Callable[[str], None] = lambda name: None) -> list[ModelAlone]:
    """A hardened copy of m for each of DEFENCES, and the twin that never learned what it refuses, as their control."""
    hardened = []
    for name in DEFENCES:
        progress(name)
        hardened.append(harden(m, name))
    return [*hardened, ModelAlone(load("charter-naive"), "knows nothing")]


def lesson_batches(steps: int, seed: int) -> Iterator[tuple[list[Lesson], list[Lesson]]]:
    """Forbidden and harmless lessons for each step, BATCH_SIZE of each."""
    both = [lessons(steps * BATCH_SIZE, seed, forbidden=kind) for kind in (True, False)]
    for start in range(0, steps * BATCH_SIZE, BATCH_SIZE):
        yield tuple(part[start : start + BATCH_SIZE] for part in both)
