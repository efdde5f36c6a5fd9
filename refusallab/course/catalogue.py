"""Titles and points of the exercises and written questions. Reading them needs no model.

How an exercise is judged is defined in `refusallab/course/exercises/`, a module for each lab.
"""

from __future__ import annotations

from dataclasses import dataclass

from refusallab.errors import RefusalLabError


@dataclass(frozen=True)
class Header:
    """The header of an exercise that is graded automatically."""

    number: str  # "2.1": lab and place in it
    title: str
    difficulty: int  # 1 to 3
    minutes: int
    points: int
    function: str  # the name that the student defines

    @property
    def lab(self) -> str:
        """Two digits: "02" for exercise 2.1."""
        return _lab(self.number)


@dataclass(frozen=True)
class Question:
    """A written question. People grade it, by the rubric in the solutions."""

    number: str
    title: str
    minutes: int
    points: int

    @property
    def lab(self) -> str:
        return _lab(self.number)


def _lab(number: str) -> str:
    return f"{int(number.split('.')[0]):02}"


HEADERS = (
    Header("0.1", "What the template puts after every instruction", 1, 15, 2, "post_instruction_ids"),
    Header("0.2", "The residual stream of a prompt", 2, 15, 2, "residual_stream"),
    Header("0.3", "The logit lens", 2, 10, 2, "lens"),
    Header("0.4", "One token at a time", 2, 15, 3, "greedy_reply"),
    Header("0.5", "Bug clinic: the model that never refused", 2, 15, 2, "prompt_ids"),
    Header("1.1", "Which tokens open a refusal?", 1, 15, 2, "opening_tokens"),
    Header("1.2", "The refusal metric", 1, 15, 2, "log_odds"),
    Header("1.3", "The phrase judge", 1, 10, 2, "says_no"),
    Header("1.4", "The 2x2", 2, 20, 3, "outcome_table"),
    Header("1.5", "The Wilson interval", 2, 15, 2, "interval"),
    Header("1.6", "Who is refused?", 1, 10, 2, "wrong_refusals"),
    Header("1.7", "Neither refused nor answered", 1, 10, 2, "kind_of_reply"),
    Header("2.1", "Difference in means", 1, 10, 2, "mean_difference"),
    Header("2.2", "How much else changes: KL", 1, 10, 2, "kl"),
    Header("2.3", "Three scores for a candidate", 2, 20, 3, "score"),
    Header("2.4", "The selection rule", 2, 15, 2, "choose"),
    Header("2.5", "Bug clinic: the direction that would not work", 2, 15, 2, "last_token_stream"),
    Header("3.1", "How far along the direction?", 1, 10, 2, "project"),
    Header("3.2", "The plane that shows most", 2, 15, 3, "plane"),
    Header("3.3", "Separated, or only fitted?", 2, 15, 3, "held_out_share"),
    Header("3.4", "Do the candidates agree?", 1, 10, 2, "cosine_matrix"),
    Header("3.5", "What the direction says", 2, 15, 2, "direct_effect"),
    Header("4.1", "Ablation, everywhere", 2, 20, 3, "ablate"),
    Header("4.2", "Bug clinic: the edit that came and went, and stayed", 2, 20, 3, "generate_with"),
    Header("4.3", "Activation addition", 1, 10, 2, "add"),
    Header("4.4", "A fair opponent", 1, 10, 2, "matched"),
    Header("4.5", "Affine concept editing", 2, 15, 3, "ace"),
    Header("4.6", "A direction for something else", 2, 15, 2, "steer_toward"),
    Header("5.1", "One matrix, three layouts", 1, 10, 2, "without"),
    Header("5.2", "The edit of a model", 2, 20, 3, "orthogonalized"),
    Header("5.3", "Where hooks and weights part ways", 2, 15, 2, "gaps"),
    Header("5.4", "The edit for every architecture", 3, 25, 3, "orthogonalized_fully"),
    Header("5.5", "Cross-entropy of the next token", 2, 15, 2, "loss_by_text"),
    Header("5.6", "A paired interval", 2, 10, 2, "paired_interval"),
    Header("6.1", "A template around the request", 1, 10, 2, "disguise"),
    Header("6.2", "Words in the model's mouth", 1, 10, 2, "prefilled"),
    Header("6.3", "Best-of-n, counted", 2, 15, 2, "success_by_tries"),
    Header("6.4", "The gradient of a choice", 3, 25, 3, "one_hot_gradient"),
    Header("6.5", "Candidates", 2, 15, 2, "swaps"),
    Header("6.6", "Bug clinic: the string that was never optimized", 2, 20, 3, "survivors"),
    Header("7.1", "The angle, layer by layer", 1, 10, 2, "angle_by_layer"),
    Header("7.2", "Which heads write along the direction?", 3, 25, 3, "head_contributions"),
    Header("7.3", "Where does a head look?", 1, 10, 2, "attention_mass"),
    Header("7.4", "Directions in a cone", 2, 15, 2, "cone_directions"),
    Header("7.5", "Orthogonal, and yet", 2, 15, 3, "effect_on_other"),
    Header("8.1", "The worst window", 1, 10, 2, "score"),
    Header("8.2", "SmoothLLM's vote", 1, 10, 2, "choose"),
    Header("8.3", "A probe monitor with a known rate of false alarms", 2, 20, 3, "fit_monitor"),
    Header("8.4", "Refuse on condition", 3, 20, 3, "steer_if"),
    Header("8.5", "Which direction does nobody write?", 3, 20, 3, "two_lowest"),
    Header("9.1", "Extended refusals", 1, 10, 2, "extended_replies"),
    Header("9.2", "The loss of ReFAT", 2, 20, 4, "adversarial_loss"),
    Header("9.3", "The loss of rerouting", 2, 15, 3, "rerouting_loss"),
    Header("9.4", "A direction by gradient", 3, 20, 4, "step"),
    Header("9.5", "Steps to break", 1, 10, 2, "steps_needed"),
    Header("10.1", "A guard that keeps to the interface", 2, 20, 3, "guarded_replies"),
    Header("10.2", "Two guards in a row", 1, 10, 2, "cascade"),
    Header("10.3", "One budget for two guards", 3, 20, 3, "two_thresholds"),
    Header("10.4", "A score that refusing at random cannot raise", 1, 10, 2, "capstone_points"),
    Header("10.5", "The worst case, and what has really changed", 2, 20, 3, "verdict"),
    Header("11.1", "Thought and answer", 1, 10, 2, "split_reply"),
    Header("11.2", "Bug clinic: the thought that changed nothing", 2, 15, 3, "after_thought"),
    Header("11.3", "Does the reply follow?", 1, 10, 2, "share_following"),
    Header("11.4", "The beginnings of a thought", 1, 10, 2, "prefixes"),
    Header("11.5", "When is it decided?", 1, 10, 2, "decided_at"),
    Header("11.6", "Four ways to steer a model that thinks", 2, 20, 4, "steered"),
    Header("12.1", "Move one activation", 2, 15, 3, "patched_logits"),
    Header("12.2", "How much comes back", 1, 10, 2, "share_recovered"),
    Header("12.3", "One head at a time", 3, 20, 3, "patched_head"),
    Header("12.4", "Only along one direction", 1, 10, 2, "swap_component"),
    Header("12.5", "Bug clinic: the word that did not matter", 2, 15, 2, "word_stream"),
    Header("12.6", "A sparse code", 2, 10, 2, "sparse_code"),
    Header("13.1", "Words in both mouths", 1, 10, 2, "many_shots"),
    Header("13.2", "Drift, turn by turn", 1, 10, 2, "drift"),
    Header("13.3", "A contrast of two system prompts", 2, 10, 2, "contrasted"),
    Header("13.4", "Several tokens must agree", 1, 10, 2, "window_means"),
    Header("13.5", "Bug clinic: the watcher that cried too often", 2, 15, 3, "stop_threshold"),
    Header("13.6", "Agreement beyond chance", 1, 10, 2, "kappa"),
    Header("14.1", "Ranks of a difference", 2, 15, 3, "plus_ranks"),
    Header("14.2", "Bug clinic: the direction that came back", 2, 15, 3, "norm_preserving"),
    Header("14.3", "A tent over the layers", 1, 10, 2, "strength_at"),
    Header("14.4", "Fewer bits", 2, 10, 2, "in_bits"),
    Header("14.5", "Several directions at once", 2, 15, 3, "without_span"),
    Header("14.6", "How much lies in one rank", 1, 10, 2, "one_rank_energy"),
)
QUESTIONS = (
    Question("0.6", "Where was it decided?", minutes=15, points=3),
    Question("1.8", "Is the new attack better?", minutes=15, points=3),
    Question("2.6", "What did the test set decide?", minutes=15, points=3),
    Question("3.6", "What does a picture prove?", minutes=15, points=3),
    Question("4.7", "What exactly did we switch off?", minutes=15, points=3),
    Question("5.7", "The edit that half worked", minutes=15, points=3),
    Question("6.7", "Nearly every request", minutes=15, points=3),
    Question("7.6", "Is it one direction?", minutes=20, points=4),
    Question("8.6", "Which defence would you ship?", minutes=20, points=4),
    Question("9.6", "Which one would you ship?", minutes=20, points=3),
    Question("10.6", "The report", minutes=60, points=10),
    Question("11.7", "What is a thought worth?", minutes=15, points=4),
    Question("12.7", "What does a patch prove?", minutes=15, points=4),
    Question("13.7", "Who watches the conversation?", minutes=15, points=4),
    Question("14.7", "Which weights would you release?", minutes=15, points=4),
)
LABS = tuple(sorted({header.lab for header in HEADERS}))


def header(number: str) -> Header:
    """The header of the exercise with a number. RefusalLabError if there is none."""
    for found in HEADERS:
        if found.number == number:
            return found
    raise RefusalLabError(f"There is no exercise {number!r}: choose one of {', '.join(h.number for h in HEADERS)}.")
