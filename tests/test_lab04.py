"""Lab 04: dose curves and matched controls; its figures, its explorer and what its checks say of errors."""

import matplotlib.pyplot as plt
import pytest
import torch

from refusallab import explore, plots, steering
from refusallab.course.exercise import run_cases
from refusallab.course.exercises import find_exercise
from refusallab.interventions import addition
from refusallab.measure import cross_entropy, rate
from refusallab.model import attention, blocks, encode, generate, mlp
from refusallab.prompts import Item


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def doses(model_of, r):
    items = [Item("a", "Name a river", "river"), Item("b", "What is 12 plus 7?", None)]
    return steering.dose_curve(model_of("llama"), items, r, 1, [0, 3], batch_size=3)


@pytest.mark.slow
def test_a_dose_reads_the_steered_reply_with_the_untouched_model(model_of, r, doses):
    m, prompts = model_of("llama"), ["Name a river", "What is 12 plus 7?"]
    replies = generate(m, prompts, edit=addition(r, 1, 3), max_new_tokens=steering.SHOWN_TOKENS)
    assert [d.coefficient for d in doses] == [0, 3]
    assert doses[1].loss == pytest.approx(cross_entropy(m, replies, prompts).mean().item(), abs=1e-4)
    assert doses[1].exact.n == doses[1].refused.n == 2 and doses[1].exact.value <= 0.5  # no answer, never exact


def test_matched_vectors_have_the_length_of_r_and_differ():
    r = torch.full((16,), 2.0)
    vectors = steering.norm_matched(r, 3, seed=0)
    torch.testing.assert_close(vectors.norm(dim=-1), r.norm().expand(3))
    assert torch.equal(vectors, steering.norm_matched(r, 3, seed=0))
    assert not torch.equal(vectors, steering.norm_matched(r, 3, seed=1))


@pytest.mark.slow
def test_figures(doses):
    figure = plots.dose_figure({"harmless": {"r": doses, "random": doses}, "harmful": {"r": doses}})
    above, _, below, _ = figure.axes
    assert list(above.lines[0].get_ydata()) == [d.refused.value for d in doses]
    assert list(below.lines[0].get_ydata()) == [d.loss for d in doses]
    assert "nats per token" in below.get_ylabel() and "lengths of r" in below.get_xlabel()
    vectors = ("r", "random")
    names = {f"{metric}, {vector}" for vector in vectors for metric in ("refused", "exact", "loss")}
    assert {text.get_text() for text in figure.legends[0].get_texts()} == names
    share, sure = rate([True, False]), rate([True])
    figure = plots.response_curves({"addition": {"harmful": {0.0: share, 1.0: sure}}}, "share refused")
    line = figure.axes[0].lines[0]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0.0, 1.0], [0.5, 1.0])
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("addition", "share refused")
    figure = plots.rate_rows({"untouched": {"refused": share}, "ablated": {"refused": sure, "exact": share}})
    assert [list(bars[0].get_xdata()) for bars in figure.axes[0].containers] == [[0.5, 1.0], [0.5]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["refused", "exact"]
    assert "Wilson" in figure.get_supxlabel()


@pytest.mark.slow
def test_the_explorer_steers(model_of, r):
    m = model_of("llama")
    shown = explore.steering(
        m, 20 * r, 1, torch.zeros(m.width), [5, 9], {"First": ["Name a river"], "Second": ["List"]}
    )
    edit, strength, control = shown.controls
    assert "First" in shown.static and "Name a river" in shown.static
    before = shown.static
    for change in ((edit, "ablation"), (edit, "ACE"), (strength, -2.0), (control, True)):
        change[0].value = change[1]
        assert shown.static != before
        before = shown.static


def tuple_forgotten(r):
    def edit(nn):
        attention(blocks(nn)[0]).output = attention(blocks(nn)[0]).output[0]

    return edit


def tuple_changed(r):
    def edit(nn):
        attention(blocks(nn)[0]).output[0] = attention(blocks(nn)[0]).output[0] * 2

    return edit


def without_an_inner_function(r):
    return nn  # noqa: F821, which is the mistake


def out_of_order(r):
    def edit(nn):
        mlp(blocks(nn)[0]).output = mlp(blocks(nn)[0]).output * 2
        blocks(nn)[0].input = blocks(nn)[0].input * 2

    return edit


def result_in_the_first_invoke(m, prompts, edit, steps):
    nn = m.nn
    with nn.generate(max_new_tokens=steps, do_sample=False) as tracer:  # noqa: SIM117, a trace of its own each
        with tracer.invoke(**encode(m, prompts)):
            for _ in tracer.all():
                edit(nn)
            ids = tracer.result.save()
    return ids


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, answer, advice",
    [
        ("4.1", tuple_forgotten, "is a tuple"),
        ("4.1", tuple_changed, "is a tuple"),
        ("4.1", without_an_inner_function, "inner function"),
        ("4.1", out_of_order, "in the order of the forward pass"),
        ("4.1", lambda r: None, "Return the edit itself"),
        ("4.2", result_in_the_first_invoke, "second, empty"),
    ],
)
def test_errors_of_nnsight_become_advice(number, answer, advice):
    assert advice in run_cases(find_exercise(number), answer, 0).problem
