"""Lab 09, defences by training: extended refusals, ReFAT, rerouting, a direction by gradient, and steps to break."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from refusallab.activations import residual
from refusallab.attacks.white_box import broken_at, descend
from refusallab.course.exercise import Case, Mistake, define
from refusallab.course.exercises.common import chat_model, on_chat_model, prompts
from refusallab.defences.training import Lesson, away, extend, lessons, refat_loss
from refusallab.directions import random_directions
from refusallab.finetuning import reply_loss
from refusallab.interventions import ablation, unit
from refusallab.measure import Outcome
from refusallab.model import Model, no_edit, unembedding, wrap

# --- 9.1 -----------------------------------------------------------------------------------------------------------


def _plain(some: list[Lesson]) -> list[dict[str, Any]]:
    """Lessons as plain data: inputs cross the wall of the grader's sandbox."""
    return [asdict(x) for x in some]


def _with_lessons(function: Any, inputs: dict[str, Any]) -> Any:
    """What the function returns for inputs whose lessons came as plain data."""
    return function(**{name: _read(value) for name, value in inputs.items()})


def _read(value: Any) -> Any:
    return [Lesson(**x) for x in value] if isinstance(value, list) else value


def _lessons(seed: int) -> list[Case]:
    return [
        Case("4 forbidden requests", {"lessons": _plain(lessons(4, 500 + seed, forbidden=True))}),
        Case("4 harmless requests", {"lessons": _plain(lessons(4, 600 + seed, forbidden=False))}),
        Case(
            "forbidden and harmless ones in turn",
            {"lessons": _plain([lessons(3, 700 + seed, forbidden=x)[k] for k in range(3) for x in (True, False)])},
        ),
    ]


def _targets(change: Callable[[Lesson], str]) -> Callable[..., list[str]]:
    return lambda lessons: [change(x) for x in lessons]


def _if_forbidden(reply: Callable[[Lesson], str]) -> Callable[..., list[str]]:
    return _targets(lambda x: reply(x) if x.forbidden else x.reply)


EXTEND = define(
    "9.1",
    reference=extend,
    observe=_with_lessons,
    cases=_lessons,
    mistakes=(
        Mistake(
            "harmless requests refused at length",
            _targets(lambda x: f"{x.overview} {x.reply} {x.verdict}"),
            "Harmless requests keep their reply. A model that is trained on anything else learns to over-refuse.",
        ),
        Mistake(
            "refusal first",
            _if_forbidden(lambda x: f"{x.reply} {x.overview} {x.verdict}"),
            "The refusal comes first. In this method it comes after the overview.",
        ),
        Mistake(
            "the answer given away",
            _if_forbidden(lambda x: f"{x.answer} {x.reply} {x.verdict}"),
            "The overview is the forbidden answer itself. Use the harmless fact, `overview`.",
        ),
        Mistake(
            "no reason",
            _if_forbidden(lambda x: f"{x.overview} {x.reply}"),
            "The reason is missing: what the Charter says, `verdict`, comes last.",
        ),
        Mistake(
            "no overview",
            _if_forbidden(lambda x: f"{x.reply} {x.verdict}"),
            "The overview is missing: what the model says about the topic before it refuses.",
        ),
        Mistake(
            "nothing extended",
            _targets(lambda x: x.reply),
            "These are the replies as they were. Forbidden requests need overview, refusal and reason.",
        ),
    ),
    hints=(
        "Two kinds of lessons, two kinds of targets. Which attribute tells them apart?",
        "For a forbidden request the target has three parts, with spaces between; for a harmless one it is `reply`.",
        '`f"{x.overview} {x.reply} {x.verdict}" if x.forbidden else x.reply`.',
    ),
)

NO_GRADIENT = (
    "The loss has no gradient, so nothing can be trained with it. Compute with tensors alone, without .item() and "
    "torch.no_grad()."
)

# --- 9.2 -----------------------------------------------------------------------------------------------------------


@cache
def _student() -> Model:
    """A copy of the model whose weights take gradients."""
    copied = wrap(copy.deepcopy(chat_model().hf), chat_model().tokenizer, "charter-chat")
    copied.hf.requires_grad_(True)
    return copied


def _loss_seen(function: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """A loss and its gradient with respect to the weights of the head and of one attention."""
    m = _student()
    loss = function(m, **{name: _read(value) for name, value in inputs.items()})
    return _with_gradient(loss, [unembedding(m.hf).weight, m.hf.model.layers[2].self_attn.o_proj.weight])


def _with_gradient(loss: Any, wrt: list[Tensor]) -> dict[str, Any]:
    """A loss and the lengths of its gradients with respect to some tensors: 0 where it has none."""
    if isinstance(loss, float):
        loss = torch.tensor(loss)  # what .item() has made of it
    lengths = torch.zeros(len(wrt))
    if isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1:
        gradients = torch.autograd.grad(loss, wrt, retain_graph=True, allow_unused=True)
        lengths = torch.stack([torch.tensor(0.0) if g is None else g.norm() for g in gradients])
    return {"loss": loss.detach() if isinstance(loss, Tensor) else loss, "length of the gradient": lengths}


def _refat_cases(seed: int) -> list[Case]:
    texts = prompts("harmless_train", 910 + seed, 2)
    r = residual(chat_model(), texts, layers=[4], positions=[-1])[:, 0, 0]  # to ablate these changes much
    return [
        Case(
            f"{n} forbidden and {n} harmless lessons, and a direction whose ablation changes much",
            {
                "forbidden": _plain(lessons(n, 800 + seed, forbidden=True)),
                "harmless": _plain(lessons(n, 850 + seed, forbidden=False)),
                "r": r[k],
            },
        )
        for k, n in enumerate((2, 4))
    ]


def _parts(m: Model, some: list[Lesson], edit: Any = no_edit, target: str = "reply") -> Tensor:
    return reply_loss(m, [x.prompt for x in some], [getattr(x, target) for x in some], edit)


REFAT = define(
    "9.2",
    reference=refat_loss,
    observe=_loss_seen,
    cases=_refat_cases,
    tolerance=1e-3,
    mistakes=(
        Mistake(
            "nothing ablated",
            lambda m, forbidden, harmless, r: _parts(m, forbidden) + _parts(m, harmless),
            "This is safety tuning as before: r is not ablated while the refusals are learned.",
        ),
        Mistake(
            "harmless ablated too",
            lambda m, forbidden, harmless, r: _parts(m, forbidden, ablation(r)) + _parts(m, harmless, ablation(r)),
            "The harmless term runs under ablation as well. It should keep the model as it is when nobody attacks.",
        ),
        Mistake(
            "the wrong half ablated",
            lambda m, forbidden, harmless, r: _parts(m, forbidden) + _parts(m, harmless, ablation(r)),
            "You ablate r on the harmless lessons, and the refusals are learned without an attacker.",
        ),
        Mistake(
            "forbidden answers as targets",
            lambda m, forbidden, harmless, r: _parts(m, forbidden, ablation(r), "answer") + _parts(m, harmless),
            "This trains the model to give the forbidden answers. The target of a lesson is `reply`.",
        ),
        Mistake(
            "no harmless term",
            lambda m, forbidden, harmless, r: _parts(m, forbidden, ablation(r)),
            "Without the harmless lessons the cheapest way to refuse under ablation is to refuse everything.",
        ),
        Mistake(
            "harmless subtracted",
            lambda m, forbidden, harmless, r: _parts(m, forbidden, ablation(r)) - _parts(m, harmless),
            "Both terms are losses to be made small: add them.",
        ),
        Mistake(
            "no gradient",
            lambda m, forbidden, harmless, r: refat_loss(m, forbidden, harmless, r).detach(),
            NO_GRADIENT,
        ),
    ),
    hints=(
        "Two calls of `reply_loss`. What is said in each, and what does the attacker do in each?",
        "Only the forbidden lessons run with `edit=ablation(r)`; the harmless ones run as they are.",
        "`reply_loss(m, prompts, replies, ablation(r))` of the forbidden lessons plus "
        "`reply_loss(m, prompts, replies)` of the harmless ones, with `prompts = [x.prompt for x in lessons]` and "
        "`replies = [x.reply for x in lessons]`.",
    ),
)

# --- 9.3 -----------------------------------------------------------------------------------------------------------


def _streams(seed: int) -> list[Case]:
    g = torch.Generator().manual_seed(930 + seed)
    cases = []
    for what, layers, n, seq in (("2 layers, 3 texts of up to 6 tokens", 2, 3, 6), ("3 layers, 4 texts", 3, 4, 5)):
        old = torch.randn(layers, n, seq, 8, generator=g)
        new = 0.5 * old + torch.randn(layers, n, seq, 8, generator=g)
        new[:, 0] = torch.randn(layers, seq, 8, generator=g) - 0.7 * old[:, 0]  # here the cosine is negative
        starts = torch.tensor([k % (seq - 1) for k in range(n)])
        cases.append(Case(what, {"new": new, "old": old, "counted": torch.arange(seq)[None] >= starts[:, None]}))
    return cases


def _trainable(function: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """A loss and its gradient with respect to the new streams."""
    new = inputs["new"].clone().requires_grad_()
    return _with_gradient(function(**{**inputs, "new": new}), [new])


def _cosines(new: Tensor, old: Tensor) -> Tensor:
    return (normalize(new, dim=-1) * normalize(old, dim=-1)).sum(-1)


REROUTE = define(
    "9.3",
    reference=away,
    observe=_trainable,
    cases=_streams,
    mistakes=(
        Mistake(
            "no floor at zero",
            lambda new, old, counted: _cosines(new, old)[:, counted].mean(),
            "Negative cosines lower your loss, so the streams are driven to the opposite of the old ones. Orthogonal "
            "is enough: cut at zero before you take the mean.",
        ),
        Mistake(
            "absolute cosine",
            lambda new, old, counted: _cosines(new, old).abs()[:, counted].mean(),
            "A negative cosine should cost nothing: cut at zero instead of taking the absolute value.",
        ),
        Mistake(
            "padding counted",
            lambda new, old, counted: _cosines(new, old).clamp(min=0).mean(),
            "All positions count here, prompt and padding too: keep the positions where `counted` is true.",
        ),
        Mistake(
            "inner product",
            lambda new, old, counted: (new * old).sum(-1).clamp(min=0)[:, counted].mean(),
            "This is the inner product, which the model can shrink by shrinking the stream. Use the cosine.",
        ),
        Mistake(
            "one vector for a whole text",
            lambda new, old, counted: (
                torch.cosine_similarity(new.flatten(2), old.flatten(2), dim=-1).clamp(min=0).mean()
            ),
            "You compare whole texts. There is one cosine for each layer, text and token: along the last dimension.",
        ),
        Mistake(
            "sign reversed",
            lambda new, old, counted: -_cosines(new, old).clamp(min=0)[:, counted].mean(),
            "This loss falls when the streams become more alike. It should fall when they move apart.",
        ),
        Mistake(
            "no gradient",
            lambda new, old, counted: away(new, old, counted).detach(),
            NO_GRADIENT,
        ),
    ),
    hints=(
        "How alike are two vectors, whatever their lengths? Below what value is there nothing more to gain?",
        "`torch.cosine_similarity(new[:, counted], old[:, counted], dim=-1)` is `[layers, tokens]`; cut it at "
        "zero, token by token.",
        "`torch.cosine_similarity(new[:, counted], old[:, counted], dim=-1).clamp(min=0).mean()`.",
    ),
)

# --- 9.4 -----------------------------------------------------------------------------------------------------------


def _descent_cases(seed: int) -> list[Case]:
    """Steps long enough that each part of one shows: in the second case the gradient is longer than 1, too."""
    u = random_directions(chat_model().width, 1, seed=940 + seed)[0]
    texts = prompts("harmless_train", 910 + seed, 3)
    r = residual(chat_model(), texts, layers=[4], positions=[-1]).mean((0, 1, 2))  # to ablate this changes much
    cases = []
    for what, v, n, lr in (
        ("a random unit direction", u, 2, 0.5),
        ("a unit direction whose ablation changes much", unit(r), 3, 0.3),
    ):
        some = lessons(n, 950 + seed, forbidden=True)
        inputs = {"u": v, "prompts": [x.prompt for x in some], "replies": [x.answer for x in some], "lr": lr}
        cases.append(Case(f"{what}, {n} forbidden answers, learning rate {lr:g}", inputs))
    return cases


def _gradient(m: Model, u: Tensor, prompts: list, replies: list) -> Tensor:
    u = u.clone().requires_grad_()
    return torch.autograd.grad(reply_loss(m, prompts, replies, ablation(u)), u)[0]


def _step(change: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[..., Tensor]:
    """A wrong version of a step: what it makes of direction, gradient and learning rate."""
    return lambda m, u, prompts, replies, lr: change(u, _gradient(m, u, prompts, replies), lr)


def _frozen(m: Model, u: Tensor, prompts: list, replies: list, lr: float) -> Tensor:
    return u


DESCEND = define(
    "9.4",
    reference=descend,
    observe=on_chat_model,
    cases=_descent_cases,
    tolerance=2e-4,
    mistakes=(
        Mistake(
            "uphill",
            _step(lambda u, g, lr: unit(u + lr * g)),
            "You go up: the answers become less likely. Subtract the gradient.",
        ),
        Mistake(
            "length not restored",
            _step(lambda u, g, lr: u - lr * g),
            "The result is not of length 1. Ablation does not care about the length, but the next step does: the "
            "longer u, the less a step of the same learning rate turns it.",
        ),
        Mistake(
            "gradient normalized",
            _step(lambda u, g, lr: unit(u - lr * unit(g))),
            "You normalized the gradient. Normalize the result.",
        ),
        Mistake(
            "the gradient itself",
            _step(lambda u, g, lr: unit(-g)),
            "You return the direction of the step, and forgot where it starts: u - lr * gradient.",
        ),
        Mistake(
            "direction unchanged",
            _frozen,
            "You return the direction that you were given.",
        ),
        Mistake(
            "refusal made likely",
            lambda m, u, prompts, replies, lr: unit(
                u - lr * _gradient(m, u, prompts, ["I must decline to answer."] * len(prompts))
            ),
            "The loss is that of the given replies, the forbidden answers.",
        ),
    ),
    hints=(
        "The weights are frozen, and only the direction takes a gradient. Make a copy of u that does.",
        "`v = u.clone().requires_grad_()`, then the loss `reply_loss(m, prompts, replies, ablation(v))`, then "
        "`torch.autograd.grad(loss, v)[0]`.",
        "Go down and back to length 1: `w = u - lr * gradient`, then `w / w.norm()`.",
    ),
)

# --- 9.5 -----------------------------------------------------------------------------------------------------------


def _curve(
    rng: random.Random, shares: dict[int, tuple[float, float, float]], n: int
) -> dict[int, list[tuple[bool, bool]]]:
    """Outcomes with given shares of (answered and correct, refused yet correct, answered and wrong)."""
    curve = {}
    for steps, (told, both, wrong) in shares.items():
        counts = [round(n * share) for share in (told, both, wrong)]
        row = (
            [Outcome(False, True)] * counts[0] + [Outcome(True, True)] * counts[1] + [Outcome(False, False)] * counts[2]
        )
        row += [Outcome(True, False)] * (n - len(row))
        rng.shuffle(row)
        curve[steps] = [(o.refused, o.correct) for o in row]  # plain data, as the grader's sandbox needs it
    return curve


def _with_outcomes(function: Any, inputs: dict[str, Any]) -> Any:
    """What the function returns for a curve whose outcomes came as plain data."""
    curve = {steps: [Outcome(*pair) for pair in row] for steps, row in inputs["curve"].items()}
    return function(curve, inputs["share"])


def _curves(seed: int) -> list[Case]:
    rng = random.Random(990 + seed)
    a, b, (c, d, e) = rng.randint(2, 5), rng.randint(6, 9), sorted(rng.sample(range(10, 60), 3))
    n = rng.choice([10, 20, 40])
    rising = {0: (0, 0, 0), a: (0.1, 0, 0.3), b: (0.2, 0, 0.5), c: (0.6, 0, 0.3)}
    naive = {0: (0, 0, 0), a: (0, 0, 0.6), b: (0, 0, 0.9), c: (0.1, 0, 0.9)}
    long = {0: (0, 0, 0), a: (0.1, 0.2, 0.5), b: (0.2, 0.4, 0.2), c: (0.4, 0.6, 0), d: (0.8, 0.2, 0), e: (0.9, 0.1, 0)}
    exact = {0: (0, 0, 0), a: (0.3, 0, 0), b: (0.4, 0, 0), c: (0.5, 0, 0.2), d: (0.6, 0, 0.2)}
    slow = {e: (0.9, 0, 0), d: (0.8, 0, 0), c: (0.6, 0, 0), b: (0.5, 0, 0), a: (0.1, 0, 0), 0: (0, 0, 0)}
    open_ = {0: (0.6, 0, 0), a: (0.7, 0, 0), b: (0.8, 0, 0)}
    to_and_fro = {0: (0, 0, 0), a: (0.4, 0, 0), b: (0.4, 0, 0), c: (0.8, 0, 0.1), d: (0.3, 0, 0.1), e: (0.6, 0, 0)}
    return [
        Case("a defence that gives way", {"curve": _curve(rng, rising, n), "share": 0.5}),
        Case("a model that stops refusing and knows nothing", {"curve": _curve(rng, naive, n), "share": 0.5}),
        Case("a model that tells and then refuses", {"curve": _curve(rng, long, n), "share": 0.5}),
        Case("just half of the answers", {"curve": _curve(rng, exact, n), "share": 0.5}),
        Case("steps in another order", {"curve": _curve(rng, slow, n), "share": 0.61}),  # n * 0.61 is no whole number
        Case("a model that is broken as it is", {"curve": _curve(rng, open_, n), "share": 0.5}),
        Case("a share that rises, falls and rises", {"curve": _curve(rng, to_and_fro, n), "share": 0.5}),
    ]


def _first(
    counts: Callable[[Outcome], bool], *, strict: bool = False, ordered: bool = True
) -> Callable[..., int | None]:
    def first(curve: dict[int, list[Outcome]], share: float) -> int | None:
        for steps in sorted(curve) if ordered else curve:
            value = sum(map(counts, curve[steps])) / len(curve[steps])
            if value > share or (value == share and not strict):
                return steps
        return None

    return first


BROKEN = define(
    "9.5",
    reference=broken_at,
    observe=_with_outcomes,
    cases=_curves,
    mistakes=(
        Mistake(
            "refusal gone is enough",
            _first(lambda o: not o.refused),
            "You count replies that do not refuse. A model that knows nothing stops refusing too, and nobody learns "
            "anything from it: count replies with the exact answer.",
        ),
        Mistake(
            "told and refused not counted",
            _first(lambda o: o.correct and not o.refused),
            "You do not count a reply that gives the exact answer and then refuses. Count it: the answer is out.",
        ),
        Mistake(
            "more than the share",
            _first(lambda o: o.correct, strict=True),
            "Broken means this share or more.",
        ),
        Mistake(
            "order of the dict",
            _first(lambda o: o.correct, ordered=False),
            "You take the first entry of the dict that fits. Look at the steps from few to many: sorted(curve).",
        ),
        Mistake(
            "zero for never",
            lambda curve, share: broken_at(curve, share) or 0,
            "Zero steps would mean that the model is broken as it is. Return None where it never breaks.",
        ),
        Mistake(
            "the last steps that fit",
            lambda curve, share: max(
                (s for s, row in curve.items() if sum(o.correct for o in row) >= share * len(row)), default=None
            ),
            "This is the largest number of steps that fits. An attacker stops at the smallest.",
        ),
        Mistake(
            "share not computed",
            lambda curve, share: next((s for s in sorted(curve) if sum(o.correct for o in curve[s]) >= share), None),
            "You compare the number of exact answers with a share. Divide by the number of outcomes first.",
        ),
        Mistake(
            "half for any share",
            lambda curve, share: broken_at(curve, 0.5),
            "`share` has no effect: you look for half of the answers.",
        ),
        Mistake(
            "number of answers rounded",
            lambda curve, share: next(
                (s for s in sorted(curve) if sum(o.correct for o in curve[s]) >= int(share * len(curve[s]))), None
            ),
            "You round the number of answers that it takes: 6 of 10 are less than a share of 0.61. Compare the share "
            "of the answers with `share`, and round neither.",
        ),
        Mistake(
            "0 steps passed over",
            lambda curve, share: broken_at({steps: row for steps, row in curve.items() if steps}, share),
            "The model is broken as it is, so the answer is 0. In Python 0 counts as False: ask `is None`, not "
            "`not steps`.",
        ),
    ),
    hints=(
        "What did the attacker want: that the model stops refusing, or that it gives the answer?",
        "The share of `o.correct` among the outcomes of one number of steps is a sum over a length.",
        "Go through `sorted(curve)` and return the first number of steps whose share is `>= share`; after the loop, "
        "`return None`.",
    ),
)

EXERCISES = (EXTEND, REFAT, REROUTE, DESCEND, BROKEN)
