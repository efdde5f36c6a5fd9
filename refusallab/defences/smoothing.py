"""SmoothLLM: several noisy copies of a request are answered, and the majority decides. Robey et al. 2023 (2310.03684).

A suffix that was optimized to the letter seldom survives noise in its letters. Neither do the names in an honest
request, and every copy costs a reply.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass

from refusallab.attacks.result import rewrite
from refusallab.defence import passes, write_replies
from refusallab.errors import RefusalLabError
from refusallab.inputs import flagged
from refusallab.measure import refused_by_phrases
from refusallab.model import Edit, Model, Prompt, listed_prompts
from refusallab.prompts import refusal_phrases

COPIES = 5
SHARE = 0.05  # of the characters of each copy


def perturb(text: str, share: float, rng: random.Random) -> str:
    """Swap a share of the characters, chosen without repetition, for random letters, digits or punctuation."""
    if not 0 <= share <= 1:
        raise RefusalLabError(f"The share of characters to swap lies between 0 and 1; got {share}.")
    letters = list(text)
    for i in rng.sample(range(len(text)), round(share * len(text))):
        letters[i] = rng.choice(string.ascii_letters + string.digits + string.punctuation)
    return "".join(letters)


def vote(refused: Sequence[bool]) -> int:
    """The place of the reply to return: the first on the side of the majority. A tie goes to the refusals."""
    flags = flagged(refused)
    if not flags:
        raise RefusalLabError("There is no reply to choose from: give at least one.")
    return flags.index(2 * sum(flags) >= len(flags))


@dataclass
class SmoothLLM:
    """Answers `copies` noisy versions of a request and returns a reply on the side of the majority."""

    m: Model
    copies: int = COPIES
    share: float = SHARE
    name: str = "SmoothLLM"
    extra_passes: int = 0

    def replies(self, prompts: Sequence[Prompt], *, edit: Edit | None = None, prefill: str = "") -> list[str]:
        prompts = listed_prompts(prompts)
        noisy = [rewrite(p, lambda text, k=k: self._noise(text, k)) for p in prompts for k in range(self.copies)]
        written = write_replies(self.m, noisy, edit=edit, prefill=prefill)
        phrases, kept = refusal_phrases(self.m), []
        for i in range(0, len(written), self.copies):
            copies = written[i : i + self.copies]
            kept.append(copies[vote([refused_by_phrases(reply, phrases) for reply in copies])])
        self.extra_passes += passes(self.m, written) - passes(self.m, kept)
        return kept

    def _noise(self, text: str, k: int) -> str:
        return perturb(text, self.share, random.Random(f"{text} {k}"))
