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

# Let tensors of a MiB or more go back to the system as soon as they are freed. Otherwise glibc keeps them for the next
# ones, and a lab grows past what a small hub gives. Other systems have no such switch.
with contextlib.suppress(AttributeError, OSError, TypeError):
    ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD

__version__ = "0.2.0"
__getattr__, __all__ = face(__name__, __file__)
