"""Lab 04, cause, not correlation: ablation at every site and token, addition, a fair control, ACE, other concepts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from refusallab.activations import residual
from refusallab.course.exercise import Case, Mistake, define
from refusallab.course.exercises.common import chat_model, prompts
from refusallab.directions import cosines, random_directions
from refusallab.errors import RefusalLabError
from refusallab.interventions import ablation, addition, affine, project_out, unit
from refusallab.model import Edit, Model, attention, blocks, encode, logits, mlp
from refusallab.steering import norm_matched
from refusallab.twins import same_things

# --- 4.1 -----------------------------------------------------------------------------------------------------------


# What nnsight says in these cases does not tell what to do.
NOT_ASSIGNED = "Nothing was edited. A new variable is not the stream: assign to it, `block.input = ...`."
TUPLE = "The output of an attention is a tuple: assign `(changed, *output[1:])` to it."
ADVICE = {
    "too many values to unpack": TUPLE,
    "not enough values to unpack": TUPLE,
    "'tuple' and 'Tensor'": TUPLE,
    "while the model is already running": "Compute the vector before the edit: a run of its own cannot begin inside "
    "another.",
    "does not support item assignment": TUPLE,
    "already ran past": "Visit the parts in the order of the forward pass: block input, attention, MLP, next block.",
    "outside of interleaving": "Save `tracer.result` in a second, empty `with tracer.invoke():`.",
    "cannot access local variable": "What stands after the loop in the same invoke is lost when the loop is cut short. "
    "Save `tracer.result` in a second, empty `with tracer.invoke():`.",
}


@contextmanager
def _advice() -> Iterator[None]:
    """Errors of nnsight that have an entry in ADVICE become that advice."""
    try:
        yield
    except Exception as error:
        for text, advice in ADVICE.items():
            if text in str(error):
                raise RefusalLabError(advice) from error
        raise


def edit_seen(function: Any, inputs: dict[str, Any]) -> Tensor:
    """What an edit does: next-token logits of charter-chat under it. `prompts` is not for the function."""
    texts = inputs.pop("prompts")
    try:
        edit = function(**inputs)
    except NameError as error:
        raise RefusalLabError(f"{error}. The loop over blocks stands in an inner function `edit(nn)`.") from error
    if not callable(edit):
        raise RefusalLabError(f"It returns a {type(edit).__name__}. Return the edit itself, the inner function.")
    with _advice():
        return logits(chat_model(), texts, edit=edit)


def _ablation_cases(seed: int) -> list[Case]:
    vectors = random_directions(chat_model().width, 2, seed=400 + seed)
    return [
        Case(
            "a random unit direction, 4 harmful prompts", {"r": vectors[0], "prompts": prompts("harmful_val", seed, 4)}
        ),
        Case(
            "a random direction of length 6, 4 harmless prompts",
            {"r": 6 * vectors[1], "prompts": prompts("harmless_val", seed, 4)},
        ),
    ]


def _ablate(r: Tensor, *, sites: str = "iam", change: Any = project_out) -> Edit:
    """Ablation at some sites: i(nputs of blocks), a(ttention outputs), m(LP outputs)."""

    def edit(nn: Any) -> None:
        for block in blocks(nn):
            if "i" in sites:
                block.input = change(block.input, r)
            if "a" in sites:
                output = attention(block).output
                attention(block).output = (change(output[0], r), *output[1:])
            if "m" in sites:
                mlp(block).output = change(mlp(block).output, r)

    return edit


def _last_position_only(x: Tensor, r: Tensor) -> Tensor:
    return torch.cat([x[:, :-1], project_out(x[:, -1:], r)], 1)


def _one_block(r: Tensor, layer: int) -> Edit:
    def edit(nn: Any) -> None:
        blocks(nn)[layer].input = project_out(blocks(nn)[layer].input, r)

    return edit


def _nothing(nn: Any) -> None:
    """The edit of whoever assigns to a variable of their own."""


def _block_outputs(r: Tensor) -> Edit:
    def edit(nn: Any) -> None:
        for block in blocks(nn):
            block.output = project_out(block.output, r)

    return edit


ABLATE = define(
    "4.1",
    reference=ablation,
    observe=edit_seen,
    cases=_ablation_cases,
    tolerance=5e-4,
    mistakes=(
        Mistake(
            "nothing assigned",
            lambda r: _nothing,
            NOT_ASSIGNED,
        ),
        Mistake(
            "direction not normalized",
            lambda r: _ablate(r, change=lambda x, r: x - (x @ r)[..., None] * r),
            "The projection needs a unit vector. With a longer r you subtract more than there is.",
        ),
        Mistake(
            "subtracted instead of projected",
            lambda r: _ablate(r, change=lambda x, r: x - unit(r)),
            "You subtract the same vector everywhere. Subtract the component of x along r: (x . r^) r^.",
        ),
        Mistake(
            "block inputs only",
            lambda r: _ablate(r, sites="i"),
            "Block inputs are not enough. The MLP still reads what the attention of its own block writes along r, and "
            "the unembedding still reads what the last block writes.",
        ),
        Mistake(
            "attention and MLP outputs only",
            lambda r: _ablate(r, sites="am"),
            "The embedding writes along r too, and edits of attention and MLP outputs do not remove that: edit the "
            "block inputs as well.",
        ),
        Mistake(
            "attention outputs left out",
            lambda r: _ablate(r, sites="im"),
            "You left out attention outputs: the MLP of the same block reads what they write along r.",
        ),
        Mistake(
            "MLP outputs left out",
            lambda r: _ablate(r, sites="ia"),
            "You left out MLP outputs: what the last one writes along r reaches the unembedding.",
        ),
        Mistake(
            "last position only",
            lambda r: _ablate(r, change=_last_position_only),
            "You edited only the last position. Attention carries r over from all the others: edit every position.",
        ),
        Mistake(
            "block outputs only",
            _block_outputs,
            "You edited block outputs. The first block and every MLP still read r: edit block inputs, attention "
            "outputs and MLP outputs.",
        ),
        Mistake(
            "one block only",
            lambda r: _one_block(r, 4),
            "You edited only one block, and later blocks write r again. Loop over all blocks.",
        ),
    ),
    hints=(
        "Which parts write to the residual stream, and which parts read it? Go through a block in the order of the "
        "forward pass.",
        "In the edit, for every block: assign to `block.input`, then to `attention(block).output`, then to "
        "`mlp(block).output`. Attention returns a tuple, so build a new one: `(changed, *output[1:])`.",
        r"$x - (x\cdot\hat r)\,\hat r$ for x of shape `[batch, seq, width]` is `x - (x @ u)[..., None] * u`, with "
        "`u = r / r.norm()` made outside `edit`.",
    ),
)


# --- 4.2 -----------------------------------------------------------------------------------------------------------


def _generation_seen(function: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The tokens that are generated, and whether the model is as before afterwards."""
    m = chat_model()
    before = logits(m, inputs["prompts"])
    try:
        with _advice():
            ids = function(m, **{**inputs, "edit": _edit(**inputs["edit"])})
        after = logits(m, inputs["prompts"])
    finally:
        m.nn.clear_edits()
    if isinstance(ids, Tensor):
        ids = ids.tolist()
    return {"tokens": ids, "the model afterwards, compared with before": (after - before).abs().max().item()}


def _edit(r: Tensor, layer: int | None = None) -> Edit:
    """An edit from plain data: an addition at a layer, or else an ablation."""
    return ablation(r) if layer is None else addition(r, layer)


def _generation_cases(seed: int) -> list[Case]:
    vectors = random_directions(chat_model().width, 3, seed=600 + seed)
    last = chat_model().n_layers - 1
    strong = [{"r": 400 * vectors[0], "layer": last}, {"r": 300 * vectors[1], "layer": last - 1}, {"r": vectors[2]}]
    return [
        Case(
            "one prompt, 6 tokens, a strong addition",
            {"prompts": prompts("harmless_val", seed, 1), "edit": strong[0], "steps": 6},
        ),
        Case(
            "3 prompts of different length, 8 tokens, a strong addition",
            {"prompts": prompts("harmful_val", seed, 3), "edit": strong[1], "steps": 8},
        ),
        Case(
            "2 prompts whose replies end early, ablation",
            {"prompts": prompts("harmful_val", seed, 2), "edit": strong[2], "steps": 30},
        ),
    ]


@torch.no_grad()
def _generate(m: Model, prompts: list[str], edit: Edit, steps: int, *, first: int = 0, last: int | None = None) -> Any:
    """Token ids with the edit in the steps from first to last; step 0 reads the prompt."""
    nn, batch = m.nn, encode(m, prompts)
    with nn.generate(max_new_tokens=steps, do_sample=False) as tracer:
        with tracer.invoke(**batch):
            for _ in tracer.iter[first : steps if last is None else last]:
                edit(nn)
        with tracer.invoke():
            ids = tracer.result.save()
    return ids[:, batch["input_ids"].shape[1] :].tolist()


@torch.no_grad()
def _never_removed(m: Model, prompts: list[str], edit: Edit, steps: int, *, every_token: bool) -> Any:
    nn, batch = m.nn, encode(m, prompts)
    with nn.edit(inplace=True) as tracer:
        if every_token:
            for _ in tracer.all():
                edit(nn)
        else:
            edit(nn)
    ids = nn.generate(**batch, max_new_tokens=steps, do_sample=False)
    return ids[:, batch["input_ids"].shape[1] :].tolist()


def _with_prompt(m: Model, prompts: list[str], edit: Edit, steps: int) -> list[list[int]]:
    ids = encode(m, prompts)["input_ids"].tolist()
    return [a + b for a, b in zip(ids, _generate(m, prompts, edit, steps), strict=True)]


EVERY_TOKEN = define(
    "4.2",
    reference=_generate,
    observe=_generation_seen,
    cases=_generation_cases,
    tolerance=1e-4,
    mistakes=(
        Mistake(
            "only at prefill, and never removed",
            lambda m, prompts, edit, steps: _never_removed(m, prompts, edit, steps, every_token=False),
            "Two mistakes are left. The edit acts on the prompt only and not on the tokens that follow. And the model "
            "is still edited after the call.",
        ),
        Mistake(
            "never removed",
            lambda m, prompts, edit, steps: _never_removed(m, prompts, edit, steps, every_token=True),
            "The tokens are right, but the model is still edited after the call: `nn.edit(inplace=True)` stays until "
            "`nn.clear_edits()`. Edit a copy, or trace the generation.",
        ),
        Mistake(
            "only at prefill",
            lambda m, prompts, edit, steps: _generate(m, prompts, edit, steps, last=1),
            "The edit acts on the prompt only. Every generated token has a forward pass of its own. Edit in each of "
            "them, with `for _ in tracer.iter[:steps]:`.",
        ),
        Mistake(
            "prompt left out",
            lambda m, prompts, edit, steps: _generate(m, prompts, edit, steps, first=1),
            "The edit starts after the prompt has been read. Step 0 is the forward pass of the prompt: begin there.",
        ),
        Mistake(
            "one step short",
            lambda m, prompts, edit, steps: _generate(m, prompts, edit, steps, last=steps - 1),
            "The last token was generated without the edit: there are `steps` forward passes.",
        ),
        Mistake(
            "prompt returned too",
            _with_prompt,
            "The prompt is part of the result. Cut it off: return the new tokens only.",
        ),
        Mistake(
            "no edit at all",
            lambda m, prompts, edit, steps: _generate(m, prompts, lambda nn: None, steps),
            "The replies are those of the untouched model. An edited copy must be used itself: "
            "`edited.generate(...)`, not `nn.generate(...)`.",
        ),
    ),
    hints=(
        "Ask two questions. In which forward passes does the edit act? What is different about the model when the "
        "function has returned?",
        "Either trace the generation: `with nn.generate(max_new_tokens=steps, do_sample=False) as tracer:`, in it "
        "`with tracer.invoke(**batch):` with a loop, and a second `with tracer.invoke():` that saves `tracer.result`. "
        "Or edit a copy: `with nn.edit() as (tracer, edited):`, in it `for _ in tracer.all():` with `edit(nn)`, and "
        "then `edited.generate(...)`.",
        "In the first invoke: `for _ in tracer.iter[:steps]:` and in the loop `edit(nn)`. In the second: "
        "`ids = tracer.result.save()`. Return `ids[:, n:].tolist()`, where n is the length of a prompt: "
        '`batch["input_ids"].shape[1]`.',
    ),
)


# --- 4.3 -----------------------------------------------------------------------------------------------------------


def _addition_cases(seed: int) -> list[Case]:
    vectors = random_directions(chat_model().width, 2, seed=800 + seed)
    return [
        Case(
            f"a random direction of length 9 at layer {layer}, coefficient {coefficient}",
            {"r": 9 * r, "layer": layer, "coefficient": coefficient, "prompts": prompts("harmless_val", seed + k, 4)},
        )
        for k, (r, layer, coefficient) in enumerate([(vectors[0], 3, 1.0), (vectors[1], 5, -1.5)])
    ]


def _add(change: Any, where: str = "input") -> Any:
    """A wrong version of `add`: another change, or the output of the block."""

    def make(r: Tensor, layer: int, coefficient: float) -> Edit:
        def edit(nn: Any) -> None:
            block = blocks(nn)[layer]
            setattr(block, where, change(getattr(block, where), r, coefficient))

        return edit

    return make


def _add_at_every_layer(r: Tensor, layer: int, coefficient: float) -> Edit:
    def edit(nn: Any) -> None:
        for block in blocks(nn):
            block.input = block.input + coefficient * r

    return edit


def _add_at_last_position(x: Tensor, r: Tensor, coefficient: float) -> Tensor:
    return torch.cat([x[:, :-1], x[:, -1:] + coefficient * r], 1)


ADD = define(
    "4.3",
    reference=addition,
    observe=edit_seen,
    cases=_addition_cases,
    tolerance=5e-4,
    mistakes=(
        Mistake(
            "nothing assigned",
            lambda r, layer, coefficient: _nothing,
            NOT_ASSIGNED,
        ),
        Mistake(
            "unit direction added",
            _add(lambda x, r, c: x + c * unit(r)),
            "Here r keeps its length: coefficient 1 moves the stream by exactly the difference of the two means.",
        ),
        Mistake(
            "coefficient forgotten",
            _add(lambda x, r, c: x + r),
            "The coefficient is not used.",
        ),
        Mistake(
            "subtracted",
            _add(lambda x, r, c: x - c * r),
            "The sign is reversed: a positive coefficient adds.",
        ),
        Mistake(
            "one block late",
            _add(lambda x, r, c: x + c * r, "output"),
            "It acts one block late: at the output of block `layer`, which is the input of the next one. The direction "
            "was found at the input of block `layer`.",
        ),
        Mistake(
            "at every layer",
            _add_at_every_layer,
            "You added r at the input of every block, so it is added many times. Add it once, at `layer`.",
        ),
        Mistake(
            "last position only",
            _add(_add_at_last_position),
            "You moved only the last position. Activation addition acts on every position.",
        ),
    ),
    hints=(
        "One block, one assignment.",
        "`blocks(nn)[layer].input` is the tensor `[batch, seq, width]` that enters the block; assign a new one to it.",
        "`block.input = block.input + coefficient * r`.",
    ),
)

# --- 4.4 -----------------------------------------------------------------------------------------------------------


def _lengths(seed: int) -> list[Case]:
    r = random_directions(96, 2, seed=300 + seed)
    length = 12 + 3 * (seed % 50)
    return [
        Case("3 vectors for a direction of length 0.5", {"r": 0.5 * r[0], "count": 3, "seed": seed}),
        Case(f"2000 vectors for a direction of length {length}", {"r": length * r[1], "count": 2000, "seed": seed + 7}),
    ]


def _controls_seen(function: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """What is true of random vectors whatever they are."""
    r, count = inputs["r"], inputs["count"]
    vectors, again = function(**inputs), function(**inputs)
    if not isinstance(vectors, Tensor) or list(vectors.shape) != [count, len(r)]:
        shape = f" of shape {list(vectors.shape)}" if isinstance(vectors, Tensor) else ""
        raise RefusalLabError(
            f"It returns a {type(vectors).__name__}{shape}. Return one tensor, [count, width] = [{count}, {len(r)}]."
        )
    other = function(r, count, inputs["seed"] + 1)
    unlike = cosines(vectors[:50]) - torch.eye(min(count, 50))
    return {
        "shape": list(vectors.shape),
        "lengths, as multiples of |r|": (vectors.norm(dim=-1) / r.norm()),
        "the same seed gives the same vectors": torch.equal(vectors, again),
        "another seed gives others": not torch.equal(vectors, other),
        "no two alike": unlike.abs().max().item() < 0.9,
        "no preferred direction": normalize(vectors, dim=-1).mean(0).norm().item() < 3 / count**0.5,
        # of a coordinate that is 1 in the mean square, the mean fourth power: 3 on a sphere, 1.8 in a cube, 1 at signs
        "corners of a cube not preferred": count < 1000
        or 2.7 < len(r) ** 2 * normalize(vectors.double(), dim=-1).pow(4).mean().item() < 3.3,
    }


def _gaussian(r: Tensor, count: int, seed: int) -> Tensor:
    return torch.randn(count, r.shape[-1], generator=torch.Generator().manual_seed(seed))


def _uniform(r: Tensor, count: int, seed: int) -> Tensor:
    positive = torch.rand(count, r.shape[-1], generator=torch.Generator().manual_seed(seed))
    return r.norm() * normalize(positive, dim=-1)


MATCHED = define(
    "4.4",
    reference=norm_matched,
    observe=_controls_seen,
    cases=_lengths,
    mistakes=(
        Mistake(
            "unit length",
            lambda r, count, seed: random_directions(r.shape[-1], count, seed),
            "The vectors have length 1. Comparing a small push with a large one is not fair: give them the length of "
            "r.",
        ),
        Mistake(
            "not normalized",
            _gaussian,
            "A Gaussian vector has a length of about the square root of the width. Normalize each, then multiply by "
            "|r|.",
        ),
        Mistake(
            "times r instead of its length",
            lambda r, count, seed: random_directions(r.shape[-1], count, seed) * r,
            "You multiplied by r, coordinate by coordinate. Multiply by the number |r|.",
        ),
        Mistake(
            "one length for all together",
            lambda r, count, seed: r.norm() * _gaussian(r, count, seed) / _gaussian(r, count, seed).norm(),
            "You divided by the norm of the whole table. Each row has a length of its own: norm(dim=-1, keepdim=True).",
        ),
        Mistake(
            "positive entries",
            _uniform,
            "The vectors share a common part. (torch.rand causes that: its numbers lie between 0 and 1, so all vectors "
            "point into the same corner.) torch.randn has no preferred direction.",
        ),
        Mistake(
            "one vector repeated",
            lambda r, count, seed: r.norm() * random_directions(r.shape[-1], 1, seed).expand(count, -1),
            "All vectors are the same. Draw `count` different ones.",
        ),
        Mistake(
            "seed ignored",
            lambda r, count, seed: norm_matched(r, count, 0),
            "Another seed gives the same vectors. Use a generator made from the seed.",
        ),
    ),
    hints=(
        "Take two steps: first directions without any preference, then the right length.",
        "`torch.randn(count, width, generator=torch.Generator().manual_seed(seed))`; a Gaussian has no "
        "preferred direction.",
        "`x / x.norm(dim=-1, keepdim=True) * r.norm()`.",
    ),
)

# --- 4.5 -----------------------------------------------------------------------------------------------------------


def _ace_cases(seed: int) -> list[Case]:
    g = torch.Generator().manual_seed(950 + seed)
    r = 7 * random_directions(chat_model().width, 2, seed=900 + seed)
    reference = torch.randn(2, chat_model().width, generator=g)
    cases = [("alpha 0.7", 0.7, 3), ("alpha 0", 0.0, 4)]
    return [
        Case(
            f"a random direction of length 7 at layer {layer}, a random reference, {what}",
            {
                "r": r[k],
                "layer": layer,
                "reference": reference[k],
                "alpha": alpha,
                "prompts": prompts("harmful_val", seed + k, 4),
            },
        )
        for k, (what, alpha, layer) in enumerate(cases)
    ]


def _ace(change: Any) -> Any:
    """A wrong version of `ace`: another change of the block input."""

    def make(r: Tensor, layer: int, reference: Tensor, alpha: float) -> Edit:
        def edit(nn: Any) -> None:
            blocks(nn)[layer].input = change(blocks(nn)[layer].input, r, reference, alpha)

        return edit

    return make


def _along(x: Tensor, r: Tensor) -> Tensor:
    return (x @ unit(r))[..., None] * unit(r)


ACE = define(
    "4.5",
    reference=affine,
    observe=edit_seen,
    cases=_ace_cases,
    tolerance=5e-4,
    mistakes=(
        Mistake(
            "nothing assigned",
            lambda r, layer, reference, alpha: _nothing,
            NOT_ASSIGNED,
        ),
        Mistake(
            "reference subtracted from the stream",
            _ace(lambda x, r, v, a: x - v - _along(x - v, r) + a * r),
            "Only the component of x along r changes. Remove it from x, not from x - reference.",
        ),
        Mistake(
            "reference ignored",
            _ace(lambda x, r, v, a: x - _along(x, r) + a * r),
            "This sets the component along r to zero before it adds. It should be set to that of the reference.",
        ),
        Mistake(
            "whole reference added",
            _ace(lambda x, r, v, a: x - _along(x, r) + v + a * r),
            "You add the whole reference. Only its component along r comes back; everything else of x stays.",
        ),
        Mistake(
            "replaced by the reference",
            _ace(lambda x, r, v, a: (v + a * r).expand_as(x)),
            "You replaced the whole stream by the reference. Only the component along r changes.",
        ),
        Mistake(
            "unit direction added",
            _ace(lambda x, r, v, a: x - _along(x - v, r) + a * unit(r)),
            "alpha counts in lengths of r: alpha = 1 should move from the harmless mean to the harmful one. Add "
            "alpha * r.",
        ),
        Mistake(
            "nothing projected out",
            _ace(lambda x, r, v, a: x + a * r),
            "This is plain addition: what x had along r before is still there.",
        ),
        Mistake(
            "direction not normalized",
            _ace(lambda x, r, v, a: x - ((x - v) @ r)[..., None] * r + a * r),
            "The projection needs a unit vector; only the last term uses r with its own length.",
        ),
        Mistake(
            "sign of alpha",
            _ace(lambda x, r, v, a: x - _along(x - v, r) - a * r),
            "A positive alpha adds r.",
        ),
    ),
    hints=(
        r"Read the formula from the inside: how far is $x$ from the reference, how much of that lies along $\hat r$, "
        "and what is left when you remove it?",
        "`away = x - reference`; its component along u is `(away @ u)[..., None] * u`.",
        "`block.input = x - ((x - reference) @ u)[..., None] * u + alpha * r`, with `u = r / r.norm()`.",
    ),
)

# --- 4.6 -----------------------------------------------------------------------------------------------------------


def _kinds_of_questions(seed: int) -> list[Case]:
    def inputs(wanted: str, other: str, layer: int) -> dict[str, Any]:
        made = same_things("train", (wanted, other, "keeper"), seed=460 + seed)
        texts = {kind: [item.prompt for item in items[seed % 7 :: 9]] for kind, items in made.items()}
        return {"wanted": texts[wanted], "other": texts[other][:-4], "layer": layer, "prompts": texts["keeper"][:4]}

    return [
        Case("from methods to places, layer 4", inputs("place", "method", 4)),
        Case("from the law to first owners, layer 2", inputs("first", "law", 2)),
    ]


def _steer(
    position: Sequence[int] | None = (-1,), change: Any = lambda a, b: a.mean(0) - b.mean(0), edit: Any = addition
) -> Any:
    """A version of steer_toward: another token, another vector of the streams a and b, another edit(vector, layer)."""

    def make(m: Model, wanted: list[str], other: list[str], layer: int) -> Edit:
        a, b = (residual(m, texts, layers=[layer], positions=position)[:, 0].mean(1) for texts in (wanted, other))
        return edit(change(a, b), layer)

    return make


def _steered(function: Any, inputs: dict[str, Any]) -> Tensor:
    return edit_seen(lambda **others: function(chat_model(), **others), inputs)


STEER = define(
    "4.6",
    reference=_steer(),
    observe=_steered,
    cases=_kinds_of_questions,
    tolerance=5e-4,
    mistakes=(
        Mistake(
            "nothing assigned",
            lambda m, wanted, other, layer: _nothing,
            "Nothing was edited. Either nothing is assigned to the stream (`block.input = ...`), or the vector is "
            "zero. It is zero at layer 0, where the last token is the same for all prompts: read with layers=[layer].",
        ),
        Mistake(
            "away from what is wanted",
            _steer(change=lambda a, b: b.mean(0) - a.mean(0)),
            "It steers the other way. The vector points from the others to what is wanted.",
        ),
        Mistake(
            "no difference",
            _steer(change=lambda a, b: a.mean(0)),
            "You added the mean of the wanted requests. Most of it is common to all requests: take the difference.",
        ),
        Mistake(
            "unit vector",
            _steer(change=lambda a, b: unit(a.mean(0) - b.mean(0))),
            "The vector keeps its length: added once, it carries one mean onto the other.",
        ),
        Mistake(
            "all tokens of the template",
            _steer(position=None),
            "You averaged over several tokens. Read the last one of the prompt.",
        ),
        Mistake(
            "ablation",
            _steer(edit=lambda v, layer: ablation(v)),
            "You removed the direction. Add it, at one layer.",
        ),
        Mistake(
            "one layer late",
            _steer(edit=lambda v, layer: addition(v, layer + 1)),
            "Add it where it was read: at the input of block `layer`.",
        ),
    ),
    hints=(
        "These are exercises 2.1 and 4.3, one after the other. Nothing in them is about refusal.",
        "`residual(m, wanted, layers=[layer], positions=[-1])` is `[n, 1, 1, width]`: take the mean over the prompts.",
        "With `v` the difference of the two means: `blocks(nn)[layer].input = blocks(nn)[layer].input + v` in `edit`.",
    ),
)

EXERCISES = (ABLATE, EVERY_TOKEN, ADD, MATCHED, ACE, STEER)
