"""Direct attribution: the parts add up to the whole on every architecture, heads are heads, regions are regions."""

import pytest
import torch

from refusallab import attribution as attributed
from refusallab.activations import residual, stream
from refusallab.attribution import attention_from_last, attribute, cosine_trace, mass, regions
from refusallab.errors import RefusalLabError
from refusallab.model import attention_writes, blocks, encode, post_norm
from refusallab.orthogonalization import outputs_last

SUFFIX = " copper kettle step"


def has_post_norm(m):
    return post_norm(blocks(m.hf)[0])[0] is not None


def test_the_parts_add_up_to_the_projection_at_every_layer(m, prompts, r):
    if has_post_norm(m):
        with pytest.raises(RefusalLabError, match="no share of their own"):
            attribute(m, prompts, r)
        return
    parts, u = attribute(m, prompts, r, batch_size=2), r / r.norm()
    for row, prompt in enumerate(prompts):
        whole = stream(m, prompt)[:, -1] @ u  # [layers + 1]
        summed = torch.stack([parts.projection(layer)[row] for layer in range(m.n_layers + 1)])
        torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_a_head_writes_what_is_missing_without_it(model_of, prompts, r, architecture):
    m, layer, head = model_of(architecture), 1, 2
    write = attention_writes(blocks(m.hf)[layer])
    size, u = len(outputs_last(write)) // m.hf.config.num_attention_heads, r / r.norm()
    outputs = []

    def silence(_module, args):
        z = args[0].clone()
        z[..., head * size : (head + 1) * size] = 0
        return (z,)

    def run():
        handle = write.register_forward_hook(lambda _m, _a, out: outputs.append(out[:, -1] @ u))
        with torch.no_grad():
            m.hf(**encode(m, prompts[:1]))
        handle.remove()

    run()
    handle = write.register_forward_pre_hook(silence)
    run()
    handle.remove()
    expected = attribute(m, prompts[:1], r).heads[:, layer, head]
    torch.testing.assert_close(outputs[0] - outputs[1], expected, rtol=1e-4, atol=1e-4)


def test_the_length_of_the_direction_does_not_matter(model_of, prompts, r):
    m = model_of("llama")
    torch.testing.assert_close(attribute(m, prompts, 5 * r).heads, attribute(m, prompts, r).heads)
    torch.testing.assert_close(cosine_trace(m, prompts, 5 * r), cosine_trace(m, prompts, r))


def test_the_trace_is_the_cosine_at_every_block_input(m, prompts, r):
    x = residual(m, prompts, positions=[-1])[:, :, 0]
    torch.testing.assert_close(cosine_trace(m, prompts, r), (x @ r) / (x.norm(dim=-1) * r.norm()), rtol=1e-4, atol=1e-5)


def test_attention_is_that_of_transformers_and_the_model_stays_as_it_was(m, prompts):
    before = m.hf.config._attn_implementation
    weights = attention_from_last(m, prompts)
    assert m.hf.config._attn_implementation == before
    m.hf.set_attn_implementation("eager")
    batch = encode(m, prompts)
    places = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = m.hf(**batch, position_ids=places, output_attentions=True).attentions
    m.hf.set_attn_implementation(before)
    torch.testing.assert_close(weights, torch.stack([a[:, :, -1] for a in expected], 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_regions_divide_every_token_among_them(m, prompts):
    sent = [prompts[0], prompts[1] + SUFFIX, prompts[2]]
    masks = regions(m, sent, ["", SUFFIX, ""])
    batch = encode(m, sent)
    assert torch.equal(sum(mask.int() for mask in masks.values()), batch["attention_mask"])
    text = {name: m.tokenizer.decode(batch["input_ids"][1][mask[1]]) for name, mask in masks.items()}
    assert text["suffix"] == SUFFIX and text["instruction"] == prompts[1]
    assert "user" in text["start"] and text["end"].endswith("assistant\n")
    assert not masks["suffix"][[0, 2]].any()


def test_earlier_turns_belong_to_the_start_though_they_say_the_same(model_of):
    m = model_of("llama")
    said = (("user", "Name a river in the north"), ("assistant", "The river"), ("user", "Name a river"))
    conversation = [{"role": role, "content": content} for role, content in said]
    ids = encode(m, [conversation])["input_ids"][0]
    text = {name: m.tokenizer.decode(ids[mask[0]]) for name, mask in regions(m, [conversation], [""]).items()}
    assert text["instruction"] == "Name a river" and text["suffix"] == ""
    assert "in the north" in text["start"] and "river" not in text["end"]


def test_an_error_leaves_the_attention_as_it_was(model_of, prompts, monkeypatch):
    m = model_of("llama")
    before = m.hf.config._attn_implementation
    monkeypatch.setattr(attributed, "attention", None)
    with pytest.raises(Exception):  # noqa: B017 - whatever nnsight makes of it
        attention_from_last(m, prompts)
    after = m.hf.config._attn_implementation
    m.hf.set_attn_implementation(before)
    assert after == before != "eager"


def test_the_masses_of_all_regions_add_up_to_one(model_of, prompts):
    m = model_of("llama")
    sent = [prompts[1] + SUFFIX, prompts[2] + SUFFIX]
    weights = attention_from_last(m, sent)
    masses = [mass(weights, mask) for mask in regions(m, sent, [SUFFIX] * 2).values()]
    assert masses[0].shape == (2, m.n_layers, m.hf.config.num_attention_heads)
    torch.testing.assert_close(sum(masses), torch.ones_like(masses[0]))
    one = mass(weights, torch.arange(weights.shape[-1]).expand(2, -1) == weights.shape[-1] - 1)
    torch.testing.assert_close(one, weights[..., -1])


def test_a_prompt_without_its_suffix_is_an_error(model_of, prompts):
    with pytest.raises(RefusalLabError, match="does not end in its suffix"):
        regions(model_of("llama"), prompts[:1], [SUFFIX])
