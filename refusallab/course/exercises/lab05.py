"""Lab 05, weight orthogonalization: the edit of a matrix and of a model, its proof, its repairs, and what it costs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from refusallab.activations import residual
from refusallab.course.exercise import Case, Mistake, define
from refusallab.course.exercises.common import chat_model, prompts
from refusallab.directions import random_directions
from refusallab.errors import RefusalLabError
from refusallab.interventions import ablation, project_out
from refusallab.measure import next_token_loss
from refusallab.model import (
    Model,
    attention_writes,
    blocks,
    embedding,
    logits,
    mlp_writes,
    unembedding,
    wrap,
)
from refusallab.orthogonalization import gap_by_layer, orthogonalize

# --- 5.1 -----------------------------------------------------------------------------------------------------------


def _without(weight: Tensor, r: Tensor, layout: str) -> Tensor:
    return project_out(weight.T, r).T if layout == "linear" else project_out(weight, r)


def _matrices(seed: int) -> list[Case]:
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "a square Linear": ("linear", 6, 6),
        "a Linear with 9 inputs and 6 outputs": ("linear", 6, 9),
        "a square Conv1D": ("conv1d", 6, 6),
        "a Conv1D with 9 inputs and 6 outputs": ("conv1d", 9, 6),
        "an embedding of 6 tokens, width 6": ("embedding", 6, 6),
        "an embedding of 11 tokens, width 6": ("embedding", 11, 6),
    }
    return [
        Case(
            what,
            {
                "weight": torch.randn(*shape, generator=g),
                "r": 2 * torch.randn(6, generator=g),
                "layout": layout,
            },
        )
        for what, (layout, *shape) in shapes.items()
    ]


def _raw(weight: Tensor, r: Tensor, layout: str) -> Tensor:
    if layout == "linear":
        return weight - torch.outer(r, r @ weight)
    return weight - torch.outer(weight @ r, r)


ONE_MATRIX = define(
    "5.1",
    reference=_without,
    cases=_matrices,
    mistakes=(
        Mistake(
            "direction not normalized",
            _raw,
            "The projector is r r^T / |r|^2: divide r by its length first, or you remove |r|^2 times too much.",
        ),
        Mistake(
            "kept instead of removed",
            lambda weight, r, layout: weight - _without(weight, r, layout),
            "This is the part of the matrix that writes r. Subtract it from the matrix.",
        ),
        Mistake(
            "embedding taken for a Linear",
            lambda weight, r, layout: _without(weight, r, "linear" if layout == "embedding" else layout),
            "A row of the embedding is what one token writes into the stream: remove r from every row.",
        ),
        Mistake(
            "Linear's layout for all",
            lambda weight, r, layout: project_out(weight.T, r).T,
            "This is right for Linear. Conv1D and embeddings store what they write along their *last* dimension, so "
            "there the projector stands on the right.",
        ),
        Mistake(
            "inputs edited instead of outputs",
            lambda weight, r, layout: project_out(weight, r) if layout == "linear" else project_out(weight.T, r).T,
            "This removes r from what the module *reads*. The product with a square matrix works on either side, so no "
            "error tells you. Linear stores [out, in]: its outputs are the rows.",
        ),
    ),
    hints=(
        "Which dimension of the weight belongs to the stream? It has the length of r.",
        r"With $\hat r=r/|r|$: the stream receives $Wa$ from a Linear, $a^\top W$ from a Conv1D, a row of $E$ from an "
        r"embedding. Apply the projector $I-\hat r\hat r^\top$ to that, and see on which side of the weight it lands.",
        "Linear: `weight - torch.outer(u, u @ weight)`. The other two: `weight - torch.outer(weight @ u, u)`.",
    ),
)

# --- 5.2 -----------------------------------------------------------------------------------------------------------

Edited = Callable[[Model, Tensor], Model]


Writers = list[tuple[torch.nn.Module, str]]  # modules with the layout of their weight


def _layout(module: torch.nn.Module) -> str:
    return "linear" if isinstance(module, torch.nn.Linear) else "conv1d"


def _writers(hf: torch.nn.Module, *writes: Callable[[Any], Any]) -> Writers:
    """The embedding, then what ends the attention and the MLP of each block."""
    modules = [embedding(hf), *(w(b) for b in blocks(hf) for w in (writes or (attention_writes, mlp_writes)))]
    return [(module, _layout(module)) for module in modules]


def _plain(
    choose: Callable[[torch.nn.Module], Writers] = _writers, *, copied: bool = True, project: Any = _without
) -> Edited:
    """An edit that projects r out of the outputs of the modules that `choose` gives, and of nothing else."""

    def edited(m: Model, r: Tensor) -> Model:
        hf = copy.deepcopy(m.hf) if copied else m.hf
        for module, layout in choose(hf):
            module.weight.data = project(module.weight.data, r, layout)
        return wrap(hf, m.tokenizer)

    return edited


def _copied(m: Model) -> Model:
    return wrap(copy.deepcopy(m.hf), m.tokenizer, m.name)


def _blocks_of_the_original(m: Model, r: Tensor) -> Model:
    hf = copy.deepcopy(m.hf)
    for module, layout in [*_writers(hf)[:1], *_writers(m.hf)[1:]]:
        module.weight.data = _without(module.weight.data, r, layout)
    return wrap(hf, m.tokenizer)


def _observe_edit(m: Model, function: Edited, inputs: dict[str, Any]) -> dict[str, Any]:
    """Whether the original stays as it was, and what the edited copy predicts."""
    before = [p.clone() for p in m.hf.parameters()]
    made = function(m, inputs["r"])
    if not isinstance(made, Model):
        raise RefusalLabError(f"Return a Model, made by wrap(hf, m.tokenizer), not a {type(made).__name__}.")
    changed = max((a - b).abs().max().item() for a, b in zip(before, m.hf.parameters(), strict=True))
    try:
        predicted = logits(made, inputs["prompts"])
    except Exception as error:
        if "already ran past" in str(error):
            raise RefusalLabError(
                "The copy does not run: copy the transformers model alone, copy.deepcopy(m.hf), and make a Model of it "
                "with wrap(hf, m.tokenizer). A deepcopy of m itself keeps parts of the original."
            ) from error
        raise
    return {"change of the original": changed, "logits of the copy": predicted}


def _edit_cases(seed: int) -> list[Case]:
    r = random_directions(chat_model().width, 2, seed=seed + 50)
    return [
        Case("a random unit direction", {"r": r[0], "prompts": prompts("harmful_val", seed, 3)}),
        Case("a direction of length 7", {"r": 7 * r[1], "prompts": prompts("harmless_val", seed, 4)}),
    ]


EDIT = define(
    "5.2",
    reference=_plain(),
    observe=lambda function, inputs: _observe_edit(_copied(chat_model()), function, inputs),
    cases=_edit_cases,
    tolerance=1e-3,
    mistakes=(
        Mistake(
            "nothing edited",
            lambda m, r: _copied(m),
            "The weights of the copy are as they were: assign the result, `module.weight.data = ...`.",
        ),
        Mistake(
            "direction not normalized",
            _plain(project=_raw),
            "The projector is r r^T / |r|^2: divide r by its length first, or you remove |r|^2 times too much.",
        ),
        Mistake(
            "original edited",
            _plain(copied=False),
            "The model that was passed in has changed. Edit a copy: `copy.deepcopy(m.hf)`.",
        ),
        Mistake(
            "blocks of the original edited",
            _blocks_of_the_original,
            "The blocks of the original have changed, and those of the copy have not: go through `blocks(hf)`, not "
            "`blocks(m.hf)`.",
        ),
        Mistake(
            "embedding forgotten",
            _plain(lambda hf: _writers(hf)[1:]),
            "The embedding writes to the stream too, before any block does.",
        ),
        Mistake(
            "attention forgotten",
            _plain(lambda hf: _writers(hf, mlp_writes)),
            "You edited the MLPs and the embedding, but not the attention outputs.",
        ),
        Mistake(
            "MLP forgotten",
            _plain(lambda hf: _writers(hf, attention_writes)),
            "You edited the attention outputs and the embedding, but not the MLPs.",
        ),
        Mistake(
            "head edited too",
            _plain(lambda hf: [*_writers(hf), (unembedding(hf), "embedding")]),
            "The unembedding *reads* the stream and computes logits from it. Leave it as it is.",
        ),
        Mistake(
            "last block forgotten",
            _plain(lambda hf: _writers(hf)[:-2]),
            "You edited everything except the last block: does your loop run over all of `blocks(hf)`?",
        ),
        Mistake(
            "values edited too",
            _plain(lambda hf: _writers(hf, lambda b: b.self_attn.v_proj, attention_writes, mlp_writes)),
            "You edited a matrix that writes into a head, not into the stream. Only the *last* matrix of attention and "
            "MLP writes to the stream: `attention_writes(block)` and `mlp_writes(block)`.",
        ),
    ),
    hints=(
        "Three kinds of modules write to the stream: one at the start, and two in each block.",
        "Copy `m.hf`, then change `module.weight.data` of `embedding(hf)`, and of `attention_writes(block)` and "
        "`mlp_writes(block)` for every block of `blocks(hf)`.",
        "The embedding is [tokens, width]: `w - torch.outer(w @ u, u)`. The others are Linear, [width, in]: "
        "`w - torch.outer(u, u @ w)`. Return `wrap(hf, m.tokenizer)`.",
    ),
)

# --- 5.3 -----------------------------------------------------------------------------------------------------------

FAULTS = ("no fault", "embedding not edited", "MLP 3 not edited", "head edited too")


def _faulty(m: Model, r: Tensor, fault: str) -> Model:
    """Orthogonalized weights with one part put back, or with one too many edited."""
    edited = orthogonalize(m, r)
    if fault == "embedding not edited":
        embedding(edited.hf).weight.data = embedding(m.hf).weight.data.clone()
    if fault == "MLP 3 not edited":
        mlp_writes(blocks(edited.hf)[3]).weight.data = mlp_writes(blocks(m.hf)[3]).weight.data.clone()
    if fault == "head edited too":
        unembedding(edited.hf).weight.data = project_out(unembedding(edited.hf).weight.data, r)
    return edited


def _on_faulty_edit(function: Any, inputs: dict[str, Any]) -> Any:
    m, r = chat_model(), inputs["r"]
    return function(m, _faulty(m, r, inputs["fault"]), r, inputs["prompts"])


def _gap_cases(seed: int) -> list[Case]:
    r = 4 * random_directions(chat_model().width, 1, seed=seed + 60)[0]
    return [
        Case(f"weights: {fault}", {"fault": fault, "r": r, "prompts": prompts("harmful_val", seed, 3)})
        for fault in FAULTS
    ]


def _gaps(m: Model, edited: Model, r: Tensor, prompts: list[str], *, hooked: str = "m", reduce: Any = None) -> Tensor:
    """Gaps between two runs: hooks on m, on the edited model or on none, against the weights."""
    model = edited if hooked == "edited" else m
    edit, other_edit = (None if hooked == "none" else ablation(r)), (ablation(r) if hooked == "both" else None)
    reduce = reduce or (lambda x: x.abs().max())
    a = residual(model, prompts, positions=[-1], edit=edit)
    b = residual(edited, prompts, positions=[-1], edit=other_edit)
    streams = [reduce(a[:, layer] - b[:, layer]) for layer in range(m.n_layers)]
    return torch.stack([*streams, reduce(logits(model, prompts, edit=edit) - logits(edited, prompts, edit=other_edit))])


GAPS = define(
    "5.3",
    reference=gap_by_layer,
    observe=_on_faulty_edit,
    cases=_gap_cases,
    tolerance=1e-3,
    mistakes=(
        Mistake(
            "no hooks",
            lambda m, edited, r, prompts: _gaps(m, edited, r, prompts, hooked="none"),
            "This is the *effect* of the edit: untouched against edited. The proof compares the edit with the hooks: "
            "run m with `edit=ablation(r)`.",
        ),
        Mistake(
            "hooks on the edited model",
            lambda m, edited, r, prompts: _gaps(m, edited, r, prompts, hooked="edited"),
            "Both runs use the edited weights, so a fault in them hides. The hooks belong on `m`, the original.",
        ),
        Mistake(
            "hooks on both",
            lambda m, edited, r, prompts: _gaps(m, edited, r, prompts, hooked="both"),
            "The edited model must run without hooks, which would hide what its weights fail to do.",
        ),
        Mistake(
            "mean instead of maximum",
            lambda m, edited, r, prompts: _gaps(m, edited, r, prompts, reduce=lambda x: x.abs().mean()),
            "A mean can be small while one prompt is far off. To test an equality, take the largest difference.",
        ),
        Mistake(
            "no absolute value",
            lambda m, edited, r, prompts: _gaps(m, edited, r, prompts, reduce=lambda x: x.max()),
            "Differences have signs: take the absolute value before the maximum.",
        ),
        Mistake(
            "no logits",
            lambda m, edited, r, prompts: gap_by_layer(m, edited, r, prompts)[:-1],
            "The last entry is missing: the largest difference of the logits. Some faults show only there.",
        ),
    ),
    hints=(
        "Two runs of the same prompts: m under hooks, and the edited model without. What enters block l in each?",
        "`residual(m, prompts, positions=[-1], edit=ablation(r))` is [n, layers, 1, width]; `logits(...)` takes `edit` "
        "too.",
        "`(a - b).abs().amax((0, 2, 3))` leaves the layers. Append the largest absolute difference of the two logits "
        "with `torch.cat`.",
    ),
)

# --- 5.4 -----------------------------------------------------------------------------------------------------------

WIDTH = 32
ARCHITECTURES = {
    "a Llama: untied, no biases": ("Llama", {}),
    "a Llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "a Llama with a tied head": ("Llama", {"tie_word_embeddings": True}),
    "GPT-2 without its biases, untied": ("GPT2", {"biases": False}),
    "GPT-2: learned positions, biases, tied head": ("GPT2", {"tie_word_embeddings": True}),
}


def _random_model(architecture: str, seed: int) -> Model:
    """A small model with random weights, none of them zero. Square where it can be, so that a wrong side shows."""
    family, settings = ARCHITECTURES[architecture]
    settings = {"tie_word_embeddings": False, **settings}
    biases = settings.pop("biases", True)
    tokenizer = chat_model().tokenizer
    size = (
        {"n_embd": WIDTH, "n_inner": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 256}
        if family == "GPT2"
        else {
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
        }
    )
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=None, eos_token_id=2, **size, **settings
    )
    generator = torch.Generator().manual_seed(seed)
    hf = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, p in hf.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (1.0 if p.ndim == 1 or "emb" in name else 0.3))
            if name.endswith("bias") and not biases:
                p.zero_()
    return wrap(hf, tokenizer, architecture)


def _full_cases(seed: int) -> list[Case]:
    r = 3 * random_directions(WIDTH, 1, seed=seed + 70)[0]
    return [
        Case(name, {"architecture": name, "seed": seed, "r": r, "prompts": prompts("harmless_val", seed, 3)})
        for name in ARCHITECTURES
    ]


def _linear_everywhere(m: Model, r: Tensor) -> Model:
    """The full edit, but Conv1D is taken for a Linear."""
    edited = orthogonalize(m, r)
    for ours, theirs in zip(blocks(edited.hf), blocks(m.hf), strict=True):
        for write in (attention_writes, mlp_writes):
            write(ours).weight.data = _without(write(theirs).weight.data, r, "linear")
    return edited


def _bias_to_zero(m: Model, r: Tensor) -> Model:
    """The full edit, with output biases removed instead of projected."""
    edited = orthogonalize(m, r)
    for block in blocks(edited.hf):
        for write in (attention_writes(block), mlp_writes(block)):
            if write.bias is not None:
                write.bias.data.zero_()
    return edited


FULL = define(
    "5.4",
    reference=orthogonalize,
    observe=lambda function, inputs: _observe_edit(
        _random_model(inputs["architecture"], inputs["seed"]), function, inputs
    ),
    cases=_full_cases,
    tolerance=1e-3,
    mistakes=(
        Mistake(
            "original edited",
            lambda m, r: _plain(copied=False)(m, r),
            "The model that was passed in has changed. Edit a copy: `copy.deepcopy(m.hf)`.",
        ),
        Mistake(
            "head still tied",
            lambda m, r: orthogonalize(m, r, skip=("untie",)),
            "Embedding and head share one tensor, so your edit changes the head as well. Give the head a copy of its "
            "own *before* you edit the embedding.",
        ),
        Mistake(
            "positions left out",
            lambda m, r: orthogonalize(m, r, skip=("positions",)),
            "GPT-2 adds a learned position embedding to the stream, so edit it like the token embedding.",
        ),
        Mistake(
            "biases left out",
            lambda m, r: orthogonalize(m, r, skip=("biases",)),
            "An output bias goes into the stream unchanged. Project it too: `b - (b @ u) * u`.",
        ),
        Mistake(
            "biases set to zero",
            _bias_to_zero,
            "You removed the whole bias. Ablation removes only its component along r.",
        ),
        Mistake(
            "Conv1D taken for a Linear",
            _linear_everywhere,
            "GPT-2's modules are Conv1D and store [in, out]. Here they are square, so the wrong side raises no error.",
        ),
    ),
    hints=(
        "Go through what enters the stream: token embedding, position embedding if there is one, and for each block "
        "two matrices with their biases, if any. Then ask of each tensor whether another module uses it.",
        "`positional_embedding(hf)` is None where there is none. "
        '`getattr(module, "bias", None)` is None where there is no bias, also for an embedding. '
        "`unembedding(hf).weight is embedding(hf).weight` tells whether the head is tied. "
        "`isinstance(module, torch.nn.Linear)` tells the layouts apart.",
        "Untie the head first: `head = unembedding(hf)`, then "
        "`head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)`. Then one helper that projects "
        "weight and bias of a module, and a loop over all writers.",
    ),
)

# --- 5.5 -----------------------------------------------------------------------------------------------------------


def _text_cases(seed: int) -> list[Case]:
    g = torch.Generator().manual_seed(seed)

    def case(what: str, counted: list[list[int]], scale: float = 2.0) -> Case:
        mask = torch.tensor(counted, dtype=torch.bool)
        n, seq = mask.shape
        inputs = {
            "logits": scale * torch.randn(n, seq, 9, generator=g),
            "ids": torch.randint(9, (n, seq), generator=g),
            "counted": mask,
        }
        return Case(what, inputs)

    return [
        case("2 texts of one length, of which all but the first token count", [[0, 1, 1, 1, 1]] * 2),
        case(
            "texts of different length, padded on the left",
            [[0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1]],
        ),
        case("a reply behind a prompt: only its last two tokens count", [[0, 0, 0, 0, 1, 1]]),
        case("large logits, where exp() alone overflows", [[0, 1, 1, 1], [0, 0, 1, 1]], 60.0),
    ]


def _loss(logits: Tensor, ids: Tensor, counted: Tensor) -> Tensor:
    """Cross-entropy of each token given the logits at its own place in the list; 0 where it does not count."""
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    return losses * counted


LOSS = define(
    "5.5",
    reference=next_token_loss,
    cases=_text_cases,
    mistakes=(
        Mistake(
            "no shift",
            lambda logits, ids, counted: _loss(logits, ids, counted).sum(-1) / counted.sum(-1),
            "The logits at a token are compared with that token itself. They predict the *next* one.",
        ),
        Mistake(
            "minus forgotten",
            lambda logits, ids, counted: -next_token_loss(logits, ids, counted),
            "The sign is reversed: a loss is *minus* the log probability, so it is never negative.",
        ),
        Mistake(
            "shifted the wrong way",
            lambda logits, ids, counted: (
                _loss(logits[:, 1:], ids[:, :-1], counted[:, 1:]).sum(-1) / counted[:, 1:].sum(-1)
            ),
            "You pair the logits at i with token i - 1, which the model has already read. Pair `logits[:, :-1]` with "
            "`ids[:, 1:]`.",
        ),
        Mistake(
            "counted not shifted",
            lambda logits, ids, counted: (
                _loss(logits[:, :-1], ids[:, 1:], counted[:, :-1]).sum(-1) / counted[:, :-1].sum(-1)
            ),
            "`counted` says which *tokens* are scored, so it goes with `ids[:, 1:]`: take `counted[:, 1:]`.",
        ),
        Mistake(
            "padding and prompt counted",
            lambda logits, ids, counted: _loss(logits[:, :-1], ids[:, 1:], torch.ones_like(counted[:, 1:])).mean(-1),
            "All positions enter the mean. Leave out the tokens for which `counted` is False.",
        ),
        Mistake(
            "divided by the padded length",
            lambda logits, ids, counted: _loss(logits[:, :-1], ids[:, 1:], counted[:, 1:]).mean(-1),
            "The sum is right, but the divisor is wrong. For each text, divide by the number of its tokens that count.",
        ),
        Mistake(
            "sum instead of mean",
            lambda logits, ids, counted: _loss(logits[:, :-1], ids[:, 1:], counted[:, 1:]).sum(-1),
            "This is the sum over the tokens. Divide by the number of tokens that count.",
        ),
        Mistake(
            "bits instead of nats",
            lambda logits, ids, counted: next_token_loss(logits, ids, counted) / torch.log(torch.tensor(2.0)),
            "This is in bits. Use the natural logarithm.",
        ),
        Mistake(
            "one number for all texts",
            lambda logits, ids, counted: next_token_loss(logits, ids, counted).mean(),
            "Return one number for each text: paired intervals need them one by one.",
        ),
    ),
    hints=(
        "Write five tokens on paper and draw an arrow from each logit to the token that it predicts. Which logit has "
        "no arrow, and which token gets none?",
        "Compare `logits[:, :-1]` with `ids[:, 1:]` and `counted[:, 1:]`. `log_softmax(-1)` and `gather` pick the log "
        "probability of each token; `torch.nn.functional.cross_entropy(..., reduction='none')` does so too, with the "
        "vocabulary in dimension 1: `logits.transpose(1, 2)`.",
        "`log_p = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]`, then minus the sum over the "
        "counted tokens, divided by their number.",
    ),
)

# --- 5.6 -----------------------------------------------------------------------------------------------------------


def _interval(before: Tensor, after: Tensor, picks: Tensor) -> tuple[float, float, float]:
    change = after - before
    means = change[picks].mean(1)
    return change.mean().item(), *means.quantile(torch.tensor([0.025, 0.975])).tolist()


def _unpaired(before: Tensor, after: Tensor, picks: Tensor) -> tuple[float, float, float]:
    means = after[picks].mean(1) - before[picks.flip(0)].mean(1)
    return (after.mean() - before.mean()).item(), *means.quantile(torch.tensor([0.025, 0.975])).tolist()


def _with_quantiles(low: float, high: float) -> Callable[..., tuple[float, ...]]:
    def interval(before: Tensor, after: Tensor, picks: Tensor) -> tuple[float, ...]:
        change = after - before
        return change.mean().item(), *change[picks].mean(1).quantile(torch.tensor([low, high])).tolist()

    return interval


def _normal(before: Tensor, after: Tensor, picks: Tensor) -> tuple[float, float, float]:
    change = after - before
    mean, error = change.mean().item(), change.std().item() / len(change) ** 0.5
    return mean, mean - 1.96 * error, mean + 1.96 * error


def _interval_cases(seed: int) -> list[Case]:
    g = torch.Generator().manual_seed(seed)

    def case(what: str, n: int, shift: float) -> Case:
        before = 4 * torch.rand(n, generator=g)
        after = before + shift + 0.3 * torch.randn(n, generator=g)
        return Case(what, {"before": before, "after": after, "picks": torch.randint(n, (500, n), generator=g)})

    return [
        case("40 texts whose loss rises", 40, 0.2),
        case("25 texts whose loss hardly changes", 25, 0.0),
        case("60 texts whose loss falls", 60, -0.4),
    ]


INTERVAL = define(
    "5.6",
    reference=_interval,
    cases=_interval_cases,
    mistakes=(
        Mistake(
            "other cases on either side",
            _unpaired,
            "You resampled each side on its own, so the spread between texts enters the interval again. Use the same "
            "picks for both: resample the differences.",
        ),
        Mistake(
            "before minus after",
            lambda before, after, picks: _interval(after, before, picks),
            "The sign is reversed: a loss that rises is a positive change, after minus before.",
        ),
        Mistake(
            "mean over the draws",
            lambda before, after, picks: (
                (after - before).mean().item(),
                *(after - before)[picks].mean(0).quantile(torch.tensor([0.025, 0.975])).tolist(),
            ),
            "`change[picks]` is [draws, n]. Average over the texts of a draw, `mean(1)`, not over the draws.",
        ),
        Mistake(
            "90 % instead of 95 %",
            _with_quantiles(0.05, 0.95),
            "These are the 5 % and 95 % quantiles: a 90 % interval. For 95 % leave out 2.5 % on each side.",
        ),
        Mistake(
            "smallest and largest draw",
            _with_quantiles(0.0, 1.0),
            "The most extreme draws get further apart with more draws. Take the 2.5 % and 97.5 % quantiles.",
        ),
        Mistake(
            "spread of the texts, not of their mean",
            lambda before, after, picks: (
                (after - before).mean().item(),
                *(after - before).quantile(torch.tensor([0.025, 0.975])).tolist(),
            ),
            "This interval shows where single texts lie. You want one for their *mean*: take quantiles of the draws' "
            "means.",
        ),
        Mistake(
            "normal approximation",
            _normal,
            "This is mean +- 1.96 standard errors. It is a fair approximation, but the task is the bootstrap: use "
            "`picks`.",
        ),
    ),
    hints=(
        "One number for each text: how much did its loss change?",
        "`change[picks]` is [draws, n]: each row is a sample of the texts, drawn with replacement.",
        "The means of the rows, `change[picks].mean(1)`, and their `quantile(torch.tensor([0.025, 0.975]))`.",
    ),
)

EXERCISES = (ONE_MATRIX, EDIT, GAPS, FULL, LOSS, INTERVAL)
