from .best_of_n import augment, best_of_n_attack
from .conversing import crescendo, many_shot, past_tense, rewriting_list, search_rewritings
from .gcg import (
    Knobs,
    allowed_tokens,
    candidate_losses,
    find_suffix,
    gcg_attack,
    hiding_from,
    keys_and_values,
    prepare,
    random_suffix,
    sample_candidates,
    suffix_loss,
    suffix_texts,
    survives,
    with_suffix,
)  # fmt: skip
from .prefilling import prefilling_attack
from .result import answered, direct, disclosed, rewrite, send
from .templates import rewritings, template
from .white_box import gradient_direction, re_extract, steps_to_break, successive_directions
