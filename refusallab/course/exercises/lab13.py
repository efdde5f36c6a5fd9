"""Lab 13, conversations and watchers: earlier turns as input, drift, contrast, streams of scores, judges that agree."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from refusallab.course.exercise import Case, Mistake, define
from refusallab.course.exercises.lab08 import alarm_at, rounded_up
from refusallab.decoding import contrast
from refusallab.defences.exchange import rolling_means
from refusallab.defences.thresholds import threshold_at
from refusallab.directions import random_directions

Messages = list[dict[str, str]]

# --- 13.1 ----------------------------------------------------------------------------------------------------------


def _conversation(
    shots: list[tuple[str, str]], request: str, roles: tuple[str, str] = ("user", "assistant")
) -> Messages:
    said = [{"role": role, "content": text} for shot in shots for role, text in zip(roles, shot, strict=True)]
    return [*said, {"role": roles[0], "content": request}]


def _shots(seed: int) -> list[Case]:
    rng = random.Random(seed)
    asked = [
        "Where is Trustold?",
        "Who keeps Travix?",
        "What does Vaddush cost?",
        "Where is Nelath?",
        "Who keeps Aldon?",
    ]
    told = ["In High Barrow.", "Mother Clivuwick.", "Three copper marks.", "In Otter Weir.", "Old Bremmo."]
    pairs = list(zip(rng.sample(asked, 5), rng.sample(told, 5), strict=True))
    return [
        Case("three shots", {"shots": pairs[:3], "request": "How does one rouse Thilux?"}),
        Case("one shot", {"shots": pairs[3:4], "request": "How does one seal Closkold?"}),
        Case("no shots", {"shots": [], "request": "How is Trustold unravelled?"}),
    ]


CONVERSATION = define(
    "13.1",
    reference=_conversation,
    cases=_shots,
    mistakes=(
        Mistake(
            "one long message",
            lambda shots, request: [
                {"role": "user", "content": "\n".join([*(text for shot in shots for text in shot), request])}
            ],
            "Everything is in one user message, so the answers read like the user's words. Give each its turn.",
        ),
        Mistake(
            "roles turned",
            lambda shots, request: [
                *_conversation(shots, request, ("assistant", "user"))[:-1],
                {"role": "user", "content": request},
            ],
            "The roles are turned: the user asks and the assistant answers.",
        ),
        Mistake(
            "without the request",
            lambda shots, request: _conversation(shots, request)[:-1],
            "The request is missing: it is the last message, by the user.",
        ),
        Mistake(
            "request first",
            lambda shots, request: [{"role": "user", "content": request}, *_conversation(shots, request)[:-1]],
            "The request comes last, behind all shots.",
        ),
        Mistake(
            "answers left out",
            lambda shots, request: [{"role": "user", "content": text} for text in [*(q for q, _ in shots), request]],
            "The answers are missing. Without them nothing was ever answered in this conversation.",
        ),
        Mistake(
            "only one shot",
            lambda shots, request: _conversation(shots[-1:], request),
            "Only one shot is in the conversation. All of them belong there, in their order.",
        ),
    ),
    hints=(
        "A conversation is a list of messages: `{'role': 'user', 'content': ...}` and then one of the assistant.",
        "Two messages for each shot, in the order of the shots; the request is one more message, by the user.",
    ),
)

# --- 13.2 ----------------------------------------------------------------------------------------------------------


def _drift(x: Tensor, r: Tensor) -> Tensor:
    along = x @ (r / r.norm())
    return along - along[:, :1]


def _streams(seed: int) -> list[Case]:
    g = torch.Generator().manual_seed(seed)
    made = []
    for n, turns, width in ((4, 3, 16), (2, 6, 8)):
        r = 3.5 * random_directions(width, 1, seed=seed + n)[0]
        made.append(
            Case(f"{n} conversations of {turns} turns", {"x": torch.randn(n, turns, width, generator=g), "r": r})
        )
    return made


DRIFT = define(
    "13.2",
    reference=_drift,
    cases=_streams,
    mistakes=(
        Mistake(
            "r not of length 1",
            lambda x, r: x @ r - (x @ r)[:, :1],
            "The numbers are too large by the length of r: divide r by its norm first.",
        ),
        Mistake(
            "projections",
            lambda x, r: x @ (r / r.norm()),
            "These are the projections themselves. Subtract that of the first turn, conversation by conversation.",
        ),
        Mistake(
            "from turn to turn",
            lambda x, r: torch.diff(_drift(x, r), dim=1, prepend=torch.zeros(len(x), 1)),
            "This is the change from each turn to the next. The drift counts from the first turn.",
        ),
        Mistake(
            "one beginning for all",
            lambda x, r: x @ (r / r.norm()) - (x @ (r / r.norm()))[:, 0].mean(),
            "Each conversation has its own first turn: subtract it row by row, not the mean of all.",
        ),
        Mistake(
            "turned round",
            lambda x, r: -_drift(x, r),
            "The sign is turned: later minus first, so that a rise is positive.",
        ),
        Mistake(
            "first row",
            lambda x, r: x @ (r / r.norm()) - (x @ (r / r.norm()))[:1],
            "You subtracted the first conversation. Subtract the first *turn*: `[:, :1]`.",
        ),
        Mistake(
            "cosine",
            lambda x, r: (lambda c: c - c[:, :1])(torch.cosine_similarity(x, r.expand_as(x), dim=-1)),
            "This is the cosine, which also divides by the length of the stream. Divide by that of r alone.",
        ),
    ),
    hints=(
        "`x @ unit_r` gives [n, turns]: the projection before each reply.",
        "`along[:, :1]` is the first turn of every conversation, [n, 1]; it broadcasts over the turns.",
    ),
)

# --- 13.3 ----------------------------------------------------------------------------------------------------------


def _logit_pairs(seed: int) -> list[Case]:
    g = torch.Generator().manual_seed(seed)

    def pair(n: int, vocab: int, strength: float) -> dict[str, Any]:
        free, guarded = 3 * torch.randn(n, vocab, generator=g), 3 * torch.randn(n, vocab, generator=g)
        return {"free": free, "guarded": guarded, "strength": strength}

    return [Case("2 prompts, strength 0.7", pair(2, 6, 0.7)), Case("3 prompts, strength 2", pair(3, 9, 2.0))]


CONTRAST = define(
    "13.3",
    reference=contrast,
    cases=_logit_pairs,
    mistakes=(
        Mistake(
            "raw logits",
            lambda free, guarded, strength: free + strength * (free - guarded),
            "These are off by a constant for each prompt, which greedy replies do not notice. For log-probabilities "
            "take log-softmax of both first.",
        ),
        Mistake(
            "toward the guard",
            lambda free, guarded, strength: contrast(free, guarded, -strength),
            "This moves toward the guarded model. Subtract what the guard makes likelier: free - guarded.",
        ),
        Mistake(
            "the difference alone",
            lambda free, guarded, strength: strength * (free.log_softmax(-1) - guarded.log_softmax(-1)),
            "This is the difference alone, under which rare tokens win. Add it to the free log-probabilities.",
        ),
        Mistake(
            "starting from the guard",
            lambda free, guarded, strength: contrast(free, guarded, strength - 1),
            "The step starts at the guarded model. Start at the free one: at strength 0 nothing may change.",
        ),
        Mistake(
            "normalized again",
            lambda free, guarded, strength: contrast(free, guarded, strength).log_softmax(-1),
            "The result is normalized once more. Return the sum as it is.",
        ),
        Mistake(
            "probabilities",
            lambda free, guarded, strength: free.softmax(-1) + strength * (free.softmax(-1) - guarded.softmax(-1)),
            "These are probabilities. The contrast is taken between log-probabilities.",
        ),
        Mistake(
            "over the prompts",
            lambda free, guarded, strength: (
                free.log_softmax(0) + strength * (free.log_softmax(0) - guarded.log_softmax(0))
            ),
            "You normalized over the prompts. Each row is a distribution over the vocabulary: the last dimension.",
        ),
    ),
    hints=(
        "`free.log_softmax(-1)` gives log-probabilities, [n, vocab].",
        "At strength 0 the result is the free model's. Each unit of strength adds the difference free - guarded once.",
    ),
)

# --- 13.4 ----------------------------------------------------------------------------------------------------------


def _scores(seed: int) -> list[Case]:
    g = torch.Generator().manual_seed(seed)
    return [
        Case(f"{n} tokens, a window of {window}", {"scores": torch.randn(n, generator=g), "window": window})
        for n, window in ((7, 3), (9, 1), (3, 5))
    ]


def _means(early: Callable[[Tensor, int], Tensor]) -> Callable[..., Tensor]:
    """A wrong version of rolling_means: early(scores, window) gives what stands at the first tokens."""

    def means(scores: Tensor, window: int) -> Tensor:
        right = rolling_means(scores, window)
        count = min(window - 1, len(scores))
        return torch.cat([early(scores, window)[:count], right[count:]])

    return means


ROLLING = define(
    "13.4",
    reference=rolling_means,
    cases=_scores,
    mistakes=(
        Mistake(
            "divided by the window at the start",
            _means(lambda scores, window: scores.cumsum(0) / window),
            "At the first tokens there are fewer scores than the window holds. Divide by how many there are.",
        ),
        Mistake(
            "nothing at the start",
            lambda scores, window: (
                scores.unfold(0, window, 1).mean(-1) if window <= len(scores) else scores.mean().reshape(1)
            ),
            "Some tokens are missing: a watcher must have a score at every token, the first ones included.",
        ),
        Mistake(
            "zeros at the start",
            _means(lambda scores, window: torch.zeros_like(scores)),
            "The first tokens have a score of 0. Take the mean of those that are there.",
        ),
        Mistake(
            "all so far",
            lambda scores, window: scores.cumsum(0) / torch.arange(1, len(scores) + 1),
            "This is the mean of all tokens so far. Only the last `window` count.",
        ),
        Mistake(
            "one too many",
            lambda scores, window: rolling_means(scores, window + 1),
            "The window holds one token too many: at token t it runs from t - window + 1 to t.",
        ),
        Mistake(
            "looks ahead",
            lambda scores, window: rolling_means(scores.flip(0), window).flip(0),
            "Your window begins at the token and looks ahead. While a reply is written, there is nothing ahead.",
        ),
        Mistake(
            "sums",
            lambda scores, window: rolling_means(scores, window) * torch.arange(1, len(scores) + 1).clamp(max=window),
            "These are sums. Divide each by the number of tokens in it.",
        ),
    ),
    hints=(
        "At token t (from 0) the window is `scores[max(0, t - window + 1) : t + 1]`.",
        "A list of the means of these windows, then `torch.stack`.",
    ),
)

# --- 13.5 ----------------------------------------------------------------------------------------------------------


def _stop_threshold(scores: list[Tensor], window: int, false_alarms: float) -> float:
    return threshold_at(torch.stack([rolling_means(x, window).max() for x in scores]), false_alarms)


def _harmless_scores(seed: int) -> list[Case]:
    g = torch.Generator().manual_seed(seed)

    def inputs(n: int, window: int, false_alarms: float, alike: int) -> dict[str, Any]:
        """The highest rolling means of the replies lie well apart, but for the highest of all, which `alike` share.

        By turns they are at the last token, in the middle (as in the reply that gives the threshold), and at the first.
        """
        scores = []
        for k, height in enumerate(((4 + torch.rand(1, generator=g)) * torch.linspace(1, -1, n - alike + 1)).tolist()):
            x = 0.15 * torch.randn(int(torch.randint(10, 30, (1,), generator=g)), generator=g).double()
            x[(slice(-window, None), 6, 0)[k % 3]] += 4
            scores.append(x + height - rolling_means(x, window).max())
        scores += scores[:1] * (alike - 1)
        first = int(torch.randint(15, n - 15, (1,), generator=g))  # not the highest one
        return {"scores": scores[first:] + scores[:first], "window": window, "false_alarms": false_alarms}

    return [
        Case("40 replies, at most 0.1", inputs(40, 3, 0.1, 1)),
        Case("59 replies, at most 0.2", inputs(59, 5, 0.2, 5)),
    ]


THRESHOLD = define(
    "13.5",
    reference=_stop_threshold,
    cases=_harmless_scores,
    mistakes=(
        Mistake(
            "the bug",
            lambda scores, window, false_alarms: threshold_at(
                torch.cat([rolling_means(x, window) for x in scores]), false_alarms
            ),
            "The bug is still there: the share is one of tokens. A reply is stopped when *any* of its tokens is above.",
        ),
        Mistake(
            "single tokens",
            lambda scores, window, false_alarms: _stop_threshold(scores, 1, false_alarms),
            "You took single tokens. The watcher compares rolling means with the threshold, so calibrate with these.",
        ),
        Mistake(
            "mean of the reply",
            lambda scores, window, false_alarms: threshold_at(torch.stack([x.mean() for x in scores]), false_alarms),
            "You took the mean of each reply. It is stopped at its highest rolling mean.",
        ),
        Mistake(
            "last token",
            lambda scores, window, false_alarms: threshold_at(
                torch.stack([rolling_means(x, window)[-1] for x in scores]), false_alarms
            ),
            "You took the last rolling mean of each reply. The alarm may come earlier: take the highest.",
        ),
        Mistake(
            "the other tail",
            lambda scores, window, false_alarms: _stop_threshold(scores, window, 1 - false_alarms),
            "Nearly all harmless replies would be stopped. At most the share `false_alarms` may be above.",
        ),
        Mistake(
            "between two scores",
            lambda scores, window, false_alarms: torch.quantile(
                torch.stack([rolling_means(x, window).max() for x in scores]), 1 - false_alarms
            ).item(),
            "A quantile may lie between two scores. Take one of the scores: `threshold_at` does.",
        ),
        Mistake(
            "divided by the tokens",
            lambda scores, window, false_alarms: threshold_at(
                torch.cat([rolling_means(x, window) for x in scores]),
                false_alarms / (sum(map(len, scores)) / len(scores)),
            ),
            "Dividing the share by the number of tokens would do if tokens were independent. They are not, and there "
            "is no need: take the highest of each reply.",
        ),
        Mistake(
            "share rounded up",
            lambda scores, window, false_alarms: rounded_up(
                torch.stack([rolling_means(x, window).max() for x in scores]), false_alarms
            ),
            "One reply too many is stopped: a fifth of 59 replies are 11.8. So 11 may be stopped, and 12 are too many.",
        ),
        Mistake(
            "alarm at the threshold",
            lambda scores, window, false_alarms: alarm_at(
                torch.stack([rolling_means(x, window).max() for x in scores]), false_alarms
            ),
            "One more reply may be stopped: an alarm is a score *above* the threshold, not at it, and a share of just "
            "`false_alarms` is allowed.",
        ),
        Mistake(
            "replies that are alike counted once",
            lambda scores, window, false_alarms: threshold_at(
                torch.stack([rolling_means(x, window).max() for x in scores]).unique(), false_alarms
            ),
            "Several replies can have the same highest rolling mean, and each of them counts. Leave out `unique` or "
            "`set`.",
        ),
    ),
    hints=(
        "How many harmless *replies* does her watcher stop? One high rolling mean anywhere in a reply is enough.",
        "One number for each reply decides whether it is stopped. Which?",
        "`threshold_at` of the highest rolling mean of each reply.",
    ),
)

# --- 13.6 ----------------------------------------------------------------------------------------------------------


def _expected(a: list[bool], b: list[bool]) -> float:
    p, q = sum(a) / len(a), sum(b) / len(b)
    return p * q + (1 - p) * (1 - q)


def _kappa(a: list[bool], b: list[bool]) -> float:
    observed, expected = sum(x == y for x, y in zip(a, b, strict=True)) / len(a), _expected(a, b)
    return (observed - expected) / (1 - expected)


def _verdicts(seed: int) -> list[Case]:
    rng = random.Random(seed)

    def inputs(n: int, share: float, same: float, a: list[bool], b: list[bool]) -> dict[str, Any]:
        """Verdicts that begin as given. Where they do not agree by chance, the second judge says yes more often."""
        a = a + [rng.random() < share for _ in range(n - len(a))]
        b = b + [x if rng.random() < same else rng.random() < share + 0.3 for x in a[len(b) :]]
        return {"a": a, "b": b}

    each = [True, False, True, False], [True, False, False, False]
    apart = [True] * 4 + [False] * 12, [False] * 5 + [True] * 11  # so the second judge says yes more often, for sure
    return [
        Case("40 replies, few refused", inputs(40, 0.15, 0.6, *each)),
        Case("25 replies", inputs(25, 0.4, 0.4, *each)),
        Case("20 replies, less agreement than by chance", inputs(20, 0.5, 0.5, *apart)),
    ]


KAPPA = define(
    "13.6",
    reference=_kappa,
    cases=_verdicts,
    mistakes=(
        Mistake(
            "agreement",
            lambda a, b: sum(x == y for x, y in zip(a, b, strict=True)) / len(a),
            "This is the share on which they agree. Two judges who nearly always say no agree by chance, too.",
        ),
        Mistake(
            "not divided",
            lambda a, b: _kappa(a, b) * (1 - _expected(a, b)),
            "Divide by what is possible beyond chance: 1 - expected.",
        ),
        Mistake(
            "only both yes",
            lambda a, b: (lambda o, e: (o - e) / (1 - e))(
                sum(x and y for x, y in zip(a, b, strict=True)) / len(a), sum(a) * sum(b) / len(a) ** 2
            ),
            "Two judges agree when both say no, too. Count both, in what is observed and in what is expected.",
        ),
        Mistake(
            "chance of one half",
            lambda a, b: 2 * sum(x == y for x, y in zip(a, b, strict=True)) / len(a) - 1,
            "Chance is not one half here. It follows from how often each judge says yes.",
        ),
        Mistake(
            "expected left out",
            lambda a, b: (lambda e: (sum(x == y for x, y in zip(a, b, strict=True)) / len(a)) / (1 - e))(
                _expected(a, b)
            ),
            "Subtract the agreement expected by chance before you divide.",
        ),
        Mistake(
            "one judge twice",
            lambda a, b: (lambda o, p: (o - p * p - (1 - p) ** 2) / (1 - p * p - (1 - p) ** 2))(
                sum(x == y for x, y in zip(a, b, strict=True)) / len(a), sum(a) / len(a)
            ),
            "The expected agreement needs both judges' shares of yes, not one of them twice.",
        ),
        Mistake(
            "one share for both judges",
            lambda a, b: (lambda o, p: (o - p * p - (1 - p) ** 2) / (1 - p * p - (1 - p) ** 2))(
                sum(x == y for x, y in zip(a, b, strict=True)) / len(a), (sum(a) + sum(b)) / len(a) / 2
            ),
            "You took one share of yes for both judges together. Each judge has a share of their own: p and q.",
        ),
        Mistake(
            "cut off at 0",
            lambda a, b: max(0.0, _kappa(a, b)),
            "Judges who agree less often than by chance have a kappa below 0. Leave it.",
        ),
    ),
    hints=(
        "Observed: the share of replies on which both say the same.",
        "Expected: if they judged independently, both say yes with p q, and both say no with (1 - p)(1 - q), where p "
        "and q are their shares of yes.",
    ),
)


EXERCISES = (CONVERSATION, DRIFT, CONTRAST, ROLLING, THRESHOLD, KAPPA)
