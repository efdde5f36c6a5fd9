"""Run the science with the shapes in its annotations checked: a process of its own, which test_shapes.py starts.

The modules are imported with checks around their functions. What they need is imported before, because under the import
hook Python compiles everything anew, and beartype before nnsight, because it cannot be imported afterwards.
"""

import functools
import importlib
import inspect
from typing import get_args, get_type_hints

import scipy.stats  # noqa: F401
import torch
import transformers.modeling_utils  # noqa: F401
from beartype import beartype
from jaxtyping import AbstractArray, Float, install_import_hook

import refusallab.model  # noqa: F401

MODULES = [
    f"refusallab.{name}"
    for name in (
        "activations",
        "attribution",
        "audit",
        "cones",
        "conversations",
        "decoding",
        "dictionary",
        "directions",
        "geometry",
        "harmfulness",
        "interventions",
        "measure",
        "orthogonalization",
        "patching",
        "steering",
        "thoughts",
        "twins",
        "weights",
    )
]
SIZES = {}  # of the axes that the model decides, by name
CALLED = set()


def name_of(function):
    return f"{function.__module__}.{function.__qualname__}"


def checked(function):
    """The function with its annotations checked, if one of them has a shape.

    Axes named in SIZES must have that size, unless the caller chooses: then the function has an argument of that name.
    """
    if not any(map(has_shape, function.__annotations__.values())):
        return function
    check, parameters = beartype(function), inspect.signature(function).parameters

    @functools.wraps(function)
    def call(*args, **kwargs):
        CALLED.add(name_of(function))
        fixed = {name: size for name, size in SIZES.items() if name not in parameters}
        assert isinstance(torch.empty(*fixed.values(), device="meta"), Float[torch.Tensor, " " + " ".join(fixed)])
        return check(*args, **kwargs)

    return call


def has_shape(hint):
    return (inspect.isclass(hint) and issubclass(hint, AbstractArray)) or any(map(has_shape, get_args(hint)))


def shaped():
    """The functions and methods of MODULES that have a shape in an annotation, and dataclasses by their `__init__`."""
    names = set()
    for module in map(importlib.import_module, MODULES):
        own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
        methods = [value for cls in own if inspect.isclass(cls) for value in vars(cls).values()]
        for function in filter(inspect.isfunction, [*own, *(getattr(value, "fget", value) for value in methods)]):
            if any(map(has_shape, get_type_hints(function, include_extras=True).values())):
                names.add(name_of(function))
    return names


def run_science():
    """Call every function with a shape in its annotations, on few prompts. What takes seconds comes last."""
    from refusallab import cones
    from refusallab.activations import logit_lens, residual, stream
    from refusallab.attribution import attention_from_last, attribute, cosine_trace, mass, regions
    from refusallab.audit import gap_left, rank_one_share
    from refusallab.cones import (
        direction_effect,
        downstream,
        last_token_direction,
        mean_ablation,
        plane_directions,
        search_directions,
    )
    from refusallab.conversations import streams_by_turn
    from refusallab.decoding import closed_prompt, contrast
    from refusallab.dictionary import (
        features_of,
        random_dictionary,
        token_mlps,
        token_streams,
        train_dictionary,
        train_transcoder,
    )
    from refusallab.directions import (
        Direction,
        candidate_directions,
        cosines,
        difference_in_means,
        search_candidates,
    )
    from refusallab.geometry import direct_logits, plane_along, principal_plane, projections, right_side, token_strip
    from refusallab.harmfulness import law_questions, site_directions, steered_verdicts, verdicts_by_layer
    from refusallab.interventions import ablation, affine, project_out_span, span_ablation
    from refusallab.measure import kl_divergence, learn_refusal_tokens, refusal_metric
    from refusallab.model import load, logits
    from refusallab.orthogonalization import gap_by_layer, orthogonalize, write_strength
    from refusallab.patching import patched_metrics, read_activations, recovered, recovery, swap_component, swap_head
    from refusallab.prompts import bundled
    from refusallab.steering import dose_curve, norm_matched
    from refusallab.thoughts import final_stream
    from refusallab.twins import sample_requests
    from refusallab.weights import add_ranks, quantize, search_edit

    m, layer = load("charter-chat"), 4
    SIZES.update(layers=m.n_layers, positions=len(m.positions), width=m.width, vocab=m.hf.config.vocab_size)
    SIZES["heads"] = m.hf.config.num_attention_heads
    assert len(set(SIZES.values())) == len(SIZES)  # so that axes can be told apart
    harmful, harmless = bundled("harmful_val")[:6], bundled("harmless_val")[:3]
    bad, good = ([item.prompt for item in items] for items in (harmful, harmless))

    x, y = residual(m, bad), residual(m, good)
    vectors = candidate_directions(m, bad, good)
    r, a, b = vectors[layer, -1], x[:, layer, -1], y[:, layer, -1]
    difference_in_means(x, y)
    final_stream(m, bad)
    streams_by_turn(m, bad, layer)
    contrast(logits(m, bad), logits(m, bad, system=closed_prompt()), 1.0)
    logit_lens(m, stream(m, bad[0]))

    before, after = logits(m, bad), logits(m, bad, edit=ablation(r))
    tokens = learn_refusal_tokens(before, logits(m, good))
    refusal_metric(after, tokens)
    kl_divergence(before, after)
    logits(m, bad, edit=affine(r, layer, b.mean(0), 0.0))

    cosine_trace(m, bad, r)
    attribute(m, bad, r).projection(layer)
    weights = attention_from_last(m, bad)
    mass(weights, regions(m, bad, [""] * len(bad))["end"])

    projections(x, vectors)
    principal_plane(a).at(x)
    plane_along(a, r)
    right_side(a, b, a[:2], b[:1])
    direct_logits(m, r)
    token_strip(m, bad[0], r)
    cosines(norm_matched(r, 3, seed=0))
    plane_directions(r, vectors[layer - 1, -1], [0.0, 45.0, 90.0])

    gap_by_layer(m, orthogonalize(m, r), r, bad)
    write_strength(m, r)
    downstream(m, bad, r, vectors[layer - 1, -1])
    direction_effect(m, harmful, harmless, tokens, r, layer=layer, length=r.norm().item())
    dose_curve(m, harmless, r, layer, [0.0, 1.0])
    site_directions(m, bad, good)
    steered_verdicts(m, law_questions("val", 2), r, layer)
    verdicts_by_layer(m, law_questions("val", 2), site_directions(m, bad, good)["refusal"], [layer])
    mean_ablation(m, bad, r)

    run, before = read_activations(m, bad[:3]), refusal_metric(logits(m, bad[:3]), tokens)
    patched_metrics(m, good, run, tokens, part="MLP", layers=[layer])
    moved = patched_metrics(m, good, run, tokens, layers=[layer], change=lambda x, source: swap_component(x, source, r))
    swap_head(run.parts["heads"], run.parts["heads"], 1, SIZES["heads"])
    recovered(before, moved[0, 0], moved)
    recovery(before, moved[0, 0], before)

    sample_requests("val", 4)
    streams = token_streams(m, bad, layer)
    trained = train_dictionary(streams, features=40)
    trained.explained(streams)
    read, written = token_mlps(m, bad, layer)
    train_transcoder(read, written, features=40).explained(read, written)
    features_of(random_dictionary(trained, seed=0), torch.cat([a, b]), torch.arange(len(a) + len(b)) < len(a), r, 2)

    project_out_span(a, vectors[1:, -1])
    span_ablation(vectors[1:, -1])
    half = add_ranks(m, quantize(m, 4), 2, -1.0)
    rank_one_share([a, b])
    gap_left(half, m, bad, good)
    search_edit(m, vectors[:, -1], bad, good, tokens, trials=2)

    found = search_candidates(m, bad, good, bad, good)
    Direction(found.vectors[layer, -1], layer, -1)
    site, r, tokens = last_token_direction(m, count=4)
    find_cone = cones.find_cone  # two steps are enough to see its shapes
    cones.find_cone = lambda *args, **settings: find_cone(*args, **{**settings, "steps": 2})
    search_directions(m, site, r, tokens)


def main():
    """Run the science with the checks on, then print the functions that were not called."""
    with install_import_hook(MODULES, "check_shapes.checked"):
        run_science()
    print("not called:", sorted(shaped() - CALLED))
