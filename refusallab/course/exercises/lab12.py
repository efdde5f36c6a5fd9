"""Lab 12, inside, causally: patching activations, heads and components; a sparse code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from refusallab.course.exercise import Case, Mistake, define
from refusallab.course.exercises.common import on_chat_model
from refusallab.dictionary import sparse_code
from refusallab.directions import random_directions
from refusallab.interventions import project_out
from refusallab.model import Model, ids_of, logits, render
from refusallab.patching import Change, patch, read_activations, recovered, replace, swap_component, swap_head
from refusallab.twins import Twins, twin_requests

# --- 12.1 ----------------------------------------------------------------------------------------------------------


def _texts(seed: int, *phrasings: int, changed: str = "other_thing") -> tuple[list[str], list[str]]:
    """Lawful prompts and their forbidden twins, a pair for each phrasing; other things for every seed."""
    lawful, forbidden = [], []
    for k, phrasing in enumerate(phrasings):
        made: Twins = twin_requests("val", phrasing)
        row = (7 * seed + 11 * k) % len(made.forbidden)
        lawful.append(getattr(made, changed)[row].prompt)
        forbidden.append(made.forbidden[row].prompt)
    return lawful, forbidden


def _patch_cases(seed: int) -> list[Case]:
    lawful, forbidden = _texts(seed, 43, 43, 43)
    short, long = _texts(seed + 1, 2, 13, 36, changed="other_action")
    return [
        Case(
            "3 lawful prompts, an activation of forbidden ones",
            {"prompts": lawful, "source": forbidden, "layer": 1, "position": -2},
        ),
        Case(
            "prompts of three lengths, the last token",
            {"prompts": long, "source": short, "layer": 3, "position": -1},
        ),
    ]


def _patched(m: Model, prompts: list[str], source: list[str], layer: int, positions: Sequence[int]) -> Tensor:
    return logits(
        m, prompts, edit=patch(read_activations(m, source), "stream", layer, positions), batch_size=len(prompts)
    )


def _all_tokens(m: Model, prompts: list[str], source: list[str], layer: int, position: int) -> Tensor:
    return _patched(m, prompts, source, layer, range(-6, 0))


def _one_for_all(m: Model, prompts: list[str], source: list[str], layer: int, position: int) -> Tensor:
    return _patched(m, prompts, source[:1] * len(prompts), layer, [position])


def _later_layers_too(m: Model, prompts: list[str], source: list[str], layer: int, position: int) -> Tensor:
    run = read_activations(m, source)

    def edit(nn: Any) -> None:
        for later in range(layer, m.n_layers):
            patch(run, "stream", later, [position])(nn)

    return logits(m, prompts, edit=edit, batch_size=len(prompts))


PATCH = define(
    "12.1",
    reference=lambda m, prompts, source, layer, position: _patched(m, prompts, source, layer, [position]),
    observe=on_chat_model,
    cases=_patch_cases,
    tolerance=5e-4,
    mistakes=(
        Mistake(
            "nothing patched",
            lambda m, prompts, source, layer, position: logits(m, prompts),
            "These are the logits of the untouched run. Assign to `.input` inside the trace, and check the token: "
            "positions are negative, because prompts are padded on the left.",
        ),
        Mistake(
            "logits of the source",
            lambda m, prompts, source, layer, position: logits(m, source),
            "These are the logits of the run that the activation comes from. Return those of `prompts`, and move one "
            "token: if you move all of them, the run becomes the other one.",
        ),
        Mistake(
            "runs swapped",
            lambda m, prompts, source, layer, position: _patched(m, source, prompts, layer, [position]),
            "The runs are swapped: take from `source`, put into `prompts`.",
        ),
        Mistake(
            "every token patched",
            _all_tokens,
            "You moved more than one token. Assign to `x[:, position]` alone.",
        ),
        Mistake(
            "always the last token",
            lambda m, prompts, source, layer, position: _patched(m, prompts, source, layer, [-1]),
            "You moved the last token's activation. Move that of `position`.",
        ),
        Mistake(
            "one activation for all",
            _one_for_all,
            "All prompts got the activation of the first one. Row i of the prompts gets row i of the source.",
        ),
        Mistake(
            "output of the block",
            lambda m, prompts, source, layer, position: _patched(m, prompts, source, layer + 1, [position]),
            "You moved the output of the block, which is the input of the next one. Move `blocks(m.nn)[layer].input`.",
        ),
        Mistake(
            "every later layer too",
            _later_layers_too,
            "You patched the later layers too. Patch one layer, and let the model go on from there by itself.",
        ),
    ),
    hints=(
        "You need two traces: one of `source`, in which you save the input of the block; one of `prompts`, in which "
        "you put it in.",
        "In the second trace: `x = block.input.clone()`, then assign to `x[:, position]`, then `block.input = x`. Save "
        "`m.nn.output.logits[:, -1]`.",
        "First trace: `kept = blocks(m.nn)[layer].input[:, position].save()`. Second: `x[:, position] = kept`.",
    ),
)

# --- 12.2 ----------------------------------------------------------------------------------------------------------


def _metrics(seed: int) -> list[Case]:
    g = torch.Generator().manual_seed(seed)
    source, untouched = 4 + torch.rand(6, generator=g), -3 - torch.rand(6, generator=g)
    source[0], untouched[0] = 0.5, 0.1  # a prompt on which the two runs hardly differ
    some = untouched + 0.6 * torch.rand(6, generator=g) * (source - untouched)
    some[0] = -2.0
    return [
        Case("6 prompts, part of the difference", {"source": source, "untouched": untouched, "patched": some}),
        Case("the other way round", {"source": untouched, "untouched": source, "patched": some}),
        Case("further than the source", {"source": source, "untouched": untouched, "patched": source + 2}),
        Case("against the source", {"source": source, "untouched": untouched, "patched": untouched - 1}),
    ]


SHARE = define(
    "12.2",
    reference=lambda source, untouched, patched: recovered(source, untouched, patched).item(),
    cases=_metrics,
    mistakes=(
        Mistake(
            "mean of ratios",
            lambda source, untouched, patched: ((patched - untouched) / (source - untouched)).mean().item(),
            "You divided prompt by prompt. Where the two runs hardly differ, that ratio can be anything. Divide the "
            "means.",
        ),
        Mistake(
            "what is missing",
            lambda source, untouched, patched: 1 - recovered(source, untouched, patched).item(),
            "This is the share that is still missing. Start from the untouched run: patched minus untouched.",
        ),
        Mistake(
            "untouched not subtracted",
            lambda source, untouched, patched: (patched.mean() / source.mean()).item(),
            "0 must mean that nothing came back. Subtract the mean of the untouched run, above and below.",
        ),
        Mistake(
            "not divided",
            lambda source, untouched, patched: (patched.mean() - untouched.mean()).item(),
            "This is the change in log-odds. Divide it by the distance between the two runs.",
        ),
        Mistake(
            "magnitude of the distance",
            lambda source, untouched, patched: (
                (patched.mean() - untouched.mean()) / (source.mean() - untouched.mean()).abs()
            ).item(),
            "The sign is lost: when the source has the lower metric, both differences are negative, and the share is "
            "positive.",
        ),
        Mistake(
            "cut off",
            lambda source, untouched, patched: recovered(source, untouched, patched).clamp(0, 1).item(),
            "You cut the share off at 0 and 1. Leave it: a patch can overshoot, or work against the source.",
        ),
    ),
    hints=(
        "It is 0 when patching changes nothing, and 1 when the patched run is like the source.",
        "Above the line: how far patching moved the mean. Below: how far apart the two runs are.",
        "`(patched.mean() - untouched.mean()) / (source.mean() - untouched.mean())`, as a float.",
    ),
)

# --- 12.3 ----------------------------------------------------------------------------------------------------------


def _head_cases(seed: int) -> list[Case]:
    lawful, forbidden = _texts(seed, 43, 43, 43, changed="other_action")
    short, long = _texts(seed + 1, 32, 36)
    return [
        Case("head 3 of layer 0", {"prompts": lawful, "source": forbidden, "layer": 0, "head": 3}),
        Case("head 1 of layer 1, prompts of two lengths", {"prompts": long, "source": short, "layer": 1, "head": 1}),
    ]


def _heads(m: Model) -> int:
    return m.hf.config.num_attention_heads


def _with_head(change: Any, part: str = "heads") -> Any:
    """A version of patched_head: another change(head, heads) or part."""

    def run(m: Model, prompts: list[str], source: list[str], layer: int, head: int) -> Tensor:
        edit = patch(read_activations(m, source), part, layer, [-1], change(head, _heads(m)))
        return logits(m, prompts, edit=edit, batch_size=len(prompts))

    return run


def _one_head(head: int, heads: int) -> Change:
    return lambda x, source: swap_head(x, source, head, heads)


def _interleaved(head: int, heads: int) -> Change:
    def change(x: Tensor, source: Tensor) -> Tensor:
        x = x.clone()
        x[..., head::heads] = source[..., head::heads]
        return x

    return change


def _other_heads(head: int, heads: int) -> Change:
    return lambda x, source: swap_head(source, x, head, heads)


_patched_head = _with_head(_one_head)

HEAD = define(
    "12.3",
    reference=_patched_head,
    observe=on_chat_model,
    cases=_head_cases,
    tolerance=5e-4,
    mistakes=(
        Mistake(
            "nothing patched",
            lambda m, prompts, source, layer, head: logits(m, prompts),
            "These are the logits of the untouched run. Assign the changed z to `attention_writes(block).input`, at "
            "the last token, -1.",
        ),
        Mistake(
            "all heads",
            _with_head(lambda head, heads: replace),
            "You moved all heads of the layer. Move `size` coordinates only, those from `head * size` on.",
        ),
        Mistake(
            "heads interleaved",
            _with_head(_interleaved),
            "You took every fourth coordinate for a head. The heads are side by side: the first `size` coordinates are "
            "head 0.",
        ),
        Mistake(
            "all but this head",
            _with_head(_other_heads),
            "You moved all heads except this one.",
        ),
        Mistake(
            "behind W_O",
            _with_head(_one_head, "attention"),
            "You moved coordinates of what the attention writes. There the heads are mixed already. Move those that "
            "W_O reads: `attention_writes(block).input`.",
        ),
        Mistake(
            "runs swapped",
            lambda m, prompts, source, layer, head: _patched_head(m, source, prompts, layer, head),
            "The runs are swapped: take from `source`, put into `prompts`.",
        ),
    ),
    hints=(
        "It is exercise 12.1 at another place: what the output projection of the attention reads. Lab 07 called it z.",
        "`z = attention_writes(blocks(m.nn)[layer]).input`; its last axis holds the heads side by side, `size` "
        "coordinates each. The size is its length divided by the number of heads.",
        "`part = slice(head * size, (head + 1) * size)`; save `z[:, -1, part]` in one trace, and in the other assign "
        "it to the same place of a clone of z.",
    ),
)

# --- 12.4 ----------------------------------------------------------------------------------------------------------


def _vectors(seed: int) -> list[Case]:
    g = torch.Generator().manual_seed(seed)

    def inputs(n: int, width: int, length: float) -> dict[str, Tensor]:
        r = length * random_directions(width, 1, seed)[0]
        return {"x": torch.randn(n, width, generator=g), "source": torch.randn(n, width, generator=g) + r, "r": r}

    return [Case("3 streams, r of length 4", inputs(3, 12, 4.0)), Case("r of length 0.5", inputs(2, 7, 0.5))]


SWAP = define(
    "12.4",
    reference=swap_component,
    cases=_vectors,
    mistakes=(
        Mistake(
            "direction not normalized",
            lambda x, source, r: x + ((source - x) @ r)[:, None] * r,
            "The result depends on the length of r. Use the unit vector.",
        ),
        Mistake(
            "added without taking away",
            lambda x, source, r: x + source - project_out(source, r),
            "You added the component of the source and left that of x in place. Take the old one away.",
        ),
        Mistake(
            "only taken away",
            lambda x, source, r: project_out(x, r),
            "This is ablation. Put the component of the source in its place.",
        ),
        Mistake(
            "all but the component",
            lambda x, source, r: swap_component(source, x, r),
            "You took everything from the source except the component. It is the other way round.",
        ),
        Mistake(
            "all of the source",
            lambda x, source, r: source,
            "This is the source, whole. Only its component along r may come in.",
        ),
        Mistake(
            "one number for all",
            lambda x, source, r: (
                project_out(x, r) + ((source @ r / r.norm()).mean() * r / r.norm())[None].expand(len(x), -1)
            ),
            "All rows got the same component. Row i of x gets that of row i of the source.",
        ),
    ),
    hints=(
        "Every vector is its component along r and a rest at right angles to it. Keep the rest of x.",
        "With `u = r / r.norm()`: `source @ u` and `x @ u` are two numbers a row. What is their difference for?",
        "`x + ((source - x) @ u)[:, None] * u`.",
    ),
)

# --- 12.5 ----------------------------------------------------------------------------------------------------------


def _word_stream(m: Model, prompts: list[str], words: list[str], layer: int) -> Tensor:
    return _read_at(m, prompts, layer, [_place(m, prompt, word) for prompt, word in zip(prompts, words, strict=True)])


def _read_at(m: Model, prompts: list[str], layer: int, places: Sequence[int]) -> Tensor:
    return read_activations(m, prompts).parts["stream"][range(len(prompts)), layer, list(places)]


def _place(m: Model, prompt: str, word: str) -> int:
    """Where a word stands, counted from the end of the rendered prompt."""
    ids = ids_of(m, render(m, prompt))
    return ids.index(ids_of(m, f" {word}")[0]) - len(ids)


def _places(m: Model, prompts: list[str], words: list[str]) -> list[int]:
    return [_place(m, prompt, word) for prompt, word in zip(prompts, words, strict=True)]


def _word_cases(seed: int) -> list[Case]:
    def inputs(layer: int, *phrasings: int) -> dict[str, Any]:
        chosen = [
            twin_requests("val", phrasing).forbidden[(5 * seed + 13 * k) % 54] for k, phrasing in enumerate(phrasings)
        ]
        names = [item.id.split("_")[-1].capitalize() for item in chosen]
        return {"prompts": [item.prompt for item in chosen], "words": names, "layer": layer}

    return [
        Case("3 prompts of three lengths", inputs(2, 43, 2, 36)),
        Case("2 prompts, the word at two distances from the end", inputs(1, 15, 1)),
    ]


def _from_start(m: Model, prompts: list[str], words: list[str], layer: int) -> Tensor:
    lengths = [len(ids_of(m, render(m, prompt))) for prompt in prompts]
    return _read_at(m, prompts, layer, [p + n for p, n in zip(_places(m, prompts, words), lengths, strict=True)])


WORD = define(
    "12.5",
    reference=_word_stream,
    observe=on_chat_model,
    cases=_word_cases,
    tolerance=5e-4,
    mistakes=(
        Mistake(
            "the bug",
            _from_start,
            "The bug is still there. `index` counts from the start of one prompt, and shorter prompts of a batch are "
            "padded on the left. Count from the end.",
        ),
        Mistake(
            "one too far",
            lambda m, prompts, words, layer: _read_at(m, prompts, layer, [p - 1 for p in _places(m, prompts, words)]),
            "This is the token before the word. The last of n tokens is -1, so the one with index i is i - n.",
        ),
        Mistake(
            "place of the first prompt",
            lambda m, prompts, words, layer: _read_at(
                m, prompts, layer, [_place(m, prompts[0], words[0])] * len(prompts)
            ),
            "You used the place of the first prompt for all of them.",
        ),
        Mistake(
            "last token",
            lambda m, prompts, words, layer: _read_at(m, prompts, layer, [-1] * len(prompts)),
            "This is the last token of the prompt. Read the one where the word stands.",
        ),
        Mistake(
            "another layer",
            lambda m, prompts, words, layer: _word_stream(m, prompts, words, layer + 1),
            "This is the output of the block. Read its input.",
        ),
        Mistake(
            "first in the batch",
            lambda m, prompts, words, layer: _word_stream(m, prompts[:1], words[:1], layer).expand(len(prompts), -1),
            "All rows are that of the first prompt. Read one row for each.",
        ),
    ),
    hints=(
        "Print the tokens that her code reads, for two prompts of different lengths. Which side is the padding on?",
        "A place that is counted from the end does not move when padding comes in front.",
        "`ids.index(...) - len(ids)` is the place from the end; rows and places together: "
        "`x[torch.arange(len(prompts)), places]`.",
    ),
)

# --- 12.6 ----------------------------------------------------------------------------------------------------------


def _codes(seed: int) -> list[Case]:
    g = torch.Generator().manual_seed(seed)

    def inputs(n: int, width: int, features: int, k: int, shift: float) -> dict[str, Any]:
        return {
            "x": torch.randn(n, width, generator=g),
            "encoder": torch.randn(features, width, generator=g),
            "bias": torch.randn(features, generator=g) + shift,
            "k": k,
        }

    return [
        Case("8 streams, 16 features, 3 active", inputs(8, 6, 16, 3, 0.0)),
        Case("fewer than k features are above 0", inputs(3, 5, 6, 4, -4.0)),
        Case("6 streams, 12 features, 5 active", inputs(6, 8, 12, 5, 1.0)),
    ]


def _chosen(score: Any, value: Any = torch.relu, dim: int = -1) -> Any:
    """A wrong version of sparse_code: features chosen by score(z), kept as value(z), along another axis."""

    def code(x: Tensor, encoder: Tensor, bias: Tensor, k: int) -> Tensor:
        z = x @ encoder.T + bias
        index = score(z).topk(min(k, z.shape[dim]), dim).indices
        return torch.zeros_like(z).scatter(dim, index, value(z).gather(dim, index))

    return code


CODE = define(
    "12.6",
    reference=sparse_code,
    cases=_codes,
    mistakes=(
        Mistake(
            "no bias",
            lambda x, encoder, bias, k: sparse_code(x, encoder, 0 * bias, k),
            "The bias is missing.",
        ),
        Mistake(
            "negative activations",
            _chosen(lambda z: z, lambda z: z),
            "A feature is negative where fewer than k are above 0. An activation is never negative: max(0, ...) first.",
        ),
        Mistake(
            "largest magnitude",
            _chosen(torch.abs, lambda z: z),
            "You chose by magnitude, so strongly negative features came in. Choose the largest.",
        ),
        Mistake(
            "all features",
            lambda x, encoder, bias, k: (x @ encoder.T + bias).relu(),
            "All features above 0 are there. Keep the k largest of each row, and set the rest to 0.",
        ),
        Mistake(
            "over the rows",
            _chosen(torch.relu, dim=0),
            "You kept the k largest of each feature. Keep the k largest of each row.",
        ),
        Mistake(
            "one for active",
            lambda x, encoder, bias, k: (sparse_code(x, encoder, bias, k) > 0).float(),
            "You return which features are active. Return how active they are.",
        ),
        Mistake(
            "one too many",
            lambda x, encoder, bias, k: sparse_code(x, encoder, bias, k + 1),
            "There is one feature too many: a threshold with `>=` at the next value, or k + 1.",
        ),
    ),
    hints=(
        "First `z = x @ encoder.T + bias`, then cut at 0, then keep k in each row.",
        "`values, index = z.relu().topk(k, dim=-1)` gives the k largest and where they are. Put them back into zeros.",
        "`torch.zeros_like(z).scatter(-1, index, values)`.",
    ),
)

EXERCISES = (PATCH, SHARE, HEAD, SWAP, WORD, CODE)
