"""What a suffix does inside, token by token: the projection of the stream on a direction as the suffix grows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from refusallab.activations import residual
from refusallab.attacks.result import rewrite
from refusallab.geometry import projections
from refusallab.model import Model, Prompt, ids_behind, ids_of, messages, text_behind


@dataclass(frozen=True)
class SuffixEffect:
    """Projections on a direction at one site, in units of the residual stream."""

    tokens: tuple[str, ...]  # of the suffix
    start: float  # without the suffix
    growing: tuple[float, ...]  # with the first 1, 2, ... tokens; the last entry is that of the whole suffix
    without: tuple[float, ...]  # with the whole suffix but this token


def suffix_effect(
    m: Model, prompt: Prompt, suffix: str, r: Tensor, layer: int, position: int, *, system: str | None = None
) -> SuffixEffect:
    """The projection on r [width] at the input of block `layer`, at a position that counts from the end of the prompt.

    What is left of a suffix is sent as text, so its tokens may merge where one was taken out.
    """
    request = messages(prompt)[-1]["content"]
    ids, anchor = ids_behind(m, request, suffix), ids_of(m, request)[-1:]
    tokens = tuple(text_behind(m, anchor, [i]) for i in ids)
    parts = [ids[:k] for k in range(len(ids) + 1)] + [ids[:k] + ids[k + 1 :] for k in range(len(ids))]
    texts = [text_behind(m, anchor, part) for part in parts]  # a character may be cut
    prompts = [rewrite(prompt, lambda text, added=added: text + added) for added in texts]
    streams = residual(m, prompts, layers=[layer], positions=[position], system=system)
    start, *values = projections(streams[:, 0, 0], r).tolist()
    return SuffixEffect(tokens, start, tuple(values[: len(tokens)]), tuple(values[len(tokens) :]))
