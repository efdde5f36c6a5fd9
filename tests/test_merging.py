"""LoRA adapters: what peft has written is merged as peft merges it, and anything else is refused in one line."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from refusallab.errors import RefusalLabError
from refusallab.model import fetch_model, is_on_disk, load, render
from refusallab.model.files import read_config
from refusallab.model.merging import find_adapter

IA3 = '{"peft_type": "IA3", "base_model_name_or_path": "base"}'
MAPS = {"llama": ["q_proj", "down_proj"], "llama-tied": ["o_proj", "gate_proj"], "gpt2": ["c_attn", "c_proj"]}


@pytest.fixture
def adapted(make, tmp_path):
    """A function: architecture and settings of LoraConfig -> folder of an adapter, its base, both merged by peft."""

    def build(architecture="llama", **settings):
        base, folder = tmp_path / "base", tmp_path / "adapter"
        plain = make.hf(architecture)
        plain.save_pretrained(base)
        make.tokenizer().save_pretrained(base)
        config = {"r": 4, "lora_alpha": 12, "target_modules": MAPS[architecture], "init_lora_weights": False} | settings
        torch.manual_seed(0)
        whole = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(task_type="CAUSAL_LM", **config))
        whole.save_pretrained(folder)
        change(folder, base_model_name_or_path=str(base))
        return folder, plain, whole.merge_and_unload()

    return build


def change(folder, **settings):
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("llama", {}), ("llama-tied", {"use_rslora": True}), ("gpt2", {"fan_in_fan_out": True})],
)
def test_a_merged_adapter_is_what_peft_makes_of_it(adapted, architecture, settings):
    folder, plain, merged = adapted(architecture, **settings)
    weights = load(str(folder)).hf.state_dict()
    expected, before = merged.state_dict(), plain.state_dict()
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert torch.allclose(tensor, expected[name], atol=1e-5), name
    changed = {name for name, tensor in weights.items() if not torch.allclose(tensor, before[name], atol=1e-4)}
    assert changed and all(any(part in name for part in MAPS[architecture]) for name in changed)


def test_name_commit_and_template_are_those_of_the_adapter(adapted, make):
    folder, *_ = adapted()
    plain = load(str(folder.with_name("base")))
    assert render(load(str(folder)), "Hello") == render(plain, "Hello")
    turn = "{% for m in messages %}<|start|>{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}<|start|>assistant: "
    make.tokenizer(turn).save_pretrained(folder)
    m = load(str(folder))
    assert m.name == str(folder) and m.commit.startswith(f"{plain.commit}, adapter sha256:")
    assert render(m, "Hello") == "<|start|>user: Hello<|end|><|start|>assistant: "


def test_an_adapter_can_be_loaded_when_its_base_can(adapted):
    folder, *_ = adapted()
    assert is_on_disk(str(folder))
    assert fetch_model(str(folder)).endswith(f"{folder} is an adapter of it.")
    change(folder, base_model_name_or_path="nobody/nothing")
    assert not is_on_disk(str(folder))
    with pytest.raises(RefusalLabError, match="nobody/nothing is not on this computer"):
        load(str(folder))
    with pytest.raises(RefusalLabError, match="nobody/nothing is not on this computer"):
        fetch_model(str(folder))


def test_only_an_adapter_alone_is_one(adapted):
    folder, *_ = adapted()
    assert find_adapter(str(folder)) and find_adapter(str(folder.with_name("base"))) is None
    assert find_adapter("charter-chat") is None and find_adapter("") is None


def test_an_adapter_of_the_hub_has_to_be_downloaded(adapted):
    folder, *_ = adapted()
    with pytest.raises(
        RefusalLabError, match="somebody/adapter is an adapter of another model. Download it .hf download"
    ):
        read_config(folder, "somebody/adapter")


def cut(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def edit(folder, act):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    act(tensors, next(iter(tensors)))
    save_file(tensors, path)


def pickled(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: change(f, use_dora=True), "more than a plain LoRA adapter (use_dora): merge it with"),
        (lambda f: change(f, bias="all", modules_to_save=["lm_head"]), "(modules_to_save, bias): merge it with"),
        (lambda f: change(f, init_lora_weights="pissa_niter_16"), "more than a plain LoRA adapter (init_lora_weights)"),
        (lambda f: change(f, init_lora_weights="olora"), "more than a plain LoRA adapter (init_lora_weights)"),
        (lambda f: change(f, alora_invocation_tokens=[3, 4]), "(alora_invocation_tokens): merge it with"),
        (lambda f: change(f, r=0), "adapter_config.json is damaged (r 0, lora_alpha 12"),
        (lambda f: change(f, r="8"), "adapter_config.json is damaged (r '8', lora_alpha 12"),
        (lambda f: change(f, lora_alpha=None), "adapter_config.json is damaged (r 4, lora_alpha None"),
        (lambda f: (f / "adapter_config.json").write_text(IA3), "more than a plain LoRA adapter (IA3)"),
        (lambda f: change(f, base_model_name_or_path=None), "does not say which model it changes: name it in"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json is damaged"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter_config.json is damaged ('peft_type')"),
        (pickled, "has no adapter_model.safetensors (pickled weights are not read)"),
        (cut, "adapter_model.safetensors is cut off or damaged"),
        (lambda f: edit(f, lambda t, key: t.update(other=t[key].clone())), "more than a plain LoRA adapter (other)"),
        (lambda f: edit(f, lambda t, key: t.clear()), "more than a plain LoRA adapter (it is empty)"),
        (lambda f: edit(f, lambda t, key: t.update({key: t[key][:, :-1].contiguous()})), "does not fit its base"),
        (lambda f: edit(f, lambda t, key: t.pop(key.replace("lora_A", "lora_B"))), "does not fit its base"),
        (
            lambda f: edit(f, lambda t, key: t.update({k.replace("0", "7"): v.clone() for k, v in [*t.items()]})),
            "does not fit its base",
        ),
    ],
)
def test_anything_else_is_refused_in_one_line(adapted, damage, words):
    folder, *_ = adapted()
    damage(folder)
    with pytest.raises(RefusalLabError) as error:
        load(str(folder))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_an_adapter_of_another_model_is_refused(adapted, make):
    folder, *_ = adapted()
    other = folder.with_name("other")
    make.hf("llama", hidden_size=64).save_pretrained(other)
    make.tokenizer().save_pretrained(other)
    change(folder, base_model_name_or_path=str(other))
    with pytest.raises(RefusalLabError, match="does not fit its base"):
        load(str(folder))
