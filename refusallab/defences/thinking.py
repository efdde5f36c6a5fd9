"""Defences of a model that thinks: a monitor that reads its thoughts, a probe behind them, and learned recovery.

A thought can be watched, which an activation can be as well, but only a thought can be read by people (Korbak et al.
2025, arXiv 2507.11473). Recovery is training on thoughts that somebody else has begun wrongly (RECAP, Peng et al. 2025,
arXiv 2510.00938; here by supervised steps instead of reinforcement learning).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refusallab.activations import residual
from refusallab.defence import ModelAlone
from refusallab.defences.exchange import AfterReply
from refusallab.finetuning import reply_loss, train_copy
from refusallab.memory import give_back
from refusallab.model import Begun, Edit, Model, Prompt, embedding, thought_of, unembedding
from refusallab.prompts import require_world, things_of
from refusallab.thoughts import behind, layout, sentences
from smallmodels import recipe
from smallmodels.world import dialogue, thought
from smallmodels.world.facts import world
from smallmodels.world.thought import steps_of

RECOVERY_STEPS, RECOVERY_LR, RECOVERY_BATCH = 100, 3e-4, 16


class AfterThought(AfterReply):
    """A defence that lets the model think and answer, scores the thought, and refuses above a threshold."""

    def read(self, reply: str) -> str:
        return thought_of(reply)


@dataclass
class ThoughtReader(AfterThought):
    """Refuses what a thought calls forbidden, or applies the forbidding article to, whatever the answer is."""

    m: Model
    threshold: float = 0.5
    passes_each: int = 0
    name: str = "reads the thought"
    extra_passes: int = 0

    def score(self, prompts: Sequence[Prompt], thoughts: Sequence[str], edit: Edit | None = None) -> Tensor:
        steps = [steps_of(text) for text in thoughts]
        return torch.tensor([float(s.verdict == thought.FORBIDDEN or s.article == "dusk-born") for s in steps])


@dataclass
class ThoughtProbe(AfterThought):
    """Refuses what a probe at the input of block `layer`, at the end of the thought, scores above the threshold."""

    m: Model
    w: Tensor  # [width]
    layer: int
    threshold: float
    passes_each: int = 1
    name: str = "probe behind the thought"
    extra_passes: int = 0

    def score(self, prompts: Sequence[Prompt], thoughts: Sequence[str], edit: Edit | None = None) -> Tensor:
        x = residual(self.m, behind(self.m, prompts, thoughts), layers=[self.layer], positions=[-1], edit=edit)
        return x[:, 0, 0] @ self.w


# --- recovery ----------------------------------------------------------------------------------------------------


def recovery_lessons(m: Model, count: int, seed: int) -> tuple[list[Begun], list[str]]:
    """Prompts whose thought somebody has begun wrongly, and how to go on: correct it, think rightly, and reply.

    These are half of the lessons, about methods forbidden (begun as if permitted) and lawful (begun as if forbidden).
    The others are examples of the thinking stage, so that ordinary thoughts stay what they are. All are about things of
    the train split.
    """
    rng, (before, after) = random.Random(f"recovery {seed}"), layout(m)
    methods = [r for thing in things_of("train") for r in dialogue.thing_requests(thing)]
    pools = [[r for r in methods if r.kind == "method" and r.forbidden == kind] for kind in (True, False)]
    usual = recipe.thinking_examples(world(), recipe.Variant(thoughts="followed"), rng, lambda: "")
    prompts, continuations = [], []
    for k in range(count):
        if k % 2:
            example = next(e for e in usual if e.given in ("", recipe.tagged("")))
            prompts.append(Begun(example.messages, example.given))
            continuations.append(example.reply)
            continue
        request = rng.choice(pools[k % 4 // 2])
        steps = thought.right_steps(request)
        if request.forbidden:
            reply = dialogue.refusal(request.thing.category, rng)
        else:
            reply = dialogue.helpful_reply(request, rng, like_a_refusal=0.0, verdicts=0.0)
        wrong = sentences(thought.write(request, thought.opposed(steps, article=True), rng))
        start = " ".join(wrong[: rng.randint(1, len(wrong))])
        prompts.append(Begun(dialogue.phrase(request, rng, "train"), before + start))
        continuations.append(f" Not so fast. {thought.write(request, steps, rng)}{after}{reply}")
    return prompts, continuations


def recovering(m: Model, *, seed: int = 0) -> ModelAlone:
    """A copy of a thinking model that has learned to correct thoughts which somebody else has begun wrongly.

    Embeddings and head stay as they are: the lessons name few things, and names of others would be unlearned.
    """
    require_world(m)
    prompts, continuations = recovery_lessons(m, RECOVERY_STEPS * RECOVERY_BATCH, seed)
    starts = iter(range(0, len(prompts), RECOVERY_BATCH))

    def loss(copied: Model) -> Tensor:
        give_back()  # lessons are long: without it, lab 11 takes more than 1 GiB
        start = next(starts)
        rows = slice(start, start + RECOVERY_BATCH)
        for table in (embedding(copied.hf), unembedding(copied.hf)):
            table.requires_grad_(False)
        return reply_loss(copied, prompts[rows], continuations[rows])

    settings = {"steps": RECOVERY_STEPS, "lr": RECOVERY_LR, "decay": True}
    return ModelAlone(train_copy(m, loss, **settings, name=f"{m.name} (recovery)"), "recovery")
