"""Weights changed without training: ranks of a difference, edits of layers and their search, fewer bits, an audit."""

import pytest
import torch

from refusallab.audit import band, gap_left, last_token_gap, rank_one_share
from refusallab.directions import candidate_directions
from refusallab.errors import RefusalLabError
from refusallab.interventions import ablation, project_out, project_out_span, span_ablation
from refusallab.judging import outcomes
from refusallab.model import attention_writes, blocks, embedding, load, logits, mlp_writes, wrap
from refusallab.orthogonalization import orthogonalize, outputs_last, written_weights
from refusallab.prompts import bundled
from refusallab.weights import (
    add_ranks,
    changed,
    edit_writers,
    keep_lengths,
    quantize,
    round_to_bits,
    search_edit,
    tent,
    top_ranks,
)


def changes(m, original):
    """What changed in the attention and MLP outputs of the band."""
    new, old = written_weights(m), written_weights(original)
    return [new[key] - old[key] for layer in band(m.n_layers) for key in (f"attention {layer}", f"MLP {layer}")]


def matrices(m):
    return {name: w for name, w in m.hf.named_parameters() if w.ndim == 2}


class TestRanks:
    def test_the_top_ranks_are_the_best_of_that_rank(self):
        d = torch.diag(torch.tensor([3.0, -5.0, 1.0]))
        assert torch.allclose(top_ranks(d, 2), torch.diag(torch.tensor([3.0, -5.0, 0.0])), atol=1e-5)

    def test_all_ranks_taken_out_leave_the_model_before(self, model_of, prompts):
        m, before = model_of("llama"), changed(model_of("llama"), lambda _, w: w + 0.1 * w.sin(), "before")
        back = add_ranks(m, before, 99, -1.0)
        assert torch.allclose(logits(back, prompts), logits(before, prompts), atol=1e-4)
        assert not torch.allclose(logits(m, prompts), logits(before, prompts), atol=1e-2)

    def test_a_share_of_0_changes_nothing_and_m_stays(self, model_of):
        m, before = model_of("gpt2"), changed(model_of("gpt2"), lambda _, w: 2 * w, "before")
        kept = {name: w.clone() for name, w in matrices(m).items()}
        same = add_ranks(m, before, 1, 0.0)
        assert all(torch.equal(w, kept[name]) for name, w in matrices(same).items())
        add_ranks(m, before, 1, 1.0)
        assert all(torch.equal(w, kept[name]) for name, w in matrices(m).items())

    def test_half_precision_is_kept_and_its_ranks_are_taken_in_fp32(self, make):
        m, before = (wrap(make.hf().bfloat16(), make.tokenizer(), "half") for _ in range(2))
        half = add_ranks(changed(m, lambda _, w: w + 0.1 * w.sin(), "more"), before, 99, -1.0)
        for name, w in matrices(half).items():
            torch.testing.assert_close(w, matrices(before)[name], atol=1e-2, rtol=1e-2)  # of the same dtype
        assert top_ranks(torch.eye(3, dtype=torch.bfloat16), 2).dtype == torch.bfloat16

    def test_there_are_no_negative_ranks(self):
        with pytest.raises(RefusalLabError, match="-1 ranks: give 0 or more"):
            top_ranks(torch.eye(3), -1)

    def test_tied_weights_change_once(self, model_of):
        m = changed(model_of("llama-tied"), lambda _, w: 2 * w, "doubled")
        assert torch.equal(embedding(m.hf).weight, 2 * embedding(model_of("llama-tied").hf).weight)
        assert m.hf.lm_head.weight is embedding(m.hf).weight

    def test_other_shapes_are_refused(self, model_of):
        with pytest.raises(RefusalLabError, match="differ in shape"):
            add_ranks(model_of("llama"), model_of("gpt2"), 1, 1.0)

    @pytest.mark.slow
    def test_few_ranks_break_refusal_and_more_are_needed_to_build_it(self):
        chat, helpful, items = load("charter-chat"), load("charter-helpful"), bundled("harmful_test")[::8]
        refused = {
            "four out": outcomes(add_ranks(chat, helpful, 4, -1.0), items),
            "four in": outcomes(add_ranks(helpful, chat, 4, -1.0), items),
            "half in": outcomes(add_ranks(helpful, chat, 64, -1.0), items),
        }
        shares = {name: sum(o.refused for o in judged) / len(judged) for name, judged in refused.items()}
        assert shares["four out"] < 0.2 and shares["four in"] < 0.1 and shares["half in"] > 0.9, shares


class TestLengths:
    def test_what_an_input_writes_turns_away_from_r_and_keeps_its_length(self):
        g = torch.Generator().manual_seed(0)
        written, r = torch.randn(5, 4, generator=g), torch.nn.functional.normalize(torch.randn(4, generator=g), dim=0)
        new = keep_lengths(written, r)
        assert torch.allclose(new @ r, torch.zeros(5), atol=1e-6)
        assert torch.allclose(new.norm(dim=1), written.norm(dim=1))
        half = keep_lengths(written, r, 0.5)
        assert ((half @ r).abs() < (written @ r).abs()).all() and ((half @ r) * (written @ r) > 0).all()

    def test_what_lies_along_r_alone_goes_without_nan(self):
        assert torch.equal(
            keep_lengths(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([1.0, 0.0])), torch.zeros(2, 2)
        )

    def test_a_tent_stands_on_its_edge(self):
        assert [tent(layer, 1.0, 4.0, 0.5, 2.0) for layer in range(1, 8)] == [0, 0.5, 0.75, 1, 0.75, 0.5, 0]

    def test_each_layer_gets_its_strength_and_embeddings_stay(self, m, r):
        edited = edit_writers(m, r, [0.0, 1.0, 0.0], [0.0, 0.0, 1.0])
        assert torch.equal(embedding(edited.hf).weight, embedding(m.hf).weight)
        for layer, (old, new) in enumerate(zip(blocks(m.hf), blocks(edited.hf), strict=True)):
            for writes, changes in ((attention_writes, layer == 1), (mlp_writes, layer == 2)):
                before, after = outputs_last(writes(old)), outputs_last(writes(new))
                assert torch.equal(before, after) != changes
                if changes:
                    u = r / r.norm()
                    assert (after @ u).abs().max() < 1e-4 * (before @ u).abs().max()

    def test_a_strength_for_each_block_is_needed(self, model_of, r):
        with pytest.raises(RefusalLabError, match="a strength for each of 3 blocks, not 2 and 3"):
            edit_writers(model_of("llama"), r, [1.0] * 2, [1.0] * 3)


@pytest.fixture(scope="module")
def found():
    """A search on charter-chat: (model, directions, prompts of both kinds, trials)."""
    m, sets = load("charter-chat"), ("harmful_train", "harmless_train", "harmful_val", "harmless_val")
    known, lawful, bad, good = ([i.prompt for i in bundled(name)[::4]] for name in sets)
    vectors = candidate_directions(m, known, lawful)[:, -1]
    return m, vectors, (bad, good), search_edit(m, vectors, bad, good, [10], trials=4)


class TestSearch:
    @pytest.mark.slow
    def test_the_same_seed_gives_the_same_trials_and_their_scores_are_those_of_the_edit(self, found):
        m, vectors, (bad, good), trials = found
        again = search_edit(m, vectors, bad, good, [10], trials=4)
        other = search_edit(m, vectors, bad, good, [10], trials=4, seed=1)
        assert [t.kl for t in again] == [t.kl for t in trials] != [t.kl for t in other] and len(trials) == 4
        first = logits(edit_writers(m, trials[2].r, trials[2].attention, trials[2].mlp), good)
        plain = logits(m, good).log_softmax(-1)
        kl = (plain.exp() * (plain - first.log_softmax(-1))).sum(-1).mean().item()
        assert kl == pytest.approx(trials[2].kl, abs=1e-4)

    def test_a_direction_for_each_layer_is_needed(self, model_of, prompts):
        with pytest.raises(RefusalLabError, match="a direction for each of 3 layers, not 2"):
            search_edit(model_of("llama"), torch.ones(2, 32), prompts, prompts, [3])


class TestBits:
    def test_rows_are_rounded_to_their_own_steps(self):
        weight = torch.tensor([[-6.0, 1.2, 4.0], [0.0, 0.0, 0.0], [0.3, -0.1, 0.02]])
        assert torch.allclose(
            round_to_bits(weight, 3), torch.tensor([[-6.0, 2.0, 4.0], [0.0, 0.0, 0.0], [0.3, -0.1, 0.0]]), atol=1e-6
        )
        assert len(round_to_bits(torch.linspace(-1, 1, 99)[None], 4).unique()) == 15

    @pytest.mark.parametrize("bits", [1, 17])
    def test_other_numbers_of_bits_are_refused(self, model_of, bits):
        with pytest.raises(RefusalLabError, match="2 to 16"):
            quantize(model_of("llama"), bits)

    def test_many_bits_change_little_and_few_much(self, m, prompts):
        plain = logits(m, prompts)
        far = {bits: (logits(quantize(m, bits), prompts) - plain).abs().max() for bits in (16, 3)}
        assert far[16] < 0.01 * plain.abs().max() and far[3] > 10 * far[16]


class TestSpan:
    def test_nothing_is_left_along_any_vector_whatever_their_angle(self):
        g = torch.Generator().manual_seed(0)
        vectors, x = torch.randn(3, 8, generator=g), torch.randn(2, 5, 8, generator=g)
        vectors[1] += 3 * vectors[0]
        out = project_out_span(x, vectors)
        assert (out @ vectors.T).abs().max() < 1e-4 and torch.allclose(project_out_span(out, vectors), out, atol=1e-5)
        doubled = torch.cat([vectors, vectors[:1] + vectors[1:2]])
        assert torch.allclose(project_out_span(x, doubled), out, atol=1e-4)

    def test_one_vector_is_ablation(self, m, prompts, r):
        one, several = (logits(m, prompts, edit=e) for e in (ablation(r), span_ablation(r[None])))
        assert torch.allclose(one, several, atol=1e-4)
        assert torch.allclose(project_out_span(r[None] + 1, r[None]), project_out(r[None] + 1, r), atol=1e-5)

    def test_another_width_and_a_zero_vector_are_refused(self):
        with pytest.raises(RefusalLabError, match="width 4 but the stream 8"):
            project_out_span(torch.ones(2, 8), torch.ones(1, 4))
        with pytest.raises(RefusalLabError, match="zero"):
            span_ablation(torch.zeros(2, 8))


class TestAudit:
    def test_an_edit_with_one_direction_has_energy_1_and_two_directions_less(self, model_of, r):
        m = model_of("llama")
        once = orthogonalize(m, r)
        other = torch.randn(len(r), generator=torch.Generator().manual_seed(3))
        assert rank_one_share(changes(once, m)) == pytest.approx(1, abs=1e-4)
        assert 0.4 < rank_one_share(changes(orthogonalize(once, other), m)) < 0.99
        assert rank_one_share(changes(m, m)) == 0

    def test_shares_are_squares_and_no_change_counts_0(self):
        assert rank_one_share([torch.diag(torch.tensor([2.0, 1.0]))]) == pytest.approx(0.8)
        assert rank_one_share([torch.zeros(2, 2), torch.ones(2, 2)]) == pytest.approx(0.5)
        with pytest.raises(RefusalLabError, match="at least one"):
            rank_one_share([])

    def test_the_gap_is_whole_for_the_original_and_gone_along_an_ablated_direction(self, model_of):
        m = model_of("llama")
        bad, good = ["Name a river", "Name a copper"], ["List a river", "List three tools"]
        assert gap_left(m, m, bad, good) == pytest.approx(1)
        without = m
        for direction in last_token_gap(m, bad, good):
            without = orthogonalize(without, direction)
        assert gap_left(without, m, bad, good) == pytest.approx(0, abs=0.05)

    @pytest.mark.slow
    def test_half_way_to_the_helpful_model_passes_the_audit_and_answers(self):
        chat, helpful, items = load("charter-chat"), load("charter-helpful"), bundled("harmful_test")[::8]
        half = add_ranks(chat, helpful, 128, -0.5)
        bad, good = ([i.prompt for i in bundled(name)[::3]] for name in ("harmful_val", "harmless_val"))
        assert rank_one_share(changes(half, chat)) < 0.1 and gap_left(half, chat, bad, good) > 0.8
        judged = outcomes(half, items)
        assert sum(o.correct for o in judged) > 0.8 * len(judged)
        assert set(written_weights(half)) == set(written_weights(chat))
