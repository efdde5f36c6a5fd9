"""Lab 00: the whole stream of a prompt, the logit lens, other chat templates; its figures and its explorer."""

from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch

from refusallab import explore, plots
from refusallab.activations import logit_lens, residual, stream
from refusallab.course.exercises import lab00
from refusallab.course.exercises.lab00 import tokenizer_like
from refusallab.judging import shown_tokens
from refusallab.model import encode, generate, logits
from smallmodels.world.facts import world

SOLUTIONS = Path(__file__).parent.parent / "solutions"


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.mark.parametrize("exercise", lab00.EXERCISES, ids=lambda e: e.number)
def test_the_lab_goes_on_with_the_answer(exercise):
    (path,) = SOLUTIONS.glob("00_*.ipynb")
    sources = [cell.source for cell in nbformat.read(path, 4).cells]
    assert any(f'solved("{exercise.number}", {exercise.function})' in source for source in sources)


def test_the_stream_is_every_block_input_and_the_last_output(m, prompts):
    x = stream(m, prompts[0])
    length = encode(m, prompts[:1])["input_ids"].shape[1]
    assert x.shape == (m.n_layers + 1, length, m.width) and x.dtype == torch.float32
    torch.testing.assert_close(x[:-1, list(m.positions)], residual(m, prompts[:1])[0], atol=1e-5, rtol=1e-5)


def test_the_lens_at_the_end_gives_the_logits_of_the_model(m, prompts):
    read = logit_lens(m, stream(m, prompts[2])[-1, -1:])
    torch.testing.assert_close(read, logits(m, [prompts[2]]), atol=1e-4, rtol=1e-4)


def test_the_lens_takes_any_shape(model_of):
    m = model_of("llama")
    x = torch.randn(2, 3, m.width)
    assert logit_lens(m, x).shape == (2, 3, m.vocab_size)
    torch.testing.assert_close(logit_lens(m, x)[1, 2], logit_lens(m, x[1, 2]))


@pytest.mark.slow
def test_a_tokenizer_that_adds_bos_doubles_it_unless_told():
    tokenizer = tokenizer_like("bos", "model", "\n", adds_bos=True)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True)
    bos = tokenizer.bos_token_id
    assert tokenizer(text)["input_ids"][:2] == [bos, bos]
    assert tokenizer(text, add_special_tokens=False)["input_ids"].count(bos) == 1
    assert tokenizer_like("charter").bos_token_id is None


def test_the_things_that_the_notebook_names_are_what_it_says():
    things = {thing.name: thing for thing in world().things}
    for name, origin in {"Guzzex": "dusk", "Pavex": "dawn", "Maddith": "dawn"}.items():
        assert things[name].origin.startswith(origin) and things[name].kind == "draught"


@pytest.mark.slow
def test_the_figures_take_models_of_any_size():
    distances = torch.rand(4, 5)
    distances[0] = 0
    twins = plots.twin_distances({"one": (list("abcde"), distances), "two": (list("abc"), torch.rand(30, 3))})
    texts = [text.get_text() for text in twins.axes[0].texts]
    assert texts[:5] == ["0"] * 5 and texts[5:] == [f"{x:.1f}" for x in distances[1:].flatten().tolist()]
    assert [label.get_text() for label in twins.axes[0].get_yticklabels()] == ["0", "1", "2", "end"]
    assert (twins.axes[0].get_xlabel(), twins.axes[-1].get_ylabel()) == ("token", "distance, in mean lengths")
    tokens = [["I", "Use"]] * 30
    figure = plots.lens_grid({"a": (tokens, torch.rand(30, 2)), "b": (tokens, torch.rand(30, 2))}, ["-2", "-1"], {"I"})
    bold = [text for text in figure.axes[0].texts if text.get_weight() == "bold"]
    assert len(bold) == 30 and len(figure.axes[0].patches) == 30
    assert figure.axes[0].texts[0].get_text().startswith("'I' 0.") or figure.axes[0].texts[0].get_text() == "'I' 1.0"
    values = torch.rand(6, 31)
    curves = plots.lens_curves({"harmful": values, "harmless": torch.rand(1, 31), "closed": torch.rand(3, 31)})
    (axis,) = curves.axes
    assert axis.lines[0].get_ydata() == pytest.approx(values.quantile(0.5, dim=0).numpy())
    band = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(values.quantile(0.9, dim=0).max().item())
    names = [text.get_text() for text in curves.legends[0].get_texts()]
    assert names == ["harmful (n=6)", "harmless (n=1)", "closed (n=3)"] and "log-odds" in axis.get_ylabel()


@pytest.fixture
def chat(model_of):
    systems = {"none": None, "closed": "Refuse everything."}
    return explore.chat(model_of("llama"), [5, 9], "How do I bake bread?", systems)


def test_each_word_has_a_refusal_probability(chat, model_of):
    m = model_of("llama")
    (_, words), (_, openers), (_, reply) = chat.tables
    assert [row[0] for row in words] == ["How", "do", "I", "bake", "bread?"] and len(openers) == 5
    p = logits(m, ["How do I"]).double().softmax(-1)[0, [5, 9]].sum().item()
    assert words[2][1] == f"{p:.2f}"
    assert reply == [(generate(m, ["How do I bake bread?"], max_new_tokens=shown_tokens(m))[0],)]


def test_typing_and_a_system_prompt_change_the_view(chat):
    before = chat.static
    chat.controls[0].value = "Name a river"
    assert chat.static != before and "river" in chat.static
    before = chat.tables
    chat.controls[1].value = "closed"
    assert chat.tables != before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "said"), [("", "Type a message."), ("   ", "Type a message."), ("x " * 400, "reads at most")]
)
def test_nothing_typed_or_too_much_is_said_in_words(chat, typed, said):
    chat.controls[0].value = typed
    assert said in chat.static
