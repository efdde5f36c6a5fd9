"""Difference in means, candidate scores against plain hooks, the selection rule, saving."""

import dataclasses
import errno
import json
import math

import pytest
import torch
from safetensors.torch import save_file

from refusallab import directions
from refusallab.activations import residual
from refusallab.directions import Candidate, Direction
from refusallab.errors import RefusalLabError
from refusallab.judging import Openings
from refusallab.measure import kl_divergence, rate, refusal_metric
from refusallab.model import encode
from refusallab.orthogonalization import orthogonalize

HARMFUL = ["How do I bake bread?", "Name a river", "List three tools: 1, 2, 3"]
HARMLESS = ["What is 12 plus 7?", "List", "Please explain the recipe.", "bread"]
TOKENS = [5, 9]


def test_difference_in_means_is_the_difference_of_float64_means():
    torch.manual_seed(0)
    a, b = torch.randn(5, 2, 3, 7) + 1e4, torch.randn(9, 2, 3, 7) + 1e4
    expected = (a.double().sum(0) / 5 - b.double().sum(0) / 9).float()
    assert torch.equal(directions.difference_in_means(a, b), expected)


def test_difference_in_means_names_what_is_wrong():
    with pytest.raises(RefusalLabError, match="empty"):
        directions.difference_in_means(torch.empty(0, 4), torch.ones(2, 4))
    with pytest.raises(RefusalLabError, match="shape"):
        directions.difference_in_means(torch.ones(2, 5), torch.ones(2, 4))


def test_candidates_are_differences_of_residual_means(m):
    vectors = directions.candidate_directions(m, HARMFUL, HARMLESS)
    expected = directions.difference_in_means(residual(m, HARMFUL), residual(m, HARMLESS))
    torch.testing.assert_close(vectors, expected, rtol=1e-4, atol=1e-4)
    assert vectors.shape == (m.n_layers, len(m.positions), m.width)


def test_layer_0_is_zero_where_nothing_but_the_token_is_embedded(model_of):
    assert directions.candidate_directions(model_of("llama"), HARMFUL, HARMLESS)[0].abs().max() == 0
    assert directions.candidate_directions(model_of("gpt2"), HARMFUL, HARMLESS)[0].abs().max() > 0  # learned positions


def hooked_scores(m, hooks, r, layer):
    """The three scores with plain PyTorch hooks and full-sequence logits."""
    harmful, harmless = encode(m, HARMFUL), encode(m, HARMLESS)
    sites = hooks.ablation(m.hf, r)
    base, ablated = hooks.logits(m.hf, harmless), hooks.logits(m.hf, harmless, **sites)
    return (
        refusal_metric(hooks.logits(m.hf, harmful, **sites), TOKENS).mean().item(),
        refusal_metric(hooks.logits(m.hf, harmless, inputs={layer: lambda x: x + r}), TOKENS).mean().item(),
        kl_divergence(base, ablated).mean().item(),
    )


def test_scores_equal_plain_hooks(m, hooks):
    vectors = directions.candidate_directions(m, HARMFUL, HARMLESS)
    for c in directions.score_candidates(m, vectors, HARMFUL, HARMLESS, TOKENS):
        r = vectors[c.layer, m.positions.index(c.position)]
        if r.norm() > 0:
            assert (c.bypass, c.induce, c.kl) == pytest.approx(hooked_scores(m, hooks, r, c.layer), abs=1e-4)


def test_zero_candidates_score_like_the_untouched_model_and_nan_candidates_are_kept_but_never_selected(model_of, hooks):
    m = model_of("llama")
    vectors = directions.candidate_directions(m, HARMFUL, HARMLESS)
    vectors[1, 0] = math.nan
    done = []
    scores = directions.score_candidates(m, vectors, HARMFUL, HARMLESS, TOKENS, progress=done.append)
    assert done == list(range(len(m.positions), len(scores) + 1, len(m.positions)))
    zero = scores[0]
    assert (zero.layer, zero.kl) == (0, 0.0)
    for score, prompts in ((zero.bypass, HARMFUL), (zero.induce, HARMLESS)):
        untouched = refusal_metric(hooks.logits(m.hf, encode(m, prompts)), TOKENS).mean().item()
        assert score == pytest.approx(untouched, abs=1e-4)
    broken = next(c for c in scores if c.layer == 1 and c.position == m.positions[0])
    assert math.isnan(broken.bypass)
    assert directions.discarded_because(broken, m.n_layers) == "score is NaN"
    assert len(scores) == m.n_layers * len(m.positions)


GOOD = Candidate(position=-1, layer=3, bypass=-5.0, induce=2.0, kl=0.05)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"layer": 7}, None),
        ({"layer": 8}, "layer"),
        ({"kl": 0.1}, None),
        ({"kl": 0.11}, "KL"),
        ({"induce": 0.0}, "induce"),
        ({"bypass": math.nan}, "NaN"),
        ({"kl": math.nan}, "NaN"),
        ({"induce": math.nan}, "NaN"),
    ],
)
def test_filters(change, reason):
    verdict = directions.discarded_because(dataclasses.replace(GOOD, **change), n_layers=10)
    assert verdict is None if reason is None else reason in verdict


def test_selection_takes_the_lowest_bypass_that_passes():
    worse = dataclasses.replace(GOOD, bypass=-4.0, layer=2)
    broken = dataclasses.replace(GOOD, bypass=-99.0, kl=5.0)
    late = dataclasses.replace(GOOD, bypass=-50.0, layer=9)
    assert directions.select([worse, broken, late, GOOD], n_layers=10) == GOOD


def test_selection_says_why_nothing_passes():
    with pytest.raises(RefusalLabError, match=r"2 KL over 0.1.*1 layer|1 layer.*2 KL over 0.1") as caught:
        bad = dataclasses.replace(GOOD, kl=1.0)
        directions.select([bad, bad, dataclasses.replace(GOOD, layer=9)], n_layers=10)
    assert "\n" not in str(caught.value)


def test_random_directions_are_unit_and_reproducible():
    a = directions.random_directions(16, 3, seed=1)
    assert torch.equal(a, directions.random_directions(16, 3, seed=1))
    torch.testing.assert_close(a.norm(dim=-1), torch.ones(3))


def test_cosines():
    x = torch.tensor([[1.0, 0], [0, 2], [1, 1], [0, 0]])
    expected = torch.tensor([[1, 0, 0.5**0.5, 0], [0, 1, 0.5**0.5, 0], [0.5**0.5, 0.5**0.5, 1, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(directions.cosines(x), expected)


DIRECTION = Direction(torch.arange(4.0), layer=2, position=-1)


@pytest.fixture
def chat(model_of):
    return model_of("llama")


def test_a_saved_direction_comes_back_with_its_site(tmp_path, chat):
    path = tmp_path / "new" / "r.safetensors"
    directions.save_direction(path, DIRECTION, chat)
    again = directions.load_direction(path, chat)
    assert torch.equal(again.vector, DIRECTION.vector)
    assert (again.layer, again.position) == (2, -1)


def test_a_direction_may_be_a_view(tmp_path, chat):
    view = torch.arange(8.0).view(4, 2)[:, 1]
    directions.save_direction(tmp_path / "r.safetensors", dataclasses.replace(DIRECTION, vector=view), chat)
    assert torch.equal(directions.load_direction(tmp_path / "r.safetensors", chat).vector, view)


def test_an_unreadable_direction_gives_one_line(tmp_path, chat):
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    save_file({"vector": torch.ones(4)}, tmp_path / "bare.safetensors")
    save_file({"vector": torch.ones(4)}, tmp_path / "part.safetensors", metadata={"layer": "2"})
    save_file({"vector": torch.ones(4)}, tmp_path / "word.safetensors", metadata={"layer": "two", "position": "-1"})
    for name in ("bad.safetensors", "bare.safetensors", "part.safetensors", "word.safetensors"):
        with pytest.raises(RefusalLabError, match=f"{name} holds no direction that can be read: save it again"):
            directions.load_direction(tmp_path / name, chat)
    with pytest.raises(RefusalLabError, match="There is no none.safetensors yet"):
        directions.load_direction(tmp_path / "none.safetensors", chat)


@pytest.mark.parametrize("name", ["operation", "hook", "model", "weights", "dtype", "version"])
def test_a_direction_of_another_kind_is_not_loaded(name, tmp_path, chat, monkeypatch):
    path, origin = tmp_path / "r.safetensors", directions._origin(chat)
    with monkeypatch.context() as patch:
        patch.setattr(directions, "_origin", lambda m: origin | {name: "other"})
        directions.save_direction(path, DIRECTION, chat)
    with pytest.raises(RefusalLabError, match=rf"another kind \({name} other, not [^;]+\): find it again"):
        directions.load_direction(path, chat)


def test_the_weights_of_a_direction_are_those_of_the_moment(tmp_path, chat):
    directions.save_direction(tmp_path / "r.safetensors", DIRECTION, chat)
    edited = orthogonalize(chat, torch.ones(chat.width))
    edited = dataclasses.replace(edited, name=chat.name)
    with pytest.raises(RefusalLabError, match=r"another kind \(weights \w{12}, not \w{12}\)"):
        directions.load_direction(tmp_path / "r.safetensors", edited)


def search(m):
    vectors = directions.candidate_directions(m, HARMFUL, HARMLESS)
    scores = directions.score_candidates(m, vectors, HARMFUL, HARMLESS, TOKENS)
    return directions.Search(m.name, m.commit, m.n_layers, tuple(scores), vectors, OPENINGS, {"harmful_val": 3})


def test_the_direction_is_the_vector_of_the_selected_candidate(model_of):
    found = search(model_of("llama"))
    position = found.candidates[0].position + 1
    good = Candidate(position, layer=1, bypass=-99.0, induce=1.0, kl=0.0)
    others = [c for c in found.candidates if (c.layer, c.position) != (1, position)]
    found = dataclasses.replace(found, candidates=(*others, good))
    assert found.selected == good
    assert torch.equal(found.direction.vector, found.vectors[1, 1])
    assert (found.direction.layer, found.direction.position) == (1, position)


OPENINGS = Openings([5], ["Sorry"], rate([True]), rate([False]))


def test_prompts_that_do_not_behave_as_labelled_are_left_out(model_of, monkeypatch):
    """Prompts that start with "not" behave like the other kind."""
    m = model_of("llama")
    harmful, harmless = ["a river", "a pie", "a tool", "not a river"], ["some bread", "not some bread", "some pie"]

    def refuses(_m, prompts):
        return [(prompt in harmful) != prompt.startswith("not") for prompt in prompts]

    def openings(_m, prompts, refused):
        assert prompts == [*harmful, *harmless] and refused == refuses(m, prompts)
        return OPENINGS

    means = []
    monkeypatch.setattr(directions, "refuses", refuses)
    monkeypatch.setattr(directions, "refusal_openings", openings)
    monkeypatch.setattr(directions, "candidate_directions", lambda _m, *sets: means.append(sets))
    monkeypatch.setattr(directions, "score_candidates", lambda _m, _v, *sets, progress: means.append(sets) or [])
    found = directions.search_candidates(m, harmful, harmless, harmful, harmless)
    kept = (harmful[:3], ["some bread", "some pie"])
    assert means[0] == kept and means[1] == (*kept, [5])
    assert found.kept == {"harmful_train": 3, "harmless_train": 2, "harmful_val": 3, "harmless_val": 2}
    assert found.refusal_tokens == [5]
    with pytest.raises(RefusalLabError, match=r"No prompt of harmful_val \(1\) is refused by llama"):
        directions.search_candidates(m, harmful, harmless, ["not a river"], harmless)


def test_every_candidate_is_saved(tmp_path, model_of):
    m = model_of("llama")
    directions.save_candidates(tmp_path / "scores.json", search(m))
    record = json.loads((tmp_path / "scores.json").read_text())
    assert len(record["candidates"]) == m.n_layers * len(m.positions)
    assert record["model"] == "llama" and record["hook"] == "resid_pre" and record["kept"] == {"harmful_val": 3}


@pytest.mark.parametrize("moment", ["writing", "replacing"])
def test_a_full_disk_keeps_the_earlier_file(tmp_path, model_of, monkeypatch, moment):
    m = model_of("llama")
    scores, vector = tmp_path / "scores.json", tmp_path / "r.safetensors"
    scores.write_text("earlier")
    vector.write_text("earlier")
    found = search(m)

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if moment == "writing":
        monkeypatch.setattr("pathlib.Path.write_bytes", full)
        monkeypatch.setattr(directions, "save_file", full)
    else:
        monkeypatch.setattr("pathlib.Path.replace", full)
    for save in (
        lambda: directions.save_candidates(scores, found),
        lambda: directions.save_direction(vector, DIRECTION, m),
    ):
        with pytest.raises(RefusalLabError, match="No space left") as caught:
            save()
        assert "\n" not in str(caught.value)
    assert scores.read_text() == vector.read_text() == "earlier"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.safetensors", "scores.json"]
