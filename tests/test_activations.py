"""The residual stream equals what plain PyTorch hooks see."""

import pytest
import torch

from refusallab.activations import mean_residual, residual
from refusallab.errors import RefusalLabError
from refusallab.interventions import ablation, addition, unit
from refusallab.model import encode


@torch.no_grad()
def hooked_residual(hooks, hf, batch, **sites):
    """Block inputs by hooks: [n, L, seq, width]."""
    record = []
    hooks.logits(hf, batch, record=record, **sites)
    return torch.stack(record, 1)


def test_equals_hooks(m, hooks, prompts):
    expected = hooked_residual(hooks, m.hf, encode(m, prompts))
    got = residual(m, prompts)
    assert got.shape == (len(prompts), 3, len(m.positions), 32)
    assert torch.equal(got, expected[:, :, list(m.positions)])


@pytest.mark.slow
def test_left_padding_does_not_matter(m, prompts):
    together = residual(m, prompts)
    alone = torch.cat([residual(m, [prompt]) for prompt in prompts])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=2e-5)


def test_small_batches_keep_the_order(model_of, prompts):
    m = model_of("gpt2")
    torch.testing.assert_close(residual(m, prompts, batch_size=2), residual(m, prompts), atol=2e-5, rtol=2e-5)


def test_chosen_layers_and_positions(model_of, prompts):
    m = model_of("llama")
    everything = residual(m, prompts)
    assert torch.equal(residual(m, prompts, layers=[2, 0], positions=[-1, -4]), everything[:, [2, 0]][:, :, [-1, -4]])


@pytest.mark.slow
def test_with_an_edit_the_stream_is_read_after_it(m, hooks, prompts, r):
    batch, at = encode(m, prompts), list(m.positions)
    ablated = residual(m, prompts, edit=ablation(r))
    expected = hooked_residual(hooks, m.hf, batch, **hooks.ablation(m.hf, r))[:, :, at]
    torch.testing.assert_close(ablated, expected, atol=2e-5, rtol=2e-5)
    assert (ablated @ unit(r)).abs().max() < 1e-5 * ablated.norm(dim=-1).max()

    plain, added = residual(m, prompts), residual(m, prompts, edit=addition(r, 1))
    assert torch.equal(added[:, 0], plain[:, 0])
    torch.testing.assert_close(added[:, 1], plain[:, 1] + r, atol=2e-5, rtol=2e-5)
    assert not torch.equal(added[:, 2], plain[:, 2])


def test_layer_zero_is_the_same_for_every_prompt_without_learned_positions(model_of, prompts):
    first = residual(model_of("llama"), prompts)[:, 0]
    assert torch.equal(first, first[:1].expand_as(first))


@pytest.mark.slow
def test_mean_is_in_float64(m, prompts):
    mean = mean_residual(m, prompts, batch_size=2)
    assert mean.dtype == torch.float64
    torch.testing.assert_close(mean, residual(m, prompts, batch_size=2).double().mean(0), atol=1e-12, rtol=0)


def test_mean_of_chosen_sites_with_an_edit(model_of, prompts, r):
    m = model_of("llama")
    mean = mean_residual(m, prompts, layers=[2], positions=[-1], edit=addition(r, 1), system="Be kind.")
    several = residual(m, prompts, layers=[2], positions=[-1], edit=addition(r, 1), system="Be kind.")
    torch.testing.assert_close(mean, several.double().mean(0), atol=1e-12, rtol=0)


@pytest.mark.parametrize("collect", [residual, mean_residual])
def test_errors(model_of, prompts, collect):
    m = model_of("llama")
    with pytest.raises(RefusalLabError, match="list of prompts is empty"):
        collect(m, [])
    with pytest.raises(RefusalLabError, match="not all in 0 to 2"):
        collect(m, prompts, layers=[3])
    with pytest.raises(RefusalLabError, match="not all in 0 to 2"):
        collect(m, prompts, layers=[-1])
    with pytest.raises(RefusalLabError, match="must be negative"):
        collect(m, prompts, positions=[0])
    with pytest.raises(RefusalLabError, match="has only"):
        collect(m, prompts, positions=[-200])
