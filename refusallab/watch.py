"""Watches an edit for an old habit: `block.output[0] = ...`, which changes only the first prompt of a batch.

In older versions of transformers the output of a block was a tuple, with the stream in place 0. Now it is the stream
itself, [batch, seq, width], so that [0] is the first prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from nnsight.intervention.envoy import Envoy
from nnsight.intervention.eproperty import eproperty
from torch import Tensor

from refusallab.errors import RefusalLabError


class WatchedEnvoy(Envoy):
    """An nnsight envoy that shows what is read from it to the `watch` in progress."""

    watch: Watch | None = None

    @eproperty
    def output(self, value: Any) -> Any:
        """The module's forward output."""
        return _shown(value)

    @eproperty
    def input(self, value: Any) -> Any:
        """The module's first forward input."""
        return _shown(Envoy.input._preprocess(self, value))

    @input.postprocess
    def input(self, value: Any) -> Any:
        return Envoy.input._postprocess(self, value)


class Watch:
    """Whether a tensor was changed in place in its first row and in no other, between one read and the next."""

    def __init__(self) -> None:
        self.first_row_only = False
        self.last: tuple[Tensor, int, Tensor] | None = None  # what was read, its version and the sums of its rows

    def look(self, value: Any) -> None:
        """Check what was read before, and remember this one."""
        if self.last and self.last[0]._version != self.last[1]:
            same = (_sums(self.last[0]) == self.last[2]).tolist()
            self.first_row_only |= not same[0] and all(same[1:])
        stream = isinstance(value, Tensor) and value.ndim == 3 and min(value.shape[:2]) > 1
        self.last = (value, value._version, _sums(value)) if stream else None


@contextmanager
def all_rows() -> Iterator[None]:
    """Around a trace with an edit: RefusalLabError when the edit changed only the first prompt of the batch, in place.

    Only passes over a prompt are watched, not those over single tokens: an edit does the same in each.
    """
    WatchedEnvoy.watch = watch = Watch()
    try:
        yield
    finally:
        WatchedEnvoy.watch = None
    watch.look(None)
    if watch.first_row_only:
        raise RefusalLabError(
            "The edit changes the first prompt of the batch in place, and no other: in block.output[0] = ..., [0] is "
            "that prompt, not the stream. Assign the whole stream [batch, seq, width]: block.output = ..."
        )


def _shown(value: Any) -> Any:
    if WatchedEnvoy.watch:
        WatchedEnvoy.watch.look(value)
    return value


def _sums(x: Tensor) -> Tensor:
    # fp32 would hide changes of the size of rounding; Apple's GPU has nothing wider
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    return x.detach().flatten(1).sum(1, dtype=dtype)
