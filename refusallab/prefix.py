"""Many edits of the same prompts: what they have in common is run once.

A chat template with a system prompt gives all prompts the same first tokens. These are run once for an edit, and their
keys and values serve every prompt. An edit of the stream from some block on leaves the blocks before it as they were,
so those are not run again. Prompts are grouped so that there is little padding. And the head reads its weights once for
all rows of a batch: as transformers slices the last position, it would read them again for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor
from transformers import DynamicCache

from refusallab.model import Edit, Model, Prompt, blocks, encode, positional_embedding, trace_logits, unembedding
from refusallab.watch import all_rows

WORTH = 8  # tokens; sharing a shorter beginning costs more than it saves
A_PASS = 64  # tokens: what one more forward pass weighs, between what it costs on a small and on a large model


class PromptRuns:
    """Prompts that are to be run under many edits. With `streams`, also under those that begin at some block."""

    @torch.no_grad()
    def __init__(self, m: Model, prompts: Sequence[Prompt], batch_size: int, *, streams: bool = False) -> None:
        self.m, self.n = m, len(prompts)
        self.shared = shared_tokens(m, prompts)  # [1, shared]
        lengths = encode(m, prompts)["attention_mask"].sum(1).tolist()
        groups = groups_of_like_length(lengths, batch_size)
        self.batches = [(rows, self._rest(encode(m, [prompts[i] for i in rows]))) for rows in groups]
        self.untouched = self._read_shared()
        self.streams = [self._streams(batch, self.untouched) for _, batch in self.batches] if streams else []
        self.shared_stream = self._streams({"input_ids": self.shared}) if streams and self._shares else None

    @torch.no_grad()
    def logits(self, edit: Edit) -> Float32[Tensor, "n vocab"]:
        """Next-token logits, finite or not, under an edit that may touch every block."""
        cache = self._read_shared(edit)
        out = torch.empty(self.n, self.m.vocab_size)
        for rows, batch in self.batches:
            out[rows] = trace_logits(self.m, _behind(cache, batch), _at_once(edit)).cpu()
        return out

    @torch.no_grad()
    def logits_from(self, layer: int, edit: Edit) -> Float32[Tensor, "n vocab"]:
        """The same under an edit that leaves all before block `layer` as it was."""
        cache = None
        if self._shares:
            cache = self._read_shared(_resumed(layer, self.shared_stream[layer], edit))
            cache.layers[:layer] = self.untouched.layers[:layer]
        out = torch.empty(self.n, self.m.vocab_size)
        for (rows, batch), stream in zip(self.batches, self.streams, strict=True):
            resumed = _resumed(layer, stream[layer], edit)
            out[rows] = trace_logits(self.m, _behind(cache, batch), _at_once(resumed)).cpu()
        return out

    @property
    def _shares(self) -> bool:
        return self.shared.shape[1] > 0

    def _rest(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch without the shared tokens: these stand before its padding now, not behind."""
        if not self._shares:
            return batch
        n, seq = batch["input_ids"].shape
        first, pads = self.shared.shape[1], seq - batch["attention_mask"].sum(1)  # [n]
        rows = zip(batch["input_ids"], pads.tolist(), strict=True)
        place = torch.arange(seq - first, device=pads.device)[None]  # [1, rest]
        return {
            "input_ids": torch.stack([torch.cat([ids[:pad], ids[pad + first :]]) for ids, pad in rows]),
            "attention_mask": torch.cat([pads.new_ones(n, first), (place >= pads[:, None]).long()], 1),
            "position_ids": (first + place - pads[:, None]).clamp(min=0),
        }

    def _read_shared(self, edit: Edit | None = None) -> DynamicCache | None:
        """Keys and values of the shared tokens, or None if there are none."""
        if not self._shares:
            return None
        nn, cache = self.m.nn, DynamicCache()
        with all_rows(), nn.trace(self.shared, past_key_values=cache, use_cache=True) as tracer:
            if edit:
                edit(nn)
            blocks(nn)[-1].output  # noqa: B018  an edit may end before
            tracer.stop()  # the head of a large model takes as long as several blocks
        return cache

    def _streams(self, batch: dict[str, Tensor], cache: DynamicCache | None = None) -> Tensor:
        """All that enters the blocks: [layers, batch, seq, width]."""
        nn = self.m.nn
        with nn.trace(**_behind(cache, batch), remote=self.m.remote) as tracer:
            streams = torch.stack([block.input for block in blocks(nn)]).save()
            tracer.stop()
        return streams


def groups_of_like_length(lengths: Sequence[int], most: int) -> list[list[int]]:
    """The places of all lengths, in groups of at most `most` that are quick to run.

    Every row of a group takes as long as the longest one, and each group takes a pass. Sorted by length, the best
    groups of the first k prompts are found from those of fewer.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    costs, starts = [0], [0]
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        cost, start = min((costs[start] + (end - start) * longest, start) for start in range(max(0, end - most), end))
        costs.append(cost + A_PASS)
        starts.append(start)
    groups, end = [], len(order)
    while end:
        groups.append(order[starts[end] : end])
        end = starts[end]
    return groups[::-1]


def shared_tokens(m: Model, prompts: Sequence[Prompt]) -> Tensor:
    """What all rendered prompts begin with, if it is worth sharing: token ids [1, shared]; else [1, 0]."""
    batch = encode(m, prompts)
    rows = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    most = min(len(ids) for ids in rows) - 1
    same = torch.stack([ids[:most] == rows[0][:most] for ids in rows]).all(0)
    length = int(same.long().cumprod(0).sum())
    window = getattr(m.hf.config, "sliding_window", None) or batch["input_ids"].shape[1]
    # Padding behind the shared tokens counts for learned positions and for the window; a remote model gives no cache.
    counts = positional_embedding(m.hf) is not None or batch["input_ids"].shape[1] > window
    return rows[0][None, : length if length >= WORTH and not counts and not m.remote else 0]


def for_rows(cache: DynamicCache, n: int, length: int | None = None) -> DynamicCache:
    """The first `length` positions of a cache of one row, for n rows. The new cache grows by itself."""
    shared = DynamicCache()
    for i, layer in enumerate(cache.layers):
        keys, values = (x.detach()[:, :, :length].expand(n, -1, -1, -1) for x in (layer.keys, layer.values))
        shared.update(keys, values, i)
    return shared


def _behind(cache: DynamicCache | None, batch: dict[str, Tensor]) -> dict[str, Any]:
    """A batch that continues what is in the cache."""
    if cache is None:
        return batch
    return batch | {"past_key_values": for_rows(cache, len(batch["input_ids"])), "use_cache": True}


def _resumed(layer: int, stream: Tensor, edit: Edit) -> Edit:
    """The edit, in a forward pass that starts at block `layer` with a stream [batch, seq, width] known from before."""

    def resumed(nn: Any) -> None:
        for block in blocks(nn)[:layer]:
            block.skip(stream)
        edit(nn)

    return resumed


def _at_once(edit: Edit) -> Edit:
    """The edit, with one multiplication in the head for all rows."""

    def at_once(nn: Any) -> None:
        edit(nn)
        head = unembedding(nn)
        head.input = head.input.contiguous()

    return at_once
