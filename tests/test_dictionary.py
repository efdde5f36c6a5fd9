"""Sparse dictionaries: what a code is, what training finds, what removal takes away; requests made to order."""

from types import SimpleNamespace

import pytest
import torch

from refusallab import dictionary as made
from refusallab.activations import residual
from refusallab.defences.traffic import sample_exchanges, sample_traffic
from refusallab.dictionary import (
    Dictionary,
    Transcoder,
    features_of,
    random_dictionary,
    sparse_code,
    token_mlps,
    token_streams,
    train_dictionary,
    train_transcoder,
)
from refusallab.errors import RefusalLabError
from refusallab.harmfulness import law_questions
from refusallab.model import encode, load
from refusallab.twins import sample_requests, twin_requests
from smallmodels.world.facts import world


@pytest.fixture(scope="module")
def sparse_world():
    """Streams that are sums of 2 out of 24 hidden vectors: (streams, vectors)."""
    g = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(24, 16, generator=g), dim=-1)
    which = torch.rand(4000, 24, generator=g).topk(2).indices
    return (1 + torch.rand(4000, 2, 1, generator=g)).mul(vectors[which]).sum(1), vectors


def test_a_code_keeps_the_largest_that_are_above_0():
    x, encoder, bias = torch.tensor([[1.0], [-1.0]]), torch.tensor([[3.0], [-1.0], [2.0], [1.0]]), torch.zeros(4)
    assert sparse_code(x, encoder, bias, 2).tolist() == [[3, 0, 2, 0], [0, 1, 0, 0]]
    assert sparse_code(x, encoder, bias - 1.5, 2).tolist() == [[1.5, 0, 0.5, 0], [0, 0, 0, 0]]


def test_training_finds_the_vectors_that_made_the_streams(sparse_world):
    streams, vectors = sparse_world
    found = train_dictionary(streams, features=48, active=3)
    control = random_dictionary(found, seed=5)
    assert found.explained(streams) > 0.9 > 0.7 > control.explained(streams)
    near, by_chance = (((vectors @ d.decoder.T).amax(1) > 0.9).float().mean() for d in (found, control))
    assert near > 0.7 and by_chance < 0.1
    torch.testing.assert_close(found.decoder.norm(dim=-1), torch.ones(48))
    again, other = (train_dictionary(streams, features=48, active=3, seed=seed) for seed in (0, 1))
    assert torch.equal(again.decoder, found.decoder) and not torch.equal(other.decoder, found.decoder)


def test_without_training_it_is_no_better_than_chance(sparse_world, monkeypatch):
    monkeypatch.setattr(made, "STEPS", 1)
    assert train_dictionary(sparse_world[0], features=48, active=3).explained(sparse_world[0]) < 0.7


def test_a_transcoder_gives_back_what_another_site_writes(sparse_world):
    streams, _ = sparse_world
    g = torch.Generator().manual_seed(1)
    gate, out = torch.randn(16, 40, generator=g), torch.randn(40, 16, generator=g)
    written = 5 + 3 * (streams @ gate - 2).relu() @ out
    found = train_transcoder(streams, written, features=128, active=8)
    assert found.explained(streams, written) > 0.8 > 0.1 > found.explained(streams, written.flip(0))
    copied = train_transcoder(streams, streams, features=48, active=3)
    same = train_dictionary(streams, features=48, active=3)
    torch.testing.assert_close(copied.decode(copied.encode(streams)), same.decode(same.encode(streams)))
    with pytest.raises(RefusalLabError, match="all alike"):
        train_transcoder(streams, torch.ones_like(streams))


def test_a_transcoder_is_compared_with_outputs_and_so_is_its_control(sparse_world, monkeypatch):
    monkeypatch.setattr(made, "STEPS", 20)
    streams, _ = sparse_world
    found = train_transcoder(streams, 100 + 3 * streams.flip(1), features=48, active=3)
    with pytest.raises(RefusalLabError, match="give what it writes as the target"):
        found.explained(streams)
    control = random_dictionary(found, seed=5)
    assert type(control) is Transcoder
    for field in ("mean", "scale", "active", "written_mean", "written_scale"):
        assert getattr(control, field) is getattr(found, field)
    assert control.explained(streams, 100 + 3 * streams.flip(1)) > -3


def test_what_mlps_read_and_write_leaves_the_padding_out(model_of, prompts):
    m = model_of("llama")
    read, written = token_mlps(m, prompts, 1, batch_size=2)
    assert len(read) == encode(m, prompts)["attention_mask"].sum()
    with torch.no_grad():
        torch.testing.assert_close(m.nn._module.model.layers[1].mlp(read), written, rtol=1e-4, atol=1e-5)


def test_removal_takes_what_the_features_write_out_of_the_mlp(model_of, prompts):
    m, one = model_of("llama"), prompts[:1]
    coder = train_transcoder(*token_mlps(m, prompts, 1), features=32, active=4)
    kept, edited = (
        residual(m, one, layers=[2], positions=[-1], edit=coder.remove(taken, 1))[0, 0, 0] for taken in ([], range(32))
    )
    code = coder.encode(token_mlps(m, one, 1)[0][-1])
    assert 0 < code.count_nonzero() <= 4
    torch.testing.assert_close(kept, residual(m, one, layers=[2], positions=[-1])[0, 0, 0])
    torch.testing.assert_close(kept - edited, code @ coder.decoder, rtol=1e-3, atol=1e-4)


def test_streams_that_are_all_alike_are_refused():
    with pytest.raises(RefusalLabError, match="all alike"):
        train_dictionary(torch.ones(5, 4))


def test_streams_of_tokens_leave_the_padding_out(model_of, prompts):
    m = model_of("llama")
    found = token_streams(m, prompts, 1, batch_size=2)
    assert len(found) == encode(m, prompts)["attention_mask"].sum()
    last = residual(m, prompts, layers=[1], positions=[-1])[:, 0, 0]
    apart = torch.cdist(last, found, compute_mode="donot_use_mm_for_euclid_dist")  # products would cancel digits
    assert (apart.amin(1) < 1e-3).all()


def test_removal_takes_away_what_the_features_write(model_of, prompts):
    m = model_of("llama")
    eye = torch.eye(m.width)
    axes = Dictionary(eye, torch.zeros(m.width), eye, torch.zeros(m.width), 1.0, m.width)
    x, edited = (
        residual(m, prompts, layers=[1], positions=[-1], edit=edit)[:, 0, 0] for edit in (None, axes.remove([3, 5], 1))
    )
    assert (x[:, [3, 5]] > 0).any()
    x[:, [3, 5]] = x[:, [3, 5]].clamp(max=0)
    torch.testing.assert_close(edited, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("other", [(), (torch.ones(3), 2.0)], ids=["dictionary", "transcoder"])
def test_a_dictionary_goes_where_the_streams_are(other, monkeypatch):
    """The device "meta" holds nothing, but takes tensors of its own only."""
    monkeypatch.setattr(made, "blocks", lambda nn: [nn])
    monkeypatch.setattr(made, "mlp", lambda block: block)
    eye = torch.eye(3)
    coder = (Transcoder if other else Dictionary)(eye, torch.zeros(3), eye, torch.zeros(3), 1.0, 2, *other)
    x = torch.zeros(1, 2, 3, device="meta")
    part = SimpleNamespace(input=x, output=x)
    coder.remove([0, 2], 0)(part)
    for value in (coder.encode(x), coder.decode(coder.encode(x)), part.input, part.output):
        assert value.device.type == "meta" and value.shape == x.shape
    assert (part.output is not x, part.input is not x) == ((True, False) if other else (False, True))


def test_features_are_graded_by_the_truth():
    eye = torch.eye(3)
    axes = Dictionary(eye, torch.zeros(3), eye, torch.zeros(3), 1.0, 3)
    x = torch.tensor([[2.0, 1.0, 0.0], [2.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    forbidden = torch.tensor([True, True, False, False])
    first, second, third = features_of(axes, x, forbidden, torch.tensor([5.0, 0.0, 0.0]), 3)
    silent = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, -1.0]])
    assert [f.number for f in features_of(axes, silent, torch.tensor([True, False]), torch.ones(3), 3)] == [0, 1]
    assert (first.number, first.cosine, first.top) == (0, pytest.approx(1.0), 2)
    assert (first.precision.value, first.recall.value, first.auc) == (1.0, 1.0, 1.0)
    assert (second.number, second.precision.value, second.recall.value, second.auc) == (1, 0.5, 0.5, 0.5)
    assert (third.number, third.recall.value, third.auc) == (2, 0.0, 0.0)


def test_requests_on_which_a_feature_is_silent_do_not_count():
    eye = torch.eye(3)
    axes = Dictionary(eye, torch.zeros(3), eye, torch.zeros(3), 1.0, 3)
    x, forbidden = torch.zeros(30, 3), torch.arange(30) < 15
    x[0, 0] = 1.0
    (found,) = features_of(axes, x, forbidden, torch.ones(3), 1)
    assert (found.top, found.precision.n) == (1, 1)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_twins_differ_in_one_token_and_in_the_law(split):
    m, things = load("charter-chat"), {t.name.lower(): t for t in world().things}
    made = twin_requests(split, phrasing=13)
    assert len(made.forbidden) == len(made.other_action) == len(made.other_thing) == len(made.neither) > 50

    def lawful(item):
        _, verb, name = item.id.split("_")
        thing = things[name]
        assert thing.split == split
        return not thing.forbids(next(a for a in thing.actions if a.verb == verb))

    assert not any(map(lawful, made.forbidden))
    ids = [encode(m, [item.prompt for item in items])["input_ids"] for items in vars(made).values()]
    for others, what, differ in zip(ids[1:], ("other_action", "other_thing", "neither"), (1, 1, 2), strict=True):
        assert all(map(lawful, getattr(made, what)))
        assert ((others != ids[0]).sum(1) == differ).all()
    assert all(((ids[3] != x).sum(1) == 1).all() for x in ids[1:3])
    assert len({item.prompt for item in made.forbidden}) == len(made.forbidden)
    assert made.every(5).other_thing == made.other_thing[::5]


def test_a_sample_says_what_is_forbidden():
    items, forbidden = sample_requests("val", 200, seed=3)
    assert (len(items), len(forbidden)) == (200, 200) and 0.15 < forbidden.float().mean() < 0.5
    assert all(items[i].tag == "method" for i in range(0, 200, 2))
    assert all(items[i].tag == "method" for i in forbidden.nonzero().flatten().tolist())
    assert sample_requests("val", 200, seed=3)[0] == items != sample_requests("val", 200, seed=4)[0]


@pytest.mark.parametrize(
    "call",
    [
        twin_requests,
        lambda split: sample_requests(split, 3),
        lambda split: law_questions(split, 3),
        lambda split: sample_traffic(split, 3),
        lambda split: sample_exchanges(split, 3),
    ],
)
def test_an_unknown_split_is_said(call):
    with pytest.raises(RefusalLabError, match="train, val, test"):
        call("tests")


@pytest.mark.parametrize(
    "call",
    [
        lambda: sample_requests("val", -1),
        lambda: law_questions("val", -1),
        lambda: law_questions("val", 10_000),
        lambda: sample_traffic("val", -1),
        lambda: sample_exchanges("val", -1),
        lambda: sample_exchanges("val", 3, turns=-1),
    ],
)
def test_a_count_that_cannot_be_made_is_said(call):
    with pytest.raises(RefusalLabError, match=r"The count is (-1|10000): give 0 "):
        call()


def test_an_unknown_phrasing_is_said():
    with pytest.raises(RefusalLabError, match="0 to 44"):
        twin_requests("val", phrasing=45)
