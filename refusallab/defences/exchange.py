"""Watchers of the exchange: they read the reply as well as the request, when it is done or while it is written.

A probe on single tokens raises false alarms over a long reply, so a stream is judged by the mean of several in a row
(He et al. 2026, arXiv 2604.14865; the highest rolling mean: Kramár et al. 2026, arXiv 2601.11516). A cascade sends only
what a cheap watcher suspects to an expensive one (Cunningham, Wei et al. 2026, arXiv 2601.04603).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from refusallab.activations import residual
from refusallab.defence import Defence, Watcher, exchanges, last_words, stock_refusal, write_replies
from refusallab.defences.monitor import Monitor, linear_probe
from refusallab.defences.thresholds import threshold_at
from refusallab.defences.traffic import sample_exchanges
from refusallab.errors import RefusalLabError
from refusallab.inputs import listed
from refusallab.judging import BATCH_SIZE
from refusallab.model import Begun, Edit, Model, Prompt, ids_behind, ids_of, listed_prompts, load, render, text_behind
from refusallab.prompts import Item, require_world
from refusallab.thoughts import think, with_thinking
from smallmodels.world import thought
from smallmodels.world.thought import steps_of

FALSE_ALARMS = 0.02  # of harmless validation exchanges
EXCHANGES = 200  # of each kind, train and validation
WINDOW = 4  # tokens
EXCHANGE_LAYER = 6  # the block whose input caught most validation exchanges of charter-talk-first, of 3 to 7
SINGLE_LAYER = 5  # for charter-chat and exchanges of one turn, of 4 to 7: best at the end, second best for the stream


class AfterReply:
    """A defence that lets the model answer, scores the reply, and refuses in its place above a threshold."""

    m: Model
    threshold: float
    passes_each: int  # forward passes for a score
    extra_passes: int

    def score(self, prompts: Sequence[Prompt], replies: Sequence[str], edit: Edit | None = None) -> Tensor:
        """How suspicious each reply is: [n]. `edit` is the attacker's."""
        raise NotImplementedError

    def read(self, reply: str) -> str:
        """What of a reply is scored."""
        return reply

    def replies(self, prompts: Sequence[Prompt], *, edit: Edit | None = None, prefill: str = "") -> list[str]:
        prompts = listed_prompts(prompts)
        said = write_replies(self.m, prompts, edit=edit, prefill=prefill)
        asked, whole = exchanges(prompts, [prefill + reply for reply in said])
        self.extra_passes += self.passes_each * len(prompts)
        alarms = (self.score(asked, [self.read(reply) for reply in whole], edit) > self.threshold).tolist()
        return [stock_refusal(self.m) if alarm else reply for alarm, reply in zip(alarms, said, strict=True)]


@dataclass
class ExchangeProbe(AfterReply):
    """Refuses when a probe at the input of block `layer`, at the last token of the reply, is above the threshold."""

    m: Model
    w: Tensor  # [width]
    layer: int
    threshold: float
    passes_each: int = 0  # serving has computed the stream already
    name: str = "exchange probe"
    extra_passes: int = 0

    def score(self, prompts: Sequence[Prompt], replies: Sequence[str], edit: Edit | None = None) -> Tensor:
        ended = [Begun(prompt, reply) for prompt, reply in zip(*exchanges(prompts, replies), strict=True)]
        x = residual(self.m, ended, layers=[self.layer], positions=[-1], edit=edit, batch_size=BATCH_SIZE)
        return x[:, 0, 0] @ self.w


@dataclass
class StreamingProbe:
    """Stops a reply at the token where the mean of the last `window` scores is above the threshold, and then refuses.

    What was written before has been seen: it stays in the reply.
    """

    m: Model
    w: Tensor  # [width]
    layer: int
    threshold: float
    window: int = WINDOW
    name: str = "streaming probe"
    extra_passes: int = 0  # serving has computed the streams already

    def score(self, prompts: Sequence[Prompt], replies: Sequence[str], edit: Edit | None = None) -> Tensor:
        """The highest mean in each reply: [n]."""
        streams = reply_streams(self.m, prompts, replies, self.layer, edit=edit)
        return torch.stack([rolling_means(x @ self.w, self.window).max() for x in streams])

    def stops(self, prompts: Sequence[Prompt], replies: Sequence[str], edit: Edit | None = None) -> list[int | None]:
        """For each reply the number of tokens that were written when it was stopped; None for one that was not."""
        found: list[int | None] = []
        for x in reply_streams(self.m, prompts, replies, self.layer, edit=edit):
            high = (rolling_means(x @ self.w, self.window) > self.threshold).nonzero().flatten().tolist()
            found.append(high[0] + 1 if high else None)
        return found

    def replies(self, prompts: Sequence[Prompt], *, edit: Edit | None = None, prefill: str = "") -> list[str]:
        prompts = listed_prompts(prompts)
        said = write_replies(self.m, prompts, edit=edit, prefill=prefill)
        asked, whole = exchanges(prompts, [prefill + reply for reply in said])
        shown = []
        for prompt, text, reply, stop in zip(asked, whole, said, self.stops(asked, whole, edit), strict=True):
            if stop is not None:
                seen = first_tokens(self.m, prompt, text, stop)[len(text) - len(reply) :]
                reply = f"{seen} {stock_refusal(self.m)}".strip()
            shown.append(reply)
        return shown


def rolling_means(scores: Float[Tensor, " tokens"], window: int) -> Float[Tensor, " tokens"]:
    """At each token the mean of the last `window` scores; before that many are there, of all so far."""
    if window < 1:
        raise RefusalLabError(f"A window holds at least one token, not {window}.")
    ends = range(1, len(scores) + 1)
    return torch.stack([scores[max(0, end - window) : end].mean() for end in ends])


def reply_streams(
    m: Model, prompts: Sequence[Prompt], replies: Sequence[str], layer: int, *, edit: Edit | None = None
) -> list[Tensor]:
    """The stream at the input of a block at each token of each reply: [tokens, width] each.

    A reply that its prompt has begun is read with the beginning. The stream of an empty reply is that of the last token
    of its prompt.
    """
    prompts, replies = exchanges(listed_prompts(prompts), listed(replies, "replies", str))
    lengths = [max(1, len(ids_behind(m, render(m, p), reply))) for p, reply in zip(prompts, replies, strict=True)]
    streams: dict[int, Tensor] = {}
    for length in sorted(set(lengths)):
        rows = [i for i, n in enumerate(lengths) if n == length]
        ended: list[Prompt] = [Begun(prompts[i], replies[i]) for i in rows]
        places = list(range(-length, 0))
        x = residual(m, ended, layers=[layer], positions=places, edit=edit, batch_size=BATCH_SIZE)[:, 0]
        streams |= dict(zip(rows, x, strict=True))
    return [streams[i] for i in range(len(replies))]


def first_tokens(m: Model, prompt: Prompt, reply: str, count: int) -> str:
    """The text of the first `count` tokens of a reply."""
    head = render(m, prompt)
    ids = ids_behind(m, head, reply)[:count]
    return text_behind(m, ids_of(m, head)[-1:], ids)


@dataclass
class Reader(Watcher):
    """A second model that thinks about the last message alone, and calls it forbidden or not."""

    m: Model
    reader: Model  # one that thinks
    threshold: float = 0.5
    passes_each: int = 0  # counted by the tokens of the thoughts
    name: str = "reader"
    extra_passes: int = 0

    def score(self, prompts: Sequence[Prompt], edit: Edit | None = None) -> Tensor:
        if not prompts:
            return torch.zeros(0)
        thoughts = think(self.reader, [last_words(prompt) for prompt in prompts])
        tokens = self.reader.tokenizer(thoughts, add_special_tokens=False)["input_ids"]
        self.extra_passes += sum(len(ids) + 1 for ids in tokens)
        return torch.tensor([float(steps_of(text).verdict == thought.FORBIDDEN) for text in thoughts])


@dataclass
class Cascade(Watcher):
    """Refuses what the second watcher refuses, among the requests that the first one suspects."""

    m: Model
    first: Watcher
    second: Watcher
    name: str = "cascade"

    @property
    def extra_passes(self) -> int:
        return self.first.extra_passes + self.second.extra_passes

    def alarms(self, prompts: Sequence[Prompt], edit: Edit | None = None) -> Tensor:
        prompts = listed_prompts(prompts)
        alarms = self.first.alarms(prompts, edit)
        suspects = alarms.nonzero().flatten().tolist()
        if suspects:
            alarms[suspects] = self.second.alarms([prompts[i] for i in suspects], edit)
        return alarms


def fit_exchange(
    m: Model, layer: int, *, window: int = WINDOW, count: int = EXCHANGES, turns: int = 5
) -> tuple[ExchangeProbe, StreamingProbe]:
    """A probe at the end of the exchange and one for the stream, at the input of block `layer`.

    Directions come from train exchanges. Each threshold lets FALSE_ALARMS of harmless validation exchanges be stopped:
    for the stream by the highest mean of a reply, since each of its tokens may raise the alarm. turns: the most earlier
    turns that an exchange has; 0 for models that were trained on single ones.
    """
    require_world(m)
    train, (_, val) = (sample_exchanges(split, count, turns=turns) for split in ("train", "val"))
    streams = [reply_streams(m, *_texts(items), layer) for items in train]
    ends = [torch.stack([x[-1] for x in several]) for several in streams]
    at_end = ExchangeProbe(m, linear_probe(*ends), layer, 0.0)
    along = StreamingProbe(m, linear_probe(*(torch.cat(several) for several in streams)), layer, 0.0, window)
    for watcher in (at_end, along):
        watcher.threshold = threshold_at(watcher.score(*_texts(val)), FALSE_ALARMS)
    return at_end, along


def _texts(items: Sequence[Item]) -> tuple[list[Prompt], list[str]]:
    return [item.prompt for item in items], [item.answer or "" for item in items]


def exchange_defences(m: Model, layer: int, position: int) -> list[Defence]:
    """A prompt probe fitted on conversations, both probes of the exchange, a reader, the cascade of probe and reader.

    layer, position: where the prompt probe reads, such as where the refusal direction is found. The cascade passes on
    what the probe suspects at ten times the usual rate of false alarms.
    """
    require_world(m)
    train, (_, val) = sample_exchanges("train", EXCHANGES), sample_exchanges("val", EXCHANGES)
    site = {"layers": [layer], "positions": [position], "batch_size": BATCH_SIZE}
    w = linear_probe(*(residual(m, _texts(items)[0], **site)[:, 0, 0] for items in train))
    usual = residual(m, _texts(val)[0], **site)[:, 0, 0] @ w
    strict, lax = (
        Monitor(m, w, layer, position, threshold_at(usual, share), name="prompt probe")
        for share in (FALSE_ALARMS, 10 * FALSE_ALARMS)
    )
    thinker = with_thinking(load("charter-think"))
    cascade = Cascade(m, lax, Reader(m, thinker))
    return [strict, *fit_exchange(m, EXCHANGE_LAYER, count=EXCHANGES), Reader(m, thinker), cascade]
