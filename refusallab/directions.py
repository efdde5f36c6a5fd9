"""The refusal direction: difference in means, three scores for every candidate, and the selection rule.

Arditi et al. 2024 (arXiv 2406.11717), sections 2.3 and Appendix C. A candidate is the difference of the mean residual
streams of harmful and harmless prompts at one block input (layer) and one post-instruction token (position).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Float32
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from refusallab import __version__
from refusallab.activations import mean_residual
from refusallab.bars import with_bar
from refusallab.errors import RefusalLabError
from refusallab.interventions import ablation, addition
from refusallab.judging import Openings, refusal_openings, refuses
from refusallab.measure import kl_divergence, refusal_metric
from refusallab.model import (
    Model,
    Prompt,
    digest_of_weights,
    listed_prompts,
    no_edit,
    require_finite,
)
from refusallab.prefix import PromptRuns

HOOK = "resid_pre"  # candidates are block inputs
OPERATION = "mean(harmful) - mean(harmless)"
MAX_KL, MIN_INDUCE, DEPTH = 0.1, 0.0, 0.8
BATCH_SIZE = 32  # prompts in one forward pass, at most


@dataclass(frozen=True)
class Candidate:
    """A candidate direction and its scores, all of them kept, whether it passes the filters or not."""

    position: int  # counted from the end of the prompt
    layer: int
    bypass: float  # mean refusal metric on harmful prompts under ablation: low is good
    induce: float  # mean refusal metric on harmless prompts under addition: high is good
    kl: float  # mean KL(base || ablated) at the last token of harmless prompts, in nats: low is good


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction and its site."""

    vector: Float[Tensor, " width"]  # raw length
    layer: int
    position: int


@dataclass(frozen=True, eq=False)
class Search:
    """Every candidate with its scores, before any filter; the selected one is worked out from them."""

    model: str
    commit: str
    n_layers: int
    candidates: tuple[Candidate, ...]
    vectors: Float[Tensor, "layers positions width"]
    openings: Openings
    kept: dict[str, int]  # prompts left after filtering, by set

    @property
    def refusal_tokens(self) -> list[int]:
        return self.openings.tokens

    @property
    def selected(self) -> Candidate:
        """The candidate that `select` chooses. RefusalLabError if none passes the filters."""
        return select(self.candidates, self.n_layers)

    @property
    def direction(self) -> Direction:
        """The vector of the selected candidate."""
        best = self.selected
        vector = self.vectors[best.layer, best.position]  # positions run from -n to -1, so they index from the end
        return Direction(vector, best.layer, best.position)


def difference_in_means(
    harmful: Float[Tensor, "n *rest width"], harmless: Float[Tensor, "m *rest width"]
) -> Float32[Tensor, "*rest width"]:
    """mean(harmful) - mean(harmless) over the first dimension, worked out in float64.

    RefusalLabError if one is empty or the shapes differ.
    """
    if len(harmful) == 0 or len(harmless) == 0:
        raise RefusalLabError("A mean needs at least one harmful and one harmless prompt; a list is empty.")
    if harmful.shape[1:] != harmless.shape[1:]:
        raise RefusalLabError(
            f"Harmful and harmless activations differ in shape: {list(harmful.shape)}, {list(harmless.shape)}."
        )
    return (harmful.double().mean(0) - harmless.double().mean(0)).float()


def candidate_directions(
    m: Model, harmful: Sequence[Prompt], harmless: Sequence[Prompt]
) -> Float32[Tensor, "layers positions width"]:
    """Difference in means at every block input and post-instruction position.

    At layer 0 every prompt has the same embedding at a template token, so these candidates are zero: a free control.
    """
    a, b = mean_residual(m, harmful), mean_residual(m, harmless)
    difference = a - b
    noise = 1e-6 * (a.norm(dim=-1, keepdim=True) + b.norm(dim=-1, keepdim=True))  # [layers, positions, 1]
    return torch.where(difference.norm(dim=-1, keepdim=True) <= noise, 0.0, difference).float()


class Scorer:
    """Scores any vectors at any layer on the same validation prompts. What no vector changes is computed once.

    Bypass and KL come from one pass over all prompts; for induce the blocks before the vector's own are not run again,
    since addition leaves them as they were.
    """

    def __init__(
        self, m: Model, harmful: Sequence[Prompt], harmless: Sequence[Prompt], refusal_tokens: Sequence[int]
    ) -> None:
        harmful, harmless = listed_prompts(harmful), listed_prompts(harmless)
        self.tokens, self.n = refusal_tokens, len(harmful)
        self.all = PromptRuns(m, [*harmful, *harmless], BATCH_SIZE)
        (self.base,) = self.all.logits(lambda _: no_edit, torch.zeros(1, m.width))
        require_finite(m, self.base, None)
        self.harmless = PromptRuns(m, harmless, BATCH_SIZE, streams=True)

    def __call__(self, vectors: Float[Tensor, "k width"], layer: int, positions: Sequence[int]) -> list[Candidate]:
        """A candidate for each vector, found at these positions."""
        means = [scores.mean(1).tolist() for scores in self.each(vectors, layer)]
        return [Candidate(position, layer, *scores) for position, *scores in zip(positions, *means, strict=True)]

    def each(
        self, vectors: Float[Tensor, "k width"], layer: int
    ) -> tuple[Float[Tensor, "k harmful"], Float[Tensor, "k harmless"], Float[Tensor, "k harmless"]]:
        """Bypass, induce and KL with each vector on every prompt.

        A zero vector does nothing, so its scores are those of the untouched model; NaN or infinity give NaN.
        """
        finite = vectors.isfinite().all(1)
        ablated, added = [self.base] * len(vectors), [self.base[self.n :]] * len(vectors)
        if moving := (finite & (vectors.norm(dim=1) > 0)).nonzero()[:, 0].tolist():
            without = self.all.logits(ablation, vectors[moving])
            behind = self.harmless.logits_from(layer, partial(addition, layer=layer), vectors[moving])
            for k, *logits in zip(moving, without, behind, strict=True):
                ablated[k], added[k] = logits
        nan = torch.where(finite, 0.0, math.nan)[:, None]
        return (
            torch.stack([refusal_metric(x[: self.n], self.tokens) for x in ablated]) + nan,
            torch.stack([refusal_metric(x, self.tokens) for x in added]) + nan,
            torch.stack([kl_divergence(self.base[self.n :], x[self.n :]) for x in ablated]) + nan,
        )


def score_candidates(
    m: Model,
    vectors: Float[Tensor, "layers positions width"],
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    refusal_tokens: Sequence[int],
    *,
    progress: Callable[[int], None] | None = None,
) -> list[Candidate]:
    """Bypass, induce and KL of every candidate on validation prompts, as `Scorer` gives them.

    vectors: as from `candidate_directions`. `progress(n)` is called with the number that are done, layer by layer.
    """
    score, candidates = Scorer(m, harmful, harmless, refusal_tokens), []
    for layer in with_bar(range(len(vectors)), "layers", len(vectors)):
        candidates.extend(score(vectors[layer], layer, m.positions))
        if progress:
            progress(len(candidates))
    return candidates


def discarded_because(candidate: Candidate, n_layers: int) -> str | None:
    """Why the paper's filters discard a candidate, or None if they keep it."""
    if any(math.isnan(score) for score in (candidate.bypass, candidate.induce, candidate.kl)):
        return "score is NaN"
    if candidate.layer >= int(DEPTH * n_layers):
        return f"layer in the last {1 - DEPTH:.0%}"
    if candidate.kl > MAX_KL:
        return f"KL over {MAX_KL}"
    if candidate.induce <= MIN_INDUCE:
        return f"induce not over {MIN_INDUCE:g}"
    return None


def select(candidates: Sequence[Candidate], n_layers: int) -> Candidate:
    """The candidate with the lowest bypass score among those that pass the filters (Appendix C).

    Raises RefusalLabError, with the count for each filter, when none passes.
    """
    reasons = [discarded_because(c, n_layers) for c in candidates]
    passing = [c for c, reason in zip(candidates, reasons, strict=True) if reason is None]
    if not passing:
        counts = ", ".join(f"{reasons.count(reason)} {reason}" for reason in sorted(set(filter(None, reasons))))
        raise RefusalLabError(f"No candidate passes the filters ({counts}). Look at the scores, or use more prompts.")
    return min(passing, key=lambda c: c.bypass)


def search_candidates(
    m: Model,
    harmful_train: Sequence[Prompt],
    harmless_train: Sequence[Prompt],
    harmful_val: Sequence[Prompt],
    harmless_val: Sequence[Prompt],
    *,
    progress: Callable[[int], None] | None = None,
) -> Search:
    """The whole method: learn refusal tokens, filter prompts, take differences in means, score.

    As in the paper, prompts on which the model does not behave as their label says (harmful ones that it answers,
    harmless ones that it refuses) are left out of train and validation. Here the replies say so, by refusal phrases:
    the first token is a weak judge of some models. `.direction` of the result is the selected direction.
    """
    sets = {
        "harmful_train": listed_prompts(harmful_train),
        "harmless_train": listed_prompts(harmless_train),
        "harmful_val": listed_prompts(harmful_val),
        "harmless_val": listed_prompts(harmless_val),
    }
    refused = {name: refuses(m, prompts) for name, prompts in sets.items()}
    train = [*sets["harmful_train"], *sets["harmless_train"]]
    openings = refusal_openings(m, train, [*refused["harmful_train"], *refused["harmless_train"]])
    kept = {}
    for name, prompts in sets.items():
        wanted = name.startswith("harmful")
        kept[name] = [prompt for prompt, x in zip(prompts, refused[name], strict=True) if x is wanted]
        if not kept[name]:
            behaviour = "is refused" if wanted else "is answered"
            raise RefusalLabError(f"No prompt of {name} ({len(prompts)}) {behaviour} by {m.name}: take others.")
    vectors = candidate_directions(m, kept["harmful_train"], kept["harmless_train"])
    scored = score_candidates(m, vectors, kept["harmful_val"], kept["harmless_val"], openings.tokens, progress=progress)
    counts = {name: len(prompts) for name, prompts in kept.items()}
    return Search(m.name, m.commit, m.n_layers, tuple(scored), vectors, openings, counts)


def random_directions(width: int, count: int, seed: int) -> Float32[Tensor, "{count} {width}"]:
    """Random unit vectors, the control for every claim about a direction."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, width, generator=generator), dim=-1)


def cosines(vectors: Float[Tensor, "k width"]) -> Float32[Tensor, "k k"]:
    """Cosine similarity of every pair. A zero vector has cosine 0 with all."""
    unit = torch.nn.functional.normalize(vectors.float(), dim=-1)
    return unit @ unit.T


def save_candidates(path: Path, search: Search) -> None:
    """Write every candidate's scores as JSON, before any filter, with what they were measured on."""
    record = {
        "model": search.model,
        "commit": search.commit,
        "hook": HOOK,
        "refusal_tokens": search.refusal_tokens,
        "refusals_that_open_with_them": asdict(search.openings.caught),
        "other_replies_that_do": asdict(search.openings.false),
        "kept": search.kept,
        "candidates": [asdict(c) for c in search.candidates],
    }
    _write(path, json.dumps(record, indent=1).encode())


def save_direction(path: Path, direction: Direction, m: Model) -> None:
    """Write a direction of m as safetensors. The metadata says how it was made, where, and with which weights."""
    site = {"layer": str(direction.layer), "position": str(direction.position)}
    part = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"vector": direction.vector.contiguous()}, part, metadata=_origin(m) | site)
        part.replace(path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise RefusalLabError(_not_saved(path, error)) from error


def load_direction(path: Path, m: Model) -> Direction:
    """Read a direction that `save_direction` wrote for m.

    RefusalLabError, saying what differs, unless it was made by the same operation at the same hook, by this version of
    the library, with the weights and the dtype of m. A direction that is wrong in one of these has the right shape
    and often ablates as well as the right one.
    """
    if not path.exists():
        raise RefusalLabError(f"There is no {path.name} yet: save a direction with save_direction.")
    try:
        with safe_open(path, "pt") as file:
            found, vector = file.metadata(), file.get_tensor("vector")
        direction = Direction(vector, int(found["layer"]), int(found["position"]))
        differs = [f"{name} {found[name]}, not {here}" for name, here in _origin(m).items() if found[name] != here]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RefusalLabError(f"{path.name} holds no direction that can be read: save it again.") from error
    if differs:
        raise RefusalLabError(f"{path.name} holds a direction of another kind ({'; '.join(differs)}): find it again.")
    return direction


def _origin(m: Model) -> dict[str, str]:
    """What a saved direction of m depends on beside its site, in words."""
    return {
        "operation": OPERATION,
        "hook": HOOK,
        "model": m.name,
        "weights": digest_of_weights(m),
        "dtype": str(m.hf.dtype).removeprefix("torch."),
        "version": __version__,
    }


def _write(path: Path, content: bytes) -> None:
    part = path.with_suffix(".part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise RefusalLabError(_not_saved(path, error)) from error


def _not_saved(path: Path, error: Exception) -> str:
    return f"{path} was not saved ({error}); what stood there is untouched. Free space or change the folder."
