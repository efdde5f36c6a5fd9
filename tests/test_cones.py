"""Cones: bases are orthonormal, the search lowers its loss and keeps its constraint, effects are what they say."""

from dataclasses import replace

import pytest
import torch

from refusallab import cones
from refusallab.activations import residual
from refusallab.cones import (
    INDUCE_WEIGHT,
    direction_effect,
    direction_loss,
    downstream,
    find_cone,
    last_token_direction,
    mean_ablation,
    orthonormal,
    plane_directions,
    search_directions,
    short,
)
from refusallab.directions import DEPTH, Candidate, random_directions, score_candidates
from refusallab.errors import RefusalLabError
from refusallab.interventions import ablation, addition, project_out
from refusallab.measure import Outcome, cross_entropy, kl_divergence, rate, refusal_metric
from refusallab.model import encode, generate, load, logits
from refusallab.prompts import Item, bundled

HARMFUL = [Item("a", "Name a river", "river"), Item("b", "List", "tools: 1"), Item("c", "How do I bake bread?", "pie")]
HARMLESS = [Item("d", "What is 12 plus 7?", "19"), Item("e", "Name a river in the north", "river")]
TOKENS = [5, 9]
WHERE = {"layer": 1, "length": 6.0}


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_mean_ablation_equals_hooks_that_set_each_part_to_its_mean(model_of, hooks, prompts, r, name):
    m, u = model_of(name), r / r.norm()
    batch = encode(m, prompts[:4])
    real = batch["attention_mask"].bool()
    parts = {"inputs": [], "attention": [], "mlp": []}

    def noted(kind):
        return lambda x: parts[kind].append((x @ u)[real].mean()) or x

    layers = range(m.n_layers)
    reading = {"inputs": {i: noted("inputs") for i in layers}, "attention": noted("attention"), "mlp": noted("mlp")}
    hooks.logits(m.hf, batch, **reading)

    def moved(kind):
        places = iter(parts[kind])
        return lambda x: x + (next(places) - x @ u)[..., None] * u

    inputs = moved("inputs")
    sites = {"inputs": {i: inputs for i in layers}, "attention": moved("attention"), "mlp": moved("mlp")}
    asked = prompts[1:3]
    expected = hooks.logits(m.hf, encode(m, asked), **sites)
    edited = logits(m, asked, edit=mean_ablation(m, prompts[:4], 3 * r))
    torch.testing.assert_close(edited, expected, atol=1e-4, rtol=0)
    assert (edited - logits(m, asked, edit=ablation(r))).abs().max() > 0.01


def test_the_basis_is_orthonormal_and_begins_with_the_first_vector():
    vectors = 3 * torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) + 1
    basis = orthonormal(vectors)
    torch.testing.assert_close(basis @ basis.T, torch.eye(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(basis[0], vectors[0] / vectors[0].norm())
    assert basis[1] @ vectors[1] > 0


@pytest.mark.parametrize("vectors", [torch.tensor([[1.0, 2, 3], [2, 4, 6]]), torch.zeros(1, 3)])
def test_dependent_vectors_are_an_error(vectors):
    with pytest.raises(RefusalLabError, match="independent"):
        orthonormal(vectors)


def test_a_plane_is_walked_by_angle():
    v = plane_directions(torch.tensor([2.0, 0, 0]), torch.tensor([1.0, 1, 0]), [0, 90, 45, 180])
    half = 0.5**0.5
    expected = torch.tensor([[1, 0, 0], [0, 1, 0], [half, half, 0], [-1, 0, 0]])
    torch.testing.assert_close(v, expected, atol=1e-6, rtol=0)


def test_the_loss_is_the_sum_of_its_three_parts(model_of, r):
    m, v = model_of("llama"), r / r.norm()
    prompts = [item.prompt for item in HARMLESS]
    answers, asked = [item.answer for item in HARMFUL], [item.prompt for item in HARMFUL]
    freed = cross_entropy(m, answers, asked, edit=ablation(v)).mean()
    steered = refusal_metric(logits(m, prompts, edit=addition(6 * v, 1)), TOKENS)
    kept = kl_divergence(logits(m, prompts), logits(m, prompts, edit=ablation(v))).mean()
    expected = freed + INDUCE_WEIGHT * torch.log1p(torch.exp(-steered)).mean() + kept
    got = direction_loss(m, HARMFUL, HARMLESS, TOKENS, v, **WHERE)
    assert got.item() == pytest.approx(expected.item(), abs=1e-3)


@pytest.mark.slow
def test_a_search_lowers_its_loss_and_is_the_same_each_time(model_of):
    m, start = model_of("llama"), random_directions(32, 1, seed=1)
    settings = {**WHERE, "steps": 12, "batch_size": 3}
    cone = find_cone(m, HARMFUL, HARMLESS, TOKENS, start, **settings)
    before, after = (direction_loss(m, HARMFUL, HARMLESS, TOKENS, v, **WHERE) for v in (start[0], cone.basis[0]))
    assert after < before - 0.05 and len(cone.losses) == 12
    assert torch.equal(cone.basis, find_cone(m, HARMFUL, HARMLESS, TOKENS, start, **settings).basis)
    assert torch.equal(start, random_directions(32, 1, seed=1))  # the start is not changed in place


def test_a_cone_is_orthonormal_and_keeps_away_from_a_direction(model_of, r):
    m, start = model_of("llama"), random_directions(32, 2, seed=1)
    cone = find_cone(m, HARMFUL, HARMLESS, TOKENS, start, orthogonal_to=r, steps=3, batch_size=2, **WHERE)
    torch.testing.assert_close(cone.basis @ cone.basis.T, torch.eye(2), atol=1e-5, rtol=0)
    assert (cone.basis @ r).abs().max() < 1e-4 * r.norm()
    assert (cone.basis - orthonormal(torch.cat([r[None], start]))[1:]).abs().max() > 1e-3  # it has moved


@pytest.fixture
def asked(monkeypatch):
    """A list of (ids of the harmful items, direction), filled by a search whose loss is a sum of coordinates."""
    seen = []

    def loss(m, harmful, harmless, tokens, v, layer, length):
        seen.append(("".join(item.id for item in harmful), v.detach()))
        return (v * slope(len(seen))).sum()

    monkeypatch.setattr(cones, "direction_loss", loss)
    return seen


def slope(step):
    return torch.randn(32, generator=torch.Generator().manual_seed(10 + step))


def search(basis, **settings):
    return find_cone(None, HARMFUL, HARMLESS, TOKENS, basis, **{**WHERE, "batch_size": 1, **settings})


def test_each_vector_takes_its_turn_and_then_a_direction_of_the_cone(asked):
    basis = orthonormal(random_directions(32, 2, seed=1))
    for seed in (0, 1):
        search(basis, steps=30, step_size=1e-7, seed=seed)
    weights = torch.stack([v for _, v in asked]) @ basis.T
    turns = torch.eye(2).repeat(20, 1)
    torch.testing.assert_close(weights.view(20, 3, 2)[:, :2].reshape(-1, 2), turns, atol=1e-4, rtol=0)
    inside = weights.view(20, 3, 2)[:, 2]
    torch.testing.assert_close(inside.norm(dim=-1), torch.ones(20), atol=1e-4, rtol=0)
    assert (inside > 0).all() and not torch.allclose(inside[:10], inside[10:], atol=0.01)
    assert [ids for ids, _ in asked[:30]] != [ids for ids, _ in asked[30:]]


def test_steps_are_those_of_adam_on_the_sphere(asked):
    start = random_directions(32, 1, seed=1)
    found, v = search(start, steps=6, step_size=0.1).basis, start.clone().requires_grad_()
    optimizer = torch.optim.Adam([v], lr=0.1)
    for step in range(1, 7):
        v.grad = torch.autograd.grad((v[0] / v[0].norm()) @ slope(step), v)[0]
        optimizer.step()
        v.data /= v.data.norm()
    torch.testing.assert_close(found, v.detach(), atol=1e-4, rtol=0)


def test_every_direction_of_a_constrained_search_is_orthogonal(asked, r):
    search(random_directions(32, 2, seed=1), steps=6, orthogonal_to=r)
    assert max(abs(v @ r) for _, v in asked) < 1e-4 * r.norm()


def test_rates_of_an_effect_are_of_refusals_and_exact_answers(model_of, monkeypatch, r):
    replies = {"a": Outcome(True, False), "b": Outcome(False, True), "c": Outcome(False, True)}
    replies |= {"d": Outcome(True, True), "e": Outcome(True, False)}
    monkeypatch.setattr(cones, "outcomes", lambda m, items, edit: [replies[item.id] for item in items])
    e = direction_effect(model_of("llama"), HARMFUL, HARMLESS, TOKENS, r, **WHERE)
    assert (e.refused.value, e.exact.value, e.harmless_exact.value) == (1 / 3, 2 / 3, 1 / 2)


def test_both_searches_begin_at_a_direction_of_their_own(model_of, monkeypatch, r):
    m, calls = model_of("llama"), []

    def found(_m, harmful, harmless, tokens, start, **settings):
        calls.append((start, settings))
        return cones.Cone(start, ())

    monkeypatch.setattr(cones, "find_cone", found)
    monkeypatch.setattr(cones, "prompt_set", lambda _m, name: HARMFUL)
    searched = search_directions(m, Candidate(-1, 2, 0.0, 0.0, 0.0), r, TOKENS)
    (start, free), (same, constrained) = calls
    where = {"layer": 2, "length": pytest.approx(r.norm().item())}
    assert searched.settings == where and torch.equal(start, same)
    assert free == {**where, "steps": cones.FREE_STEPS} and constrained.pop("orthogonal_to") is r
    assert constrained == where
    assert abs(searched.vectors["random direction"] @ start[0]) < 0.9


@pytest.mark.slow
def test_an_effect_is_that_of_ablation_and_addition(model_of, r):
    m, v = model_of("llama"), r / r.norm()
    e = direction_effect(m, HARMFUL, HARMLESS, TOKENS, r, **WHERE)
    prompts = [item.prompt for item in HARMLESS]
    assert e.induce == pytest.approx(
        refusal_metric(logits(m, prompts, edit=addition(6 * v, 1)), TOKENS).mean().item(), abs=1e-4
    )
    assert e.kl == pytest.approx(kl_divergence(logits(m, prompts), logits(m, prompts, edit=ablation(v))).mean().item())
    replies = generate(m, [i.prompt for i in HARMFUL], edit=ablation(v), max_new_tokens=32)
    assert e.exact == rate([i.answer in reply for i, reply in zip(HARMFUL, replies, strict=True)])
    assert (e.refused.n, e.exact.n, e.harmless_exact.n) == (3, 3, 2)


def test_what_happens_downstream_is_after_minus_before(model_of, prompts, r):
    m, a = model_of("llama"), random_directions(32, 1, seed=2)[0]
    w = project_out(r, a)
    after, before = (residual(m, prompts, positions=[-1], edit=edit)[:, :, 0] for edit in (ablation(a), None))
    got = downstream(m, prompts, a, w)
    torch.testing.assert_close(got, (after - before) @ (w / w.norm()), atol=1e-4, rtol=1e-4)
    assert got[:, 0].abs().max() < 1e-4 < got[:, 1:].abs().max()  # nothing at once, something later
    itself = downstream(m, prompts, r, r)
    torch.testing.assert_close(itself, -before @ (r / r.norm()), atol=1e-3, rtol=1e-4)


@pytest.mark.slow
def test_the_direction_of_the_last_token_has_the_best_bypass(monkeypatch):
    m, tried, scored = load("charter-chat"), [], []

    def noting(m, vectors, *prompts):
        tried.append(vectors.norm(dim=-1) > 0)
        scored.extend(replace(c, induce=c.bypass) for c in score_candidates(m, vectors, *prompts))
        return scored

    monkeypatch.setattr(cones, "score_candidates", noting)
    best, r, tokens = last_token_direction(m, count=6)
    assert tried[0].nonzero().tolist() == [[k, len(m.positions) - 1] for k in range(1, int(DEPTH * m.n_layers))]
    assert best.bypass == min(c.bypass for c in scored if tried[0][c.layer, c.position])
    assert best.position == -1 and 0 < best.layer < int(DEPTH * m.n_layers) and r.norm() > 0
    bad = [item.prompt for item in bundled("harmful_val")[:6]]
    bypass = refusal_metric(logits(m, bad, edit=ablation(r)), tokens).mean().item()
    assert bypass == pytest.approx(best.bypass, abs=1e-3) and bypass < refusal_metric(logits(m, bad), tokens).mean()


def test_short_items_have_one_line():
    items = bundled("harmful_train")
    kept = short(items)
    assert 0 < len(kept) < len(items) and all("\n" not in item.prompt for item in kept)
    assert short([Item("a", [{"role": "user", "content": "Name a river"}])]) == []
