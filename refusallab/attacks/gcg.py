"""GCG, the greedy coordinate gradient attack: a suffix that makes the model begin its reply with a target.

Zou et al. 2023 (arXiv 2307.15043). A step: the gradient of the target's loss with respect to the one-hot tokens of the
suffix says which swaps look good to first order (`token_gradient`); candidates swap one token each, drawn from the top
k of a random position (`sample_candidates`); those whose *text* would be read as other tokens are drawn again
(`survives`); all are run, and the one with the lowest loss is the next suffix (`candidate_losses`).

What saves time: keys and values of everything before the suffix are computed once; candidates are sorted by the token
that they change, so that a batch also shares the part of the suffix before its first change; logits are computed where
the target is and nowhere else; the last target token predicts nothing and is not run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from refusallab.attacks.result import AttackResult, Cost, rewrite, send
from refusallab.bars import bar
from refusallab.errors import RefusalLabError
from refusallab.inputs import listed
from refusallab.judging import REPLY_TOKENS
from refusallab.model import Model, Prompt, check_length, embedding, encode, ids_of, listed_prompts, render
from refusallab.prefix import for_rows
from refusallab.prompts import Item

Penalty = Callable[[list[Prompt]], Tensor]
HIDING = 3.0  # nats per token for each unit of a score above its threshold
PENALISED_AT_ONCE = 16  # candidates


@dataclass(frozen=True)
class Knobs:
    """The settings of a search, with the paper's names and values."""

    steps: int = 500  # T
    search_width: int = 512  # B, candidates drawn a step
    topk: int = 256  # k, tokens to draw from at each position
    init: str = " x" * 20  # the first suffix; its number of tokens stays
    ascii_only: bool = True  # only tokens of printable ASCII
    early_stop: bool = True  # end when greedy decoding gives every target
    batch_size: int = 32  # candidates in one forward pass: changes only the speed; 512 on a GPU
    seed: int = 0


@dataclass(frozen=True)
class Suffix:
    """The best suffix of a search with the most prompts in use: one that reaches the target, else the lowest loss."""

    text: str  # follows the request directly
    loss: float  # mean cross-entropy of the target, in nats per token, mean over the prompts in use
    losses: tuple[float, ...]  # of the suffix that each step chose
    prompts_in_use: tuple[int, ...]  # at each step; more than one prompt enter one by one
    reached: bool  # greedy decoding gives the target, for every prompt
    cost: Cost


@dataclass(frozen=True, eq=False)
class SuffixPrompt:
    """One prompt and its target, cut into pieces around the suffix."""

    prompt: Prompt  # without the suffix
    before: str  # rendered text up to the suffix
    after: str  # the end of the template
    before_ids: Tensor  # [before]
    suffix_ids: Tensor  # [s], of the suffix that the prompt was prepared with
    after_ids: Tensor  # [after]
    target_ids: Tensor  # [target]
    cache: DynamicCache  # keys and values of before_ids


# ---------------------------------------------------------------------------------------------------------
# The parts of a step


def prepare(m: Model, prompt: Prompt, target: str, suffix: str, *, system: str | None = None) -> SuffixPrompt:
    """Render the prompt with a suffix, cut it there, and run what comes before it once.

    Every piece keeps the tokens that it has in the whole prompt: many tokenizers split a text differently when it
    stands alone. Raises RefusalLabError when a piece shares a token with the next one.
    """
    before, after, parts = _cut(m, prompt, target, suffix, system)
    return SuffixPrompt(prompt, before, after, *parts, keys_and_values(m, parts[0]))


def _cut(m: Model, prompt: Prompt, target: str, suffix: str, system: str | None) -> tuple[str, str, list[Tensor]]:
    """The texts before and behind the suffix, and the tokens of: what is before, suffix, what is behind, target."""
    if m.remote:
        raise RefusalLabError("GCG needs gradients and caches of a model on this computer: load it without remote.")
    if not suffix:
        raise RefusalLabError("The suffix is empty: give it at least one token.")
    with_suffix = rewrite(prompt, lambda text: text + suffix)
    if not target:
        raise RefusalLabError("The target is empty: give the words that the reply should begin with.")
    encode(m, [with_suffix], system=system, prefill=target)  # raises if the model cannot read that many tokens
    before, found, after = render(m, with_suffix, system=system).rpartition(suffix)
    if not found:
        raise RefusalLabError(f"The suffix {suffix!r} is not in the rendered prompt: end it without a space.")
    ids, text = [ids_of(m, before)], before
    for piece in (suffix, after, target):
        text += piece
        whole, known = ids_of(m, text), [token for part in ids for token in part]
        if whole[: len(known)] != known:
            raise RefusalLabError(
                f"{piece!r} is read as other tokens, because it shares one with the text before it. Begin suffix and "
                "target with a space or another sign, and end the suffix with another one."
            )
        ids.append(whole[len(known) :])
    return before, after, [torch.tensor(part, dtype=torch.long, device=m.device) for part in ids]


@torch.no_grad()
def keys_and_values(m: Model, ids: Tensor) -> DynamicCache:
    """The cache after reading ids [n]."""
    cache = DynamicCache()  # without a config it keeps all positions, in sliding-window layers too
    if len(ids):
        m.hf(input_ids=ids[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def token_gradient(m: Model, case: SuffixPrompt, suffix: Tensor) -> tuple[Tensor, DynamicCache]:
    """Gradient of the target's loss with respect to the one-hot suffix, and the cache of prompt and suffix.

    suffix [s] -> fp32 [s, vocab], nats per one-hot unit. The embedding of a one-hot row is row @ W, so the gradient is
    (dloss / dembedding) @ W^T: no one-hot matrix is built. Gemma multiplies its embeddings by sqrt(width); the hook
    reads them after that, and the factor enters W^T.
    """
    table, embedded = embedding(m.hf), []

    def make_leaf(_module: torch.nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    ids = torch.cat([suffix, case.after_ids, case.target_ids[:-1]])[None]  # [1, s + after + target - 1]
    cache = for_rows(case.cache, 1, len(case.before_ids))
    handle = table.register_forward_hook(make_leaf)
    try:
        with torch.enable_grad():
            logits = _target_logits(m, case, ids, cache)  # [1, target, vocab]
            loss = cross_entropy(logits[0], case.target_ids)
            slope = torch.autograd.grad(loss, embedded[0])[0][0, : len(suffix)]  # [s, width]
    finally:
        handle.remove()
    scale = float(getattr(table, "scalar_embed_scale", 1.0))
    return (scale * slope @ table.weight.T).float(), cache


def allowed_tokens(m: Model, *, ascii_only: bool = True) -> Tensor:
    """Which tokens a suffix may have: bool [vocab]. Never special ones; only printable ASCII if so wanted."""
    size = embedding(m.hf).weight.shape[0]
    known = min(size, len(m.tokenizer))  # a tokenizer may have tokens that the model lacks, and the other way round
    special = frozenset({*m.tokenizer.all_special_ids, *m.tokenizer.added_tokens_decoder})
    allowed = torch.zeros(size, dtype=torch.bool)
    for i, text in enumerate(_texts_of_tokens(m.tokenizer, known)):
        allowed[i] = i not in special and bool(text) and (not ascii_only or (text.isascii() and text.isprintable()))
    if not allowed.any():
        raise RefusalLabError(f"No token of {m.name} is printable ASCII: search with ascii_only=False.")
    return allowed


@lru_cache(maxsize=4)
def _texts_of_tokens(tokenizer: Any, known: int) -> list[str]:
    """The text of each of the first `known` tokens alone: the same for every search, and slow to make."""
    return tokenizer.batch_decode([[i] for i in range(known)])


def sample_candidates(
    suffix: Tensor, gradient: Tensor, allowed: Tensor, knobs: Knobs, generator: torch.Generator
) -> Tensor:
    """Different suffixes with one token swapped, at most search_width: [n, s].

    Position and token are drawn uniformly, the token from the topk allowed ones with the lowest gradient there.
    suffix [s], gradient [s, vocab], allowed [vocab] bool.
    """
    k = min(knobs.topk, int(allowed.sum()))
    positions = torch.randint(len(suffix), (knobs.search_width,), generator=generator)
    ranks = torch.randint(k, (knobs.search_width,), generator=generator)
    return swapped(suffix.cpu(), gradient.cpu(), allowed, positions, ranks).unique(dim=0).to(suffix.device)


def swapped(suffix: Tensor, gradient: Tensor, allowed: Tensor, positions: Tensor, ranks: Tensor) -> Tensor:
    """Candidate i is the suffix with one token changed: at positions[i], to the allowed one of rank ranks[i] there.

    Rank 0 has the lowest gradient. suffix [s], gradient [s, vocab], allowed [vocab] bool, positions [n] and ranks [n]
    below the number of allowed tokens. -> [n, s].
    """
    best = gradient.masked_fill(~allowed, torch.inf).topk(int(ranks.max()) + 1, largest=False).indices  # [s, k]
    candidates = suffix.repeat(len(positions), 1)
    candidates[torch.arange(len(positions)), positions] = best[positions, ranks]
    return candidates


def survives(m: Model, case: SuffixPrompt, candidates: Tensor) -> Tensor:
    """Whether the prompt with a candidate's *text* is read as the same tokens again: bool [n].

    candidates [n, s]. What is sent is a string, so a suffix that fails here is not the one that was optimized. A suffix
    that ends in white space fails too, because templates may strip it.
    """
    texts = suffix_texts(m, case, candidates)
    tokens = m.tokenizer([case.before + text + case.after for text in texts], add_special_tokens=False)["input_ids"]
    before, after = case.before_ids.tolist(), case.after_ids.tolist()
    same = [
        read == before + row + after and not text[-1:].isspace()
        for read, row, text in zip(tokens, candidates.tolist(), texts, strict=True)
    ]
    return torch.tensor(same, dtype=torch.bool, device=candidates.device)


def suffix_texts(m: Model, case: SuffixPrompt, candidates: Tensor) -> list[str]:
    """The texts of suffixes [n, s], decoded behind the token before them: some tokenizers strip a first space."""
    anchor = case.before_ids[-1:].tolist()
    settings = {"clean_up_tokenization_spaces": False}
    skip = len(m.tokenizer.decode(anchor, **settings))
    rows = [anchor + row for row in candidates.tolist()]
    return [text[skip:] for text in m.tokenizer.batch_decode(rows, **settings)]


def with_each(m: Model, case: SuffixPrompt, candidates: Tensor) -> list[Prompt]:
    """The prompts that are sent with the candidates [n, s]: n of them."""
    texts = suffix_texts(m, case, candidates)
    return [rewrite(case.prompt, lambda request, text=text: request + text) for text in texts]


@torch.no_grad()
def candidate_losses(
    m: Model, case: SuffixPrompt, candidates: Tensor, suffix: Tensor, cache: DynamicCache, *, batch_size: int = 32
) -> tuple[Tensor, Tensor, int]:
    """Loss of the target after each candidate, whether greedy decoding gives the target, and the tokens computed.

    candidates [n, s]; suffix [s] and cache as in and from `token_gradient`. -> fp32 [n], nats per token; bool [n]; int.
    """
    n, n_tokens = len(candidates), 0
    losses = torch.empty(n, device=candidates.device)
    reached = torch.empty(n, dtype=torch.bool, device=candidates.device)
    first = (candidates != suffix).int().argmax(1)  # [n]; 0 for the suffix itself
    ends = torch.cat([case.after_ids, case.target_ids[:-1]])
    for rows in first.argsort(descending=True, stable=True).split(batch_size):
        shared = int(first[rows].min())  # all of these begin with the first `shared` tokens of the suffix
        ids = torch.cat([candidates[rows, shared:], ends.repeat(len(rows), 1)], 1)
        logits = _target_logits(m, case, ids, for_rows(cache, len(rows), len(case.before_ids) + shared))
        targets = case.target_ids.repeat(len(rows), 1)  # [rows, target]
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets).mean(1)
        losses[rows] = loss.nan_to_num(torch.inf, torch.inf)  # one that overflows is never the best
        reached[rows] = (logits.argmax(-1) == targets).all(1)
        n_tokens += ids.numel()
    return losses, reached, n_tokens


def _target_logits(m: Model, case: SuffixPrompt, ids: Tensor, cache: DynamicCache) -> Tensor:
    """Logits that predict the target: fp32 [n, target, vocab]. ids [n, ...] follow the cache and end before its end."""
    kept = torch.arange(-len(case.target_ids), 0)  # as a number, the head would read its weights again for each row
    return m.hf(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=kept).logits.float()


# ---------------------------------------------------------------------------------------------------------
# The search


@dataclass
class _State:
    """What a search is at between two steps: all that a file must hold to go on."""

    suffix: list[int]  # token ids of the latest suffix
    losses: list[float] = field(default_factory=list)
    prompts_in_use: list[int] = field(default_factory=list)
    in_use: int = 1
    best: list[int] = field(default_factory=list)  # token ids
    best_loss: float = float("inf")
    reached: bool = False  # whether the best one reaches the target of every prompt in use
    forward_passes: int = 0
    tokens: int = 0


def find_suffix(
    m: Model,
    prompts: Sequence[Prompt],
    targets: Sequence[str],
    knobs: Knobs = Knobs(),  # noqa: B008 - frozen
    *,
    system: str | None = None,
    penalty: Penalty | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Suffix:
    """Search one suffix for one prompt, or one for several (universal).

    Several prompts enter as in the paper's algorithm 2: the first alone, the next one whenever greedy decoding gives
    the target of all in use. Their losses are averaged, and their gradients added after each is scaled to length 1.

    A `penalty` is for an attacker who knows of a defence that reads requests: penalty(prompts) [n], at least 0, in nats
    per token, is added to the loss of each candidate, and a target counts as reached only where the penalty is 0. Its
    passes are not part of the cost.

    `progress(steps done, loss)` is called after each step. RefusalLabError when no candidate survives re-tokenization.
    """
    prompts, targets = listed_prompts(prompts), listed(targets, "targets", str)
    if len(prompts) != len(targets):
        raise RefusalLabError(f"{len(prompts)} prompts and {len(targets)} targets: give one target for each prompt.")
    if min(knobs.steps, knobs.search_width, knobs.topk, knobs.batch_size) < 1:
        raise RefusalLabError(f"steps, search_width, topk and batch_size must be at least 1: {knobs}.")
    start = time.perf_counter()
    cases = [prepare(m, p, t, knobs.init, system=system) for p, t in zip(prompts, targets, strict=True)]
    if any(not torch.equal(case.suffix_ids, cases[0].suffix_ids) for case in cases):
        raise RefusalLabError(f"`init` {knobs.init!r} has other tokens behind another prompt: begin it with a space.")
    allowed = allowed_tokens(m, ascii_only=knobs.ascii_only)
    state = _State(
        cases[0].suffix_ids.tolist(),
        forward_passes=len(cases),
        tokens=sum(len(case.before_ids) for case in cases),
    )
    while len(state.losses) < knobs.steps and not (knobs.early_stop and state.reached and state.in_use == len(cases)):
        _step(m, cases, allowed, knobs, state, penalty)
        if progress:
            progress(len(state.losses), state.losses[-1])

    best = torch.tensor(state.best, device=m.device)
    text = suffix_texts(m, cases[0], best[None])[0]
    for prompt, case in zip(prompts, cases, strict=True):
        read = encode(m, [rewrite(prompt, lambda request: request + text)], system=system)["input_ids"][0]
        if not torch.equal(read, torch.cat([case.before_ids, best, case.after_ids])):
            raise RefusalLabError(f"The template changes the suffix {text!r}: begin and end `init` with other tokens.")
    cost = Cost(state.forward_passes, state.tokens, time.perf_counter() - start)
    reached = state.reached and state.in_use == len(cases)
    return Suffix(text, state.best_loss, tuple(state.losses), tuple(state.prompts_in_use), reached, cost)


def _step(
    m: Model, cases: list[SuffixPrompt], allowed: Tensor, knobs: Knobs, state: _State, penalty: Penalty | None
) -> None:
    """One step: gradient, candidates, check, losses; `state` moves to the best candidate."""
    if state.reached and state.in_use < len(cases):  # the next prompt enters; it is judged from here on
        state.in_use += 1
        state.best_loss, state.reached = float("inf"), False
    suffix = torch.tensor(state.suffix, device=m.device)
    generator = torch.Generator().manual_seed(knobs.seed * 1_000_003 + len(state.losses))
    used = cases[: state.in_use]
    gradients, caches = zip(*(token_gradient(m, case, suffix) for case in used), strict=True)
    gradient = sum(g / g.norm().clamp(min=1e-30) for g in gradients)  # [s, vocab]
    candidates = _draw(m, cases, suffix, gradient, allowed, knobs, generator)
    losses, reached = torch.zeros(len(candidates), device=m.device), True
    for case, cache in zip(used, caches, strict=True):
        loss, hit, n_tokens = candidate_losses(m, case, candidates, suffix, cache, batch_size=knobs.batch_size)
        losses, reached = losses + loss / len(used), hit & reached
        state.forward_passes += len(candidates) + 3
        state.tokens += n_tokens + 3 * (len(suffix) + len(case.after_ids) + len(case.target_ids) - 1)
    if penalty:
        losses, reached = _penalised(m, used, candidates, losses, reached, penalty)
    chosen = int(losses.argmin())
    if not losses[chosen].isfinite():
        raise RefusalLabError(
            f"No suffix has a finite loss in {str(m.hf.dtype).removeprefix('torch.')}: load {m.name} with "
            "dtype=torch.bfloat16 or torch.float32."
        )
    state.suffix = candidates[chosen].tolist()
    state.losses.append(losses[chosen].item())
    state.prompts_in_use.append(state.in_use)
    if not state.best or (bool(reached[chosen]), -state.losses[-1]) > (state.reached, -state.best_loss):
        state.best, state.best_loss, state.reached = state.suffix, state.losses[-1], bool(reached[chosen])


def _penalised(
    m: Model, cases: list[SuffixPrompt], candidates: Tensor, losses: Tensor, reached: Tensor, penalty: Penalty
) -> tuple[Tensor, Tensor]:
    """Losses with the mean penalty of the cases, and whether the target is reached without one: [n] each.

    A penalty only adds. Candidates are taken in the order of their losses, so those left when the next loss is above
    the best sum cannot win: they need no penalty, and their loss is set to infinity.
    """
    total = torch.full_like(losses, torch.inf)
    for rows in losses.argsort(stable=True).split(PENALISED_AT_ONCE):
        if losses[rows[0]] >= total.min():
            break
        added = torch.stack([penalty(with_each(m, case, candidates[rows])) for case in cases]).to(losses)
        total[rows] = losses[rows] + added.mean(0)
        reached[rows] &= (added == 0).all(0)
    return total, reached


def _draw(
    m: Model,
    cases: list[SuffixPrompt],
    suffix: Tensor,
    gradient: Tensor,
    allowed: Tensor,
    knobs: Knobs,
    generator: torch.Generator,
) -> Tensor:
    """Different candidates that survive re-tokenization, search_width of them if four draws give as many: [n, s]."""
    candidates = suffix.new_empty(0, len(suffix))
    for _ in range(4):
        drawn = sample_candidates(suffix, gradient, allowed, knobs, generator)
        for case in cases:  # also those that are not yet in use: a suffix must be able to stay
            drawn = drawn[survives(m, case, drawn)]
        candidates = torch.cat([candidates, drawn]).unique(dim=0)
        if len(candidates) >= knobs.search_width:
            break
    if len(candidates) == 0:
        raise RefusalLabError(
            "No candidate is read as the same tokens again. Use another `init`, a larger search_width or "
            "ascii_only=False."
        )
    return candidates[torch.randperm(len(candidates), generator=generator)[: knobs.search_width].to(suffix.device)]


# ---------------------------------------------------------------------------------------------------------
# As attacks


def gcg_attack(
    m: Model,
    items: Sequence[Item],
    targets: Sequence[str],
    knobs: Knobs = Knobs(),  # noqa: B008 - frozen
    *,
    system: str | None = None,
    penalty: Penalty | None = None,
) -> list[AttackResult]:
    """A separate suffix for each item. The targets are chosen by the attacker, who does not know the answers.

    All items are looked at before the first search. Raises RefusalLabError for one that cannot be attacked.
    """
    items, targets = listed(items, "items", Item), listed(targets, "targets", str)
    if len(items) != len(targets):
        raise RefusalLabError(f"{len(items)} items and {len(targets)} targets: give one target for each item.")
    for item, target in zip(items, targets, strict=True):
        try:
            *_, parts = _cut(m, item.prompt, target, knobs.init, system)
            check_length(m, sum(map(len, parts[:3])) + REPLY_TOKENS + m.thought_tokens)
        except RefusalLabError as error:
            raise RefusalLabError(f"Item {item.id!r}: {error}") from None
    found = []
    with bar("GCG", len(items) * knobs.steps) as drawn:
        for item, target in zip(items, targets, strict=True):
            settings = {"system": system, "penalty": penalty, "progress": lambda *_: drawn.update()}
            found.append(find_suffix(m, [item.prompt], [target], knobs, **settings))
            drawn.update(len(found) * knobs.steps - drawn.n)  # it may have ended early
    prompts = [
        rewrite(item.prompt, lambda request, s=s: request + s.text) for item, s in zip(items, found, strict=True)
    ]
    sent = send(m, "GCG", items, prompts, system=system)
    return [replace(x, cost=s.cost + x.cost, losses=s.losses) for x, s in zip(sent, found, strict=True)]


class Scoring(Protocol):
    """What a watcher of requests has, and one of replies: a score above `threshold` raises the alarm.

    One of requests has score(prompts), one of replies score(prompts, replies).
    """

    @property
    def threshold(self) -> float: ...

    @property
    def score(self) -> Callable[..., Tensor]: ...


def hiding_from(watchers: Sequence[Scoring], weight: float = HIDING, *, reply: str | None = None) -> Penalty:
    """The penalty of an attacker who can query the watchers: `weight` times what a score has above its threshold.

    Watchers of replies are asked about `reply`, which the attacker has made up: they do not know the answer yet. Raises
    RefusalLabError when it is missing.
    """
    pairs = [(w, _reads_replies(w)) for w in watchers]
    if reply is None and (readers := [w for w, reads in pairs if reads]):
        name = getattr(readers[0], "name", type(readers[0]).__name__)
        raise RefusalLabError(f"{name} reads replies: give reply=, one that you have made up.")

    def penalty(prompts: list[Prompt]) -> Tensor:
        scores = [w.score(prompts, [reply] * len(prompts)) if reads else w.score(prompts) for w, reads in pairs]
        return (
            torch.stack([(x - w.threshold).clamp(min=0) for x, w in zip(scores, watchers, strict=True)]).sum(0) * weight
        )

    return penalty


def _reads_replies(watcher: Scoring) -> bool:
    """Whether a score needs a second argument, the replies."""
    parameters = signature(watcher.score).parameters.values()
    return sum(p.default is p.empty and p.kind <= p.POSITIONAL_OR_KEYWORD for p in parameters) > 1


def with_suffix(
    m: Model, items: Sequence[Item], suffix: str, *, attack: str = "suffix", system: str | None = None
) -> list[AttackResult]:
    """The same suffix behind every request: a universal one, one of another model, or a random one as the control."""
    items = listed(items, "items", Item)
    prompts = [rewrite(item.prompt, lambda request: request + suffix) for item in items]
    return send(m, attack, items, prompts, system=system)


def suffix_loss(m: Model, prompt: Prompt, target: str, suffix: str, *, system: str | None = None) -> float:
    """The target's mean cross-entropy after one suffix, in nats per token: what a search lowers."""
    case = prepare(m, prompt, target, suffix, system=system)
    return candidate_losses(m, case, case.suffix_ids[None], case.suffix_ids, case.cache)[0].item()


def random_suffix(m: Model, prompt: Prompt, knobs: Knobs = Knobs()) -> str:  # noqa: B008 - frozen
    """Random allowed tokens, as many as `knobs.init` has: the control for a suffix. It survives re-tokenization."""
    case = prepare(m, prompt, "x", knobs.init)
    allowed = allowed_tokens(m, ascii_only=knobs.ascii_only).nonzero().flatten()
    generator = torch.Generator().manual_seed(knobs.seed)
    suffix = case.suffix_ids.clone()
    for i in range(len(suffix)):  # one token at a time: a whole random row almost never survives
        tokens = allowed[torch.randperm(len(allowed), generator=generator)[:128]].to(suffix.device)
        candidates = suffix.repeat(len(tokens), 1)  # [128, s]
        candidates[:, i] = tokens
        for few in candidates.split(3):  # the first that survives is taken, and it is seldom far behind
            good = survives(m, case, few).nonzero().flatten()
            if len(good):
                suffix = few[good[0]]
                break
    return suffix_texts(m, case, suffix[None])[0]
