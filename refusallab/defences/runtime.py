"""All defences at run time, fitted on train traffic, with thresholds chosen only on validation traffic."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from refusallab.activations import residual
from refusallab.defence import AnyOf, Defence, last_words
from refusallab.defences.conditional import ConditionalSteering, conditional_addition
from refusallab.defences.monitor import Monitor, linear_probe
from refusallab.defences.perplexity import Bigrams, PerplexityFilter, count_bigrams, worst_window
from refusallab.defences.prompting import SelfReminder, SystemPrompt
from refusallab.defences.smoothing import SmoothLLM
from refusallab.defences.thresholds import threshold_at
from refusallab.defences.traffic import sample_traffic
from refusallab.errors import RefusalLabError
from refusallab.model import Model
from refusallab.prompts import Item, require_world

FALSE_ALARMS = 0.02  # of harmless validation traffic
REQUESTS = 300  # of each kind, train and validation


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear probe at the last prompt token, and how it scores validation traffic."""

    w: Tensor  # [width]
    layer: int
    threshold: float
    harmful: Tensor  # [n]
    harmless: Tensor  # [n]


def choose_probe(
    m: Model, below: int, train: tuple[list[Item], list[Item]], val: tuple[list[Item], list[Item]]
) -> Probe:
    """The probe, among those at the input of block 1 to below - 1, that catches most at FALSE_ALARMS on validation.

    train and val are (harmful, harmless), as from `sample_traffic`. Ties go to the earliest block.
    """
    if below < 2:
        raise RefusalLabError("A probe needs a block between the embedding and the block that acts: take a later one.")
    layers = list(range(1, below))
    (a, b), (c, d) = (
        (residual(m, [i.prompt for i in items], layers=layers, positions=[-1])[:, :, 0] for items in pair)
        for pair in (train, val)
    )  # each [n, layers, width]
    probes = []
    for k, layer in enumerate(layers):
        w = linear_probe(a[:, k], b[:, k])
        harmful, harmless = c[:, k] @ w, d[:, k] @ w
        probes.append(Probe(w, layer, threshold_at(harmless, FALSE_ALARMS), harmful, harmless))
    return max(probes, key=lambda p: (p.harmful > p.threshold).float().mean().item())


def fit_filter(m: Model, train: list[Item], val: list[Item]) -> PerplexityFilter:
    """A perplexity filter with bigrams of train traffic. It may refuse a share FALSE_ALARMS of val (harmless)."""
    reader: Bigrams = count_bigrams(m, [last_words(item.prompt) for item in train])
    scores = [worst_window(reader.surprise(last_words(item.prompt))) for item in val]
    return PerplexityFilter(m, reader.surprise, threshold_at(scores, FALSE_ALARMS))


def run_time_defences(m: Model, r: Tensor, layer: int) -> list[Defence]:
    """System prompt, self-reminder, filter, SmoothLLM, probe monitor, conditional steering, filter and monitor.

    r [width] is the refusal direction with its own length, found at the input of block `layer`.
    """
    require_world(m)
    train, val = sample_traffic("train", REQUESTS), sample_traffic("val", REQUESTS)
    probe = choose_probe(m, layer, train, val)
    steer = conditional_addition(probe.w, probe.threshold, probe.layer, r, layer)
    reader = fit_filter(m, [*train[0], *train[1]], val[1])
    monitor = Monitor(m, probe.w, probe.layer, -1, probe.threshold)
    return [
        SystemPrompt(m),
        SelfReminder(m),
        reader,
        SmoothLLM(m),
        monitor,
        ConditionalSteering(m, steer),
        AnyOf(m, [reader, monitor], "filter and monitor"),
    ]
