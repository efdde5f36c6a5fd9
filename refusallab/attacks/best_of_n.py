"""Best-of-n: noisy copies of a request until one is answered. Hughes et al. 2024 (arXiv 2412.03556)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from refusallab.attacks.result import AttackResult, answered, rewrite, send_until
from refusallab.errors import RefusalLabError
from refusallab.measure import Outcome
from refusallab.model import Edit, Model
from refusallab.prompts import Item

SIGMA = 0.4  # strength of the noise in the paper


def scramble(text: str, p: float, rng: random.Random) -> str:
    """Each word of more than three characters has its middle characters shuffled with probability p."""
    return " ".join(_shuffled_middle(w, rng) if len(w) > 3 and rng.random() < p else w for w in text.split(" "))


def capitalize(text: str, p: float, rng: random.Random) -> str:
    """Each letter changes its case with probability p."""
    return "".join(c.swapcase() if rng.random() < p else c for c in text)


def mistype(text: str, p: float, rng: random.Random) -> str:
    """Each printable ASCII character but the space moves to a neighbouring code with probability p."""
    return "".join(_neighbour(c, rng) if "!" <= c <= "~" and rng.random() < p else c for c in text)


def augment(text: str, sigma: float, rng: random.Random) -> str:
    """The paper's three kinds of noise in its order: letter order and case with p = sqrt(sigma), codes with sigma^3."""
    if not 0 <= sigma <= 1:
        raise RefusalLabError(f"sigma is the strength of the noise, from 0 to 1; got {sigma}.")
    text = scramble(text, sigma**0.5, rng)
    text = capitalize(text, sigma**0.5, rng)
    return mistype(text, sigma**3, rng)


def best_of_n_attack(
    m: Model,
    items: Sequence[Item],
    n: int = 16,
    *,
    sigma: float = SIGMA,
    seed: int = 0,
    until: Callable[[Outcome], bool] = answered,
    system: str | None = None,
    edit: Edit | None = None,
) -> list[AttackResult]:
    """Send up to n noisy copies of each request, until one is answered.

    The copies depend only on seed, item and number, so a larger n only adds tries. Replies are greedy, where the paper
    samples them at temperature 1: all the chance is in the noise.
    """

    def variant(item: Item, k: int) -> object:
        rng = random.Random(f"{seed} {item.id} {k}")
        return rewrite(item.prompt, lambda text: augment(text, sigma, rng))

    return send_until(m, "best-of-n", items, variant, n, until=until, system=system, edit=edit)


def _shuffled_middle(word: str, rng: random.Random) -> str:
    middle = list(word[1:-1])
    rng.shuffle(middle)
    return word[0] + "".join(middle) + word[-1]


def _neighbour(character: str, rng: random.Random) -> str:
    code = ord(character) + rng.choice((-1, 1))
    return chr(min(max(code, ord("!")), ord("~")))
