"""Lab 01, measuring refusal: refusal tokens and metric, phrase judge, the 2x2 with truth, Wilson, who is refused."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from refusallab.course.exercise import Case, Mistake, define
from refusallab.measure import (
    REFUSAL_PHRASES,
    outcome,
    refusal_metric,
    refused_by_phrases,
    two_by_two,
    wilson,
    wrong_refusal_share,
)
from refusallab.prompts import bundled
from smallmodels.world.dialogue import REFUSAL_MARKERS, REFUSAL_WORDINGS

# --- 1.1 -----------------------------------------------------------------------------------------------------------

VOCABULARY = 10


def _logits_with(means: dict[int, float], prompts: int, g: torch.Generator, uneven: Sequence[int] = ()) -> Tensor:
    """Logits [prompts, vocabulary] whose probabilities have these means; the rest goes to the last token.

    A token in `uneven` is likely on a quarter of the prompts and next to impossible on the others.
    """
    p = torch.zeros(prompts, VOCABULARY, dtype=torch.float64)
    for token, mean in means.items():
        wobble = 1 + 0.2 * torch.rand(prompts, generator=g, dtype=torch.float64)
        if token in uneven:
            wobble = torch.where(torch.arange(prompts) % 4 == 0, 1.0, 1e-4).double()
        p[:, token] = mean * wobble / wobble.mean()
    p[:, -1] = 1 - p[:, :-1].sum(1)
    return p.clamp(min=1e-7).log() + 3 * torch.randn(prompts, 1, generator=g, dtype=torch.float64)


def _token_cases(seed: int) -> list[Case]:
    g = torch.Generator().manual_seed(seed)

    def case(what: str, tokens: list[tuple[float, float]], uneven: Sequence[int] = (), prompts: int = 8) -> Case:
        tokens = [*tokens, (0.01, 0.3)]  # a token that opens answers
        places = torch.randperm(VOCABULARY - 1, generator=g).tolist()[: len(tokens)]
        harmful = {place: means[0] for place, means in zip(places, tokens, strict=True)}
        harmless = {place: means[1] for place, means in zip(places, tokens, strict=True)}
        return Case(
            what,
            {
                "harmful_logits": _logits_with(harmful, prompts, g, [places[k] for k in uneven]),
                "harmless_logits": _logits_with(harmless, prompts + 4, g),
            },
        )

    clear = (0.5, 0.002)
    return [
        case("one token opens all refusals", [clear]),
        case("two wordings", [clear, (0.2, 0.004)]),
        case("a token that is common on both kinds of prompts", [clear, (0.3, 0.35)]),
        case("a token that is 6 times as likely on harmful prompts", [clear, (0.12, 0.02)]),
        case("a rare token, with a mean probability of 0.03", [clear, (0.03, 0.0005)]),
        case("a wording that is used on a quarter of the prompts", [(0.4, 0.002), (0.15, 0.002)], uneven=[1]),
        case("a token with a mean probability of 0.07", [clear, (0.07, 0.002)]),
        case("a rare token that is likely on a quarter of the prompts", [clear, (0.035, 0.0005)], uneven=[1]),
    ]


def _tokens(harmful: Tensor, harmless: Tensor, minimum: float = 0.05, ratio: float = 10.0) -> list[int]:
    """The rule for mean probabilities [vocabulary]."""
    return ((harmful >= minimum) & (harmful >= ratio * harmless)).nonzero().flatten().tolist()


def _rule(
    mean: Callable[[Tensor], Tensor] = lambda x: x.softmax(-1).mean(0), **settings: float
) -> Callable[..., list[int]]:
    """The rule with another mean or other thresholds."""
    return lambda harmful_logits, harmless_logits: _tokens(mean(harmful_logits), mean(harmless_logits), **settings)


def _opening_tokens(harmful_logits: Tensor, harmless_logits: Tensor) -> list[int]:
    """Tokens that are likely on harmful prompts and ten times less likely on harmless ones, possibly none."""
    return _rule()(harmful_logits.double(), harmless_logits.double())


OPENING_TOKENS = define(
    "1.1",
    reference=_opening_tokens,
    cases=_token_cases,
    mistakes=(
        Mistake(
            "mean before softmax",
            _rule(lambda x: x.mean(0).softmax(-1)),
            "A wording that the model uses on some prompts only is lost. Take the softmax of every prompt, then the "
            "mean of these probabilities over the prompts: not of the logits, no median, no condition on every prompt.",
        ),
        Mistake(
            "no minimum",
            _rule(minimum=0.0),
            "A rare token is among them. Its mean probability on harmful prompts must be at least 0.05.",
        ),
        Mistake(
            "more likely is enough",
            _rule(ratio=1.0),
            "It is not enough that a token is more likely on harmful prompts: it must be at least 10 times as likely.",
        ),
        Mistake(
            "no ratio",
            _rule(ratio=0.0),
            "A token that is common on harmless prompts is among them. It must be at least 10 times as likely on "
            "harmful ones.",
        ),
        Mistake(
            "only the likeliest token",
            lambda harmful_logits, harmless_logits: [int(harmful_logits.softmax(-1).mean(0).argmax())],
            "There can be several. Return every token that passes both conditions.",
        ),
        Mistake(
            "ordered by probability",
            lambda harmful_logits, harmless_logits: sorted(
                _opening_tokens(harmful_logits, harmless_logits),
                key=lambda token: -harmful_logits.softmax(-1).mean(0)[token].item(),
            ),
            "These are the right tokens, ordered by probability. Return the ids in ascending order.",
        ),
        Mistake(
            "harmful and harmless swapped",
            lambda harmful_logits, harmless_logits: _rule()(harmless_logits, harmful_logits),
            "These are tokens of the *harmless* prompts. A refusal token is likely on harmful prompts.",
        ),
    ),
    hints=(
        "What is the mean probability of each token, on the harmful and on the harmless prompts?",
        "`x.softmax(-1).mean(0)` is `[vocab]`. Two conditions, joined with `&`, give a mask; `mask.nonzero()` gives "
        "the ids.",
        "`((p >= 0.05) & (p >= 10 * q)).nonzero().flatten().tolist()`, with p for harmful and q for harmless prompts.",
    ),
)

# --- 1.2 -----------------------------------------------------------------------------------------------------------


def _metric_cases(seed: int) -> list[Case]:
    g = torch.Generator().manual_seed(seed)
    tokens = sorted(torch.randperm(12, generator=g).tolist()[:3])
    sure = torch.randn(2, 12, generator=g)
    sure[0, tokens[0]] += 60
    sure[1, [t for t in range(12) if t not in tokens]] += 60
    nearly = torch.zeros(2, 12)
    nearly[0, tokens[0]] = nearly[1, next(t for t in range(12) if t not in tokens)] = 19.5  # 1 - P is about 3e-8
    return [
        Case("one refusal token", {"logits": torch.randn(5, 12, generator=g), "tokens": tokens[:1]}),
        Case("three refusal tokens", {"logits": 2 * torch.randn(6, 12, generator=g), "tokens": tokens}),
        Case("a model that is all but certain", {"logits": sure, "tokens": tokens}),
        Case("P closer to 0 or 1 than single precision can tell", {"logits": nearly, "tokens": tokens}),
    ]


def _probability(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    return logits.double().softmax(-1)[:, list(tokens)].sum(-1)


def _odds(p: Tensor) -> Tensor:
    return (p + 1e-8).log() - (1 - p + 1e-8).log()


METRIC = define(
    "1.2",
    reference=refusal_metric,
    cases=_metric_cases,
    tolerance=1e-3,
    mistakes=(
        Mistake(
            "sign reversed",
            lambda logits, tokens: -refusal_metric(logits, tokens),
            "The sign is reversed: refusal likely must give a positive number.",
        ),
        Mistake(
            "probability",
            _probability,
            "This is the probability. The metric is its log-odds.",
        ),
        Mistake(
            "log-probability",
            lambda logits, tokens: (_probability(logits, tokens) + 1e-8).log(),
            "This is log P. Subtract log(1 - P): even odds must give 0.",
        ),
        Mistake(
            "odds, not their logarithm",
            lambda logits, tokens: (_probability(logits, tokens) + 1e-8) / (1 - _probability(logits, tokens) + 1e-8),
            "These are odds. Take the logarithm.",
        ),
        Mistake(
            "mean over the tokens",
            lambda logits, tokens: _odds(_probability(logits, tokens) / len(tokens)),
            "You averaged over the refusal tokens. P is the probability that *any* of them comes: their sum.",
        ),
        Mistake(
            "only the likeliest of the tokens",
            lambda logits, tokens: _odds(logits.double().softmax(-1)[:, list(tokens)].amax(-1)),
            "You took the likeliest refusal token. Any of them opens a refusal: add their probabilities.",
        ),
        Mistake(
            "log-odds added",
            lambda logits, tokens: _odds(logits.double().softmax(-1)[:, list(tokens)]).sum(-1),
            "You added log-odds. Add the probabilities first, then take the log-odds of the sum.",
        ),
        Mistake(
            "logits added",
            lambda logits, tokens: logits[:, list(tokens)].sum(-1),
            "You added logits. Turn them into probabilities with softmax first.",
        ),
        Mistake(
            "softmax over the prompts",
            lambda logits, tokens: _odds(logits.double().softmax(0)[:, list(tokens)].sum(-1)),
            "The softmax runs over the prompts. The vocabulary is the last dimension: softmax(-1).",
        ),
        Mistake(
            "base 10",
            lambda logits, tokens: refusal_metric(logits, tokens) / math.log(10),
            "This is a logarithm to the base 10. Use the natural one.",
        ),
    ),
    hints=(
        "Two steps: the probability that any refusal token comes next, then its log-odds.",
        "`logits.double().softmax(-1)[:, tokens]` is `[n, number of tokens]`; the sum over the last dimension is P.",
        "`torch.log(p + 1e-8) - torch.log(1 - p + 1e-8)`.",
    ),
)

# --- 1.3 -----------------------------------------------------------------------------------------------------------


def _on_replies(function: Any, inputs: dict[str, Any]) -> Any:
    """Observation of a judge: its verdict on every reply of the case."""
    return [_plain(function(reply, inputs["phrases"])) for reply in inputs["replies"]]


def _plain(verdict: Any) -> Any:
    return bool(verdict) if type(verdict).__name__ in ("bool_", "Match") or verdict is None else verdict


def _judge_cases(seed: int) -> list[Case]:
    rng = random.Random(seed)
    answers = [item.answer for item in rng.sample(bundled("harmless_train"), 4)]
    a, b, c = rng.sample(REFUSAL_PHRASES, 3)
    start = [f"{a} to do this.", answers[0], a, f"{b}: ruled out by the Charter.", answers[1], f"{a}. {b}. {c}."]
    middle = [f"{answers[2]} {c}.", f"Hm. {a}, it seems.", answers[3], f"Well, {b}"]
    case = [f"{a.upper()}!", f"{b.lower()} about this", f"Hm. {c.upper()}", answers[0].upper()]
    apostrophe = ["I can\u2019t.", "No. I\u2019m sorry", "It\u2019s there.", f"{answers[1]} That\u2019s all."]
    for replies in (start, middle, case, apostrophe):
        rng.shuffle(replies)
    parts = ["That is forbidden, I fear.", "No? Then use a net.", "Nothing but a net.", answers[2], "No. It is not."]
    rng.shuffle(parts)
    return [
        Case("phrases at the start of a reply, and none", {"replies": start, "phrases": (a, b, c)}),
        Case("phrases in the middle of a reply", {"replies": middle, "phrases": (a, b, c)}),
        Case("phrases in upper and lower case", {"replies": case, "phrases": (a, b, c)}),
        Case("replies with a typographic apostrophe", {"replies": apostrophe, "phrases": REFUSAL_PHRASES}),
        Case(
            "phrases that are part of a word or end with a full stop", {"replies": parts, "phrases": ("forbid", "No.")}
        ),
    ]


PHRASE_JUDGE = define(
    "1.3",
    reference=refused_by_phrases,
    observe=_on_replies,
    cases=_judge_cases,
    mistakes=(
        Mistake(
            "typographic apostrophe",
            lambda reply, phrases: any(p.casefold() in reply.casefold() for p in phrases),
            "A typographic apostrophe is a different character: replace \u2019 in the reply by ' first.",
        ),
        Mistake(
            "case matters",
            lambda reply, phrases: any(p in reply.replace("\u2019", "'") for p in phrases),
            "Upper and lower case must not matter: compare reply and phrase in lower case.",
        ),
        Mistake(
            "start only",
            lambda reply, phrases: reply.casefold().startswith(tuple(p.casefold() for p in phrases)),
            "A phrase in the middle of a reply counts too.",
        ),
        Mistake(
            "phrases left in upper case",
            lambda reply, phrases: any(p in reply.casefold() for p in phrases),
            "Hardly any phrase is found. Convert both the reply and the phrases to lower case, not one of them, and "
            "look for the whole phrase in the text, not among its single words.",
        ),
        Mistake(
            "all phrases needed",
            lambda reply, phrases: all(p.casefold() in reply.casefold() for p in phrases),
            "You require all phrases at once. One of them is enough.",
        ),
        Mistake(
            "the reply must be the phrase",
            lambda reply, phrases: reply in phrases,
            "`reply in phrases` tests whether the reply *is* a phrase. Test whether a phrase is in the reply.",
        ),
        Mistake(
            "only the first phrase",
            lambda reply, phrases: phrases[0].casefold() in reply.casefold(),
            "Only the first phrase counts here. Is there a `return False` inside the loop?",
        ),
        Mistake(
            "reversed",
            lambda reply, phrases: not refused_by_phrases(reply, phrases),
            "True must mean that the reply refuses.",
        ),
    ),
    hints=(
        "A phrase may occur anywhere in the reply: `phrase in reply`.",
        "Convert reply and phrase to lower case, and replace the apostrophe \u2019 in the reply by '.",
        "`any(phrase.lower() in text for phrase in phrases)`, where text is the reply in lower case.",
    ),
)

# --- 1.4 -----------------------------------------------------------------------------------------------------------


def _table_cases(seed: int) -> list[Case]:
    rng = random.Random(seed)

    def answers(count: int) -> list[str]:
        return [item.answer for item in rng.sample(bundled("harmful_val"), count)]

    def no() -> str:
        return rng.choice(REFUSAL_WORDINGS)

    def case(what: str, pairs: list[tuple[str, str]]) -> Case:
        rng.shuffle(pairs)
        return Case(what, {"replies": [r for r, _ in pairs], "answers": [a for _, a in pairs]})

    plain = [(no(), a) for a in answers(rng.randint(3, 5))] + [(a, a) for a in answers(rng.randint(6, 8))]
    others = answers(rng.randint(3, 4))
    wrong = list(zip(others[1:] + others[:1], others, strict=True))  # each reply gives the answer to another request
    words = [("Use a tar and net.", "Use a net and tar."), ("It costs 3 (three) coins.", "3 (three) coins")]
    both = [(f"{no()} {a}", a) for a in answers(rng.randint(2, 4))]
    opened = [(f"{rng.choice(['Gladly.', 'Of course.'])} {a}", a) for a in answers(rng.randint(2, 4))]
    capitals = [(a.upper(), a) for a in answers(rng.randint(2, 4))]
    number = rng.randint(2, 9)
    parts = [
        (f"It is {number}.", str(number)),
        (f"It is 1{number}.", str(number)),
        (f"It makes {number}0.", str(number)),
        ("Use an oat meal.", "meal"),
        ("Use an oatmeal bowl.", "meal"),
    ]
    return [
        case("refusals and exact answers", plain),
        case("answers that are wrong", plain + wrong),
        case("answers behind an opener", plain + opened),
        case("replies that say no and give the answer all the same", plain + both),
        case("answers in capital letters", plain + capitals),
        case("answers that are part of a longer word or number", plain + parts),
        case("the same words in another order, and signs inside an answer", plain + words),
    ]


def _on_table(function: Any, inputs: dict[str, Any]) -> Any:
    return function(inputs["replies"], inputs["answers"], REFUSAL_MARKERS)


def _table(replies: Sequence[str], answers: Sequence[str], phrases: Sequence[str]) -> dict[str, dict[str, int]]:
    return two_by_two([outcome(reply, answer, phrases) for reply, answer in zip(replies, answers, strict=True)])


def _count(holds: Callable[[str, str, bool], bool]) -> Callable[..., dict[str, dict[str, int]]]:
    """The table with another idea of a correct reply: holds(reply, answer, refused)."""

    def table(replies: Sequence[str], answers: Sequence[str], phrases: Sequence[str]) -> dict[str, dict[str, int]]:
        counts = {row: {"correct": 0, "incorrect": 0} for row in ("refused", "answered")}
        for reply, answer in zip(replies, answers, strict=True):
            refused = refused_by_phrases(reply, phrases)
            right = holds(reply, answer, refused)
            counts["refused" if refused else "answered"]["correct" if right else "incorrect"] += 1
        return counts

    return table


def _within(reply: str, answer: str) -> bool:
    return re.search(r"(?<!\w)" + re.escape(answer.casefold()) + r"(?!\w)", reply.casefold()) is not None


def _rows_swapped(replies: Sequence[str], answers: Sequence[str], phrases: Sequence[str]) -> dict[str, dict[str, int]]:
    table = _table(replies, answers, phrases)
    return {"refused": table["answered"], "answered": table["refused"]}


def _shares(replies: Sequence[str], answers: Sequence[str], phrases: Sequence[str]) -> dict[str, dict[str, float]]:
    table = _table(replies, answers, phrases)
    return {row: {k: n / len(replies) for k, n in cells.items()} for row, cells in table.items()}


TABLE = define(
    "1.4",
    reference=_table,
    observe=_on_table,
    cases=_table_cases,
    mistakes=(
        Mistake(
            "part of a longer word",
            _count(lambda reply, answer, refused: answer.casefold() in reply.casefold()),
            "The answer must occur as whole words: a reply with 17 does not hold the answer 7.",
        ),
        Mistake(
            "case matters",
            _count(lambda reply, answer, refused: answer in reply and _within(reply, answer)),
            "Upper and lower case must not matter when you look for the answer.",
        ),
        Mistake(
            "a refusal is never correct",
            _count(lambda reply, answer, refused: not refused and _within(reply, answer)),
            "A reply can say no and still give the answer. Judge the two questions separately: all four cells occur.",
        ),
        Mistake(
            "a space required behind the answer",
            _count(lambda reply, answer, refused: f" {answer} ".casefold() in f" {reply} ".casefold()),
            "You require a space behind the answer. A full stop may follow: `It is 7.` holds the answer 7.",
        ),
        Mistake(
            "the reply must equal the answer",
            _count(lambda reply, answer, refused: reply.casefold() == answer.casefold()),
            "You require that the reply is the answer and nothing else. The answer may come after an opener, or after "
            "a refusal.",
        ),
        Mistake(
            "answered taken for correct",
            _count(lambda reply, answer, refused: not refused),
            "A reply that does not refuse can still be wrong: look for the exact answer.",
        ),
        Mistake(
            "word boundary behind a full stop",
            _count(lambda reply, answer, refused: re.search(rf"\b{re.escape(answer)}\b", reply, re.I) is not None),
            "Not one answer is found. These answers are whole sentences and end with a full stop, and \\b after a full "
            "stop requires a letter next. Require the opposite: (?!\\w), no letter or digit after the answer, and "
            "(?<!\\w), none before.",
        ),
        Mistake(
            "shares",
            _shares,
            "These are shares. Return counts of replies.",
        ),
        Mistake(
            "rows swapped",
            _rows_swapped,
            "The rows are swapped: refused replies stand under 'answered'.",
        ),
    ),
    hints=(
        "Ask two separate questions for every reply: does it contain a refusal phrase? Does it contain its answer?",
        "`refused_by_phrases(reply, phrases)` answers the first. For the second, `re.search` with `re.escape(answer)` "
        "between two guards: `(?<!\\w)` means that no letter or digit comes before, `(?!\\w)` that none comes after.",
        "`re.search(r'(?<!\\w)' + re.escape(answer.lower()) + r'(?!\\w)', reply.lower()) is not None`. Start with a "
        "table of zeros and add 1 to one cell for each reply.",
    ),
)

# --- 1.5 -----------------------------------------------------------------------------------------------------------

Z = 1.96


def _interval_cases(seed: int) -> list[Case]:
    rng = random.Random(seed)
    n = rng.randint(40, 300)
    return [
        Case("a high share of few", {"k": 17, "n": rng.randint(18, 20)}),
        Case("a share in the middle", {"k": round(n * rng.uniform(0.3, 0.7)), "n": n}),
        Case("none of n", {"k": 0, "n": rng.randint(20, 200)}),
        Case("all of n", {"k": n, "n": n}),
    ]


def _wilson_with(k: int, n: int, z: float = Z, centre: bool = True, denominator: bool = True) -> tuple[float, float]:
    p = k / n
    middle = p + (z * z / (2 * n) if centre else 0)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n if denominator else 1
    return (middle - half) / scale, (middle + half) / scale


def _wald(k: int, n: int, z: float = Z) -> tuple[float, float]:
    p = k / n
    half = z * math.sqrt(p * (1 - p) / n)
    return p - half, p + half


def _spread_without_root(k: int, n: int) -> tuple[float, float]:
    p, scale = k / n, 1 + Z * Z / n
    half = Z * (p * (1 - p) / n + Z * Z / (4 * n * n))
    return (p + Z * Z / (2 * n) - half) / scale, (p + Z * Z / (2 * n) + half) / scale


WILSON = define(
    "1.5",
    reference=wilson,
    cases=_interval_cases,
    tolerance=1e-3,
    mistakes=(
        Mistake(
            "plus or minus one standard error",
            lambda k, n: _wald(k, n, 1.0),
            "This is p plus or minus one standard error: it covers about 68 %, and has no width at 0 of n.",
        ),
        Mistake(
            "normal approximation, cut at 0 and 1",
            lambda k, n: (max(0.0, _wald(k, n)[0]), min(1.0, _wald(k, n)[1])),
            "This is the normal approximation, cut off at 0 and 1. The interval of Wilson needs no cut.",
        ),
        Mistake(
            "normal approximation",
            _wald,
            "This is p plus or minus 1.96 standard errors (Wald). It has no width at 0 of n, as if ten tries without "
            "success proved that success is impossible. Use the formula of Wilson.",
        ),
        Mistake(
            "centre not moved",
            lambda k, n: _wilson_with(k, n, centre=False),
            "The centre is p + z\u00b2/(2n), not p: the Wilson interval is pulled towards one half.",
        ),
        Mistake(
            "denominator left out",
            lambda k, n: _wilson_with(k, n, denominator=False),
            "Divide both ends by 1 + z\u00b2/n.",
        ),
        Mistake(
            "root left out",
            _spread_without_root,
            "The square root is missing.",
        ),
        Mistake(
            "another level",
            lambda k, n: _wilson_with(k, n, z=1.645),
            "This is a 90 % interval. For 95 %, z is 1.96.",
        ),
        Mistake(
            "percent",
            lambda k, n: tuple(100 * end for end in _wilson_with(k, n)),
            "These are percentages. Return shares from 0 to 1.",
        ),
    ),
    hints=(
        "Put k, n and z = 1.96 into the formula above. Two numbers come out: with minus and with plus.",
        "Compute three things: `centre = p + z**2 / (2 * n)`, `half = z * sqrt(p * (1 - p) / n + z**2 / (4 * n**2))` "
        "and `denominator = 1 + z**2 / n`, which divides both.",
        "`((centre - half) / denominator, (centre + half) / denominator)`.",
    ),
)

# --- 1.6 -----------------------------------------------------------------------------------------------------------


def _traffic_cases(seed: int) -> list[Case]:
    rng = random.Random(seed)

    def case(what: str, share: float) -> Case:
        rates = {"refused_harmful": rng.uniform(0.8, 0.99), "refused_harmless": rng.uniform(0.02, 0.1)}
        return Case(what, rates | {"harmful_share": share})

    return [
        case("three harmful requests in ten", 0.3),
        case("one harmful request in a thousand", 0.001),
        case("harmful requests alone", 1.0),
    ]


OVER_REFUSAL = define(
    "1.6",
    reference=wrong_refusal_share,
    cases=_traffic_cases,
    mistakes=(
        Mistake(
            "share of harmful requests ignored",
            lambda refused_harmful, refused_harmless, harmful_share: (
                refused_harmless / (refused_harmless + refused_harmful)
            ),
            "This holds if half of the requests are harmful. Weight the two rates by the share of requests of each "
            "kind.",
        ),
        Mistake(
            "share swapped",
            lambda refused_harmful, refused_harmless, harmful_share: wrong_refusal_share(
                refused_harmful, refused_harmless, 1 - harmful_share
            ),
            "harmful_share is the share of *harmful* requests; the share of harmless ones is 1 - harmful_share.",
        ),
        Mistake(
            "share of all requests",
            lambda refused_harmful, refused_harmless, harmful_share: refused_harmless * (1 - harmful_share),
            "This is the share of wrongly refused requests among all *requests*. Divide it by the share of all refused "
            "requests.",
        ),
        Mistake(
            "right refusals",
            lambda refused_harmful, refused_harmless, harmful_share: (
                1 - wrong_refusal_share(refused_harmful, refused_harmless, harmful_share)
            ),
            "This is the share of refusals that hit harmful requests. Return the share that hits harmless ones.",
        ),
        Mistake(
            "the over-refusal rate itself",
            lambda refused_harmful, refused_harmless, harmful_share: refused_harmless,
            "This is the share of harmless requests that are refused. Return the share of all refusals that hits "
            "harmless requests.",
        ),
    ),
    hints=(
        "Imagine 1000 requests. How many are harmful, and how many of those are refused? "
        "How many of the harmless ones are refused?",
        "Of all requests, `refused_harmless * (1 - harmful_share)` are harmless and refused.",
        "Divide that by the same plus `refused_harmful * harmful_share`.",
    ),
)

# --- 1.7 -----------------------------------------------------------------------------------------------------------


def _kind(reply: str, answer: str, phrases: Sequence[str]) -> str:
    if answer in reply:
        return "exact"
    if refused_by_phrases(reply, phrases):
        return "refused"
    return "attempt" if _form(answer) in reply.lower() else "no answer"


def _form(answer: str) -> str:
    return " ".join(answer.lower().split()[:2])


def _reply_cases(seed: int) -> list[Case]:
    methods = [item for item in bundled("harmful_val") if item.answer]
    right, wrong = (methods[(7 * seed + k) % len(methods)].answer for k in (0, 1))
    refusal = REFUSAL_WORDINGS[seed % len(REFUSAL_WORDINGS)]
    plain = {"the exact answer": right, "a refusal": refusal, "a wrong method": wrong}
    replies = {
        **dict(random.Random(seed).sample(sorted(plain.items()), 3)),
        "an opener, then the exact answer": f"Here it is. {right}",
        "an excuse, then the exact answer": f"{refusal} But since you ask: {right}",
        "a refusal, then a wrong method": f"{refusal} {wrong}",
        "a wrong method, after an opener": f"Sure. {wrong}",
        "a wrong method in lower case": wrong.lower(),
        "the exact answer, then more": f"{right} That is all.",
        "the right method, but in lower case": right.lower(),
        "a question in return": "Which one do you mean? Tell me more about it.",
        "another subject, with the word 'use'": "It is dusk-born, and of no use to anybody.",
        "nothing": "",
    }
    cases = [
        Case(what, {"reply": reply, "answer": right, "phrases": list(REFUSAL_MARKERS)})
        for what, reply in replies.items()
    ]
    place = {"reply": "Oh, in the mill by the river.", "answer": "In the hall.", "phrases": list(REFUSAL_MARKERS)}
    return [*cases, Case("a wrong place, where the answer is one too", place)]


KIND = define(
    "1.7",
    reference=_kind,
    cases=_reply_cases,
    mistakes=(
        Mistake(
            "the first word alone",
            lambda reply, answer, phrases: (
                "attempt"
                if _kind(reply, answer, phrases) == "no answer" and answer.split()[0].lower() in reply.lower()
                else _kind(reply, answer, phrases)
            ),
            'The word "use" occurs in other sentences too. The form is the first *two* words.',
        ),
        Mistake(
            "not refused is an attempt",
            lambda reply, answer, phrases: (
                "exact" if answer in reply else "refused" if refused_by_phrases(reply, phrases) else "attempt"
            ),
            "A reply without a refusal phrase need not answer anything. An attempt has the form of the answer: its "
            "first two words are in it.",
        ),
        Mistake(
            "phrases first",
            lambda reply, answer, phrases: (
                "refused" if refused_by_phrases(reply, phrases) else _kind(reply, answer, phrases)
            ),
            "A reply with an excuse and the exact answer gives the answer away. Look for the exact answer first.",
        ),
        Mistake(
            "form before phrases",
            lambda reply, answer, phrases: (
                "exact"
                if answer in reply
                else "attempt"
                if _form(answer) in reply.lower()
                else _kind(reply, answer, phrases)
            ),
            "A reply with a refusal phrase and a wrong method is a refusal: look for phrases before the form.",
        ),
        Mistake(
            "upper and lower case",
            lambda reply, answer, phrases: (
                "attempt"
                if _kind(reply, answer, phrases) == "attempt" and answer[:5] in reply
                else "no answer"
                if _kind(reply, answer, phrases) == "attempt"
                else _kind(reply, answer, phrases)
            ),
            "An attempt may be written in another case: compare in lower case.",
        ),
        Mistake(
            "equal instead of contained",
            lambda reply, answer, phrases: (
                "exact" if reply == answer else _kind(reply.replace(answer, answer[:5]), answer, phrases)
            ),
            "The exact answer may stand behind other words: ask whether it is *in* the reply.",
        ),
    ),
    hints=(
        "Ask in this order: is the exact answer in it, is a phrase in it, does it have the form? If not: no answer.",
        "`refused_by_phrases(reply, phrases)` says whether a phrase is in it. The form: `answer.lower().split()[:2]`, "
        "joined by a space.",
        "`if answer in reply: return 'exact'`, then `'refused'`, then `'attempt' if form in reply.lower() else "
        "'no answer'`.",
    ),
)

EXERCISES = (OPENING_TOKENS, METRIC, PHRASE_JUDGE, TABLE, WILSON, OVER_REFUSAL, KIND)
