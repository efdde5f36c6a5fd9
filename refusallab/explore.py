"""Explorers: things to play with in a notebook, made of ipywidgets.

Each explorer is a widget that answers within a second on a bundled model. Where widgets are absent (a web page, a
printed notebook) it shows its static form: the same view in words, at the settings with which it starts.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets as widgets
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from refusallab.attacks.effect import suffix_effect
from refusallab.attribution import attention_from_last, attribute, mass, regions
from refusallab.conversations import EARLIER, after_turns, streams_by_turn
from refusallab.defences.thresholds import roc, threshold_at
from refusallab.directions import Candidate, Search, difference_in_means, discarded_because
from refusallab.errors import RefusalLabError
from refusallab.geometry import plane_along, principal_plane, projections
from refusallab.interventions import ablation, addition, affine, unit
from refusallab.judging import judge, shown_tokens
from refusallab.measure import kl_divergence, rate, refusal_metric, refused_by_phrases
from refusallab.model import Model, encode, generate, logits, messages
from refusallab.patching import patch, read_activations, recovered, replace, swap_component
from refusallab.plots import plane_figure, roc_curve
from refusallab.prompts import Item
from refusallab.steering import norm_matched
from refusallab.thoughts import behind, right_thought, think
from refusallab.truth import Reply, judge_errors
from refusallab.weights import edit_writers, tent
from smallmodels.world import thought
from smallmodels.world.thought import steps_of

WIDE = {"description_width": "initial"}
Rows = Sequence[Sequence[str]]


@dataclass(frozen=True, eq=False)
class Picture:
    """A figure in a view, with its alt text."""

    figure: Figure
    alt: str


class Explorer(widgets.VBox):
    """Controls above a view. For the present settings `view()` gives tables or pictures, each with its heading."""

    def __init__(
        self, controls: Sequence[widgets.ValueWidget], view: Callable[[], list[tuple[str, Rows | Picture]]]
    ) -> None:
        self.controls, self._view = list(controls), view
        self.shown = widgets.HTML()
        super().__init__([widgets.HBox(list(controls), layout=widgets.Layout(flex_flow="row wrap")), self.shown])
        for control in controls:
            control.observe(self._update, names="value")
        self._update()

    def _update(self, _change: Any = None) -> None:
        self.tables = self._view()
        self.shown.value = "".join(f"<b>{html.escape(heading)}</b>{_html(shown)}" for heading, shown in self.tables)

    @property
    def static(self) -> str:
        """The view in plain words."""
        settings = ", ".join(f"{c.description} {c.value}" for c in self.controls)
        lines = [f"[Explorer, shown at: {settings}]"]
        for heading, shown in self.tables:
            rows = [(shown.alt,)] if isinstance(shown, Picture) else shown
            lines += [heading, *("  " + " | ".join(row) for row in rows)]
        return "\n".join(lines)

    def _repr_mimebundle_(self, **settings: Any) -> Any:
        bundle = super()._repr_mimebundle_(**settings)
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        if data:
            data["text/plain"] = self.static
        return bundle


def _html(shown: Rows | Picture) -> str:
    return f"<div>{figure_html(shown.figure, shown.alt)}</div>" if isinstance(shown, Picture) else _html_table(shown)


def _html_table(rows: Rows) -> str:
    cells = "".join(
        "<tr>"
        + "".join(f"<td style='padding:1px 10px;vertical-align:top'>{cell}</td>" for cell in map(html.escape, row))
        + "</tr>"
        for row in rows
    )
    return f"<table>{cells}</table>"


def figure_html(figure: Figure, alt: str) -> str:
    """A figure as an <img> with alt text, for views that hold one. Closes the figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def slider(label: str, low: float, high: float, value: float, step: float = 1) -> widgets.ValueWidget:
    """A labelled slider that the arrow keys move too; it reports its value when it is released."""
    kind = widgets.IntSlider if step == 1 else widgets.FloatSlider
    return kind(value=value, min=low, max=high, step=step, description=label, continuous_update=False, style=WIDE)


def choice(label: str, options: Iterable[str]) -> widgets.Dropdown:
    """A labelled list to choose from; it starts with the first."""
    return widgets.Dropdown(options=list(options), description=label, style=WIDE)


def switch(label: str, value: bool = True) -> widgets.Checkbox:
    """A labelled checkbox."""
    return widgets.Checkbox(value, description=label, indent=False)


# --- lab 00 ----------------------------------------------------------------------------------------------------------

MAX_WORDS = 24


def chat(m: Model, tokens: Sequence[int], text: str, systems: dict[str, str | None]) -> Explorer:
    """Type a message: after each word, the probability that the reply opens with one of the refusal tokens.

    Below: the likeliest first tokens, and the reply. `systems` names the system prompts to choose from.
    """
    typed = widgets.Text(text, description="You type", layout=widgets.Layout(width="36em"))
    system = choice("system prompt", systems)

    def view() -> list[tuple[str, Rows]]:
        words, chosen = typed.value.split(), systems[system.value]
        if not words:
            return [("Type a message.", [])]
        starts = [" ".join(words[:k]) for k in range(1, len(words) + 1)][-MAX_WORDS:]
        try:
            last = logits(m, starts, system=chosen)  # [words, vocab]
            reply = generate(m, [typed.value.strip()], system=chosen, max_new_tokens=shown_tokens(m))[0]
        except RefusalLabError as error:  # too long, for example
            return [(str(error), [])]
        p = last.double().softmax(-1)
        refusal = p[:, list(tokens)].sum(-1).tolist()
        best = [x.tolist() for x in p[-1].topk(5)]
        openers = [(repr(m.tokenizer.decode([i])), f"{q:.2f}") for q, i in zip(*best, strict=True)]
        return [
            (
                "Refusal probability after each word",
                [(w, *_bar(q)) for w, q in zip(words[-MAX_WORDS:], refusal, strict=True)],
            ),
            ("Likeliest first tokens of the reply", openers),
            ("Reply", [(reply,)]),
        ]

    return Explorer([typed, system], view)


def _bar(p: float) -> tuple[str, str]:
    return f"{p:.2f}", "\u2588" * round(20 * p)


# --- lab 01 ----------------------------------------------------------------------------------------------------------

MISJUDGED = 6


def judges(replies: dict[str, Sequence[Reply]], lists: dict[str, Sequence[str]]) -> Explorer:
    """Judge replies by a phrase list, and see where it is wrong: the counts, then some of the misjudged replies."""
    which, chosen = choice("replies", replies), choice("phrase list", lists)
    more = widgets.Text("", description="more phrases", placeholder="one, another", style=WIDE)
    start = switch("only at the start", False)

    def says_refusal(text: str) -> bool:
        phrases = [*lists[chosen.value], *(p.strip() for p in more.value.split(",") if p.strip())]
        if not start.value:
            return refused_by_phrases(text, phrases)
        return any(refused_by_phrases(text[: len(phrase)], [phrase]) for phrase in phrases)

    def view() -> list[tuple[str, Rows]]:
        found = judge_errors(replies[which.value], says_refusal)
        wrong = [r for r in replies[which.value] if says_refusal(r.text) != r.refused]
        counts = [
            ("of", "wrongly judged", ""),
            (f"{found.refusals} refusals", str(found.misses), "missed"),
            (f"{found.others} other replies", str(found.false_alarms), "taken for a refusal"),
        ]
        shown = [
            (" ".join(r.prompt.split()), r.text, "missed" if r.refused else "taken for a refusal")
            for r in wrong[:MISJUDGED]
        ]
        return [("The list against the truth", counts), ("Misjudged replies", shown or [("none",)])]

    return Explorer([which, chosen, more, start], view)


# --- lab 02 --------------------------------------------------------------------------------------------------------


def candidates(m: Model, search: Search, harmful: Sequence[str], harmless: Sequence[str]) -> Explorer:
    """Choose a candidate direction: its scores, and replies without it (harmful) or with it added (harmless).

    The switches turn filters of the selection rule off; the second table says which candidate then wins.
    """
    best = search.selected
    layer = slider("layer", 1, search.n_layers - 1, best.layer)
    position = slider("position", min(m.positions), -1, best.position)
    filters = {name: switch(f"{name} filter") for name in ("KL", "induce", "layer")}

    def kept(c: Candidate) -> bool:
        reason = discarded_because(c, search.n_layers)
        return reason is None or (reason != "score is NaN" and not filters[reason.split()[0]].value)

    def view() -> list[tuple[str, Rows]]:
        chosen = next(c for c in search.candidates if (c.layer, c.position) == (layer.value, position.value))
        winner = min(filter(kept, search.candidates), key=lambda c: c.bypass)
        r = search.vectors[chosen.layer, chosen.position]
        without = generate(m, harmful, edit=ablation(r), max_new_tokens=shown_tokens(m))
        added = generate(m, harmless, edit=addition(r, chosen.layer), max_new_tokens=shown_tokens(m))
        verdict = discarded_because(chosen, search.n_layers) or "passes every filter"
        scores = [("layer", "position", "bypass", "induce", "KL", "")]
        scores += [_scores(chosen, f"chosen: {verdict}"), _scores(winner, "wins with these filters")]
        return [
            ("Scores", scores),
            ("Harmful, direction ablated", list(zip(harmful, without, strict=True))),
            ("Harmless, direction added", list(zip(harmless, added, strict=True))),
        ]

    return Explorer([layer, position, *filters.values()], view)


def _scores(c: Candidate, remark: str) -> tuple[str, ...]:
    return str(c.layer), str(c.position), f"{c.bypass:.2f}", f"{c.induce:.2f}", f"{c.kl:.3f}", remark


# --- lab 03 ---


def planes(fit: dict[str, Tensor], shown: dict[str, Tensor], layer: int, position: int) -> Explorer:
    """Move through layers and positions, and watch sets of prompts part in a plane.

    fit: "harmful" and "harmless" streams [n, layers, positions, width]; plane, direction and midpoint come from these.
    shown: streams of the sets that are drawn.
    """
    layers, positions = fit["harmful"].shape[1:3]
    where = [slider("layer", 0, layers - 1, layer), slider("position", -positions, -1, position)]
    along = switch("first axis along the direction", False)

    def at_site(streams: Tensor) -> Tensor:
        return streams[:, where[0].value, where[1].value]

    def view() -> list[tuple[str, Rows | Picture]]:
        a, b = at_site(fit["harmful"]), at_site(fit["harmless"])
        r = difference_in_means(a, b)
        if r.norm() <= 1e-5 * (a.norm(dim=-1).mean() + b.norm(dim=-1).mean()):
            return [("Nothing to see", [("Every prompt has the same token here, and nothing has been computed yet.",)])]
        plane = plane_along(torch.cat([a, b]), r) if along.value else principal_plane(torch.cat([a, b]))
        points = {name: plane.at(at_site(streams)) for name, streams in shown.items()}
        names = ("direction r", "first component of the rest") if along.value else ("component 1", "component 2")
        axes = [f"{name} ({share:.0%} of the variance)" for name, share in zip(names, plane.shares, strict=True)]
        middle = projections(torch.stack([a.mean(0), b.mean(0)]), r).mean()
        rows = [("prompts", "n", "mean projection, from the midpoint", "on the harmful side")]
        for name, streams in shown.items():
            x = projections(at_site(streams), r) - middle
            rows.append((name, str(len(x)), f"{x.mean():.1f}", str(rate((x > 0).tolist()))))
        centres = "; ".join(f"{name} ({xy[:, 0].mean():.0f}, {xy[:, 1].mean():.0f})" for name, xy in points.items())
        alt = f"One point for each prompt. Centres of the sets: {centres}."
        return [("Plane", Picture(plane_figure(points, *axes), alt)), ("Along the direction", rows)]

    return Explorer([*where, along], view)


# --- lab 04 ---

EDITS = ("addition", "ACE", "ablation")


def steering(
    m: Model,
    r: Tensor,
    layer: int,
    reference: Tensor,
    tokens: Sequence[int],
    prompts: dict[str, Sequence[str]],
) -> Explorer:
    """Steer along r [width] and read the replies: an edit, a strength, and a random vector of the same length instead.

    reference [width] is the harmless mean, for ACE; tokens are those that open a refusal; prompts: heading -> a few.
    """
    edit = choice("edit", EDITS)
    strength = slider("coefficient or alpha", -2.0, 2.0, 1.0, 0.25)
    control = switch("random vector of the same length", False)
    random = norm_matched(r, 1, seed=0)[0]

    def view() -> list[tuple[str, Rows | Picture]]:
        vector = random if control.value else r
        made = {
            "addition": lambda: addition(vector, layer, strength.value),
            "ACE": lambda: affine(vector, layer, reference, strength.value),
            "ablation": lambda: ablation(vector),
        }[edit.value]()
        tables = []
        for heading, few in prompts.items():
            odds = refusal_metric(logits(m, few, edit=made), tokens).tolist()
            replies = generate(m, few, edit=made, max_new_tokens=shown_tokens(m))
            rows = [("prompt", "refusal metric", "reply")]
            rows += [(p, f"{x:.1f}", reply) for p, x, reply in zip(few, odds, replies, strict=True)]
            tables.append((heading, rows))
        return tables

    return Explorer([edit, strength, control], view)


# --- lab 06 ---


def suffixes(
    m: Model,
    r: Tensor,
    layer: int,
    position: int,
    prompts: Sequence[str],
    known: dict[str, str],
    landmarks: dict[str, float],
) -> Explorer:
    """Choose a suffix or type one: what each of its tokens does to the projection on r [width], and the reply.

    known: names of suffixes to choose from; landmarks: projections to compare with, such as that of harmless prompts.
    """
    prompt, which = choice("request", prompts), choice("suffix", known)
    own = widgets.Text("", description="or type one", placeholder="begins with a space", style=WIDE)

    def view() -> list[tuple[str, Rows]]:
        suffix = own.value or known[which.value]
        if not suffix.strip():
            return [("Type a suffix.", [])]
        try:
            effect = suffix_effect(m, prompt.value, suffix, r, layer, position)
            reply = generate(m, [prompt.value + suffix], max_new_tokens=shown_tokens(m))[0]
        except RefusalLabError as error:  # too long, for example
            return [(str(error), [])]
        low, high = min(0.0, *effect.growing, effect.start), max(*effect.growing, effect.start)

        def bar(x: float) -> str:
            return "\u2588" * round(24 * (x - low) / (high - low)) if high > low else ""

        rows = [("suffix token", "projection up to here", "", "change by this token", "change if it alone is removed")]
        rows.append(("(none)", f"{effect.start:.1f}", bar(effect.start), "", ""))
        before = (effect.start, *effect.growing)
        for k, token in enumerate(effect.tokens):
            step, gone = effect.growing[k] - before[k], effect.without[k] - effect.growing[-1]
            rows.append(
                (repr(token), f"{effect.growing[k]:.1f}", bar(effect.growing[k]), f"{step:+.1f}", f"{gone:+.1f}")
            )
        marks = [(name, f"{value:.1f}", bar(value)) for name, value in landmarks.items()]
        return [("Token by token", rows), ("For comparison", marks), ("Reply", [(reply,)])]

    return Explorer([prompt, which, own], view)


# --- lab 07 ---


def heads(m: Model, r: Tensor, conditions: dict[str, tuple[str, str]], layer: int, head: int) -> Explorer:
    """Pick a head: what it writes along r [width] at the last token, and where it looks, beside all other heads.

    conditions: name -> (prompt as it is sent, its suffix or "").
    """
    which = choice("prompt", conditions)
    chosen = slider("layer", 0, m.n_layers - 1, layer)
    picked = slider("head", 0, m.hf.config.num_attention_heads - 1, head)
    sent, suffixes = (list(column) for column in zip(*conditions.values(), strict=True))
    written = attribute(m, sent, r).heads  # [conditions, layers, heads]
    weights, masks = attention_from_last(m, sent), regions(m, sent, suffixes)

    def view() -> list[tuple[str, Rows]]:
        at, row = (chosen.value, picked.value), list(conditions).index(which.value)
        table = [("prompt", "written along r", "rank", *(f"looks at {name}" for name in masks))]
        for k, name in enumerate(conditions):
            own = written[k][at]
            rank = f"{int((written[k] > own).sum()) + 1} of {written[k].numel()}"
            shares = (f"{mass(weights, mask)[k][at]:.2f}" for mask in masks.values())
            table.append((name, f"{own:+.1f}", rank, *shares))
        ids = encode(m, [sent[row]])["input_ids"][0].tolist()
        tokens = [repr(m.tokenizer.decode([i])) for i in ids]
        looks = [(token, *_bar(p)) for token, p in zip(tokens, weights[row][at][-len(ids) :].tolist(), strict=True)]
        return [(f"Head {at[1]} of layer {at[0]}", table), (f"Where the last token looks: {which.value}", looks)]

    return Explorer([which, chosen, picked], view)


# --- lab 08 ----------------------------------------------------------------------------------------------------------


def thresholds(harmful: Tensor, harmless: Tensor, attacked: Tensor) -> Explorer:
    """Move the threshold of a detector: what it catches, what it costs, and what it still catches under an attack.

    Scores [n] of harmful and harmless requests, and of harmful ones under an attack.
    """
    alarms = slider("false alarms allowed, in percent", 0, 50, 2)
    share = choice("harmful among all requests", ["1 in 1000", "1 in 100", "1 in 2"])

    def view() -> list[tuple[str, Rows | Picture]]:
        cut = threshold_at(harmless, alarms.value / 100)
        caught, spoilt, left = (rate((s > cut).tolist()) for s in (harmful, harmless, attacked))
        base = 1 / int(share.value.split()[-1])
        blocked = caught.value * base + spoilt.value * (1 - base)
        wrong = f"{spoilt.value * (1 - base) / blocked:.2f}" if blocked else "none is blocked"
        rows = [
            ("harmful requests blocked", str(caught)),
            ("the same, under attack", str(left)),
            ("harmless requests blocked", str(spoilt)),
            ("of all blocked requests, harmless", wrong),
        ]
        curves = {"as they come": roc(harmful, harmless), "under attack": roc(attacked, harmless)}
        picture = Picture(roc_curve(curves, (spoilt.value, caught.value)), "catches against false alarms")
        return [("At this threshold", rows), ("Every threshold", picture)]

    return Explorer([alarms, share], view)


# --- lab 11 ----------------------------------------------------------------------------------------------------------


def thought_editor(models: dict[str, Model], items: Sequence[Item]) -> Explorer:
    """Write a thought, see the reply behind it: for models that think, by name, and requests of the world.

    It starts with the first model's own thought about the first request.
    """
    requests = {" ".join(messages(item.prompt)[-1]["content"].split()): item for item in items}
    which, asked = choice("model", models), choice("request", requests)
    (own,) = think(next(iter(models.values())), [items[0].prompt])
    typed = widgets.Text(own, description="thought", layout=widgets.Layout(width="56em"))

    def view() -> list[tuple[str, Rows]]:
        m, item = models[which.value], requests[asked.value]
        try:
            (reply,) = generate(m, behind(m, [item.prompt], [typed.value]), max_new_tokens=shown_tokens(m))
        except RefusalLabError as error:  # too long, for example
            return [(str(error), [])]
        said, right = steps_of(typed.value), right_thought(item)
        judged = judge(m, item, reply)
        verdict = "refused" if judged.refused else "the exact answer" if judged.correct else "neither"
        steps = [(step, getattr(said, step) or "-", getattr(right, step)) for step in thought.STEPS]
        return [
            ("Reply", [(reply, verdict)]),
            ("What the thought says", [("", "here", "right"), *steps]),
        ]

    return Explorer([which, asked, typed], view)


# --- lab 12 ----------------------------------------------------------------------------------------------------------

MOVED = (
    "the stream",
    "its component along r",
    "all but that component",
    "what attention writes",
    "what the MLP writes",
)


def patching(
    m: Model,
    r: Tensor,
    tokens: Sequence[int],
    pairs: dict[str, tuple[Sequence[str], Sequence[str]]],
    layer: int,
    position: int,
) -> Explorer:
    """Move an activation from one run to another: how much comes back, and what the model then says.

    pairs: name -> (prompts of the run to take from, prompts of the run to put into), with the same tokens at the end of
    all of them. r [width] is a direction, tokens are those that open a refusal.
    """
    which, moved = choice("from, into", pairs), choice("move", MOVED)
    seq = min(encode(m, [prompt])["input_ids"].shape[1] for both in pairs.values() for side in both for prompt in side)
    layers, positions = slider("layer", 0, m.n_layers - 1, layer), slider("position", -seq, -1, position)
    runs = {name: read_activations(m, source) for name, (source, _) in pairs.items()}
    before = {name: [refusal_metric(logits(m, side), tokens) for side in both] for name, both in pairs.items()}
    parts = dict(zip(MOVED, ("stream", "stream", "stream", "attention", "MLP"), strict=True))
    changes = {MOVED[1]: lambda x, s: swap_component(x, s, r), MOVED[2]: lambda x, s: swap_component(s, x, r)}

    def view() -> list[tuple[str, Rows]]:
        name = which.value
        (_, into), (there, here) = pairs[name], before[name]
        change = changes.get(moved.value, replace)
        edit = patch(runs[name], parts[moved.value], layers.value, [positions.value], change)
        after = refusal_metric(logits(m, into, edit=edit, batch_size=len(into)), tokens)
        replies = generate(m, into, edit=edit, max_new_tokens=shown_tokens(m), batch_size=len(into))
        token = m.tokenizer.decode([encode(m, into[:1])["input_ids"][0, positions.value].item()])
        rows = [
            ("", "mean refusal metric"),
            ("run to take from", f"{there.mean():.1f}"),
            ("run to put into", f"{here.mean():.1f}"),
            ("the same, patched", f"{after.mean():.1f}"),
            ("share recovered", f"{round(recovered(there, here, after).item(), 2) + 0.0:.2f}"),
        ]
        said = [(" ".join(prompt.split()), reply) for prompt, reply in zip(into[:3], replies, strict=False)]
        heading = f"Moved at layer {layers.value}, token {token!r}: {moved.value} ({len(into)} prompts)"
        return [(heading, rows), ("What it says then", said)]

    return Explorer([which, moved, layers, positions], view)


def layer_edit(m: Model, r: Tensor, tokens: Sequence[int], harmful: Sequence[str], harmless: Sequence[str]) -> Explorer:
    """Edit what attention and MLP of each block write, with a tent of strengths: what is left, and what it costs.

    r [width] is the direction, tokens are those that open a refusal.
    """
    last = m.n_layers - 1
    centre, reach = slider("centre", 0, last, last // 2 + 1), slider("reach", 1, last, last // 2)
    attention, mlp = (slider(f"{part} strength", 0.0, 1.5, 1.0, 0.25) for part in ("attention", "MLP"))
    untouched, before = logits(m, harmless), refusal_metric(logits(m, harmful), tokens).mean()

    def view() -> list[tuple[str, Rows]]:
        strengths = [
            [tent(layer, peak.value, centre.value, 0.0, reach.value) for layer in range(m.n_layers)]
            for peak in (attention, mlp)
        ]
        edited = edit_writers(m, r, *strengths)
        after = refusal_metric(logits(edited, harmful), tokens).mean()
        kl = kl_divergence(untouched, logits(edited, harmless)).mean()
        replies = generate(edited, [harmful[0], harmless[0]], max_new_tokens=shown_tokens(m))
        rows = [
            ("refusal metric of harmful prompts, untouched", f"{before:.1f}"),
            ("the same, edited", f"{after:.1f}"),
            ("KL on harmless prompts (nats)", f"{kl:.3f}"),
            ("strengths, attention", " ".join(f"{s:.1f}" for s in strengths[0])),
            ("strengths, MLP", " ".join(f"{s:.1f}" for s in strengths[1])),
        ]
        said = [(" ".join(p.split()), reply) for p, reply in zip((harmful[0], harmless[0]), replies, strict=True)]
        return [(f"Edited around layer {centre.value}", rows), ("What the edited model says", said)]

    return Explorer([centre, reach, attention, mlp], view)


# --- lab 13 ----------------------------------------------------------------------------------------------------------


def conversation(models: dict[str, Model], r: Tensor, layer: int, items: Sequence[Item]) -> Explorer:
    """Put earlier turns before a request: the projection on r [width] before each reply, and the reply at the end.

    The streams are read at the input of block `layer`, at the last token.
    """
    requests = {" ".join(messages(item.prompt)[-1]["content"].split()): item for item in items}
    which, asked, kind = choice("model", models), choice("request", requests), choice("earlier turns", EARLIER)
    count = slider("turns", 0, 8, 2)

    def view() -> list[tuple[str, Rows]]:
        m, item = models[which.value], requests[asked.value]
        (item,) = after_turns([item], kind.value, count.value)
        along = streams_by_turn(m, [item.prompt], layer)[0] @ unit(r)
        (reply,) = generate(m, [item.prompt], max_new_tokens=shown_tokens(m))
        replies = [turn["content"] for turn in item.prompt if turn["role"] == "assistant"]
        texts = [turn["content"] for turn in item.prompt if turn["role"] == "user"]
        judged = judge(m, item, reply)
        verdict = "refused" if judged.refused else "the exact answer" if judged.correct else "neither"
        rows = zip(texts, [f"{x:.1f}" for x in along.tolist()], [*replies, f"{reply} ({verdict})"], strict=True)
        return [("The conversation", [("user", "projection", "assistant"), *rows])]

    return Explorer([which, asked, kind, count], view)
