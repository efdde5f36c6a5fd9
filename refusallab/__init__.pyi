from . import explore
from .activations import logit_lens, mean_residual, residual, stream
from .attribution import attention_from_last, attribute, cosine_trace, regions
from .audit import band, gap_left
from .cones import (
    direction_effect,
    find_cone,
    last_token_direction,
    mean_ablation,
    orthonormal,
    search_directions,
    short,
)
from .conversations import EARLIER, after_turns, streams_by_turn
from .decoding import closed_prompt, contrast, contrasted_replies, sample_replies
from .defence import AnyOf, ModelAlone, last_words, stock_refusal, write_replies
from .dictionary import (
    Dictionary,
    Transcoder,
    features_of,
    random_dictionary,
    token_mlps,
    token_streams,
    train_dictionary,
    train_transcoder,
)
from .directions import (
    Direction, candidate_directions, discarded_because, load_direction, random_directions, save_direction,
    score_candidates, search_candidates,
)  # fmt: skip
from .errors import RefusalLabError
from .experiment import find_direction
from .findings import carried_over
from .finetuning import finetune, reply_loss, shuffled, train_copy
from .geometry import right_side, token_strip
from .harmfulness import (
    law_questions,
    site_directions,
    steered_verdicts,
    turned,
    turned_rates,
    verdicts,
    verdicts_by_layer,
)
from .interventions import ablation, addition, affine, project_out, span_ablation, unit
from .judging import judge, judge_test_sets, outcomes, rates, refusal_openings, refuses, report
from .measure import (
    Difference, Outcome, cross_entropy, holm, kl_divergence, mcnemar, outcome, p_text, paired_bootstrap,
    paired_difference, rate, refusal_metric, refused_by_phrases, wilson,
)  # fmt: skip
from .orthogonalization import gap_by_layer, orthogonalize, write_strength, written_weights
from .patching import Activations, patch, patched_metrics, read_activations, recovery, swap_component, swap_head
from .prompts import attack_templates, bundled, prompt_set, refusal_phrases
from .records import alarming, every_record, recorded, recorded_direction
from .steering import dose_curve, norm_matched
from .thoughts import (
    behind, exact_steps, final_stream, outcomes_behind, read_thought, right_thought, sentences, think, thought_of,
    with_thinking, within, write_thoughts,
)  # fmt: skip
from .truth import judge_errors, lawful_facts, request_of, tells_a_method, true_replies
from .twins import same_things, sample_requests, twin_requests
from .weights import add_ranks, changed, edit_writers, quantize, search_edit, top_ranks

__version__: str
