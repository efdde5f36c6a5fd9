"""Refusal mechanics: how language models refuse, measured on models whose truth is known.

What the notebooks use of the method can be imported from here. `__init__.pyi` says where each name is defined; nothing
is imported before it is used.
"""

import contextlib
import ctypes
import os

from refusallab.faces import face

# Let threads sleep while they wait for each other, instead of spinning: on a computer with other work to do, spinning
# makes these small models about ten times slower. OpenMP reads it when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# What glibc does with freed tensors. What goes back to the system is given anew and cleared for the next tensor, which
# can take half of the time; what is kept, a lab needs beside all else. So the memory of tensors up to 16 MiB is kept
# for the next ones, and what is free at the end of the heap beyond 32 MiB goes back. Other systems have no such switch.
with contextlib.suppress(AttributeError, OSError, TypeError):
    for switch, mebibytes in {-3: 16, -1: 32, -2: 8}.items():  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
        ctypes.CDLL(None).mallopt(switch, mebibytes * 2**20)

__version__ = "0.2.0"
__getattr__, __all__ = face(__name__, __file__)
