"""Edited weights equal hooks exactly where theory says so, and planted faults are seen."""

import copy
from dataclasses import replace

import pytest
import torch

from refusallab.activations import residual
from refusallab.errors import RefusalLabError
from refusallab.interventions import ablation, unit
from refusallab.model import (
    attention_writes,
    blocks,
    embedding,
    final_norm,
    generate,
    load,
    logits,
    mlp_writes,
    norm_gain,
    positional_embedding,
    post_norm,
    unembedding,
    wrap,
)
from refusallab.orthogonalization import (
    distance_from_hooks,
    equivalence_class,
    orthogonalize,
    outputs_last,
    written_weights,
)

CLASSES = {
    "llama": "exact",
    "llama-tied": "untie",
    "llama-biased": "biases",
    "qwen2": "exact",
    "qwen3": "untie",
    "gemma2": "post-norm",
    "gemma3": "post-norm",
    "olmo": "exact",
    "olmo2": "post-norm",
    "glm4": "post-norm",
    "granite": "exact",
    "cohere": "untie",
    "mistral": "exact",
    "phi3": "exact",
    "gpt2": "untie+positions+biases",
}
EXACT = [name for name, kind in CLASSES.items() if kind != "post-norm"]
POST_NORM = [name for name, kind in CLASSES.items() if kind == "post-norm"]


def test_equivalence_class(m):
    assert m.equivalence == equivalence_class(m.hf) == CLASSES[m.name]
    assert CLASSES[m.name] in repr(m)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_weights_equal_hooks(model_of, name, prompts, r):
    m = model_of(name)
    edited = orthogonalize(m, r)
    effect = (logits(m, prompts) - logits(edited, prompts)).abs().max()
    assert effect > 0.05
    assert distance_from_hooks(m, edited, r, prompts) < 5e-5
    hooked = generate(m, prompts, edit=ablation(r), max_new_tokens=8)
    assert generate(edited, prompts, max_new_tokens=8) == hooked


def test_without_the_gain_the_matrix_is_edited_but_not_what_the_norm_makes_of_it(model_of, r):
    m = model_of("gemma2")
    textbook, repaired = orthogonalize(m, r, skip=["gain"]), orthogonalize(m, r)
    for edited, small in ((textbook, "matrix"), (repaired, "written")):
        along = {"matrix": outputs_last(attention_writes(blocks(edited.hf)[0])) @ unit(r)}
        along["written"] = written_weights(edited)["attention 0"] @ unit(r)
        assert [name for name, x in along.items() if x.abs().max() < 1e-4] == [small]


def test_a_copy_runs_where_its_model_runs(model_of, r):
    m = replace(model_of("llama"), remote="local")
    assert orthogonalize(m, r).remote == "local"


@pytest.mark.slow
@pytest.mark.parametrize("name", POST_NORM)
def test_behind_post_norms_r_is_never_written_but_weights_are_not_hooks(model_of, name, prompts, r):
    m = model_of(name)
    edited = orthogonalize(m, r)
    stream = residual(edited, prompts)
    assert (stream @ unit(r)).abs().max() < 1e-5 * stream.norm(dim=-1).max()
    assert distance_from_hooks(m, edited, r, prompts) > 0.01


@pytest.mark.slow
def test_the_original_is_untouched_and_its_hooks_still_work(m, prompts, r):
    before, weights = logits(m, prompts), copy.deepcopy(m.hf.state_dict())
    edited = orthogonalize(m, r)
    assert all(torch.equal(value, weights[key]) for key, value in m.hf.state_dict().items())
    assert torch.equal(logits(m, prompts), before)
    assert torch.equal(unembedding(edited.hf).weight, unembedding(m.hf).weight)
    assert edited.name == f"{m.name} (orthogonalized)" and edited.commit == m.commit


@pytest.mark.slow
def test_a_copy_that_shares_is_the_same_model_and_holds_less(m, prompts, r):
    weights = copy.deepcopy(m.hf.state_dict())
    whole, sharing = orthogonalize(m, r), orthogonalize(m, r, sharing=True)
    assert torch.equal(logits(sharing, prompts), logits(whole, prompts))
    assert all(torch.equal(value, weights[key]) for key, value in m.hf.state_dict().items())
    places = {p.data_ptr() for p in m.hf.parameters()}
    own = [name for name, p in sharing.hf.named_parameters() if p.data_ptr() not in places]
    assert 0 < len(own) < len(list(m.hf.parameters()))
    assert not any(p.data_ptr() in places for p in whole.hf.parameters())


@pytest.mark.slow
def test_twice_is_once(m, prompts, r):
    once = orthogonalize(m, r)
    again = orthogonalize(once, 2 * r)
    torch.testing.assert_close(logits(again, prompts), logits(once, prompts), atol=2e-5, rtol=0)


def test_an_untied_copy_survives_saving(model_of, prompts, r, tmp_path):
    edited = orthogonalize(model_of("llama-tied"), r)
    edited.hf.save_pretrained(tmp_path)
    edited.tokenizer.save_pretrained(tmp_path)
    assert not edited.hf.config.tie_word_embeddings
    again = load(str(tmp_path))
    assert again.equivalence == "exact"
    torch.testing.assert_close(logits(again, prompts), logits(edited, prompts), atol=1e-5, rtol=0)


def test_the_gain_of_a_norm_in_half_precision_is_not_rounded(model_of):
    half = copy.deepcopy(final_norm(model_of("gemma2").hf)).to(torch.bfloat16)
    torch.nn.init.normal_(half.weight)
    torch.testing.assert_close(norm_gain(half, half.weight), 1 + half.weight.float(), rtol=1e-5, atol=1e-5)


def test_half_precision_is_edited_in_place_of_type(make, prompts, r):
    m = wrap(make.hf("llama").to(torch.bfloat16), make.tokenizer())
    edited = orthogonalize(m, r)
    assert {p.dtype for p in edited.hf.parameters()} == {torch.bfloat16}
    assert (embedding(edited.hf).weight.float() @ unit(r)).abs().max() < 0.1


# Planted faults. Each one undoes a part of the edit, as lazy code would leave it, and must be seen.


def restore(name, m, edited):
    """Give `edited` back the part of the original weights that a faulty edit would not have changed."""
    if name == "embedding not edited":
        embedding(edited.hf).weight.data = embedding(m.hf).weight.data.clone()
    if name == "head not untied":
        unembedding(edited.hf).weight = embedding(edited.hf).weight
    if name == "positions not edited":
        positional_embedding(edited.hf).weight.data = positional_embedding(m.hf).weight.data.clone()
    for ours, theirs in zip(blocks(edited.hf), blocks(m.hf), strict=True):
        for writes in (attention_writes, mlp_writes):
            if name == "biases not edited":
                writes(ours).bias.data = writes(theirs).bias.data.clone()
            if name == f"{writes.__name__} not edited":
                writes(ours).weight.data = writes(theirs).weight.data.clone()


FAULTS = [
    *[(name, "embedding not edited") for name in EXACT],
    *[(name, "attention_writes not edited") for name in EXACT],
    *[(name, "mlp_writes not edited") for name in EXACT],
    *[(name, "head not untied") for name, kind in CLASSES.items() if "untie" in kind],
    *[(name, "biases not edited") for name, kind in CLASSES.items() if "biases" in kind],
    *[(name, "positions not edited") for name, kind in CLASSES.items() if "positions" in kind],
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fault"), FAULTS)
def test_planted_fault_is_seen(model_of, name, fault, prompts, r):
    m = model_of(name)
    edited = orthogonalize(m, r)
    restore(fault, m, edited)
    assert distance_from_hooks(m, edited, r, prompts) > 0.005


@pytest.mark.slow
@pytest.mark.parametrize("name", POST_NORM)
def test_the_plain_edit_leaks_r_through_post_norms(model_of, name, prompts, r):
    m = model_of(name)
    plain = orthogonalize(m, r)
    u = unit(r)
    for ours, theirs in zip(blocks(plain.hf), blocks(m.hf), strict=True):
        for writes in (attention_writes, mlp_writes):
            w = writes(theirs).weight.data
            writes(ours).weight.data = w - torch.outer(u, u @ w)
    stream = residual(plain, prompts, layers=[2])
    assert (stream @ u).abs().max() > 1e-2
    assert distance_from_hooks(m, plain, r, prompts) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", POST_NORM)
def test_unit_norm_weights_would_hide_the_leak(make, name, prompts, r):
    """Why the tests jitter the norms: with equal gains r passes a post-norm unrotated."""
    hf = make.hf(name)
    for block in blocks(hf):
        for norm in post_norm(block):
            norm.weight.data.fill_(0.0 if "gemma" in name else 1.0)
    m = wrap(hf, make.tokenizer())
    edited = orthogonalize(m, r)
    u = unit(r)
    for ours, theirs in zip(blocks(edited.hf), blocks(m.hf), strict=True):
        for writes in (attention_writes, mlp_writes):
            w = writes(theirs).weight.data
            torch.testing.assert_close(writes(ours).weight.data, w - torch.outer(u, u @ w), atol=1e-5, rtol=0)
    assert distance_from_hooks(m, edited, r, prompts) < 1e-4


def test_errors(model_of, r):
    m = model_of("llama")
    with pytest.raises(RefusalLabError, match=r"\[7\] but llama needs \[32\]"):
        orthogonalize(m, torch.ones(7))
    with pytest.raises(RefusalLabError, match=r"\[2, 32\] but llama needs \[32\]"):
        orthogonalize(m, torch.ones(2, 32))
    with pytest.raises(RefusalLabError, match="zero"):
        orthogonalize(m, torch.zeros(32))
    with pytest.raises(RefusalLabError, match="NaN"):
        orthogonalize(m, r * float("nan"))
