from .capstone import (
    Result,
    attackers_direction,
    check_interface,
    frozen_trial,
    quick_trial,
    run_trial,
    score_against,
)  # fmt: skip
from .checking import check, solved
from .progress_file import progress, shared_file
from .session import real_model, start
