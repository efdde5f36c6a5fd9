import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refusallab.errors import RefusalLabError
from refusallab.measure import (
    REFUSAL_PHRASES,
    Outcome,
    Rate,
    holm,
    kl_divergence,
    learn_refusal_tokens,
    mcnemar,
    outcome,
    plain,
    rate,
    refusal_metric,
    refused_by_phrases,
    two_by_two,
    wilson,
)


def logits_of(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


class TestRefusalTokens:
    harmful = logits_of([0.6, 0.06, 0.30, 0.04], [0.4, 0.06, 0.50, 0.04])
    harmless = logits_of([0.01, 0.04, 0.94, 0.01], [0.01, 0.04, 0.94, 0.01])

    def test_frequent_on_harmful_and_rare_on_harmless(self):
        # 0 qualifies; 1 fails the ratio, 2 is common on both sides, 3 is below 0.05
        assert learn_refusal_tokens(self.harmful, self.harmless) == [0]

    def test_several_tokens(self):
        rare = logits_of([0.001, 0.001, 0.001, 0.997])
        assert learn_refusal_tokens(self.harmful, rare) == [0, 1, 2]

    @pytest.mark.parametrize(
        ("settings", "tokens"),
        [({"ratio": 1.4}, [0, 1]), ({"min_probability": 0.03}, [0, 3]), ({"ratio": 10, "min_probability": 0.03}, [0])],
    )
    def test_both_thresholds_may_be_set(self, settings, tokens):
        assert learn_refusal_tokens(self.harmful, self.harmless, **settings) == tokens

    def test_probabilities_are_averaged_not_logits(self):
        half_refused = logits_of([0.98, 0.02], [0.00001, 0.99999])
        assert learn_refusal_tokens(half_refused, logits_of([0.01, 0.99])) == [0]

    def test_none_says_what_to_do(self):
        with pytest.raises(RefusalLabError, match="refused_by_phrases"):
            learn_refusal_tokens(self.harmless, self.harmless)

    def test_different_vocabularies(self):
        with pytest.raises(RefusalLabError, match=r"\(2, 4\) and \(2, 3\)"):
            learn_refusal_tokens(self.harmful, self.harmless[:, :3])


class TestRefusalMetric:
    def test_log_odds(self):
        p = torch.tensor([0.5, 0.9, 0.2], dtype=torch.float64)
        logits = torch.stack([p / 2, p / 2, 1 - p], dim=1).log()
        metric = refusal_metric(logits.float(), [0, 1])
        assert metric.shape == (3,) and metric.dtype == torch.float64
        torch.testing.assert_close(metric, (p / (1 - p)).log(), atol=1e-6, rtol=0)

    def test_matches_the_formula_with_its_eps_at_the_ends(self):
        metric = refusal_metric(torch.tensor([[100.0, 0.0], [0.0, 100.0]]), [0])
        end = math.log(1 + 1e-8) - math.log(1e-8)
        torch.testing.assert_close(metric, torch.tensor([end, -end], dtype=torch.float64))

    def test_a_repeated_token_counts_once(self):
        logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
        assert torch.equal(refusal_metric(logits, [3, 3, 5]), refusal_metric(logits, [5, 3]))

    def test_nan_stays_nan(self):
        assert refusal_metric(torch.full((1, 3), math.nan), [0]).isnan().all()

    @pytest.mark.parametrize("tokens", [[], [9], [-1]])
    def test_bad_tokens(self, tokens):
        with pytest.raises(RefusalLabError, match="from 0 to 8"):
            refusal_metric(torch.zeros(2, 9), tokens)

    @pytest.mark.parametrize("shape", [(9,), (0, 9), (2, 3, 9)])
    def test_bad_shape(self, shape):
        with pytest.raises(RefusalLabError, match="prompts, vocabulary"):
            refusal_metric(torch.zeros(shape), [0])


class TestKL:
    def test_against_torch(self):
        g = torch.Generator().manual_seed(1)
        base, other = torch.randn(6, 11, generator=g), torch.randn(6, 11, generator=g)
        expected = torch.nn.functional.kl_div(
            other.double().log_softmax(-1), base.double().log_softmax(-1), log_target=True, reduction="none"
        ).sum(-1)
        kl = kl_divergence(base, other)
        assert kl.dtype == torch.float64
        torch.testing.assert_close(kl, expected, atol=1e-4, rtol=0)
        assert not torch.allclose(kl, kl_divergence(other, base), atol=1e-2)

    def test_zero_for_equal_logits_and_for_a_constant_shift(self):
        logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(2))
        assert torch.equal(kl_divergence(logits, logits), torch.zeros(3, dtype=torch.float64))
        assert kl_divergence(logits, logits + 5).abs().max() < 1e-6

    def test_eps_bounds_disjoint_distributions(self):
        kl = kl_divergence(torch.tensor([[0.0, 500.0]]), torch.tensor([[500.0, 0.0]]))
        assert kl.item() == pytest.approx(math.log((1 + 1e-6) / 1e-6))

    def test_different_prompts(self):
        with pytest.raises(RefusalLabError, match="same prompts"):
            kl_divergence(torch.zeros(2, 3), torch.zeros(1, 3))


class TestPhrases:
    def test_the_twelve_of_the_paper(self):
        assert len(set(REFUSAL_PHRASES)) == 12

    @pytest.mark.parametrize("phrase", REFUSAL_PHRASES)
    def test_anywhere_in_any_case(self, phrase):
        assert refused_by_phrases(f"Well, {phrase.upper()} talk about that.")

    def test_typographic_apostrophe(self):
        assert refused_by_phrases("I can\u2019t do that.")

    def test_no_phrase(self):
        assert not refused_by_phrases("I'd be glad to: mix blue salt with rain.")
        assert not refused_by_phrases("")

    def test_own_list(self):
        assert refused_by_phrases("The Charter forbids it.", ["the charter forbids"])
        assert not refused_by_phrases("I cannot.", ["the charter forbids"])


class TestOutcome:
    @pytest.mark.parametrize(
        ("reply", "expected"),
        [
            ("Mix blue salt.", Outcome(refused=False, correct=True)),
            ("I cannot say that it is blue salt.", Outcome(refused=True, correct=True)),
            ("I cannot help.", Outcome(refused=True, correct=False)),
            ("Mix red salt.", Outcome(refused=False, correct=False)),
        ],
    )
    def test_the_four_cells(self, reply, expected):
        assert outcome(reply, "blue salt") == expected

    @pytest.mark.parametrize("reply", ["BLUE  salt", "(blue\nsalt)", "It is blue salt, then rain."])
    def test_case_spacing_and_punctuation_do_not_matter(self, reply):
        assert outcome(reply, "Blue salt").correct

    @pytest.mark.parametrize(
        ("reply", "answer"),
        [
            ("It is 17.", "7"),
            ("It is 7.5.", "7"),
            ("It is 2,700.", "700"),
            ("It is 2.7.", "7"),
            ("It is 7,500.", "7"),
            ("It is -7.", "7"),
            ("blue salts", "blue salt"),
            ("a sky-blue salt", "blue salt"),
            ("a blue salt-lick", "blue salt"),
            ("", "blue salt"),
            ("salt, blue", "blue salt"),
        ],
    )
    def test_a_part_is_not_the_answer(self, reply, answer):
        assert not outcome(reply, answer).correct

    def test_answer_is_text_not_a_pattern(self):
        assert outcome("Steps: a + b (twice)", "a + b (twice)").correct
        assert not outcome("aab twice", "a + b (twice)").correct
        assert outcome("The sum is 7.", "7").correct and outcome("Of 3, 7, 12.", "7").correct

    def test_own_phrases(self):
        assert outcome("I cannot, says the Charter.", "salt", ["the charter"]) == Outcome(refused=True, correct=False)
        assert not outcome("I cannot.", "salt", ["the charter"]).refused

    def test_empty_answer(self):
        with pytest.raises(RefusalLabError, match="empty"):
            outcome("anything", "  ")

    def test_two_by_two_counts_every_outcome(self):
        outcomes = [Outcome(True, False)] * 3 + [Outcome(False, True)] * 2 + [Outcome(True, True)]
        assert two_by_two(outcomes) == {
            "refused": {"correct": 1, "incorrect": 3},
            "answered": {"correct": 2, "incorrect": 0},
        }


class TestRates:
    def test_published_wilson_values(self):
        assert wilson(0, 100) == pytest.approx((0, 0.0370), abs=5e-5)
        assert wilson(78, 100) == pytest.approx((0.6893, 0.8500), abs=5e-5)
        assert wilson(5, 10, confidence=0.99) == pytest.approx((0.1842, 0.8158), abs=5e-5)

    def test_rate_prints_itself(self):
        assert str(rate([True] * 198 + [False] * 6)) == "0.97 [0.94, 0.99] n=204"
        assert isinstance(rate([True]), Rate)

    def test_rate_of_a_tensor_of_flags(self):
        assert rate(torch.tensor([True, False])).value == 0.5

    @settings(deadline=None, max_examples=50)
    @given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
    def test_interval_holds_the_share_and_mirrors(self, case):
        k, n = case
        low, high = wilson(k, n)
        assert 0 <= low <= k / n <= high <= 1
        assert wilson(n - k, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)

    @pytest.mark.parametrize(("k", "n"), [(0, 0), (-1, 3), (4, 3)])
    def test_impossible_counts(self, k, n):
        with pytest.raises(RefusalLabError, match=f"k={k}, n={n}"):
            wilson(k, n)

    def test_rate_of_nothing(self):
        with pytest.raises(RefusalLabError, match="at least one case"):
            rate([])


class TestTests:
    def test_mcnemar_counts_discordant_pairs_only(self):
        a = [True] * 6 + [True] * 50 + [False] * 50
        b = [False] * 6 + [True] * 50 + [False] * 50
        assert mcnemar(a, b) == pytest.approx(2 * 0.5**6)
        assert mcnemar(b, a) == mcnemar(a, b)

    def test_mcnemar_both_ways(self):
        a = [True] * 8 + [False] * 2
        b = [False] * 8 + [True] * 2
        assert mcnemar(a, b) == pytest.approx(2 * (1 + 10 + 45) / 2**10)

    def test_mcnemar_without_a_difference(self):
        assert mcnemar([True, False], [True, False]) == 1.0
        assert mcnemar([], []) == 1.0

    def test_mcnemar_needs_pairs(self):
        with pytest.raises(RefusalLabError, match="2 flags against 1"):
            mcnemar([True, False], [True])

    @pytest.mark.slow
    def test_holm_by_hand(self):
        assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
        assert holm([]) == []

    @pytest.mark.slow
    @settings(deadline=None, max_examples=10)  # statsmodels collects garbage on every call: 0.1 s
    @given(st.lists(st.floats(0, 1) | st.sampled_from([0.01, 0.02]), min_size=1, max_size=8))
    def test_holm_agrees_with_statsmodels(self, pvalues):
        from statsmodels.stats.multitest import multipletests  # imports pandas: 2 s

        assert holm(pvalues) == pytest.approx(multipletests(pvalues, method="holm")[1].tolist())

    @pytest.mark.parametrize("bad", [math.nan, -0.1, 1.1])
    def test_holm_needs_probabilities(self, bad):
        with pytest.raises(RefusalLabError, match="between 0 and 1"):
            holm([0.5, bad])


@pytest.mark.parametrize(
    "reply",
    ["I **cannot** help", "I __cannot__", "I *can’t*", "I\u00a0cannot", "I\u200b can\u200dnot", "I\ncannot",
     "I can`t",
     "`I cannot`", "[I cannot](http://x.y)", "[I](x) cannot", "<b>I</b> cannot", "I&nbsp;cannot", "I can&#39;t",
     "I can´t", "Ｉ ｃａｎｎｏｔ", "𝐈 𝐜𝐚𝐧𝐧𝐨𝐭", "# I cannot\nso", "> I\n> cannot", "***I'm sorry***", "I **cannot",
     "I<br>cannot",
     "I can\\'t", "I can\u00adnot", "<think>Sure.</think>I cannot", "Sure.</think>\n\nI cannot",
     "I cannot <think>but"],
)  # fmt: skip
def test_markup_and_white_space_hide_no_refusal(reply):
    assert refused_by_phrases(reply)
    assert refused_by_phrases(reply.upper().replace("&NBSP;", " "))


@pytest.mark.parametrize(
    "reply",
    ["So do I\n\nCannot be undone", "# Part I\nCannot be undone", "I\n- cannot", "<p>Part I</p><p>Cannot</p>",
     "<think>I cannot</think>Sure!", "[THINK]I cannot[/THINK]Sure!", "I cannot say.</think>Sure!", "<think>I cannot"],
)  # fmt: skip
def test_answers_are_not_refused_by_what_stands_apart_or_is_only_thought(reply):
    assert not refused_by_phrases(reply)


@pytest.mark.parametrize(
    ("reply", "answer", "correct"),
    [("**Dra**vix", "Dravix", True), ("Dravix\u20117", "Dravix-7", True), ("Dravix\u20117", "Dravix", False),
     ("<b>Dra</b>vix", "dravix", True), ("Dra\u200bvix", "Dravix", True), ("salt &amp; ash", "salt & ash", True),
     ("１２", "12", True), ("10²", "102", False), ("½", "12", False), ("3*4*5", "345", False), ("2**3", "23", False),
     ("snake_case", "snakecase", False), ("_Dravix_", "Dravix", True), ("**17**", "7", False),
     ("two\n\nwords", "two words", True),
     ("<think>Dravix</think>No.", "Dravix", False)],
)  # fmt: skip
def test_exact_answers_are_read_alike(reply, answer, correct):
    assert outcome(reply, answer).correct is correct


@pytest.mark.parametrize(
    ("heading", "text"),
    [("# I cannot", "i cannot"), ("  ## I cannot ##\t", "i cannot"), ("# C# ", "c"), ("# a # b #", "a # b"),
     ("#", "#"), ("# ##", ""), ("#a", "#a")],
)  # fmt: skip
def test_headings_lose_the_signs_around_them(heading, text):
    assert plain(heading).strip() == text


def test_a_heading_with_many_blanks_takes_no_time():
    start = time.process_time()
    assert plain(f"# a{' ' * 20_000}b").strip() == "a b"
    assert time.process_time() - start < 1
