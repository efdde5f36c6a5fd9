"""Edits of the same prompts with many vectors: what they have in common is run once.

A chat template with a system prompt gives all prompts the same first tokens. These are run once for an edit, and their
keys and values serve every prompt. An edit of the stream from some block on leaves the blocks before it as they were,
so those are not run again. Several vectors are run in one trace, each with rows of its own, since a trace of a small
model, or of any on an accelerator, takes longer to begin than to compute. Prompts are grouped so that there is little
padding. And the head reads its weights once for all rows of a batch: as transformers slices the last position, it would
read them again for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from transformers import DynamicCache

from refusallab.model import Edit, Model, Prompt, blocks, encode, positional_embedding, trace_logits, unembedding
from refusallab.watch import all_rows

WORTH = 8  # tokens; sharing a shorter beginning costs more than it saves
A_PASS = 64  # tokens: what one more forward pass weighs, between what it costs on a small and on a large model


EditOf = Callable[[Float[Tensor, "rows width"]], Edit]  # the edit that takes a vector for each row of a batch


class PromptRuns:
    """Prompts that are to be run with many vectors. With `streams`, also under edits that begin at some block."""

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
    def logits(self, edit_of: EditOf, vectors: Float[Tensor, "k width"]) -> Float32[Tensor, "k n vocab"]:
        """Next-token logits, finite or not, with each vector, under an edit that may touch every block."""
        cache, out = self._read_shared(edit_of(vectors), len(vectors)), self._empty(vectors)
        for rows, batch in self.batches:
            edit = edit_of(vectors.repeat_interleave(len(rows), 0))
            out[:, rows] = self._run(cache, batch, edit, len(vectors))
        return out

    @torch.no_grad()
    def logits_from(
        self, layer: int, edit_of: EditOf, vectors: Float[Tensor, "k width"]
    ) -> Float32[Tensor, "k n vocab"]:
        """The same under an edit that leaves all before block `layer` as it was."""
        k, cache, out = len(vectors), None, self._empty(vectors)
        if self._shares:
            cache = self._read_shared(_resumed(layer, self.shared_stream[layer], edit_of(vectors), k), k)
            cache.layers[:layer] = self.untouched.layers[:layer]
        for (rows, batch), stream in zip(self.batches, self.streams, strict=True):
            edit = edit_of(vectors.repeat_interleave(len(rows), 0))
            out[:, rows] = self._run(cache, batch, _resumed(layer, stream[layer], edit, k), k)
        return out

    def _empty(self, vectors: Tensor) -> Tensor:
        return torch.empty(len(vectors), self.n, self.m.vocab_size)

    def _run(self, cache: DynamicCache | None, batch: dict[str, Tensor], edit: Edit, k: int) -> Tensor:
        """Logits [k, batch, vocab] of a batch that is run k times side by side."""
        several = {name: x.repeat(k, 1) for name, x in batch.items()}
        return trace_logits(self.m, _behind(cache, several), _at_once(edit)).cpu().unflatten(0, (k, -1))

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

    def _read_shared(self, edit: Edit | None = None, k: int = 1) -> DynamicCache | None:
        """Keys and values of the shared tokens, k times side by side, or None if there are none."""
        if not self._shares:
            return None
        nn, cache = self.m.nn, DynamicCache()
        with all_rows(), nn.trace(self.shared.repeat(k, 1), past_key_values=cache, use_cache=True) as tracer:
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
    """The first `length` positions of a cache of one row, for n rows; of k rows, each n / k times. The new cache
    grows by itself.
    """
    shared = DynamicCache()
    for i, layer in enumerate(cache.layers):
        first = (x.detach()[:, None, :, :length] for x in (layer.keys, layer.values))
        keys, values = (x.expand(-1, n // len(x), -1, -1, -1).flatten(0, 1) for x in first)
        shared.update(keys, values, i)
    return shared


def _behind(cache: DynamicCache | None, batch: dict[str, Tensor]) -> dict[str, Any]:
    """A batch that continues what is in the cache."""
    if cache is None:
        return batch
    return batch | {"past_key_values": for_rows(cache, len(batch["input_ids"])), "use_cache": True}


def _resumed(layer: int, stream: Tensor, edit: Edit, k: int) -> Edit:
    """The edit, in a forward pass that starts at block `layer` with a stream [batch, seq, width] known from before, k
    times side by side.
    """
    several = stream.repeat(k, 1, 1)

    def resumed(nn: Any) -> None:
        for block in blocks(nn)[:layer]:
            block.skip(several)
        edit(nn)

    return resumed


def _at_once(edit: Edit) -> Edit:
    """The edit, with one multiplication in the head for all rows."""

    def at_once(nn: Any) -> None:
        edit(nn)
        head = unembedding(nn)
        head.input = head.input.contiguous()

    return at_once
