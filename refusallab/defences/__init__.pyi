from .exchange import Cascade, ExchangeProbe, Reader, StreamingProbe, fit_exchange, reply_streams, rolling_means
from .integrity import hide, quietest
from .matrix import (
    attack_matrix,
    benign_items,
    difference_at,
    forbidden_items,
    knowing_attacks,
    standard_attacks,
)  # fmt: skip
from .monitor import Monitor, linear_probe
from .perplexity import PerplexityFilter, count_bigrams
from .prompting import SystemPrompt
from .runtime import choose_probe, fit_filter, run_time_defences
from .smoothing import perturb
from .thinking import ThoughtProbe, ThoughtReader, recovering
from .thresholds import roc, threshold_at
from .traffic import sample_exchanges, sample_traffic
from .training import Lesson, lessons, stay
