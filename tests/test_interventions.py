"""Each edit equals plain PyTorch hooks, in one forward pass and at every generated token."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refusallab.activations import residual
from refusallab.errors import RefusalLabError
from refusallab.interventions import ablation, addition, affine, project_out, unit
from refusallab.measure import cross_entropy
from refusallab.model import blocks, encode, generate, logits

KINDS = ("ablation", "addition", "affine")
REFERENCE = torch.linspace(-1, 1, 32)


def edit_and_sites(kind, hooks, hf, r):
    """The library's edit and the same thing as hooks, written out in plain form."""
    u = r / r.norm()
    if kind == "ablation":
        return ablation(r), hooks.ablation(hf, r)
    if kind == "addition":
        return addition(r, 1, 0.7), {"inputs": {1: lambda x: x + 0.7 * r}}
    if kind == "affine":
        along = lambda x: (x @ u)[..., None] * u  # noqa: E731
        return affine(r, 1, REFERENCE, 0.4), {"inputs": {1: lambda x: x - along(x - REFERENCE) + 0.4 * r}}


@pytest.mark.parametrize("kind", KINDS)
def test_one_forward_equals_hooks(m, kind, hooks, prompts, r):
    edit, sites = edit_and_sites(kind, hooks, m.hf, r)
    plain, edited = logits(m, prompts), logits(m, prompts, edit=edit)
    expected = hooks.logits(m.hf, encode(m, prompts), **sites)
    tolerance = 0 if kind in ("ablation", "addition") else 1e-5  # the others are written in another way
    torch.testing.assert_close(edited, expected, atol=tolerance, rtol=0)
    assert (edited - plain).abs().max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_every_generated_token_equals_hooks(m, kind, hooks, prompts, r, ids_not_text):
    ids_not_text(m)
    edit, sites = edit_and_sites(kind, hooks, m.hf, r)
    expected = hooks.greedy(m.hf, encode(m, prompts), 8, m.stop_ids, **sites)
    assert generate(m, prompts, edit=edit, max_new_tokens=8) == expected


def test_early_end_of_turn_with_an_edit(m, hooks, prompts, r, ids_not_text):
    ids_not_text(m)
    free = hooks.greedy(m.hf, encode(m, prompts), 8, **hooks.ablation(m.hf, r))
    for stop in ({free[0][2]}, {row[1] for row in free}):  # one row ends early, then all rows end early
        early = replace(m, stop_ids=tuple(stop))
        expected = [row[: next((k for k, t in enumerate(row) if t in stop), 8)] for row in free]
        assert generate(early, prompts, edit=ablation(r), max_new_tokens=8) == expected


def test_an_edit_of_the_prompt_alone_is_told_apart(model_of, prompts, r, ids_not_text):
    """The planted fault: an edit that acts in the first forward pass only must not pass as the real one."""
    m = model_of("llama")
    ids_not_text(m)
    real, calls = addition(3 * r, 1), []

    def first_pass_only(nn):
        calls.append(1)
        if len(calls) == 1:
            real(nn)
        else:
            blocks(nn)[1].input = blocks(nn)[1].input

    whole = generate(m, prompts, edit=real, max_new_tokens=8)
    assert generate(m, prompts, edit=first_pass_only, max_new_tokens=8) != whole
    assert len(calls) == 8


def test_one_direction_per_row(model_of, hooks, prompts):
    m = model_of("llama")
    rows = torch.randn(len(prompts), 32, generator=torch.Generator().manual_seed(2))
    batch = encode(m, prompts)
    ablated = logits(m, prompts, edit=ablation(rows))
    added = logits(m, prompts, edit=addition(rows, 1))
    expected = hooks.logits(m.hf, batch, **hooks.ablation(m.hf, rows))
    torch.testing.assert_close(ablated, expected, atol=1e-5, rtol=0)
    for i, prompt in enumerate(prompts):
        for together, edit in ((ablated, ablation(rows[i])), (added, addition(rows[i], 1))):
            torch.testing.assert_close(together[[i]], logits(m, [prompt], edit=edit), atol=1e-4, rtol=0)


def test_row_directions_keep_their_rows_in_generation(model_of, prompts, ids_not_text):
    m = model_of("llama")
    ids_not_text(m)
    rows = 3 * torch.randn(len(prompts), 32, generator=torch.Generator().manual_seed(2))
    together = generate(m, prompts, edit=addition(rows, 1), max_new_tokens=6)
    alone = [generate(m, [p], edit=addition(rows[i], 1), max_new_tokens=6)[0] for i, p in enumerate(prompts)]
    assert together == alone


@pytest.mark.parametrize("run", [logits, generate, residual, cross_entropy])
def test_row_directions_need_one_batch_of_as_many_prompts(model_of, prompts, run):
    rows = torch.ones(2, 32)
    for edit in (ablation(rows), addition(rows, 1), affine(rows, 1, REFERENCE, 1)):
        with pytest.raises(RefusalLabError, match="for 2 prompts in one batch, but there are 4 in batches of 2"):
            run(model_of("llama"), prompts[:4], edit=edit, batch_size=2)


def test_a_reference_is_one_for_all_prompts():
    with pytest.raises(RefusalLabError, match="A reference has shape"):
        affine(torch.ones(32), 1, torch.ones(2, 32), 0.4)


def test_a_zero_step_changes_nothing(model_of, prompts):
    m = model_of("llama")
    assert torch.equal(logits(m, prompts, edit=addition(torch.zeros(32), 0)), logits(m, prompts))


vectors = st.lists(st.floats(-100, 100, width=32), min_size=8, max_size=8).map(torch.tensor)
directions = vectors.filter(lambda v: v.norm() > 1e-3)


def at_one_site(edit, x):
    """Run an edit of block 0 on x [batch, seq, width], without a model."""
    nn, block = torch.nn.Module(), torch.nn.Module()
    nn.model = torch.nn.Module()
    nn.model.layers = torch.nn.ModuleList([block])
    block.input = x
    edit(nn)
    return block.input


@settings(max_examples=60, deadline=None)
@given(vectors, directions)
def test_projection_is_idempotent_and_orthogonal(x, r):
    once = project_out(x, r)
    size = 1 + x.norm()
    assert (once @ unit(r)).abs() <= 1e-5 * size
    assert (project_out(once, r) - once).norm() <= 1e-5 * size
    assert (project_out(x, -5 * r) - once).norm() <= 1e-5 * size


@settings(max_examples=60, deadline=None)
@given(vectors, directions)
def test_affine_without_reference_and_step_is_ablation_at_a_site(x, r):
    x = x[None, None]
    got = at_one_site(affine(r, 0, torch.zeros(8), 0.0), x)
    assert (got - project_out(x, r)).norm() <= 1e-5 * (1 + x.norm())


@settings(max_examples=60, deadline=None)
@given(vectors, directions, vectors, st.floats(-3, 3))
def test_affine_sets_the_component_of_the_reference_plus_alpha(x, r, reference, alpha):
    got = at_one_site(affine(r, 0, reference, alpha), x[None, None])[0, 0]
    wanted = reference @ unit(r) + alpha * r.norm()
    assert (got @ unit(r) - wanted).abs() <= 1e-4 * (1 + x.norm() + reference.norm() + abs(alpha) * r.norm())
    assert (project_out(got, r) - project_out(x, r)).norm() <= 1e-4 * (1 + got.norm() + x.norm())


@pytest.mark.parametrize(
    ("r", "message"),
    [
        (torch.zeros(32), "zero"),
        (torch.full((32,), float("nan")), "NaN"),
        (torch.full((32,), float("inf")), "infinite"),
        (torch.ones(2, 3, 32), r"\[width\] or \[batch, width\]"),
        (torch.tensor(1.0), r"\[width\] or \[batch, width\]"),
        (torch.stack([torch.ones(32), torch.zeros(32)]), "zero"),
    ],
)
def test_bad_directions(r, message):
    with pytest.raises(RefusalLabError, match=message):
        unit(r)
    with pytest.raises(RefusalLabError, match=message):
        ablation(r)
    with pytest.raises(RefusalLabError, match=message):
        affine(r, 0, torch.ones(32), 1.0)
    if message != "zero":
        with pytest.raises(RefusalLabError, match=message):
            addition(r, 0)
        with pytest.raises(RefusalLabError, match=message):
            affine(torch.ones(32), 0, r, 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_width_names_both_widths(model_of, hooks, prompts, kind):
    m = model_of("llama")
    edits = {
        "ablation": ablation(torch.ones(7)),
        "addition": addition(torch.ones(7), 1),
        "affine": affine(torch.ones(7), 1, torch.ones(7), 1.0),
    }
    for run in (logits, generate):
        with pytest.raises(RefusalLabError, match="width 7 but the residual stream 32"):
            run(m, prompts, edit=edits[kind])
    assert logits(m, prompts).isfinite().all()  # the model works on after an error
    with pytest.raises(RefusalLabError, match="width 7"):
        project_out(torch.ones(2, 3, 32), torch.ones(7))


@pytest.mark.parametrize("layer", [-1, 3])
def test_no_such_layer(model_of, prompts, r, layer):
    with pytest.raises(RefusalLabError, match=f"no layer {layer}: the model has layers 0 to 2"):
        logits(model_of("llama"), prompts, edit=addition(r, layer))
