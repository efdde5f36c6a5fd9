"""Lab 02, the refusal direction: difference in means, the three scores, the selection rule, and a padding bug."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from refusallab.activations import residual
from refusallab.course.exercise import Case, Mistake, define
from refusallab.course.exercises.common import chat_model, on_chat_model, prompts
from refusallab.directions import Candidate, difference_in_means, select
from refusallab.interventions import ablation, addition
from refusallab.measure import kl_divergence, refusal_metric
from refusallab.model import Model, blocks, logits, render

# --- 2.1 -----------------------------------------------------------------------------------------------------------


def _streams(seed: int) -> list[Case]:
    g = torch.Generator().manual_seed(seed)

    def case(what: str, n: int, m: int, *shape: int) -> Case:
        return Case(
            what,
            {"harmful": torch.randn(n, *shape, generator=g) + 1, "harmless": torch.randn(m, *shape, generator=g)},
        )

    return [
        case("as many harmful as harmless prompts", 6, 6, 3, 2, 5),
        case("5 harmful and 9 harmless prompts", 5, 9, 4, 3, 6),
        case("a single harmful prompt", 1, 4, 2, 2, 3),
    ]


MEAN_DIFFERENCE = define(
    "2.1",
    reference=difference_in_means,
    cases=_streams,
    mistakes=(
        Mistake(
            "harmless minus harmful",
            lambda harmful, harmless: -difference_in_means(harmful, harmless),
            "The sign is reversed: the direction points from harmless to harmful, so subtract the harmless mean.",
        ),
        Mistake(
            "mean over the wrong axis",
            lambda harmful, harmless: harmful.mean(1) - harmless.mean(1),
            "Dimension 0 counts the prompts. Average over it, and keep layers, positions and width.",
        ),
        Mistake(
            "normalised",
            lambda harmful, harmless: torch.nn.functional.normalize(difference_in_means(harmful, harmless), dim=-1),
            "The difference keeps its length here: activation addition needs it later. Do not normalise.",
        ),
        Mistake(
            "one number for all",
            lambda harmful, harmless: harmful.mean() - harmless.mean(),
            "You averaged over every dimension at once. Average over the prompts (dimension 0) only.",
        ),
    ),
    hints=(
        "What should be left of `[n, layers, positions, width]` when you average over the prompts?",
        "`x.mean(0)` averages over the first dimension. The two means have the same shape, even where the numbers of "
        "prompts differ.",
        "Return the harmful mean minus the harmless mean.",
    ),
)

# --- 2.2 -----------------------------------------------------------------------------------------------------------


def _logit_pairs(seed: int) -> list[Case]:
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(4, 7, generator=g)
    other = base + torch.randn(4, 7, generator=g)
    large = {"base_logits": 40 * torch.randn(3, 11, generator=g), "edited_logits": 40 * torch.randn(3, 11, generator=g)}
    return [
        Case("4 prompts, a vocabulary of 7", {"base_logits": base, "edited_logits": other}),
        Case("logits that do not change (KL is 0)", {"base_logits": base, "edited_logits": base.clone()}),
        Case("large logits, where exp() alone overflows or underflows", large),
    ]


def _kl(base_logits: Tensor, edited_logits: Tensor) -> Tensor:
    p, log_p, log_q = base_logits.softmax(-1), base_logits.log_softmax(-1), edited_logits.log_softmax(-1)
    return (p * (log_p - log_q)).sum(-1)


KL = define(
    "2.2",
    reference=_kl,
    cases=_logit_pairs,
    mistakes=(
        Mistake(
            "arguments swapped",
            lambda base_logits, edited_logits: _kl(edited_logits, base_logits),
            "This is KL(edited || base). The expectation is under the base model: KL(base || edited).",
        ),
        Mistake(
            "bits instead of nats",
            lambda base_logits, edited_logits: _kl(base_logits, edited_logits) / torch.log(torch.tensor(2.0)),
            "This is in bits. Use the natural logarithm: the threshold of the paper is in nats.",
        ),
        Mistake(
            "mean over the vocabulary",
            lambda base_logits, edited_logits: _kl(base_logits, edited_logits) / base_logits.shape[-1],
            "KL is a sum over the vocabulary, weighted by p. You took the mean.",
        ),
        Mistake(
            "logits taken for probabilities",
            lambda base_logits, edited_logits: (base_logits * (base_logits - edited_logits)).sum(-1),
            "These are logits. First turn them into probabilities with softmax, and into log-probabilities with "
            "log_softmax.",
        ),
        Mistake(
            "softmax over the prompts",
            lambda base_logits, edited_logits: (
                base_logits.softmax(0) * (base_logits.log_softmax(0) - edited_logits.log_softmax(0))
            ).sum(-1),
            "The softmax runs over the prompts. The vocabulary is the last dimension: softmax(-1).",
        ),
    ),
    hints=(
        r"$\mathrm{KL}(p\,\|\,q)=\sum_t p_t\,(\log p_t-\log q_t)$, where $p$ comes from `base_logits` "
        "and $q$ from `edited_logits`.",
        "`log_softmax(-1)` is safe for large logits; `log(softmax(...))` is not: it gives log(0).",
        "Multiply `base.softmax(-1)` by the difference of the two log_softmax, and sum over the last dimension.",
    ),
)

# --- 2.3 -----------------------------------------------------------------------------------------------------------


def score(
    m: Model, r: Tensor, layer: int, harmful: list[str], harmless: list[str], tokens: list[int]
) -> tuple[float, float, float]:
    """Bypass, induce and KL of one candidate."""
    base = logits(m, harmless)
    without = logits(m, harmless, edit=ablation(r))
    bypass = refusal_metric(logits(m, harmful, edit=ablation(r)), tokens).mean().item()
    induce = refusal_metric(logits(m, harmless, edit=addition(r, layer)), tokens).mean().item()
    return bypass, induce, kl_divergence(base, without).mean().item()


def _score_cases(seed: int) -> list[Case]:
    cases, openers = [], ("Use", "It", "You")  # tokens whose log-odds are near even, and so react to every mistake
    tokens = [chat_model().tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in openers]
    for k, layer in enumerate((2, 5)):
        harmful = prompts("harmful_val", 100 * seed + k, 6)
        inputs = {
            # What a prompt writes at its last token: without it much changes. A random direction would leave KL near 0.
            "r": residual(chat_model(), harmful[:1], layers=[layer], positions=[-1])[0, 0, 0],
            "layer": layer,
            "harmful": harmful,
            "harmless": prompts("harmless_val", 100 * seed + k, 5),
            "tokens": tokens[k:],
        }
        cases.append(Case(f"a direction at layer {layer}, 6 harmful and 5 harmless prompts", inputs))
    return cases


SCORE = define(
    "2.3",
    reference=score,
    observe=on_chat_model,
    cases=_score_cases,
    tolerance=1e-3,
    mistakes=(
        Mistake(
            "harmful and harmless swapped",
            lambda m, r, layer, harmful, harmless, tokens: score(m, r, layer, harmless, harmful, tokens),
            "Bypass is measured on harmful prompts, induce and KL on harmless ones.",
        ),
        Mistake(
            "bypass as a change",
            lambda m, r, layer, harmful, harmless, tokens: (
                score(m, r, layer, harmful, harmless, tokens)[0]
                - refusal_metric(logits(m, harmful), tokens).mean().item(),
                *score(m, r, layer, harmful, harmless, tokens)[1:],
            ),
            "Bypass is the metric itself under ablation, not the change of the metric.",
        ),
        Mistake(
            "induce on harmful prompts",
            lambda m, r, layer, harmful, harmless, tokens: (
                score(m, r, layer, harmful, harmless, tokens)[0],
                score(m, r, layer, harmful, harmful, tokens)[1],
                score(m, r, layer, harmful, harmless, tokens)[2],
            ),
            "Induce tests whether r makes the model refuse what it would answer: measure it on the harmless prompts.",
        ),
        Mistake(
            "KL the other way round",
            lambda m, r, layer, harmful, harmless, tokens: (
                *score(m, r, layer, harmful, harmless, tokens)[:2],
                kl_divergence(logits(m, harmless, edit=ablation(r)), logits(m, harmless)).mean().item(),
            ),
            "KL is not symmetric: the untouched model comes first, the ablated one second.",
        ),
        Mistake(
            "addition at the wrong layer",
            lambda m, r, layer, harmful, harmless, tokens: (
                score(m, r, layer, harmful, harmless, tokens)[0],
                score(m, r, layer - 1, harmful, harmless, tokens)[1],
                score(m, r, layer, harmful, harmless, tokens)[2],
            ),
            "Induce is off: add the direction at the input of block `layer`, where it was extracted.",
        ),
        Mistake(
            "unit direction added",
            lambda m, r, layer, harmful, harmless, tokens: (
                score(m, r, layer, harmful, harmless, tokens)[0],
                score(m, r / r.norm(), layer, harmful, harmless, tokens)[1],
                score(m, r, layer, harmful, harmless, tokens)[2],
            ),
            "Induce is off: activation addition uses r with its own length. Only ablation needs the unit vector.",
        ),
        Mistake(
            "KL on harmful prompts",
            lambda m, r, layer, harmful, harmless, tokens: (
                *score(m, r, layer, harmful, harmless, tokens)[:2],
                score(m, r, layer, harmful, harmful, tokens)[2],
            ),
            "KL measures the change on prompts that should not change: measure it on the harmless ones.",
        ),
        Mistake(
            "KL after addition",
            lambda m, r, layer, harmful, harmless, tokens: (
                *score(m, r, layer, harmful, harmless, tokens)[:2],
                kl_divergence(logits(m, harmless), logits(m, harmless, edit=addition(r, layer))).mean().item(),
            ),
            "KL compares the base model with the ablated one, not with the one to which r was added.",
        ),
    ),
    hints=(
        "You need four forward passes: harmful ablated; harmless ablated, with r added, and untouched.",
        "`logits(m, prompts, edit=ablation(r))` gives next-token logits under the edit, `[n, vocab]`; "
        "`refusal_metric(..., tokens)` turns them into one number for each prompt.",
        "bypass: the metric of harmful, ablated. induce: the metric of harmless with `addition(r, layer)`. KL: "
        "`kl_divergence` of harmless, untouched against ablated. Take the mean over prompts; `.item()` makes it a "
        "number.",
    ),
)

# --- 2.4 -----------------------------------------------------------------------------------------------------------


def _choose(candidates: list[dict[str, float]], n_layers: int) -> dict[str, float]:
    best = select([Candidate(**c) for c in candidates], n_layers)
    return next(c for c in candidates if (c["position"], c["layer"]) == (best.position, best.layer))


def _best(keep: Any, by: Any = lambda c: c["bypass"]) -> Any:
    """A selection rule from a filter: the candidate with the lowest `by` among those that `keep` keeps."""

    def choose(candidates: list[dict[str, float]], n_layers: int) -> dict[str, float]:
        return min((c for c in candidates if keep(c, n_layers)), key=by)

    return choose


def _candidate_sets(seed: int) -> list[Case]:
    g = torch.Generator().manual_seed(seed)

    def numbers(low: float, high: float) -> float:
        return round(low + (high - low) * torch.rand((), generator=g).item(), 3)

    def candidates(n_layers: int, *traps: dict[str, float]) -> list[dict[str, float]]:
        ordinary = [
            {
                "position": -1 - k % 4,
                "layer": 1 + k % int(0.8 * n_layers - 1),
                "bypass": numbers(-2, 1),
                "induce": numbers(0.1, 3),
                "kl": numbers(0, 0.09),
            }
            for k in range(8)
        ]
        both = [*ordinary, *traps]
        mixed = [both[i] for i in torch.randperm(len(both), generator=g).tolist()]
        mixed.sort(key=lambda c: c["induce"])  # no candidate of the first places is the best by another rule
        return sorted(mixed, key=lambda c: not math.isnan(c["bypass"]))  # first, where `min` would keep it

    def trap(layer: int, **scores: float) -> dict[str, float]:
        good = {"position": -5, "layer": layer, "bypass": numbers(-9, -5), "induce": 1.0, "kl": 0.01}
        return {**good, **scores}

    sets = {
        "candidates of which all pass": (8, ()),
        "the lowest bypass has a KL over 0.1": (8, (trap(4, kl=0.1 + numbers(0.01, 0.5)),)),
        "the lowest bypass does not induce refusal": (8, (trap(3, induce=-numbers(0.01, 2)),)),
        "the lowest bypass has induce 0, as the zero vector would at even odds": (8, (trap(2, induce=0.0),)),
        "the lowest bypass lies in the last of 8 layers": (8, (trap(7),)),
        "the lowest bypass lies at layer 6 of 8, which is int(0.8 * 8)": (8, (trap(6),)),
        "the lowest bypass lies in the last fifth of 10 layers": (10, (trap(8),)),
        "one KL is NaN": (10, (trap(3, kl=math.nan),)),
        "the bypass of the first candidate is NaN": (10, (trap(3, bypass=math.nan),)),
        "one induce is NaN": (10, (trap(3, induce=math.nan),)),
        "the lowest bypass has a KL of exactly 0.1": (8, (trap(4, kl=0.1),)),
    }
    cases = [
        Case(what, {"candidates": candidates(layers, *traps), "n_layers": layers})
        for what, (layers, traps) in sets.items()
    ]
    weak = [{**c, "bypass": abs(c["bypass"]) + 1} for c in candidates(8)]
    return [
        *cases,
        Case(
            "the lowest bypass lies at layer 9 of 12, which is int(0.8 * 12)",
            {"candidates": candidates(12, trap(9)), "n_layers": 12},
        ),
        Case("the lowest bypass lies at layer 8 of 12", {"candidates": candidates(12, trap(8)), "n_layers": 12}),
        Case("no bypass is below 0", {"candidates": weak, "n_layers": 8}),
    ]


def _passes(c: dict[str, float], n: int) -> bool:
    return c["layer"] < int(0.8 * n) and c["kl"] <= 0.1 and c["induce"] > 0 and not math.isnan(c["bypass"])


CHOOSE = define(
    "2.4",
    reference=_choose,
    cases=_candidate_sets,
    mistakes=(
        Mistake(
            "NaN bypass let through",
            _best(lambda c, n: c["layer"] < int(0.8 * n) and c["kl"] <= 0.1 and c["induce"] > 0),
            "A candidate whose bypass is NaN won. The filters do not read bypass, and `min` keeps a NaN that comes "
            "first. Drop it with `math.isnan`.",
        ),
        Mistake(
            "NaN let through",
            _best(lambda c, n: c["layer"] < int(0.8 * n) and not c["kl"] > 0.1 and not c["induce"] <= 0),
            "A candidate with a NaN score won: `kl > 0.1` is False for NaN, and so is `kl <= 0.1`. So write which "
            "candidates to keep, not which to drop.",
        ),
        Mistake(
            "no KL filter",
            _best(lambda c, n: c["layer"] < int(0.8 * n) and c["induce"] > 0),
            "A candidate with KL over 0.1 won: it changes harmless prompts too. Discard it.",
        ),
        Mistake(
            "KL of 0.1 discarded",
            _best(lambda c, n: _passes(c, n) and c["kl"] < 0.1),
            "A candidate with a KL of exactly 0.1 passes: the filter is KL <= 0.1.",
        ),
        Mistake(
            "induce of 0 let through",
            _best(lambda c, n: c["layer"] < int(0.8 * n) and c["kl"] <= 0.1 and c["induce"] >= 0),
            "A candidate with induce 0 won. The filter is induce > 0.",
        ),
        Mistake(
            "no induce filter",
            _best(lambda c, n: c["layer"] < int(0.8 * n) and c["kl"] <= 0.1),
            "A candidate that does not induce refusal won. Keep only those with induce > 0, and 0 is not enough.",
        ),
        Mistake(
            "layer filter off by one",
            _best(lambda c, n: c["layer"] <= int(0.8 * n) and c["kl"] <= 0.1 and c["induce"] > 0),
            "Layer int(0.8 * n_layers) itself is discarded too: keep layer < int(0.8 * n_layers).",
        ),
        Mistake(
            "no layer filter",
            _best(lambda c, n: c["kl"] <= 0.1 and c["induce"] > 0),
            "A late layer won. Keep only layers below 0.8 of their number: late ones act on the output tokens "
            "directly.",
        ),
        Mistake(
            "highest bypass",
            _best(_passes, by=lambda c: -c["bypass"]),
            "You took the highest bypass. Bypass measures the refusal that is left after ablation, so the lowest wins.",
        ),
        Mistake(
            "bypass nearest to 0",
            _best(_passes, by=lambda c: abs(c["bypass"])),
            "You took the bypass nearest to 0. It is a log-odds: the more negative, the less refusal is left.",
        ),
        Mistake(
            "the first that passes",
            lambda candidates, n_layers: next(c for c in candidates if _passes(c, n_layers)),
            "You took the first candidate that passes. Take the one with the lowest bypass among all that pass.",
        ),
        Mistake(
            "highest induce",
            _best(_passes, by=lambda c: -c["induce"]),
            "Induce is only a filter. Among those that pass, the lowest bypass wins.",
        ),
    ),
    hints=(
        "First filter, then take the minimum. There are three filters, for induce, KL and layer, and a NaN in any "
        "score discards a candidate too.",
        "Keep `c['induce'] > 0`, `c['kl'] <= 0.1` and `c['layer'] < int(0.8 * n_layers)`. A comparison with NaN is "
        "False, so these drop a NaN in induce or KL. Test bypass with `math.isnan`.",
        "`min(kept, key=lambda c: c['bypass'])`.",
    ),
)

# --- 2.5 -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _read(m: Model, texts: list[str], layer: int, side: str, position: Any, **settings: Any) -> Tensor:
    nn = m.nn
    batch = m.tokenizer(texts, return_tensors="pt", padding=True, padding_side=side, **settings)
    rows, columns = torch.arange(len(texts)), position(batch["attention_mask"])
    batch = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with nn.trace(**batch) as tracer:
        stream = blocks(nn)[layer].input.save()
        tracer.stop()
    return stream[rows, columns]


def _last(mask: Tensor) -> Tensor:
    return torch.full((len(mask),), mask.shape[1] - 1)


def _stream_cases(seed: int) -> list[Case]:
    return [
        Case("prompts of one length", {"prompts": prompts("harmless_val", seed, 1) * 2, "layer": 3}),
        Case("prompts of different lengths", {"prompts": prompts("harmful_val", seed, 5), "layer": 4}),
        Case(
            "a long prompt beside a very short one",
            {"prompts": ["Hey.", *prompts("harmful_test", seed, 2)], "layer": 2},
        ),
    ]


LAST_TOKEN = define(
    "2.5",
    reference=lambda m, prompts, layer: residual(m, prompts, layers=[layer], positions=[-1])[:, 0, 0],
    observe=on_chat_model,
    cases=_stream_cases,
    tolerance=1e-3,
    mistakes=(
        Mistake(
            "right padding",
            lambda m, prompts, layer: _read(
                m, [render(m, p) for p in prompts], layer, "right", _last, add_special_tokens=False
            ),
            "For short prompts this reads a padding token. With right padding, position -1 is the last *prompt* token "
            "only in the longest row.",
        ),
        Mistake(
            "off by one",
            lambda m, prompts, layer: residual(m, prompts, layers=[layer], positions=[-2])[:, 0, 0],
            "This is the token before the last one.",
        ),
        Mistake(
            "one layer late",
            lambda m, prompts, layer: residual(m, prompts, layers=[layer + 1], positions=[-1])[:, 0, 0],
            "This is the output of block `layer`. The candidates are block *inputs*: resid_pre.",
        ),
        Mistake(
            "no chat template",
            lambda m, prompts, layer: _read(m, list(prompts), layer, "left", _last),
            "The model read the prompts without their chat template, so nothing told it that its turn had begun.",
        ),
    ),
    hints=(
        "Print `batch['attention_mask']` for two prompts of different length. Which token stands at position -1?",
        "Either pad on the other side, or find the last token of each row with the attention mask.",
        '`padding_side="left"` in the call of the tokenizer is enough: then every row ends with its last prompt token.',
    ),
)

EXERCISES = (MEAN_DIFFERENCE, KL, SCORE, CHOOSE, LAST_TOKEN)
