"""The capstone's second track: labs 02 to 05 on one hub model, beside published figures, with tolerances set before.

Figures: Arditi et al. 2024 (arXiv 2406.11717), Table 5 (selection) and Table 7 (cross-entropy of the model's own
replies). The sampled prompts differ from the paper's, so do not expect equal figures. `TOLERANCES` says what counts
as a replication.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from refusallab.activations import residual
from refusallab.directions import random_directions
from refusallab.experiment import find_direction
from refusallab.findings import PUBLISHED, Finding
from refusallab.interventions import ablation, addition, unit
from refusallab.judging import REPLY_TOKENS, outcomes
from refusallab.measure import cross_entropy, rate
from refusallab.model import Edit, Model, generate
from refusallab.orthogonalization import distance_from_hooks, orthogonalize
from refusallab.prompts import prompt_set

TOLERANCES = {
    "depth": 0.1,  # of the selected layer, as a share of all layers
    "bypass": 2.0,  # nats
    "induce": 2.0,  # nats
    "separation": 0.9,  # area under the ROC curve of the projection, at least
    "fall": 0.5,  # of the refused share of harmful prompts under ablation, at least
    "random": 0.1,  # change of that share under ablation of a random direction, at most
    "induced": 0.5,  # refused share of harmless prompts under addition, at least
    "loss": 0.1,  # nats per token that ablation adds to the model's own replies, at most
    "weights": 0.05,  # difference of refused shares between edited weights and ablation, at most
}
OWN_REPLIES = 32  # prompts whose replies are scored with cross-entropy


def replicate(m: Model, progress: Callable[[str], None] = lambda step: None) -> list[Finding]:
    """Labs 02 to 05 on a model, as findings. Replies are counted, not kept.

    The direction is chosen on train and validation prompts; everything after lab 02 is measured on test prompts.
    Raises RefusalLabError where no direction can be selected: the finding is then that labs 02 to 05 do not carry over.
    """
    progress("selecting a direction")
    found = find_direction(m)
    best, r, n_layers = found.selected, found.direction.vector, m.n_layers
    findings = _selection(m, best.position, best.layer / n_layers, best.bypass, best.induce)

    progress("projections")
    harmful, harmless = prompt_set(m, "harmful_test"), prompt_set(m, "harmless_test")
    areas = [_projection(m, [i.prompt for i in items], best.layer, best.position, r) for items in (harmful, harmless)]
    area = (areas[0][:, None] > areas[1]).double().mean().item()
    least = TOLERANCES["separation"]
    findings.append(
        Finding("03", "projection tells harmful from harmless (AUC)", f"{area:.2f}", f"at least {least}", area >= least)
    )

    def refused(items: list, edit: Edit | None = None, model: Model = m) -> float:
        progress("replies")
        judged = rate([o.refused for o in outcomes(model, items, edit=edit)])
        shares.append(str(judged))
        return judged.value

    shares: list[str] = []
    other = random_directions(m.width, 1, seed=0)[0]
    base, cut, chance = refused(harmful), refused(harmful, ablation(r)), refused(harmful, ablation(other))
    induced = refused(harmless, addition(r, best.layer))
    fall, most, need = TOLERANCES["fall"], TOLERANCES["random"], TOLERANCES["induced"]
    findings += [
        Finding("04", "harmful refused, r ablated", shares[1], f"{fall} below {base:.2f}", base - cut >= fall),
        Finding(
            "04",
            "harmful refused, random direction ablated",
            shares[2],
            f"{base:.2f} +- {most}",
            abs(base - chance) <= most,
        ),
        Finding("04", "harmless refused, r added", shares[3], f"at least {need}", induced >= need),
        *_losses(m, [i.prompt for i in harmless[:OWN_REPLIES]], r, best.layer, progress),
    ]
    edited, near = orthogonalize(m, r), TOLERANCES["weights"]
    distance = distance_from_hooks(m, edited, r, [i.prompt for i in harmful[:8]])
    weights = refused(harmful, model=edited)
    what = f"harmful refused, weights edited ({m.equivalence}; logits {distance:.1g} apart)"
    return [*findings, Finding("05", what, shares[4], f"{cut:.2f} +- {near}", abs(weights - cut) <= near)]


def _selection(m: Model, position: int, depth: float, bypass: float, induce: float) -> list[Finding]:
    """The selected candidate beside the published one; its signs alone where nothing is published."""
    paper = PUBLISHED.get(m.name)
    if paper is None:
        return [
            Finding("02", "bypass of the selected candidate", f"{bypass:.2f}", "below 0 (not published)", bypass < 0),
            Finding("02", "induce of the selected candidate", f"{induce:.2f}", "above 0 (not published)", induce > 0),
        ]

    def near(what: str, ours: float, published: float, tolerance: float) -> Finding:
        holds = abs(ours - published) <= tolerance
        return Finding("02", what, f"{ours:.2f}", f"{published:.2f} +- {tolerance} (Table 5)", holds)

    return [
        Finding("02", "position", str(position), f"{paper.position} (Table 5)", position == paper.position),
        near("depth of the layer", depth, paper.depth, TOLERANCES["depth"]),
        near("bypass", bypass, paper.bypass, TOLERANCES["bypass"]),
        near("induce", induce, paper.induce, TOLERANCES["induce"]),
    ]


def _projection(m: Model, prompts: list, layer: int, position: int, r: Tensor) -> Tensor:
    return residual(m, prompts, layers=[layer], positions=[position])[:, 0, 0] @ unit(r)


def _losses(m: Model, prompts: list, r: Tensor, layer: int, progress: Callable[[str], None]) -> list[Finding]:
    """Cross-entropy of the model's own replies to harmless prompts: untouched, ablated, r subtracted."""
    progress("cross-entropy")
    replies = [text or " " for text in generate(m, prompts, max_new_tokens=REPLY_TOKENS)]
    untouched, cut, subtracted = (
        cross_entropy(m, replies, prompts, edit=edit).mean().item()
        for edit in (None, ablation(r), addition(r, layer, -1))
    )
    paper, most = PUBLISHED.get(m.name), TOLERANCES["loss"]
    known = "" if paper is None or paper.loss is None else f" (Table 7: {paper.loss[1] - paper.loss[0]:+.2f})"
    return [
        Finding(
            "04",
            "loss of own replies, r ablated",
            f"{cut - untouched:+.2f}",
            f"at most +{most}{known}",
            cut - untouched <= most,
        ),
        Finding(
            "04",
            "loss of own replies, r subtracted",
            f"{subtracted - untouched:+.2f}",
            "more than ablation",
            subtracted > cut,
        ),
    ]
