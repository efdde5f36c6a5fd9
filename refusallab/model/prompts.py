"""Prompts as tokens: rendered, padded on the left, in batches of like length."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from refusallab.errors import RefusalLabError
from refusallab.inputs import listed
from refusallab.model.parts import Begun, Edit, Model, Prompt, embedding
from refusallab.model.templates import apply_template, end_of_turn, messages


def render(m: Model, prompt: Prompt, *, system: str | None = None, prefill: str = "") -> str:
    """The text that the model reads: template, generation prompt, then the start of the reply.

    The reply starts with what a `Begun` prompt brings along, then `prefill`.

    Without `system` the template decides: some (Qwen2.5, SmolLM2) insert a default system prompt. Where the
    template has no system role (Gemma) or does not keep the words, the system prompt goes in front of the first user
    turn. Where the template opens a thought, it is closed at once, with a warning.
    """
    if not isinstance(prefill, str):
        raise RefusalLabError(f"prefill is {reprlib.repr(prefill)}: give the first words of the reply as one text.")
    begun = prompt.reply if isinstance(prompt, Begun) else ""
    return apply_template(m.tokenizer, messages(prompt, system), m.name) + begun + prefill


def encode(m: Model, prompts: Iterable[Prompt], *, system: str | None = None, prefill: str = "") -> dict[str, Tensor]:
    """Rendered prompts as {"input_ids", "attention_mask"}, each [n, seq], padded on the left."""
    texts = [render(m, prompt, system=system, prefill=prefill) for prompt in listed_prompts(prompts)]
    batch = m.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    check_length(m, batch["input_ids"].shape[1])
    _check_ids(m, batch["input_ids"])
    return {key: batch[key].to(m.device) for key in ("input_ids", "attention_mask")}


def encode_texts(
    m: Model, texts: Iterable[str], prompts: Iterable[Prompt] | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Texts whose tokens are to be predicted: (a batch as from `encode`, counted [n, seq] bool).

    Without prompts a text stands alone, and all its tokens count except the first, which nothing precedes. With
    prompts, text i is the reply to prompt i: it follows the rendered prompt, the end of the turn follows it, and only
    the tokens of the reply and its end count.
    """
    texts = listed(texts, "texts", str)
    if not texts:
        raise RefusalLabError("The list of texts is empty: give at least one.")
    if prompts is None:
        rows = [(ids, 1) for ids in m.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        if empty := [i for i, (ids, _) in enumerate(rows) if not ids]:
            raise RefusalLabError(f"Text {empty[0]} is empty, so it has no token to predict: leave it out.")
    else:
        prompts = listed_prompts(prompts)
        if len(prompts) != len(texts):
            raise RefusalLabError(f"{len(texts)} replies to {len(prompts)} prompts: give one reply for each.")
        end = [i for i in (end_of_turn(m.tokenizer)[0], m.tokenizer.eos_token_id) if i is not None][:1]
        rows = []
        for prompt, text in zip(prompts, texts, strict=True):
            head = render(m, prompt)
            ids = ids_of(m, head)
            rows.append(([*ids, *ids_behind(m, head, text), *end], len(ids)))
    width = max(len(ids) for ids, _ in rows)
    check_length(m, width)
    pads = [width - len(ids) for ids, _ in rows]
    ids = torch.tensor([[m.tokenizer.pad_token_id] * pad + row for pad, (row, _) in zip(pads, rows, strict=True)])
    _check_ids(m, ids)
    place = torch.arange(width)[None]  # [1, seq]
    start, first = torch.tensor(pads)[:, None], torch.tensor([first for _, first in rows])[:, None]  # [n, 1]
    batch = {"input_ids": ids, "attention_mask": (place >= start).long()}
    return {key: value.to(m.device) for key, value in batch.items()}, (place >= start + first).to(m.device)


def ids_of(m: Model, text: str) -> list[int]:
    """The tokens of a text, with nothing added."""
    return m.tokenizer(text, add_special_tokens=False)["input_ids"]


def ids_behind(m: Model, head: str, text: str) -> list[int]:
    """The tokens of a text that follows another one.

    Many tokenizers put a mark before the first word of whatever they read, so that a text alone has other tokens. Where
    the text joins the last token of `head`, its tokens are those that it has alone.
    """
    before, whole = ids_of(m, head), ids_of(m, head + text)
    return whole[len(before) :] if whole[: len(before)] == before else ids_of(m, text)


def text_behind(m: Model, anchor: Sequence[int], ids: Sequence[int]) -> str:
    """The text of tokens that follow others: some tokenizers strip the first space of what they decode."""
    settings = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before, whole = (m.tokenizer.decode([*anchor, *row], **settings) for row in ([], ids))
    return whole[len(before) :]


def listed_prompts(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Prompts as a list, in their own order. Raises RefusalLabError, with the place, for any that is not a prompt."""
    prompts = listed(prompts, "prompts")
    if not prompts:
        raise RefusalLabError("The list of prompts is empty: give at least one.")
    for i, prompt in enumerate(prompts):
        try:
            turns = messages(prompt)
        except RefusalLabError as error:
            raise RefusalLabError(f"Prompt {i}: {error}") from None
        if isinstance(prompt, Begun) and not isinstance(prompt.reply, str):
            raise RefusalLabError(f"Prompt {i}: its reply begins with {reprlib.repr(prompt.reply)}: give a text.")
        prompts[i] = prompt if isinstance(prompt, str | Begun) else turns
    return prompts


def check_length(m: Model, n_tokens: int) -> None:
    limit = getattr(m.hf.config, "max_position_embeddings", None)
    if limit and n_tokens > limit:
        raise RefusalLabError(f"{n_tokens} tokens, but {m.name} reads at most {limit}: shorten the prompt or reply.")


def _check_ids(m: Model, ids: Tensor) -> None:
    rows = embedding(m.hf).weight.shape[0]
    if ids.max() >= rows:
        token = m.tokenizer.convert_ids_to_tokens(ids.max().item())
        raise RefusalLabError(
            f"The token {token!r} is known to the tokenizer but {m.name} has only {rows} tokens: "
            "take it out of the prompt or the chat template."
        )


def check_batches(count: int, batch_size: int, edit: Edit | None = None) -> None:
    """RefusalLabError for a batch without prompts, and for an edit of each row unless one batch has just these rows."""
    if batch_size < 1:
        raise RefusalLabError(f"batch_size is {batch_size}: give at least 1.")
    rows = getattr(edit, "rows", None)
    if rows is not None and not rows == count <= batch_size:
        raise RefusalLabError(
            f"The edit is for {rows} prompts in one batch, but there are {count} in batches of {batch_size}: give one "
            "row for each prompt, and a batch_size that holds all prompts."
        )


def batches(
    m: Model, prompts: Iterable[Prompt], batch_size: int, *, edit: Edit | None = None, **settings: Any
) -> Iterator[tuple[list[int], dict]]:
    """Encoded prompts in batches, as (indices of the prompts, encoded batch).

    One batch keeps the order of the prompts, so that an edit may hold one direction per row. Several batches
    are sorted by length, which saves padding, and an `edit` with `rows` is refused. So is one whose `reach`, in tokens
    from the end, is more than a prompt has.
    """
    prompts = listed_prompts(prompts)
    check_batches(len(prompts), batch_size, edit)
    order = list(range(len(prompts)))
    if len(prompts) > batch_size:
        order.sort(key=lambda i: len(render(m, prompts[i])))
    parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    encoded = (encode(m, [prompts[i] for i in rows], **settings) for rows in parts)
    return ((rows, _long_enough(batch, edit)) for rows, batch in zip(parts, encoded, strict=True))


def _long_enough(batch: dict[str, Tensor], edit: Edit | None) -> dict[str, Tensor]:
    """The batch. RefusalLabError for an edit of tokens that one of its prompts does not have."""
    reach, shortest = getattr(edit, "reach", 0), int(batch["attention_mask"].sum(1).min())
    if reach > shortest:
        raise RefusalLabError(
            f"The edit acts {reach} tokens before the end, but the shortest prompt has {shortest}: take positions from "
            f"{-shortest} on, or longer prompts."
        )
    return batch
