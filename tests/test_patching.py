"""Activation patching against plain hooks on every architecture; what is moved, where, and what is refused."""

import pytest
import torch

from refusallab.errors import RefusalLabError
from refusallab.measure import refusal_metric
from refusallab.model import attention, attention_writes, blocks, encode, generate, logits, mlp
from refusallab.patching import (
    PARTS,
    patch,
    patched_metrics,
    read_activations,
    recovered,
    recovery,
    swap_component,
    swap_head,
)

SOURCE, INTO = ["Name a river", "Please explain the recipe"], ["List three tools", "How do I bake bread?"]


def module(hf, part, layer):
    block = blocks(hf)[layer]
    chosen = {"stream": block, "heads": attention_writes(block), "attention": attention(block), "MLP": mlp(block)}
    return chosen[part]


@torch.no_grad()
def by_hooks(m, part, layer, positions, prompts, source):
    """The logits of the prompts with the activations of the source moved by hooks of PyTorch; and what was moved."""
    place, kept = module(m.hf, part, layer), []
    before = part in ("stream", "heads")

    def read(_module, args, *output):
        value = args[0] if before else output[0]
        kept.append((value[0] if isinstance(value, tuple) else value).clone())

    def write(_module, args, *output):
        value = args[0] if before else output[0]
        x = (value[0] if isinstance(value, tuple) else value).clone()
        x[:, positions] = kept[0][:, positions]
        if before:
            return (x, *args[1:])
        return (x, *value[1:]) if isinstance(value, tuple) else x

    def run(texts, hook):
        batch = encode(m, texts)
        ids = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        handle = place.register_forward_pre_hook(hook) if before else place.register_forward_hook(hook)
        try:
            return m.hf(**batch, position_ids=ids).logits[:, -1].float()
        finally:
            handle.remove()

    run(source, read)
    return run(prompts, write), kept[0]


@pytest.mark.parametrize("part", PARTS)
def test_a_patch_is_what_hooks_do(m, part):
    layer, positions = 1, [-3, -1]
    expected, moved = by_hooks(m, part, layer, positions, INTO, SOURCE)
    run = read_activations(m, SOURCE)
    torch.testing.assert_close(run.parts[part][:, layer, positions], moved[:, positions], rtol=1e-4, atol=1e-4)
    found = logits(m, INTO, edit=patch(run, part, layer, positions))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (found - logits(m, INTO)).abs().max() > 0.01


def test_a_run_patched_into_itself_changes_nothing(m):
    run = read_activations(m, INTO)
    for part in PARTS:
        found = logits(m, INTO, edit=patch(run, part, 2, [-2, -1]))
        torch.testing.assert_close(found, logits(m, INTO), rtol=1e-4, atol=1e-4)


def test_replies_are_patched_at_the_prompt_alone(model_of):
    m, seen = model_of("llama"), []

    def change(x, source):
        seen.append(tuple(x.shape))
        return source

    generate(m, INTO, edit=patch(read_activations(m, SOURCE), "stream", 1, [-1], change), max_new_tokens=4)
    assert seen == [(2, 1, m.width)]


def test_a_component_is_swapped_and_the_rest_stays(r):
    x, source = torch.randn(3, 2, 32), torch.randn(3, 2, 32)
    u = r / r.norm()
    mixed = swap_component(x, source, r)
    torch.testing.assert_close(mixed @ u, source @ u)
    torch.testing.assert_close(mixed - (mixed @ u)[..., None] * u, x - (x @ u)[..., None] * u)
    torch.testing.assert_close(swap_component(x, source, 5 * r), mixed)


def test_a_head_is_swapped_and_the_others_stay():
    x, source = torch.zeros(1, 1, 8), torch.ones(1, 1, 8)
    assert swap_head(x, source, 1, 4).tolist() == [[[0, 0, 1, 1, 0, 0, 0, 0]]]
    assert not x.any()


def test_metrics_have_a_row_for_each_layer_and_token(model_of):
    m, run = model_of("llama"), read_activations(model_of("llama"), SOURCE)
    found = patched_metrics(m, INTO, run, [3], layers=[0, 2], positions=[-2, -1])
    assert found.shape == (2, 2, 2)
    alone = refusal_metric(logits(m, INTO, edit=patch(run, "stream", 2, [-1])), [3])
    torch.testing.assert_close(found[1, 1], alone.float())


def test_the_share_is_of_means():
    source, untouched = torch.tensor([4.0, 0.0]), torch.tensor([-4.0, 0.1])
    assert recovered(source, untouched, untouched).item() == pytest.approx(0)
    assert recovered(source, untouched, source).item() == pytest.approx(1)
    assert recovered(source, untouched, torch.stack([source, untouched])).tolist() == pytest.approx([1, 0])
    half = (source + untouched) / 2
    assert recovered(source, untouched, half).item() == pytest.approx(0.5)
    assert recovered(untouched, source, half).item() == pytest.approx(0.5)


def test_the_interval_holds_the_share_and_narrows():
    g = torch.Generator().manual_seed(0)
    source, untouched = 4 + torch.randn(40, generator=g), -4 + torch.randn(40, generator=g)
    patched = untouched + 6 + torch.randn(40, generator=g)
    few, many = recovery(source[:8], untouched[:8], patched[:8]), recovery(source, untouched, patched)
    assert many.low < many.value < many.high and many.n == 40
    assert many.high - many.low < few.high - few.low
    assert many == recovery(source, untouched, patched)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"part": "neurons"}, "There is no part 'neurons'"),
        ({"layer": 3}, "layers 0 to 2"),
        ({"positions": []}, "count from the end"),
        ({"positions": [0]}, "count from the end"),
        ({"positions": [-99]}, "count from the end"),
        ({"positions": [-12]}, "must lie in -11 to -1"),  # padding of the shorter prompt
    ],
)
def test_what_cannot_be_patched_is_said(model_of, wrong, says):
    settings = {"part": "stream", "layer": 1, "positions": [-1], **wrong}
    with pytest.raises(RefusalLabError, match=says):
        patch(read_activations(model_of("llama"), SOURCE), **settings)


def test_other_numbers_of_prompts_are_refused(model_of):
    m = model_of("llama")
    edit = patch(read_activations(m, SOURCE), "stream", 1, [-1])
    with pytest.raises(RefusalLabError, match="for 2 prompts in one batch, but there are 3"):
        logits(m, [*INTO, "List"], edit=edit)


@pytest.mark.parametrize("run_prompts", [logits, generate])
def test_padding_of_a_shorter_prompt_is_not_patched(model_of, run_prompts):
    m = model_of("llama")
    run, into = read_activations(m, ["Please explain the recipe"] * 2), ["Please explain the recipe", "List"]
    short = int(encode(m, into)["attention_mask"].sum(1).min())
    run_prompts(m, into, edit=patch(run, "stream", 1, [-short]))
    says = f"{short + 1} tokens before the end, but the shortest prompt has {short}"
    with pytest.raises(RefusalLabError, match=says):
        run_prompts(m, into, edit=patch(run, "stream", 1, [-1, -short - 1]))
    with pytest.raises(RefusalLabError, match=says):
        patched_metrics(m, into, run, [3], layers=[1], positions=[-short - 1])


def test_the_interval_is_over_the_same_prompts():
    with pytest.raises(RefusalLabError, match="3, 3 and 2 values: give one of each"):
        recovery(torch.ones(3), torch.zeros(3), torch.ones(2))


def test_no_interval_where_draws_have_nothing_to_recover():
    source, untouched = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 0.0, 0.0])
    with pytest.raises(RefusalLabError, match="draws of the prompts.*more prompts"):
        recovery(source, untouched, source)


def test_runs_that_agree_have_nothing_to_recover():
    x = torch.ones(3)
    with pytest.raises(RefusalLabError, match="nothing to recover"):
        recovered(x, x, x)
