"""Running prompts, with or without an edit: logits at the last token, greedy replies."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicLayer, LogitsProcessor

from refusallab.bars import with_bar
from refusallab.errors import RefusalLabError
from refusallab.model.parts import Begun, Edit, Model, Prompt
from refusallab.model.prompts import batches, check_length, listed_prompts, text_behind
from refusallab.model.templates import THOUGHT, end_of_turn, spoken
from refusallab.watch import all_rows

# Hub models ship sampling settings, repetition penalties, which change even greedy decoding, and settings of the cache.
GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "use_cache": True,
    "cache_implementation": None,
}


def logits(
    m: Model,
    prompts: Iterable[Prompt],
    *,
    edit: Edit | None = None,
    system: str | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Next-token logits at the last prompt token: fp32 [n, vocab], in the order of the prompts.

    Raises RefusalLabError, with the prompt, where they are not finite.
    """
    out = unchecked_logits(m, prompts, edit=edit, system=system, batch_size=batch_size)
    require_finite(m, out, edit)
    return out


@torch.no_grad()
def unchecked_logits(
    m: Model, prompts: Iterable[Prompt], *, edit: Edit | None, system: str | None = None, batch_size: int
) -> Tensor:
    """`logits`, finite or not: for searches, in which an edit may be too strong and then scores badly."""
    prompts = listed_prompts(prompts)
    out = torch.empty(len(prompts), m.vocab_size)
    for rows, batch in batches(m, prompts, batch_size, edit=edit, system=system):
        out[rows] = trace_logits(m, batch, edit or no_edit).cpu()
    return out


def generate(
    m: Model,
    prompts: Iterable[Prompt],
    *,
    edit: Edit | None = None,
    system: str | None = None,
    prefill: str = "",
    max_new_tokens: int = 40,
    batch_size: int = 64,
    processor: Callable[[list[int], dict[str, Tensor]], LogitsProcessor] | None = None,
) -> list[str]:
    """Greedy replies in the order of the prompts: what follows prompt and `prefill`, up to the end of turn.

    A model that thinks writes its thought first, which may take `m.thought_tokens` more than `max_new_tokens`.
    `edit` is applied in the forward pass of every token. `processor(rows, batch)` makes what changes the logits of
    every step, for a batch of the prompts with the numbers `rows`. Raises RefusalLabError, with the prompt, where
    logits are not finite; those of a remote model are not checked, and it takes no processor.
    """
    if processor and m.remote:
        raise RefusalLabError(f"{m.name} is remote, where replies are greedy: load it without remote.")
    prompts = listed_prompts(prompts)
    max_new_tokens += m.thought_tokens
    replies, cut = [""] * len(prompts), []
    (_, end), tags = end_of_turn(m.tokenizer), thought_tags(m)
    encoded = batches(m, prompts, batch_size, edit=edit, system=system, prefill=prefill)
    for rows, batch in with_bar(encoded, "replies", math.ceil(len(prompts) / batch_size)):
        width = batch["input_ids"].shape[1]
        check_length(m, width + max_new_tokens)
        highest = _Highest(width, m.stop_ids)
        settings = {
            **GREEDY,
            "max_new_tokens": max_new_tokens,
            "eos_token_id": list(m.stop_ids) or None,
            "pad_token_id": m.tokenizer.pad_token_id,
        }
        if not m.remote:
            settings["past_key_values"] = Cache(layer_class_to_replicate=partial(_Roomy, width + max_new_tokens))
            settings["logits_processor"] = [highest, *([processor(rows, batch)] if processor else [])]
        if edit is None and not m.remote:
            ids = m.hf.generate(**batch, **settings)
        else:
            ids = _trace_generate(m, batch, edit or no_edit, settings)
        if highest.seen:
            require_finite(m, torch.stack(highest.seen, 1), edit, rows)
        for i, last, new in zip(rows, ids[:, width - 1].tolist(), ids[:, width:].tolist(), strict=True):
            head = [last] if prefill or isinstance(prompts[i], Begun) else []
            stop = next((k for k, token in enumerate(new) if token in m.stop_ids), len(new))
            closing = [token for token in new[stop : stop + 1] if token in tags]  # where a thought is all that is asked
            replies[i] = _text(m, head, new[:stop] + closing, tags)
            if end:
                replies[i] = replies[i].partition(end)[0]
            if stop == len(new):
                cut.append(replies[i])
    unfinished = sum(isinstance(reply, str) and bool(reply.strip()) and not spoken(reply).strip() for reply in cut)
    if unfinished:
        warnings.warn(
            f"{unfinished} of {len(replies)} replies end within a thought and say nothing: raise max_new_tokens.",
            stacklevel=2,
        )
    return replies


def no_edit(nn: Any) -> None:
    """The edit that changes nothing."""


def trace_logits(m: Model, batch: dict[str, Tensor], edit: Edit) -> Tensor:
    """Next-token logits of an encoded batch under an edit: fp32 [batch, vocab], on the model's device.

    Gradients flow through it, where they are enabled and something wants them.
    """
    nn = m.nn  # a trace ships every name that it reads: keep m out of it
    with all_rows(), nn.trace(**batch, logits_to_keep=1, remote=m.remote):
        edit(nn)
        last = nn.output.logits[:, -1].save()
    return last.float()


def require_finite(m: Model, values: Tensor, edit: Edit | None, rows: Sequence[int] | None = None) -> None:
    """RefusalLabError, with the first prompt and what to do, unless all values [n, ...] of the prompts are finite.

    `rows` are the places of the prompts, where these are not all of them in their order.
    """
    bad = (~values.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    if not bad:
        return
    first, others = (rows or range(len(values)))[bad[0]], len(bad) - 1
    dtype = str(m.hf.dtype).removeprefix("torch.")
    edited = edit not in (None, no_edit)
    remedy = "the edit is too strong" if edited else "the weights may be damaged: fetch them again"
    if m.hf.dtype == torch.float16:
        remedy = "load the model with dtype=torch.bfloat16 or torch.float32, which hold larger numbers"
    raise RefusalLabError(
        f"Prompt {first}{f' and {others} more' if others else ''}: {m.name} computes numbers that are not finite in "
        f"{dtype}; {remedy}."
    )


class _Roomy(DynamicLayer):
    """Keys and values in a tensor with room for all tokens: one that grows is copied at every token.

    Only the part that is filled is attended to; transformers' static cache attends to the empty part, too.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.all = [x.new_empty(*x.shape[:-2], self.room, x.shape[-1]) for x in (key_states, value_states)]
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for whole, new in zip(self.all, (key_states, value_states), strict=True):
            whole[..., start:end, :] = new
        self.keys, self.values = (whole[..., :end, :] for whole in self.all)
        return self.keys, self.values


class _Highest(LogitsProcessor):
    """Notes the highest logit of every step, [batch], which is not finite when one of them is NaN or +inf."""

    def __init__(self, width: int, stop_ids: tuple[int, ...]) -> None:
        self.width, self.stop_ids = width, torch.tensor(stop_ids)
        self.seen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ended = torch.isin(input_ids[:, self.width :], self.stop_ids.to(input_ids)).any(1)
        self.seen.append(scores.amax(-1).float().masked_fill(ended, 0.0))
        return scores


def thought_tags(m: Model) -> dict[int, str]:
    """The tokens that open or close a thought: id -> text. A tag that is several tokens is not among them."""
    return {i: str(tag) for i, tag in m.tokenizer.added_tokens_decoder.items() if THOUGHT.fullmatch(str(tag))}


def _text(m: Model, anchor: list[int], ids: list[int], tags: dict[int, str]) -> str:
    """The text of a reply behind the last token before it: no special tokens, but the tags of thoughts."""
    pieces, between = [[]], []
    for token in ids:
        if token in tags:
            between.append(tags[token])
            pieces.append([])
        else:
            pieces[-1].append(token)
    first, *rest = pieces
    text = text_behind(m, anchor, first) if anchor else m.tokenizer.decode(first, skip_special_tokens=True)
    for tag, piece in zip(between, rest, strict=True):
        text += tag + m.tokenizer.decode(piece, skip_special_tokens=True)
    return text


@torch.no_grad()
def _trace_generate(m: Model, batch: dict[str, Tensor], edit: Edit, settings: dict[str, Any]) -> Tensor:
    nn, n_steps = m.nn, settings["max_new_tokens"]
    with warnings.catch_warnings():
        # All replies may end before the last step; nnsight then says that the loop was cut short.
        warnings.filterwarnings("ignore", message=r".*was never reached")
        with all_rows(), nn.generate(**settings, remote=m.remote) as tracer:
            with tracer.invoke(**batch):
                for _ in tracer.iter[:n_steps]:  # a bounded loop: a run whose edit touches nothing must end too
                    edit(nn)
            with tracer.invoke():  # a second reader: the first one may be cut short
                ids = tracer.result.save()
    return ids
