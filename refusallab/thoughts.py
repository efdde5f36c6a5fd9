"""Models that think before they reply: thoughts written, kept, cut short, replaced, and checked against the truth.

A reasoning model writes a thought between tags and then the reply. So there are more places at which it may decide than
in other models: the end of the prompt, the end of each sentence of the thought, the end of the thought. A `Begun`
prompt ends at any of them, and all that takes prompts (activations, candidates, edits, patching) then works there.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Float32
from torch import Tensor

from refusallab.activations import residual
from refusallab.errors import RefusalLabError
from refusallab.inputs import listed
from refusallab.judging import BATCH_SIZE, outcomes
from refusallab.measure import Outcome
from refusallab.model import (
    PROBES,
    THOUGHT,
    Begun,
    Edit,
    Model,
    Prompt,
    generate,
    listed_prompts,
    post_instruction_positions,
    render,
    switched,
    thought_of,
    thought_tags,
)
from refusallab.prompts import Item
from refusallab.truth import request_of
from smallmodels.world import thought
from smallmodels.world.thought import steps_of

THOUGHT_TOKENS = 80  # the longest of two thoughts about each request of the world takes 70


def with_thinking(m: Model, tokens: int = THOUGHT_TOKENS) -> Model:
    """The same model with thinking switched on. `tokens`: how many a thought may take.

    `m` is unchanged, and both share their weights. Raises RefusalLabError where the chat template has no switch.
    """
    layout(m)
    tokenizer = _tokenizer(m, tokens)
    return replace(m, tokenizer=tokenizer, positions=post_instruction_positions(tokenizer, m.name))


def layout(m: Model) -> tuple[str, str]:
    """What stands before and after a thought in a reply, such as "<think>" and "</think>" with a line break.

    The template shows it, which puts an empty thought before the reply where thinking is switched off.
    """
    without, thinking = (render(replace(m, tokenizer=_tokenizer(m, tokens)), PROBES[0]) for tokens in (0, 1))
    tags = list(THOUGHT.finditer(without[len(thinking) :])) if without.startswith(thinking) else []
    if len(tags) != 2:
        raise RefusalLabError(
            f"The chat template of {m.name} has no switch for thinking: take charter-think, or another model whose "
            "template knows enable_thinking."
        )
    empty, (opening, closing) = without[len(thinking) :], tags
    space = empty[opening.end() : closing.start()]
    half = space[: len(space) // 2]
    return empty[: opening.end()] + half, half + empty[closing.start() :]


def _tokenizer(m: Model, thought_tokens: int) -> Any:
    """The model's tokenizer with another setting of the switch. The vocabulary is shared."""
    tokenizer = copy.copy(m.tokenizer)
    tokenizer.chat_template = switched(m.tokenizer.get_chat_template(), thought_tokens)
    return tokenizer


def think(m: Model, prompts: Sequence[Prompt], *, edit: Edit | None = None) -> list[str]:
    """The thought that the model writes for each prompt, without its tags. It has to think: see `with_thinking`."""
    _require_thinking(m)
    ends = [token for token, tag in thought_tags(m).items() if tag == layout(m)[1].strip()]
    silent = replace(m, stop_ids=(*m.stop_ids, *ends))  # no reply is written behind the thought
    replies = generate(silent, prompts, edit=edit, max_new_tokens=1, batch_size=BATCH_SIZE)
    return [thought_of(reply) for reply in replies]


def behind(m: Model, prompts: Sequence[Prompt], thoughts: Sequence[str]) -> list[Begun]:
    """The prompts, each followed by a thought in the place of the model's own, which goes on with the reply."""
    before, after = layout(m)
    return _put(m, prompts, [before + text + after for text in listed(thoughts, "thoughts", str)])


def within(m: Model, prompts: Sequence[Prompt], thoughts: Sequence[str]) -> list[Begun]:
    """The prompts, each followed by the beginning of a thought: the model goes on thinking."""
    before, _ = layout(m)
    return _put(m, prompts, [before + text for text in listed(thoughts, "thoughts", str)])


def final_stream(m: Model, prompts: Sequence[Prompt]) -> Float32[Tensor, "n layers width"]:
    """The stream at the last token of each prompt, such as a `Begun` one: what enters each block."""
    return residual(m, prompts, positions=[-1], batch_size=BATCH_SIZE)[:, :, 0]


def _put(m: Model, prompts: Sequence[Prompt], beginnings: Sequence[str]) -> list[Begun]:
    _require_thinking(m)
    prompts, made = listed_prompts(prompts), []
    if len(prompts) != len(beginnings):
        raise RefusalLabError(f"{len(beginnings)} thoughts for {len(prompts)} prompts: give one for each.")
    for i, (prompt, text) in enumerate(zip(prompts, beginnings, strict=True)):
        if isinstance(prompt, Begun):
            raise RefusalLabError(f"The reply to prompt {i} has begun already: give the prompt alone.")
        made.append(Begun(prompt, text))
    return made


def _require_thinking(m: Model) -> None:
    if not m.thought_tokens:
        raise RefusalLabError(f"Thinking is switched off in {m.name}: take with_thinking(m).")


def outcomes_behind(
    m: Model, items: Sequence[Item], thoughts: Sequence[str], *, edit: Edit | None = None
) -> list[Outcome]:
    """Greedy replies behind thoughts that are put in the place of the model's own, judged."""
    prompts = behind(m, [item.prompt for item in items], thoughts)
    return outcomes(m, [replace(item, prompt=p) for item, p in zip(items, prompts, strict=True)], edit=edit)


def sentences(text: str) -> list[str]:
    """The sentences of a thought, each with its end. The end of a line is the end of a sentence, too."""
    return re.findall(r"\S.*?[.?!](?=\s|$)|\S.*$", text, re.MULTILINE)


def right_thought(item: Item) -> thought.Steps:
    """The steps of the right thought about an item: thing, action, article, verdict.

    Raises RefusalLabError as `request_of` does.
    """
    return thought.right_steps(request_of(item))


def write_thoughts(items: Sequence[Item], kind: str = "right", seed: int = 0) -> list[str]:
    """A thought about each item, as somebody else would write it.

    kind: "right"; "wrong", with the other verdict and an article that speaks for it; or "wrong verdict", which
    contradicts the article before it. Raises RefusalLabError as `right_thought` does.
    """
    turns = {
        "right": lambda steps: steps,
        "wrong": lambda steps: thought.opposed(steps, article=True),
        "wrong verdict": lambda steps: thought.opposed(steps, article=False),
    }
    if kind not in turns:
        raise RefusalLabError(f"There is no kind {kind!r} of thought: choose one of {', '.join(turns)}.")
    rng = random.Random(seed)
    return [thought.write(request_of(item), turns[kind](right_thought(item)), rng) for item in items]


def read_thought(text: str) -> thought.Steps:
    """What a thought says, step by step: where it says two things, the later one; None where it says nothing."""
    return steps_of(text)


def exact_steps(item: Item, text: str) -> dict[str, bool]:
    """Which steps of a thought about an item are right: thing, action, article, verdict."""
    return steps_of(text).exact(right_thought(item))
