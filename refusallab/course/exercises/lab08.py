"""Lab 08, defences at run time: perplexity, SmoothLLM's vote, a probe monitor, conditional steering, edited weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from refusallab.course.exercise import Case, Mistake, define
from refusallab.course.exercises.common import chat_model, prompts
from refusallab.course.exercises.lab04 import edit_seen
from refusallab.defences.conditional import conditional_addition
from refusallab.defences.integrity import mean_write_shares
from refusallab.defences.monitor import linear_probe
from refusallab.defences.perplexity import worst_window
from refusallab.defences.smoothing import vote
from refusallab.defences.thresholds import threshold_at
from refusallab.directions import random_directions
from refusallab.interventions import project_out
from refusallab.model import Edit, blocks


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- 8.1 -----------------------------------------------------------------------------------------------------------


def _window_cases(seed: int) -> list[Case]:
    g = _generator(1000 + seed)
    quiet, short = 2 + torch.rand(29, generator=g), 4 * torch.rand(5, generator=g)
    quiet[-6:] += torch.tensor([6.0] * 5 + [1.0])  # strange tokens near the end; the last window is the worst one
    return [
        Case("29 tokens, 5 strange ones before the last, window 8", {"surprise": quiet, "window": 8}),
        Case("29 tokens backwards, window 4", {"surprise": quiet.flip(0), "window": 4}),
        Case("5 tokens, window 8", {"surprise": short, "window": 8}),
    ]


PERPLEXITY = define(
    "8.1",
    reference=worst_window,
    cases=_window_cases,
    mistakes=(
        Mistake(
            "mean of the whole text",
            lambda surprise, window: surprise.mean().item(),
            "This is the mean over all tokens: a long fluent request hides a short strange suffix. Take windows.",
        ),
        Mistake(
            "windows cut off at the end",
            lambda surprise, window: max(surprise[i : i + window].mean().item() for i in range(len(surprise))),
            "Your last windows hold fewer tokens than `window`, so a single strange token counts as one. Stop at the "
            "last full window.",
        ),
        Mistake(
            "worst token",
            lambda surprise, window: surprise.max().item(),
            "This is the single worst token, so every rare name raises an alarm. Take the mean within a window first.",
        ),
        Mistake(
            "windows side by side",
            lambda surprise, window: max(part.mean().item() for part in surprise.split(window)),
            "Your windows do not overlap, so a suffix may be cut in two. Move the window one token at a time.",
        ),
        Mistake(
            "sum",
            lambda surprise, window: surprise.unfold(0, min(window, len(surprise)), 1).sum(-1).max().item(),
            "The sum grows with the window. Take the mean: nats per token.",
        ),
        Mistake(
            "exponential",
            lambda surprise, window: surprise.unfold(0, min(window, len(surprise)), 1).mean(-1).max().exp().item(),
            "This is the perplexity itself. Return its logarithm, in nats per token.",
        ),
    ),
    hints=(
        "A window slides over the text one token at a time. Its score is a mean, and that of the text a maximum.",
        "`surprise.unfold(0, w, 1)` gives all windows, [tokens - w + 1, w]. What is w for a short text?",
        "`surprise.unfold(0, min(window, len(surprise)), 1).mean(-1).max().item()`.",
    ),
)

# --- 8.2 -----------------------------------------------------------------------------------------------------------


def _vote_cases(seed: int) -> list[Case]:
    rows = [
        [True, False, True],
        [False, True, True, False, True],
        [False, True, False, False, False],
        [True, False, False, True, False],
        [False, True, False, True],
        [True, False, True, False],
        [False] * 3,
        [True] * 4,
    ]
    g = _generator(1100 + seed)
    rows += [(torch.rand(n, generator=g) < 0.5).tolist() for n in (7, 8)]
    return [Case(f"{len(row)} copies, {sum(row)} refused", {"refused": row}) for row in rows]


VOTE = define(
    "8.2",
    reference=vote,
    cases=_vote_cases,
    mistakes=(
        Mistake(
            "a tie is answered",
            lambda refused: refused.index(2 * sum(refused) > len(refused)),
            "In a tie you return an answer. Answer only when more than half of the copies were answered.",
        ),
        Mistake(
            "half rounded down",
            lambda refused: refused.index(sum(refused) >= len(refused) // 2),
            "Two of five are less than half: `//` rounds half of the copies down. Compare 2 * sum(refused) with "
            "len(refused).",
        ),
        Mistake(
            "one refusal is enough",
            lambda refused: refused.index(any(refused)),
            "One refusal does not decide. Count them.",
        ),
        Mistake(
            "first reply",
            lambda refused: 0,
            "You return the first reply, whatever it is. It must be on the side of the majority.",
        ),
        Mistake(
            "the minority wins",
            lambda refused: refused.index(2 * sum(refused) < len(refused)),
            "You return a reply of the minority.",
        ),
        Mistake(
            "the last one",
            lambda refused: max(i for i, x in enumerate(refused) if x == (2 * sum(refused) >= len(refused))),
            "Return the first reply on the side of the majority, not the last.",
        ),
    ),
    hints=(
        "First decide whether to refuse. Then look for the first reply that agrees with the decision.",
        "Refuse when at least half of the copies were refused.",
        "`refused.index(2 * sum(refused) >= len(refused))`.",
    ),
)

# --- 8.3 -----------------------------------------------------------------------------------------------------------


def monitor(harmful: Tensor, harmless: Tensor, calibration: Tensor, false_alarms: float) -> tuple[Tensor, float]:
    """The probe and its threshold: the reference of exercise 8.3."""
    w = linear_probe(harmful, harmless)
    return w, threshold_at(calibration @ w, false_alarms)


def _streams(seed: int) -> list[Case]:
    """The scores of the calibration streams lie well apart, but for the four highest: these streams are the same."""
    g, cases = _generator(1200 + seed), []
    for what, width, share, others in (("12 dimensions, 5 %", 12, 0.05, 80), ("40 dimensions, 10 %", 40, 0.1, 89)):
        mix = torch.randn(width, width, generator=g) + 2 * torch.eye(width)
        shift = torch.randn(width, generator=g)
        a, b, c = (torch.randn(n, width, generator=g) @ mix for n in (60, 50, others))
        c[:4] = c[0]
        wanted = (1 + torch.rand(1, generator=g)) * torch.linspace(3, -4, others - 3)  # large |scores| below 0, too
        wanted = torch.cat([wanted[:1].repeat(4), wanted[1:][torch.randperm(others - 4, generator=g)]])
        w = linear_probe(a + shift, b)
        c = c + torch.outer((wanted - c @ w) / (w @ w), w)
        inputs = {"harmful": a + shift, "harmless": b, "calibration": c, "false_alarms": share}
        cases.append(Case(f"60 and 50 streams of {what} false alarms on {others} others", inputs))
    return cases


def _probe(change: Any = linear_probe, cut: Any = threshold_at, on: str = "calibration") -> Any:
    def wrong(**inputs: Any) -> tuple[Tensor, float]:
        w = change(inputs["harmful"], inputs["harmless"])
        return w, cut(inputs[on] @ w, inputs["false_alarms"])

    return wrong


def rounded_up(scores: Tensor, false_alarms: float) -> float:
    """A wrong threshold: one score too many lies above it, unless the share of them is a whole number."""
    n = len(scores)
    return scores.sort().values[n - 1 - math.ceil(false_alarms * n - 1e-9)].item()


def alarm_at(scores: Tensor, false_alarms: float) -> float:
    """A wrong threshold, with one score too few above it: the score at the threshold counts as an alarm."""
    return scores.sort().values[len(scores) - int(false_alarms * len(scores) + 1e-9)].item()


def _pooled(harmful: Tensor, harmless: Tensor) -> Tensor:
    """Covariance of all streams together, the difference between the classes included."""
    both = torch.cat([harmful, harmless]).double()
    s = (both - both.mean(0)).T @ (both - both.mean(0)) / len(both)
    s = 0.9 * s + 0.1 * s.diagonal().mean() * torch.eye(len(s), dtype=torch.float64)
    return torch.linalg.solve(s, (harmful.mean(0) - harmless.mean(0)).double()).float()


PROBE = define(
    "8.3",
    reference=monitor,
    cases=_streams,
    tolerance=1e-3,
    mistakes=(
        Mistake(
            "difference in means alone",
            _probe(lambda a, b: a.mean(0) - b.mean(0)),
            "This is the difference in means. Directions in which all prompts vary must count less: solve S w = "
            "difference.",
        ),
        Mistake(
            "sign",
            _probe(lambda a, b: linear_probe(b, a)),
            "The sign is reversed: harmful streams should score higher.",
        ),
        Mistake(
            "covariance of all together",
            _probe(_pooled),
            "Centre each kind on its own mean before the covariance: the difference between them is not noise.",
        ),
        Mistake(
            "no shrinkage",
            _probe(lambda a, b: linear_probe(a, b, 0.0)),
            "Mix S with a tenth of the identity times its mean variance: there are few prompts and many dimensions.",
        ),
        Mistake(
            "threshold on the training streams",
            _probe(on="harmless"),
            "The threshold comes from the streams of the fit. Use `calibration`, which the probe has not seen.",
        ),
        Mistake(
            "threshold on the wrong tail",
            _probe(cut=lambda s, share: threshold_at(s, 1 - share)),
            "This threshold alarms on nearly all harmless prompts. Only the share `false_alarms` may lie above it.",
        ),
        Mistake(
            "share rounded up",
            _probe(cut=rounded_up),
            "One score too many lies above: of 89 streams at most 8 may, not 9, which are more than a tenth. Round "
            "n * `false_alarms` down.",
        ),
        Mistake(
            "alarm at the threshold",
            _probe(cut=alarm_at),
            "One more score may lie above: an alarm is a score *above* the threshold, not at it, and a share of just "
            "`false_alarms` is allowed.",
        ),
        Mistake(
            "divided by N - 1",
            _probe(lambda a, b: linear_probe(a, b) * (len(a) + len(b) - 1) / (len(a) + len(b))),
            "Your S is X^T X / (N - 1), which `torch.cov` gives by itself. Divide by N: `correction=0`.",
        ),
    ),
    hints=(
        "Three steps: the covariance within the kinds, the probe that it gives, the threshold on fresh streams.",
        "Centre each kind, concatenate, S = X^T X / N; S = 0.9 S + 0.1 mean(diag S) I; "
        "`torch.linalg.solve(S, difference)`.",
        "Sort the calibration scores; with k = int(false_alarms * n), the threshold is the score with exactly k above "
        "it: `scores.sort().values[n - 1 - k]`.",
    ),
)

# --- 8.4 -----------------------------------------------------------------------------------------------------------


def _steering_cases(seed: int) -> list[Case]:
    from refusallab.activations import residual

    vectors, cases = random_directions(chat_model().width, 12, seed=1300 + seed), []
    for k, (read, act, above) in enumerate([(2, 4, 6), (2, 5, 0), (3, 5, 3)]):
        texts = prompts("harmless_val", seed + k, 6)
        streams = residual(chat_model(), texts, layers=[read, read + 1, act], positions=[-1])[:, :, 0]
        *probes, r = vectors[4 * k : 4 * k + 4]
        for w in probes:  # the first with which another block would choose other prompts; if there is none, the last
            ascending = (streams[:, 0] @ w).sort().values.tolist()
            low, high = [ascending[0] - 2, *ascending, ascending[-1] + 2][6 - above : 8 - above]
            right, *others = (streams @ w > (low + high) / 2).unbind(1)
            if not any(torch.equal(right, other) for other in others):
                break
        inputs = {"w": w, "threshold": (low + high) / 2, "read": read, "r": 40 * r, "act": act}
        what = f"6 prompts, {above} above the threshold, read at {read}, act at {act}"
        cases.append(Case(what, inputs | {"prompts": texts}))
    return cases


def _steer(gate: Any, site: str = "act", reads: str = "input") -> Any:
    def make(w: Tensor, threshold: float, read: int, r: Tensor, act: int) -> Edit:
        def edit(nn: Any) -> None:
            fires = gate(getattr(blocks(nn)[read], reads), w, threshold)
            block = blocks(nn)[{"act": act, "read": read}[site]]
            block.input = block.input + fires * r

        return edit

    return make


def _open(x: Tensor, w: Tensor, threshold: float) -> Tensor:
    return (x[:, -1] @ w > threshold).float()[:, None, None]


STEER = define(
    "8.4",
    reference=conditional_addition,
    observe=edit_seen,
    cases=_steering_cases,
    tolerance=5e-4,
    mistakes=(
        Mistake(
            "one condition for the whole batch",
            _steer(lambda x, w, t: float((x[:, -1] @ w).max() > t)),
            "One prompt above the threshold steers the whole batch. Every row has a condition of its own.",
        ),
        Mistake(
            "no condition",
            _steer(lambda x, w, t: 1.0),
            "r is added to every prompt. Add it only where the score is above the threshold.",
        ),
        Mistake(
            "nothing added above the threshold",
            _steer(lambda x, w, t: 1 - _open(x, w, t)),
            "Nothing is added to the prompts above the threshold. Either the condition is reversed, or nothing is "
            "edited at all: a new variable is not the stream, so assign to it, `block.input = ...`.",
        ),
        Mistake(
            "output of the block that is read",
            _steer(_open, reads="output"),
            "You read the output of block `read`. Read its input.",
        ),
        Mistake(
            "each position on its own",
            _steer(lambda x, w, t: (x @ w > t).float()[..., None]),
            "You read every position and steer some of them. Read the last position, and steer the whole prompt.",
        ),
        Mistake("acts where it reads", _steer(_open, "read"), "r is added at the block that is read. Add it at `act`."),
        Mistake(
            "probe subtracted",
            _steer(lambda x, w, t: -_open(x, w, t)),
            "r is subtracted: that ends refusals. Add it.",
        ),
    ),
    hints=(
        "The condition is a number 0 or 1 for each prompt; it must broadcast over positions and width.",
        "`x = blocks(nn)[read].input`; the score of each prompt is `x[:, -1] @ w`.",
        "`fires = (x[:, -1] @ w > threshold).float()[:, None, None]`, then `block = blocks(nn)[act]` and "
        "`block.input = block.input + fires * r`.",
    ),
)

# --- 8.5 -----------------------------------------------------------------------------------------------------------


def lowest_shares(matrices: Sequence[Tensor]) -> tuple[float, float]:
    """The two lowest shares that the matrices write along any direction: the reference of exercise 8.5."""
    shares = torch.linalg.eigvalsh(mean_write_shares(matrices))
    return shares[0].item(), shares[1].item()


def _matrix_cases(seed: int) -> list[Case]:
    g = _generator(1400 + seed)
    plain = [scale * torch.randn(n, 16, generator=g) for n, scale in ((40, 1.0), (24, 5.0), (64, 0.2))]
    r = torch.randn(16, generator=g)
    return [
        Case("3 matrices of different size that write everything", {"matrices": plain}),
        Case("the same, one direction projected out", {"matrices": [project_out(w, r) for w in plain]}),
        Case(
            "the same, projected out of two of the three",
            {"matrices": [*(project_out(w, r) for w in plain[:2]), plain[2]]},
        ),
    ]


def _shares(square: Any, scaled: Any = lambda total, ws: total) -> Any:
    def wrong(matrices: Sequence[Tensor]) -> tuple[float, float]:
        values = torch.linalg.eigvalsh(scaled(sum(square(w.double()) for w in matrices), matrices))
        return values[0].item(), values[1].item()

    return wrong


def _share(w: Tensor) -> Tensor:
    return w.T @ w / w.square().sum()


DETECT = define(
    "8.5",
    reference=lowest_shares,
    cases=_matrix_cases,
    tolerance=1e-5,
    mistakes=(
        Mistake(
            "large matrices count more",
            _shares(lambda w: w.T @ w, lambda t, ws: t * 16 / sum(w.double().square().sum() for w in ws)),
            "A large matrix drowns the small ones. Divide each by its own |W|^2 before you take the mean.",
        ),
        Mistake(
            "sum for mean",
            _shares(lambda w: 16 * _share(w)),
            "You added up the shares of the matrices. Take their mean, so that chance gives 1.",
        ),
        Mistake(
            "not times the width",
            _shares(_share, lambda t, ws: t / len(ws)),
            "The shares of all directions should have mean 1. Multiply by the width.",
        ),
        Mistake(
            "highest shares",
            lambda matrices: tuple(torch.linalg.eigvalsh(mean_write_shares(matrices))[-2:].tolist()),
            "These are the two loudest directions. The edit leaves a silent one.",
        ),
        Mistake(
            "amplitudes",
            lambda matrices: tuple(x**0.5 for x in lowest_shares(matrices)),
            "You took a square root. Return shares of the square.",
        ),
    ),
    hints=(
        "For a unit u, |W u|^2 = u^T (W^T W) u, with W as [n, width]. Where is a quadratic form smallest?",
        "Mean over the matrices of `w.T @ w / w.square().sum()`, times the width; then eigenvalues.",
        "`torch.linalg.eigvalsh(M)` of that symmetric matrix is ascending: return its first two entries as floats. Use "
        "double precision.",
    ),
)

EXERCISES = (PERPLEXITY, VOTE, PROBE, STEER, DETECT)
