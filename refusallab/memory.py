"""What becomes of the memory of freed tensors. Only glibc has these switches; elsewhere nothing happens."""

from __future__ import annotations

import contextlib
import ctypes

SWITCHES = {-3: 16, -1: 32, -2: 8}  # MiB: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD


def keep_small_tensors() -> None:
    """Keep the memory of freed tensors up to 16 MiB for the next ones; larger ones go back to the system at once.

    What goes back is given anew and cleared for the next tensor, which can take half of the time. What is kept, a lab
    needs beside all else.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        for switch, mebibytes in SWITCHES.items():
            ctypes.CDLL(None).mallopt(switch, mebibytes * 2**20)


def give_back(*_: object) -> None:
    """Give what is kept and free to the system: after each cell of a lab, so that the next one does not start high."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
